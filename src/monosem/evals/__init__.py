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
from monosem.run_folder import open_run, open_store
from monosem.torch_state import pinned, without_inference_tensors
from monosem.types import Metric, resolve_device

log = logging.getLogger("monosem")

_PART_KIND = "evaluation-part"
_REPORT_KEYS = ("run", "metrics", "histograms", "tables", "left_out", "failed")
_MAY_CHANGE = ("run", "store", "device", "model")
"""Fields of the config that say where, not what; the hashes of autoencoder, store and subject stand for them."""
_USES = {"downstream": ("n_tokens_downstream",), "probes": ("tasks",)}
"""Fields of the config, beside n_bootstrap and seed, on which a part depends."""


@pinned
def evaluate(
    config: EvalConfig, shared: Shared | None = None, *, autoencoder: Autoencoder | None = None
) -> dict[str, Any]:
    """The report, also in eval.json: {"run": facts, "metrics": {name: {value, low, high, n, unit}}, "histograms": ...,
    "tables": {part: {name: ...}}, "left_out": {what: why it has no meaning here}, "failed": {part: why it ended}}.

    `shared` is what evaluations one after the other load only once. An `autoencoder` that is no run of ours
    (`convert.wrap`) is judged on `config.store`, and `config.run` is the folder for its numbers. Skipped, and read
    back, when eval.json is already of this autoencoder, store, config and version of monosem; parts that are, are not
    done again. A part that fails leaves the others' numbers, and is tried again by the next call. `ValueError` when
    there is no autoencoder, its store is missing or of another site or subject, the subject is not there, or a number
    of the first part is not finite.
    """
    device, given = resolve_device(config.device), autoencoder is not None
    autoencoder, store, digest = _judged_on(config, autoencoder, device)
    settings = {name: value for name, value in to_dict(config).items() if name not in _MAY_CHANGE}
    sources = {"autoencoder": digest, "store": store.hash}
    path = Path(config.run) / "eval.json"
    if found := _finished(path, KIND, settings, sources):  # read without a lock, where nothing may be writable
        log.info("%s is already of this autoencoder, store and config; skipped", path)
        return {key: found.get(key, {}) for key in _REPORT_KEYS}
    if given:  # else the folder is of a run of ours
        artifacts.require_ours(path, lambda there: artifacts.says_kind(there, KIND))
    with artifacts.folder_lock(config.run):
        judged = Judged(config, autoencoder, store, device, shared)
        parts = {name: part for name in SIZES[config.suite] if (part := _kept(name, judged, sources)) is not None}
        check(judged, SIZES[config.suite].keys() - parts.keys())
        failed: dict[str, str] = {}
        for name in SIZES[config.suite]:
            if name not in parts and (part := _tried(name, judged, sources, failed)) is not None:
                parts[name] = part
        parts = {name: parts[name] for name in SIZES[config.suite] if name in parts}
        report = _report(judged, parts, failed)
        artifacts.write_json(path, artifacts.manifest(KIND, settings, sources, **report))
    return report


def _tried(name: str, judged: Judged, sources: dict[str, str], failed: dict[str, str]) -> dict[str, Any] | None:
    """The part; or None, and why in `failed`. Without the first part, on which all rest, there is nothing to say."""
    try:
        return _part(name, judged, sources)
    except (ValueError, ArithmeticError, LookupError, MemoryError, RuntimeError) as error:
        if name == "reconstruction":
            raise
        failed[name] = " ".join(
            f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{error}".split()
        )
        log.error("%s failed: %s; the other parts are done, and the same command tries it again", name, failed[name])
        log.debug("%s failed", name, exc_info=True)
        return None


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
    missing = [f"{what}: left out, as {reason}" for what, reason in report.get("left_out", {}).items()]
    missing += [f"{part} failed: {reason}" for part, reason in report.get("failed", {}).items()]
    return "\n".join([title(report["run"]), "", *lines, *([""] if missing else []), *missing])


@pinned
def on_activations(
    autoencoder: Autoencoder, store: ActivationStore, device: torch.device | str, *, n_resamples: int, seed: int
) -> tuple[list[Metric], reconstruction.Tally]:
    """The metrics that need no subject model, and the sums over held-out tokens behind them."""
    config = EvalConfig(run="", n_bootstrap=n_resamples, seed=seed)
    judged = Judged(config, autoencoder, store, torch.device(device))
    return reconstruction_part(judged).metrics, judged.held_out


def _kept(name: str, judged: Judged, sources: dict[str, str]) -> dict[str, Any] | None:
    """The part as RUN/eval/NAME.json has it, None where that is not there or of something else."""
    found = _finished(_part_path(judged.config, name), _PART_KIND, _part_settings(name, judged), sources)
    if found is not None:
        log.info("%s: already there", name)
    return found


def _part_path(config: EvalConfig, name: str) -> Path:
    return Path(config.run) / "eval" / f"{name}.json"


def _part_settings(name: str, judged: Judged) -> dict[str, Any]:
    config, fields = judged.config, ("n_bootstrap", "seed", *_USES.get(name, ()))
    facts = {"sizes": judged.sizes(name), "full": config.suite != "basic"}
    return {**{field: getattr(config, field) for field in fields}, **facts}


def _part(name: str, judged: Judged, sources: dict[str, str]) -> dict[str, Any]:
    """The part's `metrics` and `tables` as JSON data, kept in RUN/eval/NAME.json too."""
    started = time.monotonic()
    metrics, tables, left_out = PARTS[name](judged, **judged.sizes(name))
    for what, reason in left_out.items():
        log.info("%s: left out, as %s", what, reason)
    by_name = {m.name: {k: v for k, v in dataclasses.asdict(m).items() if k != "name"} for m in metrics}
    facts = {"metrics": by_name, "tables": tables, "left_out": dict(left_out)}
    seconds = round(time.monotonic() - started, 1)
    found = artifacts.manifest(_PART_KIND, _part_settings(name, judged), sources, **facts, seconds=seconds)
    artifacts.write_json(_part_path(judged.config, name), found)
    log.info("%s: %.1f s", name, found["seconds"])
    return found


def _report(judged: Judged, parts: dict[str, dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    tables = {name: dict(part["tables"]) for name, part in parts.items()}
    facts = {name: value for kept in tables.values() for name, value in kept.pop("facts", {}).items()}
    histogram = tables["reconstruction"].pop("density_log10")
    return {
        "run": {**_facts(judged.autoencoder, judged.store), **facts},
        "metrics": {name: metric for part in parts.values() for name, metric in part["metrics"].items()},
        "histograms": {"density_log10": histogram},
        "tables": {name: kept for name, kept in tables.items() if kept},
        "left_out": {what: reason for part in parts.values() for what, reason in part.get("left_out", {}).items()},
        "failed": failed,
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
    return None if found.get("failed") else found


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
