"""Where does the error sit, which way does it lean, what do the latents look like, and would PCA do as well?

Breakdowns of the error by token position and by norm, the bias of the reconstruction, latents that fire on very many
tokens, clustering of decoder directions, and a baseline of k principal components (k numbers a token, like TopK, but
the same k directions for all tokens). All in the normalised space but the norms, which are raw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.evals import downstream
from monosem.evals.bootstrap import as_metric, bootstrap, ratio
from monosem.evals.reconstruction import ErrorSums, share_of_latents
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.types import Metric

DENSE = {"dense_fraction_1pct": 0.01, "dense_fraction_10pct": 0.1}
_ROWS_AT_ONCE = 1024
_N_NORM_BINS = 10
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_TOKENS, _SQUARES, _RECONS_SQUARES, _PRODUCT, _ERROR = range(5)  # columns of a token's moments


class Pca(NamedTuple):
    """The mean and the k largest principal components of normalised activations, one a row, orthonormal."""

    mean: Float[Tensor, " d_model"]
    components: Float[Tensor, "k d_model"]

    def rebuild(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The nearest point to x in the plane through the mean that the components span."""
        return self.mean + (x - self.mean) @ self.components.T @ self.components


@torch.no_grad()
def breakdown(
    autoencoder: Autoencoder,
    rows: Float[Tensor, "n_rows d_model"],
    clusters: Int[Tensor, " n_rows"],
    positions: Int[Tensor, " n_rows"],
    *,
    n_resamples: int,
    seed: int,
) -> tuple[list[Metric], dict[str, Any]]:
    """relative_bias and recons_slope of raw `rows`, and curves of the error by position and by norm.

    With y = x − x̄ and ŷ = x̂ − x̄, x̄ the mean of all `rows` (the same in every bin and resample):
        relative_bias   Σ‖ŷ‖² / Σ ŷ·y    1 when scaling the reconstruction about x̄ cannot improve it, below 1 when it
                                         is too small (gamma of Rajamanoharan et al. 2024, arXiv 2404.16014)
        recons_slope    Σ ŷ·y / Σ‖y‖²    slope of ŷ on y: the explained variance when relative_bias is 1
    Curves "by_position" (position in the context, in bins [1, 2), [2, 4), …; 0 apart) and "by_norm" (tenths of the raw
    norms) have lists of from, to (inclusive), n, and in each bin normalized_mse = Σ‖x − x̂‖² / Σ‖y‖² with low and high.
    """
    moments, norms = _moments(autoencoder, rows)
    options = {"n_resamples": n_resamples, "seed": seed}
    sums = torch.zeros(int(clusters.max()) + 1, 5, dtype=torch.float64).index_add_(0, clusters, moments)
    metrics = [
        _metric("relative_bias", sums, _RECONS_SQUARES, _PRODUCT, "recons per recons·x", options),
        _metric("recons_slope", sums, _PRODUCT, _SQUARES, "recons per x", options),
    ]
    ends = torch.quantile(norms, torch.linspace(0, 1, _N_NORM_BINS + 1, dtype=torch.float64))
    by_norm = torch.bucketize(norms, ends[1:-1])
    by_position = torch.where(positions > 0, positions.double().clamp(min=1).log2().floor() + 1, 0).long()
    curves = {
        "by_position": _curve(moments, clusters, by_position, positions.double(), options),
        "by_norm": _curve(moments, clusters, by_norm, norms, options),
    }
    return metrics, curves


def dense_latents(n_fired: Int[Tensor, " n_latents"], n_tokens: int) -> list[Metric]:
    """dense_fraction_1pct and _10pct: share of latents that fired on more than 1% and 10% of tokens (Wilson)."""
    return [
        share_of_latents(name, int((n_fired > share * n_tokens).sum()), len(n_fired), n_tokens)
        for name, share in DENSE.items()
    ]


@torch.no_grad()
def decoder_clustering(
    autoencoder: Autoencoder, *, n_sampled: int = 2048, n_resamples: int, seed: int
) -> tuple[list[Metric], dict[str, Any]]:
    """decoder_max_cosine: mean over latents of the largest cosine with another latent's decoder direction.

    decoder_max_cosine_random is the same for as many independent random directions: what crowding alone gives. Latents
    are a sample of `n_sampled` against all (n counts them, and intervals resample them). The curves are the quantiles
    of the largest cosines, {"quantiles", "decoder", "random"}.
    """
    decoder, generator = autoencoder.weights.decoder, torch.Generator().manual_seed(seed)
    n_latents = len(decoder)
    if n_latents < 2:
        raise ValueError("n_latents is 1, so that no latent has a neighbour; evaluate an autoencoder with 2 or more")
    sampled = torch.randperm(n_latents, generator=generator)[:n_sampled]
    random = torch.randn(decoder.shape, generator=generator).to(decoder)
    metrics, curves = [], {"quantiles": list(_QUANTILES)}
    for name, directions in (("decoder", decoder), ("random", random)):
        largest = _largest_cosines(directions, sampled.to(decoder.device))
        sums = torch.stack([torch.ones_like(largest), largest], dim=1)
        interval = bootstrap(sums, ratio(1, 0), n_resamples=n_resamples, seed=seed)
        full_name = "decoder_max_cosine" if name == "decoder" else "decoder_max_cosine_random"
        metrics.append(as_metric(full_name, interval, unit="cosine", n=len(largest)))
        curves[name] = torch.quantile(largest, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return metrics, curves


@torch.no_grad()
def fit_pca(autoencoder: Autoencoder, rows: Float[Tensor, "n_rows d_model"], k: int) -> Pca:
    """The k principal components (at most d_model) of raw training `rows`, normalised as the autoencoder does."""
    device, d_model = autoencoder.weights.decoder.device, rows.shape[1]
    if not 1 <= k <= d_model:
        raise ValueError(f"k is {k}; a space of {d_model} dimensions has 1 to {d_model} principal components")
    first = autoencoder.normalize(rows[:1].to(device))[0][0].cpu().double()  # near the mean: nothing cancels
    total, products = torch.zeros_like(first), torch.zeros(d_model, d_model, dtype=torch.float64)
    for part in rows.split(_ROWS_AT_ONCE):
        shift = autoencoder.normalize(part.to(device))[0].cpu().double() - first
        total += shift.sum(0)
        products += shift.T @ shift
    mean = total / len(rows)
    components = torch.linalg.eigh(products - len(rows) * torch.outer(mean, mean)).eigenvectors[:, -k:].T
    return Pca((mean + first).float().to(device), components.flip(0).float().contiguous().to(device))


@torch.no_grad()
def pca_on_activations(
    autoencoder: Autoencoder,
    pca: Pca,
    rows: Float[Tensor, "n_rows d_model"],
    clusters: Int[Tensor, " n_rows"],
    *,
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """pca_normalized_mse: `normalized_mse` of raw `rows` with the PCA's reconstruction."""
    sums = ErrorSums(int(clusters.max()) + 1, rows.shape[1])
    for part, of in zip(rows.split(_ROWS_AT_ONCE), clusters.split(_ROWS_AT_ONCE), strict=True):
        x = autoencoder.normalize(part.to(pca.mean.device))[0]
        sums.add(of, x, pca.rebuild(x))
    return [sums.metric("pca_normalized_mse", n_resamples=n_resamples, seed=seed)]


def pca_patch(autoencoder: Autoencoder, pca: Pca) -> downstream.Patch:
    """The PCA's reconstruction at the site, for `downstream.sums_of`."""

    def patch(raw: Tensor, _: slice) -> Tensor:
        x, stats = autoencoder.normalize(raw)
        return autoencoder.denormalize(pca.rebuild(x), stats).to(raw.dtype)

    return patch


def _moments(autoencoder: Autoencoder, rows: Tensor) -> tuple[Float[Tensor, "n_rows 5"], Float[Tensor, " n_rows"]]:
    """Float64: 1, ‖y‖², ‖ŷ‖², ŷ·y, ‖x − x̂‖² of each token, and its raw norm."""
    device = autoencoder.weights.decoder.device
    total = sum(autoencoder.normalize(part.to(device))[0].double().sum(0) for part in rows.split(_ROWS_AT_ONCE))
    mean, found = total / len(rows), []
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    for start in progress(starts, "break down", "tok", total=len(rows), each=_ROWS_AT_ONCE):
        x = autoencoder.normalize(rows[start : start + _ROWS_AT_ONCE].to(device))[0]
        y, y_hat = x.double() - mean, autoencoder.decode(autoencoder.encode(x)).double() - mean
        error = (y - y_hat).square().sum(1)
        columns = (torch.ones_like(error), y.square().sum(1), y_hat.square().sum(1), (y * y_hat).sum(1), error)
        found.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(found), rows.double().norm(dim=1)


def _metric(name: str, sums: Tensor, numerator: int, denominator: int, unit: str, options: dict[str, int]) -> Metric:
    return as_metric(
        name, bootstrap(sums, ratio(numerator, denominator), **options), unit=unit, n=int(sums[:, 0].sum())
    )


def _curve(
    moments: Tensor, clusters: Tensor, bins: Tensor, of: Tensor, options: dict[str, int]
) -> dict[str, list[float]]:
    """`normalized_mse` in each bin that has tokens, with the least and most of what was binned."""
    curve: dict[str, list[float]] = {name: [] for name in ("from", "to", "n", "normalized_mse", "low", "high")}
    for index in bins.unique():
        inside = bins == index
        _, own = clusters[inside].unique(return_inverse=True)
        sums = torch.zeros(int(own.max()) + 1, 5, dtype=torch.float64).index_add_(0, own, moments[inside])
        metric = _metric("normalized_mse in a bin", sums, _ERROR, _SQUARES, "fraction of variance", options)
        row = (float(of[inside].min()), float(of[inside].max()), metric.n, metric.value, metric.low, metric.high)
        for values, value in zip(curve.values(), row, strict=True):
            values.append(value)
    return curve


def _largest_cosines(directions: Tensor, sampled: Tensor) -> Float[Tensor, " n_sampled"]:
    """The largest cosine of each sampled direction with another; 0 stands for one with no direction."""
    unit = torch.nn.functional.normalize(directions, dim=1)
    found = []
    for part in sampled.split(256):
        cosines = unit[part] @ unit.T
        cosines[torch.arange(len(part), device=part.device), part] = -1
        found.append(cosines.amax(1).double().cpu())
    return torch.cat(found)
