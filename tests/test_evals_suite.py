"""`monosem eval --suite`: every metric of the paper in one report, part by part, resumable."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monosem import convert, model
from monosem.activations import harvest
from monosem.config import EvalConfig, HarvestConfig, TrainConfig
from monosem.definitions import definition, sections
from monosem.evals import Shared, evaluate, parts
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.training import train
from tiny import D_MODEL, tiny_texts
from zoo import write

TINY = {
    "reconstruction": {},
    "latents": {"n_rows": 200},
    "downstream": {},
    "refinement": {"n_rows": 100},
    "progressive": {"n_rows": 200, "n_tokens": 128},
    "ablation": {"n_ablations": 12},
    "probes": {"n_tasks": 2, "n_texts": 60},
    "explainability": {"n_latents": 4, "n_examples": 2, "n_tokens_building": 1000, "n_tokens_simulated": 128},
}
NAMES = (
    *("probe_loss", "n2g_recall", "n2g_precision", "explanation_kl", "ablation_sparsity", "refined_normalized_mse"),
    *("progressive_normalized_mse_k1", "progressive_delta_ce_k4", "normalized_mse", "kl", "pca_normalized_mse"),
)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """A short run on contexts long enough to ablate in, and three small labelled sets."""
    return run_of(tiny_model, "resid_post_mlp", tmp_path_factory.mktemp("suite"))


def run_of(subject: Path, location: str, out: Path) -> EvalConfig:
    texts = tiny_texts(400)
    (out / "text.jsonl").write_text("".join(json.dumps({"text": text[-200:]}) + "\n" for text in texts), "utf-8")
    (out / "tasks").mkdir()
    for name in "aoi":
        often = statistics.median(text[-90:].count(name) for text in texts)
        rows = [f"{text[-90:]},{int(text[-90:].count(name) > often)}" for text in texts]
        (out / "tasks" / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    harvest(
        HarvestConfig(
            out=str(out / "store"), model=str(subject), corpus=str(out / "text.jsonl"), context_length=32,
            n_tokens=2000, n_tokens_held_out=1500, held_out_fraction=0.4, dtype="float32", block_contexts=8,
            device="cpu", location=location,
        )
    )  # fmt: skip
    train(TrainConfig(out=str(out), store=str(out / "store"), n_latents=48, k=4, n_tokens=3000, batch_size=100))
    return EvalConfig(
        run=str(out), suite="quick", tasks=str(out / "tasks"), n_tokens_downstream=512, n_bootstrap=20, device="cpu"
    )


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.SIZES, "quick", TINY)


def test_the_suite_gives_every_metric_with_n_and_interval(run: EvalConfig) -> None:
    report = evaluate(run)
    assert set(NAMES) <= set(report["metrics"])
    for name, metric in report["metrics"].items():
        assert metric["low"] <= metric["high"] and metric["n"] > 0, name
    assert {"ablation", "probes", "explainability", "progressive", "latents"} <= set(report["tables"])
    assert len({row["task"] for row in report["tables"]["probes"]["tasks"]}) == 2
    assert json.loads((Path(run.run) / "eval.json").read_text())["metrics"] == report["metrics"]
    assert [name for name in report["metrics"] if definition(name) is None] == []
    assert "Others" not in sections(report["metrics"])
    assert evaluate(dataclasses.replace(run, suite="basic")) == report, "it is not replaced by less"


@pytest.mark.parametrize(
    ("kind", "location"),
    [
        ("llama", "attn_z"),
        ("gemma2", "mlp_post_act"),
        ("mamba", "backbone.layers.1.mixer.out_proj:input"),
        ("opt-projected", "model.decoder.layers.1.self_attn.v_proj"),
        ("distilbert", "transformer.layer.1.attention"),
    ],
)
def test_the_suite_at_any_site_leaves_out_only_what_cannot_be_known(
    kind: str, location: str, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "monosem")
    subject = tiny_model if kind == "llama" else write(tmp_path / "model", kind)
    report = evaluate(run_of(subject, location, tmp_path))
    predicted = {
        name for name in NAMES if name.startswith(("n2g", "explanation", "ablation", "progressive_delta", "kl"))
    }
    lacking = predicted if kind == "distilbert" else set()
    assert set(NAMES) - report["metrics"].keys() == lacking
    assert ("is an encoder and predicts no next token" in caplog.text) == bool(lacking)
    assert report["run"]["site"]["location"] == location
    if not lacking:
        zero, own = (report["metrics"][name]["value"] for name in ("kl_zero_ablation", "kl"))
        assert zero > 0 and own > 0, "what is put at the site is read"


def test_evaluations_that_share_load_a_subject_once(run: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, **options: Any) -> Subject:
        loaded.append(options["dtype"])
        return as_it_is(name, **options)

    as_it_is, shared = Subject.load, Shared()
    monkeypatch.setattr(Subject, "load", load)
    evaluate(dataclasses.replace(run, seed=1), shared)
    again = evaluate(dataclasses.replace(run, seed=2), shared)
    assert loaded == ["float32"]  # reading and judging: the store is float32 too
    assert again == evaluate(dataclasses.replace(run, seed=2))


def test_parts_that_are_done_are_not_done_again(
    run: EvalConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a kill between two parts: eval.json is not there yet, one part is missing."""
    caplog.set_level(logging.INFO, "monosem")
    report = evaluate(run)
    (Path(run.run) / "eval.json").unlink()
    (Path(run.run) / "eval" / "refinement.json").unlink()
    done: list[str] = []
    parts_as_they_are = dict(parts.PARTS)

    def counted(name: str, *args: Any, **sizes: int) -> parts.Part:
        done.append(name)
        return parts_as_they_are[name](*args, **sizes)

    for name in parts.PARTS:
        monkeypatch.setitem(parts.PARTS, name, functools.partial(counted, name))
    assert evaluate(run)["metrics"] == report["metrics"]
    assert done == ["refinement"]
    done.clear()
    evaluate(dataclasses.replace(run, n_tokens_downstream=640))
    assert done == ["downstream"]


@pytest.mark.parametrize("told", [True, False])
def test_an_autoencoder_from_elsewhere_is_judged_in_the_same_way(told: bool, run: EvalConfig, tmp_path: Path) -> None:
    """Ours behind the interface of others; without its encoder, what needs pre-activations is left out."""
    ours = Autoencoder.load(Path(run.run) / "autoencoder")

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w = ours.weights
            self.W_enc = nn.Parameter(w.encoder.T.clone() if told else w.encoder.T + 1)
            self.b_enc, self.W_dec = nn.Parameter(w.latent_bias.clone()), nn.Parameter(w.decoder.clone())
            self.b_dec = nn.Parameter(w.pre_bias.clone())

        def encode(self, x: Tensor) -> Tensor:
            latents = ours.encode(x)
            return torch.zeros(len(x), 48).scatter(1, latents.indices, latents.values)

        def decode(self, z: Tensor) -> Tensor:
            return z @ self.W_dec + self.b_dec

    foreign = convert.wrap(Foreign(), D_MODEL, k=4, normalize=model.normalize)
    here = dataclasses.replace(run, run=str(tmp_path / "foreign"), store=str(Path(run.run) / "store"))
    found, expected = evaluate(here, autoencoder=foreign)["metrics"], evaluate(run)["metrics"]
    left_out = () if told else ("probe_", "progressive_")
    unknown = ("normalized_mse_train", "dead_fraction", *left_out)  # the first two are of its training
    assert set(found) == {name for name in expected if not name.startswith(unknown)}
    for name in found:
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-3, abs=1e-4), name
    with pytest.raises(ValueError, match="store is not given"):
        evaluate(dataclasses.replace(here, store=None), autoencoder=foreign)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"has no \.csv file; give a folder of them"),
        ("sentence,label\na,1\n", "text"),
        ("text,label\n,1\n", r"x\.csv.*line 2"),
        ("text,label,group\n" + "".join(f"hello {i},{i % 2},g\n" for i in range(60)), "cannot be halved"),
    ],
)
def test_labelled_texts_that_do_not_serve_are_refused_before_any_work(
    rows: str | None, message: str, run: EvalConfig, tmp_path: Path
) -> None:
    if rows is not None:
        (tmp_path / "x.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        evaluate(dataclasses.replace(run, tasks=str(tmp_path), seed=5))
    assert json.loads((Path(run.run) / "eval/reconstruction.json").read_text())["config"]["seed"] != 5


def test_rules_of_every_latent_leave_nothing_real(run: EvalConfig) -> None:
    metrics = evaluate(dataclasses.replace(run, n2g="all"))["metrics"]
    assert metrics["n2g_precision"]["n"] == 48
    assert "48 of 48 latents simulated" in metrics["explanation_kl"]["unit"]
    zero, mean = metrics["explanation_kl_zero"]["value"], metrics["explanation_kl"]["value"]
    assert zero != mean
    with_rules = evaluate(dataclasses.replace(run, suite="basic"))["metrics"]
    assert with_rules["n2g_precision"]["n"] == 48, "it is not replaced by less"
    with pytest.raises(ValueError, match="suite basic makes no rules"):
        dataclasses.replace(run, suite="basic", n2g=3)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_activations_without_k_are_judged_without_progressive_recovery(
    activation: str, run: EvalConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """jumprelu has extras (thresholds), so this is also the suite on an autoencoder that is more than its weights."""
    caplog.set_level(logging.INFO, "monosem")
    config = TrainConfig(
        out=str(tmp_path), store=str(Path(run.run) / "store"), activation=activation, sparsity_coef=1e-3
    )
    train(dataclasses.replace(config, n_latents=48, n_tokens=3000, batch_size=100))
    report = evaluate(dataclasses.replace(run, run=str(tmp_path)))
    metrics = report["metrics"]
    assert report["run"]["n_principal_components"] == min(max(1, round(metrics["l0"]["value"])), D_MODEL)
    assert {name for name in NAMES if not name.startswith("progressive")} <= set(metrics)
    assert not [name for name in metrics if name.startswith("progressive")]
    assert f"progressive recovery: left out, as activation {activation} has no k" in caplog.text
