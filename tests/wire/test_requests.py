"""How many requests a save and a load take: as many as their bytes need, and never one for each leaf."""

from __future__ import annotations

import math

import milepost
import numpy as np
import pytest

pytestmark = pytest.mark.wire

PART = 16 << 20
STATES = {
    "1,000 leaves of 256 KiB": (1000, 256 << 10),
    "20,000 leaves of 256 B": (20_000, 256),
}


def tree_of(leaves, size):
    data = np.random.default_rng(0).integers(0, 256, (leaves, size), dtype=np.uint8)
    return {f"leaf {number}": data[number] for number in range(leaves)}


@pytest.fixture
def patient(place, monkeypatch):
    """Return the place with the options that users have when they give none."""
    monkeypatch.setenv("MILEPOST_TOML", "default.threads = 2\n")
    return place


@pytest.mark.parametrize("name", STATES)
def test_requests_grow_with_bytes_and_not_with_leaves(patient, name):
    leaves, size = STATES[name]
    state = tree_of(leaves, size)
    patient.server.forget()
    milepost.save(patient.url("run/7"), state)
    kinds = [each.kind for each in patient.server.requests]
    assert len(kinds) <= math.ceil(leaves * size / PART) + 8, kinds
    patient.server.forget()
    loaded = milepost.load(patient.url("run/7"))
    assert len(patient.server.requests) <= 2 * (leaves * size // PART) + 8
    assert all(np.array_equal(loaded[key], state[key]) for key in state)


def test_nobody_asks_about_the_bucket_and_nothing_is_copied(place):
    milepost.save(place.url("run/7"), tree_of(3, 100))
    milepost.save(place.url("run/7"), tree_of(3, 200), overwrite=True)
    milepost.load(place.url("run/7"))
    assert {each.kind for each in place.server.requests} & {"bucket", "copy"} == set()
    assert [key for key in place.server.store.keys("bucket") if key.endswith("/")] == []


def test_metadata_alone_take_one_request(place):
    milepost.save(place.url("run/7"), tree_of(3, 100))
    place.server.forget()
    milepost.v1.metadata(place.url("run/7"))
    assert len(place.server.requests) == 1
