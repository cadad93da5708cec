"""The benchmark measures what it says: workers, parity gate, ratios, reports. Times are never asserted."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from monosem.kernels import native_is_built, torch_sparse
from monosem.types import SparseLatents, Weights
from tiny import tiny_run

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_latents": 96, "d_model": 16, "k": 4, "batch": 64, "device": "cpu"}
PLAIN = ["torch", *(["native-bf16"] if native_is_built() else [])]
VARIANTS = ["torch+auxk", *(["native-fp32+ema"] if native_is_built() else [])]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are not installed; they run from the repository's root."""
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    workers = []

    def start(name: str, **changes: Any) -> Any:
        arguments = json.dumps({**SHAPE, **changes})
        command = [sys.executable, "-m", "benchmarks.steps", name, arguments]
        workers.append(module("workers").Worker(command, tmp_path / "log", threads=1))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("name", [*VARIANTS, "naive"])
def test_a_worker_trains_one_step_for_each_request(start: Any, name: str) -> None:
    worker = start(name)
    losses = []
    for _ in range(5):  # the first batch comes again as the fifth
        reply = worker.ask("step")
        assert reply["ms"] > 0 and reply["cpu_ms"] > 0 and reply["peak_mib"] > 50
        losses.append(reply["loss"])
    assert all(map(math.isfinite, losses))
    assert losses[4] < losses[0]


def test_ours_see_the_same_activations_and_recall_the_true_top_k(start: Any) -> None:
    workers = [start(name) for name in PLAIN]
    first = [worker.ask("step")["loss"] for worker in workers]
    assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
    assert all(worker.ask("recall")["recall"] > 0.999 for worker in workers)


def test_a_worker_that_cannot_start_says_why(start: Any) -> None:
    with pytest.raises(module("workers").WorkerError, match="k is 500 but there are only 96 latents"):
        start("torch", k=500)


def test_a_worker_that_dies_says_so(tmp_path: Path) -> None:
    program = "import json; print(json.dumps({'ready': True}), flush=True); input(); raise SystemExit('gone')"
    worker = module("workers").Worker([sys.executable, "-c", program], tmp_path / "log", threads=1)
    with pytest.raises(module("workers").WorkerError, match="ended with code 1; gone"):
        worker.ask("step")
    worker.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parity_holds_for_the_native_kernels(precision: str) -> None:
    if not native_is_built():
        pytest.skip("monosem._native is not in this install")
    module("parity").check(module("steps").kernel_named("native"), precision)


@pytest.mark.parametrize("broken", ["gradient", "auxk", "update"])
def test_parity_refuses_a_kernel_that_is_slightly_wrong(broken: str) -> None:
    parity = module("parity")
    parity.check(torch_sparse, "fp32")

    def topk_gradients(x: Any, weights: Any, spec: Any, dead: Any) -> Any:
        step = torch_sparse.topk_gradients(x, weights, spec, dead & (broken != "auxk"))
        if broken == "gradient":
            step.gradients.encoder[5] *= 1.001
        return step

    def apply_update(weights: Weights, *arguments: Any) -> Any:
        norm = torch_sparse.apply_update(weights, *arguments)
        if broken == "update":
            weights.decoder[5] *= 1.001
        return norm

    kernel = SimpleNamespace(topk_gradients=topk_gradients, apply_update=apply_update)
    with pytest.raises(parity.ParityError):
        parity.check(kernel, "fp32")


def test_recall_is_the_share_of_the_true_top_k() -> None:
    g = torch.Generator().manual_seed(0)
    weights = Weights(torch.randn(50, 8, generator=g), torch.zeros(50), torch.randn(50, 8), torch.zeros(8))
    x = torch.randn(30, 8, generator=g)

    def topk_encode(x: Any, weights: Any, k: int, precision: str) -> SparseLatents:
        values, indices = (x @ weights.encoder.T).topk(k + 1)
        return SparseLatents(indices[:, 1:], values[:, 1:], 50)  # misses the first of k, has one too many at the end

    assert module("steps").recall(SimpleNamespace(topk_encode=topk_encode), weights, x, 4, "fp32") == 0.75


def timed(*ms: float) -> Any:
    replies = [{"ms": m, "cpu_ms": m, "idle_cpu_ms": 0.0, "peak_mib": 100 + m, "loss": 1.0, "parts": {}} for m in ms]
    return module("train").Timed(replies)


def test_ratios_are_taken_round_by_round_against_the_fastest_peer() -> None:
    train, shape = module("train"), module("steps").Shape(**SHAPE)
    group = {"torch": timed(10, 20, 40), "naive": timed(300, 100, 200), "sparsify": timed(100, 100, 100)}
    rows = {row["impl"]: row for row in train.rows_of(group, shape)}
    assert rows["torch"]["fastest_peer"] == "sparsify"
    speedups = [rows["torch"][key] for key in ("speedup_min", "speedup_vs_fastest_peer", "speedup_max")]
    assert speedups == [2.5, 5, 10]
    assert rows["torch"]["ms_median"] == 20
    assert rows["torch"]["tokens_per_s"] == 64 / 0.020
    assert rows["torch"]["peak_rss_mib"] == 140
    assert rows["naive"]["speedup_vs_fastest_peer"] == 0.5
    plain_and_variant = train.rows_of({"torch": timed(10, 20, 40), "torch+ema": timed(15, 22, 40)}, shape)
    assert plain_and_variant[1]["cost_of_variant"] == pytest.approx(0.1)


def test_fractions_of_the_floor_use_the_peak_of_the_same_round_and_precision() -> None:
    train, shape = module("train"), module("steps").Shape(**SHAPE)
    operations = 2 * 64 * 16 * 96
    peak = train.Timed([{"fp32": operations, "bf16": 2 * operations}, {"fp32": operations / 2, "bf16": operations}])
    group = {"native-fp32": timed(2000, 4000), "native-bf16": timed(2000, 4000), train.PEAK: peak}
    peak.facts["words"] = "a peak"
    fp32, bf16 = train.rows_of(group, shape)
    assert (fp32["floor_ms"], fp32["fraction_of_floor"]) == (1500, 0.5)
    assert bf16["fraction_of_floor"] == 0.25


def test_peers_that_fail_are_rows_and_the_table_reaches_json_csv_and_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python_of(name: str) -> Path:
        raise module("environments").InstallError("pip install failed: no such version")

    monkeypatch.setattr(module("environments"), "python_of", python_of)
    options = ["--shapes", "96x64", "--d-model", "16", "--k", "4", "--steps", "2", "--threads", "1"]
    options += ["--impls", "torch,torch+auxk,sparsify,naive", "--out", str(tmp_path), "--json", str(tmp_path / "j")]
    assert module("__main__").main(["train", *options]) == 0
    rows = {row["impl"]: row for row in json.loads((tmp_path / "j").read_text())["rows"]}
    wanted = {"impl", "n_latents", "batch", "ms_median", "tokens_per_s", "peak_rss_mib", "speedup_vs_fastest_peer"}
    assert all(row.keys() >= {*wanted, "recall", "status"} for row in rows.values())
    assert rows["sparsify"]["status"] == "failed" and rows["sparsify"]["ms_median"] is None
    assert rows["torch"]["recall"] > 0.999 and rows["naive"]["speedup_vs_fastest_peer"] == 1
    text = (tmp_path / "train-cpu.md").read_text()
    assert text in capsys.readouterr().out
    assert "sparsify failed: pip install failed: no such version" in text
    assert "torch with 10% of the latents dead" in text
    with (tmp_path / "train-cpu.csv").open() as file:
        assert [row["impl"] for row in csv.DictReader(file)] == list(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--impls", "torhc"], "impl is 'torhc'"), (["--impls", "naive+ema"], "naive+ema"), (["--shapes", "9"], "shapes")],
)
def test_a_mistake_is_one_line_and_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert module("__main__").main(["train", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_the_memory_of_all_workers_decides_whether_peers_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    train, shape = module("train"), module("steps").Shape(**SHAPE)
    groups: list[list[str]] = []

    def time_group(names: list[str], *_: Any) -> dict[str, Any]:
        groups.append(names)
        return {name: timed(5 if name == "sparsify" else 9) for name in names}

    monkeypatch.setattr(train, "time_group", time_group)
    names = ["torch", "naive", "sparsify"]
    train.time_shape(names, shape, argparse.Namespace(memory_gib=100))
    train.time_shape(names, shape, argparse.Namespace(memory_gib=0.1))
    assert groups == [names, ["naive", "sparsify"], ["torch", "sparsify"]]


def test_probes_says_what_it_extrapolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n-latents": 64, "n-texts": 40, "n-tasks": 6, "d-model": 8, "n-shuffles": 2, "measure": 1}
    sizes["threads"] = torch.get_num_threads()
    flags = [word for k, v in sizes.items() for word in (f"--{k}", str(v))]
    monkeypatch.setattr(sys, "argv", ["probes", *flags, "--out", str(tmp_path)])
    module("probes").main()
    printed = capsys.readouterr().out
    assert "64 latents, 40 texts, 6 tasks" in printed and "0 of 64 probes did not converge" in printed
    assert printed.count("(extrapolated from 1 tasks)") == 4
    assert (tmp_path / "probes-cpu.md").read_text() == printed.removesuffix("\n")


def test_explain_times_the_pass_beside_the_harvest(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run(tmp_path / "run", tiny_model, tiny_corpus)
    activations = importlib.import_module("monosem.activations")
    plain = activations.capture_block  # compiling takes too long here
    monkeypatch.setattr(activations, "capture_block", lambda *read, compiled=False: plain(*read))
    options = ["--latents", "32,64", "--k", "4", "--steps", "2", "--blocks", "2"]
    options += ["--threads", str(torch.get_num_threads())]  # which it sets, for every test that follows
    options += ["--store", str(tmp_path / "run" / "store"), "--out", str(tmp_path)]
    assert module("__main__").main(["explain", *options]) == 0
    with (tmp_path / "explain-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["n_latents"] for row in rows] == ["32", "64"]
    assert all(float(row["whole_over_plain"]) > 1 and float(row["once_s"]) > 0 for row in rows)
    assert module("__main__").main(["explain", *options, "--steps", "1000"]) == 2


def test_the_viewer_answers_all_that_its_benchmark_asks(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from monosem.viewer.server import application
    from monosem.viewer.web import Site

    viewer = module("viewer")
    viewer.make_run(tmp_path / "run", 300, n_contexts=50)
    client = TestClient(application(Site(tmp_path / "run")), "http://127.0.0.1")
    viewer.make_other(tmp_path / "run", tmp_path / "other")
    for pattern in (*viewer.QUESTIONS.values(), *viewer.COMPARED.values()):
        for path in viewer.questions(pattern, 300, 3):
            assert client.get(path).status_code == 200, path
    found = client.get("/api/v1/compare?with=other").json()["summary"]
    assert found["together"] is None and found["n_mutual_matched"] == 0
