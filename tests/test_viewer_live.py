"""The pages that try texts and compare two runs: their API, what it refuses, and matches as brute force finds them."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import tiny
from monosem.artifacts import read_json
from monosem.config import ExplainConfig, TrainConfig
from monosem.explanations.entry import explain
from monosem.model import Autoencoder
from monosem.training import train
from monosem.viewer import compare, matches, trying
from monosem.viewer.reading import Run
from monosem.viewer.server import application
from monosem.viewer.web import API, Site
from viewer_runs import NASTY, make_nasty, tiny_run

HOST = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs on one store: `one` and `two` explained on the same tokens, `bare` a weights' copy."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_run(folder / "one", tiny_model, tiny_corpus)
    settings = {"store": str(folder / "one/store"), "k": 4, "n_tokens": 3000, "batch_size": 100}
    train(TrainConfig(out=str(folder / "two"), n_latents=48, seed=1, **settings))  # type: ignore[arg-type]
    explain(ExplainConfig(run=str(folder / "two"), n2g=0, ablations=0, device="cpu"))
    shutil.copytree(folder / "one/autoencoder", folder / "bare/autoencoder")
    return folder


@pytest.fixture
def client(runs: Path) -> TestClient:
    return opened(runs / "one")


def opened(folder: Path, **options: Any) -> TestClient:
    return TestClient(application(Site(folder, **options)), HOST, headers={"origin": HOST})


def error(client: TestClient, path: str, sent: Any) -> tuple[int, str]:
    answer = client.post(f"{API}/{path}", json=sent)
    return answer.status_code, answer.json().get("error", "")


def test_a_text_is_tried_and_its_latents_are_told_about(client: TestClient, runs: Path) -> None:
    facts = client.get(f"{API}/try").json()
    assert facts["n_latents"] == 64 and facts["first_position"] == 1 and facts["context_length"] == 16
    sent = {"text": "the story\nof a town", "edits": [{"latent": 3, "kind": "boost", "value": 2}], "watch": [5], "k": 6}
    found = client.post(f"{API}/try", json=sent).json()
    assert "".join(row["shown"] for row in found["tokens"][1:]) == "the story↵of a town"
    listed = [i for i, _ in found["tokens"][found["position"]]["latents"]]
    assert found["position"] == len(found["tokens"]) - 1 and 0 < len(listed) <= 6
    assert set(found["about"]) == {str(i) for i in [*listed, 3, 5]} and set(found["watch"]) == {"5"}
    fires_on = Run(runs / "one").peak_tokens(np.array([3]), 20)[0][: trying.N_FIRES_ON]
    assert found["about"]["3"] == {"fires_on": fires_on, "explanation": None}
    sent = {"text": "the story", "n_continue": 4, "edits": [{"latent": 3, "kind": "ablate"}]}
    assert set(client.post(f"{API}/try", json=sent).json()["continuation"]) == {
        "original",
        "edited",
        "n_tokens",
        "seed",
    }


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "text is missing"),
        ({"text": 3}, "text is missing or no text"),
        ({"text": ""}, "the text is empty"),
        ({"text": "a", "colour": "red"}, "no field colour; there are: text, k"),
        ({"text": "a", "k": 1.5}, "k is 1.5; give a whole number"),
        ({"text": "a", "k": True}, "k is True"),
        ({"text": "a", "k": -1}, "k is -1"),
        ({"text": "a", "k": 10**30}, "k is 1000"),
        ({"text": "a", "k": 65}, "from 1 to 64"),
        ({"text": "a", "threshold": "x"}, "threshold is 'x'; give a number"),
        ({"text": "a", "edits": {}}, ""),
        ({"text": "a", "edits": "x"}, "edits is no list"),
        ({"text": "a", "edits": [3]}, "edits is no list of objects"),
        ({"text": "a", "edits": [{"latent": "1", "kind": "ablate"}]}, "the latent of an edit is '1'"),
        ({"text": "a", "edits": [{"latent": 1, "kind": ["ablate"]}]}, "choose ablate, boost, clamp"),
        ({"text": "a", "edits": [{"latent": 64, "kind": "ablate"}]}, "latents 0 to 63"),
        ({"text": "a", "watch": 3}, "watch is no list"),
        ({"text": "a", "watch": [None]}, "watch is None"),
        ({"text": "a", "position": 9}, "position is 9"),
        ({"text": "x" * 5000}, "give at most 127"),
        ([], "not a JSON object"),
    ],
)
def test_what_cannot_be_tried_is_refused_in_words(client: TestClient, sent: Any, message: str) -> None:
    status, reason = error(client, "try", sent)
    assert (status == 400 and message in reason) or (message == "" and status == 200), reason


def test_numbers_that_are_none_are_refused(client: TestClient) -> None:
    for value in ("NaN", "Infinity", "1e999"):
        body = f'{{"text": "a", "threshold": {value}}}'
        answer = client.post(f"{API}/try", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_a_table_is_tried_or_refused_in_words(client: TestClient) -> None:
    rows = [f"{word} was seen near {i * 7919 % 97} houses,{word}" for i in range(30) for word in ("the", "in")]
    found = client.post(f"{API}/try/labelled", json={"table": "\n".join(["text,label", *rows])}).json()
    assert found["labels"] == ["in", "the"] and str(found["best"][0]["latent"]) in found["about"]
    assert error(client, "try/labelled", {"table": "a,b\n1,2"}) == (
        400, "the table, line 2 has only a, b and no column 'text'; every row needs 'text' and 'label'",
    )  # fmt: skip
    for sent in ({}, {"table": 3}, {"table": "", "more": 1}):
        assert "send table" in error(client, "try/labelled", sent)[1]
    assert "seed is -1" in error(client, "try/labelled", {"table": "", "seed": -1})[1]


def test_a_body_that_is_too_large_or_from_elsewhere_is_refused(client: TestClient) -> None:
    assert client.post(f"{API}/try", json={"text": "a" * (1 << 20)}).status_code == 413
    elsewhere = client.post(f"{API}/try", json={"text": "a"}, headers={"origin": "http://example.org"})
    assert elsewhere.status_code == 403


def test_texts_wait_for_their_turn_and_not_too_many(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client.get(f"{API}/try")
    monkeypatch.setattr(trying, "_WAITING", threading.BoundedSemaphore(2))
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(client.post(f"{API}/try", json={"text": "the story"}).status_code)

    with trying._MODEL:
        waiting = [threading.Thread(target=ask) for _ in range(3)]
        for thread in waiting:
            thread.start()
        while not statuses:
            time.sleep(0.01)
        assert statuses == [503]
    for thread in waiting:
        thread.join(timeout=120)
    assert statuses == [503, 200, 200]


def test_a_run_without_its_subject_says_so_and_its_page_stays(runs: Path, tmp_path: Path) -> None:
    autoencoder = Autoencoder.load(runs / "one/autoencoder")
    autoencoder.provenance["site"]["model"] = str(tmp_path / "gone")
    autoencoder.save(tmp_path / "run/autoencoder")
    client = opened(tmp_path / "run")
    answer = client.get(f"{API}/try")
    assert answer.status_code == 503 and "gone" in answer.json()["error"]
    assert client.get("/try").status_code == 200


def test_a_nasty_vocabulary_stays_text(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "one", tmp_path / "<b>run", ignore=shutil.ignore_patterns("store", "state")))
    make_nasty(folder)
    shutil.copytree(runs / "two", tmp_path / '"><script>', ignore=shutil.ignore_patterns("state"))
    client = opened(folder)
    for path in ("/try?text=<script>alert(1)</script>", "/compare", '/compare?with="><script>'):
        answer = client.get(path)
        assert answer.status_code == 200
        for text in ("<script>alert", "<img src=x", "<b>run", '"><script>', "\u202e"):
            assert text not in answer.text
    for text in NASTY:
        sent = json.dumps({"text": text[:40]}), {"content-type": "application/json"}
        assert client.post(f"{API}/try", content=sent[0], headers=sent[1]).status_code == 200


def test_runs_to_compare_with_are_those_given_and_those_beside(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bare", tmp_path / "two")
    found = compare.others(Site(runs / "one", others=[tmp_path / "two"]))
    assert found == {"two": tmp_path / "two", "bare": runs / "bare", f"two in {runs}": runs / "two"}
    page = opened(runs / "one").get("/compare")
    assert page.status_code == 200 and ">two · 48 latents<" in page.text.replace("\n", "")
    alone = opened(Path(shutil.copytree(runs / "bare", tmp_path / "a/alone")))
    assert "There is no other run" in alone.get("/compare").text


@pytest.mark.parametrize("name", ["../two", "/etc", "one", "two/", "two\x00", "%2e%2e/two", "two/autoencoder"])
def test_only_names_of_runs_are_opened(client: TestClient, name: str) -> None:
    for path in ("/compare", f"{API}/compare"):
        assert client.get(path, params={"with": name}).status_code == 404


def test_two_runs_side_by_side(client: TestClient, runs: Path) -> None:
    found = client.get(f"{API}/compare", params={"with": "two"}).json()
    weights = [Autoencoder.load(runs / name / "autoencoder").weights.decoder.numpy() for name in ("one", "two")]
    cosine = unit(weights[0]) @ unit(weights[1]).T
    assert found["summary"]["a"]["n_matched"] == (cosine.max(1) >= compare.MATCHED).sum()
    assert sum(found["summary"]["b"]["histogram"]) == 48 and found["unlike"] is None
    best = found["table"]["rows"][0]
    assert best["cosine"] == pytest.approx(cosine.max(), abs=1e-5) and best["mutual"]
    assert (best["latent"], best["match"]) == np.unravel_index(cosine.argmax(), cosine.shape)
    by_name = {row["name"]: row for section in found["metrics"] for row in section["rows"]}
    report = read_json(runs / "one/eval.json")["metrics"]["normalized_mse"]
    assert by_name["normalized_mse"]["a"] == report and by_name["normalized_mse"]["b"] is None
    page = client.get("/compare", params={"with": "two", "side": "b", "show": "alone", "order": "cosine"})
    assert page.status_code == 200 and "monosem eval" in page.text
    for wrong in ({"side": "c"}, {"show": "x"}, {"order": "x"}, {"page": "-1"}, {"page": "²"}):
        assert client.get(f"{API}/compare", params={"with": "two", **wrong}).status_code == 400


def test_a_copy_is_matched_with_itself(client: TestClient) -> None:
    found = client.get(f"{API}/compare", params={"with": "bare"}).json()
    assert found["summary"]["n_mutual_matched"] == 64
    assert all(row["match"] == row["latent"] for row in found["table"]["rows"])
    assert found["summary"]["together"]["text"] == "bare has no explanation"
    command = found["summary"]["together"]["command"]
    assert f"<code>{command}</code>" in client.get("/compare", params={"with": "bare"}).text
    assert command.startswith("monosem explain /")


def test_other_sites_are_not_compared(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bare", tmp_path / "elsewhere")
    path = tmp_path / "elsewhere/autoencoder/config.json"
    config = read_json(path)
    config["provenance"]["site"]["layer"] += 1
    tiny.reseal(path, config)
    client = opened(runs / "one", others=[tmp_path / "elsewhere"])
    found = client.get(f"{API}/compare", params={"with": "elsewhere"}).json()
    assert "different sites" in found["unlike"] and found["table"] is None
    assert "different sites" in client.get("/compare?with=elsewhere").text


def test_the_page_waits_for_a_long_comparison(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, usual = threading.Event(), matches.match
    monkeypatch.setattr(matches, "_FOUND", {})

    def slow(a: Run, b: Run, *, keep: bool, at: Any) -> Any:
        at(0.25)
        return usual(a, b, keep=keep, at=at) if hold.wait(120) else None

    monkeypatch.setattr(matches, "match", slow)
    page = client.get("/compare?with=two")
    assert 'id="compare-waiting"' in page.text
    found = client.get(f"{API}/compare?with=two&wait=0").json()
    assert found["table"] is None and found["done"] == 0.25
    hold.set()
    assert client.get(f"{API}/compare?with=two").json()["done"] == 1
    assert 'id="compare-waiting"' not in client.get("/compare?with=two").text


@pytest.fixture
def kept(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `one` whose matches with `two` are on disk."""
    monkeypatch.setattr(matches, "KEPT_FROM", 0)
    folder = Path(shutil.copytree(runs / "one", tmp_path / "one", ignore=shutil.ignore_patterns("store", "state")))
    matches.match(Run(folder), Run(runs / "two"), keep=True)
    return folder


def test_matches_of_large_pairs_are_kept(kept: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(file.name for file in (kept / "compare").iterdir())
    sha256 = read_json(runs / "two/autoencoder/config.json")["weights_sha256"]
    assert files == [f"{sha256[:16]}-{part}.safetensors" for part in ("directions", "together")]
    a, b = Run(kept), Run(runs / "two")
    computed = matches.match(Run(runs / "one"), b)
    for name in ("best_cosines", "best_together"):
        monkeypatch.setattr(matches, name, lambda *given: pytest.fail("computed again"))
    found = matches.match(a, b, keep=True)
    assert found.chance == computed.chance and found.together is not None and computed.together is not None
    for one, other in zip((*found.cosine, *found.together), (*computed.cosine, *computed.together), strict=True):
        assert np.array_equal(one.latent, other.latent) and np.array_equal(one.score, other.score)


@pytest.mark.parametrize("change", ["weights", "tokens", "cut", "damaged"])
def test_kept_matches_of_something_else_are_not_taken(
    change: str, kept: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = (kept / "compare").glob("*-directions*")
    if change == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif change == "weights":
        other = Autoencoder.load(kept / "autoencoder")
        other.weights.decoder.neg_()
        other.save(kept / "autoencoder")
    else:
        manifest = kept / "explain/manifest.json"
        tiny.reseal(manifest, read_json(manifest) | {"n_tokens": 77})
    computed: list[str] = []

    def watched(name: str, usual: Any) -> Any:
        def call(*given: Any) -> Any:
            computed.append(name)
            return usual(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("best_cosines", "best_together"):
            patch.setattr(matches, name, watched(name, getattr(matches, name)))
        found = matches.match(Run(kept), Run(runs / "two"))
    assert ("best_cosines" in computed) == (change != "tokens")
    assert ("best_together" in computed) == (change == "weights")
    assert (found.together is None) == (change == "tokens")
    assert ("its matches are computed again" in caplog.text) == (change in ("cut", "damaged"))


def test_nothing_is_kept_of_small_pairs_or_read_only(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(runs / "one", tmp_path / "one", ignore=shutil.ignore_patterns("store", "state")))
    assert opened(folder, others=[runs / "two"]).get(f"{API}/compare?with=two").status_code == 200
    monkeypatch.setattr(matches, "KEPT_FROM", 0)
    monkeypatch.setattr(matches, "_FOUND", {})
    client = opened(folder, others=[runs / "two"], read_only=True)
    assert client.get(f"{API}/compare?with=two").json()["summary"]["together"] is None
    assert not (folder / "compare").exists()


def test_latents_that_fire_together_are_those_of_the_examples(runs: Path) -> None:
    one, two = Run(runs / "one"), Run(runs / "two")
    sets = [tokens_of(run) for run in (one, two)]
    found = matches.match(one, two).together
    assert found is not None
    for latent in range(64):
        scores = [jaccard(sets[0][latent], other) for other in sets[1]]
        assert found[0].score[latent] == pytest.approx(max(scores), abs=1e-6)


def test_a_decoder_that_is_cut_short_is_named(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "bare", tmp_path / "bare"))
    path = folder / "autoencoder/autoencoder.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-9000], whole[:50], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"autoencoder\.safetensors .*; restore it from a copy"):
            matches.match(Run(folder), Run(runs / "two"))


def tokens_of(run: Run) -> list[set[Any]]:
    """For each latent the addresses (document, position, place) of the tokens on which it is active in its examples."""
    names = ("top_context", "top_activations", "contexts_document", "contexts_position")
    context, activations, document, position = (np.load(run.folder / f"explain/{name}.npy") for name in names)
    found: list[set[Any]] = [set() for _ in context]
    for latent, example, place in zip(*np.nonzero(activations), strict=True):
        row = context[latent, example]
        found[latent].add((document[row].tobytes(), position[row].tobytes(), place))
    return found


def jaccard(a: set[Any], b: set[Any]) -> float:
    both = len(a & b)
    return both / len(a | b) if both >= matches.MIN_TOGETHER else 0.0


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(matches, "_ROWS_AT_ONCE", 5)
    yield


@pytest.mark.usefixtures("small_chunks")
@given(n_a=st.integers(1, 17), n_b=st.integers(1, 17), seed=st.integers(0, 99))
def test_best_cosines_are_those_of_brute_force(n_a: int, n_b: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((n, 3), dtype=np.float32) * rng.uniform(0.1, 9) for n in (n_a, n_b))
    cosine = unit(a) @ unit(b).T
    for one, full in zip(matches.best_cosines(a, b), (cosine, cosine.T), strict=True):
        assert np.allclose(one.score, full.max(1), atol=1e-5)
        assert np.allclose(full[np.arange(len(full)), one.latent], full.max(1), atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@given(n_a=st.integers(1, 12), n_b=st.integers(1, 12), seed=st.integers(0, 99), share=st.floats(0.05, 0.9))
def test_best_together_is_that_of_brute_force(n_a: int, n_b: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    active = [rng.random((40, n)) < share for n in (n_a, n_b)]
    found = matches.best_together(parts_of(active[0]), parts_of(active[1]), n_a, n_b, 40)
    sets = [[set(np.flatnonzero(column)) for column in x.T] for x in active]
    for one, own, other in ((found[0], sets[0], sets[1]), (found[1], sets[1], sets[0])):
        for latent, mine in enumerate(own):
            scores = [jaccard(mine, theirs) for theirs in other]
            assert one.score[latent] == pytest.approx(max(scores), abs=1e-6)
            assert one.latent[latent] == (scores.index(max(scores)) if max(scores) else -1)


def parts_of(active: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, latents) where active, three latents a part."""
    tokens, latents = np.nonzero(active)
    return [(tokens[latents // 3 == part], latents[latents // 3 == part]) for part in range(active.shape[1] // 3 + 1)]


def test_the_pages_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; import monosem.viewer.server; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert json.dumps(trying._SCHEMA)
