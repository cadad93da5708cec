"""Numbers over time: metrics.jsonl is the truth, progress bars are for people.

The library writes neither to stdout nor to stderr unless `show_progress(True)` was called (the CLI does).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

log = logging.getLogger("monosem")

T = TypeVar("T")
tqdm.monitor_interval = 0  # no thread of its own: there may be none to have
_show = False
_open_bars: list[tqdm] = []


def show_progress(on: bool) -> None:
    """Turn progress bars (on stderr) on or off for this process."""
    global _show
    _show = on


def progress(items: Iterable[T], label: str, unit: str, *, total: int, each: int = 1, start: int = 0) -> Iterator[T]:
    """Yield `items` while showing rate and ETA in `unit`s, counting `each` an item, `total` in all from `start`."""
    with tqdm(
        total=total, initial=start, desc=label, unit=unit, unit_scale=True, disable=not _show, mininterval=0.5
    ) as bar:
        _open_bars.append(bar)
        try:
            for item in items:
                yield item
                bar.update(each)
        finally:
            _open_bars.remove(bar)


def end_progress() -> None:
    """Close the bars of loops that an error has left, so that what is printed next begins a line."""
    for bar in _open_bars:
        bar.close()


class Unbreakable:
    """A stream of what is only to be watched: where it cannot be written any more (a terminal gone, `| head`, a full
    disk), what is written is lost and the work goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self.stream.isatty()
        return False

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return self.stream.encoding


class LiveTable:
    """Lines on stderr, when progress is shown: on a terminal drawn over themselves, elsewhere now and then."""

    def __init__(self) -> None:
        self.drawn = 0
        self.drawn_at = -math.inf

    def draw(self, lines: Callable[[], list[str]], *, last: bool = False) -> None:
        """Show `lines()` if a second (off a terminal, a minute) has passed since the last time, or at the `last`."""
        terminal = sys.stderr.isatty()
        if not _show or not (last or time.monotonic() - self.drawn_at > (1 if terminal else 60)):
            return
        columns, rows = shutil.get_terminal_size()
        found = [line[: columns - 1] for line in lines()[: rows - 1]] if terminal else lines()
        over = f"\x1b[{self.drawn}F\x1b[J" if terminal and self.drawn else ""
        sys.stderr.write(over + "\n".join(found) + "\n")
        sys.stderr.flush()
        self.drawn, self.drawn_at = len(found), time.monotonic()


class MetricsLog:
    """Append-only JSON lines, one object a logged step; `rewind` drops what a resumed run will write again."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._written, self._digest = 0, hashlib.sha256()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. A number that is not finite becomes null: JSON has none."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with open(self.path, "ab") as file:
            file.write(line)
        self._count(line)

    def kept(self) -> dict[str, Any]:
        """What a state saved now says of the rows so far, which are on the disk when this returns."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
        return {"bytes": self._written, "sha256": self._digest.hexdigest()}

    def rewind(self, kept: dict[str, Any] | None) -> None:
        """Keep the rows up to a state, of which it says `kept`; without a state none. A torn last line goes too.

        `ValueError` when these rows are not as they were; a file that is gone is begun again, with a warning.
        """
        found = self.path.read_bytes() if self.path.exists() else b""
        n_bytes = kept["bytes"] if kept is not None else 0
        if n_bytes and not self.path.exists():
            log.warning("%s is gone, and its rows with it; new ones begin another", self.path)
            n_bytes = 0
        rows = found[:n_bytes]
        if kept is not None and n_bytes:
            self._check(rows, kept)
        if found != rows:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_bytes(rows)
            os.replace(temporary, self.path)  # at once: a kill leaves the old rows or the new ones
        self._written, self._digest = 0, hashlib.sha256()
        self._count(rows)

    def check(self, kept: dict[str, Any]) -> None:
        """`ValueError` unless the rows are those of which the last state says `kept`; a warning where they are gone."""
        if self.path.exists():
            self._check(self.path.read_bytes(), kept)
        elif kept["bytes"]:
            log.warning("%s is gone, and its rows with it", self.path)

    def _check(self, rows: bytes, kept: dict[str, Any]) -> None:
        if hashlib.sha256(rows).hexdigest() != kept["sha256"]:
            raise ValueError(
                f"{self.path} is not as the saved state knows it ({_damage(rows, kept['bytes'])}); restore it from a "
                "copy, or move it away to go on without its rows"
            )

    def rows(self) -> list[dict[str, Any]]:
        """The rows, but for a last line that a kill has torn; `ValueError` naming any other line that is no row."""
        found = []
        *whole, last = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        for number, line in enumerate([*whole, *([last] if last else [])], 1):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                if number > len(whole):
                    break
                raise ValueError(f"{self.path} line {number} is no row ({error}); restore it from a copy") from None
        return found

    def _count(self, data: bytes) -> None:
        self._written += len(data)
        self._digest.update(data)


def _damage(rows: bytes, n_bytes: int) -> str:
    """What is wrong with rows that are not as they were."""
    if len(rows) != n_bytes:
        return f"{len(rows)} bytes where there were {n_bytes}"
    for number, line in enumerate(rows.splitlines(), 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return f"line {number} is not JSON"
    return "a row was changed"
