"""N2G: rules that predict a latent's activation from tokens alone (Foote et al. 2023; Gao et al. 2024, section 4.3).

    reader   = LatentReader(subject, autoencoder, site)
    examples = collect(reader.stream(tokens, latents), latents, n_top=16, n_random=16, seed=0)
    rules    = build(reader, examples)
    acts     = predict(rules[0], other_tokens)              # [n_contexts, ctx], without running any model

A rule is a trie of reversed token patterns, kept as a dict from pattern to activation. A pattern lists tokens from the
one that fires (the pivot) backwards; ANY matches any token, START (last, if at all) matches the start of a text.

From one example, a text that ends at its pivot with activation a:
    1. prune     the shortest suffix on which the latent keeps at least a / 2
    2. pad test  behind the padding token the suffix keeps less than a / 2: the pattern ends in START
    3. saliency  of a token: 1 - act' / act, act being the pruned suffix's and act' its with the token replaced by the
                 padding token. Below 1/2 the token becomes ANY, the pivot too
    4. insert    the pattern with the pruned suffix's activation; the mean of those that give the same pattern

Every text runs behind one prefix token (BOS), so that its first token does not become the attention sink.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem.logs import progress
from monosem.model import Autoencoder
from monosem.packing import Row, lay_out, pack
from monosem.subject import Layout, Subject
from monosem.torch_state import pinned, pinned_methods
from monosem.types import FIRED_THRESHOLD, Site, SparseLatents

log = logging.getLogger("monosem")

ANY, START = -1, -2
KEPT = 0.5
"""Share of the original activation that a pruned or padded text must keep, and the least saliency of a token."""

_TOKENS_AT_ONCE = 4096  # of one forward pass
_ROW_SIZE = 128  # of packed texts: attention's share of the time grows with it, what rows repeat shrinks
_PACKED_TOLERANCE = 1e-3  # relative; rounding makes it some 1e-6

T = TypeVar("T")
Text = tuple[int, ...]
Pattern = tuple[int, ...]
Rule = dict[Pattern, float]
Stream = Iterable[tuple[Int[Tensor, "batch ctx"], Float[Tensor, "batch ctx m"]]]
"""Texts, and the activations of some latents at their tokens."""


class Examples(NamedTuple):
    """Contexts on which one latent fires: the strongest, then others at random; none occurs twice."""

    latent: int
    tokens: Int[Tensor, "n ctx"]
    activations: Float[Tensor, "n ctx"]
    pivots: Int[Tensor, " n"]
    """Where in each context the latent fires most."""
    n_contexts_fired: int
    """Contexts of the whole stream on which it fired; 0 for a latent that never did, which has no example."""


class LatentReader:
    """Which latents fire on a text, and how much: subject behind its prefix token, autoencoder with its own top k.

    A latent's activation is the released autoencoder's, so it is 0 wherever the latent is not among the k largest.
    """

    packs = False
    """Whether texts share rows (`packing`): in fp32 alone, as in bf16 other batches give other activations."""

    def __init__(self, subject: Subject, autoencoder: Autoencoder, site: Site) -> None:
        if not subject.has_logits:
            raise ValueError(f"{subject.name} is an encoder: its activations also depend on the text after a token")
        if (width := subject.site_width(site)) != autoencoder.config.d_model:
            raise ValueError(f"{site} is {width} wide; this autoencoder reads width {autoencoder.config.d_model}")
        self.subject, self.autoencoder, self.site = subject, autoencoder, site
        self.n_latents = autoencoder.config.n_latents
        self.longest_text = subject.max_context - 2
        """Tokens of a text that fit behind the prefix token and the padding token."""
        self.padding_token = padding_token(subject.tokenizer)
        self.packs = subject.dtype == torch.float32
        self._packs_up_to = 0  # tokens of a text, as far as that is known

    @pinned_methods
    @torch.no_grad()
    def read(self, tokens: Int[Tensor, "batch ctx"], *, last: bool = False) -> SparseLatents:
        """The latents of every token, in reading order, or of the last token of each text only."""
        prefix = tokens.new_full((len(tokens), 1), self.subject.prefix_token)
        raw = self.subject.capture(torch.cat([prefix, tokens], dim=1), self.site)[:, -1 if last else 1 :]
        return self._encode(raw.flatten(0, 1))

    def _encode(self, raw: Float[Tensor, "n width"]) -> SparseLatents:
        x, _ = self.autoencoder.normalize(raw)
        return self.autoencoder.encode(x)

    def stream(self, tokens: Int[Tensor, "n_contexts ctx"], latents: Int[Tensor, " m"]) -> Stream:
        """All contexts, a batch at a time."""
        context_length = tokens.shape[1]
        self._check_length(context_length)
        batches = tokens.split(max(1, _TOKENS_AT_ONCE // context_length))
        each = batches[0].numel()
        for batch in progress(batches, "read latents", "tok", total=len(batches) * each, each=each):
            yield batch, columns(self.read(batch), latents).unflatten(0, batch.shape)

    @pinned_methods
    def at_last(self, texts: Sequence[tuple[int, ...]], latents: Sequence[int]) -> list[float]:
        """The activation of `latents[i]` at the last token of `texts[i]`.

        A text that occurs several times runs once, and so do the beginnings of texts where the reader packs; else
        texts of equal length run together, without padding.
        """
        wanted: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for request, text in enumerate(texts):
            wanted[text].append(request)
        longest = max(map(len, wanted), default=0)
        self._check_length(longest - 1)  # one of them may be the padding token
        found = [0.0] * len(texts)
        for batch, read in self._packed(wanted) if self._may_pack(longest) else self._by_length(wanted):
            pairs = [(row, request) for row, text in enumerate(batch) for request in wanted[text]]
            rows = torch.tensor([row for row, _ in pairs])
            asked = torch.tensor([latents[request] for _, request in pairs])[:, None]
            indices, values = read.indices.cpu()[rows], read.values.cpu()[rows]
            for (_, request), value in zip(pairs, (values * (indices == asked)).sum(1).tolist(), strict=True):
                found[request] = value
        return found

    def _by_length(self, texts: Iterable[Text]) -> Iterator[tuple[list[Text], SparseLatents]]:
        """Batches of texts of equal length, and the latents of their last tokens."""
        for length, group in itertools.groupby(sorted(texts, key=len), key=len):
            for batch in _batches(list(group), max(1, _TOKENS_AT_ONCE // (length + 1))):
                yield batch, self.read(torch.tensor(batch), last=True)

    @torch.no_grad()
    def _packed(self, texts: Iterable[Text]) -> Iterator[tuple[list[Text], SparseLatents]]:
        """Batches of texts in rows in which common beginnings are there once, and the latents of their last tokens."""
        rows = list(pack(texts, prefix=self.subject.prefix_token, size=_ROW_SIZE))
        size = max((len(row.tokens) for row in rows), default=1)
        for batch in _batches(rows, max(1, _TOKENS_AT_ONCE // size)):
            yield [text for row in batch for text, _ in row.ends], self._encode(self._capture_packed(batch))

    def _capture_packed(self, rows: list[Row]) -> Float[Tensor, "n width"]:
        tokens, positions, sees = lay_out(rows)
        raw = self.subject.capture(tokens, self.site, layout=Layout(positions, sees))
        ends = [(r, node) for r, row in enumerate(rows) for _, node in row.ends]
        row, node = torch.tensor(ends).T
        return raw[row, node]

    def _may_pack(self, longest: int) -> bool:
        """Whether texts of that length, packed, read as they do alone; found out where it is not known yet."""
        if self.packs and longest > self._packs_up_to:
            self._packs_up_to = min(max(64, 2 * longest), self.subject.max_context - 1)
            self.packs = self._packs_well(self._packs_up_to)
        return self.packs

    @torch.no_grad()
    def _packs_well(self, length: int) -> bool:
        """Whether the subject's attention takes a layout, for texts of this length; else the log says so."""
        text = tuple(7919 * i % self.subject.vocab_size for i in range(length))
        texts = sorted([text, text[: length // 2], _with(text, length // 2, self.padding_token)])
        try:
            (row,) = pack(texts, prefix=self.subject.prefix_token, size=4 * length)
            packed = self._capture_packed([row])
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            log.info("%s takes no packed texts (%s); they run apart", self.subject.name, type(error).__name__)
            return False
        alone = [torch.tensor([[self.subject.prefix_token, *text]]) for text in texts]
        plain = torch.stack([self.subject.capture(tokens, self.site)[0, -1] for tokens in alone])
        off = ((packed - plain).norm(dim=1) / plain.norm(dim=1)).max().item()
        if not off <= _PACKED_TOLERANCE:
            log.info("%s reads packed texts with an error of %.2g; they run apart", self.subject.name, off)
        return off <= _PACKED_TOLERANCE

    def _check_length(self, context_length: int) -> None:
        if context_length > self.longest_text:
            raise ValueError(
                f"texts of {context_length} tokens; behind a prefix and a padding token this subject reads at most "
                f"{self.longest_text}: give shorter contexts"
            )


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def padding_token(tokenizer: Any) -> int:
    """The token put in place of others: the last of " _", which is GPT-2's 4808 (the released code's choice).

    Where a tokenizer makes nothing of that: the unknown token, padding or token 0.
    """
    found = tokenizer.encode(" _", add_special_tokens=False)
    choices = (*found[-1:], tokenizer.unk_token_id, tokenizer.pad_token_id)
    return next((int(token) for token in choices if token is not None), 0)


def sample_latents(n_latents: int, n: int, seed: int) -> Int[Tensor, " n"]:
    """`n` of the latents, uniformly at random, in rising order: dead and never-firing ones may be among them."""
    if not 1 <= n <= n_latents:
        raise ValueError(f"{n} latents asked for; the autoencoder has {n_latents}: choose from 1 to that")
    return torch.randperm(n_latents, generator=torch.Generator().manual_seed(seed))[:n].sort().values


def columns(latents: SparseLatents, which: Int[Tensor, " m"]) -> Float[Tensor, "batch m"]:
    """The activations of some latents, dense."""
    column = torch.full((latents.n_latents,), -1)
    column[which] = torch.arange(len(which))
    here = column[latents.indices.cpu().long()]
    rows, slots = ((here >= 0) & (latents.values.cpu() > 0)).nonzero(as_tuple=True)
    dense = torch.zeros(len(here), len(which))
    dense[rows, here[rows, slots]] = latents.values.cpu()[rows, slots]
    return dense


@pinned
def collect(stream: Stream, latents: Int[Tensor, " m"], *, n_top: int, n_random: int, seed: int) -> list[Examples]:
    """For each latent its `n_top` strongest contexts, and `n_random` drawn uniformly among all on which it fires.

    One pass; memory is O(m (n_top + n_random) ctx) however long the stream. The same stream and seed give the same
    examples. `ValueError` when the stream is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    top, drawn = _Best(len(latents), n_top), _Best(len(latents), n_random)
    fired, n_seen = torch.zeros(len(latents), dtype=torch.int64), 0
    for tokens, activations in stream:
        strongest = activations.amax(1).T  # [m, batch]
        fires = strongest > FIRED_THRESHOLD
        contexts = _Contexts(torch.arange(n_seen, n_seen + len(tokens)), tokens, activations.permute(2, 0, 1))
        keys = torch.rand(len(tokens), len(latents), generator=generator).T
        top.offer(strongest.masked_fill(~fires, -torch.inf), contexts)
        drawn.offer(keys.masked_fill(~fires, -torch.inf), contexts)
        fired, n_seen = fired + fires.sum(1), n_seen + len(tokens)
    if n_seen == 0:
        raise ValueError("no context to collect examples from; give more text")
    return [_examples(int(i), m, top, drawn, int(fired[m])) for m, i in enumerate(latents)]


class _Contexts(NamedTuple):
    numbers: Int[Tensor, " batch"]
    tokens: Int[Tensor, "batch ctx"]
    activations: Float[Tensor, "m batch ctx"]


class _Best:
    """For each latent the contexts with the largest keys so far; a key of -inf is never kept for long."""

    def __init__(self, m: int, n: int) -> None:
        self.m, self.n = m, n
        self.keys = torch.empty(m, 0)
        self.numbers, self.tokens, self.activations = torch.empty(0), torch.empty(0), torch.empty(0)

    def offer(self, keys: Float[Tensor, "m batch"], new: _Contexts) -> None:
        offered: tuple[Tensor, ...] = new.numbers.expand(self.m, -1), new.tokens.expand(self.m, -1, -1), new.activations
        if self.keys.numel():
            keys = torch.cat([self.keys, keys], dim=1)
            kept_so_far = self.numbers, self.tokens, self.activations
            offered = tuple(torch.cat(pair, dim=1) for pair in zip(kept_so_far, offered, strict=True))
        order = keys.sort(dim=1, descending=True, stable=True)  # of equal keys the earlier context stays
        self.keys, kept = order.values[:, : self.n], order.indices[:, : self.n]
        every = torch.arange(self.m)[:, None]
        self.numbers, self.tokens, self.activations = (part[every, kept] for part in offered)


def _examples(latent: int, m: int, top: _Best, drawn: _Best, n_contexts_fired: int) -> Examples:
    sources = [(best, slot) for best in (top, drawn) for slot in range(best.keys.shape[1])]
    chosen: dict[int, tuple[_Best, int]] = {}
    for best, slot in sources:
        if best.keys[m, slot] > -torch.inf:
            chosen.setdefault(int(best.numbers[m, slot]), (best, slot))
    width = top.tokens.shape[-1]
    tokens, activations = torch.zeros(len(chosen), width, dtype=torch.int64), torch.zeros(len(chosen), width)
    for row, (best, slot) in enumerate(chosen.values()):
        tokens[row], activations[row] = best.tokens[m, slot], best.activations[m, slot]
    return Examples(latent, tokens, activations, activations.argmax(1), n_contexts_fired)


class _Text(NamedTuple):
    """Tokens up to a pivot, the latent's activation there, and the activation in the whole context."""

    latent: int
    tokens: tuple[int, ...]
    activation: float
    original: float


@pinned
def build(reader: LatentReader, examples: Sequence[Examples]) -> list[Rule]:
    """One rule a latent, empty for a latent without examples. All share their forward passes.

    `ValueError` when contexts are longer than the subject reads behind a prefix and a padding token.
    """
    pruned = _prune(reader, [text for of_latent in examples for text in _texts(of_latent)])
    gathered: dict[int, dict[Pattern, list[float]]] = {of_latent.latent: defaultdict(list) for of_latent in examples}
    for text, pattern in zip(pruned, _patterns(reader, pruned), strict=True):
        gathered[text.latent][pattern].append(text.activation)
    return [
        {pattern: sum(values) / len(values) for pattern, values in gathered[of_latent.latent].items()}
        for of_latent in examples
    ]


def _texts(examples: Examples) -> Iterator[_Text]:
    for tokens, activations, pivot in zip(
        examples.tokens.tolist(), examples.activations.tolist(), examples.pivots.tolist(), strict=True
    ):
        yield _Text(examples.latent, tuple(tokens[: pivot + 1]), activations[pivot], activations[pivot])


def _prune(reader: LatentReader, texts: list[_Text]) -> list[_Text]:
    """Each text's shortest suffix that keeps half its activation (itself, where rounding lets none).

    Suffixes are tried in rounds of growing length, so that the many latents that need a word or two are done early:
    one length a round where texts are packed, as then small rounds cost little.
    """
    found: dict[int, _Text] = {}
    longest = max((len(text.tokens) for text in texts), default=0)
    below, up_to = 0, 1 if reader.packs else 2
    while below < longest:
        asked = [
            (i, text.tokens[-length:])
            for i, text in enumerate(texts)
            if i not in found
            for length in range(below + 1, min(up_to, len(text.tokens)) + 1)
        ]
        values = reader.at_last([suffix for _, suffix in asked], [texts[i].latent for i, _ in asked])
        for (i, suffix), value in zip(asked, values, strict=True):
            if i not in found and value >= KEPT * texts[i].original:
                found[i] = texts[i]._replace(tokens=suffix, activation=value)
        below, up_to = up_to, up_to + 1 if reader.packs else 2 * up_to
    return [found.get(i, text) for i, text in enumerate(texts)]


def _patterns(reader: LatentReader, pruned: list[_Text]) -> list[Pattern]:
    """The pattern of each pruned text, by its pad test and saliencies."""
    padding = reader.padding_token
    asked = [
        (text.latent, variant)
        for text in pruned
        for variant in ((padding, *text.tokens), *(_with(text.tokens, i, padding) for i in range(len(text.tokens))))
    ]
    values = iter(reader.at_last([variant for _, variant in asked], [latent for latent, _ in asked]))
    found = []
    for text in pruned:
        padded, *replaced = itertools.islice(values, 1 + len(text.tokens))
        salient = [1 - value / text.activation >= KEPT for value in replaced]
        pattern = [token if kept else ANY for token, kept in zip(text.tokens, salient, strict=True)][::-1]
        found.append((*pattern, START) if padded < KEPT * text.original else tuple(pattern))
    return found


def _with(tokens: tuple[int, ...], i: int, new: int) -> tuple[int, ...]:
    return (*tokens[:i], new, *tokens[i + 1 :])


@pinned
def predict(
    rule: Rule, tokens: Int[Tensor, "n_contexts ctx"], *, compatible: bool = False
) -> Float[Tensor, "n_contexts ctx"]:
    """The activation that the rule predicts at every token; 0 where no pattern matches.

    Of the patterns that match, the longest decides (START counts as one); of equally long ones the one that, going
    back from the pivot, first has a token where the other has ANY.

    `compatible`: the released code's walk. At each token it goes to the child of that token, else to ANY's, never
    comes back to try the other, and stops at the first pattern that is complete.
    """
    trie = _trie(rule, int(tokens.max()) + 1 if tokens.numel() else 1)
    flat = tokens.cpu().numpy().astype(np.int64).ravel()
    found = np.zeros(len(flat), dtype=np.float32)
    at, node, depth = np.arange(len(flat)), np.zeros(len(flat), dtype=np.int64), 0  # candidates, by precedence
    position = at % max(1, tokens.shape[1])
    while len(at):
        complete = ~np.isnan(trie.activation[node])
        _first_of_each(found, at[complete], trie.activation[node[complete]])
        if compatible:
            at, node = at[~complete], node[~complete]
        ended = position[at] < depth
        start = trie.start[node[ended]]
        _first_of_each(found, at[ended][start >= 0], trie.activation[start[start >= 0]])
        at, node = at[~ended], node[~ended]
        exact, wild = trie.child(node, flat[at - depth]), trie.any[node]
        if compatible:
            node = np.where(exact >= 0, exact, wild)
        else:
            at, node = at.repeat(2), np.stack([exact, wild], axis=1).ravel()
        at, node, depth = at[node >= 0], node[node >= 0], depth + 1
    return torch.from_numpy(found).view(tokens.shape)


def _first_of_each(found: np.ndarray, at: np.ndarray, values: np.ndarray) -> None:
    """found[p] = the first of the values for p; `at` is sorted."""
    first = np.ones(len(at), dtype=bool)
    first[1:] = at[1:] != at[:-1]
    found[at[first]] = values[first]


class _Trie(NamedTuple):
    """Patterns as numbered nodes, 0 being the root; -1 is no child, NaN no pattern that ends here."""

    edges: np.ndarray
    """node * span + token of every edge that is a token, sorted."""
    children: np.ndarray
    any: np.ndarray
    start: np.ndarray
    activation: np.ndarray
    span: int

    def child(self, node: np.ndarray, token: np.ndarray) -> np.ndarray:
        key = node * self.span + token
        if not len(self.edges):
            return np.full(len(key), -1)
        slot = np.searchsorted(self.edges, key).clip(max=len(self.edges) - 1)
        return np.where(self.edges[slot] == key, self.children[slot], -1)


def _trie(rule: Rule, span: int) -> _Trie:
    span = max([span, *(step + 1 for pattern in rule for step in pattern)])
    children: dict[tuple[int, int], int] = {}
    activations: dict[int, float] = {}
    for pattern, value in rule.items():
        node = 0
        for step in pattern:
            node = children.setdefault((node, step), len(children) + 1)
        activations[node] = value
    special = {step: np.full(len(children) + 1, -1) for step in (ANY, START)}
    activation = np.full(len(children) + 1, np.nan)
    edges = {}
    for (node, step), child in children.items():
        if step in special:
            special[step][node] = child
        else:
            edges[node * span + step] = child
    for node, value in activations.items():
        activation[node] = value
    keys = np.array(sorted(edges), dtype=np.int64)
    return _Trie(keys, np.array([edges[k] for k in keys], np.int64), special[ANY], special[START], activation, span)
