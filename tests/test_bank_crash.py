"""Whatever interrupts a write, the bank stays whole and the same command run again finishes it."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bank_worker
import pico
import pytest

from edgelora.adapters.base import read_base
from edgelora.bank import open_bank, store
from edgelora.bank.adding import ADDED, ALREADY_THERE, SIGNED
from edgelora.bank.verify import verify
from edgelora.errors import BankError
from edgelora.files import TEMPORARY_PREFIX, locked

WORKER = Path(bank_worker.__file__)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_base(tmp_path_factory.mktemp("base") / "pico.gguf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [pico.write_peft(root / f"task{i}", seed=i) for i in range(6)]


def start(bank: Path, base_path: Path, folders: list[Path], stage: str = "") -> subprocess.Popen:
    command = [sys.executable, WORKER, bank, base_path, stage, *folders]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)


def leftovers(bank: Path) -> list[Path]:
    return [path for path in bank.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


def assert_whole(bank: Path) -> None:
    """Nothing is wrong, apart from temporary files that a killed process left."""
    problems = verify(open_bank(bank))
    assert [p for p in problems if not p.startswith(TEMPORARY_PREFIX)] == []


@pytest.mark.parametrize(
    ("stage", "status", "n_temporary"),
    [
        ("locked", ADDED, 0),
        ("converted", ADDED, 1),
        ("published", SIGNED, 0),
        ("embedded", SIGNED, 0),
        ("signed", ALREADY_THERE, 0),
    ],
)
def test_killed_at_each_stage(
    stage: str, status: str, n_temporary: int, tmp_path: Path, base_path: Path, folders: list[Path]
) -> None:
    bank = tmp_path / "bank"
    with start(bank, base_path, folders[:2], stage) as process:
        assert process.wait(30) == bank_worker.KILLED
    assert_whole(bank)
    assert len(leftovers(bank)) == n_temporary
    outcomes = bank_worker.add(bank, base_path, folders[:2])
    assert [outcome.status for outcome in outcomes] == [status, ADDED]
    assert verify(open_bank(bank), read_base(base_path)) == []
    assert all(record.has_signature for record in open_bank(bank).records())


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, base_path: Path, folders: list[Path]) -> None:
    bank = tmp_path / "bank"
    rng = random.Random(0)
    open_bank(bank, create=True)
    for _ in range(4):
        with start(bank, base_path, folders) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.08))
            process.kill()
        assert_whole(bank)
    outcomes = bank_worker.add(bank, base_path, folders)
    assert not [outcome for outcome in outcomes if outcome.reason]
    assert verify(open_bank(bank), read_base(base_path)) == []
    assert [record.name for record in open_bank(bank).records()] == [f.name for f in folders]


def test_two_adds_at_once(tmp_path: Path, base_path: Path, folders: list[Path]) -> None:
    bank = tmp_path / "bank"
    first = start(bank, base_path, folders)
    second = start(bank, base_path, folders[::-1])
    for process in (first, second):
        with process:
            assert process.wait(60) == 0, process.stdout and process.stdout.read()
    assert verify(open_bank(bank), read_base(base_path)) == []
    records = open_bank(bank).records()
    assert [record.name for record in records] == [folder.name for folder in folders]
    assert all(record.has_signature for record in records)


def test_a_making_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    (bank / "adapters").mkdir(parents=True)
    (bank / ".lock").touch()
    (bank / f"{TEMPORARY_PREFIX}0-bank.json").write_text("{")
    assert open_bank(bank, create=True).records() == []
    assert leftovers(bank) == []


def test_a_full_disk_is_an_error_and_can_be_mended(
    tmp_path: Path, base_path: Path, folders: list[Path]
) -> None:
    refused = 0
    for limit in (0, 1_000, 3_000, 6_000, 10_000, 20_000):
        bank = tmp_path / f"bank-{limit}"
        open_bank(bank, create=True)
        with files_limited_to(limit):
            outcomes = bank_worker.add(bank, base_path, folders[:1])
            assert_whole(bank)
            assert leftovers(bank) == []
        for outcome in outcomes:
            if outcome.reason:
                refused += 1
                assert "File too large" in outcome.reason
                assert "Run the same command again" in outcome.reason
        bank_worker.add(bank, base_path, folders[:1])
        assert verify(open_bank(bank), read_base(base_path)) == []
        assert open_bank(bank).record(folders[0].name).has_signature
    assert refused >= 3


@contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond a size: writing fails as on a full disk."""
    resource = pytest.importorskip("resource", reason="RLIMIT_FSIZE is POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_lock_that_stays_held_is_named(
    tmp_path: Path, base_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = open_bank(tmp_path / "bank", create=True)
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1)
    with locked(bank.path / ".lock"):
        assert bank.records() == []  # reading never waits
        (outcome,) = bank_worker.add(bank.path, base_path, folders[:1])
        assert "locked by another process" in outcome.reason
        with pytest.raises(BankError, match="locked"):
            bank.reindex()


def test_listing_goes_on_while_adapters_are_added(
    tmp_path: Path, base_path: Path, folders: list[Path]
) -> None:
    bank = open_bank(tmp_path / "bank", create=True)
    adding = threading.Thread(target=bank_worker.add, args=(bank.path, base_path, folders))
    adding.start()
    seen = [len(bank.records())]
    while adding.is_alive():
        seen.append(len(bank.records()))
    adding.join()
    assert seen == sorted(seen) and len(bank.records()) == len(folders)
