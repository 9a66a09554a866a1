"""What is kept of banks: sums with one coefficient for all, and the kernels between datasets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pico
import pytest
from cli_runner import posix_only, run

from edgelora.adapters.gguf_lora import open_lora
from edgelora.build import means
from edgelora.build.grams import KERNELS, open_mixture
from edgelora.build.kept import Shelf
from edgelora.build.means import MEANS, write_sum
from edgelora.build.trials import make_trial
from edgelora.errors import EdgeLoRAError
from edgelora.operators.mixture import mixture
from edgelora.signature import summarise

HASHES = ["c" * 64, "a" * 64, "b" * 64]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bank")
    base = pico.write_base(folder / "base.gguf")
    return [pico.write_random_lora(folder / f"{i}.gguf", base, seed=i) for i in range(3)]


def third(paths: list[Path], out: Path, hashes: list[str] = HASHES) -> bool:
    return write_sum(paths, hashes, 1 / 3, out)


def test_a_set_is_found_again_in_any_order(paths: list[Path], tmp_path: Path) -> None:
    assert not third(paths, tmp_path / "one.gguf")
    assert third(paths[::-1], tmp_path / "two.gguf", HASHES[::-1])
    MEANS.clear()
    assert not third(paths[::-1], tmp_path / "three.gguf", HASHES[::-1])
    written = {(tmp_path / f"{name}.gguf").read_bytes() for name in ("one", "two", "three")}
    assert len(written) == 1
    told = json.loads(str(open_lora(tmp_path / "one.gguf").metadata["edgelora.provenance"]))
    assert [source["coefficient"] for source in told["sources"]] == [1 / 3] * 3


def test_another_set_or_coefficient_is_another_sum(paths: list[Path], tmp_path: Path) -> None:
    third(paths, tmp_path / "a.gguf")
    assert not third(paths[:2], tmp_path / "b.gguf", HASHES[:2])
    assert not write_sum(paths, HASHES, 0.5, tmp_path / "c.gguf")
    assert len(MEANS.files()) == 3


def test_a_damaged_one_is_made_anew(paths: list[Path], tmp_path: Path) -> None:
    third(paths, tmp_path / "one.gguf")
    (kept,) = MEANS.files()
    whole = kept.path.read_bytes()
    for broken in (b"", b"GGUF", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.path.write_bytes(broken)
        assert not third(paths, tmp_path / f"{len(broken)}.gguf")
        assert kept.path.read_bytes() == whole
        (tmp_path / f"{len(broken)}.gguf").unlink()


def test_the_least_recently_used_make_room(paths: list[Path], tmp_path: Path) -> None:
    third(paths, tmp_path / "a.gguf")
    size = (tmp_path / "a.gguf").stat().st_size
    two = Shelf("means", ".gguf", 2 * size + size // 2)
    write_sum(paths, HASHES, 0.5, tmp_path / "b.gguf", shelf=two)
    for number, kept in enumerate(MEANS.files()):
        os.utime(kept.path, ns=(number, number))
    assert third(paths, tmp_path / "again.gguf")  # now the other one is older
    write_sum(paths, HASHES, 0.7, tmp_path / "c.gguf", shelf=two)
    assert len(MEANS.files()) == 2
    assert third(paths, tmp_path / "kept.gguf")
    assert not write_sum(paths, HASHES, 0.5, tmp_path / "gone.gguf", shelf=two)
    write_sum(paths, HASHES, 0.9, tmp_path / "d.gguf", shelf=Shelf("means", ".gguf", 100))
    assert len(MEANS.files()) == 2  # larger than the cap: not kept, nothing dropped for it


def test_what_a_killed_process_left_is_swept(paths: list[Path], tmp_path: Path) -> None:
    MEANS.folder.mkdir(parents=True)
    (MEANS.folder / ".edgelora-tmp-x-y.gguf").write_bytes(b"half")
    third(paths, tmp_path / "one.gguf")
    assert not list(MEANS.folder.glob(".edgelora-tmp-*")) and len(MEANS.files()) == 1


def test_a_trial_asks_the_cache(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int, int]] = []
    told = {"hashes": HASHES, "progress": lambda *step: steps.append(step)}
    first = make_trial("uniform mean", np.full(3, 1 / 3), paths, tmp_path, **told)
    n = len(open_lora(paths[0]).plan)
    assert steps[-1] == ("combining 3 adapters, tensors", n, n) and len(steps) == n
    whole = first.path.read_bytes()
    first.path.unlink()
    monkeypatch.setattr(means, "merge_adapters", None)
    again = make_trial("uniform mean", np.full(3, 1 / 3), paths, tmp_path, **told)
    assert again.path.read_bytes() == whole
    make_trial("other", np.array([0.5, 0.4, 0.1]), paths, tmp_path, **told)
    assert len(MEANS.files()) == 1


def test_a_mean_over_very_many_is_not_rounded_to_nothing(paths: list[Path], tmp_path: Path) -> None:
    trial = make_trial("uniform mean", np.full(3, 1 / 300_000), paths, tmp_path)
    assert trial.candidate.coefficients == pytest.approx(np.full(3, 1 / 300_000), rel=1e-2)


@posix_only
def test_more_adapters_than_files_may_be_open(paths: list[Path], tmp_path: Path) -> None:
    """A mapped file counts as an open one."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 20, limits[1]))
    try:
        make_trial("all", np.full(40, 1 / 40), [*paths] * 13 + paths[:1], tmp_path)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_command_lists_and_clears(paths: list[Path], tmp_path: Path) -> None:
    third(paths, tmp_path / "a.gguf")
    size = MEANS.files()[0].size_bytes
    assert "uniform means of adapters: 1, " in run("cache", "ls").stderr
    told = json.loads(run("cache", "ls", "--json").stdout)["means"]
    assert told == {"n": 1, "size_bytes": size, "cap_bytes": MEANS.cap_bytes}
    assert run("cache", "clear").stdout == (
        "cleared: 0 embeddings, 1 means, 0 kernels of banks, 0 ends of builds, "
        "0 choices of products\n"
    )
    assert MEANS.files() == []


def test_a_folder_that_cannot_be_written_is_told(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EdgeLoRAError, match="means: this cache cannot be used"):
        third(paths, tmp_path / "a.gguf")


def test_kernels_are_found_again_and_give_the_same_coefficients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = [
        summarise(
            np.random.default_rng([seed, i]).normal(i, 1, (9, 8)).astype(np.float32),
            None, [[1]], n_vocab=2, base_id="b",
        )
        for seed in range(2) for i in range(3)
    ]  # fmt: skip
    target = bank.pop()
    wanted = mixture(target, bank)
    assert np.array_equal(open_mixture(bank).match(target).coefficients, wanted)
    (kept,) = KERNELS.files()
    whole = kept.path.read_bytes()
    for broken in (b"", whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        kept.path.write_bytes(broken)
        assert np.array_equal(open_mixture(bank).match(target).coefficients, wanted)
        assert kept.path.read_bytes() == whole
    monkeypatch.setattr("edgelora.operators.mixture._Kernels._between", None)
    assert np.array_equal(open_mixture(bank).match(target).coefficients, wanted)
    with pytest.raises(TypeError):
        open_mixture(bank[:-1])  # another bank: not kept yet
