"""Decide how the store is spoken to as S3: REST with the bucket in the path, and errors in XML.

The rule: what S3 refuses is refused here with S3's status and code; what this does not know is refused as not
implemented, never passed over.
"""

from __future__ import annotations

import base64
import email.utils
import time
import urllib.parse
from typing import TYPE_CHECKING

from milepost.testing.objects.s3_bodies import children, data, element, leaf, parsed, text, xml
from milepost.testing.objects.values import Condition, RefusedError, Traits, Window
from milepost.testing.objects.wire import Face, Reply, Target, part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from milepost.testing.objects.store import Store
    from milepost.testing.objects.values import Stored, Upload
    from milepost.testing.objects.wire import Call

__all__ = ["FACE"]

_MOST = 1000  # keys for one request
_XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_META = "x-amz-meta-"
_BUCKET_ASKED = {"HEAD": "bucket", "GET": "list", "POST": "unknown", "PUT": "bucket", "DELETE": "bucket"}
_KNOWN_OF_LISTS = frozenset(
    {
        "list-type",
        "prefix",
        "delimiter",
        "start-after",
        "continuation-token",
        "max-keys",
        "encoding-type",
        "fetch-owner",
    }
)


def _aim(_store: Store, call: Call) -> Target:
    bucket, _, key = urllib.parse.unquote(call.path).removeprefix("/").partition("/")
    kind = _kind_of_object(call) if key else _kind_of_bucket(call, bucket)
    return Target(kind, bucket, key, mutating=call.method not in {"GET", "HEAD"})


def _kind_of_bucket(call: Call, bucket: str) -> str:
    if not bucket:
        return "bucket"
    if call.method == "POST" and "delete" in call.query:
        return "delete_many"
    if call.method == "GET" and "uploads" in call.query:
        return "list_uploads"
    if call.method == "GET" and call.query.keys() - _KNOWN_OF_LISTS:
        return "bucket"
    return _BUCKET_ASKED.get(call.method, "unknown")


def _kind_of_object(call: Call) -> str:
    within = "uploadId" in call.query
    if call.method == "PUT" and "x-amz-copy-source" in call.headers:
        return "copy"
    if call.method == "POST":
        return "create_upload" if "uploads" in call.query else "complete_upload" if within else "unknown"
    plain = {"PUT": "put", "GET": "get", "HEAD": "head", "DELETE": "delete"}
    of_upload = {"PUT": "upload_part", "GET": "list_parts", "DELETE": "abort_upload"}
    return (of_upload if within else plain).get(call.method, "unknown")


def _answer(store: Store, call: Call, target: Target) -> Reply:
    store.check(target.bucket)
    answer = _ANSWERS.get(target.kind)
    if answer is None:
        raise RefusedError(501, "NotImplemented", f"{call.method} {call.path} is not part of this server")
    return answer(store, call, target)


def _refuse(refused: RefusedError, target: Target) -> Reply:
    body = element(
        "Error",
        leaf("Code", refused.code),
        leaf("Message", refused.message),
        leaf("Condition", refused.condition) if refused.condition else "",
        leaf("Key", target.key) if target.key else "",
        leaf("BucketName", target.bucket),
        leaf("RequestId", "0"),
    )
    if refused.status == 304:  # noqa: PLR2004 - the status that has no body
        return Reply(304)
    return xml(body, refused.status)


# --- objects ---------------------------------------------------------------------------------------------------------


def _put(store: Store, call: Call, target: Target) -> Reply:
    stored = store.put(target.bucket, target.key, data(call), condition=_condition(call), traits=_traits(call))
    return Reply(200, {"ETag": f'"{stored.etag}"'})


def _get(store: Store, call: Call, target: Target) -> Reply:
    stored = store.find(target.bucket, target.key)
    _judge_reading(call, stored)
    status, headers, body = part_of(call, stored.data)
    return Reply(status, {**_described(stored), **headers}, body)


def _head(store: Store, call: Call, target: Target) -> Reply:
    whole = _get(store, call, target)
    return Reply(whole.status, {**whole.headers, "Content-Length": str(len(whole.body))})


def _delete(store: Store, call: Call, target: Target) -> Reply:
    store.delete(target.bucket, target.key, Condition(etag=_tag(call.headers.get("if-match"))))
    return Reply(204)


def _copy(store: Store, call: Call, target: Target) -> Reply:
    bucket, _, key = urllib.parse.unquote(call.headers["x-amz-copy-source"]).removeprefix("/").partition("/")
    source = store.find(bucket, key)
    if "uploadId" in call.query:
        raise RefusedError(501, "NotImplemented", "parts cannot be copied on this server")
    stored = store.put(target.bucket, target.key, source.data, condition=_condition(call), traits=source.traits)
    return xml(element("CopyObjectResult", leaf("ETag", f'"{stored.etag}"'), _modified(stored.written)))


def _delete_many(store: Store, call: Call, target: Target) -> Reply:
    if not any(name == "content-md5" or name.startswith("x-amz-checksum-") for name in call.headers):
        raise RefusedError(400, "InvalidRequest", "a list of keys to delete must come with its checksum")
    root = parsed(data(call))
    wanted = children(root, "Object")
    if not 0 < len(wanted) <= _MOST:
        raise RefusedError(400, "MalformedXML", f"{len(wanted)} keys to delete: between 1 and {_MOST} are taken")
    told = []
    for each in wanted:
        key = text(each, "Key")
        try:
            call.each(Target("delete", target.bucket, key))
            store.delete(target.bucket, key, Condition(etag=_tag(text(each, "ETag"))))
        except RefusedError as refused:
            code, message = leaf("Code", refused.code), leaf("Message", refused.message)
            told.append(element("Error", leaf("Key", key), code, message))
        else:
            told.append("" if text(root, "Quiet") == "true" else element("Deleted", leaf("Key", key)))
    return xml(element("DeleteResult", *told))


def _list(store: Store, call: Call, target: Target) -> Reply:
    if call.query.get("list-type") != "2":
        raise RefusedError(501, "NotImplemented", "objects are listed by list-type=2 only on this server")
    query = call.query
    limit = min(int(query.get("max-keys") or _MOST), _MOST)
    after = query.get("start-after", "")
    start = _untokened(query["continuation-token"]) if "continuation-token" in query else after and f"{after}\0"
    window = Window(query.get("prefix", ""), query.get("delimiter", ""), start, limit=limit)
    page = store.page(target.bucket, window)
    shown = _shown(query)
    more = limit and page.more
    body = element(
        "ListBucketResult",
        leaf("Name", target.bucket),
        leaf("Prefix", shown(window.prefix)),
        leaf("Delimiter", shown(window.delimiter)) if window.delimiter else "",
        leaf("StartAfter", shown(after)) if after else "",
        leaf("EncodingType", "url") if "encoding-type" in query else "",
        leaf("KeyCount", str(len(page.objects) + len(page.prefixes))),
        leaf("MaxKeys", str(limit)),
        leaf("IsTruncated", "true" if more else "false"),
        leaf("NextContinuationToken", _tokened(more)) if more else "",
        *(_listed(shown(key), stored) for key, stored in page.objects),
        *(element("CommonPrefixes", leaf("Prefix", shown(prefix))) for prefix in page.prefixes),
    )
    return xml(body)


def _listed(key: str, stored: Stored) -> str:
    return element(
        "Contents",
        leaf("Key", key),
        _modified(stored.written),
        leaf("ETag", f'"{stored.etag}"'),
        leaf("Size", str(len(stored.data))),
        leaf("StorageClass", "STANDARD"),
    )


def _bucket(_store: Store, call: Call, _target: Target) -> Reply:
    if call.method == "HEAD":
        return Reply(200)
    if "location" in call.query:
        return xml(f"<LocationConstraint {_XMLNS}/>")
    raise RefusedError(501, "NotImplemented", "this server tells of a bucket that it exists, and nothing more")


# --- uploads ---------------------------------------------------------------------------------------------------------


def _create_upload(store: Store, call: Call, target: Target) -> Reply:
    upload = store.begin(target.bucket, target.key, traits=_traits(call))
    names = leaf("Bucket", target.bucket), leaf("Key", target.key)
    return xml(element("InitiateMultipartUploadResult", *names, leaf("UploadId", upload.id)))


def _upload(store: Store, call: Call, target: Target) -> Upload:
    return store.upload(call.query["uploadId"], target.bucket, target.key)


def _upload_part(store: Store, call: Call, target: Target) -> Reply:
    number = int(call.query.get("partNumber") or 0)
    if not 1 <= number <= 10_000:  # noqa: PLR2004 - S3's limits
        raise RefusedError(400, "InvalidArgument", f"a part cannot have the number {number}")
    part = store.add_part(_upload(store, call, target), number, data(call))
    return Reply(200, {"ETag": f'"{part.etag}"'})


def _complete_upload(store: Store, call: Call, target: Target) -> Reply:
    upload = _upload(store, call, target)
    named = children(parsed(data(call)), "Part")
    parts = [(int(text(each, "PartNumber")), text(each, "ETag").strip('"')) for each in named]
    stored = store.complete(upload, parts, _condition(call))
    names = leaf("Bucket", target.bucket), leaf("Key", target.key)
    return xml(element("CompleteMultipartUploadResult", *names, leaf("ETag", f'"{stored.etag}"')))


def _abort_upload(store: Store, call: Call, target: Target) -> Reply:
    store.abort(_upload(store, call, target))
    return Reply(204)


def _list_parts(store: Store, call: Call, target: Target) -> Reply:
    upload = _upload(store, call, target)
    limit = min(int(call.query.get("max-parts") or _MOST), _MOST)
    after = int(call.query.get("part-number-marker") or 0)
    numbers = [number for number in sorted(upload.parts) if number > after]
    body = element(
        "ListPartsResult",
        leaf("Bucket", target.bucket),
        leaf("Key", target.key),
        leaf("UploadId", upload.id),
        leaf("IsTruncated", "true" if len(numbers) > limit else "false"),
        leaf("NextPartNumberMarker", str(numbers[:limit][-1])) if numbers else "",
        *(
            element(
                "Part",
                leaf("PartNumber", str(number)),
                _modified(upload.parts[number].written),
                leaf("ETag", f'"{upload.parts[number].etag}"'),
                leaf("Size", str(len(upload.parts[number].data))),
            )
            for number in numbers[:limit]
        ),
    )
    return xml(body)


def _list_uploads(store: Store, call: Call, target: Target) -> Reply:
    if call.query.get("delimiter"):
        raise RefusedError(501, "NotImplemented", "uploads are listed without a delimiter only on this server")
    prefix, limit = call.query.get("prefix", ""), min(int(call.query.get("max-uploads") or _MOST), _MOST)
    after = call.query.get("key-marker", ""), call.query.get("upload-id-marker", "\U0010ffff")
    found = [
        upload
        for upload in sorted(store.uploads(target.bucket), key=lambda each: (each.key, each.id))
        if not upload.resumable and upload.key.startswith(prefix) and (upload.key, upload.id) > after
    ]
    shown, page = _shown(call.query), found[:limit]
    body = element(
        "ListMultipartUploadsResult",
        leaf("Bucket", target.bucket),
        leaf("Prefix", shown(prefix)),
        leaf("EncodingType", "url") if "encoding-type" in call.query else "",
        leaf("IsTruncated", "true" if len(found) > limit else "false"),
        leaf("NextKeyMarker", shown(page[-1].key)) if page else "",
        leaf("NextUploadIdMarker", page[-1].id) if page else "",
        *(
            element(
                "Upload",
                leaf("Key", shown(upload.key)),
                leaf("UploadId", upload.id),
                leaf("Initiated", _iso(upload.started)),
            )
            for upload in page
        ),
    )
    return xml(body)


_ANSWERS: Mapping[str, Callable[[Store, Call, Target], Reply]] = {
    "abort_upload": _abort_upload,
    "bucket": _bucket,
    "complete_upload": _complete_upload,
    "copy": _copy,
    "create_upload": _create_upload,
    "delete": _delete,
    "delete_many": _delete_many,
    "get": _get,
    "head": _head,
    "list": _list,
    "list_parts": _list_parts,
    "list_uploads": _list_uploads,
    "put": _put,
    "upload_part": _upload_part,
}

FACE = Face(_aim, _answer, _refuse)
"""S3."""


# --- requests --------------------------------------------------------------------------------------------------------


def _tag(text: str | None) -> str | None:
    return text.strip().strip('"') if text else None


def _condition(call: Call) -> Condition:
    absent = call.headers.get("if-none-match")
    if absent not in {None, "*"}:
        raise RefusedError(501, "NotImplemented", f"writing unless the ETag is {absent} is not part of S3")
    return Condition(absent=absent is not None, etag=_tag(call.headers.get("if-match")))


def _judge_reading(call: Call, stored: Stored) -> None:
    match, none_match = _tag(call.headers.get("if-match")), _tag(call.headers.get("if-none-match"))
    if match not in {None, "*", stored.etag}:
        raise RefusedError(412, "PreconditionFailed", "the ETag is another", "If-Match")
    if none_match in {"*", stored.etag}:
        raise RefusedError(304, "NotModified", "the ETag is that one", "If-None-Match")


def _traits(call: Call) -> Traits:
    metadata = {name.removeprefix(_META): value for name, value in call.headers.items() if name.startswith(_META)}
    return Traits(call.headers.get("content-type", "application/octet-stream"), metadata)


def _untokened(token: str) -> str:
    return base64.urlsafe_b64decode(token).decode("utf-8", "surrogatepass")


# --- replies ---------------------------------------------------------------------------------------------------------


def _tokened(start: str) -> str:
    return base64.urlsafe_b64encode(start.encode("utf-8", "surrogatepass")).decode()


def _shown(query: Mapping[str, str]) -> Callable[[str], str]:
    return urllib.parse.quote if query.get("encoding-type") == "url" else str


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def _modified(seconds: float) -> str:
    return leaf("LastModified", _iso(seconds))


def _described(stored: Stored) -> Mapping[str, str]:
    return {
        "ETag": f'"{stored.etag}"',
        "Last-Modified": email.utils.formatdate(stored.written, usegmt=True),
        "Content-Type": stored.traits.content_type,
        "Accept-Ranges": "bytes",
        **{_META + name: value for name, value in stored.traits.metadata.items()},
    }
