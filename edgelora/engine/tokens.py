"""Text to token ids: control tokens only where the template wrote them."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from typing import Any

import llama_cpp

from edgelora.datasets.template import Segment
from edgelora.errors import EngineError

_SPACES = " \t\n\v\f\r"  # what C's isspace, which llama.cpp asks, takes for white space
_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
_UNKNOWN = llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_SPECIAL = _CONTROL | _UNKNOWN | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
_LSTRIP = llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP
_RSTRIP = llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP
# Some BPE vocabularies are split into words by std::regex, which recurses for each character of
# a word: 300 bytes of stack each, so that 27,000 spaces or letters on end kill the process.
_MAX_STRETCH = 2048
_STRETCH = re.compile(rf"\S{{{_MAX_STRETCH + 1},}}|\s{{{_MAX_STRETCH + 1},}}")
_LAST_WORD_END = re.compile(r".*\W", re.DOTALL)


def cut_stretches(text: str) -> list[str]:
    """The text in parts, so that none has over 2048 characters on end that are all white space, or
    all not; a part ends where a word does if there is such a place. Few texts are cut at all."""
    parts, start = [], 0
    for stretch in _STRETCH.finditer(text):
        at = stretch.start()
        while stretch.end() - at > _MAX_STRETCH:
            near = _LAST_WORD_END.match(text, at + _MAX_STRETCH // 2, at + _MAX_STRETCH)
            at = near.end() if near else at + _MAX_STRETCH
            parts.append(text[start:at])
            start = at
    return [*parts, text[start:]]


class Vocabulary:
    """A model's vocabulary. Texts are plain by default: nothing in them becomes a control token.

    Attributes:
        handle: llama.cpp's own.
    """

    def __init__(self, model: Any) -> None:
        self.handle = self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_tokens: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._is_bpe = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE
        self.adds_bos: bool = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self.eos = self._known(llama_cpp.llama_vocab_eos(self._vocab))
        self.bos = self._known(llama_cpp.llama_vocab_bos(self._vocab))
        # For a file that names no BOS llama.cpp says 11, which is a comma in Qwen's vocabulary.
        if self.bos >= 0 and not self.adds_bos and not self._attribute(self.bos) & _SPECIAL:
            self.bos = -1

    @functools.cached_property
    def control_ids(self) -> dict[str, int]:
        """The text of every control token, and its id; BOS and EOS are, whatever their type."""
        ids = {self.text_of(token): token for token in (self.bos, self.eos)}
        for token in range(self.n_tokens):
            if self._attribute(token) & (_CONTROL | _UNKNOWN):
                ids[self.text_of(token)] = token
        ids.pop("", None)
        return ids

    @functools.cached_property
    def _control_set(self) -> frozenset[int]:
        return frozenset(
            token
            for text, token in self.control_ids.items()
            if len(text) > 1 and not self._attribute(token) & _UNKNOWN
        )

    @property
    def silent_tokens(self) -> frozenset[int]:
        """Tokens that `decode` gives no text for."""
        return self._control_set

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """Every token that ends a turn."""
        return frozenset(token for token in range(self.n_tokens) if self.is_end(token))

    @functools.cached_property
    def _inside_control(self) -> re.Pattern[str]:
        """Matches after the first character of a control string."""
        texts = [text for text in self.control_ids if len(text) > 1]
        inside = (f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts)
        return re.compile("|".join(inside) or "(?!)")

    def text_of(self, token: int) -> str:
        """The vocabulary's own text of one token (control tokens included); '' for none (-1)."""
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether a model that emits `token` has ended its turn."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of one plain text; control strings in it stay text, no BOS is added.

        llama.cpp itself may make a control token of plain text: SentencePiece's merges look at no
        types, and BOS or EOS may be of another type than control. Such a string is cut in two.

        Raises:
            EngineError: a vocabulary in which this text cannot be told from a control token.
        """
        ids = self._tokenize(text)
        if self._control_set.isdisjoint(ids):
            return ids
        ids = [i for piece in self._inside_control.split(text) for i in self._tokenize(piece)]
        if not self._control_set.isdisjoint(ids):
            raise EngineError(
                "a text that this vocabulary cannot tell from a control token",
                problems=[repr(text[:80])],
            )
        return ids

    def _tokenize(self, text: str) -> list[int]:
        if self._is_bpe and len(text) > _MAX_STRETCH:
            return [i for part in cut_stretches(text) for i in self._tokenize_part(part)]
        return self._tokenize_part(text)

    def _tokenize_part(self, text: str) -> list[int]:
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, room, False, False)
        if n < 0:
            raise EngineError(f"llama.cpp could not tokenise a text of {len(data)} bytes")
        return list(buffer[:n])

    def tokenize_segments(self, segments: Sequence[Segment], *, start: bool = True) -> list[int]:
        """Token ids of a rendered prompt whose control tokens are marked.

        Everything between two control tokens is one call, so the ids equal those of the whole
        prompt (SentencePiece adds a space in each call). With `start`, BOS comes first where the
        vocabulary asks for it, once, whether or not the template wrote it.
        """
        ids: list[int] = []
        for position, segment in enumerate(segments):
            if segment.control:
                ids.append(self.control_ids[segment.text])
            else:
                ids.extend(self.tokenize(self._stripped(segments, position)))
        if start and self.adds_bos and self.bos >= 0 and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of token ids; control tokens give nothing, a character may be partial."""
        return b"".join(self._piece(token) for token in ids if token not in self._control_set)

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _stripped(self, segments: Sequence[Segment], position: int) -> str:
        """The text as llama.cpp sees it beside control tokens that swallow white space."""
        text = segments[position].text
        if position and self._attributes(segments[position - 1]) & _RSTRIP:
            text = text.lstrip(_SPACES)
        if position + 1 < len(segments) and self._attributes(segments[position + 1]) & _LSTRIP:
            text = text.rstrip(_SPACES)
        return text

    def _attributes(self, segment: Segment) -> int:
        if not segment.control:
            return 0
        return self._attribute(self.control_ids[segment.text])

    def _known(self, token: int) -> int:
        return token if 0 <= token < self.n_tokens else -1

    def _attribute(self, token: int) -> int:
        return int(llama_cpp.llama_vocab_get_attr(self._vocab, token))
