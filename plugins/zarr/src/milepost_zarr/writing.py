"""How files of chunks are written: who fetches a piece when, and how its bytes flow.

The rule: memory stays within the budget by fetching a piece only when its bytes may be held, and by making one chunk
of a file at a time, as the storage asks for it. Every file belongs to one piece, so that no two threads, and no two
hosts, write the same one.
"""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from milepost.protocols import Box

from milepost_zarr.codecs import SUM, Codec, as_bytes, checksum
from milepost_zarr.dtypes import Kind, kind
from milepost_zarr.naming import path_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from milepost.protocols import Array, Buffer, Location, Piece, WriteOptions

    from milepost_zarr.grid import Grid

__all__ = ["ABSENT", "INDEX", "file_key", "write"]

ABSENT = (1 << 64) - 1
"""What an index says, as offset and as length, of a chunk that is not stored."""

INDEX = np.dtype("<u8")
"""Offsets and lengths in an index."""


def file_key(prefix: str, path: str, index: tuple[int, ...]) -> str:
    """Return the key of a file of an array.

    >>> file_key("7/state/", "params/w", (0, 3)), file_key("", "b", ())
    ('7/state/params/w/c.0.3', 'b/c')
    """
    # With dots, not slashes: every folder that need not be made is one that need not be made durable.
    return f"{prefix}{path}/{'.'.join(['c', *map(str, index)])}"


class _Part(NamedTuple):
    """A piece to write: how its array is cut, its own box, and its bytes."""

    piece: Piece
    grid: Grid
    kind: Kind
    box: Box
    nbytes: int


def write(
    location: Location, pieces: Sequence[Piece], cut: Callable[[Piece], Grid], codec: Codec, options: WriteOptions
) -> None:
    """Write every file of every piece."""
    parts = [_part(piece, cut(piece)) for piece in pieces]
    _refuse_twins(parts)
    work = _Work(location, codec, options)
    with ThreadPoolExecutor(max(1, options.threads), thread_name_prefix="milepost-zarr-write") as pool:
        work.run(pool, parts)


def _part(piece: Piece, grid: Grid) -> _Part:
    spec = piece.spec
    box = piece.box if piece.box is not None else Box((0,) * len(spec.shape), spec.shape)
    found = kind(spec.dtype)
    assert found is not None  # noqa: S101 checked for all pieces at once, for one error that names them all
    for start, n, most, unit in zip(box.start, box.shape, grid.shape, grid.file, strict=True):
        if start % unit or ((start + n) % unit and start + n != most):
            raise ValueError(f"a piece of array {spec.name!r} is no box of whole files of {grid.file}: {box}")
    return _Part(piece, grid, found, box, math.prod(box.shape) * found.itemsize)


def _refuse_twins(parts: Iterable[_Part]) -> None:
    known: set[tuple[str, Box]] = set()
    for part in parts:
        key = (part.piece.spec.name, part.box)
        if key in known:
            raise ValueError(f"a piece was given twice: of {part.piece.spec.name!r}")
        known.add(key)


class _StoppedError(Exception):
    """Another file failed, so this one is given up."""


class _Work:
    """One call of `write`."""

    def __init__(self, location: Location, codec: Codec, options: WriteOptions) -> None:
        self._location, self._codec, self._budget = location, codec, options.budget
        self._stop = threading.Event()
        self._held = 0
        self._changed = threading.Condition()
        self._futures: list[Future[None]] = []

    def run(self, pool: ThreadPoolExecutor, parts: Sequence[_Part]) -> None:
        """Hand pieces to the pool as the budget allows; raise the first error."""
        try:
            for part in parts:
                if not self._take(part):
                    break
                self._futures.append(pool.submit(self._guarded, self._start, pool, part))
            done = 0
            while done < len(self._futures):  # a piece adds a future for each of its files but the first
                done = len(self._futures)
                wait(self._futures, return_when=FIRST_EXCEPTION)
        finally:
            self._stop.set()
        errors = [error for error in (future.exception() for future in self._futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def _take(self, part: _Part) -> bool:
        """Wait until the bytes of a piece may be held; False once an error stopped everything."""
        size = 0 if part.piece.view else part.nbytes
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or not self._held or self._held + size <= self._budget)
            self._held += size
        return not self._stop.is_set()

    def _give(self, part: _Part) -> None:
        with self._changed:
            self._held -= 0 if part.piece.view else part.nbytes
            self._changed.notify_all()

    def _guarded(self, act: Callable[..., None], *args: object) -> None:
        try:
            act(*args)
        except BaseException:
            with self._changed:
                self._stop.set()
                self._changed.notify_all()
            raise

    def _start(self, pool: ThreadPoolExecutor, part: _Part) -> None:
        """Fetch a piece and write its first file; leave its other files to whoever is free."""
        files = _Files(part, self._give)
        if not files.indices:
            return
        for index in files.indices[1:]:
            self._futures.append(pool.submit(self._guarded, self._write, files, index))
        self._write(files, files.indices[0])

    def _write(self, files: _Files, index: tuple[int, ...]) -> None:
        key = file_key(self._location.prefix, path_of(files.name), index)
        self._location.storage.write(key, self._chunks(files, index))
        files.done()

    def _chunks(self, files: _Files, index: tuple[int, ...]) -> Iterator[Buffer]:
        grid, data = files.grid, files.region(index)
        used = grid.used(grid.frame(index))
        offset, table = 0, np.full((*grid.counts, 2), ABSENT, INDEX)
        for at in itertools.product(*map(range, used)):
            if self._stop.is_set():
                raise _StoppedError
            body = self._codec.encode(_chunk(data, at, grid.chunk))
            yield body.data
            yield checksum(body)
            table[at] = offset, len(body) + SUM
            offset += len(body) + SUM
        if grid.sharded:
            raw = as_bytes(table)
            yield raw.tobytes() + checksum(raw)


class _Files:
    """The files of one piece: its data go when the last of them is written."""

    def __init__(self, part: _Part, written: Callable[[_Part], None]) -> None:
        self.name, self.grid = part.piece.spec.name, part.grid
        self.indices: list[tuple[int, ...]] = list(part.grid.files(part.box))
        self._start, self._part, self._written = part.box.start, part, written
        self._left, self._lock = len(self.indices), threading.Lock()
        data: Array | None = part.piece.fetch()
        assert data is not None  # noqa: S101 a piece has data
        if data.shape != part.box.shape or data.dtype != part.kind.dtype:
            raise ValueError(
                f"array {self.name!r} was announced as {part.kind.dtype}{list(part.box.shape)}: "
                f"what came is {data.dtype}{list(data.shape)}"
            )
        self._data: Array | None = data.view(part.kind.stored)
        if not self.indices:
            self._finish()

    def region(self, index: tuple[int, ...]) -> Array:
        """Return the view of a file's part of the piece."""
        frame = self.grid.frame(index)
        assert self._data is not None  # noqa: S101 kept until the last file is done
        sides = zip(frame.start, frame.shape, self._start, strict=True)
        where: tuple[Any, ...] = (*(slice(at - low, at - low + n) for at, n, low in sides), ...)
        view: Array = self._data[where]
        return view

    def done(self) -> None:
        """Say that one more file is written."""
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

    def _finish(self) -> None:
        self._data = None
        self._written(self._part)


def _chunk(data: Array, at: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Return a chunk of a file, contiguous, padded with zeros where it ends beyond the array."""
    where: tuple[Any, ...] = (*(slice(i * n, (i + 1) * n) for i, n in zip(at, shape, strict=True)), ...)
    part: Array = data[where]
    if part.shape == shape:
        return np.ascontiguousarray(part).reshape(shape)
    padded: Array = np.zeros(shape, part.dtype)
    padded[tuple(slice(n) for n in part.shape)] = part
    return padded
