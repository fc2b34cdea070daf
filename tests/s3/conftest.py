"""A store on loopback, and the environment in which nothing else can be reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from milepost.testing.objects import ObjectServer
from milepost_s3 import S3Storage

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bucket"


@pytest.fixture(scope="session")
def running() -> Iterator[ObjectServer]:
    with ObjectServer(buckets=(BUCKET,)) as server:
        yield server


@pytest.fixture
def server(running):
    """Return an empty store without faults."""
    running.clear_rules()
    running.thaw()
    running.only(None)
    running.weak = frozenset()
    running.store.clear()
    running.forget()
    return running


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Be a machine that was told nothing but credentials, which are not right anywhere."""
    for name in (
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_SESSION_TOKEN",
        "AWS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
    env = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def opened(server):
    """Return a function that opens a storage of the store, with little patience."""

    def open_storage(url=f"s3://{BUCKET}/run", **options):
        usual = {"endpoint_url": server.url, "timeout": 5.0, "retries": 2}
        return S3Storage(url, **{**usual, **options})

    return open_storage
