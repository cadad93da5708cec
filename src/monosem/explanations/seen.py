"""The pass over a store's activations: encode block after block, and take in what is active."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from monosem.activations import ActivationStore
from monosem.explanations import collect
from monosem.explanations.neighbours import Neighbours, by_coactivation
from monosem.model import Autoencoder

N_TOP, N_RANDOM, BAND_EACH = 20, 10, 5
N_SAMPLE = 40
"""Contexts a latent in the uniform sample from which random and quantile examples are chosen."""
N_NEIGHBOURS = 10
COACTIVATION_TOKENS = 65_536


class Active(NamedTuple):
    """The active (token, latent) pairs of a block, sorted by token."""

    block: int
    rows: np.ndarray
    latents: np.ndarray
    values: np.ndarray


class Seen:
    """What a pass over the activations has seen so far, block by block in rising order."""

    def __init__(self, autoencoder: Autoencoder, store: ActivationStore, seed: int) -> None:
        n, ctx = autoencoder.config.n_latents, store.context_length
        self.autoencoder, self.store, self.seed = autoencoder, store, seed
        self.moments = collect.Moments(n)
        self.top, self.sample = collect.Kept(n, N_TOP, ctx), collect.Kept(n, N_SAMPLE, ctx)
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        """Active (token, latent) pairs of the first COACTIVATION_TOKENS tokens, sorted by token."""

    def encode(self, block: int) -> Active:
        """Read and encode a block of the training split."""
        raw = self.store.block("train", block).to(self.autoencoder.weights.pre_bias.device)
        found = self.autoencoder.encode(self.autoencoder.normalize(raw)[0])
        indices, values = found.indices.cpu().numpy(), found.values.cpu().numpy()
        rows, slots = np.nonzero(values > 0)
        return Active(block, rows, indices[rows, slots], values[rows, slots])

    def add(self, active: Active) -> None:
        """Take in what is active on a block; blocks come in rising order."""
        block, rows, latents, values = active
        store = self.store
        contexts, positions = np.divmod(rows, store.rows_per_context)
        contexts, positions = contexts + block * store.config["block_contexts"], positions + store.first_position
        groups = collect.groups_of(latents, contexts, positions, values)
        self.moments.add(groups, store.block_rows)
        self.top.offer(groups, groups.peak.astype(np.float64))
        self.sample.offer(groups, collect.sample_priority(groups.latent, groups.context, self.seed))
        if block * store.block_rows < COACTIVATION_TOKENS:
            self.pairs.append((rows + block * store.block_rows, latents))

    def examples(self) -> dict[str, dict[str, np.ndarray]]:
        """By kind, top, random and quantile, the columns of `collect.choose`."""
        bands = collect.quantile_slots(self.sample, collect.N_BANDS, BAND_EACH)
        return {
            "top": collect.choose(self.top, collect.top_slots(self.top, N_TOP)),
            "random": collect.choose(self.sample, collect.top_slots(self.sample, N_RANDOM)),
            "quantile": collect.choose(self.sample, bands),
        }

    def coactivation(self) -> Neighbours:
        """The latents active on the same tokens, among the first COACTIVATION_TOKENS."""
        tokens, latents = map(np.concatenate, zip(*self.pairs, strict=True))
        return by_coactivation(tokens, latents, self.autoencoder.config.n_latents, N_NEIGHBOURS)

    def add_all(self, blocks: Iterable[int]) -> None:
        """`encode` and `add` each block; a thread encodes the next one while this one is taken in."""
        with ThreadPoolExecutor(1) as thread:
            coming: deque[Future[Active]] = deque()
            for block in blocks:
                coming.append(thread.submit(self.encode, block))
                if len(coming) > 1:
                    self.add(coming.popleft().result())
            for last in coming:
                self.add(last.result())
