"""What is done with each kind of file: what commands do with it, native code included.

A target raises EdgeLoRAError for a file that it refuses. Anything else that it raises is a bug.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from edgelora.adapters.base import Base, read_base
from edgelora.adapters.gguf_lora import check, find_nonfinite, open_lora
from edgelora.adapters.merge import merge_adapters
from edgelora.adapters.peft import convert_source, read_adapter, write_peft
from edgelora.adapters.recipe import read_recipe
from edgelora.bank import open_bank, records, seal
from edgelora.bank.adding import add_many
from edgelora.bank.requests import make_requests
from edgelora.bank.sharing import import_signatures, read_signatures
from edgelora.bank.verify import verify
from edgelora.cli.main import main
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Example, Message
from edgelora.embedding_cache import open_cache
from edgelora.engine import amx
from edgelora.engine.context import Context, Row, open_context
from edgelora.engine.model import Model, ModelOptions, WeightedAdapter, open_model
from edgelora.engine.prepare import model_template, tokenise_examples
from edgelora.engine.score import score
from edgelora.engine.vocabulary import open_vocabulary
from edgelora.errors import EdgeLoRAError
from edgelora.gradient import checkpoint
from edgelora.gradient.decoder import open_decoder
from edgelora.hub import repository
from edgelora.local_bases import ollama_models
from edgelora.operators.distances import DISTANCES, measure
from edgelora.operators.neural import load_heads
from edgelora.pull.lots_of_loras import read_rows
from edgelora.signature import Signature, from_bytes

ONE_THREAD = ModelOptions(n_threads=1)
_EXAMPLE = Example((Message("user", "is it with them?"),), "yes", (), 1)


@dataclass(frozen=True)
class World:
    """Sound things that changed ones are brought together with."""

    base: Base
    model: Model
    context: Context
    bank: Path
    lora: Path
    signature: Signature


Target = Callable[[Path, World], None]


@contextlib.contextmanager
def open_world(folder: Path) -> Iterator[World]:
    """Of the folder that seeds.make_seeds has filled."""
    path = folder / "world" / "base.gguf"
    signature = next((folder / "signature" / "real0").iterdir()).read_bytes()
    with open_model(path, ONE_THREAD) as model, open_context(model) as context:
        yield World(
            read_base(path), model, context, folder / "world" / "bank",
            folder / "lora" / "plain" / "adapter.gguf", from_bytes(signature),
        )  # fmt: skip


def _base(folder: Path, world: World) -> None:
    path = folder / "base.gguf"
    read_base(path)
    _run("export", world.lora, "--base", path, "--to", "llama-server", "-o", folder / "x")
    with open_model(path, ONE_THREAD) as model:
        model.vocabulary.decode(range(model.vocabulary.n_tokens))
        (example,) = tokenise_examples(model, model_template(model, "{prompt}"), [_EXAMPLE])
        with open_context(model) as context:
            score(context, [example])
        with open_context(model, hidden=True) as context:
            context.hidden([Row(token, i, 0, True) for i, token in enumerate(example.prompt)])
        with contextlib.suppress(EdgeLoRAError):
            tokenise_examples(model, model_template(model), [_EXAMPLE])
        open_decoder(path).losses([example], {})


def _lora(folder: Path, world: World) -> None:
    path = folder / "adapter.gguf"
    lora = open_lora(path)
    find_nonfinite(lora)
    _run("show", path)
    for read in (
        lambda: read_recipe(lora),
        lambda: records.read_record(path),
        lambda: seal.is_intact(path),
        lambda: merge_adapters([path, world.lora], [0.5, 0.5], folder / "merged.gguf"),
        lambda: None if check(lora, world.base) else write_peft(lora, world.base, folder / "peft"),
    ):
        with contextlib.suppress(EdgeLoRAError):
            read()
    try:
        world.context.apply([WeightedAdapter(path)])
        world.context.decode([Row(5, 0, 0, True)])
    finally:
        world.context.apply([])
        world.model.unload(path)


def _peft(folder: Path, world: World) -> None:
    source = read_adapter(folder, world.base)
    convert_source(source, world.base, folder / "out.gguf")
    assert not check(open_lora(folder / "out.gguf"), world.base)


def _dataset(folder: Path, world: World) -> None:
    (path,) = folder.iterdir()
    with contextlib.suppress(EdgeLoRAError):
        if path.suffix == ".parquet":
            read_rows(path)
    examples = read_dataset(path).examples[:4]
    tokenise_examples(world.model, model_template(world.model), examples)


def _signature(folder: Path, world: World) -> None:
    found = from_bytes((folder / "s.safetensors").read_bytes())
    # Of points that are far apart POT says so rightly.
    warnings.filterwarnings("ignore", "Sinkhorn did not converge")
    for distance in DISTANCES:
        for target, other in ((found, world.signature), (world.signature, found)):
            with contextlib.suppress(EdgeLoRAError):
                measure(distance, target, [other])


def _sharing(folder: Path, world: World) -> None:
    shared = read_signatures(folder / "shared.safetensors")
    shutil.copytree(world.bank, folder / "bank")
    import_signatures(open_bank(folder / "bank"), shared, by_name=True, force=True)
    assert not verify(open_bank(folder / "bank"))


def _bank(folder: Path, world: World) -> None:
    path = folder / "bank"
    for command in ("ls", "verify"):
        _run("bank", command, "--bank", path)
    bank = open_bank(path)
    for record in bank.listing().records:
        with contextlib.suppress(EdgeLoRAError):
            bank.open(record.name, world.base)
            bank.signature(record.name, record.base_id)
    bank.reindex()
    bank.records()


def _card(folder: Path, world: World) -> None:
    requests, refused = make_requests([folder], card_glob="{folder}/card.json")
    bank = open_bank(folder / "bank", create=True)
    outcomes = refused + add_many(bank, world.base, requests, embed=lambda what: world.signature)
    assert not verify(bank)
    for outcome in outcomes:
        if outcome.reason:
            raise EdgeLoRAError(outcome.reason)


def _vocabulary(folder: Path, world: World) -> None:
    with open_vocabulary(folder / "base.gguf") as vocabulary:
        vocabulary.tokenize("is it with them? \u00e9")
        assert vocabulary.control_ids is not None


def _state(folder: Path, world: World) -> None:
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    match path.name:
        case "c.safetensors":
            checkpoint.from_bytes(path.read_bytes())
        case "h.safetensors":
            load_heads(path.read_bytes())
        case "amx.json":
            amx._cached(path, [["/x", 1, 2]])
        case "latest.json":
            os.environ["OLLAMA_MODELS"] = str(folder)
            list(ollama_models())
        case "listing.json":
            with contextlib.suppress(ValueError, RecursionError):  # as read_repository does
                repository._checked("org/name", repository.MODEL, json.loads(path.read_bytes()))
        case "embeddings.sqlite":
            _cache(folder)


def _cache(folder: Path) -> None:
    with open_cache(folder, timeout_s=0.1) as cache:
        cache.get("m", [[1, 2], [3]])
        cache.put("m", [[9]], np.ones((1, 8), np.float32))
        cache.entries()
        cache.clear()


def _run(*words: object) -> None:
    """A command as a person types it, which may fail but not raise."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


TARGETS: Mapping[str, Target] = {
    "base": _base, "lora": _lora, "peft": _peft, "dataset": _dataset, "signature": _signature,
    "sharing": _sharing, "bank": _bank, "card": _card, "vocabulary": _vocabulary, "state": _state,
}  # fmt: skip
