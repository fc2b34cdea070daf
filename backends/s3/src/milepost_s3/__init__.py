"""S3 and compatible stores for milepost.

Decides which name this package claims: the URL scheme `s3`. The rule: a checkpoint is written below a prefix of its
own, and appears by one conditional request; so the commit strategy is core's, and all that is here is a storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.hookspecs import hookimpl

from milepost_s3.storage import S3Storage

if TYPE_CHECKING:
    from milepost.hookspecs import RegisterStorage

__all__ = ["S3Storage", "register_storage"]


@hookimpl
def register_storage(register: RegisterStorage) -> None:
    """Offer `s3://`."""
    register("s3", S3Storage)
