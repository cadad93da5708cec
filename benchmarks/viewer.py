"""How fast `monosem serve` is with many latents: start-up, every kind of page and of question, resident memory.

    python -m benchmarks.viewer --n-latents 131072 --out benchmarks/results

makes a run folder of made-up numbers (no training) and another to compare it with, serves it by the command, and asks
as one reader would. Texts are tried on the real default subject, which is downloaded unless it is in the cache;
--subject '' leaves that out.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import report
from monosem import artifacts
from monosem.explained import KIND
from monosem.explanations import words
from monosem.explanations.store import ColumnWriter

CONTEXT, N_CONTEXTS, N_TOKENS, VOCABULARY = 64, 100_000, 1_000_000, 50_000
NORMALIZATION = {"kind": "per-token mean and unbiased std over d_model", "epsilon": 1e-5}
SUBJECT, LAYER, D_MODEL = "smollm2-135m-instruct-q4_1", 22, 576
SITE = {"model": SUBJECT, "revision": None, "layer": LAYER, "location": "resid_post_mlp"}
TEXT = "When the mice are at rest, the cat sleeps in the warm kitchen; the dog waits at the door for"
EXAMPLES = {"top": 20, "random": 10, "quantile": 20}
N_EACH = 30
QUESTIONS = {
    "overview": "/",
    "map, colour by skew": "/api/v1/map?colour=skew",
    "table": "/latents?page={page}",
    "table, sorted": "/latents?sort={column}&order=desc&page={page}",
    "table, filtered and sorted": "/latents?sort=mean&min_density=0.{digit}e-3&max_max=2{digit}",
    "search, rare words": "/latents?q=w{token}",
    "search, a word of every latent": "/latents?q=w1",
    "latent": "/latents/{latent}",
    "latent, in the order of a table": "/latents/{latent}?sort={column}&min_density=1e-4",
    "random latent": "/latents/random",
    "scaling, without any": "/scaling",
    "try, the page": "/try",
}
COMPARED = {
    "compare": "/compare?with=other&page={page}",
    "compare, without a match": "/compare?with=other&side=b&show=alone&order=cosine&page={page}",
}
"""Asked once the matches are there."""


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="monosem-viewer-", dir=options.folder))
    try:
        make_run(folder / "run", options.n_latents)
        make_other(folder / "run", folder / "other")
        found = measure(folder / "run", options.n_latents, options.subject)
    finally:
        shutil.rmtree(folder)
    name = Path(options.out) / f"viewer-{options.n_latents}"
    artifacts.write_json(name.with_suffix(".json"), found)
    name.with_suffix(".md").write_text(text(found), "utf-8")
    print(text(found))
    return 0


def make_run(run: Path, n: int, n_contexts: int = N_CONTEXTS) -> None:
    """A run folder as `train` and `explain` leave it, of `n` latents and random numbers."""
    rng = np.random.default_rng(0)
    config = {"d_model": D_MODEL, "n_latents": n, "k": 32, "activation": "topk"}
    make_autoencoder(run / "autoencoder", config, rng)
    writer = ColumnWriter(run / "explain")
    writer.part = "made up"

    def column(name: str, array: np.ndarray) -> None:
        writer.write(name, array, name)

    for name in ("density", "max", "mean", "mean_square", "skew", "kurtosis", "n2g_recall", "n2g_precision"):
        column(name, rng.lognormal(-7 if name == "density" else 1, 1.5, n).clip(0, 99).astype(np.float32))
    column("histogram", rng.integers(0, 1000, (n, 33), dtype=np.uint32))
    column("histogram_edges", np.r_[0, np.geomspace(0.01, 1000, 32)].astype(np.float32))
    for kind, each in EXAMPLES.items():
        column(f"{kind}_context", rng.integers(0, n_contexts, (n, each), dtype=np.int32))
        column(f"{kind}_position", rng.integers(1, CONTEXT, (n, each), dtype=np.int16))
        few = rng.random((n, each, CONTEXT), dtype=np.float32)
        column(f"{kind}_activations", np.where(few > 0.9, few * 9, 0).astype(np.float16))
    for name in ("contexts", "contexts_document", "contexts_position"):
        zipf = (VOCABULARY ** rng.random((n_contexts, CONTEXT))).astype(np.int32) - 1
        column(name, zipf)
    for name, score in (("decoder_neighbours", "decoder_cosines"), ("coactivation_neighbours", "coactivation_scores")):
        column(name, rng.integers(0, n, (n, 10), dtype=np.int32))
        column(score, rng.random((n, 10), dtype=np.float32))
    for side in ("up", "down"):
        column(f"lens_{side}", rng.integers(0, VOCABULARY, (n, 10), dtype=np.int32))
        column(f"lens_{side}_values", rng.random((n, 10), dtype=np.float32))
    artifacts.write_json(run / "explain/vocabulary.json", [f" w{i}" for i in range(VOCABULARY)])
    words.write(run / "explain", n, {i: [((i % VOCABULARY, -1, 7), 1.5), ((3,), 0.5)] for i in range(0, n, 8)})
    for name in ("vocabulary.json", words.FILE):
        writer.keep(name)
    facts: dict[str, Any] = {
        "subject": SUBJECT,
        "site": SITE,
        "n_tokens": N_TOKENS,
        "n_contexts": n_contexts,
        "context_length": CONTEXT,
        "first_position": 1,
        "n_quantile_bands": 4,
        "probe_tasks": [],
        "columns": writer.columns,
        "files": writer.files,
        "computed": {
            part: {"n_latents": n, "seconds": 0.0, "of": {}} for part in ("weights", "activations", "n2g", "words")
        },
        "failed": {},
    }
    write_manifest(run, {**config, **facts})


def write_manifest(run: Path, facts: dict[str, Any]) -> None:
    """The manifest of an explanation with these facts, of the run's autoencoder."""
    sources = {"autoencoder": artifacts.sha256_file(run / "autoencoder/config.json"), "store": "none"}
    settings = {"n_tokens": N_TOKENS, "n2g": 0, "ablations": 0, "seed": 0}
    artifacts.write_json(run / "explain/manifest.json", artifacts.manifest(KIND, settings, sources, **facts))


def make_autoencoder(folder: Path, config: dict[str, Any], rng: np.random.Generator) -> None:
    """Random weights, released as of the real subject, decoder rows of norm 1."""
    shape = config["n_latents"], config["d_model"]
    decoder = rng.standard_normal(shape, dtype=np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    bias = {"latent_bias": np.zeros(shape[0], np.float32), "pre_bias": np.zeros(shape[1], np.float32)}
    folder.mkdir(parents=True)
    save_file({"encoder": decoder, "decoder": decoder.copy(), **bias}, folder / "autoencoder.safetensors")
    sha256 = artifacts.sha256_file(folder / "autoencoder.safetensors")
    facts = {"normalization": NORMALIZATION, "weights_sha256": sha256, "provenance": {"site": SITE, "subject": SUBJECT}}
    artifacts.write_json(folder / "config.json", artifacts.manifest("autoencoder", config, {}, **facts))


def make_other(run: Path, other: Path) -> None:
    """A run with the same explanation and other weights."""
    shutil.copytree(run / "explain", other / "explain", copy_function=os.link)
    config = artifacts.read_json(run / "autoencoder/config.json")["config"]
    make_autoencoder(other / "autoencoder", config, np.random.default_rng(1))
    explained = artifacts.read_json(run / "explain/manifest.json")
    usual = {"kind", "format", "config", "sources", "versions", "seal"}
    write_manifest(other, {name: value for name, value in explained.items() if name not in usual})


def measure(run: Path, n: int, subject: str) -> dict[str, Any]:
    """Milliseconds of every question, after one of its kind; seconds to the first page; MiB at the end."""
    rows: dict[str, Any] = {}
    with serving(run) as (pid, connection, start_s):
        rows |= {name: timed(connection, question, n) for name, question in QUESTIONS.items()}
        pages_mib = memory_mib(pid)
        first_match_s = ask(connection, "/api/v1/compare?with=other")[0] / 1000
        rows |= {name: timed(connection, question, n) for name, question in COMPARED.items()}
        compared_mib = memory_mib(pid)
    with serving(run) as (pid, connection, _):
        kept_match_s = ask(connection, "/api/v1/compare?with=other")[0] / 1000
        kept_mib = memory_mib(pid)
        loading_s, tried_mib = None, None
        if subject:
            loading_s = ask(connection, "/api/v1/try")[0] / 1000
            rows["try, 22 tokens"] = summarized([ask(connection, "/api/v1/try", {"text": TEXT}) for _ in range(N_EACH)])
            edited = {"text": TEXT, "edits": [{"latent": 7, "kind": "ablate"}]}
            rows["try, one latent ablated"] = summarized(
                [ask(connection, "/api/v1/try", edited) for _ in range(N_EACH)]
            )
            tried_mib = memory_mib(pid)
    machine = report.machine(report.available_cpus(), f"python -m benchmarks.viewer --n-latents {n}")
    scheduler = "real-time" if os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO) else "ordinary"
    facts = {
        "n_latents": n, "n_each": N_EACH, "load_average": os.getloadavg()[0], "start_s": round(start_s, 2),
        "first_match_s": round(first_match_s, 1), "kept_match_s": round(kept_match_s, 2),
        "loading_s": loading_s and round(loading_s, 1),
        "memory_mib": {"pages": pages_mib, "compared": compared_mib, "kept": kept_mib, "tried": tried_mib},
    }  # fmt: skip
    return {"machine": machine, "scheduler": scheduler, **facts, "questions": rows}


@contextlib.contextmanager
def serving(run: Path) -> Iterator[tuple[int, http.client.HTTPConnection, float]]:
    """The command's process, a connection to it, and seconds until its first page was there."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "monosem", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            port = int(server.stderr.readline().split("127.0.0.1:")[1].split()[0])
            connection = http.client.HTTPConnection("127.0.0.1", port)
            ask(connection, "/")
            yield server.pid, connection, time.perf_counter() - started
        finally:
            server.terminate()


def memory_mib(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {key: int(status.split(f"{key}:")[1].split()[0]) // 1024 for key in ("VmRSS", "RssAnon", "VmHWM")}


def timed(connection: http.client.HTTPConnection, question: str, n: int) -> dict[str, float]:
    return summarized([ask(connection, path) for path in questions(question, n, 1 + N_EACH)])


def summarized(answers: list[tuple[float, int]]) -> dict[str, float]:
    """The first apart, then median and 90th percentile of the others."""
    times = sorted(ms for ms, _ in answers[1:])
    return {
        "first_ms": round(answers[0][0], 1), "median_ms": round(statistics.median(times), 1),
        "p90_ms": round(times[int(0.9 * len(times))], 1),
        "kib": round(statistics.median(size for _, size in answers) / 1024),
    }  # fmt: skip


def questions(pattern: str, n: int, count: int) -> Iterator[str]:
    rng = random.Random(pattern)
    for _ in range(count):
        yield pattern.format(
            page=rng.randint(1, n // 50), column=rng.choice(("density", "max", "mean", "skew", "kurtosis")),
            digit=rng.randint(1, 9), token=rng.randint(20_000, VOCABULARY - 1), latent=rng.randrange(n),
        )  # fmt: skip


def ask(connection: http.client.HTTPConnection, path: str, sent: dict[str, Any] | None = None) -> tuple[float, int]:
    """Milliseconds until the whole answer was there, and its bytes; `RuntimeError` unless it is a page."""
    started = time.perf_counter()
    if sent is None:
        connection.request("GET", path)
    else:
        origin = f"http://{connection.host}:{connection.port}"
        connection.request("POST", path, json.dumps(sent), {"origin": origin, "content-type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    if answer.status not in (200, 307):
        raise RuntimeError(f"{path}: {answer.status} {said[:300]!r}")
    return 1000 * (time.perf_counter() - started), len(said)


def text(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    machine, memory = found["machine"], found["memory_mib"]

    def mib(name: str) -> str:
        return f"{memory[name]['VmRSS']} MiB ({memory[name]['RssAnon']} of its own, the rest mapped files)"

    lines = [
        f"{found['n_latents']:,} latents, made-up numbers; `{machine['command']}`, {machine['date']}, "
        f"commit {machine['commit']}, {machine['cpus']} CPUs: {machine['cpu']}, "
        f"Python {machine['versions']['python']}, {found['scheduler']} scheduling.",
        "",
        f"From the command to the first page: {found['start_s']} s. Resident after all but comparing: {mib('pages')}.",
        "",
        f"Matching all latents with those of another run of as many takes {found['first_match_s']} s the first time "
        f"(load average of the machine {found['load_average']:.1f}), with at most {memory['compared']['VmHWM']} MiB "
        f"resident; {mib('compared')} after it. A server started later reads the matches in {found['kept_match_s']} s: "
        f"{mib('kept')}.",
        "",
        *(
            [f"Loading the subject takes {found['loading_s']} s; resident with it: {mib('tried')}.", ""]
            if found["loading_s"] is not None
            else []
        ),
        "| question | median, ms | 90%, ms | first, ms | KiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in found["questions"].items():
        lines.append(f"| {name} | {row['median_ms']} | {row['p90_ms']} | {row['first_ms']} | {row['kib']} |")
    return "\n".join(lines) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewer", description=__doc__)
    parser.add_argument("--n-latents", type=int, default=131_072)
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").exists() else None, help="for 2.6 GB")
    parser.add_argument("--subject", default=SUBJECT, choices=[SUBJECT, ""], help="on which texts are tried")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
