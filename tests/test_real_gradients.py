"""Values and gradients of every kernel on an autoencoder trained on a real model, with a tenth of its latents dead."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from monosem import kernels, losses
from monosem.activations import ActivationStore, harvest
from monosem.config import HarvestConfig, TrainConfig
from monosem.kernels import reference
from monosem.model import Autoencoder, normalize
from monosem.training import train
from monosem.types import LossSpec, SparseLatents, StepGradients, Weights

N_LATENTS, K, AUXK, ROWS = 2048, 32, 128, 1024
IMPLS = [("torch", "fp32"), *(("native", p) for p in ("fp32", "bf16", "int8") if kernels.native_is_built())]
SLACK = 1.5
"""An error may be this many times that of dense torch in fp32, plus the rounding of the largest gradient."""


@pytest.mark.real
def test_every_kernel_is_as_exact_as_dense_fp32_on_real_weights(tmp_path: Path) -> None:
    weights, x, dead = trained(tmp_path)
    assert dead.float().mean() >= 0.1
    spec = LossSpec(k=K, mse_scale=losses.mse_scale(x), auxk=AUXK)
    exact = Weights(*(w.double() for w in weights))
    truth = reference.topk_gradients(x.double(), exact, spec, dead)
    dense = reference.topk_gradients(x, weights, spec, dead)
    chosen = reference.topk_encode(x.double(), exact, K)
    without = reference.topk_gradients(x.double(), exact, spec, torch.zeros_like(dead))
    reached = (truth.gradients.encoder != without.gradients.encoder).any(dim=1)
    assert reached[dead].float().mean() >= 0.5 and not reached[~dead].any(), "AuxK does not act, so it is not tested"
    for impl, precision in IMPLS:
        kernel = kernels.select(impl, torch.device("cpu"))[1]
        check(kernel, precision, x, weights, spec, dead, truth, dense, chosen)


def trained(folder: Path) -> tuple[Weights, Tensor, Tensor]:
    """The weights of a short run, held-out rows, and which latents to call dead: the tenth that fires least.

    Those that really die in a short run at a high lr have no positive pre-activation on any row: AuxK would not act.
    """
    store = harvest(HarvestConfig(out=str(folder / "store"), n_tokens=20_000, n_tokens_held_out=ROWS, device="cpu"))
    train(
        TrainConfig(
            out=str(folder / "run"), store=str(store.path), n_latents=N_LATENTS, k=K, n_tokens=60_000, batch_size=256,
            device="cpu",
        )
    )  # fmt: skip
    weights = Autoencoder.load(folder / "run" / "autoencoder").weights
    fired = torch.zeros(N_LATENTS)
    for batch in ActivationStore.open(folder / "store").batches("train", ROWS):
        latents = reference.topk_encode(normalize(batch)[0], weights, K)
        fired += (reference.dense(latents) > 0).sum(0)
    return weights, normalize(store.rows("held_out")[:ROWS].float())[0], fired <= fired.quantile(0.1)


def check(
    kernel: ModuleType, precision: str, x: Tensor, weights: Weights, spec: LossSpec, dead: Tensor,
    truth: StepGradients, dense: StepGradients, chosen: SparseLatents,
) -> None:  # fmt: skip
    name = f"{kernel.__name__} {precision}"
    latents = kernel.topk_encode(x, weights, K, precision)
    assert recall(latents, chosen) >= 0.9999, name
    got = kernel.topk_gradients(x, weights, LossSpec(**{**vars(spec), "precision": precision}), dead)
    size = max(g.norm() for g in truth.gradients).item()
    for part, true, ours, plain in zip(Weights._fields, truth.gradients, got.gradients, dense.gradients, strict=True):
        error, allowed = (ours - true).norm().item(), SLACK * (plain - true).norm().item() + 1e-7 * size
        assert error <= allowed, f"{name}: the gradient of {part} is off by {error:.3g}, {allowed:.3g} is allowed"
    for part in ("loss", "mse", "auxiliary", "l0"):
        assert getattr(got, part).item() == pytest.approx(getattr(truth, part).item(), rel=1e-5), f"{name}: {part}"


def recall(found: SparseLatents, true: SparseLatents) -> float:
    """Share of the true active latents that were found."""
    active, hit = reference.dense(true) > 0, reference.dense(found) > 0
    return ((active & hit).sum() / active.sum()).item()
