"""The fuzz run: what it draws is seeded, and it sees each kind of problem."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pico
import pytest
from fuzzing import gguf_parts, mutations, worker
from fuzzing.seeds import WEIGHTS, Seed, draw
from fuzzing.targets import TARGETS

from edgelora.errors import InvalidFile


def test_a_gguf_taken_apart_and_put_together_is_the_same(tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "base.gguf", dtype="Q8_0", tied=False)
    again = tmp_path / "again.gguf"
    again.write_bytes(gguf_parts.put_together(gguf_parts.take_apart(path.read_bytes())))
    ours, theirs = gguf.GGUFReader(again), gguf.GGUFReader(path)
    assert {k: f.contents() for k, f in ours.fields.items() if not k.startswith("GGUF.")} == {
        k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")
    }
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert one.name == other.name and one.tensor_type == other.tensor_type
        np.testing.assert_array_equal(one.data, other.data)


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (mutations.spoil_bytes, bytes(range(200))),
        (mutations.spoil_json, json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()),
        (mutations.spoil_lines, b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        (mutations.spoil_safetensors, (2).to_bytes(8, "little") + b"{}" + bytes(32)),
        (gguf_parts.spoil_gguf, b""),
    ],
    ids=["bytes", "json", "lines", "safetensors", "gguf"],
)
def test_changes_are_seeded_and_never_fail(change: object, data: bytes, tmp_path: Path) -> None:
    assert callable(change)
    if not data:
        base = pico.write_base(tmp_path / "b.gguf", dims=pico.Dims(n_layer=1))
        data = base.read_bytes()
    made = [[change(data, random.Random(i)) for i in range(60)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 20
    for i, changed in enumerate(made[0]):
        change(changed, random.Random(i))  # what is broken already can be changed again


def test_every_kind_has_a_target_and_comes() -> None:
    assert set(WEIGHTS) == set(TARGETS)
    seeds = [Seed(kind, kind, {"a.json": b"{}", "b": b"x"}, frozenset("b")) for kind in WEIGHTS]
    drawn = [draw(seeds, 7, number) for number in range(300)]
    assert drawn == [draw(seeds, 7, number) for number in range(300)]
    assert {seed.kind for seed, _ in drawn} == set(WEIGHTS)
    assert all(files["b"] == b"x" for _, files in drawn)


def test_what_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(target: object) -> tuple[str, str]:
        monkeypatch.setattr(worker, "TARGETS", {"base": target})
        world: object = None
        line = worker.run(Seed("base", "x", {}), {"f": b""}, tmp_path / "w", world)  # type: ignore[arg-type]
        return str(line["outcome"]), str(line["what"])

    def refuse(*_: object) -> None:
        raise InvalidFile("f: damaged")

    def rattle(*_: object) -> None:
        raise InvalidFile("f" * 30_000)

    def fail(*_: object) -> None:
        raise KeyError("x")

    assert outcome(lambda *_: None) == ("read", "") and outcome(refuse) == ("refused", "")
    assert outcome(fail)[0] == "problem" and "KeyError" in outcome(fail)[1]
    assert "an error of 30000 characters" in outcome(rattle)[1]
    monkeypatch.setattr(worker, "MAX_GROWTH_BYTES", -1)
    assert outcome(lambda *_: None)[0] == "problem"
