"""How what a caller wants loaded becomes a target and rules of the engine.

Decides what the leaves of an abstract tree mean, and who loads an item. The rule: the target's word first, then the
caller's rule for shardings, then what was saved; the options of the active context hold, and what is passed to the call
is stronger.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import numpy as np

from milepost.dtypes import dtype_named
from milepost.engine.choosing import LoadRules, Selection
from milepost.engine.items import folder_of
from milepost.engine.loading import AS_SAVED, load_item, reading
from milepost.engine.placing import LeafTarget
from milepost.errors import ConfigError
from milepost.settings import applied
from milepost.structure import key_text
from milepost.trees import target_leaves
from milepost.v1._context import current_settings
from milepost.v1._looking import located, no_item, tree_name
from milepost.v1._metadata import CheckpointMetadata
from milepost.v1._phases import awaited
from milepost.v1._registry import global_registry, handler_for_loading, no_handler
from milepost.v1.handlers import PyTreeHandler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from milepost.engine.choosing import Missing, Place
    from milepost.engine.progress import Progress
    from milepost.engine.reading import Checkpoint
    from milepost.manifest import ArrayLeaf
    from milepost.path._finding import PathLike
    from milepost.plugins import Plugins
    from milepost.settings import Settings

__all__ = ["LoadOptions", "load_items", "load_tree"]

_TYPES = (bool, int, float, complex)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What can be said of one load, besides its target.

    `sharding` is a sharding, a function from the path of an array and what it is (`jax.ShapeDtypeStruct`) to one or to
    None, or `np.ndarray` for arrays in host memory. It is asked for what was saved from devices.
    """

    include: Sequence[str] | str = ()
    exclude: Sequence[str] | str = ()
    missing: Missing = "error"
    extra: Literal["error", "ignore"] = "error"
    progress: Progress | None = None
    sharding: Any = None

    def rules(self, settings: Settings) -> LoadRules:
        """Return what the engine is told; raises `ConfigError` for a word that is none of those allowed."""
        if self.missing not in ("error", "keep") and not callable(self.missing):
            raise ConfigError(f"cannot load with missing={self.missing!r}: it is 'error', 'keep' or a function")
        if self.extra not in ("error", "ignore"):
            raise ConfigError(f"cannot load with extra={self.extra!r}: it is 'error' or 'ignore'")
        return LoadRules(
            missing=self.missing,
            extra="ignore" if settings.partial else self.extra,
            selection=Selection(_patterns(self.include), _patterns(self.exclude)),
            place=_place(self.sharding),
            progress=self.progress,
        )


def _patterns(given: Sequence[str] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


Rule: TypeAlias = "Callable[[str, jax.ShapeDtypeStruct], Any]"


def _rule(sharding: Any) -> Rule | None:
    if sharding is None or (callable(sharding) and not isinstance(sharding, type)):
        return sharding
    if sharding is np.ndarray or isinstance(sharding, jax.sharding.Sharding):
        return lambda _path, _array: sharding
    raise ConfigError(f"cannot load with sharding={sharding!r:.80}: it is a sharding, a function or numpy.ndarray")


def _place(sharding: Any) -> Place | None:
    rule = _rule(sharding)
    if rule is None:
        return None

    def place(path: str, array: ArrayLeaf) -> Any:
        if array.sharding is None:
            return None
        what: Any = jax.ShapeDtypeStruct
        return rule(path, what(array.shape, dtype_named(array.dtype)))

    return place


def load_tree(path: PathLike, abstract: Any, name: str | None, options: LoadOptions) -> Any:
    """Load one tree under the options of the active context."""
    settings = current_settings()
    rules, target = options.rules(settings), _target(abstract, options, settings)

    def act(checkpoint: Checkpoint, plugins: Plugins) -> Any:
        return load_item(checkpoint, tree_name(checkpoint, name), plugins, target=target, rules=rules)

    url = located(path)
    with applied(settings, url):
        return reading(url, act)


def load_items(path: PathLike, abstract: Any, options: LoadOptions) -> dict[str, Any]:
    """Load all items of a checkpoint, or those named; `KeyError` for a name that it does not have."""
    settings = current_settings()
    rules = options.rules(settings)
    wanted: Mapping[str, Any] | None = abstract.metadata if isinstance(abstract, CheckpointMetadata) else abstract

    def act(checkpoint: Checkpoint, plugins: Plugins) -> dict[str, Any]:
        names = list(wanted) if wanted else sorted(checkpoint.manifest.items)
        for name in names:
            if name not in checkpoint.manifest.items:
                raise no_item(checkpoint, name)
        targets = {name: (wanted or {}).get(name) for name in names}
        # Trees first: what is wrong with them is found before any object has been changed in place.
        order = sorted(names, key=lambda name: not checkpoint.manifest.items[name].writer)
        loaded = {name: _load(checkpoint, plugins, name, targets[name], (options, rules, settings)) for name in order}
        return {name: loaded[name] for name in names}

    url = located(path)
    with applied(settings, url):
        return reading(url, act)


_Rules: TypeAlias = tuple[LoadOptions, LoadRules, "Settings"]


def _load(checkpoint: Checkpoint, plugins: Plugins, name: str, abstract: Any, how: _Rules) -> Any:
    options, rules, settings = how
    item = checkpoint.manifest.items[name]
    handler = handler_for_loading(settings.registry or global_registry(), name, item.handler, abstract)
    if item.writer and (handler is None or type(handler) is PyTreeHandler):
        return load_item(checkpoint, name, plugins, target=_target(abstract, options, settings), rules=rules)
    if handler is None:
        raise no_handler(name, abstract)
    with folder_of(checkpoint, item) as folder:
        from upath import UPath

        return awaited(lambda: handler.load(UPath(folder), abstract))


# --- targets ---------------------------------------------------------------------------------------------------------


def _target(abstract: Any, options: LoadOptions, settings: Settings) -> Any:
    if isinstance(abstract, CheckpointMetadata):
        abstract = abstract.metadata
    if abstract is None:
        return AS_SAVED
    rule = _rule(options.sharding)
    found = target_leaves(abstract)
    leaves = [
        _leaf(leaf, path, rule, fit=settings.resize) for leaf, path in zip(found.leaves, found.paths, strict=True)
    ]
    return found.unflatten(leaves) if any(a is not b for a, b in zip(leaves, found.leaves, strict=True)) else abstract


def _leaf(leaf: Any, path: Sequence[Any], rule: Rule | None, *, fit: bool) -> Any:
    """Return what a leaf of the caller's means, itself where the engine knows."""
    if isinstance(leaf, type):
        return LeafTarget(leaf) if leaf in _TYPES else leaf() if leaf in (str, bytes) else leaf
    abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    if not abstract and not (fit and isinstance(leaf, jax.Array | np.ndarray)):
        return leaf
    if not isinstance(leaf.dtype, np.dtype):
        return leaf  # random keys
    place = None if isinstance(leaf, np.ndarray) or not getattr(leaf, "committed", True) else leaf.sharding
    # Abstract arrays that tracing gives may say how they are split, but not over which devices.
    nowhere = place is None or isinstance(getattr(place, "mesh", None), jax.sharding.AbstractMesh)
    if abstract and nowhere and rule is not None:
        place = rule("/".join(map(key_text, path)), leaf)
    elif nowhere and place is not None:
        place = None
    elif not fit:
        return leaf
    kind = np.ndarray if isinstance(leaf, np.ndarray) or place is np.ndarray else jax.Array
    return LeafTarget(kind, tuple(leaf.shape), leaf.dtype, None if place is np.ndarray else place, fit=fit)
