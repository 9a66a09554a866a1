"""Files whole or absent, and what killed processes left of them: swept, and only that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora import files
from edgelora.errors import AlreadyExists
from edgelora.files import TEMPORARY_PREFIX, publish, working_folder, write_atomic

KILLED = """
import os, pathlib, sys
from edgelora.files import publish, working_folder
out = pathlib.Path(sys.argv[1])
with working_folder(out) as folder, publish(out) as temporary:
    (folder / "trial.gguf").write_bytes(b"x")
    temporary.write_bytes(b"half")
    os._exit(9)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(out: Path) -> None:
    """A process that ends with no clean-up between its two steps."""
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)]).returncode == 9


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_attempt(tmp_path: Path) -> None:
    out = tmp_path / "a [b] \u00e9.gguf"
    killed(out)
    assert [n[: len(TEMPORARY_PREFIX)] for n in names(tmp_path)] == [TEMPORARY_PREFIX] * 2
    write_atomic(tmp_path / "b.gguf", b"another file")
    assert len(names(tmp_path)) == 3
    write_atomic(out, b"whole")
    assert names(tmp_path) == sorted([out.name, "b.gguf"])
    killed(tmp_path / "c.gguf")
    with working_folder(tmp_path / "c.gguf") as folder:
        assert [folder.name] == [n for n in names(tmp_path) if n.endswith("c.gguf")]
    assert names(tmp_path) == sorted([out.name, "b.gguf"])


def test_what_a_living_process_or_another_machine_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    owned = [
        f"{TEMPORARY_PREFIX}{files._machine()}-{os.getppid()}-0123abcd-a.gguf",
        f"{TEMPORARY_PREFIX}ffffff-999999999-0123abcd-a.gguf",
        f"{TEMPORARY_PREFIX}{files._machine()}-x-0123abcd-a.gguf",
    ]
    for name in owned:
        (tmp_path / name).write_bytes(b"being written")
    write_atomic(out, b"whole")
    assert names(tmp_path) == sorted([*owned, "a.gguf"])


def test_a_number_that_another_process_has_taken_over(tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY_PREFIX}{files._machine()}-{os.getpid()}-0123abcd-a.gguf"
    left.write_bytes(b"of before the last start of the machine")
    os.utime(left, (1_000_000_000, 1_000_000_000))
    write_atomic(tmp_path / "a.gguf", b"whole")
    assert names(tmp_path) == ["a.gguf"]


def test_nothing_is_published_or_left_after_an_error(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    with pytest.raises(KeyboardInterrupt), publish(out) as temporary, working_folder(out) as folder:
        temporary.write_bytes(b"half")
        (folder / "x").write_bytes(b"y")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    out.write_bytes(b"old")
    with pytest.raises(AlreadyExists), publish(out):
        pass
    assert names(tmp_path) == ["a.gguf"] and out.read_bytes() == b"old"
