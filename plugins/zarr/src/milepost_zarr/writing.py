"""When pieces are fetched, and how many files are made at once; zarr-python makes them.

The rule: memory stays within the budget by beginning a file only when there is room for it, and for its piece where
that must be fetched. A file belongs to one piece and is written whole, so that no two threads, and no two hosts, write
the same one, and zarr-python need not read what was there. Each thread runs its own event loop: that of zarr-python is
one for all, where one file would wait for the checksum of another.
"""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from milepost.errors import ConfigError
from milepost.protocols import Box

from milepost_zarr.dtypes import Kind, kind

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

    from milepost.protocols import Array, Location, Piece, WriteOptions
    from zarr import AsyncArray

    from milepost_zarr.grid import Grid

__all__ = ["write"]

T = TypeVar("T")


class _Part(NamedTuple):
    """A piece to write: how its array is cut, its own box, and what memory it takes to hold it and to make a file."""

    piece: Piece
    grid: Grid
    kind: Kind
    box: Box

    @property
    def held(self) -> int:
        """The bytes that its data take once they are fetched, beyond what is in memory anyway."""
        return 0 if self.piece.view else math.prod(self.box.shape) * self.kind.itemsize

    @property
    def made(self) -> int:
        """The bytes that a file takes while it is made: its chunks, what they are packed into, and the file."""
        return 3 * math.prod(map(min, self.grid.file, self.box.shape)) * self.kind.itemsize


def write(location: Location, pieces: Sequence[Piece], cut: Callable[[Piece], Grid], options: WriteOptions) -> None:
    """Write every file of every piece."""
    parts = [_part(piece, cut(piece)) for piece in pieces]
    _refuse_twins(parts)
    if not parts:
        return
    with (
        _Loops() as loops,
        ThreadPoolExecutor(max(1, options.threads), thread_name_prefix="milepost-zarr-write") as pool,
    ):
        arrays = pool.submit(loops.run, lambda: _opened(location, parts)).result()
        _Work(loops, options.budget).run(pool, [_Files(part, arrays[part.piece.spec.name]) for part in parts])


async def _opened(location: Location, parts: Iterable[_Part]) -> dict[str, AsyncArray[Any]]:
    from milepost_zarr.metadata import open_arrays
    from milepost_zarr.store import GroupStore

    return await open_arrays(GroupStore(location), {part.piece.spec.name: None for part in parts})


def _part(piece: Piece, grid: Grid) -> _Part:
    spec = piece.spec
    box = piece.box if piece.box is not None else Box((0,) * len(spec.shape), spec.shape)
    found = kind(spec.dtype)
    assert found is not None  # noqa: S101 checked for all pieces at once, for one error that names them all
    for start, n, most, unit in zip(box.start, box.shape, grid.shape, grid.file, strict=True):
        if start % unit or ((start + n) % unit and start + n != most):
            raise ValueError(f"a piece of array {spec.name!r} is no box of whole files of {grid.file}: {box}")
    return _Part(piece, grid, found, box)


def _refuse_twins(parts: Iterable[_Part]) -> None:
    known: set[tuple[str, Box]] = set()
    for part in parts:
        key = (part.piece.spec.name, part.box)
        if key in known:
            raise ValueError(f"a piece was given twice: of {part.piece.spec.name!r}")
        known.add(key)


class _Loops:
    """An event loop for each thread that runs anything."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: list[asyncio.Runner] = []

    def run(self, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run to its end what is to be awaited."""
        import asyncio

        if not hasattr(self._own, "runner"):
            # With a factory, nothing outside the runner learns of its loop.
            self._own.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            self._all.append(self._own.runner)
        result: T = self._own.runner.run(act())
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close all loops, which no thread runs any more."""
        # Not in the caller's thread, which may run an event loop.
        with ThreadPoolExecutor(1, thread_name_prefix="milepost-zarr-close") as pool:
            for _ in pool.map(lambda runner: runner.close(), self._all):
                pass


class _Work:
    """One call of `write`."""

    def __init__(self, loops: _Loops, budget: int) -> None:
        self._loops, self._budget = loops, budget
        self._changed = threading.Condition()
        self._stopped = False
        self._held = self._running = 0

    def run(self, pool: ThreadPoolExecutor, pieces: Iterable[_Files]) -> None:
        """Hand files to the pool as the budget allows; raise the first error."""
        futures: list[Future[None]] = []
        try:
            for files, index, cost in itertools.chain.from_iterable(piece.jobs() for piece in pieces):
                if not self._take(cost):
                    break
                futures.append(pool.submit(self._guarded, files, index))
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            with self._changed:
                self._stopped = True
        for error in filter(None, (future.exception() for future in futures)):
            raise error

    def _take(self, cost: int) -> bool:
        """Wait until there is room, or nothing else to wait for; False once an error stopped everything."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._running or self._held + cost <= self._budget,
            )
            self._held += cost
            self._running += 1
            return not self._stopped

    def _guarded(self, files: _Files, index: tuple[int, ...]) -> None:
        if self._stopped:
            return
        try:
            freed = files.write(index, self._loops)
        except BaseException:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            raise
        else:
            with self._changed:
                self._held -= freed
                self._running -= 1
                self._changed.notify_all()


class _Files:
    """The files of one piece: its data come with the first of them and go with the last."""

    def __init__(self, part: _Part, array: AsyncArray[Any]) -> None:
        self._part, self._array = part, array
        if (array.shards or array.chunks) != part.grid.file:
            raise ConfigError(
                f"array {part.piece.spec.name!r} was created with files of {array.shards or array.chunks}: "
                f"this host would write files of {part.grid.file}"
            )
        self._left = math.prod(-(-n // unit) for n, unit in zip(part.box.shape, part.grid.file, strict=True))
        self._lock = threading.Lock()
        self._data: Array | None = None

    def jobs(self) -> Iterator[tuple[_Files, tuple[int, ...], int]]:
        """Yield every file, and the memory that it takes; the first one also takes what the piece does."""
        held = self._part.held
        for index in self._part.grid.files(self._part.box):
            yield self, index, held + self._part.made
            held = 0

    def write(self, index: tuple[int, ...], loops: _Loops) -> int:
        """Write one file; return how many bytes of memory that gives back."""
        frame = self._part.grid.frame(index)
        inside = _slices(tuple(a - b for a, b in zip(frame.start, self._part.box.start, strict=True)), frame.shape)
        data = self._fetched()[(*inside, ...)]
        loops.run(lambda: self._array.setitem(_slices(frame.start, frame.shape), data))
        with self._lock:
            self._left -= 1
            if self._left:
                return self._part.made
            self._data = None
            return self._part.made + self._part.held

    def _fetched(self) -> Array:
        with self._lock:
            if self._data is None:
                self._data = self._fetch()
            return self._data

    def _fetch(self) -> Array:
        part = self._part
        data: Array | None = part.piece.fetch()
        assert data is not None  # noqa: S101 a piece has data
        if data.shape != part.box.shape or data.dtype != part.kind.dtype:
            raise ValueError(
                f"array {part.piece.spec.name!r} was announced as {part.kind.dtype}{list(part.box.shape)}: "
                f"what came is {data.dtype}{list(data.shape)}"
            )
        return data.view(part.kind.stored)


def _slices(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
