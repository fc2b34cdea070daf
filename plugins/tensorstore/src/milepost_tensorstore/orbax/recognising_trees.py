"""How a tree of Orbax becomes structure, leaves and shardings of a manifest.

The rule: the tree is what `_METADATA` says, key by key; without that file it is what the names of the arrays say, whose
dots are levels. What a leaf is, is said by its type there; shape and dtype by the document of its array. Containers
are dicts and lists, as they are for Orbax, unless it wrote down their kinds, too. A leaf whose array is not there is
damage, and all such leaves are named in one error.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from milepost.errors import DamagedError, MissingDataError

from milepost_tensorstore.orbax.names import Names
from milepost_tensorstore.orbax.recognising_files import Folder, checked
from milepost_tensorstore.orbax.recognising_rich import Kind, kinds_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from milepost_tensorstore.documents import Document

__all__ = ["GIVEN", "Entry", "Known", "Tree", "entries_by_name", "entries_of", "known_of", "tree_of"]

_METADATA = "_METADATA"
_INDEX = 1
_DEEPEST = 200
_SHOWN = 20

EMPTY: Mapping[str, Any] = {
    "None": None,
    "Dict": {"kind": "dict", "keys": [], "children": []},
    "List": {"kind": "list", "children": []},
    "Tuple": {"kind": "tuple", "children": []},
    "NamedTuple": {"kind": "namedtuple", "type": "", "fields": [], "children": []},
}
"""What stands for a container without leaves, by its type."""

GIVEN = "given"
"""The type of a leaf that is known without an array beside the tree; see `Known.given`."""

_ELSEWHERE = ("string", "placeholder", GIVEN)
"""Types of leaves that have no array."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One leaf, or a container without leaves: the texts of its keys, which of them are indices, and its type."""

    keys: tuple[str, ...]
    indices: tuple[bool, ...]
    kind: str

    @property
    def name(self) -> str:
        """The name of its array."""
        return ".".join(self.keys)

    @property
    def stored(self) -> bool:
        """Whether there must be an array of it."""
        return self.kind not in EMPTY and self.kind not in _ELSEWHERE


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What the files beside the tree say of its leaves, by the names of their arrays; `given` are whole leaves."""

    arrays: Mapping[str, Document]
    shardings: Mapping[str, str]
    key_impls: Mapping[str, str]
    texts: Mapping[str, Any]
    given: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """A tree as a manifest has it; `names` are those of the arrays that differ from what the engine calls them."""

    structure: Any
    leaves: list[dict[str, Any]]
    shardings: list[dict[str, Any]]
    names: dict[str, str]


# --- what is in the tree ---------------------------------------------------------------------------------------------


def entries_of(folder: Folder, metadata: Mapping[str, Any]) -> tuple[list[Entry], Mapping[tuple[str, ...], Kind]]:
    """Return the leaves that `_METADATA` lists, and the kinds of containers, as far as it tells them."""
    where = folder.file(_METADATA)
    tree = checked(metadata.get("tree_metadata"), dict, "'tree_metadata'", where)
    entries = [_entry(text, entry, where) for text, entry in tree.items()]
    rich = metadata.get("value_metadata_tree")
    return entries, {} if rich is None else kinds_of(folder.parsed(_METADATA, checked(rich, str, "tree", where)), where)


def _entry(text: str, entry: Any, where: str) -> Entry:
    try:
        keys, value = entry["key_metadata"], entry["value_metadata"]
        found = Entry(
            tuple(key["key"] for key in keys), tuple(key["key_type"] == _INDEX for key in keys), value["value_type"]
        )
    except (KeyError, TypeError) as error:
        raise DamagedError(f"cannot believe {where!r}: its entry {text!r:.80} is {entry!r:.80}") from error
    if not all(type(key) is str for key in (*found.keys, found.kind)) or len(found.keys) > _DEEPEST:
        raise DamagedError(f"cannot believe {where!r}: its entry {text!r:.80} is {entry!r:.80}")
    return found


def entries_by_name(names: Iterable[str], jax_arrays: Mapping[str, Any]) -> list[Entry]:
    """Return what the names of arrays say of their tree: levels at dots, and no kinds of keys."""
    entries = []
    for name in names:
        keys = tuple(name.split(".")) if name else ()
        entries.append(Entry(keys, (False,) * len(keys), "jax.Array" if name in jax_arrays else "np.ndarray"))
    return entries


def known_of(folder: Folder, arrays: Mapping[str, Document]) -> Known:
    """Read what stands beside the tree: shardings, texts, and which arrays are random keys."""
    where = folder.file("_sharding")
    shardings = {
        _decoded(key, where): checked(text, str, f"entry {key!r:.80}", where)
        for key, text in (folder.read_object("_sharding") or {}).items()
    }
    return Known(arrays, shardings, _key_impls(folder), folder.read_object("_strings.json") or {})


def _decoded(key: str, where: str) -> str:
    try:
        return base64.urlsafe_b64decode(key.encode("ascii")).decode()
    except (binascii.Error, ValueError) as error:
        raise DamagedError(f"cannot believe {where!r}: its key {key!r:.80} is no name in Base64") from error


def _key_impls(folder: Folder) -> dict[str, str]:
    if "array_metadatas/" not in folder.names:
        return {}
    metadatas = folder.folder("array_metadatas")
    found: dict[str, str] = {}
    for name in sorted(name for name in metadatas.names if name.startswith("process_")):
        where = metadatas.file(name)
        entries = checked((metadatas.read_object(name) or {}).get("array_metadatas"), list, "'array_metadatas'", where)
        for entry in entries:
            try:
                one = entry["array_metadata"]
                impl = (one.get("ext_metadata") or {}).get("random_key_impl")
                if impl is not None:
                    found[checked(one["param_name"], str, "name", where)] = checked(impl, str, "kind of keys", where)
            except (KeyError, TypeError, AttributeError) as error:
                raise DamagedError(f"cannot believe {where!r}: it has an entry {entry!r:.80}") from error
    return found


# --- the tree --------------------------------------------------------------------------------------------------------


def tree_of(
    folder: Folder, entries: Sequence[Entry], known: Known, kinds: Mapping[tuple[str, ...], Kind] | None = None
) -> Tree:
    """Build a tree; raises `DamagedError` for one that contradicts itself or lacks something, naming the leaves."""
    _check_all_there(folder, entries, known)
    builder = _Builder(folder, known, kinds or {})
    root = _Node((), index=False)
    for entry in entries:
        builder.place(root, entry)
    structure = builder.build(root, ())
    return Tree(structure, builder.leaves, builder.shardings, builder.names)


def _check_all_there(folder: Folder, entries: Sequence[Entry], known: Known) -> None:
    missing = [entry for entry in entries if entry.stored and entry.name not in known.arrays]
    missing += [entry for entry in entries if entry.kind == "string" and entry.name not in known.texts]
    if missing:
        shown = ", ".join(repr(entry.name) for entry in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise MissingDataError(
            f"cannot read {folder.url!r}: of {len(entries)} leaves {len(missing)} are missing: {shown}{more}"
        )


class _Node:
    """A place in the tree: a leaf once it has an entry, a container once it has children."""

    __slots__ = ("children", "entry", "index", "keys")

    def __init__(self, keys: tuple[str, ...], *, index: bool) -> None:
        self.keys, self.index = keys, index
        self.entry: Entry | None = None
        self.children: dict[str, _Node] = {}


class _Builder:
    def __init__(self, folder: Folder, known: Known, kinds: Mapping[tuple[str, ...], Kind]) -> None:
        self._folder, self._known, self._kinds = folder, known, kinds
        self._names = Names()
        self._numbers: dict[str, int] = {}
        self.leaves: list[dict[str, Any]] = []
        self.shardings: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def place(self, root: _Node, entry: Entry) -> None:
        """Make the place of an entry in the tree."""
        node = root
        for at, (key, index) in enumerate(zip(entry.keys, entry.indices, strict=True)):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(entry.keys[: at + 1], index=index)
            node = child
        if node.entry is not None:
            raise self._wrong(f"leaf {entry.name!r} is in it twice")
        node.entry = entry

    def build(self, node: _Node, path: tuple[str, ...]) -> Any:
        """Return the structure of a place, whose keys the engine knows as `path`; take note of its leaves."""
        if node.entry is not None:
            if node.children:
                raise self._wrong(f"{node.entry.name!r} is a leaf, and there are leaves below it")
            return self._leaf(node.entry, path) if node.entry.kind not in EMPTY else EMPTY[node.entry.kind]
        if not node.children:
            return EMPTY["Dict"]
        indices = {child.index for child in node.children.values()}
        if len(indices) > 1:
            raise self._wrong(f"{'.'.join(node.keys)!r} has both keys and indices")
        return self._sequence(node, path) if indices == {True} else self._mapping(node, path)

    def _sequence(self, node: _Node, path: tuple[str, ...]) -> dict[str, Any]:
        try:
            ordered = sorted(node.children.values(), key=lambda child: int(child.keys[-1]))
        except ValueError as error:
            raise self._wrong(f"{'.'.join(node.keys)!r} has an index that is no number") from error
        kind = self._kinds.get(node.keys)
        children = [self.build(child, (*path, str(at))) for at, child in enumerate(ordered)]
        return {"kind": "tuple" if kind is not None and kind.kind == "tuple" else "list", "children": children}

    def _mapping(self, node: _Node, path: tuple[str, ...]) -> dict[str, Any]:
        kind = self._kinds.get(node.keys)
        if kind is not None and kind.kind == "namedtuple" and set(kind.fields) == node.children.keys():
            children = [self.build(node.children[field], (*path, field)) for field in kind.fields]
            return {"kind": "namedtuple", "type": kind.type, "fields": list(kind.fields), "children": children}
        keys = sorted(node.children)
        return {
            "kind": "dict",
            "keys": keys,
            "children": [self.build(node.children[key], (*path, key)) for key in keys],
        }

    def _leaf(self, entry: Entry, path: tuple[str, ...]) -> str:
        engine, _ = self._names.of(path)
        self.leaves.append(self._described(entry))
        if (entry.stored or entry.kind == GIVEN) and (
            engine.replace("/", ".") != entry.name or "~" in engine or engine == "value"
        ):
            self.names[engine] = entry.name
        return "*"

    def _described(self, entry: Entry) -> dict[str, Any]:
        if entry.kind == "string":
            value = self._known.texts[entry.name]
            where = self._folder.file("_strings.json")
            return {"type": "str", "value": checked(value, str, f"{entry.name!r:.80}", where), "arrays": {}}
        if entry.kind == GIVEN:
            return self._known.given[entry.name]
        if entry.kind == "placeholder":
            return {"type": "placeholder", "arrays": {}}
        array = self._known.arrays[entry.name]
        described: dict[str, Any] = {"shape": list(array.shape), "dtype": array.kind.name, "sharding": None}
        leaf: dict[str, Any] = {"type": "np.ndarray", "arrays": {"": described}}
        if entry.kind == "scalar" and not array.shape:
            leaf["type"] = _number(array.kind.name)
        elif entry.kind == "jax.Array":
            leaf["type"] = "jax.Array"
            described["sharding"] = self._sharding(self._known.shardings.get(entry.name, ""))
            if entry.name in self._known.key_impls:
                leaf["key_impl"] = self._known.key_impls[entry.name]
        return leaf

    def _sharding(self, text: str) -> int:
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = len(self.shardings)
            self.shardings.append(_sharding(self._folder, text))
        return number

    def _wrong(self, what: str) -> DamagedError:
        return DamagedError(f"cannot believe the tree of {self._folder.url!r}: {what}")


def _number(dtype: str) -> str:
    """Return which of Python's numbers an array without axes stands for."""
    if dtype == "bool":
        return "bool"
    if dtype.startswith("complex"):
        return "complex"
    return "int" if dtype.startswith(("int", "uint")) else "float"


# --- shardings -------------------------------------------------------------------------------------------------------

_DEVICES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"TFRT_CPU_(\d+)"), "cpu"),
    (re.compile(r"TPU_(\d+)\(.*\)"), "tpu"),
)
"""What JAX called devices, or still does, when it shows them; a manifest has platform and number."""

_MOST_DEVICES = 1 << 20


def _sharding(folder: Folder, text: str) -> dict[str, Any]:
    """Return a sharding as a manifest has it; where nothing is known of it, one of no kind.

    What is wrong in it matters to nobody but to who looks at it, and to the engine it is no sharding.
    """
    saved = folder.parsed("_sharding", text) if text else {}
    if type(saved) is not dict or type(saved.get("sharding_type")) is not str:
        return {"sharding_type": ""}
    if saved["sharding_type"] == "SingleDeviceSharding" and type(saved.get("device_str")) is str:
        return {**saved, "device_str": _device(saved["device_str"])}
    if saved["sharding_type"] == "NamedSharding" and "device_mesh" not in saved:
        # Older ones tell the shape of the mesh alone, which Orbax fills with all devices in their order.
        return saved | _mesh_of(saved.get("shape"))
    return saved


def _device(text: str) -> str:
    for pattern, platform in _DEVICES:
        found = pattern.fullmatch(text)
        if found is not None:
            return f"{platform}:{found[1]}"
    return text


def _mesh_of(shape: Any) -> dict[str, Any]:
    if type(shape) is not list or not all(type(length) is int and 0 < length <= _MOST_DEVICES for length in shape):
        return {}
    count = math.prod(shape)
    if count > _MOST_DEVICES:
        return {}
    mesh: list[Any] = [{"id": number} for number in range(count)]
    for length in reversed(shape[1:]):
        mesh = [mesh[at : at + length] for at in range(0, len(mesh), length)]
    return {"device_mesh": {"mesh": mesh}}
