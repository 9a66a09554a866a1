"""Merged files in real llama.cpp: their logits are those of the hot-applied weighted sum."""

from __future__ import annotations

import base64
import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pico
import pytest
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import open_lora, write_lora
from edgelora.adapters.merge import merge_adapters
from edgelora.adapters.provenance import describe_coefficients, read_coefficients
from edgelora.errors import AlreadyExists, EdgeLoRAError, IncompatibleAdapter
from edgelora.files import sha256_of

TOKENS = [3, 17, 200, 41, 5, 99, 260, 7, 150, 33, 12, 81]
PARTS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Bench:
    """A pico base in llama.cpp, without EdgeLoRA's engine."""

    path: Path
    model: Any

    def logits(self, adapters: Sequence[tuple[Path, float]]) -> NDArray[np.float32]:
        """(n_tokens, n_vocab) with these adapters hot; all loaded before the context is made."""
        handles = [
            llama_cpp.llama_adapter_lora_init(self.model, str(p).encode()) for p, _ in adapters
        ]
        assert all(handles)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
        params.type_k = params.type_v = 0  # F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self.model, params)
        n = len(handles)
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * max(n, 1))(*handles)
        scales = (ctypes.c_float * max(n, 1))(*[weight for _, weight in adapters])
        assert llama_cpp.llama_set_adapters_lora(context, pointers, n, scales) == 0
        try:
            return self._decode(context)
        finally:
            llama_cpp.llama_free(context)
            for handle in handles:
                llama_cpp.llama_adapter_lora_free(handle)

    def _decode(self, context: Any) -> NDArray[np.float32]:
        batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
        batch.n_tokens = len(TOKENS)
        for i, token in enumerate(TOKENS):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        shape = (len(TOKENS), llama_cpp.llama_vocab_n_tokens(vocabulary))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape).copy()
        llama_cpp.llama_batch_free(batch)
        return logits


@contextmanager
def bench(path: Path, architecture: str, **options: Any) -> Iterator[Bench]:
    base = pico.write_base(path / f"{architecture}.gguf", architecture, **options)
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), parameters)
    assert model
    try:
        yield Bench(base, model)
    finally:
        llama_cpp.llama_model_free(model)


def three(folder: Path, base: Path) -> list[Path]:
    """Adapters with different ranks, alphas, modules and dtypes."""
    return [
        pico.write_random_lora(folder / "a.gguf", base, rank=4, alpha=8, seed=1, size=0.3),
        pico.write_random_lora(
            folder / "b.gguf", base, rank=6, alpha=None, seed=2, parts=PARTS, size=0.1
        ),
        pico.write_random_lora(
            folder / "c.gguf", base, rank=3, alpha=12, seed=3, layers=[1], dtype="f16", size=0.2
        ),
    ]


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_logits_equal_the_hot_applied_sum(tmp_path: Path, architecture: str, method: str) -> None:
    with bench(tmp_path, architecture) as model:
        adapters = three(tmp_path, model.path)
        weights = [0.7, -0.3, 1.2]
        report = merge_adapters(
            adapters,
            weights,
            tmp_path / "merged.gguf",
            method=method,
            rank=64 if method == "svd" else "auto",
            scale=1.5,
            dtype="f32",
        )
        hot = model.logits([(p, 1.5 * w) for p, w in zip(adapters, weights, strict=True)])
        merged = model.logits([(report.path, 1.0)])
        spread = float(hot.max() - hot.min())
        assert np.abs(merged - hot).max() < 1e-3 * spread
        assert np.abs(model.logits([]) - hot).max() > 0.05 * spread, "the adapters do nothing"
        assert report.error < 1e-6


@pytest.mark.parametrize(("method", "rank"), [("cat", "auto"), ("svd", 4), ("linear", "auto")])
def test_one_hot_coefficients_reproduce_the_adapter(
    tmp_path: Path, method: str, rank: int | str
) -> None:
    with bench(tmp_path, "llama") as model:
        adapters = three(tmp_path, model.path)
        report = merge_adapters(
            adapters, [1, 0, 0], tmp_path / "m.gguf", method=method, rank=rank, dtype="f32"
        )
        source = open_lora(adapters[0])
        merged = open_lora(report.path)
        assert merged.names == source.names
        for pair, wanted in zip(merged.pairs(), source.pairs(), strict=True):
            assert pair.rank == 4
            exact = wanted.scale * (wanted.lora_b @ wanted.lora_a)
            np.testing.assert_allclose(pair.lora_b @ pair.lora_a, exact, atol=2e-6)
        alone, same = model.logits([(adapters[0], 1.0)]), model.logits([(report.path, 1.0)])
        assert np.abs(alone - same).max() < 1e-3 * (alone.max() - alone.min())


def test_an_embedding_lora_keeps_llama_cpps_flipped_factors(tmp_path: Path) -> None:
    """token_embd on a base with its own output: merged as the sum."""
    with bench(tmp_path, "llama", tied=False) as model:
        parts = ("token_embd", "output", "attn_q")
        adapters = [
            pico.write_random_lora(tmp_path / f"{s}.gguf", model.path, parts=parts, seed=s)
            for s in (1, 2)
        ]
        report = merge_adapters(
            adapters, [0.5, 0.5], tmp_path / "m.gguf", method="cat", dtype="f32"
        )
        hot = model.logits([(adapter, 0.5) for adapter in adapters])
        merged = model.logits([(report.path, 1.0)])
        assert "token_embd.weight" in open_lora(report.path).names
        assert np.abs(merged - hot).max() < 1e-3 * (hot.max() - hot.min())
        assert np.abs(model.logits([]) - hot).max() > 0.05 * (hot.max() - hot.min())


def named(folder: Path, base: Path, name: str, **more: str) -> Path:
    facts = {"edgelora.name": name, "edgelora.base.id": "0123456789ab"}
    facts |= {f"edgelora.{key.replace('__', '.')}": text for key, text in more.items()}
    seed = sum(name.encode())
    return pico.write_random_lora(folder / f"{name}.gguf", base, seed=seed, metadata=dict(facts))


def test_the_file_says_where_it_came_from_and_is_repeatable(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    first = named(tmp_path, base, "one", licence="mit", source="s1", template="chat")
    second = named(tmp_path, base, "two", licence="apache-2.0", template="Q: {prompt}")
    unused = named(tmp_path, base, "three")
    made = [
        merge_adapters(
            [first, second, unused],
            [0.25, -0.5, 0.0],
            tmp_path / name,
            rank=2,
            metadata={"edgelora.description": "for tickets"},
            provenance={"distance": "js", "seed": 7},
        )
        for name in ("x.gguf", "y.gguf")
    ]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    facts = open_lora(made[0].path).metadata
    assert facts["edgelora.name"] == "two+one"
    assert facts["edgelora.licence"] == "apache-2.0; mit"
    assert facts["edgelora.template"] == "Q: {prompt}"
    assert facts["edgelora.base.id"] == "0123456789ab"
    assert facts["edgelora.description"] == "for tickets"
    told = json.loads(str(facts["edgelora.provenance"]))
    assert told["sources"][0] == {
        "name": "one", "sha256": sha256_of(first), "licence": "mit", "source": "s1",
        "coefficient": 0.25,
    }  # fmt: skip
    assert [source["name"] for source in told["sources"]] == ["one", "two"]
    assert (told["distance"], told["seed"], told["method"], told["rank"]) == ("js", 7, "svd", 2)
    assert told["error"] == pytest.approx(made[0].error, rel=1e-5)
    assert told["tensors"]["blk.0.attn_q.weight"]["rank"] == 2
    (warning,) = made[0].warnings
    assert "2 different prompt templates" in warning
    assert made[0].energy == pytest.approx(1 - made[0].error ** 2)


def test_weights_for_each_tensor_reach_the_file(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    files = [named(tmp_path, base, name) for name in ("one", "two", "three")]
    names = open_lora(files[0]).names
    rows = {name: [1.0, 0.1 * i, 0.0] for i, name in enumerate(names)}
    report = merge_adapters(files, rows, tmp_path / "m.gguf", method="cat", dtype="f32")
    told = json.loads(str(report.record.metadata["edgelora.provenance"]))
    first, second = told["sources"]
    assert first["coefficient"] == 1.0 and "coefficients" not in first  # the same everywhere
    mean = 0.1 * (len(names) - 1) / 2
    assert second["coefficient"] == pytest.approx(mean, rel=1e-5)
    assert len(second["coefficients"]) < 3 * len(names) + 4
    (by_tensor,) = read_coefficients(told).values()
    assert by_tensor == pytest.approx({n: 0.1 * i for i, n in enumerate(names)}, rel=1e-3)
    one, two = open_lora(files[0]), open_lora(files[1])
    for i, pair in enumerate(open_lora(report.path).pairs()):
        dense = [
            p.scale * (p.lora_b @ p.lora_a) for p in (one.pair(pair.name), two.pair(pair.name))
        ]
        np.testing.assert_allclose(
            pair.lora_b @ pair.lora_a, dense[0] + 0.1 * i * dense[1], atol=1e-5
        )


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_weights_for_each_component_reach_the_file(tmp_path: Path, method: str) -> None:
    """Adapters of ranks 2 and 3: the matrix of coefficients is padded."""
    base = pico.write_base(tmp_path / "base.gguf")
    files = [
        pico.write_random_lora(tmp_path / f"{rank}.gguf", base, rank=rank, seed=rank)
        for rank in (2, 3)
    ]
    names = open_lora(files[0]).names
    drawn = np.random.default_rng(0).normal(size=(len(names), 2, 3)).astype(np.float16)
    rows = dict(zip(names, drawn.astype(float), strict=True))
    report = merge_adapters(files, rows, tmp_path / "m.gguf", method=method, dtype="f32")
    for pair in open_lora(report.path).pairs():
        dense = sum(
            p.scale * (p.lora_b * rows[pair.name][i, : p.rank]) @ p.lora_a
            for i, p in enumerate(open_lora(file).pair(pair.name) for file in files)
        )
        made = pair.scale * pair.lora_b @ pair.lora_a
        tolerance = 1e-5 if method == "cat" else 0.2  # 99 % of the energy
        assert np.linalg.norm(made - dense) < tolerance * np.linalg.norm(dense)
    told = json.loads(str(report.record.metadata["edgelora.provenance"]))
    first, second = read_coefficients(told).values()
    for i, name in enumerate(told["tensors"]):
        assert first[name] == rows[name][0, :2].tolist(), i
        assert second[name] == rows[name][1].tolist()
    means = [source["coefficient"] for source in told["sources"]]
    assert means == pytest.approx([drawn[:, 0, :2].mean(), drawn[:, 1].mean()], abs=1e-3)


def test_unusable_matrices_of_coefficients_are_refused(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    file = pico.write_random_lora(tmp_path / "a.gguf", base, rank=3)
    names = open_lora(file).names
    for shape in ((1, 2), (1, 3, 1)):
        rows = {name: np.ones(shape) for name in names}
        with pytest.raises(EdgeLoRAError) as caught:
            merge_adapters([file], rows, tmp_path / "m.gguf")
        assert f"{names[0]}: coefficients of shape {shape}" in str(caught.value)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_weights_for_each_tensor_equal_hot_applied_parts(tmp_path: Path, method: str) -> None:
    """Each adapter is cut into files of one tensor, which llama.cpp applies at their own scale."""
    with bench(tmp_path, "llama") as model:
        adapters = [open_lora(path) for path in three(tmp_path, model.path)]
        names = list(dict.fromkeys(name for file in adapters for name in file.names))
        drawn = np.random.default_rng(0).normal(0.3, 0.5, (len(names), 3)).round(3)
        rows = {name: row.tolist() for name, row in zip(names, drawn, strict=True)}
        report = merge_adapters(
            adapters, rows, tmp_path / "merged.gguf", method=method,
            rank=64 if method == "svd" else "auto", dtype="f32",
        )  # fmt: skip
        parts = []
        for i, file in enumerate(adapters):
            for name in file.names:
                path = tmp_path / f"{i}-{name}.gguf"
                write_lora(
                    path, [file.plan[name]], [file.pair(name)], architecture="llama", alpha=None,
                    dtype="f32",
                )  # fmt: skip
                parts.append((path, rows[name][i]))
        hot = model.logits(parts)
        merged = model.logits([(report.path, 1.0)])
        assert np.abs(merged - hot).max() < 1e-3 * (hot.max() - hot.min())
        means = [(file.path, float(drawn[:, i].mean())) for i, file in enumerate(adapters)]
        assert np.abs(model.logits(means) - hot).max() > 0.05 * (hot.max() - hot.min())


@pytest.mark.parametrize(
    "damage", ["x", "AAAA", "****", base64.b64encode(b"\x00\x7c" * 2).decode(), 7, None]
)
def test_coefficients_that_cannot_be_read_are_left_out(damage: object) -> None:
    """Cut, not base64, infinite, not a text: a file of a stranger may hold anything."""
    tensors = {"a": {}, "b": {}}
    sources = [{"name": "x", "coefficients": damage}, "no source"]
    assert read_coefficients({"tensors": tensors, "sources": sources}) == {}
    assert read_coefficients({"tensors": [], "sources": sources}) == {}
    assert read_coefficients({}) == {}


def test_a_coefficient_beyond_float16_is_kept_as_its_largest() -> None:
    told = describe_coefficients([1e9, 0.5], ["a", "b"], {"a": 1, "b": 1})
    read = read_coefficients({"tensors": {"a": {}, "b": {}}, "sources": [{"name": "x"} | told]})
    assert read == {"x": {"a": 65504.0, "b": 0.5}}


def test_bad_merges_leave_nothing(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    other = pico.write_base(tmp_path / "other.gguf", "qwen2")
    one, two = named(tmp_path, base, "one"), named(tmp_path, base, "two")
    stranger = named(tmp_path, base, "stranger", base__id="ffffffffffff")
    foreign = pico.write_random_lora(tmp_path / "foreign.gguf", other)
    huge = pico.write_random_lora(tmp_path / "huge.gguf", base, size=3e5)
    out = tmp_path / "out.gguf"
    before = set(tmp_path.iterdir())
    with pytest.raises(IncompatibleAdapter, match="different bases") as caught:
        merge_adapters([one, stranger], [1, 1], out)
    assert "0123456789ab" in str(caught.value) and "ffffffffffff" in str(caught.value)
    with pytest.raises(IncompatibleAdapter, match="different architectures"):
        merge_adapters([one, foreign], [1, 1], out)
    with pytest.raises(EdgeLoRAError, match="every coefficient is zero"):
        merge_adapters([one, two], [0, 0], out)
    with pytest.raises(EdgeLoRAError, match="2 adapters need"):
        merge_adapters([one, two], [1], out)
    with pytest.raises(EdgeLoRAError, match="too large for f16"):
        merge_adapters([huge], [1], out, method="cat")
    with pytest.raises(ValueError, match="records method already"):
        merge_adapters([one], [1], out, provenance={"method": "mine"})
    assert set(tmp_path.iterdir()) == before
    merge_adapters([one], [1], out)
    with pytest.raises(AlreadyExists):
        merge_adapters([one], [1], out)
