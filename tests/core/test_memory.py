from __future__ import annotations

import concurrent.futures

import pytest
from milepost import memory
from milepost.memory import MemoryStorage
from milepost.testing.faults import emptied, keys
from milepost.testing.storage import StorageContract


@pytest.fixture
def root(request):
    url = f"memory://tests/memory/{request.node.name}"
    yield url
    emptied(MemoryStorage(url))


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self, root):
        return MemoryStorage(root)

    @pytest.fixture
    def other(self, root):
        return MemoryStorage(f"{root}/")


def test_the_storage_registers_for_its_scheme():
    offered = {}
    memory.register_storage(offered.__setitem__)
    assert offered == {"memory": MemoryStorage}


def test_nested_urls_share_one_namespace(root):
    MemoryStorage(f"{root}/a/b").write("7/k", [b"1"])
    assert keys(MemoryStorage(f"{root}/a")) == ["b/7/k"]
    assert keys(MemoryStorage(root)) == ["a/b/7/k"]
    MemoryStorage(f"{root}/a").delete("b/")
    assert keys(MemoryStorage(f"{root}/a/b")) == []


def test_names_that_begin_alike_share_nothing(root):
    MemoryStorage(f"{root}/ab").write("k", [b"1"])
    assert keys(MemoryStorage(f"{root}/a")) == []
    assert MemoryStorage("memory://").size(f"{root.removeprefix('memory://')}/ab/k") == 1


def test_two_renames_of_one_source_have_one_winner(root):
    storage = MemoryStorage(root)
    storage.write("one/k", [b"1"])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        errors = [pool.submit(storage.rename, "one/", f"{who}/") for who in "ab"]
    assert sum(error.exception() is None for error in errors) == 1
    assert len(keys(storage)) == 1
