"""What the server for tests does as Google Cloud Storage, request by request."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import urllib.parse

import pytest
from testing.asking import Client, at_once

md5 = functools.partial(hashlib.md5, usedforsecurity=False)

OBJECTS = "/storage/v1/b/bucket/o"
UPLOAD = "/upload/storage/v1/b/bucket/o"
GRAIN = 256 << 10


@pytest.fixture
def gcs(server):
    return Client(server.url)


def path(name):
    return f"{OBJECTS}/{urllib.parse.quote(name, safe='')}"


def media(gcs, name, body, condition="", **headers):
    asked = f"uploadType=media&name={urllib.parse.quote(name)}{condition and f'&ifGenerationMatch={condition}'}"
    return gcs.post(f"{UPLOAD}?{asked}", body, **headers)


def related(gcs, name, body, condition="", line=b"\r\n", **described):
    text = json.dumps({"name": name, **described}).encode()
    lines = [b"--==0==", b"Content-Type: application/json", b"", text, b"--==0==", b"Content-Type: text/x", b"", body]
    whole = line.join([*lines, b"--==0==--"])
    asked = f"uploadType=multipart{condition and f'&ifGenerationMatch={condition}'}"
    return gcs.post(f"{UPLOAD}?{asked}", whole, Content_Type='multipart/related; boundary="==0=="')


def started(gcs, name, condition="", **described):
    asked = f"uploadType=resumable{condition and f'&ifGenerationMatch={condition}'}"
    return gcs.post(f"{UPLOAD}?{asked}", json.dumps({"name": name, **described}).encode())


def session(answer):
    assert answer.status == 200
    return answer.headers["location"].partition("/upload/")[2].join(["/upload/", ""])


def resumable(gcs, name, body, condition=""):
    answer = started(gcs, name, condition)
    return gcs.put(session(answer), body) if answer.status == 200 else answer


UPLOADS = {"media": media, "multipart": related, "resumable": resumable}


@pytest.fixture(params=UPLOADS)
def upload(request):
    return UPLOADS[request.param]


def read(gcs, name, query="", **headers):
    return gcs.get(f"{path(name)}?alt=media{query}", **headers)


# --- conditions ------------------------------------------------------------------------------------------------------


def test_a_key_that_exists_cannot_be_created(gcs, upload):
    assert upload(gcs, "a/b", b"first", "0").status == 200
    refused = upload(gcs, "a/b", b"second", "0")
    assert (refused.status, refused.json["error"]["code"]) == (412, 412)
    assert refused.json["error"]["errors"][0]["reason"] == "conditionNotMet"
    assert read(gcs, "a/b").body == b"first"


def test_a_generation_that_is_gone_cannot_be_replaced(gcs, upload):
    stale = upload(gcs, "a", b"first").json["generation"]
    fresh = upload(gcs, "a", b"first").json["generation"]
    assert stale != fresh
    assert upload(gcs, "a", b"lost", stale).status == 412
    assert upload(gcs, "none", b"lost", stale).status == 412
    assert read(gcs, "a").body == b"first"
    assert upload(gcs, "a", b"third", fresh).status == 200
    assert read(gcs, "a").body == b"third"


def test_of_many_that_create_one_key_one_does(gcs, upload):
    for turn in range(6):
        answers = at_once(8, lambda who, turn=turn: upload(gcs, f"{turn}", b"%d" % who, "0").status)
        assert sorted(answers) == [200] + [412] * 7
        assert read(gcs, f"{turn}").body == b"%d" % answers.index(200)


def test_no_increment_by_compare_and_swap_is_lost(gcs, upload):
    media(gcs, "n", b"0")

    def count(_):
        done = 0
        while done < 5:
            seen = read(gcs, "n")
            generation = seen.headers["x-goog-generation"]
            done += upload(gcs, "n", b"%d" % (int(seen.body) + 1), generation).status == 200

    at_once(4, count)
    assert read(gcs, "n").body == b"20"


def test_the_condition_of_a_resumable_upload_is_judged_again_at_its_end(gcs, server):
    where = session(started(gcs, "a", "0"))
    media(gcs, "a", b"quicker")
    assert gcs.put(where, b"late").status == 412
    assert read(gcs, "a").body == b"quicker"
    assert server.store.uploads("bucket") == []


def test_the_condition_of_a_resumable_upload_is_judged_before_a_byte_is_sent(gcs, server):
    media(gcs, "a", b"first")
    assert started(gcs, "a", "0").status == 412
    assert server.store.uploads("bucket") == []


def test_what_is_another_generation_now_is_not_deleted(gcs):
    stale = media(gcs, "a", b"first").json["generation"]
    fresh = media(gcs, "a", b"second").json["generation"]
    assert gcs.delete(f"{path('a')}?ifGenerationMatch={stale}").status == 412
    assert gcs.delete(f"{path('a')}?generation={stale}").status == 404
    assert read(gcs, "a").body == b"second"
    assert gcs.delete(f"{path('a')}?ifGenerationMatch={fresh}").status == 204
    assert gcs.delete(f"{path('a')}?ifGenerationMatch={fresh}").status == 404


# --- objects ---------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(gcs, upload):
    answer = upload(gcs, "a/b", b"data").json
    assert (answer["name"], answer["bucket"], answer["size"]) == ("a/b", "bucket", "4")
    assert answer["md5Hash"] == base64.b64encode(md5(b"data").digest()).decode()
    assert answer["crc32c"] == "rth90Q=="
    assert gcs.get(path("a/b")).json == answer
    got = read(gcs, "a/b")
    assert (got.status, got.body, got.headers["x-goog-generation"]) == (200, b"data", answer["generation"])
    assert got.headers["x-goog-hash"] == f"crc32c={answer['crc32c']},md5={answer['md5Hash']}"
    assert gcs.get(f"/download{path('a/b')}?alt=media").body == b"data"
    assert gcs.get("/b/bucket/o/a%2Fb").json == answer


@pytest.mark.parametrize("line", [b"\r\n", b"\n"])
@pytest.mark.parametrize("body", [b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n--==0", bytes(range(256))])
def test_lines_of_any_ending_separate_data_of_any_ending(gcs, line, body):
    assert related(gcs, "a", body, line=line, metadata={"x": "y"}).json["metadata"] == {"x": "y"}
    assert read(gcs, "a").body == body
    assert read(gcs, "a").headers["content-type"] == "text/x"


@pytest.mark.parametrize(
    ("asked", "status", "body"),
    [("bytes=2-4", 206, b"234"), ("bytes=7-", 206, b"789"), ("bytes=-2", 206, b"89"), ("bytes=10-", 416, None)],
)
def test_a_range_is_part_of_an_object(gcs, asked, status, body):
    media(gcs, "a", b"0123456789")
    answer = read(gcs, "a", Range=asked)
    assert (answer.status, answer.body if body else None) == (status, body)


def test_one_generation_can_be_asked_for(gcs):
    stale = media(gcs, "a", b"first").json["generation"]
    fresh = media(gcs, "a", b"second").json["generation"]
    assert read(gcs, "a", f"&generation={fresh}").body == b"second"
    assert read(gcs, "a", f"&generation={stale}").status == 404
    assert read(gcs, "a", f"&ifGenerationMatch={fresh}").body == b"second"
    assert read(gcs, "a", f"&ifGenerationMatch={stale}").status == 412
    assert read(gcs, "a", f"&ifGenerationNotMatch={fresh}").status == 304
    assert read(gcs, "a", f"&ifGenerationNotMatch={stale}").body == b"second"


def test_what_is_not_there_is_said_to_be_missing(gcs):
    assert [read(gcs, "a").status, gcs.get(path("a")).status, gcs.delete(path("a")).status] == [404] * 3
    assert gcs.get("/storage/v1/b/another/o/a").json["error"]["errors"][0]["reason"] == "notFound"


@pytest.mark.parametrize("told", ["crc32c=AAAAAA==", "md5=1B2M2Y8AsgTpgAmY7PhCfg=="])
def test_a_body_that_is_not_the_one_that_was_meant_is_refused(gcs, told):
    assert media(gcs, "a", b"data", x_goog_hash=told).status == 400
    name, _, value = told.partition("=")
    described = {"md5Hash" if name == "md5" else name: value}
    assert related(gcs, "a", b"data", **described).status == 400
    assert gcs.put(session(started(gcs, "a", **described)), b"data").status == 400
    assert read(gcs, "a").status == 404
    assert media(gcs, "a", b"data", x_goog_hash="crc32c=rth90Q==").status == 200


def test_without_the_fast_library_checksums_are_the_same(gcs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google_crc32c", None)
    assert media(gcs, "a", b"data").json["crc32c"] == "rth90Q=="


# --- many ------------------------------------------------------------------------------------------------------------


def listed(gcs, **query):
    answer = gcs.get(f"{OBJECTS}?{urllib.parse.urlencode(query)}").json
    return [item["name"] for item in answer.get("items", [])], answer.get("prefixes", []), answer.get("nextPageToken")


def test_keys_are_listed_in_the_order_of_their_bytes(gcs):
    names = ["a", "a/b", "a0", "B", "z", "ä", "é/1", "ﬀ", "\U0001f600"]
    for name in names:
        media(gcs, name, b"")
    assert listed(gcs)[0] == sorted(names, key=str.encode)


def test_lists_come_in_pages(gcs):
    for number in range(7):
        media(gcs, f"{number}", b"")
    found, token, pages = [], "", 0
    while token is not None:
        names, _, token = listed(gcs, maxResults=3, **({"pageToken": token} if token else {}))
        found += names
        pages += 1
    assert (found, pages) == ([f"{number}" for number in range(7)], 3)


def test_a_delimiter_folds_keys_into_prefixes(gcs):
    for name in ("r/1", "r/2/a", "r/2/b", "r/3/a/b", "r/4", "s"):
        media(gcs, name, b"")
    assert listed(gcs, prefix="r/", delimiter="/") == (["r/1", "r/4"], ["r/2/", "r/3/"], None)


def test_a_list_can_start_at_a_key_and_end_before_one(gcs):
    for name in "abcd":
        media(gcs, name, b"")
    assert listed(gcs, startOffset="b", endOffset="d")[0] == ["b", "c"]
    assert listed(gcs, startOffset="aa")[0] == ["b", "c", "d"]


def batch(gcs, *paths, line="\r\n"):
    parts = [
        line.join(
            ["--=b=", "Content-Type: application/http", f"Content-ID: <x+{at}>", "", f"DELETE {each} HTTP/1.1", ""]
        )
        for at, each in enumerate(paths, 1)
    ]
    body = line.join([*parts, "--=b=--", ""]).encode()
    return gcs.post("/batch/storage/v1", body, Content_Type='multipart/mixed; boundary="=b="')


@pytest.mark.parametrize("line", ["\r\n", "\n"])
def test_many_are_deleted_at_once_and_each_has_its_answer(gcs, line):
    stale = media(gcs, "a/b", b"").json["generation"]
    for name in ("a/b", "c", "d"):
        media(gcs, name, b"")
    answer = batch(gcs, path("c"), path("none"), f"{path('a/b')}?ifGenerationMatch={stale}", path("d"), line=line)
    boundary = answer.headers["content-type"].partition("boundary=")[2]
    parts = answer.body.decode().split(f"--{boundary}")[1:-1]
    assert [part.partition("HTTP/1.1 ")[2][:3] for part in parts] == ["204", "404", "412", "204"]
    assert [part.partition("Content-ID: ")[2].partition("\r\n")[0] for part in parts] == [
        f"<response-x+{at}>" for at in (1, 2, 3, 4)
    ]
    assert listed(gcs)[0] == ["a/b"]


def test_a_batch_has_at_most_a_hundred_acts(gcs):
    media(gcs, "a", b"")
    assert batch(gcs, *[path("a")] * 101).status == 400
    assert listed(gcs)[0] == ["a"]


def test_what_is_not_known_is_not_passed_over(gcs):
    asked = [("PATCH", path("a")), ("POST", OBJECTS), ("DELETE", "/storage/v1/b/bucket"), ("POST", UPLOAD)]
    assert [gcs.ask(*each).status for each in asked] == [501] * 4
    assert gcs.get("/storage/v1/b/bucket/iam").status == 501
    assert gcs.get("/storage/v1/b/bucket").json["name"] == "bucket"


# --- resumable uploads -----------------------------------------------------------------------------------------------


def chunk(gcs, where, data, start, total="*"):
    told = f"bytes {start}-{start + len(data) - 1}/{total}" if data else f"bytes */{total}"
    return gcs.put(where, data, Content_Range=told)


def test_nothing_is_seen_of_an_upload_before_its_last_piece(gcs, server):
    where = session(started(gcs, "a", metadata={"x": "y"}))
    answer = chunk(gcs, where, b"a" * GRAIN, 0)
    assert (answer.status, answer.headers["range"]) == (308, f"bytes=0-{GRAIN - 1}")
    assert read(gcs, "a").status == 404
    assert [(each.key, each.size) for each in server.store.uploads("bucket")] == [("a", GRAIN)]
    answer = chunk(gcs, where, b"b", GRAIN, GRAIN + 1)
    assert (answer.status, answer.json["size"], answer.json["metadata"]) == (200, f"{GRAIN + 1}", {"x": "y"})
    assert read(gcs, "a").body == b"a" * GRAIN + b"b"
    assert server.store.uploads("bucket") == []


def test_an_upload_says_how_far_it_has_come(gcs, server):
    where = session(started(gcs, "a"))
    answer = chunk(gcs, where, b"", 0)
    assert (answer.status, "range" in answer.headers) == (308, False)
    chunk(gcs, where, b"a" * GRAIN, 0)
    assert chunk(gcs, where, b"", 0, 2 * GRAIN).headers["range"] == f"bytes=0-{GRAIN - 1}"
    assert [each.kind for each in server.requests] == [
        "start_resumable",
        "resumable_status",
        "resumable_part",
        "resumable_status",
    ]


def test_only_whole_grains_are_kept_of_what_goes_on(gcs):
    where = session(started(gcs, "a"))
    assert chunk(gcs, where, b"a" * (GRAIN + 5), 0).headers["range"] == f"bytes=0-{GRAIN - 1}"
    assert chunk(gcs, where, b"a" * 5, GRAIN).status == 400
    assert chunk(gcs, where, b"b" * 7, GRAIN, GRAIN + 7).status == 200
    assert read(gcs, "a").body == b"a" * GRAIN + b"b" * 7


def test_a_piece_may_come_again_and_none_may_be_left_out(gcs):
    where = session(started(gcs, "a"))
    chunk(gcs, where, b"a" * GRAIN, 0)
    assert chunk(gcs, where, b"a" * GRAIN, 0).headers["range"] == f"bytes=0-{GRAIN - 1}"
    assert chunk(gcs, where, b"b" * GRAIN, 2 * GRAIN).status == 503
    assert chunk(gcs, where, b"a" * GRAIN + b"b", 0, GRAIN + 1).status == 200
    assert read(gcs, "a").body == b"a" * GRAIN + b"b"


def test_a_last_piece_that_comes_again_gets_the_same_answer(gcs, server):
    where = session(started(gcs, "a", "0"))
    first = chunk(gcs, where, b"data", 0, 4)
    assert chunk(gcs, where, b"data", 0, 4).json == first.json
    assert chunk(gcs, where, b"", 0, 4).json == first.json
    assert server.store.keys("bucket") == ["a"]


def test_an_upload_without_bytes_or_without_a_size_can_be_ended(gcs):
    assert chunk(gcs, session(started(gcs, "empty")), b"", 0, 0).json["size"] == "0"
    where = session(started(gcs, "a"))
    chunk(gcs, where, b"a" * GRAIN, 0)
    assert chunk(gcs, where, b"", 0, GRAIN).json["size"] == f"{GRAIN}"
    assert [read(gcs, "empty").body, read(gcs, "a").body] == [b"", b"a" * GRAIN]


def test_an_upload_that_is_given_up_leaves_nothing(gcs, server):
    where = session(started(gcs, "a"))
    chunk(gcs, where, b"a" * GRAIN, 0)
    assert gcs.delete(where).status == 499
    assert chunk(gcs, where, b"b", GRAIN, GRAIN + 1).status == 404
    assert gcs.delete(where).status == 404
    assert (server.store.uploads("bucket"), read(gcs, "a").status) == ([], 404)
