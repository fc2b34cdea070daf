"""Which dtypes TensorStore holds, and what each is called in Zarr's metadata.

The rule: an array is stored as it is or refused; nothing is cast or viewed as something else, since whoever reads the
files without milepost should find the dtype that was saved.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from milepost.errors import UnsupportedLeafError, noted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from milepost.protocols import ArraySpec

__all__ = ["Kind", "check", "coded", "kind"]

_NUMPY = {
    "bool": "|b1",
    "int8": "|i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "|u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}
_EXTENSION = (
    *("bfloat16", "int2", "int4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


class Kind(NamedTuple):
    """A dtype: its name, NumPy's view of it, its code in Zarr v2 (v3 uses the name), and its zero as JSON."""

    name: str
    dtype: np.dtype[Any]
    code: str
    zero: bool | float | tuple[float, float]


@functools.cache
def kind(name: str) -> Kind | None:
    """Return how the dtype of that name is stored; None if the TensorStore installed does not hold it.

    >>> kind("bfloat16").code, kind("float32").code, kind("float8_e4m3")
    ('bfloat16', '<f4', None)
    """
    code = _NUMPY.get(name) or (name if name in _EXTENSION else None)
    if code is None or not _held(name):
        return None
    dtype = np.dtype(name if name in _NUMPY else getattr(ml_dtypes, name))
    zero: bool | float | tuple[float, float] = 0.0 if "float" in name else 0
    if name == "bool":
        zero = False
    elif dtype.kind == "c":
        zero = (0.0, 0.0)
    return Kind(name, dtype, code, zero)


def _held(name: str) -> bool:
    import tensorstore

    try:
        tensorstore.dtype(name)
    except (TypeError, ValueError):
        return False
    return name in _NUMPY or hasattr(ml_dtypes, name)


@functools.cache
def coded(code: str) -> tuple[Kind, bool] | None:
    """Return the dtype behind a code of Zarr v2 or a name of v3, and whether its bytes are in this machine's order.

    >>> [(found.name, native) for found, native in map(coded, ("<f4", ">f4", "float32"))]
    [('float32', True), ('float32', False), ('float32', True)]
    """
    if code[:1] == ">":
        found = coded("<" + code[1:])
        return found and (found[0], False)
    name = next((name for name, known in _NUMPY.items() if known[1:] == code[1:]), code)
    found_kind = kind(name)
    return None if found_kind is None else (found_kind, True)


def check(specs: Iterable[ArraySpec]) -> None:
    """Raise one `UnsupportedLeafError` that lists every array whose dtype TensorStore cannot hold."""
    bad = [f"{spec.name!r} of dtype {spec.dtype!r}" for spec in specs if kind(spec.dtype) is None]
    if bad:
        raise noted(
            UnsupportedLeafError(f"TensorStore cannot hold these arrays: {', '.join(bad)}"),
            "the array writer 'safetensors' holds every dtype of JAX",
        )
