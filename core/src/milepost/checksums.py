"""How bytes are fingerprinted: XXH3, 64 bits, in sixteen hex digits behind its name.

The rule: a checksum must be so cheap that nobody switches it off. XXH3 runs at memory speed and finds every kind of
damage that happens by itself; it is no defence against an attacker, who could rewrite data and checksum alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from milepost.protocols import Buffer

__all__ = ["ALGORITHM", "Running", "fingerprint"]

ALGORITHM = "xxh3_64"


def fingerprint(data: Buffer) -> str:
    """Return the checksum of some bytes.

    >>> fingerprint(b"")
    'xxh3_64:2d06800538d394c2'
    """
    return f"{ALGORITHM}:{xxhash.xxh3_64_hexdigest(data)}"


class Running:
    """A checksum that grows with the bytes it is shown, and counts them.

    >>> running = Running()
    >>> running.update(b"")
    >>> running.fingerprint() == fingerprint(b""), running.size
    (True, 0)
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self.size: int = 0

    def update(self, data: Buffer) -> None:
        """Add bytes to the end."""
        self._hash.update(data)
        self.size += len(data)

    def fingerprint(self) -> str:
        """Return the checksum of everything so far."""
        return f"{ALGORITHM}:{self._hash.hexdigest()}"
