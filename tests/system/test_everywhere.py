"""What is promised, on every backend with every array writer."""

from __future__ import annotations

import subprocess
import sys

import jax
import milepost
import numpy as np
import pytest
from milepost import v1
from milepost.commit import CreateCommit
from milepost.engine.copying import Copy, CopyRequest
from milepost.engine.deleting import delete
from milepost.engine.reading import open_checkpoint
from milepost.engine.sweeping import leftovers, sweep
from milepost.engine.verifying import verify
from milepost.errors import AlreadyExistsError, CheckpointNotFoundError, InvalidLayoutError
from milepost.testing.commit import SCENARIOS, power_cuts
from milepost.testing.faults import PowerCut, emptied, keys
from system.states import equal, sharded, small, state


def test_what_was_saved_is_what_comes_back(root, writer):
    milepost.save(root.path("7"), state())
    equal(state(), milepost.load(root.path("7")))
    equal(state(), milepost.load(root.path("7"), state()))


def test_what_eight_devices_held_comes_back_on_them_and_on_one(root, writer):
    tree = sharded()
    milepost.save(root.path("7"), tree)
    equal(tree, milepost.load(root.path("7"), tree))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    target = {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=one) for name, each in tree.items()}
    loaded = milepost.load(root.path("7"), target)
    assert {each.sharding for each in loaded.values()} == {one}
    for name, each in tree.items():
        assert np.asarray(each).tobytes() == np.asarray(loaded[name]).tobytes()


def test_a_name_that_is_taken_is_refused_and_overwriting_replaces_it(root, writer):
    milepost.save(root.path("7"), small("old"))
    with pytest.raises(AlreadyExistsError):
        milepost.save(root.path("7"), small("new"))
    equal(small("old"), milepost.load(root.path("7")))
    before = len(keys(root.opened().storage))
    milepost.save(root.path("7"), small("new"), overwrite=True)
    equal(small("new"), milepost.load(root.path("7")))
    assert abs(len(keys(root.opened().storage)) - before) <= 1
    assert leftovers(root.url) == []


def test_every_byte_is_where_the_manifest_says(root, writer):
    milepost.save(root.path("7"), state())
    reports = list(verify(open_checkpoint(root.path("7")), threads=2))
    assert reports
    assert [report for report in reports if report.problem] == []


def test_a_deletion_leaves_nothing_and_spares_the_neighbours(root, writer):
    for name in ("step_1", "step_10", "step_100"):
        milepost.save(root.path(name), small(name))
    delete(root.path("step_1"))
    with pytest.raises(CheckpointNotFoundError):
        milepost.load(root.path("step_1"))
    assert {key.partition("/")[0] for key in keys(root.opened().storage)} == {"step_10", "step_100"}
    equal(small("step_10"), milepost.load(root.path("step_10")))


def test_a_manager_keeps_what_its_policy_says(root, writer):
    policy = v1.training.preservation_policies.LatestN(2)
    with v1.training.Checkpointer(root.url, preservation_policy=policy) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, small(str(step)))
    with v1.training.Checkpointer(root.url) as checkpointer:
        assert [each.step for each in checkpointer.checkpoints] == [4, 5]
        assert checkpointer.latest.step == 5
        equal(small("5"), checkpointer.load())
    assert {key.partition("/")[0] for key in keys(root.opened().storage)} == {"4", "5"}


SECOND = """
import sys, milepost
print(milepost.load(sys.argv[1])["text"])
"""


def test_another_process_sees_it_at_once(root, writer):
    watcher = root.opened().storage
    assert list(watcher.children("")) == []
    milepost.save(root.path("7"), small("seen"))
    assert list(watcher.children("")) == ["7/"]
    done = subprocess.run([sys.executable, "-c", SECOND, root.path("7")], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "seen", done.stderr


def test_a_copy_from_a_disk_is_a_checkpoint_and_is_never_swept(root, writer, tmp_path):
    milepost.save(tmp_path / "here" / "7", small("copied"))
    storage = root.opened().storage
    for file in sorted((tmp_path / "here").rglob("*")):
        if file.is_file():
            storage.write(str(file.relative_to(tmp_path / "here")), [file.read_bytes()])
    assert sweep(root.url, older_than=-1.0) == []
    equal(small("copied"), milepost.load(root.path("7")))


def test_cp_brings_a_checkpoint_here_and_back(root, writer, tmp_path):
    milepost.save(tmp_path / "7", state())
    Copy(CopyRequest(tmp_path / "7", root.path("7"))).run()
    Copy(CopyRequest(root.path("7"), tmp_path / "8")).run()
    equal(state(), milepost.load(root.path("7")))
    equal(state(), milepost.load(tmp_path / "8"))


@pytest.mark.wire
@pytest.mark.parametrize("old", [None, "old"], ids=["save", "overwrite"])
def test_the_power_may_be_cut_before_any_change_of_a_save(root, writer, power, old):
    def prepared():
        emptied(root.opened().storage)
        milepost.save(root.path("5"), small("older"))
        if old:
            milepost.save(root.path("7"), small(old))

    prepared()
    with power.cut(None) as opened:
        milepost.save(root.path("7"), small("new"), overwrite=bool(old))
    changes = max(each.changes for each in opened)
    assert changes > 3
    for at in range(0, changes, max(1, changes // 8)):
        prepared()
        with power.cut(at), pytest.raises(PowerCut):
            milepost.save(root.path("7"), small("new"), overwrite=bool(old))
        found = loaded(root.path("7"))
        assert found in {old, "new"}
        assert loaded(root.path("5")) == "older"
        sweep(root.url, older_than=-1.0)
        assert loaded(root.path("7")) == found
        milepost.save(root.path("7"), small("next"), overwrite=True)
        assert loaded(root.path("7")) == "next"


def loaded(path):
    try:
        tree = milepost.load(path)
    except InvalidLayoutError:  # where data are written in place, something may be there that is no checkpoint
        return None
    equal(small(tree["text"]), tree)
    return tree["text"]


@pytest.mark.wire
@pytest.mark.parametrize("case", [each.name for each in SCENARIOS])
def test_the_power_may_be_cut_before_any_change_of_a_commit(root, case):
    route = root.opened()
    (scenario,) = (each for each in SCENARIOS if each.name == case)
    reaper = CreateCommit(grace=0) if isinstance(route.commit, CreateCommit) else route.commit
    assert power_cuts(route.storage, route.commit, scenario, reaper=reaper) > 1
