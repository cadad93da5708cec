"""Compile every Triton kernel ahead of time, with no GPU, and record what each takes of one.

    python -m benchmarks.triton_aot             prints a table and writes benchmarks/results/triton_aot.csv
    python -m benchmarks.triton_aot --check     also fails on a spill, too much shared memory, or a float atomic

Sizes are realistic: d_model 768, k 32, float32 weights, the tiles of `monosem.kernels.triton_step`. This says that the
kernels compile, and fit; it says nothing of their speed, which was not run.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from monosem.kernels import triton_kernels as kernels
from monosem.kernels import triton_step as step

OUT = Path(__file__).parent / "results" / "triton_aot.csv"
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing: unset TRITON_INTERPRET"


class Target(NamedTuple):
    gpu: GPUTarget
    shared_limit: int
    """Bytes that one block may take."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
NO_FP8 = ("sm_80",)
D_MODEL = 768
ODD_D_MODEL = 767
DIVISIBLE = ("D", "K")
"""Arguments that 16 divides at realistic sizes, as the launcher would find; and all pointers."""


class Case(NamedTuple):
    """A kernel with its argument types and constants; whatever has neither is None."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = DIVISIBLE


class Result(NamedTuple):
    kernel: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    float_atomics: int


def cases(target: str) -> Iterator[Case]:
    """Every kernel as `triton_step` launches it."""
    block = step._block(D_MODEL)
    for precision, low, largest in (("fp32", "fp32", 0), ("bf16", "bf16", 0), ("fp8", _fp8(target), 448)):
        if precision == "fp8" and target in NO_FP8:
            continue
        yield Case(
            f"row_bounds {precision}",
            kernels.row_bounds_kernel,
            {"low_ptr": f"*{low}", "D": "i32"},
            {"LARGEST": largest, "ROUND": precision != "fp32", "ROUND_UP": kernels.ROUND_UP, "BLOCK": block},
        )
    yield from _sweeps(target)
    index = {"index_ptr": "*i64", "K": "i32", "D": "i32"}
    yield Case(
        "gathered_dots",
        kernels.gathered_dots_kernel,
        index,
        {"HAS_BIAS": True, "GROUP": step.GROUP, "BLOCK": block},
    )
    yield Case("decode", kernels.decode_kernel, index, {"HAS_BASE": True, "BLOCK": block})
    sizes = {"D": "i32", "n_pairs": "i32", "latent_ptr": "*i64", "token_ptr": "*i64", "start_ptr": "*i64"}
    chunk = {"CHUNK": step.CHUNK, "BLOCK": block}
    yield Case("segment_sums", kernels.segment_sums_kernel, sizes, chunk)
    yield Case("segment_heads", kernels.segment_heads_kernel, sizes, chunk)
    yield Case("weighted_rows", kernels.weighted_rows_kernel, {"n_rows": "i32", "D": "i32"}, chunk)
    sizes = {"n_elements": "i64", "D": "i32", "step_size": "fp32", "second_scale": "fp32", "average_rate": "fp32"}
    yield Case("gradient_squares", kernels.gradient_squares_kernel, sizes, {"PROJECT": True, "BLOCK": block})
    adam = {"BETA1": step.BETA1, "BETA2": step.BETA2, "EPSILON": step.EPSILON}
    for part in ("decoder", "encoder"):
        flags = {"UNIT_NORM": part == "decoder", "HAS_AVERAGE": True, "BLOCK": block}
        yield Case(f"update_rows {part}", kernels.update_rows_kernel, sizes, adam | flags)


def _sweeps(target: str) -> Iterator[Case]:
    low = {"fp32": "fp32", "tf32": "fp32", "bf16": "bf16", "fp8": _fp8(target)}
    types = {"index_ptr": "*i32", "count_ptr": "*i32"}
    types |= dict.fromkeys(("n_rows", "first", "last", "split_latents", "D"), "i32")
    for precision, d_model in itertools.product(step.TILES, (D_MODEL, ODD_D_MODEL)):
        if precision == "fp8" and target in NO_FP8:
            continue
        tile = step.tile_for(precision, d_model)
        constants = {
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
            "SCALED": precision == "fp8",
            "WIDEN": False,
            "CAPACITY": 64,
            "ROWS": tile.rows,
            "LATENTS": tile.latents,
            "DEPTH": tile.depth,
        }
        operands = {"x_ptr": f"*{low[precision]}", "encoder_ptr": f"*{low[precision]}"}
        case = Case(f"sweep {precision}", kernels.sweep_kernel, types | operands, constants, tile.warps, tile.stages)
        yield case if d_model == D_MODEL else case._replace(name=f"{case.name}, odd d_model", divisible=())


def _fp8(target: str) -> str:
    return "fp8e4b8" if target == "gfx942" else "fp8e4nv"


def compiled(case: Case, target: str) -> Result:
    """Compile one kernel and read what the assembler says of it."""
    names = case.kernel.arg_names
    signature, constants = {}, dict(case.constants)
    for name in names:
        default = "*fp32" if name.endswith("_ptr") else "constexpr"
        signature[name] = "constexpr" if name in constants else case.types.get(name, default)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.divisible
    }
    out = triton.compile(
        ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=TARGETS[target].gpu,
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    measure = _of_amdgcn if target.startswith("gfx") else _of_ptx
    registers, spilled, atomics = measure(out.asm)
    return Result(case.name, target, registers, spilled, out.metadata.shared, atomics)


def _of_ptx(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Registers, bytes of local memory (spills included) and float atomics of a kernel for CUDA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, len(re.findall(r"\b(?:atom|red)\.(?!async)[\w.:]*\bf(?:16|32|64)", asm["ptx"]))


def _of_amdgcn(asm: dict[str, Any]) -> tuple[int, int, int]:
    text = asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]  # noqa: E731
    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spilled, len(re.findall(r"(?:global|flat|buffer)_atomic_\w*f(?:16|32|64)", text))


def faults(results: list[Result]) -> list[str]:
    """What may not be: a spill, more shared memory than a block has, an atomic that sums floats."""
    found = []
    for r in results:
        where = f"{r.kernel} on {r.target}"
        if r.spilled_bytes:
            found.append(f"{where} spills {r.spilled_bytes} bytes")
        if r.shared_bytes > TARGETS[r.target].shared_limit:
            found.append(f"{where} takes {r.shared_bytes} bytes of shared memory of {TARGETS[r.target].shared_limit}")
        if r.float_atomics:
            found.append(f"{where} has {r.float_atomics} float atomics")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on a spill, an over-limit or a float atomic")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results = []
    for target in args.targets:
        for case in cases(target):
            results.append(compiled(case, target))
            print(*(f"{field}={value}" for field, value in results[-1]._asdict().items()), sep="  ", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Result._fields, *results])
    if args.check and faults(results):
        sys.exit("\n".join(faults(results)))


if __name__ == "__main__":
    main()
