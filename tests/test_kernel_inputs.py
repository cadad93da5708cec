"""Every public function of every implementation, at the edge of what it takes: the reference's answer, or a refusal.

With TRITON_INTERPRET=1 (test_triton.py) the Triton kernels alone.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from monosem import kernels
from monosem.kernels import reference, torch_sparse
from monosem.types import LossSpec, OptimizerState, SparseLatents, UpdateSpec, Weights

KERNELS: list[ModuleType] = [reference, torch_sparse]
if kernels.native_is_built() or "CI" in os.environ:
    from monosem.kernels import native

    KERNELS.append(native)
if os.environ.get("TRITON_INTERPRET") == "1":
    from monosem.kernels import triton_step

    KERNELS = [triton_step]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda module: module.__name__.rpartition(".")[2])

N, D, BATCH, K = 40, 12, 9, 4
SPEC = LossSpec(k=K, mse_scale=0.7, auxk=6, auxk_coef=0.25)


def make() -> tuple[Tensor, Weights]:
    g = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(N, D, generator=g))
    encoder = decoder + 0.05 * torch.randn(N, D, generator=g)
    weights = Weights(encoder, 0.1 * torch.randn(N, generator=g), decoder, 0.1 * torch.randn(D, generator=g))
    return torch.randn(BATCH, D, generator=g), weights


def dead() -> Tensor:
    return torch.arange(N) % 3 == 0


def state(weights: Weights) -> OptimizerState:
    return OptimizerState(*(Weights(*(torch.full_like(w, 0.01) for w in weights)) for _ in range(3)))


def calls(kernel: ModuleType) -> dict[str, Callable[[Tensor, Weights], Any]]:
    """By name, every function of the contract, of x and weights, all its tensors through `view`."""
    x, weights = make()
    latents = reference.topk_encode(x, weights, K)
    threshold, d_recons = torch.full((N,), 0.2), torch.linspace(-1, 1, BATCH * D).view(BATCH, D)

    def step(x: Tensor, w: Weights) -> Any:
        return kernel.topk_gradients(x, w, SPEC, dead())[:5]

    def update(x: Tensor, w: Weights) -> Any:
        w, optimizer = Weights(*(t.clone() for t in w)), state(w)
        gradients = Weights(*(torch.sin(t) for t in w))
        norm = kernel.apply_update(w, gradients, optimizer, UpdateSpec(step=2, lr=1e-2, ema=0.9))
        return norm, w, optimizer

    return {
        "topk_encode": lambda x, w: reference.dense(kernel.topk_encode(x, w, K)),
        "relu_encode": lambda x, w: reference.dense(kernel.relu_encode(x, w)),
        "threshold_encode": lambda x, w: reference.dense(kernel.threshold_encode(x, w, like(x, threshold))),
        "decode": lambda x, w: kernel.decode(latents._replace(values=like(x, latents.values)), w),
        "topk_gradients": step,
        "relu_gradients": lambda x, w: kernel.relu_gradients(x, w, SPEC)[:4],
        "sparse_gradients": lambda x, w: kernel.sparse_gradients(x, w, latents, like(x, d_recons), 0.3),
        "apply_update": update,
    }


def like(x: Tensor, t: Tensor) -> Tensor:
    """`t` as a view of the kind that x is."""
    return t.neg()._neg_view() if x.is_neg() else t


def negated(t: Tensor) -> Tensor:
    """A lazily negated view of -t: contiguous, and its memory holds -t."""
    return torch._neg_view(t.neg())


def imaginary(t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: another lazy negation, in every other number of its memory."""
    return torch.complex(torch.zeros_like(t), t.neg()).conj().imag


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for part in found if part is not None for t in flat(part)]


NAMES = list(calls(reference))


@each_kernel
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", [negated, imaginary])
def test_lazily_negated_views_are_read_as_what_they_say(view: Any, name: str, kernel: ModuleType) -> None:
    x, weights = make()
    expected = calls(reference)[name](x, weights)
    assert view(x).is_neg() and torch.equal(view(x), x)
    found = calls(kernel)[name](view(x), Weights(*map(view, weights)))
    for ours, truth in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@each_kernel
def test_an_empty_batch_encodes_to_nothing_and_cannot_be_learnt_from(kernel: ModuleType) -> None:
    x, w = make()
    x, none = x[:0], SparseLatents(torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K), N)
    assert kernel.topk_encode(x, w, K).values.shape == (0, K)
    assert kernel.relu_encode(x, w).values.shape == kernel.threshold_encode(x, w, torch.ones(N)).values.shape == (0, 0)
    assert kernel.decode(none, w).shape == (0, D)
    assert all(
        not g.any() and g.shape == p.shape for g, p in zip(kernel.sparse_gradients(x, w, none, x), w, strict=True)
    )
    for learn in (lambda: kernel.topk_gradients(x, w, SPEC, dead()), lambda: kernel.relu_gradients(x, w, SPEC)):
        with pytest.raises(ValueError, match="batch is empty"):
            learn()


@each_kernel
def test_no_slot_at_all_and_foreign_indices_of_inactive_slots_are_fine(kernel: ModuleType) -> None:
    x, w = make()
    nothing = SparseLatents(torch.zeros(BATCH, 0, dtype=torch.int64), torch.zeros(BATCH, 0), N)
    torch.testing.assert_close(kernel.decode(nothing, w), w.pre_bias.expand(BATCH, D))
    latents = reference.topk_encode(x, w, K)
    off = torch.arange(BATCH * K).view(BATCH, K) % 2 == 0
    values = latents.values.masked_fill(off, 0)
    foreign = SparseLatents(latents.indices.masked_fill(off, 2**40), values, N)
    expected = latents._replace(values=values)
    torch.testing.assert_close(kernel.decode(foreign, w), reference.decode(expected, w), rtol=1e-4, atol=1e-5)
    for ours, truth in zip(
        kernel.sparse_gradients(x, w, foreign, x), reference.sparse_gradients(x, w, expected, x), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def unchecked(kernel: ModuleType) -> Any:
    """The functions as a user has them: tests alone check arguments against annotations before a function sees them."""
    names = [*NAMES, *(["topk_step"] if hasattr(kernel, "topk_step") else [])]
    return SimpleNamespace(**{name: inspect.unwrap(getattr(kernel, name)) for name in names})


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@each_kernel
@pytest.mark.parametrize("k", [0, -3, N + 1, 2**40, True])
def test_k_out_of_range_is_refused(k: Any, kernel: ModuleType) -> None:
    x, w = make()
    for wrong in (k, 2.5, None, "4"):
        call = functools.partial(unchecked(kernel).topk_encode, x, w, wrong)
        refused(call, "k must be a whole number between 1 and")
    spec = LossSpec(k=k, mse_scale=1.0)
    refused(lambda: kernel.topk_gradients(x, w, spec, dead()), "k must be a whole number")


WRONG: dict[str, tuple[Callable[[Tensor, Weights], tuple[Any, Weights]], str]] = {
    "a row alone": (lambda x, w: (x[0], w), r"x must be \[batch, d_model\]"),
    "rows of contexts": (lambda x, w: (x[None], w), r"x must be \[batch, d_model\]"),
    "narrow rows": (lambda x, w: (x[:, :5], w), "d_model 12"),
    "whole numbers": (lambda x, w: (x.long(), w), "x is torch.int64"),
    "wide numbers": (lambda x, w: (x.double(), w), "x is torch.float64"),
    "complex numbers": (lambda x, w: (x.to(torch.complex64), w), "x is torch.complex64"),
    "nowhere": (lambda x, w: (x.to("meta"), w), "on meta"),
    "sparse rows": (lambda x, w: (x.to_sparse(), w), "dense tensor"),
    "no tensor": (lambda x, w: (x.tolist(), w), "of type list"),
    "a turned decoder": (lambda x, w: (x, w._replace(decoder=w.decoder.T)), "weights must be"),
    "a bias of one": (lambda x, w: (x, w._replace(latent_bias=w.latent_bias[:1])), "weights must be"),
    "a bias of two dimensions": (lambda x, w: (x, w._replace(pre_bias=w.pre_bias[None])), "weights must be"),
    "mixed weights": (lambda x, w: (x, w._replace(decoder=w.decoder.bfloat16())), "decoder is torch.bfloat16"),
    "no latents": (
        lambda x, w: (x, Weights(w.encoder[:0], w.latent_bias[:0], w.decoder[:0], w.pre_bias)),
        "0 latents",
    ),
    "no width": (lambda x, w: (x[:, :0], Weights(w[0][:, :0], w[1], w[2][:, :0], w[3][:0])), "d_model 0"),
}


@each_kernel
@pytest.mark.parametrize("case", WRONG)
def test_wrong_ranks_shapes_dtypes_and_devices_are_refused(case: str, kernel: ModuleType) -> None:
    change, message = WRONG[case]
    kernel = unchecked(kernel)
    x, w = make()
    latents = reference.topk_encode(x, w, K)
    x, w = change(x, w)
    refused(lambda: kernel.topk_encode(x, w, 1), message)
    refused(lambda: kernel.relu_encode(x, w), message)
    refused(lambda: kernel.threshold_encode(x, w, torch.ones(N)), message)
    refused(lambda: kernel.topk_gradients(x, w, SPEC, dead()), message)
    refused(lambda: kernel.relu_gradients(x, w, SPEC), message)
    refused(lambda: kernel.sparse_gradients(x, w, latents, torch.ones(BATCH, D)), message)


@each_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z._replace(indices=z.indices[:, :2]), "one batch and one k"),
        (lambda z: z._replace(values=z.values[0]), "one batch and one k"),
        (lambda z: z._replace(indices=z.indices.float()), "indices are torch.float32"),
        (lambda z: z._replace(values=z.values.double()), "values is torch.float64"),
        (lambda z: z._replace(indices=torch.full_like(z.indices, -1)), r"index -1 is outside 0\.\.39"),
        (lambda z: z._replace(indices=torch.full_like(z.indices, N)), r"index 40 is outside 0\.\.39"),
        (lambda z: z._replace(values=-z.values), "activations are not negative"),
        (lambda z: z._replace(n_latents=N + 1), "41 latents and the weights of 40"),
    ],
)
def test_latents_that_are_none_of_these_weights_are_refused(change: Any, message: str, kernel: ModuleType) -> None:
    x, w = make()
    latents, kernel = change(reference.topk_encode(x, w, K)), unchecked(kernel)
    refused(lambda: kernel.decode(latents, w), message)
    refused(lambda: kernel.sparse_gradients(x, w, latents, torch.ones(BATCH, D)), message)


@each_kernel
def test_what_goes_with_a_batch_must_fit_it(kernel: ModuleType) -> None:
    x, w = make()
    kernel = unchecked(kernel)
    latents, few = reference.topk_encode(x, w, K), reference.topk_encode(x[:3], w, K)
    refused(lambda: kernel.sparse_gradients(x, w, few, x), "3 rows and x of 9")
    refused(lambda: kernel.sparse_gradients(x, w, latents, x[:3]), "d_recons must be of the shape of x")
    refused(lambda: kernel.sparse_gradients(x, w, latents, x[0]), r"d_recons must be \[batch, d_model\]")
    refused(lambda: kernel.threshold_encode(x, w, torch.ones(1)), r"threshold must be \[n_latents\]")
    refused(lambda: kernel.threshold_encode(x, w, torch.ones(N, dtype=torch.int64)), "threshold is torch.int64")
    for wrong in (dead()[:5], dead()[None], dead().long(), dead().to("meta"), dead().tolist()):
        refused(functools.partial(kernel.topk_gradients, x, w, SPEC, wrong), "dead ")
    negative = LossSpec(k=K, mse_scale=1.0, auxk=-1)
    refused(lambda: kernel.topk_gradients(x, w, negative, dead()), "auxk must not be negative")


def tied(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    return w._replace(decoder=w.encoder), optimizer


def overlapping(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    memory = torch.rand(2 * N * D)
    one, two = memory[: N * D].view(N, D), memory[5 : N * D + 5].view(N, D)
    return w, optimizer._replace(first=w._replace(encoder=one), second=w._replace(encoder=two))


def one_state(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    return w, optimizer._replace(second=optimizer.first)


def averaged_into_itself(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    return w, optimizer._replace(average=w)


def under_autograd(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    return w._replace(encoder=w.encoder.clone().requires_grad_()), optimizer


def repeated(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    return w._replace(latent_bias=w.latent_bias[:1].expand(N)), optimizer


def shorter(w: Weights, optimizer: OptimizerState) -> tuple[Weights, OptimizerState]:
    return w, optimizer._replace(first=optimizer.first._replace(decoder=w.decoder[:3]))


@each_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tied, "share memory"),
        (overlapping, "share memory"),
        (one_state, "share memory"),
        (averaged_into_itself, "share memory"),
        (under_autograd, "must not require a gradient"),
        (repeated, "repeats its memory|must be contiguous"),
        (shorter, r"decoder of first must be \[40, 12\]"),
    ],
)
def test_an_update_that_would_write_one_thing_twice_is_refused(change: Any, message: str, kernel: ModuleType) -> None:
    x, w = make()
    w, optimizer = change(w, state(w))
    before = [t.detach().clone() for t in flat([w, optimizer])]
    gradients = Weights(*(torch.ones_like(t) for t in make()[1]))
    refused(lambda: kernel.apply_update(w, gradients, optimizer, UpdateSpec(step=1, lr=1e-2)), message)
    if hasattr(kernel, "topk_step"):
        refused(lambda: kernel.topk_step(x, w, SPEC, dead(), optimizer, UpdateSpec(step=1, lr=1e-2)), message)
    assert all(torch.equal(a, b) for a, b in zip(flat([w, optimizer]), before, strict=True))


@each_kernel
def test_a_gradient_that_is_the_weights_and_a_step_before_the_first_are_refused(kernel: ModuleType) -> None:
    _, w = make()
    refused(lambda: kernel.apply_update(w, w, state(w), UpdateSpec(step=1, lr=1e-2)), "share memory")
    gradients = Weights(*(torch.ones_like(t) for t in w))
    refused(lambda: kernel.apply_update(w, gradients, state(w), UpdateSpec(step=0, lr=1e-2)), "step is 0")
