"""Folders on disk that stages meet through: atomic files, hashes, manifests, locks.

A file is either whole or absent: it is written beside its place, flushed to disk, then renamed. Only regular files are
replaced, and those that a user names only where they are of our making (`require_ours`).
Every folder carries a manifest that says what made it, so that a stage can be skipped, resumed or refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from monosem import formats, textfiles

FORMAT_VERSION = 1
T = TypeVar("T")
_HASH_CHUNK = 1 << 22
_LONGEST_NAME = 255
_DIGITS = 300
"""Of a whole number, at most: a float holds it."""


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Make `path` by `write(temporary)`; on any failure nothing is left behind and an old file stays as it was.

    What killed processes left in the folder is removed. Raises `ValueError` where something else than a regular file is
    in the place, `OSError` naming the file when the disk is full or the file-size limit is hit.
    """
    path = Path(path)
    require_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        write(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except Exception as error:
        code = _os_error_code(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                code, f"no room to write {path} ({os.strerror(code)}); free some space and run the same command again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require_regular(path: str | Path) -> None:
    """`ValueError` unless nothing is at `path`, or a regular file: links, pipes and devices are not replaced."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kind = next((name for is_one, name in _KINDS if is_one(mode)), "no regular file")
        raise ValueError(f"{path} is {kind}, and only a regular file is replaced; give another name")


_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_ours(path: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """`ValueError` unless nothing is at `path`, or a regular file that `is_ours`: what others made is not replaced."""
    path = Path(path)
    require_regular(path)
    if path.exists() and not is_ours(path):
        raise ValueError(f"{path} is there and monosem did not make it; choose another name, or move it away")


def require_no_other(folder: str | Path, *kinds: str) -> None:
    """`ValueError` where `folder` holds what another stage made: two things in one folder could not be told apart."""
    for name, kind in _MARKS:
        path = Path(folder) / name
        if kind not in kinds and path.is_file() and says_kind(path, kind):
            raise ValueError(f"{folder} holds {name} of another kind ({kind}); choose another out")


_MARKS = (
    ("manifest.json", "activation-store"),
    ("plan.json", "activation-store-plan"),
    ("train.json", "training-run"),
    ("sweep.json", "sweep"),
    ("manifest.json", "explanation"),
    ("export.json", "site"),
    ("export.json", "sae-viewer"),
)
"""The file that says what a folder is, and the kind that it says."""


def says_kind(path: Path, kind: str) -> bool:
    """Whether the file is a manifest of that kind, perhaps a damaged one."""
    return f'"kind": "{kind}"'.encode() in path.read_bytes()


def require_writable(path: str | Path) -> None:
    """`ValueError` unless a file or folder can be made at `path`: to be known before the work that would fill it."""
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    probe = folder / f".{path.name[:100]}.{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({folder}: {error.strerror}); choose another place") from None


def temporary_beside(path: Path) -> Path:
    """Where the file or folder `path` is to be made, before it is renamed; the folder exists.

    The first time that this process writes in a folder, it removes what killed ones were making there.
    """
    with _sweeping:
        if (folder := path.absolute().parent) not in _swept:
            _swept.add(folder)
            remove_leftovers(folder)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are no more were making in `folder`: .NAME.PID.tmp.

    One of this process's number is of a former one: this one has written nothing here yet.
    """
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if (name := _LEFTOVER.fullmatch(entry.name)) and not _alive(int(name[1]))]
    for entry in found:
        with contextlib.suppress(OSError):  # not ours to remove
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


_LEFTOVER = re.compile(r"\..+\.(\d+)\.tmp", re.DOTALL)
_sweeping, _swept = threading.Lock(), set[Path]()


def _alive(pid: int) -> bool:
    """Whether a process other than this one has the number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid not in (0, os.getpid())


def write_json(path: str | Path, data: Any) -> None:
    """Atomically write `data` as indented JSON (NaN is an error: JSON has none)."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def read_json(path: str | Path, *, halves: bool = False) -> Any:
    """The JSON in `path`; `ValueError` when it is missing, no regular file, or not strict JSON (`parse_json`)."""
    return parse_json(textfiles.read_text(Path(path)), str(path), halves=halves)


def read_as(path: str | Path, kind: type[T], *, halves: bool = False) -> T:
    """The JSON in `path`, of this type or class of `formats`; `ValueError` names the file and the field at fault."""
    data = read_json(path, halves=halves)
    try:
        return formats.typed(kind, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore it from a copy or make it again") from None


def parse_json(text: str, name: str, *, halves: bool = False) -> Any:
    """The JSON in `text`, which messages call `name`.

    `ValueError` when it is not JSON, says a name twice, holds a number that is no finite one or (unless `halves`) half
    of a character pair, or is nested too deep to be read.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"says {twice!r} twice in one object; keep one of them")
        return found

    try:
        data = json.loads(text, object_pairs_hook=once, parse_constant=_number, parse_float=_number, parse_int=_whole)
        if not halves and "\\ud" in text.lower():
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON ({error}); delete it or restore it from a copy") from None
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a character pair (a lone surrogate); correct it") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deep; delete it or restore it from a copy") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    return data


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_names(names: list[str]) -> str:
    """Hex sha256 of the names, one a line: one hash that stands for many things, in order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def inside(folder: str | Path, name: str) -> Path:
    """`folder`/`name` for a name that was read from a file: a plain relative one that stays in the folder.

    `ValueError` for any other (absolute, with `..`, a link that leads out of the folder).
    """
    folder, parts = Path(folder), PurePosixPath(name).parts
    plain = parts and name == "/".join(parts) and not {"/", ".."} & set(parts)
    if not plain or "\\" in name or not name.isprintable() or max(map(len, parts)) > _LONGEST_NAME:
        raise ValueError(f"{folder} is said to hold {name!r}, which is no plain name of a file in it")
    path = folder / name
    try:
        outside = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # too long a name; links in a circle
        raise ValueError(f"{path} cannot be found ({error}); restore it from a copy") from None
    if outside:
        raise ValueError(f"{path} is a link that leads out of {folder}; put the file itself there")
    return path


def check_size(path: Path, n_bytes: int, repair: str) -> None:
    """`ValueError`, with how to `repair` it, unless `path` is a regular file of so many bytes."""
    try:
        found = path.stat()
    except OSError:
        raise ValueError(f"{path} is missing; {repair}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file; {repair}")
    if found.st_size != n_bytes:
        raise ValueError(f"{path} has {found.st_size} bytes, not {n_bytes}; {repair}")


def check_file(path: Path, facts: dict[str, Any], repair: str) -> None:
    """`ValueError`, with how to `repair` it, unless the file has the `bytes` and `sha256` of `facts`."""
    check_size(path, facts["bytes"], repair)
    if sha256_file(path) != facts["sha256"]:
        raise ValueError(f"{path} does not match its sha256 in the manifest; {repair}")


def file_facts(path: Path) -> dict[str, Any]:
    """`sha256` and `bytes` of a file, for the manifest above it."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def manifest(kind: str, config: dict[str, Any], sources: dict[str, str], **facts: Any) -> dict[str, Any]:
    """What made a folder: its kind and format, the config, its sources' hashes, the versions, `facts`, and a seal.

    Change nothing of it afterwards: it would not be read again.
    """
    return formats.sealed({
        "kind": kind,
        "format": FORMAT_VERSION,
        "config": config,
        "sources": sources,
        "versions": versions(),
        **facts,
    })  # fmt: skip


def read_manifest(path: str | Path, kind: str) -> dict[str, Any]:
    """The manifest in `path`, checked for kind, format, the type of every field, and its seal (`checked_manifest`)."""
    return checked_manifest(read_json(path), kind, str(path))


def checked_manifest(data: Any, kind: str, name: str) -> dict[str, Any]:
    """`data` if it is a manifest of this kind, as it was written; `ValueError` says what differs, and of which file."""
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{name} describes {found!r}, not {kind!r}; give the folder of one")
    if data.get("format") != FORMAT_VERSION or data["format"] is True:
        raise ValueError(f"{name} has format {data.get('format')!r}; this version reads format {FORMAT_VERSION}")
    try:
        formats.check(kind, data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; restore it from a copy or make it again") from None
    if not formats.is_sealed(data):
        raise ValueError(f"{name} was changed after it was written (its seal); restore it from a copy or make it again")
    return data


def versions() -> dict[str, str]:
    """Versions of what results depend on, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in ("monosem", "torch", "transformers", "tokenizers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process, made if it is not there; a killed holder frees it.

    Nothing stays of a folder in which nothing was written. `ValueError` when another process works in it, or when it
    cannot be made or written in.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write in the folder {folder} ({error.strerror}); choose another") from None
        with _locked(folder / ".lock", folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # until the first that holds something
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold one output, a file or a folder that is replaced as a whole, by a lock beside it. Errors as `folder_lock`."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock"), path):
        yield


@contextlib.contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise ValueError(f"cannot write in the folder {lock.parent} ({error.strerror}); choose another") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == os.stat(lock).st_ino:
                    break  # else its holder removed it meanwhile, and another may hold a new one
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another process is working in {what}; wait for it or choose another folder") from None
        except OSError as error:
            os.close(descriptor)
            raise ValueError(f"{lock.parent} cannot be locked ({error.strerror}); choose another folder") from None
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)


def _os_error_code(error: Exception) -> int | None:
    """The errno behind an error, which libraries may only put in words (safetensors: `... (os error 28)`)."""
    said = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", said):
        return int(found[1])
    full = (
        "disk is full",
        "disk I/O error",
        " requested and ",
    )  # SQLite, twice, and numpy: `100 requested and 20 written`
    return errno.ENOSPC if any(words in said for words in full) else None


def _number(text: str) -> float:
    """A JSON number; NaN and what no float can hold are refused."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {text}, which is not finite; correct it")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"holds a whole number of {len(text)} digits; correct it")
    return int(text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
