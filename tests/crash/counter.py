"""How a process is told where to end: the preloaded library, from Python.

The rule: the library is built by the session that uses it, and one `Plan` says everything about one run.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import subprocess
from pathlib import Path

__all__ = [
    "CUT",
    "FLUSH_AND_CUT",
    "KILL",
    "LIE_ABOUT_FILES",
    "LIE_ABOUT_FOLDERS",
    "Plan",
    "arm",
    "build",
    "disarm",
    "end",
]

KILL = 0
"""The process dies; what it handed to the kernel stays."""

CUT = 1
"""The file system loses its power, then the process dies."""

FLUSH_AND_CUT = 2
"""As CUT, after an unrelated fsync has made every name so far durable: what was not synced itself is still lost."""

LIE_ABOUT_FILES = 1
LIE_ABOUT_FOLDERS = 2
"""What is said to be synced, and is not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What happens at which change, from 1 on; 0 is never. See `change_counter.c`."""

    end_at: int = 0
    end_how: int = KILL
    fail_at: int = 0
    fail_errno: int = errno.ENOSPC
    fail_from: bool = False
    short_at: int = 0
    refuse_flags: bool = False
    lie: int = 0
    log: str = ""

    @property
    def last(self) -> int:
        """The number of the last change that is named here."""
        return max(self.end_at, self.fail_at, self.short_at)


class _Plan(ctypes.Structure):
    _fields_ = (
        ("end_at", ctypes.c_long),
        ("end_how", ctypes.c_int),
        ("fail_at", ctypes.c_long),
        ("fail_errno", ctypes.c_int),
        ("fail_from", ctypes.c_int),
        ("short_at", ctypes.c_long),
        ("refuse_flags", ctypes.c_int),
        ("lie", ctypes.c_int),
        ("prefix", ctypes.c_char_p),
        ("mount", ctypes.c_char_p),
        ("log", ctypes.c_char_p),
    )


def build(compiler: str, folder: Path) -> Path:
    """Compile the library; warnings are errors here as well."""
    library = folder / "change_counter.so"
    source = Path(__file__).with_name("change_counter.c")
    options = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([compiler, *options, "-o", str(library), str(source), "-ldl"], check=True)
    return library


def arm(plan: Plan, prefix: str, mount: str) -> None:
    """Count from here on what this process changes below the prefix, and follow the plan."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)} | {"log": plan.log.encode()}
    ctypes.CDLL(None).changes_arm(ctypes.byref(_Plan(**values, prefix=prefix.encode(), mount=mount.encode())))


def disarm() -> int:
    """Stop counting; return the number of changes since `arm`."""
    return int(ctypes.CDLL(None).changes_disarm())


def end() -> None:
    """End this process as its plan says, now."""
    ctypes.CDLL(None).changes_end()
