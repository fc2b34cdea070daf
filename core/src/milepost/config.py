"""Which settings hold for a URL, and who said so.

The rule: a setting is looked up by its own. Layers are merged first: for one prefix and one setting the stronger layer
wins. Then the longest prefix that covers the URL by whole segments wins, whatever layer it came from; `default` is the
shortest prefix of all. Tables of options are one value: they replace each other and are never mixed. Unknown keys and
wrong types are errors when a file is read, so that a misspelt setting can never be a setting that is quietly off.

Everything but `read_layers`, `current_layers` and `configured` is a pure function of its arguments.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from milepost import urls
from milepost.errors import ConfigError, RequestError, noted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "BUILT_IN",
    "SETTINGS",
    "Chosen",
    "Layer",
    "Setting",
    "as_bytes",
    "configured",
    "current_layers",
    "did_you_mean",
    "lookup",
    "make_layer",
    "parse_layer",
    "read_layers",
]

FILE = "milepost.toml"
BUILT_IN = "built in"
"""The origin of a value that nobody set."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name, what its values look like, the value where nobody says otherwise, and what it does."""

    name: str
    kind: str
    default: object
    help: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """A value, and where it was read."""

    value: object
    origin: str


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """The settings of one source, checked: by the parts of a URL prefix (none for `default`), then by name."""

    origin: str
    table: Mapping[tuple[str, ...], Mapping[str, Chosen]]


SETTINGS: tuple[Setting, ...] = (
    Setting("storage", "name", None, "The storage that opens the URL; without it the one that claims the scheme."),
    Setting("storage_options", "table", MappingProxyType({}), "Keyword arguments of the storage."),
    Setting("commit", "name", None, "The commit strategy; without it the one that fits the storage best."),
    Setting("commit_options", "table", MappingProxyType({}), "Keyword arguments of the commit strategy."),
    Setting("arrays", "name", "safetensors", "The array writer of new checkpoints; loading never depends on it."),
    Setting("arrays_options", "table", MappingProxyType({}), "Keyword arguments of the array writer."),
    Setting("save_budget", "bytes", None, "Memory that saving may hold beyond the state itself."),
    Setting("load_budget", "bytes", None, "Memory that loading may hold beyond the result."),
    Setting("threads", "count", None, "How many threads read or write; without it, as many as the processors suggest."),
    Setting("verify", "flag", True, "Whether loading checks every checksum."),
    Setting(
        "mapped", "flag", False, "Whether loaded arrays may be views of mapped files, where the storage offers it."
    ),
)
"""Every setting there is."""

_BY_NAME: Mapping[str, Setting] = MappingProxyType({setting.name: setting for setting in SETTINGS})
_UNITS = MappingProxyType(
    {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    | {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
)
_SIZE = re.compile(r"(?P<number>\d{1,15}(\.\d{1,6})?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)
_PUSHED: contextvars.ContextVar[tuple[Layer, ...]] = contextvars.ContextVar("milepost.configured", default=())


# --- what a layer says -----------------------------------------------------------------------------------------------


def parse_layer(text: str, origin: str, *, base: str = "/", home: str = "/") -> Layer:
    """Return the layer that a TOML text describes.

    `origin` names the text in errors and explanations; local prefixes begin at `base`, and "~/" at `home`.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as cause:
        raise ConfigError(f"cannot read {origin}: it is no TOML: {cause}") from cause
    return make_layer(table, origin, base=base, home=home)


def make_layer(table: Mapping[str, object], origin: str, *, base: str = "/", home: str = "/") -> Layer:
    """Return the layer that a table describes, as `parse_layer` does for its text.

    >>> layer = make_layer({"default": {"save_budget": "2KiB"}}, "here")
    >>> lookup((layer,), "file:///runs/7")["save_budget"]
    Chosen(value=2048, origin='here [default]')
    """
    for key in table:
        if key not in {"default", "url"}:
            note = f"write default.{key}" if key in _BY_NAME else did_you_mean(key, ["default", "url"])
            raise noted(ConfigError(f"unknown key {key!r} in {origin}: the tables are 'default' and 'url'"), note)
    found: dict[tuple[str, ...], Mapping[str, Chosen]] = {}
    found[()] = _settings(table.get("default", {}), f"{origin} [default]")
    for prefix, settings in _table(table.get("url", {}), f"{origin} [url]").items():
        where = f'{origin} [url."{prefix}"]'
        covered = _prefix(prefix, where, base, home)
        if covered in found:
            raise ConfigError(f"cannot use {where}: another prefix of the same file means the same place")
        found[covered] = _settings(settings, where)
    return Layer(origin, MappingProxyType(found))


def lookup(layers: Iterable[Layer], url: str) -> dict[str, Chosen]:
    """Return every setting for a located URL; `layers` are given weakest first.

    >>> layer = make_layer({"default": {"threads": 2}, "url": {"gs://buck": {"threads": 8}}}, "here")
    >>> [lookup((layer,), url)["threads"].value for url in ("gs://buck/7", "gs://bucket/7")]
    [8, 2]
    """
    strongest_first = tuple(layers)[::-1]
    parts = urls.parts(url)
    found: dict[str, Chosen] = {}
    for length in range(len(parts), -1, -1):
        for layer in strongest_first:
            for name, chosen in layer.table.get(parts[:length], {}).items():
                found.setdefault(name, chosen)
    return {setting.name: found.get(setting.name, Chosen(setting.default, BUILT_IN)) for setting in SETTINGS}


def did_you_mean(word: str, words: Iterable[str], others: Iterable[str] = ()) -> str:
    """Return a note that suggests the nearest of some words and others, or lists the words.

    >>> did_you_mean("verfy", ["verify", "threads"])
    "did you mean 'verify'?"
    >>> did_you_mean("x", ["verify", "threads"])
    "there are: 'threads', 'verify'"
    """
    known = sorted(words)
    near = difflib.get_close_matches(word, sorted({*known, *others}), 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are: {', '.join(map(repr, known))}" if known else "there are none"


def _prefix(text: str, where: str, base: str, home: str) -> tuple[str, ...]:
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:/*", text):
        return (text.partition(":")[0].lower(),)
    if text == "~" or text.startswith("~/"):
        text = home + text[1:]
    try:
        return urls.parts(urls.locate(text, base=base))
    except RequestError as cause:
        raise ConfigError(f"cannot use {where}: {cause}") from cause


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"cannot use {where}: it must be a table, not {value!r}")
    return value


def _settings(value: object, where: str) -> Mapping[str, Chosen]:
    found = {}
    for name, given in _table(value, where).items():
        setting = _BY_NAME.get(name)
        if setting is None:
            raise noted(ConfigError(f"unknown setting {name!r} in {where}"), did_you_mean(name, _BY_NAME))
        try:
            found[name] = Chosen(_KINDS[setting.kind](given), where)
        except ValueError as cause:
            raise ConfigError(f"cannot use {name} = {given!r} in {where}: it must be {cause}") from None
    return MappingProxyType(found)


def _as_name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a name")
    return value


def _as_options(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("a table")
    return dict(value)


def as_bytes(value: object) -> int:
    """Return a number of bytes, which may be a text with a unit; raise `ValueError` for anything else.

    >>> as_bytes("64MiB"), as_bytes("1048576")
    (67108864, 1048576)
    """
    size = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if size is not None and size["unit"].lower() in _UNITS:
        value = int(float(size["number"]) * _UNITS[size["unit"].lower()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a number of bytes, such as 1048576, '64MiB' or '2GB'")
    return value


def _as_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number from 1 on")
    return value


def _as_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 (a ValueError is what the caller turns into a ConfigError)
    return value


_KINDS: Mapping[str, Callable[[object], object]] = MappingProxyType(
    {"name": _as_name, "table": _as_options, "bytes": as_bytes, "count": _as_count, "flag": _as_flag}
)


# --- where layers come from ------------------------------------------------------------------------------------------


def read_layers(env: Mapping[str, str], cwd: str, home: str) -> tuple[Layer, ...]:
    """Return the layers of this machine, weakest first: user file, project file, inline text.

    `$MILEPOST_CONFIG` stands in for the project file, and must exist; a variable that is empty counts as not set. Files
    are read again when they change.
    """
    configs = env.get("XDG_CONFIG_HOME", "")
    user = Path(configs if os.path.isabs(configs) else Path(home, ".config"), "milepost", FILE)  # noqa: PTH117 (text)
    layers = [_read_file(str(user), home)]
    named = env.get("MILEPOST_CONFIG", "")
    if named:
        layers.append(_read_file(os.path.join(cwd, named), home) or _no_file(named))  # noqa: PTH118 (text)
    else:
        layers.append(_nearest(cwd, home))
    inline = env.get("MILEPOST_TOML", "")
    if inline:
        layers.append(_parse(inline, "$MILEPOST_TOML", cwd, home))
    return tuple(layer for layer in layers if layer is not None)


def current_layers() -> tuple[Layer, ...]:
    """Return the layers of this process and this context: what `read_layers` finds, then what `configured` added."""
    return read_layers(os.environ, _cwd(), os.path.expanduser("~")) + _PUSHED.get()  # noqa: PTH111 (text)


@contextlib.contextmanager
def configured(table: Mapping[str, object]) -> Iterator[None]:
    """Let settings hold inside the `with` block, as the strongest layer.

    The table is what `milepost.toml` would hold: `{"default": {"verify": False}}`. Blocks nest, and the inner one is
    stronger. Settings are read when `save` or `load` is called: a save that is still being written keeps those it began
    with. The block holds for its own thread and task, as `contextvars` says.
    """
    layer = make_layer(table, "milepost.configured", base=_cwd(), home=os.path.expanduser("~"))  # noqa: PTH111 (text)
    token = _PUSHED.set((*_PUSHED.get(), layer))
    try:
        yield
    finally:
        _PUSHED.reset(token)


def _cwd() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 (text)
    except FileNotFoundError:
        return "/"  # somebody removed the directory; absolute paths still work


def _nearest(cwd: str, home: str) -> Layer | None:
    for folder in (cwd, *map(str, Path(cwd).parents)):
        layer = _read_file(f"{folder}/{FILE}", home)
        if layer is not None:
            return layer
    return None


def _no_file(path: str) -> NoReturn:
    raise noted(
        ConfigError(f"cannot read $MILEPOST_CONFIG {path!r}: there is no such file"),
        "unset MILEPOST_CONFIG, or mend it",
    )


def _read_file(path: str, home: str) -> Layer | None:
    try:
        found = os.stat(path)  # noqa: PTH116 (called for every folder up to the root at every call)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if stat.S_ISDIR(found.st_mode):
        return None
    return _load(path, home, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=32)
def _load(path: str, home: str, _mtime_ns: int, _size: int) -> Layer:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read {path}: {cause}") from cause
    return parse_layer(text, path, base=os.path.dirname(path), home=home)  # noqa: PTH120 (text)


@functools.lru_cache(maxsize=32)
def _parse(text: str, origin: str, base: str, home: str) -> Layer:
    return parse_layer(text, origin, base=base, home=home)
