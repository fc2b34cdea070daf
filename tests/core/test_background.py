"""Saving in the background: the snapshot stays what it was, and no failure is missed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import errors
from milepost.engine.background import Background
from milepost.hookspecs import hookimpl
from milepost.plugins import installed


class Gate:
    """Holds every write of the storage until it is opened: what happens meanwhile happens after the snapshot."""

    def __init__(self):
        self.opened = threading.Event()
        self.reached = threading.Event()

    @hookimpl(wrapper=True)
    def open_storage(self):
        storage = yield
        gate, write = self, storage.write

        def held(key, buffers):
            gate.reached.set()
            assert gate.opened.wait(60)
            write(key, buffers)

        storage.write = held
        return storage


@pytest.fixture
def gate():
    installed().load_all()
    manager = installed()._manager
    gate = Gate()
    manager.register(gate)
    yield gate
    gate.opened.set()
    manager.unregister(gate)


@pytest.fixture(autouse=True)
def _nothing_left_over():
    yield
    from milepost.engine.background import of_this_process

    of_this_process().close()


def test_the_checkpoint_does_not_exist_before_it_is_committed(tmp_path, gate):
    pending = milepost.save_async(tmp_path / "1", {"a": np.ones(3)})
    assert gate.reached.wait(60)
    assert not pending.done()
    with pytest.raises(errors.CheckpointNotFoundError):
        milepost.load(tmp_path / "1")
    gate.opened.set()
    assert pending.result() is None
    np.testing.assert_array_equal(np.ones(3), milepost.load(tmp_path / "1")["a"])


def test_overwriting_numpy_leaves_in_place_changes_nothing(tmp_path, gate):
    state = {"a": np.arange(1000.0), "b": np.asfortranarray(np.arange(12).reshape(3, 4)), "c": np.arange(10)[::2]}
    before = {name: array.copy() for name, array in state.items()}
    pending = milepost.save_async(tmp_path / "1", state)
    for array in state.values():
        array[...] = -1
    gate.opened.set()
    pending.result()
    for name, array in milepost.load(tmp_path / "1").items():
        np.testing.assert_array_equal(before[name], array)


def test_containers_and_metadata_may_change_after_the_snapshot(tmp_path, gate):
    state, noted = {"a": [1, 2]}, {"lr": [0.1]}
    pending = milepost.save_async(tmp_path / "1", state, custom_metadata=noted)
    state["a"].append(3)
    noted["lr"][0] = 9
    gate.opened.set()
    pending.result()
    assert milepost.load(tmp_path / "1") == {"a": [1, 2]}
    assert milepost.v1.metadata(tmp_path / "1").custom_metadata == {"lr": [0.1]}


@pytest.mark.parametrize("shape", [(), (7,), (1 << 20,)], ids=str)
def test_donating_to_a_step_changes_nothing(tmp_path, gate, shape):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    control = step({"w": jnp.full(shape, 2.0)})
    step(control)
    assert control["w"].is_deleted()  # donation is real here

    state = step({"w": jnp.full(shape, 2.0), "n": jnp.arange(5)})
    pending = milepost.save_async(tmp_path / "1", state)
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    assert float(state["w"].ravel()[0]) == 8.0
    gate.opened.set()
    pending.result()
    loaded = milepost.load(tmp_path / "1")
    np.testing.assert_array_equal(np.full(shape, 3.0), loaded["w"])
    np.testing.assert_array_equal(np.arange(1, 6), loaded["n"])


def test_deleting_sharded_arrays_changes_nothing(tmp_path, gate):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    array = jax.device_put(jnp.arange(64.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    pending = milepost.save_async(tmp_path / "1", {"a": array})
    array.delete()
    junk = [jnp.zeros(8) for _ in range(200)]  # whatever was freed is written over
    jax.block_until_ready(junk)
    gate.opened.set()
    pending.result()
    np.testing.assert_array_equal(np.arange(64.0), milepost.load(tmp_path / "1")["a"])


def shardings():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spec = jax.sharding.PartitionSpec
    return {
        "one": jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        "replicated": jax.sharding.NamedSharding(mesh, spec()),
        "sharded": jax.sharding.NamedSharding(mesh, spec("x")),
    }


@pytest.mark.parametrize("kind", ["one", "replicated", "sharded"])
def test_a_save_that_has_ended_holds_nothing(tmp_path, kind):
    array = jax.device_put(jnp.ones(80_000), shardings()[kind]) + 1
    milepost.save_async(tmp_path / "1", {"a": array}).result()
    jax.block_until_ready(jax.jit(lambda x: x * 2, donate_argnums=0)(array))
    assert array.is_deleted()  # donation takes the buffer only if nobody else refers to it


@pytest.mark.parametrize("budget", ["64KiB", "64MiB"])
@pytest.mark.parametrize("kind", ["one", "replicated", "sharded"])
def test_arrays_in_device_memory_are_copied_within_the_budget(tmp_path, monkeypatch, kind, budget):
    # There is no accelerator here; the decision alone is replaced, everything behind it is what runs on one.
    monkeypatch.setattr("milepost.engine.pieces.in_host_memory", lambda data: False)
    state = {f"a{index}": jax.device_put(jnp.full((80, 1000), index), shardings()[kind]) for index in range(4)}
    with milepost.configured({"default": {"save_budget": budget}}):
        pending = milepost.save_async(tmp_path / "async", state)
        milepost.save(tmp_path / "blocking", state)
        for array in state.values():
            array.delete()
        pending.result()
    for name in ("async", "blocking"):
        for index in range(4):
            loaded = milepost.load(tmp_path / name)[f"a{index}"]
            np.testing.assert_array_equal(np.full((80, 1000), index), loaded)


def test_more_numpy_than_the_budget_is_saved_before_the_call_returns(tmp_path):
    state = {f"a{index}": np.full(1 << 16, index, np.float32) for index in range(32)}
    with milepost.configured({"default": {"save_budget": "512KiB", "threads": 2}}):
        pending = milepost.save_async(tmp_path / "1", state)
        for array in state.values():
            array[:] = -1
        pending.result()
    for index in range(32):
        assert (milepost.load(tmp_path / "1")[f"a{index}"] == index).all()


def test_an_array_larger_than_the_budget_is_split(tmp_path):
    array = np.arange(3 * 70_001, dtype=np.float32).reshape(3, -1)
    with milepost.configured({"default": {"save_budget": "256KiB", "load_budget": "256KiB"}}):
        milepost.save_async(tmp_path / "1", {"a": array}).result()
        np.testing.assert_array_equal(array, milepost.load(tmp_path / "1")["a"])


def test_saves_are_committed_in_order(tmp_path):
    for step in range(5):
        milepost.save_async(tmp_path / str(step), {"step": step})
    milepost.save_async(tmp_path / "last", {"step": 5}).result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4", "last"]


def test_on_complete_is_called_when_the_work_has_ended(tmp_path):
    seen = threading.Event()
    milepost.save_async(tmp_path / "1", {"a": 1}).on_complete(lambda pending: pending.done() and seen.set())
    assert seen.wait(60)


def test_a_result_can_be_waited_for_with_a_deadline(tmp_path, gate):
    pending = milepost.save_async(tmp_path / "1", {"a": 1})
    with pytest.raises(TimeoutError):
        pending.result(timeout=0.01)
    gate.opened.set()
    pending.result()


def test_load_async_returns_what_load_returns(tmp_path):
    milepost.save(tmp_path / "1", {"a": np.arange(3)})
    np.testing.assert_array_equal(np.arange(3), milepost.load_async(tmp_path / "1").result()["a"])
    with pytest.raises(errors.MismatchError):
        milepost.load_async(tmp_path / "1", {"b": 1}).result()


# --- failures --------------------------------------------------------------------------------------------------------


def failing(message="the disk is on fire"):
    def work():
        raise errors.StorageError(message)

    return work


@pytest.fixture
def failing_save(tmp_path):
    """Start a save whose name is taken while it is being written."""

    def start():
        gate = Gate()
        installed().load_all()
        installed()._manager.register(gate)
        try:
            pending = milepost.save_async(tmp_path / "taken", {"a": 1})
        finally:
            installed()._manager.unregister(gate)
        assert gate.reached.wait(60)
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").write_text("")
        gate.opened.set()
        return pending

    return start


def test_a_failure_is_raised_by_its_result(failing_save, tmp_path):
    pending = failing_save()
    with pytest.raises(errors.AlreadyExistsError):
        pending.result()
    milepost.save(tmp_path / "2", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "taken"]


@pytest.mark.parametrize("call", [milepost.save, milepost.save_async])
def test_a_failure_nobody_saw_is_raised_by_the_next_call(failing_save, tmp_path, call):
    with pytest.raises(errors.AlreadyExistsError):  # noqa: PT012 - the first call may not have ended when save is called
        failing_save().on_complete(lambda _: None)
        milepost.save_async(tmp_path / "2", {"a": 1})
    call(tmp_path / "3", {"a": 1})


def test_a_failure_is_raised_once():
    background = Background()
    background.start(failing(), "a save")
    with pytest.raises(errors.StorageError, match="on fire"):
        background.wait()
    background.wait()
    background.check()


def test_leaving_a_with_block_raises_the_failure():
    with pytest.raises(errors.StorageError, match="on fire"), Background().start(failing(), "the save of '1'"):
        pass


def test_an_exception_on_its_way_is_never_replaced():
    with pytest.raises(ZeroDivisionError) as caught, Background().start(failing(), "the save of '1'"):
        1 / 0  # noqa: B018 - training fails too
    assert caught.value.__notes__ == ["and the save of '1' failed: the disk is on fire"]


def test_leaving_a_with_block_waits(tmp_path):
    with milepost.save_async(tmp_path / "1", {"a": np.ones(1 << 20)}):
        pass
    assert milepost.load(tmp_path / "1")["a"].sum() == 1 << 20


def run(code, *args):
    script = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_script_may_end_right_after_its_last_save(tmp_path):
    done = run(
        "import sys, milepost, numpy as np; milepost.save_async(sys.argv[1], {'a': np.ones(1 << 22)})", tmp_path / "1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert milepost.load(tmp_path / "1")["a"].sum() == 1 << 22


FAILING = """
    import atexit, sys, milepost
    from milepost.engine.background import of_this_process
    atexit.register(lambda: print("others cleaned up"))
    def fail(): raise OSError("no space left on this planet")
    of_this_process().start(fail, "the save of 'x'")
    print("training is over")
"""


def test_a_process_whose_last_save_failed_does_not_exit_with_success():
    done = run(FAILING)
    assert done.returncode == 1
    assert "no space left on this planet" in done.stderr
    assert done.stdout == "training is over\nothers cleaned up\n"


def test_at_exit_the_own_error_of_a_process_stays_the_last_word():
    done = run(FAILING + "    raise RuntimeError('training diverged')\n")
    assert done.returncode == 1
    assert "training diverged" in done.stderr
    assert "no space left on this planet" in done.stderr


def test_a_failure_that_was_seen_does_not_fail_the_process():
    done = run(
        FAILING
        + """
    try:
        of_this_process().wait()
    except OSError:
        pass
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
