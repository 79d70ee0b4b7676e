"""Offline switch, seeds and folders shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported, so before everything else

import ipaddress
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism


def is_local(host: object) -> bool:
    """Whether a host name or address stays on this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def block_network(request, monkeypatch):
    """Any connection beyond this machine fails at once, except in tests marked `network`."""
    if request.node.get_closest_marker("network"):
        return
    originals = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    getaddrinfo = socket.getaddrinfo

    def refuse(host):
        raise RuntimeError(
            f"This test wanted to reach {host!r}; mark it with @pytest.mark.network or make it offline."
        )

    def guarded(name):
        def connect(self, address):
            if self.family != socket.AF_UNIX and not is_local(address[0]):
                refuse(address[0])
            return originals[name](self, address)

        return connect

    def guarded_getaddrinfo(host, *args, **kwargs):
        if not is_local(host):
            refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    for name in originals:
        monkeypatch.setattr(socket.socket, name, guarded(name))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: reference values and sample data."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout (reference values and sample data)")
    return folder
