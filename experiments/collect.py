"""Keep the runs tables of finished sweeps, and what `monosem scale` makes of them, under results/.

    monosem sweep --out runs/lab/joint --store STORE --grid experiments/lab/joint.json      (or another of its grids)
    python experiments/collect.py runs/lab/lr runs/lab/impl         tables only
    python experiments/collect.py --fit runs/lab/joint              tables, laws and figures (extra `lab`)
    python experiments/collect.py --fit --as frontier runs/lab/joint runs/lab/relu      one table of several
    python experiments/collect.py --fit --as activations --tokens 524288 runs/lab/joint runs/lab/relu runs/lab/variants

Each goes to results/smollm2-135m-instruct-q4_1/lab/NAME/; experiments/tables.py fills the docs' tables from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monosem import artifacts
from monosem.config import ScaleConfig
from monosem.scaling import scale, summary

LAB = Path("results/smollm2-135m-instruct-q4_1/lab")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--as", dest="name")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("sweeps", nargs="+", type=Path)
    asked = parser.parse_args(arguments)
    tables = {asked.name: asked.sweeps} if asked.name else {sweep.name: [sweep] for sweep in asked.sweeps}
    for name, sweeps in tables.items():
        kept = LAB / name / "runs.csv"
        table = joined([sweep / "runs.csv" for sweep in sweeps])
        artifacts.write_atomic(kept, lambda temporary, table=table: temporary.write_bytes(table))  # type: ignore[misc]
        if asked.fit:
            print(summary(scale(ScaleConfig(table=str(kept.parent), tokens=asked.tokens))))


def joined(paths: list[Path]) -> bytes:
    """The rows of several runs tables under their one header; `ValueError` when the headers differ."""
    tables = [path.read_bytes().splitlines(keepends=True) for path in paths]
    if differing := [str(path) for path, table in zip(paths, tables, strict=True) if table[0] != tables[0][0]]:
        raise ValueError(f"{', '.join(differing)} have other columns than {paths[0]}; make them with one version")
    return b"".join([tables[0][0], *(line for table in tables for line in table[1:])])


if __name__ == "__main__":
    main(sys.argv[1:])
