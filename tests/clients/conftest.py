"""One server for all clients: SmolLM2 with the demo's adapter, which is built from models/bank.

These tests need the `clients` extra: without it the folder is not collected.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

# On a busy machine threads that spin between two steps cost ten times as much as they gain.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if importlib.util.find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The address of a running server, without /v1."""
    from server_process import ADAPTER, BASE_ID, serve

    if not ADAPTER.is_file():
        pytest.fail(f"no {ADAPTER.name}: run `edgelora demo --quick` first, as make does")
    options = ("--slots", "4", "--context", "2048")
    with serve("--base", BASE_ID, "--adapter", str(ADAPTER), *options) as server:
        yield server.url


@pytest.fixture
def weather() -> Any:
    """A tool as OpenAI's API takes it."""
    return {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 30},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
