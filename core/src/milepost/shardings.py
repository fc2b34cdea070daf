"""How the sharding of an array is written down, and when it is taken up again.

The rule: a saved sharding is information, never a demand. It is used on loading only where every device it names exists
here; nothing else about the machine that saved is looked at. The fields follow the reference's serialized shardings, so
that either side can show what the other wrote.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["describe", "revive"]


def describe(sharding: Any) -> dict[str, Any]:
    """Return a JAX sharding as JSON.

    Named shardings keep mesh shape, axis names and types, partition spec and device ids; a single device its platform
    and id; of any other kind only the name remains.
    """
    import jax

    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        (device,) = sharding.device_set
        return {"sharding_type": "SingleDeviceSharding", "device_str": _device_text(device)}
    if isinstance(sharding, jax.sharding.NamedSharding):
        mesh, devices = sharding.mesh, np.asarray(sharding.mesh.devices)
        return {
            "sharding_type": "NamedSharding",
            "shape": list(devices.shape),
            "axis_names": list(mesh.axis_names),
            "axis_types": [str(kind) for kind in mesh.axis_types],
            "partition_spec": [list(part) if isinstance(part, tuple) else part for part in sharding.spec],
            "device_mesh": {"mesh": _nested(devices)},
            "platform": devices.flat[0].platform,
        }
    return {"sharding_type": type(sharding).__name__}


def _device_text(device: Any) -> str:
    return f"{device.platform}:{device.id}"


def _nested(devices: Any) -> Any:
    if not isinstance(devices, np.ndarray):
        return {"id": int(devices.id)}
    return [_nested(part) for part in devices]


def revive(saved: Mapping[str, Any]) -> Any:
    """Return the saved sharding if its devices exist here, else None. Never raises for what a manifest may hold."""
    try:
        return _revive(saved)
    except Exception:  # noqa: BLE001 - JAX refuses nonsense in many ways, and what it refuses is no sharding
        return None


def _revive(saved: Mapping[str, Any]) -> Any:
    import jax

    match saved["sharding_type"]:
        case "SingleDeviceSharding":
            platform, _, number = saved["device_str"].partition(":")
            return jax.sharding.SingleDeviceSharding(_devices(platform)[int(number)])
        case "NamedSharding":
            devices = _devices(saved.get("platform"))  # the reference does not say
            ids = [entry["id"] for entry in _flat(saved["device_mesh"]["mesh"])]
            if len(set(ids)) != len(ids):
                return None
            mesh = np.array([devices[number] for number in ids], dtype=object).reshape(saved["shape"])
            kinds = {str(kind): kind for kind in jax.sharding.AxisType}
            types = tuple(kinds[kind] for kind in saved["axis_types"]) if saved.get("axis_types") else None
            spec = [tuple(part) if isinstance(part, list) else part for part in saved["partition_spec"]]
            named = jax.sharding.Mesh(mesh, tuple(saved["axis_names"]), axis_types=types)
            return jax.sharding.NamedSharding(named, jax.sharding.PartitionSpec(*spec))  # type: ignore[no-untyped-call]
    return None


@functools.cache
def _devices(platform: str | None) -> Mapping[int, Any]:
    import jax

    return {device.id: device for device in jax.devices(platform)}


def _flat(nested: Any) -> Any:
    for entry in nested:
        if isinstance(entry, list):
            yield from _flat(entry)
        else:
            yield entry
