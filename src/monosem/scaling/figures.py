"""The pictures of a report, in the form of the paper's: each described once, drawn by matplotlib and by plotly.

`write` leaves figures/NAME.png and scaling.html, one page with plotly.js inside that works offline. The same report
gives the same bytes: no dates, no random ids.
"""

from __future__ import annotations

import functools
import html
from pathlib import Path
from typing import Any

import numpy as np

from monosem import artifacts, charts
from monosem.charts import Picture, Series, library, shown
from monosem.scaling.entry import theta
from monosem.scaling.laws import DATA, JOINT, line, power

_LINE_POINTS = 60


def write(report: dict[str, Any], out: Path) -> None:
    """figures/NAME.png of every picture, and scaling.html with all of them; `ValueError` without the extra `lab`."""
    found = pictures(report)
    for picture in found:
        artifacts.write_atomic(out / "figures" / f"{picture.name}.png", functools.partial(_png, picture))
    charts.write_text(out / "scaling.html", _page(found, report))


def pictures(report: dict[str, Any]) -> list[Picture]:
    """compute, n, k, convergence, residuals, l0: what each shows, as data."""
    fitted = report["points"]["fitted"]
    return [
        *(_compute(report, flops) for flops in report["compute"]),
        _joint(report["joint"], fitted, along="n_latents", by="k"),
        _joint(report["joint"], fitted, along="k", by="n_latents"),
        _tokens(report),
        _convergence(report["tokens_to_convergence"]),
        _residuals(report["joint"], fitted),
        _l0(report["sparsity"]),
    ]


def _compute(report: dict[str, Any], flops: str) -> Picture:
    """NMSE along each run at the k of most runs, the frontier, and L(C)."""
    by_k = report["compute"][flops]
    k = max(by_k, key=lambda key: (by_k[key]["coefficients"] is not None, by_k[key]["n_runs"]))
    entry = by_k[k]
    own = [p for p in report["points"]["curves"] if str(p["k"]) == k and p[flops]]
    sizes = sorted({p["n_latents"] for p in own})
    series = []
    for run in dict.fromkeys(p["run"] for p in own):
        mine = sorted((p for p in own if p["run"] == run), key=lambda p: p[flops])
        x, y = [p[flops] for p in mine], [p["normalized_mse"] for p in mine]
        series.append(Series(f"n = {mine[0]['n_latents']:,}", x, y, "curve", sizes.index(mine[0]["n_latents"])))
    if entry["coefficients"]:
        points = entry["frontier"]
        x = [p["flops"] for p in points]
        series.append(Series("frontier", x, [p["normalized_mse"] for p in points], "points", -1))
        grid = np.geomspace(min(x), max(x), _LINE_POINTS)
        series.append(_fit(entry, power("", "c"), {"c": grid}, grid, "L(C)", -1))
    name = "compute" if flops == "flops" else "compute_dense_equivalent"
    what = "FLOPs" if flops == "flops" else "dense-equivalent FLOPs"
    return Picture(name, f"L(C) at k = {k}, C in {what}", what, "normalized MSE", series, _note(entry))


def _joint(entry: dict[str, Any], fitted: list[dict[str, Any]], *, along: str, by: str) -> Picture:
    """NMSE against n for each k, or against k for each n, with the joint law."""
    groups = sorted({p[by] for p in fitted})
    short = {"n_latents": "n", "k": "k"}
    series = []
    for i, value in enumerate(groups):
        own = sorted((p for p in fitted if p[by] == value), key=lambda p: p[along])
        x = [float(p[along]) for p in own]
        series.append(Series(f"{short[by]} = {value:,}", x, [p["normalized_mse"] for p in own], "points", i))
        if entry["coefficients"]:
            grid = np.geomspace(min(x), max(x), _LINE_POINTS)
            logs = {short[along]: grid, short[by]: np.full(_LINE_POINTS, float(value))}
            series.append(_fit(entry, JOINT, logs, grid, "", i))
    title = f"{entry['law']}, D = {entry['at']['tokens']:,} tokens"
    return Picture(short[along], title, along, "normalized MSE", series, _note(entry))


def _tokens(report: dict[str, Any]) -> Picture:
    """NMSE against tokens of each n at the k of most runs, with L(N,D)."""
    by_k = report["n_tokens"]
    k = max(by_k, key=lambda key: (by_k[key]["coefficients"] is not None, by_k[key]["n_runs"]))
    entry = by_k[k]
    own = [p for p in report["points"]["curves"] if str(p["k"]) == k]
    series = []
    for i, n in enumerate(sorted({p["n_latents"] for p in own})):
        mine = sorted((p for p in own if p["n_latents"] == n), key=lambda p: p["tokens"])
        series.append(
            Series(f"n = {n:,}", [p["tokens"] for p in mine], [p["normalized_mse"] for p in mine], "points", i)
        )
        if entry["coefficients"]:
            grid = np.geomspace(entry["at"]["tokens_from"], mine[-1]["tokens"], _LINE_POINTS)
            series.append(_fit(entry, DATA, {"n": np.full(_LINE_POINTS, float(n)), "tokens": grid}, grid, "", i))
    return Picture("tokens", f"L(N,D) at k = {k}", "tokens", "normalized MSE", series, _note(entry))


def _convergence(by_k: dict[str, dict[str, Any]]) -> Picture:
    series = []
    for i, (k, entry) in enumerate(by_k.items()):
        points = entry["points"]
        if points:
            x = [float(p["n_latents"]) for p in points]
            series.append(Series(f"k = {k}", x, [p["tokens"] for p in points], "points", i))
            if entry["coefficients"]:
                grid = np.geomspace(min(x), max(x), _LINE_POINTS)
                series.append(_fit(entry, line("", "n"), {"n": grid}, grid, "", i))
    entry = max(by_k.values(), key=lambda e: e["n_runs"])
    title = "Distinct tokens to convergence (gain < 1% a doubling)"
    return Picture("convergence", title, "n_latents", "distinct tokens", series, _note(entry))


def _residuals(entry: dict[str, Any], fitted: list[dict[str, Any]]) -> Picture:
    series = []
    if entry["coefficients"]:
        for i, k in enumerate(sorted({p["k"] for p in fitted})):
            own = [p for p in fitted if p["k"] == k]
            logs = {"n": np.log([p["n_latents"] for p in own]), "k": np.log([p["k"] for p in own])}
            residual = np.log([p["normalized_mse"] for p in own]) - JOINT.log_value(theta(entry), logs)
            series.append(Series(f"k = {k}", [float(p["n_latents"]) for p in own], residual.tolist(), "points", i))
    title = f"Residuals of {entry['law']}"
    return Picture("residuals", title, "n_latents", "ln measured − ln fitted", series, _note(entry), log_y=False)


def _l0(sparsity: dict[str, Any]) -> Picture:
    """A line an activation function, n and lr, where functions other than TopK have that n (all of TopK's, if none)."""
    curves: dict[str, dict[str, Any]] = sparsity["curves"]
    sizes = {n for activation, by_n in curves.items() for n in by_n if activation != "topk"} or set(curves["topk"])
    series = []
    for colour, (activation, by_n) in enumerate(sorted(curves.items(), key=lambda item: item[0] != "topk")):
        for points in (points for n, points in by_n.items() if n in sizes):
            for lr in sorted({p["lr"] for p in points}):
                own = [p for p in points if p["lr"] == lr]
                x, y = [p["l0"] for p in own], [p["normalized_mse"] for p in own]
                series.append(Series(activation, x, y, "curve", colour))
    gap = sparsity["topk_relu_gap"]
    note = f"{gap['claim']}: {gap['verdict']}; {gap['reason']}"
    title = f"NMSE against L0, a line each n and lr: n = {', '.join(f'{n:,}' for n in sorted(map(int, sizes)))}"
    return Picture("l0", title, "L0", "normalized MSE", series, note)


def _fit(
    entry: dict[str, Any], law: Any, values: dict[str, np.ndarray], x: np.ndarray, label: str, colour: int
) -> Series:
    logs = {name: np.log(value) for name, value in values.items()}
    return Series(label, x.tolist(), np.exp(law.log_value(theta(entry), logs)).tolist(), "line", colour)


def _note(entry: dict[str, Any]) -> str:
    n = f"n_runs = {entry['n_runs']}"
    if entry["coefficients"] is None:
        return f"not fitted: {entry['reason']}"
    values = ", ".join(f"{name} {c['value']:.3g}" for name, c in entry["coefficients"].items())
    return f"{entry['formula']}: {values}; {n}"


def _png(picture: Picture, path: Path) -> None:
    figure = library("matplotlib.figure").Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "points": {"ls": "", "marker": "o", "ms": 4},
        "line": {"lw": 1.2},
        "curve": {"lw": 0.7, "marker": ".", "ms": 4},
    }
    for s, colour, new in shown(picture.series):
        axes.plot(s.x, s.y, color=colour, label=s.label if new else None, **styles[s.mode])
    if picture.series:
        axes.set_xscale("log")
        axes.set_yscale("log" if picture.log_y else "linear")
        _few_ticks(axes.xaxis)
        if picture.log_y:
            _few_ticks(axes.yaxis)
        axes.legend(fontsize=7)
    axes.set(xlabel=picture.x, ylabel=picture.y)
    axes.set_title(f"{picture.title}\n{picture.note}", fontsize=7, wrap=True)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    figure.savefig(path, format="png", metadata={"Software": None})


def _few_ticks(axis: Any) -> None:
    """Logarithmic ticks: 1, 2 and 5 times powers of ten within two decades, else powers alone, as plain numbers."""
    low, high = axis.get_view_interval()
    ticker = library("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.0f}" if 1 <= v < 1e6 else f"{v:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _page(found: list[Picture], report: dict[str, Any]) -> str:
    parts = []
    for picture in found:
        drawn = charts.figure(picture)
        title = f"{picture.title}<br><sub>{html.escape(picture.note)}</sub>"
        drawn.update_layout(title=title, template="plotly_white")
        parts.append(charts.div(drawn, picture.name))
    of = report["of"]
    title = html.escape(f"Scaling laws: {of['subject']}, layer {of['layer']} {of['location']}, {of['n_runs']} runs")
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n{charts.script()}\n<h1>{title}</h1>\n'
    return head + "\n".join(parts) + "\n"
