"""`edgelora pull bank` against a Hub on this machine, with the layouts of Lots-of-LoRAs."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hub_server
import numpy as np
import pico
import pyarrow
import pyarrow.parquet
import pytest
from cli_runner import posix_only, run
from hub_server import Fault, Hub

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.bank import open_bank
from edgelora.bank.names import check_name
from edgelora.bank.verify import verify
from edgelora.datasets import read_dataset
from edgelora.datasets.template import SNI
from edgelora.hub import download
from edgelora.pull.lots_of_loras import find_wanted, read_rows, split_prompt
from edgelora.suggest import suggest

TASKS = {
    "task022": "task022_cosmosqa_passage_inappropriate_binary",
    "task033": "task033_winogrande_answer_generation",
    "task190": "task190_snli_classification",
}


def adapter_of(number: str) -> str:
    return f"Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-{number}"


def raw_prompt(definition: str, instance: str) -> str:
    """As the datasets of Lots-of-LoRAs hold it; the words are ours."""
    return (
        f"Definition: {definition}\n\nPositive Example 1 -\nInput: a b\nOutput: yes\n\n"
        f"Negative Example 1 -\nInput: c\nOutput: maybe\n\n"
        f"Now complete the following example -\nInput: {instance}\nOutput:"
    )


def parquet(prompts: list[str], folder: Path) -> bytes:
    answers = [[f"yes {i}", "yes"] for i in range(len(prompts))]
    ids = [f"id-{i}" for i in range(len(prompts))]
    table = pyarrow.table({"id": ids, "input": prompts, "output": answers})
    pyarrow.parquet.write_table(table, folder / "t.parquet")
    return (folder / "t.parquet").read_bytes()


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.write_base(tmp_path_factory.mktemp("base") / "pico.gguf")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, bytes]]:
    """Three adapters with their datasets, under the names that they have on the Hub."""
    root, files = tmp_path_factory.mktemp("published"), {}
    for seed, (number, task) in enumerate(TASKS.items()):
        folder = pico.write_peft(root / number, rank=16, alpha=32, seed=seed)
        adapter = {path.name: path.read_bytes() for path in folder.iterdir()}
        prompts = [raw_prompt(f"Is {seed} in it?", f"{i} {seed}") for i in range(8)]
        rows = parquet(prompts, root)
        splits = {f"data/{s}-00000-of-00001.parquet": rows for s in ("train", "valid", "test")}
        files["models", adapter_of(number)] = {**adapter, "training_args.bin": b"a pickle"}
        files["datasets", f"Lots-of-LoRAs/{task}"] = splits
    return files


@pytest.fixture
def hub(
    published: dict[tuple[str, str], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Hub]:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for (kind, name), files in published.items():
            hub.add(name, files, kind=kind)
        yield hub


def words(base: Path, bank: Path, *more: object) -> tuple[object, ...]:
    return ("pull", "bank", "lots-of-loras", "--base", base, "--bank", bank, "--threads", 1, *more)


def leftovers(bank: Path) -> list[str]:
    known = {"bank.json", "adapters", "index.sqlite", ".lock", ".lock-pull"}
    return [path.name for path in bank.iterdir() if path.name not in known]


def test_adapters_come_with_signature_template_and_licence(
    hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    result = run(*words(base_path, bank, "--tasks", "task022", "task190"))
    assert result.exit_code == 0, result.output
    assert f"added:         {TASKS['task022']} (parquet input/output, 8 examples)" in result.stdout
    assert "2 added, 0 refused" in result.stdout
    assert "2 adapters: at most 0.08 GB to fetch" in result.stderr

    wanted = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(hub.fetched()) == sorted(
        [f"{adapter_of(n)}/{file}" for n in ("task022", "task190") for file in wanted]
        + [
            f"Lots-of-LoRAs/{TASKS[n]}/data/train-00000-of-00001.parquet"
            for n in ("task022", "task190")
        ]
    )
    opened, base = open_bank(bank), read_base(base_path)
    record = opened.record(TASKS["task022"])
    assert (record.template, record.source, record.licence) == (SNI, "cosmosqa", "CC BY 4.0")
    assert record.category == "Toxic Language Detection" and record.dtype == "f16"
    commit = hub.commit("models", adapter_of("task022"))
    assert record.origin == f"{adapter_of('task022')}@{commit[:12]}"
    assert verify(opened, base) == [] and leftovers(bank) == []
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "is it odd?", "completion": "yes"}\n')
    used = run("eval", "--base", base_path, "--adapter", record.path, "--data", data,
               "--no-generate", "--template", "sni", "--threads", 1, "--offline")  # fmt: skip
    assert used.exit_code == 0 and "another prompt template" not in used.stderr, used.output
    assert (
        f"fetched from {record.origin}" in run("bank", "show", record.name, "--bank", bank).stdout
    )


def test_what_came_is_what_adding_the_same_files_gives(
    hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    run(*words(base_path, tmp_path / "pulled", "--tasks", "task033"))
    folder = tmp_path / "local" / TASKS["task033"]
    folder.mkdir(parents=True)
    for name, data in hub.repositories["models", adapter_of("task033")].items():
        (folder / name).write_bytes(data)
    lines = [{"prompt": f"Is 1 in it?\n\n{i} 1", "completion": f"yes {i}"} for i in range(8)]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    run("bank", "add", folder, "--bank", tmp_path / "added", "--base", base_path,
        "--data", data, "--threads", 1)  # fmt: skip
    banks = [open_bank(tmp_path / name) for name in ("pulled", "added")]
    records = [bank.record(TASKS["task033"]) for bank in banks]
    assert records[0].source_sha256 == records[1].source_sha256
    pulled, added = (open_lora(record.path) for record in records)
    assert pulled.names == added.names
    for name in pulled.names:
        for pair in ("lora_a", "lora_b"):
            got, expected = (getattr(lora.pair(name), pair) for lora in (pulled, added))
            np.testing.assert_array_equal(got, expected)
    one, other = (bank.signature(TASKS["task033"], records[0].base_id) for bank in banks)
    np.testing.assert_array_equal(one.prompt.mean, other.prompt.mean)
    np.testing.assert_array_equal(one.histogram.counts, other.histogram.counts)


def test_what_is_there_is_not_asked_for_again(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    first = run(*words(base_path, bank, "task022", "--no-signatures"))
    assert first.exit_code == 0 and "1 without a signature" in first.stderr
    assert not [file for file in hub.fetched() if file.endswith(".parquet")]
    hub.asked.clear()
    signed = run(*words(base_path, bank, "--tasks", "task022"))
    assert f"signed:        {TASKS['task022']}" in signed.stdout
    assert hub.fetched() == [f"Lots-of-LoRAs/{TASKS['task022']}/data/train-00000-of-00001.parquet"]
    hub.asked.clear()
    again = run(*words(base_path, bank, "--tasks", "task022", "--json"))
    (outcome,) = json.loads(again.stdout)
    assert outcome["status"] == "already there" and outcome["has_signature"]
    assert hub.asked == [] and leftovers(bank) == []


def test_one_that_is_refused_does_not_stop_the_others(
    hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    hub.faults[f"Lots-of-LoRAs/{TASKS['task022']}"] = Fault(status=403, code="GatedRepo")
    weights = f"{adapter_of('task033')}/adapter_model.safetensors"
    data = hub.repositories["models", adapter_of("task033")]["adapter_model.safetensors"]
    hub.faults[weights] = Fault(bytes_instead=data[:-1] + bytes([data[-1] ^ 1]))
    result = run(*words(base_path, tmp_path / "bank", *TASKS))
    assert result.exit_code == 1 and "1 added, 2 refused" in result.stdout
    assert "gated: its owner wants to be asked" in result.stdout
    assert "its bytes are not those that the Hub promised" in result.stdout
    assert [r.name for r in open_bank(tmp_path / "bank").records()] == [TASKS["task190"]]
    assert leftovers(tmp_path / "bank") == []
    hub.faults.clear()
    assert "2 added, 1 already there" in run(*words(base_path, tmp_path / "bank", *TASKS)).stdout


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}, "are a pickle"),
        ({"adapter_config.json": b"{}"}, "it has no adapter_model.safetensors"),
        ({"model.gguf": b"GGUF"}, "no adapter_config.json and no adapter_model.safetensors"),
        ({"adapter_config.json": b"{", "adapter_model.safetensors": b"x"}, "JSON"),
    ],
)
def test_a_repository_that_is_no_adapter(
    files: dict[str, bytes], what: str, hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    hub.add("someone/else", files)
    result = run("pull", "bank", "someone/else", "--base", base_path, "--bank", tmp_path / "bank")
    assert result.exit_code == 1 and what in result.stdout and "1 refused" in result.stdout
    assert leftovers(tmp_path / "bank") == [] and open_bank(tmp_path / "bank").records() == []


def test_any_repository_with_its_dataset_and_licence(
    hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    hub.add_folder("me/my.LoRA", pico.write_peft(tmp_path / "peft", seed=9), licence="mit")
    rows = parquet(["is it odd?", "and this?"], tmp_path)
    hub.add("me/data", {"train/0.parquet": rows, "test/0.parquet": rows}, kind="datasets")
    result = run("pull", "bank", "me/my.LoRA", "--base", base_path, "--bank", tmp_path / "bank",
                 "--dataset", "me/data", "--template", "alpaca", "--threads", 1)  # fmt: skip
    named = run("pull", "bank", "me/my.LoRA", "--base", base_path, "--bank", tmp_path / "other",
                "--name", "tickets")  # fmt: skip
    assert named.exit_code == 0 and open_bank(tmp_path / "other").record("tickets")
    assert result.exit_code == 0, result.output
    record = open_bank(tmp_path / "bank").record("my.LoRA")
    assert (record.licence, record.has_signature) == ("mit", True)
    assert "### Instruction" in record.template
    hub.add("me/many", {f"train-{i}.parquet": rows for i in range(2)}, kind="datasets")
    many = run("pull", "bank", "me/other", "--base", base_path, "--bank", tmp_path / "bank",
               "--dataset", "me/many")  # fmt: skip
    assert many.exit_code == 1 and "2 parquet files of a train split" in many.stdout
    assert "train-1.parquet" in many.stdout


def test_a_hub_that_dies_stops_the_run_and_what_came_is_used(
    hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    weights = f"{adapter_of('task033')}/adapter_model.safetensors"
    size = len(hub.repositories["models", adapter_of("task033")]["adapter_model.safetensors"])
    hub.faults[weights] = Fault(cut_after=size // 8)
    result = run(*words(base_path, bank, *TASKS, "--no-signatures"))
    assert result.exit_code == 0, result.output  # cut often, but each time more came
    assert result.stderr.count("the line was cut after") == 7
    bank = tmp_path / "other"
    hub.faults[weights] = Fault(cut_after=0)
    dead = run(*words(base_path, bank, *TASKS, "--no-signatures"))
    assert dead.exit_code == 1 and "1 added, 0 refused" in dead.stdout
    assert "goes on where it stopped" in dead.stderr
    hub.faults.clear()
    assert "2 added, 1 signed, 0 refused" in run(*words(base_path, bank, *TASKS)).stdout
    assert leftovers(bank) == []


def test_offline_what_is_there_is_told_and_what_is_missing_stops(
    hub: Hub, base_path: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    run(*words(base_path, bank, "task022"))
    hub.asked.clear()
    there = run(*words(base_path, bank, "task022", "--offline"))
    assert there.exit_code == 0 and "1 already there" in there.stdout
    missing = run(*words(base_path, bank, "task022", "task033", "--offline"))
    assert missing.exit_code == 1 and "1 already there" in missing.stdout
    assert "needs the network, and this is offline" in missing.stderr
    assert hub.asked == []


def test_a_wrong_base_does_not_cost_the_whole_collection(
    hub: Hub, tmp_path: Path, base_path: Path, published: dict[tuple[str, str], dict[str, bytes]]
) -> None:
    other = pico.write_base(tmp_path / "other.gguf", dims=pico.Dims(n_embd=64))
    for number in ("task034", "task035"):
        hub.add(adapter_of(number), published["models", adapter_of("task033")])
    result = run(*words(other, tmp_path / "bank", *TASKS, "task034", "task035", "--no-signatures"))
    assert result.exit_code == 1 and "0 added" not in result.stdout
    assert "stopped: the first 3 of 5 adapters were all refused" in result.stderr
    assert "3 refused" in result.stdout and "does not fit the base" in result.stdout


@pytest.mark.slow
@posix_only
def test_ctrl_c_keeps_what_came_and_says_so(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    bank, weights = tmp_path / "bank", f"{adapter_of('task033')}/adapter_model.safetensors"
    hub.faults[weights] = Fault(stall_after=10_000)
    with start(words(base_path, bank, "task033", "--no-signatures")) as process:
        assert hub.stalled.wait(200)
        wait_for_part(bank)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130 and "the same command goes on from there" in stderr
    hub.faults.clear()
    hub.asked.clear()
    assert run(*words(base_path, bank, "task033", "--no-signatures")).exit_code == 0
    assert hub.ranges() == ["bytes=10000-"] and leftovers(bank) == []


@pytest.mark.slow
def test_killed_at_random_moments(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    bank, rng = tmp_path / "bank", random.Random(0)
    command = words(base_path, bank, *TASKS)
    for n_requests in (2, 1, 3, 2):  # each run goes on where the one before was killed
        hub.asked.clear()
        with start(command) as process:
            while len(hub.asked) < n_requests and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.communicate()
        problems = verify(open_bank(bank))
        assert [p for p in problems if not p.startswith(".edgelora-tmp-")] == []
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert verify(open_bank(bank), read_base(base_path)) == [] and leftovers(bank) == []
    assert all(record.has_signature for record in open_bank(bank).records())
    assert len(open_bank(bank).records()) == 3


def start(command: tuple[object, ...]) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", STARTER, *map(str, command)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# A background job of a shell ignores SIGINT, and its children inherit that.
STARTER = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from edgelora.cli.main import main; main()"
)


def wait_for_part(bank: Path) -> None:
    for _ in range(4000):
        if any(path.stat().st_size for path in (bank / "downloads").glob("*/*/*.part")):
            return
        time.sleep(0.05)
    raise AssertionError("nothing came")


def test_two_at_once_on_one_bank(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    from edgelora.files import locked

    bank = open_bank(tmp_path / "bank", create=True)
    with locked(bank.path / ".lock-pull"):
        result = run(*words(base_path, bank.path, "task022"))
    assert result.exit_code == 1 and "locked by another process" in result.stderr


def test_tasks_are_found_by_name_number_and_pattern() -> None:
    assert len(find_wanted()) == 502
    assert [w.name for w in find_wanted(["task022"])] == [TASKS["task022"]]
    assert [w.name for w in find_wanted([TASKS["task033"], "task022"])] == [
        TASKS["task022"],
        TASKS["task033"],
    ]
    snli = find_wanted(["*_snli_*"])
    assert TASKS["task190"] in [w.name for w in snli] and len(snli) > 1
    every = {(w.repository, w.dataset) for w in find_wanted()}
    assert len(every) == 502
    for wanted in find_wanted():
        check_name(wanted.name)
    assert (adapter_of("task022"), f"Lots-of-LoRAs/{TASKS['task022']}") in every


def test_unknown_tasks_and_options_are_refused_together(base_path: Path, tmp_path: Path) -> None:
    line = words(base_path, tmp_path / "bank")
    unknown = run(*line, "--tasks", "task022_cosmosqa", "task99999")
    assert unknown.exit_code == 1 and not (tmp_path / "bank").exists()
    assert "no such task: task022_cosmosqa, task99999" in unknown.stderr
    assert f"did you mean {TASKS['task022']}" in unknown.stderr
    for more in (("--top", 3), ("--template", "sni"), ("--for", "x.jsonl", "--tasks", "task022")):
        assert run(*line, *more).exit_code == 2
    for more in (("--tasks", "a"), ("--for", "x"), ("b/c", "--dataset", "d/e"), ("b/name",)):
        assert run("pull", "bank", "org/name", *line[3:], *more).exit_code == 2


def test_the_raw_form_is_taken_apart(tmp_path: Path) -> None:
    assert split_prompt(raw_prompt("Add the numbers.", "1\n2")) == ("Add the numbers.", "1\n2")
    plain = "Definition: D.\n\nNow complete the following example -\nInput: x\nOutput:"
    assert split_prompt(plain) == ("D.", "x")
    for other in ("What?", "Definition: D.", plain.removeprefix("Definition: "), plain[:-13]):
        assert split_prompt(other) is None
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet([raw_prompt("D.", "x"), "of another form"], tmp_path))
    dataset = read_rows(path)
    assert [example.prompt for example in dataset.examples] == ["D.\n\nx", "of another form"]
    assert dataset.examples[0].references == ("yes 0", "yes")
    assert dataset.warnings == ("1 prompts of another form were taken whole",)


def test_a_dataset_that_is_not_parquet(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    files = {"data/train-00000-of-00001.parquet": b"PAR1 not really"}
    hub.add(f"Lots-of-LoRAs/{TASKS['task022']}", files, kind="datasets")
    result = run(*words(base_path, tmp_path / "bank", "task022"))
    assert result.exit_code == 1 and "damaged parquet" in result.stdout
    assert leftovers(tmp_path / "bank") == [] and open_bank(tmp_path / "bank").records() == []


def test_the_nearest_to_a_dataset_come(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    data = tmp_path / "my.jsonl"
    prompt = (
        "Does the hypothesis follow from the premise? Premise: A man sleeps. Hypothesis: He runs."
    )
    lines = [{"prompt": f"{prompt} {i}", "completion": "contradiction"} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, lines)))
    names = [one.entry.task for one in suggest(read_dataset(data).examples, top=2).nearest]
    by_name = {one.name: one for one in find_wanted(names)}
    published = hub.repositories["models", adapter_of("task033")]
    for name in names:
        hub.add(by_name[name].repository, published)
    result = run(*words(base_path, tmp_path / "bank", "--for", data, "--top", 2, "--no-signatures"))
    assert f"nearest: {', '.join(names)}" in result.stderr, result.output
    assert "23 adapters were not compared" in result.stderr
    # The two have the same bytes here, and a bank keeps bytes once.
    assert "1 added, 1 already there, 0 refused" in result.stdout
