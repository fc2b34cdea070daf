"""What zarr-python sees of a storage: a group that is being written, and nothing that was there before.

The rule: chunks go to the storage as they come; documents stay here until the group is described in full, so that each
is written once, and nothing is asked of the storage that zarr-python itself has said. Importing this module imports
zarr-python, so that only what is about to write does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zarr.abc.store import Store

from milepost_zarr.naming import DOCUMENT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable

    from milepost.protocols import Location
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["GroupStore"]


class GroupStore(Store):
    """The group at a location. It may be used by several threads at once; each needs an event loop of its own.

    Methods block while the storage does: what is to happen at once happens in several threads.
    """

    def __init__(self, location: Location) -> None:
        super().__init__()
        self._location = location
        self._storage, self._prefix = location.storage, location.prefix
        self._documents: dict[str, bytes] = {}
        self._names: dict[str, set[str]] = {}

    @property
    def documents(self) -> Collection[str]:
        """The keys of the documents."""
        return self._documents

    def fetch(self, key: str) -> None:
        """Read a document from the storage."""
        self._keep(key, bytes(self._storage.read(f"{self._prefix}{key}")))

    def aside(self) -> GroupStore:
        """Return a store of the same group that knows no document."""
        return GroupStore(self._location)

    def adopt(self, other: GroupStore) -> None:
        """Keep the documents of another store that this one has not."""
        for key, document in other._documents.items():
            if key not in self._documents:
                self._keep(key, document)

    def flush(self, key: str) -> None:
        """Write a document to the storage."""
        self._storage.write(f"{self._prefix}{key}", [self._documents[key]])

    def _keep(self, key: str, document: bytes) -> None:
        self._documents[key] = document
        while key:
            key, _, name = key.rpartition("/")
            self._names.setdefault(key, set()).add(name)

    # --- what zarr-python calls ---

    def __eq__(self, value: object) -> bool:
        return self is value

    __hash__ = Store.__hash__

    @property
    def supports_writes(self) -> bool:
        """Yes."""
        return True

    @property
    def supports_deletes(self) -> bool:
        """No: a group is written once."""
        return False

    @property
    def supports_listing(self) -> bool:
        """Yes, of documents."""
        return True

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a document; of chunks there are none yet, whatever is asked of them."""
        if byte_range is not None or key not in self._documents:
            return None
        return prototype.buffer.from_bytes(self._documents[key])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return what `get` returns, for each."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Say whether there is a document of that key."""
        return key in self._documents

    async def set(self, key: str, value: Buffer) -> None:
        """Keep a document, or write a file of chunks."""
        if key.rpartition("/")[2] == DOCUMENT:
            self._keep(key, value.to_bytes())
        else:
            self._storage.write(f"{self._prefix}{key}", [value.as_numpy_array().view("uint8").data])

    async def delete(self, key: str) -> None:
        """Refuse to: chunks are written even where they hold nothing but zeros, and arrays are never replaced."""
        raise NotImplementedError(f"a Zarr group that is being written has nothing to delete: {key!r}")

    async def list(self) -> AsyncIterator[str]:
        """Yield the keys of all documents."""
        for key in tuple(self._documents):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys of all documents that begin so."""
        for key in tuple(self._documents):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below a prefix."""
        for name in tuple(self._names.get(prefix.rstrip("/"), ())):
            yield name
