"""The language model under study: load it, read activations at a site, run it on with a site replaced.

    subject = Subject.load("smollm2-135m-instruct-q4_1")
    site = subject.site(layer=22)
    acts = subject.capture(tokens, site)                          # [batch, ctx, width]; later layers never run
    logits = subject.run_with(tokens, site, autoencoder_forward)  # [batch, ctx, vocab_size]

The models are those of `transformers`, unchanged; a site is a hook on one of their modules (`FAMILIES` says which).

What the locations mean, with r the residual stream entering a block:
    pre-norm models (GPT-2, Llama-like, Gemma, sequential GPT-NeoX), where a delta is all that a sublayer adds to r
    (in Gemma after the norm that follows the sublayer):
        resid_post_attn = r + resid_delta_attn
        resid_post_mlp  = resid_post_attn + resid_delta_mlp
    post-norm encoders (BERT, RoBERTa), whose residual stream is the output of each LayerNorm:
        resid_post_attn = LayerNorm(r + resid_delta_attn)
        resid_post_mlp  = LayerNorm(resid_post_attn + resid_delta_mlp)
    GPT-NeoX with its parallel residual: resid_post_mlp = r + resid_delta_attn + resid_delta_mlp; both sublayers read r
    and are added at once, so there is no resid_post_attn.
    mlp_post_act is the hidden layer of the MLP, the input of its output projection.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import io
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from monosem import artifacts, resources
from monosem.torch_state import pinned, pinned_methods
from monosem.types import LOCATIONS, Site, resolve_device

CONVERSION_FORMAT = 1
"""Raise when the conversion of GGUF files changes, so that folders converted before are not read any more."""

_RECORD = "monosem.json"
"""Beside a converted model: what it was made from, and its hash."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""

logger = logging.getLogger("monosem")

Side = Literal["input", "output"]
Replace = Callable[[Float[Tensor, "batch ctx width"]], Float[Tensor, "batch ctx width"]]
Choose = Callable[[Float[Tensor, "batch vocab"]], Int[Tensor, " batch"]]


class Point(NamedTuple):
    """A tensor in a model: what goes into or comes out of the module at `path`."""

    path: str
    side: Side


class Family(NamedTuple):
    """Where an architecture keeps its blocks, and its locations inside a block (paths relative to the block)."""

    blocks: str
    resid_post_attn: Point
    resid_delta_attn: Point
    resid_delta_mlp: Point
    mlp_post_act: Point
    final_norm: str | None = None
    """The norm between the last block and the unembedding; None where there is neither."""
    encoder: bool = False
    """Loaded without a language-modelling head: it gives no logits."""
    resid_post_mlp: Point = Point("", "output")


_GPT2 = Family(
    blocks="transformer.h",
    resid_post_attn=Point("ln_2", "input"),
    resid_delta_attn=Point("attn", "output"),
    resid_delta_mlp=Point("mlp", "output"),
    mlp_post_act=Point("mlp.c_proj", "input"),
    final_norm="transformer.ln_f",
)
_LLAMA = Family(
    blocks="model.layers",
    resid_post_attn=Point("post_attention_layernorm", "input"),
    resid_delta_attn=Point("self_attn", "output"),
    resid_delta_mlp=Point("mlp", "output"),
    mlp_post_act=Point("mlp.down_proj", "input"),
    final_norm="model.norm",
)
_GEMMA = Family(
    blocks="model.layers",
    resid_post_attn=Point("pre_feedforward_layernorm", "input"),
    resid_delta_attn=Point("post_attention_layernorm", "output"),
    resid_delta_mlp=Point("post_feedforward_layernorm", "output"),
    mlp_post_act=Point("mlp.down_proj", "input"),
    final_norm="model.norm",
)
_GPT_NEOX = Family(
    blocks="gpt_neox.layers",
    resid_post_attn=Point("post_attention_layernorm", "input"),
    resid_delta_attn=Point("attention", "output"),
    resid_delta_mlp=Point("mlp", "output"),
    mlp_post_act=Point("mlp.dense_4h_to_h", "input"),
    final_norm="gpt_neox.final_layer_norm",
)
_BERT = Family(
    blocks="encoder.layer",
    resid_post_attn=Point("attention.output", "output"),
    resid_delta_attn=Point("attention.output.dense", "output"),
    resid_delta_mlp=Point("output.dense", "output"),
    mlp_post_act=Point("output.dense", "input"),
    encoder=True,
)

FAMILIES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA._replace(blocks="model.language_model.layers", final_norm="model.language_model.norm"),
    "gpt_neox": _GPT_NEOX,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}
"""By `config.model_type`. Models of other types are studied at modules given by their dotted names."""


class Subject:
    """A language model (or encoder) on a device, ready to be read. Make one with `Subject.load`."""

    model: str
    """What `load` was given; with `revision`, enough to load it again."""
    revision: str | None
    name: str
    """The full name to show to people."""
    n_layers: int
    d_model: int
    vocab_size: int
    max_context: int
    """Longest context it can read."""
    tokenizer: Any
    tokenizer_hash: str
    """sha256 of the tokenizer's definition."""
    device: torch.device
    dtype: torch.dtype
    has_logits: bool
    prefix_token: int
    """The one token put before texts: BOS, or for want of it CLS, EOS, PAD or token 0."""

    @classmethod
    @pinned
    def load(cls, model: str, *, revision: str | None = None, dtype: str = "bfloat16", device: str = "auto") -> Subject:
        """The subject named by `model`: a named resource, a local folder, a .gguf file, or a hub id.

        `dtype` is bfloat16 or float32. A GGUF is de-quantised once into a safetensors folder in the cache. Weights are
        only ever read from safetensors and no code that comes with a model is run. `ValueError` when it cannot be
        found or read, with what to do.
        """
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {dtype!r}; choose bfloat16 or float32")
        where = resolve_device(device)
        if where.type == "cpu":
            _keep_freed_memory()
        name, folder = _locate(model, revision)
        if (path := Path(model.removeprefix("file:")).expanduser()).exists() and model not in resources.names("model"):
            model = str(path.resolve())  # so that a site names its model from any working folder
        module, config = _load_module(name, folder, dtype)
        return cls(module.to(where), config, _load_tokenizer(name, folder), name, folder, model, revision)

    def __init__(
        self, module: nn.Module, config: Any, tokenizer: Any, name: str, folder: Path, model: str, revision: str | None
    ) -> None:
        text_config = config.get_text_config()
        self.model, self.revision, self.name = model, revision, name
        self.tokenizer, self.tokenizer_hash = tokenizer, _tokenizer_hash(tokenizer)
        self.module = module
        self.n_layers = text_config.num_hidden_layers
        self.d_model = text_config.hidden_size
        self.vocab_size = module.get_input_embeddings().num_embeddings  # type: ignore[operator]
        self.max_context = _max_context(text_config)
        self.prefix_token = _prefix_token(tokenizer, text_config)
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._folder = folder
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        self._model_type = config.model_type
        self._family = FAMILIES.get(config.model_type)
        self._parallel_residual = bool(getattr(text_config, "use_parallel_residual", False))
        self.has_logits = module.get_output_embeddings() is not None  # type: ignore[operator]

    @cached_property
    def hash(self) -> str:
        """sha256 that identifies the weights: over the names and SHA-256s of the safetensors files."""
        record = self._folder / _RECORD
        return artifacts.read_json(record)["hash"] if record.exists() else _weights_hash(self._folder)

    def site(self, layer: int | None = None, location: str = "resid_post_mlp", revision: str | None = None) -> Site:
        """The site at a 0-based layer, default ceil(0.75 L) - 1: three quarters in (Gao et al. 2024, section 1).

        For a module's dotted name, `layer` is the number in the name (-1 without one). `ValueError` when the layer or
        the location does not exist in this model.
        """
        if revision not in (None, self.revision):
            raise ValueError(f"revision is {revision!r} but {self.name} was loaded at {self.revision!r}; load that one")
        if location not in LOCATIONS:
            default = next((int(part) for part in location.split(".") if part.isdigit()), -1)
        else:
            default = math.ceil(0.75 * self.n_layers) - 1
        site = Site(self.model, self.revision, default if layer is None else layer, location)
        self._module_at(site)
        if location not in LOCATIONS and site.layer != default:
            raise ValueError(f"layer is {layer} but the module {location!r} is in layer {default}; leave layer unset")
        return site

    @pinned_methods
    def site_width(self, site: Site) -> int:
        """Length of the vectors at `site`."""
        return self.capture(torch.tensor([[self.prefix_token]]), site).shape[-1]

    def capture(
        self, tokens: Int[Tensor, "batch ctx"], site: Site, *, compiled: bool = False
    ) -> Float[Tensor, "batch ctx width"]:
        """The activations at `site`, in the subject's dtype and on its device. Nothing after the site is computed.

        `compiled` runs `blocks_before(site)` through torch.compile: faster, with other rounding, and after a delay of
        seconds to half a minute at the first call for a shape. `RuntimeError` or `OSError` where they do not compile.
        """
        return self.capture_all(tokens, [site], compiled=compiled)[0]

    @pinned_methods
    def capture_all(
        self, tokens: Int[Tensor, "batch ctx"], sites: Sequence[Site], *, compiled: bool = False
    ) -> list[Float[Tensor, "batch ctx width"]]:
        """As `capture` at each of the sites, in one forward pass that ends at the last one reached.

        `compiled` leaves blocks plain that have a site inside.
        """
        found: dict[int, Tensor] = {}

        def keep(i: int) -> Callable[[Tensor], Tensor]:
            def hook(tensor: Tensor) -> Tensor:
                found[i] = _checked_activations(tensor, tokens, sites[i])
                if len(found) == len(sites):
                    raise _SitesReachedError
                found[i] = found[i].clone()  # what comes later may change the tensor in place
                return tensor

            return hook

        modules = [self._module_at(site) for site in sites]
        blocks = self._whole_blocks(sites, [module for module, _ in modules]) if compiled else []
        with contextlib.ExitStack() as hooks:
            for i, (module, side) in enumerate(modules):
                hooks.enter_context(_hook(module, side, keep(i)))
            hooks.enter_context(self._compile(blocks))
            with contextlib.suppress(_SitesReachedError):
                self._forward(tokens)
        for i, site in enumerate(sites):
            if i not in found:
                raise ValueError(
                    f"{site.location} of {self.name} takes no part in its forward pass; choose another site"
                )
        return [found[i].clone() for i in range(len(sites))]  # outside inference mode: autograd accepts them

    def _whole_blocks(self, sites: Sequence[Site], modules: list[nn.Module]) -> list[nn.Module]:
        """The blocks before the last of the sites, but those with a site inside."""
        before = max((self.blocks_before(site) for site in sites), key=len)
        return [block for block in before if not any(m is not block and m in block.modules() for m in modules)]

    def blocks_before(self, site: Site) -> list[nn.Module]:
        """The blocks that are over when `site` is reached; none for a module given by its dotted name."""
        if site.location not in LOCATIONS:
            return []
        self._module_at(site)
        assert self._family is not None
        point: Point = getattr(self._family, site.location)
        blocks = self.module.get_submodule(self._family.blocks)
        return list(blocks.children())[: site.layer + (point.path == "")]

    @pinned_methods
    def run_with(
        self, tokens: Int[Tensor, "batch ctx"], site: Site, replace: Replace, past: Any = None
    ) -> Float[Tensor, "batch ctx vocab"]:
        """The logits when the tensor at `site` is replaced by `replace(tensor)`, for all that reads it.

        `replace` gets the model's dtype and may return another, of the same shape. The identity changes no bit.
        With `past`, what `read` kept of earlier tokens, `tokens` go on from there; `past` itself stays as it is.
        """
        target, side = self._module_at(site)
        self._require_logits()
        reached = False

        def swap(tensor: Tensor) -> Tensor:
            nonlocal reached
            reached = True
            new = replace(_checked_activations(tensor, tokens, site))
            if new.shape != tensor.shape:
                raise ValueError(f"the replacement at {site} has shape {list(new.shape)}, not {list(tensor.shape)}")
            return new.to(device=tensor.device, dtype=tensor.dtype)

        with _hook(target, side, swap):
            logits = self._forward(tokens, past).logits
        if not reached:
            raise ValueError(f"{site.location} of {self.name} takes no part in its forward pass; choose another site")
        return logits

    @pinned_methods
    def logits(self, tokens: Int[Tensor, "batch ctx"]) -> Float[Tensor, "batch ctx vocab"]:
        """The next-token logits, in the subject's dtype. `ValueError` for an encoder, which has none."""
        self._require_logits()
        return self._forward(tokens).logits

    @pinned_methods
    @torch.inference_mode()
    def continue_with(
        self, tokens: Int[Tensor, "batch ctx"], site: Site, replace: Replace, n_tokens: int, choose: Choose
    ) -> Int[Tensor, "batch n_tokens"]:
        """The next `n_tokens`, one at a time, each taken by `choose` from the logits [batch, vocab] after the last.

        The tensor at `site` is replaced at all tokens, the new ones too; `replace` gets one token at a time of those.
        """
        target, side = self._module_at(site)
        self._require_logits()
        if tokens.shape[1] + n_tokens > self.max_context:
            raise ValueError(f"{tokens.shape[1]} + {n_tokens} tokens; {self.name} reads at most {self.max_context}")
        ids, past, found = tokens.to(self.device, torch.long), None, []
        with _hook(target, side, lambda x: replace(x).to(x)):
            for _ in range(n_tokens):
                out = self.module(ids, past_key_values=past, use_cache=True)
                ids, past = choose(out.logits[:, -1].float())[:, None], out.past_key_values
                found.append(ids)
        return torch.cat(found, dim=1)

    @pinned_methods
    def unembedding(self) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, " d_model"]]:
        """The unembedding's rows, and the gain of the norm before it; `ValueError` where either is not known."""
        self._require_logits()
        if self._family is None or self._family.final_norm is None:
            raise ValueError(f"where {self._model_type!r} models keep their last norm is not known; its gain is needed")
        norm = self.module.get_submodule(self._family.final_norm)
        ones = torch.ones(1, self.d_model, device=self.device, dtype=self.dtype)  # of RMS 1: an RMSNorm gives its gain
        gain = norm.weight if isinstance(norm, nn.LayerNorm) else norm(ones)[0]
        return self.module.get_output_embeddings().weight.detach(), gain.detach()  # type: ignore[operator]

    def vocabulary(self) -> list[str]:
        """Each token as text, by id; a token that is part of a character shows the replacement character."""
        ids = list(range(self.vocab_size))
        pieces = self.tokenizer.convert_ids_to_tokens(ids)
        if any(
            piece and piece.startswith("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}") for piece in pieces
        ):  # byte-level
            return self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        return [(piece or "").replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for piece in pieces]

    @pinned_methods
    @torch.inference_mode()
    def read(self, tokens: Int[Tensor, "batch ctx"]) -> Any:
        """The keys and values of `tokens` in every layer: the `past` of `run_with`."""
        self._require_logits()
        return self.module.base_model(tokens.to(self.device, torch.long), use_cache=True).past_key_values  # type: ignore[operator]

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, past: Any = None) -> Any:
        """Every context is full, so no attention mask is needed; nothing is kept for later, so no KV cache either."""
        if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}, dtype {tokens.dtype}; give integers [batch, ctx]"
            )
        if tokens.shape[1] > self.max_context:
            raise ValueError(f"contexts of {tokens.shape[1]} tokens; {self.name} reads at most {self.max_context}")
        ids = tokens.to(torch.long)
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"tokens run from {low} to {high}; {self.name} knows 0 to {self.vocab_size - 1}")
        options: dict[str, Any] = {"use_cache": False} if self.has_logits else {}
        if past is not None:
            options = {"use_cache": True, "past_key_values": copy.deepcopy(past)}
        return self.module(ids.to(self.device), **options)

    @contextlib.contextmanager
    def _compile(self, blocks: list[nn.Module]) -> Iterator[None]:
        """While open, each of `blocks` runs as a compiled function, which would not notice a hook inside the block."""
        for block in blocks:
            if block not in self._compiled:
                self._compiled[block] = torch.compile(block.forward, fullgraph=True, dynamic=False)
            block.forward = self._compiled[block]
        try:
            yield
        finally:
            for block in blocks:
                del block.forward  # the class's own shows again

    def _require_logits(self) -> None:
        if not self.has_logits:
            raise ValueError(
                f"{self.name} is an encoder and gives no next-token logits; choose a causal language model"
            )

    def _module_at(self, site: Site) -> tuple[nn.Module, Side]:
        """The module to hook for `site`, and on which side."""
        if site.location not in LOCATIONS:
            try:
                return self.module.get_submodule(site.location), "output"
            except AttributeError:
                raise ValueError(
                    f"location is {site.location!r}, which {self.name} does not have; "
                    f"choose one of {', '.join(LOCATIONS)}, or the dotted name of a module"
                ) from None
        if self._family is None:
            raise ValueError(
                f"location is {site.location!r} but where {self._model_type!r} models keep it is not known; give the "
                f"dotted name of a module, or a model of type {', '.join(FAMILIES)}"
            )
        if site.location == "resid_post_attn" and self._parallel_residual:
            raise ValueError(
                f"{self.name} adds attention and MLP to the residual at once (parallel residual), so it has no "
                f"resid_post_attn; choose resid_delta_attn or resid_post_mlp"
            )
        if not 0 <= site.layer < self.n_layers:
            raise ValueError(
                f"layer is {site.layer} but {self.name} has {self.n_layers} layers (0 to {self.n_layers - 1}); "
                f"choose one of them or leave layer unset for three quarters of the depth"
            )
        point: Point = getattr(self._family, site.location)
        block = self.module.get_submodule(f"{self._family.blocks}.{site.layer}")
        return block.get_submodule(point.path), point.side


def _keep_freed_memory() -> None:
    """Have glibc keep what this process frees, up to 1 GiB, for the next allocation; elsewhere do nothing.

    By default it hands the tensors of a layer back to the kernel and takes them again for the next, page by page and
    zeroed: 200,000 page faults in a forward pass of 4,096 tokens, a third of its time (docs/log.md, 2026-11-25).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes: larger tensors are mapped afresh each time
        mallopt(_M_TRIM_THRESHOLD, 2**30)


class _SitesReachedError(Exception):
    """Leaves the forward pass."""


@contextlib.contextmanager
def _hook(module: nn.Module, side: Side, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the tensor at that side of `module` becomes `see(tensor)`."""

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        # In place: the tensor that enters the norm before an MLP *is* the residual stream that the block adds to
        # later, so both must see the new values.
        arguments[0].copy_(see(arguments[0]))

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (see(output[0]), *output[1:])
        return see(output)

    handle = module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _checked_activations(value: Any, tokens: Tensor, site: Site) -> Tensor:
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[:2] == tokens.shape:
        return value
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{site.location} gives {found}, not a vector per token [batch, ctx, width]; choose another module"
    )


def _locate(model: str, revision: str | None) -> tuple[str, Path]:
    """The full name of the model and a folder that holds it as config, tokenizer and safetensors."""
    path = Path(model.removeprefix("file:")).expanduser()
    on_hub = re.fullmatch(r"(hf:)?\w[\w.-]*(/\w[\w.-]*)?", model) is not None and not model.endswith(".gguf")
    named = model in resources.names("model")
    if revision is not None and (named or path.exists() or not on_hub):
        raise ValueError(
            f"revision is {revision!r} but only models from the hub have one; leave it unset for {model!r}"
        )
    if named:
        return resources.describe(model).full_name, _converted(resources.fetch(model))
    if path.is_dir():
        return path.resolve().name, path
    if path.suffix == ".gguf" and path.is_file():
        return f"{path.stem}, de-quantised", _converted(path)
    if on_hub:
        repo_id = model.removeprefix("hf:")
        return repo_id, resources.hub_snapshot(repo_id, revision)
    raise ValueError(
        f"model is {model!r}, which is no folder, .gguf file or hub id; "
        f"give one that exists, or one of {', '.join(resources.names('model'))}"
    )


def _load_module(name: str, folder: Path, dtype: str) -> tuple[nn.Module, Any]:
    """The model in evaluation mode, on the CPU, with its config; `ValueError` when any weight is missing."""
    import transformers

    _weight_files(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _readable(name, folder), _no_progress_bars():
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        if config.is_encoder_decoder:
            raise ValueError("an encoder-decoder, which is not supported")
        family = FAMILIES.get(config.model_type)
        loader: Any = transformers.AutoModelForCausalLM
        if family is not None and family.encoder:
            loader, options = transformers.AutoModel, {**options, "add_pooling_layer": False}
        module, report = loader.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        if report["missing_keys"]:
            raise ValueError(f"its safetensors lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return module.eval(), config


def _load_tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with _readable(f"the tokenizer of {name}", folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _converted(gguf: Path) -> Path:
    """The folder in the cache where the GGUF lies de-quantised, in float32; made on the first call for that file."""
    sha256 = artifacts.sha256_file(gguf)
    folder = resources.cache_folder() / "converted" / f"{sha256[:32]}-{CONVERSION_FORMAT}"
    if not folder.exists():
        with resources.cache_lock(folder.name):
            if not folder.exists():
                logger.info("de-quantising %s into %s", gguf, folder)
                with resources.new_folder(folder) as temporary:
                    _convert_gguf(gguf, temporary)
                    made = artifacts.manifest("subject", {}, {"gguf": sha256}, hash=_weights_hash(temporary))
                    artifacts.write_json(temporary / _RECORD, made)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer in `gguf` as a plain folder: float32 safetensors, nothing that mentions GGUF.

    A model loaded from a GGUF stays marked as quantised and refuses to be saved, so its tensors move to a plain one.
    """
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    own_bar = contextlib.redirect_stderr(io.StringIO())  # its GGUF reader asks nobody before it draws
    with _readable(gguf.name, gguf), _no_progress_bars(), own_bar:
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **unpack, **options
        )
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(packed.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; `ValueError` when it has none (pickled ones do not count)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(artifacts.read_json(index)["weight_map"].values()))]
    file = folder / "model.safetensors"
    if not (folder / "config.json").exists() or not file.exists():
        raise ValueError(
            f"{folder} has no config.json with a model.safetensors; give a folder that has "
            f"(pickled weights such as pytorch_model.bin are never loaded: save the model as safetensors first)"
        )
    return [file]


def _weights_hash(folder: Path) -> str:
    lines = [f"{path.name} {artifacts.sha256_file(path)}\n" for path in _weight_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(definition.encode()).hexdigest()


def _prefix_token(tokenizer: Any, config: Any) -> int:
    choices = (
        tokenizer.bos_token_id,
        getattr(config, "bos_token_id", None),
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
    )
    return next((int(token) for token in (*choices, tokenizer.pad_token_id) if token is not None), 0)


def _max_context(config: Any) -> int:
    if config.model_type in ("roberta", "xlm-roberta"):  # their positions count from the padding token's id + 1
        return config.max_position_embeddings - config.pad_token_id - 1
    return getattr(config, "max_position_embeddings", None) or 2**31 - 1  # some (ALiBi, recurrent) set no limit


@contextlib.contextmanager
def _readable(name: str, path: Path) -> Iterator[None]:
    """Turn what transformers raises about a model that it cannot read into one line that says which and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"cannot load {name} from {path} ({reason}); give a complete model of a type that transformers "
            f"knows without running code of its own, or one of {', '.join(resources.names('model'))}"
        ) from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing on stderr; its setting is put back afterwards."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
