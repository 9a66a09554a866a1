"""`edgelora show`: how an adapter was made, as the file itself tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import json_option
from edgelora.errors import InvalidFile

if TYPE_CHECKING:
    from edgelora.adapters.gguf_lora import LoraFile

# What is printed of the provenance, in this order; the rest are lists with a form of their own.
_TITLES = {
    "operator": "operator",
    "description": "described as",
    "prompts": "prompts",
    "distance": "distance",
    "calibrated on": "calibrated",
    "method": "combined by",
    "scale": "scale",
    "error": "error",
    "seed": "seed",
    "budget_tokens": "budget",
}
# What gradients did to coefficients and to factors.
_STEPS = {"refined": "refined", "trained": "trained"}


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@json_option
@console.common_options
def command(adapter: Path, as_json: bool, **_: Any) -> None:
    """Print how an adapter was made: sources, coefficients, operator, error, template, base.

    A GGUF LoRA of any tool will do, those of a bank among them; what it does not record is not
    printed.
    """
    from edgelora.adapters.gguf_lora import open_lora

    lora = open_lora(adapter)
    provenance = _provenance(lora)
    if as_json:
        console.show_json(_as_json(lora, provenance))
        return
    for key, value in _facts(lora, provenance).items():
        if value not in ("", None):
            console.show(f"{key:12} {value}")
    _show_sources(provenance)


def _provenance(lora: LoraFile) -> dict[str, Any]:
    """The file's own account, {} if it has none; a warning where it cannot be read."""
    from edgelora.adapters.provenance import read_provenance

    try:
        return read_provenance(lora)
    except InvalidFile as error:
        console.warn(console.safe(str(error)))
        return {}


def _facts(lora: LoraFile, provenance: Mapping[str, Any]) -> dict[str, object]:
    own = {key.removeprefix("edgelora."): value for key, value in lora.metadata.items()}
    gguf_name = lora.metadata.get("general.name")
    facts: dict[str, object] = {
        "name": own.get("name", gguf_name),
        "file": f"{lora.path} ({lora.path.stat().st_size / 1e6:.1f} MB)",
        "sha256": lora.sha256,
        "rank": f"{_ranks(lora)}, on {len(lora.names)} tensors",
        "base": _base(lora),
        "template": own.get("template"),
        "description": own.get("description"),
        "source": own.get("source"),
        "licence": own.get("licence"),
        "made from": own.get("source_sha256"),
        "made by": own.get("created_by"),
    }
    return (
        facts
        | {
            title: _short(provenance.get(key))
            for key, title in _TITLES.items()
            if key in provenance
        }
        | {title: _steps(provenance.get(key)) for key, title in _STEPS.items()}
    )


def _steps(account: object) -> str:
    """What gradients did, e.g. `from uniform mean x 1, examples 16, passes 3`."""
    if not isinstance(account, dict):
        return ""
    return ", ".join(f"{key} {value}" for key, value in account.items())


def _short(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _base(lora: LoraFile) -> str:
    parts = {
        part: lora.metadata.get(f"edgelora.base.{part}")
        for part in ("id", "shapes", "tokenizer", "norms")
    }
    if parts["id"] is None:
        return f"{lora.architecture}; which model is not recorded"
    hashes = ", ".join(f"{part} {parts[part]}" for part in ("shapes", "tokenizer", "norms"))
    return f"{parts['id']} ({lora.architecture}, {hashes})"


def _ranks(lora: LoraFile) -> str:
    ranks = sorted({lora.rank(name) for name in lora.names})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _show_sources(provenance: Mapping[str, Any]) -> None:
    from edgelora.cli.charts import coefficients_chart

    sources = _sources(provenance)
    if not sources:
        return
    numbers = [_number(source.get("coefficient")) for source in sources]
    if None in numbers:
        console.show("coefficients: not recorded")
    else:
        is_mean = any("coefficients" in source for source in sources)
        console.show(
            "coefficients, means over the tensors (--json has each):"
            if is_mean
            else "coefficients:"
        )
        known = [number for number in numbers if number is not None]
        names = [str(source.get("name")) for source in sources]
        console.out.print(coefficients_chart(names, known))
    distances = provenance.get("distances")
    rows = [("source", "distance", "sha256", "licence", "data")]
    for source in sources:
        name = str(source.get("name"))
        distance = _number(distances.get(name)) if isinstance(distances, dict) else None
        rows.append(
            (
                name,
                "" if distance is None else f"{distance:.4g}",
                str(source.get("sha256"))[:16],
                str(source.get("licence") or "not recorded"),
                str(source.get("source") or "not recorded"),
            )
        )
    console.show_columns(rows, right=(1,))


def _sources(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = provenance.get("sources")
    return [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def _as_json(lora: LoraFile, provenance: Mapping[str, Any]) -> dict[str, object]:
    from edgelora.adapters.provenance import PROVENANCE_KEY, is_plain, read_coefficients

    ranks: Sequence[int] = [lora.rank(name) for name in lora.names]
    metadata = {
        key: value if is_plain(value) else str(value)
        for key, value in lora.metadata.items()
        if key != PROVENANCE_KEY
    }
    return {
        "file": str(lora.path),
        "sha256": lora.sha256,
        "size_bytes": lora.path.stat().st_size,
        "architecture": lora.architecture,
        "tensors": dict(zip(lora.names, ranks, strict=True)),
        "metadata": metadata,
        "provenance": dict(provenance),
        "coefficients_by_tensor": read_coefficients(provenance),
    }
