"""Intervals: how far a number would move on other text of the same kind.

Tokens of one document resemble each other, so the unit that is resampled (the cluster) is the document: every
statistic here is a function of sums over clusters, and a resample draws as many clusters as there are, with
replacement, and recomputes the statistic from the new sums. Nothing is averaged a batch at a time, so no number
depends on how the tokens were batched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.types import Metric

_LEVEL = 0.95
_Z = 1.959963984540054  # the normal's 97.5% point
_FEW_DOCUMENTS = 10
_COUNTS_AT_ONCE = 1 << 24  # resample counts held in memory at once: 128 MiB

log = logging.getLogger("monosem")

Statistic = Callable[[Float[Tensor, "*resamples n_sums"]], Float[Tensor, "*resamples"]]


class Interval(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


def clusters_of(documents: Int[Tensor, "n_contexts context_length"]) -> Int[Tensor, " n_contexts"]:
    """The cluster, 0 ... C-1, of each context: the document of its first token.

    A document longer than a context fills several, which thus move together in a resample. A context packed from
    several documents counts as its first one's: what the two share is less than what is left together.
    Few documents give rough intervals, which a warning says; of a single one the contexts are the clusters.
    `ValueError` when even the context is single.
    """
    first = documents[:, 0]
    if len(first) < 2:
        raise ValueError(f"{len(first)} context gives no interval; harvest more tokens (2 contexts or more)")
    names, clusters = torch.unique(first, return_inverse=True)
    if len(names) < _FEW_DOCUMENTS:
        log.warning("%d contexts come from %d documents: their intervals are rough, too narrow", len(first), len(names))
    return clusters if len(names) > 1 else torch.arange(len(first))


def bootstrap(
    sums: Float[Tensor, "n_clusters n_sums"], statistic: Statistic, *, n_resamples: int, seed: int
) -> Interval:
    """statistic(sum over clusters), with the 2.5% and 97.5% percentiles of its resamples.

    `statistic` maps float64 totals [..., n_sums] to [...]. Calls with the same number of clusters and the same seed
    draw the same resamples, so that two statistics of the same text are compared pairwise.
    """
    assert sums.dtype == torch.float64
    n_clusters = len(sums)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _COUNTS_AT_ONCE // n_clusters)
    values = []
    for start in range(0, n_resamples, at_once):
        drawn = torch.randint(n_clusters, (min(at_once, n_resamples - start), n_clusters), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        values.append(statistic(counts.scatter_add_(1, drawn, torch.ones_like(counts)) @ sums))
    tails = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(values), tails).tolist()
    return Interval(float(statistic(sums.sum(0))), low, high)


def ratio(numerator: int, denominator: int) -> Statistic:
    """The statistic Σ numerator / Σ denominator, given their columns."""
    return lambda totals: totals[..., numerator] / totals[..., denominator]


def wilson(count: int, n: int) -> Interval:
    """count / n with Wilson's 95% score interval: the n things are taken as draws from many like them.

    For a share of latents. A bootstrap over text would be biased there: a resample holds fewer distinct tokens than
    the text, so a latent that fired once is "never fired" in a third of the resamples.
    """
    share, shrink = count / n, 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / shrink
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(share, 0.0 if count == 0 else low, 1.0 if count == n else high)


def as_metric(name: str, interval: Interval, *, unit: str, n: int) -> Metric:
    """The metric, measured on n tokens; `ValueError` naming it when a number is not finite (a report has no NaN)."""
    if not all(map(math.isfinite, interval)):
        raise ValueError(
            f"{name} is {interval.value} [{interval.low}, {interval.high}] on {n} tokens, not a finite number; "
            "check that the autoencoder's weights are finite and the activations vary, or evaluate on more text"
        )
    return Metric(name, interval.value, unit, n, interval.low, interval.high)
