"""A machine at its limits: one clear line and an exit code, never a traceback, never no end."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monosem import cli, logs, resources
from monosem.config import ExplainConfig
from monosem.explanations.entry import explain
from tiny import tiny_run

TINY_HARVEST = (
    "--context-length", "16", "--n-tokens", "400", "--n-tokens-held-out", "200", "--held-out-fraction", "0.2",
    "--block-contexts", "8", "--dtype", "float32", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path) -> Path:
    out = tmp_path_factory.mktemp("environment") / "run"
    tiny_run(out, tiny_model, tiny_corpus)
    return out


def command(*argv: Any, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m monosem` with these arguments."""
    line = [sys.executable, "-m", "monosem", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(line, env=environment, text=True, timeout=100, check=False, **pipes)


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """This process may have no more of something for a while."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Its one line about what was wrong."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("monosem: error: "), done.stderr
    return last


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_closed_stream_stops_nothing(number: int, run: Path) -> None:
    closed: dict[str, Any] = {"preexec_fn": lambda: os.close(number)}
    done = command("plan", "--scaling", run / "none.json", "--flops", "1", **closed)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = command("--version", **closed)
    assert done.returncode == 0 and done.stderr == ""


def test_a_full_disk_behind_stdout_is_one_line(run: Path) -> None:
    with open("/dev/full", "w") as full:
        done = command("--help", stdout=full)
    assert "no room to write" in the_error(done) and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = command("--help", stdout=writing)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == ""


def test_work_goes_on_where_nobody_watches(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """stderr is a pipe that nobody reads any more."""
    flags = ["--out", tmp_path / "store", "--model", tiny_model, "--corpus", tiny_corpus, *TINY_HARVEST]
    reading, writing = os.pipe()
    os.close(reading)
    done = command("harvest", *flags, stderr=writing)
    os.close(writing)
    assert done.returncode == 0 and "training and" in done.stdout


def test_what_is_only_watched_may_be_lost() -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 closed below
    stream = logs.Unbreakable(full)
    assert stream.write("lost") == 4 and not stream.isatty()
    stream.flush()
    with contextlib.suppress(OSError):
        full.close()
    assert stream.write("closed") == 6 and not stream.isatty()
    stream.flush()


@pytest.mark.parametrize("env", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_terminal_of_ascii_alone_shows_escapes(env: dict[str, str], run: Path, tmp_path: Path) -> None:
    assert command("train", "--help", env=env).returncode == 0
    done = command("plan", "--flops", "1", "--scaling", tmp_path / "fehlt – ja", env=env)
    assert "does not exist" in the_error(done)


@pytest.mark.parametrize("columns", ["1", "2", "0", "-5", "many"])
def test_a_narrow_terminal_has_an_end(columns: str) -> None:
    done = command("train", "--help", env={"COLUMNS": columns})
    assert done.returncode == 0 and "--n-latents" in done.stdout


def test_no_home_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(resources.CACHE_VARIABLE)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ValueError, match="set HOME, or MONOSEM_CACHE to a folder"):
        resources.cache_folder()


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(resources.CACHE_VARIABLE, str(tmp_path / "file/cache"))
    with pytest.raises(ValueError, match=r"is not in the cache yet, and .*cache cannot be written"):
        resources.fetch("sae-probes-text")


def test_what_a_killed_process_left_in_the_cache_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (".model.abc123", ".model.downloads"):
        (tmp_path / name).mkdir()
    (tmp_path / ".other.abc").mkdir()
    with resources.new_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.abc", "model"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "no more threads can be started here; raise the limit (ulimit -u"),
        (
            OSError(24, "Too many open files", "/x"),
            "/x: Too many open files; raise the limit on open files (ulimit -n)",
        ),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied; change its permissions"),
        (OSError(30, "Read-only file system", "/x"), "/x: Read-only file system; choose another place"),
        (OSError(28, "No space left on device", "/x"), "no room to write (/x: No space left on device)"),
        (__import__("sqlite3").OperationalError("unable to open database file"), "unable to open database file"),
        (RuntimeError("Could not determine home directory."), "there is no home directory; set HOME"),
        (FileNotFoundError(2, "No usable temporary directory found"), "No usable temporary directory found"),
    ],
)
def test_limits_of_the_machine_are_told_in_a_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_stage", fail)
    assert cli.main(["eval", "r"]) == 2
    assert said in capsys.readouterr().err and "Errno" not in said


@pytest.mark.parametrize("stage", ["harvest", "train", "explain", "eval"])
def test_no_room_for_a_file_keeps_what_is_whole(
    stage: str, run: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a limit on the size of a file, as on a full disk; the same command then goes on."""
    shutil.copytree(run / "autoencoder", tmp_path / "run/autoencoder")
    trained = ["--n-latents", "48", "--k", "4", "--n-tokens", "500", "--batch-size", "100"]
    flags = {
        "harvest": ["--out", tmp_path / "store", "--model", tiny_model, "--corpus", tiny_corpus, *TINY_HARVEST],
        "train": ["--out", tmp_path / "new", "--store", run / "store", *trained],
        "explain": [tmp_path / "run", "--store", run / "store", "--n-tokens", "400", "--n2g", "1", "--ablations", "1"],
        "eval": [tmp_path / "run", "--store", run / "store", "--n-bootstrap", "20"],
    }[stage]
    argv = [stage, *map(str, flags)]
    with limited(resource.RLIMIT_FSIZE, 500 if stage == "eval" else 8_000):
        assert cli.main(argv) == 2
    assert "monosem: error: no room to write" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".lock"))
    assert cli.main(argv) == 0


def test_few_files_may_be_open(run: Path, tmp_path: Path) -> None:
    """A file a latent is written; they are not all open at once."""
    shutil.copytree(run / "autoencoder", tmp_path / "run/autoencoder")
    config = ExplainConfig(
        str(tmp_path / "run"), str(run / "store"), n_tokens=400, n2g=0, ablations="all", device="cpu"
    )
    with limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 20):
        assert explain(config).manifest["failed"] == {}
    assert len(list((tmp_path / "run/explain/ablations").glob("*.npz"))) > 30
