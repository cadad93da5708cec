"""`python -m benchmarks train|harvest|explain`: time ours (and the peers), print the table, write CSV, Markdown."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from pathlib import Path

from benchmarks import explain, harvest, report, train

STAGES = {"train": train, "harvest": harvest, "explain": explain}
RESULTS = Path(__file__).parent / "results"
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MONOSEM_NATIVE_LEVEL", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that hold all implementations to older instructions: part of the command."""


def main(arguments: list[str]) -> int:
    """0 when at least one of ours was timed, 1 when none was, 2 for a mistake."""
    options = parser().parse_args(arguments)
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    stage = STAGES[options.benchmark]
    facts = report.machine(options.threads, _command(options, arguments))
    before = report.cpu_seconds()
    try:
        rows = stage.run(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    facts["noise"] = report.noise(before, report.cpu_seconds(), os.times())
    text = report.markdown(options.benchmark, rows, facts, options)
    name = f"{options.benchmark}-{options.device}"
    report.write(Path(options.out), name, text, rows)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(text)
    return 0 if any(row["status"] == "ok" and report.is_ours(row["impl"]) for row in rows) else 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="benchmark", required=True)
    for name, stage in STAGES.items():
        command = commands.add_parser(name, help=(stage.__doc__ or "").splitlines()[0])
        stage.add_arguments(command)
        command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        command.add_argument("--threads", type=int, default=report.available_cpus(), help="of every implementation")
        command.add_argument("--memory-gib", type=float, default=report.available_gib() * 0.85, help="for all workers")
        command.add_argument("--json", help="also write the rows as JSON to this file")
        command.add_argument("--out", default=str(RESULTS), help="folder of the CSV and Markdown files")
        command.add_argument("--verbose", action="store_true")
    return top


def _command(options: argparse.Namespace, arguments: list[str]) -> str:
    """What to type for the same measurement: where its results went does not matter."""
    places = {"--json", "--out", options.json, options.out}
    held = "".join(f"{name}={os.environ[name]} " for name in ISA_VARIABLES if name in os.environ)
    return f"{held}python -m benchmarks " + shlex.join(word for word in arguments if word not in places)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
