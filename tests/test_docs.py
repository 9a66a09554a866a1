"""What the documents tell a person to type exists: commands, options, make targets, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgelora.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS_PAGE = ROOT / "docs" / "commands.md"
Walked = dict[str, click.Command]


def walk(command: click.Command, name: str, parent: click.Context | None = None) -> Walked:
    """Every command of the tree by its full name: `edgelora`, `edgelora bank add`, ..."""
    context = click.Context(command, info_name=name, parent=parent)
    found = {context.command_path: command}
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            assert child is not None, (
                f"{context.command_path} lists {child_name}, which is not there"
            )
            found |= walk(child, child_name, context)
    return found


COMMANDS = walk(main, "edgelora")
LEAVES = [name for name, command in COMMANDS.items() if not isinstance(command, click.Group)]


def code_lines(page: Path) -> Iterator[str]:
    """Lines of fenced or indented code and `inline code`, continuations joined, `$ ` removed."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4,}(\S.*)$", rest, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", rest)
    for block in [*fenced, *indented, *inline]:
        for line in block.splitlines():
            yield line.strip().removeprefix("$ ")


def typed(page: Path, program: str) -> Iterator[list[str]]:
    """The words of each line that calls `program`, without a comment at its end."""
    for line in code_lines(page):
        line = line.removeprefix(".venv/bin/")
        if line == program or line.startswith(f"{program} "):
            yield shlex.split(line, comments=True)


def problems_of(words: list[str]) -> list[str]:
    """What is wrong with one command line: an unknown command, or options it does not have."""
    n = max(n for n in range(1, len(words) + 1) if " ".join(words[:n]) in COMMANDS)
    name, rest = " ".join(words[:n]), words[n:]
    command = COMMANDS[name]
    if isinstance(command, click.Group) and rest and re.fullmatch(r"[a-z-]+", rest[0]):
        if not rest[0].startswith("-"):
            return [f"{name} has no command {rest[0]}"]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    options = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return [f"{name} has no option {option}" for option in options if option not in known]


def test_a_wrong_line_is_seen() -> None:
    assert problems_of(["edgelora", "bank"]) == []
    assert problems_of(["edgelora", "--version"]) == []
    assert problems_of(["edgelora", "nonsense", "x"]) == ["edgelora has no command nonsense"]
    assert problems_of(["edgelora", "doctor", "--wings"]) == [
        "edgelora doctor has no option --wings"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_page_exist(page: Path) -> None:
    assert [p for words in typed(page, "edgelora") for p in problems_of(words)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_on_the_page_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z%-]+):", makefile, re.MULTILINE))
    for words in typed(page, "make"):
        for word in words[1:]:
            if "=" not in word:
                name = "bench-%" if word.startswith("bench-") else word
                assert name in targets, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_on_the_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    scripts = re.findall(r"\b((?:scripts|benchmarks)/\w+\.py)\b", text)
    assert missing + [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_options_have_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help or command.short_help
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("name", LEAVES)
def test_a_command_has_an_example_in_the_docs(name: str) -> None:
    examples = [shlex.join(words) for words in typed(COMMANDS_PAGE, "edgelora")]
    assert [line for line in examples if line.startswith(f"{name} ") or line == name]
    assert f"## {name}" in COMMANDS_PAGE.read_text(encoding="utf-8")
