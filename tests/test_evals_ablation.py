"""Ablation sparsity: its closed forms, and the suffix runs against whole forward passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monosem.evals import ablation
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.subject import Subject
from monosem.types import LOCATIONS, Metric, Site
from tiny import tiny_lm

CONTEXT, N_CONTEXTS, N_TOKENS = 24, 12, 4
TOKENS = torch.randint(3, 250, (N_CONTEXTS, CONTEXT), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
DOCUMENTS = torch.arange(N_CONTEXTS, dtype=torch.int32)[:, None].expand(-1, CONTEXT)


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Subject:
    return Subject.load(str(tiny_model), dtype="float32", device="cpu")


def autoencoder_of(subject: Subject, site: Site, k: int = 4) -> Autoencoder:
    raw = subject.capture(TOKENS, site)[:, 1:].flatten(0, 1)
    weights = initial_weights(normalize(raw)[0], 64, k, tied=True, seed=0)
    return Autoencoder(AutoencoderConfig(raw.shape[1], 64, k), weights)


def measured(subject: Subject, site: Site, **options: Any) -> tuple[dict[str, Metric], dict[str, Any]]:
    options = {"first_position": 1, "n_ablations": 20, "n_tokens": N_TOKENS, "n_resamples": 50, "seed": 0, **options}
    metrics, lists = ablation.metrics(subject, autoencoder_of(subject, site), site, TOKENS, DOCUMENTS, **options)
    return {m.name: m for m in metrics}, lists


def naive(subject: Subject, autoencoder: Autoencoder, site: Site, context: int, position: int, latent: int) -> Tensor:
    """The change of the logits, [n_tokens, vocab], by running the whole context twice."""

    def ablated(raw: Tensor) -> Tensor:
        x, stats = normalize(raw[:, position])
        pre_act = (x - autoencoder.weights.pre_bias) @ autoencoder.weights.encoder[latent]
        new = raw.clone()
        new[:, position] -= stats.std * pre_act * autoencoder.weights.decoder[latent]
        return new

    read = TOKENS[context : context + 1]
    change = (subject.run_with(read, site, ablated) - subject.logits(read))[0, position : position + N_TOKENS]
    return change - change.median(-1, keepdim=True).values


def test_sparsity_of_independent_normals_is_two_over_pi() -> None:
    change = torch.randn(3, 16, 5000, generator=torch.Generator().manual_seed(0))
    assert ablation.sparsity(change).tolist() == pytest.approx([2 / math.pi] * 3, rel=0.02)


@given(n_moved=st.integers(1, 60), size=st.floats(1e-3, 1e3))
def test_sparsity_is_the_share_of_logits_that_move_alike(n_moved: int, size: float) -> None:
    change = torch.zeros(1, 3, 20)
    change.view(-1)[:n_moved] = size
    assert ablation.sparsity(change).item() == pytest.approx(n_moved / 60, rel=1e-5)


def test_sparsity_of_no_change_is_none() -> None:
    assert ablation.sparsity(torch.zeros(1, 2, 5)).isnan().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_suffix_runs_equal_whole_forward_passes(family: str, tmp_path: Path) -> None:
    """Gemma's window of 16 tokens is shorter than the contexts."""
    subject = Subject.load(str(tiny_lm(tmp_path, family)), dtype="float32", device="cpu")
    locations = [name for name in LOCATIONS if (family, name) != ("gpt_neox", "resid_post_attn")]
    for location in locations:
        site = subject.site(1, location)
        autoencoder = autoencoder_of(subject, site)
        _, lists = measured(subject, site, n_ablations=6, first_position=0)
        for i in range(6):
            change = naive(subject, autoencoder, site, lists["context"][i], lists["position"][i], lists["latent"][i])
            expected = ablation.sparsity(change[None]).item()
            assert lists["sparsity"][i] == pytest.approx(expected, rel=1e-3), location
            top = change.flatten().topk(10)
            assert lists["up_change"][i] == pytest.approx(top.values.tolist(), rel=1e-3, abs=1e-5)
            offset, token = lists["up_offset"][i][0], lists["up_token"][i][0]
            assert change[offset, token].item() == pytest.approx(top.values[0].item(), rel=1e-3, abs=1e-5)
            assert lists["down_change"][i][0] == pytest.approx(change.min().item(), rel=1e-3, abs=1e-5)


def test_only_the_suffix_is_run_and_only_from_the_site_on(subject: Subject) -> None:
    seen: dict[int, list[int]] = {0: [], 3: []}
    handles = [
        subject.module.get_submodule(f"model.layers.{layer}.mlp").register_forward_hook(
            lambda _, arguments, __, layer=layer: seen[layer].append(arguments[0].shape[1])
        )
        for layer in seen
    ]
    site = subject.site(2)
    autoencoder = autoencoder_of(subject, site)
    subject.read(TOKENS[:, :1])  # the first time it is tried whether going on from what is kept will do
    seen[0].clear()
    seen[3].clear()
    options: dict[str, Any] = {"first_position": 5, "n_ablations": 8, "n_tokens": CONTEXT - 5}
    ablation.metrics(subject, autoencoder, site, TOKENS, DOCUMENTS, **options, n_resamples=20, seed=0)
    for handle in handles:
        handle.remove()
    assert seen == {0: [5, 19], 3: [5, 19, 19, 19, 19, 19]}  # the prefix; the suffix as it is; four kinds of ablation


def test_ablation_numbers_have_n_and_intervals_and_repeat_themselves(subject: Subject) -> None:
    metrics, lists = measured(subject, subject.site())
    kinds = "", "_channels", "_random_directions", "_random_dictionary"
    assert list(metrics) == [f"ablation_sparsity{own}{kind}" for kind in kinds for own in ("", "_own_token")]
    for metric in metrics.values():
        assert 0 < metric.low <= metric.value <= metric.high < 1
        assert metric.n == 20
    mean = sum(lists["sparsity"]) / 20
    assert metrics["ablation_sparsity"].value == pytest.approx(mean)
    assert set(map(len, lists.values())) == {20}
    assert all(1 <= p <= CONTEXT - N_TOKENS for p in lists["position"])
    assert min(lists["activation"]) > 0
    assert measured(subject, subject.site()) == (metrics, lists)
    assert measured(subject, subject.site(), seed=1)[1]["position"] != lists["position"]


def test_comparisons_change_as_much_as_the_latent_does(subject: Subject) -> None:
    site = subject.site()
    autoencoder = autoencoder_of(subject, site)
    raw = subject.capture(TOKENS, site)[:, 3]
    rows = torch.nn.functional.normalize(torch.randn(64, raw.shape[1], generator=torch.Generator().manual_seed(1)))
    latents, activations, changes = ablation._changes(autoencoder, raw, rows, torch.Generator().manual_seed(2))
    x, stats = normalize(raw)
    norms = stats.std[:, 0] * activations
    for kind in ("", "_random_directions", "_random_dictionary"):
        torch.testing.assert_close(changes[kind].norm(dim=1), norms, rtol=1e-4, atol=1e-6)
    indices, values, _ = autoencoder.encode(x)
    assert all(latent in indices[i][values[i] > 0] for i, latent in enumerate(latents))
    channel = changes["_channels"].nonzero()
    assert len(channel) == len(raw)
    kept = (raw + changes["_channels"])[channel[:, 0], channel[:, 1]]
    torch.testing.assert_close(kept, stats.mean[:, 0], rtol=1e-3, atol=1e-3)  # the channel is set to the token's mean
    along = torch.nn.functional.normalize(changes["_random_dictionary"]) @ -rows.T
    ranks = ((x - autoencoder.weights.pre_bias) @ rows.T).argsort(dim=1, descending=True).argsort(dim=1)
    assert (ranks.gather(1, along.argmax(1, keepdim=True)) < 4).all()


def test_contexts_too_short_for_the_tokens_are_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="contexts of 24 tokens hold no 24 tokens from position 1 on"):
        measured(subject, subject.site(), n_tokens=24)
