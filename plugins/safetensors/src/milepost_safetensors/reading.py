"""How packed files are read: which bytes, in what order, into whose memory.

The rule: a byte goes from the storage to where it is wanted with as few copies as its place allows, and is checked
while the cache still holds it. Requests are taken in the order of the files, in batches that fit the budget; each
block that a batch needs is read once, however many requests share it.
"""

from __future__ import annotations

import functools
import math
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import xxhash
from milepost.errors import ChecksumError, MismatchError, MissingDataError, NotFoundError
from milepost.protocols import Box, MapsFiles, PrefersLargeRequests, ReadsInto

from milepost_safetensors.layout import ALIGN, BLOCK, SMALL, intersect, spans, uncovered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from milepost.protocols import Array, Location, ReadOptions, ReadRequest

    from milepost_safetensors.record import Entry, Stored

__all__ = ["read"]

_GROUP = 1 << 20
"""What small pieces are read in; small too, because one of them that lives on keeps all of it."""


_GAP = 1 << 20
"""How many bytes that nobody wants are read rather than asked around, where a request costs more."""


class _Wanted:
    """One request: what is wanted, the stored pieces that have it, the result, and how many reads it waits for."""

    __slots__ = ("box", "entry", "index", "nbytes", "out", "parts", "waits")

    def __init__(self, index: int, entry: Entry, box: Box, parts: list[tuple[Stored, Box]]) -> None:
        self.index, self.entry, self.box, self.parts = index, entry, box, parts
        whole = len(parts) == 1 and parts[0][0].box is box
        self.nbytes: int = parts[0][0].nbytes if whole else math.prod(box.shape) * entry.kind.itemsize
        self.out: Array | None = None
        self.waits = 0

    def allocate(self) -> None:
        """Make room for the result."""
        flat = _aligned(self.nbytes)
        self.out = np.ndarray(self.box.shape, self.entry.kind.dtype, flat)

    def region(self, part: Box) -> Array:
        """Return a view of where a part belongs."""
        assert self.out is not None  # noqa: S101 allocated before any read that copies
        return _region(self.out, part, self.box)

    def take(self) -> tuple[int, Array]:
        """Give the result away."""
        out, self.out = self.out, None
        assert out is not None  # noqa: S101 given away once, when nothing is waited for
        return self.index, out


_Users: TypeAlias = "list[tuple[_Wanted, Box]]"
_Block: TypeAlias = "tuple[Stored, int, _Users]"
_Task: TypeAlias = "tuple[list[_Wanted], Callable[[], None]]"
_Done: TypeAlias = "queue.SimpleQueue[tuple[list[_Wanted], BaseException | None]]"


def read(
    location: Location, entries: Mapping[str, Entry], requests: Sequence[ReadRequest], options: ReadOptions
) -> Iterator[tuple[int, Array]]:
    """Check requests and the sizes of files; return an iterator over what is read then.

    The files may be others': a piece without checksums is not checked, and may lie anywhere.
    """
    wanted = [_resolve(index, request, entries) for index, request in enumerate(requests)]
    wanted.sort(key=lambda one: (one.parts[0][0].file.name, one.parts[0][0].offset) if one.parts else ("", 0))
    return _Reader(location, options, wanted).stream(wanted)


def _resolve(index: int, request: ReadRequest, entries: Mapping[str, Entry]) -> _Wanted:
    entry = entries.get(request.name)
    if entry is None:
        raise MissingDataError(f"array {request.name!r} is in none of the packed files")
    box = entry.box if request.box is None else request.box
    only = entry.pieces[0]
    if only.box is box:
        return _Wanted(index, entry, box, [(only, box)] if only.nbytes else [])
    shape = entry.box.shape
    if len(box.start) != len(shape) or not all(
        0 <= a <= a + n <= most for a, n, most in zip(box.start, box.shape, shape, strict=True)
    ):
        raise MismatchError(f"array {request.name!r} of shape {shape} has no {box}")
    if 0 in box.shape:
        return _Wanted(index, entry, box, [])
    # Several hosts may have written the same box; one of them is enough.
    pieces = {piece.box: piece for piece in entry.pieces}.values() if only.box != box else (only,)
    parts = [(piece, common) for piece in pieces if (common := intersect(piece.box, box)) is not None]
    missing = uncovered(box, [common for _, common in parts])
    if missing is not None:
        raise MissingDataError(f"array {request.name!r} is stored in part only: {missing} is in none of the files")
    return _Wanted(index, entry, box, parts)


class _Reader:
    """One call of `read`."""

    def __init__(self, location: Location, options: ReadOptions, wanted: Iterable[_Wanted]) -> None:
        self._storage, self._prefix, self._options = location.storage, location.prefix, options
        self._into = location.storage if isinstance(location.storage, ReadsInto) else None
        self._mapper = location.storage if options.mapped and isinstance(location.storage, MapsFiles) else None
        self._maps: dict[str, memoryview] = {}
        self._given: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._scratch = threading.local()
        self._run_bytes = _run_bytes(location, options)
        furthest: dict[str, Stored] = {}
        for one in wanted:
            for piece, _ in one.parts:
                known = furthest.setdefault(piece.file.name, piece)
                if piece.offset > known.offset:
                    furthest[piece.file.name] = piece
        for piece in furthest.values():
            self._check_size(piece)

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

    def _plan(self, batch: Sequence[_Wanted]) -> list[_Task]:
        """Turn a batch into reads: groups of small pieces that lie close together, and blocks of large ones."""
        tasks: list[_Task] = []
        uses: dict[int, tuple[Stored, _Users]] = {}
        for one in batch:
            if self._mapper is not None and self._map(one, tasks):
                continue
            if len(one.parts) != 1 or one.parts[0][0].nbytes >= SMALL or one.parts[0][0].box != one.box:
                one.allocate()
            for piece, part in one.parts:
                uses.setdefault(id(piece), (piece, []))[1].append((one, part))
        groups: list[list[tuple[Stored, _Users]]] = []
        blocks: list[_Block] = []
        for piece, users in sorted(uses.values(), key=lambda use: (use[0].file.name, use[0].offset)):
            if piece.nbytes >= SMALL:
                blocks.extend(_blocks(piece, users))
            elif groups and _near(groups[-1], piece):
                groups[-1].append((piece, users))
            else:
                groups.append([(piece, users)])
        for group in groups:
            sharing = [one for _, users in group for one, _ in users]
            tasks.append((sharing, functools.partial(self._read_group, group)))
        for run in self._runs(blocks):
            sharing = [one for _, _, users in run for one, _ in users]
            tasks.append((sharing, functools.partial(self._read_run, run)))
        for sharing, _ in tasks:
            for one in sharing:
                one.waits += 1
        return tasks

    # --- small pieces ---

    def _read_group(self, group: list[tuple[Stored, _Users]]) -> None:
        low, last = group[0][0].offset, group[-1][0]
        buffer = _aligned(last.offset + last.nbytes - low, low)
        data = buffer.data
        self._fill(last, low, data)
        for piece, users in group:
            at = piece.offset - low
            if self._options.verify:
                self._check(piece, 0, data[at : at + piece.nbytes])
            for number, (one, part) in enumerate(users):
                view = np.ndarray(piece.box.shape, one.entry.kind.dtype, buffer, at)
                if one.out is not None:
                    one.region(part)[...] = _region(view, part, piece.box)
                else:
                    # Each caller owns what it gets, and only files of others hold items where no processor likes them.
                    one.out = view.copy() if number or not view.flags.aligned else view

    # --- blocks of large pieces ---

    def _runs(self, blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
        """Join blocks that lie close together where a request costs more than the bytes of one."""
        run: list[_Block] = []
        for block in blocks:
            alone = not self._is_read_whole(block)
            if run and (alone or not self._fits(run, block)):
                yield run
                run = []
            run.append(block)
            if alone:
                yield run
                run = []
        if run:
            yield run

    def _fits(self, run: list[_Block], block: _Block) -> bool:
        near = _extent([run[-1], block]) - _extent([run[-1]]) - _extent([block]) <= _GAP
        return near and _extent([run[0], block]) <= self._run_bytes

    def _is_read_whole(self, block: _Block) -> bool:
        piece, number, users = block
        if self._options.verify and piece.sums:
            return True
        frame = piece.cut.box(number, piece.box)
        return any(intersect(part, frame) == frame for _, part in users)

    def _read_run(self, run: list[_Block]) -> None:
        """Read blocks by one request and share them out; a block alone needs no detour."""
        if len(run) == 1:
            self._read_block(*run[0])
            return
        low, last = _start(run[0]), run[-1]
        data = self._scratch_bytes(_extent(run))
        self._fill(last[0], low, data.data)
        for piece, number, users in run:
            frame, (start, stop) = piece.cut.box(number, piece.box), piece.cut.span(number)
            at = piece.offset + start - low
            block = data[at : at + stop - start]
            if self._options.verify:
                self._check(piece, number, block.data)
            for one, part in users:
                if (common := intersect(part, frame)) is not None:
                    region = one.region(common)
                    region[...] = _region(np.ndarray(frame.shape, region.dtype, block), common, frame)

    def _read_block(self, piece: Stored, number: int, users: _Users) -> None:
        frame, (start, stop) = piece.cut.box(number, piece.box), piece.cut.span(number)
        shares = [(one.region(common), common) for one, part in users if (common := intersect(part, frame))]
        if self._options.verify and piece.sums:
            self._read_shares(piece, number, shares, [(0, stop - start)])
            return
        for region, part in shares:
            self._read_shares(piece, number, [(region, part)], spans(part, frame, region.itemsize))

    def _read_shares(
        self, piece: Stored, number: int, shares: list[tuple[Array, Box]], ranges: list[tuple[int, int]]
    ) -> None:
        """Read ranges of one block, straight into the one share that has just these bytes, else by way of scratch."""
        frame, (start, stop) = piece.cut.box(number, piece.box), piece.cut.span(number)
        length = ranges[0][1] - ranges[0][0] if len(ranges) == 1 else -1
        target = next((it for it, _ in shares if it.nbytes == length and it.flags.c_contiguous), None)
        data = self._scratch_bytes(stop - start) if target is None else target.reshape(-1).view(np.uint8)
        for low, high in ranges:
            into = data[low:high] if target is None else data
            self._fill(piece, piece.offset + start + low, into.data)
        if self._options.verify:
            self._check(piece, number, data.data)
        for region, part in shares:
            if region is not target:
                region[...] = _region(np.ndarray(frame.shape, region.dtype, data), part, frame)

    def _scratch_bytes(self, size: int) -> Array:
        if not hasattr(self._scratch, "bytes"):
            self._scratch.bytes = _aligned(max(BLOCK, self._run_bytes))
        scratch: Array = self._scratch.bytes
        return scratch[:size]

    # --- mapped files ---

    def _map(self, one: _Wanted, tasks: list[_Task]) -> bool:
        """Let a request have a view of the mapped file, if it is contiguous there and nobody else has those bytes."""
        if len(one.parts) != 1:
            return False
        piece = one.parts[0][0]
        inside = [(0, one.nbytes)] if one.box == piece.box else spans(one.box, piece.box, one.entry.kind.itemsize)
        start, stop = inside[0]
        given = self._given.setdefault((piece.file.name, piece.offset), [])
        if stop - start != one.nbytes or any(start < high and low < stop for low, high in given):
            return False
        if (piece.offset + start) % one.entry.kind.dtype.alignment:
            return False
        given.append((start, stop))
        data = self._mapping(piece)
        one.out = np.ndarray(one.box.shape, one.entry.kind.dtype, data, piece.offset + start)
        numbers = piece.cut.touched(one.box, piece.box) if self._options.verify else ()
        for number in numbers:
            low, high = (piece.offset + at for at in piece.cut.span(number))
            if piece.nbytes < SMALL:
                self._check(piece, number, data[low:high])
            else:
                tasks.append(([one], functools.partial(self._check, piece, number, data[low:high])))
        return True

    def _mapping(self, piece: Stored) -> memoryview:
        name = piece.file.name
        if name not in self._maps:
            assert self._mapper is not None  # noqa: S101 asked for only where files can be mapped
            self._maps[name] = self._mapper.map(self._prefix + name)
            if len(self._maps[name]) != piece.file.size:
                raise self._cut_short(piece, len(self._maps[name]))
        return self._maps[name]

    # --- bytes ---

    def _fill(self, piece: Stored, start: int, buffer: memoryview) -> None:
        key = self._prefix + piece.file.name
        try:
            if self._into is not None:
                got = self._into.read_into(key, start, buffer)
            else:
                data = self._storage.read(key, start, start + len(buffer))
                got = len(data)
                buffer[:got] = data
        except NotFoundError as error:
            raise MissingDataError(f"array {piece.array!r} cannot be read: file {key!r} is gone") from error
        if got != len(buffer):
            raise self._cut_short(piece, start + got)

    def _check(self, piece: Stored, number: int, data: memoryview) -> None:
        if not piece.sums:
            return
        found, saved = xxhash.xxh3_64_hexdigest(data), piece.sums[16 * number : 16 * number + 16]
        if found != saved:
            at = piece.offset + piece.cut.span(number)[0]
            raise ChecksumError(
                f"array {piece.array!r} is damaged in file {self._prefix + piece.file.name!r}: "
                f"the {len(data)} bytes at offset {at} have checksum {found}, those saved had {saved}"
            )

    def _check_size(self, piece: Stored) -> None:
        key = self._prefix + piece.file.name
        try:
            size = self._storage.size(key)
        except NotFoundError as error:
            raise MissingDataError(f"array {piece.array!r} cannot be read: file {key!r} is gone") from error
        if size != piece.file.size:
            raise self._cut_short(piece, size)

    def _cut_short(self, piece: Stored, size: int) -> MissingDataError:
        key = self._prefix + piece.file.name
        return MissingDataError(
            f"array {piece.array!r} cannot be read: file {key!r} has {size} bytes where {piece.file.size} were written"
        )


def _run_bytes(location: Location, options: ReadOptions) -> int:
    """Return how many bytes to read by one request, if they belong to several blocks; 0: no block is joined."""
    storage = location.storage
    if not isinstance(storage, PrefersLargeRequests):
        return 0
    return min(storage.request_bytes, max(BLOCK, options.budget // (4 * options.threads)))


def _blocks(piece: Stored, users: _Users) -> Iterator[_Block]:
    sharing: dict[int, _Users] = {}
    for user in users:
        for number in piece.cut.touched(user[1], piece.box):
            sharing.setdefault(number, []).append(user)
    for number in sorted(sharing):
        yield piece, number, sharing[number]


def _start(block: _Block) -> int:
    piece, number, _ = block
    return int(piece.offset + piece.cut.span(number)[0])


def _extent(run: Sequence[_Block]) -> int:
    """Return the bytes from the first to the last of some blocks; very many if they are in several files."""
    (first, _, _), (last, number, _) = run[0], run[-1]
    if first.file is not last.file:
        return sys.maxsize
    return int(last.offset + last.cut.span(number)[1]) - _start(run[0])


def _run(users: list[_Wanted], act: Callable[[], None], done: _Done) -> None:
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


def _near(group: list[tuple[Stored, _Users]], piece: Stored) -> bool:
    first, last = group[0][0], group[-1][0]
    gap = piece.offset - last.offset - last.nbytes
    return last.file is piece.file and gap < SMALL and piece.offset + piece.nbytes - first.offset <= _GROUP


def _region(array: Array, part: Box, frame: Box) -> Array:
    """Return the view of a part within an array that fills a frame."""
    sides = zip(part.start, part.shape, frame.start, strict=True)
    return array[tuple(slice(at - low, at - low + n) for at, n, low in sides)]


def _aligned(size: int, phase: int = 0) -> Array:
    """Return uninitialised bytes whose address is that of the phase, modulo the alignment of files."""
    raw: Array = np.empty(size + ALIGN, np.uint8)
    at = (phase - raw.__array_interface__["data"][0]) % ALIGN
    return raw[at : at + size]
