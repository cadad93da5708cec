from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

from monosem.config import TrainConfig, config_hash

CLAIMS = Path(__file__).parents[1] / "experiments" / "claims.py"


def test_every_row_of_the_claims_table_is_of_a_config_that_the_script_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new field of TrainConfig changes every hash; the table's must follow, or all its runs are trained again."""
    monkeypatch.chdir(CLAIMS.parents[1])
    spec = importlib.util.spec_from_file_location("claims", CLAIMS)
    assert spec is not None and spec.loader is not None
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    asked = {
        (group, config_hash(TrainConfig(store="runs/demo/store", out=str(claims.folder(group, changes)), **changes)))
        for group, found in claims.GROUPS.items()
        for changes in found
    }
    with open(claims.TABLE, newline="", encoding="utf-8") as file:
        rows = [(row["group"], row["config_hash"]) for row in csv.DictReader(file)]
    assert rows and set(rows) <= asked
