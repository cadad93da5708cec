"""How exact the compiled kernels are on a trained autoencoder: results/…/exactness.json, shown in docs/performance.md.

    python experiments/exactness.py runs/demo

Held-out rows of the run's store; what bf16 and int8 select is compared with the top k of fp64 pre-activations,
gradients with the definition in fp64, beside those of dense torch in fp32. The tenth of the latents that fires least
counts as dead, so that AuxK acts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from monosem import _native, artifacts, losses
from monosem.kernels import native as kernel
from monosem.kernels import reference
from monosem.model import normalize
from monosem.run_folder import open_run
from monosem.types import LossSpec, SparseLatents, Weights

KEPT = Path("results/smollm2-135m-instruct-q4_1/exactness.json")
ROWS, AUXK, DEAD = 1024, 256, 0.1


def main(run: str) -> None:
    _, autoencoder, store = open_run(run, None, torch.device("cpu"))
    weights, k = autoencoder.weights, autoencoder.config.k
    x = normalize(store.rows("held_out")[:ROWS].float())[0]
    exact = Weights(*(w.double() for w in weights))
    true = reference.topk_encode(x.double(), exact, k)
    selection = {}
    for precision in ("fp32", "bf16", "int8"):
        indices, values = torch.empty(ROWS, k, dtype=torch.int64), torch.empty(ROWS, k)
        stats = _native.topk_encode(x, weights, k, precision, indices, values)
        found = SparseLatents(indices, values, len(weights.latent_bias))
        selection[precision] = {
            "scores_per_row": stats["n_rescored"] / ROWS, "saturated_rows": stats["n_saturated"],
            "recall": recall(found, true),
        }  # fmt: skip
    counts = (reference.dense(true) > 0).sum(0)
    dead = torch.zeros(len(counts), dtype=torch.bool)
    dead[counts.argsort(stable=True)[: round(DEAD * len(counts))]] = True
    spec = LossSpec(k=k, mse_scale=losses.mse_scale(x), auxk=AUXK, precision="bf16")
    truth = reference.topk_gradients(x.double(), exact, spec, dead).gradients
    errors = {
        name: {part: relative(g, t) for part, g, t in zip(Weights._fields, gradients, truth, strict=True)}
        for name, gradients in (
            ("native", kernel.topk_gradients(x, weights, spec, dead).gradients),
            ("dense fp32", reference.topk_gradients(x, weights, spec, dead).gradients),
        )
    }
    facts = {"d_model": x.shape[1], "n_latents": len(dead), "k": k, "n_rows": ROWS, "dead": dead.double().mean().item()}
    artifacts.write_json(KEPT, {**facts, "level": _native.level(), "selection": selection, "errors": errors})


def recall(found: SparseLatents, true: SparseLatents) -> float:
    """Share of the true active latents that were found."""
    theirs, ours = reference.dense(true) > 0, reference.dense(found) > 0
    return ((theirs & ours).sum() / theirs.sum()).item()


def relative(gradient: torch.Tensor, truth: torch.Tensor) -> float:
    return ((gradient - truth).norm() / truth.norm()).item()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
