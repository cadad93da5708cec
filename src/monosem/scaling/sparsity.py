"""NMSE against L0 of every activation function, and the gap between TopK and ReLU as n grows.

Two functions are compared at one L0, each at the lr that is best there: of the runs of one lr, between the two that
bracket the L0 (interpolated in logs), never beyond. Runs of one price are not: a lower lr has a lower NMSE there as
more latents are active. Intervals draw each run's ln NMSE from its interval over text, independently: too wide for runs
on the same text.
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
    kept = [p for p in points if p.l0 > 0]
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for p in sorted(kept, key=lambda p: (p.activation, p.n_latents, p.l0)):
        own = {
            "l0": p.l0,
            "lr": p.lr,
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
        "excluded": [e._asdict() for e in _without_l0(points)],
    }


def _gaps(points: list[Point], activation: str, seed: int) -> list[dict[str, Any]]:
    """ln NMSE of `activation` − that of TopK at each n and each L0 of TopK that both bracket, else each of its own."""
    found = []
    for n in sorted({p.n_latents for p in points}):
        theirs = [p for p in points if p.activation == activation and p.n_latents == n]
        ours = [p for p in points if p.activation == "topk" and p.n_latents == n]
        shared = [float(k) for k in sorted({p.k for p in ours}) if _between(theirs, k) is not None]
        for l0 in shared or sorted(p.l0 for p in theirs):
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
    """`_of_one_lr` at the lr where it is lowest; None where no lr has runs around `l0`."""
    by_lr = [[p for p in points if p.lr == lr] for lr in sorted({p.lr for p in points})]
    found = [ends for own in by_lr if (ends := _of_one_lr(own, l0)) is not None]
    return min(found, key=lambda ends: sum(share * value for share, value, _ in ends), default=None)


def _of_one_lr(points: list[Point], l0: float) -> list[tuple[float, float, float]] | None:
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
