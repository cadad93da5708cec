"""Which latents are alike: by the direction they write, and by the tokens they fire on."""

from __future__ import annotations

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
    order = np.argsort(latents, kind="stable")
    starts = np.searchsorted(latents[order], np.arange(n_latents + 1))
    each = max(1, _CHUNK_ELEMENTS // n_latents)
    for low in range(0, n_latents, each):
        high = min(low + each, n_latents)
        mine = order[starts[low] : starts[high]]
        begin, lengths = bounds[tokens[mine]], np.diff(bounds)[tokens[mine]]
        partner = np.repeat(begin - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        cells = np.repeat(latents[mine].astype(np.int64) - low, lengths) * n_latents + latents[partner]
        both = np.bincount(cells, minlength=(high - low) * n_latents).reshape(high - low, n_latents)
        both[np.arange(high - low), np.arange(low, high)] = 0
        jaccard = both / np.maximum(n_active[low:high, None] + n_active[None, :] - both, 1)
        jaccard[both < min_count] = 0
        best = np.argsort(-jaccard, axis=1, kind="stable")[:, :n]
        score[low:high] = np.take_along_axis(jaccard, best, axis=1)
        index[low:high] = np.where(score[low:high] > 0, best, -1)
    return Neighbours(index, score)
