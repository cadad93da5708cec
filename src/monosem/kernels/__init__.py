"""The arithmetic of a training step, behind one contract with several implementations.

Every implementation is a module with the same functions, on fp32 tensors:

    topk_encode(x, weights, k) -> SparseLatents
    relu_encode(x, weights) -> SparseLatents
    threshold_encode(x, weights, threshold) -> SparseLatents
    decode(latents, weights) -> recons
    topk_gradients(x, weights, spec, dead) -> StepGradients
    relu_gradients(x, weights, spec) -> StepGradients
    sparse_gradients(x, weights, latents, d_recons, d_active) -> Weights
    apply_update(weights, gradients, optimizer, update) -> gradient norm (in place)

`reference` is the definition: dense autograd, slow, to be checked by eye. The others must agree with it, and all refuse
the same arguments (`checks`).
The result is a function of the arguments alone, bit for bit, on the same machine, thread count and implementation.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch

log = logging.getLogger("monosem")

# MKL chooses its code for sqrt, exp and the like in their first call; when two threads make that call together, one of
# them may get results of another rounding.
torch.ones(1).sqrt()

_MODULES = {"reference": "reference", "torch": "torch_sparse", "native": "native", "triton": "triton_step"}


def select(impl: str, device: torch.device) -> tuple[str, ModuleType]:
    """The implementation's name and module; `auto` is native on a CPU where it was built, else torch.

    triton is only taken when asked for: its kernels agree with the definition in Triton's interpreter and compile for
    CUDA and ROCm, but have not been launched on a GPU.
    """
    if impl == "auto":
        impl = "native" if device.type == "cpu" and native_is_built() else "torch"
        _say_once(impl, str(device))
    if impl not in _MODULES:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(_MODULES)}")
    if impl == "native" and not native_is_built():
        raise ValueError(
            "impl is native, but this install has no compiled kernels; reinstall with a C++ compiler or use torch"
        )
    if impl == "native" and device.type != "cpu":
        raise ValueError(f"impl=native runs on the CPU, not on {device}; use --device cpu or --impl torch")
    if impl == "triton" and not triton_is_installed():
        raise ValueError("impl is triton, which is not installed; pip install monosem[gpu] or use --impl torch")
    if impl == "triton" and device.type != "cuda":
        raise ValueError(f"impl=triton runs on CUDA and ROCm, not on {device}; use --device cuda or --impl torch")
    return impl, importlib.import_module(f"monosem.kernels.{_MODULES[impl]}")


@functools.cache
def _say_once(impl: str, device: str) -> None:
    log.info("kernels: %s, chosen for %s", impl, device)


def native_is_built() -> bool:
    """Whether `monosem._native` was compiled into this install."""
    return importlib.util.find_spec("monosem._native") is not None


def triton_is_installed() -> bool:
    """Whether Triton can be imported (the extra `gpu`)."""
    return importlib.util.find_spec("triton") is not None
