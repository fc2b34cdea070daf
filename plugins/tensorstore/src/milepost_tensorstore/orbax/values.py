"""What becomes of a leaf of ours in Orbax's eyes, which knows arrays, numbers and texts, and nothing else.

The rule: Orbax gets a leaf as it would have saved it, where it would; elsewhere the value in the nearest form that
every one of its handlers restores. Nothing is left out because it has no name there:

| leaf | for Orbax |
|---|---|
| `bool`, `int`, `float` | the same |
| `int` of 64 bits without sign | the same |
| larger `int` | its text, in hex |
| `complex`, scalars of NumPy | an array without axes; a dtype that TensorStore does not know is widened |
| `str` | the same |
| `bytes` | an array of `uint8` |
| random keys, arrays of JAX or NumPy | the same; of NumPy where the sharding is of a kind that Orbax has no words for |
| leaves of other packages | their arrays; without one, `None` |
"""

from __future__ import annotations

import base64
import functools
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from milepost.errors import ManifestError

from milepost_tensorstore import dtypes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from milepost.protocols import Array

__all__ = ["Value", "Values", "of_array", "shard_shape", "sharding_text"]

_LEAST, _MOST = -(1 << 63), 1 << 64


class Value(NamedTuple):
    """A leaf for Orbax: what it calls its type, and where the value is.

    `array` is one to be stored besides those that are; `text` one for the file of texts; with `long` the text is in
    the array that is stored. `sharding` is Orbax's text for it, `box` the shape of the boxes that are spread.
    """

    kind: str
    array: Array | None = None
    text: str | None = None
    long: bool = False
    sharding: str | None = None
    box: tuple[int, ...] | None = None
    key_impl: str | None = None


class Values:
    """Makes values of the leaves of an item, whose saved shardings it is given.

    Arrays that are alike share one value: among many thousands few are different.
    """

    def __init__(self, shardings: Sequence[Mapping[str, Any]]) -> None:
        self._shardings = shardings
        self._texts = functools.cache(lambda number: sharding_text(shardings[number]))
        self._alike = functools.cache(self._spread)

    def of(self, leaf: Mapping[str, Any]) -> Value:
        """Return what a leaf of a manifest is for Orbax; raises `ManifestError` for one that makes no sense."""
        try:
            arrays: Mapping[str, Any] = leaf.get("arrays") or {}
            return self._stored(leaf, arrays.get("")) if arrays else _inline(leaf)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ManifestError(
                f"cannot describe a leaf of type {leaf.get('type')!r:.80} to Orbax: {error!r}"
            ) from error

    def _stored(self, leaf: Mapping[str, Any], array: Any) -> Value:
        match leaf["type"]:
            case "str":
                return _LONG_TEXT
            case "bool" | "int" | "float":
                return _SCALAR
        number = of_array(array, "sharding")
        if number is None:
            return _BY_NUMPY
        return self._alike(number, tuple(of_array(array, "shape")), leaf.get("key_impl"))

    def _spread(self, number: int, shape: tuple[int, ...], key_impl: str | None) -> Value:
        text = self._texts(number)
        if text is None and key_impl is None:
            return _BY_NUMPY
        box = shard_shape(shape, self._shardings[number])
        return Value("jax.Array", sharding=text, box=box, key_impl=key_impl)


_SCALAR, _BY_NUMPY, _LONG_TEXT = Value("scalar"), Value("np.ndarray"), Value("string", long=True)


def of_array(array: Any, field: str) -> Any:
    """Return a field of an array, which is JSON where it was read and a value of milepost's where it was not."""
    if array is None:
        return None
    return array[field] if isinstance(array, dict) else getattr(array, field)


def _inline(leaf: Mapping[str, Any]) -> Value:  # noqa: PLR0911 - one line for each kind of leaf
    match leaf["type"]:
        case "bool":
            return Value("scalar", np.array(leaf["value"], np.bool_))
        case "int":
            return _int(int(leaf["hex"], 16) if "hex" in leaf else leaf["value"])
        case "float":
            return Value("scalar", _double(leaf["bits"]))
        case "complex":
            return Value("np.ndarray", np.stack([_double(part) for part in leaf["bits"]]).view(np.complex128)[0, ...])
        case "np.generic":
            return Value("np.ndarray", _scalar(leaf["dtype"], bytes.fromhex(leaf["bits"])))
        case "str":
            return Value("string", text=leaf["value"])
        case "bytes":
            return Value("np.ndarray", np.frombuffer(base64.b64decode(leaf["value"]), np.uint8))
    return Value("None")


def _int(value: int) -> Value:
    if _LEAST <= value < _MOST:
        return Value("scalar", np.array(value, np.int64 if value < 1 << 63 else np.uint64))
    return Value("string", text=hex(value))


def _double(bits: str) -> Array:
    return np.array(np.frombuffer(bytes.fromhex(bits), ">f8")[0], np.float64)


def _scalar(name: str, data: bytes) -> Array:
    import ml_dtypes

    array = np.frombuffer(data, np.dtype(getattr(ml_dtypes, name, name))).reshape(())
    if dtypes.kind(name) is not None:
        return array
    # Those that TensorStore does not know are of eight bits or fewer.
    return array.astype(np.float32 if "float" in name else np.uint8 if name.startswith("u") else np.int8)


# --- shardings -------------------------------------------------------------------------------------------------------


def sharding_text(saved: Mapping[str, Any]) -> str | None:
    """Return what Orbax writes down for a sharding; None where it has no words for it.

    >>> sharding_text({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0", "committed": False})
    '{"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}'
    """
    match saved["sharding_type"]:
        case "SingleDeviceSharding":
            return json.dumps(_single(saved["device_str"]))
        case "NamedSharding":
            fields = ("sharding_type", "shape", "axis_names", "axis_types", "partition_spec", "device_mesh")
            return json.dumps({name: saved[name] for name in fields if name in saved})
    return None


def _single(device: str) -> dict[str, Any]:
    platform, _, number = device.partition(":")
    if platform == "cpu":
        return {"sharding_type": "SingleDeviceSharding", "device_str": device}
    # Orbax looks for the device whose text this is, and accelerators show more than platform and number; of a mesh it
    # takes the number alone.
    return {
        "sharding_type": "NamedSharding",
        "shape": [1],
        "axis_names": ["device"],
        "axis_types": ["AxisType.Auto"],
        "partition_spec": [],
        "device_mesh": {"mesh": [{"id": int(number)}]},
    }


def shard_shape(shape: tuple[int, ...], saved: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of the boxes in which a sharding spreads an array.

    >>> named = {"sharding_type": "NamedSharding", "shape": [4, 2], "axis_names": ["a", "b"]}
    >>> shard_shape((8, 8), {**named, "partition_spec": [["a", "b"], None]})
    (1, 8)
    """
    if saved["sharding_type"] != "NamedSharding":
        return shape
    sizes = dict(zip(saved["axis_names"], saved["shape"], strict=True))
    parts = [1] * len(shape)
    for axis, names in enumerate(saved["partition_spec"][: len(shape)]):
        parts[axis] = math.prod(sizes[name] for name in ([names] if isinstance(names, str) else names or ()))
    return tuple(-(-length // count) for length, count in zip(shape, parts, strict=True))
