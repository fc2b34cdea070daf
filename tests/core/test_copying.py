"""Copies of checkpoints: between places and formats, whole or not at all, within the budget."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tracemalloc
import uuid

import jax
import jax.numpy as jnp
import milepost
import ml_dtypes
import numpy as np
import pytest
from core.fake_packages import Site
from milepost import errors
from milepost import plugins as plugins_module
from milepost.engine import copying, stored
from milepost.engine.copying import Copy, CopyRequest
from milepost.engine.items import OwnItem
from milepost.engine.reading import open_checkpoint
from milepost.engine.saving import Save, SaveRequest
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.protocols import ArraySpec
from milepost.testing.faults import WrappedStorage, keys

from core import manifests

BLOCKS = """
import json, math, threading
import numpy as np
from milepost.hookspecs import hookimpl
from milepost.protocols import Box

class Blocks:
    '''One file of raw bytes for each box, in boxes of whole chunks; `native` writes behind the storage's back.'''
    calls, boxes, wrote = [], [], []
    def __init__(self, *, rows=0, native=False, spoil="", completes=True):
        self.rows, self.native, self.spoil, self.completes = rows, native, spoil, completes
    def create(self, location, specs):
        self.specs = list(specs)
    def chunk(self, spec):
        full = spec.box or spec.shape
        return (min(self.rows or full[0], full[0]), *full[1:]) if full else ()
    def write(self, location, pieces, options):
        record = []
        for number, piece in enumerate(pieces):
            data = piece.fetch()
            Blocks.wrote.append((piece.spec, piece.box))
            if piece.spec.name == self.spoil:
                data = data + 1
            name, box = f"{number}.raw", piece.box or Box((0,) * len(piece.spec.shape), piece.spec.shape)
            if self.native:
                (location.storage.folder(location.prefix)).mkdir(parents=True, exist_ok=True)
                (location.storage.folder(location.prefix) / name).write_bytes(data.tobytes())
                location.storage.note(location.prefix + name)
            else:
                location.storage.write(location.prefix + name, [data.tobytes()])
            record.append([piece.spec.name, piece.spec.dtype, list(piece.spec.shape), name, box.start, box.shape])
        return record
    def read(self, location, records, requests, options):
        Blocks.calls.append(len(requests))
        arrays = {}
        for record in records:
            for name, dtype, shape, file, start, lengths in record:
                arrays.setdefault(name, []).append((dtype, shape, file, start, lengths))
        for at, request in enumerate(requests):
            rows = arrays[request.name]
            dtype, shape = rows[0][0], tuple(rows[0][1])
            import ml_dtypes
            full = np.empty(shape, getattr(ml_dtypes, dtype, None) or dtype)
            for _, _, file, start, lengths in rows:
                data = np.frombuffer(bytes(location.storage.read(location.prefix + file)), full.dtype)
                full[tuple(slice(a, a + n) for a, n in zip(start, lengths))] = data.reshape(lengths)
            box = request.box
            Blocks.boxes.append(box)
            yield at, full if box is None else np.ascontiguousarray(
                full[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape))])
    def stored_chunks(self, location, records, names):
        found = {row[0]: tuple(row[5]) for record in records for row in record}
        return [found[name] for name in names]
    def complete(self, location, checkpoint):
        names = {name: item["prefix"] for name, item in checkpoint["items"].items()}
        location.storage.write(location.prefix + "about.json", [json.dumps(names).encode()])

@hookimpl
def register_arrays(register):
    register("blocks", Blocks)
"""


TAPE = """
import json
from milepost.hookspecs import hookimpl

class Tape:
    def read(self, storage, prefix, names):
        if "tape.json" not in names:
            return None
        return json.loads(bytes(storage.read(prefix + "tape.json")))

@hookimpl
def register_layouts(register):
    register("tape", Tape)
"""


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    claims = {"milepost.arrays": {"blocks": "blocks_module"}, "milepost.layouts": {"tape": "tape_module"}}
    site.install("blocks", claims, {"blocks_module": BLOCKS, "tape_module": TAPE})
    sys.path.insert(0, str(site.folder))
    plugins_module.installed.cache_clear()
    yield site
    sys.path.remove(str(site.folder))
    site.forget()
    plugins_module.installed.cache_clear()


@pytest.fixture
def blocks():
    import blocks_module

    for seen in (blocks_module.Blocks.calls, blocks_module.Blocks.boxes, blocks_module.Blocks.wrote):
        seen.clear()
    return blocks_module.Blocks


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in ("MILEPOST_CONFIG", "MILEPOST_TOML", "MILEPOST_DISABLE_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def wrapping(wrapper):
    class Plugin:
        @hookimpl(wrapper=True)
        def open_storage(self, factory, url, options):
            return wrapper((yield))

    plugins = plugins_module.installed()
    plugins.load_all()
    name = plugins._manager.register(Plugin())
    try:
        yield
    finally:
        plugins._manager.unregister(name=name)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    return {
        "layers": [
            {"w": rng.normal(size=(64, 32)), "b": jnp.asarray(rng.normal(size=7), jnp.bfloat16)} for _ in range(3)
        ],
        "spread": jax.device_put(jnp.arange(64, dtype=jnp.float32), spread),
        "many": tuple(np.full(3, number, np.int32) for number in range(40)),
        "int4": np.array([-8, -1, 0, 7], ml_dtypes.int4),
        "flags": np.array([True, False]),
        "complex": np.array(1 + 2j, np.complex64),
        "none": None,
        "empty": {},
        "nothing": np.zeros((0, 3), np.float16),
        "step": 7,
        "rate": 0.1,
        "name": "adam",
        "text": "x" * 3000,
        "key": jax.random.key(3),
    }


def bits(path):
    """Return what a checkpoint holds, as its own loader sees it: paths, kinds and bytes."""
    loaded = milepost.load(path)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(loaded)

    def plain(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array | np.ndarray):
            return type(leaf).__name__, str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
        return type(leaf), leaf

    return treedef, [(path, plain(leaf)) for path, leaf in leaves]


def saved(path, value=None, **options):
    milepost.save(path, tree() if value is None else value, **options)
    return path


def memory():
    return f"memory://{uuid.uuid4().hex}"


def copy(source, target, **options):
    return Copy(CopyRequest(source, target, **options)).run()


def document(path):
    checkpoint = open_checkpoint(path)
    return json.loads(bytes(checkpoint.storage.read(checkpoint.prefix + "commit_success.txt")))


def anew(_name, item):
    """Change nothing, which has arrays written anew all the same."""
    return item.structure, range(len(item.leaves))


def nothing_at(folder):
    return not folder.exists() or list(folder.iterdir()) == []


# --- as they are -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "memory"])
@pytest.mark.parametrize("target", ["file", "memory"])
def test_a_copy_has_the_same_files_and_the_same_tree_wherever_it_goes(tmp_path, source, target):
    roots = {"file": lambda name: str(tmp_path / name), "memory": lambda name: f"{memory()}/{name}"}
    at, to = f"{roots[source]('a')}/7", f"{roots[target]('b')}/8"
    saved(at, custom_metadata={"note": [1, None]})
    done = copy(at, to)
    assert done.verbatim
    assert bits(to) == bits(at)
    before, after = document(at), document(to)

    def without(manifest):
        text = json.dumps(manifest).replace(f"{manifest['attempt']}/", "")
        return {key: value for key, value in json.loads(text).items() if key not in ("attempt", "checksum")}

    assert without(after) == without(before)
    assert after["attempt"] != before["attempt"]


def test_a_copy_of_a_copy_in_another_place_is_as_good_as_the_first(tmp_path):
    first = saved(f"{memory()}/1")
    copy(first, tmp_path / "2")
    copy(tmp_path / "2", second := f"{memory()}/3")
    shutil.rmtree(tmp_path / "2")
    assert bits(second) == bits(first)


def test_files_are_copied_without_the_package_that_wrote_them(tmp_path, site):
    milepost_options = {"default": {"arrays": "blocks"}}
    with milepost.configured(milepost_options):
        saved(tmp_path / "1")
    before = {file.name: file.read_bytes() for file in (tmp_path / "1").rglob("*.raw")}
    sys.path.remove(str(site.folder))
    plugins_module.installed.cache_clear()
    try:
        assert copy(tmp_path / "1", tmp_path / "2").verbatim
    finally:
        sys.path.insert(0, str(site.folder))
        plugins_module.installed.cache_clear()
    assert {file.name: file.read_bytes() for file in (tmp_path / "2").rglob("*.raw")} == before
    assert bits(tmp_path / "2") == bits(tmp_path / "1")


def test_metrics_items_and_files_of_their_own_are_copied(tmp_path):
    def begin(folder):
        (folder / "deep").mkdir()
        (folder / "deep/data.bin").write_bytes(bytes(range(256)) * 100)
        return lambda: None

    items = {"state": milepost.engine.items.TreeItem(tree()), "iterator": OwnItem(begin, "grain")}
    save = Save(SaveRequest(tmp_path / "1", items, metrics={"loss": 0.5}))
    save.prepare(lasting=False)()
    save.finish()
    copy(tmp_path / "1", tmp_path / "2")
    copy(tmp_path / "1", tmp_path / "3", arrays="blocks")
    copy(tmp_path / "1", f"{memory()}/4", items=["iterator"])
    for name in ("2", "3"):
        assert document(tmp_path / name)["metrics"] == {"loss": 0.5}
        assert (tmp_path / name / "iterator/deep/data.bin").read_bytes() == bytes(range(256)) * 100
        assert document(tmp_path / name)["items"]["iterator"] == document(tmp_path / "1")["items"]["iterator"]
    assert bits(tmp_path / "3") == bits(tmp_path / "1")


def test_one_item_can_be_copied_alone(tmp_path):
    milepost.v1.save_checkpointables(tmp_path / "1", {"a": {"x": np.ones(3)}, "b": {"y": np.zeros(4)}})
    copy(tmp_path / "1", tmp_path / "2", items=["b"])
    assert list(document(tmp_path / "2")["items"]) == ["b"]
    assert sorted(child.name for child in (tmp_path / "2").iterdir()) == ["b", "commit_success.txt"]
    with pytest.raises(errors.ItemNotFoundError, match="'c'"):
        copy(tmp_path / "1", tmp_path / "3", items=["c"])
    assert nothing_at(tmp_path / "3")


def test_when_a_state_was_saved_is_kept(tmp_path):
    saved(tmp_path / "1")
    before = document(tmp_path / "1")
    for name, options in (("2", {}), ("3", {"arrays": "blocks"})):
        copy(tmp_path / "1", tmp_path / name, **options)
        after = document(tmp_path / name)
        for field in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
            assert after[field] == before[field]


# --- written anew ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["file", "memory"])
@pytest.mark.parametrize("options", [{}, {"rows": 5}, {"native": True}], ids=repr)
def test_another_format_holds_the_same_bits_and_back_again(tmp_path, target, options):
    if target == "memory" and options.get("native"):
        options = {"rows": 1}
    at, to, back = tmp_path / "1", f"{memory() if target == 'memory' else tmp_path}/2", tmp_path / "3"
    saved(at, custom_metadata={"note": 1})
    done = copy(at, to, arrays="blocks", arrays_options=options)
    assert not done.verbatim
    assert {item["writer"] for item in document(to)["items"].values()} == {"blocks"}
    assert bits(to) == bits(at)
    copy(to, back, arrays="safetensors")
    assert bits(back) == bits(at)
    first, last = document(at), document(back)
    for field in ("structure", "leaves", "shardings", "handler", "custom_metadata"):
        assert last["items"]["state"].get(field) == first["items"]["state"].get(field)
    assert last["custom_metadata"] == {"note": 1}


@pytest.mark.parametrize("target", ["file", "memory"])
@pytest.mark.parametrize("writer", ["tensorstore", "zarr"])
def test_the_formats_of_this_project_hold_the_same_bits_and_are_copied_on_as_files(tmp_path, writer, target):
    root = memory() if target == "memory" else f"{tmp_path}/to"
    saved(tmp_path / "1")
    copy(tmp_path / "1", f"{root}/2", arrays=writer)
    assert bits(f"{root}/2") == bits(tmp_path / "1")
    assert copy(f"{root}/2", tmp_path / "3").verbatim
    copy(tmp_path / "3", tmp_path / "4", arrays="safetensors")
    assert bits(tmp_path / "4") == bits(tmp_path / "1")


def test_what_orbax_saved_becomes_a_checkpoint_and_goes_back_to_orbax(tmp_path):
    import orbax.checkpoint as ocp

    rng = np.random.default_rng(0)
    value = {"layers": [{"w": rng.normal(size=(30, 20)), "b": jnp.ones(5, jnp.bfloat16)}], "step": 7, "rate": 0.25}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", value)
    assert not copy(tmp_path / "orbax", tmp_path / "ours").verbatim
    assert {item["writer"] for item in document(tmp_path / "ours")["items"].values()} == {"safetensors"}
    loaded = milepost.load(tmp_path / "ours")
    assert loaded["layers"][0]["w"].tobytes() == value["layers"][0]["w"].tobytes()
    assert (loaded["step"], loaded["rate"]) == (7, 0.25)
    copy(tmp_path / "ours", tmp_path / "back", arrays="tensorstore")
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(tmp_path / "back", value)
    assert np.asarray(again["layers"][0]["b"]).tobytes() == np.asarray(value["layers"][0]["b"]).tobytes()
    assert again["layers"][0]["w"].tobytes() == value["layers"][0]["w"].tobytes()
    assert (again["step"], again["rate"]) == (7, 0.25)


def test_what_else_a_format_needs_is_written_once_all_arrays_are(tmp_path):
    saved(tmp_path / "1")
    copy(tmp_path / "1", tmp_path / "2", arrays="blocks")
    copy(tmp_path / "1", to := f"{memory()}/2", arrays="blocks")
    assert json.loads((tmp_path / "2/about.json").read_bytes()) == {"state": "state/"}
    assert "about.json" in {file["path"].rpartition("/")[2] for file in document(to)["files"]}
    copy(tmp_path / "2", tmp_path / "3")
    assert (tmp_path / "3/about.json").read_bytes() == (tmp_path / "2/about.json").read_bytes()


def test_boxes_are_whole_chunks_and_know_how_the_array_was_spread(tmp_path, blocks):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    count = len(jax.devices())
    value = {"w": np.arange(1000 * 100.0).reshape(1000, 100), "s": jax.device_put(jnp.ones((4, 8 * count)), spread)}
    saved(tmp_path / "1", value)
    with milepost.configured({"default": {"save_budget": 1 << 20}}):
        copy(tmp_path / "1", tmp_path / "2", arrays="blocks", arrays_options={"rows": 30})
    boxes = [box for spec, box in blocks.wrote if spec.name == "w"]
    assert len(boxes) > 1
    assert [box.start[0] % 30 for box in boxes] == [0] * len(boxes)
    assert [box.shape[0] % 30 for box in boxes[:-1]] == [0] * (len(boxes) - 1)
    (spec,) = {spec for spec, _ in blocks.wrote if spec.name == "s"}
    assert spec.box == ((4, 8) if count > 1 else None)
    assert bits(tmp_path / "2") == bits(tmp_path / "1")


def test_a_stored_chunk_is_read_once_even_if_it_is_larger_than_a_box_would_be(tmp_path, blocks):
    value = {"w": np.arange(1000 * 1000.0).reshape(1000, 1000)}
    with milepost.configured(
        {"default": {"arrays": "blocks", "arrays_options": {"rows": 250}, "save_budget": 1 << 20}}
    ):
        saved(tmp_path / "1", {"w": value["w"][:, ::-1]})  # no view can be written, so that it is cut into chunks
    assert len(document(tmp_path / "1")["items"]["state"]["records"][0]) == 4
    blocks.boxes.clear()
    with milepost.configured({"default": {"save_budget": 1 << 20}}):
        copy(tmp_path / "1", tmp_path / "2", arrays="safetensors")
    assert sorted(box.start for box in blocks.boxes) == [(0, 0), (250, 0), (500, 0), (750, 0)]
    assert bits(tmp_path / "2") == bits(tmp_path / "1")


def test_thousands_of_small_leaves_are_read_in_few_calls(tmp_path, blocks):
    source = f"{memory()}/1"
    with milepost.configured({"default": {"arrays": "blocks"}}):
        saved(source, {f"leaf{number}": np.full(number % 50, number) for number in range(2000)})
    blocks.calls.clear()
    copy(source, tmp_path / "2", arrays="safetensors")
    assert sum(blocks.calls) == 2000
    assert len(blocks.calls) < 20
    assert bits(tmp_path / "2") == bits(source)


@pytest.mark.parametrize("options", [{"arrays": "blocks", "arrays_options": {"rows": 64}}, {"rename": anew}, {}])
def test_an_array_larger_than_the_budget_never_is_in_memory_as_a_whole(tmp_path, options):
    budget = 8 << 20
    value = {"large": np.ones((4096, 2048)), "small": [np.ones(100) for _ in range(500)]}
    saved(tmp_path / "1", value)
    del value
    with milepost.configured({"default": {"save_budget": budget}}):
        copy(tmp_path / "1", tmp_path / "warm", items=["state"])
        tracemalloc.start()
        copy(tmp_path / "1", tmp_path / "2", **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # 64 MiB are copied; besides the budget there are blocks of 4 MiB that are checked, and the manifest.
    assert peak < budget + (16 << 20)


def test_a_writer_that_asks_in_another_order_gets_what_it_asked_for(tmp_path):
    rng = np.random.default_rng(1)
    value = {f"{number}": rng.integers(0, 255, rng.integers(1, 9000), np.uint8) for number in range(600)}
    saved(tmp_path / "1", value)
    with milepost.configured({"default": {"save_budget": 1 << 20, "threads": 4}}):
        copy(tmp_path / "1", tmp_path / "2", rename=anew)
        copy(tmp_path / "2", third := f"{memory()}/3", arrays="blocks")
    assert bits(third) == bits(tmp_path / "1")


def test_leaves_can_be_renamed_reordered_and_left_out(tmp_path):
    saved(tmp_path / "1", {"a": np.arange(3), "b": np.arange(4.0), "c": 5})

    def rename(name, item):
        assert (name, len(item.leaves)) == ("state", 3)
        inner = {"kind": "dict", "keys": ["x", "y"], "children": ["*", "*"]}
        return {"kind": "dict", "keys": ["new"], "children": [inner]}, [2, 0]

    copy(tmp_path / "1", tmp_path / "2", rename=rename)
    loaded = milepost.load(tmp_path / "2")
    assert loaded["new"]["x"] == 5
    assert loaded["new"]["y"].tolist() == [0, 1, 2]
    assert list(loaded) == ["new"]


def test_a_checkpoint_of_another_program_is_written_anew_and_its_numbers_are_numbers(tmp_path):
    with milepost.configured({"default": {"arrays": "blocks"}}):
        saved(tmp_path / "1", {"w": np.arange(6.0), "step": np.array(41), "rate": np.array(0.1)})
    made = document(tmp_path / "1")
    leaves = made["items"]["state"]["leaves"]
    for leaf, kind in zip(leaves, ("float", "int", "np.ndarray"), strict=True):
        leaf["type"] = kind
    (tmp_path / "1/commit_success.txt").unlink()
    foreign = {key: value for key, value in made.items() if key not in ("format", "checksum")}
    (tmp_path / "1/tape.json").write_text(json.dumps(foreign | {"commit_timestamp_nsecs": 0}))
    done = copy(tmp_path / "1", tmp_path / "2")
    assert not done.verbatim
    assert document(tmp_path / "2")["items"]["state"]["writer"] == "safetensors"
    assert document(tmp_path / "2")["commit_timestamp_nsecs"] > 0
    loaded = milepost.load(tmp_path / "2")
    assert (loaded["rate"], loaded["step"], loaded["w"].tolist()) == (0.1, 41, [0, 1, 2, 3, 4, 5])
    assert (type(loaded["rate"]), type(loaded["step"])) == (float, int)


def test_boxes_of_saved_shardings_are_known_without_jax_and_believed_with_care():
    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"))
    saved_as = {"sharding_type": "NamedSharding", "shape": [4, 2], "axis_names": ["x", "y"]}
    for spec, json_spec in ((("x", None), ["x", None]), (((("x", "y")),), [["x", "y"]]), ((None, "y"), [None, "y"])):
        expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)).shard_shape((16, 6))
        assert stored.spread((16, 6), saved_as | {"partition_spec": json_spec}) == expected
    assert stored.spread((16, 6), saved_as | {"partition_spec": []}) is None
    for wrong in (
        {"shape": [0, 2]},
        {"shape": [2.5, 2]},
        {"shape": [-1, 2]},
        {"axis_names": 3},
        {"partition_spec": [7]},
    ):
        assert stored.spread((16, 6), saved_as | {"partition_spec": ["x"]} | wrong) is None


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["1", "../runs/1/", "1/inner", "."])
def test_a_copy_onto_itself_or_into_itself_is_refused(tmp_path, monkeypatch, target):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    saved("1", {"x": 1})
    before = bits("1")
    with pytest.raises(errors.RequestError, match="cannot copy"):
        copy("1", target, overwrite=True)
    assert bits("1") == before
    assert [child.name for child in (tmp_path / "runs").iterdir()] == ["1"]


@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}])
def test_what_is_there_is_replaced_only_if_asked_for(tmp_path, options):
    for root in (str(tmp_path), memory()):
        saved(f"{root}/1", {"x": np.arange(4)})
        saved(f"{root}/2", {"y": 1})
        with pytest.raises(errors.AlreadyExistsError, match="a checkpoint is there"):
            copy(f"{root}/1", f"{root}/2", **options)
        assert milepost.load(f"{root}/2") == {"y": 1}
        copy(f"{root}/1", f"{root}/2", overwrite=True, **options)
        assert bits(f"{root}/2") == bits(f"{root}/1")


def test_a_folder_of_checkpoints_is_no_place_for_a_copy(tmp_path):
    root = memory()
    saved(f"{root}/runs/1", {"x": 1})
    saved(tmp_path / "2", {"x": 2})
    with pytest.raises(errors.AlreadyExistsError, match="no checkpoint") as caught:
        copy(tmp_path / "2", f"{root}/runs")
    assert "name the copy itself" in caught.value.__notes__[0]
    assert sorted(MemoryStorage(root).children("runs/")) == ["1/"]


def test_nothing_there_is_told_as_such(tmp_path):
    with pytest.raises(errors.CheckpointNotFoundError):
        copy(tmp_path / "1", tmp_path / "2")


def test_unknown_writers_and_options_are_refused_before_a_byte_is_written(tmp_path):
    saved(tmp_path / "1")
    with pytest.raises(errors.PluginNotFoundError, match="tape9"):
        copy(tmp_path / "1", tmp_path / "2", arrays="tape9")
    with pytest.raises(errors.ConfigError, match="colour"):
        copy(tmp_path / "1", tmp_path / "2", arrays="blocks", arrays_options={"colour": 1})
    assert [child.name for child in tmp_path.iterdir()] == ["1"]


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def data_file(folder):
    (file,) = folder.rglob("*.safetensors")
    return file


@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}, {"rename": anew}])
def test_a_flipped_byte_in_the_source_is_told_and_nothing_is_left(tmp_path, options):
    value = {"a": np.arange(40000.0), "marked": np.full(50000, 7, np.uint8)}
    saved(tmp_path / "src/1", value)
    file = data_file(tmp_path / "src/1")
    flip(file, file.read_bytes().index(bytes([7] * 50000)) + 4711)
    with pytest.raises(errors.ChecksumError, match=file.name) as caught:
        copy(tmp_path / "src/1", tmp_path / "dst/1", **options)
    assert "marked" in str(caught.value) or "milepost verify" in caught.value.__notes__[0]
    assert nothing_at(tmp_path / "dst")


@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}])
@pytest.mark.parametrize("harm", ["gone", "short", "long"])
def test_files_that_are_gone_or_of_another_size_are_named(tmp_path, options, harm):
    saved(tmp_path / "src/1")
    file = data_file(tmp_path / "src/1")
    data = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes(data[:-100] if harm == "short" else data + b"x")
    with pytest.raises(errors.MissingDataError, match=file.name):
        copy(tmp_path / "src/1", tmp_path / "dst/1", **options)
    assert nothing_at(tmp_path / "dst")


def test_a_shape_that_lies_is_found_out_before_its_boxes_are_listed(tmp_path):
    saved(tmp_path / "1", {"x": np.arange(10, dtype=np.uint8)})
    made = document(tmp_path / "1")
    made["items"]["state"]["leaves"][0]["arrays"][""]["shape"] = [1 << 60]
    manifests.write(tmp_path / "1", made)
    with pytest.raises(errors.MilepostError):
        copy(tmp_path / "1", tmp_path / "2", arrays="blocks")
    assert nothing_at(tmp_path / "2")


@pytest.mark.parametrize(
    ("shape", "dtype"), [([4], "float64"), ([10], "float32"), ([5, 2], "float64")], ids=["shape", "dtype", "axes"]
)
def test_a_manifest_that_contradicts_the_record_is_refused(tmp_path, shape, dtype):
    saved(tmp_path / "1", {"x": np.arange(10.0)})
    made = document(tmp_path / "1")
    made["items"]["state"]["leaves"][0]["arrays"][""] |= {"shape": shape, "dtype": dtype}
    manifests.write(tmp_path / "1", made)
    with pytest.raises(errors.DamagedError, match="'x'"):
        copy(tmp_path / "1", tmp_path / "2", arrays="blocks")
    assert nothing_at(tmp_path / "2")


def test_records_that_make_the_reader_fail_are_damage(tmp_path):
    with milepost.configured({"default": {"arrays": "blocks"}}):
        saved(tmp_path / "1", {"x": np.arange(10.0)})
    made = document(tmp_path / "1")
    made["items"]["state"]["records"] = [[]]
    manifests.write(tmp_path / "1", made)
    with pytest.raises(errors.DamagedError, match="KeyError"):
        copy(tmp_path / "1", tmp_path / "2", arrays="safetensors")
    assert nothing_at(tmp_path / "2")


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../b", ""])
@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}])
def test_an_item_whose_name_leads_elsewhere_is_refused(tmp_path, name, options):
    saved(tmp_path / "src/1", {"x": np.arange(10.0)})
    made = document(tmp_path / "src/1")
    made["items"] = {name: made["items"]["state"]}
    manifests.write(tmp_path / "src/1", made)
    with pytest.raises(errors.ManifestError):
        copy(tmp_path / "src/1", tmp_path / "dst/1", **options)
    assert [child.name for child in tmp_path.iterdir()] == ["src"]


def test_a_manifest_that_lists_the_commit_object_as_data_is_refused(tmp_path):
    saved(tmp_path / "1", {"x": np.arange(10.0)})
    made = document(tmp_path / "1")
    made["files"].append({"path": "commit_success.txt", "size": 3, "checksum": ""})
    manifests.write(tmp_path / "1", made)
    with pytest.raises(errors.ManifestError, match="commit_success"):
        copy(tmp_path / "1", tmp_path / "2")
    assert nothing_at(tmp_path / "2")


# --- what goes wrong at the target -----------------------------------------------------------------------------------


class Forgetful(WrappedStorage):
    """Stores everything with one bit changed."""

    def write(self, key, buffers):
        if "/dst" in self.url and key.endswith((".safetensors", ".raw")):
            data = bytearray(b"".join(bytes(buffer) for buffer in buffers))
            data[-1:] = bytes(byte ^ 1 for byte in data[-1:])
            buffers = [data]
        super().write(key, buffers)


class Full(WrappedStorage):
    def write(self, key, buffers):
        if "/dst" in self.url and key.endswith((".safetensors", ".raw")):
            for _ in buffers:
                raise errors.StorageFullError(f"cannot write {key!r}: no space left")
        super().write(key, buffers)


@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}])
@pytest.mark.parametrize("scheme", ["file", "memory"])
@pytest.mark.parametrize(("wrapper", "error"), [(Forgetful, errors.StorageError), (Full, errors.StorageFullError)])
def test_a_target_that_loses_or_refuses_bytes_gets_no_checkpoint(tmp_path, options, scheme, wrapper, error):
    root = f"{tmp_path}/dst" if scheme == "file" else f"{memory()}/dst"
    saved(tmp_path / "1")
    saved(f"{root}/1", {"former": 1})
    before = keys(open_checkpoint(f"{root}/1").storage)
    with wrapping(wrapper), pytest.raises(error) as caught:
        copy(tmp_path / "1", f"{root}/1", overwrite=True, **options)
    assert type(caught.value) is error
    assert milepost.load(f"{root}/1") == {"former": 1}
    assert keys(open_checkpoint(f"{root}/1").storage) == before


@pytest.mark.parametrize("native", [False, True])
def test_arrays_that_a_writer_stores_wrongly_are_noticed_if_nobody_else_could(tmp_path, native):
    saved(tmp_path / "1", {"a": np.arange(100.0), "b": {"c": np.arange(100.0)}})
    options = {"arrays": "blocks", "arrays_options": {"native": native, "spoil": "b/c"}}
    if not native:  # its bytes have a checksum, and are those that were written
        copy(tmp_path / "1", tmp_path / "2", **options)
        return
    with pytest.raises(errors.StorageError, match="'b/c'"):
        copy(tmp_path / "1", tmp_path / "2", **options)
    assert [child.name for child in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}])
@pytest.mark.parametrize("phase", ["copying", "verifying"])
def test_a_copy_can_be_cancelled_and_leaves_nothing(tmp_path, options, phase):
    saved(tmp_path / "1")
    done = []

    def started(name, total):
        assert total > 0

        def advance(size):
            done.append((name, size))
            if name == phase:
                work.cancel()

        return advance

    work = Copy(CopyRequest(tmp_path / "1", tmp_path / "2", progress=started, **options))
    with pytest.raises(errors.AbortedError, match="cancelled"):
        work.run()
    assert done[-1][0] == phase
    assert [child.name for child in tmp_path.iterdir()] == ["1"]


def test_progress_tells_every_byte_of_every_phase(tmp_path):
    saved(tmp_path / "1")
    told = {}

    def started(name, total):
        told[name] = [total, 0]

        def advance(size):
            told[name][1] += size

        return advance

    done = copy(tmp_path / "1", tmp_path / "2", progress=started)
    size = sum(file["size"] for file in document(tmp_path / "1")["files"])
    assert told == {"copying": [size, size], "verifying": [size, size]}
    assert done.manifest.data_bytes == size


KILLED = """
import os, signal, sys
from milepost.engine.copying import Copy, CopyRequest

def started(phase, total):
    return lambda size: os.kill(os.getpid(), signal.SIGKILL) if phase == sys.argv[3] else None

Copy(CopyRequest(sys.argv[1], sys.argv[2], progress=started)).run()
"""


@pytest.mark.parametrize("phase", ["copying", "verifying"])
def test_a_copy_that_is_killed_leaves_no_checkpoint_and_what_it_left_is_swept(tmp_path, phase):
    saved(tmp_path / "1", {"x": np.arange(1000.0)})
    command = [sys.executable, "-W", "error", "-c", KILLED, tmp_path / "1", tmp_path / "dst/2", phase]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(errors.CheckpointNotFoundError):
        milepost.load(tmp_path / "dst/2")
    from milepost.engine.sweeping import sweep

    assert len(sweep(f"file://{tmp_path}/dst", older_than=0.0)) == 1
    assert nothing_at(tmp_path / "dst")


@pytest.mark.parametrize("options", [{}, {"arrays": "blocks"}])
def test_a_source_that_is_overwritten_while_it_is_read_is_copied_once_more(tmp_path, options):
    saved(tmp_path / "1", {"x": np.zeros(50000)})
    rewritten = []

    class Overwritten(WrappedStorage):
        def read(self, key, start=0, stop=None):
            if "1/state/" in key and not rewritten:
                rewritten.append(key)
                saved(tmp_path / "1", {"x": np.ones(60000), "y": 2}, overwrite=True)
            return super().read(key, start, stop)

        def read_into(self, key, start, buffer):
            if "1/state/" in key and not rewritten:
                rewritten.append(key)
                saved(tmp_path / "1", {"x": np.ones(60000), "y": 2}, overwrite=True)
            return self.wrapped.read_into(key, start, buffer)

    with wrapping(lambda storage: Overwritten(storage) if storage.url == f"file://{tmp_path}" else storage):
        copy(tmp_path / "1", tmp_path / "2", **options)
    assert rewritten
    assert bits(tmp_path / "2") == bits(tmp_path / "1")
    assert milepost.load(tmp_path / "2")["y"] == 2


def test_observers_learn_of_a_copy_as_of_any_save(tmp_path):
    saved(tmp_path / "1")
    heard = []

    class Observer:
        @hookimpl
        def save_started(self, event):
            heard.append(("started", event.url))

        @hookimpl
        def save_committed(self, event):
            heard.append(("committed", event.url, event.bytes))

    plugins = plugins_module.installed()
    plugins.load_all()
    name = plugins._manager.register(Observer())
    try:
        done = copy(tmp_path / "1", tmp_path / "2")
    finally:
        plugins._manager.unregister(name=name)
    url = f"file://{tmp_path}/2"
    assert heard == [("started", url), ("committed", url, done.manifest.data_bytes)]


def test_sharing_a_budget_spends_no_more_than_it():
    for budget in (1, 1 << 20, 64 << 20, 4 << 30):
        for threads in (1, 2, 16, 64):
            shares = stored.Shares.of(budget, threads)
            spent = shares.threads * shares.piece + shares.threads * shares.window + shares.waiting + shares.reading
            assert spent <= max(budget, 2)
            assert 1 <= shares.threads <= threads


def test_boxes_cover_an_array_once_whatever_the_chunks(tmp_path):
    rng = np.random.default_rng(2)
    for _ in range(50):
        shape = tuple(map(int, rng.integers(1, 40, 3)))
        chunks = [None if rng.random() < 0.3 else tuple(map(int, rng.integers(1, 12, 3))) for _ in range(2)]
        spec = ArraySpec("a", shape, "uint8")
        covered = np.zeros(shape, int)
        unit = stored._unit(spec, chunks[0], chunks[1], int(rng.integers(1, 5000)))
        for box in unit.boxes(spec, int(rng.integers(1, 5000))):
            where = ... if box is None else tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
            covered[where] += 1
            if chunks[0] and box is not None:
                assert [start % min(n, size) for start, n, size in zip(box.start, chunks[0], shape, strict=True)] == [
                    0
                ] * 3
        assert math.prod(shape) == covered.sum() == np.count_nonzero(covered)


def test_copying_knows_no_jax():
    code = "import sys, milepost.engine.copying; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert copying.__doc__
