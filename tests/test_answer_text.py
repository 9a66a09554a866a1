"""Text that is final: whole characters, stop strings over any borders, tokens with their text."""

from __future__ import annotations

import itertools

import pytest

from edgelora.serve.jobs import TokenLogprob
from edgelora.serve.texts import AnswerText


def answer(parts: list[bytes], *stops: str) -> tuple[list[str], str | None]:
    """What is given out part by part, and the stop string."""
    text, given = AnswerText(stops), []
    for part in parts:
        given.append(text.feed(part))
        if text.stop is not None:
            return given, text.stop
    return [*given, text.feed(b"", last=True)], text.stop


def splits(data: bytes) -> list[list[bytes]]:
    """Every way to cut some bytes in pieces."""
    borders = range(1, len(data))
    return [
        [data[a:b] for a, b in itertools.pairwise([0, *cut, len(data)])]
        for n in range(len(data))
        for cut in itertools.combinations(borders, n)
    ]


@pytest.mark.parametrize("parts", splits("aé€b".encode()))
def test_characters_are_whole_however_their_bytes_come(parts: list[bytes]) -> None:
    given, _ = answer(parts)
    assert "".join(given) == "aé€b"
    assert "\ufffd" not in "".join(given)


@pytest.mark.parametrize("parts", splits(b"xaSTOPy"))
def test_a_stop_string_never_leaks_however_it_is_cut(parts: list[bytes]) -> None:
    given, stop = answer(parts, "STOP", "never")
    assert ("".join(given), stop) == ("xa", "STOP")


def test_text_waits_only_while_it_may_become_a_stop_string() -> None:
    assert answer([b"a", b"S", b"T", b"O", b"x", b"y"], "STOP") == (
        ["a", "", "", "", "STOx", "y", ""],
        None,
    )
    assert answer([b"aab", b"aa"], "aabaac") == (["", "", "aabaa"], None)
    assert answer([b"ST"], "STOP") == (["", "ST"], None)


def test_the_stop_string_that_is_complete_first_ends_it_whatever_the_borders() -> None:
    for parts in splits(b"1abcX2"):
        given, stop = answer(parts, "abcX", "b")
        assert ("".join(given), stop) == ("1a", "b")
    for parts in splits(b"xabc"):  # both are complete with the c
        given, stop = answer(parts, "bc", "abc")
        assert ("".join(given), stop) == ("x", "abc")


def test_what_stays_unfinished_is_replaced_and_searched_too() -> None:
    assert answer(["a€".encode()[:-1]]) == (["a", "\ufffd"], None)
    text = AnswerText(("\ufffd",))
    assert text.feed("a€".encode()[:-1]) == "a"
    assert text.feed(b"", last=True) == "" and text.stop == "\ufffd"


def test_empty_stop_strings_are_none() -> None:
    assert answer([b"ab"], "") == (["ab", ""], None)


def logprob(number: int) -> TokenLogprob:
    return TokenLogprob(number, b"", -1.0)


def test_tokens_come_with_the_beginning_of_their_text() -> None:
    text = AnswerText(("stop",))
    assert text.feed(b"a", logprob(0)) == "a"
    assert [t.token for t in text.tokens()] == [0]
    assert text.feed("€".encode()[:1], logprob(1)) == ""
    assert text.tokens() == ()
    assert text.feed("€".encode()[1:], logprob(2)) == "€"
    assert [t.token for t in text.tokens()] == [1, 2]
    assert text.feed(b"bst", logprob(3)) == "b"
    assert [t.token for t in text.tokens()] == [3]
    assert text.feed(b"o", logprob(4)) == ""
    assert text.feed(b"p", logprob(5)) == "" and text.stop == "stop"
    assert text.tokens() == ()  # they were the stop string's


def test_at_the_end_every_token_comes() -> None:
    text = AnswerText(("stop",))
    text.feed(b"st", logprob(0))
    text.feed(b"", logprob(1))  # a control token
    assert text.tokens() == ()
    assert text.feed(b"", last=True) == "st"
    assert [t.token for t in text.tokens(every=True)] == [0, 1]
    assert text.tokens(every=True) == ()
