"""What does this text do in the autoencoder, and the autoencoder to the subject? The one module here that loads torch.

The text is read behind `subject.prefix_token`, alone, in float32; control tokens that are written out are read
as such. With x the normalised activation of a token and z its active latents (of the k or threshold asked for):

    error           ‖x − x̂‖² / ‖x − pre_bias‖²
    loss            −ln p(token | tokens before it); of the subject as it is, with x̂ in place of x, and edited
    edited          x' = x + (z' − z) decoder    where z' is z with chosen latents ablated (0), boosted (a·z) or clamped
                                                 (v): the reconstruction's error is kept, nothing is encoded again

Both replacements are made in raw space, with the token's own mean and standard deviation, at every position from the
first that the autoencoder was trained on; before it (the attention sink, mostly) nothing is replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem import run_folder
from monosem.evals import probes, tasks
from monosem.evals.downstream import lower_blocks_run_once
from monosem.model import Autoencoder, NormStats
from monosem.subject import Subject
from monosem.textfiles import csv_rows_of, tidied
from monosem.tokens import control_ids, token_ids
from monosem.torch_state import pinned
from monosem.types import Site, SparseLatents

MAX_TOKENS = 256
MAX_EDITS = 16
MAX_CONTINUATION = 32
MAX_TEXTS = 500
MAX_TOKENS_PER_TEXT = 64
N_LATENTS_SHOWN = 50
"""Of a token's active latents, the largest."""
N_NEXT = 10
N_BEST = 20
N_SHUFFLES = 20
KINDS = ("ablate", "boost", "clamp")
_WARM_UP = "The quick brown fox jumps over the lazy dog."


class Live(NamedTuple):
    """An autoencoder with the subject that it is of."""

    subject: Subject
    autoencoder: Autoencoder
    site: Site
    first_position: int
    """The first position of a context that the autoencoder was trained on."""
    context_length: int | None
    """Of the contexts it was trained on; None where it does not say."""
    vocabulary: list[str]


class Edit(NamedTuple):
    """A change to one latent: `ablate`, `boost` (times `value`) or `clamp` (to `value`)."""

    latent: int
    kind: str
    value: float = 0.0

    def of(self, z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """z', the activation that takes the place of z."""
        return z * self.value if self.kind == "boost" else torch.full_like(z, self.value * (self.kind == "clamp"))


@pinned
def load(run: str, device: str = "auto", model: str | None = None) -> Live:
    """The autoencoder of a run and its subject, warm; `ValueError` when either is missing or not the one trained on."""
    autoencoder = Autoencoder.load(run_folder.autoencoder_folder(run))
    provenance = autoencoder.provenance
    if provenance.get("site") is None:
        raise ValueError(f"the autoencoder of {run} does not say of which site it is; no text can be tried on it")
    site, harvest = Site(**provenance["site"]), provenance.get("harvest", {})
    subject = run_folder.load_subject(site, "float32", device, model)
    hashes = {
        "tokenizer": subject.tokenizer_hash,
        "subject": subject.hash,
        "subject_config": subject.config_hash,
    }
    for source, found in hashes.items():
        if provenance.get("sources", {}).get(source) not in (None, found):
            raise ValueError(f"the {source} of {subject.name} is not the one {run} was trained with; restore the model")
    first = 0 if harvest.get("keep_first_token") else 1
    context_length = harvest.get("context_length")
    live = Live(subject, autoencoder.to(subject.device), site, first, context_length, subject.vocabulary())
    try_text(live, _WARM_UP)
    return live


def facts(live: Live) -> dict[str, Any]:
    """What the page has to know before anything is tried."""
    settings = live.autoencoder.config
    return {
        "subject": live.subject.name,
        "site": dataclasses.asdict(live.site),
        **dataclasses.asdict(settings),
        "first_position": live.first_position,
        "context_length": live.context_length,
        "predicts": live.subject.has_logits,
        "max_tokens": _max_tokens(live),
        "max_edits": MAX_EDITS,
        "max_continuation": MAX_CONTINUATION,
        "max_texts": MAX_TEXTS,
    }


@pinned
@torch.no_grad()
def try_text(
    live: Live,
    text: str,
    *,
    k: int | None = None,
    threshold: float | None = None,
    edits: Sequence[Edit] = (),
    position: int | None = None,
    watch: Sequence[int] = (),
    n_continue: int = 0,
    seed: int | None = None,
) -> dict[str, Any]:
    """What the page /try shows, as JSON (docs/viewer.md); `ValueError` says what cannot be tried.

    `position` is where the next token is looked at (default: the last), `watch` are latents whose activation on every
    token is wanted. The continuation is greedy, or sampled with `seed`, from the same random numbers before and after.
    """
    started = time.perf_counter()
    tokens = _tokens(live, text)
    _check(live, edits, watch, n_continue)
    position = tokens.shape[1] - 1 if position is None else position
    if not 0 <= position < tokens.shape[1]:
        raise ValueError(f"position is {position}; this text has positions 0 to {tokens.shape[1] - 1}")
    if n_continue and tokens.shape[1] + n_continue > live.subject.max_context:
        raise ValueError(f"the text leaves no room for {n_continue} more tokens; {live.subject.name} reads "
                         f"{live.subject.max_context}")  # fmt: skip
    choice: dict[str, Any] = {"k": k, "threshold": threshold}
    (_, x, _, latents), recons, logits = _run(live, tokens, edits, choice)
    _check_finite({"recons": recons, **logits}, edits, threshold)
    error = (x - recons).square().sum(-1) / (x - live.autoencoder.weights.pre_bias).square().sum(-1)
    losses = {name: _losses(found, tokens[0]) for name, found in logits.items()}
    return {
        "tokens": _token_rows(live, tokens[0], latents, error, losses),
        "control_tokens": _control_tokens(live, tokens[0, 1:].tolist()),
        "watch": {str(i): _padded(live, z) for i, z in zip(watch, activations_of(latents, watch).T, strict=True)},
        "next": _next(live, {name: found[position] for name, found in logits.items()}) if logits else None,
        "position": position,
        "continuation": _continuation(live, tokens, edits, choice, n_continue, seed) if n_continue else None,
        "seconds": round(time.perf_counter() - started, 3),
    }


def activations_of(latents: SparseLatents, chosen: Sequence[int]) -> Float[Tensor, "batch n_chosen"]:
    """The activations of `chosen` latents on every token."""
    columns = [torch.where(latents.indices == i, latents.values, 0.0).sum(1) for i in chosen]
    return torch.stack(columns, dim=1) if columns else latents.values.new_zeros(len(latents.values), 0)


class Encoded(NamedTuple):
    """Raw activations, the same normalised, by what, and their latents."""

    raw: Float[Tensor, "batch d_model"]
    x: Float[Tensor, "batch d_model"]
    stats: NormStats
    latents: SparseLatents


def encoded(live: Live, raw: Float[Tensor, "batch d_model"], choice: dict[str, Any]) -> Encoded:
    x, stats = live.autoencoder.normalize(raw)
    return Encoded(raw, x, stats, live.autoencoder.encode(x, **choice))


def edited(live: Live, found: Encoded, edits: Sequence[Edit]) -> Float[Tensor, "batch d_model"]:
    """raw + std · (z' − z) decoder."""
    chosen = [edit.latent for edit in edits]
    z = activations_of(found.latents, chosen)
    change = torch.stack([edit.of(z[:, i]) for i, edit in enumerate(edits)], dim=1) - z
    return found.raw + found.stats.std * (change @ live.autoencoder.weights.decoder[chosen])


@pinned
def try_labelled(live: Live, table: str, *, seed: int = 0) -> dict[str, Any]:
    """Which latents separate the two labels of a CSV (columns `text`, `label`, perhaps `group`) best (docs/viewer.md).

    A logistic probe of each latent's pre-activation, averaged over the text, is fitted on one half of the texts and
    judged on the other (evals.probes); `null` is what the best of as many latents reaches when the labels are shuffled.
    """
    started = time.perf_counter()
    rows = list(tasks.labelled_rows(csv_rows_of(io.StringIO(tidied(table)), "the table,"), "the table,"))
    if len(rows) > MAX_TEXTS:
        raise ValueError(f"the table has {len(rows)} rows; give at most {MAX_TEXTS}")
    task = tasks.make("the table", "the table", rows)
    halves = tasks.split(task, n_texts=len(task.texts), seed=seed)
    texts = [task.texts[i] for half in halves for i in half]
    pooled = probes.pool(live.subject, live.autoencoder, live.site, texts, max_tokens=MAX_TOKENS_PER_TEXT)
    x, n = pooled.by_pooling["mean"], len(halves[0])
    options = {"n_resamples": 1000, "seed": seed}
    best, null = probes.best_latents(
        live.autoencoder, x[:n], x[n:], task, halves, n=N_BEST, n_shuffles=N_SHUFFLES, options=options
    )
    audit = tasks.audit(task)
    return {
        "labels": list(task.values),
        "n_train": n,
        "n_held_out": len(halves[1]),
        "n_left_out": len(task.texts) - len(texts),
        "n_cut": pooled.n_cut,
        "max_tokens": MAX_TOKENS_PER_TEXT,
        "n_latents": live.autoencoder.config.n_latents,
        "best": best,
        "null": {"losses_train": null.tolist(), "n_as_good": int((null <= best[0]["loss_train"]).sum())},
        "loss_constant": -sum(p * math.log(p) for p in (audit["share_of_label_1"], 1 - audit["share_of_label_1"])),
        "warning": tasks.broken_by(audit),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _max_tokens(live: Live) -> int:
    return min(MAX_TOKENS, live.subject.max_context) - 1


def _tokens(live: Live, text: str) -> Int[Tensor, "1 ctx"]:
    found = token_ids(live.subject.tokenizer, [tidied(text)], control=True)[0]
    if found[:1] == [live.subject.prefix_token]:  # it is written out
        found = found[1:]
    if not found:
        raise ValueError("the text is empty; type something")
    if len(found) > _max_tokens(live):
        raise ValueError(f"the text has {len(found)} tokens; give at most {_max_tokens(live)}")
    return torch.tensor([[live.subject.prefix_token, *found]])


def _control_tokens(live: Live, tokens: list[int]) -> list[str]:
    """Which control tokens of the tokenizer a text has written out; they were read as such."""
    control = control_ids(live.subject.tokenizer)
    return list(dict.fromkeys(live.vocabulary[token] for token in tokens if token in control))


def _check(live: Live, edits: Sequence[Edit], watch: Sequence[int], n_continue: int) -> None:
    n_latents = live.autoencoder.config.n_latents
    chosen = [edit.latent for edit in edits]
    for latent in (*chosen, *watch):
        if not 0 <= latent < n_latents:
            raise ValueError(f"latent is {latent}; this autoencoder has latents 0 to {n_latents - 1}")
    if len(set(chosen)) < len(chosen) or len(edits) > MAX_EDITS or len(watch) > MAX_EDITS:
        raise ValueError(f"{len(edits)} edits; give at most {MAX_EDITS}, one a latent")
    for edit in edits:
        if edit.kind not in KINDS or not math.isfinite(edit.value):
            raise ValueError(
                f"the edit of latent {edit.latent} is {edit.kind!r} {edit.value}; choose {', '.join(KINDS)}"
            )
    if not 0 <= n_continue <= MAX_CONTINUATION:
        raise ValueError(f"n_continue is {n_continue}; give 0 to {MAX_CONTINUATION}")
    if (edits or n_continue) and not live.subject.has_logits:
        raise ValueError(f"{live.subject.name} is an encoder and predicts no next token, so an edit changes nothing")


def _check_finite(found: dict[str, Tensor], edits: Sequence[Edit], threshold: float | None) -> None:
    """−inf is a logit like others: some models have it for tokens that do not exist."""
    for name, values in found.items():
        if not values.amax(-1).isfinite().all():
            asked = ", ".join(f"{edit.kind} of latent {edit.latent} by {edit.value:g}" for edit in edits)
            what = f"with the {asked}" if name == "edited" else f"with threshold {threshold}" if threshold else "here"
            raise ValueError(f"{what} the activations are too large to compute with; give smaller values")


def _run(
    live: Live, tokens: Int[Tensor, "1 ctx"], edits: Sequence[Edit], choice: dict[str, Any]
) -> tuple[Encoded, Float[Tensor, "n_read width"], dict[str, Float[Tensor, "ctx vocab"]]]:
    """What is read from the first position on and its reconstruction (normalised); the logits as they are,
    reconstructed and edited."""
    subject, site, first = live.subject, live.site, live.first_position
    if not subject.has_logits:
        found = encoded(live, subject.capture(tokens, site)[0, first:].float(), choice)
        return found, live.autoencoder.decode(found.latents), {}
    raw = torch.empty(0)

    def look(x: Tensor) -> Tensor:
        nonlocal raw
        raw = x[0, first:].float().clone()
        return x

    with lower_blocks_run_once(subject, site):
        logits = {"original": subject.run_with(tokens, site, look)[0]}
        found = encoded(live, raw, choice)
        recons = live.autoencoder.decode(found.latents)
        replacements = {"recons": live.autoencoder.denormalize(recons, found.stats)}
        if edits:
            replacements["edited"] = edited(live, found, edits)
        for name, new in replacements.items():
            put = functools.partial(_from, first, new)
            logits[name] = subject.run_with(tokens, site, put)[0]
    return found, recons, logits


def _from(first: int, new: Tensor, x: Float[Tensor, "1 ctx width"]) -> Float[Tensor, "1 ctx width"]:
    """x with `new` in its place from the first position on."""
    return torch.cat([x[:, :first], new[None].to(x)], dim=1)


def _losses(logits: Float[Tensor, "ctx vocab"], tokens: Int[Tensor, " ctx"]) -> list[float | None]:
    """In nats, by token; None for the first, which nothing predicts."""
    found = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:].to(logits.device), reduction="none")
    return [None, *found.tolist()]


def _token_rows(
    live: Live, tokens: Tensor, latents: SparseLatents, error: Tensor, losses: dict[str, list[float | None]]
) -> list[dict[str, Any]]:
    values, order = latents.values.sort(dim=1, descending=True)
    indices = latents.indices.gather(1, order)
    n_active = (values > 0).sum(1)
    found = []
    for position, token in enumerate(tokens.tolist()):
        read = position - live.first_position
        row: dict[str, Any] = {"id": token, "text": live.vocabulary[token], "trained": _trained(live, position)}
        row |= {"loss": losses["original"][position] if losses else None}
        for name in ("recons", "edited"):  # the prediction before the first replaced token is nobody's doing
            row[f"loss_{name}"] = losses[name][position] if name in losses and read > 0 else None
        row |= {"error": None, "n_active": 0, "latents": []}
        if read >= 0:
            n = min(int(n_active[read]), N_LATENTS_SHOWN)
            pairs = zip(indices[read, :n].tolist(), values[read, :n].tolist(), strict=True)
            row |= {"error": float(error[read]), "n_active": int(n_active[read]), "latents": [[*p] for p in pairs]}
        found.append(row)
    return found


def _trained(live: Live, position: int) -> bool:
    """Whether the autoencoder was trained on tokens at this position."""
    return position >= live.first_position and (live.context_length is None or position < live.context_length)


def _padded(live: Live, z: Float[Tensor, " n_read"]) -> list[float | None]:
    return [None] * live.first_position + z.tolist()


def _next(live: Live, logits: dict[str, Float[Tensor, " vocab"]]) -> dict[str, Any]:
    """The likeliest next tokens under any of the distributions, each with its probability under all; and the KLs."""
    log_p = {name: found.float().log_softmax(-1) for name, found in logits.items()}
    likely = torch.cat([found.topk(min(N_NEXT, len(found))).indices for found in log_p.values()]).unique()
    largest = torch.stack([found[likely] for found in log_p.values()]).amax(0)
    likely = likely[largest.argsort(descending=True)]
    rows: list[dict[str, Any]] = [{"id": i, "text": live.vocabulary[i]} for i in likely.tolist()]
    for name, found in log_p.items():
        for row, p in zip(rows, found[likely].exp().tolist(), strict=True):
            row[f"p_{name}"] = p
    p = log_p["original"].exp()
    kl = {f"kl_{name}": float((p * (log_p["original"] - q)).sum()) for name, q in log_p.items() if name != "original"}
    return {"tokens": rows, **kl}


def _continuation(
    live: Live, tokens: Tensor, edits: Sequence[Edit], choice: dict[str, Any], n: int, seed: int | None
) -> dict[str, Any]:
    """The tokens that follow, as the subject goes on by itself and with the edits made at every token, its own too."""
    n_seen = 0

    def replace(x: Float[Tensor, "batch ctx width"]) -> Float[Tensor, "batch ctx width"]:
        nonlocal n_seen
        skip = max(0, live.first_position - n_seen)
        n_seen += x.shape[1]
        if not edits:
            return x
        new = edited(live, encoded(live, x[1, skip:].float(), choice), edits)
        return torch.stack([x[0], torch.cat([x[1, :skip], new.to(x)])])

    both = tokens.expand(2 if edits else 1, -1)
    found = live.subject.continue_with(both, live.site, replace, n, _chooser(seed))
    texts = [live.subject.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in found.tolist()]
    return {"original": texts[0], "edited": texts[1] if edits else None, "n_tokens": n, "seed": seed}


def _chooser(seed: int | None) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed or 0)

    def choose(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """By the inverse of the distribution function, likeliest first: one uniform number for all rows."""
        if not logits.amax(-1).isfinite().all():
            raise ValueError("with these edits the activations are too large to go on with; give smaller values")
        if seed is None:
            return logits.argmax(-1)
        p, order = logits.double().softmax(-1).sort(descending=True)
        u = torch.rand(1, generator=generator, dtype=torch.float64).to(p)
        rank = (p.cumsum(-1) < u).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        return order.gather(-1, rank)[:, 0]

    return choose
