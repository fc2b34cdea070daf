"""Context, options and the small modules of v1 beside the reference's; every difference that is meant is in a table."""

from __future__ import annotations

import collections
import dataclasses
import enum
import inspect

import flax.struct
import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st
from milepost import errors, multihost
from milepost.v1 import _context, arrays, options, tree
from milepost.v1 import errors as v1_errors
from milepost.v1 import multihost as v1_multihost
from milepost.v1.training import errors as training_errors
from orbax.checkpoint import multihost as their_multihost
from orbax.checkpoint import v1 as theirs

REQUIRED = "required"

DIFFERENT_DEFAULTS = {
    # the manifest keeps what the reference keeps in a store of its own
    "ArrayOptions.Saving.array_metadata_store": None,
    # milepost hands out UPaths
    "FileOptions.path_class": None,
    # containers are always kept as rich as they are
    "PyTreeOptions.Saving.pytree_metadata_options": None,
    # the handlers of the process, as they are when a call is made, not when the options were made
    "CheckpointablesOptions.registry": None,
}
MISSING_FIELDS = {
    # private to the reference; nothing regulates here
    "MemoryOptions.RegulatorOptions._regulator",
}


def classes(module):
    """Every class of options below a module, by its qualified name."""
    pending = [value for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
    found = {}
    while pending:
        cls = pending.pop()
        if dataclasses.is_dataclass(cls) or issubclass(cls, enum.Enum):
            found[cls.__qualname__] = cls
            pending += [value for value in vars(cls).values() if inspect.isclass(value)]
    return found


def shown(value):
    """A default, comparable between the two libraries."""
    if dataclasses.is_dataclass(value):
        return (type(value).__qualname__, {field.name: shown(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, enum.Enum):
        return str(value)
    return value


def fields(cls):
    name = cls.__qualname__ if inspect.isclass(cls) else type(cls).__qualname__
    return [
        field
        for field in dataclasses.fields(cls)
        if f"{name}.{field.name}" not in MISSING_FIELDS | {*DIFFERENT_DEFAULTS}
    ]


def default(field):
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    return REQUIRED if field.default is dataclasses.MISSING else shown(field.default)


def names_and_kinds(callable_):
    return [(each.name, each.kind) for each in inspect.signature(callable_).parameters.values()]


def with_defaults(callable_):
    return [(each.name, each.kind, each.default) for each in inspect.signature(callable_).parameters.values()]


def public(module):
    return {name for name in dir(module) if not name.startswith("_")}


# --- options and context ---------------------------------------------------------------------------------------------


def test_the_option_classes_are_the_reference_s():
    # Only what the reference offers by name: its classes of other modules come in by way of fields.
    expected = {name for name in classes(theirs.options) if name.partition(".")[0] in public(theirs.options)}
    assert set(classes(options)) == expected
    assert {*options.__all__} == {name for name in expected if "." not in name}


@pytest.mark.parametrize("name", sorted(classes(options)))
def test_fields_have_the_reference_s_names_order_and_defaults(name):
    ours, reference = classes(options)[name], classes(theirs.options)[name]
    if issubclass(ours, enum.Enum):
        assert [(each.name, each.value, str(each)) for each in ours] == [
            (each.name, each.value, str(each)) for each in reference
        ]
        return
    left_out = {field.name for field in dataclasses.fields(reference)} - {
        each.name for each in dataclasses.fields(ours)
    }
    assert left_out == {each.rpartition(".")[2] for each in MISSING_FIELDS if each.rpartition(".")[0] == name}
    assert [(each.name, each.kw_only, default(each)) for each in fields(ours)] == [
        (each.name, each.kw_only, default(each)) for each in fields(reference)
    ]


@pytest.mark.parametrize(("name", "expected"), sorted(DIFFERENT_DEFAULTS.items()))
def test_defaults_that_differ_are_those_of_the_table(name, expected):
    cls, _, field = name.rpartition(".")
    assert getattr(classes(options)[cls](), field) is expected
    assert getattr(classes(theirs.options)[cls](), field) is not expected


def test_options_of_arrays_are_called_back_alike():
    ours = options.ArrayOptions.Saving.ScopedStorageOptionsCreator.__call__
    assert names_and_kinds(ours) == names_and_kinds(
        theirs.options.ArrayOptions.Saving.ScopedStorageOptionsCreator.__call__
    )


def test_a_context_is_made_like_the_reference_s():
    assert with_defaults(_context.Context) == with_defaults(theirs.Context)


def test_a_context_has_the_reference_s_names():
    # settings: what the engine is told. atomicity_options: the reference has the short name alone.
    assert public(_context.Context) - public(theirs.Context) == {"settings", "atomicity_options"}
    assert public(theirs.Context) - public(_context.Context) == set()


def test_a_context_holds_the_reference_s_defaults():
    for name in public(theirs.Context):
        ours, reference = getattr(_context.Context(), name), getattr(theirs.Context(), name)
        assert shown(ours) == shown(reference)


def story(context, opts, log):
    """What a context does, as text."""

    def tried(what, act):
        try:
            log.append((what, act()))
        except Exception as error:  # noqa: BLE001 - compared
            log.append((what, next(each for each in type(error).__mro__ if each.__module__ == "builtins")))

    def partially(each, value):
        each.pytree.loading.partial_load = value

    one = context(pytree_options=opts.PyTreeOptions(loading=opts.PyTreeOptions.Loading(partial_load=True)))
    tried("layout", lambda: setattr(one, "checkpoint_layout", "safetensors"))
    tried("no layout", lambda: setattr(one, "checkpoint_layout", "tar"))
    tried("replace", lambda: setattr(one, "array", opts.ArrayOptions()))
    tried("unknown", lambda: context(array=opts.ArrayOptions()))
    with one as entered:
        tried("entered", lambda: entered is one)
        tried("change", lambda: partially(one, False))
        tried("change layout", lambda: setattr(one, "checkpoint_layout", "orbax"))
        copied = context(one)
        tried("copied", lambda: copied.pytree.loading.partial_load)
        tried("copied layout", lambda: copied.checkpoint_layout.value)
        tried("change copy", lambda: partially(copied, False))
        with context() as nested:
            tried("nested", lambda: nested.pytree.loading.partial_load)
            tried("change outer", lambda: partially(one, False))
        tried("change again", lambda: partially(one, False))
    tried("change after", lambda: partially(one, False))
    tried("changed", lambda: one.pytree.loading.partial_load)


def test_a_context_behaves_like_the_reference_s():
    ours, reference = [], []
    story(_context.Context, options, ours)
    story(theirs.Context, theirs.options, reference)
    assert ours == reference


# --- errors, arrays, multihost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "reference"), [(v1_errors, theirs.errors), (training_errors, theirs.training.errors)])
def test_errors_are_the_reference_s_and_ours(ours, reference):
    expected = {name: cls for name, cls in vars(reference).items() if inspect.isclass(cls)}
    assert {*ours.__all__} == {*expected}
    for name, cls in expected.items():
        mine = getattr(ours, name)
        assert issubclass(mine, errors.MilepostError)
        assert issubclass(mine, cls.__mro__[1])


@pytest.mark.parametrize(
    ("ours", "reference"), [(arrays, theirs.arrays), (tree, theirs.tree), (v1_multihost, theirs.multihost)]
)
def test_modules_have_the_reference_s_names(ours, reference):
    assert {*ours.__all__} == public(reference)
    assert all(hasattr(ours, name) for name in ours.__all__)


def test_aliases_are_the_reference_s():
    for name in ("Scalar", "AbstractScalar", "DType", "Shape"):
        assert getattr(arrays, name) == getattr(theirs.arrays, name)
    for name in ("Leaf", "PyTreeKey", "PyTreeKeyPath"):
        assert getattr(tree, name) == getattr(theirs.tree, name)


@pytest.mark.parametrize("name", ["is_pathways_backend", "is_primary_host", "process_count", "process_index"])
def test_processes_are_counted_like_the_reference_does(name):
    for module, reference in ((multihost, their_multihost), (v1_multihost, theirs.multihost)):
        assert with_defaults(getattr(module, name)) == with_defaults(getattr(reference, name))
    arguments = [[0], [1], [None]] if name == "is_primary_host" else [[]]
    for each in arguments:
        assert getattr(v1_multihost, name)(*each) == getattr(theirs.multihost, name)(*each)


@pytest.mark.parametrize("name", ["sync_global_processes", "reached_preemption", "coordination_timeout"])
def test_functions_of_processes_have_the_reference_s_signatures(name):
    assert with_defaults(getattr(multihost, name)) == with_defaults(getattr(their_multihost, name))


def test_the_waiting_of_v1_is_awaitable_like_the_reference_s():
    ours, reference = v1_multihost.sync_global_processes, theirs.multihost.sync_global_processes
    assert with_defaults(ours) == with_defaults(reference)
    assert inspect.iscoroutinefunction(ours) is inspect.iscoroutinefunction(reference) is True


def test_a_tree_of_one_process_is_broadcast_like_the_reference_does():
    given = {"a": np.arange(3), "b": 3}
    ours, reference = multihost.broadcast_one_to_all(given), their_multihost.broadcast_one_to_all(given)
    assert {key: value.tolist() for key, value in ours.items()} == {k: v.tolist() for k, v in reference.items()}


# --- merging ---------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["a", "b"])  # noqa: PYI024 - a container of trees


@flax.struct.dataclass
class Registered:
    a: object
    b: object


trees = st.recursive(
    st.integers(0, 3) | st.none(),
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.lists(inner, max_size=2)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.builds(Registered, inner, inner)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2).map(collections.OrderedDict)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2).map(FrozenDict)
    ),
    max_leaves=6,
)


def at_fixed_places(inner):
    """Dicts in which every key holds a leaf or always the same kind of container."""
    leaf = st.integers(0, 3) | st.none()
    return st.fixed_dictionaries(
        {},
        optional={
            "dict": leaf | inner,
            "list": leaf | st.tuples(inner, inner).map(list),
            "pair": leaf | st.builds(Pair, inner, inner),
            "registered": leaf | st.builds(Registered, inner, inner),
        },
    )


def merged(merge, given_trees, **how):
    try:
        return merge(*given_trees, **how)
    except ValueError:
        return ValueError


@given(st.lists(trees, min_size=1, max_size=3))
def test_trees_are_merged_like_the_reference_does(given_trees):
    before = jax.tree.map(lambda leaf: leaf, given_trees)
    ours = merged(tree.merge, given_trees)
    assert ours == merged(theirs.tree.merge, given_trees)
    assert given_trees == before


# The reference fails in many ways where a container meets one of another kind; so each kind has its places here.
@given(st.lists(st.recursive(st.integers(0, 3), at_fixed_places, max_leaves=6), min_size=1, max_size=3))
def test_later_trees_win_like_the_reference_s(given_trees):
    before = jax.tree.map(lambda leaf: leaf, given_trees)
    ours = merged(tree.merge, given_trees, overwrite=True)
    assert ours == merged(theirs.tree.merge, given_trees, overwrite=True)
    assert given_trees == before


def test_differences_of_merging():
    merge, reference = tree.merge, theirs.tree.merge
    # Key kinds are kept apart: 1 is not "1".
    assert merge({1: 1}, {"1": 2}) == {1: 1, "1": 2}
    assert merged(reference, [{1: 1}, {"1": 2}]) is ValueError
    # Nothing is overwritten without being told to, also where one side is taken for a leaf.
    sides = [{"a": {"x": 1}}, {"a": {"y": 2}}]
    assert merged(merge, sides, is_leaf=lambda node: "x" in node) is ValueError
    assert reference(*sides, is_leaf=lambda node: isinstance(node, dict) and "x" in node) == {"a": {"y": 2}}
    # The later tree wins also where containers are of different kinds.
    assert merge((1, 2), {}, overwrite=True) == {}
    with pytest.raises(TypeError):
        reference((1, 2), {}, overwrite=True)
    # A defaultdict stays one.
    counts = collections.defaultdict(int, a=1)
    assert merge(counts, collections.defaultdict(int, b=1))["c"] == 0
    assert type(reference(counts, collections.defaultdict(int, b=1))) is dict


def test_all_conflicts_of_a_merge_are_told_by_path():
    one = {"a": [1, {"b": 2}], "c": Pair(1, {}), "d": Registered(None, 1), "e": 1}
    other = {"a": [1, {"b": {}}], "c": Pair(2, {}), "d": Registered(1, {}), "f": 1}
    with pytest.raises(errors.MismatchError) as error:
        tree.merge(one, other)
    told = [line.strip().partition(": ")[0] for line in str(error.value).splitlines()[1:]]
    assert sorted(told) == ["['a'][0]", "['a'][1]['b']", "['c'].a", "['d'].a", "['d'].b"]
