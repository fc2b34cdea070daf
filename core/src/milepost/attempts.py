"""What the id of an attempt to save says: when it began, where, and by which process.

The rule: nothing is removed that cannot be proven to be ours and dead. An id therefore names the place (machine, boot
and process namespace, hashed) and the process, so that anybody can tell from a name alone whether its writer still
runs; a writer in another place is dead only when it is older than any save could last. Storage backends and commit
strategies put the id into the names they make up.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import hashlib
import os
import re
import secrets
import socket
import time
from pathlib import Path

__all__ = ["DAY", "Attempt", "fate", "new_attempt", "parse_attempt", "place"]

DAY = 24 * 3600.0
"""The age in seconds from which a writer elsewhere counts as dead, unless the caller says otherwise."""

_FORM = re.compile(r"(?P<time>\d{8}T\d{6}Z)-(?P<place>[0-9a-f]{8})-(?P<pid>[0-9a-f]{1,7})-(?P<random>[0-9a-f]{12})")


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt's id, read: seconds since the epoch at its start, hashed place, process id, random part."""

    started: float
    place: str
    pid: int
    random: str


@functools.cache
def place() -> str:
    """Return eight hex digits that two processes share only if one can see whether the other runs."""
    # Containers on one machine share the boot id and often the host name; a process id means nothing across them.
    parts = [socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _namespace()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def new_attempt() -> str:
    """Return an id that no other attempt has, for a save by this process that starts now."""
    now = dt.datetime.fromtimestamp(time.time(), dt.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{place()}-{os.getpid():x}-{secrets.token_hex(6)}"


def parse_attempt(text: str) -> Attempt | None:
    """Read an id; None for anything that is not one.

    >>> parse_attempt("20261122T160000Z-0badcafe-1f-0123456789ab").pid
    31
    >>> parse_attempt("7") is None
    True
    """
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    try:
        began = dt.datetime.strptime(found["time"], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    except ValueError:
        return None
    return Attempt(began.timestamp(), found["place"], int(found["pid"], 16), found["random"])


def fate(attempt: str, *, older_than: float = DAY, now: float | None = None) -> tuple[bool, str]:
    """Say whether the writer of an attempt is dead, and how that is known.

    >>> fate("20010101T000000Z-0badcafe-1f-0123456789ab")[0]
    True
    """
    known = parse_attempt(attempt)
    if known is None:
        return False, "its name is not that of an attempt to save"
    age = (time.time() if now is None else now) - known.started
    if age > older_than:
        return True, f"it began {age / 3600:.1f} hours ago"
    if known.place != place():
        return False, f"it began {age / 3600:.1f} hours ago on another machine, or before this one was restarted"
    if _runs(known.pid):
        return False, f"its process {known.pid} is running"
    return True, f"its process {known.pid} is gone"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it exists and belongs to somebody else
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""
