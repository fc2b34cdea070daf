"""Checkpoints of Orbax's format on object stores: at the keys where Orbax looks, and by TensorStore's own drivers.

Orbax runs in a process of its own (`orbax_on_gs.py`), where all cases are tried. What is in a bucket is seen by the
server itself, and what goes through milepost's storage by the storage's own `write`.
"""

from __future__ import annotations

import ast
import contextvars
import functools
import json
import os
import pathlib
import subprocess
import sys

import milepost
import numpy as np
import pytest
from milepost import cli
from milepost.engine.items import TreeItem
from milepost.engine.saving import Save, SaveRequest
from milepost.errors import AlreadyExistsError, DamagedError, StorageError
from milepost.fixed import CLAIM
from milepost.protocols import COMMIT_OBJECT
from milepost.testing.hosts import ThreadCluster
from milepost.testing.objects import ObjectServer
from milepost_gcs import GcsStorage
from milepost_s3 import S3Storage
from milepost_tensorstore import places
from milepost_tensorstore.options import Settings
from typer.testing import CliRunner

HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "orbax_on_gs.py"
CASES = tuple(
    node.name.replace("_", " ")
    for node in ast.parse(PROGRAM.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "case" for one in node.decorator_list)
)
WAYS = (("driver", "ocdbt zarr2"), ("driver", "plain zarr3"), ("storage", "ocdbt zarr2"))
TREE = {"large": np.arange(200_000.0), "few": np.arange(3, dtype=np.int16), "step": 7}
FOREIGN = ("AWS_", "BOTO", "GOOGLE_", "GCSFS_", "STORAGE_", "TENSORSTORE_", "MILEPOST_")


def google(url):
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        # Orbax opens buckets through gcsfs, whose own default asks another service what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def amazon(url):
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


# --- Orbax -----------------------------------------------------------------------------------------------------------


@functools.cache
def answers():
    """Return what went wrong, by case and way: "" for nothing."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    with ObjectServer(buckets=("bucket",)) as server:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", PROGRAM],
            cwd=HERE,
            env=plain | google(server.url) | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-5000:]
    return {(case, how, words): wrong for case, how, words, wrong in map(json.loads, done.stdout.splitlines())}


def test_there_are_cases():
    assert len(CASES) > 5


@pytest.mark.parametrize(("how", "words"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_orbax_and_milepost_share_a_bucket(case, how, words):
    wrong = answers()[case, how, words]
    assert not wrong, wrong


# --- drivers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with ObjectServer(buckets=("bucket",)) as server:
        yield server


@pytest.fixture(params=["gs", "s3"])
def scheme(request, server, monkeypatch):
    server.clear_rules()
    server.store.clear()
    server.forget()
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    for name, value in (google if request.param == "gs" else amazon)(server.url).items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture
def written(monkeypatch):
    """Return the keys of what goes through the storage."""
    keys = []
    for storage in (GcsStorage, S3Storage):
        original = storage.write

        def write(self, key, buffers, original=original):
            keys.append(key)
            original(self, key, buffers)

        monkeypatch.setattr(storage, "write", write)
    return keys


@pytest.fixture(params=["fixed", "create"])
def commit(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["ocdbt", "plain"])
def saved(request, scheme, written, commit):
    """Save a tree; return its URL, and the server's name for its folder."""
    chosen = {"commit": commit, "arrays": "tensorstore", "arrays_options": {"ocdbt": request.param}}
    with milepost.configured({"default": chosen}):
        milepost.save(f"{scheme}://bucket/run/7", TREE)
        yield f"{scheme}://bucket/run/7"


def of_arrays(keys):
    return [key for key in keys if "/d/" in key or "manifest.ocdbt" in key or "large/" in key]


def assert_same(expected, found):
    assert set(expected) == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name])


def test_arrays_go_past_the_storage_and_are_found_by_it(saved, server, written):
    stored = server.store.keys("bucket", "run/7/")
    assert len(of_arrays(stored)) > 1
    assert of_arrays(written) == []
    assert len(written) > 2
    assert_same(TREE, milepost.load(saved))


def test_every_file_is_in_the_manifest_with_its_size(saved, server, commit):
    manifest = json.loads(server.store.get("bucket", f"run/7/{COMMIT_OBJECT}"))
    sizes = {f"run/7/{file['path']}": file["size"] for file in manifest["files"]}
    ours = (COMMIT_OBJECT, CLAIM, "begun", ".verdict")
    stored = [key for key in server.store.keys("bucket", "run/7/") if not (key.count("/") < 4 and key.endswith(ours))]
    assert {key: len(server.store.get("bucket", key)) for key in stored} == {key: sizes.get(key) for key in stored}
    assert set(sizes) == {*stored, *(key for key in sizes if key.endswith(COMMIT_OBJECT))}
    assert ("run/7/state/_METADATA" in sizes) == (commit == "fixed")


def test_the_command_line_verifies_it(saved):
    done = CliRunner().invoke(cli.app(), ["verify", saved])
    assert done.exit_code == 0, done.output


def test_what_a_late_request_damaged_is_noticed_on_reading(saved, server):
    (large,) = (key for key in server.store.keys("bucket", "run/7/") if len(server.store.get("bucket", key)) > 500_000)
    body = bytearray(server.store.get("bucket", large))
    body[300_000] ^= 1
    server.store.put("bucket", large, bytes(body))
    with pytest.raises(DamagedError):
        milepost.load(saved)
    assert CliRunner().invoke(cli.app(), ["verify", saved]).exit_code == 1


def test_deleting_leaves_nothing(saved, server):
    with milepost.CheckpointManager(saved.removesuffix("/7")) as manager:
        manager.delete(7)
    assert server.store.keys("bucket") == []


def test_a_driver_that_is_refused_fails_the_save_and_leaves_nothing(scheme, server, commit):
    server.rule("status", status=403, key=r"/d/|large", mutating=True, times=None)
    chosen = {"commit": commit, "arrays": "tensorstore", "storage_options": {"retries": 1}}
    with milepost.configured({"default": chosen}), pytest.raises(StorageError):
        milepost.save(f"{scheme}://bucket/run/7", TREE)
    assert server.store.keys("bucket") == []


def test_databases_of_several_hosts_become_one(scheme, server, commit):
    url = f"{scheme}://bucket/run/7"

    def save(host):
        saving = Save(SaveRequest(url, {"state": TreeItem(TREE)}), hosts=host)
        saving.prepare(lasting=False)()
        saving.finish()

    with milepost.configured({"default": {"commit": commit, "arrays": "tensorstore"}}):
        layers = contextvars.copy_context()
        assert ThreadCluster(3).run(lambda host: layers.copy().run(save, host)) == [None] * 3
        assert_same(TREE, milepost.load(url))
    assert len([key for key in server.store.keys("bucket") if key.endswith("manifest.ocdbt")]) > 1


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_tree_that_is_one_array_has_the_name_that_orbax_gives_it(scheme, commit, ocdbt):
    url, options = f"{scheme}://bucket/run/7", {"ocdbt": ocdbt}
    with milepost.configured({"default": {"commit": commit, "arrays": "tensorstore", "arrays_options": options}}):
        milepost.save(url, np.arange(5.0))
        np.testing.assert_array_equal(np.arange(5.0), milepost.load(url))
        assert CliRunner().invoke(cli.app(), ["verify", url]).exit_code == 0


@pytest.mark.parametrize("ocdbt", [True, False])
def test_what_no_driver_can_be_told_goes_through_the_storage(scheme, server, written, monkeypatch, ocdbt):
    url, chosen = f"{scheme}://bucket/run/7", {"commit": "fixed", "arrays": "tensorstore"}
    if scheme == "gs":
        monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL")
    else:
        chosen["storage_options"] = {"key": "id", "secret": "secret"}
    with milepost.configured({"default": chosen | {"arrays_options": {"ocdbt": ocdbt}}}):
        milepost.save(url, TREE)
        assert_same(TREE, milepost.load(url))
    stored = of_arrays(server.store.keys("bucket", "run/7/"))
    assert {key.removeprefix("run/") for key in stored} == {*of_arrays(written)}


def test_overwriting_at_fixed_keys_is_refused_and_the_old_one_stays(scheme):
    url = f"{scheme}://bucket/run/7"
    with milepost.configured({"default": {"commit": "fixed", "arrays": "tensorstore"}}):
        milepost.save(url, TREE)
        with pytest.raises(AlreadyExistsError, match="its keys are those of any other") as caught:
            milepost.save(url, {"new": 1}, overwrite=True)
        assert "delete that checkpoint first" in caught.value.__notes__[0]
        assert_same(TREE, milepost.load(url))


@pytest.mark.parametrize("scheme", ["s3"], indirect=True)
@pytest.mark.usefixtures("scheme")
def test_stores_of_one_database_lose_nothing_where_no_condition_protects_it(server):
    base = S3Storage("s3://bucket/run").kvstore("7/")
    assert base["use_conditional_write"] is False
    shared = places.context(Settings(), base)
    one, other = (places.database(base, "", Settings(), shared) for _ in range(2))
    one.write("first", b"1").result()
    server.rule("delay", method="PUT", key="manifest", times=None, seconds=0.1)
    for future in [(one, other)[number % 2].write(f"{number}", b"x" * 2000) for number in range(20)]:
        future.result()
    server.clear_rules()
    apart = places.database(base, "", Settings(), places.context(Settings(), base))
    assert {b"first", *(f"{number}".encode() for number in range(20))} == set(apart.list().result())
