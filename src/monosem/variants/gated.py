"""Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): one path decides which latents are active, another how much.

    pi   = encoder (x - pre_bias) + latent_bias                                 the gate
    mag  = exp(r_mag) * encoder (x - pre_bias) + mag_bias                       the same directions, rescaled
    z    = ReLU(mag) where pi > 0, else 0
    loss = mse + sparsity_coef * mean_b ||ReLU(pi)||_1 + mse of frozen(ReLU(pi))

The L1 price falls on the gate alone, so z is not shrunk. The step of the gate has no gradient: encoder and latent_bias
learn when to open it from the price and the last term, in which ReLU(pi) reconstructs x through a decoder and an output
pre_bias that are held constant; the encoder learns from the magnitudes too.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.types import Extras, LossSpec, LossTerms, SparseLatents, Weights
from monosem.variants import by_rows

USES = ("sparsity_coef",)
OPTIONS: dict[str, tuple[float, float, float]] = {}


def extras(weights: Weights, options: dict[str, float]) -> Extras:
    """r_mag and mag_bias [n_latents], both 0: at the start z is ReLU(pi)."""
    return {name: torch.zeros_like(weights.latent_bias) for name in ("r_mag", "mag_bias")}


def loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    m_BN = (x_BD - w.pre_bias) @ w.encoder.T
    gate_BN = m_BN + w.latent_bias
    mag_BN = extras["r_mag"].exp() * m_BN + extras["mag_bias"]
    z_BN = torch.where(gate_BN > 0, mag_BN.relu(), 0)
    mse = losses.mse(z_BN @ w.decoder + w.pre_bias, x_BD, spec.mse_scale)
    by_gate_BD = gate_BN.relu() @ w.decoder.detach() + w.pre_bias.detach()
    l1 = losses.l1(gate_BN.relu())
    return LossTerms(mse + spec.sparsity_coef * l1 + losses.mse(by_gate_BD, x_BD, spec.mse_scale), mse, l1, z_BN)


gradients = by_rows(loss)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    """mag where it is above max(mag at pi = 0, 0): as the paper shows, a trained gate is a threshold."""
    scale_N = extras["r_mag"].exp()
    magnitudes = weights._replace(encoder=scale_N[:, None] * weights.encoder, latent_bias=extras["mag_bias"])
    return kernel.threshold_encode(x, magnitudes, extras["mag_bias"] - scale_N * weights.latent_bias)
