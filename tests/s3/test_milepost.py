"""Checkpoints on `s3://`, by the names that users know."""

from __future__ import annotations

import milepost
import ml_dtypes
import numpy as np
import pytest
from milepost import v1
from milepost.engine.deleting import delete
from milepost.errors import AlreadyExistsError, CheckpointNotFoundError

URL = "s3://bucket/run/7"


@pytest.fixture(params=["safetensors", "tensorstore", "zarr"])
def writer(request):
    with milepost.configured({"default": {"arrays": request.param}}):
        yield request.param


@pytest.fixture
def told(server, monkeypatch):
    """Tell the endpoint in the environment, as users do who have no other."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return server


def state(seed=0):
    random = np.random.default_rng(seed)
    return {
        "weights": random.standard_normal((300, 200), dtype=np.float32),
        "half": random.standard_normal(50).astype(ml_dtypes.bfloat16),
        "none": np.zeros((0, 4), np.int8),
        "step": seed,
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert np.asarray(each).dtype == np.asarray(other[name]).dtype
        assert np.asarray(each).tobytes() == np.asarray(other[name]).tobytes()


def test_what_was_saved_comes_back_and_is_replaced_and_deleted(told, writer):
    milepost.save(URL, state(0))
    assert_equal(state(0), milepost.load(URL))
    with pytest.raises(AlreadyExistsError):
        milepost.save(URL, state(1))
    milepost.save(URL, state(1), overwrite=True)
    assert_equal(state(1), milepost.load(URL))
    delete(URL)
    with pytest.raises(CheckpointNotFoundError):
        milepost.load(URL)
    assert told.store.keys("bucket") == []


def test_options_per_url_reach_every_array_writer(server, monkeypatch, writer):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    # Credentials in options are what TensorStore's own driver cannot be told.
    options = {
        "endpoint_url": server.url,
        "key": "id",
        "secret": "secret",
        "region": "eu-west-3",
        "part_bytes": 5 << 20,
    }
    with milepost.configured({"url": {"s3://bucket/run": {"storage_options": options}}}):
        milepost.save(URL, state(0))
        assert_equal(state(0), milepost.load(URL))
    assert {request.kind for request in server.requests} & {"bucket", "copy"} == set()
    assert all(key.startswith("run/7/") and not key.endswith("/") for key in server.store.keys("bucket"))


def test_tensorstore_uses_its_own_driver_by_the_same_endpoint(told):
    with milepost.configured({"default": {"arrays": "tensorstore"}}):
        milepost.save(URL, state(0))
    assert any("/d/" in key for key in told.store.keys("bucket"))
    assert {request.kind for request in told.requests} & {"bucket", "copy"} == set()


def test_a_second_client_that_has_listed_before_sees_what_the_first_one_saves(told, writer):
    with v1.training.Checkpointer("s3://bucket/run") as watching:
        assert watching.latest is None
        with v1.training.Checkpointer("s3://bucket/run") as saving:
            saving.save(3, state(3))
        watching.reload()
        assert watching.latest.step == 3
        assert_equal(state(3), watching.load())
