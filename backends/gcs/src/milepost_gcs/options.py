"""What users may say of Google Cloud Storage: the URL, the options, and which keys are names of objects.

Decides what is refused before a request is made. The rule: an option is ours, with a bound that is checked here, or one
of gcsfs, which gets it unchanged; a word that neither knows is a mistake of the user's.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
from typing import TYPE_CHECKING, Any, Final

from milepost.errors import ConfigError, StorageError, noted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Limits", "checked_client_options", "parse_url", "plain", "refused_key"]

_SCHEME: Final = "gs://"
_GRAIN: Final = 256 << 10  # the parts of an upload are multiples of it, but for the last
_OF_FSSPEC: Final = frozenset({"batch_size", "listings_expiry_time", "max_paths", "use_listings_cache"})
_REFUSED: Final = frozenset({"asynchronous", "loop", "skip_instance_cache"})


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long a request may take, how often it is repeated, how many there are at once, and how large a part is."""

    timeout: float
    retries: int
    concurrency: int
    part_bytes: int

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        _check("timeout", self.timeout, _is_number(self.timeout) and 0 < self.timeout < float("inf"), "seconds above 0")
        _check("retries", self.retries, _is_count(self.retries), "a whole number from 0 on")
        _check("concurrency", self.concurrency, _is_count(self.concurrency, 1), "a whole number from 1 on")
        fits = _is_count(self.part_bytes, _GRAIN) and self.part_bytes % _GRAIN == 0
        _check("part_bytes", self.part_bytes, fits, f"a multiple of {_GRAIN}")


def parse_url(url: str) -> tuple[str, str]:
    """Return the bucket, and the prefix below it ("" or ends in "/").

    >>> parse_url("gs://bucket/runs/7/")
    ('bucket', 'runs/7/')
    """
    bucket, _, prefix = url.removeprefix(_SCHEME).rstrip("/").partition("/")
    if not url.startswith(_SCHEME) or not plain(bucket) or (prefix and not plain(prefix)):
        raise noted(ConfigError(f"cannot open {url!r}: it is no URL of a bucket"), "write 'gs://bucket/prefix'")
    return bucket, f"{prefix}/" if prefix else ""


def plain(key: str) -> bool:
    r"""Say whether a key is a relative path of plain names, which can be the name of an object.

    >>> [plain(key) for key in ("7/a b", "", "7/", "../7", "7//a", "a\nb")]
    [True, False, False, False, False, False]
    """
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    # An object named "." or ".." would be lost on the way: URLs give these a meaning.
    return not {"", ".", ".."} & {*key.split("/")} and not {"\0", "\r", "\n"} & {*key}


def refused_key(url: str, verb: str, key: str) -> StorageError:
    """Return the error for a key that is none."""
    message = f"cannot {verb} '{url}/{key}': {key!r} is no relative path of plain names"
    return StorageError(errno.EINVAL, message)


def checked_client_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options for gcsfs, or raise a `ConfigError` that says which one it does not know."""
    if not options:
        return options
    from gcsfs.core import GCSFileSystem

    theirs = {*inspect.signature(GCSFileSystem.__init__).parameters} - {"self", "kwargs"} - _REFUSED | _OF_FSSPEC
    for name in sorted({*options} - theirs):
        error = ConfigError(f"unknown option {name!r} for 'gs://': neither milepost-gcs nor gcsfs takes it")
        ours = [field.name for field in dataclasses.fields(Limits)]
        for meant in difflib.get_close_matches(name, [*ours, *sorted(theirs)], 1):
            error.add_note(f"did you mean {meant!r}?")
        raise error
    return options


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(name: str, value: object, good: bool, wanted: str) -> None:  # noqa: FBT001 - private, and named at each call
    if not good:
        raise ConfigError(f"option {name} = {value!r} for 'gs://' cannot be used: it has to be {wanted}")
