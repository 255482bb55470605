"""A hub that cannot be reached is found out at once."""

import socket

import pytest
from huggingface_hub import constants

from launch import hub


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """As in a new process that is not offline and has no proxy."""
    hub.use_hub_or_cache.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    hub.use_hub_or_cache.cache_clear()


def test_a_hub_that_answers_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.use_hub_or_cache()
    assert not constants.HF_HUB_OFFLINE


def test_without_a_hub_the_cache_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    hub.use_hub_or_cache()
    assert constants.HF_HUB_OFFLINE


def test_a_proxy_is_trusted(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:1")
    hub.use_hub_or_cache()
    assert not constants.HF_HUB_OFFLINE
