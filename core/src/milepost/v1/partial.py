"""A checkpoint that is saved in parts, for trees of which never all is at hand at once.

The rule: nothing is at the path before `finalize`, and then all of it. Each part is a checkpoint of its own in a folder
beside the path, which ends in `.partial_save`; so a part that was saved is durable, and another process may go on. What
was saved in one part is in no other: nothing is ever replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milepost.path._finding import PathLike
    from milepost.v1._responses import AsyncResponse

__all__ = ["finalize", "save", "save_async"]


def save(path: PathLike, state: Any, *, custom_metadata: Mapping[str, Any] | None = None) -> None:
    """Save a part of a tree, durably; the checkpoint at the path appears with `finalize`.

    Parts are trees of dicts that have no leaf in common. Custom metadata of all parts are joined, those of a later one
    winning. Raises `PartialSaveReplacementError` for leaves that an earlier part has, `AlreadyExistsError` (a
    `FileExistsError`) where a checkpoint is at the path, and what `milepost.v1.save` raises.
    """
    from milepost.v1._parts import begin_part

    began, _ = begin_part(path, state, custom_metadata, lasting=False)
    began.finish()


def save_async(path: PathLike, state: Any, *, custom_metadata: Mapping[str, Any] | None = None) -> AsyncResponse[None]:
    """Save a part of a tree in the background, as `milepost.v1.save_async` does with a whole one."""
    from milepost.engine.background import of_this_process
    from milepost.v1._parts import begin_part

    of_this_process().wait()  # the part before must be there, to be compared with
    began, snapshot = begin_part(path, state, custom_metadata, lasting=True)

    def finish() -> None:
        began.finish()

    pending = of_this_process().start(finish, f"the partial save of {str(path)!r}")
    snapshot()
    return pending


def finalize(path: PathLike) -> None:
    """Make the checkpoint of all parts, and remove them; what was cut off is completed by a new call.

    The data of the parts are copied once, a few megabytes at a time. Raises `NotFoundError` (a `FileNotFoundError`)
    where no part was saved, and `AlreadyExistsError` (a `FileExistsError`) where a checkpoint is at the path.
    """
    from milepost.engine.background import of_this_process
    from milepost.v1._parts import join_parts

    of_this_process().wait()
    join_parts(path)


def __dir__() -> list[str]:
    return list(__all__)
