"""These tests need the `clients` extra: without it the folder is not collected."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]
