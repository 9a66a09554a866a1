"""What importing the package does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("given", "expected"), [(None, "4"), ("26", "26")])
def test_idle_threads_of_openblas_sleep_unless_a_person_says_otherwise(
    given: str | None, expected: str
) -> None:
    """It is set before the command line's modules load numpy."""
    name = "OPENBLAS_THREAD_TIMEOUT"
    code = (
        "import os, sys, edgelora; assert 'numpy' not in sys.modules; "
        f"import edgelora.build; assert 'numpy' in sys.modules; print(os.environ['{name}'])"
    )
    env = {key: value for key, value in os.environ.items() if key != name}
    env |= {name: given} if given else {}
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == expected
