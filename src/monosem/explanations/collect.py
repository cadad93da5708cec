"""One pass over activations: how often and how strongly each latent fires, and where.

Every latent keeps two bounded sets of contexts. A context is offered to a latent with a priority, and the set holds the
contexts of highest priority:

    top       priority = the latent's largest activation in the context
    sample    priority = a hash of (seed, latent, context), uniform in [0, 1): a uniform sample without replacement of
              all contexts where the latent is active, whatever their order

so both are functions of the text and the seed alone. Each kept context carries the latent's activation on every token.
Memory is that of the sets, N x slots x context_length x 2 bytes, however long the text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monosem.types import FIRED_THRESHOLD

N_BANDS = 4
"""Of equal counts, into which a latent's contexts are divided by their largest activation."""
N_BINS = 32
BIN_EDGES = np.concatenate([[0.0], np.geomspace(1e-2, 1e3, N_BINS)]).astype(np.float32)
"""Edges of the histograms' bins, equal steps in log activation; the first bin holds all below 0.01."""


class Groups(NamedTuple):
    """The (latent, context) pairs of one block in which the latent is active, and the activations behind each."""

    latent: np.ndarray
    context: np.ndarray
    position: np.ndarray
    """Position, in the context, of the largest activation (the first of equal ones)."""
    peak: np.ndarray
    start: np.ndarray
    """The pair's activations are `values[start : start + length]`, at `positions[start : start + length]`."""
    length: np.ndarray
    positions: np.ndarray
    values: np.ndarray


class Moments:
    """Sums over all tokens seen, by latent."""

    def __init__(self, n_latents: int) -> None:
        self.n_tokens = 0
        self.n_active = np.zeros(n_latents, dtype=np.int64)
        self.n_fired = np.zeros(n_latents, dtype=np.int64)
        self.powers = np.zeros((4, n_latents))
        """Sums of activation, its square, cube and fourth power."""
        self.largest = np.zeros(n_latents, dtype=np.float32)
        self.histogram = np.zeros((n_latents, N_BINS + 1), dtype=np.uint32)
        """The last bin holds what is above the last edge."""

    def add(self, latents: np.ndarray, values: np.ndarray, n_tokens: int) -> None:
        """Count active (token, latent) pairs; `n_tokens` tokens were read for them."""
        n_latents, power = len(self.n_active), np.ones(len(values))
        self.n_tokens += n_tokens
        self.n_active += np.bincount(latents, minlength=n_latents)
        self.n_fired += np.bincount(latents[values > FIRED_THRESHOLD], minlength=n_latents)
        for sums in self.powers:
            power = power * values
            sums += np.bincount(latents, weights=power, minlength=n_latents)
        np.maximum.at(self.largest, latents, values)
        bins = np.searchsorted(BIN_EDGES, values, side="right") - 1
        cells, counts = np.unique(latents.astype(np.int64) * (N_BINS + 1) + bins, return_counts=True)
        self.histogram.reshape(-1)[cells] += counts.astype(np.uint32)

    def columns(self) -> dict[str, tuple[np.ndarray, str]]:
        """name -> (column, meaning). Moments are over the tokens where the latent is active; NaN where it never is."""
        n = np.where(self.n_active, self.n_active, np.nan)
        mean, square, cube, fourth = self.powers / n
        variance = square - mean**2
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(np.where(variance > 1e-12 * square, variance, np.nan))
            skew = (cube - 3 * mean * square + 2 * mean**3) / spread**3
            kurtosis = (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / spread**4
        return {
            "density": ((self.n_fired / self.n_tokens).astype(np.float32), "share of tokens on which the latent fired"),
            "mean": (mean.astype(np.float32), "mean activation where active"),
            "mean_square": (square.astype(np.float32), "mean square of the activation where active"),
            "skew": (skew.astype(np.float32), "skewness of the activation where active"),
            "kurtosis": (kurtosis.astype(np.float32), "kurtosis (3 for a normal) of the activation where active"),
            "max": (self.largest, "largest activation"),
            "histogram": (self.histogram, "tokens a bin of histogram_edges; the last column is above the last edge"),
            "histogram_edges": (BIN_EDGES, "edges of the histogram's bins, in activation"),
        }


class Kept:
    """For each latent, the `n_slots` contexts of highest priority among those offered so far."""

    def __init__(self, n_latents: int, n_slots: int, context_length: int) -> None:
        self.priority = np.full((n_latents, n_slots), -np.inf)
        self.context = np.full((n_latents, n_slots), -1, dtype=np.int32)
        self.position = np.zeros((n_latents, n_slots), dtype=np.int16)
        self.peak = np.zeros((n_latents, n_slots), dtype=np.float32)
        self.activations = np.zeros((n_latents, n_slots, context_length), dtype=np.float16)

    def offer(self, groups: Groups, priority: np.ndarray) -> None:
        """Take in the groups whose priority is among the highest of their latent, in place of the lowest."""
        lowest = self.priority.min(axis=1)
        worth = np.flatnonzero(priority > lowest[groups.latent])
        order = worth[np.lexsort((-priority[worth], groups.latent[worth]))]
        rank = _rank_within(groups.latent[order])
        for r in range(min(int(rank.max(initial=-1)) + 1, self.priority.shape[1])):
            chosen = order[rank == r]  # at most one a latent, so no two of them want the same slot
            latent = groups.latent[chosen]
            slot = self.priority[latent].argmin(axis=1)
            better = priority[chosen] > self.priority[latent, slot]
            self._put(groups, chosen[better], latent[better], slot[better], priority)

    def _put(
        self, groups: Groups, chosen: np.ndarray, latent: np.ndarray, slot: np.ndarray, priority: np.ndarray
    ) -> None:
        self.priority[latent, slot] = priority[chosen]
        for name in ("context", "position", "peak"):
            getattr(self, name)[latent, slot] = getattr(groups, name)[chosen]
        self.activations[latent, slot] = 0
        lengths = groups.length[chosen]
        each = np.repeat(np.arange(len(chosen)), lengths)
        source = groups.start[chosen][each] + np.arange(len(each)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        self.activations[latent[each], slot[each], groups.positions[source]] = groups.values[source]


def groups_of(latents: np.ndarray, contexts: np.ndarray, positions: np.ndarray, values: np.ndarray) -> Groups:
    """The active (token, latent) pairs of a block, grouped by latent and context."""
    order = np.lexsort((positions, contexts, latents))
    latents, contexts, positions, values = (a[order] for a in (latents, contexts, positions, values))
    first = np.flatnonzero(np.r_[True, (latents[1:] != latents[:-1]) | (contexts[1:] != contexts[:-1])][: len(latents)])
    length = np.diff(np.r_[first, len(latents)])
    peak = np.maximum.reduceat(values, first) if len(first) else values[:0]
    at_peak = np.flatnonzero(values == np.repeat(peak, length))
    group = np.repeat(np.arange(len(first)), length)[at_peak]
    earliest = at_peak[np.r_[True, group[1:] != group[:-1]][: len(group)]]
    return Groups(latents[first], contexts[first], positions[earliest], peak, first, length, positions, values)


def sample_priority(latents: np.ndarray, contexts: np.ndarray, seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each pair, by splitmix64's mixing of (seed, latent, context)."""
    with np.errstate(over="ignore"):
        z = latents.astype(np.uint64) << np.uint64(32) | contexts.astype(np.uint64)
        z = z + np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53


def choose(kept: Kept, slots: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of the kept contexts in `slots` [N, E], -1 for none: context, position, activations."""
    rows, empty = np.arange(len(slots))[:, None], slots < 0
    context = np.where(empty, -1, kept.context[rows, slots])
    activations = kept.activations[rows, slots]
    activations[empty] = 0
    return {"context": context.astype(np.int32), "position": kept.position[rows, slots], "activations": activations}


def top_slots(kept: Kept, n: int) -> np.ndarray:
    """The `n` slots of highest priority of each latent, the highest first; -1 where there are fewer."""
    slots = np.argsort(-kept.priority, axis=1, kind="stable")[:, :n]
    return np.where(np.take_along_axis(kept.context, slots, axis=1) < 0, -1, slots)


def quantile_slots(kept: Kept, n_bands: int, each: int) -> np.ndarray:
    """`each` slots from each of `n_bands` equal-count bands of peak activation, the weakest band first; -1 for none.

    The slots of a band are those of highest priority, so that they are a uniform sample of the band's contexts.
    """
    filled = kept.context >= 0
    n = filled.sum(axis=1, keepdims=True)
    by_peak = np.argsort(np.where(filled, kept.peak, np.inf), axis=1, kind="stable")
    rank = np.argsort(by_peak, axis=1, kind="stable")
    band = np.where(filled, rank * n_bands // np.maximum(n, 1), n_bands)
    found = []
    for b in range(n_bands):
        order = np.argsort(np.where(band == b, -kept.priority, np.inf), axis=1, kind="stable")[:, :each]
        found.append(np.where(np.take_along_axis(band, order, axis=1) == b, order, -1))
    return np.concatenate(found, axis=1)


def _rank_within(sorted_keys: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... within each run of equal keys."""
    new = np.r_[True, sorted_keys[1:] != sorted_keys[:-1]][: len(sorted_keys)]
    first = np.flatnonzero(new)
    return np.arange(len(sorted_keys)) - np.repeat(first, np.diff(np.r_[first, len(sorted_keys)]))
