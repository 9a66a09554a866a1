"""Write the list of modules in docs/architecture.md from the first lines of their docstrings.

usage: python scripts/list_modules.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BETWEEN = re.compile(r"(<!-- modules -->\n).*(<!-- /modules -->)", re.DOTALL)


def module_list(package: Path) -> str:
    """One line `- path: job` for each module of the package, in order of path."""
    lines = []
    for path in sorted(package.rglob("*.py")):
        job = first_line(path)
        if job and not (path.name == "__init__.py" and path.parent == package):
            lines.append(f"- `{path.relative_to(package.parent).as_posix()}`: {job}\n")
    return "".join(lines)


def first_line(path: Path) -> str:
    """The first docstring line of a module, or "" where it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def main() -> None:
    """Rewrite the list in place."""
    page = PAGE.read_text(encoding="utf-8")
    listed = module_list(ROOT / "edgelora")
    PAGE.write_text(BETWEEN.sub(lambda m: m[1] + listed + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
