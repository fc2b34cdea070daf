"""Objects with a life of their own: those that save themselves, and those that give and take their state.

Decides what counts as such: the methods, never the class. The rule: their state is each process's own, so every process
writes a file of its own, named after its number and how many there are, as Grain does; and they are loaded in place,
since nobody but their program can make one.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from milepost.errors import DamagedError, MissingDataError, RequestError, noted
from milepost.multihost import process_count, process_index
from milepost.v1.handlers import PyTreeHandler

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from upath import UPath

    from milepost.v1.handlers import StatefulCheckpointable
    from milepost.v1.path import PathAwaitingCreation

__all__ = ["IteratorHandler", "StatefulHandler"]


class _NeedsObjectError(RequestError, ValueError):
    """An object that can only be loaded in place, and none was given."""


class StatefulHandler:
    """Saves and loads objects that do it themselves."""

    also_known_as = ()

    def is_handleable(self, checkpointable: Any) -> bool:
        """Say whether an object has the methods, as coroutines."""
        found = (getattr(type(checkpointable), name, None) for name in ("save", "load"))
        return all(inspect.iscoroutinefunction(method) for method in found)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Say whether an object can load itself."""
        return self.is_handleable(abstract_checkpointable)

    async def save(self, directory: PathAwaitingCreation, checkpointable: StatefulCheckpointable) -> Awaitable[None]:
        """Let the object save itself."""
        return await checkpointable.save(directory)

    async def load(self, directory: UPath, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """Let the object load itself, and give it; `ValueError` without one."""
        if abstract_checkpointable is None:
            raise noted(
                _NeedsObjectError("cannot load an object that loads itself: none was given"),
                "pass an instance as its abstract checkpointable",
            )

        async def fill() -> Any:
            rest = await abstract_checkpointable.load(directory)
            if inspect.isawaitable(rest):
                await rest
            return abstract_checkpointable

        return fill()

    async def metadata(self, directory: UPath) -> None:
        """Return None: only the object knows its files."""


class IteratorHandler:
    """Saves and loads the state of anything with `get_state` and `set_state`: dataset iterators, random generators.

    State that is bytes is kept as such, state that JSON holds exactly as text, any other tree as a checkpoint within.
    """

    also_known_as = ()

    def is_handleable(self, checkpointable: Any) -> bool:
        """Say whether an object has the methods."""
        return not isinstance(checkpointable, type) and all(
            callable(getattr(checkpointable, name, None)) for name in ("get_state", "set_state")
        )

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Say whether an object can take its state."""
        return self.is_handleable(abstract_checkpointable)

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Take the state at once; the file is written later."""
        state, name = checkpointable.get_state(), _name(process_index(), process_count())
        if isinstance(state, bytes):
            return _write(directory, f"{name}.bin", state)
        text = _exact_json(state)
        if text is not None:
            return _write(directory, f"{name}.json", text.encode())
        return await PyTreeHandler().save(directory / name, state)

    async def load(self, directory: UPath, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """Give an object its state, and return it; without one, return the state."""

        async def read() -> Any:
            state = await _state(directory)
            if abstract_checkpointable is None:
                return state
            abstract_checkpointable.set_state(state)
            return abstract_checkpointable

        return read()

    async def metadata(self, directory: UPath) -> None:
        """Return None: only the object understands its state."""


def _name(index: int, count: int) -> str:
    return f"process_{index}-of-{count}"


async def _write(directory: PathAwaitingCreation, name: str, body: bytes) -> None:
    path = await directory.await_creation()
    (path / name).write_bytes(body)


async def _state(directory: UPath) -> Any:
    name = _name(process_index(), process_count())
    there = sorted(path.name for path in directory.iterdir())
    if f"{name}.bin" in there:
        return (directory / f"{name}.bin").read_bytes()
    if f"{name}.json" in there:
        try:
            return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedError(f"cannot load the state {name!r} of {str(directory)!r}: it is no JSON") from error
    if name in there:
        return await (await PyTreeHandler().load(directory / name))
    raise noted(
        MissingDataError(f"cannot load the state {name!r} of {str(directory)!r}: there is {', '.join(there)}"),
        "each process has a state of its own: load with as many processes as saved",
    )


def _exact_json(state: Any) -> str | None:
    """Return the text of a state that comes back from JSON as it is, None for any other."""
    try:
        text = json.dumps(state)
    except (TypeError, ValueError, RecursionError):
        return None
    return text if _same(json.loads(text), state) else None


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or one != one  # noqa: PLR0124 - not a number
