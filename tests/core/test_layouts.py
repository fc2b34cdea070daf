"""What others laid out is read as if it were ours, and a writer's format may have files besides the arrays."""

from __future__ import annotations

import json

import milepost
import numpy as np
import pytest
from core.fake_packages import HOOKIMPL, Site
from milepost import errors, v1
from milepost.plugins import Plugins

PILES = f"""{HOOKIMPL}
import io, json
import numpy as np
from milepost.errors import DamagedError

class Piles:
    def __init__(self, zarr_format=2):
        self.zarr_format = zarr_format
    def create(self, location, specs):
        self.specs = specs
    def chunk(self, spec):
        return tuple(min(length, 3) for length in spec.shape)
    def write(self, location, pieces, options):
        for at, piece in enumerate(pieces):
            out = io.BytesIO()
            np.save(out, piece.fetch())
            start = piece.box.start if piece.box else [0] * len(piece.spec.shape)
            name = f"{{piece.spec.name}}@{{'-'.join(map(str, start))}}.npy"
            location.storage.write(location.prefix + name, [out.getvalue()])
        wishes = {{spec.name: [spec.chunk_bytes, list(spec.chunk_axes)] for spec in self.specs}}
        return {{"zarr_format": self.zarr_format, "wishes": wishes}}
    def read(self, location, records, requests, options):
        for index, request in enumerate(requests):
            assert request.box is None
            data = bytes(location.storage.read(f"{{location.prefix}}{{request.name}}.npy"))
            yield index, np.load(io.BytesIO(data))
    def complete(self, location, checkpoint):
        told = {{name: [item["prefix"], len(item["leaves"])] for name, item in checkpoint["items"].items()}}
        location.storage.write(location.prefix + "TABLE", [json.dumps(told).encode()])

class Heap:
    def read(self, storage, prefix, names):
        if "HEAP" not in names:
            return None
        found = [name.removesuffix(".npy") for name in sorted(names) if name.endswith(".npy")]
        if not found:
            raise DamagedError(f"cannot read {{prefix!r}}: it has no arrays")
        leaves = []
        for name in found:
            array = np.load(io.BytesIO(bytes(storage.read(f"{{prefix}}{{name}}.npy"))))
            kind = "np.ndarray" if array.shape else "int"
            described = {{"shape": list(array.shape), "dtype": array.dtype.name, "sharding": None}}
            leaves.append({{"type": kind, "arrays": {{"": described}}}})
        item = {{"structure": {{"kind": "dict", "keys": found, "children": ["*"] * len(found)}}, "leaves": leaves,
                "shardings": [], "writer": "piles", "prefix": "", "records": []}}
        return {{"attempt": "", "init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 5, "written_by": {{}},
                "items": {{"state": item}}, "files": [], "custom_metadata": {{"from": "a heap"}}, "metrics": None,
                "version": 1}}

@hookimpl
def register_arrays(register): register("piles", Piles)
@hookimpl
def register_layouts(register): register("heap", Heap)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path / "site")
    site.folder.mkdir()
    monkeypatch.syspath_prepend(str(site.folder))
    yield site
    site.forget()


@pytest.fixture
def piles(site, monkeypatch):
    claims = {"milepost.arrays": {"piles": "piles_module"}, "milepost.layouts": {"heap": "piles_module"}}
    site.install("piles-package", claims, {"piles_module": PILES})
    plugins = Plugins()
    for module in ("saving", "loading", "reading"):
        monkeypatch.setattr(f"milepost.engine.{module}.installed", lambda: plugins)
    return plugins


@pytest.fixture
def heap(tmp_path, piles):
    folder = tmp_path / "runs" / "heap"
    folder.mkdir(parents=True)
    (folder / "HEAP").touch()
    np.save(folder / "count.npy", np.int64(7))
    np.save(folder / "weights.npy", np.arange(4.0))
    return folder


def test_a_foreign_layout_loads_as_if_it_were_ours(heap):
    loaded = milepost.load(heap)
    assert list(loaded) == ["count", "weights"]
    assert (type(loaded["count"]), loaded["count"]) == (int, 7)
    np.testing.assert_array_equal(np.arange(4.0), loaded["weights"], strict=True)


def test_a_foreign_layout_loads_into_a_target(heap):
    loaded = milepost.load(heap, {"count": 0, "weights": np.zeros(4, np.float64)})
    assert loaded["count"] == 7
    np.testing.assert_array_equal(np.arange(4.0), loaded["weights"], strict=True)


def test_a_foreign_layout_has_metadata(heap):
    found = v1.metadata(heap)
    assert found.commit_timestamp_nsecs == 5
    assert found.custom_metadata == {"from": "a heap"}
    assert found.metadata["weights"].shape == (4,)


def test_a_foreign_checkpoint_is_listed_beside_ours(heap):
    from milepost.engine.reading import list_checkpoints

    milepost.save(heap.parent / "ours", {"a": 1})
    (heap.parent / "neither").mkdir()
    (heap.parent / "neither" / "file").touch()
    listed = [(entry.name, entry.manifest is not None) for entry in list_checkpoints(heap.parent)]
    assert listed == [("heap", True), ("ours", True)]


def test_what_is_wrong_with_a_foreign_checkpoint_is_said_by_its_layout(heap):
    for file in heap.glob("*.npy"):
        file.unlink()
    with pytest.raises(errors.DamagedError, match="it has no arrays"):
        milepost.load(heap)


def test_the_item_of_a_checkpoint_of_ours_is_never_taken_for_a_foreign_one(heap, tmp_path):
    milepost.save(tmp_path / "7", {"a": np.arange(3)})
    (tmp_path / "7" / "state" / "HEAP").touch()
    np.save(tmp_path / "7" / "state" / "a.npy", np.zeros(3))
    with pytest.raises(errors.InvalidLayoutError, match="it is within a checkpoint"):
        milepost.load(tmp_path / "7" / "state")


def test_what_a_layout_returns_is_not_believed(heap, monkeypatch):
    import sys

    milepost.load(heap)
    layout = sys.modules["piles_module"].Heap
    true = layout.read

    def lying(self, storage, prefix, names):
        document = true(self, storage, prefix, names)
        document["items"]["state"]["leaves"].pop()
        return document

    monkeypatch.setattr(layout, "read", lying)
    with pytest.raises(errors.ManifestError, match="has 1 leaves in a structure for 2"):
        milepost.load(heap)


def test_a_broken_layout_hinders_nobody(site, heap, monkeypatch):
    site.install("bad-package", {"milepost.layouts": {"bad": "bad_module"}}, {"bad_module": "import nothing_like_it"})
    plugins = Plugins()
    for module in ("loading", "reading"):
        monkeypatch.setattr(f"milepost.engine.{module}.installed", lambda: plugins)
    assert milepost.load(heap)["count"] == 7
    (heap / "HEAP").unlink()
    with pytest.raises(errors.InvalidLayoutError) as error:
        milepost.load(heap)
    assert "layout 'bad'" in " ".join(error.value.__notes__)


def test_a_checkpoint_that_is_missing_asks_no_layout(site, heap, monkeypatch):
    site.install("bad-package", {"milepost.layouts": {"bad": "bad_module"}}, {"bad_module": "raise SystemExit"})
    plugins = Plugins()
    monkeypatch.setattr("milepost.engine.reading.installed", lambda: plugins)
    monkeypatch.setattr("milepost.engine.loading.installed", lambda: plugins)
    with pytest.raises(errors.CheckpointNotFoundError) as error:
        milepost.load(heap.parent / "missing")
    assert "bad" not in " ".join(getattr(error.value, "__notes__", ()))


def test_a_foreign_checkpoint_is_deleted_only_if_its_layout_is_certain_of_the_folder(heap, piles, monkeypatch):
    import sys

    from milepost.engine.deleting import delete

    milepost.load(heap)
    with pytest.raises(errors.InvalidLayoutError, match="it is of the layout 'heap', and its folder may hold more"):
        delete(heap, plugins=piles)
    layout = sys.modules["piles_module"].Heap
    monkeypatch.setattr(layout, "owns", lambda *_: False, raising=False)
    with pytest.raises(errors.InvalidLayoutError, match="it is of the layout 'heap'"):
        delete(heap, plugins=piles)
    assert milepost.load(heap)["count"] == 7
    monkeypatch.setattr(layout, "owns", lambda _self, _storage, _prefix, names: "HEAP" in names)
    assert delete(heap, plugins=piles)
    assert not heap.exists()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_completes_a_checkpoint_is_within_it_and_in_its_manifest(piles, tmp_path):
    with milepost.configured({"default": {"arrays": "piles"}}):
        v1.save_checkpointables(tmp_path / "7", {"params": {"w": np.ones(3), "b": 1}, "config": [np.zeros(2)]})
        milepost.PyTreeCheckpointer().save(tmp_path / "8", {"w": np.ones(3)})
    assert json.loads((tmp_path / "7" / "TABLE").read_text()) == {"params": ["params/", 2], "config": ["config/", 1]}
    assert json.loads((tmp_path / "8" / "TABLE").read_text()) == {"state": ["", 1]}
    manifest = json.loads((tmp_path / "7" / "commit_success.txt").read_text())
    files = {file["path"]: file["checksum"] for file in manifest["files"]}
    assert set(files) == {"TABLE", "params/w@0.npy", "config/0@0.npy"}
    assert all(checksum.startswith("xxh3_64:") for checksum in files.values())


def test_an_array_that_is_cut_is_cut_along_whole_chunks(piles, tmp_path):
    big = np.arange(7 * 50_000, dtype=np.int64).reshape(7, 50_000)
    with milepost.configured({"default": {"arrays": "piles", "save_budget": "1MB", "threads": 2}}):
        v1.save_async(tmp_path / "7", {"big": big}).result()
    cut = sorted(path.name for path in (tmp_path / "7" / "state").iterdir())
    starts = [tuple(map(int, name.removesuffix(".npy").partition("@")[2].split("-"))) for name in cut]
    assert len(starts) > 1
    assert all(row % 3 == 0 and column % 3 == 0 for row, column in starts)
    seen = np.zeros(big.shape, int)
    for name, start in zip(cut, starts, strict=True):
        part = np.load(tmp_path / "7" / "state" / name)
        place = tuple(slice(at, at + length) for at, length in zip(start, part.shape, strict=True))
        np.testing.assert_array_equal(big[place], part)
        seen[place] += 1
    assert (seen == 1).all()


def records_of(path):
    items = json.loads((path / "commit_success.txt").read_text())["items"]
    return {name: item["records"] for name, item in items.items()}


def test_what_the_options_of_a_face_say_of_the_format_reaches_a_writer_that_knows_it(piles, tmp_path):
    state = {"a": np.ones(4), "b": np.ones(2)}
    with milepost.configured({"default": {"arrays": "piles"}}):
        milepost.PyTreeCheckpointer(use_zarr3=True, use_ocdbt=False).save(tmp_path / "1", state)
        milepost.PyTreeCheckpointer().save(tmp_path / "2", state)
        with v1.Context(array_options=v1.options.ArrayOptions(saving=v1.options.ArrayOptions.Saving(use_zarr3=False))):
            v1.save(tmp_path / "3", state)
    with milepost.configured({"default": {"arrays": "piles", "arrays_options": {"zarr_format": 5}}}):
        milepost.PyTreeCheckpointer().save(tmp_path / "4", state)
        milepost.PyTreeCheckpointer(use_zarr3=True).save(tmp_path / "5", state)
    found = [records_of(tmp_path / str(at))["state"][0]["zarr_format"] for at in range(1, 6)]
    assert found == [3, 2, 2, 5, 3]


def test_how_arrays_are_to_be_divided_reaches_the_writer(piles, tmp_path):
    state = {"a": np.ones(4), "b": np.ones(2), "c": 1}
    save_args = {"a": milepost.SaveArgs(chunk_byte_size=16, shard_axes=(0,)), "b": None, "c": milepost.SaveArgs()}
    storing = v1.options.ArrayOptions.Saving(
        storage_options=v1.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=8)
    )
    with milepost.configured({"default": {"arrays": "piles"}}):
        with milepost.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "1", state, save_args=save_args)
        with v1.Context(array_options=v1.options.ArrayOptions(saving=storing)):
            v1.save(tmp_path / "2", state)
    assert records_of(tmp_path / "1")["state"][0]["wishes"] == {"a": [16, [0]], "b": [None, []]}
    assert records_of(tmp_path / "2")["state"][0]["wishes"] == {"a": [8, []], "b": [8, []]}


def test_parts_cannot_be_joined_where_the_format_has_files_besides_the_arrays(piles, tmp_path, monkeypatch):
    monkeypatch.setattr("milepost.v1._parts.installed", lambda: piles)
    with (
        milepost.configured({"default": {"arrays": "piles"}}),
        pytest.raises(errors.ConfigError, match="files of the array writer 'piles' cannot be joined"),
    ):
        v1.partial.save(tmp_path / "7", {"a": np.ones(2)})
