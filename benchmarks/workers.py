"""The parent's end of a worker: one process an implementation, asked for one step at a time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(Exception):
    """The worker cannot go on; the message is the reason that the report gives."""


class Worker:
    """A running worker that has said it is ready. `WorkerError` when it fails, now or later."""

    def __init__(self, command: Sequence[str | Path], log: Path, threads: int) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            self.facts = self._reply()
        except WorkerError:
            self.close()
            raise

    def ask(self, request: str) -> dict[str, Any]:
        """The reply to `request`, waited for."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._death()) from None
        return self._reply()

    def close(self) -> None:
        """End the process; closing its pipe is the polite way."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._death())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _death(self) -> str:
        code = self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        memory = " (killed: out of memory?)" if code == -9 else ""
        return f"ended with code {code}{memory}; {lines[-1] if lines else 'no output'}"


def environment(threads: int) -> dict[str, str]:
    """The same for everybody: so many threads, which sleep rather than spin when there is nothing to do, no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
