"""Changes to a file: as a disk, an editor, a program of somebody else's, or somebody who means harm would make them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "[" * 100_000
DIGITS = "9" * 5000


def change(path: Path, rng: random.Random, outside: Path) -> str:
    """Damage a file that stages have left; says how. `outside` is a folder that has nothing to do with it."""
    kinds: list[Callable[[Path, random.Random], str]] = [flip, cut, extend, delete, empty, swap, fold]
    if path.suffix in (".json", ".jsonl"):
        kinds += 3 * [edit_json, edit_number] + [rename_inside, twice, nest, delete_key, retype]
    if path.suffix == ".csv":
        kinds += 4 * [edit_table]
    if rng.random() < 0.06:
        return link(path, rng, outside)
    return rng.choice(kinds)(path, rng)


def mutate(path: Path, rng: random.Random) -> str:
    """Change what somebody gives; says how."""
    kinds = [flip, cut, empty, bytes_between, drop_line, repeat_line, swap_lines, mark, carriage_returns, zeros]
    if path.suffix in (".json", ".jsonl"):
        kinds += [edit_json, edit_number, twice, nest, delete_key, retype]
    if path.suffix == ".csv":
        kinds += 3 * [edit_table]
    return rng.choice(kinds)(path, rng)


def flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return extend(path, rng)
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    _write(path, bytes(data))
    return f"bit {bit} of byte {at} flipped"


def cut(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    size = rng.randrange(max(1, len(data)))
    _write(path, data[:size])
    return f"cut to {size} of {len(data)} bytes"


def extend(path: Path, rng: random.Random) -> str:
    more = rng.choice([b"\0", b"\n", b"{}", b"x" * 100, path.read_bytes()[:4096] or b" "])
    _write(path, path.read_bytes() + more)
    return f"{len(more)} bytes more"


def delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "deleted"


def empty(path: Path, rng: random.Random) -> str:
    _write(path, b"")
    return "emptied"


def swap(path: Path, rng: random.Random) -> str:
    """With a sibling of the same kind."""
    others = sorted(p for p in path.parent.iterdir() if p.suffix == path.suffix and p != path and p.is_file())
    if not others:
        return flip(path, rng)
    other = rng.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    if mine == theirs:
        return flip(path, rng)
    _write(path, theirs)
    _write(other, mine)
    return f"swapped with {other.name}"


def link(path: Path, rng: random.Random, outside: Path) -> str:
    """To a changed copy elsewhere."""
    other = outside.absolute() / path.name
    shutil.copy(path, other)
    flip(other, rng)
    path.unlink()
    path.symlink_to(other)
    return "a link to a changed copy elsewhere"


def fold(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def edit_json(path: Path, rng: random.Random) -> str:
    """A value becomes another of its type."""
    return _edit(path, rng, lambda value: True, _other)


def edit_number(path: Path, rng: random.Random) -> str:
    return _edit(path, rng, lambda value: isinstance(value, int | float), _other)


def retype(path: Path, rng: random.Random) -> str:
    def other(value: Any, rng: random.Random) -> Any:
        kinds: list[Any] = [None, True, "text", 3, -1, 0.5, [], {}, [[]], {"a": 1}, 10**30, "", [1, "a"]]
        return rng.choice([kind for kind in kinds if type(kind) is not type(value)])

    return _edit(path, rng, lambda value: True, other)


def rename_inside(path: Path, rng: random.Random) -> str:
    """A name of a file or folder in it leads elsewhere."""

    def elsewhere(value: Any, rng: random.Random) -> str:
        return rng.choice(
            [f"../{value}", f"/etc/{value}", "/etc/passwd", "..", "", f"./{value}", f"{value}/", "/dev/zero"]
        )

    return _edit(path, rng, lambda value: isinstance(value, str), elsewhere)


def delete_key(path: Path, rng: random.Random) -> str:
    return _edit(path, rng, lambda value: True, lambda value, rng: _GONE)


def twice(path: Path, rng: random.Random) -> str:
    """A name stands twice in an object."""
    text = path.read_text("utf-8")
    at = text.find("{")
    if at < 0 or '"' not in text[at:]:
        return flip(path, rng)
    name = json.loads(text[at + text[at:].index('"') :].split(":")[0].strip())
    _write(path, (text[: at + 1] + f'"{name}": {rng.choice(["1", "null", DIGITS])}, ' + text[at + 1 :]).encode())
    return f"{name!r} twice"


def nest(path: Path, rng: random.Random) -> str:
    text = path.read_text("utf-8")
    at = text.find(":")
    whole = rng.random() < 0.5 or at < 0
    _write(path, (DEEP if whole else text[: at + 1] + DEEP + "]" * len(DEEP) + "," + text[at + 1 :]).encode())
    return "nested 100,000 deep"


def edit_table(path: Path, rng: random.Random) -> str:
    """A cell, row or column of a .csv."""
    lines = path.read_text("utf-8").splitlines()
    how = rng.choice(["cell", "row twice", "row gone", "column gone", "column twice", "header"])
    row, cells = rng.randrange(1, len(lines)), lines[0].split(",")
    column = rng.randrange(len(cells))
    if how == "row twice":
        lines.insert(row, lines[row])
    elif how == "row gone":
        lines.pop(row)
    elif how == "header":
        cells[column] = rng.choice(["", "text", "\ufeffx", cells[0]])
        lines[0] = ",".join(cells)
    else:
        for at, line in enumerate(lines):
            own = line.split(",")
            if column >= len(own):
                continue
            if how == "column gone":
                own.pop(column)
            elif how == "column twice":
                own.append(own[column])
            elif at == row:
                own[column] = rng.choice(["", "nan", "inf", "-1", "1e999", DIGITS, '"', "x" * 200_000, "0", "\x00"])
            lines[at] = ",".join(own)
    _write(path, ("\n".join(lines) + "\n").encode())
    return f"{how} (row {row}, column {column})"


def bytes_between(path: Path, rng: random.Random) -> str:
    what = rng.choice([b"\xff\xfe", b"\0", b"\xed\xa0\x80", b"\r", b"\x1a", b'"', b"\xef\xbb\xbf", b"\\ud800", b"\x85"])
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    _write(path, data[:at] + what + data[at:])
    return f"{what!r} at byte {at}"


def drop_line(path: Path, rng: random.Random) -> str:
    return _lines(path, rng, lambda lines, at: lines[:at] + lines[at + 1 :], "gone")


def repeat_line(path: Path, rng: random.Random) -> str:
    return _lines(path, rng, lambda lines, at: lines[: at + 1] + lines[at:], "twice")


def swap_lines(path: Path, rng: random.Random) -> str:
    return _lines(path, rng, lambda lines, at: [lines[at], *lines[:at], *lines[at + 1 :]], "first")


def mark(path: Path, rng: random.Random) -> str:
    mark = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"BZh"])
    _write(path, mark + path.read_bytes())
    return f"{mark!r} before it"


def carriage_returns(path: Path, rng: random.Random) -> str:
    _write(path, path.read_bytes().replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n"])))
    return "other line ends"


def zeros(path: Path, rng: random.Random) -> str:
    _write(path, bytes(len(path.read_bytes())))
    return "all bytes zero"


_GONE = object()


def _edit(
    path: Path, rng: random.Random, wanted: Callable[[Any], bool], other: Callable[[Any, random.Random], Any]
) -> str:
    """One value of a JSON file (of a line of one of JSON lines)."""
    lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    at = rng.randrange(max(1, len(lines)))
    try:
        data = json.loads(lines[at])
    except (ValueError, IndexError):
        return flip(path, rng)
    found = [place for place in _places(data) if wanted(place[0][place[1]])]
    if not found:
        return flip(path, rng)
    inside, name, said = rng.choice(found)
    value = other(before := inside[name], rng)
    if value is _GONE:
        del inside[name]
    else:
        inside[name] = value
    lines[at] = json.dumps(data, indent=None if path.suffix == ".jsonl" else 2)
    _write(path, ("\n".join(lines) + "\n").encode())
    where = f" of line {at + 1}" if path.suffix == ".jsonl" else ""
    return f"{said}{where}: {before!r:.60} became {'nothing' if value is _GONE else repr(value)[:60]}"


def _places(data: Any, said: str = "") -> list[tuple[Any, Any, str]]:
    """Where the values of a tree are: the object or list, the name or number in it, and the way there in words."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for key, value in pairs for p in [(data, key, f"{said}.{key}"), *_places(value, f"{said}.{key}")]]


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value - 1, 0 if value else 2, 2 * value + 3, 2**31, 10**18])
    if isinstance(value, float):
        return rng.choice([value * 1.01 + 1e-3, -value - 1.0, 0.0 if value else 1.0, 1e300, 1e-300])
    if isinstance(value, str):
        return rng.choice([value[:-1] + ("0" if value[-1:] != "0" else "1"), "", value + "x", value.upper() + "!"])
    if isinstance(value, list):
        return [*value, *(value[:1] or [0])] if rng.random() < 0.5 or not value else value[:-1]
    return {} if value else {"a": 1}


def _lines(path: Path, rng: random.Random, change: Callable[[list[bytes], int], list[bytes]], said: str) -> str:
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return extend(path, rng)
    at = rng.randrange(len(lines))
    _write(path, b"".join(change(lines, at)))
    return f"line {at + 1} {said}"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
