"""Every activation function: the promises that all of them make, then a planted check of what each one is."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import monosem
from monosem import config, step, variants
from monosem.checkpoint import load_state, save_state
from monosem.config import TrainConfig, activation_facts, activations
from monosem.kernels import native_is_built, reference, select, torch_sparse
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.types import Extras, LossSpec, SparseLatents, StepGradients, Weights
from monosem.variants import batch_topk, gated, jumprelu, matryoshka, prolu

CPU = torch.device("cpu")
# tokens, d_model, n_latents, k, auxk, share of dead latents
SHAPES = [(19, 13, 77, 5, 8, 0.3), (64, 24, 33, 8, 4, 1.0), (7, 40, 129, 3, 500, 0.5), (50, 16, 64, 1, 0, 0.0)]
OPTIONS: dict[str, list[dict[str, float]]] = {
    "prolu": [{"ste": 0}, {"ste": 1}],
    "jumprelu": [{"bandwidth": 0.1, "initial_threshold": 0.05}],
    "matryoshka": [{"n_prefixes": 1}, {"n_prefixes": 4}],
}
"""Where the defaults would leave a term without effect on small random data, or another value is another path."""

LEARNS_FAST = {"jumprelu": {"bandwidth": 0.1, "initial_threshold": 1.0}, "matryoshka": {"n_prefixes": 2.0}}
"""So that a few dozen small batches move thresholds, and the smallest prefix can hold what is planted."""

CASES = [(name, options) for name in activations() for options in OPTIONS.get(name, [{}])]


def make(
    name: str, tokens: int, d_model: int, n_latents: int, options: dict[str, float] | None = None, seed: int = 0
) -> tuple[Tensor, Weights, Extras]:
    """Random fp64 x, weights, and extras moved a little from their start."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    decoder = torch.nn.functional.normalize(draw(n_latents, d_model))
    bias, pre_bias = 0.1 * draw(n_latents) - 0.2, 0.1 * draw(d_model)
    weights = Weights(decoder + 0.1 * draw(n_latents, d_model), bias, decoder, pre_bias)
    extras = variants.initial_extras(name, weights, options)
    moved = {key: e + 0.1 * draw(*e.shape) if e.ndim else e + 0.5 for key, e in extras.items()}
    return draw(tokens, d_model), weights, moved


def spec_of(name: str, options: dict[str, float] | None = None, **changes: Any) -> LossSpec:
    values = {"k": 5, "mse_scale": 0.7, "auxk": 0, "auxk_coef": 0.25, "sparsity_coef": 0.3, **changes}
    if "auxk" not in activation_facts(name).uses:
        values["auxk"] = 0
    return LossSpec(**values, options=variants.resolve_options(name, options or {}, 64))


def some_dead(n_latents: int, share: float) -> Tensor:
    return torch.rand(n_latents, generator=torch.Generator().manual_seed(1)) < share


def single(x: Tensor, weights: Weights, extras: Extras) -> tuple[Tensor, Weights, Extras]:
    """The same in fp32."""
    return x.float(), Weights(*(w.float() for w in weights)), {name: e.float() for name, e in extras.items()}


def assert_same_step(got: StepGradients, want: StepGradients, **tolerance: Any) -> None:
    named = {**want.gradients._asdict(), **want.extras, **want.buffers}
    found = {**got.gradients._asdict(), **got.extras, **got.buffers}
    assert found.keys() == named.keys()
    for name in named:
        torch.testing.assert_close(found[name], named[name].to(found[name].dtype), msg=f"{name} differs", **tolerance)
    for name in ("loss", "mse", "auxiliary", "l0"):
        assert getattr(got, name).item() == pytest.approx(getattr(want, name).item(), rel=1e-5), name
    assert torch.equal(got.n_fired, want.n_fired)
    assert bool(got.auxk_dropped) == bool(want.auxk_dropped)


# Every one of them


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_autograd_of_the_dense_loss(
    name: str, options: dict[str, float], shape: tuple[int, int, int, int, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, d_model, n_latents, k, auxk, share_dead = shape
    monkeypatch.setattr(torch_sparse, "_CHUNK_ELEMENTS", 10 * n_latents)  # several chunks of rows, the last one short
    x, weights, extras = make(name, tokens, d_model, n_latents, options)
    spec, dead = spec_of(name, options, k=k, auxk=auxk), some_dead(n_latents, share_dead)
    want = variants.gradients(name, x, weights, extras, spec, dead, reference)
    got = variants.gradients(name, x, weights, extras, spec, dead, torch_sparse)
    assert_same_step(got, want)
    assert all(g.abs().sum() > 0 for g in [*got.gradients, *got.extras.values()])


@pytest.mark.skipif(not native_is_built(), reason="the compiled kernels are not built")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_of_the_compiled_kernels_agree(name: str, options: dict[str, float]) -> None:
    _, native = select("native", CPU)
    x, weights, extras = make(name, 40, 24, 130, options)
    spec, dead = spec_of(name, options, auxk=8), some_dead(130, 0.3)
    want = variants.gradients(name, x, weights, extras, spec, dead, reference)
    x, weights, extras = single(x, weights, extras)
    got = variants.gradients(name, x, weights, extras, spec, dead, native)
    assert_same_step(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_are_the_same_bits_every_time(name: str, options: dict[str, float]) -> None:
    x, weights, extras = single(*make(name, 90, 24, 130, options))
    spec, dead = spec_of(name, options, auxk=8), some_dead(130, 0.3)
    first, again = (variants.gradients(name, x, weights, extras, spec, dead, torch_sparse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.gradients, again.gradients, strict=True))
    assert all(torch.equal(first.extras[n], again.extras[n]) for n in first.extras)


@pytest.mark.parametrize("name", activations())
@settings(max_examples=15)
@given(tokens=st.integers(1, 20), d_model=st.integers(1, 20), n_latents=st.integers(1, 60), seed=st.integers(0, 99))
def test_encode_gives_positive_values_and_agrees_with_the_definition(
    name: str, tokens: int, d_model: int, n_latents: int, seed: int
) -> None:
    options = OPTIONS["jumprelu"][0] if name == "jumprelu" else {}
    x, weights, extras = make(name, tokens, d_model, n_latents, options, seed)
    k = min(3, n_latents)
    want, got = (variants.encode(name, x, weights, extras, k, kernel) for kernel in (reference, torch_sparse))
    assert (got.values >= 0).all()
    torch.testing.assert_close(reference.dense(got), reference.dense(want))


@pytest.mark.parametrize("name", [n for n in activations() if "threshold" not in variants.extra_names(n)])
def test_encode_is_what_the_loss_decodes(name: str) -> None:
    """Trained and used, the latents are the same (those with a choice over the batch are not: that is their point)."""
    options = OPTIONS["jumprelu"][0] if name == "jumprelu" else {}
    x, weights, extras = make(name, 30, 13, 77, options)
    spec = spec_of(name, options)
    z = variants.load(name).loss(x, weights, extras, spec, some_dead(77, 0)).z
    torch.testing.assert_close(reference.dense(variants.encode(name, x, weights, extras, spec.k)), z)


@pytest.mark.parametrize("name", [n for n in activations() if "auxk" in activation_facts(n).uses])
def test_auxk_reaches_dead_latents_and_is_dropped_whole_when_not_finite(name: str) -> None:
    x, weights, extras = make(name, 1, 13, 77)  # one token: its error is its batch's mean, so L_aux divides by zero
    on = variants.gradients(name, x, weights, extras, spec_of(name, auxk=8), some_dead(77, 0.5), torch_sparse)
    off = variants.gradients(name, x, weights, extras, spec_of(name), some_dead(77, 0.5), torch_sparse)
    assert on.auxk_dropped and on.loss == off.loss
    assert all(torch.equal(a, b) for a, b in zip(on.gradients, off.gradients, strict=True))


def planted_stream(seed: int = 0) -> Any:
    """Endless batches of 64 tokens, each a sum of 3 of 24 directions in 16 dimensions, normalised."""
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(99)))
    g = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.rand(64, 24, generator=g).topk(3).indices
        sizes = torch.zeros(64, 24).scatter(1, chosen, 1 + torch.rand(64, 3, generator=g))
        yield normalize(sizes @ directions)[0]


def started(name: str, **changes: Any) -> tuple[step.TrainState, step.Recipe]:
    """A training state on the planted stream, and its recipe."""
    sample = torch.cat([x for x, _ in zip(planted_stream(), range(8), strict=False)])
    settings: dict[str, Any] = {"n_latents": 64, "batch_size": 64, "n_tokens": 64 * 60, "lr": 1e-2}
    if "k" in activation_facts(name).uses:
        settings["k"] = 3
    if "sparsity_coef" in activation_facts(name).uses:
        settings["sparsity_coef"] = 0.01
    settings["activation_options"] = LEARNS_FAST.get(name, {})
    c = TrainConfig(out="", store="", activation=name, **{**settings, **changes})
    weights = initial_weights(sample, c.n_latents, c.k, name, c.activation_options, tied=True, seed=0)
    extras = variants.initial_extras(name, weights, c.activation_options)
    recipe = step.recipe(c, 16, 1 / sample.var(0).mean().item())
    return step.TrainState.new(weights, extras, ema=True), recipe


def advance(state: step.TrainState, recipe: step.Recipe, n_steps: int) -> list[StepGradients]:
    """Steps of training from where the state is in the planted stream."""
    stream, outs = planted_stream(), []
    for _ in range(state.step):
        next(stream)
    for _ in range(n_steps):
        outs.append(step.advance(state, next(stream), recipe, torch_sparse)[0])
    return outs


@pytest.mark.parametrize("name", activations())
def test_sixty_steps_lower_the_loss_and_move_every_extra(name: str) -> None:
    state, recipe = started(name)
    before = {key: value.clone() for key, value in state.extras.values.items()}
    outs = advance(state, recipe, 60)
    assert outs[-1].loss < 0.5 * outs[0].loss
    assert all((value != before[key]).any() for key, value in state.extras.values.items())
    assert state.extras.average is not None and state.extras.average.keys() == before.keys()


STATE_FACTS: dict[str, Any] = {
    "ema": True,
    "stream": {"n_batches": 5, "seed": 0, "batch_size": 4, "window_blocks": 1, "source": "none"},
    "elapsed_s": 1.0,
    "work": {"kernel_s": 1.0, "product_s": None, "auxk_pairs": 0},
    "selection": {"precision": "fp32", "missed_at_step": None},
    "bits_depend_on": {"impl": "torch", "threads": 1, "device": "cpu", "torch": "2"},
    "metrics": {"bytes": 0, "sha256": "0" * 64},
}
"""What a run says of its state beside the recipe."""


@pytest.mark.parametrize("name", activations())
def test_saved_and_resumed_training_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, recipe = started(name, clip_norm=0.5)
    advance(whole, recipe, 12)
    cut, _ = started(name, clip_norm=0.5)
    advance(cut, recipe, 5)
    save_state(tmp_path, cut, {**STATE_FACTS, "recipe": dataclasses.asdict(recipe)})
    found = load_state(tmp_path, CPU)
    assert found is not None
    resumed, facts = found
    advance(resumed, step.Recipe(**facts["recipe"]), 7)
    for part in ("weights", "optimizer", "extras"):
        want, got = flat(getattr(whole, part)), flat(getattr(resumed, part))
        assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want), part
    assert torch.equal(whole.tokens_since_fired, resumed.tokens_since_fired)


def flat(part: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(part, Tensor):
        return {prefix: part}
    items = part.items() if isinstance(part, dict) else part._asdict().items()
    return {key: value for name, p in items for key, value in flat(p, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("name", activations())
def test_released_autoencoder_round_trips_and_encodes_the_same(name: str, tmp_path: Path) -> None:
    state, recipe = started(name)
    advance(state, recipe, 5)
    saved = Autoencoder(AutoencoderConfig(16, 64, 3, name), state.weights, None, state.extras.values)
    saved.save(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    assert loaded.config.activation == name and loaded.extras.keys() == saved.extras.keys()
    assert all(torch.equal(loaded.extras[key], value) for key, value in saved.extras.items())
    x = next(planted_stream(seed=1))
    assert torch.equal(reference.dense(loaded.encode(x)), reference.dense(saved.encode(x)))


def test_an_autoencoder_without_its_extras_is_refused() -> None:
    _, weights, _ = make("gated", 1, 4, 8)
    with pytest.raises(ValueError, match=r"the extras have shapes {}; activation=gated needs {'r_mag': \(8,\)"):
        Autoencoder(AutoencoderConfig(4, 8, 2, "gated"), weights)


@pytest.mark.parametrize("name", activations())
def test_encode_at_another_k_keeps_the_k_largest_of_each_token(name: str) -> None:
    x, weights, extras = make(name, 30, 13, 77)
    model = Autoencoder(AutoencoderConfig(13, 77, 4, name), weights, None, extras)
    keeps_k = "k" in activation_facts(name).uses
    everything = torch_sparse.relu_encode(x, weights) if keeps_k else model.encode(x)
    for k in (1, 9, 77):
        got = reference.dense(model.encode(x, k=k))
        want = reference.keep_top(reference.dense(everything), k)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", activations())
def test_encode_at_a_threshold_where_that_has_a_meaning(name: str) -> None:
    x, weights, extras = make(name, 30, 13, 77)
    model = Autoencoder(AutoencoderConfig(13, 77, 4, name), weights, None, extras)
    if "k" not in activation_facts(name).uses:
        with pytest.raises(ValueError, match=f"threshold has no meaning with activation={name}"):
            model.encode(x, threshold=0.5)
        return
    pre = reference.pre_activations(x, weights)
    torch.testing.assert_close(reference.dense(model.encode(x, threshold=0.5)), torch.where(pre > 0.5, pre, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0; give a number of latents from 1 to 77"),
        ({"k": 78}, "k is 78; give a number of latents from 1 to 77"),
        ({"threshold": -1.0}, "threshold is -1.0; give a number of at least 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"k": 2, "threshold": 0.5}, "k is 2 and threshold is 0.5; give one of them"),
    ],
)
def test_encode_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    x, weights, _ = make("topk", 3, 13, 77)
    with pytest.raises(ValueError, match=message):
        Autoencoder(AutoencoderConfig(13, 77, 4), weights).encode(x, **arguments)


@pytest.mark.parametrize("name", activations())
def test_facts_that_the_config_reads_are_those_of_the_module(name: str) -> None:
    module, facts = variants.load(name), activation_facts(name)
    assert facts.uses == module.USES
    assert facts.options == module.OPTIONS
    assert set(facts.uses) <= {"k", "auxk", "sparsity_coef"}
    assert module.__doc__ and all(option in module.__doc__ for option in facts.options)
    for option, (default, least, most) in facts.options.items():
        assert least <= default <= most and option not in TrainConfig.__dataclass_fields__


@pytest.mark.parametrize("name", activations())
def test_every_one_has_a_page_in_the_docs(name: str) -> None:
    docs = Path(__file__).parents[1] / "docs" / "activations"
    page, index = (docs / f"{name}.md").read_text("utf-8"), (docs / "README.md").read_text("utf-8")
    assert f"({name}.md)" in index
    assert all(f"`{option}`" in page for option in activation_facts(name).options)


DROPPED_IN = '''
"""Tanh-shrunk ReLU: an activation function nobody has heard of."""
from monosem import losses
from monosem.kernels import reference
from monosem.types import LossTerms

USES = ("sparsity_coef",)
OPTIONS = {"softness": (1.0, 0.1, 10.0)}

def loss(x, w, extras, spec, dead):
    z = reference.pre_activations(x, w).relu().mul(spec.options["softness"]).tanh()
    mse = losses.mse(z @ w.decoder + w.pre_bias, x, spec.mse_scale)
    return LossTerms(mse + spec.sparsity_coef * losses.l1(z), mse, losses.l1(z), z)

def encode(x, weights, extras, k, kernel):
    latents = kernel.relu_encode(x, weights)
    return latents._replace(values=latents.values.tanh())
'''

TRAIN_IT = """
import dataclasses, torch
import monosem
from monosem import step, variants
from monosem.config import TrainConfig, activations
from monosem.kernels import torch_sparse
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights
assert "softrelu" in activations()
config = TrainConfig(out="", store="", n_latents=32, activation="softrelu", sparsity_coef=0.01, lr=1e-2,
                     activation_options={"softness": 2.0})
x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
weights = initial_weights(x, 32, config.k, "softrelu", tied=True, seed=0)
state, recipe = step.TrainState.new(weights, ema=True), step.recipe(config, 8, 1.0)
losses = [step.advance(state, x, recipe, torch_sparse)[0].loss.item() for _ in range(40)]
assert losses[-1] < 0.5 * losses[0], losses
model = Autoencoder(AutoencoderConfig(8, 32, config.k, "softrelu"), state.weights)
assert model.decode(model.encode(x)).shape == x.shape
try:
    TrainConfig(out="", store="", activation="softrelu", activation_options={"softness": 20.0})
except ValueError as error:
    print(error)
"""


def test_one_file_dropped_in_is_one_more_activation_function(tmp_path: Path) -> None:
    """A copy of the package with a file more, and not another edit, trains it."""
    package = Path(monosem.__file__).parent
    shutil.copytree(package, tmp_path / "monosem", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "monosem" / "variants" / "softrelu.py").write_text(DROPPED_IN, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRAIN_IT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "softness is 20; give a number from 0.1 to 10\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_options": {"ste": 1}}, "activation=topk has no option ste; it has none"),
        ({"activation": "prolu", "activation_options": {"sto": 1}}, "activation=prolu has no option sto; it has ste"),
        ({"activation": "prolu", "activation_options": {"ste": 0.5}}, "ste is 0.5; give a whole number from 0 to 1"),
        ({"activation": "prolu", "activation_options": {"ste": 2}}, "ste is 2; give a whole number from 0 to 1"),
        ({"activation": "jumprelu", "activation_options": {"bandwidth": 0}}, "bandwidth is 0; give a number from"),
        ({"activation": "gated", "auxk": 4}, "auxk has no effect with activation=gated; leave it unset"),
        ({"activation": "jumprelu", "k": 4}, "k has no effect with activation=jumprelu; leave it at 32"),
        ({"activation": "batch_topk", "sparsity_coef": 0.1}, "sparsity_coef has no effect with activation=batch_topk"),
        ({"activation": "multi_topk", "k": 9, "n_latents": 8}, "k is 9 but there are only 8 latents"),
    ],
)
def test_config_refuses_what_has_no_effect(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(out="", store="", **changes)


def test_an_unknown_activation_function_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"activation is '__init__'; choose one of batch_topk, .*topk"):
        variants.load("__init__")
    assert {"topk", "relu", "prolu", "gated", "jumprelu", "batch_topk", "multi_topk", "matryoshka"} <= set(
        activations()
    )
    assert all((config.VARIANTS / f"{name}.py").exists() for name in activations())


# What each one is


def test_prolu_passes_m_itself_where_both_m_and_m_plus_bias_are_positive() -> None:
    m, bias = torch.tensor([[2.0, 2.0, -1.0, 0.5, 0.5]]), torch.tensor([[-1.0, -3.0, 5.0, 1.0, -0.5]])
    assert prolu.ProLU.apply(m, bias, 0).tolist() == [[2.0, 0.0, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("ste", "d_m", "d_bias"), [(0, [3.0, 0, 0, 3.0], [3.0, 0, 0, 3.0]), (1, [9, 0, 0, 4.5], [6, 0, 0, 1.5])]
)
def test_prolu_gradient_rules(ste: int, d_m: list[float], d_bias: list[float]) -> None:
    """g = 3: the ReLU rule gives g and g, the STE rule g (1 + m) and g m, wherever z > 0."""
    m = torch.tensor([2.0, 2.0, -1.0, 0.5], requires_grad=True)
    bias = torch.tensor([-1.0, -3.0, 5.0, 1.0], requires_grad=True)
    (3 * prolu.ProLU.apply(m, bias, ste).sum()).backward()
    assert m.grad is not None and m.grad.tolist() == d_m
    assert bias.grad is not None and bias.grad.tolist() == d_bias


def test_gated_with_extras_at_zero_and_no_bias_is_relu() -> None:
    x, weights, _ = make("gated", 20, 13, 77)
    weights = weights._replace(latent_bias=torch.zeros_like(weights.latent_bias))
    extras = variants.initial_extras("gated", weights)
    got = reference.dense(variants.encode("gated", x, weights, extras, 1))
    torch.testing.assert_close(got, reference.pre_activations(x, weights).relu())


def test_gated_price_and_auxiliary_term_do_not_touch_magnitudes_or_the_decoder() -> None:
    """Only mse reaches decoder, r_mag and mag_bias: their gradients are those without the other two terms."""
    x, weights, extras = make("gated", 20, 13, 77)
    spec = spec_of("gated")
    got = reference.differentiate(gated.loss, x, weights, extras, spec, some_dead(77, 0))

    def mse_alone(*arguments: Any) -> Any:
        terms = gated.loss(*arguments)
        return terms._replace(loss=terms.mse + 0 * terms.loss)

    alone = reference.differentiate(mse_alone, x, weights, extras, spec, some_dead(77, 0))
    torch.testing.assert_close(got.gradients.decoder, alone.gradients.decoder)
    assert all(torch.allclose(got.extras[name], alone.extras[name]) for name in ("r_mag", "mag_bias"))
    assert alone.gradients.latent_bias.abs().max() == 0 and got.gradients.latent_bias.abs().max() > 0


def test_jumprelu_gradients_are_those_of_the_kernel_estimate() -> None:
    """bandwidth 0.5: of p = 0.2, 0.9, 1.2, 3 two are within 0.25 of theta = 1."""
    p = torch.tensor([0.2, 0.9, 1.2, 3.0], requires_grad=True)
    theta = torch.ones(4, requires_grad=True)
    z, count = jumprelu.JumpReLU.apply(p, theta, 0.5), jumprelu.Step.apply(p, theta, 0.5)
    torch.testing.assert_close(z, torch.tensor([0, 0, 1.2, 3.0]))
    assert count.tolist() == [0, 0, 1, 1]
    d_p, d_theta = torch.autograd.grad(z.sum(), [p, theta])
    assert d_p.tolist() == [0, 0, 1, 1] and d_theta.tolist() == [0, -2, -2, 0]
    d_p, d_theta = torch.autograd.grad(7 * count.sum(), [p, theta], allow_unused=True)
    assert d_p is None and d_theta.tolist() == [0, -14, -14, 0]


def test_jumprelu_estimates_the_slope_of_the_expected_loss() -> None:
    """Many p uniform on [0, 2]: E ||z||_0 = 1 - theta / 2 and E z = 1 - theta^2 / 4 at theta = 0.8."""
    p = 2 * torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    theta = torch.full_like(p, 0.8, requires_grad=True)
    for function, slope in ((jumprelu.Step, -0.5), (jumprelu.JumpReLU, -0.4)):
        (d_theta,) = torch.autograd.grad(function.apply(p, theta, 0.2).mean(), [theta])
        assert d_theta.sum().item() == pytest.approx(slope, rel=0.02)


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_batch_topk_keeps_exactly_the_b_k_largest_positive(tokens: int, n_latents: int, k: int, seed: int) -> None:
    x, weights, _ = make("batch_topk", tokens, 6, n_latents, seed=seed)
    k = min(k, n_latents)
    z = reference.dense(batch_topk.select(x, weights, spec_of("batch_topk", k=k), torch_sparse))
    pre = reference.pre_activations(x, weights).relu()
    n_kept = min(tokens * k, int((pre > 0).sum()))
    assert (z > 0).sum() == n_kept
    torch.testing.assert_close(z[z > 0], pre[z > 0])
    if n_kept:
        assert pre[z == 0].numel() == 0 or pre[z == 0].max() <= z[z > 0].min()


def test_batch_topk_finds_all_latents_of_a_token_that_takes_the_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token 100 times the others: it keeps far more than the 4k first looked at."""
    x, weights, _ = make("batch_topk", 20, 12, 80)
    x[3] *= 100
    widths = []

    def counting(x: Tensor, weights: Weights, k: int, precision: str = "auto") -> SparseLatents:
        widths.append(k)
        return torch_sparse.topk_encode(x, weights, k, precision)

    kernel = ModuleType("kernel")
    kernel.topk_encode = counting  # type: ignore[attr-defined]
    latents = batch_topk.select(x, weights, spec_of("batch_topk", k=2), kernel)
    assert widths == [8, 16, 32, 64] and (latents.values[3] > 0).sum() > 30 and (latents.values > 0).sum() == 40


def test_batch_topk_threshold_is_the_running_mean_of_the_smallest_kept() -> None:
    start, kept = torch.tensor(0.0), torch.tensor([[3.0, 0.0], [2.0, 0.0]])
    first = batch_topk.moved(start, kept)
    assert first == 2.0
    assert batch_topk.moved(first, kept + 1).item() == pytest.approx(0.9 * 2 + 0.1 * 1)
    assert batch_topk.moved(first, torch.zeros(2, 2)) == 2.0


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_threshold_gives_about_k_latents_a_token_on_fresh_batches(name: str) -> None:
    state, recipe = started(name)
    assert all(out.l0 == 3 for out in advance(state, recipe, 60))
    fresh = torch.cat([x for x, _ in zip(planted_stream(seed=1), range(16), strict=False)])
    active = (step.encode(fresh, state.weights, state.extras.values, recipe, torch_sparse).values > 0).sum(1).float()
    assert active.mean().item() == pytest.approx(3, rel=0.25) and active.std() > 0.1


def test_multi_topk_counts_only_the_k_latents() -> None:
    x, weights, extras = make("multi_topk", 30, 13, 77)
    dead = some_dead(77, 0)
    got = variants.gradients("multi_topk", x, weights, extras, spec_of("multi_topk", k=4), dead, torch_sparse)
    assert got.n_fired.sum() == 30 * 4 and got.l0 == 4
    top = variants.gradients("topk", x, weights, extras, spec_of("topk", k=4), dead, torch_sparse)
    assert got.mse == pytest.approx(top.mse.item()) and got.loss > got.mse and torch.equal(got.n_fired, top.n_fired)


def test_multi_topk_gradient_is_that_of_two_topk_losses() -> None:
    x, weights, extras = make("multi_topk", 30, 13, 77)
    dead = some_dead(77, 0)
    got = variants.gradients("multi_topk", x, weights, extras, spec_of("multi_topk", k=4), dead, torch_sparse)
    narrow, wide = (reference.topk_gradients(x, weights, spec_of("topk", k=k), dead).gradients for k in (4, 16))
    for g, a, b in zip(got.gradients, narrow, wide, strict=True):
        torch.testing.assert_close(g, a + b / 8)


def test_matryoshka_prefixes_halve_and_too_many_are_refused() -> None:
    assert matryoshka.prefixes(96, {"n_prefixes": 5}) == [6, 12, 24, 48, 96]
    with pytest.raises(ValueError, match="n_prefixes is 5, too many halvings of 8 latents; give at most 4"):
        step.recipe(TrainConfig(out="", store="", activation="matryoshka", n_latents=8, k=2), 4, 1.0)


def test_matryoshka_with_one_prefix_is_batch_topk() -> None:
    x, weights, extras = make("matryoshka", 30, 13, 77)
    dead, one = some_dead(77, 0.3), {"n_prefixes": 1.0}
    got = variants.gradients("matryoshka", x, weights, extras, spec_of("matryoshka", one, auxk=6), dead, torch_sparse)
    want = variants.gradients("batch_topk", x, weights, extras, spec_of("batch_topk", auxk=6), dead, torch_sparse)
    assert_same_step(got, want)


def test_matryoshka_early_latents_learn_to_do_without_the_late_ones() -> None:
    """After training, the first half of the latents reconstructs far better than that of a BatchTopK's."""
    nmse = {}
    x = torch.cat([x for x, _ in zip(planted_stream(seed=1), range(8), strict=False)])
    for name in ("batch_topk", "matryoshka"):
        state, recipe = started(name)
        advance(state, recipe, 60)
        z = reference.dense(batch_topk.select(x, state.weights, recipe.loss_spec(1), torch_sparse))
        recons = z[:, :32] @ state.weights.decoder[:32] + state.weights.pre_bias
        nmse[name] = ((recons - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert nmse["matryoshka"] < 0.7 * nmse["batch_topk"]
