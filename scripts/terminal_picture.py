"""Run a real `edgelora build` and save what the terminal showed as an SVG.

usage: python scripts/terminal_picture.py [-o docs/build.svg] [--width 100] [-- BUILD_ARGUMENTS]

Without arguments it builds an adapter for examples/returns from models/bank.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run, record, save."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        build = arguments.build or _default_build()
        command = ["edgelora", "build", *build]
        shown = _run([*command, "-o", str(Path(folder) / "adapter.gguf")], arguments.width)
    prompt = f"$ {' '.join(command)} -o adapter.gguf\n"
    save(prompt + shown.replace(folder + os.sep, ""), arguments.output, arguments.width)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB")


def save(shown: str, target: Path, width: int) -> None:
    """Write text with ANSI colours as an SVG of a terminal `width` columns wide."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(shown), soft_wrap=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        console.save_svg(str(target), title="edgelora build", unique_id="edgelora")


def _run(command: list[str], width: int) -> str:
    """What the command wrote, stdout and stderr in their order, with colours."""
    environment = {
        **os.environ,
        "FORCE_COLOR": "1",
        "COLUMNS": str(width),
        "TERM": "xterm-256color",
        "PYTHONUNBUFFERED": "1",
    }
    program = [sys.executable, "-m", *command]
    done = subprocess.run(
        program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    shown = done.stdout.decode("utf-8", errors="replace")
    if done.returncode:
        sys.exit(f"the build failed with {done.returncode}:\n{shown}")
    return settled(shown)


def settled(written: str) -> str:
    """What stays on the screen after progress bars drew over themselves.

    Knows what rich writes: line feed, carriage return, cursor up, erase line, show and hide cursor.
    """
    rows, row = [""], 0
    for part in re.split(r"(\n|\r|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", written):
        if part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part != "\r" and not part.startswith("\x1b[?25"):
            rows[row] += part
    return "\n".join(rows)


def _default_build() -> list[str]:
    data = "examples/returns/train.jsonl"
    return ["--base", "smollm2-135m-instruct", "--bank", "models/bank", "--data", data]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "build.svg")
    parser.add_argument("--width", type=int, default=100, help="columns")
    parser.add_argument("build", nargs="*", help="arguments of `edgelora build`, without -o")
    return parser.parse_args()


if __name__ == "__main__":
    main()
