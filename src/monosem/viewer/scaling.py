"""The laws of the scaling laboratory beside this run, with verdicts and figures."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monosem import artifacts
from monosem.viewer import text, web
from monosem.viewer.reading import Run
from monosem.viewer.web import API, Endpoint, Site

KIND = "scaling-laws"


def view(run: Run) -> dict[str, Any] | None:
    """What was found, without the points: `of`, and every law with where it stands; None without a scaling.json."""
    report = _report(run)
    if report is None:
        return None
    from monosem import scaling

    laws = [
        {
            "name": name,
            "place": place(entry.get("at") or {}),
            **{k: v for k, v in entry.items() if k not in ("draws", "points", "frontier")},
        }
        for name, entry in scaling.walk(report)
    ]
    return {"of": report["of"], "laws": laws, "costs": report.get("costs"), "excluded": report.get("excluded", [])}


def place(at: dict[str, Any]) -> str:
    """What a law holds fixed, in words."""
    costs = {"flops": "over FLOPs", "flops_dense_equivalent": "over dense-equivalent FLOPs"}
    parts = [f"k = {at['k']}" if "k" in at else "", costs.get(at.get("flops", ""), "")]
    if "tokens" in at and "tokens_from" not in at:
        parts.append(f"{text.number(at['tokens'])} tokens")
    return ", ".join(filter(None, parts)) or "all runs"


def figures(run: Run) -> list[dict[str, Any]]:
    """The pictures as data: points, lines, axes; empty without a scaling.json."""
    report = _report(run)
    if report is None:
        return []
    from monosem.scaling import figures as pictures

    return [{**p._asdict(), "series": [s._asdict() for s in p.series]} for p in pictures.pictures(report)]


def _report(run: Run) -> dict[str, Any] | None:
    path = run.scaling_folder / "scaling.json"
    return artifacts.read_manifest(path, KIND) if path.exists() else None


def _page(site: Site, request: Request) -> Response:
    run = site.run
    return web.page(
        site, request, "scaling", view=view(run), folder=str(run.scaling_folder), command=run.command("scaling"),
        figures=[(f["name"], f["title"], f["note"]) for f in figures(run) if f["series"]],
    )  # fmt: skip


ENDPOINTS = (
    Endpoint("/scaling", _page),
    Endpoint(f"{API}/scaling", lambda site, request: {"scaling": view(site.run)}, "the laws, null without any"),
    Endpoint(
        f"{API}/figures", lambda site, request: {"figures": figures(site.run)}, "the figures of the laws, as data"
    ),
)
