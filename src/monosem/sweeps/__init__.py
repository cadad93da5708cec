"""Activations -> many autoencoders: runs that share store, order and batch size are fed from one stream.

A batch is read, shuffled and normalised once and fed to each run that still needs it, one after the other, so that
every run ends in the bits that `monosem train` gives it alone. The sweep's folder holds
    runs/NAME/     one run, as `monosem train` leaves it
    runs.csv       one row a run and evaluation point (`sweeps.table`)
    sweep.json     the runs with their configs and states, and where the time went
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from monosem import artifacts, interrupts
from monosem.activations import ActivationStore
from monosem.checkpoint import saved_step
from monosem.config import SweepConfig, TrainConfig, changed_fields, to_dict
from monosem.logs import LiveTable
from monosem.stream import ActivationStream, StoreSource
from monosem.sweeps import grid, memory, table
from monosem.torch_state import pinned
from monosem.training import Diverged, Run, Supply, begin, identity, is_finished
from monosem.types import free_memory, resolve_device

log = logging.getLogger("monosem")

_KIND = "sweep"
_FIXED = ("eval_every", "eval_tokens", "n_bootstrap")
"""Fields of the config that decide what is in runs.csv; the others may change between stop and resume."""


@dataclasses.dataclass
class Member:
    """One run of the sweep, whether it is in memory (`run`) or not."""

    name: str
    config: TrainConfig
    store: ActivationStore
    status: str = "waiting"
    """waiting, training, finished or diverged."""
    error: str | None = None
    step: int = 0
    evaluation_s: float = 0.0
    kernel_s: float = 0.0
    product_s: float | None = None
    run: Run | None = None
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The newest numbers, for the table on the screen."""

    @property
    def identity(self) -> dict[str, Any]:
        return identity(self.config)

    @property
    def hash(self) -> str:
        return table.json_hash(self.identity)

    @property
    def n_steps(self) -> int:
        return -(-self.config.n_tokens // self.config.batch_size)

    @property
    def active(self) -> bool:
        return self.status in ("waiting", "training")

    def facts(self) -> dict[str, Any]:
        """What sweep.json says of it."""
        measured = self.product_s is not None and self.kernel_s > 0
        return {
            "config": self.identity,
            "config_hash": self.hash,
            "store": str(self.store.path),
            "store_hash": self.store.hash,
            "status": self.status,
            "error": self.error,
            "step": self.step,
            "n_steps": self.n_steps,
            "kernel_s": round(self.kernel_s, 3),
            "product_share": (self.product_s or 0.0) / self.kernel_s if measured else "not measured",
            "evaluation_s": round(self.evaluation_s, 3),
        }


@pinned
def sweep(config: SweepConfig) -> dict[str, Any]:
    """Train what is not yet trained of the grid; returns what sweep.json then holds.

    Where `hours` ran out first, runs are still `training` in it, and the same call goes on. A run that diverges is
    marked so and the others go on. `ValueError` for a wrong grid, runs that do not fit in memory, or a folder with a
    sweep that is not part of this one; `KeyboardInterrupt` after Ctrl-C, with all states saved
    where `interrupts.handled()` is open, as in the command.
    """
    for name in ("out", "grid"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; give a folder for out, a JSON file for grid")
    artifacts.require_no_other(config.out, _KIND)
    asked = grid.runs(config)
    if (found := _Sweep(config, asked, threading.Event()).finished()) is not None:  # read without a lock
        log.info("all runs of %s are already finished; skipped", config.out)
        return found
    with artifacts.folder_lock(config.out), interrupts.postponed() as interrupted:
        return _Sweep(config, asked, interrupted).run()


class _Sweep:
    """The members, their table, and where the seconds go."""

    def __init__(self, config: SweepConfig, asked: list[TrainConfig], interrupted: threading.Event) -> None:
        self.config, self.out, self.interrupted = config, Path(config.out), interrupted
        self.began = self.saved_at = time.monotonic()
        self.before = _read(self.out / "sweep.json", config)
        stores = {path: ActivationStore.open(path) for path in {run.store for run in asked}}
        self.members = _members(config, asked, stores, self.before.get("runs", {}))
        known = {name: facts["rows"] for name, facts in self.before.get("runs", {}).items()}
        self.table = table.RunsTable(self.out / "runs.csv", known)
        self.live = LiveTable()
        self.memory: list[str] = []
        names = ("kernel_s", "evaluating_s", "saving_s", "starting_s", "waiting_s")
        self.seconds = {name: self.before.get("seconds", {}).get(name, 0.0) for name in names}

    def finished(self) -> dict[str, Any] | None:
        """What sweep.json holds, if all that is asked for is done."""
        for member in self.members:
            self._find(member)
        done = {m.name for m in self.members if not m.active}
        known = self.before.get("runs", {})
        return self.before if known.keys() == done == {m.name for m in self.members} else None

    def run(self) -> dict[str, Any]:
        for member in self.members:
            self._find(member)
        waves = list(self._waves())
        self._write()
        for members in waves:
            self._train(members)
            if self.stopping:
                break
        self.live.draw(self._lines, last=True)
        report = self._write()
        if self.interrupted.is_set():
            raise KeyboardInterrupt(f"stopped; {self._progress()}; run the same command to go on")
        return report

    @property
    def stopping(self) -> bool:
        hours = self.config.hours
        return self.interrupted.is_set() or (hours is not None and time.monotonic() - self.began > hours * 3600)

    def _find(self, member: Member) -> None:
        """Set the member's status from what is on disk."""
        known = self.before.get("runs", {}).get(member.name, {})
        member.evaluation_s, member.kernel_s = known.get("evaluation_s", 0.0), known.get("kernel_s", 0.0)
        share = known.get("product_share", "not measured")
        member.product_s = None if isinstance(share, str) else share * member.kernel_s
        released = is_finished(member.config, member.store)
        member.step = saved_step(Path(member.config.out) / "state")
        if known.get("status") == "diverged":
            member.status, member.error, member.step = "diverged", known["error"], known["step"]
        elif released and self.table.finished(member.name):
            member.status, member.step = "finished", member.n_steps

    def _waves(self) -> Iterator[list[Member]]:
        """The members that are still to be trained, as they share streams and memory."""
        todo: dict[tuple, list[Member]] = {}
        for member in sorted(self.members, key=lambda m: -m.step):  # those ahead first, so that waves stay together
            c = member.config
            if member.active:
                todo.setdefault((member.store.path, c.data_seed, c.batch_size, c.device), []).append(member)
        for members in todo.values():
            first, device = members[0], resolve_device(members[0].config.device)
            store, batch_size = first.store, first.config.batch_size
            sizes = [memory.run_bytes(m.config, store.width, device) for m in members]
            element_bytes = 2 if store.manifest["dtype"] == "bfloat16" else 4
            n_held_out = min(self.config.eval_tokens + store.block_rows, store.n_rows("held_out"))
            shared = memory.stream_bytes(StoreSource(store, "train"), batch_size, element_bytes, n_held_out)
            free = free_memory(device)
            memory.check_disk(self.out, {Path(m.config.out): size for m, size in zip(members, sizes, strict=True)})
            for wave in memory.waves(sizes, shared, free, split=self.config.waves):
                self.memory.append(f"{len(wave)} runs: {memory.Plan([sizes[i] for i in wave], shared)}")
                log.info("memory for %s", self.memory[-1])
                yield [members[i] for i in wave]

    def _train(self, members: list[Member]) -> None:
        """Train the members, all on one stream, until they are done or the sweep is to stop."""
        store, c = members[0].store, members[0].config
        with (
            contextlib.ExitStack() as locks,
            ActivationStream(StoreSource(store, "train"), batch_size=c.batch_size, seed=c.data_seed) as stream,
        ):
            supply = Supply(store, stream, resolve_device(c.device))
            with self._clock("starting_s"):
                held_out = table.HeldOut(store, self.config.eval_tokens, self.config.n_bootstrap)
                for member in members:
                    locks.enter_context(artifacts.folder_lock(member.config.out))
                    self._start(member, supply)
            while runs := [(m, m.run) for m in members if m.run is not None]:
                stream.seek(max(stream.n_batches, min(run.position for _, run in runs)))
                at = stream.n_batches
                with self._clock("waiting_s"):
                    x = supply.batch()
                for member, run in runs:
                    if run.position == at:  # those ahead wait until the stream has caught up
                        self._feed(member, run, x, held_out)
                self.live.draw(self._lines)
                if self.stopping or time.monotonic() - self.saved_at > self.config.save_every_s:
                    self._save(members)
                if self.stopping:
                    for member in members:
                        member.run = None

    def _start(self, member: Member, supply: Supply) -> None:
        member.run, member.status = Run(member.config, supply), "training"
        begin(member.config, member.store)
        member.step, member.kernel_s = member.run.state.step, member.run.work.kernel_s
        if self.table.rewind(member.name, member.run.tokens_seen):
            self._write()  # first, as it vouches for the rows: a kill leaves too many of these, never too few
            self.table.write()

    def _feed(self, member: Member, run: Run, x: torch.Tensor, held_out: table.HeldOut) -> None:
        before_s, before = run.work.kernel_s, run.state.step
        releasing = before == run.recipe.n_steps
        try:
            with self._clock("evaluating_s") if releasing else contextlib.nullcontext():
                run.feed(x)
            at_point = run.state.step > before and run.state.step in table.points(run.config, self.config.eval_every)
            if at_point or run.released:
                self._evaluate(member, run, held_out)
                self._write()
        except Diverged as error:
            self._fail(member, run, error)
        self.seconds["kernel_s"] += run.work.kernel_s - before_s
        member.step, member.kernel_s, member.product_s = run.state.step, run.work.kernel_s, run.work.product_s
        member.shown |= run.last_row
        if run.released:
            member.status, member.run = "finished", None
            self._write()

    def _evaluate(self, member: Member, run: Run, held_out: table.HeldOut) -> None:
        """Add the run's row. Changes nothing of the run; `Diverged` when its numbers are not finite."""
        with self._clock("evaluating_s") as clock:
            run.raise_if_diverged()
            autoencoder = run.released
            if autoencoder is None:
                chosen, _ = run.better_weights(run.supply.sample[:: table.SELECTION_STRIDE].to(run.device))
                autoencoder = run.autoencoder(chosen)
            else:
                chosen = autoencoder.provenance["weights"]
            try:
                measured = held_out.measure(autoencoder, run)
            except ValueError as error:
                raise Diverged(f"at step {run.state.step} {error}") from None
            self.table.add(table.row(member.name, run, member.hash, weights=chosen, **measured))
            member.shown |= measured
        member.evaluation_s += clock()

    def _fail(self, member: Member, run: Run, error: Diverged) -> None:
        log.warning("%s: %s", member.name, error)
        member.status, member.error, member.run = "diverged", str(error), None
        self.table.add(table.row(member.name, run, member.hash, status="diverged"))
        self._write()

    def _save(self, members: list[Member]) -> None:
        with self._clock("saving_s"):
            for member in members:
                if member.run is not None:
                    member.run.save()
            self._write()
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[Any]:
        """Add the seconds inside to `seconds[name]`; gives a function that says how many they have been."""
        started = time.perf_counter()
        try:
            yield lambda: time.perf_counter() - started
        finally:
            self.seconds[name] += time.perf_counter() - started

    def _write(self) -> dict[str, Any]:
        """Write sweep.json; returns what it holds."""
        wall_s = self.before.get("seconds", {}).get("wall_s", 0.0) + time.monotonic() - self.began
        seconds = {name: round(s, 3) for name, s in {"wall_s": wall_s, **self.seconds}.items()}
        kernel_s = self.seconds["kernel_s"]
        ratio = round((wall_s - self.seconds["evaluating_s"]) / kernel_s, 4) if kernel_s else None
        settings = {name: value for name, value in to_dict(self.config).items() if name in _FIXED}
        sources = {f"store {m.store.path}": m.store.hash for m in self.members}
        facts = {
            "runs": {m.name: {**m.facts(), "rows": self.table.kept(m.name)} for m in self.members},
            "seconds": {**seconds, "ratio": ratio},
            "memory": self.memory,
        }
        report = artifacts.manifest(_KIND, settings, sources, **facts)
        artifacts.write_json(self.out / "sweep.json", report)
        return report

    def _progress(self) -> str:
        return _counted([m.status for m in self.members])

    def _lines(self) -> list[str]:
        """The table on the screen: a header, then a line a run."""
        width = max(len(m.name) for m in self.members)
        head = f"{'run':<{width}} {'step':>15} {'loss':>8} {'NMSE':>8} {'L0':>7} {'dead':>6} {'tok/s':>8}"
        return [f"{head}  {self._progress()}", *(_line(m, width) for m in self.members)]


def summary(report: dict[str, Any]) -> str:
    """The state of a sweep in a line or two, for people."""
    statuses = [run["status"] for run in report["runs"].values()]
    lines = [_counted(statuses)]
    if ratio := report["seconds"]["ratio"]:
        lines.append(f"{ratio:.3f} times the kernels' seconds, evaluations apart")
    lines += [f"{name} diverged: {r['error']}" for name, r in report["runs"].items() if r["status"] == "diverged"]
    if {"training", "waiting"} & set(statuses):
        lines.append("time is up and everything is saved; run the same command to go on")
    return "\n".join(lines)


def _counted(statuses: list[str]) -> str:
    counts = {s: statuses.count(s) for s in ("finished", "training", "waiting", "diverged")}
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n)


def _read(path: Path, config: SweepConfig) -> dict[str, Any]:
    """The sweep that the folder holds, or an empty one; `ValueError` when its rows were measured otherwise."""
    if not path.exists():
        return {}
    found = artifacts.read_manifest(path, _KIND)
    if changed := changed_fields(found["config"], {name: getattr(config, name) for name in _FIXED}):
        raise ValueError(f"{path.parent} holds a sweep with other {'; '.join(changed)}; choose another --out")
    return found


def _members(
    config: SweepConfig, asked: list[TrainConfig], stores: dict[str, ActivationStore], known: dict[str, Any]
) -> list[Member]:
    """A member a run asked for, under the name that the folder knows it by, else under a new one.

    `ValueError` when the folder knows a run that is not asked for, unless it never took a step.
    """
    keys = [(table.json_hash(identity(run)), stores[run.store].hash) for run in asked]
    names = {(facts["config_hash"], facts["store_hash"]): name for name, facts in known.items()}
    begun = {name for name, facts in known.items() if facts["step"] or facts["status"] != "waiting"}
    names = {key: name for key, name in names.items() if key in keys or name in begun}
    if gone := [name for key, name in names.items() if key not in keys]:
        how = grid.nearest(known[gone[0]]["config"], [identity(run) for run in asked]) or "another store"
        raise ValueError(
            f"{config.out} holds run {gone[0]}, which {config.grid} does not ask for (nearest: {how}); "
            "runs may be added, not dropped: choose another --out"
        )
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{config.grid} asks twice for the same run (config {twice[0][0][:12]}); drop one")
    new = iter(grid.names(asked, set(names.values()), [key not in names for key in keys]))
    members = []
    for run, key in zip(asked, keys, strict=True):
        name = names[key] if key in names else next(new)
        out = str(artifacts.inside(Path(config.out) / "runs", name))
        members.append(Member(name, dataclasses.replace(run, out=out), stores[run.store]))
    return members


def _line(member: Member, width: int) -> str:
    shown = member.shown
    n_tokens = member.step * member.config.batch_size

    def number(name: str, form: str) -> str:
        value = shown.get(name)
        return "-" if value is None else format(value, form)

    speed = f"{n_tokens / member.kernel_s:,.0f}" if member.kernel_s and shown else "-"
    cells = [f"{member.step:>7,}/{member.n_steps:<7,}", f"{number('mse', '.4f'):>8}"]
    cells += [f"{number('normalized_mse', '.4f'):>8}", f"{number('l0', '.1f'):>7}"]
    cells += [f"{number('dead_latents', 'd'):>6}", f"{speed:>8}"]
    return f"{member.name:<{width}} {' '.join(cells)}  {member.status}"
