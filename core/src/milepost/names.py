"""What the name of a folder says: the step it holds, or that it is not finished.

This module decides which names are steps. The rule: a format reads exactly the names that it writes, so that a step has
one name in it and a name is one step; digits are ASCII, and a prefix means itself. Names alone are looked at here,
never a storage.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import TYPE_CHECKING, Literal

from milepost.attempts import parse_attempt
from milepost.errors import ConfigError

if TYPE_CHECKING:
    from typing import SupportsIndex

__all__ = [
    "StandardNames",
    "Temporary",
    "any_step",
    "is_temporary",
    "parse_temporary",
    "step_of",
    "temporary_name",
    "underscored",
]

_TEMPORARY = ".orbax-checkpoint-tmp"
_BY_CALLER = "-made-"
_MARKS: tuple[tuple[Literal["strategy", "caller"], str], ...] = (("caller", _BY_CALLER), ("strategy", "-"))
_BY_REFERENCE = re.compile(r"(?:-[0-9]+)?")
_STEP = re.compile(r"(?:.+_)?(?P<step>[0-9]+)", re.DOTALL)
_ANY_STEP = re.compile(r"(?:.*_)?(?P<step>[0-9]+)", re.DOTALL)
_TEMPORARY_STEP = re.compile(rf"(?P<step>[0-9]+){re.escape(_TEMPORARY)}")


@dataclasses.dataclass(frozen=True, slots=True)
class StandardNames:
    """Names made of an optional prefix and a number, padded with zeros to at least `length` digits.

    >>> StandardNames("step", 4).build_name(23)
    'step_0023'
    >>> StandardNames("step", 4).parse("step_0023")
    23
    """

    prefix: str | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if self.prefix is not None and (set(self.prefix) & set("/\0") or _TEMPORARY in self.prefix):
            raise ConfigError(
                f"no step can be named with the prefix {self.prefix!r}: "
                f"it holds a slash, a null character or {_TEMPORARY!r}"
            )

    def build_name(self, step: SupportsIndex) -> str:
        """Return the name of a step; `TypeError` for what is no whole number."""
        return underscored(self.prefix) + str(operator.index(step)).zfill(self.length or 0)

    def parse(self, name: str) -> int | None:
        """Return the step of a name; None for any name that `build_name` does not give for a step from 0 on."""
        digits = name.removeprefix(underscored(self.prefix))
        step = _number(digits) if digits.isdecimal() else None
        return step if step is not None and self.build_name(step) == name else None


@dataclasses.dataclass(frozen=True, slots=True)
class Temporary:
    """The name of a folder that is no finished checkpoint, read.

    `final` is the name it is meant for. `maker` is who made it: a save of milepost ("strategy"), milepost on behalf of
    somebody who writes the checkpoint himself ("caller"), or the reference; None where the name does not tell.
    `attempt` is the id of the attempt, "" unless milepost made the folder; `ended` says that nobody writes there any
    more, as it was put aside or is being removed.
    """

    final: str
    maker: Literal["strategy", "caller", "reference"] | None
    attempt: str = ""
    ended: bool = False


def underscored(prefix: str | None) -> str:
    """Return the part of a name that stands before the number.

    >>> underscored("step"), underscored(""), underscored(None)
    ('step_', '_', '')
    """
    return "" if prefix is None else f"{prefix}_"


def is_temporary(name: str) -> bool:
    """Say whether a name is that of an unfinished checkpoint.

    >>> is_temporary("7.orbax-checkpoint-tmp-0"), is_temporary("7")
    (True, False)
    """
    return _TEMPORARY in name


def parse_temporary(name: str) -> Temporary | None:
    """Read the name of an unfinished checkpoint; None for any other.

    >>> parse_temporary("7.orbax-checkpoint-tmp-0")
    Temporary(final='7', maker='reference', attempt='', ended=False)
    """
    final, found, rest = name.rpartition(_TEMPORARY)
    if not found or not final:
        return None
    if _BY_REFERENCE.fullmatch(rest):
        return Temporary(final, "reference")
    for maker, mark in _MARKS:
        attempt, _, ended = rest.removeprefix(mark).partition(".")
        if parse_attempt(attempt) is not None:
            return Temporary(final, maker, attempt, ended=bool(ended))
    return Temporary(final, None)


def temporary_name(final: str, attempt: str) -> str:
    """Return the name of a folder that is made on request for whoever writes the checkpoint `final` himself."""
    return f"{final}{_TEMPORARY}{_BY_CALLER}{attempt}"


def step_of(name: str) -> int | None:
    """Return the step of a finished or unfinished checkpoint's name, in any standard format with a prefix or without.

    >>> step_of("23"), step_of("step_0023"), step_of("step_23.orbax-checkpoint-tmp-0"), step_of("step-23")
    (23, 23, 23, None)
    """
    found = _TEMPORARY_STEP.search(name) if is_temporary(name) else _STEP.fullmatch(name)
    return None if found is None else _number(found["step"])


def any_step(name: str) -> int | None:
    """Return the step of a finished checkpoint's name, in any standard format, also one whose prefix is empty.

    >>> any_step("02"), any_step("_4"), any_step("7.orbax-checkpoint-tmp-0")
    (2, 4, None)
    """
    found = _ANY_STEP.fullmatch(name)
    return None if found is None else _number(found["step"])


def _number(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:
        return None  # thousands of digits: Python refuses them, and a name of a storage may have them
