"""The soak: a run on a pico model, and that each of its checks fails when it has to."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pico import Dims, write_base, write_random_lora
from test_scripts import load

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from serve_soak import questions as q  # noqa: E402
from serve_soak.alone import Answer, Step, open_alone  # noqa: E402
from serve_soak.exchange import Reply, Said  # noqa: E402
from serve_soak.verdicts import judge, judge_refusal, judge_vectors, parting  # noqa: E402
from serve_soak.watch import growth  # noqa: E402

MB = 1_000_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soak") / "base.gguf"
    return write_base(path, dims=Dims(n_ctx=2048))


@pytest.fixture(scope="module")
def adapters(base: Path) -> tuple[Path, Path]:
    first, second = (
        write_random_lora(base.parent / f"lora-{seed}.gguf", base, seed=seed) for seed in (1, 2)
    )
    return first, second


@pytest.mark.slow
def test_a_run_answers_all_as_alone(
    base: Path, adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    soak = load("soak")
    monkeypatch.setattr(soak, "N_CTX", 2048)
    monkeypatch.setattr(soak, "N_BEFORE", 1)
    monkeypatch.setattr(soak, "MAX_GROWTH", 1.0)  # of a run of seconds nothing can be said
    outcome = soak.soak(soak.Setting(base, adapters, n_threads=1), 40, seed=0)
    assert outcome.problems == []
    assert {kind for kind, _ in outcome.verdicts} == {*q._KINDS, "refused"}
    assert set(outcome.n_left) == set(q.LEAVING)
    assert outcome.counted["edgelora_requests_cancelled_total"] > 0
    lines = soak.report(outcome)
    assert lines[-1] == "soak: passed" and "152 in" in lines[0]
    outcome.problems.append("a leak")
    assert soak.report(outcome)[-2:] == ["PROBLEM: a leak", "soak: failed"]


def test_adapter_sets_have_answers_of_their_own(base: Path, adapters: tuple[Path, Path]) -> None:
    paths = {path.stem: path for path in adapters}
    asked = [question for question in q.pool("base", *paths) if question.kind == "chat"]
    with open_alone(base, paths, n_threads=1, n_ctx=512) as alone:
        same = asked[0]
        told = [
            alone.answers(q.Question("chat", q.CHAT, same.body, weights))[0].steps[0].logprob
            for _, weights in q.adapter_sets("base", *paths)
        ]
    assert len(set(told)) == 4 and told[0] == told[-1]


def test_every_turn_is_drawn_and_each_question_comes_before_any_comes_again() -> None:
    questions = q.pool("base", "a", "b")
    turns = q.order(questions, 3 * len(questions), seed=5)
    assert turns == q.order(questions, 3 * len(questions), seed=5)
    first = [turn.question for turn in turns[: len(questions)]]
    assert sorted(first) == list(range(len(questions)))
    refused = [turn for turn in turns if questions[turn.question].status != 200]
    assert refused and not any(turn.leaves or turn.streamed for turn in refused)
    assert {turn.leaves for turn in turns} == {"", *q.LEAVING}


ASKED = q.Question("chat", q.CHAT, {"logprobs": True})
ALONE = Answer(
    "abc", "stop", (Step(b"a", -1.0, 2.0), Step(b"b", -2.0, 5e-4), Step(b"c", -3.0, 1.0),
                    Step(b"", -0.5, 1.0)),
)  # fmt: skip


def judged(
    text: str, logprobs: list[float | None], reason: str = "stop", *, may_part: bool = False
) -> tuple[str, int]:
    reply = Reply(200, {0: Said(text, reason, logprobs)})
    verdict = judge(ASKED, reply, [ALONE], lambda i, text: may_part)
    return verdict.wrong, verdict.n_ties


def test_answers_are_held_to_those_alone() -> None:
    assert judged("abc", [-1.0, -2.0, -3.0005, -0.5]) == ("", 0)
    assert "2.0e-03" in judged("abc", [-1.0, -2.002, -3.0])[0]
    assert "finish_reason" in judged("abc", [], "length")[0]
    assert judged("axy", [-1.0, -9.0, -9.0]) == ("", 1)  # b led by less than 1e-3 only
    assert "'xbc'" in judged("xbc", [-9.0])[0]
    assert judged("xbc", [-9.0], may_part=True) == ("", 1)
    assert "'abcd'" in judged("abcd", [-1.0, -2.0, -3.0])[0]
    assert "'ab'" in judged("ab", [-1.0, -2.0])[0]
    assert parting("ab", ALONE) == 2 and parting("abcd", ALONE) == 3
    assert "choices" in judge(ASKED, Reply(200), [ALONE], lambda i, text: True).wrong
    failed = Reply(200, {0: Said("abc", "stop")}, error={"message": "broken"})
    assert "broken" in judge(ASKED, failed, [ALONE], lambda i, text: True).wrong


def test_missing_log_probabilities_are_wrong() -> None:
    assert "log-probabilities" in judged("abc", [-1.0, -2.0])[0]


def test_embeddings_and_refusals_are_held_to_what_was_to_come() -> None:
    vectors = np.array([[0.6, 0.8]], np.float32)
    assert judge_vectors(Reply(200, vectors=[[0.6, 0.8]]), vectors).wrong == ""
    assert "differ" in judge_vectors(Reply(200, vectors=[[0.602, 0.8]]), vectors).wrong
    assert judge_vectors(Reply(200), vectors).wrong
    error = {"message": "no", "type": "invalid_request_error"}
    assert judge_refusal(Reply(400, error=error), 400).wrong == ""
    assert judge_refusal(Reply(500, error=error), 400).wrong
    assert judge_refusal(Reply(400), 400).wrong


def test_memory_that_grew_or_shrank_is_told() -> None:
    assert growth(100 * MB, 102 * MB, 0.02) == "" == growth(100 * MB, 98 * MB, 0.02)
    assert "102000001 bytes" in growth(100 * MB, 102 * MB + 1, 0.02)
    assert growth(100 * MB, 97 * MB, 0.02)
