"""ProLU (Taggart 2024, "ProLU: A Nonlinearity for Sparse Autoencoders"): the bias decides, but is not in the value.

    m    = encoder (x - pre_bias)
    z    = m where m > 0 and m + latent_bias > 0, else 0
    loss = mse + sparsity_coef * mean_b ||z||_1

So a negative bias silences noise without shrinking what passes. z does not change with the bias but where it jumps, so
the bias gets a made-up gradient. With g the gradient of z where z > 0, and 0 elsewhere,

    ste = 0: d_m = g,             d_bias = g                as if z were ReLU(m + bias)
    ste = 1: d_m = g + g * m,     d_bias = g * m            z = ReLU(m) * H(m + bias), the step H having ReLU's gradient
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.types import Extras, LossSpec, LossTerms, SparseLatents, Weights
from monosem.variants import by_rows

USES = ("sparsity_coef",)
OPTIONS = {"ste": (1, 0, 1)}


def loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    m_BN = (x_BD - w.pre_bias) @ w.encoder.T
    z_BN = ProLU.apply(m_BN, w.latent_bias.expand_as(m_BN), spec.options["ste"])
    mse = losses.mse(z_BN @ w.decoder + w.pre_bias, x_BD, spec.mse_scale)
    l1 = losses.l1(z_BN)
    return LossTerms(mse + spec.sparsity_coef * l1, mse, l1, z_BN)


gradients = by_rows(loss)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    """m where it is above max(-latent_bias, 0)."""
    unbiased = weights._replace(latent_bias=torch.zeros_like(weights.latent_bias))
    return kernel.threshold_encode(x, unbiased, -weights.latent_bias)


class ProLU(torch.autograd.Function):
    """z of m and the bias, both [batch, n_latents], with the gradient rule above."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, bias: Tensor, ste: float) -> Tensor:
        z = torch.where((m > 0) & (m + bias > 0), m, 0)
        ctx.save_for_backward(z)
        ctx.ste = ste
        return z

    @staticmethod
    def backward(ctx: Any, d_z: Tensor) -> tuple[Tensor, Tensor, None]:
        (z,) = ctx.saved_tensors
        g = torch.where(z > 0, d_z, 0)
        return (g + g * z, g * z, None) if ctx.ste else (g, g, None)
