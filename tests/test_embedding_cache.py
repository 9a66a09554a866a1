"""The cache of embeddings: hits, the cap, damage, a locked file, a full disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from edgelora.embedding_cache import CacheEntry, cache_folder, open_cache
from edgelora.errors import EdgeLoRAError, InvalidFile

TEXTS = [[1, 2, 3], [4], []]
VECTORS = np.arange(12, dtype=np.float32).reshape(3, 4)


def file_of(folder: Path) -> Path:
    return folder / "embeddings.sqlite"


def test_what_was_put_is_got_also_by_the_next_process(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        assert cache.get("m", TEXTS) == [None, None, None]
        cache.put("m", TEXTS, VECTORS)
    with open_cache(tmp_path) as cache:
        np.testing.assert_array_equal(np.array(cache.get("m", TEXTS)), VECTORS)
        assert cache.get("other model", [[1, 2, 3]]) == [None]
        assert cache.get("m", [[1, 2], [3, 2, 1]]) == [None, None]
        assert cache.entries() == [CacheEntry("m", 3, 48)]


def test_a_row_that_holds_no_vector_is_computed_again(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.put("m", TEXTS, VECTORS)
    for damage in ("substr(vector, 1, 7)", "'text'", "x''", "x'0000c07f'"):
        database = sqlite3.connect(file_of(tmp_path))
        with database:
            database.execute(f"UPDATE embedding SET vector = {damage}")
        database.close()
        with open_cache(tmp_path) as cache:
            assert cache.get("m", TEXTS) == [None, None, None]


def test_above_the_cap_the_oldest_go_first(tmp_path: Path) -> None:
    with open_cache(tmp_path, cap_bytes=40) as cache:  # a vector has 16 bytes: two fit
        cache.put("m", TEXTS[:2], VECTORS[:2])
        cache.put("m", TEXTS[2:], VECTORS[2:])
        first, second, third = cache.get("m", TEXTS)
        assert first is None and second is not None and third is not None
        assert cache.entries() == [CacheEntry("m", 2, 32)]


def test_clear_empties_and_gives_the_space_back(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.put("m", [[i] for i in range(500)], np.ones((500, 64), np.float32))
        large = file_of(tmp_path).stat().st_size
        assert cache.clear() == 500
        assert cache.entries() == [] and cache.clear() == 0
    assert file_of(tmp_path).stat().st_size < large / 4


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    file_of(tmp_path).write_bytes(b"this is no database at all" * 100)
    with open_cache(tmp_path) as cache:
        cache.put("m", TEXTS, VECTORS)
        assert len(cache.entries()) == 1


def test_damage_that_shows_late_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.put("m", [[i] for i in range(500)], np.ones((500, 64), np.float32))
    file = file_of(tmp_path)
    data = bytearray(file.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)  # the first page, with the schema, stays whole
    file.write_bytes(data)
    with open_cache(tmp_path) as cache, pytest.raises(InvalidFile, match="Delete the file"):
        cache.get("m", [[i] for i in range(500)])


def test_a_locked_file_is_an_error_and_stays(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.put("m", TEXTS, VECTORS)
    other = sqlite3.connect(file_of(tmp_path))
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(EdgeLoRAError, match=r"locked(.|\n)*EDGELORA_CACHE"):
        with open_cache(tmp_path, timeout_s=0.05):
            pass
    other.rollback()
    other.close()
    with open_cache(tmp_path) as cache:
        assert cache.entries() == [CacheEntry("m", 3, 48)]


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.put("m", TEXTS, VECTORS)
        cache._connection.execute("PRAGMA max_page_count = 4")  # SQLite's own "disk is full"
        with pytest.raises(EdgeLoRAError, match="full"):
            cache.put("m", [[i] for i in range(500)], np.ones((500, 64), np.float32))
        np.testing.assert_array_equal(np.array(cache.get("m", TEXTS)), VECTORS)


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("EDGELORA_CACHE")
    assert cache_folder().name == "edgelora"
