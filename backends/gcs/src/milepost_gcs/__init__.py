"""Google Cloud Storage for milepost.

Decides which name this package claims: the URL scheme `gs`. The rule: whatever must happen at one instant is one
request with a generation precondition, and no view of the store is kept from one request to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.hookspecs import hookimpl

from milepost_gcs.storage import GcsStorage

if TYPE_CHECKING:
    from milepost.hookspecs import RegisterStorage

__all__ = ["GcsStorage", "register_storage"]


@hookimpl
def register_storage(register: RegisterStorage) -> None:
    """Offer `gs://`."""
    register("gs", GcsStorage)
