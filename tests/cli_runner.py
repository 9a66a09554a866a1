"""`edgelora` as a person types it, in this process: `run("eval", "--base", path, ...)`."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner, Result

from edgelora.cli.main import main

posix_only = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


def run(*words: object, stdin: str | None = None) -> Result:
    """Exit code, stdout and stderr; an exception that no message was made of fails the test."""
    result = CliRunner().invoke(main, [str(word) for word in words], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
