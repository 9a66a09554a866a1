"""`edgelora merge` and `edgelora show` on pico adapters."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pico
import pytest
from cli_runner import run

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.adapters.merge import merge_adapters
from edgelora.cli.merge import parse_weighted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf, and a.gguf and b.gguf of rank 4 for it, with facts."""
    folder = tmp_path_factory.mktemp("merge")
    base = pico.write_base(folder / "base.gguf")
    identity = read_base(base).identity
    for seed, name in enumerate("ab"):
        facts = {
            "edgelora.name": name,
            "edgelora.template": "chat",
            "edgelora.licence": f"Licence {name}",
            "edgelora.source": f"data of {name}",
            "edgelora.base.id": identity.id,
        }
        pico.write_random_lora(folder / f"{name}.gguf", base, seed=seed, metadata=facts)
    return folder


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("a.gguf:0.7", "a.gguf", 0.7),
        ("b.gguf:-0.3", "b.gguf", -0.3),
        ("b.gguf:1e-2", "b.gguf", 0.01),
        ("C:\\adapters\\a.gguf", "C:\\adapters\\a.gguf", 1.0),
        ("C:\\adapters\\a.gguf:2", "C:\\adapters\\a.gguf", 2.0),
        ("C:/adapters/a.gguf:-.5", "C:/adapters/a.gguf", -0.5),
    ],
)
def test_a_path_and_its_weight(text: str, path: str, weight: float) -> None:
    assert parse_weighted(text) == (Path(path), weight)


@pytest.mark.parametrize("text", ["a.gguf:", "a.gguf:x", "a.gguf:nan", "a.gguf:inf", ":0.5"])
def test_a_wrong_weight_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="FILE:WEIGHT"):
        parse_weighted(text)


def test_a_file_whose_name_looks_weighted_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        Path("a:0.5").touch()
    except OSError:
        pytest.skip("no colons in names here")
    if not Path("a:0.5").is_file():  # Windows made a stream of a file named a
        pytest.skip("no colons in names here")
    assert parse_weighted("a:0.5") == (Path("a:0.5"), 1.0)


def test_the_written_file_is_the_weighted_sum(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.gguf"
    result = run("merge", f"{folder / 'a.gguf'}:0.7", f"{folder / 'b.gguf'}:-0.3", "-o", out,
                 "--combine", "cat", "--type", "f32", "--scale", 2, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [source["weight"] for source in said["sources"]] == [0.7, -0.3]
    assert said["rank"] == 8 and said["relative_error"] == 0.0 and said["warnings"] == []
    assert said["peak_memory"]["size_bytes"] > 1e6 and said["peak_memory"]["kind"]
    a, b, c = (open_lora(path) for path in (folder / "a.gguf", folder / "b.gguf", out))
    for name in c.names:
        deltas = [p.scale * p.lora_b @ p.lora_a for p in (f.pair(name) for f in (a, b, c))]
        np.testing.assert_allclose(deltas[2], 1.4 * deltas[0] - 0.6 * deltas[1], atol=1e-5)


def test_the_table_and_the_refused_overwrite(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.gguf"
    line = ("merge", f"{folder / 'a.gguf'}:0.5", folder / "b.gguf", "-o", out, "--rank", 4)
    first = run(*line)
    assert first.exit_code == 0, first.output
    rows = [row.split() for row in first.stdout.splitlines()]
    assert rows[1][1:] == ["4", "+0.5", "Licence", "a"] and rows[2][1:3] == ["4", "+1"]
    assert "svd: 6 tensors, rank up to 4, relative error 0." in first.stdout
    assert "peak memory: " in first.stderr and " MB (" in first.stderr
    before = out.read_bytes()
    again = run(*line)
    assert "peak memory" not in again.stderr  # nothing was done
    assert again.exit_code == 1 and "exists already" in again.stderr and "--force" in again.stderr
    assert run(*line, "--force").exit_code == 0 and out.read_bytes() == before


def test_what_merge_refuses(folder: Path, tmp_path: Path) -> None:
    a, out = folder / "a.gguf", tmp_path / "c.gguf"
    for words, code, message in (
        ([f"{a}:x"], 2, "FILE:WEIGHT"),
        ([a, "--rank", "0"], 2, "neither a whole number from 1 nor auto"),
        ([a, "--rank", "4", "--combine", "cat"], 1, "cat takes no rank"),
        ([f"{a}:0"], 1, "every coefficient is zero"),
        ([a, f"{a}:-1"], 1, "zero everywhere"),
        ([folder / "none.gguf"], 1, "none.gguf"),
        ([folder / "base.gguf"], 1, "base.gguf"),
    ):
        result = run("merge", *words, "-o", out)
        assert result.exit_code == code and message in result.stderr, (words, result.output)
    own = run("merge", a, "-o", a, "--force")
    assert own.exit_code == 2 and "one of the adapters" in own.stderr
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_printed_with_q_too(folder: Path, tmp_path: Path) -> None:
    other = pico.write_random_lora(tmp_path / "o.gguf", folder / "base.gguf", seed=7,
                                   metadata={"edgelora.template": "Q: {prompt}"})  # fmt: skip
    result = run("merge", folder / "a.gguf", other, "-o", tmp_path / "c.gguf", "-q")
    assert result.exit_code == 0
    assert "warning:" in result.stderr and "2 different prompt templates" in result.stderr


def test_show_tells_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.gguf"
    run("merge", f"{folder / 'a.gguf'}:0.7", f"{folder / 'b.gguf'}:-0.3", "-o", out, "--rank", 4)
    shown = run("show", out)
    assert shown.exit_code == 0, shown.output
    for text in ("a  +0.700", "b  -0.300", "Licence b", "data of a", "svd", "chat", "█",
                 open_lora(folder / "a.gguf").sha256[:16], "edgelora 0.",
                 read_base(folder / "base.gguf").identity.id):  # fmt: skip
        assert text in shown.stdout, text
    record = json.loads(run("show", out, "--json").stdout)
    assert [s["coefficient"] for s in record["provenance"]["sources"]] == [0.7, -0.3]
    assert 0 < record["provenance"]["error"] < 1 and set(record["tensors"].values()) == {4}


def test_show_gives_means_of_coefficients_for_each_tensor(folder: Path, tmp_path: Path) -> None:
    files = [open_lora(folder / f"{name}.gguf") for name in "ab"]
    names = list(dict.fromkeys(name for file in files for name in file.names))
    rows = {name: [0.25 * i, 0.5] for i, name in enumerate(names)}
    out = tmp_path / "c.gguf"
    told = {"refined": {"by": "gradient", "passes": 3}}
    merge_adapters(files, rows, out, provenance=told)
    shown = run("show", out)
    assert shown.exit_code == 0, shown.output
    own = [0.25 * i for i, name in enumerate(names) if name in files[0].plan]
    assert f"a  {sum(own) / len(own):+.3f}" in shown.stdout and "b  +0.500" in shown.stdout
    assert "coefficients, means over the tensors" in shown.stdout and "█" in shown.stdout
    assert "by gradient, passes 3" in shown.stdout
    record = json.loads(run("show", out, "--json").stdout)
    by_tensor = record["coefficients_by_tensor"]
    assert by_tensor == {"a": {name: 0.25 * i for i, name in enumerate(names)}}


def test_show_takes_an_adapter_without_provenance(folder: Path, tmp_path: Path) -> None:
    plain = pico.write_random_lora(tmp_path / "plain.gguf", folder / "base.gguf")
    shown = run("show", plain)
    assert shown.exit_code == 0 and "which model is not recorded" in shown.stdout
    assert "coefficients" not in shown.stdout
    base = run("show", folder / "base.gguf")
    assert base.exit_code == 1 and "error:" in base.stderr


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"error": NaN}', '{"a":' * 40 + "1" + "}" * 40, "[" * 100_000]
)
def test_a_hostile_provenance_is_a_warning(folder: Path, tmp_path: Path, text: str) -> None:
    path = pico.write_random_lora(tmp_path / "x.gguf", folder / "base.gguf",
                                  metadata={"edgelora.provenance": text})  # fmt: skip
    for words in (("show", path), ("show", path, "--json")):
        result = run(*words)
        assert result.exit_code == 0 and "provenance cannot be read" in result.stderr


def test_what_an_adapter_says_of_its_base_is_kept_where_it_is_text(
    folder: Path, tmp_path: Path
) -> None:
    facts = {"edgelora.base.id": "0123456789ab", "edgelora.base.shapes": -(2**31)}
    path = pico.write_random_lora(tmp_path / "x.gguf", folder / "base.gguf", metadata=facts)
    result = run("merge", f"{path}:0.5", "-o", tmp_path / "y.gguf")
    assert result.exit_code == 0, result.output
    metadata = open_lora(tmp_path / "y.gguf").metadata
    kept = {key: value for key, value in metadata.items() if key in facts}
    assert kept == {"edgelora.base.id": "0123456789ab"}


def test_text_of_a_file_is_never_obeyed(folder: Path, tmp_path: Path) -> None:
    source = {"name": "\x1b[2J[red]x", "coefficient": 10**400, "licence": ["\x07"], "sha256": 5}
    facts = {
        "edgelora.name": "[bold]\x1b]0;title\x07",
        "edgelora.provenance": json.dumps({"sources": [source, 3], "distances": 4, "scale": {}}),
    }
    path = pico.write_random_lora(tmp_path / "x.gguf", folder / "base.gguf", metadata=facts)
    shown = run("show", path)
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.stdout and "\x07" not in shown.stdout
    assert "[bold]" in shown.stdout and "[red]x" in shown.stdout
