"""One latent: how it fires, where, what its rule says, what it votes for and does, what is near it."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any, NamedTuple

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from monosem.viewer import search, text, web
from monosem.viewer.files import Unavailable
from monosem.viewer.reading import COLUMNS, FIRED_THRESHOLD, Run
from monosem.viewer.web import API, Endpoint, Site

KINDS = ("top", "random", "quantile")
ANY, START = -1, -2
"""As in `n2g`, which is a layer that imports torch: a step that any token matches, and the start of a text."""

N_VOTES = 5
"""Tokens voted up, and down, that are shown of one prediction."""
VOTES = {
    "logits_up": "logit up", "logits_down": "logit down", "probs_up": "likelier", "probs_down": "less likely",
}  # fmt: skip
EFFECTS = {"kl": "KL", "loss": "change in loss"}
"""What the tokens after an ablation can be coloured by."""

_LEFT_OUT = {"n2g": "rules", "ablations": "ablations"}
"""What of a part may be left out."""

Rule = dict[tuple[int, ...], float]


class Around(NamedTuple):
    """Where a latent stands among those of a query."""

    place: int | None
    total: int
    previous: int | None
    next: int | None


def view(run: Run, latent: int) -> dict[str, Any]:
    """Everything the page shows, as JSON; a part that was not computed is None."""
    rule = run.rule(latent)
    note = run.notes.of(latent)
    return {
        "latent": latent,
        "explanation": run.explanations([latent]).get(latent),
        "fires_on": run.peak_tokens(np.array([latent]), 20)[0][:8],
        "statistics": statistics(run, latent),
        "histogram": histogram(run, latent),
        "examples": {kind: examples(run, latent, kind, rule) for kind in KINDS},
        "n_bands": run.explanation.manifest["n_quantile_bands"] if run.explanation is not None else 0,
        "rule": None if rule is None else _shown(run, rule),
        "votes": votes(run, latent),
        "left_out": {what: reason for what in ("votes", "rules", "ablations") if (reason := run.left_out(what))},
        "neighbours": {
            "decoder": _neighbours(run, latent, "decoder_neighbours", "decoder_cosines"),
            "coactivation": _neighbours(run, latent, "coactivation_neighbours", "coactivation_scores"),
        },
        "ablations": (effects := ablations(run, latent)),
        "effect_scales": effect_scales(effects),
        "note": note._asdict(),
    }


def statistics(run: Run, latent: int) -> list[dict[str, Any]]:
    """Every number of COLUMNS with its meaning; of one that was not computed the command that computes it."""
    found = []
    for name, about in COLUMNS.items():
        column = run.column(name)
        value = None if column is None else _finite(column[latent])
        undefined = _undefined(run, latent, name) if value is None and column is not None else None
        undefined = undefined or ("left out" if run.left_out(_LEFT_OUT.get(about.part, "")) else None)
        found.append(
            {"name": name, "label": about.label, "meaning": about.meaning, "value": value, "undefined": undefined,
             "command": None if value is not None or undefined else run.command(about.part)}
        )  # fmt: skip
    several, one = run.rows("probe_top_task"), run.column("probe_task")
    best: list[int] = several[latent].tolist() if several is not None else [] if one is None else [int(one[latent])]
    tasks = run.explanation.manifest.get("probe_tasks", []) if run.explanation is not None else []
    if named := [tasks[i] for i in best if 0 <= i < len(tasks)]:
        next(s for s in found if s["name"] == "probe_best")["task"] = ", ".join(named)
    return found


def _undefined(run: Run, latent: int, name: str) -> str | None:
    """Why a number that was computed is none; None where it was not computed."""
    judged = run.column("n2g_density")
    if name in ("n2g_recall", "n2g_precision") and judged is not None and not math.isnan(judged[latent]):
        return "0 of 0"
    return "never active" if name in ("mean", "mean_square", "skew", "kurtosis") else None


def histogram(run: Run, latent: int) -> dict[str, Any] | None:
    """Tokens by activation, without the empty bins at both ends; None when it was not computed."""
    counts, edges = run.rows("histogram"), run.column("histogram_edges")
    if counts is None or edges is None:
        return None
    own, ends = counts[latent], np.append(edges, np.inf)
    filled = np.flatnonzero(own)
    if not len(filled):
        return {"edges": [], "n_tokens": []}
    low, high = filled[0], filled[-1] + 1
    shown = [float(f"{edge:.4g}") if math.isfinite(edge) else None for edge in ends[low : high + 1]]
    return {"edges": shown, "n_tokens": own[low:high].tolist()}


def examples(run: Run, latent: int, kind: str, rule: Rule | None) -> list[dict[str, Any]] | None:
    """The latent's examples of a kind: tokens, activations, where the peak is, what the rule says of each token.

    `mark` is by token: hit (fires and predicted), miss, false (predicted only) or nothing; None without a rule.
    """
    columns = [run.rows(name) for name in (f"{kind}_context", f"{kind}_position", f"{kind}_activations")]
    contexts, documents, places = (run.rows(f"contexts{name}") for name in ("", "_document", "_position"))
    if contexts is None or run.explanation is None:
        return None
    own = [column[latent] for column in columns if column is not None]
    if len(own) < len(columns):
        return None
    context, position, activations = own
    first = run.explanation.manifest["first_position"]
    each = len(context) // max(1, run.explanation.manifest["n_quantile_bands"])
    found = []
    for slot in np.flatnonzero(context >= 0).tolist():
        row, values = int(context[slot]), activations[slot].astype(np.float64)
        ids = contexts[row].tolist()
        at = int(position[slot])
        found.append(
            {
                "slot": slot,
                "band": slot // each if kind == "quantile" else None,
                "tokens": [text.visible(run.token(t)) for t in ids],
                "activations": [float(f"{v:.4g}") for v in values],
                "position": at,
                "peak": float(f"{values[at]:.4g}"),
                "document": None if documents is None else int(documents[row, at]),
                "document_position": None if places is None else int(places[row, at]),
                "marks": None if rule is None else _marks(rule, ids, values, first),
            }
        )
    return found


def predict(rule: Rule, tokens: list[int]) -> list[float]:
    """The activation that the rule predicts at each token; 0 where no pattern matches. As `n2g.predict`.

    Of the patterns that match, the longest decides; of equally long ones the one that, going back from the token,
    first has a token where the other has ANY.
    """
    by_length = sorted(rule, key=lambda pattern: (-len(pattern), [step == ANY for step in pattern]))

    def matches(pattern: tuple[int, ...], at: int) -> bool:
        if pattern[-1] == START:
            return len(pattern) - 1 == at + 1 and matches(pattern[:-1], at) if len(pattern) > 1 else at < 0
        return len(pattern) <= at + 1 and all(step in (ANY, tokens[at - back]) for back, step in enumerate(pattern))

    return [next((rule[p] for p in by_length if matches(p, at)), 0.0) for at in range(len(tokens))]


def votes(run: Run, latent: int) -> dict[str, list[dict[str, Any]]] | None:
    """Tokens whose logits the latent's direction raises and lowers most; None when not computed."""
    if run.rows("lens_up") is None:
        return None
    return {side: _tokens(run, f"lens_{side}", f"lens_{side}_values", latent) for side in ("up", "down")}


def ablations(run: Run, latent: int) -> list[dict[str, Any]] | None:
    """What taking the latent out changes, an entry an ablated top example; None where that was not computed.

    `kl` and `delta_ce` are by token, of its own prediction, None up to the peak; `after` has the tokens after it.
    """
    chosen = run.column("ablation_latents")
    here = [] if chosen is None else np.flatnonzero(chosen == latent).tolist()
    if not here:
        return None
    top, row = examples(run, latent, "top", None) or [], here[0]
    slots = {example["slot"]: example for example in top}
    which, kl, delta = (_row(run, f"ablation_{name}", row) for name in ("examples", "kl", "delta_ce"))
    found = []
    for x, slot in enumerate(which.tolist()):
        if slot not in slots:
            continue
        effect = {"kl": [_finite(v) for v in kl[x]], "delta_ce": [_finite(v) for v in delta[x]]}
        ids = _row(run, "contexts", int(_row(run, "top_context", (latent, slot)))).tolist()
        tokens = [text.token(run.token(t)) for t in ids]
        after = [
            {"position": at, "token": tokens[at], "votes": _votes(run, (row, x, at))}
            for at, v in enumerate(effect["kl"]) if v is not None
        ]  # fmt: skip
        sides = {s: _most_moved(run, s, (row, x), tokens) for s in ("up", "down")}
        found.append({**slots[slot], **effect, **sides, "after": after})
    return found


def effect_scales(found: list[dict[str, Any]] | None) -> dict[str, float]:
    """The largest KL and change in loss of all the tokens, for their colours."""
    largest = {"kl": "kl", "loss": "delta_ce"}
    return {
        name: max((abs(v) for e in found or [] for v in e[key] if v is not None), default=0.0) or 1.0
        for name, key in largest.items()
    }


def _votes(run: Run, at: tuple[int, int, int]) -> dict[str, list[dict[str, Any]]]:
    """By name of VOTES the tokens that move most in one prediction; an older explanation has not all of them."""
    names = [name for name in VOTES if run.rows(f"ablation_{name}") is not None]
    return {name: _tokens(run, f"ablation_{name}", f"ablation_{name}_values", at)[:N_VOTES] for name in names}


def _most_moved(run: Run, side: str, at: tuple[int, int], tokens: list[str]) -> list[dict[str, Any]]:
    """The tokens that move most in any prediction, with the token that was predicted there."""
    found, where = (
        _tokens(run, f"ablation_{side}", f"ablation_{side}_values", at),
        run.rows(f"ablation_{side}_position"),
    )
    places = [-1] * len(found) if where is None else where[at].tolist()
    return [{**v, "predicting": tokens[t] if t >= 0 else None} for v, t in zip(found, places, strict=False)]


def around(run: Run, latent: int, query: search.Query) -> Around:
    """The latent's neighbours in the order of the query."""
    if query.is_all:
        return Around(
            latent, run.n_latents, latent - 1 if latent else None, latent + 1 if latent + 1 < run.n_latents else None
        )
    found = search.select(run, query).latents
    at = np.flatnonzero(found == latent)
    if not len(at):
        return Around(None, len(found), None, int(found[0]) if len(found) else None)
    place = int(at[0])
    following = int(found[place + 1]) if place + 1 < len(found) else None
    return Around(place, len(found), int(found[place - 1]) if place else None, following)


def _shown(run: Run, rule: Rule) -> list[dict[str, Any]]:
    """The patterns, strongest first, in reading order; the last step is the token that fires."""

    def steps(pattern: tuple[int, ...]) -> list[dict[str, Any]]:
        found = []
        for token, same in itertools.groupby(pattern[::-1]):
            n = len(list(same))
            if token == ANY:
                found.append({"text": f"any ×{n}" if n > 1 else "any", "special": True})
            else:
                word = "start" if token == START else text.token(run.token(token))
                found += n * [{"text": word, "special": token == START}]
        return found

    strongest = sorted(rule.items(), key=lambda item: -item[1])
    return [{"steps": steps(pattern), "activation": value} for pattern, value in strongest]


def _marks(rule: Rule, tokens: list[int], values: np.ndarray, first: int) -> list[str]:
    """By token where the rule is right; a text starts at `first`, from where on the store has activations."""
    names = {(True, True): "hit", (True, False): "miss", (False, True): "false", (False, False): ""}
    fires, predicted = values[first:] > FIRED_THRESHOLD, predict(rule, tokens[first:])
    return [""] * first + [names[f, p > FIRED_THRESHOLD] for f, p in zip(fires.tolist(), predicted, strict=True)]


def _neighbours(run: Run, latent: int, which: str, scores: str) -> list[dict[str, Any]] | None:
    latents, score = run.rows(which), run.rows(scores)
    if latents is None or score is None:
        return None
    own = latents[latent]
    own = own[own >= 0]
    tokens = run.peak_tokens(own, 12)
    return [
        {"latent": i, "score": float(f"{s:.4g}"), "fires_on": t[:4]}
        for i, s, t in zip(own.tolist(), score[latent].tolist(), tokens, strict=False)
    ]


def _row(run: Run, name: str, at: Any) -> np.ndarray:
    """A row of a column that is there because the part that makes it has been computed."""
    column = run.rows(name)
    if column is None:
        raise Unavailable(f"{run.folder} has no column {name}, as an explanation with it has; explain the run again")
    return column[at]


def _tokens(run: Run, ids: str, values: str, at: Any) -> list[dict[str, Any]]:
    tokens, changes = _row(run, ids, at), _row(run, values, at)
    return [
        {"token": text.token(run.token(t)), "value": _finite(v)}
        for t, v in zip(tokens.tolist(), changes.tolist(), strict=True)
        if t >= 0
    ]


def _finite(value: Any) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _latent(run: Run, request: Request) -> int:
    given = str(request.path_params["latent"])
    latent = int(given) if re.fullmatch("[0-9]{1,18}", given) else run.n_latents
    if latent >= run.n_latents:
        raise HTTPException(404, f"there is no latent {given}; they are numbered from 0 to {run.n_latents - 1:,}")
    return latent


def _page(site: Site, request: Request) -> Response:
    run = site.run
    latent = _latent(run, request)
    query = search.parse(request.query_params, also=("theme", "show", "text", "effect"))
    show = request.query_params.get("show", "top")
    if show not in KINDS:
        raise ValueError(f"show is {show!r}; choose one of {', '.join(KINDS)}")
    effect = request.query_params.get("effect", "kl")
    if effect not in EFFECTS:
        raise ValueError(f"effect is {effect!r}; choose one of {', '.join(EFFECTS)}")
    return web.page(
        site, request, "latent", view=view(run, latent), around=around(run, latent, query), query=query, show=show,
        full=request.query_params.get("text") == "full", effect=effect, effects=EFFECTS, vote_names=VOTES,
    )  # fmt: skip


def _random(site: Site, request: Request) -> Response:
    """A latent that fires, if any does."""
    run = site.run
    density = run.column("density")
    alive = np.flatnonzero(density > 0) if density is not None else np.arange(0)
    latent = int(random.choice(alive)) if len(alive) else random.randrange(run.n_latents)
    return RedirectResponse(site.links.page("latent", latent=latent), 307, headers={"cache-control": "no-store"})


def _write(site: Site, request: Request) -> dict[str, Any]:
    run = site.run
    latent = _latent(run, request)
    if site.read_only:
        raise HTTPException(403, "these pages are served read-only; notes are not kept")
    sent = web.body(request)
    if unknown := sorted(set(sent) - {"text", "starred"}):
        raise ValueError(f"a note has no {', '.join(unknown)}; it has text and starred")
    written, starred = sent.get("text"), sent.get("starred")
    if starred in ("0", "1"):
        starred = starred == "1"
    if not isinstance(written, str | None) or not isinstance(starred, bool | None):
        raise ValueError("a note's text is a string, and starred is true or false")
    return run.notes.write(latent, text=written, starred=starred)._asdict()


def _form(site: Site, request: Request) -> Response:
    _write(site, request)
    back = site.links.page("latent", latent=_latent(site.run, request), **request.query_params)
    return RedirectResponse(back + "#note", 303)


def _notes(site: Site, request: Request) -> dict[str, Any]:
    return {"notes": [{"latent": latent, **note._asdict()} for latent, note in site.run.notes.all().items()]}


_STATE = search.PARAMETERS | {
    "show": f"examples: {', '.join(KINDS)}",
    "text": "full: whole contexts",
    "effect": f"what colours the tokens after an ablation: {', '.join(EFFECTS)}",
}
_NOTE = {"type": "object", "properties": {"text": {"type": "string"}, "starred": {"type": "boolean"}}}

ENDPOINTS = (
    Endpoint("/latents/random", _random),
    Endpoint("/latents/{latent}", _page, parameters=_STATE),
    Endpoint("/latents/{latent}", _form, parameters=_STATE, method="POST"),
    Endpoint(
        f"{API}/latents/{{latent}}",
        lambda site, request: view(site.run, _latent(site.run, request)),
        "all about one latent",
    ),
    Endpoint(f"{API}/latents/{{latent}}/note", _write, "write a note or a star", method="PUT", schema=_NOTE),
    Endpoint(f"{API}/notes", _notes, "all notes and stars"),
)
