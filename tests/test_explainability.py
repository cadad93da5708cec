"""Recall and precision of rules, on planted latents whose answers are known and on the tiny model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from monosem.evals import explainability
from monosem.evals.explainability import Explanation, Fired, Scores
from monosem.n2g import START, Examples
from monosem.tokens import Contexts
from monosem.types import Metric
from planted import CONTEXT, Planted, planted_texts

OPTIONS = {"n_resamples": 100, "seed": 0}


def split(tokens: Tensor, name: str) -> Contexts:
    """Contexts in which every row is a document of its own."""
    rows = torch.arange(len(tokens), dtype=torch.int32)[:, None].expand_as(tokens)
    return Contexts(tokens, rows, torch.zeros_like(tokens), [f"{name}{i}" for i in range(len(tokens))])


def judged(*latents: Callable[[list[int]], float], n_tokens: int = 2000) -> tuple[Scores, dict[str, Metric]]:
    reader, building = Planted(*latents), split(planted_texts(300), "building")
    explanations = explainability.explain(reader, building, torch.arange(reader.n_latents), n_top=8, n_random=8, seed=0)
    held_out = split(planted_texts(200, seed=1), "held out")
    scores = explainability.metrics(reader, explanations, building, held_out, n_tokens=n_tokens, **OPTIONS)
    return scores, {m.name: m for m in scores.metrics}


@pytest.mark.parametrize(
    ("latent", "unigram", "bigram"),
    [
        (lambda text: 2.0 * (text[-1] == 3), 1, 1),
        (lambda text: 2.0 * (text[-2:] == [3, 4]), 0, 1),
        (lambda text: 2.0 * (text[-1] == 5 and len(text) == 1), 0, 1),
        (lambda text: 2.0 * (text[-3:-2] == [1] and text[-1] == 2), 0, 0),
    ],
    ids=["a token", "two tokens", "a text's start", "a wildcard"],
)
def test_a_latent_of_a_token_pattern_has_recall_and_precision_1(
    latent: Callable[[list[int]], float], unigram: int, bigram: int
) -> None:
    _, metrics = judged(latent)
    for name in ("recall", "precision", "recall_q50", "precision_q90"):
        assert (metrics[f"n2g_{name}"].value, metrics[f"n2g_{name}"].n) == (1, 1)
    assert metrics["n2g_recall_unigram"].value == unigram
    if bigram:
        assert metrics["n2g_recall_bigram"].value > 0.9
        assert metrics["n2g_precision_bigram"].value == 1
    else:
        assert metrics["n2g_recall_bigram"].value < 0.3


def test_counts_are_of_every_token_of_the_stream() -> None:
    """A rule of one token for a latent that fires on two, and after one of them only at even strength."""
    examples = Examples(0, torch.empty(0, 4, dtype=torch.int64), torch.empty(0, 4), torch.empty(0).long(), 0)
    explanation = Explanation(examples, {(1,): 1.0}, {}, {(2, START): 1.0})
    tokens = torch.tensor([[1, 2, 1, 0], [2, 1, 0, 0]])
    fires = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 5]])[:, :, None]
    scores = explainability.score([explanation], [(tokens[:1], fires[:1]), (tokens[1:], fires[1:])], **OPTIONS)
    (row,) = scores.rows
    assert (row["n_tokens"], row["n_fired"], row["n_predicted"], row["density"]) == (8, 5, 3, 5 / 8)
    assert (row["recall"], row["precision"]) == (2 / 5, 2 / 3)
    assert (row["recall_unigram"], row["precision_unigram"]) == (0, 0)
    assert (row["recall_bigram"], row["precision_bigram"]) == (1 / 5, 1)
    assert (row["recall_q90"], row["precision_q90"]) == (0, 0)  # only the 5 is that strong


def test_never_predicting_and_never_firing_latents_are_counted() -> None:
    scores, metrics = judged(lambda text: 1.0 * (text[-1] == 1), lambda text: 0.0, lambda text: 1.0 * (8 in text[-1:]))
    assert [row["recall"] for row in scores.rows] == [1, None, 1]
    assert [row["precision"] for row in scores.rows] == [1, 0, 1]
    assert (metrics["n2g_recall"].value, metrics["n2g_recall"].n) == (1, 2)
    assert (metrics["n2g_precision"].value, metrics["n2g_precision"].n) == (pytest.approx(2 / 3), 3)
    assert metrics["n2g_precision"].low < 2 / 3 < metrics["n2g_precision"].high
    assert metrics["n2g_never_predicts"].value == metrics["n2g_never_fires"].value == pytest.approx(1 / 3)
    assert metrics["n2g_density"].value == pytest.approx(sum(row["density"] for row in scores.rows) / 3)


def test_ngrams_predict_where_half_of_the_occurrences_fire_with_their_mean() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 3, 3, 2]])
    activations = torch.tensor([[4.0, 0, 2, 0], [0, 1, 1, 1]]).flatten()
    fired = Fired(activations.nonzero()[:, 0], activations[activations > 0])
    never = Fired(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert explainability.ngrams(tokens, [fired, never], 1) == [{(1,): 2, (3,): 1}, {}]
    bigram = {(1, START): 2, (1, 2): 2, (3, 1): 1, (3, 3): 1, (2, 3): 1}
    assert explainability.ngrams(tokens, [never, fired], 2) == [{}, bigram]


def test_fewer_tokens_than_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="2,401 held-out tokens asked for, 2,400 given"):
        judged(lambda text: 1.0, n_tokens=2401)


def test_text_that_was_built_from_is_refused() -> None:
    reader, text = Planted(lambda text: 1.0), split(planted_texts(10), "same")
    explanations = explainability.explain(reader, text, torch.tensor([0]), n_top=1, n_random=1, seed=0)
    with pytest.raises(ValueError, match=r"10 documents .* among both"):
        explainability.metrics(reader, explanations, text, text, n_tokens=10 * CONTEXT, **OPTIONS)


def test_latents_that_all_never_fire_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 latents fires on the 2,004 held-out tokens"):
        judged(lambda text: 0.0)
