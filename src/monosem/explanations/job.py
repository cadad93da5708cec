"""An explanation under way: what it is of, what of it is there, and what its parts share."""

from __future__ import annotations

import dataclasses
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from monosem import artifacts
from monosem.config import ExplainConfig, to_dict
from monosem.evals import tasks
from monosem.evals.tasks import Task
from monosem.explained import KIND
from monosem.explanations import collect
from monosem.explanations.store import ColumnWriter
from monosem.run_folder import open_run, subject_of
from monosem.subject import Subject
from monosem.types import resolve_device

log = logging.getLogger("monosem")

_MAY_CHANGE = ("run", "store", "device", "model", "tasks")

Of = dict[str, Any]
"""On what the result of a part depends, beside the autoencoder and the store."""


class Job:
    """One autoencoder, its store, and what of its explanation is there; the subject, loaded when first asked for."""

    def __init__(self, config: ExplainConfig, autoencoder: Path) -> None:
        self.config, self.folder = config, Path(config.run) / "explain"
        self.device = resolve_device(config.device)
        _, self.autoencoder, self.store = open_run(config.run, config.store, self.device)
        self.sources = {"autoencoder": artifacts.sha256_file(autoencoder / "config.json"), "store": self.store.hash}
        self.writer = ColumnWriter(self.folder)
        self._subjects: dict[tuple[Any, ...], Subject] = {}
        self.read()

    def read(self) -> None:
        """See what of this explanation is there."""
        self.computed: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        """Parts that could not be made, and why."""
        path = self.folder / "manifest.json"
        found = artifacts.read_manifest(path, KIND) if path.exists() else {}
        self.damaged: dict[str, str] = {}
        """Parts that are to be made again, and why."""
        if found.get("sources") == self.sources:
            self.computed, self.writer.columns, self.writer.files = (found[k] for k in ("computed", "columns", "files"))
            self.failed = found["failed"]
            self._check()

    @property
    def n_latents(self) -> int:
        return self.autoencoder.config.n_latents

    @cached_property
    def n_blocks(self) -> int:
        return min(self.store.n_blocks("train"), -(-self.config.n_tokens // self.store.block_rows))

    @cached_property
    def subject(self) -> Subject:
        """For losses and logits."""
        return subject_of(self.store, "float32", self.config.device, self._subjects, model=self.config.model)

    @cached_property
    def reading_subject(self) -> Subject:
        """To read activations off new texts."""
        return subject_of(
            self.store, self.store.subject_dtype, self.config.device, self._subjects, model=self.config.model
        )

    @cached_property
    def tasks(self) -> list[Task]:
        """The labelled texts asked for."""
        if not self.autoencoder.tells_pre_activations:
            raise ValueError("tasks are given, but this autoencoder does not tell its pre-activations; leave them out")
        assert self.config.tasks is not None
        return tasks.load(self.config.tasks)

    def column(self, name: str) -> np.ndarray:
        """A column of this explanation that a part before has written, memory-mapped."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def _check(self) -> None:
        for part in self.computed:
            try:
                self.writer.check(part)
            except ValueError as error:
                self.damaged[part] = str(error)
                log.warning("%s is made again: %s", part, error)

    def keep_only(self, wanted: dict[str, Of]) -> None:
        """Forget the parts that are damaged or depend on something else than `wanted`, before they are made again."""
        whole = {name: entry for name, entry in self.computed.items() if name not in self.damaged}
        kept = {name: entry for name, entry in whole.items() if entry["of"] == wanted.get(name)}
        if kept != self.computed or not kept:
            self.computed = kept
            self.writer.forget_all_but(kept)
            (self.folder / "manifest.json").unlink(missing_ok=True)
            if kept:
                self._write()

    def record(self, part: str, made: dict[str, Any]) -> None:
        self.computed[part] = made
        self._write()

    def fail(self, part: str, reason: str) -> None:
        """Remember that the part could not be made, also where none is made after it."""
        self.failed[part] = reason
        self._write()

    def _write(self) -> None:
        store = self.store
        settings = {name: value for name, value in to_dict(self.config).items() if name not in _MAY_CHANGE}
        facts = {
            "subject": store.manifest["subject"],
            "site": dataclasses.asdict(store.site),
            **dataclasses.asdict(self.autoencoder.config),
            "n_tokens": self.n_blocks * store.block_rows,
            "n_contexts": self.n_blocks * store.config["block_contexts"],
            "context_length": store.context_length,
            "first_position": store.first_position,
            "n_quantile_bands": collect.N_BANDS,
            "probe_tasks": self.computed.get("probes", {}).get("tasks", []),
            "computed": self.computed,
            "failed": self.failed,
            "columns": self.writer.columns,
            "files": self.writer.files,
        }
        artifacts.write_json(self.folder / "manifest.json", artifacts.manifest(KIND, settings, self.sources, **facts))
