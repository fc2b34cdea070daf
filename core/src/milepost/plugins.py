"""Which packages are used for which name, and what becomes of those that do not work.

The rule: entry points *claim* names, hooks *register* what is behind them. Claims are read from package metadata, so
that a name is answered without importing anybody; a module is imported and registered when a name it claims is first
asked for. A package that does not work is an error for whoever asks for it, and for nobody else. Packages in the group
`milepost.plugins` are asked for by every save and load: one of them may be a wrapper that encrypts, so a broken one
stops everything until it is mended or switched off.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import re
import threading
import warnings
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import pluggy

from milepost.config import did_you_mean
from milepost.errors import PluginBrokenError, PluginConflictError, PluginNotFoundError, PluginWarning, noted
from milepost.hookspecs import PROJECT, Hooks, StorageFactory, hookimpl
from milepost.protocols import ArrayIO, CommitStrategy, Layout, LeafHandler, Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from milepost.errors import PluginError
    from milepost.hookspecs import CheckpointEvent

__all__ = ["GROUPS", "HINTS", "OURS", "Claim", "Plugins", "Problem", "installed", "missing_members"]

STORAGE, COMMIT, ARRAYS, LAYOUTS, PLUGINS = GROUPS = (
    "milepost.storage",
    "milepost.commit",
    "milepost.arrays",
    "milepost.layouts",
    "milepost.plugins",
)
"""The groups of entry points in which packages claim names."""

OURS = frozenset(
    {
        *("milepost", "milepost-core"),
        *("milepost-gcs", "milepost-posix", "milepost-s3"),
        *("milepost-safetensors", "milepost-tensorstore", "milepost-zarr"),
    }
)
"""The distributions of this project, which `MILEPOST_DISABLE_PLUGINS=all` spares."""

HINTS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (STORAGE, "file"): "milepost-posix",
        (STORAGE, "gs"): "milepost-gcs",
        (STORAGE, "s3"): "milepost-s3",
        (COMMIT, "rename"): "milepost-posix",
        (ARRAYS, "safetensors"): "milepost-safetensors",
        (ARRAYS, "tensorstore"): "milepost-tensorstore",
        (ARRAYS, "zarr"): "milepost-zarr",
        (LAYOUTS, "huggingface"): "milepost-safetensors",
        (LAYOUTS, "orbax"): "milepost-tensorstore",
    }
)
"""The package of this project that offers a name."""

_DISABLE = "MILEPOST_DISABLE_PLUGINS"
_WORDS = {
    STORAGE: "storage",
    COMMIT: "commit strategy",
    ARRAYS: "array writer",
    LAYOUTS: "layout",
    PLUGINS: "plugin",
}
_REGISTER = {
    STORAGE: "register_storage",
    COMMIT: "register_commit",
    ARRAYS: "register_arrays",
    LAYOUTS: "register_layouts",
}
_MAKES: Mapping[str, type] = {STORAGE: Storage, COMMIT: CommitStrategy, ARRAYS: ArrayIO, LAYOUTS: Layout}


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One entry point: a name in a group, the module behind it, and the distribution that says so."""

    group: str
    name: str
    value: str
    distribution: str
    version: str

    def __str__(self) -> str:
        """Name the claim in a sentence.

        >>> str(Claim("milepost.storage", "file", "milepost_posix", "milepost-posix", "1.0"))
        "storage 'file' of milepost-posix 1.0"
        """
        return f"{_WORDS[self.group]} {self.name!r} of {self.distribution} {self.version}"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What does not work, and whose claim it is; None where it takes several packages together."""

    claim: Claim | None
    error: PluginError | PluginWarning


@dataclasses.dataclass(frozen=True, slots=True)
class _Registered:
    """A plugin that was imported, and the hooks it implements that this version does not know."""

    plugin: object
    left_out: tuple[str, ...]


class Plugins:
    """The packages that are installed, as one process sees them. All methods may be called from any thread."""

    def __init__(self, disabled: Iterable[str] | None = None) -> None:
        if disabled is None:
            disabled = os.environ.get(_DISABLE, "").split(",")
        names = frozenset(name.strip() for name in disabled)
        found = sorted(_read_claims(), key=lambda claim: (claim.distribution not in OURS, *dataclasses.astuple(claim)))
        self._claims = tuple(claim for claim in found if not _switched_off(claim, names))
        self._off = tuple(claim for claim in found if _switched_off(claim, names))
        self._manager = _Manager(PROJECT)
        self._manager.add_hookspecs(Hooks)
        self._manager.register(_BuiltIn(), name=PROJECT)
        self._lock = threading.RLock()
        self._registered: dict[str, _Registered] = {}
        self._registrations: dict[tuple[str, str], dict[str, object]] = {}
        self._factories: dict[Claim, Callable[..., Any]] = {}
        self._warned: set[str] = set()
        self._all_loaded = False

    def claims(self, group: str) -> tuple[Claim, ...]:
        """Return what is claimed in a group by packages that are not switched off; imports nothing."""
        return tuple(claim for claim in self._claims if claim.group == group)

    def switched_off(self) -> tuple[Claim, ...]:
        """Return the claims that MILEPOST_DISABLE_PLUGINS switches off."""
        return self._off

    def storage(self, name: str) -> StorageFactory:
        """Return what opens storages under a name; what it returns is checked against `Storage`."""
        return cast("StorageFactory", self._factory(STORAGE, name))

    def commit(self, name: str) -> Callable[..., CommitStrategy]:
        """Return what makes the commit strategy of a name; what it returns is checked against `CommitStrategy`."""
        return self._factory(COMMIT, name)

    def arrays(self, name: str) -> Callable[..., ArrayIO]:
        """Return what makes the array writer of a name; what it returns is checked against `ArrayIO`."""
        return self._factory(ARRAYS, name)

    def layout(self, name: str) -> Callable[..., Layout]:
        """Return what makes the layout of a name; what it returns is checked against `Layout`."""
        return self._factory(LAYOUTS, name)

    def leaf_handlers(self) -> tuple[LeafHandler, ...]:
        """Return the leaf handlers of all packages in `milepost.plugins`; this project's come first."""
        found: dict[str, tuple[LeafHandler, Claim]] = {}
        for claim, handler in self._collect("register_leaf_handlers", lambda found: found.append):
            missing = missing_members(handler, LeafHandler)
            if missing:
                raise _broken(claim, f"registers a leaf handler {handler!r} that lacks {_listed(missing)}")
            other = found.setdefault(handler.name, (handler, claim))
            if other[0] is not handler:
                raise _conflict(f"leaf handler {handler.name!r}", [other[1], claim])
        return tuple(handler for handler, _ in found.values())

    def name_formats(self) -> dict[str, Callable[..., object]]:
        """Return the factories of step name formats of all packages in `milepost.plugins`, by name."""
        found: dict[str, tuple[Callable[..., object], Claim]] = {}
        into = lambda pairs: lambda name, factory: pairs.append((name, factory))  # noqa: E731 (a def would be longer)
        for claim, (name, factory) in self._collect("register_name_formats", into):
            if not callable(factory):
                raise _broken(claim, f"registers {factory!r} for the name format {name!r}, which cannot be called")
            other = found.setdefault(name, (factory, claim))
            if other[0] is not factory:
                raise _conflict(f"name format {name!r}", [other[1], claim])
        return {name: factory for name, (factory, _) in found.items()}

    def open_storage(self, factory: StorageFactory, url: str, options: Mapping[str, Any]) -> Storage:
        """Open the storage below a root URL, decorated by every wrapper that is installed."""
        self.load_all()
        opened = self._manager.hook.open_storage(factory=factory, url=url, options=options)
        missing = missing_members(opened, Storage)
        if missing:
            hooks = self._manager.hook.open_storage.get_hookimpls()
            wrappers = [impl.plugin_name for impl in hooks if impl.plugin_name != PROJECT]
            raise PluginBrokenError(
                f"the hook open_storage returned {type(opened).__name__} for {url!r}, which lacks {_listed(missing)}: "
                f"it is implemented by {_listed(wrappers)}"
            )
        return cast("Storage", opened)

    def tell(self, hook_name: str, event: CheckpointEvent) -> None:
        """Tell every observer what happened; one that raises is logged, and the others and the caller go on."""
        log = logging.getLogger(PROJECT)
        try:
            self.load_all()
        except Exception:
            log.exception("not every plugin could be told %s of %s", hook_name, event.url)
        hook = getattr(self._manager.hook, hook_name)
        for plugin in {id(impl.plugin): impl.plugin for impl in reversed(hook.get_hookimpls())}.values():
            try:
                self._only(plugin, hook_name)(event=event)
            except Exception:
                log.exception("%s failed in %s of %s", self._manager.get_name(plugin), hook_name, event.url)

    def load_all(self) -> None:
        """Import and register every package in `milepost.plugins`, once; raise if one of them does not work."""
        if self._all_loaded:
            return
        with self._lock:
            for claim in self.claims(PLUGINS):
                try:
                    self._ask(claim)
                except PluginBrokenError as error:
                    raise noted(error, f"to go on without it, set {_DISABLE}={claim.name}") from error.__cause__
            self._all_loaded = True

    def problems(self) -> tuple[Problem, ...]:
        """Import every package and return what does not work, and why."""
        found = [problem for claim in self._claims for problem in self._problems_of(claim)]
        if not any(problem.claim and problem.claim.group == PLUGINS for problem in found):
            found.extend(self._problems_together())
        return tuple(found)

    def _problems_of(self, claim: Claim) -> Iterator[Problem]:
        try:
            registered = self._load(claim)
            if registered.left_out:
                self._warned.add(claim.value)
                yield Problem(claim, PluginWarning(_from_the_future(claim, registered)))
            if claim.group != PLUGINS:
                self._find(claim.group, claim.name)
                self._registration(claim)
        except (PluginBrokenError, PluginConflictError) as error:
            yield Problem(claim, error)

    def _problems_together(self) -> Iterator[Problem]:
        for ask in (self.leaf_handlers, self.name_formats):
            try:
                ask()
            except (PluginBrokenError, PluginConflictError) as error:
                yield Problem(None, error)

    def _factory(self, group: str, name: str) -> Callable[..., Any]:
        claim = self._find(group, name)
        self._ask(claim)
        return self._factories.setdefault(claim, _checked(claim, self._registration(claim)))

    def _find(self, group: str, name: str) -> Claim:
        found = [claim for claim in self.claims(group) if claim.name == name]
        if not found:
            raise self._absent(group, name)
        if len(found) > 1:
            raise _conflict(f"{_WORDS[group]} {name!r}", found)
        return found[0]

    def _absent(self, group: str, name: str) -> PluginNotFoundError:
        for claim in self._off:
            if (claim.group, claim.name) == (group, name):
                error = PluginNotFoundError(f"the {claim} cannot be used: it is switched off")
                return noted(error, f"it is named in {_DISABLE}, or falls under 'all' there")
        offered = sorted({claim.name for claim in self.claims(group)})
        error = PluginNotFoundError(
            f"no installed package offers the {_WORDS[group]} {name!r}: there is {_listed(offered)}"
        )
        package = HINTS.get((group, name))
        if package:
            return noted(error, f"pip install {package}")
        return noted(error, did_you_mean(name, offered), f"a package offers it by an entry point in the group {group}")

    def _ask(self, claim: Claim) -> _Registered:
        registered = self._load(claim)
        if registered.left_out and claim.value not in self._warned:
            self._warned.add(claim.value)
            warnings.warn(_from_the_future(claim, registered), PluginWarning, stacklevel=3)
        return registered

    def _load(self, claim: Claim) -> _Registered:
        with self._lock:
            if claim.value not in self._registered:
                self._registered[claim.value] = self._register(claim, _import(claim))
            return self._registered[claim.value]

    def _register(self, claim: Claim, plugin: object) -> _Registered:
        known, unknown = self._manager.marked(plugin)
        if not known and not unknown:
            raise _broken(claim, f"has no function marked with milepost.hookspecs.hookimpl in {claim.value}")
        try:
            if not self._manager.is_registered(plugin):
                self._manager.register(plugin, name=claim.value)
        except pluggy.PluginValidationError as cause:
            if self._manager.has_plugin(claim.value):
                self._manager.unregister(name=claim.value)
            raise noted(
                _broken(claim, f"does not fit the hooks of this version: {' '.join(str(cause).split())}"),
                "an argument that not every version of milepost passes needs a default value",
            ) from cause
        return _Registered(plugin, unknown)

    def _registration(self, claim: Claim) -> Callable[..., Any]:
        hook_name = _REGISTER[claim.group]
        with self._lock:
            found = self._registrations.get((claim.value, hook_name))
            if found is None:
                found = {}
                self._call(claim, hook_name, found.__setitem__)
                self._registrations[claim.value, hook_name] = found
        if claim.name not in found:
            raise _broken(claim, f"claims the name and does not register it: {hook_name} registers {_listed(found)}")
        factory = found[claim.name]
        if not callable(factory):
            raise _broken(claim, f"registers {factory!r}, which cannot be called")
        return factory

    def _collect(self, hook_name: str, into: Callable[[list[Any]], Callable[..., None]]) -> Iterator[tuple[Claim, Any]]:
        self.load_all()
        for claim in {claim.value: claim for claim in self.claims(PLUGINS)}.values():
            found: list[Any] = []
            self._call(claim, hook_name, into(found))
            yield from ((claim, one) for one in found)

    def _call(self, claim: Claim, hook_name: str, register: Callable[..., None]) -> None:
        try:
            self._only(self._load(claim).plugin, hook_name)(register=register)
        except PluginBrokenError:
            raise
        except Exception as cause:
            raise _broken(claim, f"fails in {hook_name}: {cause!r}") from cause

    def _only(self, plugin: object, hook_name: str) -> pluggy.HookCaller:
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        return self._manager.subset_hook_caller(hook_name, others)


class _Manager(pluggy.PluginManager):
    """A plugin manager that leaves out hooks it has no specification for."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        options = super().parse_hookimpl_opts(plugin, name)
        if options is None or not hasattr(self.hook, options.get("specname") or name):
            return None
        return options

    def marked(self, plugin: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the hooks that a plugin implements: those that exist, and those that do not."""
        known, unknown = [], []
        for name in dir(plugin):
            options = super().parse_hookimpl_opts(plugin, name)
            if options is not None and self.parse_hookimpl_opts(plugin, name) is not None:
                known.append(name)
            elif options is not None and not options.get("optionalhook"):
                unknown.append(options.get("specname") or name)
        return tuple(known), tuple(unknown)


class _BuiltIn:
    """The hooks that milepost implements itself."""

    @hookimpl(trylast=True)
    def open_storage(self, factory: StorageFactory, url: str, options: Mapping[str, Any]) -> Storage:
        return factory(url, **options)


@functools.cache
def installed() -> Plugins:
    """Return the plugins of this process; `MILEPOST_DISABLE_PLUGINS` is read at the first call."""
    return Plugins()


def missing_members(obj: object, protocol: type) -> tuple[str, ...]:
    """Return the members of a protocol that an object lacks, or has as something that cannot be called.

    >>> from typing import Protocol
    >>> class Named(Protocol):
    ...     def name(self) -> str: ...
    >>> missing_members(object(), Named)
    ('name',)
    """
    return tuple(name for name, called in _members(protocol) if not _fits(obj, name, called))


@functools.cache
def _members(protocol: type) -> tuple[tuple[str, bool], ...]:
    members: dict[str, bool] = {}
    for part in protocol.__mro__:
        if getattr(part, "_is_protocol", False):
            members |= {name: callable(value) for name, value in vars(part).items() if not name.startswith("_")}
            members |= dict.fromkeys(inspect.get_annotations(part), False)
    return tuple(sorted(members.items()))


def _fits(obj: object, name: str, called: bool) -> bool:  # noqa: FBT001 (private, and read at one place)
    member = getattr(type(obj), name, None)
    if member is not None:
        return callable(member) or not called  # a property is not asked: it may look at the disk
    # A wrapper may pass calls on by __getattr__, which the static look of isinstance would not see.
    return hasattr(obj, name) and (callable(getattr(obj, name)) or not called)


def _read_claims() -> Iterator[Claim]:
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
            # Only metadata that speaks of us is worth parsing: hundreds of packages may be installed.
            claims = _claims_of(distribution) if PROJECT in text else frozenset()
        except Exception as cause:  # noqa: BLE001 (metadata of a stranger may fail in any way, and must not stop the others)
            warnings.warn(f"cannot read the entry points of a package: {cause!r}", PluginWarning, stacklevel=4)
            continue
        names = {re.sub(r"[-_.]+", "-", claim.distribution).lower() for claim in claims}
        # One distribution found twice (editable and installed) is itself: the first on sys.path is the one imported.
        if not names & seen:
            yield from claims
        seen |= names


def _claims_of(distribution: metadata.Distribution) -> frozenset[Claim]:
    name, version = str(distribution.metadata["Name"]), str(distribution.version)
    return frozenset(
        Claim(point.group, point.name, point.value, name, version)
        for point in distribution.entry_points
        if point.group in GROUPS
    )


def _switched_off(claim: Claim, names: frozenset[str]) -> bool:
    return bool({claim.name, claim.distribution} & names) or ("all" in names and claim.distribution not in OURS)


def _import(claim: Claim) -> object:
    try:
        return metadata.EntryPoint(claim.name, claim.value, claim.group).load()
    except (Exception, SystemExit) as cause:
        error = _broken(claim, f"cannot be imported: {cause!r}")
        raise noted(error, f"upgrade, reinstall or remove {claim.distribution}") from cause


def _checked(claim: Claim, factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        made = factory(*args, **kwargs)
        missing = missing_members(made, _MAKES[claim.group])
        if missing:
            raise _broken(claim, f"made {type(made).__name__}, which lacks {_listed(missing)}")
        return made

    return make


def _broken(claim: Claim, reason: str) -> PluginBrokenError:
    return PluginBrokenError(f"the {claim} {reason}")


def _conflict(what: str, claims: Iterable[Claim]) -> PluginConflictError:
    claimed = [f"{claim.distribution} {claim.version} ({claim.value})" for claim in claims]
    return noted(
        PluginConflictError(f"the {what} is claimed more than once: by {' and by '.join(claimed)}"),
        f"uninstall one of them, or name its distribution in {_DISABLE}",
    )


def _from_the_future(claim: Claim, registered: _Registered) -> str:
    return (
        f"the {claim} implements {_listed(registered.left_out)}, which this version of milepost does not know: left out"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing"
