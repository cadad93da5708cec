"""What the machine could do at best: the floor under a step is its encoder product, 2 B D N operations.

On a CPU with a C++ compiler the floor divides by the issue peak (peak.cpp). Elsewhere, on a GPU too, it divides by what
torch's own matrix product reaches, which is a lower bound of the peak: fractions of it may exceed 1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.environments import bench_cache

SOURCE = Path(__file__).with_name("peak.cpp")
_GEMM = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}


def command(device: str, threads: int) -> tuple[list[str], str]:
    """The worker that measures the peak, and what the peak is, in words."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if device == "cpu" and compiler and (program := _compiled(compiler)):
        return [str(program), str(threads)], "issue peak: independent multiply-adds on registers, all threads"
    return [sys.executable, "-m", "benchmarks.roofline", device], "torch's matrix product, a lower bound of the peak"


def floor_ms(n_latents: int, d_model: int, batch: int, operations_a_second: float) -> float:
    """Milliseconds of the encoder product at that rate."""
    return 2e3 * batch * d_model * n_latents / operations_a_second


def _compiled(compiler: str) -> Path | None:
    """peak.cpp as a program that knows at least one instruction of this CPU; None when there is no such thing."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    program = bench_cache() / f"peak-{digest}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++20", "-O2", "-pthread", str(SOURCE), "-o", str(program)]
        if subprocess.run([compiler, *options], capture_output=True, check=False).returncode:
            return None
    found = subprocess.run([program, "1"], input="\n", capture_output=True, text=True, check=False)
    return program if found.returncode == 0 and json.loads(found.stdout.splitlines()[-1]) else None


def serve_products(device: str) -> None:
    """The worker where there is no compiler: square products of 2048 (CPU) or 8192 (GPU), best of a quarter second."""
    import torch

    size = 2048 if device == "cpu" else 8192
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        rates = {}
        for kind, dtype in _GEMM.items():
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            if kind == "tf32" and device == "cpu":
                continue
            a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
            best, until = float("inf"), time.perf_counter() + 0.25
            while time.perf_counter() < until:
                started = time.perf_counter()
                a @ a
                if device != "cpu":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - started)
            rates[kind] = 2 * size**3 / best
        print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    serve_products(sys.argv[1])
