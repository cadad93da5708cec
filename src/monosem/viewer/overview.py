"""The first page: what was trained on what, how good it is, and where its latents lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from monosem.definitions import definition, sections
from monosem.viewer import web
from monosem.viewer.reading import COLUMNS, Run
from monosem.viewer.web import API, Endpoint, Site

HEADLINE = ("normalized_mse", "delta_ce", "loss_recovered_mean", "l0", "never_fired_fraction", "dead_fraction")
N_EXTREMES = 8
MAP_BINS = (64, 44)


def view(run: Run) -> dict[str, Any]:
    """What the page shows, as JSON; a part that was not computed is None."""
    provenance = run.facts["provenance"]
    return {
        "name": run.name,
        "n_latents": run.n_latents,
        **{name: run.facts["config"][name] for name in ("d_model", "k", "activation")},
        "provenance": {name: provenance.get(name) for name in ("subject", "site", "tokens_seen", "distinct_tokens")},
        "facts": facts(run),
        "metrics": metrics(run),
        "density": density_histogram(run),
        "densest": _extremes(run),
        "never_fired": _never_fired(run),
    }


def facts(run: Run) -> dict[str, str]:
    """What was trained on what, in words, by what it is."""
    of, config = run.facts["provenance"], run.facts["config"]
    site, harvest, train = of.get("site") or {}, of.get("harvest") or {}, of.get("train") or {}
    recipe, explained = of.get("recipe") or {}, run.explanation
    found = {
        "Subject": of.get("subject"),
        "Site": site and f"layer {site['layer']}, {site['location']} (d_model {config['d_model']})",
        "Text": harvest and f"{harvest['corpus']}, contexts of {harvest['context_length']} tokens",
        "Autoencoder": f"{config['n_latents']:,} latents, {config['activation']}, k = {config['k']}",
        "Training": of.get("tokens_seen")
        and f"{of['tokens_seen']:,} token-visits of {of['distinct_tokens']:,} tokens ({of['epochs']:.3g} epochs)",
        "Recipe": recipe
        and f"lr {recipe['lr']:.3g}, batch {recipe['batch_size']:,}, {recipe['n_steps']:,} steps, "
        f"seed {train.get('seed', 0)}, {of.get('weights')} weights",
        "Kernels": of.get("impl") and f"{of['impl']}, {of.get('threads')} threads",
        "Explained": explained and f"{explained.manifest['n_tokens']:,} tokens of the training text",
        "monosem": run.facts["versions"].get("monosem"),
    }
    return {name: value for name, value in found.items() if value}


def metrics(run: Run) -> list[dict[str, Any]] | None:
    """The evaluation's numbers by section, each with its definition and interval; None without an evaluation."""
    if run.report is None:
        return None
    found = run.report["metrics"]

    def entry(name: str) -> dict[str, Any]:
        return {"name": name, "meaning": definition(name) or "", **found[name]}

    return [
        {
            "title": title,
            "rows": [
                {**entry(row.name), "beside": [{"label": label, **entry(other)} for label, other in row.beside.items()]}
                for row in rows
            ],
        }
        for title, rows in sections(found).items()
    ]


def density_histogram(run: Run) -> dict[str, Any] | None:
    """Latents by log10 of their density: of the explained text, else of the evaluation's; None without either."""
    column = run.column("density")
    if column is None:
        if run.report is None:
            return None
        return {"source": "held-out text", **run.report["histograms"]["density_log10"]}
    fires = np.log10(column[column > 0])
    edges = np.arange(np.floor(fires.min(initial=-5) * 5) / 5, 0.01, 0.2)
    counts, _ = np.histogram(fires, np.append(edges, 0.2))
    n_tokens = run.explanation.manifest["n_tokens"] if run.explanation is not None else 0
    return {
        "source": "training text", "edges": np.append(edges, 0.2).round(3).tolist(), "n_latents": counts.tolist(),
        "never": int((column <= 0).sum()), "n_tokens": n_tokens,
    }  # fmt: skip


def latent_map(run: Run, colour: str | None) -> dict[str, Any]:
    """Latents by log10 density (x) and log10 max (y): how many in each cell, or the mean there of the column `colour`.

    `ValueError` when a column was not computed.
    """
    density, largest = run.column("density"), run.column("max")
    if density is None or largest is None:
        raise ValueError(run.trouble or f"density and max were not computed; {run.command('activations')}")
    here = (density > 0) & (largest > 0)
    x, y = np.log10(density[here]), np.log10(largest[here])
    if not len(x):
        return {"x_edges": [], "y_edges": [], "n": [], "mean": None, "colour": colour}
    x_edges, y_edges = (np.linspace(v.min(), v.max() + 1e-6, n + 1) for v, n in zip((x, y), MAP_BINS, strict=True))
    columns, rows = np.searchsorted(x_edges, x, "right") - 1, np.searchsorted(y_edges, y, "right") - 1
    cells = rows.clip(0, MAP_BINS[1] - 1) * MAP_BINS[0] + columns.clip(0, MAP_BINS[0] - 1)
    shape = MAP_BINS[::-1]
    n = np.bincount(cells, minlength=shape[0] * shape[1])
    mean = None
    if colour is not None:
        if colour not in COLUMNS:
            raise ValueError(f"colour is {colour!r}; choose one of {', '.join(COLUMNS)}")
        column = run.column(colour)
        if column is None:
            raise ValueError(f"{colour} was not computed; {run.command(COLUMNS[colour].part)}")
        values = column[here]
        known = np.isfinite(values)
        sums = np.bincount(cells[known], weights=values[known], minlength=len(n))
        with np.errstate(invalid="ignore"):
            mean = _rows(sums / np.bincount(cells[known], minlength=len(n)), shape)
    edges = {"x_edges": x_edges.round(4).tolist(), "y_edges": y_edges.round(4).tolist()}
    return {**edges, "n": n.reshape(shape).tolist(), "mean": mean, "colour": colour}


def _rows(values: np.ndarray, shape: tuple[int, int]) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(f"{v:.4g}") for v in row] for row in values.reshape(shape)]


def _extremes(run: Run) -> list[dict[str, Any]] | None:
    """The densest latents, with the tokens on which they fire most."""
    density = run.column("density")
    if density is None:
        return None
    first = run.order("density", True)[:N_EXTREMES]
    tokens = run.peak_tokens(first, 6)
    return [
        {"latent": i, "density": float(density[i]), "fires_on": t} for i, t in zip(first.tolist(), tokens, strict=True)
    ]


def _never_fired(run: Run) -> dict[str, Any] | None:
    density = run.column("density")
    if density is None:
        return None
    silent = np.flatnonzero(density <= 0)
    return {"n": len(silent), "first": silent[:24].tolist()}


def _page(site: Site, request: Request) -> Response:
    run = site.run
    headline = [run.report["metrics"][name] | {"name": name} for name in HEADLINE if name in run.report["metrics"]] \
        if run.report else []  # fmt: skip
    for metric in headline:
        metric["meaning"] = definition(metric["name"])
    return web.page(site, request, "overview", view=view(run), headline=headline, colours=list(run.scalars()))


ENDPOINTS = (
    Endpoint("/", _page, parameters={"colour": "column whose mean colours the map"}),
    Endpoint(f"{API}/run", lambda site, request: view(site.run), "what was trained on what, and its numbers"),
    Endpoint(
        f"{API}/map",
        lambda site, request: latent_map(site.run, request.query_params.get("colour") or None),
        "latents by density and max, binned",
        {"colour": "column whose mean in each cell is wanted too"},
    ),
)
