from __future__ import annotations

import functools
import itertools
import math

import milepost
import numpy as np
import pytest
from milepost import attempts, fixed
from milepost.commit import CreateCommit
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    ConfigError,
    InvalidLayoutError,
    OutcomeUnknownError,
    StorageError,
)
from milepost.fixed import CLAIM, FixedCommit
from milepost.memory import MemoryStorage
from milepost.protocols import COMMIT_OBJECT, Upload
from milepost.testing.commit import (
    CommitContract,
    Scenario,
    dead_attempt,
    look,
    power_cuts,
    save,
    sweep,
    write,
)
from milepost.testing.faults import (
    CuttingStorage,
    LostReplyStorage,
    PowerCut,
    WrappedStorage,
    emptied,
    interleave,
    keys,
    orders,
)

NOTHING_LIVES = -1.0
ELSEWHERE = "0badcafe"


@pytest.fixture
def memory(request):
    storage = MemoryStorage(f"memory://tests/fixed/{request.node.name}")
    yield storage
    emptied(storage)


@pytest.fixture
def strategy():
    return FixedCommit()


@pytest.fixture
def reaper():
    return FixedCommit(grace=0)


class TestFixedOnMemory(CommitContract):
    overwrites = False
    shares = False

    @pytest.fixture
    def storage(self, memory):
        return memory

    @pytest.fixture
    def strategy(self):
        return FixedCommit()

    @pytest.fixture
    def reaper(self):
        return FixedCommit(grace=0)


def living_elsewhere():
    time, _, pid, random = attempts.new_attempt().split("-")
    return f"{time}-{ELSEWHERE}-{pid}-{random}"


def living_here():
    return attempts.new_attempt()


def claim(storage, name="7"):
    return bytes(storage.read(f"{name}/{CLAIM}")).decode()


def staged(storage, strategy, text, attempt=None):
    staging = strategy.stage(storage, "7", attempt or dead_attempt())
    return staging, write(storage, staging, text)


# --- where things are ------------------------------------------------------------------------------------------------


def test_it_registers_under_its_name():
    offered = {}
    fixed.register_commit(offered.__setitem__)
    assert offered == {"fixed": FixedCommit}


def test_files_are_directly_below_the_name_beside_the_claim(memory, strategy):
    save(memory, strategy, "7", "new")
    assert keys(memory) == sorted(f"7/{key}" for key in (COMMIT_OBJECT, CLAIM, "arrays-0", "state/arrays 1"))


@pytest.mark.parametrize("key", ["7/notes/a", "7/_METADATA"])
def test_a_name_below_which_something_is_cannot_be_claimed(memory, strategy, key):
    memory.write(key, [b"foreign"])
    with pytest.raises(AlreadyExistsError, match="nobody has a claim to it"):
        save(memory, strategy, "7", "new")
    assert keys(memory) == [key]


def test_an_overwrite_is_refused_before_a_byte_is_written_and_names_the_way_out(memory, strategy):
    save(memory, strategy, "7", "old")
    before = keys(memory)
    with pytest.raises(AlreadyExistsError) as caught:
        strategy.stage(memory, "7", dead_attempt())
    assert "delete that checkpoint first" in caught.value.__notes__[0]
    assert keys(memory) == before


def test_publishing_twice_is_publishing_once(memory, strategy):
    staging, manifest = staged(memory, strategy, "new")
    strategy.publish(memory, staging, manifest)
    strategy.publish(memory, staging, manifest)
    assert look(memory, strategy, "7") == "new"


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [living_here, living_elsewhere])
def test_a_second_save_is_refused_while_the_first_may_live(memory, strategy, attempt):
    first, manifest = staged(memory, strategy, "first", attempt())
    before = keys(memory)
    with pytest.raises(AlreadyExistsError, match=first.attempt) as caught:
        strategy.stage(memory, "7", living_here())
    assert "grace" in caught.value.__notes__[0]
    assert keys(memory) == before
    strategy.publish(memory, first, manifest)
    assert look(memory, strategy, "7") == "first"


def test_the_next_save_takes_the_place_of_a_dead_one_and_removes_what_it_left(memory, strategy):
    dead, manifest = staged(memory, strategy, "dead")
    memory.write(f"{dead.prefix}more/of/it", [b"dead"])
    save(memory, strategy, "7", "new")
    assert look(memory, strategy, "7") == "new"
    assert len(keys(memory)) == 4
    with pytest.raises(AlreadyExistsError, match="taken for dead, and another checkpoint is there"):
        strategy.publish(memory, dead, manifest)
    strategy.abandon(memory, dead)
    assert look(memory, strategy, "7") == "new"


def test_a_save_that_lost_its_claim_to_one_that_is_under_way_is_aborted(memory, strategy):
    dead, manifest = staged(memory, strategy, "dead")
    other, right = staged(memory, strategy, "other", living_here())
    with pytest.raises(AbortedError):
        strategy.publish(memory, dead, manifest)
    strategy.abandon(memory, dead)
    strategy.publish(memory, other, right)
    assert look(memory, strategy, "7") == "other"


def test_grace_says_when_a_writer_elsewhere_is_dead(memory, reaper):
    staged(memory, reaper, "old", living_elsewhere())
    with pytest.raises(AlreadyExistsError):
        save(memory, FixedCommit(grace=3600), "7", "new")
    save(memory, FixedCommit(grace=NOTHING_LIVES), "7", "new")
    assert look(memory, reaper, "7") == "new"


def test_a_sealed_claim_is_left_alone_for_its_grace(memory, strategy, reaper):
    class Failing(WrappedStorage):
        def create(self, key, buffers):
            if key.endswith(COMMIT_OBJECT):
                raise StorageError("down")
            self.wrapped.create(key, buffers)

    staging, manifest = staged(memory, strategy, "new")
    with pytest.raises(OutcomeUnknownError):
        strategy.publish(Failing(memory), staging, manifest)
    strategy.abandon(memory, staging)
    with pytest.raises(AlreadyExistsError, match="may yet come"):
        save(memory, strategy, "7", "other")
    (leftover,) = strategy.leftovers(memory, older_than=0)
    assert not leftover.dead
    (leftover,) = reaper.leftovers(memory, older_than=0)
    assert leftover.dead
    assert not strategy.clear(memory, leftover)
    memory.write(f"7/{COMMIT_OBJECT}", [manifest])  # it arrives
    assert not reaper.clear(memory, leftover)
    assert look(memory, strategy, "7") == "new"
    memory.delete(f"7/{COMMIT_OBJECT}")
    assert reaper.clear(memory, leftover)
    assert keys(memory) == []


def test_a_commit_that_arrives_while_a_sweep_takes_the_claim_is_handed_back(memory, reaper):
    staging, manifest = staged(memory, reaper, "new")
    memory.replace(f"7/{CLAIM}", [f"{staging.attempt} sealed 0\n".encode()], memory.version(f"7/{CLAIM}"))
    (leftover,) = reaper.leftovers(memory, older_than=0)

    class Late(WrappedStorage):
        def replace(self, key, buffers, version):
            self.wrapped.replace(key, buffers, version)
            memory.write(f"7/{COMMIT_OBJECT}", [manifest])

    assert not reaper.clear(Late(memory), leftover)
    assert look(memory, reaper, "7") == "new"
    assert claim(memory) == f"{staging.attempt} sealed 0\n"


def test_a_claim_that_cannot_be_read_protects_everything_beside_it(memory, reaper):
    for key in (f"7/{CLAIM}", "7/arrays-0"):
        memory.write(key, [b"from the future"])
    (leftover,) = reaper.leftovers(memory, older_than=NOTHING_LIVES)
    assert (leftover.dead, "cannot be read" in leftover.reason) == (False, True)
    with pytest.raises(AlreadyExistsError, match="cannot be read"):
        save(memory, reaper, "7", "new")
    assert not reaper.clear(memory, leftover)
    assert len(keys(memory)) == 2


def test_what_a_swept_writer_wrote_late_goes_when_it_abandons(memory, strategy):
    staging, manifest = staged(memory, strategy, "zombie")
    sweep(memory, strategy)
    memory.write(f"{staging.prefix}late", [b"zombie"])
    with pytest.raises(AbortedError):
        strategy.publish(memory, staging, manifest)
    strategy.abandon(memory, staging)
    assert keys(memory) == []
    save(memory, strategy, "7", "again")
    assert look(memory, strategy, "7") == "again"


def test_a_sweep_spares_who_has_the_name_by_now(memory, strategy):
    staged(memory, strategy, "dead")
    (leftover,) = strategy.leftovers(memory, older_than=attempts.DAY)
    alive, manifest = staged(memory, strategy, "alive", living_here())
    assert not strategy.clear(memory, leftover)
    strategy.publish(memory, alive, manifest)
    assert look(memory, strategy, "7") == "alive"


def test_whoever_removes_and_is_taken_for_dead_leaves_the_claim_of_his_successor(memory, strategy):
    successor = f"{living_here()} writing\n"

    class Overtaken(WrappedStorage):
        def delete(self, key):
            super().delete(key)
            if not key.endswith(CLAIM):
                memory.write(f"7/{CLAIM}", [successor.encode()])

    save(memory, strategy, "7", "old")
    strategy.delete(Overtaken(memory), "7")
    assert {f"7/{CLAIM}": successor} == {key: claim(memory) for key in keys(memory)}


@pytest.mark.parametrize("allowed", [True, False])
def test_unfinished_uploads_of_the_dead_go_before_the_data(memory, strategy, allowed):
    class Uploading(WrappedStorage):
        unfinished = ["7/arrays-1"]  # noqa: RUF012 - one test's

        def uploads(self, prefix):
            if not allowed:
                raise StorageError("denied")
            return [Upload(key, "id", 0.0) for key in self.unfinished if key.startswith(prefix)]

        def abort_upload(self, upload):
            assert "7/arrays-0" in keys(memory)
            self.unfinished.remove(upload.key)

    storage = Uploading(memory)
    staged(storage, strategy, "dead")
    sweep(storage, strategy)
    assert (["7/arrays-1"] if not allowed else []) == storage.unfinished
    assert keys(memory) == []


# --- deletions -------------------------------------------------------------------------------------------------------


def test_a_deletion_that_was_cut_off_is_completed_by_the_next_anywhere_in_this_process(memory, strategy):
    for at in itertools.count():
        emptied(memory)
        save(memory, strategy, "7", "old")
        memory.write(f"7/state/{COMMIT_OBJECT}", [b"of the item"])
        cutting = CuttingStorage(memory, at)
        try:
            strategy.delete(cutting, "7")
        except PowerCut:
            assert look(memory, strategy, "7") in ("old", None)
            strategy.delete(memory, "7")
        else:
            break
        assert keys(memory) == []
    assert keys(memory) == []
    assert at > 5


def test_a_deletion_removes_commit_objects_first_then_those_of_items_and_the_claim_last(memory, strategy):
    save(memory, strategy, "7", "old")
    memory.write(f"7/state/{COMMIT_OBJECT}", [b"of the item"])
    gone = []

    class Noting(WrappedStorage):
        def change(self, act):
            before = keys(memory)
            done = act()
            gone.extend(sorted(set(before) - set(keys(memory))))
            return done

    strategy.delete(Noting(memory), "7")
    assert gone == [
        f"7/{COMMIT_OBJECT}",
        f"7/state/{COMMIT_OBJECT}",
        "7/arrays-0",
        "7/state/arrays 1",
        f"7/{CLAIM}",
    ]


def test_a_deletion_by_somebody_else_is_left_to_him_but_for_the_commit_object(memory, strategy):
    save(memory, strategy, "7", "old")
    memory.write(f"7/{CLAIM}", [f"{living_elsewhere()} removing\n".encode()])
    strategy.delete(memory, "7")
    assert look(memory, strategy, "7") is None
    assert len(keys(memory)) == 3
    with pytest.raises(AlreadyExistsError, match="it was being removed"):
        save(memory, strategy, "7", "new")


def test_a_save_under_way_is_no_checkpoint_that_could_be_deleted(memory, strategy):
    staging, manifest = staged(memory, strategy, "new")
    before = keys(memory)
    strategy.delete(memory, "7")
    assert keys(memory) == before
    strategy.publish(memory, staging, manifest)
    assert look(memory, strategy, "7") == "new"


def test_a_checkpoint_of_another_strategy_is_deleted_whole(memory, strategy):
    save(memory, CreateCommit(), "7", "old")
    strategy.delete(memory, "7")
    assert keys(memory) == []


def test_of_what_others_committed_only_the_commit_object_is_deleted(memory, strategy):
    for key in (f"7/{COMMIT_OBJECT}", "7/default/d/0"):
        memory.write(key, [b"Checkpoint commit was successful to 7"])
    strategy.delete(memory, "7")
    assert keys(memory) == ["7/default/d/0"]


# --- faults ----------------------------------------------------------------------------------------------------------


def replacing(storage, strategy):
    staging = strategy.stage(storage, "7", dead_attempt())
    write(storage, staging, "dead")


TAKING_OVER = Scenario("take over", replacing, lambda s, c, write_it: write_it(s, c, "7", "new"), (None, "new"), "new")


def test_the_power_may_be_cut_before_every_change_of_a_save_that_takes_over(memory, strategy, reaper):
    assert power_cuts(memory, strategy, TAKING_OVER, reaper=reaper) > 8


def commit_before_data(storage, strategy, name, text, *, overwrite=False):
    staging = strategy.stage(storage, name, dead_attempt())
    manifest = write(MemoryStorage("memory://tests/fixed/elsewhere"), staging, text)
    strategy.publish(storage, staging, manifest, overwrite=overwrite)
    write(storage, staging, text)


class ReleasesFirst(FixedCommit):
    def delete(self, storage, name):
        storage.delete(f"{name}/{CLAIM}")
        storage.delete(f"{name}/{COMMIT_OBJECT}")
        storage.delete(f"{name}/")


DELETING = Scenario(
    "delete", lambda s, c: save(s, c, "7", "old"), lambda s, c, _: c.delete(s, "7"), ("old", None), None
)


@pytest.mark.parametrize(
    ("case", "mistake", "save_it"),
    [(TAKING_OVER, FixedCommit(grace=0), commit_before_data), (DELETING, ReleasesFirst(grace=0), save)],
)
def test_a_strategy_with_a_mistake_is_caught(memory, case, mistake, save_it):
    with pytest.raises(AssertionError):
        power_cuts(memory, mistake, case, save_it=save_it)


@pytest.mark.parametrize("over", [False, True], ids=["free", "taken over"])
def test_every_lost_reply_ends_in_success(memory, strategy, over):
    for at in itertools.count():
        emptied(memory)
        if over:
            replacing(memory, strategy)
        lossy = LostReplyStorage(memory, at)
        staging = Retrying.stage(strategy, lossy, "7")
        strategy.publish(lossy, staging, write(memory, staging, "new"))
        assert look(memory, strategy, "7") == "new"
        if lossy.changes <= at:
            break
    assert at == (8 if over else 4)


class Retrying:
    """Saves again when the storage failed while it was made free, as a caller would."""

    @staticmethod
    def stage(strategy, storage, name):
        try:
            return strategy.stage(storage, name, dead_attempt())
        except StorageError:
            return strategy.stage(storage, name, dead_attempt())


class Careless(WrappedStorage):
    def create(self, key, buffers):
        self.wrapped.write(key, buffers)


class CarelessReplacer(WrappedStorage):
    def replace(self, key, buffers, version):
        del version
        self.wrapped.write(key, buffers)


@pytest.mark.parametrize(
    ("storage", "told"), [(Careless, "creates an object though"), (CarelessReplacer, "whatever its version is")]
)
def test_a_store_that_ignores_conditions_is_refused_before_a_byte_is_written(memory, strategy, storage, told):
    with pytest.raises(ConfigError, match=told):
        save(storage(memory), strategy, "7", "new")
    assert keys(memory) == []


@pytest.mark.parametrize("failures", [1, 3])
@pytest.mark.parametrize("done", [False, True])
def test_a_few_failures_are_no_reason_to_give_up(memory, strategy, failures, done):
    class Unreliable(WrappedStorage):
        left = failures

        def change(self, act):
            if not self.left:
                return act()
            self.left -= 1
            if done:
                act()
            raise StorageError("the connection was closed before the reply came")

    staging = strategy.stage(Unreliable(memory), "7", living_here())
    manifest = write(memory, staging, "new")
    strategy.publish(Unreliable(memory), staging, manifest)
    assert look(memory, strategy, "7") == "new"


# --- two writers, and a writer and a sweep ---------------------------------------------------------------------------


def changes(storage, act):
    counting = CuttingStorage(storage)
    act(counting)
    return counting.changes


def saver(strategy, text):
    return lambda storage: save(storage, strategy, "7", text, attempt=living_here())


def test_of_two_saves_exactly_one_wins_in_every_order_of_their_changes(memory, strategy):
    acts = [saver(strategy, "first"), saver(strategy, "second")]
    each = changes(memory, acts[0])
    # Whoever comes second stops at once: only the orders of the first few changes differ.
    tried = set()
    for order in orders(4, 4):
        emptied(memory)
        raised = interleave(memory, order, *acts)
        winners = [text for text, error in zip(("first", "second"), raised, strict=True) if error is None]
        assert [look(memory, strategy, "7")] == winners
        assert [type(error) for error in raised if error is not None] == [AlreadyExistsError]
        tried.update(winners)
    assert (tried, each) == ({"first", "second"}, 8)


def test_of_two_saves_exactly_one_wins_in_many_orders_of_all_their_calls(memory, strategy):
    acts = [saver(strategy, "first"), saver(strategy, "second")]
    for order in itertools.islice(orders(6, 6), 0, None, 7):
        emptied(memory)
        raised = interleave(memory, order, *acts, every_call=True)
        winners = [text for text, error in zip(("first", "second"), raised, strict=True) if error is None]
        assert [look(memory, strategy, "7")] == winners


def finishing(strategy, staging, storage):
    try:
        strategy.publish(storage, staging, write(storage, staging, "alive"))
    except AbortedError:
        strategy.abandon(storage, staging)
        raise


def sweeping(strategy, storage):
    sweep(storage, strategy, older_than=NOTHING_LIVES)


def swept(storage, strategy):
    counts = {"alive": 0, None: 0, "late": 0}
    for order in orders(4, 6):
        emptied(storage)
        staging = strategy.stage(storage, "7", living_here())
        acts = [functools.partial(finishing, strategy, staging), functools.partial(sweeping, strategy)]
        write_error, sweep_error = interleave(storage, order, *acts)
        assert sweep_error is None
        assert write_error is None or isinstance(write_error, AbortedError), write_error
        found = look(storage, strategy, "7")
        assert found == ("alive" if write_error is None else None)
        counts[found] += 1
        sweep(storage, strategy, older_than=NOTHING_LIVES)
        assert look(storage, strategy, "7") == found
        # No claim can stop what a writer sends once the sweep has looked for the last time.
        left = [] if found else keys(storage)
        assert set(left) <= {f"7/{part}" for part in ("arrays-0", "state/arrays 1")}
        counts["late"] += bool(left)
    return counts


def test_a_sweep_never_corrupts_a_save_that_it_takes_for_dead_and_leaves_little(memory, strategy):
    counts = swept(memory, strategy)
    assert min(counts["alive"], counts[None]) > 0
    assert counts["alive"] + counts[None] == math.comb(10, 4)
    assert counts["late"] < counts[None] // 4


class SweepsWithoutFence(FixedCommit):
    def clear(self, storage, leftover):
        storage.delete(leftover.prefix)
        return True


class SealsWithoutLooking(FixedCommit):
    def _seal(self, storage, staging):
        del storage, staging


@pytest.mark.parametrize("mistake", [SweepsWithoutFence, SealsWithoutLooking])
def test_a_sweep_or_a_writer_that_ignores_the_fence_is_caught(memory, mistake):
    with pytest.raises(AssertionError):
        swept(memory, mistake())


# --- through the front door ------------------------------------------------------------------------------------------


@pytest.fixture
def run(request):
    url = f"memory://tests/fixed/{request.node.name}"
    with milepost.configured({"default": {"commit": "fixed"}}):
        yield url
    emptied(MemoryStorage(url))


def test_what_is_saved_is_loaded_and_holds_no_stranger(run):
    milepost.save(f"{run}/7", {"a": np.arange(3)})
    assert milepost.load(f"{run}/7")["a"].tolist() == [0, 1, 2]
    from milepost.engine.reading import open_checkpoint
    from milepost.engine.verifying import strangers

    assert strangers(open_checkpoint(f"{run}/7")) == []


def test_a_manager_saves_and_lets_go_and_sees_nothing_unfinished(run):
    storage = MemoryStorage(run)
    FixedCommit().stage(storage, "9", living_here())
    options = milepost.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    with milepost.CheckpointManager(run, options=options) as manager:
        for step in (1, 2):
            manager.save(step, args=milepost.args.StandardSave({"a": np.arange(step)}))
        manager.wait_until_finished()
        assert manager.all_steps() == [2]
    assert {"2/", "9/"} <= set(storage.children(""))
    assert "1/" not in set(storage.children(""))


def test_what_is_under_way_is_no_checkpoint_whatever_it_looks_like(run):
    storage = MemoryStorage(run)
    staging = FixedCommit().stage(storage, "7", living_here())
    storage.write(f"{staging.prefix}_METADATA", [b'{"tree_metadata": {}}'])
    with pytest.raises(InvalidLayoutError, match="a save or a deletion that was not finished"):
        milepost.load(f"{run}/7")
