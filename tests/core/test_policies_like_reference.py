"""The policies beside those of the reference: the same names, the same arguments, the same answers."""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import math
import operator
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost import decisions, preservation
from milepost.v1.training import preservation_policies, save_decision_policies
from orbax import checkpoint as reference
from orbax.checkpoint import checkpoint_managers as v0
from orbax.checkpoint import v1


def without_addresses(value):
    """Return a text that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


START = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
# The reference reads the clock itself: far enough from every border that a test draws.
NOW = dt.datetime.now(dt.UTC)


@dataclasses.dataclass(frozen=True)
class Info:
    step: int
    time: dt.datetime
    metrics: object = None


steps = st.lists(st.integers(-50, 400), unique=True, max_size=25)
counts = st.none() | st.integers(0, 12)
numbers = st.integers(-9, 9) | st.floats(allow_nan=False)


@st.composite
def checkpoints(draw):
    drawn = draw(steps)
    if draw(st.booleans()):
        drawn.sort()
    seconds = [draw(st.integers(0, 3000)) for _ in drawn]
    if draw(st.booleans()):
        seconds.sort()
    metrics = [draw(st.none() | st.fixed_dictionaries({"loss": numbers})) for _ in drawn]
    return [
        Info(step, START + dt.timedelta(seconds=second), metric)
        for step, second, metric in zip(drawn, seconds, metrics, strict=True)
    ]


loss = operator.itemgetter("loss")

# The name of a policy, and arguments for it.
policies = st.one_of(
    st.tuples(st.just("PreserveAll"), st.just({})),
    st.tuples(st.just("LatestN"), st.fixed_dictionaries({"n": counts})),
    st.tuples(st.just("EveryNSeconds"), st.fixed_dictionaries({"interval_secs": st.integers(0, 900)})),
    st.tuples(
        st.just("EveryNSteps"),
        st.fixed_dictionaries(
            {"interval_steps": st.integers(1, 60), "exact_interval": st.booleans(), "max_to_keep": counts}
        ),
    ),
    st.tuples(
        st.just("EveryNStepsClosest"),
        st.fixed_dictionaries({"interval_steps": st.integers(1, 60), "max_to_keep": counts}),
    ),
    st.tuples(st.just("CustomSteps"), st.fixed_dictionaries({"steps": st.lists(st.integers(-50, 60))})),
    st.tuples(
        st.just("BestN"),
        st.fixed_dictionaries(
            {
                "get_metric_fn": st.just(loss),
                "reverse": st.booleans(),
                "n": counts,
                "keep_checkpoints_without_metrics": st.booleans(),
            }
        ),
    ),
)


def answers(policy, infos, context):
    return [bool(kept) for kept in policy.should_preserve(infos, context=context)]


def both(names):
    """Return the union of the same policies, ours and theirs."""
    made = [
        [getattr(home, name)(**arguments) for name, arguments in names]
        for home in (preservation_policies, v1.training.preservation_policies)
    ]
    theirs = v1.training.preservation_policies.AnyPreservationPolicy(made[1])
    return preservation_policies.AnyPreservationPolicy(made[0]), theirs


@settings(derandomize=True, max_examples=600)
@given(policies, checkpoints())
def test_a_policy_keeps_what_the_reference_keeps(policy, infos):
    name, arguments = policy
    ours = getattr(preservation_policies, name)(**arguments)
    theirs = getattr(v1.training.preservation_policies, name)(**arguments)
    expected = answers(theirs, infos, v0.PreservationContext())
    assert expected == answers(ours, infos, preservation.PreservationContext())


@settings(derandomize=True, max_examples=300)
@given(st.lists(policies, min_size=1, max_size=4), checkpoints())
def test_a_union_keeps_what_the_reference_keeps(names, infos):
    ours, theirs = both(names)
    expected = answers(theirs, infos, v0.PreservationContext())
    assert expected == answers(ours, infos, preservation.PreservationContext())


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.integers(0, 100), max_size=12), st.integers(1, 100))
def test_a_duration_keeps_what_the_reference_keeps(hours, duration):
    infos = [Info(step, NOW - dt.timedelta(hours=hour, minutes=30)) for step, hour in enumerate(hours)]
    given_duration = dt.timedelta(hours=duration)
    expected = answers(v0.LatestDuration(given_duration), infos, v0.PreservationContext())
    assert expected == answers(preservation.LatestDuration(given_duration), infos, preservation.PreservationContext())


def test_our_policy_works_in_a_union_of_the_reference_and_theirs_in_ours():
    infos = [Info(step, START) for step in range(6)]
    context = preservation.PreservationContext()
    mixed = [
        v0.AnyPreservationPolicy([preservation.LatestN(1), v0.CustomSteps([2])]),
        preservation.AnyPreservationPolicy([v0.LatestN(1), preservation.CustomSteps([2])]),
        v0.LatestN(1) | preservation.CustomSteps([2]),
        preservation.LatestN(1) | v0.CustomSteps([2]),
    ]
    expected = [False, False, True, False, False, True]
    assert [expected] * 4 == [answers(policy, infos, context) for policy in mixed]


def test_the_reference_may_rank_a_nan_best_and_ours_does_not():
    infos = [Info(step, START, {"loss": value}) for step, value in enumerate([5.0, 1.0, math.nan])]
    arguments = {"get_metric_fn": loss, "n": 1, "reverse": True}
    theirs = answers(v0.BestN(**arguments), infos, v0.PreservationContext())
    ours = answers(preservation.BestN(**arguments), infos, preservation.PreservationContext())
    assert theirs == [False, False, True]
    assert ours == [False, True, False]


# --- decisions -------------------------------------------------------------------------------------------------------

decision_policies = st.one_of(
    st.tuples(st.just("FixedIntervalPolicy"), st.fixed_dictionaries({"interval": st.integers(1, 20)})),
    st.tuples(st.just("SpecificStepsPolicy"), st.fixed_dictionaries({"steps": st.frozensets(st.integers(-50, 400))})),
    st.tuples(st.just("InitialSavePolicy"), st.just({})),
    st.tuples(st.just("PreemptionCheckpointingPolicy"), st.just({})),
    st.tuples(
        st.just("ContinuousCheckpointingPolicy"),
        st.fixed_dictionaries({"minimum_interval_secs": st.none() | st.integers(0, 2000)}),
    ),
)


@settings(derandomize=True, max_examples=400)
@given(
    st.lists(decision_policies, max_size=3),
    checkpoints(),
    st.integers(-50, 400),
    st.integers(0, 3000),
    st.tuples(st.booleans(), st.booleans()),
)
def test_a_step_is_saved_where_the_reference_saves(names, previous, step, second, told):
    info = Info(step, START + dt.timedelta(seconds=second))
    given_context = {
        "is_saving_in_progress": told[0],
        "reached_preemption": told[1],
        "multiprocessing_options": reference.options.MultiprocessingOptions(),
    }
    asked = []
    for home in (v1.training.save_decision_policies, save_decision_policies):
        made = [getattr(home, name)(**arguments) for name, arguments in names]
        union = home.AnySavePolicy(made)
        context = home.DecisionContext(**given_context)
        asked.append([bool(policy.should_save(info, previous, context=context)) for policy in [*made, union]])
    assert asked[0] == asked[1]


# --- the options, through the reference's own manager ----------------------------------------------------------------

OPTIONS = [
    {},
    {"max_to_keep": 3},
    {"max_to_keep": 0},
    {"max_to_keep": 2, "keep_period": 4},
    {"max_to_keep": 1, "keep_time_interval": dt.timedelta(seconds=90.7), "keep_period": 4},
    {"max_to_keep": 1, "keep_time_interval": dt.timedelta(seconds=0.5)},
    {"max_to_keep": 2, "best_fn": loss},
    {"max_to_keep": 2, "best_fn": loss, "best_mode": "min", "keep_checkpoints_without_metrics": False},
]
DECISIONS = [
    {},
    {"save_interval_steps": 3},
    {"save_interval_steps": 3, "save_on_steps": [5, 7]},
    {"should_save_fn": lambda step, last: step % 4 == 1 and last != 5, "save_on_steps": [2]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=without_addresses)
def test_the_options_keep_what_the_manager_of_the_reference_keeps(options, tmp_path):
    losses = [5.0, 1.0, None, 4.0, 4.0, 2.0, None, 3.0, 5.0]
    settled = reference.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    policy = preservation.preservation_from_options(**options)
    left = []
    with reference.CheckpointManager(tmp_path, options=settled) as manager:
        for step, value in enumerate(losses):
            metrics = None if value is None else {"loss": value}
            manager.save(step, args=reference.args.JsonSave({"step": step}), metrics=metrics)
            # The manager reads the clock itself: all saves are close together.
            left.append(Info(step, NOW, metrics if "best_fn" in options else None))
            gone = preservation.to_delete(left, policy, context=preservation.PreservationContext(), keep_newest=False)
            left = [info for info in left if info not in gone]
            assert sorted(manager.all_steps()) == [info.step for info in left]


@pytest.mark.parametrize("options", DECISIONS, ids=without_addresses)
def test_the_options_save_what_the_manager_of_the_reference_saves(options, tmp_path):
    settled = reference.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    policy = decisions.decision_from_options(**options)
    context = decisions.DecisionContext(
        is_saving_in_progress=False, reached_preemption=False, multiprocessing_options=None
    )
    previous = []
    with reference.CheckpointManager(tmp_path, options=settled) as manager:
        for step in range(1, 12):
            saved = manager.save(step, args=reference.args.JsonSave({"step": step}))
            assert saved == policy.should_save(Info(step, NOW), previous, context=context)
            if saved:
                previous.append(Info(step, NOW))


# --- the surface -----------------------------------------------------------------------------------------------------

PAIRS = [
    *((preservation_policies, v1.training.preservation_policies, name) for name in preservation_policies.__all__),
    *(
        (save_decision_policies, v1.training.save_decision_policies, name)
        for name in save_decision_policies.__all__
        # ours alone
        if name not in {"BoundedOverheadPolicy", "SaveCosts"}
    ),
]
# Fields beside those of the reference, each with a default: the time can be told, and costs measured.
MORE = {"PreservationContext": ["now"], "DecisionContext": ["costs"]}


def parameters(function):
    return [(name, given.kind, given.default) for name, given in inspect.signature(function).parameters.items()]


@pytest.mark.parametrize(("ours", "theirs", "name"), PAIRS, ids=[pair[2] for pair in PAIRS])
def test_a_policy_is_made_as_in_the_reference(ours, theirs, name):
    mine, model = getattr(ours, name), getattr(theirs, name)
    if dataclasses.is_dataclass(model):
        shared = [given for given in parameters(mine) if given[0] not in MORE.get(name, [])]
        assert parameters(model) == shared
        assert dataclasses.is_dataclass(mine)
    for method in ("should_preserve", "should_save"):
        assert hasattr(model, method) == hasattr(mine, method)
        if hasattr(model, method):
            assert parameters(getattr(model, method)) == parameters(getattr(mine, method))


def test_every_policy_of_the_reference_is_there():
    named = [
        name
        for home in (v0, v1.training.preservation_policies, v1.training.save_decision_policies)
        for name, value in vars(home).items()
        if inspect.isclass(value) and (hasattr(value, "should_save") or hasattr(value, "should_preserve"))
    ]
    ours = {*preservation.__all__, *decisions.__all__}
    # the managers have a `should_save` too
    managers = {"AbstractCheckpointManager", "CheckpointManager"}
    assert set(named) - ours - managers == set()
