"""Latents that are functions of the tokens, to be recovered without any model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monosem.n2g import LatentReader
from monosem.types import SparseLatents

PAD = 9
CONTEXT = 12


class Planted(LatentReader):
    """`latents[i](text)` is the activation of latent i at the last token of a text."""

    def __init__(self, *latents: Callable[[list[int]], float], longest_text: int = 100) -> None:
        self.latents, self.n_latents = latents, len(latents)
        self.longest_text, self.padding_token = longest_text, PAD
        self.batches: list[Tensor] = []

    def read(self, tokens: Tensor, *, last: bool = False) -> SparseLatents:
        self.batches.append(tokens)
        length = tokens.shape[1]
        ends = [length] if last else range(1, length + 1)
        values = [[float(latent(text[:end])) for latent in self.latents] for text in tokens.tolist() for end in ends]
        indices = torch.arange(self.n_latents).expand(len(values), -1)
        return SparseLatents(indices, torch.tensor(values), self.n_latents)


def planted_texts(n: int, n_tokens: int = PAD, seed: int = 0) -> Tensor:
    """Contexts of uniformly random tokens, without the padding token."""
    return torch.randint(n_tokens, (n, CONTEXT), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
