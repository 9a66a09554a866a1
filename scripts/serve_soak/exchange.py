"""One client's request and what came back: whole, in a stream, or not at all as it went away."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any

from serve_soak.questions import LEAVING, Question, Turn, body_of

TIMEOUT_S = 300
_WAIT_S = 0.05  # of one unit of a turn's patience


@dataclass
class Said:
    """One choice as the server gave it: in one piece or joined from a stream's chunks."""

    text: str = ""
    reason: str | None = None
    logprobs: list[float | None] = field(default_factory=list)


@dataclass
class Reply:
    """What a client got.

    Attributes:
        said: choices by their number; vectors: of an embeddings request.
        error: the error in the body, or in a stream that had begun.
    """

    status: int
    said: dict[int, Said] = field(default_factory=dict)
    vectors: list[list[float]] = field(default_factory=list)
    error: dict[str, Any] | None = None


def exchange(port: int, question: Question, turn: Turn) -> Reply | None:
    """Send one request; None if the client went away before the answer."""
    body = body_of(question, turn)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        if turn.leaves == LEAVING[0]:
            return _leave_while_sending(connection, question.path, data)
        connection.request("POST", question.path, data, {"Content-Type": "application/json"})
        if turn.leaves == LEAVING[1]:
            time.sleep(turn.patience * _WAIT_S)
            return None
        with connection.getresponse() as response:
            if turn.leaves == LEAVING[2]:
                return _leave_in_the_stream(response, turn.patience)
            if turn.streamed and response.status == 200:
                return _read_stream(response)
            return _read_whole(response)
    finally:
        connection.close()


def _leave_while_sending(
    connection: http.client.HTTPConnection, path: str, data: bytes
) -> Reply | None:
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[: len(data) // 2])
    return None


def _leave_in_the_stream(response: http.client.HTTPResponse, n_lines: int) -> Reply | None:
    if response.status != 200:
        return _read_whole(response)
    for _ in range(n_lines):
        response.readline()
    return None


def _read_whole(response: http.client.HTTPResponse) -> Reply:
    body = json.loads(response.read())
    reply = Reply(response.status, error=body.get("error"))
    for choice in body.get("choices", ()):
        _add(reply, choice, choice.get("message", choice))
    entries = body.get("data", ())
    reply.vectors = [entry["embedding"] for entry in sorted(entries, key=lambda e: e["index"])]
    return reply


def _read_stream(response: http.client.HTTPResponse) -> Reply:
    reply = Reply(response.status)
    done = False
    while line := response.readline():
        done = done or line.strip() == b"data: [DONE]"
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        reply.error = reply.error or event.get("error")
        for choice in event.get("choices", ()):
            _add(reply, choice, choice.get("delta", choice))
    if not done and reply.error is None:
        reply.error = {"message": "the stream ended without [DONE]"}
    return reply


def _add(reply: Reply, choice: dict[str, Any], message: dict[str, Any]) -> None:
    """Add a choice, or a chunk of one; chat has `content`, the older completions have `text`."""
    said = reply.said.setdefault(choice["index"], Said())
    said.text += message.get("content") or message.get("text") or ""
    said.reason = said.reason or choice["finish_reason"]
    told = choice["logprobs"] or {}
    if "token_logprobs" in told:
        said.logprobs += told["token_logprobs"]
    said.logprobs += [token["logprob"] for token in told.get("content") or ()]
