"""Which of many names hold a commit object, by listing keys in order instead of asking about each.

The rule: a page of keys decides about every name up to its last key, and the next page begins at the commit object of
the first name that is still open, so that nobody's data are listed for their own sake. A page costs about what a dozen
looks do, and pages come one after the other, while looks go out together: listing stops where it is not worth it.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from milepost.protocols import COMMIT_OBJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["listed"]


def listed(
    keys_after: Callable[[str], Sequence[str]], names: Iterable[str], *, worth: int = 0
) -> tuple[set[str], list[str]]:
    """Return those of some names that hold a commit object, and those about which nothing is known.

    `keys_after` returns the first keys after a key, in the order of their UTF-8 bytes. Names stay unknown if a page did
    not decide about as many of them as `worth` says, on the average.

    >>> keys = ["7/a", "7/commit_success.txt", "8/a", "9/commit_success.txt"]
    >>> found, unknown = listed(lambda last: [key for key in keys if key > last][:2], ["9", "8", "7"])
    >>> sorted(found), unknown
    (['7', '9'], [])
    """
    # By their commit objects, not by name: "7!/" comes before "7/".
    wanted = sorted(f"{name}/{COMMIT_OBJECT}" for name in set(names))
    sought = frozenset(wanted)
    found: set[str] = set()
    pages = decided = 0
    last = ""
    while decided < len(wanted):
        if decided < worth * pages:
            break
        page = keys_after(max(last, wanted[decided][:-1]))
        pages += 1
        if not page:
            decided = len(wanted)
            break
        found.update(sought.intersection(page))
        last = page[-1]
        decided = bisect.bisect_right(wanted, last)
    return set(map(_name, found)), list(map(_name, wanted[decided:]))


def _name(key: str) -> str:
    return key.removesuffix(f"/{COMMIT_OBJECT}")
