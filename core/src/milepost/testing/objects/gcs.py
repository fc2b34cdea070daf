"""Decide how the store is spoken to as Google Cloud Storage: its JSON API, uploads in one request or resumable.

The rule: what the service refuses is refused here with the same status; what this does not know is refused as not
implemented, never passed over. Buckets called "b", "batch", "download", "storage" or "upload" cannot be had as S3.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

from milepost.testing.objects import digests
from milepost.testing.objects.gcs_bodies import acts, related
from milepost.testing.objects.values import ALWAYS, Condition, RefusedError, Traits, Window
from milepost.testing.objects.wire import Face, Reply, Target, head, part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from milepost.testing.objects.store import Store
    from milepost.testing.objects.values import Stored
    from milepost.testing.objects.wire import Call

__all__ = ["FACE", "speaks"]

_PATH = re.compile(r"(?:/(upload|download))?(?:/storage/v1)?/b(?:/([^/]+)(?:/(o)(?:/(.+))?|/[^/]+)?)?/?")
_BATCH = re.compile(r"/batch(/storage/v1)?/?")
_SPAN = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_GRAIN = 256 << 10  # bytes: only multiples are kept of what goes on
_MOST = 1000  # keys for one request
_MOST_ACTS = 100  # of one batch
_REASONS = {
    400: "invalid",
    403: "forbidden",
    404: "notFound",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    503: "backendError",
}


def speaks(path: str) -> bool:
    """Say whether a path belongs to this protocol."""
    return _PATH.fullmatch(path) is not None or _BATCH.fullmatch(path) is not None


def _aim(store: Store, call: Call) -> Target:
    match = _PATH.fullmatch(call.path)
    if match is None:
        return Target("delete_many", mutating=True)
    way, bucket, objects, name = (urllib.parse.unquote(part or "") for part in match.groups())
    if way == "upload":
        return _aim_upload(store, call, bucket)
    if not objects:
        return Target("bucket", bucket, mutating=call.method != "GET")
    key, _, verb = name.partition("/rewriteTo/") if "/rewriteTo/b/" in call.path else (name, "", "")
    if verb:
        bucket, _, key = verb.removeprefix("b/").partition("/o/")
        return Target("copy", bucket, key, mutating=True)
    kinds = {"GET": "get" if way == "download" or call.query.get("alt") == "media" else "head", "DELETE": "delete"}
    kind = kinds.get(call.method, "unknown") if name else "list" if call.method == "GET" else "unknown"
    return Target(kind, bucket, key, mutating=call.method != "GET")


def _aim_upload(store: Store, call: Call, bucket: str) -> Target:
    identity = call.query.get("upload_id")
    if identity is None:
        kind = {"resumable": "start_resumable", "media": "put", "multipart": "put"}.get(
            call.query.get("uploadType", "")
        )
        return Target(kind or "unknown", bucket, _name(call), mutating=True)
    try:
        upload = store.upload(identity)
    except RefusedError:
        key, size = call.query.get("name", ""), -1
    else:
        bucket, key, size = upload.bucket, upload.key, upload.size
    if call.method == "DELETE":
        return Target("abort_upload", bucket, key, mutating=True)
    match = _SPAN.fullmatch(call.headers.get("content-range", ""))
    asks = match is not None and match[1] is None and match[3] != str(size)
    return Target("resumable_status" if asks else "resumable_part", bucket, key, mutating=not asks)


def _name(call: Call) -> str:
    if "name" in call.query:
        return call.query["name"]
    try:
        described = call.body if call.query["uploadType"] == "resumable" else related(call)[0]
        return str(json.loads(described or b"{}").get("name", ""))
    except (ValueError, LookupError):
        return ""


def _answer(store: Store, call: Call, target: Target) -> Reply:
    if target.kind != "delete_many":
        store.check(target.bucket)
    answer = _ANSWERS.get(target.kind)
    if answer is None:
        raise RefusedError(501, "NotImplemented", f"{call.method} {call.path} is not part of this server")
    return answer(store, call, target)


def _refuse(refused: RefusedError, _target: Target) -> Reply:
    if refused.status == 304:  # noqa: PLR2004 - the status that has no body
        return Reply(304)
    reason = _REASONS.get(refused.status, refused.code)
    error = {"message": refused.message, "domain": "global", "reason": reason}
    return _json({"error": {"code": refused.status, "message": refused.message, "errors": [error]}}, refused.status)


# --- objects ---------------------------------------------------------------------------------------------------------


def _put(store: Store, call: Call, target: Target) -> Reply:
    described: dict[str, Any] = {}
    data, content_type = call.body, call.headers.get("content-type", "")
    if call.query["uploadType"] == "multipart":
        text, content_type, data = related(call)
        described = json.loads(text)
    traits = _traits(described, content_type)
    if name := digests.wrong(data, call.headers) or digests.wrong(data, traits.checksums):
        raise RefusedError(400, "BadDigest", f"{name} is not that of the {len(data)} bytes that came")
    stored = store.put(target.bucket, target.key, data, condition=_condition(call), traits=traits)
    return _json(_resource(target.bucket, target.key, stored))


def _found(store: Store, call: Call, target: Target) -> Stored:
    stored = store.find(target.bucket, target.key)
    if call.query.get("generation", str(stored.generation)) != str(stored.generation):
        raise RefusedError(404, "NoSuchKey", f"there is no generation {call.query['generation']} of {target.key!r}")
    if call.query.get("ifGenerationMatch", str(stored.generation)) != str(stored.generation):
        raise RefusedError(412, "PreconditionFailed", f"the generation of {target.key!r} is {stored.generation}")
    if call.query.get("ifGenerationNotMatch") == str(stored.generation):
        raise RefusedError(304, "NotModified", f"the generation of {target.key!r} is that one")
    return stored


def _get(store: Store, call: Call, target: Target) -> Reply:
    stored = _found(store, call, target)
    status, headers, body = part_of(call, stored.data)
    hashes = f"crc32c={stored.crc32c}" + (f",md5={_md5(stored)}" if _md5(stored) else "")
    described = {
        "Content-Type": stored.traits.content_type,
        "ETag": f'"{_etag(stored)}"',
        "X-Goog-Generation": str(stored.generation),
        "X-Goog-Metageneration": "1",
        "X-Goog-Hash": hashes,
        "X-Goog-Stored-Content-Length": str(len(stored.data)),
    }
    return Reply(status, {**described, **headers}, body)


def _head(store: Store, call: Call, target: Target) -> Reply:
    return _json(_resource(target.bucket, target.key, _found(store, call, target)))


def _delete(store: Store, call: Call, target: Target) -> Reply:
    condition = _condition(call)
    if "generation" in call.query:
        _found(store, dataclasses.replace(call, query={"generation": call.query["generation"]}), target)
        condition = Condition(generation=int(call.query["generation"]))
    if not store.delete(target.bucket, target.key, condition):
        raise RefusedError(404, "NoSuchKey", f"there is no object {target.key!r}")
    return Reply(204)


def _copy(store: Store, call: Call, target: Target) -> Reply:
    path = call.path.partition("/rewriteTo/")[0]
    origin = _aim(store, dataclasses.replace(call, path=path, method="GET"))
    source = store.find(origin.bucket, origin.key)
    stored = store.put(target.bucket, target.key, source.data, condition=_condition(call), traits=source.traits)
    size = str(len(stored.data))
    resource = _resource(target.bucket, target.key, stored)
    return _json({"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": resource})


def _list(store: Store, call: Call, target: Target) -> Reply:
    query = call.query
    start = query.get("startOffset", "")
    if "pageToken" in query:
        start = base64.urlsafe_b64decode(query["pageToken"]).decode("utf-8", "surrogatepass")
    limit = min(int(query.get("maxResults") or _MOST), _MOST)
    window = Window(query.get("prefix", ""), query.get("delimiter", ""), start, query.get("endOffset", ""), limit)
    page = store.page(target.bucket, window)
    told: dict[str, Any] = {"kind": "storage#objects"}
    if page.objects:
        told["items"] = [_resource(target.bucket, key, stored) for key, stored in page.objects]
    if page.prefixes:
        told["prefixes"] = page.prefixes
    if page.more is not None:
        told["nextPageToken"] = base64.urlsafe_b64encode(page.more.encode("utf-8", "surrogatepass")).decode()
    return _json(told)


def _bucket(_store: Store, call: Call, target: Target) -> Reply:
    match = _PATH.fullmatch(call.path)
    if call.method != "GET" or not match or not call.path.rstrip("/").endswith(match[2] or "/"):
        raise RefusedError(501, "NotImplemented", "this server tells of a bucket that it exists, and nothing more")
    return _json({"kind": "storage#bucket", "id": target.bucket, "name": target.bucket, "storageClass": "STANDARD"})


# --- uploads ---------------------------------------------------------------------------------------------------------


def _start_resumable(store: Store, call: Call, target: Target) -> Reply:
    described = json.loads(call.body or b"{}")
    traits = _traits(described, call.headers.get("x-upload-content-type", ""))
    upload = store.begin(target.bucket, target.key, _condition(call), traits, resumable=True)
    base = f"http://{call.headers.get('host', '')}/upload/storage/v1/b/{urllib.parse.quote(target.bucket)}/o"
    name = urllib.parse.quote(target.key, safe="")
    return Reply(200, {"Location": f"{base}?uploadType=resumable&name={name}&upload_id={upload.id}"})


def _resumable_status(store: Store, call: Call, target: Target) -> Reply:
    stored = store.finished(call.query["upload_id"])
    if stored is not None:
        return _json(_resource(target.bucket, target.key, stored))
    return _goes_on(store.upload(call.query["upload_id"]).size)


def _resumable_part(store: Store, call: Call, target: Target) -> Reply:
    stored = store.finished(call.query["upload_id"])
    if stored is not None:
        return _json(_resource(target.bucket, target.key, stored))
    upload = store.upload(call.query["upload_id"])
    start, stop, total = _span(call)
    data, last = call.body, stop == total
    if not last:
        data = data[: max(stop // _GRAIN * _GRAIN - start, 0)]
        if not data:
            raise RefusedError(
                400, "InvalidRequest", f"a part that is not the last one must have {_GRAIN} bytes at least"
            )
    size = store.append(upload, start, data)
    if not last:
        return _goes_on(size)
    return _json(_resource(target.bucket, target.key, store.finish(upload)))


def _span(call: Call) -> tuple[int, int, int]:
    told = call.headers.get("content-range")
    if told is None:
        return 0, len(call.body), len(call.body)
    match = _SPAN.fullmatch(told)
    if match is None:
        raise RefusedError(400, "InvalidRequest", f"the content range {told!r} cannot be read")
    total = -1 if match[3] == "*" else int(match[3])
    start, stop = (total, total) if match[1] is None else (int(match[1]), int(match[2]) + 1)
    if stop - start != len(call.body):
        raise RefusedError(400, "InvalidRequest", f"{len(call.body)} bytes came for the content range {told!r}")
    return start, stop, total


def _goes_on(size: int) -> Reply:
    return Reply(308, {"Range": f"bytes=0-{size - 1}"} if size else {})


def _abort_upload(store: Store, call: Call, _target: Target) -> Reply:
    store.abort(store.upload(call.query["upload_id"]))
    return Reply(499)


# --- batches ---------------------------------------------------------------------------------------------------------


def _delete_many(store: Store, call: Call, _target: Target) -> Reply:
    wanted = list(acts(call))
    if len(wanted) > _MOST_ACTS:
        raise RefusedError(400, "InvalidRequest", f"{len(wanted)} acts in a batch: at most {_MOST_ACTS} are taken")
    boundary = "batch_of_replies"
    told = []
    for identity, act in wanted:
        reply = _one(store, act)
        inner = head(reply, store.now()) + bytes(reply.body)
        top = f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{identity}>\r\n\r\n"
        told.append(top.encode() + inner + b"\r\n")
    body = b"".join(told) + f"--{boundary}--\r\n".encode()
    return Reply(200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, body)


def _one(store: Store, act: Call) -> Reply:
    target = _aim(store, act)
    if target.kind != "delete":
        refused = RefusedError(501, "NotImplemented", f"only deletions are done in batches: {act.method} {act.path}")
        return _refuse(refused, target)
    try:
        act.each(target)
        return _answer(store, act, target)
    except RefusedError as refused:
        return _refuse(refused, target)


_ANSWERS: Mapping[str, Callable[[Store, Call, Target], Reply]] = {
    "abort_upload": _abort_upload,
    "bucket": _bucket,
    "copy": _copy,
    "delete": _delete,
    "delete_many": _delete_many,
    "get": _get,
    "head": _head,
    "list": _list,
    "put": _put,
    "resumable_part": _resumable_part,
    "resumable_status": _resumable_status,
    "start_resumable": _start_resumable,
}

FACE = Face(_aim, _answer, _refuse)
"""Google Cloud Storage."""


# --- values ----------------------------------------------------------------------------------------------------------


def _condition(call: Call) -> Condition:
    if "ifGenerationMatch" not in call.query:
        return ALWAYS
    generation = int(call.query["ifGenerationMatch"])
    return Condition(generation=generation) if generation else Condition(absent=True)


def _traits(described: Mapping[str, Any], content_type: str) -> Traits:
    content_type = described.get("contentType") or content_type or "application/octet-stream"
    told = {"crc32c": described.get("crc32c"), "md5": described.get("md5Hash")}
    hashes = ",".join(f"{name}={value}" for name, value in told.items() if value)
    return Traits(content_type, described.get("metadata") or {}, {"x-goog-hash": hashes})


def _md5(stored: Stored) -> str:
    return "" if "-" in stored.etag else base64.b64encode(bytes.fromhex(stored.etag)).decode()


def _etag(stored: Stored) -> str:
    return base64.b64encode(stored.generation.to_bytes(8, "big")).decode()


def _resource(bucket: str, key: str, stored: Stored) -> dict[str, Any]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.written)) + f".{int(stored.written % 1 * 1000):03d}Z"
    resource = {
        "kind": "storage#object",
        "id": f"{bucket}/{key}/{stored.generation}",
        "name": key,
        "bucket": bucket,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": stored.traits.content_type,
        "size": str(len(stored.data)),
        "crc32c": stored.crc32c,
        "etag": _etag(stored),
        "storageClass": "STANDARD",
        "timeCreated": moment,
        "updated": moment,
    }
    if _md5(stored):
        resource["md5Hash"] = _md5(stored)
    return {**resource, "metadata": dict(stored.traits.metadata)} if stored.traits.metadata else resource


def _json(value: object, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode())
