"""Who wrote it, and does the writer still run: never taken for dead without proof."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost import attempts
from milepost.attempts import DAY, fate, new_attempt, parse_attempt, place


def made(*, started=None, where=None, pid=None):
    began = dt.datetime.now(dt.UTC) if started is None else dt.datetime.fromtimestamp(started, dt.UTC)
    return f"{began:%Y%m%dT%H%M%SZ}-{where or place()}-{os.getpid() if pid is None else pid:x}-0123456789ab"


def ended_pid():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_new_id_says_when_where_and_who():
    before = int(dt.datetime.now(dt.UTC).timestamp())
    known = parse_attempt(new_attempt())
    assert known is not None
    assert (known.place, known.pid) == (place(), os.getpid())
    assert before <= known.started <= dt.datetime.now(dt.UTC).timestamp()


def test_no_two_ids_are_the_same():
    assert len({new_attempt() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "text",
    ["", "7", "state", "20261399T000000Z-0badcafe-1f-0123456789ab", "20261122T160000Z-0badcafe-1f-0123456789a"]
    + ["20261122T160000Z-0badcafe-1f-0123456789ab" + end for end in ("x", "\n", " ", "/")]
    + ["x20261122T160000Z-0badcafe-1f-0123456789ab", "20261122T160000Z-0BADCAFE-1F-0123456789AB"],
    ids=repr,
)
def test_what_is_no_id_is_no_id_and_never_dead(text):
    assert parse_attempt(text) is None
    assert fate(text, older_than=0) == (False, "its name is not that of an attempt to save")


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader(text):
    assert fate(text)[0] is False


def test_this_process_is_alive():
    dead, reason = fate(new_attempt())
    assert not dead
    assert f"process {os.getpid()} is running" in reason


def test_a_process_of_somebody_else_is_alive():
    assert fate(made(pid=1))[0] is False


def test_a_process_that_is_gone_is_dead():
    dead, reason = fate(made(pid=ended_pid()))
    assert dead
    assert "is gone" in reason


def test_a_process_elsewhere_is_dead_only_when_it_is_old():
    now = dt.datetime.now(dt.UTC).timestamp()
    elsewhere = made(where="00000000", pid=ended_pid())
    assert fate(elsewhere)[0] is False
    assert fate(elsewhere, now=now + DAY - 60)[0] is False
    assert fate(elsewhere, now=now + DAY + 60)[0] is True
    assert fate(elsewhere, older_than=60, now=now + 120)[0] is True


def test_a_clock_that_went_back_makes_nobody_old():
    future = made(started=dt.datetime.now(dt.UTC).timestamp() + 10 * DAY, where="00000000")
    assert fate(future)[0] is False


@pytest.mark.parametrize("pid", [0, 0xFFFFFFF])
def test_numbers_no_process_can_have_break_nothing(pid):
    dead, _ = fate(made(pid=pid))
    assert isinstance(dead, bool)


def test_another_process_here_is_at_the_same_place():
    code = "from milepost import attempts; print(attempts.place(), attempts.new_attempt())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == place()
    assert fate(said[1])[0] is True


def test_everything_public_is_listed():
    assert all(hasattr(attempts, name) for name in attempts.__all__)
