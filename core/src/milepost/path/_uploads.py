"""Which unfinished uploads are an attempt's, and dead.

An upload in parts that nobody finished is invisible, paid for, and nothing that a commit strategy could see. The rule:
it is an attempt's if its key is below the prefix of one, `<name>/<attempt>/`. It is dead if the attempt is, committed
or not, unless it was begun lately: then the attempt is alive, however old. Any other upload is somebody else's, and
nothing is said or done about it.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from typing import TYPE_CHECKING

from milepost.attempts import fate, parse_attempt
from milepost.errors import StorageError
from milepost.protocols import FindsUploads, Leftover

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from milepost.protocols import Storage, Upload

__all__ = ["abort", "unfinished_uploads"]

_logger = logging.getLogger("milepost")


def unfinished_uploads(storage: Storage, older_than: float) -> Iterator[tuple[Leftover, list[Upload]]]:
    """Yield the unfinished uploads of attempts, those of one object together; its key stands for the prefix.

    `older_than` is the age in seconds from which a writer on another machine counts as dead.
    """
    found = sorted(_found(storage), key=lambda upload: upload.key)
    for key, unfinished in itertools.groupby(found, key=lambda upload: upload.key):
        name, _, rest = key.partition("/")
        attempt, below, _ = rest.partition("/")
        if below and parse_attempt(attempt) is not None:
            of_one = list(unfinished)
            dead, reason = _fate(attempt, max(upload.started for upload in of_one), older_than)
            yield Leftover(key, name, attempt, dead, f"an upload of it was never finished: {reason}"), of_one


def abort(storage: Storage, unfinished: Iterable[Upload]) -> None:
    """Give uploads up."""
    if isinstance(storage, FindsUploads):
        for upload in unfinished:
            storage.abort_upload(upload)


def _found(storage: Storage) -> list[Upload]:
    if not isinstance(storage, FindsUploads):
        return []
    try:
        return list(storage.uploads(""))
    except StorageError as error:
        # To list them is a permission of its own, and not every store has the request.
        _logger.warning("unfinished uploads below %s cannot be listed, so none is removed: %s", storage.url, error)
        return []


def _fate(attempt: str, started: float, older_than: float) -> tuple[bool, str]:
    dead, reason = fate(attempt, older_than=math.inf)
    if dead:
        return dead, reason  # its process is known to be gone, whatever its age
    dead, reason = fate(attempt, older_than=older_than)
    age = time.time() - started
    if dead and age <= older_than:
        return False, f"{reason}, and yet the upload only {age / 3600:.1f} hours ago"
    return dead, reason
