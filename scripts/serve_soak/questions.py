"""What the soak asks: distinct requests over several adapter sets, and the order of the clients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Body = dict[str, Any]
Weights = tuple[tuple[str, float], ...]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
N_TOKENS = 12
LONG_TOKENS = 256  # of the answers that a client does not wait for
LEAVING = ("while sending", "while waiting", "in the stream")
_N_SETTLING, _SETTLING_WORDS = 24, 100
_N_PROMPTS = 2  # of each kind, for each adapter set
_SYSTEM = (
    "You are the help desk of a shop that sells garden tools, kitchen ware and clothes. Answer in "
    "one short sentence, be polite, and never promise a refund before the item has been seen."
)
_PROMPTS = (
    "A customer writes: the kettle leaks. What do they want to return?",
    "A customer writes: the rake lost three teeth. What do they want to return?",
    "Name three colours.",
    "Is a whale a fish? Answer yes or no.",
    "Write the word after Monday, Tuesday, Wednesday:",
    "What is seven plus five?",
    "Übersetze ins Deutsche: good morning 🙂",
    "Which of these is a planet? A. Mars B. Moon C. Sun",
)
_SCHEMA = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
    },
    "required": ["item", "size"],
    "additionalProperties": False,
}


@dataclass(frozen=True, eq=False)
class Question:
    """One request, and what is known of its answer beforehand.

    Attributes:
        body: JSON, or bytes that are none.
        weights: the adapter set that the body asks for, as names and scales; no scale is 0.
        status: what the server has to answer.
    """

    kind: str
    path: str
    body: Body | bytes
    weights: Weights = ()
    status: int = 200


@dataclass(frozen=True)
class Turn:
    """One request of the run: which question, how it is asked, and whether the client stays.

    Attributes:
        leaves: "", or one of `LEAVING`; patience: lines read, or parts of a second waited, first.
    """

    question: int
    streamed: bool
    leaves: str = ""
    patience: int = 0


def pool(base_id: str, first: str, second: str) -> list[Question]:
    """Every kind of request under every adapter set, and requests that must be refused."""
    prompts = itertools.cycle(_PROMPTS)
    questions = []
    for choice, weights in adapter_sets(base_id, first, second):
        for kind, make in _KINDS.items():
            for prompt in itertools.islice(prompts, _N_PROMPTS):
                path, body = make(prompt)
                questions.append(Question(kind, path, {**choice, **body}, weights))
        next(prompts)  # so that a kind meets other prompts in the next set, and some again
    return questions + _refused(base_id)


def adapter_sets(base_id: str, first: str, second: str) -> list[tuple[Body, Weights]]:
    """The base, each adapter, two weighted ones at once, and one at scale 0, which is the base."""
    both = [{"name": first, "scale": 0.7}, {"name": second, "scale": -0.5}]
    return [
        ({"model": base_id}, ()),
        ({"model": first}, ((first, 1.0),)),
        ({"model": second}, ((second, 1.0),)),
        ({"lora": both}, ((first, 0.7), (second, -0.5))),
        ({"lora": [{"name": second, "scale": 0}]}, ()),
    ]


def settling(base_id: str, part: int) -> list[Question]:
    """Prompts of one length, other ones for each `part`, none beginning as another does.

    There are so many that of all that was kept before nothing is kept afterwards.
    """
    texts = [f"{part}{i:02d}" + " word" * _SETTLING_WORDS for i in range(_N_SETTLING)]
    bodies = [{"model": base_id, **_completion(text, max_tokens=1)[1]} for text in texts]
    return [Question("settling", COMPLETIONS, body) for body in bodies]


def order(questions: Sequence[Question], n: int, seed: int) -> list[Turn]:
    """`n` turns: each question once, in any order, then any of them; a tenth of the clients leave.

    Those who leave ask for a long answer, so that its slot is free only if they are noticed.
    """
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(questions)) for _ in range(1 + n // len(questions))]
    return [_turn(questions[i], int(i), rng) for i in np.concatenate(rounds)[:n]]


def _turn(question: Question, number: int, rng: np.random.Generator) -> Turn:
    streamed, leaves, patience = rng.random() < 0.5, rng.random() < 0.12, int(rng.integers(1, 8))
    if question.path == EMBEDDINGS or question.status != 200:
        return Turn(number, False)
    if not leaves:
        return Turn(number, streamed)
    manner = LEAVING[rng.integers(len(LEAVING))]
    return Turn(number, manner == LEAVING[-1], manner, patience)


def body_of(question: Question, turn: Turn) -> Body | bytes:
    """The body that this turn sends."""
    if isinstance(question.body, bytes):
        return question.body
    body = {**question.body, "stream": True} if turn.streamed else question.body
    return {**body, "max_tokens": LONG_TOKENS, "ignore_eos": True} if turn.leaves else body


def _chat(prompt: str, *, system: str = "", **more: Any) -> tuple[str, Body]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}]
    return CHAT, {"messages": messages, "max_tokens": N_TOKENS, "temperature": 0, **more}


def _completion(prompt: str | list[str], **more: Any) -> tuple[str, Body]:
    return COMPLETIONS, {"prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, **more}


def _format(schema: Mapping[str, Any]) -> Body:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


_DRAWN: Body = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
_KINDS: dict[str, Callable[[str], tuple[str, Body]]] = {
    "chat": lambda p: _chat(p, logprobs=True, top_logprobs=2),
    "chat, system": lambda p: _chat(p, system=_SYSTEM, logprobs=True),
    "chat, n, seed": lambda p: _chat(p, system=_SYSTEM, n=3, **_DRAWN),
    "chat, schema": lambda p: _chat(p, response_format=_format(_SCHEMA), max_tokens=32),
    "completion": lambda p: _completion(p, logprobs=1, ignore_eos=True),
    "completion, seed": lambda p: _completion(p, n=2, logprobs=0, **_DRAWN, top_k=40),
    "completion, stop": lambda p: _completion(p, stop=["e", "\n"], ignore_eos=True),
    "completions": lambda p: _completion([p, p + " Think first."]),
    "echo": lambda p: _completion(p, echo=True, logprobs=1, max_tokens=2),
    "embeddings": lambda p: (EMBEDDINGS, {"input": [p, _SYSTEM], "encoding_format": "float"}),
}


def _refused(base_id: str) -> list[Question]:
    model = {"model": base_id}
    bodies: list[tuple[str, Body | bytes, int]] = [
        (CHAT, _chat("hi", model="no-such-model")[1], 404),
        (CHAT, {**model, **_chat("hi", temperature=9)[1]}, 400),
        (CHAT, {**model, **_chat("hi", n=1000)[1]}, 400),
        (COMPLETIONS, {**model, **_completion("word " * 5000)[1]}, 400),
        (COMPLETIONS, {**model, **_completion("hi", grammar="root ::= (")[1]}, 400),
        (COMPLETIONS, {**model, **_completion("hi", lora=[{"name": "none", "scale": 1}])[1]}, 404),
        (EMBEDDINGS, {**model, "input": []}, 400),
        (CHAT, b'{"messages": [', 400),
    ]
    return [Question("refused", path, body, status=status) for path, body, status in bodies]
