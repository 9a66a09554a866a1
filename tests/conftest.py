"""Shared by every test; its presence puts this folder (pico) on the path of tests/parity too."""

from __future__ import annotations

import pico
import pytest

from edgelora.adapters.base import Base, read_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A pico llama base with tied embeddings; modules that need another define their own."""
    return read_base(pico.write_base(tmp_path_factory.mktemp("base") / "b.gguf", "llama"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A pico llama base with a head of its own."""
    path = tmp_path_factory.mktemp("untied") / "b.gguf"
    return read_base(pico.write_base(path, "llama", tied=False))
