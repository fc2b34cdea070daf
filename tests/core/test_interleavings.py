from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
from milepost import attempts
from milepost.commit import CreateCommit
from milepost.errors import AbortedError, AlreadyExistsError
from milepost.memory import MemoryStorage
from milepost.testing.commit import dead_attempt, look, save, sweep, write
from milepost.testing.faults import CuttingStorage, Turnstile, emptied, interleave, orders
from milepost_posix.rename import RenameCommit

NOTHING_LIVES = -1.0


@pytest.fixture
def memory(request):
    storage = MemoryStorage(f"memory://tests/interleavings/{request.node.name}")
    yield storage
    emptied(storage)


@pytest.fixture(params=[CreateCommit, RenameCommit])
def strategy(request):
    return request.param()


def saver(strategy, text, *, overwrite=False):
    return lambda storage: save(storage, strategy, "7", text, overwrite=overwrite)


def prepared(storage, *, former=None, strategy=None):
    emptied(storage)
    if former is not None:
        save(storage, strategy, "7", former)


def changes(storage, act):
    counting = CuttingStorage(storage)
    act(counting)
    return counting.changes


def sampled(first, second, count):
    """Return so many of the orders of two actors' calls, of which there are too many to try them all.

    Each order has a bias of its own, so that now the one hurries ahead, now the other, now both go in step.
    """
    chance = random.Random(7)  # noqa: S311 - the same orders every time
    found = set()
    while len(found) < count:
        bias, left, order = chance.random(), [first, second], []
        while any(left):
            who = int(chance.random() < bias) if all(left) else int(not left[0])
            left[who] -= 1
            order.append(who)
        found.add(tuple(order))
    return sorted(found)


# --- two writers of one name -----------------------------------------------------------------------------------------


def assert_one_winner(storage, strategy, raised):
    winners = [text for text, error in zip(("first", "second"), raised, strict=True) if error is None]
    assert [look(storage, strategy, "7")] == winners
    assert [type(error) for error in raised if error is not None] == [AlreadyExistsError]


def test_of_two_saves_exactly_one_wins_in_every_order_of_their_changes(memory, strategy):
    acts = [saver(strategy, "first"), saver(strategy, "second")]
    each = changes(memory, acts[0])
    tried = 0
    for order in orders(each, each):
        prepared(memory)
        assert_one_winner(memory, strategy, interleave(memory, order, *acts))
        tried += 1
    assert tried == math.comb(2 * each, each) > 200


def test_of_two_saves_exactly_one_wins_in_many_orders_of_all_their_calls(memory, strategy):
    acts = [saver(strategy, "first"), saver(strategy, "second")]
    for order in sampled(12, 12, 250):
        prepared(memory)
        assert_one_winner(memory, strategy, interleave(memory, order, *acts, every_call=True))


def assert_either(storage, strategy, raised):
    assert raised == [None, None]
    found = look(storage, strategy, "7")
    assert found in ("first", "second")
    sweep(storage, strategy)
    assert look(storage, strategy, "7") == found
    save(storage, strategy, "7", "third", overwrite=True)
    assert look(storage, strategy, "7") == "third"


def test_of_two_overwrites_either_is_whole_in_every_order_of_their_commits(memory):
    strategy = CreateCommit()

    def published(staging, manifest, storage):
        strategy.publish(storage, staging, manifest, overwrite=True)

    def acts():
        prepared(memory, former="old", strategy=strategy)
        for text in ("first", "second"):
            staging = strategy.stage(memory, "7", dead_attempt())
            yield functools.partial(published, staging, write(memory, staging, text))

    each = 6  # seal, probe, retire the former, replace the commit object, remove the former: from here on anybody may
    tried = 0
    for order in orders(each, each):
        assert_either(memory, strategy, interleave(memory, order, *acts()))
        tried += 1
    assert tried == math.comb(12, 6)


def test_of_two_overwrites_either_is_whole_in_many_orders_of_all_their_calls(memory, strategy):
    acts = [saver(strategy, text, overwrite=True) for text in ("first", "second")]
    for order in sampled(20, 20, 250):
        prepared(memory, former="old", strategy=strategy)
        assert_either(memory, strategy, interleave(memory, order, *acts, every_call=True))


# --- a writer and a sweep that takes everybody for dead --------------------------------------------------------------


def living(strategy, staging):
    return lambda storage: strategy.publish(storage, staging, write(storage, staging, "alive"))


def sweeping(strategy):
    return lambda storage: sweep(storage, strategy, older_than=NOTHING_LIVES)


def swept(storage, strategy, *, every_call):
    """Run a save against a sweep in many orders; return how often either had its way."""
    counts = {"alive": 0, "aborted": 0}
    for order in sampled(9, 14, 250) if every_call else orders(5, 6):
        prepared(storage)
        staging = strategy.stage(storage, "7", attempts.new_attempt())
        write_error, sweep_error = interleave(
            storage, order, living(strategy, staging), sweeping(strategy), every_call=every_call
        )
        assert sweep_error is None
        assert write_error is None or isinstance(write_error, AbortedError), write_error
        found = look(storage, strategy, "7")
        assert found == ("alive" if write_error is None else None)
        counts["alive" if write_error is None else "aborted"] += 1
        sweep(storage, strategy, older_than=NOTHING_LIVES)
        assert look(storage, strategy, "7") == found
    return counts


@pytest.mark.parametrize("every_call", [False, True])
def test_a_sweep_never_corrupts_a_save_that_it_takes_for_dead(memory, strategy, every_call):
    counts = swept(memory, strategy, every_call=every_call)
    assert min(counts.values()) > 0, "the orders are such that both can happen"


class SweepsWithoutFence(CreateCommit):
    def clear(self, storage, leftover):
        storage.delete(leftover.prefix)
        return True


class SealsWithoutLooking(CreateCommit):
    def _seal(self, storage, staging):
        del storage, staging


@pytest.mark.parametrize("mistake", [SweepsWithoutFence, SealsWithoutLooking])
def test_a_sweep_or_a_writer_that_ignores_the_fence_is_caught(memory, mistake):
    with pytest.raises(AssertionError):
        swept(memory, mistake(), every_call=False)


class LooksBeforeItWrites(CreateCommit):
    """Create-only as fsspec and many emulators have it."""

    def _create(self, storage, key, body):
        folder, _, name = key.rpartition("/")
        if name in set(storage.children(f"{folder}/")):
            raise AlreadyExistsError(key)
        storage.write(key, [body])


def test_a_create_that_is_a_look_and_a_write_is_caught(memory):
    mistake = LooksBeforeItWrites()
    acts = [saver(mistake, "first"), saver(mistake, "second")]

    def race():
        for order in sampled(12, 12, 250):
            prepared(memory)
            assert_one_winner(memory, mistake, interleave(memory, order, *acts, every_call=True))

    with pytest.raises(AssertionError):
        race()


# --- the turnstile itself --------------------------------------------------------------------------------------------


def test_the_turnstile_lets_steps_happen_in_the_order_asked_for(memory):
    def act(name):
        return lambda storage: [storage.write(f"{name}{step}", [b""]) for step in range(3)]

    for order in orders(3, 3):
        emptied(memory)
        assert interleave(memory, order, act("a"), act("b")) == [None, None]
        steps = {who: itertools.count() for who in (0, 1)}
        expected = [f"{'ab'[who]}{next(steps[who])}" for who in order]
        assert sorted(expected, key=lambda key: int(memory.version(key))) == expected


def test_the_turnstile_goes_on_when_an_actor_has_finished_or_failed(memory):
    def failing(storage):
        storage.write("a", [b""])
        raise AlreadyExistsError("enough")

    raised = interleave(memory, (0, 0, 0, 1, 1), failing, lambda storage: storage.write("b", [b""]))
    assert [type(error) for error in raised] == [AlreadyExistsError, type(None)]
    assert sorted(memory.children("")) == ["a", "b"]


def test_an_order_with_too_few_steps_is_filled_up(memory):
    turnstile = Turnstile((), 1)
    turnstile.step(0)
    turnstile.leave(0)
    assert interleave(memory, (1,), *[lambda storage: storage.write("k", [b""])] * 2) == [None, None]
