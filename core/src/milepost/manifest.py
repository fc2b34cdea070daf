"""What a checkpoint says about itself: the body of its commit object.

The rule: a checkpoint exists if and only if its commit object is visible under its name, and this is all of what is
known about it. One JSON document answers "is it there", "what is in it" and "is it intact": the tree, the files with
size and checksum, the array writer's record, the user's metadata, and a checksum over the document itself. Whoever
reads it trusts nothing in it: whatever does not fit is a `ManifestError`, and no number in it is used before it was
checked.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from milepost.checksums import ALGORITHM, fingerprint
from milepost.errors import FutureFormatError, ManifestError, noted
from milepost.structure import count_leaves

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milepost.protocols import Json

__all__ = [
    "FORMAT",
    "VERSION",
    "ArrayLeaf",
    "FileEntry",
    "Item",
    "Manifest",
    "check_path",
    "decode",
    "encode",
    "from_document",
    "is_manifest",
    "to_document",
]

FORMAT = "milepost"
VERSION = 1

_CHECKSUM = ',"checksum":"'
_TAIL = len(_CHECKSUM) + len(fingerprint(b"")) + len('"}')


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: its path relative to it, its size in bytes, and its checksum."""

    path: str
    size: int
    checksum: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayLeaf:
    """One array that a leaf needs: shape, dtype by name, and the number of its saved sharding (None: a NumPy array)."""

    shape: tuple[int, ...]
    dtype: str
    sharding: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One tree of a checkpoint.

    `leaves` has one JSON object per leaf, in order: `type` names the leaf handler, `arrays` its arrays by part (each an
    `ArrayLeaf` once read), the rest belongs to the handler. `shardings` are what the leaves' arrays were spread over:
    information, never a demand. `records` is the array writer's, one for each host that wrote; its files are below
    `prefix`, relative to the checkpoint ("" for an item that is all of it). An item that wrote its own files has no
    writer. `handler` names what the item
    was saved with, where the caller said so.
    """

    structure: Any
    leaves: list[dict[str, Any]]
    shardings: list[dict[str, Any]]
    writer: str
    prefix: str
    records: list[Any]
    handler: str = ""
    custom_metadata: Json = None


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about one checkpoint."""

    attempt: str
    init_timestamp_nsecs: int
    commit_timestamp_nsecs: int
    written_by: Mapping[str, Any]
    items: Mapping[str, Item]
    files: tuple[FileEntry, ...]
    custom_metadata: Json = None
    metrics: Json = None
    version: int = VERSION

    @property
    def data_bytes(self) -> int:
        """The bytes of all files besides the manifest."""
        return sum(file.size for file in self.files)


def to_document(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as the JSON object that it is written as; leaves may still hold `ArrayLeaf`s."""
    document: dict[str, Any] = {"format": FORMAT}
    document |= {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    document["items"] = {name: _without_blank(_shallow(item)) for name, item in manifest.items.items()}
    document["files"] = [_shallow(file) for file in manifest.files]
    return document


def encode(manifest: Manifest) -> bytes:
    """Return the body of the commit object: ASCII JSON that ends in a checksum of all that stands before it."""
    head = to_document(manifest)
    # A manifest that was read has `ArrayLeaf`s where one that was made has objects.
    body = json.dumps(head, separators=(",", ":"), allow_nan=False, default=_shallow).encode("ascii")[:-1]
    return body + f'{_CHECKSUM}{fingerprint(body)}"}}'.encode()


def _shallow(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _without_blank(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value or key not in ("handler", "custom_metadata")}


def is_manifest(body: bytes) -> bool:
    """Say whether a commit object is ours, intact or not; the reference writes a sentence into its own."""
    return body[:512].lstrip().startswith(b"{") and f'"{FORMAT}"'.encode() in body[:512]


def decode(body: bytes, *, where: str) -> Manifest:
    """Read a commit object, believing nothing.

    Raises `ManifestError` for a body that is damaged, contradictory or hostile, `FutureFormatError` for one of a newer
    format; `where` names the checkpoint in the message.
    """
    document = _parse(body, where)
    version = document.get("version")
    if isinstance(version, int) and version > VERSION:
        raise noted(
            FutureFormatError(
                f"cannot read {where!r}: it has format version {version}, this milepost reads up to {VERSION}"
            ),
            "pip install --upgrade milepost",
        )
    _check_sum(body, where)
    return from_document(document, where=where)


def from_document(document: Mapping[str, Any], *, where: str) -> Manifest:
    """Read a manifest that is a JSON object already, believing nothing; raises `ManifestError`.

    `document` is taken over: what is in it may be changed.
    """
    try:
        return _manifest(document)
    except RecursionError:
        raise ManifestError(f"cannot believe the manifest of {where!r}: it is nested too deeply") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ManifestError(f"cannot believe the manifest of {where!r}: {error}") from error


def _parse(body: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise ManifestError(f"cannot believe the manifest of {where!r}: it is nested too deeply") from None
    except ValueError as error:
        raise ManifestError(f"cannot read the manifest of {where!r}: it is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ManifestError(f"cannot read the manifest of {where!r}: its format is not {FORMAT!r}")
    return document


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_sum(body: bytes, where: str) -> None:
    body = body.rstrip()
    head, tail = body[:-_TAIL], body[-_TAIL:]
    expected = f'{_CHECKSUM}{fingerprint(head)}"}}'.encode()
    if tail != expected:
        raise ManifestError(
            f"cannot believe the manifest of {where!r}: it ends in {tail.decode(errors='replace')!r} "
            f"where its bytes give {expected.decode()!r}"
        )


def _manifest(document: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(
        attempt=_is(document["attempt"], str, "attempt"),
        init_timestamp_nsecs=_count(document["init_timestamp_nsecs"], "init_timestamp_nsecs"),
        commit_timestamp_nsecs=_count(document["commit_timestamp_nsecs"], "commit_timestamp_nsecs"),
        written_by=_is(document["written_by"], dict, "written_by"),
        items={name: _item(item, name) for name, item in _is(document["items"], dict, "items").items()},
        files=tuple(_file(file) for file in _is(document["files"], list, "files")),
        custom_metadata=_is_any(document["custom_metadata"], (dict, type(None)), "custom_metadata"),
        metrics=_is_any(document["metrics"], (dict, type(None)), "metrics"),
        version=_count(document["version"], "version"),
    )
    if manifest.version != VERSION:
        raise ValueError(f"there is no format version {manifest.version}")
    if len({file.path for file in manifest.files}) != len(manifest.files):
        raise ValueError("it lists a file twice")
    return manifest


def _item(json: Any, name: str) -> Item:
    _is(json, dict, f"item {name!r}")
    known: dict[tuple[Any, ...], ArrayLeaf] = {}
    leaves = [_leaf(leaf, len(json["shardings"]), known) for leaf in _is(json["leaves"], list, "leaves")]
    shardings = [_is(sharding, dict, "sharding") for sharding in _is(json["shardings"], list, "shardings")]
    if (count := count_leaves(json["structure"])) != len(leaves):
        raise ValueError(f"item {name!r} has {len(leaves)} leaves in a structure for {count}")
    return Item(
        structure=json["structure"],
        leaves=leaves,
        shardings=shardings,
        writer=_is(json["writer"], str, "writer"),
        prefix=_prefix(_is(json["prefix"], str, "prefix")),
        records=_is(json["records"], list, "records"),
        handler=_is(json.get("handler", ""), str, "handler"),
        custom_metadata=_is_any(json.get("custom_metadata"), (dict, type(None)), "custom_metadata of an item"),
    )


def _prefix(text: str) -> str:
    return check_path(text.removesuffix("/")) + "/" if text else ""


def _leaf(json: Any, shardings: int, known: dict[tuple[Any, ...], ArrayLeaf]) -> dict[str, Any]:
    _is(json, dict, "leaf")
    _is(json["type"], str, "type of a leaf")
    raw = _is(json.get("arrays", {}), dict, "arrays of a leaf")
    arrays = {part: _array(array, shardings, known) for part, array in raw.items()}
    _check_known(json, arrays)
    json["arrays"] = arrays
    return json  # type: ignore[no-any-return]


def _array(json: Any, shardings: int, known: dict[tuple[Any, ...], ArrayLeaf]) -> ArrayLeaf:
    """Return what is said of an array; those that are `known` already are shared, since most of a tree is alike."""
    shape, dtype, sharding = json["shape"], json["dtype"], json["sharding"]
    # The kinds of all values are looked at first: to a dict, 1 and True are the same key.
    for length in _is(shape, list, "shape"):
        if type(length) is not int:
            _count(length, "shape")
    _is(dtype, str, "dtype")
    if sharding is not None and type(sharding) is not int:
        _count(sharding, "sharding")
    key = (tuple(shape), dtype, sharding)
    found = known.get(key)
    if found is None:
        for length in shape:
            _count(length, "shape")
        if sharding is not None and not 0 <= _count(sharding, "sharding") < shardings:
            raise ValueError(f"sharding {sharding} is none of {shardings}")
        found = known[key] = ArrayLeaf(*key)
    return found


def _check_known(json: Mapping[str, Any], arrays: Mapping[str, ArrayLeaf]) -> None:
    """Check what is read of a leaf before its handler is asked."""
    if (json["type"] in ("jax.Array", "np.ndarray") or "key_impl" in json) and "" not in arrays:
        raise ValueError(f"a leaf of type {json['type']!r} has no array")
    if json["type"] == "np.generic" and not _is(json["dtype"], str, "dtype of a scalar"):
        raise ValueError("a scalar has no dtype")


def _file(json: Any) -> FileEntry:
    _is(json, dict, "file")
    checksum = _is(json["checksum"], str, "checksum")
    if checksum and not checksum.startswith(f"{ALGORITHM}:"):
        raise ValueError(f"checksum {checksum!r} is not of kind {ALGORITHM!r}")
    return FileEntry(check_path(json["path"]), _count(json["size"], "size"), checksum)


def check_path(path: Any) -> str:
    r"""Return a path if it stays within the checkpoint, else raise `ValueError`.

    >>> check_path("state/a.safetensors")
    'state/a.safetensors'
    """
    parts = _is(path, str, "path").split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in path or "\\" in path:
        raise ValueError(f"path {path!r} leads out of the checkpoint")
    return path  # type: ignore[no-any-return]


def _is(value: Any, cls: type, what: str) -> Any:
    return _is_any(value, (cls,), what)


def _is_any(value: Any, classes: tuple[type, ...], what: str) -> Any:
    if type(value) not in classes:
        raise ValueError(f"{what} is {value!r:.60}, not of type {classes[0].__name__}")
    return value


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{what} is {value!r:.60}, not a number of bytes or elements")
    return value
