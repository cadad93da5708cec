"""How long the probes of every latent take, from pooled activations: `python -m benchmarks.probes`.

    --n-latents 65536 --n-texts 2000 --n-tasks 61 --d-model 576 --n-shuffles 20 --threads 2     the defaults
    --measure 61                    tasks that are really run; the seconds of the others are extrapolated

Synthetic: activations with heavy-tailed directions of unequal variance, a quarter of which know the label a little, and
random latents. All `n_texts` are fitted on (an evaluation fits on half of its texts). One pooling.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from monosem.evals import probes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=(__doc__ or "").splitlines()[0])
    defaults = {"n_latents": 65536, "n_texts": 2000, "n_tasks": 61, "d_model": 576, "n_shuffles": 20, "threads": 2}
    for name, value in {**defaults, "measure": 61}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = min(options.measure, options.n_tasks)
    seconds = dict.fromkeys(("latents", "null", "random directions", "dense"), 0.0)
    latents = probes.random_directions(options.n_latents, options.d_model, seed=0)
    random = probes.random_directions(options.n_latents, options.d_model, seed=1)
    failed = 0
    for task in range(measured):
        x, labels = synthetic(options.n_texts, options.d_model, seed=task)
        fits, moments = timed(seconds, "latents", probes.fit_all, latents, x, labels)
        failed += int((~fits.converged).sum())
        null = functools.partial(probes.shuffled, n_shuffles=options.n_shuffles, seed=task)
        timed(seconds, "null", null, latents, x, labels, moments)
        timed(seconds, "random directions", probes.best_logits, random, x, labels, x)
        timed(seconds, "dense", probes.dense_logits, x, labels, torch.arange(len(x)), x)
    sizes = (
        f"{options.n_latents:,} latents, {options.n_texts:,} texts, {options.n_tasks} tasks, {options.threads} threads"
    )
    print(f"{sizes}; {failed} probes did not converge")
    for part, spent in seconds.items():
        note = "" if measured == options.n_tasks else f" (extrapolated from {measured} tasks)"
        print(f"{part:<18} {spent * options.n_tasks / measured:8.1f} s{note}")


def timed(seconds: dict[str, float], part: str, run: Callable[..., Any], *arguments: Any) -> Any:
    start = time.perf_counter()
    found = run(*arguments)
    seconds[part] += time.perf_counter() - start
    return found


def synthetic(n_texts: int, d_model: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [n_texts, d_model] and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n_texts, generator=generator) < 0.5
    x = torch.randn(n_texts, d_model, generator=generator)
    x[:, ::2] *= x[:, ::2].abs()
    x[:, ::4] += labels[:, None] * torch.rand(x[:, ::4].shape[1], generator=generator)
    return x * torch.rand(d_model, generator=generator), labels


if __name__ == "__main__":
    main()
