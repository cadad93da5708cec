"""A campaign finds what is planted in a command, and nothing where there is nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustness import campaign, damage, forks, jobs
from robustness.forks import Disturbance
from robustness.jobs import Job, World


def honest() -> int:
    """What a command should be: it checks its file by the sum in it, and refuses one that was changed."""
    try:
        data = json.loads(Path("in.json").read_text())
        if set(data) != {"numbers", "sum", "about"} or data["about"] != "" or sum(data["numbers"]) != data["sum"]:
            raise ValueError("another sum")
        if any(type(n) is not int for n in data["numbers"]) or Path("in.json").is_symlink():
            raise ValueError("other types")
    except (ValueError, OSError, TypeError, RecursionError) as error:
        print(f"monosem: error: in.json cannot be used ({type(error).__name__})", file=sys.stderr)
        return 2
    _write("out.json", {"sum": data["sum"]})
    return 0


def trusting() -> int:
    """Takes any number for what it is."""
    try:
        _write("out.json", {"sum": sum(json.loads(Path("in.json").read_text())["numbers"])})
    except Exception:
        return honest()
    return 0


def careless() -> int:
    _write("out.json", {"sum": sum(json.loads(Path("in.json").read_text())["numbers"])})
    return 0


def patient() -> int:
    while honest():
        time.sleep(1)
    return 0


def greedy() -> int:
    Path("precious.txt").write_text("ours")
    return honest()


def torn() -> int:
    """Leaves half of a file when it is stopped, and takes it for a whole one."""
    if not Path("out.json").exists():
        Path("out.json").write_text('{"su')
        os.mkdir("made")
        _write("out.json", {"sum": 6})
        os.rmdir("made")
    return 0


def _write(name: str, data: Any) -> None:
    Path(f".{name}.tmp").write_text(json.dumps(data))
    os.replace(f".{name}.tmp", name)


def found_in(
    call: Callable[[], int], folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: range, kind: str
) -> set[str]:
    """The verdicts of trials of one kind on a world with this one command."""

    class Planted(Job):
        def call(self) -> Callable[[], int]:
            return call

    job = Planted("planted", ["planted"], ("in.json",), ("out.json",), resumes=kind == "kill")
    world = World(folder / "world")
    world.done.mkdir(parents=True)
    (world.folder / "elsewhere").mkdir()
    (world.done / "in.json").write_text(json.dumps({"numbers": [1, 2, 3], "sum": 6, "about": ""}))
    world.set_up(job, "fresh")
    usual = forks.run(honest if call is not torn else torn, world.trial)
    world.n_events["planted"], world.stdout["planted"] = usual.n_events, usual.stdout
    world.after["planted"] = jobs.snapshot(world.trial, job.outs)
    monkeypatch.setattr(campaign, "JOBS", (job,))
    monkeypatch.setattr(campaign, "KINDS", {kind: 1})
    monkeypatch.setattr(campaign, "SIGNALS", (9,))
    monkeypatch.setattr(campaign, "TIMEOUT_S", 2.0)
    return {campaign.trial(world, seed).verdict for seed in seeds}


@pytest.mark.parametrize(
    ("call", "fault"), [(trusting, "silent"), (careless, "traceback"), (patient, "hang"), (greedy, "lost")]
)
def test_a_planted_fault_is_found(
    call: Callable[[], int], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = range(3 if fault == "hang" else 25)
    assert fault in found_in(call, tmp_path, monkeypatch, seeds, "damage")


def test_an_honest_command_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not found_in(honest, tmp_path / "a", monkeypatch, range(30), "damage") & set(campaign.FAULTS)
    assert found_in(honest, tmp_path / "b", monkeypatch, range(10), "kill") == {"identical"}


def test_a_torn_file_is_found_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "silent" in found_in(torn, tmp_path, monkeypatch, range(20), "kill")


def without_seals() -> None:
    """Print what comes of seeds in the config of an autoencoder that `eval` reads; in a process of its own."""
    from monosem import formats

    jobs.warm()
    config = "run/autoencoder/config.json"
    jobs.JOBS = tuple(jobs.BY_NAME[name] for name in ("harvest", "train", "eval"))
    world = World(Path("world").resolve())
    world.make()
    evaluate = jobs.BY_NAME["eval"]
    campaign.JOBS = (evaluate._replace(needs=(config,), user=(*evaluate.needs, *evaluate.user), resumes=False),)
    campaign.KINDS = {"damage": 1}
    found = [[campaign.trial(world, seed).verdict for seed in range(4)]]
    formats.is_sealed = lambda data: True
    found.append([campaign.trial(world, seed).verdict for seed in range(4)])
    print(json.dumps(found))


def test_without_seals_damage_is_silent(tmp_path: Path) -> None:
    with_seals, without = json.loads(python(tmp_path, "-c", "import test_robustness as t; t.without_seals()"))
    assert with_seals == ["refused"] * 4
    assert "silent" in without


FIRST_SEED, N_TRIALS = 1395, 32
"""Among which every kind of trial and every command occur."""


def test_a_short_campaign_finds_no_fault(tmp_path: Path) -> None:
    python(tmp_path, "-m", "robustness", "--seed", FIRST_SEED, "--trials", N_TRIALS, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["trials"] == N_TRIALS
    assert {fault: report["verdicts"][fault] for fault in campaign.FAULTS} == dict.fromkeys(campaign.FAULTS, 0)
    assert set(report["by_kind"]) == set(campaign.KINDS) and set(report["by_job"]) == set(jobs.BY_NAME)


def python(folder: Path, *words: object) -> str:
    """What Python prints, with the tests and the package at hand; a failure shows all that it said."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *map(str, words)]
    found = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_a_seed_is_a_trial(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in.json").write_text(json.dumps({"a": [1, {"b": "c"}], "d": 0.5}))
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    usual = {path: path.read_bytes() for path in (tmp_path / "in.json", tmp_path / "t.csv")}
    for path, data in usual.items():
        for seed in range(60):
            for change in (lambda path, rng: damage.change(path, rng, tmp_path / "elsewhere"), damage.mutate):
                said = set()
                for _ in range(2):
                    jobs.remove(path)
                    path.write_bytes(data)
                    said.add(change(path, random.Random(seed)))
                assert len(said) == 1


def test_a_disturbance_comes_at_its_event(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/in.json").write_text(json.dumps({"numbers": [1], "sum": 1, "about": ""}))
    usual = forks.run(honest, tmp_path / "work")
    assert (usual.code, usual.n_events) == (0, 2)
    for at, left in ((1, False), (2, True)):
        jobs.remove(tmp_path / "work/out.json")
        killed = forks.run(honest, tmp_path / "work", Disturbance(at, 9))
        assert killed.code == -9 and killed.n_events == at and not (tmp_path / "work/out.json").exists()
        assert (tmp_path / "work/.out.json.tmp").exists() == left
    full = forks.run(honest, tmp_path / "work", Disturbance(1, errno=errno.ENOSPC))
    assert full.code == 1 and "No space left" in full.stderr
