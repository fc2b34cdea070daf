"""Every backend, on real servers, and every array writer: `-k "s3 and zarr"` chooses.

The rule: a test of this folder knows no backend. What it needs to know of one is a root to save below, and how to open
a second client of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import milepost
import pytest
from loopback import environment
from milepost.hookspecs import hookimpl
from milepost.plugins import installed
from milepost.routes import OpenRoute, open_route, resolve
from milepost.testing.faults import CuttingStorage
from milepost.testing.objects import ObjectServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from milepost.protocols import Storage

__all__ = ["Power", "Root", "power", "root", "server", "writer"]

BUCKET = "bucket"


@dataclasses.dataclass(frozen=True)
class Root:
    """A place below which checkpoints are."""

    url: str

    def path(self, name: str) -> str:
        """Return the URL of a checkpoint."""
        return f"{self.url}/{name}"

    def opened(self) -> OpenRoute:
        """Open the place, by a client of its own."""
        return open_route(resolve(self.path("_")))


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectServer]:
    """Return a store."""
    with ObjectServer(buckets=(BUCKET,)) as server:
        yield server


@pytest.fixture(params=["file", "gcs", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Return an empty root on a backend."""
    if request.param == "file":
        return Root(f"file://{tmp_path}/runs")
    server = request.getfixturevalue("server")
    server.store.clear()
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    return Root(f"{'gs' if request.param == 'gcs' else 's3'}://{BUCKET}/runs")


@pytest.fixture(params=["safetensors", "tensorstore", "zarr"])
def writer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the array writer that saves take."""
    with milepost.configured({"default": {"arrays": request.param}}):
        yield request.param


class Power:
    """Cuts the power of every storage that is opened, before a change of a given number."""

    def __init__(self) -> None:
        self._at: int | None = None
        self._opened: list[Any] = []

    @hookimpl(wrapper=True)
    def open_storage(self) -> Iterator[None]:
        """Give every storage a switch."""
        storage: Storage = yield
        cutting = CuttingStorage(storage, self._at)
        self._opened.append(cutting)
        return cutting

    @contextlib.contextmanager
    def cut(self, at: int | None) -> Iterator[list[Any]]:
        """Cut the power before change number `at`, counted from 0, for as long as the context lasts."""
        self._at, self._opened = at, []
        manager = installed()._manager
        manager.register(self)
        try:
            yield self._opened
        finally:
            manager.unregister(self)


@pytest.fixture
def power() -> Power:
    """Return the switch."""
    installed().load_all()
    return Power()
