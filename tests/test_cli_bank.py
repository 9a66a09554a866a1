"""`edgelora bank` as a person types it, on real llama.cpp with a pico base."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
from click.testing import CliRunner, Result

from edgelora import memory
from edgelora.adapters.base import read_base
from edgelora.bank import open_bank
from edgelora.cli.main import main


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_base(tmp_path_factory.mktemp("base") / "pico.gguf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def edgelora(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def task(root: Path, name: str, seed: int, **config: object) -> Path:
    """<root>/<name>/{adapter/, train.jsonl, task.json}, as scripts/train_bank.py lays it out."""
    folder = pico.write_peft(root / name / "adapter", seed=seed, config=dict(config))
    lines = [json.dumps({"prompt": f"is {seed + i} odd?", "completion": "yes"}) for i in range(6)]
    (root / name / "train.jsonl").write_text("\n".join(lines))
    card = {"task": name, "source": ["a", "b"], "category": ["Numbers"], "licence": ["MIT"]}
    (root / name / "task.json").write_text(json.dumps(card))
    return folder


def test_a_bank_from_first_to_last_command(tmp_path: Path, base_path: Path) -> None:
    folders = [task(tmp_path, f"task{i}", i) for i in range(3)]
    folders.append(task(tmp_path, "dora", 3, use_dora=True))
    bank = tmp_path / "bank"
    line = ["bank", "add", *folders, "--bank", bank, "--base", base_path, "--threads", 1,
            "--data-glob", "{parent}/train.jsonl", "--card-glob", "{parent}/task.json"]  # fmt: skip

    first = edgelora(*line)
    assert first.exit_code == 1
    assert "added:         task0 (" in first.stdout and "6 examples)" in first.stdout
    assert "3 added, 1 refused" in first.stdout
    refused = first.stdout[first.stdout.index("refused:") :]
    assert "dora" in refused and "DoRA" in refused
    assert "peak memory: " in first.stderr and "--low-ram" not in first.stderr

    again = edgelora(*line[:-6], *line[-4:])
    assert "already there: task1 (same bytes: nothing to do)" in again.stdout
    assert "3 already there, 1 refused" in again.stdout

    listed = edgelora("bank", "ls", "--bank", bank)
    assert listed.exit_code == 0 and "task2" in listed.stdout and "a, b" in listed.stdout
    assert "3 adapters, 0 without a signature" in listed.stderr
    shown = edgelora("bank", "show", "task0", "--bank", bank)
    assert "MIT" in shown.stdout and read_base(base_path).identity.describe() in shown.stdout
    record = json.loads(edgelora("bank", "show", "task0", "--bank", bank, "--json").stdout)
    assert record["has_signature"] and record["category"] == "Numbers"

    whole = edgelora("bank", "verify", "--bank", bank, "--base", base_path)
    assert whole.exit_code == 0 and "0 problems" in whole.stdout
    exported = edgelora("bank", "export", "task0", "--bank", bank, "--base", base_path,
                        "-o", tmp_path / "out")  # fmt: skip
    assert exported.exit_code == 0 and (tmp_path / "out" / "adapter_config.json").is_file()

    assert edgelora("bank", "rm", "task0", "task1", "--bank", bank).exit_code == 0
    assert edgelora("bank", "rm", "task0", "--bank", bank).exit_code == 1
    assert edgelora("bank", "reindex", "--bank", bank).exit_code == 0
    left = json.loads(edgelora("bank", "ls", "--bank", bank, "--json").stdout)
    assert [adapter["name"] for adapter in left["adapters"]] == ["task2"]


def test_the_signature_is_of_the_data_or_of_the_text(tmp_path: Path, base_path: Path) -> None:
    bank = tmp_path / "bank"
    common = ("--bank", bank, "--base", base_path, "--threads", 1)
    data = edgelora("bank", "add", task(tmp_path, "one", 1), *common,
                    "--data", tmp_path / "one" / "train.jsonl", "--name", "data")  # fmt: skip
    text = edgelora("bank", "add", task(tmp_path, "two", 2), *common, "--text", "is it odd?")
    none = edgelora("bank", "add", task(tmp_path, "three", 3), *common)
    assert (data.exit_code, text.exit_code, none.exit_code) == (0, 0, 0), none.output
    assert "1 without a signature: operators that need one will skip three" in none.stderr
    opened, base_id = open_bank(bank), read_base(base_path).identity.id
    assert opened.signature("data", base_id).prompt.n == 6
    assert opened.signature("two", base_id).prompt.n == 1
    assert opened.record("two").description == "is it odd?"
    later = edgelora("bank", "add", tmp_path / "three" / "adapter", *common, "--json",
                     "--data", tmp_path / "three" / "train.jsonl")  # fmt: skip
    (outcome,) = json.loads(later.stdout)
    assert outcome["status"] == "signed" and outcome["has_signature"]


def test_a_base_without_a_chat_template_needs_one(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "plain.gguf", chat_template=None)
    folder, bank = task(tmp_path, "one", 1), tmp_path / "bank"
    line = ("bank", "add", folder, "--bank", bank, "--base", base)
    without = edgelora(*line)
    assert without.exit_code == 1 and "--template" in without.stderr
    assert not bank.exists()
    given = edgelora(*line, "--template", "Q: {prompt}\\nA:")
    assert given.exit_code == 0, given.output
    assert open_bank(bank).record("one").template == "Q: {prompt}\nA:"


def test_what_is_for_one_folder_is_refused_for_two(tmp_path: Path, base_path: Path) -> None:
    folders = [task(tmp_path, name, i) for i, name in enumerate(("one", "two"))]
    common = ("--bank", tmp_path / "bank", "--base", base_path)
    for option in (("--name", "x"), ("--data", "d.jsonl")):
        result = edgelora("bank", "add", *folders, *common, *option)
        assert result.exit_code == 2 and "--data and --name are for one folder" in result.stderr
    both = edgelora("bank", "add", folders[0], *common, "--data", "d", "--data-glob", "g")
    assert both.exit_code == 2


@pytest.mark.parametrize(
    ("card", "pattern", "what"),
    [
        ("{", "{parent}/train.jsonl", "cannot be read as JSON"),
        ("[]", "{parent}/train.jsonl", "not a JSON object"),
        ("[" * 100_000, "{parent}/train.jsonl", "cannot be read as JSON"),
        ('{"source": "\\ud800"}', "{parent}/train.jsonl", "source is not valid Unicode"),
        ('{"licence": 3}', "{parent}/train.jsonl", "licence is neither a text nor a list"),
        ("{}", "{parent}/absent.jsonl", "no dataset matches {parent}/absent.jsonl"),
        ("{}", "{parent}/*.json*", "2 files match"),
        ("{}", "{mother}/train.jsonl", "only {parent}, {folder} and {name}"),
        ('{"name": "../x"}', "{parent}/train.jsonl", "cannot name an adapter"),
    ],
)
def test_a_bad_card_or_pattern_refuses_that_folder(
    card: str, pattern: str, what: str, tmp_path: Path, base_path: Path
) -> None:
    folder = task(tmp_path, "one", 1)
    (tmp_path / "one" / "task.json").write_text(card)
    result = edgelora("bank", "add", folder, "--bank", tmp_path / "bank", "--base", base_path,
                      "--data-glob", pattern, "--card-glob", "{parent}/task.json")  # fmt: skip
    assert result.exit_code == 1 and what in result.stdout and "1 refused" in result.stdout


def test_damage_is_said_by_ls_and_verify(tmp_path: Path, base_path: Path) -> None:
    bank = tmp_path / "bank"
    edgelora("bank", "add", task(tmp_path, "one", 1), "--bank", bank, "--base", base_path)
    (bank / "adapters" / "two.gguf").write_bytes(b"GGUF")
    listed = edgelora("bank", "ls", "--bank", bank)
    assert "one" in listed.stdout and "two.gguf: damaged" in listed.stderr
    checked = edgelora("bank", "verify", "--bank", bank, "--json")
    assert checked.exit_code == 1 and len(json.loads(checked.stdout)["problems"]) == 1
    assert edgelora("bank", "show", "two", "--bank", bank).exit_code == 1
    assert edgelora("bank", "rm", "two", "--bank", bank).exit_code == 0


def test_text_of_a_file_cannot_command_the_terminal(tmp_path: Path, base_path: Path) -> None:
    bank = tmp_path / "bank"
    edgelora("bank", "add", task(tmp_path, "one", 1), "--bank", bank, "--base", base_path,
             "--source", "[red]\x1b[2Jx", "--licence", "\x1b]0;title\x07")  # fmt: skip
    for words in (("ls",), ("show", "one")):
        result = edgelora("bank", *words, "--bank", bank)
        assert result.exit_code == 0 and "\x1b" not in result.output
        assert "[red]" in result.output


def test_an_adapter_of_another_base_is_refused_with_both_identities(
    tmp_path: Path, base_path: Path
) -> None:
    bank = tmp_path / "bank"
    edgelora("bank", "add", task(tmp_path, "one", 1), "--bank", bank, "--base", base_path)
    tuned = pico.write_base(tmp_path / "tuned.gguf", norm_seed=7)
    result = edgelora("bank", "export", "one", "--bank", bank, "--base", tuned,
                      "-o", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 1
    for path in (base_path, tuned):
        assert read_base(path).identity.describe() in result.stderr


def test_a_missing_bank_is_named(tmp_path: Path) -> None:
    result = edgelora("bank", "ls", "--bank", tmp_path / "absent")
    assert result.exit_code == 1 and "not a bank" in result.stderr


def test_signatures_are_made_with_little_memory_where_it_is_short(
    tmp_path: Path, base_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = task(tmp_path, "one", 1)
    line = ["bank", "add", folder, "--bank", tmp_path / "bank", "--base", base_path, "-q",
            "--data", tmp_path / "one" / "train.jsonl", "--threads", 1]  # fmt: skip
    for name, text in {"max": "1000", "current": "0", "stat": "inactive_file 0"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    done = edgelora(*line)
    assert done.exit_code == 0 and "--low-ram was chosen" in done.stderr
    other = edgelora(*line[:4], tmp_path / "other", *line[5:], "--no-low-ram")
    assert other.exit_code == 0 and other.stderr == ""


def test_a_slow_machine_embeds_fewer_examples_and_says_so(
    tmp_path: Path, base_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = task(tmp_path, "one", 1)
    line = ["bank", "add", folder, "--name", "one", "--base", base_path, "--threads", 1, "-q",
            "--data", tmp_path / "one" / "train.jsonl"]  # fmt: skip
    base_id = read_base(base_path).identity.id

    def embedded(name: str, *words: object) -> tuple[int, str]:
        done = edgelora(*line, "--bank", tmp_path / name, *words)
        assert done.exit_code == 0, done.output
        return open_bank(tmp_path / name).signature("one", base_id).prompt.n, done.stderr

    assert embedded("measured") == (6, "")
    monkeypatch.setattr("edgelora.engine.embed.measure_speed", lambda context, n_layers: 0.2)
    n, said = embedded("slow")
    assert n in (1, 2, 3, 4) and f"{n} of 6 examples are embedded" in said
    assert "--embed 6 takes them all" in said
    assert embedded("all", "--embed", 6) == (6, "")
    assert embedded("two", "--embed", 2) == (2, "")
