"""Packages that exist only in a temporary folder, with real metadata: discovery finds them as it finds any other."""

from __future__ import annotations

import importlib
import sys
import textwrap
from typing import TYPE_CHECKING

from milepost.plugins import Plugins

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

STORAGE_CLASS = """
class Lake:
    commit = "create"
    def __init__(self, url, *, region="here", timeout=1):
        self.url, self.region, self.timeout = url, region, timeout
    def read(self, key, start=0, stop=None): return b"from the lake"
    def write(self, key, buffers): pass
    def children(self, prefix): return []
    def delete(self, key): pass
    def size(self, key): return 13
"""
"""A storage that holds the whole protocol and no bytes."""

STRATEGY_CLASS = """
class Strategy:
    needs = ()
    promise = "nothing is promised"
    def stage(self, storage, name, attempt): pass
    def publish(self, storage, staging, manifest, *, overwrite=False): pass
    def abandon(self, storage, staging): pass
    def recover(self, storage, name): pass
    def leftovers(self, storage, *, older_than): pass
    def clear(self, storage, leftover): pass
    def delete(self, storage, name): pass
"""
"""A commit strategy that holds the whole protocol and commits nothing."""

ARRAYS_CLASS = """
class Writer:
    def __init__(self, level=1): pass
    def create(self, location, specs): pass
    def write(self, location, pieces, options): pass
    def read(self, location, records, requests, options): pass
"""
"""An array writer that holds the whole protocol and writes nothing."""

HOOKIMPL = "from milepost.hookspecs import hookimpl\n"

LAKE = f"""
{HOOKIMPL}{STORAGE_CLASS}{STRATEGY_CLASS}{ARRAYS_CLASS}
@hookimpl
def register_storage(register): register("lake", Lake)
@hookimpl
def register_commit(register): register("create", Strategy)
@hookimpl
def register_arrays(register): register("packed", Writer)
"""
"""A module in order: it registers the storage `lake`, the commit strategy `create` and the array writer `packed`."""

LAKE_CLAIMS = {
    "milepost.storage": {"lake": "lake_module"},
    "milepost.commit": {"create": "lake_module"},
    "milepost.arrays": {"packed": "lake_module"},
}


class Site:
    """A folder of installed packages, and the modules in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        distribution: str,
        claims: Mapping[str, Mapping[str, str]],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
    ) -> None:
        """Write a distribution's metadata and modules, as an installer would."""
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [line for group, names in claims.items() for line in (f"[{group}]", *map(" = ".join, names.items()))]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for name, source in (modules or {}).items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def plugins(self, disabled: Iterable[str] | None = None, *others: Site) -> Plugins:
        """Return what discovery finds here and in other folders, and nowhere else."""
        path = sys.path[:]
        sys.path[:] = [str(site.folder) for site in (self, *others)]
        try:
            return Plugins(disabled)
        finally:
            sys.path[:] = path

    def forget(self) -> None:
        """Take this folder's modules out of the interpreter, so that the next test's are imported anew."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{self.folder}/"):
                del sys.modules[name]
