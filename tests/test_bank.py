"""The bank: files are the truth, the index is a cache, names and bases are checked."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pico
import pytest
from bank_worker import make_signature

from edgelora.adapters.base import Base, read_base
from edgelora.adapters.gguf_lora import open_lora
from edgelora.bank import Added, AlreadyThere, Bank, Facts, open_bank
from edgelora.bank.adding import ADDED, ALREADY_THERE, REFUSED, SIGNED, Request, add_many
from edgelora.bank.index import list_adapters
from edgelora.bank.names import check_name, derive_name
from edgelora.bank.seal import is_intact
from edgelora.bank.verify import verify
from edgelora.datasets.records import Dataset
from edgelora.engine.quantize import quantize
from edgelora.errors import (
    AlreadyExists,
    BankError,
    EngineError,
    IncompatibleAdapter,
    InvalidFile,
    NotFound,
    UnsupportedFile,
)
from edgelora.signature import Signature


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return read_base(pico.write_base(tmp_path_factory.mktemp("base") / "pico.gguf"))


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return open_bank(tmp_path / "bank", create=True)


def write_data(path: Path, n: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"is {i} odd?", "completion": "yes"}) for i in range(n)]
    path.write_text("\n".join(lines))
    return path


def test_an_adapter_is_added_listed_and_opened(tmp_path: Path, bank: Bank, base: Base) -> None:
    folder = pico.write_peft(tmp_path / "snli" / "adapter", rank=4)
    facts = Facts(template="chat", source="snli", licence="CC BY-SA 4.0", description="entailment")
    added = bank.add(folder, base, facts=facts)
    assert isinstance(added, Added)
    (record,) = bank.records()
    assert record == added.record
    assert (record.name, record.template, record.source) == ("snli", "chat", "snli")
    assert (record.licence, record.description) == ("CC BY-SA 4.0", "entailment")
    assert (record.ranks, record.n_tensors, record.dtype) == ((4, 4), 6, "f16")
    assert record.base == base.identity and record.base_id == base.identity.id
    assert record.size_bytes == record.path.stat().st_size
    assert record.created_by.startswith("edgelora ") and len(record.source_sha256) == 64
    assert is_intact(record.path) and not record.has_signature
    assert bank.open("snli", base).names == open_lora(bank.folder / "snli.gguf").names
    assert sorted(p.name for p in bank.path.iterdir()) == [
        ".lock", "adapters", "bank.json", "index.sqlite",
    ]  # fmt: skip


def test_the_same_bytes_again_change_nothing(tmp_path: Path, bank: Bank, base: Base) -> None:
    folder = pico.write_peft(tmp_path / "one")
    bank.add(folder, base)
    before = {p: p.stat().st_mtime_ns for p in bank.folder.iterdir()}
    again = bank.add(folder, base)
    assert isinstance(again, AlreadyThere) and again.kept == ()
    copy = shutil.copytree(folder, tmp_path / "two")
    renamed = bank.add(copy, base, name="other", facts=Facts(licence="MIT"), dtype="f32")
    assert isinstance(renamed, AlreadyThere) and renamed.record.name == "one"
    assert renamed.kept == (
        "name stays 'one', not 'other'", "dtype stays 'f16', not 'f32'",
        "licence stays '', not 'MIT'",
    )  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in bank.folder.iterdir()} == before


def test_a_name_belongs_to_one_adapter_whatever_its_case(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    bank.add(pico.write_peft(tmp_path / "one", seed=1), base)
    other = pico.write_peft(tmp_path / "two", seed=2)
    for name in ("one", "ONE"):
        with pytest.raises(AlreadyExists, match="made from other bytes"):
            bank.add(other, base, name=name)
    assert [record.name for record in bank.records()] == ["one"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/bank/task190_snli/adapter", "task190_snli"),
        ("/bank/Adapter/adapters", "Adapter"),
        ("/x/my lora (v2)!", "my-lora-v2"),
        ("/x/checkpoint-75", "checkpoint-75"),
        ("/x/.hidden", "hidden"),
        ("/x/NUL.tar", "NUL_.tar"),
        ("/x/con", "con_"),
        ("/x/..é", "adapter"),
        ("/x/" + "a" * 200, "a" * 100),
    ],
)
def test_names_come_from_folders_and_are_safe(folder: str, name: str) -> None:
    assert derive_name(Path(folder)) == name
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "a\\b", "-rf", ".x", "x.", "COM1", "nul.x", "é", "a b",
             "x" * 101, "a\n"],
)  # fmt: skip
def test_names_that_some_system_cannot_store_are_refused(name: str) -> None:
    with pytest.raises(BankError, match="cannot name an adapter"):
        check_name(name)


def test_adapters_of_several_bases_share_a_bank(tmp_path: Path, bank: Bank, base: Base) -> None:
    tuned = read_base(pico.write_base(tmp_path / "tuned.gguf", norm_seed=7))
    folder = pico.write_peft(tmp_path / "one")
    bank.add(folder, base, name="first")
    bank.add(folder, tuned, name="second")
    assert {r.name: r.base_id for r in bank.records()} == {
        "first": base.identity.id, "second": tuned.identity.id,
    }  # fmt: skip
    bank.open("second", tuned)
    with pytest.raises(IncompatibleAdapter) as caught:
        bank.open("second", base)
    assert base.identity.describe() in str(caught.value)
    assert tuned.identity.describe() in str(caught.value)


def test_the_identity_is_equal_across_quantisations(tmp_path: Path) -> None:
    dims = pico.Dims(n_embd=64, n_head=4, n_head_kv=2, head_dim=16)
    path = pico.write_base(tmp_path / "base.gguf", dims=dims)
    identity = read_base(path).identity
    for kind in ("q8_0", "q4_0"):
        quantize(path, tmp_path / f"{kind}.gguf", kind, n_threads=1)
        assert read_base(tmp_path / f"{kind}.gguf").identity == identity
    tuned = read_base(pico.write_base(tmp_path / "tuned.gguf", dims=dims, norm_seed=7)).identity
    assert tuned.id != identity.id and tuned.norms != identity.norms
    assert (tuned.shapes, tuned.tokenizer) == (identity.shapes, identity.tokenizer)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, bank: Bank, base: Base) -> None:
    folder = pico.write_peft(tmp_path / "wide", dims=pico.Dims(n_embd=64, head_dim=16))
    with pytest.raises(IncompatibleAdapter):
        bank.add(folder, base)
    with pytest.raises(NotFound):
        bank.add(tmp_path / "absent", base)
    with pytest.raises(UnsupportedFile, match="q8_0"):
        bank.add(pico.write_peft(tmp_path / "one"), base, dtype="q8_0")
    assert list(bank.folder.iterdir()) == []


def test_signatures_are_kept_beside_their_adapter(tmp_path: Path, bank: Bank, base: Base) -> None:
    bank.add(pico.write_peft(tmp_path / "one.v2"), base)
    base_id = base.identity.id
    with pytest.raises(NotFound, match="no signature"):
        bank.signature("one.v2", base_id)
    with pytest.raises(NotFound, match="no such adapter"):
        bank.set_signature("one", make_signature(base_id))
    bank.set_signature("one.v2", make_signature(base_id))
    bank.set_signature("one.v2", make_signature("0123456789ab"))
    record = bank.record("one.v2")
    assert record.has_signature and set(record.signatures) == {base_id, "0123456789ab"}
    read = bank.signature("one.v2", base_id)
    assert np.array_equal(read.prompt.mean, make_signature(base_id).prompt.mean)
    assert verify(bank) == []


def test_remove_takes_the_signatures_and_nothing_else(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    for i, name in enumerate(("one", "one.x")):
        bank.add(pico.write_peft(tmp_path / name, seed=i), base)
        bank.set_signature(name, make_signature(base.identity.id))
    bank.remove("one")
    assert {p.name for p in bank.folder.iterdir()} == {
        "one.x.gguf", f"one.x.{base.identity.id}.signature.safetensors",
    }  # fmt: skip
    with pytest.raises(NotFound, match=r"Did you mean one\.x"):
        bank.remove("one")
    with pytest.raises(NotFound):
        bank.remove("../bank")


def test_a_stale_signature_is_never_given_to_another_adapter(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    bank.add(pico.write_peft(tmp_path / "one", seed=1), base)
    bank.set_signature("one", make_signature(base.identity.id))
    (bank.folder / "one.gguf").unlink()  # by hand
    assert verify(bank) == [
        f"one.{base.identity.id}.signature.safetensors: a signature without its adapter"
    ]
    bank.add(pico.write_peft(tmp_path / "two", seed=2), base, name="one")
    assert not bank.record("one").has_signature and verify(bank) == []


def test_export_gives_the_factors_back(tmp_path: Path, bank: Bank, base: Base) -> None:
    from safetensors.numpy import load_file

    folder = pico.write_peft(tmp_path / "one")
    bank.add(folder, base, dtype="f32")
    bank.export("one", tmp_path / "out", base)
    original = load_file(folder / "adapter_model.safetensors")
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert original.keys() == exported.keys()
    assert all(np.array_equal(original[key], exported[key]) for key in original)
    assert isinstance(bank.add(tmp_path / "out", base, name="again"), Added)
    with pytest.raises(AlreadyExists):
        bank.export("one", tmp_path / "out", base)


# --- the index is a cache -----------------------------------------------------------------------


def copies(bank: Bank, base: Base, tmp_path: Path, n: int) -> None:
    """A bank of n files: one adapter, copied by hand."""
    bank.add(pico.write_peft(tmp_path / "one"), base, name="adapter-0")
    for i in range(1, n):
        shutil.copy(bank.folder / "adapter-0.gguf", bank.folder / f"adapter-{i}.gguf")


def test_500_adapters_are_listed_without_opening_one(
    tmp_path: Path, bank: Bank, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(bank, base, tmp_path, 500)
    first = bank.records()
    assert len(first) == 500

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr("edgelora.bank.index.read_record", refuse)
    assert bank.records() == first


@pytest.mark.parametrize(
    "damage", ["delete", "garbage", "empty", "truncate", "version", "rows", "types"]
)
def test_a_lost_or_damaged_index_changes_no_listing(
    damage: str, tmp_path: Path, bank: Bank, base: Base
) -> None:
    copies(bank, base, tmp_path, 3)
    before = bank.records()
    index = bank.path / "index.sqlite"
    if damage == "delete":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "truncate":
        index.write_bytes(index.read_bytes()[:4096])
    else:
        database = sqlite3.connect(index)
        with database:
            database.execute({
                "version": "PRAGMA user_version = 99",
                "rows": "UPDATE adapter SET record = '[1]'",
                "types": "UPDATE adapter SET record = json_set(record, '$.licence', 7)",
            }[damage])  # fmt: skip
        database.close()
    assert bank.records() == before
    assert bank.listing().warnings == () and index.exists()
    assert bank.records() == before


def test_changed_and_removed_files_are_noticed(tmp_path: Path, bank: Bank, base: Base) -> None:
    copies(bank, base, tmp_path, 3)
    assert len(bank.records()) == 3
    (bank.folder / "adapter-1.gguf").unlink()
    other = bank.add(pico.write_peft(tmp_path / "two", seed=5, rank=2), base, name="two")
    shutil.copy(other.record.path, bank.folder / "adapter-2.gguf")
    assert [(r.name, r.ranks) for r in bank.records()] == [
        ("adapter-0", (4, 4)), ("adapter-2", (2, 2)), ("two", (2, 2)),
    ]  # fmt: skip
    assert len(bank.reindex().records) == 3


def test_an_index_that_cannot_be_written_is_a_warning(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    copies(bank, base, tmp_path, 2)
    listing = list_adapters(bank.folder, tmp_path / "absent" / "index.sqlite")
    assert [record.name for record in listing.records] == ["adapter-0", "adapter-1"]
    assert len(listing.warnings) == 1 and "cannot be written" in listing.warnings[0]


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_adapter_is_named_and_can_be_removed(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    copies(bank, base, tmp_path, 2)
    path = bank.folder / "adapter-1.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BankError, match=r"adapter-1\.gguf"):
        bank.records()
    with pytest.raises(BankError, match=r"adapter-1\.gguf"):
        bank.record("adapter-1")
    assert [r.name for r in bank.listing().records] == ["adapter-0"]
    (problem,) = verify(bank)
    assert "adapter-1.gguf" in problem and "truncated" in problem
    with pytest.raises(AlreadyExists):
        bank.add(pico.write_peft(tmp_path / "two", seed=9), base, name="adapter-1")
    bank.remove("adapter-1")
    assert len(bank.records()) == 1


def test_verify_finds_every_problem(tmp_path: Path, bank: Bank, base: Base) -> None:
    for i, name in enumerate(("bits", "values", "renamed", "signature", "whole")):
        bank.add(pico.write_peft(tmp_path / name, seed=i), base)
        bank.set_signature(name, make_signature(base.identity.id))
    assert verify(bank, base) == []
    _flip_a_bit(bank.folder / "bits.gguf")
    _write_nan(bank.folder / "values.gguf")
    (bank.folder / "renamed.gguf").rename(bank.folder / "other.gguf")
    signature = bank.folder / f"signature.{base.identity.id}.signature.safetensors"
    signature.write_bytes(signature.read_bytes()[:-9])
    (bank.folder / ".edgelora-tmp-00-x.gguf").write_bytes(b"half")
    (bank.folder / "foreign.gguf").write_bytes(b"GGUF")
    problems = verify(bank, base)
    for file, what in {
        "bits.gguf": "content hash differs",
        "values.gguf": "NaN",
        "other.gguf": "renamed: it was added as renamed",
        "renamed.": "a signature without its adapter",
        "signature.gguf": "not a sound signature",
        ".edgelora-tmp-00-x.gguf": "killed",
        "foreign.gguf": "truncated",
    }.items():
        assert [p for p in problems if p.startswith(file) and what in p], (file, problems)
    assert not [p for p in problems if p.startswith("whole")]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


def _write_nan(path: Path) -> None:
    info = next(iter(open_lora(path).gguf.tensors.values()))
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)


def test_a_lora_from_elsewhere_is_not_taken_for_the_banks(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    pico.write_random_lora(bank.folder / "stranger.gguf", base.path)
    with pytest.raises(BankError, match=r"no edgelora\.base\.id"):
        bank.records()


def test_a_bank_is_opened_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not a bank"):
        open_bank(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(BankError, match=r"not empty \(holds cat\.jpg\)"):
        open_bank(tmp_path / "photos", create=True)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("# A bank")
    assert open_bank(tmp_path / "card", create=True).records() == []
    (tmp_path / "card" / "adapters").rmdir()
    with pytest.raises(BankError, match="missing"):
        open_bank(tmp_path / "card")
    assert open_bank(tmp_path / "card", create=True).records() == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BankError):
        open_bank(tmp_path / "file", create=True)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"format": "edgelora-bank", "version": 2}', "format 2; this EdgeLoRA reads format 1"),
        ('{"format": "photos", "version": 1}', "describes 'photos'"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("", "cannot be read"),
        ('{"format": "edgelora-bank"}', "cannot be read"),
    ],
)
def test_a_bank_of_another_format_is_refused(bank: Bank, text: str, what: str) -> None:
    (bank.path / "bank.json").write_text(text)
    with pytest.raises(BankError, match=what):
        open_bank(bank.path, create=True)


# --- many at once ---------------------------------------------------------------------------------


class FakeEmbed:
    """Signatures without an engine; counts its calls, and fails for one description."""

    def __init__(self, base: Base) -> None:
        self.base_id = base.identity.id
        self.calls: list[Dataset | str] = []

    def __call__(self, what: Dataset | str) -> Signature:
        self.calls.append(what)
        if what == "fail":
            raise EngineError("llama.cpp refused the batch")
        return make_signature(self.base_id, seed=len(self.calls))


def test_many_folders_go_on_past_bad_ones(tmp_path: Path, bank: Bank, base: Base) -> None:
    good = pico.write_peft(tmp_path / "good", seed=1)
    text = pico.write_peft(tmp_path / "text", seed=2)
    bare = pico.write_peft(tmp_path / "bare", seed=3)
    nan = pico.write_peft(tmp_path / "nan", seed=4, size=np.nan)
    no_data = pico.write_peft(tmp_path / "no_data", seed=5)
    failing = pico.write_peft(tmp_path / "failing", seed=6)
    data = write_data(tmp_path / "train.jsonl")
    requests = [
        Request(nan),
        Request(good, data=data),
        Request(text, facts=Facts(description="is it odd?")),
        Request(no_data, data=tmp_path / "absent.jsonl"),
        Request(bare),
        Request(failing, facts=Facts(description="fail")),
    ]
    embed = FakeEmbed(base)
    done: list[int] = []
    outcomes = add_many(bank, base, requests, embed=embed, progress=done.append)
    assert [o.status for o in outcomes] == [REFUSED, ADDED, ADDED, REFUSED, ADDED, REFUSED]
    assert [o.has_signature for o in outcomes] == [False, True, True, False, False, False]
    assert "NaN" in outcomes[0].reason and "absent.jsonl" in outcomes[3].reason
    assert outcomes[5].reason.startswith("failing is in the bank, its signature is not:")
    assert sum(done) == 6 and len(embed.calls) == 3
    assert [r.name for r in bank.records()] == ["bare", "failing", "good", "text"]
    assert verify(bank, base) == []

    again = add_many(bank, base, [*requests[1:3], Request(bare, data=data)], embed=embed)
    assert [o.status for o in again] == [ALREADY_THERE, ALREADY_THERE, SIGNED]
    assert len(embed.calls) == 4


def test_a_damaged_signature_is_an_error_with_its_file(
    tmp_path: Path, bank: Bank, base: Base
) -> None:
    bank.add(pico.write_peft(tmp_path / "one"), base)
    (bank.folder / f"one.{base.identity.id}.signature.safetensors").write_bytes(b"no")
    with pytest.raises(InvalidFile, match=r"one\..*\.signature\.safetensors"):
        bank.signature("one", base.identity.id)
