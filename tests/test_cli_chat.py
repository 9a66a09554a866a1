"""`edgelora chat`: streaming, switching, comparing, Ctrl-C, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
from cli_runner import run

from edgelora.cli.chat import name_adapters
from edgelora.engine import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    base = pico.write_base(folder / "base.gguf")
    for seed, name in enumerate("ab"):
        pico.write_random_lora(folder / f"{name}.gguf", base, seed=seed, size=2.0,
                               metadata={"edgelora.template": "chat"})  # fmt: skip
    return folder


def words(folder: Path, *more: object) -> list[object]:
    return ["chat", "--base", folder / "base.gguf", "--max-tokens", 8, "--threads", 1,
            "--adapter", folder / "a.gguf", "--adapter", folder / "b.gguf", *more]  # fmt: skip


def answer(folder: Path, *typed: str) -> str:
    """What is printed for the last of the typed lines."""
    before = run(*words(folder, "-q"), stdin="".join(f"{line}\n" for line in typed[:-1])).stdout
    whole = run(*words(folder, "-q"), stdin="".join(f"{line}\n" for line in typed)).stdout
    assert whole.startswith(before)
    return whole[len(before) :]


def test_the_first_adapter_answers_and_others_can_be_chosen(folder: Path) -> None:
    first = answer(folder, "is it you")
    assert first.strip() and first == answer(folder, "/adapter a", "is it you")
    base = answer(folder, "/adapter base", "is it you")
    second = answer(folder, "/adapter b", "is it you")
    assert len({first, base, second}) == 3
    alone = run("chat", "--base", folder / "base.gguf", "--max-tokens", 8, "--threads", 1, "-q",
                stdin="is it you\n")  # fmt: skip
    assert alone.stdout == base


def test_the_conversation_is_remembered_until_reset(folder: Path) -> None:
    first = answer(folder, "is it you")
    assert answer(folder, "is it you", "is it you") != first
    assert answer(folder, "is it you", "/reset", "is it you") == first
    assert answer(folder, "", "   ", "is it you") == first


def test_compare_answers_the_last_question_with_each(folder: Path) -> None:
    compared = answer(folder, "was he there", "/compare")
    expected = "".join(
        f"--- {name}\n{answer(folder, f'/adapter {name}', 'was he there')}"
        for name in ("base", "a", "b")
    )
    assert compared == expected
    after = answer(folder, "was he there", "/compare", "with this")
    assert after == answer(folder, "was he there", "with this")  # comparing changed nothing
    nothing = run(*words(folder), stdin="/compare\n")
    assert nothing.exit_code == 0 and "nothing to compare yet" in nothing.stderr
    assert nothing.stderr.splitlines()[-1].startswith("peak memory: ")


def test_commands_that_are_wrong_or_ask(folder: Path) -> None:
    result = run(*words(folder), stdin="/adapter nobody\n/wings\n/help\n/quit\nis it\n")
    assert result.exit_code == 0
    assert "no adapter nobody" in result.stderr and "no command /wings" in result.stderr
    assert result.stdout.startswith("  base\n* a\n  b\n/adapter") and "/quit" in result.stdout
    assert result.stdout.rstrip().endswith("stops that answer.")  # /quit ended it


def test_a_cut_answer_says_so(folder: Path) -> None:
    result = run(*words(folder, "-q"), stdin="is it you\n")
    assert "cut after 8 tokens (--max-tokens)" in result.stderr


def test_a_full_context_is_a_warning_and_reset_helps(folder: Path) -> None:
    line = words(folder, "--context", 256)
    result = run(*line, stdin="you " * 300 + "\n/reset\nis it\n")
    assert result.exit_code == 0
    assert "do not fit" in result.stderr and "/reset starts a new conversation" in result.stderr
    assert result.stdout == run(*line, stdin="is it\n").stdout != ""


def test_another_template_is_a_warning(folder: Path) -> None:
    raw = run(*words(folder, "--template", "Q: {prompt}\\nA:"), stdin="")
    assert raw.exit_code == 0 and raw.stderr.count("trained with another prompt template") == 2


def test_an_adapter_for_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    other = pico.write_base(tmp_path / "other.gguf", "gpt2")
    wrong = pico.write_random_lora(tmp_path / "wrong.gguf", other)
    result = run(*words(folder, "--adapter", wrong), stdin="is it\n")
    assert result.exit_code == 1 and "wrong.gguf" in result.stderr and result.stdout == ""


def test_ctrl_c_stops_an_answer_but_not_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generate.stream

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[str]:
        for i, piece in enumerate(real(*args, **kwargs)):
            yield piece
            if i == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "stream", interrupted)
    result = run(*words(folder), stdin="is it you\n/adapter\n")
    assert result.exit_code == 0 and "stopped" in result.stderr
    assert "cut after" not in result.stderr and result.stdout.endswith("  base\n* a\n  b\n")


def test_ctrl_c_at_the_prompt_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    result = run(*words(folder), stdin="")
    assert result.exit_code == 0 and result.stdout == ""


def test_answers_are_streamed_while_the_chat_goes_on(folder: Path) -> None:
    line = [sys.executable, "-m", "edgelora", *map(str, words(folder, "-q"))]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"is it you\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # an answer came before the input ended
        assert process.poll() is None
        process.stdin.write(b"/quit\n")
        process.stdin.close()
        process.stdout.read()
        assert process.wait(timeout=60) == 0


def test_two_files_of_one_name_are_named_by_their_paths() -> None:
    one, two, base = Path("x/a.gguf"), Path("y/a.gguf"), Path("base.gguf")
    assert name_adapters([one, two, Path("b.gguf"), base]) == {
        str(one): one, str(two): two, "b": Path("b.gguf"), "base.gguf": base,
    }  # fmt: skip
