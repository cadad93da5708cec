"""Where each architecture that is known keeps its blocks, and what the locations mean inside a block."""

from __future__ import annotations

from typing import Literal, NamedTuple

Side = Literal["input", "output"]

INTO_STREAM = ("resid_post_mlp", "resid_post_attn", "resid_delta_mlp", "resid_delta_attn")
"""The locations whose vectors are written as the residual stream is, so that the unembedding can read a direction."""


class Point(NamedTuple):
    """A tensor in a model: what goes into or comes out of the module at `path`."""

    path: str
    side: Side


class Family(NamedTuple):
    """Where an architecture keeps its blocks, and its locations inside a block (paths relative to the block)."""

    blocks: str
    resid_post_attn: Point
    resid_delta_attn: Point
    resid_delta_mlp: Point
    mlp_post_act: Point
    attn_z: Point
    resid_post_mlp: Point = Point("", "output")


_GPT2 = Family(
    blocks="transformer.h",
    resid_post_attn=Point("ln_2", "input"),
    resid_delta_attn=Point("attn", "output"),
    resid_delta_mlp=Point("mlp", "output"),
    mlp_post_act=Point("mlp.c_proj", "input"),
    attn_z=Point("attn.c_proj", "input"),
)
_LLAMA = Family(
    blocks="model.layers",
    resid_post_attn=Point("post_attention_layernorm", "input"),
    resid_delta_attn=Point("self_attn", "output"),
    resid_delta_mlp=Point("mlp", "output"),
    mlp_post_act=Point("mlp.down_proj", "input"),
    attn_z=Point("self_attn.o_proj", "input"),
)
_GEMMA = Family(
    blocks="model.layers",
    resid_post_attn=Point("pre_feedforward_layernorm", "input"),
    resid_delta_attn=Point("post_attention_layernorm", "output"),
    resid_delta_mlp=Point("post_feedforward_layernorm", "output"),
    mlp_post_act=Point("mlp.down_proj", "input"),
    attn_z=Point("self_attn.o_proj", "input"),
)
_GPT_NEOX = Family(
    blocks="gpt_neox.layers",
    resid_post_attn=Point("post_attention_layernorm", "input"),
    resid_delta_attn=Point("attention", "output"),
    resid_delta_mlp=Point("mlp", "output"),
    mlp_post_act=Point("mlp.dense_4h_to_h", "input"),
    attn_z=Point("attention.dense", "input"),
)
_BERT = Family(
    blocks="encoder.layer",
    resid_post_attn=Point("attention.output", "output"),
    resid_delta_attn=Point("attention.output.dense", "output"),
    resid_delta_mlp=Point("output.dense", "output"),
    mlp_post_act=Point("output.dense", "input"),
    attn_z=Point("attention.output.dense", "input"),
)

FAMILIES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA._replace(blocks="model.language_model.layers"),
    "gpt_neox": _GPT_NEOX,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}
"""By `config.model_type`. Models of other types are studied at modules given by their dotted names."""
