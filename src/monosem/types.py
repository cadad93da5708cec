"""The nouns that every layer speaks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOCATIONS = ("resid_post_mlp", "resid_post_attn", "resid_delta_mlp", "resid_delta_attn", "mlp_post_act", "attn_z")

FIRED_THRESHOLD = 1e-3
"""A latent fired on a token when its activation exceeds this (Gao et al. 2024, section 2): by value, never by index."""


@dataclass(frozen=True)
class Site:
    """Where in which model activations come from. `location` is one of LOCATIONS, or a module's dotted name
    (its output), or that name and `:input`."""

    model: str
    revision: str | None
    layer: int
    location: str

    def __str__(self) -> str:
        return f"{self.model} layer {self.layer} {self.location}"


class Weights(NamedTuple):
    """The parameters of an autoencoder, or anything of their shape (gradients, moments, an average of them).

    Both matrices are [n_latents, d_model] and contiguous, so that one latent's vectors are too:
    z = act(encoder (x - pre_bias) + latent_bias), recons = z @ decoder + pre_bias.
    """

    encoder: Float[Tensor, "n_latents d_model"]
    latent_bias: Float[Tensor, " n_latents"]
    decoder: Float[Tensor, "n_latents d_model"]
    pre_bias: Float[Tensor, " d_model"]


class SparseLatents(NamedTuple):
    """The latents of a batch: `values[b, j]` is the activation of latent `indices[b, j]`; values are >= 0.

    A slot with value 0 is inactive and its index carries no meaning (fewer than k latents were positive).
    """

    indices: Int[Tensor, "batch k"]
    values: Float[Tensor, "batch k"]
    n_latents: int


Extras = dict[str, Tensor]
"""What an activation function has beside the weights, by name: [n_latents] vectors or scalars (`monosem.variants`)."""


class LossTerms(NamedTuple):
    """A loss written down densely, for autograd to differentiate, and what a step tells of it (see StepGradients)."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    z: Float[Tensor, "batch n_latents"]
    """The latents, dense."""
    auxk_dropped: Bool[Tensor, ""] | None = None
    buffers: Extras | None = None


class StepGradients(NamedTuple):
    """The first half of a training step: gradients out, with what the log and the dead counters need (no host sync)."""

    gradients: Weights
    """(A fused step has none to give: it has already applied them.)"""
    loss: Float[Tensor, ""]
    """What was differentiated: the reconstruction's terms, and a coefficient times `auxiliary` (docs/activations)."""
    mse: Float[Tensor, ""]
    """mse_scale * mean((recons - x)^2)."""
    auxiliary: Float[Tensor, ""]
    """L_aux, or the activation function's penalty (mean_b ||z||_1 of ReLU), before its coefficient."""
    auxk_dropped: Bool[Tensor, ""]
    """L_aux was not finite and its whole gradient was left out of this step."""
    n_fired: Int[Tensor, " n_latents"]
    """Tokens of the batch on which each latent's activation exceeded FIRED_THRESHOLD."""
    l0: Float[Tensor, ""]
    """Mean number of positive values a token."""
    stats: dict[str, Any] | None = None
    """How the latents were found, for the log; None where the kernels do not count (native/README.md: recall,
    n_audited, n_missed, n_saturated, n_rerun, n_rescored, product_s)."""
    extras: Extras = {}  # noqa: RUF012 (nothing writes to it)
    """Gradients of the extras that are trained."""
    buffers: Extras = {}  # noqa: RUF012
    """New values of the extras that are not."""


@dataclass(frozen=True)
class LossSpec:
    """What a step differentiates (Gao et al. 2024, section 2). All but `mse_scale` come from the config."""

    k: int
    mse_scale: float
    """1 / mean((x - mean_0)^2) of a sample at the start, so that the loss starts near 1."""
    auxk: int = 0
    auxk_coef: float = 1 / 32
    sparsity_coef: float = 0.0
    precision: str = "auto"
    """Precision of the product that selects latents ("auto", "fp32", "bf16", "int8"); values are always fp32."""
    options: dict[str, float] = field(default_factory=dict)
    """The activation function's own hyper-parameters, every one of its OPTIONS."""
    audit: tuple[int, ...] = ()
    """Rows of the batch whose latents are compared with their true top k, by fp32 values of all latents; where one was
    missed, the batch is selected again in fp32 (native kernels only). See `StepGradients.stats`."""


class OptimizerState(NamedTuple):
    """Adam's moments and the moving average of the weights (None when it is off), updated in place."""

    first: Weights
    second: Weights
    average: Weights | None


class ExtrasState(NamedTuple):
    """The extras, Adam's moments and their moving average, updated in place; buffers have moments of 0."""

    values: Extras
    first: Extras
    second: Extras
    average: Extras | None


@dataclass(frozen=True)
class UpdateSpec:
    """One application of gradients: Adam with beta = (0.9, 0.999), eps = 6.25e-10."""

    step: int
    """1 for the first update; Adam's bias correction."""
    lr: float
    ema: float = 0.0
    clip_norm: float | None = None


@dataclass(frozen=True)
class Metric:
    """A number a person sees: it always carries how many things it was measured on and a 95% interval."""

    name: str
    value: float
    unit: str
    n: int
    low: float
    high: float


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; `ValueError` when the device named is not on this machine."""
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); use --device cpu or auto") from None
    return found


def free_memory(device: torch.device) -> int:
    """Free bytes: of the GPU, or of this machine and of the control group that this process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    if info.exists():
        (free,) = (int(line.split()[1]) << 10 for line in info.read_text().splitlines() if "MemAvailable" in line)
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
