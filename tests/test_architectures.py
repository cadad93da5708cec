"""Models of any architecture at modules given by name: what is read, replaced and voted for is what the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from monosem import loading
from monosem.subject import Subject
from tiny import VOCAB_SIZE, tiny_lm
from zoo import CAUSAL, ENCODERS, write

STREAMS = [kind for kind in CAUSAL if kind != "xlnet"]
BLOCK_OF = {kind: f"{where}.1" for kind, (_, _, where) in CAUSAL.items()}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    folders = {kind: write(tmp_path_factory.mktemp(kind.replace(" ", "-")), kind) for kind in (*CAUSAL, *ENCODERS)}
    return {kind: Subject.load(str(folder), dtype="float32", device="cpu") for kind, folder in folders.items()}


def tokens(seed: int = 0, batch: int = 2, ctx: int = 12) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, ctx), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", STREAMS)
def test_a_block_by_its_name_is_the_stream_after_it(subjects: dict[str, Subject], kind: str) -> None:
    subject, x = subjects[kind], tokens()
    with torch.no_grad():
        states = subject.module(x, output_hidden_states=True).hidden_states
    site = subject.site(location=BLOCK_OF[kind])
    assert site.layer == 1 and subject.site_width(site) == 32
    there = subject.capture(x, site)
    torch.testing.assert_close(there, states[1 if kind == "mamba" else 2])  # whose states leave the embeddings out
    after = subject.site(location=BLOCK_OF[kind].replace(".1", ".2") + ":input")
    assert torch.equal(subject.capture(x, after), there)
    assert torch.equal(subject.run_with(x, site, lambda a: a), subject.logits(x))
    other = subject.capture(tokens(1), site)
    torch.testing.assert_close(subject.run_with(x, site, lambda _: other), subject.logits(tokens(1)))
    torch.testing.assert_close(subject.run_with(x, after, lambda _: other), subject.logits(tokens(1)))


@pytest.mark.parametrize("kind", STREAMS)
def test_going_on_from_the_past_is_one_forward_pass(subjects: dict[str, Subject], kind: str) -> None:
    """Of attention's keys and values, and of recurrent models, whose state is not enough."""
    subject, x = subjects[kind], tokens()
    site, halved = subject.site(location=BLOCK_OF[kind]), subject.logits(x)
    past = subject.read(x[:, :5])
    torch.testing.assert_close(subject.run_with(x[:, 5:], site, lambda a: a, past), halved[:, 5:], atol=1e-5, rtol=1e-4)
    late = subject.run_with(x, site, lambda a: torch.cat([a[:, :5], a[:, 5:] / 2], dim=1))[:, 5:]
    torch.testing.assert_close(subject.run_with(x[:, 5:], site, lambda a: a / 2, past), late, atol=1e-5, rtol=1e-4)
    assert subject._keeps_past == (kind != "mamba")


@pytest.mark.parametrize("kind", ["mamba", "opt"])
def test_continue_with_replaces_each_token_once(subjects: dict[str, Subject], kind: str) -> None:
    subject, x, seen = subjects[kind], tokens(), []
    site = subject.site(location=BLOCK_OF[kind])

    def half(a: Tensor) -> Tensor:
        seen.append(a.shape[1])
        return a / 2

    found = subject.continue_with(x, site, half, 4, lambda logits: logits.argmax(-1))
    assert seen == [12, 1, 1, 1]
    for _ in range(4):
        following = subject.run_with(x, site, lambda a: a / 2)[:, -1].argmax(-1)
        x = torch.cat([x, following[:, None]], dim=1)
    assert torch.equal(found, x[:, 12:])


@pytest.mark.parametrize("kind", [kind for kind in STREAMS if kind not in ("opt-projected", "gemma2")])
def test_unembedding_and_gain_give_the_logits_of_a_stream(subjects: dict[str, Subject], kind: str) -> None:
    """Logits of two tokens differ by the unembedding of the gain times what their normalised streams differ by."""
    subject, x = subjects[kind], tokens()
    last = subject.site(location=f"{CAUSAL[kind][2]}.{subject.n_layers - 1}")
    unembedding, gain = subject.unembedding(last)
    stream, logits = subject.capture(x, last)[0], subject.logits(x)[0]
    centred = stream - stream.mean(-1, keepdim=True)
    normalised = [y / y.square().mean(-1, keepdim=True).sqrt() for y in (stream, centred)]
    expected = [(gain * (y[1:] - y[:1])) @ unembedding.T for y in normalised]
    found = logits[1:] - logits[:1]
    assert min(float((found - e).norm() / found.norm()) for e in expected) < 1e-3


def test_a_soft_cap_counts_as_none_and_what_is_not_known_is_said(subjects: dict[str, Subject]) -> None:
    gemma = subjects["gemma2"]
    norm: Any = gemma.module.get_submodule("model.norm")
    torch.testing.assert_close(gemma.unembedding(gemma.site(1))[1], 1 + norm.weight.detach(), rtol=1e-3, atol=1e-3)
    opt, projected = subjects["opt"], subjects["opt-projected"]
    with pytest.raises(ValueError, match="Linear, which the unembedding reads, is no norm with a gain"):
        projected.unembedding(projected.site(location=BLOCK_OF["opt"]))
    for name in (f"{BLOCK_OF['opt']}.self_attn.q_proj", f"{BLOCK_OF['opt']}.fc2:input", "model.decoder.embed_tokens"):
        with pytest.raises(ValueError, match="is not known to be written to the residual stream"):
            opt.unembedding(opt.site(location=name))
    for place in ("mlp_post_act", "attn_z"):
        with pytest.raises(ValueError, match=f"{place} is not known to be written"):
            gemma.unembedding(gemma.site(1, place))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_model_of_text_without_a_head_is_read_for_its_activations(subjects: dict[str, Subject], kind: str) -> None:
    subject = subjects[kind]
    make, _, where = ENCODERS[kind]
    assert not subject.has_logits
    site = subject.site(location=where)
    assert subject.capture(tokens(), site).shape == (2, 12, 32)
    with_head = make.from_pretrained(subject.model, dtype=torch.float32).eval()
    outputs: list[Any] = []
    base = getattr(with_head, with_head.base_model_prefix, with_head)
    base.get_submodule(where).register_forward_hook(lambda *a: outputs.append(a[2]))
    with torch.no_grad():
        with_head(tokens())
    expected = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    torch.testing.assert_close(subject.capture(tokens(), site), expected)
    with pytest.raises(ValueError, match="gives no next-token logits"):
        subject.logits(tokens())


@pytest.mark.parametrize(
    ("names", "has_logits"),
    [
        (["LlamaForCausalLM"], True),
        (["LLaMAForCausalLM"], True),  # as in the first conversions
        (["MistralForCausalLM"], True),
        (None, True),
        (["LlamaModel"], False),
        (["LlamaForSequenceClassification"], False),
    ],
)
def test_a_causal_model_keeps_its_head(tmp_path: Path, names: list[str] | None, has_logits: bool) -> None:
    folder = damaged(tiny_lm(tmp_path / "m"), "config.json", config(architectures=names))
    assert Subject.load(str(folder), dtype="float32", device="cpu").has_logits == has_logits


def test_how_long_a_context_may_be(subjects: dict[str, Subject]) -> None:
    """Positions that count from behind the padding token are fewer; some models have no limit."""
    lengths = {kind: subject.max_context for kind, subject in subjects.items()}
    assert (lengths["mpnet"], lengths["opt"], lengths["mpt"], lengths["distilbert"]) == (62, 64, 64, 64)
    assert lengths["bloom"] == lengths["mamba"] == lengths["t5"] == 2**31 - 1
    assert subjects["mpnet"].capture(tokens(ctx=62), subjects["mpnet"].site(location="encoder.layer.1")).shape[1] == 62


def test_sites_that_are_no_one_place_are_refused(subjects: dict[str, Subject]) -> None:
    albert = subjects["albert"]
    shared = albert.site(location="encoder.albert_layer_groups.0.albert_layers.0.ffn")
    with pytest.raises(ValueError, match="is called 3 times in a forward pass"):
        albert.capture(tokens(), shared)
    with pytest.raises(ValueError, match="is called 3 times"):
        albert.site_width(shared)
    xlnet = subjects["xlnet"]
    with pytest.raises(ValueError, match=r"gives a tensor \[\d, \d, 32\], not a vector per token"):
        xlnet.site_width(xlnet.site(location="transformer.layer.1"))


def test_the_side_of_a_module(subjects: dict[str, Subject]) -> None:
    mixtral, x = subjects["mixtral"], tokens()
    attention = "model.layers.1.self_attn"
    entering = mixtral.capture(x, mixtral.site(location=f"{attention}:input"))  # a keyword argument
    assert torch.equal(entering, mixtral.capture(x, mixtral.site(location="model.layers.1.input_layernorm")))
    z, projected = (mixtral.site(location=f"{attention}.o_proj{side}") for side in (":input", ""))
    projection: Any = mixtral.module.get_submodule(f"{attention}.o_proj")
    torch.testing.assert_close(projection(mixtral.capture(x, z)), mixtral.capture(x, projected))
    both = mixtral.capture_all(x, [z, projected])
    assert torch.equal(both[0], mixtral.capture(x, z)) and torch.equal(both[1], mixtral.capture(x, projected))
    torch.testing.assert_close(
        mixtral.run_with(x, z, torch.zeros_like), mixtral.run_with(x, projected, torch.zeros_like)
    )
    for wrong in (f"{attention}:output", f"{attention}:", ":input", f"{attention}.o_proj.input", ""):
        with pytest.raises(ValueError, match="location is "):
            mixtral.site(location=wrong)


# What is refused in words


def damaged(folder: Path, name: str, change: Any) -> Path:
    file = folder / name
    file.write_bytes(change(file.read_bytes()) if file.exists() else change(b""))
    return folder


def config(**changes: Any) -> Any:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def shards(names: dict[str, str]) -> Any:
    return lambda _: json.dumps({"metadata": {}, "weight_map": names}).encode()


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
INDEX = "model.safetensors.index.json"
DAMAGES: dict[str, tuple[str, Any, str]] = {
    "shapes": (
        "config.json",
        config(intermediate_size=65),
        r"mlp\.down_proj\.weight is \[\d+, \d+\] in its safetensors, but \[\d+, 65\] by its config",
    ),
    "no layers": ("config.json", config(num_hidden_layers=-1), "its config gives it -1 layers"),
    "no numbers": ("config.json", config(rms_norm_eps=-1e9), "forward pass gives values that are not finite"),
    "what is announced": ("config.json", config(hidden_size=33), "validate_architecture': .*hidden size"),
    "config of another type": ("config.json", config(hidden_size="wide"), "cannot load"),
    "heads that do not divide": ("config.json", config(num_attention_heads=0), "cannot load"),
    "config a list": ("config.json", lambda _: b"[1, 2]", "cannot load"),
    "config nested": ("config.json", lambda _: NESTED, "cannot load"),
    "config not text": ("config.json", lambda _: b"\xff\xfe\x00", "cannot load"),
    "no type": ("config.json", config(model_type=None, architectures=None), "cannot load"),
    "code of its own": ("config.json", config(model_type="mine", auto_map={"AutoConfig": "x.Y"}), "cannot load"),
    "a shard outside": (INDEX, shards({"lm_head.weight": "../model.safetensors"}), "no file beside it"),
    "an absolute shard": (INDEX, shards({"lm_head.weight": "/etc/passwd"}), "no file beside it"),
    "a missing shard": (INDEX, shards({"lm_head.weight": "model-00002-of-2.safetensors"}), "lacks model-00002"),
    "an index of nothing": (INDEX, lambda _: b'{"weight_map": [1]}', "no weight_map"),
    "a nested index": (INDEX, lambda _: NESTED, "index.json cannot be read"),
    "weights cut": ("model.safetensors", lambda data: data[:-999], "cannot load"),
    "weights without header": ("model.safetensors", lambda data: bytes(8) + data[8:], "cannot load"),
    "weights empty": ("model.safetensors", lambda _: b"", "cannot load"),
    "tokenizer cut": ("tokenizer.json", lambda data: data[: len(data) // 2], "cannot load the tokenizer"),
    "tokenizer of another kind": ("tokenizer.json", lambda _: b'{"model": {"type": "BPE"}}', "cannot load"),
    "tokenizer nested": ("tokenizer.json", lambda _: NESTED, "cannot load"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_a_line(tmp_path: Path, damage: str) -> None:
    name, change, told = DAMAGES[damage]
    folder = damaged(tiny_lm(tmp_path / "m"), name, change)
    with pytest.raises(ValueError, match=told) as raised:
        Subject.load(str(folder))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 800


def test_a_model_whose_forward_fails_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """Its weights have the shapes that its config gives, but heads that do not fit together."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    models = {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=3)),
        "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, num_attention_heads=8, num_key_value_heads=5)),
    }
    for name, model in models.items():
        folder = tiny_lm(tmp_path / name)
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=f"cannot load {name} from .*its forward pass fails: .*size") as raised:
            Subject.load(str(folder))
        assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for value in (float("nan"), float("inf")):
        folder = tiny_lm(tmp_path / str(value))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has weights that are not finite"):
            Subject.load(str(folder))


def test_what_is_no_model_of_text_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {
        "vit": (hf.ViTModel(hf.ViTConfig(**small, image_size=32)), "'vit' reads pixel_values, not text"),
        "wav2vec2": (
            hf.Wav2Vec2Model(hf.Wav2Vec2Config(**small, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,),
                                               num_conv_pos_embedding_groups=4)),
            "'wav2vec2' reads input_values, not text",
        ),
        "t5": (
            hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                                                      num_heads=4)),
            "'t5' is an encoder-decoder, .* saved as T5EncoderModel its encoder can be read",
        ),
    }  # fmt: skip
    for name, (model, told) in kinds.items():
        folder = tiny_lm(tmp_path / name)
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=told):
            Subject.load(str(folder))


def test_a_tokenizer_without_special_tokens_and_one_larger_than_the_model(tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        settings.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    damaged(folder, "config.json", config(bos_token_id=50_000, eos_token_id=None, pad_token_id=None))
    subject = Subject.load(str(folder), dtype="float32", device="cpu")
    assert subject.prefix_token == 0 and len(subject.vocabulary()) == VOCAB_SIZE
    subject.tokenizer.add_tokens(["entirely new"])
    ids = subject.tokenizer("entirely new")["input_ids"]
    with pytest.raises(ValueError, match=f"knows 0 to {VOCAB_SIZE - 1}"):
        subject.logits(torch.tensor([ids]))
    assert len(subject.vocabulary()) == VOCAB_SIZE


@pytest.mark.parametrize(
    "content", [b"GGUF", b"GGUF" + bytes(64), b"FUGG" + bytes(64), b"GGUF\x03\0\0\0" + b"\xff" * 40]
)
def test_a_damaged_gguf_is_refused_whatever_its_suffix_is_written_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path / "cache"))
    for name in ("My Model.GGUF", "m.gguf"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot load {name}"):
            Subject.load(str(tmp_path / name))
    assert loading.locate(str(tiny_lm(tmp_path / "dir.GGUF")), None)[0] == "dir.GGUF"
