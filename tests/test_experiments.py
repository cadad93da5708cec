"""The tables of the documentation are those that the committed results give."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_table_of_the_docs_is_what_its_results_file_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    pages = {page: page.read_text("utf-8") for page in tables.PAGES}
    used = {name for name in tables.TABLES for text in pages.values() if f"<!-- table {name} -->" in text}
    assert used == set(tables.TABLES), "a table that no page shows"
    for page, text in pages.items():
        assert tables.fill(text) == text, f"{page}: run python experiments/tables.py"
