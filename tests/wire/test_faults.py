"""Every kind of fault at every request of a save and of a load: success, or a clear error and nothing visible."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import milepost
import pytest
from milepost.engine.sweeping import sweep
from milepost.errors import MilepostError, OutcomeUnknownError, RequestError
from wire.conftest import settings
from wire.states import holding, label_of, leftovers, restore, snapshot, tree

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.wire

DEADLINE = 60.0
"""Seconds: far more than three tries of two seconds each, for every request that a fault may touch."""

PASSING: dict[str, dict[str, Any]] = {
    "500": {"do": "status", "status": 500},
    "503": {"do": "status", "status": 503, "code": "SlowDown"},
    "429": {"do": "status", "status": 429},
    "a reset before": {"do": "drop_before"},
    "a reset after": {"do": "drop_after"},
    "half a reply": {"do": "cut"},
}
"""Faults that come once: whoever asks again gets an answer."""

LASTING: dict[str, dict[str, Any]] = {
    "503 for ever": {"do": "status", "status": 503, "code": "SlowDown", "times": None},
    "403 for ever": {"do": "status", "status": 403, "code": "AccessDenied", "times": None},
    "resets for ever": {"do": "drop_before", "times": None},
    "lost replies for ever": {"do": "drop_after", "times": None},
}
"""Faults that do not go away until the call has ended."""


def save(place, label="new", **options):
    return lambda: milepost.save(place.url("run/7"), tree(label), **options)


def requests_of(place, act: Callable[[], object]) -> int:
    place.server.forget()
    act()
    return len(place.server.requests)


def fault(place, at: int, words: dict[str, Any]) -> None:
    place.server.clear_rules()
    words = dict(words)
    place.server.rule(words.pop("do"), nth=at, **words)


def attempted(act: Callable[[], object]) -> MilepostError | None:
    began = time.monotonic()
    try:
        act()
    except MilepostError as error:
        return error
    finally:
        assert time.monotonic() - began < DEADLINE
    return None


def prepared(place, *, old: bool) -> dict[str, bytes]:
    """Return what the store holds before each attempt: an older checkpoint, and perhaps one under the name itself."""
    milepost.save(place.url("run/5"), tree("older"))
    if old:
        milepost.save(place.url("run/7"), tree("old"))
    return snapshot(place.server)


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("old", [False, True], ids=["save", "overwrite"])
def test_a_save_outlives_one_fault_at_any_request(place, kind, old):
    before = prepared(place, old=old)
    count = requests_of(place, save(place, overwrite=old))
    assert count > 5
    for at in range(1, count + 1):
        restore(place.server, before)
        fault(place, at, PASSING[kind])
        error = attempted(save(place, overwrite=old))
        place.server.clear_rules()
        assert error is None, f"request {at} of {count}: {error}"
        assert holding(place.server, "run/7") == "new"
        assert holding(place.server, "run/5") == "older"
        assert leftovers(place.server, "run/5", "run/7") == []


@pytest.mark.parametrize("kind", LASTING)
@pytest.mark.parametrize("old", [False, True], ids=["save", "overwrite"])
def test_a_save_that_a_lasting_fault_ends_says_so_and_shows_nothing(place, kind, old, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", settings(timeout=20.0, retries=1))
    before = prepared(place, old=old)
    count = requests_of(place, save(place, overwrite=old))
    failed = 0
    for at in range(1, count + 1):
        restore(place.server, before)
        fault(place, at, LASTING[kind])
        error = attempted(save(place, overwrite=old))
        place.server.clear_rules()
        found, former = holding(place.server, "run/7"), "old" if old else None
        if error is None:
            assert found == "new"
        elif isinstance(error, OutcomeUnknownError):
            assert found in {former, "new"}
        else:
            failed += 1
            assert not isinstance(error, RequestError), f"request {at}: {error!r} blames the caller"
            assert found == former, f"request {at} of {count}: {error!r}"
        assert holding(place.server, "run/5") == "older"
    assert failed > 0


@pytest.mark.parametrize("kind", PASSING)
def test_a_load_outlives_one_fault_at_any_request(place, kind):
    prepared(place, old=True)
    count = requests_of(place, lambda: milepost.load(place.url("run/7")))
    for at in range(1, count + 1):
        fault(place, at, PASSING[kind])
        assert label_of(milepost.load(place.url("run/7"))) == "old", f"request {at} of {count}"


@pytest.mark.parametrize("kind", LASTING)
def test_a_load_that_a_lasting_fault_ends_says_so(place, kind, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", settings(timeout=20.0, retries=1))
    prepared(place, old=True)
    count = requests_of(place, lambda: milepost.load(place.url("run/7")))
    for at in range(1, count + 1):
        fault(place, at, LASTING[kind])
        with pytest.raises(MilepostError) as caught:
            milepost.load(place.url("run/7"))
        assert "run/7" in str(caught.value)


@pytest.mark.parametrize("act", ["save", "load"])
def test_a_server_that_never_answers_ends_in_an_error(place, act, monkeypatch):
    before = prepared(place, old=True)
    monkeypatch.setenv("MILEPOST_TOML", settings(timeout=0.5, retries=1))
    call = save(place, overwrite=True) if act == "save" else lambda: milepost.load(place.url("run/7"))
    count = requests_of(place, call)
    # The first request, one in the middle, the last: each takes as long as all the tries that are allowed.
    for at in {1, count // 2 + 1, count}:
        restore(place.server, before)
        rule = place.server.rule("stall", nth=at, times=None)
        error = attempted(call)
        assert rule.reached.is_set()
        rule.release()
        if error is not None:
            assert holding(place.server, "run/7") == "old"


def test_what_a_failed_save_could_not_remove_is_found_by_a_sweep(place):
    before = prepared(place, old=False)
    count = requests_of(place, save(place))
    restore(place.server, before)
    place.server.rule("status", status=503, nth=count - 1, times=None)
    assert attempted(save(place)) is not None
    place.server.clear_rules()
    assert leftovers(place.server, "run/5")
    sweep(f"{place.root}/run", older_than=-1.0)
    # What is sealed may yet be committed by a request on its way, and is spared for a day.
    sealed = [key for key in leftovers(place.server, "run/5") if key.endswith(".verdict")]
    assert len(sealed) in {0, 1}
    assert holding(place.server, "run/7") is None
    assert holding(place.server, "run/5") == "older"
