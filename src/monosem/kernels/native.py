"""The step in compiled code (native/), for fp32 tensors on the CPU: the same functions as `torch_sparse`.

The dense product is fused with the selection, so that [B, N] never exists, and may be taken in bf16 or int8: it only
has to find every latent that could be among the top k. The values of latents are always fp32 dot products summed in
one order, so that every precision gives the same bits, whatever the number of threads. For fp32 and bf16 that is
proven. int8 is so coarse that it takes an assumption about its rounding errors; "auto" takes it where it is the fastest
and audits it: some rows are compared with their true top k, and where one latent was missed, the batch is selected
again in fp32.

NaN or Inf in a row of x makes that row's values NaN, in the weights every value; the loss is then NaN. Equal values:
the lower index first.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import torch  # before _native: the OpenMP runtime that torch brings is then the one that both use
from jaxtyping import Bool, Float
from torch import Tensor

from monosem import _native
from monosem.kernels import checks, torch_sparse
from monosem.kernels.checks import readable
from monosem.kernels.reference import BETA1, BETA2, EPSILON
from monosem.types import FIRED_THRESHOLD, LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

__all__ = [
    "apply_update",
    "choose_precision",
    "decode",
    "fastest_precision",
    "relu_encode",
    "relu_gradients",
    "sparse_gradients",
    "threshold_encode",
    "topk_encode",
    "topk_gradients",
    "topk_step",
]

LEVEL_VARIABLE = "MONOSEM_NATIVE_LEVEL"
"""Environment variable that forces a dispatch level by name; `_native.levels()` lists those of this machine."""

_PRECISIONS = ("auto", "fp32", "bf16", "int8")
_CANDIDATES = ("int8", "fp32", "bf16")
"""The first, unless a later one takes less than _CLEARLY_FASTER of its time: noise must not change the choice."""
_UNPROVEN = ("int8",)
_CLEARLY_FASTER = 0.67

AUDIT_EVERY = 1024
"""One row in so many is audited where the precision is "auto"."""
_PROBE_ROWS, _PROBE_LATENTS, _PROBE_WIDTH = 256, 4096, 512
_PROBE_AUDIT = 64

HOME = checks.Home(
    lambda t: t.dtype == torch.float32 and t.device.type == "cpu",
    "impl=native takes float32 on the CPU: convert it or use impl=torch",
    strict=True,
)

log = logging.getLogger("monosem")

if LEVEL_VARIABLE in os.environ:
    _native.set_level(os.environ[LEVEL_VARIABLE])


def topk_encode(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, k: int, precision: str = "auto"
) -> SparseLatents:
    """As `reference.topk_encode`; `precision` is that of the product that selects, and changes nothing but the time.

    "auto" is `fastest_precision`, audited.
    """
    checks.check_encode(HOME, x_BD, weights, k)
    return _topk_encode(x_BD, weights, k, precision)[0]


def _topk_encode(
    x_BD: Tensor, weights: Weights, k: int, precision: str, audit: Sequence[int] = ()
) -> tuple[SparseLatents, dict[str, Any]]:
    x_BD, weights = readable(x_BD), _readable(weights)
    indices = torch.empty(len(x_BD), k, dtype=torch.int64)
    values = torch.empty(len(x_BD), k)
    product, rows = _audited(precision, audit, len(x_BD))
    stats = _native.topk_encode(x_BD, weights, k, product, indices, values, rows)
    _log_stats(stats, len(x_BD), precision)
    return SparseLatents(indices, values, len(weights.latent_bias)), stats


def fastest_precision(*, exact: bool = False) -> str:
    """The precision whose product selects fastest on this machine, measured once a process on a small problem.

    `exact`: only of those that are proven to miss nothing.
    """
    return _fastest(_native.level(), exact)


@functools.cache
def _fastest(level: str, exact: bool) -> str:
    candidates = [p for p in _CANDIDATES if (_native.has_low() or p == "fp32") and not (exact and p in _UNPROVEN)]
    if len(candidates) == 1:
        return candidates[0]
    generator = torch.Generator().manual_seed(0)
    x, encoder = (torch.randn(n, _PROBE_WIDTH, generator=generator) for n in (_PROBE_ROWS, _PROBE_LATENTS))
    weights = Weights(encoder, torch.zeros(_PROBE_LATENTS), encoder, torch.zeros(_PROBE_WIDTH))
    seconds = {precision: min(_seconds_to_encode(x, weights, precision) for _ in range(3)) for precision in candidates}
    best = candidates[0]
    for precision in candidates[1:]:
        if seconds[precision] < _CLEARLY_FASTER * seconds[best]:
            best = precision
    log.debug("kernels: level %s, fastest%s product: %s of %s", level, " exact" if exact else "", best, seconds)
    return best


def _seconds_to_encode(x_BD: Tensor, weights: Weights, precision: str) -> float:
    started = time.perf_counter()
    _topk_encode(x_BD, weights, 32, precision)
    return time.perf_counter() - started


def choose_precision(x_BD: Float[Tensor, "batch d_model"], weights: Weights, k: int) -> str:
    """`fastest_precision` if it finds the true top k of these rows among few candidates; else an exact one."""
    precision = fastest_precision()
    if precision not in _UNPROVEN:
        return precision
    x_BD = x_BD[:_PROBE_ROWS]
    stats = _topk_encode(x_BD, weights, k, precision, range(min(len(x_BD), _PROBE_AUDIT)))[1]
    return fastest_precision(exact=True) if stats["n_missed"] or _is_saturated(stats, len(x_BD)) else precision


def relu_encode(x_BD: Float[Tensor, "batch d_model"], weights: Weights) -> SparseLatents:
    """As `reference.relu_encode`."""
    checks.check_encode(HOME, x_BD, weights)
    return threshold_encode(x_BD, weights, torch.zeros_like(weights.latent_bias))


def threshold_encode(
    x_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    threshold_N: Float[Tensor, " n_latents"],
    precision: str = "auto",
) -> SparseLatents:
    """As `reference.threshold_encode`, out of the same sweep as the top k; dense in torch where too much is above.

    "auto" is the fastest precision that is proven to miss nothing.
    """
    checks.check_encode(HOME, x_BD, weights)
    checks.check_threshold(HOME, threshold_N, weights)
    latents = _sparse_threshold_encode(x_BD, weights, threshold_N, precision)
    return torch_sparse.threshold_encode(x_BD, weights, threshold_N) if latents is None else latents


def _sparse_threshold_encode(
    x_BD: Tensor, weights: Weights, threshold_N: Tensor, precision: str
) -> SparseLatents | None:
    """None where more than 1 in 16 latents is above its threshold on many of the first tokens."""
    x_BD, weights = readable(x_BD), _readable(weights)
    # An infinite threshold is a latent that is never active, not weights that are not finite.
    finite_N = readable(threshold_N).clamp(max=torch.finfo(threshold_N.dtype).max)
    product = fastest_precision(exact=True) if _checked_precision(precision) == "auto" else precision
    found = _native.threshold_encode(x_BD, weights, finite_N, product)
    if found is None:
        return None
    indices, values = found
    return SparseLatents(indices, values, len(weights.latent_bias))


def decode(latents: SparseLatents, weights: Weights) -> Float[Tensor, "batch d_model"]:
    """As `reference.decode`, reading only the active latents' rows of the decoder."""
    checks.check_weights(HOME, weights)
    checks.check_latents(HOME, latents, weights)
    weights = _readable(weights)
    recons = torch.empty(len(latents.values), len(weights.pre_bias))
    _native.decode(_indices(latents), readable(latents.values), weights, recons)
    return recons


def sparse_gradients(
    x_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    latents: SparseLatents,
    d_recons_BD: Float[Tensor, "batch d_model"],
    d_active: float = 0.0,
) -> Weights:
    """As `reference.sparse_gradients`: one visit of each latent, in registers, over the tokens where it is active."""
    checks.check_sparse(HOME, x_BD, weights, latents, d_recons_BD)
    weights = _readable(weights)
    gradients = Weights(*(torch.empty_like(w) for w in weights))
    arrays = _indices(latents), readable(latents.values), readable(d_recons_BD)
    _native.sparse_gradients(readable(x_BD), weights, *arrays, d_active, gradients)
    return gradients


def topk_gradients(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> StepGradients:
    """As `reference.topk_gradients`; AuxK's candidates come out of the same sweep over the encoder."""
    checks.check_step(HOME, x_BD, weights, spec, dead_N)
    x_BD, weights = readable(x_BD), _readable(weights)
    gradients = Weights(*(torch.empty_like(w) for w in weights))
    n_fired = torch.empty(len(weights.latent_bias), dtype=torch.int64)
    loss, audit = _loss_arguments(spec, len(x_BD))
    terms = _native.topk_gradients(x_BD, weights, dead_N.contiguous(), *loss, n_fired, gradients, audit)
    return _step(spec, gradients, terms, n_fired, len(x_BD))


def relu_gradients(x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec) -> StepGradients:
    """As `reference.relu_gradients`: sparse where few latents are active, else the dense products of torch.

    Which of the two depends on x and the weights alone. ReLU latents start half active and end with a few hundred.
    """
    checks.check_step(HOME, x_BD, weights, spec, keeps_k=False)
    latents = _sparse_threshold_encode(x_BD, weights, torch.zeros_like(weights.latent_bias), spec.precision)
    if latents is None:
        return torch_sparse.relu_gradients(x_BD, weights, spec)
    error_BD = decode(latents, weights) - x_BD
    d_recons_BD = error_BD * (2 * spec.mse_scale / x_BD.numel())
    mse, l1 = spec.mse_scale * error_BD.square().mean(), latents.values.sum() / len(x_BD)
    fired = latents.indices[latents.values > FIRED_THRESHOLD]
    return StepGradients(
        gradients=sparse_gradients(x_BD, weights, latents, d_recons_BD, spec.sparsity_coef / len(x_BD)),
        loss=mse + spec.sparsity_coef * l1,
        mse=mse,
        auxiliary=l1,
        auxk_dropped=torch.zeros((), dtype=torch.bool),
        n_fired=torch.bincount(fired, minlength=latents.n_latents),
        l0=(latents.values > 0).sum(1).float().mean(),
    )


def topk_step(
    x_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    spec: LossSpec,
    dead_N: Bool[Tensor, " n_latents"],
    optimizer: OptimizerState,
    update: UpdateSpec,
) -> tuple[StepGradients, Float[Tensor, ""]]:
    """`topk_gradients` and `apply_update` in one visit a latent: the same bits, and no gradient is ever stored.

    Returns the step with `gradients` None, and the gradient's norm. Clipping needs the norm before the update:
    `ValueError` when `update.clip_norm` is set.
    """
    if update.clip_norm is not None:
        raise ValueError(
            f"clip_norm is {update.clip_norm}, which topk_step cannot do; call topk_gradients and apply_update"
        )
    checks.check_step(HOME, x_BD, weights, spec, dead_N)
    checks.check_update(HOME, weights, None, optimizer, update)
    x_BD = readable(x_BD)
    average = None if optimizer.average is None else _detached(optimizer.average)
    moments = _detached(optimizer.first), _detached(optimizer.second), average
    n_fired = torch.empty(len(weights.latent_bias), dtype=torch.int64)
    loss, audit = _loss_arguments(spec, len(x_BD))
    terms, norm = _native.topk_step(
        x_BD, _detached(weights), dead_N.contiguous(), *loss, n_fired, *moments, *_update_arguments(update), audit
    )
    return _step(spec, None, terms, n_fired, len(x_BD)), torch.tensor(norm)


def apply_update(
    weights: Weights, gradients: Weights, optimizer: OptimizerState, update: UpdateSpec
) -> Float[Tensor, ""]:
    """As `reference.apply_update`, one visit a latent; `gradients` are used up."""
    checks.check_update(HOME, weights, gradients, optimizer, update)
    arrays = (weights, gradients, optimizer.first, optimizer.second, optimizer.average)
    clip_norm = float("inf") if update.clip_norm is None else update.clip_norm
    norm = _native.apply_update(
        *(a if a is None else _detached(a) for a in arrays), *_update_arguments(update), clip_norm
    )
    return torch.tensor(norm)


def _loss_arguments(spec: LossSpec, n_rows: int) -> tuple[tuple[int, float, int, float, str], Tensor]:
    product, audit = _audited(spec.precision, spec.audit, n_rows)
    return (spec.k, spec.mse_scale, spec.auxk, spec.auxk_coef, product), audit


def _audited(precision: str, audit: Sequence[int], n_rows: int) -> tuple[str, Tensor]:
    """The precision that is meant, and the rows to audit: without any given, some where it is "auto" and unproven."""
    product = fastest_precision() if _checked_precision(precision) == "auto" else precision
    if not audit and precision == "auto" and product in _UNPROVEN:
        audit = sampled_rows(n_rows, -(-n_rows // AUDIT_EVERY), seed=0)
    return product, torch.tensor(audit, dtype=torch.int64)


def sampled_rows(n_rows: int, n: int, seed: int) -> list[int]:
    """`n` different rows of a batch (all, where it has fewer), rising."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))[:n].sort().values.tolist()


def _update_arguments(update: UpdateSpec) -> tuple[float, ...]:
    return update.step, update.lr, update.ema, BETA1, BETA2, EPSILON


def _step(spec: LossSpec, gradients: Weights | None, terms: tuple, n_fired: Tensor, n_rows: int) -> StepGradients:
    mse, auxiliary, dropped, n_active, stats = terms
    _log_stats(stats, n_rows, spec.precision)
    return StepGradients(
        gradients=gradients,  # type: ignore[arg-type]
        loss=torch.tensor(mse if dropped else mse + spec.auxk_coef * auxiliary),
        mse=torch.tensor(mse),
        auxiliary=torch.tensor(auxiliary),
        auxk_dropped=torch.tensor(dropped),
        n_fired=n_fired,
        l0=torch.tensor(n_active / n_rows),
        stats=stats,
    )


def _readable(weights: Weights) -> Weights:
    return Weights(*(readable(w) for w in weights))


def _detached(weights: Weights) -> Weights:
    return Weights(*(w.detach() for w in weights))


def _indices(latents: SparseLatents) -> Tensor:
    """Those of inactive slots, which carry no meaning, are 0."""
    return latents.indices.detach().to(torch.int64).masked_fill(latents.values == 0, 0).contiguous()


def _checked_precision(precision: str) -> str:
    if precision not in _PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    return precision


def _log_stats(stats: dict[str, Any], n_rows: int, precision: str) -> None:
    if stats["n_missed"]:
        log.warning(
            "kernels: precision %s missed %d of %d latents of the true top k; the batch was selected again in fp32",
            precision,
            stats["n_missed"],
            stats["n_audited"],
        )
    if _is_saturated(stats, n_rows):
        log.debug(
            "kernels: %d of %d rows had too many candidates and were scored exactly", stats["n_saturated"], n_rows
        )


def _is_saturated(stats: dict[str, Any], n_rows: int) -> bool:
    return stats["n_saturated"] * 20 > n_rows
