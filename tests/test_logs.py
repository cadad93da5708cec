"""metrics.jsonl is the truth: a kill tears at most its last line, and a resumed run writes on where it restarts."""

from __future__ import annotations

import json
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
    log.rewind(5)
    assert log.rows() == []
    assert not log.path.exists()


@pytest.mark.parametrize(
    ("step", "kept"), [(5, []), (10, [10]), (29, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])]
)
def test_rewind_keeps_the_steps_up_to_and_including_the_given_one(log: MetricsLog, step: int, kept: list[int]) -> None:
    log.rewind(step)
    assert steps(log) == kept


def test_rewind_drops_a_torn_last_line_so_that_the_next_row_is_whole(log: MetricsLog) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-5])
    assert steps(log) == [10, 20]
    log.rewind(30)
    log.append({"step": 30, "loss": 0.5})
    assert log.rows()[-1] == {"step": 30, "loss": 0.5}
    assert steps(log) == [10, 20, 30]


@given(cut=st.integers(0, 200), step=st.integers(0, 60))
def test_rewind_then_append_gives_the_uninterrupted_log(
    tmp_path_factory: pytest.TempPathFactory, cut: int, step: int
) -> None:
    """Killed anywhere, restarted from a saved step that the log reaches: the rows are those of a run without a stop."""
    rows = [{"step": s, "loss": 0.1 * s} for s in range(0, 60, 10)]
    log = MetricsLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    for row in rows:
        log.append(row)
    log.path.write_bytes(log.path.read_bytes()[:-cut] if cut else log.path.read_bytes())
    saved = min(step, max(steps(log), default=-1))
    log.rewind(saved)
    for row in rows:
        if row["step"] > saved:
            log.append(row)
    assert log.rows() == rows


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
