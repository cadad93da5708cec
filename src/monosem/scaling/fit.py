"""Fitting a law: Huber loss of ln NMSE, many starts, intervals, and errors on what was left out.

`minimise` fits many problems at once: starts, resamples and left-out groups are rows of weights on one design.

Intervals: coverage was measured (nominal 95%, 60 tables of 30 runs that follow the joint law with 0.3% and 1% noise;
docs/scaling.md). The profile's was 88 to 97%, the bootstrap's 78 to 98%, percentile and BCa alike. So `low` and
`high` are the profile's where points are independent (one a run), the bootstrap's over runs where they are not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from monosem.charts import library
from monosem.scaling.laws import INTERCEPT_BOUND, SLOPE_BOUND, Law, Logs, log_sum

HUBER_DELTA = 0.01
"""Residuals of ln NMSE above this count linearly: about twice what another seed moves."""
N_STARTS = 24
N_RESAMPLES = 400
LEVEL = 0.95
_STEPS = 200
_RELATIVE_GAIN = 1e-10
_DAMPING_LIMIT = 1e12

Points = Float[np.ndarray, " points"]
Fits = Float[np.ndarray, "fits coefficients"]


class Minimum(NamedTuple):
    """Coefficients and cost of each fit."""

    theta: Fits
    cost: Float[np.ndarray, " fits"]


class Range(NamedTuple):
    """An interval; None where the data set no bound."""

    low: float | None
    high: float | None


def huber(residual: np.ndarray, delta: float = HUBER_DELTA) -> np.ndarray:
    """r²/2 up to |r| = delta, then delta (|r| - delta/2)."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def minimise(
    law: Law,
    logs: Logs,
    log_y: Float[np.ndarray, "*fits points"],
    weights: Float[np.ndarray, "fits points"],
    starts: Fits,
    fixed: tuple[int, Float[np.ndarray, " fits"]] | None = None,
) -> Minimum:
    """argmin over θ of Σ weight · huber(ln y - ln L(θ)) for each row of `weights` and `starts`.

    Levenberg–Marquardt with Huber's weights on columns made orthonormal term by term, clipped to the bounds after every
    step; a step that does not lower the cost is not taken. `fixed` = (index, values) holds one coefficient.
    """
    design = law.design(logs)
    free = [i for i in range(starts.shape[1]) if fixed is None or i != fixed[0]]
    theta = np.clip(starts, *_bounds(law))
    if fixed is not None:
        theta[:, fixed[0]] = fixed[1]
    basis = _basis(design, free)
    low, high = _bounds(law)
    targets = np.broadcast_to(log_y, weights.shape)
    cost = _cost(theta, design, targets, weights)
    damping = np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    for _ in range(_STEPS):
        now, w, y = theta[active], weights[active], targets[active]
        new = np.clip(now + _step(now, design, y, w, basis, damping[active]), low, high)
        if fixed is not None:
            new[:, fixed[0]] = fixed[1][active]
        new_cost = _cost(new, design, y, w)
        better = new_cost < cost[active]
        gain = cost[active] - new_cost
        small = better & (gain <= _RELATIVE_GAIN * cost[active] + 1e-28)
        theta[active[better]], cost[active[better]] = new[better], new_cost[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 4)
        active = active[~small & (damping[active] < _DAMPING_LIMIT)]
        if not len(active):
            break
    return Minimum(theta, cost)


def best_fit(law: Law, logs: Logs, log_y: Points, seed: int, weights: Points | None = None) -> Minimum:
    """The lowest of N_STARTS fits, and as rows below it the others in order of cost."""
    starts = random_starts(law, logs, log_y, seed)
    w = np.ones_like(log_y) if weights is None else weights
    found = minimise(law, logs, log_y, np.broadcast_to(w, (len(starts), len(w))), starts)
    order = np.argsort(found.cost, kind="stable")
    return Minimum(found.theta[order], found.cost[order])


def random_starts(law: Law, logs: Logs, log_y: Points, seed: int) -> Fits:
    """Starts that already follow the data: the later terms take random shares of the lowest y, the first is a line.

    One term has one start, least squares.
    """
    design = law.design(logs)
    rng = np.random.default_rng(seed)
    n_starts = N_STARTS if law.irreducible else 1
    starts = []
    for i in range(n_starts):
        rest = np.exp(log_y)
        later: list[np.ndarray] = []
        share = (i + rng.random()) / n_starts
        for columns in design[1:]:
            slopes = rng.normal(0, 0.1, columns.shape[1] - 1)
            level = np.log(share / (len(design) - 1)) + log_y.min() - (columns[:, 1:] @ slopes).mean()
            later.append(np.concatenate([[level], slopes]))
            rest = rest - np.exp(columns @ later[-1])
        target = np.log(np.maximum(rest, 0.02 * np.exp(log_y)))
        first = np.linalg.lstsq(design[0], target, rcond=None)[0]
        starts.append(np.concatenate([first, *later]))
    return np.array(starts)


def profile(law: Law, logs: Logs, log_y: Points, best: Float[np.ndarray, " coefficients"], index: int) -> Range:
    """Profile-likelihood interval of one coefficient: where the cost, minimised over the others, rises by a threshold.

    With residuals r, ψ = clip(r, ±delta), n points and p coefficients, 2 (cost(θ) − cost(θ̂)) · mean(|r| < delta) /
    (Σψ²/(n − p)) is compared with the F(1, n − p) quantile, the likelihood ratio of a Huber fit. Followed outward from
    θ̂, each fit starting at its neighbour's, because far starts end in other valleys.
    """
    residual = log_y - law.log_value(best, logs)
    variance, inside = _noise(residual, len(best))
    if variance < 1e-20:  # the law passes through every point
        return Range(float(best[index]), float(best[index]))
    floor = huber(residual).sum()
    threshold = _f_quantile(len(log_y) - len(best)) * variance / inside / 2
    step = 0.5 * np.sqrt(variance / inside * max(_inverse_curvature(law, logs, best, index), 1e-24))
    low, high = _bounds(law)
    ends: list[float | None] = []
    for side in (-1.0, 1.0):
        theta, width = best[None].copy(), step
        last, reached, end = float(best[index]), 0.0, None
        while low[index] < last < high[index]:
            value = last + side * width
            found = minimise(law, logs, log_y, np.ones((1, len(log_y))), theta, (index, np.array([value])))
            rise = max(0.0, float(found.cost[0]) - floor) / threshold
            if rise >= 1:
                share = (1 - np.sqrt(reached)) / max(np.sqrt(rise) - np.sqrt(reached), 1e-12)
                end = last + share * (value - last)
                break
            width *= 1.0 if rise - reached > 0.05 else 1.5
            theta, last, reached = found.theta, value, rise
        ends.append(end)
    return Range(*ends)


def resamples(groups: Int[np.ndarray, " points"], seed: int) -> Float[np.ndarray, "resamples groups"]:
    """How often each of N_RESAMPLES resamples, drawn with replacement, holds each group (run)."""
    n_groups = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=N_RESAMPLES).astype(float)


def bootstrap(
    law: Law,
    logs: Logs,
    log_y: Points,
    best: Float[np.ndarray, " coefficients"],
    groups: Int[np.ndarray, " points"],
    seed: int,
) -> Fits:
    """Coefficients of the fits to N_RESAMPLES resamples of the groups (runs), all points of one drawn together."""
    weights = resamples(groups, seed)[:, groups]
    return minimise(law, logs, log_y, weights, np.repeat(best[None], N_RESAMPLES, axis=0)).theta


def percentiles(draws: np.ndarray) -> tuple[Any, Any]:
    """The 2.5% and 97.5% percentiles over the first axis: arrays, or numbers of a line of draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def held_out_error(
    law: Law, logs: Logs, log_y: Points, best: Float[np.ndarray, " coefficients"], groups: Int[np.ndarray, " points"]
) -> float:
    """Root mean square of ln predicted − ln measured, each group predicted by a fit without it."""
    left_out = groups[None] == np.arange(groups.max() + 1)[:, None]
    found = minimise(law, logs, log_y, (~left_out).astype(float), np.repeat(best[None], len(left_out), axis=0))
    return _rms((law.log_value(found.theta, logs) - log_y[None])[left_out])


def extrapolation_error(
    law: Law, logs: Logs, log_y: Points, largest: Bool[np.ndarray, " points"], seed: int
) -> float | None:
    """The same of the `largest` points, predicted by a fit to the others; None when these are too few to fit."""
    if (~largest).sum() <= len(law.coefficients):
        return None
    best = best_fit(law, logs, log_y, seed, (~largest).astype(float)).theta[0]
    return _rms((law.log_value(best, logs) - log_y)[largest])


def residual_sd(residual: Points, n_coefficients: int) -> float:
    """Standard deviation of residuals, those beyond delta clipped, for n − p degrees of freedom."""
    return float(np.sqrt(_noise(residual, n_coefficients)[0]))


def _noise(residual: Points, n_coefficients: int) -> tuple[float, float]:
    """Σψ²/(n − p) and mean(|r| < delta), Huber's corrections to a variance."""
    clipped = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
    inside = max(float((np.abs(residual) < HUBER_DELTA).mean()), 1 / len(residual))
    return float((clipped**2).sum() / max(1, len(residual) - n_coefficients)), inside


def _f_quantile(dof: int) -> float:
    special = library("scipy.special")
    return float(special.stdtrit(max(1, dof), (1 + LEVEL) / 2) ** 2)  # F(1, dof) is t(dof) squared


def _inverse_curvature(law: Law, logs: Logs, theta: np.ndarray, index: int) -> float:
    jacobian = _jacobian(theta[None], law.design(logs))[1][0]
    return float(np.linalg.pinv(jacobian.T @ jacobian)[index, index])


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean()))


def _bounds(law: Law) -> tuple[np.ndarray, np.ndarray]:
    bound = np.array([b for term in law.terms for b in (INTERCEPT_BOUND, *[SLOPE_BOUND] * (len(term) - 1))])
    return -bound, bound


def _basis(design: list[np.ndarray], free: list[int]) -> np.ndarray:
    """[coefficients, free]: maps steps along orthonormal combinations of each term's free columns to steps of θ."""
    basis, start = np.zeros((sum(c.shape[1] for c in design), len(free))), 0
    for columns in design:
        own = [i for i in free if start <= i < start + columns.shape[1]]
        if own:
            inside = columns[:, [i - start for i in own]]
            triangle = np.linalg.qr(inside, mode="r") / np.sqrt(len(inside))
            basis[np.ix_(own, [free.index(i) for i in own])] = np.linalg.inv(triangle)
        start += columns.shape[1]
    return basis


def _step(
    theta: Fits,
    design: list[np.ndarray],
    log_y: np.ndarray,
    weights: np.ndarray,
    basis: np.ndarray,
    damping: np.ndarray,
) -> Fits:
    value, jacobian = _jacobian(theta, design)
    jacobian = jacobian @ basis
    residual = log_y - value
    pull = weights * np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residual), 1e-300))
    weighted = jacobian * pull[:, :, None]
    normal = np.swapaxes(weighted, 1, 2) @ jacobian
    gradient = np.swapaxes(weighted, 1, 2) @ residual[:, :, None]
    diagonal = np.einsum("fii->fi", normal)
    diagonal += damping[:, None] * diagonal + 1e-14 * (1 + diagonal.max(axis=1, keepdims=True))
    return (np.linalg.solve(normal, gradient)[:, :, 0]) @ basis.T


def _jacobian(theta: Fits, design: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """ln L [fits, points] and its derivatives [fits, points, coefficients]: each term's share times its columns."""
    log_terms, start = [], 0
    for columns in design:
        log_terms.append(theta[:, start : start + columns.shape[1]] @ columns.T)
        start += columns.shape[1]
    value = np.logaddexp.reduce(np.stack(log_terms), axis=0)
    shares = [np.exp(term - value)[:, :, None] * columns for term, columns in zip(log_terms, design, strict=True)]
    return value, np.concatenate(shares, axis=2)


def _cost(theta: Fits, design: list[np.ndarray], log_y: np.ndarray, weights: np.ndarray) -> Float[np.ndarray, " fits"]:
    return (weights * huber(log_y - log_sum(theta, design))).sum(axis=1)
