"""Autoencoder -> RUN/explain/: for every latent, how often it fires, where, with which others, and what it votes for.

One pass over the activations of a store gives the statistics and the examples of all latents (`collect`), the weights
give neighbours and votes (`neighbours`, `lens`). A viewer reads the folder (`store`); docs/formats.md describes it.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosem import artifacts
from monosem.activations import ActivationStore
from monosem.config import ExplainConfig, to_dict
from monosem.explanations import collect
from monosem.explanations.lens import lens
from monosem.explanations.neighbours import by_coactivation, by_decoder
from monosem.explanations.store import KIND, ColumnWriter, ExplainStore
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.run_folder import autoencoder_folder, check_subject, open_run
from monosem.subject import Subject
from monosem.types import resolve_device

log = logging.getLogger("monosem")

N_TOP, N_RANDOM, N_BANDS, BAND_EACH = 20, 10, 4, 5
N_SAMPLE = 40
"""Contexts a latent in the uniform sample from which random and quantile examples are chosen."""
N_NEIGHBOURS = N_VOTES = 10
COACTIVATION_TOKENS = 65_536
_MAY_CHANGE = ("run", "store", "device")


def explain(config: ExplainConfig) -> ExplainStore:
    """RUN/explain/, made or found complete for this autoencoder, store and config.

    `ValueError` when there is no autoencoder or no store of its site, or the subject is not the store's.
    """
    autoencoder_folder(config.run)  # before the lock, which would make the folder
    with artifacts.folder_lock(config.run):
        device = resolve_device(config.device)
        folder, autoencoder, store = open_run(config.run, config.store, device)
        settings = {name: value for name, value in to_dict(config).items() if name not in _MAY_CHANGE}
        sources = {"autoencoder": artifacts.sha256_file(folder / "config.json"), "store": store.hash}
        out = Path(config.run) / "explain"
        if _is_of(out, settings, sources):
            log.info("%s is already of this autoencoder, store and config; skipped", out)
            return ExplainStore(out)
        (out / "manifest.json").unlink(missing_ok=True)  # what it describes is about to change
        writer = ColumnWriter(out)
        facts = _from_activations(writer, config, autoencoder, store)
        facts |= _from_weights(writer, config, autoencoder, store)
        facts |= {"subject": store.manifest["subject"], "site": dataclasses.asdict(store.site)}
        facts |= {**dataclasses.asdict(autoencoder.config), "columns": writer.columns}
        artifacts.write_json(out / "manifest.json", artifacts.manifest(KIND, settings, sources, **facts))
    return ExplainStore(out)


def _is_of(out: Path, settings: dict[str, Any], sources: dict[str, str]) -> bool:
    if not (out / "manifest.json").exists():
        return False
    found = ExplainStore(out).manifest
    return (found["config"], found["sources"]) == (settings, sources)


class _Pass(NamedTuple):
    """What one pass over the activations leaves."""

    moments: collect.Moments
    top: collect.Kept
    sample: collect.Kept
    pairs: tuple[np.ndarray, np.ndarray]
    """Active (token, latent) pairs of the first COACTIVATION_TOKENS tokens, sorted by token."""


def _from_activations(
    writer: ColumnWriter, config: ExplainConfig, autoencoder: Autoencoder, store: ActivationStore
) -> dict[str, Any]:
    n_blocks = min(store.n_blocks("train"), -(-config.n_tokens // store.block_rows))
    seen = _pass(config, autoencoder, store, n_blocks)
    for name, (column, meaning) in seen.moments.columns().items():
        writer.write(name, column, meaning)
    examples = {
        "top": collect.choose(seen.top, collect.top_slots(seen.top, N_TOP)),
        "random": collect.choose(seen.sample, collect.top_slots(seen.sample, N_RANDOM)),
        "quantile": collect.choose(seen.sample, collect.quantile_slots(seen.sample, N_BANDS, BAND_EACH)),
    }
    _write_examples(writer, examples, store)
    near = by_coactivation(*seen.pairs, autoencoder.config.n_latents, N_NEIGHBOURS)
    writer.write(
        "coactivation_neighbours", near.latents, "latents active on the same tokens, likest first; -1 for none"
    )
    writer.write("coactivation_scores", near.score, "their Jaccard index: tokens with both over tokens with either")
    return {
        "n_tokens": seen.moments.n_tokens,
        "n_contexts": n_blocks * store.config["block_contexts"],
        "context_length": store.context_length,
        "first_position": store.first_position,
        "n_quantile_bands": N_BANDS,
    }


def _pass(config: ExplainConfig, autoencoder: Autoencoder, store: ActivationStore, n_blocks: int) -> _Pass:
    n, ctx = autoencoder.config.n_latents, store.context_length
    moments, top, sample = collect.Moments(n), collect.Kept(n, N_TOP, ctx), collect.Kept(n, N_SAMPLE, ctx)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for block in progress(range(n_blocks), "explain", "tok", total=n_blocks * store.block_rows, each=store.block_rows):
        x, _ = autoencoder.normalize(store.block("train", block))
        found = autoencoder.encode(x)
        indices, values = found.indices.cpu().numpy(), found.values.cpu().numpy()
        rows, slots = np.nonzero(values > 0)
        latents, active = indices[rows, slots], values[rows, slots]
        contexts, positions = np.divmod(rows, store.rows_per_context)
        moments.add(latents, active, len(values))
        first = block * store.config["block_contexts"]
        groups = collect.groups_of(latents, contexts + first, positions + store.first_position, active)
        top.offer(groups, groups.peak.astype(np.float64))
        sample.offer(groups, collect.sample_priority(groups.latent, groups.context, config.seed))
        if block * store.block_rows < COACTIVATION_TOKENS:
            pairs.append((rows + block * store.block_rows, latents))
    return _Pass(moments, top, sample, (np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])))


def _write_examples(writer: ColumnWriter, examples: dict[str, dict[str, np.ndarray]], store: ActivationStore) -> None:
    """The examples, and the tokens of the contexts that any of them uses, renumbered from 0."""
    used = np.unique(np.concatenate([e["context"].ravel() for e in examples.values()]))
    used = used[used >= 0]
    for kind, example in examples.items():
        rows = np.where(example["context"] < 0, -1, np.searchsorted(used, example["context"]))
        writer.write(f"{kind}_context", rows.astype(np.int32), f"{kind} examples: row of contexts; -1 for none")
        writer.write(f"{kind}_position", example["position"], "position of the context's largest activation")
        writer.write(f"{kind}_activations", example["activations"], "activation on every token of the context")
    contexts = store.contexts("train")
    writer.write("contexts", contexts.tokens.numpy()[used], "token ids of the contexts that examples use")
    writer.write("contexts_document", contexts.documents.numpy()[used], "document of each token, as in the store")
    writer.write(
        "contexts_position", contexts.positions.numpy()[used], "number of each token in its document; -1 after it"
    )


def _from_weights(
    writer: ColumnWriter, config: ExplainConfig, autoencoder: Autoencoder, store: ActivationStore
) -> dict[str, Any]:
    near = by_decoder(autoencoder.weights.decoder.cpu(), N_NEIGHBOURS)
    writer.write("decoder_neighbours", near.latents, "latents with the likest decoder direction, likest first")
    writer.write("decoder_cosines", near.score, "their cosines")
    site = store.site
    subject = Subject.load(site.model, revision=site.revision, dtype="float32", device=config.device)
    check_subject(subject, store)
    artifacts.write_json(writer.folder / "vocabulary.json", subject.vocabulary())
    if not subject.has_logits:
        log.info("votes are left out: %s is an encoder and predicts no next token", subject.name)
        return {}
    votes = lens(subject, autoencoder.weights.decoder, N_VOTES)
    for side, ids, values in (("up", votes.up, votes.up_values), ("down", votes.down, votes.down_values)):
        writer.write(f"lens_{side}", ids, f"tokens whose logits the latent moves {side} most, strongest first")
        writer.write(f"lens_{side}_values", values, "logit change for one unit of the decoder direction, less its mean")
    return {}
