"""Ours must be right before they are timed: a small step against the fp64 definition, per parameter."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from monosem import losses
from monosem.kernels import reference
from monosem.types import LossSpec, OptimizerState, StepGradients, UpdateSpec, Weights

N_LATENTS, D_MODEL, BATCH, K, AUXK = 1000, 200, 96, 24, 48
SLACK = 2.0
"""An error may be this many times that of dense fp32 torch (plus rounding of the largest gradient)."""


class ParityError(Exception):
    """An implementation does not compute what the definition says; it is not timed."""


def check(kernel: ModuleType, precision: str, device: str = "cpu") -> None:
    """`ParityError` unless values, gradients (with and without AuxK) and the update agree with `reference`."""
    weights, x, dead = _case()
    here = _moved(weights, device)
    for auxk in (0, AUXK):
        spec = LossSpec(k=K, mse_scale=losses.mse_scale(x), auxk=auxk, precision=precision)
        ours = kernel.topk_gradients(x.to(device), here, spec, dead.to(device))
        _check_gradients(ours, x, weights, spec, dead)
        _check_update(kernel, ours, x, weights, spec, dead, device)


def _check_gradients(ours: StepGradients, x: Tensor, weights: Weights, spec: LossSpec, dead: Tensor) -> None:
    truth = reference.topk_gradients(x.double(), Weights(*(w.double() for w in weights)), spec, dead)
    dense = reference.topk_gradients(x, weights, spec, dead)
    if not torch.equal(ours.n_fired.cpu(), truth.n_fired):
        raise ParityError("parity: other latents fire than in the reference")
    size = max(g.norm() for g in truth.gradients).item()
    for name, true, mine, plain in zip(Weights._fields, truth.gradients, ours.gradients, dense.gradients, strict=True):
        error, allowed = (mine.cpu() - true).norm().item(), SLACK * (plain - true).norm().item() + 2e-7 * size
        if not error <= allowed:
            raise ParityError(f"parity: the gradient of {name} is off by {error:.3g}; {allowed:.3g} is allowed")


def _check_update(
    kernel: ModuleType, ours: StepGradients, x: Tensor, weights: Weights, spec: LossSpec, dead: Tensor, device: str
) -> None:
    """From the same gradients: the fused step where there is one (else `apply_update`) against the reference's."""
    update = UpdateSpec(step=1, lr=1e-3)
    found, state = _moved(weights, device), _zeros(weights, device)
    gradients = Weights(*(g.cpu().double() for g in ours.gradients))
    if hasattr(kernel, "topk_step"):
        kernel.topk_step(x.to(device), found, spec, dead.to(device), state, update)
    else:
        kernel.apply_update(found, ours.gradients, state, update)
    expected = Weights(*(w.double() for w in weights))
    reference.apply_update(expected, gradients, OptimizerState(*(_like(expected), _like(expected)), None), update)
    for name, w, true in zip(Weights._fields, found, expected, strict=True):
        error = (w.cpu() - true).abs().max().item()
        if not error <= 2e-6:
            raise ParityError(f"parity: after one update {name} is off by {error:.3g}; 2e-06 is allowed")


def _case() -> tuple[Weights, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    decoder = torch.randn(N_LATENTS, D_MODEL, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = decoder + 0.02 * torch.randn(N_LATENTS, D_MODEL, generator=generator)
    bias, pre_bias = (0.1 * torch.randn(n, generator=generator) for n in (N_LATENTS, D_MODEL))
    dead = torch.rand(N_LATENTS, generator=generator) < 0.1
    return Weights(encoder, bias, decoder, pre_bias), torch.randn(BATCH, D_MODEL, generator=generator), dead


def _moved(weights: Weights, device: str) -> Weights:
    return Weights(*(w.to(device, copy=True) for w in weights))


def _like(weights: Weights) -> Weights:
    return Weights(*(torch.zeros_like(w) for w in weights))


def _zeros(weights: Weights, device: str) -> OptimizerState:
    return OptimizerState(_moved(_like(weights), device), _moved(_like(weights), device), None)
