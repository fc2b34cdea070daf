"""Savers with one thing wrong are caught by the very checks that milepost passes; the right sequence passes them."""

from __future__ import annotations

import pytest
from crash.counter import FLUSH_AND_CUT, Plan
from crash.machine import survey

pytestmark = pytest.mark.gcc


def kill(number: int) -> Plan:
    return Plan(end_at=number)


def fail(number: int) -> Plan:
    return Plan(fail_at=number)


def shorten(number: int) -> Plan:
    return Plan(short_at=number)


def cut(number: int) -> Plan:
    return Plan(end_at=number, end_how=FLUSH_AND_CUT)


@pytest.mark.parametrize(
    ("saver", "scenario", "plan", "found"),
    [
        ("marker first", "save", kill, "'2' is committed and cannot be loaded"),
        ("removed before renamed", "overwrite", kill, "'2' holds None, may hold"),
        ("short writes believed", "save", shorten, "'2' cannot be loaded"),
        ("errors swallowed", "save", fail, "'2' is committed and cannot be loaded"),
        ("sweeps too little", "save", kill, "the sweep did not remove"),
        ("sweeps too much", "save", kill, "after the sweep"),
    ],
)
def test_a_saver_with_one_thing_wrong_is_caught(server, saver, scenario, plan, found, folder):
    with pytest.raises(AssertionError, match=found):
        for _ in survey(server.of(saver), scenario, folder, plan):
            pass


@pytest.mark.root
@pytest.mark.parametrize(
    ("saver", "scenario", "found"),
    [
        ("marker first", "save", "'2' is committed and cannot be loaded"),
        ("removed before renamed", "overwrite", "'2' holds None, may hold"),
    ],
)
def test_a_saver_with_one_thing_wrong_is_caught_when_the_power_is_cut(server, disk, saver, scenario, found):
    with pytest.raises(AssertionError, match=found):
        for _ in survey(server.of(saver), scenario, disk, cut):
            pass


@pytest.mark.parametrize("scenario", ["save", "overwrite"])
@pytest.mark.parametrize("plan", [kill, shorten])
def test_the_right_sequence_passes(server, scenario, plan, folder):
    assert len([*survey(server.of("toy"), scenario, folder, plan)]) > 1


@pytest.mark.root
def test_the_right_sequence_passes_when_the_power_is_cut(server, disk):
    assert {None, "new"} == {point.label for point in survey(server.of("toy"), "save", disk, cut)}
