"""What a user may say of an S3 storage, and what s3fs is told of it.

Decides what is refused before anything is opened. The rule: options of s3fs are passed on as they are, under their own
names, and so are its ways to find credentials, region and endpoint; what is set here is only what was not said there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, Final

from milepost.errors import ConfigError, noted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Settings", "opened", "place"]

_SCHEME: Final = "s3://"
_CLOSING: Final = 5.0  # seconds
_LEAST_PART: Final = 5 << 20  # what S3 takes as a part that is not the last
_LARGEST_PART: Final = 5 << 30
_OURS: Final = ("region", "timeout", "retries", "concurrency", "part_bytes")
_CACHES: Final = ("use_listings_cache", "skip_instance_cache", "listings_expiry_time", "max_paths")  # never used here
_NOT_OPTIONS: Final = frozenset({"self", "kwargs", "loop", "asynchronous"})


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The options of a storage; `s3fs` holds those that are not ours."""

    region: str | None
    timeout: float
    retries: int
    concurrency: int
    part_bytes: int
    # They may hold credentials, which must not reach a log by way of a repr.
    s3fs: Mapping[str, Any] = dataclasses.field(repr=False)

    def check(self, url: str) -> None:
        """Raise `ConfigError` for what cannot be right."""
        numbers = (
            ("timeout", self.timeout, 0.001, float("inf")),
            ("retries", self.retries, 0, 100),
            ("concurrency", self.concurrency, 1, 1000),
            ("part_bytes", self.part_bytes, _LEAST_PART, _LARGEST_PART),
        )
        for name, value, least, most in numbers:
            kinds = (int, float) if name == "timeout" else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"cannot open {url!r}: {name!r} is a number from {least} to {most}, not {value!r}")
        if self.region is not None and not (isinstance(self.region, str) and self.region):
            raise ConfigError(f"cannot open {url!r}: 'region' is the name of a region, not {self.region!r}")
        known = _known() if self.s3fs else frozenset()
        for name in self.s3fs:
            if name not in known:
                raise _unknown(url, name, known)


def place(url: str) -> tuple[str, str]:
    """Return the bucket of a URL and the prefix below which everything is kept, "" or ending in "/".

    >>> place("s3://bucket/pre/fix/")
    ('bucket', 'pre/fix/')
    """
    bucket, _, path = url.removeprefix(_SCHEME).rstrip("/").partition("/")
    if not url.startswith(_SCHEME) or not bucket:
        raise noted(ConfigError(f"cannot open {url!r}: it names no bucket"), "write 's3://bucket/prefix'")
    if path and {"", ".", ".."} & {*path.split("/")}:
        raise ConfigError(f"cannot open {url!r}: its path is not one of plain names")
    return bucket, f"{path}/" if path else ""


def opened(settings: Settings) -> Any:
    """Return an `s3fs.S3FileSystem` of one's own, configured and not connected."""
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    fs: Any = s3fs.S3FileSystem(**{**settings.s3fs, "use_listings_cache": False, "skip_instance_cache": True})
    if fs.session is None:
        fs.session = AioSession(**fs.kwargs)
        # A session reads the descriptions of all requests anew, which takes ten times as long as all else.
        fs.session.register_component("data_loader", _models(fs.session.get_config_variable("data_path")))
    if settings.region is not None:
        fs.client_kwargs = {**fs.client_kwargs, "region_name": settings.region}
    fs.config_kwargs = _configuration(fs, settings)
    fs.close_session = functools.partial(_closed, os.getpid())
    return fs


def _closed(pid: int, loop: asyncio.AbstractEventLoop, creator: Any) -> None:
    """Close a client on the loop that it belongs to: s3fs would take that of whatever thread collects the garbage."""
    if os.getpid() == pid and loop.is_running():
        closed = asyncio.run_coroutine_threadsafe(creator.__aexit__(None, None, None), loop)
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                return
        with contextlib.suppress(Exception):
            closed.result(_CLOSING)
            return
    # A child of a fork, or the end of the interpreter: nobody runs the loop any more.
    with contextlib.suppress(AttributeError):
        creator._client._endpoint.http_session._connector._close()  # noqa: SLF001 - as s3fs does


def _configuration(fs: Any, settings: Settings) -> dict[str, Any]:
    usual: dict[str, Any] = {
        # A try as a whole has a deadline: `Client`.
        "connect_timeout": None,
        "read_timeout": None,
        "max_pool_connections": settings.concurrency,
        # One place repeats requests, or "five times" would be twenty-five: `Client`.
        "retries": {"total_max_attempts": 1},
        # What is read is checked by whoever recorded a checksum; ranges carry none anyway.
        "response_checksum_validation": "when_required",
    }
    return {**usual, **fs.config_kwargs}


@functools.cache
def _models(path: str | None) -> Any:
    from botocore.loaders import create_loader  # type: ignore[import-untyped]

    return create_loader(path)


def _known() -> frozenset[str]:
    import s3fs

    taken = frozenset(inspect.signature(s3fs.S3FileSystem.__init__).parameters) - _NOT_OPTIONS
    return taken | {"profile", *_CACHES}


def _unknown(url: str, name: str, known: frozenset[str]) -> ConfigError:
    error = ConfigError(f"cannot open {url!r}: there is no option {name!r}")
    close = difflib.get_close_matches(name, sorted({*known, *_OURS}), 1)
    return noted(error, f"did you mean {close[0]!r}?" if close else "options are those of `S3Storage` and of s3fs")
