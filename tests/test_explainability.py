"""Recall and precision of rules, on planted latents whose answers are known and on the tiny model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from monosem.activations import ActivationStore, harvest
from monosem.config import HarvestConfig
from monosem.evals import explainability, simulation
from monosem.evals.explainability import Explanation, Fired, Scores
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights
from monosem.n2g import START, Examples, LatentReader, columns, sample_latents
from monosem.subject import Subject
from monosem.types import Metric
from planted import CONTEXT, Planted, planted_texts
from tiny import D_MODEL

OPTIONS: dict[str, Any] = {"n_resamples": 100, "seed": 0}


def judged(*latents: Callable[[list[int]], float]) -> tuple[Scores, dict[str, Metric]]:
    reader, which = Planted(*latents), torch.arange(len(latents))
    building, held_out = (reader.stream(planted_texts(n, seed=n), which) for n in (300, 200))
    explanations = explainability.explain(reader, building, which, n_top=8, n_random=8, seed=0)
    scores = explainability.score(explanations, held_out, **OPTIONS)
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


def test_judging_on_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no text to judge"):
        explainability.score([], iter([]), **OPTIONS)


def test_latents_that_all_never_fire_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 latents fires on the 2,400 held-out tokens"):
        judged(lambda text: 0.0)


N_LATENTS, K = 16, 4


@pytest.fixture(scope="module")
def reader(tiny_model: Path) -> LatentReader:
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    sample = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = initial_weights(sample, N_LATENTS, K, tied=True, seed=0)
    return LatentReader(subject, Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, K), weights), subject.site())


def exact(reader: LatentReader, tokens: Tensor, latents: list[int]) -> list[Explanation]:
    """Explanations that know these texts by heart, with baselines that know nothing."""
    activations = columns(reader.read(tokens), torch.tensor(latents, dtype=torch.int64)).unflatten(0, tokens.shape)
    none = torch.empty(0, CONTEXT)
    found = []
    for column, latent in enumerate(latents):
        rule = {
            (*reversed(text[: i + 1]), START): float(activations[row, i, column])
            for row, text in enumerate(tokens.tolist())
            for i in range(len(text))
            if activations[row, i, column] > 0
        }
        found.append(Explanation(Examples(latent, none.long(), none, none[:, 0].long(), 0), rule, {}, {}))
    return found


def simulated(reader: LatentReader, tokens: Tensor, latents: list[int], **options: Any) -> dict[str, Metric]:
    documents = torch.arange(len(tokens))[:, None].expand_as(tokens)
    explanations = exact(reader, tokens, latents)
    return {m.name: m for m in simulation.metrics(reader, explanations, tokens, documents, **options, **OPTIONS)}


def test_explanations_that_are_right_lose_what_the_reconstruction_loses(reader: LatentReader) -> None:
    metrics = simulated(reader, planted_texts(12), list(range(N_LATENTS)))
    real, kl, zero = (metrics[f"explanation_kl{suffix}"].value for suffix in ("_real", "", "_zero"))
    assert kl == pytest.approx(real, rel=1e-4)
    assert metrics["explanation_kl_at_25"].value == pytest.approx(real, rel=1e-4)
    assert len({real, metrics["explanation_kl_zero_at_50"].value, zero}) == 3
    assert metrics["explanation_kl_unigram"].value == zero
    assert metrics["explanation_delta_ce"].value == pytest.approx(metrics["explanation_delta_ce_real"].value, rel=1e-3)
    assert metrics["explanation_kl"].n == 12 * (CONTEXT - 1)
    assert metrics["explanation_kl_at_25"].unit == "nats per token, 4 of 16 latents simulated"


def test_with_every_latent_at_zero_the_reconstruction_is_the_pre_bias(reader: LatentReader) -> None:
    tokens = planted_texts(12)
    metrics = simulated(reader, tokens, list(range(N_LATENTS)), fractions=[1.0])

    def pre_bias(x: Tensor) -> Tensor:
        stats = reader.autoencoder.normalize(x)[1]
        patched = reader.autoencoder.denormalize(reader.autoencoder.weights.pre_bias.expand_as(x), stats)
        return torch.cat([x[:, :1], patched[:, 1:]], dim=1)

    prefixed = torch.nn.functional.pad(tokens, (1, 0), value=reader.subject.prefix_token)
    p, q = (
        logits[:, 1:-1].log_softmax(-1)
        for logits in (reader.subject.logits(prefixed), reader.subject.run_with(prefixed, reader.site, pre_bias))
    )
    assert metrics["explanation_kl_zero"].value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_latents_without_an_explanation_keep_their_own_values(reader: LatentReader) -> None:
    tokens = planted_texts(12)
    fires = columns(reader.read(tokens), torch.arange(N_LATENTS)).count_nonzero(0)
    metrics = simulated(reader, tokens, [int(fires.argmin())], fractions=[1.0])
    everything = simulated(reader, tokens, list(range(N_LATENTS)), fractions=[1.0])
    assert metrics["explanation_kl_zero"].value < everything["explanation_kl_zero"].value
    assert metrics["explanation_kl_real"].value == everything["explanation_kl_real"].value


def test_simulation_does_not_depend_on_the_batch(reader: LatentReader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulated(reader, planted_texts(12), [1, 2, 3])
    monkeypatch.setattr("monosem.evals.downstream._LOGITS_BYTES", 4 * reader.subject.vocab_size * CONTEXT * 5)
    for name, metric in simulated(reader, planted_texts(12), [1, 2, 3]).items():
        assert metric.value == pytest.approx(whole[name].value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("latents", "fractions"), [([], [1.0]), ([0], [0.0]), ([0], [0.5, 1.5])])
def test_nothing_to_simulate_is_refused(reader: LatentReader, latents: list[int], fractions: list[float]) -> None:
    with pytest.raises(ValueError, match=r"give some, from \(0, 1\]"):
        simulated(reader, planted_texts(4), latents, fractions=fractions)


@pytest.fixture(scope="module")
def store(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = str(tmp_path_factory.mktemp("store"))
    sizes: dict[str, Any] = {"context_length": 12, "n_tokens": 2000, "n_tokens_held_out": 500, "block_contexts": 4}
    config = HarvestConfig(
        out=out, model=str(tiny_model), corpus=str(tiny_corpus), dtype="float32", held_out_fraction=0.3
    )
    return harvest(dataclasses.replace(config, **sizes))


def test_from_a_store_to_scores(reader: LatentReader, store: ActivationStore) -> None:
    options: dict[str, Any] = {
        "n_latents": 5,
        "n_top": 4,
        "n_random": 4,
        "n_tokens_building": 1500,
        "n_tokens": 450,
        **OPTIONS,
    }
    scores, explanations = explainability.metrics(reader, store, **options)
    assert [row["latent"] for row in scores.rows] == sample_latents(N_LATENTS, 5, seed=0).tolist()
    assert [row["latent"] for row in scores.rows] == [e.examples.latent for e in explanations]
    assert json.loads(json.dumps(scores.rows)) == scores.rows
    assert {row["n_tokens"] for row in scores.rows} == {11 * store.block_rows}
    metrics = {m.name: m for m in scores.metrics}
    assert 0 < metrics["n2g_recall"].value < 1 and 0 < metrics["n2g_precision"].value < 1
    assert all(m.low <= m.value <= m.high for m in scores.metrics)
    assert explainability.metrics(reader, store, **options)[0].rows == scores.rows


def test_building_and_judging_share_no_document(store: ActivationStore) -> None:
    building, held_out = (set(store.contexts(split).document_hashes) for split in ("train", "held_out"))
    assert building and held_out and not building & held_out


def test_a_store_stream_is_the_activations_of_its_rows(reader: LatentReader, store: ActivationStore) -> None:
    """The first token of each context is left out, with its activation; every row stands beside its own token."""
    latents = torch.arange(N_LATENTS)
    batches = list(explainability.stored(store, "train", 100, reader.autoencoder, latents))
    tokens, activations = (torch.cat(part) for part in zip(*batches, strict=True))
    assert len(tokens) * store.rows_per_context == 3 * store.block_rows
    assert torch.equal(tokens, store.contexts("train").tokens[: len(tokens), 1:])
    x, _ = reader.autoencoder.normalize(store.rows("train")[: tokens.numel()])
    expected = columns(reader.autoencoder.encode(x), latents).unflatten(0, tokens.shape)
    assert torch.allclose(activations, expected, atol=1e-5)


def test_fewer_held_out_tokens_than_asked_for_are_refused(reader: LatentReader, store: ActivationStore) -> None:
    with pytest.raises(ValueError, match="100,000 held-out tokens asked for"):
        explainability.metrics(reader, store, n_latents=2, **OPTIONS)
