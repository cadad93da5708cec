from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monosem import formats, losses, variants
from monosem.config import activations
from monosem.model import Autoencoder, AutoencoderConfig, denormalize, initial_weights, normalize
from monosem.types import Weights


def tokens(n: int, d_model: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_model, generator=g) * 3 + torch.randn(d_model, generator=g) * 5


def autoencoder(activation: str = "topk", d_model: int = 12, n_latents: int = 40, k: int = 4) -> Autoencoder:
    weights = initial_weights(normalize(tokens(300, d_model))[0], n_latents, k, tied=True, seed=0)
    config = AutoencoderConfig(d_model, n_latents, k, activation)
    return Autoencoder(config, weights, {"tokens_seen": 7})


@given(st.integers(2, 64), st.floats(0.01, 1e4), st.floats(-1e3, 1e3))
def test_normalize_gives_norm_sqrt_d_minus_1_and_denormalize_undoes_it(
    d_model: int, scale: float, shift: float
) -> None:
    raw = tokens(5, d_model) * scale + shift
    x, stats = normalize(raw)
    torch.testing.assert_close(denormalize(x, stats), raw, rtol=1e-3, atol=1e-2 * scale + 1e-3 * abs(shift))
    if scale >= 0.1:
        assert x.norm(dim=1) == pytest.approx((d_model - 1) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_save_and_load_give_back_every_bit_and_the_provenance(activation: str, tmp_path: Path) -> None:
    saved = autoencoder(activation)
    saved.save(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    assert loaded.config == saved.config and loaded.provenance == saved.provenance
    assert all(torch.equal(a, b) for a, b in zip(saved.weights, loaded.weights, strict=True))
    raw = tokens(9, 12)
    assert torch.equal(saved(raw), loaded(raw))


def test_load_refuses_a_damaged_or_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no autoencoder"):
        Autoencoder.load(tmp_path)
    autoencoder().save(tmp_path)
    path = tmp_path / "autoencoder.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        Autoencoder.load(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Autoencoder.load(tmp_path)
    path.write_bytes(whole)
    facts = json.loads((tmp_path / "config.json").read_text())
    provenance = facts.pop("provenance")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"config\.json: lacks the field provenance"):
        Autoencoder.load(tmp_path)
    facts["provenance"] = provenance
    facts["config"]["k"] = 2
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"config\.json was changed after it was written"):
        Autoencoder.load(tmp_path)
    facts["config"]["activation"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(formats.sealed(facts)))
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        Autoencoder.load(tmp_path)


def test_forward_keeps_shape_dtype_and_a_token_by_itself() -> None:
    model = autoencoder()
    raw = tokens(6, 12).view(2, 3, 12)
    recons = model(raw.bfloat16())
    assert recons.shape == raw.shape and recons.dtype == torch.bfloat16
    torch.testing.assert_close(model(raw)[1, 2], model(raw[1:, 2:])[0, 0])


def test_encode_gives_at_most_k_latents_and_relu_any_number() -> None:
    x = normalize(tokens(20, 12))[0]
    assert autoencoder("topk").encode(x).values.shape == (20, 4)
    assert autoencoder("relu").encode(x).values.shape[1] > 4


def test_weights_of_the_wrong_shape_are_refused() -> None:
    weights = autoencoder().weights
    with pytest.raises(ValueError, match="latent_bias has shape"):
        Autoencoder(AutoencoderConfig(12, 40, 4), weights._replace(latent_bias=torch.zeros(3)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", activations())
def test_initial_weights_follow_the_recipe(tied: bool, activation: str) -> None:
    x = normalize(tokens(2000, 24))[0]
    weights = initial_weights(x, 64, 6, activation, tied=tied, seed=3)
    torch.testing.assert_close(weights.decoder.norm(dim=1), torch.ones(64))
    cosine = torch.cosine_similarity(weights.encoder, weights.decoder, dim=1)
    assert (cosine > 0.9999).all() if tied else (cosine < 0.9).all()
    assert weights.latent_bias.abs().max() == 0
    extras = variants.initial_extras(activation, weights)
    model = Autoencoder(AutoencoderConfig(24, 64, 6, activation), weights, None, extras)
    recons = model.decode(model.encode(x)) - weights.pre_bias
    want = (x - weights.pre_bias).norm(dim=1).mean().item()
    assert recons.norm(dim=1).mean().item() == pytest.approx(want, rel=1e-4)
    again = initial_weights(x, 64, 6, activation, tied=tied, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_unscaled_initial_weights_are_the_scaled_ones_with_encoder_rows_of_norm_1(tied: bool) -> None:
    x = normalize(tokens(500, 24))[0]
    scaled = initial_weights(x, 64, 6, tied=tied, seed=3)
    plain = initial_weights(x, 64, 6, tied=tied, scaled=False, seed=3)
    torch.testing.assert_close(plain.encoder.norm(dim=1), torch.ones(64))
    factor = scaled.encoder[0].norm()
    assert abs(factor - 1) > 0.05
    torch.testing.assert_close(plain.encoder * factor, scaled.encoder)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], scaled[1:], strict=True))


def test_geometric_median_ignores_a_far_outlier_and_has_zero_gradient() -> None:
    points = tokens(501, 8)
    points[0] = 1e6
    median = losses.geometric_median(points)
    directions = points.double() - median
    pull = (directions / directions.norm(dim=1, keepdim=True)).sum(0)
    assert pull.norm() < 1e-3
    assert (median - points[1:].double().mean(0)).norm() < 1


def test_geometric_median_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="did not settle"):
        losses.geometric_median(torch.full((5, 3), torch.nan))


def test_mse_scale_makes_the_loss_of_the_mean_one() -> None:
    x = tokens(100, 7)
    mean = x.mean(0).expand_as(x)
    assert losses.mse(mean, x, losses.mse_scale(x)).item() == pytest.approx(1, rel=1e-5)
    assert losses.normalized_mse(mean, x) == pytest.approx(1)
    assert losses.normalized_mse(x, x) == 0


def test_mse_scale_of_a_sample_that_does_not_vary_is_refused() -> None:
    with pytest.raises(ValueError, match="all activations of the sample are equal"):
        losses.mse_scale(torch.ones(4, 3))


def test_weights_are_kept_latent_by_latent() -> None:
    """One latent's encoder and decoder vectors are contiguous rows: what the sparse kernels rely on."""
    weights: Weights = autoencoder().weights
    assert weights.encoder.shape == weights.decoder.shape == (40, 12)
    assert weights.encoder.is_contiguous() and weights.decoder.is_contiguous()


def test_autograd_sees_through_encode_and_decode() -> None:
    """A caller who asks for a gradient gets one, not the compiled kernels' values without."""
    model, x = autoencoder().double(), tokens(5, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.decode(model.encode(x)), x)
    model.float()
    single = x.detach().float().requires_grad_()
    model.decode(model.encode(single)).sum().backward()
    model.double().decode(model.encode(x)).sum().backward()
    torch.testing.assert_close(single.grad, x.grad.float())  # type: ignore[union-attr]
