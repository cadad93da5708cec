"""What `explain` leaves in RUN/explain/, as it is read: columns as .npy files, a row a latent (docs/formats.md).

Numpy only, so that a viewer needs no torch. The manifest names each column with its meaning and is written last, so
what a reader finds in it is there.
"""

from __future__ import annotations

from pathlib import Path

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
        if missing := {"weights", "activations"} - self.manifest.get("computed", {}).keys():
            raise ValueError(
                f"{self.folder} is unfinished (no {' and no '.join(sorted(missing))}); monosem explain "
                f"{self.folder.parent} goes on"
            )
        self.n_latents: int = self.manifest["n_latents"]

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["columns"]

    def column(self, name: str) -> np.ndarray:
        """The column, memory-mapped; `ValueError` when it is missing or not what the manifest says."""
        if name not in self:
            raise ValueError(
                f"{self.folder} has no column {name!r}; it has {', '.join(sorted(self.manifest['columns']))}"
            )
        facts = self.manifest["columns"][name]
        try:
            found = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder / name}.npy cannot be read ({error}); explain the run again") from None
        if (str(found.dtype), list(found.shape)) != (facts["dtype"], facts["shape"]):
            raise ValueError(
                f"{self.folder / name}.npy is not the array that its manifest describes; explain the run again"
            )
        return found
