"""How well does the autoencoder rebuild activations it has not seen, and with how many latents?

One pass over the activations leaves a `Tally`: float64 sums per cluster of text, from which every number and every
resample of it follows. Errors are relative to predicting the mean of the evaluated tokens and are measured in the
normalised input space (per token: minus its mean over d_model, over its unbiased std + 1e-5); what is measured in
the raw space says so in its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.evals.bootstrap import Interval, as_metric, bootstrap, ratio, wilson
from monosem.model import Autoencoder
from monosem.types import FIRED_THRESHOLD, Metric, SparseLatents

_ROWS_AT_ONCE = 1024  # an encoder may form [rows, n_latents] pre-activations
_BINS_PER_DECADE = 4

_TOKENS, _ERROR, _SQUARES, _SHIFT = range(4)  # columns of a space's sums; _SHIFT is the first of d_model
_ACTIVE, _COSINE = 1, 2  # columns of the codes' sums, beside _TOKENS

_Pair = tuple[Tensor, Tensor]


class ErrorSums:
    """Float64 sums behind a normalized mean squared error, a row a cluster, in the order of the tokens.

    sums: tokens, Σ‖x − x̂‖², Σ‖y‖², Σy with y = x − x_0, x_0 being the first token evaluated.
        Σ‖x − x̄‖² = Σ‖y‖² − ‖Σy‖²/n holds for any fixed reference; one among the data keeps the difference from
        cancelling (‖x̄‖² may be far above the variance), and the first is shared by every way to batch.
    """

    def __init__(self, n_clusters: int, d_model: int) -> None:
        self.sums = torch.zeros(n_clusters, _SHIFT + d_model, dtype=torch.float64)
        self._reference: Tensor | None = None

    def add(
        self,
        clusters: Int[Tensor, " rows"],
        x: Float[Tensor, "rows d_model"],
        recons: Float[Tensor, "rows d_model"],
    ) -> None:
        x, recons = x.cpu().double(), recons.cpu().double()
        self._reference = x[0] if self._reference is None else self._reference
        self.sums.index_add_(0, clusters, _columns(x, recons, self._reference))

    def metric(self, name: str, *, n_resamples: int, seed: int) -> Metric:
        """Σ‖x − x̂‖² / Σ‖x − x̄‖² of the tokens added."""
        nmse = bootstrap(self.sums, _normalized_mse, n_resamples=n_resamples, seed=seed)
        return as_metric(name, nmse, unit="fraction of variance", n=int(self.sums[:, _TOKENS].sum()))


class Tally:
    """Float64 sums over tokens, a row a cluster, added in the order of the tokens however they are batched.

    normalised, raw: the sums of `ErrorSums` in both spaces.
    codes: tokens, Σ(number of values > 0), Σcos(x, x̂) in the normalised space.
    n_fired: tokens on which each latent's activation exceeded FIRED_THRESHOLD.
    """

    def __init__(self, n_clusters: int, d_model: int, n_latents: int) -> None:
        self._normalised, self._raw = ErrorSums(n_clusters, d_model), ErrorSums(n_clusters, d_model)
        self.normalised, self.raw = self._normalised.sums, self._raw.sums
        self.codes = torch.zeros(n_clusters, 3, dtype=torch.float64)
        self.n_fired = torch.zeros(n_latents, dtype=torch.int64)

    @property
    def n_tokens(self) -> int:
        return int(self.codes[:, _TOKENS].sum())

    def add(self, clusters: Tensor, raw: _Pair, normalised: _Pair, latents: SparseLatents) -> None:
        """Count tokens: their clusters [rows], (x, recons) [rows, d_model] in both spaces, and their latents."""
        self._raw.add(clusters, *raw)
        self._normalised.add(clusters, *normalised)
        x, recons = (tensor.cpu().double() for tensor in normalised)
        cosine = torch.nn.functional.cosine_similarity(x, recons, dim=1)
        indices, values = latents.indices.cpu(), latents.values.cpu()
        active = (values > 0).sum(1).double()
        self.codes.index_add_(0, clusters, torch.stack([torch.ones_like(active), active, cosine], dim=1))
        self.n_fired += torch.bincount(indices[values > FIRED_THRESHOLD].long(), minlength=len(self.n_fired))


@torch.no_grad()
def tally(
    autoencoder: Autoencoder,
    blocks: Iterable[Float[Tensor, "_ d_model"]],
    clusters: Int[Tensor, " n_rows"],
    device: torch.device | str = "cpu",
    encode: Callable[[Tensor], SparseLatents] | None = None,
) -> Tally:
    """Reconstruct the raw activations in `blocks`, whose rows one after another belong to `clusters` (0 ... C-1).

    `encode` stands for `autoencoder.encode` where a caller has a faster one.
    """
    config = autoencoder.config
    found, start = Tally(int(clusters.max()) + 1, config.d_model, config.n_latents), 0
    for rows in (rows for block in blocks for rows in block.split(_ROWS_AT_ONCE)):
        x_raw = rows.to(device, torch.float32)
        x, stats = autoencoder.normalize(x_raw)
        latents = (encode or autoencoder.encode)(x)
        recons = autoencoder.decode(latents)
        recons_raw = autoencoder.denormalize(recons, stats)
        found.add(clusters[start : start + len(rows)], (x_raw, recons_raw), (x, recons), latents)
        start += len(rows)
    assert start == len(clusters), f"{start} rows for {len(clusters)} cluster ids"
    return found


def metrics(held_out: Tally, *, n_resamples: int, seed: int) -> list[Metric]:
    """normalized_mse, explained_variance, normalized_mse_raw, l0, cosine and never_fired_fraction of held-out tokens.

    explained_variance is 1 - normalized_mse, in the same space (docs/notation.md has every formula).
    """
    n = held_out.n_tokens

    def interval(sums: Tensor, statistic: Any) -> Interval:
        return bootstrap(sums, statistic, n_resamples=n_resamples, seed=seed)

    nmse = interval(held_out.normalised, _normalized_mse)
    explained = Interval(1 - nmse.value, 1 - nmse.high, 1 - nmse.low)
    raw = interval(held_out.raw, _normalized_mse)
    never = int((held_out.n_fired == 0).sum())
    return [
        as_metric("normalized_mse", nmse, unit="fraction of variance", n=n),
        as_metric("explained_variance", explained, unit="fraction of variance", n=n),
        as_metric("normalized_mse_raw", raw, unit="fraction of variance", n=n),
        as_metric("l0", interval(held_out.codes, ratio(_ACTIVE, _TOKENS)), unit="latents per token", n=n),
        as_metric("cosine", interval(held_out.codes, ratio(_COSINE, _TOKENS)), unit="cosine", n=n),
        share_of_latents("never_fired_fraction", never, len(held_out.n_fired), n),
    ]


def training_metric(training: Tally, *, n_resamples: int, seed: int) -> Metric:
    """normalized_mse_train: normalized_mse on tokens that were trained on; the gap between the two is overfitting."""
    nmse = bootstrap(training.normalised, _normalized_mse, n_resamples=n_resamples, seed=seed)
    return as_metric("normalized_mse_train", nmse, unit="fraction of variance", n=training.n_tokens)


def share_of_latents(name: str, count: int, n_latents: int, n_tokens: int) -> Metric:
    """count / n_latents, seen over a window of n_tokens, with Wilson's interval over latents (`bootstrap.wilson`)."""
    return as_metric(name, wilson(count, n_latents), unit="fraction of latents", n=n_tokens)


def density_histogram(n_fired: Int[Tensor, " n_latents"], n_tokens: int) -> dict[str, Any]:
    """How many latents fire how often: counts by log10(share of tokens), a quarter decade a bin, and `never`.

    The first edge is the decade at or below one firing in n_tokens, the last is 0 (every token). A bin holds its
    lower edge; the last holds both.
    """
    first = -max(1, math.ceil(math.log10(n_tokens)))
    edges = torch.linspace(first, 0, -first * _BINS_PER_DECADE + 1, dtype=torch.float64)
    density = n_fired[n_fired > 0].double().div(n_tokens).log10()
    bins = torch.bucketize(density, edges, right=True).sub(1).clamp(0, len(edges) - 2)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return {
        "edges": edges.tolist(),
        "n_latents": counts.tolist(),
        "never": int((n_fired == 0).sum()),
        "n_tokens": n_tokens,
    }


def _columns(x: Tensor, recons: Tensor, reference: Tensor) -> Tensor:
    shift = x - reference
    error, squares = (x - recons).square().sum(1), shift.square().sum(1)
    return torch.cat([torch.stack([torch.ones_like(error), error, squares], dim=1), shift], dim=1)


def _normalized_mse(totals: Float[Tensor, "*resamples n_sums"]) -> Float[Tensor, "*resamples"]:
    """Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ being the mean of the tokens in the totals."""
    variance = totals[..., _SQUARES] - totals[..., _SHIFT:].square().sum(-1) / totals[..., _TOKENS]
    return totals[..., _ERROR] / variance
