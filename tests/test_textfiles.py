"""A text is the same however its file was written, and no file can fill the memory or be half read in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from monosem import textfiles
from monosem.textfiles import csv_rows, json_lines, json_values, listed, read_text, tidied

TEXT = "Zwölf Boxkämpfer\njagen Viktor,\n\nquer über den großen Sylter Deich: 東京 😀\n"


def zstd(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def written(folder: Path, raw: bytes, name: str = "a.txt") -> Path:
    (folder / name).write_bytes(raw)
    return folder / name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_encodings_and_line_ends_are_no_part_of_a_text(tmp_path: Path, encoding: str, end: str) -> None:
    assert read_text(written(tmp_path, TEXT.replace("\n", end).encode(encoding))) == TEXT


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_utf_16_of_either_order_is_read_by_its_mark(tmp_path: Path, mark: str) -> None:
    assert read_text(written(tmp_path, ("\ufeff" + TEXT).encode(mark))) == TEXT


def test_utf_16_without_a_mark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.txt is no text: it is full of NUL bytes; give UTF-8"):
        read_text(written(tmp_path, TEXT.encode("utf-16-le")))


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_are_known_by_their_bytes_and_read_over_all_frames(tmp_path: Path, packing: str) -> None:
    pack = PACKERS[packing]
    raw = TEXT.encode()
    frames = pack(raw[:7]) + pack(b"") + pack(raw[7:]) + bytes(512)
    assert read_text(written(tmp_path, frames)) == TEXT
    assert read_text(written(tmp_path, raw, "plain.txt.gz")) == TEXT


@pytest.mark.parametrize("packing", PACKERS)
def test_a_packed_file_that_was_cut_is_never_taken_for_whole(tmp_path: Path, packing: str) -> None:
    pack = PACKERS[packing]
    rows = "".join(f"{i * 7919} and {i}\n" for i in range(20_000)).encode()
    whole = pack(rows)
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole + pack(rows)[:20], whole + b"not a frame"):
        path = written(tmp_path, damaged)
        with pytest.raises(ValueError, match=rf"a\.txt is not a whole {packing} file \(.*\); restore it"):
            read_text(path)


@pytest.mark.parametrize("packing", PACKERS)
def test_what_unpacks_to_far_more_than_text_does_is_refused(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, PACKERS[packing](b"word " * (1 << 18)))
    assert len(read_text(path)) == 5 << 18
    monkeypatch.setattr(textfiles, "_GROWTH_FROM", 1 << 16)
    monkeypatch.setattr(textfiles, "_MAX_GROWTH", 100)
    with pytest.raises(ValueError, match=r"a\.txt unpacks to more than 100 times its size"):
        read_text(path)


def test_a_record_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_RECORD", 1000)
    fine = json.dumps({"text": "x" * 900})
    long = json.dumps({"text": "x" * 1000})
    path = written(tmp_path, f"{fine}\n{long}\n".encode(), "a.jsonl")
    for read in (json_lines, csv_rows):
        with pytest.raises(ValueError, match=r"a\.jsonl line 2 is longer than 1,000 characters"):
            list(read(path))
    cell = 'text\n"' + "line\n" * 300 + '"\n'
    with pytest.raises(ValueError, match=r"a\.csv line \d+ is not CSV \(field larger than field limit"):
        list(csv_rows(written(tmp_path, cell.encode(), "a.csv")))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt (is a pipe|cannot be read \(Is a directory\))"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="/dev/zero is a pipe or a device"):
        read_text(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("before", "line", "byte"), [("", 1, 0), ("a\nb\n", 3, 4), ("ä\r\n" * 100_000, 100_001, 400_000)]
)
def test_what_is_not_utf_8_is_named_by_line_and_byte(tmp_path: Path, before: str, line: int, byte: int) -> None:
    path = written(tmp_path, before.encode() + b"\xe9t\xe9 and more\n")
    with pytest.raises(ValueError, match=rf"a\.txt line {line} is not UTF-8 \(.* at byte {byte}\); save it as UTF-8"):
        read_text(path)


def test_cells_of_any_length_quoted_line_ends_and_other_delimiters(tmp_path: Path) -> None:
    long = "word " * 60_000
    table = f'n,text\r\n1,"a ""quoted"" one,\r\nof two lines"\r\n\r\n2,"{long}"\r\n3\r\n'
    rows = list(csv_rows(written(tmp_path, table.encode("utf-8-sig"))))
    assert [row["text"] for _, row in rows] == ['a "quoted" one,\r\nof two lines', long, None]
    assert [line for line, _ in rows] == [3, 5, 6]
    for delimiter in "\t;":
        path = written(tmp_path, f"text {delimiter} label\ra, b{delimiter}1\r".encode())
        assert [row for _, row in csv_rows(path)] == [{"text": "a, b", "label": "1"}]
    assert list(csv_rows(written(tmp_path, b"text,label\n"))) == []
    assert list(csv_rows(written(tmp_path, b""))) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("text,text\na,b\n", "has two columns 'text'"),
        ("text\na, and more\n", "line 2 has more fields than the header"),
        ('text\nfine\n"never closed\nrest\n', r"line 4 is not CSV \(unexpected end of data\)"),
        ('text\n"he said \\"no\\""\n', "line 2 is not CSV"),
    ],
)
def test_a_table_that_can_be_read_two_ways_is_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(csv_rows(written(tmp_path, table.encode())))


ROWS = [{"text": "a [b], {c}"}, "d", 12, {"text": ["e", {"f": None}]}, [1, 2], True]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "".join(json.dumps(row) + "\r\n" for row in ROWS),
        "".join(json.dumps(row, indent=1) + "\n\n" for row in ROWS),
    ],
)
def test_a_json_file_is_an_array_or_values_in_turn(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (1, 5, 1 << 18):
        monkeypatch.setattr(textfiles, "_CHUNK", chunk)
        assert [value for _, value in json_values(written(tmp_path, text.encode("utf-8-sig")))] == ROWS


@pytest.mark.parametrize(
    "text", ['[{"text": 1}, {"te', "[1, 2", '{"a": 1}\n{"b"', "[1] x", "[" * 100_000, '{"a": nul}']
)
def test_json_that_is_cut_or_broken_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text.encode(), "a.json")
    with pytest.raises(ValueError, match=r"a\.json value \d is not JSON"):
        list(json_values(path))
    with pytest.raises(ValueError, match=r"a\.json line \d is not JSON"):
        list(json_lines(path))


def test_json_lines_name_the_line_and_pass_over_empty_ones(tmp_path: Path) -> None:
    path = written(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n\xef\xbb\xbf{"a": 2}\n"\\u2028"')
    assert list(json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2}), (4, "\u2028")]
    with pytest.raises(ValueError, match=r"line 2 is not JSON \(.*digits"):
        list(json_lines(written(tmp_path, b"{}\n" + b"1" * 5000)))


def test_tidied_keeps_characters_and_nothing_else() -> None:
    assert tidied("a\ud800b \udc00") == "a?b ?"
    assert tidied("\ufeffa\0b\r\nc\rd\u2028\ufeffe") == "a b\nc\nd\u2028e"
    assert tidied(TEXT) == TEXT


def test_a_folder_is_listed_without_what_is_nobodys_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        *("b.txt", "A.TXT", "sub/c d ü.Txt.GZ", ".hidden.txt", "._b.txt", ".ipynb_checkpoints/b.txt", "_SUCCESS.txt"),
        *("_delta_log/1.txt", "notes.md", "model/vocab.txt", "model/tokenizer.json", "store/train/x.txt", "run/x.txt"),
        *("cache/y.txt", "elsewhere/z.txt"),
    ):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text("x", "utf-8")
    top = tmp_path / "top"
    (top / "elsewhere").rename(tmp_path / "elsewhere")
    (top / "store/plan.json").write_text('{\n  "kind": "activation-store-plan",\n  "format": 1}', "utf-8")
    (top / "run/train.json").write_text('{\n  "kind": "training-run",\n  "format": 1}', "utf-8")
    (top / "manifest.json").write_text('{"kind": "something of others", "format": "x"}', "utf-8")
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "sub" / "loop").symlink_to(top)
    (top / "gone.txt").symlink_to(tmp_path / "nowhere")
    (top / "self.txt").symlink_to(top / "self.txt")
    os.mkfifo(top / "pipe.txt")
    with caplog.at_level("INFO"):
        found = [path.relative_to(top).as_posix() for path in listed(top, [".txt"], apart=[top / "cache"])]
    assert found == ["A.TXT", "b.txt", "link/z.txt", "sub/c d ü.Txt.GZ"]
    for said in ("2 broken links", "1 folders of a model", "2 folders of monosem", "5 hidden", "1 pipes and devices"):
        assert said in caplog.text
    assert [path.name for path in listed(top, [".txt"], deep=False)] == ["A.TXT", "b.txt"]


def test_suffixes_are_found_in_any_case_behind_a_packing() -> None:
    kinds = (".csv", ".jsonl")
    assert (
        textfiles.kind_of(Path("A.CSV.Zst"), kinds) == ".csv" and textfiles.stem_of(Path("A.b.CSV.Zst"), kinds) == "A.b"
    )
    assert textfiles.kind_of(Path("a.gz"), kinds) is None and textfiles.kind_of(Path("csv"), kinds) is None
