"""A worker that harvests: one function a library, each turning chunks of tokens into activations of one layer.

    python -m benchmarks.streams monosem-bf16 '{"folder": "...", "tokens": "tokens.npy", "layer": 22, ...}'

Everybody reads the same model folder and the same tokens. The mean absolute activation is what `loss` carries, as a
check that all harvest the same thing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.serving import Batches, Channel, serve


class Job(NamedTuple):
    """What is to be harvested. `tokens` is a .npy file [contexts, context_length]; `device` is cpu or cuda."""

    folder: str
    tokens: str
    layer: int
    contexts: int
    device: str


ABOUT = {
    "monosem": "`activations.LiveSource`, the forward pass of a harvest: leaves the model after the site. "
    "Its default is what is faster here.",
    "monosem-compiled": "`activations.capture_block(compiled=True)`, the forward pass of a large harvest on a CPU: "
    "the blocks before the site go through torch.compile, before the timed chunks (20 s, later 3 s).",
    "sae-lens": "`ActivationsStore.get_raw_llm_batch` on `AutoModelForCausalLM` and a tokenised dataset: leaves the "
    "model after the site, copies into fp32. Its default is the dtype of the checkpoint, fp32 here.",
    "sparsify": "The forward pass of `Trainer.fit`: `AutoModel` with a hook, all layers, no logits. Its default off "
    "CUDA is the dtype of the checkpoint, fp32 here.",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
OURS_HARVEST = tuple(f"{library}-{dtype}" for library in ("monosem", "monosem-compiled") for dtype in DTYPES)
NAMES = tuple(f"{library}-{dtype}" for library in ABOUT for dtype in DTYPES)


def split(name: str) -> tuple[str, str]:
    """("sae-lens", "bfloat16") of "sae-lens-bf16"."""
    library, _, dtype = name.rpartition("-")
    return library, DTYPES[dtype]


def main(name: str, job: Job) -> None:
    """Serve chunks of `name` until the parent has enough."""
    library, dtype = split(name)

    def run(channel: Channel) -> None:
        chunks = list(torch.from_numpy(np.load(job.tokens)).split(job.contexts))
        HARVESTS[library](job, dtype, Batches(channel, chunks, job.device))

    serve(run)


def harvest_ours(job: Job, dtype: str, batches: Batches) -> None:
    """A `LiveSource` over all tokens, read block by block."""
    from monosem.stream import LiveSource
    from monosem.subject import Subject
    from monosem.tokens import Contexts

    subject = Subject.load(job.folder, dtype=dtype, device=job.device)
    tokens = torch.cat(batches.batches).to(torch.int32)
    nowhere = torch.zeros_like(tokens)
    found = Contexts(tokens, nowhere, nowhere, [])
    source = LiveSource(subject, subject.site(job.layer), found, block_contexts=job.contexts, keep_first_token=True)
    for i, _ in enumerate(batches):
        _note(batches, source.block(i % source.n_blocks))


def harvest_compiled(job: Job, dtype: str, batches: Batches) -> None:
    """The forward pass of a large harvest, chunk by chunk."""
    from monosem.activations import capture_block
    from monosem.subject import Subject

    subject = Subject.load(job.folder, dtype=dtype, device=job.device)
    for chunk in batches:
        _note(batches, *capture_block(subject, [subject.site(job.layer)], chunk, compiled=True))


def harvest_sae_lens(job: Job, dtype: str, batches: Batches) -> None:
    """Its `ActivationsStore`, which reads the same tokens from a dataset, in the same order."""
    from datasets import Dataset
    from sae_lens.load_model import load_model  # type: ignore[import-not-found]
    from sae_lens.training.activations_store import ActivationsStore  # type: ignore[import-not-found]

    hook = f"model.layers.{job.layer}"
    options = {"dtype": getattr(torch, dtype), "local_files_only": True}
    model = load_model("AutoModelForCausalLM", job.folder, job.device, options, [hook])
    tokens = torch.cat(batches.batches)
    width = model.model.config.hidden_size
    store = ActivationsStore(
        model=model, dataset=Dataset.from_dict({"input_ids": tokens.tolist()}), streaming=False, hook_name=hook,
        hook_head_index=None, context_size=tokens.shape[1], d_in=width, n_batches_in_buffer=2, total_training_tokens=1,
        store_batch_size_prompts=job.contexts, train_batch_size_tokens=job.contexts * tokens.shape[1],
        prepend_bos=False, normalize_activations="none", device=torch.device(job.device), dtype="float32",
    )  # fmt: skip
    for _ in batches:
        _note(batches, store.get_raw_llm_batch()[0])


def harvest_sparsify(job: Job, dtype: str, batches: Batches) -> None:
    """As `Trainer.fit` reads activations: a hook on the block, the whole model run, contexts flattened."""
    import sparsify  # type: ignore[import-not-found]  # noqa: F401  (importing it may change torch's settings)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(job.folder, dtype=getattr(torch, dtype), local_files_only=True).to(job.device)
    model.requires_grad_(False)
    torch.set_float32_matmul_precision("high")  # as Trainer.fit does
    seen: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: object, outputs: object) -> None:
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert isinstance(first, Tensor)
        seen.append(first.flatten(0, 1))

    model.get_submodule(f"layers.{job.layer}").register_forward_hook(hook)
    for chunk in batches:
        model(chunk.long().to(job.device))
        _note(batches, seen.pop())


HARVESTS: dict[str, Callable[[Job, str, Batches], None]] = {
    "monosem": harvest_ours,
    "monosem-compiled": harvest_compiled,
    "sae-lens": harvest_sae_lens,
    "sparsify": harvest_sparsify,
}


def _note(batches: Batches, found: Tensor) -> None:
    batches.loss = found.float().abs().mean()


if __name__ == "__main__":
    main(sys.argv[1], Job(**json.loads(sys.argv[2])))
