"""A process killed at any change of the disk, over all its threads, leaves the new checkpoint whole or absent."""

from __future__ import annotations

import pytest
from crash.counter import Plan
from crash.machine import survey

pytestmark = pytest.mark.gcc


@pytest.mark.parametrize(
    ("scenario", "before"),
    [("save", None), ("save_async", None), ("overwrite", "old")],
    ids=["new", "async", "overwrite"],
)
def test_killed_at_any_change_leaves_the_new_checkpoint_whole_or_absent(server, scenario, before, folder):
    points = [*survey(server.of("milepost"), scenario, folder, lambda n: Plan(end_at=n))]
    assert {before, "new"} == {point.label for point in points}
    assert any(point.left for point in points), "no death left anything behind, so that no sweep was tried"


def test_killed_at_any_change_of_an_overwrite_where_names_cannot_be_exchanged(server, folder):
    def plan(number: int) -> Plan:
        return Plan(end_at=number, refuse_flags=True)

    points = [*survey(server.of("milepost"), "overwrite", folder, plan)]
    assert {"old", "new"} == {point.label for point in points}


def test_killed_at_any_change_where_no_rename_can_refuse_to_replace(server, folder):
    def plan(number: int) -> Plan:
        return Plan(end_at=number, refuse_flags=True)

    points = [*survey(server.of("milepost"), "save", folder, plan)]
    assert {None, "new"} == {point.label for point in points}


def test_killed_while_refusing_a_name_that_is_taken_changes_nothing(server, folder):
    scenario = "save to a name that is taken"
    points = [*survey(server.of("milepost"), scenario, folder, lambda n: Plan(end_at=n))]
    assert {"old"} == {point.label for point in points}
    assert "AlreadyExistsError" in points[-1].outcome.kinds


def test_killed_at_any_change_of_cleaning_up_after_every_fourth_failure(server, folder):
    milepost = server.of("milepost")
    changes = milepost.run("save", folder.path / "counted", Plan()).counted
    for failed in range(1, changes, 4):

        def plan(number: int, failed: int = failed) -> Plan:
            return Plan(fail_at=failed, end_at=failed + number)

        assert [*survey(milepost, "save", folder, plan)]
