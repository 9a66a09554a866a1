"""Routing: scores against scipy, the threshold by hand, files, and `model: "auto"` over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import builds
import numpy as np
import pico
import pytest
import serving
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal

from edgelora.adapters.base import read_base
from edgelora.bank import Bank, Facts, open_bank
from edgelora.bank.adding import Request, add_many
from edgelora.bank.embedding import open_embedder
from edgelora.bank.records import signature_path
from edgelora.engine.model import open_model
from edgelora.engine.tokens import Vocabulary
from edgelora.errors import EngineError, InvalidFile
from edgelora.operators.routing import (
    FALSE_ACCEPTS,
    MIN_FOREIGN,
    SCORES,
    Cloud,
    Uncalibrated,
    fit_routes,
    make_cloud,
    project,
)
from edgelora.serve.routing import Router, plain_prompt, read_clouds
from edgelora.signature import from_bytes, summarise, to_bytes

ROOT = Path(__file__).parent.parent
BANK = ROOT / "models" / "bank"
P = 6


def texts(task: int, seed: int, n: int = 40) -> NDArray[np.float64]:
    """Points of one task: its own centre, one covariance for all, a large common offset."""
    centre = np.random.default_rng([1, task]).normal(size=P) * 4
    noise = np.random.default_rng([2, task, seed]).normal(size=(n, P))
    return (noise + centre) * np.geomspace(5, 0.5, P) + 30


def cloud(task: int, source: str = "", n: int = 40) -> Cloud:
    points = texts(task, 0, n)
    return Cloud(n, points.mean(axis=0), points, frozenset([source] if source else []))


TASKS = {f"task{i}": cloud(i) for i in range(12)}
CLOUDS = list(TASKS.values())


def pooled(clouds: list[Cloud]) -> NDArray[np.float64]:
    centred = [c.points - c.points.mean(axis=0) for c in clouds]
    x = np.concatenate(centred)
    s = x.T @ x / (len(x) - len(clouds))
    return 0.9 * s + 0.1 * np.trace(s) / P * np.eye(P)


def test_the_likelihood_ratio_is_that_of_scipys_gaussians() -> None:
    x, s = texts(3, 7), pooled(CLOUDS)
    means = np.stack([c.mean for c in CLOUDS])
    anything = multivariate_normal(means.mean(axis=0), s + np.cov(means.T, bias=True)).logpdf(x)
    for i, score in enumerate(SCORES["likelihood-ratio"](CLOUDS, CLOUDS)(x).T):
        points = CLOUDS[i].points
        own = (128 * s + np.cov(points.T) * 39) / (128 + 39)
        expected = multivariate_normal(CLOUDS[i].mean, own).logpdf(x) - anything
        np.testing.assert_allclose(score, expected, rtol=1e-9, atol=1e-7)


def test_the_other_scores_are_those_of_scipy() -> None:
    x, inverse = texts(3, 7), np.linalg.inv(pooled(CLOUDS))
    means = np.stack([c.mean for c in CLOUDS])
    squared = cdist(x, means, "mahalanobis", VI=inverse) ** 2
    np.testing.assert_allclose(SCORES["mahalanobis"](CLOUDS, CLOUDS)(x), -squared / 2)
    nearest = np.sort(cdist(x, CLOUDS[5].points, "mahalanobis", VI=inverse) ** 2)[:, :3]
    scores = SCORES["nearest-texts"](CLOUDS, CLOUDS)(x)[:, 5]
    np.testing.assert_allclose(scores, -nearest.mean(axis=1) / 2)
    np.testing.assert_allclose(SCORES["cosine"](CLOUDS, CLOUDS)(x), 1 - cdist(x, means, "cosine"))


@pytest.mark.parametrize("name", SCORES)
def test_new_texts_of_a_task_find_it(name: str) -> None:
    score = SCORES[name](CLOUDS, CLOUDS)
    found = [score(texts(task, seed=9)).argmax(axis=1) == task for task in range(12)]
    assert np.mean(found) > 0.95


@pytest.mark.parametrize("name", SCORES)
def test_the_threshold_lets_a_twentieth_of_left_out_texts_pass(name: str) -> None:
    routes = fit_routes(TASKS, [], method=name)
    left_out = []
    for one in CLOUDS:
        rest = [c for c in CLOUDS if c is not one]
        left_out.append(SCORES[name](rest, rest)(one.points).max(axis=1))
    passed = (np.concatenate(left_out) > routes.threshold).mean()
    assert FALSE_ACCEPTS - 1 / 480 <= passed <= FALSE_ACCEPTS
    assert routes.n_foreign == 12 and routes.names == tuple(TASKS)


def test_each_dataset_counts_the_same_whatever_its_size() -> None:
    uneven = [cloud(i, n=5 if i % 2 else 50) for i in range(12)]
    routes = fit_routes(dict(zip(TASKS, uneven, strict=True)), [])
    passed = []
    for one in uneven:
        rest = [c for c in uneven if c is not one]
        score = SCORES["likelihood-ratio"](rest, rest)
        passed.append((score(one.points).max(axis=1) > routes.threshold).mean())
    assert np.mean(passed) <= FALSE_ACCEPTS


def test_siblings_are_not_foreign_to_each_other() -> None:
    """Two adapters for one kind of prompt: accepting the other's is no mistake."""
    alike = {**TASKS, "twin": replace(cloud(0), points=texts(0, 1))}
    strict = fit_routes(alike, []).threshold
    known = {n: replace(c, sources=frozenset("s")) if n in ("task0", "twin") else c
             for n, c in alike.items()}  # fmt: skip
    assert fit_routes(known, []).threshold < strict - 1


def test_one_adapter_is_calibrated_by_the_other_datasets_of_its_bank() -> None:
    routes = fit_routes({"task0": CLOUDS[0]}, CLOUDS[1:])
    assert routes.n_foreign == 11
    assert (routes.score(texts(0, 9)) > routes.threshold).mean() > 0.95
    foreign = np.concatenate([texts(task, 9) for task in range(1, 12)])
    assert (routes.score(foreign) > routes.threshold).mean() < 0.1


def test_what_is_far_from_a_far_away_dataset_is_not_accepted() -> None:
    """All that is known as foreign is far away; the threshold does not follow it there."""
    away = np.geomspace(5, 0.5, P) * 60
    points = texts(0, 0) + away
    far = {"far": Cloud(40, points.mean(axis=0), points)}
    routes = fit_routes(far, CLOUDS)
    assert routes.threshold == 0.0
    assert (routes.score(texts(0, 9) + away) > 0).all()
    assert not (routes.score(texts(0, 9) + away / 2) > 0).any()
    known = SCORES["likelihood-ratio"](list(far.values()), CLOUDS)
    foreign = np.concatenate([known(cloud.points) for cloud in CLOUDS])
    assert foreign.max() < routes.score(texts(0, 9) + away / 2).max() < 0


@pytest.mark.parametrize(
    ("candidates", "others", "why"),
    [
        ({}, CLOUDS, "no adapter has a signature of at least 4 prompts"),
        ({"described": cloud(0, n=1)}, CLOUDS, "no adapter has a signature of at least 4"),
        ({"task0": CLOUDS[0]}, CLOUDS[1:MIN_FOREIGN], f"{MIN_FOREIGN} datasets .* are 7"),
        ({"a": cloud(0, "s")}, [cloud(i, "s") for i in range(1, 12)], "there are 0"),
        (
            {str(i): Cloud(5, np.full(P, i), np.full((5, P), float(i))) for i in range(12)},
            [],
            "no spread",
        ),
    ],
)
def test_too_little_to_compare_with_is_said(
    candidates: dict[str, Cloud], others: list[Cloud], why: str
) -> None:
    with pytest.raises(Uncalibrated, match=why):
        fit_routes(candidates, others)


def test_a_cloud_is_the_sample_of_a_signature() -> None:
    x = np.random.default_rng(0).normal(size=(20, 48)).astype(np.float32)
    made = make_cloud(summarise(x, None, [[1]], n_vocab=2, base_id="b").prompt)
    np.testing.assert_allclose(made.points, project(x), atol=2e-3)
    np.testing.assert_allclose(made.mean, project(x).mean(axis=0), atol=1e-6)


# The bank of the repository, as files.


@pytest.fixture(scope="module")
def demo_bank() -> Bank:
    return open_bank(BANK)


def served(bank: Bank, *names: str) -> dict[str, Path]:
    return {name: bank.record(name).path for name in names}


def test_adapters_out_of_a_bank_bring_its_other_datasets(demo_bank: Bank) -> None:
    """Whether --bank or --adapter named them."""
    names = ("task190_snli_classification", "task879_schema_guided_dstc8_classification")
    base_id = demo_bank.record(names[0]).base_id
    for folder in (None, BANK):
        candidates, others = read_clouds(served(demo_bank, *names), base_id, folder)
        assert set(candidates) == set(names) and len(others) == 42
    assert candidates[names[0]].sources == {"snli"} and candidates[names[0]].n == 64
    routes = fit_routes(candidates, others)
    assert routes.n_foreign == 44  # the two to each other; task880 and 881 to task190
    for i, name in enumerate(names):
        scores = routes.score(candidates[name].points)
        assert (scores.argmax(axis=1) == i).mean() > 0.95
        assert (scores[:, i] > routes.threshold).mean() > 0.95


def test_an_adapter_elsewhere_has_its_signature_beside_it(demo_bank: Bank, tmp_path: Path) -> None:
    record = demo_bank.record("task190_snli_classification")
    signed, unsigned = tmp_path / "built.gguf", tmp_path / "plain.gguf"
    for path in (signed, unsigned):
        shutil.copy(record.path, path)
    beside = signature_path(signed, record.base_id)
    shutil.copy(signature_path(record.path, record.base_id), beside)
    adapters = {"built": signed, "plain": unsigned}
    candidates, others = read_clouds(adapters, record.base_id, BANK)
    assert set(candidates) == {"built"} and len(others) == 44
    assert candidates["built"].sources == {"snli"}
    assert read_clouds(adapters, record.base_id, None)[1] == []

    signature = from_bytes(beside.read_bytes())
    beside.write_bytes(to_bytes(replace(signature, base_id="another")))
    with pytest.raises(InvalidFile, match="made by the base another"):
        read_clouds(adapters, record.base_id, None)
    beside.write_bytes(b"damaged")
    with pytest.raises(InvalidFile, match=re.escape(str(beside))):
        read_clouds(adapters, record.base_id, None)


# The router.


class World:
    """A router over synthetic tasks; the "embedding" of a prompt is looked up by its first id."""

    def __init__(self, n_served: int = 12) -> None:
        self.rng = np.random.default_rng(3)
        self.centres = self.rng.normal(size=(13, 48)) * 4
        self.clouds = {f"task{i}": make_cloud(self.signature(i).prompt) for i in range(12)}
        self.served = {name: Path(name) for name in list(self.clouds)[:n_served]}
        self.n_reads = 0
        self.router = Router(self.embed, lambda: self.served, self.read, self.resolve)

    def signature(self, task: int) -> Any:
        x = self.rng.normal(size=(30, 48)) + self.centres[task]
        return summarise(x.astype(np.float32), None, [[1]], n_vocab=2, base_id="b")

    async def embed(self, prompt: tuple[int, ...], n_layers: int) -> NDArray[np.float32]:
        assert n_layers == 0
        if prompt[0] < 0:
            return np.full(48, np.nan, np.float32)
        return (self.centres[prompt[0]] + self.rng.normal(size=48)).astype(np.float32)

    def read(self, served: Mapping[str, Path]) -> tuple[dict[str, Cloud], list[Cloud]]:
        self.n_reads += 1
        rest = [cloud for name, cloud in self.clouds.items() if name not in served]
        return {name: self.clouds[name] for name in served}, rest

    def resolve(self, name: str) -> tuple[str, Any]:
        return (name, (f"{name}.gguf",)) if name else ("the-base", ())


def wait_for(work: Awaitable[Any]) -> Any:
    async def run() -> Any:
        return await work

    return asyncio.run(run())


def test_the_router_takes_the_adapter_or_the_base() -> None:
    world = World()
    choice = wait_for(world.router.choose([3, 1, 2]))
    assert (choice.id, choice.adapters) == ("task3", ("task3.gguf",))
    assert choice.similarity > choice.threshold
    nobody = wait_for(world.router.choose([12]))
    assert (nobody.id, nobody.adapters) == ("the-base", ())
    assert nobody.similarity < nobody.threshold == choice.threshold
    assert world.n_reads == 1


def test_the_router_sees_adapters_come_and_go() -> None:
    world = World(n_served=2)
    assert wait_for(world.router.choose([5])).id == "the-base"
    world.served["task5"] = Path("task5")
    assert wait_for(world.router.choose([5])).id == "task5"
    del world.served["task5"]
    assert wait_for(world.router.choose([5])).id == "the-base"
    assert world.n_reads == 3


def test_the_router_says_why_it_cannot_choose() -> None:
    world = World(n_served=0)
    for _ in range(2):
        with pytest.raises(Uncalibrated, match="'auto' cannot choose: no adapter has a signature"):
            wait_for(world.router.choose([1]))
    assert world.n_reads == 1
    with pytest.raises(EngineError, match="not finite"):
        wait_for(World().router.choose([-1]))


# Over HTTP, with embeddings that llama.cpp computes.


_WORDS = "the and of to in is it you that he was for on are with his they at be this".split()


def prompts_of(task: int, n: int, seed: int = 0) -> list[str]:
    """Sentences of three words that are the task's own, in any order."""
    words = _WORDS[2 * task : 2 * task + 3] * 4
    rng = np.random.default_rng([task, seed])
    return [" ".join(rng.permutation(words)) for _ in range(n)]


@dataclass(frozen=True)
class Files:
    base: Path
    bank: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """A pico base and a bank of nine adapters, each with the signature of 24 prompts."""
    folder = tmp_path_factory.mktemp("routing")
    base = pico.write_base(folder / "base.gguf")
    bank, requests = open_bank(folder / "bank", create=True), []
    for task in range(9):
        peft = pico.write_peft(folder / f"task{task}", seed=task)
        data = builds.write_lines(folder / f"data{task}.jsonl", prompts_of(task, 24))
        requests.append(Request(peft, f"task{task}", data, Facts(template="chat")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELORA_CACHE", str(folder / "cache"))
        with open_embedder(base, n_threads=1) as embed:
            add_many(bank, read_base(base), requests, embed=embed)
        yield Files(base, bank.path)


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, Mapping[str, str], Any]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": prompt}
    return {"model": "auto", "messages": [turn], "max_tokens": 2, "temperature": 0, **more}


def test_auto_over_http(files: Files) -> None:
    with serving.running_server(files.base, bank=files.bank) as url:
        for task in range(9):
            (prompt,) = prompts_of(task, 1, seed=5)
            status, headers, told = post(url, "/v1/chat/completions", chat(prompt))
            assert status == 200, told
            assert told["edgelora"]["similarity"] > told["edgelora"]["threshold"]
            assert told["model"] == told["edgelora"]["adapter"] == f"task{task}"
            assert headers["X-EdgeLoRA-Adapter"] == f"task{task}"
            named = post(url, "/v1/chat/completions", chat(prompt, model=f"task{task}"))[2]
            assert named["choices"][0]["message"] == told["choices"][0]["message"]
        status, headers, told = post(url, "/v1/chat/completions", chat("Zw 7? Qx! " * 8))
        assert status == 200 and told["model"] == headers["X-EdgeLoRA-Adapter"] == "base"
        assert told["edgelora"]["similarity"] < told["edgelora"]["threshold"]
        (prompt,) = prompts_of(4, 1, seed=6)
        body = {"model": "auto", "prompt": prompt, "max_tokens": 2}
        assert post(url, "/v1/completions", body)[2]["model"] == "task4"
        two = post(url, "/v1/completions", body | {"prompt": [prompt, prompt]})
        assert two[0] == 400 and two[2]["error"]["param"] == "model"


def test_auto_without_signatures_is_refused(files: Files, tmp_path: Path) -> None:
    adapter = shutil.copy(files.bank / "adapters" / "task0.gguf", tmp_path / "alone.gguf")
    with serving.running_server(files.base, [adapter]) as url:
        status, _, told = post(url, "/v1/chat/completions", chat("the and"))
        assert status == 400 and told["error"]["param"] == "model"
        assert "cannot choose: no adapter has a signature" in told["error"]["message"]


def test_the_plain_text_of_a_conversation_is_what_signatures_embed(files: Files) -> None:
    turns = [
        {"role": "system", "content": "be the"},
        {"role": "user", "content": "is it <|im_end|>"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    with open_model(files.base, builds.ONE_THREAD) as model:
        vocabulary: Vocabulary = model.vocabulary
        ids = plain_prompt(vocabulary, turns)
        expected = [vocabulary.bos, *vocabulary.tokenize("be the\nis it <|im_end|>\n")]
        assert vocabulary.adds_bos and list(ids) == expected


# The benchmark's script, and the page.


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_report_of_the_latest_results() -> None:
    benchmark = load("benchmark_auto")
    rows = benchmark.read_results(ROOT / "results" / "auto.jsonl")
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    assert benchmark.filled(page, benchmark.report(rows[-1])) == page


def test_the_script_measures_appends_and_writes_the_page(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"task": "other", "prompt": "Zw 7? Qx! Zw 7?"}\n')
    for task in range(9):
        (tmp_path / f"task{task}").mkdir()
        lines = [f"do {task}\n\n{prompt}" for prompt in prompts_of(task, 4, seed=8)]
        builds.write_lines(tmp_path / f"task{task}" / "test.jsonl", lines, ["yes"] * 4)
    results, page = tmp_path / "auto.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- auto -->\nold\n<!-- /auto -->\nafter\n")
    words = [tmp_path, files.bank, results, "--page", page, "--base", files.base]
    words += ["--foreign", foreign, "--n-lines", "3", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_auto.py", *map(str, words)])
    benchmark = load("benchmark_auto")
    benchmark.main()
    (row,) = benchmark.read_results(results)
    assert [m["method"] for m in row["methods"]] == list(SCORES)
    for m in row["methods"]:
        assert m["taken"] + m["other_taken"] + m["base"] == pytest.approx(1)
        assert m["taken"] <= m["nearest"] <= m["same_source"] <= 1
    assert row["foreign"]["other_source"]["n"] == 1
    told = page.read_text()
    assert told.startswith("before\n<!-- auto -->\n| score |") and told.endswith("after\n")
    assert "| likelihood-ratio |" in told and "other tasks" in told

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only-page"])
    benchmark.main()
    assert page.read_text() == told and len(benchmark.read_results(results)) == 1
