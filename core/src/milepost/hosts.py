"""How the processes of a job act as one.

The rule: there are two verbs only. `decide`: one acts, all learn. `together`: all act, all learn. Both return on every
host or raise on every host, so that no host goes on alone and none waits for one that has failed. Nothing is decided by
a host's own view of a file system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OneHost"]

T = TypeVar("T")


class OneHost:
    """A job of one process."""

    @property
    def index(self) -> int:
        """Always 0."""
        return 0

    @property
    def count(self) -> int:
        """Always 1."""
        return 1

    def owner(self, device: Any) -> int:  # noqa: ARG002 - the protocol's
        """Return 0: every device is here."""
        return 0

    def decide(self, phase: str, act: Callable[[], T]) -> T:  # noqa: ARG002 - the protocol's
        """Act."""
        return act()

    def together(self, phase: str, act: Callable[[], T]) -> list[T]:  # noqa: ARG002 - the protocol's
        """Act."""
        return [act()]
