"""What checkpointers and managers can be told besides what to save and where, name for name as in the reference.

The rule: plain values that check nothing and do nothing; whoever is given one checks it then, since most of them can be
changed after they were made. What has no meaning here is accepted and has no effect; each says so.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "AsyncOptions",
    "AtomicityMode",
    "AtomicityOptions",
    "FileOptions",
    "MemoryLimitOptions",
    "MultiprocessingOptions",
]


@dataclasses.dataclass
class AsyncOptions:
    """How saving in the background is done.

    `timeout_secs` bounds, in seconds, every wait of one save. `barrier_sync_fn` has no effect: processes meet through
    JAX's coordination service. `post_finalization_callback` is called once the checkpoint is committed, on each
    process; what it raises cannot undo that. `create_directories_asynchronously` has no effect: they never hold the
    caller up.
    """

    timeout_secs: int = 600
    barrier_sync_fn: Callable[..., None] | None = None
    post_finalization_callback: Callable[[], None] | None = None
    create_directories_asynchronously: bool = True


@dataclasses.dataclass
class MultiprocessingOptions:
    """Which processes take part, and which of them acts for all; None as `primary_host` means that each acts.

    `barrier_sync_key_prefix` keeps apart the meetings of checkpointers that work at the same time.
    """

    primary_host: int | None = 0
    active_processes: set[int] | None = None
    barrier_sync_key_prefix: str | None = None


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """How files are made: `path_permission_mode` is the mode of directories, None what the process's umask leaves.

    `skip_sync_file_validations` has no effect: nothing is skipped that makes a checkpoint safe.
    """

    path_permission_mode: int | None = None
    # The documented text of this value has one field; the newer second one is taken, but not shown.
    skip_sync_file_validations: bool = dataclasses.field(default=False, repr=False)


class AtomicityMode(str, enum.Enum):  # noqa: UP042 - its text is "AtomicityMode.AUTO", as documented, not "auto"
    """By what a checkpoint becomes visible: the storage's own way, a commit object, or a rename."""

    AUTO = "auto"
    COMMIT_FILE = "commit_file"
    ATOMIC_RENAME = "atomic_rename"


@dataclasses.dataclass(frozen=True)
class AtomicityOptions:
    """How a checkpoint is to become visible; see `AtomicityMode`.

    `allow_legacy_atomic_rename` has no effect: what a storage cannot do atomically is refused in any case.
    """

    mode: AtomicityMode = AtomicityMode.AUTO
    allow_legacy_atomic_rename: bool = False


@dataclasses.dataclass
class MemoryLimitOptions:
    """How much memory copies off the devices may take at a time, in units of 10^9 bytes; None: the engine's budget."""

    max_transfer_concurrent_gb: int | None = None
