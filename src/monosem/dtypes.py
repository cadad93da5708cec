"""Which precision the subject runs fastest in, here.

bfloat16 shortens a forward pass where the processor has units that multiply it (a GPU, AMX, Zen 4), and lengthens it
where its instructions have half the rate of fp32, or there are none. The CPU's features rule it out or allow it;
a matrix product of a subject's kind, timed once in both precisions and kept in the cache, decides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from monosem import artifacts, resources

log = logging.getLogger("monosem")

KIND = "product-times"

BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""Names in /proc/cpuinfo, of x86 and ARM: without any of them bf16 products are emulated."""
ISA_VARIABLES = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY"),
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Environment variables that choose the instructions of torch's products."""
MARGIN = 1.2
"""bf16 products must be so many times as fast: the rest of a forward pass is slower in bf16."""

_TOKENS, _INPUTS, _OUTPUTS, _REPEATS = 2048, 576, 1536, 3  # of the product: an MLP's of a small subject


class ProductTimes(NamedTuple):
    """Seconds of one matrix product in each precision, the least of some."""

    float32: float
    bfloat16: float

    @property
    def fastest(self) -> str:
        return "bfloat16" if self.bfloat16 * MARGIN < self.float32 else "float32"


def fastest(device: torch.device) -> str:
    """`bfloat16` or `float32`: the precision that a subject on `device` runs faster in; the log says why."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "bfloat16" if _multiplies_bf16(device) else "float32"
    machine = this_machine()
    if machine["features"] == []:
        log.info("the subject runs in float32: %s has no bf16 instructions", machine["cpu"])
        return "float32"
    times = _known(machine)
    ratio = times.float32 / times.bfloat16
    log.info("the subject runs in %s: bf16 products are %.2g times as fast on %s", times.fastest, ratio, machine["cpu"])
    return times.fastest


def this_machine() -> dict[str, Any]:
    """All that the speed of torch's products depends on: the CPU, the instructions allowed, threads, torch."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "flags": hashlib.sha256(" ".join(flags or ()).encode()).hexdigest()[:16],
        "features": None if flags is None else [name for name in BF16_FEATURES if name in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "isa": {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _known(machine: dict[str, Any]) -> ProductTimes:
    """The times on this machine: out of the cache, else measured and kept there, if it can be written."""
    name = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:32]
    path = resources.cache_folder() / "measured" / f"products-{name}.json"
    if (found := _cached(path, machine)) is not None:
        return found
    times = measured()
    try:
        artifacts.write_json(path, artifacts.manifest(KIND, machine, {}, seconds=times._asdict()))
    except OSError as error:
        log.debug("%s is not kept: %s", path, error)
    return times


def _cached(path: Path, machine: dict[str, Any]) -> ProductTimes | None:
    if not path.exists():
        return None
    try:
        found = artifacts.read_manifest(path, KIND)
        seconds = [found["seconds"][name] for name in ProductTimes._fields]
        if found["config"] == machine and all(isinstance(s, float) and s > 0 for s in seconds):
            return ProductTimes(*seconds)
    except (ValueError, KeyError, TypeError) as error:
        log.debug("%s: %r", path, error)
    log.warning("%s is damaged; measuring again", path)
    return None


@torch.inference_mode()
def measured() -> ProductTimes:
    """The product timed in both precisions in turn, so that other work on the machine slows both."""
    least = {name: float("inf") for name in ProductTimes._fields}
    for repeat in range(1 + _REPEATS):
        for name in ProductTimes._fields:
            x, weights = (torch.ones(n, _INPUTS, dtype=getattr(torch, name), device="cpu") for n in (_TOKENS, _OUTPUTS))
            started = time.perf_counter()
            torch.nn.functional.linear(x, weights)
            if repeat:  # the first makes the library's code
                least[name] = min(least[name], time.perf_counter() - started)
    return ProductTimes(**least)


def _multiplies_bf16(device: torch.device) -> bool:
    try:
        x = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((x @ x == 2).all())
    except (RuntimeError, TypeError):
        return False


@functools.cache
def _cpu() -> tuple[str, list[str] | None]:
    """The CPU's name, and its features where the system lists them."""
    info = Path("/proc/cpuinfo")
    if sys.platform != "linux" or not info.exists():
        return platform.processor() or platform.machine(), None
    found: dict[str, str] = {}
    for line in info.read_text("utf-8", "replace").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags", found.get("Features"))
    return found.get("model name", platform.machine()), None if flags is None else sorted(flags.split())
