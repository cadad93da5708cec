"""Will these runs fit in memory, all at once? Sizes are sums of what a run holds, measured against what is free.

A run holds its weights, Adam's two moments and the moving average. What a step needs only while it runs is shared:
steps are taken one after the other, so the largest counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from monosem import kernels
from monosem.config import TrainConfig, activation_facts
from monosem.model import WEIGHTS_FILE
from monosem.stream import PREFETCH_BATCHES, WINDOW_BLOCKS, Source
from monosem.training import SAMPLE_TOKENS, SELECTION_TOKENS

_RESERVE = 256 << 20
"""Bytes left for what is not counted: libraries' scratch, the page cache's least."""


class RunBytes(NamedTuple):
    """What one run takes."""

    weights: int
    moments: int
    average: int
    step: int
    """Gradients or the packed encoder, and the rows of the active latents; only while it steps or is measured."""

    @property
    def kept(self) -> int:
        return self.weights + self.moments + self.average


class Plan(NamedTuple):
    """Bytes of runs that share one stream."""

    runs: list[RunBytes]
    shared: dict[str, int]

    @property
    def total(self) -> int:
        return sum(run.kept for run in self.runs) + max((run.step for run in self.runs), default=0) + self.reading

    @property
    def reading(self) -> int:
        return sum(self.shared.values())

    def __str__(self) -> str:
        parts = {name: sum(getattr(run, name) for run in self.runs) for name in ("weights", "moments", "average")}
        parts |= {"the largest step": max((run.step for run in self.runs), default=0), **self.shared}
        return f"{' + '.join(f'{name} {_gib(n)}' for name, n in parts.items())} = {_gib(self.total)} GiB"


def run_bytes(config: TrainConfig, d_model: int, device: torch.device) -> RunBytes:
    """What the run takes, by the shapes of what it holds."""
    n, batch = config.n_latents, config.batch_size
    one = 4 * (2 * n * d_model + n + d_model)
    _, kernel = kernels.select(config.impl, device)
    fused = hasattr(kernel, "topk_step") and config.activation == "topk" and config.clip_norm is None
    packed = 4 * n * d_model if fused else one
    active = 4 * batch * (4 * d_model + (4 * config.k if "k" in activation_facts(config.activation).uses else n))
    averaged = one if config.ema != 0 else 0  # both candidates when weights are compared
    return RunBytes(one, 2 * one, averaged, max(packed + active, averaged + 4 * SELECTION_TOKENS * d_model))


def stream_bytes(source: Source, batch_size: int, element_bytes: int, n_held_out: int) -> dict[str, int]:
    """What reading takes: two windows (one is read while the other is used), batches ahead, rows kept for measuring."""
    row = source.width * 4
    window = 2 * WINDOW_BLOCKS * source.block_rows * source.width * element_bytes
    ahead = (PREFETCH_BATCHES + 2 + -(-SELECTION_TOKENS // batch_size)) * batch_size * row
    kept = SAMPLE_TOKENS * row * 3 + n_held_out * source.width * element_bytes  # the sample in float64 at the start
    return {"window": window, "prefetch": ahead, "sample and held-out rows": kept}


def waves(runs: Sequence[RunBytes], shared: dict[str, int], free: int, *, split: bool) -> list[list[int]]:
    """Which runs (by number, in order) go together: all, or with `split` as many at a time as fit.

    `ValueError` with the arithmetic when they do not fit.
    """
    whole: list[list[int]] = [[]]
    for number, run in enumerate(runs):
        together = Plan([*(runs[i] for i in whole[-1]), run], shared)
        if split and whole[-1] and together.total > free - _RESERVE:
            whole.append([])
            together = Plan([run], shared)
        whole[-1].append(number)
        if together.total > free - _RESERVE and (split or number == len(runs) - 1):
            remedy = "lower n_latents or batch_size" if split else "add --waves, or ask for fewer or smaller runs"
            raise ValueError(
                f"{len(whole[-1])} runs at once need {together}, but {_gib(free)} GiB are free, of which "
                f"{_gib(_RESERVE)} stay in reserve; {remedy}"
            )
    return whole


def check_disk(out: Path, folders: dict[Path, RunBytes]) -> None:
    """`ValueError` when the states and autoencoders to be written will not fit on the disk."""
    needed = 0
    for folder, run in folders.items():
        there = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) if folder.exists() else 0
        needed += max(0, run.kept + run.weights - there)
    needed += max((run.kept for run in folders.values()), default=0)  # a state beside the one that it replaces
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"states and autoencoders (state/, {WEIGHTS_FILE}) of {len(folders)} runs need {_gib(needed)} GiB of "
            f"disk, but {_gib(free)} GiB are free under {out}; free some, or choose another --out"
        )


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f}"
