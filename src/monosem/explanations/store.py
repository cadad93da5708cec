"""How `explain` writes RUN/explain/: columns as .npy files, a row a latent, each whole and then renamed into place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from monosem import artifacts


class ColumnWriter:
    """Writes the columns of one explanation and remembers what the manifest has to say of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.part = folder, ""
        self.columns: dict[str, dict[str, Any]] = {}

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
        }
