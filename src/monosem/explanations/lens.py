"""Which next tokens a latent votes for: its decoder direction read through the subject's own unembedding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from monosem.subject import Subject
from monosem.types import Site

_CHUNK_ELEMENTS = 1 << 25


class Lens(NamedTuple):
    """Token ids and logit changes of each latent's strongest votes, strongest first."""

    up: np.ndarray
    up_values: np.ndarray
    down: np.ndarray
    down_values: np.ndarray


@torch.no_grad()
def lens(subject: Subject, site: Site, decoder: Float[Tensor, "n_latents d_model"], n: int) -> Lens:
    """The `n` tokens whose logits a unit of each latent raises and lowers most, to first order.

    unembedding (gain * d_i), with the gain of the subject's last norm and without the division by the token's norm,
    which scales all of a token's logits alike; relative to the mean over the vocabulary, which softmax does not see.
    `ValueError` says why it has none at `site`, which `Subject.unembedding` knows.
    """
    unembedding, gain = subject.unembedding(site)
    if unembedding.shape[1] != decoder.shape[1]:
        raise ValueError(f"the unembedding reads width {unembedding.shape[1]}, {site.location} has {decoder.shape[1]}")
    directions = (decoder.to(unembedding.device) * gain).float()
    centred = unembedding.float() - unembedding.float().mean(0)
    found: list[list[Tensor]] = []
    n = min(n, len(centred))
    for rows in directions.split(max(1, _CHUNK_ELEMENTS // len(centred))):
        logits = rows @ centred.T
        up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        found.append([up.indices.int(), up.values, down.indices.int(), down.values])
    return Lens(*(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)))
