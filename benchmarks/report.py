"""Rows -> CSV and Markdown, with what a reader needs to judge them: machine, versions, commit, command, noise."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import explain
from benchmarks.environments import PEERS
from benchmarks.steps import OURS, VARIANTS
from benchmarks.streams import ABOUT, OURS_HARVEST
from benchmarks.workers import ROOT

MEASURED = (
    *("ms_median", "ms_min", "ms_max", "tokens_per_s", "peak_rss_mib"),
    *(
        "speedup_vs_fastest_peer",
        "speedup_min",
        "speedup_max",
        "recall",
        "floor_ms",
        "fraction_of_floor",
        "cost_of_variant",
    ),
    *("cpu_ms_median", "idle_cpu_ms_max", "loss_last", "parts_ms", "peak_words", "facts"),
)
"""What is null in the row of an implementation that failed."""

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
_NAIVE = (
    "What one would write first: dense autograd through topk and scatter, torch's Adam, projection, unit norm, "
    "dead counters."
)

GOALS: tuple[tuple[str, int, int, str, float, str], ...] = (
    # impl, n_latents, batch, what, bound, words
    ("native-bf16", 16384, 4096, "speedup", 4.0, "× the fastest peer"),
    ("native-int8", 16384, 4096, "speedup", 6.0, "× the fastest peer"),
    ("native-bf16", 16384, 4096, "sae-lens", 15.0, "× sae-lens"),
    ("native-bf16", 16384, 4096, "dictionary-learning", 15.0, "× dictionary-learning"),
    ("native-bf16", 65536, 1024, "speedup", 5.0, "× the fastest peer"),
    ("native-fp32", 16384, 4096, "fraction", 0.80, "of the encoder's floor"),
    ("native-bf16", 16384, 4096, "fraction", 0.70, "of the encoder's floor"),
    ("native-int8", 16384, 4096, "fraction", 0.55, "of the encoder's floor"),
    ("native-auto", 16384, 4096, "sparsify", 9.0, "× sparsify"),
    ("native-auto+auxk", 16384, 4096, "cost", 0.80, "more time with 10% dead"),
    ("native-bf16", 16384, 4096, "memory", 768.0, "MiB at most"),
    ("native-bf16", 16384, 4096, "recall", 0.9999, "of the true top k"),
)
_AT_MOST = ("cost", "memory")


def is_ours(name: str) -> bool:
    return name.partition("+")[0] in OURS or name in (*OURS_HARVEST, "monosem")


def markdown(benchmark: str, rows: list[dict[str, Any]], facts: dict[str, Any], options: argparse.Namespace) -> str:
    """The whole report."""
    title, body = {
        "train": ("A training step: monosem and its peers", _train_lines),
        "harvest": ("Activations of a language model: monosem and its peers", _harvest_lines),
        "explain": ("Explaining all latents beside the harvest", explain.lines),
    }[benchmark]
    lines = [f"# {title}", "", *_facts_lines(facts, options)]
    return "\n".join([*lines, *body(rows, options)]) + "\n"


def write(folder: Path, name: str, text: str, rows: list[dict[str, Any]]) -> None:
    """folder/name.md and folder/name.csv, replacing those of the last run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()})
    (folder / f"{name}.csv").write_text(out.getvalue())


def machine(threads: int, command: str) -> dict[str, Any]:
    """Who measured, with what, when."""
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    found = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": f"{cpuinfo.get('model name', platform.processor() or platform.machine())}"
        f" (family {cpuinfo.get('cpu family', '?')}, model {cpuinfo.get('model', '?')})",
        "cpus": available_cpus(),
        "threads": threads,
        "cpu_flags": " ".join(flag for flag in _FLAGS if flag in flags),
        "memory_gib": round(_meminfo().get("MemTotal", 0) / 2**20, 1),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
    }
    if gpu := _gpu():
        found["gpu"] = gpu
    return found


def cpu_seconds() -> dict[str, float]:
    """Seconds that all CPUs of the machine have been busy, stolen by the hypervisor, and at all, since it started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return {}
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in stat.read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return {"busy": user + nice + system + irq + softirq, "stolen": steal, "all": sum(ticks)}


def noise(before: dict[str, float], after: dict[str, float], own: os.times_result) -> dict[str, float]:
    """Shares of the machine's CPU time that went to other processes and to the hypervisor while this ran."""
    if not before:
        return {}
    busy, stolen, total = (after[key] - before[key] for key in ("busy", "stolen", "all"))
    mine = own.user + own.system + own.children_user + own.children_system
    return {"other_processes": max(0.0, busy - mine) / total, "stolen": stolen / total}


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_gib() -> float:
    """Memory that can be had without swapping."""
    return _meminfo().get("MemAvailable", 16 * 2**20) / 2**20


def _facts_lines(facts: dict[str, Any], options: argparse.Namespace) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    share = facts.get("noise", {})
    lines = [
        f"    {facts['command']}",
        "",
        f"- {facts['date']}, commit {facts['commit']}",
        f"- {facts['cpu']}, {facts['cpus']} CPUs, {facts['memory_gib']} GiB; {facts['cpu_flags']}",
        f"- {facts['system']}; {versions}; {facts['threads']} threads for every implementation",
    ]
    if "gpu" in facts:
        lines.append(f"- {facts['gpu']}")
    if share:
        lines.append(
            f"- while it ran, other processes used {share['other_processes']:.1%} of the machine's CPU time"
            f" and the hypervisor took {share['stolen']:.1%}"
        )
    return [*lines, ""]


def _train_lines(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    lines = [
        f"d_model {options.d_model}, k {options.k}, fp32 parameters, {options.steps} timed steps each after warm-up, "
        "interleaved. One step is forward, loss, backward, projection of the decoder's gradient, Adam, unit norm and "
        "dead counters. × is the fastest peer's time over the row's, round by round (median, least and most). *Floor* "
        "is the encoder product alone at the peak of the machine; the column is its share of the whole step.",
        "",
    ]
    for shape in dict.fromkeys((row["n_latents"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["n_latents"], row["batch"]) == shape]
        lines += [f"## n_latents {shape[0]:,}, batch {shape[1]:,}", "", *_step_table(here), *_ratio_table(here)]
        lines += [*_variant_lines(here), *_parts_table(here), *_failures(here)]
    return [*lines, *_goal_lines(rows), *_about_lines(rows)]


def _step_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | ms a step (least – most) | CPU ms | tokens/s | peak MiB | × fastest peer | floor, share | recall |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['impl']} | failed | | | | | | |")
            continue
        share = row["fraction_of_floor"]
        floor = "" if share is None else f"{row['floor_ms']:.0f} ms, {share:.0%}"
        recall = "" if row["recall"] is None else f"{row['recall']:.5f}"
        lines.append(
            f"| {row['impl']} | {row['ms_median']:.0f} ({row['ms_min']:.0f} – {row['ms_max']:.0f}) |"
            f" {row['cpu_ms_median']:.0f} | {row['tokens_per_s']:,.0f} | {row['peak_rss_mib']:,.0f} | {_speedup(row)} |"
            f" {floor} | {recall} |"
        )
    groups = dict.fromkeys(row["fastest_peer"] for row in rows if row["fastest_peer"])
    words = next((row["peak_words"] for row in rows if row["peak_words"]), None)
    note = f"Fastest peer: {', '.join(groups)}." if groups else ""
    return [*lines, "", f"{note} Floor: {words}." if words else note, ""]


def _ratio_table(rows: list[dict[str, Any]]) -> list[str]:
    """How many times faster ours are than each peer, through the fastest one."""
    timed = [row for row in rows if row["status"] == "ok" and row["speedup_vs_fastest_peer"]]
    peers = list({row["impl"]: row for row in timed if not is_ours(row["impl"])}.values())
    ours = [row for row in timed if is_ours(row["impl"])]
    if not peers or not ours:
        return []
    lines = ["| times faster than | " + " | ".join(row["impl"] for row in peers) + " |", "|---|" + "---:|" * len(peers)]
    for row in ours:
        ratios = (row["speedup_vs_fastest_peer"] / peer["speedup_vs_fastest_peer"] for peer in peers)
        lines.append(f"| {row['impl']} | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")
    return [*lines, ""]


def _variant_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        base, _, variant = row["impl"].partition("+")
        if row["cost_of_variant"] is not None:
            words = " and ".join(VARIANTS[part] for part in variant.split("+"))
            lines.append(f"- {base} {words}: {row['cost_of_variant']:+.0%} of a step")
    return [*lines, ""] if lines else []


def _parts_table(rows: list[dict[str, Any]]) -> list[str]:
    timed = [row for row in rows if row["status"] == "ok" and row["parts_ms"]]
    if not timed:
        return []
    parts = list(timed[0]["parts_ms"])
    lines = ["| part, ms | " + " | ".join(parts) + " | rest |", "|---|" + "---:|" * (len(parts) + 1)]
    for row in timed:
        values = [row["parts_ms"][part] for part in parts]
        cells = [*values, row["ms_median"] - sum(values)]
        lines.append(f"| {row['impl']} | " + " | ".join(f"{value:.1f}" for value in cells) + " |")
    return [*lines, ""]


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {row['impl']} failed: {row['reason']}" for row in rows if row["status"] != "ok"]
    return [*lines, ""] if lines else []


def _goal_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for impl, n_latents, batch, what, bound, words in GOALS:
        here = [row for row in rows if (row["n_latents"], row["batch"]) == (n_latents, batch)]
        if not any(row["impl"] == impl for row in here):
            continue
        value = _goal_value(here, impl, what)
        share = what in ("fraction", "cost")
        shown = lambda number, share=share: f"{number:.0%}" if share else f"{number:,.6g}"  # noqa: E731
        met = value is not None and (value <= bound if what in _AT_MOST else value >= bound)
        sign = "≤" if what in _AT_MOST else "≥"
        found = "not measured" if value is None else shown(value if share else float(f"{value:.5g}"))
        verdict = "yes" if met else "no"
        lines.append(f"| {impl}, {n_latents:,} × {batch:,} | {sign} {shown(bound)} {words} | {found} | {verdict} |")
    return ["## Goals", "", "| | goal | measured | reached |", "|---|---|---:|---|", *lines, ""] if lines else []


def _goal_value(rows: list[dict[str, Any]], impl: str, what: str) -> float | None:
    row = next(row for row in rows if row["impl"] == impl)
    if row["status"] != "ok":
        return None
    keys = {"speedup": "speedup_vs_fastest_peer", "fraction": "fraction_of_floor", "cost": "cost_of_variant"}
    keys |= {"memory": "peak_rss_mib", "recall": "recall"}
    if what in keys:
        return row[keys[what]]
    peer = next((r for r in rows if r["impl"] == what and r["status"] == "ok"), None)
    mine, theirs = (r and r.get("speedup_vs_fastest_peer") for r in (row, peer))
    return mine / theirs if mine and theirs else None


def _about_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["impl"] for row in rows if not is_ours(row["impl"]))
    lines = [
        "## What the peers' steps do",
        "",
        "All in fp32, with Adam at the same learning rate.",
        "",
    ]
    for name in names:
        about = f"{PEERS[name].requirement}: {PEERS[name].about}" if name in PEERS else _NAIVE
        lines.append(f"- **{name}** {about}")
    return lines if names else []


def _harvest_lines(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    lines = [
        f"The same tokens in the same chunks of {options.contexts} contexts of {options.context_length}, from the same "
        f"folder, to the residual stream after block {rows[0]['layer']}; one chunk is one forward pass. "
        f"{options.steps} timed chunks each after warm-up, interleaved. × is the fastest peer's time over the row's.",
        "",
    ]
    lines += ["| | ms a chunk (least – most) | CPU ms | tokens/s | peak MiB | × fastest peer |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['impl']} | failed | | | | |")
            continue
        lines.append(
            f"| {row['impl']} | {row['ms_median']:.0f} ({row['ms_min']:.0f} – {row['ms_max']:.0f}) |"
            f" {row['cpu_ms_median']:.0f} | {row['tokens_per_s']:,.0f} | {row['peak_rss_mib']:,.0f} | {_speedup(row)} |"
        )
    lines += ["", *_ratio_table(rows), *_failures(rows)]
    return [*lines, "## What is timed", "", *(f"- **{name}** {about}" for name, about in ABOUT.items())]


def _speedup(row: dict[str, Any]) -> str:
    speed = row["speedup_vs_fastest_peer"]
    return "" if speed is None else f"{speed:.2f} ({row['speedup_min']:.2f} – {row['speedup_max']:.2f})"


def _commit() -> str:
    def git(*arguments: str) -> str:
        found = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if dirty else "")


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _meminfo() -> dict[str, int]:
    """KiB by name."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
