"""Whether a step is worth a checkpoint.

Decides, before anything is copied, whether a save goes ahead. The rule: a policy is a frozen value that does no I/O and
asks no clock; it sees the step, the steps saved before it, and the context, in which whoever saves puts what it has
measured. Policies are joined by `|`: what any of them wants saved is saved. Where several processes save together, one
of them asks and tells the others, since clocks differ.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from milepost.errors import ConfigError, noted
from milepost.preservation import check_at_least, check_positive, fixed_steps, is_instance_with

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from milepost.preservation import PolicyCheckpointInfo

__all__ = [
    "AnySavePolicy",
    "BoundedOverheadPolicy",
    "ContinuousCheckpointingPolicy",
    "DecisionContext",
    "FixedIntervalPolicy",
    "InitialSavePolicy",
    "PreemptionCheckpointingPolicy",
    "SaveCosts",
    "SaveDecisionPolicy",
    "SpecificStepsPolicy",
    "decision_from_options",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveCosts:
    """How long saves have held up the training: all times in seconds of one monotonic clock.

    `began` is when the training began, as far as this process knows, and `now` is now. `blocked_secs` is the sum of all
    hold-ups, `last_blocked_secs` and `last_ended` the length and end of the latest (None before the first).

    >>> costs = SaveCosts(began=0.0, now=0.0).after(10.0, 12.5).at(60.0)
    >>> costs.blocked_secs, costs.last_ended, costs.now
    (2.5, 12.5, 60.0)
    """

    began: float
    now: float
    blocked_secs: float = 0.0
    last_blocked_secs: float = 0.0
    last_ended: float | None = None

    def after(self, started: float, ended: float) -> SaveCosts:
        """Return the costs with one more hold-up: from the call of a save until the training could go on."""
        blocked = max(ended - started, 0.0)
        return dataclasses.replace(
            self,
            now=max(self.now, ended),
            blocked_secs=self.blocked_secs + blocked,
            last_blocked_secs=blocked,
            last_ended=ended,
        )

    def at(self, now: float) -> SaveCosts:
        """Return the costs as they stand at that time."""
        return dataclasses.replace(self, now=now)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecisionContext:
    """What policies may know beside the steps; `costs` is None where nobody measures."""

    is_saving_in_progress: bool
    reached_preemption: bool
    multiprocessing_options: Any
    costs: SaveCosts | None = None


@runtime_checkable
class SaveDecisionPolicy(Protocol):
    """Say whether to save. Any object with this method is a policy."""

    def should_save(
        self,
        step: PolicyCheckpointInfo,
        previous_steps: Sequence[PolicyCheckpointInfo],
        *,
        context: DecisionContext,
    ) -> bool:
        """Return whether the step is to be saved, given those saved before it, oldest first."""
        ...


class _Joinable(SaveDecisionPolicy, Protocol):
    """A policy that `|` joins with any other, on either side."""

    def __or__(self, other: SaveDecisionPolicy) -> AnySavePolicy:
        return _joined(self, other) if is_instance_with(other, "should_save") else NotImplemented

    def __ror__(self, other: SaveDecisionPolicy) -> AnySavePolicy:
        return _joined(other, self) if is_instance_with(other, "should_save") else NotImplemented


@dataclasses.dataclass(frozen=True)
class FixedIntervalPolicy(_Joinable):
    """Save every step that is a multiple of `interval`."""

    interval: int

    def __post_init__(self) -> None:
        check_positive("FixedIntervalPolicy.interval", self.interval)

    def should_save(
        self,
        step: PolicyCheckpointInfo,
        previous_steps: Sequence[PolicyCheckpointInfo],  # noqa: ARG002 - the protocol's signature
        *,
        context: DecisionContext,  # noqa: ARG002 - the protocol's signature
    ) -> bool:
        """Return whether the interval divides the step."""
        return bool(step.step % self.interval == 0)


@dataclasses.dataclass(frozen=True)
class SpecificStepsPolicy(_Joinable):
    """Save these steps."""

    steps: Container[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", fixed_steps(self.steps))

    def should_save(
        self,
        step: PolicyCheckpointInfo,
        previous_steps: Sequence[PolicyCheckpointInfo],  # noqa: ARG002 - the protocol's signature
        *,
        context: DecisionContext,  # noqa: ARG002 - the protocol's signature
    ) -> bool:
        """Return whether the step is one of these."""
        return step.step in self.steps


@dataclasses.dataclass(frozen=True)
class InitialSavePolicy(_Joinable):
    """Save when there is no checkpoint yet."""

    def should_save(
        self,
        step: PolicyCheckpointInfo,  # noqa: ARG002 - the protocol's signature
        previous_steps: Sequence[PolicyCheckpointInfo],
        *,
        context: DecisionContext,  # noqa: ARG002 - the protocol's signature
    ) -> bool:
        """Return whether nothing was saved before."""
        return not previous_steps


@dataclasses.dataclass(frozen=True)
class PreemptionCheckpointingPolicy(_Joinable):
    """Save when the machine is about to be taken away."""

    def should_save(
        self,
        step: PolicyCheckpointInfo,  # noqa: ARG002 - the protocol's signature
        previous_steps: Sequence[PolicyCheckpointInfo],  # noqa: ARG002 - the protocol's signature
        *,
        context: DecisionContext,
    ) -> bool:
        """Return whether preemption was announced."""
        return context.reached_preemption


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousCheckpointingPolicy(_Joinable):
    """Save whenever no save is in progress, and at least `minimum_interval_secs` seconds after the previous one."""

    minimum_interval_secs: float | None = None

    def __post_init__(self) -> None:
        if self.minimum_interval_secs is not None:
            check_at_least("ContinuousCheckpointingPolicy.minimum_interval_secs", self.minimum_interval_secs, 0)

    def should_save(
        self,
        step: PolicyCheckpointInfo,
        previous_steps: Sequence[PolicyCheckpointInfo],
        *,
        context: DecisionContext,
    ) -> bool:
        """Return whether no save is in progress and the previous step is old enough."""
        if context.is_saving_in_progress:
            return False
        if not previous_steps or self.minimum_interval_secs is None:
            return True
        return (step.time - previous_steps[-1].time).total_seconds() >= self.minimum_interval_secs


@dataclasses.dataclass(frozen=True)
class BoundedOverheadPolicy(_Joinable):
    """Save as often as possible while saves hold up the training for at most `max_fraction` of its time.

    Every save is paid for by training before the next one: both its own hold-up, and all of them together since the
    training began, are then at most that share of the time. What a save costs is measured, so the first of a process
    always goes ahead, and a save that turns out expensive delays those after it. `minimum_interval_secs` keeps a
    distance even where saves cost next to nothing; after `maximum_interval_secs` a step is saved whatever it costs, and
    the share may be exceeded: it bounds what a crash can lose. Both count from the end of the last hold-up. Never saves
    while a save is in progress, which would only wait for it. Raises ConfigError (a ValueError) where nobody measures.
    """

    max_fraction: float
    _: dataclasses.KW_ONLY
    minimum_interval_secs: float = 0.0
    maximum_interval_secs: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_fraction <= 1:
            raise noted(
                ConfigError(f"BoundedOverheadPolicy.max_fraction must be above 0 and at most 1: {self.max_fraction!r}"),
                "0.03 lets saves take three percent of the time.",
            )
        check_at_least("BoundedOverheadPolicy.minimum_interval_secs", self.minimum_interval_secs, 0)
        if self.maximum_interval_secs is not None:
            name = "BoundedOverheadPolicy.maximum_interval_secs"
            check_at_least(name, self.maximum_interval_secs, self.minimum_interval_secs)

    def should_save(
        self,
        step: PolicyCheckpointInfo,  # noqa: ARG002 - the protocol's signature
        previous_steps: Sequence[PolicyCheckpointInfo],  # noqa: ARG002 - the protocol's signature
        *,
        context: DecisionContext,
    ) -> bool:
        """Return whether the saves so far are paid for, or the last one is too long ago."""
        costs = context.costs
        if costs is None:
            raise noted(
                ConfigError(f"cannot bound the overhead with '{self!r}': the context has no costs"),
                "Whoever makes the DecisionContext has to measure its saves and give `costs=SaveCosts(...)`.",
            )
        if context.is_saving_in_progress:
            return False
        if costs.last_ended is None:
            return True
        since = costs.now - costs.last_ended
        if self.maximum_interval_secs is not None and since >= self.maximum_interval_secs:
            return True
        return since >= self.minimum_interval_secs and self._is_paid_for(costs, since)

    def _is_paid_for(self, costs: SaveCosts, since: float) -> bool:
        # The last save alone as well: else a long pause would save up for a burst of saves.
        last = costs.last_blocked_secs <= self.max_fraction * (costs.last_blocked_secs + since)
        return last and costs.blocked_secs <= self.max_fraction * (costs.now - costs.began)


@dataclasses.dataclass(frozen=True)
class AnySavePolicy(_Joinable):
    """Save what at least one of the policies wants saved; they are asked in order, until one does."""

    policies: Sequence[SaveDecisionPolicy]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))

    def should_save(
        self,
        step: PolicyCheckpointInfo,
        previous_steps: Sequence[PolicyCheckpointInfo],
        *,
        context: DecisionContext,
    ) -> bool:
        """Return whether one of the policies says so."""
        return any(policy.should_save(step, previous_steps, context=context) for policy in self.policies)


@dataclasses.dataclass(frozen=True)
class _FunctionPolicy(_Joinable):
    """Save when the function says so, given the step and the step saved last (None: none was)."""

    should_save_fn: Callable[[int, int | None], bool]

    def should_save(
        self,
        step: PolicyCheckpointInfo,
        previous_steps: Sequence[PolicyCheckpointInfo],
        *,
        context: DecisionContext,  # noqa: ARG002 - the protocol's signature
    ) -> bool:
        return bool(self.should_save_fn(step.step, previous_steps[-1].step if previous_steps else None))


def decision_from_options(
    *,
    save_interval_steps: int = 1,
    save_on_steps: Iterable[int] | Container[int] | None = None,
    should_save_fn: Callable[[int, int | None], bool] | None = None,
) -> AnySavePolicy:
    """Return the policy that the manager's options stand for; a function takes the place of interval and steps.

    The first step is saved too, unless there is a function; and so is whatever step preemption is announced at. Raises
    ConfigError (a ValueError) for an interval that is not above zero. A manager that only reads needs no policy.

    >>> decision_from_options(save_interval_steps=3).policies[0]
    FixedIntervalPolicy(interval=3)
    """
    if should_save_fn is not None:
        return AnySavePolicy([_FunctionPolicy(should_save_fn), PreemptionCheckpointingPolicy()])
    check_positive("save_interval_steps", save_interval_steps)
    steps = SpecificStepsPolicy(frozenset() if save_on_steps is None else fixed_steps(save_on_steps))
    return AnySavePolicy(
        [FixedIntervalPolicy(save_interval_steps), steps, PreemptionCheckpointingPolicy(), InitialSavePolicy()]
    )


def _joined(*policies: SaveDecisionPolicy) -> AnySavePolicy:
    """Return the union, flat."""
    flat: list[SaveDecisionPolicy] = []
    for policy in policies:
        flat += policy.policies if type(policy) is AnySavePolicy else [policy]
    return AnySavePolicy(flat)
