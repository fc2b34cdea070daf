"""What a sweep finds beside the attempts of a strategy: uploads that were never finished."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid

import milepost
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost import attempts
from milepost.cli import app
from milepost.commit import CreateCommit
from milepost.engine import sweeping
from milepost.errors import StorageDeniedError
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.path.step import cleanup_tmp_directories
from milepost.plugins import installed
from milepost.protocols import FindsUploads, Upload
from milepost.testing.commit import dead_attempt
from milepost.testing.faults import WrappedStorage, keys
from typer.testing import CliRunner

HOUR = 3600.0
DEAD = "20010101T000000Z-0badcafe-1f-0123456789ab"


class Uploading(MemoryStorage):
    """A storage with unfinished uploads."""

    def __init__(self, url, unfinished):
        super().__init__(url)
        self.unfinished, self.denied = unfinished, False

    def uploads(self, prefix):
        if self.denied:
            raise StorageDeniedError(f"cannot list uploads of {self.url!r}: access denied")
        return [upload for upload in self.unfinished if upload.key.startswith(prefix)]

    def abort_upload(self, upload):
        self.unfinished.remove(upload)


@pytest.fixture
def storage():
    installed().load_all()
    manager = installed()._manager
    storage = Uploading(f"memory://tests/sweeping/{uuid.uuid4().hex}", [])
    assert isinstance(storage, FindsUploads)

    class Opening:
        @hookimpl(wrapper=True)
        def open_storage(self, url):
            opened = yield
            return storage if url == storage.url else opened

    plugin = Opening()
    manager.register(plugin)
    yield storage
    manager.unregister(plugin)
    storage.delete("")


def began(ago, *, place="0badcafe", pid=0x1F):
    """Return the id of an attempt of another machine that began so many seconds ago."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - ago))
    return f"{when}-{place}-{pid:x}-{uuid.uuid4().hex[:12]}"


def upload(storage, key, *, ago=48 * HOUR):
    storage.unfinished.append(Upload(key, uuid.uuid4().hex, time.time() - ago))
    return storage.unfinished[-1]


def test_an_upload_of_a_dead_attempt_is_listed_and_removed(storage):
    key = f"7/{dead_attempt()}/arrays-0.safetensors"
    gone = [upload(storage, key), upload(storage, key, ago=47 * HOUR)]
    (found,) = sweeping.leftovers(storage.url)
    assert (found.prefix, found.name, found.dead) == (key, "7", True)
    assert "upload" in found.reason
    assert storage.unfinished == gone
    assert sweeping.sweep(storage.url) == [found]
    assert storage.unfinished == []


def test_an_upload_of_a_writer_whose_process_is_gone_is_dead_at_any_age(storage):
    upload(storage, f"7/{began(60, place=attempts.place(), pid=0x3FFFFFF)}/a", ago=30)
    (found,) = sweeping.sweep(storage.url)
    assert found.dead
    assert storage.unfinished == []


@pytest.mark.parametrize(
    "attempt",
    [
        began(HOUR),
        began(HOUR, place=attempts.place(), pid=os.getpid()),
        # It began long ago, and yet somebody began the upload lately.
        began(48 * HOUR),
    ],
    ids=["young", "running", "old and at work"],
)
def test_an_upload_of_a_writer_that_may_live_is_kept(storage, attempt):
    kept = upload(storage, f"7/{attempt}/a", ago=60)
    (found,) = sweeping.leftovers(storage.url)
    assert not found.dead
    assert sweeping.sweep(storage.url) == []
    assert storage.unfinished == [kept]


def test_an_upload_of_one_object_is_kept_while_another_of_it_may_live(storage):
    key = f"7/{began(48 * HOUR)}/a"
    kept = [upload(storage, key), upload(storage, key, ago=60)]
    assert sweeping.sweep(storage.url) == []
    assert storage.unfinished == kept


@pytest.mark.parametrize("key", ["a", "7/a", "7/b/c", f"7/{DEAD}", f"data/x/{DEAD}/a"])
def test_an_upload_that_is_no_attempts_is_somebody_elses(storage, key):
    kept = upload(storage, key)
    assert sweeping.leftovers(storage.url) == []
    assert sweeping.sweep(storage.url) == []
    assert storage.unfinished == [kept]


def test_a_committed_checkpoint_loses_nothing_but_dead_uploads(storage):
    milepost.save(f"{storage.url}/7", {"a": 1})
    before = keys(storage)
    (attempt,) = [child for child in storage.children("7/") if child.endswith("/")]
    mine = upload(storage, f"7/{attempt}a", ago=60)
    upload(storage, f"7/{dead_attempt()}/a")
    sweeping.sweep(storage.url)
    assert storage.unfinished == [mine]
    assert keys(storage) == before


def test_a_sweep_without_permission_to_list_uploads_removes_the_rest(storage, caplog):
    storage.write(f"7/{dead_attempt()}/begun", [b""])
    upload(storage, f"7/{dead_attempt()}/a")
    storage.denied = True
    with caplog.at_level(logging.WARNING, "milepost"):
        (removed,) = sweeping.sweep(storage.url)
    assert removed.name == "7"
    assert "cannot be listed" in caplog.text
    assert len(storage.unfinished) == 1


def test_a_manager_that_cleans_up_removes_dead_uploads(storage):
    upload(storage, f"7/{dead_attempt()}/a")
    kept = upload(storage, f"7/{began(HOUR)}/a")
    cleanup_tmp_directories(storage.url)
    assert storage.unfinished == [kept]


def test_the_command_lists_uploads_and_removes_them_only_when_told(storage):
    key = f"7/{dead_attempt()}/arrays-0.safetensors"
    upload(storage, key)
    run = CliRunner().invoke
    shown = run(app(), ["sweep", storage.url])
    assert key in shown.stdout
    assert "never finished" in shown.stdout
    assert len(storage.unfinished) == 1
    shown = run(app(), ["sweep", storage.url, "--yes"])
    assert "removed 1 of 1" in shown.stdout
    assert storage.unfinished == []


# --- a root of many --------------------------------------------------------------------------------------------------


class Asked(WrappedStorage):
    """A storage that keeps what it was asked."""

    def __init__(self, storage):
        super().__init__(storage)
        self.asked = []

    def ask(self, act):
        self.asked.append(act)
        return act()


class Unordered(Asked):
    """A storage that lists nothing in order."""

    def __new__(cls, storage):
        return object.__new__(cls)


NAMES = st.sampled_from(["7", "70", "7!", "a", "ä"])
OTHER = "20020202T000000Z-0badcafe-2f-0123456789ab"
CHILDREN = st.sampled_from(
    [f"{DEAD}/a", f"{DEAD}/begun", f"{DEAD}.verdict", f"{OTHER}/x/y", f"{OTHER}.verdict", "b/c", "z", f"z/{DEAD}/a"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.tuples(NAMES, CHILDREN), max_size=20),
    st.dictionaries(NAMES, st.sampled_from([DEAD, OTHER, ""])),
    st.sets(st.sampled_from(["!", "0", "6", "7", "7!!", "700", "b", "~"])),
    st.integers(1, 4),
)
def test_what_is_left_is_found_the_same_in_a_listing_in_order_and_name_by_name(keys, committed, plain, page):
    class Paged(MemoryStorage):
        def keys_after(self, prefix, key):
            return super().keys_after(prefix, key)[:page]

    storage = Paged(f"memory://tests/sweeping/{uuid.uuid4().hex}")
    for name in plain:
        storage.write(name, [b""])
    for name, rest in keys:
        storage.write(f"{name}/{rest}", [b"retired" if rest.endswith(".verdict") else b"1"])
    for name, attempt in committed.items():
        storage.write(f"{name}/commit_success.txt", [json.dumps({"attempt": attempt}).encode()])
    strategy = CreateCommit()
    found = list(strategy.leftovers(Unordered(storage), older_than=attempts.DAY))
    assert sorted(strategy.leftovers(Asked(storage), older_than=attempts.DAY), key=str) == sorted(found, key=str)
    expected = {
        (name, attempt)
        for name in {name for name, _ in keys}
        for attempt in (DEAD, OTHER)
        if any(one == name and rest.startswith((f"{attempt}/", f"{attempt}.")) for one, rest in keys)
        and committed.get(name) != attempt
    }
    alone = {
        (name, attempt)
        for name, attempt in expected
        if name in committed and not any((name, other) in expected for other in (DEAD, OTHER) if other != attempt)
    }
    assert {(one.name, one.attempt) for one in found} | alone == expected
    storage.delete("")


def test_sweeping_a_root_of_many_checkpoints_costs_one_request_for_a_thousand_keys(storage):
    for number in range(2000):
        for rest in (f"{DEAD}/begun", f"{DEAD}/arrays-0", f"{DEAD}.verdict", "commit_success.txt"):
            storage.write(f"{number}/{rest}", [b""])
    storage.write(f"77777/{DEAD}/begun", [b""])
    asked = Asked(storage)
    (found,) = CreateCommit().leftovers(asked, older_than=attempts.DAY)
    assert (found.name, found.dead) == ("77777", True)
    assert len(asked.asked) <= 15


def test_what_is_deep_below_a_name_is_not_listed_for_its_own_sake(storage):
    for folder in range(10):
        for part in range(3000):
            storage.write(f"data/{folder}/{part}", [b""])
    storage.write(f"e/{DEAD}/begun", [b""])
    asked = Asked(storage)
    (found,) = CreateCommit().leftovers(asked, older_than=attempts.DAY)
    assert found.name == "e"
    assert len(asked.asked) <= 7
