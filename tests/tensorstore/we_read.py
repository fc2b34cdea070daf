"""A program: saves with Orbax, loads with milepost, and prints by case what went wrong, "" for nothing.

It runs with as many devices as the environment says. A case is a function that is given an empty folder and a format.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import pathlib
import shutil
import sys
import tempfile
import traceback

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import orbax.checkpoint as ocp
import states
from milepost.v1 import training
from orbax.checkpoint import v1
from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions


@dataclasses.dataclass(frozen=True)
class Format:
    """How Orbax writes arrays."""

    use_ocdbt: bool
    use_zarr3: bool

    def pytree(self, **options):
        """Return a handler for trees."""
        return ocp.PyTreeCheckpointHandler(**vars(self), **options)

    def standard(self):
        """Return a handler for standard trees, which offers no choice of Zarr's version."""
        handler = ocp.StandardCheckpointHandler(use_ocdbt=self.use_ocdbt)
        handler._impl = self.pytree()
        return handler

    def context(self):
        """Return a context of the younger interface."""
        saving = v1.options.ArrayOptions.Saving(**vars(self))
        return v1.Context(array_options=v1.options.ArrayOptions(saving=saving))


FORMATS = {
    f"{'ocdbt' if ocdbt else 'plain'} zarr{3 if zarr3 else 2}": Format(ocdbt, zarr3)
    for ocdbt, zarr3 in itertools.product((True, False), (False, True))
}
CASES = {}

MEMORY = pathlib.Path("/dev/shm")  # noqa: S108 - the temporary folders in it have names of their own
"""Where files are in memory: thousands of small ones are written, and nothing here is about disks."""


def case(function):
    """Take note of a case, which is tried in every format."""
    CASES[function.__name__.replace("_", " ")] = function
    return function


def once(function):
    """Take note of a case that is tried in one format."""
    function.once = True
    return case(function)


same = states.assert_same


def like(state):
    """Return arguments that restore a state into a target of its own classes."""
    return milepost.args.StandardRestore(states.target(state))


def by_name(node):
    """Return a tree as the names of its arrays tell it: dicts only, and nothing that has no array."""
    children = dict(enumerate(node)) if isinstance(node, list) else node
    if not isinstance(children, dict):
        return np.asarray(node) if isinstance(node, bool | int | float) else node
    found = {str(key): by_name(value) for key, value in children.items() if value is not None}
    return {key: value for key, value in found.items() if not isinstance(value, dict | tuple) or value}


# --- v0 --------------------------------------------------------------------------------------------------------------


@case
def v0_standard(root, form):
    state = states.standard()
    path = root / "1"
    ocp.Checkpointer(form.standard()).save(path, state, custom_metadata={"note": [1, "é"]})
    same(states.plain(state), milepost.load(path))
    same(states.plain(state), milepost.v1.load(path, checkpointable_name=None))
    same(state, milepost.v1.load(path, states.target(state)))
    with milepost.StandardCheckpointer() as ours:
        same(states.plain(state), ours.restore(path))
        same(state, ours.restore(path, states.target(state)))
        found = ours.metadata(path)
    assert found.custom_metadata == {"note": [1, "é"]}
    assert found.item_metadata["arrays"]["rows"].shape == (16, 3)
    assert found.commit_timestamp_nsecs > found.init_timestamp_nsecs > 0
    assert milepost.v1.metadata(path).custom_metadata == {"note": [1, "é"]}


@case
def v0_pytree(root, form):
    state = states.tree() | {"left out": ...}
    path = root / "1"
    args = ocp.args.PyTreeSave(state, custom_metadata={"of": "the item"})
    ocp.Checkpointer(form.pytree()).save(path, args=args)
    same(states.plain(state), milepost.load(path))
    ours = milepost.PyTreeCheckpointer()
    same(states.plain(state), ours.restore(path))
    target = states.target(states.tree()) | {"left out": ...}
    restore_args = milepost.checkpoint_utils.construct_restore_args(target)
    same(state, ours.restore(path, item=target, restore_args=restore_args))
    part = {"texts": states.texts()}
    same(part, ours.restore(path, args=milepost.args.PyTreeRestore(part, partial_restore=True)))
    assert ours.metadata(path).item_metadata.custom_metadata == {"of": "the item"}


@case
def v0_rich_types(root, form):
    state = states.containers()
    rich = form.pytree(pytree_metadata_options=PyTreeMetadataOptions(support_rich_types=True))
    ocp.Checkpointer(rich).save(root / "1", state)
    found = milepost.load(root / "1")
    same((state["tuple"], states.Point(*state["point"])), (found["tuple"], found["point"]))
    same(state, milepost.load(root / "1", states.target(state)))


@case
def v0_bare_array(root, form):
    ocp.Checkpointer(form.pytree()).save(root / "1", jnp.arange(3.0))
    same(jnp.arange(3.0), milepost.load(root / "1"))
    same(jnp.arange(3.0), milepost.PyTreeCheckpointer().restore(root / "1"))


def composite(step):
    """Return items of all kinds, and how Orbax saves them."""
    items = {
        "state": {"rows": states.arrays()["rows"], "containers": states.containers(), "step": step},
        "words": {"a": [step, None, {"b": "é"}]},
        "array": jnp.arange(4.0) + step,
        "numpy": np.arange(3) + step,
        "number": 5 + step,
        "key": jax.random.key(step),
        "old_key": jax.random.PRNGKey(step),
        "random": np.random.RandomState(step).get_state(),
        "random_dict": np.random.RandomState(step).get_state(legacy=False),
    }
    kinds = {name: handler.__name__.removesuffix("CheckpointHandler") for name, handler in OTHERS.items()}
    kinds["state"] = "Standard"
    return items, ocp.args.Composite(
        **{name: getattr(ocp.args, f"{kinds[name]}Save")(item) for name, item in items.items()}
    )


OTHERS = {
    "words": ocp.JsonCheckpointHandler,
    "array": ocp.ArrayCheckpointHandler,
    "numpy": ocp.ArrayCheckpointHandler,
    "number": ocp.ArrayCheckpointHandler,
    "key": ocp.JaxRandomKeyCheckpointHandler,
    "old_key": ocp.JaxRandomKeyCheckpointHandler,
    "random": ocp.NumpyRandomKeyCheckpointHandler,
    "random_dict": ocp.NumpyRandomKeyCheckpointHandler,
}


@case
def v0_composite_manager(root, form):
    options = {"best_fn": lambda metrics: metrics["loss"], "best_mode": "min"}
    theirs = ocp.CheckpointManager(
        root,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={"state": form.standard()} | {name: handler() for name, handler in OTHERS.items()},
        metadata={"of": "all"},
    )
    saved = {}
    with theirs:
        for step, loss in ((1, 0.5), (2, 0.25), (10, float("inf"))):
            saved[step], args = composite(step)
            theirs.save(step, args=args, metrics={"loss": loss}, custom_metadata={"of": step})
    with milepost.CheckpointManager(root, options=milepost.CheckpointManagerOptions(**options)) as ours:
        assert (ours.all_steps(), ours.latest_step(), ours.best_step()) == ([1, 2, 10], 10, 2)
        found = ours.restore(2)
        same(states.plain(saved[2]) | {"random": saved[2]["random"]}, dict(found))
        args = milepost.args.Composite(state=like(saved[10]["state"]), words=milepost.args.JsonRestore())
        found = ours.restore(None, args=args)
        same({"state": saved[10]["state"], "words": saved[10]["words"]}, dict(found))
        assert (ours.metrics(1), ours.metrics(10)) == ({"loss": 0.5}, {"loss": float("inf")})
        known = ours.metadata(2)
        assert (known.custom_metadata, known.metrics) == ({"of": 2}, {"loss": 0.25})
        assert ours.item_metadata(2)["state"]["rows"].shape == (16, 3)
        assert ours.metadata().custom_metadata == {"of": "all"}
        assert ours.save(11, args=milepost.args.Composite(state=milepost.args.StandardSave(saved[1]["state"])))
        ours.wait_until_finished()
        assert ours.all_steps() == [1, 2, 10, 11]
        same(saved[1]["state"], ours.restore(11, args=milepost.args.Composite(state=like(saved[1]["state"])))["state"])


@case
def v0_manager_of_single_items(root, form):
    state = states.standard()
    with ocp.CheckpointManager(root, item_handlers=form.standard()) as theirs:
        theirs.save(3, args=ocp.args.StandardSave(state))
    with milepost.CheckpointManager(root) as ours:
        same(states.plain(state), ours.restore(3))
        same(state, ours.restore(3, args=like(state)))
        assert ours.save(4, args=milepost.args.StandardSave(state))
        ours.wait_until_finished()
        same(state, ours.restore(4, args=like(state)))
    with milepost.StandardCheckpointer() as ours:
        same(state, ours.restore(root / "3" / "default", states.target(state)))
    same(states.plain(state), milepost.load(root / "3" / "default"))
    same(states.plain(state), milepost.load(root / "3"))


# --- v1 --------------------------------------------------------------------------------------------------------------


@case
def v1_state(root, form):
    state = states.tree()
    with form.context():
        v1.save(root / "1", state, custom_metadata={"note": 1})
    same(states.plain(state), milepost.load(root / "1"))
    same(state, milepost.v1.load(root / "1", states.target(state)))
    same(states.plain(state), milepost.load(root / "1" / "state"))
    found = milepost.v1.metadata(root / "1")
    assert (found.custom_metadata, found.metadata["arrays"]["rows"].shape) == ({"note": 1}, (16, 3))
    same(states.plain(state), milepost.PyTreeCheckpointer().restore(root / "1"))


@case
def v1_checkpointables(root, form):
    state = states.tree()
    objects = {"state": state, "other": {"x": np.arange(3), "text": "é"}, "lone": jnp.arange(4.0)}
    with form.context():
        v1.save_checkpointables(root / "1", objects)
    expected = {name: states.plain(value) for name, value in objects.items()}
    same(expected, milepost.v1.load_checkpointables(root / "1"))
    found = milepost.v1.load_checkpointables(root / "1", {"state": states.target(state), "other": None})
    same({"state": state, "other": expected["other"]}, found)
    known = milepost.v1.checkpointables_metadata(root / "1").metadata
    assert (sorted(known), known["lone"].shape) == (["lone", "other", "state"], (4,))


@case
def v1_training_checkpointer(root, form):
    state = states.tree()
    with form.context(), v1.training.Checkpointer(root) as theirs:
        theirs.save(1, state, metrics={"loss": 0.5}, custom_metadata={"of": 1})
        theirs.save_checkpointables(2, {"state": state, "other": {"x": 1}})
    with training.Checkpointer(root) as ours:
        assert [one.step for one in ours.checkpoints] == [1, 2]
        same(states.plain(state), ours.load(1))
        same({"x": 1}, ours.load_checkpointables(2)["other"])
        known = ours.metadata(1)
        assert (known.metrics, known.custom_metadata) == ({"loss": 0.5}, {"of": 1})
        assert ours.save(3, state)
        assert ours.latest.step == 3


# --- what may be missing ---------------------------------------------------------------------------------------------


def without(path, *names):
    """Remove files and folders."""
    for name in names:
        for found in path.glob(name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()


@case
def only_what_orbax_needs(root, form):
    state = states.standard()
    ocp.Checkpointer(form.standard()).save(root / "1", state)
    without(root / "1", "_CHECKPOINT_METADATA", "commit_success.txt", "ocdbt.process_*/manifest.ocdbt")
    same(states.plain(state), milepost.load(root / "1"))


@case
def no_metadata_of_the_tree(root, form):
    state = {name: part for name, part in states.standard().items() if name != "keys"}
    del state["containers"]["a/b"], state["containers"]["none"], state["containers"]["empty"]
    ocp.Checkpointer(form.standard()).save(root / "1", state)
    without(root / "1", "_METADATA", "array_metadatas", "_CHECKPOINT_METADATA", "commit_success.txt")
    same(by_name(states.plain(state)), milepost.load(root / "1"))
    same(state, milepost.v1.load(root / "1", states.target(state)))


@once
def no_shardings(root, form):
    ocp.Checkpointer(form.standard()).save(root / "1", states.standard())
    without(root / "1", "_sharding")
    found = milepost.load(root / "1")["arrays"]["rows"]
    assert isinstance(found, jax.Array)
    assert np.array_equal(found, states.arrays()["rows"])


@case
def no_kinds_of_keys(root, form):
    ocp.Checkpointer(form.standard()).save(root / "1", {"keys": states.keys()})
    without(root / "1", "array_metadatas")
    expected = {name: jax.random.key_data(key) for name, key in states.keys().items()}
    found = milepost.load(root / "1")["keys"]
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())


@once
def databases_that_were_not_merged(root, form):
    state = states.standard()
    ocp.Checkpointer(form.standard()).save(root / "1", state)
    without(root / "1", "manifest.ocdbt", "d")
    assert list((root / "1").glob("ocdbt.process_*"))
    same(states.plain(state), milepost.load(root / "1"))


# --- running ---------------------------------------------------------------------------------------------------------


def tried(function, form):
    """Return what goes wrong in a case, as text."""
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            function(pathlib.Path(folder), form)
    except Exception:  # noqa: BLE001 - whatever it is, the test shows it
        return traceback.format_exc()
    return ""


def main():
    logging.disable(logging.CRITICAL)
    wanted = sys.argv[1:] or list(CASES)
    for name in wanted:
        function = CASES[name]
        for words, form in itertools.islice(FORMATS.items(), 1 if hasattr(function, "once") else None):
            print(json.dumps([name, words, tried(function, form)]), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
