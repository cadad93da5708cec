"""Tables of runs that follow planted laws, as `monosem sweep` would have left them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monosem.scaling.laws import JOINT
from monosem.scaling.tables import COLUMNS

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
KS = (8, 16, 32, 64, 128)
TOKENS = 4_194_304
D_MODEL = 576
PLANTED = {"alpha": -0.5, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.92, "eta": -0.255}
"""The paper's joint law, with an irreducible part that matters at these sizes."""

Nmse = Callable[[float, float, float], float]
"""(n_latents, k, tokens) -> NMSE without noise."""


def planted_joint(n: float, k: float, tokens: float) -> float:
    theta = np.array(list(PLANTED.values()))
    at_end = float(np.exp(JOINT.log_value(theta, {"n": np.log([n]), "k": np.log([k])})[0]))
    return at_end * (TOKENS / tokens) ** 0.1


def planted_compute(n: float, k: float, tokens: float) -> float:
    """E + A n^-0.35 + B tokens^-0.42: with flops ∝ n · tokens the frontier is exactly E + a C^-(0.35 · 0.42 / 0.77)."""
    return 0.12 + 3.0 * n**-0.35 + 60.0 * tokens**-0.42


def row(run: str, n: int, k: int, tokens: float, nmse: float, **changes: Any) -> dict[str, Any]:
    dense, sparse = n * D_MODEL, k * D_MODEL
    values: dict[str, Any] = {
        **dict.fromkeys(COLUMNS, ""),
        **{"run": run, "activation": "topk", "n_latents": n, "k": k, "lr": 1e-3, "sparsity_coef": 0.0},
        **{"activation_options": "{}", "tied_init": True, "auxk": 256, "batch_size": 1024, "ema": 0.999, "seed": 0},
        **{"data_seed": 0, "n_tokens": TOKENS, "tokens": int(tokens), "distinct_tokens": int(tokens), "epochs": 0.5},
        **{"flops": tokens * 6 * dense, "flops_dense_equivalent": tokens * 12 * dense, "normalized_mse": nmse},
        **{"normalized_mse_low": nmse * 0.97, "normalized_mse_high": nmse * 1.03, "l0": k, "dead_fraction": 0.0},
        **{"dead_window_tokens": 500_000, "never_fired_fraction": 0.0, "weights": "ema", "wall_s": 1.0},
        **{"kernel_s": tokens * (1e-6 + 2e-11 * dense + 1e-10 * sparse), "impl": "native", "subject": "S"},
        **{"layer": 22, "location": "resid_post_mlp", "d_model": D_MODEL, "finished": True, "status": "finished"},
        **{"config_hash": run, "store_hash": "h", "commit": "c", "date": "2026-11-25"},
    }
    assert set(changes) <= set(COLUMNS)
    return {**values, **changes}


def rows(
    nmse: Nmse = planted_joint,
    *,
    sizes: Sequence[int] = SIZES,
    ks: Sequence[int] = KS,
    noise: float = 0.0,
    seed: int = 0,
    doublings: int = 5,
    prefix: str = "topk",
    **changes: Any,
) -> list[dict[str, Any]]:
    """One run a (n, k), evaluated at `doublings` doublings of tokens and the start of the first."""
    rng = np.random.default_rng(seed)
    found = []
    for n in sizes:
        for k in ks:
            moved = math.exp(noise * rng.standard_normal())
            for j in range(doublings, -1, -1):
                tokens = TOKENS / 2**j
                found.append(row(f"{prefix}-{n}-{k}", n, k, tokens, nmse(n, k, tokens) * moved, **changes))
    return found


def write(folder: Path, table: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    return folder
