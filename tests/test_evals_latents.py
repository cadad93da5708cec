"""Breakdowns, biases, density, decoder clustering and PCA at planted answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monosem.evals import downstream, latents, reconstruction
from monosem.evals.bootstrap import clusters_of
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.subject import Subject
from monosem.types import SparseLatents, Weights
from tiny import D_MODEL

N_LATENTS, N = 40, 310
ROWS = torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 4, D_MODEL) + 3
CLUSTERS, POSITIONS = torch.arange(N) // 10, torch.arange(N) % 10
OPTIONS = {"n_resamples": 50, "seed": 0}
MEAN = normalize(ROWS)[0].double().mean(0).float()


class Planted(Autoencoder):
    """Reconstructs by `rebuild` (normalised space)."""

    def __init__(self, rebuild: Callable[[Tensor], Tensor]) -> None:
        weights = initial_weights(normalize(ROWS)[0], N_LATENTS, 4, tied=True, seed=0)
        super().__init__(AutoencoderConfig(D_MODEL, N_LATENTS, 4), weights)
        self.rebuild, self.x = rebuild, torch.empty(0)

    def encode(self, x: Tensor, *, k: int | None = None, threshold: float | None = None) -> SparseLatents:
        self.x = x
        return super().encode(x, k=k, threshold=threshold)

    def decode(self, latents: SparseLatents) -> Tensor:
        return self.rebuild(self.x)


def with_decoder(decoder: Tensor) -> Autoencoder:
    n, d_model = decoder.shape
    return Autoencoder(
        AutoencoderConfig(d_model, n, 1), Weights(decoder.clone(), torch.zeros(n), decoder, torch.zeros(d_model))
    )


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_bias_and_slope_are_the_planted_factor(factor: float) -> None:
    metrics, _ = latents.breakdown(Planted(lambda x: MEAN + factor * (x - MEAN)), ROWS, CLUSTERS, POSITIONS, **OPTIONS)
    assert [m.name for m in metrics] == ["relative_bias", "recons_slope"]
    assert [m.value for m in metrics] == [pytest.approx(factor, rel=1e-5)] * 2


def test_a_projection_has_no_bias_though_its_slope_is_below_one() -> None:
    pca = latents.fit_pca(Planted(lambda x: x), ROWS, 8)
    metrics, _ = latents.breakdown(Planted(pca.rebuild), ROWS, CLUSTERS, POSITIONS, **OPTIONS)
    bias, slope = metrics
    assert bias.value == pytest.approx(1, abs=1e-5)
    assert 0.2 < slope.value < 0.95
    (nmse,) = latents.pca_on_activations(Planted(lambda x: x), pca, ROWS, CLUSTERS, **OPTIONS)
    assert slope.value == pytest.approx(1 - nmse.value, rel=1e-5)


def test_curves_find_where_the_error_was_put() -> None:
    """Wrong at position 9 only, in tokens whose order of norms is known."""
    position = POSITIONS.clone()

    def rebuild(x: Tensor) -> Tensor:
        return torch.where((position == 9)[:, None], MEAN, x)

    _, curves = latents.breakdown(Planted(rebuild), ROWS, CLUSTERS, position, **OPTIONS)
    by_position = curves["by_position"]
    assert (by_position["from"], by_position["to"]) == ([0, 1, 2, 4, 8], [0, 1, 3, 7, 9])
    assert by_position["n"] == [31, 31, 62, 124, 62]
    assert by_position["normalized_mse"][:4] == pytest.approx([0] * 4, abs=1e-9)
    assert 0.3 < by_position["normalized_mse"][4] < 0.7
    by_norm = curves["by_norm"]
    assert by_norm["n"] == [31] * 10
    assert all(a <= b for a, b in zip(by_norm["to"], by_norm["from"][1:], strict=False))
    assert by_norm["to"][-1] == pytest.approx(float(ROWS.norm(dim=1).max()))


def test_bins_together_are_the_whole() -> None:
    autoencoder = Planted(lambda x: x.round())
    _, curves = latents.breakdown(autoencoder, ROWS, CLUSTERS, POSITIONS, **OPTIONS)
    x = normalize(ROWS)[0].double()
    whole = float((x - x.float().round().double()).square().sum() / (x - x.mean(0)).square().sum())
    squares = (x - x.mean(0)).square().sum(1)
    bins = torch.tensor([0, 1, 2, 2, 3, 3, 3, 3, 4, 4])[POSITIONS]
    weights = torch.stack([squares[bins == b].sum() for b in range(5)]) / squares.sum()
    curve = curves["by_position"]
    assert float(torch.tensor(curve["normalized_mse"]).double() @ weights) == pytest.approx(whole, rel=1e-6)
    for low, value, high in zip(curve["low"], curve["normalized_mse"], curve["high"], strict=True):
        assert low <= value <= high


def test_dense_latents_are_those_above_a_share_of_tokens() -> None:
    metrics = latents.dense_latents(torch.tensor([0, 10, 11, 100, 101, 1000]), 1000)
    assert [(m.name, m.value, m.n) for m in metrics] == [
        ("dense_fraction_1pct", 4 / 6, 1000),
        ("dense_fraction_10pct", 2 / 6, 1000),
    ]


def test_decoder_clustering_sees_twins_and_not_random_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.nn.functional.normalize(torch.randn(150, 64, generator=generator))
    metrics, curves = latents.decoder_clustering(with_decoder(half.repeat(2, 1)), n_sampled=100, **OPTIONS)
    twins, random = metrics
    assert (twins.name, random.name) == ("decoder_max_cosine", "decoder_max_cosine_random")
    assert twins.value == pytest.approx(1, abs=1e-6) and twins.n == 100
    assert 0.2 < random.low < random.value < random.high < 0.6
    assert curves["decoder"] == pytest.approx([1] * 7, abs=1e-6)
    assert sorted(curves["random"]) == curves["random"] and len(curves["random"]) == len(curves["quantiles"])


def test_decoder_clustering_of_random_directions_is_the_random_one() -> None:
    decoder = torch.nn.functional.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(7)))
    own, random = latents.decoder_clustering(with_decoder(decoder), **OPTIONS)[0]
    assert own.n == 400
    assert own.value == pytest.approx(random.value, abs=0.02)
    orthogonal = latents.decoder_clustering(with_decoder(torch.eye(16)), **OPTIONS)[0][0]
    assert (orthogonal.value, orthogonal.low, orthogonal.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="no latent has a neighbour"):
        latents.decoder_clustering(with_decoder(torch.eye(1)), **OPTIONS)


@pytest.mark.parametrize("k", [1, 5, D_MODEL])
def test_pca_leaves_the_smallest_eigenvalues(k: int) -> None:
    autoencoder = Planted(lambda x: x)
    pca = latents.fit_pca(autoencoder, ROWS, k)
    (metric,) = latents.pca_on_activations(autoencoder, pca, ROWS, CLUSTERS, **OPTIONS)
    eigenvalues = torch.linalg.eigvalsh(normalize(ROWS)[0].double().T.cov())
    expected = float(eigenvalues[: D_MODEL - k].sum() / eigenvalues.sum())
    assert metric.value == pytest.approx(expected, rel=1e-5, abs=1e-9)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(k), atol=1e-5, rtol=0)


def test_pca_patch_is_its_reconstruction(tiny_model: Path) -> None:
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    site = subject.site()
    tokens = torch.randint(3, 250, (10, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    documents = torch.arange(10, dtype=torch.int32)[:, None].expand(-1, 12)
    rows = subject.capture(tokens, site)[:, 1:].flatten(0, 1)
    autoencoder = Planted(lambda x: x)
    pca = latents.fit_pca(autoencoder, rows, 4)
    patches = [latents.pca_patch(autoencoder, pca), lambda x, _: Planted(pca.rebuild)(x)]
    sums = downstream.sums_of(subject, site, tokens, clusters_of(documents), patches, 1).sum(0)
    for statistic in (downstream.delta_ce(0)(sums) / downstream.delta_ce(1)(sums), sums[3] / sums[7]):
        assert float(statistic) == pytest.approx(1, rel=1e-4)


def test_pca_of_more_components_than_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=f"k is {D_MODEL + 1}; a space of {D_MODEL} dimensions"):
        latents.fit_pca(Planted(lambda x: x), ROWS, D_MODEL + 1)


def test_breakdown_agrees_with_reconstruction() -> None:
    weights = initial_weights(normalize(ROWS)[0], N_LATENTS, 4, tied=True, seed=0)
    autoencoder = Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, 4), weights)
    _, curves = latents.breakdown(autoencoder, ROWS, CLUSTERS, torch.full((N,), 5), **OPTIONS)
    tally = reconstruction.tally(autoencoder, [ROWS], CLUSTERS)
    nmse = reconstruction.metrics(tally, **OPTIONS)[0]
    assert curves["by_position"]["normalized_mse"] == [pytest.approx(nmse.value, rel=1e-6)]
