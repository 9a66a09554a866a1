"""The catalogue of public adapters: what each was trained on, and the token counts of its data."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError, InvalidFile
from edgelora.shipped import shipped

FOLDER = "catalogue"
ROWS_FILE = "lots-of-loras.jsonl"
COUNTS_FILE = "token_histograms.npz"
FIELDS = ("instruction", "prompt", "completion")
N_VOCAB = 32_000
BASE = "mistral-7b-instruct-v0.2"
# Of each adapter, rounded: rank 16 on q, k and v, published in float32, converted to float16.
DOWNLOAD_BYTES = 37_800_000
CONVERTED_BYTES = 18_900_000

_MAX_ROWS_BYTES = 16 << 20
_MAX_ARRAY_BYTES = 64 << 20
_MAX_ROWS = 100_000
_MAX_COUNT = (1 << 31) - 1
_MAX_LISTED = 20
# None is a path that leads elsewhere (`..`), for folders may be named after them.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TASK = re.compile(r"[A-Za-z0-9][\w.-]{0,199}", re.ASCII)
_TEXTS = ("source", "category", "licence")
# RuntimeError is zipfile's for an encrypted member or a compression that it does not know.
_MALFORMED = (
    OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '[<|][iu](?P<size>[1248])', 'fortran_order': False, "
    rb"'shape': \((?P<n>[0-9]{1,12}),\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Entry:
    """One public adapter.

    Attributes:
        task: the name of the task that it was trained on.
        adapter, dataset: repositories of the Hub.
        source, category, licence: of the task's data; () where the catalogue does not know.
        n_instances: size of the task's data, None where it is not known.
    """

    task: str
    adapter: str
    dataset: str
    source: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    licence: tuple[str, ...] = ()
    n_instances: int | None = None


@dataclass(frozen=True, eq=False)
class Counts:
    """Token counts of one field for k tasks, as a sparse matrix (CSR).

    Attributes:
        indptr: (k + 1,) int64: row i lies in [indptr[i], indptr[i + 1]).
        tokens: (n,) int64, strictly increasing within a row.
        counts: (n,) float64, each at least 1.
    """

    indptr: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: NDArray[np.float64]

    def row(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The token ids of one task, and how often each occurs; both (u,)."""
        inside = slice(int(self.indptr[i]), int(self.indptr[i + 1]))
        return self.tokens[inside], self.counts[inside]

    def take(self, rows: list[int]) -> Counts:
        """The counts of some rows, in that order."""
        parts = [self.row(i) for i in rows]
        sizes = [len(tokens) for tokens, _ in parts]
        return Counts(
            np.cumsum([0, *sizes], dtype=np.int64),
            np.concatenate([tokens for tokens, _ in parts] or [np.zeros(0, np.int64)]),
            np.concatenate([counts for _, counts in parts] or [np.zeros(0)]),
        )


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Every adapter, those whose data was counted first; `counts` by field are of those only."""

    counted: tuple[Entry, ...]
    uncounted: tuple[Entry, ...]
    counts: Mapping[str, Counts]


def read_catalogue(folder: Path | None = None) -> Catalogue:
    """The catalogue that ships with EdgeLoRA, or one of the same two files elsewhere.

    Nothing in the files is believed unchecked, and nothing is unpickled.

    Raises:
        InvalidFile: a file is missing, damaged, or not what this version reads; every problem found
            in it is listed.
    """
    folder = folder or shipped(FOLDER)
    entries = _read_rows(folder / ROWS_FILE)
    counts = _read_counts(folder / COUNTS_FILE, len(entries))
    known = np.all([np.diff(counts[name].indptr) > 0 for name in FIELDS], axis=0)
    rows = np.flatnonzero(known).tolist()
    return Catalogue(
        counted=tuple(entries[i] for i in rows),
        uncounted=tuple(entry for i, entry in enumerate(entries) if not known[i]),
        counts={name: counts[name].take(rows) for name in FIELDS},
    )


def _read_rows(path: Path) -> list[Entry]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_ROWS_BYTES + 1)
    except OSError as error:
        raise _invalid(path, [error.strerror or str(error)]) from error
    lines = data.splitlines()
    if len(data) > _MAX_ROWS_BYTES or not 1 <= len(lines) <= _MAX_ROWS:
        raise _invalid(path, [f"{len(lines)} lines; 1 to {_MAX_ROWS} can be read"])
    entries: list[Entry] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(_to_entry(json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error or type(error).__name__}")
    names = Counter(entry.task for entry in entries)
    problems += [f"{name} comes {n} times" for name, n in names.items() if n > 1]
    if problems:
        raise _invalid(path, problems)
    return entries


def _to_entry(row: object) -> Entry:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key, pattern in (("task", _TASK), ("adapter", _REPOSITORY), ("dataset", _REPOSITORY)):
        value = row.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"{key} is {str(value)[:80]!r}, not a name")
    texts = {key: row.get(key, []) for key in _TEXTS}
    for key, values in texts.items():
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{key} is not a list of texts")
    n_instances = row.get("instances")
    if n_instances is not None and (type(n_instances) is not int or n_instances < 0):
        raise ValueError(f"instances is {str(n_instances)[:80]!r}, not a number of instances")
    source, category, licence = (tuple(texts[key]) for key in _TEXTS)
    return Entry(
        row["task"], row["adapter"], row["dataset"], source, category, licence, n_instances
    )


def _read_counts(path: Path, k: int) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    problems: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            for field in FIELDS:
                names = (f"{field}_{part}" for part in ("indptr", "token", "count"))
                indptr, tokens, values = (_array(archive, name) for name in names)
                found = _count_problems(indptr, tokens, values, k)
                problems += [f"{field}: {problem}" for problem in found]
                counts[field] = Counts(indptr, tokens, values.astype(np.float64))
    except _MALFORMED as error:
        raise _invalid(path, [*problems, str(error) or type(error).__name__]) from error
    if problems:
        raise _invalid(path, problems)
    return counts


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[np.int64]:
    """One array of an npz; numpy reads it only when its header says what numpy itself writes."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > _MAX_ARRAY_BYTES:
        raise ValueError(f"{name} claims {info.file_size} bytes")
    raw = archive.read(info)
    header = _HEADER.match(raw)
    if header is None or int.from_bytes(raw[8:10], "little") != header.end() - 10:
        raise ValueError(f"{name} is not a list of whole numbers")
    if int(header["n"]) * int(header["size"]) != len(raw) - header.end():
        raise ValueError(f"{name} claims {int(header['n'])} numbers, and holds another number")
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    if array.dtype.kind == "u" and len(array) and int(array.max()) > _MAX_COUNT:
        raise ValueError(f"{name} holds numbers beyond 31 bits")
    return array.astype(np.int64)


def _count_problems(
    indptr: NDArray[np.int64], tokens: NDArray[np.int64], counts: NDArray[np.int64], k: int
) -> list[str]:
    if len(tokens) != len(counts):
        return [f"{len(tokens)} tokens with {len(counts)} counts"]
    if len(indptr) != k + 1 or indptr[0] != 0 or indptr[-1] != len(tokens):
        return [f"rows that do not fit {k} tasks and {len(tokens)} tokens"]
    if (np.diff(indptr) < 0).any():
        return ["rows that end before they begin"]
    problems = []
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= N_VOCAB):
        problems.append(f"token ids outside the vocabulary of {N_VOCAB}")
    if len(counts) and (counts.min() < 1 or counts.max() > _MAX_COUNT):
        problems.append("counts below 1, or beyond 31 bits")
    rows = np.repeat(np.arange(k), np.diff(indptr))
    if ((np.diff(tokens) <= 0) & (np.diff(rows) == 0)).any():
        problems.append("token ids of a row that do not increase")
    return problems


def _invalid(path: Path, problems: list[str]) -> EdgeLoRAError:
    more = len(problems) - _MAX_LISTED
    listed = problems[:_MAX_LISTED] + ([f"and {more} more"] if more > 0 else [])
    return InvalidFile(
        f"{path}: not a catalogue of adapters", problems=listed, hint="Install EdgeLoRA again."
    )
