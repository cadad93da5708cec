"""What each stage is told: one frozen dataclass a stage, strict JSON in and out.

Building a config touches nothing (no file, network, device or random state); it only checks that the
values can be meant. Every mistake is a `ValueError` that says what was given, what is allowed, what to do.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

DEFAULT_MODEL = "smollm2-135m-instruct-q4_1"
DEFAULT_CORPUS = "sae-probes-text"

Dtype = Literal["auto", "bfloat16", "float32"]
Impl = Literal["auto", "reference", "torch", "native", "triton"]
Precision = Literal["auto", "fp32", "bf16", "int8"]
Suite = Literal["basic", "quick", "paper"]

VARIANTS = Path(__file__).parent / "variants"
"""Where the activation functions are, a file each (`monosem.variants`)."""


@dataclass(frozen=True)
class HarvestConfig:
    """Text -> tokens -> activations, kept in a store on disk (`monosem.harvest`)."""

    out: str
    """Folder of the activation store."""
    model: str = DEFAULT_MODEL
    """The subject: a named model, a hub id, a folder, or a .gguf file."""
    revision: str | None = None
    """Hub revision of the subject (branch, tag or commit)."""
    layer: int | None = None
    """0-based block; default ceil(0.75 L) - 1, three quarters of the depth (Gao et al. 2024, section 1)."""
    layers: tuple[int, ...] = ()
    """Instead of `layer`, several in one forward pass: a store each, in OUT/layer-L."""
    location: str = "resid_post_mlp"
    """resid_post_mlp, resid_post_attn, resid_delta_mlp, resid_delta_attn, mlp_post_act, attn_z, a module's dotted name
    (its output), or NAME:input (what goes in)."""
    corpus: str = DEFAULT_CORPUS
    """A named corpus, hf:DATASET[:CONFIG[:SPLIT]], or a local .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow file
    (packed too: .gz, .zst, .bz2, .xz), or a folder of them. --text-column says which column has the text."""
    text_column: str | None = None
    """Column with the text, chats (messages) or token ids; default: the first there is of text, messages,
    conversations, prompt + completion, input_ids, tokens."""
    context_length: int = 64
    """Tokens a context (64 in the paper)."""
    n_tokens: int = 393_216
    """Training activations to harvest (rounded up to whole blocks of contexts)."""
    n_tokens_held_out: int = 32_768
    """Held-out activations, from documents that training never sees."""
    held_out_fraction: float = 0.05
    """Share of documents, chosen by their hash, that are held out."""
    keep_first_token: bool = False
    """Keep position 0 of each context (the attention sink, whose norm is ~100x the rest)."""
    dtype: Dtype = "auto"
    """Precision of the subject's forward pass and of the store. auto: a store in bfloat16, of a subject that runs in
    whichever of the two is faster on this machine; the store says which."""
    block_contexts: int = 64
    """Contexts in one forward pass; also the unit of shuffling and of reading."""
    shard_blocks: int = 8
    """Blocks in one file of the store."""
    seed: int = 0
    """Order of the documents."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        _at_least(self, 2, "context_length")
        _at_least(self, 1, "n_tokens", "n_tokens_held_out", "block_contexts", "shard_blocks")
        _one_of(self, "dtype", Dtype)
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}; give a share between 0 and 1")
        _check_seed(self.seed)
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer is {self.layer}; layers count from 0")
        if self.layers and (self.layer is not None or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0):
            given = f"layer is {self.layer} and layers is {list(self.layers)}"
            raise ValueError(f"{given}; give one of them, each layer once, counted from 0")


@dataclass(frozen=True)
class TrainConfig:
    """Activations -> autoencoder (`monosem.train`). The recipe is Gao et al. 2024, section 2."""

    out: str
    """Run folder: training state, metrics.jsonl and the released autoencoder go here."""
    store: str
    """Activation store to train on."""
    n_latents: int = 8192
    k: int = 32
    """Latents kept per token, by the activation functions that keep a number of them."""
    activation: str = "topk"
    """Which latents are active, and the loss that goes with it: see docs/activations (topk, relu, jumprelu, …)."""
    activation_options: dict[str, float] = field(default_factory=dict)
    """The activation function's own settings, by name; what is not given has its default (docs/activations)."""
    n_tokens: int = 1_048_576
    """Token-visits to train for, rounded up to whole batches (the store is read again, in a new order, as often as
    needed)."""
    batch_size: int = 1024
    """Tokens a step."""
    lr: float | None = None
    """Adam's step size; default: `step.default_lr`, which falls with 1/sqrt(n_latents)."""
    lr_warmup_steps: int = 0
    """Steps over which lr rises linearly from 0."""
    auxk: int | None = None
    """Dead latents that model the error (AuxK); default: the power of two nearest d_model/2; 0 turns AuxK off."""
    auxk_coef: float = 1 / 32
    dead_tokens_threshold: int | None = None
    """Tokens without firing after which a latent is dead; default: `step.default_dead_tokens_threshold`."""
    sparsity_coef: float = 0.0
    """lambda of the activation function's own penalty: ||z||_1 for relu, prolu and gated, ||z||_0 for jumprelu."""
    sparsity_warmup_steps: int = 0
    """Steps over which sparsity_coef rises linearly from 0."""
    tied_init: bool = True
    """Start the encoder as the decoder's transpose."""
    scaled_init: bool = True
    """Scale the encoder so that reconstructions have the inputs' norm at the start; else its rows have norm 1."""
    ema: float | None = None
    """Coefficient of the weights' moving average; default min(0.999, 1 - 20/steps); 0 turns it off."""
    clip_norm: float | None = None
    """Clip the gradient's norm over all parameters; default: no clipping."""
    precision: Precision = "auto"
    """Precision of the encoder product that selects latents; their values are always fp32. The native kernels select
    the same latents at fp32 and bf16, which is proven, and at int8 (native only), which every logged step audits. auto
    is the fastest on this machine, as long as its audits find nothing; the torch kernels take it as fp32."""
    seed: int = 0
    """Of the initial weights."""
    data_seed: int = 0
    """Order of the activations, and the sample that weights start from; runs that share it can share a stream."""
    device: str = "auto"
    impl: Impl = "auto"
    """Kernels of the step: auto, reference (dense, slow, the definition), torch, native, triton (CUDA and ROCm)."""
    log_every_steps: int = 10
    save_every_s: float = 60.0
    """Seconds between saves of the training state."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "n_latents", "k", "n_tokens", "batch_size", "log_every_steps")
        if self.auxk is not None:
            _at_least(self, 0, "auxk")
        _at_least(self, 0, "lr_warmup_steps", "sparsity_warmup_steps", "auxk_coef", "sparsity_coef", "save_every_s")
        _one_of(self, "impl", Impl)
        _one_of(self, "precision", Precision)
        self._check_activation()
        _check_seed(self.seed)
        _check_seed(self.data_seed, "data_seed")
        if self.n_tokens < self.batch_size:
            raise ValueError(f"n_tokens is {self.n_tokens}, less than one batch of {self.batch_size}; raise n_tokens")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a coefficient in [0, 1)")
        _positive(self, "lr", "clip_norm", "dead_tokens_threshold")

    def _check_activation(self) -> None:
        """That its options are its own, and that every shared setting which was changed has an effect with it."""
        facts = activation_facts(self.activation)
        for name, value in self.activation_options.items():
            facts.check(self.activation, name, value)
        keeps_k, has_auxk = "k" in facts.uses, "auxk" in facts.uses and self.auxk != 0
        if keeps_k and self.k > self.n_latents:
            raise ValueError(f"k is {self.k} but there are only {self.n_latents} latents; lower k or raise n_latents")
        for name in ("k", "sparsity_coef", "auxk"):
            default = TrainConfig.__dataclass_fields__[name].default
            if name not in facts.uses and getattr(self, name) not in (default, 0):
                advice = "unset" if default is None else f"at {default}"
                raise ValueError(f"{name} has no effect with activation={self.activation}; leave it {advice}")
        if self.sparsity_warmup_steps and not self.sparsity_coef:
            raise ValueError("sparsity_warmup_steps has no effect without sparsity_coef; set that or leave it at 0")
        if self.auxk_coef not in (0, 1 / 32) and not has_auxk:
            raise ValueError(
                f"auxk_coef has no effect without AuxK (activation={self.activation}, auxk={self.auxk}); leave it unset"
            )
        if self.precision != "auto" and (not keeps_k or self.impl == "reference"):
            raise ValueError(
                f"precision={self.precision} has no effect with activation={self.activation}, impl={self.impl} (fp32); "
                "leave it auto"
            )
        if self.precision == "int8" and self.impl in ("torch", "triton"):
            raise ValueError(f"precision=int8 needs impl=native, not {self.impl}; leave one of them auto")


@dataclass(frozen=True)
class SweepConfig:
    """Activations -> many autoencoders, on one stream (`monosem.sweep`); docs/sweep.md has examples."""

    out: str
    """Folder of the sweep: runs/NAME/ as `monosem train` leaves them, runs.csv, sweep.json."""
    grid: str
    """JSON file of TrainConfig's fields: {"base": {NAME: VALUE}, "grid": {NAME: [VALUES]}, "runs": [{NAME: VALUE}]}."""
    store: str | None = None
    """Activation store of the runs that name none."""
    eval_every: int = 131_072
    """Runs are measured after this many token-visits, twice as many, four times, ..., and at their end."""
    eval_tokens: int = 65_536
    """Held-out tokens to measure on, rounded up to whole blocks (fewer when the store has fewer)."""
    n_bootstrap: int = 1000
    """Resamples of documents behind each 95% interval."""
    save_every_s: float = 600.0
    """Seconds between saves of all runs' training states."""
    hours: float | None = None
    """Stop after this many hours, with everything saved; the same command goes on."""
    waves: bool = False
    """Where not all runs fit in memory, train as many at a time as do; each wave reads the stream again."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "eval_every", "eval_tokens")
        _at_least(self, 20, "n_bootstrap")
        _at_least(self, 0, "save_every_s")
        _positive(self, "hours")


@dataclass(frozen=True)
class EvalConfig:
    """Autoencoder -> numbers on held-out text (`monosem.evaluate`)."""

    run: str
    """Run folder (with autoencoder/ in it) or the folder of a released autoencoder."""
    store: str | None = None
    """Activation store with held-out tokens; default: the one the run was trained on."""
    model: str | None = None
    """For a subject that has moved since: --model PATH says where it lies now; its hash must be the same."""
    suite: Suite = "basic"
    """basic: reconstruction and downstream. quick: every metric of the paper, in minutes. paper: the same, larger."""
    tasks: str = DEFAULT_CORPUS
    """Labelled texts of the probes: a folder of .csv files (text,label), hf:NAME, sae-probes-text or gao61."""
    n_tokens_downstream: int = 16_384
    """Held-out tokens on which the subject is run with and without the reconstruction."""
    n2g: int | Literal["all"] | None = None
    """Latents whose N2G rules are judged and simulated; default: 32 (quick) or 128 (paper). A second or so each."""
    n_bootstrap: int = 1000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _at_least(self, 1, "n_tokens_downstream")
        if self.n2g not in (None, "all"):
            _at_least(self, 1, "n2g")
        if self.n2g is not None and self.suite == "basic":
            raise ValueError(f"n2g is {self.n2g}, but suite basic makes no rules; choose suite quick or paper")
        _at_least(self, 20, "n_bootstrap")
        _one_of(self, "suite", Suite)
        _check_seed(self.seed)


@dataclass(frozen=True)
class ScaleConfig:
    """A table of runs -> scaling laws with intervals and verdicts (`monosem.scale`)."""

    table: str
    """Folder with runs.csv, or the table itself (.csv, .parquet); results go beside it."""
    tokens: int | None = None
    """D of the laws at fixed tokens; default: where most (n_latents, k) were evaluated."""
    subject: str | None = None
    """Subject of the laws, in a table of several."""
    families: str | None = None
    """JSON file {"SUBJECT": {"family": "NAME", "parameters": 135e6}}: adds L_s(N) across subjects of one family."""
    figures: bool = True
    """Draw figures/*.png and scaling.html."""
    seed: int = 0
    """Of starts and resamples."""

    def __post_init__(self) -> None:
        if self.tokens is not None:
            _at_least(self, 1, "tokens")
        _check_seed(self.seed)


@dataclass(frozen=True)
class PlanConfig:
    """A budget or a goal -> n, k, tokens, hours and bytes by the fitted laws (`monosem.plan`), or a check of a plan."""

    scaling: str | None = None
    """scaling.json that `monosem scale` left."""
    k: int | None = None
    """Latents kept per token; default: every k with a fitted L(N,D)."""
    n_latents: int | None = None
    """Default: the best for the budget."""
    flops: float | None = None
    """Budget in FLOPs, of the table's column flops."""
    hours: float | None = None
    """Budget in hours, of the table's machine or of --flops-per-s."""
    tokens: int | None = None
    """Budget in token-visits."""
    nmse: float | None = None
    """Goal: the least FLOPs that are predicted to reach this normalized_mse."""
    flops_per_s: float | None = None
    """Peak FLOPs a second of one GPU, in place of the seconds measured in the table."""
    mfu: float = 0.3
    """Share of flops_per_s that training reaches: a guess until it is measured."""
    gpus: int = 1
    price_per_hour: float = 0.0
    """Of one GPU, or of the table's machine."""
    memory_gib: float | None = None
    """Memory of a device; default: this machine's."""
    pack: int = 1
    """Autoencoders trained together on one stream."""
    out: str | None = None
    """Write the prediction here, to be committed before its run starts; needs --k."""
    check: str | None = None
    """A prediction to compare with --table, once its run exists."""
    table: str | None = None
    """With --check: the runs table, or its folder."""

    def __post_init__(self) -> None:
        _positive(self, "k", "n_latents", "flops", "hours", "tokens", "nmse", "flops_per_s", "memory_gib")
        _at_least(self, 1, "gpus", "pack")
        _at_least(self, 0, "price_per_hour")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; give a share above 0 and up to 1")
        goals = [name for name in ("flops", "hours", "tokens", "nmse") if getattr(self, name) is not None]
        if (self.check is None) != (self.table is None):
            raise ValueError("check and table belong together: give both, or neither")
        if self.check is not None:
            self._check_nothing_else()
            return
        if len(goals) > 1:
            raise ValueError(f"give one of flops, hours, tokens or nmse, not {', '.join(goals)}")
        if self.out is not None and self.k is None:
            raise ValueError("out holds the prediction of one run; give its k")
        for name in ("gpus", "mfu"):
            if self.flops_per_s is None and getattr(self, name) != PlanConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name} has no effect without flops_per_s; give the peak FLOPs a second of one GPU")

    def _check_nothing_else(self) -> None:
        """That a check is told of its prediction and its table alone."""
        fields = (f for f in dataclasses.fields(self) if f.name not in ("check", "table"))
        if given := [f.name for f in fields if getattr(self, f.name) != f.default]:
            raise ValueError(f"check compares a prediction with a table; leave out {', '.join(given)}")


@dataclass(frozen=True)
class ExplainConfig:
    """Autoencoder -> what every latent fires on and votes for, and rules and effects of some (`monosem explain`)."""

    run: str
    """Run folder (with autoencoder/ in it) or the folder of a released autoencoder."""
    store: str | None = None
    """Activation store whose training tokens are looked at; default: the one the run was trained on."""
    model: str | None = None
    """For a subject that has moved since: --model PATH says where it lies now; its hash must be the same."""
    n_tokens: int = 1_048_576
    """Tokens to look at (fewer if the store has fewer)."""
    n2g: int | Literal["all"] = 48
    """Latents that get an N2G rule with its recall and precision, drawn among those that fire: a second or so each;
    more add to what is there, and 0 makes none."""
    ablations: int | Literal["all"] = 32
    """Latents ablated at the peaks of their strongest examples; the first of those with rules. 0 for none."""
    tasks: str | None = None
    """Labelled texts, as of `monosem eval`, on which every latent is probed (minutes); default: the numbers of those
    latents that the evaluation's probes chose, or what is there."""
    seed: int = 0
    """Which contexts are drawn as random and quantile examples, and which latents get rules and ablations."""
    device: str = "auto"

    def __post_init__(self) -> None:
        _at_least(self, 1, "n_tokens")
        for name in ("n2g", "ablations"):
            if getattr(self, name) != "all":
                _at_least(self, 0, name)
        _check_seed(self.seed)


@dataclass(frozen=True)
class ServeConfig:
    """A run -> pages in the browser, on this machine only (`monosem serve`)."""

    run: str
    """Run folder (with autoencoder/ in it) or the folder of a released autoencoder."""
    others: tuple[str, ...] = ()
    """Runs to compare it with, beside those in the same folder."""
    model: str | None = None
    """Where the subject of `run` lies now, if it has moved since; its hash must be the same."""
    port: int = 8765
    """Port on 127.0.0.1; 0 takes a free one."""
    scaling: str | None = None
    """Folder of a scaling.json to show; default: the folder that the run is in."""
    read_only: bool = False
    """Keep no notes and no stars."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; give a whole number from 0 to 65535")


@dataclass(frozen=True)
class ExportConfig:
    """An explained run -> files for other places and programs (`monosem export`)."""

    run: str
    """Run folder with explain/ in it."""
    out: str | None = None
    """Folder of pages, which any static file server serves and which open without one."""
    parquet: str | None = None
    """File with a row a latent: all numbers, explanation, top tokens."""
    sae_viewer: str | None = None
    """Folder of the JSON that OpenAI's sae-viewer reads."""
    latents: str = "rules"
    """Of out and sae_viewer: rules (those that have one, or all where none has), all, a number N (the first N: those
    with rules, then by number), or a list 3,17,256."""

    def __post_init__(self) -> None:
        if self.out is None and self.parquet is None and self.sae_viewer is None:
            raise ValueError("nothing to write; give a folder for pages, --parquet FILE or --sae-viewer FOLDER")
        if self.latents not in ("rules", "all") and not all(part.strip().isdigit() for part in self.latents.split(",")):
            raise ValueError(f"latents is {self.latents!r}; give rules, all, a number, or a list such as 3,17,256")
        if self.latents != "rules" and self.out is None and self.sae_viewer is None:
            raise ValueError("latents has no effect on parquet, which has them all; leave it out")


@dataclass(frozen=True)
class RunConfig:
    """The main job: harvest, train, evaluate in one folder (`monosem run`)."""

    out: str = "runs/demo"
    harvest: HarvestConfig = field(default_factory=lambda: HarvestConfig(out=""))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(out="", store=""))
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(run=""))

    def __post_init__(self) -> None:
        if self.harvest.out or self.train.out or self.train.store or self.eval.run or self.eval.store:
            raise ValueError(
                "the stages' folders follow from out (OUT, OUT/store); leave harvest.out, train.out, ... unset"
            )


class ActivationFacts(NamedTuple):
    """What an activation function says of itself: shared settings that have an effect, and its own."""

    uses: tuple[str, ...]
    options: dict[str, tuple[float, float, float]]
    """name -> (default, least, most); a whole number where the default is one."""

    def check(self, activation: str, name: str, value: float) -> None:
        """`ValueError` unless `value` can be meant for the option `name`."""
        if name not in self.options:
            known = f"it has {', '.join(self.options)}" if self.options else "it has none"
            raise ValueError(f"activation={activation} has no option {name}; {known}")
        default, least, most = self.options[name]
        whole = isinstance(default, int)
        if not least <= value <= most or (whole and value != int(value)):
            kind = "whole number" if whole else "number"
            raise ValueError(f"{name} is {value:g}; give a {kind} from {least:g} to {most:g}")


def activations() -> list[str]:
    """Names of the activation functions: the files in VARIANTS."""
    return sorted(path.stem for path in VARIANTS.glob("*.py") if not path.stem.startswith("_"))


def activation_facts(activation: str) -> ActivationFacts:
    """USES and OPTIONS of an activation function, read from its source, as running it would import torch.

    `ValueError` lists the activation functions when there is none of this name.
    """
    if activation not in activations():
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(activations())}")
    found: dict[str, Any] = {}
    for node in ast.parse((VARIANTS / f"{activation}.py").read_text("utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in ("USES", "OPTIONS"):
            found[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return ActivationFacts(found["USES"], found["OPTIONS"])


C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON data, every field present."""
    return dataclasses.asdict(config)


def from_dict(kind: type[C], data: dict[str, Any]) -> C:
    """The config in `data`; `ValueError` on unknown, missing or ill-typed keys (nothing is ignored)."""
    if not isinstance(data, dict):
        raise ValueError(f"{kind.__name__} must be a JSON object, not {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    if missing := sorted(set(fields) - set(data)):
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}; every field must be there")
    return kind(**{name: _checked(kind, name, hints[name], value) for name, value in data.items()})


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the fields that differ, as `name: old -> new`."""
    return [
        f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)
    ]


def _checked(kind: type, name: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)  # type: ignore[arg-type]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}; it must be a JSON object")
        return {key: _checked(kind, f"{name}.{key}", typing.get_args(hint)[1], entry) for key, entry in value.items()}
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}; it must be a JSON list")
        return tuple(_checked(kind, f"{name}[{i}]", typing.get_args(hint)[0], entry) for i, entry in enumerate(value))
    allowed = typing.get_args(hint) if typing.get_origin(hint) is not None else (hint,)
    if typing.get_origin(hint) is Literal:
        if value not in allowed:
            raise ValueError(f"{kind.__name__}.{name} is {value!r}; choose one of {', '.join(map(str, allowed))}")
        return value
    if value in [choice for a in allowed if typing.get_origin(a) is Literal for choice in typing.get_args(a)]:
        return value
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not any(type(value) is a for a in allowed):
        names = " or ".join(
            repr(*typing.get_args(a)) if typing.get_origin(a) is Literal else getattr(a, "__name__", str(a))
            for a in allowed
        )
        raise ValueError(f"{kind.__name__}.{name} is {value!r}; it must be {names}")
    return value


def _at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:
            finite = " and finite" if value == math.inf else ""
            raise ValueError(f"{name} is {value}; it must be at least {low}{finite}")


def _positive(config: Any, *names: str) -> None:
    """That what is given of the optional fields is a positive number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; give a positive number or leave it unset")


def _check_seed(seed: int, name: str = "seed") -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} is {seed}; give a whole number from 0 to 2^63 - 1")


def _one_of(config: Any, name: str, choices: Any) -> None:
    value, allowed = getattr(config, name), typing.get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
