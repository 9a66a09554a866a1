"""One server for all clients: SmolLM2 with the demo's adapter, which is built from models/bank.

These tests need the `clients` extra: without it the folder is not collected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

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
