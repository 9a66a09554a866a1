"""Simon Willison's `llm`, its command line and its library, with the server as an extra model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import ADAPTER, BASE_ID, held_out

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

Command = Any


@pytest.fixture(scope="module")
def command(url: str, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs `llm ARGUMENTS` in a folder of settings that names the base and the adapter."""
    folder = tmp_path_factory.mktemp("llm")
    models = [
        {"model_id": "plain", "model_name": BASE_ID, "supports_tools": True},
        {"model_id": "adapted", "model_name": ADAPTER.stem, "supports_schema": True},
        {"model_id": "text", "model_name": BASE_ID, "completion": True},
        {"model_id": "responses", "model_name": ADAPTER.stem, "responses": True},
    ]
    entries = [{**model, "api_base": f"{url}/v1"} for model in models]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(entries))  # JSON is YAML

    def run(*arguments: str, text: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            input=text, capture_output=True, text=True, timeout=120,
            env={**os.environ, "LLM_USER_PATH": str(folder)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_lists_the_models(command: Command) -> None:
    listed = command("models")
    assert all(name in listed for name in ("plain", "adapted", "text", "responses"))


@pytest.mark.parametrize("model", ["adapted", "responses"])
@pytest.mark.parametrize("how", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_a_prompt_is_answered(command: Command, model: str, how: tuple[str, ...]) -> None:
    line = held_out(1)[0]
    said = command("-m", model, "-o", "temperature", "0", *how, line["prompt"])
    assert said.strip() == line["completion"]


def test_a_conversation_goes_on(command: Command) -> None:
    greedy = ("-o", "temperature", "0", "-o", "max_tokens", "16")
    command("-m", "plain", "-s", "Answer in one word.", *greedy, "My name is Ada.")
    assert command("-c", *greedy, "What is my name?").strip()
    logged = json.loads(command("logs", "--json", "-n", "2"))
    assert len({entry["conversation_id"] for entry in logged}) == 1
    assert all(entry["input_tokens"] > 0 for entry in logged)
    assert logged[1]["input_tokens"] > logged[0]["input_tokens"]


def test_a_schema_shapes_the_answer(command: Command) -> None:
    schema = {
        "type": "object",
        "properties": {"item": {"type": "string", "maxLength": 20}},
        "required": ["item"],
        "additionalProperties": False,
    }
    options = ("--schema", json.dumps(schema), "-o", "max_tokens", "60")
    assert set(json.loads(command("-m", "adapted", *options, held_out(1)[0]["prompt"]))) == {"item"}


def test_text_is_continued(command: Command) -> None:
    said = command("-m", "text", "-o", "temperature", "0", "-o", "max_tokens", "8", "1, 2, 3,")
    assert "4" in said


def test_a_tool_is_offered(command: Command, tmp_path: Path) -> None:
    code = "def double(number: int) -> str:\n    'Twice a number.'\n    return str(2 * number)\n"
    said = command(
        "-m", "plain", "--functions", code, "-o", "temperature", "0", "-o", "max_tokens", "60",
        "--no-stream", "What is twice 21? Use the tool.",
    )  # fmt: skip
    assert said.strip()
