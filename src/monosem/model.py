"""The autoencoder: normalise, encode, decode, and its released form on disk.

    x      = (raw - mean(raw)) / (std(raw) + 1e-5)          per token, over d_model; the model's input space
    z      = act(encoder (x - pre_bias) + latent_bias)      one of the activation functions in monosem.variants
    recons = z @ decoder + pre_bias

A released autoencoder is a folder with `autoencoder.safetensors` and `config.json` (docs/formats.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monosem import artifacts, config, kernels, losses, variants
from monosem.kernels import torch_sparse
from monosem.torch_state import pinned, pinned_methods
from monosem.types import Extras, SparseLatents, Weights

NORM_EPSILON = 1e-5
WEIGHTS_FILE = "autoencoder.safetensors"


class NormStats(NamedTuple):
    """What `normalize` took out of each token, and `denormalize` puts back."""

    mean: Float[Tensor, "*batch 1"]
    std: Float[Tensor, "*batch 1"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an autoencoder needs besides its weights."""

    d_model: int
    n_latents: int
    k: int
    activation: str = "topk"

    def __post_init__(self) -> None:
        config.activation_facts(self.activation)


def normalize(raw: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d_model"], NormStats]:
    """Per token: minus the mean over d_model, over the unbiased std + 1e-5, so that ||x|| ~ sqrt(d_model - 1)."""
    raw = raw.float()
    mean = raw.mean(-1, keepdim=True)
    centred = raw - mean
    std = centred.std(-1, keepdim=True)
    return centred / (std + NORM_EPSILON), NormStats(mean, std)


def denormalize(x: Float[Tensor, "*batch d_model"], stats: NormStats) -> Float[Tensor, "*batch d_model"]:
    """x * std + mean: from the model's input space back to the subject's."""
    return x * stats.std + stats.mean


class Autoencoder(nn.Module):
    """A sparse autoencoder over one site. Everything but `forward` speaks the normalised input space.

    `provenance` says what it was trained on (site, subject, store, tokens, versions); it travels with the weights.
    `extras` are what the activation function has beside them.
    """

    tells_pre_activations = True
    """Whether encoder and latent_bias are there; not those of every `convert.Wrapped`."""

    def __init__(
        self,
        config: AutoencoderConfig,
        weights: Weights,
        provenance: dict[str, Any] | None = None,
        extras: Extras | None = None,
    ) -> None:
        super().__init__()
        shape = (config.n_latents, config.d_model)
        expected = Weights(encoder=shape, latent_bias=shape[:1], decoder=shape, pre_bias=shape[1:])  # type: ignore[arg-type]
        for name, tensor, want in zip(Weights._fields, weights, expected, strict=True):
            if tuple(tensor.shape) != tuple(want):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this config needs {tuple(want)}")
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._extras = _checked_extras(config.activation, weights, extras or {})
        for name, tensor in (extras or {}).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.config = config
        self.provenance = provenance or {}

    @property
    def weights(self) -> Weights:
        return Weights(*(getattr(self, name) for name in Weights._fields))

    def normalize(self, raw: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d_model"], NormStats]:
        """See `model.normalize`; part of the model, so that no caller can forget it."""
        return normalize(raw)

    def denormalize(self, x: Float[Tensor, "*batch d_model"], stats: NormStats) -> Float[Tensor, "*batch d_model"]:
        """See `model.denormalize`."""
        return denormalize(x, stats)

    @property
    def extras(self) -> Extras:
        return {name: getattr(self, name) for name in self._extras}

    @pinned_methods
    def encode(
        self, x: Float[Tensor, "batch d_model"], *, k: int | None = None, threshold: float | None = None
    ) -> SparseLatents:
        """The active latents of normalised tokens, as the autoencoder was trained to choose them.

        Or, to see what it is worth at another sparsity: the `k` largest activations of each token; or, where training
        kept a number of latents, every pre-activation above `threshold` (Gao et al. 2024, section 5.3).
        """
        activation, weights = self.config.activation, self.weights
        keeps_k = check_choice(self.config, k, threshold)
        kernel = self._kernel(x)
        if threshold is not None:
            return kernel.threshold_encode(x, weights, torch.full_like(weights.latent_bias, threshold))
        if k is not None and keeps_k:
            return kernel.topk_encode(x, weights, k)
        latents = variants.encode(activation, x, weights, self.extras, self.config.k, kernel)
        return latents if k is None else latents._replace(indices=latents.indices[:, :k], values=latents.values[:, :k])

    @pinned_methods
    def decode(self, latents: SparseLatents) -> Float[Tensor, "batch d_model"]:
        """Normalised reconstructions."""
        weights = self.weights
        return self._kernel(latents.values).decode(latents, weights)

    def _kernel(self, x: Tensor) -> ModuleType:
        """The fastest kernels for fp32; torch's for other dtypes and where autograd watches: it sees these alone."""
        watched = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self.weights))
        if watched or any(t.dtype != torch.float32 for t in (x, *self.weights)):
            return torch_sparse
        return kernels.select("auto", self.weights.decoder.device)[1]

    @pinned_methods
    def forward(self, raw: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of raw activations, in their own space and dtype."""
        x, stats = normalize(raw)
        recons = self.decode(self.encode(x.flatten(0, -2))).view_as(x)
        return denormalize(recons, stats).to(raw.dtype)

    @pinned
    def save(self, folder: str | Path) -> None:
        """Write the released form: the config last, with the weights' hash, so that a torn save cannot load."""
        folder = Path(folder)
        if (folder / "config.json").exists():
            artifacts.read_manifest(folder / "config.json", "autoencoder")  # what others made is not overwritten
        parts = {**self.weights._asdict(), **self.extras}
        tensors = {name: w.detach().cpu().contiguous() for name, w in parts.items()}
        artifacts.write_atomic(folder / WEIGHTS_FILE, lambda temporary: save_file(tensors, temporary))
        facts = {"weights_sha256": artifacts.sha256_file(folder / WEIGHTS_FILE), "provenance": self.provenance}
        sources = self.provenance.get("sources", {})
        data = artifacts.manifest(
            "autoencoder", dataclasses.asdict(self.config), sources, normalization=_NORMALIZATION, **facts
        )
        artifacts.write_json(folder / "config.json", data)

    @staticmethod
    @pinned
    def load(folder: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
        """The autoencoder in `folder`; `ValueError` when it is missing, damaged, or not what its config says."""
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds no autoencoder (no config.json); give the folder that `monosem train` released"
            )
        data = artifacts.read_manifest(folder / "config.json", "autoencoder")
        if data["normalization"] != _NORMALIZATION:
            raise ValueError(
                f"{folder} normalises its input by {data['normalization']}; this version knows {_NORMALIZATION}"
            )
        path = folder / WEIGHTS_FILE
        if not path.is_file() or artifacts.sha256_file(path) != data["weights_sha256"]:
            raise ValueError(
                f"{path} is missing or damaged (its checksum is not the one in config.json); restore it or train again"
            )
        settings = config.from_dict(AutoencoderConfig, data["config"])
        names = variants.extra_names(settings.activation)
        tensors = load_checked(path, {*Weights._fields, *names})
        extras = {name: tensors.pop(name) for name in names}
        return Autoencoder(settings, Weights(**tensors), data["provenance"], extras).to(device)


_NORMALIZATION = {"kind": "per-token mean and unbiased std over d_model", "epsilon": NORM_EPSILON}


def load_checked(path: Path, names: tuple[str, ...] | set[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that must hold exactly `names`."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy or make it again") from None
    if set(tensors) != set(names):
        raise ValueError(f"{path} holds {sorted(tensors)}; it should hold {sorted(names)}")
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype not in (torch.float32, torch.int64)]:
        raise ValueError(f"{path} holds {wrong[0]} as {tensors[wrong[0]].dtype}; it should be float32")
    return tensors


def initial_weights(
    sample: Float[Tensor, "n d_model"],
    n_latents: int,
    k: int,
    activation: str = "topk",
    options: dict[str, float] | None = None,
    *,
    tied: bool,
    scaled: bool = True,
    seed: int,
    pre_bias: Float[Tensor, " d_model"] | None = None,
) -> Weights:
    """Weights to start from, given a sample of normalised activations (Gao et al. 2024, section 2 and appendix A).

    Decoder rows are uniformly random unit vectors; the encoder is equal to the decoder (`tied`) or drawn the same way;
    pre_bias is the sample's geometric median (given by a caller who knows it already); the encoder is then `scaled` so
    that the mean norm of z @ decoder is that of x - pre_bias, with the z of the activation function and its extras at
    the start.
    """
    generator = torch.Generator().manual_seed(seed)
    d_model = sample.shape[1]
    decoder = _unit_rows(torch.randn(n_latents, d_model, generator=generator))
    encoder = decoder.clone() if tied else _unit_rows(torch.randn(n_latents, d_model, generator=generator))
    pre_bias = losses.geometric_median(sample).float() if pre_bias is None else pre_bias.clone()
    weights = Weights(encoder, torch.zeros(n_latents), decoder, pre_bias)
    if not scaled:
        return weights
    latents = variants.encode(activation, sample, weights, variants.initial_extras(activation, weights, options), k)
    norms = (torch_sparse.decode(latents, weights) - pre_bias).norm(dim=1).mean()
    encoder.mul_((sample - pre_bias).norm(dim=1).mean() / norms)
    return weights


def _unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _checked_extras(activation: str, weights: Weights, extras: Extras) -> tuple[str, ...]:
    """The names of the extras; `ValueError` unless they are those of the activation function."""
    wanted = {name: tuple(e.shape) for name, e in variants.initial_extras(activation, weights).items()}
    if (found := {name: tuple(e.shape) for name, e in extras.items()}) != wanted:
        raise ValueError(f"the extras have shapes {found}; activation={activation} needs {wanted}")
    return tuple(wanted)


def check_choice(settings: AutoencoderConfig, k: int | None, threshold: float | None) -> bool:
    """Whether training kept a number of latents; `ValueError` unless `encode` can mean this `k` or `threshold`."""
    keeps_k = "k" in config.activation_facts(settings.activation).uses
    if k is not None and threshold is not None:
        raise ValueError(f"k is {k} and threshold is {threshold}; give one of them")
    if k is not None and not 1 <= k <= settings.n_latents:
        raise ValueError(f"k is {k}; give a number of latents from 1 to {settings.n_latents}")
    if threshold is not None and not keeps_k:
        raise ValueError(
            f"threshold has no meaning with activation={settings.activation}, which decides by size already; give k"
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; give a number of at least 0")
    return keeps_k
