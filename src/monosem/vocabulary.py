"""Every token of a tokenizer as the text that it stands for, asked of the tokenizer's own decoder.

    pieces(tokenizer, 32_000)[13] == "\\n"         # where the vocabulary writes <0x0A>, Ċ or \\n
    "".join(pieces[i] for i in ids)               # the text that ids decode to

How a vocabulary spells its pieces (bytes as other characters, ▁ or </w> for a space, ## for none) is known to the
decoder alone. It is asked for each piece between two letters, as a decoder may treat the first and the last of a text
otherwise. What joins up is the text up to a space at its start, and up to characters that several tokens share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_BEFORE, _AFTER = "a", "b"
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""

Decode = Callable[[list[str]], str]


def pieces(tokenizer: Any, n: int) -> list[str]:
    """The texts of the tokens 0 to n - 1, in their place between others.

    A token that is part of a character shows the replacement character; a control token, or one that was added to the
    vocabulary, its own name; an id that no token has the empty text.
    """
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decode = tokenizer.convert_tokens_to_string if backend is None else _decoder(backend)
    named = _named(tokenizer, backend)
    tail = _after(decode, [_BEFORE, _AFTER])
    return [named[i] if i in named else _piece(decode, by_id[i], tail) if i in by_id else "" for i in range(n)]


def _piece(decode: Decode, token: str, tail: str) -> str:
    """What `token` adds between two others."""
    found = _after(decode, [_BEFORE, token, _AFTER])
    return found.removesuffix(tail) if found.endswith(tail) else _after(decode, [_BEFORE, token])


def _after(decode: Decode, tokens: list[str]) -> str:
    """What is decoded after the first of `tokens`."""
    return decode(tokens).removeprefix(decode(tokens[:1]))


def _named(tokenizer: Any, backend: Any) -> dict[int, str]:
    """The tokens that are shown by their name: control tokens, and those added beside the model's own vocabulary.

    (What is declared as added may be one of the model's, spelt as its vocabulary is: Gemma's runs of spaces, bytes.)
    """
    own = None if backend is None else backend.model
    controls = set(tokenizer.all_special_ids)
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if i in controls
        or own is None
        or own.id_to_token(i) is None
        or (token.special and not re.fullmatch("<0x[0-9A-F]{2}>", token.content))
    }


def _decoder(backend: Any) -> Decode:
    """The backend's decoder; for want of one, what undoes its normalizer, pre-tokenizer and model."""
    from tokenizers import decoders

    if backend.decoder is not None:
        return backend.decoder.decode
    definition = json.loads(backend.to_str())
    model = definition["model"]
    kinds = _kinds(definition["pre_tokenizer"]) | _kinds(definition["normalizer"])
    if "ByteLevel" in kinds:
        return decoders.ByteLevel().decode
    if model["type"] == "WordPiece":
        return decoders.WordPiece(prefix=model["continuing_subword_prefix"], cleanup=False).decode
    if model.get("end_of_word_suffix"):
        return decoders.BPEDecoder(suffix=model["end_of_word_suffix"]).decode
    steps: list[Any] = [decoders.ByteFallback()] if model.get("byte_fallback") else []
    written = _written(backend, "a b")
    if _SPACE in "".join(written):
        steps = [decoders.Replace(_SPACE, " "), *steps]
    elif not any(" " in word for word in written):  # spaces only separate words
        return " ".join
    return decoders.Sequence([*steps, decoders.Fuse()]).decode


def _written(backend: Any, text: str) -> list[str]:
    """The words of a text as they reach the model."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _kinds(definition: Any) -> set[str]:
    """The types in a definition of a pre-tokenizer or normalizer, those in a sequence too."""
    if not isinstance(definition, dict):
        return set()
    inside = [*definition.get("pretokenizers", []), *definition.get("normalizers", [])]
    return {definition.get("type", "")}.union(*map(_kinds, inside))
