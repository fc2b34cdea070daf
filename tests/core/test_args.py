"""What is handed to checkpointers: composites, and which handler takes which arguments."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import types

import pytest
from milepost import args, errors
from milepost.args import CheckpointArgs, Composite, register_with_handler
from milepost.options import AtomicityMode, FileOptions
from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs

BUILT_IN = [
    cls
    for name in args.__all__
    if isinstance(cls := getattr(args, name), type) and issubclass(cls, CheckpointArgs) and cls is not CheckpointArgs
]


def a_handler():
    return type("Handler", (), {})


def some_args(name="Args"):
    return dataclasses.make_dataclass(name, [("item", int, 0)], bases=(CheckpointArgs,))


# --- composites ------------------------------------------------------------------------------------------------------


def test_items_are_read_by_name_and_as_attributes_in_the_order_in_which_they_were_given():
    items = Composite(z=1, a=None)
    assert list(items.items()) == [("z", 1), ("a", None)]
    assert (items.z, items["a"], items.get("z"), items.get("q", 7)) == (1, None, 1, 7)


def test_a_method_hides_an_item_of_its_name_only_as_an_attribute():
    items = Composite(items=3, get=4, self=5)
    assert (items["items"], items["get"], items.self) == (3, 4, 5)
    assert callable(items.items)


def test_a_missing_item_is_a_missing_key_and_a_missing_attribute():
    items = Composite(state=1)
    assert not hasattr(items, "data")
    assert getattr(items, "data", "none") == "none"
    for builtin in (KeyError, AttributeError, errors.ItemNotFoundError):
        with pytest.raises(builtin, match=r"^no item 'data': there are state$"):
            _ = items.data
        with pytest.raises(builtin, match=r"^no item 'data': there are state$"):
            items["data"]
    with pytest.raises(KeyError, match="there are none"):
        Composite()["data"]


def test_a_composite_cannot_be_changed():
    items = Composite(state=1)
    with pytest.raises(ValueError, match="cannot change 'state' of a Composite"):
        items.state = 2
    with pytest.raises(ValueError, match="cannot change 'other' of a Composite"):
        items.other = 2
    with pytest.raises(ValueError, match="cannot change 'state' of a Composite"):
        del items.state
    with pytest.raises(TypeError):
        items["state"] = 2
    assert dict(items) == {"state": 1}


def test_names_with_two_underscores_in_front_are_refused():
    with pytest.raises(ValueError, match="cannot name an item '__a'"):
        Composite(__a=1)
    assert dict(Composite(_a=1, _items=2)) == {"_a": 1, "_items": 2}


def test_and_keeps_common_names_with_the_values_of_the_left():
    assert Composite(b=2) == Composite(a=1, b=2) & Composite(b=3, c=4)
    assert list(Composite(b=1, a=2) & {"a": 0, "b": 0}) == ["b", "a"]


def test_or_has_all_names_with_the_values_of_the_right():
    joined = Composite(a=1, b=2) | {"b": 3, "c": 4}
    assert Composite(a=1, b=3, c=4) == joined
    assert isinstance(joined, CheckpointArgs)


@pytest.mark.parametrize("other", [3, ["a"], None])
def test_nothing_but_a_mapping_is_joined(other):
    with pytest.raises(TypeError):
        Composite(a=1) & other
    with pytest.raises(TypeError):
        Composite(a=1) | other


def test_composites_are_equal_to_mappings_with_the_same_items():
    assert Composite(a=1, b=2) == Composite(b=2, a=1)
    assert Composite(a=1) == {"a": 1}
    assert Composite(a=1) != Composite(a=2)
    assert Composite() != Composite(a=1)
    with pytest.raises(TypeError):
        hash(Composite())


def pickled(one):
    return pickle.loads(pickle.dumps(one))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, pickled])
def test_a_composite_can_be_copied(clone):
    items = Composite(a=[1], b={"c": 2})
    assert items == clone(items)
    assert Composite is type(clone(items))


# --- which handler takes which arguments -----------------------------------------------------------------------------


def test_a_decorated_class_is_found_from_its_handler_and_finds_it():
    handler = a_handler()
    save = register_with_handler(handler, for_save=True)(some_args("Save"))
    assert not args.has_registered_args(handler)
    with pytest.raises(
        ValueError, match="cannot tell the arguments of 'Handler': it has none registered for restoring"
    ):
        args.get_registered_args_cls(handler)
    restore = register_with_handler(handler, for_restore=True)(some_args("Restore"))
    for one in (handler, handler()):
        assert args.has_registered_args(one)
        assert (save, restore) == args.get_registered_args_cls(one)
    assert [handler] * 4 == [args.get_registered_handler_cls(one) for one in (save, restore, save(1), restore(2))]


def test_one_class_can_be_for_both():
    handler = a_handler()
    both = register_with_handler(handler, for_save=True, for_restore=True)(some_args())
    assert (both, both) == args.get_registered_args_cls(handler)


def test_the_later_of_two_registrations_counts():
    handler = a_handler()
    register_with_handler(handler, for_save=True, for_restore=True)(some_args("Old"))
    new = register_with_handler(handler, for_save=True, for_restore=True)(some_args("New"))
    assert (new, new) == args.get_registered_args_cls(handler)


def test_arguments_and_handlers_are_not_inherited():
    handler = a_handler()
    registered = register_with_handler(handler, for_save=True, for_restore=True)(some_args())
    derived = type("Derived", (handler,), {})
    assert not args.has_registered_args(derived)
    with pytest.raises(ValueError, match="cannot tell the arguments of 'Derived'"):
        args.get_registered_args_cls(derived())
    with pytest.raises(ValueError, match="cannot tell which handler takes 'More'"):
        args.get_registered_handler_cls(type("More", (registered,), {}))


def test_a_registration_for_nothing_is_refused():
    with pytest.raises(ValueError, match="for neither save nor restore"):
        register_with_handler(a_handler())


def test_only_arguments_can_be_registered():
    handler = a_handler()
    with pytest.raises(TypeError, match="cannot register 'int' with a handler"):
        register_with_handler(handler, for_save=True)(int)
    assert not args.has_registered_args(handler)


def test_a_handler_that_is_named_is_imported_when_it_is_asked_for(monkeypatch):
    module = types.ModuleType("some_handlers")
    module.Handler = a_handler()
    cls = some_args()
    cls._milepost_handler = "some_handlers:Handler"
    with pytest.raises(ModuleNotFoundError):
        args.get_registered_handler_cls(cls)
    monkeypatch.setitem(sys.modules, "some_handlers", module)
    assert module.Handler is args.get_registered_handler_cls(cls)


@pytest.mark.parametrize("cls", BUILT_IN)
def test_all_our_own_arguments_name_their_handler_without_importing_it(cls):
    module, _, name = vars(cls)["_milepost_handler"].partition(":")
    what = cls.__name__.removesuffix("Save").removesuffix("Restore")
    assert ("milepost.handlers", f"{what}CheckpointHandler") == (module, name)


def test_arguments_and_options_bring_no_jax():
    modules = "args, checkpoint_utils, options, transform_utils, tree, type_handlers"
    code = (
        f"import sys; from milepost import {modules}; print('jax' in sys.modules, 'milepost.handlers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_ones_own_arguments_can_derive_from_ours():
    @dataclasses.dataclass
    class More(args.StandardSave):
        note: str = ""

    assert (More({"a": 1}, note="x").item, More({"a": 1}, note="x").note) == ({"a": 1}, "x")


# --- values ----------------------------------------------------------------------------------------------------------


def test_shape_and_global_shape_are_one():
    assert (ArrayRestoreArgs(shape=(3,)).global_shape, ArrayRestoreArgs(global_shape=(3,)).shape) == ((3,), (3,))
    assert ArrayRestoreArgs(shape=(3,), global_shape=(3,)).shape == (3,)
    with pytest.raises(ValueError, match=r"global_shape=\(2,\): shape is \(3,\)"):
        ArrayRestoreArgs(shape=(3,), global_shape=(2,))


def test_array_restore_args_restore_arrays_of_jax_and_plain_ones_what_was_saved():
    import jax

    assert (jax.Array, None) == (ArrayRestoreArgs().restore_type, RestoreArgs().restore_type)


def test_the_documented_text_of_file_options():
    assert repr(FileOptions()) == "FileOptions(path_permission_mode=None)"
    assert str(AtomicityMode.AUTO) == "AtomicityMode.AUTO"
