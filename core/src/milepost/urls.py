"""Which URL a path means, and where a URL divides.

The rule: every place has one spelling, `scheme://authority/segment/segment`, without a slash at the end and without
percent encoding, so that two spellings of one place find the same settings and the same checkpoint. Local paths become
`file:///...`. Only the root of a scheme keeps its last slash (`file:///`). Nothing here looks at a disk, except that a
relative path begins at the current directory.
"""

from __future__ import annotations

import os
import re

from milepost.errors import RequestError, noted

__all__ = ["LOCAL", "join", "local_path", "locate", "parts", "scheme", "split"]

LOCAL = "file"
"""The scheme of local paths."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+::.*://", re.DOTALL)
_FOLDED = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)", re.DOTALL)


def locate(path: str | os.PathLike[str], *, base: str = "") -> str:
    """Return the one spelling of a path or URL; relative paths begin at `base`, or else at the current directory.

    `.` and `..` are resolved in the text, never through symbolic links; `~` and `%20` mean themselves.

    >>> locate("/data/../runs//7/")
    'file:///runs/7'
    >>> locate("gs://bucket//runs/7/")
    'gs://bucket/runs/7'
    """
    text = _text(path)
    if not text:
        raise noted(RequestError(f"cannot locate {path!r}: the path is empty"), "write '.' for the current directory")
    if "\0" in text:
        raise RequestError(f"cannot locate {text!r}: no path holds a null character")
    if _CHAIN.match(text):
        raise noted(
            RequestError(f"cannot locate {text!r}: it is a chain of URLs"), "name the last URL of the chain alone"
        )
    url = _URL.fullmatch(text)
    if url is None:
        return _locate_local(text, base)
    if url["scheme"].lower() in {LOCAL, "local"}:
        return _locate_file(text, url["rest"])
    return _locate_remote(text, url["scheme"].lower(), url["rest"])


def parts(url: str) -> tuple[str, ...]:
    """Return a located URL as scheme, authority and segments: one URL covers another if its parts begin the other's.

    >>> parts("gs://bucket/runs/7")
    ('gs', 'bucket', 'runs', '7')
    >>> parts("file:///")
    ('file', '')
    """
    name, _, rest = url.partition("://")
    return (name, *rest.removesuffix("/").split("/"))


def scheme(url: str) -> str:
    """Return the scheme of a located URL.

    >>> scheme("file:///runs/7")
    'file'
    """
    return url.partition("://")[0]


def split(url: str) -> tuple[str, str]:
    """Return the URL of the root and the name below it: the last segment.

    >>> split("gs://bucket/runs/7")
    ('gs://bucket/runs', '7')
    >>> split("file:///7")
    ('file:///', '7')
    """
    name, authority, *segments = parts(url)
    if not segments:
        raise noted(RequestError(f"{url!r} cannot be a checkpoint: it is a root"), "name a checkpoint below it")
    return _spell(name, authority, segments[:-1]), segments[-1]


def join(root: str, name: str) -> str:
    """Return the URL of a name below a root.

    >>> join("file:///", "7")
    'file:///7'
    """
    return f"{root.removesuffix('/')}/{name}"


def local_path(url: str) -> str:
    """Return the path of a located `file` URL.

    >>> local_path("file:///runs/7")
    '/runs/7'
    """
    if scheme(url) != LOCAL:
        raise RequestError(f"{url!r} has no local path: its scheme is {scheme(url)!r}")
    return url.removeprefix(f"{LOCAL}://")


def _text(path: str | os.PathLike[str]) -> str:
    if isinstance(path, str):
        return path
    if isinstance(path, os.PathLike):
        return os.fspath(path) or "."
    # A UPath of a remote file system is no PathLike; its text is its URL.
    if isinstance(getattr(path, "protocol", None), str):
        return str(path)
    raise RequestError(f"cannot locate {path!r}: a path is a str, a PathLike or a UPath, not {type(path).__name__}")


def _locate_local(text: str, base: str) -> str:
    folded = _FOLDED.fullmatch(text)
    if folded is not None:
        # pathlib does this to URLs; the checkpoint would quietly go to a directory called "gs:".
        raise noted(
            RequestError(f"cannot locate {text!r}: it is a URL that lost a slash"),
            f"give '{folded['scheme']}://{folded['rest']}' as a str or a UPath: pathlib.Path is for local paths only",
            "or, if a directory has this very name, its absolute path",
        )
    # POSIX lets exactly two leading slashes mean something else, and abspath keeps them.
    path = os.path.abspath(os.path.join(base, text))  # noqa: PTH100, PTH118 (Path.resolve follows links)
    return _spell(LOCAL, "", [segment for segment in path.split("/") if segment])


def _locate_file(text: str, rest: str) -> str:
    authority, _, path = rest.partition("/")
    if authority not in {"", "localhost"}:
        raise noted(
            RequestError(f"cannot locate {text!r}: {authority!r} stands where a host name stands"),
            f"write a relative path without scheme: {rest!r}; an absolute one with three slashes: 'file:///...'",
        )
    return _locate_local(f"/{path}", "")


def _locate_remote(text: str, name: str, rest: str) -> str:
    authority, _, path = rest.partition("/")
    segments = [segment for segment in path.split("/") if segment]
    if {".", ".."} & {authority, *segments}:
        raise noted(
            RequestError(f"cannot locate {text!r}: '.' and '..' are plain names in a URL"), "write the URL they mean"
        )
    return _spell(name, authority, segments)


def _spell(name: str, authority: str, segments: list[str]) -> str:
    if not segments and not authority:
        return f"{name}:///"
    return f"{name}://{'/'.join([authority, *segments])}"
