"""Samplers of llama.cpp on a pico model: against numpy, and whatever could end the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pico
import pytest
from numpy.typing import NDArray

from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.sampling import Sampling, open_sampler
from edgelora.errors import EngineError, InvalidGrammar

PROMPT = "the and of to in is it you"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = pico.write_base(tmp_path_factory.mktemp("sampling") / "base.gguf")
    with open_model(path, ModelOptions(n_threads=1)) as model:
        yield model


@pytest.fixture(scope="module")
def context(model: Model) -> Iterator[Context]:
    with open_context(model, n_ctx=512, n_sequences=4, exact=True) as context:
        yield context


def read(context: Context, ids: Sequence[int], sequence: int = 0) -> NDArray[np.float32]:
    """Compute ids from position 0 on; a copy of the last logits."""
    context.clear()
    rows = [Row(t, i, sequence, output=i == len(ids) - 1) for i, t in enumerate(ids)]
    return context.decode(rows)[0].copy()


def generate(
    context: Context, sampling: Sampling, n: int = 12, *, ignore_eos: bool = True
) -> list[int]:
    """Tokens drawn one after the other, the grammar's end (-1) included."""
    ids = context.model.vocabulary.tokenize(PROMPT)
    logits, drawn = read(context, ids), []
    with contextlib.closing(
        open_sampler(context.model, sampling, ids, ignore_eos=ignore_eos)
    ) as sampler:
        for _ in range(n):
            token = sampler.sample(context, -1, logits)
            drawn.append(token)
            if token < 0 or context.model.vocabulary.is_end(token):
                break
            logits = context.decode([Row(token, len(ids) + len(drawn) - 1, 0, output=True)])[0]
    return drawn


def draw(context: Context, sampling: Sampling, tail: Sequence[int] = ()) -> int:
    """One token after the prompt."""
    logits = read(context, context.model.vocabulary.tokenize(PROMPT))
    with contextlib.closing(open_sampler(context.model, sampling, tail)) as sampler:
        return sampler.sample(context, -1, logits)


def prompt_logits(context: Context) -> NDArray[np.float32]:
    return read(context, context.model.vocabulary.tokenize(PROMPT))


def text_of(context: Context, drawn: Sequence[int]) -> bytes:
    return context.model.vocabulary.decode([token for token in drawn if token >= 0])


def test_greedy_takes_the_likeliest(context: Context) -> None:
    best = int(prompt_logits(context).argmax())
    assert draw(context, Sampling()) == best
    assert draw(context, Sampling(temperature=1e-9)) == best
    assert draw(context, Sampling(temperature=5.0, top_k=1)) == best
    assert draw(context, Sampling(temperature=5.0, top_p=1e-6)) == best
    assert draw(context, Sampling(temperature=5.0, min_p=1.0)) == best


def test_what_is_drawn_follows_the_distribution(context: Context) -> None:
    logits = prompt_logits(context).astype(np.float64) / 3.0
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    counts = np.zeros(len(expected))
    n = 2000
    for seed in range(n):
        with contextlib.closing(
            open_sampler(context.model, Sampling(temperature=3.0, seed=seed))
        ) as sampler:
            counts[sampler.sample(context, -1, logits.astype(np.float32))] += 1
    spread = np.sqrt(expected * (1 - expected) / n)
    likely = expected > 0.01
    assert likely.sum() > 3
    assert (abs(counts / n - expected) < 5 * spread)[likely].all()


def test_top_k_and_min_p_keep_what_they_should(context: Context) -> None:
    logits = prompt_logits(context)
    best = set(np.argsort(-logits)[:3].tolist())
    drawn = {draw(context, Sampling(temperature=9.0, top_k=3, seed=s)) for s in range(40)}
    assert drawn == best
    kept = set(np.flatnonzero(logits >= logits.max() + np.log(0.05)).tolist())
    drawn = {draw(context, Sampling(temperature=9.0, min_p=0.05, seed=s)) for s in range(60)}
    assert drawn <= kept


def test_the_same_seed_gives_the_same_tokens(context: Context) -> None:
    hot = [generate(context, Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    for seed in (2**32 - 1, 2**64 - 1):  # llama.cpp takes the first for "any"
        a, b = (generate(context, Sampling(temperature=2.0, seed=seed)) for _ in range(2))
        assert a == b


def test_logit_bias_bans_and_forces(context: Context) -> None:
    ranked = np.argsort(-prompt_logits(context))
    first, second, last = int(ranked[0]), int(ranked[1]), int(ranked[-1])
    assert draw(context, Sampling(logit_bias=((first, -100.0),))) == second
    assert draw(context, Sampling(logit_bias=((last, 100.0),))) == last
    assert draw(context, Sampling(logit_bias=((last, 50.0), (last, 50.0)))) == last
    hot = Sampling(temperature=50.0, logit_bias=((first, -100.0),))
    assert all(first != token for token in generate(context, hot, 100))
    every = tuple((token, -100.0) for token in range(context.model.vocabulary.n_tokens))
    with pytest.raises(EngineError, match="every token is banned"):
        open_sampler(context.model, Sampling(logit_bias=every))


def test_penalties_count_what_they_say(context: Context) -> None:
    logits = prompt_logits(context)
    ranked = np.argsort(-logits)
    first, second = int(ranked[0]), int(ranked[1])
    assert logits[first] > 0
    # The repeat penalty sees the end of the prompt; the other two only what was generated.
    assert draw(context, Sampling(repeat_penalty=100.0), tail=[first]) != first
    assert draw(context, Sampling(repeat_penalty=100.0, penalty_last_n=1), [first, 5]) == first
    assert draw(context, Sampling(presence_penalty=100.0), tail=[first]) == first
    for penalties in ({"presence_penalty": 999.0}, {"frequency_penalty": 999.0}):
        n = context.model.vocabulary.n_tokens // 2
        drawn = generate(context, Sampling(**penalties), n)  # type: ignore[arg-type]
        assert len(set(drawn)) == len(drawn) == n
    assert len(set(generate(context, Sampling(), 20))) < 20
    assert second != first


def test_end_tokens_are_banned_on_request(context: Context) -> None:
    ends = context.model.vocabulary.end_tokens
    assert ends
    forced = Sampling(logit_bias=((min(ends), 100.0),))
    assert generate(context, forced, 5, ignore_eos=False) == [min(ends)]
    assert ends.isdisjoint(generate(context, forced, 5, ignore_eos=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_grammar_is_followed_to_its_end(context: Context, temperature: float, seed: int) -> None:
    sampling = Sampling(
        temperature=temperature, seed=seed, grammar='root ::= "the " ("cat" | "é€") [0-9]{2} "."'
    )
    drawn = generate(context, sampling, 60, ignore_eos=False)
    text = text_of(context, drawn).decode()
    assert text[:-3] in ("the cat", "the é€") and text[-3:-1].isdigit() and text[-1] == "."
    assert context.model.vocabulary.is_end(drawn[-1])


def test_a_grammar_ends_also_where_end_tokens_are_banned(context: Context) -> None:
    sampling = Sampling(temperature=1.0, grammar='root ::= "he" "re"')
    drawn = generate(context, sampling, 60, ignore_eos=True)
    assert text_of(context, drawn) == b"here" and drawn[-1] == -1


def test_control_tokens_never_stand_for_their_text_in_a_grammar(context: Context) -> None:
    control = context.model.vocabulary.control_ids
    name = next(text for text in control if text.startswith("<|im_start"))
    sampling = Sampling(grammar=f'root ::= "{name}"', logit_bias=((control[name], 90.0),))
    drawn = generate(context, sampling, 60, ignore_eos=False)
    assert control[name] not in drawn
    assert text_of(context, drawn).decode() == name


def test_grammar_and_seed(context: Context) -> None:
    def run(seed: int) -> list[int]:
        sampling = Sampling(temperature=20.0, seed=seed, grammar="root ::= [a-z]{30}")
        return generate(context, sampling, 60)

    assert run(5) == run(5) != run(6)


@pytest.mark.parametrize(
    "grammar",
    [
        "nonsense",
        'other ::= "a"',
        'root ::= missing',
        'root ::= root "a" | "b"',
        'root ::= a root "y" | "x"\na ::= b\nb ::= ""',
        'root ::= "a"{5,2}',
        'root ::= "a"{1,99999999}',
        "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
        'root ::= "\0"',
        'root ::= "unfinished',
        'root ::= [z-a]',
    ],
)  # fmt: skip
def test_a_bad_grammar_is_refused(model: Model, grammar: str) -> None:
    with pytest.raises(InvalidGrammar):
        open_sampler(model, Sampling(grammar=grammar))


def test_a_grammar_that_no_token_fits_is_an_error(context: Context) -> None:
    vocabulary = context.model.vocabulary
    letters = [t for t in range(vocabulary.n_tokens) if b"q" in vocabulary.decode([t])]
    bias = tuple((token, -100.0) for token in letters)
    with pytest.raises(InvalidGrammar, match="no token"):
        generate(context, Sampling(grammar='root ::= "q"', logit_bias=bias), ignore_eos=False)
    # An end token is not a way out while the grammar goes on.
    with pytest.raises(InvalidGrammar, match="no token"):
        generate(context, Sampling(temperature=1.0, grammar='root ::= "q"', logit_bias=bias))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"penalty_last_n": -1}, "penalty_last_n"),
        ({"seed": -1}, "seed"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((10**9, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    model: Model, settings: dict[str, object], name: str
) -> None:
    with pytest.raises(EngineError, match=name):
        open_sampler(model, Sampling(**settings))  # type: ignore[arg-type]


def test_every_wrong_setting_is_named_at_once(model: Model) -> None:
    with pytest.raises(EngineError) as raised:
        open_sampler(model, Sampling(temperature=-1, top_p=7, seed=-3))
    assert len(raised.value.problems) == 3


def test_logits_that_are_no_numbers_are_an_error(model: Model, tmp_path: Path) -> None:
    adapter = pico.write_random_lora(tmp_path / "a.gguf", model.base.path)
    with open_context(model, n_ctx=64, exact=True) as context:
        context.apply([WeightedAdapter(adapter, 1e30)])
        logits = read(context, context.model.vocabulary.tokenize(PROMPT))
        assert not np.isfinite(logits.max())
        for sampling in (Sampling(), Sampling(temperature=1.0, top_k=5)):
            with (
                contextlib.closing(open_sampler(model, sampling)) as sampler,
                pytest.raises(EngineError, match="not a number"),
            ):
                sampler.sample(context, -1, logits)


def test_a_token_that_was_no_output_cannot_be_sampled(context: Context) -> None:
    logits = prompt_logits(context)
    with contextlib.closing(open_sampler(context.model, Sampling())) as sampler:
        for index in (0, 99, -2):
            with pytest.raises(EngineError, match="not an output"):
                sampler.sample(context, index, logits)
        context.batch.clear()
        with pytest.raises(EngineError, match="not an output"):
            sampler.sample(context, -1, logits)
