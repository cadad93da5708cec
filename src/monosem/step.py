"""One training step in two halves, and the numbers that the recipe derives from a config.

    out = gradients(state, x, recipe, kernel)           gradients out: nothing is changed
    apply(state, out, recipe, kernel, n_tokens)         apply update: weights, moments, average, dead counters

Between the halves gradients may be reduced over replicas; several autoencoders may share one `x`. `advance` does both,
and lets kernels that can fuse them do so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosem import variants
from monosem.config import TrainConfig, activation_facts
from monosem.kernels import torch_sparse
from monosem.types import (
    Extras,
    ExtrasState,
    LossSpec,
    OptimizerState,
    SparseLatents,
    StepGradients,
    UpdateSpec,
    Weights,
)

LR_AT_4096 = 2.8e-3
DEAD_TOKENS = 10_000_000
DEAD_WINDOW_TOKENS = 500_000


def default_lr(n_latents: int) -> float:
    """LR_AT_4096 * sqrt(4096 / n_latents): the paper's 1/sqrt(n) rule, anchored by a sweep (docs/reproduce.md)."""
    return LR_AT_4096 * math.sqrt(4096 / n_latents)


def default_auxk(d_model: int) -> int:
    """The power of two nearest d_model / 2 (on a log scale): 512 for GPT-2 small's 768, as in the paper's text."""
    return 1 << max(0, round(math.log2(d_model / 2)))


def default_dead_tokens_threshold(n_tokens: int) -> int:
    """min(10M, n_tokens / 16): the paper's 10M tokens would never pass in a short run, so AuxK would never act."""
    return max(1, min(DEAD_TOKENS, n_tokens // 16))


def default_ema(n_steps: int) -> float:
    """min(0.999, 1 - 20 / n_steps): with the paper's 0.999 a short run would average in its initialisation."""
    return max(0.0, min(0.999, 1 - 20 / n_steps))


@dataclass(frozen=True)
class Recipe:
    """A config with every default turned into a number."""

    activation: str
    activation_options: dict[str, float]
    k: int
    n_steps: int
    batch_size: int
    lr: float
    lr_warmup_steps: int
    mse_scale: float
    auxk: int
    auxk_coef: float
    dead_tokens_threshold: int
    sparsity_coef: float
    sparsity_warmup_steps: int
    ema: float
    clip_norm: float | None
    precision: str

    def loss_spec(self, step: int, audit: tuple[int, ...] = ()) -> LossSpec:
        """What step `step` (from 1) differentiates. `audit`: see `LossSpec.audit`."""
        sparsity_coef = self.sparsity_coef * _ramp(step, self.sparsity_warmup_steps)
        auxk = self.auxk, self.auxk_coef
        options = self.activation_options
        return LossSpec(self.k, self.mse_scale, *auxk, sparsity_coef, self.precision, options, audit)

    def update_spec(self, step: int) -> UpdateSpec:
        """How step `step` (from 1) is applied."""
        return UpdateSpec(step, self.lr * _ramp(step, self.lr_warmup_steps), self.ema, self.clip_norm)


def recipe(config: TrainConfig, d_model: int, mse_scale: float) -> Recipe:
    """Resolve `config` for activations of width `d_model`."""
    n_steps = math.ceil(config.n_tokens / config.batch_size)
    has_auxk = "auxk" in activation_facts(config.activation).uses
    auxk = 0 if not has_auxk else default_auxk(d_model) if config.auxk is None else config.auxk
    return Recipe(
        activation=config.activation,
        activation_options=variants.resolve_options(config.activation, config.activation_options, config.n_latents),
        k=config.k,
        n_steps=n_steps,
        batch_size=config.batch_size,
        lr=default_lr(config.n_latents) if config.lr is None else config.lr,
        lr_warmup_steps=config.lr_warmup_steps,
        mse_scale=mse_scale,
        auxk=auxk,
        auxk_coef=config.auxk_coef,
        dead_tokens_threshold=config.dead_tokens_threshold or default_dead_tokens_threshold(config.n_tokens),
        sparsity_coef=config.sparsity_coef,
        sparsity_warmup_steps=config.sparsity_warmup_steps,
        ema=default_ema(n_steps) if config.ema is None else config.ema,
        clip_norm=config.clip_norm,
        precision=config.precision,
    )


@dataclass
class TrainState:
    """Everything a step changes; saved whole, it resumes to the bit."""

    step: int
    weights: Weights
    optimizer: OptimizerState
    tokens_since_fired: Int[Tensor, " n_latents"]
    n_auxk_dropped: Int[Tensor, ""]
    extras: ExtrasState

    @staticmethod
    def new(weights: Weights, extras: Extras | None = None, *, ema: bool) -> TrainState:
        zeros = [Weights(*(torch.zeros_like(w) for w in weights)) for _ in range(3)]
        optimizer = OptimizerState(zeros[0], zeros[1], zeros[2] if ema else None)
        none = [{name: torch.zeros_like(e) for name, e in (extras or {}).items()} for _ in range(3)]
        extras_state = ExtrasState(extras or {}, none[0], none[1], none[2] if ema else None)
        counters = torch.zeros(len(weights.latent_bias), dtype=torch.int64, device=weights.encoder.device)
        return TrainState(0, weights, optimizer, counters, counters.new_zeros(()), extras_state)

    def dead(self, tokens: int) -> Bool[Tensor, " n_latents"]:
        """Latents whose activation has not exceeded FIRED_THRESHOLD in the last `tokens` tokens."""
        return self.tokens_since_fired >= tokens

    def averaged_weights(self, ema: float) -> Weights:
        """The moving average with its start at zero corrected for: average / (1 - ema^step)."""
        assert self.optimizer.average is not None
        return Weights(*(a / (1 - ema**self.step) for a in self.optimizer.average))

    def averaged_extras(self, ema: float) -> Extras:
        """As `averaged_weights`, of the extras."""
        assert self.extras.average is not None
        return {name: a / (1 - ema**self.step) for name, a in self.extras.average.items()}


def gradients(
    state: TrainState,
    x: Float[Tensor, "batch d_model"],
    recipe: Recipe,
    kernel: ModuleType,
    audit: tuple[int, ...] = (),
) -> StepGradients:
    """The first half: what the next step's loss says, changing nothing. `audit`: see `LossSpec.audit`."""
    spec, dead = recipe.loss_spec(state.step + 1, audit), state.dead(recipe.dead_tokens_threshold)
    return variants.gradients(recipe.activation, x, state.weights, state.extras.values, spec, dead, kernel)


def apply(
    state: TrainState, out: StepGradients, recipe: Recipe, kernel: ModuleType, n_tokens: int
) -> Float[Tensor, ""]:
    """The second half, in place; `n_tokens` is the batch's size over all ranks. Returns the gradient's norm.

    Clipping and the norm look at the four weights; the gradients of extras are scaled down with theirs.
    """
    update = recipe.update_spec(state.step + 1)
    norm = kernel.apply_update(state.weights, out.gradients, state.optimizer, update)
    _update_extras(state.extras, out, update, norm)
    _count(state, out, n_tokens)
    return norm


def advance(
    state: TrainState,
    x: Float[Tensor, "batch d_model"],
    recipe: Recipe,
    kernel: ModuleType,
    audit: tuple[int, ...] = (),
) -> tuple[StepGradients, Float[Tensor, ""]]:
    """Both halves on one machine: the step (its gradients are used up) and the gradient's norm.

    Kernels with a fused `topk_step` take it: the same bits, and no gradient is ever stored.
    """
    fused = getattr(kernel, "topk_step", None)
    if fused is None or recipe.activation != "topk" or recipe.clip_norm is not None:
        out = gradients(state, x, recipe, kernel, audit)
        return out, apply(state, out, recipe, kernel, len(x))
    spec, update = recipe.loss_spec(state.step + 1, audit), recipe.update_spec(state.step + 1)
    out, norm = fused(x, state.weights, spec, state.dead(recipe.dead_tokens_threshold), state.optimizer, update)
    _count(state, out, len(x))
    return out, norm


def encode(
    x: Float[Tensor, "batch d_model"], weights: Weights, extras: Extras, recipe: Recipe, kernel: ModuleType
) -> SparseLatents:
    """The latents of the autoencoder that would be released with these weights."""
    return variants.encode(recipe.activation, x, weights, extras, recipe.k, kernel)


def _update_extras(extras: ExtrasState, out: StepGradients, update: UpdateSpec, norm: Float[Tensor, ""]) -> None:
    """Adam on those that have a gradient, the new value for buffers, then the moving average of both."""
    scale = 1.0 if update.clip_norm is None else (update.clip_norm / norm).clamp(max=1)
    for name, gradient in out.extras.items():
        moments = extras.first[name], extras.second[name]
        torch_sparse.adam(extras.values[name], gradient * scale, *moments, None, update, unit_norm=False)
    for name, value in out.buffers.items():
        extras.values[name].copy_(value)
    for name, average in (extras.average or {}).items():
        average.lerp_(extras.values[name], 1 - update.ema)


def _count(state: TrainState, out: StepGradients, n_tokens: int) -> None:
    state.step += 1
    state.tokens_since_fired.add_(n_tokens).masked_fill_(out.n_fired > 0, 0)
    state.n_auxk_dropped.add_(out.auxk_dropped)


def _ramp(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0
