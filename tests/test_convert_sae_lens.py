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


OLD = {
    "l1_coefficient": 5, "context_size": 64, "hook_layer": 3, "prepend_bos": True, "model_from_pretrained_kwargs": {},
    "finetuning_scaling_factor": False, "hook_head_index": None, "activation_fn_kwargs": {},
}  # fmt: skip


def saved_as(folder: Path, activation: str, **fields: Any) -> Path:
    convert.save_sae_lens(autoencoder(activation), folder)
    change(folder, **fields)
    return folder


def test_older_words_for_the_same_are_read(tmp_path: Path) -> None:
    x = normalize(ROWS)[0]
    for activation, fields in (
        (
            "topk",
            {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "k": None},
        ),
        ("topk", {"activation_fn": "topk"}),
        ("topk", {"activation_fn_kwargs": {"k": K}, "k": None}),
        ("relu", {"activation_fn_str": "relu", **OLD}),
        ("jumprelu", {"activation_fn_str": "relu", **OLD}),
    ):
        theirs = convert.load_sae_lens(saved_as(tmp_path, activation, **fields))
        torch.testing.assert_close(
            dense(theirs.encode(x)), dense(autoencoder(activation).encode(x)), atol=1e-5, rtol=1e-5
        )
        assert theirs.config.k == (K if activation == "topk" else N_LATENTS)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for name in ("reshape_activations", "normalize_activations"):
        cfg.pop(name)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    raw = convert.load_sae_lens(tmp_path)  # as before there were other normalisations than none
    assert torch.equal(raw.normalize(ROWS)[0], ROWS)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "groups": 4}},
            "'groups': 4}; known is a k alone",
        ),
        ({"activation_fn_kwargs": [1]}, r"activation_fn_kwargs \[1\]; known is a k alone"),
        ({"activation_fn_kwargs": {"k": K + 1}}, f"has k {K}, but in activation_fn_kwargs {K + 1}"),
        ({"activation_fn_str": "relu"}, "activation function 'relu' and architecture 'topk'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor of .* is True"),
        ({"hook_head_index": 3}, "hook_head_index of .* is 3"),
        ({"reshape_activations": None, "metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "reshape_activations"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input of .* is None"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input of .* is 1"),
        ({"group_size": 4, "tau": 1}, "not known to leave the latents as they are: group_size, tau"),
        ({"k": 0}, "k of .* is 0"),
        ({"k": N_LATENTS + 1}, "k of .* is 31"),
        ({"k": "4"}, "k of .* is '4'"),
        ({"d_in": 13}, "has the tensors .* its settings ask for"),
        ({"architecture": "gated", "k": None}, "has the tensors"),
        ({"architecture": "standard"}, "which standard does not use"),
    ],
)
def test_settings_that_are_not_known_or_do_not_fit_are_refused(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        convert.load_sae_lens(saved_as(tmp_path, "topk", **fields))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    saved_as(tmp_path, "topk")
    for text in ("[1]", "{", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "\x00"):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=r"holds no autoencoder|is no object"):
            convert.load_sae_lens(tmp_path)
        with pytest.raises(ValueError, match=r"cfg\.json"):  # what is not of our making is not replaced
            convert.save_sae_lens(autoencoder("topk"), tmp_path)
        assert (tmp_path / "cfg.json").read_text() == text
    (tmp_path / "cfg.json").unlink()
    saved_as(tmp_path, "topk")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    for changes, told in (
        ({"scaling_factor": torch.full((N_LATENTS,), 1.1)}, "scaling_factor"),
        ({"W_dec": tensors["W_dec"] * torch.inf}, "W_dec of .* is not finite"),
        ({"b_dec": tensors["b_dec"][1:]}, "has the tensors"),
    ):
        save_file({**tensors, **changes}, tmp_path / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=told):
            convert.load_sae_lens(tmp_path)
    save_file({**tensors, "scaling_factor": torch.ones(N_LATENTS)}, tmp_path / "sae_weights.safetensors")
    convert.load_sae_lens(tmp_path)
