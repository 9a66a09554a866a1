"""ggml's to_float through ctypes: the same bits as gguf's Python, and nothing that overruns."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as reference

from edgelora.engine import dequantize as module
from edgelora.engine.dequantize import dequantize, is_readable
from edgelora.errors import EngineError, UnsupportedFile

READABLE = [kind for kind in GGMLQuantizationType if is_readable(kind)]
COMPARED = [kind for kind in READABLE if kind.name != "Q1_0"]  # gguf's Python does not read it
USUAL = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ2_XXS"


def blocks(kind: GGMLQuantizationType, n: int = 64) -> np.ndarray:
    """Random bytes: every code of a type comes up, NaN among the scales too."""
    size = n * GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(int(kind)).integers(0, 256, size, dtype=np.uint8)


def test_every_type_that_files_use_is_readable() -> None:
    assert {GGMLQuantizationType[name] for name in USUAL.split()} <= set(READABLE)
    assert GGMLQuantizationType.I32 not in READABLE


@pytest.mark.parametrize("kind", COMPARED, ids=lambda kind: kind.name)
def test_values_are_those_of_gguf(kind: GGMLQuantizationType) -> None:
    raw = blocks(kind)
    out = np.empty(64 * GGML_QUANT_SIZES[kind][0], np.float32)
    dequantize(raw, kind, out)
    with np.errstate(all="ignore"):
        expected = reference(raw.reshape(64, -1), kind).reshape(-1)
    number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(out), ~number)
    assert np.array_equal(out[number], expected[number])
    assert number.any()


def test_a_type_without_to_float_is_read_by_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = GGMLQuantizationType.Q4_0
    out, by_gguf = np.empty((2, 64 * 32), np.float32)
    dequantize(blocks(kind), kind, out)
    monkeypatch.setattr(module, "_to_float", lambda kind: None)
    with np.errstate(all="ignore"):
        dequantize(blocks(kind), kind, by_gguf)
    assert np.array_equal(out, by_gguf, equal_nan=True)


def test_unreadable_types_are_named() -> None:
    with pytest.raises(UnsupportedFile, match="I32"):
        dequantize(np.zeros(8, np.uint8), GGMLQuantizationType.I32, np.empty(2, np.float32))


def test_another_version_of_ggml_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = GGMLQuantizationType.Q5_K
    module._to_float.cache_clear()
    monkeypatch.setitem(GGML_QUANT_SIZES, kind, (256, 177))
    with pytest.raises(EngineError, match="Q5_K: ggml has 176 bytes"):
        dequantize(np.zeros(177, np.uint8), kind, np.empty(256, np.float32))


@pytest.mark.parametrize(
    ("raw", "out"),
    [
        (np.zeros(17, np.uint8), np.empty(32, np.float32)),
        (np.zeros(18, np.uint8), np.empty(33, np.float32)),
        (np.zeros(36, np.uint8)[::2], np.empty(32, np.float32)),
        (np.zeros(18, np.uint8), np.empty(64, np.float32)[::2]),
        (np.zeros(18, np.uint8), np.empty(32)),
        (np.zeros(18, np.int8), np.empty(32, np.float32)),
    ],
)
def test_what_would_overrun_never_reaches_c(raw: np.ndarray, out: np.ndarray) -> None:
    with pytest.raises(ValueError):
        dequantize(raw, GGMLQuantizationType.Q4_0, out)
