from __future__ import annotations

import contextlib
import itertools

import pytest
from milepost import attempts, commit
from milepost.commit import CreateCommit, MarkerCommit
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    ConfigError,
    OutcomeUnknownError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from milepost.generic import FsspecStorage
from milepost.memory import MemoryStorage
from milepost.protocols import COMMIT_OBJECT, CreatesOnly, ReplacesObjects
from milepost.testing.commit import CommitContract, dead_attempt, look, save, sweep, write
from milepost.testing.faults import CuttingStorage, LostReplyStorage, PowerCut, WrappedStorage, emptied, keys
from milepost_posix.rename import RenameCommit


class CreateOnlyStorage(WrappedStorage):
    """A store that has create-only writes and no compare-and-swap."""

    def __new__(cls, storage):
        return object.__new__(cls)

    def create(self, key, buffers):
        self.wrapped.create(key, buffers)


@pytest.fixture
def memory(request):
    storage = MemoryStorage(f"memory://tests/commit/{request.node.name}")
    yield storage
    emptied(storage)


class OnMemory(CommitContract):
    @pytest.fixture
    def storage(self, memory):
        return memory


class TestCreateOnMemory(OnMemory):
    @pytest.fixture
    def strategy(self):
        return CreateCommit()

    @pytest.fixture
    def reaper(self):
        return CreateCommit(grace=0)


class TestCreateWithoutCompareAndSwap(TestCreateOnMemory):
    overwrites = False

    @pytest.fixture
    def storage(self, memory):
        storage = CreateOnlyStorage(memory)
        assert isinstance(storage, CreatesOnly)
        assert not isinstance(storage, ReplacesObjects)
        return storage


class TestMarkerOnMemory(OnMemory):
    races = False

    @pytest.fixture
    def strategy(self):
        return MarkerCommit()

    @pytest.fixture
    def reaper(self):
        return MarkerCommit(grace=0)


class TestMarkerOnAnyFileSystem(TestMarkerOnMemory):
    @pytest.fixture(params=["file", "memory"])
    def storage(self, request, tmp_path):
        storage = FsspecStorage(f"{request.param}://{tmp_path}/root")
        yield storage
        emptied(storage)


class TestRenameOnMemory(OnMemory):
    @pytest.fixture
    def strategy(self):
        return RenameCommit()


# --- what is particular to `create` and `marker` ---------------------------------------------------------------------


@pytest.fixture(params=[CreateCommit, MarkerCommit])
def strategy(request):
    return request.param()


def staged(storage, strategy, text, attempt=None):
    staging = strategy.stage(storage, "7", attempt or dead_attempt())
    return staging, write(storage, staging, text)


def test_both_strategies_register_under_their_names():
    offered = {}
    commit.register_commit(offered.__setitem__)
    assert offered == {"create": CreateCommit, "marker": MarkerCommit}


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_lost_reply_ends_in_success(memory, strategy, overwrite):
    tried = 0
    for at in itertools.count():
        emptied(memory)
        if overwrite:
            save(memory, strategy, "7", "old")
        staging, manifest = staged(memory, strategy, "new")
        lossy = LostReplyStorage(memory, at)
        strategy.publish(lossy, staging, manifest, overwrite=overwrite)
        assert look(memory, strategy, "7") == "new"
        tried += lossy.changes > at
        if lossy.changes <= at:
            break
    assert tried >= 2  # the verdict and the commit object


@pytest.mark.parametrize("removed", [False, True])
def test_a_writer_that_was_overwritten_before_its_reply_was_lost_does_not_commit_again(memory, strategy, removed):
    class Overtaken(WrappedStorage):
        def change(self, act):
            done = act()
            if look(memory, strategy, "7") == "first":
                # Begin, two files, seal, retire the former attempt, replace the commit object; and two probes.
                done_by = 8 if isinstance(strategy, CreateCommit) else 6
                with contextlib.suppress(PowerCut):
                    save(CuttingStorage(memory, None if removed else done_by), strategy, "7", "second", overwrite=True)
                raise StorageError("the connection was closed before the reply came")
            return done

    save(memory, strategy, "7", "old")
    staging, manifest = staged(memory, strategy, "first")
    with pytest.raises(OutcomeUnknownError) if removed else contextlib.nullcontext():
        strategy.publish(Overtaken(memory), staging, manifest, overwrite=True)
    assert look(memory, strategy, "7") == "second"
    sweep(memory, strategy)
    assert look(memory, strategy, "7") == "second"


def test_a_writer_whose_checkpoint_was_deleted_before_its_reply_was_lost_does_not_commit_again(memory, strategy):
    class Deleted(WrappedStorage):
        def change(self, act):
            done = act()
            if look(memory, strategy, "7") == "new":
                strategy.delete(memory, "7")
                raise StorageError("the connection was closed before the reply came")
            return done

    staging, manifest = staged(memory, strategy, "new")
    with pytest.raises(OutcomeUnknownError):
        strategy.publish(Deleted(memory), staging, manifest)
    assert look(memory, strategy, "7") is None


class Failing(WrappedStorage):
    """A store that refuses commit objects, and perhaps all reading after that."""

    def __init__(self, storage, error, *, mute=False):
        super().__init__(storage)
        self.error, self.mute, self.refused = error, mute, 0

    def write(self, key, buffers):
        self.refuse(key)
        super().write(key, buffers)

    def create(self, key, buffers):
        self.refuse(key)
        self.wrapped.create(key, buffers)

    def refuse(self, key):
        if key.endswith(COMMIT_OBJECT):
            self.refused += 1
            raise self.error

    def ask(self, act):
        if self.mute and self.refused:
            raise StorageError("down")
        return act()


@pytest.mark.parametrize(
    ("error", "mute", "raised"),
    [
        (StorageError("down"), False, OutcomeUnknownError),
        (StorageError("down"), True, OutcomeUnknownError),
        (StorageFullError("full"), False, StorageFullError),
    ],
)
def test_a_store_that_fails_for_good_ends_in_an_error_that_says_what_is_known(memory, strategy, error, mute, raised):
    staging, manifest = staged(memory, strategy, "new")
    failing = Failing(memory, error, mute=mute)
    with pytest.raises(raised):
        strategy.publish(failing, staging, manifest)
    assert 0 < failing.refused < 100
    assert look(memory, strategy, "7") is None


def test_abandoning_leaves_the_data_of_a_commit_that_may_be_on_its_way(memory, strategy):
    staging, manifest = staged(memory, strategy, "new")
    with pytest.raises(OutcomeUnknownError):
        strategy.publish(Failing(memory, StorageError("down")), staging, manifest)
    strategy.abandon(memory, staging)
    memory.write(f"7/{COMMIT_OBJECT}", [manifest])  # it arrives
    assert look(memory, strategy, "7") == "new"


def test_a_sealed_attempt_is_left_alone_for_its_grace(memory, strategy):
    staging, manifest = staged(memory, strategy, "new")
    with pytest.raises(OutcomeUnknownError):
        strategy.publish(Failing(memory, StorageError("down")), staging, manifest)
    (leftover,) = strategy.leftovers(memory, older_than=0)
    assert not leftover.dead
    assert "may yet come" in leftover.reason
    (leftover,) = type(strategy)(grace=0).leftovers(memory, older_than=attempts.DAY)
    assert not leftover.dead
    (leftover,) = type(strategy)(grace=0).leftovers(memory, older_than=0)
    assert leftover.dead
    assert not strategy.clear(memory, leftover)
    assert type(strategy)(grace=0).clear(memory, leftover)
    assert keys(memory) == []


def test_a_swept_attempt_is_told_so_even_when_no_verdict_is_left(memory, strategy):
    staging, manifest = staged(memory, strategy, "zombie")
    sweep(memory, strategy)
    assert keys(memory) == []
    with pytest.raises(AbortedError) as caught:
        strategy.publish(memory, staging, manifest)
    assert caught.value.__notes__ == ["save again"]
    assert keys(memory) == []


def test_an_overwrite_that_the_store_cannot_do_names_the_way_out(memory):
    storage = CreateOnlyStorage(memory)
    save(storage, CreateCommit(), "7", "old")
    with pytest.raises(AlreadyExistsError) as caught:
        save(storage, CreateCommit(), "7", "new", overwrite=True)
    assert "delete that checkpoint first" in caught.value.__notes__[0]


def test_publishing_twice_is_publishing_once(memory, strategy):
    staging, manifest = staged(memory, strategy, "new")
    strategy.publish(memory, staging, manifest)
    strategy.publish(memory, staging, manifest)
    assert look(memory, strategy, "7") == "new"


def test_a_second_marker_writer_is_noticed_if_it_comes_at_the_same_time(memory):
    class Intruded(WrappedStorage):
        def write(self, key, buffers):
            super().write(key, buffers)
            if key.endswith(COMMIT_OBJECT):
                self.wrapped.write(key, [intruder])

    other, intruder = staged(memory, MarkerCommit(), "intruder")
    staging, manifest = staged(memory, MarkerCommit(), "new")
    assert other != staging
    with pytest.raises(AlreadyExistsError):
        MarkerCommit().publish(Intruded(memory), staging, manifest)
    assert look(memory, MarkerCommit(), "7") == "intruder"


# --- stores that do not keep what `create` needs ---------------------------------------------------------------------


class Careless(WrappedStorage):
    """A store that accepts conditions and ignores them."""

    def create(self, key, buffers):
        self.wrapped.write(key, buffers)

    def replace(self, key, buffers, version):
        self.wrapped.write(key, buffers)


class CarelessReplacer(WrappedStorage):
    """A store that honours create-only requests, and ignores the version of a replacement."""

    def replace(self, key, buffers, version):
        del version
        self.change(lambda: self.wrapped.write(key, buffers))


def test_a_store_that_ignores_create_only_requests_is_refused_before_a_byte_is_written(memory):
    with pytest.raises(ConfigError, match="creates an object though there is one") as caught:
        save(Careless(memory), CreateCommit(), "7", "new")
    assert "commit = 'marker'" in caught.value.__notes__[0]
    assert keys(memory) == []
    save(Careless(memory), MarkerCommit(), "7", "new")
    assert look(memory, MarkerCommit(), "7") == "new"


def test_a_store_that_ignores_versions_is_refused_only_an_overwrite(memory):
    storage, strategy = CarelessReplacer(memory), CreateCommit()
    save(storage, strategy, "7", "old", overwrite=True)
    before = keys(memory)
    staging, manifest = staged(storage, strategy, "new")
    with pytest.raises(ConfigError, match="replaces an object whatever its version is"):
        strategy.publish(storage, staging, manifest, overwrite=True)
    strategy.abandon(storage, staging)
    assert look(memory, strategy, "7") == "old"
    assert keys(memory) == before


class Unreliable(WrappedStorage):
    """A store whose first requests to create or replace fail, each perhaps after it was carried out."""

    def __init__(self, storage, failures, *, done, kind=StorageError):
        super().__init__(storage)
        self.failures, self.done, self.kind, self.asked = failures, done, kind, 0

    def change(self, act):
        self.asked += 1
        if self.asked > self.failures:
            return act()
        if self.done:
            act()
        raise self.kind("the connection was closed before the reply came")


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("failures", [1, 3])
def test_a_failure_proves_neither_that_a_condition_is_honoured_nor_that_it_is_not(memory, failures, done):
    staging = CreateCommit().stage(Unreliable(memory, failures, done=done), "7", dead_attempt())
    assert keys(memory) == [f"{staging.prefix}begun"]
    with pytest.raises(ConfigError):
        CreateCommit().stage(Unreliable(Careless(memory), failures, done=done), "7", dead_attempt())


@pytest.mark.parametrize("kind", [StorageError, StorageFullError, StorageDeniedError])
def test_a_store_that_never_answers_is_not_asked_for_ever_and_nothing_is_left(memory, kind):
    storage = Unreliable(memory, 1000, done=False, kind=kind)
    with pytest.raises(kind):
        CreateCommit().stage(storage, "7", dead_attempt())
    assert storage.asked < 20
    assert keys(memory) == []


def test_a_save_that_is_swept_while_it_begins_is_told_so(memory):
    class Swept(WrappedStorage):
        def change(self, act):
            done = act()
            if self.wrapped.children("7/"):
                sweep(self.wrapped, CreateCommit())
                self.change = lambda act: act()
            return done

    with pytest.raises(AbortedError):
        CreateCommit().stage(Swept(memory), "7", dead_attempt())
    assert keys(memory) == []
