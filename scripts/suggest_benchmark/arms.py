"""Ways to compare a dataset with the catalogue's rows by token counts: the paper's, and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray

from edgelora.operators.distances import DISTANCES
from edgelora.signature import Histogram, Signature, TextDistribution
from edgelora.suggest.catalogue import FIELDS, N_VOCAB, Catalogue
from suggest_benchmark.queries import Query

Scores = NDArray[np.float64]  # (n queries, k rows), larger is nearer
Matrix = sparse.csr_matrix  # (rows, N_VOCAB) counts
DEFAULT = "TF-IDF, by field"  # what `edgelora suggest` does
K1, B = 1.2, 0.75  # the usual constants of BM25
MU = 1_000.0  # tokens of the collection that are mixed into a row by query likelihood
_NOTHING = TextDistribution(
    1, np.zeros(1, np.float32), np.zeros((0, 1), np.float16), np.zeros(0, np.float32), 0.0,
    np.zeros((1, 32), np.float16), 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to compare; `by_field` ones are combined with weights that are tuned."""

    name: str
    by_field: bool
    compare: Callable[[Matrix, Matrix], Scores]


def matrices(queries: Sequence[Query], catalogue: Catalogue) -> dict[str, tuple[Matrix, Matrix]]:
    """For each field, and for all as one text (`pooled`): the counts of queries and of rows.

    As in the paper an instance of the pooled text is instruction, prompt and completion.
    """
    k = len(catalogue.counted)
    pairs = {}
    for name in FIELDS:
        counts = catalogue.counts[name]
        rows = sparse.csr_matrix((counts.counts, counts.tokens, counts.indptr), (k, N_VOCAB))
        own = sparse.vstack([sparse.csr_matrix(q.counts[name]) for q in queries], "csr")
        pairs[name] = (own, rows)
    n_own = sparse.diags([float(q.n_examples) for q in queries])
    n_rows = sparse.diags([float(min(400, e.n_instances or 400)) for e in catalogue.counted])
    (own, rows), *others = (pairs[name] for name in FIELDS)
    pairs["pooled"] = (
        sum((other for other, _ in others), n_own @ own).tocsr(),
        sum((other for _, other in others), n_rows @ rows).tocsr(),
    )
    return pairs


def chance(own: Matrix, rows: Matrix) -> Scores:
    """Any order, drawn by a seed: what a list of that length finds by itself."""
    return np.random.default_rng(0).random((own.shape[0], rows.shape[0]))


def paper(
    own: Matrix, rows: Matrix, *, name: str, advance: Callable[[int], None] = lambda n: None
) -> Scores:
    """The paper's distance as `edgelora.operators` has it, negated; 0 for an empty text."""
    others = [_signature(rows, i) for i in range(rows.shape[0])]
    scores = np.zeros((own.shape[0], rows.shape[0]))
    for i in range(own.shape[0]):
        signature = _signature(own, i)
        if signature.n_tokens:
            scores[i] = -DISTANCES[name](signature, others)
        advance(1)
    return scores


def cosine(own: Matrix, rows: Matrix) -> Scores:
    """Of counts."""
    return _cosine(own, rows)


def tf_idf(own: Matrix, rows: Matrix) -> Scores:
    """Cosine of (1 + log count) * idf, the formula of `edgelora.suggest.similarity`."""
    weights = sparse.diags(_idf(rows))
    return _cosine(_map(own, _log_count) @ weights, _map(rows, _log_count) @ weights)


def root_idf(own: Matrix, rows: Matrix, *, power: float) -> Scores:
    """Cosine of sqrt(count) * idf ** power; with power 0, 1 less the squared Hellinger distance."""
    weights = sparse.diags(_idf(rows) ** power)
    return _cosine(_map(own, np.sqrt) @ weights, _map(rows, np.sqrt) @ weights)


def bm25(own: Matrix, rows: Matrix) -> Scores:
    """Okapi BM25 of a row, the mean over the query's tokens (Robertson and Zaragoza, 2009)."""
    lengths = _sums(rows)
    cells = rows.tocoo()
    saturated = cells.data + (K1 * (1 - B + B * lengths / lengths.mean()))[cells.row]
    values = cells.data * (K1 + 1) / saturated
    weighted = sparse.csr_matrix((values, (cells.row, cells.col)), rows.shape)
    return _dense(_shares(own) @ (weighted @ sparse.diags(_idf(rows))).T)


def query_likelihood(own: Matrix, rows: Matrix) -> Scores:
    """log P(query | row) a token, Dirichlet-smoothed by all rows (Zhai and Lafferty, 2004)."""
    collection = np.asarray(_shares(rows).mean(axis=0)).ravel()
    cells = rows.tocoo()
    values = np.log1p(cells.data / (MU * collection[cells.col]))
    gains = sparse.csr_matrix((values, (cells.row, cells.col)), rows.shape)
    shares = _shares(own)
    return _dense(shares @ gains.T) + np.outer(_sums(shares), np.log(MU / (_sums(rows) + MU)))


ARMS: tuple[Arm, ...] = (
    Arm("chance", False, chance),
    *(Arm(f"paper: {n}", False, partial(paper, name=n)) for n in ("wd", "kl", "js", "mmd")),
    Arm("TF-IDF, one text", False, tf_idf),
    Arm("root counts, idf^0.25, one text", False, partial(root_idf, power=0.25)),
    Arm("cosine, by field", True, cosine),
    Arm("BM25, by field", True, bm25),
    Arm("query likelihood, by field", True, query_likelihood),
    Arm(DEFAULT, True, tf_idf),
    *(
        Arm(f"root counts, idf^{power:g}, by field", True, partial(root_idf, power=power))
        for power in (0.0, 0.25, 0.5, 1.0)
    ),
)


def _signature(counts: Matrix, i: int) -> Signature:
    inside = slice(counts.indptr[i], counts.indptr[i + 1])
    order = np.argsort(counts.indices[inside])
    ids = counts.indices[inside][order].astype(np.int32)
    values = counts.data[inside][order].astype(np.int32)
    total = int(values.sum(dtype=np.int64))
    return Signature(_NOTHING, None, Histogram(ids, values), N_VOCAB, total, "", "")


def _idf(rows: Matrix) -> NDArray[np.float64]:
    n_rows = np.asarray((rows > 0).sum(axis=0)).ravel()
    return np.log((rows.shape[0] + 1) / (n_rows + 1))


def _map(counts: Matrix, function: Callable[[Scores], Scores]) -> Matrix:
    mapped = counts.copy()
    mapped.data = function(mapped.data)
    return mapped


def _log_count(counts: Scores) -> Scores:
    return 1.0 + np.log(counts)


def _sums(counts: Matrix) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1)).ravel()


def _shares(counts: Matrix) -> Matrix:
    return _scaled(counts, _sums(counts))


def _scaled(counts: Matrix, sizes: NDArray[np.float64]) -> Matrix:
    """Each row divided by its size; an empty row stays empty."""
    return sparse.diags(np.divide(1.0, sizes, out=np.zeros_like(sizes), where=sizes > 0)) @ counts


def _cosine(own: Matrix, rows: Matrix) -> Scores:
    return _dense(_unit(own) @ _unit(rows).T)


def _unit(counts: Matrix) -> Matrix:
    return _scaled(counts, np.sqrt(_sums(counts.multiply(counts))))


def _dense(product: Matrix) -> Scores:
    return np.asarray(product.todense(), np.float64)
