"""Labelled sets: what is read, refused, joined, split and noticed."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monosem.evals import tasks

WORDS = ("ash", "birch", "cedar", "dogwood", "elm", "fir", "gum", "hazel", "ivy", "juniper")


def rows(texts: list[str], labels: list[str], groups: list[str | None] | None = None) -> list[tuple]:
    found = zip(texts, labels, groups or [None] * len(texts), strict=True)
    return [(f"row {i}", text, label, group) for i, (text, label, group) in enumerate(found)]


def distinct(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)) + f" {chr(97 + i % 26) * (1 + i // 26)}" for i in range(n)]


def task(n: int = 60, seed: int = 0) -> tasks.Task:
    return tasks.make("trees", "trees.csv", rows(distinct(n, seed), ["0", "1"] * (n // 2)))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_load_reads_a_folder_one_task_a_file(tmp_path: Path) -> None:
    body = "".join(f'"{text}, {i}",{"no" if i % 2 else "yes"}\n' for i, text in enumerate(distinct(50)))
    for name in ("b", "a"):
        write(tmp_path / f"{name}.csv", "text,label\n" + body)
    found = tasks.load(str(tmp_path))
    assert [t.name for t in found] == ["a", "b"]
    assert found[0].values == ("no", "yes") and found[0].labels[:2] == [1, 0] and found[0].n_rows == 50
    assert tasks.load(str(tmp_path / "a.csv")) == found[:1]


def test_load_takes_a_spreadsheets_byte_order_mark(tmp_path: Path) -> None:
    body = "".join(f"{text},{i % 2}\n" for i, text in enumerate(distinct(40)))
    assert len(tasks.load(str(write(tmp_path / "a.csv", "\ufefftext,label\n" + body)))[0].texts) == 40


def test_load_reads_tables_however_they_are_written(tmp_path: Path) -> None:
    """Suffixes in any case, packed, tabs, other line ends and encodings: the same task; hidden files are none."""
    body = "text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(distinct(40)))
    plain = tasks.load(str(write(tmp_path / "plain.csv", body)))[0]
    folder = tmp_path / "sets"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    write(folder / "A.CSV", body.replace("\n", "\r\n"))
    (folder / "b.Csv.GZ").write_bytes(gzip.compress(body.encode("utf-16")))
    write(folder / "c.tsv", body.replace(",", "\t"))
    write(folder / "._d.csv", "\0\1")
    write(folder / ".ipynb_checkpoints" / "e.csv", body)
    found = tasks.load(str(folder))
    assert [task.name for task in found] == ["A", "b", "c"]
    assert all(dataclasses.replace(task, name="plain") == plain for task in found)
    write(folder / "b.tsv", body)
    with pytest.raises(ValueError, match=r"b\.Csv\.GZ and .*b\.tsv are tasks of one name; rename one"):
        tasks.load(str(folder))
    (broken,) = tasks.load(str(write(tmp_path / "x.csv", body.replace("\n", " \0\r\n").replace("label \0", "label"))))
    assert broken.texts == plain.texts and broken.values == ("0", "1")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("words,label\na,1\n", r"a\.csv line 2 has only words, label and no column 'text'"),
        ("text,score\na,1\n", r"a\.csv line 2 has only text, score and no column 'label'"),
        ("text,label\na,1\n  ,0\n", r"a\.csv line 3 has an empty 'text'"),
        ("text,label\na,1\nb\n", r"a\.csv line 3 has an empty 'label'"),
        ("text,label\na,1\nb,c,0\n", r"a\.csv line 3 has more fields than the header"),
        ("text,label\na,1\nb,0\n\nc,2\n", r"a\.csv line 5 has a third label, '2'"),
        ("text,label\na,1\nb,1\n", r"a\.csv has 1 label \['1'\] in 2 rows"),
        ("text,label\n", r"a\.csv has 0 label \[\] in 0 rows"),
        ("text,label\na,1\nb,0\n", r"a\.csv has too few texts: 1 of '0', 1 of '1'"),
    ],
)
def test_load_refuses_naming_file_and_line(tmp_path: Path, body: str, message: str) -> None:
    write(tmp_path / "a.csv", body)
    with pytest.raises(ValueError, match=message):
        tasks.load(str(tmp_path))


def test_load_refuses_other_encodings_naming_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\nfine,1\ncaf\xe9,0\n")
    with pytest.raises(ValueError, match=r"a\.csv line 3 is not UTF-8"):
        tasks.load(str(tmp_path))


def test_load_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        tasks.load(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"has no \.csv file"):
        tasks.load(str(tmp_path))


def test_make_joins_texts_equal_but_for_case_and_space_and_drops_conflicts() -> None:
    texts, labels = distinct(60), ["0", "1"] * 30
    found = tasks.make(
        "t", "t.csv", rows([*texts, texts[0].upper(), f" {texts[1]}  ", texts[2]], [*labels, "0", "1", "1"])
    )
    assert found.texts == [*texts[:2], *texts[3:]] and found.n_conflicting == 1 and found.n_rows == 63
    assert found.repeats[:3] == [2, 2, 1]


def test_make_orders_numbers_by_size() -> None:
    assert tasks.make("t", "t", rows(distinct(40), ["10", "9"] * 20)).values == ("9", "10")


def test_groups_join_near_identical_and_given_ones() -> None:
    opening = "What do you call a tree that was planted before the war? "
    texts = [f"{opening}An ash.", f"{opening}An elm.", "See 12 elms!", "see 7 elms", *distinct(60), "lonely", "other"]
    given: list[str | None] = [None] * 64 + ["g", "g"]
    found = tasks.groups_of(texts, given)
    assert found[0] == found[1] and found[2] == found[3] and found[-1] == found[-2]
    assert len(set(found)) == len(texts) - 3


def test_groups_take_a_common_opening_for_a_template() -> None:
    texts = [f"Is the following sentence good English, yes or no? {text}" for text in distinct(100)]
    assert len(set(tasks.groups_of(texts, [None] * 100))) == 100


@given(st.integers(0, 5), st.integers(40, 200), st.lists(st.integers(0, 30), min_size=200, max_size=200))
def test_split_keeps_groups_whole_and_halves_even(seed: int, n_texts: int, numbers: list[int]) -> None:
    drawn = [str(number) if number else None for number in numbers]
    made = tasks.make("t", "t.csv", rows(distinct(200, seed), ["0", "1"] * 100, drawn))
    try:
        train, held_out = tasks.split(made, n_texts=n_texts, seed=seed)
    except ValueError:
        return  # a few large groups may leave a half without one label
    assert not set(train) & set(held_out)
    assert not {made.groups[i] for i in train} & {made.groups[i] for i in held_out}
    largest = max(Counter(made.groups).values())
    assert abs(len(train) - len(held_out)) <= 2 * largest and len(train) <= n_texts / 2 + 2 * largest + 1
    assert (train, held_out) == tasks.split(made, n_texts=n_texts, seed=seed)


@given(st.integers(0, 100))
def test_split_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    texts, labels = distinct(100), ["0", "1"] * 50
    order = random.Random(seed).sample(range(100), 100)
    sides = []
    for chosen in (range(100), order):
        made = tasks.make("t", "t", rows([texts[i] for i in chosen], [labels[i] for i in chosen]))
        sides.append([{made.texts[i] for i in half} for half in tasks.split(made, n_texts=80, seed=0)])
    assert sides[0] == sides[1]


def test_split_refuses_one_big_group() -> None:
    made = tasks.make("trees", "trees", rows(distinct(60), ["0", "1"] * 30, ["all"] * 55 + [None] * 5))
    with pytest.raises(ValueError, match="trees cannot be halved: its 6 groups"):
        tasks.split(made, n_texts=60, seed=0)


def test_audit_finds_nothing_where_nothing_is() -> None:
    texts = [text[:40].strip() + "." for text in distinct(400)]
    found = tasks.audit(tasks.make("t", "t", rows(sorted(set(texts)), ["0", "1"] * (len(set(texts)) // 2))))
    assert tasks.broken_by(found) is None and abs(found["length_auc"] - 0.5) < 0.1
    assert found["duplicate_share"] == 0 and found["n_texts"] == found["n_groups"]


def test_audit_catches_length() -> None:
    texts = [text + (" and so on" * 3 if i % 2 else "") for i, text in enumerate(distinct(100))]
    found = tasks.audit(tasks.make("t", "t", rows(texts, ["1", "0"] * 50)))
    assert "length" in (tasks.broken_by(found) or "") and found["length_auc"] < 0.1


def test_audit_catches_the_last_character() -> None:
    texts = [text + "?!"[i % 2] for i, text in enumerate(distinct(100))]
    found = tasks.audit(tasks.make("t", "t", rows(texts, ["0", "1"] * 50)))
    assert found["last_character_accuracy"] == 1 and "last character" in (tasks.broken_by(found) or "")


def test_audit_duplicate_share_is_that_of_random_halves() -> None:
    texts = distinct(60)
    made = tasks.make("t", "t", rows([*texts, *texts[:30], *texts[:16]], ["0", "1"] * 53))
    rng, crossing = random.Random(0), 0
    names = [i for i, n in enumerate(made.repeats) for _ in range(n)]
    for _ in range(2000):
        sides = [rng.random() < 0.5 for _ in names]
        found = [{n for n, s in zip(names, sides, strict=True) if s == side} for side in (False, True)]
        crossing += sum(n in found[not s] for n, s in zip(names, sides, strict=True))
    assert tasks.audit(made)["duplicate_share"] == pytest.approx(crossing / 2000 / len(names), abs=0.01)


def test_paper_tasks_are_named_once_and_say_what_they_stand_for() -> None:
    names = [t.name for t in tasks.PAPER_TASKS]
    stems = [t.stem for t in tasks.PAPER_TASKS if t.stem]
    assert len(set(names)) == len(names) <= 61 and len(set(stems)) == len(stems)
    assert all(t.note for t in tasks.PAPER_TASKS)


def test_the_committed_audit_is_of_these_sets_and_these_limits() -> None:
    path = Path(__file__).parent.parent / "results" / "probes" / "audit.csv"
    found = list(csv.DictReader(path.open(encoding="utf-8")))
    numbers = ("length_auc", "last_character_accuracy")
    broken = [tasks.broken_by({name: float(row[name]) for name in numbers}) or "" for row in found]
    assert len(found) == 113 and [row["broken"] for row in found] == broken and sum(map(bool, broken)) == 6
    stand_ins = {row["task"]: row["stands_for"] for row in found if row["stands_for"]}
    assert stand_ins == {t.stem: t.name for t in tasks.PAPER_TASKS if t.stem}
    assert not {row["task"] for row in found if row["broken"]} & set(stand_ins)


@pytest.mark.real
def test_sae_probes_has_113_binary_sets_of_which_six_are_broken() -> None:
    found = tasks.sae_probes()
    broken = {t.name.split("_")[0] for t in found if tasks.broken_by(tasks.audit(t))}
    assert len(found) == 113 and broken == {"49", "100", "105", "161", "162", "163"}
    names = {t.name for t in found}
    assert [t.stem for t in tasks.PAPER_TASKS if t.stem and t.stem not in names] == []
