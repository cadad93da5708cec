"""The definition: dense, obvious, slow. Everything faster is compared with this file.

Shapes: B tokens, D = d_model, N latents. The whole [B, N] of pre-activations is formed and torch's autograd
differentiates it; any float dtype works, so that fp64 gives the truth that fp32 implementations are measured against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.kernels.checks import (
    ANY,
    check_encode,
    check_latents,
    check_sparse,
    check_step,
    check_threshold,
    check_update,
    check_weights,
)
from monosem.types import (
    FIRED_THRESHOLD,
    Extras,
    LossSpec,
    LossTerms,
    OptimizerState,
    SparseLatents,
    StepGradients,
    UpdateSpec,
    Weights,
)

BETA1, BETA2, EPSILON = 0.9, 0.999, 6.25e-10


def pre_activations(x_BD: Float[Tensor, "batch d_model"], weights: Weights) -> Float[Tensor, "batch n_latents"]:
    """encoder (x - pre_bias) + latent_bias."""
    return (x_BD - weights.pre_bias) @ weights.encoder.T + weights.latent_bias


def topk_encode(x_BD: Float[Tensor, "batch d_model"], weights: Weights, k: int) -> SparseLatents:
    """TopK_k of the pre-activations, then ReLU; of equal pre-activations the lower index goes first."""
    check_encode(ANY, x_BD, weights, k)
    values_BN, indices_BN = pre_activations(x_BD, weights).sort(dim=1, descending=True, stable=True)
    return SparseLatents(indices_BN[:, :k], values_BN[:, :k].relu(), len(weights.latent_bias))


def relu_encode(x_BD: Float[Tensor, "batch d_model"], weights: Weights) -> SparseLatents:
    """Every positive pre-activation."""
    check_encode(ANY, x_BD, weights)
    return threshold_encode(x_BD, weights, torch.zeros_like(weights.latent_bias))


def threshold_encode(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, threshold_N: Float[Tensor, " n_latents"]
) -> SparseLatents:
    """Every pre-activation above max(threshold, 0), by falling value; k is the most of them on one token."""
    check_encode(ANY, x_BD, weights)
    check_threshold(ANY, threshold_N, weights)
    pre_BN = pre_activations(x_BD, weights)
    values_BN = pre_BN.masked_fill(pre_BN <= threshold_N.clamp(min=0), 0)
    n_active = int((values_BN > 0).sum(1).max()) if len(x_BD) else 0
    values, indices = values_BN.sort(dim=1, descending=True, stable=True)
    return SparseLatents(indices[:, :n_active], values[:, :n_active], len(weights.latent_bias))


def decode(latents: SparseLatents, weights: Weights) -> Float[Tensor, "batch d_model"]:
    """z @ decoder + pre_bias."""
    check_weights(ANY, weights)
    check_latents(ANY, latents, weights)
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
    added to the gradient of every active value: sparsity_coef / B for sparsity_coef * mean_b ||z||_1.
    """
    check_sparse(ANY, x_BD, weights, latents, d_recons_BD)
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
    """d `topk_loss`."""
    check_step(ANY, x_BD, weights, spec, dead_N)
    return differentiate(topk_loss, x_BD, weights, {}, spec, dead_N)


def relu_gradients(x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec) -> StepGradients:
    """d `relu_loss`."""
    check_step(ANY, x_BD, weights, spec, keeps_k=False)
    return differentiate(relu_loss, x_BD, weights, {}, spec, torch.zeros_like(weights.latent_bias, dtype=torch.bool))


def topk_loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    """mse + auxk_coef * L_aux of a TopK autoencoder (Gao et al. 2024, sections 2.2 and A.2)."""
    pre_BN = pre_activations(x_BD, w)
    z_BN = keep_top(pre_BN, spec.k).relu()
    recons_BD = z_BN @ w.decoder + w.pre_bias
    mse = losses.mse(recons_BD, x_BD, spec.mse_scale)
    auxiliary, dropped = auxk(pre_BN, x_BD - recons_BD, w, spec, dead_N)
    return LossTerms(mse if dropped else mse + spec.auxk_coef * auxiliary, mse, auxiliary, z_BN, dropped)


def relu_loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    """mse + sparsity_coef * mean ||z||_1 of a ReLU autoencoder (the baseline of Gao et al. 2024)."""
    z_BN = pre_activations(x_BD, w).relu()
    mse = losses.mse(z_BN @ w.decoder + w.pre_bias, x_BD, spec.mse_scale)
    l1 = losses.l1(z_BN)
    return LossTerms(mse + spec.sparsity_coef * l1, mse, l1, z_BN)


def auxk(
    pre_BN: Float[Tensor, "batch n_latents"],
    error_BD: Float[Tensor, "batch d_model"],
    w: Weights,
    spec: LossSpec,
    dead_N: Bool[Tensor, " n_latents"],
) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
    """L_aux, of the top `auxk` dead latents, and whether it is to be dropped because it is not finite (section A.2)."""
    auxiliary = error_BD.new_zeros(())
    n_dead = int(dead_N.sum())
    if spec.auxk and n_dead:
        z_BN = keep_top(pre_BN.masked_fill(~dead_N, -torch.inf), min(spec.auxk, n_dead)).relu()
        auxiliary = losses.auxk(z_BN @ w.decoder, error_BD.detach())
    return auxiliary, ~auxiliary.isfinite()


def keep_top(pre_BN: Float[Tensor, "batch n_latents"], k: int) -> Float[Tensor, "batch n_latents"]:
    """`pre_BN` with all but each row's k largest entries set to 0."""
    indices_BK = pre_BN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre_BN).scatter(1, indices_BK, pre_BN.gather(1, indices_BK))


def differentiate(
    loss: Callable[..., LossTerms],
    x_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead_N: Bool[Tensor, " n_latents"],
) -> StepGradients:
    """What autograd says of `loss(x, weights, extras, spec, dead)`, by the weights and all extras but its buffers."""
    w = Weights(*(p.detach().requires_grad_() for p in weights))
    leaves = {name: p.detach().requires_grad_() for name, p in extras.items()}
    terms = loss(x_BD, w, leaves, spec, dead_N)
    buffers = {name: value.detach() for name, value in (terms.buffers or {}).items()}
    never = torch.zeros_like(terms.loss, dtype=torch.bool)
    trained = {name: leaf for name, leaf in leaves.items() if name not in buffers}
    gradients = torch.autograd.grad(terms.loss, [*w, *trained.values()])
    return StepGradients(
        gradients=Weights(*gradients[: len(w)]),
        loss=terms.loss.detach(),
        mse=terms.mse.detach(),
        auxiliary=terms.auxiliary.detach(),
        auxk_dropped=never if terms.auxk_dropped is None else terms.auxk_dropped,
        n_fired=(terms.z > FIRED_THRESHOLD).sum(0),
        l0=(terms.z > 0).sum(1).to(x_BD.dtype).mean(),
        extras=dict(zip(trained, gradients[len(w) :], strict=True)),
        buffers=buffers,
    )


def apply_update(
    weights: Weights, gradients: Weights, optimizer: OptimizerState, spec: UpdateSpec
) -> Float[Tensor, ""]:
    """Project, clip, Adam, unit norm, average: in place on `weights` and `optimizer`, in that order (section 2).

    The decoder's gradient loses its component along each latent, so that renormalising the rows undoes no progress.
    Returns the gradient's norm over all parameters, after projection and before clipping.
    """
    check_update(ANY, weights, gradients, optimizer, spec)
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
