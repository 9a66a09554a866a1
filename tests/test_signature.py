"""Signatures: moments by hand and by numpy, bytes that are small and stable, hostile files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from edgelora.errors import EdgeLoRAError, InvalidFile
from edgelora.signature import Signature, from_bytes, summarise
from edgelora.signature.record import N_PROJECTED, projection


def make(n: int = 40, d: int = 24, seed: int = 0, **changes: object) -> Signature:
    rng = np.random.default_rng(seed)
    arguments: dict = {
        "prompt_embeddings": rng.normal(size=(n, d)).astype(np.float32) + 3,
        "completion_embeddings": rng.normal(size=(n, d)).astype(np.float32),
        "token_ids": rng.integers(0, 100, size=(n, 10)).tolist(),
        "n_vocab": 100,
        "base_id": "base",
    }
    arguments.update(changes)
    return summarise(**arguments)


def test_two_points_by_hand() -> None:
    x = np.array([[1.0, 0.0], [5.0, 0.0]], np.float32)
    signature = summarise(x, None, [[7, 3], [7]], n_vocab=9, base_id="b", description="two")
    field = signature.prompt
    assert field.mean.tolist() == [3.0, 0.0]
    assert field.basis.tolist() == [[1.0, 0.0]]
    assert field.variances.tolist() == [8.0]  # ((-2)^2 + 2^2) / (2 - 1)
    assert field.residual_variance == pytest.approx(0.0, abs=1e-12)
    assert signature.histogram.ids.tolist() == [3, 7]
    assert signature.histogram.counts.tolist() == [1, 2]
    assert (signature.n_tokens, signature.completion) == (3, None)


@pytest.mark.parametrize(("n", "d"), [(40, 24), (10, 30)])
def test_moments_equal_numpys_covariance(n: int, d: int) -> None:
    x = (np.random.default_rng(1).normal(size=(n, d)) * np.geomspace(9, 1, d)).astype(np.float32)
    field = summarise(x, None, [[0]], n_vocab=1, base_id="b").prompt
    covariance = np.cov(x, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    q = len(field.variances)
    assert field.variances == pytest.approx(values[::-1][:q], rel=1e-4)
    assert np.abs((field.basis @ vectors[:, ::-1][:, :q]).diagonal()) == pytest.approx(1, abs=2e-3)
    total = field.variances.sum() + field.residual_variance
    assert total == pytest.approx(np.trace(covariance), rel=1e-5)
    assert field.mean == pytest.approx(x.mean(axis=0), abs=1e-5)


def test_sample_points_are_the_projected_embeddings() -> None:
    x = np.random.default_rng(2).normal(size=(20, 24)).astype(np.float32)
    points = summarise(x, None, [[0]], n_vocab=1, base_id="b").prompt.points()
    assert points == pytest.approx(x @ projection(24), abs=5e-3)


def test_projection_never_changes_and_keeps_distances() -> None:
    assert projection(3).shape == (3, N_PROJECTED)
    signs = "".join("+" if value > 0 else "-" for value in projection(1)[0])
    assert signs == "+-++-----+-+-+--+++--------++--+"
    x = np.random.default_rng(3).normal(size=(200, 300))
    ratio = ((x @ projection(300)) ** 2).sum(axis=1) / (x**2).sum(axis=1)
    assert ratio.mean() == pytest.approx(1.0, abs=0.1)


def test_round_trip_is_exact_and_bytes_repeat() -> None:
    signature = make(description="Grüße")
    data = signature.to_bytes()
    again = from_bytes(data)
    assert again.to_bytes() == data == make(description="Grüße").to_bytes()
    for name, field in signature.fields().items():
        copy = again.fields()[name]
        for key in ("mean", "basis", "variances", "sample"):
            assert np.array_equal(getattr(field, key), getattr(copy, key)), (name, key)
        assert (field.n, field.residual_variance, field.sample_scale) == (
            copy.n,
            copy.residual_variance,
            copy.sample_scale,
        )
    assert np.array_equal(again.histogram.counts, signature.histogram.counts)
    assert (again.base_id, again.description, again.d) == ("base", "Grüße", 24)


def test_seed_draws_the_sample_only() -> None:
    first, second = make(n=200, seed=0), make(n=200, seed=0)
    other = summarise(
        np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32) + 3,
        None,
        [[0]],
        n_vocab=1,
        base_id="b",
        seed=9,
    )
    assert np.array_equal(first.prompt.sample, second.prompt.sample)
    assert not np.array_equal(first.prompt.sample, other.prompt.sample)
    assert np.array_equal(first.prompt.mean, other.prompt.mean)


def test_one_text_is_enough() -> None:
    one = make(n=1, completion_embeddings=None)
    assert one.prompt.variances.shape == (0,)
    assert from_bytes(one.to_bytes()).prompt.residual_variance == 0.0


@pytest.mark.parametrize(("d", "limit"), [(576, 30_000), (4096, 48_000)])
def test_bytes_besides_the_histogram(d: int, limit: int) -> None:
    few = [[1, 2, 3]]
    assert len(make(n=70, d=d, token_ids=few, description="x" * 200).to_bytes()) < limit


def test_histogram_of_a_real_size_is_compact() -> None:
    rng = np.random.default_rng(4)
    ids = np.minimum(rng.zipf(1.3, size=60_000), 49_151).tolist()
    signature = make(n_vocab=49_152, token_ids=[ids])
    plain = make(n_vocab=49_152, token_ids=[[0]])
    distinct = len(signature.histogram.ids)
    assert distinct > 2_000
    assert len(signature.to_bytes()) - len(plain.to_bytes()) < 2 * distinct


def test_wrong_input_is_listed_whole() -> None:
    bad = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(EdgeLoRAError) as caught:
        make(
            prompt_embeddings=bad,
            completion_embeddings=np.ones((2, 4), np.float32),
            token_ids=[[100]],
            description="x" * 3_000,
        )
    assert len(caught.value.problems) == 4
    with pytest.raises(EdgeLoRAError, match="float16"):
        make(prompt_embeddings=np.full((2, 24), 1e6, np.float32))
    with pytest.raises(EdgeLoRAError, match="not \\(n, d\\)"):
        make(prompt_embeddings=np.zeros((0, 24), np.float32))


def rewrite(data: bytes, facts: dict | None = None, **tensors: np.ndarray | None) -> bytes:
    """The same file with some facts or tensors replaced (None: removed)."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = json.loads(header["__metadata__"]["edgelora.signature"])
    arrays = {**load(data), **{key.replace("__", "."): value for key, value in tensors.items()}}
    return save(
        {key: value for key, value in arrays.items() if value is not None},
        metadata={"edgelora.signature": json.dumps({**stored, **(facts or {})})},
    )


HALF = np.float16
HOSTILE = {
    "empty": lambda data: b"",
    "text": lambda data: b"<html>not found</html>",
    "truncated": lambda data: data[:-5],
    "other tensors": lambda data: save({"x": np.zeros(3)}),
    "no metadata key": lambda data: save(load(data), metadata={"format": "pt"}),
    "version": lambda data: rewrite(data, {"version": 3}),
    "layers": lambda data: rewrite(data, {"version": 2, "n_layers": True}),
    "no layers": lambda data: rewrite(data, {"version": 2}),
    "deep json": lambda data: save(load(data), metadata={"edgelora.signature": "[" * 100_000}),
    "vocabulary": lambda data: rewrite(data, {"n_vocab": 1 << 60, "n_distinct": 1 << 59}),
    "fewer ids": lambda data: rewrite(data, {"n_distinct": 3}),
    "negative ids": lambda data: rewrite(data, {"n_distinct": -1}),
    "n_tokens": lambda data: rewrite(data, {"n_tokens": 1}),
    "bool": lambda data: rewrite(data, {"n_tokens": True}),
    "not a string": lambda data: rewrite(data, {"base_id": 7}),
    "field facts": lambda data: rewrite(data, {"prompt": [40, float("nan"), 1.0]}),
    "field shape": lambda data: rewrite(data, {"prompt": 3}),
    "huge scale": lambda data: rewrite(data, {"prompt": [40, 10**400, 1.0]}),
    "zero scale": lambda data: rewrite(data, {"prompt": [40, 0.0, 0.0]}),
    "too few texts": lambda data: rewrite(data, {"prompt": [2, 0.0, 1.0]}),
    "missing tensor": lambda data: rewrite(data, prompt__mean=None),
    "nan": lambda data: rewrite(data, prompt__mean=np.full(24, np.nan, np.float32)),
    "integers": lambda data: rewrite(data, prompt__mean=np.zeros(24, np.int32)),
    "scalar": lambda data: rewrite(data, prompt__mean=np.array(1, np.float32)),
    "widths": lambda data: rewrite(data, completion__mean=np.zeros(25, np.float32)),
    "negative variance": lambda data: rewrite(data, prompt__variances=-np.ones(4, np.float32)),
    "sample": lambda data: rewrite(data, prompt__sample=np.zeros((0, N_PROJECTED), HALF)),
    "a mean that overflows": lambda data: rewrite(data, prompt__mean=np.full(24, 1e30, "f4")),
    "a basis beyond float16": lambda data: rewrite(
        data, prompt__basis=np.full((23, 24), 1e30, "f4")
    ),
    "a scale that overflows": lambda data: rewrite(data, {"prompt": [40, 0.0, 1e300]}),
    "a variance that overflows": lambda data: rewrite(data, {"prompt": [40, 1e300, 1.0]}),
    "not zlib": lambda data: rewrite(data, histogram=np.zeros(30, np.uint8)),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_files_are_refused(damage) -> None:
    with pytest.raises(InvalidFile, match="here.safetensors"):
        from_bytes(damage(make().to_bytes()), "here.safetensors")


def test_a_compressed_bomb_is_not_unpacked() -> None:
    import zlib

    bomb = np.frombuffer(zlib.compress(bytes(1 << 24)), np.uint8)
    with pytest.raises(InvalidFile, match="another size"):
        from_bytes(rewrite(make().to_bytes(), histogram=bomb))
