"""A config is strict: what goes out as JSON comes back the same, and a mistake is a ValueError that says what to do."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monosem.config import (
    EvalConfig,
    HarvestConfig,
    RunConfig,
    TrainConfig,
    changed_fields,
    from_dict,
    to_dict,
)

CONFIGS = [
    HarvestConfig(out="store"),
    TrainConfig(out="run", store="store"),
    EvalConfig(run="run"),
    RunConfig(),
    HarvestConfig(out="store", layer=3, revision="main", dtype="float32"),
    TrainConfig(out="run", store="store", activation="relu", sparsity_coef=0.1, lr=1e-3, ema=0.0, clip_norm=1.0),
    TrainConfig(out="run", store="store", activation="prolu", activation_options={"ste": 0.0}),
    RunConfig(out="elsewhere", train=TrainConfig(out="", store="", n_latents=64, k=4)),
]


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"out": "run", "store": "store", **changes})


def harvest(**changes: Any) -> HarvestConfig:
    return HarvestConfig(**{"out": "store", **changes})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_round_trips(config: Any) -> None:
    text = json.dumps(to_dict(config), allow_nan=False)
    assert from_dict(type(config), json.loads(text)) == config


@given(
    n_latents=st.integers(1, 2**24),
    lr=st.none() | st.floats(1e-6, 1.0),
    ema=st.none() | st.floats(0, 1, exclude_max=True),
    auxk_coef=st.floats(0, 10),
    text=st.text(max_size=20),
)
def test_json_round_trips_exactly(
    n_latents: int, lr: float | None, ema: float | None, auxk_coef: float, text: str
) -> None:
    config = train(out=text, n_latents=n_latents, k=1, lr=lr, ema=ema, auxk_coef=auxk_coef)
    again = from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config


def test_an_integer_may_stand_for_a_float_in_json_and_becomes_one() -> None:
    config = from_dict(TrainConfig, {**to_dict(train()), "lr": 1})
    assert config.lr == 1.0
    assert type(config.lr) is float
    prolu = train(activation="prolu", activation_options={"ste": 0})
    options = from_dict(TrainConfig, to_dict(prolu)).activation_options
    assert options == {"ste": 0.0} and type(options["ste"]) is float
    with pytest.raises(ValueError, match=r"activation_options\.ste is '1'; it must be float"):
        from_dict(TrainConfig, {**to_dict(prolu), "activation_options": {"ste": "1"}})


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: type(config).__name__)
def test_a_config_is_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.out = "elsewhere"


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: type(config).__name__)
def test_from_dict_refuses_an_unknown_key_and_names_the_known_ones(config: Any) -> None:
    first = dataclasses.fields(config)[0].name
    with pytest.raises(ValueError, match=rf"{type(config).__name__} has no field latnets; it has .*{first}"):
        from_dict(type(config), {**to_dict(config), "latnets": 1})


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: type(config).__name__)
def test_from_dict_refuses_any_missing_key(config: Any) -> None:
    for name in to_dict(config):
        rest = {key: value for key, value in to_dict(config).items() if key != name}
        with pytest.raises(ValueError, match=rf"{type(config).__name__} lacks {name}"):
            from_dict(type(config), rest)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("k", "32", "int"),
        ("k", 32.0, "int"),
        ("k", True, "int"),
        ("k", None, "int"),
        ("lr", "1e-3", "float or NoneType"),
        ("auxk", 1.5, "int or NoneType"),
        ("auxk_coef", True, "float"),
        ("tied_init", 1, "bool"),
        ("out", 3, "str"),
        ("activation", 3, "str"),
        ("activation_options", 3, "a JSON object"),
        ("precision", "fp16", "fp32, bf16, int8"),
        ("impl", None, "auto, reference, torch, native"),
    ],
)
def test_from_dict_refuses_a_value_of_another_type(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{name} is .*{allowed}"):
        from_dict(TrainConfig, {**to_dict(train()), name: value})


def test_from_dict_reads_lists_as_tuples_and_checks_what_is_in_them() -> None:
    config = HarvestConfig("store", layers=(3, 5))
    assert from_dict(HarvestConfig, json.loads(json.dumps(to_dict(config)))) == config
    for wrong, said in ((3, "layers is 3; it must be a JSON list"), ([3, "x"], r"layers\[1\] is 'x'; it must be int")):
        with pytest.raises(ValueError, match=said):
            from_dict(HarvestConfig, {**to_dict(config), "layers": wrong})


def test_from_dict_refuses_a_mistake_inside_a_stage_of_a_run() -> None:
    data = to_dict(RunConfig())
    data["harvest"]["context_lenght"] = 64
    with pytest.raises(ValueError, match="HarvestConfig has no field context_lenght"):
        from_dict(RunConfig, data)
    with pytest.raises(ValueError, match="TrainConfig must be a JSON object, not int"):
        from_dict(RunConfig, {**to_dict(RunConfig()), "train": 3})


@pytest.mark.parametrize("data", [[], "run", None])
def test_from_dict_refuses_what_is_no_object(data: Any) -> None:
    with pytest.raises(ValueError, match="EvalConfig must be a JSON object"):
        from_dict(EvalConfig, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 1}, "context_length is 1; it must be at least 2"),
        ({"n_tokens": 0}, "n_tokens is 0; it must be at least 1"),
        ({"n_tokens_held_out": 0}, "n_tokens_held_out is 0; it must be at least 1"),
        ({"block_contexts": 0}, "block_contexts is 0; it must be at least 1"),
        ({"shard_blocks": -1}, "shard_blocks is -1; it must be at least 1"),
        ({"dtype": "float16"}, "dtype is 'float16'; choose one of auto, bfloat16, float32"),
        ({"held_out_fraction": 0.0}, "held_out_fraction is 0.0; give a share between 0 and 1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0; give a share between 0 and 1"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction is nan"),
        ({"layer": -1}, "layer is -1; layers count from 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808; give a whole number from 0"),
    ],
)
def test_harvest_config_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harvest(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name} is 0; it must be at least 1") for name in ("n_latents", "k", "n_tokens", "batch_size")),
        ({"log_every_steps": 0}, "log_every_steps is 0; it must be at least 1"),
        *(
            ({name: -1}, f"{name} is -1; it must be at least 0")
            for name in ("lr_warmup_steps", "sparsity_warmup_steps", "auxk_coef", "sparsity_coef", "save_every_s")
        ),
        ({"auxk_coef": float("nan")}, "auxk_coef is nan; it must be at least 0"),
        ({"activation": "gelu"}, "activation is 'gelu'; choose one of batch_topk, .*prolu, relu, topk"),
        ({"impl": "cuda"}, "impl is 'cuda'; choose one of auto, reference, torch, native"),
        ({"precision": "int4"}, "precision is 'int4'; choose one of auto, fp32, bf16, int8"),
        ({"k": 65, "n_latents": 64}, "k is 65 but there are only 64 latents; lower k or raise n_latents"),
        ({"sparsity_coef": 0.1}, "sparsity_coef has no effect with activation=topk"),
        ({"activation": "relu", "auxk": 8}, "auxk has no effect with activation=relu"),
        ({"sparsity_warmup_steps": 5}, "sparsity_warmup_steps has no effect without sparsity_coef"),
        ({"activation": "relu", "auxk_coef": 0.5}, "auxk_coef has no effect without AuxK"),
        ({"auxk": 0, "auxk_coef": 0.5}, "auxk_coef has no effect without AuxK"),
        ({"impl": "reference", "precision": "bf16"}, "precision=bf16 has no effect"),
        ({"activation": "relu", "precision": "bf16"}, "precision=bf16 has no effect"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"n_tokens": 100, "batch_size": 101}, "n_tokens is 100, less than one batch of 101; raise n_tokens"),
        ({"ema": 1.0}, r"ema is 1.0; give a coefficient in \[0, 1\)"),
        ({"ema": -0.1}, r"ema is -0.1; give a coefficient in \[0, 1\)"),
        *(
            ({name: value}, f"{name} is {value}; give a positive number or leave it unset")
            for name in ("lr", "clip_norm", "dead_tokens_threshold")
            for value in (0, -1)
        ),
        ({"lr": float("nan")}, "lr is nan; give a positive number"),
        ({"lr": float("inf")}, "lr is inf; give a positive number"),
        ({"sparsity_coef": float("inf")}, "sparsity_coef is inf; it must be at least 0 and finite"),
    ],
)
def test_train_config_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens_downstream": 0}, "n_tokens_downstream is 0; it must be at least 1"),
        ({"n_bootstrap": 19}, "n_bootstrap is 19; it must be at least 20"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
    ],
)
def test_eval_config_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(run="run", **changes)


@pytest.mark.parametrize(
    "stage",
    [
        {"harvest": HarvestConfig(out="mine")},
        {"train": TrainConfig(out="mine", store="")},
        {"train": TrainConfig(out="", store="mine")},
        {"eval": EvalConfig(run="mine")},
        {"eval": EvalConfig(run="", store="mine")},
    ],
)
def test_run_config_refuses_a_folder_of_a_stage(stage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="folders follow from out"):
        RunConfig(**stage)


def test_what_is_allowed_at_the_edge_builds() -> None:
    train(k=64, n_latents=64, ema=0.0, auxk=0, auxk_coef=0.0, n_tokens=5, batch_size=5)
    train(activation="relu", n_latents=8, auxk=0, sparsity_coef=0.1, sparsity_warmup_steps=1, seed=2**63 - 1)
    harvest(context_length=2, layer=0)
    EvalConfig(run="run", n_bootstrap=20)


def test_changed_fields_lists_old_and_new() -> None:
    assert changed_fields({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 -> 3"]
    assert changed_fields({"a": 1}, {"a": 1}) == []
