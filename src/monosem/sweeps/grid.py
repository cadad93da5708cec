"""Which runs does a grid file ask for, and what are they called?

    {"base": {"n_tokens": 4194304}, "grid": {"n_latents": [1024, 4096], "k": [16, 32]}, "runs": [{"k": 8, "lr": 1e-3}]}

`base` holds fields of TrainConfig that differ from the defaults in every run, `grid` lists values whose every
combination is a run, `runs` lists further runs by what they change. Nothing in a grid is skipped or guessed.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from monosem import artifacts, variants
from monosem.config import SweepConfig, TrainConfig, activation_facts, changed_fields, from_dict, to_dict

_OWNED = {"out": "it follows from the sweep's --out and the run's name", "save_every_s": "give --save-every-s"}
_SHORT = {"activation": "", "n_latents": "n", "n_tokens": "tokens", "batch_size": "batch"}
_NAMED_FIRST = ("activation", "n_latents", "k")


def runs(config: SweepConfig) -> list[TrainConfig]:
    """The runs that the grid file asks for, in its order, `out` still empty; `ValueError` names the run at fault."""
    asked = artifacts.read_json(config.grid)
    if not isinstance(asked, dict) or (unknown := sorted(set(asked) - {"base", "grid", "runs"})):
        said = f"has {', '.join(unknown)}" if isinstance(asked, dict) else "is not a JSON object"
        raise ValueError(f"{config.grid} {said}; give an object with base, grid, runs")
    base, axes, listed = asked.get("base", {}), asked.get("grid", {}), asked.get("runs", [])
    if not isinstance(base, dict) or not isinstance(axes, dict) or not isinstance(listed, list):
        raise ValueError(f"{config.grid}: base and grid must be JSON objects, runs a list of them")
    if wrong := [name for name, values in axes.items() if not isinstance(values, list) or not values]:
        raise ValueError(f"{config.grid}: grid.{wrong[0]} must be a list of at least one value")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    changes = [*(combinations if axes else []), *listed]
    if not changes:
        raise ValueError(f"{config.grid} asks for no run; list values under grid, or runs under runs")
    found = [_run(config, base, change) for change in changes]
    seen: dict[str, dict[str, Any]] = {}
    for run, change in zip(found, changes, strict=True):
        if seen.setdefault(key := json.dumps(to_dict(run), sort_keys=True), change) is not change:
            raise ValueError(f"{config.grid} asks twice for the same run ({seen[key]} and {change}); drop one")
    return found


def names(found: list[TrainConfig], taken: set[str], new: list[bool]) -> list[str]:
    """A readable, unique name for each `new` run of `found`, such as topk-n4096-k32-lr0.002-seed0.

    It says the activation, n and k, and what else varies among `found` (not where it is left to its default, None).
    """
    settings = [to_dict(run) for run in found]
    fields = [name for name in settings[0] if len({json.dumps(each[name]) for each in settings}) > 1]
    shown = [*_NAMED_FIRST, *(name for name in fields if name not in _NAMED_FIRST)]
    given: list[str] = []
    for run in itertools.compress(found, new):
        plain = "-".join(_part(run, name) for name in shown if _says_something(run, name))
        numbered = (f"{plain}-{i}" for i in itertools.count(2))
        given.append(next(n for n in itertools.chain([plain], numbered) if n not in taken and n not in given))
    return given


def nearest(wanted: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """How those of `others` that differ least from the settings `wanted` do, as `name: old -> new`."""
    fewest, *_ = sorted((changed_fields(wanted, other) for other in others), key=len)
    return "; ".join(fewest)


def _run(config: SweepConfig, base: dict[str, Any], change: Any) -> TrainConfig:
    if not isinstance(change, dict):
        raise ValueError(f"{config.grid}: every entry of runs must be a JSON object, not {change!r}")
    given = {**base, **change}
    for name, remedy in _OWNED.items():
        if name in given:
            raise ValueError(f"{config.grid}: {name} cannot be given for a run of a sweep: {remedy}")
    store = given.get("store", config.store)
    if not store:
        raise ValueError(f"no store for {change} in {config.grid}; give --store, or store in its base")
    defaults = TrainConfig(out="", store="", save_every_s=config.save_every_s)
    try:
        run = from_dict(TrainConfig, {**to_dict(defaults), **given, "store": store})
        variants.resolve_options(run.activation, run.activation_options, run.n_latents)
        return run
    except ValueError as error:
        raise ValueError(f"{config.grid}, run {json.dumps(change)}: {error}") from None


def _says_something(run: TrainConfig, name: str) -> bool:
    """Not a default (None, no options), nor a k that has no effect."""
    return getattr(run, name) not in (None, {}) and (name != "k" or "k" in activation_facts(run.activation).uses)


def _part(run: TrainConfig, name: str) -> str:
    value = getattr(run, name)
    if name == "store":
        value = Path(value).name
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, dict):
        return "-".join(f"{option}{number:g}" for option, number in value.items())
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{_SHORT.get(name, name)}{value}")
