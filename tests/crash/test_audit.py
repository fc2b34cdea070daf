"""Nothing becomes visible, and no save returns, before everything it rests on is synced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from crash import audit, counter

if TYPE_CHECKING:
    from pathlib import Path

    from crash.machine import Server

pytestmark = pytest.mark.gcc

SCENARIOS = ["save", "save_async", "overwrite", "save where no folder is"]


def log_of(server: Server, scenario: str, folder: Path) -> list[audit.Change]:
    log = folder / "log"
    assert server.run(scenario, folder / "root", counter.Plan(log=str(log))).returned
    return [*audit.changes(log.read_text())]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_everything_is_synced_before_it_is_visible_and_before_the_save_returns(server, scenario, tmp_path):
    log = log_of(server.of("milepost"), scenario, tmp_path)
    assert audit.owing(log) == []
    assert {change.path.name for change in log} >= {"commit_success.txt"}
    assert [change for change in log if change.to], "the counter did not see how the checkpoint was published"


def test_a_right_sequence_owes_nothing(server, tmp_path):
    assert audit.owing(log_of(server.of("toy"), "save", tmp_path)) == []


def test_a_folder_that_is_not_synced_is_noticed_though_ext4_forgives_it(server, tmp_path):
    (owed,) = audit.owing(log_of(server.of("folder not synced"), "save", tmp_path))
    assert "was not synced before it was renamed" in owed
