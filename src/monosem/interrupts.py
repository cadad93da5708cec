"""Signals that ask a command to stop: Ctrl-C, SIGTERM (schedulers, docker stop, timeout), SIGHUP (a closed terminal).

The library installs no signal handler: where it is called from Python, Ctrl-C is Python's own KeyboardInterrupt. The
command is wrapped in `handled`, where any of the three raises KeyboardInterrupt; inside `postponed` it only sets an
event, which training looks at between steps, saves and stops. A second signal ends the process at once.

    with interrupts.handled():          # for a program of yours that wants the same
        monosem.train(config)
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_received: int | None = None
_postponing: threading.Event | None = None


def exit_code() -> int:
    """What a stopped command exits with, as a shell counts: 128 + the signal (130 after Ctrl-C, 143 after SIGTERM)."""
    return 128 + (_received or signal.SIGINT)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """While open, the signals stop what runs here. Those that were ignored (`nohup`) stay so; so do all in threads."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = None
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextlib.contextmanager
def postponed() -> Iterator[threading.Event]:
    """While open, a first signal only sets the event; it raises KeyboardInterrupt at the end if nobody has by then."""
    global _postponing
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    before, _postponing = _postponing, threading.Event()
    event = _postponing
    try:
        yield event
    finally:
        _postponing = before
    if event.is_set():
        raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _received = number
    if _postponing is None:
        raise KeyboardInterrupt
    _postponing.set()
