"""Which files of a folder make up a model, and the manifest they would have.

Decides where each tensor is taken from: from the file that the index names, without an index from the only file that
has it. The rule: one error names everything that is missing or twice, before any data is read.
"""

from __future__ import annotations

import collections
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import xxhash
from milepost.errors import DamagedError, MissingDataError, UnsupportedLeafError, noted
from milepost.protocols import KeepsFolders

from milepost_safetensors.huggingface.headers import LIMIT, Header, Tensor, header_of, parsed_json
from milepost_safetensors.record import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from milepost.protocols import Storage

__all__ = ["INDEX", "SINGLE", "SUFFIX", "manifest", "recognises"]

SUFFIX = ".safetensors"
SINGLE = f"model{SUFFIX}"
INDEX = f"{SINGLE}.index.json"

_READERS = 8
_SHOWN = 10
_PACKED = "milepost"


def manifest(storage: Storage, prefix: str, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the manifest of the safetensors files below a prefix; None where they are none, or milepost's own.

    Raises `DamagedError` for an index or files that cannot be believed, `UnsupportedLeafError` for tensors that no
    array can hold.
    """
    where = f"{storage.url}/{prefix}"
    index = _index(names, where)
    if index is None and not any(name.endswith(SUFFIX) for name in names):
        return None
    homes = None if index is None else _weight_map(storage, prefix, index)
    files = _files(homes, names, where)
    with ThreadPoolExecutor(min(_READERS, max(1, len(files))), "milepost-headers") as pool:
        headers = list(pool.map(lambda name: header_of(storage, prefix, name), files))
    if any(_PACKED in header.metadata for header in headers):
        return None
    return _document(storage, prefix, _chosen(headers, homes, where), index)


def recognises(storage: Storage, prefix: str, names: Sequence[str]) -> bool:
    """Say whether `manifest` would return one or raise `DamagedError`, as far as one file tells."""
    files = [name for name in names if name.endswith(SUFFIX)]
    if not files:
        return any(name.endswith(f"{SUFFIX}.index.json") for name in names)
    return _PACKED not in header_of(storage, prefix, SINGLE if SINGLE in files else min(files)).metadata


# --- files -----------------------------------------------------------------------------------------------------------


def _index(names: Sequence[str], where: str) -> str | None:
    found = [name for name in names if name.endswith(f"{SUFFIX}.index.json")]
    if SINGLE in names or not found:
        return None
    if INDEX in found or len(found) == 1:
        return INDEX if INDEX in found else found[0]
    raise noted(
        DamagedError(f"cannot tell which model of {where!r} is meant: it has {', '.join(map(repr, found))}"),
        f"put the one that is meant into a folder of its own, or call it {INDEX!r}",
    )


def _weight_map(storage: Storage, prefix: str, index: str) -> dict[str, str]:
    where = f"{storage.url}/{prefix}{index}"
    size = storage.size(prefix + index)
    if size > LIMIT:
        raise DamagedError(f"cannot believe the index {where!r}: it has {size} bytes, more than {LIMIT}")
    document = parsed_json(bytes(storage.read(prefix + index, 0, size)), f"the index {where!r}")
    homes = document.get("weight_map")
    if not isinstance(homes, dict):
        raise DamagedError(f"cannot believe the index {where!r}: it has no weight_map")
    for name, home in homes.items():
        if not isinstance(home, str) or not home.endswith(SUFFIX) or {"/", "\\", "\0"} & {*home}:
            raise DamagedError(f"cannot believe the index {where!r}: tensor {name!r:.80} would be in {home!r:.80}")
    return homes


def _files(homes: Mapping[str, str] | None, names: Sequence[str], where: str) -> list[str]:
    if homes is None:
        return [SINGLE] if SINGLE in names else sorted(name for name in names if name.endswith(SUFFIX))
    missing = sorted({*homes.values()} - {*names})
    if missing:
        lost = [name for name, home in homes.items() if home in missing]
        raise MissingDataError(
            f"cannot read {where!r}: its index names {_listed(missing)}, which it does not have, "
            f"for the tensors {_listed(lost)}"
        )
    return sorted({*homes.values()})


def _chosen(headers: Iterable[Header], homes: Mapping[str, str] | None, where: str) -> list[Header]:
    """Return the headers with those tensors that are taken from each file."""
    headers = list(headers)
    if homes is None:
        counts = collections.Counter(name for header in headers for name in (*header.tensors, *header.strange))
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise noted(
                DamagedError(f"cannot read {where!r}: several files have the tensors {_listed(twice)}, and no index"),
                f"an {INDEX!r} says which file to take them from",
            )
    else:
        there = {(name, header.name) for header in headers for name in (*header.tensors, *header.strange)}
        if lost := [f"{name!r} in {home!r}" for name, home in homes.items() if (name, home) not in there]:
            shown = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
            raise MissingDataError(f"cannot read {where!r}: its index names tensors that are not there: {shown}")
    strange = [
        f"{name!r} of dtype {code!r}"
        for header in headers
        for name, code in header.strange.items()
        if homes is None or homes.get(name) == header.name
    ]
    if strange:
        raise UnsupportedLeafError(
            f"cannot read {where!r}: no array can hold its tensors {', '.join(strange[:_SHOWN])}"
        )
    if homes is None:
        return headers
    return [
        header._replace(tensors={name: one for name, one in header.tensors.items() if homes.get(name) == header.name})
        for header in headers
    ]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


# --- the manifest ----------------------------------------------------------------------------------------------------


def _document(storage: Storage, prefix: str, headers: Sequence[Header], index: str | None) -> dict[str, Any]:
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    keys = sorted(tensors)  # the order of dicts in JAX
    named = dict(zip(keys, _array_names(keys), strict=True))
    changed = _changed(storage, prefix, [header.name for header in headers])
    files = [{"path": header.name, "size": header.size, "checksum": ""} for header in headers]
    if index is not None:
        files.append({"path": index, "size": storage.size(prefix + index), "checksum": ""})
    records = [_file_record(header, named) for header in headers]
    metadata: dict[str, str] = {}
    for header in reversed(headers):
        metadata |= header.metadata
    item = {
        "structure": {"kind": "dict", "keys": keys, "children": ["*"] * len(keys)},
        "leaves": [_leaf(tensors[key]) for key in keys],
        "shardings": [],
        "writer": "huggingface",
        "prefix": "",
        "records": [{"format": FORMAT, "files": records}],
    }
    return {
        "attempt": xxhash.xxh3_64_hexdigest(json.dumps([records, changed]).encode()),
        "init_timestamp_nsecs": changed,
        "commit_timestamp_nsecs": changed,
        "written_by": {},
        "items": {"state": item},
        "files": files,
        "custom_metadata": metadata or None,
        "metrics": None,
        "version": 1,
    }


def _leaf(tensor: Tensor) -> dict[str, Any]:
    array = {"shape": list(tensor.shape), "dtype": tensor.dtype, "sharding": None}
    return {"type": "np.ndarray", "arrays": {"": array}}


def _file_record(header: Header, named: Mapping[str, str]) -> dict[str, Any]:
    rows = [[named[name], one.dtype, list(one.shape), one.offset, ""] for name, one in header.tensors.items()]
    return {"name": header.name, "size": header.size, "data": header.data, "pieces": rows}


def _array_names(keys: Iterable[str]) -> list[str]:
    """Return the name that each key of a flat tree has among the arrays of a checkpoint."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for key in keys:
        name = key.replace("~", "~0").replace("/", "~1") or "value"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}~{seen[name]}")
    return names


def _changed(storage: Storage, prefix: str, names: Iterable[str]) -> int:
    """Return when the last of the files was written, in nanoseconds since the epoch; 0 where that cannot be told."""
    if not isinstance(storage, KeepsFolders):
        return 0
    folder = storage.folder(prefix)
    try:
        return max((folder.joinpath(name).stat().st_mtime_ns for name in names), default=0)
    except OSError:
        return 0
