"""Charts described once as data, and the one offline page they are shown on: plotly.js is inside, nothing is fetched.

The same charts give the same bytes: no dates, no random ids.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from monosem import artifacts

COLOURS = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#c8b020", "#d95f02", "#b2182b")
_MODES = {"points": "markers", "line": "lines", "curve": "lines+markers"}


class Series(NamedTuple):
    """Points or a line; `colour` numbers what it belongs to."""

    label: str
    x: list[float]
    y: list[float]
    mode: Literal["points", "line", "curve"]
    """curve: points joined by a thin line."""
    colour: int
    low: list[float] | None = None
    """Lower ends of the intervals of y, drawn as bars; and the upper ones."""
    high: list[float] | None = None


class Picture(NamedTuple):
    name: str
    title: str
    x: str
    y: str
    series: list[Series]
    note: str = ""
    """Said under the title: the fit, or why there is none."""
    log_x: bool = True
    log_y: bool = True


def library(name: str, extra: str = "lab") -> Any:
    """A library of an extra, imported here and now; `ValueError` when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name.split('.')[0]} is not installed, and this needs it: pip install 'monosem[{extra}]'"
        ) from error


def shown(
    series: list[Series], colours: tuple[str, ...] = COLOURS, first: str = "#000000"
) -> Iterable[tuple[Series, str, bool]]:
    """Each series with its colour (`first` below 0), and whether its label is new (for the legend)."""
    seen: set[str] = set()
    for s in series:
        yield s, first if s.colour < 0 else colours[s.colour % len(colours)], bool(s.label) and s.label not in seen
        seen.add(s.label)


def figure(picture: Picture, colours: tuple[str, ...] = COLOURS, first: str = "#000000") -> Any:
    """The picture as a plotly figure without title; labels are data and shown as they are."""
    drawn = library("plotly.graph_objects").Figure()
    for s, colour, new in shown(picture.series, colours, first):
        bars = None
        if s.low is not None and s.high is not None:
            above = [high - y for high, y in zip(s.high, s.y, strict=True)]
            below = [y - low for low, y in zip(s.low, s.y, strict=True)]
            bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 3}
        drawn.add_scatter(
            x=s.x, y=s.y, mode=_MODES[s.mode], name=html.escape(s.label) or "fit", showlegend=new, line_color=colour,
            legendgroup=s.label, error_y=bars,
        )  # fmt: skip
    drawn.update_xaxes(title=picture.x, type="log" if picture.log_x else "linear")
    drawn.update_yaxes(title=picture.y, type="log" if picture.log_y else "linear")
    return drawn


def div(drawn: Any, name: str, **options: Any) -> str:
    """The figure as HTML with the id `name`; the page has plotly.js in it."""
    return library("plotly.io").to_html(drawn, full_html=False, include_plotlyjs=False, div_id=name, **options)


def script() -> str:
    """plotly.js as an element of a page."""
    return f"<script>{library('plotly.offline').get_plotlyjs()}</script>"


def write_text(path: Path, text: str) -> None:
    """The text in a file, whole or not at all."""
    artifacts.write_atomic(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
