"""Handlers: what each saves, on their own and within a composite, and which of them takes what."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import errors, handlers
from milepost.args import (
    ArrayRestore,
    ArraySave,
    CheckpointArgs,
    Composite,
    JaxRandomKeyRestore,
    JaxRandomKeySave,
    JsonSave,
    NumpyRandomKeySave,
    ProtoRestore,
    ProtoSave,
    PyTreeRestore,
    PyTreeSave,
    StandardRestore,
    StandardSave,
    register_with_handler,
)
from milepost.checkpointers import Checkpointer
from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs, SaveArgs


class Wrapping(handlers.CheckpointHandler):
    """Builds on a handler of ours, as third parties do: two trees, each in a folder of its own."""

    def __init__(self):
        self._inner = handlers.PyTreeCheckpointHandler()

    def save(self, directory, args):
        for name, tree in args.item.items():
            self._inner.save(directory / name, args=PyTreeSave(tree))

    def restore(self, directory, args=None):
        return {path.name: self._inner.restore(path) for path in directory.iterdir()}


@register_with_handler(Wrapping, for_save=True, for_restore=True)
@dataclasses.dataclass
class WrappingArgs(CheckpointArgs):
    item: dict | None = None


class Shouting(handlers.PyTreeCheckpointHandler):
    """Derives from a handler of ours, and saves in its own way."""

    def save(self, directory, *args, **kwargs):
        (directory / "heard").write_text("loud")
        super().save(directory, *args, **kwargs)

    async def async_save(self, directory, *args, **kwargs):
        self.save(directory, *args, **kwargs)
        return []


def composite(*names, **rest):
    return Checkpointer(handlers.CompositeCheckpointHandler(*names, **rest))


# --- each on its own -------------------------------------------------------------------------------------------------


def test_a_single_array_or_number_is_an_object(tmp_path):
    checkpointer = Checkpointer(handlers.ArrayCheckpointHandler())
    for at, saved in enumerate((np.arange(3), jnp.arange(3.0), 7, np.float32(2))):
        checkpointer.save(tmp_path / str(at), saved)
        found = checkpointer.restore(tmp_path / str(at))
        assert (isinstance(found, type(saved)), np.asarray(found).tolist()) == (True, np.asarray(saved).tolist())
    found = checkpointer.restore(tmp_path / "1", args=ArrayRestore(restore_args=ArrayRestoreArgs(dtype=np.int8)))
    assert (isinstance(found, jax.Array), found.dtype.name) == (True, "int8")
    assert checkpointer.restore(tmp_path / "2", args=ArrayRestore(0.0)) == 7.0
    assert type(checkpointer.restore(tmp_path / "1", restore_args=RestoreArgs(np.ndarray))) is np.ndarray
    assert checkpointer.metadata(tmp_path / "0").item_metadata.shape == (3,)
    checkpointer.save(tmp_path / "cast", args=ArraySave(np.arange(3), SaveArgs(dtype=np.float16)))
    assert checkpointer.restore(tmp_path / "cast").dtype == np.float16
    for bad in ({"a": 1}, [1], "text", None):
        with pytest.raises(ValueError, match="cannot save"):
            checkpointer.save(tmp_path / "bad", bad)


@pytest.mark.parametrize("key", [lambda: jax.random.key(3), lambda: jax.random.PRNGKey(3)], ids=["typed", "legacy"])
def test_a_random_key_of_jax_is_an_object(tmp_path, key):
    checkpointer = Checkpointer(handlers.JaxRandomKeyCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=JaxRandomKeySave(key()))
    for args in (JaxRandomKeyRestore(), JaxRandomKeyRestore(RestoreArgs())):
        found = checkpointer.restore(tmp_path / "1", args=args)
        assert (found.dtype, jax.random.normal(found)) == (key().dtype, jax.random.normal(key()))
    with pytest.raises(TypeError, match=r"no jax\.Array"):
        checkpointer.save(tmp_path / "2", args=JaxRandomKeySave(3))


@pytest.mark.parametrize("legacy", [True, False])
def test_the_state_of_numpys_random_numbers_is_an_object(tmp_path, legacy):
    source = np.random.RandomState(5)
    checkpointer = Checkpointer(handlers.NumpyRandomKeyCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=NumpyRandomKeySave(source.get_state(legacy=legacy)))
    expected = source.rand(5).tolist()
    other = np.random.RandomState(6)
    other.set_state(checkpointer.restore(tmp_path / "1"))
    assert other.rand(5).tolist() == expected
    with pytest.raises(TypeError, match="neither a tuple nor a dict"):
        checkpointer.save(tmp_path / "2", args=NumpyRandomKeySave(3))


def test_json_is_one_file(tmp_path):
    for at, name in enumerate((None, "config.json")):
        checkpointer = Checkpointer(handlers.JsonCheckpointHandler(name))
        checkpointer.save(tmp_path / str(at), args=JsonSave({"a": [1, None, "ü"]}))
        assert (tmp_path / str(at) / (name or "metadata")).exists()
        assert checkpointer.restore(tmp_path / str(at)) == {"a": [1, None, "ü"]}
    for bad in ({"a": object()}, None):
        with pytest.raises(ValueError, match="cannot save"):
            checkpointer.save(tmp_path / "bad", args=JsonSave(bad))


def test_json_that_is_none_is_damaged(tmp_path):
    (tmp_path / "metadata").write_text("{")
    with pytest.raises(errors.DamagedError, match="which is no JSON"):
        handlers.JsonCheckpointHandler().restore(tmp_path)
    with pytest.raises(FileNotFoundError):
        handlers.JsonCheckpointHandler("other").restore(tmp_path)


def test_a_protocol_buffer_message_is_one_file(tmp_path):
    from google.protobuf import duration_pb2, struct_pb2

    message = struct_pb2.Struct()
    message["a"] = 1.5
    checkpointer = Checkpointer(handlers.ProtoCheckpointHandler())
    checkpointer.save(tmp_path / "1", args=ProtoSave(message))
    assert checkpointer.restore(tmp_path / "1", args=ProtoRestore(struct_pb2.Struct)) == message
    with pytest.raises(errors.DamagedError, match="as a Duration"):
        checkpointer.restore(tmp_path / "1", args=ProtoRestore(duration_pb2.Duration))
    with pytest.raises(ValueError, match="its class is not given"):
        checkpointer.restore(tmp_path / "1", args=ProtoRestore(None))
    with pytest.raises(TypeError, match="no protocol buffer message"):
        checkpointer.save(tmp_path / "2", args=ProtoSave({"a": 1}))


# --- in a folder -----------------------------------------------------------------------------------------------------


def test_a_handler_of_ours_can_be_handed_a_folder(tmp_path):
    handler = handlers.StandardCheckpointHandler()
    handler.save(tmp_path, args=StandardSave({"a": np.arange(3)}))
    assert handler.restore(tmp_path)["a"].tolist() == [0, 1, 2]
    assert handler.restore(tmp_path, args=StandardRestore({"a": np.zeros(3, np.int8)}))["a"].dtype == np.int8
    assert handler.metadata(tmp_path)["a"].shape == (3,)
    handler.finalize(tmp_path)
    handler.close()


def test_a_handler_takes_what_its_arguments_take(tmp_path):
    handler = handlers.PyTreeCheckpointHandler()
    handler.save(tmp_path / "1", {"a": 1.5}, {"a": SaveArgs(dtype=np.int8)})
    assert handler.restore(tmp_path / "1", item={"a": 0}, restore_args={"a": RestoreArgs(float)}) == {"a": 1.0}


def test_a_handler_in_a_folder_goes_on_when_the_caller_has_gone_on(tmp_path):
    handler, array = handlers.StandardCheckpointHandler(), np.arange(3)
    futures = asyncio.run(handler.async_save(tmp_path, args=StandardSave({"a": array})))
    array[:] = -1
    for future in futures:
        future.result()
    assert handler.restore(tmp_path)["a"].tolist() == [0, 1, 2]


def test_a_handler_restores_a_checkpoint_and_an_item_of_one(tmp_path):
    composite().save(tmp_path / "1", Composite(a=StandardSave({"x": 1}), b=StandardSave({"x": 2})))
    handler = handlers.StandardCheckpointHandler()
    assert [handler.restore(tmp_path / "1" / name) for name in "ab"] == [{"x": 1}, {"x": 2}]
    milepost.save(tmp_path / "2", {"x": 3})
    assert handler.restore(tmp_path / "2") == {"x": 3}
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        handler.restore(tmp_path / "3")


def test_a_composite_in_a_folder(tmp_path):
    handler = handlers.CompositeCheckpointHandler()
    handler.save(tmp_path, Composite(a=StandardSave({"x": 1}), b=JsonSave([2])))
    assert dict(handler.restore(tmp_path)) == {"a": {"x": 1}, "b": [2]}
    assert list(handler.metadata(tmp_path).item_metadata) == ["a", "b"]
    assert dict(handler.restore(tmp_path, Composite(b=None))) == {"b": [2]}


def test_a_handler_of_others_that_builds_on_ours_keeps_its_way(tmp_path):
    checkpointer = composite(two=Wrapping(), loud=Shouting())
    trees = {"one": {"a": 1}, "other": {"b": np.arange(2)}}
    checkpointer.save(tmp_path / "1", Composite(two=WrappingArgs(trees), loud=PyTreeSave({"c": 3})))
    found = checkpointer.restore(tmp_path / "1")
    assert (found.two["one"], found.two["other"]["b"].tolist(), found.loud) == ({"a": 1}, [0, 1], {"c": 3})
    assert (tmp_path / "1" / "loud" / "heard").read_text() == "loud"


# --- composites ------------------------------------------------------------------------------------------------------


def test_all_items_are_restored_by_what_the_checkpoint_says_of_them(tmp_path):
    items = Composite(
        tree=StandardSave({"a": 1}),
        config=JsonSave({"b": 2}),
        array=ArraySave(np.arange(2)),
        numpy=NumpyRandomKeySave(("MT19937", 3)),
    )
    composite().save(tmp_path / "1", items)
    found = composite().restore(tmp_path / "1")
    assert (found.tree, found.config, found.array.tolist(), found.numpy) == ({"a": 1}, {"b": 2}, [0, 1], ("MT19937", 3))


def test_what_was_saved_without_handlers_is_a_tree(tmp_path):
    milepost.save(tmp_path / "1", {"a": 1}, checkpointable_name="model")
    assert dict(composite().restore(tmp_path / "1")) == {"model": {"a": 1}}
    assert composite().metadata(tmp_path / "1").item_metadata.model["a"].dtype == np.int64


def test_a_handler_that_is_not_known_here_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    module = types.ModuleType("elsewhere")
    cls = type("Elsewhere", (Wrapping,), {"__module__": "elsewhere", "__qualname__": "Elsewhere"})
    module.Elsewhere = register_with_handler(cls, for_save=True, for_restore=True) and cls
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    args = register_with_handler(cls, for_save=True, for_restore=True)(type("Args", (WrappingArgs,), {}))
    composite().save(tmp_path / "1", Composite(x=args({"one": {"a": 1}})))
    assert composite().restore(tmp_path / "1").x == {"one": {"a": 1}}
    monkeypatch.delitem(sys.modules, "elsewhere")
    with pytest.raises(ValueError, match=r"item 'x': it was saved with 'elsewhere\.Elsewhere'") as caught:
        composite().restore(tmp_path / "1")
    assert caught.value.__notes__[0].startswith("pass arguments for the item, or give its handler")
    assert dict(composite().metadata(tmp_path / "1").item_metadata) == {"x": None}
    assert composite(x=cls()).restore(tmp_path / "1").x == {"one": {"a": 1}}
    assert composite().restore(tmp_path / "1", Composite(x=args())).x == {"one": {"a": 1}}


def test_a_name_that_is_no_handlers_makes_nothing(tmp_path):
    from milepost.engine.items import TreeItem
    from milepost.engine.saving import Save, SaveRequest

    for at, name in enumerate(("subprocess.Popen", "milepost.handlers.Composition", "milepost.handlers.nothing", "x")):
        save = Save(SaveRequest(tmp_path / str(at), {"x": TreeItem({"a": 1}, name)}))
        save.prepare(lasting=False)
        save.finish()
        with pytest.raises(ValueError, match=f"saved with '{name}'"):
            composite().restore(tmp_path / str(at))


def test_an_item_is_not_saved_in_two_ways_but_restored_as_one_likes(tmp_path):
    checkpointer = composite()
    checkpointer.save(tmp_path / "1", Composite(x=StandardSave({"a": 1})))
    with pytest.raises(ValueError, match="its handler is a StandardCheckpointHandler") as caught:
        checkpointer.save(tmp_path / "2", Composite(x=JsonSave({"a": 1})))
    assert caught.value.__notes__ == ["it takes StandardSave and StandardRestore"]
    assert checkpointer.restore(tmp_path / "1", Composite(x=PyTreeRestore())).x == {"a": 1}


def test_only_declared_items_are_saved_if_any_are_declared(tmp_path):
    for checkpointer in (composite("state"), composite(state=handlers.StandardCheckpointHandler())):
        with pytest.raises(ValueError, match="called 'stale': the items there are to be are 'state'"):
            checkpointer.save(tmp_path / "1", Composite(stale=StandardSave({"a": 1})))
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "commit_success.txt", "a\n", "a\\b"])
def test_some_names_are_no_names_of_items(tmp_path, name):
    with pytest.raises(ValueError, match="cannot save an item called"):
        composite().save(tmp_path / "1", Composite(**{name: StandardSave({"a": 1})}))


def test_an_item_without_arguments_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="'x': its arguments are None"):
        composite().save(tmp_path / "1", Composite(x=None))
    with pytest.raises(ValueError, match="registered with none"):
        composite().save(tmp_path / "1", Composite(x=CheckpointArgs()))


# --- registries ------------------------------------------------------------------------------------------------------


def test_a_registry_finds_exactly_what_was_registered():
    registry = handlers.DefaultCheckpointHandlerRegistry()
    mine = handlers.StandardCheckpointHandler()
    registry.add("x", StandardSave, mine)
    registry.add(None, PyTreeSave({}))
    assert registry.get("x", StandardSave({})) is mine
    assert type(registry.get(None, PyTreeSave)) is handlers.PyTreeCheckpointHandler
    assert [registry.has("x", StandardSave), registry.has("x", PyTreeSave)] == [True, False]
    for item, args in (("x", PyTreeSave), ("y", StandardSave)):
        with pytest.raises(KeyError, match="no handler is registered") as caught:
            registry.get(item, args)
        assert isinstance(caught.value, handlers.NoEntryError)
    with pytest.raises(handlers.AlreadyExistsError, match="there is one already"):
        registry.add("x", StandardSave)
    copy = handlers.DefaultCheckpointHandlerRegistry(registry)
    copy.add("y", StandardSave, handlers.StandardCheckpointHandler)
    assert [len(one.get_all_entries()) for one in (registry, copy)] == [2, 3]
    assert isinstance(registry, handlers.CheckpointHandlerRegistry)


def test_what_is_registered_for_an_item_comes_before_what_is_for_all(tmp_path):
    own, for_all = handlers.JsonCheckpointHandler("own"), handlers.JsonCheckpointHandler("all")
    registry = handlers.DefaultCheckpointHandlerRegistry()
    registry.add("x", JsonSave, own)
    registry.add(None, JsonSave, for_all)
    checkpointer = composite(handler_registry=registry)
    checkpointer.save(tmp_path / "1", Composite(x=JsonSave([1]), y=JsonSave([2]), z=StandardSave({"a": 3})))
    assert sorted(path.name for path in tmp_path.glob("1/[xy]/*")) == ["all", "own"]
    assert dict(checkpointer.restore(tmp_path / "1")) == {"x": [1], "y": [2], "z": {"a": 3}}


def test_a_registry_of_handlers_by_item_can_be_made_at_once(tmp_path):
    registry = handlers.create_default_handler_registry(
        x=handlers.JsonCheckpointHandler("x"), y=(Wrapping(), WrappingArgs, WrappingArgs)
    )
    assert registry.has("x", JsonSave)
    assert registry.has("y", WrappingArgs)
    with pytest.raises(ValueError, match="handlers are given, too"):
        composite("x", handler_registry=registry)


def test_closing_a_composite_closes_its_handlers():
    closed = []

    class Closing(Wrapping):
        def close(self):
            closed.append(self)

    handler = Closing()
    composite(x=handler).close()
    assert closed == [handler]
