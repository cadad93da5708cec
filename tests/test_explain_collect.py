"""The pass that explains: what is kept is what a plain loop over all contexts would keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monosem.explanations import collect, neighbours

CTX = 6


def activations(seed: int, n_contexts: int, n_latents: int, share: float = 0.2) -> np.ndarray:
    """Dense [contexts, ctx, latents], with ties and latents that never fire."""
    rng = np.random.default_rng(seed)
    z = np.round(rng.exponential(1, (n_contexts, CTX, n_latents)), 1).astype(np.float32)
    z[rng.random(z.shape) > share] = 0
    z[:, :, :1] = 0
    return z


def fill(z: np.ndarray, n_slots: int, each: int, seed: int) -> tuple[collect.Moments, collect.Kept, collect.Kept]:
    """The pass over `z`, `each` contexts a block."""
    n_contexts, _, n_latents = z.shape
    moments = collect.Moments(n_latents)
    top, sample = (collect.Kept(n_latents, n_slots, CTX) for _ in range(2))
    for start in range(0, n_contexts, each):
        contexts, positions, latents = np.nonzero(z[start : start + each])
        values = z[start + contexts, positions, latents]
        groups = collect.groups_of(latents, contexts + start, positions, values)
        moments.add(groups, z[start : start + each, :, 0].size)
        top.offer(groups, groups.peak.astype(np.float64))
        sample.offer(groups, collect.sample_priority(groups.latent, groups.context, seed))
    return moments, top, sample


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 5), st.integers(1, 7), st.integers(1, 30))
def test_kept_contexts_are_those_of_highest_priority(
    seed: int, n_contexts: int, n_latents: int, n_slots: int, each: int
) -> None:
    z = activations(seed, n_contexts, n_latents)
    _, top, sample = fill(z, n_slots, each, seed)
    for latent in range(n_latents):
        peaks = z[:, :, latent].max(axis=1)
        active = np.flatnonzero(peaks)
        order = collect.top_slots(top, n_slots)[latent]
        kept = top.context[latent, order[order >= 0]]
        assert kept.tolist() == active[np.lexsort((active, -peaks[active]))][:n_slots].tolist()
        for slot in order[order >= 0]:
            found = top.activations.dense(np.full((n_latents, 1), slot), CTX)[latent, 0]
            assert np.array_equal(found, z[top.context[latent, slot], :, latent].astype(np.float16))
            assert top.position[latent, slot] == z[top.context[latent, slot], :, latent].argmax()
        priority = collect.sample_priority(np.full(len(active), latent), active, seed)
        wanted = active[np.argsort(-priority)][:n_slots]
        assert set(sample.context[latent][sample.context[latent] >= 0]) == set(wanted)


def test_sample_does_not_depend_on_the_order_of_blocks() -> None:
    z = activations(3, 40, 4)
    a, b = (fill(z, 5, each, 7)[2] for each in (1, 40))
    assert np.array_equal(np.sort(a.context, axis=1), np.sort(b.context, axis=1))


def test_top_contexts_do_not_depend_on_the_blocks() -> None:
    z = np.tile(activations(5, 20, 4), (3, 1, 1))  # every text three times: of equal peaks the earlier contexts count
    a, b = (fill(z, 5, each, 7)[1] for each in (1, 60))
    for one, other in zip(*(collect.choose(top, collect.top_slots(top, 5)).values() for top in (a, b)), strict=True):
        assert np.array_equal(one, other)


def test_sample_priority_is_uniform_and_moves_with_the_seed() -> None:
    latents, contexts = np.divmod(np.arange(40_000), 200)
    u = collect.sample_priority(latents, contexts, 0)
    assert np.histogram(u, 10, (0, 1))[0] == pytest.approx(4000, rel=0.1)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert not np.array_equal(u, collect.sample_priority(latents, contexts, 1))


def test_moments_are_those_of_the_active_values() -> None:
    z = activations(1, 50, 3)
    moments = fill(z, 1, 7, 0)[0]
    found = {name: column for name, (column, _) in moments.columns().items()}
    assert np.isnan(found["mean"][0])
    for latent in (1, 2):
        v = z[:, :, latent][z[:, :, latent] > 0].astype(np.float64)
        c = v - v.mean()
        assert found["density"][latent] == pytest.approx((v > 1e-3).sum() / (50 * CTX))
        assert found["mean"][latent] == pytest.approx(v.mean())
        assert found["mean_square"][latent] == pytest.approx((v**2).mean())
        assert found["skew"][latent] == pytest.approx((c**3).mean() / c.std() ** 3, rel=1e-5)
        assert found["kurtosis"][latent] == pytest.approx((c**4).mean() / c.std() ** 4, rel=1e-5)
        assert found["max"][latent] == v.max()
        edges = np.r_[collect.BIN_EDGES, np.inf]
        assert np.array_equal(found["histogram"][latent], np.histogram(v, edges)[0])


def test_quantile_slots_are_equal_bands_of_the_peaks() -> None:
    z = np.zeros((40, CTX, 1), np.float32)
    z[:, 2, 0] = np.arange(1, 41)
    sample = fill(z, 40, 9, 0)[2]
    slots = collect.quantile_slots(sample, 4, 5)[0].reshape(4, 5)
    for band, row in enumerate(sample.peak[0, slots]):
        assert ((row > 10 * band) & (row <= 10 * band + 10)).all()
        assert len(set(row)) == 5


def test_choose_marks_missing_examples() -> None:
    z = np.zeros((2, CTX, 1), np.float32)
    z[1, 3, 0] = 2
    top = fill(z, 4, 2, 0)[1]
    found = collect.choose(top, collect.top_slots(top, 4))
    assert found["context"].tolist() == [[1, -1, -1, -1]]
    assert found["activations"][0, 1:].sum() == 0


def test_coactivation_is_the_jaccard_index() -> None:
    rng = np.random.default_rng(0)
    active = rng.random((300, 20)) < 0.2
    active[:, 7] = active[:, 3]
    tokens, latents = np.nonzero(active)
    found = neighbours.by_coactivation(tokens, latents, 20, 4)
    both = (active[:, :, None] & active[:, None, :]).sum(0)
    jaccard = both / (active[:, :, None] | active[:, None, :]).sum(0)
    np.fill_diagonal(jaccard, 0)
    jaccard[both < 5] = 0
    assert found.latents[3, 0] == 7 and found.score[3, 0] == 1
    assert np.allclose(found.score, -np.sort(-jaccard, axis=1)[:, :4])


def test_decoder_neighbours_are_the_largest_cosines() -> None:
    import torch

    decoder = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    decoder[4] = 2 * decoder[9]
    found = neighbours.by_decoder(decoder, 3)
    assert found.latents[4, 0] == 9 and found.score[4, 0] == pytest.approx(1)
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T - 2 * torch.eye(30)
    assert np.allclose(found.score, cosine.topk(3).values)
