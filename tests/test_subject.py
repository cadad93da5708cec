from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monosem import loading, resources
from monosem.subject import Subject
from monosem.types import LOCATIONS, Site
from tiny import N_LAYERS, VOCAB_SIZE, tiny_lm, tiny_tokenizer

CAUSAL = ("llama", "gpt2", "gemma3_text", "gpt_neox_sequential", "gpt_neox")
PARALLEL = "gpt_neox"
EVERY = (*CAUSAL, "bert")
PLACES = [(f, place) for f in EVERY for place in LOCATIONS if (f, place) != (PARALLEL, "resid_post_attn")]
CAUSAL_PLACES = [(family, place) for family, place in PLACES if family in CAUSAL]
LAYER = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_lm(tmp_path_factory.mktemp(family), family) for family in EVERY}


@pytest.fixture(scope="module")
def subjects(folders: dict[str, Path]) -> dict[str, Subject]:
    return {family: Subject.load(str(folders[family]), dtype="float32", device="cpu") for family in EVERY}


@pytest.fixture(scope="module")
def subjects_bf16(folders: dict[str, Path]) -> dict[str, Subject]:
    return {family: Subject.load(str(folders[family]), dtype="bfloat16", device="cpu") for family in CAUSAL}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokens(seed: int = 0, batch: int = 3, ctx: int = 20) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, ctx), generator=torch.Generator().manual_seed(seed))


def block(subject: Subject, layer: int) -> nn.Module:
    assert subject._family is not None
    return subject.module.get_submodule(f"{subject._family.blocks}.{layer}")


# What is captured


@pytest.mark.parametrize("family", EVERY)
def test_capture_resid_post_mlp_is_the_hidden_state_after_the_block(subjects: dict[str, Subject], family: str) -> None:
    subject = subjects[family]
    with torch.no_grad():
        states = subject.module(tokens(), output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):  # transformers gives the last one after the final norm
        assert torch.equal(subject.capture(tokens(), subject.site(layer)), states[layer + 1])


@pytest.mark.parametrize("family", EVERY)
def test_capture_deltas_add_up_to_the_residual_stream(subjects: dict[str, Subject], family: str) -> None:
    subject = subjects[family]
    before = subject.capture(tokens(), subject.site(LAYER - 1))
    here = {place: subject.capture(tokens(), subject.site(LAYER, place)) for f, place in PLACES if f == family}
    after_attn: nn.Module = nn.Identity()
    after_mlp: nn.Module = nn.Identity()
    if family == "bert":
        after_attn, after_mlp = (
            block(subject, LAYER).get_submodule(f"{part}output.LayerNorm") for part in ("attention.", "")
        )
    if family == PARALLEL:
        expected = before + here["resid_delta_attn"] + here["resid_delta_mlp"]
    else:
        torch.testing.assert_close(here["resid_post_attn"], after_attn(before + here["resid_delta_attn"]))
        expected = after_mlp(here["resid_post_attn"] + here["resid_delta_mlp"])
    torch.testing.assert_close(here["resid_post_mlp"], expected)
    assert here["resid_delta_attn"].std() > 0.01 and here["resid_delta_mlp"].std() > 0.01


@pytest.mark.parametrize("family", EVERY)
def test_capture_mlp_post_act_is_what_the_output_projection_reads(subjects: dict[str, Subject], family: str) -> None:
    subject = subjects[family]
    path = {"gpt2": "mlp.c_proj", "bert": "output.dense", "llama": "mlp.down_proj", "gemma3_text": "mlp.down_proj"}
    projection = block(subject, LAYER).get_submodule(path.get(family, "mlp.dense_4h_to_h"))
    after = (
        block(subject, LAYER).get_submodule("post_feedforward_layernorm") if family == "gemma3_text" else nn.Identity()
    )
    hidden = subject.capture(tokens(), subject.site(LAYER, "mlp_post_act"))
    delta = subject.capture(tokens(), subject.site(LAYER, "resid_delta_mlp"))
    torch.testing.assert_close(after(projection(hidden)), delta)
    assert (
        hidden.shape[-1] == subject.site_width(subject.site(LAYER, "mlp_post_act")) == (128 if family == "gpt2" else 64)
    )


def test_capture_takes_a_dotted_name_and_the_first_of_a_tuple(subjects: dict[str, Subject]) -> None:
    llama = subjects["llama"]
    site = llama.site(location="model.layers.1.self_attn")
    assert site == Site(llama.model, None, 1, "model.layers.1.self_attn")
    assert torch.equal(llama.capture(tokens(), site), llama.capture(tokens(), llama.site(1, "resid_delta_attn")))
    assert llama.site(location="model.embed_tokens").layer == -1
    swapped = llama.run_with(tokens(), site, torch.zeros_like)
    assert torch.equal(swapped, llama.run_with(tokens(), llama.site(1, "resid_delta_attn"), torch.zeros_like))


def test_capture_gives_an_ordinary_tensor_that_autograd_accepts(subjects: dict[str, Subject]) -> None:
    acts = subjects["llama"].capture(tokens(), subjects["llama"].site())
    weight = torch.ones(acts.shape[-1], requires_grad=True)
    (acts * weight).sum().backward()
    assert not acts.requires_grad and weight.grad is not None


# What is computed


class Calls:
    """Counts the calls of the modules that come after a site."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.count = 0
        self.handles = [module.register_forward_pre_hook(self.see) for module in modules]

    def see(self, *_: object) -> None:
        self.count += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(("family", "place"), PLACES)
def test_capture_runs_nothing_after_the_site(subjects: dict[str, Subject], family: str, place: str) -> None:
    subject = subjects[family]
    later = [block(subject, layer) for layer in range(LAYER + 1, N_LAYERS)]
    if subject.has_logits:
        later.append(subject.module.get_output_embeddings())  # type: ignore[operator]
    if place in ("resid_post_attn", "resid_delta_attn"):
        later.append(block(subject, LAYER).get_submodule("intermediate" if family == "bert" else "mlp"))
    with Calls(later) as calls:
        subject.capture(tokens(), subject.site(LAYER, place))
    assert calls.count == 0
    with Calls(later) as calls:
        subject._forward(tokens())
    assert calls.count == len(later)


def test_no_hook_stays_behind_even_after_an_error(subjects: dict[str, Subject]) -> None:
    llama = subjects["llama"]

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("mine")

    def hooks() -> list[object]:  # transformers has some of its own
        return [
            hook
            for m in llama.module.modules()
            for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        ]

    before = hooks()
    for place in LOCATIONS:
        llama.capture(tokens(), llama.site(1, place))
        with pytest.raises(RuntimeError, match="mine"):
            llama.run_with(tokens(), llama.site(1, place), fail)
    assert hooks() == before


# What is replaced


@pytest.mark.parametrize(("family", "place"), CAUSAL_PLACES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_run_with_identity_changes_no_bit(
    subjects: dict[str, Subject], subjects_bf16: dict[str, Subject], family: str, place: str, dtype: str
) -> None:
    subject = (subjects if dtype == "float32" else subjects_bf16)[family]
    site, expected = subject.site(LAYER, place), subject.logits(tokens())
    assert torch.equal(subject.run_with(tokens(), site, lambda x: x), expected)
    assert torch.equal(subject.run_with(tokens(), site, lambda x: x.float().clone()), expected)
    assert not torch.equal(subject.run_with(tokens(), site, lambda x: x * 0.5), expected)
    assert expected.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("layer", range(N_LAYERS))
@pytest.mark.parametrize(("family", "place"), [case for case in CAUSAL_PLACES if case[1].startswith("resid_post")])
def test_run_with_another_texts_residual_stream_gives_that_texts_logits(
    subjects: dict[str, Subject], family: str, place: str, layer: int
) -> None:
    """What comes later is a function of the residual stream alone, so all its readers must see the replacement."""
    subject = subjects[family]
    site, other = subject.site(layer, place), tokens(seed=1)
    there = subject.capture(other, site)
    logits = subject.run_with(tokens(), site, lambda _: there)
    assert torch.equal(logits, subject.logits(other))


@pytest.mark.parametrize("family", CAUSAL)
def test_run_with_a_zero_delta_leaves_the_stream_as_it_was(subjects: dict[str, Subject], family: str) -> None:
    subject = subjects[family]
    if family != PARALLEL:
        before_mlp = subject.capture(tokens(), subject.site(LAYER, "resid_post_attn"))
    else:
        attn = subject.capture(tokens(), subject.site(LAYER, "resid_delta_attn"))
        before_mlp = subject.capture(tokens(), subject.site(LAYER - 1)) + attn
    expected = subject.run_with(tokens(), subject.site(LAYER), lambda _: before_mlp)
    got = subject.run_with(tokens(), subject.site(LAYER, "resid_delta_mlp"), torch.zeros_like)
    torch.testing.assert_close(got, expected)
    hidden = subject.capture(tokens(1), subject.site(LAYER, "mlp_post_act"))
    delta = subject.capture(tokens(1), subject.site(LAYER, "resid_delta_mlp"))
    got = subject.run_with(tokens(), subject.site(LAYER, "mlp_post_act"), lambda _: hidden)
    torch.testing.assert_close(got, subject.run_with(tokens(), subject.site(LAYER, "resid_delta_mlp"), lambda _: delta))


def test_run_with_hands_over_the_subjects_dtype_and_refuses_another_shape(subjects_bf16: dict[str, Subject]) -> None:
    llama = subjects_bf16["llama"]
    seen: list[Tensor] = []
    llama.run_with(tokens(), llama.site(), lambda x: seen.append(x) or x)  # type: ignore[func-returns-value]
    assert [x.dtype for x in seen] == [torch.bfloat16] == [llama.dtype]
    with pytest.raises(ValueError, match=r"has shape \[3, 20, 31\], not \[3, 20, 32\]"):
        llama.run_with(tokens(), llama.site(), lambda x: x[..., 1:])


# What it is


def test_load_says_what_the_model_is(subjects: dict[str, Subject], folders: dict[str, Path]) -> None:
    for family in EVERY:
        subject = subjects[family]
        assert (subject.name, subject.model) == (folders[family].name, str(folders[family]))
        assert (subject.n_layers, subject.d_model, subject.vocab_size, subject.max_context) == (4, 32, VOCAB_SIZE, 128)
        assert subject.prefix_token == subject.tokenizer.bos_token_id == 0
        assert subject.has_logits == (family != "bert")
        assert subject.site() == Site(subject.model, None, 2, "resid_post_mlp")  # ceil(0.75 * 4) - 1
        assert subject.site_width(subject.site()) == 32


def test_hash_is_the_same_for_a_copy_and_another_for_other_weights(tmp_path: Path, folders: dict[str, Path]) -> None:
    shutil.copytree(folders["llama"], tmp_path / "copy")
    tiny_lm(tmp_path / "other", seed=1)
    original, copy, other = (
        Subject.load(str(path)) for path in (folders["llama"], tmp_path / "copy", tmp_path / "other")
    )
    assert original.hash == copy.hash != other.hash
    assert original.tokenizer_hash == copy.tokenizer_hash == other.tokenizer_hash
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "copy")
    assert Subject.load(str(tmp_path / "copy")).tokenizer_hash != original.tokenizer_hash


# What it refuses


def test_site_errors_say_what_there_is(subjects: dict[str, Subject]) -> None:
    llama = subjects["llama"]
    with pytest.raises(ValueError, match=r"layer is 40 but \S+ has 4 layers \(0 to 3\)"):
        llama.site(40)
    with pytest.raises(ValueError, match="layer is -1 but"):
        llama.site(-1)
    with pytest.raises(ValueError, match=r"location is 'resid_mid'.*resid_post_mlp, resid_post_attn, .*dotted name"):
        llama.site(1, "resid_mid")
    with pytest.raises(ValueError, match=r"layer is 3 but the module 'model\.layers\.1\.mlp' is in layer 1"):
        llama.site(3, "model.layers.1.mlp")
    with pytest.raises(ValueError, match=r"revision is 'v2' but .* was loaded at None"):
        llama.site(1, revision="v2")
    with pytest.raises(ValueError, match=r"at once.*no resid_post_attn; choose resid_delta_attn"):
        subjects[PARALLEL].site(1, "resid_post_attn")


def test_capture_refuses_what_is_not_a_vector_per_token(subjects: dict[str, Subject]) -> None:
    llama = subjects["llama"]
    with pytest.raises(ValueError, match=r"rotary_emb gives a tensor .* not a vector per token"):
        llama.capture(tokens(), llama.site(location="model.rotary_emb"))
    with pytest.raises(ValueError, match="takes no part in its forward pass"):
        llama.capture(tokens(), llama.site(location="model.layers"))
    with pytest.raises(ValueError, match="takes no part in its forward pass"):
        llama.run_with(tokens(), llama.site(location="model.layers"), lambda x: x)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (torch.zeros(1, 129, dtype=torch.long), "contexts of 129 tokens; .* at most 128"),
        (torch.tensor([[VOCAB_SIZE]]), f"run from {VOCAB_SIZE} to {VOCAB_SIZE}; .* knows 0 to {VOCAB_SIZE - 1}"),
        (torch.zeros(2, 0, dtype=torch.long), r"shape \[2, 0\]"),
        (torch.zeros(5, dtype=torch.long), r"shape \[5\].*give integers \[batch, ctx\]"),
        (torch.zeros(2, 3), "dtype torch.float32"),
    ],
)
def test_tokens_that_the_subject_cannot_read_are_refused(subjects: dict[str, Subject], bad: Tensor, told: str) -> None:
    llama = subjects["llama"]
    with pytest.raises(ValueError, match=told):
        llama._forward(bad)


def test_an_encoder_has_no_logits_to_give(subjects: dict[str, Subject]) -> None:
    bert = subjects["bert"]
    for call in (lambda: bert.logits(tokens()), lambda: bert.run_with(tokens(), bert.site(), lambda x: x)):
        with pytest.raises(ValueError, match="encoder and gives no next-token logits"):
            call()


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("no/folder/here", {}, "model is 'no/folder/here', which is no folder, .gguf file or hub id; .*smollm2"),
        ("missing.gguf", {}, "model is 'missing.gguf'"),
        ("smollm2-135m-instruct-q4_1", {"revision": "v2"}, "revision is 'v2' but only models from the hub have one"),
        ("whatever", {"dtype": "float16"}, "dtype is 'float16'; choose bfloat16 or float32"),
        ("whatever", {"device": "toaster"}, "device 'toaster' cannot be used here"),
    ],
)
def test_load_says_what_it_could_not_find(model: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        Subject.load(model, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("broken", ["pickle", "config", "type", "torn", "lacking", "tokenizer"])
def test_load_refuses_a_folder_that_is_not_whole(tmp_path: Path, broken: str) -> None:
    folder = tiny_lm(tmp_path / "m")
    weights, config = folder / "model.safetensors", folder / "config.json"
    match broken:
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "config":
            config.unlink()
        case "type":
            config.write_text(
                json.dumps(json.loads(config.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}})
            )
        case "torn":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "lacking":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 5}))
        case "tokenizer":
            for file in folder.glob("tokenizer*"):
                file.unlink()
    told = {
        "pickle": "pickled weights .* never loaded",
        "config": "has no config.json",
        "lacking": "safetensors lack model.layers.4",
    }
    with pytest.raises(ValueError, match=told.get(broken, "cannot load")) as raised:
        Subject.load(str(folder))
    assert "\n" not in str(raised.value)


# GGUF


def tiny_gguf(folder: Path, source: Path) -> Path:
    """The Llama model in `source` as a float32 .gguf file."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocab = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(source / "model.safetensors").items():
        for part, n_heads in heads.items():  # GGUF keeps the two halves of the rotary embedding interleaved
            if part in name:
                tensor = tensor.view(n_heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None
        writer.add_tensor(known, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


@pytest.fixture
def gguf_file(tmp_path: Path, folders: dict[str, Path]) -> Iterator[Path]:
    yield tiny_gguf(tmp_path / "gguf", folders["llama"])


def test_gguf_is_converted_once_to_a_plain_folder_with_the_same_logits(
    gguf_file: Path, cache: Path, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = Subject.load(str(gguf_file), dtype="float32", device="cpu")
    assert converted.name == "tiny, de-quantised"
    assert torch.equal(converted.logits(tokens()), subjects["llama"].logits(tokens()))
    assert converted.tokenizer("the string").input_ids[-4:] == subjects["llama"].tokenizer("the string").input_ids[-4:]
    (folder,) = (cache / "converted").iterdir()
    config = (folder / "config.json").read_text()
    assert "gguf" not in config and "quantization" not in config
    assert converted.hash == loading.weights_hash(folder)
    monkeypatch.setattr(loading, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    again = Subject.load(str(gguf_file), device="cpu")
    assert again.hash == converted.hash and again.tokenizer_hash == converted.tokenizer_hash


def test_a_converted_model_is_known_by_its_weights_not_by_its_record(
    gguf_file: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    converted = Subject.load(str(gguf_file), device="cpu")
    (folder,) = (cache / "converted").iterdir()
    record, weights = folder / loading.RECORD, folder / "model.safetensors"
    kept = record.read_text()
    record.write_text(kept.replace('"hash"', '"hush"'))
    assert Subject.load(str(gguf_file), device="cpu").hash == converted.hash
    assert "monosem.json: " in caplog.text and "taken as they are" in caplog.text
    record.write_text(kept)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="was changed after it was converted; delete it"):
        _ = Subject.load(str(gguf_file), device="cpu").hash


def test_gguf_that_cannot_be_read_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match=r"cannot load bad\.gguf") as raised:
        Subject.load(str(bad))
    assert "\n" not in str(raised.value)
    assert list((cache / "converted").iterdir()) == []


def test_a_named_model_is_shown_under_its_full_name(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "fetch", lambda name: gguf_file)
    small = Subject.load("smollm2-135m-instruct-q4_1")
    assert small.name == "SmolLM2-135M-Instruct, Q4_1, de-quantised"
    assert str(small.site()) == "smollm2-135m-instruct-q4_1 layer 2 resid_post_mlp"


def test_load_draws_nothing(gguf_file: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Subject.load(str(gguf_file.rename(gguf_file.with_name("Tiny Model.GGUF"))))
    assert "%|" not in "".join(capfd.readouterr())
