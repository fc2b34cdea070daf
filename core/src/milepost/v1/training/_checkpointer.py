"""The checkpoints of one training, as steps below one directory.

Decides the order of questions: is the step there already, does the policy want it, can it be saved. The rule: nothing
is touched before the policy has said yes; which steps there are and which are let go is `milepost.sequence`'s, and what
a checkpoint is, the engine's.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import time
from typing import TYPE_CHECKING, Any, Self, final

from milepost.errors import RequestError, StepAlreadyExistsError, StepNotFoundError, noted
from milepost.settings import applied
from milepost.v1 import _checkpoints as free
from milepost.v1._context import Context, current_context, current_settings
from milepost.v1._responses import Answered, AsyncResponse, in_background
from milepost.v1._training_metadata import CheckpointMetadata, RootMetadata, metadata_of_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import TypeAlias, Unpack

    from upath import UPath

    from milepost.decisions import SaveDecisionPolicy
    from milepost.engine.background import Pending
    from milepost.engine.items import OwnItem, TreeItem
    from milepost.engine.progress import Progress
    from milepost.path._finding import PathLike
    from milepost.path.step import NameFormat
    from milepost.preservation import PreservationPolicy
    from milepost.sequence import Rules

    _Items: TypeAlias = Callable[[], Mapping[str, TreeItem[Any] | OwnItem]]
    _How: TypeAlias = tuple[bool, bool, Mapping[str, Any] | None, Mapping[str, Any] | None, Progress | None]

__all__ = ["Checkpointer"]

_logger = logging.getLogger("milepost")

_RESTORE, _SAVE = "restore", "save"


class _StepError(RequestError, ValueError):
    """A step that no checkpoint can have."""


class _StepTypeError(RequestError, TypeError):
    """What is no step."""


@final
class Checkpointer:
    """Saves the steps of a training, and loads them.

    ```
    with ocp.training.Checkpointer("runs/7") as checkpointer:
        state = checkpointer.load(None, state) if checkpointer.latest else state
        for step in range(steps):
            state = update(state)
            checkpointer.save_async(step, state)
    ```

    Args:
        directory: where the steps are, a path or URL; nothing is written there before the first save.
        context: the options of all calls; None: a copy of those that are active now.
        save_decision_policy: which steps are saved; None: the first, one at preemption, and otherwise whenever no save
            is under way.
        preservation_policy: which steps stay when another has been committed; None: all.
        step_name_format: how the folders of steps are named; None: by their numbers.
        custom_metadata: what is noted for all steps, as a dict that JSON can hold; whoever comes first writes it.
        cleanup_tmp_directories: remove what unfinished saves have left and is known to be dead.
        lightweight_initialize: no effect: opening costs one listing in any case.
        logger: an object whose `log_entry` is given a dict about each save and load; what it raises is logged.
        preserve_newest: keep the newest step whatever the preservation policy says.

    One thread at a time may use it. In a `with` block it is closed at the end: the failure of a save is raised then,
    unless another exception is on its way, which then gets a note.
    """

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        directory: PathLike,
        *,
        context: Context | None = None,
        save_decision_policy: SaveDecisionPolicy | None = None,
        preservation_policy: PreservationPolicy | None = None,
        step_name_format: NameFormat[Any] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        cleanup_tmp_directories: bool = False,
        lightweight_initialize: bool = False,  # noqa: ARG002 - the documented signature
        logger: Any = None,
        preserve_newest: bool = True,
    ) -> None:
        from milepost.root_metadata import write_root_metadata
        from milepost.sequence import Sequence as Steps
        from milepost.v1._looking import located

        self._context = Context(current_context() if context is None else context)
        self._logger = logger
        self._url = located(directory)
        rules = _rules(save_decision_policy, preservation_policy, step_name_format, keep_newest=preserve_newest)
        with self._options():
            self._steps = Steps(self._url, rules)
            if custom_metadata is not None:
                write_root_metadata(self._steps.url, custom_metadata)
            if cleanup_tmp_directories:
                self._steps.clean()

    @contextlib.contextmanager
    def _options(self) -> Iterator[None]:
        with self._context, applied(current_settings(), self._url):
            yield

    # --- which steps there are ---

    @property
    def directory(self) -> UPath:
        """Where the steps are."""
        from milepost.path._finding import as_path

        return as_path(self._steps.url)

    @property
    def latest(self) -> CheckpointMetadata[None] | None:
        """The step with the highest number, which may be under way; None without any."""
        with self._options():
            found = self._steps.latest()
        return None if found is None else metadata_of_step(found)

    @property
    def checkpoints(self) -> Sequence[CheckpointMetadata[None]]:
        """All steps by number, one under way among them; times and metrics are read when they are asked for."""
        with self._options():
            return [metadata_of_step(step) for step in self._steps.steps()]

    def reload(self) -> None:
        """Look at the storage again: somebody else may have saved or deleted steps."""
        with self._options():
            self._steps.reload()

    # --- saving ---

    def should_save(self, step: int) -> bool:
        """Say whether the policy wants a step saved, which is newer than all there are."""
        with self._options():
            return self._steps.should_save(_number(step))

    def save(  # noqa: PLR0913 - the documented signature
        self,
        step: int,
        state: Any,
        *,
        checkpointable_name: str = "state",
        force: bool = False,
        overwrite: bool = False,
        metrics: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Save a tree as a step, if the policy wants it; say whether it was saved.

        Args:
            step: a number from 0 on.
            state: any tree of leaves milepost knows.
            checkpointable_name: the name of the tree within the checkpoint.
            force: do not ask the policy.
            overwrite: replace the step if it is there; the old one stays until the new one is committed, and if the
                policy does not want the new one, for ever.
            metrics: what is known of the quality of the step, for policies and for `metadata`.
            custom_metadata: a dict that JSON can hold, kept with the step.
            progress: called with the bytes written so far and the bytes there are, from any thread.

        Raises:
            StepAlreadyExistsError: the step is there (a `FileExistsError`), whatever the policy says.
            UnsupportedLeafError: lists every leaf that cannot be saved; nothing was written.
            ValueError: the step is negative, or the name cannot be.
        """
        how = (force, overwrite, metrics, custom_metadata, progress)
        return self._save(step, _tree(checkpointable_name, state), how, lasting=False) is not None

    def save_async(  # noqa: PLR0913 - the documented signature
        self,
        step: int,
        state: Any,
        *,
        checkpointable_name: str = "state",
        force: bool = False,
        overwrite: bool = False,
        metrics: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> AsyncResponse[bool] | None:
        """Save a tree as a step in the background; None if the policy does not want it.

        Arguments and errors are those of `save`; what fails later is raised by `result()`, else by the next call, else
        by `close`. Returns when the caller may donate or overwrite anything.
        """
        how = (force, overwrite, metrics, custom_metadata, progress)
        return _answered(self._save(step, _tree(checkpointable_name, state), how, lasting=True))

    def save_checkpointables(  # noqa: PLR0913 - the documented signature
        self,
        step: int,
        checkpointables: dict[str, Any],
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Save objects by name as a step, if the policy wants it; say whether they were saved.

        The objects are those that `milepost.v1.save_checkpointables` takes, the other arguments those of `save`.
        """
        how = (force, overwrite, metrics, custom_metadata, progress)
        return self._save(step, _objects(checkpointables), how, lasting=False) is not None

    def save_checkpointables_async(  # noqa: PLR0913 - the documented signature
        self,
        step: int,
        checkpointables: dict[str, Any],
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> AsyncResponse[bool] | None:
        """Save objects by name as a step in the background, as `save_async` does with a tree."""
        how = (force, overwrite, metrics, custom_metadata, progress)
        return _answered(self._save(step, _objects(checkpointables), how, lasting=True))

    def _save(self, step: int, items: _Items, how: _How, *, lasting: bool) -> Pending[Any] | None:
        from milepost.sequence import StepRequest

        number, began = _number(step), time.time()
        force, overwrite, metrics, custom_metadata, progress = how
        with self._options():
            self._steps.check()
            there = self._steps.find(number) is not None
            if there and not overwrite:
                raise noted(
                    StepAlreadyExistsError(f"cannot save step {number} in {self._steps.url!r}: it is there already"),
                    "pass overwrite=True to replace it",
                )
            if not force and not self._steps.should_save(number, replacing=there):
                return None
            request = StepRequest(
                items=items(),
                metrics=metrics,
                custom_metadata=custom_metadata,
                overwrite=overwrite,
                progress=progress,
                committed=current_settings().on_committed if lasting else None,
            )
            pending = self._steps.save(number, request, lasting=lasting)
        self._log(_SAVE, number, began, synchronous=not lasting)
        return pending

    def is_saving_in_progress(self) -> bool:
        """Say whether a save is under way."""
        return self._steps.is_saving()

    def cancel(self, step: int | CheckpointMetadata[Any] | None = None) -> None:
        """Give up the save under way, whose response then raises `AbortedError`; wait until it has ended.

        A step that is named is deleted if it was committed. Without one, a save that is at its commit point stays:
        others may have been retired for it.
        """
        with self._options():
            if not self._steps.cancel(_maybe_number(step)) and step is not None:
                self.delete(_given(step), missing_ok=True)

    # --- loading ---

    def load(
        self,
        step: int | CheckpointMetadata[Any] | None = None,
        abstract_state: Any = None,
        *,
        checkpointable_name: str = "state",
        **options: Unpack[free.LoadKeywords],
    ) -> Any:
        """Load a tree of a step, of the newest without one: as it was saved, or into a target.

        Target, further arguments and errors are those of `milepost.v1.load`. A step whose save is under way is waited
        for. Raises `StepNotFoundError` (a `FileNotFoundError`) for a step that is not there.
        """
        found, began = self._committed(step), time.time()
        with self._options():
            state = free.load(found.path, abstract_state, checkpointable_name=checkpointable_name, **options)
        self._log(_RESTORE, found.step, began)
        return state

    def load_async(
        self,
        step: int | CheckpointMetadata[Any] | None = None,
        abstract_state: Any = None,
        *,
        checkpointable_name: str = "state",
        **options: Unpack[free.LoadKeywords],
    ) -> AsyncResponse[Any]:
        """Load a tree of a step in the background; which step that is, is settled at once."""
        found = self._committed(step)
        with self._options():
            return free.load_async(found.path, abstract_state, checkpointable_name=checkpointable_name, **options)

    def load_checkpointables(
        self,
        step: int | CheckpointMetadata[Any] | None = None,
        abstract_checkpointables: dict[str, Any] | None = None,
        **options: Unpack[free.LoadKeywords],
    ) -> dict[str, Any]:
        """Load objects of a step by name; arguments and errors are those of `milepost.v1.load_checkpointables`."""
        found, began = self._committed(step), time.time()
        with self._options():
            loaded = free.load_checkpointables(found.path, abstract_checkpointables, **options)
        self._log(_RESTORE, found.step, began)
        return loaded

    def load_checkpointables_async(
        self,
        step: int | CheckpointMetadata[Any] | None = None,
        abstract_checkpointables: dict[str, Any] | None = None,
        **options: Unpack[free.LoadKeywords],
    ) -> AsyncResponse[dict[str, Any]]:
        """Load objects of a step in the background; which step that is, is settled at once."""
        found = self._committed(step)
        with self._options():
            return free.load_checkpointables_async(found.path, abstract_checkpointables, **options)

    def _committed(self, step: int | CheckpointMetadata[Any] | None) -> CheckpointMetadata[None]:
        with self._options():
            return metadata_of_step(self._steps.committed(_maybe_number(step)))

    # --- looking ---

    def metadata(self, step: int | CheckpointMetadata[Any] | None = None) -> CheckpointMetadata[Any]:
        """Return what is known of a step, of the newest without one; its tree with what is known of each leaf."""
        from milepost.v1._looking import tree_metadata, tree_name

        return self._described(step, lambda one: tree_metadata(one.manifest.items[tree_name(one, "AUTO")]))

    def checkpointables_metadata(
        self, step: int | CheckpointMetadata[Any] | None = None
    ) -> CheckpointMetadata[dict[str, Any]]:
        """Return what is known of a step, of the newest without one; what is known of each object by name."""
        from milepost.v1._looking import all_metadata

        return self._described(step, all_metadata)

    def _described(
        self, step: int | CheckpointMetadata[Any] | None, tell: Callable[[Any], Any]
    ) -> CheckpointMetadata[Any]:
        from milepost.metadata.metrics import from_stored
        from milepost.v1._looking import of_checkpoint, opened

        found = self._committed(step)
        with self._options():
            checkpoint = opened(found.path)
            about = of_checkpoint(checkpoint, tell(checkpoint))
        return CheckpointMetadata(
            found.step,
            found.path,
            metadata=about.metadata,
            init_timestamp_nsecs=about.init_timestamp_nsecs,
            commit_timestamp_nsecs=about.commit_timestamp_nsecs,
            custom_metadata=about.custom_metadata,
            metrics=from_stored(checkpoint.manifest.metrics),
        )

    def root_metadata(self) -> RootMetadata:
        """Return what is known of the directory as a whole; without a note, its custom metadata are empty."""
        from milepost.root_metadata import read_root_metadata

        with self._options():
            found = read_root_metadata(self._steps.url)
        custom: Any = {} if found is None else found.custom_metadata or {}
        return RootMetadata(directory=self.directory, custom_metadata=custom)

    # --- deleting ---

    def delete(
        self,
        step: int | CheckpointMetadata[Any],
        *,
        checkpointable_name: str | None = None,
        missing_ok: bool = False,
    ) -> bool:
        """Delete a step, or one object of it; say whether there was one.

        Raises `FileNotFoundError` if there is none, unless `missing_ok`; `TypeError` for what is no step; `ValueError`
        for the only object of a step.
        """
        number = _given(step)
        with self._options():
            try:
                if checkpointable_name is None:
                    self._steps.delete(number)
                    return True
                path = self._steps.committed(number).path
                return free.delete(path, checkpointable_name=checkpointable_name, missing_ok=missing_ok)
            except StepNotFoundError:
                if missing_ok:
                    return False
                raise

    def delete_async(
        self,
        step: int | CheckpointMetadata[Any],
        *,
        checkpointable_name: str | None = None,
        missing_ok: bool = False,
    ) -> AsyncResponse[bool]:
        """Delete in the background; arguments and errors are those of `delete`."""
        number = _given(step)
        with self._options():
            return in_background(
                lambda: self.delete(number, checkpointable_name=checkpointable_name, missing_ok=missing_ok),
                f"the deletion of step {number}",
            )

    # --- the end ---

    def wait(self) -> None:
        """Wait for the save under way, and for deletions; raise the save's failure if nobody has seen it."""
        self._steps.wait()

    def close(self) -> None:
        """Wait, and end; raise the failure of a save that nobody has seen. Closing again does nothing."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:
            error.add_note(f"and a save failed: {failure}")
            _logger.exception("a save failed, while another error was on its way")

    def _log(self, event: str, step: int, began: float, **more: Any) -> None:
        if self._logger is None:
            return
        entry = {
            "step": step,
            "event_type": event,
            "directory": str(self.directory),
            "checkpointer_start_time": began,
            "checkpointer_duration_secs": time.time() - began,
            **more,
        }
        try:
            self._logger.log_entry(entry)
        except Exception:
            _logger.warning("the checkpointer's logger failed; the %s itself did not", event, exc_info=True)

    # --- former names ---

    def save_pytree(self, *args: Any, **kwargs: Any) -> bool:
        """Deprecated: the former name of `save`."""
        free.warn_of_former_name("save")
        return self.save(*args, **kwargs)

    def save_pytree_async(self, *args: Any, **kwargs: Any) -> AsyncResponse[bool] | None:
        """Deprecated: the former name of `save_async`."""
        free.warn_of_former_name("save_async")
        return self.save_async(*args, **kwargs)

    def load_pytree(self, *args: Any, **kwargs: Any) -> Any:
        """Deprecated: the former name of `load`."""
        free.warn_of_former_name("load")
        return self.load(*args, **kwargs)

    def load_pytree_async(self, *args: Any, **kwargs: Any) -> AsyncResponse[Any]:
        """Deprecated: the former name of `load_async`."""
        free.warn_of_former_name("load_async")
        return self.load_async(*args, **kwargs)

    def pytree_metadata(self, *args: Any, **kwargs: Any) -> CheckpointMetadata[Any]:
        """Deprecated: the former name of `metadata`."""
        free.warn_of_former_name("metadata")
        return self.metadata(*args, **kwargs)


def _rules(
    decide: SaveDecisionPolicy | None,
    preserve: PreservationPolicy | None,
    names: NameFormat[Any] | None,
    *,
    keep_newest: bool,
) -> Rules:
    from milepost import decisions, preservation
    from milepost.path.step import standard_name_format
    from milepost.sequence import Rules

    usual = decisions.AnySavePolicy(
        [
            decisions.InitialSavePolicy(),
            decisions.ContinuousCheckpointingPolicy(),
            decisions.PreemptionCheckpointingPolicy(),
        ]
    )
    return Rules(
        names=standard_name_format() if names is None else names,
        decide=usual if decide is None else decide,
        preserve=preservation.PreserveAll() if preserve is None else preserve,
        keep_newest=keep_newest,
        multiprocessing_options=current_context().multiprocessing,
    )


def _tree(name: str, state: Any) -> _Items:
    from milepost.v1._saving import check_value, tree_item

    check_value(name, state)
    return lambda: tree_item(name, state)


def _objects(checkpointables: dict[str, Any]) -> _Items:
    from milepost.v1._saving import check_values, items_of

    check_values(checkpointables)
    return lambda: items_of(checkpointables)


def _answered(pending: Pending[Any] | None) -> AsyncResponse[bool] | None:
    return None if pending is None else Answered(pending, value=True)


def _number(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError as error:
        raise _StepTypeError(f"cannot use {step!r:.80} as a step: it is no whole number") from error
    if number < 0:
        raise _StepError(f"cannot use {step!r} as a step: it is negative")
    return number


def _maybe_number(step: int | CheckpointMetadata[Any] | None) -> int | None:
    return None if step is None else _number(step.step if isinstance(step, CheckpointMetadata) else step)


def _given(step: int | CheckpointMetadata[Any]) -> int:
    """Return the number of a step that must be meant: True is none."""
    if isinstance(step, bool):
        raise _StepTypeError(f"cannot use {step!r} as a step: it is no number")
    return _number(step.step if isinstance(step, CheckpointMetadata) else step)
