"""Build what `edgelora serve` is compared with, from the very llama.cpp that it runs on, once.

usage: python scripts/build_peers.py [--into build] [--jobs 2]

llama-server, llama-bench and llama-batched-bench are compiled from the source package of the
installed llama-cpp-python, with the flags that scripts/setup.py compiled the wheel with; they come
to lie in build/peers-VERSION. llama_cpp.server gets an environment of its own, build/peers-venv,
with the same wheel. Nothing is fetched but from the package index: no web interface, no TLS.
Prints the folder of the binaries on stdout.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import setup
from fetch_llama_cpp_source import PACKAGE, fetch

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("llama-server", "llama-bench", "llama-batched-bench")
STAMP = "built-with.txt"
# Only the three programs, and nothing that reaches the Hub: the server's page would be fetched.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)


@dataclass(frozen=True)
class Peers:
    """Where the programs to compare with are.

    Attributes:
        bin: the folder of llama-server, llama-bench and llama-batched-bench.
        python: an interpreter that has llama_cpp.server.
    """

    bin: Path
    python: Path

    def program(self, name: str) -> Path:
        """The path of one of `TARGETS`."""
        return self.bin / (f"{name}.exe" if os.name == "nt" else name)


def find_peers(into: Path = ROOT / "build") -> Peers:
    """Where `build_peers` puts the programs; they need not be there yet."""
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    folder = into / f"peers-{version(PACKAGE)}"
    return Peers(folder / "bin", into / "peers-venv" / inside)


def is_built(peers: Peers) -> bool:
    """Whether everything is there, compiled with today's settings."""
    stamp = peers.bin.parent / STAMP
    programs = (peers.program(name) for name in TARGETS)
    return (
        stamp.is_file()
        and stamp.read_text(encoding="utf-8") == _settings()
        and peers.python.is_file()
        and all(program.is_file() for program in programs)
    )


def build_peers(into: Path, jobs: int) -> Peers:
    """Compile the programs and make the environment, unless both are there already."""
    peers = find_peers(into)
    if is_built(peers):
        return peers
    folder = peers.bin.parent
    (folder / STAMP).unlink(missing_ok=True)
    _make_environment(peers, into)
    source = fetch(into / "llama-cpp-source")
    started = time.monotonic()
    _say(f"compiling {', '.join(TARGETS)}: about 10 minutes on 2 cores, once")
    cmake = _cmake(peers)
    _run([cmake, "-S", source, "-B", folder, *OPTIONS, *_wheel_arguments()])
    _run([cmake, "--build", folder, "-j", jobs, "--target", *TARGETS])
    (folder / STAMP).write_text(_settings(), encoding="utf-8")
    _say(f"the programs are there after {time.monotonic() - started:.0f} s")
    return peers


def _settings() -> str:
    return "\n".join([*OPTIONS, *setup.build_environment(os.environ, setup.cpu_flags()).values()])


def _wheel_arguments() -> list[str]:
    """What the wheel was configured with, so that both have the same kernels."""
    return shlex.split(setup.build_environment(os.environ, setup.cpu_flags())["CMAKE_ARGS"])


def _make_environment(peers: Peers, into: Path) -> None:
    """An environment with the wheel of set-up and llama_cpp.server's own requirements."""
    venv.create(into / "peers-venv", with_pip=True, symlinks=os.name != "nt")
    build = setup.build_environment(os.environ, setup.cpu_flags())
    wheel = setup.engine_wheel(peers.python, build)
    _pip(peers, f"{PACKAGE}[server] @ {wheel.as_uri()}")


def _cmake(peers: Peers) -> str:
    """The machine's cmake, or one from the package index."""
    found = shutil.which("cmake")
    if found is None:
        _pip(peers, "cmake")
        found = str(peers.python.with_name("cmake.exe" if os.name == "nt" else "cmake"))
    return found


def _pip(peers: Peers, *packages: str) -> None:
    quiet = ["-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    _run([peers.python, *quiet, *packages])


def _run(command: Sequence[object]) -> None:
    words = [str(word) for word in command]
    build = setup.build_environment(os.environ, setup.cpu_flags())
    # What compilers say goes to stderr: stdout is for the folder.
    if subprocess.run(words, env={**os.environ, **build}, stdout=sys.stderr).returncode:
        sys.exit(f"peers: `{shlex.join(words)}` failed (its message is above).")


def _say(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Build, unless it was done, and print where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=ROOT / "build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(build_peers(options.into.resolve(), options.jobs).bin)


if __name__ == "__main__":
    main()
