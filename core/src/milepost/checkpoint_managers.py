"""The manager of a training's checkpoints, and its options: the documented face of a sequence of steps.

The rule: thin. Which steps there are, when one is saved and which are let go is decided in `milepost.sequence` and by
policies; what an item is, by handlers.

What differs from the reference protects checkpoints. The newest step is the one with the highest number, whatever was
saved last. A step that is on the storage is never replaced, whoever saved it. Steps are let go once the newer one is
committed, not when its save begins. What a callback raises after that is logged: it cannot undo a commit.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import operator
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from milepost import decisions as save_decision_policy
from milepost import preservation as preservation_policy
from milepost import urls
from milepost._manager_items import items_of
from milepost._manager_options import CheckpointManagerOptions, rules_of, settings_of
from milepost.decisions import (
    AnySavePolicy,
    BoundedOverheadPolicy,
    ContinuousCheckpointingPolicy,
    DecisionContext,
    FixedIntervalPolicy,
    InitialSavePolicy,
    PreemptionCheckpointingPolicy,
    SaveDecisionPolicy,
    SpecificStepsPolicy,
)
from milepost.engine.reading import open_checkpoint
from milepost.errors import ConfigError, StepNotFoundError, noted
from milepost.path._finding import as_path
from milepost.preemption import reached_sync_point
from milepost.preservation import (
    AnyPreservationPolicy,
    BestN,
    CustomSteps,
    EveryNSeconds,
    EveryNSteps,
    EveryNStepsClosest,
    LatestDuration,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
    PreserveAll,
)
from milepost.root_metadata import read_root_metadata, write_root_metadata
from milepost.sequence import Sequence, Step, StepRequest

if TYPE_CHECKING:
    import contextlib
    import os
    from collections.abc import Mapping
    from collections.abc import Sequence as AbstractSequence
    from types import TracebackType
    from typing import Self

    from upath import UPath

    from milepost.args import CheckpointArgs, Composite
    from milepost.checkpointers import AbstractCheckpointer
    from milepost.handlers import CheckpointHandler, CheckpointHandlerRegistry
    from milepost.metadata import RootMetadata, StepMetadata

__all__ = [
    "AbstractCheckpointManager",
    "AnyPreservationPolicy",
    "AnySavePolicy",
    "BestN",
    "BoundedOverheadPolicy",
    "CheckpointManager",
    "CheckpointManagerOptions",
    "ContinuousCheckpointingPolicy",
    "CustomSteps",
    "DecisionContext",
    "EveryNSeconds",
    "EveryNSteps",
    "EveryNStepsClosest",
    "FixedIntervalPolicy",
    "InitialSavePolicy",
    "LatestDuration",
    "LatestN",
    "PolicyCheckpointInfo",
    "PreemptionCheckpointingPolicy",
    "PreservationContext",
    "PreservationPolicy",
    "PreserveAll",
    "SaveDecisionPolicy",
    "SpecificStepsPolicy",
    "preservation_policy",
    "save_decision_policy",
]

_logger = logging.getLogger("milepost")


# --- the interface ---------------------------------------------------------------------------------------------------


class AbstractCheckpointManager(Protocol):
    """Saves and restores the steps of a training, each with one or several items."""

    @property
    @abc.abstractmethod
    def directory(self) -> UPath:
        """The directory below which the steps are."""
        ...

    @abc.abstractmethod
    def all_steps(self, read: bool = False) -> AbstractSequence[int]:  # noqa: FBT001, FBT002 - the documented signature
        """Return all steps; with `read`, as the storage has them now."""
        ...

    @abc.abstractmethod
    def latest_step(self) -> int | None:
        """Return the newest step, None if there is none."""
        ...

    @abc.abstractmethod
    def best_step(self) -> int | None:
        """Return the step whose metrics are best, None if there is none."""
        ...

    @abc.abstractmethod
    def reload(self) -> None:
        """Look again which steps there are, in case somebody else has changed them."""
        ...

    @abc.abstractmethod
    def reached_preemption(self, step: int) -> bool:
        """Say whether a step is to be saved because a machine is about to be taken away."""
        ...

    @abc.abstractmethod
    def should_save(self, step: int) -> bool:
        """Say whether a step would be saved."""
        ...

    @abc.abstractmethod
    def delete(self, step: int) -> None:
        """Delete a step."""
        ...

    @abc.abstractmethod
    def save(self, step: int, *args: Any, **kwargs: Any) -> bool:
        """Save a step if it should be; say whether it was."""
        ...

    @abc.abstractmethod
    def restore(self, step: int, *args: Any, **kwargs: Any) -> Any | Mapping[str, Any] | Composite:
        """Return what was saved as a step."""
        ...

    @abc.abstractmethod
    def item_metadata(self, step: int) -> Any | Mapping[str, Any] | Composite:
        """Return what is known of a step's items without restoring them."""
        ...

    @abc.abstractmethod
    def metadata(self, step: int | None = None) -> StepMetadata | RootMetadata:
        """Return what is known of a step without restoring it, or without one, what was noted for all steps."""
        ...

    @abc.abstractmethod
    def metrics(self, step: int) -> Any | None:
        """Return the metrics of a step, None if it has none."""
        ...

    @abc.abstractmethod
    def wait_until_finished(self) -> None:
        """Wait for what is under way; raise what failed."""
        ...

    @abc.abstractmethod
    def check_for_errors(self) -> None:
        """Raise what failed in the background, if nobody has seen it."""
        ...

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for what is under way, and end; raise what failed."""
        ...


# --- the manager -----------------------------------------------------------------------------------------------------


class CheckpointManager(AbstractCheckpointManager):
    """Saves, finds, restores and lets go the steps of a training below one directory, on any storage.

    A step is one object, or several items by name, whatever the first call says, or the parameters: `item_names` and
    `item_handlers`, or `checkpointers` of the older interface, which take objects instead of `args`; with
    `handler_registry` handlers are found there. `metadata`, which JSON can hold, is noted once for all steps: the first
    manager's is kept. `logger` is told of each save and restore by `log_entry(entry)`.

    After `save` the caller may change, donate or delete what was saved. A save that failed in the background is raised
    by the next call, by `wait_until_finished`, `check_for_errors` or `close`, at the latest when the process ends,
    which then fails; and on leaving a `with` block, unless another exception is on its way, which then gets a note.

    One manager writes below a directory at a time, and is used from one thread at a time. Raises a `ValueError` for
    parameters that exclude each other.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the documented signature
        self,
        directory: str | os.PathLike[str],
        checkpointers: AbstractCheckpointer | Mapping[str, AbstractCheckpointer] | None = None,
        options: CheckpointManagerOptions | None = None,
        metadata: Mapping[str, Any] | None = None,
        item_names: AbstractSequence[str] | None = None,
        item_handlers: CheckpointHandler | Mapping[str, CheckpointHandler] | None = None,
        logger: Any | None = None,
        handler_registry: CheckpointHandlerRegistry | None = None,
    ) -> None:
        self._options = options or CheckpointManagerOptions()
        self._items = items_of(checkpointers, item_names, item_handlers, handler_registry)
        rules = rules_of(self._options)
        self._logger = logger
        self._url = urls.locate(directory)
        self._settings = settings_of(self._options)
        self._noted = metadata
        with self._applied():
            if self._options.create:
                _create(self._url, self._options.file_options.path_permission_mode)
            self._sequence = Sequence(self._url, rules)
            if self._options.cleanup_tmp_directories:
                self._sequence.clean()
            if metadata is not None and self._options.save_root_metadata and not self._options.read_only:
                write_root_metadata(self._url, metadata)

    def _applied(self) -> contextlib.AbstractContextManager[None]:
        from milepost.settings import applied

        return applied(self._settings, self._url)

    @property
    def directory(self) -> UPath:
        """The directory below which the steps are."""
        return as_path(self._url)

    # --- which steps there are ---

    def all_steps(self, read: bool = False) -> AbstractSequence[int]:  # noqa: FBT001, FBT002 - the documented signature
        """Return all steps in order, the one that is being saved among them; with `read`, look at the storage again."""
        if read:
            self.reload()
        return [step.step for step in self._sequence.steps()]

    def latest_step(self) -> int | None:
        """Return the newest step, which is the one with the highest number; None if there is none."""
        latest = self._sequence.latest()
        return None if latest is None else latest.step

    def best_step(self) -> int | None:
        """Return the step that `best_fn` ranks first, of equal ones the newest; None if no step has metrics.

        A NaN is worse than every number. Without `best_fn` it is the newest step.
        """
        options = self._options
        if options.best_fn is None:
            return self.latest_step()
        steps = [step for step in self._sequence.steps() if step.metrics is not None]
        best = BestN(get_metric_fn=options.best_fn, reverse=options.best_mode == "min", n=1)
        chosen = best.should_preserve(steps, context=PreservationContext())
        return next((step.step for step, kept in zip(steps, chosen, strict=True) if kept), None)

    def reload(self) -> None:
        """Look at the storage again, in case somebody else has saved or deleted steps."""
        with self._applied():
            self._sequence.reload()

    def reached_preemption(self, step: int) -> bool:
        """Say whether this step is to be saved because a machine is about to be taken away."""
        return reached_sync_point(operator.index(step))

    # --- saving ---

    def should_save(self, step: int) -> bool:
        """Say whether `save` would save a step: one that is newer than all there are, if the policy wants it."""
        return self._sequence.should_save(operator.index(step))

    def save(  # noqa: PLR0913, PLR0917 - the documented signature
        self,
        step: int,
        items: Any | Mapping[str, Any] | None = None,
        save_kwargs: Mapping[str, Any] | None = None,
        metrics: Any | None = None,
        force: bool | None = False,  # noqa: FBT001, FBT002 - the documented signature
        args: CheckpointArgs | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> bool:
        """Save a step if it should be, with `force` in any case; say whether it was.

        Args:
            step: the number of the step, not negative.
            items: for managers with `checkpointers`: the object, or objects by name.
            save_kwargs: for managers with `checkpointers`: further arguments of their handlers, by name if there are
                several.
            metrics: numbers, texts, booleans and None in lists and mappings with string keys; kept with the step.
            force: save although the policy does not want it.
            args: what is to be saved, for example `StandardSave(tree)`, or a `Composite` of these by name.
            custom_metadata: a dict with string keys that JSON can hold; kept with the step.

        Raises:
            StepAlreadyExistsError: the step is there, whoever saved it (a `ValueError`); never with `force=False` for a
                step that this manager knows, which is not newer than all there are.
            ValueError: what is given does not fit the manager, or cannot be saved; nothing was written.
        """
        number, began = operator.index(step), time.time()
        self._sequence.check()
        given = self._items.for_save(items, save_kwargs, args)
        if not force and not self.should_save(number):
            return False
        options = self._options
        request = StepRequest(
            items=self._items.composition.to_items(given),
            metrics=metrics,
            keep_metrics=not options.prevent_write_metrics,
            custom_metadata=custom_metadata,
            committed=options.async_options.post_finalization_callback if options.async_options else None,
        )
        with self._applied():
            self._sequence.save(number, request, lasting=options.enable_async_checkpointing and self._items.lasting)
        self._log("save", number, began)
        return True

    def is_saving_in_progress(self) -> bool:
        """Say whether a save is under way."""
        return self._sequence.is_saving()

    def delete(self, step: int) -> None:
        """Delete a step, once a save of it has ended; a manager that only reads warns and leaves it.

        Raises `StepNotFoundError` (a `FileNotFoundError`) if there is no such step.
        """
        if self._options.read_only:
            _logger.warning("a manager that only reads deletes nothing: step %s stays", step)
            return
        with self._applied():
            self._sequence.delete(operator.index(step))

    # --- restoring ---

    def restore(
        self,
        step: int | None,
        items: Any | Mapping[str, Any] | None = None,
        restore_kwargs: Mapping[str, Any] | None = None,
        directory: str | os.PathLike[str] | None = None,
        args: CheckpointArgs | None = None,
    ) -> Any | Mapping[str, Any]:
        """Return what was saved as a step: one object, or a `Composite` by name.

        Args:
            step: the number of the step; None for the newest.
            items: for managers with `checkpointers`: the target, or targets by name.
            restore_kwargs: for managers with `checkpointers`: further arguments of their handlers, by name if there are
                several.
            directory: where the steps are, if not in the manager's directory.
            args: how to restore, for example `StandardRestore(target)`, or a `Composite` with the items that are
                wanted; without any, everything is restored as it was saved.

        Raises:
            StepNotFoundError: there is no such step (a `FileNotFoundError`); its note says which there are.
            ItemNotFoundError: the step has no such item (a `KeyError`).
            ValueError: what is given does not fit the manager, or the step.
        """
        from milepost.engine.loading import reading  # brings JAX

        began = time.time()
        given = self._items.for_restore(items, restore_kwargs, args)
        found = self._steps_in(directory).committed(None if step is None else operator.index(step))
        with self._applied():
            value = reading(found.url, lambda checkpoint, plugins: self._items.restored(checkpoint, plugins, given))
        self._log("restore", found.step, began)
        return value

    def _steps_in(self, directory: str | os.PathLike[str] | None) -> Sequence:
        if directory is None:
            return self._sequence
        return Sequence(directory, dataclasses.replace(self._sequence.rules, read_only=True, trash=None))

    def item_metadata(self, step: int) -> Any | Mapping[str, Any] | Composite:
        """Return what is known of a step's items: of the one object, or a `Composite` by name.

        None stands for items whose handler is not known, and for declared items that the step lacks. Raises what
        `restore` raises for the step.
        """
        if step is None:
            raise noted(ConfigError("cannot tell the metadata of items without a step"), "metadata() is that of all")
        return self._step_metadata(step).item_metadata

    def metadata(self, step: int | None = None) -> StepMetadata | RootMetadata:
        """Return what is known of a step without restoring it, or without one, what was noted for all steps.

        Raises what `restore` raises for the step, and `DamagedError` (a `ValueError`) for what cannot be read.
        """
        return self._root_metadata() if step is None else self._step_metadata(step)

    def _step_metadata(self, step: int) -> StepMetadata:
        from milepost.metadata.step import step_metadata
        from milepost.plugins import installed

        found = self._sequence.committed(operator.index(step))
        with self._applied():
            checkpoint = open_checkpoint(found.url)
            known = step_metadata(checkpoint.manifest)
            known.item_metadata = self._items.described(checkpoint, installed())
        return known

    def _root_metadata(self) -> RootMetadata:
        from milepost.metadata import RootMetadata

        with self._applied():
            found = read_root_metadata(self._url)
        return found or RootMetadata(custom_metadata=dict(self._noted or {}))

    def metrics(self, step: int) -> Any | None:
        """Return the metrics that a step was saved with, None if there are none, or no such step."""
        try:
            found = self._sequence.get(operator.index(step))
            if not self._options.prevent_write_metrics:
                return found.metrics
            found = self._sequence.committed(found.step)
        except StepNotFoundError:
            return None
        return Step(found.step, found.url).metrics  # what is known in this process only does not count

    # --- what is under way ---

    def wait_until_finished(self) -> None:
        """Wait until the step under way is committed, and what was let go is gone; raise the save's failure, once."""
        self._sequence.wait()

    def check_for_errors(self) -> None:
        """Raise the failure of a save that has ended, unless somebody has seen it; never waits."""
        self._sequence.check()

    def close(self) -> None:
        """Wait as `wait_until_finished` does, and end; raise the save's failure, unless somebody has seen it.

        A manager that was closed can be read, and saves and deletes no more: it raises a `RuntimeError`.
        """
        try:
            self._sequence.close()
        finally:
            self._items.composition.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"and a save in the background failed: {failure}")
            _logger.exception("a save failed, while another error was on its way")

    def _log(self, event: str, step: int, began: float) -> None:
        if self._logger is None:
            return
        name = "checkpoint_manager_blocking" if event == "save" else "checkpoint_manager"
        entry = {
            "event_type": event,
            "step": step,
            "directory": str(self.directory),
            f"{name}_start_time": began,
            f"{name}_duration_secs": time.time() - began,
        }
        try:
            self._logger.log_entry(entry)
        except Exception:
            _logger.exception("the logger of a manager failed; the %s of step %d has not", event, step)


def _create(url: str, mode: int | None) -> None:
    """Make the directory, where there is such a thing."""
    if urls.scheme(url) == urls.LOCAL:
        Path(urls.local_path(url)).mkdir(mode=0o777 if mode is None else mode, parents=True, exist_ok=True)
