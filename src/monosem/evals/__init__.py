"""Autoencoder -> numbers on held-out text, each with n and a 95% interval.

One file a question: `reconstruction` (how well are activations rebuilt, with how many latents), `downstream` (what
does the subject lose). docs/notation.md defines every number. The report is `eval.json` in the run folder.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from monosem import artifacts
from monosem.activations import ActivationStore
from monosem.config import EvalConfig, activation_facts, to_dict
from monosem.evals import downstream, reconstruction
from monosem.evals.bootstrap import clusters_of
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.types import Metric, resolve_device

log = logging.getLogger("monosem")

_KIND = "evaluation"
_REPORT_KEYS = ("run", "metrics", "histograms")
_MAY_CHANGE = ("run", "store", "device")
"""Fields of the config that say where, not what; the hashes of autoencoder and store stand for the first two."""


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """The report, also in eval.json: {"run": facts, "metrics": {name: {value, low, high, n, unit}}, "histograms": ...}.

    Skipped, and read back, when eval.json is already of this autoencoder, store, config and version of monosem.
    `ValueError` when there is no autoencoder, its store is missing or of another site or subject, or a number is not
    finite.
    """
    folder = _autoencoder_folder(config.run)
    with artifacts.folder_lock(config.run):
        device = resolve_device(config.device)
        autoencoder = Autoencoder.load(folder, device)
        store = ActivationStore.open(_store_path(config, autoencoder))
        _check_store(store, autoencoder)
        settings = {name: value for name, value in to_dict(config).items() if name not in _MAY_CHANGE}
        sources = {"autoencoder": artifacts.sha256_file(folder / "config.json"), "store": store.hash}
        path = Path(config.run) / "eval.json"
        if found := _finished(path, settings, sources):
            return found
        report = _report(config, autoencoder, store, device)
        artifacts.write_json(path, artifacts.manifest(_KIND, settings, sources, **report))
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people: a line on the run, then name, value, 95% interval, n and unit of each metric, aligned."""
    rows = [("metric", "value", "95% interval", "n", "unit")]
    for name, m in report["metrics"].items():
        rows.append((name, f"{m['value']:.4g}", f"[{m['low']:.4g}, {m['high']:.4g}]", f"{m['n']:,}", m["unit"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name, value, interval, n, _ = widths
    lines = [f"{r[0]:<{name}}  {r[1]:>{value}}  {r[2]:<{interval}}  {r[3]:>{n}}  {r[4]}" for r in rows]
    return "\n".join([_title(report["run"]), "", *lines])


def on_activations(
    autoencoder: Autoencoder, store: ActivationStore, device: torch.device | str, *, n_resamples: int, seed: int
) -> tuple[list[Metric], reconstruction.Tally]:
    """The metrics that need no subject model, and the sums over held-out tokens behind them."""
    options = {"n_resamples": n_resamples, "seed": seed}
    held_out = _tally(autoencoder, store, "held_out", store.n_blocks("held_out"), torch.device(device))
    metrics = reconstruction.metrics(held_out, **options)
    metrics += _training_metrics(autoencoder, store, torch.device(device), options)
    side_by_side = ("normalized_mse", "normalized_mse_train")
    return sorted(metrics, key=lambda metric: metric.name not in side_by_side), held_out


def _report(
    config: EvalConfig, autoencoder: Autoencoder, store: ActivationStore, device: torch.device
) -> dict[str, Any]:
    options = {"n_resamples": config.n_bootstrap, "seed": config.seed}
    metrics, held_out = on_activations(autoencoder, store, device, **options)
    found, facts = _downstream(config, autoencoder, store, options)
    metrics += found
    run = {**_facts(autoencoder, store), "n_documents_held_out": len(held_out.codes), **facts}
    return {
        "run": run,
        "metrics": {m.name: {k: v for k, v in dataclasses.asdict(m).items() if k != "name"} for m in metrics},
        "histograms": {"density_log10": reconstruction.density_histogram(held_out.n_fired, held_out.n_tokens)},
    }


def _training_metrics(
    autoencoder: Autoencoder, store: ActivationStore, device: torch.device, options: dict[str, int]
) -> list[Metric]:
    """dead_fraction as training measured it, and normalized_mse_train on as many training tokens as were held out."""
    metrics = []
    dead = autoencoder.provenance.get("dead_latents")
    if dead is None:
        log.info("dead_fraction is left out: the autoencoder does not say how many latents were dead in training")
    else:
        count, window = dead["count"], dead["window_tokens"]
        metrics.append(reconstruction.share_of_latents("dead_fraction", count, autoencoder.config.n_latents, window))
    if autoencoder.provenance.get("sources", {}).get("store") != store.hash:
        log.info("normalized_mse_train is left out: the autoencoder was trained on another store than %s", store.path)
        return metrics
    n_blocks = min(store.n_blocks("held_out"), store.n_blocks("train"))
    training = _tally(autoencoder, store, "train", n_blocks, device)
    return [*metrics, reconstruction.training_metric(training, **options)]


def _downstream(
    config: EvalConfig, autoencoder: Autoencoder, store: ActivationStore, options: dict[str, int]
) -> tuple[list[Metric], dict[str, int]]:
    """The metrics, and the tokens that the subject read and the sink positions left out of them."""
    site = store.site
    subject = Subject.load(site.model, revision=site.revision, dtype="float32", device=config.device)
    _check_subject(subject, store)
    if not subject.has_logits:
        log.info("downstream numbers are left out: %s is an encoder and predicts no next token", subject.name)
        return [], {"n_tokens_downstream": 0, "n_first_positions_left_out": 0}
    contexts = store.contexts("held_out")
    n_contexts = min(len(contexts.tokens), max(2, -(-config.n_tokens_downstream // store.context_length)))
    n_tokens = n_contexts * store.context_length
    if n_tokens < config.n_tokens_downstream:
        log.info("downstream: the store has %d held-out tokens, not %d", n_tokens, config.n_tokens_downstream)
    chosen = torch.arange(n_contexts) * len(contexts.tokens) // n_contexts  # spread evenly, to meet many documents
    metrics = downstream.metrics(
        subject,
        autoencoder,
        site,
        contexts.tokens[chosen],
        contexts.documents[chosen],
        store.mean,
        first_position=store.first_position,
        **options,
    )
    left_out = n_contexts * store.first_position
    return metrics, {"n_tokens_downstream": n_tokens, "n_first_positions_left_out": left_out}


def _tally(
    autoencoder: Autoencoder, store: ActivationStore, split: str, n_blocks: int, device: torch.device
) -> reconstruction.Tally:
    """The tally of the first `n_blocks` blocks of the split."""
    n_contexts = n_blocks * store.block_rows // store.rows_per_context
    clusters = clusters_of(store.contexts(split).documents[:n_contexts]).repeat_interleave(store.rows_per_context)
    shown = progress(range(n_blocks), f"reconstruct {split}", "tok", total=len(clusters), each=store.block_rows)
    return reconstruction.tally(autoencoder, (store.block(split, index) for index in shown), clusters, device)


def _autoencoder_folder(run: str) -> Path:
    if not run:
        raise ValueError("run is empty; give a run folder (monosem train --out RUN)")
    for folder in (Path(run) / "autoencoder", Path(run)):
        if (folder / "config.json").exists():
            return folder
    raise ValueError(f"{run} holds no autoencoder; give the folder of a finished run (monosem train --out RUN)")


def _store_path(config: EvalConfig, autoencoder: Autoencoder) -> Path:
    """The store asked for, or the one trained on: where it was then, or beside the autoencoder."""
    if config.store is not None:
        return Path(config.store)
    trained_on = autoencoder.provenance.get("store")
    for path in (Path(p) for p in (trained_on, Path(config.run) / "store") if p is not None):
        if (path / "manifest.json").exists():
            return path
    reason = "it does not say which it was trained on" if trained_on is None else f"{trained_on} is gone"
    raise ValueError(f"no store to evaluate {config.run} on ({reason}); give one of the same site with --store")


def _check_store(store: ActivationStore, autoencoder: Autoencoder) -> None:
    """`ValueError` unless the store is of the autoencoder's site and subject."""
    provenance, d_model = autoencoder.provenance, autoencoder.config.d_model
    if store.width != d_model:
        raise ValueError(f"{store.path} has activations of width {store.width}; this autoencoder reads width {d_model}")
    site = provenance.get("site")
    if site is not None and (site["layer"], site["location"]) != (store.site.layer, store.site.location):
        trained_on = f"layer {site['layer']} {site['location']}"
        raise ValueError(f"{store.path} is of {store.site}; this autoencoder reads {trained_on}: harvest that site")
    for source in ("subject", "tokenizer"):
        trained, found = provenance.get("sources", {}).get(source), store.manifest["sources"][source]
        if trained not in (None, found):
            raise ValueError(
                f"{store.path} was made with another {source} (sha256 {found[:12]}) than this autoencoder's "
                f"({trained[:12]}); harvest a store with the same model"
            )
    _check_unseen(store, provenance)


def _check_unseen(store: ActivationStore, provenance: dict[str, Any]) -> None:
    """`ValueError` when held-out documents of the store may be ones that the autoencoder was trained on.

    A document is held out below a fraction of all hashes, so what a smaller fraction holds out was held out in
    training too.
    """
    trained, found = provenance.get("harvest", {}).get("held_out_fraction"), store.config["held_out_fraction"]
    if trained is None or found <= trained:
        return
    if provenance["sources"]["corpus"] == store.manifest["sources"]["corpus"]:
        raise ValueError(
            f"{store.path} holds out {found:g} of the corpus that this autoencoder was trained on, but training held "
            f"out {trained:g}: some of it was trained on; harvest with held_out_fraction {trained:g} or less"
        )
    log.warning(
        "%s holds out %g of its corpus, training held out %g: a document of both corpora may have been trained on",
        store.path,
        found,
        trained,
    )


def _check_subject(subject: Subject, store: ActivationStore) -> None:
    """`ValueError` unless the model that loads under the store's name is still the one it was made with."""
    for source, found, differ in (
        ("tokenizer", subject.tokenizer_hash, f"the tokenizer of {subject.name} is not the one"),
        ("subject", subject.hash, f"the weights of {subject.name} are not those"),
    ):
        if found != store.manifest["sources"][source]:
            raise ValueError(f"{differ} that {store.path} was made with; restore the model or harvest the store again")


def _finished(path: Path, settings: dict[str, Any], sources: dict[str, str]) -> dict[str, Any] | None:
    """The report in `path` if it answers this very question, else None."""
    if not path.exists():
        return None
    found = artifacts.read_manifest(path, _KIND)
    version = artifacts.versions().get("monosem")
    if (found["config"], found["sources"], found["versions"].get("monosem")) != (settings, sources, version):
        log.info("%s is of another config, autoencoder, store or version: evaluating again", path)
        return None
    log.info("%s is already of this autoencoder, store and config; skipped", path)
    return {key: found[key] for key in _REPORT_KEYS}


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


def _title(run: dict[str, Any]) -> str:
    activation = run["activation"]
    sparsity = f"{activation}, k {run['k']}" if "k" in activation_facts(activation).uses else activation
    site = f"layer {run['site']['layer']} {run['site']['location']}"
    parts = [run["subject"], site, f"{run['n_latents']:,} latents", sparsity]
    if "tokens_seen" in run:
        epochs = f"{run['tokens_seen'] / run['distinct_tokens']:.2f} epochs of {run['distinct_tokens']:,}"
        parts.append(f"trained on {run['tokens_seen']:,} tokens ({epochs} distinct)")
    return ", ".join(parts)
