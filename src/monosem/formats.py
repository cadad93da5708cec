"""What each JSON file of docs/formats.md holds, field by field, and the seal by which an edited one is known.

A file is read in three steps (`artifacts.read_manifest`): strict JSON, the types below, the seal. A class a kind, its
fields those of the page; `open` ones may hold more than is named. A field that may be absent has the default UNSET.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from monosem import config
from monosem.config import EvalConfig, ExplainConfig, HarvestConfig, TrainConfig

SEAL = "seal"
MOST = 2**63 - 1

Whole = Annotated[int, Meta(ge=0, le=MOST)]
Count = Annotated[int, Meta(ge=1, le=MOST)]
Seconds = Annotated[float, Meta(ge=0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Object = dict[str, Any]


class Strict(Struct, forbid_unknown_fields=True):
    """An object with these fields and no others."""


class Open(Struct):
    """An object that may have fields beside these."""


class Site(Strict):
    model: str
    revision: str | None
    layer: Annotated[int, Meta(ge=-1, le=MOST)]
    location: str


class File(Strict):
    """A file of the folder: a plain relative name, and what its bytes are."""

    file: Name
    sha256: Sha256
    bytes: Whole


class Manifest(Strict, kw_only=True):
    """What every manifest has."""

    kind: str
    format: int
    config: Object
    sources: dict[str, str]
    versions: dict[str, str]
    seal: Sha256


class Shard(File):
    n_rows: Whole


class Split(Strict):
    n_blocks: Count
    n_rows: Count
    n_contexts: Count
    n_excluded: Whole
    n_documents: Count
    documents: File
    shards: list[Shard]


class Splits(Strict):
    train: Split
    held_out: Split


class Norms(Strict):
    first_token_mean: float
    rows_mean: float
    n_rows_large: Whole


class CorpusText(Strict):
    """How the corpus was read."""

    column: str | None
    kind: str | None
    n_rows: Whole
    skipped: dict[str, Whole]
    cut_characters: Whole


class StoreSources(Strict):
    subject: str
    tokenizer: str
    corpus: str
    subject_config: str | UnsetType = UNSET


class Store(Manifest, kw_only=True):
    sources: StoreSources  # type: ignore[assignment]
    subject: str
    site: Site
    width: Count
    dtype: Literal["bfloat16", "float32"]
    subject_dtype: Literal["bfloat16", "float32"]
    compiled: bool | UnsetType = UNSET
    mean: File
    norms: Norms
    splits: Splits
    text: CorpusText


class StorePlan(Manifest, kw_only=True):
    sources: StoreSources  # type: ignore[assignment]
    subject_dtype: Literal["bfloat16", "float32"]
    compiled: bool | UnsetType = UNSET


class ShardSidecar(File):
    n_rows: Count
    n_contexts: Count
    sum: list[float]
    norm_sum: float
    first_norm_sum: float
    n_large: Whole
    seal: Sha256


class StoreSource(Open):
    store: str


class TrainingRun(Manifest, kw_only=True):
    sources: StoreSource  # type: ignore[assignment]


class Stream(Strict):
    n_batches: Whole
    seed: Whole
    batch_size: Count
    window_blocks: Count
    source: str


class Work(Strict):
    kernel_s: Seconds
    product_s: Seconds | None
    auxk_pairs: Whole


class Selection(Strict):
    precision: str
    missed_at_step: Whole | None


class Rows(Strict):
    """The first rows of a file, which are as they were: so many bytes of this sha256."""

    bytes: Whole
    sha256: Sha256


class Recipe(Strict):
    activation: str
    activation_options: dict[str, float]
    k: Count
    n_steps: Count
    batch_size: Count
    lr: float
    lr_warmup_steps: Whole
    mse_scale: float
    auxk: Whole
    auxk_coef: float
    dead_tokens_threshold: Whole
    sparsity_coef: float
    sparsity_warmup_steps: Whole
    ema: float
    clip_norm: float | None
    precision: str


class BitsDependOn(Open):
    impl: str
    threads: Count
    device: str
    torch: str


class TrainingState(Manifest, kw_only=True):
    file: Name
    sha256: Sha256
    step: Whole
    recipe: Recipe
    ema: bool
    extras: list[Name]
    stream: Stream
    elapsed_s: Seconds
    work: Work
    selection: Selection
    bits_depend_on: BitsDependOn
    metrics: Rows


class AutoencoderConfig(Strict):
    d_model: Count
    n_latents: Count
    k: Count
    activation: str


class Normalization(Strict):
    kind: str
    epsilon: float


class Held(Open):
    held_out_fraction: float | UnsetType = UNSET
    corpus: str | UnsetType = UNSET


class Dead(Strict):
    count: Whole
    window_tokens: Whole


class Provenance(Open):
    site: Site | UnsetType | None = UNSET
    subject: str | UnsetType | None = UNSET
    store: str | UnsetType = UNSET
    sources: dict[str, str] | UnsetType = UNSET
    harvest: Held | UnsetType = UNSET
    train: Object | UnsetType = UNSET
    recipe: Object | UnsetType = UNSET
    tokens_seen: Whole | UnsetType = UNSET
    distinct_tokens: Whole | UnsetType = UNSET
    epochs: float | UnsetType = UNSET
    dead_latents: Dead | UnsetType = UNSET
    auxk_dropped_steps: Whole | UnsetType = UNSET
    weights: str | UnsetType = UNSET
    selection_normalized_mse: dict[str, float] | UnsetType = UNSET
    selection: Selection | UnsetType = UNSET
    impl: str | UnsetType = UNSET
    threads: Count | UnsetType = UNSET


class Autoencoder(Manifest, kw_only=True):
    config: AutoencoderConfig  # type: ignore[assignment]
    normalization: Normalization
    weights_sha256: Sha256
    provenance: Provenance


class Metric(Strict):
    value: float
    low: float
    high: float
    n: Whole
    unit: str


class RunFacts(Open):
    subject: str
    site: Site
    context_length: Count
    store: str
    d_model: Count
    n_latents: Count
    k: Count
    activation: str
    tokens_seen: Whole | UnsetType = UNSET
    distinct_tokens: Whole | UnsetType = UNSET
    epochs: float | UnsetType = UNSET
    weights: str | UnsetType = UNSET
    auxk_dropped_steps: Whole | UnsetType = UNSET
    n_documents_held_out: Whole | UnsetType = UNSET
    n_tokens_downstream: Whole | UnsetType = UNSET
    n_first_positions_left_out: Whole | UnsetType = UNSET


class Density(Strict):
    edges: list[float]
    n_latents: list[Whole]
    never: Whole
    n_tokens: Whole


class Histograms(Strict):
    density_log10: Density


class ProbeRow(Open):
    task: str
    latent: Whole
    probe_loss: float


class ProbeTables(Open):
    tasks: list[ProbeRow] | UnsetType = UNSET


class Tables(Open):
    """By part what docs/formats.md lists; checked where another stage reads it."""

    latents: Object | UnsetType = UNSET
    downstream: Object | UnsetType = UNSET
    progressive: Object | UnsetType = UNSET
    ablation: Object | UnsetType = UNSET
    probes: ProbeTables | UnsetType = UNSET
    explainability: Object | UnsetType = UNSET


class EvaluationSources(Open):
    autoencoder: Sha256
    store: str


class Evaluation(Manifest, kw_only=True):
    sources: EvaluationSources  # type: ignore[assignment]
    run: RunFacts
    metrics: dict[str, Metric]
    histograms: Histograms
    tables: Tables
    left_out: dict[str, str]
    failed: dict[str, str]


class EvaluationPart(Manifest, kw_only=True):
    sources: EvaluationSources  # type: ignore[assignment]
    metrics: dict[str, Metric]
    tables: ProbeTables
    left_out: dict[str, str]
    seconds: Seconds


class MainJob(Manifest, kw_only=True):
    seconds: dict[str, Seconds]


class SweepRun(Strict):
    config: Object
    config_hash: Sha256
    store: str
    store_hash: Sha256
    status: Literal["waiting", "training", "finished", "diverged"]
    error: str | None
    step: Whole
    n_steps: Count
    kernel_s: Seconds
    product_share: Seconds | str
    evaluation_s: Seconds
    rows: Rows


class SweepSeconds(Strict):
    wall_s: Seconds
    kernel_s: Seconds
    evaluating_s: Seconds
    saving_s: Seconds
    starting_s: Seconds
    waiting_s: Seconds
    ratio: float | None


class SweepConfig(Strict):
    eval_every: Count
    eval_tokens: Count
    n_bootstrap: Count


class Sweep(Manifest, kw_only=True):
    config: SweepConfig  # type: ignore[assignment]
    runs: dict[str, SweepRun]
    seconds: SweepSeconds
    memory: list[str]


class LawsOf(Strict):
    subject: str
    layer: str
    location: str
    d_model: Count
    n_runs: Whole
    n_points: Whole
    stores: list[str]
    table_sha256: Sha256


class Law(Open):
    law: str
    formula: str
    claim: str
    verdict: str
    reason: str
    at: Object
    coefficients: dict[str, Object] | None
    n_runs: Whole
    n_points: Whole
    residual_sd: float | None
    held_out_error: float | None
    extrapolation_error: float | None
    irreducible: Object | None
    excluded: list[Object]
    draws: list[list[float]] | UnsetType = UNSET


class Cost(Strict):
    coefficients: dict[str, float]
    n_runs: Whole
    worst: float


class CurvePoint(Open):
    run: str
    n_latents: Count
    k: Whole
    tokens: float
    normalized_mse: float


class LawPoints(Open):
    curves: list[CurvePoint]
    fitted: list[Object]


class ScalingLaws(Manifest, kw_only=True):
    of: LawsOf
    joint: Law
    joint_converged: Law
    n_fixed_tokens: dict[str, Law]
    n_converged: dict[str, Law]
    tokens_to_convergence: dict[str, Law]
    n_tokens: dict[str, Law]
    compute: dict[str, dict[str, Law]]
    sparsity: Object
    subjects: Object | None
    costs: dict[str, Cost | None]
    points: LawPoints
    excluded: list[Object]


class Nmse(Strict):
    value: float
    low: float
    high: float
    law: str
    extrapolated: bool


class Planned(Strict):
    n_latents: Count
    k: Count
    tokens: Count
    nmse: Nmse
    flops: float | None
    seconds: float | None
    seconds_from: str | None
    gpus: Count
    price: float | None
    bytes: dict[str, float]
    memory_bytes: float
    fits: bool


class Prediction(Manifest, kw_only=True):
    of: LawsOf
    scaling: Sha256
    plans: Annotated[list[Planned], Meta(min_length=1, max_length=1)]


class Computed(Open):
    n_latents: Whole
    seconds: Seconds
    of: Object
    command: str | UnsetType = UNSET
    tasks: list[str] | UnsetType = UNSET


class Column(Strict):
    dtype: str
    shape: list[Whole]
    meaning: str
    part: str
    sha256: Sha256
    bytes: Whole


class PartFile(Strict):
    part: str
    sha256: Sha256
    bytes: Whole


class Explanation(Manifest, kw_only=True):
    sources: EvaluationSources  # type: ignore[assignment]
    subject: str
    site: Site
    d_model: Count
    n_latents: Count
    k: Count
    activation: str
    n_tokens: Count
    n_contexts: Count
    context_length: Count
    first_position: Whole
    n_quantile_bands: Count
    probe_tasks: list[str]
    columns: dict[str, Column]
    files: dict[str, PartFile]
    computed: dict[str, Computed]
    failed: dict[str, str]


class Rule(Strict):
    """A line of n2g.jsonl."""

    latent: Whole
    recall: float | None
    precision: float | None
    density: float
    rule: list[tuple[list[int], float]]
    seal: Sha256


class Answer(Strict):
    """A line of a judge's answers."""

    judge: str
    prompt: str
    answer: str


class AblationsConfig(Strict):
    of: Object
    n_examples: Count


class Ablations(Manifest, kw_only=True):
    config: AblationsConfig  # type: ignore[assignment]


class MatchesConfig(Strict):
    min_together: Count


class Matches(Manifest, kw_only=True):
    config: MatchesConfig  # type: ignore[assignment]
    chance: float
    tensors_sha256: Sha256


class Export(Manifest, kw_only=True):
    n_latents: Whole


class Subject(Manifest, kw_only=True):
    hash: Sha256


class ProductSeconds(Strict):
    float32: Seconds
    bfloat16: Seconds


class ProductTimes(Manifest, kw_only=True):
    seconds: ProductSeconds


KINDS: dict[str, type[Manifest]] = {
    "activation-store": Store,
    "activation-store-plan": StorePlan,
    "training-run": TrainingRun,
    "training-state": TrainingState,
    "autoencoder": Autoencoder,
    "evaluation": Evaluation,
    "evaluation-part": EvaluationPart,
    "run": MainJob,
    "sweep": Sweep,
    "scaling-laws": ScalingLaws,
    "prediction": Prediction,
    "explanation": Explanation,
    "latent-ablations": Ablations,
    "latent-matches": Matches,
    "site": Export,
    "sae-viewer": Manifest,
    "subject": Subject,
    "product-times": ProductTimes,
}
"""The class of each kind of manifest."""

_CONFIGS: dict[str, tuple[type, tuple[str, ...]]] = {
    "activation-store": (HarvestConfig, ()),
    "activation-store-plan": (HarvestConfig, ()),
    "training-run": (TrainConfig, ("out", "store", "device", "log_every_steps", "save_every_s")),
    "evaluation": (EvalConfig, ("run", "store", "device", "model")),
    "explanation": (ExplainConfig, ("run", "store", "device", "model", "tasks")),
}
"""Kinds whose `config` is a stage's, and the fields of it that are not kept."""

T = TypeVar("T")


def check(kind: str, data: dict[str, Any]) -> None:
    """`ValueError` naming the field unless a manifest of this kind may hold `data`."""
    typed(KINDS[kind], data)
    if kind in _CONFIGS:
        stage, left_out = _CONFIGS[kind]
        wrong = sorted(set(left_out) & data["config"].keys())
        if wrong:
            raise ValueError(f"config has the field {', '.join(wrong)}, which is not kept")
        empty = {f.name: "" if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(stage)}
        try:
            config.from_dict(stage, {**{name: empty[name] for name in left_out}, **data["config"]})
        except ValueError as error:
            raise ValueError(f"config: {error}") from None


def typed(kind: type[T], data: Any) -> T:
    """`data` as the class or type; `ValueError` naming the field that is missing, unknown or of another type."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").replace("`", "").removeprefix("$").removeprefix(".")
        raise ValueError(f"{field}: {_plain(what)}" if field else _plain(what)) from None


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with its seal: the sha256 of its canonical JSON, so that the layout of the file does not matter."""
    return {**_unsealed(data), SEAL: _seal(_unsealed(data))}


def is_sealed(data: dict[str, Any]) -> bool:
    """Whether `data` is as it was when it was sealed."""
    return data.get(SEAL) == _seal(_unsealed(data))


def _unsealed(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != SEAL}


def _seal(data: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(data, allow_nan=False))  # keys become strings, tuples lists, as in the file
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(message: str) -> str:
    """msgspec's words as ours."""
    for theirs, ours in (
        ("Object missing required field", "lacks the field"),
        ("Object contains unknown field", "has an unknown field"),
        ("Expected", "expected"),
    ):
        message = message.replace(theirs, ours)
    return message.replace("`", "")
