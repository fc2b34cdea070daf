"""Decide what goes wrong, with which request, and keep the book of what was asked.

The rule: a rule counts the requests that match it and strikes those it was told to, so that a test says "the third
change" and means it. A request is in the book from the moment it was received whole, before anything is done about it.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from milepost.testing.objects.wire import Call, Target

__all__ = ["ACTIONS", "WITHIN", "Book", "Entry", "Gate", "Request", "Rule"]

WITHIN = "delete_each"
"""The kind of each deletion of a batch; only rules that name it strike one, and only with a status."""

ACTIONS = frozenset(
    {
        "cut",
        "delay",
        "drop_after",
        "drop_before",
        "hold",
        "hold_after",
        "kill_after",
        "kill_before",
        "stall",
        "status",
    }
)
"""What a rule can do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A request that was received: the `number`-th since the book was opened.

    `path` is "/bucket/key" whichever protocol it came by, `kind` what was asked for, `mutating` whether it may change
    something. `status` and `bytes_out` are 0 as long as, or if, no reply is sent.
    """

    number: int
    method: str
    path: str
    query: Mapping[str, str]
    mutating: bool
    kind: str
    key: str
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclasses.dataclass(eq=False)
class Rule:
    """What happens to requests that match in everything that is not None, from the `nth` on, so many `times`.

    - "status": answer with `status` and `code`, and tell to come back after `retry_after` seconds; do nothing
    - "drop_before", "drop_after": close the connection before, or after, acting
    - "delay": wait `seconds`, then go on
    - "cut": act, then send half of the body under the length of the whole, and close
    - "stall": never answer, and do nothing
    - "kill_before", "kill_after": end the process `pid` before, or after, acting, and then answer nobody
    - "hold", "hold_after": wait for `release` before acting, or between acting and replying

    `reached` is set when the first request has come so far.
    """

    action: str
    method: str | None = None
    kind: str | None = None
    key: str | None = None
    mutating: bool | None = None
    nth: int | None = None
    times: int | None = 1
    status: int = 503
    code: str = ""
    retry_after: float | None = None
    seconds: float = 0.0
    pid: int = 0
    reached: threading.Event = dataclasses.field(default_factory=threading.Event, init=False)
    _decided: threading.Event = dataclasses.field(default_factory=threading.Event, init=False)
    _dropped: bool = dataclasses.field(default=False, init=False)
    _seen: int = dataclasses.field(default=0, init=False)
    _struck: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"cannot do {self.action!r}: a rule does one of {', '.join(sorted(ACTIONS))}")
        if self.action.startswith("kill") and self.pid <= 0:
            raise ValueError(f"cannot kill process {self.pid!r}: a rule that kills needs the number of a process")

    def release(self) -> None:
        """Let those that wait go on."""
        self._decided.set()

    def drop(self) -> None:
        """Close the connections of those that wait, with nothing done that is not done yet."""
        if not self._decided.is_set():
            self._dropped = True
            self._decided.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is decided, or so long; return whether to go on."""
        self._decided.wait(seconds)
        return not self._dropped

    def matches(self, request: Request) -> bool:
        """Count the request if it matches, and say whether it is one to strike."""
        if (request.kind == WITHIN) != (self.kind == WITHIN):
            return False
        wanted = ((self.method, request.method), (self.kind, request.kind), (self.mutating, request.mutating))
        if any(want not in {None, have} for want, have in wanted):
            return False
        if self.key is not None and not re.search(self.key, request.key):
            return False
        self._seen += 1
        return self._seen >= (self.nth or 1) and (self.times is None or self._struck < self.times)

    def strike(self) -> None:
        """Count one that was struck."""
        self._struck += 1


class Entry:
    """A place in the book, where the end of a request is written down."""

    def __init__(self, request: Request) -> None:
        self.request: Request = request

    def ended(self, status: int, bytes_out: int) -> None:
        """Write down what is sent."""
        self.request = dataclasses.replace(self.request, status=status, bytes_out=bytes_out)


class Book:
    """The requests that came, the rules for those that will, and what is permitted; for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._rules: list[Rule] = []
        self._kinds: frozenset[str] | None = None

    def received(self, call: Call, target: Target) -> tuple[Entry, Rule | None]:
        """Enter a request, and find the first rule that strikes it; every rule counts it."""
        with self._lock:
            request = Request(
                number=len(self._entries) + 1,
                method=call.method,
                path=target.path,
                query=call.query,
                mutating=target.mutating,
                kind=target.kind,
                key=target.key,
                bytes_in=len(call.body),
            )
            self._entries.append(Entry(request))
            return self._entries[-1], self._striking(request)

    def within(self, target: Target) -> Rule | None:
        """Find the rule that strikes one deletion of a batch, which has no entry of its own."""
        with self._lock:
            number, path = len(self._entries), target.path
            request = Request(number, "DELETE", path, {}, mutating=True, kind=WITHIN, key=target.key)
            return self._striking(request)

    def _striking(self, request: Request) -> Rule | None:
        striking = [rule for rule in self._rules if rule.matches(request)]
        if striking:
            striking[0].strike()
        return striking[0] if striking else None

    @property
    def requests(self) -> list[Request]:
        """What was asked, in the order in which it came."""
        with self._lock:
            return [entry.request for entry in self._entries]

    def forget(self) -> None:
        """Begin again with number 1."""
        with self._lock:
            self._entries = []

    def add(self, rule: Rule) -> None:
        """Follow a rule from now on, after those that there are."""
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        """Follow no rule any more; drop whatever waits for one."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.drop()

    def permit(self, kinds: Iterable[str] | None) -> None:
        """Let only these kinds of requests pass; None: all."""
        with self._lock:
            self._kinds = None if kinds is None else frozenset(kinds)

    def permits(self, kind: str) -> bool:
        """Say whether a kind may pass."""
        return self._kinds is None or kind in self._kinds


class Gate:
    """Through which every act goes, so that none happens once it is shut."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._acting = 0
        self._shut = False

    @property
    def shut(self) -> bool:
        """Whether nobody may act."""
        return self._shut

    def enter(self) -> bool:
        """Say whether to act; who may must `leave`."""
        with self._changed:
            if not self._shut:
                self._acting += 1
            return not self._shut

    def leave(self) -> None:
        """Have acted."""
        with self._changed:
            self._acting -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more, and wait until nobody is inside."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: self._acting == 0)

    def open(self) -> None:
        """Let everybody in again."""
        with self._changed:
            self._shut = False
