"""Which dtypes the writer knows, and how each stands in a Zarr array.

The rule: a dtype of Zarr's core specification is stored as what it is, because every reader knows it. Any other is
stored as the unsigned integer of its size, bit for bit, and named in the array's attribute `milepost_dtype`: one data
type that a reader does not know makes the whole array, and for some readers the whole group, unreadable.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from milepost.errors import UnsupportedLeafError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from milepost.protocols import ArraySpec

__all__ = ["Kind", "check", "kind"]

_NATIVE = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_AS_INTEGERS = {
    "bfloat16": "uint16",
    **dict.fromkeys(("int1", "int2", "int4", "uint1", "uint2", "uint4"), "uint8"),
    **dict.fromkeys(("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3"), "uint8"),
    **dict.fromkeys(("float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"), "uint8"),
    **dict.fromkeys(("float8_e5m2fnuz", "float8_e8m0fnu"), "uint8"),
}


class Kind(NamedTuple):
    """A dtype, and the one that it is stored as."""

    dtype: np.dtype[Any]
    stored: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return self.dtype.itemsize

    @property
    def native(self) -> bool:
        """Whether Zarr has it."""
        return self.dtype == self.stored


@functools.cache
def kind(name: str) -> Kind | None:
    """Return how the dtype of that name is stored; None if this writer, or the ml_dtypes installed, does not know it.

    >>> kind("bfloat16").stored.name, kind("complex64").stored.name, kind("object")
    ('uint16', 'complex64', None)
    """
    if name in _NATIVE:
        return Kind(np.dtype(name), np.dtype(name))
    if name not in _AS_INTEGERS or not hasattr(ml_dtypes, name):
        return None
    return Kind(np.dtype(getattr(ml_dtypes, name)), np.dtype(_AS_INTEGERS[name]))


def check(specs: Iterable[ArraySpec]) -> None:
    """Raise one `UnsupportedLeafError` that lists every array whose dtype cannot be written."""
    bad = [f"{spec.name!r} of dtype {spec.dtype!r}" for spec in specs if kind(spec.dtype) is None]
    if bad:
        raise UnsupportedLeafError(f"Zarr groups cannot hold these arrays: {', '.join(bad)}")
