"""Checkpoints whose arrays are Zarr groups: saved and loaded by milepost, opened by everybody."""

from __future__ import annotations

import contextvars
import json
import subprocess
import sys
import uuid
import warnings

import jax
import jax.numpy as jnp
import milepost
import ml_dtypes
import numpy as np
import pytest
import xarray
import zarr
from milepost.engine.items import TreeItem
from milepost.engine.saving import Save, SaveRequest
from milepost.errors import ChecksumError, MissingDataError, StorageError
from milepost.testing.hosts import ThreadCluster


@pytest.fixture(autouse=True)
def with_zarr():
    with milepost.configured({"default": {"arrays": "zarr"}}):
        yield


@pytest.fixture(params=["file", "memory", "fsspec"])
def root(request, tmp_path):
    if request.param == "fsspec":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the weaker guarantee, told once
            yield f"local://{tmp_path}"
    else:
        yield str(tmp_path) if request.param == "file" else f"memory://zarr/{uuid.uuid4()}"


def shard(array, *spec, shape=(4, 2)):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("x", "y"))
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))


def state():
    return {
        "params": {
            "dense": {"kernel": np.arange(12, dtype="float32").reshape(3, 4), "bias": jnp.ones(4, jnp.bfloat16)}
        },
        "step": 7,
        "rate": 0.1,
        "infinite": float("inf"),
        "name": "run",
        "raw": b"123",
        "nothing": None,
        "empty": {},
        "half": np.float16(0.5),
        "list": [np.zeros((0, 3)), (np.array(2 + 1j), True)],
        "a/b": np.arange(3),
        "": np.arange(4),
        ".": np.arange(5),
        "..": {"..": np.arange(6)},
        "zarr.json": np.arange(7),
        "commit_success.txt": np.arange(8),
        "ü": np.array([True, False]),
        "long" * 100: np.arange(9),
        "key": jax.random.key(3),
        "text": "x" * 5000,
    }


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(left) is type(right)
        if isinstance(left, jax.Array) and jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = map(jax.random.key_data, (left, right))  # noqa: PLW2901
        assert np.asarray(left).dtype == np.asarray(right).dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_what_was_saved_is_what_comes_back(root):
    milepost.save(f"{root}/7", state())
    equal(state(), milepost.load(f"{root}/7"))
    equal(state(), milepost.load(f"{root}/7", state()))


@pytest.mark.parametrize("compression", ["zstd", "blosc"])
def test_compressed_checkpoints_come_back(tmp_path, compression):
    tree = {"zeros": np.zeros((512, 512)), "random": np.random.default_rng(0).standard_normal((200, 300))}
    options = {"compression": compression, "chunk_bytes": 1 << 14, "shard_bytes": 1 << 18}
    with milepost.configured({"default": {"arrays_options": options}}):
        milepost.save(tmp_path / "7", tree)
    equal(tree, milepost.load(tmp_path / "7"))
    group = zarr.open_group(tmp_path / "7" / "state", mode="r")
    assert group["zeros"].nbytes_stored() < 100_000
    np.testing.assert_array_equal(tree["random"], group["random"][...])


def test_arrays_are_open_to_zarr_and_small_values_are_attributes(tmp_path):
    milepost.save(tmp_path / "7", state())
    group = zarr.open_group(tmp_path / "7" / "state", mode="r")
    np.testing.assert_array_equal(state()["params"]["dense"]["kernel"], group["params/dense/kernel"][...])
    bias = group["params/dense/bias"]
    assert bias.attrs["milepost_dtype"] == "bfloat16"
    assert bias[...].view(ml_dtypes.bfloat16).tolist() == [1, 1, 1, 1]
    assert group["list/1/0"][...] == 2 + 1j
    expected = {"step": 7, "rate": 0.1, "infinite": "inf", "name": "run", "half": 0.5, "list/1/1": True}
    assert expected == dict(group.attrs)


def test_what_the_caller_noted_is_an_attribute(tmp_path):
    milepost.save(tmp_path / "7", {"w": np.ones(3), "step": 7}, custom_metadata={"git": "abc"})
    attributes = zarr.open_group(tmp_path / "7" / "state", mode="r").attrs
    assert dict(attributes) == {"step": 7, "milepost_custom_metadata": {"git": "abc"}}


def test_consolidated_metadata_are_those_of_the_parts(tmp_path):
    milepost.save(tmp_path / "7", state())
    root = tmp_path / "7" / "state"
    inside = json.loads((root / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
    there = {path.parent.relative_to(root).as_posix(): path for path in root.rglob("zarr.json")}
    assert there.keys() - {"."} == inside.keys()
    for path, document in inside.items():
        alone = json.loads(there[path].read_bytes())
        # Of groups that are not the root, releases of zarr-python say in different ways that they have none.
        assert not (document.pop("consolidated_metadata", None) or {}).get("metadata")
        assert alone.pop("consolidated_metadata", None) is None
        assert alone == document


def test_xarray_opens_a_checkpoint(tmp_path):
    tree = {"w": np.arange(6.0).reshape(2, 3), "b": np.arange(3), "step": 7, "deep": {"w": np.ones(5)}}
    milepost.save(tmp_path / "7", tree)
    with xarray.open_zarr(tmp_path / "7" / "state", consolidated=True) as found:
        np.testing.assert_array_equal(tree["w"], found["w"].to_numpy())
        assert found["w"].dims == ("w:0", "w:1")
        assert found.attrs == {"step": 7}
        assert found["b"].dtype == tree["b"].dtype
    with xarray.open_datatree(tmp_path / "7" / "state", engine="zarr") as found:
        np.testing.assert_array_equal(tree["deep"]["w"], found["deep/w"].to_numpy())


READER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("milepost", "milepost_zarr", "milepost_posix", "jax"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
import numpy as np
import xarray, zarr

try:
    import milepost
except ImportError:
    pass
else:
    raise SystemExit("milepost can be imported")
group = zarr.open_group(sys.argv[1], mode="r")
print(int(group["params/w"][...].sum()), group["params/w"].shards, group.attrs["step"])
with xarray.open_zarr(sys.argv[1]) as found:
    print(int(found["b"].sum()))
"""


def test_nobody_needs_milepost_to_read(tmp_path):
    tree = {"params": {"w": shard(jnp.ones((4096, 2048)), "x", "y")}, "b": np.arange(4), "step": 7}
    milepost.save(tmp_path / "7", tree)
    found = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "7" / "state"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert found.stdout.splitlines() == [f"{4096 * 2048} (1024, 1024) 7", "6"]


@pytest.mark.parametrize("spec", [("x", "y"), (("x", "y"),), (None, "x"), (("y", "x"), None), ()])
def test_sharded_arrays_load_under_another_mesh(root, spec):
    array = jnp.arange(256 * 96, dtype=jnp.float32).reshape(256, 96)
    with milepost.configured({"default": {"arrays_options": {"chunk_bytes": 512, "shard_bytes": 4096}}}):
        milepost.save(f"{root}/7", {"w": shard(array, *spec)})
    equal({"w": shard(array, *spec)}, milepost.load(f"{root}/7"))
    for other in (("y",), (None, ("x", "y")), ("x", "y")):
        target = {
            "w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shard(array, *other, shape=(2, 4)).sharding)
        }
        found = milepost.load(f"{root}/7", target)["w"]
        assert found.sharding == target["w"].sharding
        np.testing.assert_array_equal(np.asarray(array), np.asarray(found))


def test_many_hosts_save_one_group(tmp_path):
    tree = {
        "grid": shard(jnp.arange(4096.0).reshape(64, 64), "x", "y"),
        "rows": shard(jnp.arange(512.0).reshape(64, 8), ("x", "y")),
        "replicated": shard(jnp.ones((30, 7), jnp.bfloat16)),
        "numpy": np.arange(50.0),
        "step": 7,
    }
    settings = contextvars.copy_context()

    def act(host):
        def save():
            started = Save(SaveRequest(f"{tmp_path}/7", {"state": TreeItem(tree)}), hosts=host)
            started.prepare(lasting=False)()
            started.finish()

        return settings.copy().run(save)

    assert ThreadCluster(4).run(act) == [None] * 4
    equal(tree, milepost.load(tmp_path / "7"))
    group = zarr.open_group(tmp_path / "7" / "state", mode="r")
    np.testing.assert_array_equal(np.asarray(tree["grid"]), group["grid"][...])
    assert group.attrs["step"] == 7


def test_an_asynchronous_save_may_be_followed_by_changes(tmp_path):
    array = np.arange(1 << 20)
    with milepost.configured({"default": {"save_budget": "2MiB", "arrays_options": {"shard_bytes": 1 << 20}}}):
        response = milepost.v1.save_async(tmp_path / "7", {"w": array})
        array[:] = 0
        response.result()
    np.testing.assert_array_equal(np.arange(1 << 20), milepost.load(tmp_path / "7")["w"])


def test_the_manifest_knows_every_file(tmp_path):
    milepost.save(tmp_path / "7", state())
    files = {file["path"]: file for file in json.loads((tmp_path / "7" / "commit_success.txt").read_bytes())["files"]}
    there = {
        path.relative_to(tmp_path / "7").as_posix(): path.stat().st_size
        for path in (tmp_path / "7" / "state").rglob("*")
        if path.is_file()
    }
    assert there == {name: file["size"] for name, file in files.items()}
    assert all(file["checksum"] for file in files.values())


def test_damage_is_named(tmp_path):
    milepost.save(tmp_path / "7", {"params": {"w": np.arange(100.0)}})
    file = tmp_path / "7" / "state" / "params" / "w" / "c.0"
    data = file.read_bytes()
    file.write_bytes(b"\x01" + data[1:])
    with pytest.raises(ChecksumError, match="params/w"):
        milepost.load(tmp_path / "7")
    file.write_bytes(data[:-9])
    with pytest.raises(MissingDataError, match="params/w"):
        milepost.load(tmp_path / "7")
    file.unlink()
    with pytest.raises(MissingDataError, match="params/w"):
        milepost.load(tmp_path / "7")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("no")

    monkeypatch.setattr("milepost_posix.storage.PosixStorage.write", refuse)
    with pytest.raises(StorageError, match="no"):
        milepost.save(tmp_path / "7", state())
    assert not (tmp_path / "7").exists()


def test_a_manager_keeps_zarr_groups(tmp_path):
    with milepost.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=milepost.args.StandardSave({"w": np.arange(4)}))
        manager.wait_until_finished()
        assert manager.restore(3, args=milepost.args.StandardRestore())["w"].tolist() == [0, 1, 2, 3]
    assert zarr.open_group(tmp_path / "3" / "default", mode="r")["w"][...].tolist() == [0, 1, 2, 3]
