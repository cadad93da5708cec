"""Which points each law is fitted to, and what it is asked: one function a law.

A law at a fixed number of tokens D is L(N,K | D) or L(N | D). Only of runs that converged is it L(N,K) or L(N).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from monosem.scaling import fit, tables
from monosem.scaling.entry import Coefficients, Observed, Verdict, both, entry, ranges, rounded, sign, theta, unfitted
from monosem.scaling.laws import DATA, JOINT, Law, line, power
from monosem.scaling.tables import Convergence, Excluded, Point

MIN_SIZES = 4
"""Sizes that a power law in n with an irreducible part needs."""
_DOUBLINGS = 4
"""L(N,D) is fitted to the last doublings of tokens only: the start of training is no power law."""
_BUDGETS_PER_DOUBLING = 2

JOINT_CLAIM = "larger k steepens the fall with n (gamma < 0) and lowers the irreducible part (eta < 0)"
POWER_CLAIM = "NMSE falls with n as a power law (b > 0)"


def joint(points: list[Point], law: Law, at: dict[str, Any], excluded: list[Excluded], seed: int) -> dict[str, Any]:
    """The joint law, of one point a run."""
    ns, ks = {p.n_latents for p in points}, {p.k for p in points}
    if len(ns) < 3 or len(ks) < 2:
        reason = f"{len(ns)} sizes and {len(ks)} k; the joint law needs 3 sizes and 2 k"
        return unfitted(law, JOINT_CLAIM, reason, at=at, excluded=excluded, n_runs=len(points))
    seen = Observed.of(
        {"n": [p.n_latents for p in points], "k": [p.k for p in points]},
        [p.normalized_mse for p in points],
        [p.run for p in points],
        [(p.n_latents, p.k) for p in points],
        "n",
    )

    def judge(c: Coefficients) -> tuple[Verdict, str]:
        return both(sign(c, "gamma", -1), sign(c, "eta", -1))

    found = entry(law, seen, JOINT_CLAIM, judge, at=at, excluded=excluded, seed=seed, keep_draws=True)
    if found["irreducible"] and found["irreducible"]["preferred"] == "without" and found["verdict"] == "holds":
        found["verdict"] = "cannot tell"
        found["reason"] += "; without the irreducible part the held-out error is lower, so eta describes nothing"
    return found


def in_n(points: list[Point], title: str, at: dict[str, Any], excluded: list[Excluded], seed: int) -> dict[str, Any]:
    """A power law in n at one k, of one point a run."""
    law, n_sizes = power(title, "n"), len({p.n_latents for p in points})
    if n_sizes < MIN_SIZES:
        reason = f"{n_sizes} sizes; {MIN_SIZES} are needed"
        return unfitted(law, POWER_CLAIM, reason, at=at, excluded=excluded, n_runs=len(points))
    seen = _of_sizes(points, [p.normalized_mse for p in points])
    return entry(law, seen, POWER_CLAIM, lambda c: sign(c, "b", 1), at=at, excluded=excluded, seed=seed)


def by_k(points: list[Point], title: str, at: dict[str, Any], excluded: list[Excluded], seed: int) -> dict[str, Any]:
    """`in_n` of every k."""
    named = {k: [p for p in points if p.k == k] for k in sorted({p.k for p in points})}
    return {str(k): in_n(own, title, {**at, "k": k}, excluded, seed) for k, own in named.items()}


def at_convergence(points: list[Point], seed: int) -> dict[str, Any]:
    """L(N) of the converged runs of every k, L(N,K) of them all, and how tokens to convergence grow with n."""
    found = tables.converged(points)
    done = [c for c in found if not math.isnan(c.tokens)]
    kept, worse = tables.best_lr([c.point for c in done])
    names = {p.run for p in kept}
    done = [c for c in done if c.point.run in names]
    excluded = [Excluded(c.point.run, f"not converged: {c.reason}") for c in found if math.isnan(c.tokens)] + worse
    at = {"converged": "gain < 1% per doubling of distinct tokens"}
    ks = [str(k) for k in sorted({p.k for p in points})]
    law = JOINT._replace(title="L(N,K)")
    own = {
        k: ([c for c in done if str(c.point.k) == k], [e for e in excluded if _k_of(points, e.run) == int(k)])
        for k in ks
    }
    return {
        "joint_converged": joint(kept, law, at, excluded, seed),
        "n_converged": {
            k: in_n([c.point for c in cs], "L(N)", {**at, "k": int(k)}, left, seed) for k, (cs, left) in own.items()
        },
        "tokens_to_convergence": {
            k: _tokens_to_convergence(cs, {**at, "k": int(k)}, left, seed) for k, (cs, left) in own.items()
        },
    }


def _tokens_to_convergence(
    done: list[Convergence], at: dict[str, Any], excluded: list[Excluded], seed: int
) -> dict[str, Any]:
    law, claim = line("T(N)", "n"), "tokens to convergence grow with n (p > 0; the paper's p is 0.6 to 0.65)"
    n_sizes = len({c.point.n_latents for c in done})
    points = [{"n_latents": c.point.n_latents, "tokens": c.tokens, "run": c.point.run} for c in done]
    if n_sizes < MIN_SIZES:
        reason = f"{n_sizes} converged sizes; {MIN_SIZES} are needed"
        return {**unfitted(law, claim, reason, at=at, excluded=excluded, n_runs=len(done)), "points": points}
    seen = _of_sizes([c.point for c in done], [c.tokens for c in done])
    found = entry(law, seen, claim, lambda c: sign(c, "p", 1), at=at, excluded=excluded, seed=seed)
    return {**found, "points": points}


def in_n_and_tokens(points: list[Point], at: dict[str, Any], excluded: list[Excluded], seed: int) -> dict[str, Any]:
    """L(N,D) of every k, over the evaluation points within one epoch of the last doublings of tokens."""
    found = {}
    for k in sorted({p.k for p in points}):
        own = [p for p in points if p.k == k and p.epochs <= 1 + 1e-9]
        first = max((p.tokens for p in own), default=0) / 2**_DOUBLINGS
        own = [p for p in own if p.tokens >= first * 0.98]
        claim, where = "NMSE falls with tokens as a power law (d > 0)", {**at, "k": k, "tokens_from": first}
        n_sizes, n_tokens = len({p.n_latents for p in own}), len(tables.token_groups(own))
        if n_sizes < 3 or n_tokens < 3:
            reason = f"{n_sizes} sizes at {n_tokens} numbers of tokens within one epoch; 3 of each are needed"
            found[str(k)] = unfitted(DATA, claim, reason, at=where, excluded=excluded, n_runs=len({p.run for p in own}))
            continue
        logs = {"n": [float(p.n_latents) for p in own], "tokens": [p.tokens for p in own]}
        runs = [p.run for p in own]
        seen = Observed.of(logs, [p.normalized_mse for p in own], runs, [p.n_latents for p in own], "tokens")
        found[str(k)] = entry(
            DATA, seen, claim, lambda c: sign(c, "d", 1), at=where, excluded=excluded, seed=seed, keep_draws=True
        )
    return found


def in_compute(points: list[Point], flops: str, noise: float, seed: int) -> dict[str, Any]:
    """L(C) of every k: the lowest NMSE for each budget of `flops`, and the n and tokens that reach it.

    `noise` is the standard deviation of ln NMSE from run to run, which the intervals follow from.
    """
    return {str(k): _compute(points, k, flops, noise, seed) for k in sorted({p.k for p in points})}


def _compute(points: list[Point], k: int, flops: str, noise: float, seed: int) -> dict[str, Any]:
    claim = "the frontier falls with compute as a power law (b > 0)"
    law, at = power("L(C)", "c"), {"k": k, "flops": flops, "noise": noise}
    own = [p for p in points if p.k == k and getattr(p, flops) > 0]
    n_runs = len({p.run for p in own})
    if len({p.n_latents for p in own}) < 3 or len({getattr(p, flops) for p in own}) < 2:
        reason = (
            f"{len({p.n_latents for p in own})} sizes with {flops}; 3, each evaluated along its training, are needed"
        )
        return unfitted(law, claim, reason, at=at, excluded=[], n_runs=n_runs)
    frontier = Frontier.of(own, flops)
    budgets, log_y, log_n, log_tokens = frontier.optima(frontier.log_nmse)
    if len(budgets) < len(law.coefficients) + 2:
        reason = (
            f"only at {len(budgets)} budgets is the best n neither the smallest nor the largest evaluated there; "
            "widen the sizes, or evaluate earlier and later"
        )
        return unfitted(law, claim, reason, at=at, excluded=[], n_runs=n_runs)
    cells = np.arange(len(budgets))
    seen = Observed({"c": budgets}, log_y, cells, cells, cells >= len(cells) - max(1, len(cells) // 4))
    found = entry(law, seen, claim, lambda c: sign(c, "b", 1), at=at, excluded=[], seed=seed)
    best = theta(found)
    draws, rises = frontier.drawn(law, best, noise, seed)
    found["coefficients"] = ranges(dict(zip(law.coefficients, map(float, best), strict=True)), *fit.percentiles(draws))
    found["verdict"], found["reason"] = sign(found["coefficients"], "b", 1)
    frontier_rows = zip(*(map(float, np.exp(v)) for v in (budgets, log_y, log_n, log_tokens)), strict=True)
    names = ("flops", "normalized_mse", "n_latents", "tokens")
    return {
        **found,
        **rises,
        "n_runs": n_runs,
        "frontier": [dict(zip(names, row, strict=True)) for row in frontier_rows],
        "draws": rounded(draws),
    }


class Frontier:
    """Each size's lowest NMSE at each budget, interpolated in logs between evaluation points of a run.

    The optimum at a budget is the vertex of the parabola through the best size and its two neighbours in ln n: sizes
    are a coarse grid, and the best of them alone gave exponents of n* that missed the planted ones.
    """

    def __init__(self, budgets: np.ndarray, log_n: np.ndarray, log_nmse: np.ndarray, log_tokens: np.ndarray) -> None:
        self.budgets, self.log_n, self.log_nmse, self.log_tokens = budgets, log_n, log_nmse, log_tokens

    @staticmethod
    def of(points: list[Point], flops: str) -> Frontier:
        values = [getattr(p, flops) for p in points]
        n_budgets = max(2, round(math.log2(max(values) / min(values)) * _BUDGETS_PER_DOUBLING) + 1)
        budgets = np.linspace(math.log(min(values)), math.log(max(values)), n_budgets)
        sizes = sorted({p.n_latents for p in points})
        nmse, tokens = [], []
        for n in sizes:
            runs = [
                [p for p in points if p.run == run] for run in dict.fromkeys(p.run for p in points if p.n_latents == n)
            ]
            curves = [_curve(run, flops, budgets) for run in runs]
            own = np.array([c[0] for c in curves])
            best = own.argmin(axis=0)
            nmse.append(own.min(axis=0))
            tokens.append(np.array([c[1] for c in curves])[best, np.arange(n_budgets)])
        return Frontier(budgets, np.log(sizes), np.array(nmse), np.array(tokens))

    def optima(self, log_nmse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """ln of budgets, of the lowest NMSE, of n and of tokens there, where the best size has both its neighbours."""
        best = log_nmse.argmin(axis=0)
        column = np.arange(len(self.budgets))
        inside = (best > 0) & (best < len(self.log_n) - 1)
        near = np.clip(best[None] + np.array([-1, 0, 1])[:, None], 0, len(self.log_n) - 1)
        y = log_nmse[near, column]
        inside &= np.isfinite(y).all(axis=0)
        x, y, t = self.log_n[near][:, inside], y[:, inside], self.log_tokens[near, column][:, inside]
        slopes = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        bend = (slopes[1] - slopes[0]) / (x[2] - x[0])
        flat = bend <= 0
        vertex = np.where(flat, x[1], (x[0] + x[1]) / 2 - slopes[0] / (2 * np.where(flat, 1.0, bend)))
        lowest = np.where(flat, y[1], y[0] + slopes[0] * (vertex - x[0]) + bend * (vertex - x[0]) * (vertex - x[1]))
        tokens = t[1] + (vertex - x[1]) * (t[2] - t[0]) / (x[2] - x[0])
        return self.budgets[inside], lowest, vertex, tokens

    def drawn(self, law: Law, best: np.ndarray, noise: float, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Coefficients of L(C) when each size's curve is moved by run-to-run noise; and the power laws of the optimum.

        Drawing runs again instead would leave out sizes, not noise: intervals ten times as wide, right every time.
        """
        rng = np.random.default_rng(seed)
        moved = noise * rng.standard_normal((fit.N_RESAMPLES, len(self.log_n), 1))
        moved[0] = 0
        optima = [self.optima(self.log_nmse + shift) for shift in moved]
        optima = optima[:1] + [o for o in optima[1:] if len(o[0]) > len(best)]
        used = np.array([np.isin(self.budgets, o[0]) for o in optima])
        log_y = np.zeros(used.shape)
        for row, mask, o in zip(log_y, used, optima, strict=True):
            row[mask] = o[1]
        starts = np.repeat(best[None], len(used), axis=0)
        draws = fit.minimise(law, {"c": self.budgets}, log_y, used.astype(float), starts).theta
        rises = {}
        for i, name in ((2, "optimal_n"), (3, "optimal_tokens")):
            lines = np.array([np.polyfit(o[0], o[i], 1)[::-1] for o in optima])
            rule = line(name, "c")
            first = dict(zip(rule.coefficients, map(float, lines[0]), strict=True))
            rises[name] = {"formula": rule.formula, "coefficients": ranges(first, *fit.percentiles(lines[1:]))}
        return draws[1:], rises


def _curve(run: list[Point], flops: str, budgets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln NMSE (inf where it was not evaluated) and ln tokens of a run at each budget."""
    ordered = sorted(run, key=lambda p: getattr(p, flops))
    c = np.log([getattr(p, flops) for p in ordered])
    nmse = np.interp(budgets, c, np.log([p.normalized_mse for p in ordered]))
    outside = (budgets < c[0] - 1e-9) | (budgets > c[-1] + 1e-9)
    return np.where(outside, np.inf, nmse), np.interp(budgets, c, np.log([p.tokens for p in ordered]))


def across_subjects(
    by_subject: dict[str, list[Point]], known: dict[str, tuple[str, float]], seed: int
) -> dict[str, Any]:
    """L_s(N | D): each subject's exponent at the largest k that all have, and per family how it moves with size."""
    ks = [{p.k for p in points} for points in by_subject.values()]
    shared = sorted(set.intersection(*ks))
    k = max(shared, default=None)
    rows = []
    for subject, points in by_subject.items():
        own = [p for p in points if p.k == k]
        family, size = known[subject]
        fitted = _subject_exponent(own, seed) if own else None
        rows.append({"subject": subject, "family": family, "parameters": size, "fit": fitted})
    rows.sort(key=lambda row: (row["family"], row["parameters"]))
    families = {known[subject][0] for subject in by_subject}
    return {
        "at": {"k": k},
        "subjects": rows,
        "families": {f: _trend([r for r in rows if r["family"] == f], seed) for f in sorted(families)},
    }


def _subject_exponent(points: list[Point], seed: int) -> dict[str, Any]:
    tokens = tables.fixed_tokens(points, None)
    chosen, left = tables.at_tokens(points, tokens)
    kept, worse = tables.best_lr(chosen)
    return in_n(kept, "L_s(N | D)", {"tokens": tokens, "k": points[0].k}, left + worse, seed)


def _trend(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """b = a + p ln(parameters) over one family's subjects; draws of each b are normal with its interval's width."""
    claim = "larger subjects have a smaller exponent b (p < 0)"
    fitted = [
        r
        for r in rows
        if r["fit"]
        and r["fit"]["coefficients"]
        and r["fit"]["coefficients"]["b"]["low"] is not None
        and r["fit"]["coefficients"]["b"]["high"] is not None
    ]
    found: dict[str, Any] = {"claim": claim, "n_subjects": len(fitted), "coefficients": None, "verdict": "cannot tell"}
    if len({r["parameters"] for r in fitted}) < 3:
        return {**found, "reason": f"{len(fitted)} subjects of this family with a fitted exponent; 3 are needed"}
    x = np.log([r["parameters"] for r in fitted])
    b = np.array([[r["fit"]["coefficients"]["b"][e] for e in ("value", "low", "high")] for r in fitted])
    spread = (b[:, 2] - b[:, 1]) / (2 * 1.96)
    rng = np.random.default_rng(seed)
    draws = np.array([np.polyfit(x, rng.normal(b[:, 0], spread), 1)[::-1] for _ in range(fit.N_RESAMPLES)])
    values = dict(zip(("a", "p"), map(float, np.polyfit(x, b[:, 0], 1)[::-1]), strict=True))
    coefficients = ranges(values, *fit.percentiles(draws))
    verdict, reason = sign(coefficients, "p", -1)
    return {**found, "coefficients": coefficients, "verdict": verdict, "reason": reason}


def _of_sizes(points: list[Point], y: list[float]) -> Observed:
    sizes = [p.n_latents for p in points]
    return Observed.of({"n": [float(n) for n in sizes]}, y, [p.run for p in points], sizes, "n")


def _k_of(points: list[Point], run: str) -> int:
    return next(p.k for p in points if p.run == run)
