"""The serving benchmark: its prompts, clients and verdicts on pico models; the page it fills."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace

import pytest
from pico import write_base, write_random_lora
from test_scripts import load

from edgelora.engine.model import open_model

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from serve_benchmark import clients, facts, isolation, parallel, servers, single  # noqa: E402
from serve_benchmark.prompts import Prompt, PromptMaker  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> facts.Model:
    folder = tmp_path_factory.mktemp("pico")
    base = write_base(folder / "base.gguf")
    sources = tuple(
        write_random_lora(folder / f"lora-{seed}.gguf", base, seed=seed) for seed in range(4)
    )
    return facts.Model("pico", base, sources, sources[0], 4)


def run_of(model: facts.Model, folder: Path) -> facts.Run:
    peers = SimpleNamespace()
    return facts.Run(peers, (model,), folder, n_threads=1, rounds=1, quick=True)


@pytest.mark.parametrize("vocabulary", ["spm", "bpe"])
def test_prompts_have_the_size_asked_for_and_their_text_the_same_ids(
    tmp_path: Path, vocabulary: str
) -> None:
    with open_model(write_base(tmp_path / "base.gguf", vocabulary=vocabulary)) as opened:
        maker = PromptMaker(opened.vocabulary, seed=0)
        one, other = maker.prompts(2, 12)
        assert len(one) == len(other) == 12 and one.ids != other.ids
        assert maker.read(one.text) == one
        (longer,) = maker.prompts(1, 20, after=one)
        assert len(longer) == 20 and longer.ids[:12] == one.ids
        assert PromptMaker(opened.vocabulary, seed=0).prompts(2, 12) == [one, other]


@pytest.mark.slow
def test_a_request_to_our_server_is_read_whole_and_in_a_stream(
    model: facts.Model, tmp_path: Path
) -> None:
    run = run_of(model, tmp_path)
    setting = run.setting(model, n_slots=2, n_ctx=128)
    with run.maker(model, seed=0) as maker, servers.edgelora(setting, model.sources[:1]) as ours:
        prompts = maker.prompts(3, 8)
        adapters = ((model.sources[0].stem, 1.0),)
        whole = clients.ask_all(
            ours.port, ours.protocol, [clients.Ask(p, 5, adapters=adapters) for p in prompts]
        )
        asks = [clients.Ask(p, 5, True, adapters) for p in prompts]
        streamed = clients.ask_all(ours.port, ours.protocol, asks, n_clients=2)
        counted = clients.counters(ours.port)
    for one, other in zip(whole, streamed, strict=True):
        assert (one.n_prompt, one.n_generated) == (other.n_prompt, other.n_generated) == (8, 5)
        assert one.body["choices"][0]["text"] == other.body["text"]
        assert one.sent < other.sent < other.at[0] <= other.at[-1] <= other.done
    assert counted["llamacpp:tokens_predicted_total"] == 30
    assert counted["edgelora_host_seconds_total"] > 0


@pytest.mark.slow
def test_a_refused_request_ends_the_benchmark(model: facts.Model, tmp_path: Path) -> None:
    setting = run_of(model, tmp_path).setting(model, n_slots=1, n_ctx=16)
    with servers.edgelora(setting) as ours, pytest.raises(SystemExit, match="400"):
        clients.ask_once(ours.port, ours.protocol, clients.Ask(Prompt("", (5,) * 12), 12))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match="no-such-base"),
        servers.edgelora(servers.Setting(tmp_path / "no-such-base.gguf", 1)),
    ):
        pass


@pytest.mark.slow
def test_every_adapter_set_gets_its_own_answers(
    model: facts.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "N_PREFIX", 8)
    monkeypatch.setattr(isolation, "N_PROMPT", 16)
    row = isolation._model(run_of(model, tmp_path), model, "f32")
    assert row["n_requests"] == row["equal"] == 32
    assert row["worst"] <= 1e-3 < row["sets_apart"]
    assert row["targets"][0]["met"]


def answered(tokens: list[str], logprobs: list[float]) -> clients.Answer:
    told = {"tokens": tokens, "token_logprobs": logprobs}
    return clients.Answer(0.0, 1.0, [1.0], body={"choices": [{"logprobs": told}]})


def test_answers_are_compared_up_to_where_they_part() -> None:
    alone = {"texts": ["a", "b", "c"], "logprobs": [-1.0, -2.0, -3.0], "leads": [0.5, 4e-4, 0.2]}
    same = isolation.compare(answered(["a", "b", "c"], [-1.0, -2.0005, -3.0]), alone)
    assert same.worst == pytest.approx(5e-4) and same.lead is None and same.equal
    tie = isolation.compare(answered(["a", "x", "y"], [-1.0, -9.0, -9.0]), alone)
    assert tie.worst == 0 and tie.lead == 4e-4 and tie.equal
    assert not isolation.compare(answered(["x"], [-1.0]), alone).equal
    assert not isolation.compare(answered(["a"], [-1.002]), alone).equal


REPLIES = {
    "/completion": [
        {"content": " a", "stop": False},
        {"content": "", "stop": True, "tokens_evaluated": 8, "tokens_predicted": 2,
         "timings": {"cache_n": 3}},
    ],
    "/v1/completions": [{"choices": [{"text": " a"}]}, {"choices": [{"text": " b"}]}],
}  # fmt: skip


class Peer(BaseHTTPRequestHandler):
    """Answers as a peer does, and keeps what it was asked for."""

    asked: dict[str, object] = {}

    def do_POST(self) -> None:
        Peer.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        events = REPLIES[self.path]
        if Peer.asked["stream"]:
            data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n"
        else:
            usage = {"usage": {"prompt_tokens": 8, "completion_tokens": 2}}
            data = json.dumps({**events[-1], **usage})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def peer_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Peer) as server:
        Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("streamed", [False, True])
def test_peers_are_asked_for_the_same(peer_port: int, streamed: bool) -> None:
    ask = clients.Ask(Prompt("1 2", (1, 7, 8)), 2, streamed)
    answer = clients.ask_once(peer_port, clients.LlamaServer(), ask)
    assert Peer.asked["prompt"] == [1, 7, 8] and Peer.asked["n_predict"] == 2
    assert Peer.asked["ignore_eos"] is True and Peer.asked["cache_prompt"] is False
    assert (answer.n_prompt, answer.n_generated, answer.n_cached) == (8, 2, 3)
    answer = clients.ask_once(peer_port, clients.LlamaCppPython(2), ask)
    assert Peer.asked["prompt"] == "1 2" and Peer.asked["temperature"] == 0
    assert Peer.asked["logit_bias"] == {"2": -100}
    assert answer.n_generated == 2 and len(answer.at) == (2 if streamed else 1)


def test_short_or_cached_answers_are_not_measured() -> None:
    good = clients.Answer(0.0, 1.0, [1.0], n_prompt=128, n_cached=1, n_generated=64)
    parallel._check("x", [good], 64)
    for change in ({"n_generated": 63}, {"n_cached": 60}, {"n_prompt": 127}):
        with pytest.raises(SystemExit, match="x: "):
            parallel._check("x", [clients.Answer(**{**vars(good), **change})], 64)


def test_the_cost_of_adapters_is_what_each_round_adds() -> None:
    # 10 ms a token; 11 and 15 ms with adapters: the four cost five times as much as the one.
    speeds = {"": [100.0] * 3, "one": [1000 / 11] * 3, "four": [1000 / 15] * 3}
    row = single._costs(facts.Model("m", Path(), (), Path(), 4), speeds, [101.0, 100.0, 90.0])
    assert row["cost_ms"] == pytest.approx({"one": 1.0, "four": 5.0})
    decode, cost = row["targets"]
    assert decode["value"] == 1.0 and decode["met"]
    assert cost["value"] == pytest.approx(5.0) and cost["met"]


def report() -> ModuleType:
    return load("bench_report")


def test_the_page_is_what_the_results_say() -> None:
    module = report()
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.fill(page, module.read_results(module.RESULTS)) == page


ABOUT = {
    "when": "2026-01-01 00:00 UTC", "commit": "abc", "cpu": "a CPU", "n_threads": 2,
    "llama_cpp_python": "0.3.36", "rounds": 5,
}  # fmt: skip
PREFIX = ABOUT | {
    "part": "prefix", "model": "m", "n_prefix": 1000, "n_own": 8,
    "systems": [{"system": "edgelora", "ratio": 0.05,
                 "first_s": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 5},
                 "second_s": {"median": 0.1, "min": 0.1, "max": 0.1, "n": 5}}],
    "targets": [{"name": "x", "value": 0.05, "least": None, "most": 0.1, "met": True},
                {"name": "y", "value": 2.0, "least": 2.5, "most": None, "met": False},
                {"name": "z", "value": 7.0, "least": None, "most": None, "met": True}],
}  # fmt: skip


def test_the_newest_row_of_each_part_is_shown_with_its_columns(tmp_path: Path) -> None:
    module = report()
    results = tmp_path / "serve.jsonl"
    rows = [PREFIX | {"n_prefix": 7}, PREFIX | {"model": "other"}, PREFIX]
    lines = "\n".join(map(json.dumps, rows))
    results.write_text(lines + '\n{"part": "prefix", "mo', encoding="utf-8")
    page = "".join(f"<!-- {part} -->\n?\n<!-- /{part} -->\n" for part in module.SECTIONS)
    filled = module.fill(page, module.read_results(results))
    assert filled.count("**other**") == filled.count("**m**, 1000 tokens in common") == 1
    assert "| system | first | second | second / first |" in filled
    assert "| edgelora | 2.00 s (1.00 to 3.00) | 0.10 s (0.10 to 0.10) | 0.050 |" in filled
    assert "| x | 0.05 | at most 0.1 | met |" in filled
    assert "| y | 2 | at least 2.5 | **missed** |" in filled and "| z | 7 |  |  |" in filled
    assert filled.count(module.NOTHING) == len(module.SECTIONS) - 1
    with pytest.raises(SystemExit, match="0 places"):
        module.fill("no places", [])


def test_peers_are_built_with_the_flags_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    import build_peers
    import setup

    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_BLAS=ON -DX='a b'")
    assert build_peers._wheel_arguments() == ["-DGGML_BLAS=ON", "-DX=a b"]
    changed = build_peers._settings()
    monkeypatch.delenv("CMAKE_ARGS")
    assert build_peers._wheel_arguments() == [setup.CMAKE_ARGS]
    assert build_peers._settings() != changed and "-DLLAMA_USE_PREBUILT_UI=OFF" in changed
    peers = build_peers.find_peers(Path("somewhere"))
    assert peers.program("llama-bench").parent == peers.bin and not build_peers.is_built(peers)
