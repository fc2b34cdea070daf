"""How chunks that are not raw are made and understood.

The rule: TensorStore does it, on a chunk in memory, wherever the bytes come from or go to. So every codec that it knows
can be read, on every storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milepost_tensorstore import chunking
from milepost_tensorstore.documents import FILES

if TYPE_CHECKING:
    from milepost.protocols import Array, Box, Buffer

    from milepost_tensorstore.documents import Document

__all__ = ["Codec"]

_KEPT = 64


class Codec:
    """Encodes and decodes single chunks; of one thread at a time."""

    def __init__(self) -> None:
        self._stores: dict[bytes, tuple[Any, Any]] = {}

    def encode(self, document: Document, cell: tuple[int, ...], data: Array) -> bytes:
        """Return the stored form of a chunk."""
        values, store = self._open(document)
        box = chunking.clipped(cell, document.chunk, document.shape)
        store[_slices(box)].write(data).result()
        key = document.key(cell)
        encoded: bytes = values[key]
        values[key] = None
        return encoded

    def decode(self, document: Document, cell: tuple[int, ...], data: Buffer, into: Array) -> None:
        """Fill an array with what a stored chunk holds of its array; raises TensorStore's error if it cannot be."""
        import tensorstore as ts

        values, store = self._open(document)
        key = document.key(cell)
        box = chunking.clipped(cell, document.chunk, document.shape)
        values[key] = bytes(data)
        try:
            ts.array(into, dtype=store.dtype).write(store[_slices(box)]).result()
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


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))
