"""What can be said of a single leaf when it is saved or restored, name for name as in the reference.

The rule: plain values, given leaf by leaf in a tree of the same structure as what is saved or restored.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from milepost.errors import ConfigError

if TYPE_CHECKING:
    import jax
    import numpy.typing as npt
    from jax.experimental.layout import Format

    from milepost.metadata import ShardingMetadata

__all__ = ["ArrayRestoreArgs", "RestoreArgs", "SaveArgs", "SingleReplicaArrayRestoreArgs"]


@dataclasses.dataclass
class SaveArgs:
    """How a leaf is saved.

    `dtype` is what an array is converted to. `chunk_byte_size` bounds, in bytes, the parts in which it is written, and
    `shard_axes` are the axes to cut it along. `aggregate` is deprecated.
    """

    aggregate: bool = False
    dtype: npt.DTypeLike | None = None
    chunk_byte_size: int | None = None
    shard_axes: tuple[int, ...] = ()


@dataclasses.dataclass
class RestoreArgs:
    """How a leaf is restored: the class to restore it as, and the dtype to convert it to; None: as it was saved."""

    restore_type: Any | None = None
    dtype: npt.DTypeLike | None = None


def _jax_array() -> Any:
    import jax

    return jax.Array


@dataclasses.dataclass
class ArrayRestoreArgs(RestoreArgs):
    """How a leaf is restored as a `jax.Array`: where its parts go, and which shape it gets.

    It is placed by `mesh` and `mesh_axes`, or by `sharding`, else as it was saved. `shape` and `global_shape` are two
    names of one thing: whichever is given stands for both; two that differ raise `ConfigError` (a ValueError). Where
    the shape differs from the saved one, `strict` raises an error on restoring; otherwise each axis is cut, or filled
    with zeros.
    """

    restore_type: Any | None = dataclasses.field(default_factory=_jax_array)
    mesh: jax.sharding.Mesh | None = None
    mesh_axes: jax.sharding.PartitionSpec | None = None
    sharding: jax.sharding.Sharding | ShardingMetadata | Format | None = None
    global_shape: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if self.shape is None:
            self.shape = self.global_shape
        elif self.global_shape is None:
            self.global_shape = self.shape
        elif self.shape != self.global_shape:
            raise ConfigError(f"cannot restore with global_shape={self.global_shape!r}: shape is {self.shape!r}")


@dataclasses.dataclass
class SingleReplicaArrayRestoreArgs(ArrayRestoreArgs):
    """How an array is read by one replica alone, placed by `single_replica_sharding`, and then sent to the others."""

    single_replica_sharding: jax.sharding.NamedSharding | None = None
