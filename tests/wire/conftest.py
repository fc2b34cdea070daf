"""A store on loopback, spoken to as S3 and as Google Cloud Storage, and processes that save to it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from loopback import environment
from milepost.testing.objects import ObjectServer
from wire import actors
from wire.states import BUCKET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Place", "crew", "place", "server", "settings"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A root on the store, by one of its two faces, and the environment in which clients find it."""

    scheme: str
    server: ObjectServer
    env: Mapping[str, str]

    def url(self, name: str) -> str:
        """Return the URL of a checkpoint."""
        return f"{self.scheme}://{BUCKET}/{name}"

    @property
    def root(self) -> str:
        """Return the URL below which the checkpoints are."""
        return f"{self.scheme}://{BUCKET}"


def settings(*, timeout: float, retries: int) -> str:
    """Return what is set for both schemes, for tests that try a client's patience."""
    lines = ["default.threads = 2"]
    for scheme in ("s3", "gs"):
        lines += [f'[url."{scheme}://{BUCKET}"]']
        lines += [f"storage_options = {{ timeout = {timeout}, retries = {retries}, concurrency = 2 }}"]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def crew() -> Iterator[actors.Actors]:
    """Return a maker of processes."""
    with actors.started() as crew:
        yield crew


@pytest.fixture(scope="session")
def _running() -> Iterator[ObjectServer]:
    with ObjectServer(buckets=(BUCKET,)) as server:
        yield server


@pytest.fixture
def server(_running: ObjectServer) -> ObjectServer:
    """Return an empty store without faults."""
    _running.clear_rules()
    _running.thaw()
    _running.store.clear()
    _running.forget()
    return _running


@pytest.fixture(params=["s3", "gs"])
def place(request: pytest.FixtureRequest, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Return a root by one face of the store; this process finds it, too."""
    env = environment(server.url) | {"MILEPOST_TOML": settings(timeout=20.0, retries=2)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return Place(request.param, server, env)
