"""Whether llama.cpp's AMX kernels can be trusted here: tried in a process of its own, once."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgelora.embedding_cache import cache_folder
from edgelora.engine import native
from edgelora.files import write_atomic

logger = logging.getLogger(__name__)
SELF_TEST = (sys.executable, "-P", "-m", "edgelora.engine.selftest")
_TIMEOUT_S = 120
WARNING = (
    "this build of llama.cpp fails on this CPU's AMX units ({reason}), as it does when GCC 12 or "
    "older compiled it without -fno-dse: EdgeLoRA leaves AMX and repacked weights unused, and "
    "prompts are up to four times slower. To rebuild it: CXXFLAGS=-fno-dse "
    "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={version}"
)


@functools.cache
def warning() -> str:
    """Why AMX must not be used, or '' where it works or llama.cpp has none."""
    if sys.platform != "linux" or "AMX_INT8 = 1" not in native.system_info():
        return ""
    return decide(SELF_TEST, native.cpu_libraries(), cache_folder() / "amx.json")


def decide(command: Sequence[str], libraries: Iterable[Path], cache: Path) -> str:
    """Run the self-test unless its result for these very files is cached; '' or a warning.

    Only what says something about the files is cached: success, or death by a signal that is a
    fault of the code. A run that failed otherwise counts against AMX this time, and is repeated.
    """
    key = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in libraries]
    reason = _cached(cache, key)
    if reason is None:
        reason, lasting = _try(command)
        if lasting:
            _keep(cache, {"libraries": key, "reason": reason})
    return WARNING.format(reason=reason, version=native.version()) if reason else ""


def _cached(cache: Path, key: object) -> str | None:
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stored, dict) or stored.get("libraries") != key:
        return None
    reason = stored.get("reason")
    return reason if isinstance(reason, str) else None


def _keep(cache: Path, result: dict[str, object]) -> None:
    try:
        write_atomic(cache, json.dumps(result).encode())
    except OSError as error:
        logger.debug("%s: not written (%s); the self-test will run again", cache, error)


def _try(command: Sequence[str]) -> tuple[str, bool]:
    """What went wrong ('' for nothing), and whether it would go wrong again."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the self-test did not finish: {type(error).__name__}", False
    if done.returncode == 0:
        return "", True
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"the self-test died of {name}", name in ("SIGSEGV", "SIGILL", "SIGBUS", "SIGFPE")
    lines: list[str] = done.stderr.decode("utf-8", "replace").strip().splitlines()
    logger.debug("self-test: %s", "\n".join(lines))
    return f"the self-test failed: {lines[-1] if lines else f'status {done.returncode}'}", False
