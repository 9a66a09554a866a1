"""Whether what a client got is the answer computed alone, and how far it is from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_soak.alone import Answer, Step
from serve_soak.exchange import Reply, Said
from serve_soak.questions import Question

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """One reply beside what was to come.

    Attributes:
        wrong: what is wrong, "" if nothing is.
        worst: largest difference of a log-probability, or of a number of an embedding.
        n_compared: log-probabilities and numbers that were compared.
        n_ties: choices that went another way where two tokens were as near as `TOLERANCE`.
    """

    wrong: str = ""
    worst: float = 0.0
    n_compared: int = 0
    n_ties: int = 0


def judge(
    question: Question,
    reply: Reply,
    answers: Sequence[Answer],
    may_part: Callable[[int, str], bool],
) -> Verdict:
    """All choices of one reply.

    Args:
        may_part: for a choice and its text, whether the engine alone gives that text too when
            noise of `TOLERANCE` is added to its logits; asked where a drawn text differs.
    """
    if reply.status != 200 or reply.error is not None:
        return Verdict(f"status {reply.status}: {reply.error}")
    if sorted(reply.said) != list(range(len(answers))):
        return Verdict(f"choices {sorted(reply.said)}, not {len(answers)}")
    told = asks_all_logprobs(question)
    parts = [
        _judge_one(reply.said[i], answer, told, lambda text, i=i: may_part(i, text))
        for i, answer in enumerate(answers)
    ]
    return Verdict(
        "; ".join(part.wrong for part in parts if part.wrong),
        max(part.worst for part in parts),
        sum(part.n_compared for part in parts),
        sum(part.n_ties for part in parts),
    )


def judge_vectors(reply: Reply, vectors: NDArray[np.float32]) -> Verdict:
    """An embeddings reply: every number within `TOLERANCE`, of vectors of length 1."""
    if reply.status != 200 or len(reply.vectors) != len(vectors):
        return Verdict(f"status {reply.status}, {len(reply.vectors)} vectors: {reply.error}")
    worst = float(np.abs(np.array(reply.vectors) - vectors).max())
    wrong = f"embeddings differ by {worst:.1e}" if worst > TOLERANCE else ""
    return Verdict(wrong, worst, vectors.size)


def judge_refusal(reply: Reply, status: int) -> Verdict:
    """A request that has to be refused, with OpenAI's body."""
    told = reply.error or {}
    if reply.status == status and told.get("message") and told.get("type"):
        return Verdict()
    return Verdict(f"status {reply.status}, not {status}: {reply.error}")


def asks_all_logprobs(question: Question) -> bool:
    """Whether the answer has the log-probability of every token; a stop string hides some."""
    assert isinstance(question.body, dict)
    asked = question.body.get("logprobs")
    return asked is not None and asked is not False and "stop" not in question.body


def _judge_one(
    said: Said, answer: Answer, all_logprobs: bool, may_part: Callable[[str], bool]
) -> Verdict:
    at = parting(said.text, answer) if said.text != answer.text else None
    pairs = [
        (told, step.logprob)
        for told, step in zip(said.logprobs, answer.steps[:at], strict=False)
        if step.logprob is not None
    ]
    worst = max((abs((told or 0.0) - alone) for told, alone in pairs), default=0.0)
    compared = Verdict("", worst, len(pairs), int(at is not None))
    if worst > TOLERANCE:
        return _wrong(compared, f"a log-probability differs by {worst:.1e}")
    if at is None:
        return _wrong(compared, _in_the_details(said, answer, all_logprobs))
    if answer.steps[at].lead <= TOLERANCE or may_part(said.text):
        return compared
    return _wrong(compared, f"{said.text!r}, alone {answer.text!r}")


def _in_the_details(said: Said, answer: Answer, all_logprobs: bool) -> str:
    """What differs though the text is the same."""
    if said.reason != answer.reason:
        return f"finish_reason {said.reason}, alone {answer.reason}"
    if all_logprobs and len(said.logprobs) != len(answer.steps):
        return f"{len(said.logprobs)} log-probabilities for {len(answer.steps)} tokens"
    return ""


def _wrong(verdict: Verdict, what: str) -> Verdict:
    return Verdict(what, verdict.worst, verdict.n_compared)


def parting(text: str, answer: Answer) -> int:
    """Number of the first token alone that is not what the other text goes on with."""
    data, made = text.encode(), b""
    for i, step in enumerate(answer.steps):
        made += step.text
        if not data.startswith(made) or _is_end(step):
            return i
    return len(answer.steps) - 1


def _is_end(step: Step) -> bool:
    return not step.text
