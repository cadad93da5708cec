"""Language-model judges: on planted latents with judges that know, and behind a stub endpoint on loopback."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from monosem.evals import explainability, judges
from monosem.evals.explainability import Fired, Scores
from monosem.evals.judges import Answers
from planted import Planted, planted_texts

N_EACH = 6
RARE = 3  # among 60 tokens, so that most texts are without it


def decode(ids: list[int]) -> str:
    return "".join(f" {i}" for i in ids)


def knows(prompt: str) -> str:
    """Describes the latent rightly, and answers by the text alone."""
    if "Answer yes or no" not in prompt:
        return f"the token {RARE}\n"
    text = prompt.split("\n\n")[-1]
    marked = re.findall(r"<<(.*?)>>", text)
    found = [int(word) for word in " ".join(marked or [text]).split()]
    return "Yes." if RARE in found else "No, it does not."


def judged(ask: judges.Ask, *latents: Callable[[list[int]], float]) -> Scores:
    latents = latents or (lambda text: 1.0 * (text[-1] == RARE),)
    reader, which = Planted(*latents), torch.arange(len(latents))
    building, held_out = (reader.stream(planted_texts(150, 60, seed), which) for seed in (0, 1))
    explanations = explainability.explain(reader, building, which, n_top=8, n_random=8, seed=0)
    return judges.metrics(explanations, held_out, decode, ask, n_each=N_EACH, n_resamples=50, seed=0)


def test_a_judge_that_knows_the_latent_scores_1_and_one_that_says_yes_to_all_scores_half() -> None:
    for ask, expected in ((knows, 1), (lambda prompt: "yes", 0.5)):
        scores = judged(ask)
        names = ["detection_balanced_accuracy", "fuzzing_balanced_accuracy"]
        assert [(m.name, m.value, m.n) for m in scores.metrics] == [(name, expected, 1) for name in names]
    assert judged(knows).rows[0]["description"] == f"the token {RARE}"


def test_an_answer_that_is_neither_is_wrong_and_counted() -> None:
    (row,) = judged(lambda prompt: "perhaps").rows
    assert (row["detection"], row["detection_unclear"]) == (0, 2 * N_EACH)


def test_latents_without_texts_of_either_kind_have_no_score() -> None:
    rows = judged(knows, lambda text: 1.0 * (text[-1] == RARE), lambda text: 0.0, lambda text: 1.0).rows
    assert [(row["detection"], row["fuzzing"]) for row in rows] == [(1, 1), (None, None), (None, None)]
    with pytest.raises(ValueError, match="no latent has 6 texts of either kind"):
        judged(knows, lambda text: 0.0)


def test_fuzzing_marks_as_many_tokens_in_both_kinds() -> None:
    tokens = planted_texts(60, 8)
    positions = (tokens.flatten() == 1).nonzero()[:, 0]
    fired = Fired(positions, torch.ones(len(positions)))
    questions = judges.draw_questions(tokens, fired, 10, torch.Generator().manual_seed(0), marks=True)
    assert [q.answer for q in questions] == [True] * 10 + [False] * 10
    for question in questions:
        fires = question.tokens == 1
        assert question.marked.sum() == fires.sum() > 0
        assert torch.equal(question.marked, fires) if question.answer else not (question.marked & fires).any()


def test_mark_puts_runs_between_marks() -> None:
    marked = torch.tensor([True, False, True, True])
    assert judges.mark(torch.tensor([1, 2, 3, 4]), marked, decode) == "<< 1>> 2<< 3 4>>"


def test_a_judge_that_fails_midway_is_not_asked_again_for_what_it_answered(tmp_path: Path) -> None:
    asked: list[str] = []

    def fails_at(number: int) -> judges.Ask:
        def ask(prompt: str) -> str:
            if len(asked) == number:
                raise ConnectionError("gone")
            asked.append(prompt)
            return knows(prompt)

        return ask

    path = tmp_path / "answers.jsonl"
    with pytest.raises(ConnectionError):
        judged(Answers(path, "stub", fails_at(7)))
    with open(path, "a") as file:
        file.write('{"judge": "stub", "pro')  # a kill cut the next line
    scores = judged(Answers(path, "stub", fails_at(1000)))
    assert scores.metrics == judged(knows).metrics
    assert len(asked) == len(set(asked)) == len(path.read_text().splitlines())
    assert judged(Answers(path, "stub", fails_at(len(asked)))).metrics == scores.metrics  # nothing left to ask
    with pytest.raises(ConnectionError):
        judged(Answers(path, "another judge", fails_at(len(asked))))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"judge": "a", "prompt": "b", "answer": "c"}\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 2 is no answer"):
        Answers(path, "a", knows)


class _Stub(BaseHTTPRequestHandler):
    requests: list[tuple[str | None, dict[str, Any]]]
    status: int

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.headers["Authorization"], body))
        answer = {"choices": [{"message": {"content": knows(body["messages"][0]["content"])}}]}
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def stub() -> Iterator[tuple[str, type[_Stub]]]:
    handler = type("Stub", (_Stub,), {"requests": [], "status": 200})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions", handler
        server.shutdown()
        thread.join()


def test_an_endpoint_is_asked_as_chat_completions_and_its_key_stays_out_of_the_file(
    stub: tuple[str, type[_Stub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = stub
    monkeypatch.setenv("STUB_KEY", "secret")
    path = tmp_path / "answers.jsonl"
    scores = judged(Answers(path, "tiny", judges.endpoint(url, "tiny", key_variable="STUB_KEY")))
    assert [m.value for m in scores.metrics] == [1, 1]
    assert {key for key, _ in handler.requests} == {"Bearer secret"}
    assert {body["model"] for _, body in handler.requests} == {"tiny"}
    assert "secret" not in path.read_text()


def test_an_endpoint_that_refuses_or_a_missing_key_says_what_to_do(stub: tuple[str, type[_Stub]]) -> None:
    url, handler = stub
    handler.status = 500
    with pytest.raises(ConnectionError, match=r"gave no answer \(.*500.*run it again"):
        judges.endpoint(url, "tiny")("hello")
    with pytest.raises(ValueError, match="set it to the key of"):
        judges.endpoint(url, "tiny", key_variable="MONOSEM_NO_SUCH_KEY")("hello")


def test_answers_keep_a_last_line_without_an_end_and_drop_a_torn_one(tmp_path: Path) -> None:
    def line(prompt: str) -> str:
        return json.dumps({"judge": "a", "prompt": prompt, "answer": prompt.upper()})

    def unasked(prompt: str) -> str:
        raise AssertionError(prompt)

    path = tmp_path / "answers.jsonl"
    path.write_bytes(f"\ufeff{line('one')}\r\n\r\n{line('two')}".encode())
    assert [Answers(path, "a", unasked)(prompt) for prompt in ("one", "two")] == ["ONE", "TWO"]
    Answers(path, "a", str.upper)("three \ud83d")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"judge": "a", "pro')
    again = Answers(path, "a", unasked)
    assert [again(prompt) for prompt in ("one", "two", "three \ud83d")] == ["ONE", "TWO", "THREE \ud83d"]
    assert path.read_text("utf-8").endswith("}\n")
    for other in (b"\x1f\x8b\x08\n", "{}\n".encode("utf-16"), b"[" * 100_000 + b"\n"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="line 1 is no answer of a judge"):
            Answers(path, "a", unasked)
        assert path.read_bytes() == other
