"""The main job end to end: on a tiny model in seconds, killed anywhere, and once on the real default model."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from monosem import artifacts, kernels, losses
from monosem.activations import ActivationStore
from monosem.config import EvalConfig, HarvestConfig, RunConfig, TrainConfig, from_dict, to_dict
from monosem.logs import MetricsLog
from monosem.main_job import run
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize

IMPLS = ["torch", "native"] if kernels.native_is_built() else ["torch"]


@pytest.fixture(scope="module", params=IMPLS)
def config(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    return RunConfig(
        out=str(tmp_path_factory.mktemp("run") / "whole"),
        harvest=HarvestConfig(
            out="", model=str(tiny_model), corpus=str(tiny_corpus), context_length=16, n_tokens=4000, device="cpu",
            n_tokens_held_out=600, held_out_fraction=0.2, block_contexts=8, shard_blocks=2, dtype="float32",
        ),
        train=TrainConfig(
            out="", store="", n_latents=96, k=4, n_tokens=64 * 60, batch_size=64, impl=request.param, device="cpu",
            log_every_steps=1, save_every_s=0.0, dead_tokens_threshold=64 * 4,
        ),
        eval=EvalConfig(run="", n_bootstrap=50, n_tokens_downstream=256, device="cpu"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(config: RunConfig) -> dict[str, Any]:
    """Of the uninterrupted run in `config.out`."""
    return run(config)


def numbers(out: str | Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """What must not depend on interruptions: the autoencoder's bytes, every step's row, every metric."""
    out = Path(out)
    rows = [{k: v for k, v in row.items() if k != "elapsed_s"} for row in MetricsLog(out / "metrics.jsonl").rows()]
    weights = (out / "autoencoder" / "autoencoder.safetensors").read_bytes()
    return weights, rows, artifacts.read_json(out / "eval.json")["metrics"]


def test_run_leaves_everything_where_it_is_promised(config: RunConfig, report: dict[str, Any]) -> None:
    out = Path(config.out)
    assert ActivationStore.open(out / "store").n_rows("train") >= 4000
    assert Autoencoder.load(out / "autoencoder").config == AutoencoderConfig(32, 96, 4)
    assert [row["step"] for row in MetricsLog(out / "metrics.jsonl").rows()] == list(range(1, 61))
    assert artifacts.read_json(out / "eval.json")["metrics"] == report["metrics"]
    assert (out / "state" / "latest.json").exists()
    made = artifacts.read_manifest(out / "run.json", "run")
    assert made["config"]["train"] == {**to_dict(config.train), "out": str(out), "store": str(out / "store")}
    assert made["seconds"].keys() == report["seconds"].keys() == {"fetch", "harvest", "train", "evaluate", "total"}


def test_run_measures_an_autoencoder_that_learnt_something(report: dict[str, Any]) -> None:
    metrics = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 < metrics["normalized_mse"] < 1 and metrics["l0"] <= 4
    assert report["run"]["tokens_seen"] == 64 * 60 and report["run"]["distinct_tokens"] <= 64 * 60


def test_run_again_skips_every_stage_and_says_so(
    config: RunConfig, report: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = times(config.out)
    with caplog.at_level(logging.INFO, "monosem"):
        again = run(config)
    for told in (
        "store is already complete",
        "is already trained with this config; skipped",
        "eval.json is already of",
    ):
        assert told in caplog.text
    assert {**again, "seconds": None} == {**report, "seconds": None}
    assert times(config.out) == before


def times(out: str) -> dict[Path, int]:
    """When each file was last written, but for the two that every run writes."""
    return {p: p.stat().st_mtime_ns for p in Path(out).rglob("*.*") if p.name not in (".lock", "run.json")}


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("harvest", {"seed": 5}, r"another harvest \(seed: 0 -> 5\)"),
        ("train", {"k": 5, "seed": 1}, r"another config \(k: 4 -> 5; seed: 0 -> 1\)"),
    ],
)
def test_run_with_a_changed_config_names_the_field(
    stage: str, changes: dict[str, Any], told: str, config: RunConfig, report: dict[str, Any]
) -> None:
    before = times(config.out)
    with pytest.raises(ValueError, match=told):
        run(dataclasses.replace(config, **{stage: dataclasses.replace(getattr(config, stage), **changes)}))
    assert times(config.out) == before


@pytest.mark.parametrize(
    ("config", "appears"),
    [
        ("torch", "store/train/shard-00002.safetensors"),
        ("torch", "store/manifest.json"),
        *((impl, "state/latest.json") for impl in IMPLS),
        ("torch", "autoencoder/autoencoder.safetensors"),
        ("torch", "autoencoder/config.json"),
    ],
    indirect=["config"],
)
def test_run_killed_and_run_again_ends_in_the_same_bits(
    appears: str, config: RunConfig, report: dict[str, Any], tmp_path: Path
) -> None:
    """kill -9 some milliseconds after a file of each stage has appeared."""
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    killed_when(tmp_path / "cut" / appears, cut, tmp_path)
    assert not (tmp_path / "cut" / "run.json").exists()
    run(cut)
    assert numbers(cut.out) == numbers(config.out)


def killed_when(file: Path, config: RunConfig, folder: Path) -> None:
    artifacts.write_json(folder / "config.json", to_dict(config))
    command = [sys.executable, "-m", "monosem", "run", "--config", str(folder / "config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not file.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(0.01 * os.urandom(1)[0] / 256)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.skipif("CI" not in os.environ, reason="an install without a compiler is whole too; CI has one")
def test_ci_has_the_native_kernels_and_auto_chooses_them() -> None:
    assert kernels.select("auto", torch.device("cpu"))[0] == "native"


@pytest.mark.real
def test_run_on_the_real_default_model_and_corpus(real_run: Path) -> None:
    report = artifacts.read_json(real_run / "eval.json")
    config = from_dict(TrainConfig, artifacts.read_json(real_run / "autoencoder/config.json")["provenance"]["train"])
    assert report["run"]["subject"] == "SmolLM2-135M-Instruct, Q4_1, de-quantised"
    assert report["run"]["site"]["layer"] == 22 and report["run"]["tokens_seen"] == 256 * 60
    metrics = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 < metrics["normalized_mse"] < min(1, nmse_at_start(real_run / "store", config))
    assert 0 < metrics["delta_ce"] < metrics["delta_ce_mean_ablation"]
    assert 2 < metrics["ce_original"] < 5
    assert json.loads((real_run / "run.json").read_text())["seconds"]["total"] > 0


def nmse_at_start(folder: Path, config: TrainConfig) -> float:
    """Held-out normalized_mse of the weights that training starts from."""
    store = ActivationStore.open(folder)
    train, held_out = (normalize(store.rows(split))[0] for split in ("train", "held_out"))
    weights = initial_weights(train, config.n_latents, config.k, tied=True, seed=config.seed)
    autoencoder = Autoencoder(AutoencoderConfig(store.width, config.n_latents, config.k), weights)
    return losses.normalized_mse(autoencoder.decode(autoencoder.encode(held_out)), held_out)
