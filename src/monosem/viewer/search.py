"""The table of latents: which are asked for, in which order.

A query is what stands in the address: sort=max&order=desc&min_density=0.01&q=words&starred=1&page=2. Numbers are
filtered on the memory-mapped columns; words by the full-text index of the explanation, and in people's notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from monosem.viewer import files
from monosem.viewer.reading import COLUMNS, Run

PAGE_ROWS = 50
MOST_RANKED = 2000
_WORD = re.compile(r"\w+", re.UNICODE)


class Query(NamedTuple):
    """What is asked of the table; `sort` None is by latent, or by relevance where there is a text."""

    sort: str | None = None
    descending: bool = False
    ranges: dict[str, tuple[float, float]] = {}  # noqa: RUF012 never changed
    text: str = ""
    starred: bool = False
    page: int = 1

    @property
    def is_all(self) -> bool:
        return not (self.sort or self.ranges or self.text or self.starred)

    def parameters(self, **changes: object) -> dict[str, str]:
        """As it stands in an address, with `changes`; what is left at its default is left out."""
        query = self._replace(**changes)  # type: ignore[arg-type]
        found = {"q": query.text, "sort": query.sort or "", "order": "desc" if query.descending else ""}
        for name, (low, high) in query.ranges.items():
            found |= {f"min_{name}": "" if low == -math.inf else f"{low:g}"}
            found |= {f"max_{name}": "" if high == math.inf else f"{high:g}"}
        found |= {"starred": "1" if query.starred else "", "page": str(query.page) if query.page > 1 else ""}
        return {name: value for name, value in found.items() if value}


PARAMETERS = {
    "q": "words to search for in explanations, tokens, examples and notes",
    "sort": f"a column: {', '.join(COLUMNS)}; without it by latent, or by relevance for q",
    "order": "asc (as without it) or desc",
    "starred": "1: only latents with a star",
    "page": f"from 1, {PAGE_ROWS} latents each",
    **{f"{end}_{name}": f"{what} {name}" for name in COLUMNS for end, what in (("min", "least"), ("max", "largest"))},
}
"""Name -> meaning of every part of an address."""


def parse(given: Mapping[str, str], also: tuple[str, ...] = ()) -> Query:
    """The query in an address, where `also` are other names that may stand there. `ValueError` says what is wrong."""
    if unknown := sorted(set(given) - set(PARAMETERS) - set(also)):
        raise ValueError(f"there is no parameter {', '.join(unknown)}; there are {', '.join(PARAMETERS)}")
    sort, order = given.get("sort") or None, given.get("order") or "asc"
    if sort is not None and sort not in COLUMNS:
        raise ValueError(f"sort is {sort!r}; choose one of {', '.join(COLUMNS)}")
    if order not in ("asc", "desc"):
        raise ValueError(f"order is {order!r}; choose asc or desc")
    ranges = {}
    for name in COLUMNS:
        low, high = (_number(f"{end}_{name}", given.get(f"{end}_{name}", "")) for end in ("min", "max"))
        if low is not None or high is not None:
            ranges[name] = (-math.inf if low is None else low, math.inf if high is None else high)
    page = given.get("page") or "1"
    if not re.fullmatch(r"[1-9][0-9]{0,8}", page):
        raise ValueError(f"page is {page!r}; give a whole number from 1")
    starred = given.get("starred", "") == "1"
    return Query(sort, order == "desc", ranges, given.get("q", "").strip()[:500], starred, int(page))


class Found(NamedTuple):
    """Latents that a query asks for, in its order; and which that is, in words."""

    latents: np.ndarray
    order: str


def select(run: Run, query: Query) -> Found:
    """All latents that the query asks for. `ValueError` when it asks for what was not computed."""
    keep = np.ones(run.n_latents, dtype=bool)
    for name, (low, high) in query.ranges.items():
        column = _column(run, name)
        keep &= (column >= low) & (column <= high)
    if query.starred:
        starred = [latent for latent, note in run.notes.all().items() if note.starred and 0 <= latent < run.n_latents]
        keep &= _among(run, np.array(starred, dtype=np.int64))
    order, words = np.arange(run.n_latents, dtype=np.int32), "by number"
    if query.text:
        found = matching(run, query.text)
        keep &= _among(run, found.latents)
        order, words = found
    if query.sort is not None:
        _column(run, query.sort)
        order, words = run.order(query.sort, query.descending), f"by {COLUMNS[query.sort].label}"
        words += ", largest first" if query.descending else ", smallest first"
    elif query.descending:
        order, words = order[::-1], f"{words}, backwards"
    return Found(order[keep[order]], words)


def matching(run: Run, words: str) -> Found:
    """Latents with every word of `words` in their explanation, tokens, examples or note; of three letters or more the
    beginning of a word is enough. Best first, but by number where over MOST_RANKED match: ranking them would take long.
    """
    latents, order = np.array([], dtype=np.int64), "best match first"
    terms = _WORD.findall(words)
    with files.database(run.words) as file:
        if file is not None and terms:
            match = " ".join(f'"{term}"*' if len(term) > 2 else f'"{term}"' for term in terms)
            sql = "SELECT rowid FROM latents_fts WHERE latents_fts MATCH ?"
            latents = np.fromiter((row[0] for row in file.execute(sql, (match,))), dtype=np.int64)
            if len(latents) > MOST_RANKED:
                order = "by number"
            else:
                ranked = file.execute(f"{sql} ORDER BY rank", (match,))
                latents = np.fromiter((row[0] for row in ranked), dtype=np.int64)
    noted = np.array(run.notes.containing(words), dtype=np.int64)
    every = np.concatenate([latents, noted[~np.isin(noted, latents)]])
    return Found(every[(every >= 0) & (every < run.n_latents)], order)


def _among(run: Run, latents: np.ndarray) -> np.ndarray:
    """True at these latents."""
    found = np.zeros(run.n_latents, dtype=bool)
    found[latents] = True
    return found


def _column(run: Run, name: str) -> np.ndarray:
    column = run.column(name)
    if column is None:
        raise ValueError(f"{name} was not computed; {run.command(COLUMNS[name].part)}")
    return column


def _number(name: str, given: str) -> float | None:
    if not given.strip():
        return None
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {given!r}; give a number")
    return value
