"""`edgelora build --from`: a build made again from its own record, and whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edgelora.cli import console

if TYPE_CHECKING:
    from edgelora.build.repeat import Repeated

_N_LISTED = 10
# What a person may choose; the file decides on everything else.
_CHOSEN = frozenset(
    "recorded base bank_path out force as_json threads seed verbose quiet low_ram".split()
)


def repeat_build(
    recorded: Path, bank_path: Path, base: str, out: Path, force: bool, as_json: bool
) -> int:
    """Repeat, compare and show; the exit code is 0 for the same bytes, else 1."""
    from edgelora.adapters.base import read_base
    from edgelora.adapters.gguf_lora import open_lora
    from edgelora.bank import open_bank
    from edgelora.bases import resolve
    from edgelora.build.repeat import repeat

    _refuse_choices()
    lora = open_lora(recorded)
    bank = open_bank(bank_path)
    header = read_base(resolve(base))
    with console.stages() as advance:
        repeated = repeat(lora, bank, header, out, force=force, progress=advance)
    if as_json:
        console.show_json(_as_json(repeated, recorded))
    else:
        _show(repeated, recorded)
    return int(not repeated.is_same)


def _refuse_choices() -> None:
    """Options that would choose what the file has decided."""
    context = click.get_current_context()
    given = [
        parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name not in _CHOSEN
        and context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"--from decides by itself on {', '.join(sorted(given))}.")


def _show(repeated: Repeated, recorded: Path) -> None:
    if repeated.is_same:
        console.show(f"{repeated.out}: the same bytes as {recorded}")
        console.show(f"sha256 {repeated.sha256}")
        return
    console.show(f"{repeated.out}: not the same bytes as {recorded}")
    console.show(f"sha256 {repeated.sha256}, recorded {repeated.recorded_sha256}")
    for line in repeated.header[:_N_LISTED]:
        console.show(f"- {line}")
    if len(repeated.header) > _N_LISTED:
        console.show(f"- and {len(repeated.header) - _N_LISTED} more entries of the header")
    if not repeated.tensors:
        console.show("every tensor that both have is the same, bit by bit")
        return
    largest = repeated.tensors[0]
    console.show(
        f"{len(repeated.tensors)} tensors have other bytes; the largest difference is "
        f"{largest.relative:.2g} of the update's norm, in {largest.name}"
    )
    console.say(_reason(repeated))


def _reason(repeated: Repeated) -> str:
    if repeated.rounded:
        return (
            "coefficients for each tensor are recorded as float16: those of `build --refine "
            "gradient` were rounded before they were used, others lose digits in the record"
        )
    return (
        "the same bytes are promised for one machine: another CPU, numpy or BLAS rounds otherwise"
    )


def _as_json(repeated: Repeated, recorded: Path) -> dict[str, object]:
    return {
        "out": str(repeated.out),
        "from": str(recorded),
        "same_bytes": repeated.is_same,
        "sha256": repeated.sha256,
        "recorded_sha256": repeated.recorded_sha256,
        "header": list(repeated.header),
        "tensors": [vars(tensor) for tensor in repeated.tensors],
        "coefficients_rounded": repeated.rounded,
        "relative_error": repeated.merge.error,
    }
