"""The guards of conftest.py do guard."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import conftest
from monosem.types import resolve_device


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "0.0.0.0", "2001:db8::1"])
def test_a_connection_beyond_this_machine_is_refused_and_remembered(host: str) -> None:
    with pytest.raises(RuntimeError, match="must not use the network"):
        socket.create_connection((host, 80), timeout=1)
    assert len(conftest.blocked) == 1
    conftest.blocked.clear()


def test_a_datagram_beyond_this_machine_is_refused() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(RuntimeError, match="must not use the network"):
        udp.sendto(b"", ("192.0.2.1", 53))
    conftest.blocked.clear()


def test_no_network_fails_a_test_that_swallowed_the_refusal(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(conftest.__file__).read_text("utf-8"))
    pytester.makepyfile(
        """
        import contextlib, socket
        def test_swallows():
            with contextlib.suppress(Exception):
                socket.create_connection(("192.0.2.1", 80), timeout=1)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)


def test_loopback_and_unix_sockets_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    with (
        socket.create_server(("localhost", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1])),
    ):
        pass
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(os.path.relpath(tmp_path / "s"))
        server.listen()
        client.connect(os.path.relpath(tmp_path / "s"))


def test_each_test_has_an_empty_cache(tmp_path: Path) -> None:
    cache = Path(os.environ["MONOSEM_CACHE"])
    assert cache.is_relative_to(tmp_path)
    assert not cache.exists()


def test_torch_uses_few_threads() -> None:
    assert torch.get_num_threads() <= conftest.THREADS


def test_a_call_with_a_wrong_type_fails() -> None:
    with pytest.raises(TypeCheckError):
        resolve_device(3)  # type: ignore[arg-type]
