"""What a document cannot say: schemathesis' requests with names, ids and sizes that the server has.

Names of models and files that are made up become real ones in half of the requests. Requests that
agree with the document are made to agree with themselves too (an answer's length with the context,
`top_logprobs` with `logprobs`), or few would reach the engine. What is wrong on purpose stays so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import schemathesis

BASE, FILE = os.environ["EDGELORA_SERVED"].split(",")
ADAPTER = Path(FILE).stem
N_VOCAB = 49152
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
Body = dict[str, Any]


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: Any) -> None:
    """Change the body in place of the one that was drawn."""
    if not isinstance(case.body, dict):
        return
    body = _with_names(case.body)
    if case.meta is not None and not case.meta.generation.mode.is_negative:
        for path, consistent in _CONSISTENT.items():
            body = consistent(body) if case.path == path else body
    case.body = body


def _with_names(body: Body) -> Body:
    body = dict(body)
    if isinstance(body.get("model"), str) and len(body["model"]) % 4 < 2:
        body["model"] = (BASE, ADAPTER)[len(body["model"]) % 2]
    if isinstance(body.get("path"), str) and len(body["path"]) % 2:
        body["path"] = Path(FILE).name
    return body


def _generation(body: Body) -> Body:
    """Short answers, no field without the one that it needs, no two that are one setting."""
    for name in LENGTHS:
        if isinstance(body.get(name), int):
            body[name] = 1 + body[name] % 8
    body.setdefault("max_output_tokens" if "input" in body else "max_tokens", 4)
    for name in ("grammar", "repetition_penalty", "best_of", "include", "tool_choice"):
        body.pop(name, None)
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("lora"):
        body["lora"] = [
            {"name": ADAPTER, "scale": max(-2, min(2, body["lora"][0].get("scale", 1)))}
        ]
    if body.get("logit_bias"):
        body["logit_bias"] = {str(i): v for i, v in enumerate(body["logit_bias"].values())}
    if body.get("n"):
        body["n"] = 1 + body["n"] % 3
    if body.get("tools"):
        body["tools"] = [{"type": "function", "function": {"name": "look"}}]
    return body


def _chat(body: Body) -> Body:
    body = _generation(body)
    body["messages"] = [
        {**message, "content": message.get("content") or "Hello.", "role": role, "tool_calls": None}
        for message, role in zip(body["messages"][:2], ("user", "assistant"), strict=False)
    ]
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("max_completion_tokens") is not None:
        body.pop("max_tokens", None)
    if body.get("response_format"):
        body["response_format"] = {"type": "json_object"}
        body.pop("tools", None)
    return body


def _completion(body: Body) -> Body:
    return _embedding(_generation(body), "prompt")


def _responses(body: Body) -> Body:
    body = _generation(body)
    if not isinstance(body["input"], str) or not body["input"]:
        body["input"] = [{"role": "user", "content": "Hello."}]
    if body.get("tools"):
        body["tools"] = [{"type": "function", "name": "look"}]
    body.pop("text", None)
    return body


def _embedding(body: Body, name: str = "input") -> Body:
    """Ids of the vocabulary, and something to read."""
    prompt = body[name]
    body[name] = [_part(part) for part in prompt[:4]] if isinstance(prompt, list) else prompt or "a"
    body.pop("dimensions", None)
    return body


def _part(part: str | float | list[float]) -> str | int | list[int]:
    """A token id, several or a text; 2.0 is an integer too, as JSON schemas go."""
    if isinstance(part, list):
        return [int(token) % N_VOCAB for token in part]
    return part or "a" if isinstance(part, str) else int(part) % N_VOCAB


_CONSISTENT: dict[str, Callable[[Body], Body]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _responses,
    "/v1/embeddings": _embedding,
}
