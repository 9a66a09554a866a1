"""LoGo and Arrow: by hand, beside dense B A x and LAPACK's vectors, and on real forward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pico
import pytest
from gradient_cases import adapters, examples, write_kind
from numpy.typing import NDArray

from edgelora.adapters.gguf_lora import LoraFile, open_lora
from edgelora.errors import EdgeLoRAError, UnsupportedFile
from edgelora.gradient.activations import logo_tensor, prompts_of, weigh_adapters
from edgelora.gradient.decoder import Decoder, PassOptions, open_decoder
from edgelora.gradient.packing import Pack
from edgelora.operators.activations import arrow, logo, top_direction, update_norms

RNG = np.random.default_rng(0)
UNSHARED = PassOptions(share=False)


def test_logo_by_hand() -> None:
    """Two prompts: (3, 1, .5) keeps the first two, 3:1; (0, 2, 6) the last two, 1:3."""
    found = logo([[3.0, 0.0], [1.0, 2.0], [0.5, 6.0]], count=2)
    assert found == pytest.approx([0.375, 0.25, 0.375])
    assert logo([[3.0], [1.0]]) == pytest.approx([0.75, 0.25])  # fewer adapters than 20


def test_arrow_by_hand() -> None:
    """softmax(ln 3, 0) is (3/4, 1/4) whatever the signs; the other token counts three times."""
    projections = [[-np.log(3.0), 0.0], [0.0, np.log(3.0)], [0.0, 0.0]]
    assert arrow(projections, [1.0, 3.0], count=2) == pytest.approx(
        [(0.75 + 3 * 0.25) / 4, (0.25 + 3 * 0.75) / 4, 0.0]
    )
    sharper = arrow(projections, [1.0, 0.0], count=2, temperature=0.5)
    assert sharper == pytest.approx([0.9, 0.1, 0.0])
    assert arrow(projections, [1.0, 1.0], count=1) == pytest.approx([0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("shape", "rank"), [((7, 12), 3), ((12, 7), 4), ((5, 5), 1), ((3, 20), 8), ((20, 3), 8)]
)
def test_norms_and_directions_beside_the_dense_product(shape: tuple[int, int], rank: int) -> None:
    n_out, n_in = shape
    a, b = RNG.standard_normal((rank, n_in)), RNG.standard_normal((n_out, rank))
    x = RNG.standard_normal((6, n_in))
    dense = -1.5 * b @ a
    assert update_norms(x, a, b, -1.5) == pytest.approx(np.linalg.norm(x @ dense.T, axis=1))
    _, _, vt = np.linalg.svd(dense)
    assert abs(top_direction(a, b) @ vt[0]) == pytest.approx(1.0, abs=1e-9)


def test_an_adapter_that_does_nothing_has_no_direction() -> None:
    a, b = RNG.standard_normal((2, 5)), np.zeros((4, 2))
    assert not top_direction(a, b).any() and not update_norms(a, a, b, 1.0).any()
    with pytest.raises(ValueError, match="no adapter does anything"):
        logo(np.zeros((2, 1)))


def test_wrong_numbers_are_refused() -> None:
    for bad in (np.zeros((0, 1)), np.ones(3), [[np.nan]], [[-1.0]]):
        with pytest.raises(ValueError):
            logo(bad)
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(ValueError, match="token weights"):
            arrow(np.ones((2, 2)), weights)
    with pytest.raises(ValueError, match="count"):
        logo([[1.0]], count=0)


@pytest.fixture(scope="module", params=["mistral", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind(request.param, tmp_path_factory.mktemp("kind"))


def seen(
    decoder: Decoder, prompts: list, options: PassOptions = UNSHARED
) -> dict[str, NDArray[np.floating]]:
    """Inputs of every matrix, each text computed whole."""
    found: dict[str, list] = {}

    def watch(pack: Pack, name: str, x: NDArray[np.floating]) -> None:
        found.setdefault(name, []).append(x.copy())

    decoder.watch(prompts, {}, watch, options)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_a_watcher_sees_what_a_backward_pass_sees(model: Path) -> None:
    decoder = open_decoder(model, np.float64)
    backward: dict[str, NDArray[np.floating]] = {}
    decoder.gradients(examples(), {}, lambda n, x, g: backward.update({n: x}), UNSHARED)
    forward = seen(decoder, examples())
    assert set(forward) == {name for name in backward if name.startswith("blk.")}
    for name, x in forward.items():
        assert x == pytest.approx(backward[name], abs=1e-12), name


@pytest.mark.parametrize("options", [None, UNSHARED, PassOptions(max_tokens=20)])
def test_logo_is_the_norm_at_the_last_token(model: Path, options: PassOptions | None) -> None:
    decoder, files = open_decoder(model, np.float64), adapters(model)
    prompts = prompts_of(examples())
    found = weigh_adapters(decoder, files, prompts, "logo", passes=options)
    name = "blk.1.attn_q.weight"
    assert logo_tensor(files) == name and len({tuple(row) for row in found.values()}) == 1
    last = np.cumsum([len(p.prompt) for p in prompts]) - 1
    x = seen(decoder, prompts)[name][last]
    norms = np.array([np.linalg.norm(x @ dense(file, name).T, axis=1) for file in files])
    assert found[name] == pytest.approx((norms / norms.sum(axis=0)).mean(axis=1))


@pytest.mark.parametrize("options", [None, UNSHARED, PassOptions(max_tokens=20)])
def test_arrow_is_the_mean_over_the_tokens_of_all_prompts(
    model: Path, options: PassOptions | None
) -> None:
    decoder, files = open_decoder(model, np.float64), adapters(model, n=5)
    prompts = prompts_of(examples())
    found = weigh_adapters(decoder, files, prompts, "arrow", passes=options)
    for name, x in seen(decoder, prompts).items():
        tops = np.array([np.linalg.svd(dense(file, name))[2][0] for file in files])
        logits = np.abs(x @ tops.T)
        logits[logits < np.sort(logits, axis=1)[:, [-3]]] = -np.inf
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert found[name] == pytest.approx(shares.mean(axis=0), abs=1e-6), name


def dense(file: LoraFile, name: str) -> NDArray[np.float64]:
    pair = file.pair(name)
    b, a = np.asarray(pair.lora_b, np.float64), np.asarray(pair.lora_a, np.float64)
    return pair.scale * b @ a


def lora(base: Path, name: str, parts: tuple[str, ...], layers: tuple[int, ...]) -> LoraFile:
    path = base.with_name(f"{base.stem}-{name}.gguf")
    return open_lora(pico.write_random_lora(path, base, parts=parts, layers=layers))


def test_adapters_of_different_matrices(model: Path) -> None:
    """LoGo falls back to what all of them update; Arrow routes among those that update a matrix."""
    first = lora(model, "qv", ("attn_q", "attn_v"), (0, 1))
    second = lora(model, "v", ("attn_v",), (0,))
    assert logo_tensor([first, second]) == "blk.0.attn_v.weight"
    decoder, prompts = open_decoder(model), prompts_of(examples())
    found = weigh_adapters(decoder, [first, second], prompts, "arrow")
    assert found["blk.1.attn_v.weight"] == pytest.approx([1.0, 0.0])
    assert found["blk.0.attn_v.weight"].min() > 0
    third = lora(model, "up", ("ffn_up",), (1,))
    with pytest.raises(EdgeLoRAError, match="none in common"):
        weigh_adapters(decoder, [first, third], prompts, "logo")


def test_directions_that_are_not_kept_are_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, files, prompts = open_decoder(model), adapters(model), prompts_of(examples())
    few = PassOptions(max_tokens=20)
    kept = weigh_adapters(decoder, files, prompts, "arrow", passes=few)
    monkeypatch.setattr("edgelora.gradient.activations._KEPT_BYTES", 0)
    again = weigh_adapters(decoder, files, prompts, "arrow", passes=few)
    assert all(kept[name] == pytest.approx(again[name], abs=0) for name in kept)


def test_an_adapter_of_the_embeddings_is_refused(tmp_path: Path) -> None:
    base = write_kind("mistral", tmp_path)
    path = pico.write_random_lora(tmp_path / "e.gguf", base, parts=("token_embd",))
    with pytest.raises(UnsupportedFile, match="token_embd"):
        weigh_adapters(open_decoder(base), [open_lora(path)], prompts_of(examples()), "logo")
