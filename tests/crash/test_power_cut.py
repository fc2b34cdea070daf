"""The power is cut at any change on a real file system: what was saved is there, the new one whole or absent."""

from __future__ import annotations

import collections
import dataclasses

import pytest
from crash.counter import CUT, FLUSH_AND_CUT, LIE_ABOUT_FILES, LIE_ABOUT_FOLDERS, Plan
from crash.machine import Disk, Server, survey

pytestmark = [pytest.mark.gcc, pytest.mark.root]


@pytest.mark.parametrize("how", [CUT, FLUSH_AND_CUT], ids=["cut", "names written, then cut"])
@pytest.mark.parametrize(
    ("scenario", "before"),
    [("save", None), ("save_async", None), ("overwrite", "old")],
    ids=["new", "async", "overwrite"],
)
def test_power_cut_at_any_change_loses_nothing_that_was_saved(server, disk, scenario, before, how):
    points = [*survey(server.of("milepost"), scenario, disk, lambda n: Plan(end_at=n, end_how=how))]
    assert {before, "new"} == {point.label for point in points}
    assert points[-1].outcome.returned, "no cut came after the save had returned"


def survey_lied(server: Server, disk: Disk, plan: Plan) -> None:
    lied = survey(server.of("milepost"), "save", disk, lambda n: dataclasses.replace(plan, end_at=n))
    collections.deque(lied, maxlen=0)


@pytest.mark.parametrize("how", [CUT, FLUSH_AND_CUT], ids=["cut", "names written, then cut"])
def test_power_cut_shows_that_the_syncs_of_files_matter(server, disk, how):
    with pytest.raises(AssertionError, match=r"'2' (is committed and )?cannot be loaded"):
        survey_lied(server, disk, Plan(end_how=how, lie=LIE_ABOUT_FILES))


def test_power_cut_shows_that_the_syncs_of_folders_matter(server, disk):
    with pytest.raises(AssertionError, match="'2' holds None"):
        survey_lied(server, disk, Plan(end_how=CUT, lie=LIE_ABOUT_FOLDERS))
