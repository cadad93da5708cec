"""RUN/explain/: every column is what a plain recomputation from the store and the weights gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from monosem import artifacts, n2g
from monosem import explain as explain_function
from monosem.activations import ActivationStore
from monosem.artifacts import read_json, write_json
from monosem.config import ExplainConfig
from monosem.evals import probes, tasks
from monosem.explained import ExplainStore
from monosem.explanations import entry, words
from monosem.explanations.entry import explain
from monosem.explanations.seen import Seen
from monosem.kernels import reference
from monosem.model import Autoencoder
from monosem.subject import Subject
from tiny import tiny_run


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explained")
    tiny_run(out, tiny_model, tiny_corpus)
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


def test_a_block_encoded_meanwhile_is_taken_in_as_one_encoded_in_turn(run: Path) -> None:
    store, autoencoder = ActivationStore.open(run / "store"), Autoencoder.load(run / "autoencoder")
    in_turn, threaded = (Seen(autoencoder, store, seed=0) for _ in range(2))
    for block in range(store.n_blocks("train")):
        in_turn.add(in_turn.encode(block))
    threaded.add_all(range(store.n_blocks("train")))
    assert np.array_equal(in_turn.moments.powers, threaded.moments.powers)
    for kind, columns in in_turn.examples().items():
        for name, column in columns.items():
            assert np.array_equal(column, threaded.examples()[kind][name]), (kind, name)


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


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_more_rules_and_ablations_come_on_top_of_those_that_are_there(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    few, more = (ExplainConfig(run=str(tmp_path / "run"), n2g=n, ablations=n, device="cpu") for n in (3, 5))
    first = explain(few)
    rules, effects = first.folder / "n2g.jsonl", first.folder / "ablations"
    before, kept, ablated = mtimes(first.folder), rules.read_text(), {p.name for p in effects.glob("*.npz")}
    assert first.manifest["computed"]["n2g"]["command"] == "monosem explain RUN --n2g all"
    rules.write_text(kept + '{"latent": 7, "recall": 0.')  # torn by a kill
    made = {path.name: path.stat().st_mtime_ns for path in effects.iterdir()}
    second = explain(more)
    assert rules.read_text().startswith(kept) and rules.read_text().count("\n") == 6
    assert ablated < {p.name for p in effects.glob("*.npz")} and len(second.column("ablation_latents")) == 5
    assert all((effects / name).stat().st_mtime_ns == then for name, then in made.items())
    assert mtimes(second.folder)["top_activations.npy"] == before["top_activations.npy"]
    assert (~np.isnan(second.column("n2g_precision"))).sum() == 5
    assert explain(few).manifest["computed"] == second.manifest["computed"]  # more is there than asked for


def test_a_killed_explain_goes_on_where_it_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: ExplainStore
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    config = ExplainConfig(run=str(tmp_path / "run"), device="cpu")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(entry.collect.Moments, "columns", dies)
        with pytest.raises(KeyboardInterrupt):
            explain(config)
    with pytest.raises(ValueError, match=r"unfinished \(no activations\); monosem explain .* goes on"):
        ExplainStore(tmp_path / "run" / "explain")
    with monkeypatch.context() as patch:
        patch.setattr(entry.effects, "_write_columns", dies)
        with pytest.raises(KeyboardInterrupt):
            explain(config)
    before = mtimes(tmp_path / "run" / "explain")
    again = explain(config)
    assert before.items() <= mtimes(again.folder).items()
    for name in found.manifest["columns"]:
        assert np.array_equal(again.column(name), found.column(name), equal_nan=found.column(name).dtype.kind == "f")


def test_rules_are_those_of_n2g_and_judged_on_all_held_out_tokens(run: Path, found: ExplainStore) -> None:
    store, autoencoder = ActivationStore.open(run / "store"), Autoencoder.load(run / "autoencoder")
    held_out = store.contexts("held_out").tokens[:, store.first_position :]
    x, _ = autoencoder.normalize(store.rows("held_out"))
    fires = reference.dense(reference.topk_encode(x, autoencoder.weights, 4)) > 1e-3
    subject = Subject.load(str(store.site.model), dtype="float32", device="cpu")
    reader = n2g.LatentReader(subject, autoencoder, store.site)
    recall, precision, density = (found.column(f"n2g_{name}") for name in ("recall", "precision", "density"))
    with contextlib.closing(sqlite3.connect(found.folder / "words.sqlite")) as words:
        rules = dict(words.execute("SELECT latent, n2g_rule FROM latents WHERE n2g_rule IS NOT NULL"))
    assert len(rules) == found.manifest["computed"]["n2g"]["n_latents"] > 30
    for latent, text in list(rules.items())[:10]:
        rule = {tuple(pattern): value for pattern, value in json.loads(text)}
        predicts = n2g.predict(rule, held_out).flatten() > 1e-3
        both = int((predicts & fires[:, latent]).sum())
        assert density[latent] == pytest.approx(float(fires[:, latent].float().mean()))
        assert precision[latent] == pytest.approx(both / max(1, int(predicts.sum())))
        n_fires = int(fires[:, latent].sum())
        assert recall[latent] == pytest.approx(both / n_fires if n_fires else np.nan, nan_ok=True)
        context, peak = (int(found.column(f"top_{name}")[latent, 0]) for name in ("context", "position"))
        example = torch.from_numpy(np.array(found.column("contexts")[context, store.first_position : peak + 1]))
        assert reader.at_last([tuple(example.tolist())], [latent])[0] >= 0
        assert any(len(pattern) <= peak + 1 for pattern in rule)


def test_ablations_are_those_of_whole_runs(run: Path, found: ExplainStore) -> None:
    store, autoencoder = ActivationStore.open(run / "store"), Autoencoder.load(run / "autoencoder")
    subject = Subject.load(str(store.site.model), dtype="float32", device="cpu")
    latents = found.column("ablation_latents")
    assert len(latents) == 32 and (np.diff(latents) > 0).all()
    for row, latent in enumerate(latents.tolist()[:5]):
        context, peak = (int(found.column(f"top_{name}")[latent, 0]) for name in ("context", "position"))
        tokens = torch.from_numpy(np.array(found.column("contexts")[context], dtype=np.int64))[None]

        def ablated(raw: Any, latent: int = latent, peak: int = peak) -> Any:
            x, stats = autoencoder.normalize(raw[:, peak])
            z = reference.dense(reference.topk_encode(x, autoencoder.weights, 4))[:, latent]
            new = raw.clone()
            new[:, peak] -= stats.std * z[:, None] * autoencoder.weights.decoder[latent]
            return new

        p = subject.logits(tokens)[0].log_softmax(-1)
        q = subject.run_with(tokens, store.site, ablated)[0].log_softmax(-1)
        kl, after = (p.exp() * (p - q)).sum(-1)[peak:-1], slice(peak + 1, None)
        loss = (p - q)[:-1].gather(1, tokens[0, 1:, None])[peak:, 0]
        assert np.allclose(found.column("ablation_kl")[row, 0, after], kl, atol=1e-5)
        assert np.allclose(found.column("ablation_delta_ce")[row, 0, after], loss, atol=1e-5)
        assert np.isnan(found.column("ablation_kl")[row, 0, : peak + 1]).all()
        change = q.exp() - p.exp()
        assert np.allclose(
            found.column("ablation_probs_up_values")[row, 0, after, 0], change[peak:-1].amax(1), atol=1e-5
        )
        values, per_token = (found.column(f"ablation_{name}")[row, 0] for name in ("up_values", "logits_up_values"))
        assert np.allclose(values, -np.sort(-per_token[after].ravel())[:10])
        assert (found.column("ablation_up_position")[row, 0][~np.isnan(values)] > peak).all()


def test_words_can_be_searched(found: ExplainStore) -> None:
    vocabulary = read_json(found.folder / "vocabulary.json")
    context, position = (found.column(f"top_{name}") for name in ("context", "position"))
    with contextlib.closing(sqlite3.connect(found.folder / "words.sqlite")) as database:
        rows = database.execute("SELECT latent, explanation, n2g_rule, top_tokens FROM latents").fetchall()
        assert [row[0] for row in rows] == list(range(48))
        for latent, explanation, rule, tokens in rows:
            assert bool(explanation) == (rule is not None)
            peaks = found.column("contexts")[context[latent], position[latent]][context[latent] >= 0]
            texts = {vocabulary[token].strip() for token in peaks.tolist()}
            assert set(tokens.split()) <= texts and (tokens or not texts - {""})
        latent, text = database.execute("SELECT rowid, examples FROM latents_fts WHERE examples != ''").fetchone()
        word = max(re.findall("[a-z]+", text), key=len)
        sql = "SELECT rowid FROM latents_fts WHERE latents_fts MATCH ?"
        assert (latent,) in database.execute(sql, (f"examples:{word}",)).fetchall()


def test_words_of_a_rule_and_of_tokens() -> None:
    vocabulary = [" a", " b", "\n", " c"]
    assert words.explanation([([0], 1.0), ([3, -1, 1, -2], 2.0)], vocabulary) == "“^ b … c” or “a”"
    assert words.explanation([([0, *[1] * i], 1.0) for i in range(6)], vocabulary).endswith("or 2 more")
    assert words.explanation([([0] * 9, 1.0)], vocabulary) == "“… " + " a".join([""] * 9).strip() + "”"
    assert words.explanation([([0, -1, -1], 2.0), ([0, -1], 1.0), ([-1, -1], 0.5)], vocabulary) == "“a” or “…”"
    assert words.explanation([([3, -1, -1, 1], 2.0)], vocabulary) == "“b … c”"
    assert words.top_tokens([3, 1, 1, 2], vocabulary) == "b c ↵"


def test_probes_come_from_the_evaluation_of_the_same_autoencoder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    config = ExplainConfig(run=str(tmp_path / "run"), n2g=0, ablations=0, device="cpu")
    first = explain(config)
    assert "probe_best" not in first and "--tasks" in first.manifest["computed"]["probes"]["command"]
    assert "n2g_recall" not in first and first.manifest["computed"]["n2g"]["n_latents"] == 0
    rows = [("b", 3, 0.5), ("a", 3, 0.25), ("a", 7, 0.125)]
    table = [{"task": task, "latent": latent, "probe_loss": loss} for task, latent, loss in rows]
    sources = first.manifest["sources"]
    made = {"metrics": {}, "tables": {"tasks": table}, "left_out": {}, "seconds": 1.0}
    part = artifacts.manifest("evaluation-part", {}, sources, **made)
    write_json(tmp_path / "run" / "eval" / "probes.json", part)
    second = explain(config)
    best, task = second.column("probe_best"), second.column("probe_task")
    assert {i: (best[i], second.manifest["probe_tasks"][task[i]]) for i in np.flatnonzero(task >= 0)} == {
        3: (0.25, "a"), 7: (0.125, "a")
    }  # fmt: skip
    assert np.isnan(best).sum() == 46


def test_tasks_probe_every_latent_on_held_out_texts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    (tmp_path / "sets").mkdir()
    for name, word in (("ends", "end"), ("starts", "start"), ("odd", "odd"), ("even", "even")):
        rows = [f"{(i * 7919) % 997} {word if i % 3 else 'the story'} {i},{i % 3 > 0}" for i in range(90)]
        (tmp_path / "sets" / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    config = ExplainConfig(run=str(tmp_path / "run"), n2g=0, ablations=0, device="cpu")
    found = explain(dataclasses.replace(config, tasks=str(tmp_path / "sets")))
    names, which = found.manifest["probe_tasks"], found.column("probe_top_task")
    assert names == ["ends", "even", "odd", "starts"] and (which[:, 0] >= 0).all()
    assert np.array_equal(found.column("probe_task"), which[:, 0])
    assert all(len(set(row)) == 3 for row in which.tolist())

    autoencoder, store = Autoencoder.load(tmp_path / "run" / "autoencoder"), ActivationStore.open(run / "store")
    subject, weights = Subject.load(str(store.site.model), dtype="float32", device="cpu"), autoencoder.weights
    gains = np.zeros((48, 4))
    for i, task in enumerate(tasks.load(str(tmp_path / "sets"))):
        train, held_out = tasks.split(task, n_texts=500, seed=0)
        x = probes.pool(subject, autoencoder, store.site, task.texts, max_tokens=128).by_pooling["mean"]
        z = ((x - weights.pre_bias) @ weights.encoder.T + weights.latent_bias).T
        y = torch.tensor(task.labels).bool()
        share, fit = float(y[train].float().mean()), probes.fit(z[:, train], y[train])
        gains[:, i] = -share * np.log(share) - (1 - share) * np.log(1 - share) - fit.loss.numpy()
        logits = fit.weight[:, None] * z[:, held_out] + fit.bias[:, None]
        loss = torch.nn.functional.softplus(torch.where(y[held_out], -logits, logits)).mean(1)
        ones, zeros = logits[:, y[held_out], None], logits[:, None, ~y[held_out]]
        auc = ((ones > zeros).double() + (ones == zeros).double() / 2).mean((1, 2))
        latents, places = np.nonzero(which == i)
        assert len(latents)
        assert np.allclose(found.column("probe_top_loss")[latents, places], loss[latents], atol=1e-4)
        assert np.allclose(found.column("probe_top_auc")[latents, places], auc[latents], atol=0.01)
    kept = np.take_along_axis(gains, which.astype(int), axis=1)
    assert (np.diff(kept) <= 1e-5).all() and np.allclose(kept, -np.sort(-gains)[:, :3], atol=1e-5)

    monkeypatch.setattr(entry.probing, "make", None)  # what is there stays, asked for again or not
    for again in (config, dataclasses.replace(config, tasks=str(tmp_path / "sets"))):
        assert explain(again).manifest["computed"]["probes"] == found.manifest["computed"]["probes"]
    (tmp_path / "sets" / "odd.csv").unlink()
    with pytest.raises(TypeError):  # other tasks are probed again
        explain(dataclasses.replace(config, tasks=str(tmp_path / "sets")))


def test_what_does_not_fit_in_memory_is_refused_before_it_starts() -> None:
    entry.check_memory(131_072, 64, 3 * 2**30)
    with pytest.raises(ValueError, match=r"131,072 latents in contexts of 64 tokens take 1\.2 GiB .* 1\.0"):
        entry.check_memory(131_072, 64, 2**30)


def test_a_torn_or_foreign_folder_is_refused(tmp_path: Path, found: ExplainStore) -> None:
    with pytest.raises(ValueError, match=r"no explanation.*monosem explain"):
        ExplainStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(found.manifest))
    with pytest.raises(ValueError, match=re.escape("density.npy is missing; monosem explain")):
        ExplainStore(tmp_path).column("density")
    np.save(tmp_path / "density.npy", np.zeros(3))
    with pytest.raises(ValueError, match=re.escape("density.npy has 152 bytes, not ")):
        ExplainStore(tmp_path).column("density")
    manifest = {**found.manifest, "columns": dict(found.manifest["columns"])}
    manifest["columns"]["density"] = {
        **manifest["columns"]["density"],
        **artifacts.file_facts(tmp_path / "density.npy"),
    }
    tiny.reseal(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="not the array"):
        ExplainStore(tmp_path).column("density")
    with pytest.raises(ValueError, match="no column 'colour'"):
        ExplainStore(tmp_path).column("colour")


def test_explaining_nothing_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no autoencoder"):
        explain(ExplainConfig(run=str(tmp_path)))
