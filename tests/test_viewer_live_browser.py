"""Trying texts and comparing runs in a real Chromium; any console error and any request elsewhere fails the test."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import AUDIT, serving, visiting
from monosem.config import ExplainConfig, TrainConfig
from monosem.explanations.entry import explain
from monosem.training import train
from monosem.viewer import trying
from monosem.viewer.web import Site
from viewer_runs import make_nasty, tiny_run

NARROW, WIDE = {"width": 360, "height": 740}, {"width": 1440, "height": 900}
TEXT = "the story and the end of a town"
TRIED = re.compile(r"\d+ tokens, ")


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browsed")
    store = str(tiny_run(folder / "one", tiny_model, tiny_corpus) / "store")
    train(TrainConfig(out=str(folder / "two"), store=store, n_latents=48, k=4, n_tokens=3000, batch_size=100, seed=1))
    explain(ExplainConfig(run=str(folder / "two"), n2g=0, ablations=0, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    site = Site(runs / "one")
    trying.facts(site)  # the model's libraries, whose import would hold up the server of the first page
    with serving(site) as found:
        yield found


def state(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def tried(page: Page) -> None:
    """Wait until everything asked for is answered."""
    expect(page.locator("#try-status")).to_have_text(TRIED, timeout=60_000)
    expect(page.locator("#try-result")).to_be_visible()
    expect(page.locator("#try-result[aria-busy]")).to_have_count(0, timeout=60_000)


def opened(page: Page, **query: object) -> None:
    page.goto(f"/try?{urlencode(query)}")
    tried(page)


def test_type_a_text_look_at_a_token_and_edit_its_latent(browser: Browser, address: str) -> None:
    with visiting(browser, address, viewport=WIDE) as page:
        page.goto("/")
        page.get_by_role("link", name="Try text").click()
        expect(page.locator("#try-status")).to_contain_text("is ready", timeout=60_000)
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.keyboard.press("Control+Enter")
        tried(page)
        tokens = page.locator("#try-strip button")
        assert "".join(tokens.all_inner_texts()[1:]) == TEXT
        expect(tokens.last).to_have_attribute("aria-pressed", "true")
        page.get_by_role("button", name="story").or_(tokens.nth(2)).first.click()
        tried(page)
        assert "position" in state(page) and state(page)["text"] == TEXT
        link = page.locator("#try-active th a").first
        latent = link.inner_text()
        expect(link).to_have_attribute("href", f"/latents/{latent}")
        before = page.locator("#try-next").inner_text()
        page.get_by_role("button", name=f"Ablate latent {latent}", exact=True).click()
        tried(page)
        assert state(page)["edits"] == f"{latent}:ablate"
        expect(page.locator("#try-next-note")).to_contain_text("edited (KL")
        expect(page.locator("#try-continuation .edited")).to_be_visible()
        assert page.locator("#try-next").inner_text() != before
        page.get_by_label(f"What to do to latent {latent}").select_option("boost")
        page.get_by_label(f"Factor of latent {latent}").fill("5")
        page.keyboard.press("Enter")
        expect(page).to_have_url(re.compile(f"edits={latent}%3Aboost%3A5"))
        tried(page)
        page.reload()
        tried(page)
        expect(page.get_by_label(f"Factor of latent {latent}")).to_have_value("5")
        page.get_by_role("button", name=f"Remove the edit of latent {latent}").click()
        tried(page)
        assert "edits" not in state(page)
        page.locator("#try-active th a").first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"^\d+$"))
        page.go_back()
        tried(page)
        assert "".join(tokens.all_inner_texts()[1:]) == TEXT


def test_k_and_threshold_and_colours_are_in_the_address(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        opened(page, text=TEXT)
        page.get_by_label("k", exact=True).fill("9")
        page.keyboard.press("Enter")
        expect(page.locator("#try-active-note")).to_contain_text("9 active")
        assert state(page)["k"] == "9"
        page.get_by_label("or threshold").fill("0.5")
        page.get_by_label("or threshold").press("Tab")
        expect(page).to_have_url(re.compile("threshold=0.5"))
        tried(page)
        page.get_by_label("coloured by").select_option("latent")
        tried(page)
        assert state(page)["colour"].startswith("latent:")
        page.get_by_role("slider").focus()
        page.keyboard.press("Home")
        expect(page.locator("#try-active-note")).to_contain_text("1 active")
        assert state(page)["k"] == "1" and "threshold" not in state(page)


def test_the_tokens_by_keyboard(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        opened(page, text=TEXT)
        page.locator("#try-strip button[tabindex='0']").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        expect(page.locator("#try-active-note")).to_contain_text("position 1")
        tried(page)
        expect(page.locator("#try-strip button").nth(1)).to_be_focused()


def test_what_cannot_be_tried_is_said(browser: Browser, address: str) -> None:
    with visiting(browser, address, allowed="400 (Bad Request)") as page:
        opened(page, text=TEXT)
        page.get_by_label("Text", exact=True).fill("x" * 500)
        page.get_by_role("button", name="Read it").click()
        expect(page.get_by_role("alert")).to_have_text(re.compile("give at most 127"))
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.get_by_role("button", name="Read it").click()
        tried(page)
        expect(page.locator("#try-error")).to_be_hidden()
        page.get_by_label("Latent", exact=True).fill("9999")
        page.get_by_role("button", name="Ablate", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(re.compile("latents 0 to 63"))


def test_a_labelled_table(browser: Browser, address: str) -> None:
    rows = [f"{word} was seen near {i * 7919 % 97} houses,{word}" for i in range(30) for word in ("the", "in")]
    with visiting(browser, address, allowed="400 (Bad Request)") as page:
        page.goto("/try")
        page.get_by_label("Table").fill("a,b\n1,2")
        page.get_by_role("button", name="Find it").click()
        expect(page.get_by_role("alert")).to_contain_text("no column 'text'", timeout=60_000)
        csv = {"name": "table.csv", "mimeType": "text/csv", "buffer": "\n".join(["text,label", *rows]).encode()}
        page.get_by_label("Open a file").set_input_files(csv)  # type: ignore[arg-type]
        expect(page.get_by_label("Table")).to_have_value(re.compile("seen near"))
        page.get_by_role("button", name="Find it").click()
        expect(page.locator("#labelled-best tr")).to_have_count(20, timeout=60_000)
        expect(page.locator("#labelled-verdict")).to_contain_text("with shuffled labels, in 20 shuffles")


def test_two_runs_side_by_side(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/")
        page.get_by_role("link", name="Compare").click()
        page.get_by_label(re.compile("^Compare one with")).select_option(label="two · 48 latents")
        expect(page).to_have_url(re.compile("with=two"))
        table = page.get_by_role("region", name="Matched latents")
        expect(table.locator("tbody tr")).to_have_count(50)
        page.get_by_role("link", name="Latents of B").click()
        expect(table.locator("tbody tr")).to_have_count(48)
        page.get_by_role("link", name="without a match").click()
        expect(page).to_have_url(re.compile("side=b&show=alone"))
        page.get_by_role("link", name="cosine").click()
        expect(page.get_by_role("columnheader", name="cosine")).to_have_attribute("aria-sort", "ascending")
        table.locator("tbody a").first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"^\d+$"))
        page.go_back()
        expect(page).to_have_url(re.compile("side=b&show=alone"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [NARROW, WIDE])
def test_pages_fit_and_have_no_serious_fault(
    browser: Browser, address: str, scheme: str, viewport: dict[str, int]
) -> None:
    paths = [
        "/try?" + urlencode({"text": TEXT, "edits": "3:boost:2,5:ablate", "colour": "latent:3"}),
        "/compare?with=two",
    ]
    with visiting(browser, address, viewport=viewport, color_scheme=scheme) as page:
        for path in paths:
            page.goto(path)
            if path.startswith("/try"):
                tried(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
            assert page.evaluate(AUDIT) == [], path


def test_texts_that_attack_stay_texts(browser: Browser, runs: Path, tmp_path: Path) -> None:
    leave = shutil.ignore_patterns("store", "state")
    folder = Path(shutil.copytree(runs / "one", tmp_path / "<img src=x>", ignore=leave))
    make_nasty(folder)
    shutil.copytree(runs / "two", tmp_path / "<script>alert(5)<", ignore=leave)
    text = "<script>alert(1)</script>\n</textarea><img src=x onerror=alert(2)> \u202eevil\u2028 {{ 7 * 7 }}"
    trying.facts(Site(folder))
    with serving(Site(folder)) as address, visiting(browser, address) as page:
        opened(page, text=text, edits="1:ablate", colour="latent:1")
        shown = "".join(page.locator("#try-strip button").all_inner_texts())
        assert "<script>alert(1)</script>" in shown and "onerror=alert(2)" in shown
        expect(page.locator("main img, main script")).to_have_count(0)
        expect(page.get_by_label("Text", exact=True)).to_have_value(text)
        page.goto("/compare")
        page.locator("#with").select_option(index=1)
        expect(page.get_by_role("region", name="Matched latents")).to_be_visible()
        expect(page.locator("main img, main script")).to_have_count(0)
