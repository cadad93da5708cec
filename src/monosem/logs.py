"""Numbers over time: metrics.jsonl is the truth, progress bars are for people.

The library writes neither to stdout nor to stderr unless `show_progress(True)` was called (the CLI does).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

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

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. A number that is not finite becomes null: JSON has none."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Keep the whole rows with `row["step"] <= step` (a torn last line is dropped too)."""
        rows = [row for row in self.rows() if row["step"] <= step]
        if self.path.exists():
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(temporary, self.path)  # at once: a kill leaves the old rows or the new ones

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text("utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # torn by a kill: it and all after it are written again
                break
        return found
