"""What is wanted of arrays: the requests, their results, and which of them are served together.

The rule: requests go in the order of the files, in batches that fit the budget. Those that share a compressed chunk
stay together beyond that, up to the size of the chunk, because it can only be decoded as a whole.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from milepost_tensorstore.chunking import intersect
from milepost_tensorstore.database import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from milepost.protocols import Array, Box

    from milepost_tensorstore.catalog import Chunk, Entry

__all__ = ["Wanted", "batches", "cost", "hand_out", "place", "region", "room", "within"]

_ALIGN = 64


class Wanted:
    """One request: what is wanted, the result, and how many reads it waits for."""

    __slots__ = ("_lock", "box", "chunks", "entry", "index", "nbytes", "out", "waits")

    def __init__(self, index: int, entry: Entry, box: Box, chunks: list[Chunk]) -> None:
        self.index: int = index
        self.entry: Entry = entry
        self.box: Box = box
        self.chunks: list[Chunk] = chunks
        self.nbytes: int = math.prod(box.shape) * entry.document.kind.dtype.itemsize
        self.out: Array | None = None
        self.waits: int = 0
        self._lock = threading.Lock()

    def allocate(self) -> Array:
        """Make room for the result, unless there is some."""
        with self._lock:
            if self.out is None:
                self.out = np.ndarray(self.box.shape, self.entry.document.kind.dtype, _aligned(self.nbytes))
            return self.out

    def take(self) -> tuple[int, Array]:
        """Give the result away."""
        out, self.out = self.allocate(), None
        self.chunks = []
        return self.index, out


def place(one: Wanted) -> tuple[str, int]:
    """Return where the first chunk of a request is."""
    value = one.chunks[0].value if one.chunks else b""
    return (value.file, value.start) if isinstance(value, Range) else ("", 0)


def batches(wanted: Sequence[Wanted], size: int) -> Iterator[list[Wanted]]:
    """Yield requests, as many at once as come to about so many bytes."""
    batch: list[Wanted] = []
    last: dict[tuple[str, tuple[int, ...]], int] = {}
    held = 0
    for one in wanted:
        if batch and held + one.nbytes > max(size, _shared(one, last)):
            yield batch
            batch, held, last = [], 0, {}
        batch.append(one)
        held += one.nbytes
        if not one.entry.document.raw:
            last |= {(chunk.entry.name, chunk.cell): one.entry.document.chunk_bytes for chunk in one.chunks}
    if batch:
        yield batch


def _shared(one: Wanted, known: dict[tuple[str, tuple[int, ...]], int]) -> int:
    """Return the size of the largest compressed chunk that a request shares with those before it."""
    if not known or one.entry.document.raw:
        return 0
    return max((known.get((chunk.entry.name, chunk.cell), 0) for chunk in one.chunks), default=0)


def cost(batch: Iterable[Wanted]) -> int:
    """Return the bytes of the results of requests."""
    return sum(one.nbytes for one in batch)


def room(part: Box, users: Sequence[Wanted]) -> Array | None:
    """Return where a part is wanted; None unless that is one run of memory and nobody else wants it."""
    if len(users) != 1 or not within(part, users[0].box):
        return None
    view = region(users[0].allocate(), part, users[0].box)
    return view if view.flags.c_contiguous else None


def hand_out(stored: Array, part: Box, users: Sequence[Wanted]) -> None:
    """Give every user its part of a part."""
    for one in users:
        common = intersect(part, one.box)
        if common is None:
            continue
        target = region(one.allocate(), common, one.box)
        if target.__array_interface__["data"] != stored.__array_interface__["data"]:  # what was decoded in its place
            target[...] = region(stored, common, part)


def within(part: Box, box: Box) -> bool:
    """Say whether a part lies in a box as a whole."""
    sides = zip(part.start, part.shape, box.start, box.shape, strict=True)
    return all(low <= at and at + n <= low + length for at, n, low, length in sides)


def region(array: Array, part: Box, frame: Box) -> Array:
    """Return the view of a part within an array that fills a frame."""
    sides = zip(part.start, part.shape, frame.start, strict=True)
    slices: tuple[Any, ...] = tuple(slice(at - low, at - low + n) for at, n, low in sides)
    view: Array = array[(*slices, ...)]  # with the ellipsis, what has no axes is a view, too
    return view


def _aligned(size: int) -> Array:
    """Return uninitialised bytes at an address that a device can use in place."""
    raw: Array = np.empty(size + _ALIGN, np.uint8)
    at = -raw.__array_interface__["data"][0] % _ALIGN
    return raw[at : at + size]
