"""A table of runs -> the scaling laws of Gao et al. 2024, section 4, with intervals and verdicts; and plans from them.

`laws` are the formulas, `fit` the fitting, `tables` what is read and left out, `entry` the form of a fitted law,
`questions` which points each law is fitted to, `sparsity` NMSE against L0, `costs` seconds, FLOPs and bytes, `figures`
the pictures, `plan` what follows for a budget.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from monosem import artifacts, charts
from monosem.config import ScaleConfig
from monosem.scaling import costs, questions, sparsity, tables
from monosem.scaling.entry import end
from monosem.scaling.laws import JOINT
from monosem.scaling.tables import Excluded, Point, Table

log = logging.getLogger("monosem")

KIND = "scaling-laws"


def scale(config: ScaleConfig) -> dict[str, Any]:
    """The report, also in scaling.json beside the table, with figures/*.png and scaling.html.

    The same table gives the same bytes. `ValueError` naming the lines of the table when it is wrong, mixes subjects or
    sites, or holds too few runs for any law.
    """
    path = tables.table_path(config.table)
    with artifacts.file_lock(path.parent / "scaling.json"):
        return _scale(config, path)


def _scale(config: ScaleConfig, path: Path) -> dict[str, Any]:
    out = path.parent
    _check(out, figures=config.figures)
    table = tables.read_table(path)
    for run, reason in table.excluded:
        log.warning("run %s is left out: %s", run, reason)
    report = _report(config, path, table)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("table", "families")}
    artifacts.write_json(out / "scaling.json", artifacts.manifest(KIND, settings, {"runs": table.sha256}, **report))
    if config.figures:
        from monosem.scaling import figures

        figures.write(report, out)
    return _public(report)


def _check(out: Path, *, figures: bool) -> None:
    """`ValueError` unless the results can be written: over those of an earlier call alone, with the libraries there."""
    artifacts.require_writable(out / "scaling.json")
    if (out / "scaling.json").exists():
        artifacts.read_manifest(out / "scaling.json", KIND)
    charts.library("scipy")
    if figures:
        for name in ("matplotlib", "plotly"):
            charts.library(name)
        if not (out / "scaling.json").exists():  # it is written before its figures
            for path in (out / "scaling.html", *(out / "figures").glob("*.png")):
                artifacts.require_ours(path, lambda _: False)


def summary(report: dict[str, Any]) -> str:
    """The report for people: a block a fitted law, and a line for those that could not be fitted, with the reason."""
    of = report["of"]
    blocks = [f"{of['n_runs']} runs of {of['subject']}, layer {of['layer']} {of['location']}, d_model {of['d_model']}"]
    unfitted: dict[str, list[str]] = {}
    for name, entry in walk(report):
        if entry["coefficients"] is None:
            unfitted.setdefault(f"{name.split('.')[0]}: cannot tell; {entry['reason']}", []).append(name)
        else:
            blocks.append(_block(name, entry))
    blocks.append("\n".join(f"{what} ({len(names)})" for what, names in unfitted.items()))
    gap = report["sparsity"]["topk_relu_gap"]
    blocks.append(f"{gap['claim']}: {gap['verdict']}; {gap['reason']}")
    for family, trend in (report["subjects"] or {"families": {}})["families"].items():
        blocks.append(f"{family}: {trend['claim']}: {trend['verdict']}; {trend['reason']}")
    left_out = [f"  {e['run']}: {e['reason']}" for e in report["excluded"] + report["joint"]["excluded"]]
    blocks.append("\n".join([f"left out of all fits, or of the joint one: {len(left_out)} runs", *left_out[:20]]))
    return "\n\n".join(b for b in blocks if b)


def walk(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every fitted or unfitted law in the report with its place, as `n_fixed_tokens.32`."""
    found = []
    for name in ("joint", "joint_converged"):
        found.append((name, report[name]))
    for name in ("n_fixed_tokens", "n_converged", "tokens_to_convergence", "n_tokens"):
        found += [(f"{name}.{k}", entry) for k, entry in report[name].items()]
    for flops, by_k in report["compute"].items():
        found += [(f"compute.{flops}.{k}", entry) for k, entry in by_k.items()]
    return found


def _report(config: ScaleConfig, path: Path, table: Table) -> dict[str, Any]:
    families = tables.families(config.families, {p.subject for p in table.points}) if config.families else None
    subject, by_subject = _subjects(config, table.points)
    points = tables.one_site(path, table.points, subject)
    topk = [p for p in points if p.activation == "topk"]
    if not topk:
        raise ValueError(f"{path} has no TopK runs; the laws are of them")
    main, other = tables.of_main_setting(topk)
    tokens = tables.fixed_tokens(main, config.tokens)
    chosen, unreached = tables.at_tokens(main, tokens)
    kept, worse = tables.best_lr(chosen)
    excluded, at = other + unreached + worse, {"tokens": tokens, "setting": main[0].setting}
    joint = questions.joint(kept, JOINT, at, excluded, config.seed)
    by_k = questions.by_k(kept, "L(N | D)", at, excluded, config.seed)
    noise = max(entry["residual_sd"] or 0.0 for entry in (joint, *by_k.values()))
    report: dict[str, Any] = {
        "of": _facts(points, table),
        "joint": joint,
        "n_fixed_tokens": by_k,
        **questions.at_convergence(main, config.seed),
        "n_tokens": questions.in_n_and_tokens(_all_points(main, kept), at, excluded, config.seed),
        "compute": {
            flops: questions.in_compute(main, flops, noise, config.seed)
            for flops in ("flops", "flops_dense_equivalent")
        },
    }
    _refuse_nothing_fitted(path, report, kept, excluded)
    report["sparsity"] = sparsity.frontier(_at(points, tokens), at, config.seed)
    report["subjects"] = None
    if families:
        report["subjects"] = questions.across_subjects(by_subject, families, config.seed)
    report["costs"] = costs.measured(points)
    report["points"] = _plotted(main, kept)
    report["excluded"] = [e._asdict() for e in table.excluded]
    return report


def _subjects(config: ScaleConfig, points: list[Point]) -> tuple[str | None, dict[str, list[Point]]]:
    """The subject of the laws other than L_s(N), as asked, else with families the one of most runs; and all by name."""
    runs = {p.run: p.subject for p in points}
    names = sorted(set(runs.values()))
    by_subject = {}
    if config.families:
        for name in names:
            own = [p for p in points if p.subject == name and p.activation == "topk"]
            if not own:
                log.warning("%s has no TopK runs and is left out of L_s(N)", name)
                continue
            tables.one_site(Path(config.table), own, None)
            by_subject[name] = tables.of_main_setting(own)[0]
    subject = config.subject
    if subject is None and config.families and len(names) > 1:
        subject = max(names, key=lambda name: list(runs.values()).count(name))
        log.info("laws other than L_s(N) are of %s, which has most runs (--subject chooses)", subject)
    return subject, by_subject


def _refuse_nothing_fitted(path: Path, report: dict[str, Any], kept: list[Point], excluded: list[Excluded]) -> None:
    if any(entry["coefficients"] for _, entry in walk(report)):
        return
    sizes = sorted({p.n_latents for p in kept})
    why = (
        f"all have n_latents = {sizes[0]:,}" if len(sizes) == 1 else f"{len(sizes)} sizes: {', '.join(map(str, sizes))}"
    )
    raise ValueError(
        f"{path} holds too few runs for any law: {len(kept)} TopK runs at one number of tokens ({why}; "
        f"{tables.lines(kept)}), {len(excluded)} others left out; a law in n needs {questions.MIN_SIZES} sizes at one k"
    )


def _facts(points: list[Point], table: Table) -> dict[str, Any]:
    p = points[0]
    stores = sorted({q.store_hash for q in points})
    if len(stores) > 1:
        log.warning("the runs were evaluated on %d stores: their NMSEs are of different held-out text", len(stores))
    return {
        "subject": p.subject,
        "layer": p.layer,
        "location": p.location,
        "d_model": p.d_model,
        "n_runs": len({q.run for q in points}),
        "n_points": len(points),
        "stores": stores,
        "table_sha256": table.sha256,
    }


def _all_points(points: list[Point], kept: list[Point]) -> list[Point]:
    names = {p.run for p in kept}
    return [p for p in points if p.run in names]


def _at(points: list[Point], tokens: int) -> list[Point]:
    """Of every run of every activation function, its point at `tokens` in the setting of most of its runs."""
    found: list[Point] = []
    for activation in sorted({p.activation for p in points}):
        main, _ = tables.of_main_setting([p for p in points if p.activation == activation])
        groups = tables.token_groups(main)
        near = [p for t in groups if tables.same_tokens(t, tokens) for p in groups[t]]
        found += {p.run: p for p in near}.values()
    return found


def _plotted(main: list[Point], kept: list[Point]) -> dict[str, list[dict[str, Any]]]:
    """What the figures show beside the fits: `curves`, every point of the main setting; `fitted`, the joint law's."""
    names = ("run", "n_latents", "k", "tokens", "flops", "flops_dense_equivalent", "normalized_mse")
    fields = [{name: getattr(p, name) for name in names} for p in main]
    curves = [{k: tables.nan_to_none(v) for k, v in row.items()} for row in fields]
    return {"curves": curves, "fitted": [{name: getattr(p, name) for name in names[:4] + names[-1:]} for p in kept]}


def _public(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the draws and points that only the planner and the figures read."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ("draws", "points")}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(report)


def _block(name: str, entry: dict[str, Any]) -> str:
    lines = [f"{name}: {entry['law']}, {entry['n_runs']} runs: {entry['claim']}: {entry['verdict']}"]
    for coefficient, c in entry["coefficients"].items():
        lines.append(f"  {coefficient:<7}{c['value']:>10.4g}  [{end(c['low'])}, {end(c['high'])}]")
    errors = [("held out", entry["held_out_error"]), ("extrapolation", entry["extrapolation_error"])]
    lines.append("  error of ln NMSE: " + ", ".join(f"{what} {e:.4f}" for what, e in errors if e is not None))
    return "\n".join(lines)
