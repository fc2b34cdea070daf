"""How parts of a checkpoint are kept, and become one.

Decides what the parts may be, and what the manifest of the whole says. The rule: the array writer must find every part
as if it were another host's, so each writes under a number of its own, and the records stand beside each other.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from milepost import manifest as manifests
from milepost import urls
from milepost.attempts import new_attempt
from milepost.engine.deleting import delete
from milepost.engine.items import TreeItem
from milepost.engine.reading import open_checkpoint
from milepost.engine.recording import RecordingStorage
from milepost.engine.saving import Save, SaveRequest
from milepost.errors import AlreadyExistsError, ChecksumError, ConfigError, NotFoundError, RequestError, noted
from milepost.manifest import Item, Manifest
from milepost.path._finding import open_root, open_root_of
from milepost.plugins import installed
from milepost.protocols import CompletesCheckpoints
from milepost.routes import open_route, resolve
from milepost.settings import applied
from milepost.structure import LEAF, child_keys, key_text, leaf_paths, show_path
from milepost.trees import handlers_of, take_apart
from milepost.v1._context import current_settings
from milepost.v1._looking import located
from milepost.v1._saving import check_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.engine.reading import Checkpoint
    from milepost.manifest import FileEntry
    from milepost.path._finding import PathLike
    from milepost.protocols import Location, Staging

__all__ = ["PartialSaveReplacementError", "begin_part", "join_parts"]

_SUFFIX = ".partial_save"
_ITEM = "state"
_CHUNK = 8 << 20
_SHOWN = 20


class PartialSaveReplacementError(RequestError, ValueError):
    """Say which leaves of a part another part has already."""


class _PartSave(Save):
    """A save whose array writer takes this for one of several hosts."""

    number = 0

    def _location(self, storage: RecordingStorage, staging: Staging, folder: str) -> Location:
        return dataclasses.replace(super()._location(storage, staging, folder), host=self.number, hosts=self.number + 1)


def begin_part(
    path: PathLike, state: Any, custom_metadata: Mapping[str, Any] | None, *, lasting: bool
) -> tuple[Save, Callable[[], None]]:
    """Begin to save one more part; refuse one that cannot be joined with the others."""
    url = located(path)
    check_value(_ITEM, state)
    with applied(current_settings(), url):
        _check_free(url)
        _check_writer(url)
        parts = _parts(url)
        structures = [part.manifest.items[_ITEM].structure for part in parts.values()]
        _joined([*structures, take_apart(state, handlers_of(installed())).structure], url)
        number = max(parts, default=-1) + 1
        where = urls.join(url + _SUFFIX, str(number))
        save = _PartSave(SaveRequest(where, {_ITEM: TreeItem(state)}, custom_metadata=custom_metadata))
        save.number = number
        return save, save.prepare(lasting=lasting)


def join_parts(path: PathLike) -> None:
    """Make one checkpoint of all parts, and remove them."""
    url = located(path)
    with applied(current_settings(), url):
        parts = _parts(url)
        if not parts:
            _check_free(url)
            raise NotFoundError(f"cannot finalize {url!r}: no part of it was saved")
        whole, origins = _whole(list(parts.values()), url)
        if not _was_committed(url, whole):
            _commit(url, whole, origins)
        for part in parts.values():
            delete(part.url, missing_ok=True)
        root, name = open_root_of(url + _SUFFIX)
        root.storage.delete(f"{name}/")


def _check_free(url: str) -> None:
    root, name = open_root_of(url)
    if any(root.checkpoints([name])):
        raise AlreadyExistsError(f"cannot save a part of {url!r}: a checkpoint is there already")


def _check_writer(url: str) -> None:
    plugins = installed()
    route = resolve(url, plugins, writing=True)
    if isinstance(plugins.arrays(route.arrays)(**route.arrays_options), CompletesCheckpoints):
        raise noted(
            ConfigError(f"cannot save a part of {url!r}: files of the array writer {route.arrays!r} cannot be joined"),
            'configure another for it, such as arrays = "safetensors", and convert the whole with `milepost cp`',
        )


def _was_committed(url: str, whole: Item) -> bool:
    """Say whether the checkpoint is there already, because only the removal of its parts was cut off."""
    root, name = open_root_of(url)
    if not any(root.checkpoints([name])):
        return False
    there = open_checkpoint(url).manifest.items.get(_ITEM)
    if there is None or there.records != whole.records:
        _check_free(url)
    return True


def _parts(url: str) -> dict[int, Checkpoint]:
    """Return the parts by their numbers."""
    root = open_root(url + _SUFFIX)
    names = sorted(root.checkpoints(name for name in root.folders() if name.isdecimal()), key=int)
    return {int(name): open_checkpoint(urls.join(root.url, name)) for name in names}


def _whole(parts: Sequence[Checkpoint], url: str) -> tuple[Item, list[tuple[Checkpoint, str]]]:
    """Return the item that all parts are together, and each part with the prefix of its files."""
    items = [part.manifest.items[_ITEM] for part in parts]
    writers = {item.writer for item in items}
    if len(writers) > 1:
        raise ConfigError(f"cannot join the parts of {url!r}: they were written by {' and '.join(sorted(writers))}")
    structure, index = _joined([item.structure for item in items], url)
    shardings: list[dict[str, Any]] = []
    leaves: list[list[dict[str, Any]]] = []
    for item in items:
        leaves.append([_renumbered(leaf, len(shardings)) for leaf in item.leaves])
        shardings += item.shardings
    whole = Item(
        structure=structure,
        leaves=[leaves[part][at] for part, at in index],
        shardings=shardings,
        writer=items[0].writer,
        prefix="",
        records=[record for item in items for record in item.records],
    )
    return whole, [(part, item.prefix) for part, item in zip(parts, items, strict=True)]


def _renumbered(leaf: dict[str, Any], by: int) -> dict[str, Any]:
    arrays = {
        name: dataclasses.replace(array, sharding=array.sharding + by) if array.sharding is not None else array
        for name, array in leaf.get("arrays", {}).items()
    }
    return {**leaf, "arrays": arrays} if arrays else leaf


# --- committing ------------------------------------------------------------------------------------------------------


def _commit(url: str, whole: Item, origins: Sequence[tuple[Checkpoint, str]]) -> None:
    opened = open_route(resolve(url, writing=True))
    storage, strategy, attempt = opened.storage, opened.commit, new_attempt()
    staging = strategy.stage(storage, opened.route.name, attempt)
    try:
        target = RecordingStorage(storage, staging.prefix, staging.data)
        for part, prefix in origins:
            for file in part.manifest.files:
                name = f"{staging.prefix}{_ITEM}/{file.path.removeprefix(prefix)}"
                target.write(name, _bytes_of(part, file))
        files = target.files()
        _check_copies(url, files, origins)
        body = manifests.encode(_manifest(attempt, whole, staging, files, [part.manifest for part, _ in origins]))
        strategy.publish(storage, staging, body)
    except BaseException:
        strategy.abandon(storage, staging)
        raise


def _bytes_of(part: Checkpoint, file: FileEntry) -> Iterator[bytes]:
    for start in range(0, file.size, _CHUNK):
        yield bytes(part.storage.read(part.prefix + file.path, start, min(start + _CHUNK, file.size)))


def _check_copies(url: str, files: Sequence[FileEntry], origins: Sequence[tuple[Checkpoint, str]]) -> None:
    copied = sorted((file.size, file.checksum) for file in files)
    if copied != sorted((file.size, file.checksum) for part, _ in origins for file in part.manifest.files):
        raise ChecksumError(f"cannot finalize {url!r}: the bytes of a part are not those that were saved")


def _manifest(
    attempt: str, whole: Item, staging: Staging, files: Sequence[FileEntry], parts: Sequence[Manifest]
) -> Manifest:
    custom: dict[str, Any] = {}
    for part in parts:
        noted_there: Any = part.custom_metadata or {}
        custom |= noted_there
    return Manifest(
        attempt=attempt,
        init_timestamp_nsecs=min(part.init_timestamp_nsecs for part in parts),
        commit_timestamp_nsecs=time.time_ns(),
        written_by=parts[-1].written_by,
        items={_ITEM: dataclasses.replace(whole, prefix=f"{staging.data}{_ITEM}/")},
        files=tuple(files),
        custom_metadata=custom or None,
    )


# --- structures ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    part: int
    at: int


def _joined(structures: Sequence[Any], url: str) -> tuple[Any, list[tuple[int, int]]]:
    """Return the structure of all parts, and of each of its leaves the part and the number there."""
    conflicts: list[str] = []
    whole: Any = None
    for part, structure in enumerate(structures):
        marked = _marked(structure, part, iter(range(sum(1 for _ in leaf_paths(structure)))))
        whole = marked if part == 0 else _join(whole, marked, (), conflicts)
    if conflicts:
        listed = "\n".join(f"  {line}" for line in conflicts[:_SHOWN])
        raise noted(
            PartialSaveReplacementError(f"cannot save a part of {url!r}: another part has the same leaves:\n{listed}"),
            "parts are dicts without a leaf in common",
        )
    index: list[tuple[int, int]] = []
    return _unmarked(whole, index), index


def _marked(node: Any, part: int, count: Iterator[int]) -> Any:
    if node == LEAF:
        return _Leaf(part, next(count))
    if node is None:
        return None
    return {**node, "children": [_marked(child, part, count) for child in node["children"]]}


def _unmarked(node: Any, index: list[tuple[int, int]]) -> Any:
    if isinstance(node, _Leaf):
        index.append((node.part, node.at))
        return LEAF
    if node is None:
        return None
    return {**node, "children": [_unmarked(child, index) for child in node["children"]]}


def _join(one: Any, other: Any, path: tuple[Any, ...], conflicts: list[str]) -> Any:
    if not (isinstance(one, dict) and isinstance(other, dict) and one["kind"] == other["kind"] == "dict"):
        conflicts.append(show_path(path))
        return one
    # By their texts: where only their kinds differ, keys have one name in the files of the array writer.
    places = {key_text(key): at for at, key in enumerate(child_keys(one))}
    keys, children = list(one["keys"]), list(one["children"])
    for key, encoded, child in zip(child_keys(other), other["keys"], other["children"], strict=True):
        at = places.get(key_text(key))
        if at is None:
            keys.append(encoded)
            children.append(child)
        else:
            children[at] = _join(children[at], child, (*path, key), conflicts)
    return {**one, "keys": keys, "children": children}
