"""Finding checkpoints below a root of very many steps: right, and for a handful of requests."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import json
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost import v1
from milepost.checkpoint_manager import CheckpointManager
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.path import _finding
from milepost.path import step as steps
from milepost.path._listing import listed
from milepost.plugins import installed
from milepost.protocols import COMMIT_OBJECT, ListsInOrder
from milepost.testing.faults import WrappedStorage

STEPS = 10_000
ATTEMPT = "20010101T000000Z-0badcafe-1f-0123456789ab"
NAMES = st.text(st.sampled_from("07!-_a.~ä🚂"), min_size=1, max_size=3)
RESTS = st.sampled_from([COMMIT_OBJECT, COMMIT_OBJECT[:-1], f"{COMMIT_OBJECT}.", "a", f"d/{COMMIT_OBJECT}", "z/9", "~"])


# --- the choice of keys ----------------------------------------------------------------------------------------------


def paging(keys, page, pages):
    """Return what lists some keys as a store does, so many at once, and counts."""
    ordered = sorted(keys, key=lambda key: key.encode())

    def keys_after(last):
        pages.append(last)
        return [key for key in ordered if key.encode() > last.encode()][:page]

    return keys_after


@settings(max_examples=300, deadline=None)
@given(st.sets(st.tuples(NAMES, RESTS), max_size=30), st.sets(NAMES, max_size=10), st.integers(1, 5))
def test_a_listing_finds_what_looking_at_each_name_would_find(keys, others, page):
    keys = {f"{name}/{rest}" for name, rest in keys} | {f"{other}0" for other in others}
    wanted = {key.partition("/")[0] for key in keys} | others
    pages = []
    found, unknown = listed(paging(keys, page, pages), wanted)
    assert {name for name in wanted if f"{name}/{COMMIT_OBJECT}" in keys} == found
    assert unknown == []
    assert len(pages) <= len(wanted)
    assert pages == sorted(set(pages))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.tuples(NAMES, RESTS), max_size=30), st.integers(1, 5), st.integers(1, 5))
def test_a_listing_that_is_not_worth_it_says_what_it_does_not_know(keys, page, worth):
    there = {f"{name}/{rest}" for name, rest in keys}
    wanted = {name for name, _ in keys}
    found, unknown = listed(paging(there, page, []), wanted, worth=worth)
    assert {name for name in wanted - set(unknown) if f"{name}/{COMMIT_OBJECT}" in there} == found


def test_data_are_not_listed_for_their_own_sake():
    keys = [f"{name}/{rest}" for name in range(10) for rest in (*(f"a/{part}" for part in range(50)), COMMIT_OBJECT)]
    pages = []
    assert listed(paging(keys, 10, pages), map(str, range(10))) == (set(map(str, range(10))), [])
    assert len(pages) == 10


def test_a_listing_ends_soon_where_every_checkpoint_is_of_many_objects():
    keys = [f"{name:02}/{rest}" for name in range(99) for rest in (COMMIT_OBJECT, *(f"d/{part}" for part in range(50)))]
    pages = []
    found, unknown = listed(paging(keys, 10, pages), {f"{name:02}" for name in range(99)}, worth=8)
    assert len(pages) == 1
    assert found == {"00"}
    assert len(unknown) == 98


# --- managers --------------------------------------------------------------------------------------------------------


class Counted(WrappedStorage):
    """A storage that counts requests by kind."""

    def __init__(self, storage, counts):
        super().__init__(storage)
        self.counts = counts

    def children(self, prefix):
        found = list(self.wrapped.children(prefix))
        self.counts["children"] += len(found) // 1000 + 1
        return found

    def keys_after(self, prefix, key):
        self.counts["keys_after"] += 1
        return self.wrapped.keys_after(prefix, key)

    def ask(self, act):
        self.counts["look"] += 1
        return act()


class Sorted(MemoryStorage):
    """A storage whose keys do not change, and are sorted once."""

    def keys_after(self, prefix, key):
        if not hasattr(self, "ordered"):
            self.ordered = sorted(name.removeprefix(self._root) for name in self._below(""))
        assert not prefix
        start = bisect.bisect_right(self.ordered, key)
        return self.ordered[start : start + 1000]


class Unordered(WrappedStorage):
    """A storage that lists nothing in order, and counts looks."""

    def __new__(cls, storage):
        return object.__new__(cls)

    def __init__(self, storage):
        super().__init__(storage)
        self.looks = 0

    def size(self, key):
        self.looks += 1
        return self.wrapped.size(key)


@pytest.fixture(scope="module")
def many():
    url = f"memory://tests/listing/{uuid.uuid4().hex}"
    storage = MemoryStorage(url)
    for number in range(STEPS):
        for rest in (f"{ATTEMPT}/begun", f"{ATTEMPT}/arrays-0.safetensors", f"{ATTEMPT}.verdict"):
            storage.write(f"{number}/{rest}", [b""])
        if number % 1000 != 999:
            storage.write(f"{number}/{COMMIT_OBJECT}", [json.dumps({"attempt": ATTEMPT}).encode()])
    yield url
    storage.delete("")


@pytest.fixture
def counts():
    installed().load_all()
    manager, counts = installed()._manager, collections.Counter()

    class Counting:
        @hookimpl(wrapper=True)
        def open_storage(self):
            storage = yield
            return Counted(Sorted(storage.url), counts)

    plugin = Counting()
    manager.register(plugin)
    yield counts
    manager.unregister(plugin)


COMMITTED = [number for number in range(STEPS) if number % 1000 != 999]


def test_the_newest_of_ten_thousand_steps_costs_a_handful_of_requests(many, counts):
    with CheckpointManager(many) as manager:
        assert manager.latest_step() == 9998  # the newest was never committed
        assert counts.total() <= 15
    counts.clear()
    with v1.training.Checkpointer(many) as checkpointer:
        assert checkpointer.latest.step == 9998
        assert counts.total() <= 15
    counts.clear()
    assert steps.latest_step_metadata(many, steps.standard_name_format()).step == 9998
    assert counts.total() <= 15


def test_all_of_ten_thousand_steps_cost_one_request_for_a_thousand_keys(many, counts):
    most = 4 * STEPS // 1000 + 25
    with CheckpointManager(many) as manager:
        assert manager.all_steps() == COMMITTED
        assert counts["keys_after"] <= 41
        # Of those without a commit object it is looked whether others have laid them out.
        assert counts.total() <= most
        assert manager.should_save(STEPS)
        assert manager.latest_step() == 9998
        assert counts.total() <= most
    counts.clear()
    with v1.training.Checkpointer(many) as checkpointer:
        assert [found.step for found in checkpointer.checkpoints] == COMMITTED
        assert counts.total() <= most
    counts.clear()
    assert steps.checkpoint_steps(many) == COMMITTED
    assert counts.total() <= most + 63  # looks that go out before it is known that all are wanted


def test_where_keys_are_not_listed_in_order_each_name_is_looked_at(many):
    opened = _finding.open_root(many)
    storage = Unordered(opened.storage)
    assert not isinstance(storage, ListsInOrder)
    names = [str(number) for number in range(900, 1100)]
    found = dataclasses.replace(opened, storage=storage).checkpoints(names)
    assert [name for name in names if name != "999"] == list(found)
    assert storage.looks == len(names)
