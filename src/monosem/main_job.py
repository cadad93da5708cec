"""The main job in one folder: harvest, train, evaluate, each skipped when it is already on disk.

OUT/store/         activations (manifest.json, shards)
OUT/autoencoder/   the released autoencoder
OUT/metrics.jsonl  training, step by step        OUT/state/  training state
OUT/eval.json      the numbers                   OUT/run.json  the configs and the seconds of each stage
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monosem import artifacts, resources
from monosem.activations import harvest
from monosem.config import RunConfig, to_dict
from monosem.evals import Shared, evaluate
from monosem.evals.parts import check_tasks
from monosem.torch_state import pinned
from monosem.training import KIND as TRAINING
from monosem.training import train

log = logging.getLogger("monosem")


@pinned
def run(config: RunConfig) -> dict[str, Any]:
    """Do what is not yet done of the main job; returns the evaluation's report with the `seconds` of each stage now.

    run.json keeps the seconds that each stage took when it was last really done, not those of skipping it.
    """
    if not config.out:
        raise ValueError("out is empty; give the folder of the main job")
    out = Path(config.out)
    if not (out / "train.json").exists():  # before the hours: what others made is not overwritten
        artifacts.require_ours(out / "run.json", lambda path: artifacts.says_kind(path, "run"))
    artifacts.require_no_other(out, TRAINING)
    shared = Shared()
    if config.eval.suite != "basic" and not (out / "eval.json").exists():
        check_tasks(config.eval, shared)  # before the hours
    harvest_config = dataclasses.replace(config.harvest, out=str(out / "store"))
    train_config = dataclasses.replace(config.train, out=str(out), store=str(out / "store"))
    eval_config = dataclasses.replace(config.eval, run=str(out))
    stages: dict[str, Callable[[], Any]] = {
        "fetch": lambda: [
            resources.fetch(n) for n in (harvest_config.model, harvest_config.corpus) if n in resources.names()
        ],
        "harvest": lambda: harvest(harvest_config),
        "train": lambda: train(train_config),
        "evaluate": lambda: evaluate(eval_config, shared),
    }
    seconds, result = {}, None
    for name, stage in stages.items():
        started = time.monotonic()
        result = stage()
        seconds[name] = round(time.monotonic() - started, 1)
        log.info("%s: %.1f s", name, seconds[name])
    seconds["total"] = round(sum(seconds.values()), 1)
    configs = {"harvest": to_dict(harvest_config), "train": to_dict(train_config), "eval": to_dict(eval_config)}
    kept, before = _seconds_of_the_work(out / "run.json", configs, seconds)
    if kept != before:  # else all was there, perhaps where nothing can be written
        artifacts.write_json(out / "run.json", artifacts.manifest("run", configs, {}, seconds=kept))
    assert isinstance(result, dict)
    return {**result, "seconds": seconds}


def _seconds_of_the_work(
    path: Path, configs: dict[str, Any], seconds: dict[str, float]
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Stage by stage, the longer of this time and the last of the same configs, as skipping is quick; and the last."""
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = artifacts.read_manifest(path, "run")
        except ValueError as error:
            log.warning("%s; it is written again, with the seconds of this call alone", error)
    if before.get("config") != configs:
        return seconds, None
    kept = {name: max(now, before["seconds"].get(name, 0.0)) for name, now in seconds.items() if name != "total"}
    return {**kept, "total": round(sum(kept.values()), 1)}, before["seconds"]
