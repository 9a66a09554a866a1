"""Log-probabilities in OpenAI's two shapes: that of chat, and the older one of completions."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Any

from edgelora.serve.jobs import TokenLogprob

# What OpenAI writes for a token that cannot be drawn; JSON has no infinity.
_LEAST = -9999.0

# The vocabulary's own text of a token: control tokens have no bytes in an answer.
Name = Callable[[int], str]


def chat_logprobs(tokens: Iterable[TokenLogprob], name: Name) -> dict[str, Any]:
    """`logprobs` of a chat choice: each token with its bytes and the likeliest ones beside it."""
    content = []
    for token in tokens:
        entry = _chat_entry(token.token, token.text, token.logprob, name)
        entry["top_logprobs"] = [_chat_entry(*likely, name) for likely in token.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(token: int, text: bytes, logprob: float | None, name: Name) -> dict[str, Any]:
    shown = _shown(token, text, name, "")
    return {"token": shown, "logprob": _finite(logprob), "bytes": list(text)}


class LegacyLogprobs:
    """`logprobs` of one completion choice, whole or chunk by chunk.

    Args:
        with_top: whether likelier tokens were asked for; `top_logprobs` is null otherwise.
        start: where the first token's text begins in the choice's text; below 0 where the
            vocabulary puts a space before a prompt that is not in the text.
    """

    def __init__(self, name: Name, *, with_top: bool, start: int = 0) -> None:
        self._name = name
        self._with_top = with_top
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def shape(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        """The next tokens; their offsets go on where the last call's ended."""
        shape: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [] if self._with_top else None,
            "text_offset": [],
        }
        for token in tokens:
            shape["tokens"].append(self._shown(token.token, token.text))
            shape["token_logprobs"].append(_finite(token.logprob))
            shape["text_offset"].append(max(0, self._offset))
            self._offset += len(self._decoder.decode(token.text))
            if self._with_top:
                shape["top_logprobs"].append(self._top(token))
        return shape

    def _top(self, token: TokenLogprob) -> dict[str, float | None] | None:
        """The likeliest tokens, and the drawn one where it is none of them."""
        if token.logprob is None:
            return None
        top: dict[str, float | None] = {}
        for likely, text, logprob in (*token.top, (token.token, token.text, token.logprob)):
            top.setdefault(self._shown(likely, text), _finite(logprob))
        return top

    def _shown(self, token: int, text: bytes) -> str:
        return _shown(token, text, self._name, "bytes:")


def _shown(token: int, text: bytes, name: Name, prefix: str) -> str:
    """A token's text; where it is a part of a character only, its bytes as OpenAI writes them."""
    if not text:
        return name(token)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in text)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, float(logprob))
