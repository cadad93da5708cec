"""One pass over activations: how often and how strongly each latent fires, and where.

Every latent keeps two bounded sets of contexts. A context is offered to a latent with a priority, and the set holds the
contexts of highest priority:

    top       priority = the latent's largest activation in the context
    sample    priority = a hash of (seed, latent, context), uniform in [0, 1): a uniform sample without replacement of
              all contexts where the latent is active, whatever their order

of equal priorities the earlier context. So both are functions of the text and the seed alone, whatever the blocks, and
each kept context carries the latent's activation on every token. Memory is that of the sets, 28 bytes a slot and 4 to
12 bytes an activation, however long the text.
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
    """Rising, and within a latent the contexts rise."""
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

    def add(self, groups: Groups, n_tokens: int) -> None:
        """Count the activations of a block; `n_tokens` tokens were read for them."""
        self.n_tokens += n_tokens
        if not len(groups.latent):
            return
        values, starts = groups.values, _starts(groups.latent)
        latents, first = groups.latent[starts], groups.start[starts]
        n_active = np.diff(np.r_[first, len(values)])
        self.n_active[latents] += n_active
        self.n_fired[latents] += np.add.reduceat(values > FIRED_THRESHOLD, first, dtype=np.int64)
        power, wide = np.ones(len(values)), values.astype(np.float64)
        for sums in self.powers:
            power *= wide
            sums[latents] += np.add.reduceat(power, first)
        self.largest[latents] = np.maximum(self.largest[latents], np.maximum.reduceat(values, first))
        bins = np.searchsorted(BIN_EDGES, values, side="right") - 1
        np.add.at(self.histogram.reshape(-1), np.repeat(latents, n_active) * (N_BINS + 1) + bins, np.uint32(1))

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
        self.n_kept = np.zeros(n_latents, dtype=np.int64)
        self.lowest = np.full(n_latents, -np.inf)
        """Of the priorities kept, -inf where there is room."""
        self.priority = np.full((n_latents, n_slots), -np.inf)
        self.context = np.full((n_latents, n_slots), -1, dtype=np.int32)
        self.position = np.zeros((n_latents, n_slots), dtype=np.int16)
        self.peak = np.zeros((n_latents, n_slots), dtype=np.float32)
        self.activations = _Ragged(n_latents, n_slots)
        self.context_length = context_length

    def offer(self, groups: Groups, priority: np.ndarray) -> None:
        """Take in the groups whose priority is among the highest of their latent, in place of the lowest.

        Contexts are offered in rising order, block by block: an equal priority of a later one is not among the highest.
        """
        n_slots = self.priority.shape[1]
        worth = np.flatnonzero(priority > self.lowest[groups.latent])
        latent = groups.latent[worth]
        n_then = self.n_kept + np.bincount(latent, minlength=len(self.n_kept))
        crowded = np.flatnonzero(n_then[latent] > n_slots)  # the others' order does not matter, and sorting is slow
        worth[crowded] = worth[crowded[np.lexsort((-priority[worth[crowded]], latent[crowded]))]]
        slot = self.n_kept[latent] + _rank_within(latent)
        fits = slot < n_slots
        self._put(groups, worth[fits], slot[fits], priority)
        np.minimum(n_then, n_slots, out=self.n_kept)
        self._replace(groups, worth[~fits], priority)
        touched = latent[_starts(latent)]
        full = touched[self.n_kept[touched] == n_slots]
        self.lowest[full] = self.priority[full].min(axis=1)

    def _replace(self, groups: Groups, offered: np.ndarray, priority: np.ndarray) -> None:
        """The r-th highest offered takes the slot of the r-th lowest kept, if that is lower; given highest first."""
        latents = groups.latent[offered]
        starts, rank = _starts(latents), _rank_within(latents)
        kept = latents[starts]
        rising = np.lexsort((-self.context[kept], self.priority[kept]), axis=1)  # of equal ones the later goes first
        row = np.repeat(np.arange(len(kept)), np.diff(np.r_[starts, len(latents)]))
        within = rank < rising.shape[1]
        offered, slot = offered[within], rising[row[within], rank[within]]
        higher = priority[offered] > self.priority[groups.latent[offered], slot]
        self._put(groups, offered[higher], slot[higher], priority)

    def _put(self, groups: Groups, chosen: np.ndarray, slot: np.ndarray, priority: np.ndarray) -> None:
        latent = groups.latent[chosen]
        self.priority[latent, slot] = priority[chosen]
        for name in ("context", "position", "peak"):
            getattr(self, name)[latent, slot] = getattr(groups, name)[chosen]
        self.activations.put(latent, slot, groups, chosen)


class _Ragged:
    """The activations of kept contexts, one context after the other; those no longer kept go when there is no room."""

    def __init__(self, n_latents: int, n_slots: int) -> None:
        self.start = np.zeros((n_latents, n_slots), dtype=np.int64)
        self.length = np.zeros((n_latents, n_slots), dtype=np.int16)
        self.n = 0
        self.positions, self.values = np.empty(0, dtype=np.int16), np.empty(0, dtype=np.float16)

    def put(self, latent: np.ndarray, slot: np.ndarray, groups: Groups, chosen: np.ndarray) -> None:
        """The activations of the `chosen` groups, for one slot each."""
        length = groups.length[chosen]
        source = _spans(groups.start[chosen], length)
        if self.n + len(source) > len(self.values):
            self._make_room(len(source))
        end = self.n + len(source)
        self.positions[self.n : end], self.values[self.n : end] = groups.positions[source], groups.values[source]
        self.start[latent, slot], self.length[latent, slot] = self.n + _before(length), length
        self.n = end

    def _make_room(self, n: int) -> None:
        length = self.length[filled := self.length > 0]
        source = _spans(self.start[filled], length)
        size = 2 * (len(source) + n)
        for name in ("positions", "values"):
            old = getattr(self, name)
            new = np.empty(size, dtype=old.dtype)
            new[: len(source)] = old[source]
            setattr(self, name, new)
        self.start[filled], self.n = _before(length), len(source)

    def dense(self, slots: np.ndarray, context_length: int) -> np.ndarray:
        """[N, E, context_length] of the contexts in `slots` [N, E]; 0 where that is -1."""
        found = np.zeros((*slots.shape, context_length), dtype=np.float16)
        latent, example = np.nonzero(slots >= 0)
        slot = slots[latent, example]
        length = self.length[latent, slot]
        source = _spans(self.start[latent, slot], length)
        found[np.repeat(latent, length), np.repeat(example, length), self.positions[source]] = self.values[source]
        return found


def groups_of(latents: np.ndarray, contexts: np.ndarray, positions: np.ndarray, values: np.ndarray) -> Groups:
    """The active (token, latent) pairs of a block, given token by token, grouped by latent and context."""
    numbered = latents.astype(np.int64) << 32 | np.arange(len(latents))
    numbered.sort()  # several times as fast as a stable argsort
    order = numbered & 0xFFFFFFFF
    latents, contexts, positions, values = numbered >> 32, contexts[order], positions[order], values[order]
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
    activations = kept.activations.dense(slots, kept.context_length)
    return {"context": context.astype(np.int32), "position": kept.position[rows, slots], "activations": activations}


def top_slots(kept: Kept, n: int) -> np.ndarray:
    """The `n` slots of highest priority of each latent, the highest first; -1 where there are fewer."""
    slots = np.lexsort((kept.context, -kept.priority), axis=1)[:, :n]
    return np.where(np.take_along_axis(kept.context, slots, axis=1) < 0, -1, slots)


def quantile_slots(kept: Kept, n_bands: int, each: int) -> np.ndarray:
    """`each` slots from each of `n_bands` equal-count bands of peak activation, the weakest band first; -1 for none.

    The slots of a band are those of highest priority, so that they are a uniform sample of the band's contexts.
    """
    filled = kept.context >= 0
    n = filled.sum(axis=1, keepdims=True)
    by_peak = np.lexsort((kept.context, np.where(filled, kept.peak, np.inf)), axis=1)
    rank = np.argsort(by_peak, axis=1, kind="stable")
    band = np.where(filled, rank * n_bands // np.maximum(n, 1), n_bands)
    found = []
    for b in range(n_bands):
        order = np.argsort(np.where(band == b, -kept.priority, np.inf), axis=1, kind="stable")[:, :each]
        found.append(np.where(np.take_along_axis(band, order, axis=1) == b, order, -1))
    return np.concatenate(found, axis=1)


def _rank_within(sorted_keys: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... within each run of equal keys."""
    first = _starts(sorted_keys)
    return np.arange(len(sorted_keys)) - np.repeat(first, np.diff(np.r_[first, len(sorted_keys)]))


def _starts(sorted_keys: np.ndarray) -> np.ndarray:
    """Where each run of equal keys starts."""
    return np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]][: len(sorted_keys)])


def _spans(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0] .. start[0] + length[0] - 1, then the same of the next."""
    return np.repeat(start - _before(length), length) + np.arange(int(length.sum()))


def _before(length: np.ndarray) -> np.ndarray:
    """The sum of the lengths before each."""
    return np.cumsum(length, dtype=np.int64) - length
