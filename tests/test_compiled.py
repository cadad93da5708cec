"""A subject may run compiled: faster, no less exact, noted in the store, and never in the way of a hook."""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from monosem import activations, artifacts, dtypes
from monosem.activations import ActivationStore, harvest
from monosem.config import HarvestConfig
from monosem.subject import Subject
from monosem.types import LOCATIONS
from tiny import FAMILIES, VOCAB_SIZE, tiny_lm


def tokens(batch: int = 8, ctx: int = 16) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, ctx), generator=torch.Generator().manual_seed(0))


def scaled(factor: float) -> Callable[..., Any]:
    """In place of torch.compile: each compiled block's first output is `factor` times what it was."""

    def compile_(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*args: Any, **options: Any) -> Any:
            out = forward(*args, **options)
            return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

        return compiled

    return compile_


def refusing(*_: Any, **__: Any) -> Any:
    def compiled(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a page about it")

    return compiled


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, tiny_corpus: Path) -> HarvestConfig:
    return HarvestConfig(
        out=str(tmp_path / "store"), model=str(tiny_model), corpus=str(tiny_corpus), context_length=16, n_tokens=240,
        n_tokens_held_out=60, held_out_fraction=0.3, block_contexts=4, shard_blocks=1, device="cpu",
    )  # fmt: skip


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every harvest is large enough to compile."""
    monkeypatch.setattr(activations, "COMPILE_FROM_TOKENS", 1)


@pytest.mark.skipif(not (shutil.which("g++") or "CI" in os.environ), reason="torch.compile needs a C++ compiler")
def test_compiled_activations_err_no_more_than_plain_ones(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # another test may have imported distutils already
    plain, exact = (Subject.load(str(tiny_model), dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    site = plain.site(2)
    truth = exact.capture(tokens(), site)
    compiled = plain.capture(tokens(), site, compiled=True)
    error, allowed = ((a.float() - truth).norm() for a in (compiled, plain.capture(tokens(), site)))
    assert 0 < error <= 1.05 * allowed
    assert compiled.equal(plain.capture(tokens(), site, compiled=True))
    assert not compiled.equal(plain.capture(tokens(), site)), "nothing was compiled"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_inside_a_block_is_never_compiled_over(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", scaled(1))
    subject = Subject.load(str(tiny_lm(tmp_path, family)), dtype="float32", device="cpu")
    for location in LOCATIONS:
        if (family, location) == ("gpt_neox", "resid_post_attn"):
            continue
        site = subject.site(2, location)
        assert len(subject.blocks_before(site)) == (3 if location == "resid_post_mlp" else 2)
        assert subject.capture(tokens(), site, compiled=True).equal(subject.capture(tokens(), site))
    assert subject._family is not None
    blocks, inside = subject._family.blocks, subject._family.attn_z.path
    for name, n in ((f"{blocks}.1", 2), (f"{blocks}.1:input", 1), (f"{blocks}.1.{inside}:input", 1), (blocks, 0)):
        assert len(subject.blocks_before(subject.site(location=name))) == n
    site = subject.site(location=f"{blocks}.2.{inside}:input")
    assert subject.capture(tokens(), site, compiled=True).equal(subject.capture(tokens(), subject.site(2, "attn_z")))


def test_compiled_blocks_do_not_outlast_the_call(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", refusing)
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    before = subject.capture(tokens(), subject.site(2))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        subject.capture(tokens(), subject.site(2), compiled=True)
    assert subject.capture(tokens(), subject.site(2)).equal(before)


def test_a_large_harvest_is_compiled_and_its_manifest_says_so(
    config: HarvestConfig, large: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", scaled(1 + 2**-7))
    with caplog.at_level(logging.INFO, "monosem"):
        store = harvest(config)
    assert "compiled" in caplog.text and store.manifest["compiled"] is True
    subject = Subject.load(config.model, device="cpu")
    blocks = store.contexts("train").tokens.split(config.block_contexts)
    expected = torch.cat([subject.capture(block, store.site, compiled=True)[:, 1:] for block in blocks])
    assert store.rows("train").equal(expected.flatten(0, 1))
    assert not subject.capture(blocks[0], store.site)[:, 1:].equal(expected[: config.block_contexts])


@pytest.mark.parametrize(("more", "compiled"), [(0, True), (1, False)])
def test_a_harvest_that_auto_runs_in_float32_is_compiled_from_fewer_tokens_on(
    config: HarvestConfig, more: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = config.n_tokens + config.n_tokens_held_out + more
    monkeypatch.setattr(activations, "COMPILE_FROM_TOKENS_FP32", least)
    monkeypatch.setattr(dtypes, "fastest", lambda device: "float32")
    monkeypatch.setattr(torch, "compile", scaled(1 + 2**-7))
    store = harvest(config)
    assert (store.subject_dtype, store.manifest["compiled"]) == ("float32", compiled)


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"n_tokens": 100}])
def test_a_small_or_float32_harvest_is_not_compiled(
    config: HarvestConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COMPILE_FROM_TOKENS", "COMPILE_FROM_TOKENS_FP32"):
        monkeypatch.setattr(activations, name, config.n_tokens)
    monkeypatch.setattr(torch, "compile", None)
    assert harvest(dataclasses.replace(config, **changes)).manifest["compiled"] is False


@pytest.mark.parametrize(
    ("compile_", "told"), [(refusing, r"RuntimeError: no C++ compiler)"), (scaled(1.5), "its activations are off by")]
)
def test_what_does_not_compile_is_harvested_plain_and_logged(
    config: HarvestConfig, large: None, compile_: Any, told: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    harvest(dataclasses.replace(config, out=f"{config.out}-norm", location="model.norm"))
    assert "no block is known to be over before model.norm" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(activations, "COMPILE_FROM_TOKENS", config.n_tokens + config.n_tokens_held_out + 1)
        plain = harvest(dataclasses.replace(config, out=f"{config.out}-plain"))
    monkeypatch.setattr(torch, "compile", compile_)
    store = harvest(config)
    assert told in caplog.text and store.manifest["compiled"] is False
    assert store.rows("train").equal(plain.rows("train"))


def test_a_killed_harvest_goes_on_as_it_was_begun(
    config: HarvestConfig, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", scaled(1 + 2**-7))
    whole = harvest(dataclasses.replace(config, out=f"{config.out}-whole"))
    plan = cut(config, monkeypatch)
    assert plan["compiled"] is True
    monkeypatch.setattr(activations, "COMPILE_FROM_TOKENS", 10**9)
    monkeypatch.setattr(torch, "compile", refusing)
    with pytest.raises(ValueError, match=r"was begun with .* compiled, and here that fails \(RuntimeError: no C\+\+"):
        harvest(config)
    monkeypatch.setattr(torch, "compile", scaled(1 + 2**-7))
    assert harvest(config).hash == whole.hash


def test_a_harvest_begun_plain_goes_on_plain(
    config: HarvestConfig, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", refusing)
    whole = harvest(dataclasses.replace(config, out=f"{config.out}-whole"))
    plan = cut(config, monkeypatch)
    del plan["compiled"]  # as an older version wrote it
    tiny.reseal(Path(config.out) / "plan.json", plan)
    monkeypatch.setattr(torch, "compile", None)
    assert harvest(config).hash == whole.hash


def cut(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Harvest up to the second shard and stop there; the plan that is left."""
    write = activations._write_shard

    def mortal(job: Any, file: str, blocks: Any) -> Any:
        if file.endswith("shard-00001.safetensors"):
            raise KeyboardInterrupt
        return write(job, file, blocks)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(activations, "_write_shard", mortal)
        harvest(config)
    with pytest.raises(ValueError, match="did not finish"):
        ActivationStore.open(config.out)
    return artifacts.read_json(Path(config.out) / "plan.json")


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_a_forward_pass_does_not_fault_its_memory_in_again(tiny_model: Path) -> None:
    """Four times 20 MiB, freed and taken again twenty times, are 400,000 page faults by glibc's own rules."""
    Subject.load(str(tiny_model), device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        layer = [torch.zeros(5 * 2**20) for _ in range(4)]
        del layer
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 50_000
