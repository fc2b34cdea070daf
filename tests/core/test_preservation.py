from __future__ import annotations

import dataclasses
import datetime as dt
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost.errors import ConfigError
from milepost.preservation import (
    AnyPreservationPolicy,
    BestN,
    CustomSteps,
    EveryNSeconds,
    EveryNSteps,
    EveryNStepsClosest,
    LatestDuration,
    LatestN,
    PreservationContext,
    PreservationPolicy,
    PreserveAll,
    preservation_from_options,
    to_delete,
)


def without_addresses(value):
    """Return a text that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
CONTEXT = PreservationContext(now=NOON)


@dataclasses.dataclass(frozen=True)
class Info:
    step: int
    time: dt.datetime = NOON
    metrics: object = None


class Lazy:
    """A checkpoint of which reading anything but what is offered is an error."""

    def __init__(self, **offered):
        self.offered = offered

    def __getattr__(self, name):
        if name not in self.offered:
            raise AssertionError(f"{name} was read")
        return self.offered[name]


class Odd:
    """A policy from elsewhere: nothing but the method."""

    def should_preserve(self, checkpoints, *, context):
        return [info.step % 2 == 1 for info in checkpoints]


def infos(*steps):
    return [Info(step, NOON - dt.timedelta(seconds=100 - step)) for step in steps]


def measured(*losses):
    return [Info(step, metrics=None if loss is None else {"loss": loss}) for step, loss in enumerate(losses)]


def best(n, **options):
    return BestN(get_metric_fn=lambda metrics: metrics["loss"], n=n, **options)


def kept(policy, checkpoints, context=CONTEXT):
    return [
        info.step
        for info, keep in zip(checkpoints, policy.should_preserve(checkpoints, context=context), strict=True)
        if keep
    ]


EVERY_POLICY = [
    PreserveAll(),
    LatestN(2),
    EveryNSeconds(5),
    EveryNSteps(5),
    EveryNSteps(5, exact_interval=False),
    EveryNStepsClosest(5),
    CustomSteps([3]),
    best(2),
    LatestDuration(dt.timedelta(seconds=10)),
    LatestN(1) | CustomSteps([3]),
]


# --- what each policy keeps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=without_addresses)
def test_no_checkpoints_give_no_answers(policy):
    assert list(policy.should_preserve([], context=CONTEXT)) == []


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=without_addresses)
def test_each_policy_is_a_policy(policy):
    assert isinstance(policy, PreservationPolicy)


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=without_addresses)
def test_a_policy_cannot_be_changed(policy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.n = 7


def test_the_latest_n_are_kept():
    assert kept(LatestN(2), infos(1, 2, 3, 4)) == [3, 4]


def test_everything_is_latest_without_a_number():
    assert kept(LatestN(), infos(1, 2, 3)) == [1, 2, 3]


def test_the_latest_none_are_none():
    assert kept(LatestN(0), infos(1, 2, 3)) == []


def test_seconds_count_from_the_last_checkpoint_kept():
    assert kept(EveryNSeconds(10), infos(1, 6, 11, 15, 25)) == [1, 11, 25]


def test_multiples_are_kept():
    assert kept(EveryNSteps(10), infos(0, 5, 10, 15, 20)) == [0, 10, 20]


def test_the_latest_multiples_are_kept():
    assert kept(EveryNSteps(10, max_to_keep=2), infos(0, 10, 15, 20)) == [10, 20]


def test_steps_that_miss_the_multiples_are_kept_by_distance():
    assert kept(EveryNSteps(10, exact_interval=False), infos(1, 8, 12, 21, 23)) == [1, 12, 23]


def test_the_closest_to_each_multiple_and_the_last_are_kept():
    assert kept(EveryNStepsClosest(10), infos(1, 8, 11, 19, 22, 23)) == [1, 11, 19, 23]


def test_the_later_of_two_equally_close_is_kept():
    assert kept(EveryNStepsClosest(10), infos(9, 11, 30)) == [11, 30]


def test_the_closest_step_is_told_exactly_where_floats_are_too_coarse():
    far = 10**17
    assert kept(EveryNStepsClosest(10), [Info(far + 4), Info(far + 8), Info(far + 9)]) == [far + 4, far + 9]


def test_the_named_steps_are_kept():
    assert kept(CustomSteps([7, 3]), infos(3, 4, 7)) == [3, 7]


def test_steps_may_come_from_a_generator():
    policy = CustomSteps(step for step in [3, 7])
    assert [kept(policy, infos(3, 4, 7)) for _ in range(2)] == [[3, 7], [3, 7]]


def test_steps_cannot_be_changed_by_who_gave_them():
    steps = [3]
    policy = CustomSteps(steps)
    steps.clear()
    assert kept(policy, infos(3, 4)) == [3]


def test_a_range_of_steps_is_not_counted_out():
    assert kept(CustomSteps(range(0, 10**15, 4)), [Info(3), Info(4), Info(10**12)]) == [4, 10**12]


def test_the_young_are_kept_and_all_after_them():
    ages = [200, 50, 150, 1]
    checkpoints = [Info(step, NOON - dt.timedelta(seconds=age)) for step, age in enumerate(ages)]
    assert kept(LatestDuration(dt.timedelta(seconds=100)), checkpoints) == [1, 2, 3]


def test_just_as_old_as_the_duration_is_young_enough():
    assert kept(LatestDuration(dt.timedelta(seconds=50)), infos(49, 50, 51)) == [50, 51]


def test_a_duration_counts_from_the_wall_clock_unless_told_the_time():
    checkpoints = [Info(1, dt.datetime.now(dt.UTC) - dt.timedelta(hours=2)), Info(2, dt.datetime.now(dt.UTC))]
    assert kept(LatestDuration(dt.timedelta(hours=1)), checkpoints, PreservationContext()) == [2]


def test_the_best_are_kept():
    assert kept(best(2), measured(5, 9, 7, 1)) == [1, 2]


def test_the_lowest_are_best_in_reverse():
    assert kept(best(2, reverse=True), measured(5, 9, 7, 1)) == [0, 3]


@pytest.mark.parametrize("reverse", [False, True])
def test_of_equal_values_the_later_is_better(reverse):
    assert kept(best(1, reverse=reverse), measured(5, 5, 5)) == [2]


def test_without_metrics_all_are_kept_beside_the_best():
    assert kept(best(1), measured(5, None, 9, None)) == [1, 2, 3]


def test_without_metrics_none_is_kept_where_that_is_asked():
    assert kept(best(1, keep_checkpoints_without_metrics=False), measured(5, None, 9, None)) == [2]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("losses", [(math.nan, 5.0, 9.0), (5.0, math.nan, 9.0), (5.0, 9.0, math.nan)])
def test_a_nan_is_never_best(reverse, losses):
    assert math.isnan(losses[kept(best(1, reverse=reverse), measured(*losses))[0]]) is False
    assert sorted(losses[index] for index in kept(best(2, reverse=reverse), measured(*losses))) == [5.0, 9.0]


def test_a_nan_fills_a_place_that_no_number_takes():
    assert kept(best(2), measured(math.nan, 5.0, math.nan)) == [1, 2]


def test_empty_metrics_are_metrics():
    policy = BestN(get_metric_fn=len, n=1, keep_checkpoints_without_metrics=False)
    assert kept(policy, [Info(1, metrics={}), Info(2)]) == [1]


# --- what each policy reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "offered"),
    [
        (PreserveAll(), ()),
        (LatestN(1), ()),
        (best(None), ()),
        (best(0), ()),
        (best(2), ()),
        (best(1), ("metrics",)),
        (CustomSteps([1]), ("step",)),
        (EveryNSteps(2), ("step",)),
        (EveryNSteps(2, exact_interval=False, max_to_keep=1), ("step",)),
        (EveryNStepsClosest(2), ("step",)),
        (EveryNSeconds(2), ("time",)),
        (LatestDuration(dt.timedelta(1)), ("time",)),
    ],
    ids=without_addresses,
)
def test_a_policy_reads_nothing_but_what_it_needs(policy, offered):
    whole = {"step": 1, "time": NOON, "metrics": {"loss": 1.0}}
    checkpoints = [Lazy(**{name: whole[name] for name in offered}) for _ in range(2)]
    assert len(policy.should_preserve(checkpoints, context=CONTEXT)) == 2


def test_what_is_deleted_is_told_without_reading_times_or_metrics():
    checkpoints = [Lazy(step=step) for step in (1, 2, 3)]
    assert to_delete(checkpoints, LatestN(1), context=CONTEXT) == checkpoints[:2]


# --- joining ---------------------------------------------------------------------------------------------------------


def test_joined_policies_keep_what_any_keeps():
    assert kept(LatestN(1) | CustomSteps([1]) | EveryNSteps(5), infos(1, 2, 5, 7, 8)) == [1, 5, 8]


def test_joining_is_flat():
    one, two, three, four = LatestN(1), LatestN(2), LatestN(3), LatestN(4)
    assert ((one | two) | (three | four)).policies == (one, two, three, four)


def test_a_policy_of_ones_own_joins_on_either_side():
    odd = Odd()
    assert (LatestN(1) | odd).policies == (LatestN(1), odd)
    assert (odd | LatestN(1)).policies == (odd, LatestN(1))
    assert kept(odd | LatestN(1), infos(1, 2, 3, 4)) == [1, 3, 4]


def test_a_subclass_of_the_union_stays_whole():
    class Ours(AnyPreservationPolicy):
        def should_preserve(self, checkpoints, *, context):
            return [False] * len(checkpoints)

    ours = Ours([LatestN(9)])
    assert (ours | LatestN(1)).policies == (ours, LatestN(1))


@pytest.mark.parametrize("other", [3, None, LatestN, "LatestN"])
def test_what_is_no_policy_does_not_join(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        LatestN(1) | other
    with pytest.raises(TypeError, match="unsupported operand"):
        other | LatestN(1)


def test_a_policy_that_answers_too_little_is_refused():
    class Short:
        def should_preserve(self, checkpoints, *, context):
            return [True]

    with pytest.raises(ConfigError, match="1 answers for 3"):
        kept(LatestN(1) | Short(), infos(1, 2, 3))
    with pytest.raises(ConfigError, match="1 answers for 3"):
        to_delete(infos(1, 2, 3), Short(), context=CONTEXT)


def test_a_union_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="no policy"):
        AnyPreservationPolicy([])


# --- deleting --------------------------------------------------------------------------------------------------------


def test_what_is_not_kept_is_deleted_oldest_first():
    assert to_delete(infos(1, 2, 3, 4), LatestN(2), context=CONTEXT) == infos(1, 2)


def test_the_newest_stays_whatever_the_policy_says():
    assert to_delete(infos(1, 2, 3), LatestN(0), context=CONTEXT) == infos(1, 2)


def test_the_newest_goes_where_that_is_asked():
    assert to_delete(infos(1, 2, 3), LatestN(0), context=CONTEXT, keep_newest=False) == infos(1, 2, 3)


def test_the_newest_stays_when_older_ones_are_better():
    assert to_delete(measured(9, 8, 1), best(1), context=CONTEXT) == measured(9, 8, 1)[1:2]


def test_both_the_last_saved_and_the_highest_step_stay():
    assert to_delete(infos(10, 20, 5, 7), LatestN(0), context=CONTEXT) == infos(10, 5)


def test_there_is_nothing_to_delete_in_an_empty_root():
    assert to_delete([], LatestN(0), context=CONTEXT) == []


class Told:
    def __init__(self, answers):
        self.answers = answers

    def should_preserve(self, checkpoints, *, context):
        return self.answers[: len(checkpoints)]


@settings(derandomize=True)
@given(st.lists(st.integers(0, 1000), unique=True, min_size=1, max_size=20), st.data())
def test_a_deletion_never_takes_the_newest_nor_what_is_kept(steps, data):
    answers = data.draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps)))
    left = set(steps) - {info.step for info in to_delete(infos(*steps), Told(answers), context=CONTEXT)}
    wanted = {step for step, keep in zip(steps, answers, strict=True) if keep}
    assert left == wanted | {steps[-1], max(steps)}


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: LatestN(-1),
        lambda: LatestN(1.5),
        lambda: LatestN(math.nan),
        lambda: best(-1),
        lambda: best(math.nan),
        lambda: EveryNSeconds(-1),
        lambda: EveryNSeconds(math.nan),
        lambda: EveryNSeconds(math.inf),
        lambda: EveryNSteps(0),
        lambda: EveryNSteps(-3),
        lambda: EveryNSteps(math.nan),
        lambda: EveryNSteps(3, max_to_keep=-1),
        lambda: EveryNStepsClosest(0),
        lambda: EveryNStepsClosest(-3),
        lambda: EveryNStepsClosest(3, max_to_keep=-1),
        lambda: LatestDuration(dt.timedelta(0)),
        lambda: LatestDuration(dt.timedelta(seconds=-1)),
        lambda: LatestDuration(60),
        lambda: preservation_from_options(max_to_keep=-1),
        lambda: preservation_from_options(keep_period=0),
        lambda: preservation_from_options(keep_period=-1),
        lambda: preservation_from_options(keep_time_interval=dt.timedelta(seconds=-0.5)),
        lambda: preservation_from_options(best_fn=len, best_mode="lowest"),
        lambda: preservation_from_options(best_mode="lowest"),
    ],
)
def test_an_argument_without_meaning_is_refused_at_once(make):
    with pytest.raises(ValueError, match="must be") as caught:
        make()
    assert isinstance(caught.value, ConfigError)


# --- options ---------------------------------------------------------------------------------------------------------


def test_no_options_keep_everything():
    assert preservation_from_options().policies == (LatestN(None),)


def test_the_options_make_one_union():
    options = {"max_to_keep": 2, "keep_period": 4, "keep_time_interval": dt.timedelta(seconds=90.7)}
    assert preservation_from_options(**options).policies == (EveryNSteps(4), EveryNSeconds(90), LatestN(2))


def test_a_ranking_takes_the_place_of_the_latest():
    options = {"max_to_keep": 2, "best_fn": len, "best_mode": "min", "keep_checkpoints_without_metrics": False}
    ranked = BestN(get_metric_fn=len, reverse=True, n=2, keep_checkpoints_without_metrics=False)
    assert preservation_from_options(**options).policies == (ranked,)


def test_the_v1_names_are_the_same_classes():
    from milepost import preservation
    from milepost.v1.training import preservation_policies

    strange = [
        name
        for name in preservation_policies.__all__
        if getattr(preservation_policies, name) is not getattr(preservation, name)
    ]
    assert strange == []


@pytest.mark.parametrize("module", ["milepost.preservation", "milepost.decisions"])
def test_policies_need_no_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0
