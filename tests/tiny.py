"""Tiny things that tests run on: models that load in milliseconds, and text that looks a little like English."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from monosem import artifacts, formats

FAMILIES = ("llama", "gpt2", "gemma3_text", "gpt_neox", "bert")
SPECIAL = ("<s>", "</s>", "<pad>")
MERGES = (
    "t h,th e,Ġ the,i n,a n,e r,o n,r e,Ġ a,an d,Ġ and,in g,o u,e n,s t,"
    "Ġ s,Ġ o,Ġo f,Ġ t,Ġt o,e d,o r,Ġ w,Ġ c,Ġ b,a t,i s,l e"
)
D_MODEL, N_LAYERS, VOCAB_SIZE = 32, 4, len(SPECIAL) + 256 + len(MERGES.split(","))


def tiny_lm(folder: str | Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a random model (d_model 32, 4 layers, context 128) of `family` and a byte-level tokenizer into `folder`."""
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few English merges; ids 0, 1, 2 are BOS, EOS and PAD, and any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in MERGES.split(","))]
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def tiny_corpus(folder: str | Path, n_documents: int = 100, seed: int = 0) -> Path:
    """Write `corpus.jsonl` (an object with `text` a line) of pseudo-English documents, 3 to ~300 words long."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(n_documents, seed)), "utf-8")
    return path


def tiny_texts(n_documents: int, seed: int = 0) -> list[str]:
    """The documents of `tiny_corpus`; no two are the same."""
    rng = random.Random(seed)
    sounds = [
        a + b for a in ("th", "s", "b", "r", "st", "w", "l", "n", "") for b in ("e", "and", "ing", "or", "at", "is")
    ]
    lexicon = ["".join(rng.choices(sounds, k=rng.choice((1, 1, 2, 3)))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(lexicon))]  # Zipf, as words are
    return [f"{_sentences(rng, lexicon, weights)} Story {number}." for number in range(n_documents)]


def tiny_run(out: Path, model: Path, corpus: Path, n_latents: int = 48, location: str = "resid_post_mlp") -> None:
    """A store of the subject in out/store, and TopK latents trained on it in `out`: a second or two."""
    from monosem.activations import harvest
    from monosem.config import HarvestConfig, TrainConfig
    from monosem.training import train

    harvest(
        HarvestConfig(
            out=str(out / "store"), model=str(model), corpus=str(corpus), context_length=16, n_tokens=2000,
            location=location,
            n_tokens_held_out=400, held_out_fraction=0.2, dtype="float32", block_contexts=8, device="cpu",
        )
    )  # fmt: skip
    train(TrainConfig(out=str(out), store=str(out / "store"), n_latents=n_latents, k=4, n_tokens=3000, batch_size=100))


def _sentences(rng: random.Random, lexicon: list[str], weights: list[float]) -> str:
    n_words = round(3 * 100 ** rng.random())
    words = rng.choices(lexicon, weights, k=n_words)
    sentences = [" ".join(words[start : start + 8]).capitalize() for start in range(0, n_words, 8)]
    return ". ".join(sentences) + "."


def _model(family: str) -> Any:
    shape: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.1}
    shape |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    wide = {"hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    wide |= {"max_position_embeddings": 128}
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, **wide, num_key_value_heads=2))
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(**shape, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=128))
        case "gemma3_text":
            heads = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16}
            return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **wide, **heads))
        case "gpt_neox":
            return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **wide))
        case "gpt_neox_sequential":
            return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **wide, use_parallel_residual=False))
        case "bert":
            return BertForMaskedLM(BertConfig(**shape, **wide))
    raise ValueError(f"no tiny {family}; choose one of {', '.join(FAMILIES)}")


def reseal(path: Path, data: dict[str, Any] | None = None) -> None:
    """Write `data`, or what is in the file, as a whole manifest: what a test has changed in it is taken for true."""
    artifacts.write_json(path, formats.sealed(artifacts.read_json(path) if data is None else data))


def reseal_explanation(run: Path, **columns: np.ndarray) -> None:
    """Write these columns of RUN/explain, and let its manifest vouch for every file as it is now."""
    folder = run / "explain"
    manifest = artifacts.read_json(folder / "manifest.json")
    for name, array in columns.items():
        np.save(folder / f"{name}.npy", array)
        about = {"dtype": str(array.dtype), "shape": list(array.shape), "meaning": name, "part": "activations"}
        manifest["columns"][name] = about
    for name, facts in manifest["columns"].items():
        facts |= artifacts.file_facts(folder / f"{name}.npy")
    for name in ("words.sqlite", "vocabulary.json"):
        manifest["files"][name] = {"part": "words", **artifacts.file_facts(folder / name)}
    reseal(folder / "manifest.json", manifest)
