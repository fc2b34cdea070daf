"""How arrays that are read become what the target asks for.

The rule: every box goes where it belongs as soon as it is there, so that little is held beyond the result. Small arrays
go to their devices many at a time, because a call into JAX costs more than their bytes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from milepost.dtypes import dtype_name
from milepost.engine.pieces import box_of
from milepost.engine.placing import DEFAULT_DEVICE, HOST, Wanted
from milepost.errors import ManifestError
from milepost.protocols import Array, ReadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.manifest import ArrayLeaf

__all__ = ["Arrays"]


@dataclasses.dataclass(slots=True)
class _Slot:
    """One array on its way: what it must be, where it goes, and the devices each of its boxes is for."""

    key: tuple[int, str]
    name: str
    leaf: ArrayLeaf
    want: Wanted
    arrived: dict[Any, Any] = dataclasses.field(default_factory=dict)


_BATCH_ARRAYS = 512
_BATCH_BYTES = 32 << 20


class Arrays:
    """The boxes that are read, and the arrays they become. Small ones go to their devices in batches."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.requests: list[ReadRequest] = []
        self.results: dict[tuple[int, str], Any] = {}
        self._for: list[tuple[_Slot, tuple[int, ...], tuple[Any, ...]]] = []
        self._batch: list[tuple[_Slot, Any, Array]] = []
        self._held = 0

    def want(self, key: tuple[int, str], name: str, leaf: ArrayLeaf, want: Wanted) -> None:
        """Ask for one array."""
        slot = _Slot(key, name, leaf, want)
        if want.place is HOST or want.place is DEFAULT_DEVICE:
            self._ask(slot, None, leaf.shape, (None,))
            return
        if isinstance(want.place, jax.sharding.SingleDeviceSharding):
            self._ask(slot, None, leaf.shape, (want.place,))
            return
        boxes: dict[Any, list[Any]] = {}
        for device, index in want.place.addressable_devices_indices_map(leaf.shape).items():
            boxes.setdefault(box_of(index, leaf.shape), []).append(device)
        for box, devices in boxes.items():
            self._ask(slot, None if box.shape == leaf.shape else box, box.shape, tuple(devices))

    def _ask(self, slot: _Slot, box: Any, shape: tuple[int, ...], devices: tuple[Any, ...]) -> None:
        self.requests.append(ReadRequest(slot.name, box))
        self._for.append((slot, shape, devices))

    def take(self, arrays: Iterator[tuple[int, Array]]) -> None:
        """Put every array where it belongs as it comes."""
        for index, array in arrays:
            slot, shape, devices = self._for[index]
            if array.shape != shape or dtype_name(array.dtype) != slot.leaf.dtype:
                raise ManifestError(
                    f"cannot believe the manifest of {self._where!r}: array {slot.name!r} is stored as "
                    f"{array.dtype.name}{list(array.shape)}, its leaf says {slot.leaf.dtype}{list(shape)}"
                )
            data = array if slot.want.dtype is None else array.astype(slot.want.dtype)
            if slot.want.place is HOST:
                self.results[slot.key] = data
                continue
            self._batch += [(slot, device, data) for device in devices]
            self._held += data.nbytes
            if len(self._batch) >= _BATCH_ARRAYS or self._held >= _BATCH_BYTES:
                self._flush()
        self._flush()

    def _flush(self) -> None:
        batch, self._batch, self._held = self._batch, [], 0
        free = [entry for entry in batch if entry[1] is None]
        bound = [entry for entry in batch if entry[1] is not None]
        # device_put takes over the memory of an aligned array on CPU, and copies it elsewhere.
        placed = jax.device_put([data for _, _, data in free]) if free else []
        placed += jax.device_put([data for _, _, data in bound], [device for _, device, _ in bound]) if bound else []
        for (slot, device, _), array in zip(free + bound, placed, strict=True):
            self._arrived(slot, device, array)
        if any(next(iter(array.devices())).platform != "cpu" for array in placed[:1]):
            # Host memory is given back before more is read; on CPU it has become the array's own.
            jax.block_until_ready(placed)  # type: ignore[no-untyped-call]

    def _arrived(self, slot: _Slot, device: Any, array: Any) -> None:
        place = slot.want.place
        if place is DEFAULT_DEVICE or isinstance(place, jax.sharding.SingleDeviceSharding):
            self.results[slot.key] = array
            return
        slot.arrived[device] = array
        if len(slot.arrived) == len(place.addressable_devices):
            parts = list(slot.arrived.values())
            slot.arrived = {}
            self.results[slot.key] = jax.make_array_from_single_device_arrays(slot.leaf.shape, place, parts)
