"""A storage that refuses or shortens any change of a save gives a clear error, and harms nothing."""

from __future__ import annotations

import errno

import pytest
from crash.counter import Plan
from crash.machine import survey

pytestmark = pytest.mark.gcc


@pytest.mark.parametrize("scenario", ["save", "overwrite"])
def test_a_disk_full_from_any_change_on_is_told_and_no_room_stays_taken(server, scenario, folder):
    points = [*survey(server.of("milepost"), scenario, folder, lambda n: Plan(fail_at=n, fail_from=True))]
    failed = [point for point in points if not point.outcome.returned]
    assert failed
    for point in failed:
        assert {"StorageFullError", "OutcomeUnknownError"} & {*point.outcome.kinds}, point
        assert not point.left, point


@pytest.mark.parametrize(
    ("scenario", "code"), [("save", errno.EIO), ("save_async", errno.ENOSPC), ("overwrite", errno.EIO)]
)
def test_any_one_change_that_fails_is_told_or_does_no_harm(server, scenario, code, folder):
    points = [*survey(server.of("milepost"), scenario, folder, lambda n: Plan(fail_at=n, fail_errno=code))]
    assert {True, False} == {point.outcome.returned for point in points}
    errors = [point.outcome for point in points if not point.outcome.returned]
    assert all("MilepostError" in error.kinds for error in errors), errors


def test_any_write_that_stores_half_is_continued(server, folder):
    points = [*survey(server.of("milepost"), "save", folder, lambda n: Plan(short_at=n))]
    assert {"new"} == {point.label for point in points}
