"""Trying a text: every number is what a dense, obvious recomputation gives; and what cannot be tried is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from monosem.kernels import reference
from monosem.model import Autoencoder
from monosem.tokens import token_ids
from monosem.viewer import live
from monosem.viewer.live import Edit
from tiny import tiny_run

TEXT = "the story and the end of the town, in winter"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("live")
    tiny_run(out, tiny_model, tiny_corpus)
    return out


@pytest.fixture(scope="module")
def tried(run: Path) -> live.Live:
    return live.load(str(run), device="cpu")


class Dense:
    """The definition, with every latent written out, position 0 left as it is."""

    def __init__(self, tried: live.Live, text: str, k: int = 4, edits: tuple[Edit, ...] = ()) -> None:
        ids = token_ids(tried.subject.tokenizer, [text])[0]
        self.tried, self.k, self.edits = tried, k, edits
        self.tokens = torch.tensor([[tried.subject.prefix_token, *ids]])
        raw = tried.subject.capture(self.tokens, tried.site)[0, 1:]
        self.x, stats = tried.autoencoder.normalize(raw)
        self.z = self.encode(self.x)
        weights = tried.autoencoder.weights
        self.recons = self.z @ weights.decoder + weights.pre_bias
        self.logits = tried.subject.logits(self.tokens)[0]
        self.recons_logits = self.patched(self.recons * stats.std + stats.mean)
        self.edited_logits = self.patched(self.edited(raw))

    def encode(self, x: Tensor) -> Tensor:
        return reference.dense(reference.topk_encode(x, self.tried.autoencoder.weights, self.k))

    def edited(self, raw: Tensor) -> Tensor:
        x, stats = self.tried.autoencoder.normalize(raw)
        z = self.encode(x)
        new = z.clone()
        for latent, kind, value in self.edits:
            new[:, latent] = {"ablate": 0.0, "boost": value, "clamp": 0.0}[kind] * z[:, latent]
            new[:, latent] += value if kind == "clamp" else 0.0
        x = x + (new - z) @ self.tried.autoencoder.weights.decoder
        return self.tried.autoencoder.denormalize(x, stats)

    def patched(self, new: Tensor) -> Tensor:
        return self.tried.subject.run_with(self.tokens, self.tried.site, lambda x: torch.cat([x[:, :1], new[None]], 1))[
            0
        ]

    def losses(self, logits: Tensor) -> Tensor:
        return -logits[:-1].log_softmax(-1).gather(1, self.tokens[0, 1:, None])[:, 0]


def column(found: dict[str, Any], name: str, start: int) -> Tensor:
    rows = [row[name] for row in found["tokens"]]
    assert rows[:start] == [None] * start
    return torch.tensor(rows[start:])


def close(found: Any, wanted: Tensor) -> bool:
    return torch.allclose(torch.as_tensor(found), wanted, rtol=1e-4, atol=1e-5)


def test_control_tokens_that_are_written_out_are_read_as_such(tried: live.Live) -> None:
    tokenizer = tried.subject.tokenizer
    found = live.try_text(tried, "<s>one</s> two\r\nthree\0\ud83d")
    ids = [row["id"] for row in found["tokens"]]
    one, two = token_ids(tokenizer, ["one", " two\nthree ?"])
    assert ids == [tokenizer.bos_token_id, *one, tokenizer.eos_token_id, *two]
    assert found["control_tokens"] == ["</s>"]  # the first is put before every text
    assert live.try_text(tried, "<s>one")["tokens"] == live.try_text(tried, "one")["tokens"]
    assert live.try_text(tried, "one < /s>")["control_tokens"] == []


def test_numbers_of_every_token_are_those_of_the_definition(tried: live.Live) -> None:
    found, dense = live.try_text(tried, TEXT), Dense(tried, TEXT)
    assert [row["id"] for row in found["tokens"]] == dense.tokens[0].tolist()
    assert "".join(row["text"] for row in found["tokens"][1:]) == TEXT
    assert close(column(found, "loss", 1), dense.losses(dense.logits))
    assert close(column(found, "loss_recons", 2), dense.losses(dense.recons_logits)[1:])
    pre_bias = tried.autoencoder.weights.pre_bias
    error = (dense.x - dense.recons).square().sum(1) / (dense.x - pre_bias).square().sum(1)
    assert close(column(found, "error", 1), error)
    for row, z in zip(found["tokens"][1:], dense.z, strict=True):
        assert row["n_active"] == (z > 0).sum()
        assert [i for i, _ in row["latents"]] == z.argsort(descending=True)[: row["n_active"]].tolist()
        assert close([a for _, a in row["latents"]], z.sort(descending=True).values[: row["n_active"]])


@pytest.mark.parametrize("k", [1, 9, 48])
def test_another_k_is_that_k(tried: live.Live, k: int) -> None:
    found, dense = live.try_text(tried, TEXT, k=k, watch=[3, 40]), Dense(tried, TEXT, k)
    assert [row["n_active"] for row in found["tokens"][1:]] == (dense.z > 0).sum(1).tolist()
    for latent in (3, 40):
        none, *values = found["watch"][str(latent)]
        assert none is None and close(values, dense.z[:, latent])


def test_a_threshold_keeps_what_is_above_it(tried: live.Live) -> None:
    dense = Dense(tried, TEXT)
    pre_acts = reference.pre_activations(dense.x, tried.autoencoder.weights)
    for threshold in (0.0, 1.0, 1e6):
        found = live.try_text(tried, TEXT, threshold=threshold)
        assert [row["n_active"] for row in found["tokens"][1:]] == (pre_acts > threshold).sum(1).tolist()


def edits_of(n_latents: int) -> st.SearchStrategy[tuple[Edit, ...]]:
    one = st.builds(
        Edit, st.integers(0, n_latents - 1), st.sampled_from(live.KINDS), st.floats(-20, 20).map(lambda v: round(v, 2))
    )
    return st.lists(one, min_size=1, max_size=4, unique_by=lambda edit: edit.latent).map(tuple)


@hypothesis.given(edits=edits_of(48), position=st.integers(1, 9), k=st.sampled_from([4, 20]))
def test_edits_are_those_of_the_definition(tried: live.Live, edits: tuple[Edit, ...], position: int, k: int) -> None:
    found, dense = live.try_text(tried, TEXT, k=k, edits=edits, position=position), Dense(tried, TEXT, k, edits)
    assert close(column(found, "loss_edited", 2), dense.losses(dense.edited_logits)[1:])
    names = {"p_original": dense.logits, "p_recons": dense.recons_logits, "p_edited": dense.edited_logits}
    log_p = {name: logits[position].log_softmax(-1) for name, logits in names.items()}
    ids = [row["id"] for row in found["next"]["tokens"]]
    for name, wanted in log_p.items():
        assert close([row[name] for row in found["next"]["tokens"]], wanted.exp()[ids])
        assert set(wanted.topk(live.N_NEXT).indices.tolist()) <= set(ids)
    p, q = log_p["p_original"], log_p["p_edited"]
    assert found["next"]["kl_edited"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-5)


def test_an_edit_that_changes_nothing_changes_nothing(tried: live.Live) -> None:
    """The reconstruction's error is kept: boosting by 1, or ablating what is not active, leaves the subject alone."""
    z = Dense(tried, TEXT).z
    silent, active = int(z.amax(0).argmin()), int(z.amax(0).argmax())
    for edit in (Edit(active, "boost", 1.0), Edit(silent, "ablate")):
        found = live.try_text(tried, TEXT, edits=[edit])
        assert close(column(found, "loss_edited", 2), column(found, "loss", 1)[1:])
        assert found["next"]["kl_edited"] == pytest.approx(0, abs=1e-6)
    assert live.try_text(tried, TEXT, edits=[Edit(active, "boost", 9.0)])["next"]["kl_edited"] > 1e-4


@pytest.mark.parametrize("edits", [(Edit(7, "clamp", 30.0), Edit(3, "ablate")), ()])
def test_the_continuation_is_that_of_reading_everything_again(tried: live.Live, edits: tuple[Edit, ...]) -> None:
    found = live.try_text(tried, TEXT, edits=edits, n_continue=8)["continuation"]
    assert found["original"] == greedy(tried, (), 8)
    assert found["edited"] == (greedy(tried, edits, 8) if edits else None)


def greedy(tried: live.Live, edits: tuple[Edit, ...], n: int) -> str:
    dense = Dense(tried, TEXT, edits=edits)
    for _ in range(n):
        raw = tried.subject.capture(dense.tokens, tried.site)[0, 1:]
        logits = dense.patched(dense.edited(raw))
        dense.tokens = torch.cat([dense.tokens, logits[-1:].argmax(-1)[None]], 1)
    return tried.subject.tokenizer.decode(dense.tokens[0, -n:], clean_up_tokenization_spaces=False)


def test_a_sampled_continuation_is_its_seeds_and_no_edit_is_no_difference(tried: live.Live) -> None:
    one, same, other = (
        live.try_text(tried, TEXT, edits=[Edit(0, "boost", 1.0)], n_continue=12, seed=seed)["continuation"]
        for seed in (1, 1, 2)
    )
    assert one == same and one["original"] == one["edited"]
    assert one["original"] != other["original"]


def test_sampling_follows_the_probabilities() -> None:
    choose, logits = live._chooser(0), torch.tensor([[0.0, 1.0, 2.0]])
    drawn = torch.stack([choose(logits) for _ in range(4000)]).flatten()
    assert torch.allclose(drawn.bincount(minlength=3) / 4000, logits[0].softmax(-1), atol=0.03)


def test_positions_that_were_not_trained_on_are_said(tried: live.Live) -> None:
    found = live.try_text(tried, "a b c d e f g h i j k l m n o p")
    trained = [row["trained"] for row in found["tokens"]]
    assert trained == [False, *[True] * 15, *[False] * (len(trained) - 16)] and len(trained) > 16
    first = found["tokens"][0]
    assert first["latents"] == [] and first["error"] is None


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        ("a b " * 200, {}, "give at most 127"),
        ("a", {"k": 49}, "from 1 to 48"),
        ("a", {"k": 0}, "from 1 to 48"),
        ("a", {"threshold": -1.0}, "at least 0"),
        ("a", {"threshold": float("nan")}, "at least 0"),
        ("a", {"k": 2, "threshold": 1.0}, "give one of them"),
        ("a", {"position": 2}, "positions 0 to 1"),
        ("a", {"edits": [Edit(48, "ablate")]}, "latents 0 to 47"),
        ("a", {"edits": [Edit(-1, "ablate")]}, "latents 0 to 47"),
        ("a", {"watch": [48]}, "latents 0 to 47"),
        ("a", {"edits": [Edit(1, "ablate"), Edit(1, "boost", 2.0)]}, "one a latent"),
        ("a", {"edits": [Edit(i, "ablate") for i in range(17)]}, "at most 16"),
        ("a", {"edits": [Edit(1, "explode")]}, "choose ablate, boost, clamp"),
        ("a", {"edits": [Edit(1, "clamp", float("inf"))]}, "choose ablate, boost, clamp"),
        ("a", {"n_continue": 33}, "0 to 32"),
        ("xyz" * 40, {"n_continue": 10}, "no room for 10 more tokens"),
    ],
)
def test_what_cannot_be_tried_is_one_clear_line(
    tried: live.Live, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        live.try_text(tried, text, **options)


def test_strange_texts_are_texts(tried: live.Live) -> None:
    for text in ("<script>alert(1)</script>", "\ud800 half", "</s><s>", "\u202eevil\u202c", "\0", "🙂"):
        assert len(live.try_text(tried, text)["tokens"]) > 1


def test_a_subject_that_changed_is_refused(run: Path, tmp_path: Path) -> None:
    autoencoder = Autoencoder.load(run / "autoencoder")
    autoencoder.provenance["sources"] = {**autoencoder.provenance["sources"], "subject": "0" * 64}
    autoencoder.save(tmp_path)
    with pytest.raises(ValueError, match=r"subject of .* is not the one"):
        live.load(str(tmp_path), device="cpu")
    autoencoder.provenance = {}
    autoencoder.save(tmp_path)
    with pytest.raises(ValueError, match="does not say of which site"):
        live.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_pasted_table_is_read_as_a_file_is(tried: live.Live, end: str, delimiter: str) -> None:
    plain = table()
    header, *rows = [line.rsplit(",", 1) for line in plain.splitlines()]
    pasted = end.join(delimiter.join((text.strip('"') + " \0\ud83d", label)) for text, label in rows)
    found = live.try_labelled(tried, f"\ufeff{end}text{delimiter}label{end}{pasted}{end}")
    assert header == ["text", "label"] and found["n_train"] == live.try_labelled(tried, plain)["n_train"]


def table(n: int = 60) -> str:
    """Texts that are told apart by one word, in n rows."""
    rows = [f'"{word} was seen near {i * 7919 % 97} houses",{word}' for i in range(n // 2) for word in ("the", "in")]
    return "\n".join(["text,label", *rows])


def test_labels_that_a_latent_knows_are_found_and_shuffled_ones_are_not(tried: live.Live) -> None:
    found = live.try_labelled(tried, table())
    best = found["best"]
    assert len(best) == live.N_BEST and found["labels"] == ["in", "the"]
    assert [row["loss_train"] for row in best] == sorted(row["loss_train"] for row in best)
    assert best[0]["auc"] > 0.9 and best[0]["auc_low"] <= best[0]["auc"] <= best[0]["auc_high"]
    assert found["null"]["n_as_good"] == 0 and len(found["null"]["losses_train"]) == live.N_SHUFFLES
    header, *rows = table().splitlines()
    labels = [row.split(",")[-1] for row in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    mixed = [f"{row.rsplit(',', 1)[0]},{labels[i]}" for row, i in zip(rows, order, strict=True)]
    found = live.try_labelled(tried, "\n".join([header, *mixed]))
    assert found["null"]["n_as_good"] > 0
    assert found["best"][0]["auc_low"] < 0.7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", r"the table has 0 label"),
        ("a,b\n1,2\n", r"the table, line 2 has only a, b and no column 'text'"),
        ("text,label\nhello,x\n,y\n", r"line 3 has an empty 'text'"),
        ("text,label\nhello,x\nyou,\n", r"line 3 has an empty 'label'"),
        ("text,label\n" + "hello,x\n" * 30, r"has 1 label"),
        (table(12), r"too few texts"),
        (table(502), r"502 rows; give at most 500"),
        ("text,label\na,1\nb,2\nc,3\n", r"third label"),
        ("text,label\na,b,c\n", r"more fields than the header"),
        ('text,label\nx,1\n"' + "x" * 200_000 + ",1\n", r"line 3 is not CSV \(unexpected end"),
    ],
)
def test_a_table_that_is_none_is_one_clear_line(tried: live.Live, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        live.try_labelled(tried, given)
