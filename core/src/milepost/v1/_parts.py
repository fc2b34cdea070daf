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
from milepost.routes import open_route, resolve
from milepost.structure import LEAF, child_keys, key_text, leaf_paths, show_path
from milepost.trees import handlers_of, take_apart
from milepost.v1._context import current_settings
from milepost.v1._looking import located
from milepost.v1._saving import check_value
from milepost.v1._settings import applied

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

    def _location(self, *args: Any) -> Location:
        return dataclasses.replace(super()._location(*args), host=self.number, hosts=self.number + 1)


def begin_part(
    path: PathLike, state: Any, custom_metadata: Mapping[str, Any] | None, *, lasting: bool
) -> tuple[Save, Callable[[], None]]:
    """Begin to save one more part; refuse one that cannot be joined with the others."""
    url = located(path)
    check_value(_ITEM, state)
    with applied(current_settings(), url):
        _check_free(url)
        parts = _parts(url)
        _joined([*parts, take_apart(state, handlers_of(installed())).structure])
        number = 1 + max(parts, key=lambda part: part.number).number if parts else 0
        save = _PartSave(
            SaveRequest(urls.join(url + _SUFFIX, str(number)), {_ITEM: TreeItem(state)}, custom_metadata=custom_metadata)
        )
        save.number = number
        return save, save.prepare(lasting=lasting)
