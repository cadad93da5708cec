"""What every page has in common: addresses, templates, answers, and the guard that all requests pass."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monosem.viewer import text
from monosem.viewer.files import Unavailable
from monosem.viewer.reading import COLUMNS, Run

HERE = Path(__file__).parent
API = "/api/v1"
MAX_BODY_BYTES = 1 << 20
MAX_SHOWN = 500
"""Characters of what somebody sent, in a message about it."""
HOSTS = ("127.0.0.1", "localhost")
THEMES = ("light", "dark")
PAGES = {
    "overview": "/",
    "latents": "/latents",
    "latent": "/latents/{latent}",
    "try": "/try",
    "compare": "/compare",
    "scaling": "/scaling",
}
NAVIGATION = {
    "overview": "Overview",
    "latents": "Latents",
    "try": "Try text",
    "compare": "Compare",
    "scaling": "Scaling",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Links:
    """Addresses of pages and files, as the server has them. An export gives its own, with the same methods."""

    redraws_table = False
    """Whether other rows are drawn into a page's table later, so that it needs every column."""

    def page(self, name: str, latent: int | None = None, **query: object) -> str:
        """Address of a page of PAGES; parts of the query that are None are left out."""
        given = {key: str(value) for key, value in query.items() if value is not None}
        path = PAGES[name].format(latent=latent)
        return f"{path}?{urlencode(given, quote_via=quote)}" if given else path

    def random(self) -> str:
        """Address that leads to a latent at random."""
        return "/latents/random"

    def static(self, name: str) -> str:
        """Address of a file of static/, or of plotly.min.js."""
        return f"/static/{name}"


class Site:
    """One run and how it is served."""

    def __init__(
        self,
        folder: Path,
        scaling: Path | None = None,
        *,
        others: Sequence[Path] = (),
        read_only: bool = False,
        links: Links | None = None,
        model: str | None = None,
    ) -> None:
        self.model = model
        """Where the run's subject lies, if it has moved."""
        self._folder, self._scaling, self._lock = folder, scaling, threading.Lock()
        self._run = Run(folder, scaling)
        self.others, self.read_only, self.links = tuple(others), read_only, links or Links()

    @property
    def run(self) -> Run:
        """The run as it is on disk now: opened again when a stage has written to it.

        Where that cannot be read, it stays as it was and says why in its `trouble`.
        """
        with self._lock:
            if not self._run.fresh:
                try:
                    self._run = Run(self._folder, self._scaling)
                except Unavailable as error:
                    self._run.trouble = str(error)
            return self._run


class Endpoint(NamedTuple):
    """An address and what answers it: a page (`Response`), or JSON (a dict) below API."""

    path: str
    answer: Callable[[Site, Request], Response | dict[str, Any]]
    """Runs in a thread of its own, so it may take its time; `body(request)` has what was sent."""
    summary: str = ""
    parameters: Mapping[str, str] = {}
    """Meaning by name of what may stand in the query, for the OpenAPI document; other names are refused."""
    method: str = "GET"
    schema: dict[str, Any] | None = None
    """JSON schema of the body, where one is sent."""


def route(site: Site, endpoint: Endpoint) -> Route:
    """The endpoint as Starlette's: a `ValueError` is the asker's mistake (400), `Unavailable` the files' (503).

    What fails in another way while a stage writes to the run is asked again, once, of the run as it then is.
    """

    async def answer(request: Request) -> Response:
        try:
            request.state.body = await request.body()
        except ClientDisconnect:
            raise HTTPException(400, "the body ended early") from None
        if unknown := sorted(set(request.query_params) - set(endpoint.parameters) - {"theme"}):
            allowed = ", ".join(endpoint.parameters) or "none"
            raise HTTPException(400, _short(f"there is no parameter {', '.join(unknown)}; there are: {allowed}"))
        try:
            found = await run_in_threadpool(_answered, site, endpoint, request)
        except Unavailable as error:
            raise HTTPException(503, _short(str(error))) from error
        except ValueError as error:
            raise HTTPException(400, _short(str(error))) from error
        return found if isinstance(found, Response) else json_response(found)

    return Route(endpoint.path, answer, methods=[endpoint.method])


def _answered(site: Site, endpoint: Endpoint, request: Request) -> Response | dict[str, Any]:
    run = site.run
    try:
        return endpoint.answer(site, request)
    except Exception:
        if run.fresh or request.method != "GET":
            raise
    run = site.run
    try:
        return endpoint.answer(site, request)
    except (ValueError, HTTPException):
        raise
    except Exception as error:
        if run.fresh:
            raise
        reason = run.trouble or f"{run.folder} is being written to; load the page again"
        raise Unavailable(reason) from error


def _short(reason: str) -> str:
    """The reason, without the middle of something long in it that somebody sent."""
    return reason if len(reason) <= 2 * MAX_SHOWN else f"{reason[:MAX_SHOWN]} … {reason[-MAX_SHOWN:]}"


def json_response(data: Any, status: int = 200) -> Response:
    """JSON in ASCII, so that no text of a corpus can break it; NaN is an error of ours."""
    return Response(json.dumps(data, allow_nan=False, separators=(",", ":")), status, media_type="application/json")


def page(site: Site, request: Request, name: str, *, status: int = 200, **values: Any) -> Response:
    """The template NAME.html with `values`, as a page."""
    theme = request.query_params.get("theme")
    return HTMLResponse(render(site, name, theme=theme, **values), status)


def render(site: Site, name: str, *, theme: str | None = None, **values: Any) -> str:
    """The text of the template NAME.html. It sees `values`, `run`, `site`, `links` and `environment`'s filters."""
    known = theme if theme in THEMES else None
    return environment().get_template(f"{name}.html").render(
        {"site": site, "run": site.run, "links": site.links, "theme": known, "here": name, **values}
    )  # fmt: skip


def body(request: Request) -> dict[str, Any]:
    """What was sent: a JSON object, or a form's first values. `ValueError` when it is neither."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        sent = request.state.body.decode("utf-8")
        if kind == "application/json":
            data = json.loads(sent)
        elif kind == "application/x-www-form-urlencoded":
            fields = parse_qs(sent, keep_blank_values=True, strict_parsing=bool(sent), max_num_fields=100)
            data = {name: found[0] for name, found in fields.items()}
        else:
            raise ValueError(f"the body is {kind or 'of no type'}; send application/json or a form")
    except RecursionError:
        data = None
    if not isinstance(data, dict):
        raise ValueError("the body is not a JSON object; send one")
    return data


@functools.cache
def environment() -> jinja2.Environment:
    """The templates: all text is escaped, a missing value is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"visible": text.visible, "token": text.token, "prose": text.prose, "number": text.number}
    found.filters |= {"percent": text.percent, "signed": text.signed}
    found.globals |= {"NAVIGATION": NAVIGATION, "COLUMNS": COLUMNS, "digits_of": text.digits_of}
    return found


def plotly_file() -> Path | None:
    """plotly.min.js as the installed wheel of plotly has it; None when it is not installed."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "package_data/plotly.min.js"
    return path if path.exists() else None


class Guard:
    """Lets through what comes from this machine's own pages, and says on every answer what a browser may do with it.

    403 for a Host that is not this machine (a name re-bound to 127.0.0.1), for an Origin that is not the Host, and for
    anything but reading without an Origin; 413 for a body over MAX_BODY_BYTES.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        refusal = _refusal(scope)
        if refusal is not None:
            status, reason = refusal
            await Response(f"{reason}\n", status, media_type="text/plain")(scope, receive, marked)
            return
        await self.app(scope, counted, marked)


_TOO_LARGE = f"the body is over {MAX_BODY_BYTES:,} bytes; send less"


def _refusal(scope: Scope) -> tuple[int, str] | None:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if _hostname(host) not in HOSTS:
        return 403, f"this page answers to http://{HOSTS[0]} only"
    origin = headers.get(b"origin")
    reads = scope["method"] in ("GET", "HEAD")
    if (origin is None and not reads) or (origin is not None and origin.decode("latin-1") != f"http://{host}"):
        return 403, "this page answers to its own pages only: send their Origin"
    if headers.get(b"sec-fetch-site") == b"cross-site" and scope["path"].startswith(API):
        return 403, "the API answers to its own pages only"
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 15 or int(length) > MAX_BODY_BYTES:
        return 413, _TOO_LARGE
    return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"http://{host}").hostname
    except ValueError:
        return None
