"""TopK (Gao et al. 2024, section 2.2): the k latents with the largest pre-activations, whatever their size.

    z    = ReLU(TopK_k(encoder (x - pre_bias) + latent_bias))
    loss = mse + auxk_coef * L_aux

The gradient is that of the chosen latents, as if the choice were fixed. Without a penalty there is nothing to shrink
the activations and nothing to tune for sparsity: L0 is k. AuxK (section A.2) revives latents that stopped firing.
"""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from monosem.kernels import reference
from monosem.types import Extras, LossSpec, SparseLatents, StepGradients, Weights

USES = ("k", "auxk")
OPTIONS: dict[str, tuple[float, float, float]] = {}

loss = reference.topk_loss


def gradients(
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    kernel: ModuleType,
) -> StepGradients:
    return kernel.topk_gradients(x, weights, spec, dead)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    return kernel.topk_encode(x, weights, k)
