"""A virtual environment for each peer, made by the first run that needs it and kept in the cache.

The versions of what peers share with us (torch above all) come from constraints.txt. Peers whose own requirements
cannot be met beside that torch are installed without them, plus the few libraries that their training step imports.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workers import ROOT

log = logging.getLogger("benchmarks")

CONSTRAINTS = ROOT / "constraints.txt"
_SHARED = ("torch", "numpy", "transformers", "datasets", "triton")
"""What matters of the constraints: an environment is made anew when one of these versions changes."""


class InstallError(Exception):
    """The peer cannot be installed here; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Peer:
    """Another library, and what there is to know about its training step."""

    requirement: str
    module: str
    about: str
    """What its step does, and what it lacks of ours."""
    extra: tuple[str, ...] = ()
    """Installed instead of its own requirements."""
    lone: bool = False
    """Installed without its own requirements."""


PEERS = {
    "sparsify": Peer(
        "eai-sparsify==1.3.3",
        "sparsify",
        "`Trainer.fit`, whole, on a model that only hands out the activations; optimizer=adam (its default is signum), "
        "AuxK on (off by default). Sparse decoder and encoder gradient, projection and unit norm, dead counters. "
        "AuxK gives its encoder no gradient; the pre-activations [B, n] are stored.",
    ),
    "sae-lens": Peer(
        "sae-lens==6.54.12",
        "sae_lens",
        "`SAETrainer.fit`, whole, with `TopKTrainingSAE` at its defaults. Dense throughout; clips the gradient's norm; "
        "no projection and no unit norm (it scales by the decoder's norms instead); counts dead time in steps.",
    ),
    "dictionary-learning": Peer(
        "dictionary-learning==0.1.0",
        "dictionary_learning",
        "`TopKTrainer.update`. Dense throughout; projection, clipping, unit norm, AuxK, dead counters.",
        extra=("torch", "numpy", "tqdm", "einops==0.8.2"),
        lone=True,
    ),
    "overcomplete": Peer(
        "overcomplete==0.3.0",
        "overcomplete",
        "`train_sae(monitoring=0)` with `TopKSAE` at its defaults, criterion the mean squared error. Dense throughout; "
        "normalises the dictionary in each forward pass instead of projecting; no AuxK; an alive flag a latent.",
        extra=("torch", "numpy", "tqdm", "einops==0.8.2", "scipy", "scikit-learn"),
        lone=True,
    ),
}


def python_of(name: str) -> Path:
    """The interpreter of the peer's environment, made if need be. `InstallError` when that fails."""
    peer = PEERS[name]
    folder = bench_cache() / f"{name}-{_fingerprint(peer)}"
    python, done = folder / "bin" / "python", folder / "installed.json"
    with locked(folder.with_suffix(".lock")):
        if not done.exists():
            _install(name, peer, folder, python)
            done.write_text(json.dumps({"requirement": peer.requirement, "python": sys.version}))
    return python


def bench_cache() -> Path:
    """$MONOSEM_CACHE/bench, else ~/.cache/monosem/bench."""
    root = os.environ.get("MONOSEM_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "monosem") / "bench"


def _install(name: str, peer: Peer, folder: Path, python: Path) -> None:
    log.info("%s: making its environment in %s (once; downloads may take minutes)", name, folder)
    venv.create(folder, clear=True, with_pip=True)
    install: list[str | Path] = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", CONSTRAINTS]
    if peer.lone:
        run([*install, *peer.extra])
        run([*install, "--no-deps", peer.requirement])
    else:
        run([*install, peer.requirement])


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two benchmarks started at once make an environment once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint(peer: Peer) -> str:
    """Changes with whatever decides the environment's contents."""
    shared = [line for line in CONSTRAINTS.read_text().splitlines() if line.partition("==")[0] in _SHARED]
    parts = [repr((peer.requirement, peer.extra, peer.lone)), *shared, sys.version]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise InstallError(f"pip install failed: {errors[0].removeprefix('ERROR: ') if errors else 'no output'}")
