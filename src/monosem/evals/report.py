"""Evaluations for people: one offline page and one Markdown table out of one or many eval.json.

Every number has its definition, interval and n, and beside it the baselines that it is read against. The same
evaluations give the same bytes. All text is escaped: names of tasks and subjects come from outside.
"""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

from monosem import artifacts, charts
from monosem.charts import Picture, Series
from monosem.config import activation_facts
from monosem.definitions import Row, definition, sections

KIND = "evaluation"
COLOURS = ("#3f7fd6", "#d9802b", "#2f9e73", "#c4487f", "#8a68d6", "#8a8f2f", "#2e9db0", "#b85c4a")
"""Legible on white and on black."""

_MOST_TICKS = 10
_MARK = "made by monosem eval --report"
_ON_OPENING = """<script>
for (const part of document.querySelectorAll("details"))
  part.addEventListener("toggle", () => {
    for (const chart of part.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(chart);
  });
</script>"""
"""A chart that was drawn while hidden has no size of its own."""
_PROBE_COLUMNS = {
    "probe_loss": "best latent", "probe_loss_dense": "dense probe", "probe_loss_random_directions": "random directions",
    "probe_loss_channels": "channels", "probe_loss_constant": "constant", "probe_loss_length": "length",
    "probe_loss_last_character": "last character", "probe_loss_null": "shuffled labels", "probe_accuracy": "accuracy",
    "probe_auc": "AUC",
}  # fmt: skip


class Evaluation(NamedTuple):
    """One autoencoder's eval.json, and what it is called on the page."""

    label: str
    manifest: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        return self.manifest["run"]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        return self.manifest["metrics"]

    @property
    def missing(self) -> list[str]:
        """What is not here, a line each: left out or failed, and why."""
        left_out, failed = (self.manifest.get(name, {}) for name in ("left_out", "failed"))
        lines = [f"{what}: left out, as {reason}" for what, reason in left_out.items()]
        return lines + [f"{part} failed: {reason}" for part, reason in failed.items()]

    def tables(self, part: str) -> dict[str, Any]:
        return self.manifest["tables"].get(part, {})


def check(path: str | Path) -> None:
    """`ValueError` unless a report can be written to `path`: an .html file, new or a report, with plotly at hand."""
    page = Path(path)
    if page.suffix.lower() != ".html":
        raise ValueError(f"report is {path}; give the name of an .html file (its table is written beside it, as .md)")
    for output in (page, page.with_suffix(".md")):
        artifacts.require_ours(output, _is_report)
        artifacts.require_writable(output)
    charts.library("plotly")


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return _MARK.encode() in file.read(1000)


def read(folders: list[str]) -> list[Evaluation]:
    """The eval.json of each run folder, labelled by what tells the folders apart."""
    found = [artifacts.read_manifest(Path(folder) / "eval.json", KIND) for folder in folders]
    return [Evaluation(label, manifest) for label, manifest in zip(labels(folders), found, strict=True)]


def labels(folders: list[str]) -> list[str]:
    """The last part of each path, or the whole paths where two end alike."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is given twice among {', '.join(folders)}; give each once")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def write(evaluations: list[Evaluation], path: str | Path) -> None:
    """The page in `path`, the table beside it; `ValueError` as in `check`."""
    with artifacts.file_lock(path):
        check(path)
        charts.write_text(Path(path), page(evaluations))
        charts.write_text(Path(path).with_suffix(".md"), markdown(evaluations))


def markdown(evaluations: list[Evaluation]) -> str:
    """A table of each evaluation: metric, value, interval, n, unit, what stands beside it, definition."""
    lines = [f"<!-- {_MARK} -->"]
    for evaluation in evaluations:
        lines += ["", f"## {_cell(evaluation.label)}", "", _cell(title(evaluation.run)), ""]
        lines += [line for said in evaluation.missing for line in (_cell(said), "")]
        lines += ["| metric | value | 95% interval | n | unit | beside it | definition |", "|" + " --- |" * 7]
        for rows in sections(evaluation.metrics).values():
            for row in rows:
                m = evaluation.metrics[row.name]
                beside = "; ".join(f"{label} {_text(evaluation.metrics[other])}" for label, other in row.beside.items())
                interval = f"[{_number(m['low'])}, {_number(m['high'])}]"
                cells = (
                    f"`{row.name}`",
                    _number(m["value"]),
                    interval,
                    f"{m['n']:,}",
                    m["unit"],
                    beside,
                    definition(row.name) or "",
                )
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def page(evaluations: list[Evaluation]) -> str:
    """The page: with several autoencoders first each metric side by side and against n_latents and k."""
    several = len(evaluations) > 1
    heading = f"{len(evaluations)} autoencoders" if several else title(evaluations[0].run)
    parts = [f"<h1>{html.escape(heading)}</h1>"]
    if several:
        parts += _comparison(evaluations)
    for index, evaluation in enumerate(evaluations):
        inside = _evaluation(evaluation, f"e{index}")
        summary = html.escape(f"{evaluation.label}: {title(evaluation.run)}")
        parts.append(f"<details><summary>{summary}</summary>{inside}</details>" if several else inside)
    parts.append(_glossary(evaluations))
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="{_MARK}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(heading)}</title>\n'
        f"<style>\n{style}</style>\n{charts.script()}\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n{_ON_OPENING}\n</html>\n"
    )


def title(run: dict[str, Any]) -> str:
    """What was evaluated, in a line: subject, site, size, sparsity, training."""
    activation = run["activation"]
    sparsity = f"{activation}, k {run['k']}" if "k" in activation_facts(activation).uses else activation
    site = f"layer {run['site']['layer']} {run['site']['location']}"
    parts = [run["subject"], site, f"{run['n_latents']:,} latents", sparsity]
    if "tokens_seen" in run:
        epochs = f"{run['tokens_seen'] / run['distinct_tokens']:.2f} epochs of {run['distinct_tokens']:,}"
        parts.append(f"trained on {run['tokens_seen']:,} tokens ({epochs} distinct)")
    return ", ".join(parts)


def _evaluation(evaluation: Evaluation, prefix: str) -> str:
    """One autoencoder: what it is, then each section with its numbers, charts and tables."""
    pictures, found = _pictures(evaluation), [_facts(evaluation)]
    found += [f"<p>{html.escape(said)}</p>" for said in evaluation.missing]
    for name, rows in sections(evaluation.metrics).items():
        found.append(f"<section><h2>{name}</h2>")
        found += [_row(row, evaluation.metrics) for row in rows]
        found.append(_charts(pictures.get(name, []), prefix))
        if name == "Probes" and "tasks" in evaluation.tables("probes"):
            found.append(_tasks(evaluation.tables("probes")["tasks"]))
        if name == "Downstream" and (facts := evaluation.tables("downstream").get("compute_equivalent")):
            found.append(_compute_equivalent(facts))
        found.append("</section>")
    return "\n".join(found)


def _glossary(evaluations: list[Evaluation]) -> str:
    """Every name on the page with its definition, baselines too."""
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics)
    rows = "".join(f"<dt>{_name(name)}</dt><dd>{html.escape(definition(name) or '')}</dd>" for name in names)
    words = (
        "x is an activation, x̂ its reconstruction, x̄ the mean of those evaluated; p and q are the subject's next-token "
        "distributions as it is and with something in place of x. Intervals are of 95%: they say how a number would "
        "move on other text, latents or tasks of the same kind, not with another training seed."
    )
    every = f"<details><summary>Every number</summary><dl>{rows}</dl></details>"
    return f"<section><h2>Definitions</h2><p>{words}</p>{every}</section>"


def _facts(evaluation: Evaluation) -> str:
    """What the numbers can be traced to."""
    manifest = evaluation.manifest
    settings = {name: value for name, value in manifest["config"].items() if value is not None}
    facts = {**evaluation.run, "settings": settings, "sha256": manifest["sources"], "versions": manifest["versions"]}
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(_plain(value))}</dd>" for name, value in facts.items()
    )
    return f"<details><summary>What was evaluated, with what</summary><dl>{rows}</dl></details>"


def _row(row: Row, metrics: dict[str, dict[str, Any]]) -> str:
    """A number with its definition, and as bars beside the numbers that it is read against."""
    m = metrics[row.name]
    labelled = {"": row.name, **row.beside}
    most = max((metrics[name]["value"] for name in labelled.values()), default=0)
    bars = []
    for label, name in labelled.items() if row.beside else ():
        share = max(0.0, metrics[name]["value"] / most) if most > 0 else 0.0
        said = html.escape(f"{name}: {definition(name) or ''}")
        bars.append(
            f'<li title="{said}"><span class="label">{html.escape(label or "this")}</span>'
            f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
            f"<span>{_number(metrics[name]['value'])} {_interval(metrics[name])}</span></li>"
        )
    beside = f'<ul class="beside">{"".join(bars)}</ul>' if bars else ""
    what = f"<div>{_name(row.name)}<p>{html.escape(definition(row.name) or '')}</p></div>"
    value = f"<div><b>{_number(m['value'])}</b> {_interval(m)}<p>{html.escape(m['unit'])}, n = {m['n']:,}</p></div>"
    return f'<div class="row">{what}{value}{beside}</div>'


def _tasks(rows: list[dict[str, Any]]) -> str:
    """A row a task and pooling, the best latent's loss beside what else was tried."""
    columns = {name: label for name, label in _PROBE_COLUMNS.items() if all(name in row for row in rows)}
    body = []
    for row in rows:
        cells = [row["task"], row["pooling"], f"{row['n_held_out']:,}", str(row["latent"])]
        numbers = [_number(row[name]) for name in columns]
        numbers[0] += f" {_interval({'low': row['probe_loss_low'], 'high': row['probe_loss_high']})}"
        body.append([*map(html.escape, cells), *numbers])
    said = "Held-out cross-entropy in nats; for shuffled labels that where the latent was chosen; accuracy; AUC."
    return f"<h3>Tasks</h3><p>{said}</p>{_table(['task', 'pooling', 'n held out', 'latent', *columns.values()], body)}"


def _compute_equivalent(facts: dict[str, Any]) -> str:
    """What the compute equivalent rests on, what the ablations would have, and how far other assumptions move it."""
    subject = f"the subject's own loss on the curve is {_number(facts['subject_loss'])}"
    outside = f" (extrapolated: {facts['subject_outside']})" if facts["subject_outside"] else ""
    answers = "; ".join(f"{name.replace('_', ' ')}: {answer}" for name, answer in facts["answers"].items())
    said = f"{facts['label'].capitalize()}, by {facts['curve']} ({facts['source']}); {subject}{outside}. {answers}."
    rows = [
        [*(html.escape(row[name] or "–") for name in ("law", "anchoring", "path", "changed")), _or_why(row)]
        for row in facts["sensitivity"]
    ]
    table = _table(["law", "anchoring", "path", "changed", "compute equivalent"], rows)
    summary = "Compute equivalent under other assumptions"
    return f"<details><summary>{summary}</summary><p>{html.escape(said)}</p>{table}</details>"


def _or_why(row: dict[str, Any]) -> str:
    return html.escape(row["outside"]) if row["value"] is None else _number(row["value"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{lines}</table></div>'


def _comparison(evaluations: list[Evaluation]) -> list[str]:
    """Each metric side by side, then against n_latents and k where these differ."""
    names = list(dict.fromkeys(name for e in evaluations for name in e.metrics))
    head = "".join(f"<th>{html.escape(e.label)}</th>" for e in evaluations)
    found = []
    for section, (title_, rows) in enumerate(sections(names).items()):
        body = []
        for row in rows:
            for name in (row.name, *row.beside.values()):
                cells = "".join(f"<td>{_side(e.metrics.get(name))}</td>" for e in evaluations)
                kind = ' class="baseline"' if name != row.name else ""
                body.append(f"<tr{kind}><th>{_name(name)}</th>{cells}</tr>")
        table = f'<div class="wide"><table class="side"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'
        pictures = [p for row in rows for p in _against(row.name, evaluations)]
        drawn = _charts(pictures, "all")
        opened = " open" if section == 0 else ""
        found.append(f"<section><h2>{title_}</h2>{table}")
        found.append(
            f"<details{opened}><summary>Against n_latents and k</summary>{drawn}</details>" if pictures else ""
        )
        found.append("</section>")
    return found


def _against(name: str, evaluations: list[Evaluation]) -> list[Picture]:
    """The metric against n_latents for each k, and against k for each n_latents, as far as either differs."""
    there = [e for e in evaluations if name in e.metrics]
    found = []
    for along, by in (("n_latents", "k"), ("k", "n_latents")):
        own = [e for e in there if along == "n_latents" or _has_k(e)]
        if len({e.run[along] for e in own}) < 2:
            continue
        groups: dict[str, list[Evaluation]] = {}
        mixed = len({e.run["activation"] for e in own}) > 1
        for e in sorted(own, key=lambda e: (e.run["activation"], e.run[by], e.run[along])):
            label = [e.run["activation"]] * mixed + [f"{by} {e.run[by]:,}"] * (by != "k" or _has_k(e))
            groups.setdefault(", ".join(label), []).append(e)
        series = [
            _series(label, [float(e.run[along]) for e in group], [e.metrics[name] for e in group], i)
            for i, (label, group) in enumerate(groups.items())
        ]
        unit = there[0].metrics[name]["unit"]
        found.append(Picture(f"{name}-{along}", name, along, unit, series, log_y=False))
    return found


def _pictures(evaluation: Evaluation) -> dict[str, list[Picture]]:
    """The curves of one evaluation, by section."""
    metrics, others = evaluation.metrics, evaluation.tables("progressive").get("curve", {})
    return {
        "Reconstruction": _errors(evaluation.tables("latents")),
        "Latents": [_densities(evaluation.manifest["histograms"]["density_log10"])],
        "Other sparsities": [_other_k(quantity, curve, metrics) for quantity, curve in others.items()],
        "Explanations": [p for quantity in ("delta_ce", "kl") if (p := _explained(quantity, metrics))],
    }


def _errors(tables: dict[str, Any]) -> list[Picture]:
    """The error by position and by norm."""
    found = []
    for name, x in (("by_position", "position in the context"), ("by_norm", "raw norm")):
        if curve := tables.get(name):
            start, y = curve["from"], curve["normalized_mse"]
            series = [Series("", start, y, "curve", 0, curve["low"], curve["high"])]
            scales = {"log_x": min(start) > 0, "log_y": False}
            found.append(Picture(name, f"Error by {x}", f"{x}, from", "normalized_mse", series, **scales))
    return found


def _densities(histogram: dict[str, Any]) -> Picture:
    middle = [(low + high) / 2 for low, high in itertools.pairwise(histogram["edges"])]
    series = [Series("", middle, [float(n) for n in histogram["n_latents"]], "curve", 0)]
    note = f"{histogram['never']:,} fired on none of {histogram['n_tokens']:,} tokens"
    return Picture("density", "Densities", "log10(density)", "latents a bin", series, note, log_x=False, log_y=False)


def _other_k(quantity: str, curve: dict[str, list[float]], metrics: dict[str, dict[str, Any]]) -> Picture:
    """The quantity against k', and at the one threshold."""
    k = [float(k) for k in curve["k"]]
    series = [Series("k' largest", k, curve["value"], "curve", 0, curve["low"], curve["high"])]
    at = metrics[f"progressive_{quantity}_threshold"]
    l0 = metrics["progressive_l0_threshold"]["value"]
    series.append(Series("one threshold", [l0], [at["value"]], "points", 1, [at["low"]], [at["high"]]))
    title_ = f"{quantity} at other k"
    return Picture(f"progressive-{quantity}", title_, "latents a token", at["unit"], series, log_y=False)


def _explained(quantity: str, metrics: dict[str, dict[str, Any]]) -> Picture | None:
    """The quantity against the share of the explained latents that is simulated."""
    start = f"explanation_{quantity}"
    if f"{start}_real" not in metrics:
        return None
    shares = sorted({int(m[1]) for name in metrics if (m := re.fullmatch(rf"{start}_at_(\d+)", name))})
    series = []
    for i, (suffix, label) in enumerate((("", "N2G"), ("_unigram", "unigram"), ("_zero", "set to 0"))):
        names = [f"{start}_real", *(f"{start}{suffix}_at_{share}" for share in shares), f"{start}{suffix}"]
        series.append(_series(label, [0.0, *map(float, shares), 100.0], [metrics[name] for name in names], i))
    x = "% of the explained latents replaced"
    return Picture(start, f"{quantity} with explanations", x, "nats per token", series, log_x=False, log_y=False)


def _series(label: str, x: list[float], metrics: list[dict[str, Any]], colour: int) -> Series:
    value, low, high = ([m[field] for m in metrics] for field in ("value", "low", "high"))
    return Series(label, x, value, "curve" if len(set(x)) == len(x) else "points", colour, low, high)


def _charts(pictures: list[Picture], prefix: str) -> str:
    found = []
    for picture in pictures:
        drawn = charts.figure(picture, COLOURS)
        several = len(picture.series) > 1
        drawn.update_layout(
            template="none", height=300, margin={"l": 60, "r": 12, "t": 8, "b": 46}, paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)", showlegend=several,
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        )  # fmt: skip
        drawn.update_xaxes(automargin=True, nticks=7, **_ticks(picture))
        drawn.update_yaxes(automargin=True, nticks=6)
        chart = charts.div(drawn, f"{prefix}-{picture.name}", config={"responsive": True, "displayModeBar": False})
        note = f"<br><small>{html.escape(picture.note)}</small>" if picture.note else ""
        found.append(f"<figure><figcaption>{html.escape(picture.title)}{note}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def _ticks(picture: Picture) -> dict[str, Any]:
    """Ticks at the measured x where these are few and far apart on a logarithmic axis; plotly's own otherwise."""
    x = sorted({x for series in picture.series for x in series.x if series.mode == "curve"})
    if not picture.log_x or not x or len(x) > _MOST_TICKS or any(b < 1.4 * a for a, b in itertools.pairwise(x)):
        return {}
    return {"tickvals": x, "ticktext": [_number(value) for value in x]}


def _has_k(evaluation: Evaluation) -> bool:
    return "k" in activation_facts(evaluation.run["activation"]).uses


def _name(name: str) -> str:
    return f'<code title="{html.escape(definition(name) or "")}">{html.escape(name)}</code>'


def _side(metric: dict[str, Any] | None) -> str:
    return "–" if metric is None else f"{_number(metric['value'])} {_interval(metric)}"


def _interval(metric: dict[str, Any]) -> str:
    return f"<small>[{_number(metric['low'])}, {_number(metric['high'])}]</small>"


def _text(metric: dict[str, Any]) -> str:
    return f"{_number(metric['value'])} [{_number(metric['low'])}, {_number(metric['high'])}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    """Text in a Markdown table: no column, line or element of its own."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
