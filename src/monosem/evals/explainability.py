"""How well do rules read off a latent's examples predict it, on text that nobody selected?

N2G rules (`monosem.n2g`) of uniformly sampled latents, and two baselines from the same text, are judged at every token
of held-out documents (Gao et al. 2024, section 4.3):

    recall     of the tokens on which the latent fires, the share at which the rule predicts
    precision  of the tokens at which the rule predicts, the share on which the latent fires

Both are counted by latent, then averaged over latents. A rule that never predicts has recall 0 and precision 0 and
stays in the average; the share of such rules is a number beside it, so that the mean over the others can be had. A
latent that never fires on the held-out text has no recall (0/0); the share of such latents is a number too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from monosem import n2g
from monosem.activations import ActivationStore
from monosem.evals.bootstrap import as_metric, bootstrap, ratio, wilson
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.n2g import START, Examples, LatentReader, Rule
from monosem.types import FIRED_THRESHOLD, Metric

QUANTILES = (0.5, 0.9)
"""Of a latent's positive activations on the held-out text: recall and precision are also counted above them."""
N_LATENTS = 64
N_EXAMPLES = 16
N_TOKENS_BUILDING = 1_000_000
N_TOKENS = 100_000

log = logging.getLogger("monosem")

_BASELINE_PROBABILITY = 0.5


class Explanation(NamedTuple):
    """What the building text says of one latent: N2G's rule, and two baselines."""

    examples: Examples
    n2g: Rule
    unigram: Rule
    bigram: Rule


class Scores(NamedTuple):
    """The averages with their intervals, and a row a latent."""

    metrics: list[Metric]
    rows: list[dict[str, Any]]


class Fired(NamedTuple):
    """The tokens on which a latent fires, numbered through the stream, and its activations there."""

    positions: Int[Tensor, " n_fired"]
    values: Float[Tensor, " n_fired"]


class Record:
    """The tokens of a stream and where each latent fires; memory is a number a token and a few a firing."""

    def __init__(self, m: int) -> None:
        self.m, self.n_tokens = m, 0
        self.batches: list[Tensor] = []
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    @staticmethod
    def of(stream: n2g.Stream, m: int) -> Record:
        record = Record(m)
        for _ in record.pass_on(stream):
            pass
        if not record.batches:
            raise ValueError("no text to judge explanations on; give more")
        return record

    def pass_on(self, stream: n2g.Stream) -> n2g.Stream:
        for tokens, activations in stream:
            flat = activations.flatten(0, 1)
            positions, column = (flat > FIRED_THRESHOLD).nonzero(as_tuple=True)
            self.batches.append(tokens)
            self.parts.append((positions + self.n_tokens, column, flat[positions, column]))
            self.n_tokens += tokens.numel()
            yield tokens, activations

    def tokens(self) -> Int[Tensor, "n_contexts ctx"]:
        return torch.cat(self.batches)

    def by_latent(self) -> list[Fired]:
        positions, column, values = (torch.cat(part) for part in zip(*self.parts, strict=True))
        order = column.sort(stable=True).indices
        sizes = column.bincount(minlength=self.m).tolist()
        return [Fired(*one) for one in zip(positions[order].split(sizes), values[order].split(sizes), strict=True)]


def metrics(
    reader: LatentReader,
    store: ActivationStore,
    *,
    n_latents: int = N_LATENTS,
    n_top: int = N_EXAMPLES,
    n_random: int = N_EXAMPLES,
    n_tokens_building: int = N_TOKENS_BUILDING,
    n_tokens: int = N_TOKENS,
    n_resamples: int,
    seed: int,
) -> tuple[Scores, list[Explanation]]:
    """The scores of uniformly sampled latents, and their explanations.

    These are built from the store's training documents (or as many tokens as there are, then the log says so) and
    judged on at least `n_tokens` of its held-out ones; only N2G's own texts run through the subject. `ValueError` when
    the store holds out less, for more latents than there are, or when none of the latents fires.
    """
    if store.n_rows("held_out") < n_tokens:
        raise ValueError(
            f"{n_tokens:,} held-out tokens asked for, {store.path} has {store.n_rows('held_out'):,}; harvest with a "
            "larger n_tokens_held_out or ask for fewer"
        )
    if store.n_rows("train") < n_tokens_building:
        log.info("explanations: the store has %d training tokens, not %d", store.n_rows("train"), n_tokens_building)
    latents = n2g.sample_latents(reader.n_latents, n_latents, seed)
    building = stored(store, "train", n_tokens_building, reader.autoencoder, latents)
    explanations = explain(reader, building, latents, n_top=n_top, n_random=n_random, seed=seed)
    held_out = stored(store, "held_out", n_tokens, reader.autoencoder, latents)
    return score(explanations, held_out, n_resamples=n_resamples, seed=seed), explanations


def stored(
    store: ActivationStore, split: str, n_tokens: int, autoencoder: Autoencoder, latents: Int[Tensor, " m"]
) -> n2g.Stream:
    """The whole blocks with the first `n_tokens` rows of a split, as `LatentReader.stream` gives them.

    Nothing runs through the subject. A text starts where the store's rows do: with a context's second token, unless
    first tokens are kept.
    """
    tokens = store.contexts(split).tokens[:, store.first_position :]
    n_blocks = min(store.n_blocks(split), -(-n_tokens // store.block_rows))
    total = n_blocks * store.block_rows
    for index in progress(range(n_blocks), f"latents {split}", "tok", total=total, each=store.block_rows):
        x, _ = autoencoder.normalize(store.block(split, index).to(autoencoder.weights.pre_bias.device))
        batch = tokens.split(store.config["block_contexts"])[index]
        yield batch, n2g.columns(autoencoder.encode(x), latents).unflatten(0, batch.shape)


def explain(
    reader: LatentReader, stream: n2g.Stream, latents: Int[Tensor, " m"], *, n_top: int, n_random: int, seed: int
) -> list[Explanation]:
    """The explanations of `latents`: N2G from the stream's top and random activating contexts, the baselines from all
    of it. One pass over the stream, and the forwards that N2G asks for."""
    record = Record(len(latents))
    examples = n2g.collect(record.pass_on(stream), latents, n_top=n_top, n_random=n_random, seed=seed)
    tokens, fired = record.tokens(), record.by_latent()
    rules = n2g.build(reader, examples), ngrams(tokens, fired, 1), ngrams(tokens, fired, 2)
    return [Explanation(*one) for one in zip(examples, *rules, strict=True)]


def ngrams(tokens: Int[Tensor, "n_contexts ctx"], fired: Sequence[Fired], n: int) -> list[Rule]:
    """The baseline that looks at the last n tokens alone, for each latent.

    It predicts after those on whose occurrences in the text the latent fires at least half of the time, and then their
    mean activation. Before a text stands START.
    """
    span = int(tokens.max()) + 1 - START
    windows = F.pad(tokens.long(), (n - 1, 0), value=START).unfold(1, n, 1).reshape(-1, n)
    codes = ((windows - START) * span ** torch.arange(n)).sum(1)
    kinds, which, counts = codes.unique(return_inverse=True, return_counts=True)
    rules = []
    for positions, values in fired:
        kind, here = which[positions].unique(return_inverse=True)
        n_fired = torch.zeros(len(kind), dtype=torch.float64).index_add_(0, here, torch.ones_like(values).double())
        total = torch.zeros(len(kind), dtype=torch.float64).index_add_(0, here, values.double())
        kept = n_fired / counts[kind] >= _BASELINE_PROBABILITY
        means = (total / counts[kind])[kept].tolist()
        patterns = kinds[kind[kept], None] // span ** torch.arange(n).flip(0) % span + START
        rules.append({tuple(pattern): mean for pattern, mean in zip(patterns.tolist(), means, strict=True)})
    return rules


def score(explanations: Sequence[Explanation], stream: n2g.Stream, *, n_resamples: int, seed: int) -> Scores:
    """n2g_recall, n2g_precision (also of the baselines, and above quantiles), n2g_density, n2g_never_predicts/_fires.

    Intervals resample latents, the same draws for every number that all latents have. `ValueError` when no latent
    fires.
    """
    record = Record.of(stream, len(explanations))
    tokens = record.tokens()
    rows = [_row(e, tokens, fired) for e, fired in zip(explanations, record.by_latent(), strict=True)]
    names = [name for name in rows[0] if name.startswith(("recall", "precision"))]

    def mean(name: str, unit: str) -> Metric:
        values = torch.tensor([row[name] for row in rows if row[name] is not None], dtype=torch.float64)
        if not len(values):
            raise ValueError(
                f"none of the {len(rows)} latents fires on the {tokens.numel():,} held-out tokens, so they have no "
                "recall; sample more latents or give more text"
            )
        sums = torch.stack([values, torch.ones_like(values)], dim=1)
        interval = bootstrap(sums, ratio(0, 1), n_resamples=n_resamples, seed=seed)
        return as_metric(f"n2g_{name}", interval, unit=unit, n=len(values))

    def share(name: str, count: int) -> Metric:
        return as_metric(f"n2g_{name}", wilson(count, len(rows)), unit="fraction of latents", n=len(rows))

    averages = [mean(name, "fraction of tokens, mean over latents") for name in names]
    averages.append(mean("density", "fraction of tokens, mean over latents"))
    averages.append(share("never_predicts", sum(row["n_predicted"] == 0 for row in rows)))
    averages.append(share("never_fires", sum(row["n_fired"] == 0 for row in rows)))
    return Scores(averages, rows)


def judge(rule: Rule, tokens: Int[Tensor, "n_contexts ctx"], fired: Fired) -> dict[str, float | None]:
    """recall (None where the latent does not fire), precision and density of one rule at every token of a text."""
    fires = torch.zeros(tokens.numel(), dtype=torch.bool)
    fires[fired.positions] = True
    predicts = n2g.predict(rule, tokens).flatten() > FIRED_THRESHOLD
    return {**_counted(fires, predicts, ""), "density": len(fired.positions) / tokens.numel()}


def _row(explanation: Explanation, tokens: Tensor, fired: Fired) -> dict[str, Any]:
    """One latent: its density, and recall and precision of its rules; None for a recall of 0/0."""
    activations = torch.zeros(tokens.numel())
    activations[fired.positions] = fired.values
    predicted = {
        suffix: n2g.predict(getattr(explanation, rule), tokens).flatten()
        for rule, suffix in (("n2g", ""), ("unigram", "_unigram"), ("bigram", "_bigram"))
    }
    found: dict[str, Any] = {
        "latent": explanation.examples.latent,
        "n_tokens": tokens.numel(),
        "n_fired": len(fired.positions),
        "density": len(fired.positions) / tokens.numel(),
        "n_contexts_fired_building": explanation.examples.n_contexts_fired,
        "n_examples": len(explanation.examples.tokens),
        "n_patterns": len(explanation.n2g),
        "n_predicted": int((predicted[""] > FIRED_THRESHOLD).sum()),
    }
    for suffix, prediction in predicted.items():
        found |= _counted(activations > FIRED_THRESHOLD, prediction > FIRED_THRESHOLD, suffix)
    for quantile in QUANTILES:
        threshold = float(fired.values.quantile(quantile)) if len(fired.values) else FIRED_THRESHOLD
        found |= _counted(activations >= threshold, predicted[""] >= threshold, f"_q{100 * quantile:.0f}")
    return found


def _counted(fires: Tensor, predicts: Tensor, suffix: str) -> dict[str, float | None]:
    both, n_fires, n_predicts = int((fires & predicts).sum()), int(fires.sum()), int(predicts.sum())
    return {
        f"recall{suffix}": both / n_fires if n_fires else None,
        f"precision{suffix}": both / n_predicts if n_predicts else 0.0,
    }
