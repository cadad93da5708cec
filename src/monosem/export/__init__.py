"""An explained run for other programs and places (`monosem export`); docs/formats.md describes what is written.

table        a Parquet file, a row a latent
sae_viewer   the JSON of OpenAI's sae-viewer, a file a latent; also read
site         the viewer's pages as files, for any static file server or none
"""

from __future__ import annotations

import numpy as np

from monosem.explained import ExplainStore


def chosen(store: ExplainStore, latents: str) -> list[int]:
    """The latents that `ExportConfig.latents` means, in rising order. `ValueError` for one that there is not."""
    n = store.n_latents
    has_rule = ~np.isnan(store.column("n2g_precision")) if "n2g_precision" in store else np.zeros(n, dtype=bool)
    if latents == "all" or (latents == "rules" and not has_rule.any()):
        return list(range(n))
    if latents == "rules":
        return np.flatnonzero(has_rule).tolist()
    if "," not in latents:
        return sorted(np.argsort(~has_rule, kind="stable")[: int(latents)].tolist())
    found = sorted({int(part) for part in latents.split(",")})
    if found[-1] >= n:
        raise ValueError(f"there is no latent {found[-1]}; they are numbered from 0 to {n - 1:,}")
    return found
