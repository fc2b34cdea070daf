"""Metadata as the reference shows and writes it; each deliberate difference is listed with its reason."""

from __future__ import annotations

import inspect
import json

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from milepost import metadata
from milepost.engine.reading import open_checkpoint
from milepost.metadata.step import step_metadata_from_document
from milepost.v1 import _metadata, _training_metadata
from milepost.v1._training_metadata import CheckpointMetadata, RootMetadata
from orbax.checkpoint._src.metadata import sharding as reference_sharding
from orbax.checkpoint.experimental import v1 as reference_v1

P = jax.sharding.PartitionSpec
KINDS = list(jax.sharding.AxisType)


def parameters(function):
    """Return names and kinds of parameters, with defaults; what a factory makes is shown by the value it makes."""
    return [
        (name, parameter.kind, "a new one" if "factory" in repr(parameter.default) else repr(parameter.default))
        for name, parameter in inspect.signature(function).parameters.items()
    ]


# --- signatures ------------------------------------------------------------------------------------------------------

NAMES = [
    "ArrayMetadata",
    "Metadata",
    "NamedShardingMetadata",
    "RootMetadata",
    "ScalarMetadata",
    "ShardingMetadata",
    "SingleDeviceShardingMetadata",
    "StepMetadata",
    "StorageMetadata",
    "StringMetadata",
    "get_step_metadata",
    "metadata_store",
]
METHODS = [
    ("ArrayMetadata", "from_shape_dtype_struct"),
    *(
        (name, method)
        for name in NAMES
        if "ShardingMetadata" in name
        for method in ("from_jax_sharding", "to_jax_sharding", "from_deserialized_dict", "to_serialized_string")
    ),
    *(
        ("MetadataStore", method)
        for method in ("close", "is_blocking_writer", "read", "update", "wait_until_finished", "write")
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_reference(name):
    assert parameters(getattr(metadata, name)) == parameters(getattr(ocp.metadata, name))


@pytest.mark.parametrize(("cls", "method"), METHODS, ids=".".join)
def test_methods_are_those_of_the_reference(cls, method):
    ours, theirs = (getattr(getattr(module, cls), method) for module in (metadata, ocp.metadata))
    assert parameters(ours) == parameters(theirs)


def test_no_public_name_of_the_reference_is_missing():
    theirs = {name for name in dir(ocp.metadata) if not name.startswith("_")}
    assert theirs - set(dir(metadata)) == set()


@pytest.mark.parametrize("name", ["from_jax_sharding", "from_serialized_string", "get_sharding_or_none"])
def test_functions_on_shardings_take_what_the_reference_takes(name):
    assert parameters(getattr(metadata, name)) == parameters(getattr(reference_sharding, name))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (_metadata.CheckpointMetadata, reference_v1.CheckpointMetadata),
        (_training_metadata.CheckpointMetadata, reference_v1.training.CheckpointMetadata),
        (_training_metadata.RootMetadata, reference_v1.training.RootMetadata),
    ],
)
def test_v1_classes_are_those_of_the_reference(ours, theirs):
    assert parameters(ours) == parameters(theirs)
    assert {name for name in dir(ours) if not name.startswith("_")} >= {
        name for name in dir(theirs) if not name.startswith("_")
    }


def test_class_relations_are_those_of_the_reference():
    classes = [name for name in NAMES if inspect.isclass(getattr(metadata, name))]
    for child in classes:
        for parent in classes:
            theirs = issubclass(getattr(ocp.metadata, child), getattr(ocp.metadata, parent))
            assert issubclass(getattr(metadata, child), getattr(metadata, parent)) == theirs, (child, parent)
    assert issubclass(_training_metadata.CheckpointMetadata, _metadata.CheckpointMetadata)


# --- shardings -------------------------------------------------------------------------------------------------------


@st.composite
def shardings(draw):
    shape = draw(st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8), (2,), (1, 1)]))
    names = draw(st.permutations(["x", "y", "data model"]))[: len(shape)]
    devices = draw(st.permutations(jax.devices()))[: int(np.prod(shape))]
    kinds = tuple(draw(st.sampled_from(KINDS)) for _ in shape)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), tuple(names), axis_types=kinds)
    free = draw(st.permutations(names))
    spec = []
    while free:
        count = draw(st.integers(0, min(2, len(free))))
        spec.append(tuple(free[:count]) if count > 1 else free[0] if count else None)
        free = free[max(count, 1) :]
    try:
        return jax.sharding.NamedSharding(mesh, P(*spec))
    except ValueError:  # older releases of JAX split no dimension over axes of different kinds
        reject()


def both(sharding):
    return metadata.from_jax_sharding(sharding), reference_sharding.from_jax_sharding(sharding)


@settings(derandomize=True, deadline=None)
@given(shardings())
def test_named_shardings_are_written_to_the_byte_and_read_both_ways(sharding):
    ours, theirs = both(sharding)
    text = theirs.to_serialized_string()
    assert ours.to_serialized_string() == text
    assert metadata.from_serialized_string(text) == ours
    assert metadata.from_serialized_string(text).to_serialized_string() == text
    assert metadata.from_serialized_string(text).to_jax_sharding() == sharding
    assert reference_sharding.from_serialized_string(ours.to_serialized_string()).to_jax_sharding() == sharding


@settings(derandomize=True, deadline=None)
@given(shardings())
def test_the_fields_of_a_named_sharding_are_those_of_the_reference(sharding):
    ours, theirs = both(sharding)
    for name in ("axis_names", "partition_spec", "axis_types"):
        assert (type(getattr(ours, name)), getattr(ours, name)) == (type(getattr(theirs, name)), getattr(theirs, name))
    assert (type(ours.shape), ours.shape.tolist()) == (type(theirs.shape), theirs.shape.tolist())
    assert repr(ours.device_mesh) == repr(theirs.device_mesh)


@pytest.mark.parametrize("number", range(8))
def test_shardings_on_one_device_are_written_to_the_byte(number):
    ours, theirs = both(jax.sharding.SingleDeviceSharding(jax.devices()[number]))
    assert ours.to_serialized_string() == theirs.to_serialized_string()
    assert metadata.from_serialized_string(theirs.to_serialized_string()) == ours


@pytest.mark.parametrize("device", ["cpu:1", "TFRT_CPU_1", "tpu:1", "no device", ""])
def test_devices_are_looked_up_as_the_reference_does(device):
    def found(cls):
        try:
            return cls(device).to_jax_sharding()
        except ValueError:
            return ValueError

    assert found(metadata.SingleDeviceShardingMetadata) == found(ocp.metadata.SingleDeviceShardingMetadata)


@pytest.mark.parametrize("fields", [{}, {"axis_types": (KINDS[0],)}, {"device_mesh": [0, 1, 2]}], ids=str)
def test_shardings_made_by_hand_are_written_to_the_byte(fields):
    def made(module, devices):
        given = dict(fields)
        if "device_mesh" in given:
            given["device_mesh"] = devices.DeviceMetadataMesh(
                [devices.DeviceMetadata(id=n) for n in given["device_mesh"]]
            )
        return module.NamedShardingMetadata(np.array([3]), ["x"], (None, "x"), **given).to_serialized_string()

    assert made(metadata, metadata) == made(ocp.metadata, reference_sharding)


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        '{"sharding_type": "PositionalSharding"}',
        '{"sharding_type": "GSPMDSharding"}',
        '{"sharding_type": "NamedSharding"}',
        '{"sharding_type": "NamedSharding", "shape": [8], "axis_names": ["x"]}',
        '{"sharding_type": "SingleDeviceSharding"}',
    ],
)
def test_what_cannot_be_read_raises_what_the_reference_raises(text):
    with pytest.raises((ValueError, NotImplementedError)) as theirs:
        reference_sharding.from_serialized_string(text)
    expected = NotImplementedError if isinstance(theirs.value, NotImplementedError) else ValueError
    with pytest.raises(expected):
        metadata.from_serialized_string(text)


def test_differences_in_equality_are_deliberate():
    sharding = jax.sharding.NamedSharding(jax.make_mesh((2, 4), ("x", "y"), axis_types=(KINDS[0],) * 2), P(("x", "y")))
    ours, theirs = both(sharding)
    # What was written and read is what it was: partitions over several axes come back as lists in the reference.
    assert reference_sharding.from_serialized_string(theirs.to_serialized_string()) != theirs
    assert metadata.from_serialized_string(ours.to_serialized_string()) == ours
    # Comparing with another kind is no error.
    with pytest.raises(AttributeError):
        assert theirs == ocp.metadata.SingleDeviceShardingMetadata("cpu:0")
    assert ours != metadata.SingleDeviceShardingMetadata("cpu:0")


def equalities(module):
    numbers = np.dtype("float32"), np.dtype("int32")
    storage = module.StorageMetadata((2,), (2,))
    leaves = [
        module.Metadata("a", None),
        *(module.ArrayMetadata("a", None, shape, None, dtype) for shape in [(), (2,)] for dtype in [None, *numbers]),
        module.ArrayMetadata("b", "/x", (2,), None, numbers[0]),
        module.ArrayMetadata("a", None, (2,), None, numbers[0], storage),
        module.ArrayMetadata("a", None, (2,), None, numbers[0], module.StorageMetadata((2,), (2,), object())),
        module.ArrayMetadata("a", None, (2,), module.SingleDeviceShardingMetadata("cpu:0"), numbers[0]),
        module.ArrayMetadata("a", None, (2,), module.SingleDeviceShardingMetadata("TFRT_CPU_0"), numbers[0]),
        *(module.ScalarMetadata("a", None, dtype=dtype) for dtype in [None, *numbers]),
        module.ScalarMetadata("b", None, (3,), dtype=numbers[0], storage=storage),
        module.StringMetadata("a", None),
        module.StringMetadata("b", "/x"),
    ]
    return [[left == right for right in leaves[1:]] for left in leaves[1:]]


def test_leaves_are_equal_where_they_are_in_the_reference():
    assert equalities(metadata) == equalities(ocp.metadata)


# --- trees -----------------------------------------------------------------------------------------------------------


def tree():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(KINDS[0],) * 2)
    sharding = jax.sharding.NamedSharding(mesh, P(("x", "y"), None))
    return {
        "params": {"w": jax.device_put(np.zeros((8, 4), np.float32), sharding), "b": jnp.zeros(3, jnp.bfloat16)},
        "key": jax.random.key(3),
        "numpy": np.arange(6).reshape(2, 3),
        "numbers": [1, 1.5, True, np.float32(2)],
        "nested": [{"z": np.zeros(())}],
        "text": "hello",
        "empty": {"dict": {}, "list": [], "none": None},
    }


def shown(leaf):
    row = {name: getattr(leaf, name, None) for name in ("name", "shape", "dtype")}
    sharding = getattr(leaf, "sharding", None)
    return row | {"type": type(leaf).__name__, "sharding": sharding and written(sharding)}


def written(sharding):
    """Return the text of a sharding; older releases of JAX give the devices of a CPU another name."""
    return sharding.to_serialized_string().replace("TFRT_CPU_", "cpu:")


def test_the_metadata_of_a_tree_is_that_of_the_reference(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "theirs", tree())
        theirs = checkpointer.metadata(tmp_path / "theirs").item_metadata
    milepost.save(tmp_path / "ours", tree())
    ours = metadata.tree_metadata(open_checkpoint(tmp_path / "ours").manifest.items["state"], tmp_path / "ours")
    assert jax.tree.map(shown, ours.tree) == jax.tree.map(shown, theirs.tree)
    paths = [[path for path, _ in jax.tree_util.tree_flatten_with_path(one)[0]] for one in (ours, theirs)]
    assert paths[0] == paths[1]
    assert (ours.custom_metadata, ours.use_zarr3) == (theirs.custom_metadata, theirs.use_zarr3)
    assert {leaf.directory for leaf in jax.tree.leaves(ours)} == {tmp_path / "ours"}


def test_tuples_named_tuples_and_keys_keep_their_kinds_unlike_in_the_reference(tmp_path):
    # Its metadata shows tuples as lists and all keys as text, although the tree that comes back may have neither.
    kept = {"tuple": (np.zeros(1), 2), "ints": {1: 3}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "theirs", kept)
        theirs = checkpointer.metadata(tmp_path / "theirs").item_metadata.tree
    milepost.save(tmp_path / "ours", kept)
    ours = metadata.tree_metadata(open_checkpoint(tmp_path / "ours").manifest.items["state"]).tree
    assert (type(theirs["tuple"]), list(theirs["ints"])) == (list, ["1"])
    assert jax.tree.structure(ours) == jax.tree.structure(kept)


def test_v1_leaves_are_shown_as_the_reference_shows_them(tmp_path):
    kept = {name: leaf for name, leaf in tree().items() if name in ("params", "numpy", "text")} | {
        "int": 5,
        "float": 2.5,
    }
    reference_v1.save(tmp_path / "theirs", kept)
    milepost.save(tmp_path / "ours", kept)
    theirs, ours = reference_v1.metadata(tmp_path / "theirs").metadata, milepost.v1.metadata(tmp_path / "ours").metadata
    assert {name: ours[name] for name in ("text", "int", "float")} == {
        name: theirs[name] for name in ("text", "int", "float")
    }
    for mine, its in ((ours["params"]["w"], theirs["params"]["w"]), (ours["params"]["b"], theirs["params"]["b"])):
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
        assert written(mine.sharding_metadata) == written(its.sharding_metadata)
        assert mine.sharding == its.sharding
    assert (ours["numpy"].shape, ours["numpy"].dtype) == (theirs["numpy"].shape, theirs["numpy"].dtype)


# --- steps and roots -------------------------------------------------------------------------------------------------

STEP_FIELDS = (
    "item_handlers",
    "item_metadata",
    "metrics",
    "init_timestamp_nsecs",
    "commit_timestamp_nsecs",
    "custom_metadata",
)


def test_the_metadata_of_a_step_of_the_reference_is_read(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", {"a": 1}, custom_metadata={"lr": 0.1})
    handlers = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), note=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handlers) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardSave({"a": np.ones(2)}), note=ocp.args.JsonSave({"b": 1}))
        checkpointer.save(tmp_path / "2", args)
    for step in ("1", "2"):
        ours, theirs = metadata.get_step_metadata(tmp_path / step), ocp.metadata.get_step_metadata(tmp_path / step)
        assert theirs.commit_timestamp_nsecs is not None
        assert [getattr(ours, name) for name in STEP_FIELDS] == [getattr(theirs, name) for name in STEP_FIELDS]


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"item_handlers": "H", "custom_metadata": {"a": 1}},
        {"item_handlers": {"a": "H"}, "metrics": {"loss": 1.0}, "init_timestamp_nsecs": 1},
        {"custom": 1, "item_handlers": None, "commit_timestamp_nsecs": None},
        {"custom": 1, "custom_metadata": {}},
        {"custom": 1, "custom_metadata": {"a": 1}},
        {"metrics": 5},
        {"item_handlers": 5},
        {"init_timestamp_nsecs": "x"},
    ],
    ids=json.dumps,
)
def test_the_small_file_means_what_it_means_to_the_reference(tmp_path, document):
    (tmp_path / "_CHECKPOINT_METADATA").write_text(json.dumps(document), encoding="utf-8")

    def read(act):
        try:
            made = act()
        except ValueError:
            return ValueError
        return [getattr(made, name) for name in STEP_FIELDS]

    assert read(lambda: step_metadata_from_document(document)) == read(lambda: ocp.metadata.get_step_metadata(tmp_path))


def test_documents_are_written_to_the_byte_and_read_both_ways(tmp_path):
    files = {}
    for module in (metadata, ocp.metadata):
        store = module.metadata_store(enable_write=True, blocking_write=True)
        folder = tmp_path / module.__name__
        folder.mkdir()
        store.write(folder / "x", {"a": {"b": [1, None, 0.5]}, "c": "ü"})
        store.update(folder / "x", c=2, d=[])
        files[module] = (folder / "x").read_bytes(), module.metadata_store(enable_write=False).read(folder / "x")
    assert files[metadata] == files[ocp.metadata]
    reader = ocp.metadata.metadata_store(enable_write=False)
    assert reader.read(tmp_path / metadata.__name__ / "x") == files[metadata][1]


# --- v1.training -----------------------------------------------------------------------------------------------------

GIVEN = {
    "metadata": {"a": 1},
    "init_timestamp_nsecs": 5,
    "commit_timestamp_nsecs": 1_795_375_842_450_093_054,
    "custom_metadata": {"lr": 0.1},
    "metrics": {"loss": 2.0},
}


@pytest.mark.parametrize("given", [{"metadata": None}, GIVEN], ids=["least", "most"])
def test_the_metadata_of_a_step_looks_like_that_of_the_reference(given):
    ours = CheckpointMetadata(3, "/runs/3", **given)
    theirs = reference_v1.training.CheckpointMetadata(3, "/runs/3", **given)
    assert repr(ours) == repr(theirs)
    names = ["step", "path", "metrics", "init_timestamp", "commit_timestamp", *given]
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


def test_the_time_of_a_step_is_that_of_the_reference():
    ours, theirs = (
        cls(3, "/runs/3", **GIVEN) for cls in (CheckpointMetadata, reference_v1.training.CheckpointMetadata)
    )
    assert ours.time == theirs.time
    for cls in (CheckpointMetadata, reference_v1.training.CheckpointMetadata):
        with pytest.raises(TypeError):
            _ = cls(3, "/runs/3", metadata=None).time


def test_root_metadata_looks_like_that_of_the_reference():
    for fields in ({}, {"custom_metadata": {"lr": 0.1}}):
        ours = RootMetadata(directory="/runs", **fields)
        assert repr(ours) == repr(reference_v1.training.RootMetadata(directory="/runs", **fields))
        assert ours == RootMetadata(directory="/runs", **fields)
