"""The viewer in a real Chromium, used as a person does; any console error and any request elsewhere fails the test."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Route, expect

from browsing import AUDIT, serving, visiting
from monosem.viewer import text
from monosem.viewer.web import Site
from viewer_runs import N_LATENTS, make_nasty, tiny_run, write_ablations, write_words

LAB = next((Path(__file__).parent.parent / "results").glob("*/lab/joint"))
PAGES = ("/", "/latents?sort=max&order=desc", "/latents/4", "/scaling", "/latents/9999")
NARROW, WIDE = {"width": 360, "height": 740}, {"width": 1440, "height": 900}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run(tmp_path_factory.mktemp("browsed"), tiny_model, tiny_corpus)
    write_words(folder, {latent: f"story number{latent}" for latent in range(N_LATENTS)})
    write_ablations(folder, [4])
    return folder


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    (run / "notes.sqlite").unlink(missing_ok=True)
    with serving(Site(run, LAB)) as found:
        yield found


def test_from_the_overview_to_a_latent_and_back(browser: Browser, address: str, run: Path) -> None:
    with visiting(browser, address) as page:
        page.goto("/")
        expect(page.get_by_role("heading", level=1)).to_have_text(run.name)
        expect(page.locator("#map[data-drawn]")).to_be_visible()
        page.get_by_role("link", name="Latents", exact=True).click()
        page.get_by_role("columnheader", name="max", exact=True).get_by_role("link").click()
        expect(page).to_have_url(re.compile(r"sort=max&order=desc"))
        expect(page.get_by_role("columnheader", name=re.compile("^max"))).to_have_attribute("aria-sort", "descending")
        strongest = np.argsort(-np.load(run / "explain/max.npy"), kind="stable")
        page.locator("tbody th a").first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(str(strongest[0]))
        page.keyboard.press("j")
        expect(page.get_by_role("heading", level=1)).to_have_text(str(strongest[1]))
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_role("heading", level=1)).to_have_text(str(strongest[0]))
        page.keyboard.press("u")
        expect(page).to_have_url(re.compile(r"/latents\?sort=max&order=desc$"))


def test_search_by_number_and_by_words(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/")
        page.keyboard.press("/")
        page.keyboard.type("17\n")
        expect(page.get_by_role("heading", level=1)).to_have_text("17")
        page.get_by_role("searchbox", name="Number of a latent, or words to search for").fill("number21")
        page.keyboard.press("Enter")
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page.locator("tbody tr")).to_contain_text("story number21")
        page.keyboard.press("Escape")
        page.locator("h1").click()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("21")


def test_filters_leave_only_what_was_said_in_the_address(browser: Browser, address: str) -> None:
    with visiting(browser, address, allowed="400 (Bad Request)") as page:
        page.goto("/latents")
        page.get_by_text("Filter by numbers").click()
        page.get_by_label("density, least", exact=True).fill("0.01")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page).to_have_url(re.compile(r"/latents\?min_density=0\.01$"))
        page.get_by_label("density, least", exact=True).fill("much")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.get_by_role("main")).to_contain_text("min_density is 'much'; give a number")


def test_examples_by_tab_and_key_in_the_address(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/latents/4")
        tabs = {name: page.get_by_role("tab", name=re.compile(name)) for name in ("Top", "Random", "By strength")}
        expect(tabs["Top"]).to_have_attribute("aria-selected", "true")
        tabs["Random"].click()
        expect(page).to_have_url(re.compile("show=random"))
        expect(page.get_by_role("tabpanel")).to_contain_text("Drawn uniformly")
        page.keyboard.press("ArrowRight")
        expect(tabs["By strength"]).to_be_focused()
        expect(page.get_by_role("tabpanel")).to_contain_text("Band 1 of 4")
        page.keyboard.press("1")
        expect(page.get_by_role("tabpanel")).to_contain_text("most strongly")
        page.reload()
        expect(tabs["Top"]).to_have_attribute("aria-selected", "true")
        page.goto("/latents/4?show=quantile&text=full")
        expect(tabs["By strength"]).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("link", name="Around the peak")).to_be_visible()
        page.keyboard.press("j")
        expect(page).to_have_url(re.compile(r"/latents/5\?"))


def test_hovering_a_token_says_its_activation(browser: Browser, address: str, run: Path) -> None:
    with visiting(browser, address) as page:
        page.goto("/latents/4")
        page.locator("#panel-top .p").first.hover()
        peak = float(np.load(run / "explain/top_activations.npy")[4, 0].max())
        expect(page.get_by_role("tooltip")).to_contain_text(f"{peak:#.3g}"[:4])
        expect(page.get_by_role("tooltip")).to_contain_text("hit")
        page.get_by_text("kurtosis", exact=True).focus()
        expect(page.get_by_role("tooltip")).to_contain_text("3 for a normal distribution")
        page.keyboard.press("Escape")
        expect(page.get_by_role("tooltip")).to_be_hidden()


def test_what_a_prediction_after_an_ablation_turns_to(browser: Browser, address: str, run: Path) -> None:
    words = json.loads((run / "explain/vocabulary.json").read_text("utf-8"))
    with visiting(browser, address) as page:
        page.goto("/latents/4")
        first = page.locator("#effects .effect").first
        tokens, said = first.get_by_role("button"), first.locator(".at")
        expect(tokens).to_have_count(16 - 8)
        expect(tokens.last).to_have_attribute("aria-pressed", "true")  # the largest KL
        expect(said).to_contain_text("KL 1 nats, loss −1")
        tokens.first.hover()
        expect(said).to_contain_text("KL 0.0100 nats, loss −0.0100")
        assert said.locator("dt").all_inner_texts() == ["logit up", "logit down", "likelier", "less likely"]
        own = [text.token(words[t]) for t in range(8, 13)]
        assert [b.inner_text() for b in said.locator("dd").nth(3).locator("b").all()] == own
        expect(said.locator("dd").nth(3)).to_contain_text("−0.10")
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        expect(tokens.nth(1)).to_be_focused()
        expect(said.locator("dd").first.locator("b").first).to_have_text(text.token(words[9]))
        page.get_by_role("link", name="change in loss").click()
        expect(page).to_have_url(re.compile(r"/latents/4\?effect=loss$"))
        colour = "e => getComputedStyle(e).backgroundColor"
        by_loss = tokens.last.evaluate(colour)
        page.reload()
        assert tokens.last.evaluate(colour) == by_loss
        expect(page.get_by_text("change in loss")).to_have_attribute("aria-current", "true")
        page.keyboard.press("j")
        expect(page).to_have_url(re.compile(r"/latents/5\?effect=loss$"))


def test_a_note_and_a_star_are_kept(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/latents/6?sort=max")
        page.get_by_label("Note on latent 6").fill("mine <b>bold</b> \u202e")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_label("Note on latent 6")).to_have_value("mine <b>bold</b> \u202e")
        expect(page).to_have_url(re.compile("sort=max"))
        page.locator("h1").click()
        page.keyboard.press("s")
        expect(page.get_by_role("button", name="Star")).to_have_attribute("aria-pressed", "true")
        page.goto("/latents")
        page.get_by_label("starred only").check()
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page.locator("tbody tr")).to_contain_text("mine <b>bold</b>")


def test_the_colour_chosen_last_is_shown_whatever_answers_last(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        slow: list[Route] = []
        page.route("**/api/v1/map", lambda route: slow.append(route))
        page.goto("/")
        page.get_by_label("Colour").select_option("mean max")
        expect(page.locator("#map .colorbar")).to_contain_text("mean max")
        with page.expect_response("**/api/v1/map"):
            slow[0].continue_()
        page.keyboard.press("t")
        expect(page.locator("#map .colorbar")).to_contain_text("mean max")


CELL = """() => {
    const map = document.getElementById("map"), trace = map.data[0];
    map.scrollIntoView({ block: "center" });
    const row = trace.customdata.findIndex((r) => r.some(Boolean)), column = trace.customdata[row].findIndex(Boolean);
    const { xaxis, yaxis } = map._fullLayout, n = trace.customdata[row][column];
    const [x, y] = [xaxis._offset + xaxis.d2p(trace.x[column]), yaxis._offset + yaxis.d2p(trace.y[row])];
    const box = map.getBoundingClientRect();
    return [box.left + x, box.top + y, n];
}"""
"""Where on the screen the first cell with a latent is, and how many are in it."""


def test_a_cell_of_the_map_opens_its_latents(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/")
        page.get_by_label("Colour").select_option("mean max")
        expect(page).to_have_url(re.compile("colour=max"))
        expect(page.locator("#map .colorbar")).to_contain_text("mean max")
        left, top, n = page.evaluate(CELL)
        page.mouse.move(left + 1, top)
        page.mouse.move(left, top)
        page.mouse.down()
        page.mouse.up()
        expect(page).to_have_url(re.compile(r"/latents\?min_density="))
        expect(page.locator("tbody tr")).to_have_count(n)


def test_the_theme_follows_system_button_and_address(browser: Browser, address: str) -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with visiting(browser, address, color_scheme="dark") as page:
        page.goto("/")
        dark = paper()
        page.get_by_role("button", name="Light or dark").click()
        light = paper()
        assert light != dark
        page.goto("/latents")
        assert paper() == light
        page.goto("/latents?theme=dark")
        assert paper() == dark
        page.keyboard.press("t")
        assert paper() == light
        expect(page).to_have_url(re.compile("/latents$"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_every_page_fits_and_has_no_serious_fault(
    browser: Browser, address: str, theme: str, size: dict[str, int]
) -> None:
    with visiting(browser, address, allowed="404 (Not Found)", color_scheme=theme, viewport=size) as page:
        for path in PAGES:
            page.goto(path)
            charts = page.locator(".chart").count()
            expect(page.locator("[data-drawn]")).to_have_count(charts)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], path
            assert page.evaluate(AUDIT) == [], path


def test_the_audit_sees_a_fault(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/scaling")
        page.evaluate(
            "document.querySelector('h1').insertAdjacentHTML('afterend', '<h3 id=main style=color:#ccc>x</h3>')"
        )
        page.evaluate("document.body.append(document.createElement('button'))")
        kinds = {fault.split(":")[0].split()[0] for fault in page.evaluate(AUDIT)}
        assert kinds >= {"contrast", "no", "ids", "a"}


def test_the_keyboard_alone_reaches_everything(browser: Browser, address: str) -> None:
    with visiting(browser, address) as page:
        page.goto("/latents")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()


def test_the_pages_work_without_javascript(browser: Browser, address: str) -> None:
    with visiting(browser, address, java_script_enabled=False) as page:
        page.goto("/latents")
        page.get_by_role("columnheader", name="density", exact=True).get_by_role("link").click()
        page.get_by_role("link", name="Next →").first.click()
        expect(page.get_by_role("navigation", name="Pages of the table")).to_contain_text("2 of 2")
        page.locator("tbody th a").first.click()
        page.get_by_role("link", name=re.compile("Random 1?[0-9]")).click()
        expect(page.get_by_text("Drawn uniformly")).to_be_visible()
        page.goto("/latents/4")
        page.get_by_text("Every token after it").first.click()
        expect(page.locator("#effects li").first).to_contain_text("less likely")
        page.get_by_label(re.compile("Note on latent")).fill("no scripts")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_label(re.compile("Note on latent"))).to_have_value("no scripts")


def test_a_hostile_corpus_is_shown_and_does_nothing(browser: Browser, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "<img src=x onerror=alert(9)>"))
    make_nasty(folder)
    with serving(Site(folder)) as address, visiting(browser, address) as page:
        for path in ("/", "/latents", *(f"/latents/{i}" for i in range(0, 20, 3)), "/latents?q=script", "/scaling"):
            page.goto(path)
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            assert page.locator("main img, main script, main iframe").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        page.goto("/latents/0")
        expect(page.locator(".lead")).to_contain_text("<script>alert(1)</script>")
