"""A budget or a goal -> which n, k and how many tokens, what it costs, and a prediction that a later run is held to.

NMSE comes from L(N,D) of the k, or from the joint law at its own D; seconds and FLOPs from the table's costs a token. A
prediction's interval holds the law's bootstrap and the law's own error on what it had not seen.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosem import artifacts
from monosem.config import PlanConfig, TrainConfig, to_dict
from monosem.scaling import KIND, costs, fit, tables
from monosem.scaling.entry import theta
from monosem.scaling.laws import DATA, JOINT

_PREDICTION = "prediction"
_STEPS_PER_DOUBLING = 4
_BEYOND = 4
"""Sizes up to this factor outside the table's are considered, and marked as extrapolated."""


class Laws(NamedTuple):
    """What a plan reads: the report in scaling.json, and its hash."""

    report: dict[str, Any]
    sha256: str

    @staticmethod
    def read(path: str) -> Laws:
        return Laws(artifacts.read_manifest(path, KIND), artifacts.sha256_file(path))

    @property
    def d_model(self) -> int:
        return self.report["of"]["d_model"]

    def ks(self) -> list[int]:
        return [int(k) for k, entry in self.report["n_tokens"].items() if entry["coefficients"]]

    def sizes(self) -> list[int]:
        """Sizes from the table's smallest to its largest, and _BEYOND, in steps of a quarter doubling, by 64."""
        n = [p["n_latents"] for p in self.report["points"]["curves"]]
        low, high = math.log2(min(n) / _BEYOND), math.log2(max(n) * _BEYOND)
        steps = np.arange(math.ceil(low * _STEPS_PER_DOUBLING), high * _STEPS_PER_DOUBLING + 1)
        return sorted({max(64, round(2 ** (s / _STEPS_PER_DOUBLING) / 64) * 64) for s in steps})

    def predict(self, n_latents: int, k: int, tokens: float) -> dict[str, Any]:
        """NMSE with its 95% interval: {value, low, high, law, extrapolated}."""
        joint = self.report["joint"]
        at_d = joint["coefficients"] and tables.same_tokens(tokens, joint["at"]["tokens"])
        entry, law = (joint, JOINT) if at_d else (self.report["n_tokens"].get(str(k), {"coefficients": None}), DATA)
        if not entry["coefficients"]:
            known = ", ".join(map(str, self.ks())) or "none"
            d = f"; the joint law is of {joint['at']['tokens']:,} tokens" if joint["coefficients"] else ""
            raise ValueError(f"there is no fitted L(N,D) at k = {k} (fitted k: {known}){d}")
        logs = {"n": np.log([n_latents]), "k": np.log([k]), "tokens": np.log([tokens])}
        value = law.log_value(theta(entry), logs)[0]
        seen = [p for p in self.report["points"]["curves"] if law is JOINT or p["k"] == k]
        beyond = not all(
            min(p[name] for p in seen) <= x <= tables.SAME_TOKENS * max(p[name] for p in seen)
            for name, x in (("n_latents", n_latents), ("k", k), ("tokens", tokens))
        )
        errors = [entry["residual_sd"], entry["held_out_error"], entry["extrapolation_error"] if beyond else None]
        draws = law.log_value(np.array(entry["draws"]), logs)[:, 0]
        noise = max(e for e in errors if e is not None) * np.random.default_rng(0).standard_normal((50, len(draws)))
        low, high = fit.percentiles((draws + noise).ravel())
        interval = [float(np.exp(v)) for v in (value, min(low, value), max(high, value))]
        return {
            **dict(zip(("value", "low", "high"), interval, strict=True)),
            "law": entry["law"],
            "extrapolated": beyond,
        }

    def log_nmse(self, k: int, n_latents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return DATA.log_value(
            theta(self.report["n_tokens"][str(k)]), {"n": np.log(n_latents), "tokens": np.log(tokens)}
        )

    def per_token(self, what: str, n_latents: int, k: int) -> float:
        """FLOPs or seconds a token; `ValueError` when the table did not say."""
        cost = self.report["costs"][what]
        if cost is None:
            raise ValueError(f"the table gave no {costs.COSTS[what]}; plan with another budget, or with --flops-per-s")
        return costs.per_token(cost, n_latents, k, self.d_model)


def plan(config: PlanConfig) -> dict[str, Any]:
    """{"plans": one a k, "scaling": hash, "of": site}; with `out` the single plan is written there as a prediction.

    `ValueError` when the laws were not fitted, the goal is out of reach, or `out` exists.
    """
    if config.scaling is None:
        raise ValueError("scaling is missing; give the scaling.json that `monosem scale` left")
    if all(goal is None for goal in (config.flops, config.hours, config.tokens, config.nmse)):
        raise ValueError("give a budget or a goal: one of flops, hours, tokens, nmse")
    if config.out is not None:
        _require_new(config.out)
    laws = Laws.read(config.scaling)
    ks = [config.k] if config.k is not None else laws.ks()
    if not ks:
        raise ValueError(f"{config.scaling} has no fitted L(N,D); give --k, --n-latents and --tokens of the joint law")
    plans = [_plan(config, laws, k) for k in ks]
    found = {"of": laws.report["of"], "scaling": laws.sha256, "plans": plans}
    if config.out is not None:
        settings = {name: value for name, value in to_dict(config).items() if name not in ("scaling", "out")}
        with artifacts.file_lock(config.out):
            _require_new(config.out)
            made = artifacts.manifest(_PREDICTION, settings, {"scaling": laws.sha256}, **found)
            artifacts.write_json(config.out, made)
        found["out"] = config.out
    return found


def _require_new(path: str) -> None:
    artifacts.require_regular(path)
    if Path(path).exists():
        raise ValueError(f"{path} exists; a prediction is not overwritten: choose another name")
    artifacts.require_writable(path)


def check(config: PlanConfig) -> dict[str, Any]:
    """Whether the runs that the prediction is about fell inside its interval.

    {"predicted", "runs": [{run, normalized_mse, inside}], "verdict": "inside", "outside" or "no run yet"}: of the runs
    with its site, n, k and tokens, those at the best lr.
    """
    assert config.check is not None and config.table is not None
    prediction = artifacts.read_manifest(config.check, _PREDICTION)
    said, of = prediction["plans"][0], prediction["of"]
    table = tables.read_table(tables.table_path(config.table))
    same = [
        p
        for p in table.points
        if (p.activation, p.n_latents, p.k) == ("topk", said["n_latents"], said["k"])
        and (p.subject, p.layer, p.location, p.d_model) == (of["subject"], of["layer"], of["location"], of["d_model"])
        and tables.same_tokens(p.tokens, said["tokens"])
    ]
    kept, _ = tables.best_lr(same)
    low, high = said["nmse"]["low"], said["nmse"]["high"]
    runs = [{"run": p.run, "normalized_mse": p.normalized_mse, "inside": low <= p.normalized_mse <= high} for p in kept]
    verdict = "no run yet" if not runs else "inside" if all(r["inside"] for r in runs) else "outside"
    return {"predicted": said, "runs": runs, "table": table.sha256, "verdict": verdict}


def text(found: dict[str, Any]) -> str:
    """A plan or a check for people."""
    if "verdict" in found:
        lines = [_line(found["predicted"])]
        lines += [
            f"  {r['run']}: {r['normalized_mse']:.4f}, {'in' if r['inside'] else 'out'}side" for r in found["runs"]
        ]
        return "\n".join([*lines, found["verdict"]])
    of = found["of"]
    lines = [f"{of['subject']}, layer {of['layer']} {of['location']}, d_model {of['d_model']}"]
    for p in found["plans"]:
        lines += ["", _line(p), *(f"  {said}" for said in _costs_of(p))]
    return "\n".join([*lines, *([f"\nprediction in {found['out']}"] if "out" in found else [])])


def _plan(config: PlanConfig, laws: Laws, k: int) -> dict[str, Any]:
    n, tokens = _choice(config, laws, k)
    if k > n:
        raise ValueError(f"k is {k} but there are only {n} latents; lower k or raise n_latents")
    if tokens < TrainConfig.batch_size:
        raise ValueError(
            f"that is {tokens:.3g} tokens with {n:,} latents, not one batch of {TrainConfig.batch_size:,}; "
            "raise the budget, or lower nmse"
        )
    found: dict[str, Any] = {"n_latents": n, "k": k, "tokens": round(tokens), "nmse": laws.predict(n, k, tokens)}
    known = laws.report["costs"]
    flops = laws.per_token("flops", n, k) * tokens if known["flops"] else None
    seconds = _seconds_per_token(config, laws, n, k) * tokens if config.flops_per_s or known["seconds"] else None
    estimate = f"estimate: {config.mfu:g} of {config.flops_per_s:g} FLOPs/s" if config.flops_per_s else None
    needed = costs.bytes_needed(n, laws.d_model, ema=True, batch_size=TrainConfig.batch_size, k=k, pack=config.pack)
    memory = _own_memory() if config.memory_gib is None else config.memory_gib * 2**30
    hours = seconds / 3600 if seconds is not None else None
    return {
        **found,
        "flops": flops,
        "seconds": seconds,
        "seconds_from": None if seconds is None else estimate or "measured in the table",
        "gpus": config.gpus,
        "price": hours * config.price_per_hour * config.gpus if hours is not None else None,
        "bytes": needed,
        "memory_bytes": round(memory),
        "fits": needed["total"] <= memory,
    }


def _choice(config: PlanConfig, laws: Laws, k: int) -> tuple[int, float]:
    """n and tokens: of the budget, those of the lowest predicted NMSE; of the goal, those of the least FLOPs."""
    sizes = [config.n_latents] if config.n_latents is not None else [n for n in laws.sizes() if n >= k]
    if config.tokens is not None and len(sizes) == 1:
        return sizes[0], config.tokens
    if k not in laws.ks():
        raise ValueError(f"there is no fitted L(N,D) at k = {k}; fitted k: {', '.join(map(str, laws.ks())) or 'none'}")
    n = np.array(sizes, dtype=float)
    if config.hours is not None:
        cost = np.array([_seconds_per_token(config, laws, size, k) for size in sizes])
        return _best(laws, k, n, config.hours * 3600 / cost)
    cost = np.array([laws.per_token("flops", size, k) for size in sizes])
    if config.flops is not None:
        return _best(laws, k, n, config.flops / cost)
    if config.nmse is not None:
        return _least(laws, k, n, cost, config.nmse)
    assert config.tokens is not None
    budgets = cost * config.tokens
    own = [
        abs(math.log(_best(laws, k, n, budget / cost)[0] / size)) for size, budget in zip(sizes, budgets, strict=True)
    ]
    return sizes[int(np.argmin(own))], config.tokens  # the size that is best for what it costs


def _best(laws: Laws, k: int, n: np.ndarray, tokens: np.ndarray) -> tuple[int, float]:
    best = int(laws.log_nmse(k, n, tokens).argmin())
    return int(n[best]), float(tokens[best])


def _least(laws: Laws, k: int, n: np.ndarray, cost: np.ndarray, nmse: float) -> tuple[int, float]:
    """The n and tokens of the least FLOPs whose NMSE is `nmse`: L(N,D) solved for tokens at each n."""
    a, b, c, d, e = (v["value"] for v in laws.report["n_tokens"][str(k)]["coefficients"].values())
    left = nmse - np.exp(a - b * np.log(n)) - math.exp(e)
    if not (left > 0).any() or d <= 0:
        floor = float(np.exp(a - b * np.log(n)).min() + math.exp(e))
        raise ValueError(f"nmse {nmse:g} is out of reach at k = {k}: the law's least is {floor:.4f}; raise nmse or k")
    tokens = np.exp((c - np.log(np.where(left > 0, left, 1.0))) / d)
    best = int(np.where(left > 0, tokens * cost, np.inf).argmin())
    return int(n[best]), float(tokens[best])


def _seconds_per_token(config: PlanConfig, laws: Laws, n_latents: int, k: int) -> float:
    if config.flops_per_s is None:
        return laws.per_token("seconds", n_latents, k)
    return laws.per_token("flops", n_latents, k) / (config.flops_per_s * config.mfu * config.gpus)


def _own_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _line(p: dict[str, Any]) -> str:
    nmse = p["nmse"]
    beyond = ", extrapolated" if nmse["extrapolated"] else ""
    return (
        f"n_latents {p['n_latents']:,}, k {p['k']}, {p['tokens']:,} tokens: normalized_mse {nmse['value']:.4f} "
        f"[{nmse['low']:.4f}, {nmse['high']:.4f}] by {nmse['law']}{beyond}"
    )


def _costs_of(p: dict[str, Any]) -> list[str]:
    lines = []
    if p["seconds"] is not None:
        price = f", price {p['price']:.2f}" if p["price"] else ""
        gpus = f" on {p['gpus']} GPUs" if p["gpus"] > 1 else ""
        lines.append(f"{p['seconds'] / 3600:.3g} hours{gpus} ({p['seconds_from']}){price}")
    if p["flops"] is not None:
        lines.append(f"{p['flops']:.3g} FLOPs")
    parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in p["bytes"].items() if name != "total")
    fits = "fits in" if p["fits"] else "does not fit in"
    lines.append(
        f"{p['bytes']['total'] / 2**30:.2f} GiB a device ({parts}): {fits} {p['memory_bytes'] / 2**30:.1f} GiB"
    )
    return lines
