"""Two autoencoders beside each other: their numbers, which latents of one are in the other, and which are not.

How latents are matched is in matches.py; a pair is mutual when each is the other's best by direction.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from monosem import artifacts
from monosem.definitions import definition, sections
from monosem.viewer import matches as matching
from monosem.viewer import web
from monosem.viewer.matches import Matches
from monosem.viewer.reading import Run
from monosem.viewer.web import API, Endpoint, Site

MATCHED = 0.7
"""Two latents are called the same from this cosine on."""
PAGE_ROWS = 50
N_BINS = 40
SHOWS = {"all": "all", "mutual": "mutual matches", "alone": "without a match"}
ORDERS = ("cosine", "-cosine", "latent")
PARAMETERS = {
    "with": "name of the other run",
    "side": "a: latents of this run and their matches; b: the other way round",
    "show": "all, mutual or alone: without a match",
    "order": "cosine, -cosine (largest first) or latent",
    "page": "from 1",
    "wait": "0: answer at once, where latents are still being matched with `done`, the share of it that is",
}
_WAIT_S = 0.1


def others(site: Site) -> dict[str, Path]:
    """The runs that this one can be compared with, by name: those given at the start, then those in the same folder."""
    own = site.run.folder.resolve()
    beside = sorted(p for p in own.parent.iterdir() if (p / "autoencoder/config.json").is_file())
    found: dict[str, Path] = {}
    for folder in (*site.others, *beside):
        name = folder.resolve().name
        if folder.resolve() != own and folder.resolve() not in found.values():
            found[name if name not in found else f"{name} in {folder.resolve().parent}"] = folder.resolve()
    return found


def view(a: Run, b: Run) -> dict[str, Any]:
    """What is known of both without looking at their latents, as JSON."""
    return {"a": a.name, "b": b.name, "facts": facts(a, b), "metrics": metrics(a, b), "unlike": unlike(a, b)}


def facts(a: Run, b: Run) -> list[dict[str, Any]]:
    """What they are, line by line."""

    def of(run: Run) -> dict[str, Any]:
        of, config = run.facts["provenance"], run.facts["config"]
        site, recipe, train = of.get("site") or {}, of.get("recipe") or {}, of.get("train") or {}
        return {
            "Subject": of.get("subject"),
            "Site": site and f"layer {site['layer']}, {site['location']}",
            "Latents": f"{config['n_latents']:,}",
            "Activation": f"{config['activation']}, k = {config['k']}",
            "Training": of.get("tokens_seen") and f"{of['tokens_seen']:,} token-visits, {of['epochs']:.3g} epochs",
            "Recipe": recipe and f"lr {recipe['lr']:.3g}, batch {recipe['batch_size']:,}, seed {train.get('seed', 0)}",
        }

    both = of(a), of(b)
    return [{"label": label, "a": both[0][label] or None, "b": both[1][label] or None} for label in both[0]]


def metrics(a: Run, b: Run) -> list[dict[str, Any]]:
    """By section, every number that either's evaluation has; `apart` where the intervals do not meet."""
    reports = [run.report["metrics"] if run.report is not None else {} for run in (a, b)]
    names = dict.fromkeys([*reports[0], *reports[1]])
    found = []
    for title, rows in sections(names).items():
        lines = []
        for row in rows:
            x, y = (report.get(row.name) for report in reports)
            apart = x is not None and y is not None and (x["high"] < y["low"] or y["high"] < x["low"])
            lines.append({"name": row.name, "meaning": definition(row.name) or "", "a": x, "b": y, "apart": apart})
        found.append({"title": title, "rows": lines})
    return found


def unlike(a: Run, b: Run) -> str | None:
    """Why no latent of one can be found in the other; None where it can."""
    if a.facts["config"]["d_model"] != b.facts["config"]["d_model"]:
        return "they read activations of different widths"
    places = [(run.facts["provenance"].get("site") or {}) for run in (a, b)]
    if all(places) and len({(place["layer"], place["location"]) for place in places}) > 1:
        return "they are of different sites, so their directions have nothing to do with each other"
    subjects = [run.facts["sources"].get("subject") for run in (a, b)]
    if all(subjects) and len(set(subjects)) > 1:
        return "they are of different subjects, so their directions have nothing to do with each other"
    return None


def summary(matches: Matches) -> dict[str, Any]:
    """How many latents of each side have a match, with histograms of the best cosines, as JSON."""
    edges = np.linspace(0, 1, N_BINS + 1)
    sides = {}
    for name, one in zip("ab", matches.cosine, strict=True):
        counts, _ = np.histogram(np.clip(one.score, 0, 1), edges)
        sides[name] = {
            "n_latents": len(one.score),
            "n_matched": int((one.score >= MATCHED).sum()),
            "median": float(np.median(one.score)),
            "histogram": counts.tolist(),
        }
    mutual = _mutual(matches, 0)
    return {
        **sides, "edges": edges.round(4).tolist(), "matched": MATCHED, "chance": matches.chance,
        "n_mutual": int(mutual.sum()), "n_mutual_matched": int((mutual & (matches.cosine[0].score >= MATCHED)).sum()),
        "together": None if matches.reason is None else matches.reason._asdict(),
    }  # fmt: skip


def rows(a: Run, b: Run, matches: Matches, query: dict[str, str]) -> dict[str, Any]:
    """A page of the latents of one side with their matches on the other, as JSON. `ValueError` for a wrong query."""
    side, show, order = query.get("side", "a"), query.get("show", "all"), query.get("order", "-cosine")
    page = query.get("page", "1")
    if side not in ("a", "b") or show not in SHOWS or order not in ORDERS or not page.isdecimal() or len(page) > 9:
        raise ValueError(f"side, show, order, page are {side}, {show}, {order}, {page}; choose a or b; "
                         f"{', '.join(SHOWS)}; {', '.join(ORDERS)}; a number")  # fmt: skip
    which = int(side == "b")
    own, other = (b, a) if which else (a, b)
    best, mutual = matches.cosine[which], _mutual(matches, which)
    chosen = {"all": np.ones_like(mutual), "mutual": mutual, "alone": best.score < MATCHED}[show]
    key = {"latent": np.arange(len(mutual)), "cosine": best.score, "-cosine": -best.score}[order]
    found = np.flatnonzero(chosen)
    found = found[np.argsort(key[chosen], kind="stable")]
    n_pages = max(1, -(-len(found) // PAGE_ROWS))
    at = found[(max(int(page), 1) - 1) * PAGE_ROWS :][:PAGE_ROWS]
    together = None if matches.together is None else matches.together[which]
    density, partners = own.column("density"), best.latent[at]
    fires = own.peak_tokens(at, 20), other.peak_tokens(partners, 20)
    lines = [
        {
            "latent": int(i),
            "fires_on": fires[0][row][:4],
            "never_fired": density is not None and bool(density[i] == 0),
            "match": int(best.latent[i]),
            "cosine": float(best.score[i]),
            "mutual": bool(mutual[i]),
            "match_fires_on": fires[1][row][:4],
            "together": None if together is None or together.latent[i] < 0 else int(together.latent[i]),
            "jaccard": None if together is None or together.latent[i] < 0 else float(together.score[i]),
        }
        for row, i in enumerate(at)
    ]
    state = {"side": side, "show": show, "order": order, "page": max(int(page), 1)}
    return {**state, "n_pages": n_pages, "total": len(found), "rows": lines}


def _mutual(matches: Matches, which: int) -> np.ndarray:
    one, other = matches.cosine[which], matches.cosine[1 - which]
    return other.latent[one.latent] == np.arange(len(one.latent))


@functools.lru_cache(maxsize=4)
def _opened(folder: Path) -> list[Run]:
    return [Run(folder)]


def _other(site: Site, request: Request) -> Run | None:
    """The run named in the address; None where there is none. 404 for a name that is not one of `others`."""
    name = request.query_params.get("with")
    if not name:
        return None
    folder = others(site).get(name)
    if folder is None:
        raise HTTPException(404, f"there is no run {name!r} to compare with; choose one of those on /compare")
    kept = _opened(folder)
    if not kept[0].fresh:
        kept[0] = Run(folder)
    return kept[0]


def _page(site: Site, request: Request) -> Response:
    a, b = site.run, _other(site, request)
    found: dict[str, Any] = {"view": None, "summary": None, "table": None, "waiting": False, "done": 0.0, "other": b}
    if b is not None:
        found["view"] = view(a, b)
        if found["view"]["unlike"] is None:
            try:
                begun = matching.matching(a, b, keep=not site.read_only)
                matches = begun.future.result(_WAIT_S)
                query = {k: v for k, v in request.query_params.items() if v}
                found |= {"summary": summary(matches), "table": rows(a, b, matches, query)}
            except TimeoutError:
                found |= {"waiting": True, "done": begun.done}
    names = {name: _n_latents(folder) for name, folder in others(site).items()}
    return web.page(
        site, request, "compare", names=names, chosen=request.query_params.get("with"), shows=SHOWS, **found
    )


def _n_latents(folder: Path) -> int | None:
    path = next(p for p in (folder / "autoencoder/config.json", folder / "config.json") if p.exists())
    try:
        return artifacts.read_manifest(path, "autoencoder")["config"]["n_latents"]
    except (ValueError, KeyError, TypeError):
        return None


def _api(site: Site, request: Request) -> dict[str, Any]:
    a, b = site.run, _other(site, request)
    if b is None:
        return {"with": list(others(site))}
    found = view(a, b)
    if found["unlike"] is not None:
        return {**found, "done": None, "summary": None, "table": None}
    query = dict(request.query_params)
    begun = matching.matching(a, b, keep=not site.read_only)
    if query.pop("wait", "1") == "0" and not begun.future.done():
        return {**found, "done": begun.done, "summary": None, "table": None}
    matches = begun.future.result()
    return {**found, "done": 1.0, "summary": summary(matches), "table": rows(a, b, matches, query)}


ENDPOINTS = (
    Endpoint("/compare", _page, parameters=PARAMETERS),
    Endpoint(
        f"{API}/compare", _api, "two runs' numbers, and a page of matched latents; without `with` its choices",
        PARAMETERS,
    ),
)  # fmt: skip
