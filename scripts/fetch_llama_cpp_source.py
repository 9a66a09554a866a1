"""Unpack llama.cpp's source from the source package of the installed llama-cpp-python.

usage: python scripts/fetch_llama_cpp_source.py [--into build/llama-cpp-source]

Prints the folder on stdout (tests take it as EDGELORA_LLAMA_CPP); done once for each version.
The tests compare our conversion with convert_lora_to_gguf.py from there, which is not copied here.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llama-cpp-python"


def main() -> None:
    """Download and unpack, unless it is there, and print where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "llama-cpp-source")
    print(fetch(parser.parse_args().into))


def fetch(into: Path) -> Path:
    """The folder of llama.cpp's source inside `into`; downloaded if it is not there yet."""
    installed = version(PACKAGE)
    target = into / f"llama.cpp-{installed}"
    if not target.is_dir():
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into) as work:
            archive = _download(installed, Path(work))
            _unpack(archive, Path(work), target)
    return target


def _download(installed: str, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--no-binary", PACKAGE, "-d", str(work), f"{PACKAGE}=={installed}"]
    print(f"fetching the source of {PACKAGE} {installed} (77 MB)", file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"the source package of {PACKAGE} {installed} could not be downloaded.")
    return next(work.glob("*.tar.gz"))


def _unpack(archive: Path, work: Path, target: Path) -> None:
    """Move vendor/llama.cpp of the archive to `target`, whole or not at all."""
    with tarfile.open(archive) as package:
        inside = [member for member in package.getmembers() if "/vendor/llama.cpp/" in member.name]
        package.extractall(work / "unpacked", members=inside, filter="data")
    (source,) = (work / "unpacked").glob("*/vendor/llama.cpp")
    shutil.move(source, target)


if __name__ == "__main__":
    main()
