"""How many objects are removed by one request.

Decides what a partial success means. The rule: a request that removed some of its objects is repeated for all, since
what is gone is no error; a store that does not know the request is asked once for each object.
"""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from milepost.errors import StorageDeniedError, StorageError, noted

from milepost_s3._client import AgainError, Request, Unmet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost_s3._client import Client, Reply

__all__ = ["delete_all"]

_UNKNOWN: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED})
_DENIED: Final = frozenset({"AccessDenied", "AllAccessDisabled"})


def delete_all(client: Client, root: str, keys: Sequence[str]) -> None:
    """Remove a thousand objects at most; what is gone already is no error."""
    objects = [{"Key": key} for key in keys]
    what = f"delete {len(keys)} objects from {f'{root}/{keys[0]}'!r} on"
    words = {"Delete": {"Objects": objects, "Quiet": True}}
    try:
        client.ask(Request(what, "delete_objects", words, _UNKNOWN), functools.partial(_checked, root))
    except Unmet:
        gone = {HTTPStatus.NOT_FOUND: None}
        requests = [Request(f"delete {f'{root}/{key}'!r}", "delete_object", {"Key": key}, answers=gone) for key in keys]
        client.ask_all([(each, None) for each in requests])


async def _checked(root: str, reply: Reply) -> None:
    errors: list[dict[str, Any]] = [each for each in reply.get("Errors", ()) if each.get("Code") != "NoSuchKey"]
    if not errors:
        return
    denied = [each for each in errors if each.get("Code") in _DENIED]
    first = (denied or errors)[0]
    name, reason = f"{root}/{first.get('Key')}", f"{first.get('Code')}: {first.get('Message')}"
    if denied:
        error = StorageDeniedError(f"cannot delete {name!r}: the store refused it ({reason})")
        raise noted(error, "this needs the permission s3:DeleteObject")
    if first.get("Code") in {"InternalError", "SlowDown", "ServiceUnavailable"}:
        raise AgainError(f"{len(errors)} objects are still there, such as {name!r} ({reason})")
    raise StorageError(f"cannot delete {name!r}: {reason}")
