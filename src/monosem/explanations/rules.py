"""N2G rules of some latents, from the examples that are there already, and how well they predict held-out text.

A line a latent in RUN/explain/n2g.jsonl as soon as its batch is done, so a killed run loses little, and more latents
come on top of those that are there.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from monosem import artifacts, formats, n2g
from monosem.evals import explainability
from monosem.evals.explainability import Fired
from monosem.explanations.job import Job, Of
from monosem.logs import progress
from monosem.types import FIRED_THRESHOLD

log = logging.getLogger("monosem")

FILE = "n2g.jsonl"
N_EXAMPLES = 5
"""Of the strongest, and as many of the random ones, from which a rule is made."""
_LATENTS_AT_ONCE = 64
_COLUMNS = {
    "n2g_recall": "of the held-out tokens on which the latent fires, the share at which its rule predicts",
    "n2g_precision": "of the held-out tokens at which the rule predicts, the share on which the latent fires",
    "n2g_density": "share of the held-out tokens on which the latent fires",
}


def make(job: Job, of: Of, latents: list[int]) -> None:
    """The rules of `latents`, and columns of their scores: NaN for the other latents, and for a recall of 0/0."""
    path = job.folder / FILE
    kept = read(path, of)
    if todo := [latent for latent in latents if latent not in kept]:
        _start(path, of, kept)
        reader = n2g.LatentReader(job.reading_subject, job.autoencoder, job.store.site)
        tokens, fired = _held_out(job)
        batches = [todo[start : start + _LATENTS_AT_ONCE] for start in range(0, len(todo), _LATENTS_AT_ONCE)]
        for batch in progress(batches, "rules", "latent", total=len(todo), each=_LATENTS_AT_ONCE):
            built = n2g.build(reader, [_examples(job, latent) for latent in batch])
            rows: list[dict[str, Any]] = [
                {"latent": latent, **explainability.judge(rule, tokens, fired(latent)), "rule": list(rule.items())}
                for latent, rule in zip(batch, built, strict=True)
            ]
            kept |= {row["latent"]: row for row in rows}
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(formats.sealed(row)) + "\n" for row in rows))
    for name, meaning in _COLUMNS.items() if latents else ():
        column = np.full(job.n_latents, np.nan, np.float32)
        for latent in latents:
            value = kept[latent][name.removeprefix("n2g_")]
            column[latent] = math.nan if value is None else value
        job.writer.write(name, column, f"{meaning}; NaN where not computed")


def read(path: Path, of: Of) -> dict[int, dict[str, Any]]:
    """By latent what is kept of rules from the activations of `of`: recall, precision, density, rule; none of others.

    A rule is a list of pairs: a pattern as in `n2g`, and its activation.
    """
    if not path.exists():
        return {}
    header, *lines = path.read_text("utf-8", "replace").split("\n")
    *whole, _cut = lines or [""]
    if header != _header(of):
        if not header.startswith('{"kind": "n2g-rules"'):
            log.warning("%s does not begin as a file of rules; it is begun again", path)
        return {}
    found = {}
    for number, line in enumerate(whole, 2):
        try:
            row = artifacts.parse_json(line, f"{path} line {number}")
            formats.typed(formats.Rule, row)
            if not formats.is_sealed(row):
                raise ValueError("it was changed after it was written")
        except ValueError as error:
            log.warning("%s line %d is damaged and its rule is made again: %s", path, number, error)
            continue
        found[row["latent"]] = {name: value for name, value in row.items() if name != formats.SEAL}
    return found


def _header(of: Of) -> str:
    made = {"kind": "n2g-rules", "format": artifacts.FORMAT_VERSION, "n_examples": N_EXAMPLES}
    return json.dumps({**made, "of": of["activations"]})


def _start(path: Path, of: Of, kept: dict[int, dict[str, Any]]) -> None:
    """The file with what is kept and nothing torn or foreign."""
    text = "".join(f"{line}\n" for line in (_header(of), *(json.dumps(formats.sealed(row)) for row in kept.values())))

    def save(temporary: Path) -> None:
        temporary.write_text(text, "utf-8")

    artifacts.write_atomic(path, save)


def _examples(job: Job, latent: int) -> n2g.Examples:
    """The latent's examples as N2G reads them: texts start where the store's rows do."""
    first, contexts = job.store.first_position, job.column("contexts")
    chosen: dict[int, np.ndarray] = {}
    for kind in ("top", "random"):
        which = job.column(f"{kind}_context")[latent, :N_EXAMPLES]
        activations = job.column(f"{kind}_activations")[latent, :N_EXAMPLES]
        for context, values in zip(which.tolist(), activations, strict=True):
            if context >= 0:
                chosen.setdefault(context, values[first:].astype(np.float32))
    tokens = torch.from_numpy(contexts[list(chosen)][:, first:].astype(np.int64))
    found = torch.from_numpy(np.stack(list(chosen.values())))
    return n2g.Examples(latent, tokens, found, found.argmax(1), len(chosen))


def _held_out(job: Job) -> tuple[Int[Tensor, "n_contexts ctx"], Callable[[int], Fired]]:
    """Up to `explainability.N_TOKENS` held-out tokens, and where a latent fires on them: one pass for all latents."""
    store = job.store
    n_blocks = min(store.n_blocks("held_out"), -(-explainability.N_TOKENS // store.block_rows))
    tokens = store.contexts("held_out", n_blocks).tokens[: n_blocks * store.config["block_contexts"]]
    parts = []
    shown = progress(range(n_blocks), "held out", "tok", total=n_blocks * store.block_rows, each=store.block_rows)
    for block in shown:
        x, _ = job.autoencoder.normalize(store.block("held_out", block).to(job.device))
        found = job.autoencoder.encode(x)
        rows, slots = (found.values > FIRED_THRESHOLD).nonzero(as_tuple=True)
        parts.append((rows + block * store.block_rows, found.indices[rows, slots], found.values[rows, slots]))
    positions, latents, values = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    order = latents.argsort(stable=True)
    ends = latents.bincount(minlength=job.n_latents).cumsum(0).tolist()

    def fired(latent: int) -> Fired:
        mine = order[ends[latent - 1] if latent else 0 : ends[latent]]
        return Fired(positions[mine], values[mine])

    return tokens[:, store.first_position :], fired
