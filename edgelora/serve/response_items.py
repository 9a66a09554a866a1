"""The output items of a response as they grow, and the events that tell of it."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from typing import Any

from edgelora.serve.assistant import Called, Said

# An event's name and its fields but for its type and number.
Told = tuple[str, dict[str, Any]]


class Output:
    """The items of one response: a message where something was said, then the calls.

    Attributes:
        items: as the response has them; the last one may still be open.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False

    def add(self, part: Said | Called, logprobs: list[dict[str, Any]]) -> Iterator[Told]:
        """Take more of the turn in."""
        if isinstance(part, Said):
            yield from self._say(part.text, logprobs)
            return
        if part.id:
            yield from self.close("completed")
            yield from self._open(_call(part))
        if part.arguments:
            self.items[-1]["arguments"] += part.arguments
            yield self._told("response.function_call_arguments.delta", delta=part.arguments)

    def end(self, logprobs: list[dict[str, Any]], *, cut: bool) -> Iterator[Told]:
        """Close the last item; a turn without a word is an empty message."""
        if not self.items:
            yield from self._open(_message())
        if logprobs and self.items[-1]["type"] == "message":
            self.items[-1]["content"][0]["logprobs"] += logprobs
        yield from self.close("incomplete" if cut else "completed")

    def close(self, status: str) -> Iterator[Told]:
        """Say that the open item, if there is one, is whole."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._told("response.output_text.done", content_index=0, **done)
            yield self._told("response.content_part.done", content_index=0, part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._told("response.function_call_arguments.done", **done)
        yield "response.output_item.done", {"output_index": self._index, "item": item}

    def _say(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Told]:
        if not self._is_open:
            yield from self._open(_message())
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._told(
            "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
        )

    def _open(self, item: dict[str, Any]) -> Iterator[Told]:
        self.items.append(item)
        self._is_open = True
        shown = copy.deepcopy(item)
        if item["type"] == "message":
            (part,) = shown["content"]
            yield (
                "response.output_item.added",
                {
                    "output_index": self._index,
                    "item": {**shown, "content": []},
                },
            )
            yield self._told("response.content_part.added", content_index=0, part=part)
        else:
            yield "response.output_item.added", {"output_index": self._index, "item": shown}

    def _told(self, kind: str, **fields: Any) -> Told:
        return kind, {"item_id": self.items[-1]["id"], "output_index": self._index, **fields}

    @property
    def _index(self) -> int:
        return len(self.items) - 1


def _message() -> dict[str, Any]:
    return {
        "type": "message",
        "id": f"msg_{secrets.token_hex(12)}",
        "status": "in_progress",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}],
    }


def _call(call: Called) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": call.id,
        "name": call.name,
        "arguments": "",
        "status": "in_progress",
    }
