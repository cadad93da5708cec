"""Time the harvest of activations: a language model's forward pass to one layer, ours and the peers', interleaved.

The same model folder, tokens and chunks for everybody, in bf16 and in fp32, whatever a library's default is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report, train
from benchmarks.streams import NAMES, OURS_HARVEST, Job, split
from benchmarks.train import Timed
from benchmarks.workers import Worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5, help="timed chunks of each library")
    parser.add_argument("--impls", help=f"comma-separated; default {','.join(NAMES)}")
    parser.add_argument("--model", help="a subject as `monosem harvest` takes it; default: its default")
    parser.add_argument("--layer", type=int, help="0-based; default: three quarters of the depth")
    parser.add_argument("--contexts", type=int, default=64, help="contexts in a chunk")
    parser.add_argument("--context-length", type=int, default=64)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the report, one a library and dtype."""
    names = options.impls.split(",") if options.impls else list(NAMES)
    if unknown := sorted(set(names) - set(NAMES)):
        raise ValueError(f"impls has {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="monosem-bench-") as folder:
        job = _prepare(options, Path(folder))
        timed = _time(names, job, Path(folder), options)
    peers = {n: statistics.median(t.ms()) for n, t in timed.items() if t.replies and n not in OURS_HARVEST}
    anchor = timed[min(peers, key=lambda name: peers[name])] if peers else None
    return [_row(name, timed[name], anchor, job, options) for name in names]


def _prepare(options: argparse.Namespace, folder: Path) -> Job:
    """The model as a folder that every library reads, and the tokens of every chunk."""
    from monosem.config import DEFAULT_CORPUS, DEFAULT_MODEL
    from monosem.subject import Subject
    from monosem.tokens import contexts

    subject = Subject.load(options.model or DEFAULT_MODEL, device="cpu")
    found = contexts(
        DEFAULT_CORPUS,
        subject.tokenizer,
        context_length=options.context_length,
        n_contexts=options.contexts * (train.WARM_UP_STEPS + options.steps),
        held_out=False,
        held_out_fraction=0.05,
        seed=0,
    )
    np.save(folder / "tokens.npy", found.tokens.numpy())
    layer = subject.site(options.layer).layer
    return Job(str(subject._folder), str(folder / "tokens.npy"), layer, options.contexts, options.device)


def _time(names: list[str], job: Job, logs: Path, options: argparse.Namespace) -> dict[str, Timed]:
    timed = {name: Timed() for name in names}
    workers: dict[str, Worker] = {}
    try:
        train.start(names, "benchmarks.streams", json.dumps(job._asdict()), logs, options.threads, workers, timed)
        train.rounds(workers, timed, options.steps)
    finally:
        for worker in workers.values():
            worker.close()
    return timed


def _row(name: str, timed: Timed, anchor: Timed | None, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    tokens = options.contexts * options.context_length
    row: dict[str, Any] = {"impl": name, "dtype": split(name)[1], "layer": job.layer, "tokens": tokens}
    row.update(status="failed" if timed.reason else "ok", reason=timed.reason)
    row.update({key: None for key in report.MEASURED})
    if not timed.reason:
        row.update(train.numbers(timed, anchor, tokens))
        row["mean_abs_activation"] = row.pop("loss_last")
    return row
