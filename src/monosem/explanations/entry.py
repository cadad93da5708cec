"""The parts of an explanation, one after the other; each is kept when it is done, and what is there is not done again.

The manifest is written after each part, so a killed `explain` goes on with the next one. What a part depends on is its
`of`; parts of another `of` leave the manifest before anything is written over them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosem import artifacts
from monosem.config import DEFAULT_CORPUS, ExplainConfig
from monosem.explained import ExplainStore
from monosem.explanations import collect, effects, probing, rules, words
from monosem.explanations.job import Job, Of
from monosem.explanations.lens import lens
from monosem.explanations.neighbours import by_decoder
from monosem.explanations.seen import BAND_EACH, N_NEIGHBOURS, N_RANDOM, N_SAMPLE, N_TOP, Seen
from monosem.logs import progress
from monosem.run_folder import autoencoder_folder
from monosem.torch_state import pinned
from monosem.types import free_memory, resolve_device

log = logging.getLogger("monosem")

N_VOTES = 10
_OPTIONAL = ("n2g", "ablations", "probes")
"""Parts without which an explanation can be read."""
PROBES = "eval/probes.json"


@pinned
def explain(config: ExplainConfig) -> ExplainStore:
    """RUN/explain/, made or found complete for this autoencoder, store and config.

    A part of `_OPTIONAL` that fails leaves the others: the manifest's `failed` says why, and the next call tries again.
    `ValueError` when there is no autoencoder or no store of its site, the subject is not the store's, or memory is
    short.
    """
    folder = autoencoder_folder(config.run)  # before the lock, which would make the folder
    job = Job(config, folder)
    wanted = _planned(job)
    todo = {name for name in PARTS if name not in job.computed or job.computed[name]["of"] != wanted[name]}
    todo |= job.damaged.keys()
    if not todo and not job.failed:
        log.info("%s is already complete; skipped", job.folder)  # read without a lock, where nothing may be writable
        return ExplainStore(job.folder)
    check_memory(job.n_latents, job.store.context_length, free_memory(resolve_device("cpu")))
    if todo & {"weights", "n2g", "ablations"}:
        _ = job.subject  # that it is there shows before the work
    with artifacts.folder_lock(config.run):
        job.read()  # as it may have been written meanwhile
        wanted = _planned(job)
        job.failed.clear()
        job.keep_only(wanted)
        for name, part in PARTS.items():
            if name in job.computed:
                log.info("%s: already there; skipped", name)
                continue
            started = time.monotonic()
            job.writer.part = name
            if name == "words" and "n2g" in job.failed:
                wanted[name] = {"n2g": None}  # to be made again when there are rules
            try:
                made = part.make(job, wanted[name])
            except (ValueError, ArithmeticError, LookupError, MemoryError, RuntimeError) as error:
                if name not in _OPTIONAL:
                    raise
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                job.fail(name, " ".join(f"{kind}{error}".split()))
                log.error("%s failed: %s; the same command tries it again", name, job.failed[name])
                log.debug("%s failed", name, exc_info=True)
                continue
            seconds = round(time.monotonic() - started, 1)
            log.info("%s: %.1f s", name, seconds)
            job.record(name, {**made, "seconds": seconds, "of": wanted[name]})
    return ExplainStore(job.folder)


def _planned(job: Job) -> dict[str, Of]:
    """On what each part as asked for depends."""
    wanted: dict[str, Of] = {}
    for name, part in PARTS.items():
        wanted[name] = part.of(job, wanted)
    return wanted


class Part(NamedTuple):
    """One part of an explanation."""

    of: Callable[[Job, dict[str, Of]], Of]
    """On what its result depends beside the autoencoder and the store, given that of the parts before."""
    make: Callable[[Job, Of], dict[str, Any]]
    """Writes its columns; returns `n_latents` that have it now and, where not all do, the `command` for more."""


def _weights(job: Job, of: Of) -> dict[str, Any]:
    """Neighbours by decoder direction, the vocabulary, and votes."""
    decoder = job.autoencoder.weights.decoder
    near = by_decoder(decoder.cpu(), N_NEIGHBOURS)
    job.writer.write("decoder_neighbours", near.latents, "latents with the likest decoder direction, likest first")
    job.writer.write("decoder_cosines", near.score, "their cosines")
    artifacts.write_json(job.folder / "vocabulary.json", job.subject.vocabulary())
    job.writer.keep("vocabulary.json")
    try:
        votes = lens(job.subject, job.store.site, decoder, N_VOTES)
    except ValueError as error:
        log.info("votes are left out: %s", error)
        return {"n_latents": job.n_latents, "left_out": {"votes": str(error)}}
    for side, ids, values in (("up", votes.up, votes.up_values), ("down", votes.down, votes.down_values)):
        job.writer.write(f"lens_{side}", ids, f"tokens whose logits the latent moves {side} most, strongest first")
        meaning = "logit change for one unit of the decoder direction, less its mean"
        job.writer.write(f"lens_{side}_values", values, meaning)
    return {"n_latents": job.n_latents}


def _activations(job: Job, of: Of) -> dict[str, Any]:
    """Statistics, examples, and neighbours by activation."""
    check_memory(job.n_latents, job.store.context_length, free_memory(resolve_device("cpu")))
    seen, each = Seen(job.autoencoder, job.store, job.config.seed), job.store.block_rows
    seen.add_all(progress(range(job.n_blocks), "explain", "tok", total=job.n_blocks * each, each=each))
    for name, (column, meaning) in seen.moments.columns().items():
        job.writer.write(name, column, meaning)
    _write_examples(job, seen.examples())
    near = seen.coactivation()
    meaning = "latents active on the same tokens, likest first; -1 for none"
    job.writer.write("coactivation_neighbours", near.latents, meaning)
    job.writer.write("coactivation_scores", near.score, "their Jaccard index: tokens with both over tokens with either")
    return {"n_latents": job.n_latents}


def check_memory(n_latents: int, context_length: int, free: int) -> None:
    """`ValueError` when what the pass holds does not fit in `free` bytes.

    Kept contexts, their columns and the sums: n (60 (28 + 16) + 50 (6 + 2 ctx) + 220) bytes, 1.2 GiB for 131,072
    latents and contexts of 64; 16 for two activations in each. The autoencoder (8 n d_model) is in memory already.
    """
    n_kept, n_chosen = N_TOP + N_SAMPLE, N_TOP + N_RANDOM + collect.N_BANDS * BAND_EACH
    needed = n_latents * (n_kept * (28 + 16) + n_chosen * (6 + 2 * context_length) + 220)
    if needed > free:
        raise ValueError(
            f"the examples of {n_latents:,} latents in contexts of {context_length} tokens take {needed / 2**30:.1f} "
            f"GiB of memory, but {free / 2**30:.1f} GiB are free; free some, or harvest shorter contexts for them"
        )


def _write_examples(job: Job, examples: dict[str, dict[str, np.ndarray]]) -> None:
    """The examples, and the tokens of the contexts that any of them uses, renumbered from 0."""
    write, contexts = job.writer.write, job.store.contexts("train", job.n_blocks)
    used = np.unique(np.concatenate([e["context"].ravel() for e in examples.values()]))
    used = used[used >= 0]
    for kind, example in examples.items():
        rows = np.where(example["context"] < 0, -1, np.searchsorted(used, example["context"]))
        write(f"{kind}_context", rows.astype(np.int32), f"{kind} examples: row of contexts; -1 for none")
        write(f"{kind}_position", example["position"], "position of the context's largest activation")
        write(f"{kind}_activations", example["activations"], "activation on every token of the context")
    write("contexts", contexts.tokens.numpy()[used], "token ids of the contexts that examples use")
    write("contexts_document", contexts.documents.numpy()[used], "document of each token, as in the store")
    write("contexts_position", contexts.positions.numpy()[used], "number of each token in its document; -1 after it")


def _rules(job: Job, of: Of) -> dict[str, Any]:
    """N2G rules of the first latents drawn, and how well they predict held-out text."""
    if reason := _predicts_nothing(job, "rules"):
        return {"n_latents": 0, "left_out": reason}
    drawn, n_firing = _drawn(job, of["n"])
    rules.make(job, of, drawn)
    job.writer.keep(rules.FILE)
    return {"n_latents": len(drawn), **_more(len(drawn) < n_firing, "--n2g all")}


def _effects(job: Job, of: Of) -> dict[str, Any]:
    """What ablating the first latents drawn does to the predictions in their strongest examples."""
    if reason := _predicts_nothing(job, "ablations"):
        return {"n_latents": 0, "left_out": reason}
    drawn, n_firing = _drawn(job, of["n"])
    effects.make(job, of, drawn)
    return {"n_latents": len(drawn), **_more(len(drawn) < n_firing, "--ablations all")}


def _predicts_nothing(job: Job, what: str) -> dict[str, str]:
    """Why rules or ablations are left out, by what they are; empty where they can be made."""
    if job.reading_subject.has_logits:
        return {}
    reason = f"{job.reading_subject.name} is an encoder and predicts no next token"
    log.info("%s are left out: %s", what, reason)
    return {what: reason}


def _drawn(job: Job, n: int) -> tuple[list[int], int]:
    """The first `n` latents of a random order of those that fire, so that more include fewer; and how many fire."""
    fires = np.flatnonzero(job.column("top_context")[:, 0] >= 0)
    return np.random.default_rng(job.config.seed).permutation(fires)[:n].tolist(), len(fires)


def _more(wanted: bool, flags: str) -> dict[str, str]:
    return {"command": f"monosem explain RUN {flags}"} if wanted else {}


def _probes(job: Job, of: Of) -> dict[str, Any]:
    """Every latent's best tasks; or of the latents that the evaluation's probes chose the least loss over tasks."""
    if "tasks" in of:
        return {"n_latents": job.n_latents, "tasks": probing.make(job, job.tasks)}
    more = f"monosem explain RUN --tasks {DEFAULT_CORPUS}"
    if of["eval"] is None:
        return {"n_latents": 0, "command": more}
    path = Path(job.config.run) / PROBES
    rows = artifacts.read_manifest(path, "evaluation-part")["tables"].get("tasks", [])
    if wrong := [row for row in rows if row["latent"] >= job.n_latents]:
        raise ValueError(f"{path} names latent {wrong[0]['latent']} of {job.n_latents}; evaluate the run again")
    names = sorted({row["task"] for row in rows})
    best, task = np.full(job.n_latents, np.nan, np.float32), np.full(job.n_latents, -1, np.int16)
    for row in sorted(rows, key=lambda row: -row["probe_loss"]):
        best[row["latent"]], task[row["latent"]] = row["probe_loss"], names.index(row["task"])
    job.writer.write("probe_best", best, "least probe loss over tasks, nats a text; NaN where no task chose the latent")
    job.writer.write("probe_task", task, "its task, a row of probe_tasks in the manifest; -1 for none")
    return {"n_latents": int((task >= 0).sum()), "tasks": names, "command": more}


def _of_probes(job: Job) -> Of:
    """The tasks asked for, or those there; else the hash of the evaluation's table of probes of this autoencoder and
    store, None when there is none.
    """
    if job.config.tasks is not None:
        return probing.facts(job.tasks, job.config.seed)
    there = job.computed.get("probes", {}).get("of", {})
    if there.get("seed") == job.config.seed and "tasks" in there:
        if "probes" in job.damaged:
            raise ValueError(f"{job.damaged['probes']}, with --tasks and the labelled texts of then")
        return there
    path = Path(job.config.run) / PROBES
    evaluated = path.exists() and artifacts.read_manifest(path, "evaluation-part")["sources"] == job.sources
    return {"eval": artifacts.sha256_file(path) if evaluated else None}


def _words(job: Job, of: Of) -> dict[str, Any]:
    kept = rules.read(job.folder / rules.FILE, of["n2g"]) if of["n2g"] is not None else {}
    found = {latent: [(pattern, value) for pattern, value in row["rule"]] for latent, row in kept.items()}
    words.write(job.folder, job.n_latents, found)
    job.writer.keep(words.FILE)
    return {"n_latents": job.n_latents}


def _of_drawn(job: Job, wanted: dict[str, Of], name: str) -> Of:
    """The draw asked for, or the larger one that is there."""
    n, there = getattr(job.config, name), job.computed.get(name, {}).get("of", {})
    of = {"activations": wanted["activations"], "n": job.n_latents if n == "all" else min(n, job.n_latents)}
    return there if there.get("activations") == of["activations"] and there["n"] >= of["n"] else of


PARTS: dict[str, Part] = {
    "weights": Part(lambda job, wanted: {}, _weights),
    "activations": Part(
        lambda job, wanted: {"n_tokens": job.n_blocks * job.store.block_rows, "seed": job.config.seed}, _activations
    ),
    "n2g": Part(lambda job, wanted: _of_drawn(job, wanted, "n2g"), _rules),
    "ablations": Part(lambda job, wanted: _of_drawn(job, wanted, "ablations"), _effects),
    "probes": Part(lambda job, wanted: _of_probes(job), _probes),
    "words": Part(lambda job, wanted: {"n2g": wanted["n2g"]}, _words),
}
"""In order."""
