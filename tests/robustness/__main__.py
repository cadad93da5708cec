"""The command of the campaign: one seed, or many in two processes with a report."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from robustness import jobs
from robustness.campaign import FAULTS, VERDICTS, Trial, trial
from robustness.jobs import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m robustness", description=__doc__)
    parser.add_argument("--seed", type=int, help="the one trial of this seed, or the first of --trials")
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after so many")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", help="folder for report.json and faults.jsonl")
    asked = parser.parse_args()
    first, started = asked.seed or 0, time.monotonic()
    n_jobs = min(asked.jobs, asked.trials)
    parts = [(list(range(first + i, first + asked.trials, n_jobs)), asked.seconds) for i in range(n_jobs)]
    with concurrent.futures.ThreadPoolExecutor(n_jobs) as pool:
        found = sorted(t for part in pool.map(_in_a_process, parts) for t in part)
    counts = collections.Counter(one.verdict for one in found)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS), f"of {len(found)} trials")
    if asked.out:
        write(Path(asked.out), found, time.monotonic() - started)
    return 1 if any(counts[fault] for fault in FAULTS) or not found else 0


def _in_a_process(part: tuple[list[int], float]) -> list[Trial]:
    """The trials of the seeds, in an interpreter of its own that is told the seeds and tells what came of them.

    Faults are printed as they come; of a single trial, all that came of it.
    """
    asked_for_one = len(part[0]) == 1
    command = [sys.executable, "-c", "from robustness.__main__ import work; work()"]
    found = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(part))
        process.stdin.close()
        for line in process.stdout:
            one = Trial(*json.loads(line))
            found.append(one)
            if one.verdict in FAULTS or asked_for_one:
                print(f"seed {one.seed}: {one.verdict}: {one.did}\n    {one.why}", flush=True)
    if process.returncode or (len(found) < len(part[0]) and part[1] == float("inf")):
        raise RuntimeError(f"the process ended with {process.returncode} after {len(found)} of {len(part[0])} trials")
    return found


def work() -> None:
    """In that interpreter: seeds from stdin, a line of JSON a trial to stdout."""
    seeds, seconds = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.monotonic()
    jobs.warm()
    with tempfile.TemporaryDirectory(prefix="robustness-") as folder:
        world = World(Path(folder).resolve())
        world.make()
        for seed in seeds:
            if time.monotonic() - started > seconds:
                break
            out.write(json.dumps(trial(world, seed)) + "\n")
            out.flush()


def write(folder: Path, found: list[Trial], seconds: float) -> None:
    """report.json: counts by verdict, and by kind, command and file; faults.jsonl: every trial that found one."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    report = {
        "trials": len(found),
        "seeds": [found[0].seed, found[-1].seed] if found else [],
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "seconds": round(seconds),
        "verdicts": _counts(found),
        **{f"by_{name}": _by(found, name) for name in ("kind", "job", "file")},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    faults = [json.dumps(t._asdict()) + "\n" for t in found if t.verdict in FAULTS]
    (folder / "faults.jsonl").write_text("".join(faults))


def _by(found: list[Trial], name: str) -> dict[str, dict[str, int]]:
    keys = sorted({getattr(t, name) for t in found} - {""})
    return {key: _counts([t for t in found if getattr(t, name) == key]) for key in keys}


def _counts(found: list[Trial]) -> dict[str, int]:
    counts = collections.Counter(t.verdict for t in found)
    return {verdict: counts[verdict] for verdict in VERDICTS}


if __name__ == "__main__":
    sys.exit(main())
