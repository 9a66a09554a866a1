"""`edgelora merge`: the weighted sum of adapters, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import combine_options, force_option, json_option

if TYPE_CHECKING:
    from edgelora.adapters.gguf_lora import LoraFile
    from edgelora.adapters.merge import MergeReport


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="FILE[:WEIGHT]...")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The adapter to write."
)
@combine_options
@click.option("--scale", default=1.0, show_default=True, help="Multiplies every weight.")
@force_option
@json_option
@console.common_options
@console.tells_memory
def command(
    adapters: tuple[str, ...],
    out: Path,
    combine: str,
    scale: float,
    force: bool,
    as_json: bool,
    rank: int | str,
    dtype: str,
    **_: Any,
) -> None:
    """Combine adapters by hand: the sum of each one's update times its weight (1 if not given).

    Example: edgelora merge a.gguf:0.7 b.gguf:-0.3 -o c.gguf
    """
    from edgelora.adapters.gguf_lora import open_loras
    from edgelora.adapters.merge import merge_adapters

    paths, weights = zip(*map(parse_weighted, adapters), strict=True)
    if any(path.resolve() == out.resolve() for path in paths):
        raise click.UsageError(f"{out} is one of the adapters: write to another file.")
    files = open_loras(paths)
    n_tensors = len({name for file in files for name in file.names})
    with console.progress("combining", n_tensors) as advance:
        report = merge_adapters(
            files, weights, out, method=combine, rank=rank, scale=scale, dtype=dtype, force=force,
            progress=advance,
        )  # fmt: skip
    for warning in _warnings(report):
        console.warn(console.safe(warning))
    if as_json:
        console.show_json(_as_json(report, files, weights, scale))
    else:
        _show(report, files, weights, scale)


def parse_weighted(text: str) -> tuple[Path, float]:
    """`A.gguf:0.7` to its path and weight; without a weight, 1.

    The last colon counts only where a number follows, so that `C:\\adapters\\a.gguf` is a path.

    Raises:
        click.BadParameter: a weight that is not a finite number.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        if not head.lower().endswith(".gguf"):
            return Path(text), 1.0
        weight = math.nan
    if not head or not math.isfinite(weight):
        raise click.BadParameter(
            f"{text}: write FILE:WEIGHT with a finite number, such as a.gguf:0.7"
        )
    return Path(head), weight


def _warnings(report: MergeReport) -> list[str]:
    found = list(report.warnings)
    if report.cancelled:
        found.append(
            f"{len(report.cancelled)} tensors cancel out exactly and were left out: "
            f"{', '.join(report.cancelled[:5])}{' ...' if len(report.cancelled) > 5 else ''}"
        )
    return found


def _as_json(
    report: MergeReport, files: Sequence[LoraFile], weights: Sequence[float], scale: float
) -> dict[str, object]:
    return {
        "out": str(report.path),
        "combine": report.method,
        "scale": scale,
        "sources": [
            {"file": str(file.path), "weight": weight, "sha256": file.sha256}
            for file, weight in zip(files, weights, strict=True)
        ],
        "rank": report.max_rank,
        "relative_error": report.error,
        "excess": report.excess,
        "tensors": [vars(tensor) for tensor in report.tensors],
        "cancelled": list(report.cancelled),
        "size_bytes": report.path.stat().st_size,
        "peak_memory": console.peak_memory(),
        "warnings": _warnings(report),
    }


def _show(
    report: MergeReport, files: Sequence[LoraFile], weights: Sequence[float], scale: float
) -> None:
    rows = [("adapter", "rank", "weight", "licence")]
    for file, weight in zip(files, weights, strict=True):
        rank = max(map(file.rank, file.names))
        licence = str(file.metadata.get("edgelora.licence", "not recorded"))
        rows.append((str(file.path), str(rank), f"{weight:+g}", licence))
    console.show_columns(rows, right=(1, 2))
    scaled = "" if scale == 1 else f", everything times {scale:g}"
    console.show(
        f"{report.method}{scaled}: {len(report.tensors)} tensors, rank up to {report.max_rank}, "
        f"relative error {report.error:.4f}{_bound(report)}"
    )
    console.show(f"{report.path} ({report.path.stat().st_size / 1e6:.1f} MB)")


def _bound(report: MergeReport) -> str:
    """How far the error may be from the least possible one, where that is not nothing."""
    if report.excess < 1e-6:
        return ""
    return f" (at most {report.excess:.0e} above the least of that rank)"
