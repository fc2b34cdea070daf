from __future__ import annotations

import dataclasses
import datetime as dt
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost.decisions import (
    AnySavePolicy,
    BoundedOverheadPolicy,
    ContinuousCheckpointingPolicy,
    DecisionContext,
    FixedIntervalPolicy,
    InitialSavePolicy,
    PreemptionCheckpointingPolicy,
    SaveCosts,
    SaveDecisionPolicy,
    SpecificStepsPolicy,
    decision_from_options,
)
from milepost.errors import ConfigError

NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


@dataclasses.dataclass(frozen=True)
class Info:
    step: int
    time: dt.datetime = NOON
    metrics: object = None


class Unread:
    def __getattr__(self, name):
        raise AssertionError(f"{name} was read")


class Never:
    """A policy from elsewhere: nothing but the method."""

    def should_save(self, step, previous_steps, *, context):
        return False


def at(seconds, step=1):
    return Info(step, NOON + dt.timedelta(seconds=seconds))


def context(**given):
    told = {"is_saving_in_progress": False, "reached_preemption": False, "multiprocessing_options": None}
    return DecisionContext(**{**told, **given})


def saved(policy, steps):
    """Return which of the steps are saved, when each that the policy wants is."""
    previous = []
    for step in steps:
        if policy.should_save(Info(step), previous, context=context()):
            previous.append(Info(step))
    return [info.step for info in previous]


EVERY_POLICY = [
    FixedIntervalPolicy(2),
    SpecificStepsPolicy([2]),
    InitialSavePolicy(),
    PreemptionCheckpointingPolicy(),
    ContinuousCheckpointingPolicy(),
    BoundedOverheadPolicy(0.1),
    AnySavePolicy([]),
]


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)
def test_each_policy_is_a_policy(policy):
    assert isinstance(policy, SaveDecisionPolicy)


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)
def test_a_policy_cannot_be_changed(policy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.interval = 7


# --- the policies of the reference -----------------------------------------------------------------------------------


def test_multiples_are_saved():
    assert saved(FixedIntervalPolicy(3), range(8)) == [0, 3, 6]


def test_the_named_steps_are_saved():
    assert saved(SpecificStepsPolicy({2, 5}), range(8)) == [2, 5]


def test_steps_may_come_from_a_generator():
    assert saved(SpecificStepsPolicy(step for step in (2, 5)), [2, 5, 2]) == [2, 5, 2]


def test_steps_may_be_a_container_of_ones_own():
    class Squares:
        def __contains__(self, step):
            return math.isqrt(step) ** 2 == step

    assert saved(SpecificStepsPolicy(Squares()), range(10)) == [0, 1, 4, 9]


def test_the_first_step_is_saved():
    assert saved(InitialSavePolicy(), range(5, 9)) == [5]


@pytest.mark.parametrize("reached", [False, True])
def test_preemption_is_a_reason_to_save(reached):
    policy = PreemptionCheckpointingPolicy()
    assert policy.should_save(Unread(), [Unread()], context=context(reached_preemption=reached)) is reached


@pytest.mark.parametrize("busy", [False, True])
def test_continuous_saves_follow_each_other(busy):
    policy = ContinuousCheckpointingPolicy()
    assert policy.should_save(Unread(), [Unread()], context=context(is_saving_in_progress=busy)) is not busy


@pytest.mark.parametrize(("seconds", "wanted"), [(29.9, False), (30, True)])
def test_continuous_saves_keep_their_distance(seconds, wanted):
    policy = ContinuousCheckpointingPolicy(minimum_interval_secs=30)
    assert policy.should_save(at(seconds), [at(-999), at(0)], context=context()) is wanted


def test_the_first_continuous_save_waits_for_nothing():
    policy = ContinuousCheckpointingPolicy(minimum_interval_secs=30)
    assert policy.should_save(Unread(), [], context=context()) is True


def test_a_union_of_nothing_saves_nothing():
    assert saved(AnySavePolicy([]), range(5)) == []


def test_a_fixed_interval_reads_nothing_but_the_step():
    class OnlyStep(Unread):
        step = 4

    assert FixedIntervalPolicy(2).should_save(OnlyStep(), [Unread()], context=context()) is True


# --- joining ---------------------------------------------------------------------------------------------------------


def test_joined_policies_save_what_any_saves():
    assert saved(FixedIntervalPolicy(4) | SpecificStepsPolicy([5]) | InitialSavePolicy(), range(1, 9)) == [1, 4, 5, 8]


def test_joining_is_flat():
    one, two, three, four = (FixedIntervalPolicy(interval) for interval in (1, 2, 3, 4))
    assert ((one | two) | (three | four)).policies == (one, two, three, four)


def test_a_policy_of_ones_own_joins_on_either_side():
    never = Never()
    assert (FixedIntervalPolicy(2) | never).policies == (FixedIntervalPolicy(2), never)
    assert (never | FixedIntervalPolicy(2)).policies == (never, FixedIntervalPolicy(2))
    assert saved(never | FixedIntervalPolicy(2), range(5)) == [0, 2, 4]


@pytest.mark.parametrize("other", [3, None, FixedIntervalPolicy, "FixedIntervalPolicy"])
def test_what_is_no_policy_does_not_join(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        InitialSavePolicy() | other
    with pytest.raises(TypeError, match="unsupported operand"):
        other | InitialSavePolicy()


def test_a_policy_of_what_stays_does_not_join_one_of_what_is_saved():
    from milepost.preservation import LatestN

    with pytest.raises(TypeError, match="unsupported operand"):
        InitialSavePolicy() | LatestN(3)


# --- the bound on the overhead ---------------------------------------------------------------------------------------


def spent(*holdups, now, began=0.0):
    costs = SaveCosts(began=began, now=began)
    for started, ended in holdups:
        costs = costs.after(started, ended)
    return costs.at(now)


def bounded(costs, policy=None, **given):
    policy = policy or BoundedOverheadPolicy(0.25)
    return policy.should_save(Unread(), [Unread()], context=context(costs=costs, **given))


def test_what_a_save_costs_is_told_by_the_first():
    assert bounded(spent(now=0.0)) is True


@pytest.mark.parametrize(("now", "wanted"), [(115.0, False), (116.0, True)])
def test_a_save_is_paid_for_before_the_next(now, wanted):
    # 4 of 16 seconds are a quarter.
    assert bounded(spent((100.0, 104.0), now=now)) is wanted


@pytest.mark.parametrize(("now", "wanted"), [(159.0, False), (160.0, True)])
def test_saves_that_others_asked_for_are_paid_for_too(now, wanted):
    # The last one is paid for at 113; all of them, 40 of 160 seconds, only later.
    assert bounded(spent((20.0, 59.0), (100.0, 101.0), now=now)) is wanted


def test_a_long_pause_does_not_save_up_for_a_burst():
    assert bounded(spent((10.0, 12.0), (10_000.0, 10_002.0), now=10_003.0)) is False


def test_no_save_is_asked_for_while_one_is_in_progress():
    costs = spent((0.0, 1.0), now=10_000.0)
    assert bounded(costs) is True
    assert bounded(costs, is_saving_in_progress=True) is False


@pytest.mark.parametrize(("now", "wanted"), [(39.0, False), (40.0, True)])
def test_cheap_saves_keep_their_distance(now, wanted):
    policy = BoundedOverheadPolicy(0.25, minimum_interval_secs=30)
    assert bounded(spent((9.5, 10.0), now=now), policy) is wanted


@pytest.mark.parametrize(("now", "wanted"), [(159.0, False), (160.0, True)])
def test_dear_saves_are_made_when_too_much_would_be_lost(now, wanted):
    policy = BoundedOverheadPolicy(0.25, maximum_interval_secs=60)
    assert bounded(spent((0.0, 100.0), now=now), policy) is wanted


def test_no_bound_can_be_kept_that_nobody_measures():
    with pytest.raises(ConfigError, match="no costs") as caught:
        bounded(None)
    assert "SaveCosts" in caught.value.__notes__[0]


def test_a_clock_that_stands_still_costs_nothing():
    assert bounded(spent((5.0, 5.0), now=5.0)) is True


durations = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 300)), min_size=1, max_size=150)


@settings(derandomize=True)
@given(durations, st.integers(1, 7), st.sets(st.integers(0, 149)))
def test_at_every_save_the_share_is_kept(story, eighths, forced):
    # Times are multiples of an eighth of a second: sums of floats are exact.
    policy, share = BoundedOverheadPolicy(eighths / 8), Fraction(eighths, 8)
    clock, blocked, costs = 0, 0, SaveCosts(began=0.0, now=0.0)
    for index, (training, saving) in enumerate(story):
        clock += training
        wanted = policy.should_save(Unread(), [], context=context(costs=costs.at(clock / 8)))
        if wanted:
            assert blocked <= share * clock
        if wanted or index in forced:
            costs = costs.after(clock / 8, (clock + saving) / 8)
            clock, blocked = clock + saving, blocked + saving


@settings(derandomize=True)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 7))
def test_with_even_costs_nothing_is_wasted(training, saving, eighths):
    # A save of cost c is paid for c * (1 - f) / f later: the next step after that is saved, not a later one.
    policy, share = BoundedOverheadPolicy(eighths / 8), Fraction(eighths, 8)
    due = saving * (1 - share) / share
    costs = spent((1000.0, 1000.0 + saving), now=1000.0, began=0.0)
    gaps = [step * training for step in range(1, 500)]
    first = next(gap for gap in gaps if bounded(costs.at(1000.0 + saving + gap), policy))
    assert first == next(gap for gap in gaps if gap >= due)


# --- arguments and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedIntervalPolicy(0),
        lambda: FixedIntervalPolicy(-2),
        lambda: FixedIntervalPolicy(math.nan),
        lambda: ContinuousCheckpointingPolicy(minimum_interval_secs=-1),
        lambda: ContinuousCheckpointingPolicy(minimum_interval_secs=math.nan),
        lambda: BoundedOverheadPolicy(0.0),
        lambda: BoundedOverheadPolicy(-0.1),
        lambda: BoundedOverheadPolicy(3),
        lambda: BoundedOverheadPolicy(math.nan),
        lambda: BoundedOverheadPolicy(0.1, minimum_interval_secs=-1),
        lambda: BoundedOverheadPolicy(0.1, minimum_interval_secs=math.nan),
        lambda: BoundedOverheadPolicy(0.1, minimum_interval_secs=60, maximum_interval_secs=30),
        lambda: decision_from_options(save_interval_steps=0),
        lambda: decision_from_options(save_interval_steps=-1),
    ],
)
def test_an_argument_without_meaning_is_refused_at_once(make):
    with pytest.raises(ValueError, match="must be") as caught:
        make()
    assert isinstance(caught.value, ConfigError)


def test_the_options_save_the_first_step_the_interval_and_the_named():
    assert saved(decision_from_options(save_interval_steps=3, save_on_steps=[4]), range(1, 10)) == [1, 3, 4, 6, 9]


def test_the_options_save_every_step_by_default():
    assert saved(decision_from_options(), [3, 1, 4]) == [3, 1, 4]


def test_a_function_takes_the_place_of_interval_and_steps():
    asked = []

    def every_second(step, last):
        asked.append((step, last))
        return step % 2 == 1

    policy = decision_from_options(save_interval_steps=2, save_on_steps=[2], should_save_fn=every_second)
    assert saved(policy, range(2, 6)) == [3, 5]
    assert asked == [(2, None), (3, None), (4, 3), (5, 3)]


@pytest.mark.parametrize("options", [{"save_interval_steps": 100}, {"should_save_fn": lambda step, last: False}])
def test_preemption_is_saved_whatever_the_options(options):
    policy = decision_from_options(**options)
    asked = [
        policy.should_save(Info(7), [Info(1)], context=context(reached_preemption=reached)) for reached in (False, True)
    ]
    assert asked == [False, True]


def test_the_v1_names_are_the_same_classes():
    from milepost import decisions
    from milepost.v1.training import save_decision_policies

    strange = [
        name
        for name in save_decision_policies.__all__
        if getattr(save_decision_policies, name) is not getattr(decisions, name)
    ]
    assert strange == []
