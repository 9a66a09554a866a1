"""The engine thread on pico models: every answer is the one that the engine gives alone."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pico
import pytest
from scheduling import WAIT_S, Answer, ask, scheduling, submit

from edgelora.engine.context import open_context
from edgelora.engine.embed import embed
from edgelora.engine.generate import stream
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.sampling import Sampling
from edgelora.engine.score import TokenisedExample, score
from edgelora.errors import EngineError, IncompatibleAdapter, InvalidGrammar, NotFound
from edgelora.serve.jobs import (
    AdapterSet,
    ContextOverflow,
    Draining,
    Failed,
    Finished,
    Job,
    Limits,
    Piece,
    Prefilled,
    QueueFull,
    QueueTimeout,
)
from edgelora.serve.scheduler import Scheduler

SYSTEM = "the and of to in is it you that he was for on are with his they at be this have from"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scheduler")
    base = pico.write_base(folder / "base.gguf")
    for seed, name in enumerate("ab"):
        pico.write_random_lora(folder / f"{name}.gguf", base, seed=seed + 1)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with open_model(folder / "base.gguf", ModelOptions(n_threads=1)) as model:
        yield model


@pytest.fixture(scope="module")
def sets(folder: Path) -> list[AdapterSet]:
    """The base, two adapters, and both of them weighted."""
    a, b = folder / "a.gguf", folder / "b.gguf"
    return [
        (),
        (WeightedAdapter(a),),
        (WeightedAdapter(b),),
        (WeightedAdapter(a, 0.5), WeightedAdapter(b, -0.75)),
    ]


def ids(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.vocabulary.tokenize(text))


def alone(model: Model, job: Job) -> str:
    """The text that the engine gives for a job, in a context of its own."""
    with open_context(model, n_ctx=256, n_sequences=1, kv_type="f32") as context:
        context.apply(job.adapters)
        return "".join(
            stream(context, job.prompt, max_tokens=job.max_tokens, sampling=job.sampling)
        )


def long_job(model: Model, **more: object) -> Job:
    """A job that goes on for all of its context."""
    return Job(ids(model, "is it you"), max_tokens=100, ignore_eos=True, **more)  # type: ignore[arg-type]


def prompts(model: Model, n: int) -> list[tuple[int, ...]]:
    """Prompts of many lengths that share the same beginning."""
    words = SYSTEM.split()
    return [
        ids(model, f"{SYSTEM[: 20 + 9 * (i % 4)]} {' '.join(words[i : i + 3 + i % 5])}")
        for i in range(n)
    ]


def test_interleaved_requests_of_several_sets_equal_those_computed_alone(
    model: Model, sets: list[AdapterSet]
) -> None:
    jobs = [
        Job(prompt, adapters=adapters, max_tokens=6 + i % 9)
        for i, prompt in enumerate(prompts(model, 10))
        for adapters in sets
    ]
    expected = {job: alone(model, job) for job in jobs}
    assert len(set(expected.values())) > len(jobs) // 2
    with scheduling(model, n_slots=6, n_cached_sequences=10) as scheduler:
        answers = [(job, submit(scheduler, job, streamed=i % 2 == 0)) for i, job in enumerate(jobs)]
        for job, answer in answers:
            assert answer.wait().text == expected[job]
            assert answer.finished.n_prompt == len(job.prompt)
        stats = scheduler.stats()
        assert stats.requests == {"length": len(jobs)}
        assert stats.cached_tokens_total > 0
        computed = sum(len(job.prompt) for job in jobs) - stats.cached_tokens_total
        assert stats.prompt_tokens_total == computed
        assert stats.generated_tokens_total == sum(job.max_tokens for job in jobs)
        assert stats.running == stats.queued == 0


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "phi3"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", architecture)
    adapter = pico.write_random_lora(tmp_path / "a.gguf", base)
    with open_model(base, ModelOptions(n_threads=1)) as model, scheduling(model) as scheduler:
        jobs = [
            Job(ids(model, text), adapters, max_tokens=8)
            for text in ("is it you", "is it he", SYSTEM, SYSTEM + " was")
            for adapters in ((), (WeightedAdapter(adapter),))
        ]
        answers = [submit(scheduler, job) for job in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            assert answer.wait().text == alone(model, job)


def test_a_prefix_is_reused_within_its_own_set_only(model: Model, sets: list[AdapterSet]) -> None:
    first, second = ids(model, SYSTEM + " was he"), ids(model, SYSTEM + " was it")
    n_shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    with scheduling(model) as scheduler:
        assert ask(scheduler, Job(first, sets[1], max_tokens=4)).prefilled.n_cached == 0
        for adapters in (sets[0], sets[2], sets[3], (WeightedAdapter(sets[1][0].path, 0.9),)):
            job = Job(second, adapters, max_tokens=4)
            answer = ask(scheduler, job)
            assert answer.prefilled.n_cached == 0 and answer.text == alone(model, job)
        job = Job(second, sets[1], max_tokens=4)
        answer = ask(scheduler, job)
        assert answer.prefilled.n_cached == answer.finished.n_cached == n_shared
        assert answer.text == alone(model, job)
        again = ask(scheduler, job)
        assert again.prefilled.n_cached == len(second) - 1 and again.text == answer.text


def test_a_conversation_goes_on_where_it_was(model: Model) -> None:
    with scheduling(model, n_cached_sequences=2) as scheduler:
        prompt: tuple[int, ...] = ids(model, "is it you")
        for _ in range(4):
            answer = ask(scheduler, Job(prompt, max_tokens=6, n_logprobs=0))
            said = tuple(token.token for token in answer.tokens)
            before, prompt = len(prompt), (*prompt, *said, *ids(model, " was he"))
            if before > 10:
                assert answer.prefilled.n_cached >= before - 4  # all but what was asked now
        assert scheduler.stats().cached_sequences == 1  # taken over, not copied


def test_a_changed_adapter_file_is_another_adapter(model: Model, tmp_path: Path) -> None:
    path = pico.write_random_lora(tmp_path / "x.gguf", model.base.path, seed=5)
    job = Job(ids(model, SYSTEM), (WeightedAdapter(path),), max_tokens=6)
    with scheduling(model) as scheduler:
        before = ask(scheduler, job).text
        pico.write_random_lora(tmp_path / "y.gguf", model.base.path, seed=6)
        os.replace(tmp_path / "y.gguf", path)
        after = ask(scheduler, job)
        assert after.prefilled.n_cached == 0
        assert after.text == alone(model, job) != before
    model.unload(path)


def test_equal_prompts_at_the_same_time_are_computed_once(model: Model) -> None:
    prompt = ids(model, f"{SYSTEM} {SYSTEM}")
    with scheduling(model, n_slots=4) as scheduler:
        first, go_on = held_job(scheduler, long_job(model))
        jobs = [
            Job(prompt, max_tokens=5, sampling=Sampling(temperature=2.0, seed=seed))
            for seed in range(6)
        ]
        answers = [submit(scheduler, job) for job in jobs]
        go_on.set()
        for job, answer in zip(jobs, answers, strict=True):
            assert answer.wait().text == alone(model, job)
        n_cached = [answer.prefilled.n_cached for answer in answers]
        assert n_cached == [0] + [len(prompt) - 1] * 5
        first.wait()


def test_a_small_cache_drops_finished_requests_and_never_running_ones(model: Model) -> None:
    jobs = [
        Job(ids(model, f"{word} {SYSTEM[i : i + 40]}"), max_tokens=12)
        for i, word in enumerate(SYSTEM.split())
    ]
    with scheduling(model, n_slots=2, n_ctx=64, n_cached_sequences=20) as scheduler:
        answers = [submit(scheduler, job) for job in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            assert answer.wait().text == alone(model, job)
        stats = scheduler.stats()
        assert stats.cells_used <= stats.cells_total == 128
        assert 0 < stats.cached_sequences < 12


def test_what_left_the_kv_cache_is_copied_back(model: Model, sets: list[AdapterSet]) -> None:
    first, second = ids(model, f"{SYSTEM} {SYSTEM}"), ids(model, f"was he {SYSTEM}")
    with scheduling(model, n_slots=2, n_cached_sequences=1) as scheduler:
        for adapters in sets[:2]:
            ask(scheduler, Job(first, adapters, max_tokens=4))
            ask(scheduler, Job(second, adapters, max_tokens=4))
        stats = scheduler.stats()
        assert (stats.cached_sequences, stats.stored_sequences) == (1, 3)
        assert stats.cached_tokens_total == 0 < stats.stored_bytes
        for adapters in sets[:2]:
            job = Job((*first[:30], *ids(model, "is it you")), adapters, max_tokens=9)
            answers = [submit(scheduler, job) for _ in range(2)]
            for answer in answers:
                assert answer.wait().text == alone(model, job)
            assert answers[0].prefilled.n_cached == 30
        assert scheduler.stats().copy_s_total > 0
        scheduler.unload(sets[1][0].path).result(WAIT_S)
        # What is left is the base's; the other set's finished sequences and copies are gone.
        assert ask(scheduler, Job(first, sets[1], max_tokens=1)).prefilled.n_cached == 0
        assert ask(scheduler, Job(first, max_tokens=1)).prefilled.n_cached == len(first) - 1


@pytest.mark.parametrize(
    ("cache_bytes", "kept"), [(256 << 20, (1, 1)), (100_000, (2, 0))], ids=["roomy", "small"]
)
def test_finished_requests_leave_the_kv_cache_where_memory_holds_them(
    model: Model, cache_bytes: int, kept: tuple[int, int]
) -> None:
    with scheduling(model, n_cached_sequences=8, cache_bytes=cache_bytes) as scheduler:
        for text in (SYSTEM, f"was {SYSTEM}"):
            ask(scheduler, Job(ids(model, text), max_tokens=4))
        stats = scheduler.stats()
        assert (stats.cached_sequences, stats.stored_sequences) == kept
        again = Job(ids(model, SYSTEM), max_tokens=4)
        answer = ask(scheduler, again)
        assert answer.prefilled.n_cached == len(again.prompt) - 1
        assert answer.text == alone(model, again)


def test_nothing_is_copied_for_layers_that_see_a_window(tmp_path: Path) -> None:
    path = pico.write_base(tmp_path / "base.gguf")
    with open_model(path, ModelOptions(n_threads=1)) as model:
        assert not model.has_windows
        model.has_windows = True
        with scheduling(model, n_slots=1, n_cached_sequences=1) as scheduler:
            for text in (SYSTEM, f"was {SYSTEM}"):
                ask(scheduler, Job(ids(model, text), max_tokens=4))
            assert scheduler.stats().stored_sequences == 0


def test_nothing_is_kept_where_nothing_may_be(model: Model) -> None:
    job = Job(ids(model, SYSTEM), max_tokens=4)
    with scheduling(model, n_cached_sequences=0) as scheduler:
        assert ask(scheduler, job).text == ask(scheduler, job).text == alone(model, job)
        stats = scheduler.stats()
        assert stats.cached_tokens_total == stats.cells_used == stats.cached_sequences == 0


@pytest.mark.parametrize("streamed", [True, False])
def test_events_come_in_order(model: Model, streamed: bool) -> None:
    job = Job(ids(model, "is it you"), max_tokens=8)
    with scheduling(model) as scheduler:
        answer = ask(scheduler, job, streamed=streamed)
    kinds = [type(event) for event in answer.events]
    assert kinds[0] is Prefilled and kinds[-1] is Finished
    assert set(kinds[1:-1]) == {Piece}
    assert (len(kinds) == 3) != streamed
    assert answer.text == alone(model, job)
    timings = answer.finished.timings
    assert min(timings.queued_s, timings.prompt_s, timings.generated_s) >= 0
    assert (answer.finished.reason, answer.finished.stop) == ("length", None)


def test_stop_strings_over_token_borders(model: Model) -> None:
    job = Job(ids(model, "is it you"), max_tokens=40, sampling=Sampling(temperature=1.5, seed=3))
    whole = alone(model, job)
    assert len(whole) > 12
    stop = whole[6:11]
    expected = whole[: whole.index(stop)]
    with scheduling(model) as scheduler:
        for streamed in (True, False):
            cut = Job(job.prompt, max_tokens=40, sampling=job.sampling, stop=("never", stop))
            answer = ask(scheduler, cut, streamed=streamed)
            assert answer.text == expected
            assert (answer.finished.reason, answer.finished.stop) == ("stop", stop)
            assert answer.finished.n_generated < 40
            for piece in answer.pieces:
                assert stop not in piece.text


def test_an_end_token_ends_an_answer_without_text(model: Model) -> None:
    end = min(model.vocabulary.end_tokens)
    forced = Sampling(logit_bias=((end, 100.0),))
    control = model.vocabulary.control_ids["<|im_start|>"]
    with scheduling(model) as scheduler:
        answer = ask(scheduler, Job(ids(model, "is it you"), max_tokens=9, sampling=forced))
        assert answer.text == "" and answer.pieces == []
        assert (answer.finished.reason, answer.finished.n_generated) == ("stop", 1)
        ignored = ask(
            scheduler, Job(ids(model, "is it"), max_tokens=9, sampling=forced, ignore_eos=True)
        )
        assert (ignored.finished.reason, ignored.finished.n_generated) == ("length", 9)
        silent = Sampling(logit_bias=((control, 100.0),))
        answer = ask(
            scheduler, Job(ids(model, "is it"), max_tokens=5, sampling=silent, n_logprobs=0)
        )
        assert answer.text == "" and [t.token for t in answer.tokens] == [control] * 5


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(model: Model) -> None:
    jobs = [
        Job(ids(model, text), max_tokens=20, sampling=Sampling(temperature=1.5, seed=seed))
        for seed, text in itertools.product((1, 2**32 - 1), ("is it you", "was he", SYSTEM))
    ]
    expected = [alone(model, job) for job in jobs]
    with scheduling(model, n_slots=6) as scheduler:
        for _ in range(2):
            answers = [submit(scheduler, job) for job in jobs]
            assert [answer.wait().text for answer in answers] == expected


def test_log_probabilities_of_an_answer_equal_scores(model: Model, sets: list[AdapterSet]) -> None:
    prompt = ids(model, SYSTEM)
    with scheduling(model) as scheduler:
        answer = ask(scheduler, Job(prompt, sets[1], max_tokens=7, n_logprobs=3))
    tokens = tuple(token.token for token in answer.tokens)
    assert len(tokens) == 7
    assert b"".join(t.text for t in answer.tokens).decode("utf-8", "replace") == answer.text
    with open_context(model, n_ctx=256, kv_type="f32") as context:
        context.apply(sets[1])
        for n in range(1, 8):
            (scored,) = score(context, [TokenisedExample(prompt, tokens[:n])])
            total = sum(token.logprob or 0.0 for token in answer.tokens[:n])
            assert scored.nll == pytest.approx(-total, abs=1e-3)
    for token in answer.tokens:
        assert len(token.top) == 3
        assert token.top[0][0] == token.token and token.top[0][2] == token.logprob
        assert token.top[0][2] >= token.top[1][2] >= token.top[2][2]


@pytest.mark.parametrize("n_batch", [512, 16])
def test_prompt_log_probabilities_equal_scores(model: Model, n_batch: int) -> None:
    prompt = ids(model, " ".join([SYSTEM] * 4))
    assert len(prompt) > 64  # more than one batch has outputs
    with scheduling(model, n_ctx=256, n_batch=n_batch) as scheduler:
        ask(scheduler, Job(prompt, max_tokens=1))  # what is cached has no logits
        others = [submit(scheduler, Job(ids(model, "is it"), max_tokens=90)) for _ in range(3)]
        scored = ask(scheduler, Job(prompt, max_tokens=0, prompt_logprobs=2))
        both = ask(scheduler, Job(prompt, max_tokens=4, prompt_logprobs=0, n_logprobs=0))
        for other in others:
            other.wait()
    assert scored.finished.reason == "length" and scored.finished.n_generated == 0
    assert scored.prefilled.n_cached == 0 and scored.pieces == []
    tokens = scored.prefilled.prompt
    assert [token.token for token in tokens] == list(prompt)
    assert tokens[0].logprob is None and tokens[0].top == ()
    with open_context(model, n_ctx=256, kv_type="f32") as context:
        for n in (1, 40, len(prompt) - 1):
            (whole,) = score(context, [TokenisedExample(prompt[:n], prompt[n:])])
            total = sum(token.logprob or 0.0 for token in tokens[n:])
            assert whole.nll == pytest.approx(-total, abs=1e-3)
    for token in tokens[1:]:
        assert token.logprob is not None
        assert len(token.top) == 2 and token.top[0][2] >= max(token.top[1][2], token.logprob)
    assert [t.logprob for t in both.prefilled.prompt[1:]] == pytest.approx(
        [t.logprob for t in tokens[1:]], abs=1e-3
    )
    assert both.text == alone(model, Job(prompt, max_tokens=4))
    assert len(both.tokens) == 4


def test_a_prompt_of_one_token_and_a_prompt_only(model: Model) -> None:
    (first,) = ids(model, "the")[:1]
    with scheduling(model) as scheduler:
        assert ask(scheduler, Job((first,), max_tokens=3)).text == alone(
            model, Job((first,), max_tokens=3)
        )
        only = ask(scheduler, Job(ids(model, SYSTEM), max_tokens=0))
        assert [type(event) for event in only.events] == [Prefilled, Finished]
        assert ask(scheduler, Job((first,), max_tokens=0, prompt_logprobs=1)).prefilled.prompt == (
            only.prefilled.prompt or ask(
                scheduler, Job((first,), max_tokens=1, prompt_logprobs=0)
            ).prefilled.prompt
        )  # fmt: skip


def test_a_grammar_beside_others(model: Model) -> None:
    constrained = Job(
        ids(model, SYSTEM), max_tokens=60,
        sampling=Sampling(temperature=9.0, grammar='root ::= "{" [a-z]{5} ":" [0-9]+ "}"'),
    )  # fmt: skip
    free = Job(ids(model, "is it you"), max_tokens=20)
    with scheduling(model) as scheduler:
        answers = [submit(scheduler, job) for job in (constrained, free, constrained)]
        texts = [answer.wait().text for answer in answers]
    assert texts[0] == texts[2] and texts[0][:1] == "{" and texts[0][6] == ":"
    assert texts[1] == alone(model, free)


def test_a_failed_grammar_hurts_nobody_else(model: Model) -> None:
    vocabulary = model.vocabulary
    bias = tuple((t, -100.0) for t in range(vocabulary.n_tokens) if b"q" in vocabulary.decode([t]))
    bad = Sampling(grammar='root ::= [a-z]{3} "q"', logit_bias=bias)
    good = Job(ids(model, "is it you"), max_tokens=30)
    with scheduling(model) as scheduler:
        with pytest.raises(InvalidGrammar):
            submit(scheduler, Job(good.prompt, sampling=Sampling(grammar="root ::= missing")))
        answers = [submit(scheduler, good)]
        failing = [submit(scheduler, Job(good.prompt, max_tokens=30, sampling=bad))]
        answers.append(submit(scheduler, good))
        for answer in failing:
            assert isinstance(answer.wait().failed.error, InvalidGrammar)
        for answer in answers:
            assert answer.wait().text == alone(model, good)
        assert scheduler.stats().requests == {"length": 2, "failed": 1}
        assert ask(scheduler, good).text == alone(model, good)


def test_an_adapter_that_does_not_fit_fails_alone(model: Model, tmp_path: Path) -> None:
    other = pico.write_base(tmp_path / "other.gguf", dims=pico.Dims(n_embd=64))
    bad = pico.write_random_lora(tmp_path / "bad.gguf", other)
    good = Job(ids(model, "is it you"), max_tokens=30)
    with scheduling(model) as scheduler:
        answer = submit(scheduler, good)
        wrong = ask(scheduler, Job(good.prompt, (WeightedAdapter(bad),)))
        assert isinstance(wrong.failed.error, IncompatibleAdapter)
        huge = tmp_path / "huge.gguf"
        pico.write_random_lora(huge, model.base.path)
        loud = ask(scheduler, Job(good.prompt, (WeightedAdapter(huge, 1e30),)))
        assert "not a number" in str(loud.failed.error)
        with pytest.raises(NotFound):
            submit(scheduler, Job(good.prompt, (WeightedAdapter(tmp_path / "none.gguf"),)))
        assert answer.wait().text == alone(model, good)
        scheduler.unload(huge).result(WAIT_S)


def test_impossible_jobs_are_refused(model: Model) -> None:
    prompt = ids(model, f"{SYSTEM} {SYSTEM}")
    with scheduling(model, n_ctx=40) as scheduler:
        with pytest.raises(ContextOverflow) as raised:
            submit(scheduler, Job(prompt[:30], max_tokens=11))
        error = raised.value
        assert (error.n_prompt, error.max_tokens, error.n_ctx) == (30, 11, 40)
        assert ask(scheduler, Job(prompt[:30], max_tokens=10)).finished.n_generated == 10
        with pytest.raises(EngineError, match="empty prompt"):
            submit(scheduler, Job(()))
        for token in (-1, model.vocabulary.n_tokens):
            with pytest.raises(EngineError, match="outside the vocabulary"):
                submit(scheduler, Job((1, token)))
            with pytest.raises(EngineError, match="outside the vocabulary"):
                scheduler.embed([(token,)], ())
        with pytest.raises(EngineError, match="max_tokens"):
            submit(scheduler, Job(prompt[:3], max_tokens=-1))
        with pytest.raises(EngineError, match="temperature"):
            submit(scheduler, Job(prompt[:3], sampling=Sampling(temperature=-1)))


def test_limits_keep_to_the_model(model: Model) -> None:
    scheduler = Scheduler(model, Limits(n_ctx=10**6, n_cached_sequences=10**6))
    assert scheduler.limits.n_ctx == model.n_ctx_train
    assert scheduler.limits.n_cached_sequences == 252
    for wrong in (Limits(n_slots=0), Limits(n_slots=300), Limits(n_ctx=0), Limits(16, n_batch=8)):
        with pytest.raises(EngineError, match="slots"):
            Scheduler(model, wrong)
    with pytest.raises(EngineError, match="no KV type"):
        Scheduler(model, Limits(kv_type="q3")).start()


def test_quantised_cells(tmp_path: Path) -> None:
    dims = pico.Dims(n_embd=64, n_head=2, n_head_kv=1, head_dim=32)
    base = pico.write_base(tmp_path / "base.gguf", dims=dims)
    with open_model(base, ModelOptions(n_threads=1)) as model:
        for kv_type in ("f16", "q8_0", "q4_0"):
            with scheduling(model, kv_type=kv_type) as scheduler:
                job = Job(ids(model, SYSTEM), max_tokens=8)
                assert ask(scheduler, job).finished.n_generated == 8


def paused(answer: Answer) -> threading.Event:
    """Hold the engine thread at the next event of this answer until the returned one is set."""
    go_on, emit = threading.Event(), answer.emit

    def held(event: object) -> None:
        emit(event)  # type: ignore[arg-type]
        go_on.wait(WAIT_S)

    answer.emit = held  # type: ignore[method-assign,assignment]
    return go_on


def held_job(scheduler: Scheduler, job: Job) -> tuple[Answer, threading.Event]:
    """Submit a job and hold the engine thread where its prompt is computed."""
    answer = Answer()
    go_on = paused(answer)
    answer.ticket = scheduler.submit(job, answer.emit, streamed=True)
    answer.next()
    return answer, go_on


def test_cancelling_frees_the_slot_and_says_no_more(model: Model) -> None:
    with scheduling(model, n_slots=1) as scheduler:
        first, go_on = held_job(scheduler, long_job(model))
        second = submit(scheduler, Job(ids(model, "was he"), max_tokens=3))
        waiting = submit(scheduler, Job(ids(model, "was he"), max_tokens=3))
        assert scheduler.stats().queued == 2
        assert first.ticket is not None and waiting.ticket is not None
        waiting.ticket.cancel()
        assert scheduler.stats().queued == 1
        first.ticket.cancel()
        first.ticket.cancel()
        go_on.set()
        assert second.wait().text == alone(model, Job(ids(model, "was he"), max_tokens=3))
        assert first.is_silent() and waiting.is_silent()
        stats = scheduler.stats()
        assert stats.cancelled_total == 2 and stats.running == 0
        assert stats.generated_tokens_total < 10
        second.ticket.cancel()  # type: ignore[union-attr]
        assert scheduler.stats().cancelled_total == 2


def test_a_request_whose_listener_is_gone_is_cancelled(model: Model) -> None:
    def gone(event: object) -> None:
        raise RuntimeError("Event loop is closed")

    with scheduling(model, n_slots=1) as scheduler:
        scheduler.submit(long_job(model), gone, streamed=True)
        assert ask(scheduler, Job(ids(model, "was he"), max_tokens=3)).finished.n_generated == 3
        assert scheduler.stats().cancelled_total == 1


def test_a_full_queue_refuses_and_says_when_to_come_again(model: Model) -> None:
    job = Job(ids(model, "was he"), max_tokens=3)
    with scheduling(model, n_slots=1, max_queue=2) as scheduler:
        _, go_on = held_job(scheduler, long_job(model))
        waiting = [submit(scheduler, job) for _ in range(2)]
        with pytest.raises(QueueFull) as raised:
            submit(scheduler, job)
        assert 1 <= raised.value.retry_after_s <= 60
        assert scheduler.stats().rejected_total == 1
        go_on.set()
        for answer in waiting:
            assert answer.wait().finished.n_generated == 3
        assert ask(scheduler, job).finished.n_generated == 3


def test_a_request_that_waits_too_long_is_told(model: Model) -> None:
    with scheduling(model, n_slots=1, queue_timeout_s=0.0) as scheduler:
        first, go_on = held_job(scheduler, long_job(model))
        late = submit(scheduler, Job(ids(model, "was he"), max_tokens=3))
        go_on.set()
        assert isinstance(late.wait().failed.error, QueueTimeout)
        assert first.wait().finished.reason == "length"


def test_a_long_answer_of_one_set_does_not_starve_another(
    model: Model, sets: list[AdapterSet]
) -> None:
    with scheduling(model, n_slots=3, n_ctx=512) as scheduler:
        long = Job(ids(model, "is it you"), sets[1], max_tokens=480, ignore_eos=True)
        first, go_on = held_job(scheduler, long)
        others = [submit(scheduler, Job(ids(model, "was"), s, max_tokens=5)) for s in sets[:2]]
        go_on.set()
        for other in others:
            other.wait()
        assert first.wait().finished.n_generated == 480


def test_draining_finishes_what_there_is_and_refuses_what_comes(model: Model) -> None:
    with scheduling(model, n_slots=1) as scheduler:
        job = Job(ids(model, "was he"), max_tokens=3)
        _, go_on = held_job(scheduler, long_job(model))
        waiting = submit(scheduler, job)
        assert scheduler.drain(0.01) is False
        assert scheduler.state == "draining"
        with pytest.raises(Draining):
            submit(scheduler, job)
        go_on.set()
        assert scheduler.drain(WAIT_S) is True
        assert waiting.wait().finished.n_generated == 3


def test_stopping_answers_everybody(model: Model) -> None:
    scheduler = Scheduler(model, Limits(n_slots=1, n_ctx=512, kv_type="f32"))
    with pytest.raises(Draining, match="starting"):
        submit(scheduler, long_job(model))
    scheduler.start()
    assert scheduler.state == "ready"
    long = Job(ids(model, "is it you"), max_tokens=500, ignore_eos=True)
    first, go_on = held_job(scheduler, long)
    second = submit(scheduler, long)
    threading.Timer(0.05, go_on.set).start()
    scheduler.stop()
    assert scheduler.state == "stopped"
    for answer in (first, second):
        assert isinstance(answer.wait().failed.error, Draining)
    with pytest.raises(Draining):
        submit(scheduler, long)
    with pytest.raises(Draining):
        scheduler.embed([(1,)], ())
    scheduler.stop()


def test_a_stopped_batch_is_dropped_and_the_next_one_runs(model: Model) -> None:
    """The abort flag is raised when the batch is published, so the decode is stopped for sure."""
    done = threading.Event()
    with scheduling(model) as scheduler:
        context = scheduler._context
        assert context is not None
        resume = context.resume

        def abort_at_once() -> None:
            if not done.is_set():
                for request in scheduler._computing:
                    request.cancelled = True
                context.abort()
                done.set()
            else:
                resume()

        context.resume = abort_at_once  # type: ignore[method-assign]
        job = Job(ids(model, SYSTEM), max_tokens=3)
        stopped = submit(scheduler, job)
        assert done.wait(WAIT_S) and scheduler.drain(WAIT_S)
        stats = scheduler.stats()
        assert stats.requests == {"cancelled": 1} and stats.cells_used == 0
        scheduler._state = "ready"
        assert ask(scheduler, job).text == alone(model, job)
        assert stopped.is_silent()


def test_a_crash_of_the_engine_tells_everybody(model: Model) -> None:
    failures: list[BaseException] = []
    failed = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        failed.set()

    scheduler = Scheduler(model, Limits(n_slots=1, n_ctx=128), on_failure=on_failure)
    scheduler.start()
    answers = []
    first = Answer()

    def crash(event: object) -> None:
        answers.append(submit(scheduler, long_job(model)))
        first.emit(event)  # type: ignore[arg-type]
        if isinstance(event, Prefilled):
            raise ZeroDivisionError("a bug")

    scheduler.submit(long_job(model), crash, streamed=True)
    assert failed.wait(WAIT_S)
    assert isinstance(failures[0], ZeroDivisionError) and scheduler.failure is failures[0]
    assert scheduler.state == "failed"
    assert isinstance(first.wait().failed.error, EngineError)
    assert isinstance(answers[0].wait().events[-1], Failed)
    with pytest.raises(Draining):
        submit(scheduler, long_job(model))
    assert scheduler.drain(0.0) is True
    scheduler.stop()


def test_embeddings_beside_answers(model: Model, sets: list[AdapterSet]) -> None:
    texts: Sequence[tuple[int, ...]] = [*prompts(model, 6), ids(model, SYSTEM) * 12, ()]
    job = Job(ids(model, "is it you"), max_tokens=60)
    with scheduling(model) as scheduler:
        answer = submit(scheduler, job)
        futures = [scheduler.embed(texts, adapters) for adapters in sets]
        cancelled = scheduler.embed(texts, ())
        assert cancelled.cancel()
        early = scheduler.embed(texts, (), n_layers=1).result(WAIT_S)
        found = [future.result(WAIT_S) for future in futures]
        assert answer.wait().text == alone(model, job)
    with open_context(model, n_ctx=512, hidden=True) as context:
        for adapters, vectors in zip(sets, found, strict=True):
            context.apply(adapters)
            expected = embed(context, texts)
            assert vectors.dtype == np.float32 and vectors.shape == expected.shape
            np.testing.assert_allclose(vectors, expected, atol=2e-2)
        context.apply(())
        np.testing.assert_allclose(early, embed(context, texts, 1), atol=2e-2)
    assert abs(found[0] - found[1]).max() > 0.05 < abs(found[0] - early).max()


def test_adapters_come_and_go(model: Model, tmp_path: Path) -> None:
    path = pico.write_random_lora(tmp_path / "x.gguf", model.base.path, seed=9)
    job = Job(ids(model, SYSTEM), (WeightedAdapter(path),), max_tokens=4)
    with scheduling(model) as scheduler:
        scheduler.load(path).result(WAIT_S)
        with pytest.raises(NotFound):
            scheduler.load(tmp_path / "none.gguf").result(WAIT_S)
        text = ask(scheduler, job).text
        scheduler.embed([job.prompt], job.adapters).result(WAIT_S)
        assert scheduler.stats().cached_sequences == 1
        scheduler.unload(path).result(WAIT_S)
        assert scheduler.stats().cached_sequences == 0
        again = ask(scheduler, job)
        assert again.prefilled.n_cached == 0 and again.text == text


def test_an_adapter_in_use_goes_when_its_last_request_is_done(model: Model, tmp_path: Path) -> None:
    path = pico.write_random_lora(tmp_path / "x.gguf", model.base.path, seed=9)
    with scheduling(model, n_slots=1) as scheduler:
        first, go_on = held_job(scheduler, long_job(model, adapters=(WeightedAdapter(path),)))
        second = submit(scheduler, long_job(model, adapters=(WeightedAdapter(path),)))
        unloaded = scheduler.unload(path)
        go_on.set()
        assert first.wait().finished.reason == "length"
        assert second.wait().finished.reason == "length"
        unloaded.result(WAIT_S)
