"""Every piece of a vocabulary is shown as its text, however the tokenizer spells it: pieces joined give the text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from monosem.vocabulary import pieces
from tiny import tiny_tokenizer

TEXTS = [
    "the quick brown fox, the lazy dog",
    "Свеча горела на столе",
    "夜空の星は静か",
    "ไทยภาษา",
    "عربي نص",
    "naïve 🦊\tand\nnew  lines",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level() -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainer, split, decoders.ByteLevel(), bos_token="<s>")


def byte_fallback(*, special: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: `special` declares the bytes as special tokens, as some conversions do."""
    kept = {"bos_token": "<s>", "unk_token": "<unk>"}
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", *BYTES, SPACE, "t", "h", "e", "th", f"{SPACE}the"])}
    merges = [("t", "h"), (SPACE, "th"), (f"{SPACE}th", "e")]
    vocab[f"{SPACE}th"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    if special:
        tokenizer.add_special_tokens(BYTES)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kept)


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )  # fmt: skip
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace(), unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    decoder = decoders.WordPiece(cleanup=False)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), decoder, unk_token="[UNK]")


def end_of_word() -> PreTrainedTokenizerFast:
    """As GPT-1 and CLIP: </w> ends a word."""
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(), unk_token="<unk>")


KINDS = {
    "byte-level": byte_level, "byte-fallback": byte_fallback, "unigram": unigram, "wordpiece": word_piece,
    "end of word": end_of_word,
    "bytes declared special": lambda: byte_fallback(special=True),
}  # fmt: skip


def shown(tokenizer: Any) -> list[str]:
    return pieces(tokenizer, len(tokenizer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_decoded_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    found, ids = shown(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    joined, decoded = "".join(found[i] for i in ids), tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" in joined:  # characters that several tokens share
        whole = [word for word in joined.split() if "\N{REPLACEMENT CHARACTER}" not in word]
        assert all(word in decoded for word in whole)
        return
    assert joined.strip() == decoded.strip() and len(joined) - len(decoded) in (0, 1)


def test_spellings_of_spaces_and_bytes() -> None:
    for kind in ("byte-fallback", "bytes declared special"):
        tokenizer = KINDS[kind]()
        found = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), shown(tokenizer), strict=True))
        assert found["<0x0A>"] == "\n" and found["<0x41>"] == "A" and found["<0xE2>"] == "\N{REPLACEMENT CHARACTER}"
        assert found[f"{SPACE}the"] == " the" and found["th"] == "th" and found["<s>"] == "<s>"
    level = byte_level()
    found = dict(zip(level.convert_ids_to_tokens(range(len(level))), shown(level), strict=True))
    assert found["Ġthe"] == " the" and found["Ċ"] == "\n" and found["Ã"] == "\N{REPLACEMENT CHARACTER}"
    assert any(text.strip() in ("на", "ор", "го", "ст") for text in found.values())
    words = word_piece()
    by_text = dict(zip(words.convert_ids_to_tokens(range(len(words))), shown(words), strict=True))
    inner = [token for token in by_text if token.startswith("##")]
    assert inner and all(by_text[token] == token[2:] for token in inner) and by_text["the"] == " the"


def test_added_and_control_tokens_are_shown_by_their_name() -> None:
    for tokenizer in (tiny_tokenizer(), byte_fallback(), word_piece()):
        tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken(f"<｜end{SPACE}of｜>"), "née"])
        found = shown(tokenizer)
        names = [
            found[tokenizer.convert_tokens_to_ids(name)] for name in ("<|im_start|>", f"<｜end{SPACE}of｜>", "née")
        ]
        assert names == ["<|im_start|>", f"<｜end{SPACE}of｜>", "née"]
        assert found[tokenizer.all_special_ids[0]] == tokenizer.all_special_tokens[0]


def test_pieces_that_hold_spaces_are_shown_as_they_are_without_a_decoder() -> None:
    """No pre-tokenizer takes the spaces away; one that writes them as SentencePiece does, without Metaspace."""
    text = "the sea\nstone caf\u00e9"
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.train_from_iterator([text] * 3, trainer)
    marked = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    marked.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    marked.train_from_iterator(["the sea stone"], trainers.BpeTrainer(special_tokens=names, show_progress=False))
    for backend, expected in ((plain, text), (marked, " the sea\nstone caf\N{REPLACEMENT CHARACTER}" + "\ufffd")):
        assert backend.decoder is None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        found = shown(tokenizer)
        assert "".join(found[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]) == expected


def test_ids_that_no_token_has_are_empty() -> None:
    tokenizer = tiny_tokenizer()
    found = pieces(tokenizer, len(tokenizer) + 5)
    assert found[len(tokenizer) :] == [""] * 5 and found[: len(tokenizer)] == shown(tokenizer)


def test_a_tokenizer_without_a_decoder_or_a_backend() -> None:
    alone = byte_level()
    level = shown(alone)
    alone.backend_tokenizer.decoder = None  # its pre-tokenizer spells bytes all the same
    assert shown(alone) == level
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "sea": 1, "stone": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert shown(plain) == ["[UNK]", " sea", " stone"]
    for kind in ("unigram", "wordpiece", "end of word", "byte-fallback"):
        bare = KINDS[kind]()
        expected = shown(bare)
        bare.backend_tokenizer.decoder = None
        texts = shown(bare)
        assert [text.strip() for text in texts] == [text.strip() for text in expected], kind
        assert not any(mark in text for text in texts for mark in ("\u2581", "</w>", "<0x"))
    slow = ByT5Tokenizer()
    assert getattr(slow, "backend_tokenizer", None) is None
    ids = slow("sea\nstone", add_special_tokens=False)["input_ids"]
    assert "".join(shown(slow)[i] for i in ids) == "sea\nstone" and shown(slow)[0] == "<pad>"
