"""How arrays are read: which bytes, in what order, into whose memory.

The rule: a raw chunk goes from the storage to where it is wanted, and is checked while the cache still holds it; one
that is not raw is decoded by TensorStore on the way. Requests are taken in the order of the files, in batches that fit
the budget; each chunk that a batch needs is read once, however many requests share it.
"""

from __future__ import annotations

import functools
import itertools
import math
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash
from milepost.errors import ChecksumError, DamagedError, MismatchError, MissingDataError, NotFoundError
from milepost.protocols import Box, ReadsInto

from milepost_tensorstore.catalog import Catalog, Chunk, Entry
from milepost_tensorstore.chunking import intersect, whole
from milepost_tensorstore.codecs import Codec
from milepost_tensorstore.database import Range
from milepost_tensorstore.failures import explained
from milepost_tensorstore.orbax import legacy_aggregate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from milepost.protocols import Array, Buffer, Json, Location, ReadOptions, ReadRequest

__all__ = ["read", "stored_chunks"]

_ALIGN = 64
_SMALL = 64 << 10
_GROUP = 1 << 20
_BLOCK = 8 << 20
_RATIO = 1 << 18  # no codec makes as little of as much


class _Wanted:
    """One request: what is wanted, the result, and how many reads it waits for."""

    __slots__ = ("_lock", "box", "chunks", "entry", "index", "nbytes", "out", "waits")

    def __init__(self, index: int, entry: Entry, box: Box, chunks: list[Chunk]) -> None:
        self.index, self.entry, self.box, self.chunks = index, entry, box, chunks
        self.nbytes = math.prod(box.shape) * entry.document.kind.dtype.itemsize
        self.out: Array | None = None
        self.waits = 0
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


_Users: TypeAlias = "list[_Wanted]"
_Act: TypeAlias = "Callable[[], None]"
_Done: TypeAlias = "queue.SimpleQueue[tuple[_Users, BaseException | None]]"


def read(
    location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
) -> Iterator[tuple[int, Array]]:
    """Check records and requests, and find every chunk; return an iterator over what is read then."""
    if not requests:
        return iter(())
    catalog = Catalog(location, records)
    inside = [] if catalog.aggregate is None else _inside(catalog, requests)
    apart = {index for index, _, _ in inside}
    wanted = [_resolve(index, request, catalog) for index, request in enumerate(requests) if index not in apart]
    wanted.sort(key=_place)
    stream = _Reader(location, catalog.prefix, options).stream(wanted)
    return itertools.chain(stream, legacy_aggregate.read(location, catalog.aggregate, inside)) if inside else stream


def stored_chunks(
    location: Location, records: Sequence[Json], names: Sequence[str]
) -> Sequence[tuple[int, ...] | None]:
    """Return the shapes of the chunks of arrays; None for one of which rows are read without the rest of a chunk."""
    catalog = Catalog(location, records)
    known = () if catalog.aggregate is None else legacy_aggregate.names(catalog.aggregate)
    return [None if catalog.stored(name) in known else _grain(catalog.entry(name)) for name in names]


def _grain(entry: Entry) -> tuple[int, ...] | None:
    document = entry.document
    return None if document.raw and entry.sums is None else document.chunk


def _inside(catalog: Catalog, requests: Sequence[ReadRequest]) -> list[tuple[int, str, ReadRequest]]:
    """Return the requests for arrays in a file of several, each with its number and the array's name there."""
    known = legacy_aggregate.names(catalog.aggregate)
    named = ((index, catalog.stored(request.name), request) for index, request in enumerate(requests))
    return [one for one in named if one[1] in known]


def _resolve(index: int, request: ReadRequest, catalog: Catalog) -> _Wanted:
    entry = catalog.entry(request.name)
    shape = entry.document.shape
    box = whole(shape) if request.box is None else request.box
    if len(box.start) != len(shape) or not all(
        0 <= a <= a + n <= most for a, n, most in zip(box.start, box.shape, shape, strict=True)
    ):
        raise MismatchError(f"array {request.name!r} of shape {shape} has no {box}")
    return _Wanted(index, entry, box, [] if 0 in box.shape else catalog.chunks(entry, box))


def _place(one: _Wanted) -> tuple[str, int]:
    value = one.chunks[0].value if one.chunks else b""
    return (value.file, value.start) if isinstance(value, Range) else ("", 0)


class _Reader:
    """One call of `read`."""

    def __init__(self, location: Location, prefix: str, options: ReadOptions) -> None:
        self._storage, self._prefix, self._options = location.storage, prefix, options
        self._into = location.storage if isinstance(location.storage, ReadsInto) else None
        self._local = threading.local()

    def stream(self, wanted: Sequence[_Wanted]) -> Iterator[tuple[int, Array]]:
        """Read batch after batch, as many at once as the budget allows; yield each result when it is whole."""
        done: _Done = queue.SimpleQueue()
        batches = _batches(wanted, self._options.budget // 2)
        batch = next(batches, None)
        held = running = 0
        with ThreadPoolExecutor(self._options.threads, thread_name_prefix="milepost-read") as pool:
            try:
                while batch is not None or running:
                    if batch is not None and (not running or held + _cost(batch) <= self._options.budget):
                        tasks = self._plan(batch)
                        ready = [one for one in batch if not one.waits]
                        for users, act in tasks:
                            pool.submit(_run, users, act, done)
                        running += len(tasks)
                        held += _cost(batch)
                        batch = next(batches, None)
                    else:
                        ready = _finished(done)
                        running -= 1
                    held -= _cost(ready)
                    for one in ready:
                        yield one.take()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, batch: Sequence[_Wanted]) -> list[tuple[_Users, _Act]]:
        """Fill in what is at hand, and turn the rest into reads: of small chunks close together, or of large ones."""
        shared: dict[tuple[str, tuple[int, ...]], tuple[Chunk, _Users]] = {}
        for one in batch:
            for chunk in one.chunks:
                shared.setdefault((chunk.entry.name, chunk.cell), (chunk, []))[1].append(one)
        tasks: list[tuple[_Users, _Act]] = []
        groups: list[list[tuple[Chunk, _Users]]] = []
        for chunk, users in shared.values():
            if chunk.value is None:
                zero = np.zeros((), chunk.entry.document.kind.dtype)
                _hand_out(np.broadcast_to(zero, chunk.part.shape), chunk.part, users)
            elif isinstance(chunk.value, bytes):
                self._fill(chunk, users, chunk.value)
            elif _is_small(chunk.value):
                if groups and _near(groups[-1], chunk.value):
                    groups[-1].append((chunk, users))
                else:
                    groups.append([(chunk, users)])
            else:
                tasks.extend((users, act) for act in self._large(chunk, users))
        tasks.extend(
            ([one for _, users in group for one in users], functools.partial(self._read_group, group))
            for group in groups
        )
        for users, _ in tasks:
            for one in users:
                one.waits += 1
        return tasks

    # --- small chunks ---

    def _read_group(self, group: list[tuple[Chunk, _Users]]) -> None:
        low, (last, _) = _range(group[0][0]).start, group[-1]
        end = _range(last).start + (_range(last).length or 0)
        data = memoryview(self._fetch(last, low, end))
        for chunk, users in group:
            at = _range(chunk).start - low
            self._fill(chunk, users, data[at : at + (_range(chunk).length or 0)])

    # --- large chunks ---

    def _large(self, chunk: Chunk, users: _Users) -> Iterator[_Act]:
        document = chunk.entry.document
        if chunk.sum is None and document.raw and document.chunk_bytes > _BLOCK and document.shape:
            yield from self._blocks(chunk, users)
        elif document.raw and len(users) == 1 and chunk.part.shape == document.chunk:
            yield functools.partial(self._read_in_place, chunk, users)
        else:
            yield functools.partial(self._read_whole, chunk, users)

    def _read_whole(self, chunk: Chunk, users: _Users) -> None:
        at = _range(chunk)
        end = None if at.length is None else at.start + at.length
        self._fill(chunk, users, self._fetch(chunk, at.start, end))

    def _read_in_place(self, chunk: Chunk, users: _Users) -> None:
        (one,) = users
        _check_size(chunk, self._size(chunk))  # before there is room for it, because the record may lie
        view = _region(one.allocate(), chunk.part, one.box) if _within(chunk.part, one.box) else None
        if view is None or not view.flags.c_contiguous:
            self._read_whole(chunk, users)
            return
        data = _bytes(view)
        self._fetch_into(chunk, _range(chunk).start, data)
        self._check(chunk, data)

    def _blocks(self, chunk: Chunk, users: _Users) -> Iterator[_Act]:
        """Read a large chunk that has no checksum by runs of rows, only those that somebody wants."""
        document, at = chunk.entry.document, _range(chunk)
        _check_size(chunk, self._size(chunk))
        inner = document.chunk_bytes // document.chunk[0]
        run = max(1, _BLOCK // inner)
        for first in range(0, chunk.part.shape[0], run):
            count = min(run, chunk.part.shape[0] - first)
            start = (chunk.part.start[0] + first, *chunk.part.start[1:])
            rows = Box(start, (count, *chunk.part.shape[1:]))
            if any(intersect(rows, one.box) is not None for one in users):
                yield functools.partial(self._read_rows, chunk, users, rows, (at.start + first * inner, count * inner))

    def _read_rows(self, chunk: Chunk, users: _Users, rows: Box, span: tuple[int, int]) -> None:
        document, (start, size) = chunk.entry.document, span
        full = rows.shape[1:] == document.chunk[1:]
        if full and len(users) == 1 and _within(rows, users[0].box):
            view = _region(users[0].allocate(), rows, users[0].box)
            if view.flags.c_contiguous:
                self._fetch_into(chunk, start, _bytes(view))
                return
        data = self._fetch(chunk, start, start + size)
        stored: Array = np.frombuffer(data, document.kind.dtype).reshape(rows.shape[0], *document.chunk[1:])
        _hand_out(stored[tuple(map(slice, rows.shape))], rows, users)

    # --- any chunk ---

    def _fill(self, chunk: Chunk, users: _Users, data: Buffer) -> None:
        """Understand a stored chunk, check it, and give every user its part."""
        document, part = chunk.entry.document, chunk.part
        if document.raw:
            _check_size(chunk, len(data))
            stored: Array = np.frombuffer(data, document.kind.dtype, math.prod(document.chunk)).reshape(document.chunk)
            stored = stored[tuple(map(slice, part.shape))]
        else:
            stored = self._decoded(chunk, users, data)
        if self._options.verify and chunk.sum is not None:
            self._check(chunk, _bytes(stored) if stored.flags.c_contiguous else stored.tobytes())
        _hand_out(stored, part, users)

    def _decoded(self, chunk: Chunk, users: _Users, data: Buffer) -> Array:
        """Return what a chunk that is not raw holds; where one request wants all of that, in the place for it."""
        document, part = chunk.entry.document, chunk.part
        if document.chunk_bytes > _RATIO * (len(data) + _ALIGN):
            raise DamagedError(
                f"array {chunk.entry.name!r} cannot be read: its chunk {document.key(chunk.cell)!r} has "
                f"{len(data)} bytes, which cannot be {document.chunk_bytes}"
            )
        if len(users) == 1 and _within(part, users[0].box):
            stored = _region(users[0].allocate(), part, users[0].box)
        else:
            stored = np.empty(part.shape, document.kind.dtype)
        with explained(f"read array {chunk.entry.name!r}: chunk {document.key(chunk.cell)!r}", reading=True):
            self._codec().decode(document, chunk.cell, data, stored)
        return stored

    def _codec(self) -> Codec:
        found = getattr(self._local, "codec", None)
        if found is None:
            found = self._local.codec = Codec()
        return found

    def _check(self, chunk: Chunk, data: Buffer) -> None:
        if self._options.verify and chunk.sum is not None and xxhash.xxh3_64_hexdigest(data) != chunk.sum:
            value = chunk.value
            file = self._named(value.file) if isinstance(value, Range) else self._named("manifest.ocdbt")
            key = chunk.entry.document.key(chunk.cell)
            raise ChecksumError(
                f"array {chunk.entry.name!r} differs from what was saved: its chunk {key!r} in {file!r}"
            )

    def _fetch(self, chunk: Chunk, start: int, end: int | None) -> Buffer:
        file = _range(chunk).file
        try:
            data = self._storage.read(self._prefix + file, start, end)
        except NotFoundError as error:
            raise self._missing(chunk) from error
        if end is not None and len(data) != end - start:
            raise self._short(chunk)
        return data

    def _fetch_into(self, chunk: Chunk, start: int, into: memoryview) -> None:
        if self._into is None:
            into[:] = self._fetch(chunk, start, start + len(into))
            return
        try:
            count = self._into.read_into(self._prefix + _range(chunk).file, start, into)
        except NotFoundError as error:
            raise self._missing(chunk) from error
        if count != len(into):
            raise self._short(chunk)

    def _size(self, chunk: Chunk) -> int:
        found = _range(chunk)
        if found.length is not None:
            return found.length
        try:
            return self._storage.size(self._prefix + found.file)
        except NotFoundError as error:
            raise self._missing(chunk) from error

    def _missing(self, chunk: Chunk) -> MissingDataError:
        return MissingDataError(
            f"array {chunk.entry.name!r} cannot be read: file {self._named(_range(chunk).file)!r} is missing"
        )

    def _short(self, chunk: Chunk) -> MissingDataError:
        return MissingDataError(
            f"array {chunk.entry.name!r} cannot be read: file {self._named(_range(chunk).file)!r} is cut short"
        )

    def _named(self, file: str) -> str:
        return f"{self._storage.url}/{self._prefix}{file}"


def _check_size(chunk: Chunk, size: int) -> None:
    document = chunk.entry.document
    if size != document.chunk_bytes + document.tail:
        raise DamagedError(
            f"array {chunk.entry.name!r} cannot be read: its chunk {document.key(chunk.cell)!r} has {size} bytes, "
            f"not {document.chunk_bytes + document.tail}"
        )


def _hand_out(stored: Array, part: Box, users: _Users) -> None:
    for one in users:
        common = intersect(part, one.box)
        if common is None:
            continue
        region = _region(one.allocate(), common, one.box)
        if region.__array_interface__["data"] != stored.__array_interface__["data"]:  # what was decoded in its place
            region[...] = _region(stored, common, part)


def _run(users: _Users, act: _Act, done: _Done) -> None:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 raised again where the results are taken
        done.put((users, error))
    else:
        done.put((users, None))


def _finished(done: _Done) -> list[_Wanted]:
    """Wait for one read; return the requests that it completed."""
    users, error = done.get()
    if error is not None:
        raise error
    ready = []
    for one in users:
        one.waits -= 1
        if not one.waits:
            ready.append(one)
    return ready


def _batches(wanted: Sequence[_Wanted], size: int) -> Iterator[list[_Wanted]]:
    batch: list[_Wanted] = []
    held = 0
    for one in wanted:
        if batch and held + one.nbytes > size:
            yield batch
            batch, held = [], 0
        batch.append(one)
        held += one.nbytes
    if batch:
        yield batch


def _cost(batch: Sequence[_Wanted]) -> int:
    return sum(one.nbytes for one in batch)


def _range(chunk: Chunk) -> Range:
    assert isinstance(chunk.value, Range)  # noqa: S101 - what is at hand is filled in without being read
    return chunk.value


def _is_small(value: Range) -> bool:
    return value.length is not None and value.length < _SMALL


def _near(group: list[tuple[Chunk, _Users]], value: Range) -> bool:
    first, last = _range(group[0][0]), _range(group[-1][0])
    gap = value.start - last.start - (last.length or 0)
    end = value.start + (value.length or 0)
    return last.file == value.file and 0 <= gap < _SMALL and end - first.start <= _GROUP


def _within(part: Box, box: Box) -> bool:
    sides = zip(part.start, part.shape, box.start, box.shape, strict=True)
    return all(low <= at and at + n <= low + length for at, n, low, length in sides)


def _region(array: Array, part: Box, frame: Box) -> Array:
    """Return the view of a part within an array that fills a frame."""
    sides = zip(part.start, part.shape, frame.start, strict=True)
    slices: tuple[Any, ...] = tuple(slice(at - low, at - low + n) for at, n, low in sides)
    view: Array = array[(*slices, ...)]  # with the ellipsis, what has no axes is a view, too
    return view


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _aligned(size: int) -> Array:
    """Return uninitialised bytes at an address that a device can use in place."""
    raw: Array = np.empty(size + _ALIGN, np.uint8)
    at = -raw.__array_interface__["data"][0] % _ALIGN
    return raw[at : at + size]
