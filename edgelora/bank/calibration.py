"""The calibration of a bank, as a small JSON file in its folder; hostile until checked.

It belongs to the adapters that were there when it was made: their names and hashes are hashed into
it, so that one of another set is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelora.bank.records import BankRecord
from edgelora.bank.store import Bank
from edgelora.errors import InvalidFile
from edgelora.files import write_atomic
from edgelora.operators.calibration import Calibration, Fit

FORMAT = "edgelora-calibration"
FORMAT_VERSION = 1
SUFFIX = ".json"
PREFIX = "calibration."
LOSSES_SUFFIX = ".losses.json"
MAX_BYTES = 16 << 20
_MAX_ADAPTERS = 100_000
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, eq=False)
class StoredCalibration:
    """A calibration, and what it belongs to.

    Attributes:
        adapters: see `set_key`.
    """

    base_id: str
    adapters: str
    values: Calibration

    def is_stale(self, records: Sequence[BankRecord]) -> bool:
        """Whether the bank has other adapters for this base by now."""
        return self.adapters != set_key(records, self.base_id)


def calibration_path(bank: Bank, base_id: str) -> Path:
    """Where the calibration for the adapters of one base lies."""
    return bank.path / f"{PREFIX}{base_id}{SUFFIX}"


def losses_path(bank: Bank, base_id: str) -> Path:
    """Where the losses that it was fitted on are kept."""
    return bank.path / f"{PREFIX}{base_id}{LOSSES_SUFFIX}"


def set_key(records: Sequence[BankRecord], base_id: str) -> str:
    """A hash of the names and contents of all adapters for one base."""
    own = sorted(
        (r.name, r.content_sha256, r.has_signature) for r in records if r.base_id == base_id
    )
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()


def write_calibration(bank: Bank, base_id: str, values: Calibration) -> Path:
    """Keep the calibration of the adapters that the bank has for a base now.

    Raises:
        BankError: a full disk, a lock that stays held.
    """
    path = calibration_path(bank, base_id)
    with bank.writing():
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "base": base_id,
            "adapters": set_key(bank.records(), base_id),
            "values": asdict(values),
        }
        data = json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
        parse_calibration(data, str(path))
        write_atomic(path, data)
    return path


def read_calibration(bank: Bank, base_id: str) -> StoredCalibration | None:
    """The calibration for the adapters of one base, None if there is none.

    Raises:
        InvalidFile: damaged, of another version or another base.
    """
    path = calibration_path(bank, base_id)
    if not path.is_file():
        return None
    found = parse_calibration(read_limited(path), str(path))
    if found.base_id != base_id:
        raise _invalid(str(path), f"it is for the base {found.base_id}")
    return found


def calibration_files(bank: Bank) -> list[Path]:
    """Every calibration of the bank's folder, whatever its base."""
    found = bank.path.glob(f"{PREFIX}*{SUFFIX}")
    return sorted(path for path in found if not path.name.endswith(LOSSES_SUFFIX))


def read_limited(path: Path) -> bytes:
    """The bytes of a file of at most 16 MiB.

    Raises:
        InvalidFile: it is larger, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _invalid(str(path), f"more than {MAX_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _invalid(str(path), str(error.strerror or error)) from error


def parse_calibration(data: bytes, where: str) -> StoredCalibration:
    """Read what `write_calibration` wrote, trusting nothing in it.

    Raises:
        InvalidFile: not such a file, of another version, or with values out of bounds.
    """
    try:
        content = json.loads(data)
        if (content["format"], content["version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(
                f"format {content['format']!r}, version {content['version']!r}; this program reads "
                f"{FORMAT}, version {FORMAT_VERSION}"
            )
        return StoredCalibration(
            _text(content["base"]), _text(content["adapters"]), _values(content["values"])
        )
    except _MALFORMED as error:
        raise _invalid(where, f"{type(error).__name__}: {error}") from error


def _values(facts: Mapping[str, Any]) -> Calibration:
    if facts["evidence"] not in ("losses", "categories"):
        raise ValueError(f"evidence {facts['evidence']!r}")
    distances = {_text(name): _fit(fit) for name, fit in facts["distances"].items()}
    shortlists = {_text(name): _count(n) for name, n in facts["shortlists"].items()}
    priors = {_text(name): _number(p, 0.0, 1.0) for name, p in facts["priors"].items()}
    if not distances or set(distances) != set(shortlists) or len(priors) > _MAX_ADAPTERS:
        raise ValueError("other distances than shortlists, none, or too many priors")
    if any(prior == 0.0 for prior in priors.values()):
        raise ValueError("a prior of 0")
    return Calibration(
        evidence=facts["evidence"],
        n_targets=_count(facts["n_targets"]),
        share=_number(facts["share"], 0.0, 1.0),
        distances=distances,
        shortlists=shortlists,
        mixture=None if facts["mixture"] is None else _fit(facts["mixture"]),
        gibbs=None if facts["gibbs"] is None else _fit(facts["gibbs"]),
        priors=priors,
    )


def _fit(facts: Mapping[str, Any]) -> Fit:
    temperature = _number(facts["temperature"], 0.0, 1e12)
    if temperature == 0.0:
        raise ValueError("a temperature of 0")
    return Fit(
        temperature, _number(facts["score"], -1e3, 0.0), _number(facts["uniform"], -1e3, 0.0)
    )


def _number(value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:100]!r} is no number")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{value} is not from {low:g} to {high:g}")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_ADAPTERS:
        raise ValueError(f"{str(value)[:100]!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 255:
        raise TypeError(f"{str(value)[:100]!r} is no short text")
    return value


def _invalid(where: str, why: str) -> InvalidFile:
    return InvalidFile(
        f"{where}: not a sound calibration ({why})",
        hint="Delete it, or make it anew: edgelora bank calibrate --bank BANK --base BASE.",
    )
