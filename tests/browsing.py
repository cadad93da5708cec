"""A real server and a real Chromium for the tests that use the pages as a person does."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, Dialog, Page, Playwright

from monosem.viewer.server import application
from monosem.viewer.web import Site

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOCAL = ("data", "blob")


def chromium(playwright: Playwright) -> Browser:
    """The Chromium of this machine. The test is skipped where there is none, and fails there in CI."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        missing = "no Chromium on the PATH: the pages were not tested in a browser (apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])


@contextlib.contextmanager
def serving(site: Site) -> Iterator[str]:
    """The site on a port of its own, as `monosem serve` serves it; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application(site), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)


@contextlib.contextmanager
def visiting(browser: Browser, address: str, *, allowed: str | None = None, **options: Any) -> Iterator[Page]:
    """A page in a profile of its own, links relative to `address`.

    It fails on leaving when anything was written to the console as an error (but what has `allowed` in it), a script
    failed, a dialog opened, or a request went anywhere but to `address`.
    """
    faults: list[str] = []
    context = browser.new_context(base_url=address, reduced_motion="reduce", **options)
    context.set_default_timeout(20_000)

    def fault(kind: str, what: str) -> None:
        if allowed is None or allowed not in what:
            faults.append(f"{kind}: {what}")

    def check(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in LOCAL and f"{parts.scheme}://{parts.netloc}" != address:
            fault("request", url)

    def refuse(dialog: Dialog) -> None:
        fault("dialog", dialog.message)
        dialog.dismiss()

    page = context.new_page()
    page.on("console", lambda message: fault("console", message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: fault("script", str(error)))
    page.on("request", lambda request: check(request.url))
    page.on("dialog", refuse)
    try:
        yield page
    finally:
        context.close()
    assert faults == []


AUDIT = (Path(__file__).parent / "audit.js").read_text("utf-8")
"""JavaScript that lists the serious faults of a page that a screen reader or tired eyes would meet."""
