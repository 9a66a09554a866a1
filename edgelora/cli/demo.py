"""`edgelora demo`: the main job on what the repository ships, with the commands it runs shown."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgelora.cli import console
from edgelora.cli.options import open_engine

EXAMPLES = ("returns", "support-tickets", "follows")
BASE = "smollm2-135m-instruct"
_BUDGETS = {"auto": 60_000, "forward": 20_000, "gradient": 60_000}
_QUICK = ("--budget", "14000"), ("--limit", "16")
_MAX_ANSWER = 48


@click.command()
@click.option("--example", type=click.Choice(EXAMPLES), default=EXAMPLES[0], help="Which task.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Adapter (default: build/demo/<example>)."
)
@click.option(
    "--refine",
    type=click.Choice(tuple(_BUDGETS)),
    default="auto",
    help="How coefficients are found: forward takes a third of the tokens, and finds less.",
)
@click.option("--quick", is_flag=True, help="Fewer tokens and held-out lines, for a check.")
@console.common_options
def command(
    example: str, out: Path | None, refine: str, quick: bool, threads: int, seed: int
) -> None:
    """Build an adapter for an example, evaluate it, show an answer before and after."""
    from edgelora.cli.build import command as build
    from edgelora.cli.eval import command as evaluate

    root = _find_checkout()
    data, held_out = (root / "examples" / example / f"{n}.jsonl" for n in ("train", "heldout"))
    out = out or root / "build" / "demo" / f"{example}.gguf"
    budget, limit = _QUICK if quick else (("--budget", str(_BUDGETS[refine])), ())
    common = ["--base", BASE, "--threads", str(threads), "--seed", str(seed)]
    common += ["-q"] if console.err.quiet else []
    bank = root / "models" / "bank"
    _run(build, "build", ["--bank", str(bank), "--data", str(data), "-o", str(out), "--force",
                          "--refine", refine, *budget, *common])  # fmt: skip
    _run(evaluate, "eval", ["--adapter", str(out), "--data", str(held_out), *limit, *common])
    _before_and_after(out, held_out, threads)
    console.say("")
    console.say(f"Ask it yourself: edgelora chat --base {BASE} --adapter {shlex.quote(str(out))}")


def _find_checkout() -> Path:
    """The repository's folder: the bank and the examples are not in the wheel.

    Raises:
        NotFound: this is an installed package without them.
    """
    from edgelora.errors import NotFound

    root = Path(__file__).resolve().parents[2]
    if not (root / "models" / "bank" / "bank.json").is_file():
        raise NotFound(
            "the demo's bank and examples are in the repository, not in the installed package",
            hint="Clone the repository and run `make demo` there.",
        )
    return root


def _run(command: click.Command, name: str, words: list[str]) -> None:
    console.say(f"\n$ edgelora {name} " + " ".join(shlex.quote(word) for word in words))
    command.main(words, standalone_mode=False)


def _before_and_after(adapter: Path, held_out: Path, threads: int) -> None:
    from edgelora.datasets.read import read_dataset
    from edgelora.engine.context import open_context
    from edgelora.engine.generate import stream
    from edgelora.engine.model import WeightedAdapter
    from edgelora.engine.prepare import model_template, tokenise_examples

    (example,) = read_dataset(held_out, limit=1).examples
    console.show(f"\nprompt: {example.prompt}")
    with open_engine(BASE, threads, None) as model, open_context(model) as context:
        (tokenised,) = tokenise_examples(model, model_template(model), [example])
        for label, applied in (("before", []), ("after", [WeightedAdapter(adapter)])):
            context.apply(applied)
            text = "".join(stream(context, tokenised.prompt, max_tokens=_MAX_ANSWER))
            console.show(f"{label + ':':8}{' '.join(text.split())}")
    console.show(f"wanted: {example.completion}")
