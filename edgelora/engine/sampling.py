"""How the next token is drawn: settings, and llama.cpp's sampler chain made of them."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgelora.engine.context import Context
from edgelora.engine.grammar import MAX_GRAMMAR_BYTES, check_gbnf
from edgelora.engine.model import Model
from edgelora.engine.tokens import Vocabulary
from edgelora.errors import EngineError, InvalidGrammar

_BAN = -100.0  # OpenAI's value for a token that must not come
_GREEDY = 1e-5  # logits divided by less may overflow
_DEFAULT_SEED = 0xFFFFFFFF  # llama.cpp takes this one for "a random seed"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are greedy.

    The order is llama.cpp's own: logit_bias, penalties, grammar, top_k, top_p, min_p, temperature.

    Attributes:
        temperature: 0 (or less than 1e-5) takes the likeliest token.
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


def check_sampling(sampling: Sampling, n_vocab: int) -> None:
    """Refuse what llama.cpp would assert on, or silently take for something else.

    Raises:
        EngineError: naming every setting that is out of range.
    """
    s = sampling
    wrong = [
        (not (math.isfinite(s.temperature) and s.temperature >= 0), "temperature", s.temperature),
        (not 0 <= s.top_k < 2**31, "top_k", s.top_k),
        (not 0 < s.top_p <= 1, "top_p", s.top_p),
        (not 0 <= s.min_p <= 1, "min_p", s.min_p),
        (not 1e-3 <= s.repeat_penalty <= 1e3, "repeat_penalty", s.repeat_penalty),
        (not abs(s.presence_penalty) <= 1e3, "presence_penalty", s.presence_penalty),
        (not abs(s.frequency_penalty) <= 1e3, "frequency_penalty", s.frequency_penalty),
        (not 0 <= s.penalty_last_n < 2**20, "penalty_last_n", s.penalty_last_n),
        (not 0 <= s.seed < 2**64, "seed", s.seed),
    ]  # fmt: skip
    problems = [f"{name}: {value}" for is_wrong, name, value in wrong if is_wrong]
    problems += [
        f"logit_bias: token {token}, value {value}"
        for token, value in s.logit_bias
        if not (0 <= token < n_vocab and abs(value) <= 1e3)
    ]
    if problems:
        raise EngineError("sampling settings that are out of range", problems=problems)


class Sampler:
    """llama.cpp samplers with the state of one answer (its tokens, its random numbers).

    Attributes:
        ended: the grammar is complete, no further token is possible.
    """

    def __init__(
        self, vocabulary: Vocabulary, chain: Any, grammar: Any, banned: Sequence[int]
    ) -> None:
        self.ended = False
        self._vocabulary = vocabulary
        self._chain = chain
        self._grammar = grammar
        self._banned = np.array(banned, np.int64)
        self._candidates = _Candidates(vocabulary.n_tokens) if grammar else None

    def sample(self, context: Context, index: int, logits: NDArray[np.float32]) -> int:
        """Draw a token from the logits of the batch's token number `index`, and remember it.

        Args:
            index: of the token in the last batch; -1 is its last output.
            logits: (n_vocab,) the same logits.

        Returns:
            The token; -1 where the grammar is complete (`ended`).

        Raises:
            EngineError: logits that are not numbers, or a token that was not an output.
            InvalidGrammar: the grammar goes on, but no token of this vocabulary fits.
        """
        if not context.batch.is_output(index):
            raise EngineError(f"token {index} of the last batch is not an output")
        # The maximum is NaN if one logit is: sorting those is undefined behaviour in C++.
        if not math.isfinite(logits.max()):
            raise EngineError(
                "the model's output is not a number",
                hint="An adapter's scale may be far too large.",
            )
        if self._candidates is not None:
            return self._constrained(self._candidates, logits)
        return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, index))

    def close(self) -> None:
        """Free the native samplers."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                llama_cpp.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _constrained(self, candidates: _Candidates, logits: NDArray[np.float32]) -> int:
        """As llama.cpp's own programs do: the grammar sees one token, and all only if it must."""
        candidates.fill(logits)
        token = candidates.choose(self._chain)
        if not self._allows(token):
            candidates.fill(logits)
            candidates.apply(self._grammar)
            if candidates.none_left(self._banned):
                return self._finish()
            token = candidates.choose(self._chain)
        # Any token that the grammar does not allow would end the process here.
        llama_cpp.llama_sampler_accept(self._grammar, token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def _finish(self) -> int:
        """No token is possible: the grammar is complete, or it cannot be followed."""
        ends = self._vocabulary.end_tokens
        if ends and self._allows(min(ends)):
            self.ended = True
            return -1
        raise InvalidGrammar("the grammar goes on, but no token of this model fits it")

    def _allows(self, token: int) -> bool:
        one = llama_cpp.llama_token_data(token, 0.0, 0.0)
        array = llama_cpp.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(one.logit != -math.inf)


class _Candidates:
    """llama.cpp's array of tokens and logits, in memory of our own that is used again."""

    def __init__(self, n_vocab: int) -> None:
        self._data = np.zeros(n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._pointer = self._data.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self._array: Any = llama_cpp.llama_token_data_array()

    def fill(self, logits: NDArray[np.float32]) -> None:
        """Every token, in the vocabulary's order."""
        self._data["id"] = np.arange(len(self._data))
        self._data["logit"] = logits
        array = self._array
        array.data, array.size = self._pointer, len(self._data)
        array.selected, array.sorted = -1, False

    def apply(self, sampler: Any) -> None:
        """Let a sampler change the logits."""
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._array))

    def none_left(self, banned: NDArray[np.int64]) -> bool:
        """Ban these too; whether no token is possible any more. Before anything is sorted."""
        self._data["logit"][banned] = -math.inf
        return bool(self._data["logit"].max() == -math.inf)

    def choose(self, chain: Any) -> int:
        """The token that a chain selects."""
        self.apply(chain)
        return int(self._array.data[self._array.selected].id)


def open_sampler(
    model: Model,
    sampling: Sampling,
    prompt_tail: Sequence[int] = (),
    *,
    ignore_eos: bool = False,
) -> Sampler:
    """Samplers for one answer; `prompt_tail` is what the repeat penalty sees of the prompt.

    Raises:
        EngineError: settings that are out of range.
        InvalidGrammar: llama.cpp does not parse the grammar.
    """
    vocabulary = model.vocabulary
    check_sampling(sampling, vocabulary.n_tokens)
    biases = _biases(vocabulary, sampling, ignore_eos)
    banned = [token for token, value in biases.items() if value == -math.inf]
    if len(banned) == vocabulary.n_tokens:
        raise EngineError("every token is banned")
    grammar = _grammar(vocabulary, sampling.grammar) if sampling.grammar else None
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    parts = [*_penalties(model, biases, sampling, prompt_tail), *_choosers(sampling)]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    return Sampler(vocabulary, chain, grammar, banned)


def _penalties(
    model: Model, biases: dict[int, float], s: Sampling, prompt_tail: Sequence[int]
) -> list[Any]:
    n_vocab = model.vocabulary.n_tokens
    parts = []
    if biases:
        entries = [llama_cpp.llama_logit_bias(*entry) for entry in biases.items()]
        array = (llama_cpp.llama_logit_bias * len(biases))(*entries)
        parts.append(llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
    if s.repeat_penalty != 1.0 and s.penalty_last_n:
        repeat = llama_cpp.llama_sampler_init_penalties(
            n_vocab, s.penalty_last_n, s.repeat_penalty, 0.0, 0.0
        )
        for token in prompt_tail[-s.penalty_last_n :]:
            llama_cpp.llama_sampler_accept(repeat, token)
        parts.append(repeat)
    if s.presence_penalty or s.frequency_penalty:
        parts.append(
            llama_cpp.llama_sampler_init_penalties(
                n_vocab, model.n_ctx_train, 1.0, s.frequency_penalty, s.presence_penalty
            )
        )
    return parts


def _choosers(s: Sampling) -> list[Any]:
    if s.temperature < _GREEDY:
        return [llama_cpp.llama_sampler_init_greedy()]
    return [
        llama_cpp.llama_sampler_init_top_k(s.top_k),
        llama_cpp.llama_sampler_init_top_p(s.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(s.min_p, 1),
        llama_cpp.llama_sampler_init_temp(s.temperature),
        llama_cpp.llama_sampler_init_dist(s.seed % _DEFAULT_SEED),
    ]


def _biases(vocabulary: Vocabulary, sampling: Sampling, ignore_eos: bool) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        biases[token] = biases.get(token, 0.0) + value
    biases = {t: -math.inf if value <= _BAN else value for t, value in biases.items()}
    banned = vocabulary.end_tokens if ignore_eos else frozenset()
    if sampling.grammar:
        # The grammar would take a control token for its text, which is never given out.
        banned |= vocabulary.silent_tokens - vocabulary.end_tokens
    return biases | dict.fromkeys(banned, -math.inf)


@functools.lru_cache(maxsize=16)
def check_grammar(text: str) -> None:
    """`check_gbnf` for what may have been made of a schema; a text that passed is not read again.

    Reading a large one takes a second: several choices share it, and a server does it elsewhere
    than where samplers are opened.

    Raises:
        InvalidGrammar: as `check_gbnf`.
    """
    check_gbnf(text, MAX_GRAMMAR_BYTES)


def _grammar(vocabulary: Vocabulary, text: str) -> Any:
    check_grammar(text)
    grammar = llama_cpp.llama_sampler_init_grammar(vocabulary.handle, text.encode(), b"root")
    if not grammar:
        raise InvalidGrammar("a grammar that llama.cpp does not parse")
    return grammar
