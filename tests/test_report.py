"""The page and the table that people read: nothing is left out, everything is escaped, nothing foreign is replaced."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from monosem import artifacts, cli
from monosem.config import EvalConfig, to_dict
from monosem.definitions import DEFINITIONS, definition, sections
from monosem.evals import compute_equivalent, report

NAMES = (
    *("normalized_mse", "normalized_mse_train", "pca_normalized_mse", "delta_ce", "delta_ce_mean_ablation"),
    *("delta_ce_zero_ablation", "delta_ce_pca", "kl", "probe_loss", "probe_loss_dense", "probe_loss_last"),
    *("probe_loss_dense_last", "probe_loss_constant", "n2g_recall", "n2g_recall_unigram", "n2g_recall_q90"),
    *("explanation_kl", "explanation_kl_real", "explanation_kl_unigram", "explanation_kl_zero"),
    *("explanation_kl_at_25", "explanation_kl_unigram_at_25", "explanation_kl_zero_at_25", "something_new"),
    "never_fired_fraction",
    *("progressive_kl_k1", "progressive_kl_k4", "progressive_kl_threshold", "progressive_l0_threshold"),
    *("refined_normalized_mse", "unrefined_normalized_mse", "ablation_sparsity", "ablation_sparsity_channels"),
)
NOT_KEPT = ("run", "store", "device", "model")
SETTINGS = {k: v for k, v in to_dict(EvalConfig(run="", suite="quick")).items() if k not in NOT_KEPT}
EVIL = "<img src=x onerror=alert(1)>|&"


def evaluation(folder: Path, n_latents: int = 64, k: int = 4, value: float = 0.25, **run: Any) -> str:
    """A run folder with an eval.json as `evaluate` leaves it, of metrics that are all `value`."""
    metrics = {name: {"value": value, "low": value / 2, "high": 2 * value, "n": 1234, "unit": "nats"} for name in NAMES}
    site = {"model": "m", "revision": None, "layer": 2, "location": "resid_post_mlp"}
    facts = {
        "subject": EVIL,
        "site": site,
        "activation": "topk",
        "context_length": 8,
        "store": "s",
        "d_model": 9,
        **run,
    }
    curve = {"from": [1.0, 2.0], "to": [1.0, 3.0], "n": [5, 9], "normalized_mse": [0.2, 0.1], "low": [0.1, 0.1]}
    kl = {"k": [1, 4], "value": [0.4, 0.2], "low": [0.3, 0.1], "high": [0.5, 0.3]}
    task = {"task": EVIL, "pooling": "mean", "n_held_out": 30, "latent": 7, "probe_loss": 0.3}
    pretraining = compute_equivalent.Pretraining(1e8, 1e11, 2.5, "")
    rests_on = {
        "label": "modelled", "curve": EVIL, "source": EVIL, "subject_loss": 2.5, "subject_outside": EVIL,
        "answers": {"zero_ablation": EVIL}, "sensitivity": compute_equivalent.sensitivity(4.0, 0.3, pretraining),
    }  # fmt: skip
    tables = {
        "downstream": {"compute_equivalent": rests_on},
        "latents": {"by_position": {**curve, "high": [0.3, 0.2]}},
        "progressive": {"curve": {"kl": kl}},
        "probes": {"tasks": [{**task, "probe_loss_low": 0.1, "probe_loss_high": 0.4}]},
    }
    density = {"edges": [-3.0, -2.0, -1.0], "n_latents": [3, 5], "never": 2, "n_tokens": 1234}
    found = artifacts.manifest(
        report.KIND, SETTINGS, {"autoencoder": "0" * 64, "store": "0" * 64},
        run={**facts, "n_latents": n_latents, "k": k},
        metrics=metrics, histograms={"density_log10": density}, tables=tables, left_out={}, failed={},
    )  # fmt: skip
    artifacts.write_json(folder / "eval.json", found)
    return str(folder)


def text_of(page: str) -> str:
    """The page without scripts, which hold the charts and all of plotly."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_every_name_is_in_one_section_once() -> None:
    found = sections(NAMES)
    rows = [row for own in found.values() for row in own]
    assert {*(row.name for row in rows), *(name for row in rows for name in row.beside.values())} == set(NAMES)
    assert len({row.name for row in rows}) == len(rows)
    beside = {row.name: set(row.beside.values()) for row in rows}
    assert beside["delta_ce"] == {"delta_ce_pca", "delta_ce_mean_ablation", "delta_ce_zero_ablation"}
    assert beside["probe_loss_last"] == {"probe_loss_dense_last", "probe_loss_constant"}
    assert beside["explanation_kl_at_25"] == {
        "explanation_kl_real", "explanation_kl_unigram_at_25", "explanation_kl_zero_at_25"
    }  # fmt: skip
    assert beside["progressive_kl_threshold"] == {"progressive_kl_k1", "progressive_kl_k4"}
    assert beside["refined_normalized_mse"] == {"unrefined_normalized_mse"}
    assert [row.name for row in found["Others"]] == ["something_new"]


def test_a_baseline_without_its_metric_is_a_row() -> None:
    assert [row.name for row in sections(["delta_ce_pca"])["Downstream"]] == ["delta_ce_pca"]


def test_definition_fills_in_what_a_name_says() -> None:
    assert definition("progressive_kl_k16") == "kl of x rebuilt from its 16 largest pre-activations"
    assert definition("n2g_recall_q90") != definition("n2g_recall_q50")
    assert "zeros in place" in (definition("delta_ce_zero_ablation") or "")
    assert (definition("explanation_kl_at_25") or "").endswith("a random 25% of those explained")
    assert (definition("probe_auc_last") or "").endswith("of the last token instead of the mean over the text")
    for name in ("something_new", "progressive_cosine_k4", "delta_ce_last", "n2g_recall_q"):
        assert definition(name) is None


def test_definitions_are_of_names_that_the_documents_have() -> None:
    documents = "".join(path.read_text("utf-8") for path in (Path(__file__).parents[1] / "docs").glob("*.md"))
    plain = [name for name in DEFINITIONS if "{" not in name]
    assert [
        name for name in plain if f"`{name}`" not in documents and f"`…_{name.split('_')[-1]}`" not in documents
    ] == []


def test_the_page_has_every_number_definition_and_table_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    report.write(report.read([evaluation(tmp_path)]), tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text("utf-8")
    text, table = text_of(page), (tmp_path / "out.md").read_text("utf-8")
    for name in NAMES:
        assert html.escape(definition(name) or name) in text, name
        assert f">{name}</code>" in text
    assert "0.25" in text and "[0.125, 0.5]" in text and "n = 1,234" in text and "2 fired on none" in text
    assert "multiplicative" in text and "same parameters" in text and "zero ablation: " in text
    assert "<script src" not in page and not re.search(r"(src|href)=[\"']?http", text), "plotly.js is inside the page"
    assert EVIL not in page and html.escape(EVIL) in text and "<img" not in table
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in table.splitlines() if line.startswith("|"))
    report.write(report.read([str(tmp_path)]), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == page


def test_several_autoencoders_stand_side_by_side_and_against_what_differs(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    folders = [evaluation(tmp_path / f"n{n}k{k}", n, k) for n in (64, 128) for k in (4, 8)]
    folders.append(evaluation(tmp_path / "relu", 64, 99, activation="relu"))
    evaluations = report.read(folders)
    page = report.page(evaluations)
    assert all(f"<th>{e.label}</th>" in page for e in evaluations)
    for along in ("n_latents", "k"):
        assert f'id="all-normalized_mse-{along}"' in page
    pictures = {p.x: p for p in report._against("normalized_mse", evaluations)}
    assert [s.label for s in pictures["n_latents"].series] == ["relu", "topk, k 4", "topk, k 8"]
    assert [(s.label, s.x) for s in pictures["k"].series] == [
        ("n_latents 64", [4.0, 8.0]), ("n_latents 128", [4.0, 8.0])
    ]  # fmt: skip
    plain = report._against("normalized_mse", evaluations[:4])
    assert [s.label for s in plain[0].series] == ["k 4", "k 8"], "the activation function is said where it differs"
    assert report._against("normalized_mse", evaluations[:1]) == []


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    report.write(report.read([evaluation(tmp_path)]), tmp_path / "out.html")
    report.write(report.read([evaluation(tmp_path, value=0.5)]), tmp_path / "out.html")
    assert "| 0.5 | [0.25, 1] |" in (tmp_path / "out.md").read_text("utf-8")
    for name in ("out.md", "out.html"):
        ours = (tmp_path / name).read_text("utf-8")
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"{name} is there and monosem did not make it"):
            report.check(tmp_path / "out.html")
        assert (tmp_path / name).read_text("utf-8") == "mine"
        (tmp_path / name).write_text(ours, "utf-8")
    with pytest.raises(ValueError, match=r"report is out.txt; give the name of an .html file"):
        report.check("out.txt")


def test_labels_tell_runs_apart() -> None:
    assert report.labels(["a/x", "a/y"]) == ["x", "y"]
    assert report.labels(["/a/x", "/b/x"]) == ["/a/x", "/b/x"]
    with pytest.raises(ValueError, match="given twice"):
        report.labels(["a", "./a"])


def test_eval_of_several_runs_writes_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    folders = [evaluation(tmp_path / name, n) for name, n in (("a", 64), ("b", 128))]
    done: list[str] = []

    def evaluate(stage: Any, shared: Any) -> dict[str, Any]:
        done.append(stage.run)
        return artifacts.read_manifest(Path(stage.run) / "eval.json", report.KIND)

    monkeypatch.setattr("monosem.evals.evaluate", evaluate)
    monkeypatch.setattr("monosem.run_folder.open_run", lambda *_: None)  # these have an eval.json alone
    page = tmp_path / "out.html"
    assert cli.main(["eval", *folders, "--suite", "quick", "--report", str(page)]) == 0
    assert capsys.readouterr().out == f"report of a, b: {page} (its table: {tmp_path / 'out.md'})\n"
    assert done == folders and page.exists()
    page.write_text("mine")
    done.clear()
    assert cli.main(["eval", *folders, "--report", str(page)]) == 2 and not done, "said before any work"
    assert "is there and monosem did not make it" in capsys.readouterr().err
    assert cli.main(["eval", *folders]) == 0 and capsys.readouterr().out.count("95% interval") == 2
    assert cli.main(["scale", *folders]) == 2 and "takes one table" in capsys.readouterr().err
    assert cli.main(["plan", "--report", "x.html"]) == 2 and "no effect on `monosem plan`" in capsys.readouterr().err
