"""What the server for tests does as S3, request by request; moto has to do the same."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.client
import urllib.parse
import uuid
import zlib

import pytest
from testing.asking import Client, at_once

md5 = functools.partial(hashlib.md5, usedforsecurity=False)

LACKING = {
    "test_a_body_that_is_not_the_one_that_was_meant_is_refused": "moto compares no checksum",
    "test_a_completion_that_must_not_replace_does_not": "moto completes whatever `If-Match` says",
    "test_a_copy_that_must_not_replace_does_not": "moto judges no condition of a copy",
    "test_a_body_that_is_cut_short_is_never_seen": "moto waits for the rest, and then for ever",
    "test_a_list_of_deletions_without_a_checksum_is_refused": "moto asks for none",
    "test_completing_again_finds_no_upload": "moto answers as it did at first",
    "test_an_aborted_upload_leaves_nothing": "moto breaks over an upload that it does not know",
    "test_parts_in_another_order_are_refused": "moto looks at sizes and ETags alone",
    "test_quiet_deletions_are_told_only_where_they_fail": "moto tells all",
    "test_parts_of_a_cut_stream_of_chunks_are_refused": "moto compares no length",
    "test_every_list_of_uploads_is_paged": "moto lists all at once",
    "test_what_is_not_known_is_not_passed_over": "moto knows more",
}
"""What the second opinion is not asked, and why."""


@pytest.fixture(params=["ours", "moto"])
def s3(request):
    """Return a client of an S3, and a prefix of its own within the bucket."""
    if request.param == "moto" and request.function.__name__ in LACKING:
        pytest.skip(LACKING[request.function.__name__])
    return Client(request.getfixturevalue("server").url if request.param == "ours" else request.getfixturevalue("moto"))


@pytest.fixture
def key(s3):
    return f"/bucket/{uuid.uuid4().hex}"


def listed(s3, *paths, **query):
    asked = urllib.parse.urlencode({"list-type": "2", **{name.replace("_", "-"): each for name, each in query.items()}})
    answer = s3.get(f"/bucket?{asked}")
    assert answer.status == 200
    return answer


def begun(s3, key):
    return s3.post(f"{key}?uploads").texts("UploadId")[0]


def completion(*etags):
    parts = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in enumerate(etags, 1)
    )
    return f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()


# --- conditions ------------------------------------------------------------------------------------------------------


def test_a_key_that_exists_cannot_be_created(s3, key):
    assert s3.put(key, b"first", If_None_Match="*").status == 200
    refused = s3.put(key, b"second", If_None_Match="*")
    assert (refused.status, refused.code, refused.texts("Condition")) == (412, "PreconditionFailed", ["If-None-Match"])
    assert s3.get(key).body == b"first"


def test_a_version_that_is_gone_cannot_be_replaced(s3, key):
    stale = s3.put(key, b"first").etag
    fresh = s3.put(key, b"second").etag
    assert s3.put(key, b"lost", If_Match=stale).status == 412
    assert s3.get(key).body == b"second"
    assert s3.put(key, b"third", If_Match=fresh).status == 200
    assert s3.put(key, b"fourth", If_Match=md5(b"third").hexdigest()).status == 200
    assert s3.get(key).body == b"fourth"


def test_what_is_not_there_cannot_be_replaced(s3, key):
    answer = s3.put(key, b"new", If_Match='"0123"')
    assert (answer.status, answer.code) == (404, "NoSuchKey")
    assert s3.get(key).status == 404


def test_of_many_that_create_one_key_one_does(s3, key):
    for turn in range(6):
        answers = at_once(8, lambda who, turn=turn: s3.put(f"{key}/{turn}", b"%d" % who, If_None_Match="*").status)
        assert sorted(answers) == [200] + [412] * 7
        assert s3.get(f"{key}/{turn}").body == b"%d" % answers.index(200)


def test_of_many_that_complete_uploads_of_one_key_one_does(s3, key):
    for turn in range(3):
        path = f"{key}/{turn}"
        uploads = [begun(s3, path) for _ in range(4)]
        etags = [s3.put(f"{path}?partNumber=1&uploadId={each}", b"%d" % who).etag for who, each in enumerate(uploads)]

        def act(who, path=path, uploads=uploads, etags=etags):
            return s3.post(f"{path}?uploadId={uploads[who]}", completion(etags[who]), If_None_Match="*").status

        answers = at_once(4, act)
        assert sorted(answers) == [200] + [412] * 3
        assert s3.get(path).body == b"%d" % answers.index(200)


def test_no_increment_by_compare_and_swap_is_lost(s3, key):
    s3.put(key, b"0")

    def count(_):
        done = 0
        while done < 5:
            seen = s3.get(key)
            done += s3.put(key, b"%d" % (int(seen.body) + 1), If_Match=seen.etag).status == 200

    at_once(4, count)
    assert s3.get(key).body == b"20"


def test_what_is_another_version_now_is_not_deleted(s3, key):
    stale = s3.put(key, b"first").etag
    fresh = s3.put(key, b"second").etag
    assert s3.delete(key, If_Match=stale).status == 412
    assert s3.get(key).body == b"second"
    assert s3.delete(key, If_Match=fresh).status == 204
    assert s3.get(key).status == 404


def test_deleting_what_is_not_there_is_an_error_on_a_condition_only(s3, key):
    answer = s3.delete(key, If_Match='"0123"')
    assert (answer.status, answer.code) == (404, "NoSuchKey")
    assert s3.delete(key).status == 204


def test_a_completion_that_must_not_replace_does_not(s3, key):
    stale = s3.put(key, b"first").etag
    s3.put(key, b"second")
    upload = begun(s3, key)
    etag = s3.put(f"{key}?partNumber=1&uploadId={upload}", b"third").etag
    assert s3.post(f"{key}?uploadId={upload}", completion(etag), If_Match=stale).status == 412
    assert s3.get(key).body == b"second"
    fresh = s3.get(key).etag
    assert s3.post(f"{key}?uploadId={upload}", completion(etag), If_Match=fresh).status == 200
    assert s3.get(key).body == b"third"


def test_a_copy_that_must_not_replace_does_not(s3, key):
    s3.put(f"{key}/a", b"a")
    s3.put(f"{key}/b", b"b")
    assert s3.put(f"{key}/b", x_amz_copy_source=f"{key}/a", If_None_Match="*").status == 412
    assert s3.get(f"{key}/b").body == b"b"
    assert s3.put(f"{key}/c", x_amz_copy_source=f"{key}/a", If_None_Match="*").status == 200
    assert s3.get(f"{key}/c").body == b"a"


# --- objects ---------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(s3, key):
    etag = md5(b"data").hexdigest()
    assert s3.put(key, b"data", x_amz_meta_owner="me", Content_Type="text/x").etag == f'"{etag}"'
    answer = s3.get(key)
    assert (answer.status, answer.body, answer.etag) == (200, b"data", f'"{etag}"')
    assert (answer.headers["x-amz-meta-owner"], answer.headers["content-type"]) == ("me", "text/x")
    assert {"date", "last-modified"} <= answer.headers.keys()


def test_a_look_tells_the_size_and_no_bytes(s3, key):
    s3.put(key, b"data")
    answer = s3.ask("HEAD", key)
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "4")
    missing = s3.ask("HEAD", f"{key}/none")
    assert (missing.status, missing.body) == (404, b"")


def test_what_is_not_there_is_said_to_be_missing(s3, key):
    answer = s3.get(key)
    assert (answer.status, answer.code) == (404, "NoSuchKey")
    answer = s3.get("/another-bucket/key")
    assert (answer.status, answer.code) == (404, "NoSuchBucket")


@pytest.mark.parametrize(
    ("asked", "status", "body", "told"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
    ],
)
def test_a_range_is_part_of_an_object(s3, key, asked, status, body, told):
    s3.put(key, b"0123456789")
    answer = s3.get(key, Range=asked)
    assert (answer.status, answer.body, answer.headers["content-range"]) == (status, body, told)


def test_a_range_behind_the_end_is_refused(s3, key):
    s3.put(key, b"0123456789")
    answer = s3.get(key, Range="bytes=10-")
    assert (answer.status, answer.code) == (416, "InvalidRange")


def test_a_reader_can_ask_for_one_version_or_for_another(s3, key):
    etag = s3.put(key, b"data").etag
    assert s3.get(key, If_Match=etag).status == 200
    assert s3.get(key, If_Match='"0123"').status == 412
    assert s3.get(key, If_None_Match=etag).status == 304
    assert s3.get(key, If_None_Match='"0123"').status == 200


def test_keys_may_hold_any_letter(s3, key):
    for name in ("a b", "a+b", "ä/ö", "%41", "<&>", "a=b&c", "~.-_", "\U0001f600"):
        path = f"{key}/{urllib.parse.quote(name)}"
        assert s3.put(path, name.encode()).status == 200
        assert s3.get(path).body == name.encode()
        prefix = f"{urllib.parse.unquote(key).removeprefix('/bucket/')}/{name}"
        assert listed(s3, prefix=prefix).texts("Contents", "Key") == [prefix]


def test_deleting_is_for_good_and_again_is_no_error(s3, key):
    s3.put(key, b"data")
    assert [s3.delete(key).status, s3.delete(key).status] == [204, 204]
    assert s3.get(key).status == 404


@pytest.mark.parametrize(
    "name",
    ["content-md5", "x-amz-checksum-crc32", "x-amz-checksum-sha1", "x-amz-checksum-sha256", "x-amz-checksum-crc32c"],
)
def test_a_body_that_is_not_the_one_that_was_meant_is_refused(s3, key, name):
    digests = {
        "content-md5": md5(b"123456789").digest(),
        "x-amz-checksum-crc32": zlib.crc32(b"123456789").to_bytes(4, "big"),
        "x-amz-checksum-sha1": hashlib.sha1(b"123456789", usedforsecurity=False).digest(),
        "x-amz-checksum-sha256": hashlib.sha256(b"123456789").digest(),
        "x-amz-checksum-crc32c": (0xE3069283).to_bytes(4, "big"),
    }
    told = {name: base64.b64encode(digests[name]).decode()}
    assert s3.put(key, b"123456789", **told).status == 200
    answer = s3.put(key, b"12345678", **told)
    assert (answer.status, answer.code) == (400, "BadDigest")
    assert s3.get(key).body == b"123456789"


def streamed(*chunks, signed=False):
    signature = b";chunk-signature=" + b"0" * 64 if signed else b""
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), signature, chunk) for chunk in (*chunks, b"") if chunk)
    return body + b"0" + signature + b"\r\n"


def test_bodies_come_in_signed_chunks(s3, key):
    body = streamed(b"12345", b"6789", signed=True) + b"\r\n"
    told = {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "x-amz-decoded-content-length": "9"}
    assert s3.put(key, body, content_encoding="aws-chunked", **told).status == 200
    assert s3.get(key).body == b"123456789"


def test_bodies_come_in_chunks_with_a_checksum_behind(s3, key):
    told = {
        "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "x-amz-decoded-content-length": "9",
        "x-amz-trailer": "x-amz-checksum-crc32",
    }
    crc = base64.b64encode(zlib.crc32(b"123456789").to_bytes(4, "big"))
    body = streamed(b"12345", b"6789") + b"x-amz-checksum-crc32:" + crc + b"\r\n\r\n"
    assert s3.put(key, body, content_encoding="aws-chunked", **told).status == 200
    assert s3.get(key).body == b"123456789"


def test_parts_of_a_cut_stream_of_chunks_are_refused(s3, key):
    told = {"x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "x-amz-decoded-content-length": "9"}
    assert s3.put(key, b"5\r\n12345\r\n", **told).code == "IncompleteBody"
    assert s3.put(key, streamed(b"12345") + b"\r\n", **told).code == "IncompleteBody"
    crc = base64.b64encode(zlib.crc32(b"other").to_bytes(4, "big"))
    body = streamed(b"123456789") + b"x-amz-checksum-crc32:" + crc + b"\r\n\r\n"
    assert s3.put(key, body, **told).code == "BadDigest"
    assert s3.get(key).status == 404


def test_a_body_that_is_cut_short_is_never_seen(s3, server, key):
    connection = http.client.HTTPConnection("127.0.0.1", int(s3.url.rpartition(":")[2]), timeout=30)
    connection.putrequest("PUT", key)
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"x" * 500)
    connection.sock.shutdown(1)
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()
    assert s3.get(key).status == 404
    assert [request.kind for request in server.requests] == ["get"]


# --- many ------------------------------------------------------------------------------------------------------------


def test_keys_are_listed_in_the_order_of_their_bytes(s3, key):
    names = ["a", "a/b", "a0", "B", "z", "ä", "é/1", "ﬀ", "\U0001f600"]
    for name in names:
        s3.put(f"{key}/{urllib.parse.quote(name)}")
    prefix = f"{key.removeprefix('/bucket/')}/"
    found = [each.removeprefix(prefix) for each in listed(s3, prefix=prefix).texts("Contents", "Key")]
    assert found == sorted(names, key=str.encode)


def test_lists_come_in_pages(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"
    for number in range(7):
        s3.put(f"/bucket/{prefix}{number}")
    found, pages, token = [], 0, {}
    while True:
        answer = listed(s3, prefix=prefix, max_keys="3", **token)
        found += answer.texts("Contents", "Key")
        assert answer.texts("KeyCount") == [str(len(answer.texts("Contents")))]
        pages += 1
        if answer.texts("IsTruncated") == ["false"]:
            break
        token = {"continuation_token": answer.texts("NextContinuationToken")[0]}
    assert (found, pages) == ([f"{prefix}{number}" for number in range(7)], 3)


def test_a_delimiter_folds_keys_into_prefixes(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"
    for name in ("1", "2/a", "2/b", "3/a/b", "4", "5/"):
        s3.put(f"/bucket/{prefix}{name}")
    answer = listed(s3, prefix=prefix, delimiter="/")
    assert answer.texts("Contents", "Key") == [f"{prefix}1", f"{prefix}4"]
    assert answer.texts("CommonPrefixes", "Prefix") == [f"{prefix}2/", f"{prefix}3/", f"{prefix}5/"]


def test_a_list_can_start_behind_a_key(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"
    for name in "abc":
        s3.put(f"/bucket/{prefix}{name}")
    assert listed(s3, prefix=prefix, start_after=f"{prefix}a").texts("Contents", "Key") == [f"{prefix}b", f"{prefix}c"]
    assert listed(s3, prefix=prefix, start_after=f"{prefix}aa").texts("Contents", "Key") == [f"{prefix}b", f"{prefix}c"]


def test_lists_quote_what_they_are_asked_to_quote(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"
    s3.put(f"/bucket/{prefix}{urllib.parse.quote('a b&ä')}")
    (found,) = listed(s3, prefix=prefix, encoding_type="url").texts("Contents", "Key")
    assert urllib.parse.unquote_plus(found) == f"{prefix}a b&ä"
    assert found.isascii()


def test_what_was_written_is_listed_at_once(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"

    def write(who):
        seen = []
        for number in range(4):
            s3.put(f"/bucket/{prefix}{who}-{number}")
            seen.append(f"{prefix}{who}-{number}" in listed(s3, prefix=prefix).texts("Contents", "Key"))
        return seen

    assert at_once(4, write) == [[True] * 4] * 4


def deletion(*keys, quiet=False):
    objects = "".join(f"<Object><Key>{each}</Key></Object>" for each in keys)
    body = f"<Delete>{objects}<Quiet>{str(quiet).lower()}</Quiet></Delete>".encode()
    return body, {"Content-MD5": base64.b64encode(md5(body).digest()).decode()}


def test_many_are_deleted_at_once(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"
    for name in "abc":
        s3.put(f"/bucket/{prefix}{name}")
    body, told = deletion(f"{prefix}a", f"{prefix}none")
    assert sorted(s3.post("/bucket?delete", body, **told).texts("Deleted", "Key")) == [f"{prefix}a", f"{prefix}none"]
    assert listed(s3, prefix=prefix).texts("Contents", "Key") == [f"{prefix}b", f"{prefix}c"]


def test_quiet_deletions_are_told_only_where_they_fail(s3, key):
    s3.put(key)
    body, told = deletion(key.removeprefix("/bucket/"), quiet=True)
    assert s3.post("/bucket?delete", body, **told).texts("Deleted") == []
    assert s3.get(key).status == 404


def test_a_list_of_deletions_without_a_checksum_is_refused(s3, key):
    s3.put(key)
    assert s3.post("/bucket?delete", deletion(key.removeprefix("/bucket/"))[0]).code == "InvalidRequest"
    assert s3.get(key).status == 200


def test_what_is_not_known_is_not_passed_over(s3, key):
    asked = [("GET", "/bucket"), ("PUT", "/bucket?acl"), ("POST", key), ("PATCH", key), ("GET", "/bucket?acl")]
    assert [s3.ask(*each).status for each in asked] == [501] * 5


# --- uploads ---------------------------------------------------------------------------------------------------------

FIVE = 5 << 20


def test_parts_become_one_object_when_they_are_completed(s3, key):
    upload = begun(s3, key)
    parts = [b"a" * FIVE, b"b"]
    etags = [s3.put(f"{key}?partNumber={n}&uploadId={upload}", part).etag for n, part in enumerate(parts, 1)]
    assert s3.get(key).status == 404
    answer = s3.post(f"{key}?uploadId={upload}", completion(*etags))
    digest = md5(b"".join(md5(part).digest() for part in parts)).hexdigest()
    assert answer.texts("ETag") == [f'"{digest}-2"']
    assert s3.get(key).body == b"".join(parts)


def test_a_part_that_comes_again_replaces_the_former(s3, key):
    upload = begun(s3, key)
    s3.put(f"{key}?partNumber=1&uploadId={upload}", b"former")
    etag = s3.put(f"{key}?partNumber=1&uploadId={upload}", b"latter").etag
    assert s3.post(f"{key}?uploadId={upload}", completion(etag)).status == 200
    assert s3.get(key).body == b"latter"


def test_parts_that_do_not_fit_are_refused(s3, key):
    upload = begun(s3, key)
    small, last = (s3.put(f"{key}?partNumber={n}&uploadId={upload}", b"x").etag for n in (1, 2))
    wanted = [completion(small, last), completion(small, '"0123"')]
    answers = [s3.post(f"{key}?uploadId={upload}", body) for body in wanted]
    assert [answer.code for answer in answers] == ["EntityTooSmall", "InvalidPart"]
    assert [answer.status for answer in answers] == [400] * 2
    assert s3.get(key).status == 404


def test_parts_in_another_order_are_refused(s3, key):
    upload = begun(s3, key)
    etags = [s3.put(f"{key}?partNumber={n}&uploadId={upload}", b"x" * FIVE).etag for n in (2, 1)]
    body = completion(*etags).replace(b">1<", b">9<").replace(b">2<", b">1<").replace(b">9<", b">2<")
    answer = s3.post(f"{key}?uploadId={upload}", body)
    assert (answer.status, answer.code) == (400, "InvalidPartOrder")
    assert s3.get(key).status == 404


def test_completing_again_finds_no_upload(s3, key):
    upload = begun(s3, key)
    body = completion(s3.put(f"{key}?partNumber=1&uploadId={upload}", b"x").etag)
    assert s3.post(f"{key}?uploadId={upload}", body).status == 200
    answer = s3.post(f"{key}?uploadId={upload}", body)
    assert (answer.status, answer.code) == (404, "NoSuchUpload")


def test_an_aborted_upload_leaves_nothing(s3, key):
    upload = begun(s3, key)
    body = completion(s3.put(f"{key}?partNumber=1&uploadId={upload}", b"x").etag)
    assert s3.delete(f"{key}?uploadId={upload}").status == 204
    assert s3.post(f"{key}?uploadId={upload}", body).code == "NoSuchUpload"
    assert s3.put(f"{key}?partNumber=2&uploadId={upload}", b"x").code == "NoSuchUpload"
    assert s3.get(key).status == 404


def test_unfinished_uploads_are_listed_by_prefix(s3, key):
    prefix = f"{key.removeprefix('/bucket/')}/"
    uploads = {name: begun(s3, f"/bucket/{prefix}{name}") for name in "ab"}
    answer = s3.get(f"/bucket?uploads&prefix={prefix}")
    found = zip(answer.texts("Upload", "Key"), answer.texts("Upload", "UploadId"), strict=True)
    assert dict(found) == {f"{prefix}{name}": upload for name, upload in uploads.items()}
    s3.delete(f"/bucket/{prefix}a?uploadId={uploads['a']}")
    assert s3.get(f"/bucket?uploads&prefix={prefix}").texts("Upload", "Key") == [f"{prefix}b"]
    assert s3.get(f"/bucket?uploads&prefix={prefix}b").texts("Upload", "Key") == [f"{prefix}b"]
    assert s3.get(f"/bucket?uploads&prefix={prefix}c").texts("Upload", "Key") == []


def test_every_list_of_uploads_is_paged(s3, key):
    begun_ones = sorted((f"{key}/{name}".removeprefix("/bucket/"), begun(s3, f"{key}/{name}")) for name in "aabc")
    found, marks = [], ""
    for _ in begun_ones:
        answer = s3.get(f"/bucket?uploads&max-uploads=1{marks}")
        found += zip(answer.texts("Upload", "Key"), answer.texts("Upload", "UploadId"), strict=True)
        marks = f"&key-marker={found[-1][0]}&upload-id-marker={found[-1][1]}"
    assert (found, answer.texts("IsTruncated")) == (begun_ones, ["false"])


def test_the_parts_of_an_upload_are_listed(s3, key):
    upload = begun(s3, key)
    etags = [s3.put(f"{key}?partNumber={number}&uploadId={upload}", b"%d" % number).etag for number in (1, 2, 7)]
    answer = s3.get(f"{key}?uploadId={upload}")
    assert answer.texts("Part", "PartNumber") == ["1", "2", "7"]
    assert answer.texts("Part", "ETag") == etags
    answer = s3.get(f"{key}?uploadId={upload}&part-number-marker=1&max-parts=1")
    assert answer.texts("Part", "PartNumber") == ["2"]
    assert answer.texts("IsTruncated") == ["true"]
