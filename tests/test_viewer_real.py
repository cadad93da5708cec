"""The pages of a run of a real model in a real Chromium, from the overview to an edited prompt and a second run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import AUDIT, serving, visiting
from monosem.artifacts import read_json
from monosem.config import ExplainConfig, TrainConfig
from monosem.explanations.entry import explain
from monosem.training import train
from monosem.viewer import search, trying
from monosem.viewer.reading import Run
from monosem.viewer.web import Site

pytestmark = pytest.mark.real
PROMPT = "When the mice are at rest, the cat sleeps in the warm kitchen; the dog waits at the door for"
NARROW, WIDE = {"width": 360, "height": 740}, {"width": 1280, "height": 860}


class Served(NamedTuple):
    folder: Path
    address: str
    latent: int
    """One that was ablated."""


@pytest.fixture(scope="module")
def served(real_run: Path) -> Iterator[Served]:
    """The run explained, and beside it a smaller one that is explained on the same tokens."""
    other = TrainConfig(
        out=str(real_run.parent / "other"), store=str(real_run / "store"), n_latents=512, n_tokens=256 * 40,
        batch_size=256, device="cpu", seed=1,
    )  # fmt: skip
    train(other)
    explain(ExplainConfig(run=str(real_run), n2g=0, ablations=2, device="cpu"))
    explain(ExplainConfig(run=other.out, n2g=0, ablations=0, device="cpu"))
    site = Site(real_run)
    trying.facts(site)
    latent = int(np.load(real_run / "explain/ablation_latents.npy")[0])
    with serving(site) as address:
        yield Served(real_run, address, latent)


def tried(page: Page) -> None:
    """Wait until everything asked for is answered."""
    expect(page.locator("#try-status")).to_have_text(re.compile(r"\d+ tokens, "), timeout=60_000)
    expect(page.locator("#try-result[aria-busy]")).to_have_count(0, timeout=60_000)


def test_look_at_the_latents_of_a_real_model(browser: Browser, served: Served) -> None:
    run = Run(served.folder)
    contexts = run.rows("top_context")
    assert contexts is not None
    with visiting(browser, served.address, viewport=WIDE) as page:
        page.goto("/")
        expect(page.locator("#map[data-drawn]")).to_be_visible()
        value = read_json(served.folder / "eval.json")["metrics"]["normalized_mse"]["value"]
        expect(page.locator(".headline")).to_contain_text(f"{value:.3f}")
        page.get_by_role("link", name="Latents", exact=True).click()
        page.get_by_role("columnheader", name="max", exact=True).get_by_role("link").click()
        strongest = run.order("max", descending=True)
        expect(page.locator("tbody th")).to_have_text([str(i) for i in strongest[: search.PAGE_ROWS]])
        page.keyboard.press("/")
        page.keyboard.type("the\n")
        found = search.matching(run, "the").latents
        expect(page.locator("tbody th").first).to_have_text(str(found[0]))
        page.locator("tbody th a").first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(str(found[0]))
        expect(page.locator("#panel-top li")).to_have_count(int((contexts[found[0]] >= 0).sum()))
        page.keyboard.press("j")
        expect(page.get_by_role("heading", level=1)).to_have_text(str(found[1]))
        page.go_back()
        page.keyboard.press("u")
        expect(page).to_have_url(re.compile(r"/latents\?q=the$"))


def test_what_taking_a_real_latent_out_changes(browser: Browser, served: Served) -> None:
    with visiting(browser, served.address, viewport=WIDE) as page:
        page.goto(f"/latents/{served.latent}?effect=loss")
        effect = page.locator("#effects .effect").filter(has=page.get_by_role("button")).first
        said = effect.locator(".at")
        effect.get_by_role("button").first.hover()
        expect(said).to_contain_text(re.compile(r"KL [\d.e−]+ nats, loss"))
        assert all(
            len(words.split()) == 10 for words in said.locator("dd").all_inner_texts()
        )  # five tokens, by how much
        page.get_by_role("link", name="KL", exact=True).click()
        expect(page).to_have_url(re.compile(rf"/latents/{served.latent}$"))


def test_type_a_prompt_and_ablate_what_fires(browser: Browser, served: Served) -> None:
    with visiting(browser, served.address, viewport=WIDE) as page:
        page.goto("/try")
        expect(page.locator("#try-status")).to_contain_text("is ready", timeout=60_000)
        page.get_by_label("Text", exact=True).fill(PROMPT)
        page.keyboard.press("Control+Enter")
        tried(page)
        assert "".join(page.locator("#try-strip button").all_inner_texts()[1:]) == PROMPT
        probabilities = page.locator("#try-next .num").all_inner_texts()
        latent = page.locator("#try-active th a").first.inner_text()
        page.get_by_role("button", name=f"Ablate latent {latent}", exact=True).click()
        tried(page)
        expect(page.locator("#try-next-note")).to_contain_text("edited (KL")
        expect(page.locator("#try-continuation .edited")).not_to_be_empty(timeout=60_000)
        assert page.locator("#try-next .num").all_inner_texts() != probabilities
        link = page.url
        page.locator("#try-active th a").first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"^\d+$"))
        page.go_back()
        tried(page)
        assert page.url == link
        expect(page.get_by_label(f"What to do to latent {latent}")).to_have_value("ablate")


def test_compare_with_another_run_of_the_same_model(browser: Browser, served: Served) -> None:
    with visiting(browser, served.address, viewport=WIDE) as page:
        page.goto("/compare")
        page.get_by_label(re.compile("^Compare run with")).select_option(label="other · 512 latents")
        table = page.get_by_role("region", name="Matched latents")
        expect(table.locator("tbody tr")).to_have_count(50)
        expect(table.get_by_role("columnheader", name="Jaccard")).to_be_visible()
        page.get_by_role("link", name="mutual matches").click()
        expect(page).to_have_url(re.compile("with=other&show=mutual"))
        expect(table).to_contain_text("⇄")
        table.locator("tbody a").first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"^\d+$"))
        page.go_back()
        expect(page).to_have_url(re.compile("with=other&show=mutual"))


@pytest.mark.parametrize(("scheme", "viewport"), [("dark", NARROW), ("light", WIDE)], ids=["phone", "desk"])
def test_every_page_fits_and_shows_no_hole(
    browser: Browser, served: Served, scheme: str, viewport: dict[str, int]
) -> None:
    tried_text = "/try?" + urlencode({"text": PROMPT, "colour": "delta_ce", "continue": 0})
    never = np.flatnonzero(np.load(served.folder / "explain/max.npy") == 0)[:1].tolist()
    latents = [f"/latents/{i}" for i in (served.latent, *never)]
    pages = ("/", "/latents?sort=density&order=desc", *latents, "/scaling", tried_text, "/compare?with=other")
    with visiting(browser, served.address, viewport=viewport, color_scheme=scheme) as page:
        for path in pages:
            page.goto(path)
            expect(page.locator(".chart:not([data-drawn])")).to_have_count(0)
            if path == tried_text:
                tried(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
            assert page.evaluate(AUDIT) == [], path
            ours = "[...document.querySelectorAll('main .num, main dd, main .note, main .lead')].map(e => e.innerText)"
            holes = [said for said in page.evaluate(ours) if re.search(r"\b(undefined|NaN|null|\[object)\b", said)]
            assert holes == [], path
