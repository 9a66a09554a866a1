"""The bank that ships is whole, signed, licensed, and small enough."""

from pathlib import Path

from edgelora.bank import open_bank
from edgelora.bank.verify import verify
from edgelora.datasets.read import read_dataset

ROOT = Path(__file__).parent.parent
BANK = ROOT / "models" / "bank"
FREE = ("MIT", "Apache 2.0", "CC BY", "CC0", "BSD", "Public")


def test_every_adapter_is_sound_signed_and_free() -> None:
    bank = open_bank(BANK)
    records = bank.records()
    assert len(records) >= 32
    assert len({record.source for record in records}) >= 30
    for record in records:
        assert record.has_signature, record.name
        assert record.template == "chat"
        assert record.licence.startswith(FREE), record.licence
    assert verify(bank) == []


def test_it_takes_at_most_60_mb() -> None:
    files = [path for path in BANK.rglob("*") if path.is_file()]
    shipped = [path for path in files if not path.name.startswith(("index.sqlite", ".lock"))]
    assert sum(path.stat().st_size for path in shipped) <= 60_000_000


def test_the_card_names_every_adapter() -> None:
    card = (BANK / "README.md").read_text(encoding="utf-8")
    assert all(f"| {record.name} |" in card for record in open_bank(BANK).records())


def test_examples_have_forty_lines_to_build_and_forty_held_out() -> None:
    for folder in (path for path in (ROOT / "examples").iterdir() if path.is_dir()):
        parts = [read_dataset(folder / f"{part}.jsonl") for part in ("train", "heldout")]
        assert [len(part.examples) for part in parts] == [40, 40]
        prompts = [{example.prompt for example in part.examples} for part in parts]
        assert not prompts[0] & prompts[1]
