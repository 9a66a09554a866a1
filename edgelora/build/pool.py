"""The adapters of a bank that a build may combine, with their signatures."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapters.base import BaseIdentity
from edgelora.bank import Bank, BankRecord
from edgelora.bank.calibration import read_calibration
from edgelora.errors import BankError
from edgelora.operators.calibration import Calibration
from edgelora.operators.distances import split_by_signature
from edgelora.signature import Signature

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pool:
    """k adapters for one base.

    Attributes:
        folder: the bank's.
        signatures: of each adapter's dataset, None where there is none.
        calibration: the bank's own, None where there is none, or one of another set of adapters,
            which `is_stale` tells.
    """

    folder: Path
    records: tuple[BankRecord, ...]
    signatures: tuple[Signature | None, ...]
    calibration: Calibration | None = None
    is_stale: bool = False

    @property
    def paths(self) -> list[Path]:
        """The adapters' files."""
        return [record.path for record in self.records]

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [record.name for record in self.records]

    @property
    def hashes(self) -> list[str]:
        """Of what is in the adapters' files."""
        return [record.content_sha256 for record in self.records]

    @property
    def signed(self) -> list[int]:
        """Positions of the adapters that have a signature."""
        return split_by_signature(self.signatures)[0]

    @property
    def unsigned(self) -> list[int]:
        """Positions of those that have none: operators on distances skip them."""
        return split_by_signature(self.signatures)[1]

    @property
    def n_layers(self) -> int:
        """The layers that all signatures come from (see Signature); 0 without any."""
        return self.others[0].n_layers if self.others else 0

    @property
    def others(self) -> list[Signature]:
        """The signatures that there are, in the order of `signed`."""
        return [signature for signature in self.signatures if signature is not None]

    def only(self, positions: Sequence[int]) -> Pool:
        """The adapters at these positions, in their order."""
        return replace(
            self,
            records=tuple(self.records[i] for i in positions),
            signatures=tuple(self.signatures[i] for i in positions),
        )

    def spread(self, positions: Sequence[int], values: Array) -> Array:
        """Coefficients (k,) with `values` at `positions` and 0 elsewhere."""
        coefficients = np.zeros(len(self.records))
        coefficients[list(positions)] = values
        return coefficients

    def with_priors(self, coefficients: Array) -> Array:
        """Coefficients (k,), not negative, times the bank's priors, with the same sum.

        An adapter without a prior has the mean of those that have one.
        """
        priors = self.calibration.priors if self.calibration else {}
        known = [priors[name] for name in self.names if name in priors]
        if not known:
            return coefficients
        values = np.array([priors.get(name, float(np.mean(known))) for name in self.names])
        weighted = coefficients * values
        return np.asarray(weighted * (coefficients.sum() / weighted.sum()))


def open_pool(
    bank: Bank, identity: BaseIdentity, exclude: Sequence[str], *, calibrated: bool = True
) -> Pool:
    """The adapters of `bank` for this base whose names match none of the patterns.

    Args:
        calibrated: use the bank's calibration where there is one.

    Raises:
        InvalidFile: a damaged calibration or signature.
        BankError: none is left (the other bases in the bank are named), or signatures that cannot
            be compared with each other.
    """
    everything = bank.records()
    records = tuple(
        record
        for record in everything
        if record.base_id == identity.id
        and not any(fnmatch.fnmatchcase(record.name, pattern) for pattern in exclude)
    )
    if not records:
        others = sorted({r.base.describe() for r in everything if r.base_id != identity.id})
        raise BankError(
            f"{bank.path}: no adapter is left for {identity.describe()}",
            problems=[f"adapters for {other}" for other in others],
            hint="Use the base that the adapters were made for, add some with `edgelora bank "
            "add`, or exclude fewer.",
        )
    signatures = tuple(
        bank.signature(record.name, identity.id) if record.has_signature else None
        for record in records
    )
    _refuse_mixed_layers(bank, records, signatures)
    stored = read_calibration(bank, identity.id) if calibrated else None
    if stored is None:
        return Pool(bank.path, records, signatures)
    is_stale = stored.is_stale(everything)
    return Pool(bank.path, records, signatures, None if is_stale else stored.values, is_stale)


def _refuse_mixed_layers(
    bank: Bank, records: Sequence[BankRecord], signatures: Sequence[Signature | None]
) -> None:
    """Embeddings after 8 layers say nothing about those after 32."""
    names: dict[int, list[str]] = {}
    for record, signature in zip(records, signatures, strict=True):
        if signature is not None:
            names.setdefault(signature.n_layers, []).append(record.name)
    if len(names) > 1:
        raise BankError(
            f"{bank.path}: signatures from different layers of the base cannot be compared",
            problems=[f"{n or 'all'} layers: {_listed(names[n])}" for n in sorted(names)],
            hint="Leave some out with --exclude, or remove those of one kind and add them again.",
        )


def find_warnings(pool: Pool, template_key: str) -> list[str]:
    """Adapters that were trained with another template, or that have no signature."""
    found = []
    others = [r.name for r in pool.records if r.template and r.template != template_key]
    if others:
        found.append(
            f"{len(others)} adapter(s) were trained with another prompt template and may help "
            f"less with this one: {_listed(others)}"
        )
    if pool.is_stale:
        found.append(
            "the bank's calibration is of another set of adapters and is not used; make it anew "
            "with `edgelora bank calibrate`"
        )
    unsigned = [pool.names[i] for i in pool.unsigned]
    if unsigned:
        found.append(
            f"{len(unsigned)} adapter(s) have no signature; operators on distances skip them: "
            f"{_listed(unsigned)}"
        )
    return found


def _listed(names: Sequence[str], n_shown: int = 5) -> str:
    shown = ", ".join(names[:n_shown])
    return shown if len(names) <= n_shown else f"{shown} and {len(names) - n_shown} more"
