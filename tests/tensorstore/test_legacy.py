"""Old trees in one file and trees of JAX itself: what they may hold, and what damage and malice in them come to."""

from __future__ import annotations

import base64
import json
import math
import pathlib
import shutil
import struct
import tarfile
import tracemalloc

import jax
import milepost
import ml_dtypes
import msgpack
import numpy as np
import pytest
from golden.orbax import state
from milepost import v1
from milepost.errors import DamagedError, InvalidLayoutError, MissingDataError

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "orbax"
ARRAY, COMPLEX, SCALAR = 1, 2, 3


def case(release, name, folder):
    """Unpack one golden case."""
    with tarfile.open(GOLDEN / f"{release}.tar.xz") as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(f"{name}/")]
        tar.extractall(folder, members, filter="data")
    return folder / name


def stored(array, dtype=None, code=ARRAY):
    body = msgpack.packb((list(array.shape), dtype or array.dtype.name, array.tobytes()), use_bin_type=True)
    return msgpack.ExtType(code, body)


def in_pieces(array, count):
    flat = array.ravel()
    pieces = {
        str(number): stored(flat[start : start + count]) for number, start in enumerate(range(0, flat.size, count))
    }
    shape = {str(axis): length for axis, length in enumerate(array.shape)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": pieces}


def written(folder, body):
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint").write_bytes(body)
    return folder


def packed(folder, tree):
    return written(folder, msgpack.packb(tree, use_bin_type=True))


# --- trees in one file -----------------------------------------------------------------------------------------------


def test_every_kind_of_leaf_is_loaded_from_a_tree_in_one_file(tmp_path):
    widths = [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1]
    tree = {
        "numbers": [*widths, *(-number for number in widths[1:-1]), -32, -33, True, False, 0.1, -0.0, math.inf],
        "texts": ["", "ü" * 20, "x" * 300, "y" * 70000],
        "many": list(range(300)),
        "bytes": [b"", b"\0\xff", b"z" * 300],
        "empty": {"dict": {}, "list": [], "none": None},
        **{f"key{number}": number for number in range(20)},
    }
    found = milepost.load(packed(tmp_path / "tree", tree))
    assert state.difference(tree, found) == ""


def test_lengths_may_be_written_longer_than_they_need_be(tmp_path):
    body = b"\xdf\0\0\0\x01\xdb\0\0\0\x01a\xdd\0\0\0\x02\xd3" + b"\xff" * 8 + b"\xd9\x01b"
    assert milepost.load(written(tmp_path / "tree", body)) == {"a": [-1, "b"]}


@pytest.mark.parametrize("name", ["float32", "bool", "uint8", "int64", "complex128", "bfloat16", "float8_e5m2", "int4"])
def test_arrays_scalars_and_arrays_in_pieces_are_loaded_from_a_tree_in_one_file(tmp_path, name):
    array, scalar = state.numbers(name, (5, 3), 3), state.numbers(name, (1,), 5)[0]
    tree = {"array": stored(array), "none": stored(array[:0]), "pieces": in_pieces(array, 4), "0d": stored(array[1, 1])}
    tree["0d"] = stored(np.asarray(array[1, 1]))
    tree["scalar"] = stored(np.asarray(scalar), code=SCALAR)
    found = milepost.load(packed(tmp_path / "tree", tree))
    wanted = {"array": array, "none": array[:0], "pieces": array, "0d": np.asarray(array[1, 1]), "scalar": scalar}
    assert state.difference(wanted, found) == ""


def test_complex_numbers_and_the_former_name_of_bfloat16_are_understood(tmp_path):
    array = np.arange(3).astype(ml_dtypes.bfloat16)
    number = msgpack.ExtType(COMPLEX, msgpack.packb((1.5, -2.0)))
    found = milepost.load(packed(tmp_path / "tree", {"a": stored(array, "V2"), "c": number}))
    assert state.difference({"a": array, "c": 1.5 - 2j}, found) == ""


@pytest.mark.parametrize("name", ["aggregate", "aggregate_chunked", "aggregate_mixed_ocdbt"])
def test_parts_of_arrays_in_a_tree_in_one_file_are_loaded_where_they_are_wanted(tmp_path, name):
    path = case("0.5.11", name, tmp_path)
    wanted = state.small(state.host(), ("int8",))["w"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    with v1.Context(
        pytree_options=v1.options.PyTreeOptions(loading=v1.options.PyTreeOptions.Loading(partial_load=True))
    ):
        for spec in (("x",), (None, "y"), ("y", "x"), ()):
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            found = v1.load(path, {"w": jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding)})["w"]
            assert sharding == found.sharding
            assert wanted.tobytes() == np.asarray(found).tobytes()


@pytest.mark.parametrize("name", ["aggregate", "aggregate_chunked", "aggregate_mixed", "no_metadata"])
def test_a_tree_in_one_file_that_is_cut_short_is_damaged(tmp_path, name):
    path = case("0.5.3", name, tmp_path)
    whole = (path / "checkpoint").read_bytes()
    for length in range(1, len(whole), 3):
        written(path, whole[:length])
        with pytest.raises(DamagedError, match="checkpoint"):
            milepost.load(path)


def test_no_byte_that_differs_in_a_tree_in_one_file_is_more_than_damage(tmp_path):
    path = case("0.5.3", "aggregate_chunked", tmp_path)
    whole = (path / "checkpoint").read_bytes()
    damaged = 0
    for at in range(len(whole)):
        written(path, whole[:at] + bytes([whole[at] ^ (0x01, 0x80, 0xFF)[at % 3]]) + whole[at + 1 :])
        try:
            milepost.load(path)
        except (DamagedError, InvalidLayoutError):
            damaged += 1
    assert damaged > len(whole) // 4


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "4294967295 values are said to be in 0 bytes"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff\xa1", "4294967295 values"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff\x00", "4294967295 values"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01\x93", "not shape, dtype and bytes|values|byte"),
        (b"\x81\xa1a" + b"\x91" * 300 + b"\xc0", "200 deep"),
        (b"\x81\xa1a" + b"\xdd\x00\x00\x00\x01" * 3000 + b"\xc0", "200 deep"),
        (b"\x82\xa1a\x01\xa1a\x02", "stands twice"),
        (b"\x81\xc0\x01", "a key is None"),
        (b"\x81\xa1a\xc1", "no value begins with byte 0xc1"),
        (b"\x81\xa1a\xa1\xff", "utf-8"),
        (b"\x81\xa1a\xd4\x07\x00", "extension type 7"),
        (b"\x81\xa1a\x01\x02", "1 bytes follow its end"),
        (b"\x81", "said to be in 0 bytes"),
    ],
)
def test_what_makes_no_sense_in_a_tree_in_one_file_is_named(tmp_path, body, words):
    with pytest.raises(DamagedError, match=words) as caught:
        milepost.load(written(tmp_path / "tree", body))
    assert "tree/checkpoint" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ([2**40, 2**40], "float32", "has 8 bytes"),
        ([-2], "float32", "shape"),
        ([True], "float32", "shape"),
        ("2", "float32", "shape"),
        ([2], "object", "dtype"),
        ([1], "O", "dtype"),
        ([1], "<M8[s]", "dtype"),
        ([2], "float33", "float33"),
        ([2], "finfo", "finfo"),
        ([2], 4, "not shape, dtype and bytes"),
        ([3], "float32", "has 8 bytes"),
    ],
)
def test_arrays_that_cannot_be_are_refused(tmp_path, shape, dtype, words):
    body = msgpack.ExtType(ARRAY, msgpack.packb((shape, dtype, b"\0" * 8), use_bin_type=True))
    with pytest.raises(DamagedError, match=words):
        milepost.load(packed(tmp_path / "tree", {"a": body}))


def test_a_promise_of_much_sets_nothing_aside(tmp_path):
    path = written(tmp_path / "tree", b"\x81\xa1a" + b"\xdd\x00\x00\x3f\xff" * 150 + b"\xc0" * (1 << 14))
    milepost.load(packed(tmp_path / "other", {"a": 1}))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            milepost.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_text_of_another_program_is_no_tree_in_one_file(tmp_path):
    path = written(tmp_path / "tree", b'model_checkpoint_path: "ckpt-1"\n')
    with pytest.raises(InvalidLayoutError):
        milepost.load(path)


def test_arrays_that_are_gone_from_a_mixed_tree_are_named(tmp_path):
    path = case("0.5.3", "aggregate_mixed", tmp_path)
    shutil.rmtree(path / "w")
    with pytest.raises(MissingDataError, match="'w'"):
        milepost.load(path)


# --- trees of JAX ----------------------------------------------------------------------------------------------------


def table(path):
    document = json.loads((path / "pytreedef.json").read_text())
    return document, base64.b64decode(document["__jax_pytreedef_repr"])


def replaced(path, document, body):
    text = base64.b64encode(body).decode()
    (path / "pytreedef.json").write_text(json.dumps(document | {"__jax_pytreedef_repr": text}))


def test_classes_in_a_tree_of_jax_come_back_as_containers_like_them(tmp_path):
    found = milepost.load(case("0.12.8", "jax_classes", tmp_path))
    assert (list(found["ordered"]), found["point"]._fields) == (["z", "a"], ("count", "mu"))


@pytest.mark.parametrize("name", ["jax_pytree", "jax_classes"])
def test_no_damage_to_a_tree_of_jax_is_more_than_damage(tmp_path, name):
    path = case("0.12.8", name, tmp_path)
    document, body = table(path)
    damaged = 0
    for at in range(len(body)):
        # Each byte is changed, or the first that is not there.
        replaced(path, document, body[:at] if at % 2 else body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :])
        try:
            milepost.load(path)
        except DamagedError:
            damaged += 1
    assert damaged > len(body) // 2


def test_a_small_table_cannot_stand_for_a_large_tree(tmp_path):
    path = case("0.12.8", "jax_pytree", tmp_path)
    document, _ = table(path)
    # Each of 64 lists has the next one twice: their tables are 24 bytes apart, and all share what describes them.
    body = struct.pack("<IHHHH", 12, 8, 12, 4, 8)
    for _ in range(64):
        here = len(body)
        body += struct.pack("<iB3xI", here - 4, 3, 4) + struct.pack("<III", 2, 8, 4)
    replaced(path, document, body + struct.pack("<iII", len(body) - 4, 1, 0))
    with pytest.raises(DamagedError, match="more nodes than"):
        milepost.load(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"__jax_leaf_ids": []}', '{"__jax_leaf_ids": 3, "__jax_pytreedef_repr": "BAAAAA=="}', "null"],
)
def test_what_is_no_tree_of_jax_is_named(tmp_path, text):
    path = case("0.12.8", "jax_pytree", tmp_path)
    (path / "pytreedef.json").write_text(text)
    with pytest.raises(DamagedError, match=r"pytreedef\.json"):
        milepost.load(path)


def test_a_tree_of_jax_whose_arrays_are_gone_says_which(tmp_path):
    path = case("0.12.8", "jax_pytree", tmp_path)
    document, body = table(path)
    document["__jax_leaf_ids"][5] = "Array(float32[2])"
    replaced(path, document, body)
    with pytest.raises(MissingDataError, match="'none'"):
        milepost.load(path)
    for file in (path / "array_store" / "d").iterdir():
        file.unlink()
    with pytest.raises(MissingDataError, match=r"array_store|array"):
        milepost.load(path)
    (path / "array_store" / "manifest.ocdbt").unlink()
    with pytest.raises(MissingDataError, match=r"manifest\.ocdbt"):
        milepost.load(path)


def test_a_tree_of_jax_is_described_without_reading_arrays(tmp_path):
    path = case("0.12.8", "jax_pytree", tmp_path)
    metadata = v1.metadata(path).metadata
    assert ((8, 4), np.float32) == (metadata["a"].shape, metadata["a"].dtype)


# --- what is none of these -------------------------------------------------------------------------------------------


def test_a_save_of_ours_that_was_not_committed_is_no_checkpoint_of_others(tmp_path):
    with milepost.configured({"default": {"commit": "create", "arrays": "tensorstore"}}):
        with milepost.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "7", {"w": np.arange(3)})
        # As it was before its description was written.
        for file in [tmp_path / "7" / "commit_success.txt", *(tmp_path / "7").glob("*/_*METADATA")]:
            file.unlink()
        assert list((tmp_path / "7").glob("*/manifest.ocdbt"))
        with pytest.raises(InvalidLayoutError):
            v1.load_checkpointables(tmp_path / "7")
        with milepost.CheckpointManager(tmp_path) as manager:
            assert list(manager.all_steps()) == []
