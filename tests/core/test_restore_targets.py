"""What is asked for on restoring: values, abstract values, restore arguments, parts, transforms, or nothing."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from milepost import metadata
from milepost.args import PyTreeRestore, PyTreeSave, StandardRestore, StandardSave
from milepost.checkpoint_utils import construct_restore_args
from milepost.checkpointers import Checkpointer, PyTreeCheckpointer
from milepost.handlers import PyTreeCheckpointHandler, StandardCheckpointHandler
from milepost.transform_utils import RestoreTransform, Transform
from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs, SaveArgs, SingleReplicaArrayRestoreArgs


class Pair(NamedTuple):
    left: object
    right: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: object
    b: object


@pytest.fixture
def spread():
    return NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))


@pytest.fixture
def second():
    return SingleDeviceSharding(jax.devices()[1])


def abstract(shape, dtype, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def described(value):
    """Return the kind of a value, its dtype, its content, and where it is."""
    if isinstance(value, jax.Array):
        return "jax", value.dtype.name, np.asarray(value).tolist(), value.sharding
    if isinstance(value, np.ndarray):
        return "np", value.dtype.name, value.tolist()
    return type(value), value


@pytest.fixture
def standard(tmp_path):
    """Save a value as the only leaf, and return what restores it into a target."""

    def save(value):
        checkpointer = Checkpointer(StandardCheckpointHandler())
        checkpointer.save(tmp_path / "1", args=StandardSave({"x": value}), force=True)
        return lambda *target, **rest: checkpointer.restore(
            tmp_path / "1", args=StandardRestore({"x": target[0]} if target else None, **rest)
        )["x"]

    return save


@pytest.fixture
def pytree(tmp_path):
    """Save a tree, and return what restores it."""

    def save(tree, **rest):
        checkpointer = Checkpointer(PyTreeCheckpointHandler())
        checkpointer.save(tmp_path / "1", args=PyTreeSave(tree, **rest), force=True)
        return lambda *args, **kwargs: checkpointer.restore(tmp_path / "1", args=PyTreeRestore(*args, **kwargs))

    return save


def leaves():
    return {"a": jnp.arange(8.0), "b": {"c": np.arange(3), "d": 5}, "l": [1.5, np.arange(2)]}


# --- like values -----------------------------------------------------------------------------------------------------


def test_an_abstract_array_with_a_sharding_is_an_array_there(standard, spread, second):
    for saved in (jnp.arange(8.0), np.arange(8)):
        restore = standard(saved)
        for place in (spread, second):
            found = restore(abstract((8,), jnp.bfloat16, place))
            assert described(found) == ("jax", "bfloat16", list(range(8)), place)


def test_an_abstract_array_without_a_sharding_is_one_of_numpy(standard):
    for saved in (jnp.arange(8.0), np.arange(8)):
        assert described(standard(saved)(abstract((8,), np.float32))) == ("np", "float32", list(range(8)))


def test_an_abstract_array_over_no_devices_in_particular_is_one_of_numpy(standard):
    mesh = jax.sharding.AbstractMesh((8,), ("x",))
    target = abstract((8,), np.float32, NamedSharding(mesh, PartitionSpec("x")))
    assert described(standard(jnp.arange(8.0))(target)) == ("np", "float32", list(range(8)))


def test_a_real_array_lends_its_dtype_and_its_place(standard, second):
    target = jax.device_put(jnp.zeros(8, jnp.int8), second)
    assert described(standard(np.arange(8.0))(target)) == ("jax", "int8", list(range(8)), second)


def test_an_array_that_is_bound_to_no_device_lends_no_device(standard, second):
    found = standard(jax.device_put(jnp.arange(8.0), second))(jnp.zeros(8, jnp.float32))
    assert described(found) == ("jax", "float32", list(range(8)), SingleDeviceSharding(jax.devices()[0]))
    assert not found.committed


@pytest.mark.parametrize(
    ("saved", "target", "expected"),
    [
        (2.5, 0, (int, 2)),
        (7, False, (bool, True)),
        (7, 0.0, (float, 7.0)),
        (np.array(2.5), 0.0, (float, 2.5)),
        (np.float32(2.5), 0j, (complex, 2.5 + 0j)),
        (3, np.float16(0), (np.float16, np.float16(3))),
        (3, np.zeros((), np.int8), ("np", "int8", 3)),
        (np.arange(3.7), np.zeros(4, np.int8), ("np", "int8", [0, 1, 2, 3])),
        ("text", "", (str, "text")),
        (b"text", b"", (bytes, b"text")),
        (3, None, (type(None), None)),
        (np.arange(3), ..., (type(...), ...)),
        (1 << 70, 0, (int, 1 << 70)),
    ],
)
def test_a_value_is_restored_as_what_the_target_is(standard, saved, target, expected):
    assert described(standard(saved)(target)) == expected


@pytest.mark.parametrize(
    ("saved", "target", "words"),
    [
        (np.arange(8), 0, "saved with shape (8,), which is not a scalar"),
        (np.arange(8), np.zeros(4), "saved with shape (8,), the target has shape (4,)"),
        (np.arange(8), np.float32(0), "saved with shape (8,), the target has shape ()"),
        (jnp.arange(8), abstract((8, 1), jnp.int32), "saved with shape (8,), the target has shape (8, 1)"),
        ("text", 0, "saved as a str, which is no int"),
        (3, "", "saved as a int, the target has a str"),
        (3, int, "saved as a int, the target has a type"),
        (None, np.zeros(4), "missing from the checkpoint"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_where_and_why(standard, saved, target, words):
    with pytest.raises(ValueError, match="do not match in 1 places") as caught:
        standard(saved)(target)
    assert str(caught.value).splitlines()[1] == f"  ['x']: {words}"


def test_the_whole_difference_is_in_one_error(tmp_path):
    checkpointer = PyTreeCheckpointer()
    checkpointer.save(tmp_path / "1", leaves())
    target = {"a": np.zeros(9), "b": {"c": np.zeros(3), "q": 1}, "l": [0, np.zeros(2)]}
    with pytest.raises(ValueError, match="in 3 places") as caught:
        Checkpointer(StandardCheckpointHandler()).restore(tmp_path / "1", args=StandardRestore(target))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "['a']: saved with shape (8,), the target has shape (9,)",
        "['b']['q']: missing from the checkpoint",
        "['b']['d']: missing from the target",
    ]


@pytest.mark.parametrize("kind", ["np", "abstract", "jax"])
def test_without_strict_arrays_are_cut_and_filled_with_zeros(standard, spread, kind):
    restore = standard(jnp.arange(6.0).reshape(2, 3))
    target = {
        "np": np.zeros((8, 2), np.int32),
        "abstract": abstract((8, 2), np.int32, spread),
        "jax": jax.device_put(np.zeros((8, 2), np.int32), spread),
    }[kind]
    found = restore(target, strict=False)
    assert np.asarray(found).tolist() == [[0, 1], [3, 4], *[[0, 0]] * 6]
    assert (found.dtype.name, getattr(found, "sharding", None)) == ("int32", None if kind == "np" else spread)
    with pytest.raises(ValueError, match="shape"):
        restore(target)
    with pytest.raises(ValueError, match="shape"):
        restore(np.zeros(8), strict=False)


def test_random_keys_keep_their_kind_and_take_the_place_of_the_target(standard, second):
    key = jax.random.key(3, impl="rbg")
    restore = standard(key)
    here, there = key.devices(), second.device_set
    cases = (
        ((), here),
        ((key,), here),
        ((jax.eval_shape(lambda: key),), here),
        ((jax.device_put(key, second),), there),
    )
    for target, devices in cases:
        found = restore(*target)
        assert (found.dtype, jax.random.key_data(found).tolist()) == (key.dtype, jax.random.key_data(key).tolist())
        assert found.devices() == devices


@pytest.mark.parametrize(
    "target", [np.zeros(2, np.uint32), jnp.zeros(3, jnp.uint32), 0, abstract((), np.float32)], ids=repr
)
def test_random_keys_are_no_numbers(standard, target):
    with pytest.raises(ValueError, match="saved as random keys of threefry2x32, the target has numbers"):
        standard(jax.random.key(3))(target)


def test_containers_are_those_of_the_target(tmp_path):
    checkpointer = Checkpointer(StandardCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=StandardSave({"layer": {"w": 1, "b": 2}, "pair": (3, 4), "od": {"k": 5}}))
    target = {"layer": Layer(0, 0), "pair": [0, 0], "od": collections.OrderedDict(k=0)}
    found = checkpointer.restore(tmp_path / "1", args=StandardRestore(target))
    assert found == {"layer": Layer(1, 2), "pair": [3, 4], "od": collections.OrderedDict(k=5)}
    assert type(found["od"]) is collections.OrderedDict


def test_what_tracing_says_of_a_state_is_a_target(tmp_path):
    def init():
        return {"layer": Layer(jnp.ones(3), jnp.zeros(3)), "step": 0}

    checkpointer = Checkpointer(StandardCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=StandardSave(init()))
    found = checkpointer.restore(tmp_path / "1", args=StandardRestore(jax.eval_shape(init)))
    assert (type(found["layer"]), found["layer"].w.tolist(), found["step"].tolist()) == (Layer, [1, 1, 1], 0)


def test_metadata_is_a_target_for_what_was_saved(tmp_path):
    checkpointer = Checkpointer(StandardCheckpointHandler())
    saved = leaves() | {"key": jax.random.key(1), "text": "t", "none": None, "pair": Pair(1, 2j)}
    checkpointer.save(tmp_path / "1", args=StandardSave(saved))
    found = checkpointer.restore(
        tmp_path / "1", args=StandardRestore(checkpointer.metadata(tmp_path / "1").item_metadata)
    )
    plain = checkpointer.restore(tmp_path / "1")
    assert jax.tree.map(str, found) | {"pair": 0} == jax.tree.map(str, plain) | {"pair": 0}
    assert [tuple(found["pair"]), found["text"]] == [(1, 2j), "t"]
    shape = metadata.ArrayMetadata("a", None, (9,), None, np.dtype(np.float32))
    target = dict(checkpointer.metadata(tmp_path / "1").item_metadata.items()) | {"a": shape}
    with pytest.raises(ValueError, match=r"saved with shape \(8,\), the target has shape \(9,\)"):
        checkpointer.restore(tmp_path / "1", args=StandardRestore(target))


def test_layouts_are_taken_when_they_are_supported(standard):
    target = jax.device_put(jnp.zeros((2, 3)), jax.devices()[1])
    found = standard(np.arange(6.0).reshape(2, 3))(target, support_layout=True)
    assert (found.format, found.tolist()) == (target.format, [[0, 1, 2], [3, 4, 5]])


# --- without a target ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved",
    [
        1,
        2.5,
        True,
        1j,
        "text",
        b"bytes",
        None,
        {},
        [],
        (),
        np.float16(2),
        np.zeros((0, 3)),
        (1, [2, {3: 4}]),
        {1: {"1": 2}},
    ],
    ids=repr,
)
def test_without_a_target_what_was_saved_comes_back(standard, saved):
    found = standard(saved)()
    assert (type(found), str(found), jax.tree.structure(found)) == (type(saved), str(saved), jax.tree.structure(saved))


def test_without_a_target_classes_come_back_as_dicts(tmp_path):
    state = {"pair": Pair(1, (2, 3)), "layer": Layer(4, None), "dd": collections.defaultdict(list, a=5)}
    checkpointer = PyTreeCheckpointer()
    checkpointer.save(tmp_path / "1", state)
    found = checkpointer.restore(tmp_path / "1")
    assert found == {"pair": {"left": 1, "right": (2, 3)}, "layer": {"w": 4, "b": None}, "dd": {"a": 5}}
    assert [type(found[name]) for name in sorted(found)] == [dict] * 3


def test_without_a_target_arrays_are_where_they_were(standard, spread, second):
    for place in (spread, second):
        assert standard(jax.device_put(np.arange(8), place))().sharding == place


# --- restore arguments -----------------------------------------------------------------------------------------------


def test_the_structure_alone_says_nothing_of_the_leaves(pytree):
    found = pytree(leaves())({"a": 0, "b": {"c": "", "d": None}, "l": [..., 0]})
    assert [found["a"].tolist(), found["b"]["c"].tolist(), found["b"]["d"], found["l"][0], found["l"][1].tolist()] == [
        list(range(8)),
        [0, 1, 2],
        None,
        ...,
        [0, 1],
    ]


def test_restore_arguments_say_what_each_leaf_becomes(pytree, spread, second):
    restore = pytree({"x": jnp.arange(8.0), "n": np.arange(8), "s": 3, "t": "text"})
    mesh, axes = spread.mesh, spread.spec

    def one(name, args):
        return described(restore({name: 0}, {name: args}, partial_restore=True)[name])

    eight = list(range(8))
    assert one("x", RestoreArgs(np.ndarray)) == ("np", "float32", eight)
    assert one("x", RestoreArgs(dtype=np.int16))[:3] == ("jax", "int16", eight)
    assert one("n", RestoreArgs(jax.Array))[:3] == ("jax", jnp.arange(1).dtype.name, eight)
    assert one("n", ArrayRestoreArgs(sharding=second, dtype=jnp.bfloat16)) == ("jax", "bfloat16", eight, second)
    assert one("x", ArrayRestoreArgs(mesh=mesh, mesh_axes=axes)) == ("jax", "float32", eight, spread)
    assert one("x", SingleReplicaArrayRestoreArgs(sharding=spread)) == ("jax", "float32", eight, spread)
    assert one("x", ArrayRestoreArgs(sharding=metadata.from_jax_sharding(spread))) == ("jax", "float32", eight, spread)
    assert one("x", ArrayRestoreArgs(global_shape=(9,), strict=False))[2] == [*eight, 0]
    assert one("s", RestoreArgs(float)) == (float, 3.0)
    assert one("s", RestoreArgs(np.float32)) == (np.float32, np.float32(3))
    assert one("s", RestoreArgs(np.ndarray, np.int8)) == ("np", "int8", 3)
    assert one("t", RestoreArgs(str)) == (str, "text")
    assert one("t", RestoreArgs(type(...))) == (type(...), ...)
    for name, args in (("x", ArrayRestoreArgs(global_shape=(9,))), ("x", RestoreArgs(int)), ("s", RestoreArgs(str))):
        with pytest.raises(ValueError, match=f"'{name}'"):
            one(name, args)


def test_restore_arguments_without_an_item_go_by_the_saved_structure(pytree):
    saved = {"pair": Pair(jnp.arange(4.0), 2), "l": (1, 2)}
    args = {"pair": Pair(RestoreArgs(np.ndarray), RestoreArgs()), "l": [RestoreArgs(float), None]}
    found = pytree(saved)(restore_args=args)
    assert (described(found["pair"]["left"]), found["pair"]["right"]) == (("np", "float32", [0, 1, 2, 3]), 2)
    assert found["l"] == (1.0, 2)
    assert type(found["l"][0]) is float


def test_restore_arguments_have_the_structure_of_the_item(pytree):
    with pytest.raises(ValueError, match="differs from the item") as caught:
        pytree(leaves())({"a": 0}, {"b": RestoreArgs()})
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == ["a: no restore arguments", "b: no leaf"]
    with pytest.raises(ValueError, match="'a' by its restore arguments: they are 3"):
        pytree(leaves())({"a": 0}, {"a": 3})


def test_arguments_made_of_random_keys_restore_them_where_they_are_in_the_target(pytree, spread):
    keys = jax.device_put(jax.random.split(jax.random.key(1), 8), spread)
    found = pytree({"k": jax.random.split(jax.random.key(1), 8)})({"k": keys}, construct_restore_args({"k": keys}))["k"]
    assert (found.dtype, found.sharding.is_equivalent_to(spread, 1)) == (keys.dtype, True)
    assert jax.random.key_data(found).tolist() == jax.random.key_data(keys).tolist()


def test_arguments_made_of_a_target_restore_what_is_like_it(pytree, spread):
    target = {"x": jax.device_put(jnp.zeros(8, jnp.int8), spread), "n": np.zeros(8, np.float16), "s": 0.0, "t": ""}
    target["k"] = jax.random.key(0)
    saved = {"x": np.arange(8), "n": jnp.arange(8), "s": 3, "t": "text", "k": jax.random.key(1)}
    found = pytree(saved)(target, construct_restore_args(target))
    assert jax.random.key_data(found["k"]).tolist() == jax.random.key_data(saved["k"]).tolist()
    eight = list(range(8))
    assert [described(found[name]) for name in "xnst"] == [
        ("jax", "int8", eight, spread),
        ("np", "float16", eight),
        (float, 3.0),
        (str, "text"),
    ]


def test_a_part_is_restored_and_what_was_not_saved_keeps_the_value_of_the_item(pytree):
    found = pytree(leaves())({"b": {"d": 0, "new": 9}, "other": "value"}, partial_restore=True)
    assert found == {"b": {"d": 5, "new": 9}, "other": "value"}
    with pytest.raises(ValueError, match="missing from the target"):
        pytree(leaves())({"b": {"d": 0}})


# --- transforms ------------------------------------------------------------------------------------------------------


def test_transforms_rename_compute_and_fall_back(pytree):
    transforms = {
        r"moved/(.*)": Transform(original_key=r"b/\1"),
        "double": Transform(original_key="a", value_fn=lambda value: value * 2),
        "keep": Transform(use_fallback=True),
    }
    item = {"moved": {"c": 0, "d": 0}, "double": 0, "keep": 7, "a": 0, "new": 8}
    found = pytree(leaves() | {"keep": 6})(item, transforms=transforms)
    assert [found["moved"]["c"].tolist(), found["moved"]["d"], found["double"].tolist()] == [
        [0, 1, 2],
        5,
        [0, 2, 4, 6, 8, 10, 12, 14],
    ]
    assert [found["keep"], found["a"].tolist(), found["new"]] == [7, list(range(8)), 8]


def test_a_saved_leaf_that_becomes_several_is_restored_as_each_asks(pytree):
    item = {"x": 0, "y": 0}
    transforms = {"x": Transform(original_key="a"), "y": Transform(original_key="a")}
    args = {"x": RestoreArgs(np.ndarray, np.int8), "y": RestoreArgs(np.ndarray, np.float16)}
    found = pytree(leaves())(item, args, transforms=transforms)
    assert [found[name].dtype.name for name in "xy"] == ["int8", "float16"]


def test_functions_of_restore_transforms_get_the_restore_arguments_if_they_take_them(pytree):
    args = {"x": RestoreArgs(dtype=np.int8), "y": RestoreArgs(dtype=np.int8), "z": RestoreArgs(dtype=np.int8)}
    inputs = {"b/c": RestoreArgs(dtype=np.int16), "b/d": RestoreArgs()}
    transforms = {
        "x": RestoreTransform(original_key="a", value_fn=lambda value, asked: (value.dtype.name, asked.dtype)),
        "y": RestoreTransform(original_key="a", value_fn=lambda value: value.dtype.name),
        "z": RestoreTransform(multi_value_fn=lambda *given: given, multi_value_fn_input_args=inputs),
    }
    found = pytree(leaves())({"x": 0, "y": 0, "z": 0}, args, transforms=transforms)
    assert (found["x"], found["y"]) == (("int8", np.int8), "int8")
    name, tree, asked = found["z"]
    assert (name, tree["b"]["c"].dtype.name, tree["b"]["d"], tree["a"], asked) == ("z", "int16", 5, ..., args["z"])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"transforms": {}}, "there is no item"),
        ({"item": {"x": 0}, "transforms": {"x": Transform(original_key="q")}}, "'q'"),
        (
            {"item": {"x": 0}, "transforms": {"x": RestoreTransform(multi_value_fn=lambda *_: 0)}},
            "multi_value_fn_input_args is None",
        ),
        ({"item": {"x": 0}, "transforms": {}, "legacy_transform_fn": lambda *_: None}, "legacy_transform_fn is given"),
        (
            {
                "item": {"x": 0},
                "transforms": {
                    "x": RestoreTransform(multi_value_fn=lambda *_: 0, multi_value_fn_input_args={"q": RestoreArgs()})
                },
            },
            "no saved leaf 'q'",
        ),
    ],
)
def test_transforms_that_cannot_be_are_refused(pytree, kwargs, words):
    with pytest.raises(ValueError, match=words):
        pytree(leaves())(**kwargs)


def test_a_function_of_the_callers_rearranges_what_stands_for_saved_leaves(pytree):
    def rearrange(item, structure, infos):
        assert (item, structure["a"].shape, infos["b"]["c"].name) == ({"q": 1, "r": [2]}, (8,), "b.c")
        return {"q": structure["a"], "r": [structure["b"]["c"]]}, {"q": infos["a"], "r": [infos["b"]["c"]]}

    args = {"q": RestoreArgs(np.ndarray, np.int8), "r": [RestoreArgs()]}
    found = pytree(leaves())({"q": 1, "r": [2]}, args, legacy_transform_fn=rearrange)
    assert (described(found["q"]), described(found["r"][0])) == (
        ("np", "int8", list(range(8))),
        ("np", "int64", [0, 1, 2]),
    )


# --- save arguments --------------------------------------------------------------------------------------------------


def test_save_arguments_convert_before_saving(pytree, spread):
    saved = {
        "x": jax.device_put(jnp.arange(8.0), spread),
        "n": np.arange(3.0),
        "s": 2.5,
        "k": jax.random.key(0),
        "o": 1.5,
    }
    args = dict.fromkeys("xnsk", SaveArgs(dtype=np.int8, chunk_byte_size=4, shard_axes=(0,))) | {"o": None}
    found = pytree(saved, save_args=args)()
    assert described(found["x"]) == ("jax", "int8", list(range(8)), spread)
    assert [described(found[name]) for name in "nso"] == [("np", "int8", [0, 1, 2]), (int, 2), (float, 1.5)]
    assert found["k"].dtype == saved["k"].dtype


@pytest.mark.parametrize(("args", "words"), [({"y": SaveArgs()}, "mismatch"), ({"x": 3}, "SaveArgs or None")])
def test_save_arguments_have_the_structure_of_the_item(pytree, args, words):
    with pytest.raises(ValueError, match=words):
        pytree({"x": 1}, save_args=args)
