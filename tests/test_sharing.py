"""`edgelora bank signatures`: one file for a bank's signatures, given and taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builds
import numpy as np
import pico
import pytest
from bank_worker import make_signature
from cli_runner import run
from safetensors.numpy import load_file, save

from edgelora.adapters.base import Base, read_base
from edgelora.bank import Bank, open_bank
from edgelora.bank.sharing import (
    KEPT,
    KEY,
    MAX_SIGNATURE_BYTES,
    export_signatures,
    import_signatures,
    read_signatures,
)
from edgelora.bank.verify import verify
from edgelora.errors import BankError, IncompatibleAdapter, InvalidFile, NotFound
from edgelora.signature import from_bytes, summarise, to_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bank]:
    """A folder with a base, PEFT folders adapter0 to adapter3, and their bank: real signatures."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        bank = builds.fill_bank(folder, pico.write_base(folder / "base.gguf"))
    return folder, open_bank(bank)


@pytest.fixture(scope="module")
def base(made: tuple[Path, Bank]) -> Base:
    return read_base(made[0] / "base.gguf")


@pytest.fixture
def shared(made: tuple[Path, Bank], base: Base, tmp_path: Path) -> Path:
    export_signatures(made[1], base, tmp_path / "shared.safetensors")
    return tmp_path / "shared.safetensors"


@pytest.fixture
def other(made: tuple[Path, Bank], base: Base, tmp_path: Path) -> Bank:
    """Another person's bank: the same adapters but one, under other names, without signatures."""
    bank = open_bank(tmp_path / "other", create=True)
    for i in range(3):
        bank.add(made[0] / f"adapter{i}", base, name=f"mine{i}", dtype="f32")
    return bank


def stored(bank: Bank, name: str, base: Base) -> bytes:
    return to_bytes(bank.signature(name, base.identity.id))


def test_signatures_are_given_and_taken(
    made: tuple[Path, Bank], base: Base, other: Bank, tmp_path: Path
) -> None:
    file = tmp_path / "to all.safetensors"
    given = run("bank", "signatures", "export", file, "--bank", made[1].path,
                "--base", base.path)  # fmt: skip
    assert given.exit_code == 0, given.output
    assert "4 signatures" in given.stdout and "as private as the data" in given.stderr
    line = ("bank", "signatures", "import", file, "--bank", other.path)
    taken = run(*line, "--base", base.path)
    assert taken.exit_code == 0, taken.output
    assert "3 imported" in taken.stdout and "1 not in the bank: adapter3" in taken.stdout
    assert "adapter2 is called mine2 here" in taken.stdout
    for i in range(3):
        assert stored(other, f"mine{i}", base) == stored(made[1], f"adapter{i}", base)
    assert verify(other, base) == []
    again = run(*line)
    assert again.exit_code == 0 and "3 already there" in again.stdout
    told = json.loads(run(*line, "--json").stdout)
    assert [o["status"] for o in told["outcomes"]] == ["already there"] * 3 + ["not in the bank"]
    assert told["without"] == []


def test_the_same_bank_gives_the_same_bytes(
    made: tuple[Path, Bank], base: Base, tmp_path: Path
) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    done = export_signatures(made[1], base, first)
    export_signatures(made[1], base, second)
    assert first.read_bytes() == second.read_bytes()
    assert done.names == tuple(f"adapter{i}" for i in range(4)) and done.unsigned == ()
    whole = read_signatures(first)
    assert whole.base == base.identity
    sha256 = {r.name: r.source_sha256 for r in made[1].records()}
    assert {e.name: e.source_sha256 for e in whole.entries} == sha256
    refused = run("bank", "signatures", "export", first, "--bank", made[1].path,
                  "--base", base.path)  # fmt: skip
    assert refused.exit_code == 1 and "--force" in refused.stderr


def test_adapters_without_one_are_told(
    made: tuple[Path, Bank], base: Base, other: Bank, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    line = ("bank", "signatures", "export", out, "--bank", other.path, "--base", base.path)
    none = run(*line)
    assert none.exit_code == 1 and "no adapter has a signature" in none.stderr
    assert not out.exists()
    other.set_signature("mine1", make_signature(base.identity.id))
    some = run(*line, "--json")
    assert some.exit_code == 0 and "2 without a signature: mine0, mine2" in some.stderr
    told = json.loads(some.stdout)
    assert told["adapters"] == ["mine1"] and told["without"] == ["mine0", "mine2"]


def test_an_interrupted_import_goes_on(base: Base, other: Bank, shared: Path) -> None:
    done = []

    def stop(n: int) -> None:
        done.append(n)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_signatures(other, read_signatures(shared), progress=stop)
    assert sum(record.has_signature for record in other.records()) == 2
    assert verify(other, base) == []
    outcomes = import_signatures(other, read_signatures(shared))
    assert [o.status for o in outcomes] == ["already there"] * 2 + ["imported", "not in the bank"]


def test_a_signature_that_differs_stays_without_force(
    made: tuple[Path, Bank], base: Base, other: Bank, shared: Path
) -> None:
    theirs = made[1].signature("adapter1", base.identity.id)
    rng = np.random.default_rng(0)
    own = summarise(rng.standard_normal((3, theirs.d), np.float32), None, [[1, 2]],
                    n_vocab=theirs.n_vocab, base_id=base.identity.id)  # fmt: skip
    other.set_signature("mine1", own)
    line = ("bank", "signatures", "import", shared, "--bank", other.path)
    kept = run(*line)
    assert kept.exit_code == 0 and f"1 {KEPT}: adapter1" in kept.stdout
    assert "--force" in kept.stderr and stored(other, "mine1", base) == to_bytes(own)
    assert "1 replaced" in run(*line, "--force").stdout
    assert stored(other, "mine1", base) == to_bytes(theirs)


def test_a_name_alone_is_not_enough(
    made: tuple[Path, Bank], base: Base, shared: Path, tmp_path: Path
) -> None:
    bank = open_bank(tmp_path / "named", create=True)
    bank.add(pico.write_peft(tmp_path / "p", seed=77), base, name="adapter2")
    line = ("bank", "signatures", "import", shared, "--bank", bank.path)
    refused = run(*line)
    assert refused.exit_code == 1 and "1 has the name only: adapter2" in refused.stdout
    assert "3 not in the bank: adapter0, adapter1, adapter3" in refused.stdout
    assert "--by-name" in refused.stderr and "1 without a signature" in refused.stderr
    taken = run(*line, "--by-name")
    assert taken.exit_code == 0 and "1 imported" in taken.stdout
    assert stored(bank, "adapter2", base) == stored(made[1], "adapter2", base)


def test_adapters_for_another_base(
    made: tuple[Path, Bank], base: Base, shared: Path, tmp_path: Path
) -> None:
    tuned = read_base(pico.write_base(tmp_path / "tuned.gguf", norm_seed=5))
    bank = open_bank(tmp_path / "tuned", create=True)
    bank.add(made[0] / "adapter0", tuned, name="same")
    bank.add(pico.write_peft(tmp_path / "p", seed=78), tuned, name="adapter1")
    line = ("bank", "signatures", "import", shared, "--bank", bank.path)
    result = run(*line)
    assert result.exit_code == 1 and "2 for another base: adapter0, adapter1" in result.stdout
    wrong = run(*line, "--base", tuned.path)
    assert wrong.exit_code == 1
    for identity in (base.identity, tuned.identity):
        assert identity.describe() in wrong.stderr
    assert not any(record.has_signature for record in bank.records())


def test_sizes_that_cannot_be_this_bases(
    made: tuple[Path, Bank], base: Base, other: Bank, shared: Path, tmp_path: Path
) -> None:
    """Right by their base's hash and wrong by their sizes: they would fail in the next build."""
    small = make_signature(base.identity.id)
    assert small.n_vocab == 300 != base.n_vocab
    forged = rewrite(shared, tmp_path / "f", tensors={i: to_bytes(small) for i in range(4)})
    with pytest.raises(IncompatibleAdapter, match="over 300 tokens, the base is 32 wide"):
        import_signatures(other, read_signatures(forged), base=base)
    import_signatures(other, read_signatures(shared))
    with pytest.raises(IncompatibleAdapter, match="over 300 tokens, the bank's own are 32 wide"):
        import_signatures(other, read_signatures(forged), force=True)


def test_two_adapters_of_one_source_cannot_be_told_apart(
    made: tuple[Path, Bank], base: Base, other: Bank, tmp_path: Path
) -> None:
    signature = make_signature(base.identity.id)
    (other.folder / "copy.gguf").write_bytes((other.folder / "mine0.gguf").read_bytes())
    for name in ("copy", "mine0"):
        other.set_signature(name, signature)
    with pytest.raises(BankError, match="two signatures for one adapter"):
        export_signatures(other, base, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def rewrite(
    path: Path,
    to: Path,
    facts: dict[str, Any] | None = None,
    tensors: dict[int, bytes | np.ndarray | None] | None = None,
) -> Path:
    """The same file with some facts or tensors replaced (None: removed)."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    told = json.loads(header["__metadata__"][KEY]) | (facts or {})
    arrays: dict[str, Any] = dict(load_file(path))
    for number, value in (tensors or {}).items():
        arrays[f"{number:06}"] = (
            np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        )
    kept = {name: value for name, value in arrays.items() if value is not None}
    to.write_bytes(save(kept, metadata={KEY: json.dumps(told)}))
    return to


ADAPTER = ["a", "0" * 64]
HOSTILE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "empty": (lambda path, to: put(to, b""), "not a safetensors file"),
    "web page": (lambda path, to: put(to, b"<html>"), "not a safetensors file"),
    "truncated": (lambda path, to: put(to, path.read_bytes()[:-9]), "not a safetensors file"),
    "pickle": (lambda path, to: put(to, b"\x80\x04\x95" + b"x" * 40), "not a safetensors file"),
    "no metadata": (lambda path, to: put(to, save(load_file(path))), "KeyError"),
    "deep json": (
        lambda path, to: put(to, save(load_file(path), metadata={KEY: "[" * 100_000})),
        "RecursionError",
    ),
    "a signature": (lambda path, to: put(to, to_bytes(make_signature("x"))), "KeyError"),
    "version": (lambda path, to: rewrite(path, to, {"version": 2}), "format version 2"),
    "embedding": (
        lambda path, to: rewrite(path, to, {"embedding": "eight layers"}),
        "made by the embedding 'eight layers'",
    ),
    "base": (lambda path, to: rewrite(path, to, {"base": {"architecture": 3}}), "KeyError"),
    "base's types": (
        lambda path, to: rewrite(
            path, to, {"base": dict.fromkeys(("architecture", "shapes", "tokenizer", "norms"), 3)}
        ),
        "short texts",
    ),
    "other base": (
        lambda path, to: rewrite(
            path, to, {"base": dict.fromkeys(("architecture", "shapes", "tokenizer", "norms"), "")}
        ),
        "made by the base",
    ),
    "no adapters": (lambda path, to: rewrite(path, to, {"adapters": []}), "0 adapters"),
    "pairs": (lambda path, to: rewrite(path, to, {"adapters": [[1, 2, 3]]}), "ValueError"),
    "hash": (lambda path, to: rewrite(path, to, {"adapters": [["a", "../x"]] * 4}), "no sha256"),
    "twice": (lambda path, to: rewrite(path, to, {"adapters": [ADAPTER] * 4}), "two signatures"),
    "fewer": (lambda path, to: rewrite(path, to, {"adapters": [ADAPTER]}), "4 tensors for 1"),
    "missing": (lambda path, to: rewrite(path, to, tensors={2: None}), "3 tensors for 4"),
    "floats": (
        lambda path, to: rewrite(path, to, tensors={2: np.zeros(3, np.float32)}),
        "type F32 and shape",
    ),
    "matrix": (
        lambda path, to: rewrite(path, to, tensors={1: np.zeros((3, 3), np.uint8)}),
        "type U8 and shape",
    ),
    "huge": (
        lambda path, to: rewrite(path, to, tensors={1: bytes(MAX_SIGNATURE_BYTES + 1)}),
        "type U8 and shape",
    ),
    "damaged": (lambda path, to: rewrite(path, to, tensors={1: b"x" * 99}), "adapter1: not a s"),
    "uneven": (
        lambda path, to: rewrite(path, to, tensors={3: small(path)}),
        "adapter0 is 32 over",
    ),
}


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def small(path: Path) -> bytes:
    base_id = from_bytes(load_file(path)["000000"].tobytes()).base_id
    return to_bytes(make_signature(base_id))


@pytest.mark.parametrize(("damage", "what"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_files_are_refused(
    damage: Callable[[Path, Path], Path], what: str, shared: Path, other: Bank, tmp_path: Path
) -> None:
    path = damage(shared, tmp_path / "bad.safetensors")
    with pytest.raises(InvalidFile) as caught:
        read_signatures(path)
    assert what in str(caught.value) and str(path) in str(caught.value)
    result = run("bank", "signatures", "import", path, "--bank", other.path)
    assert result.exit_code == 1 and "not a sound file of signatures" in result.stderr
    assert not any(record.has_signature for record in other.records())


def test_every_damaged_signature_is_named(shared: Path, tmp_path: Path) -> None:
    path = rewrite(shared, tmp_path / "bad", tensors={1: b"x" * 99, 3: b"y" * 99})
    with pytest.raises(InvalidFile) as caught:
        read_signatures(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["adapter1", "adapter3"]
    with pytest.raises(NotFound):
        read_signatures(tmp_path / "none")
