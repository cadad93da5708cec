"""A run of the tiny model as the viewer's tests look at it, its words full of what a page must not fall for."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np

import tiny
from monosem.config import EvalConfig, ExplainConfig
from monosem.evals import evaluate
from monosem.explanations.entry import explain

N_LATENTS = 64
NASTY = (
    "<script>alert(1)</script>", "</i><img src=x onerror=alert(2)>", '" onmouseover="alert(3)', "{{ 7 * 7 }}", "\x00",
    "\n", "\u202egnp.exe", "zero\u200bwidth", "\ud800", "&amp;", "</textarea><b>", "'; DROP TABLE notes; --", "\u2028",
    "a" * 400, "\u0627\u0644\u0639\u0631\u0628", "e\u0301\u0301\u0301", "%00", "javascript:alert(4)", "<!--", "]]>",
)  # fmt: skip
"""Texts that break out of HTML, attributes, scripts and SQL where they are not escaped, or reorder and hide others."""


def tiny_run(folder: Path, model: Path, corpus: Path) -> Path:
    """A run folder with an autoencoder, an evaluation and an explanation, honest and small."""
    tiny.tiny_run(folder, model, corpus, N_LATENTS)
    evaluate(EvalConfig(run=str(folder), n_tokens_downstream=256, n_bootstrap=20))
    explain(ExplainConfig(run=str(folder), n2g=0, ablations=0, device="cpu"))
    return folder


def make_nasty(folder: Path) -> None:
    """Put a text of NASTY in place of every token of an explained run, and into its explanations."""
    path = folder / "explain/vocabulary.json"
    words = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps([NASTY[i % len(NASTY)] for i in range(len(words))]), "utf-8")
    write_words(folder, {latent: NASTY[latent % len(NASTY)] for latent in range(N_LATENTS)})


def write_words(folder: Path, explanations: dict[int, str]) -> None:
    """explain/words.sqlite with these explanations, and for each latent the rule that its top example's peak fires."""
    position, context, contexts = (
        np.load(folder / f"explain/{name}.npy") for name in ("top_position", "top_context", "contexts")
    )
    (folder / "explain/words.sqlite").unlink(missing_ok=True)
    file = sqlite3.connect(folder / "explain/words.sqlite")
    with file:
        file.execute(
            "CREATE TABLE latents(latent INTEGER PRIMARY KEY, explanation TEXT, n2g_rule TEXT, top_tokens TEXT)"
        )
        file.execute("CREATE VIRTUAL TABLE latents_fts USING fts5(explanation, top_tokens, examples)")
        for latent, words in explanations.items():
            words = words.encode("utf-8", "replace").decode()
            peak = int(contexts[context[latent, 0], position[latent, 0]])
            rule = json.dumps([[[peak], 1.5], [[peak, -1, -2], 0.5]])
            file.execute("INSERT INTO latents VALUES (?, ?, ?, ?)", (latent, words, rule, f"token{peak}"))
            file.execute(
                "INSERT INTO latents_fts(rowid, explanation, top_tokens, examples) VALUES (?, ?, ?, ?)",
                (latent, words, f"token{peak}", "once upon a time"),
            )
    file.close()
    tiny.reseal_explanation(folder)


def write_ablations(folder: Path, latents: list[int]) -> None:
    """The columns of ablations as the explanation has them: two examples of each of the latents, effects made up."""
    context = json.loads((folder / "explain/manifest.json").read_text("utf-8"))["context_length"]
    a, x = len(latents), 2
    kl = np.full((a, x, context), np.nan, np.float32)
    kl[:, :, 8:] = np.linspace(0.01, 1, context - 8)
    tokens = np.tile(np.arange(10, dtype=np.int32), (a, x, 1))
    after = np.where(np.arange(context)[:, None] < 8, -1, np.arange(context)[:, None] + np.arange(10))
    votes = np.tile(after.astype(np.int32), (a, x, 1, 1))  # of the prediction of token t: t, t + 1, …
    values = np.where(votes < 0, np.nan, 1 / np.arange(1, 11)).astype(np.float32)
    columns = {
        "ablation_latents": np.array(latents, np.int32),
        "ablation_examples": np.tile(np.arange(2, dtype=np.int32), (a, 1)),
        "ablation_kl": kl, "ablation_delta_ce": -kl, "ablation_up": tokens, "ablation_down": tokens + 10,
        "ablation_up_values": tokens / np.float32(10), "ablation_down_values": tokens / np.float32(-10),
        "ablation_up_position": np.full((a, x, 10), 8, np.int16),
    }  # fmt: skip
    for kind, sign in (("logits_up", 1), ("logits_down", -1), ("probs_up", 0.1), ("probs_down", -0.1)):
        columns |= {f"ablation_{kind}": votes, f"ablation_{kind}_values": np.float32(sign) * values}
    tiny.reseal_explanation(folder, **columns)
