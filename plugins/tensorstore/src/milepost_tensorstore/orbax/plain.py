"""Small arrays as plain Zarr v2 of one chunk each, where Orbax looks for nothing else.

The rule: one document and one file of bytes, without compression; for random keys, which are a few words long.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.protocols import Array

__all__ = ["files"]


def files(name: str, array: Array) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the files of an array of one of NumPy's own dtypes.

    >>> [name for name, _ in files("checkpoint", np.arange(3))]
    ['checkpoint/.zarray', 'checkpoint/0']
    """
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    document = {
        "chunks": [max(length, 1) for length in array.shape],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": little.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }
    yield f"{name}/.zarray", json.dumps(document).encode("ascii")
    if array.size:
        yield f"{name}/{'.'.join(['0'] * max(array.ndim, 1))}", little.tobytes()
