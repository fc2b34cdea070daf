"""What the user of a sequence of steps notes for all of them, in one small file below the root.

The rule: it is written once. Whoever comes later, or at the same time, finds what the first one wrote, and changes
nothing. The file is where the reference has it, `metadata/_ROOT_METADATA`, and says the same.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from milepost import urls
from milepost.errors import AlreadyExistsError, RequestError
from milepost.metadata.step import RootMetadata
from milepost.metadata.store import read_document
from milepost.path._finding import open_root
from milepost.protocols import CreatesOnly

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_root_metadata", "write_root_metadata"]

_PLACES = ("metadata/_ROOT_METADATA", "metadata/metadata")
"""Where the file is, and where older releases of the reference have it, which write the custom metadata alone."""


class _JsonError(RequestError, ValueError, TypeError):
    """Metadata that JSON cannot hold."""


def write_root_metadata(root: str, custom_metadata: Mapping[str, Any]) -> bool:
    """Note what is known of all steps below a root, unless something is noted already; say whether it was written.

    Raises an error that is both a `ValueError` and a `TypeError` for what JSON cannot hold.
    """
    try:
        body = json.dumps({"internal_metadata": {}, "custom_metadata": dict(custom_metadata)}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise _JsonError(f"cannot save metadata {custom_metadata!r:.200} of {root!r}: {error}") from error
    if read_root_metadata(root) is not None:
        return False
    storage = open_root(root).storage
    create = storage.create if isinstance(storage, CreatesOnly) else storage.write
    try:
        create(_PLACES[0], [body])
    except AlreadyExistsError:
        return False  # another process was faster
    return True


def read_root_metadata(root: str) -> RootMetadata | None:
    """Return what was noted for all steps below a root; None if nothing was, `DamagedError` if it cannot be read."""
    found = read_document(urls.join(root, _PLACES[0]))
    if found is not None:
        custom = found.get("custom_metadata")
        if custom is None and found.keys() == {"custom"}:
            custom = found["custom"]  # the name it had from 0.10 to 0.11.2 of the reference
        return RootMetadata(found.get("internal_metadata") or {}, custom or {})
    found = read_document(urls.join(root, _PLACES[1]))
    return None if found is None else RootMetadata(custom_metadata=found)
