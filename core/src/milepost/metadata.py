"""What is known of a leaf without loading it.

The rule: plain values that no device and no JAX is needed for. Each also serves as a target: loading into the metadata
of a checkpoint gives what was saved.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ArrayMetadata", "NumpyMetadata", "StorageMetadata", "leaf_metadata"]


@dataclasses.dataclass(frozen=True, slots=True)
class StorageMetadata:
    """How an array lies in the storage: the shape of a chunk, and of what one writer wrote (None: not cut)."""

    chunk_shape: tuple[int, ...] | None
    write_shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ArrayMetadata:
    """A saved `jax.Array`: shape, dtype by name ("key<impl>" for random keys), and its sharding as saved, as JSON."""

    shape: tuple[int, ...]
    dtype: str
    sharding_metadata: Mapping[str, Any] | None = None
    storage_metadata: StorageMetadata | None = None


@dataclasses.dataclass(frozen=True)
class NumpyMetadata:
    """A saved NumPy array or scalar: shape, and dtype by name."""

    shape: tuple[int, ...]
    dtype: str
    storage_metadata: StorageMetadata | None = None


_PYTHON: Mapping[str, Any] = {"bool": False, "int": 0, "float": 0.0, "complex": 0j, "str": "string", "bytes": b"bytes"}


def leaf_metadata(leaf: Mapping[str, Any], shardings: list[Any]) -> Any:
    """Return the metadata of a leaf as the manifest describes it.

    Python's scalars, strings and bytes are shown by a value of their type, as the reference does; leaves of a kind that
    is not known here by the dict that describes them.
    """
    kind, arrays = leaf["type"], leaf.get("arrays", {})
    if kind in _PYTHON:
        return _PYTHON[kind]
    if kind == "np.generic":
        return NumpyMetadata((), str(leaf["dtype"]))
    if kind == "np.ndarray":
        return NumpyMetadata(arrays[""].shape, arrays[""].dtype)
    if kind == "jax.Array":
        array = arrays[""]
        sharding = None if array.sharding is None else shardings[array.sharding]
        if "key_impl" in leaf:
            return ArrayMetadata(array.shape, f"key<{leaf['key_impl']}>", sharding)
        return ArrayMetadata(array.shape, array.dtype, sharding)
    return dict(leaf)
