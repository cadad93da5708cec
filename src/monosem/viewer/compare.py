"""Two autoencoders beside each other: their numbers, which latents of one are in the other, and which are not.

Latents are matched two ways. By direction: the other's latent with the largest cosine between decoder rows, exact, both
ways; a pair is mutual when each is the other's best. By firing together, where both were explained on the same tokens:
the other's latent with the largest Jaccard index |tokens with both| / |tokens with either|, over the tokens on which
each is active in its strongest contexts (`top_activations`), since those are what an explanation keeps.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from monosem import artifacts
from monosem.definitions import definition, sections
from monosem.viewer import web
from monosem.viewer.reading import Run
from monosem.viewer.web import API, Endpoint, Site

MATCHED = 0.7
"""Two latents are called the same from this cosine on."""
PAGE_ROWS = 50
N_BINS = 40
MIN_TOGETHER = 5
"""Tokens on which two latents have to meet, below which their Jaccard index is noise."""
SHOWS = {"all": "all", "mutual": "mutual matches", "alone": "without a match"}
ORDERS = ("cosine", "-cosine", "latent")
PARAMETERS = {
    "with": "name of the other run",
    "side": "a: latents of this run and their matches; b: the other way round",
    "show": "all, mutual or alone: without a match",
    "order": "cosine, -cosine (largest first) or latent",
    "page": "from 1",
}
_ROWS_AT_ONCE = 2048
_N_RANDOM = 512
_KEPT = 4
_WAIT_S = 0.1


class Best(NamedTuple):
    """For each latent its best match on the other side (-1: none) and how good it is."""

    latent: np.ndarray
    score: np.ndarray


class Matches(NamedTuple):
    """Best matches of a's latents and of b's."""

    cosine: tuple[Best, Best]
    together: tuple[Best, Best] | None
    reason: str
    """Why `together` was not computed."""
    chance: float
    """Mean over random directions of the largest cosine with a latent of b."""


def others(site: Site) -> dict[str, Path]:
    """The runs that this one can be compared with, by name: those given at the start, then those in the same folder."""
    own = site.run.folder.resolve()
    beside = sorted(p for p in own.parent.iterdir() if (p / "autoencoder/config.json").is_file())
    found: dict[str, Path] = {}
    for folder in (*site.others, *beside):
        name = folder.resolve().name
        if folder.resolve() != own and folder.resolve() not in found.values():
            found[name if name not in found else f"{name} in {folder.resolve().parent}"] = folder.resolve()
    return found


def view(a: Run, b: Run) -> dict[str, Any]:
    """What is known of both without looking at their latents, as JSON."""
    return {"a": a.name, "b": b.name, "facts": facts(a, b), "metrics": metrics(a, b), "unlike": unlike(a, b)}


def facts(a: Run, b: Run) -> list[dict[str, Any]]:
    """What they are, line by line."""

    def of(run: Run) -> dict[str, Any]:
        of, config = run.facts["provenance"], run.facts["config"]
        site, recipe, train = of.get("site") or {}, of.get("recipe") or {}, of.get("train") or {}
        return {
            "Subject": of.get("subject"),
            "Site": site and f"layer {site['layer']}, {site['location']}",
            "Latents": f"{config['n_latents']:,}",
            "Activation": f"{config['activation']}, k = {config['k']}",
            "Training": of.get("tokens_seen") and f"{of['tokens_seen']:,} token-visits, {of['epochs']:.3g} epochs",
            "Recipe": recipe and f"lr {recipe['lr']:.3g}, batch {recipe['batch_size']:,}, seed {train.get('seed', 0)}",
        }

    both = of(a), of(b)
    return [{"label": label, "a": both[0][label] or None, "b": both[1][label] or None} for label in both[0]]


def metrics(a: Run, b: Run) -> list[dict[str, Any]]:
    """By section, every number that either's evaluation has; `apart` where the intervals do not meet."""
    reports = [run.report["metrics"] if run.report is not None else {} for run in (a, b)]
    names = dict.fromkeys([*reports[0], *reports[1]])
    found = []
    for title, rows in sections(names).items():
        lines = []
        for row in rows:
            x, y = (report.get(row.name) for report in reports)
            apart = x is not None and y is not None and (x["high"] < y["low"] or y["high"] < x["low"])
            lines.append({"name": row.name, "meaning": definition(row.name) or "", "a": x, "b": y, "apart": apart})
        found.append({"title": title, "rows": lines})
    return found


def unlike(a: Run, b: Run) -> str | None:
    """Why no latent of one can be found in the other; None where it can."""
    if a.facts["config"]["d_model"] != b.facts["config"]["d_model"]:
        return "they read activations of different widths"
    places = [(run.facts["provenance"].get("site") or {}) for run in (a, b)]
    if all(places) and len({(place["layer"], place["location"]) for place in places}) > 1:
        return "they are of different sites, so their directions have nothing to do with each other"
    subjects = [run.facts["sources"].get("subject") for run in (a, b)]
    if all(subjects) and len(set(subjects)) > 1:
        return "they are of different subjects, so their directions have nothing to do with each other"
    return None


def match(a: Run, b: Run) -> Matches:
    """Every latent's best match, both ways. `ValueError` when the weights cannot be read."""
    reason = _not_on_the_same_tokens(a, b)
    with _decoder(a) as x, _decoder(b) as y:
        rng = np.random.default_rng(0)
        random = rng.standard_normal((_N_RANDOM, a.facts["config"]["d_model"]), dtype=np.float32)
        chance = float(best_cosines(random, y)[0].score.mean())
        cosine = best_cosines(x, y)
    together = None if reason else best_together(*active_tokens(a, b), a.n_latents, b.n_latents)
    return Matches(cosine, together, reason or "", chance)


def best_cosines(a: Any, b: Any) -> tuple[Best, Best]:
    """For each row of `a` the row of `b` with the largest cosine, and the other way round; ties take the first."""
    best = tuple(Best(np.full(len(m), -1, np.int32), np.full(len(m), -np.inf, np.float32)) for m in (a, b))
    for rows, x in _unit_rows(a):
        for columns, y in _unit_rows(b):
            cosine = x @ y.T
            for one, here, there, axis in ((best[0], rows, columns, 1), (best[1], columns, rows, 0)):
                at = cosine.argmax(axis)
                score = np.take_along_axis(cosine, np.expand_dims(at, axis), axis).squeeze(axis)
                better = score > one.score[here]
                one.score[here][better] = score[better]
                one.latent[here][better] = at[better] + there.start
    return best[0], best[1]


def active_tokens(a: Run, b: Run) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """For each run the pairs (token, latent) active in the latents' top examples, tokens numbered alike for both."""
    names = ("contexts", "contexts_document", "contexts_position")
    contexts = [np.concatenate([np.asarray(run.column(name)) for name in names], axis=1) for run in (a, b)]
    _, number = np.unique(np.concatenate(contexts), axis=0, return_inverse=True)
    numbers = np.split(number.reshape(-1), [len(contexts[0])])
    return tuple(_pairs(run, own) for run, own in zip((a, b), numbers, strict=True))  # type: ignore[return-value]


def best_together(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], n_a: int, n_b: int
) -> tuple[Best, Best]:
    """For each latent of either side the other's with the largest Jaccard index of their tokens; -1 for none.

    `a` and `b` are pairs of (tokens, latents), each pair once.
    """
    sizes = np.bincount(a[1], minlength=n_a), np.bincount(b[1], minlength=n_b)
    order = np.argsort(b[0], kind="stable")
    tokens, partners = b[0][order], b[1][order]
    low, high = np.searchsorted(tokens, a[0], "left"), np.searchsorted(tokens, a[0], "right")
    by_latent = np.argsort(a[1], kind="stable")
    ends = np.searchsorted(a[1][by_latent], np.arange(0, n_a + _ROWS_AT_ONCE, _ROWS_AT_ONCE))
    best = tuple(Best(np.full(n, -1, np.int32), np.zeros(n, np.float32)) for n in (n_a, n_b))
    for start, end in itertools.pairwise(ends):
        mine = by_latent[start:end]
        n = (high - low)[mine]
        at = np.repeat(low[mine] - (np.cumsum(n) - n), n) + np.arange(n.sum())
        cells, both = np.unique(np.repeat(a[1][mine].astype(np.int64), n) * n_b + partners[at], return_counts=True)
        cells, both = cells[both >= MIN_TOGETHER], both[both >= MIN_TOGETHER]
        i, j = np.divmod(cells, n_b)
        jaccard = (both / (sizes[0][i] + sizes[1][j] - both)).astype(np.float32)
        for one, here, there in ((best[0], i, j), (best[1], j, i)):
            first = np.lexsort((there, -jaccard, here))
            first = first[np.r_[True, np.diff(here[first]) != 0][: len(first)]]
            better = first[jaccard[first] > one.score[here[first]]]
            one.score[here[better]], one.latent[here[better]] = jaccard[better], there[better]
    return best[0], best[1]


def summary(matches: Matches) -> dict[str, Any]:
    """How many latents of each side have a match, with histograms of the best cosines, as JSON."""
    edges = np.linspace(0, 1, N_BINS + 1)
    sides = {}
    for name, one in zip("ab", matches.cosine, strict=True):
        counts, _ = np.histogram(np.clip(one.score, 0, 1), edges)
        sides[name] = {
            "n_latents": len(one.score),
            "n_matched": int((one.score >= MATCHED).sum()),
            "median": float(np.median(one.score)),
            "histogram": counts.tolist(),
        }
    mutual = _mutual(matches, 0)
    return {
        **sides, "edges": edges.round(4).tolist(), "matched": MATCHED, "chance": matches.chance,
        "n_mutual": int(mutual.sum()), "n_mutual_matched": int((mutual & (matches.cosine[0].score >= MATCHED)).sum()),
        "together": matches.reason or None,
    }  # fmt: skip


def rows(a: Run, b: Run, matches: Matches, query: dict[str, str]) -> dict[str, Any]:
    """A page of the latents of one side with their matches on the other, as JSON. `ValueError` for a wrong query."""
    side, show, order = query.get("side", "a"), query.get("show", "all"), query.get("order", "-cosine")
    page = query.get("page", "1")
    if side not in ("a", "b") or show not in SHOWS or order not in ORDERS or not page.isdecimal() or len(page) > 9:
        raise ValueError(f"side, show, order, page are {side}, {show}, {order}, {page}; choose a or b; "
                         f"{', '.join(SHOWS)}; {', '.join(ORDERS)}; a number")  # fmt: skip
    which = int(side == "b")
    own, other = (b, a) if which else (a, b)
    best, mutual = matches.cosine[which], _mutual(matches, which)
    chosen = {"all": np.ones_like(mutual), "mutual": mutual, "alone": best.score < MATCHED}[show]
    key = {"latent": np.arange(len(mutual)), "cosine": best.score, "-cosine": -best.score}[order]
    found = np.flatnonzero(chosen)
    found = found[np.argsort(key[chosen], kind="stable")]
    n_pages = max(1, -(-len(found) // PAGE_ROWS))
    at = found[(max(int(page), 1) - 1) * PAGE_ROWS :][:PAGE_ROWS]
    together = None if matches.together is None else matches.together[which]
    density, partners = own.column("density"), best.latent[at]
    fires = own.peak_tokens(at, 20), other.peak_tokens(partners, 20)
    lines = [
        {
            "latent": int(i),
            "fires_on": fires[0][row][:4],
            "never_fired": density is not None and bool(density[i] == 0),
            "match": int(best.latent[i]),
            "cosine": float(best.score[i]),
            "mutual": bool(mutual[i]),
            "match_fires_on": fires[1][row][:4],
            "together": None if together is None or together.latent[i] < 0 else int(together.latent[i]),
            "jaccard": None if together is None or together.latent[i] < 0 else float(together.score[i]),
        }
        for row, i in enumerate(at)
    ]
    state = {"side": side, "show": show, "order": order, "page": max(int(page), 1)}
    return {**state, "n_pages": n_pages, "total": len(found), "rows": lines}


def _mutual(matches: Matches, which: int) -> np.ndarray:
    one, other = matches.cosine[which], matches.cosine[1 - which]
    return other.latent[one.latent] == np.arange(len(one.latent))


def _not_on_the_same_tokens(a: Run, b: Run) -> str | None:
    for run in (a, b):
        if run.explanation is None:
            return f"{run.name} has no explanation: {run.command('collect')}"
    first, second = (run.explanation.manifest for run in (a, b) if run.explanation is not None)
    if first["sources"]["store"] != second["sources"]["store"] or first["n_tokens"] != second["n_tokens"]:
        return "they were explained on different tokens: explain both with the same --store and --n-tokens"
    return None


def _pairs(run: Run, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(token, latent) of what is active in the run's top examples; `numbers` are those of its contexts."""
    context, activations = run.column("top_context"), run.column("top_activations")
    assert context is not None and activations is not None, "every explanation has examples"
    found = []
    for start in range(0, len(context), _ROWS_AT_ONCE):
        latent, example, position = np.nonzero(activations[start : start + _ROWS_AT_ONCE] > 0)
        row = context[start : start + _ROWS_AT_ONCE][latent, example]
        token = numbers[row].astype(np.int64) * activations.shape[2] + position
        found.append(np.unique(np.stack([token, latent + start], axis=1)[row >= 0], axis=0))
    tokens, latents = np.concatenate(found).T
    return tokens, latents


class _decoder:
    """The decoder of a run, row by row from the disk; `ValueError` when it cannot be read."""

    def __init__(self, run: Run) -> None:
        folder = run.folder / "autoencoder" if (run.folder / "autoencoder/config.json").exists() else run.folder
        self.path, self.n = folder / "autoencoder.safetensors", run.n_latents

    def __enter__(self) -> _decoder:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(self.path, "numpy").__enter__()
            self._rows = self._file.get_slice("decoder")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); restore it from a copy") from None
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._rows[rows]


def _unit_rows(matrix: Any) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(matrix)))
        block = np.asarray(matrix[rows], dtype=np.float32)
        yield rows, block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)


_POOL = ThreadPoolExecutor(1, "compare")
_FOUND: dict[tuple[Any, ...], Future[Matches]] = {}
_LOCK = threading.Lock()


def matching(a: Run, b: Run) -> Future[Matches]:
    """`match`, begun once and then kept; of the latest few pairs."""
    key = (a.folder, a.stamp, b.folder, b.stamp)
    with _LOCK:
        if key not in _FOUND:
            while len(_FOUND) >= _KEPT:
                _FOUND.pop(next(iter(_FOUND)))
            _FOUND[key] = _POOL.submit(match, a, b)
        return _FOUND[key]


@functools.lru_cache(maxsize=_KEPT)
def _opened(folder: Path) -> list[Run]:
    return [Run(folder)]


def _other(site: Site, request: Request) -> Run | None:
    """The run named in the address; None where there is none. 404 for a name that is not one of `others`."""
    name = request.query_params.get("with")
    if not name:
        return None
    folder = others(site).get(name)
    if folder is None:
        raise HTTPException(404, f"there is no run {name!r} to compare with; choose one of those on /compare")
    kept = _opened(folder)
    if not kept[0].fresh:
        kept[0] = Run(folder)
    return kept[0]


def _page(site: Site, request: Request) -> Response:
    a, b = site.run, _other(site, request)
    found: dict[str, Any] = {"view": None, "summary": None, "table": None, "waiting": False, "other": b}
    if b is not None:
        found["view"] = view(a, b)
        if found["view"]["unlike"] is None:
            try:
                matches = matching(a, b).result(_WAIT_S)
                query = {k: v for k, v in request.query_params.items() if v}
                found |= {"summary": summary(matches), "table": rows(a, b, matches, query)}
            except TimeoutError:
                found["waiting"] = True
    names = {name: _n_latents(folder) for name, folder in others(site).items()}
    return web.page(
        site, request, "compare", names=names, chosen=request.query_params.get("with"), shows=SHOWS, **found
    )


def _n_latents(folder: Path) -> int | None:
    path = next(p for p in (folder / "autoencoder/config.json", folder / "config.json") if p.exists())
    try:
        return artifacts.read_manifest(path, "autoencoder")["config"]["n_latents"]
    except (ValueError, KeyError, TypeError):
        return None


def _api(site: Site, request: Request) -> dict[str, Any]:
    a, b = site.run, _other(site, request)
    if b is None:
        return {"with": list(others(site))}
    found = view(a, b)
    if found["unlike"] is not None:
        return {**found, "summary": None, "table": None}
    matches = matching(a, b).result()
    return {**found, "summary": summary(matches), "table": rows(a, b, matches, dict(request.query_params))}


ENDPOINTS = (
    Endpoint("/compare", _page, parameters=PARAMETERS),
    Endpoint(
        f"{API}/compare", _api, "two runs' numbers, and a page of matched latents; without `with` its choices",
        PARAMETERS,
    ),
)  # fmt: skip
