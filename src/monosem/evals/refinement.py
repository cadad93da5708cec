"""Are the latents' magnitudes the best ones for the latents that were chosen? (Gao et al. 2024, section 5.1)

With the decoder and each token's support fixed, its activations are chosen again to rebuild it best:

    minimise ‖x − pre_bias − Σ_{i active} c_i decoder[i]‖²  over c ≥ 0      (normalised space)

If activations are shrunk, as an L1 penalty shrinks them, c lies above them throughout; if not, c scatters around them.
What the error falls by is what wrong magnitudes cost, apart from wrong supports.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosem.evals.bootstrap import as_metric, bootstrap, ratio
from monosem.evals.reconstruction import ErrorSums
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.types import FIRED_THRESHOLD, Metric

TOLERANCE = 1e-9
"""Largest violation of c ≥ 0 and gradient ≥ 0, relative to the token's largest c and |decoder[i]·(x − pre_bias)|."""

_RIDGE = 1e-12  # of the largest ‖decoder[i]‖²: latents with the same direction share what either could take
_ROWS_AT_ONCE = 1024
_ROUNDS_PER_LATENT = 10
_GRAM_BYTES = 1 << 25  # of the float64 products between the active latents of the tokens solved at once

log = logging.getLogger("monosem")

_PAIRS, _RELATIVE, _PRODUCT, _SQUARE = range(4)  # columns of the shrinkage's sums


@torch.no_grad()
def metrics(
    autoencoder: Autoencoder,
    rows: Float[Tensor, "n_rows d_model"],
    clusters: Int[Tensor, " n_rows"],
    *,
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """refined_normalized_mse, unrefined_normalized_mse on the same raw `rows`; shrinkage and refinement_slope.

    shrinkage: mean of c/z − 1 over active latents that fired (z > FIRED_THRESHOLD; a ratio to less says nothing).
    refinement_slope: Σ c·z / Σ z² over active latents, the slope through 0 of c on z, which large activations decide.
    Without shrinkage they are near 0 and 1. Intervals resample clusters.
    """
    n_clusters, options = int(clusters.max()) + 1, {"n_resamples": n_resamples, "seed": seed}
    refined, unrefined = (ErrorSums(n_clusters, rows.shape[1]) for _ in range(2))
    pairs = torch.zeros(n_clusters, 4, dtype=torch.float64)
    weights = autoencoder.weights
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    for start in progress(starts, "refine", "tok", total=len(rows), each=_ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        x = autoencoder.normalize(rows[part].to(weights.decoder.device))[0]
        latents = autoencoder.encode(x)
        target = (x - weights.pre_bias).double()
        c = refine(target, weights.decoder, latents.indices, latents.values > 0)
        unrefined.add(clusters[part], x, autoencoder.decode(latents))
        refined.add(clusters[part], x, autoencoder.decode(latents._replace(values=c.to(x.dtype))))
        z = latents.values.double()
        fired = z > FIRED_THRESHOLD
        columns = (fired.double(), (c / z - 1).where(fired, 0), c * z, z * z)
        pairs.index_add_(0, clusters[part], torch.stack([column.sum(1) for column in columns], dim=1).cpu())
    n_pairs = int(pairs[:, _PAIRS].sum())
    relative = bootstrap(pairs, ratio(_RELATIVE, _PAIRS), **options)
    slope = bootstrap(pairs, ratio(_PRODUCT, _SQUARE), **options)
    return [
        refined.metric("refined_normalized_mse", **options),
        unrefined.metric("unrefined_normalized_mse", **options),
        as_metric("shrinkage", relative, unit="fraction of the activation", n=n_pairs),
        as_metric("refinement_slope", slope, unit="refined per activation", n=n_pairs),
    ]


def refine(
    target: Float[Tensor, "batch d_model"],
    decoder: Float[Tensor, "n_latents d_model"],
    indices: Int[Tensor, "batch k"],
    active: Bool[Tensor, "batch k"],
) -> Float[Tensor, "batch k"]:
    """The c ≥ 0, 0 where not `active`, that minimise ‖target − Σ_j c_j decoder[indices_j]‖², each to TOLERANCE.

    In float64, with the decoder's rows gathered a few tokens at a time.
    """
    if not indices.numel():
        return target.new_zeros(indices.shape, dtype=torch.float64)
    at_once = max(1, _GRAM_BYTES // (8 * indices.shape[1] * max(indices.shape[1], target.shape[1])))
    found = []
    for part in torch.arange(len(target), device=target.device).split(at_once):
        rows = decoder[indices[part]].double() * active[part][:, :, None]
        gram = rows @ rows.mT
        moments = (rows @ target[part].double()[:, :, None]).squeeze(2)
        found.append(nonnegative_least_squares(gram, moments, active[part]))
    return torch.cat(found)


def nonnegative_least_squares(
    gram: Float[Tensor, "batch k k"], moments: Float[Tensor, "batch k"], allowed: Bool[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """argmin over c ≥ 0 of ½ cᵀ gram c − moments·c, c being 0 where not allowed.

    Block principal pivoting (Kim and Park 2011, SIAM J. Sci. Comput. 33(6)): solve for the free coefficients, the
    others being 0; then free those that are 0 with a negative gradient, and put to 0 those that are negative. All at
    once while that leaves fewer wrong ones than ever before, and three times more; then only the last wrong one at a
    time, which ends (Murty's rule), if perhaps late: a warning says so. Starts with everything allowed free. Only the
    tokens that are not done go on.
    """
    one = torch.eye(gram.shape[1]).to(gram)
    gram = gram + _RIDGE * gram.amax((1, 2), keepdim=True) * one
    c, free = torch.zeros_like(moments), allowed.clone()
    fewest = torch.full_like(allowed[:, 0], gram.shape[1] + 1, dtype=torch.int64)
    patience, todo = torch.full_like(fewest, 3), torch.arange(len(moments), device=moments.device)
    for _ in range(_ROUNDS_PER_LATENT * (gram.shape[1] + 1)):
        system = gram[todo].where(free[todo][:, :, None] & free[todo][:, None, :], one)
        solved = _solve(system, moments[todo].where(free[todo], 0))
        gradient = (gram[todo] @ solved[:, :, None]).squeeze(2) - moments[todo]
        negative = solved < -TOLERANCE * solved.abs().amax(1, keepdim=True)
        downhill = gradient < -TOLERANCE * moments[todo].abs().amax(1, keepdim=True)
        wrong = (free[todo] & negative) | (allowed[todo] & ~free[todo] & downhill)
        c[todo] = solved.clamp(min=0)
        n_wrong, better = wrong.sum(1), wrong.sum(1) < fewest[todo]
        patience[todo] = torch.where(better, 3, patience[todo] - 1)
        fewest[todo] = torch.minimum(fewest[todo], n_wrong)
        last = torch.zeros_like(wrong).scatter_(1, _last(wrong), True) & wrong
        free[todo] ^= wrong.where((better | (patience[todo] >= 0))[:, None], last)
        todo = todo[n_wrong > 0]
        if not len(todo):
            return c
    log.warning("%d tokens were not refined to the tolerance: what is said of them is too little", len(todo))
    return c


def _solve(system: Float[Tensor, "batch k k"], right: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
    """system⁻¹ right, by Cholesky: every system is positive definite."""
    return torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(system)).squeeze(2)


def _last(wrong: Bool[Tensor, "batch k"]) -> Int[Tensor, "batch 1"]:
    """The column of each row's last true entry."""
    columns = torch.arange(1, wrong.shape[1] + 1, device=wrong.device)
    return (wrong * columns).argmax(1, keepdim=True)
