"""Which host writes which box of an array, and how its bytes stay what they were when the save began.

The rules. Every box is written once; hosts that hold copies of it share the work evenly, and every host arrives at the
same plan without asking. After the snapshot the caller may donate or overwrite anything:

- A `jax.Array` in host memory is held as a view of its buffer. JAX then copies when the array is donated, so the view
  stays as it was; nothing is copied for arrays that are not donated. (A copy at once was measured to block training
  longer than the reference does; holding the view costs the donating step one copy, and only that step.)
- A `jax.Array` in device memory, and a NumPy array, are copied: as many bytes ahead of the writers as the budget
  allows, the others when a writer gets to them. The snapshot returns when all are copied.
- A blocking save copies nothing that need not be: the caller waits anyway.

An array larger than the budget that has to be copied is cut into boxes along its first axes; for a writer that stores
arrays in chunks, into whole ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from milepost.dtypes import dtype_name
from milepost.protocols import Array, ArrayIO, ArraySpec, Box, ChunksArrays, Hosts, Piece
from milepost.shardings import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.engine.items import Wish

__all__ = ["Budget", "Plan", "Planner", "box_of", "chunks_of", "cut", "in_host_memory"]

Chunk: TypeAlias = "Callable[[ArraySpec], tuple[int, ...]]"
"""What tells the shape of the chunks in which an array is stored."""


class Budget:
    """Bytes that may be held at once. One request larger than all of it is granted when nothing else is held.

    `limit` is asked for only when something must be copied. A writer holds one piece in each of `threads`, so that a
    piece may be as large as its share.
    """

    def __init__(self, limit: Callable[[], int], threads: int) -> None:
        self._ask = limit
        self._threads = threads
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()

    @functools.cached_property
    def _limit(self) -> int:
        return self._ask()

    @property
    def piece(self) -> int:
        """The size above which a piece that must be copied is cut."""
        return max(1, self._limit // (self._threads + 1))

    def take(self, size: int, *, unless: Callable[[], bool]) -> bool:
        """Wait until the bytes may be held, then return True; False once `unless` says so or nobody needs them."""

        def needless() -> bool:
            return self._closed or unless()

        with self._changed:
            self._changed.wait_for(lambda: needless() or not self._held or self._held + size <= self._limit)
            if needless():
                return False
            self._held += size
            return True

    def give(self, size: int) -> None:
        """Return bytes; with 0, let those who wait look again."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody go who waits: nothing is needed any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Shardings:
    """The distinct shardings of a tree, numbered as they come; of each, what decides how its arrays are written."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self._known: dict[Any, tuple[int, bool, bool]] = {}

    def look_up(self, array: Any) -> tuple[int, bool, bool]:
        """Return the number of an array's sharding, whether one shard is the whole array, and if the host holds it."""
        key = (array.sharding, array.committed)
        found = self._known.get(key)
        if found is None:
            sharding = array.sharding
            near = all(device.platform == "cpu" for device in sharding.device_set)
            found = self._known[key] = (len(self.table), sharding.is_fully_replicated, near)
            self.table.append(describe(sharding) | ({} if array.committed else {"committed": False}))
        return found


class _Copied:
    """The data of a piece that must be copied: once, by whoever gets there first, the snapshot or a writer."""

    def __init__(self, copy: Callable[[], Array], size: int, budget: Budget) -> None:
        self._copy: Callable[[], Array] | None = copy
        self._size, self._budget = size, budget
        self._lock = threading.Lock()
        self._data: Array | None = None

    def snapshot(self) -> None:
        """Copy within the budget, unless a writer was here first."""
        if self._budget.take(self._size, unless=lambda: self._copy is None):
            with self._lock:
                if self._copy is None:
                    self._budget.give(self._size)
                    return
                self._data, self._copy = self._copy(), None

    def fetch(self) -> Array:
        """Return the data, and forget it."""
        with self._lock:
            if self._data is not None:
                data, self._data = self._data, None
                self._budget.give(self._size)
                return data
            if self._copy is None:
                raise RuntimeError("the data of a piece was fetched twice")
            data, self._copy = self._copy(), None
            self._budget.give(0)
            return data


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What one host writes of one item, and what the manifest says of its leaves' arrays."""

    specs: list[ArraySpec]
    pieces: list[Piece]
    arrays: list[dict[str, dict[str, Any]]]
    shardings: list[dict[str, Any]]
    copied: list[_Copied]
    budget: Budget

    @property
    def data_bytes(self) -> int:
        """The bytes that this host writes."""
        return sum(
            math.prod(piece.spec.shape if piece.box is None else piece.box.shape) * _itemsize(piece.spec)
            for piece in self.pieces
        )

    def snapshot(self) -> None:
        """Return when nothing that the caller does to the tree can change what is written."""
        for data in self.copied:
            data.snapshot()

    def close(self) -> None:
        """Say that the write has ended, well or not, so that no snapshot waits for it."""
        self.budget.close()


def chunks_of(writer: ArrayIO) -> Chunk | None:
    """Return what tells a writer's chunks, None for one that stores arrays in any pieces."""
    return writer.chunk if isinstance(writer, ChunksArrays) else None


class Planner:
    """Plans the arrays of an item's leaves; `lasting` when the caller goes on before everything is written."""

    def __init__(self, hosts: Hosts, budget: Budget, *, lasting: bool, chunk: Chunk | None = None) -> None:
        self._hosts, self._budget, self._lasting, self._chunk = hosts, budget, lasting, chunk
        self._shardings = _Shardings()
        self._loads = [0] * hosts.count
        self.plan: Plan = Plan([], [], [], self._shardings.table, [], self._budget)

    def plan_all(
        self,
        names: Sequence[str],
        parts: Sequence[Mapping[str, Any]],
        wishes: Sequence[Wish | None] | None = None,
    ) -> Plan:
        """Plan the arrays of all leaves, by part, in order."""
        for name, arrays, wish in zip(names, parts, wishes or itertools.repeat(None, len(names)), strict=True):
            self.add(name, arrays, wish)
        return self.plan

    def add(self, name: str, arrays: Mapping[str, Any], wish: Wish | None = None) -> None:
        """Plan the arrays of one leaf."""
        described = {}
        for part, array in arrays.items():
            spec = ArraySpec(f"{name}~.{part}" if part else name, tuple(array.shape), dtype_name(array.dtype))
            if wish is not None:
                spec = dataclasses.replace(spec, chunk_bytes=wish.chunk_bytes, chunk_axes=wish.chunk_axes)
            sharding = None
            if isinstance(array, np.ndarray):
                self._add_numpy(spec, array)
            else:
                sharding, replicated, near = self._shardings.look_up(array)
                if not (replicated and self._hosts.count == 1):
                    spec = self._add_shards(spec, array)
                elif near:
                    self.plan.pieces.append(Piece(spec, _view_of(array, spec.shape), view=True))
                else:
                    self._add_shard(spec, None, array.addressable_data(0))
            self.plan.specs.append(spec)
            described[part] = {"shape": spec.shape, "dtype": spec.dtype, "sharding": sharding}
        self.plan.arrays.append(described)

    def _add_numpy(self, spec: ArraySpec, array: Array) -> None:
        # All hosts hold the same value, by the contract of a distributed tree, so host 0's is as good as any.
        if self._hosts.index != 0:
            return
        if not self._lasting and array.flags.c_contiguous:
            self.plan.pieces.append(Piece(spec, lambda: array, view=True))
            return
        for box in cut(spec, self._budget.piece, self._chunk):
            self._copy(spec, box, functools.partial(_copy_of, array, box))

    def _add_shards(self, spec: ArraySpec, array: Any) -> ArraySpec:
        shards = {box_of(shard.index, spec.shape): shard.data for shard in array.addressable_shards}
        boxes = _boxes(array.sharding, spec.shape, self._hosts)
        if len(boxes) > 1:
            # Where the devices do not divide an axis evenly, its last boxes are smaller.
            largest = tuple(max(lengths) for lengths in zip(*(box.shape for box in boxes), strict=True))
            spec = dataclasses.replace(spec, box=largest)
        for box, owners in boxes.items():
            writer = min(owners, key=lambda host: (self._loads[host], host))
            self._loads[writer] += math.prod(box.shape) * array.dtype.itemsize
            if writer == self._hosts.index:
                whole = box.shape == spec.shape
                self._add_shard(spec, None if whole else box, shards[box])
        return spec

    def _add_shard(self, spec: ArraySpec, box: Box | None, data: Any) -> None:
        if in_host_memory(data):
            self.plan.pieces.append(Piece(spec, _view_of(data, data.shape), box, view=True))
            return
        shape = spec.shape if box is None else box.shape
        for part in cut(dataclasses.replace(spec, shape=shape), self._budget.piece, self._chunk_of(spec)):
            self._copy(spec, box if part is None else _within(box, part), functools.partial(_copy_of, data, part))

    def _chunk_of(self, spec: ArraySpec) -> Chunk | None:
        chunk = self._chunk
        return None if chunk is None else lambda _: chunk(spec)

    def _copy(self, spec: ArraySpec, box: Box | None, copy: Callable[[], Array]) -> None:
        if not self._lasting:
            self.plan.pieces.append(Piece(spec, copy, box))
            return
        shape = spec.shape if box is None else box.shape
        data = _Copied(copy, math.prod(shape) * _itemsize(spec), self._budget)
        self.plan.copied.append(data)
        self.plan.pieces.append(Piece(spec, data.fetch, box))


def _view_of(array: Any, shape: tuple[int, ...]) -> Callable[[], Array]:
    """Return what gives NumPy's view of an array in host memory; the view is taken now, when the array is ready.

    The buffer protocol is four times quicker than asking for the shard, and leaves nothing behind in the array, while
    `np.asarray` of the caller's own array would keep it from ever being donated without a copy.
    """
    try:
        view = memoryview(array)
    except BufferError:  # bfloat16 and its like, more than one device, or a layout of its own
        data = np.asarray(array.addressable_data(0))
        return lambda: data
    dtype = array.dtype
    return lambda: np.ndarray(shape, dtype, view)


def in_host_memory(data: Any) -> bool:
    """Say whether the buffer of an array on one device can be viewed by NumPy without a copy."""
    (device,) = data.devices()
    return bool(device.platform == "cpu")


def _itemsize(spec: ArraySpec) -> int:
    from milepost.dtypes import dtype_named

    return dtype_named(spec.dtype).itemsize


def _copy_of(array: Any, box: Box | None) -> Array:
    if box is not None:
        array = array[tuple(slice(start, start + length) for start, length in zip(box.start, box.shape, strict=True))]
    return np.array(array, order="C", copy=True) if isinstance(array, np.ndarray) else np.ascontiguousarray(array)


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Return the box that JAX describes by slices."""
    bounds = [part.indices(length)[:2] for part, length in zip(index, shape, strict=True)]
    return Box(tuple(start for start, _ in bounds), tuple(stop - start for start, stop in bounds))


def _boxes(sharding: Any, shape: tuple[int, ...], hosts: Hosts) -> dict[Box, list[int]]:
    """Return every distinct box of a sharded array, in the same order on every host, with the hosts that hold it."""
    owners: dict[Box, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        owners.setdefault(box_of(index, shape), set()).add(hosts.owner(device))
    return {box: sorted(owners[box]) for box in sorted(owners, key=lambda box: box.start)}


def _within(outer: Box | None, inner: Box) -> Box:
    if outer is None:
        return inner
    return Box(tuple(map(sum, zip(outer.start, inner.start, strict=True))), inner.shape)


def cut(spec: ArraySpec, limit: int, chunk: Chunk | None = None) -> Iterator[Box | None]:
    """Cut an array into boxes of whole chunks (or elements) of at most about `limit` bytes, along its first axes.

    None alone for one that need not be cut.

    >>> [box.start for box in cut(ArraySpec("a", (4, 2), "float64"), 32)]
    [(0, 0), (2, 0)]
    >>> [box.start for box in cut(ArraySpec("a", (7, 2), "float64"), 64, lambda spec: (3, 2))]
    [(0, 0), (3, 0), (6, 0)]
    """
    shape, itemsize = spec.shape, _itemsize(spec)
    if math.prod(shape) * itemsize <= limit:
        yield None
        return
    unit = chunk(spec) if chunk else (1,) * len(shape)
    for start, length in _in_units(tuple(map(_divided, shape, unit)), math.prod(unit) * itemsize, limit):
        begin = tuple(map(operator.mul, start, unit))
        most = map(operator.mul, length, unit)
        yield Box(begin, tuple(min(some, end - at) for some, end, at in zip(most, shape, begin, strict=True)))


def _divided(length: int, unit: int) -> int:
    return -(-length // unit)


def _in_units(shape: tuple[int, ...], size: int, limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a shape, of which every unit has so many bytes; yield starts and lengths."""
    inner = [math.prod(shape[axis + 1 :]) * size for axis in range(len(shape))]
    axis = next((axis for axis in range(len(shape)) if inner[axis] <= limit), len(shape) - 1)
    rows = max(1, limit // inner[axis])
    rest = shape[axis + 1 :]
    for outer in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], rows):
            count = min(rows, shape[axis] - start)
            yield (*outer, start, *(0 for _ in rest)), (*(1 for _ in outer), count, *rest)
