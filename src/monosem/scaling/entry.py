"""One fitted law as it stands in scaling.json: the same form for every law.

    {law, formula, claim, verdict, reason, at, coefficients: {name: {value, low, high, bootstrap_low, bootstrap_high}},
     n_runs, n_points, residual_sd, held_out_error, extrapolation_error, irreducible, excluded}

`verdict` is about `claim`: "holds", "fails" or "cannot tell", and `reason` says why. Errors are of ln NMSE, so
about relative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from monosem.scaling import fit
from monosem.scaling.laws import INTERCEPT_BOUND, Law, Logs, reducible
from monosem.scaling.tables import Excluded

Verdict = Literal["holds", "fails", "cannot tell"]
Coefficients = dict[str, dict[str, float | None]]
Judge = Callable[[Coefficients], tuple[Verdict, str]]

N_DRAWS = 200
"""Bootstrap coefficients kept for the planner's intervals."""
_NEGLIGIBLE = 1e-3


class Observed(NamedTuple):
    """What a law is fitted to. `groups` are runs (resampled together), `cells` are left out together: one (n, k)."""

    logs: Logs
    log_y: np.ndarray
    groups: np.ndarray
    cells: np.ndarray
    largest: np.ndarray

    @staticmethod
    def of(logs: dict[str, list[float]], y: list[float], runs: list[str], cells: list[Any], size: str) -> Observed:
        """From values (not logs); `largest` are the points with the largest `size`."""
        logged = {name: np.log(np.array(values, dtype=float)) for name, values in logs.items()}
        largest = logged[size] == logged[size].max()
        return Observed(logged, np.log(np.array(y, dtype=float)), _numbered(runs), _numbered(cells), largest)


def entry(
    law: Law,
    seen: Observed,
    claim: str,
    judge: Judge,
    *,
    at: dict[str, Any],
    excluded: list[Excluded],
    seed: int,
    keep_draws: bool = False,
) -> dict[str, Any]:
    """The law fitted to what was observed, with intervals, errors on what was left out, and a verdict.

    Where runs have one point each, low and high are the profile's, else the bootstrap's over runs.
    """
    if len(seen.log_y) < len(law.coefficients) + 2:
        reason = f"{len(seen.log_y)} points are too few for {len(law.coefficients)} coefficients"
        return unfitted(law, claim, reason, at=at, excluded=excluded, n_runs=_count(seen.groups))
    best = fit.best_fit(law, seen.logs, seen.log_y, seed).theta[0]
    draws = fit.bootstrap(law, seen.logs, seen.log_y, best, seen.groups, seed)
    coefficients = _coefficients(law, seen, best, draws)
    residual = seen.log_y - law.log_value(best, seen.logs)
    errors = _errors(law, seen, best, seed)
    comparison = _without_irreducible(law, seen, errors, seed) if law.irreducible else None
    verdict, reason = judge(coefficients)
    found = {
        **_head(law, claim, verdict, reason, at),
        "coefficients": coefficients,
        "n_runs": _count(seen.groups),
        "n_points": len(seen.log_y),
        "residual_sd": fit.residual_sd(residual, len(best)),
        **errors,
        "irreducible": comparison,
        "excluded": [e._asdict() for e in excluded],
    }
    if keep_draws:
        found["draws"] = rounded(draws)
    return found


def rounded(draws: np.ndarray) -> list[list[float]]:
    """The first N_DRAWS draws as JSON keeps them: seven digits."""
    return [[float(f"{value:.7g}") for value in row] for row in draws[:N_DRAWS]]


def theta(fitted: dict[str, Any]) -> np.ndarray:
    """The coefficients of a fitted entry, in the law's order."""
    return np.array([c["value"] for c in fitted["coefficients"].values()])


def unfitted(
    law: Law, claim: str, reason: str, *, at: dict[str, Any], excluded: list[Excluded], n_runs: int
) -> dict[str, Any]:
    """The form of a law that could not be fitted: no coefficients, verdict "cannot tell"."""
    return {
        **_head(law, claim, "cannot tell", reason, at),
        "coefficients": None,
        "n_runs": n_runs,
        "n_points": n_runs,
        "residual_sd": None,
        "held_out_error": None,
        "extrapolation_error": None,
        "irreducible": None,
        "excluded": [e._asdict() for e in excluded],
    }


def sign(coefficients: Coefficients, name: str, wanted: int) -> tuple[Verdict, str]:
    """Whether a coefficient has the sign `wanted`, by its interval; the reason quotes it."""
    c = coefficients[name]
    quoted = f"{name} = {c['value']:.4g} [{end(c['low'])}, {end(c['high'])}]"
    low, high = (c["low"], c["high"]) if wanted > 0 else (_minus(c["high"]), _minus(c["low"]))
    if low is not None and low > 0:
        return "holds", quoted
    if high is not None and high < 0:
        return "fails", quoted
    return "cannot tell", quoted


def both(first: tuple[Verdict, str], second: tuple[Verdict, str]) -> tuple[Verdict, str]:
    """Two claims as one: fails when one fails, holds when both hold."""
    verdicts = {first[0], second[0]}
    verdict: Verdict = "fails" if "fails" in verdicts else "holds" if verdicts == {"holds"} else "cannot tell"
    return verdict, f"{first[1]}; {second[1]}"


def ranges(values: dict[str, float], low: np.ndarray, high: np.ndarray) -> Coefficients:
    """Coefficients whose intervals are the bootstrap's; None where they reach the bounds of a fit."""
    found: Coefficients = {}
    for i, (name, value) in enumerate(values.items()):
        ends = [float(end) if abs(end) < INTERCEPT_BOUND * (1 - 1e-6) else None for end in (low[i], high[i])]
        found[name] = {"value": value, "low": ends[0], "high": ends[1]}
        found[name] |= {"bootstrap_low": ends[0], "bootstrap_high": ends[1]}
    return found


def _coefficients(law: Law, seen: Observed, best: np.ndarray, draws: np.ndarray) -> Coefficients:
    low, high = fit.percentiles(draws)
    found = ranges(dict(zip(law.coefficients, map(float, best), strict=True)), low, high)
    if _count(seen.groups) == len(seen.log_y):
        for i, name in enumerate(law.coefficients):
            found[name] |= fit.profile(law, seen.logs, seen.log_y, best, i)._asdict()
    return _negligible(law, seen, found)


def _negligible(law: Law, seen: Observed, found: Coefficients) -> Coefficients:
    """An irreducible exp(e) below a thousandth of the least observed is none: e has only an upper bound."""
    limit = float(seen.log_y.min()) + math.log(_NEGLIGIBLE)
    if "e" in law.coefficients and (found["e"]["value"] or 0.0) < limit:
        for side in ("", "bootstrap_"):
            high = found["e"][f"{side}high"]
            found["e"] |= {f"{side}low": None, f"{side}high": None if high is None else max(high, limit)}
    return found


def _errors(law: Law, seen: Observed, best: np.ndarray, seed: int) -> dict[str, float | None]:
    return {
        "held_out_error": fit.held_out_error(law, seen.logs, seen.log_y, best, seen.cells),
        "extrapolation_error": fit.extrapolation_error(law, seen.logs, seen.log_y, seen.largest, seed),
    }


def _without_irreducible(law: Law, seen: Observed, errors: dict[str, float | None], seed: int) -> dict[str, Any] | None:
    if len(law.terms) > 2:
        return None
    plain = reducible(law)
    best = fit.best_fit(plain, seen.logs, seen.log_y, seed).theta[0]
    without = _errors(plain, seen, best, seed)
    better = (without["held_out_error"] or math.inf) < (errors["held_out_error"] or 0.0)
    named = dict(zip(plain.coefficients, map(float, best), strict=True))
    return {"with": errors, "without": {**without, "coefficients": named}, "preferred": "without" if better else "with"}


def _head(law: Law, claim: str, verdict: Verdict, reason: str, at: dict[str, Any]) -> dict[str, Any]:
    return {"law": law.title, "formula": law.formula, "claim": claim, "verdict": verdict, "reason": reason, "at": at}


def _numbered(names: list[Any]) -> np.ndarray:
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int64)


def _count(groups: np.ndarray) -> int:
    return len(np.unique(groups))


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def end(value: float | None) -> str:
    """An end of an interval, for people."""
    return "no bound" if value is None else f"{value:.4g}"
