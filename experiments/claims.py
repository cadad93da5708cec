"""Train the runs behind docs/reproduce.md on one store and keep one row each in a runs table.

    python experiments/claims.py --store runs/demo/store            every group, whatever is not in the table yet
    python experiments/claims.py --store runs/demo/store dead lr    these groups only

A run that is already in the table (same config and store) is skipped; one that was interrupted goes on where it was.
`python experiments/tables.py` turns the table into the Markdown of the docs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import subprocess
from pathlib import Path
from typing import Any

from monosem import logs
from monosem.activations import ActivationStore
from monosem.config import TrainConfig, config_hash
from monosem.evals import on_activations
from monosem.logs import MetricsLog
from monosem.training import train

log = logging.getLogger("monosem")

TABLE = Path("results/smollm2-135m-instruct-q4_1/runs.csv")
RUNS = Path("runs/claims")

LRS = (1e-3, 2e-3, 4e-3, 8e-3)
L1_COEFS = (0.003, 0.005, 0.007, 0.01, 0.015)

GROUPS: dict[str, list[dict[str, Any]]] = {
    # which lr, at the size of the demo
    "lr": [{"n_latents": 8192, "lr": lr} for lr in LRS],
    # dead latents: tied initialisation x AuxK, at the lr the group above prefers
    "dead": [{"n_latents": 8192, "tied_init": tied, "auxk": auxk} for tied in (True, False) for auxk in (None, 0)],
    # TopK against ReLU + L1 at equal L0: every sparsity_coef at one lr, then more lrs at those that bracket L0 = k
    "topk": [{"n_latents": 2048, "lr": lr} for lr in LRS],
    "relu": [
        {"n_latents": 2048, "activation": "relu", "lr": lr, "sparsity_coef": coef, "sparsity_warmup_steps": 200}
        for lr, coefs in ((2e-3, L1_COEFS), (1e-3, L1_COEFS[2:4]), (4e-3, L1_COEFS[1:3]), (8e-3, L1_COEFS[:3]))
        for coef in coefs
    ],
}

COLUMNS = (
    "group",
    "activation",
    "n_latents",
    "k",
    "lr",
    "sparsity_coef",
    "tied_init",
    "auxk",
    "seed",
    "tokens_seen",
    "distinct_tokens",
    "normalized_mse",
    "normalized_mse_low",
    "normalized_mse_high",
    "normalized_mse_train",
    "l0",
    "dead_fraction",
    "dead_window_tokens",
    "never_fired_fraction",
    "weights",
    "train_s",
    "impl",
    "config_hash",
    "store_hash",
    "commit",
    "date",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--store", required=True)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    logs.show_progress(True)
    store = ActivationStore.open(options.store)
    for group in options.groups or GROUPS:
        for changes in GROUPS[group]:
            config = TrainConfig(store=options.store, out=str(folder(group, changes)), **changes)
            if not in_table(group, config, store):
                append(row(group, config, store))


def folder(group: str, changes: dict[str, Any]) -> Path:
    """Where the run of a group goes."""
    return RUNS / "-".join([group, *(f"{key}={value}" for key, value in changes.items())])


def in_table(group: str, config: TrainConfig, store: ActivationStore) -> bool:
    if not TABLE.exists():
        return False
    key = (group, config_hash(config), store.hash)
    with open(TABLE, newline="") as file:
        return any((r["group"], r["config_hash"], r["store_hash"]) == key for r in csv.DictReader(file))


def row(group: str, config: TrainConfig, store: ActivationStore) -> dict[str, Any]:
    """Train, measure on the held-out split, and name everything the numbers depend on."""
    autoencoder = train(config)
    facts = autoencoder.provenance
    found, _ = on_activations(autoencoder, store, "cpu", n_resamples=1000, seed=0)
    metrics = {m.name: m for m in found}
    nmse = metrics["normalized_mse"]
    return {
        "group": group,
        **{name: getattr(config, name) for name in ("activation", "n_latents", "k", "sparsity_coef", "tied_init")},
        "seed": config.seed,
        "lr": facts["recipe"]["lr"],
        "auxk": facts["recipe"]["auxk"],
        **{name: facts[name] for name in ("tokens_seen", "distinct_tokens", "weights", "impl")},
        "normalized_mse": nmse.value,
        "normalized_mse_low": nmse.low,
        "normalized_mse_high": nmse.high,
        **{
            name: metrics[name].value
            for name in ("normalized_mse_train", "l0", "dead_fraction", "never_fired_fraction")
        },
        "dead_window_tokens": facts["dead_latents"]["window_tokens"],
        "train_s": MetricsLog(Path(config.out) / "metrics.jsonl").rows()[-1]["elapsed_s"],
        "config_hash": config_hash(config),
        "store_hash": store.hash,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def append(values: dict[str, Any]) -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    new = not TABLE.exists()
    with open(TABLE, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


if __name__ == "__main__":
    main()
