"""Audit the 113 binary sets of sae-probes-text: what is repeated in them, and what gives the label away.

python experiments/probe_tasks.py       writes results/probes/audit.csv, one row a set (docs/probes.md)
"""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

from monosem import artifacts
from monosem.evals import tasks

TABLE = Path("results/probes/audit.csv")

log = logging.getLogger("monosem")


def main() -> None:
    paper = {task.stem: task.name for task in tasks.PAPER_TASKS if task.stem}
    rows = []
    for task in tasks.sae_probes():
        found = tasks.audit(task)
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
        rows.append({**rounded, "broken": tasks.broken_by(found) or "", "stands_for": paper.get(task.name, "")})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)

    def write(path: Path) -> None:
        path.write_text(text.getvalue(), "utf-8")

    artifacts.write_atomic(TABLE, write)
    log.info("%s: %d sets, %d of them broken", TABLE, len(rows), sum(bool(row["broken"]) for row in rows))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
