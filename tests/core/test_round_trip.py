"""What you saved is what you get: every kind of leaf and container, with a target and without."""

from __future__ import annotations

import collections
import dataclasses
import math
import struct
import typing

import jax
import jax.numpy as jnp
import milepost
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

Point = collections.namedtuple("Point", ["x", "y"])  # noqa: PYI024 - both ways to define one are in use


class Pair(typing.NamedTuple):
    left: object
    right: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: object
    bias: object
    name: str = dataclasses.field(default="dense", metadata={"static": True})


@jax.tree_util.register_pytree_node_class
class Bag:
    def __init__(self, *things):
        self.things = things

    def tree_flatten(self):
        return self.things, None

    @classmethod
    def tree_unflatten(cls, static, things):
        return cls(*things)

    def __repr__(self):
        return f"Bag{self.things}"

    def __eq__(self, other):
        return type(other) is Bag and self.things == other.things

    __hash__ = None


DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
X64 = {"int64", "uint64", "float64", "complex128"}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def sample(name, shape):
    dtype = dtype_of(name)
    bits = np.random.default_rng(7).integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    if name == "bool":
        bits &= 1
    elif name.endswith("int2"):
        bits &= 1  # ml_dtypes keeps one small number in each byte
    elif name.endswith("int4"):
        bits &= 7
    elif name == "float4_e2m1fn":
        bits &= 15
    return np.frombuffer(bits.tobytes(), dtype).reshape(shape)


def bits(array):
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def same(one, other):
    """Compare two trees by class, structure and bits; nothing of milepost takes part."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert {(type(key), key) for key in one} == {(type(key), key) for key in other}
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, np.ndarray | np.generic | jax.Array):
        assert one.dtype == other.dtype
        data = jax.random.key_data if jnp.issubdtype(one.dtype, jax.dtypes.prng_key) else np.asarray
        assert bits(data(one)) == bits(data(other))
    elif isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other)
    elif isinstance(one, complex):
        assert struct.pack("dd", one.real, one.imag) == struct.pack("dd", other.real, other.imag)
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def both_ways(tmp_path, tree):
    milepost.save(tmp_path / "1", tree)
    same(tree, milepost.load(tmp_path / "1"))
    same(tree, milepost.load(tmp_path / "1", tree))


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,), (4, 0, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_in_numpy_comes_back_bit_for_bit(tmp_path, name, shape):
    both_ways(tmp_path, {"array": sample(name, shape)})


@pytest.mark.parametrize("shape", [(), (3,), (4, 0, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name in DTYPES if name not in X64])
def test_every_dtype_in_jax_comes_back_bit_for_bit(tmp_path, name, shape):
    both_ways(tmp_path, {"array": jnp.asarray(sample(name, shape))})


@pytest.fixture
def _x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("name", sorted(X64))
def test_dtypes_of_64_bits_come_back_with_x64(tmp_path, name):
    both_ways(tmp_path, {"array": jnp.asarray(sample(name, (3, 2)))})


@pytest.mark.parametrize("name", DTYPES)
def test_every_numpy_scalar_comes_back_as_that_scalar(tmp_path, name):
    both_ways(tmp_path, {"scalar": sample(name, (1,))[0]})


@pytest.mark.parametrize(
    "leaf",
    [
        *(0, -1, 2**62, -(2**63), 2**63, 10**5000, True, False),
        *(0.0, -0.0, 0.1, 1e308, math.inf, -math.inf, math.nan, struct.unpack("d", b"\1\2\3\4\5\6\xf8\xff")[0]),
        *(1j, complex(math.nan, -0.0)),
        *("", "text", "é\n\0\x7f\u2028", "\ud800 alone", "long " * 1000, "\udfff" * 2000),
        *(b"", b"\0\xff", bytes(range(256)) * 20),
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_every_value_of_python_comes_back_exactly(tmp_path, leaf):
    both_ways(tmp_path, {"leaf": leaf, "more": [leaf]})


@pytest.mark.parametrize(
    "tree",
    [
        np.arange(3.0),
        7,
        {},
        [],
        (),
        {"a": None},
        [None, [], {}, ()],
        {"a": {"b": [1, (2, [3])]}},
        {1: "int", 2: {"1": "str"}},
        {-5: 1, 0: 2},
        Point(1, Pair(np.ones(2), None)),
        Pair((), []),
        collections.OrderedDict(z=1, a=2),
        {"d": collections.defaultdict(list, a=[1])},
        Layer(np.ones((2, 2)), None),
        [Layer(1, 2, name="other")],
        {"bag": Bag(1, 2)},
        optax.EmptyState(),
    ],
    ids=repr,
)
def test_containers_come_back_with_their_classes_and_keys(tmp_path, tree):
    both_ways(tmp_path, {"root": tree})


@pytest.mark.parametrize("leaf", [np.arange(4, dtype=np.int8), 3, "text", np.float32(2)], ids=repr)
def test_a_bare_leaf_is_a_tree(tmp_path, leaf):
    both_ways(tmp_path, leaf)


def test_keys_may_hold_anything_text_can(tmp_path):
    keys = ["a/b", "a.b", "", " ", "é", "new\nline", "..", "__metadata__", "0", "~1", "%2F", "\x00", "a" * 500, ".x"]
    both_ways(tmp_path, {key: np.full(3, index) for index, key in enumerate(keys)})


def test_names_that_collide_when_joined_stay_apart(tmp_path):
    tree = {"a.b": np.array(1), "a": {"b": np.array(2)}, "a/b": np.array(3)}
    both_ways(tmp_path, tree)


def test_int_and_text_keys_of_one_mapping_stay_apart(tmp_path):
    both_ways(tmp_path, {"both": collections.OrderedDict([(1, np.array(1)), ("1", np.array(2))])})


def test_arrays_in_any_memory_order_come_back_equal(tmp_path):
    base = np.arange(24.0).reshape(2, 3, 4)
    tree = {"f": np.asfortranarray(base), "strided": base[:, ::2], "reversed": base[::-1], "t": base.T}
    milepost.save(tmp_path / "1", tree)
    for name, array in milepost.load(tmp_path / "1").items():
        np.testing.assert_array_equal(tree[name], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_array_in_a_layout_of_its_own_comes_back_equal(tmp_path, dtype):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.device_put(jnp.arange(12, dtype=dtype).reshape(3, 4), Format(Layout((1, 0)), where))
    assert np.asarray(array).strides[0] < np.asarray(array).strides[1]
    milepost.save(tmp_path / "1", {"a": array})
    assert milepost.load(tmp_path / "1")["a"].tolist() == np.arange(12.0).reshape(3, 4).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_save_keeps_no_array_from_being_donated_without_a_copy(tmp_path, dtype):
    array = jax.block_until_ready(jnp.ones((256, 256), dtype))
    milepost.save(tmp_path / "1", {"a": array})
    memory = array.unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert after.unsafe_buffer_pointer() == memory


def test_a_mapped_array_of_numpy_is_saved_as_an_array(tmp_path):
    mapped = np.memmap(tmp_path / "raw", np.int32, "w+", shape=(4,))
    mapped[:] = [1, 2, 3, 4]
    milepost.save(tmp_path / "1", {"a": mapped})
    same(milepost.load(tmp_path / "1"), {"a": np.array([1, 2, 3, 4], np.int32)})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back_as_keys_of_their_kind(tmp_path, impl):
    key = jax.random.key(3, impl=impl)
    both_ways(tmp_path, {"key": key, "keys": jax.random.split(key, 4), "none": jax.random.split(key, (0, 2))})


def test_raw_random_keys_come_back(tmp_path):
    both_ways(tmp_path, {"raw": jax.random.PRNGKey(7)})


def test_a_loaded_key_draws_the_same_numbers(tmp_path):
    key = jax.random.key(11)
    milepost.save(tmp_path / "1", key)
    np.testing.assert_array_equal(jax.random.normal(key, (5,)), jax.random.normal(milepost.load(tmp_path / "1"), (5,)))


def test_a_weakly_typed_scalar_promotes_as_before(tmp_path):
    milepost.save(tmp_path / "1", {"scale": jnp.asarray(2.0)})
    loaded = milepost.load(tmp_path / "1")["scale"]
    assert loaded.weak_type
    assert (loaded * jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_state_of_an_optimizer_comes_back(tmp_path):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    both_ways(tmp_path, {"params": params, "opt": state})


def test_a_class_that_is_not_loaded_comes_back_as_a_dict_of_its_fields(tmp_path, monkeypatch):
    milepost.save(tmp_path / "1", {"layer": Layer(np.ones(2), 5), "point": Point(1, 2)})
    monkeypatch.setattr("milepost.structure.class_named", lambda ref: None)
    monkeypatch.setattr("milepost.trees.class_named", lambda ref: None)
    loaded = milepost.load(tmp_path / "1")
    same(loaded["layer"], {"weight": np.ones(2), "bias": 5})
    assert loaded["point"]._asdict() == {"x": 1, "y": 2}


def mesh(shape, names):
    return jax.sharding.Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), names)


SHARDINGS = {
    "rows": lambda: NamedSharding(mesh((8,), ("x",)), P("x")),
    "grid": lambda: NamedSharding(mesh((4, 2), ("x", "y")), P("x", "y")),
    "columns": lambda: NamedSharding(mesh((2,), ("x",)), P(None, "x")),
    "both axes on one": lambda: NamedSharding(mesh((4, 2), ("x", "y")), P(("x", "y"))),
    "partly replicated": lambda: NamedSharding(mesh((4, 2), ("x", "y")), P("x")),
    "replicated": lambda: NamedSharding(mesh((8,), ("x",)), P()),
    "another device": lambda: SingleDeviceSharding(jax.devices()[5]),
}


@pytest.mark.parametrize("after", SHARDINGS)
@pytest.mark.parametrize("before", SHARDINGS)
def test_any_sharding_is_loaded_as_saved_and_as_any_other(tmp_path, before, after):
    array = jax.device_put(jnp.arange(64.0).reshape(16, 4), SHARDINGS[before]())
    milepost.save(tmp_path / "1", {"a": array})
    as_saved = milepost.load(tmp_path / "1")["a"]
    assert as_saved.sharding == array.sharding
    np.testing.assert_array_equal(array, as_saved)
    target = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=SHARDINGS[after]())
    loaded = milepost.load(tmp_path / "1", {"a": target})["a"]
    assert loaded.sharding == target.sharding
    np.testing.assert_array_equal(array, loaded)


def test_a_sharding_whose_devices_are_not_here_is_only_information(tmp_path, monkeypatch):
    array = jax.device_put(jnp.arange(16.0), SHARDINGS["rows"]())
    milepost.save(tmp_path / "1", {"a": array})
    monkeypatch.setattr("milepost.shardings._devices", lambda platform: {0: jax.devices()[0]})
    loaded = milepost.load(tmp_path / "1")["a"]
    assert loaded.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(array, loaded)


def test_an_array_that_was_bound_to_no_device_is_loaded_so(tmp_path):
    milepost.save(tmp_path / "1", {"free": jnp.ones(4), "bound": jax.device_put(jnp.ones(4), jax.devices()[0])})
    loaded = milepost.load(tmp_path / "1")
    assert [loaded["free"].committed, loaded["bound"].committed] == [False, True]
    sharded = jax.device_put(jnp.ones(8), SHARDINGS["rows"]())
    np.testing.assert_array_equal(np.full(8, 5.0), sharded + loaded["free"].sum())


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=20),
    st.binary(max_size=20),
    st.builds(
        sample,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_any_tree_comes_back(tmp_path, tree):
    milepost.save(tmp_path / "1", [tree], overwrite=True)
    same([tree], milepost.load(tmp_path / "1"))
    same([tree], milepost.load(tmp_path / "1", [tree]))
