"""The viewer in process: every route, every bad request, and a corpus that tries to break out of its page."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import tiny
from monosem import n2g
from monosem.viewer import latent, search, text, web
from monosem.viewer.notes import Notes
from monosem.viewer.reading import FIRED_THRESHOLD, Run
from monosem.viewer.server import ENDPOINTS, application
from monosem.viewer.web import API, MAX_BODY_BYTES, Site
from viewer_runs import N_LATENTS, NASTY, make_nasty, tiny_run, write_words

HOST = "http://127.0.0.1:8765"
PAGES = ("/", "/latents", "/latents/3", "/scaling")


@pytest.fixture(scope="module")
def honest(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("viewed"), tiny_model, tiny_corpus)


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """A copy of the explained run, to write in."""
    return Path(shutil.copytree(honest, tmp_path / "run", ignore=shutil.ignore_patterns("store", "state")))


@pytest.fixture
def open_site(folder: Path) -> Callable[..., TestClient]:
    def opened(**options: Any) -> TestClient:
        return TestClient(application(Site(folder, **options)), HOST, headers={"origin": HOST})

    return opened


@pytest.fixture
def client(open_site: Callable[..., TestClient]) -> TestClient:
    return open_site()


def test_every_page_answers_and_says_what_a_browser_may_do(client: TestClient) -> None:
    for path in PAGES:
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self';" in policy and "style-src 'self' 'unsafe-inline'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?![^>]* src=)|\son\w+=|https?://(?!127\.0\.0\.1)", answer.text), path


def test_pages_answer_200_before_anything_was_computed_and_say_the_command(
    folder: Path, open_site: Callable[..., TestClient]
) -> None:
    shutil.rmtree(folder / "explain")
    (folder / "eval.json").unlink()
    client = open_site()
    for path in PAGES:
        answer = client.get(path)
        assert answer.status_code == 200
        assert "not computed" in answer.text, path
    assert f"monosem explain {folder}" in client.get("/").text
    assert f"monosem eval {folder}" in client.get("/").text
    assert client.get(f"{API}/latents/3").json()["histogram"] is None
    assert client.get(f"{API}/map").status_code == 400


def test_the_table_sorts_filters_and_pages(client: TestClient, folder: Path) -> None:
    density = np.load(folder / "explain/density.npy")
    found = client.get(f"{API}/latents", params={"sort": "density", "order": "desc"}).json()
    assert [row["density"] for row in found["rows"]] == sorted(density.tolist(), reverse=True)[: search.PAGE_ROWS]
    assert (found["total"], found["n_pages"]) == (N_LATENTS, 2)
    second = client.get(f"{API}/latents", params={"sort": "density", "order": "desc", "page": "2"}).json()
    assert not {r["latent"] for r in found["rows"]} & {r["latent"] for r in second["rows"]}
    low = float(np.median(density))
    some = client.get(f"{API}/latents", params={"min_density": str(low)}).json()
    assert some["total"] == int((density >= low).sum())


def test_nan_is_last_in_both_directions(folder: Path) -> None:
    column = np.load(folder / "explain/skew.npy")
    column[[3, 9]] = math.nan
    tiny.reseal_explanation(folder, skew=column)
    run = Run(folder)
    for descending in (False, True):
        assert set(run.order("skew", descending)[-2:].tolist()) >= {3, 9} or np.isnan(column).sum() > 2
        assert not np.isnan(column[run.order("skew", descending)[0]])


def test_the_table_works_without_javascript(client: TestClient) -> None:
    page = client.get("/latents").text
    (link,) = re.findall(r'href="(/latents\?sort=density[^"]*)"', page)
    assert client.get(link.replace("&amp;", "&")).status_code == 200
    (following,) = re.findall(r'rel="next" href="([^"]*)"', page)
    assert "2 of 2" in client.get(following.replace("&amp;", "&")).text


@pytest.mark.parametrize(
    "bad",
    [
        {"sort": "colour"}, {"order": "up"}, {"page": "0"}, {"page": "-1"}, {"page": "1e3"}, {"min_density": "much"},
        {"min_density": "nan"}, {"max_max": "inf"}, {"nonsense": "1"}, {"sort": "n2g_recall"}, {"min_probe_best": "1"},
    ],
)  # fmt: skip
def test_a_mistake_in_an_address_is_a_400_that_says_what(client: TestClient, bad: dict[str, str]) -> None:
    assert client.get("/latents", params=bad).status_code == 400
    answer = client.get(f"{API}/latents", params=bad)
    assert answer.status_code == 400
    assert next(iter(bad)).partition("_")[2] in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/latents/64", "/latents/-1", "/latents/1.5", "/latents/x", "/latents/99999999999999999999", "/nowhere",
        "/api/v1/", "/api/v1/latents/64", "/static/../server.py", "/static/%2e%2e/server.py",
        "/static/..%2f..%2fconfig.py",
        "/static//etc/passwd", "/static/%00", "/latents/3/../../../etc/passwd",
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_404_and_no_path_leads_out(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text and "import" not in answer.text


def test_text_of_a_corpus_is_shown_and_never_run(folder: Path, open_site: Callable[..., TestClient]) -> None:
    make_nasty(folder)
    client = open_site()
    clean = tags(client.get("/static/icon.svg").text)  # the parser works
    assert clean
    for path in (*PAGES, "/latents?q=script", "/latents?q=%3Cscript%3E", *(f"/latents/{i}" for i in range(20))):
        answer = client.get(path)
        assert answer.status_code == 200, path
        found = tags(answer.text)
        assert not [t for t in found if t[0] in ("img", "b2", "iframe") or any(a.startswith("on") for a in t[1])], path
        assert [t for t in found if t[0] == "script"] == [("script", ("src",)), ("script", ("type", "src"))], path
        assert "49" not in re.findall(r">(\d+)</i>", answer.text)
        for hidden in ("\u202e", "\u200b", "\x00", "\ud800", "\u2028"):
            assert hidden not in answer.text, path
        json.loads(client.get(f"{API}{path}").text) if path.startswith("/latents/") else None


def test_notes_are_kept_escaped_and_found(client: TestClient, folder: Path) -> None:
    for i, words in enumerate(NASTY[:8]):
        sent = client.post(f"/latents/{i}", data={"text": words.encode("utf-8", "replace").decode()})
        assert sent.status_code == 200  # after the redirect back
    assert Notes(folder / "notes.sqlite").of(0).text == NASTY[0]
    page = client.get("/latents/0").text
    assert "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page
    assert client.get(f"{API}/latents", params={"q": "alert(1)"}).json()["rows"][0]["latent"] == 0
    starred = client.put(f"{API}/latents/5/note", json={"starred": True})
    assert starred.json()["starred"] is True
    assert [r["latent"] for r in client.get(f"{API}/latents", params={"starred": "1"}).json()["rows"]] == [5]
    assert {n["latent"] for n in client.get(f"{API}/notes").json()["notes"]} == set(range(8))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": HOST, "host": "evil.example:8765"}, 403), ({"origin": HOST, "host": "127.0.0.1.evil.example"}, 403),
        ({"origin": HOST, "host": "[::1]:8765"}, 403), ({"origin": HOST, "content-type": "text/plain"}, 400),
    ],
)  # fmt: skip
def test_notes_are_taken_from_the_pages_themselves_only(folder: Path, headers: dict[str, str], status: int) -> None:
    client = TestClient(application(Site(folder)), HOST)
    answer = client.put(f"{API}/latents/1/note", content=b'{"text": "x"}', headers=headers)
    assert answer.status_code == status
    assert not (folder / "notes.sqlite").exists()


def test_reading_is_refused_to_other_hosts_and_origins(folder: Path) -> None:
    client = TestClient(application(Site(folder)), HOST)
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "localhost:8765"}).status_code == 200
    for headers in ({"host": "rebound.example"}, {"origin": "http://evil.example"}, {"host": "a@127.0.0.1.evil"}):
        assert client.get("/", headers=headers).status_code == 403
    assert client.get(f"{API}/run", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_nothing_is_written_without_an_origin_when_read_only_or_when_too_long(
    folder: Path, open_site: Callable[..., TestClient]
) -> None:
    bare = TestClient(application(Site(folder)), HOST)
    assert bare.put(f"{API}/latents/1/note", json={"text": "x"}).status_code == 403
    closed = open_site(read_only=True)
    assert closed.put(f"{API}/latents/1/note", json={"text": "x"}).status_code == 403
    assert closed.post("/latents/1", data={"text": "x"}).status_code == 403
    assert "<textarea" not in closed.get("/latents/1").text
    client = open_site()
    for body in ({"text": "x" * 20_001}, {"words": "x"}, {"text": 3}, {"starred": "yes"}, [1]):
        assert client.put(f"{API}/latents/1/note", json=body).status_code == 400
    assert client.put(f"{API}/latents/1/note", content=b"[" * 100_000).status_code == 400
    assert not (folder / "notes.sqlite").exists()


def test_a_large_body_is_refused_whether_or_not_it_says_so(client: TestClient) -> None:
    large = b"x" * (MAX_BODY_BYTES + 1)
    assert client.put(f"{API}/latents/1/note", content=large).status_code == 413
    assert client.put(f"{API}/latents/1/note", content=iter([large[: 1 << 19]] * 3)).status_code == 413
    assert client.put(f"{API}/latents/1/note", content=b"", headers={"content-length": "-1"}).status_code == 413


def test_words_are_searched_in_the_index(folder: Path, open_site: Callable[..., TestClient]) -> None:
    write_words(folder, {4: "the end of a story", 9: "a story of storms", 12: "numbers"})
    client = open_site()

    def hits(words: str) -> set[int]:
        return {row["latent"] for row in client.get(f"{API}/latents", params={"q": words}).json()["rows"]}

    assert hits("story") == {4, 9}
    assert hits("stor storms") == {9}
    assert hits("once upon") == {4, 9, 12}
    for odd in ('"', "NEAR(", "a* OR b", "-", "'", "^", "explanation:", "\x00", "(((", "AND"):
        assert client.get("/latents", params={"q": odd}).status_code == 200, odd
    assert client.get("/latents", params={"q": "12"}, follow_redirects=False).headers["location"] == "/latents/12"
    assert "a story of storms" in client.get("/latents/9").text


def test_the_run_is_read_again_when_a_stage_has_written(folder: Path, open_site: Callable[..., TestClient]) -> None:
    client = open_site()
    assert client.get(f"{API}/latents/4").json()["rule"] is None
    write_words(folder, {4: "a story"})
    assert client.get(f"{API}/latents/4").json()["explanation"] == "a story"


def test_a_run_that_breaks_stays_as_it_was_and_says_so(folder: Path, open_site: Callable[..., TestClient]) -> None:
    client = open_site()
    (folder / "eval.json").write_text("{")
    page = client.get("/")
    assert page.status_code == 200 and "eval.json is not valid JSON" in page.text and "normalized_mse" in page.text
    (folder / "eval.json").unlink()
    manifest = json.loads((folder / "explain/manifest.json").read_text())
    tiny.reseal(folder / "explain/manifest.json", {**manifest, "n_latents": 63})
    assert "is of another autoencoder (n_latents)" in client.get("/").text
    with pytest.raises(ValueError, match="holds no autoencoder"):
        Site(folder / "explain")


def test_the_command_serves_until_it_is_told_to_stop(folder: Path) -> None:
    command = [sys.executable, "-m", "monosem", "serve", str(folder), "--read-only", "--port"]
    with subprocess.Popen([*command, "0"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = server.stderr.readline().split()[1]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/latents/3", timeout=120) as answer:
            assert b"Latent 3" in answer.read()
        taken = subprocess.run([*command, address.rpartition(":")[2]], capture_output=True, text=True, timeout=300)
        assert taken.returncode == 2 and "choose another with --port" in taken.stderr
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=120) in (0, 130)


def test_marks_say_where_the_rule_is_right(folder: Path) -> None:
    write_words(folder, {4: "a story"})
    run = Run(folder)
    view = latent.view(run, 4)
    assert view["rule"][0]["activation"] == 1.5
    assert [s["special"] for s in view["rule"][1]["steps"]] == [True, True, False]
    first = run.explanation.manifest["first_position"] if run.explanation else 0
    for example in view["examples"]["top"]:
        for at in range(first, len(example["tokens"])):
            fires = example["activations"][at] > FIRED_THRESHOLD
            assert (example["marks"][at] in ("hit", "miss")) == fires
        assert example["marks"][:first] == [""] * first
    assert view["examples"]["top"][0]["marks"][view["examples"]["top"][0]["position"]] == "hit"


STEPS = st.one_of(st.integers(0, 4), st.just(n2g.ANY))
PATTERNS = st.builds(
    lambda steps, start: (*steps, n2g.START) if start else tuple(steps),
    st.lists(STEPS, min_size=1, max_size=4),
    st.booleans(),
)


@given(
    st.dictionaries(PATTERNS, st.floats(0.5, 4, width=32), max_size=6),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
def test_predict_is_that_of_n2g(rule: dict[tuple[int, ...], float], tokens: list[int]) -> None:
    assert latent.predict(rule, tokens) == n2g.predict(rule, torch.tensor([tokens]))[0].tolist()


def test_the_threshold_is_that_of_types() -> None:
    from monosem import types

    assert types.FIRED_THRESHOLD == FIRED_THRESHOLD and (latent.ANY, latent.START) == (n2g.ANY, n2g.START)


def test_neighbours_on_the_page_follow_the_table(client: TestClient) -> None:
    query = {"sort": "max", "order": "desc"}
    order = [row["latent"] for row in client.get(f"{API}/latents", params=query).json()["rows"]]
    page = client.get(f"/latents/{order[3]}", params=query).text
    assert f'id="next" rel="next" href="/latents/{order[4]}?sort=max&amp;order=desc"' in page
    assert f'id="previous" rel="prev" href="/latents/{order[2]}?' in page
    assert "4 of 64" in page


def test_random_leads_to_a_latent_that_fires(client: TestClient, folder: Path) -> None:
    density = np.load(folder / "explain/density.npy")
    for _ in range(5):
        where = client.get("/latents/random", follow_redirects=False).headers["location"]
        assert density[int(where.rpartition("/")[2])] > 0


def test_the_map_counts_every_latent_that_fires_once(client: TestClient, folder: Path) -> None:
    density, largest = (np.load(folder / f"explain/{name}.npy") for name in ("density", "max"))
    found = client.get(f"{API}/map", params={"colour": "max"}).json()
    assert np.sum(found["n"]) == ((density > 0) & (largest > 0)).sum()
    filled = np.array(found["n"]) > 0
    assert (np.array([[v is not None for v in row] for row in found["mean"]]) == filled).all()
    assert client.get(f"{API}/map", params={"colour": "nonsense"}).status_code == 400


def test_the_openapi_document_names_every_address_of_the_api(client: TestClient) -> None:
    document = client.get(f"{API}/openapi.json").json()
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    ours = {(e.path.removeprefix(API), e.method) for e in ENDPOINTS if e.path.startswith(API)}
    assert described == ours
    for path, method in ours:
        if method == "GET":
            assert client.get(API + path.format(latent=1)).status_code == 200


def test_scaling_shows_a_laboratory_where_there_is_one(open_site: Callable[..., TestClient]) -> None:
    (found,) = (Path(__file__).parent.parent / "results").glob("*/lab/joint")
    client = open_site(scaling=found)
    page = client.get("/scaling").text
    assert "L(N,K | D)" in page and "holds" in page
    assert {f["name"] for f in client.get(f"{API}/figures").json()["figures"]} >= {"n", "k", "tokens"}
    assert "monosem scale" in open_site().get("/scaling").text


@given(st.text())
def test_visible_leaves_nothing_hidden_and_all_ink(words: str) -> None:
    shown = text.visible(words)
    shown.encode("utf-8")
    assert "\n" not in shown and shown.replace("\N{SOFT HYPHEN}", "").isprintable()
    assert text.visible("plain words, é ü") == "plain words, é ü"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1,234,567"), (0.00001234, "1.23e−05"), (0.1234, "0.123"), (-2.5, "−2.50"), (None, "–")],
)
def test_number(value: float | None, shown: str) -> None:
    assert text.number(value) == shown
    assert text.number(math.nan) == "–" and text.percent(0.00126) == "0.126%"


@pytest.mark.parametrize(
    ("low", "high", "digits"),
    [(1.0, 2.0, 3), (32.0, 32.0, 3), (31.9996, 32.0, 6), (0.12, 0.12001, 5), (1.0, 1 + 1e-9, 7)],
)
def test_an_interval_is_shown_with_digits_that_tell_its_ends_apart(low: float, high: float, digits: int) -> None:
    assert text.digits_of(low, high) == digits


def test_a_rule_says_how_often_any_token_follows_another(folder: Path) -> None:
    ((steps, _),) = (p.values() for p in latent._shown(Run(folder), {(7, -1, -1, -1, 8, -1, -2): 1.0}))
    words = [text.token(Run(folder).token(t)) for t in (8, 7)]
    assert [s["text"] for s in steps] == ["start", "any", words[0], "any ×3", words[1]]
    assert [s["special"] for s in steps] == [True, True, False, True, False]


def test_a_number_that_is_0_of_0_is_not_said_to_be_missing(folder: Path) -> None:
    for name in ("n2g_recall", "n2g_density"):
        column = np.full(N_LATENTS, np.nan, np.float32)
        column[5] = 0 if name == "n2g_density" else np.nan
        tiny.reseal_explanation(folder, **{name: column})
    for i, said in ((5, "0 of 0"), (6, None)):
        (recall,) = (s for s in latent.statistics(Run(folder), i) if s["name"] == "n2g_recall")
        assert recall["undefined"] == said and (recall["command"] is None) == (said is not None)


def test_plotly_is_served_from_the_installed_package(client: TestClient) -> None:
    answer = client.get("/static/plotly.min.js")
    assert answer.status_code == 200 and "plotly.js v" in answer.text[:200]
    assert web.plotly_file() is not None


def test_many_matches_come_by_number_and_few_by_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_words(folder, {latent: "story " * (1 + latent % 3) for latent in range(12)})
    run = Run(folder)
    found = search.matching(run, "sto")
    assert found.order == "best match first" and sorted(found.latents.tolist()) == list(range(12))
    assert found.latents.tolist() != list(range(12))
    monkeypatch.setattr(search, "MOST_RANKED", 5)
    assert search.matching(run, "sto").latents.tolist() == list(range(12))
    assert search.matching(run, "st").latents.tolist() == []


def tags(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Name and attributes' names of every element of a page."""
    found: list[tuple[str, tuple[str, ...]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, tuple(name for name, _ in attrs)))

    Reader().feed(page)
    return found
