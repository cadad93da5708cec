"""People's files, opened, listed and tidied in one place: a text is the same text however its file was written.

    opened      unpacked (gzip, zstd, bz2, xz: known by their first bytes, not their names), decoded (UTF-8; UTF-16 and
                UTF-32 with a byte order mark), without the mark, line ends as newlines
    lines, csv_rows, json_lines, json_values    records of such a file, each with its place for messages
    listed      the files of a folder that hold somebody's text: not hidden ones, not monosem's own
    tidied      without what is no character of a text

A record, and what a packed file grows to, are bounded, so that no file can fill the memory. Errors are `ValueError`s
that name the file, and the line where there is one.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import errno
import functools
import io
import itertools
import json
import logging
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("monosem")

PACKED = (".gz", ".zst", ".bz2", ".xz")
MAX_RECORD = 1 << 27
"""Characters of one line, cell or JSON value; a text longer than that comes as a .txt file, which is read in parts."""

_CHUNK = 1 << 18
_SLICE = 1 << 12
"""Bytes that are unpacked at once: of zstd, whose output cannot be bounded otherwise, they give 128 MiB at most."""
_MAX_GROWTH, _GROWTH_FROM = 500, 1 << 26
"""A file that unpacks to over 500 times its size, and to 64 MiB, is no text but a bomb."""
_FEW_NULS = 8
"""Text has none, but a few are no reason to refuse a file."""
_MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_OURS = re.compile(rb'\s*\{\s*"kind":\s*"[a-z-]+",\s*"format":\s*\d')
"""How every manifest of ours begins."""
_MANIFESTS = (
    *("manifest.json", "plan.json", "train.json", "run.json", "sweep.json", "scaling.json", "config.json"),
    *("latest.json", "export.json", "eval.json"),
)
_OUR_TABLES = ("metrics.jsonl", "runs.csv", "n2g.jsonl")
"""Our files without a manifest's head, which lie beside one."""
_MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json")


def kind_of(path: Path, suffixes: Sequence[str]) -> str | None:
    """Which of `suffixes` the name has, in any case, a packing's suffix left off; None when it has none."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def stem_of(path: Path, suffixes: Sequence[str]) -> str:
    """The name without the suffix that `kind_of` finds, and without a packing's."""
    kind = kind_of(path, suffixes)
    return path.name if kind is None else path.name[: path.name.lower().rindex(kind)]


def tidied(text: str) -> str:
    """The text without byte order marks, its line ends as newlines, a space for each NUL.

    A lone surrogate (half of a broken escape) becomes "?": it is no character, and no tokenizer takes it.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode()
        text = text.replace("\ufeff", "")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\0", " ") if "\0" in text else text


@contextlib.contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked and decoded; `newline` as in `open`."""
    encoding = "utf-8-sig"
    try:
        with _bytes(path) as raw:
            head = raw.read(_SLICE)
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), encoding)
            if encoding == "utf-8-sig" and head.count(0) > max(_FEW_NULS, len(head) // 8):
                raise ValueError(
                    f"{path} is no text: it is full of NUL bytes; give UTF-8 (or UTF-16 with a byte order mark)"
                )
            whole = _Chunks(itertools.chain([head], iter(functools.partial(raw.read, _CHUNK), b"")))
            with io.TextIOWrapper(io.BufferedReader(whole, _CHUNK), encoding, newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise _misencoded(path, encoding, error) from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); check that it is whole and yours"
        ) from None


def require_file(path: Path) -> None:
    """`ValueError` unless it is a regular file: a text is read more than once, and to its end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); give a file that can") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} cannot be read ({os.strerror(errno.EISDIR)}); give a file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a pipe or a device, which can be read only once or has no end; give a file")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1."""
    with opened(path) as text:
        yield from enumerate(_bounded(text, str(path)), 1)


def read_text(path: Path) -> str:
    """All of a small file."""
    with opened(path) as text:
        found = text.read(MAX_RECORD + 1)
    if len(found) > MAX_RECORD:
        raise ValueError(f"{path} has more than {MAX_RECORD:,} characters; give a smaller file")
    return found


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with a header by column, each with the line it ends on."""
    with opened(path, newline="") as text:
        yield from csv_rows_of(_bounded(text, str(path)), str(path))


def csv_rows_of(text: Iterable[str], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `csv_rows`, of lines; `where` is what messages call them.

    The delimiter is a comma; where the header has none, a tab or a semicolon, as spreadsheets write them.
    A short row has None in its last columns. `ValueError` for what is no CSV, two columns of one name, a long row.
    """
    text = iter(text)
    blank = 0
    while (header := next(text, "")) and not header.strip():
        blank += 1
    delimiter = next((d for d in ",\t;" if d in header), ",")
    csv.field_size_limit(MAX_RECORD)  # of the process: the module has no other place for it
    rows = csv.reader(itertools.chain([header], text), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(rows, [])]
        if twice := next((name for name in columns if name and columns.count(name) > 1), None):
            raise ValueError(f"{where} has two columns {twice!r}; rename one of them")
        for row in rows:
            line = blank + rows.line_num
            if len(row) > len(columns):
                raise ValueError(
                    f"{where} line {line} has more fields than the header; put texts with commas in double quotes"
                )
            if row:
                yield line, dict(itertools.zip_longest(columns, row))
    except csv.Error as error:
        raise ValueError(
            f"{where} line {blank + rows.line_num} is not CSV ({error}); convert the file to .jsonl"
        ) from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file with one a line, with their lines; empty lines are passed over."""
    for number, line in lines(path):
        line = line.lstrip("\ufeff")  # files put together from several have a mark in the middle
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path} line {number} is not JSON ({_reason(error)}); give one object a line"
                ) from None


def json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of the array that a file holds, or its values one after the other, with their numbers from 1."""
    with opened(path) as text:
        yield from enumerate(_values(text, str(path)), 1)


def _values(text: io.TextIOWrapper, where: str) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    buffer, at, ended, in_array, n = "", 0, False, None, 0
    while True:
        at = _after_space(buffer, at)
        mark = buffer[at : at + 1]
        if in_array is None and mark:
            in_array = mark == "["
            at += in_array
            continue
        if in_array and mark in (",", "]") and mark:
            in_array = mark == ","
            at += 1
            continue
        value, end, reason = _decoded(decode, buffer, at) if mark else (None, 0, "it ends within the array")
        if end and (end < len(buffer) or ended):  # a number at the buffer's end may go on
            yield value
            at, n = end, n + 1
            continue
        if ended and not mark and not in_array:
            return
        if ended or len(buffer) - at > MAX_RECORD:
            raise ValueError(f"{where} value {n + 1} is not JSON ({reason}); give an array, or one object a line")
        more = text.read(max(_CHUNK, len(buffer) - at))
        buffer, at, ended = buffer[at:] + more, 0, not more


def _decoded(decode: Callable[[str, int], tuple[Any, int]], buffer: str, at: int) -> tuple[Any, int, str]:
    """The value that begins here and where it ends; 0 and the reason where there is none, or not all of it yet."""
    try:
        return *decode(buffer, at), ""
    except (ValueError, RecursionError) as error:
        return None, 0, _reason(error)


def _after_space(buffer: str, at: int) -> int:
    found = _SPACE.match(buffer, at)
    return found.end() if found else at


def listed(folder: Path, suffixes: Sequence[str], *, deep: bool = True, apart: Sequence[Path] = ()) -> list[Path]:
    """The regular files of a folder, and of those below it unless not `deep`, that have one of `suffixes`; sorted.

    Links are followed, out of the folder too, and every folder is read once. Left out, with a line in the log: hidden
    files and folders (names that begin with "." or "_"), monosem's own (stores, runs, sweeps, exports, the folders
    `apart`), models, broken links, pipes and devices, and other suffixes. `ValueError` when a folder cannot be read.
    """
    left_out: Counter[str] = Counter()
    seen = {_identity(path.stat()) for path in apart if path.exists()}
    found = sorted(_walk(folder, suffixes, deep, seen, left_out, top=True), key=lambda path: path.parts)
    if left_out:
        said = ", ".join(f"{n} {what}" for what, n in sorted(left_out.items()))
        log.info("folder %s: left out %s", folder, said)
    return found


def _walk(
    folder: Path, suffixes: Sequence[str], deep: bool, seen: set[Any], left_out: Counter[str], *, top: bool
) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be read ({error.strerror}); check that it is yours") from None
    names = {path.name for path in entries}
    ours = any(is_ours(folder / name) for name in _MANIFESTS if name in names)
    if not top and (ours or names & set(_MODEL_FILES)):
        left_out["folders of monosem" if ours else "folders of a model"] += 1
        return
    seen.add(_identity(folder.stat()))
    for path in entries:
        facts = None if path.name.startswith((".", "_")) else _facts(path)
        if path.name.startswith((".", "_")):
            left_out["hidden files and folders"] += 1
        elif facts is None:
            left_out["broken links"] += 1
        elif stat.S_ISDIR(facts.st_mode):
            if deep and _identity(facts) not in seen:
                yield from _walk(path, suffixes, deep, seen, left_out, top=False)
        elif not stat.S_ISREG(facts.st_mode):
            left_out["pipes and devices"] += 1
        elif (ours and path.name in _OUR_TABLES) or (path.suffix == ".json" and is_ours(path)):
            left_out["files of monosem"] += 1
        elif kind_of(path, suffixes) is None:
            left_out[f"that are not {', '.join(suffixes)}"] += 1
        else:
            yield path


def _facts(path: Path) -> os.stat_result | None:
    """Of what a path leads to; None for a link that leads nowhere."""
    try:
        return path.stat()
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return None
        raise ValueError(f"{path} cannot be read ({error.strerror}); check that it is yours") from None


def is_ours(path: Path) -> bool:
    """Whether the file is a manifest of monosem's."""
    try:
        with open(path, "rb") as file:
            return _OURS.match(file.read(200)) is not None
    except OSError:
        return False  # whoever reads it says why it cannot be


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _bounded(text: io.TextIOWrapper, where: str) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_RECORD + 1):
        number += 1
        if len(line) > MAX_RECORD:
            raise ValueError(
                f"{where} line {number} is longer than {MAX_RECORD:,} characters; give each document a line of its "
                "own, or one long text as a .txt file"
            )
        yield line


@contextlib.contextmanager
def _bytes(path: Path) -> Iterator[io.BufferedReader]:
    require_file(path)
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(0)
        packing = next((name for name, magic in _MAGIC.items() if magic.match(head)), None)
        yield file if packing is None else io.BufferedReader(_Chunks(_unpacked(file, path, packing)), _CHUNK)


def _unpacked(file: io.BufferedReader, path: Path, packing: str) -> Iterator[bytes]:
    """The unpacked bytes of all frames, which must be whole: several libraries take a cut file for a short one."""
    start, errors = _unpacker(path, packing)
    n_in, n_out, stream, piece = 0, 0, None, b""
    try:
        while True:
            if stream is None:
                piece = piece.lstrip(b"\0")  # what tapes fill up with
            if not piece:
                piece = file.read(_SLICE)
                n_in += len(piece)
                if not piece:
                    break
                continue
            stream = stream or start()
            for out in _fed(stream, piece):
                n_out += len(out)
                if n_out > max(_GROWTH_FROM, _MAX_GROWTH * n_in):
                    raise ValueError(
                        f"{path} unpacks to more than {_MAX_GROWTH} times its size, as no text does; unpack it "
                        "yourself if it is what you mean"
                    )
                yield out
            piece, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        if stream is not None:
            raise EOFError("it ends too early")
    except errors as error:
        raise ValueError(f"{path} is not a whole {packing} file ({error}); restore it") from None


def _unpacker(path: Path, packing: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What begins a frame, and the errors that say that one is damaged."""
    if packing == "gzip":
        return functools.partial(zlib.decompressobj, 31), (zlib.error, EOFError)
    if packing == "bz2":
        return bz2.BZ2Decompressor, (OSError, EOFError)
    if packing == "xz":
        return functools.partial(lzma.LZMADecompressor, memlimit=1 << 28), (lzma.LZMAError, EOFError)
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"reading {path} needs zstandard; pip install zstandard, or unpack it") from None
    return (lambda: zstandard.ZstdDecompressor().decompressobj()), (zstandard.ZstdError, EOFError)


def _fed(stream: Any, piece: bytes) -> Iterator[bytes]:
    """What a piece unpacks to, in bounded parts."""
    if not hasattr(stream, "needs_input"):
        yield stream.decompress(piece)
        return
    yield stream.decompress(piece, _CHUNK)
    while not stream.eof and not stream.needs_input:
        yield stream.decompress(b"", _CHUNK)


class _Chunks(io.RawIOBase):
    """Successive bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


def _misencoded(path: Path, encoding: str, error: UnicodeDecodeError) -> ValueError:
    """Where the file is not what its start says: read again, because a decoder knows only its own chunk."""
    name = encoding.removesuffix("-sig").upper()
    decoder = codecs.getincrementaldecoder(encoding.removesuffix("-sig"))()
    line, offset = 1, 0
    with contextlib.suppress(OSError, ValueError), _bytes(path) as raw:
        ended = False
        while not ended:
            chunk = raw.read(_CHUNK)
            ended = not chunk
            pending = decoder.getstate()[0]
            try:
                line += decoder.decode(chunk, ended).count("\n")
            except UnicodeDecodeError as found:
                line += chunk[: max(0, found.start - len(pending))].count(b"\n")
                place = offset - len(pending) + found.start
                return ValueError(
                    f"{path} line {line} is not {name} ({found.reason} at byte {place}); save it as UTF-8"
                )
            offset += len(chunk)
    return ValueError(f"{path} is not {name} ({error.reason}); save it as UTF-8")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
