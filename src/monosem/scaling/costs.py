"""What a run costs: seconds and FLOPs a token from the table, bytes by arithmetic.

Seconds and FLOPs are a + b n d + c k d a token (the encoder's dense product, the decoder's sparse ones), with no
negative coefficient; bytes are counted, not measured.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from monosem.charts import library
from monosem.scaling.tables import Point

COSTS = {
    "seconds": "kernel_s",
    "flops": "flops",
    "flops_dense_equivalent": "flops_dense_equivalent",
}


def measured(points: list[Point]) -> dict[str, Any]:
    """By name in COSTS: {"coefficients": {a, b, c}, "n_runs", "worst": largest relative residual}, or None.

    Of TopK runs, each at its last evaluation point.
    """
    last = {p.run: p for p in sorted(points, key=lambda p: p.tokens) if p.activation == "topk"}
    return {name: _per_token(list(last.values()), column) for name, column in COSTS.items()}


def per_token(cost: dict[str, Any], n_latents: int, k: int, d_model: int) -> float:
    """a + b n d + c k d."""
    c = cost["coefficients"]
    return float(c["a"] + c["b"] * n_latents * d_model + c["c"] * k * d_model)


def bytes_needed(n_latents: int, d_model: int, *, ema: bool, batch_size: int, k: int, pack: int) -> dict[str, int]:
    """Bytes of training `pack` autoencoders on one stream, fp32: by part, and their `total`.

    Weights are 2 n d + n + d numbers; Adam's moments twice, the average (if on) and the gradients once as many (kernels
    with a fused step store none: an upper bound). Packed autoencoders share the batch.
    """
    weights = 4 * (2 * n_latents * d_model + n_latents + d_model)
    parts = {
        "weights": pack * weights,
        "moments": pack * 2 * weights,
        "average": pack * weights if ema else 0,
        "gradients": pack * weights,
        "batch": 4 * batch_size * (3 * d_model + pack * 2 * k),
    }
    return {**parts, "total": sum(parts.values())}


def _per_token(runs: list[Point], column: str) -> dict[str, Any] | None:
    """Non-negative least squares of relative errors."""
    known = [p for p in runs if math.isfinite(getattr(p, column)) and getattr(p, column) > 0]
    if not known:
        return None
    y = np.array([getattr(p, column) / p.tokens for p in known])
    columns = np.array([[1.0, p.n_latents * p.d_model, p.k * p.d_model] for p in known])
    scale = columns.max(axis=0)
    solution, _ = library("scipy.optimize").nnls(columns / scale / y[:, None], np.ones(len(y)))
    solution = solution / scale
    worst = float(np.abs(columns @ solution / y - 1).max())
    named = dict(zip(("a", "b", "c"), map(float, solution), strict=True))
    return {"coefficients": named, "n_runs": len(known), "worst": worst}
