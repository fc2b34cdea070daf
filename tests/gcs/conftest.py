"""A store on loopback that speaks as Google Cloud Storage, and clients of it that wait for nobody for long."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
from milepost.testing.objects import ObjectServer
from milepost_gcs import GcsStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["BUCKET", "opened", "server", "storage"]

BUCKET = "bucket"


@pytest.fixture(scope="session")
def _running() -> Iterator[ObjectServer]:
    with ObjectServer(buckets=(BUCKET,)) as server:
        yield server


@pytest.fixture
def server(_running: ObjectServer) -> Iterator[ObjectServer]:
    """Return an empty store without faults."""
    _running.store.clear()
    _running.forget()
    yield _running
    _running.clear_rules()
    _running.only(None)
    _running.thaw()
    _running.weak = frozenset()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing of the machine's own credentials, emulators or proxies matter."""
    for name in (
        *("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"),
        *("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"),
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def opened(server: ObjectServer) -> Callable[..., GcsStorage]:
    """Return a way to open a client of the store."""
    return functools.partial(
        GcsStorage, f"gs://{BUCKET}/runs", endpoint_url=server.url, timeout=10.0, retries=3, part_bytes=1 << 20
    )


@pytest.fixture
def storage(opened: Callable[..., GcsStorage]) -> GcsStorage:
    """Return a client of the store."""
    return opened()
