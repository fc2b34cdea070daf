"""A program: milepost and Orbax save and load on one bucket; prints by case what went wrong, "" for nothing.

The environment says where the bucket is. A case is a function that is given a URL below which nothing is; it is tried
with arrays in several formats, written by TensorStore's own driver and through milepost's storage.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import logging
import os
import traceback

import jax.numpy as jnp
import milepost
import numpy as np
import orbax.checkpoint as ocp
import states
from milepost.attempts import new_attempt
from milepost.engine.items import TreeItem
from milepost.engine.saving import Save, SaveRequest
from milepost.fixed import FixedCommit
from milepost.testing.hosts import ThreadCluster
from milepost_gcs import GcsStorage
from orbax.checkpoint import v1

ENDPOINT = "TENSORSTORE_GCS_HTTP_URL"
FORMATS = {"ocdbt zarr2": {"ocdbt": True, "zarr_format": 2}, "plain zarr3": {"ocdbt": False, "zarr_format": 3}}
WAYS = (("driver", "ocdbt zarr2"), ("driver", "plain zarr3"), ("storage", "ocdbt zarr2"))
CASES = {}


def case(function):
    """Take note of a case, which is tried in every way."""
    CASES[function.__name__.replace("_", " ")] = function
    return function


def state():
    """Return a tree with an array that no database holds within its nodes."""
    return {"large": np.arange(70_000.0), "n": {"b": jnp.full((2, 3), 3)}, "text": "é", "step": 7}


def numbers():
    """Return a tree that every handler of trees takes."""
    return {"w": jnp.arange(70_000.0), "step": 7}


def config():
    """Return what an item of JSON holds."""
    return {"x": [1, None, "é"]}


@contextlib.contextmanager
def ours(how, words):
    """Have milepost write at fixed keys, by TensorStore's driver only if it is told where the bucket is."""
    endpoint = os.environ[ENDPOINT]
    if how == "storage":
        del os.environ[ENDPOINT]
    chosen = {"commit": "fixed", "arrays": "tensorstore", "arrays_options": FORMATS[words]}
    try:
        with milepost.configured({"default": chosen}):
            yield
    finally:
        os.environ[ENDPOINT] = endpoint


@case
def one_tree_of_ours(url, way):
    with ours(*way):
        milepost.PyTreeCheckpointer().save(f"{url}/1", state())
    with ocp.PyTreeCheckpointer() as theirs:
        states.assert_same(states.plain(state()), theirs.restore(f"{url}/1"))
    states.assert_same(states.plain(state()), v1.load(f"{url}/1", checkpointable_name=None))


@case
def one_tree_of_ours_with_a_target(url, way):
    tree = {"w": jnp.arange(6.0), "step": 7}
    with ours(*way), milepost.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{url}/1", tree, custom_metadata={"of": "tree"})
    with ocp.StandardCheckpointer() as theirs:
        states.assert_same(tree, theirs.restore(f"{url}/1", states.target(tree)))
        assert theirs.metadata(f"{url}/1").custom_metadata == {"of": "tree"}


@case
def ours_of_the_younger_interface(url, way):
    with ours(*way):
        milepost.save(f"{url}/1", state(), custom_metadata={"of": "tree"})
    states.assert_same(states.plain(state()), v1.load(f"{url}/1"))
    assert v1.metadata(f"{url}/1").custom_metadata == {"of": "tree"}


@case
def ours_by_several_hosts(url, way):
    def save(host):
        saving = Save(SaveRequest(f"{url}/1", {"state": TreeItem(state())}), hosts=host)
        saving.prepare(lasting=False)()
        saving.finish()

    with ours(*way):
        layers = contextvars.copy_context()
        done = ThreadCluster(3).run(lambda host: layers.copy().run(save, host))
    assert done == [None] * 3, done
    states.assert_same(states.plain(state()), v1.load(f"{url}/1"))


@case
def a_manager_on_a_root_of_ours(url, way):
    args = milepost.args
    with ours(*way), milepost.CheckpointManager(url) as manager:
        for step in (6, 7):
            items = {"state": args.StandardSave(state()), "config": args.JsonSave(config())}
            manager.save(step, args=args.Composite(**items))
    # A save under way, and one that was given up, are no steps.
    for step in ("8", "9"):
        FixedCommit().stage(GcsStorage(url), step, new_attempt())
    GcsStorage(url).write("9/state/_METADATA", [b"{}"])
    with ocp.CheckpointManager(url) as theirs:
        assert (theirs.latest_step(), sorted(theirs.all_steps())) == (7, [6, 7]), theirs.all_steps()
        found = theirs.restore(7)
        assert set(found.keys()) == {"state", "config"}, set(found.keys())
        states.assert_same(states.plain(state()), found["state"])
        assert found["config"] == config()
    with ocp.PyTreeCheckpointer() as theirs:
        states.assert_same(states.plain(state()), theirs.restore(f"{url}/7/state"))


@case
def a_manager_goes_on_where_ours_stopped(url, way):
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ours(*way), milepost.CheckpointManager(url) as manager:
        manager.save(7, args=milepost.args.StandardSave(numbers()))
    with ocp.CheckpointManager(url, options=options) as theirs:
        states.assert_same(states.plain(numbers()), theirs.restore(7))
        assert theirs.save(8, args=ocp.args.StandardSave(numbers()))
        theirs.wait_until_finished()
        assert theirs.all_steps() == [8], theirs.all_steps()
    assert [*GcsStorage(url).children("7/")] == []
    with ours(*way), milepost.CheckpointManager(url) as manager:
        assert manager.all_steps() == [8], manager.all_steps()
        states.assert_same(states.plain(numbers()), manager.restore(8))
        manager.save(9, args=milepost.args.StandardSave(numbers()))
        manager.delete(8)
    assert {*GcsStorage(url).children("")} == {"9/"}


@case
def what_orbax_saved(url, way):
    use_ocdbt, use_zarr3 = FORMATS[way[1]]["ocdbt"], FORMATS[way[1]]["zarr_format"] == 3
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with ocp.Checkpointer(handler) as theirs:
        theirs.save(f"{url}/tree", ocp.args.PyTreeSave(state()))
    v1.save(f"{url}/younger", state())
    with ocp.CheckpointManager(f"{url}/run", item_names=("state", "config")) as theirs:
        items = {"state": ocp.args.PyTreeSave(state()), "config": ocp.args.JsonSave(config())}
        assert theirs.save(3, args=ocp.args.Composite(**items))
    with ours(*way):
        for name in ("tree", "younger"):
            states.assert_same(states.plain(state()), milepost.load(f"{url}/{name}"))
        with milepost.CheckpointManager(f"{url}/run") as manager:
            assert manager.latest_step() == 3
            found = manager.restore(3)
            states.assert_same(states.plain(state()), found["state"])
            assert found["config"] == config()


def main():
    """Try every case in every way."""
    logging.disable(logging.WARNING)
    for number, ((how, words), (name, try_it)) in enumerate(itertools.product(WAYS, CASES.items())):
        try:
            try_it(f"gs://bucket/{number}", (how, words))
            wrong = ""
        except Exception:  # noqa: BLE001 - told to the test, which is in another process
            wrong = traceback.format_exc()[-4000:]
        print(json.dumps([name, how, words, wrong]), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
