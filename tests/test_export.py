"""What `export` writes: read back, and the pages in a real Chromium, from the disk and from a plain file server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import re
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from browsing import chromium, visiting
from monosem import cli, export
from monosem.artifacts import read_json
from monosem.config import ExplainConfig, ExportConfig
from monosem.explained import ExplainStore
from monosem.explanations.entry import explain
from monosem.export import sae_viewer, site
from monosem.viewer import search
from monosem.viewer.reading import Run
from tiny import tiny_run

EXPORTED = 12


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "run"
    tiny_run(out, tiny_model, tiny_corpus)
    explain(ExplainConfig(run=str(out), n2g=EXPORTED, ablations=4, device="cpu"))
    return out


@pytest.fixture(scope="module")
def store(run: Path) -> ExplainStore:
    return ExplainStore(run / "explain")


@pytest.fixture(scope="module")
def pages(run: Path, store: ExplainStore) -> Path:
    assert cli.main(["export", str(run), str(run.parent / "site")]) == 0
    return run.parent / "site"


def test_parquet_has_a_row_for_each_latent_and_null_for_what_was_not_computed(run: Path, store: ExplainStore) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert cli.main(["export", str(run), "--parquet", str(run / "latents.parquet")]) == 0
    rows = parquet.read_table(run / "latents.parquet").to_pylist()
    assert [row["latent"] for row in rows] == list(range(48))
    for name in ("density", "max", "n2g_precision", "ablation_sparsity"):
        column = store.column(name)
        assert [row[name] for row in rows] == [None if np.isnan(v) else v for v in column.tolist()]
    assert sum(row["explanation"] is not None for row in rows) == EXPORTED
    assert all(row["top_tokens"] is not None and row["probe_task"] is None for row in rows)


def test_sae_viewer_files_are_read_back(store: ExplainStore, tmp_path: Path) -> None:
    ablated = store.column("ablation_latents").tolist()
    assert sae_viewer.write(store, tmp_path, range(48)) == 48
    found = list(sae_viewer.read(tmp_path))
    assert [one.latent for one in found] == list(range(48))
    words = read_json(store.folder / "vocabulary.json")
    for one in found:
        context, peaks = store.column("top_context")[one.latent], store.column("top_activations")[one.latent].max(1)
        assert [s["act"] for s in one.top] == pytest.approx(peaks[context >= 0].tolist(), rel=1e-4)
        assert sum(one.hist.values()) == store.column("histogram")[one.latent].sum()
        for s in one.top + one.random:
            assert s["acts"][s["idx"]] == s["act"] == max(s["acts"])
            assert s["tokens"] == [words[token] for token in s["token_ints"]]
        assert ("kl" in one.top[0] if one.top else False) == (one.latent in ablated)
    row, latent = 0, found[ablated[0]]
    kl = store.column("ablation_kl")[row, 0, 1:]
    assert latent.top[0]["kl"] == pytest.approx(np.nan_to_num(kl).tolist())
    after = latent.top[0]["idx"]
    assert len(latent.top[0]["top_upvotes_logits"][after]) == len(latent.top[0]["top_upvote_tokens_probs"][after]) == 10
    assert after == 0 or latent.top[0]["top_upvotes_logits"][after - 1] == []


def test_sae_viewer_moments_are_over_all_tokens_and_about_zero(store: ExplainStore, run: Path, tmp_path: Path) -> None:
    from monosem.activations import ActivationStore
    from monosem.kernels import reference
    from monosem.model import Autoencoder

    autoencoder = Autoencoder.load(run / "autoencoder")
    x, _ = autoencoder.normalize(ActivationStore.open(run / "store").rows("train"))
    z = reference.dense(reference.topk_encode(x, autoencoder.weights, 4)).double().numpy()
    sae_viewer.write(store, tmp_path, range(48))
    for latent in range(48):
        facts, own = read_json(tmp_path / "atoms" / f"{latent}.json"), z[:, latent]
        assert facts["mean_act"] == pytest.approx(own.mean(), rel=1e-4)
        assert facts["mean_act_squared"] == pytest.approx((own**2).mean(), rel=1e-4)
        if "kurtosis" in facts:
            assert facts["skew"] == pytest.approx((own**3).mean() / (own**2).mean() ** 1.5, rel=1e-3)
            assert facts["kurtosis"] == pytest.approx((own**4).mean() / (own**2).mean() ** 2, rel=1e-3)


def test_another_viewers_file_that_is_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no atoms"):
        next(sae_viewer.read(tmp_path))
    (tmp_path / "atoms").mkdir()
    (tmp_path / "atoms/3.json").write_text(json.dumps({"density": 0.1, "top": [], "random": []}))
    with pytest.raises(ValueError, match=r"3\.json is not what sae-viewer reads"):
        next(sae_viewer.read(tmp_path))


def test_which_latents_are_exported(store: ExplainStore) -> None:
    rules = np.flatnonzero(~np.isnan(store.column("n2g_precision"))).tolist()
    assert export.chosen(store, "rules") == rules and len(rules) == EXPORTED
    assert export.chosen(store, "all") == list(range(48))
    assert set(export.chosen(store, "14")) > set(rules) and export.chosen(store, "5") == rules[:5]
    assert export.chosen(store, "7,3") == [3, 7]
    with pytest.raises(ValueError, match="there is no latent 48"):
        export.chosen(store, "3,48")
    for wrong, told in (({}, "nothing to write"), ({"out": "x", "latents": "some"}, "latents is 'some'")):
        with pytest.raises(ValueError, match=told):
            ExportConfig(run="r", **wrong)


def test_a_folder_that_is_no_export_is_never_replaced(run: Path, pages: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("to keep")
    with pytest.raises(ValueError, match=r"no export \(it has no export.json\); choose another"):
        site.write(run, mine, [0])
    assert (mine / "letter.txt").read_text() == "to keep"
    shutil.copytree(pages, tmp_path / "site")
    assert site.write(run, tmp_path / "site", [5]) > 0
    assert {path.name for path in (tmp_path / "site/latents").iterdir()} == {"5.html", "random.html"}


def test_pages_point_to_files_that_are_there(pages: Path) -> None:
    for page in pages.rglob("*.html"):
        for link in re.findall(r'(?:href|src|action)="([^"]*)"', page.read_text("utf-8")):
            assert "://" not in link and not link.startswith("/"), link
            file = link.split("?")[0].split("#")[0]
            assert not file or (page.parent / file).exists(), (page, link)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("way", ["file", "http"])
def test_pages_work_in_chromium(way: str, pages: Path, store: ExplainStore) -> None:
    rules = np.flatnonzero(~np.isnan(store.column("n2g_precision"))).tolist()
    with contextlib.ExitStack() as stack:
        root = pages.as_uri() if way == "file" else stack.enter_context(served(pages))
        browser = chromium(stack.enter_context(sync_playwright()))
        stack.callback(browser.close)
        page = stack.enter_context(visiting(browser, "file://" if way == "file" else root))
        page.goto(f"{root}/index.html")
        page.wait_for_selector("#map[data-drawn=true]")
        page.select_option("#colour", "max")
        page.wait_for_url("**colour=max")

        page.click("nav[aria-label=Pages] >> text=Latents")
        numbers = "table.grid tbody th"
        expect(page.locator(numbers)).to_have_text([str(i) for i in rules])
        page.click("table.grid thead >> text=max")
        by_max = sorted(rules, key=lambda i: -store.column("max")[i])
        expect(page.locator(numbers)).to_have_text([str(i) for i in by_max])
        page.click(f"{numbers} a >> nth=0")
        expect(page.locator("h1")).to_have_text(str(by_max[0]))
        page.click("#tab-random")
        page.wait_for_url("**show=random*")
        expect(page.locator("#panel-random")).to_be_visible()
        page.wait_for_function("document.querySelector('.steps .soft').textContent.startsWith('1 of')")
        page.keyboard.press("j")
        expect(page.locator("h1")).to_have_text(str(by_max[1]))
        expect(page.locator("#panel-random")).to_be_visible()
        page.keyboard.press("u")
        expect(page.locator(numbers)).to_have_text([str(i) for i in by_max])

        word = page.locator("table.grid tbody tr").nth(0).locator(".chip").nth(0).inner_text().strip()
        page.fill("#q", word if word.isalnum() and not word.isdigit() else "e")
        page.click("#filters button")
        expect(page.locator(".lead")).to_contain_text("Show all")
        page.goto(f"{root}/latents.html?min_max={store.column('max')[by_max[3]] - 1e-4}")
        expect(page.locator(numbers)).to_have_count(4)
        page.goto(f"{root}/latents.html?q={rules[2]}")
        expect(page.locator("h1")).to_have_text(str(rules[2]))
        page.goto(f"{root}/latents/random.html")
        page.wait_for_url(re.compile(r"latents/\d+\.html"))
        page.click("nav[aria-label=Pages] >> text=Try text")
        expect(page.locator("#absent")).to_contain_text("needs the model")


def test_the_search_of_an_export_of_all_latents_ranks_as_the_server_does(run: Path, tmp_path: Path) -> None:
    site.write(run, tmp_path / "site", range(48))
    served = Run(run)
    with sqlite3.connect(served.words) as file:
        said = " ".join(row[0] for row in file.execute("SELECT examples FROM latents_fts")).split()
    words = [word for word, _ in Counter(word for word in said if word.isalpha()).most_common()]
    queries = [*words[:3], *words[-3:], words[0][:3], f"{words[0]} {words[2]}", "zzz", "--", words[1].upper()]
    wanted = [search.matching(served, query).latents.tolist() for query in queries]
    assert sum(len(found) > 3 and found != sorted(found) for found in wanted) > 2, "few queries with an order of theirs"
    with contextlib.ExitStack() as stack:
        browser = chromium(stack.enter_context(sync_playwright()))
        stack.callback(browser.close)
        page = stack.enter_context(visiting(browser, "file://"))
        for query, latents in zip(queries, wanted, strict=True):
            page.goto(f"{(tmp_path / 'site').as_uri()}/latents.html?{urlencode({'q': query})}")
            expect(page.locator("table.grid tbody th")).to_have_text([str(i) for i in latents])
            expect(page.locator(".lead")).to_contain_text("Best match first")
