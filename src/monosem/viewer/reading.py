"""A run folder as the pages read it: what was trained, its numbers, and the columns of its explanation if there is one.

Everything is read in place and only when it is asked for. What is missing is said together with the command that makes
it (`Run.command`).
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosem import artifacts
from monosem.explained import ExplainStore
from monosem.viewer import files, text
from monosem.viewer.files import Rows, Unavailable
from monosem.viewer.notes import Notes

FIRED_THRESHOLD = 1e-3
"""As `types.FIRED_THRESHOLD`, which is a layer that imports torch."""


class Column(NamedTuple):
    """A number of every latent."""

    label: str
    meaning: str
    part: str = "activations"
    """Of the explanation (docs/formats.md)."""


COLUMNS = {
    "density": Column("density", "share of tokens on which the latent fired"),
    "max": Column("max", "largest activation seen"),
    "mean": Column("mean", "mean activation, over the tokens where it is active"),
    "mean_square": Column("mean square", "mean square of the activation where active"),
    "skew": Column("skew", "skewness of the activation where active: positive with a tail of strong ones"),
    "kurtosis": Column("kurtosis", "kurtosis of the activation where active; 3 for a normal distribution"),
    "n2g_recall": Column("N2G recall", "of the tokens on which it fires, the share its rule predicts", "n2g"),
    "n2g_precision": Column("N2G precision", "of the tokens the rule predicts, the share on which it fires", "n2g"),
    "n2g_density": Column("N2G density", "share of the held-out tokens on which it fires", "n2g"),
    "probe_best": Column("probe loss", "lowest loss of a one-latent probe, over the tasks; lower is better", "probes"),
    "probe_auc": Column("probe AUC", "held-out AUC of that probe, 0.5 by chance; higher is better", "probes"),
    "ablation_sparsity": Column(
        "ablation sparsity", "share of the later logits that it moves when taken out; 1 when all alike", "ablations"
    ),
}
"""What the table can be sorted by, in the order in which it is shown."""

_COMMANDS = {"metrics": "monosem eval RUN", "scaling": "monosem scale DIR"}
_EXPLAIN = "monosem explain RUN"


class Run:
    """One run, as it was when this was made; `fresh` says whether it still is so."""

    def __init__(self, folder: Path, scaling: Path | None = None) -> None:
        """`Unavailable` when the folder holds no autoencoder or a file in it is not what it should be."""
        self.folder = folder
        self.stamp = self._stamp()
        with files.reading(folder):
            self.facts = artifacts.read_manifest(self._autoencoder() / "config.json", "autoencoder")
            self.n_latents: int = self.facts["config"]["n_latents"]
            self.report = self._manifest("eval.json", "evaluation")
            self.explanation, self.trouble = self._explanation()
        self.notes = Notes(folder / "notes.sqlite")
        self.scaling_folder = scaling if scaling is not None else self.folder.absolute().parent
        self._orders: dict[tuple[str, bool], np.ndarray] = {}
        self._columns: dict[str, np.ndarray | Rows] = {}

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def fresh(self) -> bool:
        opened = [column for column in list(self._columns.values()) if isinstance(column, Rows)]
        return self.stamp == self._stamp() and all(column.fresh for column in opened)

    @property
    def words(self) -> Path:
        """The database of explanations and of the full-text index, which may not be there.

        `Unavailable` when it was there, and is gone or not as it was written.
        """
        path = self.folder / "explain/words.sqlite"
        with files.reading(path, "explain the run again"):
            found = self.explanation.file(path.name) if self.explanation is not None else None
        return path if found is None else found

    def command(self, part: str) -> str:
        """What to type to compute a part: of the explanation as its manifest has it, `metrics` or `scaling`."""
        made = self.explanation.manifest["computed"].get(part, {}) if self.explanation is not None else {}
        words = made.get("command", _COMMANDS.get(part, _EXPLAIN))
        return re.sub(r"\bRUN\b", lambda _: shlex.quote(str(self.folder)), words)

    def left_out(self, what: str) -> str | None:
        """Why votes, rules or ablations cannot be made of this subject or site; None where they can."""
        parts = self.explanation.manifest["computed"].values() if self.explanation is not None else ()
        return next((part["left_out"][what] for part in parts if what in part.get("left_out", {})), None)

    def column(self, name: str) -> np.ndarray | None:
        """A column of one number a row; None when it was not computed."""
        found = self._column(name)
        assert not isinstance(found, Rows)
        return found

    def rows(self, name: str) -> Rows | None:
        """A column of more than a number a row, on the disk; None when it was not computed."""
        found = self._column(name)
        assert not isinstance(found, np.ndarray)
        return found

    def _column(self, name: str) -> np.ndarray | Rows | None:
        if self.explanation is None or name not in self.explanation:
            return None
        if name not in self._columns:
            with files.reading(self.explanation.folder / f"{name}.npy", "explain the run again"):
                found = self.explanation.column(name)
                self._columns[name] = np.array(found) if found.ndim == 1 else Rows(found)  # type: ignore[arg-type]
        return self._columns[name]

    def scalars(self) -> dict[str, np.ndarray]:
        """Those of COLUMNS that were computed for any latent."""
        found = {name: self.column(name) for name in COLUMNS}
        return {name: column for name, column in found.items() if column is not None}

    def order(self, name: str, descending: bool) -> np.ndarray:
        """Latents sorted by a column, NaN last."""
        if (name, descending) not in self._orders:
            column = self.column(name)
            assert column is not None
            self._orders[name, descending] = np.argsort(-column if descending else column, kind="stable").astype("i4")
        return self._orders[name, descending]

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """Text of each token, by id."""
        if self.explanation is None:
            return []
        with files.reading(self.folder / "explain/vocabulary.json", "explain the run again"):
            return self.explanation.vocabulary

    def token(self, token: int) -> str:
        """The text of a token; a sign for an id that the vocabulary does not have."""
        return self.vocabulary[token] if 0 <= token < len(self.vocabulary) else f"⟨{token}⟩"

    def peak_tokens(self, latents: np.ndarray, n: int) -> list[list[str]]:
        """The tokens on which each latent fires most, one of each of its `n` top examples, none twice."""
        context, position, contexts = (self.rows(c) for c in ("top_context", "top_position", "contexts"))
        if context is None or position is None or contexts is None:
            return [[] for _ in latents]
        rows, at = context[latents, :n], position[latents, :n]
        ids = np.where(rows >= 0, contexts[np.maximum(rows, 0), at], -1)
        return [list(dict.fromkeys(text.token(self.token(t)) for t in own if t >= 0)) for own in ids.tolist()]

    def explanations(self, latents: list[int]) -> dict[int, str]:
        """Explanation in words of those of the latents that have one."""
        with files.database(self.words) as file:
            if file is None:
                return {}
            marks = ",".join("?" * len(latents))
            rows = file.execute(f"SELECT latent, explanation FROM latents WHERE latent IN ({marks})", latents)
            return {latent: text.prose(words) for latent, words in rows if words}

    def rule(self, latent: int) -> dict[tuple[int, ...], float] | None:
        """The latent's N2G rule: patterns with their activations; None without one."""
        with files.database(self.words) as file:
            row = file and file.execute("SELECT n2g_rule FROM latents WHERE latent = ?", (latent,)).fetchone()
            if not row or not row[0]:
                return None
            found = {tuple(pattern): float(value) for pattern, value in json.loads(row[0])}
            if not all(pattern and all(type(step) is int for step in pattern) for pattern in found):
                raise ValueError(f"the rule of latent {latent} is none of ours")
            return found

    def _autoencoder(self) -> Path:
        for folder in (self.folder / "autoencoder", self.folder):
            if (folder / "config.json").exists():
                return folder
        raise Unavailable(f"{self.folder} holds no autoencoder; give the folder of a finished run (monosem run)")

    def _explanation(self) -> tuple[ExplainStore | None, str | None]:
        """The explanation, or why there is none that can be shown; neither before `explain` has begun."""
        if not (self.folder / "explain/manifest.json").exists():
            return None, None
        try:
            found = ExplainStore(self.folder / "explain")
            config = self.facts["config"]
            if changed := [name for name in config if found.manifest.get(name) != config[name]]:
                return None, f"{found.folder} is of another autoencoder ({', '.join(changed)}); explain this one"
        except ValueError as error:
            return None, str(error)
        return found, None

    def _manifest(self, name: str, kind: str) -> dict[str, Any] | None:
        path = self.folder / name
        return artifacts.read_manifest(path, kind) if path.exists() else None

    def _stamp(self) -> tuple[files.Stamp, ...]:
        names = ("explain/manifest.json", "explain/words.sqlite", "eval.json", "autoencoder/config.json", "config.json")
        return tuple(files.stamp(self.folder / name) for name in names)
