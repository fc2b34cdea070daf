"""What cannot be saved is refused before a byte is written; what does not fit is shown whole."""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import errors


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Subclass(np.ndarray):
    pass


REFUSED = {
    "a function": (print, "callable"),
    "a lambda": (lambda: 0, "callable"),
    "an object": (object(), "no kind of leaf"),
    "objects in an array": (np.array([None, "x"], dtype=object), "dtype object"),
    "text in an array": (np.array(["a", "b"]), "none that JAX knows"),
    "times in an array": (np.array(["2026-01-01"], dtype="datetime64[D]"), "none that JAX knows"),
    "records in an array": (np.zeros(2, dtype=[("a", "f4")]), "none that JAX knows"),
    "a foreign byte order": (np.ones(3, dtype=">f4"), "foreign byte order"),
    "a masked array": (np.ma.masked_array([1, 2], [0, 1]), "more than the ndarray"),
    "a subclass of ndarray": (np.ones(2).view(Subclass), "more than the ndarray"),
    "an enum": (Colour.RED, "more than the int"),
    "a subclass of str": (Name("x"), "more than the str"),
    "text of numpy": (np.str_("x"), "more than the str"),
    "a set": ({1, 2}, "no kind of leaf"),
    "an abstract array": (jax.ShapeDtypeStruct((2,), jnp.float32), "no kind of leaf"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_leaf_that_cannot_be_saved_is_refused_by_path(tmp_path, what):
    leaf, reason = REFUSED[what]
    with pytest.raises(errors.UnsupportedLeafError, match=reason) as caught:
        milepost.save(tmp_path / "1", {"params": [np.ones(2), {"it": leaf}]})
    assert "['params'][1]['it']" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_open_file_is_refused(tmp_path):
    with (tmp_path / "log").open("w") as log, pytest.raises(errors.UnsupportedLeafError, match="TextIOWrapper"):
        milepost.save(tmp_path / "1", {"log": log})


def test_all_that_cannot_be_saved_is_in_one_error(tmp_path):
    tree = {f"bad {index}": object() for index in range(7)} | {"good": 1, "also bad": print}
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        milepost.save(tmp_path / "1", tree)
    assert str(caught.value).count("\n") == 8
    assert all(f"['{name}']" in str(caught.value) for name in tree if "bad" in name)


def test_a_donated_array_is_refused(tmp_path):
    array = jnp.ones(3)
    array.delete()
    with pytest.raises(errors.UnsupportedLeafError, match="deleted or donated"):
        milepost.save(tmp_path / "1", {"a": array})


def test_saving_inside_a_traced_function_is_refused(tmp_path):
    @jax.jit
    def step(x):
        milepost.save(tmp_path / "1", {"x": x})
        return x

    with pytest.raises(errors.UnsupportedLeafError, match="tracing"):
        step(jnp.ones(2))


def test_keys_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(errors.UnsupportedLeafError, match="frozenset"):
        milepost.save(tmp_path / "1", {frozenset({1}): 2})


@pytest.mark.parametrize("name", ["", "metrics", "AUTO", "_CHECKPOINT_DELETION", "a/b", ".", "..", ".hidden", "a\nb"])
def test_names_no_item_can_have_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="item called"):
        milepost.save(tmp_path / "1", {"a": 1}, checkpointable_name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "metadata", [{"a": object()}, {"a": float("nan")}, {1: 2}, {"a": {1, 2}}], ids=["object", "nan", "int key", "set"]
)
def test_metadata_that_json_cannot_hold_is_refused_before_writing(tmp_path, metadata):
    with pytest.raises(errors.RequestError, match="custom_metadata"):
        milepost.save(tmp_path / "1", {"a": 1}, custom_metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_none_is_no_state(tmp_path):
    with pytest.raises(ValueError, match="must not be None"):
        milepost.save(tmp_path / "1", None)


def test_a_name_that_is_taken_is_refused_and_nothing_changes(tmp_path):
    milepost.save(tmp_path / "1", {"a": 1})
    for kind in (ValueError, FileExistsError, errors.AlreadyExistsError):
        with pytest.raises(kind, match="already"):
            milepost.save(tmp_path / "1", {"a": 2})
    assert milepost.load(tmp_path / "1") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(errors.AlreadyExistsError):
            milepost.save(tmp_path / "1", {"a": 1}, overwrite=overwrite)
    assert (tmp_path / "1" / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    milepost.save(
        tmp_path / "1",
        {
            "w": jnp.ones((2, 3)),
            "n": np.ones(4, np.int32),
            "step": 7,
            "key": jax.random.key(0),
            "name": "x",
            "none": None,
        },
    )
    return tmp_path / "1"


def test_the_whole_difference_is_in_one_error(saved):
    target = {
        "w": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "n": np.ones(4, np.float32),
        "step": "seven",
        "name": 1,
        "more": {"a": 1},
        "none": None,
    }
    with pytest.raises(errors.MismatchError) as caught:
        milepost.load(saved, target)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "['more']['a']: missing from the checkpoint",
        "['name']: saved as a str, the target has a int",
        "['step']: saved as a int, the target has a str",
        "['w']: saved with shape (2, 3), the target has shape (3, 2)",
        "['key']: missing from the target",
    ]


def test_a_difference_is_found_before_data_is_read(saved):
    for file in (saved / "state").iterdir():
        file.write_bytes(b"")
    with pytest.raises(errors.MismatchError):
        milepost.load(saved, {"w": 1})


@pytest.mark.parametrize(
    ("leaf", "kind", "dtype"),
    [
        (jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), jax.Array, "bfloat16"),
        (jnp.zeros((2, 3), jnp.float16), jax.Array, "float16"),
        (np.zeros((2, 3), np.float64), np.ndarray, "float64"),
        (np.zeros((2, 3), np.complex64), np.ndarray, "complex64"),
    ],
    ids=repr,
)
def test_a_target_says_what_a_leaf_becomes(saved, leaf, kind, dtype):
    target = {"w": leaf, "n": ..., "step": ..., "key": ..., "name": ...}
    loaded = milepost.load(saved, target)
    assert isinstance(loaded["w"], kind)
    assert loaded["w"].dtype.name == dtype
    np.testing.assert_array_equal(np.ones((2, 3)), np.asarray(loaded["w"], np.complex64))


def test_numbers_never_change_their_kind_unasked(saved):
    target = {"w": np.zeros((2, 3), np.int32), "n": ..., "step": ..., "key": ..., "name": ...}
    with pytest.raises(errors.MismatchError, match="saved with dtype float32, the target has dtype int32"):
        milepost.load(saved, target)


def test_scalars_become_what_the_target_has(saved):
    rest = {"w": ..., "n": ..., "key": ..., "name": ...}
    assert milepost.load(saved, rest | {"step": 0.0})["step"] == 7.0
    assert type(milepost.load(saved, rest | {"step": 0.0})["step"]) is float
    assert type(milepost.load(saved, rest | {"step": np.int16(0)})["step"]) is np.int16
    array = milepost.load(saved, rest | {"step": jnp.zeros((), jnp.int32)})["step"]
    assert isinstance(array, jax.Array)
    assert int(array) == 7


def test_placeholders_are_not_loaded(saved):
    target = {"w": milepost.PLACEHOLDER, "n": np.zeros(4, np.int32), "step": ..., "key": ..., "name": ...}
    loaded = milepost.load(saved, target)
    assert loaded["w"] is ...
    np.testing.assert_array_equal(np.ones(4), loaded["n"])


def test_a_random_key_is_not_loaded_as_anything_else(saved):
    target = {"w": ..., "n": ..., "step": ..., "name": ...}
    with pytest.raises(errors.MismatchError, match="random keys of threefry2x32"):
        milepost.load(saved, target | {"key": jnp.zeros(2, jnp.uint32)})
    loaded = milepost.load(saved, target | {"key": jax.random.key(5)})
    np.testing.assert_array_equal(jax.random.key_data(jax.random.key(0)), jax.random.key_data(loaded["key"]))
    with pytest.raises(errors.MismatchError):
        milepost.load(saved, target | {"key": jax.random.key(5, impl="rbg")})


def test_abstract_trees_of_jax_are_targets(saved):
    abstract = jax.eval_shape(lambda: {"w": jnp.ones((2, 3)), "n": jnp.ones(4, jnp.int32), "key": jax.random.key(0)})
    loaded = milepost.load(saved, abstract | {"step": 0, "name": ""})
    assert all(isinstance(loaded[name], jax.Array) for name in ("w", "n", "key"))


def test_the_metadata_of_a_checkpoint_is_a_target(saved):
    loaded = milepost.load(saved, milepost.v1.metadata(saved))
    assert jax.tree.map(type, loaded) == jax.tree.map(type, milepost.load(saved))


def test_a_dict_fits_the_fields_of_a_class_and_the_other_way_round(tmp_path):
    import collections

    pair = collections.namedtuple("pair", "x y")  # noqa: PYI024 - made at run time
    milepost.save(tmp_path / "1", {"p": pair(1, 2)})
    assert milepost.load(tmp_path / "1", {"p": {"x": 0, "y": 0}}) == {"p": {"x": 1, "y": 2}}
    milepost.save(tmp_path / "2", {"p": {"x": 1, "y": 2}})
    assert milepost.load(tmp_path / "2", {"p": pair(0, 0)}) == {"p": pair(1, 2)}
