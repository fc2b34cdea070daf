from __future__ import annotations

import pytest
from milepost.commit import CreateCommit
from milepost.fixed import FixedCommit
from milepost.testing.commit import CommitContract
from milepost.testing.storage import StorageContract


class TestGcsStorage(StorageContract):
    @pytest.fixture
    def storage(self, opened):
        return opened()

    @pytest.fixture
    def other(self, opened):
        return opened()


class TestCreateCommit(CommitContract):
    @pytest.fixture
    def storage(self, opened):
        return opened()

    @pytest.fixture
    def strategy(self):
        return CreateCommit()

    @pytest.fixture
    def reaper(self):
        return CreateCommit(grace=0)


class TestFixedCommit(CommitContract):
    overwrites = False
    shares = False

    @pytest.fixture
    def storage(self, opened):
        return opened()

    @pytest.fixture
    def strategy(self):
        return FixedCommit()

    @pytest.fixture
    def reaper(self):
        return FixedCommit(grace=0)
