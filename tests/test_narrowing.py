"""A bank whose combinations take too long: the nearest adapters take part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import World

from edgelora.bank import open_bank
from edgelora.build import Built, Options, build, earlier, narrowing, pace
from edgelora.datasets.read import read_dataset
from edgelora.engine.model import Model
from edgelora.engine.prepare import model_template

SHORT = Options(refine="forward", force=True, limit_s=600.0)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def slow_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each combination of an adapter and more: 20 of all four, 10 of two."""
    monkeypatch.setattr(pace, "measure_merge", lambda paths: 12.0 * len(paths))
    monkeypatch.setattr(narrowing, "LEAST_KEPT", 1)


def run(world: World, model: Model, out: Path, options: Options) -> Built:
    data = read_dataset(world.helped)
    return build(model, open_bank(world.bank), data, model_template(model, None), out, options)


def nearest(built: Built, n: int) -> list[str]:
    return sorted(sorted(built.distances, key=lambda name: built.distances[name])[:n])


@pytest.mark.parametrize("refine", [pytest.param("forward", marks=pytest.mark.slow), "auto"])
def test_the_nearest_take_part_and_a_repeated_build_knows_them(
    world: World, model: Model, out: Path, decoded: list[int], refine: str
) -> None:
    whole = run(world, model, out, Options(refine=refine, force=True))
    built = run(world, model, out, Options(refine=refine, force=True, limit_s=600.0))
    (told,) = [m for m in built.warnings if "nearest take part" in m]
    assert "of all 4 adapters take about" in told and "min of 10" in told
    n_kept = int(told.split(": the ")[1].split()[0])
    assert n_kept in (1, 2) and sorted(built.distances) == nearest(whole, n_kept)
    assert built.distances.items() <= whole.distances.items()
    assert set(built.coefficients) <= set(built.distances)
    before = out.read_bytes()
    decoded.clear()
    options = Options(refine=refine, force=True, limit_s=600.0, reuse=True)
    run(world, model, out, options)
    assert decoded and out.read_bytes() == before
    decoded.clear()
    again = run(world, model, out, options)
    assert not decoded and out.read_bytes() == before
    assert again.coefficients == built.coefficients and again.distances == built.distances


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 4], [-1], "ab", None])
def test_a_damaged_record_of_what_took_part_is_refused(kept: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        earlier._checked(kept, 4)
    assert earlier._checked([0, 3], 4) == [0, 3]


def test_without_signatures_nothing_is_left_out_and_that_is_said(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelora.build.pool.Pool.signed", property(lambda pool: []))
    built = run(world, model, out, SHORT)
    (told,) = [m for m in built.warnings if "--exclude leaves some out" in m]
    assert "no signature tells which are nearest" in told and len(built.losses_alone) == 4


@pytest.mark.slow
def test_a_person_s_own_budget_and_enough_time_leave_all(
    world: World, model: Model, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(run(world, model, out, Options(refine="forward", force=True)).distances) == 4

    def quick(paths: Sequence[Path]) -> float:
        return 0.01 * len(paths)

    monkeypatch.setattr(pace, "measure_merge", quick)
    built = run(world, model, out, SHORT)
    assert len(built.distances) == 4 and np.isfinite(list(built.distances.values())).all()
