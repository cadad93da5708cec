"""Tiny random models of many architectures, with the tokenizer of `tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tiny import VOCAB_SIZE, tiny_tokenizer

_IDS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WIDE: dict[str, Any] = _IDS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
_GPT: dict[str, Any] = _IDS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}

CAUSAL: dict[str, tuple[Any, Any, str]] = {
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**_IDS, hidden_size=32, num_hidden_layers=3, ffn_dim=64, num_attention_heads=4,
                     max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.1),
        "model.decoder.layers",
    ),
    "opt-projected": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**_IDS, hidden_size=32, num_hidden_layers=3, ffn_dim=64, num_attention_heads=4,
                     max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.1, do_layer_norm_before=False),
        "model.decoder.layers",
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**_WIDE, **_EXPERTS), "model.layers"),
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig(**_IDS, hidden_size=32, num_hidden_layers=3, state_size=8),
              "backbone.layers"),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig(**_GPT, rotary_dim=8), "transformer.h"),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig(**_IDS, hidden_size=32, num_hidden_layers=3,
                                                     num_attention_heads=4, initializer_range=0.1), "transformer.h"),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig(**_IDS, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.1),
              "transformer.h"),
    "mpt": (hf.MptForCausalLM, hf.MptConfig(**_IDS, d_model=32, n_layers=3, n_heads=4, max_seq_len=64,
                                            initializer_range=0.1), "transformer.blocks"),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig(**_WIDE), "model.layers"),
    "stablelm": (hf.StableLmForCausalLM, hf.StableLmConfig(**_WIDE, num_key_value_heads=4), "model.layers"),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**_WIDE), "model.layers"),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig(**_WIDE, logit_scale=0.25), "model.layers"),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig(**_WIDE, logits_scaling=8.0, residual_multiplier=0.5),
                "model.layers"),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**_WIDE, num_key_value_heads=2, head_dim=8,
                                                     final_logit_softcapping=0.5), "model.layers"),
    "xlnet": (hf.XLNetLMHeadModel, hf.XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=4, d_inner=64),
              "transformer.layer"),
}  # fmt: skip
"""By name: class, config, where its blocks are."""

_BERT: dict[str, Any] = _WIDE | {"type_vocab_size": 2}
ENCODERS: dict[str, tuple[Any, Any, str]] = {
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**_WIDE, cls_token_id=0, sep_token_id=1), "layers.1"),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(vocab_size=VOCAB_SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
                            max_position_embeddings=64),
        "transformer.layer.1",
    ),
    "electra": (hf.ElectraForPreTraining, hf.ElectraConfig(**_BERT, embedding_size=16), "encoder.layer.1"),
    "deberta-v2": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**_BERT, relative_attention=True,
                                                              pos_att_type=["p2c", "c2p"]), "encoder.layer.1"),
    "mpnet": (hf.MPNetForMaskedLM, hf.MPNetConfig(**(_WIDE | {"pad_token_id": 1, "eos_token_id": 2})),
              "encoder.layer.1"),
    "t5": (hf.T5EncoderModel, hf.T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                                          num_heads=4, pad_token_id=2, eos_token_id=1), "encoder.block.1"),
    "llama without a head": (hf.LlamaModel, hf.LlamaConfig(**_WIDE), "layers.1"),
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig(**_BERT, embedding_size=16),
               "encoder.embedding_hidden_mapping_in"),
}  # fmt: skip
"""Without a head: class, config, a module of them."""


def write(folder: Path, kind: str, seed: int = 0) -> Path:
    """The model of that name, in `folder`."""
    make, config, _ = (CAUSAL | ENCODERS)[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(config)
        for name, parameter in model.named_parameters():  # norms start at 1 and 0, which hides what they do
            if "norm" in name.lower() or "ln_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
