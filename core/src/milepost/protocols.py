"""What storages, commit strategies, array writers, leaf handlers and hosts must do.

The rule: every protocol here is small enough to write from memory, and a capability is an extension protocol of its
own, never a flag. Nothing in this module does I/O, and nothing but `errors` is imported from the project, so that a
backend needs no more of milepost than this, `errors` and `hookspecs`.

Keys are `/`-separated relative names ("7/state/arrays-0.safetensors"); a prefix is a key that ends in "/", and "" is
the whole storage. There are no directories: a prefix exists exactly as long as a key begins with it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = [
    "COMMIT_OBJECT",
    "Array",
    "ArrayIO",
    "ArraySpec",
    "Box",
    "Buffer",
    "ChunksArrays",
    "CommitStrategy",
    "CompletesCheckpoints",
    "CreatesOnly",
    "ExchangesPrefixes",
    "FindsUploads",
    "Hosts",
    "Json",
    "KeepsFolders",
    "Layout",
    "LeafHandler",
    "Leftover",
    "ListsInOrder",
    "Location",
    "MapsFiles",
    "NamesDriver",
    "NotesFiles",
    "OwnsFolders",
    "Parts",
    "Piece",
    "PrefersLargeRequests",
    "ReadOptions",
    "ReadRequest",
    "ReadsInto",
    "RecognisesLayout",
    "RenamesPrefixes",
    "ReplacesObjects",
    "Staging",
    "Storage",
    "SyncsPrefixes",
    "TellsChunks",
    "TellsTime",
    "Upload",
    "WriteOptions",
]

T = TypeVar("T")

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value that JSON can hold."""

Buffer: TypeAlias = "bytes | bytearray | memoryview"
"""Contiguous bytes; a memoryview is of format "B" and one dimension."""

Array: TypeAlias = "NDArray[Any]"
"""A NumPy array in C order, in native byte order, of a dtype that NumPy or ml_dtypes defines."""

COMMIT_OBJECT = "commit_success.txt"
"""The last part of the key whose visibility makes a checkpoint exist; its body is the manifest."""


# --- storage ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class Storage(Protocol):
    """Bytes under keys, below one root URL.

    All methods block and may be called from any thread. They raise `NotFoundError` for a key that does not exist,
    `StorageFullError`, `StorageDeniedError` or another `StorageError` when the storage refuses.
    """

    @property
    def url(self) -> str:
        """The root, without a trailing slash: `f"{url}/{key}"` is what a person would call the object."""
        ...

    @property
    def commit(self) -> str:
        """The name of the commit strategy that fits this storage best."""
        ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of an object; fewer where it ends before `stop`."""
        ...

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers, one after the other, as one object: wholly and durably, or not at all.

        An object of that key is replaced at one instant. Buffers are taken one at a time, so that a generator may
        compute each when it is asked for; a buffer may be reused by the caller once the next one is taken.
        """
        ...

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those that are prefixes themselves end in "/".

        Nothing below the prefix, or no such prefix: no names. The order is not specified.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object, or with a key that ends in "/" everything below it; what is gone already is no error."""
        ...

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""
        ...


@runtime_checkable
class CreatesOnly(Protocol):
    """A storage that can create an object only if there is none, as one atomic step among all its users."""

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store a new object as `write` does, or raise `AlreadyExistsError` and change nothing."""
        ...


@runtime_checkable
class ReplacesObjects(Protocol):
    """A storage that can compare and swap one object."""

    def version(self, key: str) -> str:
        """Return an opaque tag that differs whenever the object was written again."""
        ...

    def replace(self, key: str, buffers: Iterable[Buffer], version: str) -> None:
        """Store the object as `write` does if its version is still that one, else raise `AlreadyExistsError`."""
        ...


@runtime_checkable
class RenamesPrefixes(Protocol):
    """A storage that can give everything below a prefix another name at one instant, durably."""

    def rename(self, source: str, target: str) -> None:
        """Rename prefix `source` to prefix `target`.

        Raises `AlreadyExistsError` if anything is at the target, and `NotFoundError` if nothing is at the source.
        """
        ...


@runtime_checkable
class ExchangesPrefixes(Protocol):
    """A storage that can swap two prefixes at one instant, durably."""

    def exchange(self, one: str, other: str) -> bool:
        """Swap two prefixes and return True; return False, with nothing changed, where this system cannot."""
        ...


@runtime_checkable
class SyncsPrefixes(Protocol):
    """A storage that others may write into behind its back, and that can make what they wrote durable."""

    def sync(self, prefix: str) -> None:
        """Make everything below the prefix durable, whoever wrote it."""
        ...


@runtime_checkable
class ReadsInto(Protocol):
    """A storage that can read into memory of the caller."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer with the bytes from `start` on; return how many there were before the object ended."""
        ...


@runtime_checkable
class PrefersLargeRequests(Protocol):
    """A storage on which a request costs as much as many bytes, and which gathers in memory what it sends."""

    @property
    def request_bytes(self) -> int:
        """How many bytes a request should move, where there are so many."""
        ...

    @property
    def writes_at_once(self) -> int:
        """How many objects to write at once at the most: more hold more memory, cost more requests and gain nothing."""
        ...


@runtime_checkable
class MapsFiles(Protocol):
    """A storage whose objects can be mapped into memory."""

    def map(self, key: str) -> memoryview:
        """Return the whole object as private, writable memory: changes are seen by nobody else and never stored.

        The mapping lives as long as anything refers to it. Cutting the object short meanwhile kills the process, so
        only objects that nobody rewrites in place may be mapped.
        """
        ...


@runtime_checkable
class KeepsFolders(Protocol):
    """A storage whose prefixes are folders of this machine's file system."""

    def folder(self, prefix: str) -> Path:
        """Return the folder of a prefix, whether or not it exists."""
        ...


@runtime_checkable
class NamesDriver(Protocol):
    """A storage that TensorStore reaches by a driver of its own, without going through this process."""

    def kvstore(self, prefix: str) -> Mapping[str, Json] | None:
        """Return TensorStore's specification of the key-value store below a prefix, endpoint and credentials too.

        None where TensorStore cannot be told how this storage is reached; it then works through the storage itself.
        """
        ...


@runtime_checkable
class ListsInOrder(Protocol):
    """A storage that lists keys in the order of their UTF-8 bytes, from any point on, many for one request."""

    def keys_after(self, prefix: str, key: str) -> Sequence[str]:
        """Return the first keys below a prefix that come after a key, at all depths; none if there are no more.

        At most a thousand or so, which is what one request returns. `key` begins with the prefix or is "".
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Upload:
    """An upload of an object in parts that was neither completed nor aborted: its key, its id, and when it began."""

    key: str
    id: str
    started: float


@runtime_checkable
class FindsUploads(Protocol):
    """A storage in which the parts of an upload stay, invisible and paid for, when its writer dies."""

    def uploads(self, prefix: str) -> Iterable[Upload]:
        """Return the unfinished uploads of keys below a prefix."""
        ...

    def abort_upload(self, upload: Upload) -> None:
        """Give an upload up, and remove its parts; what is gone already is no error."""
        ...


@runtime_checkable
class TellsTime(Protocol):
    """A storage with a clock of its own."""

    def time(self) -> float:
        """Return what the storage's clock says, in seconds since the epoch."""
        ...


@runtime_checkable
class NotesFiles(Protocol):
    """A storage that keeps a list of what is written, and must be told of what was written behind its back."""

    def note(self, key: str) -> None:
        """Take note of an object that a native driver wrote: of its size, not of its bytes."""
        ...


# --- commit ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Staging:
    """Where one attempt to save one checkpoint writes, until it is published.

    `name` is the final key of the checkpoint, without a slash at the end; `attempt` the id of this attempt; `prefix`
    the prefix (ends in "/") under which everything is written; `data` is what to put before a file's path in the
    manifest: the path of the attempt's files relative to the published checkpoint ("" or ends in "/").
    """

    name: str
    attempt: str
    prefix: str
    data: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Leftover:
    """What an attempt or a deletion left behind: the prefix, whose it was, and why it may or may not be removed."""

    prefix: str
    name: str
    attempt: str
    dead: bool
    reason: str


@runtime_checkable
class CommitStrategy(Protocol):
    """The way by which a checkpoint becomes visible at one instant.

    Every method takes the storage first; a strategy keeps no state between calls, so that any process can go on where
    another died.
    """

    @property
    def needs(self) -> tuple[type, ...]:
        """The extension protocols without which this strategy cannot keep its promise."""
        ...

    @property
    def promise(self) -> str:
        """One sentence for people: what is guaranteed, and what is not."""
        ...

    def stage(self, storage: Storage, name: str, attempt: str) -> Staging:
        """Say where an attempt writes, and leave there what others need to tell that it lives."""
        ...

    def publish(self, storage: Storage, staging: Staging, manifest: bytes, *, overwrite: bool = False) -> None:
        """Make the attempt the checkpoint of its name: the commit point.

        On return the checkpoint is durable and visible. Raises `AlreadyExistsError` when the name is taken (with
        `overwrite`, the former checkpoint is replaced such that at every instant it or the new one can be read),
        `AbortedError` when the attempt was fenced off, `OutcomeUnknownError` when it cannot be told.
        """
        ...

    def abandon(self, storage: Storage, staging: Staging) -> None:
        """Remove what a failed attempt of this process wrote."""
        ...

    def recover(self, storage: Storage, name: str) -> str | None:
        """Return the prefix at which the checkpoint can be read when its own name has none: an overwrite was cut off.

        None where there is none, or where this strategy never leaves such a state. Changes nothing.
        """
        ...

    def leftovers(self, storage: Storage, *, older_than: float) -> Iterator[Leftover]:
        """Find what attempts and deletions left directly below the root of the storage.

        `dead` says whether it may be removed: its process is known to be gone, or it is older than so many seconds.
        """
        ...

    def clear(self, storage: Storage, leftover: Leftover) -> bool:
        """Fence the attempt off, then remove it; False where it got away (committed or swept by others meanwhile)."""
        ...

    def delete(self, storage: Storage, name: str) -> None:
        """Remove a committed checkpoint: no longer visible at one instant, then everything else."""
        ...


# --- arrays ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A box of an array: `start[i] <= index[i] < start[i] + shape[i]`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of an item: a name that is unique in it, its shape, and its dtype by NumPy's or ml_dtypes' name.

    `box` is the shape of the boxes that it is spread over hosts and devices in, counted from the origin; those at the
    far ends may be smaller. No box is written by two hosts. None: it is not spread. `chunk_bytes` and `chunk_axes` are
    what the caller wishes for chunks: how large one may be, and which axes are divided first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    box: tuple[int, ...] | None = None
    chunk_bytes: int | None = None
    chunk_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One box of one array that this host writes.

    `fetch` returns its data, of exactly the box's shape, in C order; it is called once, when the bytes are needed.
    For a writer that `ChunksArrays`, a box consists of whole chunks.
    `box` None means the whole array. `view` says that the data exist in memory anyway, so that holding them costs none.
    """

    spec: ArraySpec
    fetch: Callable[[], Array]
    box: Box | None = None
    view: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ReadRequest:
    """One box of one array that is wanted here; `box` None means the whole array."""

    name: str
    box: Box | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where an array writer works: below `prefix` (ends in "/") of the storage; `url` says the same to native drivers.

    `host` and `hosts` number the writing processes, so that each can choose file names of its own.
    """

    storage: Storage
    prefix: str
    url: str
    host: int = 0
    hosts: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class WriteOptions:
    """How to write: bytes that may be held beyond the state itself, and how many threads may work."""

    budget: int
    threads: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read: bytes to hold beyond the result, threads, whether to check every checksum, and whether to map.

    With `mapped`, arrays may be views of mapped files where the storage offers it.
    """

    budget: int
    threads: int
    verify: bool = True
    mapped: bool = False


@runtime_checkable
class ArrayIO(Protocol):
    """The way by which arrays become bytes: NumPy boxes in and out; no trees, no devices."""

    def create(self, location: Location, specs: Sequence[ArraySpec]) -> None:
        """Prepare to write these arrays; called on one host, before any host writes."""
        ...

    def write(self, location: Location, pieces: Sequence[Piece], options: WriteOptions) -> Json:
        """Write this host's pieces durably; return this host's part of the record, which `read` gets back."""
        ...

    def read(
        self, location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
    ) -> Iterator[tuple[int, Array]]:
        """Yield `(index of the request, array)` in any order, each as soon as it is there.

        `records` holds what every host's `write` returned. The caller owns the arrays: nobody else writes to them, and
        they begin at an address divisible by 64 where their size makes that worth it. Raises `MissingDataError` and
        `ChecksumError`, naming file and array, and `ManifestError` for a record that contradicts itself.
        """
        ...


@runtime_checkable
class ChunksArrays(Protocol):
    """An array writer that stores arrays in chunks of which each is written once, whole, and by one host."""

    def chunk(self, spec: ArraySpec) -> tuple[int, ...]:
        """Return the shape of an array's chunks, counted from the origin; it divides `spec.box` where there is one."""
        ...


@runtime_checkable
class TellsChunks(Protocol):
    """An array writer that knows of an array it stored in which chunks it did, each of which is read as a whole."""

    def stored_chunks(
        self, location: Location, records: Sequence[Json], names: Sequence[str]
    ) -> Sequence[tuple[int, ...] | None]:
        """Return for each array the shape of its chunks, counted from the origin; None where any box reads as well."""
        ...


@runtime_checkable
class CompletesCheckpoints(Protocol):
    """An array writer whose format has files besides the arrays."""

    def complete(self, location: Location, checkpoint: Mapping[str, Any]) -> None:
        """Write what else the format needs; called on one host, once every host has written everything.

        `location` is that of the whole checkpoint, `checkpoint` its manifest as a JSON object, with all but `files`:
        each of `items` has a `prefix` (relative to the checkpoint's own data, "" or ending in "/"), `structure`,
        `leaves`, `shardings`, `writer` and `records`, as docs/reference/format.md describes them.
        """
        ...


# --- foreign layouts -------------------------------------------------------------------------------------------------


@runtime_checkable
class Layout(Protocol):
    """A way in which others lay out checkpoints, which can be read as if it were ours."""

    def read(self, storage: Storage, prefix: str, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the manifest of what is below a prefix, as a JSON object; None where it is not of this layout.

        `names` are the children of the prefix. Nothing of the arrays themselves is read. Raises `DamagedError` for
        what is of this layout and cannot be read, saying what is missing or wrong, by leaf where possible.

        Of a single file `prefix` is that of the folder around it ("" or ends in "/") and `names` has its name alone: a
        layout of folders returns None then.
        """
        ...


@runtime_checkable
class RecognisesLayout(Protocol):
    """A layout that knows its checkpoints by their names, so that many can be told apart at little cost."""

    def recognises(self, storage: Storage, prefix: str, names: Sequence[str]) -> bool:
        """Say whether `read` would return a manifest, or raise `DamagedError`, for what is below a prefix.

        Looks at names, and at one small file at most; never at what grows with the number of arrays. Where that does
        not suffice, as for what is older than its labels, the answer may be False.
        """
        ...


@runtime_checkable
class OwnsFolders(Protocol):
    """A layout whose checkpoints have folders of their own, in which nobody keeps anything else.

    Checkpoints of a layout that does not say so are never deleted: their folders may hold what their user put there.
    """

    def owns(self, storage: Storage, prefix: str, names: Sequence[str]) -> bool:
        """Say whether a folder is certain to be a checkpoint of this layout, readable or not, that may be deleted.

        As cheap as `RecognisesLayout.recognises`, and stricter: False wherever it could be something else.
        """
        ...


# --- leaves ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """A leaf taken apart: what goes into the manifest, and the arrays it needs by part name ("" for its one array)."""

    json: Mapping[str, Json]
    arrays: Mapping[str, object] = dataclasses.field(default_factory=dict)


@runtime_checkable
class LeafHandler(Protocol):
    """One kind of leaf: taken apart into JSON and arrays, and put together again. No I/O.

    Arrays are `numpy.ndarray` or `jax.Array`. `name` is recorded in the manifest and finds the handler on loading.
    """

    @property
    def name(self) -> str:
        """The name recorded in the manifest, e.g. "np.ndarray"."""
        ...

    @property
    def types(self) -> tuple[type, ...]:
        """The types of leaves it handles; the handler of the nearest class in a leaf's MRO is asked."""
        ...

    def take_apart(self, leaf: Any) -> Parts:
        """Return the leaf's parts; raise `ValueError` with a reason if this one cannot be saved."""
        ...

    def put_together(self, json: Mapping[str, Json], arrays: Mapping[str, Any]) -> Any:
        """Return a leaf equal to the one taken apart, from its JSON and its arrays as loaded."""
        ...


# --- hosts -----------------------------------------------------------------------------------------------------------


@runtime_checkable
class Hosts(Protocol):
    """The processes that save or load together. Both verbs return on every host or raise on every host."""

    @property
    def index(self) -> int:
        """This host's number, from 0."""
        ...

    @property
    def count(self) -> int:
        """How many hosts there are."""
        ...

    def owner(self, device: Any) -> int:
        """Return the number of the host that a `jax.Device` belongs to."""
        ...

    def decide(self, phase: str, act: Callable[[], T]) -> T:
        """Let host 0 act; return its result, which JSON can hold, on every host."""
        ...

    def together(self, phase: str, act: Callable[[], T]) -> list[T]:
        """Let every host act; return all results, which JSON can hold, by host number, on every host."""
        ...
