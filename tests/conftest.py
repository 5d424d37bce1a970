"""What every test lives under: no network, no GPU unless asked for, one thread, an empty home for the hub.

Of `pytest -n 2` each process reads this file by itself, and so has its own home and its own thread.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_attempts: list[str] = []
_home = tempfile.mkdtemp(prefix="ldm-pipe-tests-")

# Before torch and the hub are imported by any test; subprocesses inherit it.
os.environ.update(
    HF_HOME=_home,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
for _secret in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_secret, None)

# How long an example takes is the machine's affair: several processes share it.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from tests that do not ask for it: their tolerances are those of a CPU in fp32."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(_home, ignore_errors=True)


def is_local(address: Any) -> bool:
    """Tell whether a socket address stays on this machine (gloo and accelerate need loopback and unix sockets)."""
    if isinstance(address, (str, bytes)):
        return True  # a unix socket
    host = address[0]
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class _GuardedSocket(socket.socket):
    """A socket that goes nowhere but here. The error is the one of a machine without network."""

    def connect(self, address: Any) -> None:
        _refuse_far(address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        _refuse_far(address)
        return super().connect_ex(address)

    def sendto(self, *args: Any) -> int:
        _refuse_far(args[-1])
        return super().sendto(*args)


def _refuse_far(address: Any) -> None:
    if not is_local(address):
        _attempts.append(str(address))
        raise ConnectionError(f"the tests have no network: {address}")


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every connection that leaves the machine, and fail the test that tried, even if it caught the error."""
    if request.node.get_closest_marker("network"):
        yield
        return
    look_up = socket.getaddrinfo

    def look_up_local(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        _refuse_far((name or "", 0))
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "socket", _GuardedSocket)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_local)
    _attempts.clear()
    yield
    tried, _attempts[:] = list(_attempts), []
    assert not tried, f"this test reached for the network: {tried}"
