"""Trying text of one's own: the page /try, and what it asks of the model (`live`, imported at the first request)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from monosem.config import activation_facts
from monosem.viewer import files, text, web
from monosem.viewer.reading import Run
from monosem.viewer.web import API, Endpoint, Site

MAX_WAITING = 8
N_FIRES_ON = 4
LARGEST = 3.4e38
"""About what a number in float32 can be."""
PARAMETERS = {
    "text": "the text",
    "k": "how many latents a token keeps",
    "threshold": "in place of k: what a pre-activation must exceed",
    "edits": "LATENT:ablate, LATENT:boost:FACTOR or LATENT:clamp:VALUE, commas between",
    "position": "of the token that is looked at",
    "colour": "what colours the tokens: error, delta_ce, edit_delta_ce or latent:NUMBER",
    "continue": "how many tokens are added",
    "seed": "of a sampled continuation; greedy without",
}
"""Of the page: its JavaScript reads and writes them."""
_MODEL = threading.Lock()
_WAITING = threading.BoundedSemaphore(MAX_WAITING)


def facts(site: Site) -> dict[str, Any]:
    """What can be tried; loads the model where that was not done yet."""
    return _with_model(site, lambda module, live: module.facts(live))


def try_text(site: Site, sent: dict[str, Any]) -> dict[str, Any]:
    """`live.try_text` on what was sent, with the words that pages show for tokens and latents."""
    asked = _checked(sent)

    def use(module: ModuleType, live: Any) -> dict[str, Any]:
        edits = [module.Edit(edit["latent"], edit["kind"], edit["value"]) for edit in asked.pop("edits")]
        return module.try_text(live, asked.pop("text"), edits=edits, **asked)

    edited = [edit["latent"] for edit in asked["edits"]]
    found = _with_model(site, use)
    rows = found["tokens"]
    for row in [*rows, *(found["next"] or {"tokens": []})["tokens"]]:
        row["shown"] = text.visible(row["text"])
    found["control_tokens"] = [text.visible(token) for token in found["control_tokens"]]
    if found["continuation"] is not None:
        for which in ("original", "edited"):
            found["continuation"][which] = text.prose(found["continuation"][which] or "")
    listed = dict.fromkeys([i for i, _ in rows[found["position"]]["latents"]] + edited + asked["watch"])
    return {**found, "about": about(site.run, list(listed))}


def try_labelled(site: Site, sent: dict[str, Any]) -> dict[str, Any]:
    """`live.try_labelled` on the table that was sent."""
    if set(sent) - {"table", "seed"} or not isinstance(sent.get("table"), str):
        raise ValueError(f"the body has {', '.join(sent) or 'nothing'}; send table (text), and seed (a whole number)")
    seed = _number(sent, "seed", whole=True) or 0
    found = _with_model(site, lambda module, live: module.try_labelled(live, sent["table"], seed=seed))
    found["labels"] = [text.prose(label) for label in found["labels"]]
    return {**found, "about": about(site.run, [row["latent"] for row in found["best"]])}


def about(run: Run, latents: list[int]) -> dict[str, dict[str, Any]]:
    """What is known of latents, by number: the tokens they fire on most, and their explanation in words."""
    words = run.explanations(latents) if latents else {}
    fires_on = run.peak_tokens(np.array(latents, dtype=np.int64), 20)
    return {
        str(i): {"fires_on": tokens[:N_FIRES_ON], "explanation": words.get(i)}
        for i, tokens in zip(latents, fires_on, strict=True)
    }


def _with_model(site: Site, use: Callable[[ModuleType, Any], dict[str, Any]]) -> dict[str, Any]:
    """`use(live, model)`, one request after the other; 503 when too many wait already."""
    if not _WAITING.acquire(blocking=False):
        raise HTTPException(503, f"{MAX_WAITING} texts are being tried; try again when they are done")
    try:
        with _MODEL:
            from monosem.viewer import live

            run = site.run
            return use(live, _loaded(run.folder, run.facts["weights_sha256"], site.model))
    finally:
        _WAITING.release()


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path, weights_sha256: str, model: str | None) -> Any:
    """The model of a run, kept until other weights are asked for."""
    from monosem.viewer import live

    with files.reading(folder):
        return live.load(str(folder), model=model)


def _checked(sent: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `live.try_text`; `ValueError` names the field that is not what it should be."""
    if unknown := sorted(set(sent) - set(_SCHEMA["properties"])):
        raise ValueError(f"there is no field {', '.join(unknown)}; there are: {', '.join(_SCHEMA['properties'])}")
    if not isinstance(sent.get("text"), str):
        raise ValueError("text is missing or no text; send the text to try")
    watch, edits = sent.get("watch") or [], sent.get("edits") or []
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise ValueError("edits is no list of objects; send [{latent, kind, value}]")
    if not isinstance(watch, list):
        raise ValueError("watch is no list; send numbers of latents")
    return {
        "text": sent["text"],
        "k": _number(sent, "k", whole=True),
        "threshold": _number(sent, "threshold"),
        "position": _number(sent, "position", whole=True),
        "n_continue": _number(sent, "n_continue", whole=True) or 0,
        "seed": _number(sent, "seed", whole=True),
        "watch": [_whole(i, "watch") for i in watch],
        "edits": [
            {
                "latent": _whole(edit.get("latent"), "the latent of an edit"),
                "kind": edit.get("kind"),
                "value": _number(edit, "value") or 0.0,
            }
            for edit in edits
        ],
    }


def _number(sent: dict[str, Any], name: str, *, whole: bool = False) -> Any:
    value = sent.get(name)
    if value is None:
        return None
    if whole:
        return _whole(value, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{name} is {value!r}; give a number of at most {LARGEST:.2g} in size")
    return float(value)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 0")
    return value


def _page(site: Site, request: Request) -> Response:
    facts = site.run.facts
    keeps_k = "k" in activation_facts(facts["config"]["activation"]).uses
    subject = facts["provenance"].get("subject")
    return web.page(site, request, "try", subject=subject, config=facts["config"], keeps_k=keeps_k)


_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "string", "description": "control tokens that are written out are read as such"},
        "k": {"type": ["integer", "null"], "description": "how many latents a token keeps"},
        "threshold": {"type": ["number", "null"], "description": "in place of k: what a pre-activation must exceed"},
        "edits": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["latent", "kind"],
                "properties": {
                    "latent": {"type": "integer"},
                    "kind": {"enum": ["ablate", "boost", "clamp"]},
                    "value": {"type": "number", "description": "the factor of boost, the activation of clamp"},
                },
            },
        },
        "position": {"type": ["integer", "null"], "description": "where the next token is looked at; default: last"},
        "watch": {"type": "array", "items": {"type": "integer"}, "description": "latents wanted on every token"},
        "n_continue": {"type": "integer", "description": "how many tokens are added"},
        "seed": {"type": ["integer", "null"], "description": "of a sampled continuation; greedy without"},
    },
}
_TABLE = {
    "type": "object",
    "required": ["table"],
    "properties": {"table": {"type": "string", "description": "a CSV"}, "seed": {"type": "integer"}},
}

ENDPOINTS = (
    Endpoint("/try", _page, parameters=PARAMETERS),
    Endpoint(f"{API}/try", lambda site, request: facts(site), "what can be tried; the first call loads the model"),
    Endpoint(
        f"{API}/try",
        lambda site, request: try_text(site, web.body(request)),
        "the active latents, error, losses and next tokens of a text, as it is and with latents edited",
        method="POST",
        schema=_SCHEMA,
    ),
    Endpoint(
        f"{API}/try/labelled",
        lambda site, request: try_labelled(site, web.body(request)),
        "the latents that separate the two labels of a CSV best, and what chance would find",
        method="POST",
        schema=_TABLE,
    ),
)
