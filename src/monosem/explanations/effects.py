"""Ablations of some latents at the peaks of their strongest examples.

A file a latent in RUN/explain/ablations/ as soon as it is done, so a killed run loses little, and more latents come on
top of those that are there.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monosem import artifacts
from monosem.evals import ablation
from monosem.explanations.job import Job, Of
from monosem.logs import progress

log = logging.getLogger("monosem")

FOLDER = "ablations"
KIND = "latent-ablations"
N_EXAMPLES = 4
"""Of the strongest."""
N_MOVED = 10
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, TypeError, SyntaxError, MemoryError, RuntimeError, struct.error),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy raises on damaged .npz files."""
_VOTES = {
    f"{kind}_{side}": f"tokens whose {what} the ablation moves {side} most in the prediction of each token; -1 for none"
    for kind, what in (("logits", "logit (less the median over the vocabulary)"), ("probs", "probability"))
    for side in ("up", "down")
}


def make(job: Job, of: Of, latents: list[int]) -> None:
    """The ablations of `latents` as columns, a row a latent in rising order."""
    folder = job.folder / FOLDER
    _check_same(folder, of)
    todo = [latent for latent in latents if _read(folder, latent) is None]
    for latent in progress(todo, "ablate", "latent", total=len(todo), each=1):
        found = _of_latent(job, latent)
        found["seal"] = _seal(latent, found)

        def save(temporary: Path, found: dict[str, np.ndarray] = found) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **found)  # type: ignore[arg-type]

        artifacts.write_atomic(folder / f"{latent}.npz", save)
    if latents:
        _write_columns(job, sorted(latents))


def _check_same(folder: Path, of: Of) -> None:
    """Start again where the ablations kept are of other examples."""
    path = folder / "manifest.json"
    made = artifacts.manifest(KIND, {"of": of["activations"], "n_examples": N_EXAMPLES}, {})
    try:
        same = path.exists() and artifacts.read_manifest(path, KIND)["config"] == made["config"]
    except ValueError as error:
        log.warning("%s; all ablations are made again", error)
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        artifacts.write_json(path, made)


def _seal(latent: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """sha256 of the latent's number and the arrays, as 32 bytes."""
    digest = hashlib.sha256(str(latent).encode())
    for name, array in sorted(arrays.items()):
        if name != "seal":
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _read(folder: Path, latent: int) -> dict[str, np.ndarray] | None:
    """What is kept of a latent; None, with a warning, where that is not as it was written."""
    path = folder / f"{latent}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        if np.array_equal(found["seal"], _seal(latent, found)):
            return found
        reason = "it was changed"
    except _UNREADABLE as error:
        reason = repr(error)
    log.warning("%s is damaged and made again (%s)", path, reason)
    return None


def _of_latent(job: Job, latent: int) -> dict[str, np.ndarray]:
    """By name, N_EXAMPLES rows: what has no example is NaN or -1."""
    context, position = (job.column(f"top_{name}")[latent, :N_EXAMPLES] for name in ("context", "position"))
    n = int((context >= 0).sum())
    tokens = torch.from_numpy(job.column("contexts")[context[:n]].astype(np.int64))
    at = torch.from_numpy(position[:n].astype(np.int64))
    which = torch.full((n,), latent)
    effects = ablation.effects(job.subject, job.autoencoder, job.store.site, tokens, at, which)
    found: dict[str, Any] = {"kl": effects.kl, "delta_ce": effects.delta_ce, "sparsity": effects.sparsity}
    for name, (ids, values) in effects.votes.items():
        found |= {name: ids.int(), f"{name}_values": values}
    for side, sign in (("up", 1), ("down", -1)):
        ids, values = effects.votes[f"logits_{side}"]
        best = (sign * values.flatten(1)).nan_to_num(-torch.inf).topk(N_MOVED).indices
        found |= {side: ids.flatten(1).gather(1, best).int(), f"{side}_values": values.flatten(1).gather(1, best)}
        found[f"{side}_position"] = (best // ids.shape[2]).short().where(found[side] >= 0, -1)
    return {name: _padded(tensor.numpy()) for name, tensor in found.items()}


def _padded(array: np.ndarray) -> np.ndarray:
    missing = (N_EXAMPLES - len(array), *array.shape[1:])
    return np.concatenate([array, np.full(missing, np.nan if array.dtype.kind == "f" else -1, array.dtype)])


def _merged(folder: Path, latents: list[int]) -> dict[str, np.ndarray]:
    """By name a row a latent; one file is open at a time."""
    merged: dict[str, np.ndarray] = {}
    for i, latent in enumerate(latents):
        found = _read(folder, latent)
        if found is None:
            raise ValueError(f"{folder / str(latent)}.npz was changed while it was used; run the same command again")
        for name, array in found.items():
            merged.setdefault(name, np.empty((len(latents), *array.shape), array.dtype))[i] = array
    return merged


def _write_columns(job: Job, latents: list[int]) -> None:
    folder, write = job.folder / FOLDER, job.writer.write
    merged = _merged(folder, latents)
    sparsity = np.full(job.n_latents, np.nan, np.float32)
    with np.errstate(invalid="ignore"):
        sums, n = np.nansum(merged["sparsity"], axis=1), (~np.isnan(merged["sparsity"])).sum(axis=1)
        sparsity[latents] = sums / n
    examples = np.tile(np.arange(N_EXAMPLES, dtype=np.int32), (len(latents), 1))
    filled = job.column("top_context")[latents, :N_EXAMPLES] >= 0
    write("ablation_sparsity", sparsity, "share of logits moved, mean over examples; NaN where not computed")
    write("ablation_latents", np.array(latents, np.int32), "the latents ablated, a row of the columns ablation_…")
    write("ablation_examples", np.where(filled, examples, -1), "which of the top examples; -1 for none")
    after = "of the prediction of each token after the peak, nats; NaN up to it"
    write("ablation_kl", merged["kl"], f"KL(as it is || ablated) {after}")
    write("ablation_delta_ce", merged["delta_ce"], f"loss ablated - as it is {after}")
    for side in ("up", "down"):
        write(f"ablation_{side}", merged[side], f"tokens whose logits move {side} most after the peak; -1 for none")
        write(f"ablation_{side}_values", merged[f"{side}_values"], "by how much (less the median over the vocabulary)")
        write(f"ablation_{side}_position", merged[f"{side}_position"], "in the prediction of which token")
    for name, meaning in _VOTES.items():
        write(f"ablation_{name}", merged[name], meaning)
        write(f"ablation_{name}_values", merged[f"{name}_values"], "by how much")
