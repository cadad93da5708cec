"""The parts of an evaluation, a function each, and how large each is in a suite.

A part answers one question about one autoencoder: it gives metrics, and the tables and curves behind them as plain JSON
data. `Judged` holds what they share. A part that has no meaning for a subject or an autoencoder gives nothing and says
so in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.activations import ActivationStore
from monosem.config import EvalConfig, activation_facts
from monosem.evals import (
    ablation,
    compute_equivalent,
    downstream,
    explainability,
    latents,
    probes,
    progressive,
    reconstruction,
    refinement,
    simulation,
    tasks,
)
from monosem.evals.bootstrap import clusters_of
from monosem.evals.tasks import Task
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.n2g import LatentReader
from monosem.run_folder import subject_of
from monosem.subject import Subject
from monosem.types import Metric

log = logging.getLogger("monosem")

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "basic": {"reconstruction": {}, "downstream": {}},
    "quick": {
        "reconstruction": {},
        "latents": {"n_rows": 16_384},
        "downstream": {},
        "refinement": {"n_rows": 4_096},
        "progressive": {"n_rows": 16_384, "n_tokens": 2_048},
        "ablation": {"n_ablations": 200},
        "probes": {"n_tasks": 16, "n_texts": 500},
        "explainability": {"n_latents": 32, "n_examples": 8, "n_tokens_building": 200_000, "n_tokens_simulated": 2_048},
    },
    "paper": {
        "reconstruction": {},
        "latents": {"n_rows": 65_536},
        "downstream": {},
        "refinement": {"n_rows": 16_384},
        "progressive": {"n_rows": 65_536, "n_tokens": 16_384},
        "ablation": {"n_ablations": 1_000},
        "probes": {"n_tasks": 1_000, "n_texts": 2_000},
        "explainability": {
            "n_latents": 128, "n_examples": 16, "n_tokens_building": 1_000_000, "n_tokens_simulated": 16_384
        },
    },
}  # fmt: skip
"""Suite -> its parts, in order -> their sizes. Smaller sizes give wider intervals, nothing else."""


_WITHOUT_SUBJECT = {"reconstruction", "latents", "refinement"}
_PCA_ROWS = 16_384


class Part(NamedTuple):
    """What one part found."""

    metrics: list[Metric]
    tables: dict[str, Any]
    """Tables, curves and facts as JSON data, by name."""
    left_out: Mapping[str, str] = MappingProxyType({})
    """What of it has no meaning here, and why."""


class Rows(NamedTuple):
    """Activations, raw, with the cluster of text and the position in its context of each."""

    rows: Float[Tensor, "n width"]
    clusters: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]


class Shared:
    """What the evaluations of one process have in common: subjects, tasks and the activations of their texts."""

    def __init__(self) -> None:
        self.subjects: dict[tuple[Any, ...], Subject] = {}
        self._tasks: dict[str, list[tasks.Task]] = {}
        self.pooled: dict[tuple[Any, ...], probes.Pooled] = {}

    def tasks(self, source: str) -> list[tasks.Task]:
        if source not in self._tasks:
            self._tasks[source] = tasks.load(source)
        return self._tasks[source]

    def some_tasks(self, source: str, n: int) -> list[Task]:
        """At most `n` of the source's, spread evenly."""
        found = self.tasks(source)
        return [found[i * len(found) // n] for i in range(n)] if n < len(found) else found


class Judged:
    """One autoencoder and what its parts share, loaded when first asked for."""

    def __init__(
        self,
        config: EvalConfig,
        autoencoder: Autoencoder,
        store: ActivationStore,
        device: torch.device,
        shared: Shared | None = None,
    ) -> None:
        self.config, self.autoencoder, self.store, self.device = config, autoencoder, store, device
        self.shared = shared or Shared()
        self.options: dict[str, Any] = {"n_resamples": config.n_bootstrap, "seed": config.seed}

    @cached_property
    def subject(self) -> Subject:
        """For losses and logits."""
        return self._subject("float32")

    @cached_property
    def reading_subject(self) -> Subject:
        """To read activations off new texts."""
        return self._subject(self.store.subject_dtype)

    def _subject(self, dtype: str) -> Subject:
        return subject_of(self.store, dtype, self.config.device, self.shared.subjects, model=self.config.model)

    def tasks(self, n: int) -> list[tasks.Task]:
        """At most `n` of the labelled tasks, spread evenly over those of the source."""
        return self.shared.some_tasks(self.config.tasks, n)

    def sizes(self, part: str) -> dict[str, int]:
        """How large a part is."""
        sizes = SIZES[self.config.suite][part]
        if part == "explainability" and self.config.n2g is not None:
            n = self.autoencoder.config.n_latents
            sizes = {**sizes, "n_latents": n if self.config.n2g == "all" else min(self.config.n2g, n)}
        return sizes

    @cached_property
    def held_out(self) -> reconstruction.Tally:
        """The sums over all held-out tokens."""
        return self.tally("held_out", self.store.n_blocks("held_out"))

    def tally(self, split: str, n_blocks: int) -> reconstruction.Tally:
        """The tally of the first `n_blocks` blocks of the split."""
        store = self.store
        clusters = self._clusters(split, n_blocks)
        shown = progress(range(n_blocks), f"reconstruct {split}", "tok", total=len(clusters), each=store.block_rows)
        blocks = (store.block(split, index) for index in shown)
        return reconstruction.tally(self.autoencoder, blocks, clusters, self.device)

    @cached_property
    def pca(self) -> latents.Pca:
        """As many principal components of training tokens as latents are active on a held-out token."""
        _, active, _ = self.held_out.codes.sum(0).tolist()
        k = min(max(1, round(active / self.held_out.n_tokens)), self.autoencoder.config.d_model)
        return latents.fit_pca(self.autoencoder, self.rows(_PCA_ROWS, "train").rows, k)

    def rows(self, n_rows: int, split: str = "held_out") -> Rows:
        """The rows of the first whole blocks with at least `n_rows`, or all there are, on the device."""
        store = self.store
        n_blocks = min(store.n_blocks(split), -(-n_rows // store.block_rows))
        rows = torch.cat([store.block(split, index) for index in range(n_blocks)]).float().to(self.device)
        positions = torch.arange(len(rows)) % store.rows_per_context + store.first_position
        return Rows(rows, self._clusters(split, n_blocks), positions)

    def contexts(self, n_tokens: int) -> tuple[Int[Tensor, "n ctx"], Int[Tensor, "n ctx"]]:
        """Tokens and documents of about `n_tokens` held-out tokens in whole contexts, spread evenly over them."""
        found = self.store.contexts("held_out")
        n_contexts = min(len(found.tokens), max(2, -(-n_tokens // self.store.context_length)))
        if n_contexts * self.store.context_length < n_tokens:
            log.info("the store has %d held-out tokens, not %d", n_contexts * self.store.context_length, n_tokens)
        chosen = torch.arange(n_contexts) * len(found.tokens) // n_contexts
        return found.tokens[chosen], found.documents[chosen]

    def _clusters(self, split: str, n_blocks: int) -> Int[Tensor, " n"]:
        n_contexts = n_blocks * self.store.block_rows // self.store.rows_per_context
        documents = self.store.contexts(split).documents[:n_contexts]
        return clusters_of(documents).repeat_interleave(self.store.rows_per_context)


def check(judged: Judged, todo: set[str]) -> None:
    """`ValueError` for a subject that is not there, or labelled texts that cannot be read or halved: now, not after
    minutes of other parts.
    """
    if todo - _WITHOUT_SUBJECT:
        _ = judged.subject
    if "probes" in todo and judged.autoencoder.tells_pre_activations:
        check_tasks(judged.config, judged.shared)


def check_tasks(config: EvalConfig, shared: Shared) -> None:
    """`ValueError` for labelled texts that cannot be read or halved."""
    sizes = SIZES[config.suite]["probes"]
    for task in shared.some_tasks(config.tasks, sizes["n_tasks"]):
        tasks.split(task, n_texts=sizes["n_texts"], seed=config.seed)


def reconstruction_part(judged: Judged) -> Part:
    """Error, L0 and the like on all held-out tokens, and what training measured."""
    found = reconstruction.metrics(judged.held_out, **judged.options) + _training_metrics(judged)
    side_by_side = ("normalized_mse", "normalized_mse_train")
    found.sort(key=lambda metric: metric.name not in side_by_side)
    histogram = reconstruction.density_histogram(judged.held_out.n_fired, judged.held_out.n_tokens)
    facts = {"n_documents_held_out": len(judged.held_out.codes)}
    return Part(found, {"density_log10": histogram, "facts": facts})


def _training_metrics(judged: Judged) -> list[Metric]:
    """dead_fraction as training measured it, and normalized_mse_train on as many training tokens as were held out."""
    autoencoder, store = judged.autoencoder, judged.store
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
    training = judged.tally("train", min(store.n_blocks("held_out"), store.n_blocks("train")))
    return [*metrics, reconstruction.training_metric(training, **judged.options)]


def latents_part(judged: Judged, n_rows: int) -> Part:
    """Where the error lies, which latents are dense, how crowded the decoder is, and what as many PCA directions do."""
    metrics, curves = latents.breakdown(judged.autoencoder, *judged.rows(n_rows), **judged.options)
    metrics += latents.dense_latents(judged.held_out.n_fired, judged.held_out.n_tokens)
    found, cosines = latents.decoder_clustering(judged.autoencoder, **judged.options)
    rows, clusters, _ = judged.rows(n_rows)
    metrics += found + latents.pca_on_activations(judged.autoencoder, judged.pca, rows, clusters, **judged.options)
    facts = {"n_principal_components": len(judged.pca.components)}
    return Part(metrics, {**curves, "largest_cosines": cosines, "facts": facts})


def downstream_part(judged: Judged) -> Part:
    """What the subject loses, beside both ablations; and the compute that a model with that loss would have cost."""
    subject, store, n_tokens = judged.subject, judged.store, judged.config.n_tokens_downstream
    if not subject.has_logits:
        facts = {"n_tokens_downstream": 0, "n_first_positions_left_out": 0}
        return _left_out("downstream numbers", _no_logits(subject))._replace(tables={"facts": facts})
    tokens, documents = judged.contexts(n_tokens)
    patches = list(downstream.patches_of(judged.autoencoder, store.mean).values())
    if full := judged.config.suite != "basic":
        patches.append(latents.pca_patch(judged.autoencoder, judged.pca))
    clusters, first = clusters_of(documents), store.first_position
    sums = downstream.sums_of(subject, store.site, tokens, clusters, patches, first)
    metrics = downstream.metrics_of(sums, **judged.options)
    facts = {"n_tokens_downstream": tokens.numel(), "n_first_positions_left_out": len(tokens) * first}
    tables: dict[str, Any] = {"facts": facts}
    if full:
        found, tables["compute_equivalent"] = _compute_equivalent(judged, sums, metrics)
        names = "delta_ce_pca", "kl_pca"
        metrics += found + downstream.delta_ce_and_kl(sums, len(patches) - 1, names, **judged.options)
    return Part(metrics, tables)


def _compute_equivalent(judged: Judged, sums: Tensor, metrics: list[Metric]) -> tuple[list[Metric], dict[str, Any]]:
    curve = compute_equivalent.read_curve()
    pretraining = curve.subjects.get(judged.store.site.model)
    if pretraining is None:
        log.info("compute_equivalent is left out: the pretraining of %s is not known", judged.store.site.model)
        return [], {}
    found, facts = compute_equivalent.metrics(sums, curve, pretraining, **judged.options)
    value = {metric.name: metric.value for metric in metrics}
    facts["sensitivity"] = compute_equivalent.sensitivity(value["ce_original"], value["delta_ce"], pretraining)
    return found, facts


def refinement_part(judged: Judged, n_rows: int) -> Part:
    """What re-optimising the activations gains, and which way they were off."""
    rows, clusters, _ = judged.rows(n_rows)
    return Part(refinement.metrics(judged.autoencoder, rows, clusters, **judged.options), {})


def progressive_part(judged: Judged, n_rows: int, n_tokens: int) -> Part:
    """Error and loss at other numbers of latents than k, and at a fixed threshold."""
    autoencoder, store = judged.autoencoder, judged.store
    if "k" not in activation_facts(autoencoder.config.activation).uses:
        return _left_out("progressive recovery", f"activation {autoencoder.config.activation} has no k")
    if not autoencoder.tells_pre_activations:
        return _left_out("progressive recovery", "this autoencoder does not tell its pre-activations")
    rows, clusters, _ = judged.rows(n_rows)
    threshold = progressive.matched_threshold(autoencoder, judged.rows(n_rows, "train").rows, autoencoder.config.k)
    metrics = progressive.metrics_on_activations(autoencoder, rows, clusters, threshold, **judged.options)
    left_out = {}
    if not judged.subject.has_logits:
        left_out["progressive losses"] = _no_logits(judged.subject)
    else:
        text = judged.contexts(n_tokens)
        read = judged.subject, autoencoder, store.site, *text, threshold
        metrics += progressive.metrics_downstream(*read, first_position=store.first_position, **judged.options)
    return Part(metrics, {"curve": progressive.curve(metrics), "facts": {"threshold": threshold}}, left_out)


def ablation_part(judged: Judged, n_ablations: int) -> Part:
    """How many logits one latent moves."""
    if not judged.subject.has_logits:
        return _left_out("ablations", _no_logits(judged.subject))
    first, text = judged.store.first_position, judged.contexts(64 * n_ablations)
    if (needed := first + ablation.N_TOKENS) > judged.store.context_length:
        return _left_out(
            "ablations", f"the store's contexts of {judged.store.context_length} tokens are shorter than {needed}"
        )
    read = judged.subject, judged.autoencoder, judged.store.site, *text
    metrics, effects = ablation.metrics(*read, first_position=first, n_ablations=n_ablations, **judged.options)
    return Part(metrics, {"effects": effects})


def probes_part(judged: Judged, n_tasks: int, n_texts: int) -> Part:
    """How well the best single latent answers labelled tasks."""
    if not judged.autoencoder.tells_pre_activations:
        return _left_out("probes", "this autoencoder does not tell its pre-activations")
    read = judged.reading_subject, judged.autoencoder, judged.store.site, judged.tasks(n_tasks)
    metrics, rows = probes.metrics(*read, n_texts=n_texts, pooled=judged.shared.pooled, **judged.options)
    return Part(metrics, {"tasks": rows})


def explainability_part(
    judged: Judged, n_latents: int, n_examples: int, n_tokens_building: int, n_tokens_simulated: int
) -> Part:
    """How well rules read off examples predict latents, and what the subject loses when latents take their values."""
    if not judged.reading_subject.has_logits:
        return _left_out("explanations", _no_logits(judged.reading_subject))
    reader = LatentReader(judged.reading_subject, judged.autoencoder, judged.store.site)
    n_tokens = min(explainability.N_TOKENS, judged.store.n_rows("held_out"))
    if n_tokens < explainability.N_TOKENS:
        log.info("rules are judged on the store's %d held-out tokens, not %d", n_tokens, explainability.N_TOKENS)
    scores, explanations = explainability.metrics(
        reader,
        judged.store,
        n_latents=min(n_latents, reader.n_latents),
        n_top=n_examples,
        n_random=n_examples,
        n_tokens_building=n_tokens_building,
        n_tokens=n_tokens,
        **judged.options,
    )
    whole = LatentReader(judged.subject, judged.autoencoder, judged.store.site)
    simulated = simulation.metrics(whole, explanations, *judged.contexts(n_tokens_simulated), **judged.options)
    return Part(scores.metrics + simulated, {"latents": scores.rows})


def _left_out(what: str, reason: str) -> Part:
    return Part([], {}, {what: reason})


def _no_logits(subject: Subject) -> str:
    return f"{subject.name} is an encoder and predicts no next token"


PARTS: dict[str, Callable[..., Part]] = {
    "reconstruction": reconstruction_part,
    "latents": latents_part,
    "downstream": downstream_part,
    "refinement": refinement_part,
    "progressive": progressive_part,
    "ablation": ablation_part,
    "probes": probes_part,
    "explainability": explainability_part,
}
