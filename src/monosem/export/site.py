"""The viewer's pages as files: FOLDER works behind any static file server, and opened from the disk without one.

    index.html, latents.html, scaling.html, latents/LATENT.html   by the viewer's own endpoints and templates
    absent.html                what is not in an export (the live pages, other latents), and the command for it
    latents/random.html        leads on to one at random
    static/                    the viewer's files, its modules as one classic script site.js, and plotly.min.js
    data/NAME.js               what a page asks the server for: monosemData("NAME", ...)
    export.json                manifest (kind site); a folder without it is never replaced

Chromium loads neither modules nor data by fetch from file://, but it does load scripts; hence both become scripts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from monosem import artifacts
from monosem.logs import progress
from monosem.viewer import files, web
from monosem.viewer import latents as table
from monosem.viewer.reading import Run
from monosem.viewer.search import MOST_RANKED
from monosem.viewer.server import ENDPOINTS
from monosem.viewer.web import API, Links, Site

KIND = "site"
HERE = Path(__file__).parent
PAGES = {"overview": "index.html", "latents": "latents.html", "scaling": "scaling.html"}
"""Those that need no latent; of the viewer's other pages an export has none."""
_ROWS_AT_ONCE = 256
_MAX_SEARCHED = 20_000
"""Latents whose examples can be searched too; of more, explanations and tokens alone."""
_IMPORT = re.compile(r"""^import \{([^}]*)\} from "\./([\w.-]+)";.*\n""", re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|const|class) (\w+)", re.MULTILINE)


class FileLinks(Links):
    """Relative addresses of files; `depth` folders down from the top."""

    redraws_table = True

    def __init__(self, depth: int, exported: Sequence[int]) -> None:
        self.top, self.exported = "../" * depth, frozenset(exported)

    def page(self, name: str, latent: int | None = None, **query: object) -> str:
        given = {key: str(value) for key, value in query.items() if value is not None}
        if name == "latent" and latent in self.exported:
            path = f"latents/{latent}.html"
        elif name in PAGES:
            path = PAGES[name]
        else:
            path, given = "absent.html", {"latent": str(latent)} if name == "latent" else {"page": name}
        return self.top + path + (f"?{urlencode(given, quote_via=quote)}" if given else "")

    def random(self) -> str:
        return f"{self.top}latents/random.html"

    def static(self, name: str) -> str:
        return f"{self.top}static/{'site.js' if name == 'main.js' else name}"


def write(run_folder: str | Path, out: str | Path, latents: Sequence[int]) -> int:
    """Write the pages of `latents`, whole or not at all; returns how many files. An older export is replaced.

    `ValueError` when `out` is there and is no export, or nothing is explained.
    """
    out = Path(out)
    with artifacts.file_lock(out):
        check(out)
        _make(Path(run_folder), out, latents)
    return sum(path.is_file() for path in out.rglob("*"))


def _make(run_folder: Path, out: Path, latents: Sequence[int]) -> None:
    temporary, old = artifacts.temporary_beside(out), artifacts.temporary_beside(out.with_name(f"{out.name}.old"))
    temporary.mkdir()
    try:
        site = Site(run_folder, read_only=True, links=FileLinks(0, latents))
        _write_pages(site, temporary, latents)
        _write_static(temporary / "static")
        _write_data(site, temporary / "data", latents)
        sources = dict(site.run.explanation.manifest["sources"]) if site.run.explanation else {}
        artifacts.write_json(temporary / "export.json", artifacts.manifest(KIND, {}, sources, n_latents=len(latents)))
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def check(out: Path) -> None:
    """`ValueError` unless pages can be written to `out`: a new folder, an empty one, an export; with plotly at hand."""
    artifacts.require_writable(out)
    if web.plotly_file() is None:
        raise ValueError("plotly is not installed, and the pages need it: pip install 'monosem[viewer]'")
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link, and the folder is replaced as a whole; give the folder itself")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() and (out / "export.json").exists():
        artifacts.read_manifest(out / "export.json", KIND)
        return
    raise ValueError(f"{out} is there and is no export (it has no export.json); choose another folder")


def _write_pages(site: Site, folder: Path, latents: Sequence[int]) -> None:
    for name, file in PAGES.items():
        _write(folder / file, _answered(site, web.PAGES[name]))
    _write(folder / "absent.html", _own(site, "absent"))
    site.links = FileLinks(1, latents)
    _write(folder / "latents/random.html", _own(site, "random"))
    for latent in progress(latents, "pages", "latent", total=len(latents), each=1):
        _write(folder / f"latents/{latent}.html", _answered(site, "/latents/{latent}", latent=latent))
    site.links = FileLinks(0, latents)


def _answered(site: Site, path: str, query: Mapping[str, str] | None = None, **path_params: int) -> Any:
    """What the viewer's endpoint answers: the text of a page, or data."""
    endpoint = next(e for e in ENDPOINTS if e.path == path and e.method == "GET")
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "path_params": path_params}
    found = endpoint.answer(site, Request({**scope, "query_string": urlencode(query or {}).encode()}))
    if not isinstance(found, Response):
        return found
    assert found.status_code == 200, path
    return _classic(bytes(found.body).decode())


def _own(site: Site, name: str) -> str:
    """A page of the export's own, in the viewer's frame."""
    templates = web.environment().overlay()
    templates.loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(HERE / "templates"), templates.loader])  # type: ignore[list-item]
    values = {"site": site, "run": site.run, "links": site.links, "theme": None, "here": name}
    return _classic(templates.get_template(f"{name}.html").render(values))


def _classic(page: str) -> str:
    """The page with a classic script in place of the module."""
    classic = page.replace('<script type="module" src=', "<script defer src=")
    assert classic.count("<script defer src=") == 1
    return classic


def _write_static(folder: Path) -> None:
    shutil.copytree(web.HERE / "static", folder, ignore=shutil.ignore_patterns("*.js"))
    shutil.copy(web.HERE / "static/theme.js", folder / "theme.js")
    _write(folder / "site.js", script())
    plotly = web.plotly_file()
    assert plotly is not None  # `check` has looked
    shutil.copy(plotly, folder / "plotly.min.js")


def script() -> str:
    """The viewer's modules and the export's own as one classic script: each in a function, those it imports before it.

    `AssertionError` for a module that is written in another way than `import { a, b } from "./c.js"` and
    `export function`.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        own = HERE / "static" / name  # the export's data.js stands in place of the viewer's
        source = (own if own.exists() else web.HERE / "static" / name).read_text("utf-8")
        for _, other in _IMPORT.findall(source):
            add(other)
        exported = [found for _, found in _EXPORT.findall(source)]
        body = _IMPORT.sub(
            lambda found: f'const {{{found[1].replace(" as ", ": ")}}} = modules["{found[2]}"];\n', source
        )
        body = _EXPORT.sub(r"\1 \2", body)
        assert not re.search(r"^\s*(import|export)\b", body, re.MULTILINE), name
        done[name] = f'modules["{name}"] = (() => {{\n{body}\nreturn {{ {", ".join(exported)} }};\n}})();\n'

    add("export.js")
    return f'"use strict";\n(() => {{\nconst modules = {{}};\n{"".join(done.values())}}})();\n'


def _write_data(site: Site, folder: Path, latents: Sequence[int]) -> None:
    run = site.run
    data: dict[str, Any] = {"latents": _table(run, latents), "figures": _answered(site, f"{API}/figures")}
    if run.column("density") is not None:
        data["map"] = _answered(site, f"{API}/map")
        data |= {f"map-{name}": _answered(site, f"{API}/map", {"colour": name}) for name in run.scalars()}
    for name, value in data.items():
        said = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
        _write(folder / f"{name}.js", f'monosemData("{name}", {said});\n')


def _table(run: Run, latents: Sequence[int]) -> dict[str, Any]:
    """The rows of the table, and for the search the text of their tokens and examples."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(latents), _ROWS_AT_ONCE):
        rows += table.rows(run, np.array(latents[start : start + _ROWS_AT_ONCE], dtype=np.int64))
    examples = "examples" if len(latents) <= _MAX_SEARCHED else "''"
    texts: dict[int, tuple[str, str]] = {}
    with files.database(run.words) as file:
        if file is not None:
            sql = f"SELECT rowid, top_tokens, {examples} FROM latents_fts"
            texts = {latent: (tokens, said) for latent, tokens, said in file.execute(sql)}
    found = [{**row, "texts": texts.get(row["latent"], ("", ""))} for row in rows]
    facts = {"n_latents": run.n_latents, "page_rows": table.PAGE_ROWS, "most_ranked": MOST_RANKED}
    return {"columns": list(run.scalars()), **facts, "rows": found}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
