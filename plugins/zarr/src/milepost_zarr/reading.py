"""How files of chunks are read: which chunks, in what order, into whose memory.

The rule: only chunks that are wanted are read, each once for all requests of a batch, and checked before a byte of it
is given away. A chunk that is not there is an error: what Zarr calls a fill value is never invented here. Requests are
taken in batches that fit the budget, and before memory beyond it is taken, the files must be as large as the record
says.
"""

from __future__ import annotations

import functools
import itertools
import math
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from milepost.errors import ChecksumError, MismatchError, MissingDataError, NotFoundError
from milepost.protocols import Box, ReadsInto

from milepost_zarr.codecs import SUM, checksum
from milepost_zarr.grid import file_key, intersect
from milepost_zarr.record import Entry, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from milepost.protocols import Array, Json, Location, ReadOptions, ReadRequest

__all__ = ["read"]

_ABSENT = (1 << 64) - 1
"""What an index says, as offset and as length, of a chunk that is not stored."""

_INDEX = np.dtype("<u8")
"""Offsets and lengths in an index."""

_ALIGN = 64
_RUN = 4 << 20
"""The most that is read at once of chunks that lie side by side."""

_DENSEST = 1 << 16
"""How many bytes one stored byte can stand for; Zstandard reaches half of that with zeros."""

_MINDING = 512
"""Bytes that it takes to know of one chunk."""

_File: TypeAlias = "tuple[str, tuple[int, ...]]"
_Task: TypeAlias = "tuple[list[_Wanted], Callable[[], None]]"
_Done: TypeAlias = "queue.SimpleQueue[tuple[list[_Wanted], BaseException | None]]"


class _Wanted:
    """One request: what is wanted, the result, and how many files it waits for."""

    __slots__ = ("box", "entry", "index", "nbytes", "out", "waits")

    def __init__(self, index: int, entry: Entry, box: Box) -> None:
        self.index, self.entry, self.box = index, entry, box
        self.nbytes: int = math.prod(box.shape) * entry.kind.itemsize
        self.out: Array | None = None
        self.waits = 0

    @property
    def weight(self) -> int:
        """What memory reading it takes: for the result, for a chunk that it is a part of, for minding its chunks."""
        return max(self.nbytes, self.entry.chunk_bytes, _MINDING * self.entry.grid.touched(self.box))

    def allocate(self) -> None:
        """Make room for the result, unless there is."""
        if self.out is None:
            self.out = np.ndarray(self.box.shape, self.entry.kind.dtype, _aligned(self.nbytes))

    def put(self, part: Box, data: Array, start: tuple[int, ...]) -> None:
        """Copy a part of what begins at an index of the array."""
        assert self.out is not None  # noqa: S101 allocated before any read that copies
        _region(self.out, part, self.box.start)[...] = _region(data, part, start)

    def take(self) -> tuple[int, Array]:
        """Give the result away."""
        out, self.out = self.out, None
        assert out is not None  # noqa: S101 given away once, when nothing is waited for
        return self.index, out


class _Chunk(NamedTuple):
    """A chunk to read: its index in the file, its box of the array, and who wants which part."""

    at: tuple[int, ...]
    box: Box
    users: list[tuple[_Wanted, Box]]


def read(
    location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
) -> Iterator[tuple[int, Array]]:
    """Check records and requests; return an iterator over what is read then."""
    entries = parse(records)
    wanted = [_resolve(index, request, entries) for index, request in enumerate(requests)]
    wanted.sort(key=lambda one: (one.entry.path, one.box.start))
    return _Reader(location, options).stream(wanted)


def _resolve(index: int, request: ReadRequest, entries: dict[str, Entry]) -> _Wanted:
    entry = entries.get(request.name)
    if entry is None:
        raise MissingDataError(f"array {request.name!r} is not in the Zarr group")
    box = entry.box if request.box is None else request.box
    shape = entry.grid.shape
    if len(box.start) != len(shape) or not all(
        0 <= a <= a + n <= most for a, n, most in zip(box.start, box.shape, shape, strict=True)
    ):
        raise MismatchError(f"array {request.name!r} of shape {shape} has no {box}")
    return _Wanted(index, entry, box)


class _Reader:
    """One call of `read`."""

    def __init__(self, location: Location, options: ReadOptions) -> None:
        self._storage, self._prefix, self._options = location.storage, location.prefix, options
        self._into = location.storage if isinstance(location.storage, ReadsInto) else None
        self._run = min(_RUN, options.budget // (4 * options.threads))
        self._scratch = threading.local()

    def stream(self, wanted: Sequence[_Wanted]) -> Iterator[tuple[int, Array]]:
        """Read batch after batch, as many at once as the budget allows; yield each result when it is whole."""
        done: _Done = queue.SimpleQueue()
        batches = _batches(wanted, self._options.budget // 2)
        batch = next(batches, None)
        held = running = 0
        with ThreadPoolExecutor(self._options.threads, thread_name_prefix="milepost-zarr-read") as pool:
            try:
                while batch is not None or running:
                    if batch is not None and (not running or held + _cost(batch) <= self._options.budget):
                        tasks = self._plan(batch, pool)
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

    def _plan(self, batch: Sequence[_Wanted], pool: ThreadPoolExecutor) -> list[_Task]:
        """Turn a batch into one task for each file that it touches."""
        self._check_sizes(batch, pool)
        files: dict[_File, tuple[Entry, list[_Wanted]]] = {}
        for one in batch:
            for index in one.entry.grid.files(one.box):
                files.setdefault((one.entry.path, index), (one.entry, []))[1].append(one)
                one.waits += 1
        tasks: list[_Task] = []
        for (_, index), (entry, users) in files.items():
            if len(users) == 1 and _is_plain(entry, users[0]):
                tasks.append((users, functools.partial(self._read_plain, users[0], index)))
                continue
            tasks.append((users, functools.partial(self._read_file, entry, index, users)))
            for one in users:
                one.allocate()
        for one in batch:
            if not one.waits:
                one.allocate()
        return tasks

    def _check_sizes(self, batch: Sequence[_Wanted], pool: ThreadPoolExecutor) -> None:
        """Look whether files are as large as they must be, before more memory than the budget is taken for them."""
        for one in batch:
            if one.weight > self._options.budget // 2:
                check = functools.partial(self._check_size, one.entry)
                # A few at a time: of files that a lying record invents there may be any number.
                indices = one.entry.grid.files(one.box)
                while some := list(itertools.islice(indices, 4 * self._options.threads)):
                    for _ in pool.map(check, some):
                        pass

    def _check_size(self, entry: Entry, index: tuple[int, ...]) -> None:
        key = file_key(self._prefix, entry.path, index)
        try:
            size = self._storage.size(key)
        except NotFoundError as error:
            raise _gone(entry, key) from error
        chunks = math.prod(entry.grid.used(entry.grid.frame(index)))
        if entry.codec.name == "none":
            least = chunks * (entry.chunk_bytes + SUM) + _tail(entry)
        else:
            least = max(_tail(entry), chunks * entry.chunk_bytes // _DENSEST)
        if size < least:
            raise _short(entry, key, size, least)

    # --- one file ---

    def _read_plain(self, one: _Wanted, index: tuple[int, ...]) -> None:
        """Read a file that is just what is wanted, and its checksum, into the memory that is given away."""
        entry, key = one.entry, file_key(self._prefix, one.entry.path, index)
        raw = _aligned(one.nbytes + SUM)
        self._fill(entry, key, 0, raw)
        self._check(entry, key, raw)
        one.out = np.ndarray(one.box.shape, entry.kind.dtype, raw)

    def _read_file(self, entry: Entry, index: tuple[int, ...], users: list[_Wanted]) -> None:
        """Read the chunks of one file that anybody wants."""
        key, frame = file_key(self._prefix, entry.path, index), entry.grid.frame(index)
        chunks: dict[tuple[int, ...], _Chunk] = {}
        for one in users:
            within = intersect(frame, one.box)
            assert within is not None  # noqa: S101 the file was chosen because it is touched
            for at, box in entry.grid.chunks(frame, within):
                part = intersect(box, one.box)
                assert part is not None  # noqa: S101 as above
                chunks.setdefault(at, _Chunk(at, box, [])).users.append((one, part))
        if entry.codec.name != "none" and not entry.grid.sharded:
            self._read_packed(entry, key, next(iter(chunks.values())))
            return
        if entry.grid.sharded:
            table, end = self._read_index(entry, key)
            ranges = [(*_range(entry, key, table[at], end), chunk) for at, chunk in chunks.items()]
        else:
            ranges = [(0, entry.chunk_bytes + SUM, chunk) for chunk in chunks.values()]
        for run in _runs(sorted(ranges, key=lambda it: it[0]), self._run):
            self._read_run(entry, key, run)

    def _read_packed(self, entry: Entry, key: str, chunk: _Chunk) -> None:
        """Read a file that is one compressed chunk."""
        limit = entry.codec.most(entry.chunk_bytes) + SUM
        try:
            data = np.frombuffer(self._storage.read(key, 0, limit), np.uint8)
        except NotFoundError as error:
            raise _gone(entry, key) from error
        self._deliver(entry, key, chunk, data)

    def _read_run(self, entry: Entry, key: str, run: list[tuple[int, int, _Chunk]]) -> None:
        low, high = run[0][0], run[-1][1]
        raw = self._scratch_bytes(high - low)
        self._fill(entry, key, low, raw)
        for start, stop, chunk in run:
            self._deliver(entry, key, chunk, raw[start - low : stop - low])

    def _deliver(self, entry: Entry, key: str, chunk: _Chunk, raw: Array) -> None:
        """Check and unpack a chunk, and copy it to whoever wants of it."""
        self._check(entry, key, raw)
        body = raw[:-SUM]
        if entry.codec.name != "none":
            packed, body = body, np.empty(entry.chunk_bytes, np.uint8)
            try:
                entry.codec.decode(packed, body)
            except ValueError as error:
                raise ChecksumError(
                    f"array {entry.name!r} is damaged in file {key!r}: a chunk cannot be unpacked, {error}"
                ) from error
        data = np.ndarray(entry.grid.chunk, entry.kind.dtype, body)
        for one, part in chunk.users:
            one.put(part, data, chunk.box.start)

    def _read_index(self, entry: Entry, key: str) -> tuple[Array, int]:
        try:
            size = self._storage.size(key)
        except NotFoundError as error:
            raise _gone(entry, key) from error
        end = size - _tail(entry)
        if end < 0:
            raise _short(entry, key, size, _tail(entry))
        raw: Array = np.empty(_tail(entry), np.uint8)
        self._fill(entry, key, end, raw)
        if checksum(raw[:-SUM]) != raw[-SUM:].tobytes():
            raise ChecksumError(f"array {entry.name!r} is damaged in file {key!r}: its index is not what was saved")
        return raw[:-SUM].view(_INDEX).reshape(*entry.grid.counts, 2), end

    # --- bytes ---

    def _fill(self, entry: Entry, key: str, start: int, raw: Array) -> None:
        try:
            if self._into is not None:
                got = self._into.read_into(key, start, raw.data)
            else:
                data = self._storage.read(key, start, start + len(raw))
                got = len(data)
                raw[:got] = np.frombuffer(data, np.uint8)
        except NotFoundError as error:
            raise _gone(entry, key) from error
        if got != len(raw):
            raise _short(entry, key, start + got, start + len(raw))

    def _check(self, entry: Entry, key: str, raw: Array) -> None:
        if self._options.verify:
            found, saved = checksum(raw[:-SUM]), raw[-SUM:].tobytes()
            if found != saved:
                raise ChecksumError(
                    f"array {entry.name!r} is damaged in file {key!r}: "
                    f"{len(raw) - SUM} bytes have checksum {found[::-1].hex()}, those saved had {saved[::-1].hex()}"
                )

    def _scratch_bytes(self, size: int) -> Array:
        if len(getattr(self._scratch, "bytes", ())) < size:
            self._scratch.bytes = _aligned(size)
        scratch: Array = self._scratch.bytes
        return scratch[:size]


def _is_plain(entry: Entry, one: _Wanted) -> bool:
    """Say whether a request is for an array that is one chunk in one file, as it is in memory."""
    return entry.codec.name == "none" and entry.grid.chunk == entry.grid.file == one.box.shape == entry.grid.shape


def _tail(entry: Entry) -> int:
    """Return the bytes of a file's index and its checksum."""
    return 2 * _INDEX.itemsize * math.prod(entry.grid.counts) + SUM if entry.grid.sharded else 0


def _range(entry: Entry, key: str, row: Array, end: int) -> tuple[int, int]:
    start, length = map(int, row)
    if start == length == _ABSENT:
        raise MissingDataError(f"array {entry.name!r} cannot be read: file {key!r} lacks a chunk of it")
    if not SUM <= length <= entry.codec.most(entry.chunk_bytes) + SUM or start + length > end:
        raise MissingDataError(
            f"array {entry.name!r} cannot be read: the index of file {key!r} speaks of {length} bytes at {start}"
        )
    return start, start + length


def _runs(ranges: Iterable[tuple[int, int, _Chunk]], most: int) -> Iterator[list[tuple[int, int, _Chunk]]]:
    """Gather chunks that lie side by side, up to so many bytes, into one read."""
    run: list[tuple[int, int, _Chunk]] = []
    for one in ranges:
        if run and (one[0] != run[-1][1] or one[1] - run[0][0] > most):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _gone(entry: Entry, key: str) -> MissingDataError:
    return MissingDataError(f"array {entry.name!r} cannot be read: file {key!r} is gone")


def _short(entry: Entry, key: str, size: int, least: int) -> MissingDataError:
    return MissingDataError(
        f"array {entry.name!r} cannot be read: file {key!r} has {size} bytes where {least} must be at least"
    )


def _run(users: list[_Wanted], act: Callable[[], None], done: _Done) -> None:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 raised again where the results are taken
        done.put((users, error))
    else:
        done.put((users, None))


def _finished(done: _Done) -> list[_Wanted]:
    """Wait for one file; return the requests that it completed."""
    users, error = done.get()
    if error is not None:
        raise error
    ready = []
    for one in users:
        one.waits -= 1
        if not one.waits:
            ready.append(one)
    return ready


def _batches(wanted: Iterable[_Wanted], size: int) -> Iterator[list[_Wanted]]:
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


def _cost(batch: Iterable[_Wanted]) -> int:
    return sum(one.nbytes for one in batch)


def _region(array: Array, part: Box, start: tuple[int, ...]) -> Array:
    """Return the view of a part within an array that begins at an index."""
    sides = zip(part.start, part.shape, start, strict=True)
    where: tuple[Any, ...] = (*(slice(at - low, at - low + n) for at, n, low in sides), ...)
    view: Array = array[where]
    return view


def _aligned(size: int) -> Array:
    """Return uninitialised bytes that begin at an aligned address."""
    raw: Array = np.empty(size + _ALIGN, np.uint8)
    at = -raw.__array_interface__["data"][0] % _ALIGN
    return raw[at : at + size]
