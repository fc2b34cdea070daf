"""A server of objects for tests: one store that refuses what it must, spoken to as S3 and as Google Cloud Storage.

The rule: whoever writes a backend for an object store tests it against something that keeps its word, and that breaks
exactly where a test says. The store is linearizable; conditions, uploads and checksums are those of the real ones.

```python
@pytest.fixture
def server():
    with ObjectServer(buckets=("bucket",)) as server:
        yield server
```
"""

from __future__ import annotations

from milepost.testing.objects.rules import Request, Rule
from milepost.testing.objects.server import ObjectServer
from milepost.testing.objects.store import Store
from milepost.testing.objects.values import Condition, RefusedError, Stored, Upload, Window

__all__ = ["Condition", "ObjectServer", "RefusedError", "Request", "Rule", "Store", "Stored", "Upload", "Window"]
