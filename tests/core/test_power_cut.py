from __future__ import annotations

import contextlib
import itertools

import pytest
from milepost.commit import CreateCommit, MarkerCommit
from milepost.errors import NotFoundError
from milepost.generic import FsspecStorage
from milepost.memory import MemoryStorage
from milepost.protocols import COMMIT_OBJECT, CreatesOnly, RenamesPrefixes, ReplacesObjects
from milepost.testing.commit import SCENARIOS, dead_attempt, look, power_cuts, save, write
from milepost.testing.faults import CuttingStorage, LostReplyStorage, PowerCut, WrappedStorage, emptied, keys
from milepost_posix.rename import RenameCommit
from milepost_posix.storage import PosixStorage

STORAGES = {
    "memory": lambda path: MemoryStorage(f"memory://tests/power{path}"),
    "posix": lambda path: PosixStorage(f"file://{path}/root"),
    "local": lambda path: FsspecStorage(f"file://{path}/root"),
    "shared": lambda path: FsspecStorage(f"memory://{path}/root"),
}
STRATEGIES = {
    "create": (CreateCommit(), CreateCommit(grace=0)),
    "marker": (MarkerCommit(), MarkerCommit(grace=0)),
    "rename": (RenameCommit(), RenameCommit()),
}
PAIRS = list(itertools.product(STORAGES, STRATEGIES))


def fits(storage, strategy):
    return all(isinstance(storage, need) for need in strategy.needs)


@pytest.fixture
def storages(tmp_path):
    made = {name: make(tmp_path) for name, make in STORAGES.items()}
    yield made
    for storage in made.values():
        emptied(storage)


@pytest.fixture
def memory(storages):
    return storages["memory"]


def scenario(name):
    (found,) = (each for each in SCENARIOS if each.name == name)
    return found


@pytest.mark.parametrize("case", [each.name for each in SCENARIOS])
@pytest.mark.parametrize(("where", "how"), PAIRS)
def test_the_power_may_be_cut_before_every_change_wherever_the_strategy_fits(storages, where, how, case):
    storage, (strategy, reaper) = storages[where], STRATEGIES[how]
    overwrites = how != "create" or isinstance(storage, ReplacesObjects)
    if not fits(storage, strategy):
        # Without what it needs the strategy cannot even save; the route refuses the pair before that.
        with pytest.raises(TypeError):
            save(storage, strategy, "7", "new")
    elif overwrites or case != "overwrite":
        assert power_cuts(storage, strategy, scenario(case), reaper=reaper) > 1


def test_every_strategy_has_storages_that_it_fits(storages):
    fitting = {(where, how) for where, how in PAIRS if fits(storages[where], STRATEGIES[how][0])}
    assert {
        *(("memory", how) for how in STRATEGIES),
        ("posix", "rename"),
        *((where, "marker") for where in STORAGES),
    } <= fitting
    assert not any(("local", how) in fitting or ("shared", how) in fitting for how in ("create", "rename"))


# --- the check bites: each of these mistakes is caught ---------------------------------------------------------------


def commit_before_data(storage, strategy, name, text, *, overwrite=False):
    staging = strategy.stage(storage, name, dead_attempt())
    manifest = write(MemoryStorage("memory://tests/power/elsewhere"), staging, text)
    strategy.publish(storage, staging, manifest, overwrite=overwrite)
    write(storage, staging, text)


class DeletesDataFirst(CreateCommit):
    def delete(self, storage, name):
        for child in storage.children(f"{name}/"):
            if child != COMMIT_OBJECT:
                storage.delete(f"{name}/{child}")
        super().delete(storage, name)


class MakesRoomBeforeOverwriting(CreateCommit):
    def publish(self, storage, staging, manifest, *, overwrite=False):
        if overwrite:
            super().delete(storage, staging.name)
        super().publish(storage, staging, manifest)


class ForgetsTheFormerData(CreateCommit):
    def publish(self, storage, staging, manifest, *, overwrite=False):
        key = f"{staging.name}/{COMMIT_OBJECT}"
        if overwrite:
            storage.replace(key, [manifest], storage.version(key))
        else:
            super().publish(storage, staging, manifest)

    def leftovers(self, storage, *, older_than):
        return iter(())


class SweepsWhateverIsNotNamed(CreateCommit):
    def leftovers(self, storage, *, older_than):
        for child in list(storage.children("7/")):
            if child.endswith("/"):
                storage.delete(f"7/{child}")
        return iter(())


class RenamesTheFormerAway(RenameCommit):
    """Overwrite by two renames, without the rule that says where the former checkpoint is in between."""

    def publish(self, storage, staging, manifest, *, overwrite=False):
        if overwrite:
            with contextlib.suppress(NotFoundError):
                storage.rename(f"{staging.name}/", f"{staging.name}.aside/")
        super().publish(storage, staging, manifest)


@pytest.mark.parametrize(
    ("case", "mistake", "save_it"),
    [
        ("save", CreateCommit(grace=0), commit_before_data),
        ("save", MarkerCommit(grace=0), commit_before_data),
        ("overwrite", CreateCommit(grace=0), commit_before_data),
        ("delete", DeletesDataFirst(grace=0), save),
        ("overwrite", MakesRoomBeforeOverwriting(grace=0), save),
        ("overwrite", ForgetsTheFormerData(grace=0), save),
        ("clear beside", SweepsWhateverIsNotNamed(grace=0), save),
        ("overwrite", RenamesTheFormerAway(), save),
    ],
)
def test_a_strategy_with_a_mistake_is_caught(memory, case, mistake, save_it):
    with pytest.raises(AssertionError):
        power_cuts(memory, mistake, scenario(case), save_it=save_it)


# --- the faults themselves -------------------------------------------------------------------------------------------


def test_a_cut_storage_refuses_everything_from_the_chosen_change_on(memory):
    cutting = CuttingStorage(memory, 1)
    cutting.write("a", [b"1"])
    for act in (
        lambda: cutting.write("b", [b"2"]),
        lambda: cutting.read("a"),
        lambda: cutting.delete("a"),
        lambda: cutting.children(""),
    ):
        with pytest.raises(PowerCut):
            act()
    assert keys(memory) == ["a"]
    assert cutting.changes == 1


def test_a_lost_reply_comes_after_the_change(memory):
    lossy = LostReplyStorage(memory, 0)
    with pytest.raises(OSError, match="before the reply came"):
        lossy.write("a", [b"1"])
    lossy.write("b", [b"2"])
    assert keys(memory) == ["a", "b"]


def test_removing_a_prefix_is_one_change_for_each_object(memory):
    for key in ("7/a", "7/b/c", "8"):
        memory.write(key, [b"1"])
    cutting = CuttingStorage(memory, 1)
    with pytest.raises(PowerCut):
        cutting.delete("7/")
    assert keys(memory) == ["7/b/c", "8"]


def test_a_wrapper_has_the_extensions_of_what_it_wraps_and_no_others(storages):
    extensions = (CreatesOnly, ReplacesObjects, RenamesPrefixes)
    for storage in storages.values():
        wrapped = WrappedStorage(CuttingStorage(storage))
        assert [isinstance(wrapped, kind) for kind in extensions] == [isinstance(storage, kind) for kind in extensions]


def test_looking_at_a_checkpoint_without_its_data_fails(memory):
    save(memory, CreateCommit(), "7", "new")
    (data,) = (child for child in memory.children("7/") if child.endswith("/"))
    memory.delete(f"7/{data}arrays-0")
    with pytest.raises(AssertionError, match="arrays-0"):
        look(memory, CreateCommit(), "7")
