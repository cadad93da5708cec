"""Files that may change, go or be damaged while they are served: each is read so that a page can say so and stay up.

What cannot be read is `Unavailable`, an answer of its own (503), apart from the asker's mistakes. Nothing stays mapped
into memory: where a mapped file is cut, the whole process dies.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_WAIT_S = 1.0
"""For somebody else's lock on a database that is read."""

_FAULTS = (
    *(OSError, sqlite3.Error, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
    SyntaxError,  # numpy, of the header of an .npy file
)

Stamp = tuple[int, int, int]


class Unavailable(ValueError):
    """A file is missing, damaged, locked or changing. The message names it and says what to do."""


@contextlib.contextmanager
def reading(what: Path | str, remedy: str = "load the page again when nothing writes there") -> Iterator[None]:
    """Whatever goes wrong inside is because of the file or folder `what`: `Unavailable`, with the `remedy`."""
    try:
        yield
    except Unavailable:
        raise
    except ValueError as error:  # in words already
        said = str(error) if str(what) in str(error) else f"{what} cannot be read ({error})"
        raise Unavailable(said if "; " in said else f"{said}; {remedy}") from None
    except _FAULTS as error:
        raise Unavailable(f"{what} cannot be read ({_words(error)}); {remedy}") from error


@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection | None]:
    """The database, opened read-only; None when there is none. `Unavailable` for what goes wrong inside."""
    with reading(path, "load the page again when nobody else has it open, or restore it from a copy"):
        if not path.exists():
            yield None
            return
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_WAIT_S)
        ) as file:
            yield file


def stamp(path: Path) -> Stamp:
    """What changes when a file is written to, replaced or removed."""
    try:
        return _stamp_of(path.stat())
    except (OSError, ValueError):
        return (0, 0, 0)


class Rows:
    """A two-dimensional or larger array of an .npy file, read by rows when they are asked for.

    `rows[index]` and `rows[index, …]` give what numpy gives, where the first index is a whole number, a slice or an
    array of whole numbers. The file stays open, so one that is replaced or removed is read on as it was; `Unavailable`
    when it is written to in place.
    """

    def __init__(self, found: np.memmap) -> None:
        """Of an array that numpy has mapped, which is let go."""
        self.path, self.shape, self.dtype = Path(str(found.filename)), found.shape, found.dtype
        self._offset, self._file = found.offset, os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._stamp = _stamp_of(os.fstat(self._file))
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self._stamp[1] < self._offset + len(self) * self._row_bytes:
            raise Unavailable(self._changed())

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, slice):
            start, stop, step = first.indices(len(self))
            found = self._read(start, max(stop, start))[::step]
            at: Any = slice(None)
        else:
            wanted = np.arange(len(self))[first]
            rows, inverse = np.unique(wanted, return_inverse=True)
            found = np.concatenate([self._read(row, row + 1) for row in rows.tolist()] or [self._read(0, 0)])
            at = inverse.reshape(np.shape(wanted))
        if not self.fresh:
            raise Unavailable(self._changed())
        return found[(at, *rest)]

    @property
    def fresh(self) -> bool:
        """Whether the file is as it was when it was opened."""
        return _stamp_of(os.fstat(self._file)) == self._stamp

    def _read(self, start: int, stop: int) -> np.ndarray:
        n = (stop - start) * self._row_bytes
        parts, at = [], self._offset + start * self._row_bytes
        while n:
            part = os.pread(self._file, n, at)
            if not part:
                raise Unavailable(self._changed())
            parts.append(part)
            n, at = n - len(part), at + len(part)
        return np.frombuffer(b"".join(parts), self.dtype).reshape(stop - start, *self.shape[1:])

    def _changed(self) -> str:
        return f"{self.path} was written to while it was served; explain the run again or restore it from a copy"


def _stamp_of(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
