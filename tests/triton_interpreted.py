"""The Triton kernels in Triton's interpreter, on the CPU, against the definition. Run by test_triton.py, not collected.

Tiles, stages and blocks are shrunk, so that small shapes cross every boundary: several stages, splits, row blocks,
column blocks, chunks of pairs, and buffers that overflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monosem.kernels import reference
from monosem.kernels import triton_step as kernel
from monosem.types import LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

assert kernel.INTERPRETED, "run with TRITON_INTERPRET=1, set before Triton is imported"

SPEC = LossSpec(k=5, mse_scale=0.7, auxk=8, auxk_coef=0.25)
EXACT = ("fp32", "tf32", "bf16")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIRST_LATENTS": 16, "GROWTH": 2, "SPLITS": 2, "GROUP": 64, "CHUNK": 16, "BLOCK": 32}.items():
        monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(kernel, "TILES", {p: kernel.Tile(16, 32, 16, 4, 2) for p in kernel.TILES})
    monkeypatch.setattr(kernel, "UNALIGNED_TILE", kernel.Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(kernel, "POOL_EXTRA", 8)


def make(n: int, d: int, batch: int, seed: int = 0) -> tuple[Tensor, Weights]:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(n, d, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = decoder + 0.1 * torch.randn(n, d, generator=g)
    weights = Weights(encoder, 0.1 * torch.randn(n, generator=g), decoder, 0.1 * torch.randn(d, generator=g))
    return torch.randn(batch, d, generator=g), weights


def whole_numbers(n: int, d: int, batch: int) -> tuple[Tensor, Weights]:
    """A case whose every sum is exact in any precision and order, with many ties."""
    g = torch.Generator().manual_seed(4)
    matrix = lambda *shape: torch.randint(-3, 4, shape, generator=g).float()  # noqa: E731
    return matrix(batch, d), Weights(matrix(n, d), matrix(n), matrix(n, d), matrix(d))


def double(weights: Weights) -> Weights:
    return Weights(*(w.double() for w in weights))


def assert_encodes_as_the_reference(x: Tensor, w: Weights, k: int, precision: str) -> SparseLatents:
    ours, truth = kernel.topk_encode(x, w, k, precision), reference.topk_encode(x.double(), double(w), k)
    active = truth.values > 0
    assert torch.equal(ours.values > 0, active)
    assert torch.equal(ours.indices[active], truth.indices[active])
    torch.testing.assert_close(ours.values.double(), truth.values, rtol=1e-5, atol=1e-6)
    return ours


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (33, 40, 3, 33), (150, 1, 5, 3)])
def test_topk_encode_is_the_reference(shape: tuple[int, int, int, int]) -> None:
    n, d, batch, k = shape
    assert_encodes_as_the_reference(*make(n, d, batch), k, "bf16")


def test_the_selecting_precision_changes_no_bit() -> None:
    x, w = make(77, 13, 19)
    results = [assert_encodes_as_the_reference(x, w, 5, precision) for precision in (*EXACT, "fp8")]
    for other in results[1:]:
        assert torch.equal(other.values, results[0].values) and torch.equal(other.indices, results[0].indices)


@pytest.mark.parametrize("precision", EXACT)
def test_bounds_hold_what_the_sweep_computes(precision: str) -> None:
    """The fp32 value of every latent lies between the bounds, which are not vacuous."""
    x, w = make(16, 40, 6)
    low, encoder = kernel._lowered(x, precision), kernel._lowered(w.encoder, precision)
    threshold = torch.full((6,), -torch.inf)
    found, overflowed = kernel._sweep(low, encoder, w.latent_bias, threshold, 3, precision, 0, 16)
    truth = (x.double() @ w.encoder.double().T + w.latent_bias).gather(1, found.latent.long())
    inside = found.upper > -torch.inf
    assert inside.sum() == 6 * 16 and not overflowed.any()
    assert (found.lower <= truth)[inside].all() and (truth <= found.upper)[inside].all()
    assert (found.upper - found.lower)[inside].max() < {"fp32": 0.001, "tf32": 0.05, "bf16": 0.3}[precision]


def test_equal_pre_activations_go_to_the_lower_index() -> None:
    assert_encodes_as_the_reference(*whole_numbers(100, 6, 10), 7, "bf16")


@pytest.mark.parametrize("bias", [0.0, 200.0])
def test_rows_with_more_candidates_than_fit_are_scored_exhaustively(
    bias: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = whole_numbers(120, 6, 4)
    w = w._replace(encoder=w.encoder[:1].repeat(120, 1), latent_bias=torch.full((120,), bias))
    seen: list[int] = []
    exhaustive = kernel._exhaustive

    def counted(x: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(x))
        return exhaustive(x, *rest)

    monkeypatch.setattr(kernel, "_exhaustive", counted)
    assert_encodes_as_the_reference(x, w, 3, "bf16")
    assert sum(seen) > 0


def test_ascending_pre_activations_overflow_every_buffer_and_stay_exact() -> None:
    """Later latents always beat earlier ones: no threshold helps, every row is done again."""
    x, w = make(150, 3, 2)
    w = w._replace(encoder=0.001 * w.encoder, latent_bias=torch.arange(150.0))
    assert_encodes_as_the_reference(x, w, 2, "bf16")


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scales_far_from_one_are_exact(scale: float) -> None:
    x, w = make(50, 20, 4)
    w = w._replace(latent_bias=w.latent_bias * scale, pre_bias=w.pre_bias * scale)
    ours = kernel.topk_encode(x * scale, w, 5)
    truth = reference.topk_encode((x * scale).double(), double(w), 5)
    assert torch.equal(ours.indices, truth.indices)
    torch.testing.assert_close(ours.values.double(), truth.values, rtol=1e-5, atol=0)


def assert_as_exact_as_dense(step: StepGradients, x: Tensor, w: Weights, spec: LossSpec, dead: Tensor) -> None:
    """Against fp64 truth, every parameter's gradient errs at most a little more than dense torch in fp32 does."""
    truth = reference.topk_gradients(x.double(), double(w), spec, dead)
    dense = reference.topk_gradients(x, w, spec, dead)
    size = max(g.norm() for g in truth.gradients)  # of what cancels in the pre_bias gradient
    for name, true, ours, theirs in zip(Weights._fields, truth.gradients, step.gradients, dense.gradients, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 2e-7 * size, name
    for name in ("loss", "mse", "auxiliary", "l0"):
        assert getattr(step, name).item() == pytest.approx(getattr(truth, name).item(), rel=1e-5, abs=1e-7), name
    assert torch.equal(step.n_fired, truth.n_fired)
    assert bool(step.auxk_dropped) == bool(truth.auxk_dropped)


@pytest.mark.parametrize("n_dead", [0, 4, 60])
@pytest.mark.parametrize("dense_ratio", [0, 32], ids=["sparse", "dense"])
def test_topk_gradients_err_no_more_than_dense_torch(
    n_dead: int, dense_ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "AUXK_DENSE_RATIO", dense_ratio)
    x, w = make(60, 13, 11)
    dead = torch.arange(60) % 60 < n_dead
    assert_as_exact_as_dense(kernel.topk_gradients(x, w, SPEC, dead), x, w, SPEC, dead)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (20, 40, 3, 20)])
def test_odd_shapes_have_right_gradients(shape: tuple[int, int, int, int]) -> None:
    n, d, batch, k = shape
    x, w = make(n, d, batch)
    spec, dead = LossSpec(k=k, mse_scale=1.0), torch.zeros(n, dtype=torch.bool)
    assert_as_exact_as_dense(kernel.topk_gradients(x, w, spec, dead), x, w, spec, dead)


def test_a_latent_active_on_every_token_is_summed_over_many_chunks() -> None:
    x, w = make(30, 5, 50)
    w.latent_bias[[3, 11]] += 100
    spec, dead = LossSpec(k=2, mse_scale=1.0), torch.zeros(30, dtype=torch.bool)
    step = kernel.topk_gradients(x, w, spec, dead)
    assert step.n_fired[3] == 50 and step.n_fired[11] == 50
    assert_as_exact_as_dense(step, x, w, spec, dead)


def test_dirty_memory_and_repetition_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "AUXK_DENSE_RATIO", 0)
    x, w = make(60, 13, 11)
    dead = torch.arange(60) < 20
    first = kernel.topk_gradients(x, w, SPEC, dead)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and the largest integer
    try:
        again = kernel.topk_gradients(x, w, SPEC, dead)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(first.gradients, again.gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert first[1:5] == again[1:5] and torch.equal(first.n_fired, again.n_fired)


def test_batch_rows_do_not_depend_on_their_neighbours() -> None:
    x, w = make(77, 13, 19)
    whole, alone = kernel.topk_encode(x, w, 5), kernel.topk_encode(x[17:18], w, 5)
    assert torch.equal(whole.values[17], alone.values[0]) and torch.equal(whole.indices[17], alone.indices[0])


@pytest.mark.parametrize("dense_ratio", [0, 32], ids=["sparse", "dense"])
def test_auxk_that_is_not_finite_is_dropped_whole_and_counted(
    dense_ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "AUXK_DENSE_RATIO", dense_ratio)
    x, w = make(20, 6, 1)  # one token: the error equals its batch mean, so L_aux divides by zero
    dead = torch.arange(20) < 10
    on = kernel.topk_gradients(x, w, SPEC, dead)
    off = kernel.topk_gradients(x, w, dataclasses.replace(SPEC, auxk=0), dead)
    assert on.auxk_dropped and on.loss == off.loss
    assert all(torch.equal(a, b) for a, b in zip(on.gradients, off.gradients, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_shows_in_its_row_and_in_the_loss(value: float) -> None:
    x, w = make(40, 6, 5)
    clean = kernel.topk_encode(x, w, 4)
    x[3, 2] = value
    dirty = kernel.topk_encode(x, w, 4)
    assert dirty.values[3].isnan().all() and torch.equal(dirty.values[[0, 1, 2, 4]], clean.values[[0, 1, 2, 4]])
    spec, dead = LossSpec(k=4, mse_scale=1.0), torch.zeros(40, dtype=torch.bool)
    assert kernel.topk_gradients(x, w, spec, dead).loss.isnan()
    w.latent_bias[1] = value
    assert kernel.topk_encode(x[:2], w, 4).values.isnan().all()


def test_decode_is_the_reference() -> None:
    x, w = make(40, 37, 6)
    latents = reference.topk_encode(x, w, 9)
    torch.testing.assert_close(kernel.decode(latents, w), reference.decode(latents, w), rtol=1e-5, atol=1e-5)
    empty = SparseLatents(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0), 40)
    assert torch.equal(kernel.decode(empty, w), w.pre_bias.expand(3, -1))


@pytest.mark.parametrize(("clip_norm", "average"), [(None, True), (0.1, False), (1e9, True)])
def test_apply_update_is_the_reference(clip_norm: float | None, average: bool) -> None:
    _, w = make(7, 40, 1)
    _, gradients = make(7, 40, 1, seed=5)
    moments = [Weights(*(0.1 * torch.rand(t.shape) for t in w)) for _ in range(3)]
    ours = OptimizerState(moments[0], moments[1], moments[2] if average else None)
    truth = OptimizerState(double(moments[0]), double(moments[1]), double(moments[2]) if average else None)
    w_true, update = double(w), UpdateSpec(step=4, lr=3e-3, ema=0.9, clip_norm=clip_norm)
    norm_true = reference.apply_update(w_true, double(gradients), truth, update)
    norm = kernel.apply_update(w, gradients, ours, update)
    assert norm.item() == pytest.approx(norm_true.item(), rel=1e-6)
    for mine, right in zip((w, *ours), (w_true, *truth), strict=True):
        if mine is not None and right is not None:
            for a, b in zip(mine, right, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-7)


def test_an_empty_batch_encodes_to_nothing_and_has_no_gradient() -> None:
    x, w = make(30, 6, 0)
    assert kernel.topk_encode(x, w, 4).values.shape == (0, 4)
    with pytest.raises(ValueError, match="batch is empty"):
        kernel.topk_gradients(x, w, LossSpec(k=4, mse_scale=1.0), torch.zeros(30, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.double(), w, 5), "x is torch.float64"),
        (lambda x, w: (x, w._replace(encoder=w.encoder.half()), 5), "encoder is torch.float16"),
        (lambda x, w: (x, w, 0), "k is 0"),
        (lambda x, w: (x, w, 91), "k is 91"),
        (lambda x, w: (x, w, 5, "int8"), "precision is 'int8'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change: Callable, message: str) -> None:
    x, w = make(90, 22, 3)
    with pytest.raises(ValueError, match=message) as caught:
        kernel.topk_encode(*change(x, w))
    assert "\n" not in str(caught.value)
