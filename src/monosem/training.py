"""Activations -> autoencoder: the recipe of Gao et al. 2024, section 2, read top to bottom in `train`.

The run folder holds
    train.json           what the run is (config, hash of the store); a run with another one is refused
    metrics.jsonl        one row a logged step
    state/               the newest training state, whole and resumable to the bit
    autoencoder/         the released autoencoder
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosem import artifacts, interrupts, kernels, losses, step, variants
from monosem.activations import ActivationStore
from monosem.checkpoint import load_state, require_room, save_state, saved_facts
from monosem.config import TrainConfig, activation_facts, changed_fields, to_dict
from monosem.logs import MetricsLog, progress
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.stream import ActivationStream, StoreSource
from monosem.torch_state import pinned
from monosem.types import Extras, StepGradients, Weights, resolve_device

log = logging.getLogger("monosem")

SAMPLE_TOKENS = 32_768
"""Tokens behind pre_bias, the encoder's scale and the loss's scale at the start."""

SELECTION_TOKENS = 16_384
"""Training tokens (in whole batches) on which raw and averaged weights are compared at the end."""

_LOGGED_STATS = ("recall", "n_saturated")
"""Of what kernels count, what metrics.jsonl keeps."""

KIND = "training-run"
_HELD = ("metrics.jsonl", "state", "autoencoder")
"""What a run that has taken a step leaves beside train.json."""
AUDITED_ROWS = 32
"""Of the batch of a logged step: their latents are compared with the true top k."""

_MAY_CHANGE = ("out", "store", "device", "log_every_steps", "save_every_s")


@pinned
def train(config: TrainConfig) -> Autoencoder:
    """Train on a store, resuming where an interrupted run stopped; returns the released autoencoder.

    The weights are bit-identical however often the run was stopped, on the same machine, thread count and kernels.
    Raises `ValueError` for a run folder made with another config or store, unusable activations, or divergence;
    `KeyboardInterrupt` after Ctrl-C, with the state saved where `interrupts.handled()` is open, as in the command.
    """
    for name in ("out", "store"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; give a folder")
    out = Path(config.out)
    artifacts.require_no_other(out, KIND)
    store = ActivationStore.open(config.store)
    if is_finished(config, store):  # read without a lock, where nothing may be writable
        log.info("%s is already trained with this config; skipped", out)
        return Autoencoder.load(out / "autoencoder")
    with artifacts.folder_lock(out):
        if is_finished(config, store):  # by another process, meanwhile
            return Autoencoder.load(out / "autoencoder")
        source = StoreSource(store, "train")
        with (
            ActivationStream(source, batch_size=config.batch_size, seed=config.data_seed) as stream,
            interrupts.postponed() as interrupted,
        ):
            supply = Supply(store, stream, resolve_device(config.device))
            run = Run(config, supply)
            require_room(out / "state", run.state)
            begin(config, store)
            stream.seek(run.state.step)
            saved_at = time.monotonic()
            for _ in run.remaining_steps():
                run.feed(supply.batch())
                if interrupted.is_set() or time.monotonic() - saved_at > config.save_every_s:
                    run.save()
                    saved_at = time.monotonic()
                if interrupted.is_set():
                    raise KeyboardInterrupt(
                        f"stopped at step {run.state.step} of {run.recipe.n_steps}; run the same command to go on"
                    )
            while run.released is None:
                run.feed(supply.batch())
            return run.released


class Diverged(ValueError):
    """A run whose loss is not finite. It would diverge again."""


class Supply:
    """What all runs on one stream share: the store, the stream, the device, the sample that they start from."""

    def __init__(self, store: ActivationStore, stream: ActivationStream, device: torch.device) -> None:
        self.store, self.stream, self.device = store, stream, device

    def batch(self) -> Float[Tensor, "batch d_model"]:
        """The stream's next batch, normalised, on the device."""
        return normalize(next(self.stream).to(self.device))[0]

    @functools.cached_property
    def sample(self) -> Float[Tensor, "n d_model"]:
        """About SAMPLE_TOKENS normalised training tokens, from blocks spread over the source."""
        source, generator = self.stream.source, torch.Generator().manual_seed(self.stream.seed)
        n_blocks = min(source.n_blocks, -(-SAMPLE_TOKENS // source.block_rows))
        chosen = torch.randperm(source.n_blocks, generator=generator)[:n_blocks].sort().values
        return normalize(torch.cat([source.block(int(i)) for i in chosen])[:SAMPLE_TOKENS])[0]

    @functools.cached_property
    def mse_scale(self) -> float:
        """See `losses.mse_scale`, of the sample."""
        return losses.mse_scale(self.sample)

    @functools.cached_property
    def pre_bias(self) -> Float[Tensor, " d_model"]:
        """What pre_bias starts at: the sample's geometric median."""
        return losses.geometric_median(self.sample).float()


class Run:
    """One training run: started or resumed in `config.out`, then fed the stream's batches from number `position` on.

    It only looks at the stream's identity: whoever reads the stream may feed many runs. After its last step it takes
    as many batches more as choose between raw and averaged weights, and releases the autoencoder.
    """

    def __init__(self, config: TrainConfig, supply: Supply) -> None:
        self.out, self.config, self.supply = Path(config.out), config, supply
        self.store, self.device = supply.store, supply.device
        self.impl, self.kernel = kernels.select(config.impl, supply.device)
        if config.precision == "int8" and self.impl != "native":
            raise ValueError(f"precision=int8 needs impl=native, and impl is {self.impl} here; leave precision auto")
        self.metrics = MetricsLog(self.out / "metrics.jsonl")
        self.started = time.monotonic()
        self.threads = torch.get_num_threads()
        self.released: Autoencoder | None = None
        self.last_row: dict[str, Any] = {}
        self._finite: Tensor | None = None
        self._selection: list[Tensor] = []
        saved = load_state(self.out / "state", self.device)
        if saved is None:
            self._start()
        else:
            self.state, facts = saved
            self.selection = Selection(**facts["selection"])
            self.recipe = self._recipe_of(facts)
            self.elapsed_s, self.work = facts["elapsed_s"], Work(**facts["work"])
            supply.stream.check(facts["stream"])
            self._warn_if_bits_may_change(facts)
            log.info("resuming %s at step %d of %d", self.out, self.state.step, self.recipe.n_steps)
        self.metrics.rewind(None if saved is None else saved[1]["metrics"])
        self.saved_step = self.state.step if saved else -1

    def _recipe_of(self, facts: dict[str, Any]) -> step.Recipe:
        """The recipe of a saved state; `ValueError` unless it is the one that follows from the config."""
        found = facts["recipe"]
        wanted = dataclasses.asdict(step.recipe(self.config, self.store.width, found["mse_scale"]))
        if changed := changed_fields(*({**each, "precision": None} for each in (found, wanted))):
            raise ValueError(
                f"the state in {self.out / 'state'} is of another run ({'; '.join(changed)}); restore it from a copy, "
                "or delete it to train again from the start"
            )
        return step.Recipe(**found)

    def _start(self) -> None:
        sample = self.supply.sample
        self.recipe = step.recipe(self.config, sample.shape[1], self.supply.mse_scale)
        c = self.config
        options = c.activation_options
        what, bias = (c.n_latents, c.k, c.activation, options), self.supply.pre_bias
        weights = initial_weights(sample, *what, tied=c.tied_init, scaled=c.scaled_init, seed=c.seed, pre_bias=bias)
        weights = Weights(*(w.to(self.device) for w in weights))
        extras = variants.initial_extras(c.activation, weights, options)
        self.state = step.TrainState.new(weights, extras, ema=self.recipe.ema > 0)
        self.selection = self._chosen_selection(sample, weights)
        self.elapsed_s, self.work = 0.0, Work()
        log.info("training %d latents on %s; %s", self.config.n_latents, self.store.site, _one_line(self.recipe))

    def _chosen_selection(self, sample: Tensor, weights: Weights) -> Selection:
        """`auto` is what selects fastest here, if it selects the true top k of these tokens."""
        choose = getattr(self.kernel, "choose_precision", None)
        if self.config.precision != "auto" or self.config.activation != "topk" or choose is None:
            return Selection(self.config.precision)
        precision = choose(sample[: self.config.batch_size].to(self.device), weights, self.config.k)
        log.info("precision auto: latents are selected by %s products", precision)
        return Selection(precision)

    def remaining_steps(self) -> Iterator[int]:
        done, total, batch = self.state.step, self.recipe.n_steps, self.recipe.batch_size
        return progress(range(done, total), "train", "tok", total=total * batch, each=batch, start=done * batch)

    @property
    def tokens_seen(self) -> int:
        return self.state.step * self.recipe.batch_size

    @property
    def position(self) -> int:
        """Number, in its stream, of the batch that is to be fed next."""
        return self.state.step + len(self._selection)

    def feed(self, x: Float[Tensor, "batch d_model"]) -> None:
        """A step on batch `position`, or after the last step one batch of those that choose the weights.

        `Diverged` when the loss of a logged step is not finite.
        """
        if self.state.step == self.recipe.n_steps:
            self._selection.append(x)
            if len(self._selection) == max(1, SELECTION_TOKENS // self.recipe.batch_size):
                self._release()
            return
        dead = self.state.dead(self.recipe.dead_tokens_threshold).sum()
        started = time.perf_counter()
        recipe = dataclasses.replace(self.recipe, precision=self.selection.precision)
        out, norm = step.advance(self.state, x, recipe, self.kernel, self._rows_to_audit(len(x)))
        seconds = time.perf_counter() - started
        self._heed_audit(out)
        self.work.count(len(x) * dead.clamp(max=self.recipe.auxk), out, seconds)
        self._finite = torch.isfinite(out.mse) & torch.isfinite(norm).to(out.mse.device)
        self._log_step(out, norm)
        if self.state.step == self.recipe.n_steps:
            self.save()

    def _is_logged(self, at: int) -> bool:
        return at % self.config.log_every_steps == 0 or at == self.recipe.n_steps

    def _rows_to_audit(self, n_rows: int) -> tuple[int, ...]:
        """Of the step to come, if it is logged: a sample that depends on the seed and the step's number alone."""
        at = self.state.step + 1
        if not self._is_logged(at):
            return ()
        generator = torch.Generator().manual_seed((self.config.seed << 32 | at) & (2**63 - 1))
        return tuple(torch.randperm(n_rows, generator=generator)[:AUDITED_ROWS].tolist())

    def _heed_audit(self, out: StepGradients) -> None:
        """After a latent was missed, `auto` selects by a product that is proven to miss none."""
        if out.stats is None or not out.stats["n_missed"] or self.config.precision != "auto":
            return
        precision = self.kernel.fastest_precision(exact=True)
        log.warning(
            "step %d: %s products missed %d of %d latents of the true top k; from now on they are %s",
            self.state.step, self.selection.precision, out.stats["n_missed"], out.stats["n_audited"], precision,
        )  # fmt: skip
        self.selection = Selection(precision, missed_at_step=self.state.step)

    def raise_if_diverged(self) -> None:
        """`Diverged` when the loss of the last step is not finite."""
        if self._finite is not None and not self._finite:
            raise Diverged(
                f"the loss is not finite at step {self.state.step}: training diverged; "
                f"lower lr (now {self.recipe.update_spec(self.state.step).lr:g}) or set clip_norm"
            )

    def _log_step(self, out: StepGradients, norm: Tensor) -> None:
        """Append a row of this step alone every `log_every_steps`."""
        at, spec = self.state.step, self.recipe.update_spec(self.state.step)
        if not self._is_logged(at):
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
            **{name: out.stats[name] for name in _LOGGED_STATS if out.stats is not None},
            "elapsed_s": round(self.seconds, 3),
        }
        self.raise_if_diverged()
        self.metrics.append(row)
        self.last_row = row

    @property
    def seconds(self) -> float:
        """Seconds since the start, over all starts."""
        return self.elapsed_s + time.monotonic() - self.started

    def save(self) -> None:
        if self.saved_step == self.state.step:
            return
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "ema": self.recipe.ema > 0,
            "stream": {**self.supply.stream.state_dict(), "n_batches": self.state.step},
            "elapsed_s": self.seconds,
            "work": self.work.to_dict(),
            "selection": dataclasses.asdict(self.selection),
            "bits_depend_on": self._bits_depend_on(),
            "metrics": self.metrics.kept(),
        }
        save_state(self.out / "state", self.state, facts)
        self.saved_step = self.state.step

    def _release(self) -> None:
        """Choose between raw and averaged weights, write `autoencoder/`."""
        chosen, nmse = self.better_weights(torch.cat(self._selection))
        log.info("released weights: %s (NMSE on training tokens: %s)", chosen, nmse)
        self.released = self.autoencoder(chosen, self._provenance(chosen, nmse))
        self.released.save(self.out / "autoencoder")

    def autoencoder(self, chosen: str, provenance: dict[str, Any] | None = None) -> Autoencoder:
        """The autoencoder of the `raw` or `ema` weights as they are now, on the CPU."""
        weights, extras = self._candidates()[chosen]
        c = self.config
        settings = AutoencoderConfig(weights.encoder.shape[1], c.n_latents, c.k, c.activation)
        weights, extras = Weights(*(w.cpu() for w in weights)), {name: e.cpu() for name, e in extras.items()}
        return Autoencoder(settings, weights, provenance, extras)

    def better_weights(self, x: Float[Tensor, "n d_model"]) -> tuple[str, dict[str, float]]:
        """Which of `raw` and `ema` has the lower NMSE on x, and the NMSEs."""
        nmse = {}
        for name, (weights, extras) in self._candidates().items():
            latents = step.encode(x, weights, extras, self.recipe, self.kernel)
            nmse[name] = losses.normalized_mse(self.kernel.decode(latents, weights), x)
        return min(nmse, key=lambda name: nmse[name]), nmse

    def _candidates(self) -> dict[str, tuple[Weights, Extras]]:
        found = {"raw": (self.state.weights, self.state.extras.values)}
        if self.recipe.ema > 0:
            found["ema"] = self.state.averaged_weights(self.recipe.ema), self.state.averaged_extras(self.recipe.ema)
        return found

    def dead_latents(self) -> dict[str, int]:
        """How many latents (raw weights) have not fired in the last DEAD_WINDOW_TOKENS, in whole batches."""
        window = min(self.tokens_seen, -(-step.DEAD_WINDOW_TOKENS // self.recipe.batch_size) * self.recipe.batch_size)
        return {"count": int(self.state.dead(window).sum()), "window_tokens": window}

    def _provenance(self, chosen: str, nmse: dict[str, float]) -> dict[str, Any]:
        n_rows = self.store.n_rows("train")
        return {
            "site": dataclasses.asdict(self.store.site),
            "subject": self.store.manifest["subject"],
            "store": str(Path(self.config.store).resolve()),
            "sources": {"store": self.store.hash, **self.store.manifest["sources"]},
            "harvest": self.store.config,
            "train": to_dict(self.config),
            "recipe": dataclasses.asdict(self.recipe),
            "selection": dataclasses.asdict(self.selection),
            "tokens_seen": self.tokens_seen,
            "distinct_tokens": min(self.tokens_seen, n_rows),
            "epochs": self.tokens_seen / n_rows,
            "dead_latents": self.dead_latents(),
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
        if changed := changed_fields(facts["bits_depend_on"], self._bits_depend_on()):
            log.warning("resuming with %s: results stay right but not bit-identical", ", ".join(changed))


@dataclasses.dataclass(frozen=True)
class Selection:
    """The product by which a run selects latents, kept over all its starts."""

    precision: str
    missed_at_step: int | None = None
    """When the audit found that the first choice had missed a latent."""


class Work:
    """What the steps of a run have cost so far, over all its starts."""

    def __init__(self, kernel_s: float = 0.0, product_s: float | None = None, auxk_pairs: int = 0) -> None:
        self.kernel_s = kernel_s
        """Seconds in the step alone (on a GPU: until it was launched)."""
        self.product_s = product_s
        """Of these, seconds in the product that selects latents; None where the kernels do not say."""
        self._auxk_pairs = torch.tensor(auxk_pairs)

    @property
    def auxk_pairs(self) -> int:
        """(token, latent) pairs that modelled the error."""
        return int(self._auxk_pairs)

    def count(self, auxk_pairs: Int[Tensor, ""], out: StepGradients, seconds: float) -> None:
        self.kernel_s += seconds
        self._auxk_pairs = self._auxk_pairs.to(auxk_pairs.device) + auxk_pairs
        if out.stats is not None:
            self.product_s = (self.product_s or 0.0) + out.stats["product_s"]

    def to_dict(self) -> dict[str, Any]:
        return {"kernel_s": self.kernel_s, "product_s": self.product_s, "auxk_pairs": self.auxk_pairs}


def identity(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide the result: all but where it lies and what is only watched."""
    return {k: v for k, v in to_dict(config).items() if k not in _MAY_CHANGE}


def is_finished(wanted: TrainConfig, store: ActivationStore) -> bool:
    """Whether this very run has released its autoencoder.

    `ValueError` for the folder of another run, or of no run, and where rows of a finished one are not as they were.
    """
    out, description = Path(wanted.out), _description(wanted, store)
    path, held = out / "train.json", [name for name in _HELD if (out / name).exists()]
    if not path.exists():
        if held:
            raise ValueError(f"{out} holds {' and '.join(held)}, but no train.json of a run; choose another --out")
        return False
    found = artifacts.read_manifest(path, KIND)
    if not held:  # a run which never took a step
        return False
    remedy = f"choose another --out, or delete metrics.jsonl, state and autoencoder in {out} to train anew"
    if found["sources"] != description["sources"]:
        raise ValueError(f"{out} was trained on another store than {wanted.store}; {remedy}")
    if changed := changed_fields(found["config"], description["config"]):
        raise ValueError(f"{out} holds a run with another config ({'; '.join(changed)}); {remedy}")
    if not (out / "autoencoder" / "config.json").exists():
        return False
    if (saved := saved_facts(out / "state")) is not None:  # the last state, which was saved after the last row
        MetricsLog(out / "metrics.jsonl").check(saved["metrics"])
    return True


def begin(config: TrainConfig, store: ActivationStore) -> None:
    """Write train.json, also over that of a run which never took a step."""
    out = Path(config.out)
    if not (out / "train.json").exists() or not any((out / name).exists() for name in _HELD):
        artifacts.write_json(out / "train.json", _description(config, store))


def _description(config: TrainConfig, store: ActivationStore) -> dict[str, Any]:
    return artifacts.manifest(KIND, identity(config), {"store": store.hash})


def _one_line(recipe: step.Recipe) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in dataclasses.asdict(recipe).items()
    )
