"""What does the subject lose when latents take the values that their explanations predict?

The site's activations are replaced by the reconstruction in which some latents have simulated values and the others
their own; each token's own mean and std put it back in raw space (Gao et al. 2024, section 4.4). The latents are
simulated in nested random subsets, so that the numbers are a curve against how many; for a small autoencoder with an
explanation of every latent the curve ends where nothing but explanations is left. Beside it the same latents set to 0,
and predicted by unigram: an explanation is worth what it gains over these.

Contexts run behind the reader's prefix token, as they do in N2G; it keeps its own activation and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from monosem import n2g
from monosem.evals import downstream
from monosem.evals.bootstrap import clusters_of
from monosem.evals.explainability import Explanation
from monosem.model import Autoencoder
from monosem.n2g import LatentReader
from monosem.types import Metric

FRACTIONS = (0.25, 0.5, 1.0)


def metrics(
    reader: LatentReader,
    explanations: Sequence[Explanation],
    tokens: Int[Tensor, "n_contexts ctx"],
    documents: Int[Tensor, "n_contexts ctx"],
    *,
    fractions: Sequence[float] = FRACTIONS,
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """explanation_delta_ce and explanation_kl, plain (every explained latent simulated) and at smaller fractions.

    `_at_25` says a quarter of the explained latents, `_zero` and `_unigram` the baselines, `_real` none simulated: the
    plain reconstruction. The unit says how many latents of how many were simulated. `ValueError` for no explanation or
    a fraction outside (0, 1].
    """
    if not explanations or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"{len(explanations)} explanations, fractions {list(fractions)}; give some, from (0, 1]")
    n_latents = reader.n_latents
    simulated = {
        "": _Simulated([(e.examples.latent, e.n2g) for e in explanations], tokens),
        "_unigram": _Simulated([(e.examples.latent, e.unigram) for e in explanations], tokens),
        "_zero": _Simulated([], tokens),
    }
    order = torch.randperm(len(explanations), generator=torch.Generator().manual_seed(seed))
    latents = torch.tensor([e.examples.latent for e in explanations])[order]
    variants = {"_real": (0, simulated["_zero"])}
    for fraction in fractions:
        at = "" if fraction == 1 else f"_at_{100 * fraction:g}"
        variants |= {f"{suffix}{at}": (math.ceil(fraction * len(latents)), s) for suffix, s in simulated.items()}
    patches = [_patch(reader.autoencoder, s, _among(latents[:count], n_latents)) for count, s in variants.values()]
    prefixed = torch.cat([torch.full_like(tokens[:, :1], reader.subject.prefix_token), tokens], dim=1)
    sums = downstream.sums_of(reader.subject, reader.site, prefixed, clusters_of(documents), patches, 1)
    found = []
    for variant, (suffix, (count, _)) in enumerate(variants.items()):
        names = f"explanation_delta_ce{suffix}", f"explanation_kl{suffix}"
        unit = f"nats per token, {count:,} of {n_latents:,} latents simulated"
        found += downstream.delta_ce_and_kl(sums, variant, names, unit=unit, n_resamples=n_resamples, seed=seed)
    return found


class _Simulated:
    """What rules predict for their latents on contexts: (position, latent, value) of what is not 0, by position."""

    def __init__(self, rules: Sequence[tuple[int, n2g.Rule]], tokens: Tensor) -> None:
        self.context_length = tokens.shape[1]
        positions, latents, values = [torch.empty(0).long()], [torch.empty(0).long()], [torch.empty(0)]
        for latent, rule in rules:
            predicted = n2g.predict(rule, tokens).flatten()
            positions.append(predicted.nonzero()[:, 0])
            latents.append(torch.full_like(positions[-1], latent))
            values.append(predicted[positions[-1]])
        self.positions, order = torch.cat(positions).sort(stable=True)
        self.latents, self.values = torch.cat(latents)[order], torch.cat(values)[order]

    def decode(
        self, rows: slice, n_contexts: int, among: Bool[Tensor, " n_latents"], decoder: Float[Tensor, "n_latents d"]
    ) -> Float[Tensor, "n_tokens d"]:
        """Σ prediction * decoder[latent] over the latents in `among`, for every token of some contexts."""
        first, n_tokens = rows.start * self.context_length, n_contexts * self.context_length
        low, high = torch.searchsorted(self.positions, torch.tensor([first, first + n_tokens])).tolist()
        kept = low + among[self.latents[low:high]].nonzero()[:, 0]
        starts = torch.searchsorted(self.positions[kept] - first, torch.arange(n_tokens))
        where = decoder.device
        return F.embedding_bag(
            self.latents[kept].to(where),
            decoder,
            starts.to(where),
            mode="sum",
            per_sample_weights=self.values[kept].to(where),
        )


def _patch(autoencoder: Autoencoder, simulated: _Simulated, among: Bool[Tensor, " n_latents"]) -> downstream.Patch:
    """The reconstruction in which the latents in `among` have their simulated values."""

    def patch(raw: Tensor, rows: slice) -> Tensor:
        x, stats = autoencoder.normalize(raw.flatten(0, 1))
        latents = autoencoder.encode(x)
        real = latents._replace(values=latents.values * ~among.to(raw.device)[latents.indices.long()])
        recons = autoencoder.decode(real) + simulated.decode(rows, len(raw), among, autoencoder.weights.decoder)
        return autoencoder.denormalize(recons, stats).to(raw.dtype).view_as(raw)

    return patch


def _among(latents: Int[Tensor, " count"], n_latents: int) -> Bool[Tensor, " n_latents"]:
    return torch.zeros(n_latents, dtype=torch.bool).index_fill_(0, latents, True)
