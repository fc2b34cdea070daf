"""How chunks that are not raw are made and understood.

The rule: what is nothing but one frame of Zstandard, as all that Orbax compresses, goes through that library alone,
straight from the bytes of the array or to where they are wanted. All else TensorStore decodes, on a chunk in memory,
wherever its bytes come from. So every codec that it knows can be read, on every storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from milepost.errors import DamagedError

from milepost_tensorstore.documents import FILES, trailer

if TYPE_CHECKING:
    from milepost.protocols import Array, Buffer

    from milepost_tensorstore.catalog import Chunk
    from milepost_tensorstore.documents import Document

__all__ = ["Codec", "Frame", "compressed"]

_KEPT = 64
_BLOCK = 4 << 20


class _Source(Protocol):
    def read(self, size: int, /) -> Buffer: ...


def compressed(document: Document, data: Buffer) -> Buffer | None:
    """Return the frame of Zstandard of which a stored chunk consists; None if it is something else."""
    if not document.zstd or not document.tail:
        return data if document.zstd else None
    view = memoryview(data)
    size = max(0, len(view) - document.tail)
    return view[:size] if view[size:] == trailer(size) else None


class Frame:
    """A chunk that is being decompressed, from its beginning to its end."""

    def __init__(self, chunk: Chunk, reader: Any) -> None:
        self._chunk, self._reader = chunk, reader

    def fill(self, into: memoryview) -> None:
        """Decompress as many bytes as there is room for; raises `DamagedError` if that cannot be."""
        at = 0
        while at < len(into):
            count = self._read(into[at:])
            if not count:
                raise self._damaged(f"it ends {len(into) - at} bytes too early")
            at += count

    def end(self) -> None:
        """Raise `DamagedError` if there is more."""
        if self._read(memoryview(bytearray(1))):
            raise self._damaged("there is more of it than the array has")

    def _read(self, into: memoryview) -> int:
        import zstandard

        try:
            return int(self._reader.readinto(into))
        except zstandard.ZstdError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> DamagedError:
        entry = self._chunk.entry
        key = entry.document.key(self._chunk.cell)
        return DamagedError(f"array {entry.name!r} cannot be read: its chunk {key!r} cannot be decompressed: {why}")


class Codec:
    """Encodes and decodes single chunks; of one thread at a time."""

    def __init__(self) -> None:
        self._stores: dict[bytes, tuple[Any, Any]] = {}
        self._compressors: dict[int, Any] = {}
        self._decompressor: Any = None

    def encode(self, data: Buffer, document: Document, level: int) -> bytes:
        """Return the stored form of a chunk, of which there are all bytes, in Zstandard."""
        found = self._compressors.get(level)
        if found is None:
            import zstandard

            found = self._compressors[level] = zstandard.ZstdCompressor(level)
        encoded: bytes = found.compress(data)
        return encoded + trailer(len(encoded)) if document.tail else encoded

    def decode(self, chunk: Chunk, data: Buffer, into: Array | None) -> Array:
        """Return what a stored chunk holds of its array, in a given place if it fits there.

        Raises `DamagedError` or TensorStore's error if that cannot be.
        """
        document = chunk.entry.document
        body = compressed(document, data)
        if body is None:
            if into is None:
                into = np.empty(chunk.part.shape, document.kind.dtype)
            self._decode(chunk, data, into)
            return into
        if into is None or chunk.part.shape != document.chunk:
            into = np.empty(document.chunk, document.kind.dtype)
        frame = self.decompress(chunk, body)
        frame.fill(into.reshape(-1).view(np.uint8).data)
        frame.end()
        view: Array = into[tuple(map(slice, chunk.part.shape))]
        return view if chunk.part.shape else into

    def decompress(self, chunk: Chunk, source: Buffer | _Source) -> Frame:
        """Begin to decompress a frame; nothing else is decompressed here until that is done."""
        if self._decompressor is None:
            import zstandard

            self._decompressor = zstandard.ZstdDecompressor()
        return Frame(chunk, self._decompressor.stream_reader(source, read_size=_BLOCK))

    def _decode(self, chunk: Chunk, data: Buffer, into: Array) -> None:
        import tensorstore as ts

        document = chunk.entry.document
        values, store = self._open(document)
        key = document.key(chunk.cell)
        values[key] = bytes(data)
        place = tuple(slice(at, at + n) for at, n in zip(chunk.part.start, chunk.part.shape, strict=True))
        try:
            ts.array(into, dtype=store.dtype).write(store[place]).result()
        finally:
            values[key] = None

    def _open(self, document: Document) -> tuple[Any, Any]:
        found = self._stores.get(document.text)
        if found is None:
            import tensorstore as ts

            if len(self._stores) >= _KEPT:
                self._stores.clear()
            context = ts.Context()
            values = ts.KvStore.open("memory://", context=context).result()
            values[FILES[document.zarr_format]] = document.text
            spec = {
                "driver": "zarr" if document.zarr_format == 2 else "zarr3",  # noqa: PLR2004 - the version itself
                "kvstore": "memory://",
                "fill_missing_data_reads": False,
                "store_data_equal_to_fill_value": True,
            }
            store = ts.open(spec, open=True, context=context).result()
            found = self._stores[document.text] = values, store
        return found
