"""metrics.jsonl is the truth: a kill tears at most its last line, and a resumed run writes on where it restarts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monosem import logs
from monosem.logs import MetricsLog, progress


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append({"step": step, "loss": 1 / step})
    return log


def steps(log: MetricsLog) -> list[int]:
    return [row["step"] for row in log.rows()]


def test_append_writes_one_json_object_a_line(log: MetricsLog) -> None:
    lines = log.path.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, "loss": 1 / s} for s in (10, 20, 30)]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "auxk_loss": float("nan"), "mse": float("inf")})
    assert log.path.read_text("utf-8") == '{"step": 1, "auxk_loss": null, "mse": null}\n'


def test_rows_of_a_log_not_yet_written_are_none(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(None)
    assert log.rows() == []
    assert not log.path.exists()


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_rewind_keeps_the_rows_that_a_state_knows(tmp_path: Path, n: int) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    states = [log.kept()]
    for step in (10, 20, 30):
        log.append({"step": step})
        states.append(log.kept())
    again = MetricsLog(log.path)
    again.rewind(states[n])
    assert steps(again) == [10, 20, 30][:n]
    assert again.kept() == states[n]
    again.rewind(None)
    assert steps(again) == []


@given(cut=st.integers(0, 200), saved=st.integers(0, 6))
def test_rewind_then_append_gives_the_uninterrupted_log(
    tmp_path_factory: pytest.TempPathFactory, cut: int, saved: int
) -> None:
    """Killed anywhere after a state was saved: the rows are those of a run without a stop."""
    rows = [{"step": s, "loss": 0.1 * s} for s in range(0, 60, 10)]
    log = MetricsLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    kept = log.kept()
    for i, row in enumerate(rows):
        log.append(row)
        kept = log.kept() if i < saved else kept
    data = log.path.read_bytes()
    log.path.write_bytes(data[: max(kept["bytes"], len(data) - cut)])
    log = MetricsLog(log.path)
    log.rewind(kept)
    for row in rows[saved:]:
        log.append(row)
    assert log.rows() == rows and log.path.read_bytes() == data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"\xff" + data[1:], "line 1 is not JSON"),
        (lambda data: data.replace(b"20", b"21"), "a row was changed"),
        (lambda data: data[:-3], "where there were"),
        (lambda data: data.replace(b"\n", b" ", 1), "is not JSON"),
    ],
)
def test_rewind_loses_no_row_of_a_file_that_is_not_as_the_state_knows_it(
    log: MetricsLog, change: Callable[[bytes], bytes], reason: str
) -> None:
    kept, data = log.kept(), log.path.read_bytes()
    log.path.write_bytes(change(data))
    with pytest.raises(ValueError, match=rf"metrics.jsonl is not as the saved state knows it \(.*{reason}"):
        MetricsLog(log.path).rewind(kept)
    assert log.path.read_bytes() == change(data)


def test_a_log_that_is_gone_is_begun_again_with_a_warning(log: MetricsLog, caplog: pytest.LogCaptureFixture) -> None:
    kept = log.kept()
    log.path.unlink()
    log = MetricsLog(log.path)
    log.rewind(kept)
    assert "is gone" in caplog.text
    log.append({"step": 40})
    assert steps(log) == [40]


def test_rows_refuse_a_bad_line_and_drop_a_torn_last_one(log: MetricsLog) -> None:
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-5])
    assert steps(log) == [10, 20]
    log.path.write_bytes(b"\xff" + data[1:])
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is no row"):
        log.rows()


def test_progress_yields_every_item_and_says_nothing_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "train", "tok", total=3)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_progress_shows_the_share_done_on_stderr_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    logs.show_progress(True)
    try:
        list(progress(range(3), "train", "tok", total=10, each=2, start=4))
    finally:
        logs.show_progress(False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "train: 100%" in err
    assert "10.0/10.0" in err
