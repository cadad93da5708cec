"""What a file may hold: every field of every kind with wrong values, and right values that were not written there."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import msgspec
import pytest

from monosem import artifacts, config, formats

DOCS = (Path(__file__).parent.parent / "docs" / "formats.md").read_text("utf-8")
MISSING = object()
Where = tuple[str | int, ...]


def parts(kind: Any) -> tuple[Any, str | None]:
    """The type without its annotation and its UNSET, and the pattern it has to match."""
    pattern = None
    if typing.get_origin(kind) is Annotated:
        kind, meta = typing.get_args(kind)
        pattern = meta.pattern
    if typing.get_origin(kind) in (typing.Union, UnionType):
        first, *rest = (arm for arm in typing.get_args(kind) if arm is not msgspec.UnsetType)
        if not rest:
            return parts(first)
        kind = typing.Union[(first, *rest)]
    return kind, pattern


def example(kind: Any) -> Any:
    """A value that the type allows."""
    kind, pattern = parts(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if pattern is not None:
        return "0" * 64
    if origin is typing.Union:
        return example(inner[0])
    if origin is Literal:
        return inner[0]
    if origin is list:
        return [example(inner[0])]
    if origin is tuple:
        return [example(each) for each in inner]
    if origin is dict:
        return {"a": example(inner[1])}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return {name: example(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}
    return {int: 1, float: 0.5, str: "a", bool: True, Any: 0}[kind]


def wrongs(kind: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    """Where a value may be wrong, and values that are: of another type, out of range, missing."""
    kind, pattern = parts(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    arms = set(inner) if origin is typing.Union else {kind}
    plain = {typing.get_origin(parts(arm)[0]) or parts(arm)[0] for arm in arms}
    if kind is Any:
        return
    tried = {str: "no", int: 7, float: 1.5, bool: True, type(None): None, list: [], dict: {}}
    if float in plain:
        plain.add(int)
    if any(isinstance(arm, type) and issubclass(arm, msgspec.Struct) for arm in plain):
        plain.add(dict)
    if Literal in plain:
        plain = {str}
    yield from (
        (where, value) for own, value in tried.items() if own not in plain and not (own is list and tuple in plain)
    )
    if pattern is not None:
        yield from ((where, value) for value in ("", "0" * 63, "G" * 64))
    if origin is Literal:
        yield where, "another"
    if plain == {int}:
        yield from ((where, value) for value in (10**30, -(10**30)))
    if origin is list:
        yield from wrongs(inner[0], (*where, 0))
    if origin is dict:
        yield from wrongs(inner[1], (*where, "a"))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        required = {field.name for field in msgspec.structs.fields(kind) if field.required}
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from wrongs(hint, (*where, name))
            if name in required:
                yield (*where, name), MISSING
        if issubclass(kind, formats.Strict):
            yield (*where, "surplus"), 1


def manifest(kind: str) -> dict[str, Any]:
    """A manifest of this kind that is read without complaint."""
    data: dict[str, Any] = {**example(formats.KINDS[kind]), "kind": kind, "format": 1}
    if kind in formats._CONFIGS:
        stage, left_out = formats._CONFIGS[kind]
        needed = {f.name: "x" for f in dataclasses.fields(stage) if f.default is dataclasses.MISSING}
        needed = {name: value for name, value in needed.items() if name != "activation_options"}
        made = config.to_dict(stage(**needed))
        data["config"] = {name: value for name, value in made.items() if name not in left_out}
    return formats.sealed(json.loads(json.dumps(data)))


def changed(data: dict[str, Any], where: Where, value: Any) -> dict[str, Any]:
    """A copy with this value there."""
    copy = json.loads(json.dumps(data))
    at: Any = copy
    for step in where[:-1]:
        at = at[step]
    if value is MISSING:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    return copy


@pytest.mark.parametrize("kind", sorted(formats.KINDS))
def test_every_field_of_every_manifest_is_refused_by_name_when_it_is_wrong(kind: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "some.json", manifest(kind)
    path.write_text(json.dumps(whole, indent=1))
    assert artifacts.read_manifest(path, kind) == whole
    n = 0
    for where, value in wrongs(formats.KINDS[kind]):
        if where and where[0] in ("kind", "format"):
            continue
        if not where or (where[0] == "config" and kind in formats._CONFIGS):
            continue
        data = changed(whole, where, value)
        path.write_text(json.dumps(data if where == ("seal",) else formats.sealed(data)))
        with pytest.raises(ValueError) as caught:
            artifacts.read_manifest(path, kind)
        names = [part for part in where if isinstance(part, str) and part != "a"]
        assert "some.json" in str(caught.value) and names[-1] in str(caught.value), (where, value, str(caught.value))
        n += 1
    assert n > 20


@pytest.mark.parametrize("kind", sorted(formats._CONFIGS))
def test_every_field_of_a_config_is_refused_by_name_when_it_is_wrong(kind: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "some.json", manifest(kind)
    for name in [*whole["config"], "surplus"]:
        for value in ({"a": []}, [["b"]], MISSING, 1e300):
            if (name, value) == ("surplus", MISSING) or (name in ("held_out_fraction",) and value == 1e300):
                continue
            data = changed(whole, ("config", name), value)
            path.write_text(json.dumps(formats.sealed(data)))
            try:
                artifacts.read_manifest(path, kind)
            except ValueError as error:
                assert "some.json" in str(error) and name in str(error)
            else:
                assert value == 1e300, f"{name} may not be {value}"


def leaves(data: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    if isinstance(data, dict | list):
        for step, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*where, step))
    else:
        yield where, data


@pytest.mark.parametrize("kind", sorted(formats.KINDS))
def test_a_right_value_that_was_not_written_there_is_refused(kind: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "some.json", manifest(kind)
    for where, value in leaves(whole):
        if where[0] in ("seal", "kind", "format") or value is None or isinstance(value, bool):
            continue
        other = {int: lambda v: v + 1, float: lambda v: v + 0.25, str: lambda v: v + "b"}[type(value)](value)
        if len(str(value)) == 64:
            other = "1" * 64
        path.write_text(json.dumps(changed(whole, where, other)))
        with pytest.raises(ValueError, match=r"some\.json"):
            artifacts.read_manifest(path, kind)


def test_the_layout_of_a_file_and_the_order_of_its_fields_do_not_matter(tmp_path: Path) -> None:
    whole = manifest("autoencoder")
    (tmp_path / "a.json").write_text(json.dumps(dict(reversed(whole.items())), indent=7))
    assert artifacts.read_manifest(tmp_path / "a.json", "autoencoder") == whole


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00\x01\x02\xff", b"\xff\xfe{\x00}\x00", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"3",
        b'{"a": NaN}',
        b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": ' + b"1" * 5000 + b"}", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}',
        b'{"a": 1',
    ],
)  # fmt: skip
def test_json_of_no_use_is_refused_with_the_name_of_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.json"):
        artifacts.read_manifest(tmp_path / "some.json", "autoencoder")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        with pytest.raises(ValueError, match=f"{name} (cannot be read|is a pipe or a device)"):
            artifacts.read_json(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "x" * 5000]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no plain name|cannot be found"):
        artifacts.inside(tmp_path, name)


def test_links_are_followed_only_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder" / "train").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "moved").symlink_to(tmp_path / "folder")  # the folder itself may lie elsewhere
    (tmp_path / "folder" / "within").symlink_to("train")
    (tmp_path / "folder" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "folder" / "circle").symlink_to("circle")
    assert artifacts.inside(tmp_path / "moved", "train/x").parent.name == "train"
    assert artifacts.inside(tmp_path / "folder", "within/x")
    for name in ("out", "out/x", "circle"):
        with pytest.raises(ValueError, match=r"leads out of|cannot be found"):
            artifacts.inside(tmp_path / "folder", name)


@pytest.mark.parametrize("kind", sorted(formats.KINDS))
def test_the_page_of_formats_names_every_kind_and_field(kind: str) -> None:
    assert kind in DOCS
    for field in msgspec.structs.fields(formats.KINDS[kind]):
        assert f"`{field.name}`" in DOCS or f"{field.name}" in DOCS, field.name
