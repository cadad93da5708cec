"""A worker that trains: one function an implementation, each a training loop over batches handed out by the parent.

    python -m benchmarks.steps IMPL '{"n_latents": 16384, "d_model": 768, "k": 32, "batch": 4096, "device": "cpu"}'

Everybody gets the same activations, fp32 parameters and Adam at the same learning rate. A peer runs its own public
training function; what it does and lacks stands in environments.PEERS.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from benchmarks.serving import Batches, Channel, activations, serve

LR = 1e-4
EPSILON = 6.25e-10  # Adam's, of the recipe (Gao et al. 2024, appendix A)
N_BATCHES = 4
EMA = 0.999
DEAD_FRACTION = 0.1
_RECALL_ROWS = 256
_FOREVER = 10**6  # steps


class Shape(NamedTuple):
    """What is to be trained. `device` is cpu or cuda."""

    n_latents: int
    d_model: int
    k: int
    batch: int
    device: str


OURS = {
    "native-auto": ("native", "auto"),
    "native-fp32": ("native", "fp32"),
    "native-bf16": ("native", "bf16"),
    "native-int8": ("native", "int8"),
    "torch": ("torch", "fp32"),
    "triton-fp32": ("triton", "fp32"),
    "triton-tf32": ("triton", "tf32"),
    "triton-bf16": ("triton", "bf16"),
    "triton-fp8": ("triton", "fp8"),
}
"""Name in the report -> (implementation, precision of the product that selects)."""

VARIANTS = {
    "ema": "with the moving average of the weights",
    "auxk": "with 10% of the latents dead, modelled by AuxK",
}
"""`NAME+VARIANT`, for ours."""


def main(name: str, shape: Shape) -> None:
    """Serve steps of `name` until the parent has enough."""

    def run(channel: Channel) -> None:
        torch.manual_seed(0)
        batches = Batches(channel, activations(shape.batch, shape.d_model, N_BATCHES, shape.device), shape.device)
        base = name.partition("+")[0]
        train = train_ours if base in OURS else PEER_LOOPS[base]
        train(name, shape, batches)

    serve(run)


def train_ours(name: str, shape: Shape, batches: Batches) -> None:
    """Our recipe at its defaults, through `step.advance` as in training; refuses to start unless its parity holds."""
    from benchmarks import parity
    from monosem import __version__, config, losses, step

    base, *variants = name.split("+")
    impl, precision = OURS[base]
    kernel = kernel_named(impl, shape.device)
    parity.check(kernel, precision, shape.device)

    x = batches.batches[0]
    settings: Any = {"ema": EMA if "ema" in variants else 0.0, "lr": LR}
    train_config = config.TrainConfig(
        out="", store="", n_latents=shape.n_latents, k=shape.k, n_tokens=shape.batch * _FOREVER,
        batch_size=shape.batch, dead_tokens_threshold=shape.batch * _FOREVER, **settings,
    )  # fmt: skip
    recipe = step.recipe(train_config, shape.d_model, losses.mse_scale(x))
    recipe = dataclasses.replace(recipe, precision=precision)
    state = step.TrainState.new(_weights(shape, x), ema=recipe.ema > 0)
    dead = torch.zeros(0, dtype=torch.int64)
    if "auxk" in variants:
        dead = torch.randperm(shape.n_latents)[: int(DEAD_FRACTION * shape.n_latents)].to(shape.device)
        state.weights.encoder[dead] *= 0.3  # pre-activations too small for the top k, yet half of them positive
    batches.facts = {"monosem": __version__, "auxk": recipe.auxk}
    if impl == "native":
        from monosem import _native

        batches.facts["level"] = _native.level()
        batches.facts["precision"] = kernel.fastest_precision() if precision == "auto" else precision
        batches.parts = _native.timings
    batches.answer = lambda request: {"recall": recall(kernel, state.weights, x, shape.k, precision)}
    for x in batches:
        state.tokens_since_fired[dead] = recipe.dead_tokens_threshold
        batches.loss = step.advance(state, x, recipe, kernel)[0].loss


def kernel_named(impl: str, device: str = "cpu") -> ModuleType:
    """Our kernels of that name; `ValueError` where they do not run."""
    from monosem import kernels

    return kernels.select(impl, torch.device(device))[1]


def recall(kernel: ModuleType, weights: Any, x: Tensor, k: int, precision: str) -> float:
    """Share of the true top k (by fp64 pre-activations, of 256 rows) that `kernel` selects."""
    x = x[:_RECALL_ROWS]
    centred = x.double() - weights.pre_bias.double()
    pre = torch.empty(len(x), len(weights.latent_bias), dtype=torch.float64, device=x.device)
    for rows in torch.arange(len(weights.latent_bias), device=x.device).split(4096):
        pre[:, rows] = centred @ weights.encoder[rows].double().T + weights.latent_bias[rows].double()
    true = pre.topk(k, dim=1).indices
    chosen = kernel.topk_encode(x, weights, k, precision).indices
    return (true.unsqueeze(2) == chosen.unsqueeze(1)).any(2).double().mean().item()


def train_naive(name: str, shape: Shape, batches: Batches) -> None:
    """What one would write first: dense autograd, torch's Adam, projection, unit norm, dead counters."""
    first = batches.batches[0]
    encoder, bias, decoder, pre_bias = parameters = [w.requires_grad_() for w in _weights(shape, first)]
    adam = torch.optim.Adam(parameters, lr=LR, eps=EPSILON)
    tokens_since_fired = torch.zeros(shape.n_latents, dtype=torch.int64, device=shape.device)
    for x in batches:
        pre_activations = (x - pre_bias) @ encoder.T + bias
        top = pre_activations.topk(shape.k, dim=1, sorted=False)
        z = torch.zeros_like(pre_activations).scatter(1, top.indices, top.values.relu())
        loss = (z @ decoder + pre_bias - x).square().mean()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True)
            fired = torch.zeros(shape.n_latents, dtype=torch.bool, device=shape.device)
            fired[top.indices[top.values > 1e-3]] = True
            tokens_since_fired.add_(len(x)).masked_fill_(fired, 0)
        batches.loss = loss.detach()


def train_sparsify(name: str, shape: Shape, batches: Batches) -> None:
    """`Trainer.fit` on a "model" whose one submodule outputs the batch that its "tokens" stand for."""
    from sparsify.config import SparseCoderConfig, TrainConfig  # type: ignore[import-not-found]
    from sparsify.trainer import Trainer  # type: ignore[import-not-found]

    class Source(nn.Module):
        device = torch.device(shape.device)
        dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Identity()
            self.now = torch.zeros(1, 1, shape.d_model)

        @property
        def base_model(self) -> nn.Module:
            return self

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.site(self.now)

    class Tokens(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return _FOREVER

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            model.now = next(batches)[None]
            return {"input_ids": torch.zeros(shape.batch, dtype=torch.int64)}

    model = Source()
    coder = SparseCoderConfig(num_latents=shape.n_latents, k=shape.k)
    options = {"auxk_alpha": 1 / 32, "lr": LR, "lr_warmup_steps": 0, "log_to_wandb": False, "save_every": _FOREVER + 1}
    trainer = Trainer(
        TrainConfig(coder, batch_size=1, optimizer="adam", hookpoints=["site"], **options), Tokens(), model
    )

    def note_loss(module: nn.Module, inputs: Any, output: Any) -> None:
        batches.loss = output.fvu.detach()

    trainer.saes["site"].register_forward_hook(note_loss)
    trainer.fit()


def train_sae_lens(name: str, shape: Shape, batches: Batches) -> None:
    """`SAETrainer.fit` with `batches` as its data provider."""
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=shape.d_model, d_sae=shape.n_latents, k=shape.k, device=shape.device)
    )
    settings = SAETrainerConfig(
        total_training_samples=shape.batch * _FOREVER,
        train_batch_size_samples=shape.batch,
        lr=LR,
        lr_end=LR,
        device=shape.device,
    )
    trainer = SAETrainer(settings, sae, batches)
    step = trainer.step

    def step_and_note_loss(x: Tensor) -> Any:
        output = step(x)
        batches.loss = output.loss.detach()
        return output

    trainer.step = step_and_note_loss
    trainer.fit()


def train_dictionary_learning(name: str, shape: Shape, batches: Batches) -> None:
    """`TopKTrainer.update`, from step 1 on: step 0 also takes a geometric median."""
    stub("nnsight")
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    trainer = TopKTrainer(
        steps=_FOREVER, activation_dim=shape.d_model, dict_size=shape.n_latents, k=shape.k, layer=0, lm_name="none",
        lr=LR, warmup_steps=1, seed=0, device=shape.device,
    )  # fmt: skip
    trainer.ae.b_dec.data = batches.batches[0].mean(0)
    for i, x in enumerate(batches, start=1):
        batches.loss = trainer.update(i, x)


def train_overcomplete(name: str, shape: Shape, batches: Batches) -> None:
    """`train_sae` with `batches` as its data loader."""
    stub("torchvision", "cv2", "PIL", "skimage", "matplotlib", "matplotlib.pyplot", "matplotlib.colors")
    from overcomplete.sae import TopKSAE, train_sae  # type: ignore[import-not-found]

    sae = TopKSAE(shape.d_model, nb_concepts=shape.n_latents, top_k=shape.k, device=shape.device)
    adam = torch.optim.Adam(sae.parameters(), lr=LR)

    def criterion(x: Tensor, recons: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        loss = (x - recons).square().mean()
        batches.loss = loss.detach()
        return loss

    train_sae(sae, batches, criterion, adam, nb_epochs=1, monitoring=0, device=shape.device)


PEER_LOOPS: dict[str, Callable[[str, Shape, Batches], None]] = {
    "sparsify": train_sparsify,
    "sae-lens": train_sae_lens,
    "dictionary-learning": train_dictionary_learning,
    "overcomplete": train_overcomplete,
    "naive": train_naive,
}


def stub(*modules: str) -> None:
    """Let a peer import what its training step never uses (plots, vision models, notebooks) without installing it."""
    for module in modules:
        sys.modules.setdefault(module, MagicMock(__spec__=ModuleSpec(module, None), __path__=[]))


def _weights(shape: Shape, x: Tensor) -> Any:
    """A tied start: random unit directions, pre_bias the mean; (encoder, latent_bias, decoder, pre_bias)."""
    decoder = torch.randn(shape.n_latents, shape.d_model, generator=torch.Generator().manual_seed(0))
    decoder = (decoder / decoder.norm(dim=1, keepdim=True)).to(shape.device)
    found = (decoder.clone(), torch.zeros(shape.n_latents, device=shape.device), decoder, x.mean(0))
    if "monosem" not in sys.modules:
        return found
    from monosem.types import Weights

    return Weights(*found)


if __name__ == "__main__":
    main(sys.argv[1], Shape(**json.loads(sys.argv[2])))
