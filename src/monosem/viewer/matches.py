"""Which latents of one autoencoder are in another, both ways, in blocks of bounded memory; of large pairs kept on disk.

By direction: the other's latent with the largest cosine between decoder rows, all pairs compared. By firing together,
where both were explained on the same tokens: the other's latent with the largest Jaccard index |tokens with both| /
|tokens with either|, over the tokens on which each is active in its strongest contexts (`top_activations`), since those
are what an explanation keeps.

RUN/compare/HASH-directions.safetensors and HASH-together.safetensors keep what takes long (docs/formats.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosem import artifacts
from monosem.viewer import files
from monosem.viewer.reading import Run

log = logging.getLogger("monosem")

KIND = "latent-matches"
KEPT_FROM = 1 << 28
"""Pairs of latents from which on matches are kept on disk: fewer take a second or two."""
MIN_TOGETHER = 5
"""Tokens on which two latents have to meet, below which their Jaccard index is noise."""
_ROWS_AT_ONCE = 2048
_LATENTS_AT_ONCE = 512
_N_RANDOM = 512
_IN_MEMORY = 4

Pairs = tuple[np.ndarray, np.ndarray]
"""Tokens and latents, a pair wherever one is active; each pair once."""


class Best(NamedTuple):
    """For each latent its best match on the other side (-1: none) and how good it is."""

    latent: np.ndarray
    score: np.ndarray


class Reason(NamedTuple):
    """Why something was not computed, and the command after which it can be."""

    text: str
    command: str


class Matches(NamedTuple):
    """Best matches of a's latents and of b's."""

    cosine: tuple[Best, Best]
    together: tuple[Best, Best] | None
    reason: Reason | None
    """Why `together` was not computed."""
    chance: float
    """Mean over random directions of the largest cosine with a latent of b."""


class Matching:
    """A matching under way: its result, and the share of it that is done."""

    def __init__(self) -> None:
        self.future: Future[Matches] = Future()
        self.done = 0.0

    def at(self, share: float) -> None:
        self.done = share

    @property
    def failed(self) -> bool:
        return self.future.done() and self.future.exception() is not None


_POOL = ThreadPoolExecutor(1, "compare")
_FOUND: dict[tuple[Any, ...], Matching] = {}
_LOCK = threading.Lock()


def matching(a: Run, b: Run, *, keep: bool) -> Matching:
    """`match`, begun once and then kept in memory; of the latest few pairs."""
    key = (a.folder, a.stamp, b.folder, b.stamp)
    with _LOCK:
        if key not in _FOUND or _FOUND[key].failed:
            _FOUND.pop(key, None)
            while len(_FOUND) >= _IN_MEMORY:
                _FOUND.pop(next(iter(_FOUND)))
            _FOUND[key] = begun = Matching()
            begun.future = _POOL.submit(_match, a, b, keep, begun.at)
        return _FOUND[key]


def _match(a: Run, b: Run, keep: bool, at: Callable[[float], None]) -> Matches:
    with files.reading(f"{a.folder} or {b.folder}"):
        return match(a, b, keep=keep, at=at)


def match(a: Run, b: Run, *, keep: bool = False, at: Callable[[float], None] = lambda share: None) -> Matches:
    """Every latent's best match, both ways; `keep` large ones on disk. `ValueError` when the weights cannot be read."""
    reason = not_on_the_same_tokens(a, b)
    of = {name: run.facts["weights_sha256"] for name, run in (("a", a), ("b", b))}
    keep = keep and a.n_latents * b.n_latents >= KEPT_FROM
    path = a.folder / "compare" / of["b"][:16]

    def directions() -> tuple[tuple[Best, Best], float]:
        x, y = Decoder(a), Decoder(b)
        random = np.random.default_rng(0).standard_normal((_N_RANDOM, x.width), dtype=np.float32)
        return best_cosines(x, y, at), float(best_cosines(random, y)[0].score.mean())

    def together() -> tuple[tuple[Best, Best], float]:
        numbers, n_tokens = token_numbers(a, b)
        active = [Active(run, own) for run, own in zip((a, b), numbers, strict=True)]
        return best_together(active[0], active[1], a.n_latents, b.n_latents, n_tokens), 0.0

    cosine, chance = _kept(Path(f"{path}-directions.safetensors"), of, directions, keep)
    if reason is not None:
        return Matches(cosine, None, reason, chance)
    of |= {f"explanation_{name}": _explained(run) for name, run in (("a", a), ("b", b))}
    return Matches(cosine, _kept(Path(f"{path}-together.safetensors"), of, together, keep)[0], None, chance)


def not_on_the_same_tokens(a: Run, b: Run) -> Reason | None:
    """Why it cannot be told which of their latents fire together; None where it can."""
    for run in (a, b):
        if run.explanation is None:
            return Reason(f"{run.name} has no explanation", run.command("collect"))
    first, second = (run.explanation.manifest for run in (a, b) if run.explanation is not None)
    if first["sources"]["store"] != second["sources"]["store"] or first["n_tokens"] != second["n_tokens"]:
        command = b.command("collect") + f" --store STORE --n-tokens {first['n_tokens']}"
        return Reason(f"they were explained on different tokens; with STORE the store of {a.name}", command)
    return None


def best_cosines(a: Any, b: Any, at: Callable[[float], None] = lambda share: None) -> tuple[Best, Best]:
    """For each row of `a` the row of `b` with the largest cosine, and the other way round; ties take the first."""
    best = tuple(Best(np.full(len(m), -1, np.int32), np.full(len(m), -np.inf, np.float32)) for m in (a, b))
    for rows, x in _unit_rows(a):
        for columns, y in _unit_rows(b):
            cosine = x @ y.T
            for one, here, there, axis in ((best[0], rows, columns, 1), (best[1], columns, rows, 0)):
                found = cosine.argmax(axis)
                score = np.take_along_axis(cosine, np.expand_dims(found, axis), axis).squeeze(axis)
                better = score > one.score[here]
                one.score[here][better] = score[better]
                one.latent[here][better] = found[better] + there.start
        at(rows.stop / len(a))
    return best[0], best[1]


def best_together(a: Iterable[Pairs], b: Iterable[Pairs], n_a: int, n_b: int, n_tokens: int) -> tuple[Best, Best]:
    """For each latent of either side the other's with the largest Jaccard index of their tokens; -1 for none.

    `a` and `b` are parts of a side's pairs, all pairs of a latent in one part; `b` is read twice.
    """
    starts, partners, sizes = _by_token(b, n_b, n_tokens)
    best = tuple(Best(np.full(n, -1, np.int32), np.zeros(n, np.float32)) for n in (n_a, n_b))
    for tokens, latents in a:
        n = starts[tokens + 1] - starts[tokens]
        at = np.repeat(starts[tokens] - (np.cumsum(n) - n), n) + np.arange(n.sum())
        cells, both = np.unique(np.repeat(latents.astype(np.int64), n) * n_b + partners[at], return_counts=True)
        cells, both = cells[both >= MIN_TOGETHER], both[both >= MIN_TOGETHER]
        i, j = np.divmod(cells, n_b)
        jaccard = (both / (np.bincount(latents, minlength=n_a)[i] + sizes[j] - both)).astype(np.float32)
        for one, here, there in ((best[0], i, j), (best[1], j, i)):
            first = np.lexsort((there, -jaccard, here))
            first = first[np.r_[True, np.diff(here[first]) != 0][: len(first)]]
            better = first[jaccard[first] > one.score[here[first]]]
            one.score[here[better]], one.latent[here[better]] = jaccard[better], there[better]
    return best[0], best[1]


def _by_token(parts: Iterable[Pairs], n_latents: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each token's latents start in the second array, those, and on how many tokens each latent is active."""
    n, sizes = np.zeros(n_tokens, np.int32), np.zeros(n_latents, np.int64)
    for tokens, latents in parts:
        n += np.bincount(tokens, minlength=n_tokens).astype(np.int32)
        sizes += np.bincount(latents, minlength=n_latents)
    starts = np.concatenate([[0], np.cumsum(n, dtype=np.int64)])
    partners, free = np.empty(starts[-1], np.int32), starts[:-1].copy()
    for tokens, latents in parts:
        order = np.argsort(tokens, kind="stable")
        own, first, count = np.unique(tokens[order], return_index=True, return_counts=True)
        partners[np.repeat(free[own] - first, count) + np.arange(len(order))] = latents[order]
        free[own] += count
    return starts, partners, sizes


class Active:
    """What is active in a run's top examples, some latents at a time; `numbers` are those of its contexts."""

    def __init__(self, run: Run, numbers: np.ndarray) -> None:
        self.run, self.numbers = run, numbers

    def __iter__(self) -> Iterator[Pairs]:
        for start in range(0, self.run.n_latents, _LATENTS_AT_ONCE):
            part = slice(start, start + _LATENTS_AT_ONCE)
            context, activations = self._columns(part)
            latent, example, position = np.nonzero(activations > 0)
            row = context[latent, example]
            token = self.numbers[row] * activations.shape[2] + position
            tokens, latents = np.unique(np.stack([token, latent + start], axis=1)[row >= 0], axis=0).T
            yield tokens, latents

    def _columns(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        context, activations = self.run.rows("top_context"), self.run.rows("top_activations")
        assert context is not None and activations is not None
        return context[part], activations[part]


def token_numbers(a: Run, b: Run) -> tuple[list[np.ndarray], int]:
    """A number for each context of either, alike for those with the same tokens at the same places; n of all tokens.

    Contexts are told apart by 64 bits of their content.
    """
    keys = [_context_keys(run) for run in (a, b)]
    found, numbers = np.unique(np.concatenate(keys), return_inverse=True)
    length = max(run.explanation.manifest["context_length"] for run in (a, b) if run.explanation is not None)
    return np.split(numbers.astype(np.int64), [len(keys[0])]), len(found) * length


def _context_keys(run: Run) -> np.ndarray:
    names = ("contexts", "contexts_document", "contexts_position")
    keys: Any = 0
    for seed, name in enumerate(names):
        column = run.rows(name)
        assert column is not None
        odd = np.random.default_rng(seed).integers(0, 1 << 63, column.shape[1], dtype=np.uint64) * np.uint64(2)
        parts = range(0, len(column), _ROWS_AT_ONCE)
        rows = (column[i : i + _ROWS_AT_ONCE].astype(np.int64).astype(np.uint64) for i in parts)
        keys = keys + np.concatenate([np.zeros(0, np.uint64), *((part * (odd + np.uint64(1))).sum(1) for part in rows)])
    return keys


class Decoder:
    """The decoder of a run, some rows at a time from the disk; `Unavailable` when it cannot be read."""

    def __init__(self, run: Run) -> None:
        folder = run.folder / "autoencoder" if (run.folder / "autoencoder/config.json").exists() else run.folder
        self.path, self.n, self.width = (
            folder / "autoencoder.safetensors",
            run.n_latents,
            run.facts["config"]["d_model"],
        )
        with files.reading(self.path, "restore it from a copy"):
            if artifacts.sha256_file(self.path) != run.facts["weights_sha256"]:
                raise ValueError("its sha256 is not the one that its config.json gives")
            with open(self.path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                about = artifacts.parse_json(file.read(min(size, 1 << 20)).decode(), "its header")["decoder"]
            if about["dtype"] != "F32" or about["shape"] != [self.n, self.width]:
                raise ValueError(f"it has no decoder of {self.n} x {self.width} in fp32")
            self.start = 8 + size + about["data_offsets"][0]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> np.ndarray:
        n = rows.stop - rows.start
        with files.reading(self.path, "restore it from a copy"):
            found = np.fromfile(self.path, "<f4", n * self.width, offset=self.start + 4 * rows.start * self.width)
            if len(found) != n * self.width:
                raise ValueError("it is cut short")
        return found.reshape(n, self.width)


def _unit_rows(matrix: Any) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(matrix)))
        block = np.asarray(matrix[rows], dtype=np.float32)
        yield rows, block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)


def _explained(run: Run) -> str:
    """What the top examples depend on, in words."""
    assert run.explanation is not None
    made = run.explanation.manifest
    return json.dumps([made["sources"].get("store"), made["n_tokens"], made["computed"]["activations"].get("of")])


def _kept(
    path: Path, of: dict[str, str], compute: Callable[[], tuple[tuple[Best, Best], float]], keep: bool
) -> tuple[tuple[Best, Best], float]:
    """What is in the file if it is `of` the same; else `compute`, which is then written there if it is to be kept."""
    if (found := _read(path, of)) is not None:
        return found
    made, chance = compute()
    if keep:
        try:
            _write(path, of, made, chance)
        except OSError as error:
            log.warning("matches are not kept, and will be computed again: %s", error)
    return made, chance


def _write(path: Path, of: dict[str, str], best: tuple[Best, Best], chance: float) -> None:
    from safetensors.numpy import save_file

    tensors = {f"{side}_{n}": x for side, one in zip("ab", best, strict=True) for n, x in one._asdict().items()}
    facts = {"chance": chance, "tensors_sha256": _hash(tensors)}
    said = json.dumps(artifacts.manifest(KIND, {"min_together": MIN_TOGETHER}, of, **facts))
    artifacts.write_atomic(path, lambda temporary: save_file(tensors, temporary, {"manifest": said}))


def _hash(tensors: dict[str, np.ndarray]) -> str:
    """Hex sha256 of the tensors, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def _read(path: Path, of: dict[str, str]) -> tuple[tuple[Best, Best], float] | None:
    """None where there is no file, or one of other weights, tokens or format."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            said = artifacts.parse_json((file.metadata() or {})["manifest"], f"the manifest in {path}")
            said = artifacts.checked_manifest(said, KIND, f"the manifest in {path}")
            if said["sources"] != of or said["config"] != {"min_together": MIN_TOGETHER}:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            if said["tensors_sha256"] != _hash(tensors):
                raise ValueError("its sha256 is not the one that it gives")
            best = [Best(tensors[f"{side}_latent"], tensors[f"{side}_score"]) for side in "ab"]
            return (best[0], best[1]), float(said["chance"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        log.warning("%s cannot be read (%s); its matches are computed again", path, error)
        return None
