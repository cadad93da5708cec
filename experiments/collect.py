"""Keep the runs tables of finished sweeps, and what `monosem scale` makes of them, under results/.

    monosem sweep --out runs/lab/joint --store STORE --grid experiments/lab/joint.json      (or another of its grids)
    python experiments/collect.py runs/lab/lr runs/lab/impl         tables only
    python experiments/collect.py --fit runs/lab/joint              tables, laws and figures (extra `lab`)

Each goes to results/smollm2-135m-instruct-q4_1/lab/NAME/; experiments/tables.py fills the docs' tables from there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from monosem import artifacts
from monosem.config import ScaleConfig
from monosem.scaling import scale, summary

LAB = Path("results/smollm2-135m-instruct-q4_1/lab")


def main(arguments: list[str]) -> None:
    fit = arguments[:1] == ["--fit"]
    if not (sweeps := [Path(argument) for argument in arguments[fit:]]):
        sys.exit(__doc__)
    for sweep in sweeps:
        table = (sweep / "runs.csv").read_bytes()
        kept = LAB / sweep.name / "runs.csv"
        artifacts.write_atomic(kept, lambda temporary, table=table: temporary.write_bytes(table))  # type: ignore[misc]
        if fit:
            print(summary(scale(ScaleConfig(table=str(kept.parent)))))


if __name__ == "__main__":
    main(sys.argv[1:])
