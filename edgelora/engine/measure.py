"""How fast this CPU runs a base in each type of weights, and with how many threads: tried out."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from edgelora.adapters.base import Base, read_base
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.model import Model, ModelOptions, open_model
from edgelora.engine.quantize import FILE_TYPES, quantize
from edgelora.engine.threads import Threads, default_threads
from edgelora.errors import EdgeLoRAError, EngineError

TYPES = ("q4_0", "q4_1", "q4_k_m", "q6_k", "q8_0", "bf16", "f16")
N_PROMPT, N_ANSWER = 512, 16
MAX_COPY_BYTES = 1_200_000_000  # of the largest copy: a few layers tell what the others take
CLOSE = 0.97  # fewer threads that are nearly as fast leave a core to others
_K_BLOCK = 256
_BITS = {"q4_0": 4.5, "q4_1": 5.0, "q4_k_m": 4.85, "q6_k": 6.56, "q8_0": 8.5}
_MARGIN_BYTES = 200_000_000


@dataclass(frozen=True)
class TypeSpeed:
    """One type of weights on this CPU.

    Attributes:
        size_bytes: of the whole base in this type, about.
        prompt, decode: tokens a second of the whole base, reading a prompt and writing an answer.
    """

    file_type: str
    size_bytes: int
    prompt: float
    decode: float

    def seconds(self) -> float:
        """For a prompt of 512 tokens and an answer of 128."""
        return 512 / self.prompt + 128 / self.decode


@dataclass(frozen=True)
class Measured:
    """What was measured on the first `n_measured` layers of `n_layer`.

    Attributes:
        left_out: types that this base cannot have, or that did not fit, and why.
        threads: the best for its first type, fewer where that is nearly as fast.
    """

    architecture: str
    n_layer: int
    n_measured: int
    threads: Threads
    types: tuple[TypeSpeed, ...]
    left_out: dict[str, str]

    def fastest(self, ram_bytes: int) -> TypeSpeed:
        """The type in which a prompt of 512 tokens and an answer of 128 take least time.

        Of those that leave a quarter of the RAM free; of the smallest alone, if none does.
        """
        smallest = min(self.types, key=lambda t: t.size_bytes)
        fitting = [t for t in self.types if t.size_bytes <= 0.75 * ram_bytes] or [smallest]
        return min(fitting, key=TypeSpeed.seconds)


def measure_types(
    path: Path,
    *,
    types: Sequence[str] = TYPES,
    n_threads: int = 0,
    rounds: int = 3,
    progress: Callable[[str, int], None] = lambda file_type, n_done: None,
) -> Measured:
    """Write the base's first layers in each type, time them, and remove them again.

    The time of a layer counts once for each layer of the base; that of the head once.

    Args:
        n_threads: for all; 0 tries which are best, on the first type.
        rounds: of which the fastest counts.
        progress: (type that comes next, types done).

    Raises:
        InvalidFile, UnsupportedFile: not one whole model.
        EdgeLoRAError: no room on the disk for temporary files, or no type could be measured.
    """
    base = read_base(path)
    n_measured = _layers_that_fit(base)
    threads = Threads(n_threads, n_threads) if n_threads else None
    found, left_out = [], {}
    with tempfile.TemporaryDirectory(prefix="edgelora-measure-") as folder:
        _refuse_full_disk(base, n_measured, Path(folder))
        for done, file_type in enumerate(types):
            progress(file_type, done)
            copy = Path(folder) / "copy.gguf"
            try:
                _refuse_type(base, file_type)
                quantize(path, copy, file_type, n_layers=n_measured, n_threads=n_threads)
                with open_model(copy, ModelOptions(n_threads=n_threads)) as model:
                    threads = threads or _best_threads(model, rounds)
                    speed = _speed(model, threads, base.n_layer / n_measured, rounds)
            except EngineError as error:
                left_out[file_type] = error.what
                continue
            finally:
                copy.unlink(missing_ok=True)
            found.append(TypeSpeed(file_type, _size(base, file_type, base.n_layer), *speed))
        progress("", len(types))
    if threads is None:
        raise EdgeLoRAError(f"{path}: nothing could be measured", problems=list(left_out.values()))
    return Measured(base.architecture, base.n_layer, n_measured, threads, tuple(found), left_out)


def _refuse_type(base: Base, file_type: str) -> None:
    if file_type not in FILE_TYPES:
        raise EngineError(f"{file_type}: not a type that is written here")
    if "_k" in file_type and base.n_embd % _K_BLOCK:
        raise EngineError(f"{file_type}: rows of {base.n_embd} are not whole blocks of {_K_BLOCK}")


def _size(base: Base, file_type: str, n_layers: int) -> int:
    """Bytes of the matrices with so many layers, about: some stay in a larger type."""
    n = sum(
        int(np.prod(shape))
        for name, shape in base.shapes.items()
        if not name.startswith("blk.") or int(name.split(".")[1]) < n_layers
    )
    return int(n * _BITS.get(file_type, 16) / 8)


def _layers_that_fit(base: Base) -> int:
    """As many as the largest copy may have, two at least."""
    for n in range(base.n_layer, 2, -1):
        if _size(base, "bf16", n) <= MAX_COPY_BYTES:
            return n
    return min(2, base.n_layer)


def _refuse_full_disk(base: Base, n_layers: int, folder: Path) -> None:
    needed = _size(base, "bf16", n_layers) + _MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeLoRAError(
            f"{folder}: {free / 1e9:.1f} GB free, temporary files take {needed / 1e9:.1f} GB",
            hint="Free some space, or set TMPDIR to a folder on another disk.",
        )


def _best_threads(model: Model, rounds: int) -> Threads:
    """The fewest that are nearly as fast as the fastest, for prompts and answers each."""
    candidates = sorted({1, max(1, default_threads() // 2), default_threads(), _n_logical()})
    with _ready(model) as context:
        times = []
        for n in candidates:
            context.set_threads(Threads(n, n))
            times.append((_time_prompt(context, rounds), _time_answer(context, rounds)))
    best = []
    for kind in (0, 1):
        limit = min(pair[kind] for pair in times) / CLOSE
        best.append(
            next(n for n, pair in zip(candidates, times, strict=True) if pair[kind] <= limit)
        )
    return Threads(*best)


def _n_logical() -> int:
    return psutil.cpu_count() or 1


def _speed(model: Model, threads: Threads, n_times: float, rounds: int) -> tuple[float, float]:
    """Tokens a second of prompts and answers, if each layer were there `n_times`."""
    with _ready(model) as context:
        context.set_threads(threads)
        prompt, answer = _time_prompt(context, rounds), _time_answer(context, rounds)
    with _ready(model, hidden=True) as context:
        context.set_threads(threads)
        head = max(0.0, answer - _time_answer(context, rounds))
    prompt = (prompt - head) * n_times + head
    answer = (answer - head) * n_times + head
    return N_PROMPT / prompt, 1.0 / answer


@contextmanager
def _ready(model: Model, *, hidden: bool = False) -> Iterator[Context]:
    """A context whose graphs are made and whose weights have been read once."""
    n_ctx = N_PROMPT + N_ANSWER
    with open_context(
        model, n_ctx=n_ctx, n_batch=N_PROMPT, n_sequences=1, n_outputs=1, hidden=hidden
    ) as context:
        _time_prompt(context, 1)
        _time_answer(context, 1)
        yield context


def _time_prompt(context: Context, rounds: int) -> float:
    """Seconds of a prompt of N_PROMPT tokens, or as many as a batch takes."""
    n = context.n_batch
    rows = [
        Row(1 + i % (context.model.vocabulary.n_tokens - 1), i, 0, i == n - 1) for i in range(n)
    ]
    seconds = []
    for _ in range(rounds):
        context.clear()
        seconds.append(_time(context, rows))
    return min(seconds) * N_PROMPT / n


def _time_answer(context: Context, rounds: int) -> float:
    """Seconds of one token of an answer, after a prompt."""
    context.clear()
    position = min(context.n_batch, context.n_ctx - N_ANSWER - 1)
    rows = [Row(1, i, 0) for i in range(position)]
    if rows:
        context.decode(rows)
    seconds = []
    for _ in range(rounds):
        context.truncate(0, position)
        started = time.perf_counter()
        for i in range(N_ANSWER):
            context.decode([Row(1, position + i, 0, output=True)])
        seconds.append((time.perf_counter() - started) / N_ANSWER)
    return min(seconds)


def _time(context: Context, rows: Sequence[Row]) -> float:
    started = time.perf_counter()
    context.decode(rows)
    return time.perf_counter() - started
