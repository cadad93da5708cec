"""The definition: dense, obvious, slow. Everything faster is compared with this file.

Shapes: B tokens, D = d_model, N latents. The whole [B, N] of pre-activations is formed and torch's autograd
differentiates it; any float dtype works, so that fp64 gives the truth that fp32 implementations are measured against.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.types import FIRED_THRESHOLD, LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

BETA1, BETA2, EPSILON = 0.9, 0.999, 6.25e-10


def pre_activations(x_BD: Float[Tensor, "batch d_model"], weights: Weights) -> Float[Tensor, "batch n_latents"]:
    """encoder (x - pre_bias) + latent_bias."""
    return (x_BD - weights.pre_bias) @ weights.encoder.T + weights.latent_bias


def topk_encode(x_BD: Float[Tensor, "batch d_model"], weights: Weights, k: int) -> SparseLatents:
    """TopK_k of the pre-activations, then ReLU; of equal pre-activations the lower index goes first."""
    values_BN, indices_BN = pre_activations(x_BD, weights).sort(dim=1, descending=True, stable=True)
    return SparseLatents(indices_BN[:, :k], values_BN[:, :k].relu(), len(weights.latent_bias))


def relu_encode(x_BD: Float[Tensor, "batch d_model"], weights: Weights) -> SparseLatents:
    """Every positive pre-activation."""
    return threshold_encode(x_BD, weights, torch.zeros_like(weights.latent_bias))


def threshold_encode(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, threshold_N: Float[Tensor, " n_latents"]
) -> SparseLatents:
    """Every pre-activation above max(threshold, 0), by falling value; k is the most of them on one token."""
    pre_BN = pre_activations(x_BD, weights)
    values_BN = pre_BN.masked_fill(pre_BN <= threshold_N.clamp(min=0), 0)
    n_active = int((values_BN > 0).sum(1).max()) if len(x_BD) else 0
    values, indices = values_BN.sort(dim=1, descending=True, stable=True)
    return SparseLatents(indices[:, :n_active], values[:, :n_active], len(weights.latent_bias))


def decode(latents: SparseLatents, weights: Weights) -> Float[Tensor, "batch d_model"]:
    """z @ decoder + pre_bias."""
    return dense(latents) @ weights.decoder + weights.pre_bias


def dense(latents: SparseLatents) -> Float[Tensor, "batch n_latents"]:
    """The latents as a full matrix."""
    z_BN = latents.values.new_zeros(len(latents.values), latents.n_latents)
    return z_BN.scatter_add(1, latents.indices.masked_fill(latents.values == 0, 0), latents.values)


def sparse_gradients(
    x_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    latents: SparseLatents,
    d_recons_BD: Float[Tensor, "batch d_model"],
    d_active: float = 0.0,
) -> Weights:
    """Gradients of a loss of recons = decode(latents), whose gradient by recons is `d_recons_BD`.

    `latents` are pre-activations of `x_BD`, some of them set to 0; whatever chose them is held constant. `d_active` is
    added to the gradient of every active value: l1_coef / B for l1_coef * mean_b ||z||_1.
    """
    z_BN = dense(latents)
    d_pre_BN = torch.where(z_BN > 0, d_recons_BD @ weights.decoder.T + d_active, 0)
    d_bias_N = d_pre_BN.sum(0)
    return Weights(
        encoder=d_pre_BN.T @ (x_BD - weights.pre_bias),
        latent_bias=d_bias_N,
        decoder=z_BN.T @ d_recons_BD,
        pre_bias=d_recons_BD.sum(0) - d_bias_N @ weights.encoder,
    )


def topk_gradients(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> StepGradients:
    """d(mse + auxk_coef * L_aux) of a TopK autoencoder (Gao et al. 2024, sections 2.2 and A.2)."""
    w = _leaves(weights)
    pre_BN = pre_activations(x_BD, w)
    z_BN = _keep_top(pre_BN, spec.k).relu()
    recons_BD = z_BN @ w.decoder + w.pre_bias
    mse = losses.mse(recons_BD, x_BD, spec.mse_scale)

    auxiliary = mse.new_zeros(())
    n_dead = int(dead_N.sum())
    if spec.auxk and n_dead:
        dead_BN = pre_BN.masked_fill(~dead_N, -torch.inf)
        z_aux_BN = _keep_top(dead_BN, min(spec.auxk, n_dead)).relu()
        auxiliary = losses.auxk(z_aux_BN @ w.decoder, (x_BD - recons_BD).detach())
    dropped = ~auxiliary.isfinite()
    loss = mse if dropped else mse + spec.auxk_coef * auxiliary
    return _step(loss, w, mse, auxiliary, dropped, z_BN)


def relu_gradients(x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec) -> StepGradients:
    """d(mse + l1_coef * mean ||z||_1) of a ReLU autoencoder (the baseline of Gao et al. 2024)."""
    w = _leaves(weights)
    z_BN = pre_activations(x_BD, w).relu()
    mse = losses.mse(z_BN @ w.decoder + w.pre_bias, x_BD, spec.mse_scale)
    auxiliary = losses.l1(z_BN)
    never = torch.zeros_like(auxiliary, dtype=torch.bool)
    return _step(mse + spec.l1_coef * auxiliary, w, mse, auxiliary, never, z_BN)


def apply_update(
    weights: Weights, gradients: Weights, optimizer: OptimizerState, spec: UpdateSpec
) -> Float[Tensor, ""]:
    """Project, clip, Adam, unit norm, average: in place on `weights` and `optimizer`, in that order (section 2).

    The decoder's gradient loses its component along each latent, so that renormalising the rows undoes no progress.
    Returns the gradient's norm over all parameters, after projection and before clipping.
    """
    decoder_gradient = gradients.decoder - (gradients.decoder * weights.decoder).sum(1, keepdim=True) * weights.decoder
    gradients = gradients._replace(decoder=decoder_gradient)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    if spec.clip_norm is not None:
        gradients = Weights(*(g * (spec.clip_norm / norm).clamp(max=1) for g in gradients))
    for w, g, m, v in zip(weights, gradients, optimizer.first, optimizer.second, strict=True):
        m.copy_(BETA1 * m + (1 - BETA1) * g)
        v.copy_(BETA2 * v + (1 - BETA2) * g * g)
        m_hat, v_hat = m / (1 - BETA1**spec.step), v / (1 - BETA2**spec.step)
        w.sub_(spec.lr * m_hat / (v_hat.sqrt() + EPSILON))
    weights.decoder.div_(weights.decoder.norm(dim=1, keepdim=True))
    if optimizer.average is not None:
        for w, a in zip(weights, optimizer.average, strict=True):
            a.copy_(spec.ema * a + (1 - spec.ema) * w)
    return norm


def _leaves(weights: Weights) -> Weights:
    return Weights(*(w.detach().requires_grad_() for w in weights))


def _keep_top(pre_BN: Tensor, k: int) -> Tensor:
    """`pre_BN` with all but each row's k largest entries set to 0."""
    indices_BK = pre_BN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre_BN).scatter(1, indices_BK, pre_BN.gather(1, indices_BK))


def _step(loss: Tensor, w: Weights, mse: Tensor, auxiliary: Tensor, dropped: Tensor, z_BN: Tensor) -> StepGradients:
    return StepGradients(
        gradients=Weights(*torch.autograd.grad(loss, w)),
        loss=loss.detach(),
        mse=mse.detach(),
        auxiliary=auxiliary.detach(),
        auxk_dropped=dropped,
        n_fired=(z_BN > FIRED_THRESHOLD).sum(0),
        l0=(z_BN > 0).sum(1).to(loss.dtype).mean(),
    )
