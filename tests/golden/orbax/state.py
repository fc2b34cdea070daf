"""What the golden checkpoints of Orbax hold: shared by what makes them and what reads them.

Every value comes from a number, none from a file, so that the expectation never goes through a reader. It runs on the
Python, NumPy and JAX of the oldest release in the set.

Never changed: what an old release wrote must be loaded for ever. A new kind of leaf gets a tree of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import jax
import ml_dtypes
import numpy as np

DEVICES = 8

CANDIDATES = (
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "int4"),
)
"""Dtypes that a release may hold; what it can is noted beside its checkpoints."""

HOST_ONLY = ("int64", "uint64", "float64", "complex128")
"""Dtypes that JAX has only where somebody asks for 64 bits: they are saved from NumPy."""

TEXT = "größe: 5 µm"
METRICS = {1: {"loss": 0.75}, 2: {"loss": 0.25}}
CUSTOM = {"run": "golden", "nested": {"lr": [0.1, 2]}}
NOTES = {"epoch": 3, "names": ["a", "ü"], "none": None}

Moments = collections.namedtuple("Moments", ["count", "mu"])  # noqa: PYI024 - the kind of class many have


@dataclasses.dataclass(frozen=True)
class Place:
    """How a NumPy array becomes a leaf: left as it is, one device, or spread over all of them."""

    one: object
    spread: object


def host():
    return Place(one=lambda array: array, spread=lambda array: array)


def devices(*, spread):
    """Place arrays on the first device, and, with `spread`, some over a mesh of 4 x 2."""
    first = jax.devices()[0]
    one = lambda array: jax.device_put(array, first)  # noqa: E731 - two of a kind
    if not spread:
        return Place(one=one, spread=one)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("x", "y"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    return Place(one=one, spread=lambda array: jax.device_put(array, rows))


def numbers(name, shape, seed=0):
    """Return an array of that dtype whose values follow from a number alone."""
    count = math.prod(shape)
    dtype = np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
    values = (np.arange(count) * 7 + seed) % 13
    if name == "bool":
        return (values % 2).astype(dtype).reshape(shape)
    if name == "int4":
        return (values - 8).clip(-8, 7).astype(np.int8).astype(dtype).reshape(shape)
    if dtype.kind == "c":
        return (values * 0.5 - 1j * values).astype(dtype).reshape(shape)
    return (values * 0.25 if dtype.kind in "fV" else values).astype(dtype).reshape(shape)


def standard(place, dtypes):
    """Return what every release can save: arrays of each dtype, scalars, `None`, and containers."""
    return {
        "params": {
            "w": place.spread(numbers("float32", (8, 4), 1)),
            "b": place.one(numbers("float32", (4,), 2)),
            "embedding": place.spread(numbers("bfloat16", (4, 2), 3)),
        },
        "dtypes": {name: place.one(numbers(name, (3,), 4)) for name in dtypes},
        "host": {name: numbers(name, (2, 3), 5) for name in (*HOST_ONLY, *dtypes)},
        "opt": Moments(place.one(numbers("int32", (), 6)), [place.one(numbers("float32", (2,), 7))]),
        "layers": [{"k": place.one(numbers("uint8", (2, 2), n))} for n in range(11)],
        "pair": (place.one(numbers("float32", (1,), 8)), 3),
        "step": 7,
        "rate": 0.125,
        "flag": True,
        "none": None,
        "empty": {"dict": {}, "list": []},
    }


def small(place, dtypes):
    """Return a tree of few leaves, for layouts that need many files or that differ in few places."""
    return {
        "w": place.spread(numbers("float32", (8, 4), 11)),
        "b": [place.one(numbers(name, (2,), 12)) for name in dtypes[-3:]],
        "host": numbers("int64", (2,), 13),
        "zeros": place.spread(np.zeros((8, 4), np.float32)),
        "step": 12,
        "none": None,
    }


def texts(place, dtypes):
    """Return a tree with text in it."""
    return {**small(place, dtypes), "text": TEXT, "deep": {"text": ["", "b"]}}


def keys(place, dtypes):
    """Return a tree with random keys in it."""
    return {**small(place, dtypes), "key": jax.random.key(5), "keys": jax.random.split(jax.random.key(6), 2)}


def named(place, dtypes):
    """Return arrays alone, by name."""
    return {
        "a": place.spread(numbers("float32", (8, 4), 21)),
        "b": place.one(numbers("bfloat16", (3,), 22)),
        "zeros": place.spread(np.zeros((8, 4), np.float32)),
    }


def nested(place, dtypes):
    """Return arrays alone, within containers of every kind."""
    return {
        "a": place.spread(numbers("float32", (8, 4), 31)),
        "deep": {"x.y": place.one(numbers("int8", (2, 2), 32)), "x/y": place.one(numbers("int8", (2,), 33))},
        "empty": [{}, [], ()],
        "list": [place.one(numbers("bfloat16", (3,), 34)), (place.one(numbers("float32", (2,), 35)),)],
        "none": None,
        "scalar": place.one(numbers("float32", (), 36)),
        "zeros": place.one(np.zeros((4,), np.int32)),
    }


def classes(place, dtypes):
    """Return arrays alone, within containers whose classes JAX is told the names of."""
    return {
        "ordered": collections.OrderedDict(
            z=place.spread(numbers("float32", (8, 4), 37)), a=place.one(numbers("int32", (2,), 38))
        ),
        "point": Moments(place.one(numbers("int32", (), 39)), [place.one(numbers("float32", (2,), 40))]),
    }


def array(place, dtypes):
    """Return one array."""
    return place.spread(numbers("float32", (8, 4), 41))


def notes(place, dtypes):
    """Return what is saved as JSON."""
    return NOTES


def old_key(place, dtypes):
    """Return random numbers' state as JAX has it without types: two integers."""
    return jax.random.PRNGKey(9)


def new_key(place, dtypes):
    """Return a random key with its type."""
    return jax.random.key(10)


def numpy_key(place, dtypes):
    """Return the state of NumPy's former generator."""
    return np.random.RandomState(11).get_state()


def metrics(place, dtypes):
    """Return what the second step measured."""
    return METRICS[2]


TREES = {
    make.__name__: make
    for make in (
        standard,
        small,
        texts,
        keys,
        named,
        nested,
        classes,
        array,
        notes,
        old_key,
        new_key,
        numpy_key,
        metrics,
    )
}


def flattened(tree):
    """Return the tree as Orbax gives it back when it is told nothing: of dicts and lists only."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {field: flattened(value) for field, value in zip(tree._fields, tree, strict=True)}
    if isinstance(tree, list | tuple):
        return [flattened(value) for value in tree]
    return {key: flattened(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def difference(expected, found, where="", *, typed=True):
    """Return in words where two trees of dicts and lists differ, "" for equal ones; `typed` compares leaves' types."""
    if isinstance(expected, dict | list):
        if type(expected) is not type(found):
            return f"{where or '/'}: {type(found).__name__} instead of {type(expected).__name__}"
        names = list(expected) if isinstance(expected, dict) else list(range(len(expected)))
        there = list(found) if isinstance(found, dict) else list(range(len(found)))
        if sorted(names) != sorted(there):
            return f"{where or '/'}: {there} instead of {names}"
        parts = (difference(expected[name], found[name], f"{where}/{name}", typed=typed) for name in names)
        return next((part for part in parts if part), "")
    if _bits(expected) != _bits(found) or (typed and _kind(expected) != _kind(found)):
        return f"{where or '/'}: {_kind(found)} {found!r:.200} instead of {_kind(expected)} {expected!r:.200}"
    return ""


def _kind(leaf):
    return "jax.Array" if isinstance(leaf, jax.Array) else type(leaf).__name__


def _bits(leaf):
    if leaf is None or isinstance(leaf, str):
        return leaf
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (str(jax.random.key_impl(leaf)), _bits(jax.random.key_data(leaf)))
    held = np.asarray(leaf)
    if held.dtype.name == "int4":  # the unused half of a byte says nothing
        return ("int4", held.shape, held.astype(np.int8).tobytes())
    return (held.dtype.name, held.shape, held.tobytes())
