"""Every implementation against the dense fp64 definition: values, and the gradient of every parameter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monosem.kernels import reference, torch_sparse
from monosem.types import LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

SPEC = LossSpec(k=5, mse_scale=0.7, auxk=8, auxk_coef=0.25, sparsity_coef=0.3)
# tokens, d_model, n_latents, k, auxk, share of dead latents
SHAPES = [
    (1, 1, 1, 1, 1, 0.0),
    (19, 13, 77, 5, 8, 0.3),
    (64, 24, 33, 33, 4, 1.0),
    (7, 40, 129, 3, 500, 0.5),
    (50, 16, 64, 1, 0, 0.5),
]


def make(tokens: int, d_model: int, n_latents: int, seed: int = 0) -> tuple[torch.Tensor, Weights]:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(n_latents, d_model, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = decoder + 0.1 * torch.randn(n_latents, d_model, generator=g)
    weights = Weights(
        encoder, 0.1 * torch.randn(n_latents, generator=g), decoder, 0.1 * torch.randn(d_model, generator=g)
    )
    return torch.randn(tokens, d_model, generator=g), weights


def double(weights: Weights) -> Weights:
    return Weights(*(w.double() for w in weights))


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-9)).item()


def assert_as_good_as_dense_fp32(
    kernel: ModuleType, name: str, x: torch.Tensor, weights: Weights, *extra: object
) -> None:
    """Within twice what dense autograd itself loses in fp32, against the fp64 truth, for every output."""
    truth: StepGradients = getattr(reference, name)(x.double(), double(weights), *extra)
    dense: StepGradients = getattr(reference, name)(x, weights, *extra)
    got: StepGradients = getattr(kernel, name)(x, weights, *extra)
    for part in Weights._fields:
        allowed = 2 * relative_error(getattr(dense.gradients, part), getattr(truth.gradients, part)) + 1e-6
        assert relative_error(getattr(got.gradients, part), getattr(truth.gradients, part)) <= allowed, part
    for part in ("loss", "mse", "auxiliary", "l0"):
        assert getattr(got, part).item() == pytest.approx(getattr(truth, part).item(), rel=1e-5), part
    assert torch.equal(got.n_fired, truth.n_fired)
    assert bool(got.auxk_dropped) == bool(truth.auxk_dropped)


@pytest.mark.parametrize(("tokens", "d_model", "n_latents", "k", "auxk", "share_dead"), SHAPES)
def test_topk_gradients_agree_with_the_definition(
    tokens: int, d_model: int, n_latents: int, k: int, auxk: int, share_dead: float
) -> None:
    x, weights = make(tokens, d_model, n_latents)
    dead = torch.rand(n_latents, generator=torch.Generator().manual_seed(1)) < share_dead
    spec = dataclasses.replace(SPEC, k=k, auxk=auxk if tokens > 1 else 0)
    assert_as_good_as_dense_fp32(torch_sparse, "topk_gradients", x, weights, spec, dead)


@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES])
def test_relu_gradients_agree_with_the_definition(shape: tuple[int, int, int]) -> None:
    x, weights = make(*shape)
    assert_as_good_as_dense_fp32(torch_sparse, "relu_gradients", x, weights, SPEC)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.data())
def test_encode_and_decode_agree_at_any_shape(tokens: int, d_model: int, n_latents: int, data: st.DataObject) -> None:
    x, weights = make(tokens, d_model, n_latents)
    k = data.draw(st.integers(1, n_latents))
    want, got = reference.topk_encode(x, weights, k), torch_sparse.topk_encode(x, weights, k)
    torch.testing.assert_close(reference.dense(got), reference.dense(want))
    torch.testing.assert_close(torch_sparse.decode(got, weights), reference.decode(want, weights))
    want, got = reference.relu_encode(x, weights), torch_sparse.relu_encode(x, weights)
    torch.testing.assert_close(reference.dense(got), reference.dense(want))
    threshold = torch.randn(n_latents, generator=torch.Generator().manual_seed(3))
    want, got = (kernel.threshold_encode(x, weights, threshold) for kernel in (reference, torch_sparse))
    torch.testing.assert_close(reference.dense(got), reference.dense(want))
    assert (got.values[:, 1:] <= got.values[:, :-1]).all()


def test_threshold_encode_keeps_what_is_above_the_threshold_and_above_zero() -> None:
    x, weights = make(19, 13, 77)
    threshold = torch.linspace(-1, 2, 77)
    pre = reference.pre_activations(x, weights)
    kept = reference.dense(reference.threshold_encode(x, weights, threshold))
    assert torch.equal(kept, pre.where((pre > threshold) & (pre > 0), torch.zeros(())))


def some_latents(x: torch.Tensor, weights: Weights, seed: int = 5) -> SparseLatents:
    """Some positive pre-activations of each token, not equally many; other slots carry foreign indices."""
    kept = reference.relu_encode(x, weights)
    keep = (torch.rand(kept.values.shape, generator=torch.Generator().manual_seed(seed)) < 0.3) & (kept.values > 0)
    return kept._replace(values=kept.values.masked_fill(~keep, 0), indices=kept.indices.masked_fill(~keep, -(2**40)))


@pytest.mark.parametrize("kernel", [reference, torch_sparse])
@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES])
def test_sparse_gradients_are_what_autograd_says(shape: tuple[int, int, int], kernel: ModuleType) -> None:
    """A loss of the reconstruction and an L1 over the active values, with the choice of the latents held constant."""
    x, weights = make(*shape)
    latents = some_latents(x, weights)
    w = Weights(*(p.double().requires_grad_() for p in weights))
    z = reference.pre_activations(x.double(), w) * (reference.dense(latents) > 0)
    recons = z @ w.decoder + w.pre_bias
    ((recons - x).square().sum() + 0.7 * z.sum()).backward()
    d_recons = 2 * (recons.detach() - x)
    assert d_recons.dtype == torch.float64
    got = kernel.sparse_gradients(x, weights, latents, d_recons.float(), 0.7)
    for part in Weights._fields:
        assert relative_error(getattr(got, part), getattr(w, part).grad) <= 2e-6, part


def test_sparse_gradients_of_no_active_latent_reach_pre_bias_alone() -> None:
    x, weights = make(6, 5, 9)
    nothing = SparseLatents(torch.full((6, 3), 99), torch.zeros(6, 3), 9)
    got = torch_sparse.sparse_gradients(x, weights, nothing, x, 1.0)
    torch.testing.assert_close(got.pre_bias, x.sum(0))
    assert not any(g.any() for g in (got.encoder, got.latent_bias, got.decoder))


def test_the_reference_is_what_autograd_says_of_the_formula() -> None:
    """The definition against the loss written once more, in one line a term."""
    x, weights = make(11, 6, 20)
    w = Weights(*(p.double().requires_grad_() for p in weights))
    x = x.double()
    dead = torch.arange(20) < 9
    pre = (x - w.pre_bias) @ w.encoder.T + w.latent_bias
    z = torch.where(pre >= pre.topk(5, dim=1).values[:, -1:], pre, 0).relu()
    recons = z @ w.decoder + w.pre_bias
    e = (x - recons).detach()
    pre_dead = pre[:, :9]
    z_aux = torch.where(pre_dead >= pre_dead.topk(8, dim=1).values[:, -1:], pre_dead, 0).relu()
    l_aux = ((z_aux @ w.decoder[:9] - e) ** 2).mean() / ((e - e.mean(0)) ** 2).mean()
    (0.7 * ((recons - x) ** 2).mean() + 0.25 * l_aux).backward()
    got = reference.topk_gradients(x, double(weights), SPEC, dead).gradients
    for part in Weights._fields:
        torch.testing.assert_close(getattr(got, part), getattr(w, part).grad)


@pytest.mark.parametrize("kernel", [reference, torch_sparse])
def test_auxk_reaches_only_dead_latents_and_pre_bias(kernel: ModuleType) -> None:
    x, weights = make(19, 13, 77)
    dead = torch.arange(77) < 20
    on = kernel.topk_gradients(x, weights, SPEC, dead).gradients
    off = kernel.topk_gradients(x, weights, dataclasses.replace(SPEC, auxk=0), dead).gradients
    changed = (on.encoder - off.encoder).abs().sum(1) + (on.decoder - off.decoder).abs().sum(1)
    assert (changed[:20] > 0).any() and (changed[20:] < 1e-7).all()
    assert not torch.allclose(on.pre_bias, off.pre_bias)


@pytest.mark.parametrize("kernel", [reference, torch_sparse])
def test_auxk_without_dead_latents_is_zero_with_no_gradient(kernel: ModuleType) -> None:
    x, weights = make(19, 13, 77)
    none = torch.zeros(77, dtype=torch.bool)
    on = kernel.topk_gradients(x, weights, SPEC, none)
    off = kernel.topk_gradients(x, weights, dataclasses.replace(SPEC, auxk=0), none)
    assert on.auxiliary == 0
    assert all(torch.equal(a, b) for a, b in zip(on.gradients, off.gradients, strict=True))


@pytest.mark.parametrize("kernel", [reference, torch_sparse])
def test_auxk_that_is_not_finite_is_dropped_whole_and_counted(kernel: ModuleType) -> None:
    x, weights = make(1, 13, 77)  # one token: the error equals its batch mean, so L_aux divides by zero
    dead = torch.arange(77) < 20
    on = kernel.topk_gradients(x, weights, SPEC, dead)
    off = kernel.topk_gradients(x, weights, dataclasses.replace(SPEC, auxk=0), dead)
    assert on.auxk_dropped and on.loss == off.loss
    assert all(torch.equal(a, b) for a, b in zip(on.gradients, off.gradients, strict=True))


@pytest.mark.parametrize("kernel", [reference, torch_sparse])
def test_fired_means_above_the_threshold_not_chosen(kernel: ModuleType) -> None:
    x, weights = make(19, 13, 77)
    weights = weights._replace(latent_bias=weights.latent_bias - 100)
    out = kernel.topk_gradients(x, weights, SPEC, torch.zeros(77, dtype=torch.bool))
    assert out.n_fired.sum() == 0 and out.l0 == 0


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_apply_update_agrees_with_the_definition(clip_norm: float | None) -> None:
    outcomes = []
    for kernel in (reference, torch_sparse):
        _, weights = make(1, 40, 129)
        zeros = lambda w=weights: Weights(*(torch.zeros_like(p) for p in w))  # noqa: E731
        optimizer = OptimizerState(zeros(), zeros(), zeros())
        norms = []
        for step in range(1, 4):
            _, gradients = make(1, 40, 129, seed=step)
            norms.append(kernel.apply_update(weights, gradients, optimizer, UpdateSpec(step, 0.01, 0.9, clip_norm)))
        assert optimizer.average is not None
        outcomes.append([*weights, *optimizer.first, *optimizer.second, *optimizer.average, *norms])
    for want, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.allclose(outcomes[1][2].norm(dim=1), torch.ones(129))


def test_apply_update_takes_no_step_along_a_latent() -> None:
    """A decoder gradient parallel to its latents is projected away whole."""
    _, weights = make(1, 8, 5)
    before = weights.decoder.clone()
    first, second, gradients = (Weights(*(torch.zeros_like(w) for w in weights)) for _ in range(3))
    gradients = gradients._replace(decoder=3 * before)
    norm = torch_sparse.apply_update(weights, gradients, OptimizerState(first, second, None), UpdateSpec(1, 0.0))
    assert norm < 1e-5
    torch.testing.assert_close(weights.decoder, before)


def test_bf16_selection_keeps_fp32_values() -> None:
    x, weights = make(30, 64, 200)
    got = torch_sparse.topk_encode(x, weights, 8, "bf16")
    exact = reference.pre_activations(x, weights).gather(1, got.indices).relu()
    torch.testing.assert_close(got.values, exact)


def test_decode_of_no_active_latents_is_pre_bias() -> None:
    _, weights = make(1, 6, 20)
    empty = SparseLatents(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0), 20)
    assert torch.equal(torch_sparse.decode(empty, weights), weights.pre_bias.expand(3, -1))


def test_gradients_are_the_same_bits_every_time() -> None:
    x, weights = make(200, 48, 300)
    dead = torch.arange(300) < 100
    first = torch_sparse.topk_gradients(x, weights, SPEC, dead).gradients
    for _ in range(3):
        again = torch_sparse.topk_gradients(x, weights, SPEC, dead).gradients
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_precision_that_torch_does_not_have_is_refused() -> None:
    x, weights = make(3, 4, 8)
    with pytest.raises(ValueError, match="int8 needs impl=native"):
        torch_sparse.topk_encode(x, weights, 2, "int8")


def test_the_first_square_roots_of_a_process_are_those_of_the_next() -> None:
    """Two threads that call MKL first would get some of another rounding, in one process of five."""
    script = """
import torch
torch.set_num_threads(2)
from monosem import kernels
x = torch.rand(3072, generator=torch.Generator().manual_seed(0))
assert x.sqrt().equal(x.sqrt())
"""
    for _ in range(5):
        subprocess.run([sys.executable, "-c", script], check=True)
