"""How long the probes of every latent take, from pooled activations: `python -m benchmarks.probes`.

    --n-latents 65536 --n-texts 2000 --n-tasks 61 --d-model 576 --n-shuffles 20 --threads 2     the defaults
    --measure 61                    tasks that are really run; the seconds of the others are extrapolated

Synthetic: activations with heavy-tailed directions of unequal variance, a quarter of which know the label a little, and
random latents. All `n_texts` are fitted on (an evaluation fits on half of its texts). One pooling.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from monosem import artifacts
from monosem.evals import probes

DEFAULTS = {"n_latents": 65536, "n_texts": 2000, "n_tasks": 61, "d_model": 576, "n_shuffles": 20, "threads": 2}
GOAL_S = 600
"""For every latent's probe on every task; what stands beside them is timed apart."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    before = report.cpu_seconds()
    found = measure(options)
    flags = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in (*DEFAULTS, "measure")]
    machine = report.machine(options.threads, " ".join(["python -m benchmarks.probes", *flags]))
    found["machine"] = machine | {"noise": report.noise(before, report.cpu_seconds(), os.times())}
    name = Path(options.out) / "probes-cpu"
    artifacts.write_json(name.with_suffix(".json"), found)
    name.with_suffix(".md").write_text(text(found), "utf-8")
    print(text(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part over all tasks that were run, and of how many."""
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sizes = {name: getattr(options, name) for name in DEFAULTS}
    return {**sizes, "measured_tasks": measured, "not_converged": failed, "peak_mib": peak, "seconds": seconds}


def text(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    machine = found["machine"]
    others = machine["noise"].get("other_processes")
    lines = [
        f"{found['n_latents']:,} latents, {found['n_texts']:,} texts, {found['n_tasks']} tasks, one pooling, "
        f"from pooled activations; `{machine['command']}`, {machine['date']}, commit {machine['commit']}, "
        f"{machine['cpus']} CPUs: {machine['cpu']}, torch {machine['versions']['torch']}"
        + (f"; other processes took {others:.0%} of the CPU time." if others is not None else "."),
        "",
        f"{found['not_converged']} of {found['n_latents'] * found['measured_tasks']:,} probes did not converge. "
        f"At most {found['peak_mib']:,} MiB resident.",
        "",
        "| part | seconds | goal |",
        "| --- | --- | --- |",
    ]
    whole = found["n_tasks"] / found["measured_tasks"]
    note = "" if whole == 1 else f" (extrapolated from {found['measured_tasks']} tasks)"
    for part, seconds in found["seconds"].items():
        lines.append(f"| {part} | {seconds * whole:.1f}{note} | {GOAL_S if part == 'latents' else ''} |")
    return "\n".join(lines) + "\n"


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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=(__doc__ or "").splitlines()[0])
    for name, value in {**DEFAULTS, "measure": 61}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
