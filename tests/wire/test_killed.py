"""A writer killed by the store before or after any of its changes leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import signal

import milepost
import pytest
from wire.states import holding, label_of, leftovers, restore, snapshot, tree

pytestmark = pytest.mark.wire

MANY = 60
"""More changes than a small save may make."""


def prepared(place, *, old):
    milepost.save(place.url("run/5"), tree("older"))
    if old:
        milepost.save(place.url("run/7"), tree("old"))
    return snapshot(place.server)


def killed_at(place, crew, when, at, *, old):
    """Return whether the writer was killed, rather than done before its change of that number."""
    pid = crew.hire("save", place.env, url=place.url("run/7"), label="new", overwrite=old)
    rule = place.server.rule(f"kill_{when}", pid=pid, mutating=True, nth=at)
    (outcome,) = crew.go(pid)
    place.server.clear_rules()
    place.server.thaw()
    assert outcome.status == (-signal.SIGKILL if rule.reached.is_set() else 0), outcome.error
    assert outcome.error == ""
    return rule.reached.is_set()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("old", [False, True], ids=["save", "overwrite"])
def test_killed_at_any_change_leaves_old_or_new_and_a_sweep_the_same(place, crew, when, old):
    before, seen = prepared(place, old=old), []
    for at in range(1, MANY):
        restore(place.server, before)
        if not killed_at(place, crew, when, at, old=old):
            break
        found = holding(place.server, "run/7")
        assert found in {"old" if old else None, "new"}
        assert holding(place.server, "run/5") == "older"
        names = ["run/5"] if found is None else ["run/5", "run/7"]
        crew.do("sweep", place.env, url=f"{place.root}/run", older_than=-1.0)
        assert holding(place.server, "run/7") == found
        # What is sealed and not committed is spared for a day: a request may be on its way.
        sealed = {key.removesuffix(".verdict") for key in place.server.store.keys("bucket") if key.endswith(".verdict")}
        assert [key for key in leftovers(place.server, *names) if not key.startswith(tuple(sealed))] == []
        milepost.save(place.url("run/7"), tree("next"), overwrite=True)
        assert label_of(milepost.load(place.url("run/7"))) == "next"
        assert label_of(milepost.load(place.url("run/5"))) == "older"
        seen.append(found)
    assert len(seen) >= 5
    assert seen == sorted(seen, key=lambda label: label == "new"), "what was committed ceased to be"
    assert seen[-1] == "new" or when == "before"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deletion_that_is_killed_can_be_completed(place, crew, when):
    before = prepared(place, old=True)
    for at in range(1, MANY):
        restore(place.server, before)
        pid = crew.hire("delete", place.env, url=place.url("run/7"))
        rule = place.server.rule(f"kill_{when}", pid=pid, mutating=True, nth=at)
        crew.go(pid)
        place.server.clear_rules()
        place.server.thaw()
        if not rule.reached.is_set():
            break
        assert holding(place.server, "run/7") in {"old", None}
        crew.do("delete", place.env, url=place.url("run/7"))
        assert holding(place.server, "run/5") == "older"
        assert leftovers(place.server, "run/5") == []
    assert at > 2
