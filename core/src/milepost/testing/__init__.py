"""Contracts that a storage or a commit strategy of anybody has to meet, as test classes, and the faults they need.

The rule: the whole test of a backend is a subclass and a fixture.

```python
from milepost.testing.storage import StorageContract

class TestShelf(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path):
        return ShelfStorage(f"shelf://{tmp_path}")
```
"""

from __future__ import annotations

import contextlib

__all__: list[str] = []

# The server for tests is of use to whoever has no pytest.
with contextlib.suppress(ImportError):
    import pytest

    # A failing `assert` of a contract shows its values, as those in the test files do; pytest has to know beforehand.
    pytest.register_assert_rewrite("milepost.testing.storage", "milepost.testing.commit")
