"""Many hosts save one checkpoint: each box once, the work shared, and nobody goes on alone."""

from __future__ import annotations

import collections
import contextvars
import itertools
import json
import uuid

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import errors
from milepost.engine.items import TreeItem
from milepost.engine.saving import Save, SaveRequest
from milepost.hosts import OneHost
from milepost.memory import MemoryStorage
from milepost.plugins import Plugins
from milepost.protocols import Hosts
from milepost.testing.faults import WrappedStorage, keys
from milepost.testing.hosts import ThreadCluster
from safetensors import safe_open


def shard(array, *spec, shape=(4, 2)):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("x", "y"))
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))


def state(**more):
    return {
        "grid": shard(jnp.arange(4096.0).reshape(64, 64), "x", "y"),
        "rows": shard(jnp.arange(512.0).reshape(64, 8), ("x", "y")),
        "partly": shard(jnp.arange(1024.0).reshape(32, 32), "x"),
        "replicated": shard(jnp.arange(100.0)),
        "also replicated": shard(jnp.ones((30, 7), jnp.bfloat16)),
        "one": jax.device_put(jnp.arange(9), jax.devices()[3]),
        "numpy": np.arange(50.0),
        "step": 7,
        "scalar": np.float32(2.5),
        "key": jax.random.key(3),
    } | more


def save_on(cluster, url, tree_of=lambda host: state(), *, overwrite=False, plugins=None):
    """Save on every host; return what each returned or raised."""
    settings = contextvars.copy_context()

    def act(host):
        def save():
            request = SaveRequest(url, {"state": TreeItem(tree_of(host))}, overwrite=overwrite)
            started = Save(request, hosts=host, plugins=plugins)
            started.prepare(lasting=False)()
            return started.finish()

        return settings.copy().run(save)

    return cluster.run(act)


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        left, right = one[name], other[name]
        assert type(left) is type(right)
        if name == "key":
            left, right = map(jax.random.key_data, (left, right))
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def url_of(scheme, tmp_path):
    return f"memory://hosts/{uuid.uuid4()}/7" if scheme == "memory" else f"{tmp_path}/7"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("commit", ["rename", "create", "marker"])
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_what_many_hosts_save_is_loaded_as_one(tmp_path, scheme, commit, count):
    url = url_of(scheme, tmp_path)
    with milepost.configured({"default": {"commit": commit}}):
        saved = save_on(ThreadCluster(count), url)
        assert [type(one).__name__ for one in saved] == ["Manifest"] * count
        loaded = milepost.load(url)
    equal(state(), loaded)
    for name in ("grid", "rows", "partly", "replicated", "one"):
        assert loaded[name].sharding == state()[name].sharding


def entries(folder):
    """Yield `(host, array, box, bytes)` of every tensor, by the safetensors library and the format's documentation."""
    for file in sorted(folder.rglob("*.safetensors")):
        host = int(file.name.split("-")[1])
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if not name.startswith("__padding__"):
                    array, _, box = name.partition("@")
                    part = opened.get_slice(name)
                    size = {"F32": 4, "F64": 8, "BF16": 2, "I32": 4, "U32": 4, "U8": 1}[part.get_dtype()]
                    yield host, array, box, int(np.prod(part.get_shape(), dtype=int)) * size


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_box_is_written_once_and_the_bytes_are_shared(tmp_path, count):
    save_on(ThreadCluster(count), tmp_path / "7")
    found = list(entries(tmp_path / "7"))
    boxes = [(array, box) for _, array, box, _ in found]
    assert len(set(boxes)) == len(boxes)
    sizes = collections.Counter()
    for _, array, _, size in found:
        sizes[array] += size
    expected = {
        name: (jax.random.key_data(leaf) if name == "key" else leaf).nbytes
        for name, leaf in state().items()
        if hasattr(leaf, "nbytes") and name != "scalar"
    }
    assert sizes == expected
    shares = collections.Counter()
    for host, _, _, size in found:
        shares[host] += size
    assert len(shares) == count
    assert max(shares.values()) <= 1.3 * sum(shares.values()) / count + 512


def test_replicated_arrays_are_spread_over_the_hosts(tmp_path):
    tree = {f"w{number}": shard(jnp.full(1000, float(number))) for number in range(8)}
    save_on(ThreadCluster(4), tmp_path / "7", lambda host: tree)
    assert collections.Counter(host for host, *_ in entries(tmp_path / "7")) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_the_manifest_lists_the_files_of_every_host(tmp_path):
    save_on(ThreadCluster(3), tmp_path / "7")
    document = json.loads((tmp_path / "7" / "commit_success.txt").read_bytes())
    on_disk = {str(file.relative_to(tmp_path / "7")) for file in (tmp_path / "7").rglob("*.safetensors")}
    assert {file["path"] for file in document["files"]} == on_disk
    assert len(document["items"]["state"]["records"]) == document["written_by"]["hosts"] == 3


def test_hosts_overwrite_together(tmp_path):
    cluster = ThreadCluster(2)
    save_on(cluster, tmp_path / "7")
    save_on(cluster, tmp_path / "7", lambda host: state(step=8), overwrite=True)
    assert milepost.load(tmp_path / "7")["step"] == 8


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_leaf_that_one_host_cannot_save_is_refused_on_all(tmp_path):
    saved = save_on(ThreadCluster(3), tmp_path / "7", lambda host: state(bad=object() if host.index == 2 else 1))
    assert [type(error) for error in saved] == [errors.UnsupportedLeafError] * 3
    assert all("['bad']" in str(error) for error in saved)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_is_refused_on_all(tmp_path):
    milepost.save(tmp_path / "7", {"a": 1})
    assert [type(error) for error in save_on(ThreadCluster(2), tmp_path / "7")] == [errors.AlreadyExistsError] * 2
    assert milepost.load(tmp_path / "7") == {"a": 1}


class FailingHost(WrappedStorage):
    def __init__(self, storage, host):
        super().__init__(storage)
        self.host = host

    def write(self, key, buffers):
        if f"arrays-{self.host:05d}" in key:
            raise errors.StorageFullError(28, "no room on this host")
        super().write(key, buffers)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_a_storage_that_fails_on_one_host_fails_all_and_leaves_nothing(monkeypatch, failing, before):
    root = f"memory://hosts/{uuid.uuid4()}"
    if before:
        save_on(ThreadCluster(3), f"{root}/7", lambda host: state(step=1))
    there = keys(MemoryStorage(root))
    plugins = Plugins(())
    opened = plugins.open_storage
    monkeypatch.setattr(plugins, "open_storage", lambda *how: FailingHost(opened(*how), failing))
    saved = save_on(ThreadCluster(3), f"{root}/7", overwrite=True, plugins=plugins)
    assert [type(error) for error in saved] == [errors.StorageFullError] * 3
    assert keys(MemoryStorage(root)) == there
    if before:
        assert milepost.load(f"{root}/7")["step"] == 1
    else:
        with pytest.raises(errors.CheckpointNotFoundError):
            milepost.load(f"{root}/7")


def test_a_host_that_does_not_come_ends_in_an_error_that_names_the_phase(tmp_path):
    def act(host):
        if host.index == 1:
            return None  # it has died
        started = Save(SaveRequest(tmp_path / "7", {"state": TreeItem(state())}), hosts=host)
        return started.prepare(lasting=False)

    first, second, third = ThreadCluster(3, deadline=0.5).run(act)
    assert second is None
    for error in (first, third):
        assert isinstance(error, errors.DeadlineError)
        assert isinstance(error, TimeoutError)
        assert "'prepare'" in str(error)
    assert list(tmp_path.iterdir()) == []


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_both_kinds_of_hosts_hold_the_protocol():
    assert isinstance(OneHost(), Hosts)
    assert ThreadCluster(2).run(lambda host: isinstance(host, Hosts)) == [True, True]


def test_one_decides_and_all_learn():
    numbers = itertools.count()
    assert ThreadCluster(4).run(lambda host: host.decide("count", lambda: next(numbers))) == [0] * 4
    assert next(numbers) == 1


def test_all_act_and_all_learn():
    assert ThreadCluster(3).run(lambda host: host.together("who", lambda: host.index)) == [[0, 1, 2]] * 3


def test_what_one_host_raises_is_raised_on_all():
    def act(host):
        return host.together("work", lambda: 1 // (host.index - 1))

    assert [type(error) for error in ThreadCluster(3).run(act)] == [ZeroDivisionError] * 3


def test_one_host_decides_for_itself():
    host = OneHost()
    assert (host.index, host.count, host.owner(jax.devices()[5])) == (0, 1, 0)
    assert host.decide("x", lambda: 5) == 5
    assert host.together("x", lambda: 5) == [5]
    with pytest.raises(ZeroDivisionError):
        host.decide("x", lambda: 1 // 0)
