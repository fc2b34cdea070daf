"""How packed files are written: who fetches a piece when, and when its bytes are hashed.

The rule: memory stays bounded by one piece for each file under way, and every byte is touched once: a piece is fetched
when its turn comes, its bytes are hashed slice by slice on their way to the storage, and it is dropped before the next.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from milepost.protocols import PrefersLargeRequests

from milepost_safetensors import dtypes, layout
from milepost_safetensors.record import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from milepost.protocols import Array, Json, Location, Piece, WriteOptions

__all__ = ["write"]

_SLICE = 1 << 20
_REQUESTS = 8  # that a file is worth, where they cost something


class _StoppedError(Exception):
    """Another file failed, so this one is given up."""


def write(location: Location, pieces: Sequence[Piece], options: WriteOptions) -> Json:
    """Write the pieces to files of this host; return the record of them."""
    stop = threading.Event()
    with _resting_collector():
        dtypes.check(piece.spec for piece in pieces)
        slots = [_slot(piece) for piece in pieces]
        _refuse_twins(slots)
        largest = max((slot.nbytes for slot in slots if not slot.piece.view), default=0)
        threads = _most_files(location, options, sum(slot.nbytes for slot in slots))
        most = min(threads, options.budget // largest) if largest else threads
        files = [_File(location, number, lane, stop) for number, lane in enumerate(layout.lanes(slots, most))]
    if len(files) == 1:
        files[0].write()
    elif files:
        _write_all(files, stop, max(most, 1))
    with _resting_collector():
        return {"format": FORMAT, "files": [file.record() for file in files]}


def _most_files(location: Location, options: WriteOptions, nbytes: int) -> int:
    """Return how many files may be written at once."""
    storage = location.storage
    if not isinstance(storage, PrefersLargeRequests):
        return options.threads
    # Each file costs requests of its own, which a few large ones have to be worth.
    return max(1, min(options.threads, storage.writes_at_once, nbytes // (_REQUESTS * storage.request_bytes)))


@contextlib.contextmanager
def _resting_collector() -> Iterator[None]:
    """Keep the garbage collector from walking the heap while many small objects are made, none of them garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _write_all(files: Sequence[_File], stop: threading.Event, threads: int) -> None:
    with ThreadPoolExecutor(min(threads, len(files)), thread_name_prefix="milepost-write") as pool:
        futures = [pool.submit(file.write) for file in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    _raise_first(futures)


def _raise_first(futures: Sequence[Future[None]]) -> None:
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
        raise error


def _slot(piece: Piece) -> layout.Slot:
    spec, box = piece.spec, piece.box
    if box is not None and box.shape == spec.shape:
        box = None
    shape = spec.shape if box is None else box.shape
    kind = dtypes.kind(spec.dtype)
    assert kind is not None  # noqa: S101 checked for all pieces at once, for one error that names them all
    nbytes = kind.itemsize
    for n in shape:
        nbytes *= n
    return layout.Slot(piece, kind, box, shape, nbytes)


def _refuse_twins(slots: Sequence[layout.Slot]) -> None:
    counts = collections.Counter((slot.piece.spec.name, slot.box) for slot in slots)
    twins = [name for (name, _), count in counts.items() if count > 1]
    if twins:
        raise ValueError(f"a piece was given twice: of {', '.join(map(repr, sorted(twins)))}")


class _File:
    """One file under way."""

    def __init__(self, location: Location, number: int, lane: Sequence[layout.Slot], stop: threading.Event) -> None:
        self._location, self._lane, self._stop = location, lane, stop
        self._name = f"arrays-{location.host:05d}-{number:05d}.safetensors"
        self._header, self._offsets, self._size = layout.header(lane)
        self._sums: list[str] = []

    def write(self) -> None:
        """Write it in one go."""
        self._location.storage.write(self._location.prefix + self._name, self._buffers())

    def record(self) -> dict[str, Any]:
        """Return what a reader has to know of it."""
        rows: list[list[Any]] = []
        for slot, offset, sums in zip(self._lane, self._offsets, self._sums, strict=True):
            spec = slot.piece.spec
            row = [spec.name, spec.dtype, list(spec.shape), offset, sums]
            rows.append(row if slot.box is None else [*row, list(slot.box.start), list(slot.box.shape)])
        return {"name": self._name, "size": self._size, "data": len(self._header), "pieces": rows}

    def _buffers(self) -> Iterator[bytes | memoryview]:
        self._sums.clear()
        small, held = [self._header], len(self._header)
        for slot in self._lane:
            if self._stop.is_set():
                raise _StoppedError
            if slot.nbytes < layout.SMALL:
                data = _fetched(slot).tobytes()
                self._sums.append(xxhash.xxh3_64_hexdigest(data) if data else "")
                small.append(data)
                held += len(data)
            else:
                yield b"".join(small)
                small, held = [], 0
                yield from self._slices(slot)
            if pad := layout.padding(slot):
                small.append(bytes(pad))
            if held >= _SLICE:
                yield b"".join(small)
                small, held = [], 0
        yield b"".join(small)

    def _slices(self, slot: layout.Slot) -> Iterator[memoryview]:
        data = np.ascontiguousarray(_fetched(slot)).reshape(-1).view(np.uint8).data
        cut = layout.blocks(slot.shape, slot.kind.itemsize)
        sums = []
        for number in range(cut.total):
            start, stop = cut.span(number)
            checksum = xxhash.xxh3_64()
            for at in range(start, stop, _SLICE):
                part = data[at : min(at + _SLICE, stop)]
                checksum.update(part)
                yield part
                # The storage may still hold this slice while the next piece is fetched; it must not keep its array.
                with contextlib.suppress(BufferError):
                    part.release()
            sums.append(checksum.hexdigest())
        self._sums.append("".join(sums))


def _fetched(slot: layout.Slot) -> Array:
    array = slot.piece.fetch()
    if array.shape != slot.shape or array.dtype != slot.kind.dtype:
        raise ValueError(
            f"array {slot.piece.spec.name!r} was announced as {slot.kind.dtype}{list(slot.shape)}: "
            f"what came is {array.dtype}{list(array.shape)}"
        )
    return array
