"""Which steps are found below a root, on a disk and on a storage that knows no directories."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import subprocess
import sys
import threading
import uuid

import milepost
import pytest
from milepost.attempts import new_attempt
from milepost.errors import AlreadyExistsError, CheckpointNotFoundError, NotFoundError, StorageError
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.path import step
from milepost.path.step import Metadata, NameFormat, composite_name_format, standard_name_format
from milepost.plugins import installed
from milepost.routes import open_route, resolve
from milepost.testing.commit import dead_attempt
from milepost.testing.faults import WrappedStorage
from milepost.v1.path import PathAwaitingCreation
from upath import UPath

DAY = 24 * 3600 * 10**9


class Disk:
    def __init__(self, root):
        self.root = root

    def folder(self, name):
        (self.root / name).mkdir(parents=True)

    commit = folder

    def file(self, name, text=""):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def text(self, name):
        return (self.root / name).read_text()


class Memory:
    def __init__(self, root):
        self.root = root
        self.storage = MemoryStorage(root)

    def folder(self, name):
        self.storage.write(f"{name}/data", [b"x"])

    def commit(self, name):
        self.storage.write(f"{name}/commit_success.txt", [b"Checkpoint commit was successful to somewhere"])

    def file(self, name, text=""):
        self.storage.write(name, [text.encode()])

    def text(self, name):
        return bytes(self.storage.read(name)).decode()


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "root").mkdir()
    return Disk(tmp_path / "root")


@pytest.fixture
def memory():
    made = Memory(f"memory://tests/listings/{uuid.uuid4().hex}")
    yield made
    made.storage.delete("")


@pytest.fixture(params=["disk", "memory"])
def place(request):
    return request.getfixturevalue(request.param)


def below(place, *names):
    return UPath(place.root).joinpath(*names)


def found(place, name_format):
    return sorted(metadata.path.name for metadata in name_format.find_all(place.root))


def staged(place, name, attempt=None):
    """Begin an attempt to save, as a save does."""
    opened = open_route(resolve(f"{place.root}/{name}"))
    return opened.commit.stage(opened.storage, name, attempt or new_attempt())


# --- what a format finds ---------------------------------------------------------------------------------------------

COMMITTED = ["0", "1", "2", "10", "02", "0010", "00000", "12345", "-1", "abc", "ckpt_3", "ckpt_0003", "_4", "a_b_5"]


@pytest.fixture
def full(place):
    for name in COMMITTED:
        place.commit(name)
    place.commit("7.orbax-checkpoint-tmp-0")
    place.commit("8.orbax-checkpoint-tmp")
    place.file("99")
    place.file("stray.txt")
    return place


@pytest.mark.parametrize(
    ("prefix", "length", "names"),
    [
        (None, None, ["0", "1", "10", "12345", "2"]),
        (None, 0, ["0", "1", "10", "12345", "2"]),
        (None, 1, ["0", "1", "10", "12345", "2"]),
        (None, 4, ["0010", "12345"]),
        (None, 5, ["00000", "12345"]),
        ("ckpt", None, ["ckpt_3"]),
        ("ckpt", 4, ["ckpt_0003"]),
        ("", None, ["_4"]),
        ("a_b", None, ["a_b_5"]),
        (".*", None, []),
    ],
)
def test_a_format_finds_its_own_names_only(full, prefix, length, names):
    name_format = standard_name_format(prefix, length)
    assert names == found(full, name_format)
    numbers = {metadata.path.name: metadata.step for metadata in name_format.find_all(full.root)}
    assert numbers == {name: int(name.rpartition("_")[2]) for name in names}


def test_links_to_directories_are_steps_and_links_to_nothing_are_not(disk):
    disk.folder("elsewhere")
    (disk.root / "55").symlink_to(disk.root / "elsewhere", target_is_directory=True)
    (disk.root / "56").symlink_to(disk.root / "nothing")
    (disk.root / "57").symlink_to(disk.root / "57")
    assert found(disk, standard_name_format()) == ["55"]
    assert standard_name_format().find_step(disk.root, 55).path.name == "55"
    assert step.checkpoint_steps(disk.root) == [55]
    assert step.tmp_checkpoints(disk.root) == []
    for number in (56, 57):
        assert not step.is_path_finalized(disk.root / str(number))
        with pytest.raises(ValueError, match="cannot find step"):
            step.find_step_path(disk.root, standard_name_format(), step=number, include_uncommitted=True)


def test_what_has_no_commit_object_is_no_step_where_nothing_is_renamed(memory):
    memory.folder("1")
    memory.commit("2")
    memory.folder("3")
    assert found(memory, standard_name_format()) == ["2"]
    assert step.checkpoint_steps(memory.root) == [2]
    assert step.latest_step_metadata(memory.root, standard_name_format()).step == 2
    assert step.any_checkpoint_step(memory.root) == 2
    assert standard_name_format().find_metadata(memory.root, 1) is None


def test_a_root_that_is_missing_or_a_file_holds_no_steps(place):
    place.file("file")
    for root in (f"{place.root}/missing/root", f"{place.root}/file"):
        assert list(standard_name_format().find_all(root)) == []
        assert step.latest_step_metadata(root, standard_name_format()) is None
        assert step.checkpoint_steps_paths(root) == []
        assert step.checkpoint_steps(root) == []
        assert step.tmp_checkpoints(root) == []


@pytest.mark.parametrize("name", ["1", "ckpt_2"])
def test_any_storage_is_asked_for_one_step(place, name):
    place.commit(name)
    assert step.any_checkpoint_step(place.root) == int(name[-1])


def test_no_step_at_all(place):
    place.file("stray.txt")
    assert step.any_checkpoint_step(place.root) is None


def test_a_missing_directory_is_an_error_where_directories_exist(disk):
    assert step.any_checkpoint_step(disk.root) is None
    step.cleanup_tmp_directories(disk.root)
    with pytest.raises(FileNotFoundError):
        step.any_checkpoint_step(disk.root / "missing")
    with pytest.raises(FileNotFoundError):
        step.cleanup_tmp_directories(disk.root / "missing")


def test_a_prefix_without_objects_is_an_empty_directory(memory):
    assert step.any_checkpoint_step(memory.root) is None
    step.cleanup_tmp_directories(memory.root)


@pytest.mark.parametrize("ask", [step.any_checkpoint_step, step.checkpoint_steps])
def test_a_checkpoint_of_ours_is_found(place, ask):
    milepost.save(f"{place.root}/17", {"a": 1})
    assert ask(place.root) in (17, [17])


@pytest.mark.parametrize("spell", [str, lambda root: f"{root}/", UPath, lambda root: f"{UPath(root)}//"])
def test_a_root_may_be_spelled_in_many_ways(place, spell):
    place.commit("3")
    (metadata,) = standard_name_format().find_all(spell(place.root))
    assert isinstance(metadata.path, UPath)
    assert step.is_checkpoint_finalized(metadata.path)


def test_a_relative_root(disk, monkeypatch):
    monkeypatch.chdir(disk.root.parent)
    disk.commit("3")
    assert [Metadata(3, UPath("root/3"))] == list(standard_name_format().find_all("root"))
    monkeypatch.chdir(disk.root)
    assert step.latest_step_metadata(".", standard_name_format()) == Metadata(3, UPath("3"))
    assert step.is_checkpoint_finalized("3")
    assert step.step_metadata_of_checkpoint_path("3", standard_name_format()).step == 3


def test_a_file_url_is_a_local_path(disk):
    disk.commit("3")
    (metadata,) = standard_name_format().find_all(f"file://{disk.root}")
    assert metadata == Metadata(3, UPath(disk.root / "3"))


# --- one step --------------------------------------------------------------------------------------------------------


def test_a_step_is_found_by_its_number(place):
    place.commit("ckpt_0003")
    expected = Metadata(3, below(place, "ckpt_0003"))
    name_format = standard_name_format("ckpt", 4)
    assert expected == name_format.find_step(place.root, 3)
    assert expected == name_format.find_metadata(place.root, 3)
    assert expected == name_format.build_metadata(below(place, "ckpt_0003"))
    assert expected.path == step.find_step_path(place.root, name_format, step=3)
    assert expected == step.maybe_find_step_metadata(place.root, name_format, step=3)
    assert expected == step.step_metadata_of_checkpoint_path(f"{place.root}/ckpt_0003/", name_format)


def test_a_number_that_no_listing_shows_can_be_asked_for(place):
    place.commit("-001")
    assert standard_name_format(None, 4).find_step(place.root, -1).step == -1
    assert found(place, standard_name_format(None, 4)) == []


def test_the_caller_of_build_metadata_may_know_the_step(place):
    place.commit("anything")
    path = below(place, "anything")
    assert standard_name_format().build_metadata(path, 7) == Metadata(7, path)
    assert standard_name_format().build_metadata(path, step=7) == Metadata(7, path)
    assert standard_name_format().build_metadata(path) is None


@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_a_step_that_is_not_there(place, number):
    place.file("5")
    place.commit("6.orbax-checkpoint-tmp-0")
    place.commit("08")
    name_format = standard_name_format()
    for act in (name_format.find_step, lambda root, number: step.find_step_path(root, name_format, step=number)):
        with pytest.raises(ValueError, match=f"cannot find step {number} below") as caught:
            act(place.root, number)
        assert isinstance(caught.value, CheckpointNotFoundError)
    assert name_format.find_metadata(place.root, number) is None
    assert step.maybe_find_step_metadata(place.root, name_format, step=number) is None
    with pytest.raises(ValueError, match="there are: none"):
        step.step_metadata_of_checkpoint_path(f"{place.root}/{number}", name_format)


def test_a_path_of_no_step_tells_which_there_are(place):
    for name in ("1", "2", "3", "4", "5", "6", "a_7"):
        place.commit(name)
    with pytest.raises(ValueError, match="'2', '3', '4', '5', '6' and others"):
        step.step_metadata_of_checkpoint_path(f"{place.root}/a_7", standard_name_format())


class Plain(NameFormat[Metadata]):
    """The least that a format of somebody else has."""

    def build_name(self, step):
        raise NotImplementedError

    def build_metadata(self, step_path, *args, **kwargs):
        name = step_path.name
        return Metadata(int(name.removeprefix("v")), step_path) if name.startswith("v") else None

    def find_metadata(self, base_path, step, *args, **kwargs):
        return next((metadata for metadata in self.find_all(base_path) if metadata.step == step), None)


def test_a_format_of_somebody_else_needs_three_methods(place):
    for name in ("v1", "v3", "v2", "4"):
        place.commit(name)
    place.commit("v9.orbax-checkpoint-tmp-0")
    place.file("v8")
    assert found(place, Plain()) == ["v1", "v2", "v3"]
    assert Plain().find_step(place.root, 2).path.name == "v2"
    assert step.latest_step_metadata(place.root, Plain()).step == 3
    assert step.step_metadata_of_checkpoint_path(f"{place.root}/v1", Plain()).step == 1
    with pytest.raises(ValueError, match=r"no committed '\*5'"):
        Plain().find_step(place.root, 5)


# --- several formats -------------------------------------------------------------------------------------------------

PADDED, SHORT = standard_name_format("ckpt", 4), standard_name_format("ckpt")


@pytest.mark.parametrize(("formats", "preferred"), [([PADDED, SHORT], "ckpt_0003"), ([SHORT, PADDED], "ckpt_3")])
def test_the_format_that_comes_first_is_preferred(place, formats, preferred):
    for name in ("ckpt_3", "ckpt_0003", "ckpt_1", "ckpt_0002", "3"):
        place.commit(name)
    both = composite_name_format(PADDED, formats)
    assert both.build_name(3) == "ckpt_0003"
    assert preferred == both.find_step(place.root, 3).path.name
    assert preferred == both.find_metadata(place.root, 3).path.name
    assert preferred == step.latest_step_metadata(place.root, both).path.name
    assert sorted(["ckpt_1", "ckpt_0002", preferred]) == found(place, both)
    assert both.find_metadata(place.root, 7) is None
    assert both.build_metadata(below(place, "ckpt_1")) == Metadata(1, below(place, "ckpt_1"))
    assert both.build_metadata(below(place, "3")) is None
    assert step.step_metadata_of_checkpoint_path(below(place, "ckpt_0002"), both).step == 2
    with pytest.raises(ValueError, match="cannot find step 7") as caught:
        both.find_step(place.root, 7)
    assert {"ckpt_0007", "ckpt_7"} == {name for name in ("ckpt_0007", "ckpt_7") if repr(name) in str(caught.value)}


def test_a_preferred_name_that_is_not_committed_hides_nothing(memory):
    memory.folder("ckpt_0003")
    memory.commit("ckpt_3")
    both = composite_name_format(PADDED, [PADDED, SHORT])
    assert found(memory, both) == ["ckpt_3"]
    assert step.latest_step_metadata(memory.root, both).path.name == "ckpt_3"


def test_formats_of_several_makers_can_be_joined(place):
    for name in ("v4", "ckpt_3", "5"):
        place.commit(name)
    both = composite_name_format(SHORT, [SHORT, Plain()])
    assert found(place, both) == ["ckpt_3", "v4"]
    assert step.latest_step_metadata(place.root, both).step == 4
    assert step.step_metadata_of_checkpoint_path(below(place, "v4"), both).step == 4


# --- every standard name ---------------------------------------------------------------------------------------------


def test_paths_of_all_steps_whatever_their_format(full):
    steps = ["0", "00000", "1", "02", "2", "ckpt_0003", "ckpt_3", "_4", "a_b_5", "0010", "10", "12345"]
    assert [below(full, name) for name in steps] == step.checkpoint_steps_paths(full.root)
    assert step.checkpoint_steps(full.root) == [0, 0, 1, 2, 2, 3, 3, 4, 5, 10, 10, 12345]
    assert step.checkpoint_steps(full.root) == step.checkpoint_steps(full.root, single_host_load_and_broadcast=True)


def test_entries_that_vanish_while_they_are_looked_at_are_no_steps(memory, storages):
    for number in range(40):
        memory.commit(str(number))
    others = {f"{number}/commit_success.txt" for number in range(40) if number % 2}
    with storages(lambda verb, key: verb == "size" and key in others and memory.storage.delete(key)):
        assert step.checkpoint_steps(memory.root) == list(range(0, 40, 2))


# --- what is finished ------------------------------------------------------------------------------------------------


def test_what_is_finished(place):
    place.commit("7")
    place.commit("notes")
    place.commit("8.orbax-checkpoint-tmp-3")
    place.file("file")
    for name, finished in (("7", True), ("notes", True), ("8.orbax-checkpoint-tmp-3", False)):
        assert finished == step.is_checkpoint_finalized(below(place, name))
        assert finished == step.is_path_finalized(f"{place.root}/{name}/")
    with pytest.raises(ValueError, match="it is a file"):
        step.is_checkpoint_finalized(below(place, "file"))
    with pytest.raises(ValueError, match="nothing is there"):
        step.is_checkpoint_finalized(below(place, "missing"))
    assert not step.is_path_finalized(below(place, "file"))
    assert not step.is_path_finalized(below(place, "missing"))


def test_a_folder_without_a_commit_object_is_not_finished_where_nothing_is_renamed(memory):
    memory.folder("7")
    assert not step.is_checkpoint_finalized(below(memory, "7"))
    assert not step.is_tmp_checkpoint(below(memory, "7"))


def test_a_checkpoint_that_an_overwrite_was_about_to_replace_is_still_there(disk):
    milepost.save(disk.root / "7", {"a": 1})
    (disk.root / "7").rename(disk.root / f"7.orbax-checkpoint-tmp-{dead_attempt()}.old")
    (metadata,) = standard_name_format().find_all(disk.root)
    assert (7, disk.root / "7") == (metadata.step, metadata.path)
    assert metadata.commit_timestamp_nsecs is not None
    assert step.is_checkpoint_finalized(disk.root / "7")
    assert milepost.load(metadata.path) == {"a": 1}


# --- timestamps ------------------------------------------------------------------------------------------------------


def written(place, name, text):
    place.commit(name)
    place.file(f"{name}/_CHECKPOINT_METADATA", text)
    return Metadata(7, below(place, name))


def test_timestamps_of_a_checkpoint_of_ours(place):
    before = dt.datetime.now(dt.UTC)
    milepost.save(f"{place.root}/7", {"a": 1})
    metadata = Metadata(7, below(place, "7"))
    saved = milepost.v1.metadata(f"{place.root}/7")
    assert saved.init_timestamp_nsecs == metadata.init_timestamp_nsecs
    assert saved.commit_timestamp_nsecs == metadata.commit_timestamp_nsecs
    assert before - dt.timedelta(seconds=1) <= metadata.commit_timestamp <= dt.datetime.now(dt.UTC)
    assert metadata.commit_timestamp.tzinfo is dt.UTC


def test_timestamps_of_a_checkpoint_of_the_reference(place):
    text = '{"init_timestamp_nsecs": 5, "commit_timestamp_nsecs": 1500000000123456789, "custom_metadata": {}}'
    metadata = written(place, "7", text)
    assert (metadata.init_timestamp_nsecs, metadata.commit_timestamp_nsecs) == (5, 1500000000123456789)
    assert metadata.commit_timestamp == dt.datetime(2017, 7, 14, 2, 40, 0, 123457, tzinfo=dt.UTC)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{}", '{"init_timestamp_nsecs": "x"}', "[" * 100_000])
def test_a_record_that_says_nothing(place, text):
    metadata = written(place, "7", text)
    assert (metadata.init_timestamp_nsecs, metadata.commit_timestamp_nsecs) == (None, None)


def test_timestamps_are_read_once(place):
    metadata = written(place, "7", '{"init_timestamp_nsecs": 5}')
    assert metadata.init_timestamp_nsecs == 5
    place.file("7/_CHECKPOINT_METADATA", '{"init_timestamp_nsecs": 6}')
    assert metadata.init_timestamp_nsecs == 5
    assert Metadata(7, metadata.path).init_timestamp_nsecs == 6


def test_a_damaged_commit_object_tells_no_time(place):
    milepost.save(f"{place.root}/7", {"a": 1})
    place.file("7/commit_success.txt", place.text("7/commit_success.txt")[:-9])
    assert Metadata(7, below(place, "7")).commit_timestamp_nsecs is None


def test_where_nothing_is_said_the_directory_tells_when_it_was_changed(disk):
    disk.commit("7")
    os.utime(disk.root / "7", (1, 1_600_000_000))
    assert Metadata(7, UPath(disk.root / "7")).commit_timestamp == dt.datetime(2020, 9, 13, 12, 26, 40, tzinfo=dt.UTC)


def test_where_nothing_tells_there_is_no_time(place):
    with pytest.raises(FileNotFoundError, match="cannot tell when") as caught:
        _ = Metadata(7, below(place, "7")).commit_timestamp
    assert isinstance(caught.value, NotFoundError)


# --- unfinished checkpoints ------------------------------------------------------------------------------------------


def test_unfinished_checkpoints_are_told_by_their_names(place):
    for name in ("7.orbax-checkpoint-tmp-0", "8.orbax-checkpoint-tmp", "ckpt_9.orbax-checkpoint-tmp-12", "5", "notes"):
        place.commit(name)
    place.file("6.orbax-checkpoint-tmp-0")
    names = ["7.orbax-checkpoint-tmp-0", "8.orbax-checkpoint-tmp", "ckpt_9.orbax-checkpoint-tmp-12"]
    assert names == step.tmp_checkpoints(place.root)
    assert [(below(place, name), below(place, name.partition(".")[0])) for name in names] == [
        (one.get(), one.get_final()) for one in step.all_temporary_paths(place.root)
    ]
    for name in (*names, "5", "notes", "6.orbax-checkpoint-tmp-0", "missing", "9.orbax-checkpoint-tmp"):
        assert (name in names) == step.is_tmp_checkpoint(below(place, name))
        assert (name in names) == step.is_path_temporary(below(place, name))


def test_a_save_that_runs_is_an_unfinished_checkpoint(place):
    prefix = staged(place, "7").prefix
    assert [prefix.partition("/")[0]] == step.tmp_checkpoints(place.root)
    assert found(place, standard_name_format()) == []


def test_what_is_committed_is_not_unfinished_whatever_lies_beside_it(memory):
    milepost.save(f"{memory.root}/7", {"a": 1})
    staged(memory, "7")
    assert step.tmp_checkpoints(memory.root) == []
    assert not step.is_tmp_checkpoint(f"{memory.root}/7")


def test_an_unfinished_step_can_be_asked_for(place):
    prefix = staged(place, "7").prefix
    path = step.find_step_path(place.root, standard_name_format(), step=7, include_uncommitted=True)
    assert below(place, prefix.partition("/")[0]) == path
    with pytest.raises(ValueError, match="cannot find step 7"):
        step.find_step_path(place.root, standard_name_format(), step=7)
    with pytest.raises(ValueError, match="cannot find step 8"):
        step.find_step_path(place.root, standard_name_format(), step=8, include_uncommitted=True)


def test_an_unfinished_step_comes_before_the_finished_one_and_the_finished_one_is_found_too(disk):
    for name in ("7", "7.orbax-checkpoint-tmp", "8", "88.orbax-checkpoint-tmp"):
        disk.folder(name)
    disk.folder(f"8.orbax-checkpoint-tmp-{dead_attempt()}.deleted")
    paths = [
        step.find_step_path(disk.root, standard_name_format(), step=number, include_uncommitted=True).name
        for number in (7, 8)
    ]
    assert paths == ["7.orbax-checkpoint-tmp", "8"]


def test_of_several_unfinished_directories_the_newest_is_found(disk):
    names = [f"7.orbax-checkpoint-tmp-200{year}0101T000000Z-0badcafe-1f-0123456789ab" for year in (1, 9, 4)]
    for name in names:
        disk.folder(name)
    path = step.find_step_path(disk.root, standard_name_format(), step=7, include_uncommitted=True)
    assert names[1] == path.name


def test_what_is_committed_while_it_is_looked_at_is_not_unfinished(memory, storages):
    prefix = staged(memory, "7").prefix
    with storages(lambda verb, key: key == "7/" and memory.commit("7")) as told:
        assert step.tmp_checkpoints(memory.root) == []
    assert ("children", "7/") in told
    assert prefix.removeprefix("7/") in memory.storage.children("7/")


def test_a_temporary_directory_is_another_one_at_each_call(disk):
    first, second = step.get_tmp_directory(disk.root / "7"), step.get_tmp_directory(disk.root / "7")
    assert first != second
    assert {first.parent, second.parent} == {UPath(disk.root)}
    assert {step.step_from_checkpoint_name(path.name) for path in (first, second)} == {7}
    assert list(disk.root.iterdir()) == []


def test_where_nothing_is_renamed_a_checkpoint_is_written_in_place(memory):
    assert below(memory, "7") == step.get_tmp_directory(below(memory, "7"))
    assert list(memory.storage.children("")) == []


def test_a_temporary_directory_is_created_with_a_record(place):
    before = dt.datetime.now(dt.UTC).timestamp() * 1e9
    made = step.create_tmp_directory(below(place, "deep", "7"))
    assert made.parent == below(place, "deep")
    assert [made.name] == step.tmp_checkpoints(below(place, "deep"))
    assert step.is_tmp_checkpoint(made)
    record = json.loads(place.text(f"deep/{made.name}/_CHECKPOINT_METADATA"))
    assert record["init_timestamp_nsecs"] >= before - 1e9
    assert record["commit_timestamp_nsecs"] is None
    assert Metadata(7, made).init_timestamp_nsecs == record["init_timestamp_nsecs"]


def test_nothing_is_removed_to_make_room_for_a_temporary_directory(memory):
    made = step.create_tmp_directory(below(memory, "7"))
    text = memory.text("7/_CHECKPOINT_METADATA")
    memory.file("7/data", "mine")
    with pytest.raises(FileExistsError) as caught:
        step.create_tmp_directory(made, primary_host=None, active_processes={0})
    assert isinstance(caught.value, AlreadyExistsError)
    assert (memory.text("7/_CHECKPOINT_METADATA"), memory.text("7/data")) == (text, "mine")


# --- cleaning up -----------------------------------------------------------------------------------------------------


def test_cleaning_up_leaves_everything_that_is_not_known_to_be_abandoned(place):
    foreign = ["notes", "metadata", "5", "7.orbax-checkpoint-tmpl", "8.orbax-checkpoint-tmp-1.backup", "x.tmp"]
    for name in foreign:
        place.folder(name)
    place.commit("9")
    place.file("10.orbax-checkpoint-tmp-0")
    staged(place, "11")
    entries = sorted(open_route(resolve(f"{place.root}/_")).storage.children(""))
    step.cleanup_tmp_directories(place.root)
    assert entries == sorted(open_route(resolve(f"{place.root}/_")).storage.children(""))


def test_cleaning_up_removes_what_is_abandoned(place):
    for name in ("7.orbax-checkpoint-tmp-0", "8.orbax-checkpoint-tmp"):
        place.commit(name)
    step.create_tmp_directory(below(place, "9"))
    staged(place, "10", dead_attempt())
    place.commit("6")
    step.cleanup_tmp_directories(place.root, primary_host=0, active_processes=None)
    assert [*open_route(resolve(f"{place.root}/_")).storage.children("")] == ["6/"]
    assert step.tmp_checkpoints(place.root) == []


CHILD = """
import sys
from milepost.path import step
print(step.create_tmp_directory(sys.argv[1]).name, flush=True)
sys.stdin.read()
"""


def test_what_a_running_process_made_stays_until_it_is_gone(disk):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, disk.root / "7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        name = child.stdout.readline().strip()
        step.cleanup_tmp_directories(disk.root)
        assert [name] == step.tmp_checkpoints(disk.root)
        child.stdin.close()
    step.cleanup_tmp_directories(disk.root)
    assert step.tmp_checkpoints(disk.root) == []


@pytest.mark.parametrize(
    ("record", "stays"),
    [
        ({"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": None}, False),
        ({"init_timestamp_nsecs": 1}, False),
        ({"init_timestamp_nsecs": 1, "custom_metadata": None}, False),
        ({"init_timestamp_nsecs": 1, "custom_metadata": {"milepost_attempt": "x"}}, True),
        ({"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 2}, True),
        ({"commit_timestamp_nsecs": None}, True),
        ({}, True),
    ],
)
def test_what_another_program_began_in_place_is_removed_after_a_day(memory, record, stays):
    memory.file("7/_CHECKPOINT_METADATA", json.dumps(record))
    memory.file("7/data")
    step.cleanup_tmp_directories(memory.root)
    assert stays == bool(memory.storage.children("7/"))


def test_what_another_program_began_in_place_today_stays(memory):
    now = int(dt.datetime.now(dt.UTC).timestamp() * 1e9)
    memory.file("7/_CHECKPOINT_METADATA", json.dumps({"init_timestamp_nsecs": now - DAY // 2}))
    step.cleanup_tmp_directories(memory.root)
    assert step.tmp_checkpoints(memory.root) == ["7"]


def test_a_running_save_protects_the_place_where_another_was_begun(memory):
    memory.file("7/_CHECKPOINT_METADATA", '{"init_timestamp_nsecs": 1}')
    prefix = staged(memory, "7").prefix
    step.cleanup_tmp_directories(memory.root)
    assert set(memory.storage.children("7/")) == {"_CHECKPOINT_METADATA", prefix.removeprefix("7/")}


# --- cost ------------------------------------------------------------------------------------------------------------


class Looks(WrappedStorage):
    """A storage that tells of every request, and may have something done before it."""

    def __init__(self, storage, told, lock, before):
        super().__init__(storage)
        self._told, self._lock, self._before = told, lock, before

    def _tell(self, verb, key):
        with self._lock:
            self._told.append((verb, key))
        self._before(verb, key)

    def read(self, key, start=0, stop=None):
        self._tell("read", key)
        return super().read(key, start, stop)

    def children(self, prefix):
        self._tell("children", prefix)
        return super().children(prefix)

    def size(self, key):
        self._tell("size", key)
        return super().size(key)


class Wrapper:
    def __init__(self, before):
        self.told, self.lock, self.before = [], threading.Lock(), before

    @hookimpl(wrapper=True)
    def open_storage(self):
        return Looks((yield), self.told, self.lock, self.before)


@pytest.fixture
def storages():
    installed().load_all()

    @contextlib.contextmanager
    def telling(before=lambda verb, key: None):
        wrapper = Wrapper(before)
        installed()._manager.register(wrapper)
        try:
            yield wrapper.told
        finally:
            installed()._manager.unregister(wrapper)

    return telling


MANY = 10_000


@pytest.fixture
def many_on_disk(disk):
    for number in range(MANY):
        (disk.root / str(number)).mkdir()
    return disk


@pytest.fixture
def many_in_memory(memory):
    for number in range(MANY):
        memory.commit(str(number))
    return memory


BOTH = composite_name_format(standard_name_format(), [standard_name_format(), SHORT])


def test_ten_thousand_steps_on_a_disk_cost_one_listing(many_on_disk, storages):
    root, name_format = many_on_disk.root, standard_name_format()
    for act, expected in (
        (lambda: len(list(name_format.find_all(root))), MANY),
        (lambda: step.latest_step_metadata(root, name_format).step, MANY - 1),
        (lambda: step.latest_step_metadata(root, BOTH).step, MANY - 1),
        (lambda: len(step.checkpoint_steps(root)), MANY),
        (lambda: step.any_checkpoint_step(root) in range(MANY), True),
        (lambda: len(step.tmp_checkpoints(root)), 0),
    ):
        with storages() as told:
            assert expected == act()
        assert {("children", "")} == set(told)
        assert len(told) <= 2  # one for each format


def test_the_newest_of_ten_thousand_steps_costs_one_listing_and_one_look(many_in_memory, storages):
    root = many_in_memory.root
    with storages() as told:
        assert step.latest_step_metadata(root, standard_name_format()).step == MANY - 1
    assert told == [("children", ""), ("size", f"{MANY - 1}/commit_success.txt")]
    with storages() as told:
        assert step.any_checkpoint_step(root) in range(MANY)
    assert [verb for verb, _ in told] == ["children", "size"]
    with storages() as told:
        assert standard_name_format().find_step(root, 77).step == 77
    assert told == [("size", "77/commit_success.txt")]


def test_all_of_ten_thousand_steps_cost_listings_few_looks_and_no_reads(many_in_memory, storages):
    with storages() as told:
        assert len(list(standard_name_format().find_all(many_in_memory.root))) == MANY
    assert told[0] == ("children", "")
    assert {verb for verb, _ in told[1:]} == {"size"}
    assert len(told) == 1 + 63


def test_a_listing_that_nobody_finishes_stops_asking(many_in_memory, storages):
    with storages() as told:
        assert next(standard_name_format().find_all(many_in_memory.root)).step == 0
    assert len(told) == 2


def test_the_newest_is_found_below_many_that_were_never_finished(memory, storages):
    for number in range(300):
        memory.folder(str(number))
    memory.commit("17")
    with storages() as told:
        assert step.latest_step_metadata(memory.root, standard_name_format()).step == 17
    assert [verb for verb, _ in told].count("children") == 1


def test_a_step_below_one_that_was_not_finished_costs_few_looks(many_in_memory, storages):
    many_in_memory.folder(str(MANY))
    with storages() as told:
        assert step.latest_step_metadata(many_in_memory.root, standard_name_format()).step == MANY - 1
    assert len(told) <= 4


def test_a_storage_that_fails_is_no_missing_step(memory, storages):
    memory.commit("ckpt_3")

    def fail(verb, key):
        raise StorageError(f"cannot {verb} {key!r}: the line is dead")

    both = composite_name_format(PADDED, [PADDED, SHORT])
    with storages(fail):
        for act in (both.find_step, both.find_metadata, standard_name_format().find_metadata):
            with pytest.raises(StorageError, match="the line is dead"):
                act(memory.root, 3)


# --- paths of v1 -----------------------------------------------------------------------------------------------------


def test_a_path_that_is_there_already_can_be_awaited(disk):
    path = PathAwaitingCreation(UPath(disk.root))
    assert path.path == asyncio.run(path.await_creation()) == disk.root


def test_awaiting_a_path_waits_until_it_is_there(disk):
    made = disk.root / "made"

    async def waited():
        return await (PathAwaitingCreation(UPath(disk.root), made.mkdir) / "made")

    assert made == asyncio.run(waited())
    assert made.is_dir()


def test_a_path_that_cannot_be_made_is_an_error_for_who_awaits_it(disk):
    path = PathAwaitingCreation(UPath(disk.root), disk.root.mkdir)
    with pytest.raises(FileExistsError):
        asyncio.run(path.await_creation())
