"""What must be true of a folder of checkpoints after a save was ended somewhere: the same words for every subject.

The rule: what a subject's own `load` says counts only if an independent reading of the files says the same.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from crash import packed
from crash.subjects import state

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from crash.subjects import State, Subject

__all__ = ["Found", "TornError", "check", "holdings", "memory"]

Found = dict[str, str | None]
"""By name, the label of what the checkpoint holds; None where there is none."""

LABELS = ("older", "old", "new", "next")


class TornError(AssertionError):
    """What no crash may leave behind was found."""


def check(subject: Subject, root: Path, allowed: Mapping[str, Collection[str | None]]) -> Found:
    """Return what is there, or raise TornError if it is not whole, not allowed, or cannot be lived with.

    The folder itself is left as it is: sweeping and saving again happen in copies, in both orders.
    """
    found = holdings(subject, root, allowed)
    for name, label in found.items():
        if label not in allowed[name]:
            raise TornError(f"{name!r} holds {label!r}, may hold {allowed[name]!r}: {_listing(root)}")
    with tempfile.TemporaryDirectory(dir=memory()) as scratch:
        swept = shutil.copytree(root, Path(scratch, "swept"), symlinks=True)
        _sweep(subject, swept, found)
        _save_again(subject, swept, found)
        retried = shutil.copytree(root, Path(scratch, "retried"), symlinks=True)
        _sweep(subject, retried, _save_again(subject, retried, found))
    return found


def memory() -> str | None:
    """Return a folder whose files are in memory; None, for the usual one, where this machine has none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 (folders made in it have names of their own)


def holdings(subject: Subject, root: Path, names: Collection[str]) -> Found:
    """Say which state each checkpoint holds, by `load` and by looking; they must agree."""
    return {name: _holding(subject, root, name) for name in names}


def _holding(subject: Subject, root: Path, name: str) -> str | None:
    try:
        loaded = _label(subject.load(root / name))
    except FileNotFoundError:
        if (root / name / "commit_success.txt").exists():
            raise TornError(f"{name!r} is committed and cannot be loaded: {_listing(root)}") from None
        return None
    except Exception as error:
        raise TornError(f"{name!r} cannot be loaded: {_listing(root)}") from error
    # An overwrite that is cut off where names cannot be exchanged leaves one of the two beside its name.
    places = [root / name] if (root / name).exists() else sorted(root.glob(f"*{name}*"))
    if loaded not in [_label_of_files(_look(place)) for place in places]:
        raise TornError(f"{name!r} is loaded as {loaded!r}, and no such thing is in {_listing(root)}")
    return loaded


def _look(place: Path) -> State:
    arrays: State = {}
    for file in sorted(place.rglob("*.safetensors")):
        try:
            arrays |= packed.unpack(file.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            raise TornError(f"{file} is torn: {file.stat().st_size} bytes") from error
    return arrays


def _label(arrays: State) -> str:
    for label in LABELS:
        expected = state(label)
        if arrays.keys() == expected.keys() and _bits(arrays) == _bits(expected):
            return label
    raise TornError(f"these arrays were never saved together: {list(arrays)}")


def _label_of_files(arrays: State) -> str:
    # Names inside a file, and what fills the gaps, are the writer's own business.
    for label in LABELS:
        if _bits(state(label)) <= _bits(arrays):
            return label
    raise TornError(f"these arrays were never saved together: {list(arrays)}")


def _bits(arrays: State) -> Counter[tuple[str, tuple[int, ...], bytes]]:
    return Counter((str(array.dtype), array.shape, array.tobytes()) for array in arrays.values())


def _sweep(subject: Subject, root: Path, found: Found) -> None:
    subject.sweep(root)
    _same(subject, root, found, "after the sweep")
    left = {entry.name for entry in root.iterdir()} - {name for name, label in found.items() if label}
    if left:
        raise TornError(f"the sweep did not remove {sorted(left)!r}")


def _save_again(subject: Subject, root: Path, found: Found) -> Found:
    try:
        subject.save(root / "2", state("next"), overwrite=found["2"] is not None)
    except Exception as error:
        raise TornError(f"'2' cannot be saved again: {_listing(root)}") from error
    expected = found | {"2": "next"}
    _same(subject, root, expected, "after saving again")
    return expected


def _same(subject: Subject, root: Path, expected: Found, when: str) -> None:
    now = holdings(subject, root, expected)
    if now != expected:
        raise TornError(f"{when}, {now!r} is there and not {expected!r}: {_listing(root)}")


def _listing(root: Path) -> list[str]:
    return sorted(f"{path.relative_to(root)}:{path.stat().st_size}" for path in root.rglob("*"))
