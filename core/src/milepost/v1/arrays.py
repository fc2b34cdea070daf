"""What counts as an array, or as what is known of one.

Decides nothing: names for annotations, and the function that turns an array into what is known of it. The rule: no name
here needs JAX before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from milepost.tree import to_shape_dtype_struct

if TYPE_CHECKING:
    import jax

__all__ = [
    "AbstractArray",
    "AbstractScalar",
    "AbstractShardedArray",
    "ArrayLike",
    "DType",
    "Scalar",
    "Shape",
    "to_shape_dtype_struct",
]

Shape: TypeAlias = tuple[int, ...]
"""The shape of an array."""

DType: TypeAlias = np.dtype
"""The dtype of an array."""

Scalar: TypeAlias = int | float | np.number | bytes | bool
"""A number; `bytes` is there because the reference has it."""

AbstractScalar: TypeAlias = Scalar
"""What a number is loaded as: a value of the wanted type."""


class AbstractArray(Protocol):
    """What has a shape and a dtype, either of which may be None: not known, or not to be changed."""

    @property
    def shape(self) -> Shape | None:
        """The shape."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype."""
        ...


class AbstractShardedArray(AbstractArray, Protocol):
    """What has a sharding, too; None: not known, or up to who loads."""

    @property
    def sharding(self) -> jax.sharding.Sharding | Any | None:
        """The sharding, or the layout that holds it."""
        ...


ArrayLike: TypeAlias = AbstractArray | AbstractShardedArray
"""An array, or what is known of one."""
