"""NMSE against L0 of every activation function, and the gap between TopK and ReLU as n grows.

Of the runs of one function and n count those that no other beats at both: at one sparsity_coef a lower lr may well have
the lower NMSE because more latents are active. Two functions are compared at one L0, between the two of their runs that
bracket it (interpolated in logs), never beyond.
Intervals draw each run's ln NMSE from its interval over text, independently: too wide for runs on the same text.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from monosem.scaling import fit
from monosem.scaling.entry import ranges, sign
from monosem.scaling.tables import Excluded, Point, nan_to_none

_SAME_L0 = 1.01
GAP_CLAIM = "the gap between ReLU and TopK at one L0 grows with n (p > 0)"


def frontier(points: list[Point], at: dict[str, Any], seed: int) -> dict[str, Any]:
    """Curves of NMSE against L0 by activation and n, and `gaps` of every activation to TopK; `topk_relu_gap` in n."""
    kept, excluded = unbeaten([p for p in points if p.l0 > 0])
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for p in sorted(kept, key=lambda p: (p.activation, p.n_latents, p.l0)):
        own = {
            "l0": p.l0,
            "normalized_mse": p.normalized_mse,
            "low": nan_to_none(p.low),
            "high": nan_to_none(p.high),
            "run": p.run,
        }
        curves.setdefault(p.activation, {}).setdefault(str(p.n_latents), []).append(own)
    gaps = [g for name in curves if name != "topk" for g in _gaps(kept, name, seed)]
    return {
        "at": at,
        "curves": curves,
        "gaps": gaps,
        "topk_relu_gap": _growth([g for g in gaps if g["activation"] == "relu"], seed),
        "excluded": [e._asdict() for e in excluded + _without_l0(points)],
    }


def unbeaten(points: list[Point]) -> tuple[list[Point], list[Excluded]]:
    """The runs of each activation function and n that no other has both fewer active latents and a lower NMSE than.

    L0s within 1% are one, so that of several lr at one k the best is left.
    """
    kept, excluded = [], []
    for p in points:
        rivals = [q for q in points if (q.activation, q.n_latents) == (p.activation, p.n_latents)]
        better = [q for q in rivals if q.l0 < p.l0 * _SAME_L0 and q.normalized_mse < p.normalized_mse]
        if better:
            q = min(better, key=lambda q: q.normalized_mse)
            reason = (
                f"{q.run} has NMSE {q.normalized_mse:.4f} at L0 {q.l0:.1f}, this {p.normalized_mse:.4f} at {p.l0:.1f}"
            )
            excluded.append(Excluded(p.run, reason))
        else:
            kept.append(p)
    return kept, excluded


def _gaps(points: list[Point], activation: str, seed: int) -> list[dict[str, Any]]:
    """ln NMSE of `activation` − ln NMSE of TopK at each n and each L0 of TopK that both bracket."""
    found = []
    for n in sorted({p.n_latents for p in points}):
        theirs = [p for p in points if p.activation == activation and p.n_latents == n]
        ours = [p for p in points if p.activation == "topk" and p.n_latents == n]
        for l0 in sorted({float(p.k) for p in ours}):
            ends = _between(theirs, l0), _between(ours, l0)
            if ends[0] is None or ends[1] is None:
                continue
            rng = np.random.default_rng(seed)
            draws = _drawn(ends[0], rng) - _drawn(ends[1], rng)
            low, high = fit.percentiles(draws[1:])
            value = {"value": float(draws[0]), "low": float(low), "high": float(high)}
            found.append({"activation": activation, "n_latents": n, "l0": l0, "gap": value})
    return found


def _between(points: list[Point], l0: float) -> list[tuple[float, float, float]] | None:
    """(share, ln NMSE, its sd) of the two points that bracket `l0`, or of one (or seeds of one) at it; None beyond."""
    at = [p for p in points if 1 / _SAME_L0 < p.l0 / l0 < _SAME_L0]
    if at:
        return [(1 / len(at), math.log(p.normalized_mse), _sd(p)) for p in at]
    below, above = [p for p in points if p.l0 < l0], [p for p in points if p.l0 > l0]
    if not below or not above:
        return None
    first, second = max(below, key=lambda p: p.l0), min(above, key=lambda p: p.l0)
    share = math.log(l0 / first.l0) / math.log(second.l0 / first.l0)
    return [
        (1 - share, math.log(first.normalized_mse), _sd(first)),
        (share, math.log(second.normalized_mse), _sd(second)),
    ]


def _drawn(ends: list[tuple[float, float, float]], rng: np.random.Generator) -> np.ndarray:
    """The interpolated ln NMSE, and after it its draws."""
    noise = rng.standard_normal((fit.N_RESAMPLES + 1, len(ends)))
    noise[0] = 0
    share, value, sd = np.array(ends).T
    return (value + noise * sd) @ share


def _growth(gaps: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """gap = a + p ln n at the L0 that is bracketed at most sizes."""
    found: dict[str, Any] = {
        "claim": GAP_CLAIM,
        "verdict": "cannot tell",
        "l0": None,
        "coefficients": None,
        "n_sizes": 0,
    }
    if not gaps:
        return {**found, "reason": "no size has both TopK and ReLU runs that bracket one L0"}
    l0s = [g["l0"] for g in gaps]
    l0 = max(sorted(set(l0s)), key=l0s.count)
    own = [g for g in gaps if g["l0"] == l0]
    found |= {"l0": l0, "n_sizes": len(own)}
    if len(own) < 3:
        return {**found, "reason": f"{len(own)} sizes at L0 = {l0:g}; 3 are needed"}
    x = np.log([g["n_latents"] for g in own])
    value = np.array([g["gap"]["value"] for g in own])
    sd = np.array([(g["gap"]["high"] - g["gap"]["low"]) / (2 * 1.96) for g in own])
    rng = np.random.default_rng(seed)
    draws = np.array([np.polyfit(x, rng.normal(value, sd), 1)[::-1] for _ in range(fit.N_RESAMPLES)])
    line = dict(zip(("a", "p"), map(float, np.polyfit(x, value, 1)[::-1]), strict=True))
    coefficients = ranges(line, *fit.percentiles(draws))
    verdict, reason = sign(coefficients, "p", 1)
    return {**found, "coefficients": coefficients, "verdict": verdict, "reason": reason}


def _sd(p: Point) -> float:
    """Of ln NMSE, from its interval over text; 0 where the table gives none."""
    return math.log(p.high / p.low) / (2 * 1.96) if p.low > 0 and p.high > 0 else 0.0


def _without_l0(points: list[Point]) -> list[Excluded]:
    return [Excluded(p.run, "no l0") for p in points if not p.l0 > 0]
