"""The precision that a subject runs fastest in: what decides, and what is kept of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from monosem import dtypes, resources
from monosem.dtypes import ProductTimes

CPU = torch.device("cpu")
KNOWN = dtypes._known
"""As it is outside of tests, where its answer is given (conftest)."""

AMX, HALF_RATE = ProductTimes(float32=8.0, bfloat16=1.0), ProductTimes(float32=1.0, bfloat16=2.0)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[ProductTimes]:
    """What the next measurements find, last first; `KNOWN` asks for them."""
    coming: list[ProductTimes] = []
    monkeypatch.setattr(dtypes, "_known", KNOWN)
    monkeypatch.setattr(dtypes, "measured", coming.pop)
    return coming


def with_features(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(dtypes, "_cpu", lambda: ("a CPU", sorted(features)))


def records() -> list[Path]:
    return sorted((resources.cache_folder() / "measured").glob("*"))


@pytest.mark.parametrize(
    ("times", "precision"),
    [
        (AMX, "bfloat16"),
        (HALF_RATE, "float32"),
        (ProductTimes(float32=1.0, bfloat16=1.0), "float32"),
        (ProductTimes(float32=1.9, bfloat16=1.0), "bfloat16"),
        (ProductTimes(float32=1.1, bfloat16=1.0), "float32"),
    ],
)
def test_the_measured_product_decides(times: ProductTimes, precision: str, timed: list[ProductTimes]) -> None:
    timed.append(times)
    assert dtypes.fastest(CPU) == precision


@pytest.mark.parametrize("features", [("avx2", "fma"), ("avx512f", "avx512_vnni"), ("neon", "asimd")])
def test_a_cpu_without_bf16_instructions_is_not_measured(
    features: tuple[str, ...], timed: list[ProductTimes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_features(monkeypatch, *features)
    assert dtypes.fastest(CPU) == "float32" and records() == []


def test_a_cpu_whose_features_are_unknown_is_measured(
    timed: list[ProductTimes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "_cpu", lambda: ("arm64", None))
    timed.append(AMX)
    assert dtypes.fastest(CPU) == "bfloat16"


def test_one_measurement_is_enough(timed: list[ProductTimes], caplog: pytest.LogCaptureFixture) -> None:
    timed.append(HALF_RATE)
    with caplog.at_level(logging.INFO, "monosem"):
        assert [dtypes.fastest(CPU) for _ in range(2)] == ["float32", "float32"]
    assert caplog.messages[0] == caplog.messages[1]
    assert "the subject runs in float32: bf16 products are 0.5 times as fast on a CPU with AMX" in caplog.text
    (record,) = records()
    assert json.loads(record.read_text())["seconds"] == {"float32": 1.0, "bfloat16": 2.0}


@pytest.mark.parametrize("name", dtypes.ISA_VARIABLES)
def test_other_instructions_are_measured_anew(
    name: str, timed: list[ProductTimes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    timed[:] = [HALF_RATE, AMX]
    assert dtypes.fastest(CPU) == "bfloat16"
    monkeypatch.setenv(name, "avx2")
    assert dtypes.fastest(CPU) == "float32"
    monkeypatch.delenv(name)
    assert dtypes.fastest(CPU) == "bfloat16" and len(records()) == 2


def test_another_cpu_or_number_of_threads_is_measured_anew(
    timed: list[ProductTimes], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed[:] = [HALF_RATE, AMX, HALF_RATE]
    assert dtypes.fastest(CPU) == "float32"
    with_features(monkeypatch, "avx512_bf16", "amx_bf16")
    assert dtypes.fastest(CPU) == "bfloat16"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert dtypes.fastest(CPU) == "float32"


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: "{",
        lambda found: "[]",
        lambda found: json.dumps({**found, "seconds": {"float32": 1.0}}),
        lambda found: json.dumps({**found, "seconds": {"float32": "fast", "bfloat16": 1.0}}),
        lambda found: json.dumps({**found, "seconds": None}),
        lambda found: json.dumps({**found, "config": {}}),
    ],
)
def test_a_damaged_record_is_measured_again(
    damage: Any, timed: list[ProductTimes], caplog: pytest.LogCaptureFixture
) -> None:
    timed[:] = [HALF_RATE, AMX]
    dtypes.fastest(CPU)
    (record,) = records()
    record.write_text(damage(json.loads(record.read_text())))
    assert dtypes.fastest(CPU) == "float32" and "is damaged; measuring again" in caplog.text
    assert dtypes.fastest(CPU) == "float32", "and kept"


def test_a_cache_that_cannot_be_written_is_done_without(
    timed: list[ProductTimes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(resources.CACHE_VARIABLE, str(tmp_path / "file"))
    timed[:] = [AMX]
    assert dtypes.fastest(CPU) == "bfloat16"


def test_measured_times_both_precisions() -> None:
    assert all(0 < seconds < 60 for seconds in dtypes.measured())
