"""JumpReLU (Rajamanoharan et al. 2024b, arXiv 2407.14435): a threshold a latent, and a price on the number of them.

    z    = p where p > theta, else 0;     p = encoder (x - pre_bias) + latent_bias,  theta = exp(log_threshold)
    loss = mse + sparsity_coef * mean_b ||z||_0

What passes is not shrunk. z and its count jump at theta and have no gradient there; theta learns from the tokens whose
p is near it. With K(u) = 1 for |u| < 1/2 (a kernel density estimate of bandwidth e; section 4 of the paper),

    dz / d theta       = -theta / e * K((p - theta) / e)
    d||z||_0 / d theta = -1 / e * K((p - theta) / e)

and d||z||_0 / dp = 0: the price moves thresholds only. The paper's inputs have norm 1, ours sqrt(d_model - 1), so
e = bandwidth * sqrt(d_model). At the start theta = initial_threshold * ||encoder row||: in standard deviations of p.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.kernels import reference
from monosem.types import Extras, LossSpec, LossTerms, SparseLatents, Weights
from monosem.variants import by_rows

USES = ("sparsity_coef",)
OPTIONS = {"bandwidth": (0.01, 1e-9, 1e3), "initial_threshold": (1.0, 1e-9, 1e3)}


def extras(weights: Weights, options: dict[str, float]) -> Extras:
    """log_threshold [n_latents]."""
    return {"log_threshold": (options["initial_threshold"] * weights.encoder.norm(dim=1)).log()}


def loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    bandwidth = spec.options["bandwidth"] * math.sqrt(x_BD.shape[1])
    pre_BN = reference.pre_activations(x_BD, w)
    threshold_BN = extras["log_threshold"].exp().expand_as(pre_BN)
    z_BN = JumpReLU.apply(pre_BN, threshold_BN, bandwidth)
    mse = losses.mse(z_BN @ w.decoder + w.pre_bias, x_BD, spec.mse_scale)
    l0 = Step.apply(pre_BN, threshold_BN, bandwidth).sum(1).mean()
    return LossTerms(mse + spec.sparsity_coef * l0, mse, l0, z_BN)


gradients = by_rows(loss)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    return kernel.threshold_encode(x, weights, extras["log_threshold"].exp())


class JumpReLU(torch.autograd.Function):
    """p where p > theta; both [batch, n_latents]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.bandwidth = bandwidth
        return torch.where(p > theta, p, 0)

    @staticmethod
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor, Tensor, None]:
        p, theta = ctx.saved_tensors
        return torch.where(p > theta, d_z, 0), -d_z * theta * _density(p, theta, ctx.bandwidth), None


class Step(torch.autograd.Function):
    """1 where p > theta; both [batch, n_latents]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.bandwidth = bandwidth
        return (p > theta).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, d_step: Tensor) -> tuple[None, Tensor, None]:
        p, theta = ctx.saved_tensors
        return None, -d_step * _density(p, theta, ctx.bandwidth), None


def _density(p: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """K((p - theta) / bandwidth) / bandwidth."""
    return ((p - theta).abs() < bandwidth / 2).to(p.dtype) / bandwidth
