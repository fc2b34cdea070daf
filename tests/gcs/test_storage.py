from __future__ import annotations

import concurrent.futures
import json
import os
import random
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from milepost.errors import (
    AlreadyExistsError,
    ConfigError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from milepost.plugins import installed
from milepost.protocols import CreatesOnly, ListsInOrder, NamesDriver, ReadsInto, ReplacesObjects, Storage, TellsTime
from milepost_gcs import GcsStorage, uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from milepost.testing.objects import ObjectServer

    Opened = Callable[..., GcsStorage]

BUCKET = "bucket"
PART = 256 << 10
ASKED_FOR_READING = {"get", "head", "list"}
ASKED_FOR_WRITING = {"put", "start_resumable", "resumable_part", "resumable_status", "abort_upload"}
ASKED_FOR_DELETING = {"delete", "delete_many"}


def kinds(server: ObjectServer) -> list[str]:
    return [request.kind for request in server.requests]


def data(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311 - the same bytes every time


def blocks(whole: bytes, size: int = 100_000) -> Iterator[memoryview]:
    """Yield pieces in one memory, which is written over for each."""
    memory = bytearray(size)
    for at in range(0, len(whole), size):
        piece = whole[at : at + size]
        memory[: len(piece)] = piece
        yield memoryview(memory)[: len(piece)]


# --- opening ---------------------------------------------------------------------------------------------------------


def test_the_scheme_is_found_and_opening_asks_nobody(server: ObjectServer) -> None:
    storage = installed().storage("gs")("gs://bucket/a/b/", endpoint_url=server.url)
    assert isinstance(storage, GcsStorage)
    for kind in (Storage, CreatesOnly, ReplacesObjects, ReadsInto, NamesDriver, ListsInOrder, TellsTime):
        assert isinstance(storage, kind)
    assert (storage.url, storage.commit) == ("gs://bucket/a/b", "create")
    assert server.requests == []


@pytest.mark.parametrize("url", ["gs://", "gs:///a", "s3://bucket", "bucket", "gs://bucket//a", "gs://bucket/../a"])
def test_what_is_no_url_of_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no URL of a bucket"):
        GcsStorage(url)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": "60"},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"retries": -1},
        {"retries": 1.5},
        {"concurrency": 0},
        {"concurrency": True},
        {"part_bytes": 1},
        {"part_bytes": (256 << 10) + 1},
    ],
)
def test_an_option_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"option {name} = "):
        GcsStorage("gs://bucket", **options)


@pytest.mark.parametrize(("word", "meant"), [("tokn", "token"), ("retrys", "retries"), ("endpoint", "endpoint_url")])
def test_an_unknown_option_is_refused_with_what_was_meant(word: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{word}'") as caught:
        GcsStorage("gs://bucket", **{word: "x"})
    assert [f"did you mean {meant!r}?"] == caught.value.__notes__


@pytest.mark.parametrize("word", ["loop", "asynchronous", "skip_instance_cache"])
def test_what_would_break_the_client_is_no_option(word: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{word}'"):
        GcsStorage("gs://bucket", **{word: True})


@pytest.mark.parametrize("options", [{"access": "none"}, {"session_kwargs": {"no": "such word"}}])
def test_what_gcsfs_refuses_is_told_when_it_is_opened(server: ObjectServer, options: dict[str, Any]) -> None:
    storage = GcsStorage("gs://bucket", endpoint_url=server.url, **options)
    with pytest.raises(StorageDeniedError, match="cannot open 'gs://bucket': gcsfs refuses") as caught:
        storage.read("key")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.__notes__[0]


def test_options_of_gcsfs_are_taken_unchanged(server: ObjectServer) -> None:
    words = {"token": "anon", "project": "mine", "requester_pays": "theirs", "session_kwargs": {"trust_env": False}}
    storage = GcsStorage("gs://bucket", endpoint_url=server.url, access="read_only", **words)
    storage.write("a", [b"1"])
    storage.write("b", [bytes(300)])
    storage.delete("")
    storage.write("key", [b"1"])
    storage.read("key")
    assert {"theirs"} == {request.query.get("userProject") for request in server.requests}
    assert server.store.keys(BUCKET) == ["key"]


_ALONE = """
import json, logging, os, sys
logging.getLogger("asyncio").setLevel("ERROR")  # that something took long is no complaint
asked = []
def hook(event, args):
    if event == "socket.getaddrinfo":
        asked.append(args[0])
    if event == "socket.connect" and not isinstance(args[1], (str, bytes)):
        asked.append(list(args[1][:2]))
sys.addaudithook(hook)
from milepost_gcs import GcsStorage
heavy = sorted({"gcsfs", "aiohttp", "fsspec", "numpy", "google.auth"} & set(sys.modules))
storage = GcsStorage("gs://bucket")
storage.write("by/parent", [b"1"])
child = os.fork()
storage.write("by/child" if child == 0 else "by/parent too", [b"2"])
if child:
    os.waitpid(child, 0)
    print(json.dumps([heavy, asked, sorted(storage.children("by/")), bytes(storage.read("by/child")).decode()]))
"""


def test_the_variable_of_emulators_is_enough_and_nobody_else_is_asked(server: ObjectServer) -> None:
    """A process that forks, too; and neither it nor its child has anything to complain of at its end."""
    host = server.url.removeprefix("http://")
    env = {**os.environ, "STORAGE_EMULATOR_HOST": host}
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", _ALONE]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("", 0)
    heavy, asked, names, text = json.loads(done.stdout)
    assert heavy == []
    where = ["127.0.0.1", int(host.rpartition(":")[2])]
    assert [where] == [each for number, each in enumerate(asked) if each not in asked[:number]]
    assert (names, text) == (["child", "parent", "parent too"], "2")


def test_an_emulator_is_not_asked_for_where_another_endpoint_is_given(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    GcsStorage("gs://bucket", endpoint_url=f"{server.url}/").write("key", [b"1"])
    assert server.store.keys(BUCKET) == ["key"]


def test_a_storage_that_is_gone_has_closed_its_connections(opened: Opened) -> None:
    storage = opened()
    storage.write("key", [b"1"])
    session = storage._opened()._session
    assert not session.closed
    del storage
    assert session.closed


# --- requests --------------------------------------------------------------------------------------------------------


def test_reading_needs_no_more_than_to_get_and_to_list(server: ObjectServer, storage: GcsStorage) -> None:
    server.store.put(BUCKET, "runs/a/key", b"0123456789")
    server.only(ASKED_FOR_READING)
    assert bytes(storage.read("a/key", 2, 5)) == b"234"
    memory = bytearray(4)
    assert storage.read_into("a/key", 6, memoryview(memory)) == 4
    assert bytes(memory) == b"6789"
    assert storage.size("a/key") == 10
    assert list(storage.children("")) == ["a/"]
    assert list(storage.keys_after("", "")) == ["a/key"]
    assert storage.version("a/key").isdecimal()
    assert abs(storage.time() - time.time()) < 60
    assert kinds(server) == ["get", "get", "head", "list", "list", "head", "list"]


def test_writing_needs_no_more_than_to_create_to_delete_and_to_list(server: ObjectServer, opened: Opened) -> None:
    storage = opened(part_bytes=PART)
    server.only({*ASKED_FOR_WRITING, *ASKED_FOR_DELETING, "list"})
    storage.write("a/small", [b"1"])
    storage.write("a/large", [bytes(PART + 1)])
    storage.create("a/new", [b"1"])
    storage.replace("a/new", [b"2"], str(server.store.find(BUCKET, "runs/a/new").generation))
    storage.delete("a/new")
    storage.delete("a/")
    writes = ["put", "start_resumable", "resumable_part", "resumable_part", "put", "put"]
    assert [*writes, "delete", "list", "delete_many"] == kinds(server)
    assert server.store.keys(BUCKET) == []


def test_a_small_request_is_one_request(server: ObjectServer, storage: GcsStorage) -> None:
    storage.write("key", [b"12", b"34"])
    storage.read("key")
    storage.read("key", 1, 3)
    storage.read("key", 3, 3)
    storage.read_into("key", 0, memoryview(bytearray(4)))
    storage.read_into("key", 0, memoryview(b""))
    storage.delete("key")
    assert kinds(server) == ["put", "get", "get", "get", "delete"]


def test_everything_below_is_deleted_by_a_request_for_a_hundred(server: ObjectServer, storage: GcsStorage) -> None:
    for number in range(250):
        server.store.put(BUCKET, f"runs/7/{number}", b"")
    server.store.put(BUCKET, "runs/70", b"")
    storage.delete("7/")
    assert {kind: kinds(server).count(kind) for kind in ("list", "delete_many")} == {"list": 1, "delete_many": 3}
    assert server.store.keys(BUCKET) == ["runs/70"]


def test_every_page_of_a_listing_is_read(server: ObjectServer, storage: GcsStorage) -> None:
    names = [f"{number:05d}" for number in range(2500)]
    for name in names:
        server.store.put(BUCKET, f"runs/p/{name}", b"")
    assert names == sorted(storage.children("p/"))
    assert kinds(server) == ["list"] * 3
    storage.delete("p/")
    assert server.store.keys(BUCKET) == []


def test_keys_come_in_order_from_any_point_on(server: ObjectServer, storage: GcsStorage) -> None:
    keys = sorted({f"{a}{b}{c}" for a in ("7", "70", "ä", "\U0001f682", "\uffff") for b in "/-0" for c in range(120)})
    for key in keys:
        server.store.put(BUCKET, f"runs/{key}", b"")
    server.store.put(BUCKET, "runs0", b"")
    server.store.put(BUCKET, "run", b"")
    server.forget()
    found: list[str] = []
    while len(found) <= len(keys) and (page := storage.keys_after("", found[-1] if found else "")):
        found += page
    assert sorted(keys, key=str.encode) == found
    assert len(keys) // 1000 + 2 == len(server.requests)
    assert [key for key in found if key.startswith("70/") and key > "70/5"] == storage.keys_after("70/", "70/5")
    assert found[:1] == storage.keys_after("", found[0][:-1])[:1]
    assert storage.keys_after("", "\U0010ffff") == []


def test_what_other_tools_make_for_folders_is_not_seen_and_is_deleted(
    server: ObjectServer, storage: GcsStorage
) -> None:
    for key in ("runs/", "runs/7/", "runs/7/a"):
        server.store.put(BUCKET, key, b"")
    assert list(storage.children("")) == ["7/"]
    assert list(storage.children("7/")) == ["a"]
    assert list(storage.keys_after("", "")) == ["7/a"]
    storage.delete("7/")
    assert server.store.keys(BUCKET) == ["runs/"]


def test_a_page_of_folders_is_not_the_end(server: ObjectServer, storage: GcsStorage) -> None:
    for number in range(1001):
        server.store.put(BUCKET, f"runs/{number:04d}/", b"")
    server.store.put(BUCKET, "runs/9/a", b"")
    assert list(storage.keys_after("", "")) == ["9/a"]


@pytest.mark.parametrize("key", ["", "a/", "a//b", "../a", "a/./b", "a\nb", "a\0b", "\udc80"])
def test_a_key_that_is_no_path_of_plain_names_is_refused(server: ObjectServer, storage: GcsStorage, key: str) -> None:
    acts = [lambda: storage.read(key), lambda: storage.size(key), lambda: storage.write(key, [b"1"])]
    for act in acts:
        with pytest.raises(StorageError, match="no relative path of plain names"):
            act()
    assert server.requests == []


def test_no_more_requests_are_made_at_once_than_is_said(server: ObjectServer, opened: Opened) -> None:
    storage = opened(concurrency=2)
    server.store.put(BUCKET, "runs/key", b"1")
    rule = server.rule("hold", kind="get", times=None)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(storage.read, "key") for _ in range(5)]
        other = opened()
        assert rule.reached.wait(10)
        deadline = time.monotonic() + 10
        while len(server.requests) < 2 and time.monotonic() < deadline:
            other.size("key")
        assert kinds(server).count("get") <= 2
        rule.release()
        assert {b"1"} == {bytes(reader.result(10)) for reader in readers}


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 7])
def test_bytes_come_back_whatever_their_number(server: ObjectServer, opened: Opened, size: int) -> None:
    storage, whole = opened(part_bytes=PART), data(size)
    storage.write("key", blocks(whole))
    assert whole == server.store.get(BUCKET, "runs/key")
    assert whole == bytes(storage.read("key"))
    assert whole[5:-5] == bytes(storage.read("key", 5, max(size - 5, 5)))
    parts = -(-size // PART)
    assert ["put"] if parts < 2 else ["start_resumable", *["resumable_part"] * parts] == kinds(server)[: parts + 1]
    assert server.store.uploads(BUCKET) == []


def test_a_part_is_sent_while_the_next_is_made(server: ObjectServer, opened: Opened) -> None:
    rule = server.rule("hold", kind="resumable_part")

    def making() -> Iterator[bytes]:
        yield bytes(PART)
        yield bytes(PART)
        assert rule.reached.wait(10)  # the first part is on its way, and not there yet
        rule.release()
        yield bytes(PART)

    opened(part_bytes=PART).write("key", making())
    assert bytes(3 * PART) == server.store.get(BUCKET, "runs/key")


def test_nothing_is_seen_before_the_last_part(server: ObjectServer, opened: Opened) -> None:
    storage = opened(part_bytes=PART)
    rule = server.rule("hold", kind="resumable_part", nth=3)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pool.submit(storage.write, "key", blocks(data(3 * PART)))
        assert rule.reached.wait(10)
        assert list(opened().children("")) == []
        rule.release()
        writer.result(10)
    assert list(opened().children("")) == ["key"]


def test_a_producer_that_fails_late_leaves_no_upload(server: ObjectServer, opened: Opened) -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(3 * PART)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        opened(part_bytes=PART).write("key", failing())
    assert server.store.keys(BUCKET) == []
    assert server.store.uploads(BUCKET) == []
    assert "abort_upload" in kinds(server)


FAULTS = [{"action": "drop_before"}, {"action": "drop_after"}, {"action": "status", "status": 503}, {"action": "cut"}]
FAULTY = [("put", 1), ("start_resumable", 1), ("resumable_part", 1), ("resumable_part", 2), ("resumable_part", 3)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["action"])
@pytest.mark.parametrize(("kind", "nth"), FAULTY)
@pytest.mark.parametrize("verb", ["write", "create", "replace"])
def test_a_request_that_fails_once_is_asked_again(
    server: ObjectServer, opened: Opened, verb: str, kind: str, nth: int, fault: dict[str, Any]
) -> None:
    """Also one that was carried out: its own success is not taken for that of another writer."""
    storage, whole = opened(part_bytes=PART), data(10 if kind == "put" else 3 * PART)
    version = ""
    if verb == "replace":
        server.store.put(BUCKET, "runs/key", b"old")
        version = storage.version("key")
    server.rule(kind=kind, nth=nth, **fault)
    if verb == "replace":
        storage.replace("key", blocks(whole), version)
    else:
        getattr(storage, verb)("key", blocks(whole))
    assert whole == server.store.get(BUCKET, "runs/key")
    assert ("resumable_status" in kinds(server)) == (kind == "resumable_part"), "how much is there is asked first"


@pytest.mark.parametrize("fault", FAULTS[:3], ids=lambda fault: fault["action"])
@pytest.mark.parametrize("size", [10, 3 * PART])
def test_a_lost_reply_does_not_hide_a_lost_race(
    server: ObjectServer, opened: Opened, size: int, fault: dict[str, Any]
) -> None:
    server.store.put(BUCKET, "runs/key", b"theirs")
    server.rule(kind="put" if size == 10 else "start_resumable", **fault)
    with pytest.raises(AlreadyExistsError):
        opened(part_bytes=PART).create("key", blocks(data(size)))
    assert server.store.get(BUCKET, "runs/key") == b"theirs"


def test_what_is_there_is_not_created_and_one_request_says_so(server: ObjectServer, storage: GcsStorage) -> None:
    server.store.put(BUCKET, "runs/key", b"theirs")
    with pytest.raises(AlreadyExistsError, match="cannot create 'gs://bucket/runs/key': another object is there"):
        storage.create("key", [b"ours"])
    assert kinds(server) == ["put"]


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_a_writer_that_comes_while_parts_are_sent_wins(server: ObjectServer, opened: Opened, verb: str) -> None:
    storage = opened(part_bytes=PART)
    words: tuple[str, ...] = ()
    if verb == "replace":
        server.store.put(BUCKET, "runs/key", b"old")
        words = (storage.version("key"),)

    def making() -> Iterator[bytes]:
        yield bytes(2 * PART)
        server.store.put(BUCKET, "runs/key", b"theirs")
        yield bytes(PART)

    with pytest.raises(AlreadyExistsError, match=f"cannot {verb} 'gs://bucket/runs/key': another object is there"):
        getattr(storage, verb)("key", making(), *words)
    assert server.store.get(BUCKET, "runs/key") == b"theirs"


@pytest.mark.parametrize("version", ["", "0", "00", "1", "-1", "abc", "٣", "99999999999999999999", '"etag"'])
def test_a_version_that_cannot_be_is_not_the_version(server: ObjectServer, storage: GcsStorage, version: str) -> None:
    for key in ("missing", "key"):
        with pytest.raises(AlreadyExistsError):
            storage.replace(key, [b"new"], version)
        server.store.put(BUCKET, "runs/key", b"old")
    assert server.store.get(BUCKET, "runs/key") == b"old"
    assert kinds(server) == ["put", "put"], "it is the service that says so"


def test_an_upload_that_the_service_forgot_is_told(server: ObjectServer, opened: Opened) -> None:
    def making() -> Iterator[bytes]:
        yield bytes(2 * PART)
        for upload in server.store.uploads(BUCKET):
            server.store.abort(upload)
        yield bytes(PART)

    with pytest.raises(StorageError, match="the service has forgotten the upload"):
        opened(part_bytes=PART).write("key", making())
    assert server.store.keys(BUCKET) == []


def test_bytes_that_changed_on_the_way_are_refused(
    server: ObjectServer, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = uploads.crc32c
    monkeypatch.setattr(uploads, "crc32c", lambda data, before=0: right(data, before) ^ 1)
    with pytest.raises(StorageError, match="400"):
        opened().write("small", [b"1"])
    with pytest.raises(StorageError):
        opened(part_bytes=PART).write("large", [bytes(2 * PART)])
    assert server.store.keys(BUCKET) == []


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_large_range_is_read_in_parts_of_one_generation(server: ObjectServer, opened: Opened) -> None:
    storage, whole = opened(part_bytes=PART), data(4 * PART + 5)
    server.store.put(BUCKET, "runs/key", whole)
    memory = bytearray(3 * PART + 1)
    assert len(memory) == storage.read_into("key", 7, memoryview(memory))
    assert whole[7 : 7 + len(memory)] == bytes(memory)
    first, *others = [request.query.get("generation") for request in server.requests]
    assert (None, {storage.version("key")}, 3) == (first, set(others), len(others))


def test_parts_are_read_at_once(server: ObjectServer, opened: Opened) -> None:
    server.store.put(BUCKET, "runs/key", data(4 * PART))
    held = [server.rule("hold", kind="get", nth=nth) for nth in (2, 2, 2)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reader = pool.submit(opened(part_bytes=PART).read, "key")
        assert all(rule.reached.wait(10) for rule in held)
        for rule in held:
            rule.release()
        assert data(4 * PART) == bytes(reader.result(10))


def test_a_read_never_mixes_two_writes(server: ObjectServer, opened: Opened) -> None:
    old, new = data(3 * PART), data(3 * PART, seed=1)
    server.store.put(BUCKET, "runs/key", old)
    rule = server.rule("hold", kind="get", nth=2)
    memory = bytearray(3 * PART)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reader = pool.submit(opened(part_bytes=PART).read_into, "key", 0, memoryview(memory))
        assert rule.reached.wait(10)
        server.store.put(BUCKET, "runs/key", new)
        rule.release()
        assert reader.result(10) == 3 * PART
    assert new == bytes(memory)


def test_a_read_of_what_is_deleted_meanwhile_finds_nothing(server: ObjectServer, opened: Opened) -> None:
    server.store.put(BUCKET, "runs/key", data(3 * PART))
    rule = server.rule("hold", kind="get", nth=2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reader = pool.submit(opened(part_bytes=PART).read, "key")
        assert rule.reached.wait(10)
        server.store.delete(BUCKET, "runs/key")
        rule.release()
        with pytest.raises(NotFoundError):
            reader.result(10)


@pytest.mark.parametrize("action", ["cut", "drop_before", "drop_after", "status"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_part_that_is_cut_is_read_again(server: ObjectServer, opened: Opened, action: str, nth: int) -> None:
    server.store.put(BUCKET, "runs/key", data(3 * PART))
    server.rule(action, kind="get", nth=nth)
    assert data(3 * PART) == bytes(opened(part_bytes=PART).read("key"))


def test_a_body_that_is_always_cut_is_an_error(server: ObjectServer, opened: Opened) -> None:
    server.store.put(BUCKET, "runs/key", data(1000))
    server.rule("cut", kind="get", times=None)
    with pytest.raises(StorageError, match=r"cannot read 'gs://bucket/runs/key': .*\(2 tries\)"):
        opened(retries=1).read("key")
    assert kinds(server) == ["get", "get"]


# --- deleting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "delete_many"])
@pytest.mark.parametrize("action", ["cut", "drop_before", "drop_after", "status"])
def test_a_deletion_that_fails_once_goes_on(server: ObjectServer, storage: GcsStorage, action: str, kind: str) -> None:
    for number in range(5):
        server.store.put(BUCKET, f"runs/7/{number}", b"")
    server.rule(action, kind=kind)
    storage.delete("7/")
    assert server.store.keys(BUCKET) == []


@pytest.mark.parametrize("status", [429, 503])
def test_what_failed_of_a_batch_is_asked_again_and_only_that(
    server: ObjectServer, storage: GcsStorage, status: int
) -> None:
    for number in range(5):
        server.store.put(BUCKET, f"runs/7/{number}", b"")
    server.rule("status", kind="delete_each", key="runs/7/[13]", status=status, times=2)
    storage.delete("7/")
    assert server.store.keys(BUCKET) == []
    assert kinds(server) == ["list", "delete_many", "delete_many"]


def test_what_is_denied_of_a_batch_is_an_error(server: ObjectServer, storage: GcsStorage) -> None:
    for number in range(5):
        server.store.put(BUCKET, f"runs/7/{number}", b"")
    server.rule("status", kind="delete_each", key="runs/7/3", status=403, times=None)
    with pytest.raises(StorageDeniedError, match="cannot delete 'gs://bucket/runs/7/'"):
        storage.delete("7/")
    assert server.store.keys(BUCKET) == ["runs/7/3"]


def test_without_batches_each_object_is_deleted_alone(server: ObjectServer, storage: GcsStorage) -> None:
    for number in range(5):
        server.store.put(BUCKET, f"runs/7/{number}", b"")
    server.rule("status", kind="delete_many", status=501, times=None)
    storage.delete("7/")
    assert server.store.keys(BUCKET) == []


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_server_that_never_answers_is_an_error_in_time(server: ObjectServer, opened: Opened) -> None:
    server.rule("stall", times=None)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer in time \(2 tries\)") as caught:
        opened(timeout=0.2, retries=1).read("key")
    assert time.monotonic() - began < 5
    assert caught.value.__notes__ == ["raise the option `timeout` if the line is slow"]


def test_an_upload_that_stalls_is_an_error_in_time(server: ObjectServer, opened: Opened) -> None:
    server.rule("stall", kind="resumable_part", nth=2, times=None)
    server.rule("stall", kind="abort_upload", times=None)
    began = time.monotonic()
    with pytest.raises(StorageError, match="no answer in time"):
        opened(timeout=0.2, retries=1, part_bytes=PART).write("key", [bytes(3 * PART)])
    assert time.monotonic() - began < 5
    assert server.store.keys(BUCKET) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_never_well_is_an_error(server: ObjectServer, opened: Opened, status: int) -> None:
    server.rule("status", status=status, times=None)
    with pytest.raises(StorageError, match=rf"the service answers {status} .*\(2 tries\)"):
        opened(retries=1).size("key")
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 409, 418, 501])
def test_what_will_not_pass_is_not_asked_again(server: ObjectServer, storage: GcsStorage, status: int) -> None:
    server.rule("status", status=status, times=None)
    with pytest.raises(StorageError, match=f"cannot write 'gs://bucket/runs/key': the service answers {status}"):
        storage.write("key", [b"1"])
    assert len(server.requests) == 1


def test_a_server_that_asks_for_time_gets_it(server: ObjectServer, storage: GcsStorage) -> None:
    server.store.put(BUCKET, "runs/key", b"1")
    server.rule("status", status=429, retry_after=1)
    began = time.monotonic()
    assert storage.size("key") == 1
    assert time.monotonic() - began >= 1


def test_a_full_storage_is_told(server: ObjectServer, storage: GcsStorage) -> None:
    server.rule("status", status=507, times=None)
    with pytest.raises(StorageFullError, match="cannot write 'gs://bucket/runs/key'"):
        storage.write("key", [b"1"])


@pytest.mark.parametrize("status", [401, 403])
def test_whoever_is_denied_learns_how_credentials_are_found(
    server: ObjectServer, storage: GcsStorage, status: int
) -> None:
    server.rule("status", status=status, times=None)
    with pytest.raises(StorageDeniedError, match=f"the service answers {status}") as caught:
        storage.read("key")
    assert "it was asked without credentials" in caught.value.__notes__[0]
    assert len(server.requests) == 1


def test_whoever_has_credentials_learns_which_permission_is_missing(server: ObjectServer, opened: Opened) -> None:
    from google.oauth2.credentials import Credentials

    server.rule("status", status=403, times=None)
    storage = opened(token=Credentials("not a secret"))
    for act, needs in (
        (lambda: storage.read("key"), "storage.objects.get"),
        (lambda: list(storage.children("")), "storage.objects.list"),
        (lambda: storage.write("key", [b"1"]), "storage.objects.create"),
        (lambda: storage.delete("key"), "storage.objects.delete"),
    ):
        with pytest.raises(StorageDeniedError) as caught:
            act()
        assert needs in caught.value.__notes__[0]


def test_credentials_that_cannot_be_had_are_told(opened: Opened) -> None:
    from google.oauth2.credentials import Credentials

    with pytest.raises(StorageDeniedError, match="no credentials: ") as caught:
        opened(token=Credentials(None)).read("key")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.__notes__[0]


@pytest.mark.parametrize("verb", ["read", "write", "list"])
def test_a_bucket_that_is_missing_is_told(server: ObjectServer, verb: str) -> None:
    storage = GcsStorage("gs://missing", endpoint_url=server.url)
    acts = {
        "read": lambda: storage.read("key"),
        "write": lambda: storage.write("key", [b"1"]),
        "list": lambda: list(storage.children("")),
    }
    with pytest.raises(NotFoundError, match=f"cannot {verb} 'gs://missing/.*': no such bucket"):
        acts[verb]()


def test_an_endpoint_where_nobody_is_is_told() -> None:
    storage = GcsStorage("gs://bucket", endpoint_url="http://127.0.0.1:9", retries=1)
    with pytest.raises(StorageError, match=r"cannot read 'gs://bucket/key': .*127.0.0.1.*\(2 tries\)"):
        storage.read("key")


def test_an_error_in_one_part_leaves_the_memory_alone_afterwards(server: ObjectServer, opened: Opened) -> None:
    server.store.put(BUCKET, "runs/key", data(3 * PART))
    held = server.rule("hold", kind="get", nth=2)
    server.rule("status", kind="get", nth=3, status=403, times=None)
    memory = bytearray(3 * PART)
    began = time.monotonic()
    with pytest.raises(StorageDeniedError):
        opened(part_bytes=PART).read_into("key", 0, memoryview(memory))
    assert time.monotonic() - began < 5, "the part that is held is not waited for"
    before = bytes(memory)
    held.release()
    opened().children("")  # whatever was on its way has come
    assert before == bytes(memory)


# --- native drivers --------------------------------------------------------------------------------------------------


def test_tensorstore_is_told_of_an_endpoint_that_it_would_use_itself(
    server: ObjectServer, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorstore as ts

    storage = opened(concurrency=3)
    assert storage.kvstore("7/") is None
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    assert storage.kvstore("7/") is None, "it would look for credentials"
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    spec = storage.kvstore("7/")
    assert spec is not None
    ts.KvStore.open(dict(spec)).result().write("key", b"1").result()
    assert bytes(storage.read("7/key")) == b"1"
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    assert storage.kvstore("7/") is None


def test_tensorstore_learns_who_pays(server: ObjectServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorstore as ts

    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    spec = opened(requester_pays="theirs").kvstore("7/")
    assert spec is not None
    ts.KvStore.open(dict(spec)).result().write("key", b"1").result()
    assert {"theirs"} == {request.query.get("userProject") for request in server.requests}


def test_tensorstore_is_not_told_of_a_place_that_it_would_enter_as_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from google.oauth2.credentials import Credentials

    for options in ({"token": Credentials("not a secret")}, {"token": "anon"}):
        assert GcsStorage("gs://bucket", **options).kvstore("7/") is None
    monkeypatch.setattr("gcsfs.credentials.GoogleCredentials.connect", _as_by_default)
    spec = GcsStorage("gs://bucket/runs").kvstore("7/")
    assert spec is not None
    assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "bucket", "runs/7/")


def _as_by_default(credentials: Any, method: object = None) -> None:
    assert method is None
    credentials.method, credentials.credentials = "google_default", object()


# --- threads ---------------------------------------------------------------------------------------------------------


def test_many_threads_open_one_client(server: ObjectServer, opened: Opened) -> None:
    storage, gate = opened(), threading.Barrier(8)

    def act(number: int) -> object:
        gate.wait(10)
        storage.write(f"{number}", [b"1"])
        return storage._opened()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(act, range(8)))) == 1
    assert len(server.store.keys(BUCKET)) == 8
