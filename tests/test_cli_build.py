"""`edgelora build` as a person types it, on a pico base; and the demo away from its checkout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import builds
import pytest
from builds import World
from cli_runner import posix_only, run

from edgelora.adapters.gguf_lora import open_lora
from edgelora.build import pace
from edgelora.build.earlier import BUILDS
from edgelora.build.proposals import OPERATOR_NAMES
from edgelora.cli import demo


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def words(world: World, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    """A build by forward passes, unless another refinement is asked for."""
    refine = () if "--refine" in more else ("--refine", "forward")
    return ("build", "--base", world.base, "--bank", world.bank, "--data", data, "-o", out,
            "--threads", 1, *refine, *more)  # fmt: skip


def test_the_plan_the_table_and_what_was_written(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = run(*words(world, world.helped, out))
    assert result.exit_code == 0, result.output
    plan = result.stderr
    assert "helped.jsonl: 32 examples" in plan
    assert "16 examples to find coefficients (support), 8 to choose (selection), 8 unt" in plan
    assert "4 of 4 adapters measured on 16 examples" in plan
    assert "at most 120,000 (--budget)" in plan and "tokens/s about" in plan
    shown = result.stdout
    for name in ("base", "uniform mean", "nearest", "mixture", "least loss", "loss-weighted",
                 "surrogate, penalty"):  # fmt: skip
        assert name in shown
    assert shown.count("<- written") == 1 and builds.HELPER in shown
    assert "loss on 8 examples (untouched): base" in shown
    assert "relative error" in shown and f"{out} (" in shown.replace("\n", "")
    assert plan.splitlines()[-1].startswith("peak memory: ")
    assert open_lora(out).names


def test_json_is_all_of_stdout(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = run(*words(world, world.helped, out, "--json", "-q", "--budget", 12_000))
    told = json.loads(result.stdout)
    assert set(told) == {
        "out", "chosen", "coefficients", "distances", "losses_alone", "support_losses",
        "selection_losses", "judged", "rank", "relative_error", "n_tokens", "elapsed_s", "warnings",
        "refined", "trained", "peak_memory", "stages_s", "planned",
    }  # fmt: skip
    assert told["refined"] is None and told["trained"] is None
    assert sum(told["stages_s"].values()) == pytest.approx(told["elapsed_s"])
    assert {"measuring adapters", "comparing with the base"} <= set(told["stages_s"])
    assert 0 < told["planned"]["told_after_s"] < told["elapsed_s"]
    assert told["planned"]["seconds"] > 0 and told["planned"]["tokens"] <= 12_000
    assert told["out"] == str(out) and told["n_tokens"] <= 12_000
    assert set(told["losses_alone"]) == {f"adapter{i}" for i in range(builds.N_ADAPTERS)}
    assert told["chosen"] in told["selection_losses"]
    assert set(told["judged"]) == {"part", "examples", "base", "adapter", "adapter_vs_base"}
    assert told["judged"]["part"] == "untouched" and told["judged"]["examples"] == 8
    low, mid, high = told["judged"]["adapter_vs_base"]
    assert low <= mid <= high < 0
    assert result.stderr.count("warning:") == len(told["warnings"]) and "plan:" not in result.stderr


@pytest.mark.slow
def test_a_repeated_build_begins_at_the_merge(
    world: World, tmp_path: Path, decoded: list[int]
) -> None:
    first, again = tmp_path / "a" / "x.gguf", tmp_path / "b" / "x.gguf"
    for out in (first, again):
        out.parent.mkdir()
    told = json.loads(run(*words(world, world.helped, first, "--json", "-q")).stdout)
    decoded.clear()
    result = run(*words(world, world.helped, again, "--json"))
    assert "begins at the merge" in result.stderr and not decoded
    repeated = json.loads(result.stdout)
    own = ("out", "n_tokens", "elapsed_s", "stages_s", "planned", "peak_memory")
    assert {k: v for k, v in repeated.items() if k not in own} == {
        k: v for k, v in told.items() if k not in own
    }
    assert repeated["n_tokens"] == 0 and again.read_bytes() == first.read_bytes()
    for one, other in zip(
        sorted(first.parent.iterdir()), sorted(again.parent.iterdir()), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()  # the signature of the examples too

    run(*words(world, world.helped, again, "--force", "-q", "--anew"))
    assert decoded and again.read_bytes() == first.read_bytes()
    decoded.clear()
    # Other choices, other lines, another bank and a damaged record are other builds.
    for more in (("--seed", 1), ("--exclude", "adapter3"), ("--budget", 50_000)):
        run(*words(world, world.helped, again, "--force", "-q", *more))
        assert decoded
        decoded.clear()
    assert run("cache", "ls").stderr.count("ends of builds: ") == 1
    for file in BUILDS.files():
        file.path.write_text('{"chosen": "mean"}')
    run(*words(world, world.helped, again, "--force", "-q"))
    assert decoded and again.read_bytes() == first.read_bytes()


def test_a_slow_machine_s_budget_is_told_recorded_and_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.gguf"
    monkeypatch.setattr(pace, "measure_speed", lambda work, texts: 11.2)
    first = run(*words(world, world.helped, out))
    assert first.exit_code == 0, first.output
    assert "at most 6,000 (what 10 min allow here; --budget allows more)" in first.stderr
    assert json.loads(run("show", out, "--json").stdout)["provenance"]["budget_tokens"] == 6_000
    whole = out.read_bytes()
    given = run(*words(world, world.helped, tmp_path / "b.gguf", "--budget", 12_000))
    assert "at most 12,000 (--budget)" in given.stderr
    # The speed of another day changes nothing in a build that was measured.
    monkeypatch.setattr(pace, "measure_speed", lambda work, texts: 900.0)
    again = run(*words(world, world.helped, out, "--force"))
    assert "begins at the merge" in again.stderr and out.read_bytes() == whole


def test_exit_codes_say_what_happened(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.gguf"
    out.parent.mkdir()
    nothing = run(*words(world, world.hopeless, out))
    assert nothing.exit_code == 3 and "nothing beats the base" in nothing.stderr
    assert "peak memory: " in nothing.stderr  # all the work was done
    assert not list(out.parent.iterdir()) and not nothing.stdout

    out.write_bytes(b"mine")
    refused = run(*words(world, world.helped, out))
    assert refused.exit_code == 1 and "--force" in refused.stderr
    assert out.read_bytes() == b"mine"

    forced = run(*words(world, world.hopeless, out, "--force"))
    assert forced.exit_code == 0 and "warning: no candidate beat the base" in forced.stderr
    assert open_lora(out).names
    (beside,) = [p.name for p in out.parent.iterdir() if p != out]
    assert beside.startswith("a.") and beside.endswith(".signature.safetensors")

    poor = run(*words(world, world.helped, out, "--force", "--budget", 10))
    assert poor.exit_code == 1 and "budget of 10 tokens is too small" in poor.stderr
    gone = run(*words(world, world.helped, out, "--force", "--exclude", "*"))
    assert gone.exit_code == 1 and "no adapter is left" in gone.stderr


@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("coordinate", "cma") else ())
        for name in OPERATOR_NAMES
    ],
)
def test_each_operator_by_name(operator: str, world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = run(*words(world, world.helped, out, "--operator", operator, "--budget", 9_000, "-q"))
    if operator == "none":
        assert result.exit_code == 1 and "combines nothing" in result.stderr
        assert "--polish" in result.stderr and not out.exists()
        return
    if operator == "neural":
        assert result.exit_code == 1 and "no neural head for the distance" in result.stderr
        assert not out.exists()
        return
    assert result.exit_code == 0, result.output
    assert json.loads(str(open_lora(out).metadata["edgelora.provenance"]))["operator"]


@pytest.mark.parametrize("distance", ["js", "cosine", "wd"])
def test_a_distance_by_name(distance: str, world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    result = run(*words(world, world.helped, out, "--distance", distance, "--operator", "nearest"))
    assert result.exit_code == 0, result.output
    assert json.loads(str(open_lora(out).metadata["edgelora.provenance"]))["distance"] == distance


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--operator", "magic", "mixture"),
        ("--distance", "magic", "bures"),
        ("--combine", "magic", "svd"),
        ("--rank", "0", "auto"),
        ("--budget", "0", "1"),
        ("--refine", "magic", "gradient"),
        ("--weights", "magic", "layer"),
        ("--objective", "magic", "entropy"),
        ("--passes", "0", "1"),
    ],
)
def test_a_bad_choice_is_a_usage_error_that_lists_the_good_ones(
    option: str, value: str, known: str, world: World, tmp_path: Path
) -> None:
    result = run(*words(world, world.helped, tmp_path / "a.gguf", option, value))
    assert result.exit_code == 2 and option in result.stderr and known in result.stderr


def test_without_completions_it_says_what_it_could_not_measure(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "a.gguf"
    result = run(*words(world, world.unanswered, out))
    assert result.exit_code == 0, result.output
    assert "no completions: losses cannot be measured" in result.stderr
    assert "plan: distances from 32 examples to 4 adapters" in result.stderr
    assert "nats" not in result.stdout and "normalized" in result.stdout
    told = json.loads(run(*words(world, world.unanswered, out, "--force", "--json")).stdout)
    assert told["judged"] is None and told["selection_losses"] == {}


@pytest.mark.slow
def test_few_examples_are_cross_validated(world: World, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(world.helped.read_text().splitlines(keepends=True)[:20]))
    result = run(*words(world, data, tmp_path / "a.gguf"))
    assert result.exit_code == 0, result.output
    assert "loss on 20 examples (cross-validated)" in result.stdout
    assert "20 examples to find coefficients (support), and by cross-validation" in result.stderr
    assert "cross-validated" in result.stdout.splitlines()[1] + result.stdout.splitlines()[2]


def test_few_examples_of_a_search_that_sees_them_all_are_called_optimistic(
    world: World, tmp_path: Path
) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(world.helped.read_text().splitlines(keepends=True)[:20]))
    result = run(*words(world, data, tmp_path / "a.gguf", "--operator", "halving"))
    assert result.exit_code == 0, result.output
    assert "loss on 6 examples (selection part, optimistic)" in result.stdout
    assert "6 to choose (selection), none untouched" in result.stderr


@pytest.mark.slow
@posix_only
def test_ctrl_c_leaves_nothing_half_written(world: World, tmp_path: Path) -> None:
    """A real process, interrupted once its plan is out, in the middle of forward passes."""
    for name in ("out", "tmp"):
        (tmp_path / name).mkdir()
    out = tmp_path / "out" / "a.gguf"
    out.write_bytes(b"old")
    data = tmp_path / "long.jsonl"
    lines = [json.loads(line) for line in world.helped.read_text().splitlines()]
    prompts = [f"{i} {line['prompt']}" + " in the house" * 60 for i in range(4) for line in lines]
    builds.write_lines(data, prompts, [line["completion"] for line in lines] * 4)
    line = words(world, data, out, "--force", "--budget", 10**8)
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelora", *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    with process:
        assert process.stderr is not None and process.stdout is not None
        said = ""
        while "plan:" not in said and process.poll() is None:
            said += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        assert process.wait(60) == 130, said
        assert "interrupted; nothing half-written was left behind" in said
        assert not process.stdout.read()
    assert out.read_bytes() == b"old" and [p.name for p in out.parent.iterdir()] == [out.name]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("n_lines", "n_learned", "how"),
    [
        (32, 24, ", stopped by 8 other examples, 24 examples ("),
        (12, 12, " in 4 folds, 12 examples ("),
    ],
)
def test_gradients_are_planned_followed_and_shown(
    n_lines: int, n_learned: int, how: str, world: World, tmp_path: Path
) -> None:
    out, data = tmp_path / "a.gguf", tmp_path / "data.jsonl"
    data.write_text("\n".join(world.helped.read_text().splitlines()[:n_lines]))
    result = run(*words(world, data, out, "--refine", "gradient", "--passes", 2))
    assert result.exit_code == 0, result.output
    said = result.stderr
    assert f"0 of 4 adapters measured on {n_learned} examples" in said
    assert f"gradients: at most 2 pass(es) on coefficients{how}" in said
    assert "of the tokens (a gradient pass counts three)" in said and "memory about" in said
    assert "at most 120,000 (--budget)" in said
    assert "coefficients, start: held out" in said
    for n in (1, 2):
        assert f"coefficients, pass {n} of 2: support" in said
    shown = result.stdout
    assert "gradient" in shown and "steepest slopes at the base, of 4 adapters: " in shown
    assert "nearest by embedding, with their place by slope: " in shown and "4 in both" in shown
    assert not list(tmp_path.glob("*.refine"))


def test_json_tells_of_gradients(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    line = words(world, world.helped, out, "--refine", "gradient", "--passes", 1, "--polish", 1,
                 "--weights", "layer", "--json", "-q")  # fmt: skip
    told = json.loads(run(*line).stdout)
    assert told["refined"]["weights"] == "layer" and told["refined"]["n_passes"] in (0, 1)
    assert len(told["refined"]["support_losses"]) == 1
    assert len(told["refined"]["held_out_losses"]) == 2
    assert set(told["refined"]["slopes"]) == {f"adapter{i}" for i in range(builds.N_ADAPTERS)}
    assert told["trained"]["n_passes"] == 1 and told["trained"]["n_examples"] == 24
    assert told["trained"]["start"] in told["support_losses"]
    assert {"gradient", f"{told['trained']['start']}, polished"} <= set(told["selection_losses"])


def test_without_completions_the_objective_is_said(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    line = words(world, world.unanswered, out, "--refine", "gradient", "--passes", 1)
    result = run(*line, "--objective", "entropy")
    assert result.exit_code == 0, result.output
    assert "the entropy of the first answer token, and nothing measures" in result.stderr
    assert "nats a token; difference" not in result.stdout and "written: gradient" in result.stdout


def slow_steps(world: World, tmp_path: Path, out: Path) -> list[str]:
    """A command whose gradient steps take a while: long prompts, two passes."""
    lines = [json.loads(line) for line in world.helped.read_text().splitlines()]
    prompts = [line["prompt"] + " in the house" * 40 for line in lines]
    completions = [line["completion"] for line in lines]
    data = builds.write_lines(tmp_path / "long.jsonl", prompts, completions)
    line = words(world, data, out, "--refine", "gradient", "--passes", 2, "--budget", 10**9)
    return [str(word) for word in line]


@pytest.mark.slow
@posix_only
def test_ctrl_c_in_gradient_steps_keeps_their_state_and_the_same_command_goes_on(
    world: World, tmp_path: Path
) -> None:
    """Nobody is at a terminal, so nothing is written; the second run starts where it was."""
    out = tmp_path / "out" / "a.gguf"
    line = slow_steps(world, tmp_path, out)
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelora", *line], stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        said = ""
        while "pass 1 of" not in said and process.poll() is None:
            said += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        assert process.wait(60) == 130, said
    assert "keeps the gradient steps made so far; the same command goes on" in said
    assert [p.name for p in out.parent.iterdir()] == ["a.gguf.refine"]
    result = run(*line)
    assert result.exit_code == 0, result.output
    assert "coefficients, start" not in result.stderr and "pass 1 of" not in result.stderr
    assert out.is_file() and not list(out.parent.glob("*.refine"))


@pytest.mark.slow
@posix_only
def test_ctrl_c_at_a_terminal_offers_the_best_so_far(world: World, tmp_path: Path) -> None:
    import pty  # not on Windows

    out = tmp_path / "out" / "a.gguf"
    line = slow_steps(world, tmp_path, out)
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelora", *line], stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    with process:
        said = read_terminal(terminal, until="pass 1 of")
        process.send_signal(signal.SIGINT)
        said += read_terminal(terminal, until="pass(es))?")
        os.write(terminal, b"y\n")
        said += read_terminal(terminal)
        code = process.wait(60)
    os.close(terminal)
    assert code == 0 and out.is_file() and not list(out.parent.glob("*.refine")), said
    assert "written: " in said


def read_terminal(terminal: int, until: str = "") -> str:
    """What comes from a terminal up to a text, or to its end."""
    said = ""
    while not until or until not in said:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux: the other side has closed
            break
        if not part:
            break
        said += part.decode(errors="replace")
    return said


def test_the_demo_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed from the wheel there is no models/bank two folders above the package."""
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "edgelora" / "cli" / "demo.py"))
    result = run("demo")
    assert result.exit_code == 1 and not result.stdout
    assert "in the repository, not in the installed package" in result.stderr
    assert "make demo" in result.stderr


def test_the_demo_finds_this_checkout() -> None:
    root = demo._find_checkout()
    assert root == Path(__file__).resolve().parent.parent
    for example in demo.EXAMPLES:
        assert (root / "examples" / example / "heldout.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "refine", "budget"),
    [((), "auto", "60000"), (("--refine", "forward"), "forward", "20000"),
     (("--refine", "gradient", "--quick"), "gradient", "14000")],
)  # fmt: skip
def test_the_demo_passes_its_choices_on(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], refine: str, budget: str
) -> None:
    ran: dict[str, list[str]] = {}
    monkeypatch.setattr(demo, "_run", lambda command, name, words: ran.update({name: words}))
    monkeypatch.setattr(demo, "_before_and_after", lambda adapter, held_out, threads: None)
    result = run("demo", *words)
    assert result.exit_code == 0, result.output
    build = ran["build"]
    assert build[build.index("--refine") + 1] == refine
    assert build[build.index("--budget") + 1] == budget
    assert ("--limit" in ran["eval"]) == ("--quick" in words)
