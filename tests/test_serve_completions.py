"""POST /v1/completions over real HTTP: the engine's own answers, on the wire and through openai."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pico
import pytest
from alone import Alone, alone
from openai.types import Completion
from serving import Running, running

from edgelora.engine.model import WeightedAdapter
from edgelora.serve.routing import Choice

PATH = "/v1/completions"
TEXT = "the cat and the hat"


@dataclass
class Setup:
    running: Running
    http: httpx.Client
    alone: Alone
    adapter: Path

    def post(self, **body: Any) -> dict[str, Any]:
        answer = self.http.post(PATH, json={"temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def text(self, **body: Any) -> str:
        return str(self.post(**body)["choices"][0]["text"])

    def lines(self, **body: Any) -> list[str]:
        """The events of a stream, byte for byte but for the blank lines between them."""
        with self.http.stream("POST", PATH, json={"temperature": 0, "stream": True, **body}) as s:
            assert s.status_code == 200, s.read()
            assert s.headers["content-type"].startswith("text/event-stream")
            events = s.read().decode().split("\n\n")
        assert events.pop() == ""
        return events

    def chunks(self, **body: Any) -> list[dict[str, Any]]:
        *events, last = self.lines(**body)
        assert last == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def refusal(self, **body: Any) -> tuple[int, dict[str, Any]]:
        answer = self.http.post(PATH, json={"prompt": TEXT, **body})
        assert set(answer.json()) == {"error"}, answer.text
        return answer.status_code, answer.json()["error"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("completions")
    base = pico.write_base(folder / "base.gguf", tied=False)
    adapter = pico.write_random_lora(folder / "own.gguf", base, size=2.0)
    with (
        running(base, [adapter]) as server,
        alone(base) as reference,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Setup(server, http, reference, adapter)


def test_the_answer_is_the_engine_s(setup: Setup) -> None:
    ids = setup.alone.ids(TEXT)
    answer = setup.post(prompt=TEXT, max_tokens=12)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["model"] == "base" and answer["system_fingerprint"].startswith("fp_")
    assert abs(answer["created"] - time.time()) < 60
    Completion.model_validate(answer)
    (choice,) = answer["choices"]
    assert choice == {
        "text": setup.alone.answer(ids, 12),
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
    }
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(ids) and usage["completion_tokens"] == 12
    assert usage["total_tokens"] == len(ids) + 12


def test_every_shape_of_a_prompt(setup: Setup) -> None:
    ids = setup.alone.ids(TEXT)
    expected = setup.text(prompt=TEXT, max_tokens=6)
    for prompt in ([TEXT], ids, [ids]):
        assert setup.text(prompt=prompt, max_tokens=6) == expected
    other = setup.alone.ids("in his")
    several = setup.post(prompt=[ids, other, ids], max_tokens=6)
    assert [c["index"] for c in several["choices"]] == [0, 1, 2]
    assert [c["text"] for c in several["choices"]] == [
        expected,
        setup.alone.answer(other, 6),
        expected,
    ]
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) + len(other)


def test_more_prompts_than_slots_and_queue(setup: Setup) -> None:
    many = [setup.alone.ids(word) for word in "the and of to in is it you that he was".split()] * 9
    answer = setup.post(prompt=many, max_tokens=1)
    assert [c["index"] for c in answer["choices"]] == list(range(99))
    expected = [setup.alone.answer(ids, 1) for ids in many[:11]]
    assert [c["text"] for c in answer["choices"]] == expected * 9


def test_adapters_by_id_and_by_weight(setup: Setup) -> None:
    ids = setup.alone.ids(TEXT)
    base = setup.alone.answer(ids, 10)
    own = setup.alone.answer(ids, 10, WeightedAdapter(setup.adapter))
    half = setup.alone.answer(ids, 10, WeightedAdapter(setup.adapter, -0.5))
    assert len({base, own, half}) == 3
    answer = setup.post(prompt=TEXT, max_tokens=10, model="own")
    assert (answer["model"], answer["choices"][0]["text"]) == ("own", own)
    for lora, expected in (
        ([{"name": "own", "scale": -0.5}], half),
        ([{"name": "own"}], own),
        ([{"name": "own", "scale": 0}], base),
        ([], base),
    ):
        assert setup.text(prompt=TEXT, max_tokens=10, model="own", lora=lora) == expected
    assert setup.text(prompt=TEXT, max_tokens=10, model="base") == base


def test_sixteen_tokens_by_default_and_what_fits_at_most(setup: Setup) -> None:
    ids = setup.alone.ids(TEXT)
    answer = setup.post(prompt=TEXT, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    whole = (ids * 60)[:250]
    assert setup.post(prompt=whole, ignore_eos=True)["usage"]["completion_tokens"] == 6
    exact = setup.post(prompt=whole, max_tokens=6, ignore_eos=True)
    assert exact["usage"]["total_tokens"] == 256


def test_nothing_is_cut(setup: Setup) -> None:
    ids = (setup.alone.ids(TEXT) * 60)[:250]
    status, error = setup.refusal(prompt=ids, max_tokens=7)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "maximum context length is 256 tokens" in error["message"]
    assert "250 in the prompt, 7 in the completion" in error["message"]
    status, error = setup.refusal(prompt=ids * 2)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "256" in error["message"] and "500" in error["message"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_the_engine_does(setup: Setup, max_tokens: int) -> None:
    first, second = setup.alone.ids(TEXT), setup.alone.ids("he was on the")
    answer = setup.post(
        prompt=[first, second], echo=True, logprobs=1, max_tokens=max_tokens, seed=1234
    )
    for ids, choice in zip((first, second), answer["choices"], strict=True):
        shape = choice["logprobs"]
        assert shape["token_logprobs"][0] is None and shape["top_logprobs"][0] is None
        assert len(shape["tokens"]) == len(ids) + max_tokens
        scored = shape["token_logprobs"][1 : len(ids)]
        expected = setup.alone.log_likelihood(ids[:1], ids[1:])
        assert sum(scored) == pytest.approx(expected, abs=1e-3)
        # lm-eval takes everything after the context but the last, generated one.
        if max_tokens:
            continued = sum(shape["token_logprobs"][3:-1])
            expected = setup.alone.log_likelihood(ids[:3], ids[3:])
            assert continued == pytest.approx(expected, abs=1e-3)
        assert choice["text"].startswith(setup.alone.model.vocabulary.decode(ids).decode())


def test_echo_under_an_adapter(setup: Setup) -> None:
    ids = setup.alone.ids(TEXT)
    answer = setup.post(prompt=ids, echo=True, logprobs=0, max_tokens=0, model="own")
    shape = answer["choices"][0]["logprobs"]
    expected = setup.alone.log_likelihood(ids[:1], ids[1:], WeightedAdapter(setup.adapter))
    assert sum(shape["token_logprobs"][1:]) == pytest.approx(expected, abs=1e-3)
    assert shape["top_logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 0


def test_a_token_that_ends_the_answer_has_its_place_among_the_logprobs(setup: Setup) -> None:
    """lm-eval drops the last entry, the generated token, whatever it is."""
    ids = setup.alone.ids(TEXT)
    eos = setup.alone.model.vocabulary.eos
    ended = setup.post(prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias={str(eos): 100})[
        "choices"
    ][0]
    assert ended["finish_reason"] == "stop"
    assert len(ended["logprobs"]["token_logprobs"]) == len(ids) + 1
    assert ended["logprobs"]["tokens"][-1] == "</s>"


def test_the_places_of_tokens_in_the_text(setup: Setup) -> None:
    answer = setup.post(prompt=TEXT, echo=True, logprobs=2, max_tokens=8)
    (choice,) = answer["choices"]
    assert choice["text"].startswith(TEXT)
    shape = choice["logprobs"]
    assert shape["tokens"][:2] == ["<s>", " the"]  # the space is SentencePiece's
    assert shape["text_offset"][:3] == [0, 0, 3]
    for token, offset in list(zip(shape["tokens"], shape["text_offset"], strict=True))[2:]:
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    for logprob, top in list(zip(shape["token_logprobs"], shape["top_logprobs"], strict=True))[1:]:
        assert 2 <= len(top) <= 3 and logprob in top.values()
    n_prompt = answer["usage"]["prompt_tokens"]
    for i in range(n_prompt, len(shape["tokens"])):
        assert shape["token_logprobs"][i] == max(shape["top_logprobs"][i].values())


def test_choices_differ_by_their_seeds(setup: Setup) -> None:
    sampled = {"prompt": TEXT, "max_tokens": 12, "temperature": 1.0}
    three = setup.post(**sampled, n=3, seed=40)
    texts = [choice["text"] for choice in three["choices"]]
    assert len(set(texts)) == 3
    assert texts == [setup.text(**sampled, seed=40 + i) for i in range(3)]
    assert three["usage"]["prompt_tokens"] == len(setup.alone.ids(TEXT))
    assert three["usage"]["completion_tokens"] == sum(
        setup.post(**sampled, seed=40 + i)["usage"]["completion_tokens"] for i in range(3)
    )
    unseeded = {setup.text(**sampled) for _ in range(3)}
    assert len(unseeded) == 3
    for seed in (-1, 2**40, 2**32 - 1):
        assert setup.text(**sampled, seed=seed) == setup.text(**sampled, seed=seed)


def test_the_prompt_of_several_choices_is_computed_once(setup: Setup) -> None:
    before = setup.running.server.scheduler.stats().prompt_tokens_total
    ids = (setup.alone.ids("you that he was for on are with his") * 9)[:120]
    setup.post(prompt=ids, n=4, max_tokens=2, temperature=1.0)
    computed = setup.running.server.scheduler.stats().prompt_tokens_total - before
    assert 0 < computed <= len(ids) + 3  # each other choice computes the last token again
    again = setup.post(prompt=ids, max_tokens=1)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == len(ids) - 1


def test_a_stop_string_is_never_part_of_the_answer(setup: Setup) -> None:
    whole = setup.text(prompt=TEXT, max_tokens=20)
    stop = whole[7:12]
    expected = whole[: whole.index(stop)]
    for given in (stop, [stop], ["never there", stop]):
        (choice,) = setup.post(prompt=TEXT, max_tokens=20, stop=given)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    chunks = setup.chunks(prompt=TEXT, max_tokens=20, stop=stop)
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_end_token_ends_an_answer_unless_it_is_ignored(setup: Setup) -> None:
    eos = {str(setup.alone.model.vocabulary.eos): 100}
    (choice,) = setup.post(prompt=TEXT, max_tokens=9, logit_bias=eos)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    endless = setup.post(prompt=TEXT, max_tokens=9, logit_bias=eos, ignore_eos=True)
    assert endless["choices"][0]["finish_reason"] == "length"
    assert endless["usage"]["completion_tokens"] == 9


def test_sampling_settings_reach_the_engine(setup: Setup) -> None:
    (token,) = setup.alone.model.vocabulary.tokenize("k")[-1:]
    assert setup.text(prompt=TEXT, max_tokens=4, logit_bias={str(token): 100}) == "kkkk"
    greedy = setup.text(prompt=TEXT, max_tokens=16)
    for narrow in ({"top_k": 1}, {"top_p": 0}, {"top_p": 1e-9}, {"min_p": 1}):
        assert setup.text(prompt=TEXT, max_tokens=16, temperature=2, **narrow) == greedy
    ids = setup.alone.ids(TEXT)
    for name, field, value in (
        ("repeat_penalty", "repeat_penalty", 1.8),
        ("repeat_penalty", "repetition_penalty", 1.8),
        ("presence_penalty", "presence_penalty", 2),
        ("frequency_penalty", "frequency_penalty", 2),
    ):
        expected = setup.alone.answer(ids, 16, **{name: float(value)})
        assert setup.text(prompt=TEXT, max_tokens=16, **{field: value}) == expected
    # 1 by default, as OpenAI's.
    drawn = {"prompt": TEXT, "max_tokens": 12, "seed": 5}
    assert setup.text(**drawn, temperature=None) == setup.text(**drawn, temperature=1)


def test_a_grammar_is_followed(setup: Setup) -> None:
    (choice,) = setup.post(prompt=TEXT, max_tokens=9, grammar='root ::= "yes" | "no"')["choices"]
    assert choice["text"] in ("yes", "no") and choice["finish_reason"] == "stop"
    status, error = setup.refusal(grammar="root ::= missing")
    assert (status, error["param"], error["code"]) == (400, "grammar", "invalid_grammar")


def test_chunks_on_the_wire(setup: Setup) -> None:
    *events, last = setup.lines(
        prompt=TEXT, max_tokens=6, stream_options={"include_usage": True}, n=1
    )
    assert last == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    *parts, usage = chunks
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in parts)
    text = "".join(chunk["choices"][0]["text"] for chunk in parts)
    assert text == setup.text(prompt=TEXT, max_tokens=6)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in parts]
    assert reasons == [None] * (len(parts) - 1) + ["length"]
    assert "usage" not in setup.chunks(prompt=TEXT, max_tokens=2)[0]


def test_a_stream_is_the_whole_answer_in_pieces(setup: Setup) -> None:
    body = {
        "prompt": [TEXT, "he was"], "n": 2, "seed": 3, "temperature": 1.5, "max_tokens": 24,
        "echo": True, "logprobs": 2,
    }  # fmt: skip
    whole = setup.post(**body)["choices"]
    chunks = setup.chunks(**body)
    for choice in whole:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        for key, values in choice["logprobs"].items():
            parts = [part["logprobs"][key] for part in own if part["logprobs"]]
            joined = [value for part in parts for value in part]
            if key in ("tokens", "text_offset"):
                assert joined == values
            assert len(joined) == len(values)


def test_a_character_of_several_tokens_is_one_piece(setup: Setup) -> None:
    grammar = 'root ::= "é€😀x"'
    chunks = setup.chunks(prompt=TEXT, max_tokens=20, grammar=grammar, logprobs=0)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices if choice["text"]] == ["é", "€", "😀", "x"]
    tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]]
    assert tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"] and tokens[9] == "x"
    offsets = [at for c in choices if c["logprobs"] for at in c["logprobs"]["text_offset"]]
    assert offsets[:10] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert choices[-1]["finish_reason"] == "stop"


def test_the_openai_client(setup: Setup) -> None:
    client = openai.OpenAI(base_url=f"{setup.running.url}/v1", api_key="none", max_retries=0)
    with client:
        answer = client.completions.create(
            model="base", prompt=TEXT, max_tokens=5, temperature=0, logprobs=2
        )
        assert answer.choices[0].text == setup.text(prompt=TEXT, max_tokens=5)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and len(logprobs.tokens or []) == 5
        stream = client.completions.create(
            model="own", prompt=TEXT, max_tokens=5, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5
        joined = "".join(chunk.choices[0].text for chunk in chunks[:-1])
        assert joined == setup.text(prompt=TEXT, max_tokens=5, model="own")
        with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
            client.completions.create(model="base", prompt=TEXT, max_tokens=5000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="Known models: base, own"):
            client.completions.create(model="other", prompt=TEXT)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 10**4000}, "max_tokens"),
        ({"prompt": [10**4000]}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1, "best_of": 2}, "best_of"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "after"}, "suffix"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": 1}, "echo"),
        ({"lora": [{"scale": 1}]}, "lora[0].name"),
        ({"lora": [{"name": "own", "scale": 1e9}]}, "lora"),
        ({"lora": [{"name": "own", "scale": 10**400}]}, "lora[0].scale"),
        ({"temperature": 10**400}, "temperature"),
        ({"lora": [{"name": "own"}, {"name": "own"}]}, "lora"),
        ({"lora": [{"name": "own"}], "model": "auto"}, "lora"),
        ({"model": 5}, "model"),
        ({"grammar": "root ::= " + '"a" ' * 40000}, "grammar"),
        ({"mirostat": 2}, "mirostat"),
        ({"guided_json": {}}, "guided_json"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_is_refused_names_its_field(setup: Setup, body: Any, param: str) -> None:
    given = json.dumps({"prompt": TEXT, **body})
    answer = setup.http.post(PATH, content=given, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_what_the_engine_cannot_do_is_the_request_s_fault(setup: Setup) -> None:
    everything = {str(i): -100 for i in range(setup.alone.model.vocabulary.n_tokens)}
    for stream in (False, True):
        status, error = setup.refusal(logit_bias=everything, stream=stream)
        assert status == 400 and "banned" in error["message"]


def test_a_prompt_is_needed_and_bodies_are_json(setup: Setup) -> None:
    for content in (b"{}", b"[]", b"5", b"{", b'{"prompt": NaN}', b"\xff", b"[" * 100_000):
        headers = {"Content-Type": "application/json"}
        answer = setup.http.post(PATH, content=content, headers=headers)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_fields_and_usual_values_are_taken(setup: Setup) -> None:
    expected = setup.text(prompt=TEXT, max_tokens=3)
    extras: dict[str, Any] = {
        "suffix": None, "best_of": 1, "user": "me", "unheard_of": {"a": 1}, "typical_p": 1,
        "mirostat": 0, "use_beam_search": False, "min_tokens": 0, "stop": None, "logit_bias": None,
        "lora": None, "stream": False,
    }  # fmt: skip
    assert setup.text(prompt=TEXT, max_tokens=3, **extras) == expected


def test_auto_says_what_it_took_or_why_it_cannot(setup: Setup) -> None:
    status, error = setup.refusal(model="auto")
    assert (status, error["param"], error["code"]) == (400, "model", "auto_unavailable")
    status, error = setup.refusal(prompt=[TEXT, TEXT], model="auto")
    assert (status, error["param"]) == (400, "model")
    server = setup.running.server
    chosen = Choice("own", (WeightedAdapter(setup.adapter.resolve()),), 3.5, 1.25)
    asked: list[Sequence[int]] = []

    class OfTest:
        async def choose(self, prompt: Sequence[int]) -> Choice:
            asked.append(prompt)
            return chosen

    usual, server.router = server.router, OfTest()  # type: ignore[assignment]
    try:
        answer = setup.http.post(
            PATH, json={"prompt": TEXT, "model": "auto", "max_tokens": 4, "temperature": 0}
        )
    finally:
        server.router = usual
    assert asked == [tuple(setup.alone.ids(TEXT))]
    assert answer.headers["X-EdgeLoRA-Adapter"] == answer.json()["model"] == "own"
    assert answer.json()["edgelora"] == {"adapter": "own", "similarity": 3.5, "threshold": 1.25}
    assert answer.json()["choices"][0]["text"] == setup.text(prompt=TEXT, model="own", max_tokens=4)


def wait_until_idle(setup: Setup) -> None:
    deadline = time.monotonic() + 20
    while (stats := setup.running.server.scheduler.stats()).running or stats.queued:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_places(setup: Setup, stream: bool) -> None:
    cancelled = setup.running.server.scheduler.stats().cancelled_total
    body = {
        "prompt": [TEXT, "he was", "it is"], "n": 3, "stream": stream, "max_tokens": 200,
        "ignore_eos": True, "temperature": 1.0,
    }  # fmt: skip
    if stream:
        with setup.http.stream("POST", PATH, json=body) as answer:
            next(answer.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            setup.http.post(PATH, json={**body, "n": 16}, timeout=0.1)
    wait_until_idle(setup)
    assert setup.running.server.scheduler.stats().cancelled_total > cancelled
    assert setup.text(prompt=TEXT, max_tokens=4) == setup.alone.answer(setup.alone.ids(TEXT), 4)
