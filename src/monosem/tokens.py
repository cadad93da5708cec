"""Documents -> contexts of fixed length in which every token remembers its document and its position there.

A document's name is a hash of what it says (`corpora`). The same hash decides whether a document is held out: neither
the seed nor the order of files can move a document from one side to the other.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from monosem.corpora import CUT, FEW_DOCUMENTS, FINE_CUT, Document, Reader, is_stream, seeded_hash
from monosem.textfiles import tidied

log = logging.getLogger("monosem")

_REFUSED = "refused by the chat template"
SEPARATOR_POSITION = -1
"""Position, within its document, of the separator token that follows the document."""

_TOKENIZE_BATCH, _TOKENIZE_CHARS = 256, 1 << 19
"""Documents, and characters, that are tokenized at once: a tokenizer takes 100 to 250 bytes a character."""
_CHARS_PER_TOKEN = 8
"""More than most texts have: so many characters are kept for each token wanted, and more where they were too few."""


class Contexts(NamedTuple):
    """Token `tokens[i, j]` is number `positions[i, j]` of the document `document_hashes[documents[i, j]]`.

    The separator after a document belongs to that document and has position SEPARATOR_POSITION.
    """

    tokens: Int[Tensor, "n ctx"]
    documents: Int[Tensor, "n ctx"]
    positions: Int[Tensor, "n ctx"]
    document_hashes: list[str]


def contexts(
    corpus: str,
    tokenizer: Any,
    *,
    context_length: int,
    n_contexts: int,
    held_out: bool,
    held_out_fraction: float,
    seed: int,
    text_column: str | None = None,
) -> Contexts:
    """`split_contexts` of one side."""
    side = "held_out" if held_out else "train"
    found, _ = split_contexts(
        corpus,
        tokenizer,
        context_length=context_length,
        n_contexts={side: n_contexts},
        held_out_fraction=held_out_fraction,
        seed=seed,
        text_column=text_column,
    )
    return found[side]


def split_contexts(
    corpus: str,
    tokenizer: Any,
    *,
    context_length: int,
    n_contexts: Mapping[str, int],
    held_out_fraction: float,
    seed: int,
    text_column: str | None = None,
) -> tuple[dict[str, Contexts], dict[str, Any]]:
    """The first `n_contexts` contexts of "train" and "held_out" (int32), and what a manifest says of the text.

    Successive documents, in the order of `ordered_documents`, are joined by one separator token (the tokenizer's eos,
    else bos, else sep), with no other special token but those of a chat's template, and cut every `context_length`
    tokens. No more of the corpus is in memory than that takes. `ValueError` when a split has fewer tokens.
    """
    reader = Reader(corpus, text_column)
    wanted = {side: n * context_length for side, n in n_contexts.items()}
    n_documents, budget, cut = None, _CHARS_PER_TOKEN, CUT
    if is_stream(corpus):
        sides = {side: _Side(tokenizer, reader, n) for side, n in wanted.items()}
        for name, document in _distinct(reader.documents(seed, cut)):
            if (own := _side_of(name, held_out_fraction)) in sides:
                sides[own].add(name, document)
            if all(packing.is_full for packing in sides.values()):
                break
        for packing in sides.values():
            packing.flush()
    while not is_stream(corpus):
        kept = {side: _Kept(budget * n) for side, n in wanted.items()}
        n_documents, longest = _sort(reader, kept, seed, cut, held_out_fraction)
        if cut > FINE_CUT and n_documents < FEW_DOCUMENTS and longest > FINE_CUT:
            cut = FINE_CUT
            continue
        sides = {side: kept[side].packed(tokenizer, reader, n) for side, n in wanted.items()}
        if all(sides[side].is_full or kept[side].is_all for side in wanted):
            break
        budget *= 4
    found = {}
    for side, n in n_contexts.items():
        if not sides[side].is_full:
            raise _too_small(reader, side, sides[side], n, context_length, n_documents)
        found[side] = sides[side].contexts(n, context_length)
    return found, {**reader.facts(), "cut_characters": cut}


def documents(corpus: str, text_column: str | None = None) -> Iterator[str]:
    """What every document of the corpus says (`corpora.Document.content`), each once, uncut, in the order it is stored.

    `corpus` is `sae-probes-text`, `python-docstrings`, `hf:NAME[:CONFIG[:SPLIT]]`, or a local file of
    `corpora.SUFFIXES`, perhaps packed, or a folder of them. `ValueError` when it cannot be read.
    """
    return (document.content for _, document in _distinct(Reader(corpus, text_column).documents(seed=0)))


def ordered_documents(corpus: str, seed: int) -> Iterator[str]:
    """All documents as `split_contexts` takes them, in an order drawn from the seed: any prefix is a mixture of the
    whole. It keeps them all in memory, and is what that function is tested against.

    Files are sorted by hash(seed, document). A stream (the hub, the docstrings) keeps its own order but for a bounded
    shuffle, because it may be too long to be read to its end.
    """
    found = list(_distinct(Reader(corpus).documents(seed, CUT)))
    if not is_stream(corpus):
        if len(found) < FEW_DOCUMENTS:
            found = list(_distinct(Reader(corpus).documents(seed, FINE_CUT)))
        found.sort(key=lambda named: seeded_hash(seed, named[0]))
    return (document.content for _, document in found)


def document_hash(document: str) -> str:
    """The name of the document that is this text."""
    return Document(document).name


def is_held_out(document: str, held_out_fraction: float) -> bool:
    """Whether the document of this hash is held out: its hash, read as a number in [0, 1), is below the fraction."""
    return int(document[:16], 16) / 2**64 < held_out_fraction


def separator_token(tokenizer: Any) -> int:
    """The token put after every document: eos, else bos, else sep (BERT's); `ValueError` when there is none of them."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no eos, bos or sep token to separate documents; set its eos_token")


def token_ids(tokenizer: Any, texts: Iterable[str], *, control: bool = False) -> list[list[int]]:
    """The tokens of each text, without special ones; with `control` those that are written out are read as such."""
    # Otherwise "<|endoftext|>" written in a document is text, not a control token.
    # verbose=False: documents longer than the subject's window are expected here, they are cut afterwards.
    options = {"add_special_tokens": False, "split_special_tokens": not control, "verbose": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    found: list[list[int]] = []
    for batch in _batches(texts):
        found += tokenizer(batch, **options)["input_ids"]
    return found


def control_ids(tokenizer: Any) -> set[int]:
    """The ids of the tokenizer's control tokens: those that it calls special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, so many together as are tokenized at once."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TOKENIZE_BATCH or sum(map(len, batch)) >= _TOKENIZE_CHARS:
            yield batch
            batch = []
    if batch:
        yield batch


class _Side:
    """The tokens of one side of the split, until there are as many as wanted."""

    def __init__(self, tokenizer: Any, reader: Reader, wanted: int) -> None:
        self.tokenizer, self.reader, self.wanted = tokenizer, reader, wanted
        self.separator = separator_token(tokenizer)
        self.pieces: list[np.ndarray] = []
        self.hashes: list[str] = []
        self.n_tokens = 0
        self._batch: list[tuple[str, Document]] = []
        self._chars = 0

    @property
    def is_full(self) -> bool:
        return self.n_tokens >= self.wanted

    def add(self, name: str, document: Document) -> None:
        """Take a document, unless there are enough; those of a batch are tokenized together."""
        if not self.is_full:
            self._batch.append((name, document))
            self._chars += len(document.content)
            enough = min(_TOKENIZE_CHARS, _CHARS_PER_TOKEN * (self.wanted - self.n_tokens))
            if len(self._batch) == _TOKENIZE_BATCH or self._chars >= enough:
                self.flush()

    def flush(self) -> None:
        """Tokenize what waits."""
        batch, self._batch, self._chars = self._batch, [], 0
        for (name, _), ids in zip(batch, _tokens_of(self.tokenizer, self.reader, [d for _, d in batch]), strict=True):
            if ids is not None and not self.is_full:
                self.pieces.append(_addressed(ids, len(self.hashes), self.separator))
                self.hashes.append(name)
                self.n_tokens += len(ids) + 1

    def contexts(self, n_contexts: int, context_length: int) -> Contexts:
        packed = np.concatenate(self.pieces, axis=1)[:, : self.wanted].reshape(3, n_contexts, context_length)
        tokens, documents_, positions = (torch.from_numpy(np.ascontiguousarray(a)) for a in packed)
        return Contexts(tokens, documents_, positions, self.hashes)


class _Kept:
    """The documents of one side that come first in the order, as many as `budget` characters hold."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.is_all = True
        self._heap: list[tuple[int, str, Document]] = []  # the last of the order is first here
        self._names: set[str] = set()
        self._chars = 0

    def offer(self, name: str, document: Document, seed: int) -> None:
        """Keep the document, if it is among the first and not there already; let go of what is no longer."""
        order = -int.from_bytes(seeded_hash(seed, name))
        if name in self._names or (not self.is_all and order < self._heap[0][0]):
            return
        heapq.heappush(self._heap, (order, name, document))
        self._names.add(name)
        self._chars += len(document.content)
        while self._chars - len(self._heap[0][2].content) >= self.budget:
            _, dropped, last = heapq.heappop(self._heap)
            self._names.remove(dropped)
            self._chars -= len(last.content)
            self.is_all = False

    def packed(self, tokenizer: Any, reader: Reader, wanted: int) -> _Side:
        side = _Side(tokenizer, reader, wanted)
        for _, name, document in sorted(self._heap, reverse=True):
            side.add(name, document)
        side.flush()
        return side


def _sort(reader: Reader, kept: dict[str, _Kept], seed: int, cut: int, held_out_fraction: float) -> tuple[int, int]:
    """Offer every document to its side; returns how many different ones there are (few are counted) and the longest."""
    names: set[str] = set()
    longest = 0
    for document in reader.documents(seed, cut):
        name = document.name
        if len(names) < FEW_DOCUMENTS:
            names.add(name)
        longest = max(longest, len(document.content))
        if (side := _side_of(name, held_out_fraction)) in kept:
            kept[side].offer(name, document, seed)
    return len(names), longest


def _side_of(name: str, held_out_fraction: float) -> str:
    return "held_out" if is_held_out(name, held_out_fraction) else "train"


def _distinct(found: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    seen: set[str] = set()
    for document in found:
        if (name := document.name) not in seen:
            seen.add(name)
            yield name, document


def _addressed(ids: list[int], document: int, separator: int) -> np.ndarray:
    """[3, len(ids) + 1]: tokens, document, positions, with the separator at the end."""
    rows = np.empty((3, len(ids) + 1), dtype=np.int32)
    rows[0, :-1], rows[0, -1] = ids, separator
    rows[1] = document
    rows[2, :-1], rows[2, -1] = np.arange(len(ids)), SEPARATOR_POSITION
    return rows


def _tokens_of(tokenizer: Any, reader: Reader, batch: list[Document]) -> list[list[int] | None]:
    """The tokens of each document; None, and a count in the reader, for a chat that the template refuses."""
    found: list[list[int] | None] = [None] * len(batch)
    for control, kind in ((False, "text"), (True, "chat")):
        texts: dict[int, str] = {}
        for i, document in enumerate(batch):
            if document.kind == kind:
                text = _rendered(tokenizer, reader, document) if control else document.content
                texts |= {} if text is None else {i: text}
        if texts:
            for i, ids in zip(texts, token_ids(tokenizer, texts.values(), control=control), strict=True):
                found[i] = ids
    for i, document in enumerate(batch):
        if document.kind == "token ids":
            found[i] = own = list(map(int, document.content.split(" ")))
            if wrong := [token for token in own if not 0 <= token < len(tokenizer)]:
                raise ValueError(
                    f"corpus {reader.corpus} has token id {wrong[0]} in {reader.column!r}, but the subject's tokenizer "
                    f"has ids 0 to {len(tokenizer) - 1}; give ids of this tokenizer, or a column of text (text_column)"
                )
    return found


def _rendered(tokenizer: Any, reader: Reader, chat: Document) -> str | None:
    """The chat as the subject was trained to read it, by the tokenizer's template; None where that refuses it.

    A template made for pictures too takes a message's content as parts: one that leaves out all that is said is given
    those, and refuses the chat if it leaves that out as well.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"corpus {reader.corpus} holds chats ({reader.column}), but the subject's tokenizer has no chat template; "
            "give a chat-tuned subject, or a column of text (text_column)"
        )
    messages = json.loads(chat.content)
    words = [message["content"].split()[0] for message in messages if message["content"].strip()]
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    reasons = []
    for said in (messages, in_parts):
        try:
            found = tidied(str(tokenizer.apply_chat_template(said, tokenize=False)))
            if not words or any(word in found for word in words):
                return found
            reasons.append("it leaves out what is said")
        except Exception as error:  # a template is a program of other people
            reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0][:200])
    reader.reason = reasons[0]
    log.debug("the chat template refuses a chat: %s", reader.reason)
    reader.skip(_REFUSED)
    return None


def _too_small(
    reader: Reader, side: str, found: _Side, n_contexts: int, context_length: int, n_documents: int | None
) -> ValueError:
    held_out = side == "held_out"
    name, remedy = ("held-out", "held_out_fraction up or n_tokens_held_out") if held_out else ("training", "n_tokens")
    if n_documents == 1 and not found.n_tokens:
        return ValueError(
            f"corpus {reader.corpus} has 0 {name} tokens: it is one document, which cannot be on both "
            f"sides of the split, and up to {FINE_CUT:,} characters are not cut; give more text"
        )
    if n_refused := reader.skipped[_REFUSED]:
        return ValueError(
            f"corpus {reader.corpus} has {found.n_tokens:,} {name} tokens of {found.wanted:,}: {n_refused:,} chats are "
            f"{_REFUSED} ({reader.reason}); give chats that it takes, or a column of text (text_column)"
        )
    return ValueError(
        f"corpus {reader.corpus} has {found.n_tokens:,} {name} tokens, but {n_contexts:,} contexts of {context_length} "
        f"need {found.wanted:,}; give a larger corpus or turn {remedy} down (or block_contexts: whole blocks are made)"
    )
