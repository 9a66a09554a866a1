"""Train one LoRA for each task of a folder on a quantised base, loss on completions only.

usage: python scripts/train_bank.py BASE TASKS OUT [--steps 48] [--lr 2e-3] [--bf16] [--device cuda]

BASE   a GGUF that transformers can load (dequantised for training), or a name in models/bases.json
TASKS  <task>/train.jsonl and <task>/test.jsonl, in any format that `edgelora build --data` reads
OUT    receives <task>/adapter (a PEFT folder, F16), bank.log (a line a task: test loss, base ->
       own LoRA) and recipe.json; a task whose adapter is there is skipped: a stopped run goes on

Needs the `train` extra (torch, transformers, peft). Each task draws its own initialisation and
order of examples, seeded by its name; with --one-start all begin with the same factors. With --bf16
(autocast) 48 steps of 8 examples of about 90 tokens take two minutes on 2 CPU cores for
SmolLM2-135M. Not covered: heads that cap their logits (Gemma 2).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edgelora.bases import resolve
from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Example

Row = tuple[list[int], list[int]]  # token ids of the prompt, token ids of the completion
IGNORED = -100  # the label of a token that has no loss


@dataclass(frozen=True)
class Recipe:
    """How every adapter of a bank was trained; the model card prints it."""

    base: str
    steps: int
    batch: int
    lr: float
    rank: int
    alpha: int
    modules: tuple[str, ...]
    max_tokens: int
    n_test: int
    bf16: bool
    device: str
    one_start: bool


def main() -> None:
    """Train what is missing, one task after another."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    path = resolve(arguments.base)
    recipe = _recipe(arguments, path)
    tasks = [folder for folder in sorted(arguments.tasks.iterdir()) if _wanted(folder, arguments)]
    missing = [folder for folder in tasks if not _adapter(arguments.out, folder.name).is_dir()]
    print(f"{len(tasks)} tasks, {len(missing)} to train", flush=True)
    if not missing:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    tokenizer, base = load(path, recipe)
    for folder in missing:
        line = train_task(folder, arguments.out, tokenizer, base, recipe)
        print(line, flush=True)
        with (arguments.out / "bank.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def load(path: Path, recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer (with the GGUF's chat template) and the frozen, dequantised model."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if not tokenizer.chat_template:
        sys.exit(
            f"{path}: the GGUF has no chat template, and an adapter needs one to be trained on"
        )
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return tokenizer, model.to(recipe.device).requires_grad_(False)


def train_task(
    folder: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    recipe: Recipe,
) -> str:
    """Train and save one adapter; returns its line for bank.log. `base` is left as it was."""
    started, seed = time.monotonic(), zlib.crc32(folder.name.encode())
    train, dropped = encode_all(folder / "train.jsonl", tokenizer, recipe.max_tokens)
    test, _ = encode_all(folder / "test.jsonl", tokenizer, recipe.max_tokens)
    if dropped:
        print(f"{folder.name}: {dropped} lines left out (too long, or with control tokens)")
    if len(train) < recipe.batch or not test:
        return f"{folder.name} skipped: {len(train)} usable lines to train on, {len(test)} to test"
    torch.manual_seed(0 if recipe.one_start else seed)
    model = get_peft_model(base, _lora_config(recipe))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    test = _spread(test, recipe.n_test)
    with model.disable_adapter():
        loss_base = evaluate(base, test, recipe)
    n_tokens = fit(model, base, _batches(train, recipe, random.Random(seed)), recipe)
    loss_own = evaluate(base, test, recipe)
    save(model, _adapter(out, folder.name))
    model.unload()
    seconds = time.monotonic() - started
    speed = f"{seconds:.0f}s  {n_tokens / seconds:.0f} tok/s"
    return f"{folder.name} loss {loss_base:.3f} -> {loss_own:.3f}  {speed}"


def encode_all(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Row], int]:
    """The usable examples of a file as token ids, and how many were left out."""
    examples = read_dataset(path).examples
    rows = [row for row in (encode(example, tokenizer) for example in examples) if row]
    kept = [row for row in rows if len(row[0]) + len(row[1]) <= max_tokens]
    return kept, len(examples) - len(kept)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Row | None:
    """Prompt and completion as the chat template writes them, the completion with its end token.

    None for an example without a completion, or one that holds text the tokenizer would take for a
    control token. No BOS is added: the template writes it where the model wants one.
    """
    turns = [{"role": message.role, "content": message.content} for message in example.messages]
    texts = [turn["content"] for turn in turns] + [example.completion or ""]
    if example.completion is None or _has_control(texts, tokenizer):
        return None
    answer = [*turns, {"role": "assistant", "content": example.completion}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answer, tokenize=False)
    if not whole.startswith(prompt):
        sys.exit("the chat template writes an answered prompt differently: not supported here")
    rest = whole[len(prompt) :]
    completion = rest[: rest.index(tokenizer.eos_token) + len(tokenizer.eos_token)]
    return tuple(
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)
    )


def fit(
    model: torch.nn.Module, base: PreTrainedModel, batches: Iterator[list[Row]], recipe: Recipe
) -> int:
    """AdamW with a short warm-up and a linear decay; returns the number of tokens seen."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    n_tokens = 0
    for step in range(recipe.steps):
        rows = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1, (step + 1) / 8) * max(0.05, 1 - step / recipe.steps)
        loss_of(base, rows, recipe).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        n_tokens += sum(len(prompt) + len(completion) for prompt, completion in rows)
    return n_tokens


def evaluate(base: PreTrainedModel, rows: Sequence[Row], recipe: Recipe) -> float:
    """Mean over batches, weighted by their items, of the loss of the completion tokens."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            total += loss_of(base, part, recipe).item() * len(part)
    return total / len(rows)


def loss_of(base: PreTrainedModel, rows: Sequence[Row], recipe: Recipe) -> torch.Tensor:
    """Mean negative log-likelihood of the completion tokens; the head runs on those alone."""
    ids, labels, mask = (tensor.to(recipe.device) for tensor in _padded(rows))
    autocast = torch.autocast(recipe.device.split(":")[0], torch.bfloat16, enabled=recipe.bf16)
    with autocast:
        hidden = base.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        counted = targets != IGNORED
        logits = base.get_output_embeddings()(hidden[counted])
    return F.cross_entropy(logits.float(), targets[counted])


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the PEFT folder in F16 beside its place, then rename it: whole or absent."""
    temporary = folder.with_name("adapter.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(str(temporary))
    state = get_peft_model_state_dict(model).items()
    tensors = {name: value.to("cpu", torch.float16).contiguous() for name, value in state}
    save_file(tensors, str(temporary / "adapter_model.safetensors"), metadata={"format": "pt"})
    (temporary / "README.md").unlink(missing_ok=True)
    temporary.rename(folder)


def _padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, labels, mask = [], [], []
    for prompt, completion in rows:
        n, rest = len(prompt) + len(completion), longest - len(prompt) - len(completion)
        ids.append([*prompt, *completion] + [0] * rest)
        labels.append([IGNORED] * len(prompt) + completion + [IGNORED] * rest)
        mask.append([1] * n + [0] * rest)
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)


def _batches(rows: list[Row], recipe: Recipe, draw: random.Random) -> Iterator[list[Row]]:
    while True:
        order = draw.sample(rows, len(rows))
        for start in range(0, len(rows) - recipe.batch + 1, recipe.batch):
            yield order[start : start + recipe.batch]


def _spread(rows: list[Row], n: int) -> list[Row]:
    """At most n rows, evenly over the lengths of their prompts."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    return ordered[:: max(1, len(ordered) // n)][:n]


def _has_control(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(token in text for token in tokenizer.all_special_tokens for text in texts)


def _lora_config(recipe: Recipe) -> LoraConfig:
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=list(recipe.modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.base,
    )


def _adapter(out: Path, task: str) -> Path:
    return out / task / "adapter"


def _wanted(folder: Path, arguments: argparse.Namespace) -> bool:
    only = [part for part in arguments.only.split(",") if part]
    named = not only or any(part in folder.name for part in only)
    return named and (folder / "train.jsonl").is_file() and (folder / "test.jsonl").is_file()


def _recipe(arguments: argparse.Namespace, path: Path) -> Recipe:
    return Recipe(
        base=arguments.base_name or path.stem,
        steps=arguments.steps,
        batch=arguments.batch,
        lr=arguments.lr,
        rank=arguments.rank,
        alpha=arguments.alpha or 2 * arguments.rank,
        modules=tuple(arguments.modules.split(",")),
        max_tokens=arguments.max_tokens,
        n_test=arguments.n_test,
        bf16=arguments.bf16,
        device=arguments.device,
        one_start=arguments.one_start,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a GGUF or a name from models/bases.json")
    parser.add_argument("tasks", type=Path, help="folder with <task>/train.jsonl and test.jsonl")
    parser.add_argument("out", type=Path, help="folder for <task>/adapter, bank.log, recipe.json")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, help="default: twice the rank")
    parser.add_argument("--modules", default="q_proj,k_proj,v_proj", help="comma-separated")
    parser.add_argument("--max-tokens", type=int, default=200, help="longer lines are left out")
    parser.add_argument("--n-test", type=int, default=32, help="test lines for bank.log")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--one-start", action="store_true", help="one initialisation for all tasks")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    parser.add_argument("--only", default="", help="comma-separated parts of task names")
    parser.add_argument("--base-name", default="", help="recorded as the base of each adapter")
    return parser.parse_args()


if __name__ == "__main__":
    main()
