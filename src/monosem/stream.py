"""The shuffled stream of activations that training reads: from a store on disk, or live from the subject.

Both sources give the same rows in numbered blocks, so both give the same stream, and its position is one number.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from monosem import artifacts
from monosem.activations import ActivationStore, capture_block
from monosem.config import changed_fields
from monosem.subject import Subject
from monosem.tokens import Contexts
from monosem.types import Site

WINDOW_BLOCKS = 16
"""Blocks whose rows are shuffled together: 64k rows at the default block."""

PREFETCH_BATCHES = 8
"""Batches that the reading thread works ahead."""


@runtime_checkable
class Source(Protocol):
    """Where a stream's rows come from: numbered blocks of equal size. `hash` names the rows and their order."""

    n_blocks: int
    block_rows: int
    width: int
    hash: str

    def block(self, index: int) -> Float[Tensor, "block_rows width"]: ...


class StoreSource:
    """The blocks of one split of a store."""

    def __init__(self, store: ActivationStore, split: str = "train") -> None:
        self.store = store
        self.split = split
        self.n_blocks = store.n_blocks(split)
        self.block_rows = store.block_rows
        self.width = store.width
        self.hash = artifacts.hash_names([store.hash, split])

    def block(self, index: int) -> Float[Tensor, "block_rows width"]:
        return self.store.block(self.split, index)


class LiveSource:
    """Blocks computed when they are read, by the same forward passes as a harvest: the same rows, and no disk."""

    def __init__(
        self, subject: Subject, site: Site, found: Contexts, *, block_contexts: int, keep_first_token: bool = False
    ) -> None:
        n_contexts, context_length = found.tokens.shape
        if n_contexts % block_contexts:
            raise ValueError(f"{n_contexts} contexts are not whole blocks of {block_contexts}; give a multiple of it")
        self.subject = subject
        self.site = site
        self.tokens = found.tokens
        self.block_contexts = block_contexts
        self.first_position = 0 if keep_first_token else 1
        self.n_blocks = n_contexts // block_contexts
        self.block_rows = block_contexts * (context_length - self.first_position)
        self.width = subject.site_width(site)
        tokens_hash = hashlib.sha256(found.tokens.numpy().tobytes()).hexdigest()
        identity = (subject.hash, site, subject.dtype, block_contexts, self.first_position, tokens_hash)
        self.hash = artifacts.hash_names([str(part) for part in identity])

    def block(self, index: int) -> Float[Tensor, "block_rows width"]:
        tokens = self.tokens[index * self.block_contexts : (index + 1) * self.block_contexts]
        (captured,) = capture_block(self.subject, [self.site], tokens)
        return captured[:, self.first_position :].reshape(self.block_rows, self.width)


class ActivationStream:
    """The endless stream of shuffled rows, `batch_size` at a time, as fp32 on the CPU.

    In epoch e the blocks come in the order perm(seed, e); about `window_blocks` successive ones form a window, whose
    rows come in the order perm(seed, e, window). Batch i is rows [i B, (i + 1) B) of these, over windows and epochs.
    So the position is one number, the batches handed out: nothing else is saved, and a resumed stream goes on with
    exactly the next batch. A thread works `prefetch_batches` ahead, which changes no batch. Use it as a context
    manager, or `close` it.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        window_blocks: int = WINDOW_BLOCKS,
        prefetch_batches: int = PREFETCH_BATCHES,
    ) -> None:
        sizes = {"batch_size": batch_size, "window_blocks": window_blocks, "prefetch_batches": prefetch_batches}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.window_blocks = window_blocks
        self.prefetch_batches = prefetch_batches
        self.n_batches = 0
        """Batches handed out so far."""
        self._worker: _Worker | None = None

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Float[Tensor, "batch width"]:
        if self._worker is None:
            self._worker = _Worker(self._batches(), self.prefetch_batches)
        try:
            batch = self._worker.get()
        except BaseException:
            self.close()
            raise
        self.n_batches += 1
        return torch.from_numpy(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in; plain JSON data."""
        return {"n_batches": self.n_batches, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that `state` was taken at; `ValueError` names what differs from this stream."""
        self.check(state)
        self.seek(int(state["n_batches"]))

    def check(self, state: dict[str, Any]) -> None:
        """`ValueError` naming what differs when `state` is a position in another stream."""
        identity = {name: value for name, value in state.items() if name != "n_batches"}
        if changed := changed_fields(identity, self._identity()):
            raise ValueError(
                f"the saved position belongs to another stream ({'; '.join(changed)}); use the same store and config"
            )

    def seek(self, n_batches: int) -> None:
        """Go on as if `n_batches` batches had been handed out."""
        if n_batches != self.n_batches:
            self.close()
            self.n_batches = n_batches

    def close(self) -> None:
        """Stop the thread; the stream can be read on, from where it is."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "window_blocks": self.window_blocks,
            "source": self.source.hash,
        }

    def _batches(self) -> Iterator[np.ndarray]:
        return _shuffled_batches(self.source, self.batch_size, self.seed, self.window_blocks, self.n_batches)


def _shuffled_batches(
    source: Source, batch_size: int, seed: int, window_blocks: int, start: int
) -> Iterator[np.ndarray]:
    """Batch `start` and all after it, as fp32 (see ActivationStream)."""
    epoch, skip = divmod(start * batch_size, source.n_blocks * source.block_rows)
    batch = np.empty((batch_size, source.width), dtype=np.float32)
    filled = 0
    for rows, order in _windows(source, seed, window_blocks, epoch, skip):
        taken = 0
        while taken < len(order):
            n = min(batch_size - filled, len(order) - taken)
            _gather_fp32(rows, order[taken : taken + n], batch[filled : filled + n])
            taken, filled = taken + n, filled + n
            if filled == batch_size:
                yield batch
                batch, filled = np.empty_like(batch), 0


def _windows(
    source: Source, seed: int, window_blocks: int, epoch: int, skip: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, order) of the windows from row `skip` of `epoch` on, for ever; windows wholly skipped are not read."""
    n_windows = -(-source.n_blocks // window_blocks)
    while True:
        for window, blocks in enumerate(np.array_split(_permutation(source.n_blocks, seed, epoch), n_windows)):
            n_rows = len(blocks) * source.block_rows
            if skip < n_rows:
                rows = _window_rows(source, blocks)
                yield rows, _permutation(n_rows, seed, epoch, window)[skip:]
            skip = max(0, skip - n_rows)
        epoch += 1


def _window_rows(source: Source, blocks: np.ndarray) -> np.ndarray:
    """The blocks' rows, one after the other: fp32, or the bits of bf16 as uint16 (numpy has no bf16)."""
    rows: np.ndarray | None = None
    for i, block in enumerate(blocks):
        tensor = source.block(int(block)).contiguous()
        bits = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor.float()).numpy()
        if rows is None:
            rows = np.empty((len(blocks) * source.block_rows, source.width), dtype=bits.dtype)
        rows[i * source.block_rows : (i + 1) * source.block_rows] = bits
    assert rows is not None
    return rows


def _gather_fp32(rows: np.ndarray, order: np.ndarray, into: np.ndarray) -> None:
    """into[i] = rows[order[i]]. numpy, not torch: torch would start a second pool of threads beside training's."""
    if rows.dtype == np.float32:
        np.take(rows, order, axis=0, out=into, mode="clip")
    else:  # bf16 is the upper half of fp32
        np.left_shift(rows[order], 16, out=into.view(np.uint32), dtype=np.uint32)


def _permutation(n: int, *seeds: int) -> np.ndarray:
    """A permutation drawn from the seeds. Sorted raw bits of Philox: numpy fixes those, not `Generator.permutation`."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(seeds)).random_raw(n), kind="stable")


class _Worker:
    """A thread that runs an iterator ahead of its reader by a bounded number of items."""

    def __init__(self, items: Iterator[Any], ahead: int) -> None:
        self.stop = threading.Event()
        self.queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
        self.thread = threading.Thread(target=_run_ahead, args=(items, self.queue, self.stop), daemon=True)
        weakref.finalize(self, self.stop.set)  # a stream dropped without close() ends its thread too
        self.thread.start()

    def get(self) -> Any:
        item, error = self.queue.get()
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self.stop.set()
        self.thread.join()


def _run_ahead(
    items: Iterator[Any], results: queue.Queue[tuple[Any, BaseException | None]], stop: threading.Event
) -> None:
    try:
        for item in items:
            if not _put(results, (item, None), stop):
                return
    except BaseException as error:  # raised again where the item is asked for
        _put(results, (None, error), stop)


def _put(results: queue.Queue[Any], result: Any, stop: threading.Event) -> bool:
    """Whether the result was taken before the stop."""
    while not stop.is_set():
        try:
            results.put(result, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
