"""How a load goes, from a manifest to the caller's tree.

The rule: everything that can be wrong is found before a data byte moves; then just the boxes this host needs are read,
each put where it belongs as soon as it is there, so that little is held beyond the result.

A checkpoint that is overwritten while it is read may lose its files under the reader, or have others in their place:
when the commit object names another attempt by then, the load starts again. With checksums, bytes of another attempt
are noticed as they come; without, the commit object is looked at once more in the end.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from milepost.engine.arriving import Arrays
from milepost.engine.budgets import automatic_budget
from milepost.engine.choosing import LoadRules, pruned, without_classes
from milepost.engine.collecting import resting_collector
from milepost.engine.placing import (
    DEFAULT_DEVICE,
    SKIP,
    LeafTarget,
    Skipped,
    Wanted,
    found_here,
    want_as_saved,
    want_as_target,
)
from milepost.engine.progress import Progressing, log_seconds
from milepost.engine.reading import Checkpoint, choose_item, open_checkpoint
from milepost.errors import (
    DamagedError,
    InvalidLayoutError,
    ManifestError,
    MilepostError,
    MismatchError,
    NotFoundError,
    PluginNotFoundError,
    StorageError,
    noted,
)
from milepost.hookspecs import CheckpointEvent
from milepost.plugins import Plugins, installed
from milepost.protocols import Array, ArrayIO, Location, ReadOptions, ReadRequest
from milepost.structure import Key, build, key_text, leaf_names, leaf_paths, show_path
from milepost.trees import Target, difference, handlers_of, make_custom, matching, target_leaves

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.manifest import Item

__all__ = ["AS_SAVED", "load", "load_item", "reading"]

AS_SAVED = object()
"""The target of a load that has none."""

PLACEHOLDER = ...
"""What stands for a leaf that is not loaded, where its container needs it to have a place."""

_ATTEMPTS = 3
_SHOWN = 20
_STRICT = LoadRules()

T = TypeVar("T")


def load(
    path: str | os.PathLike[str], target: Any = AS_SAVED, *, item: str = "AUTO", rules: LoadRules = _STRICT
) -> Any:
    """Load one item of a checkpoint: as it was saved, or into a target."""

    def act(checkpoint: Checkpoint, plugins: Plugins) -> Any:
        name, _ = choose_item(checkpoint.manifest, item, checkpoint.url)
        return load_item(checkpoint, name, plugins, target=target, rules=rules)

    return reading(path, act)


def reading(path: str | os.PathLike[str], act: Callable[[Checkpoint, Plugins], T]) -> T:
    """Open a checkpoint and let `act` read it; once more if it was overwritten meanwhile."""
    plugins = installed()
    with resting_collector():
        checkpoint = open_checkpoint(path, plugins)
    for _ in range(_ATTEMPTS - 1):
        try:
            return _observed(checkpoint, plugins, act)
        except (DamagedError, NotFoundError, StorageError):
            again = open_checkpoint(path, plugins)
            if again.manifest.attempt == checkpoint.manifest.attempt:
                raise
            checkpoint = again
    return _observed(checkpoint, plugins, act)


def _observed(checkpoint: Checkpoint, plugins: Plugins, act: Callable[[Checkpoint, Plugins], T]) -> T:
    began = time.perf_counter()
    value = act(checkpoint, plugins)
    if not checkpoint.route.verify:
        _check_still_there(checkpoint, plugins)
    manifest, seconds = checkpoint.manifest, {"load": time.perf_counter() - began}
    plugins.tell("restored", CheckpointEvent(checkpoint.url, manifest.attempt, manifest.data_bytes, seconds))
    log_seconds("loaded", checkpoint.url, manifest.data_bytes, seconds)
    return value


def load_item(
    checkpoint: Checkpoint, item: str, plugins: Plugins, *, target: Any = AS_SAVED, rules: LoadRules = _STRICT
) -> Any:
    """Load one tree of an open checkpoint, within `reading`."""
    with resting_collector():
        loader = _Loader(checkpoint, checkpoint.manifest.items[item], plugins, rules)
        return loader.as_saved() if target is AS_SAVED else loader.into(target_leaves(target))


def _check_still_there(checkpoint: Checkpoint, plugins: Plugins) -> None:
    if open_checkpoint(checkpoint.url, plugins).manifest.attempt != checkpoint.manifest.attempt:
        raise DamagedError(f"cannot load {checkpoint.url!r}: it was overwritten while it was read")


class _Loader:
    def __init__(self, checkpoint: Checkpoint, item: Item, plugins: Plugins, rules: LoadRules) -> None:
        self._checkpoint, self._item, self._plugins, self._rules = checkpoint, item, plugins, rules
        self._handlers = handlers_of(plugins)
        self._paths = list(leaf_paths(item.structure))
        self._shardings = [found_here(saved, rules.fallback) for saved in item.shardings]
        self._check_item()

    def _check_item(self) -> None:
        if not self._item.writer:
            raise noted(
                InvalidLayoutError(f"cannot load {self._checkpoint.url!r} as a tree: the item wrote its own files"),
                f"load it with what saved it: {self._item.handler or 'its writer did not say'}",
            )
        if idle := self._rules.selection.idle(self._paths):
            raise noted(
                MismatchError(f"cannot load from {self._checkpoint.url!r}: no leaf matches the pattern {idle[0]!r}"),
                f"there are {', '.join(map(repr, leaf_names(self._paths)[:_SHOWN]))}",
            )
        unknown = sorted({leaf["type"] for leaf in self._item.leaves} - self._handlers.by_name.keys())
        if unknown:
            raise noted(
                PluginNotFoundError(
                    f"cannot load {self._checkpoint.url!r}: no installed package handles leaves of kind {unknown[0]!r}"
                ),
                "install the package whose leaf handler saved them; it offers an entry point in milepost.plugins",
            )

    def as_saved(self) -> Any:
        """Load every chosen leaf as it was saved."""
        chosen = [self._rules.selection.chooses(path) for path in self._paths]
        wanted = [self._as_saved(at) if one else Wanted(SKIP) for at, one in enumerate(chosen)]
        unfit = (
            f"{show_path(path)}: {problem}"
            for path, leaf, want in zip(self._paths, self._item.leaves, wanted, strict=True)
            if (problem := self._misfit(leaf, want)) is not None
        )
        if (error := difference(unfit, self._checkpoint.url)) is not None:
            raise error
        values = self._values(wanted)
        structure, index = self._item.structure, list[int | None](range(len(values)))
        if not all(chosen):
            structure, index = pruned(structure, chosen)
        leaves = (PLACEHOLDER if at is None else values[at] for at in index)
        try:
            return build(structure if self._rules.classes else without_classes(structure), leaves, make_custom)
        except (TypeError, RecursionError) as error:
            raise ManifestError(f"cannot build the tree of {self._checkpoint.url!r}: {error}") from error

    def _as_saved(self, at: int) -> Wanted:
        leaf, rule = self._item.leaves[at], self._rules.place
        arrays = leaf.get("arrays", {})
        place = rule("/".join(map(key_text, self._paths[at])), arrays[""]) if rule and "" in arrays else None
        if place is None:
            return want_as_saved(leaf, self._shardings)
        asked = LeafTarget(np.ndarray) if place is np.ndarray else LeafTarget(jax.Array, sharding=place)
        found = want_as_target(leaf, asked, self._shardings, self._handlers)
        if isinstance(found, str):
            raise MismatchError(f"cannot load {self._checkpoint.url!r}: {show_path(self._paths[at])}: {found}")
        return found

    def into(self, target: Target) -> Any:
        """Load the leaves of a target."""
        wanted: list[Wanted] = [Wanted(SKIP) for _ in self._item.leaves]
        places: list[int | None] = []
        error = difference(list(self._match(target, wanted, places)), self._checkpoint.url)
        if error is not None:
            raise error
        values = self._values(wanted)
        return target.unflatten(
            [
                self._missing(path, leaf) if at is None else values[at]
                for leaf, path, at in zip(target.leaves, target.paths, places, strict=True)
            ]
        )

    def _missing(self, path: Sequence[Key], leaf: Any) -> Any:
        missing = self._rules.missing
        if leaf is None or not callable(missing) or not self._rules.selection.chooses(path):
            return leaf
        return missing("/".join(map(key_text, path)), leaf)

    def _match(self, target: Target, wanted: list[Wanted], places: list[int | None]) -> Iterator[str]:
        """Fill in what each saved leaf is wanted as, and where each target leaf comes from; yield what does not fit."""
        choosy = self._rules.selection
        saved = dict(zip(self._paths, range(len(self._paths)), strict=True))
        for leaf, path in zip(target.leaves, target.paths, strict=True):
            if choosy and not choosy.chooses(path):
                leaf = Skipped(leaf)  # noqa: PLW2901 - it stands for the leaf from here on
            at = saved.pop(path if path in saved else self._by_text.get(matching(path), path), None)
            places.append(at)
            if at is None:
                if self._rules.missing == "error" and leaf is not None and not isinstance(leaf, Skipped):
                    yield f"{show_path(path)}: missing from the checkpoint"
                continue
            found = want_as_target(self._item.leaves[at], leaf, self._shardings, self._handlers)
            problem = found if isinstance(found, str) else self._misfit(self._item.leaves[at], found)
            if isinstance(found, Wanted):
                wanted[at] = found
            if problem is not None:
                yield f"{show_path(path)}: {problem}"
        for at in saved.values() if self._rules.extra == "error" else ():
            if choosy and not choosy.chooses(self._paths[at]):
                continue
            yield f"{show_path(self._paths[at])}: missing from the target"

    @functools.cached_property
    def _by_text(self) -> dict[tuple[str, ...], tuple[Key, ...]]:
        """The paths by the text of their keys, which decides where the kinds of keys differ: 1 fits "1"."""
        return {matching(path): path for path in reversed(self._paths)}

    def _misfit(self, leaf: Mapping[str, Any], want: Wanted) -> str | None:
        """Say why the place of a leaf's arrays cannot hold them; a saved sharding that cannot is given up."""
        for array in leaf.get("arrays", {}).values():
            if not isinstance(want.place, Sharding) or isinstance(want.place, SingleDeviceSharding):
                return None
            try:
                want.place.addressable_devices_indices_map(array.shape)
            except Exception as error:  # noqa: BLE001 - JAX refuses in many ways
                if not any(want.place is saved for saved in self._shardings):
                    return f"saved with shape {array.shape}, which the target's sharding cannot split: {error}"
                want.place = DEFAULT_DEVICE
        return None

    def _values(self, wanted: Sequence[Wanted]) -> list[Any]:
        arrays = Arrays(self._checkpoint.url)
        names = leaf_names(self._paths)
        for at, (leaf, want) in enumerate(zip(self._item.leaves, wanted, strict=True)):
            if want.place is not SKIP:
                for part, array in leaf.get("arrays", {}).items():
                    arrays.want((at, part), f"{names[at]}~.{part}" if part else names[at], array, want)
        if arrays.requests:
            arrays.take(self._told(self._read(arrays.requests)))
        loaded: list[dict[str, Any]] = [{} for _ in wanted]
        for (at, part), array in arrays.results.items():
            loaded[at][part] = array
        return [
            want.template if want.place is SKIP else want.finish(self._put_together(leaf, parts))
            for leaf, want, parts in zip(self._item.leaves, wanted, loaded, strict=True)
        ]

    def _told(self, arrays: Iterator[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
        if self._rules.progress is None:
            yield from arrays
            return
        progress = Progressing(self._rules.progress, self._checkpoint.manifest.data_bytes)
        for index, array in arrays:
            progress.add(array.nbytes)
            yield index, array

    def _put_together(self, leaf: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        try:
            return self._handlers.by_name[leaf["type"]].put_together(leaf, arrays)
        except MilepostError:
            raise
        except Exception as error:
            raise ManifestError(
                f"cannot put together a leaf of kind {leaf['type']!r} of {self._checkpoint.url!r}: {error}"
            ) from error

    def _read(self, requests: Sequence[ReadRequest]) -> Iterator[tuple[int, Array]]:
        route, prefix = self._checkpoint.route, f"{self._checkpoint.prefix}{self._item.prefix}"
        io: ArrayIO = self._plugins.arrays(self._item.writer)()
        location = Location(self._checkpoint.storage, prefix, f"{self._checkpoint.storage.url}/{prefix}")
        options = ReadOptions(
            route.load_budget or automatic_budget(lasting=False),
            route.threads,
            verify=route.verify,
            mapped=route.mapped,
        )
        return io.read(location, self._item.records, requests, options)
