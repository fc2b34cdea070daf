"""How an array is cut into files, and each file into chunks.

The rule: chunks are the least that is read, so they are small and cut along every axis, for whatever boxes are wanted
when the mesh has changed; files are what is written at once, so they are large and hold whole chunks. Of an array that
is spread over devices no file holds parts of two boxes, so that no two hosts write one file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from milepost.protocols import Box

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.protocols import ArraySpec

__all__ = ["Grid", "cut", "file_key", "intersect"]

_RUN = 1024
"""Bytes along the last axis below which it is not cut: shorter runs are slow to copy."""

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


class Grid(NamedTuple):
    """The shape of an array, of its files and of the chunks in them; all counted from the origin.

    The last files and chunks along an axis may end beyond the array; what is there is padding.
    """

    shape: tuple[int, ...]
    file: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def sharded(self) -> bool:
        """Whether a file has more than one chunk."""
        return self.file != self.chunk

    @property
    def counts(self) -> tuple[int, ...]:
        """How many chunks a file has along each axis."""
        return tuple(n // m for n, m in zip(self.file, self.chunk, strict=True))

    def files(self, box: Box) -> Iterator[tuple[int, ...]]:
        """Yield the indices of the files that a box touches.

        >>> list(Grid((10, 4), (4, 4), (2, 4)).files(Box((3, 0), (2, 4))))
        [(0, 0), (1, 0)]
        """
        return iter(()) if 0 in box.shape else _indices(_touched(box, self.file))

    def touched(self, box: Box) -> int:
        """Return about how many chunks a box touches."""
        return math.prod(n // m + 2 for n, m in zip(box.shape, self.chunk, strict=True))

    def frame(self, index: tuple[int, ...]) -> Box:
        """Return the box of the array that a file holds.

        >>> Grid((10, 4), (4, 4), (2, 4)).frame((2, 0))
        Box(start=(8, 0), shape=(2, 4))
        """
        return _clipped(tuple(i * n for i, n in zip(index, self.file, strict=True)), self.file, self.shape)

    def used(self, frame: Box) -> tuple[int, ...]:
        """Return how many chunks along each axis are not padding alone."""
        return tuple(-(-n // m) for n, m in zip(frame.shape, self.chunk, strict=True))

    def chunks(self, frame: Box, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
        """Yield the chunks of a file that a box within its frame touches: index in the file, box of the array."""
        inside = Box(tuple(a - b for a, b in zip(box.start, frame.start, strict=True)), box.shape)
        for at in _indices(_touched(inside, self.chunk)):
            start = tuple(b + i * n for b, i, n in zip(frame.start, at, self.chunk, strict=True))
            yield at, _clipped(start, self.chunk, self.shape)


def _indices(ranges: list[range]) -> Iterator[tuple[int, ...]]:
    """Yield what `itertools.product` does, without holding the ranges, which may be of any length."""
    if not ranges:
        yield ()
        return
    for rest in _indices(ranges[:-1]) if len(ranges) > 1 else ((),):
        for last in ranges[-1]:
            yield (*rest, last)


def _touched(box: Box, unit: tuple[int, ...]) -> list[range]:
    return [range(a // u, -(-(a + n) // u)) for a, n, u in zip(box.start, box.shape, unit, strict=True)]


def _clipped(start: tuple[int, ...], shape: tuple[int, ...], within: tuple[int, ...]) -> Box:
    return Box(start, tuple(min(n, most - a) for a, n, most in zip(start, shape, within, strict=True)))


def file_key(prefix: str, path: str, index: tuple[int, ...]) -> str:
    """Return the key of a file of an array.

    >>> file_key("7/state/", "params/w", (0, 3)), file_key("", "b", ())
    ('7/state/params/w/c.0.3', 'b/c')
    """
    return f"{prefix}{path}/{'.'.join(['c', *map(str, index)])}"


def intersect(one: Box, other: Box) -> Box | None:
    """Return the box that two boxes share, or None.

    >>> intersect(Box((0,), (4,)), Box((3,), (4,)))
    Box(start=(3,), shape=(1,))
    """
    start = tuple(map(max, one.start, other.start))
    stops = ((a + n, b + m) for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True))
    shape = tuple(min(stop) - at for stop, at in zip(stops, start, strict=True))
    return Box(start, shape) if all(n > 0 for n in shape) else None


def cut(spec: ArraySpec, itemsize: int, chunk_bytes: int, file_bytes: int) -> Grid:
    """Choose files and chunks of about so many bytes at most; what the caller wishes for chunks is stronger.

    >>> from milepost.protocols import ArraySpec
    >>> cut(ArraySpec("a", (4096, 4096), "float32"), 4, 1 << 20, 1 << 25)
    Grid(shape=(4096, 4096), file=(2048, 4096), chunk=(512, 512))
    >>> cut(ArraySpec("a", (96, 10007), "float32", (12, 10007)), 4, 1 << 16, 1 << 25)
    Grid(shape=(96, 10007), file=(12, 10008), chunk=(12, 1251))
    >>> cut(ArraySpec("a", (4096, 4096), "float32", chunk_bytes=1 << 18, chunk_axes=(1,)), 4, 1 << 20, 1 << 25).chunk
    (256, 256)
    """
    chunk_bytes = spec.chunk_bytes or chunk_bytes
    box = spec.shape if spec.box is None else spec.box
    frame = tuple(max(1, min(n, most)) for n, most in zip(box, spec.shape, strict=True))
    # Along an axis that is not spread, nobody else's box begins where the last chunk ends.
    free = tuple(n >= most for n, most in zip(frame, spec.shape, strict=True))
    chunk, wished = list(frame), {axis % len(frame) for axis in spec.chunk_axes if -len(frame) <= axis < len(frame)}
    while math.prod(chunk) * itemsize > chunk_bytes:
        axes = _divisible(chunk, free, max(1, min(_RUN, chunk_bytes) // itemsize))
        if not axes:
            break
        axis = max(wished & axes or axes, key=lambda axis: (chunk[axis], -axis))
        chunk[axis] = _part(chunk[axis], free=free[axis])
    counts = [-(-n // m) for n, m in zip(frame, chunk, strict=True)]
    most = file_bytes // (math.prod(chunk) * itemsize)
    while math.prod(counts) > most and max(counts, default=1) > 1:
        axis = next(axis for axis, n in enumerate(counts) if n > 1)
        counts[axis] = _part(counts[axis], free=free[axis])
    return Grid(spec.shape, tuple(n * m for n, m in zip(counts, chunk, strict=True)), tuple(chunk))


def _divisible(chunk: list[int], free: tuple[bool, ...], run: int) -> set[int]:
    last = len(chunk) - 1
    return {
        axis
        for axis, n in enumerate(chunk)
        if n > (run if axis == last else 1) and (free[axis] or any(n % prime == 0 for prime in _PRIMES))
    }


def _part(n: int, *, free: bool) -> int:
    """Return about half of a length; one that divides it unless it is free; 1 where no small number does."""
    if free:
        return -(-n // 2)
    return next((n // prime for prime in _PRIMES if n % prime == 0), 1)
