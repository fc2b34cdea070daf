from __future__ import annotations

import subprocess
import sys
import uuid

import pytest
from milepost import attempts
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    InvalidLayoutError,
    NotFoundError,
    OutcomeUnknownError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from milepost.memory import MemoryStorage
from milepost.protocols import COMMIT_OBJECT, CommitStrategy, Leftover, RenamesPrefixes
from milepost_posix import PosixStorage, RenameCommit

GONE = "20010101T000000Z-0badcafe-1f-0123456789ab"  # an attempt of long ago
OLD = {"a": b"old a", "b/c": b"old c", COMMIT_OBJECT: b"old"}
NEW = {"a": b"new a", "d": b"new d", COMMIT_OBJECT: b"new"}
COMMIT = RenameCommit()


@pytest.fixture(params=["renameat2", "old kernel", "memory"])
def storage(request, tmp_path):
    if request.param == "memory":
        return MemoryStorage(f"memory://{uuid.uuid4()}")
    if request.param == "old kernel":
        request.getfixturevalue("old_kernel")
    return PosixStorage(f"file://{tmp_path}/root")


def everything(storage, prefix=""):
    """Return all objects below a prefix."""
    found = {}
    for name in storage.children(prefix):
        if name.endswith("/"):
            found |= {name + key: data for key, data in everything(storage, prefix + name).items()}
        else:
            found[name] = bytes(storage.read(prefix + name))
    return found


def written(storage, name, files, attempt=None):
    """Begin an attempt and write its files, but not the commit object."""
    staging = COMMIT.stage(storage, name, attempt or attempts.new_attempt())
    for key, data in files.items():
        if key != COMMIT_OBJECT:
            storage.write(staging.prefix + key, [data])
    return staging


def save(storage, name, files, *, overwrite=False):
    COMMIT.publish(storage, written(storage, name, files), files[COMMIT_OBJECT], overwrite=overwrite)


def readable(storage, name):
    """Return what a reader of the name finds; {} if nothing."""
    if COMMIT_OBJECT in storage.children(f"{name}/"):
        return everything(storage, f"{name}/")
    prefix = COMMIT.recover(storage, name)
    return everything(storage, prefix) if prefix else {}


def sweep(storage):
    return [COMMIT.clear(storage, left) for left in COMMIT.leftovers(storage, older_than=-1) if left.dead]


def below(name, files):
    return {f"{name}/{key}": data for key, data in files.items()}


def test_it_is_a_strategy_that_says_what_it_needs():
    assert isinstance(COMMIT, CommitStrategy)
    assert COMMIT.needs == (RenamesPrefixes,)


# --- publishing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["7", "run/7"])
def test_a_checkpoint_appears_when_it_is_published(storage, name):
    staging = written(storage, name, NEW)
    assert staging.prefix == f"{name}.orbax-checkpoint-tmp-{staging.attempt}/"
    assert list(storage.children(f"{name}/")) == []
    COMMIT.publish(storage, staging, b"new")
    assert everything(storage) == below(name, NEW)


def test_the_slower_writer_is_told_and_leaves_nothing(storage):
    slow = written(storage, "7", OLD)
    save(storage, "7", NEW)
    with pytest.raises(AlreadyExistsError, match="/7'"):
        COMMIT.publish(storage, slow, b"old")
    COMMIT.abandon(storage, slow)
    assert everything(storage) == below("7", NEW)


def test_abandoning_leaves_nothing(storage):
    staging = written(storage, "7", NEW)
    COMMIT.abandon(storage, staging)
    COMMIT.abandon(storage, staging)
    assert list(storage.children("")) == []


def test_overwriting_replaces_the_former_checkpoint(storage):
    save(storage, "7", OLD)
    save(storage, "7", NEW, overwrite=True)
    assert everything(storage) == below("7", NEW)


def test_overwriting_what_is_not_there_saves(storage):
    save(storage, "7", NEW, overwrite=True)
    assert everything(storage) == below("7", NEW)


@pytest.mark.parametrize("key", ["7", "7/notes.txt"])
def test_what_is_no_checkpoint_is_refused_before_anything_is_written(storage, key):
    storage.write(key, [b"mine"])
    with pytest.raises(AlreadyExistsError, match=r"it is a file|it holds 'notes.txt'") as caught:
        COMMIT.stage(storage, "7", attempts.new_attempt())
    assert "only a checkpoint can be overwritten" in caught.value.__notes__[0]
    assert everything(storage) == {key: b"mine"}


@pytest.mark.parametrize("key", ["7", "7/notes.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_checkpoint_is_never_replaced(tmp_path, key, overwrite):
    storage = PosixStorage(f"file://{tmp_path}")
    staging = written(storage, "7", NEW)
    storage.write(key, [b"mine"])
    with pytest.raises(AlreadyExistsError, match=r"it is a file|it holds 'notes.txt'") as caught:
        COMMIT.publish(storage, staging, b"new", overwrite=overwrite)
    assert "only a checkpoint can be overwritten" in caught.value.__notes__[0]
    assert (tmp_path / key).read_bytes() == b"mine"


@pytest.mark.parametrize("kernel", ["renameat2", "old kernel"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_takes_the_place_of_an_empty_directory(tmp_path, request, kernel, overwrite):
    if kernel == "old kernel":
        request.getfixturevalue("old_kernel")
    storage = PosixStorage(f"file://{tmp_path}")
    (tmp_path / "7").mkdir()
    save(storage, "7", NEW, overwrite=overwrite)
    assert everything(storage) == below("7", NEW)
    assert list(storage.children("")) == ["7/"]


@pytest.mark.parametrize("kernel", ["renameat2", "old kernel"])
def test_a_linked_checkpoint_is_read_and_never_replaced(tmp_path, request, kernel):
    if kernel == "old kernel":
        request.getfixturevalue("old_kernel")
    storage = PosixStorage(f"file://{tmp_path}")
    save(storage, "7", OLD)
    (tmp_path / "latest").symlink_to("7")
    assert readable(storage, "latest") == OLD
    with pytest.raises(StorageError, match="latest' is a link"):
        save(storage, "latest", NEW, overwrite=True)
    with pytest.raises(StorageError, match="latest' is a link"):
        COMMIT.delete(storage, "latest")
    assert readable(storage, "7") == readable(storage, "latest") == OLD


def test_a_name_too_long_is_refused_before_anything_is_written(tmp_path):
    storage = PosixStorage(f"file://{tmp_path}")
    with pytest.raises(StorageError, match="has 181 bytes, and 179 are allowed") as caught:
        save(storage, "é" * 90 + "x", NEW)
    assert "up to 76 bytes are added" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []
    save(storage, "k" * 179, OLD)
    save(storage, "k" * 179, NEW, overwrite=True)
    COMMIT.delete(storage, "k" * 179)
    assert list(tmp_path.iterdir()) == []


def test_mapped_files_survive_overwriting_and_deleting(tmp_path):
    storage = PosixStorage(f"file://{tmp_path}")
    save(storage, "7", OLD)
    first = storage.map("7/a")
    save(storage, "7", NEW, overwrite=True)
    second = storage.map("7/a")
    COMMIT.delete(storage, "7")
    assert (bytes(first), bytes(second)) == (OLD["a"], NEW["a"])


# --- deleting --------------------------------------------------------------------------------------------------------


def test_deleting_removes_one_checkpoint(storage):
    save(storage, "7", OLD)
    save(storage, "70", NEW)
    for _ in range(2):
        COMMIT.delete(storage, "7")
        assert everything(storage) == below("70", NEW)


def test_what_is_no_checkpoint_is_not_deleted(storage):
    storage.write("7/notes.txt", [b"mine"])
    with pytest.raises(InvalidLayoutError, match=COMMIT_OBJECT):
        COMMIT.delete(storage, "7")
    assert everything(storage) == {"7/notes.txt": b"mine"}


def test_a_deleted_checkpoint_does_not_come_back(storage):
    save(storage, "7", NEW)
    for key, data in OLD.items():
        storage.write(f"7.orbax-checkpoint-tmp-{GONE}.old/{key}", [data])
    COMMIT.delete(storage, "7")
    assert readable(storage, "7") == {}
    assert everything(storage) == {}


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_only_names_of_our_form_are_ours(storage):
    names = [
        "x.orbax-checkpoint-tmp",
        "7.orbax-checkpoint-tmp-3",
        "7.orbax-checkpoint-tmp-1700000000",
        f"7.orbax-checkpoint-tmp-{GONE}.new",
        f"7.orbax-checkpoint-tmp-{GONE}x",
        f".orbax-checkpoint-tmp-{GONE}",
        f"7-{GONE}",
    ]
    for name in names:
        storage.write(f"{name}/k", [b""])
        assert not COMMIT.clear(storage, Leftover(f"{name}/", "7", GONE, dead=True, reason="a lie"))
    storage.write(f"7.orbax-checkpoint-tmp-{GONE}", [b"a file"])
    assert list(COMMIT.leftovers(storage, older_than=-1)) == []
    assert len(everything(storage)) == len(names) + 1


def test_a_dead_attempt_is_cleared_and_a_living_one_kept(storage):
    written(storage, "6", OLD, GONE)
    living = written(storage, "7", NEW)
    found = {left.name: left for left in COMMIT.leftovers(storage, older_than=attempts.DAY)}
    assert (found["6"].dead, found["6"].attempt, found["6"].reason.endswith("hours ago")) == (True, GONE, True)
    assert (found["7"].dead, found["7"].prefix) == (False, living.prefix)
    assert COMMIT.clear(storage, found["6"])
    assert not COMMIT.clear(storage, found["6"])
    COMMIT.publish(storage, living, b"new")
    assert everything(storage) == below("7", NEW)
    assert not COMMIT.clear(storage, found["7"])
    assert everything(storage) == below("7", NEW)


def test_a_writer_that_was_swept_never_publishes_the_rest(storage):
    staging = written(storage, "7", {"a": b"1"})
    assert sweep(storage) == [True]
    storage.write(staging.prefix + "d", [b"2"])  # it does not know, and writes on
    with pytest.raises(AbortedError, match="7"):
        COMMIT.publish(storage, staging, b"new")
    COMMIT.abandon(storage, staging)
    assert everything(storage) == {}


def test_what_lies_under_a_name_is_not_lost_for_a_former_checkpoint(storage):
    storage.write("7/notes.txt", [b"mine"])
    for key, data in OLD.items():
        storage.write(f"7.orbax-checkpoint-tmp-{GONE}.old/{key}", [data])
    before = everything(storage)
    assert sweep(storage) == [False]
    assert everything(storage) == before


def test_a_save_without_overwriting_respects_a_former_checkpoint(storage):
    for key, data in OLD.items():
        storage.write(f"7.orbax-checkpoint-tmp-{GONE}.old/{key}", [data])
    assert readable(storage, "7") == OLD
    with pytest.raises(AlreadyExistsError):
        save(storage, "7", NEW)
    assert readable(storage, "7") == OLD
    sweep(storage)
    assert everything(storage) == below("7", OLD)


# --- every point at which it can be cut off --------------------------------------------------------------------------


class Died(BaseException):
    """The process ended here."""


class Watched:
    """A storage that calls before every change; it can do what the one below can."""

    def __init__(self, storage, before):
        self._storage = storage
        self._before = before

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def write(self, *args):
        self._before()
        self._storage.write(*args)

    def delete(self, *args):
        self._before()
        self._storage.delete(*args)

    def rename(self, *args):
        self._before()
        self._storage.rename(*args)

    def exchange(self, *args):
        self._before()
        return self._storage.exchange(*args)


def at(count, act):
    """Return a function that acts when it is called for that time, counted from 0."""
    left = iter([*[int] * count, act])

    def called():
        next(left, int)()

    return called


def die():
    raise Died


def until_it_passes(storage, act):
    """Act with a storage where the process dies at the first change, the second, and so on; yield after each death."""
    for count in range(100):
        try:
            act(Watched(storage, at(count, die)))
        except Died:
            yield count
        else:
            return
    raise AssertionError("it never passes")


@pytest.mark.parametrize("healed_by", ["sweep", "overwrite", "plain save", "delete"])
def test_a_cut_off_overwrite_leaves_old_or_new_and_is_healed(storage, healed_by):
    save(storage, "6", OLD)
    save(storage, "7", OLD)
    points = 0
    for _ in until_it_passes(storage, lambda watched: save(watched, "7", NEW, overwrite=True)):
        points += 1
        found = readable(storage, "7")
        assert found in (OLD, NEW)
        if healed_by == "overwrite":
            save(storage, "7", OLD, overwrite=True)
        elif healed_by == "plain save":
            with pytest.raises(AlreadyExistsError):
                save(storage, "7", {COMMIT_OBJECT: b"third"})
            assert readable(storage, "7") == found
        elif healed_by == "delete":
            COMMIT.delete(storage, "7")
            assert readable(storage, "7") == {}
            save(storage, "7", OLD)
        sweep(storage)
        expected = found if healed_by in {"sweep", "plain save"} else OLD
        assert everything(storage) == below("6", OLD) | below("7", expected)
        if expected == NEW:
            save(storage, "7", OLD, overwrite=True)
    assert points > 5
    assert everything(storage) == below("6", OLD) | below("7", NEW)


def test_a_cut_off_save_leaves_all_or_nothing(storage):
    save(storage, "6", OLD)
    points = 0
    for _ in until_it_passes(storage, lambda watched: save(watched, "7", NEW)):
        points += 1
        assert readable(storage, "7") == {}
        sweep(storage)
        assert everything(storage) == below("6", OLD)
    assert points > 5


def test_a_cut_off_sweep_or_deletion_is_gone_on_with(storage):
    def act(watched):
        written(storage, "7", NEW, GONE)
        save(storage, "8", OLD)
        sweep(watched)
        COMMIT.delete(watched, "8")

    for _ in until_it_passes(storage, act):
        assert readable(storage, "7") == {}
        assert readable(storage, "8") in ({}, OLD)
        sweep(storage)
        COMMIT.delete(storage, "8")
        assert everything(storage) == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_sweep_at_any_moment_leaves_all_or_nothing(storage, overwrite):
    outcomes = set()
    for count in range(20):
        if overwrite:
            save(storage, "7", OLD)
        watched = Watched(storage, at(count, lambda: sweep(storage)))
        staging = written(storage, "7", NEW)
        try:
            COMMIT.publish(watched, staging, b"new", overwrite=overwrite)
            expected = NEW
        except AbortedError:
            COMMIT.abandon(storage, staging)
            expected = OLD if overwrite else {}
        outcomes.add(expected[COMMIT_OBJECT] if expected else b"")
        assert readable(storage, "7") == expected
        sweep(storage)
        assert everything(storage) == below("7", expected)
        COMMIT.delete(storage, "7")
    assert outcomes == {b"new", b"old" if overwrite else b""}


# --- replies that are lost, and syncs that fail ----------------------------------------------------------------------


class Lying(Watched):
    """A storage that renames a staging directory, and says that it did not."""

    def __init__(self, storage, error):
        super().__init__(storage, lambda: None)
        self._error = error

    def rename(self, source, target):
        self._storage.rename(source, target)
        if target == "7/":
            raise self._error


@pytest.mark.parametrize("reply", [AlreadyExistsError("taken"), NotFoundError("gone")])
def test_a_lost_reply_is_not_a_lost_race(storage, reply):
    save(Lying(storage, reply), "7", NEW)
    assert everything(storage) == below("7", NEW)


def test_a_rename_that_could_not_be_synced_has_an_unknown_outcome(storage):
    with pytest.raises(OutcomeUnknownError, match="/7'") as caught:
        save(Lying(storage, StorageError("input/output error")), "7", NEW)
    assert isinstance(caught.value.__cause__, StorageError)
    assert readable(storage, "7") == NEW


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_full_disk_harms_no_older_checkpoint(tmpfs):
    storage = PosixStorage(f"file://{tmpfs('size=512k')}")
    save(storage, "6", OLD)
    staging = written(storage, "7", NEW)
    with pytest.raises(StorageFullError):
        storage.write(f"{staging.prefix}large", [bytes(600_000)])
    COMMIT.abandon(storage, staging)
    assert everything(storage) == below("6", OLD)


@pytest.mark.root
def test_a_read_only_disk_harms_no_older_checkpoint(tmpfs):
    storage = PosixStorage(f"file://{tmpfs('size=512k')}")
    save(storage, "6", OLD)
    tmpfs("remount,ro")
    with pytest.raises(StorageDeniedError):
        save(storage, "7", NEW)
    with pytest.raises(StorageDeniedError):
        save(storage, "6", NEW, overwrite=True)
    assert everything(storage) == below("6", OLD)


# --- races of processes ----------------------------------------------------------------------------------------------

RACER = """
import os, sys
from milepost import attempts
from milepost.errors import AlreadyExistsError
from milepost_posix import PosixStorage, RenameCommit, _system

url, overwrite, kernel, me = sys.argv[1], sys.argv[2] == "overwrite", sys.argv[3], sys.argv[4].encode()
if kernel == "old kernel":
    _system._renameat2 = lambda: None
storage, commit = PosixStorage(url), RenameCommit()
for line in sys.stdin:
    staging = commit.stage(storage, line.strip(), attempts.new_attempt())
    for number in range(3):
        storage.write(f"{staging.prefix}{number}", [me])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        commit.publish(storage, staging, me, overwrite=overwrite)
        print("won", flush=True)
    except AlreadyExistsError:
        commit.abandon(storage, staging)
        print("lost", flush=True)
"""


@pytest.mark.parametrize("kernel", ["renameat2", "old kernel"])
@pytest.mark.parametrize("mode", ["plain", "overwrite"])
def test_of_racing_processes_one_wins_and_nothing_mixes(tmp_path, mode, kernel):
    storage = PosixStorage(f"file://{tmp_path}")
    command = [sys.executable, "-c", RACER, storage.url, mode, kernel]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    racers = [subprocess.Popen([*command, str(me)], **pipes) for me in range(4)]

    def together(line):
        for racer in racers:
            racer.stdin.write(f"{line}\n")
        return [racer.stdout.readline().strip() for racer in racers]

    try:
        for count in range(25):
            name = str(count) if mode == "plain" else "7"
            assert together(name) == ["ready"] * 4
            said = together("go")
            files = readable(storage, name)
            assert sorted(files) == ["0", "1", "2", COMMIT_OBJECT]
            (winner,) = set(files.values())
            assert said[int(winner)] == "won"
            assert set(said) <= {"won", "lost"}
            if mode == "plain":
                assert said.count("won") == 1
    finally:
        for racer in racers:
            racer.stdin.close()
            racer.wait(30)
            racer.stdout.close()
    sweep(storage)
    assert sorted(storage.children("")) == sorted(f"{n}/" for n in (range(25) if mode == "plain" else [7]))
