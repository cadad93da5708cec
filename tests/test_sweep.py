from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from monosem import cli, formats, sweeps
from monosem.activations import ActivationStore, harvest
from monosem.checkpoint import saved_step
from monosem.config import HarvestConfig, SweepConfig, TrainConfig
from monosem.evals import on_activations
from monosem.logs import MetricsLog
from monosem.model import Autoencoder
from monosem.stream import ActivationStream, StoreSource
from monosem.sweeps import grid, memory, sweep, table
from monosem.training import Run, Supply, train

BATCH = 64
BASE: dict[str, Any] = {
    "n_tokens": BATCH * 30,
    "batch_size": BATCH,
    "log_every_steps": 1,
    "impl": "torch",
    "n_latents": 96,
    "k": 4,
}
THREE: list[dict[str, Any]] = [
    {},
    {"k": 6, "n_tokens": BATCH * 20, "auxk": 8, "dead_tokens_threshold": BATCH},
    {"seed": 3, "ema": 0, "auxk": 0},
]
NAMES = [
    "topk-n96-k4-tokens1920-seed0",
    "topk-n96-k6-tokens1280-auxk8-dead_tokens_threshold64-seed0",
    "topk-n96-k4-tokens1920-auxk0-ema0-seed3",
]


def harvested(out: Path, model: Path, corpus: Path, layer: int) -> Path:
    sizes = {"context_length": 16, "n_tokens": 3000, "n_tokens_held_out": 300, "block_contexts": 8}
    options = {"dtype": "float32", "held_out_fraction": 0.2, **sizes}
    harvest(HarvestConfig(out=str(out), model=str(model), corpus=str(corpus), layer=layer, **options))  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def store(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harvested(tmp_path_factory.mktemp("store"), tiny_model, tiny_corpus, 2)


def configured(store: Path, folder: Path, asked: dict[str, Any], **options: Any) -> SweepConfig:
    """A sweep in folder/sweep of the grid `asked`, written to folder/grid.json."""
    folder.mkdir(exist_ok=True)
    (folder / "grid.json").write_text(json.dumps(asked))
    small = {"eval_every": BATCH * 5, "eval_tokens": 10_000, "n_bootstrap": 20, **options}
    return SweepConfig(out=str(folder / "sweep"), grid=str(folder / "grid.json"), store=str(store), **small)


def three(store: Path, folder: Path, **options: Any) -> SweepConfig:
    return configured(store, folder, {"base": BASE, "runs": THREE}, **options)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    (state,) = (run / "state").glob("state-*.safetensors")
    return {**load_file(state), **load_file(run / "autoencoder" / "autoencoder.safetensors")}


def curve(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "elapsed_s"} for row in MetricsLog(run / "metrics.jsonl").rows()]


def rows(out: str) -> list[dict[str, str]]:
    """runs.csv without what depends on the clock and the checkout."""
    with open(Path(out) / "runs.csv", encoding="utf-8", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("kernel_s", "wall_s", "date", "commit")}
            for row in csv.DictReader(file)
        ]


def assert_same_runs(one: Path, other: Path) -> None:
    want, got = tensors(one), tensors(other)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert curve(one) == curve(other)


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    config = three(store, tmp_path_factory.mktemp("whole"))
    sweep(config)
    return config


def alone(store: Path, out: Path, change: dict[str, Any]) -> Path:
    """The run folder of `monosem train` with BASE and the change."""
    train(TrainConfig(**{**BASE, "store": str(store), **change, "out": str(out)}))
    return out


def test_every_run_ends_in_the_bits_of_training_it_alone(store: Path, whole: SweepConfig, tmp_path: Path) -> None:
    for name, change in zip(NAMES, THREE, strict=True):
        assert_same_runs(alone(store, tmp_path / name, change), Path(whole.out, "runs", name))


def test_a_run_of_a_sweep_is_a_run(store: Path, whole: SweepConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "monosem")
    found = train(TrainConfig(**{**BASE, "out": str(Path(whole.out, "runs", NAMES[0])), "store": str(store)}))
    assert "already trained" in caplog.text and found.provenance["tokens_seen"] == BATCH * 30


def test_runs_on_several_stores_orders_and_batches_share_what_they_can(
    store: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    other = harvested(tmp_path / "other", tiny_model, tiny_corpus, 1)
    changes: list[dict[str, Any]] = [
        {},
        {"store": str(other)},
        {"data_seed": 1},
        {"batch_size": 32},
        {"data_seed": 1, "seed": 1},
    ]
    asked = {"base": {**BASE, "n_tokens": BATCH * 8}, "runs": changes}
    report = sweep(configured(store, tmp_path, asked))
    assert len(report["memory"]) == 4  # streams
    for number, (name, change) in enumerate(zip(report["runs"], changes, strict=True)):
        run = alone(store, tmp_path / str(number), {"n_tokens": BATCH * 8, **change})
        assert_same_runs(run, Path(tmp_path, "sweep", "runs", name))


KILLED = """
import json, os, signal, sys
from monosem import artifacts, checkpoint, step, sweeps
from monosem.config import SweepConfig, from_dict
import torch
torch.set_num_threads({threads})
original, at = {target}, [0]
def killed(*arguments, **options):
    at[0] += 1
    if at[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
{target} = killed
sweeps.sweep(from_dict(SweepConfig, json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("step.apply", 23),  # inside a step
        ("checkpoint.save_file", 14),  # when the first of three is saved at step 5, the others at step 4
        ("sweeps.table.row", 4),  # at an evaluation point, when some have their row
        ("sweeps.table.row", 9),  # the first run is released, but not in the table
    ],
)
def test_killed_and_run_again_ends_in_the_same_bits(
    store: Path, whole: SweepConfig, tmp_path: Path, target: str, call: int
) -> None:
    cut = three(store, tmp_path, save_every_s=0.0)
    script = KILLED.format(threads=torch.get_num_threads(), target=target, call=call)
    command = [sys.executable, "-c", script, json.dumps(dataclasses.asdict(cut))]
    killed = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    sweep(cut)
    for name in NAMES:
        assert_same_runs(Path(whole.out, "runs", name), Path(cut.out, "runs", name))
    assert sorted(rows(cut.out), key=str) == sorted(rows(whole.out), key=str)


def test_runs_are_measured_at_doubling_token_counts_and_at_their_end(whole: SweepConfig) -> None:
    found = {name: [row for row in rows(whole.out) if row["run"] == name] for name in NAMES}
    assert [int(row["tokens"]) // BATCH for row in found[NAMES[0]]] == [5, 10, 20, 30]
    assert [int(row["tokens"]) // BATCH for row in found[NAMES[1]]] == [5, 10, 20]
    for name, own in found.items():
        assert [row["finished"] for row in own] == ["false"] * (len(own) - 1) + ["true"]
        config = json.loads(Path(whole.out, "runs", name, "autoencoder", "config.json").read_text())
        assert own[-1]["checkpoint"] == config["weights_sha256"] and not own[0]["checkpoint"]
        assert own[-1]["weights"] == config["provenance"]["weights"]
        assert float(own[-1]["normalized_mse"]) < float(own[0]["normalized_mse"])
    with open(Path(whole.out, "runs.csv"), encoding="utf-8") as file:
        assert tuple(next(csv.reader(file))) == table.COLUMNS


def test_the_last_row_holds_what_evaluation_finds(store: Path, whole: SweepConfig) -> None:
    autoencoder = Autoencoder.load(Path(whole.out, "runs", NAMES[0], "autoencoder"))
    metrics, _ = on_activations(autoencoder, ActivationStore.open(store), "cpu", n_resamples=20, seed=0)
    by_name = {m.name: m for m in metrics}
    row = next(row for row in rows(whole.out) if row["run"] == NAMES[0] and row["finished"] == "true")
    nmse = by_name["normalized_mse"]
    found = [float(row[f"normalized_mse{end}"]) for end in ("", "_low", "_high")]
    assert found == pytest.approx([nmse.value, nmse.low, nmse.high], rel=1e-5)
    assert float(row["dead_fraction"]) == by_name["dead_fraction"].value
    assert float(row["never_fired_fraction"]) == by_name["never_fired_fraction"].value


def test_flops_are_those_of_the_products_that_a_step_takes(whole: SweepConfig) -> None:
    d_model, n, tokens = 32, 96, BATCH * 5
    first = next(row for row in rows(whole.out) if row["run"] == NAMES[2])
    assert int(first["flops"]) == tokens * (2 * n * d_model + 8 * 4 * d_model)  # no AuxK
    assert int(first["flops_dense_equivalent"]) == 12 * n * d_model * tokens
    aux = next(row for row in rows(whole.out) if row["run"] == NAMES[1])
    extra = int(aux["flops"]) - tokens * (2 * n * d_model + 8 * 6 * d_model)
    log = curve(Path(whole.out, "runs", NAMES[1]))
    dead_before = [0, *(row["dead_latents"] for row in log[:4])]
    assert extra == 8 * d_model * BATCH * sum(min(8, n_dead) for n_dead in dead_before) > 0
    relu = TrainConfig(out="", store="", activation="relu", n_latents=n)
    assert table.flops_per_token(relu, d_model) == 12 * n * d_model


def test_a_run_that_diverges_is_marked_and_leaves_the_others_alone(
    store: Path, whole: SweepConfig, tmp_path: Path
) -> None:
    config = configured(store, tmp_path, {"base": BASE, "runs": [THREE[0], {"lr": 1e30}, THREE[1]]})
    for _ in range(2):  # the second call changes nothing
        report = sweep(config)
        (failed,) = (name for name, run in report["runs"].items() if run["status"] == "diverged")
        assert "lr1e+30" in failed and "training diverged; lower lr" in report["runs"][failed]["error"]
        assert [run["status"] for run in report["runs"].values()] == ["finished", "diverged", "finished"]
        (row,) = (row for row in rows(config.out) if row["status"] == "diverged")
        assert row["run"] == failed and row["finished"] == "false"
    for name, same in zip([n for n in report["runs"] if n != failed], NAMES[:2], strict=True):
        assert_same_runs(Path(whole.out, "runs", same), Path(config.out, "runs", name))
    assert "diverged: the loss" in sweeps.summary(report)


def test_time_up_saves_and_the_same_call_goes_on(
    store: Path, whole: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = three(store, tmp_path, hours=1e-9)
    report = sweep(config)
    assert {run["step"] for run in report["runs"].values()} == {1}
    assert "run the same command to go on" in sweeps.summary(report)
    report = sweep(dataclasses.replace(config, hours=None))
    assert "go on" not in sweeps.summary(report)
    assert sorted(rows(config.out), key=str) == sorted(rows(whole.out), key=str)


def test_runs_can_be_added_and_only_they_are_trained(store: Path, tmp_path: Path) -> None:
    base = {**BASE, "n_tokens": BATCH * 8}
    first = sweep(configured(store, tmp_path, {"base": base, "grid": {"k": [3, 4]}}))
    config = configured(store, tmp_path, {"base": base, "grid": {"k": [4, 3], "seed": [0, 1]}})
    second = sweep(config)
    assert list(first["runs"]) == ["topk-n96-k3", "topk-n96-k4"]
    assert set(second["runs"]) == {*first["runs"], "topk-n96-k3-seed1", "topk-n96-k4-seed1"}
    for name in first["runs"]:
        assert second["runs"][name]["kernel_s"] == first["runs"][name]["kernel_s"]
    with pytest.raises(ValueError, match=r"holds run topk-n96-k4.*\(nearest: k: 4 -> 3\).*choose another --out"):
        sweep(configured(store, tmp_path, {"base": base, "runs": [{"k": 3}, {"k": 3, "seed": 1}]}))
    with pytest.raises(ValueError, match="sweep with other eval_tokens: 10000 -> 300"):
        sweep(dataclasses.replace(config, eval_tokens=300))


def test_waves_end_in_the_same_bits(
    store: Path, whole: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = three(store, tmp_path)
    one, shared = memory.run_bytes(TrainConfig(**{**BASE, "out": "", "store": ""}), 32, torch.device("cpu")), {"w": 10}
    monkeypatch.setattr(memory, "_RESERVE", 0)
    monkeypatch.setattr(memory, "stream_bytes", lambda *_: shared)
    monkeypatch.setattr(sweeps, "free_memory", lambda _: memory.Plan([one] * 2, shared).total)
    with pytest.raises(ValueError, match=r"3 runs at once need weights 0.00 \+ .* GiB are free.*add --waves"):
        sweep(config)
    assert not (tmp_path / "sweep" / "sweep.json").exists()
    report = sweep(dataclasses.replace(config, waves=True))
    assert [line.split(":")[0] for line in report["memory"]] == ["2 runs", "1 runs"]
    assert sorted(rows(config.out), key=str) == sorted(rows(whole.out), key=str)
    monkeypatch.setattr(sweeps, "free_memory", lambda _: one.kept)
    with pytest.raises(ValueError, match=r"1 runs at once need .* lower n_latents or batch_size"):
        sweep(dataclasses.replace(config, waves=True, out=str(tmp_path / "none")))


def test_memory_counts_what_a_run_holds(store: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**BASE, "out": str(tmp_path), "store": str(store)})
    with ActivationStream(StoreSource(ActivationStore.open(store)), BATCH, 0) as stream:
        run = Run(config, Supply(ActivationStore.open(store), stream, torch.device("cpu")))
    size = memory.run_bytes(config, 32, torch.device("cpu"))
    average = run.state.optimizer.average
    for found, parts in (
        (size.weights, [run.state.weights]),
        (size.moments, [run.state.optimizer.first, run.state.optimizer.second]),
        (size.average, [average]),
    ):
        assert found == sum(w.nbytes for part in parts for w in part or ())


def test_only_a_run_that_took_a_step_must_stay_in_the_grid(store: Path, tmp_path: Path) -> None:
    config = configured(store, tmp_path, {"base": BASE, "runs": [{}, {"k": 3}]}, hours=1e-9)
    sweep(config)
    report = tmp_path / "sweep" / "sweep.json"
    found = json.loads(report.read_text())
    run = found["runs"]["topk-n96-k3"]
    run["status"], run["step"] = "waiting", 0
    report.write_text(json.dumps(formats.sealed(found)))
    fewer = configured(store, tmp_path, {"base": BASE, "runs": [{}]}, hours=1e-9)
    assert list(sweep(fewer)["runs"]) == ["topk-n96-k4"]
    run["step"] = 1
    report.write_text(json.dumps(formats.sealed(found)))
    with pytest.raises(ValueError, match=r"holds run topk-n96-k3, which .* does not ask for"):
        sweep(fewer)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "is not a JSON object; give an object with base, grid, runs"),
        ({"bas": {}}, "has bas; give an object with base, grid, runs"),
        ({"base": {"k": 3}}, "asks for no run"),
        ({"grid": {"k": 3}}, "grid.k must be a list of at least one value"),
        ({"grid": {"k": []}}, "grid.k must be a list of at least one value"),
        ({"runs": [3]}, "every entry of runs must be a JSON object, not 3"),
        ({"runs": [{"kk": 3}]}, "TrainConfig has no field kk"),
        ({"runs": [{"k": "3"}]}, "TrainConfig.k is '3'; it must be int"),
        ({"grid": {"k": [3, 300], "n_latents": [96]}}, "k is 300 but there are only 96 latents"),
        ({"runs": [{"activation": "matryoshka", "n_latents": 4, "k": 1}]}, "n_prefixes is 5, too many halvings of 4"),
        ({"grid": {"k": [3, 3]}}, "asks twice for the same run"),
        ({"grid": {"k": [3]}, "runs": [{"k": 3}]}, "asks twice for the same run"),
        ({"runs": [{"log_every_steps": 1}, {"log_every_steps": 2}]}, "asks twice for the same run (config"),
        ({"runs": [{"out": "x"}]}, "out cannot be given for a run of a sweep: it follows"),
        ({"runs": [{"save_every_s": 3}]}, "save_every_s cannot be given for a run of a sweep"),
        ({"runs": [{"store": ""}]}, "no store for"),
        ({"runs": [{"store": "nowhere"}]}, "nowhere is not an activation store"),
    ],
)
def test_a_wrong_grid_is_one_clear_line(store: Path, tmp_path: Path, asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep(configured(store, tmp_path, asked))
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_names_say_what_varies_and_are_unique() -> None:
    changes: list[dict[str, Any]] = [
        {"lr": 0.002},
        {"lr": 0.0020000001},
        {"store": "b/s 1", "activation": "relu"},
        {"store": "c/s 1", "activation": "relu"},
    ]
    found = [TrainConfig(**{"out": "", "store": "a", **change}) for change in changes]
    assert grid.names(found, {"topk-n8192-k32-storea-lr0.002"}, [True] * 4) == [
        "topk-n8192-k32-storea-lr0.002-2",
        "topk-n8192-k32-storea-lr0.002-3",
        "relu-n8192-stores_1",
        "relu-n8192-stores_1-2",
    ]


@given(st.integers(1, 10_000), st.integers(1, 500), st.integers(1, 5000))
def test_points_are_the_first_steps_to_reach_doubling_counts(n_tokens: int, batch: int, every: int) -> None:
    config = TrainConfig(out="", store="", n_tokens=max(n_tokens, batch), batch_size=batch)
    n_steps = -(-config.n_tokens // batch)
    counts = [every * 2**i for i in range(20)]
    wanted = {next(s for s in range(1, 10**6) if s * batch >= c) for c in counts if c <= (n_steps - 1) * batch}
    assert table.points(config, every) == wanted


def test_the_command_trains_and_says_where(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(store, tmp_path, {"base": {**BASE, "n_tokens": BATCH * 4}, "grid": {"k": [3, 4]}})
    flags = ["--out", config.out, "--store", str(store), "--grid", config.grid, "--n-bootstrap", "20"]
    assert cli.main(["sweep", *flags]) == 0
    said = capsys.readouterr()
    assert "2 finished" in said.out and "runs.csv" in said.out
    assert "topk-n96-k3" in said.err and "finished" in said.err  # the table
    assert cli.main(["sweep", *flags[:4], "--grid", str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err


def test_a_changed_row_of_a_finished_run_is_refused(store: Path, whole: SweepConfig, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "sweep")
    config = dataclasses.replace(whole, out=str(tmp_path / "sweep"))
    path = sorted((tmp_path / "sweep/runs").glob("*/metrics.jsonl"))[-1]
    path.write_bytes(path.read_bytes().replace(b'"step": 1,', b'"step": 2,', 1))
    with pytest.raises(ValueError, match=rf"{path} is not as the saved state knows it .*a row was changed"):
        sweep(config)


def test_interrupt_saves_all_and_says_how_to_go_on(store: Path, tmp_path: Path) -> None:
    config = configured(store, tmp_path, {"base": {**BASE, "n_tokens": 10_000_000}, "grid": {"k": [3, 4]}})
    command = [sys.executable, "-m", "monosem", "sweep", "--out", config.out, "--store", str(store), "--grid"]
    process = subprocess.Popen([*command, config.grid], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    metrics = MetricsLog(tmp_path / "sweep" / "runs" / "topk-n96-k4" / "metrics.jsonl")
    for _ in range(3000):
        if len(metrics.rows()) > 3 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and b"run the same command to go on" in errors and b"Traceback" not in errors
    steps = {saved_step(run / "state") for run in (tmp_path / "sweep" / "runs").iterdir()}
    assert len(steps) == 1 and min(steps) >= 3
