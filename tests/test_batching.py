"""Turns of adapter sets, the speed of prompts, and how a batch is divided among them."""

from __future__ import annotations

import pytest

from edgelora.serve.batching import ROWS, RowSpeed, Turns, prompt_tokens, share


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_set_keeps_its_turn_for_a_quantum() -> None:
    clock = Clock()
    turns = Turns(1.0, clock)
    assert [turns.choose("aba") for _ in range(3)] == ["a", "a", "a"]
    clock.now += 1.0
    assert [turns.choose("aba") for _ in range(3)] == ["b", "b", "b"]
    clock.now += 1.5
    assert turns.choose("abc") == "a"


def test_every_set_gets_its_turn() -> None:
    clock = Clock()
    turns = Turns(1.0, clock)
    seen = []
    for _ in range(9):
        seen.append(turns.choose("abc"))
        clock.now += 1.0
    assert seen == ["a", "b", "c"] * 3


def test_a_set_without_work_loses_its_turn_and_one_alone_keeps_it() -> None:
    clock = Clock()
    turns = Turns(1.0, clock)
    assert turns.choose("ab") == "a"
    assert turns.choose("b") == "b"
    clock.now += 5.0
    assert turns.choose("b") == "b"
    assert turns.choose("ba") == "b"  # its turn began anew
    clock.now += 1.0
    assert turns.choose("ba") == "a"


@pytest.mark.parametrize(
    ("remaining", "budget", "given"),
    [
        ([], 10, []),
        ([5], 10, [5]),
        ([50], 10, [10]),
        ([100, 3], 10, [7, 3]),
        ([100, 20], 10, [5, 5]),
        ([100, 20, 3], 12, [6, 3, 3]),
        ([4, 4, 4], 10, [4, 4, 2]),
        ([9], 0, [0]),
        ([100, 100], 1, [1, 0]),
    ],
)
def test_half_is_for_the_oldest_and_the_rest_for_the_shortest(
    remaining: list[int], budget: int, given: list[int]
) -> None:
    assert share(remaining, budget) == given


def test_the_speed_is_learned() -> None:
    speed = RowSpeed()
    unknown = speed.n_rows_in(1.0)
    assert ROWS <= unknown <= 512 and unknown % ROWS == 0
    speed.learn(210, 1.0)
    assert speed.n_rows_in(1.0) == 208  # the nearest multiple
    assert speed.n_rows_in(0.25) == 48
    assert speed.n_rows_in(0.001) == ROWS
    speed.learn(1, 99.0)  # a single token says nothing of a prompt
    assert speed.n_rows_in(1.0) == 208
    speed.learn(100, 1.0)  # half as fast: it is followed, not at once
    assert 100 < speed.n_rows_in(1.0) < 208


@pytest.mark.parametrize(
    ("n_rows", "beside", "n"),
    [(32, 0, 32), (32, 7, 25), (16, 8, 8), (16, 9, 23), (16, 64, 16), (64, 40, 24)],
)
def test_a_batch_is_filled_with_prompts(n_rows: int, beside: int, n: int) -> None:
    assert prompt_tokens(n_rows, beside) == n
    assert (beside + n) % ROWS == 0
