"""The table of all latents: sorted, filtered and searched on the server, its state in the address."""

from __future__ import annotations

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from monosem.viewer import search, text, web
from monosem.viewer.reading import COLUMNS, Run
from monosem.viewer.search import PAGE_ROWS, Query
from monosem.viewer.web import API, Endpoint, Site

N_TOKENS = 5


def view(run: Run, query: Query) -> dict[str, Any]:
    """One page of the table and what it is a page of, as JSON. `ValueError` as `search.select`."""
    found, order = search.select(run, query)
    n_pages = max(1, -(-len(found) // PAGE_ROWS))
    start = (query.page - 1) * PAGE_ROWS
    return {
        "total": len(found),
        "page": query.page,
        "n_pages": n_pages,
        "order": order,
        "query": query.parameters(),
        "columns": list(run.scalars()),
        "rows": rows(run, found[start : start + PAGE_ROWS]),
    }


def rows(run: Run, latents: np.ndarray) -> list[dict[str, Any]]:
    """What the table says of each of the latents; a number that was not computed is None."""
    ids = latents.tolist()
    scalars = {name: column[latents].tolist() for name, column in run.scalars().items()}
    fires_on, votes = run.peak_tokens(latents, 20), run.rows("lens_up")
    raises = [[run.token(t) for t in own] for own in votes[latents, :N_TOKENS].tolist()] if votes is not None else None
    words, notes = run.explanations(ids), run.notes.all()
    return [
        {
            "latent": i,
            **{name: None if np.isnan(values[at]) else values[at] for name, values in scalars.items()},
            "fires_on": fires_on[at][:N_TOKENS],
            "votes_for": list(map(text.token, raises[at])) if raises is not None else None,
            "explanation": words.get(i),
            "starred": i in notes and notes[i].starred,
            "note": notes[i].text if i in notes else "",
        }
        for at, i in enumerate(ids)
    ]


def _page(site: Site, request: Request) -> Response:
    run = site.run
    query = search.parse(request.query_params, also=("theme",))
    if query.text.isascii() and query.text.isdigit() and int(query.text) < run.n_latents:
        return RedirectResponse(site.links.page("latent", latent=int(query.text)), 303)
    return web.page(site, request, "latents", view=view(run, query), query=query, missing=_missing(run))


def _missing(run: Run) -> list[tuple[str, str]]:
    """What no latent has, or not all have, each with the command that computes it."""
    computed = run.explanation.manifest["computed"] if run.explanation is not None else {}
    labels: dict[str, list[str]] = {}
    for column in COLUMNS.values():
        labels.setdefault(column.part, []).append(column.label)
    found = []
    for part, columns in labels.items():
        entry = computed.get(part, {})
        made = entry.get("n_latents", 0)
        if made < run.n_latents and (not made or "command" in entry) and "left_out" not in entry:
            rest = f" for all but {made:,} latents" if made else ""
            found.append((run.command(part), ", ".join(columns) + rest))
    return found


ENDPOINTS = (
    Endpoint("/latents", _page, parameters=search.PARAMETERS),
    Endpoint(
        f"{API}/latents",
        lambda site, request: view(site.run, search.parse(request.query_params)),
        "a page of the table of latents",
        search.PARAMETERS,
    ),
)
