"""How a saved tree is made to fit another structure, and how trees are shown flat and plain."""

from __future__ import annotations

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost import errors
from milepost.checkpoint_utils import construct_restore_args
from milepost.transform_utils import (
    RestoreTransform,
    Transform,
    apply_transformations,
    intersect_trees,
    merge_trees,
    plan_transformations,
)
from milepost.tree import (
    Diff,
    deserialize_tree,
    from_flat_dict,
    is_empty_node,
    serialize_tree,
    str_keypath,
    to_flat_dict,
    to_shape_dtype_struct,
    tree_difference,
)
from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs


class Pair(NamedTuple):
    p: object
    q: object


trees = st.recursive(
    st.integers() | st.none(),
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
).filter(lambda tree: tree is not None)  # which means: no target

ORIGINAL = {"a": 1, "b": {"c": 2, "d": 3}, "e": [4, 5]}


# --- transformations -------------------------------------------------------------------------------------------------


def test_groups_of_the_pattern_go_into_the_original_key():
    transforms = {r"x/(.*)": Transform(original_key=r"b/\1", value_fn=lambda value: -value)}
    assert apply_transformations(ORIGINAL, transforms, {"x": {"c": 0, "d": 0}}) == {"x": {"c": -2, "d": -3}}


def test_an_original_key_may_be_a_tuple():
    transforms = {"x": Transform(original_key=("b", "c"))}
    assert apply_transformations(ORIGINAL, transforms, {"x": 0}) == {"x": 2}


def test_a_pattern_has_to_match_the_whole_name():
    assert apply_transformations(ORIGINAL, {"x": Transform(original_key="a")}, {"xy": 0}) == {"xy": 0}


def test_the_last_of_several_patterns_counts():
    transforms = collections.OrderedDict(
        [("a", Transform(value_fn=lambda _: "first")), (".", Transform(value_fn=lambda _: "last"))]
    )
    assert apply_transformations(ORIGINAL, transforms, {"a": 0}) == {"a": "last"}


def test_a_fallback_only_says_not_to_take_the_saved_leaf_by_default():
    fallback = Transform(use_fallback=True)
    assert apply_transformations(ORIGINAL, {"a": fallback}, {"a": 0}) == {"a": 0}
    transforms = {".": Transform(original_key="b/c"), "a": fallback}
    assert apply_transformations(ORIGINAL, transforms, {"a": 0}) == {"a": 2}
    assert apply_transformations(ORIGINAL, {"a": fallback}, {"a": 0, "e": [0]}, default_to_original=False) == {
        "a": 1,
        "e": [0],
    }


def test_a_function_of_the_whole_tree_gets_the_tree_as_it_is():
    seen = []

    def whole(key, tree):
        seen.append((key, tree is ORIGINAL))
        return tree["e"][1]

    assert apply_transformations(ORIGINAL, {"x/0": Transform(multi_value_fn=whole)}, {"x": [0]}) == {"x": [5]}
    assert seen == [("x/0", True)]


@pytest.mark.parametrize(
    "transforms",
    [
        {"x": Transform(original_key="nowhere")},
        {"x": Transform(original_key=r"\1")},
        {"x(": Transform(original_key="a")},
        {"x": Transform()},
        {"x": 5},
        {"x": Transform(original_key="b")},
    ],
)
def test_nothing_is_called_if_a_transformation_cannot_be_done(transforms):
    def never(value):
        raise AssertionError(value)

    with pytest.raises(errors.ConfigError, match="cannot transform 'x"):
        apply_transformations(ORIGINAL, {"a": Transform(value_fn=never), **transforms}, {"a": 0, "x": 0})


def test_a_container_asked_for_as_a_leaf_is_called_one():
    with pytest.raises(ValueError, match="no leaf 'b'") as caught:
        apply_transformations(ORIGINAL, {"x": Transform(original_key="b")}, {"x": 0})
    assert caught.value.__notes__ == ["it is a container, of 'b/c' among others"]


@pytest.mark.parametrize("kind", [Transform, RestoreTransform])
@pytest.mark.parametrize(
    "fields",
    [
        {"use_fallback": True, "original_key": "a"},
        {"use_fallback": True, "value_fn": abs},
        {"use_fallback": True, "multi_value_fn": max},
        {"multi_value_fn": max, "original_key": "a"},
        {"multi_value_fn": max, "value_fn": abs},
    ],
)
def test_fields_that_exclude_each_other_are_refused(kind, fields):
    with pytest.raises(ValueError, match="cannot make a transform"):
        kind(**fields)


def test_two_leaves_of_one_name_are_refused_not_dropped():
    tree = {"a/b": 1, "a": {"b": 2}}
    with pytest.raises(ValueError, match="two of its leaves would be called 'a/b'"):
        apply_transformations(tree, {}, {"a": {"b": 0}})
    assert to_flat_dict(tree) == {("a/b",): 1, ("a", "b"): 2}


def test_a_plan_names_the_leaves_that_need_to_be_read():
    transforms = {
        "x": Transform(original_key="a"),
        "y": Transform(use_fallback=True),
        "z": Transform(multi_value_fn=max),
    }
    plan = plan_transformations(to_flat_dict(ORIGINAL, sep="/"), transforms, ["x", "y", "z", "b/c", "q"])
    assert {key: source.original_key for key, source in plan.items()} == {
        "x": "a",
        "y": None,
        "z": None,
        "b/c": "b/c",
        "q": None,
    }
    assert [key for key, source in plan.items() if source.whole_tree] == ["z"]


@given(trees, trees)
def test_without_transformations_a_leaf_is_the_originals_or_its_own(original, new):
    flat, wanted = to_flat_dict(original), to_flat_dict(new)
    made = apply_transformations(original, {}, new)
    assert {key: flat.get(key, value) for key, value in wanted.items()} == to_flat_dict(made)
    assert jax.tree.structure(new) == jax.tree.structure(made)


# --- merging ---------------------------------------------------------------------------------------------------------


def test_the_last_tree_wins():
    assert merge_trees({"a": 1, "b": {"c": 1}}, {"b": {"d": 2}}, {"a": 3}) == {"a": 3, "b": {"c": 1, "d": 2}}


@pytest.mark.parametrize("both", [({"a": 1}, {"a": {"b": 2}}), ({"a": {"b": 2}}, {"a": 1})])
def test_a_leaf_that_is_a_container_elsewhere_is_refused_in_both_orders(both):
    with pytest.raises(ValueError, match="other keys go on below it"):
        merge_trees(*both)


def test_a_target_gives_the_structure_and_misses_nothing():
    assert Pair(1, [2]) == merge_trees({"p": 1, "r": 3}, {"q": [2]}, target=Pair(0, [0]))
    with pytest.raises(KeyError, match=r"no value for \('b',\), \('c',\)") as caught:
        merge_trees({"a": 1}, target={"a": 0, "b": 0, "c": 0})
    assert isinstance(caught.value, errors.MismatchError)


def test_an_intersection_of_nothing_is_refused():
    assert intersect_trees({"a": {"b": 1, "c": 1}}, {"a": {"b": 3}, "d": 1}) == {"a": {"b": 3}}
    with pytest.raises(ValueError, match="there are none"):
        intersect_trees()


# --- flat and plain trees --------------------------------------------------------------------------------------------


@given(trees)
def test_a_flat_tree_is_put_together_again(tree):
    assert tree == from_flat_dict(to_flat_dict(tree), target=tree)
    assert tree == from_flat_dict(to_flat_dict(tree, sep="."), target=tree, sep=".")
    assert tree == deserialize_tree(serialize_tree(tree, keep_empty_nodes=True), tree, keep_empty_nodes=True)


@given(trees)
def test_a_serialized_tree_is_made_of_dicts_and_lists(tree):
    def kinds(node):
        yield type(node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else []:
            yield from kinds(child)

    plain = serialize_tree(tree, keep_empty_nodes=True)
    assert set(kinds(plain)) <= {dict, list, int, type(None), tuple}
    assert to_flat_dict(tree, keep_empty_nodes=True) == to_flat_dict(plain, keep_empty_nodes=True)


def test_values_are_taken_out_of_a_flat_dict_in_place():
    flat = {("a",): 1, ("b", "c"): 2, ("z",): 3}
    assert from_flat_dict(flat, target={"a": 0, "b": {"c": 0}}, inplace=True) == {"a": 1, "b": {"c": 2}}
    assert flat == {("z",): 3}
    assert from_flat_dict(flat, inplace=True) == {"z": 3}
    assert flat == {}


def test_nothing_is_taken_out_of_a_flat_dict_that_does_not_fill_the_target():
    flat = {("a",): 1}
    with pytest.raises(ValueError, match="no value for"):
        from_flat_dict(flat, target={"a": 0, "b": 0}, inplace=True)
    assert flat == {("a",): 1}


@pytest.mark.parametrize(
    ("flat", "sep"), [({"ab": 1}, None), ({("a", "b"): 1}, "/"), ({("a",): 1, ("a", "b"): 2}, None)]
)
def test_keys_of_which_no_tree_can_be_made_are_refused(flat, sep):
    with pytest.raises(errors.ConfigError, match="cannot make a tree of the key"):
        from_flat_dict(flat, sep=sep)


def test_a_leaf_that_holds_a_dict_is_not_written_into():
    value = {}
    assert from_flat_dict({("a",): value, ("a", "b"): 1}) == {"a": {"b": 1}}
    assert value == {}


def test_a_list_with_holes_is_not_written():
    with pytest.raises(ValueError, match="the list at 'a' has empty nodes among its leaves"):
        serialize_tree({"a": [None, 1]})
    with pytest.raises(ValueError, match="it has no leaves"):
        serialize_tree({"a": []})


def test_all_that_is_missing_is_listed():
    with pytest.raises(errors.MismatchError, match=r"\('a', '2'\), \('b',\)"):
        deserialize_tree({"a": [1, 2]}, {"a": (0, 0, 0), "b": 0})


def test_keys_of_unknown_classes_have_no_name():
    with pytest.raises(ValueError, match="cannot name the key ''a'' of a path: it is a str"):
        str_keypath(("a",))


@pytest.mark.parametrize(
    ("node", "empty"), [(None, True), ({}, True), ((), True), ([None], False), (0, False), ("", False)]
)
def test_an_empty_node_has_neither_value_nor_children(node, empty):
    assert empty == is_empty_node(node)


@given(trees)
def test_a_tree_does_not_differ_from_itself(tree):
    assert None is tree_difference(tree, tree, leaves_equal=lambda one, other: one == other)


def test_a_difference_stands_where_it_is():
    found = tree_difference(Pair([1, 2], {"x": 1}), Pair([1, 2.0], {"y": 1}))
    assert Pair([None, Diff(2, 2.0)], {"x": Diff(1, None), "y": Diff(None, 1)}) == found


# --- restore arguments -----------------------------------------------------------------------------------------------


def test_all_leaves_that_cannot_be_restored_are_listed_by_path():
    with pytest.raises(errors.UnsupportedLeafError, match=r"cannot restore 2 leaves(.|\n)*\['a'\]\[1\](.|\n)*\['b'\]"):
        construct_restore_args({"a": [1, object()], "b": int, "c": "text"})


def test_scalars_that_can_be_saved_can_be_asked_for():
    leaves = [np.float32(1), np.bool_(1), 1j, b"x", jnp.bfloat16.dtype.type(1)]
    assert [RestoreArgs(type(leaf)) for leaf in leaves] == construct_restore_args(leaves)


def test_a_tree_of_shardings_has_to_fit():
    with pytest.raises(errors.MismatchError, match="cannot place the target"):
        construct_restore_args({"a": 1, "b": 2}, {"a": None})


def test_strictness_reaches_every_array():
    made = construct_restore_args([jnp.ones(2), jax.random.key(0), 1], strict=False)
    assert [one.strict for one in made if isinstance(one, ArrayRestoreArgs)] == [False, False]


def test_what_has_no_shape_has_no_abstract_array():
    with pytest.raises(errors.UnsupportedLeafError, match="cannot tell the shape of ''a''"):
        to_shape_dtype_struct("a")
    assert (np.bool_(1), 1.0) == (
        to_shape_dtype_struct(np.bool_(1)),
        to_shape_dtype_struct(np.bool_(1), scalar_dtype=float),
    )


def test_the_structs_of_random_keys_are_targets_for_them(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"one": jax.random.key(3), "many": jax.device_put(jax.random.split(jax.random.key(0), 8), placed)}
    milepost.save(tmp_path / "1", tree)
    target = jax.tree.map(to_shape_dtype_struct, tree)
    loaded = milepost.load(tmp_path / "1", target)
    for name, keys in tree.items():
        assert loaded[name].dtype == keys.dtype
        assert loaded[name].sharding == keys.sharding
        assert np.array_equal(jax.random.key_data(loaded[name]), jax.random.key_data(keys))
