"""The activation functions, one file each: which latents are active, what is minimised, how that is differentiated.

A file NAME.py here is the activation function NAME, of `TrainConfig(activation="NAME")`; a name that starts with an
underscore is a helper of theirs. Nothing else knows the names: dropping in a file adds one. In it,

    USES     which of the shared settings have an effect: of "k", "auxk", "sparsity_coef"
    OPTIONS  its own settings: name -> (default, least, most); whole numbers where the default is one
             (config.py reads both without running the file, so they are literals)
    extras(weights, options) -> Extras
             what it has beside the weights, at the start: small parameters and buffers, by name. Default: nothing
    loss(x, weights, extras, spec, dead) -> LossTerms
             the definition, dense, for autograd to differentiate in any float dtype
    gradients(x, weights, extras, spec, dead, kernel) -> StepGradients
             the same, fast. Default: autograd, of the whole batch at once
    encode(x, weights, extras, k, kernel) -> SparseLatents
             the latents once it is trained
    check(options, n_latents)
             `ValueError` for options that so many latents cannot have. Default: nothing to check

where x is [batch, d_model], dead [n_latents], and `kernel` a module of `monosem.kernels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosem.config import activation_facts
from monosem.kernels import reference, torch_sparse
from monosem.types import Extras, LossSpec, LossTerms, SparseLatents, StepGradients, Weights


def load(activation: str) -> ModuleType:
    """The module of an activation function; `ValueError` lists those there are."""
    activation_facts(activation)
    return importlib.import_module(f"{__name__}.{activation}")


def resolve_options(activation: str, options: dict[str, float], n_latents: int) -> dict[str, float]:
    """Every option of the activation function, as given or its default; `ValueError` when the latents are too few."""
    resolved = {**_defaults(activation), **options}
    if check := getattr(load(activation), "check", None):
        check(resolved, n_latents)
    return resolved


def initial_extras(activation: str, weights: Weights, options: dict[str, float] | None = None) -> Extras:
    """The extras that training starts from, on the weights' device."""
    make = getattr(load(activation), "extras", None)
    return {} if make is None else make(weights, {**_defaults(activation), **(options or {})})


def extra_names(activation: str) -> tuple[str, ...]:
    """What the extras are called."""
    one = torch.ones(1, 1)
    return tuple(initial_extras(activation, Weights(one, one[0], one, one[0])))


def gradients(
    activation: str,
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    spec: LossSpec,
    dead: Bool[Tensor, " n_latents"],
    kernel: ModuleType,
) -> StepGradients:
    """What the loss of one batch says: by the fast path where there is one, by the definition for `reference`."""
    variant = load(activation)
    if kernel is reference or not hasattr(variant, "gradients"):
        return reference.differentiate(variant.loss, x, weights, extras, spec, dead)
    return variant.gradients(x, weights, extras, spec, dead, kernel)


def encode(
    activation: str,
    x: Float[Tensor, "batch d_model"],
    weights: Weights,
    extras: Extras,
    k: int,
    kernel: ModuleType = torch_sparse,
) -> SparseLatents:
    """The active latents, as the activation function chooses them once it is trained."""
    return load(activation).encode(x, weights, extras, k, kernel)


def by_rows(loss: Callable[..., LossTerms]) -> Callable[..., StepGradients]:
    """`gradients` for a loss that is a mean over tokens: autograd in chunks of rows, so that [B, N] is never whole."""

    def gradients(
        x: Float[Tensor, "batch d_model"],
        weights: Weights,
        extras: Extras,
        spec: LossSpec,
        dead: Bool[Tensor, " n_latents"],
        kernel: ModuleType,
    ) -> StepGradients:
        total = None
        for rows in torch_sparse.row_chunks(len(x), len(weights.latent_bias), x.device):
            out = reference.differentiate(loss, x[rows], weights, extras, spec, dead)
            assert not out.buffers, "a buffer of the whole batch does not come in chunks"
            out = _weighted(out, (rows.stop - rows.start) / len(x))
            total = out if total is None else _sum(total, out)
        assert total is not None, "a batch has rows"
        return total

    return gradients


def _defaults(activation: str) -> dict[str, float]:
    return {name: default for name, (default, _, _) in activation_facts(activation).options.items()}


def _weighted(out: StepGradients, share: float) -> StepGradients:
    means = {name: getattr(out, name) * share for name in ("loss", "mse", "auxiliary", "l0")}
    extras = {name: g * share for name, g in out.extras.items()}
    return out._replace(gradients=Weights(*(g.mul_(share) for g in out.gradients)), extras=extras, **means)


def _sum(a: StepGradients, b: StepGradients) -> StepGradients:
    sums = {name: getattr(a, name) + getattr(b, name) for name in ("loss", "mse", "auxiliary", "l0", "n_fired")}
    extras = {name: g + b.extras[name] for name, g in a.extras.items()}
    into = Weights(*(g.add_(h) for g, h in zip(a.gradients, b.gradients, strict=True)))
    return a._replace(gradients=into, extras=extras, auxk_dropped=a.auxk_dropped | b.auxk_dropped, **sums)
