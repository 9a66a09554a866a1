"""These tests need torch, transformers and PEFT: without them the folder is not collected."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
