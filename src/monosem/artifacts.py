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
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from monosem import textfiles

FORMAT_VERSION = 1
_HASH_CHUNK = 1 << 22


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


def read_json(path: str | Path) -> Any:
    """The JSON in `path`; `ValueError` when it is missing, not JSON, or says a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path} says {twice!r} twice in one object; keep one of them")
        return found

    try:
        return json.loads(textfiles.read_text(Path(path)), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or restore it from a copy") from None


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


def manifest(kind: str, config: dict[str, Any], sources: dict[str, str], **facts: Any) -> dict[str, Any]:
    """What made a folder: its kind and format, the config, its sources' hashes, the versions, and `facts`."""
    return {
        "kind": kind,
        "format": FORMAT_VERSION,
        "config": config,
        "sources": sources,
        "versions": versions(),
        **facts,
    }


def read_manifest(path: str | Path, kind: str) -> dict[str, Any]:
    """The manifest in `path`, checked for kind and format; `ValueError` says which differs."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} describes {found!r}, not {kind!r}; give the folder of one")
    if data.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {data.get('format')}; this version reads format {FORMAT_VERSION}")
    if missing := sorted({"config", "sources", "versions"} - data.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}; restore it from a copy or make it again")
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
