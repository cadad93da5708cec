"""RUN/explain/words.sqlite: what people read and search of each latent. Standard library and numpy only.

    latents(latent INTEGER PRIMARY KEY, explanation TEXT, n2g_rule TEXT, top_tokens TEXT)
    latents_fts: FTS5 (explanation, top_tokens, examples), rowid = latent

Written a batch of latents at a time into a temporary file that is then renamed.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from monosem import artifacts

FILE = "words.sqlite"
N_TOKENS, N_TEXTS, N_PATTERNS, N_STEPS = 8, 8, 4, 8
"""Different peak tokens, texts to search, patterns to read and tokens of each, at most."""
BEFORE, AFTER = 10, 4
"""Tokens around a peak that can be searched."""
ANY, START = -1, -2
"""As in `monosem.n2g`, which needs torch."""
_LATENTS_AT_ONCE = 1024

Rule = Sequence[tuple[Sequence[int], float]]
"""Pairs of a pattern and its activation."""


def write(folder: Path, n_latents: int, rules: Mapping[int, Rule]) -> None:
    """Make the file from the columns in `folder` and the rules that there are."""

    def save(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(temporary)) as database:
            database.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"  # half a file is thrown away
                "CREATE TABLE latents(latent INTEGER PRIMARY KEY, explanation TEXT, n2g_rule TEXT, top_tokens TEXT);"
                "CREATE VIRTUAL TABLE latents_fts USING fts5(explanation, top_tokens, examples);"
            )
            for rows in _batches(folder, n_latents, rules):
                database.executemany("INSERT INTO latents VALUES (?, ?, ?, ?)", [row[:4] for row in rows])
                searched = [(latent, explanation, top, text) for latent, explanation, _, top, text in rows]
                sql = "INSERT INTO latents_fts(rowid, explanation, top_tokens, examples) VALUES (?, ?, ?, ?)"
                database.executemany(sql, searched)
                database.commit()

    artifacts.write_atomic(folder / FILE, save)


def _batches(
    folder: Path, n_latents: int, rules: Mapping[int, Rule]
) -> Iterator[list[tuple[int, str, str | None, str, str]]]:
    texts = artifacts.read_json(folder / "vocabulary.json", halves=True)
    vocabulary = [text.encode("utf-8", "replace").decode() for text in texts]  # SQLite takes no half of a character
    which, where, contexts = (
        np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("top_context", "top_position", "contexts")
    )
    for start in range(0, n_latents, _LATENTS_AT_ONCE):
        rows = []
        for latent in range(start, min(start + _LATENTS_AT_ONCE, n_latents)):
            there = which[latent] >= 0
            tokens, peaks = contexts[which[latent][there]], where[latent][there]
            rule = rules.get(latent)
            text = "\n".join(
                _text(row[max(0, peak - BEFORE) : peak + AFTER + 1], vocabulary)
                for row, peak in zip(tokens[:N_TEXTS].tolist(), peaks[:N_TEXTS].tolist(), strict=True)
            )
            rows.append((
                latent,
                explanation(rule, vocabulary) if rule else "",
                json.dumps(rule) if rule else None,
                top_tokens(tokens[np.arange(len(tokens)), peaks].tolist(), vocabulary),
                text,
            ))  # fmt: skip
        yield rows


def top_tokens(tokens: Sequence[int], vocabulary: Sequence[str]) -> str:
    """The texts of the tokens, most frequent first (of equally frequent ones the earlier), separated by spaces."""
    counts = Counter(_shown(vocabulary[token]).strip() for token in tokens)
    return " ".join(text for text, _ in counts.most_common(N_TOKENS) if text)


def explanation(rule: Rule, vocabulary: Sequence[str]) -> str:
    """The strongest patterns in reading order: “of the” or “in … of”; ^ is the start of a text, … any tokens.

    Any tokens at the front say nothing and are left out, so that patterns may read alike; each is said once.
    """
    strongest = sorted(rule, key=lambda pair: -pair[1])
    shown = list(dict.fromkeys(f"“{_pattern(pattern, vocabulary)}”" for pattern, _ in strongest))
    more = f" or {len(shown) - N_PATTERNS} more" if len(shown) > N_PATTERNS else ""
    return " or ".join(shown[:N_PATTERNS]) + more


def _pattern(pattern: Sequence[int], vocabulary: Sequence[str]) -> str:
    steps = [_step(step, vocabulary) for step in pattern[:N_STEPS][::-1]]
    cut = "… " if len(pattern) > N_STEPS else ""
    steps = [step for i, step in enumerate(steps) if step != _ANY_SHOWN or (i and steps[i - 1] != _ANY_SHOWN)]
    return cut + ("".join(steps).strip() or "…")


_ANY_SHOWN = " …"


def _step(step: int, vocabulary: Sequence[str]) -> str:
    return {ANY: _ANY_SHOWN, START: "^"}.get(step) or _shown(vocabulary[step])


def _shown(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→").replace("\0", "␀")


def _text(tokens: Sequence[int], vocabulary: Sequence[str]) -> str:
    return "".join(vocabulary[token] for token in tokens).replace("\0", "␀")
