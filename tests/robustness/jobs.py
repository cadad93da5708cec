"""The commands of the campaign, what each needs and leaves, and the folder they start from, all on a tiny model."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
from robustness import forks

TABLE = Path(__file__).parents[2] / "results/smollm2-135m-instruct-q4_1/lab/joint/runs.csv"
MODEL = ["--model", "model", "--device", "cpu"]
HARVEST: dict[str, Any] = {"corpus": "corpus.jsonl", "context-length": 16, "n-tokens": 1500, "n-tokens-held-out": 400}
HARVEST |= {"held-out-fraction": 0.2, "dtype": "float32", "block-contexts": 8, "shard-blocks": 4}
TRAIN = {"n-latents": 64, "k": 4, "n-tokens": 2000, "batch-size": 100, "impl": "torch", "device": "cpu"}
TRAIN |= {"log-every-steps": 2}
EVAL = {"n-tokens-downstream": 128, "n-bootstrap": 20, "device": "cpu"}
SWEEP = {"grid": "grid.json", "store": "store", "eval-every": 400, "eval-tokens": 100, "n-bootstrap": 20}
EXPLAIN = ["explain", "run", "--store", "store", "--n2g", "3", "--ablations", "2", "--device", "cpu"]
AUTOENCODER = ("run/train.json", "run/metrics.jsonl", "run/state", "run/autoencoder")
EVALUATED = ("run/eval.json", "run/eval")
PAGES = (
    *("/", "/latents", "/latents?q=the", "/latents?sort=max&order=desc", "/latents/3", "/latents/9?show=quantile"),
    *("/scaling", "/try", "/compare?with=two", "/api/v1/run", "/api/v1/map?colour=max", "/api/v1/latents?q=th"),
    *("/api/v1/latents/3", "/api/v1/notes", "/api/v1/scaling", "/api/v1/compare?with=two"),
)

WARM = (
    *("cli", "convert", "evals.report", "explanations.entry", "export.sae_viewer", "export.site", "export.table"),
    *("main_job", "scaling", "sweeps", "viewer.live"),
)
"""Modules of monosem that commands import when they are asked for."""
OTHERS = ("pyarrow.parquet", "scipy.optimize", "scipy.stats", "starlette.testclient", "tyro", "transformers")

VOLATILE = frozenset(
    {"seconds", "elapsed_s", "work", "kernel_s", "wall_s", "product_s", "product_share", "evaluation_s", "saving_s"}
    | {"evaluating_s", "starting_s", "waiting_s", "ratio", "date", "seal", "memory", "commit"}
)
"""Names of what may differ between two runs of a command: seconds, dates, and the seals of files that have them."""


class Job(NamedTuple):
    """A command."""

    name: str
    words: list[str]
    """Of the command line; empty: `pages`."""
    needs: tuple[str, ...]
    """Files and folders that stages before it have left, and that must be as they were left."""
    outs: tuple[str, ...]
    """What it leaves."""
    user: tuple[str, ...] = ()
    """What people give it, of which no earlier state is known."""
    resumes: bool = True
    """Whether the same command goes on from what a killed one has left, or uses again what is done."""
    rewrites: bool = False
    """Whether it makes everything anew each time."""
    weight: float = 1
    """How often it is drawn."""

    def call(self) -> Callable[[], int]:
        return pages if not self.words else lambda: _command(self.words)

    def with_words(self, words: list[str]) -> Job:
        return self._replace(words=words)


def flags(values: dict[str, Any], stage: str = "") -> list[str]:
    """As words of a command line; of a stage of `monosem run`."""
    return [word for name, value in values.items() for word in (f"--{stage}{name}", str(value))]


_STAGES = [*flags({"model": "model", "device": "cpu", **HARVEST}, "harvest."), *flags(TRAIN, "train.")]
_EXPLAINED = (*AUTOENCODER, "run/explain")

JOBS: tuple[Job, ...] = (
    Job("harvest", ["harvest", "--out", "store", *MODEL, *flags(HARVEST)], (), ("store",), ("model", "corpus.jsonl")),
    Job("train", ["train", "--out", "run", "--store", "store", "--save-every-s", "0", *flags(TRAIN)],
        ("store",), AUTOENCODER),
    Job("eval", ["eval", "run", "--store", "store", *flags(EVAL)], ("model", "store", *AUTOENCODER), EVALUATED),
    Job("explain", EXPLAIN, ("model", "store", *AUTOENCODER), ("run/explain",)),
    Job("probe", [*EXPLAIN, "--tasks", "tasks"], ("model", "store", *AUTOENCODER), ("run/explain",), ("tasks",)),
    Job("sweep", ["sweep", "--out", "many", "--save-every-s", "0", *flags(SWEEP)],
        ("store",), ("many",), ("grid.json",)),
    Job("scale", ["scale", "laws", "--no-figures", "--families", "families.json"], (), ("laws/scaling.json",),
        ("laws/runs.csv", "families.json"), rewrites=True, weight=0.3),
    Job("plan", ["plan", "--scaling", "laws/scaling.json", "--k", "32", "--flops", "1e14", "--memory-gib", "8",
        "--out", "prediction.json"], ("laws/scaling.json",), ("prediction.json",)),
    Job("check", ["plan", "--check", "prediction.json", "--table", "laws/runs.csv"], ("prediction.json",), (),
        ("laws/runs.csv",), resumes=False),
    Job("run", ["run", "--out", "all", *_STAGES, *flags(EVAL, "eval.")], (), ("all",), ("model", "corpus.jsonl")),
    Job("site", ["export", "run", "site", "--latents", "3,9"], (*_EXPLAINED, *EVALUATED), ("site",), rewrites=True),
    Job("parquet", ["export", "run", "--parquet", "latents.parquet"], _EXPLAINED, ("latents.parquet",), rewrites=True),
    Job("sae-viewer", ["export", "run", "--sae-viewer", "atoms", "--latents", "8"], _EXPLAINED, ("atoms",),
        rewrites=True),
    Job("report", ["eval", "run", "two", "--store", "store", *flags(EVAL), "--report", "page.html"],
        ("model", "store", "two", *AUTOENCODER, *EVALUATED), ("page.html", "page.md"), rewrites=True),
    Job("pages", [], (*_EXPLAINED, *EVALUATED, "two", "laws/scaling.json"), ("answers.json",), ("run/notes.sqlite",),
        resumes=False, weight=2),
    Job("convert", ["convert"], (), ("converted.json",), ("sae_lens",), resumes=False, weight=0.5),
)  # fmt: skip
BY_NAME = {job.name: job for job in JOBS}


def _command(words: list[str]) -> int:
    if words == ["convert"]:
        return convert()
    from monosem import cli

    return cli.main(words)


def warm() -> None:
    """Import here what the commands import, so that every fork has it; with a single thread, as forks need it."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for name in (*(f"monosem.{name}" for name in WARM), *OTHERS):
        importlib.import_module(name)
    assert importlib.import_module("transformers").LlamaForCausalLM  # which imports it


def pages() -> int:
    """Ask the viewer for pages and data of the run, and leave the answers."""
    from starlette.testclient import TestClient

    from monosem.viewer import web
    from monosem.viewer.server import application

    host = "http://127.0.0.1:8765"
    try:
        site = web.Site(Path("run"), Path("laws"), others=[Path("two")])
    except (ValueError, OSError) as error:
        return _refused(error)
    client = TestClient(application(site), host, headers={"origin": host}, raise_server_exceptions=False)
    answers = {}
    for address in PAGES:
        answer = client.get(address)
        answers[address] = [answer.status_code, answer.text]
    Path("answers.json").write_text(json.dumps(answers), "utf-8")
    return 0


def convert() -> int:
    """Take SAELens's folder as ours and encode something; a `ValueError` is told as the command line tells it."""
    import torch

    from monosem.convert import load_sae_lens

    try:
        found = load_sae_lens("sae_lens")
        x = torch.linspace(-1, 1, 5 * tiny.D_MODEL).reshape(5, tiny.D_MODEL)
        values = found.encode(found.normalize(x)[0]).values
        Path("converted.json").write_text(json.dumps([type(found).__name__, *values.shape, float(values.sum())]))
    except (ValueError, OSError) as error:
        return _refused(error)
    return 0


def _refused(error: Exception) -> int:
    """Told as the command line tells it."""
    print(f"monosem: error: {' '.join(str(error).split())}", file=forks.sys.stderr)
    return 2


class World:
    """What every trial starts from: `done` (all stages finished) and `half/JOB` (the job's outs when it was killed).

    Everything runs in one folder, `trial`, as names of folders are in some of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.done, self.trial = folder, folder / "done", folder / "trial"
        self.half: dict[str, Path] = {}
        self.n_events: dict[str, int] = {}
        """By job, as the next two."""
        self.stdout: dict[str, str] = {}
        self.after: dict[str, dict[str, str]] = {}
        """A snapshot of the job's outs."""

    def make(self) -> None:
        """Run every job once undisturbed, and once killed at two thirds. `RuntimeError` when one fails."""
        os.environ["MONOSEM_CACHE"] = str(self.folder / "cache")
        self.done.mkdir(parents=True)
        (self.folder / "elsewhere").mkdir()
        forks.run(_write_model, self.done)
        self._write_inputs()
        for job in JOBS:
            self._run(job)
            if job.name == "train":
                self._run_beside(
                    ["train", "--out", "two", "--store", "store", "--seed", "1", *flags(TRAIN)], ("store",)
                )
                self._run_beside(["eval", "two", "--store", "store", *flags(EVAL)], ("store", "model", "two"))
                forks.run(_write_sae_lens, self.done)
            if job.resumes:
                self._halve(job)
        remove(self.trial)

    def _run(self, job: Job) -> None:
        self.set_up(job, "fresh")
        found = forks.run(job.call(), self.trial)
        if found.code:
            raise RuntimeError(f"{job.name} does not even run undisturbed ({found.code}): {found.stderr[-2000:]}")
        self.n_events[job.name], self.stdout[job.name] = found.n_events, plain(found.stdout)
        self.after[job.name] = snapshot(self.trial, job.outs)
        for name in job.outs if job.name != "probe" else ():
            copy(self.trial / name, self.done / name)

    def _run_beside(self, words: list[str], needs: tuple[str, ...]) -> None:
        """A second run of the world, that is no trial."""
        job = Job("two", words, needs, ("two",))
        self.set_up(job, "fresh")
        forks.run(job.call(), self.trial)
        copy(self.trial / "two", self.done / "two")

    def _halve(self, job: Job) -> None:
        self.set_up(job, "fresh")
        forks.run(job.call(), self.trial, forks.Disturbance(self.n_events[job.name] * 2 // 3 + 1, signal.SIGKILL))
        self.half[job.name] = self.folder / "half" / job.name
        for name in job.outs:
            copy(self.trial / name, self.half[job.name] / name)

    def set_up(self, job: Job, state: str) -> None:
        """In `trial`, alone: what the job needs, and its outs as in `state`: fresh (none), half or done."""
        remove(self.trial)
        self.trial.mkdir(parents=True)
        for name in (*job.needs, *job.user):
            copy(self.done / name, self.trial / name)
        source = {"half": self.half.get(job.name), "done": self.done}.get(state)
        for name in job.outs:
            if source is not None:
                copy(source / name, self.trial / name)

    def _write_inputs(self) -> None:
        tiny.tiny_corpus(self.done)
        base = {"n_tokens": 1000, "batch_size": 100, "impl": "torch", "device": "cpu", "n_latents": 48}
        (self.done / "grid.json").write_text(json.dumps({"base": base, "grid": {"k": [2, 4]}}))
        copy(TABLE, self.done / "laws/runs.csv")
        families = {"SmolLM2-135M-Instruct, Q4_1, de-quantised": {"family": "SmolLM2", "parameters": 135e6}}
        (self.done / "families.json").write_text(json.dumps(families))
        rows = [f"the {w} was near {i * 7919 % 97} houses,{w}" for i in range(40) for w in ("stand", "boring")]
        (self.done / "tasks").mkdir()
        (self.done / "tasks/words.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def _write_model() -> int:
    tiny.tiny_lm("model")
    return 0


def _write_sae_lens() -> int:
    from monosem.convert import save_sae_lens
    from monosem.model import Autoencoder

    save_sae_lens(Autoencoder.load("run/autoencoder"), "sae_lens")
    return 0


def copy(source: Path, target: Path) -> None:
    """A file or folder, if it is there."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """All regular files of these files and folders, sorted; locks are nobody's."""
    found = [
        p for name in names for p in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
    ]
    return sorted({p for p in found if p.is_file() and p.name != ".lock"})


def snapshot(folder: Path, names: tuple[str, ...], but: frozenset[str] = frozenset()) -> dict[str, str]:
    """By relative path a digest of each file, without what may differ between two runs and fields named in `but`."""
    return {str(path.relative_to(folder)): digest(path, but) for path in files(folder, names)}


def digest(path: Path, but: frozenset[str] = frozenset()) -> str:
    """Hex sha256 of the file's bytes, or of what it says but for VOLATILE and fields named in `but`."""
    data = path.read_bytes()
    try:
        if path.suffix == ".json" and path.name != "answers.json":
            data = json.dumps(_stable(json.loads(data), but), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            data = b"\n".join(json.dumps(_stable(json.loads(line), but)).encode() for line in data.splitlines())
        elif path.name == "runs.csv":
            data = _stable_table(data.decode()).encode()
        elif path.suffix in (".html", ".md", ".js"):
            data = plain(data.decode()).encode()
    except (ValueError, RecursionError):
        pass
    return hashlib.sha256(data).hexdigest()


def plain(text: str) -> str:
    """Without seconds and dates."""
    text = re.sub(r"\bseconds: .*", "", text)
    return re.sub(r"20\d\d-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?|\b[\d.,]+ (s|seconds|min|hours|h)\b", "", text)


def _stable(data: Any, but: frozenset[str]) -> Any:
    if isinstance(data, dict):
        rows = {name for name in ("metrics", "rows") if isinstance(data.get(name), dict) and "sha256" in data[name]}
        return {name: _stable(value, but) for name, value in data.items() if name not in VOLATILE | rows | but}
    return [_stable(value, but) for value in data] if isinstance(data, list) else data


def _stable_table(text: str) -> str:
    import csv
    import io

    rows = list(csv.reader(io.StringIO(text)))
    keep = [i for i, name in enumerate(rows[0]) if name not in VOLATILE] if rows else []
    return json.dumps([[row[i] if i < len(row) else None for i in keep] for row in rows])
