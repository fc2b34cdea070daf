"""The kinds of leaves that come with milepost, and exactly how each comes back.

The rule: what you saved is what you get, type and bits. A class derived from one of these is refused, since what it
adds would be lost. Small values stand in the manifest; large ones become arrays.

Registered through the entry point `leaves` of the group `milepost.plugins`, as anybody's handlers are; JAX is imported
only when a handler is asked for its types.
"""

from __future__ import annotations

import base64
import functools
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from milepost.dtypes import dtype_name, dtype_named
from milepost.hookspecs import RegisterLeafHandler, hookimpl
from milepost.protocols import Json, Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "BytesHandler",
    "JaxArrayHandler",
    "NumpyArrayHandler",
    "NumpyScalarHandler",
    "PlaceholderHandler",
    "PythonScalarHandler",
    "StrHandler",
    "register_leaf_handlers",
]

_INLINE = 1024
"""Strings and bytes up to this length stand in the manifest."""


@hookimpl
def register_leaf_handlers(register: RegisterLeafHandler) -> None:
    """Register the handlers of this module."""
    for cls in (bool, int, float, complex):
        register(PythonScalarHandler(cls))
    for handler in (StrHandler(), BytesHandler(), NumpyScalarHandler(), NumpyArrayHandler(), JaxArrayHandler()):
        register(handler)
    register(PlaceholderHandler())


def _exactly(leaf: Any, *classes: type) -> None:
    if type(leaf) not in classes:
        raise ValueError(f"a {type(leaf).__qualname__} is more than the {classes[0].__name__} that would come back")


def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def _float(json: Any) -> float:
    return float(struct.unpack(">d", bytes.fromhex(json))[0])


class PythonScalarHandler:
    """A bool, int, float or complex of Python. Floats are kept by their bits, next to their text for people."""

    def __init__(self, cls: type[complex]) -> None:
        self._cls: type[Any] = cls

    @property
    def name(self) -> str:
        """The name of the class."""
        return self._cls.__name__

    @property
    def types(self) -> tuple[type, ...]:
        """The class itself."""
        return (self._cls,)

    def take_apart(self, leaf: Any) -> Parts:
        """Return the value as JSON."""
        _exactly(leaf, self._cls)
        if self._cls is float:
            return Parts({"value": repr(leaf), "bits": _bits(leaf)})
        if self._cls is complex:
            return Parts({"value": repr(leaf), "bits": [_bits(leaf.real), _bits(leaf.imag)]})
        if self._cls is int and not -(1 << 63) <= leaf < 1 << 63:
            return Parts({"hex": hex(leaf)})  # JSON readers of other languages, and Python's own, limit decimal digits
        return Parts({"value": leaf})

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:
        """Return the value; other formats keep it as an array."""
        if "" in arrays:
            return self._cls(arrays[""].item())
        if self._cls is float:
            return _float(json["bits"])
        if self._cls is complex:
            bits: Any = json["bits"]
            return complex(*map(_float, bits))
        if "hex" in json:
            return int(json["hex"], 16)  # type: ignore[arg-type]
        return self._cls(json["value"])


class _Text:
    """What strings and bytes share: short ones stand in the manifest, long ones are arrays of bytes."""

    def __init__(self, cls: type, encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]) -> None:
        self._cls, self._encode, self._decode = cls, encode, decode

    @property
    def name(self) -> str:
        """The name of the class."""
        return self._cls.__name__

    @property
    def types(self) -> tuple[type, ...]:
        """The class itself."""
        return (self._cls,)

    def take_apart(self, leaf: Any) -> Parts:
        """Return the value as JSON if it is short, else as an array of bytes."""
        _exactly(leaf, self._cls)
        if len(leaf) <= _INLINE:
            return Parts({"value": leaf if self._cls is str else base64.b64encode(leaf).decode()})
        return Parts({}, {"": np.frombuffer(self._encode(leaf), np.uint8)})

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:
        """Return the value."""
        if "" in arrays:
            return self._decode(np.asarray(arrays[""]).tobytes())
        value: Any = json["value"]
        return value if self._cls is str else base64.b64decode(value)


class StrHandler(_Text):
    """A string of Python, lone surrogates included."""

    def __init__(self) -> None:
        super().__init__(str, lambda text: text.encode("utf-8", "surrogatepass"), _decode_text)


def _decode_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


class BytesHandler(_Text):
    """A bytes object of Python."""

    def __init__(self) -> None:
        super().__init__(bytes, bytes, bytes)


class NumpyScalarHandler:
    """A scalar of NumPy or ml_dtypes: its bytes stand in the manifest."""

    @property
    def name(self) -> str:
        """`np.generic`, the class of all NumPy scalars."""
        return "np.generic"

    @property
    def types(self) -> tuple[type, ...]:
        """NumPy's and those of ml_dtypes, which do not all derive from it."""
        from milepost.dtypes import known_dtypes

        return (np.generic, *{dtype.type for dtype in known_dtypes().values()})

    def take_apart(self, leaf: Any) -> Parts:
        """Return dtype and bytes."""
        array = np.asarray(leaf)
        name = dtype_name(array.dtype)
        _exactly(leaf, array.dtype.type)
        return Parts({"dtype": name, "value": str(leaf), "bits": array.tobytes().hex()})

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:  # noqa: ARG002 - the protocol's
        """Return the scalar."""
        return np.frombuffer(bytes.fromhex(str(json["bits"])), dtype_named(str(json["dtype"])))[0]


class NumpyArrayHandler:
    """An array of NumPy, in any memory order; it comes back in C order."""

    @property
    def name(self) -> str:
        """`np.ndarray`."""
        return "np.ndarray"

    @property
    def types(self) -> tuple[type, ...]:
        """NumPy's arrays."""
        return (np.ndarray,)

    def take_apart(self, leaf: Any) -> Parts:
        """Return the array itself."""
        _exactly(leaf, np.ndarray, np.memmap)
        dtype_name(leaf.dtype)
        return Parts({}, {"": leaf})

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:  # noqa: ARG002 - the protocol's
        """Return the array."""
        return arrays[""]


class JaxArrayHandler:
    """A `jax.Array`, sharded in any way; random keys are kept as their data and the implementation's name."""

    @property
    def name(self) -> str:
        """`jax.Array`."""
        return "jax.Array"

    @property
    def types(self) -> tuple[type, ...]:
        """JAX's arrays, random keys included."""
        import jax

        return (jax.Array,)

    def take_apart(self, leaf: Any) -> Parts:
        """Return the array itself, or a key's data."""
        if isinstance(leaf, _tracer()):
            raise ValueError("it is a tracer: the save was called inside a function that JAX is tracing")  # noqa: TRY004 - a refusal
        if leaf.is_deleted():
            raise ValueError("it has been deleted or donated")
        dtype = leaf.dtype
        if isinstance(dtype, np.dtype):
            dtype_name(dtype)
            return Parts({"weak_type": True} if leaf.weak_type else {}, {"": leaf})
        return _key_parts(leaf)

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:
        """Return the array, or the key."""
        import jax

        array = arrays[""]
        if "key_impl" in json:
            return jax.random.wrap_key_data(array, impl=str(json["key_impl"]))
        if json.get("weak_type") and array.shape == ():
            return _weak(array)
        return array


class PlaceholderHandler:
    """The place of a leaf that the reference was told not to save, which comes back as `...`; it is never saved."""

    @property
    def name(self) -> str:
        """`placeholder`."""
        return "placeholder"

    @property
    def types(self) -> tuple[type, ...]:
        """No types: a placeholder in a tree to save is most likely forgotten there."""
        return ()

    def take_apart(self, leaf: Any) -> Parts:
        """Refuse."""
        raise ValueError(f"{leaf!r} is no value")

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:  # noqa: ARG002 - the protocol's
        """Return `...`."""
        return ...


@functools.cache
def _tracer() -> type:
    from jax.core import Tracer

    return Tracer


def _key_parts(leaf: Any) -> Parts:
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return Parts({"key_impl": str(jax.random.key_impl(leaf))}, {"": jax.random.key_data(leaf)})
    raise ValueError(f"its dtype {leaf.dtype} is none that can be written")


def _weak(array: Any) -> Any:
    """Return a scalar as weakly typed as it was saved, so that what is computed with it keeps its dtype.

    JAX offers no public way for arrays of more dimensions, nor for the bits of a NaN; those come back strongly typed.
    """
    import jax.numpy as jnp

    weak = jnp.asarray(array.item())
    return weak if weak.dtype == array.dtype and bool(weak == array) else array
