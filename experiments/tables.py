"""Write the tables of README.md and of pages of docs/ from the committed files under results/.

    python experiments/tables.py keep runs/demo     copy a demo run's numbers into results/
    python experiments/tables.py                    fill every <!-- table NAME --> ... <!-- end --> block

A table is never typed in: change the results file by its command and run this again.
"""

from __future__ import annotations

import csv
import datetime
import functools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path("results/smollm2-135m-instruct-q4_1")
PAGES = (Path("README.md"), Path("docs/reproduce.md"), Path("docs/performance.md"), Path("docs/robustness.md"))
BENCHMARK = Path("benchmarks/results/train-cpu.csv")
ROBUSTNESS = Path("results/robustness/report.json")
BENCHMARKS = {"AMX": BENCHMARK, "AVX-512": BENCHMARK.parent / "avx512" / BENCHMARK.name}
"""By the instructions that our kernels could use."""
STAGES = ("fetch", "harvest", "train", "evaluate", "explain", "total")
LEVELS = {
    "amx": "AMX",
    "avx512": "AVX-512",
    "avxvnni": "AVX2 with VNNI",
    "avx2": "AVX2",
    "portable": "no vector unit known",
    "torch": "not compiled",
}
"""Of the compiled kernels, for people."""

Row = dict[str, str]


def keep(run: Path) -> None:
    """Copy eval.json's numbers of `run`."""
    report = json.loads((run / "eval.json").read_text())
    found = {name: report[name] for name in ("run", "metrics", "histograms", "config", "versions")}
    found["run"].pop("store", None)  # a path of the machine it ran on
    path = RESULTS / "demo.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"commit": commit, "date": datetime.date.today().isoformat()}
    path.write_text(json.dumps({**found, **facts}, indent=2) + "\n")


def demo() -> str:
    """Every number of the demo, with its interval."""
    found = json.loads((RESULTS / "demo.json").read_text())
    rows = [
        [f"`{name}`", f"{m['value']:.4g}", f"[{m['low']:.4g}, {m['high']:.4g}]", f"{m['n']:,}", m["unit"]]
        for name, m in found["metrics"].items()
    ]
    run = found["run"]
    epochs = run["tokens_seen"] / run["distinct_tokens"]
    title = (
        f"{run['subject']}, layer {run['site']['layer']} {run['site']['location']}; "
        f"{run['n_latents']:,} latents, k = {run['k']}; "
        f"{run['tokens_seen']:,} token-visits of {run['distinct_tokens']:,} distinct tokens ({epochs:.2f} epochs). "
        f"Commit {found['commit']}, {found['date']}, torch {found['versions']['torch']}."
    )
    return f"{title}\n\n" + markdown(["metric", "value", "95% interval", "n", "unit"], rows)


def seconds() -> str:
    """Seconds of each stage of the demo, the median of the runs of a kind of machine at its latest commit."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in json.loads((RESULTS / "demo-times.json").read_text()):
        machine = run["machine"]
        limited = (
            ", held to it" if {"ONEDNN_MAX_CPU_ISA", "MONOSEM_NATIVE_LEVEL"} & machine["environment"].keys() else ""
        )
        instructions = f"{LEVELS[machine['kernels']]}{limited}"
        kind = instructions, machine["cpu"], str(machine["threads"]), run["subject_dtype"]
        same = [old for old in kinds.get(kind, []) if old["commit"] == run["commit"]]
        kinds[kind] = [*same, run]
    rows = []
    for (instructions, cpu, threads, dtype), runs in kinds.items():
        times = [[run["seconds"][stage] for run in runs] for stage in STAGES]
        shown = [f"{statistics.median(t):.0f}" if None not in t else "not measured" for t in times]
        rows.append([instructions, cpu, threads, dtype, *shown, str(len(runs)), runs[-1]["commit"]])
    return markdown(["instructions", "CPU", "cores", "subject in", *STAGES, "runs", "commit"], rows)


def speed() -> str:
    """A training step beside other libraries': times as fast as the fastest of them, at each size."""
    columns: list[str] = []
    cells: dict[str, dict[str, str]] = {}
    for level, path in BENCHMARKS.items():
        with open(path, newline="") as file:
            found = [row for row in csv.DictReader(file) if "+" not in row["impl"]]
        for r in found:
            column = f"{level}, n_latents {int(r['n_latents']):,}, batch {int(r['batch']):,}"
            name = r["impl"] + (" (fastest peer)" if r["impl"] == r["fastest_peer"] else "")
            cell = r["status"] if r["status"] != "ok" else f"{float(r['ms_median']):.0f} ms, "
            cell += "" if r["status"] != "ok" else f"{float(r['speedup_vs_fastest_peer']):.2g} ×"
            cells.setdefault(name, {}).setdefault(column, cell)
            columns += [] if column in columns else [column]
    return markdown(["", *columns], [[name, *(by.get(c, "") for c in columns)] for name, by in cells.items()])


def floors() -> str:
    """Share of the floor and cost of AuxK of our compiled steps, by the instructions that they may use."""
    rows = []
    for level, path in BENCHMARKS.items():
        with open(path, newline="") as file:
            found = [r for r in csv.DictReader(file) if r["impl"].startswith("native") and r["n_latents"] == "16384"]
        for r in found:
            cost = f"+{100 * float(r['cost_of_variant']):.0f}%" if r["cost_of_variant"] else ""
            floor = f"{float(r['floor_ms']):.0f}", f"{100 * float(r['fraction_of_floor']):.0f}%"
            rows.append([level, r["impl"], f"{float(r['ms_median']):.0f}", *floor, cost])
    return markdown(["instructions", "", "ms a step", "floor, ms", "share of the floor", "over the plain step"], rows)


def impl() -> str:
    """Seconds of a training of the demo's size with each implementation of the kernels, step by step in turn."""
    found = lab_runs("impl")
    fastest = min(float(r["kernel_s"]) for r in found)
    rows = [
        [r["impl"], f"{float(r['kernel_s']):.0f}", f"{float(r['kernel_s']) / fastest:.1f}", *lab_quality(r)]
        for r in found
    ]
    return markdown(["impl", "seconds", "times the fastest", *LAB_QUALITY], rows)


def lab_runs(sweep: str) -> list[Row]:
    """The last row of each run of a sweep of the laboratory."""
    return [r for r in lab_rows(sweep) if r["finished"] == "true"]


def lab_learning_rates() -> str:
    """NMSE by lr at the smallest and the largest n, beside what the 1/sqrt(n) rule says."""
    rows = []
    for r in sorted(lab_runs("lr"), key=lambda r: (int(r["n_latents"]), float(r["lr"]))):
        rule = 2.8e-3 * math.sqrt(4096 / int(r["n_latents"]))
        mark = "the rule" if math.isclose(float(r["lr"]), rule) else f"{float(r['lr']) / rule:g} × the rule"
        rows.append([f"{int(r['n_latents']):,}", f"{float(r['lr']):g}", mark, *lab_quality(r)])
    return markdown(["n_latents", "lr", "", *LAB_QUALITY], rows)


def lab_joint() -> str:
    """Held-out NMSE of every (n_latents, k) at the tokens of the joint law."""
    tokens = str(lab_joint_law()["at"]["tokens"])
    rows_at = [r for r in lab_rows("joint") if r["tokens"] == tokens]
    found = {(int(r["n_latents"]), int(r["k"])): float(r["normalized_mse"]) for r in rows_at}
    sizes, ks = sorted({n for n, _ in found}), sorted({k for _, k in found})
    rows = [[f"{n:,}", *(f"{found[n, k]:.3f}" if (n, k) in found else "" for k in ks)] for n in sizes]
    return markdown(["n_latents", *(f"k = {k}" for k in ks)], rows)


def lab_joint_law() -> dict[str, Any]:
    return lab_laws("joint")["joint"]


def lab_law() -> str:
    """The joint law fitted to the laboratory's table, beside the paper's for GPT-4."""
    law = lab_joint_law()
    paper = {"alpha": -0.50, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.32, "eta": -0.085}
    rows = [
        [f"`{name}`", f"{c['value']:.3g}", f"[{end(c['low'])}, {end(c['high'])}]", f"{paper[name]:g}"]
        for name, c in law["coefficients"].items()
    ]
    facts = f"{law['law']}, {law['n_runs']} runs, error of ln NMSE on left-out runs {law['held_out_error']:.3g}. "
    verdict = f"Claim ({law['claim']}): {law['verdict']}. {law['reason']}"
    return facts + verdict + "\n\n" + markdown(["", "here", "95% interval", "GPT-4, the paper"], rows)


def lab_claims() -> str:
    """The laboratory's claims in a line each, with their verdicts and the numbers that decide."""
    growth, joint = lab_laws("frontier")["sparsity"]["topk_relu_gap"], lab_joint_law()["coefficients"]
    (law,), (tokens,) = (lab_laws("converged")[name].values() for name in ("n_converged", "tokens_to_convergence"))
    dead = {
        (r["tied_init"] == "true", r["auxk"] != "0"): f"{100 * float(r['dead_fraction']):.1f}%" for r in _dead_runs()
    }
    relu, prolu = _ratios("frontier", "relu"), _ratios("activations", "prolu")
    gated = _ratios("activations", "gated", 64)
    gained = {name: _gained(name) for name in ("joint", "gaussian")}
    rows = [
        ["TopK beats ReLU at equal L0, the more the more latents", growth["verdict"], f"{relu} (L0 = 32)"],
        ["TopK beats ProLU and Gated", "holds", f"ProLU {prolu} (L0 = 32); Gated {gated} (L0 = 64)"],
        [
            "tied initialisation and AuxK keep latents alive", "holds",
            f"dead with neither {dead[False, False]}, tied {dead[True, False]}, AuxK {dead[False, True]}, "
            f"both {dead[True, True]}",
        ],
        *([f"L(N, K): {c} < 0", _below_0(joint[c]), _shown(joint[c])] for c in ("gamma", "eta")),
        ["L(N) falls as a power law to an irreducible part", law["verdict"], f"b {_shown(law['coefficients']['b'])}"],
        [
            "tokens to convergence grow by n^0.60 to n^0.65", "grow, more slowly",
            f"p {_shown(tokens['coefficients']['p'])}",
        ],
        ["the best lr falls with 1/√n", "more slowly", "table below"],
        ["batch size hardly moves what is reached", "holds", _best_by("batch_size", [*lab_runs("batch"), *_lr_runs()])],
        ["scaling the encoder at the start does nothing", "holds", "table below"],
        [
            "what is found is not in the covariance (null)", "holds",
            f"256 → 4,096 latents gain {gained['gaussian']} on Gaussian rows, {gained['joint']} on real ones",
        ],
        ["L_s(N) depends on the subject's size", "cannot tell", "two subjects, no family of three"],
    ]  # fmt: skip
    return markdown(["claim of the paper", "here", ""], rows)


def _shown(c: dict[str, Any]) -> str:
    return f"{c['value']:.2f} [{end(c['low'])}, {end(c['high'])}]"


def _below_0(c: dict[str, Any]) -> str:
    return "holds" if c["high"] is not None and c["high"] < 0 else "cannot tell"


def _ratios(sweep: str, activation: str, l0: float = 32) -> str:
    found = [g for g in lab_laws(sweep)["sparsity"]["gaps"] if g["activation"] == activation and g["l0"] == l0]
    return ", ".join(f"{math.exp(g['gap']['value']):.2f} × TopK's at n = {g['n_latents']:,}" for g in found)


def _gained(sweep: str) -> str:
    """By how much the NMSE falls from 256 to 4,096 latents at k = 32 and the tokens of the joint law."""
    tokens = str(lab_joint_law()["at"]["tokens"])
    nmse = {
        r["n_latents"]: float(r["normalized_mse"]) for r in lab_rows(sweep) if (r["k"], r["tokens"]) == ("32", tokens)
    }
    return f"{100 * (1 - nmse['4096'] / nmse['256']):.1f}%"


def _best_by(column: str, found: list[Row]) -> str:
    """The lowest NMSE at each value of the column."""
    best: dict[int, float] = {}
    for r in found:
        best[int(r[column])] = min(best.get(int(r[column]), math.inf), float(r["normalized_mse"]))
    return ", ".join(f"{value:,}: {nmse:.3f}" for value, nmse in sorted(best.items()))


def _lr_runs() -> list[Row]:
    return [r for r in lab_runs("lr") if r["n_latents"] == "1024"]


def _dead_runs() -> list[Row]:
    tokens = str(lab_joint_law()["at"]["tokens"])
    default = [r for r in lab_rows("joint") if (r["n_latents"], r["k"], r["tokens"]) == ("8192", "32", tokens)]
    return default + lab_runs("dead")


def lab_frontier() -> str:
    """NMSE of ReLU at TopK's L0s, by n, and whether the gap grows."""
    growth = lab_laws("frontier")["sparsity"]["topk_relu_gap"]
    said = f"Claim ({growth['claim']}): {growth['verdict']}, at L0 = {growth['l0']:g}. {growth['reason']}"
    return said + "\n\n" + gaps("frontier")


def lab_activations() -> str:
    """NMSE of every activation function beside TopK's."""
    return gaps("activations")


def gaps(sweep: str) -> str:
    """NMSE of the other functions over TopK's at one L0, interpolated."""
    found = lab_laws(sweep)["sparsity"]
    rows = []
    for gap in found["gaps"]:
        ratio = [math.exp(gap["gap"][end]) for end in ("value", "low", "high")]
        runs_there = found["curves"][gap["activation"]][str(gap["n_latents"])]
        used = f"{len(runs_there)} at L0 {runs_there[0]['l0']:.0f} to {runs_there[-1]['l0']:.0f}"
        size = f"{gap['n_latents']:,}", f"{gap['l0']:.3g}"
        rows.append([gap["activation"], *size, f"{ratio[0]:.2f}", f"[{ratio[1]:.2f}, {ratio[2]:.2f}]", used])
    return markdown(["", "n_latents", "L0", "NMSE / TopK's", "95% interval", "its runs"], rows)


def lab_dead() -> str:
    """Dead latents with and without tied initialisation and AuxK, and what AuxK costs."""
    rows = [
        [yes(r["tied_init"] == "true"), yes(r["auxk"] != "0"), *lab_quality(r), f"{float(r['kernel_s']):.0f}"]
        for r in _dead_runs()
    ]
    return markdown(["tied init", "AuxK", *LAB_QUALITY, "seconds in the step"], rows)


def lab_init() -> str:
    """With and without the encoder scaled at the start, of two seeds each."""
    names = {"true": "scaled", "false": "rows of norm 1"}
    rows = [[names[scaled(r)], r["seed"], *lab_quality(r)] for r in lab_runs("init")]
    return markdown(["encoder at the start", "seed", *LAB_QUALITY], rows)


def scaled(r: Row) -> str:
    """A setting without a column: it is in the run's name."""
    return "false" if "scaled_initfalse" in r["run"].lower() else "true"


def lab_batch() -> str:
    """NMSE by batch size, each at several lr, after the same tokens."""
    found = lab_runs("batch") + _lr_runs()
    found.sort(key=lambda r: (int(r["batch_size"]), float(r["lr"])))
    rows = [[f"{int(r['batch_size']):,}", f"{float(r['lr']):g}", *lab_quality(r)] for r in found]
    return markdown(["batch_size", "lr", *LAB_QUALITY], rows)


def lab_predictions() -> str:
    """What was predicted before the runs, and what they gave."""
    rows = []
    for path in sorted((RESULTS / "lab" / "predictions").glob("*.json")):
        said = json.loads(path.read_text())["plans"][0]
        own = ("topk", str(said["n_latents"]), str(said["k"]), str(said["tokens"]))
        names = ("activation", "n_latents", "k", "tokens")
        runs_of = [r for s in ("joint", "converged") for r in lab_rows(s) if tuple(r[n] for n in names) == own]
        low, value, high = (said["nmse"][name] for name in ("low", "value", "high"))
        size = f"{said['n_latents']:,}", f"{said['k']}", f"{said['tokens']:,}"
        for r in runs_of:
            nmse = float(r["normalized_mse"])
            verdict = "inside" if low <= nmse <= high else "outside"
            error = f"{100 * (value / nmse - 1):+.1f}%"
            times = f"{said['seconds']:.0f}", f"{float(r['kernel_s']):.0f}"
            rows.append(
                [
                    *size,
                    said["nmse"]["law"].replace("|", "\\|"),
                    f"{value:.4f} [{low:.4f}, {high:.4f}]",
                    f"{nmse:.4f}",
                    error,
                    verdict,
                    *times,
                ]
            )
    head = [
        "n_latents",
        "k",
        "tokens",
        "law",
        "predicted",
        "measured",
        "error",
        "",
        "seconds said",
        "seconds in the step",
    ]
    return markdown(head, rows)


def lab_converged() -> str:
    """Held-out NMSE as distinct tokens double, and the gain of the last doubling."""
    found: dict[int, dict[int, float]] = {}
    for r in lab_rows("converged"):
        found.setdefault(int(r["n_latents"]), {})[int(r["tokens"])] = float(r["normalized_mse"])
    tokens = sorted({t for by_tokens in found.values() for t in by_tokens if t >= 1 << 19})
    rows = []
    for n, by_tokens in sorted(found.items()):
        last = sorted(by_tokens)[-1]
        before = min(by_tokens, key=lambda t: abs(math.log(last / t / 2)))
        gain = 1 - (by_tokens[last] / by_tokens[before]) ** (math.log(2) / math.log(last / before))
        rows.append(
            [f"{n:,}", *(f"{by_tokens[t]:.4f}" if t in by_tokens else "" for t in tokens), f"{100 * gain:.1f}%"]
        )
    return markdown(["n_latents", *(f"{t / 1e6:.1f}M" for t in tokens), "gain of the last doubling"], rows)


def lab_converged_laws() -> str:
    """L(N) and the tokens to convergence, with intervals, beside the paper's."""
    laws = lab_laws("converged")
    paper = {"T(N)": "0.60 to 0.65 (p)"}
    rows = []
    for name in ("n_converged", "tokens_to_convergence"):
        (law,) = laws[name].values()
        values = "; ".join(
            f"{c} = {v['value']:.3g} [{end(v['low'])}, {end(v['high'])}]" for c, v in law["coefficients"].items()
        )
        rows.append([f"{law['law']}: {law['claim']}", law["verdict"], values, paper.get(law["law"], "")])
    return markdown(["claim", "", "coefficients, 95% interval", "the paper"], rows)


def lab_exponents() -> str:
    """NMSE by n and b of L(N | D) = exp(a - b ln n) + exp(e): of real activations, a null, another subject."""
    rows = []
    for what, sweep in {
        "SmolLM2-135M": "joint",
        "Gaussian, its covariance": "gaussian",
        "Gemma 3 270M": "gemma",
    }.items():
        if not (RESULTS / "lab" / sweep / "scaling.json").exists():
            continue
        law = lab_laws(sweep)["n_fixed_tokens"]["32"]
        b, e = law["coefficients"]["b"], law["coefficients"]["e"]
        tokens = law["at"]["tokens"]
        nmse = {int(r["n_latents"]): r for r in lab_rows(sweep) if r["k"] == "32" and int(r["tokens"]) == tokens}
        at = ", ".join(f"{n:,}: {float(r['normalized_mse']):.3f}" for n, r in sorted(nmse.items()))
        interval = f"{b['value']:.2f} [{end(b['low'])}, {end(b['high'])}]"
        rows.append([what, f"{tokens:,}", at, interval, f"{math.exp(e['value']):.3f}"])
    return markdown(["activations", "tokens", "NMSE by n", "b", "irreducible"], rows)


def end(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def lab_rows(sweep: str) -> list[Row]:
    """Every row of a sweep of the laboratory."""
    with open(RESULTS / "lab" / sweep / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def lab_laws(sweep: str) -> dict[str, Any]:
    return json.loads((RESULTS / "lab" / sweep / "scaling.json").read_text())


LAB_QUALITY = ["NMSE held out", "95% interval", "dead", "weights"]


def lab_quality(r: Row) -> list[str]:
    interval = f"[{float(r['normalized_mse_low']):.3f}, {float(r['normalized_mse_high']):.3f}]"
    return [f"{float(r['normalized_mse']):.3f}", interval, f"{100 * float(r['dead_fraction']):.1f}%", r["weights"]]


def yes(on: bool) -> str:
    return "yes" if on else "no"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluations(columns: dict[str, str]) -> str:
    """A row an evaluated run: metrics of the quick suite with their intervals, under the columns' heads."""
    runs: dict[str, dict[str, Row]] = {}
    with open(RESULTS / "evals" / "metrics.csv", newline="") as file:
        for r in csv.DictReader(file):
            runs.setdefault(r["run"], {})[r["metric"]] = r
    rows = []

    def order(metrics: dict[str, Row]) -> tuple[str, int, float]:
        return metrics["l0"]["activation"], int(metrics["l0"]["n_latents"]), float(metrics["l0"]["value"])

    for metrics in sorted(runs.values(), key=order):
        first = metrics["l0"]
        cells = [
            f"{float(m['value']):.3g} [{float(m['low']):.3g}, {float(m['high']):.3g}]" if m else ""
            for m in (metrics.get(name) for name in columns)
        ]
        l0 = f"{float(first['value']):.0f}"
        rows.append([first["activation"], f"{int(first['n_latents']):,}", l0, f"{int(first['tokens_seen']):,}", *cells])
    return markdown(["", "n_latents", "L0", "tokens", *columns.values()], rows)


EVALUATIONS = {
    "evals_losses": {
        "normalized_mse": "NMSE", "delta_ce": "ΔCE", "kl": "KL", "kl_pca": "KL, PCA", "kl_mean_ablation": "KL, mean",
        "loss_recovered_zero": "recovered, zero-ablation", "compute_equivalent": "compute equivalent",
    },
    "evals_probes": {
        "probe_loss": "probe loss", "probe_loss_train": "where chosen", "probe_loss_null": "… shuffled labels",
        "probe_loss_random_directions": "random directions", "probe_loss_channels": "channels",
        "probe_loss_dense": "dense probe", "probe_auc": "AUC",
    },
    "evals_explanations": {
        "n2g_recall": "recall", "n2g_precision": "precision", "n2g_recall_unigram": "recall, unigram",
        "n2g_precision_unigram": "precision, unigram", "n2g_precision_q90": "precision, q90", "n2g_density": "density",
        "n2g_never_predicts": "never predicts", "explanation_kl": "KL, 32 simulated",
        "explanation_kl_unigram": "… by unigram", "explanation_kl_zero": "… set to 0",
    },
    "evals_magnitudes": {
        "ablation_sparsity": "ablation sparsity", "ablation_sparsity_channels": "… channels",
        "ablation_sparsity_own_token": "own token", "ablation_sparsity_own_token_channels": "… channels",
        "unrefined_normalized_mse": "NMSE, 8,064 tokens", "refined_normalized_mse": "… refined",
        "shrinkage": "shrinkage", "refinement_slope": "slope",
    },
}  # fmt: skip


def exactness() -> str:
    """What the compiled kernels select, and the errors of their gradients."""
    found = json.loads((RESULTS / "exactness.json").read_text())
    selected = markdown(
        ["selecting product", "canonical scores a row", "rows that outgrew their buffer", "recall of the true top k"],
        [
            [name, f"{s['scores_per_row']:.1f}", str(s["saturated_rows"]), f"{s['recall']:.6g}"]
            for name, s in found["selection"].items()
        ],
    )
    errors = found["errors"]
    gradients = markdown(
        ["relative error of the gradient", *errors["native"]],
        [[name, *(f"{error:.1e}" for error in of_part.values())] for name, of_part in errors.items()],
    )
    sizes = f"{found['n_latents']:,} latents, d_model {found['d_model']}, k {found['k']}, {found['n_rows']:,} rows"
    about = f"{sizes}; {found['dead']:.0%} of the latents taken as dead for AuxK; kernels: {found['level']}."
    return f"{about}\n\n{selected}\n\n{gradients}"


def evals_complete() -> str:
    """The loss of the subject as more and more latents of one autoencoder take simulated values, up to all of them."""
    found = json.loads((RESULTS / "evals" / "complete.json").read_text())
    metrics, run = found["metrics"], found["run"]
    rows = []
    for at in ("_at_25", "_at_50", ""):
        cells = [
            metrics[f"explanation_{name}{by}{at}"] for name in ("kl", "delta_ce") for by in ("", "_unigram", "_zero")
        ]
        simulated = cells[0]["unit"].split(", ")[1].split(" of ")[0] if at else f"{run['n_latents']:,}, all"
        rows.append([simulated, *(f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}]" for c in cells)])
    real = ", ".join(
        f"{name} {metrics[f'explanation_{key}_real']['value']:.3g}" for name, key in (("KL", "kl"), ("ΔCE", "delta_ce"))
    )
    scores = ", ".join(
        f"{name} {metrics[key]['value']:.3g} [{metrics[key]['low']:.3g}, {metrics[key]['high']:.3g}]"
        for name, key in (("recall", "n2g_recall"), ("precision", "n2g_precision"))
    )
    head = ["latents simulated", "KL", "… by unigram", "… set to 0", "ΔCE", "… by unigram", "… set to 0"]
    about = f"TopK, {run['n_latents']:,} latents, k = {run['k']}; none simulated: {real}. All rules: {scores}."
    return f"{about}\n\n{markdown(head, rows)}"


def evals_claims() -> str:
    """What the paper says of its autoencoders, and what these say."""
    found = json.loads((RESULTS / "evals" / "claims.json").read_text())
    return markdown(["claim", "here", ""], [[c["claim"], c["seen"], c["verdict"]] for c in found])


def robustness() -> str:
    """Trials of the robustness campaign by what was done and by what came of it."""
    found = json.loads(ROBUSTNESS.read_text())
    verdicts = list(found["verdicts"])
    cells = {**found["by_kind"], "all": found["verdicts"]}
    title = (
        f"{found['trials']:,} trials, seeds {found['seeds'][0]:,} to {found['seeds'][1]:,}; commit {found['commit']}, "
        f"{found['date']}, Python {found['python']}; {found['seconds'] / 60:.0f} minutes."
    )
    rows = [[kind, f"{sum(row.values()):,}", *(f"{row[v]:,}" for v in verdicts)] for kind, row in cells.items()]
    return f"{title}\n\n" + markdown(["", "trials", *verdicts], rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "robustness": robustness,
    "seconds": seconds,
    "speed": speed,
    "floors": floors,
    "impl": impl,
    "lab_learning_rates": lab_learning_rates,
    "lab_joint": lab_joint,
    "lab_law": lab_law,
    "lab_claims": lab_claims,
    "lab_frontier": lab_frontier,
    "lab_activations": lab_activations,
    "lab_dead": lab_dead,
    "lab_init": lab_init,
    "lab_batch": lab_batch,
    "lab_predictions": lab_predictions,
    "lab_converged": lab_converged,
    "lab_converged_laws": lab_converged_laws,
    "lab_exponents": lab_exponents,
    **{name: functools.partial(evaluations, columns) for name, columns in EVALUATIONS.items()},
    "exactness": exactness,
    "evals_complete": evals_complete,
    "evals_claims": evals_claims,
}


def fill(text: str) -> str:
    """The page with every known block filled anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["keep"] and len(arguments) == 2:
        keep(Path(arguments[1]))
    elif arguments:
        sys.exit(__doc__)
    for page in PAGES:
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
