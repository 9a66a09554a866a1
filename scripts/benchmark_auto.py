"""How often `model: "auto"` picks the right adapter: held-out lines of a bank's tasks, and others.

    python scripts/benchmark_auto.py TASKS BANK results/auto.jsonl --page docs/serve.md

TASKS holds `<task>/test.jsonl` for each adapter of BANK, by name; the adapters were not trained on
those lines and no signature holds them. For each way to score, lines of a task are routed with its
adapter there (is it taken?) and without it and its siblings of the same source (is the base?).
`--foreign FILE` (.jsonl or .jsonl.gz of task and prompt) adds one line of each further task.
A line of JSON is appended to the results, and the marked block of the page is written from it;
`--only-page` does the latter alone. Embeddings are cached, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from result_lines import append_line

from edgelora.adapters.merge import one_blas_thread
from edgelora.bank import Bank, open_bank
from edgelora.bases import resolve
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Message
from edgelora.embedding_cache import open_cache
from edgelora.engine.context import open_context
from edgelora.engine.model import Model, ModelOptions, open_model
from edgelora.engine.prepare import model_template
from edgelora.operators.routing import SCORES, Cloud, Routes, fit_routes, project
from edgelora.serve.routing import plain_prompt, read_clouds
from edgelora.summarise import embed_cached, sample_examples

Array = NDArray[np.float64]
Turns = tuple[Message, ...]
Texts = dict[str, list[tuple[str, Turns]]]  # kind of line -> (its task, its messages)


@dataclass(frozen=True)
class Lines:
    """Embedded lines of one kind: (n,) tasks, (n, p) projected embeddings."""

    tasks: list[str]
    points: Array

    def of(self, task: str) -> Array:
        """Those of one task."""
        return self.points[[name == task for name in self.tasks]]


def main() -> None:
    """Measure, append, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("bank", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--foreign", type=Path, help="lines of tasks that the bank does not have")
    parser.add_argument("--page", type=Path, help="whose marked block is written")
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--n-lines", type=int, default=16, help="of each task")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.only_page:
        row = measure(arguments)
        append_line(arguments.results, row)
    told = report(read_results(arguments.results)[-1])
    print(told)
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(filled(text, told), encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report tells, for one bank and one base."""
    bank = open_bank(arguments.bank)
    names = [record.name for record in bank.records()]
    texts = held_out(arguments.tasks, names, arguments.n_lines, arguments.seed)
    if arguments.foreign:
        texts["foreign"] = foreign_lines(arguments.foreign, arguments.seed)
    options = ModelOptions(n_threads=arguments.threads)
    with open_model(resolve(arguments.base), options) as model:
        lines, n_tokens = embed_all(model, texts)
        clouds = clouds_of(bank, model.base.identity.id)
    with one_blas_thread():
        methods = [measure_method(name, clouds, lines["plain"]) for name in SCORES]
        begun = time.perf_counter()
        routes = fit_routes(clouds, [])
        fit_s = time.perf_counter() - begun
    row: dict[str, Any] = {
        "code": git_commit(),
        "machine": f"{platform.machine()}, {platform.python_version()}",
        "base": arguments.base,
        "n_adapters": len(clouds),
        "n_lines": arguments.n_lines,
        "seed": arguments.seed,
        "n_tokens": n_tokens,
        "fit_s": round(fit_s, 3),
        "methods": methods,
        "other_texts": {kind: shares(routes, lines[kind]) for kind in ("rendered", "bare")},
    }
    if arguments.foreign:
        row["foreign"] = measure_foreign(routes, clouds, lines["foreign"])
    return row


def held_out(tasks: Path, names: Sequence[str], n_lines: int, seed: int) -> Texts:
    """Test lines of each task: as they are, and without the instruction that they begin with."""
    plain, bare = [], []
    for name in names:
        examples = read_dataset(tasks / name / "test.jsonl").examples
        for example in sample_examples(examples, n_lines, seed):
            plain.append((name, example.messages))
            last = example.messages[-1]
            without = last.content.partition("\n\n")[2] or last.content
            bare.append((name, (*example.messages[:-1], Message(last.role, without))))
    return {"plain": plain, "rendered": plain, "bare": bare}


def foreign_lines(path: Path, seed: int) -> list[tuple[str, Turns]]:
    """One line of each task of a file."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open()
    prompts: dict[str, list[str]] = {}
    with opened as file:
        for line in file:
            row = json.loads(line)
            prompts.setdefault(row["task"], []).append(row["prompt"])
    return [
        (task, (Message("user", random.Random(seed).choice(prompts[task])),))
        for task in sorted(prompts)
    ]


def embed_all(model: Model, texts: Texts) -> tuple[dict[str, Lines], int]:
    """Every line under the base; all but the rendered ones as the plain texts that they are."""
    template, vocabulary = model_template(model), model.vocabulary
    found, n_tokens = {}, 0
    with open_context(model, hidden=True) as context, open_cache() as cache:
        for kind, rows in texts.items():
            print(f"embedding {len(rows)} lines: {kind}", file=sys.stderr, flush=True)
            ids = [
                tuple(vocabulary.tokenize_segments(template.render(turns)))
                if kind == "rendered"
                else plain_prompt(vocabulary, [vars(turn) for turn in turns])
                for _, turns in rows
            ]
            n_tokens += sum(map(len, ids))
            points = project(embed_cached(context, ids, cache=cache))
            found[kind] = Lines([task for task, _ in rows], points)
    return found, n_tokens


def clouds_of(bank: Bank, base_id: str) -> Mapping[str, Cloud]:
    """The prompts of each adapter's dataset, as a server that serves the whole bank reads them."""
    served = {record.name: record.path for record in bank.records()}
    return read_clouds(served, base_id, bank.path)[0]


def measure_method(name: str, clouds: Mapping[str, Cloud], lines: Lines) -> dict[str, Any]:
    """Choices with each task's adapter there, and the share accepted where it is not."""
    routes = fit_routes(clouds, [], method=name)
    accepted = []
    for task in clouds:
        left = {other: c for other, c in clouds.items() if not c.is_sibling(clouds[task])}
        without = fit_routes(left, [], method=name)
        accepted.append(float((best(without, lines.of(task))[1]).mean()))
    nearest, _ = best(routes, lines.points)
    siblings = [clouds[n].is_sibling(clouds[t]) for n, t in zip(nearest, lines.tasks, strict=True)]
    return {
        "method": name,
        "threshold": round(routes.threshold, 4),
        "same_source": float(np.mean(siblings)),
        **shares(routes, lines),
        "left_out_accepted": float(np.mean(accepted)),
        "left_out_interval": interval(accepted, [clouds[task].sources for task in clouds]),
    }


def shares(routes: Routes, lines: Lines) -> dict[str, float]:
    """How often a line's own adapter is nearest, is taken, another is taken, or the base is."""
    nearest, accepted = best(routes, lines.points)
    own = np.array([n == t for n, t in zip(nearest, lines.tasks, strict=True)])
    return {
        "nearest": float(own.mean()),
        "taken": float((own & accepted).mean()),
        "other_taken": float((~own & accepted).mean()),
        "base": float((~accepted).mean()),
    }


def best(routes: Routes, points: Array) -> tuple[list[str], NDArray[np.bool_]]:
    """The nearest dataset of each line, and whether it passes the threshold."""
    scores = routes.score(points)
    return [routes.names[i] for i in scores.argmax(axis=1)], scores.max(axis=1) > routes.threshold


def measure_foreign(
    routes: Routes, clouds: Mapping[str, Cloud], lines: Lines
) -> dict[str, dict[str, float]]:
    """What is accepted of other tasks, apart for those named after the source of an adapter."""
    sources = {source for cloud in clouds.values() for source in cloud.sources}
    known = np.array([any(f"_{source}_" in f"_{t}_" for source in sources) for t in lines.tasks])
    _, accepted = best(routes, lines.points)
    return {
        what: {"n": int(chosen.sum()), "accepted": float(accepted[chosen].mean())}
        for what, chosen in (("same_source", known), ("other_source", ~known))
        if chosen.any()
    }


def interval(values: Sequence[float], sources: Sequence[frozenset[str]]) -> list[float]:
    """95 % bootstrap interval of a mean over tasks; those of one source are drawn together."""
    groups: dict[frozenset[str], list[float]] = {}
    for value, source in zip(values, sources, strict=True):
        groups.setdefault(source, []).append(value)
    pools = list(groups.values())
    rng = np.random.default_rng(0)
    means = [
        np.mean(np.concatenate([pools[i] for i in rng.integers(len(pools), size=len(pools))]))
        for _ in range(2_000)
    ]
    return [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])]


def git_commit() -> str:
    """The commit of this checkout, marked where the code that decides the numbers differs."""
    root = Path(__file__).parent.parent
    decides = ["edgelora/operators", "edgelora/signature", "edgelora/summarise.py", __file__]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=7", "HEAD")
    if not commit:
        return "no checkout"
    return commit + ("-dirty" if git("status", "--porcelain", "--", *decides) else "")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Every run, the latest last."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(row: dict[str, Any]) -> str:
    """The table in Markdown, and what is said below it."""
    lines = [
        "| score | own adapter nearest | same source nearest | own adapter taken | another taken |"
        " base | task left out: accepted |",
        "|---|" + "---:|" * 6,
    ]
    for m in row["methods"]:
        low, high = m["left_out_interval"]
        cells = [m[key] for key in ("nearest", "same_source", "taken", "other_taken", "base")]
        told = " | ".join(f"{100 * cell:.1f} %" for cell in cells)
        left_out = f"{100 * m['left_out_accepted']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(f"| {m['method']} | {told} | {left_out} |")
    chosen = row["methods"][0]
    lines += [
        "",
        f"- {row['n_adapters']} tasks, {row['n_lines']} held-out lines each; base {row['base']}; "
        f"`auto` uses {chosen['method']}, threshold {chosen['threshold']:.2f} nats, fitted in "
        f"{row['fit_s']:.2f} s.",
    ]
    for kind, what in (
        ("bare", "The same lines without their instruction"),
        ("rendered", "Embedded as the chat template renders them, which `auto` does not do"),
    ):
        s = {key: f"{100 * value:.1f} %" for key, value in row["other_texts"][kind].items()}
        lines.append(
            f"- {what}: own adapter nearest {s['nearest']}, taken {s['taken']}, another taken "
            f"{s['other_taken']}, base {s['base']}."
        )
    for key, what in (
        ("other_source", "not named after the source of any adapter"),
        ("same_source", "named after the source of an adapter"),
    ):
        if told := row.get("foreign", {}).get(key):
            lines.append(f"- {told['n']} other tasks {what}, a line each: accepted "
                         f"{100 * told['accepted']:.1f} %.")  # fmt: skip
    return "\n".join([*lines, f"- Measured on the code of {row['code']}."])


def filled(page: str, told: str) -> str:
    """The page with the report between its marks."""
    pattern = re.compile(r"(<!-- auto -->\n).*?(<!-- /auto -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit("the page has no block <!-- auto --> ... <!-- /auto -->")
    return pattern.sub(lambda found: found[1] + told + "\n" + found[2], page)


if __name__ == "__main__":
    main()
