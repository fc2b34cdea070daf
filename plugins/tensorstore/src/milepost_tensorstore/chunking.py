"""Into which chunks arrays are cut.

The rule: a chunk is what one device holds, as Orbax has it, unless that is more than the limit; then it is cut, along
the first axes, so that a chunk stays one run of memory and a writer never has to hold more than a few of them. What is
spread is cut by divisors only, so that no chunk belongs to two hosts.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING

from milepost.protocols import Box

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cells", "chunk_shape", "clipped", "intersect", "whole"]

_TOO_MANY = 64


@functools.lru_cache(4096)
def chunk_shape(
    shape: tuple[int, ...], box: tuple[int, ...] | None, most: int, axes: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Return the shape of an array's chunks of at most about so many elements; it divides `box` on every axis.

    The axes are cut in their order, but those named in `axes` before the others.

    >>> chunk_shape((1000, 1024), None, 1 << 18), chunk_shape((1000, 1024), None, 1 << 18, (1,))
    ((250, 1024), (1000, 256))
    >>> chunk_shape((1000, 1024), (500, 512), 1 << 16)
    (125, 512)
    """
    chunk = [max(1, n) for n in (shape if box is None else box)]
    size = math.prod(chunk)
    first = [axis for axis in axes if axis < len(chunk)]
    for axis in [*first, *(axis for axis in range(len(chunk)) if axis not in first)]:
        if size <= most:
            break
        inner = size // chunk[axis]
        chunk[axis] = (_even if box is None else _divisor)(chunk[axis], max(1, most // inner))
        size = inner * chunk[axis]
    return tuple(chunk)


def _even(length: int, most: int) -> int:
    """Cut into parts as even as can be; the last may be smaller."""
    return -(-length // -(-length // most))


def _divisor(length: int, most: int) -> int:
    """Cut into equal parts; a large prime is left alone, for it could only be cut into crumbs."""
    least = -(-length // most)
    if least >= length:
        return 1
    parts = next((n for n in range(least, min(length, least * _TOO_MANY) + 1) if length % n == 0), 1)
    return length // parts


@functools.lru_cache(4096)
def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of a whole array."""
    return Box((0,) * len(shape), shape)


def cells(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the index of every chunk that overlaps a box, in C order.

    >>> list(cells(Box((2, 0), (2, 3)), (2, 2)))
    [(1, 0), (1, 1)]
    """
    sides = zip(box.start, box.shape, chunk, strict=True)
    return itertools.product(
        *(range(at // n, -(-(at + length) // n) if length else at // n) for at, length, n in sides)
    )


@functools.lru_cache(4096)
def clipped(cell: tuple[int, ...], chunk: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    """Return the box of what a chunk holds of its array; at the far ends it may be smaller than the chunk.

    >>> clipped((1,), (4,), (6,))
    Box(start=(4,), shape=(2,))
    """
    start = tuple(index * n for index, n in zip(cell, chunk, strict=True))
    return Box(start, tuple(min(n, most - at) for at, n, most in zip(start, chunk, shape, strict=True)))


def intersect(one: Box, other: Box) -> Box | None:
    """Return what two boxes share; None if that is nothing.

    >>> intersect(Box((0,), (4,)), Box((3,), (4,)))
    Box(start=(3,), shape=(1,))
    """
    start, shape = [], []
    for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True):
        begin = max(a, b)
        length = min(a + n, b + m) - begin
        if length <= 0:
            return None
        start.append(begin)
        shape.append(length)
    return Box(tuple(start), tuple(shape))
