"""What is saved to stores in these tests, and what a store holds, read without asking milepost.

The rule: what is visible is judged from the bytes in the store: the commit object, the files it lists, and the arrays
in them, unpacked by a reader of the tests' own.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from crash import packed
from crash.subjects import state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milepost.testing.objects import ObjectServer

__all__ = ["BUCKET", "LABELS", "TornError", "holding", "label_of", "leftovers", "restore", "snapshot", "tree"]

BUCKET = "bucket"
LABELS = ("older", "old", "new", "other", "next")


class TornError(AssertionError):
    """What no fault may leave behind was found."""


def tree(label: str) -> dict[str, Any]:
    """Return the tree that goes by this label; no two of them share an array."""
    arrays = state(label)
    return {"model": dict(arrays), "text": label, "step": int(arrays["count"][0]), "empty": []}


def label_of(loaded: Mapping[str, Any]) -> str:
    """Say which tree this is, to the bit."""
    for label in LABELS:
        expected = tree(label)
        if {**loaded, "model": None} == {**expected, "model": None} and _bits(loaded["model"]) == _bits(
            expected["model"]
        ):
            return label
    raise TornError(f"this was never saved: {loaded!r}")


def holding(server: ObjectServer, name: str) -> str | None:
    """Say which tree the checkpoint of a name is by the bytes of the store; None where there is none."""
    prefix = f"{name}/"
    try:
        manifest = json.loads(server.store.get(BUCKET, f"{prefix}commit_success.txt"))
    except KeyError:
        return None
    arrays = {}
    for file in manifest["files"]:
        try:
            data = bytes(server.store.get(BUCKET, prefix + file["path"]))
        except KeyError:
            raise TornError(f"{name!r} lists {file['path']!r}, which is not there") from None
        if len(data) != file["size"]:
            raise TornError(f"{name!r} lists {file['path']!r} with another size than {len(data)}")
        if file["path"].endswith(".safetensors"):
            arrays |= packed.unpack(data)
    for label in LABELS:
        # Names inside a file, and what fills the gaps, are the writer's own business.
        if _bits(state(label)) <= _bits(arrays):
            return label
    raise TornError(f"{name!r} holds arrays that were never saved together: {list(arrays)}")


def snapshot(server: ObjectServer) -> dict[str, bytes]:
    """Return everything that a store holds."""
    return {key: bytes(server.store.get(BUCKET, key)) for key in server.store.keys(BUCKET)}


def restore(server: ObjectServer, objects: Mapping[str, bytes]) -> None:
    """Let a store without faults hold this and nothing else, and have no memory of requests."""
    server.clear_rules()
    server.thaw()
    server.store.clear()
    for key, data in objects.items():
        server.store.put(BUCKET, key, data)
    server.forget()


def leftovers(server: ObjectServer, *names: str) -> list[str]:
    """Return the keys in the store that are no part of these checkpoints as their manifests list them."""
    ours = set()
    for name in names:
        manifest = json.loads(server.store.get(BUCKET, f"{name}/commit_success.txt"))
        attempt = manifest["attempt"]
        ours |= {f"{name}/{file['path']}" for file in manifest["files"]}
        ours |= {f"{name}/commit_success.txt", f"{name}/{attempt}.verdict", f"{name}/{attempt}/begun"}
    return [key for key in server.store.keys(BUCKET) if key not in ours]


def _bits(arrays: Mapping[str, Any]) -> Counter[tuple[str, tuple[int, ...], bytes]]:
    return Counter((str(array.dtype), array.shape, array.tobytes()) for array in arrays.values())
