"""Our autoencoder in the evaluations of others, theirs in ours: the real packages, their numbers beside ours.

    python -m benchmarks.interop --run runs/demo

makes an environment in which SAEBench, sae-probes, SAELens, dictionary_learning and sparsify import together, runs
tests/test_interop.py in it, evaluates the run by their own entry points and by ours, and writes results/interop.md.
Nothing is asked of the hub: the subject is a local folder under a name (`subject_named`), texts are those of a store or
of sae-probes, and SAEBench's `load_dataset` is given them in place of a download.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import environments, steps, workers

ROOT = workers.ROOT
REQUIREMENTS = ("sae-bench==0.6.0", "sae-probes==0.4.2", "sae-lens==6.54.12", "transformer-lens==3.9.0", "numpy<2")
"""Their own requirements are met: TransformerLens 4 has no HookedTransformer, and SAEBench wants numpy 1."""
LONE = ("eai-sparsify==1.3.3", "dictionary-learning==0.1.0")
"""Installed without their requirements, which would move torch or pull in nnsight."""
BESIDE = ("natsort", "schedulefree", "tyro", "gguf", "zstandard", "pytest", "hypothesis", "beartype")
"""What LONE, monosem and its tests import and the others do not bring."""
PACKAGES = (
    *("sae-bench", "sae-probes", "sae-lens", "transformer-lens", "eai-sparsify", "dictionary-learning"),
    *("torch", "transformers", "numpy", "datasets", "scikit-learn"),
)
NAME = "subject"
"""What the local subject is called in their result files."""
AG_NEWS = "fancyzhx/ag_news"
"""The set of SAEBench's sparse_probing in whose place `classes` are given: four classes, texts in a column `text`."""


@contextlib.contextmanager
def subject_named(folder: str | Path) -> Iterator[None]:
    """While open, TransformerLens loads the model in `folder` when it is asked for NAME."""
    from transformer_lens import loading_from_pretrained as loading

    with tempfile.TemporaryDirectory(prefix="monosem-interop-") as place:
        link = Path(place) / NAME  # whose path has no family's name in it, which would decide the architecture
        link.symlink_to(Path(folder).resolve())
        known = loading.get_official_model_name

        def official(name: str) -> str:
            return str(link) if name in (NAME, str(link)) else known(name)

        with mock.patch.object(loading, "get_official_model_name", official):
            yield


def sae_bench_core(module: Any, contexts: list[list[int]], out: Path, *, batch: int = 8) -> dict[str, float]:
    """The numbers of SAEBench's `core` on these contexts, all of them once; special tokens keep their activation."""
    from sae_bench.evals.core import main as core
    from sae_lens.training import activations_store

    data = out / "tokens"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in contexts), "utf-8")
    n_batches = len(contexts) // batch
    with mock.patch.object(activations_store, "validate_pretokenized_dataset_tokenizer"):  # asks the hub
        found = core.multiple_evals(
            [("monosem", module)], n_batches, n_batches, eval_batch_size_prompts=batch, dataset=str(data),
            exclude_special_tokens_from_reconstruction=True, compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True, context_size=len(contexts[0]), device="cpu",
            output_folder=str(out / "core"),
        )  # fmt: skip
    assert found, "core logs why it gives up, and goes on"
    (path,) = (out / "core").glob("*.json")
    written = json.loads(path.read_text())["eval_result_metrics"]
    return {name: value for group in written.values() for name, value in group.items()}


def sae_bench_probing(
    module: Any, classes: list[list[str]], out: Path, *, n_train: int, n_test: int, context_length: int = 128
) -> dict[str, float]:
    """The numbers of SAEBench's `sparse_probing` on four classes: `n_train` and `n_test` texts, half of the class."""
    import pandas as pd
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.sae_bench_utils import dataset_utils

    def frame(part: slice) -> Any:
        rows = [{"text": text, "label": label} for label, texts in enumerate(classes) for text in texts[part]]
        return pd.DataFrame(rows)

    halves = {"train": frame(slice(n_train // 2)), "test": frame(slice(n_train // 2, n_train // 2 + n_test // 2))}
    config = SparseProbingEvalConfig(
        dataset_names=[AG_NEWS], probe_train_set_size=n_train, probe_test_set_size=n_test, llm_batch_size=16,
        context_length=context_length, llm_dtype="float32", model_name=NAME, sae_batch_size=32, k_values=[1, 5],
    )  # fmt: skip
    # checked inside its caller, which gave the same names of dimensions to other tensors: beartype 0.23 then refuses
    unchecked = inspect.unwrap(probe_training.train_sklearn_probe)
    with (
        mock.patch.object(dataset_utils, "load_dataset", lambda *_, **__: halves),
        mock.patch.object(probe_training, "train_sklearn_probe", unchecked),
    ):
        found = probing.run_eval(
            config, [("monosem", module)], "cpu", str(out / "probing"), artifacts_path=str(out / "artifacts")
        )
    (result,) = found.values()
    metrics = result["eval_result_metrics"]
    return {**metrics["llm"], **metrics["sae"]}


def sae_probes_run(
    module: Any, hook_name: str, datasets: list[str], out: Path, ks: list[int]
) -> dict[str, list[dict[str, Any]]]:
    """What sae-probes writes about each of its sets, an entry a k."""
    from sae_probes import run_sae_evals

    run_sae_evals(
        sae=module, model_name=NAME, hook_name=hook_name, reg_type="l2", setting="normal", ks=ks, datasets=datasets,
        results_path=out / "sae_probes", model_cache_path=out / "activations", device="cpu",
    )  # fmt: skip
    found = {}
    for dataset in datasets:
        (path,) = (out / "sae_probes").rglob(f"{dataset}_*.json")
        found[dataset] = json.loads(path.read_text())
    return found


def python() -> Path:
    """The interpreter of the environment, made if need be. `InstallError` when that fails."""
    shared = [
        line
        for line in environments.CONSTRAINTS.read_text().splitlines()
        if line.startswith(("torch=", "transformers="))
    ]
    parts = repr((REQUIREMENTS, LONE, BESIDE, shared, sys.version))
    folder = environments.bench_cache() / f"interop-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"
    interpreter, done = folder / "bin" / "python", folder / "installed.json"
    with environments.locked(folder.with_suffix(".lock")):
        if not done.exists():
            logging.info("making the environment in %s (once; downloads may take minutes)", folder)
            venv.create(folder, clear=True, with_pip=True)
            pip: list[str | Path] = [interpreter, "-m", "pip", "--disable-pip-version-check"]
            environments.run([*pip, "install", "-q", *shared, *REQUIREMENTS, *BESIDE])
            # of another build than torch it cannot be imported, and then neither can half of transformers
            environments.run([*pip, "uninstall", "-q", "-y", "torchvision"])
            environments.run([*pip, "install", "-q", "--no-deps", *LONE])
            done.write_text(json.dumps({"requirements": parts}))
    return interpreter


def peers() -> None:
    """Import the two that were installed without their requirements."""
    steps.stub("nnsight")


def environment() -> dict[str, str]:
    """That of the benchmarks' workers, with monosem's source, which is not installed there."""
    found = workers.environment(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return {**found, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}


def compare(run: str, n_contexts: int) -> dict[str, Any]:
    """Versions, and rows (question, ours, theirs, what differs) on the run's autoencoder; runs in the environment."""
    import torch

    from monosem import convert
    from monosem.evals import downstream, probes, reconstruction, tasks
    from monosem.loading import locate
    from monosem.run_folder import open_run
    from monosem.subject import Subject

    opened = open_run(run, None, torch.device("cpu"))
    autoencoder, site = opened.autoencoder, opened.store.site
    subject, folder = Subject.load(site.model, dtype="float32", device="cpu"), locate(site.model, site.revision)[1]
    special = torch.tensor([i for i in subject.tokenizer.all_special_ids if i is not None])
    contexts = opened.store.contexts("held_out")
    plain = (~torch.isin(contexts.tokens, special)).all(1).nonzero()[:, 0][: n_contexts // 8 * 8]
    tokens, documents = contexts.tokens[plain], contexts.documents[plain]
    module = convert.expose(autoencoder, model_name=NAME)
    with tempfile.TemporaryDirectory(prefix="monosem-interop-") as place, subject_named(folder):
        out = Path(place)
        core = sae_bench_core(module, tokens.tolist(), out)
        convert.save_sae_lens(autoencoder, out / "lens", model_name=NAME)
        from sae_lens import SAE

        native = sae_bench_core(SAE.load_from_disk(out / "lens"), tokens.tolist(), out / "native")
        sets = ["119_us_state_TX", "154_athlete_sport_football"]
        probed = sae_probes_run(module, module.cfg.hook_name, sets, out, [1])
        labelled = {task.name: task for task in tasks.sae_probes(sets)}
        kinds = [
            "119_us_state_TX",
            "154_athlete_sport_football",
            "131_temp_cat_Typical Time",
            "125_world_country_Italy",
        ]
        classes = [task.texts[:120] for task in tasks.sae_probes(kinds)]
        bench = sae_bench_probing(module, classes, out, n_train=160, n_test=80, context_length=64)
    numbers = {
        first: {
            m.name: m.value
            for m in downstream.metrics(
                subject, autoencoder, site, tokens, documents, opened.store.mean,
                first_position=first, n_resamples=10, seed=0,
            )
        }
        for first in (0, 1)
    }  # fmt: skip
    raw = torch.cat([subject.capture(part, site) for part in tokens.split(8)]).float()
    rows, counted = raw.flatten(0, 1), raw[:, opened.store.first_position :].flatten(0, 1)
    tally = reconstruction.tally(autoencoder, [counted], torch.zeros(len(counted), dtype=torch.long))
    ours = {m.name: m.value for m in reconstruction.metrics(tally, n_resamples=10, seed=0)}
    recons = autoencoder(rows)
    error = (recons - rows).square().sum(1)
    batches = [slice(start, start + 8 * tokens.shape[1]) for start in range(0, len(rows), 8 * tokens.shape[1])]
    legacy = torch.cat([1 - error[b] / (rows[b] - rows[b].mean(0)).square().sum(1) for b in batches]).mean()
    cosine = torch.nn.functional.cosine_similarity(rows, recons, dim=1).mean()
    by_definition = {  # of theirs: (ours as `monosem eval` reports it, ours by their definition on their tokens)
        "l0": (ours["l0"], ours["l0"]),
        "ce_loss_without_sae": tuple(numbers[first]["ce_original"] for first in (1, 0)),
        "ce_loss_with_sae": tuple(numbers[first]["ce_original"] + numbers[first]["delta_ce"] for first in (1, 0)),
        "ce_loss_score": tuple(numbers[first]["loss_recovered_zero"] for first in (1, 0)),
        "kl_div_with_sae": tuple(numbers[first]["kl"] for first in (1, 0)),
        "cossim": (ours["cosine"], float(cosine)),
        "explained_variance_legacy": (1 - ours["normalized_mse_raw"], float(legacy)),
        "explained_variance": (1 - ours["normalized_mse_raw"], None),
    }
    table = [(name, *pair, core[name], native[name]) for name, pair in by_definition.items()]
    probe_rows = []
    for name in sets:
        _, detail = probes.metrics(subject, autoencoder, site, [labelled[name]], n_resamples=10, seed=0)
        (last,) = (row for row in detail if row["pooling"] == "last")
        theirs = probed[name][0]
        accuracies = last["probe_accuracy"], last["probe_auc"], theirs["test_acc"], theirs["test_auc"]
        probe_rows.append((name, *accuracies))
    about = {"n_latents": autoencoder.config.n_latents, "k": autoencoder.config.k, "layer": site.layer}
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "autoencoder": {"subject": subject.name, **about},
        "n_tokens": tokens.numel(), "core": table, "probes": probe_rows, "sparse_probing": bench,
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The Markdown of a comparison."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    about = found["autoencoder"]
    lines = [
        "# Ours in the packages of others", "",
        f"{about['subject']}, layer {about['layer']}, {about['n_latents']:,} latents, k = {about['k']}. "
        "Made by `python -m benchmarks.interop`; "
        "docs/evaluation.md says what differs.", "",
        ", ".join(f"{name} {number}" for name, number in found["versions"].items()), "",
        f"## SAEBench core, {found['n_tokens']:,} held-out tokens", "",
        "| theirs | monosem eval | ours by their definition | SAEBench, `expose` | SAEBench, `save_sae_lens` |",
        "|---|---|---|---|---|",
        *(f"| {name} | " + " | ".join(map(show, numbers)) + " |" for name, *numbers in found["core"]), "",
        "## sae-probes, one latent, last token", "",
        "| set | our accuracy | our AUC | their accuracy | their AUC |", "|---|---|---|---|---|",
        *(f"| {name} | " + " | ".join(map(show, numbers)) + " |" for name, *numbers in found["probes"]), "",
        "## SAEBench sparse_probing, four kinds of texts", "",
        "| number | value |", "|---|---|",
        *(f"| {name} | {show(value)} |" for name, value in found["sparse_probing"].items() if value is not None), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/demo", help="run folder of the autoencoder")
    parser.add_argument("--contexts", type=int, default=32, help="held-out contexts for core")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.inside:
        found = compare(options.run, options.contexts)
        (Path(options.out) / "interop.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (Path(options.out) / "interop.md").write_text(text(found), "utf-8")
        return 0
    interpreter = python()
    tests = [interpreter, "-m", "pytest", "-q", "tests/test_interop.py"]
    inside = [interpreter, "-m", "benchmarks.interop", "--inside", "--run", options.run, "--out", options.out]
    for command in (tests, [*inside, "--contexts", str(options.contexts)]):
        if code := subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode:
            return code
    print((Path(options.out) / "interop.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
