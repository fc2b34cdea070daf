"""What can be chosen about how arrays are written, and what is refused.

The rule: a wrong value is refused when the writer is made, before anything is written; everything has a default with
which Orbax reads the result.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from milepost.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CHUNK_BYTES", "Settings", "checked"]

CHUNK_BYTES = 8 << 20
"""The size above which a chunk is cut when nobody says; a few of them fit into every budget."""

_LEVELS = {2: 1, 3: 3}  # those of Orbax, by the version of Zarr


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to write, checked."""

    zarr_format: int = 2
    ocdbt: bool = True
    compression: tuple[str, int] | None = None
    chunk_bytes: int = CHUNK_BYTES
    target_file_bytes: int = 2 << 30
    cache_bytes: int = 100_000_000
    file_io_concurrency: int = 128


def checked(options: dict[str, Any]) -> Settings:
    """Return the settings that options given by name mean, or raise `ConfigError` for the first that is wrong.

    >>> checked({"zarr_format": 3, "compression": "zstd"}).compression
    ('zstd', 3)
    """
    zarr_format, ocdbt = options.get("zarr_format", 2), options.get("ocdbt", True)
    _demand(zarr_format in (2, 3) and type(zarr_format) is int, "zarr_format", zarr_format, "2 or 3")
    _demand(type(ocdbt) is bool, "ocdbt", ocdbt, "true or false")
    compression, level = options.get("compression"), options.get("compression_level")
    _demand(compression in (None, "none", "zstd"), "compression", compression, '"none" or "zstd"')
    compression = None if compression == "none" else compression
    _demand(level is None or compression is not None, "compression_level", level, "left out without compression")
    level = _LEVELS[zarr_format] if level is None else level
    _demand(type(level) is int and -7 <= level <= 22, "compression_level", level, "from -7 to 22")  # noqa: PLR2004 zstd's
    result: dict[str, int] = {}
    positive: Callable[[Any], bool] = lambda value: type(value) is int and value > 0  # noqa: E731 it has a type
    for name in ("chunk_bytes", "target_file_bytes", "cache_bytes", "file_io_concurrency"):
        value = options.get(name)
        if value is not None:
            _demand(positive(value), name, value, "a number above 0")
            result[name] = value
    return Settings(zarr_format, ocdbt, None if compression is None else (compression, level), **result)


def _demand(fulfilled: object, name: str, value: object, what: str) -> None:
    if not fulfilled:
        raise ConfigError(f"cannot use {name} {value!r} with TensorStore: it must be {what}")
