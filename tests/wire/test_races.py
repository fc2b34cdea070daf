"""Two writers of one name, and a writer and a sweep: one winner each time, and never a mixture."""

from __future__ import annotations

import pytest
from milepost.commit import CreateCommit
from milepost.errors import AbortedError, AlreadyExistsError
from milepost.routes import open_route, resolve
from milepost.testing.commit import dead_attempt, look, sweep, write
from milepost.testing.faults import CuttingStorage, interleave, orders
from wire.states import BUCKET, holding, leftovers

pytestmark = pytest.mark.wire

PAIRS = 100


def opened(place):
    return open_route(resolve(place.url("run/7"))).storage


def staged(storage, text):
    """Return what publishes an attempt that has written everything but its verdict: the steps that can collide."""
    strategy = CreateCommit()
    staging = strategy.stage(storage, "7", dead_attempt())
    manifest = write(storage, staging, text)

    def publish(mine):
        try:
            strategy.publish(mine, staging, manifest)
        except Exception:
            strategy.abandon(mine, staging)
            raise

    return publish


def steps_of(storage, act):
    counting = CuttingStorage(storage)
    act(counting)
    return counting.changes


def test_in_every_order_of_two_writers_one_wins(place):
    storage, strategy = opened(place), CreateCommit()
    steps = steps_of(storage, staged(storage, "alone"))
    assert steps >= 2
    winners = set()
    # The loser takes more steps than the winner, to remove its own.
    for order in orders(steps, steps):
        place.server.store.clear()
        acts = [staged(storage, text) for text in ("one", "two")]
        errors = interleave(storage, order, *acts)
        assert sorted(type(error) for error in errors if error) == [AlreadyExistsError]
        winner = "one" if errors[0] is None else "two"
        assert look(storage, strategy, "7") == winner
        assert [key for key in place.server.store.keys(BUCKET) if key.count("/begun")] != []
        assert list(strategy.leftovers(storage, older_than=-1.0)) == []
        winners.add(winner)
    assert winners == {"one", "two"}


def test_in_every_order_of_a_writer_and_a_sweep_the_checkpoint_is_whole_or_absent(place):
    storage, reaper = opened(place), CreateCommit()
    fates = set()
    for order in orders(3, 4):
        place.server.store.clear()
        publish = staged(storage, "one")
        error, failed = interleave(storage, order, publish, lambda mine: sweep(mine, reaper, older_than=-1.0))
        assert failed is None
        assert error is None or isinstance(error, AbortedError)
        assert look(storage, reaper, "7") == ("one" if error is None else None)
        fates.add(type(error))
    assert fates == {type(None), AbortedError}


def test_of_pairs_of_processes_that_save_one_name_one_wins(place, crew):
    winners = set()
    for _ in range(PAIRS // 2):
        place.server.store.clear()
        pids = [crew.hire("save", place.env, url=place.url("run/7"), label=label) for label in ("new", "other")]
        outcomes = crew.go(*pids)
        won = [label for label, one in zip(("new", "other"), outcomes, strict=True) if not one.error]
        assert len(won) == 1, [one.error for one in outcomes]
        (lost,) = [one for one in outcomes if one.error]
        assert "AlreadyExistsError" in lost.kinds
        assert [holding(place.server, "run/7")] == won
        assert leftovers(place.server, "run/7") == []
        winners |= {*won}
    assert winners
