"""The Triton kernels: right in the interpreter, compiled ahead of time without a spill, chosen where they can run.

No GPU is needed: launching is the one thing that is not tested.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monosem import kernels

if not kernels.triton_is_installed() and not ("CI" in os.environ and sys.platform == "linux"):
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent
INPUTS = Path(__file__).parent / "test_kernel_inputs.py"
INTERPRETED = Path(__file__).parent / "triton_interpreted.py"


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process with TRITON_INTERPRET as asked: what Triton is in a process is decided when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_kernel_agrees_with_the_definition_in_the_interpreter() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    done = run("-m", "pytest", *options, INTERPRETED, INPUTS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_every_kernel_compiles_without_a_spill_within_shared_memory_and_without_float_atomics(tmp_path: Path) -> None:
    table = tmp_path / "aot.csv"
    done = run("-m", "benchmarks.triton_aot", "--check", "--out", table, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = list(csv.DictReader(table.open()))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    committed = list(csv.DictReader((ROOT / "benchmarks" / "results" / "triton_aot.csv").open()))
    names = lambda table: [(row["kernel"], row["target"]) for row in table]  # noqa: E731
    assert names(rows) == names(committed), "run python -m benchmarks.triton_aot"


def test_a_spill_an_overflow_and_a_float_atomic_are_faults() -> None:
    """The check above can fail; and so it does for a kernel that adds floats atomically and keeps a long row."""
    code = """
import triton, triton.language as tl
from benchmarks import triton_aot as aot
from planted_kernel import greedy_kernel
case = aot.Case("greedy", greedy_kernel, {}, {"SIZE": 32768}, warps=1)
print(aot.faults([aot.compiled(case, "sm_90")._replace(shared_bytes=1 << 20)]))
"""
    planted = """
import triton, triton.language as tl
@triton.jit
def greedy_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    row = tl.load(x_ptr + columns)
    tl.atomic_add(out_ptr + columns, row / tl.sum(tl.exp(row), 0))
"""
    path = Path(os.environ["MONOSEM_CACHE"])
    path.mkdir(parents=True)
    (path / "planted_kernel.py").write_text(planted)
    done = run("-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}", TRITON_CACHE_DIR=str(path / "cache"))
    for fault in ("spills", "shared memory", "float atomics"):
        assert fault in done.stdout, done.stdout + done.stderr[-2000:]


def test_a_cpu_tensor_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="impl=triton runs on CUDA and ROCm, not on cpu") as caught:
        kernels.select("triton", torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_triton_that_is_not_installed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="impl is triton, which is not installed") as caught:
        kernels.select("triton", torch.device("cuda"))
    assert "\n" not in str(caught.value)


def test_triton_is_taken_on_cuda_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.select("auto", torch.device("cuda"))[0] == "torch"
    assert kernels.select("triton", torch.device("cuda"))[0] == "triton"
    assert kernels.select("auto", torch.device("mps"))[0] == "torch"
    monkeypatch.setattr(kernels, "triton_is_installed", lambda: False)
    assert kernels.select("auto", torch.device("cuda"))[0] == "torch"
