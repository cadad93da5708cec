"""A run folder as later stages meet it: the released autoencoder, and a store of the same site to judge it on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from monosem.activations import ActivationStore
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.types import Site

log = logging.getLogger("monosem")


class OpenRun(NamedTuple):
    """What `open_run` found."""

    folder: Path
    """The folder of the released autoencoder."""
    autoencoder: Autoencoder
    store: ActivationStore


def open_run(run: str, store: str | None, device: torch.device) -> OpenRun:
    """The autoencoder of a run and the store to judge it on: `store`, or the one it was trained on.

    `ValueError` when there is no autoencoder, or its store is missing, of another site, subject or tokenizer, or holds
    out documents that training may have read.
    """
    folder = autoencoder_folder(run)
    autoencoder = Autoencoder.load(folder, device)
    return OpenRun(folder, autoencoder, open_store(_store_path(run, store, autoencoder), autoencoder))


def open_store(path: str | Path, autoencoder: Autoencoder) -> ActivationStore:
    """The store in `path`; `ValueError`, as in `open_run`, when it is not one to judge this autoencoder on."""
    store = ActivationStore.open(path)
    _check_store(store, autoencoder)
    return store


def autoencoder_folder(run: str) -> Path:
    """RUN/autoencoder or RUN itself, whichever holds a released autoencoder; `ValueError` when neither does."""
    if not run:
        raise ValueError("run is empty; give a run folder (monosem train --out RUN)")
    for folder in (Path(run) / "autoencoder", Path(run)):
        if (folder / "config.json").exists():
            return folder
    raise ValueError(f"{run} holds no autoencoder; give the folder of a finished run (monosem train --out RUN)")


def _store_path(run: str, store: str | None, autoencoder: Autoencoder) -> Path:
    """The store asked for, or the one trained on: where it was then, or beside the autoencoder."""
    if store is not None:
        return Path(store)
    trained_on = autoencoder.provenance.get("store")
    for path in (Path(p) for p in (trained_on, Path(run) / "store") if p is not None):
        if (path / "manifest.json").exists():
            return path
    reason = "it does not say which it was trained on" if trained_on is None else f"{trained_on} is gone"
    raise ValueError(f"no store to evaluate {run} on ({reason}); give one of the same site with --store")


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


def subject_of(
    store: ActivationStore,
    dtype: str,
    device: str,
    loaded: dict[tuple[Any, ...], Subject] | None = None,
    *,
    model: str | None = None,
) -> Subject:
    """The subject that the store was made with, out of `loaded` if it is there, else kept there; from `model` if given.

    In `store.subject_dtype` it reads what was harvested; losses want float32, as small differences drown in bf16
    logits. `ValueError` when it is not the same any more.
    """
    loaded = {} if loaded is None else loaded
    site = store.site
    key = model or site.model, site.revision, dtype, device
    if key not in loaded:
        loaded[key] = load_subject(site, dtype, device, model)
    check_subject(loaded[key], store)
    return loaded[key]


def load_subject(site: Site, dtype: str, device: str, model: str | None = None) -> Subject:
    """The subject of a site, from `model` where it lies elsewhere now. Its hashes are for the caller to check."""
    if model is not None:
        return Subject.load(model, dtype=dtype, device=device)
    if (path := Path(site.model)).is_absolute() and not path.exists():
        raise ValueError(
            f"the subject {path} is not there any more; say where it lies now: monosem eval RUN --model PATH (explain "
            "and serve take it too; its hash is checked)"
        )
    return Subject.load(site.model, revision=site.revision, dtype=dtype, device=device)


def check_subject(subject: Subject, store: ActivationStore) -> None:
    """`ValueError` unless the model that loads under the store's name is still the one it was made with."""
    for source, found, differ in (
        ("tokenizer", subject.tokenizer_hash, f"the tokenizer of {subject.name} is not the one"),
        ("subject", subject.hash, f"the weights of {subject.name} are not those"),
        ("subject_config", subject.config_hash, f"the config.json of {subject.name} is not the one"),
    ):
        if store.manifest["sources"].get(source, found) != found:
            raise ValueError(f"{differ} that {store.path} was made with; restore the model or harvest the store again")
