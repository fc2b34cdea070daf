"""Checkpointers beside those of the installed reference: the same calls, on a table of leaves and targets.

The reference is asked in a process of its own: this file, run as a program, prints what each call gives.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ON_ONE = jax.sharding.SingleDeviceSharding(jax.devices()[1])
ON_ALL = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("x",)), jax.sharding.PartitionSpec("x"))
OUR_OWN_MODULES = ("checkpointers", "args", "handlers", "type_handlers", "transform_utils", "options")


def abstract(shape, dtype, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


LEAVES = {
    "bool": True,
    "int": 7,
    "float": 2.5,
    "np.float32": np.float32(1.5),
    "np.int64": np.int64(3),
    "np.bool": np.bool_(True),
    "np int32": np.arange(8, dtype=np.int32),
    "np float64": np.linspace(0, 1, 8),
    "np 0d": np.array(2.5),
    "jax float32": jnp.arange(8.0) + 0.5,
    "jax bfloat16": jnp.arange(8, dtype=jnp.bfloat16),
    "jax 0d": jnp.float32(2.5),
    "jax on all": jax.device_put(jnp.arange(8.0), ON_ALL),
    "empty": np.zeros((0, 3)),
    "text": "text",
    "None": None,
    "key": jax.random.key(1),
}
TARGETS = {
    "on one": abstract((8,), jnp.float32, ON_ONE),
    "on all": abstract((8,), jnp.float32, ON_ALL),
    "abstract": abstract((8,), jnp.float16),
    "abstract 0d": abstract((), jnp.float32, ON_ONE),
    "jax": jnp.zeros(8, jnp.int32),
    "np": np.zeros(8, np.float32),
    "np.float32": np.float32(0),
    "int": 0,
    "float": 0.0,
    "bool": False,
    "None": None,
    "other shape": abstract((4,), jnp.float32, ON_ONE),
    "np other shape": np.zeros(4, np.float32),
    "other rank": abstract((8, 1), jnp.float32, ON_ONE),
    "text": "text",
}
TREE = {"a": jnp.arange(4.0), "b": {"c": np.arange(3), "d": 5}, "l": [1.5, np.arange(2)]}


def pytree_calls(lib):
    """Return restores of `TREE` with a PyTreeCheckpointHandler, by name: the keyword arguments of each."""
    ra, array_ra = lib.RestoreArgs, lib.ArrayRestoreArgs
    every = {"a": ra(), "b": {"c": ra(), "d": ra()}, "l": [ra(), ra()]}
    whole = {"a": 0, "b": {"c": 0, "d": 0}, "l": [0, 0]}

    def part(name, args):
        item = {"b": {name: 0}} if name in "cd" else {name: 0}
        asked = {"b": {name: args}} if name in "cd" else {name: args}
        return {"item": item, "restore_args": asked, "partial_restore": True}

    def renamed(item, transform, **rest):
        return {"item": item, "restore_args": {name: ra() for name in item}, "transforms": transform, **rest}

    def rearrange(item, structure, infos):
        del item
        return {"q": structure["a"], "r": [structure["b"]["c"]]}, {"q": infos["a"], "r": [infos["b"]["c"]]}

    return {
        "nothing": {},
        "item": {"item": whole},
        "item with gaps": {"item": {"a": None, "b": {"c": ..., "d": 0}, "l": [0, 0]}},
        "restore args": {"restore_args": every | {"a": array_ra(dtype=jnp.int8)}},
        "restore args of another structure": {"restore_args": {"a": ra()}},
        "subset": {"item": {"a": 0}},
        "part": {"item": {"a": 0, "b": {"c": 0}}, "partial_restore": True},
        "part with more": {"item": {"a": 0, "zz": 9}, "partial_restore": True},
        "part of a list": {"item": {"l": [0]}, "partial_restore": True},
        "array as int": part("a", ra(int)),
        "array as numpy": part("a", ra(np.ndarray)),
        "array as int16": part("a", ra(dtype=np.int16)),
        "array on all": part("a", array_ra(sharding=ON_ONE)),
        "array of another shape": part("a", array_ra(global_shape=(6,))),
        "array filled": part("a", array_ra(global_shape=(6,), strict=False)),
        "int as float": part("d", ra(float)),
        "int as numpy": part("d", ra(np.ndarray, np.float32)),
        "renamed": renamed({"x": 0}, {"x": lib.Transform(original_key="a", value_fn=lambda value: value * 2)}),
        "renamed by pattern": {
            "item": {"q": {"c": 7}},
            "restore_args": {"q": {"c": ra()}},
            "transforms": {r"q/(.*)": lib.Transform(original_key=r"b/\1")},
        },
        "fallback": renamed({"a": 7, "n": 8}, {"a": lib.Transform(use_fallback=True)}),
        "not by default": renamed(
            {"a": 7, "n": 8}, {"a": lib.Transform(use_fallback=True)}, transforms_default_to_original=False
        ),
        "default": renamed({"a": 7, "n": 8}, {}),
        "unknown": renamed({"x": 0}, {"x": lib.Transform(original_key="q")}),
        "function of several": renamed(
            {"x": 0},
            {
                "x": lib.RestoreTransform(
                    multi_value_fn=lambda key, tree, _: f"{key} {tree['a'].tolist()} {tree['b']['c'].tolist()}",
                    multi_value_fn_input_args={"a": ra(), "b/c": ra()},
                )
            },
        ),
        "function of several without inputs": renamed(
            {"x": 0}, {"x": lib.RestoreTransform(multi_value_fn=lambda *_: 0)}
        ),
        "transforms without item": {"transforms": {}},
        "function": {
            "item": {"q": 0, "r": [0]},
            "restore_args": {"q": ra(), "r": [ra()]},
            "legacy_transform_fn": rearrange,
        },
        "function and transforms": renamed({"x": 0}, {}, legacy_transform_fn=rearrange),
    }


def other_calls(lib, root):
    """Return other calls, by name; each is made in this order."""
    pytree, standard = (
        lib.Checkpointer(getattr(lib, name)()) for name in ("PyTreeCheckpointHandler", "StandardCheckpointHandler")
    )
    array, key, numpy, text = (
        lib.Checkpointer(getattr(lib, f"{name}CheckpointHandler")())
        for name in ("Array", "JaxRandomKey", "NumpyRandomKey", "Json")
    )
    items = lib.Checkpointer(lib.CompositeCheckpointHandler())
    saves, composite = lib.args, lib.args.Composite

    def both(checkpointer, name, *args, **kwargs):
        checkpointer.save(root / name, *args, **kwargs)
        return checkpointer.restore(root / name)

    cast = dict.fromkeys("abc", lib.SaveArgs(dtype=np.dtype("int8")))
    return {
        "save none": lambda: both(standard, "none", None),
        "save empty": lambda: both(standard, "empty", {}),
        "save unsupported": lambda: both(pytree, "object", {"a": object()}),
        "save args": lambda: both(pytree, "cast", {"a": 1, "b": jnp.ones(2), "c": np.ones(2)}, cast),
        "save args of another structure": lambda: both(pytree, "args", {"a": 1}, {"b": lib.SaveArgs()}),
        "save twice": lambda: [both(pytree, "twice", {"a": 1}), both(pytree, "twice", {"a": 2})],
        "save by force": lambda: [both(pytree, "force", {"a": 1}), both(pytree, "force", {"b": 2}, force=True)],
        "restore nothing": lambda: pytree.restore(root / "nowhere"),
        "restore the unfinished": lambda: [
            (root / "1.orbax-checkpoint-tmp-5").mkdir(),
            pytree.restore(root / "1.orbax-checkpoint-tmp-5"),
        ],
        "custom metadata": lambda: [
            pytree.save(root / "custom", {"a": 1}, custom_metadata={"a": [1, None]}),
            pytree.metadata(root / "custom").custom_metadata,
        ],
        "custom metadata that is no JSON": lambda: pytree.save(root / "bad", {"a": 1}, custom_metadata={"a": object()}),
        "custom metadata with other keys": lambda: pytree.save(root / "keys", {"a": 1}, custom_metadata={1: 2}),
        "unknown keyword": lambda: standard.save(root / "unknown", itm={"a": 1}),
        "document's keyword": lambda: both(standard, "keyword", state={"a": 1}),
        "array": lambda: both(array, "array", jnp.ones(2)),
        "array like": lambda: array.restore(root / "array", np.zeros(2)),
        "array by arguments": lambda: array.restore(root / "array", restore_args=lib.RestoreArgs(np.ndarray)),
        "array of a tree": lambda: both(array, "tree", {"a": 1}),
        "number": lambda: both(array, "number", 3),
        "key": lambda: both(key, "key", jax.random.key(1)),
        "no key": lambda: both(key, "nokey", 3),
        "numpy key": lambda: both(numpy, "numpy", np.random.RandomState(3).get_state(legacy=False)),
        "no numpy key": lambda: both(numpy, "nonumpy", 3),
        "json": lambda: both(text, "json", {"a": [1, None]}),
        "no json": lambda: both(text, "nojson", {"a": object()}),
        "items": lambda: both(items, "items", composite(a=saves.StandardSave({"x": 1}), j=saves.JsonSave({"q": 1}))),
        "items afresh": lambda: lib.Checkpointer(lib.CompositeCheckpointHandler()).restore(root / "items"),
        "one item": lambda: items.restore(root / "items", composite(a=saves.StandardRestore())),
        "one item without arguments": lambda: items.restore(root / "items", composite(a=None)),
        "missing item": lambda: items.restore(root / "items", composite(z=saves.StandardRestore())),
        "item restored otherwise": lambda: items.restore(root / "items", composite(a=saves.PyTreeRestore())),
        "item saved otherwise": lambda: items.save(root / "otherwise", composite(a=saves.PyTreeSave({"x": 1}))),
        "undeclared item": lambda: lib.Checkpointer(lib.CompositeCheckpointHandler("b")).save(
            root / "undeclared", composite(a=saves.PyTreeSave({"x": 1}))
        ),
        "no items": lambda: both(items, "noitems", composite()),
    }


DIFFERENT = {
    "the document says NumPy for an abstract array without a sharding; later releases say the saved sharding": {
        *(("strict", leaf, "abstract") for leaf in ("jax float32", "jax bfloat16", "jax on all")),
        *(("fit", leaf, "abstract") for leaf in ("jax float32", "jax bfloat16", "jax on all")),
    },
    "the shape of an array of NumPy is checked, and fitted, like that of any other": {
        *(
            (mode, leaf, target)
            for mode in ("strict", "fit")
            for leaf in LEAVES
            for target in ("np", "np other shape", "abstract")
        ),
    },
    "a scalar of NumPy is a target": {(mode, leaf, "np.float32") for mode in ("strict", "fit") for leaf in LEAVES},
    "a scalar of NumPy comes back as one": {
        ("strict", f"np.{name}", "nothing") for name in ("float32", "int64", "bool")
    },
    "a text comes back as it was saved, as does an array without elements": {
        *(("strict", leaf, "nothing") for leaf in ("text", "empty")),
    },
    "None is not a value for a target that asks for one": {
        *((mode, "None", target) for mode in ("strict", "fit") for target in TARGETS if target != "None"),
    },
    "a random key is not converted to numbers": {
        (mode, "key", target) for mode in ("strict", "fit") for target in ("np", "np other shape")
    },
    "what does not fit is a ValueError": {
        ("fit", "key", target) for target in ("on one", "on all", "abstract", "jax", "other shape")
    },
    "an array is restored like the item, if one is given": {("other", "array like")},
    "what is left of a list is what was asked for": {("pytree", "part of a list")},
    "an empty tree is a tree, and no items are no harm": {("other", "save empty"), ("other", "no items")},
    "the document's example says state": {("other", "document's keyword")},
    "any tree can be restored with any arguments for trees": {("other", "item restored otherwise")},
}
"""Calls that give something else here, by the reason."""


def described(value):
    """Return a value as JSON can hold it: its kind, dtype, content and place."""
    if isinstance(value, jax.Array) and not isinstance(value.dtype, np.dtype):
        return ["key", str(value.dtype), np.asarray(jax.random.key_data(value)).tolist()]
    if isinstance(value, jax.Array):
        return ["jax", value.dtype.name, np.asarray(value).astype(float).tolist(), str(value.sharding)]
    if isinstance(value, np.ndarray):
        return ["np", value.dtype.name, value.astype(float).tolist()]
    if isinstance(value, dict) or hasattr(value, "keys"):
        return {str(key): described(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(described, value)]
    return [type(value).__name__, str(value)]


def outcome(act):
    try:
        return described(act())
    except Exception as error:  # noqa: BLE001 - any error is an outcome
        return {"raised": [cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins"]}


def leaf_outcomes(checkpointer, path, leaf):
    """Return what a leaf gives without a target, and with each; the former alone if it cannot be saved."""

    def whole():
        checkpointer.save(path, {"x": LEAVES[leaf], "y": 1})
        return checkpointer.restore(path)["x"]

    def into(target, mode):
        return checkpointer.restore(path, {"x": TARGETS[target], "y": 1}, strict=mode == "strict")["x"]

    found = {f"strict|{leaf}|nothing": outcome(whole)}
    if path.exists():
        for target in TARGETS:
            for mode in ("strict", "fit"):
                found[f"{mode}|{leaf}|{target}"] = outcome(functools.partial(into, target, mode))
    return found


def outcomes(lib, root):
    """Return what all calls of the tables give, by their names joined by "|"."""
    found = {}
    with lib.StandardCheckpointer() as checkpointer:
        for leaf in LEAVES:
            found |= leaf_outcomes(checkpointer, root / f"leaf {leaf}", leaf)
    pytree = lib.Checkpointer(lib.PyTreeCheckpointHandler())
    pytree.save(root / "tree", args=lib.args.PyTreeSave(TREE))
    for name, kwargs in pytree_calls(lib).items():
        found[f"pytree|{name}"] = outcome(lambda: pytree.restore(root / "tree", args=lib.args.PyTreeRestore(**kwargs)))  # noqa: B023 - called here
    for name, call in other_calls(lib, root).items():
        found[f"other|{name}"] = outcome(call)
    return found


def reference():
    import orbax.checkpoint as ocp

    return types.SimpleNamespace(**vars(ocp.handlers) | {name: getattr(ocp, name) for name in dir(ocp)})


def ours():
    import importlib

    found = {"args": importlib.import_module("milepost.args")}
    for name in OUR_OWN_MODULES:
        module = importlib.import_module(f"milepost.{name}")
        found |= {public: getattr(module, public) for public in module.__all__ if name != "args"}
    return types.SimpleNamespace(**found)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    target = tmp_path_factory.mktemp("reference") / "outcomes.json"
    subprocess.run([sys.executable, __file__, target], check=True, capture_output=True, timeout=280)
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    # Casts that lose something were asked for; NumPy says so, as it would to the user.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return json.loads(json.dumps(outcomes(ours(), tmp_path_factory.mktemp("ours"))))


def names():
    return [
        *(f"strict|{leaf}|nothing" for leaf in LEAVES),
        *(f"{mode}|{leaf}|{target}" for leaf in LEAVES for target in TARGETS for mode in ("strict", "fit")),
        *(f"pytree|{name}" for name in pytree_calls(ours())),
        *(f"other|{name}" for name in other_calls(ours(), pathlib.Path())),
    ]


def alike(here, there):
    """Say whether two outcomes are the same; an error may be more than the reference's is."""
    if "raised" in here and "raised" in there:
        return there["raised"][0] in here["raised"]
    return here == there


def test_calls_give_what_they_give_in_the_reference_unless_there_is_a_reason(mine, theirs):
    reasons = {"|".join(call) for calls in DIFFERENT.values() for call in calls}
    assert set(theirs) <= set(mine) == set(names())
    differing = {name: (mine[name], theirs[name]) for name in theirs if not alike(mine[name], theirs[name])}
    assert {name: pair for name, pair in differing.items() if name not in reasons} == {}


@pytest.mark.parametrize("reason", DIFFERENT)
def test_every_reason_is_the_reason_of_a_difference(mine, theirs, reason):
    calls = ["|".join(call) for call in DIFFERENT[reason]]
    assert set(calls) <= set(mine)
    assert any(not alike(mine[name], theirs[name]) for name in calls if name in theirs)


SIGNATURES = [
    *(
        ("checkpointers", name)
        for name in ("Checkpointer", "AsyncCheckpointer", "StandardCheckpointer", "PyTreeCheckpointer")
    ),
    *(
        ("handlers", f"{name}CheckpointHandler")
        for name in (
            "Standard",
            "PyTree",
            "BasePyTree",
            "Array",
            "Json",
            "Proto",
            "JaxRandomKey",
            "NumpyRandomKey",
            "Composite",
        )
    ),
]


@pytest.mark.parametrize(("module", "name"), SIGNATURES)
def test_constructors_take_the_parameters_of_the_reference(module, name):
    del module
    here = inspect.signature(getattr(ours(), name).__init__).parameters
    there = inspect.signature(getattr(reference(), name).__init__).parameters
    assert {one: p.kind for one, p in here.items() if one in there and one != "kwargs"} == {
        one: p.kind for one, p in there.items() if one != "kwargs"
    }


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(outcomes(reference(), pathlib.Path(folder)))
    pathlib.Path(sys.argv[1]).write_text(text)
    sys.stdout.flush()
    os._exit(0)  # its threads are of no interest
