"""Decide whether bytes are those that the sender meant: every checksum that the standard library can tell is checked.

The rule: what is told and wrong is refused; what cannot be told here is believed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["crc32c", "md5", "wrong"]


def md5(data: bytes) -> str:
    """Return the digest in hex.

    >>> md5(b"")
    'd41d8cd98f00b204e9800998ecf8427e'
    """
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def crc32c(data: bytes) -> str:
    """Return the checksum in base 64, most significant byte first.

    >>> crc32c(b"123456789")
    '4waSgw=='
    """
    try:
        module: Any = importlib.import_module("google_crc32c")
    except ImportError:
        number = _crc32c(data)
    else:
        number = module.value(data)
    return base64.b64encode(number.to_bytes(4, "big")).decode()


def _crc32c(data: bytes) -> int:
    table = _table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> tuple[int, ...]:
    entries = []
    for entry in range(256):
        crc = entry
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        entries.append(crc)
    return tuple(entries)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


_CHECKS: Mapping[str, Callable[[bytes], str]] = {
    "content-md5": lambda data: _base64(bytes.fromhex(md5(data))),
    "x-amz-checksum-crc32": lambda data: _base64(zlib.crc32(data).to_bytes(4, "big")),
    "x-amz-checksum-crc32c": crc32c,
    "x-amz-checksum-sha1": lambda data: _base64(hashlib.sha1(data, usedforsecurity=False).digest()),
    "x-amz-checksum-sha256": lambda data: _base64(hashlib.sha256(data).digest()),
}


def wrong(data: bytes, headers: Mapping[str, str]) -> str:
    """Return the name of the first header whose checksum is not that of the data, or "".

    >>> told = {"content-md5": "1B2M2Y8AsgTpgAmY7PhCfg=="}
    >>> wrong(b"", told), wrong(b"x", told)
    ('', 'content-md5')
    """
    for name, check in _CHECKS.items():
        if name in headers and headers[name].strip() != check(data):
            return name
    told = headers.get("x-amz-content-sha256", "")
    if len(told) == 2 * hashlib.sha256().digest_size and told != hashlib.sha256(data).hexdigest():
        return "x-amz-content-sha256"
    for each in headers.get("x-goog-hash", "").split(","):
        name, _, value = each.strip().partition("=")
        expected = crc32c(data) if name == "crc32c" else _CHECKS["content-md5"](data) if name == "md5" else value
        if value != expected:
            return f"x-goog-hash {name}"
    return ""
