"""Hidden states of the first layers: as a model of those layers gives them, and no layer more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import builds
import numpy as np
import pico
import pytest
from cli_runner import run
from numpy.typing import NDArray

from edgelora.adapters.base import read_base
from edgelora.bank import Bank, open_bank
from edgelora.bank.embedding import layers_for, open_embedder
from edgelora.bank.verify import verify
from edgelora.build.pool import open_pool
from edgelora.datasets.records import Dataset, Example, Message
from edgelora.embedding_cache import open_cache
from edgelora.engine import capture
from edgelora.engine.capture import NodeCapture
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.embed import WINDOW, embed
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.errors import BankError, EngineError, IncompatibleAdapter, InvalidFile
from edgelora.gguf_file import open_gguf
from edgelora.gradient.decoder import open_decoder
from edgelora.operators.distances import measure
from edgelora.operators.routing import Uncalibrated, fit_routes, make_cloud
from edgelora.signature import Signature, from_bytes, summarise, to_bytes
from edgelora.summarise import embed_cached, embedding_name, summarise_examples

ONE_THREAD = ModelOptions(n_threads=1)
N_LAYER = 4
TEXT = tuple(range(5, 45))
Array = NDArray[np.float32]


def write(path: Path, architecture: str = "llama", n_layer: int = N_LAYER) -> Path:
    """The same seed gives the same blocks: fewer layers are a truncated copy."""
    dims = replace(pico.dims_of(architecture), n_layer=n_layer)
    return pico.write_base(path, architecture, dims=dims)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(write(tmp_path_factory.mktemp("early") / "b.gguf"), ONE_THREAD) as model:
        yield model


def rows_of(ids: Sequence[int], sequence: int = 0, output: bool = False) -> list[Row]:
    return [Row(token, i, sequence, output) for i, token in enumerate(ids)]


def last_norm(base: Path, x: Array) -> Array:
    """The base's last norm by hand; the weights are those of every truncated copy."""
    gguf = open_gguf(base)
    weight = gguf.array("output_norm.weight")
    if "output_norm.bias" in gguf.tensors:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled * weight + gguf.array("output_norm.bias")
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weight


@pytest.mark.parametrize("architecture", pico.ARCHITECTURES)
def test_states_are_those_of_a_truncated_copy(tmp_path: Path, architecture: str) -> None:
    base = write(tmp_path / "base.gguf", architecture)
    for n_layers in (1, N_LAYER - 1):
        copy = write(tmp_path / f"copy{n_layers}.gguf", architecture, n_layers)
        with (
            open_model(base, ONE_THREAD) as whole,
            open_context(whole, hidden=True, exact=True) as context,
        ):
            states = context.hidden(rows_of(TEXT), n_layers)
        with (
            open_model(copy, ONE_THREAD) as truncated,
            open_context(truncated, hidden=True, exact=True) as context,
        ):
            expected = context.hidden(rows_of(TEXT, output=True))
        np.testing.assert_allclose(last_norm(copy, states), expected, rtol=1e-4, atol=1e-4)


def test_states_are_those_of_the_decoder_in_numpy(model: Model, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy.gguf", n_layer=2)
    with open_context(model, hidden=True, exact=True) as context:
        states = context.hidden(rows_of(TEXT), 2)
    logits = last_norm(copy, states) @ open_gguf(copy).array("token_embd.weight").T
    expected = open_decoder(copy, np.float64).logits(TEXT, {})
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_moves_the_states_of_its_layers(model: Model, tmp_path: Path) -> None:
    adapter = pico.write_random_lora(tmp_path / "a.gguf", model.base.path, layers=[2], size=1.0)
    with open_context(model, hidden=True, exact=True) as context:
        plain = [context.hidden(rows_of(TEXT), n) for n in (2, 3) if context.clear() is None]
        context.apply([WeightedAdapter(adapter)])
        moved = [context.hidden(rows_of(TEXT), n) for n in (2, 3) if context.clear() is None]
        context.apply([])
    np.testing.assert_array_equal(moved[0], plain[0])
    assert np.abs(moved[1] - plain[1]).max() > 0.05


def pooled(context: Context, text: Sequence[int], n_layers: int) -> NDArray[np.float64]:
    """The mean by hand, one text alone: each state over its root mean square."""
    context.clear()
    x = context.hidden(rows_of(text), n_layers).astype(np.float64)
    return (x / np.sqrt((x**2).mean(axis=1, keepdims=True))).mean(axis=0)


def random_texts(*sizes: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    return [tuple(map(int, rng.integers(5, 300, size))) for size in sizes]


@pytest.mark.parametrize(
    "shape", [{}, {"n_batch": 128, "n_ubatch": 16}, {"n_batch": 64, "n_sequences": 2}], ids=str
)
def test_texts_in_one_batch_are_as_each_alone(model: Model, shape: dict[str, int]) -> None:
    """Also where a batch is computed in several ubatches, and a text in several windows."""
    texts = random_texts(1, 40, 7, 60, 3, 30)
    with open_context(model, hidden=True, exact=True) as context:
        expected = np.array([pooled(context, text, 2) for text in texts])
    with open_context(model, hidden=True, exact=True, **shape) as context:
        found = embed(context, [*texts, ()], 2)
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-4, atol=1e-4)
    assert not found[-1].any()


def test_nothing_of_a_long_text_is_cut(model: Model) -> None:
    (text,) = random_texts(WINDOW + 100)
    with open_context(model, hidden=True, exact=True) as context:
        parts = [pooled(context, part, 1) for part in (text[:WINDOW], text[WINDOW:])]
        whole = embed(context, [text], 1)[0]
    np.testing.assert_allclose(whole, np.average(parts, axis=0, weights=[WINDOW, 100]), atol=1e-4)


def test_no_layer_more_is_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp asks of each node before it is computed: after the stop it asks of none."""
    real, seen = NodeCapture._on_node, []

    def noting(self: NodeCapture, tensor: int, ask: bool, user_data: int) -> bool:
        seen.append(capture.native.ggml_base().ggml_get_name(tensor).decode())
        return real(self, tensor, ask, user_data)

    monkeypatch.setattr(NodeCapture, "_on_node", noting)
    with open_context(model, hidden=True) as context:
        context.hidden(rows_of(TEXT), 2)
        assert "l_out-0" in seen and seen[-1] == "l_out-1"
        assert not [name for name in seen if name.endswith(("-2", "-3"))]


def test_whole_passes_are_not_harmed_by_early_ones(model: Model) -> None:
    with open_context(model, hidden=True, exact=True) as context:
        before = context.hidden(rows_of(TEXT, output=True))
        embed(context, [TEXT], 1)
        context.clear()
        context.decode(rows_of(TEXT[:20]))  # as a shared prefix is: no output, all layers
        after = context.hidden([Row(token, i, 0, True) for i, token in enumerate(TEXT) if i >= 20])
    np.testing.assert_allclose(after, before[20:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_layers", [-1, N_LAYER, 10**6])
def test_layers_that_are_not_there_are_refused(model: Model, n_layers: int) -> None:
    with open_context(model, hidden=True) as context, pytest.raises(EngineError, match="layers"):
        context.hidden(rows_of(TEXT), n_layers)


def test_a_graph_without_the_node_is_an_error(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelora.engine.context.node_of", lambda n_layers: "nowhere")
    with open_context(model, hidden=True) as context:
        with pytest.raises(EngineError, match="40 rows of nowhere were expected, no such node"):
            context.hidden(rows_of(TEXT), 2)


@pytest.mark.parametrize("call", ["ggml_get_name", "ggml_nbytes"])
def test_an_error_in_the_callback_is_raised_and_leaves_the_context_usable(
    model: Model, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """One while llama.cpp asks, and one while the node is copied."""

    class Failing:
        def __getattr__(self, name: str) -> Any:
            if name == call:
                raise MemoryError("no memory left")
            return getattr(real, name)

    real = capture.native.ggml_base()
    with open_context(model, hidden=True, exact=True) as context:
        expected = context.hidden(rows_of(TEXT), 2)
        context.clear()
        with monkeypatch.context() as patch:
            patch.setattr(capture.native, "ggml_base", Failing)
            with pytest.raises(MemoryError, match="no memory left"):
                context.hidden(rows_of(TEXT), 2)
        context.clear()
        np.testing.assert_array_equal(context.hidden(rows_of(TEXT), 2), expected)


# Signatures say after how many layers they were made.


def examples_of(n: int = 5) -> tuple[Example, ...]:
    return tuple(Example((Message("user", f"is it {i}?"),), f"yes {i}", (), i) for i in range(n))


def signature(n_layers: int, seed: int = 0) -> Signature:
    x = np.random.default_rng(seed).normal(size=(6, 8)).astype(np.float32)
    return summarise(x, None, [[1, 2]], n_vocab=4, base_id="b", n_layers=n_layers)


def test_a_signature_says_after_how_many_layers_it_was_made(model: Model, tmp_path: Path) -> None:
    with open_context(model, hidden=True) as context, open_cache(tmp_path) as cache:
        early, whole, again = (
            summarise_examples(context, examples_of(), cache=cache, n_layers=n) for n in (2, 0, 2)
        )
        vectors = embed_cached(context, [TEXT], cache=cache, n_layers=2)
        n_decoded = context.n_decoded
        np.testing.assert_array_equal(
            embed_cached(context, [TEXT], cache=cache, n_layers=2), vectors
        )
        assert context.n_decoded == n_decoded, "from the cache"
        assert not np.allclose(embed_cached(context, [TEXT], cache=cache, n_layers=1), vectors)
        keys = [entry.model for entry in cache.entries()]
    assert [s.n_layers for s in (early, whole)] == [2, 0]
    assert to_bytes(early) == to_bytes(again) != to_bytes(whole)
    assert from_bytes(to_bytes(early)).n_layers == 2
    assert [key.endswith(" layers") for key in keys] == [False, True, True]


def test_files_of_whole_passes_are_as_they_were(model: Model) -> None:
    """Older programs read them, and refuse the others by their version."""
    assert b'\\"version\\": 1' in to_bytes(signature(0)) and b"n_layers" not in to_bytes(
        signature(0)
    )
    assert b'\\"version\\": 2' in to_bytes(signature(3))
    hostile = to_bytes(signature(3)).replace(b'\\"n_layers\\": 3', b'\\"n_layers\\": -')
    with pytest.raises(InvalidFile):
        from_bytes(hostile)
    with pytest.raises(InvalidFile, match="99999 layers"):
        from_bytes(to_bytes(replace(signature(3), n_layers=99_999)))


def test_signatures_of_other_layers_are_not_compared() -> None:
    with pytest.raises(IncompatibleAdapter, match="signature 1: base b, all layers"):
        measure("bures", signature(2), [signature(2, 1), signature(0, 2)])
    clouds = {f"d{i}": make_cloud(signature(2, i).prompt, n_layers=2) for i in range(12)}
    assert fit_routes(clouds, []).n_layers == 2
    with pytest.raises(Uncalibrated, match="all layers, 2 layers"):
        fit_routes(clouds, [make_cloud(signature(0).prompt)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Bank]]:
    """A base and a bank of four adapters, whose signatures come from the first layer."""
    folder = tmp_path_factory.mktemp("bank")
    base = write(folder / "base.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        yield base, open_bank(builds.fill_bank(folder, base, n_layers=1))


def test_a_bank_stays_with_its_layers(world: tuple[Path, Bank], tmp_path: Path) -> None:
    base, bank = read_base(world[0]), world[1]
    assert layers_for(bank, base) == layers_for(bank, base, 1) == 1
    with pytest.raises(BankError, match="come from 1 layers of the base, all were asked for"):
        layers_for(bank, base, 0)
    with pytest.raises(BankError, match="4 of its 4 layers cannot be asked for"):
        layers_for(bank, base, 4)
    new = open_bank(tmp_path / "new", create=True)
    assert layers_for(new, base, 3) == 3
    assert open_pool(bank, base.identity, ()).n_layers == 1
    assert verify(bank, base) == []


def test_a_bank_with_signatures_of_two_kinds_is_refused(
    world: tuple[Path, Bank], tmp_path: Path
) -> None:
    base = read_base(world[0])
    shutil.copytree(world[1].path, tmp_path / "bank")
    bank = open_bank(tmp_path / "bank")
    with open_embedder(base.path, n_threads=1) as embedder:
        bank.set_signature("adapter2", embedder(Dataset(tmp_path, "jsonl", examples_of(), ())))
    with pytest.raises(BankError, match="different layers") as caught:
        open_pool(bank, base.identity, ())
    assert caught.value.problems == (
        "all layers: adapter2", "1 layers: adapter0, adapter1, adapter3",
    )  # fmt: skip
    assert open_pool(bank, base.identity, ("adapter2",)).n_layers == 1
    (problem,) = verify(bank, base)
    assert "adapter2" in problem and "comes from all layers, others from 1" in problem
    out = tmp_path / "s.safetensors"
    given = run("bank", "signatures", "export", out, "--bank", bank.path, "--base", base.path)
    assert given.exit_code == 1 and "different layers" in given.stderr and not out.exists()


def test_shared_signatures_carry_their_layers(world: tuple[Path, Bank], tmp_path: Path) -> None:
    base, bank = world
    file = tmp_path / "s.safetensors"
    line = ("bank", "signatures")
    assert run(*line, "export", file, "--bank", bank.path, "--base", base).exit_code == 0
    assert embedding_name(1).encode() in file.read_bytes()
    taken = run(*line, "import", file, "--bank", bank.path)
    assert taken.exit_code == 0 and "4 already there" in taken.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
        other = builds.fill_bank(tmp_path, base)
    refused = run(*line, "import", file, "--bank", other, "--force")
    assert refused.exit_code == 1
    assert "from 1 layers of the base, the bank's own from all" in refused.stderr


def test_layers_on_the_command_line(world: tuple[Path, Bank], tmp_path: Path) -> None:
    base, bank = world
    data = builds.write_lines(tmp_path / "mine.jsonl", ["is it a hat?", "a cat?"])
    folder = pico.write_peft(tmp_path / "mine", seed=9, dims=replace(pico.Dims(), n_layer=N_LAYER))
    add = ("bank", "add", folder, "--base", base, "--data", data, "--threads", 1)
    new = tmp_path / "new"
    assert run(*add, "--bank", new, "--layers", 2).exit_code == 0
    assert open_bank(new).signature("mine", read_base(base).identity.id).n_layers == 2
    refused = run(*add, "--bank", new, "--layers", "all")
    assert refused.exit_code == 1 and "come from 2 layers" in refused.stderr
    assert run(*add, "--bank", new, "--layers", "0").exit_code == 2
    built = run(
        "build", "--base", base, "--bank", bank.path, "--data", data, "--refine", "none",
        "--operator", "mixture", "--force", "-o", tmp_path / "o.gguf", "--threads", 1,
    )  # fmt: skip
    assert built.exit_code == 0, built.output
    (beside,) = tmp_path.glob("o.*.signature.safetensors")
    assert from_bytes(beside.read_bytes()).n_layers == 1
