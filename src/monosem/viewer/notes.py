"""People's own words and stars on latents, in RUN/notes.sqlite: the one thing here that a page writes."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from monosem.viewer import files

MAX_CHARACTERS = 20_000
_SCHEMA = """CREATE TABLE IF NOT EXISTS notes
             (latent INTEGER PRIMARY KEY, text TEXT NOT NULL, starred INTEGER NOT NULL, updated TEXT NOT NULL)"""
_TYPES = [int, str, int, str]


class Note(NamedTuple):
    text: str = ""
    starred: bool = False
    updated: str | None = None
    """UTC, ISO 8601; None where nobody has written."""


class Notes:
    """Notes by latent. A file is made by the first that is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, latent: int) -> Note:
        return self._read("WHERE latent = ?", (latent,)).get(latent, Note())

    def all(self) -> dict[int, Note]:
        """Every latent with a note or a star."""
        return self._read("WHERE starred OR text != ''", ())

    def containing(self, text: str) -> list[int]:
        """Latents whose note has the text in it, in whatever case."""
        return list(self._read("WHERE instr(lower(text), lower(?))", (text,)))

    def write(self, latent: int, *, text: str | None = None, starred: bool | None = None) -> Note:
        """The note with what is given changed; `ValueError` when the text is too long or the file cannot be written."""
        if text is not None and len(text) > MAX_CHARACTERS:
            raise ValueError(f"the note has {len(text):,} characters; write at most {MAX_CHARACTERS:,}")
        remedy = "nothing was kept: let this user write in its folder, or serve with --read-only"
        with files.reading(self.path, remedy), contextlib.closing(sqlite3.connect(self.path, timeout=5)) as file, file:
            file.execute(_SCHEMA)
            file.execute("BEGIN IMMEDIATE")
            row = file.execute("SELECT text, starred FROM notes WHERE latent = ?", (latent,)).fetchone() or ("", 0)
            new = Note(
                row[0] if text is None else text.encode("utf-8", "replace").decode(),
                bool(row[1]) if starred is None else starred,
                datetime.now(UTC).isoformat(timespec="seconds"),
            )
            file.execute("REPLACE INTO notes VALUES (?, ?, ?, ?)", (latent, *new))
        return new

    def _read(self, where: str, values: tuple[object, ...]) -> dict[int, Note]:
        with files.database(self.path) as file:
            if file is None:
                return {}
            rows = file.execute(f"SELECT latent, text, starred, updated FROM notes {where}", values).fetchall()
            if wrong := [row for row in rows if [type(value) for value in row] != _TYPES]:
                raise ValueError(f"the row of latent {wrong[0][0]!r} is none of ours")
            return {latent: Note(text, bool(starred), updated) for latent, text, starred, updated in rows}
