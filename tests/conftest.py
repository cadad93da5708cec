"""What every test runs under: no network, a cache of its own, few threads, checked shapes."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import AF_UNIX
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import beartype
import hypothesis
import jaxtyping
import pytest

THREADS = 2
SHAPED = [
    *("types", "losses", "kernels", "variants", "model", "convert", "checkpoint", "subject", "tokens", "activations"),
    *(
        "n2g",
        "stream",
        "run_folder",
        "step",
        "training",
        "evals",
        "scaling",
        "explanations",
        "sweeps",
        "main_job",
        "viewer.live",
    ),
]
"""Modules whose annotations are checked at every call. The others promise a ValueError for values of any type."""
NETWORK_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind")
LOOKUP_EVENTS = ("socket.getaddrinfo", "socket.gethostbyname")
LOOPBACK_NAMES = ("localhost", "", None)

blocked: list[str] = []
"""Attempts to reach the network, refused since the test began; code that swallows the refusal does not hide it."""


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, where an int may stand for a float as everywhere in Python's typing."""
    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)


def refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: `RuntimeError` on any use of a socket but loopback and unix ones. It cannot be taken off."""
    if event in NETWORK_EVENTS:
        if getattr(args[0], "family", None) == AF_UNIX or args[1] is None:
            return
        host = args[1][0]
    elif event in LOOKUP_EVENTS:
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    else:
        return
    if not is_loopback(host):
        blocked.append(f"{event} {host}")
        raise RuntimeError(f"tests must not use the network ({event} to {host!r})")


def is_loopback(host: Any) -> bool:
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


sys.addaudithook(refuse_network)
jaxtyping.install_import_hook([f"monosem.{module}" for module in SHAPED], f"{__name__}.typechecked")
# Tests and their processes hear these also where they run in the background or under nohup.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    signal.signal(getattr(signal, name), handler)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """At most THREADS threads, so that sums come out alike on machines of any size."""
    import torch

    torch.set_num_threads(min(THREADS, int(os.environ.get("OMP_NUM_THREADS", THREADS))))


@pytest.fixture(autouse=True, scope="session")
def known_cpu() -> Iterator[None]:
    """In this process dtype auto is bfloat16 on a CPU, whatever CPU that is and however busy."""
    from monosem import dtypes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtypes, "_cpu", lambda: ("a CPU with AMX", ["amx_bf16"]))
        patch.setattr(dtypes, "_known", lambda machine: dtypes.ProductTimes(float32=2.0, bfloat16=1.0))
        yield


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """The test fails when anything in it tried to reach the network, even if the refusal was swallowed."""
    blocked.clear()
    yield
    assert blocked == [], f"tests must not use the network: {blocked}"


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONOSEM_CACHE is an empty folder of the test, but for the tests marked `real`."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("MONOSEM_CACHE", str(request.getfixturevalue("tmp_path") / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with its tokenizer, small enough to run in milliseconds. Read it, don't write to it."""
    from tiny import tiny_lm

    return tiny_lm(tmp_path_factory.mktemp("tiny_model"), "llama")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of short pseudo-English documents, always the same ones."""
    from tiny import tiny_corpus

    return tiny_corpus(tmp_path_factory.mktemp("tiny_corpus"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium. What is expected of its pages may take 20 s, as on a machine with other work."""
    from playwright.sync_api import expect, sync_playwright

    from browsing import chromium

    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright, chromium(playwright) as found:
        yield found


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of SmolLM2-135M-Instruct, Q4_1, de-quantised, of a few thousand tokens; for tests marked `real`."""
    from monosem.config import EvalConfig, HarvestConfig, RunConfig, TrainConfig
    from monosem.main_job import run

    folder = tmp_path_factory.mktemp("real") / "run"
    run(
        RunConfig(
            out=str(folder),
            harvest=HarvestConfig(out="", n_tokens=4032, n_tokens_held_out=1008, block_contexts=8, device="cpu"),
            train=TrainConfig(out="", store="", n_latents=1024, n_tokens=256 * 60, batch_size=256, device="cpu"),
            eval=EvalConfig(run="", n_bootstrap=100, n_tokens_downstream=1024, device="cpu"),
        )
    )
    return folder
