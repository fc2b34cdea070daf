"""Every error milepost raises, grouped by what a handler would do about it.

The rule: one tree of classes; each is also the builtin that a reader of the documented API expects.

```
MilepostError
├── RequestError                   change the call, or what is named in it
│   ├── NotFoundError              (FileNotFoundError) look elsewhere
│   │   └── CheckpointNotFoundError   also an InvalidLayoutError
│   │       └── StepNotFoundError         another step
│   ├── InvalidLayoutError         (ValueError) the path holds something else
│   ├── AlreadyExistsError         (FileExistsError, ValueError) another name, or overwrite
│   │   └── StepAlreadyExistsError    another step, or overwrite
│   ├── UnsupportedLeafError       (ValueError, TypeError) take the leaves out of the tree
│   ├── MismatchError              (ValueError) change the target
│   ├── ItemNotFoundError          (KeyError) name another item
│   └── ConfigError                (ValueError) mend milepost.toml or the options
├── PluginError                    install, mend or switch off a package
│   ├── PluginNotFoundError        (LookupError)
│   ├── PluginConflictError        (ValueError)
│   └── PluginBrokenError          (ImportError)
├── DamagedError                   (ValueError) fall back to another checkpoint
│   ├── ManifestError              the commit object cannot be believed
│   │   └── FutureFormatError      upgrade milepost
│   ├── MissingDataError           a file of the checkpoint is gone or cut short
│   └── ChecksumError              the bytes are not those that were saved
├── StorageError                   (OSError) mend the storage, then try again
│   ├── StorageFullError
│   └── StorageDeniedError         (PermissionError)
├── AbortedError                   (RuntimeError) somebody fenced this save off: save again
├── OutcomeUnknownError            (RuntimeError) look whether it was committed, then decide
└── DeadlineError                  (TimeoutError) a host did not arrive
```
"""

from __future__ import annotations

from typing import TypeVar

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "CheckpointNotFoundError",
    "ChecksumError",
    "ConfigError",
    "DamagedError",
    "DeadlineError",
    "FutureFormatError",
    "InvalidLayoutError",
    "ItemNotFoundError",
    "ManifestError",
    "MilepostError",
    "MismatchError",
    "MissingDataError",
    "NotFoundError",
    "OutcomeUnknownError",
    "PluginBrokenError",
    "PluginConflictError",
    "PluginError",
    "PluginNotFoundError",
    "PluginWarning",
    "RequestError",
    "StepAlreadyExistsError",
    "StepNotFoundError",
    "StorageDeniedError",
    "StorageError",
    "StorageFullError",
    "UnsupportedLeafError",
    "WeakGuaranteeWarning",
    "noted",
]


E = TypeVar("E", bound=BaseException)


class MilepostError(Exception):
    """Be the base of every error milepost raises itself."""


class RequestError(MilepostError):
    """Say that the call, or what it names, has to change."""


class NotFoundError(RequestError, FileNotFoundError):
    """Say that nothing is stored under the name."""


class InvalidLayoutError(RequestError, ValueError):
    """Say that the path holds something that is no checkpoint."""


class CheckpointNotFoundError(NotFoundError, InvalidLayoutError):
    """Say that no checkpoint is at the path; the notes tell what is there or near by."""


class AlreadyExistsError(RequestError, FileExistsError, ValueError):
    """Say that the name is taken, before this call or by a racing writer."""


class StepAlreadyExistsError(AlreadyExistsError):
    """Say that a step of that number is there already, whoever saved it."""


class StepNotFoundError(CheckpointNotFoundError):
    """Say that there is no step of that number; the note tells which there are."""


class UnsupportedLeafError(RequestError, ValueError, TypeError):
    """List every leaf that cannot be saved, by path."""


class MismatchError(RequestError, ValueError):
    """Show the whole difference between a checkpoint and the target it should fill."""


class ItemNotFoundError(RequestError, KeyError):
    """Say that the checkpoint has no item of that name."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; an error message is for reading.
        return Exception.__str__(self)


class ConfigError(RequestError, ValueError):
    """Say which setting is wrong, where it was read, and what was meant, if that can be guessed."""


class PluginError(MilepostError):
    """Say that a package must be installed, mended or switched off."""


class PluginNotFoundError(PluginError, LookupError):
    """Say that no installed package offers the name."""


class PluginConflictError(PluginError, ValueError):
    """Say that several installed packages claim one name."""


class PluginBrokenError(PluginError, ImportError):
    """Say that a package was found but cannot be used."""


class DamagedError(MilepostError, ValueError):
    """Say that a checkpoint exists but cannot be believed."""


class ManifestError(DamagedError):
    """Say that the commit object is unreadable, contradictory or hostile."""


class FutureFormatError(ManifestError):
    """Say that a newer milepost wrote the checkpoint."""


class MissingDataError(DamagedError):
    """Say that a file of a committed checkpoint is missing or shorter than recorded."""


class ChecksumError(DamagedError):
    """Say that bytes differ from those that were saved; names the file and the leaf."""


class StorageError(MilepostError, OSError):
    """Say that the storage refused or failed; `errno` is kept where there was one."""


class StorageFullError(StorageError):
    """Say that the storage has no room left (ENOSPC, EDQUOT, EFBIG)."""


class StorageDeniedError(StorageError, PermissionError):
    """Say that the storage may not be written or read (EACCES, EPERM, EROFS)."""


class AbortedError(MilepostError, RuntimeError):
    """Say that this save was fenced off, by a sweep that took it for dead."""


class OutcomeUnknownError(MilepostError, RuntimeError):
    """Say that it cannot be told whether the checkpoint was committed."""


class DeadlineError(MilepostError, TimeoutError):
    """Say which hosts did not arrive, and in which phase."""


class PluginWarning(UserWarning):
    """Tell that a plugin was left out, or a part of it."""


class WeakGuaranteeWarning(UserWarning):
    """Tell once, in plain words, what a storage cannot promise."""


def noted(error: E, *notes: str) -> E:
    """Return the error with notes added: the way out, for whoever reads the traceback.

    >>> noted(ValueError("no"), "try yes").__notes__
    ['try yes']
    """
    for note in notes:
        error.add_note(note)
    return error
