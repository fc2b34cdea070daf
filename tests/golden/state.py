"""What the golden checkpoints hold: every kind of leaf and container, built anew wherever it is compared.

Never changed: what a released version wrote must be loaded for ever. A new kind of leaf gets a state of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

METADATA = {"run": "golden", "lr": [0.1, 1e-05], "nested": {"é": None}}

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3"),
    *("float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)

Point = collections.namedtuple("Point", ["x", "y"])  # noqa: PYI024 - the kind of class many have


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: object
    bias: object
    name: str = dataclasses.field(default="dense", metadata={"static": True})


def numbers(name, shape):
    """Return an array whose bits are 0, 1, 2, ... as far as the dtype has them."""
    dtype = np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
    mask = {"bool": 1, "int2": 1, "uint2": 3, "int4": 7, "uint4": 15, "float4_e2m1fn": 15}.get(name, 255)
    bits = np.arange(math.prod(shape) * dtype.itemsize, dtype=np.uint8) & np.uint8(mask)
    return np.frombuffer(bits.tobytes(), dtype).reshape(shape)


def state():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return {
        "dtypes": {name: numbers(name, (3,)) for name in DTYPES},
        "jax": {
            "sharded": jax.device_put(jnp.arange(32.0).reshape(8, 4), rows),
            "replicated": jax.device_put(jnp.arange(5, dtype=jnp.int8), everywhere),
            "free": jnp.arange(3, dtype=jnp.bfloat16),
            "bound": jax.device_put(jnp.arange(4, dtype=jnp.uint16), jax.devices()[3]),
            "zero": jnp.zeros((0, 4)),
        },
        "keys": [jax.random.key(7), jax.random.split(jax.random.key(8, impl="rbg"), 2), jax.random.PRNGKey(9)],
        "shapes": [numbers("float32", shape) for shape in ((), (1,), (0,), (2, 0, 3), (2, 3, 4))],
        "large": np.arange(2000, dtype=np.int16),
        "python": [0, -(2**63), 10**40, True, False, 0.1, -0.0, math.inf, 1.5 - 2j, "", "é\n", "x" * 2000, b"\0\xff"],
        "scalars": [np.float32(0.1), np.bool_(1), np.int64(-5), ml_dtypes.bfloat16(1.5)],
        "containers": {
            "empty": [{}, [], (), None],
            "ordered": collections.OrderedDict(z=1, a=2),
            "default": collections.defaultdict(list, k=3),
            "point": Point(1, (2, [3])),
            "layer": Layer(np.ones(2), None, name="first"),
        },
        "names": {"a/b": 1, "a.b": 2, "": 3, "~1": 4, "@0:4": 5, "__metadata__": 6},
        "numbers": {1: "one", -2: "minus two"},
    }
