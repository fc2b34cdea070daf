"""How steps are named, as v1 spells it: the formats of `milepost.path.step`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.path import step as _step
from milepost.path.step import NameFormat, composite_name_format

if TYPE_CHECKING:
    from milepost.path.step import Metadata

__all__ = ["NameFormat", "composite_name_format", "standard_name_format"]


def standard_name_format(
    *,
    step_prefix: str | None = None,
    step_format_fixed_length: int | None = None,
    single_host_load_and_broadcast: bool = False,
) -> NameFormat[Metadata]:
    """Return the format that names step 23 `23`, or `step_23` with a prefix, or `0023` with a fixed length of 4.

    The arguments are those of `milepost.path.step.standard_name_format`.

    >>> standard_name_format(step_prefix="step").build_name(23)
    'step_23'
    """
    return _step.standard_name_format(
        step_prefix, step_format_fixed_length, single_host_load_and_broadcast=single_host_load_and_broadcast
    )


def __dir__() -> list[str]:
    return list(__all__)
