"""Completions scored under several adapters: hot-applied by us, reloaded by llama-cpp-python."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from result_lines import Row

from edgelora.datasets.records import Example
from edgelora.engine.context import Context, open_context
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.quantize import quantize
from edgelora.engine.score import TokenisedExample, count_tokens, score

Array = NDArray[np.float64]
N_BATCH = 512
# Nats a token. With F32 weights and F32 KV only the order of sums differs; with quantised weights
# the shape of a batch flips roundings of the activations (docs/performance.md), so there the mean
# over the examples is held to a bound.
EXACT, QUANTISED = 1e-3, 0.2


@dataclass(frozen=True)
class Options:
    """How both sides run.

    Attributes:
        n_ctx: tokens of a context, of both sides.
        say: progress.
    """

    n_threads: int = 1
    n_ctx: int = 1024
    rounds: int = 1
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Text:
    """One example as both sides get it.

    Attributes:
        ids: what we score.
        text: the same, prompt and completion with their control tokens, for llama-cpp-python,
            whose `echo` takes no token ids.
    """

    ids: TokenisedExample
    text: str


class TimedLlama(llama_cpp.Llama):
    """llama-cpp-python's own, which counts the seconds of its forward passes in `eval_s`."""

    eval_s = 0.0

    def eval(self, tokens: Sequence[int]) -> None:
        """As its own, timed."""
        started = time.perf_counter()
        super().eval(tokens)
        self.eval_s += time.perf_counter() - started


def read_texts(base: Path, examples: Sequence[Example]) -> list[Text]:
    """Both forms of each example, which are the same tokens.

    Raises:
        SystemExit: a text that llama-cpp-python reads as other tokens, or one that does not begin
            with BOS: its echoed log-probabilities are off by one token then.
    """
    with open_model(base, ModelOptions(low_ram=True)) as model:
        template = model_template(model)
        tokenised = tokenise_examples(model, template, examples)
    texts = []
    for example, ids in zip(examples, tokenised, strict=True):
        answer = template.completion_segments(example.messages, example.completion)
        segments = [*template.render(example.messages), *answer]
        texts.append(Text(ids, "".join(segment.text for segment in segments)))
    reader = llama_cpp.Llama(str(base), vocab_only=True, verbose=False)
    bos, adds_bos = reader.token_bos(), reader._model.add_bos_token()
    for text in texts:
        read = reader.tokenize(text.text.encode("utf-8"), add_bos=False, special=True)
        if [bos] * adds_bos + read != [*text.ids.prompt, *text.ids.completion]:
            raise SystemExit(f"line {text.ids.line}: llama-cpp-python reads other tokens")
        if text.ids.prompt[0] != bos:
            raise SystemExit(f"line {text.ids.line}: does not begin with BOS")
    reader.close()
    return texts


def measure_scoring(
    base: Path, adapters: Sequence[Path], texts: Sequence[Text], options: Options
) -> Row:
    """Seconds of both sides, of each round and adapter, and how far their results differ.

    In a round, each adapter is scored by us, then by llama-cpp-python.

    Raises:
        SystemExit: they do not give the same log-likelihoods.
    """
    exact = _largest_difference_exact(base, adapters, texts, options)
    options.say(f"F32: the largest difference is {exact:.1e} nats a token")
    if not exact <= EXACT:
        raise SystemExit(f"with F32 weights they differ by {exact:.2e} nats a token")
    rounds = [_round(base, adapters, texts, options) for _ in range(options.rounds)]
    row = _summary(rounds, texts) | {"exact_difference": exact}
    if not row["mean_difference"] <= QUANTISED:
        raise SystemExit(f"they differ by {row['mean_difference']:.2g} nats a token: {row}")
    return row


@dataclass(frozen=True)
class Turn:
    """One side under one adapter: log-likelihoods of n completions in nats, (n,), and seconds.

    Attributes:
        load_s: until the adapter is applied (theirs: the whole model loaded, and freed after).
        cpu_s: of the whole turn, of all threads.
        eval_s: of forward passes (theirs only).
    """

    log_p: Array
    total_s: float
    cpu_s: float
    load_s: float
    eval_s: float = 0.0


@dataclass(frozen=True)
class Round:
    """A turn of each side for each adapter, and the seconds in which ours opens the base."""

    open_s: float
    open_cpu_s: float
    ours: list[Turn]
    theirs: list[Turn]


def _round(base: Path, adapters: Sequence[Path], texts: Sequence[Text], options: Options) -> Round:
    ours, theirs = [], []
    with ExitStack() as stack:
        started, used = time.perf_counter(), time.process_time()
        context = stack.enter_context(_open_ours(base, options))
        open_s, open_cpu_s = time.perf_counter() - started, time.process_time() - used
        for adapter in adapters:
            ours.append(score_ours(context, adapter, texts))
            theirs.append(score_theirs(base, adapter, texts, options))
            options.say(
                f"{adapter.stem}: {ours[-1].total_s:.1f} s, llama-cpp-python "
                f"{theirs[-1].total_s:.1f} s"
            )
    return Round(open_s, open_cpu_s, ours, theirs)


@contextmanager
def _open_ours(base: Path, options: Options, *, exact: bool = False) -> Iterator[Context]:
    with (
        open_model(base, ModelOptions(n_threads=options.n_threads)) as model,
        open_context(model, n_ctx=options.n_ctx, n_batch=N_BATCH, exact=exact) as context,
    ):
        yield context


def score_ours(context: Context, adapter: Path, texts: Sequence[Text]) -> Turn:
    """Apply, score all in shared batches, unload, as a build does."""
    model: Model = context.model
    started, used = time.perf_counter(), time.process_time()
    context.apply([WeightedAdapter(adapter)])
    load_s = time.perf_counter() - started
    scores = score(context, [text.ids for text in texts])
    context.apply([])
    model.unload(adapter)
    total_s, cpu_s = time.perf_counter() - started, time.process_time() - used
    return Turn(-np.array([one.nll for one in scores]), total_s, cpu_s, load_s)


def score_theirs(
    base: Path, adapter: Path, texts: Sequence[Text], options: Options, *, exact: bool = False
) -> Turn:
    """A new Llama with the adapter, then one `create_completion` for each text.

    It keeps what a text has in common with the one before by itself.
    """
    kv_type = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
    started, used = time.perf_counter(), time.process_time()
    llama = TimedLlama(
        str(base), lora_path=str(adapter), logits_all=True, n_ctx=options.n_ctx, n_batch=N_BATCH,
        n_ubatch=N_BATCH, n_threads=options.n_threads, n_threads_batch=options.n_threads,
        flash_attn=not exact, type_k=kv_type, type_v=kv_type, verbose=False,
    )  # fmt: skip
    load_s = time.perf_counter() - started
    log_p = np.array([_echoed(llama, text) for text in texts])
    closing = time.perf_counter()
    llama.close()
    ended = time.perf_counter()
    cpu_s = time.process_time() - used
    return Turn(log_p, ended - started, cpu_s, load_s + ended - closing, llama.eval_s)


def _echoed(llama: TimedLlama, text: Text) -> float:
    """The log-likelihood of the completion in nats, from the echoed tokens.

    Zero tokens cannot be asked for (0 means no limit), so one is generated, after the completion.
    BOS is left out of the list, wherever it stands.
    """
    answer: Any = llama.create_completion(
        text.text, max_tokens=1, temperature=0.0, echo=True, logprobs=1
    )
    if answer["usage"]["prompt_tokens"] != text.ids.n_tokens:
        raise SystemExit(f"line {text.ids.line}: llama-cpp-python reads other tokens")
    first = sum(token != llama.token_bos() for token in text.ids.prompt)
    echoed = answer["choices"][0]["logprobs"]["token_logprobs"]
    return float(np.sum(echoed[first : first + len(text.ids.completion)], dtype=float))


def _largest_difference_exact(
    base: Path, adapters: Sequence[Path], texts: Sequence[Text], options: Options
) -> float:
    """Nats a token on an F32 copy of the base: all texts in our shared batches, one of theirs."""
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "f32.gguf"
        quantize(base, copy, "f32")
        with _open_ours(copy, options, exact=True) as context:
            for i, adapter in enumerate(adapters):
                at = i % len(texts)
                ours = score_ours(context, adapter, texts).log_p[at]
                theirs = score_theirs(copy, adapter, [texts[at]], options, exact=True).log_p[0]
                differences.append(abs(ours - theirs) / len(texts[at].ids.completion))
    return float(max(differences))


def _summary(rounds: Sequence[Round], texts: Sequence[Text]) -> Row:
    """What was scored, the seconds of both sides, and how far their results lie apart."""
    return {
        "n_adapters": len(rounds[0].ours), "n_texts": len(texts),
        "n_tokens": sum(text.ids.n_tokens for text in texts),
        "n_completion_tokens": sum(len(text.ids.completion) for text in texts),
        "n_computed": count_tokens([text.ids for text in texts]), "rounds": len(rounds),
        **_seconds(rounds), **_differences(rounds, texts),
    }  # fmt: skip


def _seconds(rounds: Sequence[Round]) -> Row:
    """Medians over the rounds, of all adapters together; ratios are theirs / ours."""
    ours = _totals([r.ours for r in rounds])
    theirs = _totals([r.theirs for r in rounds])
    opened = np.array([[r.open_s, r.open_cpu_s] for r in rounds])
    ours_s, ours_cpu_s = ours["total_s"] + opened[:, 0], ours["cpu_s"] + opened[:, 1]
    scoring_s = ours["total_s"] - ours["load_s"]
    by_adapter = [
        b.total_s / a.total_s for r in rounds for a, b in zip(r.ours, r.theirs, strict=True)
    ]
    told = {
        "ours_s": ours_s, "ours_open_s": opened[:, 0], "ours_apply_s": ours["load_s"],
        "theirs_s": theirs["total_s"], "theirs_load_s": theirs["load_s"],
        "theirs_eval_s": theirs["eval_s"],
        "ours_cpu_s": ours_cpu_s, "theirs_cpu_s": theirs["cpu_s"],
        "ratio": theirs["total_s"] / ours_s, "ratio_cpu": theirs["cpu_s"] / ours_cpu_s,
        "ratio_loaded": (theirs["total_s"] - theirs["load_s"]) / scoring_s,
        "ratio_eval": theirs["eval_s"] / scoring_s,
    }  # fmt: skip
    medians: Row = {name: float(np.median(values)) for name, values in told.items()}
    return medians | {"ratio_least": min(by_adapter), "ratio_most": max(by_adapter)}


def _totals(side: Sequence[Sequence[Turn]]) -> dict[str, Array]:
    """Of each number of a turn: its sum over the adapters, (n_rounds,)."""
    return {
        name: np.array([sum(getattr(turn, name) for turn in turns) for turns in side])
        for name in ("total_s", "cpu_s", "load_s", "eval_s")
    }


def _differences(rounds: Sequence[Round], texts: Sequence[Text]) -> Row:
    """Nats a token: of a text, of an adapter's mean, and between adapters for comparison."""
    ours = np.array([[turn.log_p for turn in r.ours] for r in rounds])
    theirs = np.array([[turn.log_p for turn in r.theirs] for r in rounds])
    n_completion = np.array([len(text.ids.completion) for text in texts])
    apart = np.abs(ours - theirs) / n_completion
    means = np.abs((ours - theirs).sum(axis=2)) / n_completion.sum()
    return {
        "largest_difference": float(apart.max()),
        "median_difference": float(np.median(apart)),
        "mean_difference": float(means.max()),
        "adapters_apart": float(np.median(np.ptp(ours[0] / n_completion, axis=0))),
    }
