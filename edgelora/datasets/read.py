"""A dataset file to examples: the format is recognised and named, bad lines are reported."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgelora.datasets.formats import BadRecord, Layout, find_layout, instances_of, to_example
from edgelora.datasets.records import Dataset, Example
from edgelora.errors import DatasetError

__all__ = ["Dataset", "Example", "read_dataset"]

MAX_LISTED = 20
_MAX_CELL_CHARS = 16 * 1024 * 1024
_PYARROW = 'Reading parquet needs pyarrow: pip install "edgelora[parquet]"'

# A record with its 1-based number, or the reason why there is none.
Numbered = tuple[int, "dict[str, object] | BadRecord"]


@dataclass(frozen=True)
class _Source:
    """A file opened as records: what it is, what a number counts, and the records."""

    name: str
    unit: str
    records: Iterator[Numbered]
    columns_fixed: bool = False


@dataclass
class _Problems:
    """Bad records: all are counted, the first are kept with their reasons."""

    unit: str
    count: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"{self.unit} {number}: {reason}")

    def lines(self) -> list[str]:
        """The kept reasons, and how many more there were."""
        more = self.count - len(self.listed)
        return [*self.listed, f"{more} more {self.unit}s"] if more else self.listed


def read_dataset(
    path: Path,
    *,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read JSONL, a JSON array, CSV, parquet or a Super-NaturalInstructions task file.

    Columns: prompt/completion (with an optional list `references`), instruction/input/output,
    input/output, messages, text; a column `system` becomes a system turn; `prompt_key` and
    `completion_key` name other columns. Blank lines, a BOM and CRLF are fine. A bad line is a
    warning with its number; `limit` takes the first N examples.

    Raises:
        DatasetError: no such file, no known layout, no example at all, more than
            max(5, 1 %) bad lines, or more bad lines than good ones.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DatasetError(f"a limit of {limit} examples leaves nothing to read")
    try:
        source = _open(path)
        if source.columns_fixed and (prompt_key or completion_key):
            raise DatasetError(f"{source.name}: the columns of this format cannot be chosen")
        return _collected(path, source, prompt_key, completion_key, limit)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DatasetError as error:
        if error.what.startswith(str(path)):
            raise
        what = f"{path}: {error.what}"
        raise DatasetError(what, problems=error.problems, hint=error.hint) from error


def _collected(
    path: Path,
    source: _Source,
    prompt_key: str | None,
    completion_key: str | None,
    limit: int | None,
) -> Dataset:
    layout: Layout | None = None
    problems = _Problems(source.unit)
    unknown: DatasetError | None = None
    examples: list[Example] = []
    for number, record in source.records:
        if isinstance(record, BadRecord):
            problems.add(number, str(record))
            continue
        try:
            layout = layout or find_layout(record, prompt_key, completion_key)
            examples.append(to_example(record, layout, number))
        except BadRecord as error:
            problems.add(number, str(error))
        except DatasetError as error:
            unknown = unknown or error
            problems.add(number, error.what)
        if len(examples) == limit:
            break
    if layout is None and unknown is not None:
        raise unknown
    examples = _same_kind(examples, problems)
    _refuse_too_many(problems, len(examples))
    name = source.name if layout is None or source.columns_fixed else f"{source.name} {layout.name}"
    return Dataset(path, name, tuple(examples), tuple(f"left out {p}" for p in problems.lines()))


def _same_kind(examples: list[Example], problems: _Problems) -> list[Example]:
    """Drop (and report) lines without an answer from a dataset where others have one."""
    answered = [example for example in examples if example.completion is not None]
    if not answered or len(answered) == len(examples):
        return examples
    for example in examples:
        if example.completion is None:
            problems.add(example.line, "no completion, while other lines have one")
    return answered


def _refuse_too_many(problems: _Problems, n_good: int) -> None:
    total = n_good + problems.count
    if total == 0:
        raise DatasetError("holds no examples", hint="Each example is one line or one record.")
    allowed = max(5.0, 0.01 * total)
    if problems.count <= allowed and problems.count <= n_good:
        return
    raise DatasetError(
        f"{problems.count} of {total} {problems.unit}s cannot be used",
        problems=problems.lines(),
        hint="Correct them, or name the columns with --prompt-key and --completion-key.",
    )


def _open(path: Path) -> _Source:
    """Recognise a file by its first bytes, then by its suffix."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] == b"PAR1":
        return _Source("parquet", "row", _parquet_records(path))
    if head.startswith(b"version https://git-lfs"):
        raise DatasetError("is a Git LFS pointer, not the data", hint="Run git lfs pull.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DatasetError("is UTF-16 text", hint="Save it as UTF-8.")
    if head[:2] == b"\x1f\x8b" or head[:2] == b"PK":
        raise DatasetError("is compressed", hint="Unpack it first.")
    return _BY_SUFFIX.get(path.suffix.lower(), _open_json)(path)


def _open_csv(path: Path) -> _Source:
    # Bytes that are no UTF-8 become lone surrogates here; to_example then refuses that line.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    return _Source("csv", "line", _csv_records(text, path.suffix.lower()))


def _csv_records(text: str, suffix: str) -> Iterator[Numbered]:
    lines = io.StringIO(text, newline="")
    # Strict, because otherwise a quote that is never closed swallows the rest of the file.
    reader = csv.reader(lines, delimiter=_delimiter(text, suffix), strict=True)
    limit_before = csv.field_size_limit(_MAX_CELL_CHARS)
    try:
        header = [name.strip() for name in next(reader, [])]
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DatasetError(f"the header names {', '.join(map(repr, repeated))} twice")
        for row in reader:
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
            elif any(cell.strip() for cell in row):
                reason = f"{len(row)} cells, but the header has {len(header)}"
                yield reader.line_num, BadRecord(reason)
    except csv.Error as error:
        raise DatasetError(f"line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit_before)


def _delimiter(text: str, suffix: str) -> str:
    """Comma, or what a spreadsheet wrote instead of it (tab, semicolon)."""
    header = text.lstrip().partition("\n")[0]
    if suffix == ".tsv" or ("\t" in header and "," not in header):
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _parquet_records(path: Path) -> Iterator[Numbered]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError("is a parquet file", hint=_PYARROW) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    # to_pylist makes Python's own values, which have bounds and time zones of their own.
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError, TypeError) as error:
        raise DatasetError(f"damaged parquet after row {number}: {error}") from error


def _open_json(path: Path) -> _Source:
    """JSON lines, or one JSON value over many lines: an array of records or an SNI task."""
    first = _first_line(path)
    value = _parsed(first)
    if isinstance(value, dict) and "Instances" not in value:
        return _Source("jsonl", "line", _jsonl_records(path))
    if first[:1] in (b"[", b"{"):
        whole = _parsed(path.read_bytes())
        if isinstance(whole, list):
            return _Source("json array", "record", _numbered(whole))
        if isinstance(whole, dict) and "Instances" in whole and "Definition" in whole:
            records = _numbered(instances_of(whole))
            return _Source("Super-NaturalInstructions task", "instance", records, True)
        if isinstance(whole, dict):
            records = iter([(1, whole)])
            return _Source("json", "record", records)
    return _Source("jsonl", "line", _jsonl_records(path))


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        stripped = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
        return next((line for line in stripped if line), b"")


def _jsonl_records(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, _as_record(_parsed(line))


def _numbered(values: list[object] | list[dict[str, object]]) -> Iterator[Numbered]:
    return ((number, _as_record(value)) for number, value in zip(itertools.count(1), values))


def _as_record(value: object) -> dict[str, object] | BadRecord:
    if isinstance(value, BadRecord | dict):
        return value
    return BadRecord("not a JSON object with named fields")


def _parsed(line: bytes) -> object:
    """The JSON value of `line`, or a BadRecord that says why there is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return BadRecord(f"not JSON ({error.msg}, column {error.colno})")
    except ValueError:
        return BadRecord("a number with too many digits")
    except RecursionError:
        return BadRecord("nested too deeply")


_BY_SUFFIX: dict[str, Callable[[Path], _Source]] = {".csv": _open_csv, ".tsv": _open_csv}
