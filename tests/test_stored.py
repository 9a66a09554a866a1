"""Finished requests put aside in memory: what is found, what goes, and how much is held."""

from __future__ import annotations

import numpy as np

from edgelora.serve.stored import Entry, Stored


def entry(*ids: int, key: str = "base", size_bytes: int = 10) -> Entry:
    return Entry(key, np.array(ids, np.int32), np.zeros(size_bytes, np.uint8))


def find(stored: Stored, *ids: int, key: str = "base") -> tuple[Entry | None, int]:
    return stored.longest(key, np.array(ids, np.int32))


def test_the_longest_of_the_same_key_is_found() -> None:
    stored = Stored(100)
    short, long, other = entry(1, 2), entry(1, 3, 4, 5), entry(1, 3, 4, 5, 6, key="adapter")
    for each in (short, long, other):
        stored.add(each)
    assert find(stored, 1, 3, 4, 9) == (long, 3)
    assert find(stored, 1, 2, 3) == (short, 2)
    assert find(stored, 7) == (None, 0)
    assert find(stored, 1, 3, key="adapter") == (other, 2)


def test_bytes_are_bounded_and_the_oldest_go() -> None:
    stored = Stored(30)
    entries = [entry(i, 1) for i in range(3)]
    for each in entries:
        stored.add(each)
    assert stored.n_bytes == 30
    stored.use(entries[0], 1)  # a part of it: it stays, and is the newest now
    stored.add(entry(9, 9, size_bytes=15))
    assert stored.n_bytes == 25 and len(stored) == 2
    assert find(stored, 0, 1) == (entries[0], 2)
    stored.add(entry(8, size_bytes=31))  # nothing goes for what cannot be kept
    assert stored.n_bytes == 25
    assert Stored(0).is_off and not stored.is_off


def test_an_entry_stands_for_those_it_begins_with() -> None:
    stored = Stored(100)
    stored.add(entry(1, 2))
    stored.add(entry(1, 2, key="adapter"))
    longer = entry(1, 2, 3)
    stored.add(longer)
    assert len(stored) == 2 and find(stored, 1, 2) == (longer, 2)
    stored.add(entry(1, 2))
    assert len(stored) == 2 and stored.n_bytes == 20


def test_what_is_used_whole_is_gone() -> None:
    stored = Stored(100)
    kept = entry(1, 2, 3)
    stored.add(kept)
    stored.use(kept, 3)
    assert (len(stored), stored.n_bytes) == (0, 0)
    stored.use(kept, 3)  # room was made for something else meanwhile
    assert stored.n_bytes == 0


def test_unwanted_keys_go() -> None:
    stored = Stored(100)
    stored.add(entry(1))
    stored.add(entry(1, key="adapter"))
    stored.drop_keys(lambda key: key == "adapter")
    assert len(stored) == 1 and stored.n_bytes == 10 and find(stored, 1, key="adapter")[1] == 0
