"""schemathesis against the OpenAPI document of a running server: requests of every kind.

Right ones, wrong ones, wrong methods and headers, sequences of them. Not checked: that what the
document allows is accepted (`positive_data_acceptance`), for it cannot say which models, token ids
and prompt lengths a server has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from server_process import ADAPTER, BASE_ID, serve

pytestmark = pytest.mark.clients

SECONDS = 60
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


def test_no_failure_and_no_status_that_the_document_lacks(tmp_path: Path) -> None:
    options = ("--slots", "2", "--context", "256", "--adapter-dir", str(ADAPTER.parent))
    report = tmp_path / "events.ndjson"
    with serve("--base", BASE_ID, "--adapter", str(ADAPTER), *options) as server:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
                "--checks", ",".join(CHECKS), "--max-time", str(SECONDS), "--workers", "2",
                "--seed", "1", "--request-timeout", "60", "--continue-on-failure",
                "--report", "ndjson", "--report-ndjson-path", str(report),
            ],
            capture_output=True, text=True, timeout=280, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        urllib.request.urlopen(f"{server.url}/ready", timeout=10).close()
        assert server.process.poll() is None
    statuses = Counter(_statuses(report))
    assert statuses[200] > 20 and statuses[400] > 20, statuses
    assert not [status for status in statuses if status >= 500]


def _statuses(report: Path) -> list[int]:
    """The status of every answer in the report."""
    found = []
    for line in report.read_text().splitlines():
        found += _in(json.loads(line))
    return found


def _in(value: object) -> list[int]:
    if isinstance(value, dict):
        own = [value["status_code"]] if isinstance(value.get("status_code"), int) else []
        return own + [status for inner in value.values() for status in _in(inner)]
    return [status for inner in value for status in _in(inner)] if isinstance(value, list) else []
