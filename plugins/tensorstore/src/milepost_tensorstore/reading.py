"""How arrays are read: which bytes, in what order, into whose memory.

The rule: a raw chunk goes from the storage to where it is wanted, and is checked while the cache still holds it; one
that is not raw is decoded on the way, a large one in portions. Requests are taken in the order of the files, in batches
that fit the budget; each chunk that a batch needs is read once, however many requests share it.
"""

from __future__ import annotations

import functools
import itertools
import math
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import xxhash
from milepost.errors import ChecksumError, DamagedError, MismatchError, MissingDataError, NotFoundError
from milepost.protocols import Box, ReadsInto

from milepost_tensorstore.chunking import intersect, whole
from milepost_tensorstore.codecs import Codec, Frame
from milepost_tensorstore.database import Range
from milepost_tensorstore.documents import trailer
from milepost_tensorstore.failures import explained
from milepost_tensorstore.orbax import legacy_aggregate
from milepost_tensorstore.wanted import Wanted, batches, cost, hand_out, place, room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from milepost.protocols import Array, Buffer, Location, ReadOptions, ReadRequest

    from milepost_tensorstore.catalog import Catalog, Chunk, Entry

__all__ = ["read", "stored_chunks"]

_SLACK = 64
_SMALL = 64 << 10
_GROUP = 1 << 20
_BLOCK = 8 << 20
_TOGETHER = 64
_PORTION = 4 << 20
_RATIO = 1 << 18  # no codec makes as little of as much


_Users: TypeAlias = "list[Wanted]"
_Act: TypeAlias = "Callable[[], None]"
_Done: TypeAlias = "queue.SimpleQueue[tuple[_Users, BaseException | None]]"


def read(
    location: Location, catalog: Catalog, requests: Sequence[ReadRequest], options: ReadOptions
) -> Iterator[tuple[int, Array]]:
    """Check requests, and find every chunk; return an iterator over what is read then."""
    inside = [] if catalog.aggregate is None else _inside(catalog, requests)
    apart = {index for index, _, _ in inside}
    wanted = [_resolve(index, request, catalog) for index, request in enumerate(requests) if index not in apart]
    wanted.sort(key=place)
    stream = _Reader(location, catalog.prefix, options).stream(wanted)
    return itertools.chain(stream, legacy_aggregate.read(location, catalog.aggregate, inside)) if inside else stream


def stored_chunks(catalog: Catalog, names: Sequence[str]) -> Sequence[tuple[int, ...] | None]:
    """Return the shapes of the chunks of arrays; None for one of which rows are read without the rest of a chunk."""
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


def _resolve(index: int, request: ReadRequest, catalog: Catalog) -> Wanted:
    entry = catalog.entry(request.name)
    shape = entry.document.shape
    box = whole(shape) if request.box is None else request.box
    if len(box.start) != len(shape) or not all(
        0 <= a <= a + n <= most for a, n, most in zip(box.start, box.shape, shape, strict=True)
    ):
        raise MismatchError(f"array {request.name!r} of shape {shape} has no {box}")
    return Wanted(index, entry, box, [] if 0 in box.shape else catalog.chunks(entry, box))


class _Reader:
    """One call of `read`."""

    def __init__(self, location: Location, prefix: str, options: ReadOptions) -> None:
        self._storage, self._prefix, self._options = location.storage, prefix, options
        self._into = location.storage if isinstance(location.storage, ReadsInto) else None
        self._local = threading.local()

    def stream(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, Array]]:
        """Read batch after batch, as many at once as the budget allows; yield each result when it is whole."""
        done: _Done = queue.SimpleQueue()
        coming = batches(wanted, self._options.budget // 2)
        batch = next(coming, None)
        held = running = 0
        with ThreadPoolExecutor(self._options.threads, thread_name_prefix="milepost-read") as pool:
            try:
                while batch is not None or running:
                    if batch is not None and (not running or held + cost(batch) <= self._options.budget):
                        tasks = self._plan(batch)
                        ready = [one for one in batch if not one.waits]
                        for users, act in tasks:
                            pool.submit(_run, users, act, done)
                        running += len(tasks)
                        held += cost(batch)
                        batch = next(coming, None)
                    else:
                        ready = _finished(done)
                        running -= 1
                    held -= cost(ready)
                    for one in ready:
                        yield one.take()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, batch: Sequence[Wanted]) -> list[tuple[_Users, _Act]]:
        """Fill in what is at hand, and turn the rest into reads: of small chunks close together, or of large ones."""
        tasks: list[tuple[_Users, _Act]] = []
        groups: list[list[tuple[Chunk, _Users]]] = []
        inline: list[tuple[Chunk, _Users]] = []
        for chunk, users in _shared(batch):
            if chunk.value is None:
                zero = np.zeros((), chunk.entry.document.kind.dtype)
                hand_out(np.broadcast_to(zero, chunk.part.shape), chunk.part, users)
            elif isinstance(chunk.value, bytes):
                inline.append((chunk, users))
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
        tasks += self._inline(inline)
        for users, _ in tasks:
            for one in users:
                one.waits += 1
        return tasks

    # --- chunks at hand ---

    def _inline(self, chunks: Sequence[tuple[Chunk, _Users]]) -> Iterator[tuple[_Users, _Act]]:
        """Fill in chunks that are quickly understood; yield the others as tasks, some at a time."""
        slow: list[tuple[Chunk, _Users]] = []
        quick: list[tuple[Chunk, _Users]] = []
        for one in chunks:
            document = one[0].entry.document
            (quick if document.raw or document.zstd else slow).append(one)
        self._fill_all(quick)
        for at in range(0, len(slow), _TOGETHER):
            some = slow[at : at + _TOGETHER]
            yield [one for _, users in some for one in users], functools.partial(self._fill_all, some)

    def _fill_all(self, chunks: Sequence[tuple[Chunk, _Users]]) -> None:
        for chunk, users in chunks:
            self._fill(chunk, users, chunk.value if isinstance(chunk.value, bytes) else b"")

    # --- small chunks ---

    def _read_group(self, group: list[tuple[Chunk, _Users]]) -> None:
        low, (last, _) = _range(group[0][0]).start, group[-1]
        end = _range(last).start + (_range(last).length or 0)
        data = memoryview(self._borrow(last, low, end))
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
        elif document.zstd and document.chunk_bytes > _BLOCK:
            yield functools.partial(self._unpack, chunk, users)
        else:
            yield functools.partial(self._read_whole, chunk, users)

    def _read_whole(self, chunk: Chunk, users: _Users) -> None:
        at = _range(chunk)
        end = None if at.length is None else at.start + at.length
        self._fill(chunk, users, self._borrow(chunk, at.start, end))

    def _read_in_place(self, chunk: Chunk, users: _Users) -> None:
        _check_size(chunk, self._size(chunk))  # before there is room for it, because the record may lie
        view = room(chunk.part, users)
        if view is None:
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
        view = room(rows, users) if rows.shape[1:] == document.chunk[1:] else None
        if view is not None:
            self._fetch_into(chunk, start, _bytes(view))
            return
        data = self._borrow(chunk, start, start + size)
        stored: Array = np.frombuffer(data, document.kind.dtype).reshape(rows.shape[0], *document.chunk[1:])
        hand_out(stored[tuple(map(slice, rows.shape))], rows, users)

    def _unpack(self, chunk: Chunk, users: _Users) -> None:
        """Decompress a large chunk in portions, as its bytes come, and hand them out."""
        document, at, size = chunk.entry.document, _range(chunk).start, self._size(chunk)
        _check_ratio(chunk, size)
        if document.tail:
            size -= document.tail
            if size < 0 or self._fetch(chunk, at + size, at + size + document.tail) != trailer(size):
                self._read_whole(chunk, users)  # TensorStore knows what it is, if anybody does
                return
        frame = self._codec().decompress(chunk, _Stretch(functools.partial(self._borrow, chunk), at, at + size))
        digest = xxhash.xxh3_64()
        view = room(chunk.part, users) if chunk.part.shape == document.chunk else None
        for data in self._portions(frame, chunk, users) if view is None else _filled(frame, _bytes(view)):
            digest.update(data)
        frame.end()
        if self._options.verify and chunk.sum is not None:
            self._compare(chunk, digest.hexdigest())

    def _portions(self, frame: Frame, chunk: Chunk, users: _Users) -> Iterator[memoryview]:
        """Hand out some rows at a time; yield what each portion holds of the array."""
        document, part = chunk.entry.document, chunk.part
        run = max(1, _PORTION * document.chunk[0] // document.chunk_bytes)
        space: Array = np.empty((run, *document.chunk[1:]), document.kind.dtype)
        for first in range(0, document.chunk[0], run):
            rows = space[: document.chunk[0] - first]
            frame.fill(_bytes(rows))
            stored = rows[tuple(slice(n) for n in (max(0, part.shape[0] - first), *part.shape[1:]))]
            if stored.size:
                hand_out(stored, Box((part.start[0] + first, *part.start[1:]), stored.shape), users)
                yield _bytes(np.ascontiguousarray(stored))

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
        hand_out(stored, part, users)

    def _decoded(self, chunk: Chunk, users: _Users, data: Buffer) -> Array:
        """Return what a chunk that is not raw holds; where one request wants all of that, in the place for it."""
        _check_ratio(chunk, len(data))
        with explained(
            f"read array {chunk.entry.name!r}: chunk {chunk.entry.document.key(chunk.cell)!r}", reading=True
        ):
            return self._codec().decode(chunk, data, room(chunk.part, users))

    def _codec(self) -> Codec:
        found = getattr(self._local, "codec", None)
        if found is None:
            found = self._local.codec = Codec()
        return found

    def _check(self, chunk: Chunk, data: Buffer) -> None:
        if self._options.verify and chunk.sum is not None:
            self._compare(chunk, xxhash.xxh3_64_hexdigest(data))

    def _compare(self, chunk: Chunk, digest: str) -> None:
        if digest != chunk.sum:
            value = chunk.value
            file = self._named(value.file) if isinstance(value, Range) else self._named("manifest.ocdbt")
            key = chunk.entry.document.key(chunk.cell)
            raise ChecksumError(
                f"array {chunk.entry.name!r} differs from what was saved: its chunk {key!r} in {file!r}"
            )

    def _borrow(self, chunk: Chunk, start: int, end: int | None) -> Buffer:
        """Return bytes that stay as they are until this thread reads the next: new memory costs more than reading."""
        size = 0 if end is None else end - start
        if self._into is None or end is None or size > _BLOCK:
            return self._fetch(chunk, start, end)
        kept = getattr(self._local, "kept", None)
        if kept is None or len(kept) < size:
            kept = self._local.kept = np.empty(max(size, _GROUP), np.uint8).data
        view = kept[:size]
        self._fetch_into(chunk, start, view)
        return view

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


def _shared(batch: Sequence[Wanted]) -> Iterable[tuple[Chunk, _Users]]:
    """Return the chunks that a batch needs, each with those who want of it."""
    shared: dict[tuple[str, tuple[int, ...]], tuple[Chunk, _Users]] = {}
    for one in batch:
        for chunk in one.chunks:
            shared.setdefault((chunk.entry.name, chunk.cell), (chunk, []))[1].append(one)
    return shared.values()


def _check_ratio(chunk: Chunk, size: int) -> None:
    document = chunk.entry.document
    if document.chunk_bytes > _RATIO * (size + _SLACK):
        raise DamagedError(
            f"array {chunk.entry.name!r} cannot be read: its chunk {document.key(chunk.cell)!r} has "
            f"{size} bytes, which cannot be {document.chunk_bytes}"
        )


class _Stretch:
    """The bytes of a stretch of a file, one after the other."""

    def __init__(self, fetch: Callable[[int, int], Buffer], start: int, end: int) -> None:
        self._fetch, self._at, self._end = fetch, start, end

    def read(self, size: int, /) -> Buffer:
        """Return so many bytes, or those that are left."""
        at = self._at
        self._at = min(self._end, at + size)
        return self._fetch(at, self._at) if at < self._at else b""


def _filled(frame: Frame, into: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(into), _PORTION):
        frame.fill(into[at : at + _PORTION])
        yield into[at : at + _PORTION]


def _run(users: _Users, act: _Act, done: _Done) -> None:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 raised again where the results are taken
        done.put((users, error))
    else:
        done.put((users, None))


def _finished(done: _Done) -> list[Wanted]:
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


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
