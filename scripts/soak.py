"""Many mixed requests with clients that go away: no leak, no stuck slot, every answer as alone.

usage: python scripts/soak.py [--requests 2000] [--clients 8] [--folder build/soak] [--seed 0]

Starts `edgelora serve` on SmolLM2 with two adapters of models/bank and sends it chats and
completions, whole and streamed, with n, stop, seed, log-probabilities, echo and a JSON schema,
embeddings and requests that must be refused, under five adapter sets, two of them weighted. A tenth
of the clients goes away: while sending, while waiting, or in the stream. Checked are

- every other answer: equal to the one that the engine gives alone, from an empty context:
  log-probabilities within 1e-3, and the same text unless the two best tokens were closer than that
  (counted; for a drawn text: unless noise of 1e-3 on the logits gives it alone too);
- private memory (RssAnon): at the end within 2 % of that after the warm-up, which is each distinct
  request three times and comes on top. It is read when nothing is computed, both times after
  prompts of one length, so that the prefixes that are kept, whose sizes vary, are as large;
- the end: no slot is taken, nothing waits, and all slots answer at once.

The base is an F32 copy of the file and the KV cache is F32: on quantised weights the shape of a
batch alone moves log-probabilities by 0.1. Exits with 1 if a check fails. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from serve_benchmark import servers
from serve_benchmark.clients import counters
from serve_benchmark.facts import BANK, ROOT, say
from serve_soak.alone import Alone, Answer, open_alone
from serve_soak.exchange import Reply, exchange
from serve_soak.questions import CHAT, EMBEDDINGS, Question, Turn, order, pool, settling
from serve_soak.verdicts import TOLERANCE, Verdict, judge, judge_refusal, judge_vectors
from serve_soak.watch import busy, growth, memory

from edgelora.bases import resolve
from edgelora.engine.model import ModelOptions
from edgelora.engine.quantize import quantize

N_SLOTS, N_CTX, PREFIX_CACHE_MB = 4, 512, 16
MAX_GROWTH = 0.02
N_BEFORE = 3  # times that each distinct request comes before those that are asked for
_TRIES = 20  # with noise
_SHOWN = 10
_SAY_EVERY = 100

Expected = list[Answer] | np.ndarray | int


@dataclass(frozen=True)
class Setting:
    """What is served: an F32 base, two adapters, and threads for it."""

    base: Path
    adapters: tuple[Path, Path]
    n_threads: int
    n_clients: int = 8


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        verdicts: of each answer, by the kind of its request.
        problems: what makes the run a failure.
        memory: bytes of RssAnon after the warm-up and at the end.
    """

    verdicts: list[tuple[str, Verdict]] = field(default_factory=list)
    n_left: Counter[str] = field(default_factory=Counter)
    memory: tuple[int, int] = (0, 0)
    counted: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def main() -> None:
    """Prepare the base, run, print the figures."""
    arguments = _arguments()
    base = arguments.folder / "smollm2-f32.gguf"
    if not base.is_file():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        quantize(resolve("smollm2-135m-instruct"), base, "f32")
    first, second = sorted(BANK.glob("*.gguf"))[:2]
    setting = Setting(base, (first, second), ModelOptions().threads(), arguments.clients)
    outcome = soak(setting, arguments.requests, arguments.seed)
    print("\n".join(report(outcome)))
    sys.exit(bool(outcome.problems))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="sent after the warm-up")
    parser.add_argument("--clients", type=int, default=8, help="how many at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "soak")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the requests")
    return parser.parse_args()


def soak(setting: Setting, n_requests: int, seed: int) -> Outcome:
    """Compute every distinct answer alone, then ask the server for them all, many times."""
    paths = {path.stem: path for path in setting.adapters}
    questions = pool(setting.base.stem, *paths)
    before = order(questions, N_BEFORE * len(questions), seed)
    turns = order(questions, n_requests, seed + 1)
    threads = {"n_threads": setting.n_threads, "n_ctx": N_CTX}
    with open_alone(setting.base, paths, **threads) as alone:
        started = time.perf_counter()
        expected = [_expected(alone, question) for question in questions]
        say(f"{len(questions)} answers alone in {time.perf_counter() - started:.0f} s")
        return _served(setting, alone, questions, expected, before, turns)


def _expected(alone: Alone, question: Question) -> Expected:
    if question.status != 200:
        return question.status
    return (alone.vectors if question.path == EMBEDDINGS else alone.answers)(question)


def _served(
    setting: Setting,
    alone: Alone,
    questions: Sequence[Question],
    expected: Sequence[Expected],
    before: Sequence[Turn],
    turns: Sequence[Turn],
) -> Outcome:
    outcome = Outcome()
    started_with = servers.Setting(setting.base, setting.n_threads, N_SLOTS, N_CTX)
    options = ["--kv-type", "f32", "--prefix-cache", str(PREFIX_CACHE_MB)]
    volley = [Turn(i, False) for i, q in enumerate(questions) if q.path == CHAT][:N_SLOTS]
    replies: list[tuple[Turn, Reply | None]] = []
    with servers.edgelora(started_with, setting.adapters, options=options) as server:
        started = time.perf_counter()
        sizes = []
        for number, part in enumerate((before, turns)):
            replies += _send(server.port, setting.n_clients, questions, part)
            outcome.problems += [f"stuck: {held}" for held in [busy(server.port)] if held]
            outcome.problems += _settle(server.port, settling(setting.base.stem, number))
            sizes.append(memory(server.pid))
        outcome.memory = sizes[0], sizes[1]
        outcome.elapsed_s = time.perf_counter() - started
        outcome.counted = counters(server.port)
        replies += _send(server.port, N_SLOTS, questions, volley)
    for turn, reply in replies:
        question = questions[turn.question]
        if reply is None:
            outcome.n_left[turn.leaves] += 1
        else:
            verdict = _judge(alone, question, expected[turn.question], reply)
            outcome.verdicts.append((question.kind, verdict))
    _conclude(outcome)
    return outcome


def _settle(port: int, questions: Sequence[Question]) -> list[str]:
    """Ask one after the other; what went wrong."""
    replies = _send(port, 1, questions, [Turn(i, False) for i in range(len(questions))])
    return [f"settling: {reply}" for _, reply in replies if reply is None or reply.status != 200]


def _send(
    port: int, n_clients: int, questions: Sequence[Question], turns: Sequence[Turn]
) -> list[tuple[Turn, Reply | None]]:
    """Every turn, by `n_clients` with one request at a time each."""
    lock, n_done = threading.Lock(), 0

    def one(turn: Turn) -> Reply | None:
        nonlocal n_done
        try:
            return exchange(port, questions[turn.question], turn)
        except (OSError, ValueError) as error:
            return Reply(0, error={"message": repr(error)})
        finally:
            with lock:
                n_done += 1
                if n_done % _SAY_EVERY == 0:
                    say(f"  {n_done} of {len(turns)} requests")

    with ThreadPoolExecutor(n_clients) as clients:
        return list(zip(turns, clients.map(one, turns), strict=True))


def _judge(alone: Alone, question: Question, expected: Expected, reply: Reply) -> Verdict:
    if isinstance(expected, int):
        return judge_refusal(reply, expected)
    if isinstance(expected, np.ndarray):
        return judge_vectors(reply, expected)
    may_part = partial(_given_with_noise, alone, question)
    return judge(question, reply, expected, may_part)


def _given_with_noise(alone: Alone, question: Question, choice: int, text: str) -> bool:
    """Whether the engine alone gives a text too, with noise on its logits.

    For texts that are drawn or follow a grammar: there the two best tokens decide nothing.
    """
    assert isinstance(question.body, dict)
    if not (question.body["temperature"] or "response_format" in question.body):
        return False
    rng = np.random.default_rng(0)
    tries = (alone.answers(question, TOLERANCE, rng)[choice].text for _ in range(_TRIES))
    return any(given == text for given in tries)


def _conclude(outcome: Outcome) -> None:
    """Add what is wrong with the figures to the problems."""
    outcome.problems += [f"{kind}: {v.wrong}" for kind, v in outcome.verdicts if v.wrong]
    outcome.problems += [wrong for wrong in [growth(*outcome.memory, MAX_GROWTH)] if wrong]


def report(outcome: Outcome) -> list[str]:
    """The figures, a line each."""
    verdicts = [verdict for _, verdict in outcome.verdicts]
    n_sent = len(verdicts) + sum(outcome.n_left.values())
    before, after = outcome.memory
    counted = outcome.counted
    left = ", ".join(f"{n} {manner}" for manner, n in sorted(outcome.n_left.items()))
    lines = [
        f"requests          {n_sent} in {outcome.elapsed_s:.0f} s; "
        f"{counted['llamacpp:tokens_predicted_total']:.0f} tokens generated, "
        f"{counted['llamacpp:prompt_tokens_total']:.0f} prompt tokens computed, "
        f"{counted['llamacpp:prompt_tokens_cached_total']:.0f} cached",
        f"clients that left {sum(outcome.n_left.values())} ({left}); the server noticed "
        f"{counted['edgelora_requests_cancelled_total']:.0f} in the queue or in a slot",
        f"answers           {len(verdicts)}, equal to alone "
        f"{sum(not v.wrong for v in verdicts)}, of these other text at a tie "
        f"{sum(v.n_ties for v in verdicts)}",
        f"differences       at most {max(v.worst for v in verdicts):.1e} "
        f"(bound {TOLERANCE:.0e}) of {sum(v.n_compared for v in verdicts)} numbers; median of the "
        f"answers' worst {statistics.median([v.worst for v in verdicts if v.n_compared]):.1e}",
        f"RssAnon           {before / 1e6:.1f} MB after the warm-up, {after / 1e6:.1f} MB at the "
        f"end ({after / before - 1:+.2%}, bound {MAX_GROWTH:.0%})",
    ]
    lines += [f"  {kind:<18}{line}" for kind, line in _by_kind(outcome.verdicts).items()]
    lines += [f"PROBLEM: {problem}" for problem in outcome.problems[:_SHOWN]]
    if len(outcome.problems) > _SHOWN:
        lines.append(f"PROBLEM: and {len(outcome.problems) - _SHOWN} more")
    return [*lines, "soak: " + ("failed" if outcome.problems else "passed")]


def _by_kind(verdicts: Sequence[tuple[str, Verdict]]) -> Mapping[str, str]:
    kinds = sorted({kind for kind, _ in verdicts})
    grouped = {kind: [v for k, v in verdicts if k == kind] for kind in kinds}
    return {
        kind: f"{len(group)} answers, {sum(not v.wrong for v in group)} right, "
        f"worst {max(v.worst for v in group):.1e}"
        for kind, group in grouped.items()
    }


if __name__ == "__main__":
    main()
