"""The allow-list: names both ways, and the permutation by hand."""

from __future__ import annotations

import numpy as np
import pico
import pytest

from edgelora.adapters.architectures import (
    ARCHITECTURES,
    interleave_rows,
    module_of,
    n_permuted_heads,
    separate_rows,
    tensor_of,
)


def test_the_list_itself() -> None:
    assert set(ARCHITECTURES) == set(pico.ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_module_of_a_model_has_its_tensor_and_back(name: str) -> None:
    architecture = ARCHITECTURES[name]
    dims = pico.dims_of(name)
    shapes = pico.base_shapes(name, dims, 100, tied=False)
    for path, shape in pico.peft_modules(name).items():
        tensor = tensor_of(path.format(1), architecture)
        assert tensor is not None
        assert shapes[tensor] == shape
        assert module_of(tensor, architecture) == path.format(1)
    for module in ("lm_head", "transformer.wte" if name == "gpt2" else "model.embed_tokens"):
        tensor = tensor_of(module, architecture)
        assert tensor is not None
        assert module_of(tensor, architecture) == module


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1",
        "model.layers.0.mlp.experts.3.up_proj",
        "model.layers.x.self_attn.q_proj",
        "model.layers.01.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.inner",
        "vision_tower.layers.0.self_attn.q_proj",
        "score",
        "",
    ],
)
def test_nothing_is_guessed(module: str) -> None:
    assert tensor_of(module, ARCHITECTURES["llama"]) is None


def test_names_without_a_trunk_and_mlxs_trunk() -> None:
    assert tensor_of("layers.2.mlp.up_proj", ARCHITECTURES["qwen2"]) == "blk.2.ffn_up.weight"
    assert tensor_of("model.h.2.mlp.c_fc", ARCHITECTURES["gpt2"]) == "blk.2.ffn_up.weight"
    assert module_of("position_embd.weight", ARCHITECTURES["gpt2"]) is None


def test_rows_of_two_heads_by_hand() -> None:
    rows = np.arange(8.0)[:, None]  # head 0: halves 0 1 | 2 3, head 1: halves 4 5 | 6 7
    assert interleave_rows(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert separate_rows(interleave_rows(rows, 2), 2).ravel().tolist() == list(range(8))


def test_only_llamas_q_and_k_are_permuted() -> None:
    def heads(tensor: str, name: str) -> int | None:
        return n_permuted_heads(tensor, ARCHITECTURES[name], 4, 2)

    assert heads("blk.0.attn_q.weight", "llama") == 4
    assert heads("blk.0.attn_k.weight", "llama") == 2
    assert heads("blk.0.attn_v.weight", "llama") is None
    assert all(
        heads("blk.0.attn_q.weight", name) is None for name in ARCHITECTURES if name != "llama"
    )
