"""Downstream numbers on tiny language models, and `evaluate` from a store and an autoencoder to eval.json."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monosem import artifacts
from monosem.activations import ActivationStore, harvest
from monosem.config import EvalConfig, HarvestConfig
from monosem.evals import downstream, evaluate, table
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize
from monosem.subject import Subject
from monosem.types import LOCATIONS, Metric, Site, Weights
from tiny import D_MODEL, N_LAYERS, tiny_lm, tiny_texts

CONTEXT, N_CONTEXTS = 12, 10
TOKENS = torch.randint(3, 250, (N_CONTEXTS, CONTEXT), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
DOCUMENTS = torch.arange(N_CONTEXTS, dtype=torch.int32)[:, None].expand(-1, CONTEXT) // 2


class Planted(Autoencoder):
    """Puts `rebuild(raw)` in place of the raw activations, and remembers them."""

    def __init__(self, rebuild: Callable[[Tensor], Tensor]) -> None:
        weights = Weights(torch.zeros(4, D_MODEL), torch.zeros(4), torch.zeros(4, D_MODEL), torch.zeros(D_MODEL))
        super().__init__(AutoencoderConfig(D_MODEL, 4, 1), weights)
        self.rebuild = rebuild
        self.seen: list[Tensor] = []

    def forward(self, raw: Tensor) -> Tensor:
        self.seen.append(raw)
        return self.rebuild(raw)


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Subject:
    return Subject.load(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def mean(subject: Subject) -> Tensor:
    return subject.capture(TOKENS, subject.site())[:, 1:].flatten(0, 1).double().mean(0)


def measured(subject: Subject, autoencoder: Autoencoder, mean: Tensor, first_position: int = 1) -> dict[str, Metric]:
    options = {"first_position": first_position, "n_resamples": 50, "seed": 0}
    found = downstream.metrics(subject, autoencoder, subject.site(), TOKENS, DOCUMENTS, mean, **options)
    return {m.name: m for m in found}


@pytest.mark.parametrize("first_position", [0, 1])
def test_the_identity_loses_exactly_nothing(subject: Subject, mean: Tensor, first_position: int) -> None:
    metrics = measured(subject, Planted(lambda x: x), mean, first_position)
    for name in ("delta_ce", "kl"):
        assert (metrics[name].value, metrics[name].low, metrics[name].high) == (0, 0, 0)
    for name in ("top1_agreement", "loss_recovered_mean", "loss_recovered_zero"):
        assert metrics[name].value == 1


def test_an_autoencoder_that_says_zero_or_the_mean_is_that_ablation(subject: Subject, mean: Tensor) -> None:
    for name, rebuild in (("zero", torch.zeros_like), ("mean", lambda x: mean.to(x.dtype).expand_as(x))):
        metrics = measured(subject, Planted(rebuild), mean)
        assert metrics["delta_ce"].value == metrics[f"delta_ce_{name}_ablation"].value != 0
        assert metrics["kl"].value == metrics[f"kl_{name}_ablation"].value > 0
        assert metrics[f"loss_recovered_{name}"].value == 0


def test_ce_and_kl_are_those_of_plain_softmaxes(subject: Subject, mean: Tensor) -> None:
    """Position 0 keeps its activation and predicts nothing that counts; the last position has nothing to predict."""
    metrics = measured(subject, Planted(lambda x: 0.5 * x), mean)

    def halved(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], 0.5 * x[:, 1:]], dim=1)

    p = subject.logits(TOKENS)[:, 1:-1].double().softmax(-1)
    q = subject.run_with(TOKENS, subject.site(), halved)[:, 1:-1].double().softmax(-1)
    following = TOKENS[:, 2:].long()[..., None]
    ce_p, ce_q = (-r.gather(-1, following).log().mean().item() for r in (p, q))
    assert metrics["ce_original"].value == pytest.approx(ce_p, rel=1e-5)
    assert metrics["delta_ce"].value == pytest.approx(ce_q - ce_p, rel=1e-4)
    assert metrics["kl"].value == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert metrics["top1_agreement"].value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    recovered = 1 - metrics["delta_ce"].value / metrics["delta_ce_mean_ablation"].value
    assert metrics["loss_recovered_mean"].value == pytest.approx(recovered)
    assert {m.n for m in metrics.values()} == {N_CONTEXTS * (CONTEXT - 2)}


def test_the_autoencoder_sees_every_position_but_the_sink(subject: Subject, mean: Tensor) -> None:
    autoencoder = Planted(lambda x: x)
    measured(subject, autoencoder, mean)
    torch.testing.assert_close(torch.cat(autoencoder.seen), subject.capture(TOKENS, subject.site())[:, 1:])


def test_no_number_depends_on_the_batch(subject: Subject, mean: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(subject, Planted(lambda x: 0.5 * x), mean)
    monkeypatch.setattr("monosem.evals.downstream._LOGITS_BYTES", 4 * subject.vocab_size * CONTEXT * 3)
    monkeypatch.setattr("monosem.evals.downstream._SLICE_BYTES", 4 * subject.vocab_size * 4)
    pieces = measured(subject, Planted(lambda x: 0.5 * x), mean)
    for name, metric in whole.items():
        for field in ("value", "low", "high"):
            assert getattr(pieces[name], field) == pytest.approx(getattr(metric, field), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_running_the_lower_blocks_once_changes_no_bit(family: str, tmp_path: Path) -> None:
    subject = Subject.load(str(tiny_lm(tmp_path, family)), dtype="float32", device="cpu")
    blocks = {
        "llama": "model.layers",
        "gpt2": "transformer.h",
        "gemma3_text": "model.layers",
        "gpt_neox": "gpt_neox.layers",
    }
    locations = [name for name in LOCATIONS if (family, name) != ("gpt_neox", "resid_post_attn")]  # it has none
    sites = [subject.site(N_LAYERS - 1, location) for location in locations]
    sites += [subject.site(0), subject.site(location=f"{blocks[family]}.2")]
    for site in sites:
        with downstream.lower_blocks_run_once(subject, site):
            shared = [
                subject.logits(TOKENS),
                *(subject.run_with(TOKENS, site, r) for r in (torch.clone, torch.zeros_like)),
            ]
        plain = [subject.logits(TOKENS), *(subject.run_with(TOKENS, site, r) for r in (torch.clone, torch.zeros_like))]
        assert all(map(torch.equal, shared, plain)), site
        assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])


def test_the_lower_blocks_do_run_only_once(subject: Subject) -> None:
    n_runs = 0

    def count(*_: object) -> None:
        nonlocal n_runs
        n_runs += 1

    handle = subject.module.get_submodule("model.layers.0.mlp").register_forward_hook(count)
    with downstream.lower_blocks_run_once(subject, subject.site()):
        subject.logits(TOKENS)
        subject.run_with(TOKENS, subject.site(), torch.zeros_like)
    assert n_runs == 1
    subject.logits(TOKENS)
    assert n_runs == 2
    handle.remove()


def test_contexts_too_short_to_predict_from_are_refused(subject: Subject, mean: Tensor) -> None:
    options = {"first_position": 1, "n_resamples": 20, "seed": 0}
    with pytest.raises(ValueError, match="contexts of 2 tokens leave no prediction"):
        downstream.metrics(
            subject, Planted(lambda x: x), subject.site(), TOKENS[:, :2], DOCUMENTS[:, :2], mean, **options
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents short enough for a held-out split of a few thousand tokens to have dozens of them."""
    path = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    path.write_text("".join(json.dumps({"text": text[-60:]}) + "\n" for text in tiny_texts(200)), "utf-8")
    return path


@pytest.fixture(scope="module")
def store(tiny_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return made_store(tiny_model, corpus, tmp_path_factory.mktemp("store"))


def made_store(model: Path, corpus: Path, out: Path, seed: int = 0, held_out: float = 0.3) -> ActivationStore:
    config = HarvestConfig(
        out=str(out / "store"), model=str(model), corpus=str(corpus), context_length=16, n_tokens=1800,
        n_tokens_held_out=1200, held_out_fraction=held_out, dtype="float32", block_contexts=8, seed=seed, device="cpu",
    )  # fmt: skip
    return harvest(config)


def made_run(folder: Path, activations: ActivationStore, **provenance: object) -> EvalConfig:
    """A run folder whose autoencoder is where training starts, with the provenance that training writes."""
    weights = initial_weights(normalize(activations.rows("train"))[0], 64, 4, tied=True, seed=0)
    known = {
        "site": dataclasses.asdict(activations.site),
        "store": str(activations.path),
        "sources": {"store": activations.hash, **activations.manifest["sources"]},
        "harvest": activations.config,
        "tokens_seen": 2400,
        "distinct_tokens": 1200,
        "dead_latents": {"count": 16, "window_tokens": 2000},
    }
    Autoencoder(AutoencoderConfig(D_MODEL, 64, 4), weights, {**known, **provenance}).save(folder / "autoencoder")
    return EvalConfig(run=str(folder), n_tokens_downstream=1000, n_bootstrap=20, device="cpu")


def test_evaluate_reports_every_number_with_n_and_interval(store: ActivationStore, tmp_path: Path) -> None:
    report = evaluate(made_run(tmp_path, store))
    assert set(report) == {"run", "metrics", "histograms", "tables", "left_out", "failed"}
    assert report["left_out"] == report["failed"] == {}
    assert list(report["metrics"]) == [
        "normalized_mse", "normalized_mse_train", "explained_variance", "normalized_mse_raw", "l0", "cosine",
        "never_fired_fraction", "dead_fraction",
        "ce_original", "delta_ce", "kl", "delta_ce_mean_ablation", "kl_mean_ablation", "delta_ce_zero_ablation",
        "kl_zero_ablation", "top1_agreement", "loss_recovered_mean", "loss_recovered_zero",
    ]  # fmt: skip
    for name, metric in report["metrics"].items():
        assert metric["low"] <= metric["value"] <= metric["high"], name
        assert set(metric) == {"value", "low", "high", "n", "unit"}
    n_held_out = store.n_rows("held_out")
    assert report["metrics"]["normalized_mse"]["n"] == report["metrics"]["normalized_mse_train"]["n"] == n_held_out
    assert report["metrics"]["dead_fraction"]["value"] == 16 / 64
    assert report["metrics"]["dead_fraction"]["n"] == 2000
    assert report["metrics"]["kl"]["n"] == 63 * 14  # 63 contexts of 16 hold 1000 tokens
    assert report["run"]["n_first_positions_left_out"] == 63
    assert report["run"]["tokens_seen"] == 2400
    written = artifacts.read_manifest(tmp_path / "eval.json", "evaluation")
    assert {key: written[key] for key in report} == json.loads(json.dumps(report)) == report


def test_evaluate_is_skipped_only_while_nothing_changed(
    store: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "monosem")
    config = made_run(tmp_path, store)
    report = evaluate(config)
    with monkeypatch.context() as patch:
        patch.setattr("monosem.evals.reconstruction.tally", None)  # nothing is computed again
        assert evaluate(config) == report
    assert "skipped" in caplog.text
    again = evaluate(dataclasses.replace(config, seed=1))
    assert again["metrics"]["kl"] != report["metrics"]["kl"]
    made_run(tmp_path, store, tokens_seen=1200)
    assert evaluate(config)["run"]["tokens_seen"] == 1200


def test_evaluate_finds_the_store_beside_a_run_that_was_moved(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    config = made_run(tmp_path / "old", made_store(tiny_model, corpus, tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    report = evaluate(dataclasses.replace(config, run=str(tmp_path / "new")))
    assert report["run"]["store"] == str(tmp_path / "new" / "store")


def test_evaluate_on_other_text_leaves_out_what_only_the_training_store_knows(
    tiny_model: Path, corpus: Path, store: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "monosem")
    other = made_store(tiny_model, corpus, tmp_path / "other", seed=1)
    report = evaluate(dataclasses.replace(made_run(tmp_path, store), store=str(other.path)))
    assert "normalized_mse_train" not in report["metrics"]
    assert "normalized_mse_train is left out" in caplog.text


def test_evaluate_refuses_held_out_text_that_was_trained_on(
    tiny_model: Path, corpus: Path, store: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a larger fraction holds out beyond the smaller one was in the training split."""
    larger = made_store(tiny_model, corpus, tmp_path / "larger", held_out=0.5)
    smaller = made_store(tiny_model, corpus, tmp_path / "smaller", held_out=0.28)
    run = made_run(tmp_path, store)
    with pytest.raises(ValueError, match=r"holds out 0\.5 of the corpus .* training held out 0\.3: some of it"):
        evaluate(dataclasses.replace(run, store=str(larger.path)))
    evaluate(dataclasses.replace(run, store=str(smaller.path)))
    assert "may have been trained on" not in caplog.text
    other = {"sources": {**store.manifest["sources"], "corpus": "another"}}
    evaluate(dataclasses.replace(made_run(tmp_path / "other", store, **other), store=str(larger.path)))
    assert "may have been trained on" in caplog.text


def test_evaluate_of_an_encoder_leaves_out_the_downstream_numbers(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "monosem")
    store = made_store(tiny_lm(tmp_path / "model", "bert"), corpus, tmp_path)
    report = evaluate(made_run(tmp_path / "run", store))
    assert "kl" not in report["metrics"] and "normalized_mse" in report["metrics"]
    assert "downstream numbers: left out, as" in caplog.text


def test_evaluate_says_what_is_wrong(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no autoencoder; give the folder of a finished run"):
        evaluate(EvalConfig(run=str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()
    config = made_run(tmp_path, store)
    with pytest.raises(ValueError, match="not an activation store"):
        evaluate(dataclasses.replace(config, store=str(tmp_path)))
    made_run(tmp_path, store, store=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"no store to evaluate .*gone is gone.*--store"):
        evaluate(config)
    made_run(tmp_path, store, site={**dataclasses.asdict(store.site), "layer": 1})
    with pytest.raises(ValueError, match="this autoencoder reads layer 1 resid_post_mlp"):
        evaluate(config)
    made_run(tmp_path, store, sources={**store.manifest["sources"], "tokenizer": "0" * 64})
    with pytest.raises(ValueError, match="made with another tokenizer"):
        evaluate(config)
    assert not (tmp_path / "eval.json").exists()


def test_evaluate_refuses_a_subject_that_changed_since_the_harvest(corpus: Path, tmp_path: Path) -> None:
    model = tiny_lm(tmp_path / "model")
    config = made_run(tmp_path / "run", made_store(model, corpus, tmp_path))
    tiny_lm(model, seed=1)
    with pytest.raises(ValueError, match="the weights of model are not those that"):
        evaluate(config)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="the tokenizer of model is not the one that"):
        evaluate(config)


def test_table_is_aligned_and_carries_intervals() -> None:
    run = {
        "subject": "tiny", "site": dataclasses.asdict(Site("tiny", None, 2, "resid_post_mlp")), "n_latents": 64, "k": 4,
        "activation": "topk", "tokens_seen": 2400, "distinct_tokens": 1200,
    }  # fmt: skip
    metric = {"value": 0.123456, "low": 0.1, "high": 0.2, "n": 32768, "unit": "nats per token"}
    title, _, header, row, longer = table({"run": run, "metrics": {"kl": metric, "delta_ce": metric}}).splitlines()
    where, how = "tiny, layer 2 resid_post_mlp, 64 latents, topk, k 4", "2,400 tokens (2.00 epochs of 1,200 distinct)"
    assert title == f"{where}, trained on {how}"
    assert row.split() == ["kl", "0.1235", "[0.1,", "0.2]", "32,768", "nats", "per", "token"]
    assert header.index("unit") == row.index("nats") == longer.index("nats")
