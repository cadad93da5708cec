"""The step in plain torch, sparse: only the encoder's forward product is dense, on CPU, CUDA and MPS.

With B tokens, D = d_model, N latents and k active ones, a TopK step costs 2BDN for the product and O(BkD) for the rest.
The product is taken in chunks of rows, so that [B, N] never exists whole; every sum has a fixed order.
Gradients of the weights are sums over the (token, latent) pairs sorted by latent: one `embedding_bag` each.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

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
from monosem.kernels.reference import BETA1, BETA2, EPSILON
from monosem.types import FIRED_THRESHOLD, LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

_CHUNK_ELEMENTS = 1 << 22  # of one temporary: 16 MiB of fp32 stays in a CPU's last-level cache
_CHUNK_ELEMENTS_GPU = 1 << 28
_SUMMED_AT_ONCE = 64  # rows


def topk_encode(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, k: int, precision: str = "auto"
) -> SparseLatents:
    """As `reference.topk_encode`, except that which of several equal pre-activations wins is left to torch.topk."""
    check_encode(ANY, x_BD, weights, k)
    return _topk(x_BD - weights.pre_bias, weights, k, precision)


def relu_encode(x_BD: Float[Tensor, "batch d_model"], weights: Weights) -> SparseLatents:
    """As `reference.relu_encode`."""
    check_encode(ANY, x_BD, weights)
    return threshold_encode(x_BD, weights, torch.zeros_like(weights.latent_bias))


def threshold_encode(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, threshold_N: Float[Tensor, " n_latents"]
) -> SparseLatents:
    """As `reference.threshold_encode`."""
    check_encode(ANY, x_BD, weights)
    check_threshold(ANY, threshold_N, weights)
    threshold_N = threshold_N.clamp(min=0)
    centred_BD = x_BD - weights.pre_bias
    chunks = []
    for rows in row_chunks(len(x_BD), len(weights.encoder), x_BD.device):
        values_CN = torch.addmm(weights.latent_bias, centred_BD[rows], weights.encoder.T)
        values_CN.masked_fill_(values_CN <= threshold_N, 0)
        n_active = int((values_CN > 0).sum(1).max())
        chunks.append(values_CN.topk(n_active, dim=1))
    width = max((c.values.shape[1] for c in chunks), default=0)
    pad = [(0, width - c.values.shape[1]) for c in chunks]
    if not chunks:
        return SparseLatents(x_BD.new_zeros(0, 0, dtype=torch.int64), x_BD.new_zeros(0, 0), len(weights.encoder))
    indices = torch.cat([F.pad(c.indices, p) for c, p in zip(chunks, pad, strict=True)])
    values = torch.cat([F.pad(c.values, p) for c, p in zip(chunks, pad, strict=True)])
    return SparseLatents(indices, values, len(weights.encoder))


def decode(latents: SparseLatents, weights: Weights) -> Float[Tensor, "batch d_model"]:
    """z @ decoder + pre_bias, reading only the active latents' rows of the decoder."""
    check_weights(ANY, weights)
    check_latents(ANY, latents, weights)
    if latents.values.numel() == 0:
        return weights.pre_bias.expand(len(latents.values), -1).clone()
    indices = latents.indices.long().masked_fill(latents.values == 0, 0)
    z = F.embedding_bag(indices, weights.decoder, per_sample_weights=latents.values, mode="sum")
    return z + weights.pre_bias


def topk_gradients(
    x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec, dead_N: Bool[Tensor, " n_latents"]
) -> StepGradients:
    """As `reference.topk_gradients`, with d_recons = 2 mse_scale (recons - x) / (B D)."""
    check_step(ANY, x_BD, weights, spec, dead_N)
    centred_BD = x_BD - weights.pre_bias
    latents = _topk(centred_BD, weights, spec.k, spec.precision)
    error_BD = x_BD - decode(latents, weights)
    mse = spec.mse_scale * error_BD.square().mean()
    gradients = sparse_gradients(x_BD, weights, latents, error_BD * (-2 * spec.mse_scale / x_BD.numel()))

    auxiliary, dropped = x_BD.new_zeros(()), torch.zeros((), dtype=torch.bool, device=x_BD.device)
    if spec.auxk:
        auxiliary, dropped = add_auxk_gradients(gradients, centred_BD, error_BD, weights, spec, dead_N)
    return StepGradients(
        gradients=gradients,
        loss=torch.where(dropped, mse, mse + spec.auxk_coef * auxiliary),
        mse=mse,
        auxiliary=auxiliary,
        auxk_dropped=dropped,
        n_fired=count_fired(latents),
        l0=(latents.values > 0).sum(1).to(x_BD.dtype).mean(),
    )


def sparse_gradients(
    x_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    latents: SparseLatents,
    d_recons_BD: Float[Tensor, "batch d_model"],
    d_active: float = 0.0,
) -> Weights:
    """As `reference.sparse_gradients`, over the active (token, latent) pairs alone.

    d_value = d_recons . decoder[latent] + d_active; decoder[i] gathers value * d_recons, encoder[i] gathers
    d_value * (x - pre_bias), over the tokens where i is active.
    """
    check_sparse(ANY, x_BD, weights, latents, d_recons_BD)
    tokens, slots = (latents.values > 0).nonzero(as_tuple=True)
    order = latents.indices[tokens, slots].sort(stable=True)
    tokens, slots = tokens[order.indices], slots[order.indices]
    starts_N = torch.searchsorted(order.values, torch.arange(latents.n_latents, device=x_BD.device))
    d_values = torch.empty(len(tokens), dtype=x_BD.dtype, device=x_BD.device)
    for pairs in row_chunks(len(tokens), x_BD.shape[1], x_BD.device):
        d_values[pairs] = d_recons_BD[tokens[pairs]].mul_(weights.decoder[order.values[pairs]]).sum(1).add_(d_active)
    d_bias_N = _segment_sums(tokens, starts_N, d_values, x_BD.new_ones(len(x_BD), 1)).squeeze(1)
    return Weights(
        encoder=_segment_sums(tokens, starts_N, d_values, x_BD - weights.pre_bias),
        latent_bias=d_bias_N,
        decoder=_segment_sums(tokens, starts_N, latents.values[tokens, slots], d_recons_BD),
        pre_bias=d_recons_BD.sum(0) - _weighted_sum(d_bias_N, weights.encoder),
    )


def relu_gradients(x_BD: Float[Tensor, "batch d_model"], weights: Weights, spec: LossSpec) -> StepGradients:
    """As `reference.relu_gradients`. ReLU latents start half active: the products are dense, a chunk of rows a time."""
    check_step(ANY, x_BD, weights, spec, keeps_k=False)
    centred_BD = x_BD - weights.pre_bias
    gradients = Weights(*(torch.zeros_like(w) for w in weights))
    squared, l1, active = (x_BD.new_zeros(()) for _ in range(3))
    n_fired = torch.zeros(len(weights.encoder), dtype=torch.int64, device=x_BD.device)
    for rows in row_chunks(len(x_BD), len(weights.encoder), x_BD.device):
        x_CD = centred_BD[rows]
        z_CN = torch.addmm(weights.latent_bias, x_CD, weights.encoder.T).relu_()
        error_CD = z_CN @ weights.decoder - x_CD
        squared, l1, active = squared + error_CD.square().sum(), l1 + z_CN.sum(), active + (z_CN > 0).sum()
        n_fired += (z_CN > FIRED_THRESHOLD).sum(0)
        d_recons_CD = error_CD * (2 * spec.mse_scale / x_BD.numel())
        d_z_CN = (d_recons_CD @ weights.decoder.T).add_(spec.sparsity_coef / len(x_BD)).masked_fill_(z_CN == 0, 0)
        gradients.encoder.addmm_(d_z_CN.T, x_CD)
        gradients.decoder.addmm_(z_CN.T, d_recons_CD)
        gradients.latent_bias.add_(d_z_CN.sum(0))
        gradients.pre_bias.add_(d_recons_CD.sum(0))
    gradients.pre_bias.sub_(_weighted_sum(gradients.latent_bias, weights.encoder))
    mse, auxiliary = spec.mse_scale * squared / x_BD.numel(), l1 / len(x_BD)
    never = torch.zeros((), dtype=torch.bool, device=x_BD.device)
    loss = mse + spec.sparsity_coef * auxiliary
    return StepGradients(gradients, loss, mse, auxiliary, never, n_fired, active / len(x_BD))


def add_auxk_gradients(
    gradients: Weights,
    centred_BD: Float[Tensor, "batch d_model"],
    error_BD: Float[Tensor, "batch d_model"],
    weights: Weights,
    spec: LossSpec,
    dead_N: Bool[Tensor, " n_latents"],
) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
    """Add auxk_coef * dL_aux to `gradients`, given x - pre_bias and x - recons: L_aux, and whether it was dropped.

    It is dropped, and nothing is added, when it is not finite. The products are dense, in the small matrix of dead
    latents, where that is cheapest.
    """
    dead = dead_N.nonzero().squeeze(1)
    if len(dead) == 0:
        return error_BD.new_zeros(()), torch.zeros((), dtype=torch.bool, device=error_BD.device)
    encoder, bias, decoder = weights.encoder[dead], weights.latent_bias[dead], weights.decoder[dead]
    d_encoder, d_bias, d_decoder = torch.zeros_like(encoder), torch.zeros_like(bias), torch.zeros_like(decoder)
    variance = losses.error_variance(error_BD)
    squared = error_BD.new_zeros(())
    for rows in row_chunks(len(error_BD), len(dead), error_BD.device):
        z_CM = torch.addmm(bias, centred_BD[rows], encoder.T).relu_()
        if len(dead) > spec.auxk:
            top = z_CM.topk(spec.auxk, dim=1)
            z_CM = torch.zeros_like(z_CM).scatter_(1, top.indices, top.values)
        residual_CD = z_CM @ decoder - error_BD[rows]
        squared = squared + residual_CD.square().sum()
        d_recons_CD = residual_CD * (2 * spec.auxk_coef / (variance * error_BD.numel()))
        d_z_CM = (d_recons_CD @ decoder.T).masked_fill_(z_CM == 0, 0)
        d_encoder.addmm_(d_z_CM.T, centred_BD[rows])
        d_decoder.addmm_(z_CM.T, d_recons_CD)
        d_bias.add_(d_z_CM.sum(0))
    auxiliary = squared / (error_BD.numel() * variance)
    dropped = ~auxiliary.isfinite()
    keep = lambda g: g.masked_fill(dropped, 0)  # noqa: E731  (NaN * 0 would stay NaN)
    gradients.encoder[dead] += keep(d_encoder)
    gradients.latent_bias[dead] += keep(d_bias)
    gradients.decoder[dead] += keep(d_decoder)
    gradients.pre_bias.sub_(keep(_weighted_sum(d_bias, encoder)))
    return auxiliary, dropped


def count_fired(latents: SparseLatents) -> Int[Tensor, " n_latents"]:
    """Tokens on which each latent's activation exceeded FIRED_THRESHOLD."""
    fired = (latents.values > FIRED_THRESHOLD).flatten().float()  # exact to 2^24 tokens; MPS has no float64
    return torch.bincount(latents.indices.flatten(), weights=fired, minlength=latents.n_latents).long()


def apply_update(
    weights: Weights, gradients: Weights, optimizer: OptimizerState, spec: UpdateSpec
) -> Float[Tensor, ""]:
    """As `reference.apply_update`; `gradients` are used up. Rows go in chunks that stay in cache."""
    check_update(ANY, weights, gradients, optimizer, spec)
    decoder, d_decoder = weights.decoder, gradients.decoder
    for rows in row_chunks(len(decoder), decoder.shape[1], decoder.device):
        along = (d_decoder[rows] * decoder[rows]).sum(1, keepdim=True)
        d_decoder[rows].addcmul_(along, decoder[rows], value=-1)
    norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()
    if spec.clip_norm is not None:
        for g in gradients:
            g.mul_((spec.clip_norm / norm).clamp(max=1))
    for part in Weights._fields:
        w = getattr(weights, part)
        for rows in row_chunks(len(w), w[0].numel(), w.device):
            average = None if optimizer.average is None else getattr(optimizer.average, part)[rows]
            moments = getattr(optimizer.first, part)[rows], getattr(optimizer.second, part)[rows]
            adam(w[rows], getattr(gradients, part)[rows], *moments, average, spec, unit_norm=part == "decoder")
    return norm


def adam(
    w: Tensor, g: Tensor, first: Tensor, second: Tensor, average: Tensor | None, spec: UpdateSpec, *, unit_norm: bool
) -> None:
    """One Adam step of `w`, in place, then unit norm of its rows if asked for, then its moving average."""
    first.lerp_(g, 1 - BETA1)
    second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    denominator = second.sqrt().div_((1 - BETA2**spec.step) ** 0.5).add_(EPSILON)
    w.addcdiv_(first, denominator, value=-spec.lr / (1 - BETA1**spec.step))
    if unit_norm:
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
    if average is not None:
        average.lerp_(w, 1 - spec.ema)


def row_chunks(n_rows: int, elements_per_row: int, device: torch.device) -> list[slice]:
    """Slices over `n_rows` whose temporaries stay below the chunk size."""
    budget = _CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    size = max(1, budget // max(1, elements_per_row))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _topk(centred_BD: Tensor, weights: Weights, k: int, precision: str) -> SparseLatents:
    """Top-k by pre-activation. With bf16 the product only selects: the chosen latents' values are fp32 dot products."""
    indices_BK = torch.empty(len(centred_BD), k, dtype=torch.int64, device=centred_BD.device)
    values_BK = torch.empty(len(centred_BD), k, dtype=centred_BD.dtype, device=centred_BD.device)
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(
            f"precision is {precision!r}; the torch kernels have auto, fp32 and bf16 (int8 needs impl=native)"
        )
    low = precision == "bf16"
    encoder = weights.encoder.bfloat16() if low else weights.encoder
    bias = weights.latent_bias.bfloat16() if low else weights.latent_bias
    for rows in row_chunks(len(centred_BD), len(encoder), centred_BD.device):
        pre_CN = torch.addmm(bias, centred_BD[rows].to(encoder.dtype), encoder.T)
        values_BK[rows], indices_BK[rows] = pre_CN.topk(k, dim=1)
    latents = SparseLatents(indices_BK, values_BK, len(weights.encoder))
    if low:
        values_BK = _gathered_dots(centred_BD, indices_BK, weights.encoder) + weights.latent_bias[indices_BK]
    return latents._replace(values=values_BK.relu_())


def _gathered_dots(g_BD: Tensor, indices_BK: Tensor, matrix_ND: Tensor) -> Tensor:
    """[B, k] of g_b . matrix[indices[b, j]]."""
    dots_BK = torch.empty(indices_BK.shape, dtype=g_BD.dtype, device=g_BD.device)
    for rows in row_chunks(len(g_BD), indices_BK.shape[1] * g_BD.shape[1], g_BD.device):
        dots_BK[rows] = torch.bmm(matrix_ND[indices_BK[rows]], g_BD[rows].unsqueeze(2)).squeeze(2)
    return dots_BK


def _segment_sums(tokens: Tensor, starts_N: Tensor, factors: Tensor, rows_BD: Tensor) -> Tensor:
    """[N, D]: for each latent, the sum over its (token, factor) pairs of factor * rows[token], in token order."""
    return F.embedding_bag(tokens, rows_BD, starts_N, per_sample_weights=factors, mode="sum")


def _weighted_sum(factors_N: Tensor, rows_ND: Tensor) -> Tensor:
    """factors @ rows, in an order of its own: BLAS's depends on the number of threads, and its error grows with N."""
    every = torch.arange(len(rows_ND), device=rows_ND.device)
    return _segment_sums(every, every[::_SUMMED_AT_ONCE], factors_N, rows_ND).sum(0)
