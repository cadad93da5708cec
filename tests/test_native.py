"""The compiled kernels against the definition, at every dispatch level of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from monosem.kernels import native_is_built, reference
from monosem.types import LossSpec, OptimizerState, SparseLatents, StepGradients, UpdateSpec, Weights

if not native_is_built() and "CI" not in os.environ:
    pytest.skip("monosem._native is not in this install", allow_module_level=True)

from monosem import _native
from monosem.kernels import native

LEVELS = _native.levels()
PRECISIONS = ["fp32", "bf16", "int8"]
SHAPES = [  # n_latents, d_model, batch, k
    (77, 13, 19, 5),
    (1000, 64, 100, 32),
    (333, 100, 50, 10),
    (40, 1, 7, 40),
    (1, 3, 2, 1),
    (515, 33, 1, 7),
    (2048, 130, 64, 64),
]


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_level(request.param)
    yield request.param
    _native.set_level("auto")


def make_weights(n: int, d: int, seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(n, d, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = decoder + 0.05 * torch.randn(n, d, generator=g)
    return Weights(encoder, 0.1 * torch.randn(n, generator=g), decoder, 0.1 * torch.randn(d, generator=g))


def make_case(n: int, d: int, batch: int, seed: int = 0) -> tuple[Weights, Tensor]:
    return make_weights(n, d, seed), torch.randn(batch, d, generator=torch.Generator().manual_seed(seed + 1))


def double(weights: Weights) -> Weights:
    return Weights(*(w.double() for w in weights))


def clone(weights: Weights) -> Weights:
    return Weights(*(w.clone() for w in weights))


def some_dead(n: int, n_dead: int) -> Tensor:
    dead = torch.zeros(n, dtype=torch.bool)
    dead[torch.randperm(n, generator=torch.Generator().manual_seed(2))[:n_dead]] = True
    return dead


def assert_as_exact_as_dense(step: StepGradients, x: Tensor, w: Weights, spec: LossSpec, dead: Tensor) -> None:
    """Against fp64 truth, every parameter's gradient errs at most a little more than dense torch in fp32 does."""
    truth = reference.topk_gradients(x.double(), double(w), spec, dead)
    dense = reference.topk_gradients(x, w, spec, dead)
    assert torch.equal(step.n_fired, truth.n_fired)
    size = max(g.norm() for g in truth.gradients)  # of what cancels in the pre_bias gradient
    for name, true, ours, theirs in zip(Weights._fields, truth.gradients, step.gradients, dense.gradients, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * size, name
    for name in ("loss", "mse", "auxiliary", "l0"):
        assert getattr(step, name).item() == pytest.approx(getattr(truth, name).item(), rel=1e-5, abs=1e-7), name
    assert step.auxk_dropped.item() == truth.auxk_dropped.item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_encode_is_the_reference(shape: tuple[int, int, int, int], precision: str) -> None:
    n, d, batch, k = shape
    w, x = make_case(n, d, batch)
    ours, truth = native.topk_encode(x, w, k, precision), reference.topk_encode(x.double(), double(w), k)
    active = truth.values > 0
    assert torch.equal(ours.values > 0, active)
    assert torch.equal(ours.indices[active], truth.indices[active])
    torch.testing.assert_close(ours.values.double(), truth.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("auxk", [0, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_gradients_err_no_more_than_dense_torch(shape: tuple[int, int, int, int], auxk: int) -> None:
    n, d, batch, k = shape
    w, x = make_case(n, d, batch)
    spec = LossSpec(k=k, mse_scale=0.7, auxk=auxk, precision="bf16")
    for n_dead in {0, min(n, auxk // 2), n // 3, n} if auxk else {0}:
        dead = some_dead(n, n_dead)
        assert_as_exact_as_dense(native.topk_gradients(x, w, spec, dead), x, w, spec, dead)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_is_right(level: str, data: st.DataObject) -> None:
    n, d, batch = (data.draw(st.integers(1, top), name) for name, top in (("n", 150), ("d", 70), ("batch", 30)))
    k, auxk = data.draw(st.integers(1, n), "k"), data.draw(st.integers(0, 2 * n), "auxk")
    w, x = make_case(n, d, batch, seed=data.draw(st.integers(0, 9), "seed"))
    dead = some_dead(n, data.draw(st.integers(0, n), "n_dead"))
    spec = LossSpec(k=k, mse_scale=1.3, auxk=auxk, precision=data.draw(st.sampled_from(PRECISIONS), "precision"))
    if batch > 1:  # with one row the error's variance is 0 and AuxK is dropped; tested apart
        assert_as_exact_as_dense(native.topk_gradients(x, w, spec, dead), x, w, spec, dead)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_selecting_precision_changes_no_bit(outliers: bool) -> None:
    w, x = make_case(3000, 96, 130)
    if outliers:  # a few dimensions far above the rest, as language models have: coarse steps for int8
        x[:, :3] *= 30
    dead = some_dead(3000, 400)
    spec = LossSpec(k=24, mse_scale=1.0, auxk=48)
    exact = native.topk_gradients(x, w, spec, dead)
    for precision in ("auto", "bf16", "int8"):
        assert_same_bits(exact, native.topk_gradients(x, w, dataclasses.replace(spec, precision=precision), dead))


def test_threads_and_dirty_scratch_memory_change_no_bit() -> None:
    w, x = make_case(1500, 70, 111)
    dead, spec = some_dead(1500, 200), LossSpec(k=20, mse_scale=1.0, auxk=40, precision="bf16")
    steps = []
    for n_threads, byte in ((1, 0), (2, 255), (3, 255), (2, 127)):
        with so_many_threads(n_threads):
            _native.fill_workspace(byte)
            steps.append(native.topk_gradients(x, w, spec, dead))
    for step in steps[1:]:
        assert_same_bits(steps[0], step)


def assert_same_bits(a: StepGradients, b: StepGradients) -> None:
    for ours, theirs in zip(a.gradients, b.gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert a[1:4] == b[1:4]
    assert torch.equal(a.n_fired, b.n_fired)


def test_batch_rows_do_not_depend_on_their_neighbours() -> None:
    w, x = make_case(700, 50, 90)
    whole = native.topk_encode(x, w, 12)
    alone = native.topk_encode(x[41:42], w, 12)
    assert torch.equal(whole.values[41], alone.values[0])
    assert torch.equal(whole.indices[41], alone.indices[0])


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_warm_thresholds_change_no_bit(precision: str, n_threads: int) -> None:
    """Rows after rows of another kind, whose thresholds say nothing about theirs, against rows that start cold."""
    w, x = make_case(1200, 32, 60)
    high = 4 * w.decoder[:60] + 0.1 * x  # one latent each: their k-th largest is low for their norm
    low = x - w.decoder.sum(0)
    batches = [x, high, 100 * x, torch.cat([x, low, high]), torch.zeros_like(x), x.abs()]

    def encode(batch: Tensor, warm: bool) -> tuple[SparseLatents, int]:
        if not warm:
            _native.release_workspace()
        latents, stats = native._topk_encode(batch, w, 10, precision)
        return latents, stats["n_rerun"]

    with so_many_threads(n_threads):
        cold = [encode(batch, warm=False) for batch in batches]
        n_rerun = 0
        for (expected, _), batch in zip(cold, batches, strict=True):
            encode(x, warm=True)
            found, again = encode(batch, warm=True)
            n_rerun += again
            assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
    assert n_threads > 1 or n_rerun > 0  # of several threads, it depends on the load which starts from which rows


@contextlib.contextmanager
def so_many_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def some_latents(x: Tensor, w: Weights, seed: int = 5) -> SparseLatents:
    """Some positive pre-activations of each token, not equally many; other slots carry foreign indices."""
    kept = reference.relu_encode(x, w)
    keep = (torch.rand(kept.values.shape, generator=torch.Generator().manual_seed(seed)) < 0.3) & (kept.values > 0)
    return kept._replace(values=kept.values.masked_fill(~keep, 0), indices=kept.indices.masked_fill(~keep, -(2**40)))


@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES])
def test_sparse_gradients_err_no_more_than_dense_torch(shape: tuple[int, int, int]) -> None:
    w, x = make_case(*shape)
    latents, d_recons = some_latents(x, w), torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    ours = native.sparse_gradients(x, w, latents, d_recons, 0.3)
    wide = latents._replace(values=latents.values.double())
    truth = reference.sparse_gradients(x.double(), double(w), wide, d_recons.double(), 0.3)
    dense = reference.sparse_gradients(x, w, latents, d_recons, 0.3)
    for name, mine, true, theirs in zip(Weights._fields, ours, truth, dense, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 2e-7 * max(g.norm() for g in truth), name


def test_sparse_gradients_are_those_of_the_topk_step_and_of_any_number_of_threads() -> None:
    w, x = make_case(700, 50, 90)
    spec, dead = LossSpec(k=12, mse_scale=1.0), some_dead(700, 0)
    latents = native.topk_encode(x, w, 12)
    d_recons = (native.decode(latents, w) - x) * (2 / x.numel())
    wanted = native.topk_gradients(x, w, spec, dead).gradients
    threads, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            _native.fill_workspace(255)
            found.append(native.sparse_gradients(x, w, latents, d_recons))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*found, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0])
@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES])
def test_threshold_encode_is_the_reference(shape: tuple[int, int, int], shift: float, precision: str) -> None:
    """From a few active latents a token to half of them, with rows that exceed what a sparse row may have."""
    w, x = make_case(*shape)
    w = w._replace(latent_bias=w.latent_bias + shift)
    x[len(x) // 2 + 1 :: 3] *= 20
    threshold = 0.5 * torch.randn(shape[0], generator=torch.Generator().manual_seed(3))
    ours = native.threshold_encode(x, w, threshold, precision)
    truth = reference.threshold_encode(x.double(), double(w), threshold.double())
    assert ours.values.shape == truth.values.shape
    torch.testing.assert_close(reference.dense(ours).double(), reference.dense(truth), rtol=1e-5, atol=1e-4)
    assert (ours.values[:, 1:] <= ours.values[:, :-1]).all()


def test_the_selecting_precision_changes_no_bit_of_threshold_encode() -> None:
    w, x = make_case(3000, 48, 100)
    w = w._replace(latent_bias=w.latent_bias - 1.5)
    x[50:60] *= 10
    results = [native.threshold_encode(x, w, torch.zeros(3000), precision) for precision in PRECISIONS]
    alone = native.threshold_encode(x[51:52], w, torch.zeros(3000))
    assert (results[0].values > 0).sum(1).max() > 3000 / 16  # beyond what the sweep keeps: scored latent by latent
    for other in results[1:]:
        assert torch.equal(results[0].values, other.values) and torch.equal(results[0].indices, other.indices)
    torch.testing.assert_close(results[0].values[51, : alone.values.shape[1]], alone.values[0])


@pytest.mark.parametrize("shift", [-2.5, 0.0])
@pytest.mark.parametrize("shape", [(1000, 64, 100), (333, 100, 50), (40, 1, 7)])
def test_relu_gradients_err_no_more_than_dense_torch(shape: tuple[int, int, int], shift: float) -> None:
    w, x = make_case(*shape)
    w = w._replace(latent_bias=w.latent_bias + shift)
    spec = LossSpec(k=1, mse_scale=0.7, sparsity_coef=0.05)
    ours, dense = native.relu_gradients(x, w, spec), reference.relu_gradients(x, w, spec)
    truth = reference.relu_gradients(x.double(), double(w), spec)
    size = max(g.norm() for g in truth.gradients)
    for name, mine, true, theirs in zip(Weights._fields, ours.gradients, truth.gradients, dense.gradients, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * size, name
    for name in ("loss", "mse", "auxiliary", "l0"):
        assert getattr(ours, name).item() == pytest.approx(getattr(truth, name).item(), rel=1e-5, abs=1e-7), name
    assert torch.equal(ours.n_fired, truth.n_fired)


@pytest.mark.parametrize("shift", [-2.0, 0.0])
def test_threshold_encode_shows_a_row_that_is_not_finite(shift: float) -> None:
    w, x = make_case(300, 20, 40)
    w = w._replace(latent_bias=w.latent_bias + shift)
    x[7, 3] = float("nan")
    ours = native.threshold_encode(x, w, torch.zeros(300))
    assert ours.values[7].isnan().any() and not ours.values[8].isnan().any()
    assert native.threshold_encode(x[:0], w, torch.zeros(300)).values.shape == (0, 0)


def test_sparse_gradients_refuse_a_foreign_index_of_an_active_latent_and_take_no_row_at_all() -> None:
    w, x = make_case(30, 6, 4)
    latents = SparseLatents(torch.full((4, 2), 30), torch.ones(4, 2), 30)
    with pytest.raises(ValueError, match="index 30 is outside"):
        native.sparse_gradients(x, w, latents, x)
    nothing = SparseLatents(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0), 30)
    assert not any(g.any() for g in native.sparse_gradients(x[:0], w, nothing, x[:0]))


def whole_numbers(n: int, d: int, batch: int) -> tuple[Weights, Tensor]:
    """A case whose every sum is exact in any precision and order."""
    g = torch.Generator().manual_seed(4)
    matrix = lambda *shape: torch.randint(-3, 4, shape, generator=g).float()  # noqa: E731
    return Weights(matrix(n, d), matrix(n), matrix(n, d), matrix(d)), matrix(batch, d)


def test_equal_pre_activations_go_to_the_lower_index() -> None:
    w, x = whole_numbers(400, 6, 30)
    assert_selects_as_the_reference(x, w, 15)


@pytest.mark.parametrize("bias", [-200.0, 0.0, 200.0])
def test_rows_whose_candidates_outgrow_the_buffer_are_exact(bias: float) -> None:
    w, x = whole_numbers(3000, 24, 20)
    w = w._replace(encoder=w.encoder[:1].repeat(3000, 1), latent_bias=torch.full((3000,), bias))
    x[3] = w.pre_bias
    assert_selects_as_the_reference(x, w, 8)


def assert_selects_as_the_reference(x: Tensor, w: Weights, k: int) -> None:
    ours, truth = native.topk_encode(x, w, k, "bf16"), reference.topk_encode(x.double(), double(w), k)
    active = truth.values > 0
    assert torch.equal(ours.indices[active], truth.indices[active])
    assert torch.equal(ours.values.double(), truth.values)


def test_scales_far_from_one_are_exact() -> None:
    for scale in (1e-12, 1e-4, 1e6):
        w, x = make_case(600, 48, 30)
        w = w._replace(latent_bias=w.latent_bias * scale, pre_bias=w.pre_bias * scale)
        x = x * scale
        ours, truth = native.topk_encode(x, w, 9, "bf16"), reference.topk_encode(x.double(), double(w), 9)
        active = truth.values > 0
        assert torch.equal(ours.indices[active], truth.indices[active])
        torch.testing.assert_close(ours.values.double(), truth.values, rtol=1e-5, atol=0)


def test_auxk_on_one_row_is_dropped_as_its_error_has_no_variance() -> None:
    w, x = make_case(60, 8, 1)
    spec, dead = LossSpec(k=4, mse_scale=1.0, auxk=8), some_dead(60, 30)
    step = native.topk_gradients(x, w, spec, dead)
    plain = native.topk_gradients(x, w, dataclasses.replace(spec, auxk=0), dead)
    assert step.auxk_dropped.item() and step.loss == step.mse
    for ours, theirs in zip(step.gradients, plain.gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_shows_in_the_loss(value: float) -> None:
    w, x = make_case(300, 20, 40)
    x[7, 3] = value
    spec, dead = LossSpec(k=6, mse_scale=1.0, auxk=12), some_dead(300, 50)
    step = native.topk_gradients(x, w, spec, dead)
    assert step.loss.isnan() and step.auxk_dropped.item()
    clean, dirty = native.topk_encode(make_case(300, 20, 40)[1], w, 6), native.topk_encode(x, w, 6)
    assert dirty.values[7].isnan().all()
    assert torch.equal(clean.values[8], dirty.values[8])
    for name in Weights._fields:
        sick = clone(w)
        getattr(sick, name).view(-1)[2] = value
        step = native.topk_gradients(make_case(300, 20, 40)[1], sick, dataclasses.replace(spec, k=300), dead)
        assert not step.loss.isfinite()  # infinite when it is only the decoder that overflows


def test_an_empty_batch_encodes_to_nothing_and_has_no_gradient() -> None:
    w, x = make_case(30, 6, 0)
    assert native.topk_encode(x, w, 4).values.shape == (0, 4)
    assert native.decode(SparseLatents(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), 30), w).shape == (0, 6)
    with pytest.raises(ValueError, match="batch is empty"):
        native.topk_gradients(x, w, LossSpec(k=4, mse_scale=1.0), some_dead(30, 0))


def test_strided_and_transposed_inputs_are_right() -> None:
    w, x = make_case(90, 22, 30)
    expected = native.topk_encode(x, w, 7)
    wide = torch.empty(30, 44)
    wide[:, ::2] = x
    turned = w._replace(encoder=w.encoder.T.contiguous().T)
    for strange in (wide[:, ::2], x.T.contiguous().T, x.requires_grad_()):
        assert torch.equal(native.topk_encode(strange, turned, 7).values, expected.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.double(), w, 5), "x is torch.float64"),
        (lambda x, w: (x.bfloat16(), w, 5), "x is torch.bfloat16"),
        (lambda x, w: (x[:, :3], w, 5), "d_model"),
        (lambda x, w: (x, w._replace(encoder=w.encoder.half()), 5), "encoder is torch.float16"),
        (lambda x, w: (x, w._replace(latent_bias=w.latent_bias[:4]), 5), "weights must be"),
        (lambda x, w: (x, w, 0), "k must be"),
        (lambda x, w: (x, w, 91), "k must be"),
        (lambda x, w: (x, w, 5, "fp8"), "precision is 'fp8'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change: object, message: str) -> None:
    w, x = make_case(90, 22, 30)
    with pytest.raises(ValueError, match=message) as caught:
        native.topk_encode(*change(x, w))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_decode_is_the_reference_and_refuses_foreign_indices() -> None:
    w, x = make_case(200, 37, 80)
    latents = native.topk_encode(x, w, 9)
    torch.testing.assert_close(native.decode(latents, w), reference.decode(latents, w), rtol=1e-5, atol=1e-5)
    for bad in (-1, 200):
        with pytest.raises(ValueError, match=f"index {bad} is outside"):
            native.decode(latents._replace(indices=torch.full_like(latents.indices, bad)), w)


def make_optimizer(w: Weights, average: bool) -> OptimizerState:
    first, second, third = (Weights(*(0.1 * torch.rand_like(t) for t in w)) for _ in range(3))
    return OptimizerState(first, second, third if average else None)


def optimizer_in_double(optimizer: OptimizerState) -> OptimizerState:
    average = None if optimizer.average is None else double(optimizer.average)
    return OptimizerState(double(optimizer.first), double(optimizer.second), average)


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e9])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shape", [(77, 13), (130, 48), (5, 1)])
def test_apply_update_is_the_reference(shape: tuple[int, int], average: bool, clip_norm: float | None) -> None:
    torch.manual_seed(3)
    w = make_weights(*shape)
    gradients, optimizer = make_weights(*shape, seed=5), make_optimizer(w, average)
    update = UpdateSpec(step=4, lr=3e-3, ema=0.9, clip_norm=clip_norm)
    w_ref, optimizer_ref = double(w), optimizer_in_double(optimizer)
    norm = native.apply_update(w, clone(gradients), optimizer, update)
    norm_ref = reference.apply_update(w_ref, double(gradients), optimizer_ref, update)
    assert norm.item() == pytest.approx(norm_ref.item(), rel=1e-5)
    for ours, truth in zip((w, *optimizer), (w_ref, *optimizer_ref), strict=True):
        if ours is not None and truth is not None:
            for a, b in zip(ours, truth, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-7)


def test_apply_update_refuses_what_it_could_not_update_in_place() -> None:
    w = make_weights(8, 4)
    strided = w._replace(decoder=w.decoder.T.contiguous().T)
    with pytest.raises(ValueError, match="decoder of weights is updated in place"):
        native.apply_update(strided, clone(w), make_optimizer(w, False), UpdateSpec(step=1, lr=1e-3))


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"level is 'sse9'; this machine has auto, .*portable"):
        _native.set_level("sse9")


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("auxk", [0, 24])
def test_topk_step_is_topk_gradients_then_apply_update_to_the_bit(auxk: int, average: bool) -> None:
    torch.manual_seed(6)
    w, x = make_case(700, 50, 90)
    dead, spec = some_dead(700, 100), LossSpec(k=12, mse_scale=0.9, auxk=auxk, precision="bf16")
    optimizer, update = make_optimizer(w, average), UpdateSpec(step=2, lr=1e-2, ema=0.9)
    w_two = clone(w)
    optimizer_two = OptimizerState(*(p if p is None else clone(p) for p in optimizer))  # type: ignore[arg-type]
    for _ in range(3):
        step, norm = native.topk_step(x, w, spec, dead, optimizer, update)
        step_two = native.topk_gradients(x, w_two, spec, dead)
        norm_two = native.apply_update(w_two, step_two.gradients, optimizer_two, update)
        assert step[1:5] == step_two[1:5] and norm == norm_two and step.l0 == step_two.l0
        assert torch.equal(step.n_fired, step_two.n_fired)
    for one, two in zip((w, *optimizer), (w_two, *optimizer_two), strict=True):
        if one is not None and two is not None:
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_topk_step_refuses_to_clip() -> None:
    w, x = make_case(20, 5, 8)
    update = UpdateSpec(step=1, lr=1e-3, clip_norm=1.0)
    with pytest.raises(ValueError, match=r"clip_norm is 1\.0"):
        native.topk_step(x, w, LossSpec(k=3, mse_scale=1.0), some_dead(20, 0), make_optimizer(w, False), update)


def hidden_latents() -> tuple[Weights, Tensor, int]:
    """Eight latents that are each token's largest and that int8 rounds to nothing but one number, which meets a 0."""
    n, d = 64, 1024
    encoder = (0.3 + 0.001 * torch.arange(n))[:, None].repeat(1, d)
    encoder[5:13] = 0.49
    encoder[5:13, 0] = 127
    x = torch.ones(20, d)
    x[:, 0] = 0
    return Weights(encoder, torch.zeros(n), torch.nn.functional.normalize(encoder), torch.zeros(d)), x, 8


def test_an_audit_finds_what_int8_misses_and_the_batch_is_selected_again(caplog: pytest.LogCaptureFixture) -> None:
    w, x, k = hidden_latents()
    truth = reference.topk_encode(x, w, k)
    alone = native._topk_encode(x, w, k, "int8")[0]
    misses = _native.has_low()
    assert set(truth.indices[0].tolist()) == set(range(5, 13))
    assert bool(torch.isin(alone.indices, truth.indices[0]).any()) == (not misses)
    found, stats = native._topk_encode(x, w, k, "int8", audit=[3, 17])
    assert torch.equal(found.indices, truth.indices)
    assert stats["n_audited"] == 2 * k and stats["n_missed"] == (2 * k if misses else 0)
    assert ("selected again in fp32" in caplog.text) == misses
    assert stats["recall"] == (0 if misses else 1)


def test_auto_is_audited_unless_its_product_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, k = hidden_latents()
    monkeypatch.setattr(native, "fastest_precision", lambda *, exact=False: "int8")
    assert torch.equal(native.topk_encode(x, w, k).indices, reference.topk_encode(x, w, k).indices)
    assert native._topk_encode(x, w, k, "auto")[1]["n_audited"] == k
    monkeypatch.setattr(native, "fastest_precision", lambda *, exact=False: "fp32")
    assert native._topk_encode(x, w, k, "auto")[1]["n_audited"] == 0


def test_a_step_whose_audit_finds_a_miss_is_that_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, k = hidden_latents()
    spec, dead = LossSpec(k=k, mse_scale=1.0, auxk=4, precision="int8", audit=(0, 9)), some_dead(64, 10)
    out = native.topk_gradients(x, w, spec, dead)
    exact = native.topk_gradients(x, w, dataclasses.replace(spec, precision="fp32"), dead)
    assert_same_bits(out, exact)
    assert exact.stats is not None and exact.stats["recall"] == 1 and exact.stats["n_audited"] == 2 * k
    assert out.stats is not None and out.stats["recall"] == (0 if _native.has_low() else 1)
    unseen = native.topk_gradients(x, w, dataclasses.replace(spec, audit=()), dead)
    assert unseen.stats is not None and unseen.stats["recall"] is None
    assert torch.equal(unseen.n_fired, exact.n_fired) == (not _native.has_low())


def test_audits_skip_rows_that_are_not_finite_and_count_fewer_than_k_positive_latents() -> None:
    w, x = make_case(300, 20, 9)
    x[4, 0] = torch.nan
    w = w._replace(latent_bias=w.latent_bias - 2)
    stats = native._topk_encode(x, w, 40, "bf16", audit=[4])[1]
    assert (stats["n_audited"], stats["recall"]) == (0, None)
    stats = native._topk_encode(x, w, 40, "bf16", audit=[5])[1]
    n_positive = int((reference.topk_encode(x, w, 40).values[5] > 0).sum())
    assert 0 < n_positive < 40 and (stats["n_audited"], stats["n_missed"]) == (n_positive, 0)


def test_the_precision_chosen_finds_the_true_top_k_of_what_it_is_chosen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = "int8" if _native.has_low() else "fp32"
    clock = {"fp32": 3.0, "bf16": 2.5, "int8": 2.0}
    monkeypatch.setattr(native, "_seconds_to_encode", lambda x, weights, precision: clock[precision])
    native._fastest.cache_clear()
    w, x, k = hidden_latents()
    assert native.choose_precision(x, w, k) == "fp32"
    assert native.choose_precision(*make_case(700, 50, 90)[::-1], 12) == fastest
    equal = Weights(*(torch.ones_like(t) for t in make_weights(2000, 8)))  # every latent is a candidate
    assert native.choose_precision(torch.full((9, 8), 2.0), equal, 12) == "fp32"
    assert (native.fastest_precision(), native.fastest_precision(exact=True)) == (fastest, "fp32")
    clock["bf16"] = 1.0
    native._fastest.cache_clear()
    fastest = "bf16" if _native.has_low() else "fp32"
    assert (native.fastest_precision(), native.fastest_precision(exact=True)) == (fastest, fastest)
    native._fastest.cache_clear()
