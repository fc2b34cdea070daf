"""What an array is called in its group.

The rule: a name is the path of its leaf, as people know it, wherever Zarr and file systems can bear that; what they
cannot is escaped behind "~x", which no name of a leaf contains. The path follows from the name alone, so that every
host and every reader finds it without asking.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from milepost.errors import UnsupportedLeafError
from milepost.protocols import COMMIT_OBJECT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DOCUMENT", "check", "hidden", "path_of"]

DOCUMENT = "zarr.json"
"""What describes an array or a group, below its path."""

_LONGEST = 200
"""Bytes of one part of a path: file systems end at 255, and some storages add a suffix while they write."""

_KEPT = 120
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_FILE = re.compile(r"c(\.\d+)*(/|$)")
_TAKEN = frozenset({DOCUMENT, ".zarray", ".zattrs", ".zgroup", ".zmetadata", COMMIT_OBJECT, "begun"})


def path_of(name: str) -> str:
    r"""Return the path of an array below its item's group.

    >>> path_of("params/dense/kernel")
    'params/dense/kernel'
    >>> path_of("../__a/zarr.json/c\\d/")
    '~x2e./~x5f_a/~x7aarr.json/c~x5cd/~x'
    """
    return "/".join(map(_segment, name.split("/")))


def _segment(text: str) -> str:
    safe = _UNSAFE.sub(lambda found: _escaped(found[0]), text)
    if not safe:
        return "~x"
    if safe in _TAKEN or safe.startswith("__") or not safe.strip("."):
        safe = _escaped(safe[0]) + safe[1:]
    raw = safe.encode()
    if len(raw) > _LONGEST:
        digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
        return f"{raw[:_KEPT].decode(errors='ignore')}~h{digest}"
    return safe


def _escaped(character: str) -> str:
    return "".join(f"~x{byte:02x}" for byte in character.encode(errors="surrogatepass"))


def hidden(paths: Iterable[str]) -> set[str]:
    """Return the paths that are below another.

    >>> sorted(hidden(["a", "a/b/c", "d/e"]))
    ['a/b/c']
    """
    known = set(paths)
    return {path for path in known if not known.isdisjoint(_above(path))}


def _above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def check(paths: Iterable[str]) -> None:
    """Refuse arrays that would lie among the chunks of another.

    An array can stand where a group is only in a tree with two keys of one text, such as 1 and "1".
    """
    known = set(paths)
    for path in sorted(known):
        for above in _above(path):
            if above in known and _FILE.match(path, len(above) + 1):
                raise UnsupportedLeafError(
                    f"a Zarr group cannot hold array {path!r}: that is where the chunks of array {above!r} are"
                )
