"""What the compiled step is given by mistake: the right answer or one clear line, never a crash."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monosem.kernels import native_is_built
from monosem.types import LossSpec, OptimizerState, StepGradients, UpdateSpec, Weights
from test_kernels import make

if not native_is_built() and "CI" not in os.environ:
    pytest.skip("monosem._native is not in this install", allow_module_level=True)

from monosem import _native
from monosem.kernels import native, reference

ROWS, D_MODEL, N_LATENTS, K = 30, 22, 90, 5
SPEC = LossSpec(k=K, mse_scale=0.7, auxk=8)
DEAD = torch.arange(N_LATENTS) % 4 == 0


def shifted(t: Tensor) -> Tensor:
    """The same numbers, 4 bytes off every alignment."""
    return torch.cat([torch.zeros(1, dtype=t.dtype), t.flatten()])[1:].view(t.shape)


def every_other(t: Tensor) -> Tensor:
    """The same numbers, with others between them along each dimension."""
    wide = torch.full([2 * n for n in t.shape], 99).to(t.dtype)
    here = tuple(slice(None, None, 2) for _ in t.shape)
    wide[here] = t
    return wide[here]


def turned(t: Tensor) -> Tensor:
    """The same numbers, the first dimension varying fastest."""
    return t.T.contiguous().T if t.ndim == 2 else t


def assert_same(a: StepGradients, b: StepGradients) -> None:
    assert torch.equal(a.n_fired, b.n_fired) and a.loss == b.loss
    assert all(torch.equal(one, two) for one, two in zip(a.gradients, b.gradients, strict=True))


@pytest.mark.parametrize("view", [shifted, every_other, turned])
def test_views_give_the_bits_of_their_copies(view: Callable[[Tensor], Tensor]) -> None:
    x, weights = make(ROWS, D_MODEL, N_LATENTS)
    expected = native.topk_gradients(x, weights, SPEC, DEAD)
    seen = native.topk_gradients(view(x), Weights(*(view(w) for w in weights)), SPEC, view(DEAD))
    assert_same(seen, expected)


def test_repeated_rows_without_memory_of_their_own_are_right() -> None:
    x, weights = make(ROWS, D_MODEL, N_LATENTS)
    repeated = x[:1].expand(ROWS, D_MODEL)
    expected = native.topk_gradients(repeated.clone(), weights, SPEC, DEAD)
    assert_same(native.topk_gradients(repeated, weights, SPEC, DEAD), expected)


def test_rows_in_reverse_by_a_negative_stride_are_right() -> None:
    """torch has no negative strides; the module itself, which takes any array, gets one."""
    x, weights = make(ROWS, D_MODEL, N_LATENTS)
    backwards = x.numpy()[::-1]
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(backwards)
    indices, values = torch.empty(ROWS, K, dtype=torch.int64), torch.empty(ROWS, K)
    _native.topk_encode(backwards, weights, K, "fp32", indices, values)
    expected = native.topk_encode(torch.from_numpy(np.ascontiguousarray(backwards)), weights, K)
    assert torch.equal(indices, expected.indices) and torch.equal(values, expected.values)


def test_a_scale_that_is_not_finite_shows_in_the_loss() -> None:
    x, weights = make(ROWS, D_MODEL, N_LATENTS)
    assert native.topk_gradients(x, weights, dataclasses.replace(SPEC, mse_scale=float("nan")), DEAD).loss.isnan()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_latent_with_an_infinite_threshold_is_never_active(precision: str) -> None:
    x, weights = make(ROWS, D_MODEL, N_LATENTS)
    threshold = torch.full((N_LATENTS,), 3.0)
    expected = reference.dense(native.threshold_encode(x, weights, threshold, precision))
    silenced = int(expected.sum(0).argmax())
    threshold[silenced] = torch.inf
    found = reference.dense(native.threshold_encode(x, weights, threshold, precision))
    expected[:, silenced] = 0
    assert expected.any() and torch.equal(found, expected)


@pytest.mark.parametrize("call", ["topk_gradients", "topk_step"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.double(), w, SPEC, DEAD), "x is torch.float64"),
        (lambda x, w: (x.to("meta"), w, SPEC, DEAD), "on meta"),
        (lambda x, w: (x[:, :4], w, SPEC, DEAD), "x must be .* d_model"),
        (lambda x, w: (x[:0], w, SPEC, DEAD), "batch is empty"),
        (lambda x, w: (x, w._replace(encoder=w.encoder.bfloat16()), SPEC, DEAD), "encoder is torch.bfloat16"),
        (lambda x, w: (x, w._replace(decoder=w.decoder.T.contiguous()), SPEC, DEAD), "weights must be"),
        (lambda x, w: (x, w._replace(pre_bias=w.pre_bias[:3]), SPEC, DEAD), "weights must be"),
        (lambda x, w: (x, w, SPEC, DEAD[:50]), "dead must be"),
        (lambda x, w: (x, w, dataclasses.replace(SPEC, k=0), DEAD), "k must be"),
        (lambda x, w: (x, w, dataclasses.replace(SPEC, k=2**40), DEAD), "k must be"),
        (lambda x, w: (x, w, dataclasses.replace(SPEC, auxk=-1), DEAD), "auxk must not be negative"),
    ],
)
def test_a_wrong_step_is_refused_in_one_line_and_changes_nothing(change: Any, message: str, call: str) -> None:
    x, weights = make(ROWS, D_MODEL, N_LATENTS)
    arguments = change(x, weights)
    before, state = [w.clone() for w in weights], OptimizerState(zeros(weights), zeros(weights), None)
    extra = (state, UpdateSpec(1, 1e-3)) if call == "topk_step" else ()
    with pytest.raises(ValueError, match=message) as caught:
        getattr(native, call)(*arguments, *extra)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("gradients", lambda g: g._replace(encoder=g.encoder.double()), "encoder of gradients is torch.float64"),
        ("gradients", lambda g: g._replace(encoder=g.encoder[:5]), "encoder of gradients must be"),
        ("first", lambda g: g._replace(decoder=g.decoder[:, :7].contiguous()), "decoder of first must be"),
        ("second", lambda g: g._replace(decoder=every_other(g.decoder)), "decoder of second is updated in place"),
        ("first", lambda g: g._replace(pre_bias=g.pre_bias.to("meta")), "on meta"),
    ],
)
def test_a_wrong_update_is_refused_in_one_line(part: str, change: Any, message: str) -> None:
    _, weights = make(ROWS, D_MODEL, N_LATENTS)
    parts = {name: zeros(weights) for name in ("gradients", "first", "second")}
    parts[part] = change(parts[part])
    with pytest.raises(ValueError, match=message) as caught:
        native.apply_update(
            weights, parts["gradients"], OptimizerState(parts["first"], parts["second"], None), UpdateSpec(1, 1e-3)
        )
    assert "\n" not in str(caught.value)


def zeros(weights: Weights) -> Weights:
    return Weights(*(torch.zeros_like(w) for w in weights))
