"""The handlers whose object is one file: JSON, and protocol buffer messages.

The rule: the file is made from the object before the caller goes on, so that what is changed afterwards is not saved,
and what cannot be written is refused before anything is.
"""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from milepost import args as a
from milepost.errors import ConfigError, DamagedError, NotFoundError, RequestError, noted
from milepost.handlers._interface import AsyncCheckpointHandler, Directory
from milepost.handlers._trees import public_typestr
from milepost.options import MultiprocessingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from upath import UPath

__all__ = ["JsonCheckpointHandler", "ProtoCheckpointHandler"]


class _ContentError(RequestError, ValueError, TypeError):
    """An object that the format of the file cannot hold."""


class _FileHandler(AsyncCheckpointHandler):
    """What both share: one file of text."""

    def __init__(self, filename: str, *, multiprocessing_options: MultiprocessingOptions) -> None:
        del multiprocessing_options
        self._filename = filename

    def _write(self, directory: Directory, text: str) -> None:
        _upath(directory).joinpath(self._filename).write_text(text, encoding="utf-8")

    def _read(self, directory: Directory) -> str:
        path = _upath(directory) / self._filename
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise NotFoundError(f"cannot restore {str(path)!r}: there is no such file") from error
        except UnicodeDecodeError as error:
            raise DamagedError(f"cannot restore {str(path)!r}: it is no UTF-8 text: {error}") from error

    @classmethod
    def typestr(cls) -> str:
        """Return the name that the checkpoint keeps of what saved an item."""
        return public_typestr(cls)


def _upath(directory: Directory) -> UPath | Path:
    from upath import UPath

    # A UPath of a remote file system is no PathLike, and stays what it is.
    return directory if isinstance(directory, Path) else UPath(directory)


class JsonCheckpointHandler(_FileHandler):
    """Saves a JSON value, as one file. `multiprocessing_options` are those of the checkpointer."""

    _milepost_save_args: ClassVar[type] = a.JsonSave
    _milepost_restore_args: ClassVar[type] = a.JsonRestore

    def __init__(
        self,
        filename: str | None = None,
        *,
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
    ) -> None:
        super().__init__(filename or "metadata", multiprocessing_options=multiprocessing_options)

    def save(
        self,
        directory: Directory,
        item: Mapping[str, Any] | None = None,
        args: a.JsonSave | None = None,
    ) -> None:
        """Write the file; raises an error that is a `ValueError` and a `TypeError` for what JSON cannot hold."""
        value = item if args is None else args.item
        if value is None:
            raise ConfigError("cannot save None: there is no item")
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise _ContentError(f"cannot save {value!r:.200} as JSON: {error}") from error
        self._write(directory, text)

    async def async_save(
        self,
        directory: Directory,
        item: Mapping[str, Any] | None = None,
        args: a.JsonSave | None = None,
    ) -> list[Future[Any]]:
        """Write the file as `save` does; nothing is left to be done."""
        self.save(directory, item, args)
        return []

    def restore(
        self,
        directory: Directory,
        item: Any | None = None,
        args: a.JsonRestore | None = None,
    ) -> Any:
        """Return the value in the file; raises `NotFoundError`, or `DamagedError` for what is no JSON."""
        del item, args
        text = self._read(directory)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                f"cannot restore {self._filename!r}: it holds {text[:60]!r}, which is no JSON"
            ) from error

    def metadata(self, directory: Directory) -> None:
        """Return None: of a JSON value nothing is known without restoring it."""
        del directory


def _text_format() -> Any:
    # Whoever has a message has the library; nothing else here needs it.
    return pkgutil.resolve_name("google.protobuf.text_format")


class ProtoCheckpointHandler(_FileHandler):
    """Saves a protocol buffer message in its text format, as one file; restoring needs its class.

    `multiprocessing_options` are those of the checkpointer.
    """

    _milepost_save_args: ClassVar[type] = a.ProtoSave
    _milepost_restore_args: ClassVar[type] = a.ProtoRestore

    def __init__(
        self,
        filename: str = "proto.pbtxt",
        *,
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
    ) -> None:
        super().__init__(filename, multiprocessing_options=multiprocessing_options)

    def save(self, directory: Directory, item: Any | None = None, args: a.ProtoSave | None = None) -> None:
        """Write the file; raises an error that is a `ValueError` and a `TypeError` for what is no message."""
        value = item if args is None else args.item
        if value is None:
            raise ConfigError("cannot save None: there is no item")
        if not callable(getattr(value, "SerializeToString", None)):
            raise _ContentError(f"cannot save a {type(value).__name__}: it is no protocol buffer message")
        self._write(directory, _text_format().MessageToString(value))

    async def async_save(
        self, directory: Directory, item: Any | None = None, args: a.ProtoSave | None = None
    ) -> list[Future[Any]]:
        """Write the file as `save` does; nothing is left to be done."""
        self.save(directory, item, args)
        return []

    def restore(self, directory: Directory, item: type[Any] | None = None, args: a.ProtoRestore | None = None) -> Any:
        """Return the message; raises a `ValueError` without its class, and `DamagedError` for what is none."""
        cls = item if args is None else args.item
        if cls is None:
            raise noted(
                ConfigError("cannot restore a protocol buffer message: its class is not given"),
                "pass args=ProtoRestore(item=<class of the message>)",
            )
        text, text_format = self._read(directory), _text_format()
        try:
            return text_format.Parse(text, cls())
        except text_format.ParseError as error:
            raise DamagedError(f"cannot restore {self._filename!r} as a {cls.__name__}: {error}") from error

    def metadata(self, directory: Directory) -> None:
        """Return None: of a message nothing is known without its class."""
        del directory
