"""How the arrays and files of a checkpoint that exists are read to be written elsewhere.

The rule: nothing is held that need not be. An array is read box by box, in boxes that suit both the format it comes
from and the one it goes to. Small boxes are read many at a time, in the order of the tree, because a request for each
would cost more than its bytes; what a writer asks for in another order waits within the budget, and is read again
where it does not. A file is passed on in slices, each checked on its way. No JAX here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from milepost.checksums import Running, fingerprint
from milepost.dtypes import dtype_named, known_dtypes
from milepost.engine.pieces import Budget, Plan, cut
from milepost.errors import (
    ChecksumError,
    DamagedError,
    ManifestError,
    MilepostError,
    MissingDataError,
    NotFoundError,
    UnsupportedLeafError,
    noted,
)
from milepost.protocols import Array, ArrayIO, ArraySpec, Box, Location, Piece, ReadOptions, ReadRequest, TellsChunks
from milepost.structure import leaf_names, leaf_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.engine.pieces import Chunk
    from milepost.engine.reading import Checkpoint
    from milepost.manifest import ArrayLeaf, FileEntry, Item
    from milepost.plugins import Plugins
    from milepost.protocols import Buffer, Json

__all__ = ["Shares", "StoredArrays", "StoredTree", "bytes_of", "copy_files", "spread"]

_MIB = 1 << 20
_SLICE = 8 * _MIB
_ALIGNED = 64
_AHEAD = 4096
"""How many boxes are looked at for those that are read along with one."""

_MANY = 4096
"""The number of boxes from which on an array is looked at before they are listed: sizes may lie."""

_HALF_BYTES = {"int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
"""Integers below a byte, and what to compare them as: formats differ in the bits that they leave unused."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """What a budget of bytes is spent on: boxes with the writer, those read ahead, those that wait, and reading."""

    threads: int
    piece: int
    writing: int
    window: int
    waiting: int
    reading: int

    @classmethod
    def of(cls, budget: int, threads: int) -> Shares:
        """Divide a budget; fewer threads where each would have to work on crumbs.

        >>> Shares.of(64 << 20, 16).threads
        4
        """
        threads = max(1, min(threads, budget // (16 * _MIB)))
        return cls(
            threads=threads,
            piece=max(1, budget // (2 * (threads + 1))),
            writing=budget // 2,
            window=budget // (8 * threads),
            waiting=budget // 8,
            reading=budget // 8,
        )


# --- arrays ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    request: ReadRequest
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class StoredArrays:
    """The arrays of a stored item: boxes of them are announced first, then each is fetched once, on any thread."""

    def __init__(self, checkpoint: Checkpoint, item: Item, plugins: Plugins, shares: Shares) -> None:
        storage, prefix = checkpoint.storage, f"{checkpoint.prefix}{item.prefix}"
        self._url, self._records, self._shares = checkpoint.url, item.records, shares
        self._io: ArrayIO = plugins.arrays(item.writer)()
        self._location = Location(storage, prefix, f"{storage.url}/{prefix}")
        self._options = ReadOptions(shares.reading, threads=1, verify=True)
        self._wanted: list[_Wanted] = []
        self._fetched = bytearray()
        self._waiting: dict[int, Array] = {}
        self._held = 0
        self._coming: set[int] = set()
        self._changed = threading.Condition()

    def announce(self, name: str, spec: ArraySpec, box: Box | None) -> int:
        """Say that a box of the array of a name will be fetched; return its number."""
        shape = spec.shape if box is None else box.shape
        nbytes = math.prod(shape) * dtype_named(spec.dtype).itemsize
        self._wanted.append(_Wanted(ReadRequest(name, box), shape, spec.dtype, nbytes))
        self._fetched.append(0)
        return len(self._wanted) - 1

    def __len__(self) -> int:
        return len(self._wanted)

    def chunks(self, names: Sequence[str]) -> list[tuple[int, ...] | None]:
        """Return the shapes of the chunks in which arrays are stored; None where that is not known."""
        if not names or not isinstance(self._io, TellsChunks):
            return [None] * len(names)
        return list(self._told(self._io.stored_chunks, self._location, self._records, names))

    def check_last(self, name: str, shape: tuple[int, ...]) -> None:
        """Read the last element of an array, which one that is smaller does not have."""
        last = ReadRequest(name, Box(tuple(length - 1 for length in shape), (1,) * len(shape)))
        self._told(lambda: list(self._io.read(self._location, self._records, [last], self._options)))

    def fetch(self, number: int) -> Array:
        """Return the data of a box; raises `DamagedError` for what cannot be read."""
        with self._changed:
            self._changed.wait_for(lambda: number not in self._coming)
            self._fetched[number] = 1
            data = self._waiting.pop(number, None)
            if data is not None:
                self._held -= data.nbytes
                return data
            window = self._window(number)
            self._coming.update(window)
        found: dict[int, Array] = {}
        try:
            found = self._read(window)
            return found.pop(number)
        finally:
            with self._changed:
                self._coming.difference_update(window)
                self._keep(found)
                self._changed.notify_all()

    def _window(self, first: int) -> list[int]:
        """Return the box, and the small ones after it that are best read along with it."""
        window, size, most = [first], self._wanted[first].nbytes, self._shares.window
        for number in range(first + 1, min(first + _AHEAD, len(self._wanted)) if size < most else 0):
            nbytes = self._wanted[number].nbytes
            if nbytes > most // 4 or self._fetched[number] or number in self._waiting or number in self._coming:
                continue
            if size + nbytes > most:
                break
            window.append(number)
            size += nbytes
        return window

    def _read(self, window: Sequence[int]) -> dict[int, Array]:
        requests = [self._wanted[number].request for number in window]

        def read() -> dict[int, Array]:
            arrays = self._io.read(self._location, self._records, requests, self._options)
            return {window[at]: array for at, array in arrays}

        found: dict[int, Array] = self._told(read)
        for number in window:
            self._check(self._wanted[number], found.get(number))
        return found

    def _check(self, wanted: _Wanted, array: Array | None) -> None:
        what = f"cannot read array {wanted.request.name!r} of {self._url!r}"
        if array is None:
            raise MissingDataError(f"{what}: its array writer does not return it")
        if (array.shape, array.dtype) != (wanted.shape, dtype_named(wanted.dtype)):
            raise ManifestError(
                f"{what}: the manifest says {wanted.dtype}{list(wanted.shape)}, "
                f"what is stored is {array.dtype}{list(array.shape)}"
            )

    def _keep(self, found: dict[int, Array]) -> None:
        for number, array in found.items():
            # A view of a larger buffer would keep all of it.
            self._waiting[number] = array if array.base is None else array.copy()
            self._held += array.nbytes
        while self._held > self._shares.waiting and self._waiting:
            self._held -= self._waiting.pop(next(iter(self._waiting))).nbytes

    def _told(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """Read; what an array writer raises that is no error of ours is told as damage."""
        try:
            return act(*arguments)
        except (MilepostError, MemoryError):
            raise
        except Exception as error:
            raise DamagedError(f"cannot read the arrays of {self._url!r}: {type(error).__name__}: {error}") from error


class StoredTree:
    """A stored item as something to save: what the manifest says of it, and where its arrays come from.

    `structure` is the one it gets, whose leaves are those of the numbers in `index`.
    """

    def __init__(self, item: Item, structure: Any, index: Sequence[int], *, flat: bool) -> None:
        self.item: Item = item
        self.structure: Any = structure
        self.flat: bool = flat
        self.handler: str = item.handler
        self.custom_metadata: Json = item.custom_metadata
        self._index = index
        self._leaves = [item.leaves[at] for at in index]
        self.types: list[str] = [leaf["type"] for leaf in self._leaves]
        self.jsons: list[dict[str, Any]] = [
            {key: value for key, value in leaf.items() if key not in ("type", "arrays")} for leaf in self._leaves
        ]
        self.sums: list[str] = []
        """The checksums of the boxes as they were read."""

    def plan(self, source: StoredArrays, chunk: Chunk | None, shares: Shares) -> Plan:
        """Plan in which boxes the arrays are read and written; refuses what this machine cannot hold in memory."""
        self._refuse()
        specs = self._specs()
        units = self._units(source, specs, chunk, shares)
        boxes = [
            (name, spec, box)
            for (name, spec), unit in zip(specs, units, strict=True)
            for box in unit.boxes(spec, shares.piece)
        ]
        # A writer that packs boxes sorts them so; in this order it asks for those that were read together.
        boxes.sort(key=lambda one: _rank(*one[1:]))
        pieces = [
            Piece(spec, functools.partial(self._fetch, source, source.announce(name, spec, box)), box)
            for name, spec, box in boxes
        ]
        self.sums = [""] * len(pieces)
        described = [
            {
                part: {"shape": array.shape, "dtype": array.dtype, "sharding": array.sharding}
                for part, array in leaf.get("arrays", {}).items()
            }
            for leaf in self._leaves
        ]
        budget = Budget(lambda: shares.writing, shares.threads)
        return Plan([spec for _, spec in specs], pieces, described, self.item.shardings, [], budget)

    def compare(self, stored: StoredArrays, pieces: Sequence[Piece], threads: int) -> Iterator[str]:
        """Read all boxes back, and yield the names of the arrays whose elements are not those that were written."""
        for piece in pieces:
            stored.announce(piece.spec.name, piece.spec, piece.box)
        with ThreadPoolExecutor(threads, "milepost-compare") as pool:
            found = pool.map(lambda at: _sum(stored.fetch(at)), range(len(pieces)))
            for piece, expected, actual in zip(pieces, self.sums, found, strict=True):
                if expected != actual:
                    yield piece.spec.name

    def _fetch(self, source: StoredArrays, number: int) -> Array:
        array = source.fetch(number)
        self.sums[number] = _sum(array)
        return array

    def _refuse(self) -> None:
        arrays = {array.dtype for leaf in self._leaves for array in leaf.get("arrays", {}).values()}
        unknown = sorted(arrays - known_dtypes().keys())
        if unknown:
            raise noted(
                UnsupportedLeafError(
                    f"cannot copy arrays of dtype {', '.join(map(repr, unknown))}: none is known here"
                ),
                "a newer release of ml_dtypes may know it",
            )

    def _specs(self) -> list[tuple[str, ArraySpec]]:
        """Return for every array its name in the source, and what it is to become."""
        before = leaf_names(list(leaf_paths(self.item.structure)))
        names = leaf_names(list(leaf_paths(self.structure)))
        return [
            (
                _array_name(before[at], part),
                ArraySpec(_array_name(name, part), array.shape, array.dtype, self._box(array)),
            )
            for at, name, leaf in zip(self._index, names, self._leaves, strict=True)
            for part, array in leaf.get("arrays", {}).items()
        ]

    def _box(self, array: ArrayLeaf) -> tuple[int, ...] | None:
        return None if array.sharding is None else spread(array.shape, self.item.shardings[array.sharding])

    def _units(
        self, source: StoredArrays, specs: Sequence[tuple[str, ArraySpec]], chunk: Chunk | None, shares: Shares
    ) -> list[_Unit]:
        large = [at for at, (_, spec) in enumerate(specs) if _nbytes(spec.shape, spec.dtype) > shares.piece]
        for name, spec in (specs[at] for at in large):
            if _nbytes(spec.shape, spec.dtype) > _MANY * shares.piece:
                source.check_last(name, spec.shape)
        units = [_Unit()] * len(specs)
        for at, stored in zip(large, source.chunks([specs[at][0] for at in large]), strict=True):
            spec = specs[at][1]
            units[at] = _unit(spec, chunk(spec) if chunk else None, stored, shares.piece)
        return units


@dataclasses.dataclass(frozen=True, slots=True)
class _Unit:
    """What the boxes of an array consist of, if not of elements, and how many bytes are read for any of them."""

    shape: tuple[int, ...] | None = None
    nbytes: int = 0

    def boxes(self, spec: ArraySpec, most: int) -> Iterator[Box | None]:
        """Cut the array into boxes of at most about so many bytes."""
        shape = self.shape
        return cut(spec, max(most, self.nbytes), None if shape is None else lambda _: shape)


def _array_name(leaf: str, part: str) -> str:
    return f"{leaf}~.{part}" if part else leaf


def _rank(spec: ArraySpec, box: Box | None) -> tuple[bool, int]:
    nbytes = _nbytes(spec.shape if box is None else box.shape, spec.dtype)
    return nbytes % _ALIGNED != 0, -nbytes


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * dtype_named(dtype).itemsize


def _unit(spec: ArraySpec, written: tuple[int, ...] | None, stored: tuple[int, ...] | None, piece: int) -> _Unit:
    """Return what both formats like, where it is no larger than need be.

    A stored chunk that several boxes cut is read, and unpacked, once for each of them.
    """
    if stored is None or len(stored) != len(spec.shape) or not all(stored):
        return _Unit(written)
    stored = tuple(map(min, stored, spec.shape))
    size = _nbytes(stored, spec.dtype)
    both = tuple(map(math.lcm, stored, written or stored))
    return _Unit(both if _nbytes(both, spec.dtype) <= max(piece, 2 * size) else written, size)


def _sum(array: Array) -> str:
    kind = _HALF_BYTES.get(array.dtype.name)
    data = np.ascontiguousarray(array if kind is None else array.astype(kind))
    return fingerprint(data.reshape(-1).view(np.uint8).data)


def spread(shape: Sequence[int], sharding: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of the boxes in which a saved sharding spreads an array; None if it does not, or is not known.

    >>> saved = {"sharding_type": "NamedSharding", "shape": [4, 2], "axis_names": ["x", "y"]}
    >>> spread((8, 6), saved | {"partition_spec": ["y", None]})
    (4, 6)
    >>> spread((8, 6), saved | {"partition_spec": [["x", "y"]]})
    (1, 6)
    """
    if sharding.get("sharding_type") != "NamedSharding":
        return None
    try:
        sizes = dict(zip(sharding["axis_names"], sharding["shape"], strict=True))
        parts = [_parts_of(entry, sizes) for entry in sharding["partition_spec"]]
        parts += [1] * (len(shape) - len(parts))
        if any(type(part) is not int or part < 1 for part in parts):
            return None
        box = tuple(-(-length // part) for length, part in zip(shape, parts, strict=True))
    except (KeyError, TypeError, ValueError):
        return None  # it is information, and may come from anybody
    return None if box == tuple(shape) else box


def _parts_of(entry: Any, sizes: Mapping[str, int]) -> int:
    if entry is None:
        return 1
    return math.prod(sizes[name] for name in ([entry] if isinstance(entry, str) else entry))


# --- files -----------------------------------------------------------------------------------------------------------


def bytes_of(checkpoint: Checkpoint, file: FileEntry, length: int = _SLICE) -> Iterator[Buffer]:
    """Yield the bytes of a file in slices; raise before the last one is taken for good if they are not those saved.

    Raises `MissingDataError` and `ChecksumError`, which name the file.
    """
    key, what = checkpoint.prefix + file.path, f"cannot copy {checkpoint.url!r}: file {file.path!r}"
    running = Running()
    try:
        size = checkpoint.storage.size(key)
        if size != file.size:
            raise MissingDataError(f"{what} has {size} bytes where {file.size} were saved")
        while running.size < size:
            data = checkpoint.storage.read(key, running.size, min(size, running.size + length))
            if not data:
                raise MissingDataError(f"{what} ends after {running.size} bytes where {size} were saved")
            running.update(data)
            yield data
    except NotFoundError as error:
        raise MissingDataError(f"{what} is missing") from error
    if file.checksum and running.fingerprint() != file.checksum:
        raise noted(
            ChecksumError(f"{what} is damaged: its bytes have checksum {running.fingerprint()}, not {file.checksum}"),
            f"`milepost verify {checkpoint.url}` names the leaves in it",
        )


def copy_files(
    checkpoint: Checkpoint,
    files: Sequence[FileEntry],
    write: Callable[[FileEntry, Iterator[Buffer]], object],
    shares: Shares,
) -> None:
    """Hand files of a checkpoint to `write`, as many at once as there are threads."""
    length = max(1, min(_SLICE, shares.writing // shares.threads))
    with ThreadPoolExecutor(shares.threads, "milepost-copy") as pool:
        futures = [pool.submit(_copy_file, checkpoint, file, write, length) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy_file(
    checkpoint: Checkpoint, file: FileEntry, write: Callable[[FileEntry, Iterator[Buffer]], object], length: int
) -> None:
    write(file, bytes_of(checkpoint, file, length))
