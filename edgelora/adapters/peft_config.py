"""A PEFT LoRA's adapter_config.json: what it targets, and each module's rank and scale.

Matching follows PEFT (tuners_utils.check_target_module_exists, utils.other.get_pattern_key).
Patterns are the file's own regular expressions, as in PEFT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.adapters.patterns import compiled, why_refused
from edgelora.errors import InvalidFile

# Options that change what the adapter computes, in a way that a GGUF LoRA cannot express.
REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save (whole modules saved beside the LoRA)",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "megatron_config": "Megatron layers (megatron_config)",
}
# These initialisations subtract something from the base's own weights.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of training, of other initialisations or of bookkeeping: they change nothing here.
IGNORED = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "fan_in_fan_out inference_mode init_lora_weights loftq_config lora_dropout lora_ga_config "
    "megatron_core peft_version qalora_group_size revision runtime_config velora_config".split()
)
USED = frozenset(
    "alpha_pattern bias exclude_modules layers_pattern layers_to_transform lora_alpha peft_type r "
    "rank_pattern target_modules task_type use_rslora".split()
)

MAX_PATTERNS = 10_000
MAX_SHOWN = 200
_SUFFIX = r"(.*\.)?({})$"
_LAYER = r"(?:^|.*?\.){}\.(?P<layer>\d+)\."
_ANY_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT LoRA config that decides what the adapter computes."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    base_model: str

    def rank_of(self, module: str) -> int:
        """The rank of a module such as `model.layers.0.self_attn.q_proj`."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        """The module's alpha."""
        return self.alpha_pattern.get(_first_match(self.alpha_pattern, module), self.alpha)

    def alphas_of(self, module: str) -> set[float]:
        """Every alpha that a pattern gives this module; more than one leaves PEFT to the order.

        save_pretrained sorts the patterns by name, so a trained adapter and its saved form can
        differ; the saved form is what PEFT loads, and what alpha_of says.
        """
        return {
            alpha
            for key, alpha in self.alpha_pattern.items()
            if compiled(_SUFFIX.format(key)).match(module)
        }

    def scale_of(self, module: str, rank: int) -> float:
        """What multiplies lora_b @ lora_a: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would adapt this module."""
        if _excludes(self.exclude_modules, module):
            return False
        if self.target_modules is None:
            return True
        if self.target_modules == "all-linear":
            return module != "lm_head"
        if isinstance(self.target_modules, str):
            return compiled(self.target_modules).fullmatch(module) is not None
        if module in self.target_modules:
            return True
        return _has_suffix(module, self.target_modules) and self._transforms(module)

    def _transforms(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [_LAYER.format(name) for name in self.layers_pattern] or [_ANY_LAYER]
        matches = (compiled(pattern).match(module) for pattern in patterns)
        layer = next((int(match["layer"]) for match in matches if match), None)
        return layer in self.layers_to_transform


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InvalidFile: the file is missing, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{path}: not JSON", hint="Download or save it again.") from error
    if not isinstance(value, dict):
        raise InvalidFile(f"{path}: not a JSON object")
    return value


def parse_config(raw: Mapping[str, Any]) -> tuple[PeftConfig | None, list[str], list[str]]:
    """The config (None if it cannot be understood), every problem, and every warning.

    Configs of 2023 lack use_dora, use_rslora and the patterns; what is absent is off.
    """
    problems = _refusals(raw)
    warnings = [
        f"adapter_config.json: the option {key!r} is unknown and was ignored"
        for key, value in raw.items()
        if value and key not in REFUSED.keys() | IGNORED | USED
    ]
    fields = _Fields(raw, problems)
    if raw.get("use_rslora") not in (None, True, False):
        fields.wrong("use_rslora", "true or false", raw["use_rslora"])
    config = PeftConfig(
        rank=fields.rank("r", raw.get("r")),
        alpha=fields.number("lora_alpha", raw.get("lora_alpha")),
        rank_pattern={k: fields.rank(k, v) for k, v in fields.patterns("rank_pattern")},
        alpha_pattern={k: fields.number(k, v) for k, v in fields.patterns("alpha_pattern")},
        use_rslora=bool(raw.get("use_rslora")),
        target_modules=fields.names_or_pattern("target_modules"),
        exclude_modules=fields.names_or_pattern("exclude_modules") or (),
        layers_to_transform=fields.layers(),
        layers_pattern=fields.layer_names(),
        base_model=str(raw.get("base_model_name_or_path") or ""),
    )
    return (None if fields.failed else config), problems, warnings


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    problems = [f"uses {what}" for key, what in REFUSED.items() if raw.get(key)]
    if raw.get("peft_type") != "LORA":
        problems.append(f"its peft_type is {shown(raw.get('peft_type'))}, only LORA is supported")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"its task_type is {shown(raw['task_type'])}, only CAUSAL_LM is supported")
    if raw.get("bias") not in (None, "none"):
        problems.append(f"trains biases (bias = {shown(raw['bias'])})")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        problems.append(
            f"init_lora_weights {shown(init)} changed the base's weights: save it with "
            "path_initial_model_for_weight_conversion to get a plain LoRA"
        )
    return problems


class _Fields:
    """Reads typed fields, and keeps a list of what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any], problems: list[str]) -> None:
        self.raw = raw
        self.problems = problems
        self.failed = False

    def wrong(self, key: str, what: str, value: object) -> None:
        self.failed = True
        self.problems.append(f"adapter_config.json: {key} is not {what}: {shown(value)}")

    def rank(self, key: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.wrong(key, "a positive whole number", value)
        return 1

    def number(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        self.wrong(key, "a finite number", value)
        return 1.0

    def patterns(self, key: str) -> list[tuple[str, Any]]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            self.wrong(key, f"a mapping from at most {MAX_PATTERNS:,} patterns to numbers", value)
            return []
        bad = [item for item in value if self.refuses(key, item, _SUFFIX)]
        return [] if bad else list(value.items())

    def names_or_pattern(self, key: str) -> str | tuple[str, ...] | None:
        value = self.raw.get(key)
        if value is None or (isinstance(value, str) and not self.refuses(key, value)):
            return value
        if isinstance(value, str):
            return None
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        self.wrong(key, "a list of names or a pattern", value)
        return None

    def layers(self) -> tuple[int, ...]:
        value = self.raw.get("layers_to_transform")
        layers = value if isinstance(value, list) else [] if value is None else [value]
        if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            return tuple(layers)
        self.wrong("layers_to_transform", "a list of layer numbers", value)
        return ()

    def layer_names(self) -> tuple[str, ...]:
        value = self.raw.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.wrong("layers_pattern", "a list of patterns", value)
            return ()
        bad = [name for name in names if self.refuses("layers_pattern", name, _LAYER)]
        return () if bad else tuple(names)

    def refuses(self, key: str, pattern: str, template: str = "{}") -> bool:
        """Whether a pattern cannot be matched, which is then a problem of its field."""
        why = why_refused(pattern, template)
        if why:
            self.failed = True
            self.problems.append(
                f"adapter_config.json: {key} has the pattern {shown(pattern)}: {why}"
            )
        return bool(why)


def shown(value: object) -> str:
    """A value of a config for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def _first_match(patterns: Mapping[str, object], module: str) -> str:
    return next((key for key in patterns if compiled(_SUFFIX.format(key)).match(module)), module)


def _has_suffix(module: str, names: tuple[str, ...]) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _excludes(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and compiled(names).fullmatch(module) is not None
    return _has_suffix(module, names)
