"""The same bits whatever state of torch a caller is in, and that state as it was afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import monosem
from monosem import convert, torch_state
from monosem.activations import ActivationStore, harvest
from monosem.config import EvalConfig, ExplainConfig, HarvestConfig, SweepConfig, TrainConfig
from monosem.evals import evaluate
from monosem.explanations.entry import explain
from monosem.model import Autoencoder, AutoencoderConfig
from monosem.subject import Subject
from monosem.sweeps import sweep
from monosem.training import train
from monosem.types import Weights
from monosem.viewer import live
from tiny import D_MODEL, tiny_run


@contextlib.contextmanager
def process_wide(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def numpy_raises() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


STATES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: process_wide(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: process_wide(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": lambda: process_wide(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, "error"
    ),
    "medium": lambda: process_wide(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "no_mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "math_attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "anomaly": torch.autograd.detect_anomaly,
    "numpy": numpy_raises,
}  # fmt: skip


def told() -> dict[str, Any]:
    """All that the states change, as it is now."""
    return {
        "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(), "numpy": np.geterr(),
        "autocast": torch.is_autocast_enabled("cpu"), "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(), "deterministic": torch.get_deterministic_debug_mode(),
        "precision": torch.get_float32_matmul_precision(), "mkldnn": torch._C._get_mkldnn_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(), "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(), "torch": torch.get_rng_state().tolist(), "python": random.getstate(),
        "numpy_random": str(np.random.get_state()),
    }  # fmt: skip


@contextlib.contextmanager
def all_states() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for enter in STATES.values():
            stack.enter_context(enter())
        yield


def left(folder: Path) -> dict[str, bytes]:
    """What is computed of the files in a folder: their bytes without times, and without paths."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".npy", ".npz")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for path in folder.rglob("eval.json"):
        found[path.name] = json.dumps(json.loads(path.read_text())["metrics"]).encode()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path) -> Path:
    """A run with its store."""
    out = tmp_path_factory.mktemp("state") / "run"
    tiny_run(out, tiny_model, tiny_corpus)
    return out


def entries(folder: Path, model: Path, corpus: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Every public function that computes, on tiny things; each leaves files in `out` or returns tensors."""
    store, run = folder / "store", out / "copy"
    raw, tokens = ActivationStore.open(store).block("held_out", 0), torch.arange(32).view(2, 16)
    harvested = HarvestConfig(
        out=str(out / "store"), model=str(model), corpus=str(corpus), context_length=16, n_tokens=400,
        n_tokens_held_out=200, held_out_fraction=0.2, block_contexts=8, device="cpu",
    )  # fmt: skip
    trained = TrainConfig(str(out / "run"), str(store), n_latents=48, k=4, n_tokens=1000, batch_size=100)
    grid = out / "grid.json"

    def swept() -> dict[str, Any]:
        base = {"n_tokens": 600, "batch_size": 100, "n_latents": 40, "activation": "relu"}
        grid.write_text(json.dumps({"base": base, "grid": {"sparsity_coef": [0.1, 0.2]}}))
        sweep(SweepConfig(str(out / "sweep"), str(grid), str(store), eval_tokens=200, n_bootstrap=20))
        return {name: value for name, value in left(out / "sweep").items() if "state" not in name}

    def explained() -> dict[str, bytes]:
        explain(ExplainConfig(str(run), str(store), n_tokens=400, n2g=2, ablations=2, device="cpu"))
        return left(run / "explain")

    def tried() -> dict[str, Any]:
        found = live.try_text(live.load(str(folder), "cpu"), "The quick brown fox.", n_continue=2, seed=3)
        return {name: value for name, value in found.items() if name != "seconds"}

    return {
        "harvest": lambda: (harvest(harvested), left(out / "store"))[1],
        "train": lambda: (train(trained), left(out / "run"))[1],
        "evaluate": lambda: evaluate(EvalConfig(str(run), str(store), n_bootstrap=20, device="cpu"))["metrics"],
        "sweep": swept,
        "explain": explained,
        "try": tried,
        "forward": lambda: Autoencoder.load(folder / "autoencoder")(raw),
        "convert": lambda: converted(out, folder)(raw),
        "subject": lambda: Subject.load(str(model), dtype="float32", device="cpu").logits(tokens),
        "batches": lambda: list(ActivationStore.open(store).batches("held_out", 30)),
    }  # fmt: skip


def converted(out: Path, folder: Path) -> Autoencoder:
    convert.save_sae_lens(Autoencoder.load(folder / "autoencoder"), out / "sae_lens")
    return convert.load_sae_lens(out / "sae_lens")


NAMES = ("harvest", "train", "evaluate", "sweep", "explain", "try", "forward", "convert", "subject", "batches")


def result(name: str, folder: Path, model: Path, corpus: Path, out: Path, enter: Callable[[], Any]) -> Any:
    """What the entry gives inside the state; the state is as it was afterwards."""
    out.mkdir()
    (out / "copy").mkdir()
    for path in (folder / "autoencoder").iterdir():
        (out / "copy" / path.name).write_bytes(path.read_bytes())
    call = entries(folder, model, corpus, out)[name]
    with enter():
        before = told()
        found = call()
        after = told()
        if name in ("forward", "convert", "subject", "batches"):  # the checks of annotations draw from `random`
            after["python"] = before["python"]
        assert after == before
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_gives_the_same_bits_in_the_oddest_state(
    name: str, folder: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    plain, odd = (
        result(name, folder, tiny_model, tiny_corpus, tmp_path / kind, enter)
        for kind, enter in (("plain", contextlib.nullcontext), ("odd", all_states))
    )
    assert same(plain, odd)


@pytest.mark.parametrize("state", STATES)
def test_each_state_alone_changes_no_bit_of_a_forward_pass(
    state: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    raw = ActivationStore.open(folder / "store").block("held_out", 0)
    tokens = torch.arange(48).view(3, 16)
    subject, autoencoder = Subject.load(str(tiny_model), device="cpu"), Autoencoder.load(folder / "autoencoder")
    site = subject.site()
    want = subject.capture(tokens, site), subject.logits(tokens), autoencoder(raw)
    with STATES[state]():
        got = subject.capture(tokens, site), subject.logits(tokens), autoencoder(raw)
    assert same(want, got)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b or (a != a and b != b)


def test_same_sees_a_difference() -> None:
    assert not same({"a": [torch.ones(1)]}, {"a": [torch.zeros(1)]})
    assert not same({"a": 1}, {"b": 1})


def test_the_state_comes_back_after_an_error() -> None:
    @torch_state.pinned
    def fails() -> None:
        assert torch.get_default_dtype() == torch.float32
        raise ValueError

    with all_states():
        before = told()
        with pytest.raises(ValueError):
            fails()
        assert told() == before


def test_random_numbers_inside_are_not_the_callers() -> None:
    @torch_state.pinned
    def draws() -> tuple[Any, ...]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(1)
    first, after = draws(), torch.rand(1)
    torch.manual_seed(1)
    assert draws() == first and torch.rand(1) == after
    torch.manual_seed(1)
    assert torch.rand(1) == after


def test_an_autoencoder_made_in_inference_mode_is_evaluated(folder: Path, tmp_path: Path) -> None:
    """Its tensors cannot be saved for backward, as refinement does."""
    weights = Autoencoder.load(folder / "autoencoder").weights
    with torch.inference_mode():
        autoencoder = Autoencoder(AutoencoderConfig(D_MODEL, 48, 4), Weights(*(w.clone() for w in weights)))
    assert autoencoder.weights.encoder.is_inference()
    config = EvalConfig(str(tmp_path), str(folder / "store"), n_bootstrap=20, device="cpu")
    assert "normalized_mse" in evaluate(config, autoencoder=autoencoder)["metrics"]
    assert not autoencoder.weights.encoder.is_inference()


def test_flushed_denormals_are_kept_or_refused(folder: Path) -> None:
    """Threads inherit the setting of the one that makes them, and cannot be told otherwise later."""
    code = f"""
import torch
torch.set_num_threads(2)
if late: torch.ones(1 << 20).double().mul(2)
torch.set_flush_denormal(True)
torch.ones(1 << 20).double().mul(2)
from monosem.model import Autoencoder
try:
    Autoencoder.load({str(folder / "autoencoder")!r})
    print("loaded", 2.0**-1023 * float("0.5") == 0)
except ValueError as error:
    print(error)
"""
    found = [
        subprocess.run([sys.executable, "-c", f"late = {late}\n{code}"], capture_output=True, text=True, timeout=300)
        for late in (True, False)
    ]
    assert found[0].stdout.strip() == "loaded True", found[0].stderr
    assert "set_flush_denormal" in found[1].stdout, found[1].stderr


def test_nothing_is_computed_with_fake_tensors(folder: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensorMode"):
        Autoencoder.load(folder / "autoencoder")


def test_every_public_function_is_pinned() -> None:
    """But `scale`, which is numpy's, and configs and nouns, which compute nothing."""
    for name in ("harvest", "train", "sweep", "evaluate", "explain", "run"):
        assert hasattr(getattr(monosem, name), "__wrapped__"), name
    assert dataclasses.is_dataclass(monosem.Site)
