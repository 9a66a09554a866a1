"""`edgelora export`: an adapter for peft and vLLM, for Ollama, or as llama-server's command."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli import console
from edgelora.cli.options import base_option, force_option, open_engine
from edgelora.errors import InvalidFile

if TYPE_CHECKING:
    from edgelora.adapters.gguf_lora import LoraFile
    from edgelora.datasets.template import Template
    from edgelora.engine.model import Model
    from edgelora.export.chat_form import ChatForm

PEFT, OLLAMA, SERVER = "peft", "ollama", "llama-server"


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice((PEFT, OLLAMA, SERVER)), help="For what.")
@base_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="PEFT folder (default: NAME-peft), Modelfile (NAME.Modelfile) or chat template "
    "(NAME.jinja), in the working folder.",
)
@click.option("--template", help="Prompt template (default: what the adapter records).")
@click.option("--scale", default=1.0, show_default=True, help="Of the adapter, for llama-server.")
@click.option("--keep-ranks", is_flag=True, help="PEFT: a rank_pattern where ranks differ.")
@click.option("--base-model", default="", help="PEFT: what adapter_config.json calls the base.")
@force_option
@console.common_options
def command(
    adapter: Path,
    to: str,
    base: str,
    out: Path | None,
    template: str | None,
    scale: float,
    keep_ranks: bool,
    base_model: str,
    force: bool,
    threads: int,
    **_: Any,
) -> None:
    """Write an adapter as a PEFT folder or a Modelfile, or print llama-server's command.

    Example: edgelora export tickets.gguf --to ollama --base base.gguf
    """
    from edgelora.adapters.gguf_lora import open_lora

    if to != SERVER and scale != 1.0:
        raise click.UsageError(
            "--scale is for --to llama-server; for others: edgelora merge FILE:SCALE -o OUT."
        )
    if not math.isfinite(scale):
        raise click.UsageError("--scale takes a finite number.")
    if to != PEFT and (keep_ranks or base_model):
        raise click.UsageError("--keep-ranks and --base-model are for --to peft.")
    lora = open_lora(adapter)
    if to == PEFT:
        _to_peft(lora, base, out or _named_after(adapter, "-peft"), keep_ranks, base_model, force)
        return
    recorded = template or _recorded_template(lora)
    with open_engine(base, threads, True) as model:
        model.adapter(adapter)
        if to == OLLAMA:
            _to_ollama(lora, model, recorded, out or _named_after(adapter, ".Modelfile"), force)
        else:
            _to_server(lora, model, recorded, out or _named_after(adapter, ".jinja"), scale, force)


def _named_after(adapter: Path, ending: str) -> Path:
    return Path(adapter.name.removesuffix(".gguf") + ending)


def _to_peft(
    lora: LoraFile, base_name: str, folder: Path, keep_ranks: bool, base_model: str, force: bool
) -> None:
    from edgelora.adapters.base import read_base
    from edgelora.adapters.peft import write_peft
    from edgelora.bases import resolve

    base = read_base(resolve(base_name))
    one_rank = not keep_ranks
    write_peft(lora, base, folder, base_model=base_model, one_rank=one_rank, force=force)
    ranks = sorted({lora.rank(name) for name in lora.names})
    console.show(f"{folder}")
    if len(ranks) > 1:
        console.say(
            f"ranks {ranks[0]} to {ranks[-1]}: "
            + (
                f"zeros fill each up to {ranks[-1]}, for vLLM and others read no rank_pattern"
                if one_rank
                else "vLLM and others read no rank_pattern and would scale them wrongly"
            )
        )
    key = lora.metadata.get("edgelora.template")
    if key is not None and key != "chat":
        console.say(console.safe(f"made with the prompt template {_short(str(key))}"))


def _to_ollama(lora: LoraFile, model: Model, recorded: str | None, out: Path, force: bool) -> None:
    from edgelora.export.ollama import make_modelfile
    from edgelora.files import write_atomic

    template = _template(model, recorded)
    form, stops = _form(model, template), _stops(model, template)
    comments = [f"made by edgelora from {lora.path.name}, sha256 {lora.sha256}"]
    if licence := lora.metadata.get("edgelora.licence"):
        comments.append(f"licence of the adapter: {licence}")
    text = make_modelfile(model.base.path, lora.path, form, stops=stops, comments=comments)
    write_atomic(out, text.encode(), force=force)
    console.show(f"{out}")
    line = ["ollama", "create", lora.path.stem, "-f", str(out)]
    console.say(console.safe(f"next: {_line(line)}"))


def _to_server(
    lora: LoraFile, model: Model, recorded: str | None, out: Path, scale: float, force: bool
) -> None:
    from edgelora.export.chat_form import to_jinja
    from edgelora.export.llama_server import server_words
    from edgelora.files import write_atomic

    template = _template(model, recorded)
    own = None if template.key == "chat" else out
    words = server_words(model.base.path, lora.path, scale=scale, chat_template=own)
    if own is not None:
        text = template.source if template.kind == "chat" else to_jinja(_form(model, template))
        write_atomic(own, text.encode() + b"\n", force=force)
        console.say(console.safe(f"wrote {own}"))
    console.show(_line(words))


def _recorded_template(lora: LoraFile) -> str | None:
    """The template that the adapter records; None where it records none, which is said.

    Raises:
        InvalidFile: a record that is no template, and might name a file instead.
    """
    from edgelora.datasets.template import is_template_text

    recorded = lora.metadata.get("edgelora.template")
    if recorded is None:
        console.warn(
            console.safe(f"{lora.path}: records no prompt template; the base's own is taken")
        )
        return None
    if recorded != "chat" and not is_template_text(str(recorded)):
        raise InvalidFile(
            f"{lora.path}: records {_short(str(recorded))} as its prompt template, which is none",
            hint="Give it with --template.",
        )
    return str(recorded)


def _template(model: Model, recorded: str | None) -> Template:
    from edgelora.engine.prepare import model_template

    template = model_template(model, recorded)
    for warning in template.warnings:
        console.warn(console.safe(warning))
    return template


def _form(model: Model, template: Template) -> ChatForm:
    from edgelora.export.chat_form import find_form

    vocabulary = model.vocabulary
    return find_form(template, vocabulary.text_of(vocabulary.bos) if vocabulary.adds_bos else "")


def _stops(model: Model, template: Template) -> list[str]:
    """The text that ends an answer, if it is not an end token of the vocabulary."""
    from edgelora.datasets.records import Message

    *_, end = template.completion_segments([Message("user", "x")], "x")
    ids = model.vocabulary.control_ids
    return [end.text] if end.control and not model.vocabulary.is_end(ids[end.text]) else []


def _line(words: list[str]) -> str:
    from edgelora.export.llama_server import command_line

    return command_line(words, windows=os.name == "nt")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
