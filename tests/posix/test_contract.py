from __future__ import annotations

import pytest
from milepost.memory import MemoryStorage
from milepost.testing.commit import CommitContract
from milepost.testing.storage import StorageContract
from milepost_posix import PosixStorage, RenameCommit


class TestPosixStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path):
        return PosixStorage(f"file://{tmp_path}/root")

    @pytest.fixture
    def other(self, storage, tmp_path):
        (tmp_path / "link").symlink_to("root")
        return PosixStorage(f"file://{tmp_path}/link")


class TestPosixStorageWithoutRenameat2(TestPosixStorage):
    @pytest.fixture(autouse=True)
    def kernel(self, old_kernel):
        pass


class TestRenameCommit(CommitContract):
    @pytest.fixture
    def storage(self, tmp_path):
        return PosixStorage(f"file://{tmp_path}/root")

    @pytest.fixture
    def strategy(self):
        return RenameCommit()


class TestRenameCommitWithoutRenameat2(TestRenameCommit):
    @pytest.fixture(autouse=True)
    def kernel(self, old_kernel):
        pass


class TestRenameCommitInMemory(TestRenameCommit):
    @pytest.fixture
    def storage(self, tmp_path):
        return MemoryStorage(f"memory://{tmp_path}")
