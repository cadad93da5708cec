"""Folders on disk that stages meet through: atomic files, hashes, manifests, locks.

A file is either whole or absent: it is written beside its place, flushed to disk, then renamed.
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
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from monosem import textfiles

FORMAT_VERSION = 1
_HASH_CHUNK = 1 << 22


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Make `path` by `write(temporary)`; on any failure nothing is left behind and an old file stays as it was.

    Raises `OSError` naming the file when the disk is full or the file-size limit is hit.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """Hold `folder` for this process; a killed holder frees it.

    `ValueError` when another process works in it, or when it cannot be made or written in.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 closed below
    except OSError as error:
        raise ValueError(f"cannot write in the folder {folder} ({error.strerror}); choose another") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is working in {folder}; wait for it or choose another folder") from None
        yield


def _os_error_code(error: Exception) -> int | None:
    """The errno behind an error; safetensors, written in Rust, only puts it in words: `... (os error 28)`."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
