"""`bank add --scheduler`: the same bytes as without, with workers that die on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import builds
import clusters
import pico
import pytest
from bank_worker import make_signature
from cli_runner import posix_only, run

from edgelora import desk as desk_module
from edgelora.adapters.base import Base, read_base
from edgelora.bank import Bank, Facts, open_bank, remote
from edgelora.bank.adding import (
    ADDED,
    ALREADY_THERE,
    REFUSED,
    SIGNED,
    Embed,
    Embedded,
    Keyed,
    Request,
    add_many,
)
from edgelora.bank.embedding import open_embedder
from edgelora.bank.remote import RemoteEmbed
from edgelora.bank.verify import verify
from edgelora.cluster import open_cluster
from edgelora.desk import Desk
from edgelora.errors import ClusterError
from edgelora.files import TEMPORARY_PREFIX
from edgelora.signature.storage import to_bytes

# Wide enough for a dataset to take a moment: workers are killed while they embed.
WIDE = pico.Dims(n_embd=128, n_ff=512, n_layer=6, n_head=4, n_head_kv=2, head_dim=32)
N_TASKS = 10

pytestmark = pytest.mark.usefixtures("own_cache")


# --- without a scheduler: what a worker does, in this process -------------------------------------


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return open_bank(tmp_path / "bank", create=True)


def described(tmp_path: Path, *names: str) -> list[Request]:
    """An adapter for each name, with the name as its description."""
    return [
        Request(pico.write_peft(tmp_path / name, seed=i), facts=Facts(description=name))
        for i, name in enumerate(names)
    ]


def last_first(embed: Embed, keyed: Iterable[Keyed]) -> Iterator[Embedded]:
    """Takes all, and gives back from the end; one named `dead` cost too many workers."""
    for key, what in reversed(list(keyed)):
        if what == "dead":
            yield key, ClusterError("4 workers died, one after another, while at work on it")
        else:
            yield key, embed(what)


def test_outcomes_keep_the_order_of_the_requests(tmp_path: Path, bank: Bank, base: Base) -> None:
    requests = described(tmp_path, "a", "dead", "b", "c")
    bare = Request(pico.write_peft(tmp_path / "bare", seed=9))
    done: list[int] = []
    outcomes = add_many(
        bank, base, [*requests[:2], bare, *requests[2:]], progress=done.append, each=last_first,
        embed=lambda what: make_signature(base.identity.id),
    )  # fmt: skip
    assert [o.name for o in outcomes] == ["a", "dead", "bare", "b", "c"]
    assert [o.status for o in outcomes] == [ADDED, REFUSED, ADDED, ADDED, ADDED]
    assert [o.has_signature for o in outcomes] == [True, False, False, True, True]
    assert outcomes[1].reason.startswith("dead is in the bank, its signature is not: 4 workers")
    assert sum(done) == 5 and verify(bank, base) == []


def test_the_same_bytes_twice_are_embedded_once(tmp_path: Path, bank: Bank, base: Base) -> None:
    (request,) = described(tmp_path, "a")
    calls: list[object] = []

    def embed(what: object) -> object:
        calls.append(what)
        return make_signature(base.identity.id)

    outcomes = add_many(bank, base, [request] * 3, embed=embed, each=last_first)  # type: ignore
    assert [o.status for o in outcomes] == [ADDED, ALREADY_THERE, ALREADY_THERE]
    assert all(o.has_signature for o in outcomes) and len(calls) == 1


def test_the_second_of_the_same_bytes_has_its_turn_if_the_first_fails(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    (request,) = described(tmp_path, "dead")
    second = replace(request, facts=Facts(description="better words"))
    outcomes = add_many(
        bank, base, [request, second], each=last_first,
        embed=lambda what: make_signature(base.identity.id),
    )  # fmt: skip
    assert [o.status for o in outcomes] == [REFUSED, SIGNED]


def test_a_worker_makes_the_same_signature(base: Base) -> None:
    there = RemoteEmbed.of(base, n_threads=1, seed=3)
    there.check()
    with open_embedder(base.path, n_threads=1, seed=3) as here:
        for text in ("is it odd?", "was it that?"):
            assert to_bytes(there(text)) == to_bytes(here(text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.0.9"}, "EdgeLoRA 0.1.0 .* not 0.0.9"),
        ({"embedding": "otherwise"}, "otherwise"),
        ({"base": "/nowhere/base.gguf"}, "cannot be read there: .*nowhere"),
        ({"base_id": "0123456789ab"}, "another base than here .*not 0123456789ab"),
        ({"size_bytes": 7}, "another base than here .*7 bytes"),
    ],
)
def test_a_worker_that_would_embed_otherwise_says_so(
    base: Base, change: dict[str, object], said: str
) -> None:
    embed = replace(RemoteEmbed.of(base, 1, 0), **change)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=said):
        embed.check()
    with pytest.raises(ClusterError, match=said):
        Desk(remote._opened).call(embed, "is it odd?")


def test_an_idle_worker_closes_the_base(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "IDLE_S", 0.05)
    desk = Desk(remote._opened)
    desk.call(RemoteEmbed.of(base, 1, 0), "is it odd?")
    deadline = time.monotonic() + 20
    while desk._opened is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert desk._opened is None
    desk.call(RemoteEmbed.of(base, 1, 0), "is it even?")


def test_offline_refuses_a_scheduler(tmp_path: Path, base: Base) -> None:
    folder = pico.write_peft(tmp_path / "a")
    done = run("bank", "add", folder, "--bank", tmp_path / "bank", "--base", base.path,
               "--scheduler", "tcp://127.0.0.1:1", "--offline")  # fmt: skip
    assert done.exit_code == 1 and "--scheduler needs the network" in done.stderr


# --- with a scheduler and two workers in processes of their own -----------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_base(tmp_path_factory.mktemp("wide") / "wide.gguf", dims=WIDE)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters, each with a dataset of 64 long lines of its own."""
    root = tmp_path_factory.mktemp("tasks")
    folders = []
    for i in range(N_TASKS):
        folders.append(pico.write_peft(root / f"task{i}" / "adapter", seed=i, dims=WIDE))
        lines = [f"the {i} of it and {j} is they for " * 8 for j in range(64)]
        builds.write_lines(root / f"task{i}" / "train.jsonl", lines, ["yes"] * len(lines))
    return folders


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, wide: Path, tasks: list[Path]
) -> dict[str, bytes]:
    """The files of a bank that this machine made without a scheduler."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        assert run(*line(folder / "bank", wide, tasks)).exit_code == 0
    return contents(folder / "bank")


def line(bank: Path, base: Path, tasks: list[Path]) -> list[object]:
    return ["bank", "add", *tasks, "--bank", bank, "--base", base, "--threads", 1,
            "--data-glob", "{parent}/train.jsonl"]  # fmt: skip


def contents(bank: Path) -> dict[str, bytes]:
    """Every adapter and signature."""
    return {path.name: path.read_bytes() for path in (bank / "adapters").iterdir()}


def signed(bank: Path) -> int:
    """Signatures that are there, without one that is being written."""
    return len(list(bank.glob("adapters/task*.signature.safetensors")))


def started(words: list[object]) -> subprocess.Popen[str]:
    """`edgelora ...` in a process of its own."""
    command = [sys.executable, "-m", "edgelora", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=clusters.ROOT
    )


def wait_until_signed(bank: Path, n: int, process: subprocess.Popen[str]) -> None:
    while signed(bank) < n and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def assert_whole(bank: Path, base: Path, alone: dict[str, bytes]) -> None:
    """The bank is what one machine makes, byte for byte, and nothing else lies in it."""
    assert contents(bank) == alone
    assert verify(open_bank(bank), read_base(base)) == []
    assert not [path for path in bank.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


@pytest.mark.slow
@pytest.mark.parametrize("n_signed", [1, 4, 7])
def test_a_killed_worker_changes_nothing(
    n_signed: int, tmp_path: Path, wide: Path, tasks: list[Path], alone: dict[str, bytes]
) -> None:
    bank = tmp_path / "bank"
    with clusters.running(tmp_path / "cluster") as processes:
        process = started([*line(bank, wide, tasks), "--scheduler", processes.address])
        wait_until_signed(bank, n_signed, process)
        processes.workers[n_signed % 2].kill()
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert f"{N_TASKS} added, 0 refused" in stdout
    assert [name for name in stdout.split() if name.startswith("task")] == [
        f"task{i}" for i in range(N_TASKS)
    ]
    assert_whole(bank, wide, alone)


@pytest.mark.slow
@posix_only
@pytest.mark.parametrize(("how", "code"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_command_that_is_stopped_goes_on_when_it_is_run_again(
    how: str,
    code: int,
    tmp_path: Path,
    wide: Path,
    tasks: list[Path],
    alone: dict[str, bytes],
) -> None:
    bank = tmp_path / "bank"
    with clusters.running(tmp_path / "cluster") as processes:
        words = [*line(bank, wide, tasks), "--scheduler", processes.address]
        process = started(words)
        wait_until_signed(bank, 3, process)
        process.send_signal(getattr(signal, how))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        n_signed = signed(bank)
        assert 3 <= n_signed < N_TASKS
        again = run(*words)
    assert again.exit_code == 0, again.stderr
    assert f"{n_signed} already there, 0 refused" in again.stdout
    assert_whole(bank, wide, alone)


@pytest.mark.slow
def test_a_killed_scheduler_is_one_message(tmp_path: Path, wide: Path, tasks: list[Path]) -> None:
    bank = tmp_path / "bank"
    with clusters.running(tmp_path / "cluster") as processes:
        process = started([*line(bank, wide, tasks), "--scheduler", processes.address])
        wait_until_signed(bank, 1, process)
        processes.scheduler.kill()
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert stderr.startswith("error: ") and "the scheduler has gone" in stderr
    assert verify(open_bank(bank), read_base(wide)) == []


@pytest.mark.slow
def test_an_adapter_that_kills_workers_is_refused_by_name(tmp_path: Path, base: Base) -> None:
    requests = described(tmp_path, "a", "b", "c", "d")
    requests[1] = replace(requests[1], facts=Facts(description=clusters.DEADLY))
    bank = open_bank(tmp_path / "bank", create=True)
    with clusters.running(tmp_path / "cluster", allowed_failures=0) as processes:
        with open_cluster(processes.address) as cluster:
            embed = clusters.DeadlyEmbed.of(base, 1, 0)
            outcomes = add_many(bank, base, requests, embed=embed, each=cluster.each)
    assert [o.status for o in outcomes] == [ADDED, REFUSED, ADDED, ADDED]
    assert "b is in the bank, its signature is not: a worker died" in outcomes[1].reason
    assert verify(bank, base) == [] and len(bank.records()) == 4


@pytest.mark.slow
def test_workers_with_another_base_are_refused_before_any_work(tmp_path: Path, base: Base) -> None:
    with clusters.running(tmp_path / "cluster", n_workers=1) as processes:
        with open_cluster(processes.address) as cluster:
            other = replace(RemoteEmbed.of(base, 1, 0), base=str(tmp_path / "absent.gguf"))
            with pytest.raises(ClusterError, match="not everything there") as caught:
                cluster.check(other.check)
    (problem,) = caught.value.problems
    assert problem.startswith("tcp://127.0.0.1:") and "absent.gguf" in problem


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of its own authority, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    crt, key = folder / "own.crt", folder / "own.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=127.0.0.1", "-keyout", key, "-out", crt],
        check=True, capture_output=True,
    )  # fmt: skip
    return crt, key


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_comes_from_dasks_own_configuration(
    tmp_path: Path, certificate: tuple[Path, Path], base: Base
) -> None:
    crt, key = certificate
    folder = pico.write_peft(tmp_path / "a")
    tls = ("--tls-ca-file", crt, "--tls-cert", crt, "--tls-key", key)
    with clusters.running(tmp_path / "cluster", n_workers=1, protocol="tls", options=tls) as there:
        assert there.address.startswith("tls://")
        words = ["bank", "add", folder, "--bank", tmp_path / "bank", "--base", base.path,
                 "--text", "is it odd?", "--scheduler", there.address]  # fmt: skip
        known = {
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": crt,
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT": crt,
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": key,
        }
        for variables, code, said in (({}, 1, "no scheduler"), (known, 0, "1 added")):
            environment = os.environ | {k: str(v) for k, v in variables.items()}
            command = [sys.executable, "-m", "edgelora", *map(str, words)]
            done = subprocess.run(
                command, env=environment, cwd=clusters.ROOT, capture_output=True, text=True
            )
            assert done.returncode == code, done.stderr
            assert said in done.stdout + done.stderr
