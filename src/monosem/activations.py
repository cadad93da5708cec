"""Activations of one site over many contexts: harvested once into a store, a folder on disk.

    out/manifest.json                        what made the store, and the sha256 of everything below; written last
    out/plan.json                            config and sources of the harvest, written first: what a resume must match
    out/mean.safetensors                     `mean` [width], float64: mean of the training rows, raw space
    out/{train,held_out}/documents.json      names (hashes) of the documents that contexts point to
    out/{train,held_out}/shard-00000.json    sidecar, written after its shard: sha256, sums and norms of its rows
    out/{train,held_out}/shard-00000.safetensors
        activations [rows, width]; tokens, documents, positions [contexts, ctx]

A *block* is `block_contexts` contexts: one forward pass, and the unit of reading and of shuffling. A shard is
`shard_blocks` blocks. Row r of a split is token `r % rows_per_context` (+ 1 where the first token of each context is
left out) of context `r // rows_per_context`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from monosem import artifacts, dtypes, formats
from monosem.artifacts import sha256_file
from monosem.config import HarvestConfig, changed_fields, to_dict
from monosem.corpora import corpus_hash, is_local
from monosem.logs import progress
from monosem.subject import Subject
from monosem.tokens import Contexts, split_contexts
from monosem.torch_state import pinned, pinned_methods
from monosem.types import Site, resolve_device

log = logging.getLogger("monosem")

KIND, PLAN_KIND = "activation-store", "activation-store-plan"
SPLITS = ("train", "held_out")
LARGE_NORM = 10.0
"""Rows whose norm is over this many times their shard's median are counted: sinks away from the first token."""

COMPILE_FROM_TOKENS = 2**21
"""Harvests of so many activations in bfloat16 on a CPU compile the subject: up to half a minute once, for a third off
the rest."""
COMPILE_FROM_TOKENS_FP32 = 2**18
"""The same in float32, where `auto` chose that: products are slower then, so that it pays sooner (a sixth off)."""
COMPILED_TOLERANCE = 0.1
"""Compiled activations may differ from the plain ones by so much (relative, over a block); rounding makes it 0.02."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ADDRESS = ("tokens", "documents", "positions")
_REPAIR = "copy the store again, or delete its manifest.json and harvest again, which keeps what is whole"
_FREE_FIELDS = ("out", "device", "layers")
"""Fields of the config that a resumed harvest may change: they decide where, not what."""


@pinned
def harvest(config: HarvestConfig) -> ActivationStore:
    """The finished store in `config.out`: made, completed where a killed harvest left off, or found complete.

    Every file is whole or absent and the shards found whole are kept, so that a harvest interrupted anywhere ends
    in the same bytes. `ValueError` when the folder belongs to another config (the fields are named), the corpus is
    too small, or an activation is not finite; `OSError` when the disk is full.
    """
    if config.layers:
        raise ValueError(
            f"layers is {list(config.layers)}; one store has one layer: call harvest_layers, or give layer"
        )
    return _harvested([config])[0]


@pinned
def harvest_layers(config: HarvestConfig) -> list[ActivationStore]:
    """A finished store for each of `config.layers`, in `config.out`/layer-L: `harvest` of all in one forward pass.

    The stores of a residual stream have the bytes that `harvest` of their layer alone gives. Errors as there.
    """
    if not config.out:
        raise ValueError("out is empty; give the folder of the activation stores")
    one = [(layer, str(Path(config.out) / f"layer-{layer}")) for layer in config.layers]
    return _harvested([dataclasses.replace(config, layers=(), layer=layer, out=out) for layer, out in one])


def _harvested(configs: list[HarvestConfig]) -> list[ActivationStore]:
    """The finished stores of configs that differ in `out` and `layer` alone."""
    outs = [Path(config.out) for config in configs]
    for config, out in zip(configs, outs, strict=True):
        if not config.out:
            raise ValueError("out is empty; give the folder of the activation store")
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is {out}, which is a file; give a folder")
    missing = [config for config in configs if not _is_complete(config)]  # what is there is read without a lock
    with contextlib.ExitStack() as locks:
        for config in missing:
            _require_own_folder(Path(config.out))
            locks.enter_context(artifacts.folder_lock(config.out))
        missing = [config for config in missing if not _is_complete(config)]  # made while this waited for its turn
        if missing:
            _harvest(missing)
    return [ActivationStore.open(out) for out in outs]


def _is_complete(config: HarvestConfig) -> bool:
    """Whether the very store is there; `ValueError` for another one."""
    out = Path(config.out)
    if not (out / "manifest.json").exists():
        return False
    _require_same(out, ActivationStore.open(out).manifest, config, _local_corpus(config))
    log.info("store %s is already complete", out)
    return True


def _require_own_folder(out: Path) -> None:
    """`ValueError` where files of a store's names lie that no harvest left, or something else than a store."""
    artifacts.require_no_other(out, KIND, PLAN_KIND)
    if (out / "plan.json").exists():
        artifacts.read_manifest(out / "plan.json", PLAN_KIND)
        return
    if found := [name for name in ("mean.safetensors", *SPLITS) if (out / name).exists()]:
        raise ValueError(f"{out} holds {' and '.join(found)}, but no plan.json of a harvest; choose another out")


class ActivationStore:
    """A finished store, read in place: `open` checks the manifest and sizes, each shard's sha256 at its first touch."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        files = [manifest["mean"], *(file for split in SPLITS for file in self._files(split))]
        for file in files:
            artifacts.check_size(artifacts.inside(path, file["file"]), file["bytes"], _REPAIR)
        self.subject_dtype: str = manifest["subject_dtype"]
        """Precision that the subject ran in: bfloat16 or float32."""
        self.hash = artifacts.hash_names([self.subject_dtype, *(file["sha256"] for file in files)])
        """Names what is in the store, wherever it lies."""
        self.config: dict[str, Any] = manifest["config"]
        """The HarvestConfig that made it, as JSON data."""
        self.site = Site(**manifest["site"])
        self.width: int = manifest["width"]
        self.context_length: int = self.config["context_length"]
        self.first_position = 0 if self.config["keep_first_token"] else 1
        """Position, in its context, of a context's first row."""
        self.rows_per_context: int = self.context_length - self.first_position
        self.block_rows: int = self.config["block_contexts"] * self.rows_per_context
        self._open: dict[Path, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """The store in this folder; `ValueError` when it is unfinished, of another format, or not whole."""
        path = Path(path)
        if not (path / "manifest.json").exists():
            unfinished = (path / "plan.json").exists()
            reason = "its harvest did not finish; run the same harvest again" if unfinished else "harvest one first"
            raise ValueError(f"{path} is not an activation store with a manifest.json: {reason}")
        return cls(path, artifacts.read_manifest(path / "manifest.json", KIND))

    @property
    @pinned_methods
    def mean(self) -> Float[Tensor, " width"]:
        """Mean of the training rows in raw space, float64."""
        return self._file(self.manifest["mean"]).get_tensor("mean")

    def n_blocks(self, split: str) -> int:
        return self._split(split)["n_blocks"]

    def n_rows(self, split: str) -> int:
        return self._split(split)["n_rows"]

    @pinned_methods
    def block(self, split: str, index: int) -> Float[Tensor, "block_rows width"]:
        """Block `index` of the split, in the store's dtype."""
        if not 0 <= index < self.n_blocks(split):
            raise ValueError(f"block {index} is not in {split} of {self.path}, which has {self.n_blocks(split)}")
        shard, within = divmod(index, self.config["shard_blocks"])
        start = within * self.block_rows
        return self._shard(split, shard).get_slice("activations")[start : start + self.block_rows]

    def batches(self, split: str, batch_size: int) -> Iterator[Float[Tensor, "batch width"]]:
        """All rows of the split once, in stored order, as fp32; the last batch may be short."""
        rows = torch.empty(0, self.width, dtype=torch.float32, device="cpu")  # not the caller's default
        for index in range(self.n_blocks(split)):
            *whole, rows = torch.cat([rows, self.block(split, index).float()]).split(batch_size)
            yield from whole
        yield rows

    def rows(self, split: str) -> Float[Tensor, "n_rows width"]:
        """All rows of the split in the store's dtype, in memory."""
        return torch.cat([self.block(split, index) for index in range(self.n_blocks(split))])

    @pinned_methods
    def contexts(self, split: str, n_blocks: int | None = None) -> Contexts:
        """The tokens that the rows of the split belong to, with their addresses; at least those of the first blocks."""
        n_shards = len(self._split(split)["shards"])
        if n_blocks is not None:  # so that the other shards need not be read to be checked
            n_shards = min(n_shards, -(-n_blocks // self.config["shard_blocks"]))
        shards = [self._shard(split, index) for index in range(n_shards)]
        tokens, documents, positions = (torch.cat([s.get_tensor(name) for s in shards]) for name in _ADDRESS)
        file = self._split(split)["documents"]
        _check_sha256(self.path / file["file"], file["sha256"])
        names = artifacts.read_as(self.path / file["file"], list[str])
        return Contexts(tokens, documents, positions, names)

    def _files(self, split: str) -> list[dict[str, Any]]:
        return [self._split(split)["documents"], *self._split(split)["shards"]]

    def _split(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        return self.manifest["splits"][split]

    def _shard(self, split: str, index: int) -> Any:
        return self._file(self._split(split)["shards"][index])

    def _file(self, file: dict[str, Any]) -> Any:
        """The open file (memory-mapped), checked against its sha256 the first time."""
        path = self.path / file["file"]
        with self._lock:
            if path not in self._open:
                _check_sha256(path, file["sha256"])
                try:
                    self._open[path] = safe_open(path, framework="pt")
                except SafetensorError as error:
                    raise ValueError(f"{path} is no safetensors file ({error}); {_REPAIR}") from None
            return self._open[path]


class _Job(NamedTuple):
    """One store under way."""

    config: HarvestConfig
    subject: Subject
    site: Site
    compiled: bool = False
    """Whether the forward pass is `capture(compiled=True)`: it decides bits, so the plan and the manifest say it."""

    @property
    def subject_dtype(self) -> str:
        """Precision of the forward pass, of which the plan and the manifest speak too."""
        return str(self.subject.dtype).removeprefix("torch.")

    @property
    def store_dtype(self) -> str:
        return "float32" if self.config.dtype == "float32" else "bfloat16"

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def first(self) -> int:
        """Position of the first token kept of each context."""
        return 0 if self.config.keep_first_token else 1

    @property
    def block_rows(self) -> int:
        return self.config.block_contexts * (self.config.context_length - self.first)


def _harvest(configs: list[HarvestConfig]) -> None:
    """Make the stores of configs that differ in `out` and `layer` alone."""
    started, config = time.perf_counter(), configs[0]
    plans = [_plan_under_way(Path(c.out)) for c in configs]
    dtype = _choose_dtype(configs, plans)
    subject = Subject.load(config.model, revision=config.revision, dtype=dtype, device=config.device)
    if config.context_length > subject.max_context:
        raise ValueError(
            f"context_length is {config.context_length}; {subject.name} reads at most {subject.max_context}: lower it"
        )
    jobs = [_Job(c, subject, subject.site(c.layer, c.location, c.revision)) for c in configs]
    for job in jobs:
        subject.site_width(job.site)  # a site without activations shows before the text is read
    sources = {
        "subject": subject.hash,
        "subject_config": subject.config_hash,
        "tokenizer": subject.tokenizer_hash,
        "corpus": corpus_hash(config.corpus),
    }
    for job, plan in zip(jobs, plans, strict=True):
        _go_on(job.out, plan, job.config, sources)
    found, text = _contexts(jobs[0])  # both splits at first: too little text shows before work
    _require_room(jobs, found)
    compiled = _choose_compiled(jobs, plans, found["train"])
    jobs = [job._replace(compiled=compiled) for job in jobs]
    for job, plan in zip(jobs, plans, strict=True):
        if plan is None:
            choices = {"compiled": compiled, "subject_dtype": dtype}
            artifacts.write_json(
                job.out / "plan.json", artifacts.manifest(PLAN_KIND, to_dict(job.config), sources, **choices)
            )
    splits = {split: _harvest_split(jobs, split, found[split]) for split in SPLITS}
    for i, job in enumerate(jobs):
        _finish(job, sources, text, {split: splits[split][i] for split in SPLITS})
    elapsed_s = time.perf_counter() - started
    for job in jobs:
        log.info("store %s is complete: activations of %s, after %.0f s", job.out, job.site, elapsed_s)


def _require_room(jobs: list[_Job], found: dict[str, Contexts]) -> None:
    """`ValueError` unless what is missing of the shards fits on the disk."""
    needed = 0
    for job in jobs:
        row_bytes = job.subject.site_width(job.site) * _DTYPES[job.store_dtype].itemsize
        for n_contexts, length in (contexts.tokens.shape for contexts in found.values()):
            needed += n_contexts * ((length - job.first) * row_bytes + 12 * length)
        needed -= sum(path.stat().st_size for path in job.out.glob("*/shard-*.safetensors"))
    if needed > (free := shutil.disk_usage(jobs[0].out).free):
        raise ValueError(
            f"the activations need {needed / 2**30:.2f} GiB of disk, but {free / 2**30:.2f} are free in {jobs[0].out}; "
            "free some, choose another out, or lower n_tokens"
        )


def _finish(
    job: _Job,
    sources: dict[str, str],
    text: dict[str, Any],
    splits: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]],
) -> None:
    """Write what is of the whole store, the manifest last."""
    sidecars = {split: found for split, (_, found) in splits.items()}
    facts = {
        "subject": job.subject.name,
        "site": dataclasses.asdict(job.site),
        "width": job.subject.site_width(job.site),
        "dtype": job.store_dtype,
        "subject_dtype": job.subject_dtype,
        "compiled": job.compiled,
        "text": text,
        "mean": _write_mean(job.out, sidecars["train"]),
        "norms": _norms([*sidecars["train"], *sidecars["held_out"]]),
        "splits": {split: entry for split, (entry, _) in splits.items()},
    }
    artifacts.write_json(job.out / "manifest.json", artifacts.manifest(KIND, to_dict(job.config), sources, **facts))


def _plan_under_way(out: Path) -> dict[str, Any] | None:
    """The plan of the harvest under way in `out`; None where none is, or one without a shard: it holds nothing."""
    if not (out / "plan.json").exists() or not any(out.rglob("shard-*")):
        return None
    return artifacts.read_manifest(out / "plan.json", PLAN_KIND)


def _go_on(out: Path, plan: dict[str, Any] | None, config: HarvestConfig, sources: dict[str, str]) -> None:
    """Refuse a harvest under way of something else; a killed one's leftovers are cleared away."""
    if plan is not None:
        _require_same(out, plan, config, sources)
        log.info("resuming the harvest in %s", out)
    for folder in (out, *(out / split for split in SPLITS)):
        for leftover in folder.glob(".*.*.tmp"):  # the lock is ours, so nobody else is writing
            leftover.unlink()


def _choose_dtype(configs: list[HarvestConfig], plans: list[dict[str, Any] | None]) -> str:
    """Precision that the subject runs in: as asked for; where that is auto, as a plan says, else the fastest here."""
    config = configs[0]
    if config.dtype != "auto":
        return config.dtype
    begun = {plan.get("subject_dtype", "bfloat16") for plan in plans if plan is not None}
    if len(begun) > 1:
        raise ValueError(
            f"{', '.join(c.out for c in configs)} were begun with the subject in {' and '.join(sorted(begun))}; "
            "harvest them apart"
        )
    return begun.pop() if begun else dtypes.fastest(resolve_device(config.device))


def _choose_compiled(jobs: list[_Job], plans: list[dict[str, Any] | None], found: Contexts) -> bool:
    """Whether to run the subject compiled: as a plan says, else where it pays and works; the log says why not."""
    config, subject = jobs[0].config, jobs[0].subject
    begun = {plan.get("compiled", False) for plan in plans if plan is not None}  # before 2026-11-25: no word, plain
    if len(begun) > 1:
        raise ValueError(f"of {', '.join(str(job.out) for job in jobs)} some were begun compiled; harvest them apart")
    n_rows = config.n_tokens + config.n_tokens_held_out
    least = COMPILE_FROM_TOKENS if subject.dtype == torch.bfloat16 else COMPILE_FROM_TOKENS_FP32
    pays = n_rows >= least and config.dtype != "float32" and subject.device.type == "cpu"
    wanted = begun.pop() if begun else pays
    if not wanted or not (problem := _compile(jobs, found.tokens[: config.block_contexts])):
        return wanted
    if any(plan is not None for plan in plans):
        raise ValueError(
            f"{jobs[0].out} was begun with {subject.name} compiled, and here that fails ({problem}); go on where it "
            f"works (torch.compile needs a C++ compiler), or choose another out"
        )
    log.warning("%s does not compile (%s); harvesting without, which is slower", subject.name, problem)
    return False


def _compile(jobs: list[_Job], tokens: Int[Tensor, "n ctx"]) -> str:
    """Compile the subject by a first forward pass; in a line why it cannot be used compiled, else an empty string."""
    subject, sites = jobs[0].subject, [job.site for job in jobs]
    if not subject.blocks_before(sites[-1]):
        return f"no block is known to be over before {sites[-1].location} of layer {sites[-1].layer}"
    started = time.perf_counter()
    try:
        fast = capture_block(subject, sites, tokens, compiled=True)[-1].float()
    except (RuntimeError, OSError) as error:  # whatever goes wrong in compiling is one of these
        log.debug("torch.compile failed", exc_info=True)
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    elapsed_s = time.perf_counter() - started
    plain = capture_block(subject, sites, tokens)[-1].float()
    difference = ((fast - plain).norm() / plain.norm()).item()
    log.info("compiled %s in %.0f s; activations differ by %.2g", subject.name, elapsed_s, difference)
    return "" if difference <= COMPILED_TOLERANCE else f"its activations are off by {difference:.2g}"


def _require_same(out: Path, made_by: dict[str, Any], config: HarvestConfig, sources: dict[str, str]) -> None:
    """`ValueError` naming the fields and sources in which a store differs from what is asked for now."""
    old, new = ({k: v for k, v in c.items() if k not in _FREE_FIELDS} for c in (made_by["config"], to_dict(config)))
    changed = changed_fields(old, new) + changed_fields({k: made_by["sources"].get(k) for k in sources}, sources)
    if changed:
        raise ValueError(
            f"{out} holds another harvest ({'; '.join(changed)}); choose another out, or go back to the old"
        )


def _local_corpus(config: HarvestConfig) -> dict[str, str]:
    """The corpus's hash where it is cheap to see whether it changed: a file of the user's that is still there."""
    there = is_local(config.corpus) and Path(config.corpus).expanduser().exists()
    return {"corpus": corpus_hash(config.corpus)} if there else {}


def _contexts(job: _Job) -> tuple[dict[str, Contexts], dict[str, Any]]:
    """The contexts of both splits: whole blocks, with at least the rows that the config asks for; facts of the text."""
    config = job.config
    n_rows = {"train": config.n_tokens, "held_out": config.n_tokens_held_out}
    return split_contexts(
        config.corpus,
        job.subject.tokenizer,
        context_length=config.context_length,
        n_contexts={split: -(-n_rows[split] // job.block_rows) * config.block_contexts for split in SPLITS},
        held_out_fraction=config.held_out_fraction,
        seed=config.seed,
        text_column=config.text_column,
    )


def _harvest_split(jobs: list[_Job], split: str, found: Contexts) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Write what is missing of one split; for each job its entry in the manifest, and the sidecars of its shards."""
    n_blocks = len(found.tokens) // jobs[0].config.block_contexts
    for job in jobs:
        artifacts.write_json(job.out / split / "documents.json", found.document_hashes)
    entries = []
    for job, sidecars in zip(jobs, _write_shards(jobs, split, found, n_blocks), strict=True):
        entry = {
            "n_blocks": n_blocks,
            "n_rows": n_blocks * job.block_rows,
            "n_contexts": len(found.tokens),
            "n_excluded": len(found.tokens) * job.first,
            "n_documents": len(found.document_hashes),
            "documents": _file_facts(job.out, job.out / split / "documents.json"),
            "shards": [{name: sidecar[name] for name in ("file", "sha256", "bytes", "n_rows")} for sidecar in sidecars],
        }
        entries.append((entry, sidecars))
    return entries


def _write_shards(jobs: list[_Job], split: str, found: Contexts, n_blocks: int) -> list[list[dict[str, Any]]]:
    """Of each job the sidecars of all shards of the split, after writing the shards that are missing."""
    config = jobs[0].config
    files = [f"{split}/shard-{i:05d}.safetensors" for i in range(-(-n_blocks // config.shard_blocks))]
    done = [{file: sidecar for file in files if (sidecar := _finished_sidecar(job.out, file))} for job in jobs]
    shard_of = {block: files[block // config.shard_blocks] for block in range(n_blocks)}
    todo = [block for block in range(n_blocks) if not all(shard_of[block] in have for have in done)]
    each, total = config.block_contexts * config.context_length, found.tokens.numel()
    shown = progress(todo, f"harvest {split}", "tok", total=total, each=each, start=total - len(todo) * each)
    started = time.perf_counter()
    for file, blocks in itertools.groupby(shown, key=lambda block: shard_of[block]):
        lacking = [i for i, have in enumerate(done) if file not in have]
        captured = [_block_tensors([jobs[i] for i in lacking], split, found, block) for block in blocks]
        for i, own in zip(lacking, zip(*captured, strict=True), strict=True):
            done[i][file] = _write_shard(jobs[i], file, list(own))
    elapsed_s = time.perf_counter() - started
    if todo:
        log.info("%s: %d tokens at %.0f tokens/s", split, len(todo) * each, len(todo) * each / elapsed_s)
    return [[have[file] for file in files] for have in done]


def _block_tensors(jobs: list[_Job], split: str, found: Contexts, block: int) -> list[dict[str, Tensor]]:
    """One forward pass; for each job `captured` [contexts, ctx, width] in the store's dtype, finite; the contexts."""
    config, subject = jobs[0].config, jobs[0].subject
    here = slice(block * config.block_contexts, (block + 1) * config.block_contexts)
    address = {name: getattr(found, name)[here] for name in _ADDRESS}
    captured = capture_block(subject, [job.site for job in jobs], found.tokens[here], compiled=jobs[0].compiled)
    captured = [activations.to(_DTYPES[jobs[0].store_dtype]) for activations in captured]
    for job, activations in zip(jobs, captured, strict=True):
        if not torch.isfinite(activations).all():
            context, token = (~torch.isfinite(activations)).any(dim=2).nonzero()[0].tolist()
            document = found.document_hashes[int(address["documents"][context, token])]
            raise ValueError(
                f"activations of {job.site} are not finite at {split} context {here.start + context}, token {token} "
                f"(document {document}, position {address['positions'][context, token]}); "
                "try dtype float32 or another layer"
            )
    return [{"captured": activations, **address} for activations in captured]


def capture_block(
    subject: Subject, sites: Sequence[Site], tokens: Int[Tensor, "n ctx"], *, compiled: bool = False
) -> list[Float[Tensor, "n ctx width"]]:
    return [found.cpu() for found in subject.capture_all(tokens, sites, compiled=compiled)]


def _write_shard(job: _Job, file: str, blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Write the blocks as one shard, then its sidecar, which is returned."""
    whole = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    captured = whole.pop("captured")
    rows = captured[:, job.first :].reshape(-1, captured.shape[2])
    payload = save({"activations": rows, **whole})  # as bytes, so that a full disk is Python's own OSError
    _write_bytes(job.out / file, payload)
    norms = captured.double().norm(dim=2)
    row_norms = norms[:, job.first :]
    sidecar = {
        "file": file,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "bytes": len(payload),
        "n_rows": len(rows),
        "n_contexts": len(captured),
        "sum": rows.double().sum(dim=0).tolist(),
        "norm_sum": row_norms.sum().item(),
        "first_norm_sum": norms[:, 0].sum().item(),
        "n_large": int((row_norms > LARGE_NORM * row_norms.median()).sum()),
    }
    artifacts.write_json((job.out / file).with_suffix(".json"), formats.sealed(sidecar))
    return sidecar


def _finished_sidecar(out: Path, file: str) -> dict[str, Any] | None:
    """The sidecar of a shard that is there and whole, else None: the shard is to be written (again)."""
    path = artifacts.inside(out, file)
    about = path.with_suffix(".json")
    if not (path.exists() and about.exists()):
        return None
    try:
        sidecar = artifacts.read_json(about)
        formats.typed(formats.ShardSidecar, sidecar)
        if sidecar["file"] != file or not formats.is_sealed(sidecar):
            raise ValueError(f"{about} is not as it was written")
        artifacts.check_file(path, sidecar, "it is of its sidecar")
        return sidecar
    except ValueError as error:
        log.warning("%s is damaged and is harvested again (%s)", path, error)
    return None


def _write_mean(out: Path, train: list[dict[str, Any]]) -> dict[str, Any]:
    total = np.sum([sidecar["sum"] for sidecar in train], axis=0)
    mean = torch.from_numpy(total / sum(sidecar["n_rows"] for sidecar in train))
    _write_bytes(out / "mean.safetensors", save({"mean": mean}))
    return _file_facts(out, out / "mean.safetensors")


def _norms(sidecars: list[dict[str, Any]]) -> dict[str, float]:
    """How far attention sinks stand out: mean norms of first tokens and of rows, and how many rows look like sinks."""
    names = ("first_norm_sum", "n_contexts", "norm_sum", "n_rows", "n_large")
    sums = {name: sum(sidecar[name] for sidecar in sidecars) for name in names}
    first, rows = sums["first_norm_sum"] / sums["n_contexts"], sums["norm_sum"] / sums["n_rows"]
    log.info("mean norm of the first token of a context %.4g, of the rows %.4g", first, rows)
    log.info("%d of %d rows are over %g times the median norm", sums["n_large"], sums["n_rows"], LARGE_NORM)
    return {"first_token_mean": first, "rows_mean": rows, "n_rows_large": sums["n_large"]}


def _file_facts(out: Path, path: Path) -> dict[str, Any]:
    return {"file": path.relative_to(out).as_posix(), **artifacts.file_facts(path)}


def _write_bytes(path: Path, payload: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(payload)

    artifacts.write_atomic(path, write)


def _check_sha256(path: Path, expected: str) -> None:
    if sha256_file(path) != expected:
        raise ValueError(f"{path} does not match the sha256 in the store's manifest; {_REPAIR}")
