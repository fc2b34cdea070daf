"""Checkpoints for JAX that work the same, and as safely, on a laptop disk and on object storage.

import milepost

milepost.save("checkpoints/1", state)
state = milepost.load("checkpoints/1")
"""

from __future__ import annotations

from milepost import errors, metadata, v1
from milepost.config import configured
from milepost.v1 import PLACEHOLDER, load, load_async, save, save_async

__all__ = [
    "PLACEHOLDER",
    "__version__",
    "configured",
    "errors",
    "load",
    "load_async",
    "metadata",
    "save",
    "save_async",
    "v1",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return list(__all__)
