"""An independent reading, and writing, of safetensors files: eight bytes of length, a JSON header, the data.

The rule: nothing here knows milepost, or the safetensors library.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["pack", "unpack"]

_NAMES: dict[str, type[Any]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
}


def unpack(content: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file; any error means that the file is not whole.

    >>> unpack(pack({"a": np.arange(3)}))
    {'a': array([0, 1, 2])}
    """
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    return {name: _array(content[data:], **entry) for name, entry in header.items()}


def _array(data: bytes, dtype: str, shape: list[int], data_offsets: list[int]) -> NDArray[Any]:
    start, stop = data_offsets
    kind = np.dtype(_NAMES[dtype])
    if stop - start != math.prod(shape) * kind.itemsize or stop > len(data):
        raise ValueError(f"array of shape {shape} is cut short")
    return np.frombuffer(data[start:stop], kind).reshape(shape)


def pack(arrays: dict[str, NDArray[Any]]) -> bytes:
    """Return a file of these arrays."""
    words = {np.dtype(kind): word for word, kind in _NAMES.items()}
    header: dict[str, Any] = {}
    data = b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": words[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
