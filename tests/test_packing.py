"""Packed rows say of each text exactly that text, and a subject reads it as it reads it alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monosem import n2g
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights
from monosem.n2g import LatentReader, Text
from monosem.packing import lay_out, pack
from monosem.subject import Layout, Subject
from planted import planted_texts
from tiny import D_MODEL, VOCAB_SIZE, tiny_lm

PREFIX = 99
CAUSAL = ("llama", "gpt2", "gpt_neox", "gemma3_text")
texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), unique=True, max_size=40)


@given(texts, st.integers(1, 30))
def test_each_text_is_read_off_what_its_last_node_sees(texts: list[Text], size: int) -> None:
    rows = list(pack(texts, prefix=PREFIX, size=size))
    assert sorted(text for row in rows for text, _ in row.ends) == sorted(texts)
    for row in rows:
        assert len(row.tokens) <= size or len(row.ends) == 1
    if not rows:
        return
    tokens, positions, sees = lay_out(rows)
    for r, row in enumerate(rows):
        for text, node in row.ends:
            seen = sees[r, node].nonzero()[:, 0]
            assert positions[r, seen].tolist() == list(range(len(text) + 1)), "in reading order"
            assert tokens[r, seen].tolist() == [PREFIX, *text]
    assert sees.diagonal(dim1=1, dim2=2).all(), "what fills up sees something, or attention divides by zero"


def test_a_common_beginning_is_there_once() -> None:
    texts = [(5, 7, 1), (5, 7), (5, 7, 2), (6,)]
    (row,) = pack(texts, prefix=PREFIX, size=20)
    assert row.tokens == [PREFIX, 5, 7, 1, 2, 6]


def reader_of(folder: Path, family: str, dtype: str = "float32") -> LatentReader:
    subject = Subject.load(str(tiny_lm(folder, family)), dtype=dtype, device="cpu")
    sample = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = initial_weights(sample, 64, 4, tied=True, seed=0)
    return LatentReader(subject, Autoencoder(AutoencoderConfig(D_MODEL, 64, 4), weights), subject.site())


def rules_of(reader: LatentReader, tokens: Tensor) -> list[n2g.Rule]:
    latents = torch.arange(12)
    return n2g.build(reader, n2g.collect(reader.stream(tokens, latents), latents, n_top=3, n_random=3, seed=0))


@pytest.mark.parametrize("family", CAUSAL)
def test_rules_from_packed_texts_are_those_from_texts_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, tokens = reader_of(tmp_path, family), planted_texts(60, VOCAB_SIZE)
    monkeypatch.setattr(n2g, "_ROW_SIZE", 32)
    packed = rules_of(reader, tokens)
    assert reader.packs == (family != "gemma3_text")
    reader.packs = False
    alone = rules_of(reader, tokens)
    assert sum(map(len, alone)) > 30
    assert [list(rule) for rule in packed] == [list(rule) for rule in alone]
    for rule, other in zip(packed, alone, strict=True):
        assert list(rule.values()) == pytest.approx(list(other.values()), rel=1e-3)


def test_packed_texts_take_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, tokens = reader_of(tmp_path, "llama"), planted_texts(60, VOCAB_SIZE)
    rules_of(reader, tokens)  # that the subject packs is found out
    captured, n_tokens = Subject.capture, {True: 0, False: 0}

    def counted(self: Subject, tokens: Tensor, *arguments: object, **options: object) -> Tensor:
        n_tokens[reader.packs] += tokens.numel()
        return captured(self, tokens, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Subject, "capture", counted)
    for packs in (True, False):
        reader.packs = packs
        rules_of(reader, tokens)
    assert n_tokens[True] < 0.75 * n_tokens[False]


def test_attention_that_does_not_take_a_layout_as_it_is_reads_texts_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma's window of 16 tokens is not in a layout: short texts would be right, longer ones wrong."""
    reader = reader_of(tmp_path, "gemma3_text")
    text = tuple(range(5, 45))
    with caplog.at_level(logging.INFO, "monosem"):
        found = reader.at_last([text, text[:3]], [1, 2])
    assert "reads packed texts with an error of" in caplog.text and not reader.packs
    expected = [float(n2g.columns(reader.read(torch.tensor([t]), last=True), torch.tensor([i]))) for t, i in
                ((text, 1), (text[:3], 2))]  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_subject_that_refuses_a_layout_reads_texts_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(tmp_path, "llama")
    forward = reader.subject.module.forward

    def without_positions(input_ids: Tensor, use_cache: bool = False) -> object:
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(reader.subject.module, "forward", without_positions)
    with caplog.at_level(logging.INFO, "monosem"):
        assert len(reader.at_last([(5, 6), (7,)], [1, 2])) == 2
    assert "takes no packed texts (TypeError)" in caplog.text and not reader.packs


def test_in_bfloat16_nothing_is_packed(tmp_path: Path) -> None:
    assert not reader_of(tmp_path, "llama", "bfloat16").packs


def test_longer_texts_than_those_tried_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, tried = reader_of(tmp_path, "llama"), []

    def packs_well(length: int) -> bool:
        tried.append(length)
        return True

    monkeypatch.setattr(reader, "_packs_well", packs_well)
    for length in (1, 30, 60, 64, 65, 100):
        reader.at_last([tuple(range(3, 3 + length))], [0])
    assert tried == [64, 127], "twice the longest, and no more than the subject reads behind its prefix"


@pytest.mark.parametrize("family", ("llama", "gpt2", "gpt_neox"))
def test_a_layout_of_whole_texts_is_those_texts(family: str, tmp_path: Path) -> None:
    subject = Subject.load(str(tiny_lm(tmp_path, family)), dtype="float32", device="cpu")
    tokens, site = planted_texts(4, VOCAB_SIZE), subject.site()
    n, length = tokens.shape
    layout = Layout(torch.arange(length).expand(n, -1), torch.ones(n, length, length, dtype=torch.bool).tril())
    torch.testing.assert_close(
        subject.capture(tokens, site, layout=layout), subject.capture(tokens, site), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="contexts of 129 tokens"):
        subject.capture(tokens, site, layout=layout._replace(positions=layout.positions + 117))
