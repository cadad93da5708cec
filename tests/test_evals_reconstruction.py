"""Reconstruction numbers against closed forms, and what their intervals promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monosem.evals.bootstrap import Interval, as_metric, bootstrap, clusters_of, ratio, wilson
from monosem.evals.reconstruction import Tally, density_histogram, metrics, share_of_latents, tally, training_metric
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.types import Metric, SparseLatents, Weights

D_MODEL, N_LATENTS = 16, 40


class Planted(Autoencoder):
    """Reconstructs by `rebuild` (normalised space); every token has the given latents."""

    def __init__(self, rebuild: Callable[[Tensor], Tensor], indices: list[int], values: list[float]) -> None:
        shape = (N_LATENTS, D_MODEL)
        weights = Weights(torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape), torch.zeros(shape[1]))
        super().__init__(AutoencoderConfig(D_MODEL, N_LATENTS, len(values)), weights)
        self.rebuild, self.indices, self.values = rebuild, torch.tensor(indices), torch.tensor(values)
        self.x = torch.empty(0)

    def encode(self, x: Tensor, *, k: int | None = None, threshold: float | None = None) -> SparseLatents:
        self.x = x
        return SparseLatents(self.indices.repeat(len(x), 1), self.values.repeat(len(x), 1), N_LATENTS)

    def decode(self, latents: SparseLatents) -> Tensor:
        return self.rebuild(self.x)


def planted(rebuild: Callable[[Tensor], Tensor]) -> Planted:
    return Planted(rebuild, [3, 1, 0], [2.0, 0.5, 0.0])


def activations(n: int, seed: int = 0) -> Tensor:
    """Raw activations with a mean well away from zero, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(D_MODEL, generator=generator) * 20
    return torch.randn(n, D_MODEL, generator=generator) * torch.linspace(1, 5, D_MODEL) + directions


def measured(autoencoder: Autoencoder, rows: Tensor, rows_per_cluster: int = 8) -> dict[str, Metric]:
    found = tally(autoencoder, [rows], torch.arange(len(rows)) // rows_per_cluster)
    return {m.name: m for m in metrics(found, n_resamples=50, seed=0)}


def test_predicting_the_mean_explains_nothing() -> None:
    rows = activations(640)
    mean = normalize(rows)[0].double().mean(0).float()
    found = measured(planted(lambda x: mean.expand_as(x)), rows)
    assert found["normalized_mse"].value == pytest.approx(1, abs=1e-7)
    assert found["explained_variance"].value == pytest.approx(0, abs=1e-7)


def test_a_perfect_reconstruction_explains_everything() -> None:
    found = measured(planted(lambda x: x), activations(64))
    assert (found["normalized_mse"].value, found["explained_variance"].value) == (0, 1)
    assert found["normalized_mse_raw"].value == pytest.approx(0, abs=1e-9)
    assert found["cosine"].value == pytest.approx(1)


def test_normalized_mse_is_the_error_over_the_variance_in_the_space_it_names() -> None:
    rows = activations(100)
    found = measured(planted(lambda x: 0.9 * x), rows)
    x, stats = normalize(rows)
    recons_raw = (0.9 * x) * stats.std + stats.mean
    for name, of, by in (("normalized_mse", x, 0.9 * x), ("normalized_mse_raw", rows, recons_raw)):
        expected = (of - by).double().square().sum() / (of.double() - of.double().mean(0)).square().sum()
        assert found[name].value == pytest.approx(float(expected), rel=1e-9)
    assert found["explained_variance"].value == 1 - found["normalized_mse"].value


def test_normalized_mse_keeps_its_digits_when_the_mean_dwarfs_the_variance() -> None:
    rows = activations(64) + torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)) * 1e6
    rows[:, 0] += torch.arange(64.0)
    found = Tally(1, D_MODEL, N_LATENTS)
    latents = SparseLatents(torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1), N_LATENTS)
    found.add(torch.zeros(64, dtype=torch.int64), (rows, rows + 1), (rows, rows + 1), latents)
    expected = 64 * D_MODEL / float((rows.double() - rows.double().mean(0)).square().sum())
    assert training_metric(found, n_resamples=20, seed=0).value == pytest.approx(expected, rel=1e-10)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_no_number_depends_on_how_tokens_were_batched(sizes: list[int]) -> None:
    rows = activations(sum(sizes) + 2)
    clusters = torch.arange(len(rows)) // 3
    autoencoder = planted(lambda x: x.round())
    whole = tally(autoencoder, [rows], clusters)
    pieces = tally(autoencoder, rows.split([*sizes, 2]), clusters)
    for name in ("normalised", "raw", "codes", "n_fired"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_l0_counts_positive_values_only() -> None:
    found = measured(Planted(lambda x: x, [3, 1, 0, 2], [2.0, 1e-6, 0.0, 0.0]), activations(20))
    assert (found["l0"].value, found["l0"].low, found["l0"].high) == (2, 2, 2)


def test_a_latent_fires_by_value_and_not_by_index() -> None:
    found = tally(Planted(lambda x: x, [3, 1, 0], [1.1e-3, 1e-3, 0.0]), [activations(20)], torch.arange(20))
    assert found.n_fired.nonzero().flatten().tolist() == [3]
    never = {m.name: m for m in metrics(found, n_resamples=20, seed=0)}["never_fired_fraction"]
    assert never.value == (N_LATENTS - 1) / N_LATENTS
    assert never.n == 20


def test_reconstruction_measures_a_real_autoencoder_as_its_forward_does() -> None:
    rows = activations(500).bfloat16()
    weights = initial_weights(normalize(rows)[0], N_LATENTS, 4, tied=True, seed=0)
    autoencoder = Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, 4), weights)
    found, raw = measured(autoencoder, rows), rows.double()
    error = (raw - autoencoder(rows.float()).double()).square().sum()
    expected = float(error / (raw - raw.mean(0)).square().sum())
    assert found["normalized_mse_raw"].value == pytest.approx(expected, rel=1e-6)
    assert found["l0"].value == pytest.approx(4, abs=0.5)


def test_activations_that_do_not_vary_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^normalized_mse is nan .* on 20 tokens"):
        measured(planted(lambda x: x), activations(1).expand(20, -1))


def test_bootstrap_recomputes_the_mean_within_each_resample() -> None:
    """Against resampling done the slow way, on rows gathered again for each resample."""
    rows, size = activations(30), 3
    x = normalize(rows)[0].double()
    metric = measured(planted(lambda x: 0.5 * x), rows, size)["normalized_mse"]
    drawn = torch.randint(10, (50, 10), generator=torch.Generator().manual_seed(0))
    values = []
    for clusters in drawn:
        again = x.view(10, size, D_MODEL)[clusters].flatten(0, 1)
        values.append((0.5 * again).square().sum() / (again - again.mean(0)).square().sum())
    low, high = torch.stack(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (metric.low, metric.high) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
    assert low < metric.value < high


def test_bootstrap_covers_the_truth_95_times_in_a_hundred() -> None:
    """Tokens share their cluster's offset, which an interval over tokens would miss (about 45% here)."""
    generator, truth, n_covered = torch.Generator().manual_seed(1), 3.0, 0
    for trial in range(300):
        offsets = torch.randn(60, 1, generator=generator, dtype=torch.float64)
        tokens = truth + offsets + torch.randn(60, 10, generator=generator, dtype=torch.float64)
        sums = torch.stack([torch.full((60,), 10.0, dtype=torch.float64), tokens.sum(1)], dim=1)
        interval = bootstrap(sums, ratio(1, 0), n_resamples=200, seed=trial)
        n_covered += interval.low <= truth <= interval.high
    assert 0.90 <= n_covered / 300 <= 0.98


def test_bootstrap_narrows_with_more_text_and_repeats_itself() -> None:
    rows = activations(4000)
    few, many = (measured(planted(lambda x: x.round()), rows[:n])["normalized_mse"] for n in (400, 4000))
    assert many.high - many.low < 0.6 * (few.high - few.low)
    assert measured(planted(lambda x: x.round()), rows[:400])["normalized_mse"] == few


def test_bootstrap_does_not_depend_on_how_many_resamples_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = bootstrap(sums, ratio(0, 1), n_resamples=100, seed=3)
    monkeypatch.setattr("monosem.evals.bootstrap._COUNTS_AT_ONCE", 100)
    assert bootstrap(sums, ratio(0, 1), n_resamples=100, seed=3) == pytest.approx(whole, rel=1e-12)


def test_wilson_at_known_points() -> None:
    assert wilson(5, 10) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0, 0.277533), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((1, 0.722467, 1), abs=1e-6)


def test_share_of_latents_names_the_tokens_it_was_seen_on() -> None:
    metric = share_of_latents("dead_fraction", 5, 10, 500_000)
    assert (metric.value, metric.n, metric.unit) == (0.5, 500_000, "fraction of latents")


def test_clusters_of_gathers_the_contexts_of_a_document() -> None:
    documents = torch.tensor([[7, 7], [7, 9], [9, 9], [4, 4], [7, 7]], dtype=torch.int32)
    clusters = clusters_of(documents)
    assert clusters[0] == clusters[1] == clusters[4]
    assert sorted(set(clusters.tolist())) == [0, 1, 2]


def test_clusters_of_a_single_document_are_its_contexts_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert clusters_of(torch.full((3, 4), 5)).tolist() == [0, 1, 2]
    assert "too narrow" in caplog.text


def test_clusters_of_a_single_context_are_refused() -> None:
    with pytest.raises(ValueError, match="1 context gives no interval"):
        clusters_of(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_as_metric_refuses_what_json_cannot_hold(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^cosine is"):
        as_metric("cosine", Interval(0.5, 0.4, bad), unit="cosine", n=3)


@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_density_histogram_holds_every_latent_once(counts: list[int]) -> None:
    histogram = density_histogram(torch.tensor(counts), 1000)
    assert sum(histogram["n_latents"]) + histogram["never"] == len(counts)
    assert len(histogram["edges"]) == len(histogram["n_latents"]) + 1


def test_density_histogram_puts_a_latent_between_its_edges() -> None:
    histogram = density_histogram(torch.tensor([0, 1, 20, 20, 1000]), 1000)  # 20 of 1000: 10^-1.7
    filled = {(a, n) for a, n in zip(histogram["edges"], histogram["n_latents"], strict=False) if n}
    assert filled == {(-3.0, 1), (-1.75, 2), (-0.25, 1)}
    assert histogram["never"] == 1
