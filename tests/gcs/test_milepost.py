from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from typing import TYPE_CHECKING

import milepost
import numpy as np
import pytest
from milepost.engine.deleting import delete
from milepost.errors import AlreadyExistsError, CheckpointNotFoundError
from milepost.testing.faults import keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.testing.objects import ObjectServer

URL = "gs://bucket/runs/7"
OURS = {"get", "head", "list", "put", "start_resumable", "resumable_part", "delete", "delete_many", "delete_each"}


@pytest.fixture(params=["safetensors", "tensorstore", "zarr"])
def writer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the array writer that saves take."""
    with milepost.configured({"default": {"arrays": request.param}}):
        yield request.param


@pytest.fixture(autouse=True)
def _here(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)


def tree(seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((300, 200)).astype("f4"), "b": rng.integers(0, 9, 5), "step": seed, "name": "x"}


def same(expected: dict[str, object], actual: dict[str, object]) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, actual[name])


def test_what_was_saved_is_loaded_and_no_bucket_is_asked(server: ObjectServer, writer: str) -> None:
    milepost.save(URL, tree(1))
    same(tree(1), milepost.load(URL))
    assert {request.kind for request in server.requests} <= OURS
    assert server.store.uploads("bucket") == []


def test_an_array_of_many_parts_comes_back(server: ObjectServer, writer: str) -> None:
    options = {"part_bytes": 1 << 20}
    big = {"w": np.arange(1 << 20, dtype="i4")}
    with milepost.configured({"default": {"arrays": writer}, "url": {"gs://bucket": {"storage_options": options}}}):
        milepost.save(URL, big)
        same(big, milepost.load(URL))
    assert max(request.bytes_in for request in server.requests) < (1 << 20) + 1000


def test_overwriting_replaces_and_deleting_leaves_nothing(server: ObjectServer, writer: str) -> None:
    milepost.save(URL, tree(1))
    with pytest.raises(AlreadyExistsError):
        milepost.save(URL, tree(2))
    same(tree(1), milepost.load(URL))
    milepost.save(URL, tree(2), overwrite=True)
    same(tree(2), milepost.load(URL))
    delete(URL)
    with pytest.raises(CheckpointNotFoundError):
        milepost.load(URL)
    assert server.store.keys("bucket") == []


def test_tensorstore_goes_there_itself_where_it_can(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    with milepost.configured({"default": {"arrays": "tensorstore"}}):
        milepost.save(URL, tree(1))
    same(tree(1), milepost.load(URL))
    ours = {request.query.get("uploadType") for request in server.requests if request.kind == "put"}
    assert ours == {"multipart", "media"}, "milepost-gcs sends the first, TensorStore the second"


_LOAD = "import milepost, sys; print(int(milepost.load(sys.argv[1])['step']))"


def test_another_process_sees_it_at_once(server: ObjectServer) -> None:
    milepost.save(URL, tree(5))
    assert keys(milepost_storage()) == sorted(key.removeprefix("runs/") for key in server.store.keys("bucket"))
    done = subprocess.run([sys.executable, "-c", _LOAD, URL], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "5"


def milepost_storage():
    from milepost_gcs import GcsStorage

    return GcsStorage("gs://bucket/runs")


def test_of_many_writers_one_wins_and_its_bytes_are_whole(server: ObjectServer) -> None:
    def act(who: int) -> int | None:
        try:
            milepost.save(URL, tree(who))
        except AlreadyExistsError:
            return None
        return who

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        (winner,) = [who for who in pool.map(act, range(4)) if who is not None]
    same(tree(winner), milepost.load(URL))


def test_a_save_that_meets_a_server_that_is_never_well_says_so(server: ObjectServer) -> None:
    options = {"retries": 0, "timeout": 5.0}
    server.rule("status", status=503, kind="put", nth=3, times=None)
    with (
        milepost.configured({"url": {"gs://bucket": {"storage_options": options}}}),
        pytest.raises(milepost.errors.StorageError, match="503"),
    ):
        milepost.save(URL, tree(1))
    with pytest.raises(CheckpointNotFoundError):
        milepost.load(URL)
