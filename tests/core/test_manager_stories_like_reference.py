"""The same random story, told to the reference's manager and to ours, ends with the same steps and the same values.

Where the two differ on purpose, stories leave it out, by one of the named exclusions below; each has a test of its own
that asserts the difference, so that it is known when it goes away.
"""

from __future__ import annotations

import contextlib
import inspect
import pathlib
import tempfile
import warnings

import numpy as np
import orbax.checkpoint as reference
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from milepost import args, checkpoint_managers
from milepost.path import step as step_names
from orbax.checkpoint.path import step as reference_step_names

OURS, THEIRS = checkpoint_managers, reference.checkpoint_managers

EXCLUSIONS = {
    "lower numbers and retention": "the reference orders steps by when they were saved, until it is opened again: a "
    "forced save of a lower number makes an older step the latest, and the newest may be deleted for it",
    "folders that are named like steps": "the reference takes any folder for a step; here one with a commit object is",
    "not a number": "what the reference keeps of steps whose metric is a NaN depends on their order",
    "negative numbers": "the reference saves them, and never finds them again; here they are refused",
    "the newest and policies": "a policy of ours never retires the newest; stories say preserve_newest=False",
    "metrics of what is not there": "the reference returns None or, with a name format of its own, raises a "
    "ValueError; here it is None",
    "metrics without a function": "without best_fn the reference drops the metrics it is given; here they are kept",
    "twice into the trash": "the reference cannot move a step to where one of that number was moved before, and the "
    "save fails; here it gets a number of its own there",
    "saved by others": "the reference replaces a step that another manager saved; here it is refused",
}


def policies(module, kind):
    return {
        "latest": lambda: module.LatestN(2),
        "steps": lambda: module.EveryNSteps(3),
        "closest": lambda: module.EveryNStepsClosest(3, max_to_keep=2),
        "custom": lambda: module.CustomSteps([1, 4]),
        "best": lambda: module.BestN(get_metric_fn=lambda metrics: metrics["a"], n=2),
        "any": lambda: module.AnyPreservationPolicy([module.LatestN(1), module.EveryNSteps(4)]),
    }[kind]()


def decisions(module, kind):
    return {
        "interval": lambda: module.FixedIntervalPolicy(2),
        "steps": lambda: module.SpecificStepsPolicy([2, 3, 5]),
        "any": lambda: module.AnySavePolicy([module.InitialSavePolicy(), module.FixedIntervalPolicy(4)]),
    }[kind]()


def formats(module, kind):
    one, two = module.standard_name_format(step_prefix="ckpt"), module.standard_name_format(step_format_fixed_length=3)
    return {
        "plain": module.standard_name_format(),
        "prefix": one,
        "both": module.composite_name_format(two, [two, one]),
    }[kind]


WHEN = st.one_of(
    st.fixed_dictionaries(
        {"save_interval_steps": st.integers(1, 3)}, optional={"save_on_steps": st.lists(st.integers(0, 9), max_size=2)}
    ),
    st.fixed_dictionaries({"save_decision_policy": st.sampled_from(["interval", "steps", "any"])}),
    st.just({"should_save_fn": lambda step, newest: newest is None or step >= newest + 2}),
)
BEST = st.fixed_dictionaries(
    {"best_fn": st.just(lambda metrics: metrics["a"]), "best_mode": st.sampled_from(["min", "max"])},
    optional={"keep_checkpoints_without_metrics": st.booleans()},
)
KEEP = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"max_to_keep": st.integers(0, 3)}, optional={"keep_period": st.integers(2, 4)}),
    st.fixed_dictionaries({"preservation_policy": st.sampled_from(["latest", "steps", "closest", "custom", "any"])}),
    st.fixed_dictionaries({"preservation_policy": st.just("best")}),
)
OPTIONS = st.builds(
    lambda when, keep, best, name, todelete: {**when, **keep, **best, "step_name_format": name, **todelete},
    WHEN,
    KEEP,
    st.just({}) | BEST,
    st.sampled_from(["plain", "prefix", "both"]),
    st.sampled_from([{}, {"todelete_subdir": "trash"}]),
)
STRAY = st.sampled_from(["7.orbax-checkpoint-tmp", "notes", "ckpt_x", "01x", "metadata.json"])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(0, 9), st.none() | st.integers(0, 3), st.booleans()),
        st.tuples(st.just("save"), st.integers(0, 9), st.none() | st.integers(0, 3), st.just(False)),
        st.tuples(st.just("delete"), st.integers(0, 9)),
        st.tuples(st.just("restore"), st.none() | st.integers(0, 9)),
        st.tuples(st.just("metrics"), st.integers(0, 9)),
        st.tuples(st.just("should_save"), st.integers(0, 12)),
        st.tuples(st.just("stray"), STRAY, st.booleans()),
        st.just(("reopen",)),
        st.just(("reload",)),
    ),
    min_size=6,
    max_size=14,
)


class Teller:
    """A manager of one of the two, to whom a story is told."""

    def __init__(self, root, module, names, arguments, more, options):
        self.root, self.arguments = root, arguments
        given = dict(options)
        for name, made in (("preservation_policy", policies), ("save_decision_policy", decisions)):
            if name in given:
                given[name] = made(module, given[name])
        given["step_name_format"] = formats(names, given["step_name_format"])
        self._make = lambda: module.CheckpointManager(root, options=module.CheckpointManagerOptions(**given, **more))
        self.manager = self._make()

    def tell(self, event):
        try:
            return self._act(*event), None
        except Exception as error:  # noqa: BLE001 - it is compared
            return None, error

    def _act(self, verb, *what):
        if verb == "save":
            number, metric, force = what
            tree = {"w": np.full(2, number, np.float32), "n": number}
            metrics = None if metric is None else {"a": metric}
            saved = self.manager.save(number, args=self.arguments.StandardSave(tree), metrics=metrics, force=force)
            self.manager.wait_until_finished()
            return saved
        if verb == "restore":
            found = self.manager.restore(*what, args=self.arguments.StandardRestore())
            return found["w"].tolist(), found["n"]
        if verb == "stray":
            name, folder = what
            (self.root / name).mkdir(exist_ok=True) if folder else (self.root / name).touch()
            return None
        if verb == "reopen":
            self.manager.close()
            self.manager = self._make()
            return None
        return getattr(self.manager, verb)(*what)

    def in_trash(self):
        trash = self.root / "trash"
        return {int(path.name.removeprefix("ckpt_")) for path in trash.iterdir()} if trash.exists() else set()

    def stands(self):
        return self.manager.all_steps(), self.manager.latest_step(), self.manager.best_step()


@contextlib.contextmanager
def tellers(options):
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference's
        roots = [pathlib.Path(made, name) for name in ("ours", "theirs")]
        mine = Teller(roots[0], OURS, step_names, args, {"preserve_newest": False}, options)
        sync = {"enable_async_checkpointing": False}
        other = Teller(roots[1], THEIRS_WITH_MANAGER, reference_step_names, reference.args, sync, options)
        try:
            yield mine, other
        finally:
            mine.manager.close()
            other.manager.close()


class THEIRS_WITH_MANAGER:  # noqa: N801 - it stands for a module
    """The reference's module of policies, with what stands elsewhere there."""

    CheckpointManager, CheckpointManagerOptions = reference.CheckpointManager, reference.CheckpointManagerOptions
    LatestN, EveryNSteps, EveryNStepsClosest = THEIRS.LatestN, THEIRS.EveryNSteps, THEIRS.EveryNStepsClosest
    CustomSteps, BestN, AnyPreservationPolicy = THEIRS.CustomSteps, THEIRS.BestN, THEIRS.AnyPreservationPolicy
    FixedIntervalPolicy, SpecificStepsPolicy = THEIRS.FixedIntervalPolicy, THEIRS.SpecificStepsPolicy
    InitialSavePolicy, AnySavePolicy = THEIRS.InitialSavePolicy, THEIRS.AnySavePolicy


def excluded(event, other, options):
    """Say by the name of which exclusion a story leaves an event out."""
    verb, *what = event
    there = other.manager.all_steps()
    if verb in {"save", "delete"} and what[0] in other.in_trash():
        return "twice into the trash"
    if verb == "save" and what[2] and there and what[0] < there[-1]:
        return "lower numbers and retention"
    if verb == "metrics" and what[0] not in there:
        return "metrics of what is not there"
    if verb == "metrics" and "best_fn" not in options:
        return "metrics without a function"
    return None


def builtin(error):
    return next(cls for cls in type(error).__mro__ if cls.__module__ == "builtins")


def same_ending(event, mine, other):
    (value, error), (their_value, their_error) = mine, other
    assert value == their_value, event
    assert (error is None) == (their_error is None), (event, error, their_error)
    if their_error is not None:
        assert isinstance(error, builtin(their_error)), (event, error, their_error)


# Without shrinking: the reference is slow, and a failure tells its event and options.
STORIES = settings(
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@STORIES
@given(OPTIONS, EVENTS)
def test_stories_end_alike(options, events):
    if options.get("preservation_policy") == "best":
        options = {**options, "best_fn": lambda metrics: metrics["a"]}  # without it the reference keeps no metrics
        options.pop("best_mode", None)
    with tellers(options) as (mine, other):
        for event in events:
            if (left_out := excluded(event, other, options)) is not None:
                assert left_out in EXCLUSIONS
                continue
            same_ending(event, mine.tell(event), other.tell(event))
            assert mine.stands() == other.stands(), (event, options)
        for number in other.manager.all_steps():
            event = ("restore", number)
            same_ending(event, mine.tell(event), other.tell(event))
        for teller in (mine, other):
            teller.tell(("reopen",))
        assert mine.stands() == other.stands(), options


# --- every exclusion, shown ------------------------------------------------------------------------------------------


@pytest.fixture
def both():
    with contextlib.ExitStack() as stack:

        def told(options, *events):
            mine, other = stack.enter_context(tellers({"step_name_format": "plain", **options}))
            return [(one, [one.tell(event) for event in events]) for one in (mine, other)]

        yield told


def test_lower_numbers_and_retention(both):
    assert "lower numbers and retention" in EXCLUSIONS
    (mine, _), (other, _) = both({}, ("save", 5, None, False), ("save", 3, None, True))
    assert (mine.manager.latest_step(), other.manager.latest_step()) == (5, 3)
    (mine, _), (other, _) = both({"max_to_keep": 1}, ("save", 5, None, False), ("save", 3, None, True))
    assert (mine.manager.all_steps(), other.manager.all_steps()) == ([5], [3])


def test_folders_that_are_named_like_steps(both):
    assert "folders that are named like steps" in EXCLUSIONS
    (mine, _), (other, _) = both({}, ("stray", "7", True), ("reload",))
    assert (mine.manager.all_steps(), other.manager.all_steps()) == ([], [7])


def test_the_newest_and_policies(both):
    assert "the newest and policies" in EXCLUSIONS
    assert "preserve_newest" not in inspect.signature(reference.CheckpointManagerOptions).parameters
    (mine, _), (other, _) = both({"preservation_policy": "custom"}, ("save", 1, None, True), ("save", 2, None, True))
    assert mine.manager.all_steps() == other.manager.all_steps() == [1]
    options = OURS.CheckpointManagerOptions(preservation_policy=OURS.CustomSteps([1]))
    with OURS.CheckpointManager(mine.root, options=options) as careful:
        careful.save(3, args=args.StandardSave({"n": 3}))
        careful.wait_until_finished()
        assert careful.all_steps() == [1, 3]


def test_negative_numbers(both):
    assert "negative numbers" in EXCLUSIONS
    (mine, [(_, refused), _]), (other, [(saved, _), _]) = both({}, ("save", -1, None, True), ("reopen",))
    assert isinstance(refused, ValueError)
    assert saved is True
    assert (mine.manager.all_steps(), other.manager.all_steps()) == ([], [])


def test_metrics_of_what_is_not_there(both):
    assert "metrics of what is not there" in EXCLUSIONS
    (_, [mine]), (_, [(_, refused)]) = both({"best_fn": lambda metrics: metrics["a"]}, ("metrics", 1))
    assert mine == (None, None)
    assert isinstance(refused, ValueError)


def test_metrics_without_a_function(both):
    assert "metrics without a function" in EXCLUSIONS
    (_, [_, mine]), (_, [_, other]) = both({}, ("save", 1, 2, False), ("metrics", 1))
    assert (mine, other) == (({"a": 2}, None), (None, None))


def test_twice_into_the_trash(both):
    assert "twice into the trash" in EXCLUSIONS
    again = ("save", 1, None, True)
    options = {"max_to_keep": 0, "todelete_subdir": "trash"}
    (mine, [_, fine]), (_, [_, (_, refused)]) = both(options, again, again)
    assert fine == (True, None)
    assert isinstance(refused, OSError)
    assert sorted(path.name for path in (mine.root / "trash").iterdir()) == ["1", "1.1"]


def test_saved_by_others(both):
    assert "saved by others" in EXCLUSIONS
    (mine, _), (other, _) = both({})
    for teller, module, arguments in ((mine, OURS, args), (other, reference, reference.args)):
        with module.CheckpointManager(teller.root) as somebody:
            somebody.save(4, args=arguments.StandardSave({"w": np.zeros(2, np.float32), "n": -4}))
    outcomes = [teller.tell(("save", 4, None, False)) for teller in (mine, other)]
    assert isinstance(outcomes[0][1], ValueError)
    assert outcomes[1] == (True, None)
    for teller in (mine, other):
        teller.tell(("reopen",))
    assert [teller.tell(("restore", 4))[0][1] for teller in (mine, other)] == [-4, 4]


def test_not_a_number(both):
    assert "not a number" in EXCLUSIONS
    nan, best = float("nan"), {"best_fn": lambda metrics: metrics["a"], "max_to_keep": 1}
    events = [("save", 1, 1.0, False), ("save", 2, nan, False), ("save", 3, 0.5, False)]
    (mine, _), _ = both(best, *events)
    assert mine.manager.all_steps() == [1]


# --- files that the two exchange, and signatures ---------------------------------------------------------------------


def test_each_reads_the_metadata_of_the_others_root(tmp_path):
    noted = {"a": [1, 2.5, None], "b": {"c": "x"}}
    with OURS.CheckpointManager(tmp_path / "ours", metadata=noted):
        pass
    with reference.CheckpointManager(tmp_path / "theirs", metadata=noted):
        pass
    with OURS.CheckpointManager(tmp_path / "theirs") as mine, reference.CheckpointManager(tmp_path / "ours") as other:
        assert mine.metadata().custom_metadata == other.metadata().custom_metadata == noted
        assert dataclass_fields(mine.metadata()) == dataclass_fields(other.metadata())
    read = [(tmp_path / name / "metadata" / "_ROOT_METADATA").read_text() for name in ("ours", "theirs")]
    assert read[0] == read[1]


def dataclass_fields(value):
    return list(type(value).__dataclass_fields__)


def test_steps_of_the_reference_are_found_and_ranked_and_not_replaced(tmp_path):
    best = {"best_fn": lambda metrics: metrics["a"]}
    with reference.CheckpointManager(tmp_path, options=reference.CheckpointManagerOptions(**best)) as other:
        for number, metric in ((1, 3.0), (2, 1.0)):
            other.save(number, args=reference.args.StandardSave({"n": np.ones(2)}), metrics={"a": metric})
    with OURS.CheckpointManager(tmp_path, options=OURS.CheckpointManagerOptions(**best)) as mine:
        assert (mine.all_steps(), mine.latest_step(), mine.best_step(), mine.metrics(2)) == ([1, 2], 2, 1, {"a": 1.0})
        with pytest.raises(ValueError, match="it is there already"):
            mine.save(2, args=args.StandardSave({"n": 1}), force=True)
        mine.save(3, args=args.StandardSave({"n": 1}), metrics={"a": 9})
        mine.wait_until_finished()
        assert mine.best_step() == 3


def parameters(function, *, without=()):
    found = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in found if one.name not in without]


def test_methods_have_the_signatures_of_the_reference():
    names = [name for name in vars(reference.CheckpointManager) if not name.startswith("_")]
    for name in names:
        theirs = getattr(reference.CheckpointManager, name)
        if callable(theirs):
            assert parameters(getattr(OURS.CheckpointManager, name)) == parameters(theirs), name
        else:
            assert isinstance(getattr(OURS.CheckpointManager, name), property)
    assert parameters(OURS.CheckpointManager) == parameters(reference.CheckpointManager)
    abstract = OURS.AbstractCheckpointManager.__abstractmethods__
    assert abstract == reference.AbstractCheckpointManager.__abstractmethods__
    for name in abstract - {"directory"}:
        mine, theirs = (getattr(one.AbstractCheckpointManager, name) for one in (OURS, reference))
        assert parameters(mine) == parameters(theirs), name


def test_options_are_those_of_the_reference_and_one_more_at_the_end():
    names = list(inspect.signature(OURS.CheckpointManagerOptions).parameters)
    assert names == [*inspect.signature(reference.CheckpointManagerOptions).parameters, "preserve_newest"]
    mine, theirs = OURS.CheckpointManagerOptions(), reference.CheckpointManagerOptions()
    for name in names[:-1]:
        ours, reference_s = getattr(mine, name), getattr(theirs, name)
        if name == "file_options":  # the document shows one field of two
            ours, reference_s = vars(ours), vars(reference_s)
        assert repr(ours) == repr(reference_s), name


def test_modules_have_the_names_of_the_reference():
    public = {name for name in dir(THEIRS) if not name.startswith("_")} - {"annotations"}
    assert public <= set(OURS.__all__)
