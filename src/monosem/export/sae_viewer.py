"""The JSON that OpenAI's sae-viewer reads, a file a latent: FOLDER/atoms/LATENT.json, and LATENT-ablated.json.

Its moments are over all tokens and about zero, its effects are by the token before: entry t - 1 is of the prediction of
token t. What it has no place for (quantile examples, neighbours, rules) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosem import artifacts
from monosem.explained import ExplainStore
from monosem.logs import progress

KIND = "sae-viewer"
BIN_WIDTH = 0.2
"""Of its histogram: bin b holds activations in (0.2 (b - 1), 0.2 b]."""
_SIDES = {"up": "upvote", "down": "downvote"}


def write(store: ExplainStore, folder: str | Path, latents: Iterable[int]) -> int:
    """Write the files of `latents`; returns how many. Those of an older export are replaced. Errors as `check`."""
    with artifacts.folder_lock(folder):
        check(folder)
        sources = dict(store.manifest["sources"])
        artifacts.write_json(Path(folder) / "export.json", artifacts.manifest(KIND, {}, sources))
        return _write(store, Path(folder), list(latents))


def check(folder: str | Path) -> None:
    """`ValueError` unless `folder` can be written, and holds no atoms/ that this did not write."""
    folder = Path(folder)
    artifacts.require_writable(folder / "export.json")
    if (folder / "export.json").exists():
        artifacts.read_manifest(folder / "export.json", KIND)
    elif (folder / "atoms").exists():
        raise ValueError(f"{folder} has atoms/ and is no export (it has no export.json); choose another folder")


def _write(store: ExplainStore, folder: Path, chosen: list[int]) -> int:
    words = store.vocabulary
    ablated = store.column("ablation_latents").tolist() if "ablation_latents" in store else []
    rows = {latent: row for row, latent in enumerate(ablated)}
    for latent in progress(chosen, "sae-viewer", "latent", total=len(chosen), each=1):
        facts = _facts(store, latent)
        sequences = {kind: _sequences(store, words, latent, kind, facts["density"]) for kind in ("top", "random")}
        artifacts.write_json(folder / "atoms" / f"{latent}.json", {**facts, **sequences})
        if latent in rows:
            effects = [
                {**s, **_effects(store, words, rows[latent], i)} for i, s in _ablated(store, rows[latent], sequences)
            ]
            data = {**facts, "top": effects, "random": []}
            artifacts.write_json(folder / "atoms" / f"{latent}-ablated.json", data)
    return len(chosen)


class Latent(NamedTuple):
    """One latent, as a file has it."""

    latent: int
    density: float
    mean_act: float
    mean_act_squared: float
    hist: dict[int, int]
    top: list[dict[str, Any]]
    random: list[dict[str, Any]]
    """A sequence: doc_id, idx (of the peak), act, acts, tokens, token_ints, density; and, where it was ablated,
    ablate_loss_diff, kl and the tokens moved."""


def read(folder: str | Path) -> Iterator[Latent]:
    """The latents of a folder, by number, with what ablating changed where a file says so.

    `ValueError` names the file that is not what the viewer's types say.
    """
    files = {path.stem: path for path in (Path(folder) / "atoms").glob("*.json")}
    if not files:
        raise ValueError(f"{folder} has no atoms/LATENT.json; give the folder that holds atoms/")
    for name in sorted((name for name in files if name.isdigit()), key=int):
        found = _checked(files[name])
        if (path := files.get(f"{name}-ablated")) is not None:
            effects = {(s["doc_id"], s["idx"], tuple(s["token_ints"])): s for s in _checked(path)["top"]}
            found["top"] = [effects.get((s["doc_id"], s["idx"], tuple(s["token_ints"])), s) for s in found["top"]]
        hist = {int(key): value for key, value in found["hist"].items()}
        yield Latent(int(name), **{**{field: found[field] for field in Latent._fields[1:]}, "hist": hist})


def _checked(path: Path) -> dict[str, Any]:
    found = artifacts.read_json(path)
    numbers, lists = ("density", "mean_act", "mean_act_squared"), ("top", "random")
    try:
        good = all(isinstance(found[name], int | float) for name in numbers) and all(
            len(s["acts"]) == len(s["tokens"]) == len(s["token_ints"]) > s["idx"] >= 0
            for name in lists
            for s in found[name]
        )
        good = good and all(int(key) == float(key) and int(value) == value for key, value in found["hist"].items())
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{path} is not what sae-viewer reads: density, mean_act, mean_act_squared, hist, top, random")
    return found


def _facts(store: ExplainStore, latent: int) -> dict[str, Any]:
    density, mean, square, skew, kurtosis = (
        float(store.column(name)[latent]) for name in ("density", "mean", "mean_square", "skew", "kurtosis")
    )
    counts = store.column("histogram")[latent]
    active = int(counts.sum()) / store.manifest["n_tokens"]
    facts: dict[str, Any] = {"density": density, "mean_act": 0.0, "mean_act_squared": 0.0}
    if active:
        facts |= {"mean_act": active * mean, "mean_act_squared": active * square}
        sd = math.sqrt(max(0.0, square - mean**2))
        cube = skew * sd**3 + 3 * mean * sd**2 + mean**3
        fourth = kurtosis * sd**4 + 4 * mean * cube - 6 * mean**2 * square + 3 * mean**4
        about_zero = {
            "skew": active * cube / (active * square) ** 1.5,
            "kurtosis": active * fourth / (active * square) ** 2,
        }
        facts |= {name: value for name, value in about_zero.items() if math.isfinite(value)}
    return {**facts, "hist": _histogram(counts, store.column("histogram_edges"))}


def _histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, int]:
    """Ours, by equal steps of the logarithm, in its equal steps: each of our bins whole, at its middle."""
    middles = [edges[1] / 2, *np.sqrt(edges[1:-1] * edges[2:]), edges[-1]]
    found: dict[str, int] = {}
    for n, middle in zip(counts.tolist(), middles, strict=True):
        if n:
            key = str(math.ceil(float(middle) / BIN_WIDTH))
            found[key] = found.get(key, 0) + n
    return found


def _sequences(store: ExplainStore, words: list[str], latent: int, kind: str, density: float) -> list[dict[str, Any]]:
    context, position, activations = (
        store.column(f"{kind}_{n}")[latent] for n in ("context", "position", "activations")
    )
    found = []
    for row, at, values in zip(context.tolist(), position.tolist(), activations.astype(np.float64), strict=True):
        if row >= 0:
            ids = store.column("contexts")[row].tolist()
            found.append(
                {
                    "density": density,
                    "doc_id": int(store.column("contexts_document")[row, at]),
                    "idx": at,
                    "acts": [float(f"{value:.5g}") for value in values],
                    "act": float(f"{values[at]:.5g}"),
                    "tokens": [words[token] for token in ids],
                    "token_ints": ids,
                }
            )
    return found


def _ablated(
    store: ExplainStore, row: int, sequences: dict[str, list[dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, slot in enumerate(store.column("ablation_examples")[row].tolist()):
        if slot >= 0:
            yield i, sequences["top"][slot]


def _effects(store: ExplainStore, words: list[str], row: int, i: int) -> dict[str, Any]:
    """Entry t - 1 is of the prediction of token t; up to the ablated token numbers are 0 and lists empty."""

    def column(name: str) -> np.ndarray:
        return store.column(f"ablation_{name}")[row, i, 1:]

    found: dict[str, Any] = {
        "ablate_loss_diff": np.nan_to_num(column("delta_ce")).astype(float).tolist(),
        "kl": np.nan_to_num(column("kl")).astype(float).tolist(),
    }
    for side, name in _SIDES.items():
        for kind in ("logits", "probs"):
            ids, values = column(f"{kind}_{side}"), column(f"{kind}_{side}_values")
            found[f"top_{name}_tokens_{kind}"] = [[words[t] for t in own if t >= 0] for own in ids.tolist()]
            found[f"top_{name}s_{kind}"] = [
                [v for v in own if math.isfinite(v)] for own in values.astype(float).tolist()
            ]
    return found
