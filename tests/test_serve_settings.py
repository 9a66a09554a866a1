"""Settings of a server: addresses, API keys, and how much of the free memory it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora.adapters.base import Base
from edgelora.engine.needs import needs_of
from edgelora.errors import EdgeLoRAError, NotFound
from edgelora.serve import memory
from edgelora.serve.settings import is_loopback, read_api_keys


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))


def test_api_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \none\n")
    assert read_api_keys(None, {}) == ()
    assert read_api_keys(file, {"EDGELORA_API_KEY": "two, three"}) == ("one", "two", "three")
    file.write_text("\n")
    for bad, environment in (
        (file, {}),
        (None, {"EDGELORA_API_KEY": " "}),
        (None, {"EDGELORA_API_KEY": "é"}),
    ):
        with pytest.raises(EdgeLoRAError):
            read_api_keys(bad, environment)
    with pytest.raises(NotFound):
        read_api_keys(tmp_path / "none", {})


def test_slots_and_context_fit_the_free_memory(base: Base) -> None:
    needs = needs_of(base.path, n_batch=64)
    # 2 (K and V) x 2 layers x 2 heads x 8 values x 2 bytes
    assert memory.token_bytes(base, "f16") == 128
    assert memory.token_bytes(base, "q8_0") == 68 and memory.token_bytes(base, "q4_0") == 36

    def room(kv_bytes: int, **given: int) -> tuple[int, int]:
        free = needs.logits_bytes + 2 * kv_bytes  # KV may take half
        found = memory.fit(base, needs, n_ctx_train=8192, available_bytes=free, **given)
        assert found.kv_bytes == found.n_slots * found.n_ctx * 128
        return found.n_slots, found.n_ctx

    assert room(1 << 30) == (4, 4096)
    assert room(3 * 4096 * 128) == (3, 4096)
    assert room(2048 * 128) == (1, 2048)
    assert room(600 * 128) == (1, 512)
    assert room(4096 * 128, n_ctx=1024) == (4, 1024)
    assert room(4096 * 128, n_slots=8) == (8, 512)
    assert room(4096 * 128, n_slots=1, n_ctx=8000) == (1, 8000)  # asked for, and it fits the whole
    assert room(1 << 30, n_ctx=100_000) == (4, 8192)  # no more than it was trained with
    with pytest.raises(EdgeLoRAError, match="1 slots of 512 tokens"):
        room(200 * 128)
    with pytest.raises(EdgeLoRAError, match="--kv-type"):
        room(4096 * 128, n_slots=8, n_ctx=4096)
