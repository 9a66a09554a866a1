"""How the next token is drawn: settings, and llama.cpp's sampler chain made of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are greedy.

    The order is llama.cpp's own: logit_bias, penalties, grammar, top_k, top_p, min_p, temperature.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: 0 is off, as are top_p 1 and min_p 0.
        repeat_penalty: on tokens among the last `penalty_last_n`, the prompt's end included.
        presence_penalty, frequency_penalty: OpenAI's, on all tokens generated (not the prompt's).
        logit_bias: (token, value) added to its logit; -100 bans it, 100 forces it.
        seed: the same one gives the same text, alone or beside others.
        grammar: GBNF with a rule `root`, or "".
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    grammar: str = ""
