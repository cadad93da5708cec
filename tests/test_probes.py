"""Probe loss: the fits against scipy, the bound against every fit, the baselines against planted answers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from monosem.evals import probes
from monosem.evals.tasks import Task, make
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights
from monosem.subject import Subject

OPTIONS: dict[str, Any] = {"n_resamples": 100, "seed": 0}
LOG_2 = math.log(2)


def labels_of(n: int, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    found = torch.zeros(n, dtype=torch.bool)
    found[: round(share * n)] = True
    return found[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def directions_of(n: int, d_model: int, seed: int = 0) -> probes.Directions:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_model, generator=generator), torch.randn(n, generator=generator)


def values_of(n_rows: int, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rows of float64: bells, shifted by the label or not, a third of them with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n_rows, len(labels), generator=generator, dtype=torch.float64)
    found += labels.double() * torch.randn(n_rows, 1, generator=generator, dtype=torch.float64)
    found[::3] = found[::3] ** 5
    return 100 + 3 * found


def scipy_loss(values: np.ndarray, labels: np.ndarray) -> float:
    """The least mean cross-entropy of w z + b, z being the standardised values."""
    z, y = (values - values.mean()) / values.std(), labels.astype(float)

    def loss(theta: np.ndarray) -> float:
        t = theta[0] * z + theta[1]
        return float((np.logaddexp(0, t) - y * t).mean())

    def gradient(theta: np.ndarray) -> np.ndarray:
        residual = 0.5 * (1 + np.tanh((theta[0] * z + theta[1]) / 2)) - y
        return np.array([(residual * z).mean(), residual.mean()])

    return float(minimize(loss, np.zeros(2), jac=gradient, method="BFGS", options={"gtol": 1e-11}).fun)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_fit_finds_what_scipy_finds(share: float) -> None:
    labels = labels_of(200, share)
    values = values_of(30, labels)
    found = probes.fit(values, labels)
    assert found.converged.all() and not found.separable.any()
    for row, loss in zip(values, found.loss.tolist(), strict=True):
        assert loss == pytest.approx(scipy_loss(row.numpy(), labels.numpy()), abs=1e-8)


def test_fit_returns_the_probe_whose_loss_it_states() -> None:
    labels = labels_of(200, 0.3)
    values = values_of(30, labels)
    found = probes.fit(values, labels)
    logits = found.weight[:, None] * values + found.bias[:, None]
    again = torch.nn.functional.softplus(torch.where(labels, -logits, logits)).mean(1)
    torch.testing.assert_close(found.loss, again, atol=1e-9, rtol=0)


def test_fit_in_float32_finds_what_float64_finds() -> None:
    labels = labels_of(500, 0.3)
    values = values_of(100, labels)
    single, double = probes.fit(values.float(), labels), probes.fit(values, labels)
    assert single.converged.all()
    torch.testing.assert_close(single.loss, double.loss, atol=3e-6, rtol=0)


def test_fit_of_two_values_is_the_log_odds() -> None:
    """Closed form: with z in {0, 1} the probe says the share of ones beside each value."""
    labels = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1, 1, 1]).bool()
    values = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]).double()
    found = probes.fit(values, labels)
    assert float(found.bias) == pytest.approx(math.log(1 / 3), abs=1e-6)
    assert float(found.weight + found.bias) == pytest.approx(math.log(5), abs=1e-6)


def test_fit_of_a_constant_row_is_the_share_of_labels() -> None:
    labels = labels_of(40, 0.25)
    found = probes.fit(torch.full((1, 40), 7.3), labels)
    assert found.converged.all() and float(found.weight) == 0
    assert float(found.loss) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 1e6])
def test_fit_penalises_the_separable_and_only_them(dtype: torch.dtype, gap: float) -> None:
    labels = labels_of(100)
    values = torch.rand(3, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0] += labels * (1 + gap)
    values[1] -= labels * (1 + gap)
    found = probes.fit(values.to(dtype), labels)
    assert found.separable.tolist() == [True, True, False] and found.converged.all()
    assert found.weight.isfinite().all() and found.weight[0] > 0 > found.weight[1]
    assert (found.loss[:2] < 0.25).all()
    scaled = found.weight[0] * values[0].std(correction=0)
    p = torch.sigmoid(found.weight[0] * values[0] + found.bias[0])
    pull = ((p - labels.double()) * (values[0] - values[0].mean())).sum() / values[0].std(correction=0)
    assert float(pull) == pytest.approx(-float(scaled), rel=1e-3)  # the gradient of w² / 2, per deviation


@given(st.integers(0, 1000), st.floats(-1e3, 1e3).filter(lambda a: abs(a) > 1e-3), st.floats(-1e3, 1e3))
def test_fit_loss_does_not_move_with_scale_shift_or_sign(seed: int, scale: float, shift: float) -> None:
    labels = labels_of(60, 0.4, seed)
    values = values_of(6, labels, seed)
    a, b = probes.fit(values, labels), probes.fit(values * scale + shift, labels)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-7, rtol=0)
    torch.testing.assert_close(a.weight, b.weight * scale, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 1000))
def test_fit_of_flipped_labels_is_the_flipped_fit(seed: int) -> None:
    labels = labels_of(60, 0.4, seed)
    values = values_of(6, labels, seed)
    a, b = probes.fit(values, labels), probes.fit(values, ~labels)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-8, rtol=0)
    torch.testing.assert_close(a.weight, -b.weight, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 1000))
def test_fit_does_not_depend_on_the_order_of_texts_or_the_block(seed: int) -> None:
    labels = labels_of(60, 0.4, seed)
    values = values_of(6, labels, seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    whole = probes.fit(values, labels)
    torch.testing.assert_close(whole.loss, probes.fit(values[:, order], labels[order]).loss, atol=1e-8, rtol=0)
    torch.testing.assert_close(whole.loss[3:4], probes.fit(values[3:4], labels).loss, atol=1e-8, rtol=0)


def test_fit_counts_what_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_MAX_ITERATIONS", 1)
    labels = labels_of(200)
    found = probes.fit(values_of(30, labels), labels)
    assert not found.converged.all() and found.loss.isfinite().all()


@given(st.integers(0, 1000), st.sampled_from([0.5, 0.2]), st.booleans())
def test_lower_bound_is_below_every_fit(seed: int, share: float, heavy: bool) -> None:
    labels = labels_of(80, share, seed)
    x = torch.randn(80, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += labels * 1.5
    x = x**3 if heavy else x
    directions = directions_of(50, 16, seed)
    fits, moments = probes.fit_all(directions, x, labels)
    bound = probes.lower_bound(directions[0], x, labels, moments)
    assert (bound <= fits.loss).all()


def test_lower_bound_is_near_the_fit_where_little_is_to_be_found() -> None:
    labels = labels_of(1000)
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1))
    directions = directions_of(200, 16)
    fits, moments = probes.fit_all(directions, x, labels)
    bound = probes.lower_bound(directions[0], x, labels, moments)
    gain, at_most = LOG_2 - fits.loss, LOG_2 - bound
    assert (at_most <= 1.25 * gain + 3e-5).all()


@given(st.integers(0, 1000), st.floats(0, 3))
def test_least_is_the_minimum_over_every_fit(seed: int, signal: float) -> None:
    labels = labels_of(80, 0.4, seed)
    x = torch.randn(80, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += labels * signal
    directions = directions_of(300, 16, seed)
    fits, moments = probes.fit_all(directions, x, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_ELEMENTS_AT_ONCE", 80 * 8)  # a few rows at a time, so that it may stop early
        row, loss = probes.least(directions, x, labels, moments)
    assert loss == pytest.approx(float(fits.loss.min()), abs=1e-6)
    assert float(fits.loss[row]) == pytest.approx(loss, abs=1e-6)


def test_least_fits_few(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labels_of(500)
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    directions = directions_of(5000, 32)
    _, moments = probes.fit_all(directions, x, labels)
    fitted, fit = [], probes.fit

    def counted(values: torch.Tensor, labels: torch.Tensor) -> probes.Fit:
        fitted.append(len(values))
        return fit(values, labels)

    monkeypatch.setattr(probes, "fit", counted)
    probes.least(directions, x, labels, moments)
    assert sum(fitted) <= 1000


def test_shuffled_labels_give_log_2_minus_the_bias_of_the_best_of_n() -> None:
    """Of n independent directions the best correlation² is about 2 ln n / n_texts, and half of it is gained."""
    n, n_texts = 2000, 400
    x = torch.randn(n_texts, 256, generator=torch.Generator().manual_seed(0))
    labels = labels_of(n_texts)
    directions = directions_of(n, 256)
    _, moments = probes.fit_all(directions, x, labels)
    found = probes.shuffled(directions, x, labels, moments, n_shuffles=20, seed=0)
    bias = LOG_2 - float(found.mean())
    assert len(found) == 20 and len(found.unique()) == 20
    assert 0.6 * math.log(n) / n_texts < bias < 1.2 * math.log(n) / n_texts
    ten = (directions[0][:10], directions[1][:10])
    few = probes.shuffled(ten, x, labels, probes.Moments(*(m[:10] for m in moments)), n_shuffles=20, seed=0)
    assert float(few.mean()) > float(found.mean())


def test_dense_probe_finds_a_planted_direction_and_nothing_in_noise() -> None:
    labels = labels_of(400)
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(200)
    noise = probes.dense_logits(x[:200], labels[:200], groups, x[200:])
    assert float(probes._cross_entropy(noise, labels[200:]).mean()) < LOG_2 + 0.05
    x[:, :25] += labels[:, None] * 0.8
    found = probes.dense_logits(x[:200], labels[:200], groups, x[200:])
    assert float(probes._cross_entropy(found, labels[200:]).mean()) < 0.15


def test_dense_probe_is_the_ridge_solution() -> None:
    """Against the stationarity condition, with more columns than texts."""
    labels = labels_of(30)
    x = torch.randn(30, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = probes._ridge_newton(x, labels, 0.1, None)
    residual = torch.sigmoid(probes._affine(x, theta)) - labels.double()
    torch.testing.assert_close(x.T @ residual / 30, -0.1 * theta[:-1], atol=1e-6, rtol=0)
    assert abs(float(residual.sum())) < 1e-6


def test_judge_auc_is_the_share_of_pairs_in_order() -> None:
    logits = torch.tensor([0.1, 0.4, 0.4, 0.8, -1.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1]).bool()
    found = probes._Judge(labels, torch.arange(5), OPTIONS).auc(logits)
    assert found.value == pytest.approx((1 + 0.5 + 1 + 1 + 0 + 0) / 6)
    assert found.low <= found.value <= found.high


def two_sorts(n: int = 80) -> Task:
    names = [chr(97 + i % 26) * 2 + chr(97 + i // 26) for i in range(n)]
    return make("sorts", "sorts.csv", [(str(i), f"{x} {'zq'[i % 2]}", str(i % 2), None) for i, x in enumerate(names)])


@pytest.fixture(scope="module")
def studied(tiny_model: Path) -> tuple[Subject, Autoencoder]:
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    sample = torch.randn(500, subject.d_model, generator=torch.Generator().manual_seed(0))
    weights = initial_weights(sample, 128, 4, tied=True, seed=0)
    return subject, Autoencoder(AutoencoderConfig(subject.d_model, 128, 4), weights)


def test_pool_is_the_mean_and_the_last_token_without_the_prefix(studied: tuple[Subject, Autoencoder]) -> None:
    subject, autoencoder = studied
    site = subject.site(layer=1)
    texts = ["the sea", "a stone on the hill by the sea", "the sea again and again"]
    found = probes.pool(subject, autoencoder, site, texts, max_tokens=8)
    for i, text in enumerate(texts):
        ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"][-8:]
        raw = subject.capture(torch.tensor([[subject.prefix_token, *ids]]), site)
        x = autoencoder.normalize(raw)[0][0, 1:]
        torch.testing.assert_close(found.by_pooling["mean"][i], x.mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.by_pooling["last"][i], x[-1], atol=1e-5, rtol=0)
    assert found.n_cut == sum(len(subject.tokenizer(t, add_special_tokens=False)["input_ids"]) > 8 for t in texts) > 0


def test_latents_of_the_mean_are_the_mean_of_the_pre_activations(studied: tuple[Subject, Autoencoder]) -> None:
    _, autoencoder = studied
    x = torch.randn(7, autoencoder.config.d_model)
    w = autoencoder.weights
    each = (x - w.pre_bias) @ w.encoder.T + w.latent_bias
    matrix, offset = probes._latents(autoencoder)
    torch.testing.assert_close(matrix @ x.mean(0) + offset, each.mean(0), atol=1e-5, rtol=1e-5)


def test_probe_chooses_the_planted_latent_and_judges_it_on_other_texts(studied: tuple[Subject, Autoencoder]) -> None:
    _, autoencoder = studied
    task = two_sorts(400)
    x = torch.randn(400, autoencoder.config.d_model, generator=torch.Generator().manual_seed(0))
    x += torch.tensor(task.labels)[:, None] * torch.nn.functional.normalize(autoencoder.weights.encoder[7], dim=0) * 4
    halves = list(range(200)), list(range(200, 400))
    row = probes.probe(autoencoder, x[:200], x[200:], task, *halves, 20, OPTIONS)
    assert row["latent"] == 7 and row["weight"] > 0 and row["n_not_converged"] == 0 and row["n_probes"] == 128
    assert (
        row["probe_loss"] == pytest.approx(0.1, abs=0.08) and row["probe_accuracy"] > 0.93 and row["probe_auc"] > 0.97
    )
    assert row["probe_loss_dense"] < row["probe_loss_random_directions"] < row["probe_loss_null"] < LOG_2
    assert row["probe_loss"] < row["probe_loss_channels"] < row["probe_loss_constant"] == pytest.approx(LOG_2)
    assert row["probe_loss_last_character"] < 0.05 and row["probe_loss_length"] == pytest.approx(LOG_2, abs=0.05)
    assert row["probe_selection_bias"] == pytest.approx(LOG_2 - row["probe_loss_null"])
    x_shuffled = x[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    nothing = probes.probe(autoencoder, x_shuffled[:200], x_shuffled[200:], task, *halves, 20, OPTIONS)
    assert nothing["probe_loss_train"] == pytest.approx(nothing["probe_loss_null"], abs=0.03)
    assert nothing["probe_loss"] > LOG_2 - 0.02


def test_metrics_are_means_over_tasks_and_repeat(studied: tuple[Subject, Autoencoder]) -> None:
    subject, autoencoder = studied
    tasks = [two_sorts(), dataclasses.replace(two_sorts(70), name="fewer")]
    found, table = probes.metrics(subject, autoencoder, subject.site(layer=1), tasks, **OPTIONS)
    by_name = {metric.name: metric for metric in found}
    assert [row["task"] for row in table] == ["sorts", "sorts", "fewer", "fewer"]
    assert [row["pooling"] for row in table] == [*probes.POOLINGS, *probes.POOLINGS]
    assert by_name["probe_loss"].value == pytest.approx((table[0]["probe_loss"] + table[2]["probe_loss"]) / 2)
    assert by_name["probe_loss_last"].value == pytest.approx((table[1]["probe_loss"] + table[3]["probe_loss"]) / 2)
    assert by_name["probe_loss"].n == 2 and by_name["probe_not_converged"].n == 2 * 128
    assert all(metric.low <= metric.value <= metric.high for metric in found)
    assert "probe_loss_null_last" in by_name and "probe_loss_constant_last" not in by_name
    assert by_name["probe_loss_last"].value < 0.5  # the last token is the letter that tells the sorts apart
    again, _ = probes.metrics(subject, autoencoder, subject.site(layer=1), tasks, **OPTIONS)
    assert again == found


def test_texts_are_read_once_for_several_autoencoders(
    studied: tuple[Subject, Autoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, autoencoder = studied
    kept: dict[tuple[Any, ...], probes.Pooled] = {}
    read = subject, autoencoder, subject.site(layer=1), [two_sorts()]
    first = probes.metrics(*read, pooled=kept, **OPTIONS)
    monkeypatch.setattr(probes, "pool", lambda *_, **__: pytest.fail("read again"))
    assert probes.metrics(*read, pooled=kept, **OPTIONS) == first
    with pytest.raises(pytest.fail.Exception, match="read again"):
        probes.metrics(*read, pooled=kept, max_tokens=3, **OPTIONS)


def test_metrics_of_one_task_have_its_interval_over_texts(studied: tuple[Subject, Autoencoder]) -> None:
    subject, autoencoder = studied
    found, table = probes.metrics(subject, autoencoder, subject.site(layer=1), [two_sorts()], **OPTIONS)
    loss = next(metric for metric in found if metric.name == "probe_loss")
    assert (loss.low, loss.high) == (table[0]["probe_loss_low"], table[0]["probe_loss_high"]) and loss.low < loss.high
