from __future__ import annotations

import copy
import itertools
import json
import math
import re
import subprocess
import sys
import textwrap
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost.errors import (
    ChecksumError,
    ConfigError,
    DamagedError,
    FutureFormatError,
    ManifestError,
    MismatchError,
    MissingDataError,
    NotFoundError,
    UnsupportedLeafError,
)
from milepost.protocols import (
    ArrayIO,
    ArraySpec,
    Box,
    ChunksArrays,
    CompletesCheckpoints,
    Location,
    Piece,
    ReadOptions,
    ReadRequest,
    WriteOptions,
)
from milepost_zarr import ZarrArrays
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

MIB = 1 << 20

NATIVE = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
AS_INTEGERS = [
    *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
]
COMPRESSIONS = ["none", "zstd", "blosc"]
SMALL_CUTS = {"chunk_bytes": 256, "shard_bytes": 2048}


class Shelf:
    """A storage that takes buffers one by one, as the protocol allows a storage to do."""

    url = "shelf://"
    commit = "none"

    def __init__(self):
        self.objects = {}
        self.reads = []
        self.writes = []

    def read(self, key, start=0, stop=None):
        if key not in self.objects:
            raise NotFoundError(key)
        data = bytes(self.objects[key][start:stop])
        self.reads.append((key, start, len(data)))
        return data

    def write(self, key, buffers):
        data = bytearray()
        for buffer in buffers:
            data += buffer
        self.objects[key] = data
        self.writes.append(key)

    def children(self, prefix):
        return [key[len(prefix) :] for key in self.objects if key.startswith(prefix)]

    def delete(self, key):
        self.objects.pop(key, None)

    def size(self, key):
        if key not in self.objects:
            raise NotFoundError(key)
        return len(self.objects[key])


class RoomyShelf(Shelf):
    """A storage that can also read into memory."""

    def read_into(self, key, start, buffer):
        data = self.read(key, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)


def location(storage, host=0, hosts=1):
    return Location(storage, "7/", "shelf:///7", host, hosts)


def spec_of(name, array, **more):
    return ArraySpec(name, array.shape, array.dtype.name, **more)


def save(storage, arrays, *, threads=2, budget=64 * MIB, **options):
    writer, specs = ZarrArrays(**options), [spec_of(name, array) for name, array in arrays.items()]
    writer.create(location(storage), specs)
    pieces = [Piece(spec, lambda array=array: array) for spec, array in zip(specs, arrays.values(), strict=True)]
    record = json.loads(json.dumps(writer.write(location(storage), pieces, WriteOptions(budget, threads))))
    storage.reads.clear()
    return record


def write(storage, pieces, budget, threads):
    ZarrArrays().create(location(storage), [piece.spec for piece in pieces])
    ZarrArrays().write(location(storage), pieces, WriteOptions(budget, threads))


def load(storage, records, requests, **options):
    options = {"budget": 64 * MIB, "threads": 2, **options}
    requests = [ReadRequest(it) if isinstance(it, str) else it for it in requests]
    found = list(ZarrArrays().read(location(storage), records, requests, ReadOptions(**options)))
    assert sorted(index for index, _ in found) == list(range(len(requests)))
    return [array for _, array in sorted(found, key=lambda pair: pair[0])]


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def random_array(shape, dtype, seed=0):
    """Return random bits of a dtype; of those with fewer than 8 bits, random values."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(seed)
    if dtype.name in ("bool", "int2", "int4", "uint2", "uint4"):
        return rng.integers(0, 2, shape).astype(dtype)
    raw = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def part_of(array, box):
    return array[(*(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True)), ...)]


def as_zarr_store(storage, prefix="7/"):
    """Return what zarr-python opens: the objects below a prefix."""
    objects = {
        key.removeprefix(prefix): cpu.Buffer.from_bytes(bytes(data))
        for key, data in storage.objects.items()
        if key.startswith(prefix)
    }
    return MemoryStore(objects, read_only=True)


def opened(storage):
    return zarr.open_group(as_zarr_store(storage), mode="r", zarr_format=3)


def chunk_files(storage):
    return sorted(key for key in storage.objects if not key.endswith("zarr.json"))


def test_it_is_what_the_protocols_ask_for():
    assert isinstance(ZarrArrays(), ArrayIO)
    assert isinstance(ZarrArrays(), ChunksArrays)
    assert isinstance(ZarrArrays(), CompletesCheckpoints)


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cuts", [{}, SMALL_CUTS], ids=["one chunk", "many chunks"])
def test_every_dtype_keeps_its_bits(compression, cuts):
    arrays = {name: random_array((37, 23), name, seed) for seed, name in enumerate(NATIVE + AS_INTEGERS)}
    storage = Shelf()
    record = save(storage, arrays, compression=compression, **cuts)
    for name, found in zip(arrays, load(storage, [record], list(arrays)), strict=True):
        assert same(arrays[name], found), name


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_zarr_sees_native_dtypes_as_they_are(name, compression):
    array = random_array((37, 23), name)
    storage = Shelf()
    save(storage, {"a": array, "b": array[:1]}, compression=compression, **SMALL_CUTS)
    assert same(array, opened(storage)["a"][...])
    assert same(array[:1], opened(storage)["b"][...])


@pytest.mark.parametrize("name", AS_INTEGERS)
def test_zarr_sees_other_dtypes_as_integers_that_say_what_they_are(name):
    array = random_array((37, 23), name)
    storage = Shelf()
    save(storage, {"a": array}, **SMALL_CUTS)
    found = opened(storage)["a"]
    assert found.attrs["milepost_dtype"] == name
    assert same(array, found[...].view(getattr(ml_dtypes, found.attrs["milepost_dtype"])))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (0, 0), (1, 1, 1), (7,), (2, 3, 5, 7)])
def test_every_shape_comes_back(shape):
    array = random_array(shape, "float32")
    storage = Shelf()
    record = save(storage, {"a": array})
    (found,) = load(storage, [record], ["a"])
    assert same(array, found)
    assert same(array, np.asarray(opened(storage)["a"][...]))


def test_an_array_without_elements_has_metadata_and_no_file():
    storage = Shelf()
    save(storage, {"a": np.zeros((0, 3))})
    assert sorted(storage.objects) == ["7/a/zarr.json", "7/zarr.json"]


def test_results_belong_to_the_caller_and_are_aligned():
    storage = RoomyShelf()
    array = random_array((64, 64), "float32")
    record = save(storage, {"a": array, "b": array}, chunk_bytes=4096)
    for found in load(storage, [record], ["a", "a", ReadRequest("a", Box((3, 0), (9, 64))), "b"]):
        assert found.flags.writeable
        assert found.ctypes.data % 64 == 0
        found[...] = 0
    assert same(array, load(storage, [record], ["a"])[0])


def test_two_who_want_one_array_get_one_each():
    storage = RoomyShelf()
    record = save(storage, {"a": np.arange(5)})
    one, other = load(storage, [record], ["a", "a"])
    one[...] = 0
    assert other.tolist() == [0, 1, 2, 3, 4]


# --- what zarr-python would have written ------------------------------------------------------------------------------


def written_by_zarr(arrays, compression, level, **shapes):
    store = zarr.storage.MemoryStore()
    group = zarr.create_group(store, zarr_format=3)
    codecs = {
        "none": [],
        "zstd": [zarr.codecs.ZstdCodec(level=level)],
        "blosc": [zarr.codecs.BloscCodec(cname="zstd", clevel=level, shuffle="shuffle")],
    }[compression]
    for name, array in arrays.items():
        made = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=shapes["chunk"],
            shards=shapes["file"] if shapes["file"] != shapes["chunk"] else None,
            compressors=[*codecs, zarr.codecs.Crc32cCodec()],
            filters=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=[f"{name}:{axis}" for axis in range(array.ndim)],
            config={"write_empty_chunks": True},
        )
        made[...] = array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(store)
    return {f"7/{key}": value.to_bytes() for key, value in store._store_dict.items()}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_metadata_are_those_that_zarr_python_writes(compression):
    arrays = {"params/w": random_array((64, 32), "float32"), "z": random_array((64, 32), "complex64")}
    arrays |= {"params/b": random_array((64, 32), "int16"), "params/n": random_array((64, 32), "bool")}
    storage = Shelf()
    save(storage, arrays, compression=compression, level=3 if compression != "none" else None, chunk_bytes=1 << 15)
    expected = written_by_zarr(arrays, compression, 3, file=(64, 32), chunk=(64, 32))
    for key in expected:
        if key.endswith("zarr.json"):
            assert json.loads(expected[key]) == json.loads(storage.objects[key]), key
    assert sorted(expected) == sorted(storage.objects)


def test_the_bytes_are_those_that_zarr_python_writes():
    array = random_array((64, 32), "float32")
    storage = Shelf()
    writer = ZarrArrays(chunk_bytes=1024, shard_bytes=4096)
    save(storage, {"a": array}, chunk_bytes=1024, shard_bytes=4096)
    file = writer.chunk(spec_of("a", array))
    chunk = opened(storage)["a"].chunks
    assert chunk != file
    expected = written_by_zarr({"a": array}, "none", 0, file=file, chunk=chunk)
    assert json.loads(expected["7/a/zarr.json"]) == json.loads(storage.objects["7/a/zarr.json"])
    # zarr-python lays the chunks of a shard out in an order of its own; each must be there, under the same index.
    for key in chunk_files(storage):
        assert chunks_in(expected[key]) == chunks_in(bytes(storage.objects[key])), key


def chunks_in(shard):
    count = 4
    table = np.frombuffer(shard[-16 * count - 4 : -4], "<u8").reshape(count, 2)
    return [shard[start : start + length] for start, length in table]


def test_one_request_opens_a_group():
    storage = Shelf()
    save(storage, {"params/dense/kernel": np.ones((2, 3)), "params/b": np.ones(3)})
    alone = Shelf()
    alone.objects = {"7/zarr.json": storage.objects["7/zarr.json"]}
    group = opened(alone)
    assert ["dense/kernel", "b", "dense"].sort() == [name for name, _ in group["params"].members(None)].sort()
    assert group["params/dense/kernel"].shape == (2, 3)


# --- how zarr-python is used -----------------------------------------------------------------------------------------

INSIDE_A_LOOP = """
import asyncio, sys, threading
import milepost, numpy as np

async def main():
    with milepost.configured({"default": {"arrays": "zarr", "arrays_options": {"compression": "zstd"}}}):
        milepost.save(sys.argv[1], {"w": np.arange(100.0), "step": 7})
        print(int(milepost.load(sys.argv[1])["w"].sum()))

asyncio.run(main())
print([thread.name for thread in threading.enumerate() if "zarr" in thread.name])
"""


def test_it_works_within_an_event_loop_and_leaves_no_thread_behind(tmp_path):
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", INSIDE_A_LOOP, tmp_path / "7"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (found.stderr, found.stdout.splitlines()) == ("", ["4950", "[]"])


def test_everything_is_written_once_and_but_one_document_is_read():
    storage = Shelf()
    arrays = {f"layers/{number}/w": random_array((64, 64), "float32") for number in range(5)}
    writer, specs = ZarrArrays(chunk_bytes=1024, shard_bytes=4096), [spec_of(*it) for it in arrays.items()]
    writer.create(location(storage), specs)
    assert storage.reads == []
    pieces = [Piece(spec, lambda array=array: array) for spec, array in zip(specs, arrays.values(), strict=True)]
    writer.write(location(storage), pieces, WriteOptions(MIB, 2))
    assert [key for key, _, _ in storage.reads] == ["7/zarr.json"]
    assert sorted(storage.writes) == sorted(storage.objects)


@pytest.mark.parametrize("cuts", [{}, SMALL_CUTS], ids=["one chunk", "many chunks"])
def test_zeros_are_written_too(cuts):
    storage = Shelf()
    record = save(storage, {"w": np.zeros((20, 30))}, **cuts)
    assert same(np.zeros((20, 30)), load(storage, [record], ["w"])[0])


def test_what_a_user_sets_for_zarr_changes_no_checkpoint():
    plain, storage, arrays = Shelf(), Shelf(), {"w": random_array((20, 30), "float32"), "z": np.zeros((4, 4))}
    save(plain, arrays, **SMALL_CUTS)
    with zarr.config.set({"array.order": "F", "default_zarr_format": 2, "array.write_empty_chunks": False}):
        save(storage, arrays, **SMALL_CUTS)
    assert plain.objects == storage.objects


# --- cutting ---------------------------------------------------------------------------------------------------------


@st.composite
def cut_arrays(draw):
    shape = tuple(draw(st.lists(st.integers(1, 24), min_size=0, max_size=3)))
    parts = [draw(st.sampled_from([n for n in range(1, n + 1) if n <= 4])) for n in shape]
    box = tuple(-(-n // part) for n, part in zip(shape, parts, strict=True))
    wanted = [
        Box(start, tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, start, strict=True)))
        for start in draw(st.lists(st.tuples(*[st.integers(0, n) for n in shape]), min_size=1, max_size=4))
    ]
    return shape, draw(st.sampled_from([None, box])), wanted


@settings(max_examples=60, deadline=None)
@given(
    case=cut_arrays(),
    dtype=st.sampled_from(["uint8", "float32", "complex128", "bfloat16"]),
    chunk_bytes=st.integers(1, 300),
    factor=st.integers(1, 40),
    compression=st.sampled_from(COMPRESSIONS),
    budget=st.sampled_from([1, 300, 64 * MIB]),
)
def test_any_box_of_any_cut_is_what_numpy_says(case, dtype, chunk_bytes, factor, compression, budget):
    shape, box, wanted = case
    array, storage = random_array(shape, dtype, 3), Shelf()
    spec = spec_of("a", array, box=box)
    writer = ZarrArrays(compression=compression, chunk_bytes=chunk_bytes, shard_bytes=chunk_bytes * factor)
    writer.create(location(storage), [spec])
    pieces = [
        Piece(spec, lambda one=one: np.ascontiguousarray(part_of(array, one)).reshape(one.shape), one)
        for one in boxes(shape, box or shape)
    ]
    record = writer.write(location(storage), pieces, WriteOptions(budget, 2))
    requests = [ReadRequest("a", one) for one in wanted]
    for request, found in zip(requests, load(storage, [record], requests, budget=budget), strict=True):
        assert same(part_of(array, request.box), found)
    assert same(array if dtype != "bfloat16" else array.view("uint16"), np.asarray(opened(storage)["a"][...]))


def boxes(shape, box):
    for start in itertools.product(*[range(0, n, unit) for n, unit in zip(shape, box, strict=True)]):
        yield Box(start, tuple(min(unit, n - at) for at, n, unit in zip(start, shape, box, strict=True)))


def test_a_small_box_of_a_large_array_takes_few_bytes():
    array, storage = random_array((1024, 1024), "float32"), Shelf()
    record = save(storage, {"a": array})
    for box in (Box((0, 0), (16, 1024)), Box((0, 0), (1024, 16))):
        storage.reads.clear()
        (found,) = load(storage, [record], [ReadRequest("a", box)])
        assert same(part_of(array, box), found)
        assert sum(size for _, _, size in storage.reads) <= 0.6 * array.nbytes


def test_two_who_want_the_same_chunk_share_one_read():
    array, storage = random_array((64, 64), "float32"), Shelf()
    record = save(storage, {"a": array}, chunk_bytes=4096)
    requests = [ReadRequest("a", Box((at, 0), (1, 64))) for at in range(64)]
    for request, found in zip(requests, load(storage, [record], requests), strict=True):
        assert same(part_of(array, request.box), found)
    index = 4 * 16 + 4
    assert sum(size for _, _, size in storage.reads) <= array.nbytes + 4 * 4 + index


def test_files_lie_within_the_boxes_that_hosts_write():
    spec = ArraySpec("a", (4096, 50257), "float32", (512, 50257))
    rows, columns = ZarrArrays().chunk(spec)
    assert 512 % rows == 0
    assert 1 <= columns <= 2 * 50257
    assert rows * columns * 4 <= 1 << 26


def test_wishes_of_the_caller_for_chunks_are_met():
    storage = Shelf()
    array = np.zeros((256, 256), "float32")
    spec = spec_of("a", array, chunk_bytes=16384, chunk_axes=(0,))
    ZarrArrays().create(location(storage), [spec])
    assert opened(storage)["a"].chunks == (16, 256)


def test_chunks_are_told():
    array, storage = random_array((64, 64), "float32"), Shelf()
    record = save(storage, {"a": array, "b": array[0]}, chunk_bytes=4096)
    told = ZarrArrays().stored_chunks(location(storage), [record], ["b", "a", "c"])
    assert [(64,), opened(storage)["a"].chunks, None] == list(told)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzma"},
        {"level": 3},
        {"compression": "zstd", "level": 23},
        {"compression": "blosc", "level": -1},
        {"compression": "zstd", "level": 1.5},
        {"chunk_bytes": 0},
        {"chunk_bytes": "1MiB"},
        {"chunk_bytes": 100, "shard_bytes": 99},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="zarr "):
        ZarrArrays(**options)


# --- names -----------------------------------------------------------------------------------------------------------

ODD = [
    *("a/b", "value", ".", "..", "a/../b", "/", "a/", "/a", "zarr.json", "a/zarr.json/c", "__x", "c", "d/c.0"),
    *("commit_success.txt", "begun", "ä/ö ü", "日本", "a~0b~1c", "w~.data", "1~2", "x" * 300, "\x00\n", "c.0.0", "..."),
    *("back\\slash", "\ud800", "😀" * 100, "A", "a b", "-", "zarr.json~.part"),
]


def test_odd_names_come_back_and_stay_apart():
    arrays = {name: np.full(3, number) for number, name in enumerate(ODD)}
    storage = Shelf()
    record = save(storage, arrays)
    for name, found in zip(arrays, load(storage, [record], ODD), strict=True):
        assert same(arrays[name], found), name
    files = chunk_files(storage)
    assert len(set(files)) == len(ODD)
    for key in storage.objects:
        for segment in key.split("/"):
            assert segment not in ("", ".", "..")
            assert len(segment.encode()) <= 255
            assert not re.search(r"[\\\x00-\x1f]", segment)


def test_zarr_lists_odd_names():
    arrays = {name: np.full(3, number) for number, name in enumerate(ODD)}
    storage = Shelf()
    save(storage, arrays)
    found = {}
    for path, node in opened(storage).members(None):
        if isinstance(node, zarr.Array):
            found[node.attrs.get("milepost_name", path)] = node[...].tolist()
    assert {name: array.tolist() for name, array in arrays.items()} == found


def test_plain_names_are_left_alone():
    storage = Shelf()
    save(storage, {"params/dense/kernel": np.ones((2, 3))})
    assert sorted(storage.objects) == [
        "7/params/dense/kernel/c.0.0",
        "7/params/dense/kernel/zarr.json",
        "7/params/dense/zarr.json",
        "7/params/zarr.json",
        "7/zarr.json",
    ]


def test_an_array_may_stand_where_a_group_is():
    # of a tree with the keys 1 and "1"
    arrays = {"1": np.zeros(3), "1/x": np.ones(3)}
    storage = Shelf()
    record = save(storage, arrays)
    for name, found in zip(arrays, load(storage, [record], list(arrays)), strict=True):
        assert same(arrays[name], found)
    assert opened(storage)["1"][...].tolist() == [0, 0, 0]
    assert [name for name, _ in opened(storage).members(None)] == ["1"]
    assert zarr.open_array(as_zarr_store(storage), path="1/x", mode="r")[...].tolist() == [1, 1, 1]


def test_an_array_among_the_chunks_of_another_is_refused():
    with pytest.raises(UnsupportedLeafError, match=r"'1/c\.0/x'.*chunks of array '1'"):
        save(Shelf(), {"1": np.zeros(3), "1/c.0/x": np.ones(3)})


def test_dtypes_that_cannot_be_written_are_listed_at_once():
    specs = [ArraySpec("a", (1,), "object"), ArraySpec("b", (1,), "float32"), ArraySpec("c", (1,), "S3")]
    storage = Shelf()
    with pytest.raises(UnsupportedLeafError, match="'a' of dtype 'object', 'c' of dtype 'S3'"):
        ZarrArrays().create(location(storage), specs)
    assert storage.objects == {}


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_hosts_write_no_file_twice():
    array, storage, hosts = random_array((64, 48), "float32"), Shelf(), 4
    spec = spec_of("a/w", array, box=(16, 24))
    writers = [ZarrArrays(chunk_bytes=200, shard_bytes=1000) for _ in range(hosts)]
    writers[0].create(location(storage, 0, hosts), [spec])
    shares = [list(boxes(array.shape, spec.box))[host::hosts] for host in range(hosts)]
    records = [None] * hosts

    def write(host):
        pieces = [Piece(spec, lambda box=box: np.ascontiguousarray(part_of(array, box)), box) for box in shares[host]]
        records[host] = writers[host].write(location(storage, host, hosts), pieces, WriteOptions(MIB, 2))

    threads = [threading.Thread(target=write, args=(host,)) for host in range(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(storage.writes) == len(set(storage.writes))
    assert same(array, load(storage, records, ["a/w"])[0])
    assert same(array, opened(storage)["a/w"][...])


PROCESS = """
import json, sys
import numpy as np
from milepost.protocols import ArraySpec, Box, Location, Piece, WriteOptions
from milepost_posix.storage import PosixStorage
from milepost_zarr import ZarrArrays

root, host = sys.argv[1], int(sys.argv[2])
array = np.arange(64 * 48, dtype="float32").reshape(64, 48)
spec = ArraySpec("a", array.shape, "float32", (32, 48))
place = Location(PosixStorage(f"file://{root}"), "7/", f"file://{root}/7", host, 2)
writer = ZarrArrays(chunk_bytes=512, shard_bytes=2048)
if host == 2:
    writer.create(place, [spec])
else:
    half = array[32 * host : 32 * host + 32]
    piece = Piece(spec, lambda: half, Box((32 * host, 0), (32, 48)))
    print(json.dumps(writer.write(place, [piece], WriteOptions(1 << 20, 2))))
"""


def test_processes_write_one_array_together(tmp_path):
    def started(host):
        return subprocess.Popen([sys.executable, "-c", PROCESS, tmp_path, str(host)], stdout=subprocess.PIPE, text=True)

    creator = started(2)
    assert creator.communicate(timeout=60) == ("", None)
    writers = [started(0), started(1)]
    outputs = [writer.communicate(timeout=60)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert outputs[0] == outputs[1]
    expected = np.arange(64 * 48, dtype="float32").reshape(64, 48)
    assert same(expected, zarr.open_array(tmp_path / "7" / "a", mode="r")[...])


def test_a_host_with_other_options_is_refused():
    array, storage = random_array((64, 48), "float32"), Shelf()
    ZarrArrays(shard_bytes=4096, chunk_bytes=1024).create(location(storage, 0, 2), [spec_of("a", array)])
    other = ZarrArrays(shard_bytes=8192, chunk_bytes=1024)
    with pytest.raises(ConfigError, match=r"'a' was created with files of \(.*this host would write files of"):
        other.write(location(storage, 1, 2), [Piece(spec_of("a", array), lambda: array)], WriteOptions(MIB, 2))
    assert chunk_files(storage) == []


def test_a_piece_that_is_no_box_of_whole_files_is_refused():
    spec = ArraySpec("a", (8, 8), "float32")
    piece = Piece(spec, lambda: np.zeros((4, 8), "float32"), Box((1, 0), (4, 8)))
    with pytest.raises(ValueError, match="no box of whole files"):
        write(Shelf(), [piece], MIB, 2)


def test_what_was_announced_otherwise_is_refused():
    piece = Piece(ArraySpec("a", (8,), "float32"), lambda: np.zeros(8))
    with pytest.raises(ValueError, match=r"'a' was announced as float32\[8\]: what came is float64\[8\]"):
        write(Shelf(), [piece], MIB, 2)


def test_a_piece_given_twice_is_refused():
    piece = Piece(ArraySpec("a", (8,), "float32"), lambda: np.zeros(8, "float32"))
    with pytest.raises(ValueError, match="given twice: of 'a'"):
        ZarrArrays().write(location(Shelf()), [piece, piece], WriteOptions(MIB, 2))


def test_pieces_are_fetched_within_the_budget():
    held, most, lock = [0], [0], threading.Lock()

    class Slow(Shelf):
        def write(self, key, buffers):
            super().write(key, buffers)
            with lock:
                held[0] -= 1000 * key.endswith("c.0")

    def fetch():
        with lock:
            held[0] += 1000
            most[0] = max(most[0], held[0])
        return np.zeros(1000, "uint8")

    pieces = [Piece(ArraySpec(f"a{number}", (1000,), "uint8"), fetch) for number in range(40)]
    write(Slow(), pieces, 3000, 8)
    assert 1000 <= most[0] <= 3000


def test_the_first_error_stops_everything():
    class Full(Shelf):
        def write(self, key, buffers):
            if key.endswith("a3/c.0"):
                raise OSError("no room")
            super().write(key, buffers)

    fetched = []

    def fetch(number):
        fetched.append(number)
        return np.zeros(1000, "uint8")

    pieces = [
        Piece(ArraySpec(f"a{number}", (1000,), "uint8"), lambda number=number: fetch(number)) for number in range(400)
    ]
    with pytest.raises(OSError, match="no room"):
        write(Full(), pieces, 2000, 2)
    assert len(fetched) < 400


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cuts", [{}, SMALL_CUTS], ids=["one chunk", "many chunks"])
def test_any_changed_byte_is_noticed_or_harmless(compression, cuts):
    array, storage = random_array((20, 30), "float32"), Shelf()
    record = save(storage, {"w": array}, compression=compression, **cuts)
    noticed = 0
    for key in chunk_files(storage):
        whole = bytes(storage.objects[key])
        for at in range(0, len(whole), 7):
            storage.objects[key][at] ^= 0x40
            try:
                assert same(array, load(storage, [record], ["w"])[0])
            except DamagedError as error:
                noticed += "'w'" in str(error)
            else:
                continue
            finally:
                storage.objects[key][:] = whole
    assert noticed > 100


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cuts", [{}, SMALL_CUTS], ids=["one chunk", "many chunks"])
def test_damaged_data_are_a_checksum_error_that_names_array_and_file(compression, cuts):
    array, storage = random_array((20, 30), "float32"), Shelf()
    record = save(storage, {"w": array}, compression=compression, **cuts)
    key = chunk_files(storage)[-1]
    storage.objects[key][5] ^= 1
    with pytest.raises(ChecksumError, match=f"'w' is damaged in file '{key}'"):
        load(storage, [record], ["w"])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cuts", [{}, SMALL_CUTS], ids=["one chunk", "many chunks"])
def test_a_missing_file_is_never_filled_in(compression, cuts):
    array, storage = random_array((20, 30), "float32"), Shelf()
    record = save(storage, {"w": array}, compression=compression, **cuts)
    key = chunk_files(storage)[-1]
    del storage.objects[key]
    with pytest.raises(MissingDataError, match=f"'w' cannot be read: file '{key}' is gone"):
        load(storage, [record], ["w"])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cuts", [{}, SMALL_CUTS], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_file_cut_short_is_noticed(compression, cuts, kept):
    array, storage = random_array((20, 30), "float32"), Shelf()
    record = save(storage, {"w": array}, compression=compression, **cuts)
    key = chunk_files(storage)[-1]
    size = len(storage.objects[key])
    del storage.objects[key][int(kept * size) if isinstance(kept, float) else kept :]
    with pytest.raises(DamagedError, match="'w'"):
        load(storage, [record], ["w"])


def test_a_chunk_that_the_index_lacks_is_missing_data():
    array, storage = random_array((20, 30), "float32"), Shelf()
    record = save(storage, {"w": array}, compression="zstd", **SMALL_CUTS)
    store = as_zarr_store(storage)
    # As zarr-python would do: chunks that hold the fill value alone are not stored.
    writable = zarr.storage.MemoryStore(dict(store._store_dict))
    opened_array = zarr.open_array(writable, path="w", mode="r+")
    opened_array[: opened_array.chunks[0], : opened_array.chunks[1]] = 0
    storage.objects |= {f"7/{key}": bytearray(value.to_bytes()) for key, value in writable._store_dict.items()}
    with pytest.raises(MissingDataError, match=r"'w' cannot be read: file '7/w/c\.0\.0' lacks a chunk"):
        load(storage, [record], ["w"])


def test_other_bytes_in_a_right_envelope_are_noticed():
    array, storage = np.zeros((8, 8), "float32"), Shelf()
    record = save(storage, {"w": array}, compression="zstd")
    other = Shelf()
    save(other, {"w": np.zeros((100, 100), "float32")}, compression="zstd")
    storage.objects["7/w/c.0.0"] = other.objects["7/w/c.0.0"]
    with pytest.raises(ChecksumError, match="claim to hold 40000 bytes where there must be 256"):
        load(storage, [record], ["w"])


def test_without_verification_damage_goes_unnoticed():
    array, storage = np.zeros(8, "uint8"), Shelf()
    record = save(storage, {"w": array})
    storage.objects["7/w/c.0"][3] = 9
    assert load(storage, [record], ["w"], verify=False)[0].tolist() == [0, 0, 0, 9, 0, 0, 0, 0]


def test_unknown_arrays_and_boxes_are_refused_before_anything_is_read():
    storage = Shelf()
    record = save(storage, {"w": np.zeros((3, 4))})
    with pytest.raises(MissingDataError, match="'v' is not in the Zarr group"):
        load(storage, [record], ["v"])
    for box in (Box((0,), (3,)), Box((0, 0), (4, 4)), Box((-1, 0), (1, 1)), Box((0, 0), (1, -1))):
        with pytest.raises(MismatchError, match="'w'"):
            load(storage, [record], [ReadRequest("w", box)])
    assert storage.reads == []


GOOD = {"format": 1, "compression": "none", "arrays": [["w", "float32", [8, 8], [4, 8], [2, 4]]]}


def changed(path, value):
    record = copy.deepcopy(GOOD)
    at = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return record


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        changed(["format"], "1"),
        changed(["format"], True),
        changed(["compression"], "lzma"),
        changed(["compression"], ["none"]),
        changed(["arrays"], {}),
        changed(["arrays", 0], {}),
        changed(["arrays", 0], ["w", "float32"]),
        changed(["arrays", 0, 0], 3),
        changed(["arrays", 0, 1], "object"),
        changed(["arrays", 0, 1], ["float32"]),
        changed(["arrays", 0, 2], [-8, 8]),
        changed(["arrays", 0, 2], [8.0, 8]),
        changed(["arrays", 0, 2], [True, 8]),
        changed(["arrays", 0, 2], [8]),
        changed(["arrays", 0, 2], "88"),
        changed(["arrays", 0, 2], [1 << 40, 1 << 40]),
        changed(["arrays", 0, 3], [0, 8]),
        changed(["arrays", 0, 3], [12, 8]),
        changed(["arrays", 0, 3], [5, 8]),
        changed(["arrays", 0, 4], [0, 4]),
        changed(["arrays", 0, 4], [2, 1 << 50]),
        changed(["arrays", 0, 4], [2, 4, 1]),
        {**GOOD, "arrays": [*GOOD["arrays"], ["w", "float32", [8, 8]]]},
        {**GOOD, "arrays": [["w", "float32", [1] * 65]]},
    ],
)
def test_a_record_that_cannot_be_true_is_refused(record):
    with pytest.raises(ManifestError, match="record of the Zarr group cannot be believed"):
        load(Shelf(), [record], ["w"])


def test_hosts_that_contradict_each_other_are_refused():
    with pytest.raises(ManifestError, match="'w' is described in two ways"):
        load(Shelf(), [GOOD, changed(["arrays", 0, 1], "int32")], ["w"])


def test_a_record_of_a_later_format_says_so():
    with pytest.raises(FutureFormatError, match="format 2"):
        load(Shelf(), [changed(["format"], 2)], ["w"])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    "row",
    [
        ["w", "uint8", [1 << 50]],
        ["w", "uint8", [1 << 50], [1 << 20]],
        ["w", "uint8", [1 << 50], [1 << 30], [1 << 10]],
        ["w", "uint8", [1 << 25, 1 << 25], [1 << 25, 1]],
    ],
)
def test_sizes_that_are_lies_take_no_memory(compression, row):
    storage = Shelf()
    save(storage, {"w": np.zeros(100, "uint8")}, compression=compression)
    storage.objects["7/w/c.0.0"] = storage.objects["7/w/c.0"]
    record = {"format": 1, "compression": compression, "arrays": [row]}
    origin = Box((0,) * len(row[2]), (1,) * len(row[2]))
    for request in ("w", ReadRequest("w", origin)):
        with pytest.raises(DamagedError, match="'w'"):
            load(storage, [record], [request])


def test_hostile_records_in_many_shapes_never_crash():
    storage = Shelf()
    save(storage, {"w": random_array((8, 8), "float32")}, chunk_bytes=32, shard_bytes=128)
    values = [None, 0, 1, 7, -1, 1 << 62, "w", "", [], {}, [1], [[1]], True, 2.5]
    for path in (["arrays", 0], *[["arrays", 0, at] for at in range(5)], *[["arrays", 0, 3, at] for at in range(2)]):
        for value in values:
            try:
                load(storage, [changed(path, value)], ["w"])
            except DamagedError:
                continue


# --- completing ------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_reader():
    code = """
    import sys
    import milepost_zarr
    print([name for name in ("zarr", "numcodecs", "jax", "asyncio") if name in sys.modules])
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == "[]\n"
