"""States that milepost and Orbax both hold, made from fixed seeds, and what is to come back of them.

Nothing here asks either library: what is expected follows from the state alone.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BY_JAX = (
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e3m4", "float8_e8m0fnu"),
    *("float4_e2m1fn", "int4", "int2"),
)
"""Dtypes that both sides hold as arrays of JAX."""

BY_NUMPY = (*BY_JAX, "int64", "uint64", "float64", "complex128")
"""Dtypes that both sides hold as arrays of NumPy."""


class Point(NamedTuple):
    x: Any
    y: Any


class Nothing(NamedTuple):
    pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Train:
    params: Any
    moments: Any


def bits(dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return an array of random bits; of types shorter than a byte and of truth values, of random values."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(kind)
    if dtype in ("int4", "int2", "float4_e2m1fn"):
        return rng.integers(-2, 2, shape).astype(kind)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)


def mesh() -> Any:
    """Return a mesh of all devices, in two axes."""
    devices = np.array(jax.devices())
    return jax.sharding.Mesh(devices.reshape(-1, 2 if len(devices) % 2 == 0 else 1), ("a", "b"))


def spread(array: Any, *spec: Any) -> Any:
    """Spread an array over the mesh."""
    return jax.device_put(array, jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(*spec)))


def arrays() -> dict[str, Any]:
    """Return arrays of every dtype."""
    return {
        "jax": {name: jnp.asarray(bits(name, (3, 4), 1)) for name in BY_JAX},
        "numpy": {name: bits(name, (5,), 2) for name in BY_NUMPY},
        "sharded": {name: spread(bits(name, (8, 16), 3), "a", "b") for name in ("float32", "bfloat16", "int4")},
        "rows": spread(bits("float32", (16, 3), 4), ("a", "b")),
        "columns": spread(bits("float32", (3, 16), 5), None, "b"),
        "copies": spread(bits("float32", (8,), 6)),
        "second device": jax.device_put(bits("float32", (4,), 7), jax.devices()[-1]),
        "no axes": jnp.float32(2.5),
        "numpy no axes": np.array(7, np.int16),
        "large": np.arange(70_000, dtype=np.float32),
    }


def containers() -> dict[str, Any]:
    """Return every container, and everything that is empty."""
    return {
        "list": [jnp.ones(2), [np.arange(3), {"deep": [1]}]],
        "tuple": (np.arange(2), 3),
        "point": Point(np.arange(4), 2.5),
        "ordered": collections.OrderedDict(z=1, a=np.arange(2)),
        "train": Train({"w": np.arange(6.0).reshape(2, 3)}, [jnp.zeros(3)]),
        "numbers": {1: np.arange(1), 20: np.arange(2), 3: 4},
        "eleven": [np.array(number) for number in range(11)],
        "a/b": {"c d": np.arange(2), "ü": 5},
        "none": None,
        "empty": {"dict": {}, "list": [], "tuple": (), "ordered": collections.OrderedDict(), "nothing": Nothing()},
    }


def scalars() -> dict[str, Any]:
    """Return numbers."""
    return {
        "int": 7,
        "negative": -(1 << 63),
        "most": (1 << 63) - 1,
        "float": 0.1,
        "infinite": float("-inf"),
        "true": True,
        "false": False,
    }


def keys() -> dict[str, Any]:
    """Return random keys."""
    return {
        "typed": jax.random.key(1),
        "rbg": jax.random.key(2, impl="rbg"),
        "many": jax.random.split(jax.random.key(3), 8),
        "spread": spread(jax.random.split(jax.random.key(4), 8), "a"),
        "legacy": jax.random.PRNGKey(5),
    }


def texts() -> dict[str, Any]:
    """Return strings, which Orbax's trees hold, and its standard ones do not."""
    return {"short": "short", "empty": "", "ü": "ä☃", "quoted": '"\\\n', "long": "long " * 1000}


def standard() -> dict[str, Any]:
    """Return all that every tree of Orbax's holds."""
    return {"arrays": arrays(), "containers": containers(), "scalars": scalars(), "keys": keys()}


def tree() -> dict[str, Any]:
    """Return all that a tree of Orbax's holds."""
    return {**standard(), "texts": texts()}


def small() -> dict[str, Any]:
    """Return one of each kind that every tree of Orbax's holds."""
    return {
        "sharded": spread(bits("bfloat16", (8, 16), 8), "a", "b"),
        "numpy": bits("int64", (5,), 9),
        "point": Point((jnp.ones(2), None), {}),
        "scalar": 2.5,
        "key": jax.random.key(6),
    }


# --- what is to come back --------------------------------------------------------------------------------------------


def plain(node: Any) -> Any:
    """Return a tree as Orbax gives it without a target: dicts with texts for keys, and lists."""
    if isinstance(node, Nothing):
        return None
    if isinstance(node, Point | Train):
        node = {name: getattr(node, name) for name in type(node).__annotations__}
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple) and node:
        return [plain(value) for value in node]
    return dict(node) if isinstance(node, collections.OrderedDict) else node


def target(node: Any) -> Any:
    """Return what Orbax takes for a target: values of the same kinds, none of them the saved one."""

    def leaf(value: Any) -> Any:
        if isinstance(value, jax.Array):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        if isinstance(value, np.ndarray):
            return np.zeros_like(value)
        return type(value)()

    return jax.tree.map(leaf, node)


def assert_same(expected: Any, found: Any, path: str = "") -> None:
    """Compare two trees: structure, classes, dtypes, bits, and where the arrays are."""
    if isinstance(expected, jax.Array) and jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        assert str(jax.random.key_impl(expected)) == str(jax.random.key_impl(found)), path
        assert_same(jax.random.key_data(expected), jax.random.key_data(found), f"{path} (key data)")
        return
    if isinstance(expected, jax.Array):
        assert isinstance(found, jax.Array), f"{path}: {type(found)}"
        assert found.sharding.is_equivalent_to(expected.sharding, expected.ndim), f"{path}: {found.sharding}"
        assert_same(np.asarray(expected), np.asarray(found), path)
        return
    assert type(expected) is type(found), f"{path}: {type(expected)} {type(found)}"
    if isinstance(expected, np.ndarray):
        assert (expected.dtype, expected.shape) == (found.dtype, found.shape), path
        assert expected.tobytes() == found.tobytes(), path
    elif isinstance(expected, dict):
        assert list(map(repr, expected)) == list(map(repr, found)) or set(expected) == set(found), path
        for key, value in expected.items():
            assert_same(value, found[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), path
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(expected, Train):
        assert_same(vars(expected), vars(found), path)
    else:
        assert repr(expected) == repr(found), f"{path}: {expected!r} {found!r}"
