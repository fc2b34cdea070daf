"""What is saved and loaded: six training states, from few large arrays to very many small ones.

The rule: a workload is a shape that trainings have, its numbers are random (so that compression gains what it gains on
weights, and no more), and its leaves are `jax.Array`s, as they are after a training step.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["WORKLOADS", "Workload", "abstract", "byte_count", "fresh", "host_views", "ready", "same_bits"]

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A state to save: what it is in words, how to make it, and how many devices it is spread over."""

    name: str
    title: str
    make: Callable[[], Any]
    devices: int = 1


def ready(state: Any) -> Any:
    """Wait until a state is there; return it."""
    import jax

    return jax.block_until_ready(state)  # type: ignore[no-untyped-call]  # JAX types it in part


def fresh(state: Any) -> Any:
    """Return a copy on the same devices, with nothing cached on the host: what a training step would hand over."""
    import jax
    import jax.numpy as jnp

    return ready(jax.tree.map(jnp.copy, state))


def abstract(state: Any) -> Any:
    """Return the shapes, dtypes and shardings of a state."""
    import jax

    struct: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def host_views(state: Any) -> Iterator[Any]:
    """Yield the bytes of a state as one-dimensional arrays, shard by shard, without copying where JAX allows it."""
    import jax
    import numpy as np

    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                yield np.ascontiguousarray(np.asarray(shard.data)).reshape(-1).view(np.uint8)


def byte_count(state: Any) -> int:
    """Return how many bytes of data a state holds."""
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def same_bits(one: Any, other: Any) -> bool:
    """Say whether two states have the same structure, types, shardings and bits."""
    import numpy as np

    if abstract(one) != abstract(other):
        return False
    return all(np.array_equal(a, b) for a, b in zip(host_views(one), host_views(other), strict=True))


def _normal(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> Any:
    import jax
    import numpy as np

    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return jax.device_put(values.astype(jax.numpy.dtype(dtype), copy=False), may_alias=False)


def _large() -> Any:
    return {f"layer_{i:02}": _normal((4096, 4096), i) for i in range(16)}


def _brain_floats() -> Any:
    return {f"layer_{i:02}": _normal((8192, 4096), i, "bfloat16") for i in range(16)}


def _many_tiny() -> Any:
    return {f"group_{g:03}": {f"leaf_{i:03}": _normal((64,), g * 100 + i) for i in range(100)} for g in range(200)}


def _many_small() -> Any:
    return {f"leaf_{i:04}": _normal((256, 256), i) for i in range(1000)}


def _sharded() -> Any:
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    spec = jax.sharding.PartitionSpec("data")  # type: ignore[no-untyped-call]  # JAX types it in part
    sharding = jax.sharding.NamedSharding(mesh, spec)
    shape = (8192, 131072)
    rows = shape[0] // 8
    shards = [jax.device_put(_normal((rows, shape[1]), i), device) for i, device in enumerate(mesh.devices.flat)]
    return {"table": jax.make_array_from_single_device_arrays(shape, sharding, shards)}


def _gpt2_shapes() -> dict[str, Any]:
    width = 768

    def norm() -> dict[str, Any]:
        return {"scale": (width,), "bias": (width,)}

    def dense(rows: int, columns: int) -> dict[str, Any]:
        return {"kernel": (rows, columns), "bias": (columns,)}

    def block() -> dict[str, Any]:
        return {
            "ln_1": norm(),
            "attn": {"c_attn": dense(width, 3 * width), "c_proj": dense(width, width)},
            "ln_2": norm(),
            "mlp": {"c_fc": dense(width, 4 * width), "c_proj": dense(4 * width, width)},
        }

    blocks = {f"h{layer:02}": block() for layer in range(12)}
    return {"wte": (50257, width), "wpe": (1024, width), "ln_f": norm(), **blocks}


def _train_state() -> Any:
    import jax
    import jax.numpy as jnp

    seeds = itertools.count()

    def tree() -> Any:
        return jax.tree.map(lambda shape: _normal(shape, next(seeds)), _gpt2_shapes(), is_leaf=_is_shape)

    optimizer = {"mu": tree(), "nu": tree(), "count": jnp.int32(7)}
    return ready({"params": tree(), "optimizer": optimizer, "step": jnp.int32(7)})


def _is_shape(node: object) -> bool:
    return isinstance(node, tuple)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "1 GiB in 16 float32 arrays", _large),
        Workload("W2", "a GPT-2-124M-like train state, 446 leaves, 1.5 GB", _train_state),
        Workload("W3", "20,000 leaves of 64 floats", _many_tiny),
        Workload("W4", "1,000 leaves of 256 KiB", _many_small),
        Workload("W5", "one 4 GiB array sharded over 8 devices of one process", _sharded, devices=8),
        Workload("W6", "1 GiB of bfloat16 weights in 16 arrays", _brain_floats),
    )
}
"""All workloads by name."""
