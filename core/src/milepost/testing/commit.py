"""What every commit strategy has to prove: `CommitContract`, and `power_cuts`, which tries every moment to die.

The rule: what is visible is judged by `look`, which reads the commit object and the files it lists, and knows nothing
of the strategy but where an overwrite that was cut off can be read. Attempts of the tests are dated 2001, so that every
one of them counts as dead.

A test class needs two fixtures, and a third where the strategy leaves some attempts alone for a while:

```python
class TestCreateCommit(CommitContract):
    @pytest.fixture
    def storage(self): return MemoryStorage("memory://tests/create")
    @pytest.fixture
    def strategy(self): return CreateCommit()
    @pytest.fixture
    def reaper(self): return CreateCommit(grace=0)   # the same, told that nothing is under way
```
"""

# ruff: noqa: S101 - assertions are what a contract is made of

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import secrets
from typing import TYPE_CHECKING, Protocol

import pytest

from milepost import attempts
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    ConfigError,
    NotFoundError,
    OutcomeUnknownError,
    StorageError,
)
from milepost.protocols import COMMIT_OBJECT, CommitStrategy, CreatesOnly
from milepost.testing.faults import CuttingStorage, LostReplyStorage, PowerCut, WrappedStorage, emptied, keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from milepost.protocols import Buffer, Staging, Storage

__all__ = [
    "SCENARIOS",
    "CommitContract",
    "Save",
    "Scenario",
    "dead_attempt",
    "look",
    "power_cuts",
    "save",
    "sweep",
    "write",
]

_NOTHING_LIVES = -1.0  # an age limit under which whatever is not committed is dead
_PARTS = ("arrays-0", "state/arrays 1")


class Save(Protocol):
    """A way to save a text as a checkpoint; `save` is the right one."""

    def __call__(
        self, storage: Storage, strategy: CommitStrategy, name: str, text: str, *, overwrite: bool = False
    ) -> None:
        """Stage, write, publish."""


def dead_attempt() -> str:
    """Return the id of an attempt whose writer is long gone."""
    return f"20010101T000000Z-0badcafe-1f-{secrets.token_hex(6)}"


def write(storage: Storage, staging: Staging, text: str) -> bytes:
    """Write the data of a checkpoint and return its manifest."""
    files = {staging.data + part: f"{text} {part}" for part in _PARTS}
    for part in _PARTS:
        storage.write(staging.prefix + part, [text.encode(), f" {part}".encode()])
    return json.dumps({"attempt": staging.attempt, "text": text, "files": files}).encode()


def save(
    storage: Storage, strategy: CommitStrategy, name: str, text: str, *, overwrite: bool = False, attempt: str = ""
) -> None:
    """Save a text as a checkpoint."""
    staging = strategy.stage(storage, name, attempt or dead_attempt())
    strategy.publish(storage, staging, write(storage, staging, text), overwrite=overwrite)


def look(storage: Storage, strategy: CommitStrategy, name: str) -> str | None:
    """Return the text of the checkpoint, None if there is none; fail if it is not whole."""
    prefix = f"{name}/"
    try:
        manifest = bytes(storage.read(f"{prefix}{COMMIT_OBJECT}"))
    except NotFoundError:
        recovered = strategy.recover(storage, name)
        if recovered is None:
            return None
        prefix = recovered
        manifest = bytes(storage.read(f"{prefix}{COMMIT_OBJECT}"))
    read = json.loads(manifest)
    for path, text in read["files"].items():
        try:
            found = bytes(storage.read(prefix + path)).decode()
        except NotFoundError:
            found = "nothing"
        assert text == found, f"{name!r} is committed, and its file {path!r} holds {found!r}"
    return str(read["text"])


def sweep(storage: Storage, strategy: CommitStrategy, *, older_than: float = attempts.DAY) -> None:
    """Clear every leftover that is dead."""
    for leftover in list(strategy.leftovers(storage, older_than=older_than)):
        if leftover.dead:
            strategy.clear(storage, leftover)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Something that may be cut off: what is there before, what is done, and what may be found afterwards at "7"."""

    name: str
    prepare: Callable[[Storage, CommitStrategy], object]
    act: Callable[[Storage, CommitStrategy, Save], object]
    allowed: tuple[str | None, ...]
    final: str | None


def _abandoned(storage: Storage, strategy: CommitStrategy) -> Staging:
    staging = strategy.stage(storage, "7", dead_attempt())
    write(storage, staging, "abandoned")
    return staging


def _crowded(storage: Storage, strategy: CommitStrategy) -> None:
    _abandoned(storage, strategy)
    save(storage, strategy, "7", "old")
    _abandoned(storage, strategy)


SCENARIOS = (
    Scenario("save", lambda *_: None, lambda s, c, write_it: write_it(s, c, "7", "new"), (None, "new"), "new"),
    Scenario(
        "overwrite",
        lambda s, c: save(s, c, "7", "old"),
        lambda s, c, write_it: write_it(s, c, "7", "new", overwrite=True),
        ("old", "new"),
        "new",
    ),
    Scenario("delete", lambda s, c: save(s, c, "7", "old"), lambda s, c, _: c.delete(s, "7"), ("old", None), None),
    Scenario("abandon", lambda *_: None, lambda s, c, _: c.abandon(s, _abandoned(s, c)), (None,), None),
    Scenario("clear", _abandoned, lambda s, c, _: sweep(s, c), (None,), None),
    Scenario("clear beside", _crowded, lambda s, c, _: sweep(s, c), ("old",), "old"),
)


def power_cuts(
    storage: Storage,
    strategy: CommitStrategy,
    scenario: Scenario,
    *,
    reaper: CommitStrategy | None = None,
    save_it: Save = save,
) -> int:
    """Cut the power before every change that the scenario makes; return how many there are.

    Each time, the older checkpoint must be whole, the other one as the scenario allows, a sweep must leave both as they
    are and nothing else, and the name must be free for another save.
    """
    for at in itertools.count():
        emptied(storage)
        save(storage, strategy, "5", "older")
        scenario.prepare(storage, strategy)
        cutting = CuttingStorage(storage, at)
        try:
            scenario.act(cutting, strategy, save_it)
        except PowerCut:
            _inspect(storage, strategy, reaper or strategy, scenario.allowed)
        else:
            _inspect(storage, strategy, reaper or strategy, (scenario.final,))
            return cutting.changes
    raise AssertionError("unreachable")


def _inspect(
    storage: Storage, strategy: CommitStrategy, reaper: CommitStrategy, allowed: tuple[str | None, ...]
) -> None:
    found = look(storage, strategy, "7")
    assert found in allowed
    assert look(storage, strategy, "5") == "older"
    sweep(storage, reaper, older_than=_NOTHING_LIVES)
    assert look(storage, strategy, "7") == found, "a sweep changed a checkpoint"
    assert look(storage, strategy, "5") == "older", "a sweep changed a checkpoint"
    assert list(reaper.leftovers(storage, older_than=_NOTHING_LIVES)) == [], "a sweep left something"
    if found is not None:
        strategy.delete(storage, "7")
    assert [key for key in keys(storage) if not key.startswith("5/")] == [], "a sweep left something"
    save(storage, strategy, "7", "again")
    assert look(storage, strategy, "7") == "again"


class _Careless(WrappedStorage):
    """A store that accepts the condition of a create-only write, and ignores it."""

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        self.write(key, buffers)


class CommitContract:
    """The tests that every commit strategy passes on every storage it fits."""

    overwrites = True
    """Whether this strategy can overwrite on this storage."""
    races = True
    """Whether the strategy promises anything to writers that race."""
    shares = True
    """Whether two attempts may write under one name at once; else the second is refused while the first lives."""

    @pytest.fixture
    def storage(self) -> Storage:
        """Return an empty storage."""
        raise NotImplementedError("a subclass of CommitContract has a fixture `storage`")

    @pytest.fixture
    def strategy(self) -> CommitStrategy:
        """Return the strategy."""
        raise NotImplementedError("a subclass of CommitContract has a fixture `strategy`")

    @pytest.fixture
    def reaper(self, strategy: CommitStrategy) -> CommitStrategy:
        """Return the strategy as a sweep uses it that knows that no commit is under way."""
        return strategy

    def test_the_strategy_has_the_shape_of_the_protocol_and_fits_the_storage(
        self, storage: Storage, strategy: CommitStrategy
    ) -> None:
        """If this fails, compare the names of the methods with `CommitStrategy`, and `needs` with the storage."""
        assert isinstance(strategy, CommitStrategy)
        assert all(isinstance(storage, need) for need in strategy.needs)
        assert strategy.promise

    def test_a_store_that_ignores_conditions_is_refused_and_left_as_it_was(
        self, storage: Storage, strategy: CommitStrategy
    ) -> None:
        """If this fails, `stage` believes in a condition that it has not seen to fail."""
        if CreatesOnly not in strategy.needs:
            return
        careless = _Careless(storage)
        assert isinstance(careless, CreatesOnly)
        with pytest.raises(ConfigError):
            save(careless, strategy, "7", "new")
        assert keys(storage) == []

    def test_a_checkpoint_is_visible_after_publish_and_not_before(
        self, storage: Storage, strategy: CommitStrategy
    ) -> None:
        """If this fails, check what `stage` writes, and that `publish` is done when it returns."""
        staging = strategy.stage(storage, "7", dead_attempt())
        manifest = write(storage, staging, "new")
        assert look(storage, strategy, "7") is None
        strategy.publish(storage, staging, manifest)
        assert look(storage, strategy, "7") == "new"

    def test_a_name_that_is_taken_is_refused_and_its_checkpoint_unharmed(
        self, storage: Storage, strategy: CommitStrategy
    ) -> None:
        """If this fails, the commit point replaces what is there."""
        save(storage, strategy, "7", "old")
        with pytest.raises(AlreadyExistsError):
            save(storage, strategy, "7", "new")
        assert look(storage, strategy, "7") == "old"

    def test_overwriting_replaces_the_checkpoint_or_is_refused(
        self, storage: Storage, strategy: CommitStrategy
    ) -> None:
        """If this fails, check that the former checkpoint is removed after the new one is there, not before."""
        save(storage, strategy, "7", "old")
        before = len(keys(storage))
        if self.overwrites:
            save(storage, strategy, "7", "new", overwrite=True)
            assert len(keys(storage)) == before
        else:
            with pytest.raises(AlreadyExistsError):
                save(storage, strategy, "7", "new", overwrite=True)
        assert look(storage, strategy, "7") == ("new" if self.overwrites else "old")

    def test_overwriting_nothing_is_saving(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, `overwrite` requires what it should only permit."""
        save(storage, strategy, "7", "new", overwrite=True)
        assert look(storage, strategy, "7") == "new"

    def test_an_abandoned_attempt_leaves_nothing(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, `abandon` removes too little, and the next save finds the rest."""
        staging = strategy.stage(storage, "7", dead_attempt())
        write(storage, staging, "abandoned")
        strategy.abandon(storage, staging)
        assert keys(storage) == []
        save(storage, strategy, "7", "new")
        assert look(storage, strategy, "7") == "new"

    def test_the_loser_of_a_race_abandons_only_its_own(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, `abandon` removes by name what it should remove by attempt."""
        staging = strategy.stage(storage, "7", dead_attempt())
        manifest = write(storage, staging, "loser")
        save(storage, strategy, "7", "winner")
        with pytest.raises(AlreadyExistsError):
            strategy.publish(storage, staging, manifest)
        strategy.abandon(storage, staging)
        assert look(storage, strategy, "7") == "winner"
        assert list(strategy.leftovers(storage, older_than=attempts.DAY)) == []

    def test_abandoning_what_is_committed_harms_nothing(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, an error after the commit point destroys the checkpoint."""
        staging = strategy.stage(storage, "7", dead_attempt())
        strategy.publish(storage, staging, write(storage, staging, "new"))
        strategy.abandon(storage, staging)
        assert look(storage, strategy, "7") == "new"

    def test_deleting_removes_everything_and_may_be_repeated(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, check what is left below the root."""
        save(storage, strategy, "7", "old")
        save(storage, strategy, "8", "kept")
        strategy.delete(storage, "7")
        strategy.delete(storage, "7")
        assert look(storage, strategy, "7") is None
        assert look(storage, strategy, "8") == "kept"
        strategy.delete(storage, "8")
        assert keys(storage) == []

    def test_a_sweep_finds_the_dead_and_spares_the_living(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, check how the attempt's id is read back from the storage."""
        dead = strategy.stage(storage, "7", dead_attempt())
        write(storage, dead, "dead")
        alive = strategy.stage(storage, "7" if self.shares else "8", attempts.new_attempt())
        manifest = write(storage, alive, "alive")
        found = list(strategy.leftovers(storage, older_than=attempts.DAY))
        assert {(each.name, each.attempt, each.dead) for each in found} == {
            ("7", dead.attempt, True),
            (alive.name, alive.attempt, False),
        }
        assert all(each.reason for each in found)
        sweep(storage, strategy)
        assert [each.attempt for each in strategy.leftovers(storage, older_than=attempts.DAY)] == [alive.attempt]
        strategy.publish(storage, alive, manifest)
        assert look(storage, strategy, alive.name) == "alive"

    def test_what_was_committed_meanwhile_is_not_cleared(self, storage: Storage, reaper: CommitStrategy) -> None:
        """If this fails, `clear` believes what `leftovers` saw."""
        staging = reaper.stage(storage, "7", dead_attempt())
        manifest = write(storage, staging, "new")
        (leftover,) = reaper.leftovers(storage, older_than=attempts.DAY)
        reaper.publish(storage, staging, manifest)
        assert not reaper.clear(storage, leftover)
        assert look(storage, reaper, "7") == "new"

    def test_a_writer_that_was_swept_cannot_commit(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, a process that slept through its own funeral commits a checkpoint without data."""
        staging = strategy.stage(storage, "7", dead_attempt())
        manifest = write(storage, staging, "zombie")
        sweep(storage, strategy)
        storage.write(f"{staging.prefix}late", [b"written by another host of the zombie"])
        with pytest.raises(AbortedError):
            strategy.publish(storage, staging, manifest)
        assert look(storage, strategy, "7") is None

    def test_what_nobody_here_wrote_is_never_swept(self, storage: Storage, reaper: CommitStrategy) -> None:
        """If this fails, the names of attempts are taken too broadly."""
        foreign = ["7/notes/a", "notes/a", "backup-20010101T000000Z/a", "8/commit_success.txt", "8/default/d/0"]
        for key in foreign:
            storage.write(key, [b"foreign"])
        sweep(storage, reaper)
        assert keys(storage) == sorted(foreign)

    @pytest.mark.parametrize("torn", [b"", b'{"attempt": "2001', b"[]", b'{"format": 99}', b"[" * 100_000])
    def test_data_beside_a_damaged_commit_object_are_never_swept(
        self, storage: Storage, reaper: CommitStrategy, torn: bytes
    ) -> None:
        """If this fails, a sweep takes a commit object that it cannot read for none."""
        save(storage, reaper, "7", "damaged")
        storage.write(f"7/{COMMIT_OBJECT}", [torn])
        before = keys(storage, "7/")
        sweep(storage, reaper)
        assert keys(storage, "7/") == before

    def test_of_many_writers_exactly_one_wins(self, storage: Storage, strategy: CommitStrategy) -> None:
        """If this fails, the primitive of the commit point is not atomic, or a lost race is reported as won."""
        if not self.races:
            assert strategy.needs == (), "a strategy that needs something of its storage promises something to racers"
            return
        for turn in range(10):
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                texts = [f"{turn}-{writer}" for writer in range(8)]
                # One that counts as dead would lose its name to the next, and go on writing.
                living = {text: "" if self.shares else attempts.new_attempt() for text in texts}
                saves = {
                    text: pool.submit(save, storage, strategy, str(turn), text, attempt=living[text]) for text in texts
                }
            errors = {text: each.exception() for text, each in saves.items()}
            winners = [text for text, error in errors.items() if error is None]
            assert [look(storage, strategy, str(turn))] == winners
            assert all(isinstance(error, AlreadyExistsError) for error in errors.values() if error)

    @pytest.mark.parametrize("overwrite", [False, True], ids=["save", "overwrite"])
    def test_a_lost_reply_is_not_a_lost_race(
        self, storage: Storage, strategy: CommitStrategy, *, overwrite: bool
    ) -> None:
        """If this fails, `publish` takes its own success for somebody else's."""
        overwrite = overwrite and self.overwrites
        changes = 1
        at = 0
        while at < changes:
            emptied(storage)
            if overwrite:
                save(storage, strategy, "7", "old")
            staging = strategy.stage(storage, "7", dead_attempt())
            manifest = write(storage, staging, "new")
            lossy = LostReplyStorage(storage, at)
            try:
                strategy.publish(lossy, staging, manifest, overwrite=overwrite)
            except (StorageError, OutcomeUnknownError):
                assert look(storage, strategy, "7") in ("new", "old" if overwrite else None)
            else:
                assert look(storage, strategy, "7") == "new"
            changes, at = lossy.changes, at + 1

    @pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
    def test_the_power_may_be_cut_before_every_change(
        self, storage: Storage, strategy: CommitStrategy, reaper: CommitStrategy, scenario: Scenario
    ) -> None:
        """If this fails, list the changes in order: one of them should come before another."""
        if (scenario.name != "overwrite" or self.overwrites) and (scenario.name != "clear beside" or self.shares):
            assert power_cuts(storage, strategy, scenario, reaper=reaper) > 0
