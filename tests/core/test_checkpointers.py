"""Checkpointers: one object at a path, saved and restored, in the foreground and in the background."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import errors, handlers
from milepost.args import Composite, JsonSave, PyTreeRestore, PyTreeSave, StandardRestore, StandardSave
from milepost.checkpointers import (
    AbstractCheckpointer,
    AsyncCheckpointer,
    Checkpointer,
    PyTreeCheckpointer,
    StandardCheckpointer,
)
from milepost.options import AsyncOptions, AtomicityMode, AtomicityOptions, FileOptions


class Note(handlers.CheckpointHandler):
    """Keeps a text in a file; a handler as somebody else would write it, with arguments by position."""

    def __init__(self):
        self.told = []

    def save(self, directory, item, suffix=""):
        (directory / "note").write_text(item + suffix)

    def restore(self, directory, prefix=""):
        return prefix + (directory / "note").read_text()

    def structure(self, directory):
        return len((directory / "note").read_text())

    def finalize(self, directory):
        self.told.append(("finalize", sorted(path.name for path in directory.iterdir())))

    def close(self):
        self.told.append("close")


class Failing(Note):
    """Cannot complete what it has begun."""

    def finalize(self, directory):
        raise OSError("the disk is gone")


class Gated(Note):
    """Completes its files when it is told to."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def finalize(self, directory):
        assert self.gate.wait(60)


def tree():
    return {"w": jnp.arange(4.0), "n": np.arange(3), "step": 7}


def same(tree, other):
    return jax.tree.all(jax.tree.map(lambda a, b: type(a) is type(b) and np.array_equal(a, b), tree, other))


# --- in the foreground -----------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path):
    checkpointer = Checkpointer(handlers.StandardCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=StandardSave(tree()))
    assert same(checkpointer.restore(tmp_path / "1"), tree())


@pytest.mark.parametrize("call", ["args", "positional args", "item", "state", "positional"])
def test_arguments_are_given_as_an_object_or_as_what_its_class_takes(tmp_path, call):
    checkpointer = Checkpointer(handlers.StandardCheckpointHandler())
    save, target = StandardSave(tree()), jax.tree.map(np.asarray, tree())
    restore = StandardRestore(target)
    match call:
        case "args":
            checkpointer.save(tmp_path / "1", args=save)
            found = checkpointer.restore(tmp_path / "1", args=restore)
        case "positional args":
            checkpointer.save(tmp_path / "1", save)
            found = checkpointer.restore(tmp_path / "1", restore)
        case "positional":
            checkpointer.save(tmp_path / "1", tree())
            found = checkpointer.restore(tmp_path / "1", target)
        case keyword:
            checkpointer.save(tmp_path / "1", **{keyword: tree()})
            found = checkpointer.restore(tmp_path / "1", **{keyword: target})
    assert same(found, target)


def test_arguments_for_another_handler_are_refused(tmp_path):
    checkpointer = Checkpointer(handlers.StandardCheckpointHandler())
    with pytest.raises(ValueError, match="cannot hand a PyTreeSave to a StandardCheckpointHandler") as caught:
        checkpointer.save(tmp_path / "1", args=PyTreeSave(tree()))
    assert caught.value.__notes__ == ["pass args=StandardSave(...)"]
    with pytest.raises(TypeError, match="itm"):
        checkpointer.save(tmp_path / "1", itm=tree())
    assert not (tmp_path / "1").exists()


def test_the_plain_functions_load_what_a_checkpointer_saved_and_the_other_way_round(tmp_path):
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", tree())
        checkpointer.wait_until_finished()
        assert same(milepost.load(tmp_path / "1"), tree())
        milepost.save(tmp_path / "2", tree())
        assert same(checkpointer.restore(tmp_path / "2"), tree())


def test_relative_paths_and_urls_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = PyTreeCheckpointer()
    checkpointer.save("run/1", tree())
    assert (tmp_path / "run/1/commit_success.txt").exists()
    assert same(checkpointer.restore(f"file://{tmp_path}/run/1"), tree())


def test_what_is_there_is_replaced_only_by_force(tmp_path):
    checkpointer = PyTreeCheckpointer()
    checkpointer.save(tmp_path / "1", {"a": 1})
    with pytest.raises(ValueError, match="is there already"):
        checkpointer.save(tmp_path / "1", {"a": 2})
    assert checkpointer.restore(tmp_path / "1") == {"a": 1}
    checkpointer.save(tmp_path / "1", {"b": 2}, force=True)
    assert checkpointer.restore(tmp_path / "1") == {"b": 2}


def test_a_save_that_is_refused_by_force_or_not_harms_nothing(tmp_path):
    checkpointer = PyTreeCheckpointer()
    checkpointer.save(tmp_path / "1", {"a": 1})
    with pytest.raises(ValueError, match=r"\['a'\]: a object is no kind of leaf"):
        checkpointer.save(tmp_path / "1", {"a": object()}, force=True)
    assert checkpointer.restore(tmp_path / "1") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_force_does_not_remove_what_is_no_checkpoint(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"it holds 'thesis.txt'"):
        PyTreeCheckpointer().save(tmp_path / "1", {"a": 1}, force=True)
    assert (tmp_path / "1" / "thesis.txt").read_text() == "years of work"


def test_nothing_there_a_file_and_an_unfinished_save_are_told_apart(tmp_path):
    checkpointer = PyTreeCheckpointer()
    (tmp_path / "file").write_text("x")
    (tmp_path / "1.orbax-checkpoint-tmp-5").mkdir()
    for name in ("missing", "file"):
        with pytest.raises(FileNotFoundError) as caught:
            checkpointer.restore(tmp_path / name)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="cannot open"):
        checkpointer.restore(tmp_path / "1.orbax-checkpoint-tmp-5")


def test_custom_metadata_comes_back_and_is_refused_at_once_if_json_cannot_hold_it(tmp_path):
    checkpointer = PyTreeCheckpointer()
    checkpointer.save(tmp_path / "1", {"a": 1}, custom_metadata={"lr": 0.1})
    assert checkpointer.metadata(tmp_path / "1").custom_metadata == {"lr": 0.1}
    for bad in ({"a": object()}, {1: 2}):
        with pytest.raises(ValueError, match="custom_metadata") as caught:
            checkpointer.save(tmp_path / "2", {"a": 1}, custom_metadata=bad)
        assert isinstance(caught.value, TypeError)
    assert not (tmp_path / "2").exists()


def test_metadata_tells_handler_leaves_and_times(tmp_path):
    checkpointer = Checkpointer(handlers.StandardCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=StandardSave(tree(), custom_metadata={"of": "the tree"}))
    found = checkpointer.metadata(tmp_path / "1")
    assert found.item_handlers == "milepost.handlers.StandardCheckpointHandler"
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in found.item_metadata.items()} == {
        "n": ((3,), "int64"),
        "step": ((), "int64"),
        "w": ((4,), "float32"),
    }
    assert found.item_metadata.custom_metadata == {"of": "the tree"}
    assert 0 < found.init_timestamp_nsecs <= found.commit_timestamp_nsecs
    assert checkpointer.structure(tmp_path / "1") is None


def test_metadata_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        PyTreeCheckpointer().metadata(tmp_path / "1")


def test_the_mode_of_directories_is_the_one_asked_for(tmp_path):
    options = FileOptions(path_permission_mode=0o750)
    Checkpointer(handlers.PyTreeCheckpointHandler(), file_options=options).save(tmp_path / "1", {"a": np.ones(3)})
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o750


def test_a_commit_by_its_object_instead_of_a_rename_can_be_asked_for(tmp_path):
    options = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
    checkpointer = Checkpointer(handlers.PyTreeCheckpointHandler(), atomicity_options=options)
    checkpointer.save(tmp_path / "1", {"a": 1})
    assert PyTreeCheckpointer().restore(tmp_path / "1") == {"a": 1}


@pytest.mark.parametrize("make", [PyTreeCheckpointer, StandardCheckpointer])
def test_a_closed_checkpointer_cannot_be_used_and_can_be_closed_again(tmp_path, make):
    checkpointer = make()
    checkpointer.save(tmp_path / "1", {"a": 1})
    checkpointer.close()
    checkpointer.close()
    for act in (lambda: checkpointer.save(tmp_path / "2", {"a": 1}), lambda: checkpointer.restore(tmp_path / "1")):
        with pytest.raises(RuntimeError, match="it was closed"):
            act()


def test_an_interface_needs_no_more_than_saving_and_restoring(tmp_path):
    class Own(AbstractCheckpointer):
        def save(self, directory, *args, **kwargs): ...
        def restore(self, directory, *args, **kwargs): ...

    own = Own()
    assert (own.structure(tmp_path), own.metadata(tmp_path), own.close()) == (None, None, None)
    with pytest.raises(TypeError, match="abstract"):
        AbstractCheckpointer()


# --- the handlers of others ------------------------------------------------------------------------------------------


def test_a_handler_without_classes_of_arguments_gets_them_as_they_were_given(tmp_path):
    handler = Note()
    with Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "1", "text", suffix="!")
        assert checkpointer.restore(tmp_path / "1", "a ") == "a text!"
        assert checkpointer.structure(tmp_path / "1") == 5
        assert checkpointer.metadata(tmp_path / "1").item_metadata is None
        assert checkpointer.handler is handler
    assert handler.told == [("finalize", ["note"]), "close"]


def test_what_a_handler_wrote_cannot_be_loaded_as_a_tree(tmp_path):
    Checkpointer(Note()).save(tmp_path / "1", "text")
    with pytest.raises(ValueError, match="wrote its own files") as caught:
        PyTreeCheckpointer().restore(tmp_path / "1")
    assert caught.value.__notes__[0].endswith("Note")


def test_a_handler_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="the disk is gone"):
        Checkpointer(Failing()).save(tmp_path / "1", "text")
    assert list(tmp_path.iterdir()) == []


# --- in the background -----------------------------------------------------------------------------------------------


def test_what_is_saved_can_be_changed_as_soon_as_save_returns(tmp_path):
    array, donated = np.arange(1000), jnp.arange(1000)
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", {"np": array, "jax": donated})
        array[:] = -1
        donated.delete()
        found = checkpointer.restore(tmp_path / "1")
    assert [found["np"].tolist(), found["jax"].tolist()] == [list(range(1000))] * 2


def test_nothing_is_at_the_path_until_the_save_has_ended(tmp_path):
    handler = Gated()
    with AsyncCheckpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "1", "text")
        assert not (tmp_path / "1").exists()
        handler.gate.set()
        checkpointer.wait_until_finished()
        assert (tmp_path / "1" / "commit_success.txt").exists()


def test_restoring_waits_for_the_save_under_way(tmp_path):
    handler = Gated()
    with AsyncCheckpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "1", "text")
        threading.Timer(0.05, handler.gate.set).start()
        assert checkpointer.restore(tmp_path / "1") == "text"


def test_what_can_be_refused_is_refused_at_once(tmp_path):
    with StandardCheckpointer() as checkpointer:
        with pytest.raises(ValueError, match="there is no item"):
            checkpointer.save(tmp_path / "1", None)
        with pytest.raises(ValueError, match="2 of its leaves") as caught:
            checkpointer.save(tmp_path / "1", {"a": object(), "b": {"c": lambda: 0}, "d": 1})
        assert "['a']" in str(caught.value)
        assert "['b']['c']" in str(caught.value)
        checkpointer.save(tmp_path / "1", {"a": 1})
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="is there already"):
            checkpointer.save(tmp_path / "1", {"a": 1})


@pytest.mark.parametrize("ask", ["wait_until_finished", "save", "restore", "close"])
def test_a_failed_save_raises_its_error_once(tmp_path, ask):
    checkpointer = AsyncCheckpointer(Failing())
    checkpointer.save(tmp_path / "1", "text")
    arguments = {"save": (tmp_path / "2", "text"), "restore": (tmp_path / "1",)}.get(ask, ())
    with pytest.raises(OSError, match="the disk is gone"):
        getattr(checkpointer, ask)(*arguments)
    checkpointer.close()
    assert list(tmp_path.iterdir()) == []


def test_checking_for_errors_does_not_wait(tmp_path):
    handler = Gated()
    with AsyncCheckpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "1", "text")
        checkpointer.check_for_errors()
        handler.gate.set()


def test_checking_for_errors_raises_that_of_a_save_that_has_ended(tmp_path):
    checkpointer = AsyncCheckpointer(Failing())
    checkpointer.save(tmp_path / "1", "text")
    while any(thread.name == "milepost" for thread in threading.enumerate()):
        next(thread for thread in threading.enumerate() if thread.name == "milepost").join()
    with pytest.raises(OSError, match="the disk is gone"):
        checkpointer.check_for_errors()
    checkpointer.check_for_errors()
    checkpointer.close()


def test_leaving_the_block_raises_the_error_of_a_save_that_failed(tmp_path):
    with pytest.raises(OSError, match="the disk is gone"), AsyncCheckpointer(Failing()) as checkpointer:
        checkpointer.save(tmp_path / "1", "text")


def test_an_exception_on_its_way_is_not_replaced_by_that_of_a_save(tmp_path):
    def train():
        with AsyncCheckpointer(Failing()) as checkpointer:
            checkpointer.save(tmp_path / "1", "text")
            raise ZeroDivisionError("the training")

    with pytest.raises(ZeroDivisionError, match="the training") as caught:
        train()
    assert caught.value.__notes__ == ["and a save in the background failed: the disk is gone"]


def test_a_save_that_is_given_up_leaves_nothing_and_no_error(tmp_path):
    handler = Gated()
    with AsyncCheckpointer(handler) as checkpointer:
        checkpointer.cancel()
        checkpointer.save(tmp_path / "1", "text")
        threading.Timer(0.05, handler.gate.set).start()
        checkpointer.cancel()
        assert list(tmp_path.iterdir()) == []
        checkpointer.save(tmp_path / "2", "text")
        checkpointer.wait_until_finished()
        checkpointer.cancel()
        assert checkpointer.restore(tmp_path / "2") == "text"


def test_the_callback_finds_the_checkpoint_committed(tmp_path):
    seen = []
    options = AsyncOptions(post_finalization_callback=lambda: seen.append((tmp_path / "1/commit_success.txt").exists()))
    with StandardCheckpointer(async_options=options) as checkpointer:
        checkpointer.save(tmp_path / "1", {"a": 1})
    assert seen == [True]


def test_a_callback_that_fails_is_told_and_undoes_nothing(tmp_path, caplog):
    def fail():
        raise ZeroDivisionError("the callback")

    with StandardCheckpointer(async_options=AsyncOptions(post_finalization_callback=fail)) as checkpointer:
        checkpointer.save(tmp_path / "1", {"a": 1})
        checkpointer.wait_until_finished()
        assert checkpointer.restore(tmp_path / "1") == {"a": 1}
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_is_a_time(timeout):
    with pytest.raises(ValueError, match=f"cannot wait for {timeout} seconds"):
        AsyncCheckpointer(handlers.StandardCheckpointHandler(), timeout)


def test_a_process_that_ends_with_a_failed_save_fails(tmp_path):
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
        from test_checkpointers import AsyncCheckpointer, Failing
        AsyncCheckpointer(Failing()).save({str(tmp_path / "1")!r}, "text")
    """)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, "the disk is gone" in ended.stderr) == (1, True)


# --- several items ---------------------------------------------------------------------------------------------------


def test_the_items_of_a_composite_share_one_commit_and_come_back_by_name(tmp_path):
    with AsyncCheckpointer(handlers.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "1", args=Composite(model=StandardSave(tree()), config=JsonSave({"a": [1, None]})))
        checkpointer.wait_until_finished()
        assert len(list(tmp_path.glob("**/commit_success.txt"))) == 1
        found = checkpointer.restore(tmp_path / "1")
        assert found.config == {"a": [1, None]}
        assert same(found.model, tree())
        asked = Composite(model=StandardRestore({"w": np.zeros(4), "n": np.zeros(3), "step": 0.0}))
        assert checkpointer.restore(tmp_path / "1", asked)["model"]["step"] == 7.0
        metadata = checkpointer.metadata(tmp_path / "1")
    assert metadata.item_handlers == {
        "model": "milepost.handlers.StandardCheckpointHandler",
        "config": "milepost.handlers.JsonCheckpointHandler",
    }
    assert (metadata.item_metadata.model["w"].shape, metadata.item_metadata.config) == ((4,), None)


def test_a_failing_item_leaves_no_item(tmp_path):
    checkpointer = Checkpointer(handlers.CompositeCheckpointHandler())
    with pytest.raises(TypeError, match="as JSON"):
        checkpointer.save(tmp_path / "1", Composite(model=StandardSave(tree()), config=JsonSave({"a": object()})))
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_an_item_can_be_restored_from(tmp_path):
    Checkpointer(handlers.CompositeCheckpointHandler()).save(tmp_path / "1", Composite(default=PyTreeSave(tree())))
    assert same(PyTreeCheckpointer().restore(tmp_path / "1" / "default"), tree())
    assert same(PyTreeCheckpointer().restore(tmp_path / "1"), tree())


def test_a_single_handler_finds_the_item_that_was_saved_like_its_own(tmp_path):
    items = Composite(config=JsonSave({"a": 1}), model=StandardSave({"a": 2}))
    Checkpointer(handlers.CompositeCheckpointHandler()).save(tmp_path / "1", items)
    with StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "1") == {"a": 2}
    assert Checkpointer(handlers.JsonCheckpointHandler()).restore(tmp_path / "1") == {"a": 1}


def test_what_is_not_there_is_a_missing_item(tmp_path):
    checkpointer = Checkpointer(handlers.CompositeCheckpointHandler())
    checkpointer.save(tmp_path / "1", Composite(model=PyTreeSave({"a": 1})))
    with pytest.raises(KeyError, match=r"item 'data'.* it has 'model'") as caught:
        checkpointer.restore(tmp_path / "1", Composite(data=PyTreeRestore()))
    assert isinstance(caught.value, errors.ItemNotFoundError)
