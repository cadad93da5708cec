"""How `explain` writes RUN/explain/: columns as .npy files, a row a latent, each whole and then renamed into place."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from monosem import artifacts


class ColumnWriter:
    """Writes the columns of one explanation and remembers what the manifest has to say of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.part = folder, ""
        self.columns: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, array: np.ndarray, meaning: str) -> None:
        """Write `name`.npy at once (old or new, never half)."""

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)

        artifacts.write_atomic(self.folder / f"{name}.npy", save)
        self.columns[name] = {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "meaning": meaning,
            "part": self.part,
            **artifacts.file_facts(self.folder / f"{name}.npy"),
        }

    def keep(self, name: str) -> None:
        """Remember the file of this name that the part has written."""
        if (path := self.folder / name).exists():
            self.files[name] = {"part": self.part, **artifacts.file_facts(path)}

    def check(self, part: str) -> None:
        """`ValueError` naming the first file of the part that is not as it was written."""
        columns = {f"{name}.npy": facts for name, facts in self.columns.items()}
        for name, facts in {**columns, **self.files}.items():
            if facts["part"] == part:
                artifacts.check_file(artifacts.inside(self.folder, name), facts, "explain the run again")

    def forget_all_but(self, parts: Collection[str]) -> None:
        """Remember no column and no file of other parts."""
        self.columns = {name: facts for name, facts in self.columns.items() if facts["part"] in parts}
        self.files = {name: facts for name, facts in self.files.items() if facts["part"] in parts}
