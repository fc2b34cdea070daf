"""What is known of a checkpoint without loading it."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime as dt
import inspect
import json
import logging
import subprocess
import sys
import uuid

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost import metadata
from milepost.attempts import new_attempt
from milepost.errors import CheckpointNotFoundError, DamagedError, MilepostError
from milepost.manifest import ArrayLeaf, Item
from milepost.metadata import (
    ArrayMetadata,
    DeviceMetadata,
    DeviceMetadataMesh,
    Metadata,
    NamedShardingMetadata,
    RootMetadata,
    ScalarMetadata,
    ShardingMetadata,
    SingleDeviceShardingMetadata,
    StepMetadata,
    StorageMetadata,
    StringMetadata,
    TreeMetadata,
    from_jax_sharding,
    from_serialized_string,
    get_sharding_or_none,
    get_step_metadata,
    metadata_store,
    tree_metadata,
)
from milepost.v1 import _training_metadata as training
from milepost.v1._metadata import CheckpointMetadata
from upath import UPath

P = jax.sharding.PartitionSpec
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
Pair = collections.namedtuple("Pair", "x y")  # noqa: PYI024 - as users write it


def mesh(types=(AUTO, EXPLICIT)):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=types)


def named(*spec):
    sharding = jax.sharding.NamedSharding(mesh(), P(*spec or (("x", "y"), None)))
    return NamedShardingMetadata.from_jax_sharding(sharding)


def array(**changes):
    given = {"name": "a", "directory": None, "shape": (2,), "sharding": None, "dtype": np.dtype("float32")}
    return ArrayMetadata(**{**given, **changes})


# --- leaves ----------------------------------------------------------------------------------------------------------


def test_arrays_are_equal_whatever_their_names_and_directories():
    assert array() == array(name="b", directory=UPath("/elsewhere"))
    assert array(sharding=named()) == array(sharding=named())


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (3,)},
        {"dtype": np.dtype("int32")},
        {"dtype": None},
        {"sharding": SingleDeviceShardingMetadata("cpu:0")},
        {"storage": StorageMetadata((2,))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_differ_in_what_was_saved(change):
    assert array() != array(**change)
    assert array(**change) != array()


def test_kinds_of_leaves_are_never_equal_to_each_other():
    leaves = [Metadata("a", None), array(shape=(), dtype=None), ScalarMetadata("a", None), StringMetadata("a", None), 1]
    equal = [(left, right) for left in leaves for right in leaves if left == right]
    assert [(type(left), type(right)) for left, right in equal] == [(type(leaf), type(leaf)) for leaf in leaves]


def test_scalars_are_equal_by_their_dtype_alone():
    assert ScalarMetadata("a", None, dtype=np.dtype("int64")) == ScalarMetadata(
        "b", None, (1,), dtype=np.dtype("int64")
    )
    assert ScalarMetadata("a", None, dtype=np.dtype("int64")) != ScalarMetadata("a", None, dtype=np.dtype("int32"))
    assert ScalarMetadata("a", None) != ScalarMetadata("a", None, dtype=np.dtype("float64"))


def test_strings_are_all_equal():
    assert StringMetadata("a", None) == StringMetadata("b", UPath("/elsewhere"))


@pytest.mark.parametrize(
    "value",
    [
        Metadata("a", None),
        array(),
        ScalarMetadata("a", None),
        StringMetadata("a", None),
        SingleDeviceShardingMetadata("cpu:0"),
        NamedShardingMetadata(np.array([1]), ["x"], ("x",)),
        TreeMetadata(tree={}),
        StepMetadata(),
        RootMetadata(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_metadata_is_unhashable(value):
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


def test_storage_metadata_is_a_frozen_hashable_value():
    assert len({StorageMetadata((1,)), StorageMetadata((1,), zarr_metadata="noted"), StorageMetadata((1,), (1,))}) == 2
    assert "zarr" not in repr(StorageMetadata((1,), zarr_metadata="noted"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        StorageMetadata((1,)).chunk_shape = None


def test_the_metadata_of_a_shape_dtype_struct_keeps_its_sharding():
    sharding = jax.sharding.NamedSharding(mesh(), P("x"))
    made = ArrayMetadata.from_shape_dtype_struct(jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding), "w")
    assert (made.name, made.shape, made.dtype) == ("w", (8,), np.dtype(jnp.bfloat16))
    assert made.sharding.to_jax_sharding() == sharding
    assert ArrayMetadata.from_shape_dtype_struct(jax.ShapeDtypeStruct((), np.float32)).sharding is None


# --- shardings -------------------------------------------------------------------------------------------------------

SPECS = [P(), P(None), P("x"), P(("x", "y")), P(None, ("y", "x")), P("y", "x")]


@pytest.mark.parametrize("types", [(AUTO, AUTO), (AUTO, EXPLICIT), (EXPLICIT, EXPLICIT)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_named_sharding_survives_being_written_and_read(spec, types):
    sharding = jax.sharding.NamedSharding(mesh(types), spec)
    described = from_jax_sharding(sharding)
    read = from_serialized_string(described.to_serialized_string())
    assert read == described
    assert read.to_jax_sharding() == sharding
    assert read.axis_types == types
    assert read.to_jax_sharding().mesh.axis_types == types


def test_the_devices_of_a_mesh_keep_their_order():
    shuffled = jax.sharding.Mesh(np.array(jax.devices())[[3, 1, 7, 0]].reshape(2, 2), ("x", "y"))
    described = from_jax_sharding(jax.sharding.NamedSharding(shuffled, P("x")))
    ids = [[DeviceMetadata(3), DeviceMetadata(1)], [DeviceMetadata(7), DeviceMetadata(0)]]
    assert described.device_mesh == DeviceMetadataMesh(ids)
    assert described.to_jax_sharding().mesh == shuffled


def test_a_sharding_on_one_device_survives_being_written_and_read():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    described = from_jax_sharding(sharding)
    assert described == SingleDeviceShardingMetadata("cpu:3")
    assert from_serialized_string(described.to_serialized_string()).to_jax_sharding() == sharding


def test_the_old_name_of_a_cpu_is_the_same_device():
    old = SingleDeviceShardingMetadata("TFRT_CPU_3")
    assert old == SingleDeviceShardingMetadata("cpu:3")
    assert old != SingleDeviceShardingMetadata("cpu:4")
    assert old.to_jax_sharding() == jax.sharding.SingleDeviceSharding(jax.devices()[3])


def test_shardings_of_different_kinds_are_not_equal():
    assert named() != SingleDeviceShardingMetadata("cpu:0")
    assert SingleDeviceShardingMetadata("cpu:0") != named()
    assert named() != "named"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": np.array([4, 2])},
        {"shape": np.array([8])},
        {"axis_names": ["x", "z"]},
        {"partition_spec": ("x",)},
        {"axis_types": (AUTO, AUTO)},
        {"axis_types": None},
        {"device_mesh": None},
    ],
    ids=str,
)
def test_named_shardings_differ_in_every_field(change):
    fields = ("shape", "axis_names", "partition_spec", "axis_types", "device_mesh")
    same = {name: getattr(named(), name) for name in fields}
    assert NamedShardingMetadata(**same) == named()
    assert NamedShardingMetadata(**same | change) != named()


def test_without_devices_a_named_sharding_takes_all_there_are():
    made = NamedShardingMetadata(np.array([2, 4]), ["x", "y"], ("x", None))
    expected = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    assert made.to_jax_sharding().is_equivalent_to(jax.sharding.NamedSharding(expected, P("x", None)), 2)
    assert "device_mesh" not in json.loads(made.to_serialized_string())
    assert "axis_types" not in json.loads(made.to_serialized_string())


def test_a_sharding_over_an_abstract_mesh_has_no_devices():
    abstract = jax.sharding.AbstractMesh((2, 4), ("x", "y"))
    described = from_jax_sharding(jax.sharding.NamedSharding(abstract, P("x")))
    assert (described.shape.tolist(), described.device_mesh) == ([2, 4], None)


ELSEWHERE = [
    SingleDeviceShardingMetadata("tpu:77"),
    SingleDeviceShardingMetadata(""),
    NamedShardingMetadata(np.array([3]), ["x"], ("x",)),
    NamedShardingMetadata(np.array([8]), ["x"], ("y",)),
    NamedShardingMetadata(
        np.array([2]), ["x"], ("x",), None, DeviceMetadataMesh([DeviceMetadata(0), DeviceMetadata(99)])
    ),
    NamedShardingMetadata(np.array([2]), ["x"], ("x",), None, DeviceMetadataMesh([DeviceMetadata(0)] * 2)),
    NamedShardingMetadata(np.array([8]), ["x"], ("x",), ["AxisType.Unheard"]),
]


@pytest.mark.parametrize("sharding", ELSEWHERE, ids=str)
def test_a_sharding_that_cannot_be_had_here_is_a_value_error_that_says_why(sharding):
    with pytest.raises(ValueError, match=r"^cannot use ") as caught:
        sharding.to_jax_sharding()
    assert isinstance(caught.value, MilepostError)


@pytest.mark.parametrize("sharding", ELSEWHERE, ids=str)
def test_who_asks_for_a_sharding_or_none_gets_none_and_a_line_in_the_log(sharding, caplog):
    assert get_sharding_or_none(np.array(sharding.to_serialized_string())) is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_who_asks_for_a_sharding_or_none_gets_it_if_it_can_be_had():
    sharding = jax.sharding.NamedSharding(mesh(), P("x"))
    assert get_sharding_or_none(from_jax_sharding(sharding).to_serialized_string()) == sharding


def test_other_kinds_of_shardings_are_described_by_none(caplog):
    assert from_jax_sharding(object()) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("cls", [NamedShardingMetadata, SingleDeviceShardingMetadata])
def test_a_sharding_of_the_other_kind_is_a_type_error(cls):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    other = jax.sharding.NamedSharding(mesh(), P()) if cls is SingleDeviceShardingMetadata else one
    with pytest.raises(TypeError, match="cannot describe"):
        cls.from_jax_sharding(other)


def test_the_base_of_shardings_is_abstract():
    assert ShardingMetadata.__abstractmethods__ == {
        "from_jax_sharding",
        "to_jax_sharding",
        "from_deserialized_dict",
        "to_serialized_string",
    }
    with pytest.raises(TypeError, match="abstract"):
        ShardingMetadata()


def test_a_partition_that_json_cannot_hold_is_refused():
    free = named(P.UNCONSTRAINED, "y")
    with pytest.raises(ValueError, match="cannot write down"):
        free.to_serialized_string()


GOOD = {"sharding_type": "NamedSharding", "shape": [2], "axis_names": ["x"], "partition_spec": ["x"]}


@pytest.mark.parametrize(
    "saved",
    [
        "",
        "no json",
        "[]",
        "null",
        "{}",
        '{"sharding_type": 5}',
        '{"sharding_type": "PositionalSharding"}',
        '{"sharding_type": "SingleDeviceSharding"}',
        '{"sharding_type": "SingleDeviceSharding", "device_str": null}',
        "[" * 100_000,
        *(json.dumps({key: value for key, value in GOOD.items() if key != gone}) for gone in list(GOOD)[1:]),
        *(
            json.dumps(GOOD | change)
            for change in [
                {"shape": 2},
                {"shape": [-2]},
                {"shape": [1 << 80]},
                {"shape": [True]},
                {"shape": [2.0]},
                {"shape": [2, 2]},
                {"axis_names": "x"},
                {"axis_names": [1]},
                {"partition_spec": [1]},
                {"partition_spec": [["x", None]]},
                {"partition_spec": {"x": 1}},
                {"axis_types": "AxisType.Auto"},
                {"axis_types": [1]},
                {"device_mesh": []},
                {"device_mesh": {"mesh": 5}},
                {"device_mesh": {"mesh": [5]}},
                {"device_mesh": {"mesh": [{"id": "0"}]}},
                {"device_mesh": {"mesh": [{"id": True}]}},
                {"device_mesh": {"mesh": [{}]}},
            ]
        ),
    ],
    ids=lambda saved: saved[:80],
)
def test_a_string_that_is_no_sharding_is_damaged(saved):
    with pytest.raises(DamagedError, match=r"^cannot read the sharding "):
        from_serialized_string(saved)


def test_a_mesh_nested_too_deeply_is_damaged():
    # Deep enough for Python to give up walking it, not so deep that its JSON could not be read.
    depth = sys.getrecursionlimit() - 20
    saved = json.dumps(GOOD)[:-1] + f', "device_mesh": {{"mesh": {"[" * depth}{"]" * depth}}}}}'
    with pytest.raises(DamagedError):
        from_serialized_string(saved)


def test_an_unknown_kind_of_sharding_is_not_implemented():
    with pytest.raises(NotImplementedError, match="'Spherical'"):
        from_serialized_string('{"sharding_type": "Spherical"}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys([*GOOD, "axis_types", "device_mesh", "device_str"], JSON)))
def test_whatever_a_manifest_holds_is_a_sharding_or_none(saved):
    saved = {"sharding_type": "NamedSharding"} | saved
    leaf = {"type": "jax.Array", "arrays": {"": ArrayLeaf((2,), "float32", 0)}}
    found = tree_metadata(Item("*", [leaf], [saved], "packed", "state/", [])).tree.sharding
    assert found is None or isinstance(found, ShardingMetadata)


# --- trees -----------------------------------------------------------------------------------------------------------


def state():
    sharding = jax.sharding.NamedSharding(mesh(), P("x", "y"))
    return {
        "w": jax.device_put(np.zeros((8, 4), np.float32), sharding),
        "one": jax.device_put(jnp.zeros(3, jnp.bfloat16), jax.devices()[2]),
        "key": jax.random.key(0),
        "numpy": np.zeros((2, 0), np.int8),
        "numbers": [True, 7, 1 << 70, 1.5, 2j, np.float16(3)],
        "text": ("a", b"b"),
        "pair": Pair(1, None),
        "empty": {},
        1: 1,
    }


@pytest.fixture
def saved(tmp_path):
    # JAX does not sort keys of different types.
    tree = state()
    tree["ints"] = {1: tree.pop(1)}
    milepost.save(tmp_path / "7", tree, custom_metadata={"lr": 0.1})
    return tmp_path / "7"


def manifest_of(path):
    from milepost.engine.reading import open_checkpoint

    return open_checkpoint(path).manifest


def scalar(name, directory, dtype):
    return (ScalarMetadata, name, directory, (), None, None if dtype is None else np.dtype(dtype))


def fields(leaf):
    return (type(leaf), *(getattr(leaf, field.name) for field in dataclasses.fields(leaf) if field.name != "storage"))


def test_the_metadata_of_a_saved_tree_has_its_structure_and_says_all_of_each_leaf(saved):
    at = UPath(saved)
    made = tree_metadata(manifest_of(saved).items["state"], at, custom_metadata={"note": 1})
    one = SingleDeviceShardingMetadata("cpu:2")
    default = SingleDeviceShardingMetadata("cpu:0")
    sharding = NamedShardingMetadata.from_jax_sharding(jax.sharding.NamedSharding(mesh(), P("x", "y")))
    numbers = ["bool", "int64", None, "float64", "complex128", "float16"]
    assert jax.tree.map(fields, made.tree, is_leaf=lambda leaf: isinstance(leaf, Metadata)) == {
        "w": (ArrayMetadata, "w", at, (8, 4), sharding, np.dtype("float32")),
        "one": (ArrayMetadata, "one", at, (3,), one, np.dtype(jnp.bfloat16)),
        "key": (ArrayMetadata, "key", at, (2,), default, np.dtype("uint32")),
        "numpy": (ArrayMetadata, "numpy", at, (2, 0), None, np.dtype("int8")),
        "numbers": [scalar(f"numbers.{number}", at, dtype) for number, dtype in enumerate(numbers)],
        "text": ((StringMetadata, "text.0", at), (Metadata, "text.1", at)),
        "pair": Pair(scalar("pair.x", at, "int64"), None),
        "empty": {},
        "ints": {1: scalar("ints.1", at, "int64")},
    }
    assert (made.custom_metadata, made.use_zarr3) == ({"note": 1}, False)


def test_a_leaf_alone_has_no_name():
    item = Item("*", [{"type": "int", "value": 3}], [], "packed", "state/", [])
    assert tree_metadata(item).tree.name == ""


def test_a_dtype_that_is_not_known_here_is_none():
    leaf = {"type": "np.ndarray", "arrays": {"": ArrayLeaf((2,), "float3", None)}}
    assert tree_metadata(Item("*", [leaf], [], "packed", "state/", [])).tree.dtype is None


def test_a_sharding_noted_only_by_its_kind_is_none():
    leaf = {"type": "jax.Array", "arrays": {"": ArrayLeaf((2,), "float32", 0)}}
    item = Item("*", [leaf], [{"sharding_type": "GSPMDSharding"}], "packed", "state/", [])
    assert tree_metadata(item).tree.sharding is None


def test_tree_metadata_is_used_like_its_tree():
    tree = {"a": 1, "b": [2, 3]}
    made = TreeMetadata.build(tree, custom_metadata={"lr": 1}, use_zarr3=True)
    assert (made["b"], "a" in made, "z" in made, len(made), list(made)) == ([2, 3], True, False, 2, ["a", "b"])
    assert (made.get("a"), made.get("z"), made.get("z", 4)) == (1, None, 4)
    assert (list(made.keys()), list(made.values()), list(made.items())) == (["a", "b"], [1, [2, 3]], list(tree.items()))
    assert (made.tree, made.custom_metadata, made.use_zarr3) == (tree, {"lr": 1}, True)
    assert made == TreeMetadata(tree=tree, custom_metadata={"lr": 1}, use_zarr3=True)
    assert made != TreeMetadata(tree=tree, custom_metadata={"lr": 2}, use_zarr3=True)
    assert made != tree
    with pytest.raises(AttributeError):
        made.tree = {}


@pytest.mark.parametrize(
    "tree", [{"a": 1, "b": [2, None]}, [1, (2,)], (1, 2), Pair(1, {}), {}, [], (), None, 5], ids=repr
)
def test_tree_metadata_is_a_pytree_with_the_leaves_of_its_tree(tree):
    made = TreeMetadata(tree=tree, custom_metadata={"lr": [1]})
    assert jax.tree.leaves(made) == jax.tree.leaves(tree)
    mapped = jax.tree.map(lambda leaf: leaf + 1, made)
    assert mapped == TreeMetadata(tree=jax.tree.map(lambda leaf: leaf + 1, tree), custom_metadata={"lr": [1]})
    assert hash(jax.tree.structure(made)) == hash(jax.tree.structure(mapped))
    assert jax.tree.structure(made) == jax.tree.structure(mapped)
    assert jax.tree.structure(made) != jax.tree.structure(TreeMetadata(tree=tree))


def test_the_paths_of_its_leaves_are_those_of_the_tree():
    tree = {"a": 1, "b": [2, 3]}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(TreeMetadata(tree=tree))[0]]
    assert paths == [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_what_was_loaded_without_jax_becomes_a_pytree_when_it_is_used_with_it():
    code = """
import sys
from milepost.metadata import TreeMetadata
made = TreeMetadata(tree={"a": 1})
assert "jax" not in sys.modules
import jax
assert made.tree == {"a": 1}
assert jax.tree.leaves(made) == [1]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_metadata_needs_no_jax(saved):
    code = """
import sys
import numpy as np
import milepost
from milepost import metadata as m
from milepost.engine.reading import open_checkpoint
texts = [
    '{"sharding_type": "SingleDeviceSharding", "device_str": "tpu:0"}',
    '{"sharding_type": "NamedSharding", "shape": [2], "axis_names": ["x"], "axis_types": ["AxisType.Auto"], '
    '"partition_spec": [["x"]], "device_mesh": {"mesh": [{"id": 0}, {"id": 1}]}}',
]
read = [m.from_serialized_string(text) for text in texts]
assert [one.to_serialized_string() for one in read] == texts
assert read == [m.from_serialized_string(text) for text in texts]
made = m.tree_metadata(open_checkpoint(sys.argv[1]).manifest.items["state"])
assert made == m.TreeMetadata(tree=made.tree)
found = milepost.v1.metadata(sys.argv[1])
step = m.get_step_metadata(sys.argv[1])
print(repr([read, made, made["w"] == made["one"], found, step, m.RootMetadata()]))
assert not {"jax", "jaxlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "NamedShardingMetadata(shape=[2, 4]" in done.stdout


# --- v1 --------------------------------------------------------------------------------------------------------------


def test_v1_shows_arrays_with_dtype_and_sharding(saved):
    found = milepost.v1.metadata(saved).metadata
    assert (found["w"].shape, found["w"].dtype) == ((8, 4), np.dtype("float32"))
    assert found["w"].sharding_metadata == from_jax_sharding(jax.sharding.NamedSharding(mesh(), P("x", "y")))
    assert found["w"].sharding == jax.sharding.NamedSharding(mesh(), P("x", "y"))
    assert (found["one"].dtype, found["one"].committed) == (np.dtype(jnp.bfloat16), True)
    assert (found["key"].shape, str(found["key"].dtype).startswith("key<")) == ((), True)
    assert (found["key"].committed, found["numpy"].dtype) == (False, np.dtype("int8"))


def test_the_v1_metadata_of_a_checkpoint_loads_it_as_it_was_saved(saved):
    target = milepost.v1.metadata(saved)
    loaded = milepost.load(saved, target)
    assert jax.tree.map(type, loaded) == jax.tree.map(type, milepost.load(saved))
    for name in ("w", "one", "key"):
        assert loaded[name].sharding == state()[name].sharding
        assert loaded[name].committed == state()[name].committed


def test_a_sharding_whose_devices_are_gone_is_none():
    array = milepost.metadata.leaf.ArrayMetadata((1,), np.dtype("int8"), SingleDeviceShardingMetadata("tpu:9"))
    assert array.sharding is None
    assert milepost.metadata.leaf.ArrayMetadata((1,), np.dtype("int8")).sharding is None


def test_the_metadata_of_a_step_shows_step_and_metrics_and_is_compared_by_identity():
    path = UPath("/runs/3")
    made = training.CheckpointMetadata(
        3, path, metadata={"a": 1}, init_timestamp_nsecs=1, commit_timestamp_nsecs=2_500_000_000, metrics={"loss": 2}
    )
    assert isinstance(made, CheckpointMetadata)
    assert (made.step, made.path, made.metadata, made.metrics, made.custom_metadata) == (
        3,
        path,
        {"a": 1},
        {"loss": 2},
        None,
    )
    assert made.time == made.commit_timestamp == dt.datetime(1970, 1, 1, 0, 0, 2, 500_000, dt.UTC)
    assert made.init_timestamp == dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    assert len({made, copy.copy(made)}) == 2


@pytest.mark.parametrize(
    "name",
    [name for name in dir(training.CheckpointMetadata) if not name.startswith("_")],
)
def test_the_metadata_of_a_step_cannot_be_changed(name):
    made = training.CheckpointMetadata(3, UPath("/runs/3"), metadata=None)
    with pytest.raises(AttributeError):
        setattr(made, name, 1)


def test_a_step_without_a_commit_time_has_no_time():
    made = training.CheckpointMetadata(3, UPath("/runs/3"), metadata=None, init_timestamp_nsecs=1)
    assert made.commit_timestamp is None
    with pytest.raises(TypeError, match="no commit timestamp"):
        _ = made.time


def test_root_metadata_of_v1_is_a_frozen_value():
    made = training.RootMetadata(directory=UPath("/runs"), custom_metadata={"lr": 1})
    assert made == training.RootMetadata(directory=UPath("/runs"), custom_metadata={"lr": 1})
    assert made != training.RootMetadata(directory=UPath("/runs"))
    assert len({training.RootMetadata(directory=UPath("/runs")), training.RootMetadata(directory=UPath("/runs"))}) == 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(made)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.directory = UPath("/elsewhere")
    with pytest.raises(TypeError, match="positional"):
        training.RootMetadata(UPath("/runs"))


# --- steps and roots -------------------------------------------------------------------------------------------------


def test_the_metadata_of_a_step_comes_from_its_manifest(saved):
    found, manifest = get_step_metadata(saved), manifest_of(saved)
    assert found.custom_metadata == {"lr": 0.1}
    assert list(found.item_handlers) == ["state"]
    assert (found.init_timestamp_nsecs, found.commit_timestamp_nsecs) == (
        manifest.init_timestamp_nsecs,
        manifest.commit_timestamp_nsecs,
    )
    assert (found.metrics, found.performance_metrics, found.item_metadata) == ({}, {}, None)


def test_the_manifest_is_believed_before_the_small_file(saved):
    (saved / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"lr": 9}}', encoding="utf-8")
    assert get_step_metadata(saved).custom_metadata == {"lr": 0.1}


def test_the_manifest_is_found_where_an_overwrite_was_cut_off(saved):
    saved.rename(saved.with_name(f"7.orbax-checkpoint-tmp-{new_attempt()}.old"))
    assert get_step_metadata(saved).custom_metadata == {"lr": 0.1}


def test_a_commit_object_of_another_program_sends_to_the_small_file(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/commit_success.txt").write_text("Checkpoint commit was successful to gs://b/7", encoding="utf-8")
    (tmp_path / "7/_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 5}', encoding="utf-8")
    assert get_step_metadata(tmp_path / "7") == StepMetadata(init_timestamp_nsecs=5)


def test_unknown_keys_of_the_small_file_are_custom_metadata(tmp_path):
    (tmp_path / "7").mkdir()
    file = tmp_path / "7/_CHECKPOINT_METADATA"
    file.write_text('{"item_handlers": "H", "metrics": null, "lr": 1}', encoding="utf-8")
    assert get_step_metadata(tmp_path / "7") == StepMetadata(item_handlers="H", custom_metadata={"lr": 1})
    file.write_text('{"custom_metadata": {"a": 1}, "lr": 1}', encoding="utf-8")
    with pytest.raises(DamagedError, match="unknown keys"):
        get_step_metadata(tmp_path / "7")


@pytest.mark.parametrize(
    "text", ["", "[]", "no json", '{"metrics": 5}', '{"init_timestamp_nsecs": true}', '{"item_handlers": [1]}']
)
def test_a_small_file_that_cannot_be_believed_is_damaged(tmp_path, text):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/_CHECKPOINT_METADATA").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedError, match="_CHECKPOINT_METADATA"):
        get_step_metadata(tmp_path / "7")


def test_where_nothing_says_anything_of_a_step_there_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for name in ("missing", "empty", "file"):
        with pytest.raises(CheckpointNotFoundError, match=name) as caught:
            get_step_metadata(tmp_path / name)
        assert isinstance(caught.value, ValueError)


def test_root_metadata_is_empty_unless_told():
    assert RootMetadata() == RootMetadata({}, {})
    assert RootMetadata(custom_metadata={"a": 1}) != RootMetadata()
    first = RootMetadata()
    first.custom_metadata["a"] = 1
    assert RootMetadata().custom_metadata == {}


# --- the store of small documents ------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def file(request, tmp_path):
    return (
        tmp_path / "_ROOT_METADATA" if request.param == "local" else f"memory://metadata/{uuid.uuid4()}/_ROOT_METADATA"
    )


@pytest.fixture(params=[True, False], ids=["blocking", "background"])
def store(request):
    made = metadata_store(enable_write=True, blocking_write=request.param)
    yield made
    made.close()


@pytest.mark.filterwarnings("ignore::milepost.errors.WeakGuaranteeWarning")
def test_a_document_is_read_as_it_was_last_written(store, file):
    assert isinstance(store, metadata.MetadataStore)
    assert store.read(file) is None
    store.update(file, a=1)
    assert store.read(file) == {"a": 1}
    store.write(file, {"b": {"c": [1, None]}})
    store.update(file, a=2, b=3)
    store.wait_until_finished()
    assert metadata_store(enable_write=False).read(file) == {"a": 2, "b": 3}


def test_what_is_changed_after_the_call_is_not_written(store, tmp_path):
    document = {"a": [1]}
    for number in range(20):
        store.write(tmp_path / str(number), document)
    document["a"].append(2)
    assert {json.dumps(store.read(tmp_path / str(number))) for number in range(20)} == {'{"a": [1]}'}


def test_a_damaged_document_is_an_error_and_is_not_overwritten_by_an_update(store, tmp_path):
    file = tmp_path / "_ROOT_METADATA"
    file.write_text('{"a": 1', encoding="utf-8")
    with pytest.raises(DamagedError, match="no JSON"):
        store.read(file)
    with pytest.raises(DamagedError, match="no JSON"):  # noqa: PT012 - in the background it fails later
        store.update(file, b=1)
        store.wait_until_finished()
    assert file.read_text(encoding="utf-8") == '{"a": 1'


def test_a_store_that_may_not_write_leaves_it_out(tmp_path):
    reader = metadata_store(enable_write=False)
    reader.write(tmp_path / "x", {"a": 1})
    reader.update(tmp_path / "x", a=1)
    reader.wait_until_finished()
    reader.close()
    assert list(tmp_path.iterdir()) == []


def test_only_the_store_that_blocks_says_so():
    stores = [metadata_store(enable_write=True, blocking_write=blocks) for blocks in (True, False)]
    assert [store.is_blocking_writer() for store in stores] == [True, False]
    assert metadata_store(enable_write=False, blocking_write=True).is_blocking_writer() is False
    stores[1].close()


def test_a_failure_in_the_background_is_raised_by_close(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    store = metadata_store(enable_write=True)
    store.write(tmp_path / "file" / "below", {"a": 1})
    with pytest.raises(OSError, match="below"):
        store.close()
    with pytest.raises(RuntimeError):
        store.write(tmp_path / "late", {"a": 1})
    store.close()


# --- the surface -----------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_the_document():
    shown = {
        name: [
            str(parameter).partition(":")[0]
            for parameter in inspect.signature(getattr(metadata, name)).parameters.values()
        ]
        for name in ("ArrayMetadata", "ScalarMetadata", "StringMetadata", "NamedShardingMetadata")
    }
    assert shown == {
        "ArrayMetadata": ["name", "directory", "shape", "sharding", "dtype", "storage"],
        "ScalarMetadata": ["name", "directory", "shape", "sharding", "dtype", "storage"],
        "StringMetadata": ["name", "directory"],
        "NamedShardingMetadata": ["shape", "axis_names", "partition_spec", "axis_types", "device_mesh"],
    }


def test_every_public_name_is_there():
    assert [name for name in metadata.__all__ if not hasattr(metadata, name)] == []
