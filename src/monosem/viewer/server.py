"""The pages and the API put together, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from monosem import __version__
from monosem.config import ServeConfig
from monosem.viewer import compare, latent, latents, overview, scaling, trying, web
from monosem.viewer.reading import Run
from monosem.viewer.web import API, HERE, Endpoint, Guard, Site

log = logging.getLogger("monosem")

ENDPOINTS: tuple[Endpoint, ...] = (
    *overview.ENDPOINTS,
    *latents.ENDPOINTS,
    *latent.ENDPOINTS,
    *trying.ENDPOINTS,
    *compare.ENDPOINTS,
    *scaling.ENDPOINTS,
)
"""All pages and all of the API. A page more is its module's ENDPOINTS here, and its place in `web.NAVIGATION`."""


def application(site: Site) -> Guard:
    """The whole site as an ASGI application."""
    endpoints = [web.route(site, endpoint) for endpoint in ENDPOINTS]
    document = openapi(ENDPOINTS)

    async def describe(request: Request) -> Response:
        return web.json_response(document)

    async def failed(request: Request, error: Exception) -> Response:
        status, reason = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, _OURS)
        if request.url.path.startswith(API):
            return web.json_response({"error": reason}, status)
        return web.page(site, request, "error", status=status, reason=reason)

    app = Starlette(
        routes=[
            *endpoints,
            Route(f"{API}/openapi.json", describe),
            Route("/static/plotly.min.js", _plotly),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        exception_handlers={HTTPException: failed, Exception: failed},
    )
    return Guard(app)


_OURS = "something went wrong here; the terminal in which monosem serve runs says what"


def openapi(endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
    """The OpenAPI document of those of the endpoints that are the API's."""
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        if not endpoint.path.startswith(API):
            continue
        path = endpoint.path.removeprefix(API)
        query: list[dict[str, Any]] = [
            {"name": name, "in": "query", "description": meaning, "schema": {"type": "string"}}
            for name, meaning in endpoint.parameters.items()
        ]
        if "{latent}" in path:
            query.insert(0, {"name": "latent", "in": "path", "required": True, "schema": {"type": "integer"}})
        content = {"application/json": {"schema": {"type": "object"}}}
        entry: dict[str, Any] = {"summary": endpoint.summary, "parameters": query}
        if endpoint.schema is not None:
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": endpoint.schema}}}
        entry["responses"] = {"200": {"description": "as summarised", "content": content}, "400": _ERROR, "403": _ERROR}
        paths.setdefault(path, {})[endpoint.method.lower()] = entry
    info = {"title": "monosem", "version": __version__, "description": "What a run's pages show, as JSON."}
    return {"openapi": "3.1.0", "info": info, "servers": [{"url": API}], "paths": paths}


_ERROR = {
    "description": "what was wrong, in words",
    "content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}},
}


async def _plotly(request: Request) -> Response:
    path = web.plotly_file()
    if path is None:
        raise HTTPException(404, "plotly is not installed, and charts need it: pip install 'monosem[viewer]'")
    return FileResponse(path, media_type="text/javascript", headers={"cache-control": "max-age=86400"})


def serve(config: ServeConfig) -> None:
    """Serve until interrupted. `ValueError` when a folder does not hold what it is given for or the port is taken."""
    scaling_folder = Path(config.scaling) if config.scaling is not None else None
    if scaling_folder is not None and not (scaling_folder / "scaling.json").is_file():
        raise ValueError(f"{scaling_folder} holds no scaling.json; give the folder of monosem scale")
    if config.model is not None:
        from monosem import loading

        loading.locate(config.model, None)  # its hash is checked when it is loaded, for the first live page
    others = [Run(Path(other)).folder for other in config.others]
    site = Site(Path(config.run), scaling_folder, others=others, read_only=config.read_only, model=config.model)
    with _listening(config.port) as listener:
        log.info("%s: http://127.0.0.1:%d (Ctrl-C stops it)", config.run, listener.getsockname()[1])
        options = uvicorn.Config(application(site), log_level="warning", access_log=False, lifespan="off")
        uvicorn.Server(options).run([listener])


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ValueError(
            f"port {port} cannot be used ({os.strerror(error.errno or 0)}); choose another with --port"
        ) from None
    with listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
        yield listener
