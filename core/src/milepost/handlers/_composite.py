"""The handler of several items under one name each.

The rule: thin; which handler takes which item is the composition's business. All items share one commit.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from milepost import args as a
from milepost.errors import ConfigError, noted
from milepost.handlers._composition import Composition
from milepost.handlers._folders import reading_folder, save_into, saving_into
from milepost.handlers._interface import AsyncCheckpointHandler, Directory
from milepost.handlers._trees import public_typestr
from milepost.options import MultiprocessingOptions

if TYPE_CHECKING:
    from concurrent.futures import Future

    from milepost.handlers._interface import CheckpointHandler
    from milepost.handlers._registry import CheckpointHandlerRegistry
    from milepost.metadata import StepMetadata
    from milepost.options import AsyncOptions, AtomicityOptions, FileOptions

__all__ = ["CompositeCheckpointHandler", "CompositeOptions"]


@dataclasses.dataclass
class CompositeOptions:
    """Options of a composite; none has an effect: all items share the one commit of their checkpointer."""

    multiprocessing_options: MultiprocessingOptions = dataclasses.field(default_factory=MultiprocessingOptions)
    temporary_path_class: type[Any] | None = None
    file_options: FileOptions | None = None
    atomicity_options: AtomicityOptions | None = None
    async_options: AsyncOptions | None = None


class CompositeCheckpointHandler(AsyncCheckpointHandler):
    """Saves several items, each with the handler that was given for it, or that its arguments name.

    `item_names` say which items there are, as do handlers by the names of items, which they bind; if there are any of
    these, no others are saved. `handler_registry` cannot be given together with them.
    """

    _milepost_save_args: ClassVar[type] = a.Composite
    _milepost_restore_args: ClassVar[type] = a.Composite

    def __init__(
        self,
        *item_names: str,
        composite_options: CompositeOptions = CompositeOptions(),  # noqa: B008 - the documented default; never changed
        handler_registry: CheckpointHandlerRegistry | None = None,
        **items_and_handlers: CheckpointHandler,
    ) -> None:
        del composite_options
        if handler_registry is not None and (item_names or items_and_handlers):
            raise ConfigError("cannot take a handler_registry: items or handlers are given, too")
        given = {name: handler for name, handler in items_and_handlers.items() if handler is not None}
        names = tuple(dict.fromkeys((*item_names, *items_and_handlers)))
        self.composition: Composition = Composition(given, handler_registry, names=names or None)

    def save(self, directory: Directory, *args: Any, **kwargs: Any) -> None:
        """Save all items into a folder, as one checkpoint within it."""
        save_into(directory, self.composition.to_items(_composite(args, kwargs)))

    async def async_save(self, directory: Directory, *args: Any, **kwargs: Any) -> list[Future[Any]]:
        """Save all items into a folder as `save` does; what it returns is done when all is written."""
        return [saving_into(directory, self.composition.to_items(_composite(args, kwargs)))]

    def restore(self, directory: Directory, args: a.Composite | None = None) -> a.Composite:
        """Restore the items that the arguments name, without arguments all, from a folder or a checkpoint."""
        return reading_folder(
            directory, lambda checkpoint, plugins, _: self.composition.from_items(checkpoint, plugins, args or None)
        )

    def metadata(self, directory: Directory) -> StepMetadata:
        """Return what is known of the items."""
        from milepost.metadata.step import step_metadata

        def act(checkpoint: Any, plugins: Any, _: str) -> StepMetadata:
            found = step_metadata(checkpoint.manifest)
            found.item_metadata = a.Composite(**self.composition.metadata(checkpoint, plugins))
            return found

        return reading_folder(directory, act)

    def close(self) -> None:
        """Let the handlers of the items give back what they hold."""
        self.composition.close()

    @classmethod
    def typestr(cls) -> str:
        """Return the name by which the handler is known."""
        return public_typestr(cls)


def _composite(args: tuple[Any, ...], kwargs: dict[str, Any]) -> a.Composite:
    for one in (*args, *kwargs.values()):
        if isinstance(one, a.Composite):
            return one
    raise noted(ConfigError("cannot save without items: args is no Composite"), "pass args=Composite(name=...)")
