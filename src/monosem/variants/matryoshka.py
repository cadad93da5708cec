"""Matryoshka (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries, each of which must do by itself.

    z    = as BatchTopK's
    L(m) = mse of z[:m] decoder[:m] + pre_bias
    loss = mean of L(m) over n_prefixes prefixes m = n_latents, n_latents / 2, n_latents / 4, ... + auxk_coef * L_aux

The first latents have to reconstruct without the later ones, so they stay general instead of being split and absorbed
as a dictionary grows. The mean, where the paper has the sum: so the loss starts near 1 and AuxK keeps its weight. L_aux
is on what all latents leave; L0, fired and the threshold are of all of them too.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.kernels import reference
from monosem.types import Extras, LossSpec, LossTerms, StepGradients, Weights
from monosem.variants import batch_topk
from monosem.variants._sparse import compact, finished_step, nested_gradients

USES = ("k", "auxk")
OPTIONS = {"n_prefixes": (5, 1, 64)}

extras, encode = batch_topk.extras, batch_topk.encode


def check(options: dict[str, float], n_latents: int) -> None:
    """The smallest prefix must hold a latent."""
    n_prefixes, most = int(options["n_prefixes"]), n_latents.bit_length()
    if n_prefixes > most:
        raise ValueError(f"n_prefixes is {n_prefixes}, too many halvings of {n_latents} latents; give at most {most}")


def prefixes(n_latents: int, options: dict[str, float]) -> list[int]:
    """The sizes of the nested dictionaries, smallest first."""
    return [n_latents >> halvings for halvings in reversed(range(int(options["n_prefixes"])))]


def loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    pre_BN = reference.pre_activations(x_BD, w)
    z_BN = batch_topk.keep_largest(pre_BN.relu(), len(x_BD) * spec.k)
    recons = [z_BN[:, :m] @ w.decoder[:m] + w.pre_bias for m in prefixes(z_BN.shape[1], spec.options)]
    nested = [losses.mse(recons_BD, x_BD, spec.mse_scale) for recons_BD in recons]
    total = torch.stack(nested).mean()
    auxiliary, dropped = reference.auxk(pre_BN, x_BD - recons[-1], w, spec, dead_N)
    total = total if dropped else total + spec.auxk_coef * auxiliary
    threshold = batch_topk.moved(extras["threshold"], z_BN)
    return LossTerms(total, nested[-1], auxiliary, z_BN, dropped, {"threshold": threshold})


def gradients(
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    kernel: ModuleType,
) -> StepGradients:
    """A group of latents is those that the smallest prefix to hold them has and the one before it has not."""
    latents = batch_topk.select(x, weights, spec, kernel)
    sizes = prefixes(latents.n_latents, spec.options)
    group_BK = torch.bucketize(latents.indices, torch.tensor(sizes, device=x.device), right=True)
    groups = [compact(latents._replace(values=latents.values.masked_fill(group_BK != g, 0))) for g in range(len(sizes))]
    into, recons = nested_gradients(x, weights, spec, groups, [1 / len(sizes)] * len(sizes), kernel)
    total = torch.stack([losses.mse(r, x, spec.mse_scale) for r in recons]).mean()
    buffers = {"threshold": batch_topk.moved(extras["threshold"], latents.values)}
    return finished_step(into, x, weights, spec, dead, latents, recons[-1], total, buffers)
