from __future__ import annotations

import asyncio
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from milepost import v1 as ocp
from milepost.errors import AlreadyExistsError, InvalidLayoutError, ItemNotFoundError
from milepost.v1 import handlers

STATE = {"w": jnp.arange(4.0), "step": 3}


class BytesIterator:
    """Counts; its state is bytes."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return self.at

    def get_state(self):
        return self.at.to_bytes(8, "big")

    def set_state(self, state):
        self.at = int.from_bytes(state, "big")


class DictIterator(BytesIterator):
    def get_state(self):
        return {"at": self.at, "files": ["a", "b"], "rest": None}

    def set_state(self, state):
        assert state["files"] == ["a", "b"]
        self.at = state["at"]


class TreeIterator(BytesIterator):
    def get_state(self):
        return {1: np.array([self.at]), 2: (b"x", 2)}

    def set_state(self, state):
        assert state[2] == (b"x", 2)
        self.at = int(state[1][0])


class Stateful:
    """Takes note in the first phase, writes in a task that the first phase begins."""

    def __init__(self, value=0):
        self.value = value

    async def save(self, directory):
        noted = self.value

        async def write():
            path = await directory.await_creation()
            (path / "value").write_text(str(noted))

        return asyncio.ensure_future(write())

    async def load(self, directory):
        async def read():
            self.value = int((directory / "value").read_text())

        return read()


class Word:
    def __init__(self, text):
        self.text = text


class WordHandler:
    """Saves words, with a tree beside them."""

    def is_handleable(self, checkpointable):
        return isinstance(checkpointable, Word)

    def is_abstract_handleable(self, abstract_checkpointable):
        return isinstance(abstract_checkpointable, Word)

    async def save(self, directory, checkpointable):
        tree = await handlers.PyTreeHandler().save(directory / "sizes", {"n": np.arange(len(checkpointable.text))})

        async def write():
            path = await directory.await_creation()
            (path / "text").write_text(checkpointable.text)
            await tree

        return write()

    async def load(self, directory, abstract_checkpointable=None):
        async def read():
            sizes = await (await handlers.PyTreeHandler().load(directory / "sizes"))
            assert sizes["n"].tolist() == list(range(len(sizes["n"])))
            return Word((directory / "text").read_text())

        return read()

    async def metadata(self, directory):
        return {"letters": len((directory / "text").read_text())}


def registry_with(handler, name=None):
    registry = handlers.local_registry().add(handler, checkpointable_name=name)
    return ocp.Context(checkpointables_options=ocp.options.CheckpointablesOptions(registry=registry))


@pytest.mark.parametrize("kind", [BytesIterator, DictIterator, TreeIterator])
def test_an_iterator_is_saved_beside_the_model_and_goes_on_where_it_was(tmp_path, kind):
    data = kind()
    for _ in range(5):
        next(data)
    ocp.save_checkpointables(tmp_path / "1", {"state": STATE, "data": data})
    next(data)

    fresh = kind()
    loaded = ocp.load_checkpointables(tmp_path / "1", {"state": STATE, "data": fresh})

    assert loaded["data"] is fresh
    assert next(fresh) == 6
    assert loaded["state"]["step"] == 3


@pytest.mark.parametrize("kind", [BytesIterator, DictIterator, TreeIterator])
def test_the_state_of_an_iterator_is_what_it_was_when_the_save_was_called(tmp_path, kind):
    data = kind()
    next(data)
    with ocp.save_checkpointables_async(tmp_path / "1", {"data": data}):
        for _ in range(10):
            next(data)
    fresh = kind()
    ocp.load_checkpointables(tmp_path / "1", {"data": fresh})
    assert fresh.at == 1


def test_without_an_iterator_its_state_is_loaded(tmp_path):
    data = DictIterator()
    ocp.save_checkpointables(tmp_path / "1", {"data": data})
    assert ocp.load_checkpointables(tmp_path / "1") == {"data": {"at": 0, "files": ["a", "b"], "rest": None}}


def test_each_process_writes_a_file_of_its_own_for_its_iterator(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"data": DictIterator()})
    assert json.loads((tmp_path / "1/data/process_0-of-1.json").read_text())["at"] == 0


def test_an_iterator_saved_by_other_processes_is_missed_by_name(tmp_path):
    ocp.save_checkpointables("memory://iterators/1", {"data": DictIterator()})
    ocp.save_checkpointables(tmp_path / "1", {"data": DictIterator()})
    from milepost.v1._iterators import IteratorHandler
    from upath import UPath

    (tmp_path / "other").mkdir()
    (tmp_path / "other/process_0-of-2.json").write_text("{}")
    with pytest.raises(ValueError, match="process_0-of-2"):
        asyncio.run(_load(IteratorHandler(), UPath(tmp_path / "other")))


async def _load(handler, directory):
    return await (await handler.load(directory))


def test_an_object_that_saves_itself_is_loaded_in_place(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"own": Stateful(7), "state": STATE})
    fresh = Stateful()
    assert ocp.load_checkpointables(tmp_path / "1", {"own": fresh})["own"] is fresh
    assert fresh.value == 7


def test_an_object_that_saves_itself_is_noted_before_the_save_returns(tmp_path):
    own = Stateful(7)
    pending = ocp.save_checkpointables_async(tmp_path / "1", {"own": own})
    own.value = 8
    pending.result()
    fresh = Stateful()
    ocp.load_checkpointables(tmp_path / "1", {"own": fresh})
    assert fresh.value == 7


def test_an_object_that_loads_itself_must_be_given(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"own": Stateful(7)})
    with pytest.raises(ValueError, match="none was given"):
        ocp.load_checkpointables(tmp_path / "1")


def test_objects_are_saved_also_where_an_event_loop_runs(tmp_path):
    async def train():
        ocp.save_checkpointables(tmp_path / "1", {"own": Stateful(7)})
        fresh = Stateful()
        ocp.load_checkpointables(tmp_path / "1", {"own": fresh})
        return fresh.value

    assert asyncio.run(train()) == 7


def test_objects_are_saved_on_any_storage():
    ocp.save_checkpointables("memory://objects/1", {"own": Stateful(7), "data": DictIterator()})
    fresh = Stateful()
    ocp.load_checkpointables("memory://objects/1", {"own": fresh})
    assert fresh.value == 7


def test_a_handler_that_fails_leaves_no_checkpoint_and_the_error_is_its_own(tmp_path):
    class Broken(Stateful):
        async def save(self, directory):
            async def write():
                raise ZeroDivisionError("broken")

            return write()

    with pytest.raises(ZeroDivisionError, match="broken"):
        ocp.save_checkpointables(tmp_path / "1", {"own": Broken(), "state": STATE})
    assert not ocp.is_orbax_checkpoint(tmp_path / "1")


def test_a_handler_whose_second_phase_never_comes_leaves_nothing_behind(tmp_path):
    class Late(Stateful):
        async def save(self, directory):
            raise ZeroDivisionError("late")

    with pytest.raises(ZeroDivisionError, match="late"):
        ocp.save_checkpointables(tmp_path / "1", {"own": Stateful(1), "zzz": Late()})
    assert list(tmp_path.iterdir()) == []


def test_a_registered_handler_serves_its_objects(tmp_path):
    with registry_with(WordHandler):
        ocp.save_checkpointables(tmp_path / "1", {"word": Word("mile"), "state": STATE})
        assert ocp.load_checkpointables(tmp_path / "1", {"word": None})["word"].text == "mile"
        assert ocp.checkpointables_metadata(tmp_path / "1").metadata["word"] == {"letters": 4}
    assert ocp.checkpointables_metadata(tmp_path / "1").metadata["word"] is None
    with pytest.raises(KeyError, match="word"):
        ocp.load_checkpointables(tmp_path / "1", {"word": None})


def test_a_name_bound_handler_serves_that_name_alone(tmp_path):
    with registry_with(handlers.JsonHandler, "config"):
        ocp.save_checkpointables(tmp_path / "1", {"config": {"lr": 0.1}, "other": {"lr": 0.1}})
        assert ocp.load_checkpointables(tmp_path / "1") == {"config": {"lr": 0.1}, "other": {"lr": 0.1}}
    assert json.loads((tmp_path / "1/config/data.json").read_text()) == {"lr": 0.1}
    assert not (tmp_path / "1/other/data.json").exists()


def test_a_name_bound_handler_refuses_what_it_cannot_save(tmp_path):
    with registry_with(WordHandler, "config"), pytest.raises(handlers.NotHandleableError):
        ocp.save_checkpointables(tmp_path / "1", {"config": {"lr": 0.1}})


def test_what_saved_an_object_loads_it(tmp_path):
    with registry_with(handlers.JsonHandler, "config"):
        ocp.save_checkpointables(tmp_path / "1", {"config": {"lr": 0.1}})
    assert ocp.load_checkpointables(tmp_path / "1") == {"config": {"lr": 0.1}}


def test_an_object_that_nobody_serves_is_refused_with_its_name_and_class(tmp_path):
    with pytest.raises(handlers.NoEntryError, match=r"'word'.*Word"):
        ocp.save_checkpointables(tmp_path / "1", {"word": Word("a")})


def test_a_tree_with_leaves_that_nobody_serves_is_refused_leaf_by_leaf(tmp_path):
    with pytest.raises(ValueError, match=r"\['a'\]"):
        ocp.save_checkpointables(tmp_path / "1", {"tree": {"a": Word("a")}})


def test_the_registry_of_the_process_takes_handlers():
    class Handler(WordHandler):
        pass

    assert handlers.register_handler(Handler, checkpointable_name="words-of-a-test") is Handler
    assert handlers.global_registry().get("words-of-a-test") is Handler
    assert handlers.local_registry().has("words-of-a-test")
    assert not handlers.local_registry(include_global_registry=False).has("words-of-a-test")


def test_an_item_of_files_is_no_tree(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"data": DictIterator(), "weights": STATE})
    assert ocp.load(tmp_path / "1")["step"] == 3
    with pytest.raises(InvalidLayoutError, match="its own files"):
        ocp.load(tmp_path / "1", checkpointable_name="data")


def test_a_checkpoint_without_a_tree_says_what_saved_it(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"data": DictIterator()})
    with pytest.raises(InvalidLayoutError, match=r"item 'data' of .* its own files") as caught:
        ocp.load(tmp_path / "1")
    assert "IteratorHandler" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["metrics", "AUTO", "_CHECKPOINT_DELETION", "", "a/b", ".a"])
def test_names_that_cannot_be_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot save an item called"):
        ocp.save_checkpointables(tmp_path / "1", {name: STATE})


@pytest.mark.parametrize("checkpointables", [{}, [STATE], None])
def test_no_objects_are_refused(tmp_path, checkpointables):
    with pytest.raises(ValueError, match="by name is needed"):
        ocp.save_checkpointables(tmp_path / "1", checkpointables)


def test_only_the_objects_asked_for_are_loaded(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"a": {"x": 1}, "b": {"x": 2}})
    assert ocp.load_checkpointables(tmp_path / "1", {"b": {"x": 0}}) == {"b": {"x": 2}}
    with pytest.raises(KeyError):
        ocp.load_checkpointables(tmp_path / "1", {"c": None})


def test_a_target_that_does_not_fit_changes_no_object(tmp_path):
    data = DictIterator()
    next(data)
    ocp.save_checkpointables(tmp_path / "1", {"data": data, "state": STATE})
    fresh = DictIterator()
    with pytest.raises(ValueError, match="step"):
        ocp.load_checkpointables(tmp_path / "1", {"data": fresh, "state": {"w": STATE["w"]}})
    assert fresh.at == 0


def test_deleting_an_item_leaves_the_others(tmp_path):
    ocp.save_checkpointables(tmp_path / "1", {"a": {"x": np.ones(3)}, "b": {"x": 2, "y": jnp.ones(3)}})
    assert ocp.delete(tmp_path / "1", checkpointable_name="a") is True
    left = ocp.load_checkpointables(tmp_path / "1")
    assert (list(left), left["b"]["x"], left["b"]["y"].tolist()) == (["b"], 2, [1, 1, 1])
    with pytest.raises(FileNotFoundError):
        ocp.delete(tmp_path / "1", checkpointable_name="a")
    assert ocp.delete(tmp_path / "1", checkpointable_name="a", missing_ok=True) is False
    with pytest.raises(ValueError, match="only one"):
        ocp.delete(tmp_path / "1", checkpointable_name="b")


def test_a_deleted_checkpoint_is_gone(tmp_path):
    ocp.save(tmp_path / "1", STATE)
    assert ocp.delete_async(tmp_path / "1").result(30) is True
    assert not ocp.is_orbax_checkpoint(tmp_path / "1")
    with pytest.raises(FileNotFoundError):
        ocp.delete(tmp_path / "1")
    assert ocp.delete(tmp_path / "1", missing_ok=True) is False


def test_what_is_a_checkpoint_is_told_without_errors(tmp_path):
    ocp.save(tmp_path / "1", STATE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    found = {name: ocp.is_orbax_checkpoint(tmp_path / name) for name in ("1", "folder", "file", "nothing", "1/state")}
    assert found == {"1": True, "folder": False, "file": False, "nothing": False, "1/state": False}


def test_a_name_that_is_not_there_is_every_error_that_the_reference_may_raise(tmp_path):
    ocp.save(tmp_path / "1", STATE)
    with pytest.raises(ItemNotFoundError) as caught:
        ocp.load(tmp_path / "1", checkpointable_name="other")
    assert isinstance(caught.value, InvalidLayoutError)
    assert isinstance(caught.value, FileNotFoundError)
    assert str(caught.value).startswith("cannot find item 'other'")


def test_a_response_tells_when_it_is_done(tmp_path):
    called = []
    pending = ocp.save_async(tmp_path / "1", STATE)
    pending.on_complete(called.append)
    assert pending.result() is None
    assert pending.done() is True
    again = ocp.load_async(tmp_path / "1")
    assert again.result()["step"] == 3
    with pytest.raises(AlreadyExistsError):
        ocp.save_async(tmp_path / "1", STATE)
    assert called == [pending]


def test_what_is_loaded_in_the_background_follows_the_context_of_the_call(tmp_path):
    ocp.save(tmp_path / "1", STATE)
    options = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=options):
        pending = ocp.load_async(tmp_path / "1", {"step": 0})
    assert pending.result() == {"step": 3}


def test_arrays_are_stored_in_the_dtype_of_the_context(tmp_path):
    saving = ocp.options.ArrayOptions.Saving(
        storage_options=ocp.options.ArrayOptions.Saving.StorageOptions(dtype=jnp.bfloat16)
    )
    tree = {"w": jnp.ones(3), "n": np.ones(3, np.float32), "i": 3, "key": jax.random.key(0)}
    with ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)):
        ocp.save(tmp_path / "1", tree)
    found = ocp.load(tmp_path / "1")
    assert (found["w"].dtype, found["n"].dtype, found["i"]) == (jnp.bfloat16, jnp.bfloat16, 3)
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()


def test_a_callback_after_an_asynchronous_save_cannot_undo_it(tmp_path):
    called = []

    def callback():
        called.append(ocp.is_orbax_checkpoint(tmp_path / "1"))
        raise ZeroDivisionError

    with ocp.Context(async_options=ocp.options.AsyncOptions(post_finalization_callback=callback)):
        ocp.save_async(tmp_path / "1", STATE).result()
    assert called == [True]


def test_former_names_work_and_say_the_new_ones(tmp_path):
    with pytest.warns(DeprecationWarning, match="`save`"):
        ocp.save_pytree(tmp_path / "1", STATE)
    with pytest.warns(DeprecationWarning, match="`save_async`"):
        ocp.save_pytree_async(tmp_path / "2", STATE).result()
    with pytest.warns(DeprecationWarning, match="`load`"):
        assert ocp.load_pytree(tmp_path / "1")["step"] == 3
    with pytest.warns(DeprecationWarning, match="`load_async`"):
        assert ocp.load_pytree_async(tmp_path / "1").result()["step"] == 3
    with pytest.warns(DeprecationWarning, match="`metadata`"):
        assert ocp.pytree_metadata(tmp_path / "1").metadata["step"] == 0


# --- in parts --------------------------------------------------------------------------------------------------------

PARTS = [
    {"layers": {"0": {"w": jnp.arange(4.0)}}, "step": 3},
    {"layers": {"1": {"w": np.arange(5)}, "empty": {}}},
    {"layers": {"2": {"w": jnp.ones((2, 2), jnp.bfloat16)}}, "name": "x" * 3000},
]


@pytest.mark.parametrize("root", ["", "memory://parts"])
def test_parts_become_one_checkpoint_when_it_is_finalized(tmp_path, root):
    path = f"{root or tmp_path}/1"
    for number, part in enumerate(PARTS):
        ocp.partial.save(path, part, custom_metadata={str(number): number})
        assert not ocp.is_orbax_checkpoint(path)
    ocp.partial.finalize(path)
    found = ocp.load(path)
    assert found["layers"]["0"]["w"].tolist() == [0, 1, 2, 3]
    assert found["layers"]["1"]["w"].tolist() == [0, 1, 2, 3, 4]
    assert found["layers"]["2"]["w"].dtype == jnp.bfloat16
    assert (found["layers"]["empty"], found["step"], found["name"]) == ({}, 3, "x" * 3000)
    assert isinstance(found["layers"]["0"]["w"], jax.Array)
    assert isinstance(found["layers"]["1"]["w"], np.ndarray)
    assert ocp.metadata(path).custom_metadata == {"0": 0, "1": 1, "2": 2}
    assert not (tmp_path / "1.partial_save").exists()
    with pytest.raises(FileExistsError):
        ocp.partial.finalize(path)
    with pytest.raises(FileExistsError):
        ocp.partial.save(path, {"late": 1})


def test_a_checkpoint_of_parts_is_found_intact(tmp_path):
    from milepost.engine.reading import open_checkpoint
    from milepost.engine.verifying import verify

    for part in PARTS:
        ocp.partial.save_async(tmp_path / "1", part)
    ocp.partial.finalize(tmp_path / "1")
    reports = list(verify(open_checkpoint(tmp_path / "1"), threads=2))
    assert len(reports) == 3
    assert [report.problem for report in reports] == [None, None, None]


def test_a_leaf_is_in_one_part_only(tmp_path):
    from milepost.v1._parts import PartialSaveReplacementError

    ocp.partial.save(tmp_path / "1", PARTS[0])
    with pytest.raises(PartialSaveReplacementError, match=r"\['layers'\]\['0'\]\['w'\]"):
        ocp.partial.save(tmp_path / "1", {"layers": {"0": {"w": 1}}})


def test_without_parts_there_is_nothing_to_finalize(tmp_path):
    with pytest.raises(FileNotFoundError):
        ocp.partial.finalize(tmp_path / "1")


def test_a_finalize_that_was_cut_off_is_completed(tmp_path, monkeypatch):
    from milepost.v1 import _parts

    for part in PARTS:
        ocp.partial.save(tmp_path / "1", part)

    def cut(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_parts, "delete", cut)
        with pytest.raises(KeyboardInterrupt):
            ocp.partial.finalize(tmp_path / "1")
    ocp.partial.finalize(tmp_path / "1")
    assert ocp.load(tmp_path / "1")["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_damaged_part_is_not_committed(tmp_path):
    ocp.partial.save(tmp_path / "1", {"w": np.arange(10.0)})
    (file,) = (tmp_path / "1.partial_save/0/state").iterdir()
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    with pytest.raises(ValueError, match="not those that were saved"):
        ocp.partial.finalize(tmp_path / "1")
    assert not ocp.is_orbax_checkpoint(tmp_path / "1")
