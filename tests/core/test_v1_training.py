from __future__ import annotations

import datetime as dt
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from milepost import v1 as ocp
from milepost.errors import AbortedError, StepAlreadyExistsError, StepNotFoundError
from milepost.v1.training import preservation_policies as keep
from milepost.v1.training import save_decision_policies as when

STATE = {"w": jnp.arange(4.0), "step": 3}


def steps(checkpointer):
    return [checkpoint.step for checkpoint in checkpointer.checkpoints]


class Gate:
    """An object whose save ends when it may."""

    def __init__(self):
        self.may_end, self.began = threading.Event(), threading.Event()

    async def save(self, directory):
        async def write():
            path = await directory.await_creation()
            (path / "x").write_text("x")
            self.began.set()
            assert self.may_end.wait(60)

        return write()

    async def load(self, directory):
        raise NotImplementedError


def test_a_training_resumes_from_its_newest_step(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest is None
        for step in range(3):
            assert checkpointer.save(step, {"step": step, "w": jnp.full(3, step)}) is True
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest.step == 2
        assert checkpointer.load()["step"] == 2
        assert checkpointer.load(1, {"step": 0, "w": np.zeros(3, np.int32)})["w"].tolist() == [1, 1, 1]
        assert checkpointer.load(checkpointer.checkpoints[0])["step"] == 0
        assert ocp.load(tmp_path / "1")["step"] == 1


def test_the_policy_is_asked_unless_forced(tmp_path):
    with ocp.training.Checkpointer(tmp_path, save_decision_policy=when.FixedIntervalPolicy(2)) as checkpointer:
        assert [checkpointer.save(step, STATE) for step in range(5)] == [True, False, True, False, True]
        assert checkpointer.save_async(5, STATE) is None
        assert checkpointer.save(5, STATE, force=True) is True
        assert steps(checkpointer) == [0, 2, 4, 5]
        assert [checkpointer.should_save(step) for step in (2, 5, 6, 7)] == [False, False, True, False]


def test_an_asynchronous_save_says_when_it_is_done(tmp_path):
    called = []
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        response = checkpointer.save_async(0, STATE)
        response.on_complete(called.append)
        assert response.result() is True
        assert response.done() is True
    assert called == [response]


def test_a_step_that_exists_is_never_replaced_unasked(tmp_path):
    with ocp.training.Checkpointer(tmp_path, save_decision_policy=when.FixedIntervalPolicy(2)) as checkpointer:
        checkpointer.save(0, {"x": 1})
        checkpointer.save(1, {"x": 1}, force=True)
        for force in (False, True):
            with pytest.raises(StepAlreadyExistsError):
                checkpointer.save(0, {"x": 2}, force=force)
        with pytest.raises(FileExistsError):
            checkpointer.save(1, {"x": 2})
        assert checkpointer.load(0) == {"x": 1}


def test_overwriting_replaces_once_the_policy_has_said_yes(tmp_path):
    with ocp.training.Checkpointer(tmp_path, save_decision_policy=when.FixedIntervalPolicy(2)) as checkpointer:
        checkpointer.save(0, {"x": 1})
        assert checkpointer.save(0, {"x": 2}, overwrite=True) is True
        assert checkpointer.load(0) == {"x": 2}
        checkpointer.save(1, {"x": 1}, force=True)
        assert checkpointer.save(1, {"x": 2}, overwrite=True) is False
        assert checkpointer.load(1) == {"x": 1}
        assert checkpointer.save(1, {"x": 2}, overwrite=True, force=True) is True
        assert checkpointer.load(1) == {"x": 2}


def test_an_overwrite_that_fails_leaves_the_old_step(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"x": 1})
        with pytest.raises(ValueError, match="cannot be written"):
            checkpointer.save(0, {"x": object()}, overwrite=True)
        assert checkpointer.load(0) == {"x": 1}


def test_a_policy_sees_the_steps_before_the_one_that_is_replaced(tmp_path):
    seen = []

    class Policy:
        def should_save(self, step, previous_steps, *, context):
            seen.append((step.step, [one.step for one in previous_steps], len(previous_steps)))
            return True

    with ocp.training.Checkpointer(tmp_path, save_decision_policy=Policy()) as checkpointer:
        checkpointer.save(0, STATE)
        checkpointer.save(1, STATE)
        checkpointer.save(1, STATE, overwrite=True)
    assert seen == [(0, [], 0), (1, [0], 1), (1, [0], 1)]


def test_steps_are_let_go_by_the_preservation_policy(tmp_path):
    with ocp.training.Checkpointer(tmp_path, preservation_policy=keep.LatestN(2)) as checkpointer:
        for step in range(5):
            checkpointer.save(step, STATE)
        checkpointer.wait()
        assert steps(checkpointer) == [3, 4]


def test_the_newest_step_stays_unless_it_is_given_up(tmp_path):
    worst_first = keep.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1)
    for preserve, left in ((True, [0, 2]), (False, [0])):
        with ocp.training.Checkpointer(
            tmp_path / str(preserve), preservation_policy=worst_first, preserve_newest=preserve
        ) as checkpointer:
            for step in range(3):
                checkpointer.save(step, STATE, metrics={"loss": float(step)})
            checkpointer.wait()
            assert steps(checkpointer) == left


def test_metrics_and_notes_are_kept_with_the_step(tmp_path):
    before = dt.datetime.now(dt.UTC)
    with ocp.training.Checkpointer(tmp_path, custom_metadata={"lr": 0.1}) as checkpointer:
        checkpointer.save(0, STATE, metrics={"loss": 0.5}, custom_metadata={"note": "x"})
    with ocp.training.Checkpointer(tmp_path, custom_metadata={"lr": 0.2}) as checkpointer:
        about = checkpointer.metadata(0)
        assert (about.step, about.metrics, about.custom_metadata) == (0, {"loss": 0.5}, {"note": "x"})
        assert about.metadata["step"] == 0
        assert about.metadata["w"].shape == (4,)
        assert checkpointer.checkpointables_metadata().metadata["state"] == about.metadata
        assert checkpointer.latest.metrics == {"loss": 0.5}
        assert before <= checkpointer.latest.time <= dt.datetime.now(dt.UTC)
        assert abs(checkpointer.latest.commit_timestamp_nsecs - about.commit_timestamp_nsecs) <= 1000
        assert checkpointer.root_metadata().custom_metadata == {"lr": 0.1}
        assert checkpointer.root_metadata().directory == checkpointer.directory


def test_objects_are_saved_and_loaded_by_name(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save_checkpointables(0, {"model": STATE, "config": {"lr": 0.1}}) is True
        assert checkpointer.save_checkpointables_async(1, {"config": {"lr": 0.2}}).result() is True
        assert checkpointer.load_checkpointables(0, {"config": None}) == {"config": {"lr": 0.1}}
        assert checkpointer.load_checkpointables() == {"config": {"lr": 0.2}}
        assert checkpointer.load_checkpointables_async(1).result() == {"config": {"lr": 0.2}}
        assert checkpointer.load(0, checkpointable_name="config") == {"lr": 0.1}
        with pytest.raises(KeyError):
            checkpointer.load(0)


def test_loading_in_the_background_settles_the_step_at_once(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"x": 1})
        response = checkpointer.load_async(None, {"y": 2}, extra="ignore", missing="keep")
        assert response.result() == {"y": 2}
        with pytest.raises(StepNotFoundError):
            checkpointer.load_async(7)


def test_a_step_that_is_not_there_is_missed(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        for act in (checkpointer.load, checkpointer.metadata, checkpointer.load_checkpointables):
            with pytest.raises(FileNotFoundError):
                act()
            with pytest.raises(StepNotFoundError):
                act(7)


def test_a_deleted_step_is_gone(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        for step in range(3):
            checkpointer.save_checkpointables(step, {"a": STATE, "b": {"x": 1}})
        assert checkpointer.delete(0) is True
        assert checkpointer.delete_async(checkpointer.checkpoints[0]).result() is True
        assert steps(checkpointer) == [2]
        assert checkpointer.delete(0, missing_ok=True) is False
        with pytest.raises(StepNotFoundError):
            checkpointer.delete(0)
        assert checkpointer.delete(2, checkpointable_name="a") is True
        assert checkpointer.load_checkpointables(2) == {"b": {"x": 1}}


@pytest.mark.parametrize(
    ("step", "error"), [(-1, ValueError), ("3", TypeError), (None, TypeError), (True, TypeError), (1.0, TypeError)]
)
def test_what_is_no_step_is_refused(tmp_path, step, error):
    with ocp.training.Checkpointer(tmp_path) as checkpointer, pytest.raises(error):
        checkpointer.delete(step)


def test_steps_of_others_are_seen_after_a_reload(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as reader, ocp.training.Checkpointer(tmp_path) as writer:
        writer.save(0, STATE)
        assert steps(reader) == []
        reader.reload()
        assert steps(reader) == [0]


def test_a_save_that_is_cancelled_leaves_nothing_and_lets_nothing_go(tmp_path):
    gate = Gate()
    with ocp.training.Checkpointer(tmp_path, preservation_policy=keep.LatestN(1)) as checkpointer:
        checkpointer.save(0, STATE)
        response = checkpointer.save_checkpointables_async(1, {"gate": gate, "state": STATE})
        assert gate.began.wait(60)
        assert checkpointer.is_saving_in_progress() is True
        threading.Timer(0.05, gate.may_end.set).start()
        checkpointer.cancel()
        assert checkpointer.is_saving_in_progress() is False
        assert steps(checkpointer) == [0]
        with pytest.raises(AbortedError):
            response.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]


def test_cancelling_a_step_by_name_deletes_it(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, STATE)
        checkpointer.save(1, STATE)
        checkpointer.cancel()
        checkpointer.cancel(0)
        checkpointer.cancel(7)
        assert steps(checkpointer) == [1]


def test_a_step_under_way_is_waited_for_when_it_is_loaded(tmp_path):
    gate = Gate()
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables_async(0, {"gate": gate, "state": STATE})
        assert steps(checkpointer) == [0]
        threading.Timer(0.05, gate.may_end.set).start()
        assert checkpointer.load(0)["step"] == 3


class Broken(Gate):
    async def save(self, directory):
        async def write():
            raise ZeroDivisionError("broken")

        return write()


def test_the_failure_of_a_save_is_raised_at_the_end(tmp_path):
    with (
        pytest.raises(ZeroDivisionError, match="broken"),
        ocp.training.Checkpointer(tmp_path) as checkpointer,
    ):
        checkpointer.save_checkpointables_async(0, {"x": Broken()})


def test_the_failure_of_a_save_never_hides_the_error_of_the_training(tmp_path):
    with pytest.raises(KeyError) as caught, ocp.training.Checkpointer(tmp_path) as checkpointer:  # noqa: PT012
        checkpointer.save_checkpointables_async(0, {"x": Broken()})
        raise KeyError("training")
    assert caught.value.args == ("training",)
    assert any("broken" in note for note in caught.value.__notes__)


def test_the_failure_of_a_save_is_raised_by_the_next_call(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        response = checkpointer.save_checkpointables_async(0, {"x": Broken()})
        ended = threading.Event()
        response.on_complete(lambda _: ended.set())
        assert ended.wait(60)
        with pytest.raises(ZeroDivisionError, match="broken"):
            checkpointer.save(1, STATE)
        assert checkpointer.save(1, STATE) is True


def test_the_context_that_was_active_holds_for_all_calls(tmp_path):
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        checkpointer = ocp.training.Checkpointer(tmp_path)
    with checkpointer:
        checkpointer.save(0, STATE)
        assert checkpointer.load(0, {"step": 0}) == {"step": 3}
        assert checkpointer.load_async(0, {"step": 0}).result() == {"step": 3}
    with ocp.training.Checkpointer(tmp_path, context=ocp.Context()) as strict, pytest.raises(ValueError, match="w"):
        strict.load(0, {"step": 0})


def test_the_callback_of_the_context_is_called_after_the_commit(tmp_path):
    called = []
    context = ocp.Context(
        async_options=ocp.options.AsyncOptions(
            post_finalization_callback=lambda: called.append(ocp.is_orbax_checkpoint(tmp_path / "0"))
        )
    )
    with ocp.training.Checkpointer(tmp_path, context=context) as checkpointer:
        checkpointer.save_async(0, STATE).result()
    assert called == [True]


def test_steps_are_named_by_the_format(tmp_path):
    names = ocp.path.step.standard_name_format(step_prefix="step", step_format_fixed_length=4)
    with ocp.training.Checkpointer(tmp_path, step_name_format=names) as checkpointer:
        checkpointer.save(7, STATE)
        assert checkpointer.latest.path.name == "step_0007"


def test_a_sequence_lies_on_any_storage():
    with ocp.training.Checkpointer("memory://training/runs") as checkpointer:
        checkpointer.save(0, STATE)
        checkpointer.save_async(1, STATE)
        assert steps(checkpointer) == [0, 1]
        assert checkpointer.load()["step"] == 3


def test_the_logger_is_told_and_cannot_break_anything(tmp_path):
    entries = []

    class Logger:
        def log_entry(self, entry):
            entries.append((entry["event_type"], entry["step"]))
            raise ZeroDivisionError

    with ocp.training.Checkpointer(tmp_path, logger=Logger()) as checkpointer:
        checkpointer.save(0, STATE)
        checkpointer.load(0)
    assert entries == [("save", 0), ("restore", 0)]


def test_progress_is_told_of_a_step(tmp_path):
    told = []
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"w": np.zeros(1000)}, progress=lambda done, _: told.append(done))
    assert told[-1] >= 8000
