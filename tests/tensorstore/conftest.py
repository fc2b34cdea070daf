"""Programs that the tests run in processes of their own, which no doctest is looked for in."""

from __future__ import annotations

collect_ignore = ["orbax_on_gs.py", "orbax_reads.py", "we_read.py"]
