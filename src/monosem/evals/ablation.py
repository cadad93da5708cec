"""How many of the subject's logits does one latent move? (ablation sparsity: Gao et al. 2024, section 4.5)

Take one active latent out at one token: x' = x − std·z_i·decoder[i] in raw space. The autoencoder's error and its other
latents stay, and nothing is encoded again. δ, [T, vocab], is the change of the logits at that token and the T − 1 after
it, minus each token's median over the vocabulary (a shift of all logits says nothing). Then

    sparsity = (‖δ‖₁ / ‖δ‖₂)² / (vocab·T)

is 1 when all logits move alike, 1/(vocab·T) when one moves, and 2/π when the changes are independent normals. A change
that is normal over the vocabulary and over after one token has 2/(π·T), so the sparsity of the ablated token's own
change, with T = 1, is given too: it tells few logits from few tokens.

Tokens are drawn evenly over contexts and uniformly over positions, then one of the token's active latents. At the same
tokens, for comparison:
    channels            a random channel j of the residual stream, x_j in normalised space: −std·x_j·e_j
    random_directions   a random direction; the change has the latent's norm
    random_dictionary   a row of n_latents random unit directions, one of those with the largest products with
                        x − pre_bias, as many as the token has active latents; the change has the latent's norm

Only the tokens from the ablated one on are run, and only blocks from the site's on: keys and values of the tokens
before, and what enters the site's block, are those of the subject as it is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.evals.bootstrap import as_metric, bootstrap, clusters_of, ratio
from monosem.evals.downstream import lower_blocks_run_once
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.types import Metric, Site

N_TOKENS = 16
"""Predictions, from an ablated token's own on, in which moved logits are counted."""
KINDS = ("", "_channels", "_random_directions", "_random_dictionary")
"""Suffixes of the numbers; the first is the latents."""
_LOGITS_BYTES = 1 << 27  # of the ablated tokens' logits; about four such tensors are alive at once
_N_EXTREMES = 10


def metrics(
    subject: Subject,
    autoencoder: Autoencoder,
    site: Site,
    tokens: Int[Tensor, "n_contexts context_length"],
    documents: Int[Tensor, "n_contexts context_length"],
    *,
    first_position: int,
    n_ablations: int = 200,
    n_tokens: int = N_TOKENS,
    n_resamples: int,
    seed: int,
) -> tuple[list[Metric], dict[str, Any]]:
    """ablation_sparsity, ablation_sparsity_own_token, both with each comparison's suffix; and each latent's ablation.

    The second has a list each of context (row of `tokens`), position, latent, activation, sparsity; and of the ten
    logits that rise (up_) and fall (down_) the most: change (median taken out), offset from position, token.
    n counts ablations; those without any effect have no sparsity and are left out. Intervals resample documents.
    `ValueError` when a context is shorter than the first position and n_tokens.
    """
    n_positions = tokens.shape[1] - n_tokens + 1 - first_position
    if n_positions < 1:
        raise ValueError(
            f"contexts of {tokens.shape[1]} tokens hold no {n_tokens} tokens from position {first_position} on; "
            "harvest longer contexts"
        )
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.arange(n_ablations) * len(tokens) // n_ablations
    positions = first_position + torch.randint(n_positions, (n_ablations,), generator=generator)
    random_dictionary = torch.randn(autoencoder.weights.decoder.shape, generator=generator)
    random_dictionary /= random_dictionary.norm(dim=1, keepdim=True)
    at_once = max(1, _LOGITS_BYTES // (4 * subject.vocab_size * n_tokens))
    groups = [part for p in positions.unique() for part in (positions == p).nonzero().squeeze(1).split(at_once)]
    found = []
    for group in progress(groups, "ablate", "ablation", total=n_ablations, each=max(1, n_ablations // len(groups))):
        start = int(positions[group[0]])
        read = tokens[contexts[group], : start + n_tokens]
        found.append(_ablate(subject, autoencoder, site, read, start, random_dictionary, generator))
    order = torch.cat(groups).argsort()
    merged = {name: torch.cat([part[name] for part in found])[order] for name in found[0]}
    sparsities, clusters = merged.pop("sparsities"), clusters_of(documents[contexts])
    names = [f"ablation_sparsity{of}{kind}" for kind in KINDS for of in ("", "_own_token")]
    options = {"n_resamples": n_resamples, "seed": seed}
    numbers = [_metric(n, s, clusters, **options) for n, s in zip(names, sparsities.flatten(1).T, strict=True)]
    lists = {"context": contexts.tolist(), "position": positions.tolist()}
    lists |= {name: tensor.tolist() for name, tensor in merged.items()}
    lists["sparsity"] = [None if math.isnan(s) else s for s in sparsities[:, 0, 0].tolist()]
    return numbers, lists


class Effects(NamedTuple):
    """What ablating one latent at one token of each context does to what is predicted after it.

    Entry t is of the prediction of token t, made at t - 1; up to the ablated position it is NaN, and a token -1.
    """

    activation: Float[Tensor, " batch"]
    """Of the latent there, as the subject in its present precision has it."""
    sparsity: Float[Tensor, " batch"]
    kl: Float[Tensor, "batch ctx"]
    """KL(as it is || ablated), nats."""
    delta_ce: Float[Tensor, "batch ctx"]
    """Loss on token t ablated, minus as it is, nats."""
    votes: dict[str, tuple[Int[Tensor, "batch ctx n"], Float[Tensor, "batch ctx n"]]]
    """logits_up, logits_down, probs_up, probs_down: the tokens whose logit (its median over the vocabulary taken out)
    or probability the ablation moves up or down most, and by how much, strongest first."""


@torch.no_grad()
def effects(
    subject: Subject,
    autoencoder: Autoencoder,
    site: Site,
    tokens: Int[Tensor, "batch ctx"],
    positions: Int[Tensor, " batch"],
    latents: Int[Tensor, " batch"],
    *,
    n_tokens: int = N_TOKENS,
) -> Effects:
    """Ablate `latents[b]` at `positions[b]` of context b; sparsity counts `n_tokens` predictions from there on.

    Whole contexts run, as their positions differ, but below the site's block once for both runs. A latent that is not
    active there changes nothing, and has no sparsity (NaN).
    """
    every, raw = torch.arange(len(tokens)), torch.empty(0)

    def look(x: Tensor) -> Tensor:
        nonlocal raw
        raw = x[every, positions].float().clone()
        return x

    with lower_blocks_run_once(subject, site):
        original = subject.run_with(tokens, site, look).float()
        x, stats = autoencoder.normalize(raw)
        found = autoencoder.encode(x)
        activation = (found.values * (found.indices == latents.to(raw.device)[:, None])).sum(1)
        change = -stats.std * activation[:, None] * autoencoder.weights.decoder[latents.to(raw.device)]

        def ablate(x: Tensor) -> Tensor:
            x = x.clone()
            x[every, positions] += change.to(x)
            return x

        ablated = subject.run_with(tokens, site, ablate).float()
    return _effects(original, ablated, tokens.to(original.device), positions, activation, n_tokens)


def _effects(
    original: Float[Tensor, "batch ctx vocab"],
    ablated: Float[Tensor, "batch ctx vocab"],
    tokens: Int[Tensor, "batch ctx"],
    positions: Int[Tensor, " batch"],
    activation: Float[Tensor, " batch"],
    n_tokens: int,
) -> Effects:
    shape, n = tokens.shape, min(_N_EXTREMES, original.shape[2])
    kl, delta_ce = (torch.full(shape, torch.nan) for _ in range(2))
    names = ("logits_up", "logits_down", "probs_up", "probs_down")
    votes = {name: (torch.full((*shape, n), -1), torch.full((*shape, n), torch.nan)) for name in names}
    sparsities = []
    for b, start in enumerate(positions.tolist()):
        p, q = (logits[b, start:].log_softmax(-1) for logits in (original, ablated))
        delta = ablated[b, start:] - original[b, start:]
        delta -= delta.median(-1, keepdim=True).values
        sparsities.append(sparsity(delta[None, :n_tokens]))
        p, q, delta, following = p[:-1], q[:-1], delta[:-1], tokens[b, start + 1 :].long()[:, None]
        kl[b, start + 1 :] = (p.exp() * (p - q)).sum(-1)
        delta_ce[b, start + 1 :] = (p.gather(1, following) - q.gather(1, following))[:, 0]
        for kind, moved in (("logits", delta), ("probs", q.exp() - p.exp())):
            for side, largest in (("up", True), ("down", False)):
                top = moved.topk(n, largest=largest)
                ids, values = votes[f"{kind}_{side}"]
                ids[b, start + 1 :], values[b, start + 1 :] = top.indices.cpu(), top.values.cpu()
    return Effects(activation.cpu(), torch.cat(sparsities).cpu(), kl, delta_ce, votes)


def sparsity(change: Float[Tensor, "batch n_tokens vocab"]) -> Float[Tensor, " batch"]:
    """(‖change‖₁ / ‖change‖₂)² / (n_tokens·vocab), in (0, 1]; NaN where nothing changes."""
    flat = change.flatten(1)
    l1, l2 = (torch.linalg.vector_norm(flat, ord=p, dim=1, dtype=torch.float64) for p in (1, 2))
    return (l1 / l2).square() / flat.shape[1]


@torch.no_grad()
def _ablate(
    subject: Subject,
    autoencoder: Autoencoder,
    site: Site,
    tokens: Int[Tensor, "batch end"],
    start: int,
    random_dictionary: Float[Tensor, "n_latents d_model"],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The ablations at position `start` of some contexts: sparsities [batch, kind, (all tokens, own token)], and what
    the viewer shows."""
    past = subject.read(tokens[:, :start]) if start else None
    suffix, raw = tokens[:, start:], torch.empty(0)

    def look(x: Tensor) -> Tensor:
        nonlocal raw
        raw = x[:, 0].float().clone()
        return x

    with lower_blocks_run_once(subject, site):
        original = subject.run_with(suffix, site, look, past).float()
        latents, activations, changes = _changes(autoencoder, raw, random_dictionary, generator)
        found, sparsities = {"latent": latents, "activation": activations}, []
        for kind, change in changes.items():
            logits = subject.run_with(suffix, site, _added(change), past).float()
            delta = logits - original
            delta -= delta.median(-1, keepdim=True).values
            sparsities.append(torch.stack([sparsity(delta), sparsity(delta[:, :1])], dim=1))
            if kind == KINDS[0]:
                found |= _extremes(delta)
    return {name: tensor.cpu() for name, tensor in {**found, "sparsities": torch.stack(sparsities, 1)}.items()}


def _added(change: Float[Tensor, "batch d_model"]) -> Any:
    """The replacement that adds `change` to the first of the tokens."""
    return lambda x: torch.cat([x[:, :1] + change[:, None].to(x), x[:, 1:]], dim=1)


def _changes(
    autoencoder: Autoencoder,
    raw: Float[Tensor, "batch d_model"],
    random_dictionary: Float[Tensor, "n_latents d_model"],
    generator: torch.Generator,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], dict[str, Float[Tensor, "batch d_model"]]]:
    """The latent drawn of each token, its activation, and what each kind of ablation adds to the raw activation.

    A token without active latents draws one of activation 0, so that nothing changes.
    """
    weights = autoencoder.weights
    x, stats = autoencoder.normalize(raw)
    indices, values, _ = autoencoder.encode(x)
    slots = _one_of((values > 0).cpu(), generator)[:, None].to(raw.device)
    latents, activations = indices.gather(1, slots)[:, 0], values.gather(1, slots)[:, 0]
    change = -stats.std * activations[:, None] * weights.decoder[latents]
    norms = change.norm(dim=1, keepdim=True)
    channels = torch.randint(x.shape[1], (len(x), 1), generator=generator).to(raw.device)
    channel = torch.zeros_like(x).scatter_(1, channels, -stats.std * x.gather(1, channels))
    random = torch.randn(x.shape, generator=generator).to(raw.device)
    ranked = ((x - weights.pre_bias) @ random_dictionary.to(x).T).argsort(dim=1, descending=True)
    n_active = (values > 0).sum(1).cpu()
    ranks = (torch.rand(len(x), generator=generator) * n_active).long()[:, None].to(raw.device)
    row = random_dictionary.to(x)[ranked.gather(1, ranks)[:, 0]]
    changes = (change, channel, norms * random / random.norm(dim=1, keepdim=True), -norms * row)
    return latents, activations, dict(zip(KINDS, changes, strict=True))


def _one_of(active: Tensor, generator: torch.Generator) -> Tensor:
    """For each row the column of one of its true entries, uniformly; of any entry where none is true."""
    weights = active.float() + (~active.any(1, keepdim=True)).float()
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _extremes(delta: Float[Tensor, "batch n_tokens vocab"]) -> dict[str, Tensor]:
    found = {}
    for side, largest in (("up", True), ("down", False)):
        top = delta.flatten(1).topk(min(_N_EXTREMES, delta[0].numel()), largest=largest)
        found[f"{side}_change"] = top.values
        found[f"{side}_offset"], found[f"{side}_token"] = top.indices // delta.shape[2], top.indices % delta.shape[2]
    return found


def _metric(name: str, sparsities: Tensor, clusters: Tensor, n_resamples: int, seed: int) -> Metric:
    """The mean over the ablations that have one."""
    there = ~sparsities.isnan()
    sums = torch.zeros(int(clusters.max()) + 1, 2, dtype=torch.float64)
    sums.index_add_(0, clusters, torch.stack([there.double(), sparsities.nan_to_num(0)], dim=1))
    interval = bootstrap(sums, ratio(1, 0), n_resamples=n_resamples, seed=seed)
    return as_metric(name, interval, unit="fraction of logits", n=int(there.sum()))
