"""Whole models in numpy: logits and slopes of llama.cpp, finite differences, packing, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_logits
import numpy as np
import pico
import pytest
from gradient_cases import (
    KINDS,
    adapters,
    alter,
    coefficient_gradients,
    examples,
    relative,
    slope,
    write_kind,
)

from edgelora.adapters.gguf_lora import LoraFile, PairPlan, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.engine.context import open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.score import TokenisedExample, mean_loss, score
from edgelora.errors import (
    EdgeLoRAError,
    IncompatibleAdapter,
    InvalidFile,
    UnsupportedFile,
)
from edgelora.gradient import layers, weights
from edgelora.gradient.block import Activations, Block
from edgelora.gradient.decoder import Decoder, PassOptions, open_decoder
from edgelora.gradient.observers import (
    CoefficientGradients,
    FactorGradients,
    per_adapter,
    per_layer,
)
from edgelora.gradient.updates import Combined, Updates, of_adapter, refuse_misfits
from edgelora.gradient.weights import Array


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind(request.param, tmp_path_factory.mktemp("kind"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kind("mistral", tmp_path_factory.mktemp("mistral"))


def point(files: list[LoraFile], dtype: type = np.float64) -> Combined:
    """A combination with other coefficients in every tensor, zeros among them."""
    names = CoefficientGradients(files).names
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal(len(files)).round(1).tolist() for name in names}
    rows[names[0]] = [0.0] * len(files)
    return Combined(files, rows, dtype)


def moved(at: Combined, name: str, index: int, step: float) -> Combined:
    rows = {key: list(row) for key, row in at.coefficients.items()}
    rows[name][index] += step
    return Combined(at.adapters, rows, np.float64)


def loss(decoder: Decoder, updates: Updates) -> float:
    return mean_loss(decoder.losses(examples(), updates))


def to_float64(pair: LoraPair) -> LoraPair:
    return replace(pair, lora_a=pair.lora_a.astype(float), lora_b=pair.lora_b.astype(float))


def shifted(pair: LoraPair, which: int, step: np.ndarray) -> LoraPair:
    """The pair with a step added to A (0) or B (1)."""
    if which:
        return replace(pair, lora_b=pair.lora_b + step)
    return replace(pair, lora_a=pair.lora_a + step)


def test_logits_are_those_of_llama_cpp(model: Path) -> None:
    ids = np.random.default_rng(0).integers(5, 300, 40).tolist()
    (adapter,) = adapters(model, 1)
    decoder = open_decoder(model)
    for updates, path in (({}, None), (of_adapter(adapter), adapter.path)):
        expected = llama_logits.logits(model, ids, path)
        found = decoder.logits(ids, updates)
        assert abs(found - expected).max() < 1e-5 * np.ptp(expected)


def test_losses_are_those_of_llama_cpp(mistral: Path) -> None:
    files = adapters(mistral)
    weights = [0.5, -0.3, 0.8]
    with (
        open_model(mistral, ModelOptions(n_threads=1)) as model,
        open_context(model, exact=True) as context,
    ):
        context.apply([WeightedAdapter(f.path, w) for f, w in zip(files, weights, strict=True)])
        expected = score(context, examples())
    names = CoefficientGradients(files).names
    found = open_decoder(mistral).losses(examples(), Combined(files, dict.fromkeys(names, weights)))
    assert [s.nll for s in found] == pytest.approx([s.nll for s in expected], rel=1e-5)
    assert [s.n_tokens for s in found] == [s.n_tokens for s in expected]


def test_a_slope_is_that_of_llama_cpp(mistral: Path) -> None:
    """One weight for a whole adapter, whose central difference llama.cpp can measure."""
    files = adapters(mistral, size=0.05)
    predicted = per_adapter(coefficient_gradients(open_decoder(mistral), files, {}))
    with (
        open_model(mistral, ModelOptions(n_threads=1)) as model,
        open_context(model, exact=True) as context,
    ):

        def measured(weight: float, file: LoraFile) -> float:
            context.apply([WeightedAdapter(file.path, weight)])
            return mean_loss(score(context, examples()))

        slopes = [slope(lambda w, f=f: measured(w, f), 0.03) for f in files]
    assert predicted == pytest.approx(slopes, rel=2e-3)


def test_coefficients_against_finite_differences(model: Path) -> None:
    decoder = open_decoder(model, np.float64)
    files = adapters(model)
    at = point(files)
    gradients = coefficient_gradients(decoder, files, at)
    names = CoefficientGradients(files).names
    assert names[-1].startswith("blk.1.")
    for column in range(0, len(names), 3):
        for index in range(len(files)):
            expected = slope(lambda t, c=column, i=index: loss(decoder, moved(at, names[c], i, t)))
            assert gradients[index, column] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_factors_against_finite_differences(model: Path) -> None:
    decoder = open_decoder(model, np.float64)
    (file,) = adapters(model, 1)
    pairs = {pair.name: to_float64(pair) for pair in file.pairs()}
    gradients = FactorGradients(pairs)
    decoder.gradients(examples(), pairs, gradients)
    assert gradients.values.keys() == pairs.keys()
    rng = np.random.default_rng(0)
    for name in list(pairs)[::3]:
        for which, gradient in enumerate(gradients.values[name]):
            direction = rng.standard_normal(gradient.shape)
            expected = slope(
                lambda t, n=name, w=which, d=direction: loss(
                    decoder, pairs | {n: shifted(pairs[n], w, t * d)}
                )
            )
            found = float((gradient * direction).sum())
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("start", ["zero", "trained"])
def test_float32_is_float64(model: Path, start: str) -> None:
    files = adapters(model)
    found, expected = (
        coefficient_gradients(
            open_decoder(model, dtype), files, point(files, dtype) if start == "trained" else {}
        )
        for dtype in (np.float32, np.float64)
    )
    for index in range(len(files)):
        assert relative(found[index], expected[index]) < 2e-5


@pytest.mark.parametrize(
    "options",
    [
        PassOptions(share=False),
        PassOptions(max_tokens=40),
        PassOptions(max_tokens=1, share=False),
        PassOptions(scratch=Path()),
        PassOptions(keep_bytes=1 << 30, max_tokens=40),
    ],
    ids=["unshared", "two packs", "one example at a time", "inputs in a file", "activations kept"],
)
def test_the_way_a_pass_is_run_changes_nothing(
    mistral: Path, options: PassOptions, tmp_path: Path
) -> None:
    if options.scratch:
        options = replace(options, scratch=tmp_path)
    decoder = open_decoder(mistral, np.float64)
    files = adapters(mistral)
    expected = coefficient_gradients(decoder, files, point(files))
    found = coefficient_gradients(decoder, files, point(files), options)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert not list(tmp_path.iterdir())
    scores = decoder.losses(examples(), point(files), options)
    assert mean_loss(scores) == pytest.approx(loss(decoder, point(files)), rel=1e-12)


def test_only_activations_that_were_not_kept_are_computed_again(
    mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    activations = Block.activations

    def counted(block: Block, x: Array) -> Activations:
        found = activations(block, x)
        made.append(found.nbytes)
        return found

    monkeypatch.setattr(Block, "activations", counted)
    decoder, files = open_decoder(mistral, np.float64), adapters(mistral)
    expected = coefficient_gradients(decoder, files, point(files))
    n_layer, size = decoder.model.n_layer, made[0]
    assert len(made) == 2 * n_layer and set(made) == {size}
    for keep_bytes, n_kept in ((size - 1, 0), (size, 1), (n_layer * size, n_layer)):
        made.clear()
        options = PassOptions(keep_bytes=keep_bytes)
        found = coefficient_gradients(decoder, files, point(files), options)
        assert len(made) == 2 * n_layer - n_kept
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_sharing_saves_rows(mistral: Path) -> None:
    decoder, texts = open_decoder(mistral), examples(n_shared=10)
    whole = sum(text.n_tokens - 1 for text in texts)
    assert decoder.count_rows(texts, PassOptions(share=False)) == whole
    assert decoder.count_rows(texts, PassOptions()) == whole - 2 * 10


def test_small_tiles_stacks_and_threads_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_WORTH_THREADS", 1)
    base = pico.write_base(tmp_path / "q.gguf", tied=False, dtype="Q8_0")
    files = adapters(base)
    expected = coefficient_gradients(open_decoder(base, np.float64), files, point(files))
    decoder = open_decoder(base, np.float64, n_threads=3)
    for tile in (1, 32 * 5, 32 * 70):
        decoder.weights._tile = tile
        gradients = CoefficientGradients(files, stacked_rank=5)
        decoder.gradients(examples(), point(files), gradients)
        assert gradients.values == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_groups_of_adapters_share_their_memory_in_float32(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "q.gguf", tied=False, dtype="Q8_0")
    files = adapters(base)
    expected = coefficient_gradients(open_decoder(base, np.float64), files, point(files))
    gradients = CoefficientGradients(files, stacked_rank=5)
    open_decoder(base).gradients(examples(), point(files), gradients)
    assert np.linalg.norm(gradients.values - expected) < 2e-5 * np.linalg.norm(expected)


def test_coefficients_for_layers_and_adapters_are_sums(mistral: Path) -> None:
    decoder, files = open_decoder(mistral, np.float64), adapters(mistral)
    names = CoefficientGradients(files).names
    at = Combined(files, dict.fromkeys(names, [0.3, 0.0, -0.2]), np.float64)
    values = coefficient_gradients(decoder, files, at)
    assert per_layer(values, names).shape == (3, 3)  # two blocks and the output

    def along(step: float, layer: str) -> float:
        rows = {n: [0.3, step * n.startswith(layer), -0.2] for n in names}
        return loss(decoder, Combined(files, rows, np.float64))

    assert per_adapter(values)[1] == pytest.approx(slope(lambda t: along(t, "")), rel=1e-6)
    second = slope(lambda t: along(t, "blk.1."))
    assert per_layer(values, names)[1, 1] == pytest.approx(second, rel=1e-6)


def test_slopes_of_components_are_those_of_adapters_of_rank_one(mistral: Path) -> None:
    """Adapters of ranks 2, 3 and 2 beside their seven parts, each a file of its own."""
    files = adapters(mistral, 2)
    path = mistral.with_name("narrow.gguf")
    pico.write_random_lora(path, mistral, rank=2, seed=9)
    files.append(open_lora(path))
    decoder = open_decoder(mistral, np.float64)
    at = of_adapter(files[0])
    found = CoefficientGradients(files)
    decoder.gradients(examples(), at, found)
    ranks = [max(file.ranks.values()) for file in files]
    parts = [part(file, r) for file, n in zip(files, ranks, strict=True) for r in range(n)]
    alone = CoefficientGradients(parts)
    decoder.gradients(examples(), at, alone)
    assert found.components.shape == (3, len(found.names), 3) and ranks == [2, 3, 2]
    owners = [(i, r) for i, n in enumerate(ranks) for r in range(n)]
    for row, (i, r) in zip(alone.values, owners, strict=True):
        assert found.components[i, :, r] == pytest.approx(row, rel=1e-5, abs=1e-12)
    assert not found.components[[0, 2], :, 2:].any()


def part(file: LoraFile, r: int) -> LoraFile:
    """The r-th rank-one component of every update."""
    path = file.path.with_name(f"{file.path.stem}-{r}.gguf")
    pairs = [
        LoraPair(pair.name, pair.lora_a[r : r + 1], pair.lora_b[:, r : r + 1], pair.scale)
        for pair in file.pairs()
    ]
    plan = [PairPlan(p.name, 1, p.lora_a.shape[1], p.lora_b.shape[0]) for p in pairs]
    write_lora(path, plan, pairs, architecture=file.architecture, alpha=None, dtype="f32")
    return open_lora(path)


def test_an_adapter_without_some_tensors_has_no_gradient_there(mistral: Path) -> None:
    files = adapters(mistral, 2)
    path = mistral.with_name("partial.gguf")
    pico.write_random_lora(path, mistral, layers=(1,), parts=("attn_q",))
    files.append(open_lora(path))
    gradients = CoefficientGradients(files)
    open_decoder(mistral).gradients(examples(), {}, gradients)
    assert np.flatnonzero(gradients.values[2]).tolist() == [
        gradients.names.index("blk.1.attn_q.weight")
    ]


def test_entropy_of_the_first_token(mistral: Path) -> None:
    """The label-free objective: every example says one token, whichever."""
    decoder, files = open_decoder(mistral, np.float64), adapters(mistral, 1)
    texts = [TokenisedExample(text.prompt, (0,)) for text in examples()]
    options = PassOptions(objective=layers.entropy)
    gradients = CoefficientGradients(files)
    scores = decoder.gradients(texts, {}, gradients, options)
    z = decoder.logits(texts[1].prompt, {})[-1]
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    assert scores[1].nll == pytest.approx(-(p * np.log(p)).sum())

    def along(step: float) -> float:
        rows = dict.fromkeys(gradients.names, [step])
        return mean_loss(decoder.losses(texts, Combined(files, rows, np.float64), options))

    assert per_adapter(gradients.values)[0] == pytest.approx(slope(along), rel=1e-6)


def test_progress_counts_three_for_each_block(mistral: Path) -> None:
    steps: list[int] = []
    decoder = open_decoder(mistral)
    decoder.gradients(examples(), {}, lambda name, x, g: None, progress=steps.append)
    assert sum(steps) == 3 * decoder.model.n_layer


def test_rope_factors_and_linear_scaling(mistral: Path, tmp_path: Path) -> None:
    """Llama 3.1's rope_freqs.weight and positions that are divided, as llama.cpp has them."""
    path = alter(
        mistral,
        tmp_path / "scaled.gguf",
        keys={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        tensors={"rope_freqs.weight": np.linspace(1, 8, 4, dtype=np.float32)},
    )
    ids = np.random.default_rng(0).integers(5, 300, 40).tolist()
    expected = llama_logits.logits(path, ids)
    assert abs(open_decoder(path).logits(ids, {}) - expected).max() < 1e-5 * np.ptp(expected)
    assert abs(llama_logits.logits(mistral, ids) - expected).max() > 0.1


@pytest.mark.parametrize("architecture", ["gemma", "phi3", "gpt2"])
def test_other_architectures_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "b.gguf", architecture)
    with pytest.raises(UnsupportedFile, match=f"gradients of {architecture} are not known"):
        open_decoder(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope.scaling.type": "yarn"}, "scaling of the kind yarn"),
        ({"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor is 2.0"),
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"rope.dimension_count": 4}, "a part of each head only"),
        ({"rope.freq_base": "x"}, "llama.rope.freq_base is 'x', expected a number"),
    ],
)
def test_other_graphs_are_refused_by_name(
    mistral: Path, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    named = {f"llama.{key}": value for key, value in keys.items()}
    path = alter(mistral, tmp_path / "b.gguf", keys=named)
    with pytest.raises(UnsupportedFile, match=words):
        open_decoder(path)


def test_unknown_tensors_are_refused_by_name(mistral: Path, tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((8, 32), np.float32)}
    path = alter(mistral, tmp_path / "b.gguf", tensors=extra)
    with pytest.raises(UnsupportedFile, match="the tensor blk.0.ffn_gate_inp.weight"):
        open_decoder(path)


def test_a_wrong_shape_is_refused(mistral: Path, tmp_path: Path) -> None:
    bad = {"blk.1.ffn_down.weight": np.zeros((31, 64), np.float32)}
    path = alter(mistral, tmp_path / "b.gguf", tensors=bad)
    with pytest.raises(InvalidFile, match=r"blk.1.ffn_down.weight has shape \(31, 64\)"):
        open_decoder(path)


def test_texts_longer_than_a_sliding_window_are_refused(mistral: Path, tmp_path: Path) -> None:
    """Within the window attention is whole, as llama.cpp computes it."""
    path = alter(mistral, tmp_path / "b.gguf", keys={"llama.attention.sliding_window": 20})
    decoder = open_decoder(path)
    decoder.losses([TokenisedExample((5,) * 10, (6,) * 10)], {})
    with pytest.raises(EdgeLoRAError, match="line 3: 21 tokens, at most 20 are exact"):
        decoder.losses([TokenisedExample((5,) * 10, (6,) * 11, 3)], {})


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (TokenisedExample((), (1,), 7), "line 7: an empty prompt"),
        (TokenisedExample((1,), (), 7), "no completion"),
        (TokenisedExample((1, -1), (1,), 7), "line 7: a token outside"),
        (TokenisedExample((1,), (10**6,), 7), "line 7: a token outside"),
    ],
)
def test_unusable_examples_are_named(mistral: Path, example: TokenisedExample, words: str) -> None:
    with pytest.raises(EdgeLoRAError, match=words):
        open_decoder(mistral).losses([*examples(1), example], {})


def test_no_examples_is_an_error(mistral: Path) -> None:
    with pytest.raises(EdgeLoRAError, match="none given"):
        open_decoder(mistral).gradients([], {}, lambda name, x, g: None)


def test_adapters_that_do_not_fit_are_refused(mistral: Path, tmp_path: Path) -> None:
    decoder = open_decoder(mistral)
    other = pico.write_base(tmp_path / "other.gguf", dims=pico.Dims(n_embd=64, n_head_kv=2))
    with pytest.raises(IncompatibleAdapter, match="does not fit base.gguf"):
        refuse_misfits(adapters(other, 1), decoder.base)
    path = tmp_path / "embedding.gguf"
    pico.write_random_lora(path, mistral, parts=("token_embd",))
    with pytest.raises(UnsupportedFile, match="token_embd.weight"):
        refuse_misfits([open_lora(path)], decoder.base)
    refuse_misfits(adapters(mistral), decoder.base)
