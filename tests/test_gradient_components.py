"""Coordinates of rank-one components: orthonormal, slopes by differences, on disk as in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pico
import pytest
from gradient_cases import adapters, examples, slope, write_kind

from edgelora.adapters.gguf_lora import LoraFile, open_lora
from edgelora.engine.score import mean_loss
from edgelora.errors import EdgeLoRAError
from edgelora.gradient import components
from edgelora.gradient.components import (
    Components,
    memory_of_directions,
    principal_directions,
)
from edgelora.gradient.decoder import PassOptions, open_decoder
from edgelora.gradient.descent import DescentOptions, descend
from edgelora.gradient.updates import Combined

START = np.array([0.5, -0.2, 0.3])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind("mistral", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bank(base: Path) -> list[LoraFile]:
    """Ranks 2 and 3 on all matrices, and one of rank 2 on queries of one layer."""
    partial = base.with_name("partial.gguf")
    pico.write_random_lora(partial, base, rank=2, layers=(1,), parts=("attn_q",), seed=7)
    return [*adapters(base, 2), open_lora(partial)]


def dense(bank: list[LoraFile], table: np.ndarray, name: str) -> np.ndarray:
    """What coefficients (k, r) of components add to a matrix."""
    pairs = [(row, file.pair(name)) for row, file in zip(table, bank, strict=True)
             if name in file.plan]  # fmt: skip
    return np.sum([p.scale * (p.lora_b * row[: p.rank]) @ p.lora_a for row, p in pairs], axis=0)


def test_the_start_is_that_of_every_component(bank: list[LoraFile]) -> None:
    made = Components(bank, START)
    for name, table in made.by_tensor(made.start).items():
        for row, file, c in zip(table, bank, START, strict=True):
            rank = file.rank(name) if name in file.plan else 0
            assert row[:rank] == pytest.approx([c] * rank, rel=1e-5)
            assert not row[rank:].any()


def test_unit_steps_change_a_matrix_by_one_norm_in_orthogonal_ways(bank: list[LoraFile]) -> None:
    made = Components(bank, START)
    tables = [made.by_tensor(unit) for unit in np.eye(len(made.start))]
    norms = [
        np.linalg.norm(file.pair(name).lora_b[:, r]) * np.linalg.norm(file.pair(name).lora_a[r])
        * file.pair(name).scale
        for file in bank for name in file.names for r in range(file.rank(name))
    ]  # fmt: skip
    size = np.sqrt(np.mean(np.square(norms)))
    for name in made.names:
        updates = [dense(bank, table[name], name).ravel() for table in tables]
        used = np.array([update for update in updates if update.any()])
        assert len(used) == sum(file.rank(name) for file in bank if name in file.plan)
        # 1e-3 of the mean eigenvalue is the ridge.
        np.testing.assert_allclose(used @ used.T / size**2, np.eye(len(used)), atol=0.02)


def test_slopes_are_central_differences(base: Path, bank: list[LoraFile]) -> None:
    decoder, made = open_decoder(base, np.float64), Components(bank, START)
    texts, rng = examples(), np.random.default_rng(0)
    at = made.start + 0.05 * rng.standard_normal(made.start.shape)
    found, scores = made.gradient(decoder, texts, at, PassOptions())

    def loss(values: np.ndarray) -> float:
        combined = Combined(bank, made.by_tensor(values), np.float64)
        return mean_loss(decoder.losses(texts, combined))

    assert mean_loss(scores) == pytest.approx(loss(at), rel=1e-5)
    for _ in range(3):
        along = rng.standard_normal(at.shape)
        along /= np.linalg.norm(along)
        expected = slope(lambda t, along=along: loss(at + t * along))
        assert found @ along == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_descent_is_the_same_with_its_roots_on_disk(
    base: Path, bank: list[LoraFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = open_decoder(base)
    options = DescentOptions(n_passes=2, n_folds=0)
    whole = descend(decoder, bank, examples(4), START, options)
    monkeypatch.setattr(components, "_IN_MEMORY_BYTES", 0)
    passes = PassOptions(scratch=tmp_path)
    mapped = descend(decoder, bank, examples(4), START, options, passes=passes)
    for name, row in whole.coefficients.items():
        assert mapped.coefficients[name].tobytes() == row.tobytes()
    assert not list(tmp_path.iterdir())
    assert whole.support_losses[1] < whole.support_losses[0]


def test_principal_directions_by_hand() -> None:
    root, inverse = principal_directions(np.array([[2.0, 1.0], [1.0, 2.0]]))  # eigenvalues 1 and 3
    ridge = 1e-3 * 2
    expected = np.array([[1, 1], [1, 1]]) / np.sqrt(2) / np.sqrt([1 + ridge, 3 + ridge])
    assert np.abs(root) == pytest.approx(expected)
    assert root[0, 1] * root[1, 1] > 0 > root[0, 0] * root[1, 0]
    assert root @ inverse == pytest.approx(np.eye(2))
    assert principal_directions(np.zeros((2, 2)))[0] == pytest.approx(np.eye(2))


def test_sparsity_of_components_is_refused(base: Path, bank: list[LoraFile]) -> None:
    options = dataclasses.replace(DescentOptions(), sparsity=0.1)
    with pytest.raises(EdgeLoRAError, match="moved together"):
        descend(open_decoder(base), bank, examples(2), START, options)


def test_memory_of_directions(bank: list[LoraFile], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Components(bank, START)
    sizes = [len(place.owners) for place in made._places]
    assert sum(sizes) == len(made.start)
    assert memory_of_directions(bank) == 4 * sum(size**2 for size in sizes)
    monkeypatch.setattr(components, "_IN_MEMORY_BYTES", 0)
    assert memory_of_directions(bank) == 0  # in a file
