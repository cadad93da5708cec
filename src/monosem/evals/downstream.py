"""What does the subject lose when it reads the reconstruction in place of its own activations?

The subject runs in float32 on held-out contexts: as it is, with the reconstruction at the site, with the training
mean there (mean-ablation, raw space) and with zeros (zero-ablation). The numbers to read are delta_ce and kl; the
ablations give them a scale, on which zero-ablation flatters (Gao et al. 2024, section 4.1).

Position 0 of a context, the attention sink, is left out of training by default. It then keeps its original
activation in every patched forward, the ablations' too, and the prediction made there (of token 1) is left out of
every sum. Position t predicts token t + 1, so a context of T tokens gives T - 2 predictions (T - 1 with position 0).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from monosem.evals.bootstrap import Statistic, as_metric, bootstrap, clusters_of, ratio
from monosem.families import FAMILIES
from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.types import LOCATIONS, Metric, Site

_LOGITS_BYTES = 1 << 28  # of one forward; two are alive at once
_SLICE_BYTES = 1 << 22  # of the logits compared at once: the passes over the vocabulary then stay in the caches

Patch = Callable[[Float[Tensor, "batch context_length width"], slice], Float[Tensor, "batch context_length width"]]
"""What is put at a site in place of its activations on the contexts of a slice."""

_TOKENS = 0  # the first column of the sums; then for each variant, in the order of the patches:
_CE, _DELTA_CE, _KL, _AGREES = range(4)
_PER_VARIANT = 4


def metrics(
    subject: Subject,
    autoencoder: Autoencoder,
    site: Site,
    tokens: Int[Tensor, "n_contexts context_length"],
    documents: Int[Tensor, "n_contexts context_length"],
    mean: Float[Tensor, " width"],
    *,
    first_position: int,
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """ce_original; delta_ce and kl of the reconstruction and of both ablations; top1_agreement; loss_recovered_*.

    `mean` is the training mean in raw space, `first_position` the first position of a context that is patched and
    counted. Intervals resample documents, the same ones for every number. `ValueError` when a context leaves no
    prediction to count, or a number is not finite.
    """
    patches = patches_of(autoencoder, mean)
    sums = sums_of(subject, site, tokens, clusters_of(documents), list(patches.values()), first_position)
    return metrics_of(sums, n_resamples=n_resamples, seed=seed)


def patches_of(autoencoder: Autoencoder, mean: Float[Tensor, " width"]) -> dict[str, Patch]:
    """The three patches of `metrics`, by the suffix of their numbers: the reconstruction's is empty."""
    return {
        "": lambda x, _: autoencoder(x),
        "_mean_ablation": lambda x, _: mean.to(x.device, x.dtype).expand_as(x),
        "_zero_ablation": lambda x, _: torch.zeros_like(x),
    }


def metrics_of(sums: Float[Tensor, "n_clusters n_sums"], *, n_resamples: int, seed: int) -> list[Metric]:
    """What `metrics` returns, from the sums of the patches of `patches_of`."""
    n = int(sums[:, _TOKENS].sum())

    def metric(name: str, statistic: Statistic, unit: str) -> Metric:
        return as_metric(name, bootstrap(sums, statistic, n_resamples=n_resamples, seed=seed), unit=unit, n=n)

    found = [metric("ce_original", ce(), "nats per token")]
    for variant, suffix in enumerate(("", "_mean_ablation", "_zero_ablation")):
        names = f"delta_ce{suffix}", f"kl{suffix}"
        found += delta_ce_and_kl(sums, variant, names, n_resamples=n_resamples, seed=seed)
    found.append(metric("top1_agreement", ratio(_column(0, _AGREES), _TOKENS), "fraction of tokens"))
    for variant, name in ((1, "loss_recovered_mean"), (2, "loss_recovered_zero")):
        recovered = _recovered(_column(0, _DELTA_CE), _column(variant, _DELTA_CE))
        found.append(metric(name, recovered, "fraction of the ablation's delta_ce"))
    return found


@torch.no_grad()
def sums_of(
    subject: Subject,
    site: Site,
    tokens: Int[Tensor, "n_contexts context_length"],
    clusters: Int[Tensor, " n_contexts"],
    patches: list[Patch],
    first_position: int,
) -> Float[Tensor, "n_clusters n_sums"]:
    """Float64 sums over the predictions of each cluster: 1, then CE, ΔCE, KL, [same top token] of each patch.

    The positions before `first_position` are not patched.
    """
    if tokens.shape[1] - 1 - first_position < 1:
        raise ValueError(f"contexts of {tokens.shape[1]} tokens leave no prediction to count; harvest longer contexts")
    context_length = tokens.shape[1]
    largest = max(1, _LOGITS_BYTES // (4 * subject.vocab_size * context_length))
    batch = -(-len(tokens) // -(-len(tokens) // largest))  # as few batches as fit, of nearly equal size
    starts, each = range(0, len(tokens), batch), batch * context_length
    sums = torch.zeros(int(clusters.max()) + 1, _column(len(patches), 0), dtype=torch.float64)

    def replace(x: Tensor, patch: Patch, rows: slice) -> Tensor:
        return torch.cat([x[:, :first_position], patch(x[:, first_position:], rows)], dim=1)

    for start in progress(starts, "downstream", "tok", total=len(starts) * each, each=each):
        rows = slice(start, start + batch)
        part = tokens[rows]
        with lower_blocks_run_once(subject, site):
            original = subject.logits(part)
            compared = []
            for patch in patches:
                patched = subject.run_with(part, site, functools.partial(replace, patch=patch, rows=rows))
                compared.append(_compare(original, patched, part, first_position))
        ones = torch.ones(*compared[0].shape[:2], 1, dtype=torch.float64)
        sums.index_add_(0, clusters[rows], torch.cat([ones, *compared], dim=-1).sum(1))
    return sums


def ce() -> Statistic:
    """Mean CE of the subject as it is, from the sums of `sums_of`."""
    return ratio(_column(0, _CE), _TOKENS)


def delta_ce(variant: int) -> Statistic:
    """Mean ΔCE of a patch, given its number, from the sums of `sums_of`."""
    return ratio(_column(variant, _DELTA_CE), _TOKENS)


def n_predictions(sums: Float[Tensor, "n_clusters n_sums"]) -> int:
    """How many predictions the sums of `sums_of` hold."""
    return int(sums[:, _TOKENS].sum())


def delta_ce_and_kl(
    sums: Float[Tensor, "n_clusters n_sums"],
    variant: int,
    names: tuple[str, str],
    *,
    unit: str = "nats per token",
    n_resamples: int,
    seed: int,
) -> list[Metric]:
    """The two numbers of one patch of `sums_of`, under their names."""
    n = int(sums[:, _TOKENS].sum())
    found = []
    for name, which in zip(names, (_DELTA_CE, _KL), strict=True):
        interval = bootstrap(sums, ratio(_column(variant, which), _TOKENS), n_resamples=n_resamples, seed=seed)
        found.append(as_metric(name, interval, unit=unit, n=n))
    return found


def _compare(
    original: Float[Tensor, "batch context_length vocab"],
    patched: Float[Tensor, "batch context_length vocab"],
    tokens: Int[Tensor, "batch context_length"],
    first_position: int,
) -> Float[Tensor, "batch n_predictions 4"]:
    """CE(original), ΔCE, KL(original || patched) in nats, and whether both have the same top token, by prediction."""
    counted = slice(first_position, tokens.shape[1] - 1)
    at_once = max(1, _SLICE_BYTES // (4 * original.shape[-1]))
    found = []
    for p, q, following in zip(original[:, counted], patched[:, counted], tokens[:, first_position + 1 :], strict=True):
        for p_slice, q_slice, target in zip(p.split(at_once), q.split(at_once), following.split(at_once), strict=True):
            log_p, log_q = p_slice.float().log_softmax(-1), q_slice.float().log_softmax(-1)
            target = target.to(log_p.device, torch.long)[:, None]
            log_p_next, log_q_next = log_p.gather(-1, target)[:, 0], log_q.gather(-1, target)[:, 0]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            agrees = log_p.argmax(-1) == log_q.argmax(-1)
            found.append(torch.stack([-log_p_next, log_p_next - log_q_next, kl, agrees], dim=-1).cpu().double())
    return torch.cat(found).unflatten(0, (len(tokens), -1))


@contextlib.contextmanager
def lower_blocks_run_once(subject: Subject, site: Site) -> Iterator[None]:
    """While open, and for one batch of tokens, the blocks below the site's compute once what every forward shares.

    The first forward keeps what the last of them returns; from then on each of them returns that at once. What they
    compute does not depend on what is put at the site, so no bit of any logit changes.
    """
    subject.passed_once(site)  # now, so that no forward pass but the caller's is the first
    blocks = _blocks_below(subject, site)
    if not blocks:
        yield
        return

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        for block in blocks:
            block.forward = lambda *_, **__: output  # hides the class's method until the attribute is deleted

    handle = blocks[-1].register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for block in blocks:
            block.__dict__.pop("forward", None)


def _blocks_below(subject: Subject, site: Site) -> list[nn.Module]:
    """The blocks before the site's; none where it is not known that the site lies in a block."""
    family = FAMILIES.get(subject.module.config.model_type)  # type: ignore[union-attr, arg-type]
    if family is None or not (site.location in LOCATIONS or site.location.startswith(f"{family.blocks}.")):
        return []
    return list(subject.module.get_submodule(family.blocks))[: max(0, site.layer)]  # type: ignore[call-overload]


def _column(variant: int, which: int) -> int:
    return 1 + _PER_VARIANT * variant + which


def _recovered(delta: int, delta_ablation: int) -> Statistic:
    """1 - ΔCE / ΔCE of the ablation, given their columns."""
    return lambda totals: 1 - totals[..., delta] / totals[..., delta_ablation]
