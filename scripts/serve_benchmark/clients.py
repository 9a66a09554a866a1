"""Clients: one request, or many at once, with the times at which the tokens came."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from serve_benchmark.prompts import Prompt

TIMEOUT_S = 600
Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """What one client asks for: a greedy answer of exactly `n_tokens`.

    Attributes:
        adapters: name and scale of each; None for what the server was started with.
        cached: whether the server may use what it has computed before.
    """

    prompt: Prompt
    n_tokens: int
    streamed: bool = False
    adapters: tuple[tuple[str, float], ...] | None = None
    cached: bool = False
    logprobs: int | None = None


@dataclass
class Answer:
    """When an answer came (time.perf_counter), and what it was.

    Attributes:
        at: time of each event that carried text (one event in all unless streamed).
    """

    sent: float
    done: float
    at: list[float] = field(default_factory=list)
    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    body: Body = field(default_factory=dict)

    @property
    def first_s(self) -> float:
        """Seconds to the first token that the client could see."""
        return self.at[0] - self.sent

    @property
    def tokens_s(self) -> float:
        """Tokens a second from the first token that the client saw to the last."""
        return (self.n_generated - 1) / (self.at[-1] - self.at[0])


class OpenAI:
    """/v1/completions of `edgelora serve`."""

    path = "/v1/completions"

    def request(self, ask: Ask) -> Body:
        """The body of one request."""
        body: Body = {"prompt": list(ask.prompt.ids), "max_tokens": ask.n_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "logprobs": ask.logprobs}
        if ask.streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if ask.adapters is not None:
            body["lora"] = [{"name": name, "scale": scale} for name, scale in ask.adapters]
        return body

    def text(self, event: Body) -> str:
        """The text of a reply or of one event of a stream."""
        return "".join(choice["text"] or "" for choice in event["choices"])

    def count(self, answer: Answer, events: Sequence[Body]) -> None:
        """Fill in the numbers of tokens from the reply, or from a stream's last events."""
        usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        answer.n_prompt = usage["prompt_tokens"]
        answer.n_generated = usage["completion_tokens"]
        answer.n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class LlamaServer:
    """/completion of llama-server: its own endpoint, which takes ids and ignores EOS."""

    path = "/completion"

    def request(self, ask: Ask) -> Body:
        """The body of one request; greedy by one scan of the vocabulary, without other samplers."""
        body: Body = {"prompt": list(ask.prompt.ids), "n_predict": ask.n_tokens}
        body |= {"temperature": 0.0, "samplers": ["temperature"], "ignore_eos": True}
        return body | {"stream": ask.streamed, "cache_prompt": ask.cached}

    def text(self, event: Body) -> str:
        """The text of a reply or of one event of a stream."""
        return event["content"]

    def count(self, answer: Answer, events: Sequence[Body]) -> None:
        """Fill in the numbers of tokens from the reply, or from a stream's last events."""
        answer.n_prompt = events[-1]["tokens_evaluated"]
        answer.n_generated = events[-1]["tokens_predicted"]
        answer.n_cached = events[-1]["timings"].get("cache_n", 0)


@dataclass(frozen=True)
class LlamaCppPython:
    """/v1/completions of llama_cpp.server: text only, one answer at a time.

    Attributes:
        eos: the token that ends an answer; it is never drawn, so that answers are of one length.
    """

    eos: int

    path = "/v1/completions"

    def request(self, ask: Ask) -> Body:
        """The body of one request."""
        body: Body = {"prompt": ask.prompt.text, "max_tokens": ask.n_tokens}
        body["logit_bias"] = {str(self.eos): -100}
        return body | {"temperature": 0.0, "stream": ask.streamed}

    def text(self, event: Body) -> str:
        """The text of a reply or of one event of a stream."""
        return event["choices"][0]["text"]

    def count(self, answer: Answer, events: Sequence[Body]) -> None:
        """Fill in the numbers of tokens: its streams carry none, each event is a token there."""
        usage = events[-1].get("usage")
        answer.n_prompt = usage["prompt_tokens"] if usage else 0
        answer.n_generated = usage["completion_tokens"] if usage else len(answer.at)


Protocol = OpenAI | LlamaServer | LlamaCppPython


def ask_once(port: int, protocol: Protocol, ask: Ask) -> Answer:
    """Send one request and read its answer.

    Raises:
        SystemExit: another status than 200; a comparison of half-answers says nothing.
    """
    body = json.dumps(protocol.request(ask)).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        sent = time.perf_counter()
        connection.request("POST", protocol.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            text = response.read(2000).decode(errors="replace")
            raise SystemExit(f"{protocol.path} answered {response.status}: {text}")
        if ask.streamed:
            return _read_stream(response, protocol, sent)
        reply = json.loads(response.read())
        done = time.perf_counter()
    finally:
        connection.close()
    answer = Answer(sent, done, [done], body=reply)
    protocol.count(answer, [reply])
    return answer


def _read_stream(response: http.client.HTTPResponse, protocol: Protocol, sent: float) -> Answer:
    answer, events = Answer(sent, sent), []
    for line, at in _data_lines(response):
        events.append(json.loads(line))
        if protocol.text(events[-1]):
            answer.at.append(at)
    answer.done = time.perf_counter()
    answer.body = {"text": "".join(map(protocol.text, events))}
    protocol.count(answer, events)
    return answer


def _data_lines(response: http.client.HTTPResponse) -> Iterator[tuple[bytes, float]]:
    while line := response.readline():
        if line.startswith(b"data: {"):
            yield line[6:], time.perf_counter()


def ask_all(port: int, protocol: Protocol, asks: Sequence[Ask], n_clients: int = 0) -> list[Answer]:
    """Send all at once (or by `n_clients`, each with one request at a time), in the order given."""
    n_clients = n_clients or len(asks)
    start = threading.Barrier(n_clients)
    with ThreadPoolExecutor(n_clients, initializer=start.wait) as clients:
        return list(clients.map(lambda ask: ask_once(port, protocol, ask), asks))


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of a GET; status 0 where nothing listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except (ConnectionError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def counters(port: int) -> dict[str, float]:
    """The numbers of /metrics that have no labels."""
    lines = (line.split() for line in get(port, "/metrics")[1].splitlines() if line[:1] != "#")
    return {words[0]: float(words[1]) for words in lines if len(words) == 2 and "{" not in words[0]}
