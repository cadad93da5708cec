"""What is the autoencoder worth at another sparsity than it was trained for? (Gao et al. 2024, section 5.3)

Each token is rebuilt from its k' largest pre-activations, k' from 1 to 8k, or from every pre-activation above one
threshold for all tokens, chosen so that it lets k a token pass on average. Multi-TopK stays good as k' grows; TopK is
best near its own k.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.evals import downstream
from monosem.evals.bootstrap import as_metric, bootstrap, clusters_of, ratio
from monosem.evals.reconstruction import ErrorSums
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.types import Metric, Site, SparseLatents

_LARGEST = 8  # times k
_ROWS_AT_ONCE = 1024

log = logging.getLogger("monosem")


def sizes(k: int, n_latents: int) -> list[int]:
    """k' to evaluate: the powers of two up to 8k, and k itself, as far as there are latents."""
    powers = {1 << i for i in range((_LARGEST * k).bit_length())}
    return sorted(size for size in powers | {k} if size <= min(_LARGEST * k, n_latents))


@torch.no_grad()
def matched_threshold(autoencoder: Autoencoder, rows: Float[Tensor, "n_rows d_model"], k: int) -> float:
    """The threshold that on raw `rows` (training tokens, not the evaluated ones) lets k a token pass on average.

    It is the (n·k + 1)-th largest of all their pre-activations, or 0 where fewer are positive.
    """
    n_passing, width = len(rows) * k, min(_LARGEST * k, autoencoder.config.n_latents)
    while True:
        parts = (_normalised(autoencoder, part) for part in rows.split(_ROWS_AT_ONCE))
        values = torch.cat([autoencoder.encode(x, k=width).values for x in parts])
        top = values.flatten().topk(min(n_passing + 1, values.numel())).values
        threshold = float(top[-1]) if len(top) == n_passing + 1 else 0.0
        if width == autoencoder.config.n_latents or not (values[:, -1] > threshold).any():
            return threshold
        width = min(2 * width, autoencoder.config.n_latents)  # a token may have more above it than were looked at


@torch.no_grad()
def metrics_on_activations(
    autoencoder: Autoencoder,
    rows: Float[Tensor, "n_rows d_model"],
    clusters: Int[Tensor, " n_rows"],
    threshold: float,
    *,
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """progressive_normalized_mse_k{k'} on raw `rows`; progressive_normalized_mse_threshold, progressive_l0_…."""
    shape, options = (int(clusters.max()) + 1, rows.shape[1]), {"n_resamples": n_resamples, "seed": seed}
    every_k = sizes(autoencoder.config.k, autoencoder.config.n_latents)
    errors = {f"k{k}": ErrorSums(*shape) for k in every_k} | {"threshold": ErrorSums(*shape)}
    l0 = torch.zeros(shape[0], 2, dtype=torch.float64)
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    for start in progress(starts, "progressive", "tok", total=len(rows), each=_ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        x = _normalised(autoencoder, rows[part])
        latents = autoencoder.encode(x, k=every_k[-1])
        for k in every_k:
            errors[f"k{k}"].add(clusters[part], x, autoencoder.decode(_first(latents, k)))
        above = autoencoder.encode(x, threshold=threshold)
        errors["threshold"].add(clusters[part], x, autoencoder.decode(above))
        active = (above.values > 0).sum(1).double().cpu()
        l0.index_add_(0, clusters[part], torch.stack([torch.ones_like(active), active], dim=1))
    found = [sums.metric(f"progressive_normalized_mse_{name}", **options) for name, sums in errors.items()]
    passing = bootstrap(l0, ratio(1, 0), **options)
    return [*found, as_metric("progressive_l0_threshold", passing, unit="latents per token", n=len(rows))]


def metrics_downstream(
    subject: Subject,
    autoencoder: Autoencoder,
    site: Site,
    tokens: Int[Tensor, "n_contexts context_length"],
    documents: Int[Tensor, "n_contexts context_length"],
    threshold: float,
    *,
    first_position: int,
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """progressive_delta_ce_k{k'}, progressive_kl_k{k'}, and both at the threshold: `downstream` of those."""
    every_k = sizes(autoencoder.config.k, autoencoder.config.n_latents)
    kept: list[Any] = []  # x, its statistics and its latents: every variant patches the same activations

    def patch(k: int | None) -> downstream.Patch:
        def rebuild(raw: Tensor, _: slice) -> Tensor:
            if k == every_k[0]:
                x, stats = autoencoder.normalize(raw)
                kept[:] = x, stats, autoencoder.encode(x.flatten(0, 1), k=every_k[-1])
            x, stats, latents = kept
            chosen = _first(latents, k) if k is not None else autoencoder.encode(x.flatten(0, 1), threshold=threshold)
            return autoencoder.denormalize(autoencoder.decode(chosen).view_as(x), stats).to(raw.dtype)

        return rebuild

    names = [*(f"k{k}" for k in every_k), "threshold"]
    patches = [*(patch(k) for k in every_k), patch(None)]
    sums = downstream.sums_of(subject, site, tokens, clusters_of(documents), patches, first_position)
    found = []
    for variant, name in enumerate(names):
        both = f"progressive_delta_ce_{name}", f"progressive_kl_{name}"
        found += downstream.delta_ce_and_kl(sums, variant, both, n_resamples=n_resamples, seed=seed)
    return found


def curve(metrics: list[Metric]) -> dict[str, Any]:
    """For a plot: by quantity (normalized_mse, delta_ce, kl) lists of k, value, low, high, in the order of k."""
    found: dict[str, Any] = {}
    for metric in metrics:
        quantity, _, at = metric.name.removeprefix("progressive_").rpartition("_")
        if at == "threshold":
            continue
        lists = found.setdefault(quantity, {"k": [], "value": [], "low": [], "high": []})
        for name, value in (("k", int(at[1:])), ("value", metric.value), ("low", metric.low), ("high", metric.high)):
            lists[name].append(value)
    return found


def _first(latents: SparseLatents, k: int) -> SparseLatents:
    return latents._replace(indices=latents.indices[:, :k].contiguous(), values=latents.values[:, :k].contiguous())


def _normalised(autoencoder: Autoencoder, rows: Tensor) -> Tensor:
    return autoencoder.normalize(rows.to(autoencoder.weights.decoder.device))[0]
