"""Make the golden checkpoints of the format this version writes: `python tests/golden/make.py`, once for a format.

Those of a released format are never made anew.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    platform.node = lambda: "golden"
    sys.path.insert(0, str(HERE.parent))
    import milepost
    from golden.state import METADATA, state
    from milepost.manifest import VERSION

    for commit in ("rename", "create"):
        with milepost.configured({"default": {"commit": commit}}):
            milepost.save(HERE / f"v{VERSION}" / commit, state(), custom_metadata=METADATA)


if __name__ == "__main__":
    main()
