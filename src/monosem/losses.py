"""The formulas that are differentiated, and the ones that are reported, each in one place."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def mse(recons: Float[Tensor, "batch d_model"], x: Float[Tensor, "batch d_model"], scale: float) -> Float[Tensor, ""]:
    """scale * mean over batch and d_model of (recons - x)^2 (Gao et al. 2024, section 2.1)."""
    return scale * (recons - x).square().mean()


def mse_scale(sample: Float[Tensor, "batch d_model"]) -> float:
    """1 / mean((x - mean_0)^2): the constant that makes the loss of predicting the mean 1.

    `ValueError` when the sample does not vary.
    """
    sample = sample.double()
    variance = (sample - sample.mean(0)).square().mean().item()
    if variance == 0:
        raise ValueError("all activations of the sample are equal; there is nothing to learn: choose another site")
    return 1.0 / variance


def auxk(recons_aux: Float[Tensor, "batch d_model"], error: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """mse(e_hat, e) / mse(e - mean_batch(e)), with e = x - recons (Gao et al. 2024, section A.2; no pre_bias in e_hat).

    `error` must come detached: AuxK trains dead latents to model the error, not the error to be modelled.
    """
    return (recons_aux - error).square().mean() / error_variance(error)


def error_variance(error: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
    """mse(e - mean_batch(e)): what predicting the batch's mean error would leave."""
    return (error - error.mean(0)).square().mean()


def l1(values: Float[Tensor, "batch n_active"]) -> Float[Tensor, ""]:
    """mean over the batch of ||z||_1."""
    return values.abs().sum(-1).mean()


def normalized_mse(recons: Float[Tensor, "batch d_model"], x: Float[Tensor, "batch d_model"]) -> float:
    """sum ||x - recons||^2 / sum ||x - mean(x)||^2 with float64 sums: 1 when predicting the mean, 0 when exact."""
    x, recons = x.cpu().double(), recons.cpu().double()  # MPS has no float64
    return ((x - recons).square().sum() / (x - x.mean(0)).square().sum()).item()


def geometric_median(
    points: Float[Tensor, "n d_model"], *, tolerance: float = 1e-6, max_steps: int = 200
) -> Float[Tensor, " d_model"]:
    """The point with the least summed distance to `points`, by Weiszfeld's iteration in float64.

    Stops when a step moves less than `tolerance` times the median distance; `ValueError` if it never does.
    """
    points = points.double()
    median = points.mean(0)
    for _ in range(max_steps):
        distances = (points - median).norm(dim=1).clamp_min(1e-12)
        weights = 1 / distances
        moved = (weights @ points) / weights.sum()
        step = (moved - median).norm()
        median = moved
        if step <= tolerance * distances.median():  # the median: one far outlier must not loosen the test
            return median
    raise ValueError(f"the geometric median did not settle in {max_steps} steps; are there NaN or Inf activations?")
