"""The engine on pico models: log-likelihoods, answers, embeddings, adapters, quantising."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pico
import pytest
from llama_logits import logits
from numpy.typing import NDArray

from edgelora.adapters.base import read_base
from edgelora.engine import native
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.embed import WINDOW, embed
from edgelora.engine.generate import Sampling, stream
from edgelora.engine.hidden import completion_states
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.quantize import quantize
from edgelora.engine.score import TokenisedExample, count_tokens, mean_loss, score
from edgelora.errors import EdgeLoRAError, EngineError, IncompatibleAdapter, InvalidFile, NotFound
from edgelora.gguf_file import open_gguf

ONE_THREAD = ModelOptions(n_threads=1)
# At n_embd 32 llama.cpp's AMX kernels add to memory that nobody has set (mmq.cpp, KB = 1).
QUANTISABLE = pico.Dims(64, 64, head_dim=16)
TOKENS = (5, 90, 300, 12, 41, 270, 7, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_base(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[Model]:
    with open_model(base, ONE_THREAD) as opened:
        yield opened


def random_examples(n: int, *, shared: int = 0, longest: int = 20) -> list[TokenisedExample]:
    rng = np.random.default_rng(n)
    prefix = tuple(int(token) for token in rng.integers(5, 300, shared))
    sizes = rng.integers(1, longest, (n, 2))
    ids = [[tuple(map(int, rng.integers(5, 300, size))) for size in pair] for pair in sizes]
    return [TokenisedExample(prefix + p, c, line=i + 1) for i, (p, c) in enumerate(ids)]


def reference_nll(values: NDArray[np.float32], example: TokenisedExample) -> float:
    """By log-sum-exp in float64, from the logits of every position of prompt + completion."""
    rows = values[len(example.prompt) - 1 : -1].astype(np.float64)
    log_z = np.logaddexp.reduce(rows, axis=1)
    picked = rows[np.arange(len(rows)), list(example.completion)]
    return float((log_z - picked).sum())


def reference_scores(
    base: Path, examples: Sequence[TokenisedExample], adapter: Path | None = None
) -> list[float]:
    return [reference_nll(logits(base, e.prompt + e.completion, adapter), e) for e in examples]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_sequences": 1},
        {"n_sequences": 3},
        {"n_batch": 5},
        {"n_ctx": 64, "n_batch": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [0, 11])
def test_scores_equal_those_of_one_decode_each(
    model: Model, base: Path, shape: dict[str, int], shared: int
) -> None:
    examples = random_examples(7, shared=shared)
    done: list[int] = []
    with open_context(model, exact=True, **shape) as context:
        scores = score(context, examples, progress=done.append)
        assert context.n_decoded == count_tokens(examples)
        again = score(context, examples[:3])
    expected = reference_scores(base, examples)
    np.testing.assert_allclose([s.nll for s in scores], expected, rtol=2e-4)
    np.testing.assert_allclose([s.nll for s in again], expected[:3], rtol=2e-4)
    assert [s.n_tokens for s in scores] == [len(e.completion) for e in examples]
    assert mean_loss(scores) == pytest.approx(
        sum(expected) / sum(len(e.completion) for e in examples), rel=2e-4
    )
    assert sum(done) == len(examples)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_scores_under_an_adapter(tmp_path: Path, architecture: str) -> None:
    base = pico.write_base(tmp_path / "base.gguf", architecture)
    adapter = pico.write_random_lora(tmp_path / "a.gguf", base)
    examples = random_examples(3, shared=9)
    with (
        open_model(base, ONE_THREAD) as model,
        open_context(model, exact=True, n_batch=16) as context,
    ):
        context.apply([WeightedAdapter(adapter)])
        scores = score(context, examples)
    expected = reference_scores(base, examples, adapter)
    np.testing.assert_allclose([s.nll for s in scores], expected, rtol=2e-4)


def test_long_examples_run_over_several_batches(model: Model, base: Path) -> None:
    examples = random_examples(2, shared=150, longest=150)
    with open_context(model, exact=True, n_batch=64) as context:
        scores = score(context, examples)
    expected = reference_scores(base, examples)
    np.testing.assert_allclose([s.nll for s in scores], expected, rtol=2e-4)


def test_states_before_the_head_give_the_same_losses(model: Model, base: Path) -> None:
    examples = random_examples(5, shared=10)
    with open_context(model, hidden=True, exact=True, n_batch=24, n_sequences=3) as context:
        states = completion_states(context, examples)
    assert list(states.targets) == [token for e in examples for token in e.completion]
    values = states.hidden @ open_gguf(base).array("token_embd.weight").T
    nll = np.logaddexp.reduce(values.astype(np.float64), axis=1)
    nll -= values[np.arange(len(values)), states.targets]
    assert nll.sum() == pytest.approx(sum(reference_scores(base, examples)), rel=2e-4)


def greedy_reference(base: Path, model: Model, prompt: Sequence[int], n: int) -> tuple[int, ...]:
    ids = list(prompt)
    while len(ids) < len(prompt) + n:
        best = int(logits(base, ids)[-1].argmax())
        if model.vocabulary.is_end(best):
            break
        ids.append(best)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("shape", [{}, {"n_sequences": 2}, {"n_batch": 3}], ids=str)
def test_answers_equal_greedy_decoding_one_at_a_time(
    model: Model, base: Path, shape: dict[str, int]
) -> None:
    examples = [*random_examples(4, shared=9), TokenisedExample(TOKENS, (), line=9)]
    with open_context(model, exact=True, **shape) as context:
        scores = score(context, examples, max_answer=5)
        n_decoded = context.n_decoded
    expected = [greedy_reference(base, model, e.prompt, 5) for e in examples]
    assert [s.answer for s in scores] == expected
    assert n_decoded == count_tokens(examples) + sum(map(len, expected))
    assert (scores[-1].nll, scores[-1].n_tokens) == (0.0, 0)


def test_an_answer_stops_before_the_end_token(tmp_path: Path) -> None:
    """A head whose end tokens always win answers with nothing."""
    base = tmp_path / "base.gguf"
    pico.write_base(base, tied=False)
    info = open_gguf(base).tensors["output.weight"]
    head = np.memmap(base, np.float32, "r+", info.offset, info.shape)
    norm = open_gguf(base).tensors["output_norm.weight"]
    np.memmap(base, np.float32, "r+", norm.offset, norm.shape)[:] = [1.0] + [0.0] * 31
    head[:] = 0.0
    head[2], head[4] = [9.0] * 32, [-9.0] * 32
    head.flush()
    with open_model(base, ONE_THREAD) as model, open_context(model) as context:
        assert model.vocabulary.is_end(2) and model.vocabulary.is_end(4)
        (scored,) = score(context, [TokenisedExample(TOKENS, (2,))], max_answer=4)
        assert scored.answer == ()
        assert list(stream(context, TOKENS, max_tokens=4)) == [""]


def test_overlong_examples_are_named_and_nothing_is_cut(model: Model) -> None:
    examples = random_examples(3)
    examples += [
        TokenisedExample(tuple(range(5, 70)), (9,), line=40),
        TokenisedExample((), (9,), line=41),
    ]
    with open_context(model, n_ctx=64) as context:
        assert context.n_ctx == 256, "llama.cpp rounds up"
        with pytest.raises(EngineError, match="line 41: an empty prompt"):
            score(context, examples)
        examples[-1] = TokenisedExample(tuple(range(5, 261)), (9,), line=41)
        with pytest.raises(EngineError, match="line 41: 257 tokens") as caught:
            score(context, examples)
        assert len(caught.value.problems) == 1
        with pytest.raises(EngineError, match="line 40: 305 tokens"):
            score(context, examples, max_answer=240)
        assert len(score(context, examples[:4])) == 4, "the context is still of use"


def test_no_position_beyond_those_trained(tmp_path: Path) -> None:
    """GPT-2 has a table of positions; ggml aborts on one that is not in it."""
    dims = replace(pico.dims_of("gpt2"), n_ctx=40)
    base = pico.write_base(tmp_path / "base.gguf", "gpt2", dims=dims)
    with open_model(base, ONE_THREAD) as model, open_context(model) as context:
        assert (context.n_ctx, context.n_batch) == (40, 40)
        score(context, [TokenisedExample(tuple(range(5, 35)), (9,) * 10)])
        with pytest.raises(EngineError, match="41 tokens"):
            score(context, [TokenisedExample(tuple(range(5, 35)), (9,) * 11)])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (Row(10**6, 0, 0), "outside the model"),
        (Row(-1, 0, 0), "outside the model"),
        (Row(5, 10**6, 0), "outside the model"),
        (Row(5, 0, 99), "sequence 99 of 4"),
        (Row(5, 0, -1), "sequence -1 of 4"),
    ],
)
def test_rows_that_would_end_the_process_are_refused(model: Model, row: Row, problem: str) -> None:
    with open_context(model, n_sequences=4) as context:
        with pytest.raises(EngineError, match=problem):
            context.decode([row])
        with pytest.raises(EngineError, match="a batch of 0"):
            context.decode([])
        with pytest.raises(EngineError, match="a batch of"):
            context.decode([Row(5, 0, 0)] * (context.n_batch + 1))
        with pytest.raises(EngineError, match="not opened for hidden states"):
            context.hidden([Row(5, 0, 0, output=True)])


def llama_cpp_mean(model: Model, ids: Sequence[int]) -> NDArray[np.float32]:
    """llama.cpp's own mean pooling over one text."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.embeddings, parameters.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_MEAN
    context = llama_cpp.llama_init_from_model(model.handle, parameters)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    pointer = llama_cpp.llama_get_embeddings_seq(context, 0)
    mean = np.ctypeslib.as_array(pointer, (model.n_embd,)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return mean


def distance(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def random_texts(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    return [tuple(map(int, rng.integers(5, 300, size))) for size in sizes]


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-6), (False, 1e-3)])
def test_embeddings_equal_llama_cpp_pooling_alone_or_in_any_batch(
    model: Model, exact: bool, tolerance: float
) -> None:
    """Flash attention multiplies in F16 where a batch is large enough: that is its noise."""
    texts = random_texts([1, 40, 7, 300, 511, 512, 3, 90])
    with open_context(model, hidden=True, exact=exact) as context:
        together = embed(context, texts)
        backwards = embed(context, texts[::-1])[::-1]
        alone = np.concatenate([embed(context, [text]) for text in texts])
    for i, text in enumerate(texts):
        assert distance(together[i], llama_cpp_mean(model, text)) < 1e-3
        assert distance(together[i], alone[i]) < tolerance
        assert distance(backwards[i], alone[i]) < tolerance


def test_nothing_of_a_long_text_is_cut(model: Model) -> None:
    (text,) = random_texts([2 * WINDOW + 100])
    parts = [text[start : start + WINDOW] for start in range(0, len(text), WINDOW)]
    with open_context(model, hidden=True) as context:
        whole, empty, short = embed(context, [text, (), text[:5]])
        means = embed(context, parts)
    sizes = np.array([len(part) for part in parts])[:, None]
    assert distance(whole, (means * sizes).sum(axis=0) / sizes.sum()) < 1e-5
    assert not empty.any() and short.any()


def test_windows_do_not_depend_on_what_a_decode_holds(model: Model) -> None:
    """A signature of a machine with little memory has to be that of any other."""
    texts = random_texts([WINDOW + 30, 40])
    found = []
    for n_batch in (512, 100):
        with open_context(model, n_batch=n_batch, hidden=True, exact=True) as context:
            found.append(embed(context, texts))
    assert distance(found[1], found[0]) < 1e-4


def greedy_text(context: Context, prompt: Sequence[int], n: int) -> str:
    (scored,) = score(context, [TokenisedExample(tuple(prompt), ())], max_answer=n)
    return context.model.vocabulary.decode(scored.answer).decode("utf-8", "replace")


def test_streamed_text_is_the_greedy_answer(model: Model) -> None:
    with open_context(model, n_batch=5) as context:
        pieces = list(stream(context, TOKENS, max_tokens=12))
        assert len(pieces) == 13, "one for each token, and what was left"
        assert "".join(pieces) == greedy_text(context, TOKENS, 12)
        drawn = [
            "".join(stream(context, TOKENS, max_tokens=12, sampling=Sampling(50.0, seed=seed)))
            for seed in (1, 1, 2, 3)
        ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_a_character_of_several_tokens_is_streamed_whole(tmp_path: Path) -> None:
    """A head that writes the bytes of a euro sign for ever: byte b's successor wins after b."""
    base = pico.write_base(tmp_path / "base.gguf", tied=False, dims=pico.Dims(n_layer=1))
    gguf = open_gguf(base)
    arrays = {
        name: np.memmap(base, np.float32, "r+", gguf.tensors[name].offset, gguf.tensors[name].shape)
        for name in ("token_embd.weight", "output.weight", "output_norm.weight")
    }
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight"):
        info = gguf.tensors[name]
        np.memmap(base, np.float32, "r+", info.offset, info.shape)[:] = 0.0
    arrays["output_norm.weight"][:] = 1.0
    arrays["output.weight"][:] = 0.0
    euro = [5 + byte for byte in "€".encode()]
    for i, token in enumerate(euro):
        arrays["token_embd.weight"][token] = np.eye(32, dtype=np.float32)[i]
        arrays["output.weight"][euro[(i + 1) % 3]] = 9 * np.eye(32, dtype=np.float32)[i]
    for array in arrays.values():
        array.flush()
    with open_model(base, ONE_THREAD) as model, open_context(model) as context:
        pieces = list(stream(context, [euro[2]], max_tokens=7))
    assert pieces == ["", "", "€", "", "", "€", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_conversation_that_does_not_fit_is_refused(model: Model) -> None:
    with open_context(model, n_ctx=256) as context:
        with pytest.raises(EngineError, match="do not fit"):
            list(stream(context, TOKENS, max_tokens=250))
        with pytest.raises(EngineError, match="empty prompt"):
            list(stream(context, [], max_tokens=5))


def last_logits(context: Context, adapters: Sequence[WeightedAdapter]) -> NDArray[np.float32]:
    context.apply(adapters)
    rows = [Row(t, i, 0, output=i == len(TOKENS) - 1) for i, t in enumerate(TOKENS)]
    return context.decode(rows)[0].copy()


def test_adapters_change_logits_and_scale_zero_is_the_base(model: Model, tmp_path: Path) -> None:
    one, two = (
        pico.write_random_lora(tmp_path / f"{seed}.gguf", model.base.path, seed=seed)
        for seed in (1, 2)
    )
    with open_context(model, exact=True) as context:
        plain = last_logits(context, [])
        with_one = last_logits(context, [WeightedAdapter(one)])
        both = last_logits(context, [WeightedAdapter(one), WeightedAdapter(two, -0.5)])
        np.testing.assert_array_equal(last_logits(context, [WeightedAdapter(one, 0.0)]), plain)
        np.testing.assert_array_equal(last_logits(context, [WeightedAdapter(one)]), with_one)
        doubled = last_logits(context, [WeightedAdapter(one), WeightedAdapter(one)])
        np.testing.assert_array_equal(doubled, last_logits(context, [WeightedAdapter(one, 2.0)]))
        with pytest.raises(EngineError, match="finite"):
            context.apply([WeightedAdapter(one, float("nan"))])
    assert np.abs(with_one - plain).max() > 0.1
    assert np.abs(both - with_one).max() > 0.1
    assert np.abs(with_one - logits(model.base.path, TOKENS, one)[-1]).max() < 1e-4
    model.unload(one)
    model.unload(two)


def test_an_applied_adapter_is_not_freed_and_an_unloaded_one_comes_back(
    model: Model, tmp_path: Path
) -> None:
    path = pico.write_random_lora(tmp_path / "a.gguf", model.base.path)
    with open_context(model, exact=True) as context:
        before = last_logits(context, [WeightedAdapter(path)])
        with pytest.raises(EngineError, match="a context has this adapter applied"):
            model.unload(path)
        context.apply([])
        model.unload(path)
        model.unload(path)
        np.testing.assert_array_equal(last_logits(context, [WeightedAdapter(path)]), before)
    model.unload(path)


def test_a_file_that_changed_is_loaded_anew(model: Model, tmp_path: Path) -> None:
    path = pico.write_random_lora(tmp_path / "a.gguf", model.base.path, seed=1)
    other = pico.write_random_lora(tmp_path / "b.gguf", model.base.path, seed=2, rank=5)
    with open_context(model, exact=True) as context:
        first = last_logits(context, [WeightedAdapter(path)])
        other.replace(path)
        second = last_logits(context, [WeightedAdapter(path)])
    assert np.abs(second - first).max() > 0.1
    assert np.abs(second - logits(model.base.path, TOKENS, path)[-1]).max() < 1e-4
    model.unload(path)
    path.unlink()
    with pytest.raises(NotFound):
        model.adapter(path)


def test_what_llama_cpp_would_crash_on_never_reaches_it(model: Model, tmp_path: Path) -> None:
    other = pico.write_base(tmp_path / "other.gguf", dims=pico.Dims(n_embd=64))
    foreign = pico.write_random_lora(tmp_path / "foreign.gguf", other)
    stranger = pico.write_base(tmp_path / "stranger.gguf", seed=3)
    named = pico.write_random_lora(
        tmp_path / "named.gguf",
        model.base.path,
        metadata={"edgelora.base.id": read_base(stranger).identity.id},
    )
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(foreign.read_bytes()[:-100])
    with open_context(model) as context:
        for path, kind in (
            (foreign, IncompatibleAdapter),
            (named, IncompatibleAdapter),
            (broken, InvalidFile),
            (model.base.path, EdgeLoRAError),
        ):
            with pytest.raises(kind):
                context.apply([WeightedAdapter(path)])
    for damaged in (broken, foreign, tmp_path):
        with pytest.raises(EdgeLoRAError), open_model(damaged):
            pass


def test_a_base_is_quantised_and_scores_nearly_the_same(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", dims=QUANTISABLE)
    copy = tmp_path / "copy.gguf"
    quantize(base, copy, "q8_0", n_threads=1)
    assert read_base(copy).identity == read_base(base).identity
    assert copy.stat().st_size < base.stat().st_size
    examples, losses = random_examples(4), []
    for path in (base, copy):
        with open_model(path, ONE_THREAD) as model, open_context(model) as context:
            assert model.warnings == () or "AMX" in model.warnings[0]
            losses.append(mean_loss(score(context, examples)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]
    with pytest.raises(EngineError, match="unknown type q9"):
        quantize(base, copy, "q9")
    with pytest.raises(EngineError, match="onto itself"):
        quantize(base, base, "q8_0")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InvalidFile):
        quantize(tmp_path / "text.gguf", copy, "q8_0")


def test_low_ram_gives_the_same_losses(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", dtype="Q4_0", dims=QUANTISABLE)
    examples, losses = random_examples(4), []
    for low_ram in (False, True):
        options = ModelOptions(n_threads=1, low_ram=low_ram)
        with open_model(base, options) as model, open_context(model) as context:
            losses.append(mean_loss(score(context, examples)))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("what", ["open", "context", "adapter", "apply", "quantise"])
def test_ctrl_c_while_llama_cpp_logs_is_not_lost(
    what: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the callback of the log ctypes would print and forget it, and the work would go on."""
    lines: list[str] = []

    def press(_level: int, line: str) -> None:
        lines.append(line)
        signal.raise_signal(signal.SIGINT)

    def interrupted(act: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(native, "keep_line", press)
            with pytest.raises(KeyboardInterrupt):
                act()

    base = pico.write_base(tmp_path / "base.gguf", dims=QUANTISABLE)
    adapters = [WeightedAdapter(pico.write_random_lora(tmp_path / "a.gguf", model.base.path))]
    with open_context(model) as context:
        acts: dict[str, Callable[[], object]] = {
            "open": open_model(base, ONE_THREAD).__enter__,
            "context": open_context(model).__enter__,
            "adapter": lambda: model.adapter(adapters[0].path),
            "apply": lambda: context.apply(adapters),
            "quantise": lambda: quantize(base, tmp_path / "copy.gguf", "q8_0", n_threads=1),
        }
        if what == "apply":
            acts["adapter"]()
        interrupted(acts[what])
        assert lines and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        context.apply([])
        assert len(last_logits(context, adapters))
    model.unload(adapters[0].path)


def test_ctrl_c_ends_the_loading_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of a large file: llama.cpp asks between two tensors whether to go on."""
    base, lines = pico.write_base(tmp_path / "base.gguf"), []

    def press(_level: int, line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(native, "keep_line", press)
    with pytest.raises(KeyboardInterrupt), open_model(base, ONE_THREAD):
        pass
    assert any("cancel" in line for line in lines), lines[-3:]
