"""The language model under study: load it, read activations at a site, run it on with a site replaced.

    subject = Subject.load("smollm2-135m-instruct-q4_1")
    site = subject.site(layer=22)
    acts = subject.capture(tokens, site)                          # [batch, ctx, width]; later layers never run
    logits = subject.run_with(tokens, site, autoencoder_forward)  # [batch, ctx, vocab_size]

The models are those of `transformers`, unchanged; a site is a hook on one of their modules (`families` says which).

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
    attn_z is what the attention heads give, side by side: the input of attention's output projection.
Any other site is a module's dotted name, which stands for its output (the first tensor of several), or that name and
`:input` for what goes in: model.layers.1.self_attn.o_proj:input is attn_z of a Llama's layer 1.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from monosem import artifacts, loading, resources, vocabulary
from monosem.families import FAMILIES, INTO_STREAM, Point, Side
from monosem.torch_state import pinned, pinned_methods
from monosem.types import LOCATIONS, Site, resolve_device

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""

_N_FEW = 3
_PAST_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

logger = logging.getLogger("monosem")

Replace = Callable[[Float[Tensor, "batch ctx width"]], Float[Tensor, "batch ctx width"]]
Choose = Callable[[Float[Tensor, "batch vocab"]], Int[Tensor, " batch"]]


class Layout(NamedTuple):
    """For tokens that are no texts one after the other: where each stands, and which others it sees."""

    positions: Int[Tensor, "batch ctx"]
    sees: Bool[Tensor, "batch ctx ctx"]


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
        name, folder = loading.locate(model, revision)
        if (path := Path(model.removeprefix("file:")).expanduser()).exists() and model not in resources.names("model"):
            model = str(path.resolve())  # so that a site names its model from any working folder
        module, config = loading.load_module(name, folder, dtype)
        return cls(module.to(where), config, loading.load_tokenizer(name, folder), name, folder, model, revision)

    def __init__(
        self, module: nn.Module, config: Any, tokenizer: Any, name: str, folder: Path, model: str, revision: str | None
    ) -> None:
        text_config = config.get_text_config()
        self.model, self.revision, self.name = model, revision, name
        self.tokenizer, self.tokenizer_hash = tokenizer, loading.tokenizer_hash(tokenizer)
        self.module = module
        embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
        self.n_layers = getattr(text_config, "num_hidden_layers", 0)
        self.d_model = getattr(text_config, "hidden_size", embeddings.embedding_dim)
        self.vocab_size = embeddings.num_embeddings
        self.max_context = loading.max_context(module, text_config)
        self.prefix_token = loading.prefix_token(tokenizer, text_config, self.vocab_size)
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._folder = folder
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        self._model_type = config.model_type
        self._family = FAMILIES.get(config.model_type)
        self._parallel_residual = bool(getattr(text_config, "use_parallel_residual", False))
        self.has_logits = bool(module.can_generate())  # type: ignore[operator]
        self._forward_takes = inspect.signature(module.forward).parameters
        self._seen_once: set[tuple[str, Side]] = set()

    @cached_property
    def hash(self) -> str:
        """sha256 that identifies the weights: over the names and SHA-256s of the safetensors files.

        `ValueError` when a converted model in the cache is not as the conversion left it.
        """
        found, record = loading.weights_hash(self._folder), self._folder / loading.RECORD
        if not record.exists():
            return found
        try:
            made = artifacts.read_manifest(record, "subject")
        except ValueError as error:
            logger.warning("%s; its weights are taken as they are", error)
            return found
        if made["hash"] != found:
            raise ValueError(f"{self._folder} was changed after it was converted; delete it, and it is made again")
        return found

    @cached_property
    def config_hash(self) -> str:
        """sha256 of the model's config.json, without what says only who wrote it."""
        return loading.config_hash(self._folder)

    def site(self, layer: int | None = None, location: str = "resid_post_mlp", revision: str | None = None) -> Site:
        """The site at a 0-based layer, default ceil(0.75 L) - 1: three quarters in (Gao et al. 2024, section 1).

        For a module's dotted name, `layer` is the number in the name (-1 without one). `ValueError` when the layer or
        the location does not exist in this model.
        """
        if revision not in (None, self.revision):
            raise ValueError(f"revision is {revision!r} but {self.name} was loaded at {self.revision!r}; load that one")
        if location not in LOCATIONS:
            default = next((int(part) for part in re.split("[.:]", location) if part.isdigit()), -1)
        else:
            default = math.ceil(0.75 * self.n_layers) - 1
        site = Site(self.model, self.revision, default if layer is None else layer, location)
        self._module_at(site)
        if location not in LOCATIONS and site.layer != default:
            raise ValueError(f"layer is {layer} but the module {location!r} is in layer {default}; leave layer unset")
        return site

    @pinned_methods
    def site_width(self, site: Site) -> int:
        """Length of the vectors at `site`. `ValueError` where it gives none, or is passed several times."""
        return self.capture(self._few_tokens(), site).shape[-1]

    def capture(
        self, tokens: Int[Tensor, "batch ctx"], site: Site, *, compiled: bool = False, layout: Layout | None = None
    ) -> Float[Tensor, "batch ctx width"]:
        """The activations at `site`, in the subject's dtype and on its device. Nothing after the site is computed.

        `compiled` runs `blocks_before(site)` through torch.compile: faster, with other rounding, and after a delay of
        seconds to half a minute at the first call for a shape. `RuntimeError` or `OSError` where they do not compile.
        """
        return self.capture_all(tokens, [site], compiled=compiled, layout=layout)[0]

    @pinned_methods
    def capture_all(
        self,
        tokens: Int[Tensor, "batch ctx"],
        sites: Sequence[Site],
        *,
        compiled: bool = False,
        layout: Layout | None = None,
    ) -> list[Float[Tensor, "batch ctx width"]]:
        """As `capture` at each of the sites, in one forward pass that ends at the last one reached.

        `compiled` leaves blocks plain that have a site inside. With a `layout`, tokens are no texts but what it says.
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

        modules = [self.passed_once(site) for site in sites]
        blocks = self._whole_blocks(sites, [module for module, _ in modules]) if compiled else []
        with contextlib.ExitStack() as hooks:
            for i, (module, side) in enumerate(modules):
                hooks.enter_context(_hook(module, side, keep(i)))
            hooks.enter_context(self._compile(blocks))
            with contextlib.suppress(_SitesReachedError):
                self._forward(tokens, layout=layout)
        return [found[i].clone() for i in range(len(sites))]  # outside inference mode: autograd accepts them

    def _whole_blocks(self, sites: Sequence[Site], modules: list[nn.Module]) -> list[nn.Module]:
        """The blocks before the last of the sites, but those with a site inside."""
        before = max((self.blocks_before(site) for site in sites), key=len)
        return [block for block in before if not any(m is not block and m in block.modules() for m in modules)]

    def blocks_before(self, site: Site) -> list[nn.Module]:
        """The blocks that are over when `site` is reached; none where it is not known that the site lies in a block."""
        self._module_at(site)
        if self._family is None:
            return []
        blocks, whole = self._family.blocks, site.location == "resid_post_mlp"
        if site.location not in LOCATIONS:
            whole = site.location == f"{blocks}.{site.layer}"
            if not whole and not site.location.startswith((f"{blocks}.{site.layer}.", f"{blocks}.{site.layer}:")):
                return []
        return list(self.module.get_submodule(blocks).children())[: site.layer + whole]

    @pinned_methods
    def run_with(
        self, tokens: Int[Tensor, "batch ctx"], site: Site, replace: Replace, past: Any = None
    ) -> Float[Tensor, "batch ctx vocab"]:
        """The logits when the tensor at `site` is replaced by `replace(tensor)`, for all that reads it.

        `replace` gets the model's dtype and may return another, of the same shape. The identity changes no bit.
        With `past`, what `read` kept of earlier tokens, `tokens` go on from there; `past` itself stays as it is.
        """
        self._require_logits()
        target, side = self.passed_once(site)
        if isinstance(past, Tensor):  # the tokens themselves: they run again
            n_past = past.shape[1]
            late = lambda x: torch.cat([x[:, :n_past], replace(x[:, n_past:]).to(x)], dim=1)  # noqa: E731
            return self.run_with(torch.cat([past, tokens.to(past)], dim=1), site, late)[:, n_past:]

        def swap(tensor: Tensor) -> Tensor:
            new = replace(_checked_activations(tensor, tokens, site))
            if new.shape != tensor.shape:
                raise ValueError(f"the replacement at {site} has shape {list(new.shape)}, not {list(tensor.shape)}")
            return new.to(device=tensor.device, dtype=tensor.dtype)

        with _hook(target, side, swap):
            return self._forward(tokens, past).logits

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
        self._require_logits()
        target, side = self.passed_once(site)
        if tokens.shape[1] + n_tokens > self.max_context:
            raise ValueError(f"{tokens.shape[1]} + {n_tokens} tokens; {self.name} reads at most {self.max_context}")
        ids, past, found, kept = tokens.to(self.device, torch.long), None, [], self._keeps_past
        done = torch.empty(len(ids), 0, 0)

        def go_on(x: Tensor) -> Tensor:
            nonlocal done
            if kept:
                return replace(x).to(x)
            new = replace(x[:, done.shape[1] :]).to(x)  # what was replaced before stays as it was
            done = torch.cat([done, new], dim=1) if done.shape[1] else new
            return done

        with _hook(target, side, go_on):
            for _ in range(n_tokens):
                out = self.module(ids, past_key_values=past, use_cache=True) if kept else self._forward(ids)
                new = choose(out.logits[:, -1].float())[:, None]
                ids, past = (new, out.past_key_values) if kept else (torch.cat([ids, new], dim=1), None)
                found.append(new)
        return torch.cat(found, dim=1)

    @pinned_methods
    @torch.no_grad()
    def unembedding(self, site: Site) -> tuple[Float[Tensor, "vocab width"], Float[Tensor, " width"]]:
        """The unembedding's rows, and what a direction at `site` is multiplied by before them, to first order.

        That is the gain of the norm before the unembedding, times what the logits are multiplied by after it; a soft
        cap counts as none. `ValueError` says why no direction at `site` can be read so: it is not written to the
        residual stream as far as is known, or there is no norm between stream and unembedding.
        """
        self._require_logits()
        if not self._writes_to_stream(site):
            raise ValueError(f"{site.location} is not known to be written to the residual stream of {self.name}")
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(getattr(head, "weight", None), Tensor):
            raise ValueError(f"{self.name} has no unembedding of its own")
        norm, scale = self._before(head)
        return head.weight.detach(), scale * _gain(norm, head.weight.shape[1], self.device, self.dtype)

    def _before(self, head: nn.Module) -> tuple[nn.Module, float]:
        """The module whose output the unembedding reads, and logits over what the unembedding gives."""
        outputs: list[tuple[str, nn.Module, Tensor]] = []  # kept, so that no memory is used twice
        read: list[tuple[Tensor, Tensor]] = []

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                if module is head:
                    read.append((arguments[0], output))
                elif isinstance(output, Tensor):
                    outputs.append((name, module, output))

            return hook

        with contextlib.ExitStack() as hooks:
            for name, module in self.module.named_modules():
                hooks.callback(module.register_forward_hook(keep(name)).remove)
            logits = self._forward(self._few_tokens()).logits
        where = read[0][0].data_ptr() if len(read) == 1 else None
        found = [(name, module) for name, module, output in outputs if output.data_ptr() == where]
        if not found or any(part.isdigit() for part in found[0][0].split(".")):
            raise ValueError(f"what {self.name} does between its last block and the unembedding is not known")
        raw = read[0][1].float()
        scale = float((logits.float() * raw).sum() / raw.square().sum().clamp_min(1e-30))
        exact = torch.allclose(logits.float(), scale * raw, rtol=1e-2, atol=1e-3 * float(raw.abs().max()) * abs(scale))
        return found[0][1], scale if exact else 1.0

    def _writes_to_stream(self, site: Site) -> bool:
        """Whether what is at `site` is a residual stream or is added to one: known locations, and whole blocks."""
        if site.location in LOCATIONS:
            return site.location in INTO_STREAM
        listed = [name for name, m in self.module.named_modules() if isinstance(m, nn.ModuleList)]
        blocks = {name for name in listed if len(self.module.get_submodule(name)) == self.n_layers}  # type: ignore[arg-type]
        return site.location.removesuffix(":input").rpartition(".")[0] in blocks

    def vocabulary(self) -> list[str]:
        """Each token as text, by id, as its tokenizer's decoder has it (`monosem.vocabulary`)."""
        return vocabulary.pieces(self.tokenizer, self.vocab_size)

    @pinned_methods
    @torch.inference_mode()
    def read(self, tokens: Int[Tensor, "batch ctx"]) -> Any:
        """The keys and values of `tokens` in every layer: the `past` of `run_with`.

        The tokens themselves where what the model keeps does not do: that of many recurrent ones.
        """
        self._require_logits()
        return self._read(tokens) if self._keeps_past else tokens

    def _read(self, tokens: Int[Tensor, "batch ctx"]) -> Any:
        return self.module.base_model(tokens.to(self.device, torch.long), use_cache=True).past_key_values  # type: ignore[operator]

    @cached_property
    def _keeps_past(self) -> bool:
        """Whether going on from what is kept of earlier tokens gives the logits of one forward pass: tried once."""
        tokens = torch.linspace(0, self.vocab_size - 1, 2 * _N_FEW).long()[None]
        try:
            past = self._read(tokens[:, :_N_FEW])
            later = self._forward(tokens[:, _N_FEW:], past).logits.float() if past is not None else None
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            later = None
        whole = self._forward(tokens).logits[:, _N_FEW:].float()
        kept = later is not None and bool((later - whole).norm() <= _PAST_TOLERANCE[self.dtype] * whole.norm())
        if not kept:
            logger.info("%s cannot go on from what it keeps of earlier tokens; they are run again", self.name)
        return kept

    def _few_tokens(self) -> Int[Tensor, "2 n"]:
        """Two short contexts, to see what the model does."""
        return torch.full((2, min(_N_FEW, self.max_context)), self.prefix_token)

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, past: Any = None, layout: Layout | None = None) -> Any:
        """Every context is full, so no attention mask is needed; nothing is kept for later, so no KV cache either."""
        if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}, dtype {tokens.dtype}; give integers [batch, ctx]"
            )
        longest = tokens.shape[1] if layout is None else int(layout.positions.max()) + 1
        if longest > self.max_context:
            raise ValueError(f"contexts of {longest} tokens; {self.name} reads at most {self.max_context}")
        ids = tokens.to(torch.long)
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"tokens run from {low} to {high}; {self.name} knows 0 to {self.vocab_size - 1}")
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._forward_takes else {}
        if past is not None:
            options = {"use_cache": True, "past_key_values": copy.deepcopy(past)}
        if layout is not None:
            unseen = torch.zeros(layout.sees.shape, dtype=self.dtype, device=self.device)
            unseen.masked_fill_(~layout.sees.to(self.device), torch.finfo(self.dtype).min)
            options |= {"position_ids": layout.positions.to(self.device), "attention_mask": unseen[:, None]}
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

    def passed_once(self, site: Site) -> tuple[nn.Module, Side]:
        """As `_module_at`, of a module that a forward pass calls once. `ValueError` for any other.

        Those of known locations are; a module given by its name is watched in a forward pass the first time.
        """
        module, side = self._module_at(site)
        if site.location in LOCATIONS or (site.location, side) in self._seen_once:
            return module, side
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        handle = module.register_forward_pre_hook(count)
        try:
            self._forward(self._few_tokens())
        finally:
            handle.remove()
        if calls == 0:
            raise ValueError(f"{site.location} of {self.name} takes no part in its forward pass; choose another site")
        if calls > 1:
            raise ValueError(
                f"{site.location} of {self.name} is called {calls} times in a forward pass, so it is no one place; "
                "choose a module that is called once"
            )
        self._seen_once.add((site.location, side))
        return module, side

    def _module_at(self, site: Site) -> tuple[nn.Module, Side]:
        """The module to hook for `site`, and on which side."""
        if site.location not in LOCATIONS:
            name, _, side = site.location.partition(":")
            if not name or side not in ("", "input") or site.location.endswith(":"):
                raise ValueError(
                    f"location is {site.location!r}; choose one of {', '.join(LOCATIONS)}, the dotted name of a module "
                    "for its output, or that name and :input"
                )
            try:
                return self.module.get_submodule(name), "input" if side else "output"
            except AttributeError:
                raise ValueError(
                    f"location is {site.location!r}, which {self.name} does not have; "
                    f"choose one of {', '.join(LOCATIONS)}, or the dotted name of a module (or NAME:input)"
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
    """While open, the tensor at that side of `module` becomes `see(tensor)`: for the module, and for later readers."""

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensor = _entering(arguments, keywords)
        new = see(tensor)
        if new is not tensor:
            # In place: the tensor that enters the norm before an MLP *is* the residual stream that the block adds to
            # later, so both must see the new values.
            tensor.copy_(new)

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple | list) and output:
            return type(output)((see(output[0]), *output[1:]))
        return see(output)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _entering(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The activations among a module's arguments: the first floating tensor, hidden_states before other keywords."""
    named = sorted(keywords, key=lambda name: name != "hidden_states")
    found = [*arguments, *(keywords[name] for name in named)]
    vectors = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
    return next(iter([*vectors, *found]), None)


def _gain(norm: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " width"]:
    """What a norm multiplies each channel by, beside a token's own scale. `ValueError` where it is no such norm."""
    probe = torch.ones(width, device=device)
    probe[1::2] = -1
    probe[-1] -= probe.sum()  # of mean 0: a LayerNorm takes nothing off
    probe /= probe.square().mean().sqrt()
    other = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        plus, minus, found = (norm(x[None].to(dtype))[0].float() for x in (probe, -probe, other))
        gain, bias = (plus - minus) / (2 * probe), (plus + minus) / 2
        expected = [(other - other.mean()) / other.std(correction=0), other / other.square().mean().sqrt()]
        norms = [(gain * x + bias - found).norm() <= 0.02 * found.norm() for x in expected]
    except (RuntimeError, TypeError, ValueError):
        norms = []
    if not any(norms):
        raise ValueError(f"{type(norm).__name__}, which the unembedding reads, is no norm with a gain")
    return gain


def _checked_activations(value: Any, tokens: Tensor, site: Site) -> Tensor:
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[:2] == tokens.shape:
        return value
    found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{site.location} gives {found}, not a vector per token [batch, ctx, width]; choose another module"
    )
