"""Autoencoder -> numbers on held-out text, each with n and a 95% interval.

One file a question; `parts` says which parts a suite has and how large they are. Each part is kept in RUN/eval/ as soon
as it is done, so that an interrupted evaluation goes on with the next one; eval.json in the run folder has them all.
docs/notation.md defines every number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import torch

from monosem import artifacts
from monosem.activations import ActivationStore
from monosem.config import EvalConfig, to_dict
from monosem.evals import reconstruction
from monosem.evals.parts import PARTS, SIZES, Judged, Shared, check, reconstruction_part
from monosem.evals.report import KIND, title
from monosem.model import Autoencoder
from monosem.run_folder import autoencoder_folder, open_run, open_store
from monosem.torch_state import pinned, without_inference_tensors
from monosem.types import Metric, resolve_device

log = logging.getLogger("monosem")

_PART_KIND = "evaluation-part"
_REPORT_KEYS = ("run", "metrics", "histograms", "tables")
_MAY_CHANGE = ("run", "store", "device")
"""Fields of the config that say where, not what; the hashes of autoencoder and store stand for the first two."""
_USES = {"downstream": ("n_tokens_downstream",), "probes": ("tasks",)}
"""Fields of the config, beside n_bootstrap and seed, on which a part depends."""


@pinned
def evaluate(
    config: EvalConfig, shared: Shared | None = None, *, autoencoder: Autoencoder | None = None
) -> dict[str, Any]:
    """The report, also in eval.json: {"run": facts, "metrics": {name: {value, low, high, n, unit}}, "histograms": ...,
    "tables": {part: {name: ...}}}.

    `shared` is what evaluations one after the other load only once. An `autoencoder` that is no run of ours
    (`convert.wrap`) is judged on `config.store`, and `config.run` is the folder for its numbers. Skipped, and read
    back, when eval.json is already of this autoencoder, store, config and version of monosem; parts that are, are not
    done again. `ValueError` when there is no autoencoder, its store is missing or of another site or subject, or a
    number is not finite.
    """
    if autoencoder is None:
        autoencoder_folder(config.run)  # before the lock, which would make the folder
    with artifacts.folder_lock(config.run):
        device = resolve_device(config.device)
        autoencoder, store, digest = _judged_on(config, autoencoder, device)
        settings = {name: value for name, value in to_dict(config).items() if name not in _MAY_CHANGE}
        sources = {"autoencoder": digest, "store": store.hash}
        path = Path(config.run) / "eval.json"
        if found := _finished(path, KIND, settings, sources):
            log.info("%s is already of this autoencoder, store and config; skipped", path)
            return {key: found[key] for key in _REPORT_KEYS}
        judged = Judged(config, autoencoder, store, device, shared)
        check(judged)
        parts = {name: _part(name, judged, sources) for name in SIZES[config.suite]}
        report = _report(judged, parts)
        artifacts.write_json(path, artifacts.manifest(KIND, settings, sources, **report))
    return report


def _judged_on(
    config: EvalConfig, autoencoder: Autoencoder | None, device: torch.device
) -> tuple[Autoencoder, ActivationStore, str]:
    """What is judged, on what, and a hash of the former: of RUN's config.json, or of a given one's tensors."""
    if autoencoder is None:
        folder, autoencoder, store = open_run(config.run, config.store, device)
        return autoencoder, store, artifacts.sha256_file(folder / "config.json")
    if config.store is None:
        raise ValueError("store is not given; an autoencoder from elsewhere needs one to be judged on")
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    without_inference_tensors(autoencoder)
    return autoencoder.to(device), open_store(config.store, autoencoder), digest.hexdigest()


def table(report: dict[str, Any]) -> str:
    """The report for people: a line on the run, then name, value, 95% interval, n and unit of each metric, aligned."""
    rows = [("metric", "value", "95% interval", "n", "unit")]
    for name, m in report["metrics"].items():
        rows.append((name, f"{m['value']:.4g}", f"[{m['low']:.4g}, {m['high']:.4g}]", f"{m['n']:,}", m["unit"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name, value, interval, n, _ = widths
    lines = [f"{r[0]:<{name}}  {r[1]:>{value}}  {r[2]:<{interval}}  {r[3]:>{n}}  {r[4]}" for r in rows]
    return "\n".join([title(report["run"]), "", *lines])


@pinned
def on_activations(
    autoencoder: Autoencoder, store: ActivationStore, device: torch.device | str, *, n_resamples: int, seed: int
) -> tuple[list[Metric], reconstruction.Tally]:
    """The metrics that need no subject model, and the sums over held-out tokens behind them."""
    config = EvalConfig(run="", n_bootstrap=n_resamples, seed=seed)
    judged = Judged(config, autoencoder, store, torch.device(device))
    return reconstruction_part(judged).metrics, judged.held_out


def _part(name: str, judged: Judged, sources: dict[str, str]) -> dict[str, Any]:
    """The part's `metrics` and `tables` as JSON data, out of RUN/eval/NAME.json if they are there, else kept there."""
    config, sizes = judged.config, judged.sizes(name)
    fields = ("n_bootstrap", "seed", *_USES.get(name, ()))
    settings = {**{field: getattr(config, field) for field in fields}, "sizes": sizes, "full": config.suite != "basic"}
    path = Path(config.run) / "eval" / f"{name}.json"
    if found := _finished(path, _PART_KIND, settings, sources):
        log.info("%s: already there", name)
        return found
    started = time.monotonic()
    metrics, tables = PARTS[name](judged, **sizes)
    by_name = {m.name: {k: v for k, v in dataclasses.asdict(m).items() if k != "name"} for m in metrics}
    found = artifacts.manifest(
        _PART_KIND, settings, sources, metrics=by_name, tables=tables, seconds=round(time.monotonic() - started, 1)
    )
    artifacts.write_json(path, found)
    log.info("%s: %.1f s", name, found["seconds"])
    return found


def _report(judged: Judged, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tables = {name: dict(part["tables"]) for name, part in parts.items()}
    facts = {name: value for kept in tables.values() for name, value in kept.pop("facts", {}).items()}
    histogram = tables["reconstruction"].pop("density_log10")
    return {
        "run": {**_facts(judged.autoencoder, judged.store), **facts},
        "metrics": {name: metric for part in parts.values() for name, metric in part["metrics"].items()},
        "histograms": {"density_log10": histogram},
        "tables": {name: kept for name, kept in tables.items() if kept},
    }


def _finished(path: Path, kind: str, settings: dict[str, Any], sources: dict[str, str]) -> dict[str, Any] | None:
    """The manifest in `path` if it answers this very question, or it and more (a suite larger than basic)."""
    if not path.exists():
        return None
    try:
        found = artifacts.read_manifest(path, kind)
    except ValueError as error:
        log.warning("%s: evaluating again", error)
        return None
    version = artifacts.versions().get("monosem")
    at_least = [settings]
    if settings.get("suite") == "basic":
        at_least = [{**settings, "suite": suite, "n2g": found["config"].get("n2g")} for suite in SIZES]
    if (found["sources"], found["versions"].get("monosem")) != (sources, version) or found["config"] not in at_least:
        log.info("%s is of another config, autoencoder, store or version: evaluating again", path)
        return None
    return found


def _facts(autoencoder: Autoencoder, store: ActivationStore) -> dict[str, Any]:
    provenance, settings = autoencoder.provenance, autoencoder.config
    trained = ("tokens_seen", "distinct_tokens", "epochs", "weights", "auxk_dropped_steps")
    return {
        "subject": store.manifest["subject"],
        "site": dataclasses.asdict(store.site),
        "context_length": store.context_length,
        "store": str(store.path),
        **dataclasses.asdict(settings),
        **{name: provenance[name] for name in trained if name in provenance},
    }
