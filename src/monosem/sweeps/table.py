"""runs.csv: one row a run and evaluation point, and what a row is measured and computed from."""

from __future__ import annotations

import datetime
import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from monosem import __version__, artifacts, step, variants
from monosem.activations import ActivationStore
from monosem.config import TrainConfig, activation_facts
from monosem.evals import reconstruction
from monosem.evals.bootstrap import clusters_of
from monosem.model import WEIGHTS_FILE, Autoencoder
from monosem.scaling import tables
from monosem.scaling.tables import COLUMNS
from monosem.training import SAMPLE_TOKENS, SELECTION_TOKENS, Run
from monosem.types import SparseLatents

SELECTION_STRIDE = SAMPLE_TOKENS // SELECTION_TOKENS
"""Of the sample that weights start from, every so manieth token chooses between raw and averaged weights midway."""


class RunsTable:
    """The rows in `path` by run and tokens; every change replaces the whole file."""

    def __init__(self, path: Path, known: dict[str, dict[str, Any]]) -> None:
        """`known` is what sweep.json says of the rows of its runs: `kept` when it was written.

        Rows beyond, written just before a kill, are forgotten and measured again. `ValueError` when those that are
        known are not as they were, and for rows of runs that are not known.
        """
        self.path = path
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        for row in tables.vouched(path, known) if path.exists() or any(k["bytes"] for k in known.values()) else ():
            self.rows[row["run"], int(row["tokens"])] = row

    def kept(self, run: str) -> dict[str, Any]:
        """Of the run's rows, as they are in the file, the number of bytes and the sha256."""
        return tables.kept([row for key, row in self.rows.items() if key[0] == run])

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["run"], row["tokens"]] = row
        self.write()

    def rewind(self, run: str, tokens: int) -> bool:
        """Forget the run's rows after `tokens`: a resumed run measures them again. Whether there were any."""
        before = len(self.rows)
        self.rows = {key: row for key, row in self.rows.items() if key[0] != run or key[1] <= tokens}
        return len(self.rows) < before

    def finished(self, run: str) -> bool:
        return any(key[0] == run and str(row["finished"]) == "true" for key, row in self.rows.items())

    def write(self) -> None:
        artifacts.write_atomic(self.path, self._write_to)

    def _write_to(self, path: Path) -> None:
        path.write_text(tables.csv_text([dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows.values()]), "utf-8")


class HeldOut:
    """The held-out tokens that runs on one store are measured on: its first blocks, kept in memory."""

    def __init__(self, store: ActivationStore, n_tokens: int, n_resamples: int) -> None:
        n_blocks = min(store.n_blocks("held_out"), -(-n_tokens // store.block_rows))
        n_contexts = n_blocks * store.block_rows // store.rows_per_context
        self.blocks = [store.block("held_out", index) for index in range(n_blocks)]
        documents = store.contexts("held_out").documents[:n_contexts]
        self.clusters = clusters_of(documents).repeat_interleave(store.rows_per_context)
        self.n_resamples = n_resamples

    def measure(self, autoencoder: Autoencoder, run: Run) -> dict[str, float]:
        """The columns that need held-out tokens, with the run's kernels; `ValueError` when a number is not finite."""
        autoencoder = autoencoder.to(run.device)

        def encode(x: torch.Tensor) -> SparseLatents:
            return step.encode(x, autoencoder.weights, autoencoder.extras, run.recipe, run.kernel)

        found = reconstruction.tally(autoencoder, self.blocks, self.clusters, run.device, encode)
        by_name = {m.name: m for m in reconstruction.metrics(found, n_resamples=self.n_resamples, seed=0)}
        nmse = by_name["normalized_mse"]
        return {
            "normalized_mse": nmse.value,
            "normalized_mse_low": nmse.low,
            "normalized_mse_high": nmse.high,
            "l0": by_name["l0"].value,
            "never_fired_fraction": by_name["never_fired_fraction"].value,
        }


def points(config: TrainConfig, eval_every: int) -> set[int]:
    """The steps before the last at which a run is measured: the first to reach 2^i * eval_every token-visits."""
    found, tokens, n_steps = set(), eval_every, -(-config.n_tokens // config.batch_size)
    while (at := -(-tokens // config.batch_size)) < n_steps:
        found.add(at)
        tokens *= 2
    return found


def row(name: str, run: Run, config_hash: str, **measured: Any) -> dict[str, Any]:
    """The run's row as it stands; `measured` holds what only the caller knows."""
    c, recipe, store, tokens = run.config, run.recipe, run.store, run.tokens_seen
    n_rows, d_model = store.n_rows("train"), store.width
    dead = run.dead_latents()
    released = run.released is not None
    facts = {
        "run": name,
        **{field: getattr(c, field) for field in ("activation", "n_latents", "k", "batch_size", "seed", "data_seed")},
        "sparsity_coef": c.sparsity_coef,
        "activation_options": json.dumps(recipe.activation_options, sort_keys=True),
        "tied_init": _truth(c.tied_init),
        **{"lr": recipe.lr, "auxk": recipe.auxk, "ema": recipe.ema, "n_tokens": c.n_tokens, "tokens": tokens},
        "distinct_tokens": min(tokens, n_rows),
        "epochs": tokens / n_rows,
        "flops": tokens * flops_per_token(c, d_model) + 8 * d_model * run.work.auxk_pairs,
        "flops_dense_equivalent": 12 * c.n_latents * d_model * tokens,
        "dead_fraction": dead["count"] / c.n_latents,
        "dead_window_tokens": dead["window_tokens"],
        "kernel_s": round(run.work.kernel_s, 3),
        "wall_s": round(run.seconds, 3),
        **{"impl": run.impl, "subject": store.manifest["subject"], "d_model": d_model},
        **{"layer": store.site.layer, "location": store.site.location},
        **{"finished": _truth(released), "status": "ok", "config_hash": config_hash, "store_hash": store.hash},
        "commit": code_commit(),
        "checkpoint": artifacts.sha256_file(run.out / "autoencoder" / WEIGHTS_FILE) if released else "",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return {column: {**facts, **measured}.get(column, "") for column in COLUMNS}


def flops_per_token(config: TrainConfig, d_model: int) -> int:
    """FLOPs of a training step a token, without AuxK's (8 d_model for each latent that models the error).

    Where k latents are chosen, 2 n d for the one dense product and 8 d for each latent that is decoded (decode, the
    value's gradient and those of both matrices); else 12 n d: a product forward and two backward for each matrix.
    """
    if "k" not in activation_facts(config.activation).uses:
        return 12 * config.n_latents * d_model
    decoded = min(config.n_latents, config.k * getattr(variants.load(config.activation), "MULTIPLE", 1))
    return 2 * config.n_latents * d_model + 8 * decoded * d_model


@functools.cache
def code_commit() -> str:
    """The commit of the working folder if that is a checkout of monosem (with -dirty if changed), else the version."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        root = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        if (Path(root.stdout.strip()) / "src" / "monosem" / "__init__.py").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        pass
    return __version__


def json_hash(data: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of `data`."""
    return artifacts.hash_names([json.dumps(data, sort_keys=True)])


def _truth(value: bool) -> str:
    return "true" if value else "false"
