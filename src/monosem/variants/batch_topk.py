"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the B k largest activations of the batch, k a token on average.

    z    = ReLU(encoder (x - pre_bias) + latent_bias), all but the B k largest of the whole batch set to 0
    loss = mse + auxk_coef * L_aux

Hard tokens may take more latents than easy ones. A token's latents then depend on the rest of its batch, so that once
trained a fixed threshold stands in for the choice: z is kept where it is above `threshold`, the running mean over
batches of the smallest activation that was kept.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.kernels import reference
from monosem.types import Extras, LossSpec, LossTerms, SparseLatents, StepGradients, Weights
from monosem.variants._sparse import compact, finished_step, nested_gradients

USES = ("k", "auxk")
OPTIONS: dict[str, tuple[float, float, float]] = {}

THRESHOLD_MOMENTUM = 0.9


def extras(weights: Weights, options: dict[str, float]) -> Extras:
    """threshold []: 0 before the first batch."""
    return {"threshold": weights.latent_bias.new_zeros(())}


def loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    pre_BN = reference.pre_activations(x_BD, w)
    z_BN = keep_largest(pre_BN.relu(), len(x_BD) * spec.k)
    recons_BD = z_BN @ w.decoder + w.pre_bias
    mse = losses.mse(recons_BD, x_BD, spec.mse_scale)
    auxiliary, dropped = reference.auxk(pre_BN, x_BD - recons_BD, w, spec, dead_N)
    total = mse if dropped else mse + spec.auxk_coef * auxiliary
    return LossTerms(total, mse, auxiliary, z_BN, dropped, {"threshold": moved(extras["threshold"], z_BN)})


def gradients(
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    kernel: ModuleType,
) -> StepGradients:
    latents = select(x, weights, spec, kernel)
    into, (recons,) = nested_gradients(x, weights, spec, [latents], [1.0], kernel)
    buffers = {"threshold": moved(extras["threshold"], latents.values)}
    mse = losses.mse(recons, x, spec.mse_scale)
    return finished_step(into, x, weights, spec, dead, latents, recons, mse, buffers)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    """Above the threshold; before there is one, the k largest of each token."""
    if extras["threshold"] == 0:
        return kernel.topk_encode(x, weights, k)
    return kernel.threshold_encode(x, weights, extras["threshold"].expand_as(weights.latent_bias))


def select(x: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec, kernel: ModuleType) -> SparseLatents:
    """The B k largest positive pre-activations of the batch, exactly.

    They are looked for among each token's 4k largest. A token all of whose candidates were kept may have more to keep:
    then twice as many are taken of all.
    """
    width = 4 * spec.k
    while True:
        width = min(width, len(weights.latent_bias))
        found = kernel.topk_encode(x, weights, width, spec.precision)
        kept = found._replace(values=keep_largest(found.values, len(x) * spec.k))
        if width == len(weights.latent_bias) or not (kept.values > 0).all(dim=1).any():
            return compact(kept)
        width *= 2


def keep_largest(values: Float[Tensor, "batch n"], n: int) -> Float[Tensor, "batch n"]:
    """`values` with all but the n largest of the whole batch set to 0."""
    flat = values.flatten()
    top = flat.topk(min(n, len(flat)), sorted=False).indices
    return torch.zeros_like(flat).scatter(0, top, flat[top]).view_as(values)


def moved(threshold: Float[Tensor, ""], kept: Float[Tensor, "batch n"]) -> Float[Tensor, ""]:
    """The threshold after a batch whose activations are `kept`: the first one's smallest, then a running mean.

    A batch without any activation leaves it as it is.
    """
    kept = kept.detach()
    smallest = torch.where(kept > 0, kept, torch.inf).min()
    after = torch.where(threshold > 0, torch.lerp(smallest, threshold, THRESHOLD_MOMENTUM), smallest)
    return torch.where(smallest.isfinite(), after, threshold)
