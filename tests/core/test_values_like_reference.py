"""Arguments, options, transformations and trees beside those of the installed reference: signatures and results."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import milepost.metadata
import numpy as np
import orbax.checkpoint as reference
import orbax.checkpoint.args
import orbax.checkpoint.checkpoint_utils
import orbax.checkpoint.options
import orbax.checkpoint.transform_utils
import orbax.checkpoint.tree
import orbax.checkpoint.type_handlers
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from milepost import args, checkpoint_utils, options, transform_utils, tree, type_handlers

MODULES = [args, checkpoint_utils, options, transform_utils, tree, type_handlers]

NOT_IN_THE_REFERENCE = {
    ("transform_utils", "Source"): "a plan of transformations can be looked at before anything is read",
    ("transform_utils", "plan_transformations"): "as above",
    ("tree", "Diff"): "what `tree_difference` returns has a name there, but not in this module",
    ("tree", "is_empty_node"): "in the reference's `utils`",
    ("tree", "placed_by"): "shared with `checkpoint_utils`",
}

DIFFERENT_PARAMETERS = {
    ("options", "AsyncOptions", "timeout_secs"): "the document of the checkpointers says 600; it was doubled later",
}
"""Where a name, kind or default of a parameter differs, and why."""

DIFFERENT_ERRORS = {
    AssertionError: "fields of a Transform that exclude each other, and trees that do not fit: assertions go with -O",
    AttributeError: "what is no Transform, and what is no mapping (Python's own TypeError): it says so",
    re.error: "the pattern of a transformation: it says which",
    TypeError: "a leaf that is a container in another tree: it says which key",
}
"""Errors by which the reference merely falls over; here they are ValueErrors or TypeErrors that say what is wrong."""


def names():
    return [
        pytest.param(module.__name__.rpartition(".")[2], name, id=f"{module.__name__.rpartition('.')[2]}.{name}")
        for module in MODULES
        for name in module.__all__
        if name != "PLACEHOLDER" and (module.__name__.rpartition(".")[2], name) not in NOT_IN_THE_REFERENCE
    ]


def both(module, name):
    return tuple(getattr(getattr(root, module), name) for root in (milepost, reference))


def default_of(owner, parameter):
    """Return a default so that ours and theirs can be compared."""
    if not dataclasses.is_dataclass(owner):
        return parameter.default
    fields = {field.name: field for field in dataclasses.fields(owner)}
    factory = fields[parameter.name].default_factory if parameter.name in fields else dataclasses.MISSING
    default = parameter.default if factory is dataclasses.MISSING else factory()
    return default.value if isinstance(default, enum.Enum) else default


def parameters(owner):
    return {one.name: (one.kind, default_of(owner, one)) for one in inspect.signature(owner).parameters.values()}


# --- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), names())
def test_parameters_have_the_names_kinds_defaults_and_order_of_the_reference(module, name):
    if isinstance(getattr(getattr(milepost, module), name), enum.EnumMeta):
        ours, theirs = ([(one.name, one.value) for one in kind] for kind in both(module, name))
        assert ours == theirs
        return
    ours, theirs = map(parameters, both(module, name))
    assert list(ours) == list(theirs)
    different = {one for one in ours if ours[one] != theirs[one]}
    assert different == {one for where, what, one in DIFFERENT_PARAMETERS if (where, what) == (module, name)}


@pytest.mark.parametrize(("module", "name"), NOT_IN_THE_REFERENCE)
def test_what_is_said_not_to_be_in_the_reference_is_not_there(module, name):
    assert name in getattr(milepost, module).__all__
    assert not hasattr(getattr(reference, module), name)


def test_all_arguments_of_the_reference_are_there():
    assert (
        sorted(orbax.checkpoint.args.__all__ if hasattr(orbax.checkpoint.args, "__all__") else public()) == args.__all__
    )


def public():
    shown = {name for name in dir(orbax.checkpoint.args) if not name.startswith("_")}
    return {name for name in shown if not inspect.ismodule(getattr(orbax.checkpoint.args, name))}


@pytest.mark.parametrize(("module", "name"), [one for one in names() if isinstance(both(*one.values)[0], type)])
def test_classes_are_related_frozen_and_compared_as_in_the_reference(module, name):
    ours, theirs = both(module, name)
    for other in [one for one in getattr(milepost, module).__all__ if (module, one) not in NOT_IN_THE_REFERENCE]:
        if isinstance(getattr(getattr(milepost, module), other), type):
            mine, its = both(module, other)
            assert issubclass(ours, mine) == issubclass(theirs, its)
    assert dataclasses.is_dataclass(ours) == dataclasses.is_dataclass(theirs)
    if dataclasses.is_dataclass(ours):
        assert ours.__dataclass_params__.frozen == theirs.__dataclass_params__.frozen
        assert (ours.__hash__ is None) == (theirs.__hash__ is None)


# --- composites and registration -------------------------------------------------------------------------------------

ITEMS = st.dictionaries(st.sampled_from(["a", "b", "items", "_x", "__y"]), st.integers(0, 3), max_size=3)


@given(ITEMS, ITEMS)
def test_composites_hold_and_join_what_those_of_the_reference_do(one, other):
    def story(composite):
        first = composite(**one)
        second = composite(**other)
        joined = [list(made.items()) for made in (first, first | second, first | other)]
        common = [dict(made) for made in (first & second, first & other)]  # there in the order of a set
        asked = [(name in first, first.get(name)) for name in ("a", "b", "items", "_x", "q")]
        return joined, common, asked, len(first), bool(first)

    assert outcome(story, args.Composite) == outcome(story, orbax.checkpoint.args.Composite)


@pytest.mark.parametrize(
    "act", [lambda it: it.q, lambda it: it["q"], lambda it: setattr(it, "a", 1), lambda it: it & 3, lambda it: it | [1]]
)
def test_composites_refuse_with_the_builtin_of_the_reference(act):
    ours, theirs = (outcome(act, kind.Composite(a=1)) for kind in (args, orbax.checkpoint.args))
    assert_alike(ours, theirs)


def test_handlers_find_their_arguments_as_in_the_reference():
    def story(module, base):
        handler = type("Handler", (base,), dict.fromkeys(["save", "restore", "metadata"], lambda self: None))
        cls = dataclasses.make_dataclass("Args", [], bases=(module.CheckpointArgs,))
        yield module.has_registered_args(handler)
        yield outcome(module.get_registered_args_cls, handler)
        yield outcome(module.get_registered_handler_cls, cls)
        yield outcome(module.register_with_handler, handler)
        yield outcome(lambda: module.register_with_handler(handler, for_save=True)(int))
        yield module.register_with_handler(handler, for_save=True)(cls) is cls
        yield module.has_registered_args(handler)
        both_ways = dataclasses.make_dataclass("Both", [], bases=(module.CheckpointArgs,))
        other = type("Other", (handler,), {})
        module.register_with_handler(other, for_save=True, for_restore=True)(both_ways)
        yield module.get_registered_args_cls(other()) == (both_ways, both_ways)
        yield module.get_registered_handler_cls(both_ways()) is other
        yield module.has_registered_args(type("Derived", (other,), {}))

    assert list(story(args, object)) == list(story(orbax.checkpoint.args, reference.CheckpointHandler))


# --- trees -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    p: object
    q: object


@flax.struct.dataclass
class Layer:
    w: object
    b: object


TREES = st.recursive(
    st.integers(0, 9) | st.none(),
    lambda inner: (
        st.dictionaries(st.sampled_from(["a", "b", "ab", "0", "a/b"]), inner, max_size=3)
        | st.dictionaries(st.integers(0, 2), inner, max_size=2)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.builds(Pair, inner, inner)
        | st.builds(Layer, inner, inner)
    ),
    max_leaves=8,
)


def collides(one):
    """Return whether two leaves get one name when joined: the reference drops one of them."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(one)
    ]
    return len(set(paths)) < len(paths)


def shown(value):
    """Return a value as text that tells classes apart, but not the order of keys."""
    if isinstance(value, dict):
        return f"{type(value).__name__}({sorted((repr(key), shown(part)) for key, part in value.items())})"
    if isinstance(value, Layer):
        return f"Layer({shown(value.w)}, {shown(value.b)})"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({[shown(part) for part in value]})"
    return repr(value)


def outcome(act, *given, **options):
    """Return what a call gives, or as which builtin it fails."""
    try:
        return shown(act(*given, **options))
    except Exception as error:  # noqa: BLE001 - errors of both sides are compared
        builtins = [KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError, re.error]
        return tuple(kind for kind in builtins if isinstance(error, kind))


def assert_alike(ours, theirs):
    if isinstance(theirs, tuple) and theirs[0] in DIFFERENT_ERRORS:
        assert {ValueError, TypeError} & set(ours)
    elif isinstance(theirs, tuple):
        assert set(theirs) <= set(ours)
    else:
        assert ours == theirs


@pytest.mark.parametrize("keep", [False, True])
@given(st.data())
def test_trees_are_shown_flat_and_plain_as_in_the_reference(keep, data):
    value, other = data.draw(TREES), data.draw(TREES)
    theirs = orbax.checkpoint.tree
    for sep in (None, "."):
        flat = tree.to_flat_dict(value, sep=sep, keep_empty_nodes=keep)
        assert shown(flat) == shown(theirs.to_flat_dict(value, sep=sep, keep_empty_nodes=keep))
        for target in (None, value, other):
            mine, its = (outcome(kind.from_flat_dict, dict(flat), target=target, sep=sep) for kind in (tree, theirs))
            assert_alike(mine, its)
    assert_alike(
        outcome(tree.serialize_tree, value, keep_empty_nodes=keep),
        outcome(theirs.serialize_tree, value, keep_empty_nodes=keep),
    )
    plain = tree.serialize_tree(value, keep_empty_nodes=True)
    for target in (value, other):
        mine, its = (outcome(kind.deserialize_tree, plain, target, keep_empty_nodes=keep) for kind in (tree, theirs))
        if its == (IndexError,):  # an element that a list lacks: here a leaf that is missing, like any other
            its = (KeyError,)
        assert_alike(mine, its)
    mine, its = (kind.get_param_names(value, include_empty_nodes=keep) for kind in (tree, theirs))
    assert shown(mine) == shown(its)
    assert tree.is_flat_dict(value) == theirs.is_flat_dict(value)


@given(TREES, TREES)
def test_trees_differ_where_they_do_in_the_reference(one, other):
    for equal in (None, lambda mine, its: mine == its):
        ours, theirs = (kind.tree_difference(one, other, leaves_equal=equal) for kind in (tree, orbax.checkpoint.tree))
        assert shown(ours) == shown(theirs)


@given(st.lists(TREES, max_size=3), st.none() | TREES)
def test_trees_are_merged_and_intersected_as_in_the_reference(several, target):
    for name in ("merge_trees", "intersect_trees"):
        ours, theirs = (outcome(function, *several, target=target) for function in both("transform_utils", name))
        assert_alike(ours, theirs)


# --- transformations -------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A transform, to be made of either library's class."""

    original_key: str | None = None
    use_fallback: bool = False
    negate: bool = False
    describe: bool = False

    def made(self, cls):
        value_fn = (lambda value: -value) if self.negate else None
        multi_value_fn = (lambda key, whole: f"{key} {shown(whole)}") if self.describe else None
        return cls(self.original_key, self.use_fallback, value_fn, multi_value_fn)


KEYS = [None, "a", "b", "a/0", "0", r"\g<0>", r"a/\1", r"\1", "ab/p"]
SPECS = st.one_of(
    st.builds(Spec, original_key=st.sampled_from(KEYS), negate=st.booleans()),
    st.just(Spec(use_fallback=True)),
    st.just(Spec(describe=True)),
    st.builds(Spec, st.sampled_from(KEYS), st.booleans(), st.booleans(), st.booleans()),
)
PATTERNS = ["a", "b", "a/.*", ".*", "(.*)", "[ab]/(.*)", "a(b?)", r"(\d)", "b/(0|1)", "p", "(a|b)/?(.*)"]
TRANSFORMS = st.dictionaries(st.sampled_from(PATTERNS), SPECS, max_size=4)
NESTED = st.dictionaries(st.sampled_from(["a", "b"]), SPECS | st.dictionaries(st.sampled_from(PATTERNS), SPECS))


@given(TREES, TRANSFORMS | NESTED, TREES, st.booleans())
def test_trees_are_transformed_as_in_the_reference(original, specs, new, default_to_original):
    assume(not collides(original) and not collides(new))
    assume(not tree.is_empty_node(new))  # comes back as it is; the reference makes a dict of it

    def act(module):
        made = jax.tree.map(
            lambda spec: spec.made(module.Transform), specs, is_leaf=lambda node: isinstance(node, Spec)
        )
        return module.apply_transformations(original, made, new, default_to_original=default_to_original)

    assert_alike(outcome(act, transform_utils), outcome(act, orbax.checkpoint.transform_utils))


def test_a_real_migration_of_parameters_gives_what_it_gives_in_the_reference():
    layers = {f"layer_{number}": {"kernel": number, "bias": -number} for number in range(3)}
    original = {"params": {"encoder": layers}, "step": 7, "opt": (Pair(1, 2), [3])}
    new = {
        "model": {"blocks": {f"{number}": {"w": 0, "b": 0} for number in range(3)}},
        "step": 0,
        "fresh": 5,
        "opt": [0],
    }

    def act(module):
        transforms = {
            r"model/blocks/(\d+)/w": module.Transform(original_key=r"params/encoder/layer_\1/kernel"),
            r"model/blocks/(\d+)/b": module.Transform(r"params/encoder/layer_\1/bias", value_fn=lambda bias: 2 * bias),
            "opt": [module.Transform(original_key="opt/0/q")],
            "step": module.Transform(multi_value_fn=lambda key, whole: (key, whole["step"])),
            "fresh": module.Transform(use_fallback=True),
        }
        return module.apply_transformations(original, transforms, new)

    ours, theirs = act(transform_utils), act(orbax.checkpoint.transform_utils)
    assert ours == theirs
    assert (ours["model"]["blocks"]["2"], ours["opt"], ours["step"]) == ({"w": 2, "b": -4}, [2], ("step", 7))


# --- restore arguments -----------------------------------------------------------------------------------------------


def shardings():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    return NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())


def array_metadata(module, *, placed=False, **fields):
    sharding = module.NamedShardingMetadata.from_jax_sharding(shardings()[0]) if placed else None
    return module.ArrayMetadata(**{"name": "n", "directory": None, "shape": (8,), "sharding": sharding, **fields})


LEAVES = {
    "jax.Array": lambda _: jax.device_put(jnp.ones((8, 2)), shardings()[0]),
    "bfloat16": lambda _: jnp.bfloat16(1),
    "key": lambda _: jax.random.key(0),
    "sharded keys": lambda _: jax.device_put(jax.random.split(jax.random.key(0), 8), shardings()[0]),
    "legacy key": lambda _: jax.random.PRNGKey(0),
    "abstract": lambda _: jax.ShapeDtypeStruct((8,), jnp.int8),
    "abstract and placed": lambda _: jax.ShapeDtypeStruct((8,), jnp.int8, sharding=shardings()[0]),
    "abstract and laid out": lambda _: jax.ShapeDtypeStruct(
        (8, 2), jnp.float32, sharding=Format(Layout((0, 1)), shardings()[0])
    ),
    "abstract key": lambda _: jax.eval_shape(lambda: jax.random.key(0)),
    "np.ndarray": lambda _: np.ones(3, np.int8),
    "np.float64": lambda _: np.float64(3),
    "int": lambda _: 5,
    "float": lambda _: 2.5,
    "bool": lambda _: True,
    "str": lambda _: "abc",
    "Ellipsis": lambda _: ...,
    "None": lambda _: None,
    "{}": lambda _: {},
    "object": lambda _: object(),
    "class": lambda _: int,
    "ShapedArray": lambda _: jax.core.ShapedArray((2,), jnp.int32),
    "ArrayMetadata": lambda module: array_metadata(module, dtype=np.dtype("int8")),
    "ArrayMetadata, placed": lambda module: array_metadata(module, placed=True, dtype=np.dtype("int8")),
    "ArrayMetadata of no dtype": lambda module: array_metadata(module, dtype=None),
    "StringMetadata": lambda module: module.StringMetadata("n", None),
    **{
        f"ScalarMetadata of {dtype}": lambda module, dtype=dtype: module.ScalarMetadata(
            "n", None, dtype=np.dtype(dtype)
        )
        for dtype in ("bool", "int32", "uint8", "float32", "complex64", jnp.bfloat16)
    },
}


def described(made):
    """Return restore arguments so that ours and theirs can be compared."""
    if isinstance(made, dict):
        return {key: described(one) for key, one in made.items()}
    if not dataclasses.is_dataclass(made):
        return made
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    if hasattr(fields.get("sharding"), "to_jax_sharding"):
        fields["sharding"] = "metadata", fields["sharding"].to_jax_sharding()
    return type(made).__name__, fields


def restore_args(root, make, sharding_tree, **options):
    try:
        target = {"leaf": make(root.metadata), "one": 1}
        return described(root.checkpoint_utils.construct_restore_args(target, sharding_tree, **options))
    except ValueError:
        return ValueError


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("tree_of", ["nothing", "shardings", "no shardings", "layouts"])
@pytest.mark.parametrize("options", [{}, {"set_global_shape": False}, {"support_layout": True}, {"strict": False}])
def test_restore_arguments_are_those_of_the_reference(leaf, tree_of, options):
    per_leaf = {"shardings": shardings()[1], "no shardings": None, "layouts": Format(Layout((0, 1)), shardings()[1])}
    sharding_tree = None if tree_of == "nothing" else {"leaf": per_leaf[tree_of], "one": None}
    ours, theirs = (restore_args(root, LEAVES[leaf], sharding_tree, **options) for root in (milepost, reference))
    assert ours == theirs


# Random keys: the reference shows the numbers below them, which no load takes for keys.
KEYS = ("key", "sharded keys", "abstract key")


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf not in ("class", "object", *KEYS)])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": np.dtype("float16")}, {"scalar_dtype": float}, {"support_format": True}]
)
def test_abstract_arrays_are_those_of_the_reference(leaf, options):
    ours, theirs = (
        outcome(root.tree.to_shape_dtype_struct, LEAVES[leaf](root.metadata), **options)
        for root in (milepost, reference)
    )
    assert_alike(ours, theirs)
