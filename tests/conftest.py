"""Shared by every test; its presence puts this folder (pico) on the path of tests/parity too."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import builds
import numpy as np
import pico
import pytest
from builds import World

from edgelora.adapters.base import Base, read_base
from edgelora.engine.context import Context, Row
from edgelora.engine.model import Model, open_model


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands set up logging for their process: no test depends on those before it."""
    loggers = [
        logging.getLogger(name) for name in ("", "edgelora.serve", "uvicorn.error", "asyncio")
    ]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A pico llama base with tied embeddings; modules that need another define their own."""
    return read_base(pico.write_base(tmp_path_factory.mktemp("base") / "b.gguf", "llama"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A pico llama base with a head of its own."""
    path = tmp_path_factory.mktemp("untied") / "b.gguf"
    return read_base(pico.write_base(path, "llama", tied=False))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A pico base, a bank for it and datasets, with a cache of their own."""
    with builds.own_world(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(scope="module")
def model(world: World) -> Iterator[Model]:
    """The base of `world`, open."""
    with open_model(world.base, builds.ONE_THREAD) as model:
        yield model


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a build writes: a file of a folder with nothing else in it."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "built.gguf"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every batch that llama.cpp really computes."""
    sizes: list[int] = []
    real = Context.decode

    def counting(context: Context, rows: Sequence[Row]) -> np.ndarray:
        sizes.append(len(rows))
        return real(context, rows)

    monkeypatch.setattr(Context, "decode", counting)
    return sizes
