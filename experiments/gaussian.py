"""A null control: a store of Gaussian rows with the mean and covariance of a real store's activations.

    python experiments/gaussian.py --store STORE --out OUT --n-tokens 3145728

Same site, documents and tokens, but a row is drawn from N(mean, covariance) of the real *normalised* training rows:
every second-order fact survives and everything else is gone. What an autoencoder finds here it owes to the covariance.
The first `n_tokens` rows of the real training split (rounded up to whole shards) and its whole held-out split are
imitated. The new manifest names the real store as its source `imitates`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from monosem import artifacts
from monosem.activations import KIND, SPLITS, ActivationStore
from monosem.model import normalize

MOMENT_BLOCKS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--n-tokens", type=int, required=True)
    options = parser.parse_args()
    store, out = ActivationStore.open(options.store), Path(options.out)
    if (out / "manifest.json").exists():
        raise SystemExit(f"{out} already holds a store; choose another --out")
    mean, factor = moments(store)
    manifest = dict(store.manifest)
    manifest["sources"] = {**manifest["sources"], "imitates": store.hash}
    manifest["splits"] = {split: imitate(store, split, out, options.n_tokens, mean, factor) for split in SPLITS}
    save_file({"mean": mean}, out / "mean.safetensors")
    manifest["mean"] = facts(out, "mean.safetensors")
    artifacts.write_json(out / "manifest.json", {**manifest, "kind": KIND})


def moments(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """Mean and a factor F of the covariance F Fᵀ of normalised training rows, in float64, over MOMENT_BLOCKS blocks."""
    n_blocks = store.n_blocks("train")
    chosen = range(0, n_blocks, max(1, n_blocks // MOMENT_BLOCKS))
    n, total = 0, torch.zeros(store.width, dtype=torch.float64)
    squares = torch.zeros(store.width, store.width, dtype=torch.float64)
    for index in chosen:
        x = normalize(store.block("train", index))[0].double()
        n, total, squares = n + len(x), total + x.sum(0), squares + x.T @ x
    mean = total / n
    eigenvalues, vectors = torch.linalg.eigh(squares / n - torch.outer(mean, mean))
    return mean, vectors * eigenvalues.clamp_min(0).sqrt()


def imitate(
    store: ActivationStore, split: str, out: Path, n_tokens: int, mean: Tensor, factor: Tensor
) -> dict[str, Any]:
    """Write the split's shards anew with Gaussian rows; its entry in the manifest."""
    entry = dict(store.manifest["splits"][split])
    real, n_rows = entry["shards"], 0
    entry["shards"] = []
    for number, shard in enumerate(real):
        if split == "train" and n_rows >= n_tokens:
            break
        tensors = load_file(store.path / shard["file"])
        generator = torch.Generator().manual_seed(SPLITS.index(split) << 32 | number)
        rows = tensors["activations"]
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
        tensors["activations"] = (noise @ factor.float().T + mean.float()).to(rows.dtype)
        (out / split).mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / shard["file"])
        entry["shards"].append({**facts(out, shard["file"]), "n_rows": len(rows)})
        n_rows += len(rows)
    entry |= {"n_rows": n_rows, "n_blocks": n_rows // store.block_rows}
    entry["n_contexts"] = n_rows // store.rows_per_context
    entry["n_excluded"] = entry["n_contexts"] * store.first_position
    artifacts.write_json(out / split / "documents.json", artifacts.read_json(store.path / split / "documents.json"))
    entry["documents"] = facts(out, f"{split}/documents.json")
    return entry


def facts(out: Path, file: str) -> dict[str, Any]:
    return {"file": file, "sha256": artifacts.sha256_file(out / file), "bytes": (out / file).stat().st_size}


if __name__ == "__main__":
    main()
