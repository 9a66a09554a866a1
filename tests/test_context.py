"""A context on a pico model: shared cells, room, stopping, types of cells, what stream keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pico
import pytest
from numpy.typing import NDArray

from edgelora.engine.batch import Batch, Bounds
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.generate import stream
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.errors import Aborted, ContextFull, EngineError

TOKENS = (5, 90, 300, 12, 41, 270, 7, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = pico.write_base(tmp_path_factory.mktemp("context") / "base.gguf")
    with open_model(path, ModelOptions(n_threads=1)) as model:
        yield model


def rows(ids: Sequence[int], sequence: int = 0, start: int = 0) -> list[Row]:
    return [Row(token, start + i, sequence, output=True) for i, token in enumerate(ids)]


def logits(context: Context, *arguments: object) -> NDArray[np.float32]:
    return context.decode(rows(*arguments)).copy()  # type: ignore[arg-type]


def test_a_sequence_shares_a_part_of_another(model: Model) -> None:
    with open_context(model, n_ctx=256, n_sequences=4, exact=True) as context:
        expected = logits(context, (*TOKENS[:5], 9, 10))
        context.clear()
        logits(context, TOKENS, 1)
        context.copy_sequence(1, 2, 5)
        found = logits(context, (9, 10), 2, 5)
        np.testing.assert_allclose(found, expected[5:], atol=1e-4)
        context.remove_sequence(1)
        found = logits(context, (11,), 2, 7)
        context.clear()
        expected = logits(context, (*TOKENS[:5], 9, 10, 11))
        np.testing.assert_allclose(found[0], expected[-1], atol=1e-4)
        for wrong in (-1, 4, 300):
            with pytest.raises(EngineError, match=f"sequence {wrong} of 4"):
                context.copy_sequence(0, wrong)
            with pytest.raises(EngineError, match=f"sequence {wrong} of 4"):
                context.truncate(wrong, 0)
            with pytest.raises(EngineError, match=f"sequence {wrong} of 4"):
                context.remove_sequence(wrong)


def test_a_sequence_is_saved_and_loaded(model: Model) -> None:
    with open_context(model, n_ctx=256, n_sequences=4, exact=True) as context:
        expected = logits(context, (*TOKENS, 9))
        context.clear()
        logits(context, TOKENS, 1)
        data = context.save_sequence(1)
        context.clear()
        logits(context, (77, 78, 79), 0)
        assert context.load_sequence(2, data)
        np.testing.assert_allclose(logits(context, (9,), 2, 8)[0], expected[-1], atol=1e-4)
        context.remove_sequence(2)
        logits(context, range(5, 255), 3)
        assert not context.load_sequence(2, data)  # 256 cells, 253 are in use
        logits(context, TOKENS[:3], 2)  # the sequence is empty
        assert not context.load_sequence(1, data[:40])


def test_more_cells_than_one_sequence_may_use(model: Model) -> None:
    with open_context(model, n_ctx=64, n_cells=1024, n_batch=64, n_sequences=20) as context:
        assert (context.n_ctx, context.n_cells) == (64, 1024)
        for sequence in range(16):
            logits(context, range(5, 69), sequence)
        with pytest.raises(EngineError, match="position 64 of 64"):
            logits(context, (5,), 0, 64)
        with pytest.raises(ContextFull, match="full"):
            logits(context, (5,), 17)
        context.remove_sequence(3)
        logits(context, (5,), 17)  # a full context is as it was


def test_outputs_are_bounded(model: Model) -> None:
    with open_context(model, n_ctx=256, n_batch=64, n_sequences=4, n_outputs=8) as context:
        assert context.n_outputs == 8
        with pytest.raises(EngineError, match="9 outputs, 8 are possible"):
            context.decode(rows(range(5, 14)))
        assert len(context.decode(rows(range(5, 13)))) == 8
    with open_context(model, n_ctx=256, n_batch=64, n_sequences=16, n_outputs=8) as context:
        assert context.n_outputs == 16  # llama.cpp wants one for each sequence


def test_a_decode_is_stopped_and_goes_on_again(model: Model) -> None:
    with open_context(model, n_ctx=256, n_sequences=2) as context:
        context.abort()
        for _ in range(2):
            with pytest.raises(Aborted):
                logits(context, TOKENS)
        context.resume()
        found = logits(context, TOKENS)
        context.clear()
        np.testing.assert_array_equal(found, logits(context, TOKENS))


def test_cells_stay_on_request_when_the_adapters_change(model: Model, tmp_path: Path) -> None:
    adapter = pico.write_random_lora(tmp_path / "a.gguf", model.base.path)
    with open_context(model, n_ctx=256, n_sequences=2, exact=True) as context:
        base = logits(context, TOKENS, 0)
        context.apply([WeightedAdapter(adapter)], keep=True)
        adapted = logits(context, TOKENS, 1)
        assert abs(adapted - base).max() > 0.1
        context.apply([], keep=True)
        found = logits(context, (9,), 0, len(TOKENS))
        context.clear()
        expected = logits(context, (*TOKENS, 9))
        np.testing.assert_allclose(found[0], expected[-1], atol=1e-4)


def test_quantised_cells_are_close_and_unknown_types_refused(tmp_path: Path) -> None:
    dims = pico.Dims(n_embd=64, n_head=2, n_head_kv=1, head_dim=32)
    path = pico.write_base(tmp_path / "base.gguf", dims=dims)
    with open_model(path, ModelOptions(n_threads=1)) as model:
        found = {}
        for kv_type in ("f32", "f16", "q8_0", "q4_0"):
            with open_context(model, n_ctx=256, kv_type=kv_type) as context:
                found[kv_type] = logits(context, TOKENS)
        errors = {t: float(abs(v - found["f32"]).max()) for t, v in found.items()}
        assert 0 < errors["f16"] < errors["q8_0"] < errors["q4_0"] < 10
        with pytest.raises(EngineError, match="no KV type q3"), open_context(model, kv_type="q3"):
            pass
    path = pico.write_base(tmp_path / "small.gguf")
    with (
        open_model(path, ModelOptions(n_threads=1)) as model,
        pytest.raises(EngineError, match="could not make a context"),
        open_context(model, kv_type="q8_0"),
    ):
        pass  # heads of 8 are no whole blocks


def test_stream_computes_only_what_is_new(model: Model) -> None:
    with open_context(model, n_ctx=256, n_sequences=2, exact=True) as context:
        first = "".join(stream(context, TOKENS, max_tokens=6))
        kept = list(context.kept)
        assert kept[: len(TOKENS)] == list(TOKENS) and len(kept) == len(TOKENS) + 6
        n = context.n_decoded
        longer = "".join(stream(context, [*kept, 9, 10], max_tokens=1))
        assert context.n_decoded == n + 3  # 9, 10 and the answer's token
        n = context.n_decoded
        assert "".join(stream(context, TOKENS, max_tokens=6)) == first
        assert context.n_decoded == n + 1 + 6
        context.clear()
        assert "".join(stream(context, [*kept, 9, 10], max_tokens=1)) == longer
        assert context.kept
        logits(context, (5,), 1)
        assert context.kept == []  # others have used the context: nothing is believed


@pytest.mark.parametrize(
    ("token", "position", "sequence", "message"),
    [
        (-1, 0, 0, "token -1 of 10"),
        (10, 0, 0, "token 10 of 10"),
        (0, -1, 0, "position -1 of 20"),
        (0, 20, 0, "position 20 of 20"),
        (0, 0, 4, "sequence 4 of 4"),
    ],
)
def test_a_batch_is_checked(token: int, position: int, sequence: int, message: str) -> None:
    batch, bounds = Batch(8), Bounds(10, 20, 4, 2)
    batch.add(1, 1, 1, True)
    batch.check(bounds)
    batch.add(token, position, sequence, False)
    with pytest.raises(EngineError, match=message):
        batch.check(bounds)


def test_a_batch_holds_so_many_and_is_never_empty() -> None:
    batch, bounds = Batch(4), Bounds(10, 20, 4, 2)
    with pytest.raises(EngineError, match="0 tokens"):
        batch.check(bounds)
    batch.extend([1, 2, 3], 5, 2, False)
    with pytest.raises(EngineError, match="a batch of 5"):
        batch.extend([1, 2], 8, 2, False)
    batch.add(4, 8, 2, True)
    with pytest.raises(EngineError, match="a batch of 5"):
        batch.add(4, 9, 2, True)
    batch.check(bounds)
    native = batch.native
    assert native.n_tokens == 4 and [native.token[i] for i in range(4)] == [1, 2, 3, 4]
    assert [native.pos[i] for i in range(4)] == [5, 6, 7, 8]
    assert [native.seq_id[i][0] for i in range(4)] == [2] * 4
    assert [native.logits[i] for i in range(4)] == [0, 0, 0, 1]
    assert [batch.is_output(i) for i in (-1, 0, 3, 4)] == [True, False, True, False]
    batch.clear()
    assert not batch.is_output(-1)


def test_low_ram_takes_smaller_cells_and_passes(tmp_path: Path) -> None:
    dims = pico.Dims(64, 64, n_head=2, n_head_kv=1, head_dim=32)
    base = pico.write_base(tmp_path / "base.gguf", dims=dims)
    ids = [int(i) for i in np.random.default_rng(0).integers(5, 300, 200)]
    last = [Row(token, i, 0, output=i >= 150) for i, token in enumerate(ids)]
    found, states = {}, {}
    for low_ram in (False, True):
        options = ModelOptions(n_threads=1, low_ram=low_ram)
        with open_model(base, options) as model:
            with open_context(model, n_ctx=256, n_batch=256) as context:
                found[low_ram] = logits(context, ids)
                assert context.kv_type == ("q8_0" if low_ram else "f16")
            with open_context(model, n_ctx=256, n_batch=256, hidden=True) as context:
                # With low_ram the first pass of 128 tokens has no output at all.
                states[low_ram] = context.hidden(last)
            with open_context(model, n_ctx=256, exact=True) as context:
                assert context.kv_type == "f32"
            with open_context(model, n_ctx=256, kv_type="f16") as context:
                assert context.kv_type == "f16"
    assert found[False].shape == found[True].shape and states[True].shape == (50, 64)
    for ours in (found, states):
        difference = np.linalg.norm(ours[True] - ours[False]) / np.linalg.norm(ours[False])
        assert 0 < difference < 0.02


def test_heads_that_are_no_whole_blocks_keep_f16(model: Model) -> None:
    with (
        open_model(model.base.path, ModelOptions(n_threads=1, low_ram=True)) as low,
        open_context(low, n_ctx=256) as context,
    ):
        assert low.base.head_dim == 8 and context.kv_type == "f16"
