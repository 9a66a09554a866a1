"""The Neural head: a tiny MLP by hand, the table against the MLP, hostile files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from edgelora.errors import InvalidFile
from edgelora.operators.neural import (
    TABLE_RANGE,
    NeuralHead,
    load_heads,
    mlp,
    save_heads,
    tabulate,
)


def weights(h: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (h, 1), "w2": (h, h), "w3": (1, h), "b3": (1,)}
    shapes |= {name: (h,) for name in ("b1", "g1", "c1", "b2", "g2", "c2")}
    w = {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    w["b1"] *= np.float32(np.sqrt(h))  # as wide as w1, which is how torch initialises them
    return w


def test_a_hidden_width_of_two_by_hand() -> None:
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    w = {"w1": np.array([[1.0], [-1.0]]), "b1": zero, "g1": one, "c1": zero}
    w |= {"w2": np.eye(2), "b2": zero, "g2": 2 * one, "c2": zero}
    w |= {"w3": np.array([[3.0, 5.0]]), "b3": np.array([7.0])}
    w = {name: np.asarray(value, np.float32) for name, value in w.items()}
    # LayerNorm makes (z, -z) into (1, -1) up to epsilon, ReLU (1, 0); again (1, -1), times 2.
    assert mlp(np.array([4.0, -4.0]), w) == pytest.approx([13.0, 17.0], abs=1e-3)


def test_the_table_equals_the_mlp() -> None:
    w = weights(200)
    head = NeuralHead("js", True, tabulate(w))
    z = np.random.default_rng(1).uniform(-6, 6, size=500)
    values = mlp(z, w)
    assert head(z) == pytest.approx(values, abs=1e-3 * np.ptp(values))
    assert head(np.array([99.0])) == pytest.approx(mlp(np.array([TABLE_RANGE]), w), rel=1e-5)


def heads() -> dict[str, NeuralHead]:
    table = np.arange(5, dtype=np.float32)
    return {
        "wd": NeuralHead("wd", True, table, "40 steps"),
        "js_fixed": NeuralHead("js_fixed", False, table * 2),
    }


def test_round_trip_and_repeated_bytes() -> None:
    data = save_heads(heads())
    assert data == save_heads(dict(reversed(heads().items())))
    again = load_heads(data)
    assert again.keys() == heads().keys()
    assert again["js_fixed"].table.tolist() == [0, 2, 4, 6, 8]
    assert (again["wd"].diagonal, again["wd"].note, again["wd"].distance) == (
        True,
        "40 steps",
        "wd",
    )


def facts(changes: dict) -> dict[str, str]:
    head = {"distance": "wd", "diagonal": True, "note": ""}
    return {"edgelora.neural": json.dumps({"version": 1, "heads": {"wd": head}, **changes})}


TABLE = {"wd": np.zeros(5, np.float32)}
HOSTILE = {
    "empty": b"",
    "no metadata": save(TABLE),
    "not json": save(TABLE, metadata={"edgelora.neural": "{"}),
    "a list": save(TABLE, metadata={"edgelora.neural": "[1]"}),
    "version": save(TABLE, metadata=facts({"version": 9})),
    "missing": save(TABLE, metadata=facts({"heads": {"kl": {}}})),
    "heads": save(TABLE, metadata=facts({"heads": ["wd"]})),
    "types": save(
        TABLE, metadata=facts({"heads": {"wd": {"distance": 1, "diagonal": 1, "note": 1}}})
    ),
    "nan": save({"wd": np.full(5, np.nan, np.float32)}, metadata=facts({})),
    "shape": save({"wd": np.zeros((5, 2), np.float32)}, metadata=facts({})),
    "short": save({"wd": np.zeros(1, np.float32)}, metadata=facts({})),
    "long": save({"wd": np.zeros(70_000, np.float32)}, metadata=facts({})),
    "type": save({"wd": np.zeros(5, np.int32)}, metadata=facts({})),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidFile, match="here"):
        load_heads(data, "here")


def test_the_hostile_files_are_near_to_sound_ones() -> None:
    assert load(HOSTILE["nan"]).keys() == TABLE.keys()
    assert load_heads(save(TABLE, metadata=facts({})))["wd"].distance == "wd"
