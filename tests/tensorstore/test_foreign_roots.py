"""Checkpoints of others below a root: told apart at little cost, listed, let go and deleted, or left alone.

The steps are made by the real Orbax; many of them by copying one.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import shutil
import tarfile
import uuid

import milepost
import numpy as np
import orbax.checkpoint as ocp
import pytest
from milepost import cli, errors, v1
from milepost.plugins import Plugins
from milepost.routes import open_route, resolve
from milepost.testing.faults import CuttingStorage, PowerCut, WrappedStorage, keys
from milepost_tensorstore.orbax.recognising import OrbaxLayout
from orbax.checkpoint import v1 as theirs_v1
from safetensors.numpy import save_file
from typer.testing import CliRunner

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "orbax"
MANY = 200
STATE = {"w": np.arange(12, dtype=np.float32), "b": [np.float64(2.5), np.arange(3)]}
WIDE = {f"leaf{number}": np.full(2, number) for number in range(60)}


def same(found, expected=STATE):
    assert sorted(expected) == sorted(found)
    np.testing.assert_array_equal(expected["w"], np.asarray(found["w"]))


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Return a folder with one step of Orbax of each kind, named after it."""
    root = tmp_path_factory.mktemp("steps")
    for name, state, use_ocdbt in (("v0", STATE, True), ("plain", STATE, False), ("wide", WIDE, False)):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
        with ocp.CheckpointManager(root / "all" / name, item_handlers=handler) as theirs:
            theirs.save(7, args=ocp.args.PyTreeSave(state), metrics={"loss": 0.5})
        shutil.copytree(root / "all" / name / "7", root / name)
    theirs_v1.save(root / "v1", STATE)
    for marker in root.rglob("commit_success.txt"):
        marker.unlink()  # as releases before 0.12 leave them
    return root


@pytest.fixture
def elsewhere():
    """Return what puts a folder somewhere in memory, and says where."""

    def put(folder, name, root=None):
        root = root or f"memory://{uuid.uuid4().hex}"
        storage = open_route(resolve(f"{root}/_")).storage
        for file in folder.rglob("*"):
            if file.is_file():
                storage.write(f"{name}/{file.relative_to(folder).as_posix()}", [file.read_bytes()])
        return root

    return put


class Counting(WrappedStorage):
    """A storage that counts what it is asked."""

    def __init__(self, storage, asked):
        super().__init__(storage)
        self._asked = asked

    def ask(self, act):
        self._asked.append(act)
        return act()


@pytest.fixture
def asked(monkeypatch):
    """Return a list that grows by one with each request to any storage."""
    asked = []
    opening = Plugins.open_storage
    monkeypatch.setattr(
        Plugins,
        "open_storage",
        lambda self, factory, url, options: Counting(opening(self, factory, url, options), asked),
    )
    return asked


# --- told apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v0", "plain", "wide", "v1"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
def test_many_steps_are_found_by_a_few_requests_each(steps, elsewhere, tmp_path, asked, kind, in_memory):
    root = f"memory://{uuid.uuid4().hex}"
    for step in range(MANY):
        if in_memory:
            elsewhere(steps / kind, str(step), root)
        else:
            root = tmp_path
            shutil.copytree(steps / kind, root / str(step))
    for opened in (milepost.CheckpointManager, v1.training.Checkpointer):
        asked.clear()
        with opened(root) as manager:
            found = manager.all_steps() if opened is milepost.CheckpointManager else manager.checkpoints
            assert [getattr(step, "step", step) for step in found] == list(range(MANY))
            assert MANY <= len(asked) <= 5 * MANY
            asked.clear()
            newest = manager.latest_step() if opened is milepost.CheckpointManager else manager.latest.step
            assert (newest, len(asked)) == (MANY - 1, 0)


def unpacked(release, folder):
    with tarfile.open(GOLDEN / f"{release}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("release", ["0.5.3", "0.5.11", "0.9.1", "0.12.8"])
def test_what_is_recognised_is_what_can_be_read(tmp_path, release):
    root, layout = unpacked(release, tmp_path), OrbaxLayout()
    cases = json.loads((GOLDEN / f"{release}.json").read_text())["cases"]
    folders = [root / name for name in cases]
    folders += [step for name in cases for step in (root / name).iterdir() if step.is_dir()]
    seen = set()
    for folder in folders:
        storage = open_route(resolve(folder)).storage
        prefix, names = f"{folder.name}/", list(storage.children(f"{folder.name}/"))
        try:
            readable = layout.read(storage, prefix, names) is not None
        except errors.DamagedError:
            readable = True
        seen.add(readable)
        assert readable == layout.recognises(storage, prefix, names), folder
        assert readable or not layout.owns(storage, prefix, names), folder
    assert seen == {True, False}


def test_a_folder_with_anything_else_is_no_step(steps, tmp_path):
    shutil.copytree(steps / "v0", tmp_path / "1")
    for name, file in (("2", "notes.txt"), ("3", "deep/er/notes.txt"), ("4", "checkpoint")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("words")
    storage, layout = open_route(resolve(tmp_path / "1")).storage, OrbaxLayout()
    assert [layout.recognises(storage, f"{at}/", list(storage.children(f"{at}/"))) for at in "1234"] == [
        True,
        False,
        False,
        False,
    ]


def test_a_step_that_was_begun_in_place_is_none_yet(steps, elsewhere):
    root = elsewhere(steps / "v0", "1")
    storage = open_route(resolve(f"{root}/_")).storage
    begun = json.loads(bytes(storage.read("1/_CHECKPOINT_METADATA"))) | {"commit_timestamp_nsecs": None}
    elsewhere(steps / "v0", "2", root)
    storage.write("2/_CHECKPOINT_METADATA", [json.dumps(begun).encode()])
    with milepost.CheckpointManager(root) as manager:
        assert list(manager.all_steps()) == [1]


# --- deleted ---------------------------------------------------------------------------------------------------------


def cut_at(monkeypatch, at):
    """Cut the power of every storage before change number `at` of any of them."""
    made = []
    opening = Plugins.open_storage

    def opened(self, factory, url, options):
        made.append(CuttingStorage(opening(self, factory, url, options), at))
        return made[-1]

    monkeypatch.setattr(Plugins, "open_storage", opened)
    return made


def is_gone(url):
    """Say whether nothing opens at a URL; what opens there is whole."""
    try:
        found = milepost.load(url)
    except errors.InvalidLayoutError:
        return True
    same(found)
    return False


@pytest.mark.parametrize("kind", ["v0", "plain", "v1"])
@pytest.mark.parametrize("committed", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_deletion_that_is_cut_off_leaves_all_or_nothing(steps, elsewhere, tmp_path, where, kind, committed):
    seen = []
    for at in itertools.count():
        if where == "memory":
            root = elsewhere(steps / kind, "7")
        else:
            root = f"file://{tmp_path}/{at}"
            shutil.copytree(steps / kind, tmp_path / str(at) / "7")
        storage = open_route(resolve(f"{root}/_")).storage
        if committed:
            storage.write("7/commit_success.txt", [b"Checkpoint commit was successful"])
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, at)
            try:
                done = v1.delete(f"{root}/7")
            except PowerCut:
                done = False
        gone = is_gone(f"{root}/7")
        with milepost.CheckpointManager(root, options=milepost.CheckpointManagerOptions(read_only=True)) as manager:
            listed = list(manager.all_steps())
        assert gone or listed == [7]
        seen.append(gone)
        assert v1.delete(f"{root}/7", missing_ok=True) or where == "file" or done
        assert is_gone(f"{root}/7")
        assert [key for key in keys(storage) if key.startswith("7/")] == []
        if done:
            break
    # Once it is gone, it stays gone; before the first change it is there.
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (False, True)
    assert len(seen) > 2


def test_a_manager_completes_deletions_that_were_cut_off(steps, elsewhere):
    root = elsewhere(steps / "v0", "7")
    elsewhere(steps / "v0", "8", root)
    storage = open_route(resolve(f"{root}/_")).storage
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 4)
        with pytest.raises(PowerCut):
            v1.delete(f"{root}/7")
    assert any(key.startswith("7/") for key in keys(storage))
    with milepost.CheckpointManager(
        root, options=milepost.CheckpointManagerOptions(cleanup_tmp_directories=True)
    ) as manager:
        assert list(manager.all_steps()) == [8]
        manager.wait_until_finished()
    assert {key.partition("/")[0] for key in keys(storage)} == {"8"}


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
def test_a_manager_lets_go_of_steps_of_orbax(steps, elsewhere, tmp_path, in_memory):
    root = None if in_memory else tmp_path
    for step in (1, 2, 3):
        if in_memory:
            root = elsewhere(steps / "v0", str(step), root)
        else:
            shutil.copytree(steps / "v0", tmp_path / str(step))
    with milepost.CheckpointManager(root, options=milepost.CheckpointManagerOptions(max_to_keep=2)) as manager:
        assert manager.save(4, args=milepost.args.StandardSave(STATE))
        manager.wait_until_finished()
        assert list(manager.all_steps()) == [3, 4]
        manager.delete(3)
        assert list(manager.all_steps()) == [4]
    storage = open_route(resolve(f"{root}/_")).storage
    assert list(storage.children("")) == ["4/"]


def test_a_damaged_step_of_orbax_can_be_deleted(steps, tmp_path):
    shutil.copytree(steps / "v0", tmp_path / "7")
    (tmp_path / "7" / "default" / "_METADATA").write_text("{")
    assert v1.delete(tmp_path / "7")
    assert list(tmp_path.iterdir()) == []


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def only_arrays(folder, steps):
    shutil.copytree(steps / "plain" / "default" / "w", folder / "w")


def model(folder, _steps):
    folder.mkdir(parents=True)
    save_file({"w": np.ones(3)}, folder / "model.safetensors")
    (folder / "thesis.tex").write_text("the only copy")


def one_file(name, text="{}"):
    def make(folder, _steps):
        folder.mkdir(parents=True)
        (folder / name).write_text(text)

    return make


def unlabelled_steps(folder, steps):
    for step in "12":
        shutil.copytree(steps / "v0" / "default", folder / step)


@pytest.mark.parametrize(
    "make",
    [
        only_arrays,
        model,
        one_file("metadata"),
        one_file("data.json"),
        one_file("notes.txt"),
        one_file("checkpoint", "\x00"),
        unlabelled_steps,
    ],
)
def test_what_may_be_more_than_a_checkpoint_is_not_deleted(steps, tmp_path, make):
    path = tmp_path / "runs" / "7"
    make(path, steps)
    before = files_below(tmp_path)
    for act in (v1.delete, lambda path: v1.delete(path, missing_ok=True)):
        with pytest.raises(errors.InvalidLayoutError, match=r"cannot (delete|open)"):
            act(path)
    assert before == files_below(tmp_path)


def test_a_model_that_is_not_deleted_is_called_what_it_is(tmp_path):
    model(tmp_path / "7", None)
    with pytest.raises(errors.InvalidLayoutError, match="it is of the layout 'huggingface'") as caught:
        v1.delete(tmp_path / "7")
    assert "remove the folder yourself" in " ".join(caught.value.__notes__)


def test_a_part_of_a_checkpoint_is_not_deleted(steps, tmp_path):
    shutil.copytree(steps / "v0", tmp_path / "7")
    with milepost.configured({"default": {"arrays": "tensorstore"}}):
        v1.save(tmp_path / "8", STATE)
    before = files_below(tmp_path)
    for part in ("7/default", "8/state"):
        with pytest.raises(errors.InvalidLayoutError, match="within a checkpoint"):
            v1.delete(tmp_path / part)
    with pytest.raises(errors.RequestError):
        v1.delete(tmp_path / "7", checkpointable_name="default")
    assert before == files_below(tmp_path)


def test_an_item_of_a_step_of_orbax_is_not_deleted_alone(tmp_path):
    theirs_v1.save_checkpointables(tmp_path / "7", {"a": STATE, "b": STATE})
    before = files_below(tmp_path)
    with pytest.raises(errors.InvalidLayoutError, match="of the layout 'orbax'"):
        v1.delete(tmp_path / "7", checkpointable_name="a")
    assert before == files_below(tmp_path)


# --- metrics ---------------------------------------------------------------------------------------------------------

LOSSES = {1: 0.5, 2: float("nan"), 3: float("inf"), 4: 0.25, 5: float("-inf"), 6: 0.75}


def by_loss(metrics):
    return metrics["loss"]


def known(metrics):
    return {step: "nan" if math.isnan(found["loss"]) else found["loss"] for step, found in metrics.items()}


EXPECTED = {step: "nan" if math.isnan(loss) else loss for step, loss in LOSSES.items()}


def test_metrics_that_json_has_no_numbers_for_are_read(tmp_path):
    options = {"best_fn": by_loss, "best_mode": "max"}
    with ocp.CheckpointManager(tmp_path / "v0", options=ocp.CheckpointManagerOptions(**options)) as theirs:
        for step, loss in LOSSES.items():
            theirs.save(step, args=ocp.args.StandardSave({"w": np.ones(2)}), metrics={"loss": loss})
    with milepost.CheckpointManager(tmp_path / "v0", options=milepost.CheckpointManagerOptions(**options)) as ours:
        assert known({step: ours.metrics(step) for step in ours.all_steps()}) == EXPECTED
        assert known({step: ours.metadata(step).metrics for step in ours.all_steps()}) == EXPECTED
        assert ours.best_step() == 3
    with theirs_v1.training.Checkpointer(tmp_path / "v1") as theirs:
        for step, loss in LOSSES.items():
            theirs.save(step, {"w": np.ones(2)}, metrics={"loss": loss})
    with v1.training.Checkpointer(tmp_path / "v1") as ours:
        assert known({one.step: one.metrics for one in ours.checkpoints}) == EXPECTED
        assert [one.step for one in ours.checkpoints] == list(LOSSES)


def test_metrics_and_times_are_read_without_a_look_at_the_arrays(tmp_path, asked):
    options = {"best_fn": by_loss, "best_mode": "min"}
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(**options)) as theirs:
        for step in (1, 2, 3):
            theirs.save(step, args=ocp.args.StandardSave(WIDE), metrics={"loss": abs(2.0 - step)})
    asked.clear()
    with milepost.CheckpointManager(
        tmp_path, options=milepost.CheckpointManagerOptions(**options, read_only=True)
    ) as ours:
        assert ours.best_step() == 2
    assert len(asked) <= 3 * 10


# --- single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_single_file_of_safetensors_is_a_checkpoint_and_is_not_deleted(tmp_path, elsewhere, where):
    tensors = {"a/b": np.arange(4.0), "c": np.ones((2, 3), np.float16)}
    save_file(tensors, tmp_path / "weights.safetensors")
    root = str(tmp_path)
    if where == "memory":
        root = f"memory://{uuid.uuid4().hex}"
        body = (tmp_path / "weights.safetensors").read_bytes()
        open_route(resolve(f"{root}/_")).storage.write("weights.safetensors", [body])
    found = milepost.load(f"{root}/weights.safetensors")
    assert sorted(tensors) == sorted(found)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, found[name], strict=True)
    assert v1.metadata(f"{root}/weights.safetensors").metadata["c"].shape == (2, 3)
    with pytest.raises(errors.CheckpointNotFoundError, match="it is a file"):
        v1.delete(f"{root}/weights.safetensors")
    assert sorted(milepost.load(f"{root}/weights.safetensors")) == sorted(tensors)


def test_a_file_of_anything_else_is_none(tmp_path, steps):
    (tmp_path / "notes.txt").write_text("words")
    for path in (tmp_path / "notes.txt", steps / "v0" / "_CHECKPOINT_METADATA", steps / "v0" / "default" / "_METADATA"):
        with pytest.raises(errors.CheckpointNotFoundError, match="it is a file"):
            milepost.load(path)
    (tmp_path / "cut.safetensors").write_text("x")
    with pytest.raises(errors.DamagedError, match="its header would have"):
        milepost.load(tmp_path / "cut.safetensors")


# --- looked at -------------------------------------------------------------------------------------------------------


def command(*arguments):
    done = CliRunner().invoke(cli.app(), list(map(str, arguments)))
    return done.exit_code, done.stdout


def test_the_command_line_tells_how_large_a_checkpoint_of_others_is(steps, tmp_path):
    shutil.copytree(steps / "v0", tmp_path / "1")
    model(tmp_path / "2", None)
    milepost.save(tmp_path / "3", STATE)
    sizes = {"1": sum(leaf.nbytes for leaf in (STATE["w"], *STATE["b"])), "2": np.ones(3).nbytes}
    code, out = command("ls", tmp_path, "--json")
    found = {one["name"]: one for one in json.loads(out)["checkpoints"]}
    assert code == 0
    assert {name: one["layout"] for name, one in found.items()} == {"1": "orbax", "2": "huggingface", "3": "milepost"}
    assert {name: found[name]["bytes"] for name in sizes} == sizes
    for name, layout in (("1", "orbax"), ("2", "huggingface")):
        code, out = command("show", tmp_path / name)
        assert code == 0
        assert f"laid out by '{layout}'" in out
        assert f"{sizes[name]} B" in out
        assert command("verify", tmp_path / name)[0] == 0
