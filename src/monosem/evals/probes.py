"""Is there a latent that answers a question about the text? (Gao et al. 2024, section 4.2: probe loss.)

For each task and each latent i a logistic probe p = σ(w z_i + b) on its pre-activation, pooled over the text, is fitted
by Newton-Raphson on one half of the texts; the latent with the least cross-entropy there is judged on the other half.
Beside it: what the same choice finds in residual channels, in as many random directions, in shuffled labels, and what
all of the activation, the length, the last character and the share of labels alone tell.

`fit` is the definition. `least` finds the least loss of many directions without fitting most of them, and is exact:
with d_i = β (z_i - z̄) the least-squares fit of the labels y, the p_i = ȳ + d_i meet the two conditions that the
logistic optimum meets (Σ p = Σ y, Σ p z = Σ y z), and of all such p in [0, 1] the optimum has the largest entropy.
Hence  loss >= mean H(p_i) = H(ȳ) - mean KL(ȳ + d_i || ȳ) >= H(ȳ) - mean d² · max_i KL(ȳ + d_i || ȳ) / d_i²,  where
KL(ȳ + d || ȳ) / d² is convex in d, so that its maximum is at the smallest or the largest d_i.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosem.corpora import CUT
from monosem.evals import tasks as labelled
from monosem.evals.bootstrap import Interval, as_metric, bootstrap, ratio, wilson
from monosem.evals.tasks import Task
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.tokens import token_ids
from monosem.types import Metric, Site, Weights

log = logging.getLogger("monosem")

POOLINGS = ("mean", "last")
"""Over the tokens of a text. The metrics without a suffix are of the first."""

_TOLERANCE = 1e-9  # nats: half the Newton decrement at which the last step is taken
_MAX_ITERATIONS = 60
_ELEMENTS_AT_ONCE = 1 << 17  # of the fitted matrix: the passes over it then stay in the caches
_DIRECTIONS_AT_ONCE = 4096
_TINY = 1e-4
_RANDOM_DIRECTIONS = 0x70726F6265
_SLACK = 1e-5  # nats, on the bound: above what float32 moments can be wrong by
_TOKENS_AT_ONCE = 1 << 11
_KEPT_BYTES = 1 << 30  # of pooled activations, for the next autoencoder
_RIDGES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
_INNER_FOLDS = 5

Directions = tuple[Float[Tensor, "n_directions d_model"], Float[Tensor, " n_directions"]]
"""What is probed: x @ matrix.T + offset."""


class Fit(NamedTuple):
    """One probe a row: p = σ(weight · value + bias)."""

    weight: Float[Tensor, " n_rows"]
    bias: Float[Tensor, " n_rows"]
    loss: Float[Tensor, " n_rows"]
    """Mean cross-entropy in nats on the texts fitted, without the penalty."""
    separable: Bool[Tensor, " n_rows"]
    converged: Bool[Tensor, " n_rows"]


class Moments(NamedTuple):
    """What the bound needs to know of each row of values: mean, standard deviation, and its ends in deviations."""

    mean: Float[Tensor, " n_rows"]
    std: Float[Tensor, " n_rows"]
    low: Float[Tensor, " n_rows"]
    high: Float[Tensor, " n_rows"]


class Pooled(NamedTuple):
    """Activations of texts in the autoencoder's input space, by pooling, and how many texts were cut."""

    by_pooling: dict[str, Float[Tensor, "n_texts d_model"]]
    n_cut: int


def metrics(
    subject: Subject,
    autoencoder: Autoencoder,
    site: Site,
    tasks: list[Task],
    *,
    n_resamples: int,
    seed: int,
    n_texts: int = 2000,
    max_tokens: int = 128,
    n_shuffles: int = 20,
    pooled: dict[tuple[Any, ...], Pooled] | None = None,
) -> tuple[list[Metric], list[dict[str, Any]]]:
    """The mean of each number over tasks, and the table behind it: a row a task and pooling (docs/probes.md).

    Of each task `n_texts` are used (or all), half to fit and choose, half to judge; of each text the last `max_tokens`
    tokens. `pooled` keeps what was read, for the next autoencoder of the same site. Intervals of the means resample
    tasks, those in the table resample groups of texts. `ValueError` when a task cannot be halved or a number is not
    finite.
    """
    halves = [labelled.split(task, n_texts=n_texts, seed=seed) for task in tasks]  # all refusals before any work
    options = {"n_resamples": n_resamples, "seed": seed}
    rows, kept = [], {} if pooled is None else pooled
    for task, (train, held_out) in progress(list(zip(tasks, halves, strict=True)), "probe", "task", total=len(tasks)):
        texts = [task.texts[i] for i in train + held_out]
        key = subject, site, max_tokens, None if type(autoencoder) is Autoencoder else autoencoder, *texts
        if key not in kept:
            if 8 * len(kept) * len(texts) * autoencoder.config.d_model > _KEPT_BYTES:
                kept.clear()
            kept[key] = pool(subject, autoencoder, site, texts, max_tokens=max_tokens)
        for pooling, x in kept[key].by_pooling.items():
            found = probe(autoencoder, x[: len(train)], x[len(train) :], task, train, held_out, n_shuffles, options)
            rows.append({"task": task.name, "pooling": pooling, "n_cut": kept[key].n_cut, **found})
    return summary(rows, **options), rows


def summary(rows: list[dict[str, Any]], *, n_resamples: int, seed: int) -> list[Metric]:
    """The means over tasks of the table's columns; names end in `_last` where that is the pooling."""
    found = []
    for pooling in POOLINGS:
        own = [row for row in rows if row["pooling"] == pooling]
        suffix = "" if pooling == POOLINGS[0] else f"_{pooling}"
        for column, unit in _COLUMNS.items():
            if suffix and column in _WITHOUT_POOLING:
                continue
            values = torch.tensor([[row[column], 1.0] for row in own], dtype=torch.float64)
            interval = bootstrap(values, ratio(0, 1), n_resamples=n_resamples, seed=seed)
            if len(own) == 1:  # one task says nothing of others; its own interval, over texts, is all there is
                interval = Interval(interval.value, own[0][f"{column}_low"], own[0][f"{column}_high"])
            found.append(as_metric(f"{column}{suffix}", interval, unit=unit, n=len(own)))
        n_probes, failed = (sum(row[column] for row in own) for column in ("n_probes", "n_not_converged"))
        share = wilson(failed, n_probes)
        found.append(as_metric(f"probe_not_converged{suffix}", share, unit="fraction of probes", n=n_probes))
    return found


@torch.no_grad()
def pool(subject: Subject, autoencoder: Autoencoder, site: Site, texts: list[str], *, max_tokens: int) -> Pooled:
    """The normalised activations at `site` of each text: their mean over its tokens, and that of its last token.

    A text is read alone behind `subject.prefix_token`, where the attention sink then is, and which is left out. Of a
    longer text the last `max_tokens` tokens are read (fewer if the subject reads fewer; of a very long one no more than
    the last `CUT` characters are looked at). Texts of equal length are read together, so nothing is padded.
    """
    at_most = min(max_tokens, subject.max_context - 1)
    ids = token_ids(subject.tokenizer, (text[-CUT:] for text in texts))
    if empty := [text for text, found in zip(texts, ids, strict=True) if not found]:
        raise ValueError(f"{empty[0]!r} has no token in the tokenizer of {subject.name}; leave such texts out")
    lengths: dict[int, list[int]] = {}
    for i, found in enumerate(ids):
        lengths.setdefault(min(len(found), at_most), []).append(i)
    batches = [
        batch
        for length, members in sorted(lengths.items())
        for batch in torch.tensor(members).split(max(1, _TOKENS_AT_ONCE // (length + 1)))
    ]
    means, lasts = torch.empty(2, len(texts), autoencoder.config.d_model)
    for batch in batches:
        tokens = torch.tensor([[subject.prefix_token, *ids[i][-at_most:]] for i in batch.tolist()])
        x, _ = autoencoder.normalize(subject.capture(tokens, site)[:, 1:])
        means[batch], lasts[batch] = x.mean(1).cpu(), x[:, -1].cpu()
    n_cut = sum(len(found) > at_most for found in ids)
    return Pooled({"mean": means, "last": lasts}, n_cut)


@torch.no_grad()
def probe(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n_train d_model"],
    x_held_out: Float[Tensor, "n_held_out d_model"],
    task: Task,
    train: list[int],
    held_out: list[int],
    n_shuffles: int,
    options: dict[str, int],
) -> dict[str, Any]:
    """A row of the table: the chosen latent, its numbers on the held-out half, and the baselines', with intervals."""
    labels = torch.tensor(task.labels)
    y, y_held_out = labels[train].bool(), labels[held_out].bool()
    groups = torch.tensor(task.groups)
    judge = _Judge(y_held_out, groups[held_out], options)
    latents = _latents(autoencoder)
    fits, moments = fit_all(latents, x, y)
    best = int(fits.loss.argmin())
    one = _refined(latents, best, x, y)
    logits = _logits(one, latents, best, x_held_out)
    random = random_directions(*latents[0].shape, seed=options["seed"])
    channels = (torch.eye(x.shape[1]), torch.zeros(x.shape[1]))
    nulls = shuffled(latents, x, y, moments, n_shuffles=n_shuffles, seed=options["seed"])
    row: dict[str, Any] = {
        "n_train": len(train),
        "n_held_out": len(held_out),
        "latent": best,
        "weight": float(one.weight[0]),
        "bias": float(one.bias[0]),
        "n_probes": len(fits.loss),
        "n_not_converged": int((~fits.converged).sum()),
        "n_separable": int(fits.separable.sum()),
    }
    losses = {
        "probe_loss": logits,
        "probe_loss_channels": best_logits(channels, x, y, x_held_out),
        "probe_loss_random_directions": best_logits(random, x, y, x_held_out),
        "probe_loss_dense": dense_logits(x, y, groups[train], x_held_out),
        "probe_loss_length": _length_logits(task, train, held_out, y),
        "probe_loss_last_character": _last_character_logits(task, train, held_out),
        "probe_loss_constant": torch.full((len(held_out),), _logit(y), dtype=torch.float64),
    }
    found = {name: judge.loss(values) for name, values in losses.items()}
    found["probe_accuracy"], found["probe_auc"] = judge.accuracy(logits), judge.auc(logits)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    chosen_on = _Judge(y, groups[train], options)
    found["probe_loss_train"] = chosen_on.loss(_logits(one, latents, best, x))
    found["probe_loss_null"] = Interval(float(nulls.mean()), *torch.quantile(nulls, tails).tolist())
    bias = _entropy(y) - nulls
    found["probe_selection_bias"] = Interval(float(bias.mean()), *torch.quantile(bias, tails).tolist())
    for name in _COLUMNS:
        row |= {name: found[name].value, f"{name}_low": found[name].low, f"{name}_high": found[name].high}
    return row


_COLUMNS = {
    "probe_loss": "nats per text",
    "probe_accuracy": "fraction of texts",
    "probe_auc": "probability",
    "probe_loss_train": "nats per text",
    "probe_loss_null": "nats per text",
    "probe_selection_bias": "nats per text",
    "probe_loss_channels": "nats per text",
    "probe_loss_random_directions": "nats per text",
    "probe_loss_dense": "nats per text",
    "probe_loss_length": "nats per text",
    "probe_loss_last_character": "nats per text",
    "probe_loss_constant": "nats per text",
}
"""The numbers of the table, each with `_low` and `_high`, and their units."""
_WITHOUT_POOLING = ("probe_loss_length", "probe_loss_last_character", "probe_loss_constant")


@torch.no_grad()
def best_latents(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n_train d_model"],
    x_held_out: Float[Tensor, "n_held_out d_model"],
    task: Task,
    halves: tuple[list[int], list[int]],
    *,
    n: int,
    n_shuffles: int,
    options: dict[str, int],
) -> tuple[list[dict[str, Any]], Float[Tensor, " n_shuffles"]]:
    """The `n` latents of least loss on the first half, with loss, accuracy and AUC on the other; and what is chance.

    That is the least loss on the first half among all latents, for each of `n_shuffles` shuffles of its labels.
    """
    labels, groups = torch.tensor(task.labels).bool(), torch.tensor(task.groups)
    train, held_out = halves
    y, judge = labels[train], _Judge(labels[held_out], groups[held_out], options)
    latents = _latents(autoencoder)
    fits, moments = fit_all(latents, x, y)
    found = []
    for latent in fits.loss.argsort(stable=True)[:n].tolist():
        one = _refined(latents, latent, x, y)
        logits = _logits(one, latents, latent, x_held_out)
        row = {"latent": latent, "weight": float(one.weight[0]), "loss_train": float(one.loss[0])}
        for name, interval in (
            ("loss", judge.loss(logits)),
            ("accuracy", judge.accuracy(logits)),
            ("auc", judge.auc(logits)),
        ):
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        found.append(row)
    return found, shuffled(latents, x, y, moments, n_shuffles=n_shuffles, seed=options["seed"])


class OfEach(NamedTuple):
    """What the probe of each latent tells."""

    gain: Float[Tensor, " n_latents"]
    """Entropy of the labels less the probe's loss, on the texts fitted, nats."""
    loss: Float[Tensor, " n_latents"]
    """Cross-entropy on the held-out texts, nats."""
    auc: Float[Tensor, " n_latents"]
    """On the held-out texts, ties counting half."""


@torch.no_grad()
def of_each(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n_train d_model"],
    labels: Bool[Tensor, " n_train"],
    x_held_out: Float[Tensor, "n_held_out d_model"],
    labels_held_out: Bool[Tensor, " n_held_out"],
) -> OfEach:
    """The probe of every latent, fitted on one half of the texts and judged on the other, without intervals."""
    latents = _latents(autoencoder)
    fits, _ = fit_all(latents, x, labels)
    losses, aucs = [], []
    n_ones = int(labels_held_out.sum())
    n_pairs = n_ones * (len(labels_held_out) - n_ones)
    rows = torch.arange(len(fits.loss)).split(_DIRECTIONS_AT_ONCE)
    for values, at in zip(_values(latents, x_held_out), rows, strict=True):
        weight, bias = fits.weight[at, None].to(values), fits.bias[at, None].to(values)
        losses.append(_cross_entropy(weight * values + bias, labels_held_out).mean(1))
        ranked = (values * weight.sign()).contiguous()
        rising = ranked.sort(dim=1).values
        below, up_to = (torch.searchsorted(rising, ranked, right=right) for right in (False, True))
        ranks = (below + up_to + 1)[:, labels_held_out].double().sum(1) / 2
        aucs.append((ranks - n_ones * (n_ones + 1) / 2) / n_pairs)
    return OfEach((_entropy(labels) - fits.loss).float(), torch.cat(losses).float(), torch.cat(aucs).float())


def fit(values: Float[Tensor, "n_rows n_texts"], labels: Bool[Tensor, " n_texts"]) -> Fit:
    """The logistic probe of each row of values, by Newton-Raphson with step halving, in the dtype of the values.

    Minimises mean(-y ln p - (1 - y) ln(1 - p)). Where the labels are separable by the value the optimum is at infinity:
    there, and only there, w² std² / (2 n_texts) is added, a unit normal prior on the weight per standard deviation. A
    row without variance gets weight 0. Scaling or shifting a row changes no loss.
    """
    order = torch.argsort(labels.long(), stable=True)  # label 0 first, so that each class is a block of columns
    blocks = values.split(max(1, _ELEMENTS_AT_ONCE // len(labels)))
    return _joined(Fit, (_fit_block(block[:, order], int((~labels).sum()))[0] for block in blocks))


def fit_all(
    directions: Directions, x: Float[Tensor, "n_texts d_model"], labels: Bool[Tensor, " n_texts"]
) -> tuple[Fit, Moments]:
    """`fit` of every direction, a block at a time, with the moments that `least` wants for other labels."""
    x = x[torch.argsort(labels.long(), stable=True)]
    at_once, n_zeros = max(1, _ELEMENTS_AT_ONCE // len(labels)), int((~labels).sum())
    found = [_fit_block(block, n_zeros) for values in _values(directions, x) for block in values.split(at_once)]
    fits, moments = zip(*found, strict=True)
    return _joined(Fit, fits), _joined(Moments, moments)


def moments_of(directions: Directions, x: Float[Tensor, "n_texts d_model"]) -> Moments:
    """See `Moments`; the std is biased, and the ends are 0 where it is 0."""

    def block(values: Tensor) -> Moments:
        z, mean, std = _standardised(values)
        return Moments(mean, std, *z.aminmax(dim=1))

    at_once = max(1, _ELEMENTS_AT_ONCE // len(x))
    return _joined(Moments, (block(part) for values in _values(directions, x) for part in values.split(at_once)))


def least(
    directions: Directions, x: Float[Tensor, "n_texts d_model"], labels: Bool[Tensor, " n_texts"], moments: Moments
) -> tuple[int, float]:
    """The direction with the least loss and that loss: the minimum of `fit_all`, from few fits (see the module)."""
    matrix, offset = directions
    bound = lower_bound(matrix, x, labels, moments)
    best, loss = -1, math.inf
    for rows in bound.argsort().split(max(1, _ELEMENTS_AT_ONCE // len(labels))):
        if float(bound[rows[0]]) > loss:
            break
        found = fit(torch.addmm(offset[rows, None], matrix[rows], x.T), labels).loss
        if float(found.min()) < loss:
            loss, best = float(found.min()), int(rows[found.argmin()])
    return best, loss


def lower_bound(
    matrix: Float[Tensor, "n_rows d_model"],
    x: Float[Tensor, "n_texts d_model"],
    labels: Bool[Tensor, " n_texts"],
    moments: Moments,
) -> Float[Tensor, " n_rows"]:
    """What the loss of each row cannot be below (see the module), in float64; 0 where a p_i leaves [0, 1]."""
    share = float(labels.double().mean())
    residual = (labels.double() - share) / len(labels)
    covariance = (matrix @ (x.double().T @ residual).to(matrix)).double()
    varies = _varies(moments.std, moments.mean)
    slope = torch.where(varies, covariance / moments.std, 0.0)  # of d on the standardised value: std(d), signed
    ends = torch.stack([slope * moments.low, slope * moments.high])
    low, high = ends.amin(0).clamp(max=-_TINY), ends.amax(0).clamp(min=_TINY)
    inside = (share + low >= 0) & (share + high <= 1)
    steepest = torch.maximum(*(_kl(d.where(inside, d.sign() * _TINY), share) / d.square() for d in (low, high)))
    return torch.where(inside, _entropy(labels) - slope.square() * steepest - _SLACK, 0.0)


def random_directions(n: int, d_model: int, *, seed: int) -> Directions:
    """Normal, so uniform in direction (a probe does not see length)."""
    # An autoencoder starts from torch.randn of its own seed: the same numbers, if that seed were used here too.
    generator = torch.Generator().manual_seed(seed + _RANDOM_DIRECTIONS)
    return torch.randn(n, d_model, generator=generator), torch.zeros(n)


def shuffled(
    directions: Directions,
    x: Float[Tensor, "n_texts d_model"],
    labels: Bool[Tensor, " n_texts"],
    moments: Moments,
    *,
    n_shuffles: int,
    seed: int,
) -> Float[Tensor, " n_shuffles"]:
    """The least loss over all directions when the labels are shuffled: what choosing the best finds in nothing."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(n_shuffles)]
    return torch.tensor([least(directions, x, labels[order], moments)[1] for order in orders], dtype=torch.float64)


def dense_logits(
    x: Float[Tensor, "n_train d_model"],
    labels: Bool[Tensor, " n_train"],
    groups: Int[Tensor, " n_train"],
    x_held_out: Float[Tensor, "n_held_out d_model"],
) -> Float[Tensor, " n_held_out"]:
    """The logits of a logistic probe on the whole activation, its columns standardised, ridge/2 · ||w||² in the mean.

    The ridge is the one of `_RIDGES` with the least loss on a fifth of the groups, left out of a first fit; then all
    are fitted. Works in the span of the training texts, where the optimum lies.
    """
    x, x_held_out = x.double(), x_held_out.double()
    mean, std = x.mean(0), x.std(0)
    scale = torch.where(_varies(std, mean), std, torch.inf)
    u, s, v = torch.linalg.svd((x - mean) / scale, full_matrices=False)
    basis = u * s
    aside = torch.unique(groups, return_inverse=True)[1] % _INNER_FOLDS == 0
    losses, weights = [], None
    for ridge in _RIDGES:  # from the strongest on, each from the last one's weights
        weights = _ridge_newton(basis[~aside], labels[~aside], ridge, weights)
        losses.append(float(_cross_entropy(_affine(basis[aside], weights), labels[aside]).mean()))
    ridge = _RIDGES[losses.index(min(losses))]
    return _affine((x_held_out - mean) / scale @ v.T, _ridge_newton(basis, labels, ridge, None))


class _Judge:
    """Means over texts, with intervals that resample groups of texts."""

    def __init__(self, labels: Tensor, groups: Tensor, options: dict[str, int]) -> None:
        self.labels, self.options = labels.cpu(), options
        self.groups = torch.unique(groups, return_inverse=True)[1].cpu()
        self.n_groups = int(self.groups.max()) + 1

    def loss(self, logits: Tensor) -> Interval:
        return self._mean(_cross_entropy(logits.cpu(), self.labels))

    def accuracy(self, logits: Tensor) -> Interval:
        return self._mean(((logits.cpu() > 0) == self.labels).double())

    def auc(self, logits: Tensor) -> Interval:
        """The probability that a text of label 1 has a larger logit than one of label 0, ties counting half."""
        _, ranks = torch.unique(logits.cpu(), return_inverse=True)
        texts = torch.zeros(self.n_groups, 2, int(ranks.max()) + 1, dtype=torch.float64)
        texts.index_put_((self.groups, self.labels.long(), ranks), torch.ones((), dtype=torch.float64), accumulate=True)

        def statistic(totals: Tensor) -> Tensor:
            zeros, ones = totals.unflatten(-1, (2, -1)).unbind(-2)
            wins = (ones * (zeros.cumsum(-1) - zeros / 2)).sum(-1)
            return wins / (zeros.sum(-1) * ones.sum(-1)).clamp(min=1)

        return bootstrap(texts.flatten(1), statistic, **self.options)

    def _mean(self, values: Tensor) -> Interval:
        sums = torch.zeros(self.n_groups, 2, dtype=torch.float64)
        sums.index_add_(0, self.groups, torch.stack([values, torch.ones_like(values)], dim=1))
        return bootstrap(sums, ratio(0, 1), **self.options)


class _Derivatives(NamedTuple):
    """Of the mean loss by (w, b), a row a probe, in float64."""

    loss: Tensor
    rounding: Tensor
    """What the loss may be wrong by."""
    w: Tensor
    b: Tensor
    ww: Tensor
    wb: Tensor
    bb: Tensor


def _fit_block(values: Tensor, n_zeros: int) -> tuple[Fit, Moments]:
    """`fit` of a few rows, the texts of label 0 first, and their moments.

    A step is taken when it lowers the loss enough (Armijo), else halved; a row leaves the block when it has converged.
    """
    n_texts = values.shape[1]
    assert 0 < n_zeros < n_texts, "both labels are needed"
    z, mean, std = _standardised(values)
    varies = _varies(std, mean)
    (low_0, high_0), (low_1, high_1) = (part.aminmax(dim=1) for part in (z[:, :n_zeros], z[:, n_zeros:]))
    moments = Moments(mean, std, torch.minimum(low_0, low_1), torch.maximum(high_0, high_1))
    separable = varies & ((high_0 <= low_1) | (high_1 <= low_0))
    ridge = separable.double() / n_texts
    share = 1 - n_zeros / n_texts
    mean_1 = _row_means(z[:, n_zeros:])

    theta = torch.zeros(len(values), 2, dtype=torch.float64, device=values.device)
    theta[:, 1] = math.log(share / (1 - share))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    loss, slope = torch.full_like(mean_1, entropy), torch.zeros_like(mean_1)
    step = theta - _discriminant(mean_1, share)
    done_theta, done_loss, converged = theta.clone(), loss.clone(), torch.zeros_like(varies)
    rows = torch.arange(len(values), device=values.device)
    for _ in range(_MAX_ITERATIONS):
        candidate = theta - step
        found = _derivatives(z, candidate, share, mean_1, ridge)
        taken = found.loss <= loss - 1e-4 * slope + found.rounding
        newton = _newton_step(found)
        theta = torch.where(taken[:, None], candidate, theta)
        loss = torch.where(taken, found.loss, loss)
        step = torch.where(taken[:, None], newton, step / 2)
        slope = torch.where(taken, found.w * newton[:, 0] + found.b * newton[:, 1], slope / 2)
        finished = taken & (slope < 2 * _TOLERANCE)
        done_theta[rows] = theta - torch.where(finished[:, None], step, 0.0)
        done_loss[rows] = loss - torch.where(finished, slope / 2, 0.0)
        converged[rows[finished]] = True
        if finished.all():
            break
        if finished.any():
            left = ~finished
            rows, z, theta, loss, step, slope = (t[left] for t in (rows, z, theta, loss, step, slope))
            mean_1, ridge = mean_1[left], ridge[left]
    penalty = separable.double() / n_texts * done_theta[:, 0].square() / 2
    weight = torch.where(varies, done_theta[:, 0] / std, 0.0)
    return Fit(weight, done_theta[:, 1] - weight * mean, done_loss - penalty, separable, converged), moments


def _standardised(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values - mean) / std by row, or 0 where a row does not vary; with the mean and the biased std."""
    mean = values.mean(1)
    z = values - mean[:, None]
    std = (torch.linalg.vecdot(z, z) / z.shape[1]).sqrt()
    return z.div_(torch.where(_varies(std, mean), std, torch.inf)[:, None]), mean, std


def _row_means(values: Tensor) -> Tensor:
    """In float64; the product with ones is several times as fast as a sum along rows."""
    return torch.mv(values, torch.ones_like(values[0])).double() / values.shape[1]


def _joined(kind: Any, parts: Iterable[Any]) -> Any:
    return kind(*map(torch.cat, zip(*parts, strict=True)))


def _discriminant(mean_1: Tensor, share: float) -> Tensor:
    """(w, b) of Fisher's linear discriminant of standardised values: where Newton starts, 1 to 3 steps from the end."""
    mean_0 = -mean_1 * share / (1 - share)
    within = (1 - share * (1 - share) * (mean_1 - mean_0).square()).clamp(min=0.05)
    w = (mean_1 - mean_0) / within
    return torch.stack([w, math.log(share / (1 - share)) - w * (mean_0 + mean_1) / 2], dim=1)


def _derivatives(z: Tensor, theta: Tensor, share: float, mean_1: Tensor, ridge: Tensor) -> _Derivatives:
    """At (w, b) = theta; with s = Σ_y z / n the mean loss is mean ln(1 + e^t) - w s - b ȳ, t = w z + b."""
    n_texts = z.shape[1]
    w, b = theta.unbind(1)
    t = torch.addcmul(b.to(z)[:, None], z, w.to(z)[:, None])
    p = torch.sigmoid(t)
    partition = _row_means(torch.nn.functional.softplus(t))
    q = torch.addcmul(p, p, p, value=-1)
    qz = q * z
    s = share * mean_1
    vecdot = torch.linalg.vecdot
    linear = w * s + b * share
    return _Derivatives(
        loss=partition - linear + ridge * w.square() / 2,
        rounding=8 * torch.finfo(z.dtype).eps * (partition + linear.abs()),
        w=vecdot(p, z).double() / n_texts - s + ridge * w,
        b=_row_means(p) - share,
        ww=vecdot(qz, z).double() / n_texts + ridge,
        wb=_row_means(qz),
        bb=_row_means(q),
    )


def _newton_step(at: _Derivatives) -> Tensor:
    """H⁻¹ g, row by row; H is kept from being singular (a row without variance has ww = wb = 0)."""
    ww, bb = at.ww + 1e-12, at.bb + 1e-12
    determinant = (ww * bb - at.wb.square()).clamp(min=1e-24)
    return torch.stack([bb * at.w - at.wb * at.b, ww * at.b - at.wb * at.w], dim=1) / determinant[:, None]


def _ridge_newton(x: Tensor, labels: Tensor, ridge: float, start: Tensor | None) -> Tensor:
    """(weights, bias) that minimise the mean cross-entropy + ridge/2 · ||weights||²: Newton with step halving."""
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    y, penalty = labels.double(), torch.full_like(x[0], ridge)
    penalty[-1] = 0.0
    theta = torch.zeros_like(x[0]) if start is None else start

    def objective(theta: Tensor) -> Tensor:
        return _cross_entropy(x @ theta, labels).mean() + (penalty * theta.square()).sum() / 2

    for _ in range(_MAX_ITERATIONS):
        p = torch.sigmoid(x @ theta)
        gradient = x.T @ (p - y) / len(y) + penalty * theta
        hessian = (x.T * (p * (1 - p) / len(y))) @ x + torch.diag(penalty + 1e-10)
        step = torch.linalg.solve(hessian, gradient)
        slope, size, before = float(gradient @ step), 1.0, objective(theta)
        while objective(theta - size * step) > before - 1e-4 * size * slope + 1e-12 and size > 1e-6:
            size /= 2
        theta = theta - size * step
        if slope < 2 * _TOLERANCE:
            break
    return theta


def _latents(autoencoder: Autoencoder) -> Directions:
    """The pre-activations as a product with x: encoder (x - pre_bias) + latent_bias."""
    weights = Weights(*(w.detach().cpu().float() for w in autoencoder.weights))
    return weights.encoder, weights.latent_bias - weights.encoder @ weights.pre_bias


def _values(directions: Directions, x: Tensor) -> Iterator[Float[Tensor, "n_rows n_texts"]]:
    for matrix, offset in zip(*(part.split(_DIRECTIONS_AT_ONCE) for part in directions), strict=True):
        yield torch.addmm(offset[:, None], matrix, x.T)


def best_logits(directions: Directions, x: Tensor, labels: Tensor, x_held_out: Tensor) -> Tensor:
    """The held-out logits of the direction with the least training loss."""
    best, _ = least(directions, x, labels, moments_of(directions, x))
    return _logits(_refined(directions, best, x, labels), directions, best, x_held_out)


def _refined(directions: Directions, row: int, x: Tensor, labels: Tensor) -> Fit:
    """The probe of one direction again, in float64."""
    return fit(_value(directions, row, x)[None], labels)


def _logits(one: Fit, directions: Directions, row: int, x: Tensor) -> Tensor:
    return one.weight * _value(directions, row, x) + one.bias


def _value(directions: Directions, row: int, x: Tensor) -> Tensor:
    return x.double() @ directions[0][row].double() + directions[1][row].double()


def _length_logits(task: Task, train: list[int], held_out: list[int], labels: Tensor) -> Tensor:
    """Of a probe on the logarithm of the number of characters."""
    lengths = torch.tensor([[math.log(len(task.texts[i]))] for i in train + held_out], dtype=torch.float64)
    line = (torch.ones(1, 1), torch.zeros(1))
    return _logits(_refined(line, 0, lengths[: len(train)], labels.cpu()), line, 0, lengths[len(train) :])


def _last_character_logits(task: Task, train: list[int], held_out: list[int]) -> Tensor:
    """Of the share of label 1 among the texts with the same last character, one text at the overall share added."""
    share = sum(task.labels[i] for i in train) / len(train)
    n = Counter(task.texts[i][-1] for i in train)
    n_ones = Counter(task.texts[i][-1] for i in train if task.labels[i])
    last = [task.texts[i][-1] for i in held_out]
    return torch.tensor([(n_ones[c] + share) / (n[c] + 1) for c in last], dtype=torch.float64).logit()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.softplus(torch.where(labels, -logits, logits))


def _affine(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]


def _kl(d: Tensor, share: float) -> Tensor:
    """KL(share + d || share) of two coins, in nats."""
    p = share + d
    return torch.xlogy(p, p / share) + torch.xlogy(1 - p, (1 - p) / (1 - share))


def _entropy(labels: Tensor) -> float:
    share = float(labels.double().mean())
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


def _logit(labels: Tensor) -> float:
    share = float(labels.double().mean())
    return math.log(share / (1 - share))


def _varies(std: Tensor, mean: Tensor) -> Tensor:
    """Whether a deviation is more than the rounding of the values."""
    return std > 16 * torch.finfo(std.dtype).eps * mean.abs()
