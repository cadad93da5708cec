"""Labelled texts -> tasks: read, de-duplicated, grouped, audited, and split so that no group is on both sides.

A task is a binary question about texts. Sets of labelled texts leak: the same prompt twice, a question with four
answers, a length or a last character that tells the label. So texts are compared after folding case and spaces,
near-identical ones form a group, halves are made of whole groups, and `audit` says what gives the label away.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from monosem import resources
from monosem.corpora import SAE_PROBES_TEXT, hub_rows
from monosem.textfiles import csv_rows, listed, stem_of, tidied

log = logging.getLogger("monosem")

SUFFIXES = (".csv", ".tsv")

GAO61 = "gao61"
"""The sets of `sae-probes-text` that stand for tasks of Gao et al. 2024 (`PAPER_TASKS`), but for the broken ones."""

LENGTH_AUC_LIMIT = 0.9
LAST_CHARACTER_LIMIT = 0.9
"""A set is broken when its label follows from the text's length (AUC, either way) or last character (accuracy)."""

_OPENING_CHARACTERS = 40
_TEMPLATE_SHARE = 0.02
_MIN_PER_CLASS = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """Distinct texts with their labels, in the order of the source."""

    name: str
    texts: list[str]
    labels: list[int]
    """0 or 1."""
    given_groups: list[str | None]
    """What the source says that each text belongs to."""
    values: tuple[str, str]
    """What the source calls the labels 0 and 1."""
    n_rows: int
    """Rows of the source, repeated texts included."""
    n_conflicting: int
    """Texts left out because the source gives them both labels."""
    repeats: list[int]
    """Rows of the source that each text stands for."""

    @functools.cached_property
    def groups(self) -> list[int]:
        """Texts that must stay on one side of a split share a number (`groups_of`)."""
        return groups_of(self.texts, self.given_groups)


class PaperTask(NamedTuple):
    """A task of Gao et al. 2024 and what stands for it here."""

    name: str
    stem: str | None
    """File of `sae-probes-text`; None when there is none."""
    note: str = "same data set; sampled and put into prompts by the authors of sae-probes"
    confidence: str = "high"
    """That the paper has such a task: high, or medium where it cites a collection and this is one of its sets."""


_PHRASES = (
    *("high-school", "living-room", "social-security", "credit-card", "blood-pressure", "prime-factors"),
    *("social-media", "gene-expression", "control-group", "magnetic-field", "cell-lines", "trial-court"),
    *("second-derivative", "north-america", "human-rights", "side-effects", "public-health", "federal-government"),
    *("third-party", "clinical-trials", "mental-health"),
)
_OCCUPATIONS = ("journalist", "athlete", "actor", "politician", "singer", "researcher")

PAPER_TASKS = (
    PaperTask("amazon", "157_amazon_5star", "reviews of the same shop; five stars or fewer; sample not the paper's"),
    PaperTask("sciq", "36_sciq_tf"),
    PaperTask("truthfulqa", "41_truthqa_tf"),
    PaperTask("mc_taco", "42_temp_sense"),
    PaperTask("piqa", "44_phys_tf"),
    PaperTask(
        "quail", None, "only with four answers (45_context_ans); how the paper made it binary is not public to us"
    ),
    PaperTask("quartz", "47_reasoning_tf"),
    PaperTask("deontology", "50_deon_isvalid"),
    PaperTask("justice", "51_just_is"),
    PaperTask("virtue", "52_virtue_is"),
    PaperTask("utilitarianism", None, "not in sae-probes"),
    PaperTask("commonsense_qa", "54_cs_tf"),
    PaperTask("openbookqa", None, "only with four answers (55_open_qa)"),
    PaperTask("wikidata_sex_or_gender", "56_wikidatasex_or_gender"),
    PaperTask("wikidata_isalive", "57_wikidatais_alive"),
    PaperTask("wikidata_political_party", "58_wikidatapolitical_party"),
    *(
        PaperTask(f"wikidata_occupation_is{name}", f"{number}_wikidata_occupation_is{name}")
        for number, name in enumerate(_OCCUPATIONS, 59)
    ),
    *(PaperTask(f"phrase_{name}", f"{number}_{name}") for number, name in enumerate(_PHRASES, 65)),
    PaperTask("social_iqa", None, "only with three answers (86_social_iqa)"),
    PaperTask("cola", "87_glue_cola", confidence="medium"),
    PaperTask("mrpc", "89_glue_mrpc", confidence="medium"),
    PaperTask("qnli", "90_glue_qnli", confidence="medium"),
    PaperTask("qqp", "91_glue_qqp", confidence="medium"),
    PaperTask("sst2", "92_glue_sst2", confidence="medium"),
    PaperTask("jigsaw", "95_toxic_is", confidence="medium"),
    PaperTask("agnews", None, "161-163_agnews_* are broken: their negatives are source code"),
    PaperTask("europarl", None, "not in sae-probes; which languages is not public to us"),
)
"""What is believed of the paper's 61 tasks, from the data sets it cites and the notes ("From Gao") in the list of sets
inside sae-probes 0.4.2. The others, and the sample, prompt and pooling of any, are not public to us."""


def load(source: str) -> list[Task]:
    """The tasks of `source`, sorted by name.

    A .csv or .tsv file, perhaps packed, or a folder of them (columns `text`, `label` of two values, and perhaps
    `group`: one task a file),
    `hf:NAME[:CONFIG[:SPLIT]]` with the same columns, or the named suites `sae-probes-text` and `gao61`, from which
    broken sets are left out, with the reason in the log. `ValueError` names the file and the line.
    """
    if source in (SAE_PROBES_TEXT, GAO61):
        tasks = sae_probes([task.stem for task in PAPER_TASKS if task.stem] if source == GAO61 else None)
        broken = {task.name: reason for task in tasks if (reason := broken_by(giveaways(task)))}
        for name, reason in broken.items():
            log.info("probe set %s is left out: %s", name, reason)
        return [task for task in tasks if task.name not in broken]
    if source.startswith("hf:"):
        return [make(source, source, _hub_rows(source))]
    path = Path(source).expanduser()
    files = listed(path, SUFFIXES, deep=False) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no .csv file; give a folder of them with the columns text and label")
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a .csv file, a folder of them, hf:NAME or {SAE_PROBES_TEXT}")
    files.sort(key=lambda file: stem_of(file, SUFFIXES))
    for one, other in itertools.pairwise(files):
        if stem_of(one, SUFFIXES) == stem_of(other, SUFFIXES):
            raise ValueError(f"{one} and {other} are tasks of one name; rename one of them")
    return [
        make(stem_of(file, SUFFIXES), str(file), labelled_rows(_tidied(csv_rows(file)), str(file))) for file in files
    ]


def sae_probes(stems: Iterable[str] | None = None) -> list[Task]:
    """The sets of `sae-probes-text` whose label has two values (113), or those named; the broken ones too."""
    folder = resources.fetch(SAE_PROBES_TEXT)
    tasks = []
    for path in sorted(folder.glob("*.csv.zst"), key=lambda path: int(path.name.split("_")[0])):
        name = path.name.removesuffix(".csv.zst")
        if stems is not None and name not in stems:
            continue
        try:
            tasks.append(make(name, str(path), labelled_rows(csv_rows(path), str(path), "prompt", "target")))
        except _NotBinaryError:
            log.debug("%s has more than two labels: no task", path)
    return tasks


def make(name: str, where: str, rows: Iterable[tuple[str, str, str, str | None]]) -> Task:
    """A task from rows of (place for messages, text, label, group or None).

    Texts that are equal but for case and spaces are one, the first; with both labels they are left out and counted.
    The labels are 0 and 1 in the order of their values (numbers by size). `ValueError` for an empty text, a third
    label, only one, or fewer than 20 distinct texts of each: too few to give each half 10.
    """
    seen: dict[str, list[Any]] = {}  # by folded text: the text, its label, its group, its rows, whether they agree
    labels: dict[str, str] = {}
    n_rows = 0
    for place, text, label, group in rows:
        n_rows += 1
        if not text.strip():
            raise ValueError(f"{place} has an empty text; delete the row or fill it in")
        labels.setdefault(label, place)
        if len(labels) > 2:
            raise _NotBinaryError(f"{place} has a third label, {label!r}, beside {list(labels)[:2]}; give two labels")
        entry = seen.setdefault(folded(text), [text.strip(), label, group, 0, True])
        entry[3] += 1
        entry[4] = entry[4] and entry[1] == label
    if len(labels) < 2:
        raise ValueError(f"{where} has {len(labels)} label {list(labels)} in {n_rows} rows; a task needs two")
    values = _ordered(*labels)
    kept = [entry for entry in seen.values() if entry[4]]
    counts = Counter(entry[1] for entry in kept)
    if min(counts[value] for value in values) < 2 * _MIN_PER_CLASS:
        found = ", ".join(f"{counts[value]} of {value!r}" for value in values)
        raise ValueError(
            f"{where} has too few texts: {found} that are distinct; give {2 * _MIN_PER_CLASS} or more of each label"
        )
    texts = [entry[0] for entry in kept]
    given = [entry[2] for entry in kept]
    found_labels = [values.index(entry[1]) for entry in kept]
    repeats = [entry[3] for entry in kept]
    return Task(name, texts, found_labels, given, values, n_rows, len(seen) - len(kept), repeats)


def folded(text: str) -> str:
    """The text without differences of case and space."""
    return " ".join(text.casefold().split())


def groups_of(texts: list[str], given: list[str | None]) -> list[int]:
    """For each text the number of its group: the smallest index of a text in it.

    Joined are texts of the same given group, texts that are equal but for case, punctuation and numbers, and texts
    with the same first 40 characters in that sense (a question with each of its answers, a story with each of its
    questions). What more than 2% of the texts share is taken for a template of the set and joins nothing.
    """
    parents = list(range(len(texts)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    members: dict[tuple[str, str], list[int]] = {}
    for i, (text, group) in enumerate(zip(texts, given, strict=True)):
        plain = re.sub(r"\d+", "0", re.sub(r"[\W_]+", " ", folded(text)).strip())
        members.setdefault(("whole", plain), []).append(i)
        if len(plain) > _OPENING_CHARACTERS:
            members.setdefault(("opening", plain[:_OPENING_CHARACTERS]), []).append(i)
        if group is not None:
            members.setdefault(("given", group), []).append(i)
    template = max(8, _TEMPLATE_SHARE * len(texts))
    for (kind, _), indices in members.items():
        if kind == "given" or len(indices) <= template:
            first, *others = sorted(root(i) for i in indices)
            for other in others:
                parents[other] = first
    return [root(i) for i in range(len(texts))]


def split(task: Task, *, n_texts: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the texts to train on and of those held out: about `n_texts` together (or all), half each.

    Whole groups, in the order of a seeded hash, go to the half that has fewer texts of their (first text's) label, so
    both halves have about the task's share of each label. `ValueError` when a half has fewer than 10 of a label, as
    when one group is most of the task.
    """
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(task.groups):
        groups.setdefault(group, []).append(i)
    share = min(1.0, n_texts / len(task.texts))
    room = [math.ceil(share * task.labels.count(label) / 2) for label in (0, 1)]
    halves: tuple[list[int], list[int]] = ([], [])
    n = [[0, 0], [0, 0]]  # texts by half and label
    for first in sorted(groups, key=lambda first: _seeded(seed, task.texts[first])):
        label = task.labels[first]
        half = int(n[1][label] < n[0][label])
        if n[half][label] < room[label]:
            halves[half].extend(groups[first])
            for i in groups[first]:
                n[half][task.labels[i]] += 1
    if min(map(min, n)) < _MIN_PER_CLASS:
        raise ValueError(
            f"{task.name} cannot be halved: its {len(groups)} groups of near-identical texts leave {n[0]} and {n[1]} "
            f"texts of each label; each half needs {_MIN_PER_CLASS} of both: give more different texts"
        )
    return halves


def audit(task: Task) -> dict[str, Any]:
    """What a person should know before believing a probe on this set, a row of results/probes/audit.csv.

    duplicate_share: share of rows that would have the same text on the other side of a random half-and-half split of
    the rows, Σ_texts r (1 - 2^(1-r)) / rows for a text of r rows. The last two are `giveaways`.
    """
    sizes = Counter(task.groups)
    crossing = sum(r * (1 - 2 ** (1 - r)) for r in task.repeats)
    return {
        "task": task.name,
        "n_rows": task.n_rows,
        "n_texts": len(task.texts),
        "n_conflicting": task.n_conflicting,
        "duplicate_share": crossing / sum(task.repeats),
        "n_groups": len(sizes),
        "largest_group": max(sizes.values()),
        "label_1": task.values[1],
        "share_of_label_1": sum(task.labels) / len(task.labels),
        **giveaways(task),
    }


def giveaways(task: Task) -> dict[str, float]:
    """length_auc, of the number of characters, and last_character_accuracy, of each one's commoner label."""
    lengths = [float(len(text)) for text in task.texts]
    last = Counter((text[-1], label) for text, label in zip(task.texts, task.labels, strict=True))
    hits = sum(max(last[character, 0], last[character, 1]) for character in {character for character, _ in last})
    return {"length_auc": _auc(lengths, task.labels), "last_character_accuracy": hits / len(task.texts)}


def broken_by(found: dict[str, Any]) -> str | None:
    """Why a set with these giveaways measures nothing else, or None."""
    auc, accuracy = found["length_auc"], found["last_character_accuracy"]
    if not 1 - LENGTH_AUC_LIMIT <= auc <= LENGTH_AUC_LIMIT:
        return f"the length of the text alone gives AUC {auc:.3f}"
    if accuracy >= LAST_CHARACTER_LIMIT:
        return f"the last character alone gives accuracy {accuracy:.3f}"
    return None


class _NotBinaryError(ValueError):
    """A third label."""


def labelled_rows(
    rows: Iterable[tuple[int, dict[str, Any]]], where: str, text: str = "text", label: str = "label"
) -> Iterator[tuple[str, str, str, str | None]]:
    """What `make` reads, from the rows of a CSV by line; `ValueError` for a row without a text or label."""
    for line, row in rows:
        place = f"{where} line {line}"
        for column in (text, label):
            if not (row.get(column) or "").strip():
                found = "an empty" if column in row else f"only {', '.join(row)} and no column"
                raise ValueError(f"{place} has {found} {column!r}; every row needs {text!r} and {label!r}")
        yield place, row[text], row[label].strip(), row.get("group") or None


def _tidied(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in rows:
        yield line, {name: value if value is None else tidied(value) for name, value in row.items()}


def _hub_rows(source: str) -> Iterator[tuple[str, str, str, str | None]]:
    for number, row in enumerate(hub_rows(source, seed=0), 1):
        place = f"{source} row {number}"
        if not isinstance(row.get("text"), str) or row.get("label") is None:
            raise ValueError(f"{place} has no text and label but {', '.join(row)}; give a data set with these columns")
        group = row.get("group")
        yield place, tidied(row["text"]), tidied(str(row["label"])), None if group is None else tidied(str(group))


def _ordered(a: str, b: str) -> tuple[str, str]:
    try:
        return (a, b) if float(a) <= float(b) else (b, a)
    except ValueError:
        return (a, b) if a <= b else (b, a)


def _seeded(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {folded(text)}".encode()).digest()


def _auc(scores: list[float], labels: list[int]) -> float:
    """The probability that a text of label 1 scores above one of label 0, ties counting half."""
    below, wins, ties = 0, 0.0, Counter(zip(scores, labels, strict=True))
    for score in sorted(set(scores)):
        wins += ties[score, 1] * (below + ties[score, 0] / 2)
        below += ties[score, 0]
    return wins / (below * (len(labels) - below))
