"""How shardings are written down: the reference's serialized strings, to the byte, and objects that stand for them.

The rule: a saved sharding is information. It is read, compared and printed anywhere; only turning it into one of JAX
asks which devices there are. Whoever reads one trusts nothing in it: what does not fit is a `DamagedError`.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, final

import numpy as np

from milepost.errors import DamagedError, RequestError, noted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import jax
    from numpy.typing import NDArray

__all__ = [
    "DeviceMetadata",
    "DeviceMetadataMesh",
    "NamedShardingMetadata",
    "PartitionSpecElement",
    "ShardingMetadata",
    "SingleDeviceShardingMetadata",
    "from_jax_sharding",
    "from_saved",
    "from_serialized_string",
    "get_sharding_or_none",
]

_logger = logging.getLogger("milepost")

PartitionSpecElement: TypeAlias = str | tuple[str, ...] | None
"""How one dimension is spread: not, over one axis of the mesh, or over several."""


class _NotHereError(RequestError, ValueError):
    """Say that the sharding names devices that this machine does not have."""


class _WrongKindError(RequestError, TypeError):
    """Say that the sharding is of another kind."""


class _UnknownKindError(RequestError, NotImplementedError):
    """Say that shardings of this kind are not written down."""


class ShardingMetadata(abc.ABC):
    """What is kept of a sharding: mesh and partition, or the device. Memory kinds and layouts are not."""

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    @abc.abstractmethod
    def from_jax_sharding(cls, jax_sharding: jax.sharding.Sharding) -> ShardingMetadata:
        """Describe a sharding of JAX; `TypeError` for one of another kind."""

    @abc.abstractmethod
    def to_jax_sharding(self) -> jax.sharding.Sharding:
        """Return JAX's sharding; `ValueError` if its devices do not exist here."""

    @classmethod
    @abc.abstractmethod
    def from_deserialized_dict(cls, deserialized_dict: Mapping[str, Any]) -> ShardingMetadata:
        """Read the JSON object of a serialized string; `ValueError` (a `DamagedError`) for what does not fit."""

    @abc.abstractmethod
    def to_serialized_string(self) -> str:
        """Return the JSON text that the reference writes for this sharding."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceMetadata:
    """A device of a mesh, by its id."""

    id: int


@dataclasses.dataclass(frozen=True)
class DeviceMetadataMesh:
    """The devices of a mesh: nested sequences of `DeviceMetadata`, one level for each axis."""

    mesh: Sequence[Any]

    __hash__: ClassVar[None] = None  # type: ignore[assignment]


@final
class NamedShardingMetadata(ShardingMetadata):
    """What is kept of a `jax.sharding.NamedSharding`.

    `shape` are the sizes of the mesh's axes, as an array. Without `device_mesh`, all devices in their own order are
    meant; without `axis_types`, JAX's default.
    """

    def __init__(
        self,
        shape: NDArray[Any],
        axis_names: Sequence[str],
        partition_spec: Sequence[Any],
        axis_types: Sequence[jax.sharding.AxisType] | None = None,
        device_mesh: DeviceMetadataMesh | None = None,
    ) -> None:
        self.shape: NDArray[np.int64] = np.asarray(shape, np.int64)
        self.axis_names: list[str] = list(axis_names)
        # JSON knows no tuples: without this, what was read would differ from what was written.
        self.partition_spec: tuple[PartitionSpecElement, ...] = tuple(
            tuple(part) if isinstance(part, list | tuple) else part for part in partition_spec
        )
        self._axis_types = None if axis_types is None else tuple(map(_axis_type_name, axis_types))
        self.device_mesh = device_mesh

    @property
    def axis_types(self) -> tuple[jax.sharding.AxisType, ...] | None:
        """The types of the mesh's axes, as JAX's own; `ValueError` for one that this JAX does not know."""
        if self._axis_types is None:
            return None
        import jax

        known = {kind.name: kind for kind in jax.sharding.AxisType}
        if unknown := [name for name in self._axis_types if name not in known]:
            raise _NotHereError(f"cannot use axis types {unknown!r}: this JAX has {sorted(known)!r}")
        return tuple(known[name] for name in self._axis_types)

    @classmethod
    def from_jax_sharding(cls, jax_sharding: jax.sharding.Sharding) -> NamedShardingMetadata:
        """Describe a named sharding; one over an abstract mesh has no devices."""
        import jax

        if not isinstance(jax_sharding, jax.sharding.NamedSharding):
            raise _WrongKindError(f"cannot describe {jax_sharding!r:.200}: it is no NamedSharding")
        mesh = jax_sharding.mesh
        return cls(
            shape=np.array(tuple(mesh.shape.values()), np.int64),
            axis_names=list(mesh.axis_names),
            partition_spec=tuple(jax_sharding.spec),
            axis_types=mesh.axis_types,
            device_mesh=_device_mesh(mesh.devices) if isinstance(mesh, jax.sharding.Mesh) else None,
        )

    def to_jax_sharding(self) -> jax.sharding.NamedSharding:
        """Return JAX's sharding; `ValueError` if there are not these devices, or not this many."""
        import jax

        try:
            devices = self._devices(jax.devices()).reshape(tuple(self.shape))
            mesh = jax.sharding.Mesh(devices, tuple(self.axis_names), axis_types=self.axis_types)
            spec = jax.sharding.PartitionSpec(*self.partition_spec)  # type: ignore[no-untyped-call]
            return jax.sharding.NamedSharding(mesh, spec)
        except _NotHereError:
            raise
        except ValueError as error:
            raise _elsewhere(_NotHereError(f"cannot use {self!r:.200} here: {error}")) from error

    def _devices(self, here: Iterable[Any]) -> NDArray[Any]:
        by_id = {device.id: device for device in here}
        if self.device_mesh is None:
            return np.array(list(by_id.values()), dtype=object)
        ids = list(_ids(self.device_mesh.mesh))
        if len(set(ids)) != len(ids):
            raise _NotHereError(f"cannot use a sharding over {len(ids)} devices: it names some of them twice")
        if missing := sorted(set(ids) - set(by_id)):
            raise _elsewhere(
                _NotHereError(
                    f"cannot use a sharding over {len(ids)} devices: there are no devices {missing[:8]} here, "
                    f"but {len(by_id)} others"
                )
            )
        found = np.empty(len(ids), dtype=object)
        found[:] = [by_id[number] for number in ids]
        return found

    @classmethod
    def from_deserialized_dict(cls, deserialized_dict: Mapping[str, Any]) -> NamedShardingMetadata:
        """Read the JSON object of a serialized string; axis types and device mesh may be missing, as in older files."""
        _check(isinstance(deserialized_dict, Mapping), deserialized_dict, "it is no JSON object")
        for key in ("shape", "axis_names", "partition_spec"):
            _check(isinstance(deserialized_dict.get(key), list), deserialized_dict, f"it has no list {key!r}")
        shape, names, spec = (deserialized_dict[key] for key in ("shape", "axis_names", "partition_spec"))
        _check(all(map(_is_size, shape)), deserialized_dict, "its shape has other things than sizes")
        _check(_are_texts(names) and len(names) == len(shape), deserialized_dict, "its axis names do not fit its shape")
        _check(all(part is None or _are_texts(part) for part in spec), deserialized_dict, "its partition names no axes")
        kinds, mesh = (deserialized_dict.get(key) for key in ("axis_types", "device_mesh"))
        _check(
            kinds is None or (isinstance(kinds, list) and _are_texts(kinds)),
            deserialized_dict,
            "its axis types are no names",
        )
        return cls(np.array(shape, np.int64), names, spec, kinds, None if mesh is None else _read_mesh(mesh))

    def to_serialized_string(self) -> str:
        """Return the JSON text; `ValueError` for a partition that JSON cannot hold."""
        written: dict[str, Any] = {
            "sharding_type": "NamedSharding",
            "shape": [int(size) for size in self.shape],
            "axis_names": self.axis_names,
        }
        if self._axis_types is not None:
            written["axis_types"] = [f"AxisType.{name}" for name in self._axis_types]
        written["partition_spec"] = self.partition_spec
        if self.device_mesh is not None:
            written["device_mesh"] = {"mesh": _written(self.device_mesh.mesh)}
        try:
            return json.dumps(written)
        except TypeError as error:
            raise _UnwritableError(f"cannot write down {self!r:.200}: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NamedShardingMetadata):
            return NotImplemented
        return np.array_equal(self.shape, other.shape) and self._rest() == other._rest()

    __hash__: ClassVar[None] = None

    def _rest(self) -> tuple[Any, ...]:
        mesh = None if self.device_mesh is None else _written(self.device_mesh.mesh)
        return self.axis_names, self.partition_spec, self._axis_types, mesh

    def __repr__(self) -> str:
        kinds = None if self._axis_types is None else f"({', '.join(self._axis_types)})"
        return (
            f"NamedShardingMetadata(shape={self.shape.tolist()}, axis_names={self.axis_names}, "
            f"partition_spec={self.partition_spec}, axis_types={kinds}, device_mesh={self.device_mesh})"
        )


class _UnwritableError(RequestError, ValueError):
    """Say that a partition has parts that are no names."""


@final
class SingleDeviceShardingMetadata(ShardingMetadata):
    """What is kept of a `jax.sharding.SingleDeviceSharding`: the device, as JAX prints it."""

    def __init__(self, device_str: str) -> None:
        self.device_str = device_str

    @classmethod
    def from_jax_sharding(cls, jax_sharding: jax.sharding.Sharding) -> SingleDeviceShardingMetadata:
        """Describe a sharding on one device."""
        import jax

        if not isinstance(jax_sharding, jax.sharding.SingleDeviceSharding):
            raise _WrongKindError(f"cannot describe {jax_sharding!r:.200}: it is no SingleDeviceSharding")
        (device,) = jax_sharding.device_set
        return cls(str(device))

    def to_jax_sharding(self) -> jax.sharding.SingleDeviceSharding:
        """Return JAX's sharding; `ValueError` if this process has no such device."""
        import jax

        wanted = _device_name(self.device_str)
        for device in jax.local_devices():
            if wanted in (_device_name(str(device)), f"{device.platform}:{device.id}"):
                return jax.sharding.SingleDeviceSharding(device)
        there = ", ".join(map(str, jax.local_devices()))
        raise _elsewhere(_NotHereError(f"cannot use device {self.device_str!r}: this process has {there:.200}"))

    @classmethod
    def from_deserialized_dict(cls, deserialized_dict: Mapping[str, Any]) -> SingleDeviceShardingMetadata:
        """Read the JSON object of a serialized string."""
        _check(isinstance(deserialized_dict, Mapping), deserialized_dict, "it is no JSON object")
        device = deserialized_dict.get("device_str")
        _check(isinstance(device, str), deserialized_dict, "it has no text 'device_str'")
        return cls(str(device))

    def to_serialized_string(self) -> str:
        """Return the JSON text."""
        return json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": self.device_str})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SingleDeviceShardingMetadata):
            return NotImplemented
        return _device_name(self.device_str) == _device_name(other.device_str)

    __hash__: ClassVar[None] = None

    def __repr__(self) -> str:
        return f"SingleDeviceShardingMetadata(device_str={self.device_str!r})"


# --- any kind --------------------------------------------------------------------------------------------------------

_KINDS: Mapping[str, type[ShardingMetadata]] = {
    "NamedSharding": NamedShardingMetadata,
    "SingleDeviceSharding": SingleDeviceShardingMetadata,
}


def from_jax_sharding(jax_sharding: jax.sharding.Sharding) -> ShardingMetadata | None:
    """Describe a sharding of JAX; None, and a line in the log, for kinds that are not written down."""
    import jax

    if isinstance(jax_sharding, jax.sharding.NamedSharding):
        return NamedShardingMetadata.from_jax_sharding(jax_sharding)
    if isinstance(jax_sharding, jax.sharding.SingleDeviceSharding):
        return SingleDeviceShardingMetadata.from_jax_sharding(jax_sharding)
    _logger.warning("nothing is noted of a sharding of kind %s", type(jax_sharding).__name__)
    return None


def from_serialized_string(serialized_str: str) -> ShardingMetadata:
    """Read a serialized sharding.

    Raises `ValueError` (a `DamagedError`) for text that is none, `NotImplementedError` for an unknown kind of sharding.

    >>> from_serialized_string('{"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}')
    SingleDeviceShardingMetadata(device_str='cpu:0')
    """
    try:
        saved = json.loads(serialized_str)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"cannot read the sharding {serialized_str!r:.200}: it is no JSON") from error
    kind = saved.get("sharding_type") if isinstance(saved, dict) else None
    _check(isinstance(kind, str), saved, "it has no text 'sharding_type'")
    _check(kind != "PositionalSharding", saved, "JAX has no PositionalSharding any more")
    if kind not in _KINDS:
        raise _UnknownKindError(f"cannot read a sharding of kind {kind!r}: there are {sorted(_KINDS)!r}")
    return _KINDS[str(kind)].from_deserialized_dict(saved)


def from_saved(saved: Mapping[str, Any] | None) -> ShardingMetadata | None:
    """Read the sharding of a manifest; None for what is none, since it is information only.

    >>> from_saved({"sharding_type": "SingleDeviceSharding", "device_str": "tpu:3"})
    SingleDeviceShardingMetadata(device_str='tpu:3')
    """
    kind = None if saved is None else saved.get("sharding_type")
    if saved is None or not isinstance(kind, str) or kind not in _KINDS:
        return None
    try:
        return _KINDS[kind].from_deserialized_dict(saved)
    except DamagedError:
        return None


def get_sharding_or_none(serialized_string: Any) -> jax.sharding.Sharding | None:
    """Return JAX's sharding for a serialized one (a text, or an array of one text).

    None, and a line in the log, where it cannot be read or its devices are not here.
    """
    text = serialized_string if isinstance(serialized_string, str) else str(np.asarray(serialized_string).item())
    try:
        return from_serialized_string(text).to_jax_sharding()
    except (ValueError, NotImplementedError) as error:
        _logger.error("%s", error)  # noqa: TRY400 - what was saved elsewhere is no defect here, a traceback misleads
        return None


# --- parts -----------------------------------------------------------------------------------------------------------


def _elsewhere(error: _NotHereError) -> _NotHereError:
    return noted(error, "give a sharding over the devices of this machine instead of the saved one")


def _axis_type_name(kind: Any) -> str:
    return kind.rpartition(".")[2] if isinstance(kind, str) else str(kind.name)


def _device_name(text: str) -> str:
    """Return a device's name as JAX writes it today; for long it called the CPU's TFRT_CPU_0.

    >>> _device_name("TFRT_CPU_3")
    'cpu:3'
    """
    return re.sub(r"\ATFRT_CPU_(\d+)\Z", r"cpu:\1", text)


def _device_mesh(devices: Any) -> DeviceMetadataMesh:
    return DeviceMetadataMesh(_nested(np.asarray(devices)))


def _nested(devices: NDArray[Any]) -> list[Any]:
    if devices.ndim == 0:
        return [DeviceMetadata(int(devices.item().id))]
    if devices.ndim == 1:
        return [DeviceMetadata(int(device.id)) for device in devices]
    return [_nested(part) for part in devices]


def _written(mesh: Sequence[Any]) -> list[Any]:
    return [{"id": part.id} if isinstance(part, DeviceMetadata) else _written(part) for part in mesh]


def _ids(mesh: Sequence[Any]) -> Iterator[int]:
    for part in mesh:
        if isinstance(part, DeviceMetadata):
            yield part.id
        else:
            yield from _ids(part)


def _read_mesh(saved: Any) -> DeviceMetadataMesh:
    nested = saved.get("mesh") if isinstance(saved, Mapping) else None
    _check(isinstance(nested, list), saved, "its device mesh is no list")
    try:
        return DeviceMetadataMesh(_read_nested(nested))
    except RecursionError:
        raise DamagedError("cannot read a sharding: its device mesh is nested too deeply") from None


def _read_nested(nested: Any) -> list[Any]:
    return [_read_nested(part) if isinstance(part, list) else _read_device(part) for part in nested]


def _read_device(saved: Any) -> DeviceMetadata:
    number = saved.get("id") if isinstance(saved, Mapping) else None
    _check(type(number) is int, saved, "a device of its mesh has no number 'id'")
    return DeviceMetadata(int(number or 0))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _are_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _check(fits: bool, saved: object, otherwise: str) -> None:  # noqa: FBT001 - a condition, as in assert
    if not fits:
        raise DamagedError(f"cannot read the sharding {saved!r:.200}: {otherwise}")
