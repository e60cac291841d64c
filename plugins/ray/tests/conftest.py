"""Fixtures: a cluster of Ray on this machine, and models."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from api.tiny_models import write_endless, write_tiny
from ray_clusters import Cluster, ray, serve


def pytest_configure(config: pytest.Config) -> None:
    """Let Ray use what is deprecated, and leave sockets open when it ends."""
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start a cluster, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield Cluster(f"http://127.0.0.1:{port}")
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def endless_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose answers are longer than any test waits."""
    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    return write_endless(path, context=80000)
