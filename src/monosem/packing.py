"""Texts that begin alike, packed into rows in which a common beginning is there once.

    rows = list(pack([(5, 7), (5, 7, 2), (5, 9)], prefix=0, size=8))    # one row: 0 5 7 2 9
    laid = lay_out(rows)                                                 # tokens, positions, who sees whom

Each node of a row is a token that sees itself and what is before it in its text, at the position it has there. A causal
subject then gives it what it would give the last token of a text that ends there, up to rounding. Texts of which N2G
alters a token begin alike up to there, so that packing halves their tokens; and rows of one size leave little padding,
however the lengths differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

Text = tuple[int, ...]


class Row(NamedTuple):
    """Nodes in an order in which each comes after its parent; the first is the prefix token."""

    tokens: list[int]
    parents: list[int]
    """-1 for the prefix token."""
    ends: list[tuple[Text, int]]
    """Each text, and the node that it ends at."""


class Packed(NamedTuple):
    """Rows as a subject takes them; what fills up a row is the prefix token, which only sees itself."""

    tokens: Int[Tensor, "rows size"]
    positions: Int[Tensor, "rows size"]
    sees: Bool[Tensor, "rows size size"]


def pack(texts: Iterable[Text], *, prefix: int, size: int) -> Iterator[Row]:
    """The texts, each different, in rows of much the same size: at most `size` nodes, or one text that needs more."""
    ordered = sorted(texts)
    shared = [_n_shared(before, text) for before, text in zip([(), *ordered], ordered, strict=False)]
    n_nodes = sum(len(text) - n for text, n in zip(ordered, shared, strict=True))
    size = min(size, -(-n_nodes // -(-n_nodes // size or 1)) + max(map(len, ordered), default=0) + 1)
    row, path = Row([prefix], [-1], []), [0]  # path: the nodes of the text before, the prefix token first
    for text, n in zip(ordered, shared, strict=True):
        if row.ends and len(row.tokens) + len(text) - n > size:
            yield row
            row, path, n = Row([prefix], [-1], []), [0], 0
        del path[1 + n :]
        for token in text[n:]:
            row.parents.append(path[-1])
            path.append(len(row.tokens))
            row.tokens.append(token)
        row.ends.append((text, path[-1]))
    if row.ends:
        yield row


def _n_shared(a: Text, b: Text) -> int:
    """How many tokens the two begin with in common."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def lay_out(rows: Sequence[Row]) -> Packed:
    """The rows beside one another, filled up to the longest."""
    size = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), size), rows[0].tokens[0])
    positions = np.zeros((len(rows), size), dtype=np.int64)
    sees = np.broadcast_to(np.eye(size, dtype=bool), (len(rows), size, size)).copy()
    for r, row in enumerate(rows):
        tokens[r, : len(row.tokens)] = row.tokens
        for node, parent in enumerate(row.parents[1:], start=1):
            sees[r, node] |= sees[r, parent]
            positions[r, node] = positions[r, parent] + 1
    return Packed(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(sees))
