"""Which dtypes the writer knows, and how each stands in a safetensors file.

The rule: a dtype that every safetensors from 0.5 on defines is stored under its code there, because one unknown code
makes a whole file unreadable; every other dtype is stored as bytes, with one more axis of its item size, and named.
"""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from milepost.errors import UnsupportedLeafError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from milepost.protocols import ArraySpec

__all__ = ["CODES", "Kind", "check", "kind"]

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_AS_BYTES = (
    *("complex64", "complex128", "int1", "int2", "int4", "uint1", "uint2", "uint4"),
    *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


CODES: Mapping[str, str] = MappingProxyType(
    {code: name for name, code in _CODES.items()}
    | {"C64": "complex64", "F8_E8M0": "float8_e8m0fnu"}
    | {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
)
"""The dtype by its code in a file, those codes included that only newer releases of safetensors write."""


class Kind(NamedTuple):
    """A dtype, its item size, and its code in the file; without a code of its own it is stored as bytes."""

    dtype: np.dtype[Any]
    itemsize: int
    code: str
    native: bool


@functools.cache
def kind(name: str) -> Kind | None:
    """Return how the dtype of that name is stored; None if this writer, or the ml_dtypes installed, does not know it.

    >>> kind("bfloat16").code, kind("complex64").code, kind("object")
    ('BF16', 'U8', None)
    """
    if name not in _CODES and name not in _AS_BYTES:
        return None
    scalar = getattr(ml_dtypes, name, None)
    try:
        dtype = np.dtype(name if scalar is None else scalar)
    except TypeError:
        return None
    return Kind(dtype, dtype.itemsize, _CODES.get(name, "U8"), name in _CODES)


def check(specs: Iterable[ArraySpec]) -> None:
    """Raise one `UnsupportedLeafError` that lists every array whose dtype cannot be written."""
    bad = [f"{spec.name!r} of dtype {spec.dtype!r}" for spec in specs if kind(spec.dtype) is None]
    if bad:
        raise UnsupportedLeafError(f"safetensors files cannot hold these arrays: {', '.join(bad)}")
