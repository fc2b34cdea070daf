"""How arrays that are read become what the target asks for.

The rule: every box goes where it belongs as soon as it is there, so that little is held beyond the result. Small arrays
go to their devices many at a time, because a call into JAX costs more than their bytes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax

from milepost.dtypes import dtype_name
from milepost.engine.pieces import box_of
from milepost.engine.placing import DEFAULT_DEVICE, HOST, Wanted
from milepost.errors import ManifestError
from milepost.protocols import Array, Box, ReadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.manifest import ArrayLeaf

__all__ = ["Arrays"]


class _Slot:
    """One array on its way: what it must be, where it goes, and what has come of it by device."""

    __slots__ = ("arrived", "key", "leaf", "name", "want")

    def __init__(self, key: tuple[int, str], name: str, leaf: ArrayLeaf, want: Wanted) -> None:
        self.key, self.name, self.leaf, self.want = key, name, leaf, want
        self.arrived: dict[Any, Any] = {}


_BATCH_ARRAYS = 512
_BATCH_BYTES = 32 << 20


class Arrays:
    """The boxes that are read, and the arrays they become. Host memory is given back before much more is read."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.requests: list[ReadRequest] = []
        self.results: dict[tuple[int, str], Any] = {}
        self._for: list[tuple[_Slot, tuple[int, ...], tuple[Any, ...]]] = []
        self._known: dict[Any, list[tuple[Box | None, tuple[int, ...], tuple[Any, ...]]]] = {}
        self._unbound: list[tuple[_Slot, Array]] = []
        self._shards: list[tuple[_Slot, Any, Array]] = []
        self._moving: list[Any] = []
        self._held = 0

    def want(self, key: tuple[int, str], name: str, leaf: ArrayLeaf, want: Wanted) -> None:
        """Ask for one array."""
        slot, place = _Slot(key, name, leaf, want), want.place
        if place is HOST or place is DEFAULT_DEVICE or isinstance(place, jax.sharding.SingleDeviceSharding):
            self.requests.append(ReadRequest(name))
            self._for.append((slot, leaf.shape, ()))
            return
        boxes = self._known.get((place, leaf.shape))
        if boxes is None:
            boxes = self._known[place, leaf.shape] = _boxes(place, leaf.shape)
        for box, shape, devices in boxes:
            self.requests.append(ReadRequest(name, box))
            self._for.append((slot, shape, devices))

    def take(self, arrays: Iterator[tuple[int, Array]]) -> None:
        """Put every array where it belongs as it comes."""
        for index, array in arrays:
            slot, shape, devices = self._for[index]
            leaf, want = slot.leaf, slot.want
            if array.shape != shape or dtype_name(array.dtype) != leaf.dtype:
                raise self._otherwise(slot, shape, array)
            data = array if want.dtype is None else array.astype(want.dtype)
            if want.place is HOST:
                self.results[slot.key] = data
                continue
            if want.place is DEFAULT_DEVICE:
                self._unbound.append((slot, data))
            elif devices:
                self._shards += [(slot, device, data) for device in devices]
            else:
                # Two thirds of the price of device_put in a batch; both take over aligned memory on CPU.
                placed = jax.make_array_from_callback(shape, want.place, functools.partial(_given, data))
                self.results[slot.key] = placed
                self._moving.append(placed)
            self._held += data.nbytes
            if self._held >= _BATCH_BYTES or len(self._unbound) >= _BATCH_ARRAYS or len(self._shards) >= _BATCH_ARRAYS:
                self._flush()
        self._flush()

    def _otherwise(self, slot: _Slot, shape: tuple[int, ...], array: Array) -> ManifestError:
        return ManifestError(
            f"cannot believe the manifest of {self._where!r}: array {slot.name!r} is stored as "
            f"{array.dtype.name}{list(array.shape)}, its leaf says {slot.leaf.dtype}{list(shape)}"
        )

    def _flush(self) -> None:
        unbound, shards, moving = self._unbound, self._shards, self._moving
        self._unbound, self._shards, self._moving, self._held = [], [], [], 0
        # One call for many is cheaper than many calls; an array that no device was asked for stays unbound.
        free = jax.device_put([data for _, data in unbound]) if unbound else []
        for (slot, _), array in zip(unbound, free, strict=True):
            self.results[slot.key] = array
        bound = jax.device_put([data for *_, data in shards], [device for _, device, _ in shards]) if shards else []
        for (slot, device, _), array in zip(shards, bound, strict=True):
            self._arrived(slot, device, array)
        if any(next(iter(some[0].devices())).platform != "cpu" for some in (free, bound, moving) if some):
            # Host memory is given back before more is read; on CPU it has become the array's own.
            jax.block_until_ready([free, bound, moving])  # type: ignore[no-untyped-call]

    def _arrived(self, slot: _Slot, device: Any, array: Any) -> None:
        place = slot.want.place
        slot.arrived[device] = array
        if len(slot.arrived) == len(place.addressable_devices):
            parts, slot.arrived = list(slot.arrived.values()), {}
            self.results[slot.key] = jax.make_array_from_single_device_arrays(slot.leaf.shape, place, parts)


def _given(data: Array, _index: object) -> Array:
    return data


def _boxes(place: Any, shape: tuple[int, ...]) -> list[tuple[Box | None, tuple[int, ...], tuple[Any, ...]]]:
    """Return the boxes that are wanted here, None for the whole array, each with its shape and its devices.

    No devices: the one box is for all of them.
    """
    devices: dict[Box, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        devices.setdefault(box_of(index, shape), []).append(device)
    if len(devices) == 1 and place.is_fully_replicated:
        return [(None, shape, ())]
    return [(None if box.shape == shape else box, box.shape, tuple(some)) for box, some in devices.items()]
