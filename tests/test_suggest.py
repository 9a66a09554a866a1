"""Suggestions: the catalogue is checked, fields are taken apart, similarities equal references."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import run
from numpy.typing import NDArray

from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Example, Message
from edgelora.engine.vocabulary import open_vocabulary
from edgelora.errors import DatasetError, InvalidFile
from edgelora.shipped import shipped
from edgelora.suggest import suggest
from edgelora.suggest.catalogue import FIELDS, N_VOCAB, Counts, read_catalogue
from edgelora.suggest.fields import FieldTexts, count_fields, split_fields
from edgelora.suggest.nearest import MAX_COUNTED, VOCABULARY_FILE
from edgelora.suggest.similarity import WEIGHTS, combine, field_similarity, token_weights

SHIPPED = shipped("catalogue")
ROW = {"task": "task1_a", "adapter": "org/a", "dataset": "org/d"}
Arrays = dict[str, NDArray[Any]]


def examples(*prompts: str, completion: str | None = None) -> list[Example]:
    answers = () if completion is None else (completion,)
    return [Example((Message("user", p),), completion, answers, i) for i, p in enumerate(prompts)]


def small() -> Arrays:
    """Two rows of counts: tokens 5 (twice) and 9, and nothing."""
    arrays: Arrays = {}
    for field in FIELDS:
        arrays[f"{field}_indptr"] = np.array([0, 2, 2], np.int32)
        arrays[f"{field}_token"] = np.array([5, 9], np.uint16)
        arrays[f"{field}_count"] = np.array([2, 1], np.uint32)
    return arrays


def write(folder: Path, arrays: Arrays | None = None, rows: list[object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    second = ROW | {"task": "task2_b"}
    lines = "\n".join(map(json.dumps, [ROW, second] if rows is None else rows))
    (folder / "lots-of-loras.jsonl").write_text(lines)
    np.savez_compressed(folder / "token_histograms.npz", **(small() if arrays is None else arrays))
    return folder


def test_the_shipped_catalogue_is_whole() -> None:
    catalogue = read_catalogue()
    assert (len(catalogue.counted), len(catalogue.uncounted)) == (479, 23)
    assert all(e.source and e.category and e.licence for e in catalogue.counted)
    assert all(len(c.indptr) == 480 for c in catalogue.counts.values())
    # 400 instances of "Yes" or "No", one token each.
    place = [e.task for e in catalogue.counted].index("task190_snli_classification")
    tokens, counts = catalogue.counts["completion"].row(place)
    assert (len(tokens), counts.sum()) == (2, 400)


def test_a_small_catalogue(tmp_path: Path) -> None:
    catalogue = read_catalogue(write(tmp_path))
    assert [e.task for e in catalogue.counted] == ["task1_a"]
    assert [e.task for e in catalogue.uncounted] == ["task2_b"]
    tokens, counts = catalogue.counts["prompt"].row(0)
    assert tokens.tolist() == [5, 9] and counts.tolist() == [2.0, 1.0]


def test_every_bad_line_of_the_rows_is_listed(tmp_path: Path) -> None:
    bad: list[object] = [
        ROW, ROW, [], ROW | {"task": "a\nb"}, ROW | {"adapter": "../x"}, ROW | {"source": "x"},
        ROW | {"instances": -1},
    ]  # fmt: skip
    with pytest.raises(InvalidFile) as caught:
        read_catalogue(write(tmp_path, rows=bad))
    message = str(caught.value)
    assert "lots-of-loras.jsonl: not a catalogue" in message and "task1_a comes 2 times" in message
    assert all(f"line {n}: " in message for n in (3, 4, 5, 6, 7)) and "Install" in message


def changed(name: str, value: NDArray[Any] | None) -> Arrays:
    arrays = small()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    return arrays


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("prompt_token", None, "prompt_token"),
        ("prompt_token", np.array([5, N_VOCAB], np.uint16), "outside the vocabulary"),
        ("prompt_token", np.array([-1, 5], np.int32), "outside the vocabulary"),
        ("prompt_token", np.array([9, 5], np.uint16), "do not increase"),
        ("prompt_count", np.array([0, 1], np.uint32), "counts below 1"),
        ("prompt_count", np.array([2, 1 << 40], np.uint64), "beyond 31 bits"),
        ("prompt_count", np.array([1], np.uint32), "2 tokens with 1 counts"),
        ("prompt_count", np.array([1.0, 2.0]), "not a list of whole numbers"),
        ("prompt_count", np.ones((2, 1), np.uint32), "not a list of whole numbers"),
        ("prompt_count", np.array([1, object()], object), "not a list of whole numbers"),
        ("prompt_indptr", np.array([0, 2], np.int32), "do not fit 2 tasks"),
        ("prompt_indptr", np.array([0, 3, 2], np.int32), "end before they begin"),
        ("prompt_indptr", np.array([0, 1, 1], np.int32), "do not fit 2 tasks and 2 tokens"),
    ],
)
def test_hostile_counts_are_refused(
    name: str, value: NDArray[Any] | None, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidFile, match=problem):
        read_catalogue(write(tmp_path, changed(name, value)))


def raw_counts(folder: Path, edit: Callable[[bytes], bytes]) -> Path:
    """The small catalogue with the bytes of one array changed."""
    path = write(folder) / "token_histograms.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["prompt_count.npy"] = edit(members["prompt_count.npy"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw.replace(b"(2,)", b"(9,)"),
        lambda raw: raw.replace(b"<u4", b"|O "),
        lambda raw: raw[:8] + b"\xff\xff" + raw[10:],
        lambda raw: b"\x93NUMPY\x01\x00\x04\x00{{{{" + raw,
        lambda raw: b"",
    ],
)
def test_a_damaged_array_is_refused(edit: Callable[[bytes], bytes], tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"token_histograms\.npz"):
        read_catalogue(raw_counts(tmp_path, edit))


def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "token_histograms.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(20_000_000, np.uint32))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("instruction_indptr.npy", buffer.getvalue())
    with pytest.raises(InvalidFile, match="claims 80000128 bytes"):
        read_catalogue(tmp_path)


def test_damaged_bytes_are_never_a_traceback(tmp_path: Path) -> None:
    """Any byte of the small catalogue changed: read as it is, or refused by name."""
    path = write(tmp_path) / "token_histograms.npz"
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(sound), 300):
        path.write_bytes(sound[:at] + bytes([rng.integers(256)]) + sound[at + 1 :])
        try:
            read_catalogue(tmp_path)
        except InvalidFile as error:
            assert "token_histograms.npz" in str(error)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"lots-of-loras\.jsonl"):
        read_catalogue(tmp_path)
    (write(tmp_path) / "token_histograms.npz").unlink()
    with pytest.raises(InvalidFile, match=r"token_histograms\.npz"):
        read_catalogue(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "instructions", "rest"),
    [
        # A line in common, a sentence in common, a question in common.
        (["Say what it is.\nApple", "Say what it is.\nOak"], ["Say what it is."], ["Apple", "Oak"]),
        (["Say it in one word. A cat", "Say it in one word. A cap"], ["Say it in one word."],
         ["A cat", "A cap"]),
        # A label of the text below the instruction is not part of it.
        (["Sort all words.\n\nWords: a", "Sort all words.\n\nWords: b"], ["Sort all words."],
         ["Words: a", "Words: b"]),
        # A number's point ends no sentence, and two words are a label.
        (["Costs are 1.5 more", "Costs are 1.7 more"], [], ["Costs are 1.5 more",
         "Costs are 1.7 more"]),
        (["Ticket: late", "Ticket: lost"], [], ["Ticket: late", "Ticket: lost"]),
        # One prompt: its first paragraph. One paragraph: no instruction is known.
        (["Sort the words.\n\nb a"], ["Sort the words."], ["b a"]),
        (["Sort the words. b a"], [], ["Sort the words. b a"]),
        # Two instructions, each of several lines, and a line without.
        (["Sort the words.\n\nb a", "Sort the words.\n\nd c", "Count all words.\n\na",
          "Count all words.\n\nb c", "Hello there you"],
         ["Sort the words.", "Count all words."], ["b a", "d c", "a", "b c", "Hello there you"]),
        (["a b c\n\nx", "d e f\n\ny"], [], ["a b c\n\nx", "d e f\n\ny"]),
    ],
)  # fmt: skip
def test_instructions_are_taken_out_of_prompts(
    prompts: list[str], instructions: list[str], rest: list[str]
) -> None:
    assert split_fields(examples(*prompts)) == FieldTexts(tuple(instructions), tuple(rest), ())


def test_a_system_turn_is_an_instruction() -> None:
    turns = [(Message("system", "Answer in one word."), Message("user", t)) for t in ("a", "b")]
    fields = split_fields([Example(t, "x", ("x",), 1) for t in turns])
    assert fields == FieldTexts(("Answer in one word.",), ("a", "b"), ("x", "x"))


@pytest.mark.parametrize(
    "task", ["task1419_mathqa_gain", "task344_hybridqa_answer_generation", "task1421_mathqa_other"]
)
def test_the_counts_of_the_catalogue_are_reproduced(task: str) -> None:
    """The instruction of lab lines whose text is whole, tokenised: the catalogue's own counts."""
    lab = Path(os.environ.get("EDGELORA_SHARED", "")) / "lab" / "bank"
    if not (lab / task).is_dir():
        pytest.skip("needs lab/bank in the folder EDGELORA_SHARED")
    fields = split_fields(read_dataset(lab / task / "train.jsonl").examples)
    catalogue = read_catalogue()
    place = [e.task for e in catalogue.counted].index(task)
    tokens, counts = catalogue.counts["instruction"].row(place)
    with open_vocabulary(SHIPPED / VOCABULARY_FILE) as vocabulary:
        own = Counter(vocabulary.tokenize(fields.instructions[0]))
    assert own == dict(zip(tokens.tolist(), counts.tolist(), strict=True))


def random_counts(seed: int, k: int = 7, n_vocab: int = 50) -> tuple[Counts, NDArray[np.float64]]:
    """Counts of k rows, and the same as a dense (k, n_vocab) array."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 9, (k, n_vocab)) * (rng.random((k, n_vocab)) < 0.3)
    dense[:, 0] = 1
    rows, tokens = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(k + 1)).astype(np.int64)
    return Counts(indptr, tokens, dense[rows, tokens].astype(float)), dense.astype(float)


def test_a_similarity_worked_by_hand() -> None:
    # Of three tasks the first has tokens 0 and 1, the second 1 four times, the third 1 and 2.
    counts = Counts(np.array([0, 2, 3, 5]), np.array([0, 1, 1, 1, 2]), np.array([1.0, 1, 4, 1, 1]))
    # idf: log(4 / 2) for tokens 0 and 2; token 1, which all have, is worth nothing.
    assert token_weights(counts, 3) == pytest.approx([np.log(2), 0.0, np.log(2)])
    assert field_similarity(np.array([9.0, 0.0, 0.0]), counts) == pytest.approx([1.0, 0.0, 0.0])
    # The dataset has token 0 once and token 2 e times: weights 1 and 2, so 1 and 2 over sqrt(5).
    mixed = field_similarity(np.array([1.0, 7.0, np.e]), counts)
    assert mixed == pytest.approx([1 / np.sqrt(5), 0.0, 2 / np.sqrt(5)])


def test_similarity_equals_scipys_cosine() -> None:
    from scipy.spatial.distance import cosine

    counts, dense = random_counts(1)
    own = np.random.default_rng(2).integers(0, 5, 50).astype(float)
    idf = np.log(8 / (1 + (dense > 0).sum(axis=0)))

    def damped(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([1 + np.log(value) if value else 0.0 for value in x])

    expected = [1 - cosine(damped(own), damped(row), w=idf**2) for row in dense]
    assert field_similarity(own, counts) == pytest.approx(expected, abs=1e-12)
    assert field_similarity(dense[3], counts)[3] == pytest.approx(1.0)
    assert field_similarity(np.zeros(50), counts).tolist() == [0.0] * 7


def test_fields_are_combined_in_standard_deviations() -> None:
    from scipy.stats import zscore

    rng = np.random.default_rng(4)
    parts = {name: rng.random(9) * scale for name, scale in zip(FIELDS, (1, 10, 0.1), strict=True)}
    expected = sum(WEIGHTS[name] * zscore(values) for name, values in parts.items())
    assert combine(parts) == pytest.approx(expected / sum(WEIGHTS.values()))
    absent = parts | {"instruction": np.zeros(9)}
    rest = {name: WEIGHTS[name] for name in ("prompt", "completion")}
    expected = sum(w * zscore(parts[name]) for name, w in rest.items()) / sum(rest.values())
    assert combine(absent) == pytest.approx(expected)
    assert combine({name: np.zeros(9) for name in FIELDS}).tolist() == [0.0] * 9


def test_a_row_s_own_counts_find_it(tmp_path: Path) -> None:
    """Texts whose tokens are one row's: that adapter comes first, with similarity 1."""
    data = examples("Name the fruit in the text.\n\nAn apple", "Name the fruit in the text.\n\nFig",
                    completion="apple")  # fmt: skip
    with open_vocabulary(SHIPPED / VOCABULARY_FILE) as vocabulary:
        own = count_fields(split_fields(data), vocabulary.tokenize)
    arrays: Arrays = {}
    for field in FIELDS:
        tokens = np.flatnonzero(own[field])
        other = np.array([100, 200])
        arrays[f"{field}_indptr"] = np.array([0, 2, 2 + len(tokens)])
        arrays[f"{field}_token"] = np.concatenate([other, tokens])
        arrays[f"{field}_count"] = np.concatenate([[1, 1], own[field][tokens]]).astype(np.int64)
    catalogue = read_catalogue(write(tmp_path / "own", arrays))
    found = suggest(data, top=5, catalogue=catalogue)
    assert [one.entry.task for one in found.nearest] == ["task2_b", "task1_a"]
    assert list(found.nearest[0].similarity.values()) == pytest.approx([1.0, 1.0, 1.0])
    assert found.n_tokens["completion"] == own["completion"].sum() and found.left_out == ()


def test_of_many_examples_some_are_drawn_by_the_seed() -> None:
    many = examples(*(f"number {i} of them" for i in range(MAX_COUNTED + 50)))
    one, same, other = (suggest(many, seed=seed) for seed in (0, 0, 1))
    assert one.n_counted == MAX_COUNTED and one.nearest == same.nearest
    assert one.nearest != other.nearest and one.n_tokens["instruction"] == 0
    with pytest.raises(DatasetError, match="at least one"):
        suggest([])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my data.jsonl"
    lines = [
        {"prompt": f"Does the premise entail the hypothesis?\nPremise: {a}", "completion": "Yes"}
        for a in ("A dog runs. Hypothesis: an animal moves.", "A man sits. Hypothesis: he sleeps.")
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_command_prints_adapters(data: Path) -> None:
    result = run("suggest", "--data", data, "--top", "3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "nearest of 479 adapters for mistral-7b-instruct-v0.2" in lines[0]
    assert lines[4].split()[:4] == ["adapter", "instruction", "prompt", "completion"]
    assert all(line.startswith("Lots-of-LoRAs/Mistral-7B") for line in lines[5:8])
    assert "37.8 MB each (113 MB for 3), 18.9 MB once converted (57 MB)" in result.stdout
    assert "left out: 23 adapters" in result.stdout
    assert "2 examples (jsonl prompt/completion)" in result.stderr


def test_the_command_prints_json(data: Path) -> None:
    found = json.loads(run("suggest", "--data", data, "--json", "-q").stdout)
    assert len(found["adapters"]) == 10 and len(found["left_out"]) == 23
    first = found["adapters"][0]
    assert set(first["similarity"]) == set(FIELDS) and first["download_bytes"] == 37_800_000
    assert first["licence"] and first["source"] and first["category"] and first["dataset"]
    scores = [adapter["score"] for adapter in found["adapters"]]
    assert scores == sorted(scores, reverse=True) and found["n_ranked"] == 479
    assert (
        len(json.loads(run("suggest", "--data", data, "--top", 999, "--json").stdout)["adapters"])
        == 479
    )


def test_fields_that_are_not_there_are_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one thing"}\n{"text": "another"}\n')
    result = run("suggest", "--data", path, "-q")
    assert result.exit_code == 0
    assert "the dataset has none: instruction and completion" in result.stderr


def test_bad_data_gets_the_errors_of_build(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for text, part in (("{}\n", "no known layout"), ("", "holds no examples")):
        path.write_text(text)
        result = run("suggest", "--data", path)
        assert result.exit_code == 1 and part in result.stderr and str(path) in result.stderr
    assert run("suggest", "--data", tmp_path / "none").exit_code == 1
    assert run("suggest", "--data", path, "--top", "0").exit_code == 2


@pytest.mark.slow
def test_nothing_is_asked_of_the_network(data: Path) -> None:
    """The command in a process whose sockets raise."""
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('a socket was opened')\n"
        "socket.socket.__init__ = refuse\n"
        "from edgelora.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "suggest", "--data", str(data), "--top", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
