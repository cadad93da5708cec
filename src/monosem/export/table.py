"""A Parquet file with a row for each latent: every number that there is one of a latent, and its words."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from monosem import artifacts, charts
from monosem.explained import ExplainStore

_LATENTS_AT_ONCE = 8192
_MARK = {b"monosem": b"latents"}
"""In the file's metadata."""


def write(store: ExplainStore, path: str | Path) -> int:
    """Write the file, atomically; returns the number of rows. What was not computed is null. Errors as `check`."""
    check(path)
    arrow, parquet = charts.library("pyarrow", "hub"), charts.library("pyarrow.parquet", "hub")
    names = [name for name in sorted(store.manifest["columns"]) if store.column(name).shape == (store.n_latents,)]
    numbers = [name for name in names if name not in ("probe_task", "ablation_latents")]
    tasks = store.manifest.get("probe_tasks", [])
    types = {name: arrow.from_numpy_dtype(store.column(name).dtype) for name in numbers}
    fields = {"latent": arrow.int32(), **types, "probe_task": arrow.string()}
    fields |= {name: arrow.string() for name in ("explanation", "top_tokens")}
    schema = arrow.schema(list(fields.items()), metadata=_MARK)

    def batch(start: int, stop: int) -> Any:
        rows: dict[str, Any] = {"latent": np.arange(start, stop, dtype=np.int32)}
        rows |= {name: np.asarray(store.column(name)[start:stop]) for name in numbers}
        which = store.column("probe_task")[start:stop].tolist() if "probe_task" in store else [-1] * (stop - start)
        rows["probe_task"] = [tasks[task] if task >= 0 else None for task in which]
        rows |= dict(zip(("explanation", "top_tokens"), words(store, start, stop), strict=True))
        arrays = [arrow.array(rows[name], fields[name], from_pandas=True) for name in fields]  # NaN becomes null
        return arrow.record_batch(arrays, schema=schema)

    def save(temporary: Path) -> None:
        with parquet.ParquetWriter(temporary, schema) as writer:
            for start in range(0, store.n_latents, _LATENTS_AT_ONCE):
                writer.write_batch(batch(start, min(start + _LATENTS_AT_ONCE, store.n_latents)))

    with artifacts.file_lock(path):
        artifacts.write_atomic(path, save)
    return store.n_latents


def check(path: str | Path) -> None:
    """`ValueError` unless the table can be written to `path`, a new file or one that it wrote; with pyarrow at hand."""
    parquet = charts.library("pyarrow.parquet", "hub")

    def is_ours(there: Path) -> bool:
        try:
            return (parquet.read_schema(there).metadata or {}).items() >= _MARK.items()
        except (ValueError, OSError):  # no Parquet file
            return False

    artifacts.require_ours(path, is_ours)
    artifacts.require_writable(path)


def words(store: ExplainStore, start: int, stop: int) -> tuple[list[str | None], list[str | None]]:
    """Explanation (None without one) and top tokens of the latents from `start` to before `stop`."""
    path = store.file("words.sqlite")
    if path is None:
        return [None] * (stop - start), [None] * (stop - start)
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            sql = "SELECT latent, explanation, top_tokens FROM latents WHERE latent >= ? AND latent < ?"
            found = {latent: (said or None, top) for latent, said, top in database.execute(sql, (start, stop))}
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot be read ({error}); explain the run again") from None
    rows = [found.get(latent, (None, None)) for latent in range(start, stop)]
    return [row[0] for row in rows], [row[1] for row in rows]
