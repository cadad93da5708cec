from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from monosem import formats, kernels, step, training
from monosem.activations import ActivationStore, harvest
from monosem.checkpoint import load_state
from monosem.config import HarvestConfig, TrainConfig, activation_facts, activations
from monosem.kernels import torch_sparse
from monosem.logs import MetricsLog
from monosem.training import train
from monosem.types import LossSpec


@pytest.fixture(scope="module")
def store(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    small = {
        "context_length": 16,
        "n_tokens": 3000,
        "n_tokens_held_out": 300,
        "block_contexts": 8,
        "held_out_fraction": 0.2,
    }
    harvest(HarvestConfig(out=str(out), model=str(tiny_model), corpus=str(tiny_corpus), dtype="float32", **small))  # type: ignore[arg-type]
    return out


def configured(store: Path, out: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "n_latents": 96,
        "k": 4,
        "n_tokens": 64 * 60,
        "batch_size": 64,
        "log_every_steps": 1,
        "impl": "torch",
    }
    return TrainConfig(store=str(store), out=str(out), **{**base, **changes})


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    (state,) = (out / "state").glob("state-*.safetensors")
    return {**load_file(state), **load_file(out / "autoencoder" / "autoencoder.safetensors")}


def rows_without_time(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "elapsed_s"} for row in MetricsLog(out / "metrics.jsonl").rows()]


def test_train_lowers_the_loss_and_releases_the_better_weights(store: Path, tmp_path: Path) -> None:
    autoencoder = train(configured(store, tmp_path, n_tokens=64 * 200))
    rows = rows_without_time(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 201))
    assert rows[-1]["mse"] < 0.5 * rows[0]["mse"]
    nmse = autoencoder.provenance["selection_normalized_mse"]
    assert nmse[autoencoder.provenance["weights"]] == min(nmse.values()) and set(nmse) == {"raw", "ema"}
    assert autoencoder.provenance["tokens_seen"] == 64 * 200
    assert autoencoder.provenance["distinct_tokens"] == ActivationStore.open(store).n_rows("train")


def test_without_scaled_init_training_starts_from_encoder_rows_of_norm_1(store: Path, tmp_path: Path) -> None:
    norms = {}
    for scaled in (True, False):
        config = configured(store, tmp_path / str(scaled), scaled_init=scaled, n_tokens=64, lr=1e-12, ema=0)
        norms[scaled] = train(config).weights.encoder.norm(dim=1)
    torch.testing.assert_close(norms[False], torch.ones(96))
    assert ((norms[True] - 1).abs() > 0.05).all()


def test_train_with_the_reference_kernels_follows_the_same_curve(store: Path, tmp_path: Path) -> None:
    curves = []
    for impl in ("torch", "reference"):
        train(configured(store, tmp_path / impl, impl=impl, n_tokens=64 * 30, dead_tokens_threshold=64 * 4))
        curves.append([(row["mse"], row["auxk_loss"]) for row in rows_without_time(tmp_path / impl)])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3, atol=1e-4)
    assert any(aux > 0 for _, aux in curves[0])


KILLED = """
import os, signal, sys
from monosem import checkpoint, step, training
from monosem.config import TrainConfig, from_dict
import json
import torch
torch.set_num_threads({threads})
original, at = {target}, [0]
def killed(*arguments, **options):
    at[0] += 1
    if at[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
{target} = killed
training.train(from_dict(TrainConfig, json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("target", "call", "changes"),
    [
        ("step.apply", 23, {}),
        ("step.apply", 23, {"activation": "batch_topk"}),
        ("step.apply", 23, {"activation": "gated", "k": 32, "sparsity_coef": 0.01}),
        ("checkpoint.artifacts.os.replace", 6, {}),
        ("checkpoint.save_file", 5, {}),
        ("checkpoint.artifacts.write_json", 4, {}),
    ],
)
def test_killed_and_run_again_ends_in_the_same_bits(
    store: Path, tmp_path: Path, target: str, call: int, changes: dict[str, Any]
) -> None:
    """kill -9 inside a step, between the file and its name, before the file, before the pointer to it."""
    whole = configured(store, tmp_path / "whole", save_every_s=0.0, dead_tokens_threshold=64 * 4, **changes)
    train(whole)
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"))
    script = KILLED.format(threads=torch.get_num_threads(), target=target, call=call)
    killed = subprocess.run(
        [sys.executable, "-c", script, json.dumps(dataclasses.asdict(cut))], stderr=subprocess.PIPE, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    train(cut)
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir() if path.suffix == ".tmp"] == []
    want, got = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "cut")
    assert rows_without_time(tmp_path / "whole") == rows_without_time(tmp_path / "cut")
    assert want.keys() == got.keys()
    differing = {name: (want[name] - got[name]).abs().max().item() for name in want if not want[name].equal(got[name])}
    assert differing == {}


@pytest.fixture
def native_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled kernels, whose audits miss a latent at the steps that the test names; int8 is the fastest."""
    if not kernels.native_is_built():
        pytest.skip("monosem._native is not in this install")
    from monosem.kernels import native

    fused = native.topk_step

    def topk_step(x: Any, weights: Any, spec: LossSpec, dead: Any, optimizer: Any, update: Any) -> Any:
        out, norm = fused(x, weights, spec, dead, optimizer, update)
        selected_by.append(spec.precision)
        if update.step in missed_at and spec.audit:
            assert out.stats is not None
            missed = {**out.stats, "n_missed": 4, "recall": 1 - 4 / out.stats["n_audited"]}
            out = out._replace(stats=missed)
        return out, norm

    missed_at: list[int] = []
    selected_by: list[str] = []
    monkeypatch.setattr(native, "topk_step", topk_step)
    monkeypatch.setattr(native, "fastest_precision", lambda *, exact=False: "fp32" if exact else "int8")
    return SimpleNamespace(missed_at=missed_at, selected_by=selected_by)


def test_auto_falls_back_loudly_where_an_audit_finds_a_miss_and_a_resume_keeps_that(
    store: Path, tmp_path: Path, native_kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(store, tmp_path / "run", impl="native", log_every_steps=5, save_every_s=0.0)
    native_kernels.missed_at[:] = [19, 20]  # an audit of a logged step alone

    with monkeypatch.context() as patched:

        def interrupted(*_: Any) -> None:
            if len(native_kernels.selected_by) == 33:
                raise RuntimeError("power cut")

        patched.setattr(training.artifacts, "sha256_file", raising_before(training.artifacts.sha256_file, interrupted))
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert native_kernels.selected_by == ["int8"] * 20 + ["fp32"] * 13
    assert "step 20: int8 products missed 4 of 128 latents" in caplog.text
    state = json.loads((tmp_path / "run" / "state" / "latest.json").read_text())
    assert state["selection"] == {"precision": "fp32", "missed_at_step": 20}
    train(config)
    assert set(native_kernels.selected_by[33:]) == {"fp32"}
    rows = rows_without_time(tmp_path / "run")
    assert [row["step"] for row in rows if row["recall"] < 1] == [20]
    provenance = json.loads((tmp_path / "run" / "autoencoder" / "config.json").read_text())["provenance"]
    assert provenance["selection"] == {"precision": "fp32", "missed_at_step": 20}


def test_a_precision_that_was_asked_for_is_kept_and_audited(store: Path, tmp_path: Path, native_kernels: Any) -> None:
    native_kernels.missed_at[:] = [5]
    config = configured(store, tmp_path / "run", impl="native", log_every_steps=5, precision="int8")
    provenance = train(config).provenance
    assert set(native_kernels.selected_by) == {"int8"}
    assert provenance["selection"] == {"precision": "int8", "missed_at_step": None}
    assert [row["recall"] < 1 for row in rows_without_time(tmp_path / "run")][:2] == [True, False]


def raising_before(function: Any, check: Any) -> Any:
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        return function(*arguments)

    return checked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_go_on(number: signal.Signals, store: Path, tmp_path: Path) -> None:
    flags = [
        "--store",
        store,
        "--out",
        tmp_path / "run",
        "--n-latents",
        96,
        "--k",
        4,
        "--n-tokens",
        10_000_000,
        "--batch-size",
        64,
    ]
    command = [sys.executable, "-m", "monosem", "train", *map(str, flags), "--log-every-steps", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # where the tests run in the background it is ignored
    )
    metrics = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    for _ in range(3000):
        if len(metrics.rows()) > 3 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert (
        process.returncode == 128 + number and b"run the same command to go on" in errors and b"Traceback" not in errors
    )
    latest = json.loads((tmp_path / "run" / "state" / "latest.json").read_text())
    assert latest["step"] >= 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.replace(b'"step": 1', b'"step": 2', 1), "a row was changed"),
        (lambda data: data + data.splitlines(keepends=True)[-1], "bytes where there were"),
        (lambda data: b"".join(data.splitlines(keepends=True)[1:]), "bytes where there were"),
        (lambda data: None, "is gone"),
    ],
)
def test_rows_of_a_finished_run_are_missed(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[bytes], bytes | None], reason: str
) -> None:
    train(configured(store, tmp_path))
    path = tmp_path / "metrics.jsonl"
    data = change(path.read_bytes())
    path.unlink()
    if data is None:
        train(configured(store, tmp_path))
        assert reason in caplog.text
        return
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"metrics.jsonl is not as the saved state knows it \(.*{reason}"):
        train(configured(store, tmp_path))
    shutil.rmtree(tmp_path / "state")  # which nobody needs any more, and which alone knows the rows
    train(configured(store, tmp_path))


def test_resuming_elsewhere_says_that_bits_may_change(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(configured(store, tmp_path))
    (tmp_path / "autoencoder" / "config.json").unlink()
    train(configured(store, tmp_path))
    assert "bit-identical" not in caplog.text
    latest = json.loads((tmp_path / "state" / "latest.json").read_text())
    latest["bits_depend_on"] |= {"torch": "1.0", "device": "cuda:0"}
    (tmp_path / "state" / "latest.json").write_text(json.dumps(formats.sealed(latest)))
    (tmp_path / "autoencoder" / "config.json").unlink()
    train(configured(store, tmp_path))
    assert "resuming with device: 'cuda:0' -> 'cpu', torch: '1.0' ->" in caplog.text


def test_train_again_is_skipped_and_changes_nothing(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(configured(store, tmp_path))
    before = (tmp_path / "autoencoder" / "autoencoder.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO", "monosem")
    train(configured(store, tmp_path))
    assert "already trained" in caplog.text
    assert (tmp_path / "autoencoder" / "autoencoder.safetensors").stat().st_mtime_ns == before


def test_train_with_a_changed_config_names_the_field(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path))
    with pytest.raises(ValueError, match=r"another config \(k: 4 -> 5\).*delete metrics.jsonl, state and auto"):
        train(configured(store, tmp_path, k=5))
    (tmp_path / "metrics.jsonl").unlink()
    for name in ("state", "autoencoder"):
        shutil.rmtree(tmp_path / name)
    assert train(configured(store, tmp_path, k=5)).config.k == 5


def test_train_refuses_a_damaged_state(store: Path, tmp_path: Path) -> None:
    train(configured(store, tmp_path))
    (state,) = (tmp_path / "state").glob("state-*.safetensors")
    state.write_bytes(state.read_bytes()[:-10])
    (tmp_path / "autoencoder" / "config.json").unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        train(configured(store, tmp_path))


def test_train_that_diverges_says_so(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training diverged; lower lr"):
        train(configured(store, tmp_path, lr=1e30))


def test_relu_trains_and_more_l1_means_fewer_active_latents(store: Path, tmp_path: Path) -> None:
    l0 = []
    for coef in (0.0, 0.3):
        relu = {"activation": "relu", "k": 32, "sparsity_coef": coef, "sparsity_warmup_steps": 10 if coef else 0}
        train(configured(store, tmp_path / str(coef), **relu))
        l0.append(rows_without_time(tmp_path / str(coef))[-1]["l0"])
    assert l0[1] < 0.5 * l0[0]


@pytest.mark.parametrize("activation", activations())
def test_every_activation_function_trains_and_releases_its_extras(activation: str, store: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"activation": activation}
    if "k" not in activation_facts(activation).uses:
        settings |= {"k": 32, "sparsity_coef": 0.01}
    autoencoder = train(configured(store, tmp_path, **settings))
    rows = rows_without_time(tmp_path)
    assert rows[-1]["mse"] < rows[0]["mse"] and ("sparsity" in rows[-1]) == ("sparsity_coef" in settings)
    nmse = autoencoder.provenance["selection_normalized_mse"]
    assert nmse[autoencoder.provenance["weights"]] == min(nmse.values())
    state, recipe = final_tensors(tmp_path), autoencoder.provenance["recipe"]
    for name, value in autoencoder.extras.items():
        released = state[f"weights.{name}"]
        if autoencoder.provenance["weights"] == "ema":
            released = state[f"average.{name}"] / (1 - recipe["ema"] ** recipe["n_steps"])
        torch.testing.assert_close(value, released)


def test_defaults_follow_their_rules() -> None:
    assert step.default_auxk(768) == 512 and step.default_auxk(576) == 256 and step.default_auxk(1) == 1
    assert step.default_lr(4 * 4096) == pytest.approx(step.default_lr(4096) / 2)
    assert step.default_dead_tokens_threshold(1_048_576) == 65_536
    assert step.default_dead_tokens_threshold(10**12) == 10_000_000
    assert (
        step.default_ema(512) == pytest.approx(1 - 20 / 512)
        and step.default_ema(10) == 0
        and step.default_ema(10**6) == 0.999
    )


def test_dead_time_is_counted_in_tokens_since_the_value_last_passed_the_threshold() -> None:
    weights = torch_sparse.Weights(torch.eye(3), torch.tensor([0.0, 0.0, -9.0]), torch.eye(3), torch.zeros(3))
    state = step.TrainState.new(weights, ema=False)
    recipe = step.recipe(TrainConfig(out="", store="", n_latents=3, k=3, batch_size=4, lr=1e-9), 3, 1.0)
    x = torch.tensor([[1.0, 0, 0]] * 4)
    for _ in range(2):
        step.apply(state, step.gradients(state, x, recipe, torch_sparse), recipe, torch_sparse, len(x))
    assert state.tokens_since_fired.tolist() == [0, 8, 8]
    assert state.dead(8).tolist() == [False, True, True] and not state.dead(9).any()


def test_averaged_weights_are_corrected_for_their_start_at_zero() -> None:
    weights = torch_sparse.Weights(torch.ones(2, 3), torch.ones(2), torch.ones(2, 3) / 3**0.5, torch.ones(3))
    state = step.TrainState.new(weights, ema=True)
    recipe = step.recipe(TrainConfig(out="", store="", n_latents=2, k=1, ema=0.9, lr=1e-12, auxk=0), 3, 1.0)
    x = torch.randn(8, 3)
    for _ in range(3):
        step.apply(state, step.gradients(state, x, recipe, torch_sparse), recipe, torch_sparse, len(x))
    for average, w in zip(state.averaged_weights(0.9), weights, strict=True):
        torch.testing.assert_close(average, w, rtol=1e-4, atol=1e-4)


def test_a_loaded_state_lies_in_memory_as_a_new_one(store: Path, tmp_path: Path) -> None:
    """BLAS may give other bits at another alignment; a file's tensors lie wherever the header ends."""
    train(configured(store, tmp_path, n_tokens=64, activation="batch_topk"))
    loaded = load_state(tmp_path / "state", torch.device("cpu"))
    assert loaded is not None
    tensors = [*loaded[0].weights, *loaded[0].optimizer.first, *loaded[0].extras.values.values()]
    assert {t.data_ptr() % 64 for t in tensors} == {0}
    assert load_file(next((tmp_path / "state").glob("*.safetensors")))["weights.encoder"].data_ptr() % 64
