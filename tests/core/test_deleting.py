"""A deletion that was cut off is completed by the next one, and nothing else is taken for one."""

from __future__ import annotations

import milepost
import numpy as np
import pytest
from milepost import v1
from milepost.errors import CheckpointNotFoundError, InvalidLayoutError
from milepost.protocols import COMMIT_OBJECT
from milepost.routes import open_route, resolve
from milepost.testing.faults import CuttingStorage, PowerCut, keys

URL = "memory://deleting/7"


@pytest.fixture
def route():
    opened = open_route(resolve(URL))
    opened.storage.delete("")
    return opened


@pytest.mark.filterwarnings("ignore::milepost.errors.WeakGuaranteeWarning")
def test_a_deletion_that_was_cut_off_is_completed_by_the_next(route):
    milepost.save(URL, {"weights": np.arange(3)})
    with pytest.raises(PowerCut):
        route.commit.delete(CuttingStorage(route.storage, 2), "7")
    left = keys(route.storage)
    assert left
    assert f"7/{COMMIT_OBJECT}" not in left
    with pytest.raises(CheckpointNotFoundError, match="it was deleted before"):
        v1.delete(URL)
    assert keys(route.storage) == []


@pytest.mark.filterwarnings("ignore::milepost.errors.WeakGuaranteeWarning")
def test_what_is_no_checkpoint_was_never_deleted(route):
    route.storage.write("7/notes.txt", [b"mine"])
    with pytest.raises(InvalidLayoutError) as caught:
        v1.delete(URL)
    assert "deleted before" not in str(caught.value)
    assert keys(route.storage) == ["7/notes.txt"]
