"""Activations -> autoencoder: the recipe of Gao et al. 2024, section 2, read top to bottom in `train`.

The run folder holds
    train.json           what the run is (config, hash of the store); a run with another one is refused
    metrics.jsonl        one row a logged step
    state/               the newest training state, whole and resumable to the bit
    autoencoder/         the released autoencoder
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monosem import artifacts, kernels, losses, step, variants
from monosem.activations import ActivationStore
from monosem.checkpoint import load_state, save_state
from monosem.config import TrainConfig, activation_facts, changed_fields, to_dict
from monosem.logs import MetricsLog, progress
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.stream import ActivationStream, StoreSource
from monosem.types import Extras, StepGradients, Weights, resolve_device

log = logging.getLogger("monosem")

SAMPLE_TOKENS = 32_768
"""Tokens behind pre_bias, the encoder's scale and the loss's scale at the start."""

SELECTION_TOKENS = 16_384
"""Training tokens (in whole batches) on which raw and averaged weights are compared at the end."""

_MAY_CHANGE = ("out", "store", "device", "log_every_steps", "save_every_s")


def train(config: TrainConfig) -> Autoencoder:
    """Train on a store, resuming where an interrupted run stopped; returns the released autoencoder.

    The weights are bit-identical however often the run was stopped, on the same machine, thread count and kernels.
    Raises `ValueError` for a run folder made with another config or store, unusable activations, or divergence;
    `KeyboardInterrupt` after Ctrl-C, with the state saved.
    """
    for name in ("out", "store"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; give a folder")
    out = Path(config.out)
    with artifacts.folder_lock(out):
        store = ActivationStore.open(config.store)
        if finished := _finished(out, config, store):
            return finished
        device = resolve_device(config.device)
        impl, kernel = kernels.select(config.impl, device)
        source = StoreSource(store, "train")
        with (
            ActivationStream(source, batch_size=config.batch_size, seed=config.seed) as stream,
            _stop_on_interrupt() as interrupted,
        ):
            run = _Run(out, config, store, stream, device, impl)
            saved_at = time.monotonic()
            for _ in run.remaining_steps():
                x = _batch(stream, device)
                out_of_step, norm = step.advance(run.state, x, run.recipe, kernel)
                run.log_step(out_of_step, norm)
                if interrupted.is_set() or time.monotonic() - saved_at > config.save_every_s:
                    run.save()
                    saved_at = time.monotonic()
                if interrupted.is_set():
                    raise KeyboardInterrupt(
                        f"stopped at step {run.state.step} of {run.recipe.n_steps}; run the same command to go on"
                    )
            return run.release(kernel)


class _Run:
    """What one training run carries from step to step, and how it is started, resumed, logged and released."""

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        store: ActivationStore,
        stream: ActivationStream,
        device: torch.device,
        impl: str,
    ) -> None:
        self.out, self.config, self.store = out, config, store
        self.stream, self.device, self.impl = stream, device, impl
        self.metrics = MetricsLog(out / "metrics.jsonl")
        self.started = time.monotonic()
        self.threads = torch.get_num_threads()
        saved = load_state(out / "state", device)
        if saved is None:
            self._start()
        else:
            self.state, facts = saved
            self.recipe = step.Recipe(**facts["recipe"])
            self.elapsed_s = facts["elapsed_s"]
            stream.load_state_dict(facts["stream"])
            self._warn_if_bits_may_change(facts)
            log.info("resuming %s at step %d of %d", out, self.state.step, self.recipe.n_steps)
        self.metrics.rewind(self.state.step)

    def _start(self) -> None:
        sample = _sample(self.stream.source, self.config.seed)
        scale = losses.mse_scale(sample)
        self.recipe = step.recipe(self.config, sample.shape[1], scale)
        c = self.config
        options = c.activation_options
        weights = initial_weights(sample, c.n_latents, c.k, c.activation, options, tied=c.tied_init, seed=c.seed)
        weights = Weights(*(w.to(self.device) for w in weights))
        extras = variants.initial_extras(c.activation, weights, options)
        self.state = step.TrainState.new(weights, extras, ema=self.recipe.ema > 0)
        self.elapsed_s = 0.0
        log.info("training %d latents on %s; %s", self.config.n_latents, self.store.site, _one_line(self.recipe))

    def remaining_steps(self) -> Iterator[int]:
        done, total, batch = self.state.step, self.recipe.n_steps, self.recipe.batch_size
        return progress(range(done, total), "train", "tok", total=total * batch, each=batch, start=done * batch)

    @property
    def tokens_seen(self) -> int:
        return self.state.step * self.recipe.batch_size

    def log_step(self, out: StepGradients, norm: Tensor) -> None:
        """Append a row of this step alone every `log_every_steps`; `ValueError` when the loss is not finite."""
        at, spec = self.state.step, self.recipe.update_spec(self.state.step)
        if at % self.config.log_every_steps and at != self.recipe.n_steps:
            return
        auxiliary = "auxk_loss" if "auxk" in activation_facts(self.config.activation).uses else "sparsity"
        row = {
            "step": at,
            "tokens": self.tokens_seen,
            "loss": out.loss.item(),
            "mse": out.mse.item(),
            auxiliary: out.auxiliary.item(),
            "l0": out.l0.item(),
            "gradient_norm": norm.item(),
            "lr": spec.lr,
            "dead_latents": int(self.state.dead(self.recipe.dead_tokens_threshold).sum()),
            "auxk_dropped_steps": int(self.state.n_auxk_dropped),
            "elapsed_s": round(self.elapsed_s + time.monotonic() - self.started, 3),
        }
        if not (torch.isfinite(out.mse) and torch.isfinite(norm)):
            raise ValueError(
                f"the loss is {row['mse']} at step {at}: training diverged; lower lr (now {spec.lr:g}) or set clip_norm"
            )
        self.metrics.append(row)

    def save(self) -> None:
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "ema": self.recipe.ema > 0,
            "stream": self.stream.state_dict(),
            "elapsed_s": self.elapsed_s + time.monotonic() - self.started,
            "bits_depend_on": self._bits_depend_on(),
        }
        save_state(self.out / "state", self.state, facts)

    def release(self, kernel: ModuleType) -> Autoencoder:
        """Save the final state, choose between raw and averaged weights, write `autoencoder/`."""
        self.save()
        chosen, nmse = self._better_weights(kernel)
        log.info("released weights: %s (NMSE on training tokens: %s)", chosen, nmse)
        weights, extras = self._candidates()[chosen]
        c = self.config
        settings = AutoencoderConfig(weights.encoder.shape[1], c.n_latents, c.k, c.activation)
        weights, extras = Weights(*(w.cpu() for w in weights)), {name: e.cpu() for name, e in extras.items()}
        autoencoder = Autoencoder(settings, weights, self._provenance(chosen, nmse), extras)
        autoencoder.save(self.out / "autoencoder")
        return autoencoder

    def _better_weights(self, kernel: ModuleType) -> tuple[str, dict[str, float]]:
        n_batches = max(1, SELECTION_TOKENS // self.recipe.batch_size)
        x = torch.cat([_batch(self.stream, self.device) for _ in range(n_batches)])
        nmse = {}
        for name, (weights, extras) in self._candidates().items():
            latents = step.encode(x, weights, extras, self.recipe, kernel)
            nmse[name] = losses.normalized_mse(kernel.decode(latents, weights), x)
        return min(nmse, key=lambda name: nmse[name]), nmse

    def _candidates(self) -> dict[str, tuple[Weights, Extras]]:
        found = {"raw": (self.state.weights, self.state.extras.values)}
        if self.recipe.ema > 0:
            found["ema"] = self.state.averaged_weights(self.recipe.ema), self.state.averaged_extras(self.recipe.ema)
        return found

    def _provenance(self, chosen: str, nmse: dict[str, float]) -> dict[str, Any]:
        window = min(self.tokens_seen, -(-step.DEAD_WINDOW_TOKENS // self.recipe.batch_size) * self.recipe.batch_size)
        n_rows = self.store.n_rows("train")
        return {
            "site": dataclasses.asdict(self.store.site),
            "subject": self.store.manifest["subject"],
            "store": str(Path(self.config.store).resolve()),
            "sources": {"store": self.store.hash, **self.store.manifest["sources"]},
            "harvest": self.store.config,
            "train": to_dict(self.config),
            "recipe": dataclasses.asdict(self.recipe),
            "tokens_seen": self.tokens_seen,
            "distinct_tokens": min(self.tokens_seen, n_rows),
            "epochs": self.tokens_seen / n_rows,
            "dead_latents": {"count": int(self.state.dead(window).sum()), "window_tokens": window},
            "auxk_dropped_steps": int(self.state.n_auxk_dropped),
            "weights": chosen,
            "selection_normalized_mse": nmse,
            "impl": self.impl,
            "threads": self.threads,
        }

    def _bits_depend_on(self) -> dict[str, Any]:
        device, torch_version = str(self.device), artifacts.versions()["torch"]
        return {"impl": self.impl, "threads": self.threads, "device": device, "torch": torch_version}

    def _warn_if_bits_may_change(self, facts: dict[str, Any]) -> None:
        if changed := changed_fields(facts.get("bits_depend_on", {}), self._bits_depend_on()):
            log.warning("resuming with %s: results stay right but not bit-identical", ", ".join(changed))


def _finished(out: Path, wanted: TrainConfig, store: ActivationStore) -> Autoencoder | None:
    """The autoencoder if this very run is done, None if it is to be run; `ValueError` for another run's folder."""
    settings = {k: v for k, v in to_dict(wanted).items() if k not in _MAY_CHANGE}
    description = artifacts.manifest("training-run", settings, {"store": store.hash})
    path = out / "train.json"
    if not (path.exists() and any((out / name).exists() for name in ("metrics.jsonl", "state", "autoencoder"))):
        artifacts.write_json(path, description)  # also over that of a run which never took a step
    found = artifacts.read_manifest(path, "training-run")
    remedy = f"choose another --out, or delete metrics.jsonl, state and autoencoder in {out} to train anew"
    if found["sources"] != description["sources"]:
        raise ValueError(f"{out} was trained on another store than {wanted.store}; {remedy}")
    if changed := changed_fields(found["config"], settings):
        raise ValueError(f"{out} holds a run with another config ({'; '.join(changed)}); {remedy}")
    if not (out / "autoencoder" / "config.json").exists():
        return None
    log.info("%s is already trained with this config; skipped", out)
    return Autoencoder.load(out / "autoencoder")


def _sample(source: Any, seed: int) -> Float[Tensor, "n d_model"]:
    """About SAMPLE_TOKENS normalised training tokens, from blocks spread over the source."""
    n_blocks = min(source.n_blocks, -(-SAMPLE_TOKENS // source.block_rows))
    chosen = torch.randperm(source.n_blocks, generator=torch.Generator().manual_seed(seed))[:n_blocks].sort().values
    return normalize(torch.cat([source.block(int(i)) for i in chosen])[:SAMPLE_TOKENS])[0]


def _batch(stream: ActivationStream, device: torch.device) -> Float[Tensor, "batch d_model"]:
    return normalize(next(stream).to(device))[0]


def _one_line(recipe: step.Recipe) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in dataclasses.asdict(recipe).items()
    )


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event that is looked at between steps, so that a state is never saved half-changed."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
