"""How containers are written down: what is read is what was written, and nonsense is refused."""

from __future__ import annotations

import collections
import subprocess
import sys

import milepost
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost import errors, structure
from milepost.structure import (
    DEEPEST,
    Attr,
    OpaqueError,
    build,
    class_named,
    class_ref,
    count_leaves,
    decode_static,
    encode_static,
    leaf_names,
    leaf_paths,
    show_path,
)

statics = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.text().map(Attr)
    | st.sampled_from([list, dict, collections.OrderedDict]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def typed(value):
    """Return a value such that equality means the same kinds, too."""
    if isinstance(value, dict):
        return "dict", [(typed(key), typed(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [typed(part) for part in value]
    return type(value), value


@given(statics)
def test_a_static_value_is_read_as_it_was_written(value):
    assert typed(decode_static(encode_static(value))) == typed(value)


@pytest.mark.parametrize(
    "value", [object(), {1}, b"x", 1j, float("nan"), float("inf"), print, max], ids=lambda value: type(value).__name__
)
def test_what_json_cannot_hold_is_opaque(value):
    for each in (value, [value], {"a": (value,)}):
        with pytest.raises(OpaqueError):
            encode_static(each)


def test_a_class_that_cannot_be_found_by_its_name_is_opaque():
    class Local:
        pass

    with pytest.raises(OpaqueError, match="cannot be found"):
        class_ref(Local)


class Outer:
    class Inner:
        pass

    value = 7


@pytest.mark.parametrize("cls", [Outer, Outer.Inner, collections.OrderedDict, int])
def test_a_class_is_found_by_its_name(cls):
    assert class_named(class_ref(cls)) is cls


@pytest.mark.parametrize(
    "ref",
    [
        *("", ":", "builtins", "builtins:", ":int", "os:path", "os:system", "no_such_module:A"),
        *("builtins:int.__class__", "builtins:int.real.bit_length"),
        *(f"{__name__}:Outer.value", f"{__name__}:Outer.__dict__", f"{__name__}:Outer..Inner"),
    ],
)
def test_what_is_no_class_is_not_found(ref):
    assert class_named(ref) is None


@pytest.mark.parametrize(
    "json", [{}, {"a": 1, "b": 2}, {"tuple": 5}, {"dict": [1]}, {"dict": [[[], 1]]}, {"what": 1}], ids=repr
)
def test_a_malformed_static_value_is_refused(json):
    with pytest.raises((ValueError, TypeError)):
        decode_static(json)


BAD = {
    "a number": 5,
    "a text": "x",
    "a list": [],
    "no kind": {"children": []},
    "an unknown kind": {"kind": "set", "children": []},
    "no children": {"kind": "list"},
    "children that are none": {"kind": "list", "children": "**"},
    "fewer keys": {"kind": "dict", "keys": [], "children": ["*"]},
    "more keys": {"kind": "dict", "keys": ["a", "b"], "children": ["*"]},
    "no keys": {"kind": "dict", "children": []},
    "a key twice": {"kind": "dict", "keys": ["a", "a"], "children": ["*", "*"]},
    "two keys that are equal": {"kind": "OrderedDict", "keys": [1, True], "children": ["*", "*"]},
    "a key that is a list": {"kind": "dict", "keys": [{"list": []}], "children": ["*"]},
    "no factory": {"kind": "defaultdict", "keys": [], "children": []},
    "a class without a name": {"kind": "custom", "keys": [], "children": []},
    "a class named by a number": {"kind": "custom", "type": 5, "keys": [], "children": []},
    "fields that are numbers": {"kind": "namedtuple", "type": "a:B", "fields": [1], "children": ["*"]},
    "fields in a text": {"kind": "namedtuple", "type": "a:B", "fields": "ab", "children": ["*", "*"]},
    "fewer fields": {"kind": "namedtuple", "type": "a:B", "fields": [], "children": ["*"]},
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("within", [False, True])
def test_what_could_not_be_built_is_refused(what, within):
    node = {"kind": "list", "children": ["*", BAD[what]]} if within else BAD[what]
    with pytest.raises((ValueError, TypeError, KeyError)):
        count_leaves(node)


def nested(depth):
    node = "*"
    for _ in range(depth):
        node = {"kind": "list", "children": [node]}
    return node


def test_what_is_nested_too_deeply_is_refused_and_nothing_less():
    assert count_leaves(nested(DEEPEST)) == len(list(leaf_paths(nested(DEEPEST)))) == 1
    for deeper in (DEEPEST + 1, 100_000):
        node = nested(deeper)
        for check in (count_leaves, lambda node: list(leaf_paths(node))):
            with pytest.raises(ValueError, match="nested more than"):
                check(node)
        while isinstance(node, dict):  # so that it is not freed recursively
            node = node.pop("children")[0]


nodes = st.recursive(
    st.sampled_from(["*", None]),
    lambda inner: st.one_of(
        st.builds(
            lambda kind, parts: {"kind": kind, "children": parts},
            st.sampled_from(["list", "tuple"]),
            st.lists(inner, max_size=3),
        ),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3).map(
            lambda parts: {"kind": "dict", "keys": list(parts), "children": list(parts.values())}
        ),
    ),
    max_leaves=20,
)


@given(nodes)
def test_paths_lead_to_the_leaves_in_the_order_in_which_they_are_built(node):
    count = count_leaves(node)
    paths = list(leaf_paths(node))
    tree = build(node, iter(range(count)))
    for number, path in enumerate(paths):
        at = tree
        for key in path:
            at = at[key]
        assert at == number
    assert len(paths) == count


@given(
    st.lists(
        st.lists(st.text("a/~01.", max_size=3) | st.integers(0, 2), max_size=3).map(tuple),
        unique_by=lambda path: str(typed(path)),
    )
)
def test_the_name_of_every_leaf_is_its_own(paths):
    assert len(set(leaf_names([tuple(path) for path in paths]))) == len(paths)


def test_a_path_is_shown_as_python_would_write_it():
    assert show_path(("a", 1, Attr("w"), "\n")) == "['a'][1].w['\\n']"
    assert show_path(()) == "<root>"


def test_a_key_that_is_a_class_has_its_name_where_the_class_is_not_loaded():
    node = {"kind": "dict", "keys": [{"class": "not_loaded:Thing"}], "children": ["*"]}
    assert build(node, iter([7])) == {"not_loaded:Thing": 7}


def test_a_factory_that_is_not_loaded_makes_a_plain_dict():
    node = {"kind": "defaultdict", "keys": ["a"], "children": ["*"], "factory": {"class": "not_loaded:Thing"}}
    built = build(node, iter([7]))
    assert (type(built), built) == (dict, {"a": 7})


def test_named_tuples_of_a_kind_share_a_class():
    node = {"kind": "namedtuple", "type": "gone:Gone", "fields": ["x"], "children": ["*"]}
    assert type(build(node, iter([1]))) is type(build(node, iter([2])))


def test_everything_public_is_listed():
    assert all(hasattr(structure, name) for name in structure.__all__)


# --- classes that changed since ---------------------------------------------------------------------------------------

EVOLVING = """
import dataclasses, sys, jax, milepost
fields = sys.argv[2].split()
made = dataclasses.make_dataclass(
    "Layer",
    [(name.strip("*"), object, dataclasses.field(metadata={"static": name.startswith("*")})) for name in fields],
)
made.__module__ = "__main__"
Layer = jax.tree_util.register_dataclass(made)
if sys.argv[3] == "save":
    milepost.save(sys.argv[1], [Layer(*range(len(fields)))])
else:
    loaded = milepost.load(sys.argv[1])[0]
    print(type(loaded).__name__, loaded if isinstance(loaded, dict) else dataclasses.asdict(loaded))
"""


def run_with(fields, path, what):
    done = subprocess.run(
        [sys.executable, "-c", EVOLVING, str(path), fields, what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("a b *s", "Layer {'a': 0, 'b': 1, 's': 2}"),
        ("a b c *s", "dict {'a': 0, 'b': 1}"),
        ("a *s", "dict {'a': 0, 'b': 1}"),
        ("b a *s", "dict {'a': 0, 'b': 1}"),
        ("a *b *s", "dict {'a': 0, 'b': 1}"),
        ("a b", "dict {'a': 0, 'b': 1}"),
        ("a b *s *t", "dict {'a': 0, 'b': 1}"),
        ("a c *s", "dict {'a': 0, 'b': 1}"),
    ],
    ids=lambda text: text.partition(" {")[0],
)
def test_a_class_whose_fields_have_changed_never_gets_the_values_of_others(tmp_path, now, expected):
    run_with("a b *s", tmp_path / "1", "save")
    assert run_with(now, tmp_path / "1", "load") == expected


@pytest.mark.parametrize("depth", [DEEPEST + 1, 600, 1_000, 100_000])
def test_a_tree_that_is_nested_too_deeply_is_refused_before_a_byte_is_written(tmp_path, depth):
    tree = 1
    for _ in range(depth):
        tree = [tree]
    with pytest.raises(errors.UnsupportedLeafError, match="nested more than"):
        milepost.save(tmp_path / "1", tree)
    assert list(tmp_path.iterdir()) == []
    while isinstance(tree, list):  # so that it is not freed recursively
        tree = tree.pop()


def test_a_tree_as_deep_as_may_be_comes_back(tmp_path):
    tree = 1
    for _ in range(DEEPEST):
        tree = [tree]
    milepost.save(tmp_path / "1", tree)
    assert milepost.load(tmp_path / "1") == tree
