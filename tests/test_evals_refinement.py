"""Magnitudes chosen again: against scipy's NNLS, and what they say of planted autoencoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from monosem.evals import refinement
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.types import Metric, SparseLatents

D_MODEL, N_LATENTS, K = 16, 48, 6
GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(200, D_MODEL, generator=GENERATOR) * torch.linspace(1, 4, D_MODEL)
CLUSTERS = torch.arange(200) // 5


class Scaled(Autoencoder):
    """Its latents are `factor` times the best ones of their support, and inactive slots point anywhere."""

    def __init__(self, factor: float) -> None:
        weights = initial_weights(normalize(ROWS)[0], N_LATENTS, K, tied=True, seed=0)
        super().__init__(AutoencoderConfig(D_MODEL, N_LATENTS, K), weights)
        self.factor = factor

    def encode(self, x: Tensor, *, k: int | None = None, threshold: float | None = None) -> SparseLatents:
        latents = super().encode(x, k=k, threshold=threshold)
        active = latents.values > 0
        best = refinement.refine((x - self.weights.pre_bias).double(), self.weights.decoder, latents.indices, active)
        return latents._replace(values=(self.factor * best).float())


def measured(autoencoder: Autoencoder) -> dict[str, Metric]:
    return {m.name: m for m in refinement.metrics(autoencoder, ROWS, CLUSTERS, n_resamples=50, seed=0)}


@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, 2, 5, 12, 40]),
    d_model=st.sampled_from([3, 8, 24]),
    twins=st.booleans(),
)
def test_refine_is_scipys_nnls(seed: int, k: int, d_model: int, twins: bool) -> None:
    """Also where latents outnumber dimensions, share a direction, or point away from the target."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(60, d_model, generator=generator))
    if twins:
        decoder[1::2] = decoder[::2]
    target = torch.randn(7, d_model, generator=generator, dtype=torch.float64)
    indices = torch.stack([torch.randperm(60, generator=generator)[:k] for _ in range(7)])
    active = torch.rand(7, k, generator=generator) < 0.8
    c = refinement.refine(target, decoder, indices, active)
    assert (c >= 0).all() and (c[~active] == 0).all()
    for i in range(7):
        matrix = decoder[indices[i][active[i]]].double().numpy().T
        ours = np.linalg.norm(matrix @ c[i][active[i]].numpy() - target[i].numpy())
        best = nnls(matrix, target[i].numpy())[1] if matrix.shape[1] else target[i].norm().item()
        assert ours == pytest.approx(best, rel=1e-8, abs=1e-7)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_coefficients_are_scipys_where_they_are_unique(size: float) -> None:
    decoder = torch.nn.functional.normalize(torch.randn(30, 64, generator=torch.Generator().manual_seed(1))) * size
    target = torch.randn(50, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    indices = torch.arange(30).expand(50, -1)
    c = refinement.refine(target, decoder, indices, torch.ones(50, 30, dtype=torch.bool))
    expected = np.stack([nnls(decoder.double().numpy().T, row)[0] for row in target.numpy()])
    np.testing.assert_allclose(c.numpy(), expected, rtol=1e-6, atol=1e-8 / size)
    assert 0.2 < (c == 0).double().mean() < 0.8


def test_pivoting_ends_where_all_at_once_goes_round_in_circles() -> None:
    """Strongly correlated directions: scipy's answer, whatever the path."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 20, generator=generator)
    decoder = torch.nn.functional.normalize(base + 0.05 * torch.randn(18, 20, generator=generator))
    target = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    indices = torch.arange(18).expand(200, -1)
    c = refinement.refine(target, decoder, indices, torch.ones(200, 18, dtype=torch.bool))
    expected = np.stack([nnls(decoder.double().numpy().T, row)[0] for row in target.numpy()])
    np.testing.assert_allclose(c.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.8, 1.25])
def test_shrinkage_is_what_was_planted(factor: float) -> None:
    metrics = measured(Scaled(factor))
    assert metrics["shrinkage"].value == pytest.approx(1 / factor - 1, abs=1e-3)
    assert metrics["refinement_slope"].value == pytest.approx(1 / factor, rel=1e-5)
    refined, unrefined = metrics["refined_normalized_mse"], metrics["unrefined_normalized_mse"]
    assert refined.value == pytest.approx(measured(Scaled(1.0))["unrefined_normalized_mse"].value, rel=1e-5)
    assert (refined.value < unrefined.value - 1e-4) == (factor != 1)


def test_refinement_numbers_have_n_and_intervals() -> None:
    weights = initial_weights(normalize(ROWS)[0], N_LATENTS, K, tied=True, seed=0)
    metrics = measured(Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, K), weights))
    assert metrics["refined_normalized_mse"].value < metrics["unrefined_normalized_mse"].value
    assert metrics["refined_normalized_mse"].n == 200
    assert 1000 < metrics["shrinkage"].n <= 1200
    assert all(m.low <= m.value <= m.high for m in metrics.values())


def test_refinement_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(Scaled(0.9))
    monkeypatch.setattr("monosem.evals.refinement._ROWS_AT_ONCE", 7)
    monkeypatch.setattr("monosem.evals.refinement._GRAM_BYTES", 8 * K * D_MODEL * 3)
    for name, metric in measured(Scaled(0.9)).items():
        assert metric.value == pytest.approx(whole[name].value, rel=1e-5)
