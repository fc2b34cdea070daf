"""The same contracts on moto, which knows nothing of our server."""

from __future__ import annotations

import pytest
from milepost.commit import CreateCommit
from milepost.testing.commit import CommitContract
from milepost.testing.storage import StorageContract
from milepost_s3 import S3Storage
from testing.moto_server import serving


@pytest.fixture(scope="module")
def moto():
    with serving("bucket") as url:
        yield url


@pytest.fixture
def opened(moto):
    def open_storage(**options):
        return S3Storage("s3://bucket/run", endpoint_url=moto, timeout=30.0, **options)

    open_storage().delete("")
    return open_storage


class TestS3StorageOnMoto(StorageContract):
    @pytest.fixture
    def storage(self, opened):
        return opened(part_bytes=5 << 20)

    @pytest.fixture
    def other(self, opened):
        return opened()

    def test_of_many_replacers_of_one_version_exactly_one_wins(self, storage, other):
        pytest.skip("moto ignores If-Match at the end of an upload, which the same bytes once more are sent as")

    def test_an_upload_is_found_while_it_is_under_way_and_cannot_be_completed_once_it_is_given_up(self, storage, other):
        pytest.skip("moto says of every upload that it began in 2010")


class TestCreateCommitOnMoto(CommitContract):
    # What is left behind by whom is the strategy's doing, and the same on every store.
    test_the_power_may_be_cut_before_every_change = None

    @pytest.fixture
    def storage(self, opened):
        return opened()

    @pytest.fixture
    def strategy(self):
        return CreateCommit()

    @pytest.fixture
    def reaper(self):
        return CreateCommit(grace=0)
