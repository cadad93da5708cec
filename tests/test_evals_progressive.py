"""Other sparsities than the autoencoder's own: what each k' and a matched threshold give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monosem.evals import downstream, progressive, reconstruction
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.subject import Subject
from tiny import D_MODEL

K, N_LATENTS = 6, 96
ROWS = torch.randn(120, D_MODEL, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 4, D_MODEL)
OTHER_ROWS = torch.randn(100, D_MODEL, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 4, D_MODEL)
CLUSTERS = torch.arange(120) // 6
OPTIONS = {"n_resamples": 50, "seed": 0}
TOKENS = torch.randint(3, 250, (10, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
DOCUMENTS = torch.arange(10, dtype=torch.int32)[:, None].expand(-1, 12)


def autoencoder_at(k: int = K) -> Autoencoder:
    weights = initial_weights(normalize(ROWS)[0], N_LATENTS, K, tied=True, seed=0)
    return Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, k), weights)


@given(k=st.integers(1, 200), n_latents=st.integers(1, 4000))
def test_sizes_are_powers_of_two_up_to_8k_and_k(k: int, n_latents: int) -> None:
    found = progressive.sizes(min(k, n_latents), n_latents)
    assert found == sorted(set(found)) and found[0] == 1 and min(k, n_latents) in found
    assert found[-1] <= min(8 * k, n_latents) and 4 * found[-1] > min(8 * min(k, n_latents), n_latents)
    assert all(size & (size - 1) == 0 or size == min(k, n_latents) for size in found)


def test_each_k_is_the_autoencoder_with_that_k() -> None:
    found = progressive.metrics_on_activations(autoencoder_at(), ROWS, CLUSTERS, 0.5, **OPTIONS)
    metrics = {m.name: m for m in found}
    for k in (1, 2, 4, 6, 8, 16, 32):
        tally = reconstruction.tally(autoencoder_at(k), [ROWS], CLUSTERS)
        own = {m.name: m for m in reconstruction.metrics(tally, **OPTIONS)}["normalized_mse"]
        metric = metrics[f"progressive_normalized_mse_k{k}"]
        assert (metric.value, metric.low, metric.high) == pytest.approx((own.value, own.low, own.high), rel=1e-5)
    assert all(m.low <= m.value <= m.high and m.n == 120 for m in found)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_matched_threshold_lets_k_a_token_pass(k: int) -> None:
    autoencoder = autoencoder_at()
    threshold = progressive.matched_threshold(autoencoder, OTHER_ROWS, k)
    x = normalize(OTHER_ROWS)[0]
    pre_acts = (x - autoencoder.weights.pre_bias) @ autoencoder.weights.encoder.T + autoencoder.weights.latent_bias
    assert (pre_acts > threshold + 1e-5).sum() <= 100 * k <= (pre_acts > threshold - 1e-5).sum()
    latents = autoencoder.encode(x, threshold=threshold)
    assert (latents.values > 0).sum() == 100 * k


def test_a_threshold_finds_more_than_8k_latents_where_a_token_has_them() -> None:
    autoencoder = autoencoder_at(1)
    x = normalize(ROWS)[0]
    latents = autoencoder.encode(x, threshold=0.0)
    pre_acts = (x - autoencoder.weights.pre_bias) @ autoencoder.weights.encoder.T + autoencoder.weights.latent_bias
    assert (latents.values > 0).sum(1).tolist() == (pre_acts > 0).sum(1).tolist()
    assert (pre_acts > 0).sum(1).max() > 8
    loose = progressive.matched_threshold(autoencoder, torch.cat([ROWS, ROWS[:1].expand(2, -1)]), N_LATENTS)
    assert loose == 0


def test_downstream_at_k_is_that_of_the_autoencoder_and_at_the_threshold_of_its_own(tiny_model: Path) -> None:
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    mean, common = torch.zeros(D_MODEL), {"first_position": 1, **OPTIONS}
    metrics = {
        m.name: m
        for m in progressive.metrics_downstream(
            subject, autoencoder_at(), subject.site(), TOKENS, DOCUMENTS, 0.8, **common
        )
    }
    for k in (1, K, 32):
        own = downstream.metrics(subject, autoencoder_at(k), subject.site(), TOKENS, DOCUMENTS, mean, **common)
        for metric in own:
            if metric.name in ("delta_ce", "kl"):
                assert metrics[f"progressive_{metric.name}_k{k}"].value == pytest.approx(metric.value, rel=1e-4)
    autoencoder = autoencoder_at()

    def above(raw: torch.Tensor, _: slice) -> torch.Tensor:
        x, stats = normalize(raw)
        recons = autoencoder.decode(autoencoder.encode(x.flatten(0, 1), threshold=0.8))
        return recons.view_as(x) * stats.std + stats.mean

    clusters = torch.arange(10)
    sums = downstream.sums_of(subject, subject.site(), TOKENS, clusters, [above], 1)
    expected = float(downstream.delta_ce(0)(sums.sum(0)))
    assert metrics["progressive_delta_ce_threshold"].value == pytest.approx(expected, rel=1e-6)


def test_curve_lists_each_quantity_by_k() -> None:
    found = progressive.metrics_on_activations(autoencoder_at(), ROWS, CLUSTERS, 0.5, **OPTIONS)
    curve = progressive.curve(found)
    assert list(curve) == ["normalized_mse"]
    assert curve["normalized_mse"]["k"] == [1, 2, 4, 6, 8, 16, 32]
    assert curve["normalized_mse"]["value"][3] == found[3].value
