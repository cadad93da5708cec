"""Autoencoders of other libraries in the form that our evaluations read, and ours in the form that theirs do.

    autoencoder = convert.wrap(module, d_model=768)
    reconstruction.tally(autoencoder, blocks, clusters)

`wrap` takes any module with `encode` and `decode`: those of SAELens and dictionary_learning (`encode(x)` gives every
latent, `decode(z)` takes them), of sparsify (`encode(x)` gives `top_acts` and `top_indices`, `decode` takes both), and
of the paper's own code (`encode(x)` gives the latents and the token's statistics, `decode` takes both).
`expose` gives what SAEBench (`core`, `sparse_probing`) and sae-probes take. `save_sae_lens` and `load_sae_lens` write
and read SAELens' files, `from_openai` reads the paper's state dict. Nothing of those libraries is imported.

What a module says of itself is checked on random inputs, to the precision of its dtype: that its decoder is affine,
which parameters are its encoder, and that its own forward gives what `decode` makes of `encode`. A setting that is not
known is refused by its name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monosem import artifacts, model, variants
from monosem.kernels import torch_sparse
from monosem.model import Autoencoder, AutoencoderConfig, NormStats, check_choice, denormalize
from monosem.torch_state import pinned, pinned_methods
from monosem.types import SparseLatents, Weights

_ROWS_AT_ONCE = 1024
_TOLERANCE = 1e-3
"""Of float32; a module of less precision is judged by four units in its last place."""
_PUT_BACK = ("layer_norm", "constant_norm_rescale")
"""The normalisations of SAELens that its decode takes back, from what encode saw last."""

Normalize = Callable[[Float[Tensor, "*batch d_model"]], tuple[Float[Tensor, "*batch d_model"], NormStats]]


@pinned
def wrap(
    module: nn.Module,
    d_model: int,
    *,
    n_latents: int | None = None,
    k: int | None = None,
    normalize: Normalize | None = None,
) -> Wrapped:
    """`module` as an autoencoder of ours, on its device.

    It reads raw activations as they are, or what `normalize` (such as `model.normalize`) makes of them. `n_latents` is
    needed where `encode` gives indices. `k` is told to evaluations that compare at the same number of latents; without
    it the autoencoder counts as ReLU. Its encoder is taken over where parameters of a usual name are found to give its
    activations. `ValueError` when the module has another form or its decoder is not affine.
    """
    if not (callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None))):
        raise ValueError(f"{type(module).__name__} has no encode and decode; give an autoencoder that has both")
    _check_settings(module, normalize)
    name, form = type(module).__name__, module
    with torch.no_grad():
        found = module.encode(torch.zeros(1, d_model, **_place(module)))  # type: ignore[operator]
        by_index = hasattr(found, "top_acts")
        if not by_index and isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict | None):
            form = _Paired(module, bool(found[1]))
            found, normalize = found[0], (normalize or model.normalize) if found[1] else normalize
            k = k or getattr(getattr(module, "activation", None), "k", None)
        if not by_index and not (isinstance(found, Tensor) and found.ndim == 2):
            raise ValueError(
                f"encode of {name} gives {type(found).__name__}, neither latents [batch, n_latents], alone or with "
                "statistics by name, nor top_acts with top_indices; wrap its encode in one that does"
            )
        n_latents = n_latents if by_index else found.shape[1]
        if n_latents is None:
            raise ValueError(f"encode of {name} gives indices, not n_latents; give n_latents")
        decoder, pre_bias = _affine_decoder(form, n_latents, by_index)
    if decoder.shape[1] != d_model:
        raise ValueError(f"decode of {name} gives width {decoder.shape[1]}, not d_model {d_model}")
    encoder = _encoder(form, decoder, pre_bias)
    config = AutoencoderConfig(d_model, n_latents, k or n_latents, "relu" if k is None else "topk")
    wrapped = Wrapped(config, form, Weights(*encoder, decoder, pre_bias), normalize)
    _check_forward(module, wrapped, form is not module and normalize is not None)
    return wrapped


def _check_settings(module: nn.Module, normalize: Normalize | None) -> None:
    """`ValueError` for what a module's settings do beside `encode` and `decode`, as far as they tell."""
    cfg, name = getattr(module, "cfg", None), type(module).__name__
    if isinstance(cfg, Mapping):
        cfg = SimpleNamespace(**{str(key): value for key, value in cfg.items()})
    kind = getattr(cfg, "normalize_activations", None)
    if kind in _PUT_BACK:
        raise ValueError(
            f"decode of {name} takes back its normalize_activations={kind}; save it with SAELens, and "
            "load_sae_lens reads layer_norm"
        )
    if kind not in (None, "none") and normalize is None:
        raise ValueError(f"{name} has normalize_activations={kind}; fold it into the weights, or give it as normalize")
    for setting in ("transcode", "skip_connection", "finetuning_scaling_factor", "use_error_term"):
        if getattr(cfg, setting, None) not in (None, False):
            raise ValueError(f"{name} has {setting}={getattr(cfg, setting)}, so its reconstruction is not decode's")
    if (shape := getattr(cfg, "reshape_activations", None)) not in (None, "none"):
        raise ValueError(f"{name} has reshape_activations={shape}; it reads no rows of activations")


class _Paired(nn.Module):
    """A module whose `encode` gives the latents with what `decode` puts back, in the space that its encoder reads.

    Its own normalisation, done again on what is normalised, is then the identity: with x = centred / (std + e) of
    deviation s = std / (std + e), the token (e / (1 - s)) x has just the deviation std.
    """

    def __init__(self, module: nn.Module, normalizes: bool) -> None:
        super().__init__()
        self.module, self.normalizes = module, normalizes

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch n_latents"]:
        if self.normalizes:
            x = x * (model.NORM_EPSILON / (1 - x.float().std(-1, keepdim=True)).clamp_min(1e-8)).to(x.dtype)
        return self.module.encode(x)[0]  # type: ignore[operator]

    def decode(self, z: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch d_model"]:
        nothing = {"mu": z.new_zeros(len(z), 1), "std": z.new_ones(len(z), 1)} if self.normalizes else {}
        return self.module.decode(z, nothing)  # type: ignore[operator]


def _check_forward(module: nn.Module, wrapped: Wrapped, normalizes: bool) -> None:
    """`ValueError` where the module's own reconstruction of random tokens is another than ours.

    Its forward gives one alone, as `sae_out`, or among others; a module without forward is not asked. One that
    normalises is compared part by part: which of two nearly equal latents is among the k largest may change where a
    token is rounded in another place, but not the values in order, nor what the same latents decode to.
    """
    name, x = type(module).__name__, _probe(wrapped.weights.pre_bias).to(**_place(module))

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a.float() - b.float()).norm() <= _tolerance(module) * (a.float().norm() + b.float().norm()))

    with torch.no_grad():
        own = [t for t in _own_reconstructions(module, x) if t.shape == x.shape]
        if normalizes:
            z, info = module.encode(x)  # type: ignore[operator]
            read, stats = wrapped.normalize(x)
            values = wrapped.encode(read).values
            ours = denormalize(z.float() @ wrapped.weights.decoder + wrapped.weights.pre_bias, stats)
            same = close(z.float().topk(values.shape[1]).values, values) and close(module.decode(z, info), ours)  # type: ignore[operator]
        else:
            ours, same = wrapped.decode(wrapped.encode(x)), True
    if not same or (own and not any(close(t, ours) for t in own)):
        raise ValueError(
            f"forward of {name} gives another reconstruction than its decode of its encode"
            f"{', with the statistics of monosem.model.normalize' if normalizes else ''}; "
            "wrap a module whose encode and decode do all that it does, and give its normalisation as normalize"
        )


def _own_reconstructions(module: nn.Module, x: Float[Tensor, "batch d_model"]) -> list[Tensor]:
    """What the module's forward gives, in evaluation mode: a tensor, those of a tuple, or `sae_out`."""
    training = module.training
    try:
        found = module.eval()(x)
    except NotImplementedError:
        return []
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"forward of {type(module).__name__} does not read rows of activations ({error})") from None
    finally:
        module.train(training)
    several = found if isinstance(found, tuple | list) else ()
    return [t for t in (found, getattr(found, "sae_out", None), *several) if isinstance(t, Tensor)]


def _probe(centre: Float[Tensor, " d_model"]) -> Float[Tensor, "192 d_model"]:
    """Tokens near to and far from `centre`."""
    noise = torch.randn(64, len(centre), generator=torch.Generator().manual_seed(0)).to(centre)
    return torch.cat([centre + scale * noise for scale in (0.1, 1.0, 10.0)])


class Wrapped(Autoencoder):
    """A foreign autoencoder as one of ours; make one with `wrap`.

    Its decoder and pre_bias are the module's, read off its `decode`. Encoder and latent_bias are NaN where they are not
    known (`tells_pre_activations`): a number that needs them would be not finite, which is an error, and not wrong.
    """

    def __init__(
        self, config: AutoencoderConfig, module: nn.Module, weights: Weights, normalize: Normalize | None
    ) -> None:
        super().__init__(config, weights)
        self.module = module
        self.tells_pre_activations = bool(weights.latent_bias.isfinite().all())
        self._normalize = normalize

    def normalize(self, raw: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d_model"], NormStats]:
        """What the module reads, and what to put back afterwards: nothing, without a `normalize` of its own."""
        if self._normalize is not None:
            return self._normalize(raw)
        raw = raw.float()
        return raw, NormStats(torch.zeros_like(raw[..., :1]), torch.ones_like(raw[..., :1]))

    @pinned_methods
    def encode(
        self, x: Float[Tensor, "batch d_model"], *, k: int | None = None, threshold: float | None = None
    ) -> SparseLatents:
        """The module's active latents, or the `k` largest of them; the largest first.

        `ValueError` when one is negative, and for what only its pre-activations could tell where they are not known: a
        `threshold`, or a `k` above its own.
        """
        name, own = _name(self.module), self.config
        if check_choice(own, k, threshold) and self.tells_pre_activations and (k is not None or threshold is not None):
            return super().encode(x, k=k, threshold=threshold)
        if threshold is not None:
            raise ValueError(f"a wrapped {name} does not tell its pre-activations, so it has no threshold; give k")
        if k is not None and own.activation == "topk" and k > own.k:
            raise ValueError(f"k is {k}, but a wrapped {name} gives only its own {own.k} latents; give at most those")
        parts = [_sparse(self.module, part, self.config.n_latents) for part in x.split(_ROWS_AT_ONCE)]
        width = max(indices.shape[1] for indices, _ in parts)
        indices, values = (
            torch.cat([nn.functional.pad(part[which], (0, width - part[which].shape[1])) for part in parts])
            for which in (0, 1)
        )
        return SparseLatents(indices[:, :k], values[:, :k], own.n_latents)

    @pinned_methods
    def forward(self, raw: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of raw activations, in their own space and dtype."""
        x, stats = self.normalize(raw)
        recons = self.decode(self.encode(x.flatten(0, -2))).view_as(x)
        return denormalize(recons, stats).to(raw.dtype)

    def save(self, folder: str | Path) -> None:
        raise ValueError(f"a wrapped {_name(self.module)} cannot be saved; save it with its own library")


_HOOKS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}
"""Our locations as TransformerLens calls them, behind `blocks.LAYER.`."""


class Settings(SimpleNamespace):
    """What other libraries read off `cfg`: where the activations come from, and sizes."""

    def to_dict(self) -> dict[str, Any]:
        """The settings that are plain data, for a result file."""
        plain = str, int, float, bool, dict, list, tuple, type(None)
        return {name: value for name, value in vars(self).items() if isinstance(value, plain)}


@pinned
def expose(
    autoencoder: Autoencoder,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    context_length: int = 128,
) -> Exposed:
    """`autoencoder` as a module that other libraries evaluate; it reads and writes raw activations.

    `model_name` and `hook_name` are what TransformerLens calls the subject and the site; by default the name that the
    subject had in training, and the site's. `ValueError` when neither is known.
    """
    model_name, hook_name = _names(autoencoder, model_name, hook_name)
    layer = re.search(r"\d+", hook_name or "")
    for name, value in (("model_name", model_name), ("hook_name", layer and hook_name)):
        if not value:
            raise ValueError(
                f"{name} does not follow from this autoencoder's provenance; give it as TransformerLens does"
            )
    assert layer is not None
    settings = autoencoder.config
    cfg = Settings(
        model_name=model_name, hook_name=hook_name, hook_layer=int(layer[0]), hook_head_index=None,
        d_in=settings.d_model, d_sae=settings.n_latents, architecture=settings.activation, dtype="float32",
        context_size=context_length, prepend_bos=True, exclude_special_tokens=None, normalize_activations="none",
        model_from_pretrained_kwargs={}, dataset_trust_remote_code=False,
    )  # fmt: skip
    return Exposed(autoencoder, cfg)


def _names(autoencoder: Autoencoder, model_name: str | None, hook_name: str | None) -> tuple[str | None, str | None]:
    """What TransformerLens calls subject and site: as given, else as the provenance has it, else None."""
    site = autoencoder.provenance.get("site", {})
    if hook_name is None and site.get("location") in _HOOKS:
        hook_name = f"blocks.{site['layer']}.{_HOOKS[site['location']]}"
    return model_name or site.get("model"), hook_name


class Exposed(nn.Module):
    """One of our autoencoders with the names and shapes of others: `encode` gives every latent, `decode` takes them.

    `decode` gives back the mean and deviation of the tokens that `encode` saw last, so it is called right after it, on
    as many tokens. W_enc, b_enc, W_dec and b_dec are there to be read; a change of them, or of their dtype, changes no
    latent: those are computed in float32.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, autoencoder: Autoencoder, cfg: Settings) -> None:
        super().__init__()
        weights = autoencoder.weights
        tensors = {"W_enc": weights.encoder.T, "b_enc": weights.latent_bias, "W_dec": weights.decoder}
        for name, tensor in {**tensors, "b_dec": weights.pre_bias}.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self.cfg = cfg
        self._own = (autoencoder,)  # in a tuple, so that .to(torch.bfloat16) does not round it
        self._stats: NormStats | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @pinned_methods
    @torch.no_grad()
    def encode(self, raw: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_latents"]:
        """Every latent's activation on raw activations, in their dtype."""
        autoencoder = self._own[0].to(raw.device)
        x, self._stats = autoencoder.normalize(raw)
        latents = autoencoder.encode(x.flatten(0, -2))
        dense = x.new_zeros(len(latents.values), latents.n_latents)
        dense.scatter_add_(1, latents.indices.long(), latents.values)  # padding has the index 0 and the value 0
        return dense.view(*raw.shape[:-1], latents.n_latents).to(raw.dtype)

    @pinned_methods
    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch d_model"]:
        """Raw activations. `ValueError` unless the tokens are as many as `encode` saw last."""
        if self._stats is None or self._stats.mean.shape[:-1] != latents.shape[:-1]:
            seen = None if self._stats is None else tuple(self._stats.mean.shape[:-1])
            raise ValueError(
                f"decode of tokens {tuple(latents.shape[:-1])}, but encode last saw {seen}; encode those tokens first: "
                "their mean and deviation are put back"
            )
        weights = self._own[0].to(latents.device).weights
        recons = latents.float() @ weights.decoder + weights.pre_bias
        return denormalize(recons, self._stats).to(latents.dtype)

    def forward(self, raw: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of raw activations."""
        return self.decode(self.encode(raw))


SAE_LENS_FORMAT = "6.54.12"
"""The version of SAELens whose files are written and read."""
_SAE_LENS_CONFIG, _SAE_LENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAE_LENS_NORMALIZE: dict[str, Normalize | None] = {"none": None, "layer_norm": model.normalize}


@pinned
def save_sae_lens(
    autoencoder: Autoencoder, folder: str | Path, *, model_name: str | None = None, hook_name: str | None = None
) -> None:
    """Write what SAELens' `SAE.load_from_disk` reads: a module of its own that computes what `autoencoder` does.

    Its `layer_norm` is our normalisation, epsilon included. TopK is its `topk`, ReLU its `standard`, whatever has a
    threshold a latent its `jumprelu`: gates, ProLU and BatchTopK are such thresholds once they are trained. The names
    are those of `expose`, as far as they are known.
    """
    if isinstance(autoencoder, Wrapped):
        autoencoder.save(folder)  # says why not
    artifacts.require_ours(Path(folder) / _SAE_LENS_CONFIG, _is_sae_lens)
    architecture, weights, choice = _asked_of_kernels(autoencoder)
    model_name, hook_name = _names(autoencoder, model_name, hook_name)
    tensors = {"W_enc": weights.encoder.T, "b_enc": weights.latent_bias, "W_dec": weights.decoder}
    tensors["b_dec"] = weights.pre_bias
    cfg = {
        "architecture": architecture, "d_in": autoencoder.config.d_model, "d_sae": autoencoder.config.n_latents,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "layer_norm",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_FORMAT, "sae_lens_training_version": None, "model_name": model_name,
            "hook_name": hook_name, "prepend_bos": True,
        },
    }  # fmt: skip
    if architecture == "topk":
        cfg |= {"k": choice, "rescale_acts_by_decoder_norm": False}
    if isinstance(choice, Tensor):
        tensors["threshold"] = choice
    plain = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
    artifacts.write_atomic(Path(folder) / _SAE_LENS_WEIGHTS, lambda temporary: save_file(plain, temporary))
    artifacts.write_json(Path(folder) / _SAE_LENS_CONFIG, cfg)


def _is_sae_lens(path: Path) -> bool:
    try:
        found = artifacts.read_json(path)
    except ValueError:
        return False
    return isinstance(found, dict) and {"architecture", "d_in", "d_sae"} <= found.keys()


@pinned
def load_sae_lens(folder: str | Path) -> Wrapped:
    """The autoencoder in SAELens' files, for our evaluations; SAELens itself is not needed.

    `ValueError` when there is none, one of another architecture or input than the four and two known here, or one whose
    settings or tensors are not all known.
    """
    folder = Path(folder)
    try:
        cfg = artifacts.read_json(folder / _SAE_LENS_CONFIG)
        tensors = {name: t.float() for name, t in load_file(folder / _SAE_LENS_WEIGHTS).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no autoencoder of SAELens ({error}); give a folder it saved one in") from None
    if not isinstance(cfg, dict):
        raise ValueError(f"{folder / _SAE_LENS_CONFIG} is no object; give a folder that SAELens saved one in")
    cfg = _in_new_words(folder, cfg)
    for field, known in _SAE_LENS_KNOWN.items():
        if not any(cfg.get(field) == value and type(cfg.get(field)) is type(value) for value in known):
            raise ValueError(
                f"{field} of {folder} is {cfg.get(field)!r}; known are {', '.join(map(str, known))}: load it with "
                f"SAELens {SAE_LENS_FORMAT} or later, and wrap that"
            )
    if unknown := sorted(cfg.keys() - _SAE_LENS_KNOWN.keys() - _SAE_LENS_SIZES - _SAE_LENS_HARMLESS):
        raise ValueError(
            f"{folder} has settings that are not known to leave the latents as they are: {', '.join(unknown)}; load it "
            f"with SAELens {SAE_LENS_FORMAT} or later, and wrap that"
        )
    _check_sizes(folder, cfg, tensors)
    normalize = _SAE_LENS_NORMALIZE[cfg["normalize_activations"]]
    return wrap(_FromSaeLens(tensors, cfg), cfg["d_in"], k=cfg.get("k"), normalize=normalize)


_SAE_LENS_KNOWN: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard", "topk", "jumprelu", "gated"),
    "normalize_activations": tuple(_SAE_LENS_NORMALIZE),
    "reshape_activations": ("none",),
    "apply_b_dec_to_input": (True, False),
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
    "rescale_acts_by_decoder_norm": (False, True),
    "use_error_term": (False, None),
}
"""Settings that decide what the latents are, and their values that are read here."""
_SAE_LENS_SIZES = {"d_in", "d_sae", "k"}
_SAE_LENS_HARMLESS = {
    "dtype", "device", "metadata", "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name",
    "hook_layer", "hook_point", "hook_point_layer", "prepend_bos", "context_size", "dataset_path",
    "dataset_trust_remote_code", "exclude_special_tokens", "seqpos_slice", "neuronpedia_id", "sae_lens_version",
    "sae_lens_training_version", "activation_fn_kwargs", "l1_coefficient", "lp_norm", "l1_warm_up_steps",
    "use_ghost_grads", "mse_loss_normalization", "noise_scale", "normalize_sae_decoder",
    "scale_sparsity_penalty_by_decoder_norm", "decoder_orthogonal_init", "decoder_init_norm",
    "decoder_heuristic_init", "init_encoder_as_decoder_transpose", "b_dec_init_method", "aux_loss_coefficient",
    "jumprelu_init_threshold", "jumprelu_bandwidth", "lr", "seed", "train_batch_size_tokens", "training_tokens",
}  # fmt: skip
"""Settings that say where the activations come from, or how it was trained."""
_SAE_LENS_TENSORS = {"standard": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold")}
_SAE_LENS_TENSORS["gated"] = ("b_gate", "b_mag", "r_mag")


def _in_new_words(folder: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings as the present version has them: older ones name the activation function beside the architecture,
    leave out what was not yet there, and take the shape from the hook's name. `ValueError` where the two do not agree.
    """
    hook = str(cfg.get("hook_name") or (cfg.get("metadata") or {}).get("hook_name") or "")
    absent: dict[str, Any] = {
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook.endswith("_z") else "none",
    }
    absent |= {"finetuning_scaling_factor": False, "hook_head_index": None, "use_error_term": False}
    cfg = {**absent, "rescale_acts_by_decoder_norm": False, **cfg}
    options = cfg.get("activation_fn_kwargs") or {}
    if not isinstance(options, dict) or options.keys() - {"k"}:
        raise ValueError(f"{folder} has activation_fn_kwargs {options!r}; known is a k alone")
    names = [cfg.pop(name) for name in ("activation_fn_str", "activation_fn") if name in cfg]
    for name in names:
        if name == "topk" and cfg.get("architecture") in ("standard", "topk"):
            cfg["architecture"] = "topk"
        elif name not in (None, "relu") or cfg.get("architecture") == "topk":
            raise ValueError(
                f"{folder} has activation function {name!r} and architecture {cfg.get('architecture')!r}; load it with "
                f"SAELens {SAE_LENS_FORMAT} or later, and wrap that"
            )
    if cfg.get("architecture") == "topk":
        told = [k for k in (cfg.get("k"), options.get("k")) if k is not None]
        if told[1:] and told[0] != told[1]:
            raise ValueError(f"{folder} has k {told[0]!r}, but in activation_fn_kwargs {told[1]!r}; keep the right one")
        cfg["k"] = next(iter(told), None)
    return cfg


def _check_sizes(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """`ValueError` unless sizes and tensors are those that the architecture has."""
    d_in, d_sae = cfg.get("d_in"), cfg.get("d_sae")
    sizes = {name: cfg.get(name) for name in ("d_in", "d_sae", *(("k",) if cfg["architecture"] == "topk" else ()))}
    for name, size in sizes.items():
        if type(size) is not int or size < 1 or (name == "k" and size > int(sizes["d_sae"] or 0)):
            raise ValueError(f"{name} of {folder} is {size!r}; it must be a whole number of at least 1, and k <= d_sae")
    if cfg["architecture"] != "topk" and (cfg.get("k") is not None or cfg["rescale_acts_by_decoder_norm"]):
        raise ValueError(f"{folder} has k or rescale_acts_by_decoder_norm, which {cfg['architecture']} does not use")
    wanted = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    wanted |= dict.fromkeys(_SAE_LENS_TENSORS[cfg["architecture"]], (d_sae,))
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise ValueError(f"{folder} has the tensors {found}; its settings ask for {wanted}")
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{', '.join(broken)} of {folder} is not finite")


@pinned
def from_openai(state: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder in the state dict of the paper's own code (openai/sparse_autoencoder).

    Its files are pickles, which are not read here: torch.load(file, weights_only=True) gives the dict. TopK normalises
    its input as ours does, ReLU reads it raw. `ValueError` for another activation function, or what is not known.
    """
    state = dict(state)
    activation, options = state.pop("activation", "ReLU"), dict(state.pop("activation_state_dict", {}))
    if activation not in ("TopK", "ReLU") or options.pop("postact_fn", "ReLU") != "ReLU":
        raise ValueError(f"activation is {activation!r}, with {options}; known are TopK with ReLU after it, and ReLU")
    for name in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"):  # of training
        state.pop(name, None)
    tied = state.pop("decoder.linear.weight", None)
    if "decoder.weight" not in state and "encoder.weight" in state:
        state["decoder.weight"] = state["encoder.weight"].T
    names = {"encoder.weight", "latent_bias", "decoder.weight", "pre_bias"}
    if state.keys() != names or (tied is not None and not torch.equal(tied, state["encoder.weight"])):
        raise ValueError(f"the state dict has {', '.join(sorted(state))}; known are {', '.join(sorted(names))}")
    n_latents, d_model = state["encoder.weight"].shape
    given = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    decoder = given["decoder.weight"].T.contiguous()
    weights = Weights(given["encoder.weight"], given["latent_bias"], decoder, given["pre_bias"])
    if decoder.shape != (n_latents, d_model) or not all(bool(tensor.isfinite().all()) for tensor in weights):
        raise ValueError("the state dict's tensors do not fit together, or are not finite")
    k = options.pop("k", None)
    if options or (activation == "TopK") != (k is not None):
        raise ValueError(f"the state of {activation} has k = {k!r} and {', '.join(options) or 'nothing else'}")
    if k is not None:
        return Autoencoder(AutoencoderConfig(d_model, n_latents, int(k)), weights)
    tensors = {"W_enc": weights.encoder.T, "b_enc": weights.latent_bias, "W_dec": decoder, "b_dec": weights.pre_bias}
    return wrap(_FromSaeLens(tensors, {"architecture": "standard", "apply_b_dec_to_input": True}), d_model)


class _FromSaeLens(nn.Module):
    """z = ReLU(pre) where pre = (x - offset) W_enc + b_enc is above the threshold, or among the k largest."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor
    offset: Tensor

    def __init__(self, tensors: dict[str, Tensor], cfg: dict[str, Any]) -> None:
        super().__init__()
        encoder, decoder = tensors["W_enc"], tensors["W_dec"]
        bias, threshold = tensors["b_mag" if "b_mag" in tensors else "b_enc"], tensors.get("threshold", torch.zeros(1))
        if cfg["architecture"] == "gated":  # the gate opens where the magnitude is above this
            scale = tensors["r_mag"].exp()
            encoder, threshold = encoder * scale, bias - scale * tensors["b_gate"]
        if cfg.get("rescale_acts_by_decoder_norm"):
            norms = decoder.norm(dim=1)
            encoder, bias, decoder = encoder * norms, bias * norms, decoder / norms[:, None]
        parts = {"W_enc": encoder, "b_enc": bias, "W_dec": decoder, "b_dec": tensors["b_dec"]}
        for name, tensor in parts.items():
            self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        self.register_buffer("threshold", threshold)
        self.register_buffer("offset", tensors["b_dec"] * cfg["apply_b_dec_to_input"])
        self.k = cfg.get("k")

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch n_latents"]:
        pre = (x - self.offset) @ self.W_enc + self.b_enc
        z = torch.where(pre > self.threshold, pre.relu(), 0)
        if self.k is None:
            return z
        top = z.topk(self.k)
        return torch.zeros_like(z).scatter(1, top.indices, top.values)

    def decode(self, z: Float[Tensor, "batch n_latents"]) -> Float[Tensor, "batch d_model"]:
        return z @ self.W_dec + self.b_dec


def _asked_of_kernels(autoencoder: Autoencoder) -> tuple[str, Weights, int | Tensor | None]:
    """Architecture, weights, and k or thresholds, as the activation function asks the kernels for its latents."""
    asked: list[tuple[str, Weights, int | Tensor | None]] = []
    settings = autoencoder.config

    def noting(architecture: str) -> Callable[..., SparseLatents]:
        def encode(x: Tensor, weights: Weights, choice: int | Tensor | None = None) -> SparseLatents:
            asked.append((architecture, weights, choice))
            return SparseLatents(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), settings.n_latents)

        return encode

    kernel = ModuleType("noting")
    for name, architecture in (("topk", "topk"), ("relu", "standard"), ("threshold", "jumprelu")):
        setattr(kernel, f"{name}_encode", noting(architecture))
    nothing = torch.zeros(0, settings.d_model, device=autoencoder.weights.pre_bias.device)
    variants.encode(settings.activation, nothing, autoencoder.weights, autoencoder.extras, settings.k, kernel)
    (found,) = asked
    return found


def _sparse(module: nn.Module, x: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the active latents, each row sorted by value."""
    with torch.no_grad():
        found = module.encode(x.to(**_place(module)))  # type: ignore[operator]
    values, indices = (found.top_acts, found.top_indices.long()) if hasattr(found, "top_acts") else (found, None)
    values = values.float()
    if bool((values < 0).any()):
        raise ValueError(f"encode of {_name(module)} gives negative activations; ours are >= 0")
    top = values.topk(max(1, int((values > 0).sum(1).max())), dim=1)
    return top.indices if indices is None else indices.gather(1, top.indices), top.values


def _encoder(module: nn.Module, decoder: Tensor, pre_bias: Tensor) -> tuple[Tensor, Tensor]:
    """(encoder, latent_bias): encoder (x − pre_bias) + latent_bias is what the module gives where it is active.

    Tried are the parameters that SAELens, dictionary_learning and sparsify have, on random inputs; NaN when none fits.
    """
    n_latents, d_model = decoder.shape
    named = _parameters(module)
    matrices = [*(named[n].T for n in ("W_enc",) if n in named), *(named[n] for n in ("encoder.weight",) if n in named)]
    zeros = decoder.new_zeros(n_latents)
    biases = [zeros, *(named[n] for n in ("b_enc", "encoder.bias", "latent_bias") if n in named)]
    offsets = [decoder.new_zeros(d_model), pre_bias]
    x = _probe(pre_bias).to(_place(module)["dtype"]).float()
    if getattr(module, "normalizes", False):
        x = model.normalize(x)[0]
    indices, values = _sparse(module, x, n_latents)
    scale = values.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) + values
    best, fitting = _tolerance(module), None
    for matrix, bias, offset in itertools.product(matrices, biases, offsets):
        if (matrix.shape, bias.shape) != (decoder.shape, zeros.shape) or not bool((values > 0).any()):
            continue
        pre_acts = ((x - offset) @ matrix.T + bias).gather(1, indices.to(x.device)).where(values > 0, 0)
        error = float(((pre_acts - values).abs() / scale).max())
        if error <= best and (fitting is None or error < best):
            best, fitting = error, (matrix.contiguous(), bias + matrix @ (pre_bias - offset))
    return fitting or (torch.full_like(decoder, torch.nan), torch.full_like(zeros, torch.nan))


def _given(module: nn.Module) -> nn.Module:
    """The module that was given."""
    return module.module if isinstance(module, _Paired) else module


def _name(module: nn.Module) -> str:
    return type(_given(module)).__name__


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """By the names that they have in the module that was given."""
    return {name: p.detach().float() for name, p in _given(module).named_parameters()}


def _tolerance(module: nn.Module) -> float:
    """Relative: what the arithmetic of the module's dtype may be off by."""
    return max(_TOLERANCE, 4 * torch.finfo(_place(module)["dtype"]).eps)


def _affine_decoder(module: nn.Module, n_latents: int, by_index: bool) -> tuple[Tensor, Tensor]:
    """(decoder [n_latents, d_model], what all zeros decode to), with `decode` of one latent at a time.

    `ValueError` unless `decode` of several latents is then their sum.
    """
    place = _place(module)

    def decode(indices: Tensor, values: Tensor) -> Tensor:
        if by_index:
            return module.decode(values, indices).float()  # type: ignore[operator]
        dense = torch.zeros(len(indices), n_latents, **place).scatter_(1, indices, values)
        return module.decode(dense).float()  # type: ignore[operator]

    every = torch.arange(n_latents, device=place["device"])[:, None]
    pre_bias = decode(every[:1], torch.zeros(1, 1, **place))[0]
    decoder = torch.cat([decode(part, torch.ones(len(part), 1, **place)) for part in every.split(_ROWS_AT_ONCE)])
    decoder = (decoder - pre_bias).contiguous()
    if place["dtype"] != torch.float32:
        decoder, pre_bias = _exact_decoder(module, decoder, pre_bias)
    limit = _tolerance(module)
    n_several = min(8, n_latents)
    some = every[:: max(1, n_latents // n_several)][:n_several].T.contiguous()
    values = torch.arange(1, some.shape[1] + 1, **place)[None] / some.shape[1]  # small: float16 ends at 65,504
    expected = torch_sparse.decode(
        SparseLatents(some, values.float(), n_latents), Weights(decoder, decoder[:, 0], decoder, pre_bias)
    )
    if not torch.allclose(decode(some, values), expected, rtol=limit, atol=limit * float(expected.abs().max())):
        raise ValueError(
            f"decode of {_name(module)} is not a weighted sum of directions and a bias; turn off "
            "what it does besides, such as a normalisation that it takes back, and give it as normalize"
        )
    return decoder, pre_bias


def _exact_decoder(module: nn.Module, decoder: Tensor, pre_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The parameters that decoder and pre_bias were read off, where there are such: reading them rounded."""
    named, limit = _parameters(module), _tolerance(module)
    matrices = [named[name].T if name == "decoder.weight" else named[name] for name in _DECODERS if name in named]
    biases = [named[name] for name in _PRE_BIASES if name in named]
    scale = float(decoder.abs().max() + pre_bias.abs().max())
    for which, read in ((matrices, decoder), (biases, pre_bias)):
        which[:] = [p for p in which if p.shape == read.shape and float((p - read).abs().max()) <= limit * scale]
    return next(iter(matrices), decoder).contiguous(), next(iter(biases), pre_bias)


_DECODERS, _PRE_BIASES = ("W_dec", "decoder.weight"), ("b_dec", "pre_bias", "bias", "decoder.bias")


def _place(module: nn.Module) -> dict[str, Any]:
    """Device and dtype of the module's parameters."""
    parameter = next(module.parameters(), torch.empty(0))
    return {"device": parameter.device, "dtype": parameter.dtype}
