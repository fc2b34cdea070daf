"""How a checkpoint of Orbax is recognised, and read as if it had a manifest of ours.

The rule: what Orbax itself would restore is a checkpoint, and no more. A folder with a tree in it is one, as the single
item "state"; so is a folder of items, a step of a manager or what `v1` saves. A folder of checkpoints is none. Where
checkpoints are written in place, on gs://, only what was committed is one. Whatever is not understood is left out only
if Orbax would leave it out; what has to be there and is not is damage, and named.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from milepost.errors import DamagedError, InvalidLayoutError, MissingDataError

from milepost_tensorstore.orbax.recognising_files import Folder, checked
from milepost_tensorstore.orbax.recognising_items import is_tree, recognised
from milepost_tensorstore.orbax.recognising_names import INDICATOR, KEYS, STEP, is_certain, is_likely

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from milepost.protocols import Json, Storage

__all__ = ["OrbaxLayout"]

_COMMIT = "commit_success.txt"
_METRICS = "metrics"
_STATE = "state"
_LARGEST = 1 << 63

_KINDS: Mapping[str, tuple[type, ...]] = {
    "item_handlers": (dict, str),
    "metrics": (dict,),
    "performance_metrics": (dict,),
    "init_timestamp_nsecs": (int,),
    "commit_timestamp_nsecs": (int,),
    "custom_metadata": (dict,),
}


class OrbaxLayout:
    """Reads the checkpoints of Orbax; keeps no state between calls."""

    def read(self, storage: Storage, prefix: str, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the manifest of what is below a prefix; None where it is no checkpoint of Orbax.

        Raises `InvalidLayoutError` for one that was not finished, and `DamagedError` for one that cannot be read.
        """
        if not prefix:
            return None  # no folder has this one: a single file is asked about
        folder = Folder(storage, prefix, names)
        step = _Step(folder)
        items = dict(step.items())
        if not items:
            if STEP in folder.names or INDICATOR in folder.names:
                raise MissingDataError(f"cannot read {folder.url!r}: {step.lack()}")
            return None
        _check_finished(folder)
        return step.document(items)

    def recognises(self, storage: Storage, prefix: str, names: Sequence[str]) -> bool:
        """Say whether a folder is a checkpoint that Orbax would restore, by the names in it and in a few folders."""
        return is_likely(Folder(storage, prefix, names), _check_finished)

    def owns(self, storage: Storage, prefix: str, names: Sequence[str]) -> bool:
        """Say whether a folder is labelled as a checkpoint of Orbax, or holds trees as only Orbax lays them out."""
        return is_certain(Folder(storage, prefix, names), _check_finished)


class _Step:
    """The folder of one checkpoint, which is one item or has several."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._where = folder.file(STEP)
        said = folder.read_object(STEP)
        self._labelled = said is not None or INDICATOR in folder.names
        self._said = _checked_step(said or {}, self._where)

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the items by name."""
        handlers = self._said.get("item_handlers") or {}
        single = handlers if isinstance(handlers, str) else self._handler_above()
        if isinstance(handlers, str) or is_tree(self._folder) or (single and not self._labelled):
            item = recognised(self._folder, "", single)
            if item is not None:
                yield _STATE, item
            return
        folders = list(self._folder.folders())
        if not self._labelled and any(STEP in one.names for one in folders):
            return  # a folder of checkpoints
        yield from self._named(folders, handlers)

    def _named(self, folders: list[Folder], handlers: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        found = 0
        # Beside what is an item for certain, whatever can be understood is one; old steps have no file that lists them.
        if not (self._labelled or any(is_tree(one) or KEYS & one.names for one in folders)):
            folders = []
        for folder in folders:
            if folder.name == _METRICS and _METRICS in folder.names:
                continue
            item = recognised(folder, f"{folder.name}/", handlers.get(folder.name) or "")
            if item is not None:
                found += 1
                yield folder.name, item
        if not found and not self._labelled:
            item = recognised(self._folder, "", "")
            if item is not None:
                yield _STATE, item

    def _handler_above(self) -> str:
        """Return the handler of an item whose own folder this is, "" where nobody says."""
        above = None if self._labelled else self._folder.above()
        handlers: Any = None
        with contextlib.suppress(DamagedError):  # it is of another folder, and may be of something else altogether
            said = above.read_object(STEP) if above is not None else None
            handlers = _checked_step(said or {}, self._where).get("item_handlers")
        return (handlers.get(self._folder.name) or "") if isinstance(handlers, dict) else ""

    def lack(self) -> str:
        """Say what is missing of a checkpoint without items."""
        handlers = self._said.get("item_handlers") or {}
        if isinstance(handlers, str):
            return f"it has neither '_METADATA' nor 'manifest.ocdbt', and was saved with {handlers!r}"
        names = ", ".join(map(repr, handlers))
        return f"of its items {names} none is there" if names else "it has no items"

    def document(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Return the manifest."""
        said = self._said
        own = [item["prefix"] for item in items.values() if not item["writer"]]
        performance = said.get("performance_metrics")
        return {
            "attempt": f"orbax-{self._folder.identity}",
            "init_timestamp_nsecs": said.get("init_timestamp_nsecs") or 0,
            "commit_timestamp_nsecs": said.get("commit_timestamp_nsecs") or 0,
            "written_by": {"layout": "orbax"} | ({"performance_metrics": performance} if performance else {}),
            "items": items,
            "files": [file for prefix in own for file in self._files(prefix)],
            "custom_metadata": self._custom(),
            "metrics": self._metrics(),
            "version": 1,
        }

    def _files(self, prefix: str) -> Iterator[dict[str, Json]]:
        folder = self._folder.folder(prefix) if prefix else self._folder
        for key, size in folder.sizes():
            yield {"path": key.removeprefix(self._folder.prefix), "size": size, "checksum": ""}

    def _custom(self) -> dict[str, Any] | None:
        unknown = {key: value for key, value in self._said.items() if key not in _KINDS and key != "item_metadata"}
        custom = self._said.get("custom_metadata")
        if custom and unknown:
            raise DamagedError(
                f"cannot believe {self._where!r}: it has custom metadata, and the unknown keys {sorted(unknown)!r}"
            )
        return custom or unknown or None

    def _metrics(self) -> Json:
        found: Any = None
        if f"{_METRICS}/" in self._folder.names:
            folder = self._folder.folder(_METRICS)
            body = folder.read(_METRICS)
            found = None if body is None else folder.parsed(_METRICS, body)
        if found is None:
            found = self._said.get("metrics") or None
        return found if found is None else _as_stored(found)


def _checked_step(said: dict[str, Any], where: str) -> dict[str, Any]:
    for key, kinds in _KINDS.items():
        value = said.get(key)
        if value is not None and type(value) not in kinds:
            raise DamagedError(f"cannot believe {where!r}: its {key!r} is {value!r:.60}")
        if type(value) is int and not 0 <= value < _LARGEST:
            raise DamagedError(f"cannot believe {where!r}: its {key!r} is {value!r:.60}, which is no time")
    handlers = said.get("item_handlers")
    for name, handler in handlers.items() if isinstance(handlers, dict) else ():
        if handler is not None:
            checked(handler, str, f"handler of item {name!r:.60}", where)
    return said


def _check_finished(folder: Folder) -> None:
    """Raise for what was not committed, where it would be seen all the same."""
    if not folder.storage.url.startswith("gs://") or _COMMIT in folder.names:
        return
    above = folder.above()
    if above is None or _COMMIT not in above.names:  # the folder of an item has its commit object above it
        raise InvalidLayoutError(
            f"cannot open {folder.url!r}: it has no {_COMMIT!r}: it is a save that was not finished"
        )


def _as_stored(value: Any, *, top: bool = True) -> Any:
    """Return metrics as a manifest has them: JSON without NaN and infinities, an object at the top.

    >>> _as_stored({"loss": float("nan"), "!a": 1}), _as_stored(0.5), _as_stored({"!a": 1})
    ({'loss': {'!float': 'nan'}, '!a': 1}, {'!value': 0.5}, {'!!a': 1})
    """
    stored = value
    if isinstance(value, dict):
        stored = {key: _as_stored(one, top=False) for key, one in value.items()}
        if len(stored) == 1 and next(iter(stored)).startswith("!"):
            stored = {f"!{key}": one for key, one in stored.items()}
        return stored
    if isinstance(value, list):
        stored = [_as_stored(one, top=False) for one in value]
    elif isinstance(value, float) and not math.isfinite(value):
        stored = {"!float": str(value)}
    return {"!value": stored} if top else stored
