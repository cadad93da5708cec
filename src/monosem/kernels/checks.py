"""What every implementation of the kernels refuses, in one place: a `ValueError` before anything is read or written.

The contract (`kernels/__init__.py`) is for tensors of agreeing shapes, dtypes and devices. Compiled code must not be
handed anything else, and torch would broadcast some of it into another answer.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monosem.types import LossSpec, OptimizerState, SparseLatents, UpdateSpec, Weights


class Home(NamedTuple):
    """The tensors that an implementation takes."""

    takes: Callable[[Tensor], bool]
    words: str
    strict: bool
    """Compiled: all tensors of the one dtype, written ones contiguous."""


_NO_K = object()

ANY = Home(lambda t: t.is_floating_point() and t.device.type != "meta", "give real numbers in memory", strict=False)
"""Of the kernels in plain torch: any float dtype and device. x may have a narrower dtype than the weights."""


def readable(t: Tensor) -> Tensor:
    """The numbers of `t` as compiled code reads them: row after row, with a negation that waits to be done, done."""
    return t.detach().resolve_conj().resolve_neg().contiguous()


def check_weights(home: Home, weights: Weights) -> None:
    """Two matrices [n_latents, d_model] and their biases, of one dtype, on one device."""
    for name, w in zip(Weights._fields, weights, strict=True):
        _check_kind(home, name, w)
        _check_alike(name, w, "encoder", weights.encoder, exact=True)
    n, d = weights.encoder.shape if weights.encoder.ndim == 2 else (-1, -1)
    if [tuple(w.shape) for w in weights] != [(n, d), (n,), (n, d), (d,)]:
        shapes = ", ".join(f"{name} {list(w.shape)}" for name, w in zip(Weights._fields, weights, strict=True))
        raise ValueError(
            f"weights must be encoder [n, d], latent_bias [n], decoder [n, d], pre_bias [d] with one n and one d, "
            f"not {shapes}"
        )
    if n == 0 or d == 0:
        raise ValueError(f"the weights have {n} latents of d_model {d}; give at least one of each")


def check_rows(home: Home, name: str, rows: Any, weights: Weights) -> None:
    """`rows` is [batch, d_model], of the weights' device, and of a dtype that theirs holds."""
    _check_kind(home, name, rows)
    if rows.ndim != 2 or rows.shape[1] != weights.encoder.shape[1]:
        d = weights.encoder.shape[1]
        raise ValueError(f"{name} must be [batch, d_model] with the weights' d_model {d}, not {list(rows.shape)}")
    _check_alike(name, rows, "encoder", weights.encoder, exact=home.strict)


def check_encode(home: Home, x: Any, weights: Weights, k: Any = _NO_K) -> None:
    """What an encoder is given; `k` where it keeps a number of latents."""
    check_weights(home, weights)
    check_rows(home, "x", x, weights)
    if k is not _NO_K:
        check_k(k, weights)


def check_k(k: Any, weights: Weights) -> None:
    n = len(weights.latent_bias)
    try:
        fits = not isinstance(k, bool) and 1 <= operator.index(k) <= n
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"k is {k!r}; k must be a whole number between 1 and n_latents, {n}")


def check_threshold(home: Home, threshold: Any, weights: Weights) -> None:
    """One number a latent."""
    _check_kind(home, "threshold", threshold)
    _check_alike("threshold", threshold, "encoder", weights.encoder, exact=home.strict)
    if threshold.shape != weights.latent_bias.shape:
        raise ValueError(
            f"threshold must be [n_latents], {list(weights.latent_bias.shape)}, not {list(threshold.shape)}"
        )


def check_latents(home: Home, latents: SparseLatents, weights: Weights, n_rows: int | None = None) -> None:
    """Indices and values [batch, k] of the weights' latents. Indices count where the value is not 0."""
    n, (indices, values, n_latents) = len(weights.latent_bias), latents
    _check_kind(home, "values", values)
    _check_alike("values", values, "encoder", weights.encoder, exact=home.strict)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices are {getattr(indices, 'dtype', type(indices).__name__)}; give int64")
    if values.ndim != 2 or indices.shape != values.shape:
        raise ValueError(
            f"indices and values must be [batch, k] with one batch and one k, not {list(indices.shape)} and "
            f"{list(values.shape)}"
        )
    if indices.device != values.device:
        raise ValueError(f"indices are on {indices.device} and values on {values.device}; move them to one device")
    if n_rows is not None and len(values) != n_rows:
        raise ValueError(f"indices and values are of {len(values)} rows and x of {n_rows}; give the latents of x")
    if n_latents != n:
        raise ValueError(f"latents are of {n_latents} latents and the weights of {n}; give those of one autoencoder")
    if values.device.type == "cpu" and values.numel():  # elsewhere looking would wait for the device
        if (values < 0).any():
            raise ValueError(f"values go down to {values.min().item():g}; activations are not negative")
        active = indices.masked_fill(values == 0, 0)
        for bad in (active.min().item(), active.max().item()):
            if not 0 <= bad < n:
                raise ValueError(f"index {bad} is outside 0..{n - 1}")


def check_step(home: Home, x: Any, weights: Weights, spec: LossSpec, dead: Any = None, *, keeps_k: bool = True) -> None:
    """What a step is given: rows to learn from, and where AuxK may act, `dead`."""
    check_encode(home, x, weights, spec.k if keeps_k else _NO_K)
    if len(x) == 0:
        raise ValueError("the batch is empty, so it has no gradient; give at least one row")
    if spec.auxk < 0:
        raise ValueError(f"auxk must not be negative, but is {spec.auxk}; 0 turns AuxK off")
    if dead is None:
        return
    if not isinstance(dead, Tensor) or dead.dtype != torch.bool or dead.shape != weights.latent_bias.shape:
        found = f"{dead.dtype} {list(dead.shape)}" if isinstance(dead, Tensor) else type(dead).__name__
        raise ValueError(f"dead must be torch.bool [n_latents], {list(weights.latent_bias.shape)}, not {found}")
    if dead.device != weights.encoder.device:
        raise ValueError(
            f"dead is on {dead.device} and the weights on {weights.encoder.device}; move them to one device"
        )


def check_sparse(home: Home, x: Any, weights: Weights, latents: SparseLatents, d_recons: Any) -> None:
    """What `sparse_gradients` is given."""
    check_encode(home, x, weights)
    check_latents(home, latents, weights, len(x))
    check_rows(home, "d_recons", d_recons, weights)
    if d_recons.shape != x.shape:
        raise ValueError(f"d_recons must be of the shape of x, {list(x.shape)}, not {list(d_recons.shape)}")


def check_update(
    home: Home, weights: Weights, gradients: Weights | None, optimizer: OptimizerState, update: UpdateSpec
) -> None:
    """What an update is given. All of it is written, so nothing may be under autograd or share memory."""
    check_weights(home, weights)
    if update.step < 1:
        raise ValueError(f"step is {update.step}; the first update is step 1")
    parts = {"weights": weights, "gradients": gradients, **optimizer._asdict()}
    written: list[tuple[int, int, str]] = []
    for part, arrays in parts.items():
        if arrays is None:
            continue
        for name, w, like in zip(Weights._fields, arrays, weights, strict=True):
            label = f"{name} of {part}"
            _check_kind(home, label if part != "weights" else name, w)
            _check_alike(label, w, "encoder", weights.encoder, exact=True)
            if w.shape != like.shape:
                raise ValueError(f"{label} must be {list(like.shape)} like the weights', not {list(w.shape)}")
            _check_writable(home, label, w)
            end = w.data_ptr() + w.element_size() * (
                1 + sum((n - 1) * s for n, s in zip(w.shape, w.stride(), strict=True))
            )
            written.append((w.data_ptr(), end, label))
    written.sort()
    for (_, end, one), (start, _, two) in itertools.pairwise(written):
        if start < end:
            raise ValueError(f"{one} and {two} share memory, and both are updated in place; clone one of them")


def _check_writable(home: Home, label: str, w: Tensor) -> None:
    if w.requires_grad:
        raise ValueError(f"{label} is updated in place and must not require a gradient; detach it first")
    if home.strict and (not w.is_contiguous() or w.is_neg() or w.is_conj()):
        raise ValueError(f"{label} is updated in place and must be contiguous; call .contiguous() on it first")
    if any(stride == 0 and size > 1 for size, stride in zip(w.shape, w.stride(), strict=True)):
        raise ValueError(f"{label} is updated in place and repeats its memory; clone it first")


def _check_kind(home: Home, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is of type {type(t).__name__}; give a tensor")
    if t.layout != torch.strided or t.is_nested or t.is_quantized:
        raise ValueError(f"{name} is {t.layout}; give a plain dense tensor")
    if not home.takes(t):
        raise ValueError(f"{name} is {t.dtype} on {t.device}; {home.words}")


def _check_alike(name: str, t: Tensor, other: str, like: Tensor, *, exact: bool) -> None:
    holds = t.dtype == like.dtype if exact else torch.promote_types(t.dtype, like.dtype) == like.dtype
    if not holds or t.device != like.device:
        raise ValueError(
            f"{name} is {t.dtype} on {t.device} and {other} {like.dtype} on {like.device}; convert one of them"
        )
