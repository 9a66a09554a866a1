"""States before the head: with the head's weights they give the losses that scoring gives."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pico
import pytest

from edgelora.engine.capture import NodeCapture
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.hidden import completion_states, head_matrix
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.score import TokenisedExample, score, shared_prefix
from edgelora.errors import EngineError
from edgelora.operators.surrogate import WholeHead, token_losses

ONE_THREAD = ModelOptions(n_threads=1)
PREFIX = tuple(range(260, 276))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("hidden")
    base = pico.write_base(folder / "base.gguf", tied=request.param)
    with open_model(base, ONE_THREAD) as model:
        yield model


@pytest.fixture(scope="module")
def adapter(model: Model) -> Path:
    path = model.base.path.with_name("adapter.gguf")
    return pico.write_random_lora(path, model.base.path, size=1.0)


def examples(*, shared: bool, n: int = 7) -> list[TokenisedExample]:
    """Prompts and completions of different lengths; the first tokens are the same or differ."""
    rng = np.random.default_rng(3)
    made = []
    for i in range(n):
        own = tuple(int(t) for t in rng.integers(5, 300, 3 + i))
        completion = tuple(int(t) for t in rng.integers(5, 300, 1 + i % 4))
        made.append(TokenisedExample((PREFIX if shared else ()) + own, completion, line=i + 1))
    return made


def logits_one_by_one(context: Context, example: TokenisedExample) -> np.ndarray:
    """The rows that predict the completion, from one plain decode of the whole example."""
    context.clear()
    ids, first = example.prompt + example.completion[:-1], len(example.prompt) - 1
    rows = [Row(token, i, 0, output=i >= first) for i, token in enumerate(ids)]
    return context.decode(rows).copy()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weight", [None, 1.5])
def test_the_head_on_the_states_gives_the_logits(
    model: Model, adapter: Path, shared: bool, weight: float | None
) -> None:
    given = examples(shared=shared)
    assert bool(shared_prefix([e.prompt for e in given])) == shared
    applied = [] if weight is None else [WeightedAdapter(adapter, weight)]
    with open_context(model, hidden=True, exact=True) as context:
        context.apply(applied)
        states = completion_states(context, given)
    with open_context(model, exact=True) as context:
        context.apply(applied)
        logits = np.concatenate([logits_one_by_one(context, e) for e in given])
        scores = score(context, given)
    assert states.targets.tolist() == [token for e in given for token in e.completion]
    head = head_matrix(model)
    np.testing.assert_allclose(states.hidden @ head.T, logits, atol=2e-4, rtol=1e-4)
    losses = token_losses(states.hidden, states.targets, WholeHead(head))
    ends = np.cumsum([len(e.completion) for e in given])
    by_example = [part.sum() for part in np.split(losses, ends[:-1])]
    np.testing.assert_allclose(by_example, [s.nll for s in scores], atol=2e-3)


def test_an_adapter_moves_the_states(model: Model, adapter: Path) -> None:
    given = examples(shared=True)
    with open_context(model, hidden=True, exact=True) as context:
        plain = completion_states(context, given)
        context.apply([WeightedAdapter(adapter)])
        moved = completion_states(context, given)
        context.apply([])
        again = completion_states(context, given)
    assert np.abs(moved.hidden - plain.hidden).max() > 0.05
    np.testing.assert_array_equal(again.hidden, plain.hidden)


@pytest.mark.parametrize("shared", [True, False])
def test_groups_and_batches_do_not_matter(model: Model, shared: bool) -> None:
    """A context of few sequences and small batches computes the same in several groups."""
    given = examples(shared=shared)
    with open_context(model, hidden=True, exact=True) as context:
        whole = completion_states(context, given)
    with open_context(model, hidden=True, exact=True, n_batch=16, n_sequences=2) as context:
        in_parts = completion_states(context, given)
    np.testing.assert_array_equal(in_parts.targets, whole.targets)
    np.testing.assert_allclose(in_parts.hidden, whole.hidden, atol=1e-4)


def test_an_example_that_does_not_fit_is_named(model: Model) -> None:
    long = TokenisedExample(tuple([7] * 600), (5,), line=12)
    with open_context(model, hidden=True) as context, pytest.raises(EngineError, match="line 12"):
        completion_states(context, [long])


def test_a_plain_context_refuses_states(model: Model) -> None:
    with open_context(model) as context, pytest.raises(EngineError, match="not opened for hidden"):
        completion_states(context, examples(shared=False))


def test_ctrl_c_inside_the_callback_is_not_lost(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ctypes would print and forget it, and the batch would look as if it had no result."""
    real = NodeCapture._on_node

    def interrupted(capture: NodeCapture, tensor: int, ask: bool, user_data: int) -> bool:
        signal.raise_signal(signal.SIGINT)
        return real(capture, tensor, ask, user_data)

    with monkeypatch.context() as patch:
        patch.setattr(NodeCapture, "_on_node", interrupted)
        with open_context(model, hidden=True) as context, pytest.raises(KeyboardInterrupt):
            completion_states(context, examples(shared=False))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with open_context(model, hidden=True) as context:
        assert len(completion_states(context, examples(shared=False)).hidden)
