"""Arrays as TensorStore's formats have them: written, found by TensorStore itself, read back, and damaged."""

from __future__ import annotations

import itertools
import json
import math
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import milepost
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from milepost.config import configured
from milepost.errors import (
    ChecksumError,
    ConfigError,
    DamagedError,
    FutureFormatError,
    ManifestError,
    MismatchError,
    MissingDataError,
    StorageError,
    UnsupportedLeafError,
)
from milepost.memory import MemoryStorage
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
from milepost_posix.storage import PosixStorage
from milepost_tensorstore import TensorStoreArrays
from milepost_tensorstore.writing import add_arrays, merge

MIB = 1 << 20

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16", "int2", "int4", "float4_e2m1fn"),
    *("float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    "float8_e8m0fnu",
]
REFUSED = ["uint2", "uint4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn"]
FORMS = [
    pytest.param(
        {"zarr_format": form, "ocdbt": ocdbt, "compression": codec}, id=f"zarr{form}-{ocdbt and 'ocdbt'}-{codec}"
    )
    for form, ocdbt, codec in itertools.product((2, 3), (True, False), (None, "zstd"))
]
PLACES = ["folder", "elsewhere"]


class Native(MemoryStorage):
    """A storage that TensorStore reaches by a driver of its own, as those of the clouds will be."""

    def __init__(self, folder):
        super().__init__("memory://none")
        self.folder_ = folder
        self._files = PosixStorage(folder.as_uri())
        self.noted = []

    def kvstore(self, prefix):
        return {"driver": "file", "path": f"{self.folder_}/{prefix}"}

    def note(self, key):
        self.noted.append(key)

    def write(self, key, buffers):
        raise AssertionError(f"{key!r} should go through the driver")

    def read(self, key, start=0, stop=None):
        return self._files.read(key, start, stop)

    def read_into(self, key, start, buffer):
        return self._files.read_into(key, start, buffer)

    def size(self, key):
        return self._files.size(key)

    def children(self, prefix):
        return self._files.children(prefix)


@pytest.fixture
def place(tmp_path, request):
    def make(kind):
        if kind == "folder":
            return PosixStorage(tmp_path.as_uri())
        return MemoryStorage(f"memory://{request.node.name}")

    return make


def location(storage, host=0, hosts=1):
    return Location(storage, "7/state/", f"{storage.url}/7/state/", host, hosts)


def save(storage, arrays, *, budget=64 * MIB, host=0, hosts=1, **options):
    writer = TensorStoreArrays(**options)
    where = location(storage, host, hosts)
    specs = [ArraySpec(name, array.shape, array.dtype.name) for name, array in arrays.items()]
    writer.create(where, specs)
    pieces = []
    for spec, array in zip(specs, arrays.values(), strict=True):
        pieces.append(Piece(spec, lambda array=array: array))
    return json.loads(json.dumps(writer.write(where, pieces, WriteOptions(budget, 2))))


def load(storage, records, requests, **options):
    options = {"budget": 64 * MIB, "threads": 2, **options}
    requests = [ReadRequest(it) if isinstance(it, str) else it for it in requests]
    found = list(TensorStoreArrays().read(location(storage), records, requests, ReadOptions(**options)))
    assert sorted(index for index, _ in found) == list(range(len(requests)))
    return [array for _, array in sorted(found, key=lambda pair: pair[0])]


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def random_array(shape, dtype, seed=0):
    """Return random bits of a dtype; of those with fewer than 8 bits, random values."""
    rng, name = np.random.default_rng(seed), dtype
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if name in ("bool", "int2", "int4", "float4_e2m1fn"):
        low = {"int2": -2, "int4": -8}.get(name, 0)
        return rng.integers(low, -low or 2, shape).astype(np.int8).astype(dtype)
    raw = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


def opened(folder, name, form):
    """Open an array as anybody would who has TensorStore and a folder."""
    base = {"driver": "file", "path": f"{folder}/"}
    store = (
        {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if form["ocdbt"]
        else {**base, "path": f"{folder}/{name}/"}
    )
    driver = "zarr" if form["zarr_format"] == 2 else "zarr3"
    return ts.open({"driver": driver, "kvstore": store, "fill_missing_data_reads": False}, open=True).result()


# --- round trips -----------------------------------------------------------------------------------------------------


def test_it_is_an_array_writer_with_chunks_and_files_of_its_own():
    writer = TensorStoreArrays()
    assert isinstance(writer, ArrayIO)
    assert isinstance(writer, ChunksArrays)
    assert isinstance(writer, CompletesCheckpoints)


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_every_dtype_and_shape_comes_back_bit_for_bit(form, kind, place):
    storage = place(kind)
    shapes = [(), (0,), (3, 0, 2), (1,), (5, 7), (1000,), (70, 500), (2, 30, 50)]
    arrays = {f"{dtype}/{n}": random_array(shape, dtype) for dtype in DTYPES for n, shape in enumerate(shapes)}
    record = save(storage, arrays, chunk_bytes=20_000, **form)
    for verify in (True, False):
        back = load(storage, [record], list(arrays), verify=verify)
        for (name, array), found in zip(arrays.items(), back, strict=True):
            assert same(array, found), name
            assert found.flags.writeable, name
            assert found.flags.c_contiguous, name


@pytest.mark.parametrize("form", FORMS)
def test_tensorstore_finds_the_same_arrays(form, tmp_path):
    arrays = {f"x/{dtype}": random_array((9, 11), dtype) for dtype in DTYPES}
    arrays |= {"scalar": np.array(2.5), "cut": random_array((301, 40), "float32"), "list/0": np.arange(4)}
    save(PosixStorage(tmp_path.as_uri()), arrays, chunk_bytes=8000, **form)
    for name, array in arrays.items():
        found = opened(tmp_path / "7/state", name.replace("/", "."), form)
        assert same(array, np.asarray(found.read().result())), name
    cut = opened(tmp_path / "7/state", "cut", form)
    assert cut.chunk_layout.write_chunk.shape == (43, 40)  # 301 rows in 7 parts of at most 50


@pytest.mark.parametrize("form", FORMS)
def test_metadata_are_those_that_tensorstore_makes(form, tmp_path):
    for number, (dtype, shape) in enumerate(itertools.product(DTYPES, [(), (6, 4)])):
        name = f"{dtype}{number}"
        save(PosixStorage((tmp_path / name).as_uri()), {"a": random_array(shape, dtype)}, **form)
        made = opened(tmp_path / name / "7/state", "a", form)
        other = {
            "driver": made.spec().to_json()["driver"],
            "kvstore": "memory://",
            "metadata": made.spec().to_json()["metadata"],
        }
        there = ts.open(other, create=True, dtype=made.dtype).result()
        file = ".zarray" if form["zarr_format"] == 2 else "zarr.json"
        assert json.loads(made.kvstore[file]) == json.loads(there.kvstore[file]), name


def test_arrays_begin_at_addresses_a_device_can_use_in_place(tmp_path):
    arrays = {"inline": np.arange(100.0), "small": np.arange(5000.0), "large": np.arange(500_000.0)}
    storage = PosixStorage(tmp_path.as_uri())
    for found in load(storage, [save(storage, arrays)], list(arrays)):
        assert found.ctypes.data % 64 == 0


def test_the_same_array_may_be_wanted_many_times_and_each_copy_is_its_own(tmp_path):
    arrays = {"small": np.arange(100.0), "large": np.arange(100_000.0), "scalar": np.array(3.0)}
    storage = PosixStorage(tmp_path.as_uri())
    record = save(storage, arrays)
    names = list(arrays) * 3
    back = load(storage, [record], names)
    for number, (name, found) in enumerate(zip(names, back, strict=True)):
        assert same(found, arrays[name])
        found[...] = -number


@pytest.mark.parametrize("form", FORMS)
def test_any_box_can_be_read_however_it_lies_across_chunks(form, tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    array = random_array((37, 23, 5), "int32")
    record = save(storage, {"a": array}, chunk_bytes=2000, **form)
    rng = np.random.default_rng(1)
    boxes = []
    for _ in range(40):
        start = [int(rng.integers(0, n)) for n in array.shape]
        boxes.append(
            Box(tuple(start), tuple(int(rng.integers(0, n - at + 1)) for at, n in zip(start, array.shape, strict=True)))
        )
    back = load(storage, [record], [ReadRequest("a", box) for box in boxes])
    for box, found in zip(boxes, back, strict=True):
        assert same(array[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))], found), box


@pytest.fixture
def restless():
    """Let threads take turns as often as can be, so that a race is lost soon."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("restless")
def test_threads_that_fill_one_array_do_not_lose_what_others_wrote():
    storage = MemoryStorage("memory://restless")
    arrays = {f"a/{n}": random_array((8, 5000), "uint8") for n in range(60)}
    record = save(storage, arrays, ocdbt=False, chunk_bytes=5000)
    for _ in range(3):
        back = load(storage, [record], list(arrays), threads=8)
        assert all(same(a, b) for a, b in zip(arrays.values(), back, strict=True))


def test_a_box_beyond_the_array_is_refused(tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    record = save(storage, {"a": np.arange(8)})
    with pytest.raises(MismatchError, match="'a' of shape"):
        load(storage, [record], [ReadRequest("a", Box((4,), (5,)))])


@pytest.mark.parametrize("kind", PLACES)
def test_a_storage_with_a_driver_of_its_own_is_written_through_it(kind, tmp_path):
    storage = Native(tmp_path)
    arrays = {"a": np.arange(5000.0), "b": np.arange(3)}
    record = save(storage, arrays, ocdbt=kind == "folder")
    assert all(same(a, b) for a, b in zip(arrays.values(), load(storage, [record], list(arrays)), strict=True))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(storage.noted) != set()


def test_memory_stays_within_the_budget_however_many_arrays_are_written(tmp_path):
    held, most, lock = 0, 0, threading.Lock()

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal held
            if self.base is None:
                with lock:
                    held -= self.nbytes

    def fetch():
        nonlocal held, most
        array = np.ndarray.__new__(Counted, (MIB,), np.uint8)
        array[:] = 7
        with lock:
            held += array.nbytes
            most = max(most, held)
        return array

    for codec in (None, "zstd"):
        most = 0
        pieces = [Piece(ArraySpec(f"a/{n}", (MIB,), "uint8"), fetch) for n in range(40)]
        where = location(PosixStorage((tmp_path / str(codec)).as_uri()))
        TensorStoreArrays(compression=codec).write(where, pieces, WriteOptions(8 * MIB, 2))
        assert 0 < most <= 4 * MIB
    assert held == 0


# --- names, dtypes, options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_tensorstore_lacks_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(UnsupportedLeafError, match=f"'x/y' of dtype '{name}'"):
        save(PosixStorage(tmp_path.as_uri()), {"x/y": np.zeros(3, getattr(ml_dtypes, name))})
    assert list(tmp_path.iterdir()) == []


def test_names_that_come_to_the_same_are_refused_together():
    arrays = {
        "a/b": np.zeros(1),
        "a.b": np.ones(1),
        "c": np.zeros(1),
        "d~1e": np.zeros(1),
        "x.y/z": np.zeros(1),
        "x/y.z": np.zeros(1),
    }
    with pytest.raises(UnsupportedLeafError) as caught:
        save(MemoryStorage("memory://same"), arrays)
    assert "'a/b' and 'a.b' would both be 'a.b'; 'x.y/z' and 'x/y.z' would both be 'x.y.z'" in str(caught.value)
    assert list(MemoryStorage("memory://same").children("")) == []


@pytest.mark.parametrize("name", ["..", "a~1..~1b", "~1etc", "", "_METADATA", "d", "x" * 300])
def test_a_name_that_cannot_be_a_folder_is_refused_where_arrays_are_folders(name, tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    with pytest.raises(UnsupportedLeafError, match="cannot be a folder"):
        save(storage, {name: np.zeros(1)}, ocdbt=False)
    assert list(tmp_path.iterdir()) == []
    record = save(storage, {name: np.arange(3.0)})
    assert load(storage, [record], [name])[0].tolist() == [0, 1, 2]


def test_an_array_within_the_folder_of_another_is_refused(tmp_path):
    arrays = {"a": np.zeros(3), "a~1.zarray": np.zeros(3), "a.b": np.zeros(1)}
    with pytest.raises(UnsupportedLeafError, match=r"'a~1.zarray' would lie in the folder of 'a'"):
        save(PosixStorage(tmp_path.as_uri()), arrays, ocdbt=False)


@pytest.mark.parametrize("form", FORMS)
def test_odd_names_round_trip(form, tmp_path):
    names = ["ü/\n'\"", "😀", "c~0d", "one/two~1three", "%41", "a:b", "1~2"]
    arrays = {name: np.arange(3.0) + n for n, name in enumerate(names)}
    storage = PosixStorage(tmp_path.as_uri())
    back = load(storage, [save(storage, arrays, **form)], names)
    assert [found[0] for found in back] == list(range(len(names)))


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 4},
        {"zarr_format": True},
        {"ocdbt": "yes"},
        {"compression": "lz4"},
        {"compression_level": 3},
        {"compression": "zstd", "compression_level": 40},
        {"chunk_bytes": 0},
        {"chunk_bytes": 2.5},
        {"target_file_bytes": -1},
        {"cache_bytes": "1 GB"},
        {"file_io_concurrency": 0},
    ],
)
def test_a_wrong_option_is_refused_at_once_and_named(options):
    name = list(options)[-1]
    with pytest.raises(ConfigError, match=f"cannot use {name} "):
        TensorStoreArrays(**options)


@pytest.mark.parametrize(
    ("shape", "box", "limit"),
    [
        ((1000, 1000), None, 50_000),
        ((7919, 3), None, 1000),
        ((4, 1000, 100), None, 50_000),
        ((10**6,), None, 100),
        ((96, 1000), (48, 500), 10_000),
        ((5, 64, 64), (5, 16, 64), 1),
        ((0, 5), None, 100),
        ((), None, 1),
    ],
)
def test_chunks_fit_the_limit_and_divide_what_is_spread(shape, box, limit):
    chunk = TensorStoreArrays(chunk_bytes=limit).chunk(ArraySpec("a", shape, "float32", box))
    assert len(chunk) == len(shape)
    assert math.prod(chunk) * 4 <= max(limit, 4)
    assert all(1 <= n <= max(1, most) for n, most in zip(chunk, shape, strict=True))
    if box is not None:
        assert [part % n for part, n in zip(box, chunk, strict=True)] == [0] * len(shape)
    # no crumbs: a chunk is at least a quarter of the limit, or there would be fewer
    assert math.prod(chunk) * 4 * 4 > min(limit, math.prod(shape) * 4)


def test_an_array_may_wish_for_chunks_of_its_own():
    spec = ArraySpec("a", (60, 64), "float32", None, chunk_bytes=1024, chunk_axes=(1,))
    assert TensorStoreArrays().chunk(spec) == (60, 4)


def test_a_large_prime_that_is_spread_is_not_cut_into_crumbs():
    spec = ArraySpec("a", (2 * 1_000_003,), "float32", (1_000_003,))
    assert TensorStoreArrays(chunk_bytes=MIB).chunk(spec) == (1_000_003,)


# --- several hosts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_hosts_write_their_boxes_and_all_becomes_one(form, kind, place, tmp_path):
    storage, writer = place(kind), TensorStoreArrays(chunk_bytes=500, **form)
    array, own = random_array((32, 24), "float32"), np.arange(6)
    spec = ArraySpec("w", array.shape, "float32", (16, 12))
    boxes = [Box((row, column), (16, 12)) for row in (0, 16) for column in (0, 12)]
    records = []
    for host in range(3):
        mine = boxes[host : host + 1] if host < 2 else boxes[2:3]
        mine += boxes[3:] if host == 1 else []
        pieces = [
            Piece(spec, lambda box=box: array[box.start[0] :, box.start[1] :][:16, :12].copy(), box) for box in mine
        ]
        if host == 0:
            pieces.append(Piece(ArraySpec("own", (6,), "int64"), lambda: own))
        records.append(writer.write(location(storage, host, 4), pieces, WriteOptions(MIB, 2)))
    records.append(writer.write(location(storage, 3, 4), [], WriteOptions(MIB, 2)))  # one that has nothing to write
    if form["ocdbt"]:
        merge(location(storage), 4)
    back = load(storage, json.loads(json.dumps(records)), ["w", "own", ReadRequest("w", Box((3, 5), (20, 10)))])
    assert same(array, back[0])
    assert same(own, back[1])
    assert same(array[3:23, 5:15], back[2])
    if kind == "folder":
        assert same(array, np.asarray(opened(tmp_path / "7/state", "w", form).read().result()))


def test_a_box_that_no_host_wrote_is_missed_by_name(tmp_path):
    storage, writer = PosixStorage(tmp_path.as_uri()), TensorStoreArrays()
    pieces = [Piece(ArraySpec("a/w", (8,), "int64", (4,)), lambda: np.arange(4), Box((0,), (4,)))]
    record = writer.write(location(storage), pieces, WriteOptions(MIB, 1))
    assert load(storage, [record], [ReadRequest("a/w", Box((1,), (3,)))])[0].tolist() == [1, 2, 3]
    with pytest.raises(MissingDataError, match="array 'a/w' is stored in part only"):
        load(storage, [record], ["a/w"])


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_arrays_can_be_added_to_what_is_written(form, kind, place, tmp_path):
    storage = place(kind)
    record = save(storage, {"w": np.arange(3000.0)}, **form)
    added = {f"s.{n}": np.array(n) for n in range(50)} | {"t": np.ones((0, 3), np.float32)}
    add_arrays(location(storage), [record], added)
    assert load(storage, [record], ["w"])[0].tolist() == np.arange(3000.0).tolist()
    if kind == "folder":
        for name, array in added.items():
            assert same(array, np.asarray(opened(tmp_path / "7/state", name, form).read().result())), name


def test_pieces_that_are_not_whole_chunks_or_not_what_was_announced_are_refused(tmp_path):
    where = location(PosixStorage(tmp_path.as_uri()))
    half = Piece(ArraySpec("a", (8,), "int64"), lambda: np.arange(3), Box((1,), (3,)))
    with pytest.raises(ValueError, match="does not consist of whole chunks"):
        TensorStoreArrays().write(where, [half], WriteOptions(MIB, 1))
    other = Piece(ArraySpec("a", (8,), "int64"), lambda: np.arange(9))
    with pytest.raises(ValueError, match="was announced as"):
        TensorStoreArrays().write(where, [other], WriteOptions(MIB, 1))
    with pytest.raises(ValueError, match="given twice"):
        TensorStoreArrays().write(where, [other, other], WriteOptions(MIB, 1))


def test_what_fetching_raises_comes_out_as_it_is(tmp_path):
    def fetch():
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        TensorStoreArrays().write(
            location(PosixStorage(tmp_path.as_uri())),
            [Piece(ArraySpec("a", (8,), "int64"), fetch)],
            WriteOptions(MIB, 1),
        )


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_folder_that_cannot_be_written_is_a_storage_error(ocdbt, tmp_path):
    (tmp_path / "7").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write the arrays"):
        save(PosixStorage(tmp_path.as_uri()), {"a": np.arange(5000)}, ocdbt=ocdbt)


# --- damage ----------------------------------------------------------------------------------------------------------


def saved(tmp_path, **form):
    storage = PosixStorage(tmp_path.as_uri())
    arrays = {"a/inline": np.arange(10), "b/small": np.arange(1000), "c/large": np.arange(200_000)}
    return storage, save(storage, arrays, **form), arrays


def attempted(storage, record, arrays):
    """Return what can be read, or how that fails."""
    try:
        return load(storage, [record], list(arrays)), None
    except DamagedError as error:
        return None, error


def data_files(tmp_path, form):
    """Return the files with the data of the arrays, without those that say where they are."""
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(("n", ".z", "zarr"))]
    return [path for path in files if path.name != "manifest.ocdbt"] if form["ocdbt"] else files


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_byte_is_found_and_the_array_named(form, tmp_path):
    storage, record, arrays = saved(tmp_path, **form)
    for path in data_files(tmp_path, form):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 7)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            back, error = attempted(storage, record, arrays)
            if error is None:
                # what changed is of no array: the index of a shard, or what a codec does not look at
                assert all(same(a, b) for a, b in zip(arrays.values(), back, strict=True))
                assert form["zarr_format"] == 3 or form["compression"]
            else:
                assert "array '" in str(error)
        path.write_bytes(data)


@pytest.mark.parametrize("form", [{"ocdbt": True}, {"ocdbt": False}, {"ocdbt": False, "zarr_format": 3}])
def test_a_wrong_value_is_a_checksum_error_unless_nobody_asks(form, tmp_path):
    storage, record, arrays = saved(tmp_path, **form)
    path = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(-100_000, 2)
        file.write(b"\xff" * 8)
    with pytest.raises(ChecksumError, match=f"array 'c/large' differs .* in '.*{path.name}'"):
        load(storage, [record], list(arrays))
    (back,) = load(storage, [record], ["c/large"], verify=False)
    assert not same(arrays["c/large"], back)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_or_short_file_is_named_with_the_array(form, tmp_path):
    storage, record, arrays = saved(tmp_path, **form)
    for path in data_files(tmp_path, form):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(MissingDataError, match=f"array '.*' cannot be read: file '.*{path.name}' is missing"):
            load(storage, [record], list(arrays))
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(DamagedError, match="array '"):
            load(storage, [record], list(arrays))
        path.write_bytes(data)
    assert all(same(a, b) for a, b in zip(arrays.values(), load(storage, [record], list(arrays)), strict=True))


def test_a_damaged_database_is_one_clear_error(tmp_path):
    storage, record, arrays = saved(tmp_path)
    index = [path for path in tmp_path.rglob("*") if path.is_file() and (path.name[0] in "nm")]
    assert len(index) > 1
    for path in index:
        data = path.read_bytes()
        path.unlink()
        _, error = attempted(storage, record, arrays)
        if error is not None or path.name == "manifest.ocdbt":
            assert path.name in str(error)
        for wrong in (data[: len(data) // 2], b"", data[:9] + b"\xff" + data[10:], b"x" * len(data)):
            path.write_bytes(wrong)
            back, error = attempted(storage, record, arrays)
            if error is None:  # a node of a former version
                assert all(same(a, b) for a, b in zip(arrays.values(), back, strict=True))
                assert path.name != "manifest.ocdbt"
        path.write_bytes(data)


def rows_with(record, number, value):
    rows = [list(row) for row in record["pieces"]]
    rows[0][number] = value
    return record | {"pieces": rows}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: record | {"format": "1"},
        lambda record: record | {"zarr_format": 4},
        lambda record: record | {"ocdbt": 1},
        lambda record: record | {"pieces": {}},
        lambda record: record | {"pieces": [[]]},
        lambda record: record | {"base": "../"},
        lambda record: record | {"base": "x"},
        lambda record: record | {"databases": "d/"},
        lambda record: record | {"names": {"a/inline": 1}},
        lambda record: record | {"compression": ["zip", 1]},
        lambda record: rows_with(record, 0, 7),
        lambda record: rows_with(record, 1, "object"),
        lambda record: rows_with(record, 2, [-1]),
        lambda record: rows_with(record, 2, [True]),
        lambda record: rows_with(record, 2, [1 << 62]),
        lambda record: rows_with(record, 3, [0]),
        lambda record: rows_with(record, 3, [1, 1]),
        lambda record: rows_with(record, 4, "x" * 16),
        lambda record: rows_with(record, 4, ""),
    ],
)
def test_a_record_that_lies_is_refused(change, tmp_path):
    storage, record, _ = saved(tmp_path)
    with pytest.raises(ManifestError, match="cannot be believed"):
        load(storage, [change(record)], ["a/inline"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [[1 << 50], [1 << 20, 1 << 20]])
def test_a_shape_that_lies_costs_no_memory(shape, form, tmp_path):
    storage, record, _ = saved(tmp_path, **form)
    with pytest.raises(DamagedError, match="array 'a/inline' "):
        load(storage, [rows_with(record, 2, shape)], ["a/inline"])


def test_a_newer_format_is_told_from_damage(tmp_path):
    storage, record, _ = saved(tmp_path)
    with pytest.raises(FutureFormatError, match="format 2"):
        load(storage, [record | {"format": 2}], ["a/inline"])


def test_an_array_that_was_not_saved_is_missed_by_name(tmp_path):
    storage, record, _ = saved(tmp_path)
    with pytest.raises(MissingDataError, match="array 'nobody'"):
        load(storage, [record], ["nobody"])


# --- arrays of others ------------------------------------------------------------------------------------------------


def foreign(record):
    return {key: record[key] for key in ("format", "zarr_format", "ocdbt")}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_arrays_without_a_record_of_pieces_are_read_by_their_own_metadata(form, kind, place):
    storage = place(kind)
    arrays = {f"x/{dtype}": random_array((21, 11), dtype) for dtype in DTYPES} | {
        "s": np.array(3),
        "z": np.zeros((0, 2)),
    }
    record = foreign(save(storage, arrays, chunk_bytes=300, **form))
    back = load(storage, [record], list(arrays))
    for (name, array), found in zip(arrays.items(), back, strict=True):
        assert same(array, found), name


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_large_raw_chunk_of_others_is_read_by_the_rows_that_are_wanted(ocdbt, zarr_format, tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    array = random_array((3000, 2000), "float32")
    record = foreign(save(storage, {"a": array}, ocdbt=ocdbt, zarr_format=zarr_format, chunk_bytes=1 << 30))
    wanted = [(0, 0, 3000, 2000), (5, 0, 7, 2000), (1000, 500, 1500, 1000), (2999, 1999, 1, 1)]
    boxes = [ReadRequest("a", Box((a, b), (n, m))) for a, b, n, m in wanted]
    for (a, b, n, m), found in zip(wanted, load(storage, [record], boxes, budget=MIB), strict=True):
        assert same(array[a : a + n, b : b + m], found)


class Counting(MemoryStorage):
    """A storage in memory that notes which bytes are read of what."""

    def __init__(self, url):
        super().__init__(url)
        self.reads = []

    def read(self, key, start=0, stop=None):
        self.reads.append((key, start))
        return super().read(key, start, stop)


WANTED = [(0, 0, 3001, 2000), (5, 0, 7, 2000), (1000, 500, 1500, 1000), (2999, 1999, 1, 1), (1600, 0, 200, 2000)]


@pytest.mark.parametrize("limit", [1 << 30, 12 * MIB])  # the last of two chunks is smaller than the first
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("zarr_format", "ocdbt"), [(2, True), (2, False), (3, True), (3, False)])
def test_a_large_compressed_chunk_is_decompressed_in_portions_for_all_who_want_of_it(
    zarr_format, ocdbt, kind, ours, limit, place
):
    storage = place(kind)
    array = random_array((3001, 2000), "float32")
    record = save(storage, {"a": array}, ocdbt=ocdbt, zarr_format=zarr_format, chunk_bytes=limit, compression="zstd")
    boxes = [ReadRequest("a", Box((a, b), (n, m))) for a, b, n, m in WANTED]
    for some in (boxes, boxes[:1], boxes[2:3]):
        back = load(storage, [record if ours else foreign(record)], some, budget=MIB)
        for request, found in zip(some, back, strict=True):
            (a, b), (n, m) = request.box.start, request.box.shape
            assert same(array[a : a + n, b : b + m], found)


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("shape", [(3000, 2000), (2100, 2000), (2000, 1100), (5, 4)])
def test_large_chunks_that_reach_beyond_the_array_are_understood(shape, driver, tmp_path):
    array, chunk = random_array(shape, "int32"), [2000, 1500]
    if driver == "zarr":
        metadata = {"shape": shape, "chunks": chunk, "dtype": "<i4", "compressor": {"id": "zstd", "level": 1}}
    else:
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]
        inner = {"chunk_shape": chunk, "codecs": codecs}
        metadata = {"shape": shape, "data_type": "int32", "codecs": [{"name": "sharding_indexed"}]}
        metadata["codecs"][0]["configuration"] = inner
        metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{tmp_path}/7/state/a/"}, "metadata": metadata}
    ts.open(spec, create=True).result().write(array).result()
    record = {"format": 1, "zarr_format": 2 if driver == "zarr" else 3, "ocdbt": False}
    (found,) = load(PosixStorage(tmp_path.as_uri()), [record], ["a"])
    assert same(array, found)


def test_a_compressed_chunk_is_read_once_however_many_share_it():
    storage = Counting("memory://once")
    array = np.zeros((4096, 1024), np.float32)
    array[::7] = 1.5
    record = foreign(save(storage, {"a": array}, ocdbt=False, chunk_bytes=1 << 30, compression="zstd"))
    storage.reads.clear()
    boxes = [ReadRequest("a", Box((at, 0), (512, 1024))) for at in range(0, 4096, 512)]
    back = load(storage, [record], boxes, budget=MIB)
    assert same(array, np.concatenate(back))
    assert storage.reads.count(("7/state/a/0.0", 0)) == 1


def test_the_database_is_read_once_for_many_calls_with_the_same_records():
    storage = Counting("memory://calls")
    records = [save(storage, {f"a/{n}": np.full(2000, n) for n in range(8)})]
    reader, options = TensorStoreArrays(), ReadOptions(MIB, 1)

    def first(records, number):
        ((_, found),) = reader.read(location(storage), records, [ReadRequest(f"a/{number}")], options)
        return found[0]

    def opened_times():
        return storage.reads.count(("7/state/manifest.ocdbt", 0))

    storage.reads.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(range(8)) == list(pool.map(lambda number: first(records, number), range(8)))
    once = opened_times()
    assert list(range(8)) == [first(records, number) for number in range(8)]
    assert opened_times() == once <= 4
    assert first(list(records), 3) == 3
    assert opened_times() == once + 1


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("shape", [(100,), (4_000_000,)])
def test_a_frame_of_another_size_than_the_chunk_is_damage(shape, zarr_format, tmp_path):
    form = {"zarr_format": zarr_format, "ocdbt": False, "compression": "zstd"}
    storage = PosixStorage(tmp_path.as_uri())
    record = foreign(save(storage, {"a": np.arange(*shape)}, chunk_bytes=1 << 30, **form))
    (file,) = (path for path in tmp_path.rglob("0") if path.is_file())
    right = file.read_bytes()
    for other in (shape[0] - 1, shape[0] + 1):
        elsewhere = PosixStorage((tmp_path / str(other)).as_uri())
        save(elsewhere, {"a": np.arange(other)}, chunk_bytes=1 << 30, **form)
        (wrong,) = (path for path in (tmp_path / str(other)).rglob("0") if path.is_file())
        file.write_bytes(wrong.read_bytes())
        with pytest.raises(DamagedError, match=r"array 'a' cannot be read: its chunk '(c/)?0' cannot be decompressed"):
            load(storage, [record], ["a"])
    for wrong in (right[:-30], right[: len(right) // 2], b"", right[:9] + b"\xff" * 30 + right[39:]):
        file.write_bytes(wrong)
        with pytest.raises(DamagedError, match="array 'a'"):
            load(storage, [record], ["a"])


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
ZSTD = {"name": "zstd", "configuration": {"level": 2, "checksum": True}}


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes", "configuration": {"endian": "big"}}, ZSTD],
        [LITTLE, {"name": "gzip", "configuration": {"level": 1}}],
        [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE, ZSTD],
        [LITTLE, ZSTD, {"name": "crc32c"}],
        *(
            [{"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": inner, **more}}]
            for chunk, inner, more in (
                ([4, 3], [LITTLE, ZSTD], {}),
                ([4, 3], [LITTLE, ZSTD], {"index_location": "start"}),
                ([4, 3], [LITTLE, ZSTD, {"name": "crc32c"}], {}),
                ([4, 3], [LITTLE], {}),
                ([2, 3], [LITTLE, ZSTD], {}),
                ([4, 3], [{"name": "bytes", "configuration": {"endian": "big"}}, ZSTD], {}),
            )
        ),
    ],
)
def test_whatever_zarr_v3_can_say_is_understood(codecs, tmp_path):
    array = np.arange(35, dtype=np.int32).reshape(5, 7)
    grid = {"name": "regular", "configuration": {"chunk_shape": [4, 3]}}
    metadata = {"shape": [5, 7], "data_type": "int32", "chunk_grid": grid, "codecs": codecs}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/7/state/a.b/"}, "metadata": metadata}
    ts.open(spec, create=True).result().write(array).result()
    (found,) = load(PosixStorage(tmp_path.as_uri()), [{"format": 1, "zarr_format": 3, "ocdbt": False}], ["a/b"])
    assert same(array, found)


def crc32c(data):
    """Return the bytes of a CRC-32C, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 * (value & 1)
    return struct.pack("<I", value ^ 0xFFFFFFFF)


@pytest.mark.parametrize("size", [100, 4_000_000])
def test_a_shard_is_read_by_its_index_where_that_is_not_the_usual_one(size, tmp_path):
    storage, array = PosixStorage(tmp_path.as_uri()), np.arange(1, size + 1)
    form = {"zarr_format": 3, "ocdbt": False, "compression": "zstd"}
    record = foreign(save(storage, {"a": array}, chunk_bytes=1 << 30, **form))
    (file,) = tmp_path.rglob("0")
    body = file.read_bytes()[:-20]
    index = struct.pack("<QQ", 5, len(body))
    file.write_bytes(b"junk!" + body + index + crc32c(index))
    assert same(array, load(storage, [record], ["a"])[0])
    nothing = b"\xff" * 16
    file.write_bytes(body + nothing + crc32c(nothing))
    with pytest.raises(MissingDataError, match="array 'a'"):
        load(storage, [record], ["a"])
    file.write_bytes(body + index + bytes(4))
    with pytest.raises(DamagedError, match="array 'a'"):
        load(storage, [record], ["a"])


@pytest.mark.parametrize(
    ("metadata", "dtype"),
    [
        ({"compressor": {"id": "zstd", "level": 1}}, "<i4"),
        ({"compressor": {"id": "zstd", "level": 1}}, ">i4"),
        ({"compressor": {"id": "zstd", "level": 1}, "order": "F"}, "<i4"),
        ({"order": "F"}, "<i4"),
        ({}, ">i4"),
        ({"dimension_separator": "/"}, "<i4"),
        ({"compressor": {"id": "zlib", "level": 1}}, "<i4"),
        ({"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}}, ">f8"),
    ],
)
def test_whatever_zarr_v2_can_say_is_understood(metadata, dtype, tmp_path):
    array = np.arange(35).reshape(5, 7)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/7/state/a.b/"}}
    spec["metadata"] = {"shape": [5, 7], "chunks": [2, 3], "dtype": dtype, **metadata}
    ts.open(spec, create=True, dtype=np.dtype(dtype).newbyteorder("=")).result().write(array.astype(dtype)).result()
    (found,) = load(PosixStorage(tmp_path.as_uri()), [{"format": 1, "zarr_format": 2, "ocdbt": False}], ["a/b"])
    assert found.tolist() == array.tolist()
    assert found.dtype == np.dtype(dtype).newbyteorder("=")


def test_databases_that_were_never_merged_are_read_together(tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    arrays = {"a": np.arange(500), "b": np.arange(3.0)}
    for host, (name, array) in enumerate(arrays.items()):
        save(storage, {name: array}, host=host, hosts=2)
    record = {"format": 1, "zarr_format": 2, "ocdbt": True, "databases": ["ocdbt.process_0/", "ocdbt.process_1/"]}
    assert all(same(a, b) for a, b in zip(arrays.values(), load(storage, [record], list(arrays)), strict=True))


def test_names_may_differ_and_the_arrays_may_lie_deeper(tmp_path):
    save(PosixStorage((tmp_path / "7/state/x").as_uri()), {"w": np.arange(4)}, ocdbt=False)
    record = {"format": 1, "zarr_format": 2, "ocdbt": False, "base": "x/7/state/", "names": {"value": "w"}}
    assert load(PosixStorage(tmp_path.as_uri()), [record], ["value"])[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_chunk_of_others_that_is_missing_is_never_filled_in(ocdbt, tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    record = foreign(save(storage, {"a/w": np.arange(100)}, ocdbt=ocdbt, chunk_bytes=80))
    if ocdbt:
        base = {"driver": "file", "path": f"{tmp_path}/7/state/"}
        ts.KvStore.open({"driver": "ocdbt", "base": base}).result()["a.w/7"] = None
    else:
        (tmp_path / "7/state/a.w/7").unlink()
    with pytest.raises(MissingDataError, match="array 'a/w'"):
        load(storage, [record], ["a/w"])


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("shape", [[1 << 40], [1 << 50]])
def test_metadata_of_others_that_lie_cost_no_memory(shape, ocdbt, tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    record = foreign(save(storage, {"a": np.arange(100)}, ocdbt=ocdbt))
    document = {"zarr_format": 2, "dtype": "<i8", "shape": shape, "compressor": None, "filters": None, "order": "C"}
    for chunks in (shape, [100]):
        text = json.dumps(document | {"chunks": chunks, "fill_value": None}).encode()
        if ocdbt:
            base = {"driver": "file", "path": f"{tmp_path}/7/state/"}
            ts.KvStore.open({"driver": "ocdbt", "base": base}).result()["a/.zarray"] = text
        else:
            (tmp_path / "7/state/a/.zarray").write_bytes(text)
        with pytest.raises(DamagedError, match="array 'a'"):
            load(storage, [record], ["a"])


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"zarr_format": 2}', b"[" * 100_000, b'{"zarr_format": 3}'])
def test_metadata_of_others_that_make_no_sense_are_named_by_array(text, tmp_path):
    storage = PosixStorage(tmp_path.as_uri())
    record = foreign(save(storage, {"a/b": np.arange(3)}, ocdbt=False))
    (tmp_path / "7/state/a.b/.zarray").write_bytes(text)
    with pytest.raises(DamagedError, match=r"cannot read array 'a/b': its \.zarray cannot be believed"):
        load(storage, [record], ["a/b"])


# --- through the engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["folder", "memory"])
@pytest.mark.parametrize("form", FORMS)
def test_a_tree_is_saved_and_loaded_like_any_other(form, url, tmp_path, request):
    import jax
    import jax.numpy as jnp

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spread = jax.device_put(jnp.arange(64.0).reshape(8, 8), jax.NamedSharding(mesh, jax.P("x", "y")))
    tree = {
        "params": {"w": spread, "b": np.arange(5, dtype=np.int8)},
        "step": 3,
        "empty": {},
        "none": None,
        "z": jnp.zeros((0, 2)),
    }
    path = f"{tmp_path}/7" if url == "folder" else f"memory://{request.node.name}/7"
    with configured({"default": {"arrays": "tensorstore", "arrays_options": {k: v for k, v in form.items() if v}}}):
        milepost.save(path, tree)
    back = milepost.load(path)
    assert jax.tree.structure(tree) == jax.tree.structure(back)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert np.asarray(one).tolist() == np.asarray(other).tolist()
        assert getattr(one, "sharding", None) == getattr(other, "sharding", None)
