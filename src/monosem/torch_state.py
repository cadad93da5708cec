"""torch's settings as this library works in them, whatever the caller has set; the caller's again afterwards.

    @pinned          what trains, measures and reads: gradients on, no inference mode, random numbers of its own
    @pinned_methods  a forward pass: gradients, inference mode and random numbers stay the caller's

Both: no autocast, default dtype float32, new tensors on the CPU, products in full float32, no deterministic
algorithms (which are other algorithms), torch's own choice of attention kernels, denormal numbers kept, numpy's own
error handling. The number of threads stays the caller's and is held. So the same call gives the same bits, or is
refused, in any state. What torch keeps for the whole process is pinned while any thread is inside.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])
Put = Callable[[], Any]
"""Puts something back."""

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
_FULL = ("none", "ieee")
_FP32_PRODUCTS = (("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul"), ("cuda", "matmul"))
_NUMPY_ERRORS: dict[str, Any] = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
_POOL_CHECK = 1 << 15
"""Elements a thread: as few as torch gives one."""


def pinned(function: F) -> F:
    """The function, run in the state above."""
    return _decorated(function, forward=False)


def pinned_methods(function: F) -> F:
    """As `pinned`, for a forward pass: whether gradients are recorded is the caller's business."""
    return _decorated(function, forward=True)


def without_inference_tensors(module: nn.Module) -> nn.Module:
    """The module; parameters and buffers made in inference mode, which autograd refuses, become ordinary copies."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
    return module


@contextlib.contextmanager
def state(*, forward: bool = False) -> Iterator[None]:
    """The state above inside, the caller's after it. `ValueError` where it cannot be had."""
    if _here.pinned and (forward or _here.pinned == "all"):
        yield
        return
    before = _here.pinned
    with contextlib.ExitStack() as kept:
        kept.enter_context(_settings)
        if not forward:
            kept.enter_context(_random)
            kept.enter_context(torch.inference_mode(False))
            kept.enter_context(torch.set_grad_enabled(True))
        for put in _pin_thread():
            kept.callback(put)
        if not forward and _pool_flushes_denormals():
            raise ValueError(
                "torch's threads flush denormal numbers, because torch.set_flush_denormal(True) was called before they "
                "were made; results would differ: leave that call out, or make it after the first computation"
            )
        if torch.get_default_device().type != "cpu":
            kept.enter_context(torch.device("cpu"))  # the innermost counts
        kept.enter_context(np.errstate(**_NUMPY_ERRORS))
        kept.callback(setattr, _here, "pinned", before)
        _here.pinned = "forward" if forward else "all"
        yield


class _Here(threading.local):
    """What this thread is inside of."""

    pinned: str = ""


class _Shared:
    """Something of the whole process, pinned by the first thread that enters and put back by the last that leaves."""

    def __init__(self, pin: Callable[[], list[Put]]) -> None:
        self.pin = pin
        self.lock, self.inside, self.puts = threading.Lock(), 0, list[Put]()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.puts = self.pin()
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                while self.puts:
                    self.puts.pop()()


class _Setting(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    wanted: Any


def _decorated(function: F, *, forward: bool) -> F:
    assert not inspect.isgeneratorfunction(function), "its steps would run outside"

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with state(forward=forward):
            return function(*args, **kwargs)

    return inside  # type: ignore[return-value]


def _pin_settings() -> list[Put]:
    """Set what differs from what is wanted; how to put each back, in order of setting."""
    puts: list[Put] = []
    for setting in _process_settings():
        try:
            found = setting.get()
        except RuntimeError:  # the old interface for the precision of products, once the new one was used
            continue
        if found != setting.wanted and not (setting.wanted == "ieee" and found in _FULL):
            setting.set(setting.wanted)
            puts.append(functools.partial(setting.set, found))
    threads = torch.get_num_threads()
    puts.append(lambda: None if torch.get_num_threads() == threads else torch.set_num_threads(threads))
    return puts


def _process_settings() -> Iterator[_Setting]:
    c, cuda = torch._C, torch.backends.cuda
    yield _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32)
    yield _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0)
    yield _Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False)
    yield _Setting(c._get_float32_matmul_precision, c._set_float32_matmul_precision, "highest")
    if hasattr(c, "_get_fp32_precision_getter"):  # torch 2.9
        for place in _FP32_PRODUCTS:
            get, put = c._get_fp32_precision_getter, c._set_fp32_precision_setter
            yield _Setting(functools.partial(get, *place), functools.partial(put, *place), "ieee")
    yield _Setting(c._get_mkldnn_enabled, c._set_mkldnn_enabled, True)
    yield _Setting(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True)
    yield _Setting(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True)
    yield _Setting(cuda.math_sdp_enabled, cuda.enable_math_sdp, True)


def _pin_random() -> list[Put]:
    """Random numbers from a fixed seed: where a library draws some, the caller's are neither read nor used up."""
    puts: list[Put] = [
        functools.partial(random.setstate, random.getstate()),
        functools.partial(np.random.set_state, np.random.get_state()),
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        puts.append(functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    return puts


def _pin_thread() -> list[Put]:
    """What torch and the CPU keep of a thread: no autocast, and denormal numbers are kept."""
    modes = torch._C._len_torch_dispatch_stack()
    if any("Fake" in type(torch._C._get_dispatch_stack_at(i)).__name__ for i in range(modes)):
        raise ValueError("a FakeTensorMode is active, in which nothing can be computed; leave it before this call")
    puts: list[Put] = []
    for kind in _DEVICE_TYPES:
        if torch.is_autocast_enabled(kind):
            torch.set_autocast_enabled(kind, False)
            puts.append(functools.partial(torch.set_autocast_enabled, kind, True))
    if _flushes_denormals():
        torch.set_flush_denormal(False)
        puts.append(functools.partial(torch.set_flush_denormal, True))
    return puts


def _flushes_denormals() -> bool:
    return sys.float_info.min * float("0.5") == 0.0  # computed here and now


def _pool_flushes_denormals() -> bool:
    n, tiny = _POOL_CHECK * torch.get_num_threads(), sys.float_info.min
    with torch.device("cpu"):
        return bool((torch.full((n,), tiny, dtype=torch.float64).mul_(0.5) == 0).any())


_here = _Here()
_settings, _random = _Shared(_pin_settings), _Shared(_pin_random)
