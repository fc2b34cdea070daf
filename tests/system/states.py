"""Trees to save anywhere, made from fixed seeds."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

__all__ = ["equal", "sharded", "small", "state"]

_DTYPES = ("bool", "int4", "int8", "uint16", "int64", "float16", "bfloat16", "float8_e4m3fn", "float64", "complex64")


def state() -> dict[str, Any]:
    """Return a tree with every kind of leaf, and arrays from none to some megabytes."""
    random = np.random.default_rng(7)
    arrays = {name: random.integers(0, 2, (3, 5)).astype(getattr(ml_dtypes, name, name)) for name in _DTYPES}
    return {
        "arrays": arrays,
        "large": random.standard_normal((700, 900)),
        "jax": {"weights": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3)},
        "list": [np.zeros((0, 3)), (np.array(2 + 1j), True)],
        "numbers": {1: np.arange(3), 2: np.arange(2)},
        "a/b ü": np.arange(4),
        "empty": {},
        "none": None,
        "text": "x" * 5000,
        "step": 7,
        "rate": 0.1,
    }


def small(label: str) -> dict[str, Any]:
    """Return the tree of a label: some small arrays."""
    random = np.random.default_rng(zlib.crc32(label.encode()))
    return {
        "weights": random.standard_normal((30, 20), dtype=np.float32),
        "half": random.standard_normal(50).astype(ml_dtypes.bfloat16),
        "text": label,
        "none": np.zeros((0, 4), np.float16),
    }


def sharded() -> dict[str, Any]:
    """Return arrays that are spread over eight devices: by two axes, by one, and not at all."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"both": ("a", "b"), "one": (None, "b"), "none": ()}
    return {
        name: jax.device_put(
            jnp.arange(16 * 12.0).reshape(16, 12),
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)),
        )
        for name, spec in specs.items()
    }


def equal(one: Any, other: Any) -> None:
    """Fail unless two trees are the same to the bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(left) is type(right)
        if isinstance(left, jax.Array) and jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = map(jax.random.key_data, (left, right))  # noqa: PLW2901
        assert np.asarray(left).dtype == np.asarray(right).dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
