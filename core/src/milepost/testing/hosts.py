"""A cluster of threads: hosts that share a process, to test what many processes will do.

The rule: both verbs return on every host or raise on every host, within a deadline; what one host returns reaches the
others through JSON, as it would over a network.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from milepost.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ThreadCluster"]

T = TypeVar("T")


class ThreadCluster:
    """`count` hosts; the devices of the process belong to them in turn."""

    def __init__(self, count: int, *, deadline: float = 30.0) -> None:
        self.count = count
        self.deadline = deadline
        self._barrier = threading.Barrier(count)
        self._answers: list[Any] = [None] * count
        self.phases: list[str] = []

    def run(self, act: Callable[[Any], T]) -> list[T | BaseException]:
        """Run a function on every host; return by host number what it returned or raised."""
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(act, _ThreadHost(self, index)) for index in range(self.count)]
            return [future.exception() or future.result() for future in futures]

    def meet(self, index: int, phase: str, answer: Any) -> list[Any]:
        """Hand in an answer and get everybody's; raises `DeadlineError` if a host does not arrive."""
        self._answers[index] = answer
        try:
            self._barrier.wait(self.deadline)
            answers = list(self._answers)
            self._barrier.wait(self.deadline)
        except threading.BrokenBarrierError as error:
            raise DeadlineError(f"a host did not arrive within {self.deadline} seconds in phase {phase!r}") from error
        if index == 0:
            self.phases.append(phase)
        return answers


class _ThreadHost:
    def __init__(self, cluster: ThreadCluster, index: int) -> None:
        self._cluster = cluster
        self.index = index
        self.count = cluster.count

    def owner(self, device: Any) -> int:
        return int(device.id) % self.count

    def decide(self, phase: str, act: Callable[[], T]) -> T:
        return self._shared(phase, act if self.index == 0 else None)[0]

    def together(self, phase: str, act: Callable[[], T]) -> list[T]:
        return self._shared(phase, act)

    def _shared(self, phase: str, act: Callable[[], T] | None) -> list[T]:
        answer: tuple[Any, BaseException | None] = (None, None)
        if act is not None:
            try:
                answer = (json.loads(json.dumps(act())), None)
            except BaseException as error:  # noqa: BLE001 - it is raised on every host
                answer = (None, error)
        answers = self._cluster.meet(self.index, phase, answer)
        failures = [failure for _, failure in answers if failure is not None]
        if failures:
            raise failures[0]
        return [value for value, _ in answers]
