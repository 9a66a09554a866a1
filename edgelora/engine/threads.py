"""How many threads llama.cpp is given: what a self-test found for this CPU, or one a core."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

import psutil

from edgelora.engine.machine import Findings, n_cores

FINDINGS = Findings("threads.json")


@dataclass(frozen=True)
class Threads:
    """Threads for prompts (many tokens at once) and for answers (one token after the other)."""

    prompt: int
    decode: int


def default_threads() -> int:
    """One for each physical core."""
    return n_cores()


def stored_threads(architecture: str) -> Threads | None:
    """What `store_threads` kept for this CPU, this llama.cpp and bases of an architecture.

    None where nothing is kept, or what is there cannot be meant for this machine.
    """
    found = FINDINGS.read(architecture)
    prompt, decode = (
        (found.get("prompt"), found.get("decode")) if isinstance(found, dict) else (None, None)
    )
    return Threads(prompt, decode) if _is_count(prompt) and _is_count(decode) else None


def store_threads(architecture: str, threads: Threads) -> Path:
    """Keep a choice in the cache folder; returns the file."""
    return FINDINGS.store(architecture, asdict(threads))


def _is_count(n: object) -> TypeGuard[int]:
    return type(n) is int and 1 <= n <= (psutil.cpu_count() or 1)
