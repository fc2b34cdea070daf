"""Where each loaded array goes, and what becomes of it there.

The rule: the target's word first; without one the saved sharding where its devices exist here, else the default device.
Loading never depends on the machine that saved. Whether a leaf fits its target is decided before a data byte moves:
shapes must agree, numbers may change their width but not their kind (floats do not become integers unasked).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from milepost.dtypes import can_cast, dtype_named
from milepost.metadata.leaf import ArrayMetadata, NumpyMetadata
from milepost.shardings import revive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milepost.manifest import ArrayLeaf
    from milepost.protocols import Array
    from milepost.trees import Handlers

__all__ = [
    "DEFAULT_DEVICE",
    "HOST",
    "SKIP",
    "LeafTarget",
    "Skipped",
    "Wanted",
    "found_here",
    "want_as_saved",
    "want_as_target",
]


class _Place:
    """A place that is no sharding."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


HOST = _Place("a NumPy array")
DEFAULT_DEVICE = _Place("the default device")
SKIP = _Place("nothing: the leaf is not loaded")


@dataclasses.dataclass(frozen=True, slots=True)
class LeafTarget:
    """A leaf of a target that says what becomes of what was saved; whatever is None stays as it was.

    `kind` is `jax.Array`, `np.ndarray`, or a class of Python's numbers. With `fit`, an array of another shape is cut,
    or filled up with zeros, along each axis. With `any_cast`, values may be lost in the cast.
    """

    kind: Any = None
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    sharding: Any = None
    fit: bool = False
    any_cast: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A leaf of a target that comes back as it is."""

    leaf: Any


@dataclasses.dataclass(slots=True)
class Wanted:
    """One leaf to load: where its arrays go (`HOST`, `DEFAULT_DEVICE` or a sharding), and in which dtype.

    `template` says what the target asks for: a class, or for random keys their sharding; None takes the leaf as it was
    saved. With `SKIP` it is the leaf itself, and nothing is read. `shape` is what the array is cut or filled up to, on
    its way to `then`.
    """

    place: Any
    dtype: np.dtype[Any] | None = None
    template: Any = None
    shape: tuple[int, ...] | None = None
    then: Any = None

    def finish(self, value: Any) -> Any:
        """Turn what the leaf handler returns into what the target asks for."""
        if self.shape is not None:
            array = _fitted(np.asarray(value, self.dtype), self.shape)
            return array if self.then is None else _to_device(array, self.then)
        if self.template is None:
            return value
        if isinstance(self.template, jax.sharding.Sharding):
            return jax.device_put(value, self.template)
        if self.template is jax.Array:
            return value if isinstance(value, jax.Array) else _to_device(np.asarray(value, self.dtype), self.place)
        array = np.asarray(value, self.dtype)
        if self.template is np.ndarray:
            return array
        return array[()] if issubclass(self.template, np.generic) else self.template(array.item())


def _to_device(array: Any, place: Any) -> Any:
    return jax.device_put(array) if place is DEFAULT_DEVICE else jax.device_put(array, place)


def want_as_saved(leaf: Mapping[str, Any], shardings: list[Any]) -> Wanted:
    """Return how to load a leaf for which there is no target; `shardings` are the saved ones as found here."""
    for array in leaf.get("arrays", {}).values():
        return Wanted(HOST if array.sharding is None else shardings[array.sharding])
    return Wanted(HOST)


def _fitted(array: Array, shape: tuple[int, ...]) -> Array:
    fitted = np.zeros(shape, array.dtype)
    common = tuple(slice(0, min(lengths)) for lengths in zip(array.shape, shape, strict=True))
    fitted[common] = array[common]
    return fitted


def found_here(saved: Mapping[str, Any], fallback: Any = None) -> Any:
    """Return the place that a saved sharding stands for on this machine."""
    if saved.get("committed") is False:
        return DEFAULT_DEVICE
    return revive(saved) or fallback or DEFAULT_DEVICE


def want_as_target(  # noqa: PLR0911 - one line for each kind of target
    leaf: Mapping[str, Any], target: Any, shardings: list[Any], handlers: Handlers
) -> Wanted | str:
    """Return how to load a leaf into a target leaf, or say in words why it does not fit."""
    if target is None or target is Ellipsis or isinstance(target, Skipped):
        return Wanted(SKIP, template=target.leaf if isinstance(target, Skipped) else target)
    if isinstance(target, LeafTarget):
        return _want_asked(leaf, target, shardings)
    kind = leaf["type"]
    if isinstance(target, ArrayMetadata) and "key_impl" in leaf:
        return want_as_saved(leaf, shardings)
    if "key_impl" in leaf or _is_key(target):
        return _want_key(leaf, target, shardings)
    shape = _shape_of(leaf)
    if shape is not None and _is_array_like(target):
        return _want_array(leaf, shape, target, shardings)
    handler = handlers.of(target)
    if handler is None or handler.name != kind:
        return f"saved as {_words(leaf)}, the target has a {type(target).__qualname__}"
    return want_as_saved(leaf, shardings)


def _want_asked(leaf: Mapping[str, Any], target: LeafTarget, shardings: list[Any]) -> Wanted | str:
    as_saved = want_as_saved(leaf, shardings)
    if "key_impl" in leaf:
        return _want_key_asked(leaf, target, as_saved)
    shape = _shape_of(leaf)
    if shape is None:
        return as_saved if target.kind is None else f"saved as {_words(leaf)}, which is no {target.kind.__name__}"
    return _want_numbers(leaf, shape, target, as_saved)


def _want_key_asked(leaf: Mapping[str, Any], target: LeafTarget, as_saved: Wanted) -> Wanted | str:
    """Take keys for what is asked for by the shape of the numbers below them, as metadata and restore arguments do."""
    below: ArrayLeaf = leaf["arrays"][""]
    if target.kind not in (None, jax.Array) or target.shape not in (None, below.shape):
        return f"saved as random keys of {leaf['key_impl']}, the target has numbers"
    if target.sharding is None:
        return as_saved
    # With the shape of the numbers, the sharding is theirs, too.
    return Wanted(DEFAULT_DEVICE, template=target.sharding) if target.shape is None else Wanted(target.sharding)


def _want_numbers(
    leaf: Mapping[str, Any], shape: tuple[int, ...], target: LeafTarget, as_saved: Wanted
) -> Wanted | str:
    wanted, kind = target.shape, target.kind or _kind_of(leaf)
    if kind in _PYTHON_TYPES and shape:
        return f"saved with shape {shape}, which is not a scalar"
    if wanted is not None and wanted != shape and not (target.fit and len(wanted) == len(shape)):
        return f"saved with shape {shape}, the target has shape {wanted}"
    saved = _dtype_of(leaf)
    name = saved if target.dtype is None else str(np.dtype(target.dtype).name)
    if kind in _PYTHON_TYPES and target.dtype is None:
        name = _PYTHON[kind.__name__]
    if saved != name and not target.any_cast and not can_cast(saved, name):
        return f"saved with dtype {saved}, the target has dtype {name}"
    dtype = None if saved == name else dtype_named(name)
    place = target.sharding or (DEFAULT_DEVICE if as_saved.place is HOST else as_saved.place)
    if kind is not jax.Array:
        place = HOST
    if wanted is not None and wanted != shape:
        return Wanted(HOST, dtype, shape=wanted, then=None if place is HOST else place)
    return Wanted(place, dtype, template=kind)


def _kind_of(leaf: Mapping[str, Any]) -> Any:
    kinds = {"jax.Array": jax.Array, "np.ndarray": np.ndarray, "bool": bool, "int": int, "float": float}
    return kinds.get(leaf["type"], complex if leaf["type"] == "complex" else np.generic)


def _is_array_like(target: Any) -> bool:
    return (hasattr(target, "shape") and hasattr(target, "dtype")) or type(target) in _PYTHON_TYPES


def _is_key(target: Any) -> bool:
    dtype = getattr(target, "dtype", None)
    return dtype is not None and not isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _shape_of(leaf: Mapping[str, Any]) -> tuple[int, ...] | None:
    arrays: Mapping[str, ArrayLeaf] = leaf.get("arrays", {})
    if leaf["type"] in ("jax.Array", "np.ndarray"):
        return arrays[""].shape
    return () if leaf["type"] in ("np.generic", "bool", "int", "float", "complex") else None


_PYTHON_TYPES = (bool, int, float, complex)
_PYTHON = {"bool": "bool", "int": "int64", "float": "float64", "complex": "complex128"}


def _dtype_of(leaf: Mapping[str, Any]) -> str:
    arrays: Mapping[str, ArrayLeaf] = leaf.get("arrays", {})
    return arrays[""].dtype if arrays else str(leaf.get("dtype") or _PYTHON[leaf["type"]])


def _words(leaf: Mapping[str, Any]) -> str:
    shape = _shape_of(leaf)
    return f"a {leaf['type']}" if not shape else f"a {leaf['type']} {_dtype_of(leaf)}{list(shape)}"


def _want_key(leaf: Mapping[str, Any], target: Any, shardings: list[Any]) -> Wanted | str:
    if "key_impl" not in leaf or not _is_key(target):
        there = f"random keys of {leaf['key_impl']}" if "key_impl" in leaf else _words(leaf)
        return f"saved as {there}, the target has a {type(target).__qualname__} {getattr(target, 'dtype', '')}"
    data: ArrayLeaf = leaf["arrays"][""]
    wanted = (*target.shape, *jax.eval_shape(jax.random.key_data, target).shape[len(target.shape) :])
    if data.shape != wanted:
        return f"saved as random keys with data of shape {data.shape}, the target needs {wanted}"
    sharding = getattr(target, "sharding", None)
    if sharding is None:
        return want_as_saved(leaf, shardings)
    return Wanted(DEFAULT_DEVICE, template=sharding if getattr(target, "committed", True) else None)


def _want_array(leaf: Mapping[str, Any], shape: tuple[int, ...], target: Any, shardings: list[Any]) -> Wanted | str:
    wanted_shape = tuple(getattr(target, "shape", ()))
    saved = _dtype_of(leaf)
    wanted = _named(target.dtype) if hasattr(target, "dtype") else _PYTHON[type(target).__name__]
    if shape != wanted_shape:
        return f"saved with shape {shape}, the target has shape {wanted_shape}"
    if saved != wanted and not can_cast(saved, wanted):
        return f"saved with dtype {saved}, the target has dtype {wanted}"
    dtype = None if saved == wanted else dtype_named(wanted)
    if type(target) in _PYTHON_TYPES or isinstance(target, np.generic):
        return Wanted(HOST, dtype, template=type(target))
    if isinstance(target, np.ndarray | NumpyMetadata):
        return Wanted(HOST, dtype, template=np.ndarray)
    return Wanted(_place_of(target, leaf, shardings), dtype, template=jax.Array)


@functools.cache
def _named(dtype: Any) -> str:
    return str(np.dtype(dtype).name)


def _place_of(target: Any, leaf: Mapping[str, Any], shardings: list[Any]) -> Any:
    sharding = getattr(target, "sharding", None)
    if isinstance(sharding, jax.sharding.Sharding):
        return sharding if getattr(target, "committed", True) else DEFAULT_DEVICE
    place = want_as_saved(leaf, shardings).place
    return DEFAULT_DEVICE if place is HOST else place
