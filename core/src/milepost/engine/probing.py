"""What a storage must be seen to do before it is trusted with checkpoints: one probe for each property.

The rule: a probe writes as one client and looks as another, because what one client remembers of its own writing proves
nothing; it races writers that share nothing but the store; and it reports what it saw, never what was promised. A probe
works below one prefix that is its alone, and leaves removing to its caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn, TypeVar

from milepost.errors import AlreadyExistsError, NotFoundError
from milepost.protocols import (
    CreatesOnly,
    ExchangesPrefixes,
    FindsUploads,
    ListsInOrder,
    NamesDriver,
    RenamesPrefixes,
    ReplacesObjects,
    TellsTime,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from milepost.protocols import Storage

__all__ = ["BASIC", "PROBES", "Place", "Probe", "SeenError", "UnsureError"]

T = TypeVar("T")

BASIC = "write and read"
"""The probe without which no other makes sense."""

_ROUNDS = 8  # of a race, and of whatever a cache may hide
_RACING = 64 << 10  # bytes of a racing writer: while they travel, another one may pass
_BLOCK = 1 << 20
_AT_ONCE = 8  # blocks that are read by one request
_SKEW = 60.0
_ODD_NAMES = ("a b", "a+b", "100%", "a%20b", "a#b", "a?b&c=d", "[a]*", "ä-é-日本-🚂", ".hidden", "a:b", "a'b\"c", "~")
_PATIENCE = 600.0


class SeenError(Exception):
    """What a probe saw, where it should have seen something else."""


class UnsureError(Exception):
    """What a probe saw that is no defect, and should be known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where to probe: clients that share nothing but the store, and the prefix that is the probe's alone."""

    clients: tuple[Storage, ...]
    prefix: str
    size: int

    @property
    def writer(self) -> Storage:
        """The client that writes."""
        return self.clients[0]

    @property
    def reader(self) -> Storage:
        """The client that looks."""
        return self.clients[1]

    def key(self, name: str) -> str:
        """Return a key below the prefix."""
        return self.prefix + name


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One property: how it is looked at, what it is good for, and what to do where it is missing.

    `act` returns what is worth saying of a success, and raises `SeenError` or `UnsureError`. `needs` is the protocol
    that makes it a property of the storage, `without` what it means if the storage has it not; `after` is the probe
    that must have succeeded before.
    """

    name: str
    act: Callable[[Place], str]
    means: str
    remedy: str
    needs: type | None = None
    without: str = ""
    after: str = BASIC


def _saw(what: str) -> NoReturn:
    raise SeenError(what)


def _read(storage: Storage, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
    try:
        return bytes(storage.read(key, start, stop))
    except NotFoundError:
        return None


def _check_holds(place: Place, key: str, expected: bytes, when: str) -> None:
    found = _read(place.reader, key)
    if found != expected:
        there = "nothing" if found is None else "other bytes"
        _saw(f"{when}, another client finds {there} at {key!r}")


# --- objects ---------------------------------------------------------------------------------------------------------


def _write_and_read(place: Place) -> str:
    key = place.key("object")
    if _read(place.reader, key) is not None:
        _saw(f"{key!r}, which nobody wrote, can be read")
    place.writer.write(key, [b"mile", b"", b"post"])
    _check_holds(place, key, b"milepost", "after a write")
    size = place.reader.size(key)
    if size != len(b"milepost"):
        _saw(f"the size of an object of 8 bytes is {size}")
    return ""


def _ranges(place: Place) -> str:
    key, body = place.key("ranges"), b"0123456789"
    place.writer.write(key, [body])
    for start, stop in ((0, 0), (0, 3), (2, 5), (9, 10), (4, None), (7, 99), (10, None), (10, 12), (12, 15)):
        found = _read(place.reader, key, start, stop)
        if found != body[start:stop]:
            _saw(f"bytes {start} to {'the end' if stop is None else stop} of {body!r} come as {found!r}")
    return ""


def _empty(place: Place) -> str:
    key = place.key("empty")
    place.writer.write(key, [])
    _check_holds(place, key, b"", "after an empty object was written")
    return ""


def _odd_names(place: Place) -> str:
    keys = {place.key(f"odd/{name}/{name}"): name for name in _ODD_NAMES}
    for key, name in keys.items():
        place.writer.write(key, [name.encode()])
    for key, name in keys.items():
        _check_holds(place, key, name.encode(), "after a write")
    found = {child.removesuffix("/") for child in place.reader.children(place.key("odd/"))}
    if found != set(_ODD_NAMES):
        _saw(f"names are listed as others: {sorted(found ^ set(_ODD_NAMES))}")
    return ""


def _overwrite(place: Place) -> str:
    for number in range(_ROUNDS):
        key = place.key(f"overwritten/{number}")  # stores allow few changes of one object in a second
        for body in (b"old", b"newer"):
            place.writer.write(key, [body])
            _check_holds(place, key, body, "after an object was written again")
            size = place.reader.size(key)
            if size != len(body):
                _saw(f"after an object was written again with {len(body)} bytes, its size is {size}")
    return ""


def _large(place: Place) -> str:
    key, count = place.key("large"), max(1, -(-place.size // _BLOCK))
    place.writer.write(key, _blocks(count))
    size = place.reader.size(key)
    if size != count * _BLOCK:
        _saw(f"an object of {count * _BLOCK} bytes has {size}")
    blocks = _blocks(count)
    for start in range(0, count, _AT_ONCE):
        expected = b"".join(map(bytes, itertools.islice(blocks, _AT_ONCE)))
        if _read(place.reader, key, start * _BLOCK, (start + _AT_ONCE) * _BLOCK) != expected:
            _saw(f"of an object of {count} MiB, what follows {start} MiB comes back as other bytes")
    return f"{count} MiB in one object"


def _blocks(count: int) -> Iterator[memoryview]:
    block = bytearray(range(256)) * (_BLOCK // 256)
    for number in range(count):
        block[:8] = number.to_bytes(8, "big")
        yield memoryview(block)


class _BrokenOffError(Exception):
    pass


def _broken_off(place: Place) -> str:
    key, count = place.key("broken off"), max(1, -(-place.size // _BLOCK))

    def failing() -> Iterator[memoryview]:
        yield from _blocks(count)
        raise _BrokenOffError

    with contextlib.suppress(_BrokenOffError):
        place.writer.write(key, failing())
    found = _read(place.reader, key, 0, 1)
    if found is not None:
        _saw("what was written of an object before its writer failed can be read as if it were all")
    return ""


# --- conditions ------------------------------------------------------------------------------------------------------


def _creates(client: Storage, key: str, body: bytes) -> bool:
    """Create an object; say whether it was not refused."""
    assert isinstance(client, CreatesOnly)  # noqa: S101 - the probe asks for it
    try:
        client.create(key, [body])
    except AlreadyExistsError:
        return False
    return True


def _replaces(client: Storage, key: str, body: bytes, version: str) -> bool:
    """Replace an object of that version; say whether it was not refused."""
    assert isinstance(client, ReplacesObjects)  # noqa: S101 - the probe asks for it
    try:
        client.replace(key, [body], version)
    except (AlreadyExistsError, NotFoundError):
        return False
    return True


def _create_only(place: Place) -> str:
    key = place.key("created")
    _creates(place.writer, key, b"first")  # refused, it may be its own success, whose reply was lost
    _check_holds(place, key, b"first", "after an object was created")
    if _creates(place.reader, key, b"second"):
        _saw("an object can be created that is there already")
    _check_holds(place, key, b"first", "after it was refused to create an object again")
    return ""


def _create_raced(place: Place) -> str:
    for turn in range(_ROUNDS):
        key = place.key(f"raced/{turn}")
        _race(place, key, functools.partial(_creates_as, place, key))
    return f"{_ROUNDS} races of {len(place.clients)} writers"


def _creates_as(place: Place, key: str, who: int) -> bool:
    return _creates(place.clients[who], key, _body(who))


def _compare_and_swap(place: Place) -> str:
    key, storage = place.key("swapped"), place.writer
    assert isinstance(storage, ReplacesObjects)  # noqa: S101 - the probe asks for it
    storage.write(key, [b"first"])
    stale = storage.version(key)
    _replaces(storage, key, b"second", stale)  # refused, it may be its own success, whose reply was lost
    _check_holds(place, key, b"second", "after an object was replaced by its version")
    if storage.version(key) == stale:
        _saw("an object that was replaced has the version that it had before")
    if _replaces(place.reader, key, b"third", stale):
        _saw("an object can be replaced by a version that it no longer has")
    _check_holds(place, key, b"second", "after it was refused to replace an object")
    storage.delete(key)
    if _replaces(place.reader, key, b"third", stale):
        _saw("an object that is gone can be replaced")
    return ""


def _swap_raced(place: Place) -> str:
    storage = place.writer
    assert isinstance(storage, ReplacesObjects)  # noqa: S101 - the probe asks for it
    for turn in range(_ROUNDS):
        key = place.key(f"swap raced/{turn}")
        storage.write(key, [b"before"])
        version = storage.version(key)
        _race(place, key, functools.partial(_swaps_as, place, key, version))
    return f"{_ROUNDS} races of {len(place.clients)} writers"


def _swaps_as(place: Place, key: str, version: str, who: int) -> bool:
    return _replaces(place.clients[who], key, _body(who), version)


def _body(who: int) -> bytes:
    return b"%d" % who * _RACING


def _race(place: Place, key: str, act: Callable[[int], bool]) -> None:
    """Let all clients act at once; raise unless exactly one wins, and its bytes are there."""
    winners = [who for who, won in enumerate(_together(len(place.clients), act)) if won]
    if len(winners) > 1:
        _saw(f"of {len(place.clients)} writers at once, {len(winners)} were told that theirs is the only one")
    found = _read(place.reader, key)
    # With no winner, the reply to the one that was carried out was lost, and it was refused when it was repeated.
    if found not in [_body(who) for who in winners or range(len(place.clients))]:
        _saw("what is there after a race is not what the winner wrote")


def _together(count: int, act: Callable[[int], T]) -> Sequence[T]:
    start = threading.Barrier(count)

    def run(who: int) -> T:
        start.wait(_PATIENCE)
        return act(who)

    with ThreadPoolExecutor(count, "milepost-doctor") as pool:
        return list(pool.map(run, range(count)))


# --- listings --------------------------------------------------------------------------------------------------------


def _listing(place: Place) -> str:
    prefix, expected = place.key("listed/"), set[str]()
    for number in range(_ROUNDS + 1):
        found = set(place.reader.children(prefix))  # what is remembered of this is too old the next time
        if found != expected:
            right, wrong = len(found & expected), len(found - expected)
            _saw(f"of {len(expected)} names, another client is told {right}, and {wrong} that are none")
        place.writer.write(f"{prefix}{number}/object", [b""])
        expected.add(f"{number}/")
    return ""


def _in_order(place: Place) -> str:
    storage, prefix = place.reader, place.key("ordered/")
    assert isinstance(storage, ListsInOrder)  # noqa: S101 - the probe asks for it
    # As UTF-8, and not as UTF-16: the last two are the other way round there.
    names = ["7!/a", "7-/a", "7/a", "7/commit", "70/a", "8", "Z", "_", "a", "ä", "\uff5e", "\U0001f682"]
    for name in reversed(names):
        place.writer.write(prefix + name, [b""])
    expected = [prefix + name for name in names]
    for start in ("", *expected, f"{prefix}7/b", f"{prefix}70"):
        found, last = list[str](), start
        while len(found) <= len(expected) and (page := list(storage.keys_after(prefix, last))):
            found += page
            last = page[-1]
        if found != [key for key in expected if key.encode() > start.encode()]:
            _saw(f"the keys after {start.removeprefix(prefix)!r} are {[key.removeprefix(prefix) for key in found]}")
    return ""


def _delete(place: Place) -> str:
    writer, reader = place.writer, place.reader
    neighbours = [place.key(f"deleted/{name}") for name in ("a_10/b", "a_1!/b", "a_1b", "A_1/b")]
    gone = [place.key(f"deleted/a_1/{name}") for name in ("b", "c/d")]
    for key in [*neighbours, *gone]:
        writer.write(key, [b"1"])
        reader.size(key)  # what is remembered of it must not outlive it
    list(reader.children(place.key("deleted/a_1/")))
    writer.delete(place.key("deleted/a_1/"))
    there = [key for key in gone if _read(reader, key) is not None]
    if there or list(reader.children(place.key("deleted/a_1/"))):
        _saw("another client still finds what was deleted")
    lost = [key for key in neighbours if _read(reader, key) is None]
    if lost:
        _saw(f"with the prefix 'a_1/' went what is not below it: {[key.removeprefix(place.prefix) for key in lost]}")
    writer.delete(neighbours[0])
    if _read(reader, neighbours[0]) is not None:
        _saw("another client still finds an object that was deleted")
    return ""


# --- the rest --------------------------------------------------------------------------------------------------------


def _rename(place: Place) -> str:
    storage = place.writer
    assert isinstance(storage, RenamesPrefixes)  # noqa: S101 - the probe asks for it
    for name in ("one/a", "one/b/c", "two/a"):
        storage.write(place.key(name), [name.encode()])
    storage.rename(place.key("one/"), place.key("renamed/"))
    _check_holds(place, place.key("renamed/b/c"), b"one/b/c", "after a rename")
    if list(place.reader.children(place.key("one/"))):
        _saw("after a rename, something is still under the former name")
    try:
        storage.rename(place.key("renamed/"), place.key("two/"))
    except AlreadyExistsError:
        return ""
    _saw("something can be renamed to a name that is taken")


def _exchange(place: Place) -> str:
    storage = place.writer
    assert isinstance(storage, ExchangesPrefixes)  # noqa: S101 - the probe asks for it
    one, other = place.key("exchanged/1/"), place.key("exchanged/2/")
    for prefix in (one, other):
        storage.write(f"{prefix}name", [prefix.encode()])
    swapped = storage.exchange(one, other)
    _check_holds(place, f"{one}name", (other if swapped else one).encode(), "after an exchange")
    if not swapped:
        raise UnsureError(
            "this system cannot: an overwrite takes two renames, and what is cut off between is put right"
        )
    return ""


def _uploads(place: Place) -> str:
    storage, seen = place.reader, list[str]()
    assert isinstance(storage, FindsUploads)  # noqa: S101 - the probe asks for it
    key, count = place.key("in parts"), max(1, -(-place.size // _BLOCK))

    def watched() -> Iterator[memoryview]:
        for number, block in enumerate(_blocks(count)):
            if number == count - 1:
                seen.extend(upload.key for upload in storage.uploads(place.prefix))
            yield block

    place.writer.write(key, watched())
    left = [upload.key for upload in storage.uploads(place.prefix)]
    if left:
        _saw(f"what was broken off or completed is still listed as an upload: {sorted(left)}")
    if key not in seen:
        raise UnsureError(f"an object of {count} MiB that was being written was not among them; try a larger --size")
    return ""


def _clock(place: Place) -> str:
    storage = place.writer
    assert isinstance(storage, TellsTime)  # noqa: S101 - the probe asks for it
    before = time.time()
    there = storage.time()
    skew = there - (before + time.time()) / 2
    if abs(skew) > _SKEW:
        way = "ahead of" if skew > 0 else "behind"
        raise UnsureError(f"the clock of the store is {abs(skew):,.0f} seconds {way} that of this machine")
    return f"it differs by {abs(skew):.1f} seconds"


def _driver(place: Place) -> str:
    storage = place.writer
    assert isinstance(storage, NamesDriver)  # noqa: S101 - the probe asks for it
    described = storage.kvstore(place.prefix)
    if described is None:
        raise UnsureError(
            "TensorStore cannot be told how this storage is reached, so its files go through this process"
        )
    return f"driver {described.get('driver')!r}"


# --- all of them -----------------------------------------------------------------------------------------------------

_CACHE = "switch off caches between here and the store: listings and objects must be those of this moment"
_CREATE = (
    "enable conditional writes (If-None-Match: *, generation 0) in the store, or take a newer version of it; with one "
    "process at a time that saves, set commit = 'marker'"
)
_SWAP = (
    "enable conditional writes (If-Match, a generation) in the store, or take a newer version of it; until then do not "
    "overwrite: save under new names"
)
_CLIENT = "report it to whoever makes the storage's package or the store: its tests are in milepost.testing.storage"

PROBES = (
    Probe(BASIC, _write_and_read, "what is written can be read at once, by another client", _CACHE, after=""),
    Probe("ranges", _ranges, "a part of an object can be read", _CLIENT),
    Probe("empty object", _empty, "an object of no bytes is an object", _CLIENT),
    Probe("odd names", _odd_names, "a name means nothing but itself", _CLIENT),
    Probe("overwrite", _overwrite, "what is written again is seen at once, by another client", _CACHE),
    Probe(
        "large object", _large, "an object larger than a part comes back whole", "lower the concurrency, or " + _CLIENT
    ),
    Probe("broken off", _broken_off, "an object whose writer fails does not appear", _CLIENT),
    Probe(
        "create only",
        _create_only,
        "an object is created only if there is none: of two saves of one name the second is told",
        _CREATE,
        needs=CreatesOnly,
        without="the storage cannot create an object only if there is none",
    ),
    Probe(
        "create only, raced",
        _create_raced,
        "of writers that come at once exactly one wins",
        _CREATE,
        needs=CreatesOnly,
        without="the storage cannot create an object only if there is none",
        after="create only",
    ),
    Probe(
        "compare and swap",
        _compare_and_swap,
        "an object is replaced only if nobody has written it meanwhile: an overwrite loses no other's",
        _SWAP,
        needs=ReplacesObjects,
        without="the storage cannot compare and swap an object: the strategy 'create' overwrites nothing",
    ),
    Probe(
        "compare and swap, raced",
        _swap_raced,
        "of writers that replace one version exactly one wins",
        _SWAP,
        needs=ReplacesObjects,
        without="the storage cannot compare and swap an object: the strategy 'create' overwrites nothing",
        after="compare and swap",
    ),
    Probe("listing", _listing, "what is written is listed at once, for another client", _CACHE),
    Probe(
        "listing in order",
        _in_order,
        "keys come in the order of their bytes: many checkpoints are found by few requests",
        _CLIENT,
        needs=ListsInOrder,
        without="the storage does not list keys in order: each checkpoint is looked for by a request",
    ),
    Probe("delete", _delete, "what is deleted is gone at once, and its neighbours are not", _CACHE),
    Probe(
        "rename",
        _rename,
        "everything below a prefix gets another name, unless that is taken",
        "set commit = 'create' or 'marker', which rename nothing",
        needs=RenamesPrefixes,
        without="the storage cannot rename: checkpoints appear by their commit object",
    ),
    Probe(
        "exchange",
        _exchange,
        "two prefixes are swapped at one instant: an overwrite never leaves neither",
        "set commit = 'create' or 'marker', which swap nothing",
        needs=ExchangesPrefixes,
        without="the storage cannot swap prefixes",
    ),
    Probe(
        "unfinished uploads",
        _uploads,
        "an upload that its writer did not finish is found, and can be removed by a sweep",
        "grant permission to list and to abort uploads, or let a rule of the bucket abort those older than a week",
        needs=FindsUploads,
        without="the storage tells of no uploads: it has none, or a rule of the bucket has to abort them",
    ),
    Probe(
        "clock",
        _clock,
        "the clocks agree: whether an unfinished save is dead is told by its age",
        "synchronise this machine's clock, by NTP for instance",
        needs=TellsTime,
        without="the storage has no clock of its own",
    ),
    Probe(
        "native driver",
        _driver,
        "TensorStore reaches the store by a driver of its own",
        "for more speed with TensorStore, reach the store in a way that its driver knows",
        needs=NamesDriver,
        without="the storage names none: files of a folder need none, others go through this process",
    ),
)
