"""The layout of Orbax: what it reads of ours, and what we read of its.

Decides nothing; offers the layout by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.hookspecs import hookimpl

if TYPE_CHECKING:
    from milepost.hookspecs import RegisterLayout

__all__ = ["register_layouts"]


@hookimpl
def register_layouts(register: RegisterLayout) -> None:
    """Offer the layout under the name of those who made it."""
    from milepost_tensorstore.orbax.recognising import OrbaxLayout

    register("orbax", OrbaxLayout)
