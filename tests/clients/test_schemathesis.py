"""schemathesis against the OpenAPI document of a running server: requests of every kind.

Right ones, wrong ones, wrong methods and headers, sequences of them. Not checked: that what the
document allows is accepted (`positive_data_acceptance`), for it cannot say which models, token ids
and prompt lengths a server has; schemathesis_hooks.py gives it some, or few would reach the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from server_process import ADAPTER, BASE_ID, ServerProcess, serve

pytestmark = pytest.mark.clients

# Each has its own time, or a slow machine spends all of it on the first.
THROUGH_THE_ENGINE = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings",
)  # fmt: skip
SECONDS = 12
LONGER = 60  # where a slow machine has spent that before the first right request
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    options = ("--slots", "2", "--context", "256", "--adapter-dir", str(ADAPTER.parent))
    with serve("--base", BASE_ID, "--adapter", str(ADAPTER), *options) as running:
        yield running


@pytest.mark.parametrize("path", THROUGH_THE_ENGINE)
def test_no_failure_and_no_status_that_the_document_lacks(
    path: str, server: ServerProcess, tmp_path: Path
) -> None:
    answered = _ask_enough(server, tmp_path, (path,), "--include-path", path)
    assert answered[path, 200] and answered[path, 400], answered


def test_all_other_paths_and_sequences_of_them(server: ServerProcess, tmp_path: Path) -> None:
    others = [part for path in THROUGH_THE_ENGINE for part in ("--exclude-path", path)]
    paths = ("/v1/adapters", "/tokenize")
    answered = _ask_enough(server, tmp_path, paths, *others)
    for path in paths:
        assert answered[path, 200] and answered[path, 400], answered


def _ask_enough(
    server: ServerProcess, folder: Path, paths: Sequence[str], *which: str
) -> Counter[tuple[str, int]]:
    """`_ask`, for longer where some of the paths were not reached by a right request."""
    answered = _ask(server, folder, SECONDS, *which)
    if all(answered[path, 200] for path in paths):
        return answered
    return _ask(server, folder, LONGER, *which)


def _ask(
    server: ServerProcess, folder: Path, seconds: int, *which: str
) -> Counter[tuple[str, int]]:
    """Requests of some seconds to the paths named; how often each path gave each status."""
    report = folder / "events.ndjson"
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *which,
            "--checks", ",".join(CHECKS), "--max-time", str(seconds), "--workers", "1",
            "--seed", "1", "--request-timeout", "60", "--continue-on-failure",
            "--report", "ndjson", "--report-ndjson-path", str(report),
        ],
        capture_output=True, text=True, timeout=280, cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS),
             "EDGELORA_SERVED": f"{BASE_ID},{ADAPTER}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    urllib.request.urlopen(f"{server.url}/ready", timeout=10).close()
    assert server.process.poll() is None
    answered = Counter(_answered(report))
    assert not [status for _, status in answered if status >= 500]
    return answered


def _answered(report: Path) -> Iterator[tuple[str, int]]:
    """Path and status of every answer in the report."""
    pending = [json.loads(line) for line in report.read_text().splitlines()]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            if isinstance(value.get("request"), dict) and isinstance(value.get("response"), dict):
                yield urlsplit(value["request"]["uri"]).path, value["response"]["status_code"]
