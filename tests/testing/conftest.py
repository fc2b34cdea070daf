"""Our server, and moto beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from milepost.testing.objects import ObjectServer
from testing.moto_server import moto

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["moto", "server"]


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    """Return an empty store."""
    with ObjectServer() as server:
        yield server
