"""The code keeps to docs/architecture.md: import direction, one job a module, sizes, who prints."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgelora"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 40
# Which rooms may import what everybody else may not; an empty set: nobody.
RESERVED = {
    "llama_cpp": {"engine"},
    "click": {"cli"},
    "rich": {"cli"},
    "distributed": {"cluster"},
    "dask": {"cluster"},
    "torch": set(),
    "transformers": set(),
    "peft": set(),
}

Import = tuple[str, int]


def storeys(page: str) -> dict[str, int]:
    """Room -> number of its storey, as the page draws them."""
    (drawing,) = re.findall(r"<!-- storeys -->\n(.*?)<!-- /storeys -->", page, re.DOTALL)
    levels = [level.split(",") for level in drawing.strip().split("<")]
    return {room.strip(): number for number, level in enumerate(levels) for room in level}


def room_of(module: Path, package: Path) -> str:
    """The first part of a module's path below the package: `adapters`, `files`, ..."""
    return module.relative_to(package).with_suffix("").parts[0]


def imports(tree: ast.AST, module: Path, package: Path) -> Iterator[Import]:
    """Every absolute module name that is imported anywhere in the file, with its line."""
    inside = module.relative_to(package.parent).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else ()
            source = ".".join([*above, *(node.module.split(".") if node.module else [])])
            yield source, node.lineno
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(module: Path, package: Path, levels: dict[str, int]) -> list[str]:
    """Imports of one module that point upward, sideways, or at a reserved package."""
    room, problems = room_of(module, package), []
    for name, line in imports(ast.parse(module.read_text(encoding="utf-8")), module, package):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if room not in RESERVED.get(first, {room}):
            problems.append(f"{module.name}:{line} imports {first}, which is not for {room}")
        upward = target in levels and levels[target] >= levels.get(room, len(levels))
        if first == package.name and upward and target != room:
            problems.append(f"{module.name}:{line} ({room}) imports {target}")
    return sorted(set(problems))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_drawing_is_read_as_drawn() -> None:
    levels = storeys(PAGE)
    assert levels["errors"] == 0
    assert levels["files"] < levels["gguf_file"] < levels["signature"] == levels["metrics"]
    assert levels["operators"] < levels["engine"] < levels["bank"] < levels["build"] < levels["cli"]


@pytest.mark.parametrize(
    ("room", "line", "problem"),
    [
        ("files", "from edgelora.bank import store", "imports bank"),
        ("files", "import edgelora.engine.model", "imports engine"),
        ("files", "def f():\n    from edgelora import adapters", "imports adapters"),
        ("files", "from . import build", "imports build"),
        ("metrics", "from edgelora.signature import Signature", "imports signature"),
        ("files", "import llama_cpp", "imports llama_cpp"),
        ("files", "from rich.table import Table", "imports rich"),
        ("cli", "import torch", "imports torch"),
        ("cli", "import click, rich\nfrom edgelora import build", None),
        ("files", "from edgelora.errors import BankError\nimport numpy", None),
    ],
)
def test_a_wrong_import_is_seen(room: str, line: str, problem: str | None, tmp_path: Path) -> None:
    module = tmp_path / "edgelora" / f"{room}.py"
    module.parent.mkdir()
    module.write_text(line)
    found = wrong_imports(module, module.parent, storeys(PAGE))
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_imports_point_downward(module: Path) -> None:
    assert wrong_imports(module, PACKAGE, storeys(PAGE)) == []


def test_every_room_has_a_storey() -> None:
    rooms = {room_of(module, PACKAGE) for module in MODULES} - {"__init__", "__main__"}
    assert rooms <= set(storeys(PAGE))


def test_the_list_of_modules_is_true() -> None:
    spec = importlib.util.spec_from_file_location("lister", ROOT / "scripts" / "list_modules.py")
    assert spec and spec.loader
    lister = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lister)
    (listed,) = re.findall(r"<!-- modules -->\n(.*?)<!-- /modules -->", PAGE, re.DOTALL)
    assert listed.splitlines() == lister.module_list(PACKAGE).splitlines(), (
        "docs/architecture.md lists other modules or jobs: run python scripts/list_modules.py"
    )


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_a_module_has_one_job_and_a_readable_size(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if text.strip():
        assert (ast.get_docstring(tree) or "").partition("\n")[0].endswith("."), "no first line"
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    long = {node.name: _length(node) for node in ast.walk(tree) if _is_function(node)}
    assert {name: n for name, n in long.items() if n > MAX_FUNCTION_LINES} == {}


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - docstring


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_only_the_command_line_prints_or_exits(module: Path) -> None:
    if room_of(module, PACKAGE) == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(n, ast.Call)]
    names = {ast.unparse(call.func): call.lineno for call in calls}
    assert not {"print", "sys.exit", "exit", "sys.stdout.write", "sys.stderr.write"} & set(names)


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_no_bare_except(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None]


def test_importing_the_package_is_light() -> None:
    """The storeys that every command loads do not pull in the heavy packages."""
    code = (
        "import sys, edgelora.bases, edgelora.files;"
        "heavy = {'llama_cpp', 'scipy', 'ot', 'rich', 'torch', 'pyarrow'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
