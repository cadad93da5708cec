"""Time the demo, `monosem run` and then `monosem explain` of defaults in a fresh folder, and keep its seconds.

    python experiments/demo_times.py --runs 3                   three runs on this machine, at this commit
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MONOSEM_NATIVE_LEVEL=avx2 python experiments/demo_times.py --runs 3
    python experiments/tables.py                                fills the README's table from what is kept

It uses the monosem that this python has installed. A run that is done is kept at once, and the same command goes on
from there: it makes as many as are still missing for this machine, these environment variables and this commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from monosem import artifacts, dtypes, kernels

RESULTS = Path("results/smollm2-135m-instruct-q4_1/demo-times.json")
VARIABLES = (*dtypes.ISA_VARIABLES, "MONOSEM_NATIVE_LEVEL", "OMP_NUM_THREADS")
"""All that may hold a machine below what it can."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs to have of this machine and commit (default 3)")
    parser.add_argument("--folder", help="where the runs are made, and deleted again; default: a temporary folder")
    asked = parser.parse_args()
    about = {"machine": machine(), "commit": commit()}
    while (n := sum({name: run[name] for name in about} == about for run in kept())) < asked.runs:
        print(f"run {n + 1} of {asked.runs}: {about}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="monosem-demo-", dir=asked.folder) as folder:
            found = timed(Path(folder) / "demo")
        run = {**about, "date": datetime.date.today().isoformat(), "versions": artifacts.versions(), **found}
        artifacts.write_json(RESULTS, [*kept(), run])
        print(json.dumps(found["seconds"]))


def kept() -> list[dict[str, Any]]:
    return artifacts.read_json(RESULTS) if RESULTS.exists() else []


def timed(out: Path) -> dict[str, Any]:
    """Seconds of each stage of a demo in `out`; `total` is what a person waits, with the start of both commands."""
    started = time.monotonic()
    monosem("run", "--out", str(out))
    explaining = time.monotonic()
    monosem("explain", str(out))
    ended = time.monotonic()
    stages = artifacts.read_json(out / "run.json")["seconds"]
    seconds = {name: stages[name] for name in ("fetch", "harvest", "train", "evaluate")}
    explained = artifacts.read_json(out / "explain" / "manifest.json")
    return {
        "seconds": {**seconds, "explain": round(ended - explaining, 1), "total": round(ended - started, 1)},
        "explain_parts": {name: part["seconds"] for name, part in explained["computed"].items()},
        "n_rules": explained["computed"]["n2g"]["n_latents"],
        "n_ablated": explained["computed"]["ablations"]["n_latents"],
        "subject_dtype": artifacts.read_json(out / "store" / "manifest.json")["subject_dtype"],
        "normalized_mse": artifacts.read_json(out / "eval.json")["metrics"]["normalized_mse"]["value"],
    }


def monosem(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "monosem", *arguments], check=True, stdout=subprocess.DEVNULL)


def machine() -> dict[str, Any]:
    """The CPU, the instructions in force in our kernels and in torch, and threads."""
    found = dtypes.this_machine()
    level = "torch"
    if kernels.native_is_built():
        from monosem.kernels import native

        level = native._native.level()
    names = ("cpu", "flags", "capability", "threads", "torch")
    limits = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {**{name: found[name] for name in names}, "kernels": level, "environment": limits}


def commit() -> str:
    """Of the working folder, where that is a checkout (-dirty: changed outside results/); else monosem's version."""
    git = shutil.which("git")
    if git is None or not Path(".git").exists():
        return artifacts.versions()["monosem"]

    def ask(*command: str) -> str:
        return subprocess.run([git, *command], capture_output=True, text=True, check=True).stdout.strip()

    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return ask("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


if __name__ == "__main__":
    main()
