"""A program: saves with milepost, restores with Orbax, and prints by case what went wrong, "" for nothing.

It runs with as many devices as the environment says. A case is a function that is given an empty folder.
"""

from __future__ import annotations

import contextvars
import itertools
import json
import logging
import math
import pathlib
import sys
import tempfile
import traceback

import jax
import jax.numpy as jnp
import milepost
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import states
from milepost.engine.items import TreeItem
from milepost.engine.saving import Save, SaveRequest
from milepost.testing.hosts import ThreadCluster
from orbax.checkpoint import v1

FORMATS = {
    f"{'ocdbt' if ocdbt else 'plain'} zarr{zarr}": {"ocdbt": ocdbt, "zarr_format": zarr}
    for ocdbt, zarr in itertools.product((True, False), (2, 3))
}
CASES = {}


def case(function):
    """Take note of a case, which is tried in every format."""
    CASES[function.__name__.replace("_", " ")] = function
    return function


def same(expected, found):
    """Compare the results of two calls."""
    states.assert_same(expected, found)


def described(folder):
    """Return the small files of an item, without what depends on how arrays are cut."""
    tree = json.loads((folder / "_METADATA").read_text())["tree_metadata"]
    for entry in tree.values():
        entry["value_metadata"].pop("write_shape", None)
    # Older releases of JAX have another name for the same device, which Orbax takes for equal.
    written = json.loads((folder / "_sharding").read_text().replace("TFRT_CPU_", "cpu:"))
    shardings = {name: json.loads(text) for name, text in written.items()}
    listed = json.loads((folder / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    extended = {one["array_metadata"]["param_name"]: one["array_metadata"]["ext_metadata"] for one in listed}
    strings = folder / "_strings.json"
    return tree, shardings, extended, json.loads(strings.read_text()) if strings.exists() else {}


def same_files(expected, found):
    """Compare the small files of two items."""
    for one, other in zip(expected, found, strict=True):
        assert set(one) == set(other), sorted(set(one) ^ set(other))
        for name, value in one.items():
            assert value == other[name], f"{name}: {value} {other[name]}"


# --- v0 --------------------------------------------------------------------------------------------------------------


@case
def v0_standard(root):
    state = states.standard()
    with milepost.StandardCheckpointer() as ours:
        ours.save(root / "1", state, custom_metadata={"note": [1, "é"]})
    with ocp.StandardCheckpointer() as theirs:
        same(states.plain(state), theirs.restore(root / "1"))
        same(state, theirs.restore(root / "1", states.target(state)))
        found = theirs.metadata(root / "1")
        assert found.custom_metadata == {"note": [1, "é"]}
        assert found.item_handlers.endswith(".StandardCheckpointHandler"), found.item_handlers
        assert 0 < found.init_timestamp_nsecs <= found.commit_timestamp_nsecs
    same(states.plain(state), v1.load(root / "1", checkpointable_name=None))


@case
def v0_pytree(root):
    state = states.tree()
    with milepost.PyTreeCheckpointer() as ours:
        ours.save(root / "1", milepost.args.PyTreeSave(state, custom_metadata={"of": "the tree"}))
    with ocp.PyTreeCheckpointer() as theirs:
        same(states.plain(state), theirs.restore(root / "1"))
        restore_args = ocp.checkpoint_utils.construct_restore_args(state)
        same(state, theirs.restore(root / "1", item=state, restore_args=restore_args))
        assert theirs.metadata(root / "1").item_metadata.custom_metadata == {"of": "the tree"}
        theirs.save(root / "2", state)
    same_files(described(root / "2"), described(root / "1"))


@case
def v0_composite_manager(root):
    state, numbers = states.small(), np.random.RandomState(1).get_state()
    items = {
        "state": milepost.args.StandardSave(state),
        "tree": milepost.args.PyTreeSave({"text": "text", "x": jnp.arange(3)}),
        "json": milepost.args.JsonSave({"position": [1, None, "é"]}),
        "array": milepost.args.ArraySave(states.spread(states.bits("bfloat16", (8, 2), 1), "a")),
        "numpy array": milepost.args.ArraySave(np.arange(5)),
        "key": milepost.args.JaxRandomKeySave(jax.random.key(5)),
        "legacy key": milepost.args.JaxRandomKeySave(jax.random.PRNGKey(6)),
        "numbers": milepost.args.NumpyRandomKeySave(numbers),
    }
    options = milepost.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with milepost.CheckpointManager(root, options=options, metadata={"of": "all"}) as ours:
        ours.save(1, args=milepost.args.Composite(**items), metrics={"loss": 0.5}, custom_metadata={"of": 1})
        ours.save(2, args=milepost.args.Composite(**items), metrics={"loss": 0.25, "odd": math.inf})
    array = items["array"].item
    expected = {
        "state": states.plain(state),
        "tree": {"text": "text", "x": jnp.arange(3)},
        "json": {"position": [1, None, "é"]},
        "array": array,
        "numpy array": np.arange(5),
        "key": jax.random.key(5),
        "legacy key": jax.random.PRNGKey(6),
        "numbers": numbers,
        "metrics": {"loss": 0.5},  # Orbax takes what it keeps of metrics for an item, its own too
    }
    goes_on_composite(root, expected, state)


def goes_on_composite(root, expected, state):
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min", max_to_keep=2)
    with ocp.CheckpointManager(root, options=options) as theirs:
        assert sorted(theirs.all_steps()) == [1, 2]
        assert (theirs.latest_step(), theirs.best_step()) == (2, 2)
        assert {"loss": 0.25, "odd": math.inf} == theirs.metrics(2)
        assert (theirs.metadata(1).custom_metadata, theirs.metadata(1).metrics) == ({"of": 1}, {"loss": 0.5})
        found = dict(theirs.restore(1).items())
        assert set(expected) == set(found), set(expected) ^ set(found)
        for name, value in expected.items():
            states.assert_same(value, found[name], name)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(states.target(state)),
            array=ocp.args.ArrayRestore(),
            json=ocp.args.JsonRestore(),
        )
        found = theirs.restore(2, args=args)
        same(state, found.state)
        same(expected["array"], found.array)
        assert theirs.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), metrics={"loss": 0.1})
        theirs.wait_until_finished()
        assert theirs.best_step() == 3
        assert sorted(theirs.all_steps()) == [2, 3]
    assert sorted(path.name for path in root.iterdir() if path.name.isdecimal()) == ["2", "3"]


@case
def v0_manager_of_single_objects(root):
    state = states.small()
    with milepost.CheckpointManager(root) as ours:
        ours.save(7, args=milepost.args.StandardSave(state))
    with ocp.CheckpointManager(root) as theirs:
        assert theirs.latest_step() == 7
        same(states.plain(state), theirs.restore(7))
        same(state, theirs.restore(7, args=ocp.args.StandardRestore(states.target(state))))
        assert theirs.item_metadata(7).tree["scalar"].dtype == np.float64
        assert theirs.save(8, args=ocp.args.StandardSave(state))
        theirs.wait_until_finished()
        assert sorted(theirs.all_steps()) == [7, 8]


@case
def v0_single_objects_of_other_kinds(root):
    array, key = states.spread(states.bits("int16", (8, 2), 1), "a"), jax.random.key(3)
    numbers = np.random.RandomState(2).get_state()
    for name, value, saved in (
        ("Array", array, milepost.args.ArraySave(array)),
        ("JaxRandomKey", key, milepost.args.JaxRandomKeySave(key)),
        ("NumpyRandomKey", numbers, milepost.args.NumpyRandomKeySave(numbers)),
        ("Json", {"a": [1, "é"]}, milepost.args.JsonSave({"a": [1, "é"]})),
    ):
        handler, restore = f"{name}CheckpointHandler", f"{name}Restore"
        with milepost.Checkpointer(getattr(milepost, handler)()) as ours:
            ours.save(root / name, saved)
        with ocp.Checkpointer(getattr(ocp, handler)()) as theirs:
            same(value, theirs.restore(root / name, getattr(ocp.args, restore)()))


@case
def values_that_orbax_has_no_words_for(root):
    state = {
        "uint64": (1 << 64) - 1,
        "huge": -(10**40),
        "complex": complex(-0.0, float("inf")),
        "np.float32": np.float32(0.1),
        "np.bool": np.bool_(True),
        "bfloat16": states.bits("bfloat16", (), 1)[()],
        "uint4": np.array(11).astype(ml_dtypes.uint4)[()],
        "bytes": b"\0bytes",
        "no bytes": b"",
        "many bytes": bytes(range(256)) * 8,
        "no length": np.zeros((0, 3), np.int16),
    }
    with milepost.PyTreeCheckpointer() as ours:
        ours.save(root / "1", state)
    expected = {
        **state,
        "huge": hex(-(10**40)),
        "complex": np.array(state["complex"]),
        "np.float32": np.array(state["np.float32"]),
        "np.bool": np.array(True),
        "bfloat16": np.array(state["bfloat16"]),
        "uint4": np.array(int(state["uint4"]), np.uint8),
        "bytes": np.frombuffer(b"\0bytes", np.uint8),
        "no bytes": np.zeros(0, np.uint8),
        "many bytes": np.frombuffer(state["many bytes"], np.uint8),
    }
    same(states.plain(expected), ocp.PyTreeCheckpointer().restore(root / "1"))
    same(state, milepost.PyTreeCheckpointer().restore(root / "1"))


@case
def names_that_orbax_would_mix_up(root):
    for state in (
        {"a.b": 1, "a": {"b": 2}},
        {"a.b": "text", "a": {"b": "other"}},
        {"a.b": 1, "a": {"b": np.arange(3)}},
    ):
        try:
            milepost.v1.save(root / "1", state)
        except milepost.errors.UnsupportedLeafError as error:
            assert "a.b" in str(error)  # noqa: PT017 - no pytest here
        else:
            raise AssertionError(f"{state} was saved")
        assert not list(root.iterdir())


@case
def saved_by_four_hosts(root):
    state = states.standard()

    def save(host):
        saving = Save(SaveRequest(root / "1", {"state": TreeItem(state)}), hosts=host)
        saving.prepare(lasting=False)()
        saving.finish()

    layers = contextvars.copy_context()
    done = ThreadCluster(4).run(lambda host: layers.copy().run(save, host))
    assert done == [None] * 4, done
    same(states.plain(state), v1.load(root / "1"))


# --- v1 --------------------------------------------------------------------------------------------------------------


@case
def v1_state(root):
    state = states.tree()
    milepost.v1.save(root / "1", state, custom_metadata={"note": 1})
    assert v1.is_orbax_checkpoint(root / "1")
    same(states.plain(state), v1.load(root / "1"))
    same(state, v1.load(root / "1", states.target(state)))
    found = v1.metadata(root / "1")
    assert found.custom_metadata == {"note": 1}
    v1.save(root / "2", state)
    same_files(described(root / "2" / "state"), described(root / "1" / "state"))


@case
def v1_checkpointables(root):
    state = {**states.small(), "text": "é"}
    objects = {"state": state, "other": {"x": np.arange(3), "text": "é"}, "lone": jnp.arange(4.0), "number": 3}
    milepost.v1.save_checkpointables(root / "1", objects, custom_metadata={"note": 2})
    expected = {name: states.plain(value) for name, value in objects.items()}
    same(expected, v1.load_checkpointables(root / "1"))
    found = v1.load_checkpointables(root / "1", {"state": states.target(state), "other": None})
    same({"state": state, "other": expected["other"]}, found)
    assert v1.checkpointables_metadata(root / "1").custom_metadata == {"note": 2}


@case
def v1_training_checkpointer(root):
    state = {**states.small(), "text": "é"}
    with milepost.v1.training.Checkpointer(root, custom_metadata={"of": "all"}) as ours:
        ours.save(1, state, metrics={"loss": 0.5}, custom_metadata={"of": 1})
        ours.save_checkpointables(2, {"state": state, "other": {"x": 1}}, metrics={"loss": 0.25})
    with v1.training.Checkpointer(root) as theirs:
        assert [one.step for one in theirs.checkpoints] == [1, 2]
        same(states.plain(state), theirs.load(1))
        same(state, theirs.load(2, states.target(state)))
        same({"x": 1}, theirs.load_checkpointables(2)["other"])
        assert (theirs.metadata(1).custom_metadata, theirs.metadata(1).metrics) == ({"of": 1}, {"loss": 0.5})
        assert theirs.save(3, state)
        assert theirs.latest.step == 3


# --- running ---------------------------------------------------------------------------------------------------------


def tried(function, arrays_options):
    """Return what goes wrong in a case, as text."""
    settings = {"default": {"arrays": "tensorstore", "arrays_options": arrays_options}}
    try:
        with tempfile.TemporaryDirectory() as folder, milepost.configured(settings):
            function(pathlib.Path(folder))
    except Exception:  # noqa: BLE001 - whatever it is, the test shows it
        return traceback.format_exc()
    return ""


def main():
    logging.disable(logging.CRITICAL)
    formats = {words: FORMATS[words] for words in sys.argv[1:]} or FORMATS
    for name, function in CASES.items():
        for words, options in formats.items():
            print(json.dumps([name, words, tried(function, options)]), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
