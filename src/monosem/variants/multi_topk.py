"""Multi-TopK (Gao et al. 2024, section 5.3): TopK whose code is progressive, good at every number of latents kept.

    L(k') = mse of decoding the k' latents with the largest pre-activations
    loss  = L(k) + L(4k) / 8 + auxk_coef * L_aux

TopK alone gets worse when more than its k latents are kept; this pays a little at k for improving far beyond. Fired,
dead and L0 are of the k latents alone: the other 3k are a regulariser, not part of the code.
"""

from __future__ import annotations

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from monosem import losses
from monosem.kernels import reference
from monosem.types import Extras, LossSpec, LossTerms, SparseLatents, StepGradients, Weights
from monosem.variants._sparse import finished_step, nested_gradients

USES = ("k", "auxk")
OPTIONS: dict[str, tuple[float, float, float]] = {}

MULTIPLE, COEF = 4, 1 / 8


def loss(
    x_BD: Float[Tensor, "batch d_model"], w: Weights, extras: Extras, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> LossTerms:
    pre_BN = reference.pre_activations(x_BD, w)
    z_BN = reference.keep_top(pre_BN, spec.k).relu()
    recons_BD = z_BN @ w.decoder + w.pre_bias
    mse = losses.mse(recons_BD, x_BD, spec.mse_scale)
    wide_BD = reference.keep_top(pre_BN, MULTIPLE * spec.k).relu() @ w.decoder + w.pre_bias
    total = mse + COEF * losses.mse(wide_BD, x_BD, spec.mse_scale)
    auxiliary, dropped = reference.auxk(pre_BN, x_BD - recons_BD, w, spec, dead_N)
    return LossTerms(total if dropped else total + spec.auxk_coef * auxiliary, mse, auxiliary, z_BN, dropped)


def gradients(
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    kernel: ModuleType,
) -> StepGradients:
    """The 4k largest are selected once; the first k of them are one group of latents, the rest another."""
    wide = kernel.topk_encode(x, weights, min(MULTIPLE * spec.k, len(weights.latent_bias)), spec.precision)
    order = wide.values.sort(dim=1, descending=True, stable=True)
    indices = wide.indices.gather(1, order.indices)
    parts = slice(spec.k), slice(spec.k, None)
    top, rest = (SparseLatents(indices[:, part], order.values[:, part], wide.n_latents) for part in parts)
    into, recons = nested_gradients(x, weights, spec, [top, rest], [1.0, COEF], kernel)
    narrow_loss, wide_loss = (losses.mse(r, x, spec.mse_scale) for r in recons)
    return finished_step(into, x, weights, spec, dead, top, recons[0], narrow_loss + COEF * wide_loss)


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, k: int, kernel: ModuleType
) -> SparseLatents:
    """As TopK."""
    return kernel.topk_encode(x, weights, k)
