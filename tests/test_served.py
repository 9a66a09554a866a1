"""The ids of a server: what a request asks for, what is in memory, what leaves it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pico
import pytest

from edgelora.adapters.base import Base
from edgelora.engine.model import WeightedAdapter
from edgelora.errors import AlreadyExists, IncompatibleAdapter, InvalidFile
from edgelora.serve.served import (
    InvalidAdapterSet,
    InvalidName,
    ModelNotFound,
    Registry,
)


@dataclass(frozen=True)
class Entry:
    """One entry of `lora`."""

    name: str
    scale: float = 1.0


class Loads:
    """A loader that remembers; each future is ended by the test."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.futures: list[Future[None]] = []

    def _note(self, what: str, path: Path) -> Future[None]:
        self.calls.append((what, path.stem))
        self.futures.append(Future())
        return self.futures[-1]

    def load(self, path: Path) -> Future[None]:
        return self._note("load", path)

    def unload(self, path: Path) -> Future[None]:
        return self._note("unload", path)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def paths(base: Base, tmp_path: Path) -> dict[str, Path]:
    return {
        name: pico.write_random_lora(tmp_path / f"{name}.gguf", base.path, seed=i)
        for i, name in enumerate("zab")
    }


@pytest.fixture
def registry(base: Base, loads: Loads, paths: dict[str, Path]) -> Registry:
    found = Registry(base, "pico", loads, max_loaded=2)
    for name, path in paths.items():
        found.add(path)
        found.note_loaded(name)
    return found


def test_none_and_the_base_are_the_base(registry: Registry) -> None:
    for model in (None, "", "pico"):
        assert registry.resolve(model) == ("pico", ())
    assert registry.resolve("auto") == ("auto", ())
    assert registry.ids() == ["pico", "z", "a", "b"]


def test_an_adapter_is_its_file_with_weight_1(registry: Registry, paths: dict[str, Path]) -> None:
    assert registry.resolve("a") == ("a", (WeightedAdapter(paths["a"].resolve(), 1.0),))


def test_lora_replaces_the_models_own_and_is_sorted_by_path(
    registry: Registry, paths: dict[str, Path]
) -> None:
    a, z = (
        WeightedAdapter(paths[name].resolve(), scale) for name, scale in (("a", -2), ("z", 0.5))
    )
    wanted = [Entry("z", 0.5), Entry("a", -2)]
    assert registry.resolve("b", wanted) == ("pico", (a, z))
    assert registry.resolve(None, wanted[::-1]) == ("pico", (a, z))
    # Scale 0 is exactly the base, and so is an empty list.
    assert registry.resolve("b", [Entry("a", 0.0)]) == ("pico", ())
    assert registry.resolve("b", [Entry("a", -0.0), Entry("z", 0.5)]) == ("pico", (z,))
    assert registry.resolve("b", []) == ("pico", ())
    assert registry.resolve("auto", []) == ("pico", ())


def test_unknown_names_are_refused_with_the_known_ones(registry: Registry) -> None:
    for ask in (lambda: registry.resolve("c"), lambda: registry.resolve("c", [Entry("a")]),
                lambda: registry.resolve(None, [Entry("c")]),
                lambda: registry.resolve(None, [Entry("c", 0)])):  # fmt: skip
        with pytest.raises(ModelNotFound, match="'c' does not exist. Known models: pico, z, a, b"):
            ask()
    with pytest.raises(ModelNotFound, match="Known models: z, a, b"):
        registry.resolve(None, [Entry("pico")])


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ([Entry("a", float("nan"))], "scale of 'a'"),
        ([Entry("a", float("inf"))], "scale of 'a'"),
        ([Entry("a", 100.5)], "from -100 to 100"),
        ([Entry("a"), Entry("a", 2)], "more than once"),
        ([Entry(str(i)) for i in range(17)], "17 entries, at most 16"),
    ],
)
def test_a_lora_list_that_means_nothing(
    registry: Registry, lora: list[Entry], problem: str
) -> None:
    with pytest.raises(InvalidAdapterSet, match=problem):
        registry.resolve("pico", lora)


def test_ids_belong_to_one_file(
    registry: Registry, base: Base, paths: dict[str, Path], tmp_path: Path
) -> None:
    assert registry.add(paths["a"]).id == "a"  # the same file again
    (tmp_path / "twin").mkdir()
    twin = pico.write_random_lora(tmp_path / "twin" / "a.gguf", base.path)
    for name, owner in ((None, "a.gguf"), ("pico", "the base"), ("auto", "chooses")):
        with pytest.raises(AlreadyExists, match=owner):
            registry.add(twin, name)
    assert registry.add(twin, "twin/a").path == twin.resolve()
    for name in ("", " a", "a\n", "é", "x" * 201):
        with pytest.raises(InvalidName):
            registry.add(twin, name or " ")
    with pytest.raises(AlreadyExists):
        Registry(base, "auto", Loads())


def test_files_are_checked_before_they_are_known(registry: Registry, tmp_path: Path) -> None:
    other = pico.write_base(tmp_path / "other.gguf", dims=pico.Dims(n_embd=64, n_head=8))
    misfit = pico.write_random_lora(tmp_path / "misfit.gguf", other)
    with pytest.raises(IncompatibleAdapter):
        registry.add(misfit)
    (tmp_path / "text.gguf").write_text("x")
    with pytest.raises(InvalidFile):
        registry.add(tmp_path / "text.gguf")
    assert registry.ids() == ["pico", "z", "a", "b"]


def test_adapters_of_a_bank_are_loaded_when_asked_for_and_leave_by_age(
    base: Base, loads: Loads, paths: dict[str, Path]
) -> None:
    registry = Registry(base, "pico", loads, max_loaded=2)
    for name, path in paths.items():
        registry.add_from_bank(path, name)
    assert loads.calls == [] and not registry.is_loaded("a")
    registry.resolve("a")
    registry.resolve(None, [Entry("b", 1), Entry("z", 0)])  # z is not needed
    registry.resolve("a")
    assert loads.calls == [("load", "a"), ("load", "b")]
    registry.resolve("z")
    assert loads.calls[2:] == [("load", "z"), ("unload", "b")]
    assert [name for name in registry.ids() if registry.is_loaded(name)] == ["z", "a"]
    assert registry.counts() == {"pico": 0, "z": 2, "a": 2, "b": 1}


def test_what_is_kept_does_not_leave(base: Base, loads: Loads, paths: dict[str, Path]) -> None:
    registry = Registry(base, "pico", loads, max_loaded=1)
    registry.add(paths["z"])
    registry.note_loaded("z")
    registry.add_from_bank(paths["a"], "a", kept=True)
    registry.add_from_bank(paths["b"], "b")
    registry.resolve("a")
    registry.resolve("b")
    assert loads.calls == [("load", "a"), ("load", "b")]


def test_an_adapter_that_fails_to_load_is_tried_again(
    base: Base, loads: Loads, paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(base, "pico", loads)
    registry.add_from_bank(paths["a"], "a")
    registry.resolve("a")
    loads.futures[0].set_exception(InvalidFile("a.gguf: damaged"))
    assert not registry.is_loaded("a") and "a.gguf: damaged" in caplog.text
    registry.resolve("a")
    assert loads.calls == [("load", "a"), ("load", "a")]


def test_removing_forgets_a_file_and_unloads_one_of_a_bank(
    registry: Registry, loads: Loads, paths: dict[str, Path]
) -> None:
    registry.add_from_bank(paths["b"], "b", kept=True)
    assert registry.get("b").in_bank and registry.get("b").kept
    for name in ("a", "b"):
        registry.remove(name)
        assert not registry.is_loaded(name)
    assert loads.calls == [("unload", "a"), ("unload", "b")]
    assert registry.ids() == ["pico", "z", "b"] and not registry.get("b").kept
    with pytest.raises(ModelNotFound):
        registry.remove("a")
    with pytest.raises(ModelNotFound):
        registry.remove("pico")
