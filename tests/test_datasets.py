"""Reading datasets: every layout by hand, then files that are damaged or hostile."""

from __future__ import annotations

import builtins
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgelora.datasets import Dataset, Example, Message, read_dataset, split_examples
from edgelora.errors import DatasetError


def write_lines(path: Path, records: Sequence[object]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_records(folder: Path, *records: object, **options: str) -> Dataset:
    return read_dataset(write_lines(folder / "data.jsonl", records), **options)


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def pair(i: int) -> dict[str, str]:
    return {"prompt": f"p{i}", "completion": f"c{i}"}


def test_prompt_and_completion_by_hand(tmp_path: Path) -> None:
    dataset = read_records(tmp_path, pair(1), pair(2))
    assert dataset.format == "jsonl prompt/completion"
    assert dataset.examples == (
        Example(user("p1"), "c1", ("c1",), 1),
        Example(user("p2"), "c2", ("c2",), 2),
    )
    assert dataset.examples[1].prompt == "p2"
    assert dataset.warnings == () and dataset.has_completions


@pytest.mark.parametrize(
    ("record", "form", "messages", "completion", "references"),
    [
        ({"prompt": "a"}, "prompt/completion", user("a"), None, ()),
        (
            {"prompt": "a", "completion": "b", "references": ["b", "c"]},
            "prompt/completion",
            user("a"),
            "b",
            ("b", "c"),
        ),
        (
            {"prompt": "a", "references": ["b", "c"]},
            "prompt/completion",
            user("a"),
            "b",
            ("b", "c"),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "instruction/input/output",
            user("Add.\n\n1 2"),
            "3",
            ("3",),
        ),
        (
            {"instruction": "Sing.", "input": "", "output": "La"},
            "instruction/input/output",
            user("Sing."),
            "La",
            ("La",),
        ),
        (
            {"id": "t-1", "input": "Is it?", "output": ["yes", "sure"]},
            "input/output",
            user("Is it?"),
            "yes",
            ("yes", "sure"),
        ),
        ({"text": "All of it."}, "text", user("All of it."), None, ()),
        (
            {"prompt": "a", "completion": "b", "system": "Be brief."},
            "prompt/completion",
            (Message("system", "Be brief."), Message("user", "a")),
            "b",
            ("b",),
        ),
    ],
)
def test_layouts(
    tmp_path: Path,
    record: dict[str, object],
    form: str,
    messages: tuple[Message, ...],
    completion: str | None,
    references: tuple[str, ...],
) -> None:
    dataset = read_records(tmp_path, record)
    assert dataset.format == f"jsonl {form}"
    assert dataset.examples == (Example(messages, completion, references, 1),)


def test_chat_the_last_answer_is_the_completion(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "Me"},
    ]
    dataset = read_records(tmp_path, {"messages": turns})
    assert dataset.format == "jsonl messages (chat)"
    (example,) = dataset.examples
    assert [m.role for m in example.messages] == ["system", "user", "assistant", "user"]
    assert (example.prompt, example.completion) == ("Who?", "Me")
    (unanswered,) = read_records(tmp_path, {"messages": turns[:-1]}).examples
    assert (unanswered.prompt, unanswered.completion) == ("Who?", None)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("hello", "not a list"),
        ([], "not a list"),
        (["hello"], "turn 1 is"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "the role"),
        ([{"role": "user", "content": None}], "missing"),
        ([{"role": "user", "content": " "}], "empty"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "type 'None'"),
        ([{"role": "assistant", "content": "x"}], "no user turn"),
        ([{"role": "system", "content": "x"}], "no user turn"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}],
            "calls tools",
        ),
    ],
)
def test_bad_chats_are_named_by_line(tmp_path: Path, turns: object, said: str) -> None:
    good = {"messages": [{"role": "user", "content": "x"}]}
    dataset = read_records(tmp_path, good, {"messages": turns})
    assert len(dataset.examples) == 1
    (warning,) = dataset.warnings
    assert "line 2" in warning
    with pytest.raises(DatasetError, match=said):
        read_records(tmp_path, {"messages": turns})


def test_csv_with_quotes_newlines_semicolons_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"a, ""b""\r\nc",d\r\n\r\ne,f\r\n')
    dataset = read_dataset(path)
    assert dataset.format == "csv prompt/completion"
    assert [(e.prompt, e.completion, e.line) for e in dataset.examples] == [
        ('a, "b"\r\nc', "d", 3),
        ("e", "f", 5),
    ]
    path.write_text("instruction;input;output\nAdd.;1, 2;3\n", encoding="utf-8")
    assert read_dataset(path).examples[0].prompt == "Add.\n\n1, 2"
    path.write_text("text\tlabel\nAdd.\tx\n", encoding="utf-8")
    dataset = read_dataset(path, completion_key="label")
    assert (dataset.format, dataset.examples[0].completion) == ("csv text/label", "x")


def test_csv_a_cell_of_a_megabyte_and_the_limit_of_csv_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "data.csv"
    path.write_text(f"prompt,completion\n{'x' * 1_000_000},y\n", encoding="utf-8")
    assert len(read_dataset(path).examples[0].prompt) == 1_000_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,prompt\na,b\n", "twice"),
        ("prompt,completion\na\n", "1 cells"),
        ("prompt,completion\na,b,c\n", "3 cells"),
        ('prompt,completion\na,b\nc,"d\ne,f\n', "line"),
        ("prompt,completion\n", "no examples"),
        ("a,b\n1,2\n", "'a', 'b'"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=said):
        read_dataset(path)


def test_csv_bytes_that_are_no_utf8_spoil_their_line_only(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"prompt,completion\na,b\ncaf\xe9,d\n")
    dataset = read_dataset(path)
    assert len(dataset.examples) == 1 and "line 3" in dataset.warnings[0]


def test_parquet_of_lots_of_loras(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"id": f"t-{i}", "input": f"q{i}", "output": [f"a{i}", "b"]} for i in range(3)]
    path = tmp_path / "train-00000.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    dataset = read_dataset(path, limit=2)
    assert dataset.format == "parquet input/output"
    assert dataset.examples == tuple(
        Example(user(f"q{i}"), f"a{i}", (f"a{i}", "b"), i + 1) for i in range(2)
    )
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="parquet"):
        read_dataset(path)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_pyarrow(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> object:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DatasetError, match=r"edgelora\[parquet\]"):
        read_dataset(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_super_natural_instructions(tmp_path: Path, indent: int | None) -> None:
    task = {
        "Definition": ["Answer yes or no."],
        "Positive Examples": [],
        "Instances": [
            {"id": "1", "input": "Is it?", "output": ["yes", "sure"]},
            {"id": "2", "input": 7, "output": ["no"]},
            {"id": "3", "input": "Was it?", "output": ["no"]},
        ],
    }
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task, indent=indent), encoding="utf-8")
    dataset = read_dataset(path)
    assert dataset.format == "Super-NaturalInstructions task"
    assert dataset.examples == (
        Example(user("Answer yes or no.\n\nIs it?"), "yes", ("yes", "sure"), 1),
        Example(user("Answer yes or no.\n\nWas it?"), "no", ("no",), 3),
    )
    assert "instance 2" in dataset.warnings[0]
    with pytest.raises(DatasetError, match="cannot be chosen"):
        read_dataset(path, prompt_key="input")


def test_a_json_array(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([pair(1), pair(2)], indent=1), encoding="utf-8")
    dataset = read_dataset(path)
    assert dataset.format == "json array prompt/completion"
    assert [e.line for e in dataset.examples] == [1, 2]


def test_keys_that_the_user_names(tmp_path: Path) -> None:
    record = {"prompt": "not this", "question": "Is it?", "answer": "yes", "output": "no"}
    dataset = read_records(tmp_path, record, prompt_key="question", completion_key="answer")
    assert dataset.format == "jsonl question/answer"
    assert dataset.examples[0] == Example(user("Is it?"), "yes", ("yes",), 1)
    assert read_records(tmp_path, record, prompt_key="question").examples[0].completion == "no"
    assert read_records(tmp_path, record, completion_key="answer").examples[0].prompt == "not this"
    with pytest.raises(DatasetError, match=r"no column 'nope'; the columns are 'prompt'"):
        read_records(tmp_path, record, prompt_key="nope")


def test_bom_crlf_blank_lines_duplicates_and_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    odd = json.dumps({"prompt": "a\u2028b\u0085c", "completion": "d"}, ensure_ascii=False)
    same = json.dumps(pair(1))
    text = f"\ufeff\r\n{same}\r\n\r\n  \r\n{same}\r\n{odd}"
    path.write_bytes(text.encode("utf-8"))
    dataset = read_dataset(path)
    assert [e.line for e in dataset.examples] == [2, 5, 6]
    assert dataset.examples[2].prompt == "a\u2028b\u0085c"
    assert dataset.warnings == ()


def test_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [pair(1), pair(2), *["bad"] * 50])
    assert [e.prompt for e in read_dataset(path, limit=2).examples] == ["p1", "p2"]
    with pytest.raises(DatasetError, match="limit of 0"):
        read_dataset(path, limit=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("7", "not a JSON object"),
        ('{"prompt": 7, "completion": "c"}', "'prompt' is a number"),
        ('{"prompt": true, "completion": "c"}', "true or false"),
        ('{"prompt": null, "completion": "c"}', "missing"),
        ('{"prompt": " ", "completion": "c"}', "empty"),
        ('{"completion": "c"}', "no 'prompt'"),
        ('{"prompt": "p", "completion": 3}', "'completion' is a number"),
        ('{"prompt": "p", "completion": ["a", ""]}', "empty text"),
        ('{"prompt": "p"}', "no completion, while other lines"),
        ('{"prompt": "p", "completion": "c", "references": [1]}', "'references' is a number"),
        ('{"prompt": "\\ud800", "completion": "c"}', "not valid Unicode"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "too many digits"),
    ],
)
def test_a_bad_line_is_a_warning_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    dataset = read_records(tmp_path, pair(1), line, pair(3))
    assert [e.line for e in dataset.examples] == [1, 3]
    (warning,) = dataset.warnings
    assert "line 2" in warning and said in warning


def test_a_bad_first_line_does_not_decide_the_format(tmp_path: Path) -> None:
    for first in ("oops", {"other": 1}):
        dataset = read_records(tmp_path, first, pair(2))
        assert dataset.format == "jsonl prompt/completion"
        assert "line 1" in dataset.warnings[0]


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "line 2: not UTF-8" in read_dataset(path).warnings[0]


def test_more_than_a_few_bad_lines_stop_with_one_error(tmp_path: Path) -> None:
    good = [pair(i) for i in range(100)]
    assert len(read_records(tmp_path, *good, *["x"] * 5).warnings) == 5
    with pytest.raises(DatasetError, match="6 of 106 lines") as caught:
        read_records(tmp_path, *good, *["x"] * 6)
    assert len(caught.value.problems) == 6
    with pytest.raises(DatasetError) as caught:
        read_records(tmp_path, *good, *["x"] * 50)
    assert len(caught.value.problems) == 21 and "30 more" in caught.value.problems[-1]
    with pytest.raises(DatasetError, match="2 of 3"):
        read_records(tmp_path, pair(1), "x", "x")


def test_one_per_cent_of_many_is_still_a_few(tmp_path: Path) -> None:
    many = [pair(i) for i in range(3000)]
    dataset = read_records(tmp_path, *many, *["x"] * 25)
    assert len(dataset.examples) == 3000
    assert len(dataset.warnings) == 21 and "5 more" in dataset.warnings[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no examples"),
        (b"\n \r\n", "no examples"),
        (b"[]", "no examples"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
        (b"\x1f\x8b\x08\x00", "compressed"),
        (b'{"foo": "a", "bar": "b"}\n', "'foo', 'bar'"),
        (b'{"Definition": 3, "Instances": []}', "task file needs"),
        (b"PAR1" + bytes(64), "parquet"),
    ],
)
def test_files_that_are_no_dataset(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=said) as caught:
        read_dataset(path)
    assert str(caught.value).startswith(str(path))


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(DatasetError, match="cannot be read"):
            read_dataset(path)


def examples(n: int, n_prompts: int | None = None) -> list[Example]:
    return [Example(user(f"p{i % (n_prompts or n)}"), "c", ("c",), i + 1) for i in range(n)]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (24, (12, 6, 6)),
        (27, (15, 6, 6)),
        (100, (50, 25, 25)),
        (23, (16, 7, 0)),
        (6, (4, 2, 0)),
        (2, (1, 1, 0)),
    ],
)
def test_split_sizes(n: int, sizes: tuple[int, int, int]) -> None:
    split = split_examples(examples(n), seed=3)
    parts = (split.support, split.selection, split.untouched)
    assert tuple(map(len, parts)) == sizes
    assert split.optimistic == (n < 24)
    assert sorted(e.line for part in parts for e in part) == list(range(1, n + 1))
    assert all([e.line for e in part] == sorted(e.line for e in part) for part in parts)


def test_split_depends_on_the_seed_alone() -> None:
    same = [split_examples(examples(40), seed=1) for _ in range(2)]
    assert same[0] == same[1] != split_examples(examples(40), seed=2)


@pytest.mark.parametrize("n_prompts", [2, 3, 5, 30])
def test_one_prompt_stays_in_one_part(n_prompts: int) -> None:
    split = split_examples(examples(60, n_prompts), seed=0)
    parts = [{e.prompt for e in p} for p in (split.support, split.selection, split.untouched)]
    assert sum(map(len, parts)) == n_prompts
    assert split.optimistic == (n_prompts == 2)
    assert all(parts) or split.optimistic


def test_split_needs_two_prompts() -> None:
    for n in (0, 30):
        with pytest.raises(DatasetError, match="different prompt"):
            split_examples(examples(n, 1))


@pytest.mark.parametrize("name", ["support-tickets", "follows", "returns"])
def test_the_example_datasets_are_sound(name: str) -> None:
    folder = Path(__file__).parent.parent / "examples" / name
    train, heldout = (read_dataset(folder / f"{part}.jsonl") for part in ("train", "heldout"))
    assert (len(train.examples), len(heldout.examples)) == (40, 40)
    assert train.warnings == heldout.warnings == ()
    both = (*train.examples, *heldout.examples)
    assert len({e.prompt for e in both}) == 80
    assert len({e.prompt.partition("\n\n")[0] for e in both}) == 1
    answers = [{e.completion for e in part.examples} for part in (train, heldout)]
    assert answers[0] == answers[1] if name != "returns" else answers[0].isdisjoint(answers[1])
