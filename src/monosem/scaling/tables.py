"""The runs table: one row a run and evaluation point, read strictly, and the subsets of it that laws are fitted to.

Rows are checked before anything is fitted; an error names the lines of the file. What is left out is listed with a
reason.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from monosem import artifacts
from monosem.charts import library
from monosem.textfiles import csv_rows

log = logging.getLogger("monosem")

COLUMNS = (
    *("run", "activation", "n_latents", "k", "lr", "sparsity_coef", "activation_options", "tied_init", "auxk"),
    *("batch_size", "ema", "seed", "data_seed", "n_tokens", "tokens", "distinct_tokens", "epochs", "flops"),
    *("flops_dense_equivalent", "normalized_mse", "normalized_mse_low", "normalized_mse_high", "l0", "dead_fraction"),
    *("dead_window_tokens", "never_fired_fraction", "weights", "kernel_s", "wall_s", "impl", "subject", "layer"),
    *("location", "d_model", "finished", "status", "config_hash", "store_hash", "commit", "checkpoint", "date"),
)
"""Of a runs table, as `sweeps` writes it; docs/formats.md says what each is."""

_SETTINGS = (
    *("activation", "n_latents", "k", "lr", "sparsity_coef", "activation_options", "tied_init", "auxk", "batch_size"),
    *("ema", "seed", "data_seed", "n_tokens", "subject", "layer", "location", "store_hash"),
)
SAME_TOKENS = 1.02
"""Evaluation points whose tokens differ by less than this factor are at the same number (budgets round up)."""
_MOST_NAMED = 8


class Point(NamedTuple):
    """One evaluation point of one run; NaN where an optional number is not given."""

    line: int
    run: str
    activation: str
    n_latents: int
    k: int
    lr: float
    sparsity_coef: float
    setting: str
    """What else may move the loss: batch_size, AuxK, tied_init and the average on or off, options."""
    n_tokens: float
    """What the run was planned for, on which its dead_tokens_threshold and its average depend."""
    tokens: float
    distinct_tokens: float
    epochs: float
    flops: float
    flops_dense_equivalent: float
    normalized_mse: float
    low: float
    high: float
    l0: float
    kernel_s: float
    subject: str
    layer: str
    location: str
    d_model: int
    store_hash: str


class Excluded(NamedTuple):
    """A run that a fit leaves out, and why."""

    run: str
    reason: str


class Table(NamedTuple):
    points: list[Point]
    excluded: list[Excluded]
    sha256: str


def table_path(path: str) -> Path:
    """The file: `path` itself, or runs.csv or runs.parquet in the folder."""
    found = Path(path)
    if not path or not found.exists():
        raise ValueError(
            f"{path or 'the table'} does not exist; give a folder with runs.csv, or a .csv or .parquet file"
        )
    if found.is_file():
        return found
    for name in ("runs.csv", "runs.parquet"):
        if (found / name).exists():
            return found / name
    raise ValueError(f"{path} has no runs.csv or runs.parquet; give a folder that `monosem sweep` made, or the table")


def read_table(path: Path) -> Table:
    """The rows of a .csv or .parquet table, checked; diverged runs are left out and listed.

    `ValueError` naming the lines: a column missing, a value that is no number, k > n_latents, a run twice at one number
    of tokens, a normalized_mse that is not a positive number in a run whose status is not diverged.
    """
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    if path.name == "runs.csv" and (path.parent / "sweep.json").exists():
        runs = artifacts.read_manifest(path.parent / "sweep.json", "sweep")["runs"]
        if len(vouched(path, {run: facts["rows"] for run, facts in runs.items()})) < len(rows):
            raise ValueError(f"{path} has rows that sweep.json does not know; run the same sweep again first")
    if not rows:
        raise ValueError(f"{path} has no rows; run the sweep first")
    if missing := [name for name in COLUMNS if name not in rows[0][1]]:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has to have all that "
            "docs/formats.md lists"
        )
    diverged = {row["run"] for _, row in rows if row["status"].strip().lower() == "diverged"}
    points = [_point(path, line, row) for line, row in rows if row["run"] not in diverged]
    _refuse(
        path,
        points,
        lambda p: not (math.isfinite(p.normalized_mse) and p.normalized_mse > 0),
        "a normalized_mse that is not a positive number, and a status other than diverged",
        "correct or remove them",
    )
    _refuse(path, points, lambda p: p.k > p.n_latents, "k > n_latents", "an autoencoder has at least k latents")
    _refuse(
        path,
        points,
        lambda p: not (p.tokens > 0 and p.n_latents > 0 and p.k >= 0),
        "tokens, n_latents or k out of range",
        "they count things",
    )
    _refuse_twice(path, points)
    _warn_of_the_same([row for _, row in rows])
    if not points:
        raise ValueError(f"all {len(diverged)} runs of {path} diverged; nothing is left to fit")
    return Table(points, [Excluded(run, "diverged") for run in sorted(diverged)], artifacts.sha256_file(path))


def _refuse(path: Path, points: list[Point], wrong: Callable[[Point], bool], what: str, advice: str) -> None:
    if bad := [p for p in points if wrong(p)]:
        raise ValueError(f"{path}: {lines(bad)}: {what}; {advice}")


def _refuse_twice(path: Path, points: list[Point]) -> None:
    seen: dict[tuple[str, float], Point] = {}
    for p in points:
        if (first := seen.setdefault((p.run, p.tokens), p)) is not p:
            raise ValueError(
                f"{path}: {lines([first, p])}: one run twice at {p.tokens:,.0f} tokens; rename or remove one of them"
            )


def _warn_of_the_same(rows: list[dict[str, str]]) -> None:
    """Of runs that differ in a setting without a column, or only in how one was given: they look like two seeds."""
    seen: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        names = seen.setdefault(tuple(row[name] for name in _SETTINGS), {})
        names.setdefault(row["config_hash"], row["run"])
    for names in seen.values():
        if len(names) > 1:
            log.warning(
                "runs %s have the same settings in every column but another config_hash, and count as seeds of one "
                "another: leave one out, or give what has no column a table of its own",
                ", ".join(names.values()),
            )


def lines(points: list[Point]) -> str:
    """`lines 3, 7 (run a, b)`, a few of them, for messages."""
    numbers = ", ".join(str(p.line) for p in points[:_MOST_NAMED])
    runs = list(dict.fromkeys(p.run for p in points))
    more = f" and {len(points) - _MOST_NAMED} more" if len(points) > _MOST_NAMED else ""
    return f"line{'s' * (len(points) > 1)} {numbers}{more} (run {', '.join(runs[:_MOST_NAMED])})"


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line and cells of each row; `ValueError` when a column is there twice, or a row has other cells than columns."""
    rows = list(csv_rows(path))
    for line, row in rows:
        if None in row.values():
            raise ValueError(f"{path}, line {line} has fewer cells than there are columns; restore it from a copy")
    return rows


def csv_text(rows: list[dict[str, Any]]) -> str:
    """The rows as lines of the table."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def kept(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Number of bytes and sha256 of the rows, with which sweep.json vouches for them."""
    text = csv_text(rows).encode()
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def vouched(path: Path, known: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of a sweep's table that it vouches for, `known` by run; not those that are there beyond them.

    `ValueError` when some are missing or changed, and for rows of other runs.
    """
    advice = "restore it from a copy; a table of your own belongs in another folder"
    rows = [row for _, row in _csv_rows(path)] if path.exists() else []
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes; {advice}")
    if foreign := sorted({row["run"] for row in rows} - known.keys()):
        raise ValueError(f"{path} has rows of {foreign[0]}, a run that sweep.json does not know; {advice}")
    beyond: list[dict[str, str]] = []
    for run, facts in known.items():
        mine = [row for row in rows if row["run"] == run]
        n = next((n for n in range(len(mine) + 1) if kept(mine[:n]) == facts), None)
        if n is None:
            raise ValueError(f"{path} is not as sweep.json knows it: rows of {run} are missing or changed; {advice}")
        beyond += mine[n:]
    return [row for row in rows if not any(row is other for other in beyond)]


def _parquet_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        table = library("pyarrow.parquet", "hub").read_table(path)
    except (OSError, library("pyarrow", "hub").ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); give a .csv or .parquet table") from None
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has the column {twice[0]} twice; keep one of them")
    rows = table.to_pylist()
    return [(i + 2, {k: "" if v is None else str(v) for k, v in row.items()}) for i, row in enumerate(rows)]


def _point(path: Path, line: int, row: dict[str, str]) -> Point:
    nan = math.nan

    def number(name: str, default: float | None = None) -> float:
        text = row[name].strip()
        if not text and default is not None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.inf
        if math.isinf(value) or (math.isnan(value) and default is not nan):
            raise ValueError(f"{path}, line {line} (run {row['run']}): {name} is {row[name]!r}; give a number")
        return value

    def whole(name: str, default: float | None = None) -> int:
        value = number(name, default)
        if value != int(value):
            raise ValueError(f"{path}, line {line} (run {row['run']}): {name} is {row[name]!r}; give a whole number")
        return int(value)

    auxk = "AuxK" if number("auxk", 0) > 0 else "no AuxK"
    tied = "tied" if row["tied_init"].strip().lower() in ("true", "1") else "untied"
    ema = "average" if number("ema", 0) > 0 else "no average"
    options = "" if row["activation_options"].strip() in ("", "{}") else f", {row['activation_options'].strip()}"
    return Point(
        line=line,
        run=row["run"],
        activation=row["activation"],
        n_latents=whole("n_latents"),
        k=whole("k", 0),
        lr=number("lr"),
        sparsity_coef=number("sparsity_coef", 0.0),
        setting=f"batch {row['batch_size']}, {auxk}, {tied}, {ema}{options}",
        n_tokens=number("n_tokens"),
        tokens=number("tokens"),
        distinct_tokens=number("distinct_tokens", nan),
        epochs=number("epochs", nan),
        flops=number("flops", nan),
        flops_dense_equivalent=number("flops_dense_equivalent", nan),
        normalized_mse=number("normalized_mse", nan),
        low=number("normalized_mse_low", nan),
        high=number("normalized_mse_high", nan),
        l0=number("l0", nan),
        kernel_s=number("kernel_s", nan),
        subject=row["subject"],
        layer=row["layer"],
        location=row["location"],
        d_model=whole("d_model"),
        store_hash=row["store_hash"],
    )


def one_site(path: Path, points: list[Point], subject: str | None) -> list[Point]:
    """The points of `subject` (of the only one, when None); `ValueError` on several subjects or sites."""
    subjects = sorted({p.subject for p in points})
    if subject is None and len(subjects) > 1:
        first = [next(p for p in points if p.subject == s) for s in subjects]
        raise ValueError(
            f"{path} mixes the subjects {', '.join(subjects)} (first at {lines(first)}); choose one with "
            "--subject, or give --families for L_s(N) across them"
        )
    if subject is not None and subject not in subjects:
        raise ValueError(f"{path} has no subject {subject!r}; it has {', '.join(subjects)}")
    mine = [p for p in points if subject is None or p.subject == subject]
    sites = sorted({(p.layer, p.location, p.d_model) for p in mine})
    if len(sites) > 1:
        first = [next(p for p in mine if (p.layer, p.location, p.d_model) == s) for s in sites]
        named = "; ".join(f"layer {layer} {location}, d_model {d}" for layer, location, d in sites)
        raise ValueError(f"{path} mixes sites of one subject ({named}; first at {lines(first)}); split it: one a fit")
    return mine


def of_main_setting(points: list[Point]) -> tuple[list[Point], list[Excluded]]:
    """The points in the setting of most runs, and the runs in others."""
    runs = {p.run: p.setting for p in points}
    if not runs:
        return [], []
    main = min(Counter(runs.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    other = [Excluded(r, f"another setting ({s}) than most runs ({main})") for r, s in runs.items() if s != main]
    return [p for p in points if p.setting == main], other


def same_tokens(a: float, b: float) -> bool:
    """Whether two evaluation points are at the same number of tokens."""
    return 1 / SAME_TOKENS <= a / b <= SAME_TOKENS


def token_groups(points: list[Point]) -> dict[int, list[Point]]:
    """Points by their number of tokens; numbers closer than SAME_TOKENS are one, named by the smallest."""
    groups: dict[int, list[Point]] = {}
    name = 0
    for p in sorted(points, key=lambda p: p.tokens):
        if not name or p.tokens > name * SAME_TOKENS:
            name = int(p.tokens)
        groups.setdefault(name, []).append(p)
    return groups


def fixed_tokens(points: list[Point], tokens: int | None) -> int:
    """The number of tokens at which most (n_latents, k) were evaluated, the largest of equals; or the one asked for."""
    groups = token_groups(points)
    if tokens is None:
        return max(groups, key=lambda t: (len({(p.n_latents, p.k) for p in groups[t]}), t))
    near = min(groups, key=lambda t: abs(math.log(t / tokens)))
    if not same_tokens(near, tokens):
        raise ValueError(
            f"no run was evaluated at {tokens:,} tokens; runs were at {', '.join(f'{t:,}' for t in groups)}"
        )
    return near


def at_tokens(points: list[Point], tokens: int) -> tuple[list[Point], list[Excluded]]:
    """Of each run the point at `tokens`; and the runs that have none, or were planned for other n_tokens than most."""
    at = {p.run: p for p in token_groups(points)[tokens]}
    planned = min(Counter(p.n_tokens for p in at.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    rest = sorted({p.run for p in points} - set(at))
    excluded = [Excluded(r, f"not evaluated at {tokens:,} tokens") for r in rest]
    for p in at.values():
        if p.n_tokens != planned:
            excluded.append(Excluded(p.run, f"planned for {p.n_tokens:,.0f} tokens, most for {planned:,.0f}"))
    return [p for p in at.values() if p.n_tokens == planned], excluded


def best_lr(points: list[Point]) -> tuple[list[Point], list[Excluded]]:
    """Of each (activation, n_latents, k, sparsity_coef) the runs at the lr with the lowest mean NMSE over seeds."""
    cells: dict[tuple[Any, ...], dict[float, list[Point]]] = {}
    for p in points:
        cells.setdefault((p.activation, p.n_latents, p.k, p.sparsity_coef), {}).setdefault(p.lr, []).append(p)
    kept, excluded = [], []
    for by_lr in cells.values():
        mean = {lr: sum(p.normalized_mse for p in ps) / len(ps) for lr, ps in by_lr.items()}
        best = min(mean, key=lambda lr: (mean[lr], lr))
        kept += by_lr[best]
        excluded += [
            Excluded(p.run, f"lr {lr:g} gives {mean[lr]:.4f}, lr {best:g} gives {mean[best]:.4f}")
            for lr, ps in by_lr.items()
            if lr != best
            for p in ps
        ]
    return sorted(kept, key=lambda p: p.line), excluded


class Convergence(NamedTuple):
    """Where a run converged: tokens (NaN if it did not), its NMSE there, and why not."""

    point: Point
    tokens: float
    reason: str


def converged(points: list[Point], gain: float = 0.01) -> list[Convergence]:
    """Of each run, its last point within one epoch, and the distinct tokens where a doubling first gained < `gain`.

    A gain is 1 − NMSE(2T)/NMSE(T) between evaluation points a doubling apart (ratio 1.8 to 2.2, scaled to 2); the
    tokens are interpolated, in logs, between the doubling that gained too much and the one that did not.
    """
    found = []
    for run in dict.fromkeys(p.run for p in points):
        mine = sorted((p for p in points if p.run == run and p.epochs <= 1 + 1e-9), key=lambda p: p.distinct_tokens)
        if not mine:
            first = next(p for p in points if p.run == run)
            found.append(Convergence(first, math.nan, "no evaluation point within one epoch"))
            continue
        gains = _doublings(mine)
        tokens, reason = _crossing(gains, gain)
        found.append(Convergence(mine[-1], tokens, reason))
    return found


def _doublings(mine: list[Point]) -> list[tuple[float, float]]:
    """(distinct tokens after it, gain) of each doubling."""
    gains = []
    for after in mine:
        before = [p for p in mine if 1.8 <= after.distinct_tokens / p.distinct_tokens <= 2.2]
        if before:
            p = min(before, key=lambda p: abs(math.log(after.distinct_tokens / p.distinct_tokens / 2)))
            power = math.log(2) / math.log(after.distinct_tokens / p.distinct_tokens)
            gains.append((after.distinct_tokens, 1 - (after.normalized_mse / p.normalized_mse) ** power))
    return gains


def _crossing(gains: list[tuple[float, float]], gain: float) -> tuple[float, str]:
    if not gains:
        return math.nan, "no two evaluation points a doubling of distinct tokens apart"
    for i, (tokens, g) in enumerate(gains):
        if g < gain:
            if i == 0 or g <= 0:
                return tokens, ""
            before, g_before = gains[i - 1]
            share = math.log(g_before / gain) / math.log(g_before / g)
            return math.exp(math.log(before) + share * math.log(tokens / before)), ""
    tokens, g = gains[-1]
    return math.nan, f"still gained {100 * g:.1f}% in the doubling to {tokens:,.0f} distinct tokens"


def nan_to_none(value: Any) -> Any:
    """The value as JSON has it: None for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def families(path: str, subjects: set[str]) -> dict[str, tuple[str, float]]:
    """Subject -> (family, parameters) from a JSON object {"subject": {"family": "name", "parameters": 135e6}, ...}.

    `ValueError` for another form, and when one of `subjects` is not in it.
    """
    data = artifacts.read_json(path)
    try:
        found = {str(name): (str(entry["family"]), float(entry["parameters"])) for name, entry in data.items()}
        wrong = [name for name, (_, parameters) in found.items() if not 0 < parameters < math.inf]
    except (AttributeError, KeyError, TypeError, ValueError):
        form = json.dumps({"SUBJECT": {"family": "NAME", "parameters": 135e6}})
        raise ValueError(f"{path} is not of the form {form}; give one entry a subject") from None
    if wrong:
        raise ValueError(f"{path}: parameters of {', '.join(wrong)} must be a positive number")
    if missing := sorted(subjects - set(found)):
        raise ValueError(f"{path} has no entry for {', '.join(missing)}; give each subject's family and size")
    return found
