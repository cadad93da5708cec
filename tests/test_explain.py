"""RUN/explain/: every column is what a plain recomputation from the store and the weights gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monosem import explain as explain_function
from monosem.activations import ActivationStore, harvest
from monosem.artifacts import read_json
from monosem.config import ExplainConfig, HarvestConfig, TrainConfig
from monosem.explanations import ExplainStore, explain
from monosem.kernels import reference
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.training import train


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explained")
    harvest(
        HarvestConfig(
            out=str(out / "store"), model=str(tiny_model), corpus=str(tiny_corpus), context_length=16, n_tokens=2000,
            n_tokens_held_out=400, held_out_fraction=0.2, dtype="float32", block_contexts=8, device="cpu",
        )
    )  # fmt: skip
    train(TrainConfig(out=str(out), store=str(out / "store"), n_latents=48, k=4, n_tokens=3000, batch_size=100))
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> ExplainStore:
    return explain(ExplainConfig(run=str(run), device="cpu"))


@pytest.fixture(scope="module")
def z(run: Path) -> np.ndarray:
    """Activations of all latents on all training tokens, [contexts, ctx, latents]; 0 at the first tokens left out."""
    store, autoencoder = ActivationStore.open(run / "store"), Autoencoder.load(run / "autoencoder")
    x, _ = autoencoder.normalize(store.rows("train"))
    dense = reference.dense(reference.topk_encode(x, autoencoder.weights, 4)).reshape(-1, store.rows_per_context, 48)
    return torch.nn.functional.pad(dense, (0, 0, store.first_position, 0)).numpy()


def test_the_public_name_is_the_function() -> None:
    assert explain_function is explain


def test_statistics_are_those_of_all_training_tokens(found: ExplainStore, z: np.ndarray) -> None:
    n_tokens = z[:, 1:, 0].size
    assert found.manifest["n_tokens"] == n_tokens
    assert np.allclose(found.column("density"), (z > 1e-3).sum((0, 1)) / n_tokens)
    assert np.allclose(found.column("max"), z.max((0, 1)), rtol=1e-5)
    assert np.array_equal(found.column("histogram").sum(1), (z > 0).sum((0, 1)))
    assert found.column("histogram").shape[1] == len(found.column("histogram_edges"))


@pytest.mark.parametrize("kind", ["top", "random", "quantile"])
def test_examples_carry_their_context_and_its_activations(
    run: Path, found: ExplainStore, z: np.ndarray, kind: str
) -> None:
    tokens = ActivationStore.open(run / "store").contexts("train").tokens.numpy()
    by_tokens = {row.tobytes(): i for i, row in enumerate(tokens)}
    context, position, activations = (found.column(f"{kind}_{what}") for what in ("context", "position", "activations"))
    assert (context >= 0).sum() > 100
    for latent, example in zip(*np.nonzero(context >= 0), strict=True):
        here = by_tokens[found.column("contexts")[context[latent, example]].tobytes()]
        assert np.allclose(activations[latent, example], z[here, :, latent], rtol=2e-3, atol=1e-4)
        assert position[latent, example] == activations[latent, example].argmax()
    assert (activations[context < 0] == 0).all()


def test_top_examples_are_the_strongest_and_in_order(found: ExplainStore, z: np.ndarray) -> None:
    peaks = found.column("top_activations").max(2)
    wanted = -np.sort(-z.max(1), axis=0)[: peaks.shape[1]].T
    assert np.allclose(peaks, wanted, rtol=2e-3, atol=1e-4)


def test_neighbours_and_votes_come_from_the_weights(run: Path, found: ExplainStore, tiny_model: Path) -> None:
    decoder = Autoencoder.load(run / "autoencoder").weights.decoder
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    index = torch.from_numpy(np.array(found.column("decoder_neighbours"))).long()
    assert torch.allclose(
        cosine.gather(1, index), torch.from_numpy(np.array(found.column("decoder_cosines"))), atol=1e-5
    )
    model: Any = Subject.load(str(tiny_model), dtype="float32", device="cpu").module
    logits = (decoder * model.model.norm.weight) @ model.lm_head.weight.T
    logits = (logits - logits.mean(1, keepdim=True)).detach()
    assert np.allclose(found.column("lens_up_values"), logits.topk(10).values, atol=1e-4)
    assert np.allclose(found.column("lens_down_values"), logits.topk(10, largest=False).values, atol=1e-4)


def test_the_vocabulary_spells_out_a_text(found: ExplainStore, tiny_model: Path) -> None:
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    words = read_json(found.folder / "vocabulary.json")
    ids = subject.tokenizer(" the story and the end", add_special_tokens=False)["input_ids"]
    assert "".join(words[i] for i in ids) == " the story and the end"
    assert len(words) == subject.vocab_size


def test_explain_is_skipped_when_done_and_done_again_for_another_config(
    run: Path, found: ExplainStore, caplog: pytest.LogCaptureFixture
) -> None:
    before = (found.folder / "density.npy").stat().st_mtime_ns
    with caplog.at_level("INFO", "monosem"):
        explain(ExplainConfig(run=str(run), device="cpu"))
    assert "skipped" in caplog.text and (found.folder / "density.npy").stat().st_mtime_ns == before
    fewer = explain(ExplainConfig(run=str(run), n_tokens=200, device="cpu"))
    assert fewer.manifest["n_tokens"] < 1000
    assert explain(ExplainConfig(run=str(run), device="cpu")).manifest["n_tokens"] == found.manifest["n_tokens"]


def test_a_torn_or_foreign_folder_is_refused(tmp_path: Path, found: ExplainStore) -> None:
    with pytest.raises(ValueError, match=r"no explanation.*monosem explain"):
        ExplainStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(found.manifest))
    with pytest.raises(ValueError, match=re.escape("density.npy cannot be read")):
        ExplainStore(tmp_path).column("density")
    np.save(tmp_path / "density.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not the array"):
        ExplainStore(tmp_path).column("density")
    with pytest.raises(ValueError, match="no column 'colour'"):
        ExplainStore(tmp_path).column("colour")


def test_explaining_nothing_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no autoencoder"):
        explain(ExplainConfig(run=str(tmp_path)))
