"""The table of latents: which are asked for, in which order.

A query is what stands in the address: sort=max&order=desc&min_density=0.01&q=words&starred=1&page=2. Numbers are
filtered on the memory-mapped columns; words by the full-text index of the explanation, and in people's notes.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from monosem.viewer.notes import reading
from monosem.viewer.reading import COLUMNS, Run

PAGE_ROWS = 50
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


def select(run: Run, query: Query) -> np.ndarray:
    """All latents that the query asks for, in its order. `ValueError` when it asks for what was not computed."""
    keep = np.ones(run.n_latents, dtype=bool)
    for name, (low, high) in query.ranges.items():
        column = _column(run, name)
        keep &= (column >= low) & (column <= high)
    if query.starred:
        starred = [latent for latent, note in run.notes.all().items() if note.starred and latent < run.n_latents]
        keep &= np.isin(np.arange(run.n_latents), starred)
    found = matching(run, query.text) if query.text else None
    if found is not None:
        keep &= np.isin(np.arange(run.n_latents), found)
    if query.sort is not None:
        _column(run, query.sort)
        order = run.order(query.sort, query.descending)
    else:
        order = np.arange(run.n_latents, dtype=np.int32) if found is None else found
        order = order[::-1] if query.descending else order
    return order[keep[order]]


def matching(run: Run, words: str) -> np.ndarray:
    """Latents with every word (or the beginning of one) in their explanation, tokens, examples or note: best first."""
    found: list[int] = []
    terms = _WORD.findall(words)
    with reading(run.words) as file:
        if file is not None and terms:
            match = " ".join(f'"{term}"*' for term in terms)
            sql = "SELECT rowid FROM latents_fts WHERE latents_fts MATCH ? ORDER BY rank LIMIT 20000"
            try:
                found = [row[0] for row in file.execute(sql, (match,))]
            except sqlite3.DatabaseError as error:
                raise ValueError(f"{run.words} cannot be searched ({error}); {run.command('words')}") from None
    found += run.notes.containing(words)
    every = np.array(list(dict.fromkeys(found)), dtype=np.int32)
    return every[(every >= 0) & (every < run.n_latents)]


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
