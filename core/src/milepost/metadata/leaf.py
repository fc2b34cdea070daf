"""What is known of one leaf without loading it, in the words of `milepost.v1`.

The rule: each of these also serves as a target. Loading into the metadata of a checkpoint gives what was saved.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from milepost.dtypes import known_dtypes
from milepost.metadata.sharding import from_saved

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import jax

    from milepost.manifest import ArrayLeaf, Item
    from milepost.metadata.sharding import ShardingMetadata
    from milepost.metadata.value import StorageMetadata

__all__ = ["ArrayMetadata", "NumpyMetadata", "leaves_metadata"]


@dataclasses.dataclass(frozen=True)
class ArrayMetadata:
    """A saved `jax.Array`: its shape, its dtype, and its sharding as saved.

    The dtype is NumPy's, or the text "key<impl>" for random keys, or the mere name of one that is not known here.
    `committed` is False for an array that JAX was free to move to another device.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | str
    sharding_metadata: ShardingMetadata | None = None
    storage_metadata: StorageMetadata | None = None
    committed: bool = dataclasses.field(default=True, compare=False, repr=False)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """The saved sharding as one of JAX, None where its devices do not exist."""
        if self.sharding_metadata is None:
            return None
        try:
            return self.sharding_metadata.to_jax_sharding()
        except ValueError:
            return None


@dataclasses.dataclass(frozen=True)
class NumpyMetadata:
    """A saved NumPy array: its shape, and its dtype, or the mere name of one that is not known here."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | str
    storage_metadata: StorageMetadata | None = None


_PYTHON: Mapping[str, Any] = {"bool": False, "int": 0, "float": 0.0, "complex": 0j, "str": "string", "bytes": b"bytes"}


def leaves_metadata(item: Item) -> Iterator[Any]:
    """Yield the metadata of every leaf of an item, in order.

    Scalars, strings and bytes are shown by a value of their type, as the reference does with Python's; leaves of a kind
    that is not known here by the dict that describes them.
    """
    shardings = [(from_saved(saved), saved.get("committed") is not False) for saved in item.shardings]
    return (_leaf_metadata(leaf, shardings) for leaf in item.leaves)


def _leaf_metadata(leaf: Mapping[str, Any], shardings: list[tuple[ShardingMetadata | None, bool]]) -> Any:
    kind, arrays = leaf["type"], leaf.get("arrays", {})
    if kind in _PYTHON:
        return _PYTHON[kind]
    if kind == "np.generic":
        dtype = _dtype(str(leaf["dtype"]))
        return NumpyMetadata((), dtype) if isinstance(dtype, str) else np.zeros((), dtype)[()]
    if kind == "np.ndarray":
        return NumpyMetadata(arrays[""].shape, _dtype(arrays[""].dtype))
    if kind == "jax.Array":
        return _array_metadata(leaf, arrays[""], shardings)
    return dict(leaf)


def _array_metadata(
    leaf: Mapping[str, Any], array: ArrayLeaf, shardings: list[tuple[ShardingMetadata | None, bool]]
) -> ArrayMetadata:
    sharding, committed = (None, True) if array.sharding is None else shardings[array.sharding]
    if "key_impl" in leaf:
        return ArrayMetadata(array.shape[:-1], f"key<{leaf['key_impl']}>", sharding, committed=committed)
    return ArrayMetadata(array.shape, _dtype(array.dtype), sharding, committed=committed)


def _dtype(name: str) -> np.dtype[Any] | str:
    return known_dtypes().get(name, name)
