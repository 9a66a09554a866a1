"""GGUF LoRA files: a round trip by hand, llama.cpp's rules, then files and plans that are wrong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pico
import pytest

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import (
    PairPlan,
    check,
    find_nonfinite,
    is_finite,
    open_lora,
    write_lora,
)
from edgelora.adapters.lora import LoraPair
from edgelora.errors import EdgeLoRAError, InvalidFile, UnsupportedFile

NAME = "blk.0.attn_q.weight"


def pair(
    name: str = NAME, *, rank: int = 2, n_in: int = 32, n_out: int = 32, scale: float = 1.5
) -> LoraPair:
    rng = np.random.default_rng(rank)
    lora_a = rng.standard_normal((rank, n_in), dtype=np.float32)
    return LoraPair(name, lora_a, rng.standard_normal((n_out, rank), dtype=np.float32), scale)


def planned(*pairs: LoraPair) -> list[PairPlan]:
    return [PairPlan(p.name, p.rank, p.lora_a.shape[1], p.lora_b.shape[0]) for p in pairs]


def write(path: Path, *pairs: LoraPair, **options: object) -> Path:
    settings = {"architecture": "llama", "alpha": None, "dtype": "f32"} | options
    write_lora(path, planned(*pairs), pairs, **settings)  # type: ignore[arg-type]
    return path


def test_a_round_trip_by_hand(tmp_path: Path) -> None:
    """Scale 1.5 is baked into lora_b; metadata of every kind comes back, the empty string too."""
    facts = {
        "edgelora.name": "x", "edgelora.source": "", "edgelora.format_version": 1,
        "edgelora.low": -5, "edgelora.share": 0.1, "edgelora.flag": True,
    }  # fmt: skip
    given = pair()
    lora = open_lora(write(tmp_path / "a.gguf", given, metadata=facts))
    assert (lora.architecture, lora.alpha, lora.names, lora.rank(NAME)) == ("llama", 0, (NAME,), 2)
    assert {key: lora.metadata[key] for key in facts} == facts
    assert list(lora.metadata)[-len(facts) :] == list(facts)
    (found,) = lora.pairs()
    np.testing.assert_array_equal(found.lora_a, given.lora_a)
    np.testing.assert_array_equal(found.lora_b, given.lora_b * np.float32(1.5))
    assert found.scale == 1.0
    assert lora.sha256 == hashlib.sha256(lora.path.read_bytes()).hexdigest()


def test_an_alpha_leaves_the_factors_as_they_are(tmp_path: Path) -> None:
    given = pair(scale=3.0)
    lora = open_lora(write(tmp_path / "a.gguf", given, alpha=6.0))
    found = lora.pair(NAME)
    np.testing.assert_array_equal(found.lora_b, given.lora_b)
    assert (lora.alpha, found.scale) == (6.0, 3.0)


@pytest.mark.parametrize(("dtype", "error"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 1e-2)])
def test_output_types(tmp_path: Path, dtype: str, error: float) -> None:
    given = pair(rank=32, n_in=64, scale=1.0)
    found = open_lora(write(tmp_path / "a.gguf", given, dtype=dtype)).pair(NAME)
    for got, wanted in ((found.lora_a, given.lora_a), (found.lora_b, given.lora_b)):
        assert np.linalg.norm(got - wanted) < error * np.linalg.norm(wanted)
    if dtype == "f16":
        np.testing.assert_array_equal(found.lora_a, given.lora_a.astype(np.float16))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, pair(), pair("y.weight")) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_ggufs_reader_agrees_and_equal_shapes_are_not_swapped(tmp_path: Path) -> None:
    pairs = [pair(f"blk.{i}.attn_q.weight", rank=2) for i in range(3)]
    pairs[1] = LoraPair(pairs[1].name, pairs[1].lora_a * 10, pairs[1].lora_b * 20, 1.0)
    reader = gguf.GGUFReader(write(tmp_path / "a.gguf", *pairs))
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for p in pairs:
        np.testing.assert_array_equal(tensors[f"{p.name}.lora_a"], p.lora_a)
        np.testing.assert_array_equal(tensors[f"{p.name}.lora_b"], p.lora_b * np.float32(p.scale))


def test_the_embedding_is_flipped_in_the_file_only(tmp_path: Path) -> None:
    """token_embd: the file has lora_a (vocabulary, r) and lora_b (embedding, r)."""
    given = pair("token_embd.weight", n_in=32, n_out=100, scale=1.0)
    lora = open_lora(write(tmp_path / "a.gguf", given))
    assert lora.gguf.tensors["token_embd.weight.lora_a"].shape == (100, 2)
    assert lora.gguf.tensors["token_embd.weight.lora_b"].shape == (32, 2)
    found = lora.pair("token_embd.weight")
    np.testing.assert_array_equal(found.lora_a, given.lora_a)
    np.testing.assert_array_equal(found.lora_b, given.lora_b)


def test_plans_and_pairs_that_differ_are_bugs(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    options = {"architecture": "llama", "alpha": None}
    with pytest.raises(ValueError, match="shorter"):
        write_lora(path, planned(pair(), pair("y.weight")), [pair()], **options)
    with pytest.raises(ValueError, match="planned"):
        write_lora(path, planned(pair()), [pair("y.weight")], **options)
    with pytest.raises(ValueError, match="scale 1.5 is not 8"):
        write(path, pair(), alpha=8.0)
    with pytest.raises(ValueError, match="belongs to llama.cpp"):
        write(path, pair(), metadata={"adapter.type": "lora"})
    with pytest.raises(ValueError, match="unknown dtype"):
        write(path, pair(), dtype="q4_0")


def test_values_that_cannot_be_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(UnsupportedFile, match="multiples of 32"):
        write(path, pair(rank=16), dtype="q8_0")
    with pytest.raises(InvalidFile, match="without any tensor"):
        write(path)
    big = pair(scale=1e6)
    with pytest.raises(EdgeLoRAError, match="too large for f16"):
        write(path, big, dtype="f16")
    assert open_lora(write(path, big, dtype="bf16")).alpha == 0
    wrong = pair()
    wrong.lora_a[1, 3] = np.nan
    for dtype in ("f32", "f16", "bf16"):
        with pytest.raises(InvalidFile, match="NaN or infinite"):
            write(path, wrong, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_is_finite_agrees_with_numpy(dtype: type[np.floating]) -> None:
    for value in (0.0, -1.0, 6e-8, 65504.0, math.inf, -math.inf, math.nan):
        array = np.array([[1.0, value], [2.0, 3.0]], dtype=dtype)
        assert is_finite(array) == bool(np.isfinite(array).all())
        assert is_finite(array.T) == is_finite(array)


def raw(path: Path, changes: Callable[[gguf.GGUFWriter], None], **facts: object) -> Path:
    """A file by gguf's writer with one sound pair, so that one thing can be made wrong."""
    settings: dict[str, object] = {"general.type": "adapter", "adapter.type": "lora"}
    settings |= {"adapter.lora.alpha": 8.0} | facts
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
    for key, value in settings.items():
        if value is not None:
            writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.UINT32))
    writer.add_tensor(f"{NAME}.lora_a", np.ones((2, 32), np.float32))
    writer.add_tensor(f"{NAME}.lora_b", np.ones((32, 2), np.float32))
    changes(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def nothing(writer: gguf.GGUFWriter) -> None:
    return None


def adds(name: str, *shape: int, dtype: type[np.generic] = np.float32) -> Callable[..., None]:
    return lambda writer: writer.add_tensor(name, np.ones(shape, dtype))


@pytest.mark.parametrize(
    ("facts", "changes", "message"),
    [
        ({"general.type": "model"}, nothing, "general.type is 'model'"),
        ({"general.type": None}, nothing, "general.type is missing"),
        ({"adapter.type": "control_vector"}, nothing, "adapter.type is 'control_vector'"),
        ({"adapter.type": 3}, nothing, "adapter.type is not of type STRING"),
        ({"adapter.lora.alpha": 8}, nothing, "alpha is not of type FLOAT32"),
        ({"adapter.lora.alpha": math.nan}, nothing, "alpha is nan"),
        ({}, adds("y.weight.lora_a", 2, 32), "y.weight: has only lora_a"),
        ({}, adds("output_norm.weight", 32), "neither .lora_a nor .lora_b"),
        ({}, adds("y.lora_a.weight.lora_a", 2, 32), "neither"),
        ({}, adds("y.weight.lora_a", 2, 32, 1), "not a matrix"),
    ],
)
def test_files_that_llama_cpp_would_crash_on_or_misread(
    tmp_path: Path, facts: dict[str, object], changes: Callable[..., None], message: str
) -> None:
    with pytest.raises(InvalidFile, match=message):
        open_lora(raw(tmp_path / "a.gguf", changes, **facts))


def test_ranks_that_differ_and_types_that_cannot_be_read(tmp_path: Path) -> None:
    def mismatched(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("y.weight.lora_a", np.ones((2, 32), np.float32))
        writer.add_tensor("y.weight.lora_b", np.ones((32, 3), np.float32))

    with pytest.raises(InvalidFile, match="y.weight: .* do not pair"):
        open_lora(raw(tmp_path / "a.gguf", mismatched))

    def integers(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("y.weight.lora_a", np.ones((2, 32), np.int8))
        writer.add_tensor("y.weight.lora_b", np.ones((32, 2), np.float32))

    with pytest.raises(UnsupportedFile, match="y.weight.lora_a: I8"):
        open_lora(raw(tmp_path / "b.gguf", integers))
    with pytest.raises(InvalidFile, match="not a GGUF LoRA"):
        open_lora(pico.write_base(tmp_path / "base.gguf"))


def test_an_activated_lora_is_refused_by_name(tmp_path: Path) -> None:
    def tokens(writer: gguf.GGUFWriter) -> None:
        writer.add_array("adapter.alora.invocation_tokens", [1, 2])

    with pytest.raises(UnsupportedFile, match="aLoRA"):
        open_lora(raw(tmp_path / "a.gguf", tokens))


def test_check_against_a_base(tmp_path: Path) -> None:
    tied = read_base(pico.write_base(tmp_path / "tied.gguf"))
    untied = read_base(pico.write_base(tmp_path / "untied.gguf", tied=False))
    good = open_lora(write(tmp_path / "good.gguf", pair()))
    assert check(good, tied) == check(good, untied) == []
    pairs = [
        pair("blk.9.attn_q.weight"),
        pair("blk.0.attn_k.weight"),
        pair("output_norm.weight"),
        pair("token_embd.weight", n_out=tied.n_vocab),
    ]
    facts = {"edgelora.base.id": "0123456789ab", "edgelora.base.norms": "feed"}
    path = write(tmp_path / "bad.gguf", *pairs, architecture="qwen2", metadata=facts)
    problems = check(open_lora(path), tied)
    wanted = [
        "made for qwen2, the base is llama",
        "made for base 0123456789ab (norms feed), this base is " + tied.identity.id,
        "blk.9.attn_q.weight: the base has no such tensor",
        "blk.0.attn_k.weight: updates 32 x 32, the base has 16 x 32",
        "output_norm.weight: updates 32 x 32, the base has 32",
        "token_embd.weight: the base ties it to its output; llama.cpp would crash",
    ]
    assert [p[: len(w)] for p, w in zip(problems, wanted, strict=True)] == wanted
    embedding = write(tmp_path / "e.gguf", pair("token_embd.weight", n_out=tied.n_vocab))
    assert check(open_lora(embedding), untied) == []


def test_a_position_embedding_is_refused(tmp_path: Path) -> None:
    """llama.cpp loads such a LoRA and never applies it."""
    base = read_base(pico.write_base(tmp_path / "base.gguf", "gpt2"))
    adapter = pair("position_embd.weight", n_out=512)
    lora = open_lora(write(tmp_path / "a.gguf", adapter, architecture="gpt2"))
    (problem,) = check(lora, base)
    assert "does not apply" in problem


def test_nonfinite_values_are_found_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", pair(), pair("blk.1.attn_q.weight"), dtype="f16")
    assert find_nonfinite(open_lora(path)) == []
    offset = open_lora(path).gguf.tensors["blk.1.attn_q.weight.lora_b"].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    (problem,) = find_nonfinite(open_lora(path))
    assert problem.startswith("blk.1.attn_q.weight.lora_b")
