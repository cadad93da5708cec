"""What is written where: nothing of others is replaced, nothing half is left, what is finished needs no writing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from monosem import artifacts, cli, convert, kernels, main_job
from monosem.activations import harvest
from monosem.config import EvalConfig, ExplainConfig, HarvestConfig, RunConfig, ServeConfig, SweepConfig, TrainConfig
from monosem.evals import evaluate
from monosem.evals import parts as eval_parts
from monosem.explained import ExplainStore
from monosem.explanations import entry, rules
from monosem.explanations.entry import explain
from monosem.model import Autoencoder
from monosem.sweeps import sweep
from monosem.training import train
from monosem.viewer import live, server
from tiny import D_MODEL, tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path) -> Path:
    """A run with its store, evaluated and explained; of a copy of the model, that may move. Copy it to change it."""
    out = tmp_path_factory.mktemp("outputs")
    shutil.copytree(tiny_model, out / "model")
    tiny_run(out / "run", out / "model", tiny_corpus)
    evaluate(evaluation(out / "run"))
    explain(explanation(out / "run"))
    return out


def evaluation(run: Path, **changes: Any) -> EvalConfig:
    return EvalConfig(str(run), **{"n_bootstrap": 20, "device": "cpu", **changes})


def explanation(run: Path, **changes: Any) -> ExplainConfig:
    return ExplainConfig(str(run), **{"n_tokens": 400, "n2g": 2, "ablations": 2, "device": "cpu", **changes})


def harvesting(made: Path, corpus: Path, out: Path) -> HarvestConfig:
    return HarvestConfig(
        out=str(out), model=str(made / "model"), corpus=str(corpus), context_length=16, n_tokens=2000,
        n_tokens_held_out=400, held_out_fraction=0.2, dtype="float32", block_contexts=8, device="cpu",
    )  # fmt: skip


def training(store: Path, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        str(out), str(store), **{"n_latents": 48, "k": 4, "n_tokens": 3000, "batch_size": 100, **changes}
    )


def everything(folder: Path) -> dict[str, Any]:
    """Name, size and time of all in a folder."""
    return {str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


# One place: artifacts


@contextlib.contextmanager
def odd_file(path: Path, kind: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("elsewhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
            os.chdir(here)
            yield
            return
    yield


ODD = {"pipe": "a named pipe", "link": "a symbolic link", "folder": "a folder", "socket": "a socket"}


@pytest.mark.parametrize("kind", ODD)
def test_only_a_regular_file_is_replaced(kind: str, tmp_path: Path) -> None:
    with odd_file(tmp_path / "out.json", kind):
        before = everything(tmp_path)
        with pytest.raises(ValueError, match=f"is {ODD[kind]}, and only a regular file is replaced"):
            artifacts.write_json(tmp_path / "out.json", {})
        assert everything(tmp_path) == before


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="/dev/null is a device"):
        artifacts.write_json("/dev/null", {})


def test_leftovers_of_dead_processes_go_when_the_folder_is_next_written(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [".a.json.1.tmp", ".notes.tmp", "a.json.99999.tmp", f".b.{os.getppid()}.tmp"]
    gone = [f".a.json.{dead.pid}.tmp", f".other.npy.{dead.pid}.tmp", f".c.{os.getpid()}.tmp", f".d.{2**70}.tmp"]
    for name in [*kept, *gone]:
        (tmp_path / name).write_text("half")
    (tmp_path / f".site.{dead.pid}.tmp").mkdir()
    artifacts.write_json(tmp_path / "a.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "a.json"])


@pytest.mark.parametrize("deep", ["out", "a/b/out"])
def test_a_lock_leaves_nothing_where_nothing_was_written(deep: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), artifacts.folder_lock(tmp_path / deep):
        assert (tmp_path / deep / ".lock").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with artifacts.folder_lock(tmp_path / deep):
        (tmp_path / deep / "file").touch()
    assert [p.name for p in (tmp_path / deep).iterdir()] == ["file"]


def test_one_output_has_one_writer(tmp_path: Path) -> None:
    with artifacts.file_lock(tmp_path / "x"):
        with pytest.raises(ValueError, match=r"another process is working in .*x"), artifacts.file_lock(tmp_path / "x"):
            pass
        with artifacts.file_lock(tmp_path / "y"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_told_in_words_of_every_library(tmp_path: Path) -> None:
    """NumPy and SQLite give no error number."""
    import sqlite3

    for error in (OSError("1000 requested and 24 written"), sqlite3.OperationalError("database or disk is full")):

        def fail(_: Path, error: Exception = error) -> None:
            raise error

        with pytest.raises(OSError, match=r"no room to write .*x\.npy"):
            artifacts.write_atomic(tmp_path / "x.npy", fail)


# What others made


def foreign_outputs(made: Path, corpus: Path, out: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """By name: the file that is there already, below `out`, and what would write over it."""
    run, store = made / "run", made / "run/store"
    explained = ExplainStore(run / "explain")

    def swept() -> None:
        (out.parent / "grid.json").write_text(json.dumps({"base": {"n_tokens": 400, "batch_size": 100}, "grid": {}}))
        sweep(SweepConfig(str(out), str(out.parent / "grid.json"), str(store)))

    def exported(**flags: str) -> None:
        argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
        if cli.main(["export", str(run), *argv]):
            raise ValueError

    assert explained.n_latents == 48
    return {
        "train.json": ("train.json", lambda: train(training(store, out))),
        "metrics.jsonl": ("metrics.jsonl", lambda: train(training(store, out))),
        "autoencoder": ("autoencoder/config.json", lambda: train(training(store, out))),
        "plan.json": ("plan.json", lambda: harvest(harvesting(made, corpus, out))),
        "mean": ("mean.safetensors", lambda: harvest(harvesting(made, corpus, out))),
        "documents": ("train/documents.json", lambda: harvest(harvesting(made, corpus, out))),
        "sweep.json": ("sweep.json", swept),
        "save": ("config.json", lambda: Autoencoder.load(run / "autoencoder").save(out)),
        "sae_lens": ("cfg.json", lambda: convert.save_sae_lens(Autoencoder.load(run / "autoencoder"), out)),
        "eval.json": ("eval.json", lambda: evaluate(evaluation(out, store=str(store)), autoencoder=load(run))),
        "parquet": ("table.parquet", lambda: exported(parquet=str(out / "table.parquet"))),
        "sae_viewer": ("atoms/3.json", lambda: exported(**{"sae-viewer": str(out)})),
        "site": ("index.html", lambda: exported(out=str(out))),
        "report": ("page.md", lambda: report(run, out / "page.html")),
    }


def load(run: Path) -> Autoencoder:
    return Autoencoder.load(run / "autoencoder")


def report(run: Path, page: Path) -> None:
    if cli.main(["eval", str(run), "--report", str(page), "--n-bootstrap", "20"]):
        raise ValueError


NAMES = (
    "train.json", "metrics.jsonl", "autoencoder", "plan.json", "mean", "documents", "sweep.json", "save", "sae_lens",
    "eval.json", "parquet", "sae_viewer", "site", "report",
)  # fmt: skip


@pytest.mark.parametrize("content", ["mine", "{}"])
@pytest.mark.parametrize("name", NAMES)
def test_what_others_made_is_not_overwritten(
    name: str, content: str, made: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    file, write = foreign_outputs(made, tiny_corpus, tmp_path / "out")[name]
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = everything(tmp_path / "out")
    with pytest.raises(ValueError):
        write()
    assert everything(tmp_path / "out") == before and path.read_text() == content


def test_our_own_outputs_are_replaced(made: Path, tmp_path: Path) -> None:
    flags = ["--parquet", str(tmp_path / "t.parquet"), "--sae-viewer", str(tmp_path / "v"), "--latents", "2"]
    for _ in range(2):
        assert cli.main(["export", str(made / "run"), str(tmp_path / "site"), *flags]) == 0
        report(made / "run", tmp_path / "page.html")
        load(made / "run").save(tmp_path / "saved")
    names = {"t.parquet", "v", "site", "page.html", "page.md", "saved"}
    assert {p.name for p in tmp_path.iterdir()} == names  # and neither locks nor leftovers


def test_two_exports_of_one_site_do_not_mix(made: Path, tmp_path: Path) -> None:
    with artifacts.file_lock(tmp_path / "site"):
        assert cli.main(["export", str(made / "run"), str(tmp_path / "site")]) == 2
    assert not (tmp_path / "site").exists()


def test_an_export_makes_nothing_when_one_of_its_outputs_cannot_be_made(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (["--parquet", str(tmp_path / "file/t.parquet")], ["--sae-viewer", str(tmp_path / "file")]):
        assert cli.main(["export", str(made / "run"), str(tmp_path / "site"), *bad]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_refused_command_leaves_no_folder(made: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    store = made / "run/store"
    with pytest.raises(ValueError):
        train(training(store, tmp_path / "a/run", impl="triton"))
    with pytest.raises(ValueError):
        train(training(tmp_path, tmp_path / "a/run"))
    with pytest.raises(ValueError):
        harvest(harvesting(made, tmp_path / "no.jsonl", tmp_path / "b/store"))
    assert list(tmp_path.iterdir()) == []


def test_two_things_in_one_folder_are_refused(made: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (tmp_path / "grid.json").write_text(json.dumps({"base": {"store": str(run / "store")}, "grid": {"k": [2, 3]}}))
    made_sweep = tmp_path / "sweep"
    made_sweep.mkdir()
    artifacts.write_json(made_sweep / "sweep.json", {"kind": "sweep"})
    before = everything(tmp_path)
    job = RunConfig(str(run / "store"), harvest=dataclasses.replace(harvesting(made, tiny_corpus, Path()), out=""))
    wrong: list[Callable[[], Any]] = [
        lambda: train(training(run / "store", run / "store")),
        lambda: train(training(run / "store", made_sweep)),
        lambda: train(training(run / "store", run / "explain")),
        lambda: harvest(harvesting(made, tiny_corpus, run)),
        lambda: harvest(harvesting(made, tiny_corpus, made_sweep)),
        lambda: sweep(SweepConfig(str(run), str(tmp_path / "grid.json"))),
        lambda: sweep(SweepConfig(str(run / "store"), str(tmp_path / "grid.json"))),
        lambda: main_job.run(job),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"holds \w+.json of another kind"):
            call()
    assert everything(tmp_path) == before


def test_serve_looks_at_its_folders_before_it_listens(made: Path, tmp_path: Path) -> None:
    run, nowhere = str(made / "run"), str(tmp_path / "no/where")
    with pytest.raises(ValueError, match=r"holds no scaling.json"):
        server.serve(ServeConfig(run, scaling=nowhere))
    with pytest.raises(ValueError, match=r"is no folder, .gguf file or hub id"):
        server.serve(ServeConfig(run, model=nowhere))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_precision_that_the_kernels_lack_is_told_by_the_config(impl: str) -> None:
    with pytest.raises(ValueError, match="precision=int8 needs impl=native"):
        training(Path("store"), Path("out"), impl=impl, precision="int8")


def test_a_precision_that_the_chosen_kernels_lack_leaves_no_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "native_is_built", lambda: False)
    with pytest.raises(ValueError, match="impl is torch here"):
        train(training(made / "run/store", tmp_path / "a/run", precision="int8"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["harvest", "train"])
def test_too_little_disk_is_told_before_the_work(
    stage: str, made: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 and 400 activations of 32 numbers are 300 kB; two states of 48 latents 60 kB."""
    room = {"harvest": 250_000, "train": 50_000}[stage]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room))
    with pytest.raises(ValueError, match=r"GiB of disk, but .* are free"):
        if stage == "harvest":
            harvest(harvesting(made, tiny_corpus, tmp_path / "a/store"))
        else:
            train(training(made / "run/store", tmp_path / "a/run"))
    assert list(tmp_path.iterdir()) == []


def test_labelled_texts_are_looked_at_before_the_harvest(made: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    asked = RunConfig(
        str(tmp_path / "out"),
        harvest=dataclasses.replace(harvesting(made, tiny_corpus, Path()), out=""),
        eval=EvalConfig(run="", suite="quick", tasks=str(tmp_path / "tasks")),
    )
    with pytest.raises(ValueError, match=r"has no \.csv file"):
        main_job.run(asked)
    assert not (tmp_path / "out").exists()


# What is finished


def test_what_is_finished_is_found_without_writing(
    made: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nothing can be written: no file is made, not even a lock."""
    shutil.copytree(made / "run", tmp_path / "run")
    run = tmp_path / "run"
    grid = {"base": {"n_tokens": 400, "batch_size": 100}, "grid": {"k": [3, 4]}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    swept = SweepConfig(str(tmp_path / "sweep"), str(tmp_path / "grid.json"), str(run / "store"), n_bootstrap=20)
    first = sweep(swept)
    before = everything(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(artifacts, "write_atomic", refuse)
    monkeypatch.setattr(artifacts, "folder_lock", refuse)
    assert harvest(harvesting(made, tiny_corpus, run / "store")).width == D_MODEL
    assert train(training(run / "store", run)).config.n_latents == 48
    assert "kl" in evaluate(evaluation(run, store=str(run / "store")))["metrics"]
    assert explain(explanation(run, store=str(run / "store"))).n_latents == 48
    assert sweep(swept) == first
    assert everything(tmp_path) == before


def test_a_subject_that_moved_is_named_by_model(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run/eval.json").unlink()
    shutil.rmtree(tmp_path / "run/eval")
    (made / "model").rename(made / "elsewhere")
    try:
        with pytest.raises(ValueError, match=r"is not there any more; .*--model PATH"):
            evaluate(evaluation(tmp_path / "run"))
        with pytest.raises(ValueError, match=r"--model PATH"):
            explain(explanation(tmp_path / "run", n2g=3))
        assert not (tmp_path / "run/eval").exists()
        moved = str(made / "elsewhere")
        assert "kl" in evaluate(evaluation(tmp_path / "run", model=moved))["metrics"]
        assert explain(explanation(tmp_path / "run", n2g=3, model=moved)).n_latents == 48
        other = tmp_path / "other"
        shutil.copytree(tiny_model, other)
        weights = next(other.glob("*.safetensors"))
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="the weights of other are not those"):
            evaluate(evaluation(tmp_path / "run", model=str(other), seed=1))
        shutil.rmtree(other)
        shutil.copytree(made / "elsewhere", other)
        settings = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**settings, "transformers_version": "0", "use_cache": False}))
        assert "kl" in evaluate(evaluation(tmp_path / "run", model=str(other), seed=1))["metrics"]
        (other / "config.json").write_text(json.dumps({**settings, "layer_norm_epsilon": 0.5, "rms_norm_eps": 0.5}))
        with pytest.raises(ValueError, match=r"the config.json of other is not the one"):
            evaluate(evaluation(tmp_path / "run", model=str(other), seed=2))
        with pytest.raises(ValueError, match="the subject_config of other is not the one"):
            live.load(str(tmp_path / "run"), model=str(other))
    finally:
        (made / "elsewhere").rename(made / "model")


# Parts that fail


@pytest.mark.parametrize("error", [ValueError("not finite"), RuntimeError("out of memory"), ZeroDivisionError("no")])
def test_a_part_that_fails_leaves_the_others(
    error: Exception, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "run/autoencoder", tmp_path / "run/autoencoder")
    shutil.copytree(made / "run/autoencoder", tmp_path / "other/autoencoder")
    command = ["eval", str(tmp_path / "run"), "--store", str(made / "run/store"), "--n-bootstrap", "20"]

    def fail(_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setitem(eval_parts.PARTS, "downstream", fail)
        assert cli.main(command) == 1
        kept = json.loads((tmp_path / "run/eval.json").read_text())
        assert str(error) in kept["failed"]["downstream"] and "normalized_mse" in kept["metrics"]
        assert f"downstream failed: {kept['failed']['downstream']}" in capsys.readouterr().out
        page = ["--report", str(tmp_path / "page.html")]
        assert cli.main([command[0], str(tmp_path / "other"), *command[1:], *page]) == 1
        assert "downstream" in (tmp_path / "page.md").read_text()
    assert cli.main(command) == 0  # tries again
    assert json.loads((tmp_path / "run/eval.json").read_text())["failed"] == {}


def test_contexts_too_short_for_ablations_leave_them_out(made: Path, tmp_path: Path) -> None:
    judged = eval_parts.Judged(
        evaluation(tmp_path), load(made / "run"), harvest_store(made), eval_parts.torch.device("cpu")
    )
    part = eval_parts.ablation_part(judged, 4)
    assert part.metrics == [] and "16 tokens are shorter than 17" in part.left_out["ablations"]


def harvest_store(made: Path) -> Any:
    from monosem.activations import ActivationStore

    return ActivationStore.open(made / "run/store")


def test_a_part_of_an_explanation_that_fails_leaves_the_others(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "run/autoencoder", tmp_path / "run/autoencoder")
    asked = explanation(tmp_path / "run", store=str(made / "run/store"))

    def fail(*_: Any) -> Any:
        raise ValueError("no rule here")

    with monkeypatch.context() as patch:
        patch.setattr(rules, "make", fail)
        found = explain(asked)
        assert (
            found.manifest["failed"] == {"n2g": "no rule here"} and "ablation_kl" in found and "n2g_recall" not in found
        )
        assert (tmp_path / "run/explain/words.sqlite").exists()
        assert entry.explain(asked).manifest["failed"] == {"n2g": "no rule here"}
    found = explain(asked)
    assert found.manifest["failed"] == {} and "n2g_recall" in found
    with contextlib.closing(__import__("sqlite3").connect(found.folder / "words.sqlite")) as words:
        assert words.execute("SELECT count(*) FROM latents WHERE explanation != ''").fetchone()[0] == 2
    (found.folder / "ablation_up.npy").unlink()
    (found.folder / "ablation_up.npy").mkdir()  # the last part that is made anew cannot be: that is kept as well
    assert "ablation_up.npy is a folder" in explain(asked).manifest["failed"]["ablations"]
