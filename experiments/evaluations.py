"""Evaluate runs with the quick suite, and keep what docs/reproduce.md says of them under results/.

    python experiments/evaluations.py runs/lab/joint/runs/topk-n1024-k16 runs/lab/relu/runs/relu-...

Each run is evaluated as by `monosem eval RUN --suite quick` (what is done is not done again), then its numbers go
to results/smollm2-135m-instruct-q4_1/evals/metrics.csv and its tasks to tasks.csv, in place of older ones of that name.
claims.json says which claims of the paper hold by these numbers. `experiments/tables.py` shows both. With --complete,
every latent of one run is explained and simulated; its numbers go to complete.json.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from monosem import artifacts, logs
from monosem.config import EvalConfig
from monosem.evals import Shared, evaluate
from monosem.evals.bootstrap import Interval, bootstrap, ratio

KEPT = Path("results/smollm2-135m-instruct-q4_1/evals")
FACTS = ("activation", "n_latents", "k", "tokens_seen")
TASK_COLUMNS = ("task", "pooling", "n_held_out", "latent", "probe_loss", "probe_loss_train", "probe_loss_null")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's numbers out of metrics.csv."""

    name: str
    activation: str
    n_latents: int
    k: int
    tokens: int
    metrics: dict[str, Interval]

    def __getitem__(self, metric: str) -> Interval:
        return self.metrics[metric]


class Claim(NamedTuple):
    """What the paper says, what is seen here, and whether it holds."""

    claim: str
    seen: str
    verdict: str


def main(folders: list[str]) -> None:
    if not folders or folders == ["--complete"]:
        sys.exit(__doc__)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("monosem").setLevel(logging.INFO)
    logs.show_progress(True)
    shared = Shared()
    if folders[0] == "--complete":
        keep_complete(evaluate(EvalConfig(run=folders[1], suite="quick", n2g="all"), shared))
        return
    for folder in folders:
        keep(Path(folder).name, evaluate(EvalConfig(run=folder, suite="quick"), shared))
        artifacts.write_json(KEPT / "claims.json", [claim._asdict() for claim in claims(read())])


def keep(name: str, report: dict[str, Any]) -> None:
    """Put the report's numbers and tasks into the two files."""
    facts = {"run": name, **{field: report["run"][field] for field in FACTS}}
    _replace("metrics.csv", name, ({**facts, "metric": metric, **m} for metric, m in report["metrics"].items()))
    tasks = report["tables"]["probes"]["tasks"]
    _replace("tasks.csv", name, ({"run": name, **{column: row[column] for column in TASK_COLUMNS}} for row in tasks))


def keep_complete(report: dict[str, Any]) -> None:
    """The numbers of rules when every latent has one."""
    metrics = {name: m for name, m in report["metrics"].items() if name.startswith(("n2g_", "explanation_"))}
    artifacts.write_json(
        KEPT / "complete.json", {"run": {field: report["run"][field] for field in FACTS}, "metrics": metrics}
    )


def read() -> dict[str, Run]:
    """The runs of metrics.csv by name."""
    found: dict[str, Run] = {}
    for row in _rows("metrics.csv"):
        n_latents, k, tokens = (int(row[field]) for field in ("n_latents", "k", "tokens_seen"))
        run = found.setdefault(row["run"], Run(row["run"], row["activation"], n_latents, k, tokens, {}))
        run.metrics[row["metric"]] = Interval(*(float(row[field]) for field in ("value", "low", "high")))
    return found


def grid(runs: dict[str, Run]) -> dict[tuple[int, int], Run]:
    """The TopK runs at the default lr by (n_latents, k)."""
    return {(r.n_latents, r.k): r for r in runs.values() if r.name == f"topk-n{r.n_latents}-k{r.k}"}


def claims(runs: dict[str, Run]) -> list[Claim]:
    """Every claim of the paper that these runs speak of."""
    found = [
        Claim("metrics improve with n", *_all_of([_change(runs, name, sign, along=0) for name, sign in _IMPROVE])),
        Claim("probe loss improves with n", *_probe_change(runs, along=0)),
        Claim("probe loss improves, then worsens with k", *_probe_change(runs, along=1)),
        Claim("ablations get sparser as k grows", *_change(runs, "ablation_sparsity", -1, along=1)),
        Claim("latents' ablations are sparser than channels'", *_below(runs, "ablation_sparsity", "_channels")),
        Claim("… in the ablated token's own logits", *_below(runs, "ablation_sparsity_own_token", "_channels")),
        Claim("N2G: recall high, precision low", *_recall_above_precision(runs)),
        Claim("N2G easier with larger n", *_all_of([_change(runs, f"n2g_{s}", 1, along=0) for s in _SCORES])),
        Claim("N2G easier with smaller k", *_all_of([_change(runs, f"n2g_{s}", -1, along=1) for s in _SCORES])),
        Claim("TopK more monosemantic than ReLU: N2G's precision at equal L0", *_monosemantic(runs)),
        Claim("zero-ablation flatters", *_flatters(runs)),
        Claim("TopK needs no refinement, ReLU + L1 does", *_refinement(runs)),
        Claim("TopK − ReLU: the gap downstream exceeds that in MSE", *_gap(runs)),
        Claim("Multi-TopK is progressive", *_progressive(runs)),
    ]
    return found


_IMPROVE = (("normalized_mse", -1), ("delta_ce", -1), ("kl", -1))
_SCORES = ("recall", "precision")
_NEAR = math.log(1.25)
"""Two L0 are about equal up to this, in logarithms."""
_HOLDS, _NOT, _UNKNOWN = "holds", "does not hold", "cannot tell"


def _change(runs: dict[str, Run], metric: str, sign: int, *, along: int) -> tuple[str, str]:
    """How the metric changes from the least to the largest n (along 0) or k (1), the mean over the other.

    The interval of a difference adds both halves in quadrature, though both are of the same text: it is too wide.
    """
    changes, halves = [], []
    for first, last in _ends(grid(runs), along):
        a, b = first[metric], last[metric]
        changes.append(b.value - a.value)
        halves.append(math.hypot(b.high - b.low, a.high - a.low) / 2)
    if not changes:
        return "no runs", _UNKNOWN
    mean, half = sum(changes) / len(changes), sum(halves) / len(halves)
    said = f"{metric}: {_signed(mean)} [{_signed(mean - half)}, {_signed(mean + half)}]"
    return said, _verdict(sign * mean, half)


def _probe_change(runs: dict[str, Run], *, along: int) -> tuple[str, str]:
    """The change of the probe loss, paired by task: least to largest n, or on both sides of the middle k."""
    tasks = _probe_losses()
    by_size = grid(runs)
    if along == 0:
        pairs = [("", *ends) for ends in _ends(by_size, 0)]
    else:
        ks = sorted({k for _, k in by_size})
        full = [n for n in sorted({n for n, _ in by_size}) if all((n, k) in by_size for k in ks)]
        if len(ks) < 3 or not full:
            return "no runs", _UNKNOWN
        low, middle, high = ks[0], ks[len(ks) // 2], ks[-1]
        pairs = [(f"k {low} → {middle}", by_size[n, low], by_size[n, middle]) for n in full]
        pairs += [(f"k {middle} → {high}", by_size[n, middle], by_size[n, high]) for n in full]
    if not pairs:
        return "no runs", _UNKNOWN
    said, verdicts = [], []
    for label in dict.fromkeys(label for label, _, _ in pairs):
        own = [(a, b) for name, a, b in pairs if name == label]
        change = torch.stack([tasks[b.name] - tasks[a.name] for a, b in own]).mean(0)
        sums = torch.stack([change, torch.ones_like(change)], dim=1)
        found = bootstrap(sums, ratio(0, 1), n_resamples=1000, seed=0)
        said.append(f"{label} {_signed(found.value)} [{_signed(found.low)}, {_signed(found.high)}]".strip())
        sign = 1 if label and label == pairs[-1][0] else -1
        verdicts.append(_verdict_of(found, sign))
    return "probe_loss: " + "; ".join(said), _worst(verdicts)


def _below(runs: dict[str, Run], metric: str, suffix: str) -> tuple[str, str]:
    by_size = grid(runs).values()
    return _compared([(run[metric], run[f"{metric}{suffix}"]) for run in by_size], f"{metric}, {suffix[1:]}")


def _recall_above_precision(runs: dict[str, Run]) -> tuple[str, str]:
    pairs = [(run["n2g_precision"], run["n2g_recall"]) for run in grid(runs).values()]
    return _compared(pairs, "precision, recall")


def _compared(pairs: list[tuple[Interval, Interval]], names: str) -> tuple[str, str]:
    """Whether the first of each pair is the smaller."""
    if not pairs:
        return "no runs", _UNKNOWN
    a, b = ([pair[i].value for pair in pairs] for i in (0, 1))
    half = sum(math.hypot(x.high - x.low, y.high - y.low) / 2 for x, y in pairs) / len(pairs)
    said = f"{names}: {min(a):.3g} to {max(a):.3g} and {min(b):.3g} to {max(b):.3g}"
    return said, _verdict((sum(b) - sum(a)) / len(pairs), half)


def _monosemantic(runs: dict[str, Run]) -> tuple[str, str]:
    """TopK's precision less that of the ReLU of nearest L0, by quantile of activation."""
    said, verdicts = [], []
    for topk in grid(runs).values():
        relu = [r for r in runs.values() if (r.activation, r.n_latents) == ("relu", topk.n_latents)]
        near = min(relu, key=lambda r: abs(math.log(r["l0"].value / topk["l0"].value)), default=None)
        if near is None or abs(math.log(near["l0"].value / topk["l0"].value)) > _NEAR:
            continue
        found = []
        for quantile in ("", "_q50", "_q90"):
            a, b = topk[f"n2g_precision{quantile}"], near[f"n2g_precision{quantile}"]
            half = math.hypot(a.high - a.low, b.high - b.low) / 2
            found.append(f"{quantile[1:] or 'all'} {_signed(a.value - b.value)} ± {half:.2g}")
            verdicts.append(_verdict(a.value - b.value, half))
        l0 = f"L0 {topk['l0'].value:.0f} and {near['l0'].value:.0f}"
        said.append(f"n {topk.n_latents:,}, {l0}: {', '.join(found)}")
    return ("; ".join(said), _worst(verdicts)) if said else ("no runs", _UNKNOWN)


def _flatters(runs: dict[str, Run]) -> tuple[str, str]:
    own = [run for run in grid(runs).values() if "compute_equivalent" in run.metrics]
    if not own:
        return "no runs", _UNKNOWN
    said = []
    for metric in ("loss_recovered_zero", "loss_recovered_mean", "compute_equivalent"):
        values = [run[metric].value for run in own]
        said.append(f"{metric} {min(values):.3g} to {max(values):.3g}")
    flatter = all(run["loss_recovered_zero"].low > run["compute_equivalent"].high for run in own)
    return "; ".join(said), _HOLDS if flatter else _NOT


def _refinement(runs: dict[str, Run]) -> tuple[str, str]:
    """What refined magnitudes gain, and their slope on the activations."""
    gains: dict[str, list[tuple[float, Interval]]] = {}
    for run in runs.values():
        gain = 1 - run["refined_normalized_mse"].value / run["unrefined_normalized_mse"].value
        gains.setdefault(run.activation, []).append((gain, run["refinement_slope"]))
    said = [
        f"{name}: error falls by {_percents([gain for gain, _ in own])}, slope "
        f"{min(s.value for _, s in own):.3f} to {max(s.value for _, s in own):.3f}"
        for name, own in sorted(gains.items())
        if name in ("topk", "relu")
    ]
    if not {"topk", "relu"} <= gains.keys():
        return "; ".join(said) or "no runs", _UNKNOWN
    apart = max(g for g, _ in gains["topk"]) < min(g for g, _ in gains["relu"])
    shifted = max(s.high for _, s in gains["topk"]) < min(s.low for _, s in gains["relu"])
    return "; ".join(said), _HOLDS if apart and shifted else _NOT


def _gap(runs: dict[str, Run]) -> tuple[str, str]:
    """ReLU over TopK at TopK's L0, in NMSE, ΔCE and KL: ReLU interpolated in log L0 between two runs around it."""
    said, excess = [], []
    for topk in grid(runs).values():
        relu = [r for r in runs.values() if (r.activation, r.n_latents) == ("relu", topk.n_latents)]
        relu.sort(key=lambda r: r["l0"].value)
        below, above = ([r for r in relu if side * (r["l0"].value - topk["l0"].value) > 0] for side in (-1, 1))
        if not below or not above:
            continue
        a, b = below[-1], above[0]
        share = math.log(topk["l0"].value / a["l0"].value) / math.log(b["l0"].value / a["l0"].value)
        ratios = {m: math.exp(_mix(a[m], b[m], share)) / topk[m].value for m in ("normalized_mse", "delta_ce", "kl")}
        half = [math.log(r["delta_ce"].high / r["delta_ce"].low) / 2 for r in (a, b, topk)]
        excess.append((math.log(ratios["delta_ce"] / ratios["normalized_mse"]), math.hypot(max(half[:2]), half[2])))
        numbers = ", ".join(f"{m} {value:.2f}" for m, value in ratios.items())
        said.append(f"n {topk.n_latents:,}, L0 {topk['l0'].value:.0f}: ReLU / TopK in {numbers}")
    if not said:
        return "no runs", _UNKNOWN
    return "; ".join(said), _worst([_verdict(*e) for e in excess])


def _progressive(runs: dict[str, Run]) -> tuple[str, str]:
    """The error at k' from k on, of Multi-TopK and of TopK of the same size."""
    said, verdicts = [], []
    for multi in (r for r in runs.values() if r.activation == "multi_topk"):
        topk = grid(runs).get((multi.n_latents, multi.k))
        if topk is None:
            continue
        for run in (topk, multi):
            at = [run[f"progressive_normalized_mse_k{factor * run.k}"].value for factor in (1, 2, 4, 8)]
            said.append(f"{run.activation} at k, 2k, 4k, 8k: {', '.join(f'{v:.3f}' for v in at)}")
        a, b = (run[f"progressive_normalized_mse_k{4 * multi.k}"] for run in (multi, topk))
        verdicts.append(_verdict(b.value - a.value, math.hypot(a.high - a.low, b.high - b.low) / 2))
    return ("; ".join(said), _worst(verdicts)) if said else ("no runs", _UNKNOWN)


def _ends(by_size: dict[tuple[int, int], Run], along: int) -> list[tuple[Run, Run]]:
    """For each value of the other size the runs with the least and the largest, where these are the grid's own."""
    least, most = (end(size[along] for size in by_size) if by_size else 0 for end in (min, max))
    others = sorted({size[1 - along] for size in by_size})
    sizes = [tuple((end, other)[:: 1 - 2 * along] for end in (least, most)) for other in others]
    return [(by_size[a], by_size[b]) for a, b in sizes if a != b and a in by_size and b in by_size]


def _probe_losses() -> dict[str, torch.Tensor]:
    """By run the losses of its tasks, mean pooling, in the order of the tasks."""
    found: dict[str, list[float]] = {}
    for row in sorted(_rows("tasks.csv"), key=lambda row: row["task"]):
        if row["pooling"] == "mean":
            found.setdefault(row["run"], []).append(float(row["probe_loss"]))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def _all_of(parts: Iterable[tuple[str, str]]) -> tuple[str, str]:
    said, verdicts = zip(*parts, strict=True)
    return "; ".join(said), _worst(list(verdicts))


def _worst(verdicts: list[str]) -> str:
    return max(verdicts, key=[_HOLDS, _UNKNOWN, _NOT].index)


def _verdict(towards: float, half: float) -> str:
    return _UNKNOWN if abs(towards) < half else _HOLDS if towards > 0 else _NOT


def _verdict_of(change: Interval, sign: int) -> str:
    low, high = sorted((sign * change.low, sign * change.high))
    return _HOLDS if low > 0 else _NOT if high < 0 else _UNKNOWN


def _mix(a: Interval, b: Interval, share: float) -> float:
    return math.log(a.value) * (1 - share) + math.log(b.value) * share


def _percents(shares: list[float]) -> str:
    return f"{100 * min(shares):.1f}% to {100 * max(shares):.1f}%"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _rows(name: str) -> list[dict[str, str]]:
    if not (KEPT / name).exists():
        return []
    with open(KEPT / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _replace(name: str, run: str, new: Iterable[dict[str, Any]]) -> None:
    """Put the rows of a run into a file, in place of its older ones."""
    rows = sorted([r for r in _rows(name) if r["run"] != run] + [*map(dict, new)], key=lambda row: row["run"])
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({field: _short(value) for field, value in row.items()} for row in rows)
    write: Callable[[Path], Any] = lambda path: path.write_text(text.getvalue(), "utf-8")  # noqa: E731
    artifacts.write_atomic(KEPT / name, write)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main(sys.argv[1:])
