"""One command in a process of its own, forked from one with everything imported, and what is made to go wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Disturbance(NamedTuple):
    """What happens the `at`-th time that the command opens a file to write, renames, removes, makes or flushes one."""

    at: int
    signal: int = 0
    errno: int = 0

    def __str__(self) -> str:
        what = signal.Signals(self.signal).name if self.signal else errno.errorcode[self.errno]
        return f"{what} at event {self.at}"


class Surroundings(NamedTuple):
    """Where a command runs, where that is not as usual."""

    environ: dict[str, str] = {}  # noqa: RUF012 never changed
    limits: dict[int, int] = {}  # noqa: RUF012 never changed
    stdout: str = "file"
    """file, closed, full (a disk) or gone (a pipe that nobody reads)."""

    def __str__(self) -> str:
        names = {resource.RLIMIT_FSIZE: "RLIMIT_FSIZE", resource.RLIMIT_NOFILE: "RLIMIT_NOFILE"}
        parts = [f"{names[limit]}={value}" for limit, value in self.limits.items()]
        parts += [f"{name}={value}" for name, value in self.environ.items()]
        return ", ".join([*parts, *([] if self.stdout == "file" else [f"stdout {self.stdout}"])])


class Outcome(NamedTuple):
    code: int
    """Exit code; minus the signal that ended it."""
    stdout: str
    stderr: str
    n_events: int
    hung: bool


def run(
    call: Callable[[], int],
    folder: Path,
    disturbance: Disturbance | None = None,
    surroundings: Surroundings | None = None,
    timeout_s: float = 180,
) -> Outcome:
    """`call()` in a process of its own with `folder` as its working folder; a hung one is killed."""
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "events")}  # a limit on files does not meet them
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(call, folder, [writer for _, writer in pipes.values()], disturbance, surroundings or Surroundings())
    readers = {}
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        readers[reader] = name
    said, hung = _read(readers, pid, time.monotonic() + timeout_s)
    _, status = os.waitpid(pid, 0)
    text = {name: b"".join(parts).decode("utf-8", "replace") for name, parts in said.items()}
    return Outcome(os.waitstatus_to_exitcode(status), text["stdout"], text["stderr"], len(text["events"]), hung)


def _read(readers: dict[int, str], pid: int, deadline: float) -> tuple[dict[str, list[bytes]], bool]:
    """All that comes until the other ends are closed; and whether the process had to be killed."""
    said: dict[str, list[bytes]] = {name: [] for name in readers.values()}
    hung, left = False, set(readers)
    while left:
        ready, _, _ = select.select(list(left), [], [], 0.2)
        for reader in ready:
            if part := os.read(reader, 1 << 16):
                said[readers[reader]].append(part)
            else:
                os.close(reader)
                left.remove(reader)
        if time.monotonic() > deadline and not hung:
            hung = True
            os.killpg(pid, signal.SIGKILL)
    return said, hung


def _child(
    call: Callable[[], int],
    folder: Path,
    writers: list[int],
    disturbance: Disturbance | None,
    surroundings: Surroundings,
) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(surroundings.environ)
        out, err, events = writers
        _redirect(out, err, surroundings)
        os.chdir(folder)
        _watch(folder, events, disturbance)
        for limit, value in surroundings.limits.items():
            resource.setrlimit(limit, (value, value))
        code = call()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def _redirect(out: int, err: int, surroundings: Surroundings) -> None:
    os.dup2(err, 2)
    if surroundings.stdout == "gone":
        reader, out = os.pipe()
        os.close(reader)
    elif surroundings.stdout == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    os.dup2(out, 1)
    coding = "ascii" if surroundings.environ.get("LANG") == "C" else "utf-8"
    sys.stdout = open(1, "w", closefd=False, encoding=coding, errors="strict")  # noqa: SIM115 as long as the process
    sys.stderr = open(2, "w", 1, closefd=False, encoding=coding, errors="backslashreplace")  # noqa: SIM115
    if surroundings.stdout == "closed":
        os.close(1)


def _watch(folder: Path, events: int, disturbance: Disturbance | None) -> None:
    """Count what the command does to files below the folder, a byte in the file `events` each; and disturb it."""
    counted, inside, flush = 0, str(folder), os.fsync
    paths = {"open": 1, "os.rename": 2}

    def happened(path: Any) -> None:
        nonlocal counted
        counted += 1
        os.write(events, b".")
        if disturbance is None or counted != disturbance.at:
            return
        if disturbance.signal:
            os.kill(os.getpid(), disturbance.signal)
        else:
            raise OSError(disturbance.errno, os.strerror(disturbance.errno), str(path))

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
            return
        if event not in _EVENTS and event != "open":
            return
        given = [
            os.fsdecode(path) for path in args[: paths.get(event, 1)] if isinstance(path, str | bytes | os.PathLike)
        ]
        if any(not os.path.isabs(path) or path.startswith(inside) for path in given):
            happened(given[-1])

    def fsync(descriptor: Any) -> None:
        happened(f"file {descriptor}")
        flush(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
