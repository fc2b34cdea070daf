"""Which checkpoints stay when a new one has been committed.

Decides, from what is known of the checkpoints alone, which of them are kept. The rule: a policy is a frozen value that
does no I/O and answers for each checkpoint, oldest first; it looks at nothing of a checkpoint but what it needs, since
times and metrics may have to be read. Policies are joined by `|`: what any of them keeps is kept. And whatever a policy
says, `to_delete` spares the newest checkpoint unless it is told not to, because a training resumes from that one.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from milepost.errors import ConfigError, noted

__all__ = [
    "AnyPreservationPolicy",
    "BestN",
    "CustomSteps",
    "EveryNSeconds",
    "EveryNSteps",
    "EveryNStepsClosest",
    "LatestDuration",
    "LatestN",
    "PolicyCheckpointInfo",
    "PreservationContext",
    "PreservationPolicy",
    "PreserveAll",
    "preservation_from_options",
    "to_delete",
]


class PolicyCheckpointInfo(Protocol):
    """What policies know of a checkpoint; each property may be read from storage when it is first asked for."""

    @property
    def step(self) -> int:
        """Return the step."""
        ...

    @property
    def time(self) -> dt.datetime:
        """Return when it was committed (for a step about to be saved: now), in UTC, with its zone."""
        ...

    @property
    def metrics(self) -> Any | None:
        """Return the metrics as they were given to the save, None without any."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreservationContext:
    """What policies may know beside the checkpoints: the time now, with its zone (None: ask the clock)."""

    now: dt.datetime | None = None


@runtime_checkable
class PreservationPolicy(Protocol):
    """Say which checkpoints to keep. Any object with this method is a policy."""

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Return for each checkpoint, oldest first, whether this policy keeps it."""
        ...


class _Joinable(PreservationPolicy, Protocol):
    """A policy that `|` joins with any other, on either side."""

    def __or__(self, other: PreservationPolicy) -> AnyPreservationPolicy:
        return _joined(self, other) if is_instance_with(other, "should_preserve") else NotImplemented

    def __ror__(self, other: PreservationPolicy) -> AnyPreservationPolicy:
        return _joined(other, self) if is_instance_with(other, "should_preserve") else NotImplemented


@dataclasses.dataclass(frozen=True)
class PreserveAll(_Joinable):
    """Keep every checkpoint."""

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True for each."""
        return [True] * len(checkpoints)


@dataclasses.dataclass(frozen=True)
class LatestN(_Joinable):
    """Keep the last `n` checkpoints; None keeps all, 0 none."""

    n: int | None = None

    def __post_init__(self) -> None:
        check_count("LatestN.n", self.n)

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True for the last `n`."""
        return _latest([True] * len(checkpoints), self.n)


@dataclasses.dataclass(frozen=True)
class EveryNSeconds(_Joinable):
    """Keep the first checkpoint, then each that is at least `interval_secs` seconds younger than the last one kept."""

    interval_secs: float

    def __post_init__(self) -> None:
        check_at_least("EveryNSeconds.interval_secs", self.interval_secs, 0)

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True for the first, and for each that is far enough from the last one kept."""
        interval = dt.timedelta(seconds=self.interval_secs)
        return _spaced([info.time for info in checkpoints], lambda earlier, later: later - earlier >= interval)


@dataclasses.dataclass(frozen=True)
class EveryNSteps(_Joinable):
    """Keep the checkpoints whose step is a multiple of `interval_steps`.

    With `exact_interval=False`: the first, then each that is at least so many steps after the last one kept; for
    trainings whose saves do not fall on multiples. Of these, the latest `max_to_keep` are kept (None and 0: all).
    """

    interval_steps: int
    exact_interval: bool = True
    max_to_keep: int | None = None

    def __post_init__(self) -> None:
        check_positive("EveryNSteps.interval_steps", self.interval_steps)
        check_count("EveryNSteps.max_to_keep", self.max_to_keep)

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True for the latest `max_to_keep` of those that are on the interval."""
        steps = [info.step for info in checkpoints]
        if self.exact_interval:
            chosen = [bool(step % self.interval_steps == 0) for step in steps]
        else:
            chosen = _spaced(steps, lambda earlier, later: later - earlier >= self.interval_steps)
        return _latest(chosen, self.max_to_keep or None)


@dataclasses.dataclass(frozen=True)
class EveryNStepsClosest(_Joinable):
    """Keep, for each multiple of `interval_steps`, the checkpoint closest to it (the later of two), and the last one.

    A step half way between two multiples counts for the one that is an even multiple. Of these, the latest
    `max_to_keep` are kept (None and 0: all).
    """

    interval_steps: int
    max_to_keep: int | None = None

    def __post_init__(self) -> None:
        check_positive("EveryNStepsClosest.interval_steps", self.interval_steps)
        check_count("EveryNStepsClosest.max_to_keep", self.max_to_keep)

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True for the latest `max_to_keep` of those that are closest to a multiple."""
        closest: dict[int, tuple[int, int]] = {}
        for index, info in enumerate(checkpoints):
            multiple, distance = _nearest_multiple(info.step, self.interval_steps)
            if multiple not in closest or distance <= closest[multiple][0]:
                closest[multiple] = (distance, index)
        chosen = {index for _, index in closest.values()} | {len(checkpoints) - 1}
        return _latest([index in chosen for index in range(len(checkpoints))], self.max_to_keep or None)


@dataclasses.dataclass(frozen=True)
class CustomSteps(_Joinable):
    """Keep the checkpoints of these steps."""

    steps: Container[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", fixed_steps(self.steps))

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True where the step is one of these."""
        return [info.step in self.steps for info in checkpoints]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestN(_Joinable):
    """Keep the `n` checkpoints that `get_metric_fn` of their metrics ranks highest; None keeps all, 0 none.

    `reverse=True` ranks the lowest value best, as for a loss. Of equal values, the later checkpoint is the better one.
    A NaN is worse than every number, either way. Checkpoints without metrics are not counted: all of them are kept, or
    with `keep_checkpoints_without_metrics=False` none, as soon as there are more than `n` checkpoints. With `n=0`
    nothing is kept.
    """

    get_metric_fn: Callable[[Any], float]
    reverse: bool = False
    n: int | None = None
    keep_checkpoints_without_metrics: bool = True

    def __post_init__(self) -> None:
        check_count("BestN.n", self.n)

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,  # noqa: ARG002 - the protocol's signature
    ) -> Sequence[bool]:
        """Return True for the `n` best, and for those without metrics where they are kept."""
        if self.n is None or len(checkpoints) <= self.n or self.n == 0:
            # Nothing to rank: metrics, which may have to be read, are left alone.
            return [self.n != 0] * len(checkpoints)
        metrics = [info.metrics for info in checkpoints]
        values = {index: self.get_metric_fn(given) for index, given in enumerate(metrics) if given is not None}
        best = set(self._worst_first(values)[-self.n :])
        return [
            index in best or (given is None and self.keep_checkpoints_without_metrics)
            for index, given in enumerate(metrics)
        ]

    def _worst_first(self, values: dict[int, float]) -> list[int]:
        unordered = [index for index, value in values.items() if _is_nan(value)]
        ordered = sorted(values.keys() - unordered)
        # A stable sort, reversed or not, leaves equal values oldest first: the later one is the better.
        return unordered + sorted(ordered, key=values.__getitem__, reverse=self.reverse)


@dataclasses.dataclass(frozen=True)
class LatestDuration(_Joinable):
    """Keep what is not older than `duration`, by the wall clock, and everything after the first of these."""

    duration: dt.timedelta

    def __post_init__(self) -> None:
        if not isinstance(self.duration, dt.timedelta) or self.duration <= dt.timedelta(0):
            raise ConfigError(f"LatestDuration.duration must be a timedelta above zero: {self.duration!r}")

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Return True from the first that is young enough on."""
        if not checkpoints:
            return []
        now = context.now or dt.datetime.now(dt.UTC)
        first = next(
            (index for index, info in enumerate(checkpoints) if now - info.time <= self.duration), len(checkpoints)
        )
        return [index >= first for index in range(len(checkpoints))]


@dataclasses.dataclass(frozen=True)
class AnyPreservationPolicy(_Joinable):
    """Keep what at least one of the policies keeps. Raises ConfigError (a ValueError) when there is none."""

    policies: Sequence[PreservationPolicy]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        if not self.policies:
            raise noted(
                ConfigError("AnyPreservationPolicy was given no policy 'policies=[]': it would keep no checkpoint"),
                "PreserveAll() keeps all checkpoints, LatestN(0) none.",
            )

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Return True where one of the policies does."""
        answers = [_answers(policy, checkpoints, context) for policy in self.policies]
        return [any(column) for column in zip(*answers, strict=True)]


C = TypeVar("C", bound=PolicyCheckpointInfo)


def to_delete(
    checkpoints: Sequence[C], policy: PreservationPolicy, *, context: PreservationContext, keep_newest: bool = True
) -> list[C]:
    """Return the checkpoints that the policy gives up, oldest first, out of all the committed ones, oldest first.

    With `keep_newest`, never the last of them, and never the one with the highest step, which is what a training
    resumes from. Raises ConfigError (a ValueError) when the policy does not answer once for each checkpoint.

    >>> from types import SimpleNamespace as Info
    >>> infos = [Info(step=step) for step in (1, 2, 3)]
    >>> [info.step for info in to_delete(infos, CustomSteps([1]), context=PreservationContext())]
    [2]
    """
    kept = _answers(policy, checkpoints, context)
    if keep_newest and checkpoints:
        kept[-1] = True
        kept[max(range(len(checkpoints)), key=lambda index: checkpoints[index].step)] = True
    return [info for info, keep in zip(checkpoints, kept, strict=True) if not keep]


def preservation_from_options(
    *,
    max_to_keep: int | None = None,
    keep_time_interval: dt.timedelta | None = None,
    keep_period: int | None = None,
    best_fn: Callable[[Any], float] | None = None,
    best_mode: str | None = "max",
    keep_checkpoints_without_metrics: bool = True,
) -> AnyPreservationPolicy:
    """Return the policy that the manager's options stand for; raise ConfigError (a ValueError) for what has no meaning.

    >>> preservation_from_options(max_to_keep=2, keep_period=100).policies
    (EveryNSteps(interval_steps=100, exact_interval=True, max_to_keep=None), LatestN(n=2))
    """
    check_count("max_to_keep", max_to_keep)
    if best_mode not in {None, "min", "max"}:
        raise ConfigError(f"best_mode must be 'min' or 'max': {best_mode!r}")
    policies: list[PreservationPolicy] = []
    if keep_period is not None:
        check_positive("keep_period", keep_period)
        policies.append(EveryNSteps(keep_period))
    if keep_time_interval is not None:
        check_at_least("the seconds of keep_time_interval", keep_time_interval.total_seconds(), 0)
        policies.append(EveryNSeconds(int(keep_time_interval.total_seconds())))
    if best_fn is None:
        return AnyPreservationPolicy([*policies, LatestN(max_to_keep)])
    best = BestN(
        get_metric_fn=best_fn,
        reverse=best_mode == "min",
        n=max_to_keep,
        keep_checkpoints_without_metrics=keep_checkpoints_without_metrics,
    )
    return AnyPreservationPolicy([*policies, best])


# --- shared with the save decisions, and no part of the API -----------------------------------------------------------


def check_count(name: str, value: int | None) -> None:
    """Raise ConfigError (a ValueError) for what is neither None nor a whole number from 0 on."""
    if value is not None and not (hasattr(value, "__index__") and value >= 0):
        raise ConfigError(f"{name} must be None or a whole number that is not negative: {value!r}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise ConfigError (a ValueError) for what is not finite, or below the least."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name} must be a number not below {least:g}: {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise ConfigError (a ValueError) for what is not finite, or not above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a number above zero: {value!r}")


def fixed_steps(steps: Iterable[int] | Container[int]) -> Container[int]:
    """Return the steps as something that can be asked again and again, and that its giver cannot change.

    Ranges, and containers of one's own making, stay what they are: they may be endless.

    >>> steps = fixed_steps(step for step in [3, 5])
    >>> 3 in steps, 3 in steps
    (True, True)
    """
    if isinstance(steps, Container) and not isinstance(steps, (list, tuple, set)):
        return steps
    return frozenset(steps)


def is_instance_with(value: object, method: str) -> bool:
    """Say whether the value has the method and is no class: `LatestN` without its brackets is a slip."""
    return not isinstance(value, type) and callable(getattr(value, method, None))


# --- the pieces of the answers ---------------------------------------------------------------------------------------


def _joined(*policies: PreservationPolicy) -> AnyPreservationPolicy:
    """Return the union, flat."""
    flat: list[PreservationPolicy] = []
    for policy in policies:
        flat += policy.policies if type(policy) is AnyPreservationPolicy else [policy]
    return AnyPreservationPolicy(flat)


def _answers(
    policy: PreservationPolicy, checkpoints: Sequence[PolicyCheckpointInfo], context: PreservationContext
) -> list[bool]:
    answers = [bool(kept) for kept in policy.should_preserve(checkpoints, context=context)]
    if len(answers) != len(checkpoints):
        # Which checkpoint an answer belongs to cannot be told: a guess would delete the wrong ones.
        raise ConfigError(f"cannot ask '{policy!r}' what to keep: {len(answers)} answers for {len(checkpoints)}")
    return answers


def _latest(chosen: list[bool], count: int | None) -> list[bool]:
    """Return the choice without all but its latest `count`."""
    if count is None:
        return chosen
    surplus = max(sum(chosen) - count, 0)
    left = []
    for choice in chosen:
        left.append(choice and surplus == 0)
        surplus -= choice and surplus > 0
    return left


T = TypeVar("T")


def _spaced(places: Sequence[T], far_enough: Callable[[T, T], bool]) -> list[bool]:
    """Choose the first place, then each that is far enough from the last one chosen."""
    chosen: list[bool] = []
    last: T | None = None
    for place in places:
        chosen.append(last is None or bool(far_enough(last, place)))
        last = place if chosen[-1] else last
    return chosen


def _nearest_multiple(step: int, interval: int) -> tuple[int, int]:
    """Return which multiple of the interval is nearest, and how far it is; half way, the even one."""
    below, over = divmod(step, interval)
    multiple = below + (2 * over > interval or (2 * over == interval and below % 2 == 1))
    return multiple, abs(step - multiple * interval)


def _is_nan(value: Any) -> bool:
    # Not math.isnan: the reference ranks whatever can be compared, tuples too.
    return bool(value != value)  # noqa: PLR0124 - only a NaN differs from itself
