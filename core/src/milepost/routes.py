"""Which storage, commit strategy and array writer serve a URL, and why.

The rule: everything that can be wrong with a choice is found before a byte is written. A route is a frozen value: made
once per call, from the settings that hold for the URL and from what the installed packages claim. A URL is opened by
the storage that claims its scheme; what nobody claims goes to fsspec, with its weaker guarantee said once, unless this
project has a package for it that is merely not installed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milepost import urls
from milepost.config import BUILT_IN, Chosen, current_layers, did_you_mean, lookup
from milepost.errors import ConfigError, MilepostError, PluginError, PluginNotFoundError, WeakGuaranteeWarning, noted
from milepost.plugins import COMMIT, HINTS, STORAGE, Plugins, installed, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable

    from milepost.protocols import CommitStrategy, Storage

__all__ = [
    "GENERIC",
    "Choice",
    "Explanation",
    "OpenRoute",
    "Route",
    "explain",
    "open_route",
    "resolve",
    "taken_options",
]

GENERIC = "fsspec"
"""The storage that opens what no package claims."""

_SECRET = re.compile(r"secret|token|passw|credential|(^|_)key($|_)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """How one checkpoint is reached: what serves it, with which options, within which bounds.

    `commit` None means the strategy that the storage says fits it best; a budget None means automatic. `origins` says
    of every setting where it was read.
    """

    url: str
    root: str
    name: str
    storage: str
    commit: str | None
    arrays: str
    # Options may hold credentials, which must not reach a log by way of a repr.
    storage_options: Mapping[str, Any] = dataclasses.field(repr=False)
    commit_options: Mapping[str, Any] = dataclasses.field(repr=False)
    arrays_options: Mapping[str, Any] = dataclasses.field(repr=False)
    save_budget: int | None
    load_budget: int | None
    threads: int
    verify: bool
    mapped: bool
    writing: bool
    origins: Mapping[str, str] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class OpenRoute:
    """A route with its storage opened and its commit strategy made; they fit each other."""

    route: Route
    storage: Storage
    commit: CommitStrategy


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One setting as it holds for a URL, and where it was read."""

    setting: str
    value: object
    origin: str


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """What serves a URL, and why: plain data. What could not be found out is None, and `problems` says why."""

    url: str
    root: str | None
    name: str | None
    choices: tuple[Choice, ...]
    storage_class: str | None
    commit_promise: str | None
    problems: tuple[str, ...]


def resolve(url: str | os.PathLike[str], plugins: Plugins | None = None, *, writing: bool = False) -> Route:
    """Return the route of a checkpoint.

    With `writing`, the array writer is checked, too; reading does not need it. Raises `RequestError` for a path that
    cannot name a checkpoint, `ConfigError` for settings that cannot be right, and `PluginError` for what cannot be had.
    """
    plugins = plugins or installed()
    url = urls.locate(url)
    root, name = urls.split(url)
    chosen = _chosen(url, plugins)
    value: dict[str, Any] = {setting: one.value for setting, one in chosen.items()}
    value |= {setting: dict(one) for setting, one in value.items() if isinstance(one, Mapping)}
    _check_options("storage", chosen, plugins.storage(value["storage"]), url)
    if value["commit"] is not None:
        _check_options("commit", chosen, plugins.commit(value["commit"]), url)
    if writing:
        _check_options("arrays", chosen, plugins.arrays(value["arrays"]), url)
    origins = {setting: one.origin for setting, one in chosen.items()}
    return Route(url=url, root=root, name=name, writing=writing, origins=origins, **value)


def open_route(route: Route, plugins: Plugins | None = None) -> OpenRoute:
    """Open the storage of a route and make its commit strategy; raise if the two do not fit each other."""
    plugins = plugins or installed()
    opened = _open(route, plugins)
    if route.writing and route.storage == GENERIC:
        _warn_once(plugins, urls.scheme(route.url), opened.commit.promise)
    return opened


def explain(url: str | os.PathLike[str], plugins: Plugins | None = None) -> Explanation:
    """Say what serves a URL and why; what does not work is told, not raised.

    Raises only for what leaves nothing to explain: a path that is none, and settings that cannot be read.
    """
    plugins = plugins or installed()
    url = urls.locate(url)
    problems: list[str] = []
    root, name = _told(problems, lambda: urls.split(url)) or (None, None)
    chosen = _told(problems, lambda: _chosen(url, plugins))
    if chosen is None:
        return Explanation(url, root, name, _choices(lookup(current_layers(), url)), None, None, tuple(problems))
    storage = commit = None
    route = _told(problems, lambda: resolve(url, plugins)) if name else None
    if route is not None:
        _told(problems, lambda: resolve(url, plugins, writing=True))
        storage = _told(problems, lambda: plugins.open_storage(*_opening(route, plugins)))
    if route is not None and storage is not None:
        if route.commit is None:
            chosen["commit"] = Chosen(storage.commit, f"what fits {type(storage).__name__} best")
        commit = _told(problems, lambda: _strategy(route, storage, plugins))
    return Explanation(
        url=url,
        root=root,
        name=name,
        choices=_choices(chosen),
        storage_class=storage and f"{type(storage).__module__}.{type(storage).__qualname__}",
        commit_promise=commit and commit.promise,
        problems=tuple(problems),
    )


# --- choosing --------------------------------------------------------------------------------------------------------


def _chosen(url: str, plugins: Plugins) -> dict[str, Any]:
    chosen = lookup(current_layers(), url)
    if chosen["storage"].value is None:
        chosen["storage"] = Chosen(_storage_for(url, plugins), f"the scheme of {url}")
    if chosen["threads"].value is None:
        chosen["threads"] = Chosen(_automatic_threads(), BUILT_IN)
    return chosen


def _storage_for(url: str, plugins: Plugins) -> str:
    scheme = urls.scheme(url)
    claimed = {claim.name for claim in (*plugins.claims(STORAGE), *plugins.switched_off()) if claim.group == STORAGE}
    if scheme in claimed or (STORAGE, scheme) in HINTS:
        return scheme
    _check_generic(url, scheme, claimed)
    return GENERIC


def _check_generic(url: str, scheme: str, claimed: set[str]) -> None:
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    try:
        get_filesystem_class(scheme)
    except ValueError as cause:
        raise noted(
            PluginNotFoundError(f"no installed package opens {url!r}: none knows the scheme {scheme!r}"),
            did_you_mean(scheme, claimed, known_implementations),
            f"a package offers it by an entry point {scheme!r} in the group {STORAGE}",
        ) from cause
    except ImportError as cause:
        package = known_implementations[scheme]["class"].partition(".")[0]
        raise noted(
            PluginNotFoundError(f"cannot open {url!r}: a package that fsspec needs for it is missing: {cause}"),
            *([] if package == "fsspec" else [f"pip install {package}"]),
        ) from cause


def _automatic_threads() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return max(2, min(16, len(available(0)) if available else os.cpu_count() or 1))


def _check_options(role: str, chosen: Mapping[str, Any], factory: Callable[..., Any], url: str) -> None:
    options, origin = chosen[f"{role}_options"].value, chosen[f"{role}_options"].origin
    parameters = _parameters(factory)
    if parameters is None:
        return  # written in C without a signature: it checks its options itself
    what = f"{role} {chosen[role].value!r}"
    named = [one for one in parameters if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}]
    if role == "storage" and named and not any(one.kind is one.POSITIONAL_ONLY for one in parameters):
        named = named[1:]  # the URL
    missing = [one.name for one in named if one.default is one.empty and one.name not in options]
    if missing:
        raise noted(
            ConfigError(f"the {what} for {url!r} needs the option {missing[0]!r}: it is not in {role}_options"),
            f"the options were read from: {origin}",
        )
    names = {one.name for one in named}
    unknown = [] if any(one.kind is one.VAR_KEYWORD for one in parameters) else [*options.keys() - names]
    if unknown:
        raise noted(
            ConfigError(f"unknown option {min(unknown)!r} in {role}_options of {origin}: the {what} does not take it"),
            did_you_mean(min(unknown), names),
        )


def taken_options(factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some options that a factory takes by name."""
    names = {
        one.name for one in _parameters(factory) or () if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}
    }
    return {name: value for name, value in options.items() if name in names}


@functools.cache
def _parameters(factory: Callable[..., Any]) -> tuple[inspect.Parameter, ...] | None:
    try:
        return tuple(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return None


# --- opening ---------------------------------------------------------------------------------------------------------


def _open(route: Route, plugins: Plugins) -> OpenRoute:
    storage = plugins.open_storage(*_opening(route, plugins))
    return OpenRoute(route, storage, _strategy(route, storage, plugins))


def _opening(route: Route, plugins: Plugins) -> tuple[Any, str, Mapping[str, Any]]:
    return plugins.storage(route.storage), route.root, route.storage_options


def _strategy(route: Route, storage: Storage, plugins: Plugins) -> CommitStrategy:
    name = route.commit or storage.commit
    factory = plugins.commit(name)
    if route.commit is None:
        chosen = {
            "commit": Chosen(name, ""),
            "commit_options": Chosen(route.commit_options, route.origins["commit_options"]),
        }
        _check_options("commit", chosen, factory, route.url)
    strategy = factory(**route.commit_options)
    lacking = _lacking(storage, strategy)
    if lacking:
        raise noted(
            ConfigError(
                f"the commit strategy {name!r} cannot be kept by {type(storage).__name__} at {route.root!r}: "
                f"it needs {', '.join(lacking)}"
            ),
            f"what fits: {', '.join(map(repr, _fitting(storage, plugins))) or 'nothing that is installed'}",
        )
    return strategy


def _lacking(storage: Storage, strategy: CommitStrategy) -> list[str]:
    return [needed.__name__ for needed in strategy.needs if missing_members(storage, needed)]


def _fitting(storage: Storage, plugins: Plugins) -> list[str]:
    fitting = []
    for name in sorted({claim.name for claim in plugins.claims(COMMIT)}):
        try:
            if not _lacking(storage, plugins.commit(name)()):
                fitting.append(name)
        except (PluginError, TypeError):
            continue  # broken, or in need of options: nothing to recommend
    return fitting


@functools.cache
def _warn_once(_plugins: Plugins, scheme: str, promise: str) -> None:
    message = f"{scheme}:// is opened through fsspec, with a weaker guarantee: {promise}"
    warnings.warn(message, WeakGuaranteeWarning, stacklevel=3)


# --- explaining ------------------------------------------------------------------------------------------------------


def _told(problems: list[str], act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:  # noqa: BLE001 (an explanation of what is broken must not break)
        said = str(error) if isinstance(error, MilepostError) else repr(error)
        problem = "; ".join([said, *getattr(error, "__notes__", ())])
        if problem not in problems:
            problems.append(problem)
        return None


def _choices(chosen: Mapping[str, Chosen]) -> tuple[Choice, ...]:
    return tuple(Choice(setting, _shown(one.value), one.origin) for setting, one in chosen.items())


def _shown(value: object) -> object:
    if value is None:
        return "automatic"
    if not isinstance(value, Mapping):
        return value
    return {key: "***" if _SECRET.search(str(key)) else _shown(one) for key, one in value.items()}
