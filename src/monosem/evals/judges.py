"""Would a reader of a latent's description find its texts? Asked of a language model; off unless one is given.

A judge is any callable from prompt to answer, such as `endpoint(url, model)` for a chat endpoint that speaks OpenAI's
protocol. It first describes a latent from its strongest examples, then answers yes or no, a text at a time:

    detection   does the latent fire in this text? Half of the texts are drawn among those where it does
    fuzzing     are the marked tokens ones on which it fires? In half of the texts others are marked, as many

Scores are balanced accuracies: the mean of the shares of right answers where yes and where no is right; 1/2 is chance.
An answer that is neither counts as wrong. Through `Answers` every answer is appended to a file and never asked for
again, so a judge that fails midway costs nothing but the rest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from monosem import artifacts, formats, n2g
from monosem.evals.bootstrap import as_metric, bootstrap, ratio
from monosem.evals.explainability import Explanation, Fired, Record, Scores
from monosem.n2g import Examples
from monosem.textfiles import require_file
from monosem.types import FIRED_THRESHOLD

N_EACH = 10
"""Texts with the right answer yes, and as many with no, by latent and score."""
_N_SHOWN = 10  # examples that a description is made from

Ask = Callable[[str], str]
Decode = Callable[[list[int]], str]

_DESCRIBE = """In these texts <<marks>> surround the tokens on which one unit of a language model's autoencoder fires.
Say in one short line what the marked tokens have in common: meaning, form or context. Answer with that line alone.

{texts}"""
_DETECT = """A unit of a language model's autoencoder fires on this: {description}

Does it fire anywhere in the text below? Answer yes or no.

{text}"""
_FUZZ = """A unit of a language model's autoencoder fires on this: {description}

In the text below some tokens are <<marked>>. Are they tokens on which it fires? Answer yes or no.

{text}"""


class Question(NamedTuple):
    """A text to ask about, with the tokens to mark in it, and the right answer."""

    tokens: Int[Tensor, " ctx"]
    marked: Bool[Tensor, " ctx"]
    answer: bool


def endpoint(url: str, model: str, *, key_variable: str | None = None, timeout_s: float = 120) -> Ask:
    """A judge behind `url`, the whole address of chat completions (…/v1/chat/completions).

    `key_variable` names the environment variable with the key, read at each call and written nowhere.
    """

    def ask(prompt: str) -> str:
        headers = {"Content-Type": "application/json"}
        if key_variable is not None:
            if key_variable not in os.environ:
                raise ValueError(f"the environment has no {key_variable}; set it to the key of {url}")
            headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"{url} gave no answer ({error!r}); answers so far are kept: run it again") from error

    return ask


class Answers:
    """A judge that remembers: one JSON object a line, `judge`, `prompt` and `answer`, in a file that only grows.

    `judge` names the model, so that the answers of two are not mixed. `ValueError` when the file holds something else.
    """

    def __init__(self, path: str | Path, judge: str, ask: Ask) -> None:
        self.path, self.judge, self.ask = Path(path), judge, ask
        self.known: dict[str, str] = {}
        if self.path.exists():
            require_file(self.path)
            self._read(self.path.read_bytes())

    def _read(self, raw: bytes) -> None:
        *lines, last = raw.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip() and not self._knows(line):
                raise ValueError(f"{self.path} line {number} is no answer of a judge; give another file")
        if last.strip() and self._knows(last):  # whole, but saved without the end of its line
            with open(self.path, "ab") as file:
                file.write(b"\n")
        elif last:  # cut by a kill
            os.truncate(self.path, len(raw) - len(last))

    def _knows(self, line: bytes) -> bool:
        """Whether the line is an answer, which is then known."""
        try:
            data = artifacts.parse_json(line.decode("utf-8-sig"), str(self.path), halves=True)
            row = formats.typed(formats.Answer, data)
        except ValueError:
            return False
        self.known[_key(row.judge, row.prompt)] = row.answer
        return True

    def __call__(self, prompt: str) -> str:
        key = _key(self.judge, prompt)
        if key not in self.known:
            answer = self.ask(prompt)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"judge": self.judge, "prompt": prompt, "answer": answer}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.known[key] = answer
        return self.known[key]


def metrics(
    explanations: Sequence[Explanation],
    stream: n2g.Stream,
    decode: Decode,
    ask: Ask,
    *,
    n_each: int = N_EACH,
    n_resamples: int,
    seed: int,
) -> Scores:
    """detection_balanced_accuracy and fuzzing_balanced_accuracy of latents that fire in the stream, and their rows.

    Intervals resample latents. A latent without an example, or without n_each texts of either kind, has no score and
    None in its row. `ValueError` when none has one.
    """
    record = Record.of(stream, len(explanations))
    rows, tokens = [], record.tokens()
    for number, (explanation, fired) in enumerate(zip(explanations, record.by_latent(), strict=True)):
        generator = torch.Generator().manual_seed(seed + number)
        row: dict[str, Any] = {"latent": explanation.examples.latent, "description": None}
        asked = {"detection": (_DETECT, False), "fuzzing": (_FUZZ, True)}
        for name, (template, marks) in asked.items():
            questions = draw_questions(tokens, fired, n_each, generator, marks=marks)
            if not len(explanation.examples.tokens) or not questions:
                row |= {name: None, f"{name}_unclear": None}
                continue
            row["description"] = row["description"] or describe(explanation.examples, decode, ask)
            answers = [_yes(ask(_prompt(template, row["description"], q, decode))) for q in questions]
            row |= {name: _balanced(questions, answers), f"{name}_unclear": answers.count(None)}
        rows.append(row)
    found = []
    for name in ("detection", "fuzzing"):
        values = torch.tensor([row[name] for row in rows if row[name] is not None], dtype=torch.float64)
        if not len(values):
            raise ValueError(f"no latent has {n_each} texts of either kind for {name}; give more text or latents")
        sums = torch.stack([values, torch.ones_like(values)], dim=1)
        interval = bootstrap(sums, ratio(0, 1), n_resamples=n_resamples, seed=seed)
        unit = "balanced accuracy, mean over latents"
        found.append(as_metric(f"{name}_balanced_accuracy", interval, unit=unit, n=len(values)))
    return Scores(found, rows)


def describe(examples: Examples, decode: Decode, ask: Ask) -> str:
    """The judge's own line on what a latent's strongest examples have in common."""
    shown = zip(examples.tokens[:_N_SHOWN], examples.activations[:_N_SHOWN], strict=True)
    texts = [mark(tokens, activations > FIRED_THRESHOLD, decode) for tokens, activations in shown]
    return ask(_DESCRIBE.format(texts="\n\n".join(texts))).strip()


def draw_questions(
    tokens: Int[Tensor, "n_contexts ctx"], fired: Fired, n_each: int, generator: torch.Generator, *, marks: bool
) -> list[Question]:
    """`n_each` questions with the answer yes and as many with no; none when the text has too few.

    Without marks (detection): contexts in which the latent fires, and in which it does not. With (fuzzing): two draws
    of contexts in which it fires on at most half of the tokens, marked where it does, and on as many other tokens.
    """
    fires = torch.zeros(tokens.numel(), dtype=torch.bool).index_fill_(0, fired.positions, True).view(tokens.shape)
    counts = fires.sum(1)
    if marks:
        usable = (counts > 0) & (2 * counts <= tokens.shape[1])
        chosen = _draw(usable, 2 * n_each, generator)
        pools = chosen[:n_each], chosen[n_each:]
    else:
        pools = _draw(counts > 0, n_each, generator), _draw(counts == 0, n_each, generator)
    if min(map(len, pools)) < n_each:
        return []
    questions = []
    for answer, pool in zip((True, False), pools, strict=True):
        for row in pool.tolist():
            marked = torch.zeros_like(fires[row])
            if marks:
                marked = (
                    fires[row] if answer else marked.index_fill(0, _draw(~fires[row], counts[row], generator), True)
                )
            questions.append(Question(tokens[row], marked, answer))
    return questions


def mark(tokens: Int[Tensor, " ctx"], marked: Bool[Tensor, " ctx"], decode: Decode) -> str:
    """The text, with << and >> around each run of marked tokens."""
    ends = [0, *((marked[1:] != marked[:-1]).nonzero()[:, 0] + 1).tolist(), len(tokens)]
    runs = [(decode(tokens[a:b].tolist()), bool(marked[a])) for a, b in itertools.pairwise(ends)]
    return "".join(f"<<{text}>>" if is_marked else text for text, is_marked in runs)


def _draw(usable: Bool[Tensor, " n"], n: int | Tensor, generator: torch.Generator) -> Int[Tensor, " drawn"]:
    found = usable.nonzero()[:, 0]
    return found[torch.randperm(len(found), generator=generator)[: int(n)]]


def _prompt(template: str, description: str, question: Question, decode: Decode) -> str:
    return template.format(description=description, text=mark(question.tokens, question.marked, decode))


def _yes(answer: str) -> bool | None:
    found = re.search(r"\b(yes|no)\b", answer.lower())
    return None if found is None else found[1] == "yes"


def _balanced(questions: list[Question], answers: list[bool | None]) -> float:
    """Mean of the shares of right answers where yes is right and where no is; as many questions have either."""
    return sum(question.answer == answer for question, answer in zip(questions, answers, strict=True)) / len(questions)


def _key(judge: str, prompt: str) -> str:
    return hashlib.sha256(f"{judge}\n{prompt}".encode("utf-8", "surrogatepass")).hexdigest()
