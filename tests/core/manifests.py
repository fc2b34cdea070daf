"""Manifests rewritten by hand, and signed by the documented rule, without the code under test."""

from __future__ import annotations

import copy
import json

import xxhash

GONE = object()


def read(checkpoint):
    return json.loads((checkpoint / "commit_success.txt").read_bytes())


def signed(document):
    """Return the body of a commit object whose checksum is right, whatever it says."""
    document = {key: value for key, value in document.items() if key != "checksum"}
    body = json.dumps(document, separators=(",", ":")).encode("ascii")[:-1]
    return body + f',"checksum":"xxh3_64:{xxhash.xxh3_64_hexdigest(body)}"}}'.encode()


def write(checkpoint, document):
    (checkpoint / "commit_success.txt").write_bytes(signed(document))


def sites(node, path=()):
    """Yield the path of every value in a document."""
    if path:
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from sites(value, (*path, key))


def changed(document, path, value):
    """Return the document with one value replaced, or removed."""
    result = copy.deepcopy(document)
    at = result
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return result
