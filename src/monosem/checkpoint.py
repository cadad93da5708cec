"""The training state on disk: one safetensors file and one JSON file that points at it, both atomic.

`latest.json` names the state file and its sha256 and is replaced only after that file is whole; a kill at any moment
leaves the previous state in force.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from monosem import artifacts
from monosem.model import load_checked
from monosem.step import TrainState
from monosem.types import ExtrasState, OptimizerState, Weights


def save_state(folder: str | Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write `state` and the JSON-able `facts` of the run, then forget the states before it."""
    folder = Path(folder)
    name = f"state-{state.step:08d}.safetensors"
    tensors = {key: value.cpu().contiguous() for key, value in _tensors(state).items()}
    artifacts.write_atomic(folder / name, lambda temporary: save_file(tensors, temporary))
    sha256, extras = artifacts.sha256_file(folder / name), sorted(state.extras.values)
    pointer = {"file": name, "sha256": sha256, "step": state.step, **facts, "extras": extras}
    artifacts.write_json(folder / "latest.json", artifacts.manifest("training-state", {}, {}, **pointer))
    for old in [*folder.glob("state-*.safetensors"), *folder.glob(".*.tmp")]:  # a killed process left the latter
        if old.name != name:
            old.unlink()


def require_room(folder: str | Path, state: TrainState) -> None:
    """`ValueError` unless two such states, the old and the new one, fit on the disk beside what is there."""
    folder = Path(folder)
    there = sum(path.stat().st_size for path in folder.glob("state-*.safetensors"))
    needed = 2 * sum(tensor.nbytes for tensor in _tensors(state).values()) - there
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise ValueError(
            f"training states in {folder} need {needed / 2**30:.2f} GiB of disk, but {free / 2**30:.2f} are free; free "
            "some, or choose another --out"
        )


def load_state(folder: str | Path, device: torch.device) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state and its facts, or None when nothing was saved; `ValueError` when it is damaged."""
    folder = Path(folder)
    if not (folder / "latest.json").exists():
        return None
    facts = artifacts.read_manifest(folder / "latest.json", "training-state")
    path = artifacts.inside(folder, facts["file"])
    if not path.is_file() or artifacts.sha256_file(path) != facts["sha256"]:
        raise ValueError(f"{path} is missing or damaged (checksum); delete {folder} to train again from the start")
    parts = ("weights", "first", "second", *(["average"] if facts["ema"] else []))
    names = [*Weights._fields, *facts["extras"]]
    expected = {f"{part}.{name}" for part in parts for name in names} | {"tokens_since_fired", "n_auxk_dropped"}
    # A copy lies in memory as a new tensor does: BLAS may sum in another order at another alignment.
    found = {key: value.to(device, copy=True) for key, value in load_checked(path, expected).items()}
    weights = {part: Weights(*(found[f"{part}.{name}"] for name in Weights._fields)) for part in parts}
    extras = {part: {name: found[f"{part}.{name}"] for name in names[len(Weights._fields) :]} for part in parts}
    state = TrainState(
        facts["step"],
        weights["weights"],
        OptimizerState(weights["first"], weights["second"], weights.get("average")),
        found["tokens_since_fired"],
        found["n_auxk_dropped"],
        ExtrasState(extras["weights"], extras["first"], extras["second"], extras.get("average")),
    )
    return state, facts


def saved_facts(folder: str | Path) -> dict[str, Any] | None:
    """What latest.json says of the newest state, None when nothing was saved; `ValueError` when it is damaged."""
    path = Path(folder) / "latest.json"
    return artifacts.read_manifest(path, "training-state") if path.exists() else None


def saved_step(folder: str | Path) -> int:
    """The step of the newest state, 0 when nothing was saved."""
    facts = saved_facts(folder)
    return 0 if facts is None else facts["step"]


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    parts = {"weights": state.weights, **state.optimizer._asdict()}
    of_extras = {"weights": state.extras.values, **state.extras._asdict()}
    tensors = {
        f"{part}.{name}": tensor
        for part, weights in parts.items()
        if weights is not None
        for name, tensor in {**weights._asdict(), **of_extras[part]}.items()
    }
    return {**tensors, "tokens_since_fired": state.tokens_since_fired, "n_auxk_dropped": state.n_auxk_dropped}
