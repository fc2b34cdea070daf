"""The manager of a training's checkpoints: what its parameters, options and methods do."""

from __future__ import annotations

import datetime as dt
import json
import logging
import signal
import stat
import subprocess
import sys
import threading
import uuid

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import checkpoint_managers as cm
from milepost.args import CheckpointArgs, Composite, JsonRestore, JsonSave, PyTreeSave, StandardRestore, StandardSave
from milepost.checkpoint_managers import CheckpointManager, CheckpointManagerOptions
from milepost.checkpointers import AsyncCheckpointer, PyTreeCheckpointer, StandardCheckpointer
from milepost.errors import StepAlreadyExistsError, StepNotFoundError, StorageError
from milepost.handlers import (
    DefaultCheckpointHandlerRegistry,
    JsonCheckpointHandler,
    PyTreeCheckpointHandler,
    StandardCheckpointHandler,
)
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.options import AsyncOptions, FileOptions
from milepost.plugins import installed
from milepost.type_handlers import RestoreArgs, SaveArgs


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "root")
        return
    url = f"memory://tests/manager/{uuid.uuid4().hex}"
    yield url
    MemoryStorage(url).delete("")


@pytest.fixture
def manage():
    made = []

    def make(root, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        if options:
            kwargs["options"] = CheckpointManagerOptions(**options)
        made.append(CheckpointManager(root, *args, **kwargs))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


FIELDS = set(CheckpointManagerOptions.__dataclass_fields__)


class Gate:
    """Holds, or fails, what is written in the background until it is opened."""

    def __init__(self):
        self.opened, self.reached, self.error = threading.Event(), threading.Event(), None

    @hookimpl(wrapper=True)
    def open_storage(self):
        storage = yield
        write = storage.write

        def held(key, buffers):
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.opened.wait(60)
                if self.error is not None:
                    raise self.error
            write(key, buffers)

        storage.write = held
        return storage


@pytest.fixture
def gate():
    installed().load_all()
    manager, gate = installed()._manager, Gate()
    manager.register(gate)
    yield gate
    gate.opened.set()
    manager.unregister(gate)


def tree(number=0):
    return {"w": np.arange(4, dtype=np.float32) + number, "n": number}


def standard(number=0):
    return StandardSave(tree(number))


def start(manager, *numbers, **more):
    return [number for number in numbers if manager.save(number, args=standard(number), **more)]


def save(manager, *numbers, **more):
    saved = start(manager, *numbers, **more)
    manager.wait_until_finished()
    return saved


def restored(manager, number):
    value = manager.restore(number)
    np.testing.assert_array_equal(np.arange(4, dtype=np.float32) + value["n"], value["w"])
    return value["n"]


# --- saving and restoring --------------------------------------------------------------------------------------------


def test_one_object_comes_back_as_it_was_saved(root, manage):
    manager = manage(root)
    assert save(manager, 0, 1) == [0, 1]
    assert (restored(manager, 0), restored(manager, 1), restored(manager, None)) == (0, 1, 1)
    assert (manager.all_steps(), manager.latest_step(), manager.best_step()) == ([0, 1], 1, 1)
    again = manage(root)
    assert (again.all_steps(), restored(again, None)) == ([0, 1], 1)
    target = {"w": jax.ShapeDtypeStruct((4,), np.float32), "n": 0}
    assert again.restore(1, args=StandardRestore(target))["n"] == 1


def test_several_items_come_back_by_name(root, manage):
    manager = manage(root)
    manager.save(1, args=Composite(state=standard(1), config=JsonSave({"lr": 0.1})), custom_metadata={"run": "a"})
    manager.wait_until_finished()
    for one in (manager, manage(root)):
        found = one.restore(1)
        assert isinstance(found, Composite)
        assert (set(found), found.state["n"], found.config) == ({"state", "config"}, 1, {"lr": 0.1})
        assert dict(one.restore(1, args=Composite(config=JsonRestore()))) == {"config": {"lr": 0.1}}
        assert set(one.item_metadata(1)) == {"state", "config"}
        assert one.item_metadata(1).state["w"].shape == (4,)
        known = one.metadata(1)
        assert known.custom_metadata == {"run": "a"}
        assert 0 < known.init_timestamp_nsecs <= known.commit_timestamp_nsecs
        with pytest.raises(KeyError):
            one.restore(1, args=Composite(optimizer=StandardRestore()))


def test_the_checkpoint_of_a_step_opens_with_load(root, manage):
    manager = manage(root)
    manager.save(3, args=Composite(state=standard(3)))
    manager.wait_until_finished()
    assert milepost.load(f"{root}/3")["n"] == 3


def test_a_manager_never_mixes_one_object_and_several_items(root, manage):
    manager = manage(root)
    save(manager, 1)
    for act in (
        lambda: manager.save(2, args=Composite(state=standard())),
        lambda: manager.restore(1, args=Composite(default=StandardRestore())),
    ):
        with pytest.raises(ValueError, match="one object each"):
            act()
    several = manage(root, item_names=("state",))
    with pytest.raises(ValueError, match="several items"):
        several.save(2, args=standard())
    manager.wait_until_finished()
    assert set(several.restore(1)) == {"default"}
    named = manage(f"{root}/named")
    named.save(1, args=Composite(state=standard()))
    named.wait_until_finished()
    single = manage(f"{root}/named", item_handlers=StandardCheckpointHandler())
    with pytest.raises(ValueError, match="it has the items 'state'"):
        single.restore(1)
    with pytest.raises(ValueError, match="it has the items 'state'"):
        single.item_metadata(1)


def test_the_number_of_a_step_may_be_numpys_or_jaxs(root, manage):
    manager = manage(root)
    assert save(manager, np.int64(3), jnp.int32(4)) == [3, 4]
    assert manager.all_steps() == [3, 4]
    assert {type(step) for step in (*manager.all_steps(), manager.latest_step())} == {int}
    with pytest.raises(TypeError):
        manager.save(4.5, args=standard())


def test_steps_are_restored_from_another_directory(root, manage):
    save(manage(f"{root}/a"), 1, 2)
    other = manage(f"{root}/b")
    for number in (1, 2):
        assert other.restore(number, directory=f"{root}/a")["n"] == number
    assert other.restore(None, directory=f"{root}/a")["n"] == 2
    with pytest.raises(FileNotFoundError):
        other.restore(None, directory=f"{root}/c")
    assert other.all_steps() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing is given"),
        ({"items": StandardSave({})}, "pass them as args|given as items"),
        ({"items": {"w": 1}}, "without checkpointers"),
        ({"args": {"w": 1}}, "no CheckpointArgs"),
        ({"args": Composite()}, "without items"),
        ({"args": Composite(metrics=StandardSave({"w": 1}))}, "cannot have an item 'metrics'"),
        ({"args": Composite(state=None)}, "its arguments are None"),
        ({"args": StandardSave({"w": object()})}, "w"),
        ({"args": StandardSave({"w": 1}), "custom_metadata": {"a": object()}}, "custom_metadata"),
    ],
)
def test_what_cannot_be_saved_is_a_value_error_and_writes_nothing(root, manage, arguments, message):
    manager = manage(root)
    with pytest.raises(ValueError, match=message):
        manager.save(0, **arguments)
    assert manager.all_steps() == manage(root).all_steps() == []
    assert not manager.is_saving_in_progress()


def test_missing_steps_are_file_not_found_errors(root, manage):
    manager = manage(root)
    save(manager, 1)
    for act in (manager.restore, manager.delete, manager.item_metadata, manager.metadata):
        with pytest.raises(StepNotFoundError):
            act(99)
    assert manager.metrics(99) is None
    with pytest.raises(ValueError, match="without a step"):
        manager.item_metadata(None)
    with pytest.raises(FileNotFoundError):
        manage(f"{root}/nothing").restore(None)


# --- when to save ----------------------------------------------------------------------------------------------------


def test_intervals_the_first_step_and_steps_of_choice_are_saved(root, manage):
    manager = manage(root, save_interval_steps=3, save_on_steps=[7, 8])
    assert save(manager, *range(1, 11)) == [1, 3, 6, 7, 8, 9]
    assert manager.all_steps() == [1, 3, 6, 7, 8, 9]


def test_a_function_decides_by_the_step_and_the_newest(root, manage):
    asked = []
    manager = manage(root, should_save_fn=lambda step, newest: asked.append((step, newest)) or step % 2 == 0)
    assert save(manager, 1, 2, 3, 4) == [2, 4]
    assert asked == [(1, None), (2, None), (3, 2), (4, 2)]


def test_a_policy_takes_the_place_of_all_options(root, manage):
    manager = manage(root, save_interval_steps=1, save_decision_policy=cm.SpecificStepsPolicy([2]))
    assert save(manager, *range(5)) == [2]
    assert [number for number in range(5) if manager.should_save(number)] == []


def test_force_saves_what_the_policy_does_not_want_and_replaces_nothing(root, manage):
    manager = manage(root, save_interval_steps=10)
    assert save(manager, 10, 11) == [10]
    assert save(manager, 11, 4, force=True) == [11, 4]
    assert manager.latest_step() == 11
    with pytest.raises(StepAlreadyExistsError):
        manager.save(4, args=standard(99), force=True)
    assert restored(manager, 4) == 4
    assert manager.save(4, args=standard(99)) is False


def test_a_step_on_the_storage_that_the_manager_does_not_know_is_not_replaced(root, manage):
    mine = manage(root)
    save(manage(root), 5)
    with pytest.raises(ValueError, match="it is there already"):
        mine.save(5, args=standard(99))
    assert restored(manage(root), 5) == 5


def test_preemption_saves_where_the_interval_does_not(root, manage):
    with milepost.preemption.listening() as notice:
        manager = manage(root, save_interval_steps=10)
        assert save(manager, 10, 11) == [10]
        assert not manager.reached_preemption(12)
        notice.give()
        assert manager.reached_preemption(12)
        assert save(manager, 12) == [12]


def test_a_policy_is_not_told_of_a_save_in_progress_on_request(root, manage, gate):
    policy = cm.ContinuousCheckpointingPolicy()
    deaf = manage(root, save_decision_policy=policy, enable_should_save_is_saving_in_progress_check=False)
    hearing = manage(f"{root}/b", save_decision_policy=policy)
    for manager in (deaf, hearing):
        manager.save(1, args=standard())
    assert (deaf.should_save(2), hearing.should_save(2)) == (True, False)
    gate.opened.set()


# --- what to keep ----------------------------------------------------------------------------------------------------


def kept(manager, *numbers, root, manage, **more):
    save(manager, *numbers, **more)
    manager.wait_until_finished()
    assert manager.all_steps() == manage(root).all_steps()
    return manager.all_steps()


def test_the_newest_are_kept_and_what_the_period_keeps(root, manage):
    manager = manage(root, max_to_keep=2, keep_period=4)
    assert kept(manager, *range(1, 11), root=root, manage=manage) == [4, 8, 9, 10]


def test_the_best_are_kept_as_documented_and_a_warning_says_once_that_the_newest_went(root, manage, caplog):
    options = {"max_to_keep": 2, "best_fn": lambda metrics: metrics["loss"], "best_mode": "min"}
    manager = manage(root, **options)
    with caplog.at_level(logging.WARNING, "milepost"):
        for number, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 9.0), (5, 8.0)):
            manager.save(number, args=standard(number), metrics={"loss": loss})
        manager.wait_until_finished()
    assert manager.all_steps() == manage(root).all_steps() == [2, 3]
    assert (manager.best_step(), manager.latest_step()) == (2, 3)
    assert len([message for message in caplog.messages if "retire the newest step" in message]) == 1
    careful = manage(f"{root}/b", **options, preserve_newest=True)
    for number, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 9.0)):
        careful.save(number, args=standard(number), metrics={"loss": loss})
    careful.wait_until_finished()
    assert careful.all_steps() == [2, 3, 4]


def test_a_policy_never_retires_the_newest_unless_told_to(root, manage):
    options = {"preservation_policy": cm.CustomSteps([1])}
    assert kept(manage(root, **options), 1, 2, 3, root=root, manage=manage) == [1, 3]
    gone = manage(f"{root}/b", **options, preserve_newest=False)
    assert kept(gone, 1, 2, 3, root=f"{root}/b", manage=manage) == [1]


def test_nothing_is_kept_with_a_count_of_zero(root, manage):
    assert kept(manage(root, max_to_keep=0), 1, 2, root=root, manage=manage) == []


def test_steps_without_metrics_are_kept_beside_the_best_unless_they_are_not_to_be(root, manage):
    for keep, expected in ((True, [1, 3]), (False, [3])):
        place = f"{root}/{keep}"
        manager = manage(
            place, max_to_keep=1, best_fn=lambda metrics: metrics["a"], keep_checkpoints_without_metrics=keep
        )
        save(manager, 1)
        for number, value in ((2, 1), (3, 2)):
            manager.save(number, args=standard(number), metrics={"a": value})
        manager.wait_until_finished()
        assert manager.all_steps() == manage(place).all_steps() == expected


def test_steps_far_enough_apart_in_time_are_kept(root, manage):
    manager = manage(root, max_to_keep=1, keep_time_interval=dt.timedelta(hours=1))
    assert kept(manager, 1, 2, 3, root=root, manage=manage) == [1, 3]


def test_a_save_that_fails_retires_nothing(root, manage, gate):
    gate.opened.set()
    manager = manage(root, max_to_keep=1)
    save(manager, 1)
    manager.wait_until_finished()
    gate.error = StorageError("full of it")
    start(manager, 2)
    with pytest.raises(StorageError, match="full of it"):
        manager.wait_until_finished()
    gate.error = None
    assert manager.all_steps() == manage(root).all_steps() == [1]
    assert restored(manager, None) == 1


def test_deleted_steps_are_moved_on_request(tmp_path, manage):
    manager = manage(tmp_path, max_to_keep=1, todelete_subdir="trash", enable_background_delete=True)
    save(manager, 1, 2)
    manager.wait_until_finished()
    manager.delete(2)
    assert manage(tmp_path).all_steps() == []
    assert sorted(path.name for path in (tmp_path / "trash").iterdir()) == ["1", "2"]


def test_cleaning_up_removes_what_is_dead_before_the_first_save_ends(tmp_path, manage):
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "somebody").mkdir()
    save(manage(tmp_path), 1)
    assert (tmp_path / "5.orbax-checkpoint-tmp").exists()
    save(manage(tmp_path, cleanup_tmp_directories=True), 2)
    assert sorted(path.name for path in tmp_path.iterdir() if "2" not in path.name) == ["1", "somebody"]


# --- metrics and metadata --------------------------------------------------------------------------------------------


def test_metrics_are_kept_with_and_without_a_function_for_the_best(root, manage):
    for number, options in enumerate(({}, {"best_fn": lambda metrics: metrics["a"]})):
        manager = manage(f"{root}/{number}", **options)
        given = {"a": np.float32(1.5), "b": [1, None, "x"], "c": float("-inf")}
        manager.save(1, args=standard(), metrics=given)
        for one in (manager, manage(f"{root}/{number}", **options)):
            assert one.metrics(1) == {"a": 1.5, "b": [1, None, "x"], "c": float("-inf")}
            assert one.metadata(1).metrics == {"a": 1.5, "b": [1, None, "x"], "c": float("-inf")}
            assert one.best_step() == 1
        assert set(milepost.v1.metadata(f"{root}/{number}/1").metadata) != {"metrics"}


def test_the_best_step_is_the_newest_of_equal_ones_and_never_a_nan(root, manage):
    manager = manage(root, best_fn=lambda metrics: metrics["a"])
    assert manager.best_step() is None
    save(manager, 0)
    assert manager.best_step() is None
    for number, value in ((1, 2.0), (2, 2.0), (3, float("nan")), (4, 1.0)):
        manager.save(number, args=standard(), metrics={"a": value})
    assert manager.best_step() == 2
    manager.wait_until_finished()
    assert manage(root, best_fn=lambda metrics: metrics["a"], best_mode="min").best_step() == 4


def test_metrics_that_are_not_to_be_written_rank_and_are_not_kept(root, manage):
    manager = manage(root, best_fn=lambda metrics: metrics["a"], prevent_write_metrics=True)
    for number, value in ((1, 2.0), (2, 1.0)):
        manager.save(number, args=standard(), metrics={"a": value})
    assert manager.best_step() == 1
    assert manager.metrics(1) is None
    assert manage(root, best_fn=lambda metrics: metrics["a"]).best_step() is None


def test_metadata_of_the_root_is_the_first_managers(root, manage):
    assert manage(root).metadata().custom_metadata == {}
    assert manage(root, metadata={"run": 1}).metadata().custom_metadata == {"run": 1}
    assert manage(root, metadata={"run": 2}).metadata().custom_metadata == {"run": 1}
    assert manage(root).metadata().custom_metadata == {"run": 1}
    assert manage(root).all_steps() == []
    unsaved = manage(f"{root}/b", metadata={"run": 3}, save_root_metadata=False)
    assert unsaved.metadata().custom_metadata == {"run": 3}
    assert manage(f"{root}/b").metadata().custom_metadata == {}


def test_metadata_of_a_root_that_cannot_be_read_is_an_error(tmp_path, manage):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "_ROOT_METADATA").write_text("{")
    with pytest.raises(ValueError, match="which is no JSON"):
        manage(tmp_path).metadata()


def test_the_file_of_the_root_is_where_it_is_documented(tmp_path, manage):
    manage(tmp_path, metadata={"a": [1]})
    document = json.loads((tmp_path / "metadata" / "_ROOT_METADATA").read_text())
    assert document == {"internal_metadata": {}, "custom_metadata": {"a": [1]}}


# --- handlers and the older interface --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"checkpointers": PyTreeCheckpointer, "item_names": ("a",)},
        {"checkpointers": PyTreeCheckpointer, "item_handlers": PyTreeCheckpointHandler},
        {"checkpointers": PyTreeCheckpointer, "handler_registry": "registry"},
        {"item_names": ("a",), "handler_registry": "registry"},
        {"item_handlers": PyTreeCheckpointHandler, "handler_registry": "registry"},
        {"item_names": ("a",), "item_handlers": PyTreeCheckpointHandler},
        {"item_names": ("metrics",)},
        {"max_to_keep": 1, "preservation_policy": cm.LatestN(1)},
        {"keep_period": 1, "preservation_policy": cm.LatestN(1)},
        {"save_interval_steps": 0},
        {"keep_period": 0},
        {"todelete_subdir": "../elsewhere"},
    ],
)
def test_parameters_that_exclude_each_other_or_mean_nothing_are_value_errors(tmp_path, manage, given):
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("a", StandardSave, StandardCheckpointHandler())
    made = {name: value() if isinstance(value, type) else value for name, value in given.items()}
    made = {name: registry if value == "registry" else value for name, value in made.items()}
    with pytest.raises(ValueError, match=r".") as refused:
        manage(tmp_path, **made)
    assert isinstance(refused.value, milepost.errors.RequestError)


@pytest.mark.parametrize(
    "options",
    [{"max_to_keep": -1}, {"best_mode": "best"}, {"todelete_subdir": "a", "todelete_full_path": "b"}],
)
def test_options_without_meaning_are_value_errors(options):
    with pytest.raises(milepost.errors.ConfigError):
        CheckpointManagerOptions(**options)


def test_moving_deleted_steps_to_another_place_is_not_implemented(tmp_path, manage):
    with pytest.raises(NotImplementedError, match="cannot move deleted steps"):
        manage(tmp_path, todelete_full_path="gs://elsewhere")


def test_only_declared_items_are_saved(root, manage):
    manager = manage(root, item_names=("state", "extra"), item_handlers={"config": JsonCheckpointHandler()})
    with pytest.raises(ValueError, match="cannot save item 'other'"):
        manager.save(1, args=Composite(other=standard()))
    with pytest.raises(ValueError, match="its handler is a JsonCheckpointHandler"):
        manager.save(1, args=Composite(config=standard()))
    manager.save(1, args=Composite(state=standard(), config=JsonSave({"a": 1})))
    assert manager.item_metadata(1)["extra"] is None
    assert set(manager.restore(1)) == {"state", "config"}


def test_handlers_are_found_in_a_registry(root, manage):
    registry = DefaultCheckpointHandlerRegistry()
    registry.add("state", PyTreeSave, PyTreeCheckpointHandler())
    manager = manage(root, handler_registry=registry)
    manager.save(1, args=Composite(state=PyTreeSave(tree(1))))
    assert manager.restore(1).state["n"] == 1
    assert manager.metadata(1).item_handlers == {"state": PyTreeCheckpointHandler.typestr()}


def test_the_older_interface_takes_one_object(root, manage):
    manager = manage(root, PyTreeCheckpointer())
    assert manager.save(1, tree(1))
    assert manager.restore(1)["n"] == 1
    found = manager.restore(
        1, items=tree(0), restore_kwargs={"restore_args": {"w": RestoreArgs(dtype=np.float16), "n": RestoreArgs()}}
    )
    assert found["w"].dtype == np.float16
    with pytest.raises(ValueError, match="given as items"):
        manager.restore(1, items=StandardRestore())


def test_the_older_interface_takes_objects_by_name(root, manage):
    manager = manage(root, {"state": PyTreeCheckpointer(), "other": AsyncCheckpointer(StandardCheckpointHandler())})
    save_args = {"w": SaveArgs(dtype=np.float16), "n": SaveArgs()}
    assert manager.save(1, {"state": tree(1), "other": tree(2)}, save_kwargs={"state": {"save_args": save_args}})
    found = manager.restore(1)
    assert (found.state["w"].dtype, found.other["n"]) == (np.float16, 2)
    assert set(manager.restore(1, items={"other": None})) == {"other"}
    with pytest.raises(ValueError, match="cannot take item 'third'"):
        manager.save(2, {"third": tree()})


def test_older_checkpointers_that_are_not_asynchronous_save_before_returning(root, manage):
    manager = manage(root, PyTreeCheckpointer())
    manager.save(1, tree(1))
    assert not manager.is_saving_in_progress()
    assert manage(root).all_steps() == [1]
    assert manage(f"{root}/b", StandardCheckpointer()).save(1, tree(1))


class Text(CheckpointArgs):
    def __init__(self, text=None):
        self.text = text


class TextHandler(milepost.handlers.CheckpointHandler):
    def save(self, directory, args):
        (directory / "text").write_text(args.text)

    def restore(self, directory, args=None):
        return (directory / "text").read_text()


milepost.args.register_with_handler(TextHandler, for_save=True, for_restore=True)(Text)


def test_a_handler_of_somebody_else_saves_files_of_its_own(root, manage):
    manager = manage(root)
    manager.save(1, args=Composite(note=Text("hello"), state=standard()))
    assert manager.restore(1).note == "hello"
    assert manage(root).restore(1).note == "hello"
    assert manager.item_metadata(1).note is None


# --- in the background -----------------------------------------------------------------------------------------------


def test_save_returns_before_the_step_is_written_and_the_caller_may_change_everything(root, manage, gate):
    manager, state = manage(root), {"a": np.zeros(1000), "b": jnp.ones(1000)}
    assert manager.save(1, args=StandardSave(state))
    assert gate.reached.wait(60)
    assert manager.is_saving_in_progress()
    assert manage(root).all_steps() == []
    state["a"][...] = -1
    state["b"].delete()
    gate.opened.set()
    found = manager.restore(1)
    assert not manager.is_saving_in_progress()
    np.testing.assert_array_equal(np.zeros(1000), found["a"])
    np.testing.assert_array_equal(np.ones(1000), found["b"])


def test_without_asynchronous_saves_the_step_is_there_on_return(root, manage):
    manager = manage(root, enable_async_checkpointing=False)
    start(manager, 1)
    assert not manager.is_saving_in_progress()
    assert manage(root).all_steps() == [1]


@pytest.mark.parametrize("call", ["wait_until_finished", "close", "save", "unwanted", "delete", "restore"])
def test_a_failed_save_is_raised_once_by_the_next_call(root, manage, gate, call):
    gate.opened.set()
    manager = manage(root)
    save(manager, 0)
    manager.wait_until_finished()
    gate.error = StorageError("no room for it")
    start(manager, 1)
    manager._sequence._saves._last.future.exception()  # it has ended, and nobody has seen how
    gate.error = None
    act = {
        "save": lambda: start(manager, 2),
        "unwanted": lambda: start(manager, 0),
        "delete": lambda: manager.delete(0),
        "restore": lambda: manager.restore(0),
    }.get(call) or getattr(manager, call)
    with pytest.raises(StorageError, match="no room for it"):
        act()
    manager.check_for_errors()
    assert manager.all_steps() == [0]
    assert restored(manager, None) == 0


def test_checking_for_errors_reports_and_never_waits(root, manage, gate):
    manager = manage(root)
    start(manager, 1)
    assert gate.reached.wait(60)
    manager.check_for_errors()
    gate.error = StorageError("no room for it")
    gate.opened.set()
    manager._sequence._saves._last.future.exception()
    with pytest.raises(StorageError, match="no room for it"):
        manager.check_for_errors()
    manager.check_for_errors()


def test_leaving_a_with_block_raises_what_failed_and_never_hides_another_error(root, gate, caplog):
    gate.opened.set()
    gate.error = StorageError("no room for it")
    with pytest.raises(StorageError, match="no room for it"), CheckpointManager(root) as manager:
        start(manager, 1)
    with pytest.raises(ZeroDivisionError) as raised, CheckpointManager(root) as manager:
        start(manager, 1 / (start(manager, 1) == []))
    assert raised.value.__notes__ == ["and a save in the background failed: no room for it"]
    with pytest.raises(RuntimeError, match="it was closed"):
        save(manager, 2)


def test_a_callback_runs_after_the_commit_and_cannot_undo_it(root, manage, caplog):
    seen = []

    def callback():
        seen.append(manage(root).all_steps())
        raise ValueError("as callbacks do")

    for number, asynchronous in ((1, True), (2, False)):
        options = AsyncOptions(post_finalization_callback=callback)
        manager = manage(root, async_options=options, enable_async_checkpointing=asynchronous)
        save(manager, number)
        manager.wait_until_finished()
    assert seen == [[1], [1, 2]]
    assert manage(root).all_steps() == [1, 2]


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_manager_that_only_reads_changes_nothing_and_says_which_options_it_leaves_out(tmp_path, manage, caplog):
    save(manage(tmp_path, metadata={"a": 1}), 1, 2)
    with caplog.at_level(logging.WARNING, "milepost"):
        options = CheckpointManagerOptions(read_only=True, max_to_keep=1, todelete_subdir="trash", create=True)
        manager = CheckpointManager(tmp_path, options=options, metadata={"a": 2})
    assert [message.split(":")[0] for message in caplog.messages] == [
        "a manager that only reads takes no max_to_keep",
        "a manager that only reads takes no todelete_subdir",
    ]
    assert (options.max_to_keep, options.create, options.save_interval_steps) == (None, False, 0)
    assert manager.save(3, args=standard()) is False
    with pytest.raises(ValueError, match="read only"):
        manager.save(3, args=standard(), force=True)
    manager.delete(1)
    assert (manager.all_steps(), restored(manager, None), manager.metadata().custom_metadata) == ([1, 2], 2, {"a": 1})
    manager.close()
    missing = CheckpointManager(tmp_path / "missing", options=CheckpointManagerOptions(read_only=True))
    assert (missing.all_steps(), missing.latest_step()) == ([], None)
    assert not (tmp_path / "missing").exists()


def test_the_directory_is_made_with_the_mode_that_was_asked_for(tmp_path, manage):
    manager = manage(tmp_path / "a" / "b", file_options=FileOptions(path_permission_mode=0o750))
    save(manager, 1)
    manager.wait_until_finished()
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "1"):
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(0o750)
    manage(tmp_path / "c", create=False)
    assert not (tmp_path / "c").exists()


def test_relative_directories_stay_where_they_were(tmp_path, monkeypatch, manage):
    monkeypatch.chdir(tmp_path)
    manager = manage("runs/a")
    monkeypatch.chdir("/")
    save(manager, 1)
    manager.wait_until_finished()
    assert str(manager.directory) == str(tmp_path / "runs" / "a")
    assert (tmp_path / "runs" / "a" / "1").is_dir()


def test_a_logger_is_told_of_saves_and_restores(root, manage, caplog):
    class Logger:
        def __init__(self):
            self.entries = []

        def log_entry(self, entry):
            self.entries.append(entry)
            if entry["event_type"] == "restore":
                raise ValueError("full")

    logger = Logger()
    manager = manage(root, logger=logger)
    save(manager, 1)
    assert restored(manager, 1) == 1
    assert [(entry["event_type"], entry["step"]) for entry in logger.entries] == [("save", 1), ("restore", 1)]
    assert "the logger of a manager failed; the restore of step 1 has not" in caplog.messages


def test_all_steps_can_be_read_again(root, manage):
    mine, other = manage(root), manage(root)
    save(other, 1)
    other.wait_until_finished()
    assert mine.all_steps() == []
    assert mine.all_steps(read=True) == [1]
    other.delete(1)
    mine.reload()
    assert mine.latest_step() is None


def test_names_of_steps_are_as_the_options_say(tmp_path, manage):
    save(manage(tmp_path, step_prefix="ckpt", step_format_fixed_length=4), 7)
    assert (tmp_path / "ckpt_0007").is_dir()
    assert manage(tmp_path).all_steps() == []
    name_format = milepost.path.step.standard_name_format("ckpt", 4)
    assert manage(tmp_path, step_name_format=name_format, step_prefix="ignored").all_steps() == [7]


def test_every_policy_is_to_be_had_where_it_is_documented():
    for name in cm.__all__:
        assert hasattr(cm, name)
    assert cm.preservation_policy.LatestN is cm.LatestN
    assert cm.save_decision_policy.FixedIntervalPolicy is cm.FixedIntervalPolicy
    from milepost import checkpoint_manager

    assert checkpoint_manager.StepAlreadyExistsError is StepAlreadyExistsError


TRAINING = """
import sys
import numpy as np
from milepost.args import Composite, JsonSave, StandardSave
from milepost.checkpoint_managers import CheckpointManager, CheckpointManagerOptions

options = CheckpointManagerOptions(max_to_keep=2, keep_period=10, best_fn=lambda metrics: metrics["n"])
with CheckpointManager(sys.argv[1], options=options, metadata={"run": "killed"}) as manager:
    latest = manager.latest_step()
    number = 0 if latest is None else latest + 1
    while True:
        state = {"w": np.full((64, 64), number, np.float32)}
        items = Composite(state=StandardSave(state), note=JsonSave({"n": number}))
        manager.save(number, args=items, metrics={"n": number})
        print(number, flush=True)
        number += 1
"""


def test_a_training_killed_amid_saves_and_retention_finds_its_newest_step_and_no_older_one_lost(tmp_path):
    for stop in (13, 25, 37):
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(tmp_path / "root")], stdout=subprocess.PIPE, text=True
        )
        begun = next(int(line) for line in process.stdout if int(line) >= stop)
        process.send_signal(signal.SIGKILL)
        begun = max([begun, *map(int, process.communicate()[0].split())])
        assert process.returncode == -signal.SIGKILL
        options = CheckpointManagerOptions(read_only=True, best_fn=lambda metrics: metrics["n"])
        with CheckpointManager(tmp_path / "root", options=options) as manager:
            there, newest = manager.all_steps(), manager.latest_step()
            assert newest in {begun - 1, begun, begun + 1}
            assert {*range(0, newest, 10), newest - 1, newest} <= set(there)
            assert manager.best_step() == newest
            assert manager.metadata().custom_metadata == {"run": "killed"}
            for number in there:
                found = manager.restore(number)
                assert (found.state["w"] == number).all()
                assert found.note == manager.metrics(number) == {"n": number}
