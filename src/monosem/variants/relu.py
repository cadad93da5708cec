"""ReLU + L1, the baseline of Gao et al. 2024 (as in Bricken et al. 2023): every positive latent, and a price on size.

    z    = ReLU(encoder (x - pre_bias) + latent_bias)
    loss = mse + sparsity_coef * mean_b ||z||_1

The price is paid by large activations too, so that they come out too small (shrinkage). The decoder's rows have norm 1,
or the price could be dodged by growing them.
"""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from monosem.kernels import reference
from monosem.types import Extras, LossSpec, SparseLatents, StepGradients, Weights

USES = ("sparsity_coef",)
OPTIONS: dict[str, tuple[float, float, float]] = {}

loss = reference.relu_loss


def gradients(
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    kernel: ModuleType,
) -> StepGradients:
    return kernel.relu_gradients(x, weights, spec)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    return kernel.relu_encode(x, weights)
