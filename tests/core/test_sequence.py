"""The steps below one root: which there are, how they come, and how they go; on a disk and on an object storage."""

from __future__ import annotations

import contextvars
import json
import logging
import math
import signal
import subprocess
import sys
import textwrap
import threading
import uuid

import milepost
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost.decisions import AnySavePolicy, FixedIntervalPolicy, SpecificStepsPolicy
from milepost.engine.items import TreeItem
from milepost.errors import (
    ConfigError,
    NotFoundError,
    RequestError,
    StepAlreadyExistsError,
    StepNotFoundError,
    StorageError,
)
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.metadata.metrics import as_stored, from_stored
from milepost.path.step import composite_name_format, standard_name_format
from milepost.plugins import installed
from milepost.preservation import AnyPreservationPolicy, BestN, CustomSteps, LatestN, PreserveAll
from milepost.root_metadata import read_root_metadata, write_root_metadata
from milepost.sequence import Rules, Sequence, StepRequest
from milepost.testing.faults import WrappedStorage


class Watched(WrappedStorage):
    """A storage that tells of each request before and after it is done."""

    def __init__(self, storage, watch):
        super().__init__(storage)
        self._watch = watch

    def _told(self, verb, key, act):
        self._watch("before", verb, key)
        value = act()
        self._watch("after", verb, key)
        return value

    def read(self, key, start=0, stop=None):
        return self._told("read", key, lambda: super(Watched, self).read(key, start, stop))

    def children(self, prefix):
        return self._told("children", prefix, lambda: super(Watched, self).children(prefix))

    def size(self, key):
        return self._told("size", key, lambda: super(Watched, self).size(key))

    def write(self, key, buffers):
        return self._told("write", key, lambda: super(Watched, self).write(key, buffers))

    def change(self, act):
        self._watch("before", "change", "")
        return act()

    def delete(self, key):
        return self._told("delete", key, lambda: self.wrapped.delete(key))


class Watch:
    """What is done at which request; nothing unless a test says so."""

    def __init__(self):
        self.requests = []
        self.act = lambda when, verb, key: None

    def __call__(self, when, verb, key):
        if when == "before":
            self.requests.append((verb, key))
        self.act(when, verb, key)

    @hookimpl(wrapper=True)
    def open_storage(self):
        return Watched((yield), self)


@pytest.fixture
def watch():
    installed().load_all()
    manager, watch = installed()._manager, Watch()
    manager.register(watch)
    yield watch
    watch.act = lambda when, verb, key: None
    manager.unregister(watch)


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "root")
        return
    url = f"memory://tests/sequence/{uuid.uuid4().hex}"
    yield url
    MemoryStorage(url).delete("")


@pytest.fixture
def begin():
    begun = []

    def open_at(root, names=None, decide=None, preserve=None, **rules):
        sequence = Sequence(
            root,
            Rules(
                names=names or standard_name_format(),
                decide=decide or AnySavePolicy([FixedIntervalPolicy(1)]),
                preserve=preserve or PreserveAll(),
                **rules,
            ),
        )
        begun.append(sequence)
        return sequence

    yield open_at
    for sequence in begun:
        sequence.close()


def state(number):
    return {"w": np.full(3, number, np.float32)}


def request_of(number, **more):
    return StepRequest(items={"state": TreeItem(state(number))}, **more)


def save(sequence, *numbers, **more):
    for number in numbers:
        sequence.save(number, request_of(number, **more), lasting=False)


def numbers(sequence):
    return [step.step for step in sequence.steps()]


def loaded(sequence, number):
    return milepost.load(sequence.get(number).url)["w"][0]


def in_deletion():
    return threading.current_thread().name.startswith("milepost-delete")


# --- which steps there are -------------------------------------------------------------------------------------------


def test_opening_ten_thousand_steps_and_asking_for_the_newest_is_one_listing_and_one_look(tmp_path, begin, watch):
    for number in range(10_000):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "9999" / "commit_success.txt").touch()
    sequence = begin(tmp_path)
    assert sequence.latest().step == 9999
    assert not sequence.should_save(9999)
    assert watch.requests == [("children", ""), ("size", "9999/commit_success.txt")]


def test_a_save_into_ten_thousand_steps_reads_no_other_step(tmp_path, begin, watch):
    for number in range(10_000):
        (tmp_path / str(number)).mkdir()
        if number >= 9000:
            (tmp_path / str(number) / "commit_success.txt").touch()
    sequence = begin(tmp_path)
    sequence.save(10_000, request_of(1), lasting=False)
    assert sequence.latest().step == 10_000
    assert {key.split("/")[0] for verb, key in watch.requests if verb == "read"} <= {"10000"}
    # One when it is opened; beginning and committing look for what earlier attempts at this step have left.
    assert [key for verb, key in watch.requests if verb == "children"].count("") <= 3


def test_a_folder_without_a_commit_object_is_no_step(tmp_path, begin):
    save(begin(tmp_path), 1, 2)
    (tmp_path / "7").mkdir()
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "data").touch()
    (tmp_path / "9").touch()
    sequence = begin(tmp_path)
    assert sequence.latest().step == 2
    assert numbers(sequence) == [1, 2]
    assert sequence.find(7) is None
    with pytest.raises(StepNotFoundError):
        sequence.delete(8)
    assert (tmp_path / "8" / "data").exists()


def test_the_newest_is_the_highest_number_whatever_was_saved_last(root, begin):
    sequence = begin(root)
    save(sequence, 5, 3)
    assert sequence.latest().step == 5
    assert numbers(sequence) == [3, 5]
    assert not sequence.should_save(4)
    assert begin(root).latest().step == 5


def test_a_step_that_somebody_else_saved_is_found_when_it_is_asked_for(root, begin):
    mine = begin(root)
    save(begin(root), 4)
    assert numbers(mine) == []
    assert loaded(mine, 4) == 4
    assert numbers(mine) == [4]


def test_reloading_sees_what_others_saved_and_deleted(root, begin):
    mine, other = begin(root), begin(root)
    save(mine, 1)
    save(other, 2)
    other.delete(1)
    assert numbers(mine) == [1]
    mine.reload()
    assert numbers(mine) == [2]


def test_a_missing_step_is_an_error_that_names_those_near_by(root, begin):
    sequence = begin(root)
    with pytest.raises(StepNotFoundError) as none:
        sequence.get(None)
    assert none.value.__notes__ == ["there are no steps"]
    save(sequence, 1, 2, 30)
    with pytest.raises(StepNotFoundError) as missing:
        sequence.get(3)
    assert missing.value.__notes__ == ["there are 3 steps, the newest 30; near by: 1, 2, 30"]


def test_a_step_under_another_name_of_the_format_is_the_same_step(root, begin):
    save(begin(root, names=standard_name_format("ckpt")), 1)
    both = composite_name_format(standard_name_format(), [standard_name_format(), standard_name_format("ckpt")])
    sequence = begin(root, names=both)
    with pytest.raises(StepAlreadyExistsError):
        save(sequence, 1)
    save(sequence, 2)
    assert [step.name for step in sequence.steps()] == ["ckpt_1", "2"]
    sequence.save(1, request_of(9, overwrite=True), lasting=False)
    assert loaded(sequence, 1) == 9
    assert [step.name for step in begin(root, names=both).steps()] == ["ckpt_1", "2"]


def test_a_reload_during_a_commit_loses_no_step(root, begin, watch):
    sequence = begin(root)
    save(sequence, 1)
    opened, listed = threading.Event(), threading.Event()

    def act(when, verb, key):
        if (when, verb) == ("before", "write") and "/2" in f"/{key}":
            assert opened.wait(60)
        if (when, verb, key) == ("after", "children", "") and not listed.is_set():
            listed.set()
            opened.set()
            pending.result()  # the step is committed after the listing that does not show it

    pending = None
    watch.act = act
    pending = sequence.save(2, request_of(2), lasting=True)
    sequence.reload()
    assert listed.is_set()
    assert numbers(sequence) == [1, 2]


def test_a_reload_does_not_bring_back_what_is_let_go_meanwhile(root, begin, watch):
    sequence = begin(root, preserve=LatestN(1))
    save(sequence, 1)
    opened, listed, released = threading.Event(), threading.Event(), threading.Event()

    def act(when, verb, key):
        if in_deletion():
            assert released.wait(60)
        elif (when, verb) == ("before", "write") and threading.current_thread() is not threading.main_thread():
            assert opened.wait(60)
        elif (when, verb, key) == ("after", "children", "") and not listed.is_set():
            listed.set()
            opened.set()
            pending.result()

    pending = None
    watch.act = act
    pending = sequence.save(2, request_of(2), lasting=True)
    sequence.reload()
    assert numbers(sequence) == [2]
    released.set()
    sequence.wait()
    assert numbers(begin(root)) == [2]


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_step_that_another_process_saved_meanwhile_is_never_replaced(root, begin):
    mine = begin(root)
    save(begin(root), 3)
    with pytest.raises(StepAlreadyExistsError, match="cannot save step 3"):
        mine.save(3, request_of(99), lasting=True)
    assert loaded(begin(root), 3) == 3


def test_a_racing_save_that_loses_at_the_commit_says_that_the_step_exists(root, begin, watch):
    mine, reached = begin(root), threading.Event()

    def act(when, verb, key):
        if verb == "write" and threading.current_thread() is not threading.main_thread():
            reached.set()
            assert raced.wait(60)

    raced = threading.Event()
    watch.act = act
    pending = mine.save(3, request_of(99), lasting=True)
    assert reached.wait(60)
    watch.act = lambda when, verb, key: None
    milepost.save(f"{root}/3", state(3))
    raced.set()
    with pytest.raises(StepAlreadyExistsError):
        pending.result()
    assert loaded(begin(root), 3) == 3


def test_a_step_under_way_is_listed_and_waited_for(root, begin, watch):
    sequence, opened = begin(root), threading.Event()

    def act(when, verb, key):
        if verb in {"write", "change"} and threading.current_thread() is not threading.main_thread():
            assert opened.wait(60)

    watch.act = act
    sequence.save(1, request_of(1, metrics={"loss": 1}), lasting=True)
    assert sequence.is_saving()
    assert numbers(sequence) == [1]
    assert sequence.latest().metrics == {"loss": 1}
    with pytest.raises(milepost.errors.CheckpointNotFoundError):
        milepost.load(sequence.latest().url)
    opened.set()
    assert milepost.load(sequence.committed(None).url)["w"][0] == 1
    assert not sequence.is_saving()


def failing_writes(when, verb, key):
    if (when, verb) == ("before", "write"):
        raise StorageError("the storage is in no mood for it")


def test_a_failed_save_is_raised_once_by_whatever_comes_next(root, begin, watch):
    acts = (
        lambda sequence: save(sequence, 2),
        lambda sequence: sequence.delete(1),
        lambda sequence: sequence.wait(),
        lambda sequence: sequence.close(),
    )
    for act in acts:
        sequence = begin(root)
        watch.act = failing_writes
        with pytest.raises(StorageError):
            sequence.save(1, request_of(1), lasting=True).result()
        assert numbers(sequence) == []
        pending = sequence.save(1, request_of(1), lasting=True)
        pending.future.exception()  # waits, and takes no notice
        watch.act = lambda when, verb, key: None
        with pytest.raises(StorageError, match="in no mood"):
            act(sequence)
        sequence.check()
        sequence.wait()
        assert numbers(sequence) == []


def test_a_failed_save_lets_nothing_go(root, begin, watch):
    sequence = begin(root, preserve=LatestN(1))
    save(sequence, 1)
    watch.act = failing_writes
    with pytest.raises(StorageError):
        save(sequence, 2)
    watch.act = lambda when, verb, key: None
    sequence.reload()
    assert numbers(sequence) == [1]
    assert loaded(sequence, 1) == 1


def test_what_a_callback_raises_cannot_undo_the_commit(root, begin, caplog):
    sequence = begin(root)
    save(sequence, 1, committed=lambda: 1 / 0)
    assert "the callback after the commit of step 1 failed; the step is safe" in caplog.messages
    assert loaded(begin(root), 1) == 1


def test_a_callback_is_called_when_the_step_can_be_loaded(root, begin):
    sequence, found = begin(root), []
    save(sequence, 1, committed=lambda: found.append(milepost.load(f"{root}/1")["w"][0]))
    assert found == [1]


def test_what_is_closed_or_read_only_changes_nothing(root, begin):
    sequence = begin(root)
    save(sequence, 1)
    sequence.close()
    for act in (lambda: save(sequence, 2), lambda: sequence.delete(1), sequence.clean):
        with pytest.raises(RuntimeError, match="it was closed"):
            act()
    assert loaded(sequence, 1) == 1
    only = begin(root, read_only=True)
    assert not only.should_save(7)
    for act in (lambda: save(only, 2), lambda: only.delete(1), only.clean):
        with pytest.raises(ValueError, match="read only"):
            act()
    assert numbers(begin(root)) == [1]


def test_a_negative_step_is_refused(root, begin):
    with pytest.raises(ConfigError, match="cannot save step -1"):
        save(begin(root), -1)


# --- policies --------------------------------------------------------------------------------------------------------


def test_the_policy_is_asked_about_steps_newer_than_all_others_only(root, begin):
    asked = []

    class Policy:
        def should_save(self, step, previous_steps, *, context):
            asked.append((step.step, [one.step for one in previous_steps], context.is_saving_in_progress))
            return step.step % 2 == 0

    sequence = begin(root, decide=Policy())
    save(sequence, 4)
    assert [number for number in range(8) if sequence.should_save(number)] == [6]
    assert asked == [(5, [4], False), (6, [4], False), (7, [4], False)]


@pytest.mark.parametrize("told", [True, False])
def test_the_policy_is_told_of_a_save_in_progress_unless_it_is_not_to_be(root, begin, watch, told):
    seen, opened = [], threading.Event()

    class Policy:
        def should_save(self, step, previous_steps, *, context):
            seen.append(context.is_saving_in_progress)
            return True

    def act(when, verb, key):
        if verb == "write" and threading.current_thread() is not threading.main_thread():
            assert opened.wait(60)

    sequence = begin(root, decide=Policy(), tell_of_saves=told)
    watch.act = act
    sequence.save(1, request_of(1), lasting=True)
    assert sequence.should_save(2)
    opened.set()
    assert seen == [told]


def test_retention_is_by_what_is_committed(root, begin):
    sequence = begin(root, preserve=LatestN(2) | CustomSteps([1]))
    save(sequence, 1, 2, 3, 4)
    sequence.wait()
    assert numbers(sequence) == [1, 3, 4]
    assert numbers(begin(root)) == [1, 3, 4]


def test_the_newest_is_never_retired_unless_the_rules_say_so(root, begin, caplog):
    kept = begin(root, preserve=LatestN(0))
    save(kept, 1, 2)
    kept.wait()
    assert numbers(begin(root)) == [2]
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, "milepost"):
        retired = begin(root, preserve=LatestN(0), keep_newest=False)
        save(retired, 3, 4)
        retired.wait()
    assert numbers(begin(root)) == []
    assert [message for message in caplog.messages if "retire the newest step" in message] == caplog.messages[:1]


def test_the_best_are_kept_by_the_metrics_of_steps_saved_before_reopening(root, begin):
    best = BestN(get_metric_fn=lambda metrics: metrics["score"], n=2)
    first = begin(root)
    for number, score in ((1, 5.0), (2, 1.0), (3, float("nan")), (4, float("inf"))):
        save(first, number, metrics={"score": score})
    again = begin(root, preserve=best)
    save(again, 5, metrics={"score": 2.0})
    again.wait()
    assert numbers(begin(root)) == [1, 4, 5]


def test_a_policy_that_fails_lets_nothing_go_and_the_step_is_safe(root, begin, caplog):
    class Broken:
        def should_preserve(self, checkpoints, *, context):
            raise ZeroDivisionError

    sequence = begin(root, preserve=Broken())
    save(sequence, 1, 2)
    assert numbers(begin(root)) == [1, 2]
    assert "the retention after the commit of step 2 failed; the step is safe" in caplog.messages


# --- deleting --------------------------------------------------------------------------------------------------------


def test_no_save_waits_for_the_deletion_of_other_steps(root, begin, watch):
    sequence, opened, deleting = begin(root, preserve=LatestN(1)), threading.Event(), threading.Event()

    def act(when, verb, key):
        if in_deletion():
            deleting.set()
            assert opened.wait(60)

    watch.act = act
    save(sequence, 1, 2, 3)
    assert deleting.wait(60)
    assert numbers(sequence) == [3]
    assert loaded(sequence, 3) == 3
    opened.set()
    sequence.wait()
    assert numbers(begin(root)) == [3]


def test_saving_a_step_again_waits_until_the_old_one_is_gone(root, begin, watch):
    sequence, deleting, writing, met = begin(root, preserve=LatestN(1)), threading.Event(), threading.Event(), []

    def act(when, verb, key):
        if in_deletion():
            deleting.set()
            met.append(writing.wait(0.2))  # a write that must not come now
        elif verb == "write" and deleting.is_set():
            writing.set()

    save(sequence, 1, 2)
    sequence.wait()
    save(sequence, 3)  # lets 2 go
    sequence.wait()
    watch.act = act
    save(sequence, 4)  # lets 3 go
    assert deleting.wait(60)
    sequence.rules = Rules(names=standard_name_format(), decide=AnySavePolicy([]), preserve=PreserveAll())
    sequence.save(3, request_of(77), lasting=False)
    assert met
    assert not any(met)
    assert loaded(begin(root), 3) == 77


def test_what_could_not_be_deleted_is_still_there_and_tried_again(root, begin, watch, caplog):
    sequence = begin(root, preserve=LatestN(1))

    def act(when, verb, key):
        if in_deletion() and verb in {"change", "delete"}:
            raise StorageError("no deleting today")

    save(sequence, 1)
    watch.act = act
    save(sequence, 2)
    sequence.wait()
    assert [message for message in caplog.messages if message.startswith("could not delete")] != []
    assert numbers(sequence) == [1, 2]
    assert loaded(sequence, 1) == 1
    watch.act = lambda when, verb, key: None
    save(sequence, 3)
    sequence.wait()
    assert numbers(begin(root)) == [3]


def test_deleting_is_over_when_it_returns_and_raises_what_went_wrong(root, begin, watch):
    sequence = begin(root)
    save(sequence, 1, 2)

    def act(when, verb, key):
        if in_deletion() and verb in {"change", "delete"}:
            raise StorageError("no deleting today")

    watch.act = act
    with pytest.raises(StorageError, match="no deleting today"):
        sequence.delete(1)
    assert numbers(sequence) == [1, 2]
    watch.act = lambda when, verb, key: None
    sequence.delete(1)
    assert numbers(begin(root)) == [2]
    with pytest.raises(StepNotFoundError):
        sequence.delete(1)


def test_steps_are_moved_into_the_trash_whole(tmp_path, begin):
    sequence = begin(tmp_path, preserve=LatestN(1), trash="gone/by")
    save(sequence, 1, 2)
    sequence.wait()
    sequence.delete(2)
    save(sequence, 1)
    save(sequence, 3)
    sequence.wait()
    assert numbers(begin(tmp_path)) == [3]
    assert sorted(path.name for path in (tmp_path / "gone" / "by").iterdir()) == ["1", "1.1", "2"]
    assert milepost.load(tmp_path / "gone" / "by" / "2")["w"][0] == 2


class Plain:
    """A storage that can do the least that one has to."""

    def __init__(self, storage):
        self.url, self.commit = storage.url, "create"
        self.read, self.write, self.create = storage.read, storage.write, storage.create
        self.children, self.delete, self.size = storage.children, storage.delete, storage.size


def test_a_trash_is_refused_where_nothing_can_be_renamed(tmp_path, begin):
    class Opener:
        @hookimpl(wrapper=True)
        def open_storage(self):
            return Plain((yield))

    installed().load_all()
    installed()._manager.register(Opener(), "plain")
    try:
        with pytest.raises(ConfigError, match="no storage that renames"):
            begin(f"memory://tests/sequence/{uuid.uuid4().hex}", trash="gone")
        save(begin(f"memory://tests/sequence/{uuid.uuid4().hex}"), 1)
    finally:
        installed()._manager.unregister(name="plain")


def test_deletions_run_with_what_was_configured_around_the_save(tmp_path, begin, watch):
    mark, seen = contextvars.ContextVar("mark", default="nothing"), set()

    def act(when, verb, key):
        if threading.current_thread().name.startswith("milepost"):
            seen.add(mark.get())

    sequence = begin(tmp_path, preserve=LatestN(1))
    watch.act = act
    mark.set("configured")
    for number in (1, 2):
        sequence.save(number, request_of(number), lasting=True)
    sequence.wait()
    assert seen == {"configured"}


def test_cleaning_removes_the_dead_and_leaves_what_is_not_ours(tmp_path, begin):
    dead = tmp_path / "5.orbax-checkpoint-tmp"
    dead.mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "6").mkdir()
    sequence = begin(tmp_path)
    sequence.clean()
    save(sequence, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "6", "notes"]


# --- metrics, and metadata of the root -------------------------------------------------------------------------------

NUMBERS = st.floats() | st.integers() | st.booleans() | st.none() | st.text()
KEYS = st.text(max_size=4) | st.sampled_from(["!float", "!value", "!!float", "!"])
METRICS = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@settings(derandomize=True, max_examples=300)
@given(METRICS)
def test_metrics_come_back_as_they_were_given(metrics):
    stored = as_stored(metrics)
    assert stored is None or isinstance(stored, dict)
    body = json.dumps(stored, allow_nan=False)
    assert repr(from_stored(json.loads(body))) == repr(metrics)


def test_metrics_of_numpy_and_jax_become_numbers_of_python():
    import jax.numpy as jnp

    given = {"a": np.float32(2.5), "b": jnp.float32(0.5), "c": np.int64(3), "d": np.True_, "e": (jnp.bfloat16(1.5), 2)}
    assert from_stored(as_stored(given)) == {"a": 2.5, "b": 0.5, "c": 3, "d": True, "e": [1.5, 2]}
    assert math.isnan(from_stored(as_stored({"a": np.float64("nan")}))["a"])


@pytest.mark.parametrize(
    "metrics", [{"a": np.zeros(2)}, {1: 2.0}, {"a": {2: 1}}, {"a": 1j}, {"a": object()}, {"a": b""}]
)
def test_metrics_that_cannot_be_kept_are_refused_before_anything_is_written(root, begin, metrics):
    sequence = begin(root)
    with pytest.raises(RequestError) as refused:
        save(sequence, 1, metrics=metrics)
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, TypeError)
    assert numbers(sequence) == []


def test_metadata_of_a_root_is_written_once(root):
    assert read_root_metadata(root) is None
    assert write_root_metadata(root, {"a": 1})
    assert not write_root_metadata(root, {"a": 2})
    assert read_root_metadata(root).custom_metadata == {"a": 1}
    with pytest.raises(ValueError, match="cannot save metadata"):
        write_root_metadata(root, {"a": object()})


def test_of_two_who_write_the_metadata_of_a_root_at_once_one_wins(root, watch):
    def hidden(when, verb, key):
        if (when, verb) == ("before", "read"):
            raise NotFoundError("not there yet")

    watch.act = hidden
    assert write_root_metadata(root, {"winner": 1})
    assert not write_root_metadata(root, {"winner": 2})
    watch.act = lambda when, verb, key: None
    assert read_root_metadata(root).custom_metadata == {"winner": 1}


# --- a process that dies ---------------------------------------------------------------------------------------------

TRAINING = """
import sys
import numpy as np
from milepost.decisions import AnySavePolicy
from milepost.engine.items import TreeItem
from milepost.path.step import standard_name_format
from milepost.preservation import LatestN, EveryNSteps
from milepost.sequence import Rules, Sequence, StepRequest

rules = Rules(names=standard_name_format(), decide=AnySavePolicy([]), preserve=LatestN(2) | EveryNSteps(10))
sequence = Sequence(sys.argv[1], rules)
number = 0 if sequence.latest() is None else sequence.latest().step + 1
while True:
    state = {"w": np.full((64, 64), number, np.float32)}
    sequence.save(number, StepRequest(items={"state": TreeItem(state)}, metrics={"n": number}), lasting=True)
    print(number, flush=True)
    number += 1
"""


def test_a_process_killed_amid_saves_and_deletions_leaves_the_newest_and_no_gap(tmp_path, begin):
    begun = -1
    for round_ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TRAINING), str(tmp_path / "root")], stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            begun = int(line)
            if begun % 10 == 3 + 2 * round_ and begun > 10 * round_:
                break
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        begun = max([begun, *map(int, rest)])
        assert process.returncode == -signal.SIGKILL
        sequence = begin(tmp_path / "root")
        there = numbers(sequence)
        # What was begun last may be lost; the one before it was committed when that one began.
        assert begun - 1 <= there[-1] <= begun + 1
        assert set(range(0, there[-1], 10)) | {there[-1] - 1} <= set(there)
        for number in there:
            assert (milepost.load(sequence.get(number).url)["w"] == number).all()
            assert sequence.get(number).metrics == {"n": number}


def test_a_policy_made_of_steps_is_asked_in_vain_for_others(root, begin):
    sequence = begin(root, decide=SpecificStepsPolicy([2]), preserve=AnyPreservationPolicy([PreserveAll()]))
    assert [number for number in range(4) if sequence.should_save(number)] == [2]
