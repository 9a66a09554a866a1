"""Whole commands where the disk is full, the folder may not be written to, or another one runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from killing.jobs import JOBS, Job, Material, Tree, make_material, temporary_files, tree

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
LIMITED = (
    "import resource, sys; n = int(sys.argv.pop(1));"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY));"
    "from edgelora.cli.main import main; main()"
)
SETPRIV = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
BY_NAME = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)


@pytest.fixture(scope="module")
def material() -> Iterator[Material]:
    """In a folder that any user may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with make_material(Path(folder)) as made:
            yield made


@pytest.fixture(scope="module")
def wholes() -> dict[str, Tree]:
    """What each job leaves, by its name; filled by `whole_of`."""
    return {}


def whole_of(job: Job, material: Material, wholes: dict[str, Tree]) -> Tree:
    if job.name not in wholes:
        with place_for(job, material) as folder:
            done = run(job, material, folder)
            assert done.returncode == 0, done.stderr
            wholes[job.name] = tree(folder)
    return wholes[job.name]


@contextlib.contextmanager
def place_for(job: Job, material: Material, name: str = "place") -> Iterator[Path]:
    """A folder as the job wants it."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        folder = Path(made) / name
        for part in ("tmp", "cache"):
            (folder / part).mkdir(parents=True)
        tried = material.world.base.parent / "cache" / "amx.json"
        if tried.is_file():
            shutil.copy(tried, folder / "cache")
        job.prepare(material, folder)
        yield folder


def start(
    job: Job, material: Material, folder: Path, *start: object, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    words = [*(start or ("-m", "edgelora")), *job.words(material, folder)]
    environment = material.environment(folder) | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*before, sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, cwd=folder.parent,
    )  # fmt: skip


def run(
    job: Job, material: Material, folder: Path, *words: object, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    process = start(job, material, folder, *words, before=before)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_one_clear_error(done: subprocess.CompletedProcess[str]) -> None:
    said = done.stdout + done.stderr
    assert "Traceback" not in said and done.returncode == 1, said
    assert done.stderr.count("error:") == 1 or "refused:" in done.stdout, said


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX")
@BY_NAME
def test_a_full_disk(job: Job, material: Material, wholes: dict[str, Tree]) -> None:
    """No file grows beyond a size: writing fails as on a full disk."""
    whole = whole_of(job, material, wholes)
    with place_for(job, material) as folder:
        done = run(job, material, folder, "-c", LIMITED, 9_000)
        assert_one_clear_error(done)
        said = done.stdout + done.stderr
        assert any(words in said for words in ("File too large", "disk")), said
        assert job.check(folder, whole) == [] and temporary_files(folder) == []
        again = run(job, material, folder)
        assert again.returncode == 0 or "exists already" in again.stderr, again.stderr
        assert tree(folder) == whole


@BY_NAME
def test_a_disk_that_is_full(job: Job, material: Material, wholes: dict[str, Tree]) -> None:
    """A real one, of a few kilobytes, where mounting is permitted."""
    whole = whole_of(job, material, wholes)
    with place_for(job, material) as folder:
        small = folder / next(iter(job.writes))
        small.mkdir(exist_ok=True)
        kept = tempfile.mkdtemp()
        shutil.copytree(small, kept, dirs_exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)]
        if os.name == "nt" or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting is refused here")
        try:
            shutil.copytree(kept, small, dirs_exist_ok=True)
            with contextlib.suppress(OSError), (small / "README").open("wb") as filler:
                while filler.write(bytes(512)):
                    filler.flush()
            done = run(job, material, folder)
            assert_one_clear_error(done)
            (small / "README").unlink()
            assert job.check(folder, whole) == [] and temporary_files(folder) == []
        finally:
            subprocess.run(["umount", str(small)], check=True)
            shutil.rmtree(kept)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@BY_NAME
def test_a_folder_that_may_not_be_written_to(job: Job, material: Material) -> None:
    """Of root the right to write everywhere is taken away."""
    without = SETPRIV if os.getuid() == 0 else []
    if without and shutil.which(without[0]) is None:
        pytest.skip("setpriv, of util-linux, is not there")
    with place_for(job, material) as folder:
        for part in job.writes:
            (folder / part).mkdir(exist_ok=True)
            os.chmod(folder / part, 0o555)
        for part in ("tmp", "cache"):
            os.chmod(folder / part, 0o777)
        before = tree(folder)
        done = run(job, material, folder, before=without)
        assert_one_clear_error(done)
        assert "ermission denied" in done.stdout + done.stderr
        changed = {path: was for path, was in tree(folder).items() if before.get(path) != was}
        assert [path for path in changed if not path.startswith("cache/")] == []
        assert temporary_files(folder) == []
        for part in job.writes:
            os.chmod(folder / part, 0o755)


@BY_NAME
def test_a_path_with_spaces_and_letters_of_all_kinds(
    job: Job, material: Material, wholes: dict[str, Tree]
) -> None:
    with place_for(job, material, "Ärger & Ünïcode [1] 銀行 ' {x} %s") as folder:
        done = run(job, material, folder)
        assert done.returncode == 0, done.stderr
        assert tree(folder) == whole_of(job, material, wholes)


@BY_NAME
def test_two_at_once(job: Job, material: Material, wholes: dict[str, Tree]) -> None:
    """Both succeed, or one says that the other is at it; together they leave what one leaves."""
    whole = whole_of(job, material, wholes)
    with place_for(job, material) as folder:
        processes = [start(job, material, folder) for _ in range(2)]
        codes = []
        for process in processes:
            out, err = process.communicate(timeout=200)
            codes.append(process.returncode)
            if process.returncode:
                done = subprocess.CompletedProcess([], process.returncode, out, err)
                assert_one_clear_error(done)
                assert "another process" in err or "exists already" in err, err
        if codes.count(0) == 0:  # two builds that began in the same instant
            assert run(job, material, folder).returncode == 0
        found = tree(folder)
        assert found.keys() == whole.keys() and temporary_files(folder) == []
        # Texts that one has embedded leave other batches to the other, whose last bits differ.
        differing = [name for name in whole if found[name] != whole[name]]
        assert all(name.endswith(".signature.safetensors") for name in differing), differing
        problems = [p for p in job.check(folder, whole) if p.partition(":")[0] not in differing]
        assert problems == []
