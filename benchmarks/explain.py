"""Time the pass of `monosem explain` that looks at all latents, beside the harvest of as many tokens, interleaved.

A store is read from its first block on, as `explain` does. In each round one of its blocks goes through the subject
again, plain and compiled, and the next blocks through the pass of every size, which goes on where it was: what it
keeps fills up as it does in a long pass. The autoencoders are as training starts them, on the store's activations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

ABOUT = {
    "harvest": "`activations.capture_block`, the forward pass of a harvest to the store's site, in its dtype; "
    "*compiled* is what a large harvest on a CPU does.",
    "pass": "`explanations.seen.Seen.add_all`: read a block, normalise, encode, group by latent, moments, top and "
    "sampled contexts; the next block is encoded by a second thread meanwhile.",
    "once": "What follows the pass once, whatever its length: columns, choice of examples, neighbours by activation. "
    "Writing them is left out.",
}
_HARVESTS = {"plain": False, "compiled": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=12, help="rounds")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of the pass in a round")
    parser.add_argument("--latents", default="8192,65536,131072", help="comma-separated n_latents")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--store", help="activation store; default: as many tokens as are needed are harvested first")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the report, one a number of latents."""
    import torch

    from monosem.activations import ActivationStore, harvest
    from monosem.config import HarvestConfig

    torch.set_num_threads(options.threads)
    sizes = [int(n) for n in options.latents.split(",")]
    with tempfile.TemporaryDirectory(prefix="monosem-bench-") as folder:
        if options.store is None:
            rows = 63 * HarvestConfig(out=folder).block_contexts * options.blocks * options.steps
            harvest(HarvestConfig(out=f"{folder}/store", n_tokens=int(1.1 * rows), device=options.device))
        store = ActivationStore.open(options.store or f"{folder}/store")
        if store.n_blocks("train") < options.blocks * options.steps:
            raise ValueError(
                f"the store has {store.n_blocks('train')} blocks; {options.steps} rounds of {options.blocks} need "
                f"{options.blocks * options.steps}: give less --steps, or another --store"
            )
        return _rows(store, sizes, options)


def _rows(store: Any, sizes: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    from monosem.activations import capture_block
    from monosem.model import normalize
    from monosem.subject import Subject

    subject = Subject.load(store.site.model, dtype=store.subject_dtype, device=options.device)
    each = store.config["block_contexts"]
    texts = store.contexts("train", options.blocks * options.steps).tokens.split(each)
    sample, _ = normalize(store.block("train", 0)[:1024])
    seen = {n: _seen(store, sample, n, options) for n in sizes}
    us: dict[Any, list[float]] = {name: [] for name in (*_HARVESTS, *sizes)}
    for compiled in _HARVESTS.values():  # to warm up
        capture_block(subject, [store.site], texts[0], compiled=compiled)
    for step in range(options.steps):
        blocks = range(step * options.blocks, (step + 1) * options.blocks)
        names = list(us)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            start = time.perf_counter()
            if name in _HARVESTS:
                capture_block(subject, [store.site], texts[blocks[0]], compiled=_HARVESTS[name])
            else:
                seen[name].add_all(blocks)
            n_tokens = store.block_rows * (1 if name in _HARVESTS else len(blocks))
            us[name].append((time.perf_counter() - start) / n_tokens * 1e6)
    return [_row(n, seen[n], us, store, options) for n in sizes]


def _seen(store: Any, sample: Any, n: int, options: argparse.Namespace) -> Any:
    from monosem.explanations.seen import Seen
    from monosem.model import Autoencoder, AutoencoderConfig, initial_weights

    weights = initial_weights(sample, n, options.k, tied=True, seed=0)
    config = AutoencoderConfig(d_model=store.width, n_latents=n, k=options.k)
    return Seen(Autoencoder(config, weights).to(options.device), store, seed=0)


def _row(n: int, seen: Any, us: dict[Any, list[float]], store: Any, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    seen.moments.columns()
    seen.examples()
    seen.coactivation()
    once = time.perf_counter() - start
    row: dict[str, Any] = {"impl": "monosem", "status": "ok", "n_latents": n, "k": options.k}
    row |= {"n_tokens": options.steps * options.blocks * store.block_rows, "layer": store.site.layer}
    row |= {"tokens_per_s": 1e6 / statistics.median(us[n]), "first_tokens_per_s": 1e6 / us[n][0]}
    row |= {"last_tokens_per_s": 1e6 / us[n][-1], "once_s": once}
    for harvest in _HARVESTS:
        ratios = [own / beside for own, beside in zip(us[n], us[harvest], strict=True)]
        row[f"{harvest}_tokens_per_s"] = 1e6 / statistics.median(us[harvest])
        row |= {f"over_{harvest}": statistics.median(ratios), f"over_{harvest}_min": min(ratios)}
        row[f"over_{harvest}_max"] = max(ratios)
        row[f"whole_over_{harvest}"] = 1 + sum(us[n]) / sum(us[harvest])
    return row


def lines(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """The table and what it means, as Markdown."""
    first = rows[0]
    found = [
        f"{first['n_tokens']:,} tokens of the subject's layer {first['layer']} (0-based), k {first['k']}, "
        f"{options.steps} rounds of {options.blocks} blocks. Harvest alone, tokens/s: "
        f"{first['plain_tokens_per_s']:,.0f} plain, {first['compiled_tokens_per_s']:,.0f} compiled. "
        "*Pass over harvest* is the pass's time over that of the "
        "harvest of as many tokens, round by round (median, least – most); *both over harvest* the time of harvest and "
        "pass over the harvest's, all rounds together (goal: 1.3).",
        "",
        "| n_latents | tokens/s (first – last round) | pass over plain harvest | both | pass over compiled harvest "
        "| both | once, s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row['n_latents']:,}", f"{row['tokens_per_s']:,.0f} ({row['first_tokens_per_s']:,.0f} – "]
        cells[1] += f"{row['last_tokens_per_s']:,.0f})"
        for name in _HARVESTS:
            low, high = row[f"over_{name}_min"], row[f"over_{name}_max"]
            cells += [f"{row[f'over_{name}']:.2f} ({low:.2f} – {high:.2f})", f"{row[f'whole_over_{name}']:.2f}"]
        found.append("| " + " | ".join([*cells, f"{row['once_s']:.1f}"]) + " |")
    return [*found, "", "## What is timed", "", *(f"- **{name}** {about}" for name, about in ABOUT.items())]
