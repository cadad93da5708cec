"""Models on disk: find one, read it without running anything of its own, and say what is wrong with a broken one.

A folder with config, tokenizer and safetensors is read as it is, a .gguf file is de-quantised once into such a folder.
A causal language model keeps its head; any other model of text is read without one, for its activations alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monosem import artifacts, resources, textfiles

CONVERSION_FORMAT = 1
"""Raise when the conversion of GGUF files changes, so that folders converted before are not read any more."""

RECORD = "monosem.json"
"""Beside a converted model: what it was made from, and its hash."""

logger = logging.getLogger("monosem")


def locate(model: str, revision: str | None) -> tuple[str, Path]:
    """The full name of the model and a folder that holds it as config, tokenizer and safetensors."""
    path = Path(model.removeprefix("file:")).expanduser()
    on_hub = re.fullmatch(r"(hf:)?\w[\w.-]*(/\w[\w.-]*)?", model) is not None and not model.lower().endswith(".gguf")
    named = model in resources.names("model")
    if revision is not None and (named or path.exists() or not on_hub):
        raise ValueError(
            f"revision is {revision!r} but only models from the hub have one; leave it unset for {model!r}"
        )
    if named:
        return resources.describe(model).full_name, _converted(resources.fetch(model))
    if path.is_dir():
        return path.resolve().name, path
    if path.suffix.lower() == ".gguf" and path.is_file():
        return f"{path.stem}, de-quantised", _converted(path)
    if on_hub:
        repo_id = model.removeprefix("hf:")
        return repo_id, resources.hub_snapshot(repo_id, revision)
    raise ValueError(
        f"model is {model!r}, which is no folder, .gguf file or hub id; "
        f"give one that exists, or one of {', '.join(resources.names('model'))}"
    )


def load_module(name: str, folder: Path, dtype: str) -> tuple[nn.Module, Any]:
    """The model in evaluation mode, on the CPU, with its config.

    `ValueError` when any weight is missing, not finite or of another shape, or when it does not read token ids alone.
    """
    import transformers

    _weight_files(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _readable(name, folder), _no_progress_bars():
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        if (n_layers := getattr(config.get_text_config(), "num_hidden_layers", 1)) < 1:
            raise ValueError(f"its config gives it {n_layers} layers")
        loader, extra = _loader(config)
        module, report = loader.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # otherwise its message does not say which
            **options,
            **extra,
        )
        if other := sorted(map(tuple, report["mismatched_keys"])):
            key, stored, asked = other[0]
            raise ValueError(f"{key} is {list(stored)} in its safetensors, but {list(asked)} by its config")
        missing = sorted(key for key in report["missing_keys"] if not key.startswith(_POOLER))
        if missing:
            raise ValueError(f"its safetensors lack {', '.join(missing[:3])}")
        if unused := sorted(key for key in report["unexpected_keys"] if loader is transformers.AutoModelForCausalLM):
            logger.warning("%s has weights that its config has no place for: %s", name, ", ".join(unused[:3]))
        broken = [key for key, tensor in module.named_parameters() if not _finite(tensor)]
        if broken:
            raise ValueError(f"{', '.join(broken[:3])} has weights that are not finite")
        _check_reads_tokens(module)
    return module.eval(), config


_POOLER = "pooler."
"""Makes one vector of a whole text, after the last site; some models are saved without its weights."""


def _loader(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class of transformers' that loads a model, and its options; `ValueError` for what is no model of text.

    With its head is what was saved with the head of a causal language model, or can have one and names no other class
    that is known; but for encoders whose type has such a head as well, which were made to read both ways.
    """
    import transformers

    kind = type(config)
    names = [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]
    heads = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    both_ways = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    )
    if kind in heads and not both_ways and not config.is_encoder_decoder:
        of_kind = heads[kind] if isinstance(heads[kind], tuple) else (heads[kind],)
        known = not names or names[0] in {model.__name__ for model in of_kind} or not hasattr(transformers, names[0])
        if known or names[0].endswith(("ForCausalLM", "LMHeadModel")):
            return transformers.AutoModelForCausalLM, {}
    encoders = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    alone = kind in encoders and encoders[kind].__name__.endswith("EncoderModel")  # of an encoder-decoder's type
    if config.is_encoder_decoder and not (alone and names[:1] == [encoders[kind].__name__]):
        hint = f"; saved as {encoders[kind].__name__} its encoder can be read" if alone else ""
        raise ValueError(f"{config.model_type!r} is an encoder-decoder, which is not supported{hint}")
    if alone:
        return transformers.AutoModelForTextEncoding, {}
    if kind not in transformers.MODEL_MAPPING:
        raise ValueError(f"{config.model_type!r} is an encoder of a kind that cannot be read without its head")
    model = transformers.MODEL_MAPPING[kind]
    if model.main_input_name != "input_ids":
        raise ValueError(f"{config.model_type!r} reads {model.main_input_name}, not text; give a model of text")
    pools = "add_pooling_layer" in inspect.signature(model.__init__).parameters
    return transformers.AutoModel, {"add_pooling_layer": False} if pools else {}


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is: its extremes are NaN where any of it is."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.detach().aminmax())


def _check_reads_tokens(module: Any) -> None:
    """`ValueError` unless the model embeds token ids, and its forward pass gives numbers for them alone."""
    try:
        embeddings = module.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not isinstance(getattr(embeddings, "num_embeddings", None), int):
        raise ValueError(f"{type(module).__name__} has no embedding of tokens; give a model of text")
    try:
        with torch.inference_mode():
            found = module(torch.zeros(1, 2, dtype=torch.long))[0]
    except Exception as error:  # sizes in its config that do not fit together end in any exception
        raise ValueError(f"its forward pass fails: {_reason(error)}") from error
    if isinstance(found, torch.Tensor) and not _finite(found):
        raise ValueError("its forward pass gives values that are not finite")


def load_tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with _readable(f"the tokenizer of {name}", folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _converted(gguf: Path) -> Path:
    """The folder in the cache where the GGUF lies de-quantised, in float32; made on the first call for that file."""
    sha256 = artifacts.sha256_file(gguf)
    folder = resources.cache_folder() / "converted" / f"{sha256[:32]}-{CONVERSION_FORMAT}"
    if not folder.exists():
        with resources.cache_lock(folder.name):
            if not folder.exists():
                logger.info("de-quantising %s into %s", gguf, folder)
                with resources.new_folder(folder) as temporary:
                    _convert_gguf(gguf, temporary)
                    made = artifacts.manifest("subject", {}, {"gguf": sha256}, hash=weights_hash(temporary))
                    artifacts.write_json(temporary / RECORD, made)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer in `gguf` as a plain folder: float32 safetensors, nothing that mentions GGUF.

    A model loaded from a GGUF stays marked as quantised and refuses to be saved, so its tensors move to a plain one.
    """
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    own_bar = contextlib.redirect_stderr(io.StringIO())  # its GGUF reader asks nobody before it draws
    with _readable(gguf.name, gguf), _no_progress_bars(), own_bar:
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **unpack, **options
        )
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(packed.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; `ValueError` when it has none (pickled ones do not count)."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names = _shards(index) if index.exists() else [file.name]
    lacking = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    if lacking and index.exists():
        raise ValueError(f"{folder} lacks {', '.join(lacking[:3])}; give a complete model")
    if lacking:
        raise ValueError(
            f"{folder} has no config.json with a model.safetensors; give a folder that has "
            f"(pickled weights such as pytorch_model.bin are never loaded: save the model as safetensors first)"
        )
    return [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names, which lie beside it. `ValueError` when it is not such an index."""
    try:
        found = artifacts.read_json(index)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} cannot be read ({str(error)[:200]}); give a complete model") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names:
        raise ValueError(f"{index} has no weight_map that names files; give a complete model")
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file beside it; give a complete model")
    return names


def weights_hash(folder: Path) -> str:
    lines = [f"{path.name} {artifacts.sha256_file(path)}\n" for path in _weight_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def config_hash(folder: Path) -> str:
    """sha256 of config.json, by which the same weights give other activations, without what says only who wrote it."""
    config = json.loads(textfiles.read_text(folder / "config.json"))
    told = {name: value for name, value in config.items() if name not in _OF_THE_WRITER}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


_OF_THE_WRITER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(definition.encode()).hexdigest()


def prefix_token(tokenizer: Any, config: Any, vocab_size: int) -> int:
    """BOS, or for want of it CLS, EOS, PAD or token 0: the first that the model has an embedding of."""
    choices = (
        tokenizer.bos_token_id,
        getattr(config, "bos_token_id", None),
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return next((token for token in choices if isinstance(token, int) and 0 <= token < vocab_size), 0)


def max_context(module: nn.Module, config: Any) -> int:
    """The longest context: as many as it has positions, or no limit (ALiBi, recurrent)."""
    for name, table in module.named_modules():
        counted = isinstance(table, nn.Embedding) and name.endswith("position_embeddings")
        if counted and table.padding_idx is not None:  # RoBERTa's kin count from the padding token's id + 1
            return int(table.num_embeddings) - int(table.padding_idx) - 1
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions")]
    return next((n for n in found if isinstance(n, int) and n > 0), 2**31 - 1)


@contextlib.contextmanager
def _readable(name: str, path: Path) -> Iterator[None]:
    """Turn what transformers raises about a model that it cannot read into one line that says which and what to do."""
    try:
        yield
    except BaseException as error:  # a damaged file ends in any exception, a panic of tokenizers is not even one
        damaged = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if not damaged and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"cannot load {name} from {path} ({_reason(error)}); give a complete model of a type that transformers "
            f"knows without running code of its own, or one of {', '.join(resources.names('model'))}"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of a message, and the next where that only announces it."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing on stderr; its setting is put back afterwards."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
