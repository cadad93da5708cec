"""SAELens' files, written and read: the same latents, and what is refused (the package itself: test_interop)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from monosem import config, convert, variants
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize

D_MODEL, N_LATENTS, K = 12, 30, 4
ROWS = torch.randn(90, D_MODEL, generator=torch.Generator().manual_seed(0)) + 1
ARCHITECTURES = {"topk": "topk", "multi_topk": "topk", "relu": "standard"}


def autoencoder(activation: str) -> Autoencoder:
    """With biases and extras that are not those of the start, as after training."""
    weights = initial_weights(normalize(ROWS)[0], N_LATENTS, K, tied=False, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = weights._replace(latent_bias=torch.randn(N_LATENTS, generator=generator) / 3)
    extras = {
        name: extra + torch.rand(extra.shape, generator=generator) / 3
        for name, extra in variants.initial_extras(activation, weights).items()
    }
    site = {"model": "gpt2", "revision": None, "layer": 3, "location": "resid_post_mlp"}
    return Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, K, activation), weights, {"site": site}, extras)


def dense(latents: Any) -> Tensor:
    return torch.zeros(len(latents.values), N_LATENTS).scatter_add(1, latents.indices.long(), latents.values)


@pytest.mark.parametrize("activation", config.activations())
def test_every_activation_function_comes_back_from_the_files(activation: str, tmp_path: Path) -> None:
    ours = autoencoder(activation)
    convert.save_sae_lens(ours, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == ARCHITECTURES.get(activation, "jumprelu")
    assert cfg["metadata"]["model_name"] == "gpt2" and cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    theirs, x = convert.load_sae_lens(tmp_path), normalize(ROWS)[0]
    assert (dense(ours.encode(x)) > 0).any() and theirs.tells_pre_activations
    torch.testing.assert_close(dense(theirs.encode(x)), dense(ours.encode(x)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(ROWS), ours(ROWS), atol=1e-4, rtol=1e-4)


def change(folder: Path, **fields: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **fields}))


def test_other_settings_of_theirs_are_read(tmp_path: Path) -> None:
    """Raw input, decoder rows of any norm whose size decides with the activation, no bias taken off before."""
    convert.save_sae_lens(autoencoder("topk"), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["W_dec"] *= torch.linspace(0.5, 2, N_LATENTS)[:, None]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    change(tmp_path, normalize_activations="none", rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    norms = tensors["W_dec"].norm(dim=1)
    pre = (ROWS @ tensors["W_enc"] + tensors["b_enc"]) * norms
    top = pre.topk(K)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    theirs = convert.load_sae_lens(tmp_path)
    torch.testing.assert_close(dense(theirs.encode(ROWS)), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(ROWS), z / norms @ tensors["W_dec"] + tensors["b_dec"], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no autoencoder of SAELens"):
        convert.load_sae_lens(tmp_path)
    convert.save_sae_lens(autoencoder("topk"), tmp_path)
    for field, value, message in (
        ("architecture", "temporal", "'temporal'; known are standard, topk, jumprelu, gated"),
        ("normalize_activations", "expected_average_only_in", "known are none, layer_norm: load it with SAELens"),
        ("reshape_activations", "hook_z", "reshape_activations of .* is 'hook_z'"),
    ):
        convert.save_sae_lens(autoencoder("topk"), tmp_path)
        change(tmp_path, **{field: value})
        with pytest.raises(ValueError, match=message):
            convert.load_sae_lens(tmp_path)
    convert.save_sae_lens(autoencoder("topk"), tmp_path)
    with pytest.raises(ValueError, match="cannot be saved"):
        convert.save_sae_lens(convert.load_sae_lens(tmp_path), tmp_path / "again")
