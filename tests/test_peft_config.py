"""adapter_config.json: matching as PEFT does it, and every option that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from edgelora.adapters.patterns import why_refused
from edgelora.adapters.peft_config import REFUSED, PeftConfig, parse_config

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"


def config_of(**changes: Any) -> PeftConfig:
    config, problems, warnings = parse_config(PLAIN | changes)
    assert config is not None
    assert not problems
    assert not warnings
    return config


def problems_of(**changes: Any) -> list[str]:
    return parse_config(PLAIN | changes)[1]


def test_a_config_of_2023() -> None:
    config = config_of(bias="none", fan_in_fan_out=False, task_type="CAUSAL_LM")
    assert (config.rank_of(Q0), config.alpha_of(Q0), config.scale_of(Q0, 8)) == (8, 16.0, 2.0)


def test_rslora_divides_by_the_root() -> None:
    assert config_of(use_rslora=True).scale_of(Q0, 16) == 4.0


def test_patterns_match_a_suffix_and_the_first_wins() -> None:
    config = config_of(
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 4, "proj": 6},
        alpha_pattern={r"^model\.layers\.0\..*": 3, r".*\.(q|k)_proj": 5},
    )
    assert config.rank_of(Q1) == 2
    assert config.rank_of(Q0) == 4
    assert config.rank_of("model.layers.11.self_attn.q_proj") == 4
    assert config.rank_of("model.layers.0.self_attn.v_proj") == 8  # "proj" is no whole suffix
    assert config.alpha_of(Q0) == 3.0
    assert config.alpha_of(Q1) == 5.0
    assert config.alpha_of("model.layers.1.mlp.up_proj") == 16.0
    assert config.alphas_of(Q0) == {3.0, 5.0}


def test_targets_by_list_pattern_and_exclusion() -> None:
    assert config_of().targets(Q0)
    assert not config_of().targets("model.layers.0.self_attn.k_proj")
    assert not config_of(target_modules=["proj"]).targets(Q0)
    assert config_of(target_modules=[Q1]).targets(Q1)
    assert not config_of(target_modules=[Q1]).targets(Q0)
    pattern = config_of(target_modules=r".*layers\.0.*\.(q|v)_proj")
    assert pattern.targets(Q0)
    assert not pattern.targets(Q1)
    assert not config_of(exclude_modules=["q_proj"]).targets(Q0)
    assert not config_of(exclude_modules=r".*\.0\..*").targets(Q0)
    assert config_of(target_modules="all-linear").targets(Q0)
    assert not config_of(target_modules="all-linear").targets("lm_head")
    assert config_of(target_modules=None).targets(Q0)


def test_layers_to_transform() -> None:
    assert config_of(layers_to_transform=[1]).targets(Q1)
    assert not config_of(layers_to_transform=[1]).targets(Q0)
    assert config_of(layers_to_transform=0).targets(Q0)
    assert config_of(layers_to_transform=[]).targets(Q0)
    assert config_of(layers_to_transform=[1], layers_pattern="layers").targets(Q1)
    assert not config_of(layers_to_transform=[1], layers_pattern=["h"]).targets(Q1)
    assert config_of(layers_to_transform=[1], target_modules=[Q0]).targets(Q0)  # as PEFT does


@pytest.mark.parametrize("key", REFUSED)
def test_each_refused_option_is_named(key: str) -> None:
    assert [key in problem for problem in problems_of(**{key: {"x": 1}})] == [True]
    assert not problems_of(**{key: None})
    assert not problems_of(**{key: False})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "ADALORA"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "lora_only"}, "biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"init_lora_weights": "olora"}, "changed the base"),
        ({"r": 0}, "r is not"),
        ({"r": "8"}, "r is not"),
        ({"r": True}, "r is not"),
        ({"lora_alpha": float("nan")}, "lora_alpha is not"),
        ({"lora_alpha": None}, "lora_alpha is not"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj is not"),
        ({"alpha_pattern": {"q_proj": "2"}}, "q_proj is not"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern has the pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is not"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": [1]}, "target_modules is not"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is not"),
        ({"layers_pattern": "("}, "layers_pattern has the pattern"),
        ({"use_rslora": "no"}, "use_rslora is not"),
        ({"target_modules": "(a+)+$"}, "could take forever"),
        ({"exclude_modules": "(.*.*.*.*.*.*)!"}, "could take forever"),
        ({"rank_pattern": {"(a|a)*b": 4}}, "could take forever"),
        ({"layers_pattern": ["(.*)*"]}, "could take forever"),
        ({"rank_pattern": {str(i): 4 for i in range(10_001)}}, "at most 10,000 patterns"),
    ],
)
def test_each_bad_value_is_named(changes: dict[str, Any], words: str) -> None:
    assert [words in problem for problem in problems_of(**changes)] == [True]


def test_all_problems_at_once() -> None:
    assert len(problems_of(use_dora=True, lora_bias=True, r=0, bias="all")) == 4


def test_harmless_options_are_quiet_and_unknown_ones_are_not() -> None:
    config_of(init_lora_weights="gaussian", loftq_config={}, peft_version="0.21.2")
    config_of(init_lora_weights=True, runtime_config={"x": 1}, qalora_group_size=16)
    warnings = parse_config(PLAIN | {"use_flux": True, "use_later": None})[2]
    assert [("use_flux" in warning) for warning in warnings] == [True]


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj|linear).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [UNSLOTH, r"^(?!.*visual).*(?:q_proj|k_proj).*", r".*\.(\d+)\..*\.(q|k|v)_proj", "a{3}"],
)
def test_patterns_that_tools_write_are_matched(pattern: str) -> None:
    assert why_refused(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a?)*", "(a|a)*b", "(?:(?:a{1,9}){1,9})!", "a?" * 30 + "a" * 30, "(a|a)" * 30,
     "(?=(a+)+b)", ".*" * 5 + "x", "(?>(a+)+)", "(a)?(?(1)(b+)+|c)", "a" * 60_000],
)  # fmt: skip
def test_patterns_that_could_take_forever_are_refused(pattern: str) -> None:
    assert why_refused(pattern)
