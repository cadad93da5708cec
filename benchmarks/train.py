"""Time a training step of every implementation: forward, loss, backward, projection, Adam, unit norm, dead counters.

Each implementation runs in a process of its own. The parent asks one after the other for a step, so that all see the
same machine, hour and temperature: only one runs at any time, the others sleep on their pipes. Ratios are taken round
by round. Where all processes do not fit into memory together, peers go first, then ours together with the fastest peer.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import environments, report, roofline
from benchmarks.steps import OURS, PEER_LOOPS, VARIANTS, Shape
from benchmarks.workers import Worker, WorkerError

log = logging.getLogger("benchmarks")

PEAK = "peak"
DEFAULT_SHAPES = "16384x4096,65536x1024"
DEFAULT_IMPLS = {
    "cpu": (
        *("native-auto", "native-fp32", "native-bf16", "native-int8", "torch", *PEER_LOOPS),
        *("native-auto+ema", "native-auto+auxk", "torch+auxk"),
    ),
    "cuda": (
        *("triton-fp32", "triton-tf32", "triton-bf16", "triton-fp8", "torch", *PEER_LOOPS),
        *("triton-bf16+ema", "triton-bf16+auxk", "torch+auxk"),
    ),
}
WARM_UP_STEPS = 2


@dataclass
class Timed:
    """What one implementation did at one shape; `reason` says why when it did nothing."""

    replies: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    recall: float | None = None
    reason: str | None = None

    def ms(self) -> list[float]:
        return [reply["ms"] for reply in self.replies]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help="n_latents x batch, e.g. 16384x4096,65536x1024")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each implementation")
    parser.add_argument("--impls", help=f"comma-separated; default on a CPU: {','.join(DEFAULT_IMPLS['cpu'])}")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the report, one an implementation and shape; written by the caller."""
    names = options.impls.split(",") if options.impls else DEFAULT_IMPLS[options.device]
    for name in names:
        _check_name(name)
    rows: list[dict[str, Any]] = []
    for n_latents, batch in _shapes(options.shapes):
        shape = Shape(n_latents, options.d_model, options.k, batch, options.device)
        log.info("n_latents %d, batch %d", n_latents, batch)
        for group in time_shape(list(names), shape, options):
            rows += rows_of(group, shape)
    return rows


def time_shape(names: list[str], shape: Shape, options: argparse.Namespace) -> list[dict[str, Timed]]:
    """The groups that were interleaved: one if memory allows it."""
    peers = [name for name in names if name in PEER_LOOPS]
    ours = [name for name in names if name not in PEER_LOOPS]
    if not peers or not ours or _memory_need(names, shape) <= options.memory_gib:
        return [time_group(names, shape, options)]
    log.info("all together would need about %.0f GiB: peers first", _memory_need(names, shape))
    first = time_group(peers, shape, options)
    anchor = _fastest_peer(first)
    return [first, time_group(ours + ([anchor] if anchor else []), shape, options)]


def time_group(names: Sequence[str], shape: Shape, options: argparse.Namespace) -> dict[str, Timed]:
    """Start every worker, then ask them in turn, a different one first in each round."""
    timed = {name: Timed() for name in names}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="monosem-bench-") as logs:
        try:
            arguments = json.dumps(shape._asdict())
            start(names, "benchmarks.steps", arguments, Path(logs), options.threads, workers, timed)
            if workers:
                command, words = roofline.command(shape.device, options.threads)
                workers[PEAK], timed[PEAK] = Worker(command, Path(logs) / PEAK, options.threads), Timed()
                timed[PEAK].facts["words"] = words
            rounds(workers, timed, options.steps)
            for name, worker in workers.items():
                if name.partition("+")[0] in OURS:
                    timed[name].recall = worker.ask("recall")["recall"]
        finally:
            for worker in workers.values():
                worker.close()
    return timed


def start(
    names: Sequence[str],
    module: str,
    arguments: str,
    logs: Path,
    threads: int,
    workers: dict[str, Worker],
    timed: dict[str, Timed],
) -> None:
    """Start `python -m module NAME arguments` for every name, in its peer's environment; a failure is its reason."""
    pythons: dict[str, Path] = {}
    for name in names:  # all environments before the first worker
        peer = next((peer for peer in environments.PEERS if name == peer or name.startswith(f"{peer}-")), None)
        try:
            pythons[name] = environments.python_of(peer) if peer else Path(sys.executable)
        except environments.InstallError as error:
            timed[name].reason = str(error)
    for name, python in pythons.items():
        try:
            workers[name] = Worker([python, "-m", module, name, arguments], logs / name, threads)
            timed[name].facts = workers[name].facts
        except WorkerError as error:
            timed[name].reason = str(error)
    for name in names:
        if timed[name].reason:
            log.warning("%s: failed (%s)", name, timed[name].reason)


def rounds(workers: dict[str, Worker], timed: dict[str, Timed], n_steps: int) -> None:
    """Fill `timed` with the replies to `n_steps` requests after the warm-up; who fails leaves the race."""
    for i in range(WARM_UP_STEPS + n_steps):
        order = list(workers)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            try:
                reply = workers[name].ask("step")
            except WorkerError as error:
                log.warning("%s: failed (%s)", name, error)
                timed[name] = Timed(reason=str(error))
                workers.pop(name).close()
                continue
            log.debug("%s %s", name, reply)
            if i >= WARM_UP_STEPS:
                timed[name].replies.append(reply)
        log.info("round %d of %d", i + 1, WARM_UP_STEPS + n_steps)


def rows_of(group: dict[str, Timed], shape: Shape) -> list[dict[str, Any]]:
    """A row an implementation; ratios to the fastest peer of the group, round by round."""
    anchor = _fastest_peer(group)
    peaks = group[PEAK].replies if PEAK in group else []
    rows = []
    for name, timed in group.items():
        if name == PEAK:
            continue
        row: dict[str, Any] = {"impl": name, "n_latents": shape.n_latents, "batch": shape.batch}
        row.update(status="failed" if timed.reason else "ok", reason=timed.reason, fastest_peer=anchor)
        row.update({key: None for key in report.MEASURED})
        if not timed.reason:
            row.update(numbers(timed, group[anchor] if anchor else None, shape.batch))
            row.update(_fractions(name, timed, peaks, shape))
            row["cost_of_variant"] = _cost(timed, group.get(name.partition("+")[0])) if "+" in name else None
            row["peak_words"] = group[PEAK].facts["words"] if peaks else None
        rows.append(row)
    return rows


def numbers(timed: Timed, anchor: Timed | None, n_tokens: int) -> dict[str, Any]:
    """Statistics of the replies; ratios to `anchor` are taken round by round."""
    ms = timed.ms()
    found: dict[str, Any] = {
        "ms_median": statistics.median(ms),
        "ms_min": min(ms),
        "ms_max": max(ms),
        "tokens_per_s": 1e3 * n_tokens / statistics.median(ms),
        "peak_rss_mib": max(reply["peak_mib"] for reply in timed.replies),
        "cpu_ms_median": statistics.median(reply["cpu_ms"] for reply in timed.replies),
        "idle_cpu_ms_max": max(reply["idle_cpu_ms"] for reply in timed.replies),
        "loss_last": timed.replies[-1]["loss"],
        "recall": timed.recall,
        "parts_ms": _median_parts(timed.replies),
        "facts": {key: value for key, value in timed.facts.items() if key != "ready"},
    }
    if anchor is not None:
        ratios = [theirs / ours for theirs, ours in zip(anchor.ms(), ms, strict=True)]
        found["speedup_vs_fastest_peer"] = statistics.median(ratios)
        found["speedup_min"], found["speedup_max"] = min(ratios), max(ratios)
    return found


def _fractions(name: str, timed: Timed, peaks: list[dict[str, float]], shape: Shape) -> dict[str, Any]:
    """The encoder product's floor, and its share of the step, round by round against the peak of the same round."""
    base = name.partition("+")[0]
    kind = timed.facts.get("precision", OURS[base][1]) if base in OURS else "fp32"
    if not peaks or kind not in peaks[0]:
        return {}
    floors = [roofline.floor_ms(shape.n_latents, shape.d_model, shape.batch, peak[kind]) for peak in peaks]
    return {
        "floor_ms": statistics.median(floors),
        "fraction_of_floor": statistics.median(f / ms for f, ms in zip(floors, timed.ms(), strict=True)),
    }


def _cost(variant: Timed, plain: Timed | None) -> float | None:
    """Share of a plain step that a variant adds, round by round."""
    if plain is None or plain.reason:
        return None
    return statistics.median(v / p for v, p in zip(variant.ms(), plain.ms(), strict=True)) - 1


def _median_parts(replies: list[dict[str, Any]]) -> dict[str, float]:
    return {part: statistics.median(reply["parts"][part] for reply in replies) for part in replies[0]["parts"]}


def _fastest_peer(group: dict[str, Timed]) -> str | None:
    medians = {n: statistics.median(t.ms()) for n, t in group.items() if n in PEER_LOOPS and t.replies}
    return min(medians, key=lambda name: medians[name], default=None)


def _memory_need(names: Sequence[str], shape: Shape) -> float:
    """GiB, roughly: what every worker keeps between its steps, and what one dense step takes on top."""
    parameters, dense = 8 * shape.n_latents * shape.d_model, 4 * shape.batch * shape.n_latents
    kept = sum(0.35 * 2**30 + (4 if name in PEER_LOOPS else 3.5) * parameters for name in names)
    return (kept + 8 * dense) / 2**30


def _check_name(name: str) -> None:
    base, *variants = name.split("+")
    if base not in (*OURS, *PEER_LOOPS) or (variants and (base in PEER_LOOPS or set(variants) - set(VARIANTS))):
        raise ValueError(
            f"impl is {name!r}; choose from {', '.join((*OURS, *PEER_LOOPS))}, ours also with +{' or +'.join(VARIANTS)}"
        )


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(n), int(batch)) for n, batch in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"shapes is {text!r}; give N_LATENTSxBATCH, comma-separated, e.g. {DEFAULT_SHAPES}") from None
