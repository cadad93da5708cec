"""What Ctrl-C, SIGTERM and SIGHUP do to a command, and do not do to a caller in Python."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from monosem import interrupts


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Python's own handler of Ctrl-C, even where the tests run in the background; all as before afterwards."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_stops_what_runs_and_says_with_which_code(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        signal.raise_signal(number)
    assert interrupts.exit_code() == 128 + number


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_postponed_signal_is_an_event(number: signal.Signals) -> None:
    with interrupts.handled(), pytest.raises(KeyboardInterrupt, match="saved"), interrupts.postponed() as stop:
        signal.raise_signal(number)
        assert stop.is_set()
        raise KeyboardInterrupt("saved")


def test_a_signal_that_nobody_looked_at_is_not_lost() -> None:
    with interrupts.handled(), pytest.raises(KeyboardInterrupt), interrupts.postponed():
        signal.raise_signal(signal.SIGTERM)


def test_after_a_postponed_part_signals_stop_at_once_again() -> None:
    with interrupts.handled():
        with interrupts.postponed() as stop:
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert not stop.is_set()


def test_the_library_installs_no_handler() -> None:
    """Only the command does, and puts back what was there."""
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.postponed() as stop:
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not stop.is_set()
    with interrupts.handled():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup, and Ctrl-C in what a shell runs in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts.handled():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from monosem import interrupts
with interrupts.handled(), interrupts.postponed() as stop:
    signal.raise_signal(signal.SIGTERM)
    print(stop.is_set(), flush=True)
    signal.raise_signal({int(second)})
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (-second, "True\n"), done.stderr
