"""The step on CUDA and ROCm devices, in Triton kernels: the same functions as `torch_sparse`, for fp32 tensors.

Encoding is exact in two moves, and [B, N] never exists:

1. *Prefilter.* The product is taken in low precision, fused with a comparison of every latent's upper bound with the
   row's threshold: a lower bound of the k-th largest pre-activation, so that nothing of the top k can fail to pass.
   Thresholds come from the latents seen so far: the sweep goes over N in stages, each GROWTH times everything before
   it, and among exchangeable latents a stage lets about k (GROWTH - 1) pass a row. The first stage keeps everything.
2. *Rescoring.* The few candidates left get fp32 dot products, summed in one order; the k largest are the latents.

So "fp32", "tf32" and "bf16" give the same bits. Only "fp8" is not proven to: its rounding is so coarse that a bound
that always holds would let every latent pass. Its band of FP8_SIGMAS standard deviations supposes that rounding
errors do not line up with latents. A row whose candidates outgrow a buffer is done again, with a narrower band (fp32)
and then by scoring every latent. Equal pre-activations: the lower index first. NaN or Inf in a row of x makes that
row's values NaN, in the encoder or latent_bias every value.

Nothing is summed by atomics and every order of summation is fixed: equal arguments give equal bits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosem import losses
from monosem.kernels import checks, torch_sparse
from monosem.kernels import triton_kernels as kernels
from monosem.kernels.checks import readable
from monosem.kernels.reference import BETA1, BETA2, EPSILON
from monosem.kernels.torch_sparse import relu_encode, relu_gradients, sparse_gradients, threshold_encode
from monosem.types import FIRED_THRESHOLD, LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

__all__ = [
    "apply_update",
    "decode",
    "relu_encode",
    "relu_gradients",
    "sparse_gradients",
    "threshold_encode",
    "topk_encode",
    "topk_gradients",
]

INTERPRETED = not isinstance(kernels.sweep_kernel, triton.JITFunction)
"""TRITON_INTERPRET=1 was set: kernels run as Python, on tensors of the CPU."""

HOME = checks.Home(
    lambda t: t.dtype == torch.float32 and (t.is_cuda or (INTERPRETED and t.device.type == "cpu")),
    "impl=triton takes float32 on CUDA or ROCm: convert it, or impl=torch",
    strict=True,
)

log = logging.getLogger("monosem")


class Tile(NamedTuple):
    """What one program of the sweep holds, and how it is compiled."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int


TILES = {
    "bf16": Tile(128, 64, 64, 8, 3),
    "tf32": Tile(128, 64, 32, 8, 3),
    "fp32": Tile(64, 64, 32, 8, 2),
    "fp8": Tile(128, 64, 128, 8, 3),
}
UNALIGNED_TILE = Tile(64, 32, 32, 8, 2)
"""The largest that compile without a spill and within an MI300's 64 KiB of shared memory (benchmarks.triton_aot)."""

FIRST_LATENTS = 2048  # of the stage that sets the first threshold
GROWTH = 4
SPLITS = 8  # of a stage's latents, so that a chunk of rows fills the device
CAPACITY_SLACK = 4  # a buffer holds this times the candidates expected in it, and a few
CAPACITY_EXTRA = 16
POOL_PER_K, POOL_EXTRA = 4, 64  # candidates of a row between stages
BUFFER_BYTES = 1 << 28  # of one chunk of rows and a stage, at SLOT_BYTES for value, index, two bounds and temporaries
SLOT_BYTES = 24
EXHAUSTIVE_ELEMENTS = 1 << 24

SUMMING = 4 * 2.0**-24
"""Times D: relative error of two sums of D products, at most 2^-24 a term rescoring, and 2^-23 in a tensor core."""
BIAS_ROUNDING = 2.0**-21
TF32_ROUNDING = 2.0**-10
FP8_SIGMAS = 6.0
FP8_SUMMING = 2.0**-12
"""A Hopper tensor core sums fp8 products with about 14 bits."""

BLOCK = 1024  # columns at a time of kernels that walk a row: 4 warps hold 8 each
GROUP = 4  # latents of one row that are scored together
CHUNK = 256  # pairs, or rows, that one program sums
AUXK_DENSE_RATIO = 32
"""With no more dead latents than this times auxk, the dense products among them (10 B n_dead D flops of fp32) cost less
than gathering auxk rows a token four times (16 B auxk D bytes), at 60 TFLOP/s and 3.35 TB/s. Estimated, not run."""

_PRECISIONS = ("auto", *TILES)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _on_device_of_first(function: _Function) -> _Function:
    """Triton launches on the current device: make it that of the first tensor."""

    @functools.wraps(function)
    def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = first[0] if isinstance(first, tuple) else first
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return function(first, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


@_on_device_of_first
def topk_encode(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, k: int, precision: str = "auto"
) -> SparseLatents:
    """As `reference.topk_encode`; `precision` is that of the product that selects: auto (bf16), fp32, tf32, bf16, fp8.

    One host sync, to learn whether rows must be done again.
    """
    checks.check_encode(HOME, x_BD, weights, k)
    weights = _readable(weights)
    return _encode(readable(x_BD) - weights.pre_bias, weights, k, _checked(precision))


@_on_device_of_first
def decode(latents: SparseLatents, weights: Weights) -> Float[Tensor, "batch d_model"]:
    """As `reference.decode`, reading only the active latents' rows of the decoder."""
    checks.check_weights(HOME, weights)
    checks.check_latents(HOME, latents, weights)
    indices = latents.indices.long().masked_fill(latents.values == 0, 0)
    latents, weights = latents._replace(indices=indices, values=readable(latents.values)), _readable(weights)
    return _decode(latents, weights.decoder, weights.pre_bias)


@_on_device_of_first
def topk_gradients(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> StepGradients:
    """As `reference.topk_gradients`, with the gradients of `torch_sparse.topk_gradients`, written out by hand."""
    checks.check_step(HOME, x_BD, weights, spec, dead_N)
    precision = _checked(spec.precision)
    x_BD, weights = readable(x_BD), _readable(weights)
    centred_BD = x_BD - weights.pre_bias
    latents = _encode(centred_BD, weights, spec.k, precision)
    error_BD = x_BD - _decode(latents, weights.decoder, weights.pre_bias)
    mse = spec.mse_scale * error_BD.square().mean()
    d_recons_BD = error_BD * (-2 * spec.mse_scale / x_BD.numel())
    pairs = _sort_by_latent(latents)
    gradients = _gradients(centred_BD, d_recons_BD, latents, pairs, weights)
    gradients.pre_bias.add_(d_recons_BD.sum(0))

    auxiliary, dropped = x_BD.new_zeros(()), torch.zeros((), dtype=torch.bool, device=x_BD.device)
    if spec.auxk:
        auxiliary, dropped = _add_auxk_gradients(gradients, centred_BD, error_BD, weights, spec, dead_N, precision)
    return StepGradients(
        gradients=gradients,
        loss=torch.where(dropped, mse, mse + spec.auxk_coef * auxiliary),
        mse=mse,
        auxiliary=auxiliary,
        auxk_dropped=dropped,
        n_fired=_count(latents.values > FIRED_THRESHOLD, pairs),
        l0=(latents.values > 0).sum(1).to(x_BD.dtype).mean(),
    )


@_on_device_of_first
def apply_update(
    weights: Weights, gradients: Weights, optimizer: OptimizerState, update: UpdateSpec
) -> Float[Tensor, ""]:
    """As `reference.apply_update`, one visit a row; clipping needs the norm first, so a second look at gradients."""
    checks.check_update(HOME, weights, gradients, optimizer, update)
    clip = weights.pre_bias.new_ones(())
    if update.clip_norm is not None:
        norm = _norm([_gradient_squares(part, weights, gradients) for part in Weights._fields])
        clip = (update.clip_norm / norm).clamp(max=1)
    squares = [_update_rows(part, weights, gradients, optimizer, update, clip) for part in Weights._fields]
    return _norm(squares) if update.clip_norm is None else norm


class _Low(NamedTuple):
    """Rows in the precision of the sweep, with what bounds the error of a product with them."""

    rows: Tensor
    scale: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    rounding: Float[Tensor, " n"]


class _Bound(NamedTuple):
    """The terms of |a - fp32 value| <= x_rounding norm + x_norm rounding + bias_slack, of rows and of latents."""

    x_rounding: Float[Tensor, " rows"]
    x_norm: Float[Tensor, " rows"]
    norm: Float[Tensor, " n_latents"]
    rounding: Float[Tensor, " n_latents"]
    bias_slack: Float[Tensor, " n_latents"]

    def slack(self, index: Int[Tensor, "rows slots"]) -> Float[Tensor, "rows slots"]:
        """The bound at some latents of each row."""
        of_rows = self.x_rounding[:, None] * self.norm[index] + self.x_norm[:, None] * self.rounding[index]
        return of_rows + self.bias_slack[index]


class _Candidates(NamedTuple):
    """Latents that may be among the top k, with bounds of their pre-activations; an empty slot has -inf twice."""

    upper: Float[Tensor, "rows slots"]
    lower: Float[Tensor, "rows slots"]
    latent: Int[Tensor, "rows slots"]


def _encode(centred_BD: Tensor, weights: Weights, k: int, precision: str) -> SparseLatents:
    """The latents of x - pre_bias = `centred`, exact in every row."""
    latents, saturated = _prefiltered(centred_BD, weights, k, precision)
    redo = saturated.nonzero().squeeze(1)
    if len(redo) * 20 > len(centred_BD):
        log.debug("kernels: %d of %d rows had too many candidates at %s", len(redo), len(centred_BD), precision)
    if len(redo):
        again = _exhaustive if precision == "fp32" else functools.partial(_encode, precision="fp32")
        exact = again(centred_BD[redo], weights, k)
        latents.indices[redo] = exact.indices
        latents.values[redo] = exact.values
    return latents


def _prefiltered(
    centred_BD: Tensor, weights: Weights, k: int, precision: str
) -> tuple[SparseLatents, Bool[Tensor, " batch"]]:
    """The latents, and which rows had more candidates than fit, so that theirs may be wrong."""
    encoder, x = _lowered(weights.encoder, precision), _lowered(centred_BD, precision)
    n_latents = len(weights.encoder)
    indices = torch.empty(len(centred_BD), k, dtype=torch.int64, device=centred_BD.device)
    values = torch.empty(len(centred_BD), k, device=centred_BD.device)
    saturated = torch.empty(len(centred_BD), dtype=torch.bool, device=centred_BD.device)
    for rows in _row_chunks(len(centred_BD), n_latents, k, tile_for(precision, centred_BD.shape[1])):
        pool, saturated[rows] = _candidates(_Low(*(t[rows] for t in x)), encoder, weights.latent_bias, k, precision)
        scores = _dots(centred_BD[rows], weights.encoder, pool, weights.latent_bias)
        indices[rows], values[rows] = _from_keys(_keys(scores, pool).topk(k).values)
    poison = 0 * x.norm + 0 * encoder.norm.sum() + (0 * weights.latent_bias).sum()  # NaN where something is not finite
    values = values.add_(poison[:, None]).clamp_(min=0)
    return SparseLatents(indices.clamp_(max=n_latents - 1), values, n_latents), saturated & poison.isfinite()


def _candidates(
    x: _Low, encoder: _Low, bias: Tensor, k: int, precision: str
) -> tuple[Int[Tensor, "rows slots"], Bool[Tensor, " rows"]]:
    """Indices of every latent that may be among the top k of its row (-1: an empty slot); which rows overflowed."""
    n_latents, width = len(bias), POOL_PER_K * k + POOL_EXTRA
    none = x.norm.new_empty(len(x.norm), 0)
    pool = _Candidates(none, none, none.int())
    threshold = torch.full_like(x.norm, -torch.inf)
    saturated = torch.zeros_like(threshold, dtype=torch.bool)
    for first, last in _stages(n_latents, k):
        found, overflowed = _sweep(x, encoder, bias, threshold, k, precision, first, last)
        pool = _Candidates(*(torch.cat(pair, 1) for pair in zip(pool, found, strict=True)))
        threshold = pool.lower.topk(k).values[:, -1].contiguous()
        saturated |= overflowed | ((pool.upper >= threshold[:, None]).sum(1) > width)
        top = pool.upper.topk(min(width, pool.upper.shape[1])).indices
        pool = _Candidates(*(t.gather(1, top) for t in pool))
    return torch.where(pool.upper >= threshold[:, None], pool.latent, -1), saturated


def _sweep(
    x: _Low, encoder: _Low, bias: Tensor, threshold: Tensor, k: int, precision: str, first: int, last: int
) -> tuple[_Candidates, Bool[Tensor, " rows"]]:
    """The latents of [first, last) whose upper bound reaches the threshold; which rows had more than their buffers."""
    n_rows, d_model = x.rows.shape
    tile = tile_for(precision, d_model)
    split_latents, capacity = _buffers(last - first, k, tile.latents, keep_all=first == 0)
    n_splits = triton.cdiv(last - first, split_latents)
    value = torch.empty(n_rows, n_splits, capacity, device=bias.device)
    index = torch.empty(n_rows, n_splits, capacity, dtype=torch.int32, device=bias.device)
    count = torch.empty(n_rows, n_splits, dtype=torch.int32, device=bias.device)
    bound = _bound(x, encoder, bias, precision)
    kernels.sweep_kernel[triton.cdiv(n_rows, tile.rows), n_splits](
        x.rows,
        encoder.rows,
        bias,
        x.scale,
        encoder.scale,
        *bound,
        threshold,
        value,
        index,
        count,
        n_rows,
        first,
        last,
        split_latents,
        d_model,
        PRECISION="tf32" if precision == "tf32" else "ieee",
        SCALED=precision == "fp8",
        WIDEN=INTERPRETED and precision == "bf16",
        CAPACITY=capacity,
        ROWS=tile.rows,
        LATENTS=tile.latents,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    empty = (torch.arange(capacity, device=bias.device) >= count[..., None]).flatten(1)
    value, index = value.flatten(1), index.flatten(1).masked_fill_(empty, 0)
    slack = bound.slack(index)
    upper, lower = (value + slack).masked_fill_(empty, -torch.inf), (value - slack).masked_fill_(empty, -torch.inf)
    return _Candidates(upper, lower, index), (count > capacity).any(1)


def _bound(x: _Low, encoder: _Low, bias: Tensor, precision: str) -> _Bound:
    """With x' and w' the rounded x and w: x.w - x'.w' = (x - x').w + x'.(w - w'), and the error of summing on top."""
    d_model = x.rows.shape[1]
    share, summing = 1.0, SUMMING * (d_model + 8)
    if precision == "fp8":
        share, summing = min(1.0, FP8_SIGMAS / math.sqrt(d_model)), FP8_SUMMING
    norm = x.norm + x.rounding
    bias_slack = bias.abs() * BIAS_ROUNDING + 1e-30
    return _Bound(share * x.rounding + summing * norm, share * norm, encoder.norm, encoder.rounding, bias_slack)


def _exhaustive(centred_BD: Tensor, weights: Weights, k: int) -> SparseLatents:
    """Score every latent, a block of them at a time: for rows whose candidates fit nowhere, such as many equal ones."""
    n_latents = len(weights.encoder)
    block = min(n_latents, max(FIRST_LATENTS, k))
    indices = torch.empty(len(centred_BD), k, dtype=torch.int64, device=centred_BD.device)
    values = torch.empty(len(centred_BD), k, device=centred_BD.device)
    for start in range(0, len(centred_BD), max(1, EXHAUSTIVE_ELEMENTS // block)):
        rows = slice(start, start + max(1, EXHAUSTIVE_ELEMENTS // block))
        best = torch.empty(len(indices[rows]), 0, dtype=torch.int64, device=centred_BD.device)
        for first in range(0, n_latents, block):
            some = torch.arange(first, min(first + block, n_latents), dtype=torch.int32, device=centred_BD.device)
            some = some.expand(len(best), -1).contiguous()
            scores = _dots(centred_BD[rows], weights.encoder, some, weights.latent_bias)
            best = torch.cat([best, _keys(scores, some)], 1)
            best = best.topk(min(k, best.shape[1])).values
        indices[rows], values[rows] = _from_keys(best)
    return SparseLatents(indices, values.clamp_(min=0), n_latents)


def _lowered(rows: Float[Tensor, "n d_model"], precision: str) -> _Low:
    """`rows` as the sweep reads them. bf16 and fp8 are copies; fp8 has a scale a row."""
    low = torch.empty_like(rows, dtype=_low_dtype(precision)) if precision in ("bf16", "fp8") else rows
    scale, norm, rounding = (rows.new_zeros(len(rows)) for _ in range(3))
    kernels.row_bounds_kernel[len(rows),](
        rows,
        low,
        scale,
        norm,
        rounding,
        rows.shape[1],
        LARGEST=torch.finfo(low.dtype).max if precision == "fp8" else 0,
        ROUND=low is not rows,
        ROUND_UP=kernels.ROUND_UP,
        BLOCK=_block(rows.shape[1]),
    )
    return _Low(low, scale, norm, norm * TF32_ROUNDING if precision == "tf32" else rounding)


def _low_dtype(precision: str) -> torch.dtype:
    """fp8 is e4m3; before gfx950 AMD has only the variant without a negative zero."""
    if precision == "bf16":
        return torch.bfloat16
    if torch.version.hip and "gfx94" in torch.cuda.get_device_properties().gcnArchName:
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def tile_for(precision: str, d_model: int) -> Tile:
    """The sweep's tile; smaller where 16 does not divide d_model: unaligned rows take more registers to load."""
    return TILES[precision] if d_model % 16 == 0 else UNALIGNED_TILE


def _stages(n_latents: int, k: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each stage of a sweep: at least k latents, then GROWTH times all before."""
    first, last = 0, min(n_latents, max(FIRST_LATENTS, k))
    while first < n_latents:
        yield first, last
        first, last = last, min(n_latents, last * GROWTH)


def _buffers(n_latents: int, k: int, tile_latents: int, *, keep_all: bool) -> tuple[int, int]:
    """Latents of one split of a stage, and how many candidates its buffer holds."""
    split_latents = triton.cdiv(triton.cdiv(n_latents, SPLITS), tile_latents) * tile_latents
    if keep_all:
        return split_latents, split_latents
    expected = k * (GROWTH - 1) / triton.cdiv(n_latents, split_latents)
    return split_latents, triton.next_power_of_2(math.ceil(CAPACITY_SLACK * expected) + CAPACITY_EXTRA)


def _row_chunks(n_rows: int, n_latents: int, k: int, tile: Tile) -> list[slice]:
    """Slices over the rows, whole tiles of them, whose candidates stay below BUFFER_BYTES."""
    slots = []
    for first, last in _stages(n_latents, k):
        split_latents, capacity = _buffers(last - first, k, tile.latents, keep_all=first == 0)
        slots.append(triton.cdiv(last - first, split_latents) * capacity)
    size = max(1, BUFFER_BYTES // (SLOT_BYTES * max(slots)))
    size = max(size // tile.rows, 1) * tile.rows
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _keys(scores: Float[Tensor, "rows slots"], index: Int[Tensor, "rows slots"]) -> Int[Tensor, "rows slots"]:
    """int64 keys, all different, that sort by score and then by lower index; the smallest where index is negative."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: negative zero is zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (bits.long() << 32) | (0xFFFFFFFF - index.long())
    return keys.masked_fill_(index < 0, torch.iinfo(torch.int64).min)


def _from_keys(keys: Int[Tensor, "rows k"]) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Indices and scores of `_keys`."""
    bits = (keys >> 32).int()
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), bits.view(torch.float32)


class _Pairs(NamedTuple):
    """The (token, latent) pairs of a batch sorted by latent, and by token within one."""

    order: Int[Tensor, " n_pairs"]
    latent: Int[Tensor, " n_pairs"]
    token: Int[Tensor, " n_pairs"]
    start: Int[Tensor, " n_latents_plus_1"]


def _sort_by_latent(latents: SparseLatents) -> _Pairs:
    latent, order = latents.indices.flatten().sort(stable=True)
    start = torch.searchsorted(latent, torch.arange(latents.n_latents + 1, device=latent.device))
    return _Pairs(order, latent, order // latents.indices.shape[1], start)


def _gradients(
    centred_BD: Tensor, d_recons_BD: Tensor, latents: SparseLatents, pairs: _Pairs, weights: Weights
) -> Weights:
    """What d_recons says of encoder, latent_bias, decoder and, through the pre-activations alone, of pre_bias."""
    d_values_BK = _dots(d_recons_BD, weights.decoder, latents.indices).masked_fill_(latents.values == 0, 0)
    d_values, values = d_values_BK.flatten()[pairs.order], latents.values.flatten()[pairs.order]
    ones = centred_BD.new_ones(len(centred_BD), 1)
    d_bias = _segment_sums(d_values, ones, pairs).squeeze(1)
    return Weights(
        encoder=_segment_sums(d_values, centred_BD, pairs),
        latent_bias=d_bias,
        decoder=_segment_sums(values, d_recons_BD, pairs),
        pre_bias=-_weighted_rows(d_bias, weights.encoder),
    )


def _add_auxk_gradients(
    gradients: Weights,
    centred_BD: Tensor,
    error_BD: Tensor,
    weights: Weights,
    spec: LossSpec,
    dead_N: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Add auxk_coef * dL_aux to the dead latents' rows; L_aux, and whether it was dropped for not being finite.

    The dead latents are encoded as an autoencoder of their own, or in dense products when they are few.
    """
    dead = dead_N.nonzero().squeeze(1)
    if len(dead) <= AUXK_DENSE_RATIO * spec.auxk:
        return torch_sparse.add_auxk_gradients(gradients, centred_BD, error_BD, weights, spec, dead_N)
    small = Weights(weights.encoder[dead], weights.latent_bias[dead], weights.decoder[dead], weights.pre_bias)
    latents = _encode(centred_BD, small, min(spec.auxk, len(dead)), precision)
    residual_BD = _decode(latents, small.decoder, None) - error_BD
    variance = losses.error_variance(error_BD)
    auxiliary = residual_BD.square().mean() / variance
    dropped = ~auxiliary.isfinite()
    d_recons_BD = residual_BD * (2 * spec.auxk_coef / (variance * error_BD.numel()))
    found = _gradients(centred_BD, d_recons_BD, latents, _sort_by_latent(latents), small)
    found = Weights(*(g.masked_fill_(dropped, 0) for g in found))
    gradients.encoder[dead] += found.encoder
    gradients.latent_bias[dead] += found.latent_bias
    gradients.decoder[dead] += found.decoder
    gradients.pre_bias.add_(found.pre_bias)
    return auxiliary, dropped


def _decode(latents: SparseLatents, decoder: Tensor, base: Tensor | None) -> Float[Tensor, "batch d_model"]:
    indices, values = latents.indices.contiguous(), latents.values.contiguous()
    (n_rows, k), d_model = indices.shape, decoder.shape[1]
    out = torch.empty(n_rows, d_model, device=decoder.device)
    if n_rows:
        block = _block(d_model)
        kernels.decode_kernel[n_rows, triton.cdiv(d_model, block)](
            indices, values, decoder, base, out, k, d_model, HAS_BASE=base is not None, BLOCK=block
        )
    return out


def _dots(rows_BD: Tensor, matrix_ND: Tensor, index_BK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[B, K] of rows[b] . matrix[index[b, j]] (+ bias), 0 where the index is negative."""
    n_rows, k = index_BK.shape
    out = torch.empty(n_rows, k, device=rows_BD.device)
    kernels.gathered_dots_kernel[n_rows, triton.cdiv(k, GROUP)](
        rows_BD,
        matrix_ND,
        bias_N,
        index_BK,
        out,
        k,
        rows_BD.shape[1],
        HAS_BIAS=bias_N is not None,
        GROUP=GROUP,
        BLOCK=_block(rows_BD.shape[1]),
    )
    return out


def _segment_sums(factors: Tensor, rows_BD: Tensor, pairs: _Pairs) -> Float[Tensor, "n_latents d_model"]:
    """For each latent, the sum over its pairs of factor * rows[token], in token order."""
    n_pairs, d_model = len(factors), rows_BD.shape[1]
    block, n_chunks = _block(d_model), triton.cdiv(n_pairs, CHUNK)
    out = rows_BD.new_zeros(len(pairs.start) - 1, d_model)
    head = rows_BD.new_empty(n_chunks, d_model)
    grid = n_chunks, triton.cdiv(d_model, block)
    kernels.segment_sums_kernel[grid](
        pairs.latent, pairs.token, factors, pairs.start, rows_BD, out, head, n_pairs, d_model, CHUNK=CHUNK, BLOCK=block
    )
    kernels.segment_heads_kernel[grid](pairs.latent, pairs.start, out, head, d_model, CHUNK=CHUNK, BLOCK=block)
    return out


def _weighted_rows(factors_N: Tensor, matrix_ND: Tensor) -> Float[Tensor, " d_model"]:
    """factors @ matrix, in a fixed order."""
    n_rows, d_model = matrix_ND.shape
    block, n_chunks = _block(d_model), triton.cdiv(n_rows, CHUNK)
    out = matrix_ND.new_empty(n_chunks, d_model)
    kernels.weighted_rows_kernel[n_chunks, triton.cdiv(d_model, block)](
        factors_N, matrix_ND, out, n_rows, d_model, CHUNK=CHUNK, BLOCK=block
    )
    return out.sum(0)


def _count(flags_BK: Tensor, pairs: _Pairs) -> Int[Tensor, " n_latents"]:
    """How many of each latent's pairs are flagged: differences of a running count."""
    running = torch.nn.functional.pad(flags_BK.flatten()[pairs.order].long().cumsum(0), (1, 0))
    return running[pairs.start].diff()


def _gradient_squares(part: str, weights: Weights, gradients: Weights) -> Tensor:
    weight, gradient = getattr(weights, part), getattr(gradients, part)
    n_rows, width = _as_rows(weight)
    squares = weight.new_empty(n_rows)
    kernels.gradient_squares_kernel[n_rows,](
        weight, gradient, squares, weight.numel(), width, PROJECT=part == "decoder", BLOCK=_block(width)
    )
    return squares


def _update_rows(
    part: str, weights: Weights, gradients: Weights, optimizer: OptimizerState, update: UpdateSpec, clip: Tensor
) -> Tensor:
    weight = getattr(weights, part)
    n_rows, width = _as_rows(weight)
    squares = weight.new_empty(n_rows)
    kernels.update_rows_kernel[n_rows,](
        weight,
        getattr(gradients, part),
        getattr(optimizer.first, part),
        getattr(optimizer.second, part),
        None if optimizer.average is None else getattr(optimizer.average, part),
        clip,
        squares,
        weight.numel(),
        width,
        update.lr / (1 - BETA1**update.step),
        (1 - BETA2**update.step) ** -0.5,
        1 - update.ema,
        BETA1=BETA1,
        BETA2=BETA2,
        EPSILON=EPSILON,
        UNIT_NORM=part == "decoder",
        HAS_AVERAGE=optimizer.average is not None,
        BLOCK=_block(width),
    )
    return squares


def _as_rows(weight: Tensor) -> tuple[int, int]:
    """Rows and width: a vector is taken BLOCK entries at a time."""
    return (len(weight), weight.shape[1]) if weight.ndim == 2 else (triton.cdiv(len(weight), BLOCK), BLOCK)


def _norm(squares: list[Tensor]) -> Float[Tensor, ""]:
    return torch.cat(squares).double().sum().sqrt().float()


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def _readable(weights: Weights) -> Weights:
    return Weights(*(readable(w) for w in weights))


def _checked(precision: str) -> str:
    if precision not in _PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    return "bf16" if precision == "auto" else precision
