from __future__ import annotations

import itertools
import json
import math
import struct
import subprocess
import sys
import textwrap
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost.errors import (
    ChecksumError,
    FutureFormatError,
    ManifestError,
    MismatchError,
    MissingDataError,
    NotFoundError,
    UnsupportedLeafError,
)
from milepost.protocols import ArrayIO, ArraySpec, Box, Location, Piece, ReadOptions, ReadRequest, WriteOptions
from milepost_safetensors import PackedArrays
from safetensors import deserialize, safe_open

MIB = 1 << 20

NATIVE = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
AS_BYTES = [
    *("complex64", "complex128", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
# those that a later ml_dtypes may have and an older one lacks
AS_BYTES += [name for name in ("int1", "uint1") if hasattr(ml_dtypes, name)]


class Shelf:
    """A storage in a dictionary that takes buffers one by one, as the protocol allows a storage to do."""

    url = "shelf://"
    commit = "none"

    def __init__(self):
        self.objects = {}
        self.reads = []
        self.meeting = None

    def read(self, key, start=0, stop=None):
        if key not in self.objects:
            raise NotFoundError(key)
        data = bytes(self.objects[key][start:stop])
        self.reads.append((key, start, len(data)))
        return data

    def write(self, key, buffers):
        if self.meeting is not None:
            self.meeting.wait(60)
        data = bytearray()
        for buffer in buffers:
            data += buffer
        self.objects[key] = data

    def children(self, prefix):
        return [key[len(prefix) :] for key in self.objects if key.startswith(prefix)]

    def delete(self, key):
        self.objects.pop(key, None)

    def size(self, key):
        if key not in self.objects:
            raise NotFoundError(key)
        return len(self.objects[key])


class RoomyShelf(Shelf):
    """A storage that can also read into memory and map."""

    def read_into(self, key, start, buffer):
        data = self.read(key, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def map(self, key):
        raw = np.empty(len(self.objects[key]) + 64, np.uint8)
        at = -raw.ctypes.data % 64
        view = raw[at : at + len(self.objects[key])]
        view[:] = np.frombuffer(self.objects[key], np.uint8)
        return view.data


def location(storage, host=0, hosts=1):
    return Location(storage, "7/", "shelf:///7", host, hosts)


def save(storage, arrays, *, threads=2, budget=64 * MIB, host=0):
    pieces = [
        Piece(ArraySpec(name, array.shape, array.dtype.name), lambda array=array: array)
        for name, array in arrays.items()
    ]
    record = PackedArrays().write(location(storage, host), pieces, WriteOptions(budget, threads))
    return json.loads(json.dumps(record))


def load(storage, records, requests, **options):
    options = {"budget": 64 * MIB, "threads": 2, **options}
    requests = [ReadRequest(it) if isinstance(it, str) else it for it in requests]
    found = list(PackedArrays().read(location(storage), records, requests, ReadOptions(**options)))
    assert sorted(index for index, _ in found) == list(range(len(requests)))
    return [array for _, array in sorted(found, key=lambda pair: pair[0])]


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(bytes(data[8 : 8 + length])), 8 + length


def random_array(shape, dtype, seed=0):
    """Return random bits of a dtype; of those with fewer than 8 bits, random values."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    if dtype.itemsize == 1:
        return (
            rng.integers(0, 2, shape).astype(dtype)
            if dtype.name not in NATIVE or dtype.name == "bool"
            else _view(raw, dtype, shape)
        )
    return _view(raw, dtype, shape)


def _view(raw, dtype, shape):
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


# --- round trips -----------------------------------------------------------------------------------------------------


def test_it_is_an_array_writer():
    assert isinstance(PackedArrays(), ArrayIO)


@pytest.mark.parametrize("storage", [Shelf, RoomyShelf])
@pytest.mark.parametrize("options", [{}, {"verify": False}, {"mapped": True}, {"mapped": True, "verify": False}])
@pytest.mark.parametrize("dtype", [*NATIVE, *AS_BYTES])
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, options, storage):
    shapes = [(), (0,), (3, 0, 2), (1,), (5, 7), (1000,), (3, 5000), (2, 300, 500)]
    arrays = {f"{dtype}/{shape}": random_array(shape, dtype) for shape in shapes}
    store = storage()
    record = save(store, arrays)
    back = load(store, [record], list(arrays), **options)
    for (name, array), found in zip(arrays.items(), back, strict=True):
        assert same(array, found), name
        assert found.flags.writeable, name
        assert found.flags.c_contiguous, name


@pytest.mark.parametrize("dtype", [*NATIVE, *AS_BYTES])
def test_the_file_says_the_same_to_somebody_who_knows_only_the_format(dtype):
    arrays = {f"x{n}": random_array(shape, dtype, n) for n, shape in enumerate([(), (0, 4), (3, 5), (9000,)])}
    store = Shelf()
    save(store, arrays)
    ((_, data),) = store.objects.items()
    header, start = header_of(data)
    for name, array in arrays.items():
        entry = header[name]
        low, high = entry["data_offsets"]
        assert bytes(data[start + low : start + high]) == array.tobytes()
        assert entry["dtype"] == NATIVE.get(dtype, "U8")
        assert entry["shape"] == [*array.shape, *([] if dtype in NATIVE else [array.itemsize])]
    if dtype not in NATIVE:
        assert json.loads(header["__metadata__"]["milepost.dtypes"]) == dict.fromkeys(arrays, dtype)


@pytest.mark.parametrize("dtype", [*NATIVE, *AS_BYTES])
def test_the_safetensors_library_opens_the_file(dtype, tmp_path):
    arrays = {f"x{n}": random_array(shape, dtype, n) for n, shape in enumerate([(), (0, 4), (3, 5), (9000,)])}
    store = Shelf()
    save(store, arrays)
    ((_, data),) = store.objects.items()
    for name, tensor in deserialize(bytes(data)):
        if not name.startswith("__padding__"):
            assert bytes(tensor["data"]) == arrays[name].tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with safe_open(path, "np") as opened:
        assert set(arrays) <= set(opened.keys())
        # its NumPy reader has no 8 bit floats, though the format has
        for name in arrays if not dtype.startswith("float8") or dtype not in NATIVE else ():
            assert opened.get_tensor(name).tobytes() == arrays[name].tobytes()


def test_nothing_to_write_makes_no_file():
    store = Shelf()
    record = save(store, {})
    assert store.objects == {}
    assert load(store, [record], []) == []


@pytest.mark.parametrize(
    "name", ["__metadata__", "__padding__1", "__escaped__x", "a@0:4", "a@", "ü/\n.'\"", "", "\ud800", "😀"]
)
def test_odd_names_round_trip_and_leave_the_file_valid(name):
    arrays = {name: np.arange(3000, dtype=np.int16)[:2999], "other": np.arange(4)}
    store = Shelf()
    back = load(store, [save(store, arrays)], list(arrays))
    assert all(same(a, b) for a, b in zip(arrays.values(), back, strict=True))
    ((_, data),) = store.objects.items()
    names = [tensor for tensor, _ in deserialize(bytes(data))]
    assert len(set(names)) == len(names) == 3


def test_a_box_and_an_array_named_like_it_do_not_collide():
    store = Shelf()
    a = np.arange(8, dtype=np.int32)
    pieces = [
        Piece(ArraySpec("a", (8,), "int32"), lambda: a[:4], Box((0,), (4,))),
        Piece(ArraySpec("a", (8,), "int32"), lambda: a[4:], Box((4,), (4,))),
        Piece(ArraySpec("a@0:4", (4,), "int32"), lambda: a[:4] + 100),
    ]
    record = PackedArrays().write(location(store), pieces, WriteOptions(MIB, 1))
    assert [found.tolist() for found in load(store, [record], ["a", "a@0:4"])] == [a.tolist(), (a[:4] + 100).tolist()]


def test_the_same_array_may_be_wanted_many_times_and_each_copy_is_its_own():
    arrays = {"small": np.arange(100.0), "large": np.arange(100_000.0), "scalar": np.array(3.0)}
    for mapped in (False, True):
        store = RoomyShelf()
        record = save(store, arrays)
        names = list(arrays) * 3
        back = load(store, [record], names, mapped=mapped)
        for number, (name, found) in enumerate(zip(names, back, strict=True)):
            assert same(found, arrays[name])
            found[...] = -number


# --- layout ----------------------------------------------------------------------------------------------------------


def test_data_begins_at_multiples_of_64_except_tiny_odd_arrays():
    sizes = [64, 1, 4096, 4097, 3, 70_000, 128, 65_536, 5000, 100_001]
    arrays = {str(n): random_array((n,), "uint8") for n in sizes}
    arrays |= {"f8": random_array((3,), "float64"), "c16": random_array((1,), "complex128")}
    arrays |= {"f2": random_array((3,), "float16")}
    store = Shelf()
    record = save(store, arrays)
    ((_, data),) = store.objects.items()
    header, start = header_of(data)
    assert start % 64 == 0
    assert record["files"][0]["data"] == start
    end = 0
    header.pop("__metadata__")
    for low, high in sorted(entry["data_offsets"] for entry in header.values()):
        assert low == end
        end = high
    assert start + end == len(data)
    for name, array in arrays.items():
        low = header[name]["data_offsets"][0]
        tiny = array.nbytes % 64 and array.nbytes < 4096
        assert low % (array.itemsize if tiny else 64) == 0, name


@pytest.mark.parametrize("options", [{}, {"mapped": True}, {"verify": False}])
def test_what_is_loaded_begins_at_multiples_of_64(options):
    arrays = {str(n): random_array((n,), "float32", n) for n in (16, 64, 1024, 16_384, 100_000, 100_001, 2_000_000)}
    store = RoomyShelf()
    for found in load(store, [save(store, arrays)], list(arrays), **options):
        assert found.ctypes.data % 64 == 0


def test_pieces_are_spread_over_as_many_files_as_threads():
    arrays = {str(n): random_array((4 * MIB,), "uint8", n) for n in range(16)}
    store = Shelf()
    store.meeting = threading.Barrier(4)  # no write goes on before all four have begun
    record = save(store, arrays, threads=4)
    assert [file["name"] for file in record["files"]] == [f"arrays-00000-{n:05d}.safetensors" for n in range(4)]
    assert {file["size"] // MIB for file in record["files"]} == {16}
    assert all(same(a, b) for a, b in zip(arrays.values(), load(store, [record], list(arrays)), strict=True))


def test_writing_needs_no_more_pieces_at_once_than_the_budget_holds():
    store = Shelf()
    record = save(store, {str(n): random_array((8 * MIB,), "uint8", n) for n in range(8)}, threads=4, budget=9 * MIB)
    assert len(record["files"]) == 1


def test_hosts_write_files_of_their_own():
    store = Shelf()
    records = [save(store, {f"x{host}": np.arange(host + 1)}, host=host) for host in range(3)]
    assert sorted(store.objects) == [f"7/arrays-{host:05d}-00000.safetensors" for host in range(3)]
    assert [len(found) for found in load(store, records, ["x0", "x1", "x2"])] == [1, 2, 3]


# --- resharding ------------------------------------------------------------------------------------------------------


def grid(shape, cuts):
    """Return the boxes into which cutting each axis at some places divides an array."""
    edges = [sorted({0, n, *(cut % (n + 1) for cut in some)}) for n, some in zip(shape, cuts, strict=True)]
    for sides in itertools.product(*(list(itertools.pairwise(edge)) for edge in edges)):
        yield Box(tuple(a for a, _ in sides), tuple(b - a for a, b in sides))


def slices(box):
    return tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))


@st.composite
def reshardings(draw):
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    factor = draw(st.sampled_from([1, 1, 30_000]))  # large rows make pieces of many blocks
    shape = (*shape[:-1], shape[-1] * factor if math.prod(shape) * factor < 3 * MIB else shape[-1])
    cuts = st.lists(st.integers(0, 10**6), max_size=3)
    saved = draw(st.tuples(*[cuts for _ in shape]))
    wanted = []
    for _ in range(draw(st.integers(1, 4))):
        start = tuple(draw(st.integers(0, n)) for n in shape)
        wanted.append(Box(start, tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, start, strict=True))))
    return shape, list(grid(shape, saved)), wanted


@settings(max_examples=120, deadline=None)
@given(
    case=reshardings(),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8"]),
    hosts=st.integers(1, 3),
    verify=st.booleans(),
    mapped=st.booleans(),
    budget=st.sampled_from([1, MIB, 64 * MIB]),
)
def test_any_boxes_saved_give_any_boxes_wanted(case, dtype, hosts, verify, mapped, budget):
    shape, boxes, wanted = case
    array = random_array(shape, dtype)
    store = RoomyShelf()
    spec = ArraySpec("x", shape, dtype)
    records = []
    for host in range(hosts):
        pieces = [
            Piece(spec, lambda box=box: np.ascontiguousarray(array[slices(box)]), box) for box in boxes[host::hosts]
        ]
        records.append(PackedArrays().write(location(store, host), pieces, WriteOptions(MIB, 2)))
    requests = [ReadRequest("x", box) for box in wanted] + [ReadRequest("x")]
    back = load(store, records, requests, verify=verify, mapped=mapped, budget=budget)
    for box, found in zip(wanted, back, strict=False):
        assert same(found, np.ascontiguousarray(array[slices(box)]))
    assert same(back[-1], array)


def test_only_the_bytes_that_are_wanted_are_read_without_verification():
    array = random_array((4096, 4096), "float32")
    store = Shelf()
    record = save(store, {"x": array})
    store.reads.clear()
    (found,) = load(store, [record], [ReadRequest("x", Box((100, 8), (3, 2)))], verify=False)
    assert same(found, np.ascontiguousarray(array[100:103, 8:10]))
    assert sum(n for *_, n in store.reads) == 2 * 4096 * 4 + 2 * 4
    store.reads.clear()
    (found,) = load(store, [record], [ReadRequest("x", Box((100, 8), (3, 2)))])
    assert sum(n for *_, n in store.reads) == 4 * MIB


def test_requests_that_share_a_block_read_it_once():
    array = random_array((1024, 1024), "float32")
    store = Shelf()
    record = save(store, {"x": array})
    store.reads.clear()
    load(store, [record], [ReadRequest("x", Box((0, 128 * n), (1024, 128))) for n in range(8)])
    assert sum(n for *_, n in store.reads) == array.nbytes


def test_neighbouring_small_arrays_are_read_together():
    arrays = {str(n): random_array((64,), "float32", n) for n in range(5000)}
    store = Shelf()
    record = save(store, arrays)
    store.reads.clear()
    back = load(store, [record], list(arrays))
    assert all(same(a, b) for a, b in zip(arrays.values(), back, strict=True))
    assert len(store.reads) == 2
    assert all(found.base.nbytes <= MIB + 64 for found in back[:3])


# --- damage ----------------------------------------------------------------------------------------------------------


def samples():
    return {"big": random_array((3, MIB), "float32"), "mid": random_array((50_000,), "uint16")} | {
        f"tiny{n}": random_array((n,), "float32", n) for n in range(1, 40)
    }


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["big", "mid", "tiny1", "tiny39"])
def test_one_flipped_bit_is_found_and_named(name, mapped):
    arrays = samples()
    store = RoomyShelf()
    record = save(store, arrays, threads=1)
    (key, data), *_ = store.objects.items()
    header, start = header_of(data)
    low, high = header[name]["data_offsets"]
    for at in {low, (low + high) // 2, high - 1}:
        data[start + at] ^= 1
        with pytest.raises(ChecksumError, match=name) as caught:
            load(store, [record], list(arrays), mapped=mapped)
        assert key in str(caught.value)
        assert all(
            same(a, b) or n == name
            for (n, a), b in zip(arrays.items(), load(store, [record], list(arrays), verify=False), strict=True)
        )
        data[start + at] ^= 1


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("left", [0, 9, 1000, -1])
def test_a_file_cut_short_is_missing_data(left, mapped):
    arrays = samples()
    store = RoomyShelf()
    record = save(store, arrays)
    (key,) = store.objects
    del store.objects[key][left if left >= 0 else len(store.objects[key]) + left :]
    with pytest.raises(MissingDataError, match=r"array 'tiny\d+'.*arrays-00000-00000"):
        load(store, [record], list(arrays), mapped=mapped)


def test_a_file_that_shrinks_while_it_is_read_is_missing_data():
    arrays = samples()
    for storage in (Shelf, RoomyShelf):
        store = storage()
        record = save(store, arrays)
        size = store.size("7/arrays-00000-00000.safetensors")
        store.size = lambda key, size=size: size
        del store.objects["7/arrays-00000-00000.safetensors"][-1:]
        with pytest.raises(MissingDataError, match="tiny"):
            load(store, [record], list(arrays))


def test_a_file_that_is_gone_is_missing_data():
    store = Shelf()
    record = save(store, samples())
    store.objects.clear()
    with pytest.raises(MissingDataError, match="is gone") as caught:
        load(store, [record], ["big"])
    assert isinstance(caught.value.__cause__, NotFoundError)


def test_what_is_stored_nowhere_is_missing_data():
    store = Shelf()
    spec = ArraySpec("x", (4, 4), "float32")
    piece = Piece(spec, lambda: np.zeros((4, 3), np.float32), Box((0, 0), (4, 3)))
    record = PackedArrays().write(location(store), [piece], WriteOptions(MIB, 1))
    with pytest.raises(MissingDataError, match="'x'"):
        load(store, [record], ["x"])
    with pytest.raises(MissingDataError, match="'y'"):
        load(store, [record], ["y"])
    assert load(store, [record], [ReadRequest("x", Box((1, 1), (2, 2)))])[0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("box", [Box((0,), (5,)), Box((-1,), (2,)), Box((0, 0), (1, 1)), Box((5,), (0,))])
def test_a_box_outside_the_array_is_refused(box):
    store = Shelf()
    record = save(store, {"x": np.zeros(4)})
    with pytest.raises(MismatchError, match="'x'"):
        load(store, [record], [ReadRequest("x", box)])


def hostile(change):
    store = Shelf()
    record = save(store, {"x": np.arange(2048.0), "y": np.arange(1024.0)})
    change(record, record["files"][0], record["files"][0]["pieces"])
    return store, record


HOSTILE = {
    "is not an object": lambda r, f, p: r.clear(),
    "format is text": lambda r, f, p: r.update(format="1"),
    "files is no list": lambda r, f, p: r.update(files=7),
    "a file is a number": lambda r, f, p: r.update(files=[7]),
    "file twice": lambda r, f, p: r.update(files=[f, f]),
    "path traversal": lambda r, f, p: f.update(name="../../etc/passwd"),
    "absolute path": lambda r, f, p: f.update(name="/etc/passwd"),
    "name with newline": lambda r, f, p: f.update(name=f["name"] + "\n"),
    "name is null": lambda r, f, p: f.update(name=None),
    "size negative": lambda r, f, p: f.update(size=-1),
    "size huge": lambda r, f, p: f.update(size=1 << 80),
    "size is true": lambda r, f, p: f.update(size=True),
    "size is a float": lambda r, f, p: f.update(size=1e9),
    "data after end": lambda r, f, p: f.update(data=f["size"] + 1),
    "pieces is a dict": lambda r, f, p: f.update(pieces={}),
    "row too short": lambda r, f, p: p[0].pop(),
    "row is text": lambda r, f, p: p.__setitem__(0, "abcde"),
    "name is a list": lambda r, f, p: p[0].__setitem__(0, []),
    "dtype unknown": lambda r, f, p: p[0].__setitem__(1, "object"),
    "dtype is a list": lambda r, f, p: p[0].__setitem__(1, ["float64"]),
    "shape negative": lambda r, f, p: p[0].__setitem__(2, [-2048]),
    "shape true": lambda r, f, p: p[0].__setitem__(2, [True]),
    "shape huge": lambda r, f, p: p[0].__setitem__(2, [1 << 59, 1 << 59]),
    "shape hides behind zero": lambda r, f, p: p[0].__setitem__(2, [1 << 59, 1 << 59, 0]),
    "shape of 1000 axes": lambda r, f, p: p[0].__setitem__(2, [1] * 1000),
    "shape larger than file": lambda r, f, p: p[0].__setitem__(2, [20480]),
    "offset into the header": lambda r, f, p: p[0].__setitem__(3, 0),
    "offset negative": lambda r, f, p: p[0].__setitem__(3, -64),
    "offset past the end": lambda r, f, p: p[0].__setitem__(3, f["size"]),
    "offset text": lambda r, f, p: p[0].__setitem__(3, "64"),
    "offset unaligned": lambda r, f, p: p[1].__setitem__(3, p[1][3] - 1),
    "overlap": lambda r, f, p: p[1].__setitem__(3, p[0][3]),
    "sums too few": lambda r, f, p: p[0].__setitem__(4, ""),
    "sums too many": lambda r, f, p: p[0].__setitem__(4, p[0][4] * 2),
    "sums not hex": lambda r, f, p: p[0].__setitem__(4, "G" * 16),
    "sums not text": lambda r, f, p: p[0].__setitem__(4, 16),
    "two shapes": lambda r, f, p: p[1].__setitem__(0, p[0][0]),
    "box outside": lambda r, f, p: p[0].extend([[1], [2048]]),
    "box of other rank": lambda r, f, p: p[0].extend([[0, 0], [1, 2048]]),
    "box negative": lambda r, f, p: p[0].extend([[-1], [2048]]),
    "box is null": lambda r, f, p: p[0].extend([None, None]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_record_is_refused(what):
    store, record = hostile(HOSTILE[what])
    with pytest.raises(ManifestError, match="cannot be believed"):
        load(store, [record], ["x"])
    assert store.reads == []


def test_a_record_of_the_future_says_so():
    store, record = hostile(lambda r, f, p: r.update(format=2))
    with pytest.raises(FutureFormatError) as caught:
        load(store, [record], ["x"])
    assert "pip install --upgrade milepost-safetensors" in caught.value.__notes__


def test_a_lying_size_allocates_nothing():
    store, record = hostile(lambda r, f, p: (f.update(size=1 << 59), p[0].__setitem__(2, [0]), p[0].__setitem__(4, "")))
    row = record["files"][0]["pieces"][1]
    row[2], row[3], row[4] = [1 << 30], record["files"][0]["data"], "0" * 16 * 2048
    with pytest.raises(MissingDataError):
        load(store, [record], ["y"])


# --- errors while writing --------------------------------------------------------------------------------------------


def test_an_error_in_fetch_is_raised_and_leaves_no_part_of_a_file():
    def fail():
        raise OSError(5, "the device is gone")

    store = Shelf()
    good = random_array((20 * MIB,), "uint8")
    pieces = [Piece(ArraySpec(str(n), good.shape, "uint8"), lambda: good) for n in range(4)]
    pieces.insert(1, Piece(ArraySpec("bad", good.shape, "uint8"), fail))
    with pytest.raises(OSError, match="the device is gone"):
        PackedArrays().write(location(store), pieces, WriteOptions(256 * MIB, 4))
    for data in store.objects.values():
        header, start = header_of(data)
        assert "bad" not in header
        assert len(data) == start + max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")


def test_an_error_of_one_file_stops_the_others():
    failed, never = threading.Event(), threading.Event()
    fetched = []

    class Full(Shelf):
        def write(self, key, buffers):
            if key.endswith("-00001.safetensors"):
                failed.set()
                raise OSError(28, "no room")
            super().write(key, buffers)

    def fetch(array):
        assert failed.wait(60)
        never.wait(0.1)  # so long the news may take; all pieces together take longer by far
        fetched.append(array)
        return array

    pieces = [
        Piece(ArraySpec(str(n), (MIB,), "uint8"), lambda n=n: fetch(random_array((MIB,), "uint8", n)))
        for n in range(64)
    ]
    store = Full()
    with pytest.raises(OSError, match="no room"):
        PackedArrays().write(location(store), pieces, WriteOptions(256 * MIB, 2))
    assert len(fetched) < 32
    assert store.objects == {}


@pytest.mark.parametrize("came", [np.zeros(5), np.zeros(4, np.float32), np.zeros(4, ">f8"), np.zeros((4, 1))])
def test_a_piece_that_is_not_as_announced_is_refused(came):
    store = Shelf()
    with pytest.raises(ValueError, match="announced"):
        PackedArrays().write(
            location(store), [Piece(ArraySpec("x", (4,), "float64"), lambda: came)], WriteOptions(1, 1)
        )
    assert store.objects == {}


def test_dtypes_that_cannot_be_written_are_listed_all_at_once():
    specs = [ArraySpec("a", (), "object"), ArraySpec("b", (), "float32"), ArraySpec("c", (), "datetime64[s]")]
    with pytest.raises(UnsupportedLeafError, match=r"'a' of dtype 'object', 'c' of dtype 'datetime64\[s\]'"):
        PackedArrays().create(location(Shelf()), specs)


def test_the_same_piece_twice_is_refused():
    piece = Piece(ArraySpec("x", (4,), "float64"), lambda: np.zeros(4))
    with pytest.raises(ValueError, match="'x'"):
        PackedArrays().write(location(Shelf()), [piece, piece], WriteOptions(1, 1))


# --- streaming and memory --------------------------------------------------------------------------------------------


def test_results_come_while_others_are_still_unread():
    arrays = {str(n): random_array((MIB,), "uint8", n) for n in range(32)}
    store = Shelf()
    record = save(store, arrays)
    store.reads.clear()
    reader = PackedArrays().read(
        location(store), [record], [ReadRequest(name) for name in arrays], ReadOptions(4 * MIB, 2)
    )
    next(reader)
    assert len(store.reads) <= 8
    reader.close()
    assert len(store.reads) <= 8


def test_memory_stays_bounded(tmp_path):
    script = """
        import resource, sys, numpy as np
        sys.path.insert(0, sys.argv[2])
        from milepost.protocols import *
        from milepost_safetensors import PackedArrays
        from test_packed_arrays import Disk
        MIB = 1 << 20
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        here = Location(Disk(sys.argv[1]), "", "")
        spec = ArraySpec("x", (512, MIB // 4), "float32")
        def piece(n):
            return Piece(spec, lambda: np.full((8, MIB // 4), n, np.float32), Box((8 * n, 0), (8, MIB // 4)))
        before = peak()
        record = PackedArrays().write(here, [piece(n) for n in range(64)], WriteOptions(64 * MIB, 2))
        print(peak() - before)
        before = peak()
        for _, array in PackedArrays().read(here, [record], [ReadRequest("x")], ReadOptions(64 * MIB, 2)):
            print(peak() - before - 512)
            assert all((array[8 * n : 8 * n + 8] == n).all() for n in range(64))
    """
    here = str(__file__).rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), here],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    saving, loading = map(int, done.stdout.split())
    assert saving < 64
    assert loading < 64


class Disk(Shelf):
    """A storage of plain files, so that what it holds is not counted as memory."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def write(self, key, buffers):
        with open(f"{self.root}/{key}", "wb") as file:  # noqa: PTH123 the root is text
            file.writelines(buffers)

    def read_into(self, key, start, buffer):
        with open(f"{self.root}/{key}", "rb") as file:  # noqa: PTH123 the root is text
            file.seek(start)
            return file.readinto(buffer)

    def size(self, key):
        with open(f"{self.root}/{key}", "rb") as file:  # noqa: PTH123 the root is text
            return file.seek(0, 2)
