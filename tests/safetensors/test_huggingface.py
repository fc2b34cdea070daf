from __future__ import annotations

import json
import math
import struct

import jax
import milepost
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from milepost.errors import ConfigError, DamagedError, InvalidLayoutError, MissingDataError, UnsupportedLeafError
from milepost.protocols import ArrayIO, ArraySpec, Box, Layout, Location, Piece, ReadOptions, ReadRequest, WriteOptions
from milepost_posix import PosixStorage
from milepost_safetensors import HuggingFaceArrays, HuggingFaceLayout

MIB = 1 << 20
NATIVE = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
]
TENSORS = {
    "embed.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "layers.0.kernel": np.arange(6, dtype=np.float16).reshape(2, 3),
    "step": np.array(7, np.int64),
    "none": np.zeros((0, 5), np.int8),
}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def some(name, shape, seed=0):
    """Arrays of any bits, of which no two are alike."""
    dtype = dtype_of(name)
    generator = np.random.default_rng([seed, *name.encode()])
    bits = generator.bytes(math.prod(shape) * dtype.itemsize)
    if name == "bool":
        bits = bytes(one & 1 for one in bits)
    return np.frombuffer(bits, dtype).reshape(shape)


def same(one, other):
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def raw_file(path, header, data=b"", pad=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def sharded(folder, shards, index="model.safetensors.index.json"):
    folder.mkdir()
    homes = {}
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, folder / name)
        homes |= dict.fromkeys(tensors, name)
    size = sum(array.nbytes for tensors in shards.values() for array in tensors.values())
    (folder / index).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": homes}))
    return folder


def load_by_orbax(folder, target=None):
    from orbax.checkpoint import v1 as ocp

    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        return ocp.load(folder, target)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_classes_are_what_the_protocols_ask_for():
    assert isinstance(HuggingFaceArrays(), ArrayIO)
    assert isinstance(HuggingFaceLayout(), Layout)


def test_a_folder_with_one_file_loads_as_a_flat_dict_of_numpy_arrays_as_in_orbax(tmp_path):
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file(TENSORS, tmp_path / "model/model.safetensors")
    expected = load_by_orbax(tmp_path / "model")
    loaded = milepost.load(tmp_path / "model")
    assert loaded.keys() == expected.keys() == TENSORS.keys()
    assert {type(array) for array in loaded.values()} == {np.ndarray}
    assert all(same(loaded[name], expected[name]) and same(loaded[name], TENSORS[name]) for name in TENSORS)


def test_tensors_go_where_the_target_says_as_in_orbax(tmp_path):
    weights = {"w": np.arange(64, dtype=np.float32).reshape(16, 4), "b": np.arange(4, dtype=np.float32)}
    folder = sharded(tmp_path / "m", {"a.safetensors": {"w": weights["w"]}, "b.safetensors": {"b": weights["b"]}})
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = {
        "w": jax.ShapeDtypeStruct((16, 4), np.float32, sharding=rows),
        "b": jax.ShapeDtypeStruct((4,), np.float16, sharding=everywhere),
    }
    expected, loaded = load_by_orbax(folder, target), milepost.load(folder, target)
    for name, array in loaded.items():
        assert (array.sharding, array.dtype) == (expected[name].sharding, expected[name].dtype)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]))


def test_several_files_without_an_index_are_one_tree(tmp_path):
    (tmp_path / "m").mkdir()
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "m/one.safetensors")
    safetensors.numpy.save_file({"b": np.zeros(2)}, tmp_path / "m/two.safetensors")
    loaded = milepost.load(tmp_path / "m")
    assert {name: array.tolist() for name, array in loaded.items()} == {"a": [1, 1, 1], "b": [0, 0]}
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "m/three.safetensors")
    with pytest.raises(DamagedError, match="several files have the tensors 'a'"):
        milepost.load(tmp_path / "m")


def test_other_files_in_the_folder_do_not_matter_and_the_index_decides(tmp_path):
    folder = sharded(tmp_path / "m", {"a.safetensors": {"w": np.ones(3)}, "b.safetensors": {"v": np.ones(2)}})
    safetensors.numpy.save_file({"w": np.zeros(3)}, folder / "consolidated.safetensors")
    (folder / "config.json").write_text("{}")
    loaded = milepost.load(folder)
    assert {name: array.tolist() for name, array in loaded.items()} == {"v": [1, 1], "w": [1, 1, 1]}


def test_names_with_slashes_tildes_and_nothing_in_them_are_told_apart(tmp_path):
    tensors = {name: np.full(1, at) for at, name in enumerate(["a/b", "a~1b", "~", "", "value", "ä"])}
    (tmp_path / "m").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "m/model.safetensors")
    loaded = milepost.load(tmp_path / "m")
    assert {name: array[0] for name, array in loaded.items()} == {name: array[0] for name, array in tensors.items()}


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_at_odd_offsets_are_read_into_aligned_memory(tmp_path, monkeypatch, mapped):
    monkeypatch.setenv("MILEPOST_TOML", f"default.mapped = {str(mapped).lower()}")
    small, large = np.arange(5, dtype=np.float64), np.arange(20_000, dtype=np.float32)
    ends = (3, 3 + small.nbytes, 3 + small.nbytes + large.nbytes)
    header = {
        "flags": entry("BOOL", [3], 0, ends[0]),
        "small": entry("F64", [5], ends[0], ends[1]),
        "large": entry("F32", [20_000], ends[1], ends[2]),
    }
    for pad in range(8):
        folder = tmp_path / f"m{pad}"
        raw_file(folder / "model.safetensors", header, b"\1\0\1" + small.tobytes() + large.tobytes(), pad)
        loaded = milepost.load(folder)
        assert all(array.flags.aligned and array.flags.writeable for array in loaded.values())
        assert loaded["flags"].tolist() == [True, False, True]
        np.testing.assert_array_equal(loaded["small"], small)
        np.testing.assert_array_equal(loaded["large"], large)


def test_milepost_s_own_packed_files_are_not_taken_for_a_model(tmp_path):
    milepost.save(tmp_path / "7", {"w": np.ones(3)})
    with pytest.raises(InvalidLayoutError, match="within a checkpoint"):
        milepost.load(tmp_path / "7/state")


def test_the_manifest_of_a_folder_changes_when_its_files_do(tmp_path):
    storage, path = PosixStorage(tmp_path.as_uri()), tmp_path / "m/model.safetensors"
    raw_file(path, {"a": entry("U8", [1], 0, 1)}, b"\1")
    read = HuggingFaceLayout().read
    before = read(storage, "m/", ["model.safetensors"])["attempt"]
    assert read(storage, "m/", ["model.safetensors"])["attempt"] == before
    raw_file(path, {"b": entry("U8", [1], 0, 1)}, b"\1")
    assert read(storage, "m/", ["model.safetensors"])["attempt"] != before
    assert read(storage, "m/", ["config.json", "pytorch_model.bin"]) is None


# --- damage ----------------------------------------------------------------------------------------------------------

GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [4], 8, 12)}
WRONG = {
    "shorter than its header": (b"{", b"", 1 << 40),
    "no JSON": (b"{]", b"", None),
    "no UTF-8": (b'{"\xff":1}', b"", None),
    "no object": (b"[1, 2]", b"", None),
    "a tensor twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2 + b'"c":1}', b"\0", None),
    "deeply nested": (b'{"a":' * 100_000, b"", None),
    "a huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", None),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", None),
    "half of a character": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0", None),
    "an unfinished tensor": ({"a": {"dtype": "U8", "shape": [1]}}, b"\0", None),
    "a dtype that is no text": ({"a": entry(8, [1], 0, 1)}, b"\0", None),
    "a shape that is no list": ({"a": entry("U8", "1", 0, 1)}, b"\0", None),
    "a length that is no number": ({"a": entry("U8", [True], 0, 1)}, b"\0", None),
    "a length below zero": ({"a": entry("U8", [-1], 0, 1)}, b"\0", None),
    "lengths beyond all bounds": ({"a": entry("U8", [1 << 40, 1 << 40, 0], 0, 0)}, b"", None),
    "too many axes": ({"a": entry("U8", [1] * 65, 0, 1)}, b"\0", None),
    "offsets that are no numbers": ({"a": entry("U8", [1], 0.0, 1)}, b"\0", None),
    "an end before its start": ({"a": entry("U8", [1], 1, 0)}, b"\0", None),
    "a start below zero": ({"a": entry("U8", [1], -1, 0)}, b"\0", None),
    "too few bytes for its shape": ({"a": entry("F32", [2], 0, 4)}, bytes(4), None),
    "bytes that two tensors share": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6), None),
    "a gap": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3), None),
    "bytes behind the last tensor": (GOOD, bytes(13), None),
    "a missing end": (GOOD, bytes(11), None),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_header_that_cannot_be_true_is_one_error_that_names_the_file(tmp_path, what):
    header, data, length = WRONG[what]
    path = tmp_path / "m/model.safetensors"
    raw_file(path, header, data)
    if length is not None:
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(DamagedError, match=r"m/model\.safetensors"):
        milepost.load(tmp_path / "m")
    with pytest.raises((safetensors.SafetensorError, ValueError)):
        safetensors.numpy.load_file(path)


def test_a_file_cut_short_anywhere_is_an_error(tmp_path):
    path = tmp_path / "m/model.safetensors"
    raw_file(path, GOOD, bytes(range(12)))
    body = path.read_bytes()
    assert milepost.load(tmp_path / "m")["b"].tolist() == [8, 9, 10, 11]
    for length in range(len(body)):
        path.write_bytes(body[:length])
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            milepost.load(tmp_path / "m")


def test_a_header_longer_than_readers_of_the_format_take_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "m/model.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(DamagedError, match="its header would have 100000001 bytes"):
        milepost.load(tmp_path / "m")


def test_dtypes_that_no_array_can_hold_are_listed(tmp_path):
    header = {"a": entry("F4", [2], 0, 1), "b": entry("U8", [1], 1, 2), "c": entry("X1", [1], 2, 3)}
    raw_file(tmp_path / "m/model.safetensors", header, bytes(3))
    with pytest.raises(UnsupportedLeafError, match="'a' of dtype 'F4', 'c' of dtype 'X1'"):
        milepost.load(tmp_path / "m")


def test_a_missing_shard_is_named_with_its_tensors(tmp_path):
    folder = sharded(tmp_path / "m", {"a.safetensors": {"w": np.ones(3)}, "b.safetensors": {"v": np.ones(2)}})
    (folder / "b.safetensors").unlink()
    with pytest.raises(MissingDataError, match=r"'b\.safetensors', which it does not have, for the tensors 'v'"):
        milepost.load(folder)


def test_a_tensor_that_the_index_names_and_its_shard_lacks_is_named(tmp_path):
    folder = sharded(tmp_path / "m", {"a.safetensors": {"w": np.ones(3)}, "b.safetensors": {"v": np.ones(2)}})
    safetensors.numpy.save_file({"other": np.ones(1)}, folder / "b.safetensors")
    with pytest.raises(MissingDataError, match=r"'v' in 'b\.safetensors'"):
        milepost.load(folder)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "../a.safetensors"}}',
        b'{"weight_map": {"a": "/etc/a.safetensors"}}',
        b'{"weight_map": {"a": "a.bin"}}',
        b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        b'{"weight_map": ' + b"[" * 100_000,
    ],
)
def test_an_index_that_cannot_be_true_is_one_error_that_names_it(tmp_path, index):
    folder = sharded(tmp_path / "m", {"a.safetensors": {"a": np.ones(3)}, "b.safetensors": {"b": np.ones(2)}})
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(DamagedError, match=r"model\.safetensors\.index\.json"):
        milepost.load(folder)


def test_of_two_indices_the_one_by_the_usual_name_counts_else_neither(tmp_path):
    folder = sharded(tmp_path / "m", {"a.safetensors": {"w": np.ones(3)}}, "x.safetensors.index.json")
    assert milepost.load(folder)["w"].tolist() == [1, 1, 1]
    index = folder / "x.safetensors.index.json"
    (folder / "y.safetensors.index.json").write_bytes(index.read_bytes())
    with pytest.raises(DamagedError, match="which model"):
        milepost.load(folder)
    (folder / "model.safetensors.index.json").write_bytes(index.read_bytes())
    assert milepost.load(folder)["w"].tolist() == [1, 1, 1]


# --- writing ---------------------------------------------------------------------------------------------------------


def pieces_of(tensors):
    return [Piece(ArraySpec(name, array.shape, array.dtype.name), lambda array=array: array) for name, array in tensors]


def location(tmp_path, hosts=1):
    return Location(PosixStorage(tmp_path.as_uri()), "out/", f"{tmp_path.as_uri()}/out", 0, hosts)


def read_back(where, record, names, *, mapped=False):
    requests = [ReadRequest(name) for name in names]
    found = HuggingFaceArrays().read(where, [record], requests, ReadOptions(MIB, 2, verify=True, mapped=mapped))
    return {names[index]: array for index, array in found}


@pytest.mark.parametrize("shard_size", [1, 200, "5GB"])
def test_every_dtype_of_the_format_comes_back(tmp_path, shard_size):
    tensors = [(f"{name}{shape}", some(name, shape)) for name in NATIVE for shape in [(), (3,), (2, 0), (3, 5)]]
    where = location(tmp_path)
    record = HuggingFaceArrays(shard_size=shard_size).write(where, pieces_of(tensors), WriteOptions(MIB, 2))
    loaded = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        loaded |= dict(safetensors.deserialize(path.read_bytes()))
    assert loaded.keys() == dict(tensors).keys()
    for name, array in tensors:
        tensor = loaded[name]
        assert (tuple(tensor["shape"]), bytes(tensor["data"])) == (array.shape, array.tobytes())
    for mapped in (False, True):
        back = read_back(where, record, [name for name, _ in tensors], mapped=mapped)
        assert all(same(back[name], array) for name, array in tensors)


def test_shards_hold_at_most_their_size_and_the_index_says_which_tensor_is_where(tmp_path):
    tensors = [(f"t{at}", some("float32", (at % 7 * 10,), at)) for at in range(30)] + [("big", some("int8", (999,)))]
    HuggingFaceArrays(shard_size=500).write(location(tmp_path), pieces_of(tensors), WriteOptions(MIB, 2))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in tensors)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{at:05d}-of-{len(files):05d}.safetensors" for at in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "out" / file)
        assert set(held) == {name for name, home in index["weight_map"].items() if home == file}
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 500
        with safetensors.safe_open(tmp_path / "out" / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_all_tensors_of_a_file_are_aligned_to_their_items(tmp_path):
    tensors = [(f"{name}.{at}", some(name, (at,))) for name in NATIVE for at in (1, 3, 5)]
    np.random.default_rng(0).shuffle(tensors)
    record = HuggingFaceArrays().write(location(tmp_path), pieces_of(tensors), WriteOptions(MIB, 2))
    (file,) = record["files"]
    assert len(file["pieces"]) == len(tensors)
    assert [row[0] for row in file["pieces"] if row[3] % dtype_of(row[1]).itemsize] == []


def test_pieces_come_together_whether_or_not_they_are_runs_of_bytes(tmp_path):
    array = some("uint16", (6, 8))
    spec = ArraySpec("w", array.shape, "uint16")

    def piece(rows, columns):
        box = Box((rows.start, columns.start), (rows.stop - rows.start, columns.stop - columns.start))
        return Piece(spec, lambda: array[rows, columns], box)

    runs = [piece(slice(4, 6), slice(0, 8)), piece(slice(0, 4), slice(0, 8))]
    tiles = [piece(slice(a, a + 3), slice(b, b + 4)) for a in (0, 3) for b in (0, 4)]
    for at, pieces in enumerate((runs, tiles)):
        where = location(tmp_path / str(at))
        record = HuggingFaceArrays().write(where, pieces, WriteOptions(MIB, 2))
        found = safetensors.numpy.load_file(tmp_path / str(at) / "out/model.safetensors")
        assert same(found["w"], array)
        assert same(read_back(where, record, ["w"])["w"], array)
    with pytest.raises(ValueError, match="12 of its 48"):
        HuggingFaceArrays().write(location(tmp_path / "x"), tiles[:1], WriteOptions(MIB, 2))
    with pytest.raises(ValueError, match="leave out"):
        HuggingFaceArrays().write(location(tmp_path / "x"), [tiles[0], *tiles[:3]], WriteOptions(MIB, 2))


def test_what_the_format_has_no_dtype_for_is_listed_before_anything_is_written(tmp_path):
    specs = [ArraySpec(name, (1,), name) for name in ("complex64", "int4", "float32", "float8_e8m0fnu")]
    with pytest.raises(UnsupportedLeafError) as caught:
        HuggingFaceArrays().create(location(tmp_path), [*specs, ArraySpec("__metadata__", (1,), "int8")])
    assert [
        name for name in ("complex64", "int4", "float8_e8m0fnu", "__metadata__") if name not in str(caught.value)
    ] == []
    assert "float32" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_cannot_write_one_index(tmp_path):
    with pytest.raises(ConfigError, match="from 2 processes"):
        HuggingFaceArrays().create(location(tmp_path, hosts=2), [])


@pytest.mark.parametrize("size", ["", "5 bananas", "-1", 0, -5, "0", 1.5, None, True])
def test_a_shard_size_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match="no number of bytes"):
        HuggingFaceArrays(shard_size=size)


def test_a_failure_in_one_shard_ends_the_write_and_leaves_no_index(tmp_path):
    def broken():
        raise OSError("no more")

    pieces = pieces_of([(f"t{at}", some("float32", (100,), at)) for at in range(20)])
    pieces[7] = Piece(pieces[7].spec, broken)
    with pytest.raises(OSError, match="no more"):
        HuggingFaceArrays(shard_size=400).write(location(tmp_path), pieces, WriteOptions(MIB, 2))
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


# --- as the array writer of checkpoints ------------------------------------------------------------------------------


def test_it_is_an_array_writer_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", 'default.arrays = "huggingface"\ndefault.arrays_options = {shard_size = 100}')
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    tree = {
        "w": jax.device_put(np.arange(32, dtype=np.float32).reshape(8, 4), spread),
        "n": np.arange(40, dtype=np.int16),
        "step": 7,
        "text": "adam",
    }
    milepost.save(tmp_path / "7", tree)
    loaded = milepost.load(tmp_path / "7")
    assert loaded["w"].sharding == spread
    assert (loaded["step"], loaded["text"]) == (7, "adam")
    assert all(same(np.asarray(loaded[name]), np.asarray(tree[name])) for name in "wn")
    path = next((tmp_path / "7/state").glob("model-00001-*"))
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(DamagedError, match="checksum"):
        milepost.load(tmp_path / "7")
