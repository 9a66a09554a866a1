"""The book-keeping of a unified KV cache, against a model of cells that is as plain as can be."""

from __future__ import annotations

import numpy as np
import pytest

from edgelora.serve.prefixes import Prefixes, Start, common_prefix


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def filled(prefixes: Prefixes, key: str, ids: np.ndarray) -> tuple[int, Start]:
    """Start a prompt and compute all of it."""
    start = prefixes.start(key, ids)
    prefixes.extend(start.sequence, ids[start.n_kept :])
    return start.sequence, start


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [((), (), 0), ((1,), (), 0), ((1, 2), (1, 2), 2), ((1, 2), (1, 2, 3), 2), ((1, 2), (1, 3), 1),
     ((2,), (1,), 0)],
)  # fmt: skip
def test_common_prefix(a: tuple[int, ...], b: tuple[int, ...], n: int) -> None:
    assert common_prefix(tokens(*a), tokens(*b)) == common_prefix(tokens(*b), tokens(*a)) == n


def test_a_finished_sequence_that_is_a_prefix_is_taken_over() -> None:
    prefixes = Prefixes(4, 16, 64, 2)
    first, start = filled(prefixes, "base", tokens(1, 2, 3))
    assert start == Start(first)
    assert prefixes.n_used == 3
    assert prefixes.finish(first) == []
    second = prefixes.start("base", tokens(1, 2, 3, 4, 5))
    assert second == Start(first, n_kept=3)
    prefixes.extend(first, [4, 5])
    assert prefixes.n_used == 5


def test_one_token_is_always_left_to_compute() -> None:
    prefixes = Prefixes(4, 16, 64, 2)
    first, _ = filled(prefixes, "base", tokens(1, 2, 3))
    prefixes.finish(first)
    assert prefixes.start("base", tokens(1, 2, 3)) == Start(first, n_kept=2, truncate=True)
    assert prefixes.n_used == 2


def test_a_longer_or_running_sequence_shares_its_cells() -> None:
    prefixes = Prefixes(4, 16, 64, 2)
    first, _ = filled(prefixes, "base", tokens(1, 2, 3, 4))
    second = prefixes.start("base", tokens(1, 2, 9))
    assert (second.source, second.n_kept, second.truncate) == (first, 2, False)
    prefixes.extend(second.sequence, [9])
    assert prefixes.n_used == 5
    prefixes.finish(first)
    third = prefixes.start("base", tokens(1, 2, 3, 7))
    assert (third.source, third.n_kept) == (first, 3)
    prefixes.drop(first)
    assert prefixes.n_used == 4  # 1 2 9, and 3 that the third holds too
    prefixes.drop(second.sequence)
    assert prefixes.n_used == 3
    prefixes.drop(third.sequence)
    assert prefixes.n_used == 0


def test_keys_are_apart_and_reuse_can_be_off() -> None:
    prefixes = Prefixes(6, 16, 64, 3)
    first, _ = filled(prefixes, "base", tokens(1, 2, 3))
    prefixes.finish(first)
    assert prefixes.start("adapter", tokens(1, 2, 3, 4)).n_kept == 0
    assert prefixes.start("base", tokens(1, 2, 3, 4), reuse=False).n_kept == 0
    assert prefixes.start("base", tokens(1, 2, 3, 4)).n_kept == 3


def test_the_least_recently_used_go_first() -> None:
    prefixes = Prefixes(5, 16, 64, 2)
    numbers = []
    for i in range(3):
        number, _ = filled(prefixes, "base", tokens(i, 1, 2))
        numbers.append(number)
    assert prefixes.finish(numbers[0]) == prefixes.finish(numbers[1]) == []
    shared = prefixes.start("base", tokens(0, 1, 7))  # uses the first one again
    assert shared.source == numbers[0]
    assert prefixes.finish(numbers[2]) == [numbers[1]]
    assert prefixes.n_finished == 2
    assert prefixes.evict() == numbers[0]
    assert prefixes.evict() == numbers[2]
    assert prefixes.evict() is None


def test_what_is_dropped_for_room_is_told_before() -> None:
    told: list[tuple[int, object, list[int]]] = []
    prefixes = Prefixes(
        4, 8, 16, 1, on_evict=lambda number, key, held: told.append((number, key, held.tolist()))
    )
    first, _ = filled(prefixes, "a", tokens(1, 2))
    second, _ = filled(prefixes, "b", tokens(3, 4, 5))
    third, _ = filled(prefixes, "b", tokens(6))
    prefixes.finish(first)
    assert prefixes.finish(second) == [first]
    prefixes.finish(third)
    prefixes.drop_keys(lambda key: True)  # unwanted: nobody is told
    assert told == [(first, "a", [1, 2]), (second, "b", [3, 4, 5])]


def test_finished_ones_are_trimmed_to_so_many_tokens() -> None:
    prefixes = Prefixes(4, 8, 32, 3)
    numbers = [filled(prefixes, "a", tokens(i, 2, 3))[0] for i in range(3)]
    for number in numbers[:2]:
        prefixes.finish(number)
    assert prefixes.trim(6) == []
    assert prefixes.trim(5) == [numbers[0]]
    assert prefixes.trim(0) == [numbers[1]]


def test_ids_run_out_before_cells_do() -> None:
    prefixes = Prefixes(2, 16, 64, 1)
    first, _ = filled(prefixes, "base", tokens(1, 2, 3))
    prefixes.finish(first)
    second, _ = filled(prefixes, "base", tokens(4, 5))
    third = prefixes.start("base", tokens(6, 7))
    assert third == Start(first, dropped=(first,))
    with pytest.raises(ValueError, match="more running sequences"):
        prefixes.start("base", tokens(8, 9))


def test_the_last_possible_source_is_taken_over_rather_than_lost() -> None:
    prefixes = Prefixes(1, 16, 64, 1)
    first, _ = filled(prefixes, "base", tokens(1, 2, 3))
    prefixes.finish(first)
    assert prefixes.start("base", tokens(1, 2, 9)) == Start(first, n_kept=2, truncate=True)


def test_room_is_made_by_dropping_finished_ones_only() -> None:
    prefixes = Prefixes(4, 8, 10, 3)
    first, _ = filled(prefixes, "base", tokens(1, 2, 3, 4))
    second, _ = filled(prefixes, "base", tokens(5, 6, 7, 8))
    prefixes.finish(first)
    assert prefixes.make_room(2) == []
    assert prefixes.make_room(3) == [first]
    assert prefixes.make_room(9) == []
    with pytest.raises(ValueError, match="free cells"):
        prefixes.extend(second, list(range(7)))


def test_unwanted_keys_go() -> None:
    prefixes = Prefixes(4, 8, 32, 3)
    first, _ = filled(prefixes, "a", tokens(1, 2))
    second, _ = filled(prefixes, "b", tokens(1, 2))
    third, _ = filled(prefixes, "a", tokens(5, 2))
    prefixes.finish(first)
    prefixes.finish(second)
    assert prefixes.drop_keys(lambda key: key == "a") == [first]  # the third still runs
    assert prefixes.longest("a", tokens(5, 2)) == (third, 2)


def test_a_long_random_life_counts_cells_as_a_plain_model_does() -> None:
    """The model: each cell is (position, token, who made it); sequences hold sets of cells."""
    rng = np.random.default_rng(0)
    prefixes = Prefixes(8, 32, 120, 4)
    held: dict[int, list[tuple[int, int]]] = {}
    running: list[int] = []
    serial = 0
    for _ in range(3000):
        action = rng.integers(3)
        if action == 0 and len(running) < 4:
            prompt = rng.integers(0, 2, rng.integers(1, 12)).astype(np.int32)
            for number in prefixes.make_room(len(prompt)):
                del held[number]
            start = prefixes.start("key", prompt)
            for number in start.dropped:
                del held[number]
            if start.source is not None:
                held[start.sequence] = held[start.source][: start.n_kept]
            else:
                held[start.sequence] = held.get(start.sequence, [])[: start.n_kept]
            assert [token for _, token in held[start.sequence]] == prompt[: start.n_kept].tolist()
            for token in prompt[start.n_kept :].tolist():
                held[start.sequence].append((serial, token))
                serial += 1
            prefixes.extend(start.sequence, prompt[start.n_kept :])
            running.append(start.sequence)
        elif action == 1 and running:
            number = running[rng.integers(len(running))]
            if len(held[number]) < 32:
                for dropped in prefixes.make_room(1):
                    del held[dropped]
                token = int(rng.integers(0, 2))
                prefixes.append(number, token)
                held[number].append((serial, token))
                serial += 1
        elif running:
            number = running.pop(rng.integers(len(running)))
            if rng.integers(4):
                for dropped in prefixes.finish(number):
                    del held[dropped]
            else:
                prefixes.drop(number)
                del held[number]
        assert prefixes.n_used == len({cell for cells in held.values() for cell in cells})
        assert prefixes.n_finished == len(held) - len(running) <= 4
