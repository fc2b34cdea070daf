"""What an array is called in Orbax's layout.

The rule: Orbax joins the keys of a leaf's path by "." and escapes nothing. So two leaves may come to one name, and with
one folder for each array a name may lead anywhere: both are refused before anything is written.
"""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING

from milepost.errors import ManifestError, UnsupportedLeafError, noted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from milepost.protocols import ArraySpec

__all__ = ["check", "dotted", "safe", "unsafe"]

_LONGEST = 255
_TAKEN = frozenset(
    {
        *("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "_strings.json", "array_metadatas", "commit_success.txt"),
        *("d", "manifest.ocdbt", "orbax.checkpoint"),
    }
)


def dotted(name: str) -> str:
    """Return the name in Orbax's layout of an array that milepost calls by that name.

    >>> dotted("params/w"), dotted("a~1b/c~0d")
    ('params.w', 'a/b.c~d')
    """
    name = name.replace("/", ".")
    return name.replace("~1", "/").replace("~0", "~") if "~" in name else name


def check(specs: Iterable[ArraySpec], *, folders: bool) -> None:
    """Raise one `UnsupportedLeafError` that lists every array whose name cannot be kept apart or cannot be written.

    With `folders`, each array is a folder of that name; otherwise the name is a key of a database.
    """
    known: dict[str, list[str]] = collections.defaultdict(list)
    for spec in specs:
        known[dotted(spec.name)].append(spec.name)
    bad = [
        f"{' and '.join(map(repr, names))} would both be {name!r}" for name, names in known.items() if len(names) > 1
    ]
    bad += [f"{names[0]!r} cannot be written as UTF-8" for name, names in known.items() if not _encodes(name)]
    if folders and not bad:
        bad += [f"{names[0]!r} {why}" for name, names in known.items() if (why := unsafe(name)) is not None]
        bad += [
            f"{known[inner][0]!r} would lie in the folder of {known[outer][0]!r}" for outer, inner in _nested(known)
        ]
    if bad:
        raise noted(
            UnsupportedLeafError(f"the layout of Orbax, which joins keys by '.', cannot hold: {'; '.join(bad)}"),
            "rename the keys, or take the array writer 'safetensors'",
        )


def _encodes(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def unsafe(name: str) -> str | None:
    """Say why a name cannot be that of a folder; None if it can.

    >>> unsafe("params.w"), unsafe("a/../b")
    (None, 'cannot be a folder: it has an empty part, or one of dots')
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "cannot be a folder: it has an empty part, or one of dots"
    if any(len(part.encode(errors="replace")) > _LONGEST for part in parts):
        return f"cannot be a folder: its name is longer than {_LONGEST} bytes"
    if parts[0] in _TAKEN or parts[0].startswith("ocdbt.process_"):
        return "cannot be a folder: a file of the layout has this name"
    return None


def _nested(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    # In this order everything that lies within a folder follows it at once.
    ordered = sorted(names, key=lambda name: name.split("/"))
    return [(one, other) for one, other in itertools.pairwise(ordered) if other.startswith(f"{one}/")]


def safe(path: str) -> str:
    """Return a relative path as it is, or raise `ManifestError` if it could lead out of the checkpoint.

    >>> safe("ocdbt.process_0/d/1f")
    'ocdbt.process_0/d/1f'
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
        raise ManifestError(f"the checkpoint cannot be believed: it refers to a file {path!r}")
    return path
