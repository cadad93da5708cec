"""A file is whole or absent, a folder has one owner at a time, a manifest says what made it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monosem import artifacts
from monosem.artifacts import folder_lock, manifest, read_json, read_manifest, sha256_file, write_atomic, write_json


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_new(path: Path) -> None:
    path.write_text("new", "utf-8")


def raises(error: BaseException) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text("half", "utf-8")
        raise error

    return write


def test_write_atomic_makes_the_file_and_its_folder(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.txt", write_new)
    assert (tmp_path / "a" / "b.txt").read_text("utf-8") == "new"
    assert files(tmp_path / "a") == ["b.txt"]


def test_write_atomic_replaces_an_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old", "utf-8")
    write_atomic(tmp_path / "file", write_new)
    assert (tmp_path / "file").read_text("utf-8") == "new"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("no"), KeyboardInterrupt()])
def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old", "utf-8")
    with pytest.raises(type(error)):
        write_atomic(path, raises(error))
    assert path.read_text("utf-8") == "old"
    assert files(tmp_path) == ["file"]


def test_write_atomic_leaves_nothing_when_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"):
        write_atomic(tmp_path / "file", raises(ValueError("no")))
    assert files(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_write_atomic_says_what_to_do_when_the_disk_is_full(tmp_path: Path, code: int) -> None:
    with pytest.raises(OSError, match=r"no room to write .*file .*free some space") as caught:
        write_atomic(tmp_path / "file", raises(OSError(code, os.strerror(code))))
    assert caught.value.errno == code
    assert files(tmp_path) == []


def test_write_atomic_leaves_the_old_file_when_only_the_flush_to_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_json(tmp_path / "file.json", "old")
    monkeypatch.setattr(artifacts, "_fsync", full)
    with pytest.raises(OSError, match="no room to write"):
        write_json(tmp_path / "file.json", "new")
    assert read_json(tmp_path / "file.json") == "old"
    assert files(tmp_path) == ["file.json"]


def test_write_json_under_a_real_file_size_limit_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", "old")
    code = """
import resource, sys
from monosem.artifacts import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_json(sys.argv[1], "x" * 100_000)
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file.json")], capture_output=True, text=True, timeout=60
    )
    assert "no room to write" in done.stdout, done.stderr
    assert read_json(tmp_path / "file.json") == "old"
    assert files(tmp_path) == ["file.json"]


def test_write_json_round_trips(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None, True], "a": "é"}
    write_json(tmp_path / "file.json", data)
    assert read_json(tmp_path / "file.json") == data


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", "old")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", float("nan"))
    assert read_json(tmp_path / "file.json") == "old"


def test_read_json_refuses_a_name_twice(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"grid": {"k": [1], "lr": [2], "k": [3]}}')
    with pytest.raises(ValueError, match=r"file\.json says 'k' twice in one object; keep one of them"):
        read_json(tmp_path / "file.json")


def test_read_json_says_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file\.json does not exist"):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b""])
def test_read_json_says_that_a_file_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json is not valid JSON"):
        read_json(tmp_path / "file.json")


def test_sha256_file_is_the_hash_of_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_HASH_CHUNK", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    assert sha256_file(tmp_path / "file") == hashlib.sha256(bytes(range(100))).hexdigest()


def test_manifest_round_trips_and_names_the_versions(tmp_path: Path) -> None:
    made = manifest("site", {"seed": 0}, {"corpus": "abc"}, n_latents=7)
    write_json(tmp_path / "manifest.json", made)
    assert read_manifest(tmp_path / "manifest.json", "site") == made
    assert made["n_latents"] == 7
    assert {"python", "torch", "transformers", "numpy"} <= made["versions"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "run", "format": 1}, "describes 'run', not 'site'"),
        ({"kind": "site", "format": 99}, "format 99; this version reads format 1"),
        ({"kind": "site"}, "format None"),
        (
            {"kind": "site", "format": 1, "config": {}, "versions": {}},
            "manifest.json: lacks the field sources; restore it",
        ),
        ({}, "describes None"),
        ([], "describes 'list'"),
    ],
)
def test_read_manifest_refuses_another_kind_or_format(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "manifest.json", "site")


HOLDER = """
import sys, time
from monosem.artifacts import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_folder_lock_keeps_another_process_out_until_its_holder_ends_or_is_killed(tmp_path: Path) -> None:
    for end in ("leaves", "is killed"):
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match="another process is working in"), folder_lock(tmp_path):
                pass
            if end == "is killed":
                holder.send_signal(signal.SIGKILL)
            holder.communicate(timeout=300)
        with folder_lock(tmp_path):
            pass


def test_folder_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_lock(tmp_path / "new"):
        raise KeyError
    with folder_lock(tmp_path / "new"):
        pass
