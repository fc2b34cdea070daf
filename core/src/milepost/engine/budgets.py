"""How many bytes a save or a load may hold beyond the state itself, when nobody says.

The rule: a blocking save needs little, since the caller waits while the writers work. A save that returns early has to
hold what it has not written yet wherever the state itself can change, so it may use a quarter of the memory that is
free: enough not to keep training waiting, and never the last of it. Views of host memory do not count.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MIB", "automatic_budget"]

MIB = 1 << 20


def automatic_budget(*, lasting: bool) -> int:
    """Return the bytes to hold at most: 64 MiB, or for a save that returns early a quarter of what is free."""
    return max(64 * MIB, _free() // 4) if lasting else 64 * MIB


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
