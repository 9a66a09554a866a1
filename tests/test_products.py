"""Products by ggml's kernels: those of the rounded rows, and where they are chosen."""

from __future__ import annotations

import json
from pathlib import Path

import llama_logits
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from gradient_cases import adapters, coefficient_gradients, examples, relative, write_kind

from edgelora.engine import amx, products
from edgelora.engine.products import Products
from edgelora.engine.quantize import quantize as quantize_base
from edgelora.gradient import kernels
from edgelora.gradient.decoder import open_decoder
from edgelora.gradient.kernels import FLOAT32, MAPPED, REPACKED, Kernels, fastest

pytestmark = pytest.mark.usefixtures("own_cache")

N_OUT, N_IN = 48, 512
# Types that gguf can quantise to, and the type that ggml rounds rows to for them.
ROUNDED = {
    Kind.Q4_0: Kind.Q8_0,
    Kind.Q5_0: Kind.Q8_0,
    Kind.Q8_0: Kind.Q8_0,
    Kind.BF16: Kind.BF16,
    Kind.F16: Kind.F16,
    Kind.F32: Kind.F32,
}


def matrix(kind: Kind, n_out: int = N_OUT, n_in: int = N_IN) -> np.ndarray:
    """Random weights in a type, (out, bytes of a row)."""
    values = np.random.default_rng(1).standard_normal((n_out, n_in)).astype(np.float32)
    stored = quantize(values, kind)
    return np.ascontiguousarray(stored).view(np.uint8).reshape(n_out, -1)


def rows(n: int = 7) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, N_IN)).astype(np.float32)


def values_of(raw: np.ndarray, kind: Kind) -> np.ndarray:
    return dequantize(raw, kind).reshape(len(raw), -1).astype(np.float64)


def rounded(x: np.ndarray, kind: Kind) -> np.ndarray:
    """x as it is after the journey through another type."""
    return dequantize(quantize(x, kind), kind).reshape(x.shape).astype(np.float64)


@pytest.fixture
def product() -> Products:
    return Products(n_threads=2)


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_a_product_is_that_of_the_rounded_rows(product: Products, kind: Kind) -> None:
    raw, x = matrix(kind), rows()
    expected = rounded(x, ROUNDED[kind]) @ values_of(raw, kind).T
    assert relative(product.times(x, raw, kind), expected) < 2e-4
    assert relative(x @ values_of(raw, kind).T, expected) < 0.01


@pytest.mark.parametrize("n_out", [48, 64])  # AMX takes multiples of 32
@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q8_0, Kind.IQ4_NL, Kind.Q4_K], ids=lambda k: k.name
)
def test_repacked_weights_give_the_same(product: Products, kind: Kind, n_out: int) -> None:
    """Random bytes for types that gguf cannot quantise to; scales are set to 1/128."""
    raw = matrix(kind, n_out) if kind in ROUNDED else random_blocks(kind, n_out)
    if not product.repacks(raw, kind, N_IN):
        pytest.skip(f"ggml repacks no {kind.name} of {n_out} rows on this CPU")
    x = rows(40)
    smaller = [part for part in (raw[:32], raw[:16]) if product.repacks(part, kind, N_IN)]
    assert smaller
    for part in (raw, *smaller, raw):  # larger, smaller and equal ones share the memory
        expected = product.times(x, part, kind)
        assert relative(product.times(x, part, kind, repacked=True), expected) < 1e-5


def random_blocks(kind: Kind, n_out: int) -> np.ndarray:
    size = products.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(2).integers(0, 256, (n_out, N_IN // size[0], size[1]), np.uint8)
    n_scales = 2 if kind is Kind.Q4_K else 1
    raw[:, :, : 2 * n_scales] = np.full(n_scales, 1 / 128, np.float16).view(np.uint8)
    return raw.reshape(n_out, -1)


def test_what_ggml_does_not_repack_is_known(
    product: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not product.repacks(matrix(Kind.F32), Kind.F32, N_IN)
    assert not product.repacks(matrix(Kind.Q4_0, n_out=13), Kind.Q4_0, N_IN)
    assert not product.repacks(matrix(Kind.Q4_0, n_out=64, n_in=32), Kind.Q4_0, 32)
    with pytest.raises(ValueError, match="no such product with F32"):
        product.times(rows(), matrix(Kind.F32), Kind.F32, repacked=True)
    monkeypatch.setattr(products, "MAX_REPACKED_BYTES", 100)
    assert not product.repacks(matrix(Kind.Q4_0), Kind.Q4_0, N_IN)
    monkeypatch.setattr(amx, "warning", lambda: "broken")
    assert not Products(1).repacks(matrix(Kind.Q4_0)[:8, :36], Kind.Q4_0, 64)


def test_arrays_may_begin_anywhere(product: Products) -> None:
    """Stored tensors lie at multiples of a file's alignment; numpy's arrays at 16."""
    raw, x = matrix(Kind.Q4_0), rows()
    expected = product.times(x, raw, Kind.Q4_0)
    for shift in (2, 16):
        bytes_ = np.empty(raw.nbytes + 64, np.uint8)
        moved = bytes_[shift : shift + raw.nbytes].reshape(raw.shape)
        moved[:] = raw
        floats = np.empty(x.size + 16, np.float32)
        shifted = floats[shift // 2 : shift // 2 + x.size].reshape(x.shape)
        shifted[:] = x
        assert np.array_equal(product.times(shifted, moved, Kind.Q4_0), expected)
    assert np.array_equal(product.times(np.asfortranarray(x), raw, Kind.Q4_0), expected)


def test_what_does_not_fit_never_reaches_ggml(product: Products) -> None:
    raw, x = matrix(Kind.Q4_0), rows()
    for wrong_x, wrong_raw, kind in (
        (x[:, :32], raw, Kind.Q4_0),
        (x, raw, Kind.Q8_0),
        (x.astype(np.float64), raw, Kind.Q4_0),
        (x, raw.view(np.int8), Kind.Q4_0),
        (x[:0], raw, Kind.Q4_0),
        (x, raw[0], Kind.Q4_0),
        (x, np.zeros((4, N_IN // 32 * 36), np.uint8), Kind.Q8_1),
        (x, np.zeros((4, N_IN // 256 * 292), np.uint8), Kind.Q8_K),
    ):
        with pytest.raises(ValueError, match=r"by|empty"):
            product.times(wrong_x, wrong_raw, kind)


@pytest.fixture
def always_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml's kernels for every matrix, however small."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "fastest", lambda seconds: MAPPED)


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    path = folder / "q8_0.gguf"
    quantize_base(write_kind("mistral", folder), path, "q8_0")
    return path


@pytest.mark.usefixtures("always_mapped")
def test_logits_by_ggmls_kernels_are_those_of_llama_cpp(small_base: Path) -> None:
    """They round rows where llama.cpp does: nearer to it than float32 is."""
    ids = np.random.default_rng(0).integers(5, 300, 40).tolist()
    expected = llama_logits.logits(small_base, ids)
    found, in_float32 = (
        relative(open_decoder(small_base, exact=exact).logits(ids, {}), expected)
        for exact in (False, True)
    )
    assert found < 1e-3 < 4e-3 < in_float32


@pytest.mark.usefixtures("always_mapped")
def test_gradients_are_those_of_float32_but_for_the_rounding(small_base: Path) -> None:
    files = adapters(small_base)
    found, expected = (
        coefficient_gradients(open_decoder(small_base, exact=exact), files, {})
        for exact in (False, True)
    )
    assert 1e-4 < relative(found, expected) < 0.03
    exact64 = coefficient_gradients(open_decoder(small_base, np.float64, exact=False), files, {})
    assert relative(expected, exact64) < 1e-5, "float64 is exact whatever is asked for"


def test_a_way_is_tried_out_once_and_kept(
    small_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    tried = []

    def chosen(seconds: dict[str, float]) -> str:
        tried.append(sorted(seconds))
        return MAPPED

    monkeypatch.setattr(kernels, "fastest", chosen)
    losses = [open_decoder(small_base, exact=False).losses(examples(), {}) for _ in range(2)]
    assert losses[0] == losses[1] and len(tried) == 1 and tried[0][:2] == [FLOAT32, MAPPED]
    kept = tmp_path / "cache" / "products.json"
    ((key, value),) = json.loads(kept.read_text()).items()
    assert "Q8_0, 1 threads" in key and value == MAPPED
    for damaged in ("{", "[]", json.dumps({key: 3}), json.dumps({key: "magic"})):
        kept.write_text(damaged)
        open_decoder(small_base, exact=False)
    assert len(tried) == 5
    open_decoder(small_base, exact=False, n_threads=2)
    assert len(tried) == 6, "of another number of threads"


def test_small_and_exact_matrices_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fastest", lambda seconds: pytest.fail("tried out"))
    found = Kernels(n_threads=1)
    for kind in (Kind.F32, Kind.F16, Kind.Q4_0):  # the last is small
        found.choose(
            matrix(kind), kind, N_IN, lambda part: np.ones((N_OUT, N_IN), np.float32)[part]
        )
        assert found.times(rows(), matrix(kind), kind) is None


@pytest.mark.parametrize(
    ("mapped", "repacked", "expected"),
    [
        (0.96, None, FLOAT32),
        (1.1, 0.7, REPACKED),
        (0.7, None, MAPPED),
        (0.7, 0.6, MAPPED),
        (0.7, 0.5, REPACKED),
    ],
)
def test_another_way_has_to_be_worth_it(
    mapped: float, repacked: float | None, expected: str
) -> None:
    seconds = {FLOAT32: 1.0, MAPPED: mapped} | ({REPACKED: repacked} if repacked else {})
    assert fastest(seconds) == expected
