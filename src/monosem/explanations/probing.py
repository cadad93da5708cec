"""What every latent tells about labelled texts: the tasks that a logistic probe on it alone answers best.

Of each task and latent as in `evals.probes`: fitted on one half of the texts, mean pooling, judged on the other half.
A latent's tasks are ordered by what the probe gains over the share of labels on the half it was fitted on, in nats a
text, as tasks with few of one label have a small loss with any probe. Memory is 2 x N_BEST numbers a latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from monosem.evals import probes
from monosem.evals import tasks as labelled
from monosem.evals.tasks import Task
from monosem.explanations.job import Job
from monosem.logs import progress

N_BEST = 3
"""Tasks kept of each latent."""
N_TEXTS = 500
"""Of each task, half to fit and half to judge."""
MAX_TOKENS = 128
"""Of a text, its last."""


def digest(tasks: Sequence[Task]) -> str:
    """sha256 of the tasks' names, texts and labels."""
    return hashlib.sha256(repr([(task.name, task.texts, task.labels) for task in tasks]).encode()).hexdigest()


def make(job: Job, tasks: Sequence[Task]) -> list[str]:
    """Writes the columns; returns the tasks' names. `ValueError` when a task cannot be halved."""
    seed, autoencoder = job.config.seed, job.autoencoder
    halves = [labelled.split(task, n_texts=N_TEXTS, seed=seed) for task in tasks]  # all refusals before any work
    best = np.zeros((job.n_latents, N_BEST + 1, 3), np.float32)  # gain, loss, auc
    best[:, :, 0] = -np.inf
    which = np.full((job.n_latents, N_BEST + 1), -1, np.int16)
    named = list(zip(tasks, halves, strict=True))
    for i, (task, (train, held_out)) in enumerate(progress(named, "probe", "task", total=len(named))):
        texts, labels = [task.texts[t] for t in train + held_out], torch.tensor(task.labels).bool()
        pooled = probes.pool(job.reading_subject, autoencoder, job.store.site, texts, max_tokens=MAX_TOKENS)
        x = pooled.by_pooling["mean"]
        found = probes.of_each(autoencoder, x[: len(train)], labels[train], x[len(train) :], labels[held_out])
        best[:, -1], which[:, -1] = torch.stack(found, dim=1).numpy(), i
        order = np.argsort(-best[:, :, 0], axis=1, kind="stable")
        best, which = np.take_along_axis(best, order[:, :, None], axis=1), np.take_along_axis(which, order, axis=1)
    _write(job, best[:, :N_BEST], which[:, :N_BEST])
    return [task.name for task in tasks]


def _write(job: Job, best: np.ndarray, which: np.ndarray) -> None:
    write = job.writer.write
    _, loss, auc = np.where(which[..., None] >= 0, best, np.nan).transpose(2, 0, 1)
    judged = "on the half of the texts that it was not fitted on"
    write("probe_best", loss[:, 0], f"loss of a probe on this latent alone, in its best task, {judged}, nats a text")
    write("probe_auc", auc[:, 0], f"probability that it ranks a text of label 1 above one of label 0, there, {judged}")
    write("probe_task", which[:, 0], "its best task, a row of probe_tasks in the manifest")
    write("probe_top_task", which, "its best tasks, the best first, by the gain over the share of labels; -1 for none")
    write("probe_top_loss", loss, "their losses, as probe_best")
    write("probe_top_auc", auc, "their probabilities, as probe_auc")


def facts(tasks: Sequence[Task], seed: int) -> dict[str, Any]:
    """On what the columns depend, beside the autoencoder and the store."""
    return {"tasks": digest(tasks), "n_texts": N_TEXTS, "seed": seed}
