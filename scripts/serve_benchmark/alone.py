"""One answer computed by a process of its own, with the engine alone: what isolation is held to.

Reads a JSON object on stdin (base, adapters, prompt, n_tokens, kv_type, n_threads), writes the
tokens' texts, their log-probabilities and the lead of each over the next best one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.engine.context import Row, open_context
from edgelora.engine.model import ModelOptions, WeightedAdapter, open_model
from edgelora.engine.tokens import Vocabulary


def answer(question: dict[str, Any]) -> dict[str, list[Any]]:
    """Greedy, one token after another, from an empty context."""
    prompt, n_tokens = question["prompt"], question["n_tokens"]
    exact = question["kv_type"] == "f32"
    options = {"exact": True} if exact else {"kv_type": question["kv_type"]}
    texts, logprobs, leads = [], [], []
    with (
        open_model(Path(question["base"]), ModelOptions(question["n_threads"])) as model,
        open_context(model, n_ctx=len(prompt) + n_tokens, n_sequences=1, **options) as context,
    ):
        context.apply([WeightedAdapter(Path(p), w) for p, w in question["adapters"]])
        rows = [Row(t, i, 0, output=i == len(prompt) - 1) for i, t in enumerate(prompt)]
        for position in range(len(prompt), len(prompt) + n_tokens):
            logits = context.decode(rows)[0].astype(np.float64)
            second, best = np.sort(logits)[-2:]
            token = int(logits.argmax())
            texts.append(_shown(model.vocabulary, token))
            logprobs.append(float(-np.log(np.exp(logits - best).sum())))
            leads.append(float(best - second))
            rows = [Row(token, position, 0, output=True)]
    return {"texts": texts, "logprobs": logprobs, "leads": leads}


def _shown(vocabulary: Vocabulary, token: int) -> str:
    """A token as OpenAI's log-probabilities name it: control tokens and parts of characters too."""
    text = vocabulary.decode([token])
    try:
        return text.decode() or vocabulary.text_of(token)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
