"""The viewer where files change, go or are damaged under it, and where an address or a body has odd numbers in it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from starlette.testclient import TestClient

from monosem.viewer import files, trying, web
from monosem.viewer.files import Rows, Unavailable
from monosem.viewer.notes import Notes
from monosem.viewer.reading import Run
from monosem.viewer.server import application
from monosem.viewer.web import API, Site
from viewer_runs import tiny_run, write_words

HOST = "http://127.0.0.1:8765"
PAGES = (
    "/",
    "/latents",
    "/latents?q=the&starred=1",
    "/latents/3?sort=max&q=the",
    "/latents/random",
    "/try",
    "/scaling",
)
DATA = ("run", "map?colour=max", "latents?sort=density", "latents/3", "notes", "figures")
ADDRESSES = (*PAGES, *(f"{API}/{name}" for name in DATA))
LONG = "9" * 5000


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run(tmp_path_factory.mktemp("viewed") / "run", tiny_model, tiny_corpus)
    Notes(folder / "notes.sqlite").write(3, text="a note on the third", starred=True)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "runs/run", ignore=shutil.ignore_patterns("store", "state")))


def opened(folder: Path, **options: Any) -> TestClient:
    return TestClient(
        application(Site(folder, **options)), HOST, headers={"origin": HOST}, raise_server_exceptions=False
    )


def column(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: change(run / f"explain/{name}.npy")


def overwrite(path: Path) -> None:
    """As an editor would, in place."""
    array = np.load(path)
    path.write_bytes(path.read_bytes()[: -array.nbytes] + bytes(array.nbytes))


def into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fewer_rows(path: Path) -> None:
    np.save(path, np.load(path)[:9])


def execute(name: str, *statements: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        file = sqlite3.connect(run / name)
        with file:
            for statement in statements:
                file.execute(statement)
        file.close()

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "explanation removed": lambda run: shutil.rmtree(run / "explain"),
    "column deleted": column("top_context", Path.unlink),
    "column of numbers deleted": column("density", Path.unlink),
    "column cut": column("contexts", lambda path: os.truncate(path, 300)),
    "column cut to its header": column("lens_up", lambda path: os.truncate(path, 128)),
    "column emptied": column("top_activations", lambda path: os.truncate(path, 0)),
    "column with fewer rows": column("top_position", fewer_rows),
    "column overwritten": column("decoder_neighbours", overwrite),
    "column that is a folder": column("histogram", into_a_folder),
    "vocabulary deleted": lambda run: (run / "explain/vocabulary.json").unlink(),
    "vocabulary of another shape": lambda run: (run / "explain/vocabulary.json").write_text('{"a": 1}'),
    "words deleted": lambda run: (run / "explain/words.sqlite").unlink(),
    "words emptied": lambda run: os.truncate(run / "explain/words.sqlite", 0),
    "words cut": lambda run: os.truncate(run / "explain/words.sqlite", 5000),
    "words that are bytes": execute("explain/words.sqlite", "UPDATE latents SET explanation = x'ff00'"),
    "rules that are no rules": execute("explain/words.sqlite", "UPDATE latents SET n2g_rule = '[[[null], 1]]'"),
    "rules that are no JSON": execute("explain/words.sqlite", "UPDATE latents SET n2g_rule = '[['"),
    "notes that are something else": lambda run: (run / "notes.sqlite").write_bytes(b"notes" * 999),
    "notes that are a folder": lambda run: into_a_folder(run / "notes.sqlite"),
    "notes of other types": execute("notes.sqlite", "UPDATE notes SET text = x'00ff'"),
    "notes on latents that are not there": execute("notes.sqlite", "UPDATE notes SET latent = -7"),
    "evaluation deleted": lambda run: (run / "eval.json").unlink(),
    "evaluation nested deep": lambda run: (run / "eval.json").write_text("[" * 100_000),
    "autoencoder deleted": lambda run: shutil.rmtree(run / "autoencoder"),
    "autoencoder half deleted": lambda run: (run / "autoencoder/config.json").unlink(),
    "run moved": lambda run: run.rename(run.parent / "moved"),
    "everything deleted": lambda run: shutil.rmtree(run.parent),
}  # fmt: skip


@pytest.mark.parametrize("warm", [False, True], ids=["unread", "read before"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_is_a_503_with_the_reason_and_the_pages_stay(folder: Path, name: str, warm: bool) -> None:
    client, copy = opened(folder), folder.parent.parent / "copy"
    before = {address: client.get(address).status_code for address in ADDRESSES if warm}
    shutil.copytree(folder, copy)
    CHANGES[name](folder)
    for address in ADDRESSES:
        answer = client.get(address, follow_redirects=False)
        assert answer.status_code in (200, 307, 400, 503), (address, answer.text)
        if answer.status_code == 503:
            assert str(folder) in answer.text and "; " in answer.text, answer.text
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(copy, folder)
    after = {address: client.get(address).status_code for address in ADDRESSES}
    assert set(after.values()) == {200} and (not warm or before == after)


def test_a_locked_database_is_a_503(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WAIT_S", 0.01)
    for name, address in (("explain/words.sqlite", "latents?q=the"), ("notes.sqlite", "notes")):
        client = opened(folder)
        other = sqlite3.connect(folder / name, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        answer = client.get(f"{API}/{address}")
        other.close()
        assert answer.status_code == 503 and "is locked" in answer.json()["error"] and name in answer.json()["error"]
        assert client.get(f"{API}/{address}").status_code == 200


@pytest.mark.parametrize("place", ["a folder", "a file of something else"])
def test_a_note_that_cannot_be_written_is_a_503_and_the_page_stays(folder: Path, place: str) -> None:
    (folder / "notes.sqlite").unlink()
    if place == "a folder":
        (folder / "notes.sqlite").mkdir()
    else:
        (folder / "notes.sqlite").write_bytes(b"x" * 5000)
    client = opened(folder)
    answer = client.put(f"{API}/latents/1/note", json={"text": "x"})
    assert answer.status_code == 503 and "notes.sqlite" in answer.json()["error"]
    assert "nothing was kept" in answer.json()["error"]
    assert client.get("/scaling").status_code == 200


def test_a_run_explained_anew_is_shown_as_it_is_now(folder: Path) -> None:
    client = opened(folder)
    before = client.get(f"{API}/latents/3").json()
    assert before["explanation"] != "another"
    write_words(folder, {3: "another"})
    assert client.get(f"{API}/latents/3").json()["explanation"] == "another"


def test_a_request_during_a_change_is_answered_of_the_run_as_it_then_is(folder: Path) -> None:
    site = Site(folder)
    changes = [lambda: write_words(folder, {3: "once"}), lambda: write_words(folder, {3: "twice"})]

    def answer(site: Site, request: Any) -> dict[str, Any]:
        if changes:
            changes.pop()()
            raise KeyError("half of one run, half of another")
        return {"read": 1}

    class Asked:
        method = "GET"

    endpoint = web.Endpoint("/x", answer)
    with pytest.raises(Unavailable, match="is being written to; load the page again"):
        web._answered(site, endpoint, Asked())  # type: ignore[arg-type]
    assert web._answered(site, endpoint, Asked()) == {"read": 1}  # type: ignore[arg-type]
    changes.append(lambda: None)
    with pytest.raises(KeyError):  # nothing changed, so it is our fault and not hidden
        web._answered(site, endpoint, Asked())  # type: ignore[arg-type]


def test_rows_are_those_of_numpy(tmp_path: Path) -> None:
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    np.save(tmp_path / "a.npy", array)
    rows = Rows(np.load(tmp_path / "a.npy", mmap_mode="r"))
    both, at = np.array([[3, 0], [3, 1]]), np.array([[0, 4], [2, 2]])
    for index in (2, -1, slice(None), slice(1, 9), slice(3, 1), slice(0, 4, 2), both, both[:, 0], np.array([], int),
                  (1, 2), (both, at), (both[0], slice(2)), (3, slice(1, 3), 0)):  # fmt: skip
        assert np.array_equal(rows[index], array[index]), index
    for index in (4, -5, np.array([0, 4])):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize("value", [LONG, f"1e{LONG}", "\u0663" * 3000, "\x00" * 3000, "\udcff"])
def test_an_odd_number_in_the_query_is_not_our_fault(client: TestClient, value: str) -> None:
    for name in ("q", "sort", "page", "order", "starred", "min_density", "max_max", "x" * 3000):
        for path in ("/latents", f"{API}/latents"):
            answer = client.get(f"{path}?{name}={quote(value, errors='surrogatepass')}")
            assert answer.status_code in (200, 400)
            assert len(answer.text) < 200_000 and (answer.status_code == 200 or name[:400] in answer.text)


@pytest.fixture(scope="module")
def client(whole: Path) -> TestClient:
    return opened(whole)


@pytest.mark.parametrize("path", [f"/latents/{LONG}", f"{API}/latents/{LONG}", "/latents/3%00", "/latents/%D9%A3"])
def test_a_latent_of_no_number_is_not_there(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and "there is no latent" in answer.text


def test_other_methods_lengths_and_bodies_are_refused(client: TestClient) -> None:
    for method, path in (("DELETE", "/latents/3"), ("TRACE", "/"), ("FOO", "/"), ("POST", "/static/main.js")):
        assert client.request(method, path).status_code == 405
    note, kind = f"{API}/latents/3/note", {"content-type": "application/json"}
    assert client.put(note, content=b"x", headers={"content-length": LONG}).status_code == 413
    for body in (b"", b"\xff\xfe", b'{"text": ' + LONG.encode() + b"}", b'{"text": 1e999}', b"[" * 100_000):
        assert client.put(note, content=body, headers=kind).status_code == 400
    assert client.post("/latents/3", content=b"&&==&text=%ff", headers={"content-type": "x/y"}).status_code == 400
    assert client.post("/latents/3", files={"text": b"x"}).status_code == 400


def test_a_number_too_large_to_compute_with_is_refused(client: TestClient) -> None:
    for number in ("1e308", "-1e308", "3.5e38", "9" * 400, LONG, "1e999", "-Infinity", "NaN"):
        for what in ("threshold", "boost", "clamp"):
            edit = f'"edits": [{{"latent": 3, "kind": "{what}", "value": {number}}}]'
            body = '{"text": "a b c", ' + (edit if what != "threshold" else f'"threshold": {number}') + "}"
            answer = client.post(f"{API}/try", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]


def test_a_large_edit_is_computed_or_refused_with_the_reason(client: TestClient) -> None:
    tokens = client.post(f"{API}/try", json={"text": "a b c"}).json()["tokens"]
    activation, latent = max((z, i) for row in tokens for i, z in row["latents"])
    assert activation > 1.1  # times the largest of numbers, more than that
    statuses = set()
    for value in (3.4e38, -3.4e38, 1e20, 1e-320, 0):
        for kind in ("boost", "clamp"):
            sent = {"text": "a b c", "edits": [{"latent": latent, "kind": kind, "value": value}], "n_continue": 3}
            answer = client.post(f"{API}/try", json=sent)
            statuses.add(answer.status_code)
            assert answer.status_code == 200 or "too large" in answer.json()["error"]
    assert statuses == {200, 400}


def test_a_subject_that_has_moved_is_a_503(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "_loaded", trying._loaded.__wrapped__)
    (folder / "autoencoder/autoencoder.safetensors").write_bytes(b"x" * 100)
    answer = opened(folder).get(f"{API}/try")
    assert answer.status_code == 503 and "autoencoder.safetensors" in answer.json()["error"]


def test_a_run_can_be_opened_again_once_it_is_whole(folder: Path) -> None:
    config = folder / "autoencoder/config.json"
    said = config.read_text()
    config.write_text("{")
    with pytest.raises(Unavailable, match=r"config\.json is not valid JSON"):
        Run(folder)
    config.write_text(said)
    assert Run(folder).n_latents == 64
