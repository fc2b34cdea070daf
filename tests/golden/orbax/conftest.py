"""What makes the golden checkpoints runs with the releases that they are of, never under pytest."""

from __future__ import annotations

collect_ignore = ["make.py"]
