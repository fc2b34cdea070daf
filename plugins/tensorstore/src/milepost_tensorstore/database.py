"""Where an OCDBT database keeps the value of each key.

The rule: TensorStore understands the files, the storage reads them. All that is taken from the storage are the
manifest, the nodes of the tree and later the values that are wanted, each by its byte range, so that a database on any
storage is read without copying it, and thousands of keys cost one request for each node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from milepost.errors import DamagedError, MissingDataError, NotFoundError

from milepost_tensorstore import names
from milepost_tensorstore.failures import explained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.protocols import Storage

__all__ = ["MANIFEST", "Range", "entries"]

MANIFEST = "manifest.ocdbt"

_LARGEST = 256 << 20
_DEEPEST = 32


class Range(NamedTuple):
    """Where a value is: a file, relative to where the database is, and its bytes; `length` None is all of it."""

    file: str
    start: int
    length: int | None


def entries(storage: Storage, prefix: str) -> dict[str, bytes | Range]:
    """Return all keys of the newest version of a database below a prefix, each with its value or where that is.

    Raises `MissingDataError` when its manifest or a node is missing, and `DamagedError` for what makes no sense.
    """
    import tensorstore as ts

    reader = _Reader(storage, prefix, ts.KvStore.open("memory://", context=ts.Context()).result())
    found: dict[str, bytes | Range] = {}
    with explained(f"read database {storage.url}/{prefix}{MANIFEST}", reading=True):
        root, height = reader.root()
        if root is not None:
            for key, value in reader.leaves(root, height, b""):
                found[key.decode("utf-8", "surrogateescape")] = value
    return found


class _Reader:
    """Reads files of a database and has TensorStore understand them, in memory."""

    def __init__(self, storage: Storage, prefix: str, memory: Any) -> None:
        self._storage, self._prefix, self._memory = storage, prefix, memory

    def root(self) -> tuple[str | None, int]:
        """Return where the root of the tree is, if there is any key, and how high the tree is."""
        self._memory[MANIFEST] = self._fetch(MANIFEST, 0, _LARGEST)
        manifest = self._understood(None)
        versions = manifest.get("versions")
        if not versions:
            raise DamagedError(f"cannot read database {self._name(MANIFEST)!r}: it has no version")
        newest = max(versions, key=lambda version: version["generation_number"])
        return newest["root"].get("location"), newest["root_height"]

    def leaves(self, location: str, height: int, prefix: bytes) -> Iterator[tuple[bytes, bytes | Range]]:
        """Yield the keys below a node, with their values."""
        node = self._node(location)
        if node["height"] != height or height > _DEEPEST:
            raise DamagedError(f"cannot read database {self._name(MANIFEST)!r}: its tree makes no sense")
        for entry in node["entries"]:
            if height:
                yield from self.leaves(entry["location"], height - 1, prefix + entry["subtree_common_prefix"])
            elif "inline_value" in entry:
                yield prefix + entry["key"], entry["inline_value"]
            else:
                _, file, start, length = _parsed(entry["indirect_value"])
                yield prefix + entry["key"], Range(file, start, length)

    def _node(self, location: str) -> Any:
        base, file, start, length = _parsed(location)
        if length > _LARGEST:
            raise DamagedError(f"cannot read database {self._name(MANIFEST)!r}: it has a node of {length} bytes")
        # Under another name, at its beginning, a node costs no more than its bytes; the base has to stay, because all
        # that the node refers to is relative to it.
        self._memory[f"{unquote(base)}node"] = self._fetch(file, start, start + length)
        return self._understood(f"btreenode:{base}:node:0:{length}")

    def _understood(self, location: str | None) -> Any:
        import tensorstore as ts

        return ts.ocdbt.dump(self._memory, location, context=ts.Context()).result()

    def _fetch(self, file: str, start: int, stop: int) -> bytes:
        try:
            return bytes(self._storage.read(self._prefix + file, start, stop))
        except NotFoundError as error:
            raise MissingDataError(f"cannot read the arrays: file {self._name(file)!r} is missing") from error

    def _name(self, file: str) -> str:
        return f"{self._storage.url}/{self._prefix}{file}"


def _parsed(location: str) -> tuple[str, str, int, int]:
    """Return base, file, start and length of "kind:base:path:start:length".

    >>> _parsed("value:ocdbt.process_0/:d/1f:16:4")
    ('ocdbt.process_0/', 'ocdbt.process_0/d/1f', 16, 4)
    """
    _, base, path, start, length = location.split(":")
    return base, names.safe(unquote(base + path)), int(start), int(length)
