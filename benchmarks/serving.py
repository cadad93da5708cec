"""The worker's end of the pipe: a training loop reads batches, and each batch waits for the parent to ask for it.

The loop under test is a plain `for x in batches`, or a peer's own training function given `batches` as its data. The
parent sends a line for a step; the batch is handed out, and the time until the loop comes back for the next one is the
step's. Between steps the process blocks on the pipe, so that workers that take turns do not disturb each other.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLANTED = 4096
"""Directions that the synthetic activations are made of; 24 of them are active on a token."""
_ACTIVE = 24


class Channel:
    """Lines of JSON to and from the parent. What anything else prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> str | None:
        """The next request, or None when the parent has closed the pipe."""
        line = sys.stdin.readline()
        return json.loads(line)["do"] if line else None

    def send(self, **reply: Any) -> None:
        print(json.dumps(reply), file=self._out, flush=True)


class Batches:
    """An endless iterator over `batches`, in turn; one is handed out for each "step" that the parent asks for.

    The loop sets `loss` (a float or a tensor, read at the end of the step, inside the time). `answer` gives the reply
    to any other request, `parts` what the implementation says about where the last step's time went.
    """

    def __init__(self, channel: Channel, batches: list[Any], device: str = "cpu") -> None:
        self.channel = channel
        self.batches = batches
        self.device = torch.device(device)
        self.loss: Any = None
        self.answer: Callable[[str], dict[str, Any]] = lambda request: {"error": f"unknown request {request!r}"}
        self.parts: Callable[[], dict[str, float]] = dict
        self.facts: dict[str, Any] = {}
        """Sent with "ready": versions, settings."""
        self._n = 0
        self._ready = False
        self._clock: tuple[float, float] | None = None
        self._idle_since = time.process_time()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._clock is not None:
            self._finish(*self._clock)
        elif not self._ready:
            self.channel.send(ready=True, torch=torch.__version__, **self.facts)
            self._ready = True
        self._idle_since = time.process_time()
        while (request := self.channel.receive()) != "step":
            if request is None:
                raise SystemExit(0)  # not an Exception: no loop catches it
            self.channel.send(**self.answer(request))
        batch = self.batches[self._n % len(self.batches)]
        self._n += 1
        self._synchronize()
        self._clock = (time.perf_counter(), time.process_time())
        return batch

    def _finish(self, started: float, cpu_started: float) -> None:
        loss = None if self.loss is None else float(self.loss)
        self._synchronize()
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        self._clock = None
        self.channel.send(
            ms=elapsed * 1e3,
            cpu_ms=cpu * 1e3,
            idle_cpu_ms=(cpu_started - self._idle_since) * 1e3,
            loss=loss,
            peak_mib=peak_mib(self.device),
            parts=self.parts(),
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(run: Callable[[Channel], None]) -> None:
    """Run a worker; an exception becomes the reply that the parent is waiting for."""
    channel = Channel()
    try:
        run(channel)
    except Exception as error:
        traceback.print_exc()
        last = str(error).strip().splitlines()
        channel.send(error=f"{type(error).__name__}: {last[0] if last else ''}")
        raise SystemExit(1) from None


def peak_mib(device: torch.device) -> float:
    """Most memory this process has held: resident on the CPU, allocated by torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's pages at the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def activations(batch: int, d_model: int, n_batches: int, device: str) -> list[Tensor]:
    """Synthetic activations, the same for everybody: 24 of 4096 planted directions a token, a mean, some noise."""
    generator = torch.Generator().manual_seed(1234)
    directions = torch.randn(PLANTED, d_model, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = 0.2 * torch.randn(d_model, generator=generator)
    made = []
    for _ in range(n_batches):
        chosen = torch.randint(0, PLANTED, (batch, _ACTIVE), generator=generator)
        sizes = 0.5 + 2 * torch.rand(batch, _ACTIVE, generator=generator)
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=sizes, mode="sum")
        made.append(x.add_(mean).add_(torch.randn(batch, d_model, generator=generator), alpha=0.05).to(device))
    return made
