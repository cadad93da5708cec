"""A store is whole or unfinished, never wrong; the stream is a pure function of (source, seed, position)."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from monosem import activations, artifacts, dtypes
from monosem.activations import ActivationStore, harvest
from monosem.config import HarvestConfig
from monosem.run_folder import subject_of
from monosem.stream import ActivationStream, LiveSource, StoreSource
from monosem.subject import Subject
from tiny import tiny_corpus, tiny_lm

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny model and a corpus."""
    folder = tmp_path_factory.mktemp("inputs")
    return str(tiny_lm(folder / "model")), str(tiny_corpus(folder / "corpus"))


@pytest.fixture
def config(tmp_path: Path, inputs: tuple[str, str]) -> HarvestConfig:
    """10 training blocks of 4 x 15 rows in 4 shards, 3 held-out blocks in 1."""
    return HarvestConfig(
        out=str(tmp_path / "store"),
        model=inputs[0],
        corpus=inputs[1],
        context_length=16,
        n_tokens=590,
        n_tokens_held_out=121,
        held_out_fraction=0.3,
        dtype="bfloat16",
        block_contexts=4,
        shard_blocks=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, inputs: tuple[str, str]) -> ActivationStore:
    return harvest(config.__wrapped__(tmp_path_factory.mktemp("shared"), inputs))  # type: ignore[attr-defined]


def content(out: str | Path) -> Files:
    """Every file of a store; the manifest without the folder it was made in."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}
    for name in {"manifest.json", "plan.json"} & set(found):
        data = json.loads(found[name])
        del data["config"]["out"], data["seal"]
        found[name] = json.dumps(data).encode()
    return found


class Killed(BaseException):
    """A process that dies here and now."""


@pytest.mark.parametrize("when", ["while writing", "after the rename"])
def test_harvest_killed_at_any_write_ends_in_the_same_bytes(
    config: HarvestConfig, store: ActivationStore, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic = artifacts.write_atomic
    n_writes = deadly_write = 0

    def mortal(path: str | Path, write: Callable[[Path], None]) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes != deadly_write:
            return write_atomic(path, write)
        leftover = Path(path).with_name(f".{Path(path).name}.1.tmp")
        leftover.parent.mkdir(parents=True, exist_ok=True)
        write(leftover)
        if when == "while writing":
            os.truncate(leftover, leftover.stat().st_size // 2)
        else:
            leftover.rename(path)
        raise Killed

    subject = Subject.load(config.model, dtype=config.dtype, device="cpu")
    monkeypatch.setattr(Subject, "load", lambda *args, **options: subject)
    monkeypatch.setattr(artifacts, "write_atomic", mortal)
    monkeypatch.setattr(artifacts, "_fsync", lambda path: None)  # slow, and no one cuts the power here
    n_files = len(content(store.path)) - 1  # the lock is no write
    for n in range(1, n_files + 1):
        again = dataclasses.replace(config, out=f"{config.out}-{n}")
        n_writes, deadly_write = 0, n
        with pytest.raises(Killed):
            harvest(again)
        if not (n == n_files and when == "after the rename"):
            with pytest.raises(ValueError, match=r"did not finish|harvest one first"):
                ActivationStore.open(again.out)
        deadly_write = 0
        harvest(again)
        assert content(again.out) == content(store.path)


def test_harvest_goes_on_after_kill_9(config: HarvestConfig, store: ActivationStore) -> None:
    code = f"""
import os, signal, torch
from monosem import activations, artifacts
from monosem.config import HarvestConfig
torch.set_num_threads({torch.get_num_threads()})
def dying_write(path, write):
    if path.name == "shard-00002.safetensors":
        path.with_name(f".{{path.name}}.{{os.getpid()}}.tmp").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    write_atomic(path, write)
write_atomic, artifacts.write_atomic = artifacts.write_atomic, dying_write
activations.harvest(HarvestConfig(**{dataclasses.asdict(config)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = Path(config.out) / "train" / "shard-00001.safetensors"
    written_ns = kept.stat().st_mtime_ns
    assert not (Path(config.out) / "manifest.json").exists()
    harvest(config)
    assert content(config.out) == content(store.path)
    assert kept.stat().st_mtime_ns == written_ns


@pytest.mark.parametrize("damage", ["truncated", "flipped", "sidecar torn"])
def test_a_damaged_shard_is_never_taken_for_whole_on_resume(
    config: HarvestConfig, store: ActivationStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    harvest(config)
    (Path(config.out) / "manifest.json").unlink()
    shard = Path(config.out) / "train" / "shard-00001.safetensors"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 8)
    elif damage == "flipped":
        flip_last_byte(shard)
    else:
        shard.with_suffix(".json").write_text('{"sha256": ')
    harvest(config)
    assert "shard-00001.safetensors is damaged and is harvested again" in caplog.text
    assert content(config.out) == content(store.path)


def test_a_complete_store_is_left_alone(config: HarvestConfig, caplog: pytest.LogCaptureFixture) -> None:
    harvest(config)
    before = {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*.*")}
    with caplog.at_level(logging.INFO, "monosem"):
        caplog.clear()
        harvest(dataclasses.replace(config, device="auto"))
    assert [r.message for r in caplog.records] == [f"store {config.out} is already complete"]
    assert {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*.*") if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


@pytest.mark.parametrize("finished", [True, False])
def test_harvest_names_what_changed(config: HarvestConfig, tmp_path: Path, finished: bool) -> None:
    corpus = tiny_corpus(tmp_path / "own")
    config = dataclasses.replace(config, corpus=str(corpus))
    harvest(config)
    if not finished:
        (Path(config.out) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"another harvest \(layer: None -> 1; seed: 0 -> 3\); choose another out"):
        harvest(dataclasses.replace(config, layer=1, seed=3))
    tiny_corpus(tmp_path / "own", seed=1)
    with pytest.raises(ValueError, match=r"another harvest \(corpus: '\w+' -> '\w+'\)"):
        harvest(config)


def test_a_full_disk_is_one_clear_line_and_what_was_finished_is_kept(
    config: HarvestConfig, store: ActivationStore
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (
        (store.path / "train" / "shard-00003.safetensors").stat().st_size
    )  # the last shard is smaller than the others
    harvest(config)
    for index in (1, 3):
        (Path(config.out) / "train" / f"shard-0000{index}.safetensors").unlink()
    (Path(config.out) / "manifest.json").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match=r"no room to write \S+shard-00001\.safetensors") as raised:
            harvest(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert not list(Path(config.out).rglob("*.tmp"))
    with pytest.raises(ValueError, match="did not finish"):
        ActivationStore.open(config.out)
    harvest(config)
    assert content(config.out) == content(store.path)


def test_a_folder_in_use_is_refused(config: HarvestConfig) -> None:
    with artifacts.folder_lock(config.out), pytest.raises(ValueError, match="another process is working in"):
        harvest(config)


@pytest.mark.parametrize("keep_first_token", [False, True])
def test_rows_are_the_site_s_activations_without_first_tokens(config: HarvestConfig, keep_first_token: bool) -> None:
    made = harvest(dataclasses.replace(config, keep_first_token=keep_first_token, layer=2))
    subject = Subject.load(config.model, dtype=config.dtype, device="cpu")
    assert made.site == subject.site(2)
    for split, n_tokens in (("train", 590), ("held_out", 121)):
        found = made.contexts(split)
        entry = made.manifest["splits"][split]
        first = 0 if keep_first_token else 1
        expected = torch.cat([subject.capture(block, made.site)[:, first:] for block in found.tokens.split(4)])
        assert made.rows(split).equal(expected.reshape(-1, made.width))
        assert made.rows(split).dtype == torch.bfloat16
        assert made.n_rows(split) == len(found.tokens) * (16 - first) >= n_tokens > made.n_rows(split) - made.block_rows
        assert entry["n_excluded"] == len(found.tokens) * first
        assert torch.cat(list(made.batches(split, 37))).equal(made.rows(split).float())
        assert {len(batch) for batch in list(made.batches(split, 37))[:-1]} == {37}


def test_splits_share_no_document(store: ActivationStore) -> None:
    train, held_out = (set(store.contexts(split).document_hashes) for split in ("train", "held_out"))
    assert train and held_out and not train & held_out


def test_mean_is_the_training_rows_mean_in_float64(store: ActivationStore) -> None:
    torch.testing.assert_close(store.mean, store.rows("train").double().mean(dim=0), rtol=1e-12, atol=1e-12)


def test_norms_tell_sinks_from_the_rest(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = activations.capture_block

    def with_sinks(*args: Any, **options: Any) -> list[Tensor]:
        (found,) = captured(*args, **options)
        found = torch.nn.functional.normalize(found.float(), dim=2)
        found[:, 0] *= 1000
        found[0, 5] *= 100
        return [found]

    monkeypatch.setattr(activations, "capture_block", with_sinks)
    norms = harvest(dataclasses.replace(config, dtype="float32")).manifest["norms"]
    assert norms["first_token_mean"] == pytest.approx(1000, rel=1e-4)
    assert norms["rows_mean"] == pytest.approx((59 + 100) / 60, rel=1e-4)
    assert norms["n_rows_large"] == 13


def test_activations_that_are_not_finite_are_refused_with_their_address(
    config: HarvestConfig, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = activations.capture_block

    def poisoned(subject: Subject, sites: Any, tokens: Tensor, **options: Any) -> list[Tensor]:
        found = captured(subject, sites, tokens, **options)
        if tokens.equal(store.contexts("train").tokens[8:12]):
            found[-1][1, 3, 0] = torch.nan
        return found

    monkeypatch.setattr(activations, "capture_block", poisoned)
    expected = store.contexts("train")
    document, position = expected.document_hashes[expected.documents[9, 3]], expected.positions[9, 3]
    with pytest.raises(
        ValueError, match=rf"not finite at train context 9, token 3 \(document {document}, position {position}\)"
    ):
        harvest(config)


@pytest.mark.parametrize("location", ["resid_post_mlp", "resid_post_attn", "mlp_post_act"])
def test_several_layers_in_one_pass_give_the_stores_of_each_alone(
    config: HarvestConfig, tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(config, location=location)
    alone = [harvest(dataclasses.replace(settings, layer=i, out=str(tmp_path / f"alone-{i}"))) for i in (1, 0)]
    shards, n_passes = alone[0].manifest["splits"], []
    captured = activations.capture_block

    def counted(subject: Subject, sites: Any, tokens: Tensor, **options: Any) -> list[Tensor]:
        n_passes.append(len(sites))
        return captured(subject, sites, tokens, **options)

    monkeypatch.setattr(activations, "capture_block", counted)
    together = dataclasses.replace(settings, layers=(1, 0), layer=None, out=str(tmp_path / "both"))
    both = activations.harvest_layers(together)
    assert [store.path.name for store in both] == ["layer-1", "layer-0"]
    assert [store.hash for store in both] == [store.hash for store in alone]
    n_blocks = sum(shards[split]["n_blocks"] for split in ("train", "held_out"))
    assert n_passes == [2] * n_blocks
    (both[0].path / "manifest.json").unlink()
    next((both[0].path / "train").glob("shard-00001.*ors")).unlink()
    again = activations.harvest_layers(together)
    assert [store.hash for store in again] == [store.hash for store in alone]
    assert set(n_passes[n_blocks:]) == {1}, "only what is missing is captured"


def chosen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Here, from now on, a subject on a CPU runs fastest in this precision."""
    seconds = {"float32": 2.0, "bfloat16": 2.0, name: 1.0}
    monkeypatch.setattr(dtypes, "_known", lambda machine: dtypes.ProductTimes(**seconds))


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_auto_takes_the_faster_precision_and_the_store_says_which(
    config: HarvestConfig, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen(monkeypatch, name)
    with caplog.at_level(logging.INFO, "monosem"):
        store = harvest(dataclasses.replace(config, dtype="auto"))
    assert f"the subject runs in {name}" in caplog.text
    plan = artifacts.read_json(store.path / "plan.json")
    assert name == store.subject_dtype == store.manifest["subject_dtype"] == plan["subject_dtype"]
    subject = Subject.load(config.model, dtype=name, device="cpu")
    blocks = store.contexts("train").tokens.split(config.block_contexts)
    expected = torch.cat([subject.capture(block, store.site)[:, 1:].flatten(0, 1) for block in blocks])
    assert store.manifest["dtype"] == "bfloat16" and store.rows("train").equal(expected.bfloat16())
    assert subject_of(store, store.subject_dtype, "cpu").dtype == getattr(torch, name)
    explicit = harvest(dataclasses.replace(config, out=f"{config.out}-explicit"))
    assert (explicit.hash == store.hash) == (name == "bfloat16"), "the same precision gives the same store"


def test_the_precision_is_part_of_a_store_s_identity(store: ActivationStore) -> None:
    other = "float32" if store.subject_dtype == "bfloat16" else "bfloat16"
    assert ActivationStore(store.path, {**store.manifest, "subject_dtype": other}).hash != store.hash


@pytest.mark.parametrize(("began", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_harvest_goes_on_in_the_precision_that_it_began_with(
    config: HarvestConfig, began: str, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, dtype="auto")
    chosen(monkeypatch, began)
    whole = content(harvest(dataclasses.replace(config, out=f"{config.out}-whole")).path)
    harvest(config)
    for name in ("manifest.json", "train/shard-00001.safetensors", "held_out/shard-00000.json"):
        (Path(config.out) / name).unlink()
    chosen(monkeypatch, now)
    harvest(config)
    assert content(config.out) == whole
    harvest(config)
    assert content(config.out) == whole, "nor is a complete one made again"


def test_layers_begun_in_two_precisions_are_harvested_apart(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(config, dtype="auto")
    for layer, name in ((0, "float32"), (1, "bfloat16")):
        chosen(monkeypatch, name)
        made = harvest(dataclasses.replace(settings, layer=layer, out=str(tmp_path / "both" / f"layer-{layer}")))
        (made.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"begun with the subject in bfloat16 and float32; harvest them apart"):
        activations.harvest_layers(dataclasses.replace(settings, layers=(0, 1), out=str(tmp_path / "both")))


def test_layers_are_given_once_and_not_beside_layer(config: HarvestConfig) -> None:
    for layer, layers in ((0, (1,)), (None, (1, 1)), (None, (-1, 0))):
        with pytest.raises(ValueError, match="give one of them, each layer once, counted from 0"):
            dataclasses.replace(config, layer=layer, layers=layers)
    with pytest.raises(ValueError, match="call harvest_layers, or give layer"):
        harvest(dataclasses.replace(config, layer=None, layers=(0, 1)))


def test_contexts_longer_than_the_subject_reads_are_refused(config: HarvestConfig) -> None:
    with pytest.raises(ValueError, match=r"context_length is 129; .* reads at most 128"):
        harvest(dataclasses.replace(config, context_length=129))


def test_too_little_held_out_text_shows_before_any_forward_pass(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "capture_block", None)
    with pytest.raises(ValueError, match="held-out tokens"):
        harvest(dataclasses.replace(config, n_tokens_held_out=10**6))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_open_refuses_what_is_no_whole_store(config: HarvestConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not an activation store .*harvest one first"):
        ActivationStore.open(tmp_path)
    harvest(config)
    manifest = Path(config.out) / "manifest.json"
    text = manifest.read_text()
    for old, new, message in (
        ('"kind": "activation-store"', '"kind": "run"', "describes 'run', not 'activation-store'"),
        ('"format": 1', '"format": 2', "has format 2; this version reads format 1"),
        ('"splits"', '"split"', "has an unknown field split"),
        ("{", "", "is not valid JSON"),
    ):
        manifest.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            ActivationStore.open(config.out)
    manifest.write_text(text)
    shard = Path(config.out) / "train" / "shard-00002.safetensors"
    os.truncate(shard, 100)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors has 100 bytes, not \d+; copy the store again"):
        ActivationStore.open(config.out)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing"):
        ActivationStore.open(config.out)


def test_a_flipped_bit_is_noticed_when_the_shard_is_read(config: HarvestConfig) -> None:
    harvest(config)
    flip_last_byte(Path(config.out) / "train" / "shard-00001.safetensors")
    damaged = ActivationStore.open(config.out)
    damaged.block("train", 2)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors does not match the sha256"):
        damaged.block("train", 3)
    with ActivationStream(StoreSource(damaged), 60, 0) as stream, pytest.raises(ValueError, match="does not match"):
        for _ in range(10):
            next(stream)


def test_a_store_may_move(config: HarvestConfig, tmp_path: Path) -> None:
    made = harvest(config)
    Path(config.out).rename(tmp_path / "moved")
    assert ActivationStore.open(tmp_path / "moved").hash == made.hash


@dataclasses.dataclass
class Numbers:
    """A source whose row r is [r, r]."""

    n_blocks: int
    block_rows: int
    width: int = 2
    hash: str = "numbers"
    fails_at: int | None = None

    def block(self, index: int) -> Float[Tensor, "block_rows width"]:
        if index == self.fails_at:
            raise OSError(f"block {index} is gone")
        start = index * self.block_rows
        return torch.arange(start, start + self.block_rows).float()[:, None].expand(-1, 2)


def taken(stream: ActivationStream, n: int) -> list[list[float]]:
    return [next(stream)[:, 0].tolist() for _ in range(n)]


sources = st.builds(Numbers, st.integers(1, 9), st.integers(1, 7))
sizes = st.integers(1, 20)


@given(sources, sizes, st.integers(1, 5), st.integers(0, 99))
def test_stream_gives_every_row_once_an_epoch(source: Numbers, batch_size: int, window_blocks: int, seed: int) -> None:
    n_rows, n_epochs = source.n_blocks * source.block_rows, 3
    with ActivationStream(source, batch_size, seed, window_blocks=window_blocks) as stream:
        rows = [row for batch in taken(stream, -(-n_epochs * n_rows // batch_size)) for row in batch]
    for epoch in range(n_epochs):
        assert sorted(rows[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


@given(sources, sizes, st.integers(1, 5), st.integers(0, 99), st.integers(0, 30), st.integers(1, 4))
def test_stream_resumes_at_the_exact_next_batch(
    source: Numbers, batch_size: int, window_blocks: int, seed: int, n_before: int, prefetch_batches: int
) -> None:
    options: dict[str, Any] = {"window_blocks": window_blocks}
    with ActivationStream(source, batch_size, seed, **options) as stream:
        expected = taken(stream, n_before + 5)
    with ActivationStream(source, batch_size, seed, prefetch_batches=prefetch_batches, **options) as stream:
        assert taken(stream, n_before) == expected[:n_before]
        state = json.loads(json.dumps(stream.state_dict()))
        assert taken(stream, 3) == expected[n_before : n_before + 3]
        stream.load_state_dict(state)
        assert taken(stream, 5) == expected[n_before:]
    with ActivationStream(source, batch_size, seed, **options) as stream:
        stream.load_state_dict(state)
        assert taken(stream, 5) == expected[n_before:]


def test_stream_shuffles_within_windows_and_anew_each_epoch_and_seed() -> None:
    source = Numbers(n_blocks=8, block_rows=50)

    def epochs(seed: int) -> list[list[float]]:
        with ActivationStream(source, 400, seed, window_blocks=4) as stream:
            return taken(stream, 2)

    first, second = epochs(0)
    assert first != second and epochs(1)[0] != first and epochs(0) == [first, second]
    blocks = [{int(row) // 50 for row in half} for half in (first[:200], first[200:])]
    assert [len(b) for b in blocks] == [4, 4] and not blocks[0] & blocks[1]
    assert [int(row) // 50 for row in first[:200]] != sorted(int(row) // 50 for row in first[:200])


def test_the_order_of_rows_never_changes_between_versions() -> None:
    with ActivationStream(Numbers(n_blocks=3, block_rows=3), 9, seed=7, window_blocks=2) as stream:
        assert taken(stream, 2) == [[4, 3, 8, 7, 6, 5, 0, 1, 2], [4, 7, 6, 5, 8, 3, 1, 0, 2]]


@pytest.mark.parametrize("field", ["seed", "batch_size", "window_blocks", "source"])
def test_stream_refuses_the_position_in_another_stream(field: str) -> None:
    state = ActivationStream(Numbers(2, 3), 4, 0).state_dict()
    with pytest.raises(ValueError, match=rf"another stream \({field}: "):
        ActivationStream(Numbers(2, 3), 4, 0).load_state_dict({**state, field: "other"})


def test_stream_raises_what_its_source_raises_and_ends_its_thread() -> None:
    n_threads = threading.active_count()
    stream = ActivationStream(Numbers(4, 5, fails_at=2), 20, 0)
    for _ in range(2):  # again when asked again: a lost block is not skipped
        with pytest.raises(OSError, match="block 2 is gone"):
            next(stream)
    assert threading.active_count() == n_threads
    assert stream.n_batches == 0


def test_stream_ends_its_thread_when_closed_or_dropped() -> None:
    before = set(threading.enumerate())  # of which some may end meanwhile
    started = lambda: set(threading.enumerate()) - before  # noqa: E731
    with ActivationStream(Numbers(4, 5), 2, 0) as stream:
        next(stream)
        assert len(started()) == 1
    assert not started()
    next(stream)
    del stream
    gc.collect()
    deadline = time.monotonic() + 120
    while started() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not started()


def test_stream_reads_ahead_a_bounded_number_of_batches() -> None:
    read: list[int] = []

    class Counted(Numbers):
        def block(self, index: int) -> Float[Tensor, "block_rows width"]:
            read.append(index)
            return super().block(index)

    with ActivationStream(Counted(100, 4), 4, 0, window_blocks=1, prefetch_batches=3) as stream:
        next(stream)
        deadline = time.monotonic() + 120
        while len(read) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
    assert len(read) == 5  # one given, three waiting, one at the door


def test_stream_of_a_store_gives_its_rows_exactly(store: ActivationStore) -> None:
    n_rows = store.n_rows("train")
    with ActivationStream(StoreSource(store), 50, 3) as stream:
        rows = torch.cat([next(stream) for _ in range(n_rows // 50)])
    assert rows.dtype == torch.float32 and len(rows) == n_rows
    stored = store.rows("train").float()
    assert rows[lexicographic(rows)].equal(stored[lexicographic(stored)])


def lexicographic(rows: Tensor) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: rows[i].tolist())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_live_blocks_equal_the_stored_ones(config: HarvestConfig, dtype: Any) -> None:
    made = harvest(dataclasses.replace(config, dtype=dtype))
    subject = Subject.load(config.model, dtype=dtype, device="cpu")
    live = LiveSource(subject, made.site, made.contexts("train"), block_contexts=config.block_contexts)
    stored = StoreSource(made)
    assert (live.n_blocks, live.block_rows, live.width) == (stored.n_blocks, stored.block_rows, stored.width)
    with ActivationStream(live, 70, 0) as a, ActivationStream(stored, 70, 0) as b:
        for _ in range(20):
            assert next(a).equal(next(b))


def test_live_source_refuses_part_of_a_block(store: ActivationStore) -> None:
    subject = Subject.load(store.config["model"], dtype="bfloat16", device="cpu")
    with pytest.raises(ValueError, match="40 contexts are not whole blocks of 3"):
        LiveSource(subject, store.site, store.contexts("train"), block_contexts=3)
