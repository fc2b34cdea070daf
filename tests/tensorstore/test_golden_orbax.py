"""Checkpoints of Orbax's releases since 0.5, and of JAX itself, made by them and kept, are read for ever.

What is expected comes from the state that was saved, never from a reader. tests/golden/orbax/make.py makes them.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tarfile

import jax
import milepost as ocp
import numpy as np
import pytest
from golden.orbax import state
from milepost import v1
from milepost.errors import MissingDataError

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "orbax"
RELEASES = ("0.5.3", "0.5.11", "0.6.4", "0.9.1", "0.10.3", "0.11.2", "0.11.13", "0.11.26", "0.12.8")
DOCUMENTS = {release: json.loads((GOLDEN / f"{release}.json").read_text()) for release in RELEASES}
ARGS = {
    "params": ocp.args.StandardRestore,
    "other": ocp.args.PyTreeRestore,
    "notes": ocp.args.JsonRestore,
    "array": ocp.args.ArrayRestore,
    "jax_key": ocp.args.JaxRandomKeyRestore,
    "typed_key": ocp.args.JaxRandomKeyRestore,
    "numpy_key": ocp.args.NumpyRandomKeyRestore,
    "tree": ocp.args.PyTreeRestore,
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Return the folder of a release, unpacked once."""
    known = {}

    def unpack(release):
        if release not in known:
            known[release] = tmp_path_factory.mktemp("golden")
            with tarfile.open(GOLDEN / f"{release}.tar.xz") as tar:
                tar.extractall(known[release], filter="data")
        return known[release]

    return unpack


def cases(*, manager=None, trees=None):
    return [
        pytest.param(release, name, id=f"{release}-{name}")
        for release, document in DOCUMENTS.items()
        for name, case in document["cases"].items()
        if case.get("manager") == manager and (trees is None or case["tree"] in trees)
    ]


def expected(release, name, tree=None):
    """Return what a case holds, as Orbax gives it back when it is told nothing."""
    document = DOCUMENTS[release]
    case = document["cases"][name]
    place = state.devices(spread=case["spread"]) if is_typed(release, name) else state.host()
    return state.flattened(state.TREES[tree or case["tree"]](place, document["dtypes"]))


def is_typed(release, name):
    """Say whether a case tells whose its arrays are, JAX's or NumPy's, and what numbers were no arrays."""
    case = DOCUMENTS[release]["cases"][name]
    return not case.get("aggregate") and not case.get("untyped")


def difference(release, name, found, tree=None):
    return state.difference(
        expected(release, name, tree), state.flattened(found), f"{release} {name} ", typed=is_typed(release, name)
    )


# --- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_every_case_of_a_release_is_kept_with_what_made_it(unpacked, release):
    document = DOCUMENTS[release]
    assert sorted(document["cases"]) == sorted(path.name for path in unpacked(release).iterdir())
    assert document["versions"]["orbax-checkpoint"] == release


def test_no_release_is_kept_and_not_read():
    assert sorted(RELEASES) == sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.glob("*.tar.xz"))


def test_a_bit_or_a_type_that_differs_is_noticed():
    held = {"a": [np.float32(1), {}], "b": np.zeros(2)}
    assert state.difference(held, {"a": [np.float32(1), {}], "b": np.zeros(2)}) == ""
    for other in (
        {"a": [np.float32(1), {}], "b": np.array([0.0, -0.0])},
        {"a": [1.0, {}], "b": np.zeros(2)},
        {"a": [np.float32(1), []], "b": np.zeros(2)},
        {"a": [np.float32(1), {}, 1], "b": np.zeros(2)},
        {"a": [np.float32(1), {}]},
        {"a": [np.float32(1), {}], "b": np.zeros(2, np.float32)},
        {"a": [np.float32(1), {}], "b": jax.numpy.zeros(2)},
    ):
        assert state.difference(held, other) != ""


# --- trees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "name"), cases())
def test_what_an_old_release_saved_is_loaded_as_it_was(unpacked, release, name):
    case, path = DOCUMENTS[release]["cases"][name], unpacked(release) / name
    if case["tree"] is None:
        found = v1.load_checkpointables(path)
        assert list(case["items"]) == list(found)
        assert [difference(release, name, found[item], tree) for item, tree in case["items"].items()] == ["", ""]
    else:
        assert difference(release, name, ocp.load(path)) == ""


@pytest.mark.parametrize(("release", "name"), cases(trees=("standard", "small", "texts", "keys")))
def test_the_checkpointer_of_trees_restores_what_an_old_release_saved(unpacked, release, name):
    path = unpacked(release) / name
    with ocp.PyTreeCheckpointer() as checkpointer:
        if (path / "state").exists():
            path /= "state"
        assert difference(release, name, checkpointer.restore(path)) == ""


@pytest.mark.parametrize(("release", "name"), cases(trees=("standard", "small")))
def test_the_standard_checkpointer_restores_what_an_old_release_saved_into_a_target(unpacked, release, name):
    document, path = DOCUMENTS[release], unpacked(release) / name
    case = document["cases"][name]
    target = state.TREES[case["tree"]](state.devices(spread=case["spread"]), document["dtypes"])
    if (path / "state").exists():
        path /= "state"
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(path, target)
    assert jax.tree.structure(target) == jax.tree.structure(found)
    assert state.difference(state.flattened(target), state.flattened(found)) == ""


@pytest.mark.parametrize(("release", "name"), cases(trees=("standard",)))
def test_arrays_of_an_old_release_are_loaded_onto_other_devices(unpacked, release, name):
    wanted = expected(release, name)["params"]["w"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("other",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "other"))
    target = jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding)
    with v1.Context(
        pytree_options=v1.options.PyTreeOptions(loading=v1.options.PyTreeOptions.Loading(partial_load=True))
    ):
        found = v1.load(unpacked(release) / name, {"params": {"w": target}})["params"]["w"]
    assert sharding == found.sharding
    assert np.asarray(wanted).tobytes() == np.asarray(found).tobytes()


@pytest.mark.parametrize("release", RELEASES)
def test_a_save_that_an_old_release_did_not_finish_is_refused(unpacked, tmp_path, release):
    for suffix in ("", "-0", "-1795387333970405626"):
        path = tmp_path / f"ocdbt.orbax-checkpoint-tmp{suffix}"
        shutil.copytree(unpacked(release) / "ocdbt", path)
        with pytest.raises(v1.errors.InvalidLayoutError, match="not finished"):
            ocp.load(path)
        with ocp.PyTreeCheckpointer() as checkpointer, pytest.raises(ValueError, match=r"not finished|incomplete"):
            checkpointer.restore(path)


@pytest.mark.parametrize(("release", "zeros_are_stored"), [("0.5.11", False), ("0.9.1", False), ("0.12.8", True)])
def test_chunks_that_are_not_there_are_zeros_only_where_zeros_were_left_out(
    unpacked, tmp_path, release, zeros_are_stored
):
    path = tmp_path / "zeros"
    shutil.copytree(unpacked(release) / "zarr3_plain", path)
    chunks = [file for file in (path / "zeros").rglob("*") if file.is_file() and file.name != "zarr.json"]
    assert zeros_are_stored == bool(chunks)
    for chunk in chunks:
        chunk.unlink()
    if zeros_are_stored:
        with pytest.raises(MissingDataError, match="zeros"):
            ocp.load(path)
    else:
        assert difference(release, "zarr3_plain", ocp.load(path)) == ""


# --- managers --------------------------------------------------------------------------------------------------------


def better(metrics):
    return -metrics["loss"]


@pytest.mark.parametrize(("release", "name"), cases(manager="default"))
def test_a_manager_goes_on_where_that_of_an_old_release_ended(unpacked, tmp_path, release, name):
    shutil.copytree(unpacked(release) / name, tmp_path / name)
    options = ocp.CheckpointManagerOptions(best_fn=better, max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / name, options=options) as manager:
        assert list(manager.all_steps()) == [1, 2]
        assert (manager.latest_step(), manager.best_step()) == (2, 2)
        assert {step: manager.metrics(step) for step in (1, 2)} == state.METRICS
        assert manager.metadata().custom_metadata == state.CUSTOM
        assert difference(release, name, manager.restore(1)) == ""
        assert difference(release, name, manager.restore(2, args=ocp.args.StandardRestore())) == ""
        tree = expected(release, name)
        assert manager.save(3, args=ocp.args.StandardSave(tree), metrics={"loss": 0.5})
        manager.wait_until_finished()
        assert (list(manager.all_steps()), manager.best_step()) == ([2, 3], 2)
        assert difference(release, name, manager.restore(3)) == ""


@pytest.mark.parametrize("with_args", [True, False], ids=["args", "no-args"])
@pytest.mark.parametrize(("release", "name"), cases(manager="items"))
def test_a_manager_restores_every_kind_of_item_of_an_old_release(unpacked, release, name, with_args):
    case = DOCUMENTS[release]["cases"][name]
    names = {key: case[key] for key in ("step_prefix", "step_format_fixed_length") if key in case}
    options = ocp.CheckpointManagerOptions(read_only=True, **names)
    args = ocp.args.Composite(**{item: ARGS[item]() for item in case["items"]}) if with_args else None
    with ocp.CheckpointManager(unpacked(release) / name, options=options) as manager:
        assert case["steps"] == list(manager.all_steps())
        found = manager.restore(case["steps"][0], args=args)
    assert set(case["items"]) == set(found)
    wrong = {item: difference(release, name, found[item], tree) for item, tree in case["items"].items()}
    assert dict.fromkeys(case["items"], "") == wrong


@pytest.mark.parametrize(("release", "name"), cases(manager="v1"))
def test_the_younger_manager_reads_what_that_of_an_old_release_saved(unpacked, release, name):
    item = {"0.11.26": "pytree"}.get(release, "state")
    with v1.training.Checkpointer(unpacked(release) / name) as checkpointer:
        assert {one.step: one.metrics for one in checkpointer.checkpoints} == state.METRICS
        assert checkpointer.root_metadata().custom_metadata == state.CUSTOM
        for step in (1, None):
            assert difference(release, name, checkpointer.load(step, checkpointable_name=item)) == ""
