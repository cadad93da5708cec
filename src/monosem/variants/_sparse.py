"""The step of activation functions that keep few latents: their gradients out of the kernels' sparse primitives."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from monosem import losses
from monosem.kernels import torch_sparse
from monosem.types import Extras, LossSpec, SparseLatents, StepGradients, Weights


def nested_gradients(
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    spec: LossSpec,
    groups: Sequence[SparseLatents],
    coefs: Sequence[float],
    kernel: ModuleType,
) -> tuple[Weights, list[Float[Tensor, "batch d_model"]]]:
    """Gradients of sum_g coefs[g] * mse_g, where mse_g is that of decoding groups 0 to g; and those reconstructions.

    A latent of group g is in the reconstructions g and later, so its gradient by recons is the sum of theirs. All
    groups go through the kernel at once, as so many copies of the batch.
    """
    recons = [kernel.decode(groups[0], weights)]
    for group in groups[1:]:
        recons.append(recons[-1] + (kernel.decode(group, weights) - weights.pre_bias))
    d_recons = [(r - x) * (2 * coef * spec.mse_scale / x.numel()) for r, coef in zip(recons, coefs, strict=True)]
    for g in reversed(range(len(groups) - 1)):
        d_recons[g] += d_recons[g + 1]
    stacked = torch.cat([x] * len(groups)), weights, _stack(groups), torch.cat(d_recons)
    gradients = kernel.sparse_gradients(*stacked)
    for later in d_recons[1:]:  # already in the first: each reconstruction has pre_bias once
        gradients.pre_bias.sub_(later.sum(0))
    return gradients, recons


def compact(latents: SparseLatents) -> SparseLatents:
    """The same latents by falling value, without the slots that no token uses (but one)."""
    width = max(1, int((latents.values > 0).sum(1).max()))
    kept = latents.values.topk(width, dim=1)
    return latents._replace(indices=latents.indices.gather(1, kept.indices), values=kept.values)


def finished_step(
    gradients: Weights,
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    latents: SparseLatents,
    recons: Float[Tensor, "batch d_model"],
    loss: Float[Tensor, ""],
    buffers: Extras | None = None,
) -> StepGradients:
    """The whole step: AuxK on what `recons`, of `latents`, leaves, added to `gradients` of `loss`; what to report."""
    auxiliary, dropped = loss.new_zeros(()), torch.zeros_like(loss, dtype=torch.bool)
    if spec.auxk:
        centred, error = x - weights.pre_bias, x - recons
        auxiliary, dropped = torch_sparse.add_auxk_gradients(gradients, centred, error, weights, spec, dead)
    return StepGradients(
        gradients=gradients,
        loss=torch.where(dropped, loss, loss + spec.auxk_coef * auxiliary),
        mse=losses.mse(recons, x, spec.mse_scale),
        auxiliary=auxiliary,
        auxk_dropped=dropped,
        n_fired=torch_sparse.count_fired(latents),
        l0=(latents.values > 0).sum(1).to(x.dtype).mean(),
        buffers=buffers or {},
    )


def _stack(groups: Sequence[SparseLatents]) -> SparseLatents:
    """The groups one below the other, padded with inactive slots."""
    width = max(group.values.shape[1] for group in groups)
    pads = [(0, width - group.values.shape[1]) for group in groups]
    indices = torch.cat([F.pad(group.indices, pad) for group, pad in zip(groups, pads, strict=True)])
    values = torch.cat([F.pad(group.values, pad) for group, pad in zip(groups, pads, strict=True)])
    return SparseLatents(indices, values, groups[0].n_latents)
