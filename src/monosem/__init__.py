"""monosem: from a language model and text to a trained, measured sparse autoencoder.

    import monosem
    monosem.harvest(monosem.HarvestConfig(out="store", model="gpt2", corpus="text.jsonl"))
    monosem.train(monosem.TrainConfig(store="store", out="run"))
    monosem.evaluate(monosem.EvalConfig(run="run"))

Importing this package imports neither torch nor transformers: names load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "HarvestConfig": "config",
    "TrainConfig": "config",
    "SweepConfig": "config",
    "EvalConfig": "config",
    "ExplainConfig": "config",
    "RunConfig": "config",
    "ScaleConfig": "config",
    "Site": "types",
    "SparseLatents": "types",
    "Metric": "types",
    "Subject": "subject",
    "ActivationStore": "activations",
    "harvest": "activations",
    "Autoencoder": "model",
    "train": "training",
    "sweep": "sweeps",
    "evaluate": "evals",
    "explain": "explanations.entry",
    "run": "main_job",
    "scale": "scaling",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'monosem' has no attribute {name!r}")
    return getattr(importlib.import_module(f"monosem.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
