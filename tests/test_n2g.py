"""N2G: rules against an obvious matcher, planted latents recovered exactly, the tiny model behind real forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from monosem import n2g
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights
from monosem.n2g import ANY, START, Examples, LatentReader, Rule
from monosem.subject import Subject
from planted import CONTEXT, Planted, planted_texts
from tiny import D_MODEL, VOCAB_SIZE, tiny_lm, tiny_tokenizer


def rules_of(reader: LatentReader, tokens: Tensor) -> list[Rule]:
    latents = torch.arange(reader.n_latents)
    return n2g.build(reader, n2g.collect(reader.stream(tokens, latents), latents, n_top=8, n_random=8, seed=0))


def matches(pattern: tuple[int, ...], before: list[int]) -> bool:
    """The definition: `before` is the text up to and with the pivot."""
    steps = [*reversed(before), START]
    return len(pattern) <= len(steps) and all(
        p == s or (p == ANY and s != START) for p, s in zip(pattern, steps, strict=False)
    )


def naive(rule: Rule, before: list[int]) -> float:
    """The longest pattern that matches; among equally long ones the one with tokens nearest to the pivot."""
    found = [pattern for pattern in rule if matches(pattern, before)]
    return rule[max(found, key=lambda p: (len(p), [step != ANY for step in p]))] if found else 0.0


def naive_compatible(rule: Rule, before: list[int]) -> float:
    """Walk a trie of dicts backwards, never coming back."""
    trie: dict = {}
    for pattern, value in rule.items():
        node = trie
        for step in pattern:
            node = node.setdefault(step, {})
        node["value"] = value
    node = trie
    for step in [*reversed(before), START]:
        node = node.get(step) or (node.get(ANY) if step != START else None) or {}
        if "value" in node:
            return node["value"]
    return 0.0


patterns = st.lists(st.integers(-1, 2), min_size=1, max_size=4).flatmap(
    lambda steps: st.sampled_from([tuple(steps), (*steps, START)])
)
rules = st.dictionaries(patterns, st.integers(1, 50).map(float), max_size=8)
corpora = st.integers(1, 6).flatmap(
    lambda ctx: st.lists(st.lists(st.integers(0, 3), min_size=ctx, max_size=ctx), min_size=1, max_size=4)
)


@pytest.mark.parametrize("compatible", [False, True])
@given(rule=rules, corpus=corpora)
def test_predict_agrees_with_matching_every_pattern_at_every_token(
    compatible: bool, rule: Rule, corpus: list[list[int]]
) -> None:
    obvious = naive_compatible if compatible else naive
    expected = [[obvious(rule, text[: i + 1]) for i in range(len(text))] for text in corpus]
    assert n2g.predict(rule, torch.tensor(corpus), compatible=compatible).tolist() == expected


def test_predict_comes_back_from_a_dead_branch_and_prefers_the_longest_pattern() -> None:
    rule = {(5, 1): 1.0, (ANY, 2): 2.0, (ANY, 2, 3): 3.0, (7, START): 4.0}
    tokens = torch.tensor([[3, 2, 5], [0, 2, 5], [0, 1, 5], [7, 7, 2]])
    assert n2g.predict(rule, tokens).tolist() == [[0, 0, 3], [0, 0, 2], [0, 0, 1], [4, 0, 0]]
    released = n2g.predict(rule, tokens, compatible=True)
    assert released.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [4, 0, 0]]


def test_planted_patterns_are_recovered_exactly() -> None:
    reader = Planted(
        lambda text: 2.0 * (text[-1] == 3),
        lambda text: 3.0 * (text[-2:] == [4, 5]),
        lambda text: 1.0 * (len(text) > 2 and (text[-3], text[-1]) == (1, 2)),
        lambda text: 4.0 * (text[-1] == 6 and len(text) == 1),
        lambda text: 5.0 * (len(text) > 1 and text[-2] == 7),
    )
    found = rules_of(reader, planted_texts(400))
    assert found == [{(3,): 2.0}, {(5, 4): 3.0}, {(2, ANY, 1): 1.0}, {(6, START): 4.0}, {(ANY, 7): 5.0}]
    unseen = planted_texts(50, seed=1)
    truth = n2g.columns(reader.read(unseen), torch.arange(5)).view(50, CONTEXT, 5)
    for latent, rule in enumerate(found):
        assert torch.equal(n2g.predict(rule, unseen), truth[:, :, latent])


def test_the_pruned_suffix_keeps_half_of_the_original_and_saliency_is_of_the_pruned_text() -> None:
    """Token 1 two back doubles, one back adds 40%: half of 2.4 is kept by the last token and the one two back."""

    def latent(text: list[int]) -> float:
        base = 1.0 * (text[-1] == 2)
        return base * (1 + (text[-3:-2] == [1])) * (1.2 if text[-2:-1] == [1] else 1.0)

    context = torch.tensor([[0, 1, 1, 2]])
    examples = Examples(0, context, torch.tensor([[0.0, 0, 0, 2.4]]), torch.tensor([3]), 1)
    assert n2g.build(Planted(latent), [examples]) == [{(2, ANY): pytest.approx(1.2)}]


def test_patterns_that_several_examples_give_store_the_mean_activation() -> None:
    reader = Planted(lambda text: (text[-1] == 3) * (2.0 if 8 in text else 1.0))
    context = torch.tensor([[0, 0, 3], [0, 0, 3]])
    examples = Examples(0, context, torch.tensor([[0.0, 0, 1.0], [0, 0, 1.5]]), torch.tensor([2, 2]), 2)
    assert n2g.build(reader, [examples]) == [{(3,): 1.0}]


def test_all_suffixes_of_all_latents_share_forward_passes() -> None:
    """One forward a length and round, and no text twice."""
    reader = Planted(*(lambda text, i=i: 1.0 * (text[-2:] == [i, 5]) for i in range(8)))
    latents = torch.arange(8)
    examples = n2g.collect(reader.stream(planted_texts(300), latents), latents, n_top=8, n_random=8, seed=0)
    reader.batches.clear()
    n2g.build(reader, examples)
    shapes = [batch.shape[1] for batch in reader.batches]
    assert shapes == [1, 2, 2, 3]
    assert all(len(batch.unique(dim=0)) == len(batch) for batch in reader.batches)


def test_a_latent_that_never_fires_has_no_example_and_an_empty_rule_which_predicts_nothing() -> None:
    reader, latents = Planted(lambda text: 0.0), torch.tensor([0])
    (examples,) = n2g.collect(reader.stream(planted_texts(20), latents), latents, n_top=4, n_random=4, seed=0)
    assert (len(examples.tokens), examples.n_contexts_fired) == (0, 0)
    assert n2g.build(reader, [examples]) == [{}]
    assert not n2g.predict({}, planted_texts(3)).any()


def test_collect_keeps_the_strongest_and_a_uniform_draw_and_no_context_twice() -> None:
    reader = Planted(lambda text: float(text[0]) if len(text) == 3 else 0.0)
    tokens, latents = planted_texts(200), torch.tensor([0])
    (examples,) = n2g.collect(reader.stream(tokens, latents), latents, n_top=5, n_random=40, seed=0)
    assert examples.activations[:5].amax(1).tolist() == [8.0] * 5
    assert set(examples.pivots.tolist()) == {2}
    assert len(examples.tokens.unique(dim=0)) == len(examples.tokens) <= 45
    assert examples.n_contexts_fired == int((tokens[:, 0] > 0).sum())
    strengths = examples.activations[5:].amax(1)
    assert strengths.mean() == pytest.approx(4.5, abs=1.2)


@given(batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_collect_does_not_depend_on_how_the_stream_is_batched(batch: int, seed: int) -> None:
    reader, latents = Planted(lambda text: float(sum(text) % 5), lambda text: 1.5 * (text[-1] == 1)), torch.arange(2)
    tokens = planted_texts(50)
    acts = n2g.columns(reader.read(tokens), latents).view(50, CONTEXT, 2)
    whole = n2g.collect([(tokens, acts)], latents, n_top=4, n_random=4, seed=seed)
    parts = zip(tokens.split(batch), acts.split(batch), strict=True)
    for a, b in zip(whole, n2g.collect(parts, latents, n_top=4, n_random=4, seed=seed), strict=True):
        assert a.n_contexts_fired == b.n_contexts_fired
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.activations, b.activations)


def test_collect_refuses_an_empty_stream() -> None:
    with pytest.raises(ValueError, match="give more text"):
        n2g.collect([], torch.tensor([0]), n_top=1, n_random=1, seed=0)


def test_sample_latents_is_a_sorted_draw_without_repeats() -> None:
    assert n2g.sample_latents(5, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(n2g.sample_latents(100, 10, seed=3), n2g.sample_latents(100, 10, seed=3))
    with pytest.raises(ValueError, match="6 latents asked for; the autoencoder has 5"):
        n2g.sample_latents(5, 6, seed=0)


@pytest.fixture(scope="module")
def reader(tiny_model: Path) -> LatentReader:
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    sample = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = initial_weights(sample, 64, 4, tied=True, seed=0)
    return LatentReader(subject, Autoencoder(AutoencoderConfig(D_MODEL, 64, 4), weights), subject.site())


def test_at_last_reads_each_text_behind_the_prefix_token(reader: LatentReader) -> None:
    asked = [(5, 6), (7,), (5, 6), (8, 9, 10), (7,)]
    latents = [3, 4, 5, 6, 7]
    expected = []
    for text, latent in zip(asked, latents, strict=True):
        raw = reader.subject.capture(torch.tensor([[reader.subject.prefix_token, *text]]), reader.site)[0, -1:]
        x, _ = reader.autoencoder.normalize(raw)
        expected.append(float(n2g.columns(reader.autoencoder.encode(x), torch.tensor([latent]))))
    assert reader.at_last(asked, latents) == pytest.approx(expected, abs=1e-5)


def test_at_last_of_a_context_is_what_the_stream_says(reader: LatentReader) -> None:
    tokens, latents = planted_texts(6, VOCAB_SIZE), torch.arange(64)
    streamed = torch.cat([acts for _, acts in reader.stream(tokens, latents)])
    assert streamed.shape == (6, CONTEXT, 64) and (streamed > 0).sum(2).max() <= 4
    row, position, latent = streamed.nonzero()[20].tolist()
    found = reader.at_last([tuple(tokens[row, : position + 1].tolist())], [latent])
    assert found == pytest.approx([float(streamed[row, position, latent])], abs=1e-4)


def test_rules_of_the_tiny_model_predict_the_pivots_that_they_came_from(reader: LatentReader) -> None:
    tokens, latents = planted_texts(60, VOCAB_SIZE), n2g.sample_latents(64, 8, seed=0)
    examples = n2g.collect(reader.stream(tokens, latents), latents, n_top=3, n_random=3, seed=0)
    n_checked = 0
    for of_latent, rule in zip(examples, n2g.build(reader, examples), strict=True):
        assert len(of_latent.pivots) >= len(rule) > 0
        if any(pattern[-1] == START for pattern in rule):  # made from the middle of a context, it matches only at 0
            continue
        predicted = n2g.predict(rule, of_latent.tokens)
        assert predicted[torch.arange(len(of_latent.pivots)), of_latent.pivots].all()
        n_checked += 1
    assert n_checked >= 3


def test_contexts_longer_than_the_subject_reads_are_refused(reader: LatentReader) -> None:
    with pytest.raises(ValueError, match=r"texts of 127 tokens.* reads at most 126"):
        next(iter(reader.stream(torch.zeros(1, 127, dtype=torch.int32), torch.tensor([0]))))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    subject = Subject.load(str(tiny_lm(tmp_path, "bert")), dtype="float32", device="cpu")
    weights = initial_weights(torch.randn(50, D_MODEL), 8, 2, tied=True, seed=0)
    with pytest.raises(ValueError, match="is an encoder"):
        LatentReader(subject, Autoencoder(AutoencoderConfig(D_MODEL, 8, 2), weights), subject.site())


def test_padding_token_is_the_last_of_space_underscore() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode([n2g.padding_token(tokenizer)]) == "_"
    words = Tokenizer(models.BPE(vocab={"s": 0, "[PAD]": 1}, merges=[]))  # leaves out every other character
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert n2g.padding_token(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")) == 1
    assert n2g.padding_token(PreTrainedTokenizerFast(tokenizer_object=words)) == 0
