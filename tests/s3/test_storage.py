from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import subprocess
import sys
import threading
import time

import pytest
from milepost.errors import (
    AlreadyExistsError,
    ConfigError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from milepost_s3 import S3Storage
from milepost_s3._client import AgainError, Body
from milepost_s3._sending import portions

MIB = 1 << 20
PART = 5 * MIB

LARGE = bytes(range(256)) * (12 * MIB // 256)
"""Three parts."""


def kinds(server):
    return [request.kind for request in server.requests]


def notes(error):
    return "\n".join(error.value.__notes__)


# --- options ---------------------------------------------------------------------------------------------------------


def test_opening_asks_nothing_of_anybody(opened, server):
    storage = opened()
    assert storage.url == "s3://bucket/run"
    assert opened("s3://bucket/").url == "s3://bucket"
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "meant"), [("regoin", "region"), ("endpoint_ulr", "endpoint_url"), ("part_byte", "part_bytes")]
)
def test_an_unknown_option_is_refused_with_what_was_meant(name, meant):
    with pytest.raises(ConfigError, match=name) as error:
        S3Storage("s3://bucket", **{name: "x"})
    assert notes(error) == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("timeout", "soon"),
        ("retries", -1),
        ("retries", 1.5),
        ("retries", True),
        ("concurrency", 0),
        ("part_bytes", PART - 1),
        ("part_bytes", 6 << 30),
        ("region", ""),
        ("region", 7),
    ],
)
def test_nonsense_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"'{name}' is"):
        S3Storage("s3://bucket", **{name: value})


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "bucket/key", "s3://bucket//key", "s3://bucket/../other"])
def test_what_names_no_place_is_refused(url):
    with pytest.raises(ConfigError, match="cannot open"):
        S3Storage(url)


@pytest.mark.parametrize("key", ["", "a//b", "/a", "../a", "a/./b", "a\0b", "\udc80"])
def test_a_key_that_is_no_plain_path_is_refused(opened, server, key):
    storage = opened()
    with pytest.raises(StorageError, match="no relative path"):
        storage.write(key, [b"1"])
    with pytest.raises(StorageError, match="no relative path"):
        storage.read(key)
    assert server.requests == []


def test_options_of_s3fs_that_make_no_sense_say_so_when_they_are_used(opened):
    for options in ({"config_kwargs": {"no_such": 1}}, {"endpoint_url": "nowhere"}, {"profile": "nobody"}):
        with pytest.raises(ConfigError, match="cannot open 's3://bucket/run'"):
            opened(**options).size("key")


# --- whom it asks, and as whom ---------------------------------------------------------------------------------------


def test_the_endpoint_of_the_environment_is_taken(server, monkeypatch):
    # By a name, too: compatible stores have none for each bucket.
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("127.0.0.1", "localhost"))
    S3Storage("s3://bucket/run").write("key", [b"1"])
    assert server.store.get("bucket", "run/key") == b"1"


def test_a_profile_says_endpoint_region_and_credentials(server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(
        f"[profile there]\nregion = eu-west-3\nendpoint_url = {server.url}\n"
        "aws_access_key_id = id\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    storage = S3Storage("s3://bucket/run", profile="there")
    storage.write("key", [b"1"])
    assert server.store.get("bucket", "run/key") == b"1"
    spec = storage.kvstore("7/")
    assert (spec["aws_region"], spec["endpoint"]) == ("eu-west-3", server.url)
    assert spec["aws_credentials"] == {"type": "profile", "profile": "there"}
    monkeypatch.setenv("AWS_PROFILE", "there")
    assert bytes(S3Storage("s3://bucket/run").read("key")) == b"1"


def test_without_credentials_only_an_anonymous_client_works(opened, server, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    server.store.put("bucket", "run/key", b"1")
    with pytest.raises(StorageDeniedError, match="'s3://bucket/run/key'") as error:
        opened().read("key")
    assert "AWS_ACCESS_KEY_ID" in notes(error)
    assert server.requests == []
    storage = opened(anon=True)
    assert bytes(storage.read("key")) == b"1"
    assert storage.kvstore("")["aws_credentials"] == {"type": "anonymous"}


def test_a_child_of_a_fork_asks_by_itself(server, environment):
    script = """
import os, sys
from milepost_s3 import S3Storage
storage = S3Storage("s3://bucket/run", endpoint_url=sys.argv[1], timeout=5.0)
storage.write("key", [b"parent"])
if not os.fork():
    storage.write("key", [bytes(storage.read("key")) + b" and child"])
    os._exit(0)
os.wait()
print(bytes(storage.read("key")).decode())
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "parent and child\n", done.stderr


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_question_is_one_request(opened, server):
    storage = opened()
    storage.write("7/key", [b"0123456789"])
    asked = {
        "put": lambda: storage.write("7/other", [b"1"]),
        "get": lambda: storage.read("7/key", 2, 5),
        "head": lambda: storage.size("7/key"),
        "list": lambda: storage.children("7/"),
        "delete": lambda: storage.delete("7/other"),
    }
    for kind, ask in asked.items():
        server.forget()
        ask()
        assert kinds(server) == [kind]
    server.forget()
    assert bytes(storage.read("7/key", 3, 3)) == b""
    assert storage.read_into("7/key", 3, memoryview(b"")) == 0
    assert server.requests == []


def test_a_large_object_is_sent_in_parts_and_read_in_ranges(opened, server):
    storage = opened(part_bytes=PART)
    storage.write("key", (LARGE[at : at + 999_999] for at in range(0, len(LARGE), 999_999)))
    assert sorted(kinds(server)) == ["complete_upload", "create_upload", *["upload_part"] * 3]
    assert server.store.get("bucket", "run/key") == LARGE
    server.forget()
    assert bytes(storage.read("key")) == LARGE
    assert kinds(server) == ["get"] * 3
    memory = bytearray(len(LARGE))
    assert storage.read_into("key", 1000, memoryview(memory)) == len(LARGE) - 1000
    assert memory == LARGE[1000:] + bytes(1000)
    assert bytes(storage.read("key", MIB, 7 * MIB)) == LARGE[MIB : 7 * MIB]
    assert bytes(storage.read("key", 10 * MIB, 1 << 60)) == LARGE[10 * MIB :]


def test_an_object_as_large_as_a_part_is_one_request(opened, server):
    opened(part_bytes=PART).write("key", [LARGE[:PART]])
    assert kinds(server) == ["put"]


def test_parts_grow_so_that_ten_thousand_suffice():
    sizes = [len(part) for part in portions((b"x" * 100 for _ in range(60)), 2)]
    assert sizes[:1000] == [2] * 1000
    assert sizes[1000:] == [4] * 1000
    assert sum(sizes) == 6000


def test_a_body_can_be_sent_once():
    """Else a client that sends it again by itself would take the second reply for the first."""

    async def sent(body):
        return b"".join([bytes(portion) async for portion in body])

    body = Body(memoryview(LARGE))
    assert asyncio.run(sent(body)) == LARGE
    with pytest.raises(AgainError):
        asyncio.run(sent(body))


def test_few_parts_wait_for_the_store(opened, server):
    storage = opened(part_bytes=PART, concurrency=2)
    waiting = []

    def blocks():
        for taken in range(8):
            done = sum(request.kind == "upload_part" and request.status == 200 for request in server.requests)
            waiting.append(taken - done)
            yield LARGE[:PART]

    storage.write("key", blocks())
    assert max(waiting) <= 4  # two on their way, one full, and the one that is being filled
    assert server.store.get("bucket", "run/key") == LARGE[:PART] * 8


def test_a_thousand_objects_are_removed_by_one_request(opened, server):
    for number in range(1100):
        server.store.put("bucket", f"run/7/{number}", b"")
    server.store.put("bucket", "run/70/key", b"")
    server.store.put("bucket", "other/key", b"")
    storage = opened()
    assert len(list(storage.children("7/"))) == 1100
    server.forget()
    storage.delete("7/")
    assert kinds(server) == ["list", "delete_many"] * 2
    storage.delete("")
    assert server.store.keys("bucket") == ["other/key"]


def test_keys_come_in_order_from_any_point_on(opened, server):
    keys = [f"7/{number:04}" for number in range(1100)]
    for key in ["run/6/x", "run/", "run/7/", *(f"run/{key}" for key in keys), "run/8", "run/ä b+c%20"]:
        server.store.put("bucket", key, b"")
    storage = opened()
    assert storage.keys_after("7/", "") + storage.keys_after("7/", "7/0998") == keys[:999] + keys[999:]
    assert storage.keys_after("7/", "7/1097") == keys[1098:]
    assert storage.keys_after("", "7/\U0010ffff") == ["8", "ä b+c%20"]
    assert storage.keys_after("", "ä b+c%20") == []


def test_markers_of_folders_are_no_names(opened, server):
    for key in ("run/", "run/7/", "run/7//x", "run/7/a"):
        server.store.put("bucket", key, b"")
    storage = opened()
    assert list(storage.children("")) == ["7/"]
    assert list(storage.children("7/")) == ["a"]


def test_the_time_is_that_of_the_store(opened):
    assert abs(opened().time() - time.time()) < 2


def test_metadata_and_encryption_that_s3fs_was_told_of_reach_the_requests(opened, server):
    storage = opened(s3_additional_kwargs={"ContentType": "application/x-milepost", "NoSuchWord": 1})
    storage.write("key", [b"1"])
    assert storage.size("key") == 1
    assert storage.kvstore("") is None


def test_checksums_can_be_switched_off_for_stores_that_know_none(opened, server):
    storage = opened(config_kwargs={"request_checksum_calculation": "when_required"}, part_bytes=PART)
    storage.write("small", [b"1"])
    storage.write("large", [LARGE])
    assert server.store.get("bucket", "run/large") == LARGE


# --- TensorStore -----------------------------------------------------------------------------------------------------


def test_tensorstore_reaches_the_same_objects(opened, server):
    import tensorstore as ts

    storage = opened(requester_pays=True, concurrency=3)
    spec = storage.kvstore("7/")
    assert spec["requester_pays"] is True
    assert spec["aws_credentials"] == {"type": "environment"}
    assert spec["use_conditional_write"] is False  # Ceph's are never met, and nobody else writes below the prefix
    store = ts.KvStore.open(spec).result()
    store.write("a", b"1").result()
    assert bytes(storage.read("7/a")) == b"1"
    storage.write("7/b", [b"2"])
    assert store.read("b").result().value == b"2"


def test_at_home_tensorstore_is_told_the_region_and_no_endpoint():
    spec = S3Storage("s3://bucket/run", region="eu-west-3").kvstore("")
    assert (spec["bucket"], spec["path"], spec["aws_region"]) == ("bucket", "run/", "eu-west-3")
    assert {"endpoint", "use_conditional_write"} & {*spec} == set()


def test_certificates_of_ones_own_are_nothing_that_tensorstore_can_be_told(monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/ssl/certs/of-our-own.pem")
    assert S3Storage("s3://bucket/run", endpoint_url="https://store").kvstore("") is None
    assert S3Storage("s3://bucket/run", endpoint_url="http://store").kvstore("")["endpoint"] == "http://store"


@pytest.mark.parametrize(
    "options",
    [
        {"key": "id", "secret": "secret"},
        {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms"}},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"s3": {"addressing_style": "virtual"}}},
    ],
    ids=["credentials", "encryption", "certificates", "addresses"],
)
def test_what_tensorstore_cannot_be_told_goes_through_the_storage(opened, options):
    assert opened(**options).kvstore("") is None


# --- permissions -----------------------------------------------------------------------------------------------------


def test_reading_needs_no_more_than_get_and_list(opened, server):
    for key in ("run/7/key", "run/7/large"):
        server.store.put("bucket", key, LARGE)
    server.only({"get", "head", "list"})
    storage = opened(part_bytes=PART)
    assert sorted(storage.children("7/")) == ["key", "large"]
    assert bytes(storage.read("7/large")) == LARGE
    assert storage.size("7/key") == len(LARGE)
    assert storage.version("7/key")
    with pytest.raises(NotFoundError):
        storage.read("7/missing")
    with pytest.raises(StorageDeniedError, match=r"cannot write 's3://bucket/run/7/key': .*403") as error:
        storage.write("7/key", [b"1"])
    assert "s3:PutObject" in notes(error)


def test_writing_needs_no_more_than_put_delete_and_list(opened, server):
    server.only({"put", "create_upload", "upload_part", "complete_upload", "delete", "delete_many", "list"})
    storage = opened(part_bytes=PART)
    storage.write("7/key", [b"1"])
    storage.write("7/large", [LARGE])
    storage.create("7/new", [b"1"])
    with pytest.raises(AlreadyExistsError):
        storage.create("7/new", [b"2"])
    storage.delete("7/key")
    storage.delete("7/")
    assert server.store.keys("bucket") == []
    with pytest.raises(StorageDeniedError, match="cannot read") as error:
        storage.read("7/key")
    assert "s3:GetObject" in notes(error)


# --- faults ----------------------------------------------------------------------------------------------------------

PASSING = {
    "500": {"action": "status", "status": 500},
    "503": {"action": "status", "status": 503, "code": "SlowDown"},
    "429": {"action": "status", "status": 429},
    "a reset before": {"action": "drop_before"},
    "a reset after": {"action": "drop_after"},
    "half a reply": {"action": "cut"},
}

OLD = b"old" * 1000


def swap(storage):
    storage.replace("old", [b"new"], storage.version("old"))


ACTS = {
    "write": lambda storage: storage.write("new", [b"1"]),
    "create": lambda storage: storage.create("new", [b"1"]),
    "replace": swap,
    "write large": lambda storage: storage.write("new", [LARGE]),
    "read": lambda storage: bytes(storage.read("old")),
    "size": lambda storage: storage.size("old"),
    "children": lambda storage: list(storage.children("")),
    "delete": lambda storage: storage.delete("old"),
    "delete all": lambda storage: storage.delete(""),
    "uploads": lambda storage: list(storage.uploads("")),
}


def outcome(server, act, storage):
    server.store.clear()
    server.store.put("bucket", "run/old", OLD)
    server.forget()
    result = act(storage)
    count = len(server.requests)
    uploads = server.store.uploads("bucket")
    return result, {key: server.store.get("bucket", key) for key in server.store.keys("bucket")}, uploads, count


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("act", ACTS)
def test_one_fault_at_any_request_changes_nothing(opened, server, act, kind):
    storage = opened(part_bytes=PART)
    *expected, count = outcome(server, ACTS[act], storage)
    for at in range(1, count + 1):
        server.clear_rules()
        rule = server.rule(nth=at, **PASSING[kind])
        *found, _ = outcome(server, ACTS[act], storage)
        assert rule.reached.is_set()
        if not (act == "write large" and kind in {"a reset after", "half a reply"} and at == 1):
            assert found == expected
        else:
            # The reply that names the upload is lost, so that nobody can complete or abort it.
            assert found[:2] == expected[:2]
            assert len(found[2]) == 1


@pytest.mark.parametrize("act", ACTS)
def test_a_fault_that_lasts_is_told_with_what_was_tried_how_often(opened, server, act):
    storage = opened(part_bytes=PART)
    server.store.put("bucket", "run/old", OLD)
    server.rule("status", status=503, times=None)
    with pytest.raises(StorageError, match=r"^cannot .*'s3://bucket/run/.*(SlowDown|503).*, 3 times$"):
        ACTS[act](storage)
    assert len(server.requests) == 3


def test_credentials_that_expired_are_told_as_such(opened, server):
    server.rule("status", status=400, code="ExpiredToken")
    with pytest.raises(StorageDeniedError, match="ExpiredToken"):
        opened().read("key")


def test_a_refusal_is_not_repeated(opened, server):
    server.rule("status", status=403, code="AccessDenied", times=None)
    with pytest.raises(StorageDeniedError, match="AccessDenied"):
        opened().read("key")
    assert kinds(server) == ["get"]


def test_a_store_that_does_not_answer_ends_in_an_error(opened, server):
    rule = server.rule("stall", times=None)
    storage = opened(timeout=0.2, retries=1)
    with pytest.raises(StorageError, match=r"no reply within 0\.2 seconds, 2 times"):
        storage.read("key")
    rule.release()


def test_nobody_there_ends_in_an_error(opened):
    with pytest.raises(StorageError, match=r"cannot read 's3://bucket/run/key'.*, 2 times"):
        opened(endpoint_url="http://127.0.0.1:9", retries=1).read("key")


@pytest.mark.parametrize(("status", "code"), [(507, "XMinioStorageFull"), (403, "QuotaExceeded")])
def test_a_store_without_room_says_so(opened, server, status, code):
    server.rule("status", status=status, code=code)
    with pytest.raises(StorageFullError, match="no room left"):
        opened().write("key", [b"1"])


@pytest.mark.parametrize("act", [name for name in ACTS if name not in {"size", "replace"}])
def test_a_bucket_that_is_missing_is_no_missing_object(opened, act):
    with pytest.raises(StorageError, match="there is no bucket 'nowhere'"):
        ACTS[act](opened("s3://nowhere/run", part_bytes=PART))


# --- lost replies, and lost races ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 80 * MIB], ids=["one request", "an upload"])
def test_a_lost_reply_of_a_create_is_not_a_lost_race(opened, server, size):
    rule = server.rule("drop_after", kind="put" if size < PART else "complete_upload")
    storage = opened(timeout=30.0)
    storage.create("key", [bytes(size)])
    assert rule.reached.is_set()
    with pytest.raises(AlreadyExistsError):
        storage.create("key", [bytes(size)])
    assert server.store.uploads("bucket") == []


@pytest.mark.parametrize("fault", ["drop_before", "drop_after"])
def test_a_lost_race_after_a_lost_reply_is_told(opened, server, fault):
    server.rule(fault, kind="put", nth=1)
    held = server.rule("hold", kind="put", nth=2)
    storage = opened()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        created = pool.submit(storage.create, "key", [b"ours"])
        assert held.reached.wait(60)
        server.store.put("bucket", "run/key", b"theirs")
        held.release()
        with pytest.raises(AlreadyExistsError, match="cannot create 's3://bucket/run/key'"):
            created.result()
    assert server.store.get("bucket", "run/key") == b"theirs"


def test_a_conflict_that_passes_is_waited_for(opened, server):
    server.rule("status", status=409, code="ConditionalRequestConflict", times=2)
    opened().create("key", [b"1"])
    assert server.store.get("bucket", "run/key") == b"1"


def test_the_same_bytes_written_again_are_another_version(opened, server):
    storage, other = opened(), opened()
    storage.write("key", [b"same"])
    version = storage.version("key")
    other.write("key", [b"same"])
    assert storage.version("key") != version
    with pytest.raises(AlreadyExistsError):
        storage.replace("key", [b"new"], version)
    current = storage.version("key")
    storage.replace("key", [b"same"], current)
    with pytest.raises(AlreadyExistsError):
        other.replace("key", [b"other"], current)
    assert server.store.get("bucket", "run/key") == b"same"


def test_of_two_that_looked_before_the_same_bytes_were_swapped_in_one_wins(opened, server):
    storage, other = opened(), opened()
    storage.write("key", [b"same"])
    version = storage.version("key")
    held = server.rule("hold", kind="put")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = pool.submit(storage.replace, "key", [b"late"], version)
        assert held.reached.wait(60)
        other.replace("key", [b"same"], version)
        held.release()
        with pytest.raises(AlreadyExistsError):
            late.result()
    assert server.store.get("bucket", "run/key") == b"same"


def test_what_is_gone_cannot_be_replaced(opened, server):
    storage = opened()
    storage.write("key", [b"1"])
    version = storage.version("key")
    storage.delete("key")
    with pytest.raises(AlreadyExistsError):
        storage.replace("key", [b"2"], version)
    assert server.store.keys("bucket") == []


def test_a_store_that_knows_tags_without_quotation_marks_only_is_asked_so(opened, server):
    storage = opened()
    storage.write("key", [b"1"])
    version = storage.version("key")
    server.rule("status", status=412, kind="put")
    storage.replace("key", [b"2"], version)
    assert server.store.get("bucket", "run/key") == b"2"
    server.rule("status", status=412, kind="put", times=None)
    server.forget()
    with pytest.raises(AlreadyExistsError):
        storage.replace("key", [b"3"], storage.version("key"))
    assert kinds(server).count("put") == 2


def test_the_store_is_asked_to_refuse_a_version_that_is_gone(opened, server):
    """Else nobody could find out whether it heeds the condition."""
    storage = opened()
    storage.write("key", [b"1"])
    version = storage.version("key")
    storage.write("key", [b"2"])
    server.weak = {"if-match"}
    storage.replace("key", [b"3"], version)
    assert server.store.get("bucket", "run/key") == b"3"


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(opened, server):
    new = LARGE[::-1]
    server.store.put("bucket", "run/key", LARGE)
    storage = opened(part_bytes=PART, concurrency=1)
    memory = bytearray(len(LARGE))
    for read in (
        lambda: bytes(storage.read("key")),
        lambda: storage.read_into("key", 0, memoryview(memory)) and memory,
    ):
        server.clear_rules()
        server.store.put("bucket", "run/key", LARGE)
        held = server.rule("hold", kind="get", nth=2)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            assert held.reached.wait(60)
            server.store.put("bucket", "run/key", new)
            held.release()
            assert reading.result() == new


# --- uploads that do not end -----------------------------------------------------------------------------------------


def test_an_upload_is_invisible_until_it_is_complete_and_then_whole(opened, server):
    held = server.rule("hold", kind="complete_upload")
    storage, other = opened(part_bytes=PART), opened()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(storage.write, "key", [LARGE])
        assert held.reached.wait(60)
        assert list(other.children("")) == []
        assert [upload.key for upload in other.uploads("")] == ["key"]
        held.release()
        writing.result()
    assert server.store.get("bucket", "run/key") == LARGE
    assert list(other.uploads("")) == []


@pytest.mark.parametrize("kind", ["upload_part", "complete_upload"])
def test_an_upload_that_fails_is_aborted(opened, server, kind):
    server.rule("status", status=403, kind=kind, nth=1 if kind == "complete_upload" else 2)
    with pytest.raises(StorageDeniedError, match="cannot write 's3://bucket/run/key'"):
        opened(part_bytes=PART).write("key", [LARGE])
    assert server.store.uploads("bucket") == []
    assert server.store.keys("bucket") == []


def test_an_upload_that_cannot_be_aborted_is_found_and_can_be_given_up(opened, server):
    server.only({"create_upload", "upload_part"})
    storage = opened(part_bytes=PART)
    for key in ("7/a b+%", "70/c"):
        with pytest.raises(StorageDeniedError, match="403"):
            storage.write(key, [LARGE])
    server.only(None)
    (upload,) = storage.uploads("7/")
    assert upload.key == "7/a b+%"
    assert abs(upload.started - time.time()) < 60
    assert [each.key for each in storage.uploads("")] == ["7/a b+%", "70/c"]
    storage.abort_upload(upload)
    storage.abort_upload(upload)
    assert [each.key for each in storage.uploads("")] == ["70/c"]


def test_an_upload_that_somebody_else_aborted_is_no_success(opened, server):
    server.rule("status", status=404, code="NoSuchUpload", kind="complete_upload")
    storage = opened(part_bytes=PART)
    server.store.put("bucket", "run/key", b"older")
    with pytest.raises(StorageError, match="aborted by somebody else"):
        storage.write("key", [LARGE])
    assert server.store.get("bucket", "run/key") == b"older"


def test_what_is_interrupted_leaves_nothing_behind(opened, server):
    class Interrupt(BaseException):
        pass

    def blocks():
        yield LARGE
        raise Interrupt

    with pytest.raises(Interrupt):
        opened(part_bytes=PART).write("key", blocks())
    assert server.store.uploads("bucket") == []
    assert server.store.keys("bucket") == []


# --- deletions that do not end ---------------------------------------------------------------------------------------


def test_a_deletion_of_many_that_fails_for_one_names_it(opened, server):
    for key in ("run/7/a", "run/7/b", "run/7/c"):
        server.store.put("bucket", key, b"")
    server.rule("status", status=403, code="AccessDenied", kind="delete_each", key="/b")
    with pytest.raises(StorageDeniedError, match="cannot delete 's3://bucket/run/7/b'"):
        opened().delete("7/")
    assert server.store.keys("bucket") == ["run/7/b"]
    server.rule("status", status=500, code="InternalError", kind="delete_each", key="/b")
    opened().delete("7/")
    assert server.store.keys("bucket") == []


def test_a_store_that_knows_no_deletion_of_many_is_asked_for_each(opened, server):
    for number in range(20):
        server.store.put("bucket", f"run/7/{number}", b"")
    server.rule("status", status=501, code="NotImplemented", kind="delete_many", times=None)
    opened().delete("7/")
    assert server.store.keys("bucket") == []


# --- many at once ----------------------------------------------------------------------------------------------------


def test_waiting_for_other_requests_is_not_counted_as_waiting_for_a_reply(opened, server):
    server.rule("delay", kind="get", times=None, seconds=0.3)
    server.store.put("bucket", "run/key", b"1")
    storage = opened(concurrency=1, timeout=2.0, retries=0)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        assert [bytes(read) for read in pool.map(storage.read, ["key"] * 9)] == [b"1"] * 9


def test_threads_that_come_first_share_one_client(opened):
    storage = opened()
    gate = threading.Barrier(8)

    def ask(_):
        gate.wait(60)
        return list(storage.children("")), id(storage._client)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len({client for _, client in found}) == 1


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = "import sys, milepost_s3; milepost_s3.S3Storage('s3://bucket'); print('s3fs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_client_is_closed_on_its_own_loop_whichever_thread_collects_it(server, caplog):
    storage = S3Storage("s3://bucket/run", endpoint_url=server.url)
    storage.write("key", [b"data"])
    kept = [storage]
    del storage

    async def collected():
        kept.clear()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(collected())
    gc.collect()
    assert [each.getMessage() for each in caplog.records if each.name == "asyncio"] == []
