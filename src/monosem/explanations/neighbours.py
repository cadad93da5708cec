"""Which latents are alike: by the direction they write, and by the tokens they fire on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24


class Neighbours(NamedTuple):
    """The nearest latents of each latent, nearest first; -1 where there are fewer."""

    latents: np.ndarray
    score: np.ndarray


def by_decoder(decoder: Float[Tensor, "n_latents d_model"], n: int) -> Neighbours:
    """The `n` other latents with the largest cosine between decoder directions."""
    unit = decoder / decoder.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = min(n, len(unit) - 1)
    found = []
    for rows in torch.arange(len(unit)).split(max(1, _CHUNK_ELEMENTS // len(unit))):
        cosine = unit[rows] @ unit.T
        cosine[torch.arange(len(rows)), rows] = -torch.inf
        found.append(cosine.topk(n, dim=1))
    index = torch.cat([f.indices for f in found]).int().numpy()
    return Neighbours(index, torch.cat([f.values for f in found]).float().numpy())


def by_coactivation(
    tokens: np.ndarray, latents: np.ndarray, n_latents: int, n: int, *, min_count: int = 5
) -> Neighbours:
    """The `n` other latents with the largest Jaccard index of the tokens they are active on.

    |tokens with both| / |tokens with either|, over the active (token, latent) pairs given, sorted by token. Pairs of
    latents that meet on fewer than `min_count` tokens are left out: their index is noise.
    """
    n = min(n, n_latents - 1)
    index, score = np.full((n_latents, n), -1, np.int32), np.zeros((n_latents, n), np.float32)
    n_active = np.bincount(latents, minlength=n_latents)
    bounds = np.searchsorted(tokens, np.arange(int(tokens.max(initial=-1)) + 2))
    begin, lengths = bounds[tokens], np.diff(bounds)[tokens]
    order = np.argsort(latents, kind="stable")
    starts = np.searchsorted(latents[order], np.arange(n_latents + 1))
    met = np.concatenate([[0], np.cumsum(lengths[order])])[starts]  # (latent, partner) meetings before each latent
    for low, high in _ranges(met):
        mine = order[starts[low] : starts[high]]
        own = np.repeat(latents[mine].astype(np.int64), lengths[mine])
        partner = latents[np.repeat(begin[mine] - _before(lengths[mine]), lengths[mine]) + np.arange(len(own))]
        cells, both = np.unique(own * n_latents + partner, return_counts=True)
        own, partner = np.divmod(cells, n_latents)
        kept = (both >= min_count) & (own != partner)
        own, partner, both = own[kept], partner[kept], both[kept]
        jaccard = both / (n_active[own] + n_active[partner] - both)
        best = np.lexsort((-jaccard, own))
        own, partner, jaccard = own[best], partner[best], jaccard[best]
        rank = np.arange(len(own)) - np.searchsorted(own, own)
        first = rank < n
        index[own[first], rank[first]], score[own[first], rank[first]] = partner[first], jaccard[first]
    return Neighbours(index, score)


def _ranges(met: np.ndarray) -> Iterator[tuple[int, int]]:
    """Latents from, to: as many at a time as have _CHUNK_ELEMENTS meetings together, or one."""
    low = 0
    while low < len(met) - 1:
        high = max(low + 1, int(np.searchsorted(met, met[low] + _CHUNK_ELEMENTS, side="right")) - 1)
        yield low, high
        low = high


def _before(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths
