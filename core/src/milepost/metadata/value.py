"""What is known of one leaf without loading it, in the words of the checkpointers and managers.

The rule: equality is about what was saved, not where it lies: names and directories are not compared.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from milepost.metadata.sharding import from_jax_sharding

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    import jax
    import numpy as np
    from upath import UPath

    from milepost.metadata.sharding import ShardingMetadata

__all__ = ["ArrayMetadata", "Metadata", "ScalarMetadata", "StorageMetadata", "StringMetadata"]


@dataclasses.dataclass(frozen=True)
class StorageMetadata:
    """How an array lies in the storage: the shape of a chunk, and of what one writer wrote (None: not cut).

    `zarr_metadata` is what a Zarr writer noted besides; it is neither compared nor shown.
    """

    chunk_shape: tuple[int, ...] | None
    write_shape: tuple[int, ...] | None = None
    zarr_metadata: Any = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(eq=False)
class Metadata:
    """A leaf: its name, the keys of its path joined by dots, and the directory of the tree it belongs to."""

    name: str
    directory: UPath | Path | None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) or NotImplemented

    __hash__: ClassVar[None] = None  # type: ignore[assignment]


@dataclasses.dataclass(eq=False)
class ArrayMetadata(Metadata):
    """An array: its shape, its sharding as saved, its dtype, and how it is stored; None for what is not known."""

    shape: tuple[int, ...]
    sharding: ShardingMetadata | None
    dtype: np.dtype[Any] | None
    storage: StorageMetadata | None = None

    @classmethod
    def from_shape_dtype_struct(
        cls, s: jax.ShapeDtypeStruct, name: str | None = None, directory: UPath | Path | None = None
    ) -> Self:
        """Return the metadata that an array of this shape, dtype and sharding would have."""
        sharding = None if s.sharding is None else from_jax_sharding(s.sharding)
        return cls(name=name or "", directory=directory, shape=s.shape, sharding=sharding, dtype=s.dtype)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, ArrayMetadata):
            return NotImplemented
        return self._compared() == other._compared()

    __hash__: ClassVar[None] = None

    def _compared(self) -> tuple[Any, ...]:
        return tuple(self.shape), self.sharding, *_compared(self.dtype), self.storage


@dataclasses.dataclass(eq=False)
class ScalarMetadata(ArrayMetadata):
    """A number: of Python, or a scalar of NumPy. Equal to another of the same dtype."""

    shape: tuple[int, ...] = ()
    sharding: ShardingMetadata | None = None
    dtype: np.dtype[Any] | None = None
    storage: StorageMetadata | None = None

    def _compared(self) -> tuple[Any, ...]:
        return _compared(self.dtype)


def _compared(dtype: np.dtype[Any] | None) -> tuple[Any, ...]:
    # NumPy takes None for float64.
    return dtype is None, dtype


@dataclasses.dataclass(eq=False)
class StringMetadata(Metadata):
    """A string. All are equal, since their text is not metadata."""
