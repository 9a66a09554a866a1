"""The `edgelora` command and the list of its sub-commands, each imported when it is called."""

from __future__ import annotations

import importlib

import click

from edgelora import __version__

COMMANDS = {
    "pull": "Fetch a base or adapters from the Hugging Face Hub.",
    "bank": "Convert PEFT adapters once and keep them with their signatures.",
    "suggest": "Name public adapters for your dataset, without downloading any.",
    "build": "Combine adapters of a bank into one for your dataset.",
    "merge": "Combine adapters by hand, with weights you give.",
    "export": "An adapter for peft and vLLM, for Ollama, for llama-server.",
    "show": "Print how an adapter was made.",
    "eval": "Compare the base and adapters on a dataset.",
    "chat": "Talk to the base with an adapter.",
    "serve": "An OpenAI-compatible server for the base and adapters.",
    "cache": "List or clear the cache of embeddings.",
    "doctor": "This machine: CPU features, RAM, llama.cpp, what fits.",
    "demo": "Build and evaluate an adapter for one of the examples.",
}


class LazyGroup(click.Group):
    """A group whose commands live in one module each, imported only when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgelora.cli.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgelora")
def main() -> None:
    """A LoRA adapter for your task on a CPU, combined from a bank instead of trained."""


if __name__ == "__main__":
    main()
