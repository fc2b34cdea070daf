"""Which dtypes arrays may have, and their names.

The rule: the dtypes that JAX knows, by the names NumPy and ml_dtypes give them; a name from a manifest is looked up
here and nowhere else, so that a hostile one finds nothing. Values are in native byte order in memory.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["CATEGORY", "can_cast", "dtype_name", "dtype_named", "known_dtypes"]

_NUMPY = {
    "bool": ("bool",),
    "int": ("int8", "int16", "int32", "int64"),
    "uint": ("uint8", "uint16", "uint32", "uint64"),
    "float": ("float16", "float32", "float64"),
    "complex": ("complex64", "complex128"),
}

_EXTENSION = {
    "int": ("int2", "int4"),
    "uint": ("uint2", "uint4"),
    "float": (
        "bfloat16",
        "float4_e2m1fn",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ),
}

CATEGORY: dict[str, str] = {
    name: kind for table in (_NUMPY, _EXTENSION) for kind, names in table.items() for name in names
}
"""The kind of number by dtype name: bool, int, uint, float or complex."""

_WIDENS = {
    "bool": ("bool", "int", "uint", "float", "complex"),
    "int": ("int", "uint", "float", "complex"),
    "uint": ("uint", "int", "float", "complex"),
    "float": ("float", "complex"),
    "complex": ("complex",),
}


@functools.cache
def known_dtypes() -> dict[str, np.dtype[Any]]:
    """Return every dtype by name; those that this ml_dtypes does not have yet are left out."""
    table = {name: np.dtype(name) for names in _NUMPY.values() for name in names}
    for name in (name for names in _EXTENSION.values() for name in names):
        if hasattr(ml_dtypes, name):
            table[name] = np.dtype(getattr(ml_dtypes, name))
    return table


def dtype_named(name: str) -> np.dtype[Any]:
    """Return the dtype of a name, or raise `ValueError`.

    >>> dtype_named("bfloat16").itemsize
    2
    """
    found = known_dtypes().get(name)
    if found is None:
        raise ValueError(f"cannot read dtype {name!r}: JAX has none of that name")
    return found


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype that can be saved, or raise `ValueError` with the reason.

    >>> dtype_name(np.dtype("float32"))
    'float32'
    """
    name = _names().get(dtype)
    if name is not None:
        return name
    if not dtype.isnative:
        raise ValueError(f"its dtype {dtype.str} is in foreign byte order")
    raise ValueError(f"its dtype {dtype} is none that JAX knows")


@functools.cache
def _names() -> dict[np.dtype[Any], str]:
    return {dtype: name for name, dtype in known_dtypes().items()}


def can_cast(source: str, target: str) -> bool:
    """Say whether values keep their kind: floats may become other floats, not integers.

    >>> can_cast("float32", "bfloat16"), can_cast("float32", "int32")
    (True, False)
    """
    return CATEGORY.get(target) in _WIDENS.get(CATEGORY.get(source, ""), ())
