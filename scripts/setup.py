"""Make the virtual environment of `make demo` and `make test`; once for each pyproject.toml.

usage: python scripts/setup.py [--venv .venv] [--extras demo,dev] [--first torch==2.13.0]

Needs Python 3.11 or newer with venv and pip, and a C and C++ compiler where llama-cpp-python has
no wheel for this machine. Works without make too (Windows: `py scripts\\setup.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path

MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "wheels"
STAMP = ".edgelora-setup"
ENGINE = "llama-cpp-python"
CMAKE_ARGS = "-DLLAVA_BUILD=OFF"
# GCC 12 and older think that ldtilecfg reads 8 of its 64 bytes, drop the stores of the others, and
# llama.cpp's first product on AMX then dies. Without that optimisation the stores stay.
AMX_CXXFLAGS = "-fno-dse"


def main() -> None:
    """Create the environment unless its stamp says that nothing has changed since."""
    arguments = _arguments()
    if sys.version_info < MINIMUM:
        sys.exit(f"EdgeLoRA needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
    folder = ROOT / arguments.venv
    build = build_environment(os.environ, cpu_flags())
    stamp, wanted = folder / STAMP, _fingerprint(arguments.extras, arguments.first, build)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    python = _create(folder)
    if arguments.first:
        _pip(python, "install", *shlex.split(arguments.first))
    # By force: pip takes a wheel of the same version, however it was compiled, for the same.
    _pip(python, "install", "--force-reinstall", "--no-deps", str(engine_wheel(python, build)))
    _say(f"installing EdgeLoRA with the extras {arguments.extras} into {arguments.venv}")
    _pip(python, "install", "--editable", f"{ROOT}[{arguments.extras}]")
    stamp.write_text(wanted)
    _say(f"{arguments.venv} is ready after {time.monotonic() - started:.0f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="folder of the environment")
    parser.add_argument("--extras", default="demo,dev", help="extras of pyproject.toml")
    parser.add_argument("--first", default="", help="what pip installs before anything else")
    return parser.parse_args()


def _fingerprint(extras: str, first: str, build: dict[str, str]) -> str:
    project = (ROOT / "pyproject.toml").read_bytes()
    texts = [extras, first, sys.version, str(ROOT), *build.values()]
    return hashlib.sha256(b"\0".join([project, *map(str.encode, texts)])).hexdigest()


def build_environment(environment: Mapping[str, str], cpu_flags: str) -> dict[str, str]:
    """What llama-cpp-python is compiled with: the user's own settings, and what AMX needs."""
    cxxflags = environment.get("CXXFLAGS", "")
    if "amx_tile" in cpu_flags.split():
        cxxflags = f"{cxxflags} {AMX_CXXFLAGS}".strip()
    return {"CMAKE_ARGS": environment.get("CMAKE_ARGS", CMAKE_ARGS), "CXXFLAGS": cxxflags}


def cpu_flags() -> str:
    """The CPU's features as Linux names them; '' elsewhere, where llama.cpp has no AMX."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _create(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _say(f"making the virtual environment {folder.name} with Python {sys.version.split()[0]}")
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError:
        sys.exit("venv failed: on Debian and Ubuntu install the package python3-venv, then repeat.")
    return python


def engine_wheel(python: Path, build: dict[str, str]) -> Path:
    """The wheel of llama-cpp-python: kept in build/wheels, so that it is compiled at most once."""
    settings = hashlib.sha256("\0".join(build.values()).encode()).hexdigest()[:8]
    folder = WHEELS / f"cp{sys.version_info.major}{sys.version_info.minor}-{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    if not _wheels(folder):
        _say(
            f"fetching {ENGINE}. Where no wheel can be had it is compiled from source: "
            "about 7 minutes on 2 cores, once, without output until it is done"
        )
        # pip's own cache does not know the flags with which a wheel was compiled.
        fresh = ["--no-cache-dir"] if AMX_CXXFLAGS in build["CXXFLAGS"] else []
        started = time.monotonic()
        _pip(
            python,
            *("wheel", "--no-deps", *fresh, "-w", str(folder), _requirement()),
            env={**os.environ, **build},
        )
        _say(f"{ENGINE} is there after {time.monotonic() - started:.0f} s")
    return _wheels(folder)[-1]


def _wheels(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{ENGINE.replace('-', '_')}-*.whl"))


def _requirement() -> str:
    import tomllib  # here, so that an older Python reaches the message about its version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(line for line in project["dependencies"] if line.startswith(ENGINE))


def _pip(python: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "-qq", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env=env, cwd=ROOT).returncode:
        sys.exit(f"set-up stopped: `{shlex.join(command)}` failed (its message is above).")


def _say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


if __name__ == "__main__":
    main()
