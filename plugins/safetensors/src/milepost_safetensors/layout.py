"""Where every byte of a packed file lies, and which bytes one checksum covers; pure functions, no I/O.

The rule: all sizes are known before a byte is written, so that a file is written from front to back. Data begins at
multiples of 64, so that a mapped file can be used in place, except arrays too small for that to be worth its padding.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
import re
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, NamedTuple

from milepost.protocols import Box

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from milepost.protocols import Piece

    from milepost_safetensors.dtypes import Kind

__all__ = [
    "ALIGN",
    "BLOCK",
    "SMALL",
    "TENSORS",
    "Blocks",
    "Slot",
    "blocks",
    "header",
    "intersect",
    "lanes",
    "spans",
    "tensor_name",
    "uncovered",
    "whole",
]

ALIGN = 64
BLOCK = 4 << 20
SMALL = 64 << 10
"""Pieces below this size are gathered when they are written and read."""

_TINY = 4 << 10
_LANE = 16 << 20
TENSORS = 200_000
"""The most pieces in a file: readers of the format refuse headers of 100 MB."""

_PADDING = "__padding__"
_ESCAPED = "__escaped__"
_RESERVED = ("__metadata__", _PADDING, _ESCAPED)
_BOXED = re.compile(r"@(\d+:\d+(,\d+:\d+)*)?\Z")


class Blocks(NamedTuple):
    """How a piece is cut for checksums: it is `outer` times `rows` rows of `inner` bytes, up to `run` rows a block.

    `axis` is the one that rows are counted along.
    """

    axis: int
    outer: int
    rows: int
    run: int
    inner: int

    @property
    def total(self) -> int:
        """The number of blocks."""
        return self.outer * -(-self.rows // self.run)

    def span(self, number: int) -> tuple[int, int]:
        """Return the bytes `[start, stop)` of a block within its piece."""
        outer, first = self._place(number)
        start = (outer * self.rows + first) * self.inner
        return start, start + min(self.run, self.rows - first) * self.inner

    def box(self, number: int, piece: Box) -> Box:
        """Return the box of a block of the piece with that box."""
        outer, first = self._place(number)
        start, shape = list(piece.start), list(piece.shape)
        for axis in reversed(range(self.axis)):
            outer, index = divmod(outer, piece.shape[axis])
            start[axis], shape[axis] = start[axis] + index, 1
        if shape:
            start[self.axis] += first
            shape[self.axis] = min(self.run, self.rows - first)
        return Box(tuple(start), tuple(shape))

    def touched(self, part: Box, piece: Box) -> Iterator[int]:
        """Yield the numbers of the blocks that overlap a part of the piece."""
        if not piece.shape:
            yield 0
            return
        begin = [one - other for one, other in zip(part.start, piece.start, strict=True)]
        first = begin[self.axis]
        runs = range(first // self.run, (first + part.shape[self.axis] - 1) // self.run + 1)
        steps = [range(begin[axis], begin[axis] + part.shape[axis]) for axis in range(self.axis)]
        for index in itertools.product(*steps):
            outer = _ravel(index, piece.shape[: self.axis])
            for run in runs:
                yield outer * -(-self.rows // self.run) + run

    def _place(self, number: int) -> tuple[int, int]:
        outer, run = divmod(number, -(-self.rows // self.run))
        return outer, run * self.run


@functools.lru_cache(1024)
def blocks(shape: tuple[int, ...], itemsize: int) -> Blocks:
    """Cut an array into contiguous boxes of at most 4 MiB, in C order: the unit of checksums.

    The first axis whose rows fit is cut into runs of rows; the axes before it are stepped one by one.

    >>> blocks((3, 1024, 1024), 4)
    Blocks(axis=0, outer=1, rows=3, run=1, inner=4194304)
    >>> blocks((), 4).total, blocks((0, 7), 4).total
    (1, 0)
    """
    size = math.prod(shape) * itemsize
    if not size:
        return Blocks(0, 0, 0, 1, itemsize)
    inner, outer = size, 1
    for axis, length in enumerate(shape):
        inner //= length
        if inner <= BLOCK:
            return Blocks(axis, outer, length, BLOCK // inner, inner)
        outer *= length
    return Blocks(0, 1, 1, 1, size)


# --- files -----------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """One piece with all that is known of it before it is fetched; `box` None means the whole array."""

    piece: Piece
    kind: Kind
    box: Box | None
    shape: tuple[int, ...]
    nbytes: int


def lanes(slots: Iterable[Slot], most: int) -> list[list[Slot]]:
    """Spread pieces over at most so many files of like size; within a file, they are in the order of the data.

    Large pieces come first, then small ones; in both, those that end at a multiple of 64 precede those that need
    padding. Tiny odd ones come last, by falling item size, so that each is aligned to its item without padding.
    """
    ordered = sorted(slots, key=_rank)
    total = sum(slot.nbytes for slot in ordered)
    count = max(min(most, total // _LANE), -(-len(ordered) // TENSORS))
    if count <= 1:
        return [ordered] if ordered else []
    result: list[list[Slot]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for slot in ordered:
        load, number = loads[0]
        result[number].append(slot)
        heapq.heapreplace(loads, (load + slot.nbytes, number))
    return [lane for lane in result if lane]


def _rank(slot: Slot) -> tuple[int, int]:
    odd = slot.nbytes % ALIGN != 0
    if slot.nbytes >= SMALL:
        return odd, -slot.nbytes
    return (4, -slot.kind.itemsize) if odd and slot.nbytes < _TINY else (2 + odd, 0)


def header(lane: Sequence[Slot]) -> tuple[bytes, list[int], int]:
    """Return what a file begins with, the offset of each piece and the size of the file."""
    entries, offsets, foreign, at = [], [], {}, 0
    for slot in lane:
        piece, kind, box, shape, nbytes = slot
        name, end = tensor_name(piece.spec.name, box), at + nbytes
        entries.append(f'{quoted(name)}:{_described(kind, shape)}"data_offsets":[{at},{end}]}}')
        offsets.append(at)
        if not kind.native:
            foreign[name] = piece.spec.dtype
        at = end + padding(slot)
        if at != end:
            entries.append(
                f'"{_PADDING}{len(offsets)}":{{"dtype":"U8","shape":[{at - end}],"data_offsets":[{end},{at}]}}'
            )
    notes = {"milepost": "1"} | ({"milepost.dtypes": json.dumps(foreign)} if foreign else {})
    text = f'{{"__metadata__":{json.dumps(notes)},{",".join(entries)}}}'.encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + offset for offset in offsets], start + at


@functools.lru_cache(1024)
def _described(kind: Kind, shape: tuple[int, ...]) -> str:
    dims = ",".join(map(str, shape if kind.native else (*shape, kind.itemsize)))
    return f'{{"dtype":"{kind.code}","shape":[{dims}],'


def padding(slot: Slot) -> int:
    """Return how many bytes follow a piece so that the next one begins at a multiple of 64."""
    return -slot.nbytes % ALIGN if slot.nbytes >= _TINY else 0


def tensor_name(name: str, box: Box | None) -> str:
    """Return the name under which a box of an array stands in its file; different for different boxes and names.

    >>> tensor_name("w", None), tensor_name("w", Box((0, 4), (4, 8))), tensor_name("w@0:4", None)
    ('w', 'w@0:4,4:12', '__escaped__w@0:4')
    """
    if not name.isascii():
        known = name.encode("utf-8", "backslashreplace").decode()
        name = name if known == name else _ESCAPED + known  # half of a surrogate pair: readers refuse it
    if name.startswith(_RESERVED) or (box is None and "@" in name and _BOXED.search(name)):
        name = _ESCAPED + name
    if box is None:
        return name
    return f"{name}@" + ",".join(f"{at}:{at + n}" for at, n in zip(box.start, box.shape, strict=True))


# --- boxes -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(1024)
def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of a whole array."""
    return Box((0,) * len(shape), shape)


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


def uncovered(box: Box, parts: Iterable[Box]) -> Box | None:
    """Return a box of what no part covers; None if all is covered.

    >>> uncovered(Box((0, 0), (2, 2)), [Box((0, 0), (2, 1)), Box((0, 1), (1, 1))])
    Box(start=(1, 1), shape=(1, 1))
    """
    left = [box]
    for part in parts:
        left = [rest for one in left for rest in _without(one, part)]
    return left[0] if left else None


def _without(box: Box, hole: Box) -> Iterator[Box]:
    common = intersect(box, hole)
    if common is None:
        yield box
        return
    start, shape = list(box.start), list(box.shape)
    for axis, (begin, length) in enumerate(zip(common.start, common.shape, strict=True)):
        end = start[axis] + shape[axis]
        for low, high in ((start[axis], begin), (begin + length, end)):
            if low < high:
                start[axis], shape[axis] = low, high - low
                yield Box(tuple(start), tuple(shape))
        start[axis], shape[axis] = begin, length


def spans(part: Box, frame: Box, itemsize: int) -> list[tuple[int, int]]:
    """Return the bytes of a frame's data in which a part of it lies: its runs where they are long, else one span.

    >>> spans(Box((1, 2), (2, 3)), Box((0, 0), (4, 8)), 1)
    [(10, 21)]
    """
    shape = frame.shape
    begin = [a - b for a, b in zip(part.start, frame.start, strict=True)]
    axis = len(shape)
    while axis and part.shape[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)
    run = math.prod(part.shape[axis:]) * itemsize
    first = _ravel(begin, shape) * itemsize
    last = _ravel([a + n - 1 for a, n in zip(begin, part.shape, strict=True)], shape) * itemsize + itemsize
    if run < SMALL or last - first == run:
        return [(first, last)]
    starts = itertools.product(*(range(a, a + n) for a, n in zip(begin[:axis], part.shape, strict=False)))
    return [(at, at + run) for index in starts for at in [_ravel((*index, *begin[axis:]), shape) * itemsize]]


def _ravel(index: Sequence[int], shape: Sequence[int]) -> int:
    flat = 0
    for at, length in zip(index, shape, strict=True):
        flat = flat * length + at
    return flat
