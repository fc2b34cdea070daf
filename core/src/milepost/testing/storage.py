"""What every storage has to prove: `StorageContract`.

The rule: a capability is tested if the storage has the extension protocol, and each docstring says what to check if the
test fails. The oracle is the second client `other`: give it a connection of its own, or better another way to the same
bytes.
"""

# ruff: noqa: S101, PLR2004 - assertions and small numbers are what a contract is made of

from __future__ import annotations

import concurrent.futures
import functools
import threading
import time
from typing import TYPE_CHECKING, TypeVar

import pytest

from milepost.errors import AlreadyExistsError, MilepostError, NotFoundError
from milepost.protocols import (
    CreatesOnly,
    ExchangesPrefixes,
    FindsUploads,
    ListsInOrder,
    MapsFiles,
    ReadsInto,
    RenamesPrefixes,
    ReplacesObjects,
    Storage,
    SyncsPrefixes,
    TellsTime,
)
from milepost.testing.faults import keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from milepost.protocols import Buffer, Upload

__all__ = ["ODD_NAMES", "StorageContract"]

T = TypeVar("T")

ODD_NAMES = (
    "a b",
    "a+b",
    "100%",
    "a%20b",
    "a#b",
    "a?b",
    "a&b=c",
    "[a]*",
    "ä-é-日本-🚂",
    ".hidden",
    "a.b.",
    "a:b",
    "a'b\"c",
    "~",
    "(1, 'x')",
)
"""Names that have a meaning in URLs, patterns or shells, and none in a key."""


def _together(acts: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Let all act at the same moment, a thread for each; return what each returned or raised."""
    gate = threading.Barrier(len(acts))

    def run(act: Callable[[], T]) -> T | Exception:
        gate.wait(60)
        try:
            return act()
        except MilepostError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


def _winner(results: Sequence[object]) -> int:
    """Return which one of the racers won, after making sure that the others were told that they lost."""
    (winner,) = (who for who, result in enumerate(results) if result is None)
    assert [result for result in results if result is not None and not isinstance(result, AlreadyExistsError)] == []
    return winner


class StorageContract:
    """The tests that every storage passes."""

    big = 20 << 20
    """The size in bytes of the big object: more than the storage sends or buffers at once."""

    @pytest.fixture
    def storage(self) -> Storage:
        """Return an empty storage."""
        raise NotImplementedError("a subclass of StorageContract has a fixture `storage`")

    @pytest.fixture
    def other(self, storage: Storage) -> Storage:
        """Return a second, independent client of the same root."""
        return storage

    # --- what the commit protocol stands on ---

    def test_a_condition_that_must_fail_fails(self, storage: Storage) -> None:
        """If this fails, the service ignores the condition (many emulators do): nothing else here can be trusted."""
        storage.write("key", [b"old"])
        if isinstance(storage, CreatesOnly):
            with pytest.raises(AlreadyExistsError):
                storage.create("key", [b"new"])
        if isinstance(storage, ReplacesObjects):
            version = storage.version("key")
            storage.write("key", [b"old"])
            assert storage.version("key") != version, "the same bytes, written again, are another version"
            with pytest.raises(AlreadyExistsError):
                storage.replace("key", [b"new"], version)
        if isinstance(storage, RenamesPrefixes):
            storage.write("one/key", [b"1"])
            storage.write("two/key", [b"2"])
            with pytest.raises(AlreadyExistsError):
                storage.rename("one/", "two/")
            assert bytes(storage.read("two/key")) == b"2"
        assert bytes(storage.read("key")) == b"old"

    def test_the_shape_is_that_of_the_protocol(self, storage: Storage) -> None:
        """If this fails, a method is missing, or the root has a slash at its end."""
        assert isinstance(storage, Storage)
        assert "://" in storage.url
        assert not storage.url.endswith("/")
        assert storage.commit

    def test_opening_and_listing_an_empty_root_is_no_error(self, storage: Storage, other: Storage) -> None:
        """If this fails, the root is expected to exist before the first write."""
        assert list(storage.children("")) == []
        assert list(other.children("no/such/")) == []

    # --- objects ---

    def test_buffers_are_stored_one_after_the_other(self, storage: Storage, other: Storage) -> None:
        """If this fails, check which kinds of buffers are accepted, and empty ones among them."""
        buffers: list[Buffer] = [b"12", bytearray(b"34"), b"", memoryview(b"x56x")[1:3]]
        storage.write("a/key", iter(buffers))
        assert bytes(other.read("a/key")) == b"123456"
        assert other.size("a/key") == 6

    @pytest.mark.parametrize("buffers", [[], [b""]])
    def test_an_empty_object_is_an_object(self, storage: Storage, other: Storage, buffers: list[bytes]) -> None:
        """If this fails, writing nothing is taken for nothing to do."""
        storage.write("empty", buffers)
        assert other.size("empty") == 0
        assert bytes(other.read("empty")) == b""
        assert bytes(other.read("empty", 0, 10)) == b""
        assert list(other.children("")) == ["empty"]

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, None), (0, 0), (0, 3), (2, 5), (9, 10), (4, None), (7, 99), (10, None), (10, 12), (12, 15)],
    )
    def test_a_range_ends_where_the_object_ends(self, storage: Storage, start: int, stop: int | None) -> None:
        """If this fails, look for ends that count inclusively, and for ranges refused because they begin at the end."""
        storage.write("key", [b"0123456789"])
        assert bytes(storage.read("key", start, stop)) == b"0123456789"[start:stop]

    def test_what_is_not_there_is_not_found(self, storage: Storage) -> None:
        """If this fails, translate the client's own error."""
        storage.write("there/key", [b"1"])
        for key in ("missing", "there/missing", "there"):
            with pytest.raises(NotFoundError):
                storage.read(key)
            with pytest.raises(NotFoundError):
                storage.read(key, 2, 5)
            with pytest.raises(NotFoundError):
                storage.size(key)

    def test_a_big_object_comes_back(self, storage: Storage, other: Storage) -> None:
        """If this fails, check parts and their order, and buffers larger than a part."""
        block = bytes(range(256)) * 4096
        count = self.big // len(block)
        storage.write("big", (bytes([index]) + block[1:] for index in range(count)))
        assert other.size("big") == count * len(block)
        for index in range(count):
            found = bytes(other.read("big", index * len(block), index * len(block) + 300))
            assert found == bytes([index]) + block[1:300]
        assert bytes(other.read("big", len(block) - 2, len(block) + 1)) == b"\xfe\xff\x01"

    def test_buffers_are_taken_one_at_a_time(self, storage: Storage, other: Storage) -> None:
        """If this fails, the buffers are collected before they are used: join copies, or write each at once."""

        def reused() -> Iterator[memoryview]:
            memory = bytearray(4)
            for index in range(100):
                memory[:] = b"%04d" % index
                yield memoryview(memory)

        storage.write("key", reused())
        assert bytes(other.read("key")) == b"".join(b"%04d" % index for index in range(100))

    @pytest.mark.parametrize("before", [None, b"old"])
    @pytest.mark.parametrize("size", [10, 3 << 20])
    def test_a_producer_that_fails_stores_nothing(
        self, storage: Storage, other: Storage, before: bytes | None, size: int
    ) -> None:
        """If this fails, closing the upload after an error made an object of the first half."""

        def failing() -> Iterator[bytes]:
            yield bytes(size)
            yield bytes(size)
            raise RuntimeError("the device is gone")

        if before is not None:
            storage.write("a/key", [before])
        with pytest.raises(RuntimeError, match="the device is gone"):
            storage.write("a/key", failing())
        assert keys(other) == ([] if before is None else ["a/key"])
        if before is not None:
            assert bytes(other.read("a/key")) == before

    def test_an_object_is_replaced_at_one_instant(self, storage: Storage, other: Storage) -> None:
        """If this fails, the object is written in place: write beside it, then rename."""
        size = 200_000
        whole = {bytes([letter]) * size for letter in b"abcd"}
        storage.write("key", [b"a" * size])
        done = threading.Event()

        def reading() -> set[bytes]:
            seen = set()
            while not done.is_set():
                seen.add(bytes(other.read("key")))
            return seen

        def writing() -> set[bytes]:
            try:
                for letter in b"abcd" * 10:
                    storage.write("key", [bytes([letter]) * (size // 2)] * 2)
            finally:
                done.set()
            return set()

        for seen in _together([writing, reading, reading]):
            assert isinstance(seen, set), seen
            assert seen <= whole

    # --- prefixes ---

    def test_children_are_the_names_directly_below(self, storage: Storage, other: Storage) -> None:
        """If this fails, check the delimiter, the slash at the end of prefixes, and names that begin alike."""
        for key in ("7/a", "7/b/c", "7/b/d/e", "70/x", "8"):
            storage.write(key, [b"1"])
        assert sorted(other.children("")) == ["7/", "70/", "8"]
        assert sorted(other.children("7/")) == ["a", "b/"]
        assert sorted(other.children("7/b/")) == ["c", "d/"]
        assert sorted(other.children("7/a/")) == []

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_a_name_means_nothing_but_itself(self, storage: Storage, other: Storage, name: str) -> None:
        """If this fails, a name is quoted twice, or not at all, or taken for a pattern."""
        storage.write(f"{name}/{name}", [b"1"])
        storage.write("a/b", [b"2"])
        assert sorted(other.children("")) == sorted([f"{name}/", "a/"])
        assert list(other.children(f"{name}/")) == [name]
        assert bytes(other.read(f"{name}/{name}")) == b"1"
        assert other.size(f"{name}/{name}") == 1
        storage.delete(f"{name}/")
        assert keys(other) == ["a/b"]

    def test_a_long_listing_is_complete(self, storage: Storage, other: Storage) -> None:
        """If this fails, only the first page of a listing is read; set the page size of the test server low."""
        names = [f"{index:04d}" for index in range(60)]
        for name in names:
            storage.write(f"p/{name}", [b""])
        assert sorted(other.children("p/")) == names

    def test_deleting_takes_one_object_or_everything_below(self, storage: Storage, other: Storage) -> None:
        """If this fails, check names that begin alike, and what is gone already."""
        for key in ("7/a", "7/b/c", "70/x", "8"):
            storage.write(key, [b"1"])
        storage.delete("7/a")
        assert keys(other) == ["7/b/c", "70/x", "8"]
        storage.delete("7/")
        assert sorted(other.children("")) == ["70/", "8"]
        for gone in ("7/a", "7/", "7", "no/such/prefix/"):
            storage.delete(gone)
        assert keys(other) == ["70/x", "8"]
        storage.delete("")
        assert keys(other) == []

    # --- many at once ---

    def test_many_threads_share_a_storage(self, storage: Storage, other: Storage) -> None:
        """If this fails, the client, or a file position in it, is shared without a lock."""

        def act(who: int) -> list[bytes]:
            for turn in range(10):
                storage.write(f"{who}/{turn}", [b"%d-%d" % (who, turn)] * 100)
            return [bytes(other.read(f"{who}/{turn}")) for turn in range(10)]

        for who, found in enumerate(_together([functools.partial(act, who) for who in range(8)])):
            assert found == [b"%d-%d" % (who, turn) * 100 for turn in range(10)]
        ranges = _together([functools.partial(storage.read, "3/3", who * 3, who * 3 + 3) for who in range(8)])
        assert [bytes(found) for found in ranges if not isinstance(found, Exception)] == [b"3-3"] * 8

    def test_a_second_client_sees_every_change_at_once(self, storage: Storage, other: Storage) -> None:
        """If this fails, a listing or an object is cached somewhere; a deleted one counts, too."""
        for text in (b"1", b"22"):
            assert ("7/" in set(other.children(""))) == (text == b"22")
            storage.write("7/a", [text])
            assert bytes(other.read("7/a")) == text
            assert other.size("7/a") == len(text)
            assert list(other.children("7/")) == ["a"]
        storage.delete("7/a")
        assert list(other.children("7/")) == []
        with pytest.raises(NotFoundError):
            other.read("7/a")

    # --- extensions ---

    def test_of_many_creators_exactly_one_wins(self, storage: Storage, other: Storage) -> None:
        """If this fails, the create is a look followed by a write."""
        if not isinstance(storage, CreatesOnly):
            assert not hasattr(storage, "create")
            return
        clients = [each for each in (storage, other) if isinstance(each, CreatesOnly)]
        for turn in range(40):
            racers = [
                functools.partial(clients[who % len(clients)].create, f"{turn}/k", [b"%d" % who] * 50)
                for who in range(4)
            ]
            winner = _winner(_together(racers))
            assert bytes(other.read(f"{turn}/k")) == b"%d" % winner * 50

    def test_of_many_replacers_of_one_version_exactly_one_wins(self, storage: Storage, other: Storage) -> None:
        """If this fails, the compare is not part of the swap."""
        if not isinstance(storage, ReplacesObjects):
            assert not hasattr(storage, "replace")
            return
        storage.write("key", [b"before"])
        for _ in range(40):
            version = storage.version("key")
            racers = [functools.partial(storage.replace, "key", [b"%d" % who], version) for who in range(4)]
            winner = _winner(_together(racers))
            assert bytes(other.read("key")) == b"%d" % winner
        version = storage.version("key")
        storage.delete("key")
        with pytest.raises(NotFoundError):
            storage.version("key")
        with pytest.raises((NotFoundError, AlreadyExistsError)):
            storage.replace("key", [b"new"], version)
        assert keys(other) == []

    def test_a_rename_moves_everything_or_nothing(self, storage: Storage, other: Storage) -> None:
        """If this fails, check empty directories at the target, and a target that begins like the source."""
        if not isinstance(storage, RenamesPrefixes):
            assert not hasattr(storage, "rename")
            return
        for key in ("7.tmp/a", "7.tmp/b/c", "70/x"):
            storage.write(key, [key.encode()])
        storage.rename("7.tmp/", "7/")
        assert keys(other) == ["7/a", "7/b/c", "70/x"]
        assert bytes(other.read("7/b/c")) == b"7.tmp/b/c"
        with pytest.raises(NotFoundError):
            storage.rename("7.tmp/", "8/")
        with pytest.raises(AlreadyExistsError):
            storage.rename("7/", "70/")
        assert keys(other) == ["7/a", "7/b/c", "70/x"]

    def test_of_many_renames_to_one_name_exactly_one_wins(self, storage: Storage, other: Storage) -> None:
        """If this fails, the rename replaces an existing target, perhaps only an empty one."""
        if not isinstance(storage, RenamesPrefixes):
            assert not hasattr(storage, "rename")
            return
        for turn in range(10):
            for who in range(4):
                storage.write(f"{turn}.{who}/k", [b"%d" % who])
            racers = [functools.partial(storage.rename, f"{turn}.{who}/", f"{turn}/") for who in range(4)]
            winner = _winner(_together(racers))
            assert bytes(other.read(f"{turn}/k")) == b"%d" % winner

    def test_an_exchange_swaps_two_prefixes_or_changes_nothing(self, storage: Storage, other: Storage) -> None:
        """If this fails, False is returned after something was moved."""
        if not isinstance(storage, ExchangesPrefixes):
            assert not hasattr(storage, "exchange")
            return
        storage.write("one/a", [b"1"])
        storage.write("two/b/c", [b"2"])
        swapped = storage.exchange("one/", "two/")
        assert keys(other) == (["one/b/c", "two/a"] if swapped else ["one/a", "two/b/c"])
        with pytest.raises(NotFoundError):
            storage.exchange("one/", "three/")
        assert len(keys(other)) == 2

    def test_reading_into_memory_fills_what_there_is(self, storage: Storage) -> None:
        """If this fails, check short reads, and bytes of the buffer behind the end of the object."""
        if not isinstance(storage, ReadsInto):
            assert not hasattr(storage, "read_into")
            return
        storage.write("key", [b"0123456789"])
        for start, expected in ((0, b"0123"), (3, b"3456"), (8, b"89--"), (10, b"----"), (20, b"----")):
            memory = bytearray(b"----")
            count = storage.read_into("key", start, memoryview(memory))
            assert bytes(memory) == expected
            assert count == len(expected.rstrip(b"-"))
        with pytest.raises(NotFoundError):
            storage.read_into("missing", 0, memoryview(bytearray(4)))

    def test_a_mapping_is_private(self, storage: Storage, other: Storage) -> None:
        """If this fails, the mapping is shared with the file, or read-only."""
        if not isinstance(storage, MapsFiles):
            assert not hasattr(storage, "map")
            return
        storage.write("key", [b"0123456789"])
        mapped = storage.map("key")
        assert bytes(mapped) == b"0123456789"
        mapped[0:1] = b"x"
        assert bytes(other.read("key")) == b"0123456789"
        assert bytes(storage.map("key")) == b"0123456789"
        with pytest.raises(NotFoundError):
            storage.map("missing")

    def test_syncing_changes_nothing_that_can_be_seen(self, storage: Storage, other: Storage) -> None:
        """If this fails, check that `sync` walks into nested prefixes, and takes an empty root."""
        if not isinstance(storage, SyncsPrefixes):
            assert not hasattr(storage, "sync")
            return
        storage.write("7/a/b", [b"1"])
        storage.sync("7/")
        assert keys(other) == ["7/a/b"]

    def test_keys_are_listed_in_the_order_of_their_bytes_from_any_point_on(
        self, storage: Storage, other: Storage
    ) -> None:
        """If this fails, check that the point itself is left out, at all depths, and characters beyond U+FFFF."""
        if not isinstance(other, ListsInOrder):
            assert not hasattr(other, "keys_after")
            return
        names = ["7!/a", "7-/a", "7/a/b", "7/a/c", "7/b", "70/a", "8", "Z", "_", "a", "ä", "\uff5e", "\U0001f682"]
        for key in (*reversed(names), *(f"~/{name}" for name in names)):
            storage.write(key, [b""])
        for prefix in ("", "~/", "7/", "no/such/"):
            expected = [key for key in sorted([*names, *(f"~/{each}" for each in names)]) if key.startswith(prefix)]
            for start in ("", *expected, f"{prefix}7/a0", f"{prefix}70"):
                rest = [key for key in expected if key > start]
                found = list(other.keys_after(prefix, start))
                assert found == rest[: len(found)]
                assert bool(found) == bool(rest)

    def test_a_listing_in_order_goes_on_where_a_page_ended(self, storage: Storage, other: Storage) -> None:
        """If this fails, compare the last key of a page with the first of the next."""
        if not isinstance(other, ListsInOrder):
            return
        names = [f"p/{index:03d}/{part}" for index in range(30) for part in "ab"]
        for name in names:
            storage.write(name, [b""])
        found, last = list[str](), ""
        while page := other.keys_after("p/", last):
            found += page
            last = page[-1]
        assert found == names

    def test_an_upload_is_found_while_it_is_under_way_and_cannot_be_completed_once_it_is_given_up(
        self, storage: Storage, other: Storage
    ) -> None:
        """If this fails, check that `big` is above a part's size, and that a failure to complete is no success."""
        if not isinstance(other, FindsUploads):
            assert not hasattr(other, "uploads")
            return
        block, count = bytes(1 << 20), self.big >> 20
        seen: list[Upload] = []

        def watched(*, abort: bool) -> Iterator[bytes]:
            for index in range(count):
                if index == count - 1:
                    seen.extend(other.uploads("7/"))
                    assert list(other.uploads("8/")) == []
                    for upload in seen if abort else ():
                        other.abort_upload(upload)
                yield block

        storage.write("7/a", watched(abort=False))
        assert [upload.key for upload in seen] == ["7/a"]
        assert abs(seen[0].started - time.time()) < 600
        other.abort_upload(seen.pop())
        assert other.size("7/a") == count << 20
        with pytest.raises(MilepostError):
            storage.write("7/b", watched(abort=True))
        assert keys(other) == ["7/a"]
        assert list(other.uploads("")) == []

    def test_a_write_that_fails_leaves_no_upload(self, storage: Storage, other: Storage) -> None:
        """If this fails, the upload is not aborted after an error."""
        if not isinstance(other, FindsUploads):
            return

        def failing() -> Iterator[bytes]:
            for _ in range(self.big >> 20):
                yield bytes(1 << 20)
            raise RuntimeError("the device is gone")

        with pytest.raises(RuntimeError, match="the device is gone"):
            storage.write("7/a", failing())
        assert list(other.uploads("")) == []

    def test_the_storage_has_a_clock_if_it_says_so(self, storage: Storage) -> None:
        """If this fails, check the time zone, and seconds against milliseconds."""
        if not isinstance(storage, TellsTime):
            return
        assert abs(storage.time() - time.time()) < 600
