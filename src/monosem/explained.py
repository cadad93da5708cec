"""What `explain` leaves in RUN/explain/, as it is read: columns as .npy files, a row a latent (docs/formats.md).

Numpy only, so that a viewer needs no torch. The manifest names each column with its meaning and is written last, so
what a reader finds in it is there.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from monosem import artifacts

KIND = "explanation"


class ExplainStore:
    """A finished RUN/explain/, read in place."""

    def __init__(self, folder: str | Path) -> None:
        """`ValueError` when the folder holds no explanation, or one of another format."""
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise ValueError(f"{self.folder} holds no explanation; make one with monosem explain {self.folder.parent}")
        self.manifest = artifacts.read_manifest(self.folder / "manifest.json", KIND)
        if missing := {"weights", "activations"} - self.manifest["computed"].keys():
            raise ValueError(
                f"{self.folder} is unfinished (no {' and no '.join(sorted(missing))}); monosem explain "
                f"{self.folder.parent} goes on"
            )
        self.n_latents: int = self.manifest["n_latents"]
        self._whole: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["columns"]

    def column(self, name: str) -> np.ndarray:
        """The column, memory-mapped; `ValueError` when it is missing or not what the manifest says."""
        if name not in self:
            raise ValueError(
                f"{self.folder} has no column {name!r}; it has {', '.join(sorted(self.manifest['columns']))}"
            )
        facts = self.manifest["columns"][name]
        path = self._checked(f"{name}.npy", facts)
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, TypeError, SyntaxError, OverflowError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {self._repair}") from None
        if (str(found.dtype), list(found.shape)) != (facts["dtype"], facts["shape"]):
            raise ValueError(f"{path} is not the array that its manifest describes; {self._repair}")
        return found

    def file(self, name: str) -> Path | None:
        """The file of this name; None when no part has made it. `ValueError` when it is not as it was written."""
        facts = self.manifest["files"].get(name)
        return None if facts is None else self._checked(name, facts)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Text of each token, by id; `ValueError` when the file is not as it was written."""
        path = self.file("vocabulary.json")
        if path is None:
            raise ValueError(f"{self.folder} has no vocabulary.json; {self._repair}")
        return artifacts.read_as(path, list[str], halves=True)

    @property
    def _repair(self) -> str:
        return f"monosem explain {self.folder.parent} makes it again"

    def _checked(self, name: str, facts: dict[str, Any]) -> Path:
        """The path; its size is checked every time, its bytes the first."""
        path = artifacts.inside(self.folder, name)
        if name in self._whole:
            artifacts.check_size(path, facts["bytes"], self._repair)
        else:
            artifacts.check_file(path, facts, self._repair)
            self._whole.add(name)
        return path
