"""The pictures of the README and docs/viewer.md: each page of a served run, wide and narrow, light and dark.

    monosem serve runs/demo OTHER --scaling results/smollm2-135m-instruct-q4_1/lab/joint --port 8765 &
    python experiments/screenshots.py http://127.0.0.1:8765 --latent 2979 --other NAME

writes docs/images/NAME-THEME.png, and NAME-narrow.png for a phone; needs Chromium and the extra `dev`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import sync_playwright

TEXT = "When the mice are at rest, the cat sleeps in the warm kitchen; the dog waits at the door for"
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 360, "height": 740}
LOOKS = {"light": (WIDE, "light"), "dark": (WIDE, "dark"), "narrow": (NARROW, "light")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--latent", type=int, default=0, help="that is shown")
    parser.add_argument("--other", default="", help="name of the run that it is compared with")
    parser.add_argument("--looks", nargs="+", default=list(LOOKS), choices=list(LOOKS))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    pages = {
        "overview": "/", "latents": "/latents?sort=max&order=desc", "latent": f"/latents/{options.latent}",
        "scaling": "/scaling", "try": f"/try?text={quote(TEXT)}&position=11&colour=delta_ce",
        "compare": f"/compare?with={options.other}",
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for look in options.looks:
            size, theme = LOOKS[look]
            page = browser.new_page(viewport=size, color_scheme=theme, base_url=options.address)  # type: ignore[arg-type]
            for name, path in pages.items():
                page.goto(path, wait_until="networkidle")
                page.wait_for_function("document.querySelectorAll('.chart:not([data-drawn])').length === 0")
                if name == "try":
                    page.wait_for_selector("#try-result:not([hidden]):not([aria-busy])", timeout=120_000)
                page.screenshot(path=options.out / f"{name}-{look}.png")
        browser.close()


if __name__ == "__main__":
    main()
