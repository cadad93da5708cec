"""How fast `monosem serve` is with many latents: start-up, every kind of page and of question, resident memory.

    python -m benchmarks.viewer --n-latents 131072 --out benchmarks/results

makes a run folder of made-up numbers (no model, no training), serves it by the command, and asks as one reader would.
"""

from __future__ import annotations

import argparse
import http.client
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from monosem import artifacts
from monosem.explained import KIND
from monosem.explanations import words

CONTEXT, N_CONTEXTS, N_TOKENS, VOCABULARY = 64, 100_000, 1_000_000, 50_000
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
}


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="monosem-viewer-", dir=options.folder))
    try:
        make_run(folder / "run", options.n_latents)
        report = measure(folder / "run", options.n_latents)
    finally:
        shutil.rmtree(folder)
    name = Path(options.out) / f"viewer-{options.n_latents}"
    artifacts.write_json(name.with_suffix(".json"), report)
    name.with_suffix(".md").write_text(text(report), "utf-8")
    print(text(report))
    return 0


def make_run(run: Path, n: int, n_contexts: int = N_CONTEXTS) -> None:
    """A run folder as `train` and `explain` leave it, of `n` latents and random numbers."""
    rng = np.random.default_rng(0)
    config = {"d_model": 768, "n_latents": n, "k": 32, "activation": "topk"}
    artifacts.write_json(
        run / "autoencoder/config.json", artifacts.manifest("autoencoder", config, {}, provenance={"subject": "none"})
    )
    columns: dict[str, dict[str, object]] = {}

    def column(name: str, array: np.ndarray) -> None:
        (run / "explain").mkdir(exist_ok=True)
        np.save(run / "explain" / f"{name}.npy", array)
        columns[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "meaning": name, "part": "made up"}

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
    facts = {"n_tokens": N_TOKENS, "context_length": CONTEXT, "first_position": 1, "n_quantile_bands": 4}
    computed = {part: {"n_latents": n} for part in ("weights", "activations", "n2g", "words")}
    manifest = artifacts.manifest(KIND, {}, {}, **config, **facts, computed=computed, columns=columns)
    artifacts.write_json(run / "explain/manifest.json", manifest)


def measure(run: Path, n: int) -> dict[str, object]:
    """Milliseconds of every question, after one of its kind; seconds to the first page; MiB at the end."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "monosem", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            port = int(server.stderr.readline().split("127.0.0.1:")[1].split()[0])
            connection = http.client.HTTPConnection("127.0.0.1", port)
            ask(connection, "/")
            start_s = time.perf_counter() - started
            rows = {}
            for name, question in QUESTIONS.items():
                first_ms, _ = ask(connection, *questions(question, n, 1))
                answers = [ask(connection, path) for path in questions(question, n, N_EACH)]
                times = sorted(ms for ms, _ in answers)
                rows[name] = {
                    "first_ms": round(first_ms, 1), "median_ms": round(statistics.median(times), 1),
                    "p90_ms": round(times[int(0.9 * len(times))], 1),
                    "kib": round(statistics.median(size for _, size in answers) / 1024),
                }  # fmt: skip
            status = Path(f"/proc/{server.pid}/status").read_text()
            memory = {key: int(status.split(f"{key}:")[1].split()[0]) // 1024 for key in ("VmRSS", "RssAnon", "VmHWM")}
        finally:
            server.terminate()
    machine = {"cpu": _cpu(), "cpus": len(os.sched_getaffinity(0)), "versions": artifacts.versions()}
    command_line = f"python -m benchmarks.viewer --n-latents {n}"
    facts = {"n_latents": n, "start_s": round(start_s, 2), "memory_mib": memory, "n_each": N_EACH}
    return {"command": command_line, "date": time.strftime("%Y-%m-%d"), **facts, "machine": machine, "questions": rows}


def questions(pattern: str, n: int, count: int) -> Iterator[str]:
    rng = random.Random(pattern)
    for _ in range(count):
        yield pattern.format(
            page=rng.randint(1, n // 50), column=rng.choice(("density", "max", "mean", "skew", "kurtosis")),
            digit=rng.randint(1, 9), token=rng.randint(20_000, VOCABULARY - 1), latent=rng.randrange(n),
        )  # fmt: skip


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[float, int]:
    """Milliseconds until the whole answer was there, and its bytes; `RuntimeError` unless it is a page."""
    started = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    size = len(answer.read())
    if answer.status not in (200, 307):
        raise RuntimeError(f"{path}: {answer.status}")
    return 1000 * (time.perf_counter() - started), size


def text(report: dict) -> str:  # type: ignore[type-arg]
    memory, machine = report["memory_mib"], report["machine"]
    lines = [
        f"{report['n_latents']:,} latents, made-up numbers; `{report['command']}`, {report['date']}, "
        f"{machine['cpus']} CPUs ({machine['cpu']}), Python {machine['versions']['python']}.",
        "",
        f"From the command to the first page: {report['start_s']} s. Resident memory after all of it: "
        f"{memory['VmRSS']} MiB ({memory['RssAnon']} MiB of its own, the rest mapped files), "
        f"at most {memory['VmHWM']} MiB.",
        "",
        "| question | median, ms | 90%, ms | first, ms | KiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in report["questions"].items():
        lines.append(f"| {name} | {row['median_ms']} | {row['p90_ms']} | {row['first_ms']} | {row['kib']} |")
    return "\n".join(lines) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewer", description=__doc__)
    parser.add_argument("--n-latents", type=int, default=131_072)
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").exists() else None, help="for 1.3 GB")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the report")
    return parser.parse_args()


def _cpu() -> str:
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    raise SystemExit(main())
