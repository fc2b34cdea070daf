"""Who is compared, and how each is used: as its documentation says, with its defaults.

The rule: every library gets the same state and the same target (shapes, dtypes, shardings) and hands back
`jax.Array`s in the same tree. "Raw" is the limit: the same bytes, in memory already, written to one file and synced by
one thread, and read back into fresh memory; it makes no tree, no arrays and no checksums.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Protocol

import workloads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Load = Callable[[Path, Any], Any]

__all__ = [
    "LIBRARIES",
    "Library",
    "Milepost",
    "MilepostSync",
    "MilepostTensorstore",
    "MilepostZarr",
    "Orbax",
    "OrbaxUncompressed",
    "Raw",
    "Safetensors",
    "ZarrPython",
]

SMALL = 1 << 16


class Library(Protocol):
    """One way to save and load."""

    name: str

    def prepare(self, state: Any) -> Any:
        """Do what is not part of saving, untimed."""
        ...

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Save; return as soon as the caller may go on, with what to call to wait until the data is durable."""
        ...

    def loads(self) -> Mapping[str, Load]:
        """Return the ways to load, by name; each takes the path and the target."""
        ...


class Raw:
    """The same bytes through `write` and `fsync`, and through `readinto`."""

    name = "raw"

    def prepare(self, state: Any) -> list[memoryview]:
        """Return the bytes in few buffers: small ones joined, large ones as they are."""
        import numpy as np

        views = list(workloads.host_views(state))
        buffers: list[Any] = [view for view in views if view.nbytes >= SMALL]
        if len(buffers) < len(views):
            buffers.append(np.concatenate([view for view in views if view.nbytes < SMALL]))
        return [memoryview(buffer) for buffer in buffers]

    def save(self, path: Path, state: list[memoryview]) -> Callable[[], object]:
        """Write the buffers, then leave the sync to the caller."""
        path.mkdir()
        handle = os.open(path / "data", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for buffer in state:
            done = 0
            while done < len(buffer):
                done += os.write(handle, buffer[done:])
        (path / "sizes").write_text(" ".join(str(len(buffer)) for buffer in state), encoding="ascii")

        def sync() -> None:
            os.fsync(handle)
            os.close(handle)

        return sync

    def loads(self) -> Mapping[str, Load]:
        """Read into fresh, uninitialised memory."""
        return {"load": self._read}

    @staticmethod
    def _read(path: Path, target: Any) -> list[Any]:
        import numpy as np

        del target
        sizes = [int(size) for size in (path / "sizes").read_text(encoding="ascii").split()]
        result: list[Any] = [np.empty(size, np.uint8) for size in sizes]
        with (path / "data").open("rb", buffering=0) as file:
            for array in result:
                view, done = memoryview(array), 0
                while done < len(view):
                    done += file.readinto(view[done:])
        return result


class Orbax:
    """Orbax's StandardCheckpointer with its defaults."""

    name = "orbax"

    def __init__(self) -> None:
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]  # it ships no types

        self._checkpointer: Any = ocp.StandardCheckpointer()

    def prepare(self, state: Any) -> Any:
        """Take the state as it is."""
        return state

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Save in the background, as it does by default."""
        self._checkpointer.save(path, state)
        wait: Callable[[], object] = self._checkpointer.wait_until_finished
        return wait

    def loads(self) -> Mapping[str, Load]:
        """Restore to the target."""
        return {"load": self._checkpointer.restore}


class OrbaxUncompressed:
    """Orbax without compression, the fastest of its options in these workloads."""

    name = "orbax uncompressed"

    def __init__(self) -> None:
        import orbax.checkpoint as ocp

        self._ocp: Any = ocp
        self._checkpointer: Any = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def prepare(self, state: Any) -> Any:
        """Take the state as it is."""
        return state

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Save in the background."""
        self._checkpointer.save(path, args=self._ocp.args.PyTreeSave(state))
        wait: Callable[[], object] = self._checkpointer.wait_until_finished
        return wait

    def loads(self) -> Mapping[str, Load]:
        """Restore to the target."""
        return {"load": self._load}

    def _load(self, path: Path, target: Any) -> Any:
        restore_args = self._ocp.checkpoint_utils.construct_restore_args(target)
        args = self._ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        return self._checkpointer.restore(path, args=args)


class ZarrPython:
    """zarr-python, one array for each leaf, without compression; it does not sync, so a sync is added."""

    name = "zarr"

    def prepare(self, state: Any) -> Any:
        """Take the state as it is."""
        return state

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Write array by array; what is left to wait for is the sync."""
        import jax
        import numpy as np
        import zarr

        group = zarr.create_group(path, zarr_format=3)
        for key, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            group.create_array(_zarr_name(key), data=np.asarray(leaf), compressors=None, chunks=leaf.shape)
        return os.sync

    def loads(self) -> Mapping[str, Load]:
        """Load array by array, then put it on the devices."""
        return {"load": self._load}

    @staticmethod
    def _load(path: Path, target: Any) -> Any:
        import jax
        import zarr

        group = zarr.open_group(path, mode="r")
        leaves, structure = jax.tree_util.tree_flatten_with_path(target)
        values = [group[_zarr_name(key)][...] for key, _ in leaves]
        return jax.tree.unflatten(structure, jax.device_put(values, [leaf.sharding for _, leaf in leaves]))


def _zarr_name(key: Any) -> str:
    import jax

    return str(jax.tree_util.keystr(key, simple=True, separator="."))


class Safetensors:
    """`safetensors.numpy`, flattened by hand; it does not sync, so a sync is added to be comparable."""

    name = "safetensors"

    def prepare(self, state: Any) -> Any:
        """Take the state as it is."""
        return state

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Flatten and save; what is left to wait for is the sync."""
        import jax
        import numpy as np
        from safetensors.numpy import save_file

        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        path.mkdir()
        save_file({jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}, path / "data")

        def sync() -> None:
            with (path / "data").open("rb") as file:
                os.fsync(file.fileno())

        return sync

    def loads(self) -> Mapping[str, Load]:
        """Load everything, then put it on the devices."""
        return {"load": self._load}

    @staticmethod
    def _load(path: Path, target: Any) -> Any:
        import jax
        from safetensors.numpy import load_file

        arrays = load_file(path / "data")
        leaves, structure = jax.tree_util.tree_flatten_with_path(target)
        values = [arrays[jax.tree_util.keystr(key)] for key, _ in leaves]
        return jax.tree.unflatten(structure, jax.device_put(values, [leaf.sharding for _, leaf in leaves]))


class Milepost:
    """milepost with its defaults: saved in the background, checksums written, everything synced."""

    name = "milepost"

    def prepare(self, state: Any) -> Any:
        """Take the state as it is."""
        return state

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Save in the background."""
        import milepost

        response = milepost.save_async(path, state)
        wait: Callable[[], object] = response.result
        return wait

    def loads(self) -> Mapping[str, Load]:
        """Load verified, the default; without checksums; and mapped, without checksums, which reads nothing yet."""
        return {
            "load": self._load,
            "load unverified": lambda path, target: self._configured(path, target, verify=False),
            "load mapped": lambda path, target: self._configured(path, target, verify=False, mapped=True),
        }

    @staticmethod
    def _load(path: Path, target: Any) -> Any:
        import milepost

        return milepost.load(path, target)

    @staticmethod
    def _configured(path: Path, target: Any, **settings: Any) -> Any:
        import milepost

        with contextlib.ExitStack() as stack:
            stack.enter_context(milepost.configured({"default": settings}))
            return milepost.load(path, target)


class MilepostSync(Milepost):
    """milepost, saved in the foreground."""

    name = "milepost sync"

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Save and wait; nothing is left to wait for."""
        import milepost

        milepost.save(path, state)
        return lambda: None

    def loads(self) -> Mapping[str, Load]:
        """Load nothing: the files are the same."""
        return {}


class _OtherWriter(Milepost):
    """milepost with another array writer, with that one's defaults."""

    writer = ""

    def save(self, path: Path, state: Any) -> Callable[[], object]:
        """Save in the background."""
        import milepost

        with milepost.configured({"default": {"arrays": self.writer}}):
            response = milepost.save_async(path, state)
        wait: Callable[[], object] = response.result
        return wait

    def loads(self) -> Mapping[str, Load]:
        """Load verified, the default."""
        return {"load": self._load}


class MilepostTensorstore(_OtherWriter):
    """milepost in the format of Orbax."""

    name = "milepost tensorstore"
    writer = "tensorstore"


class MilepostZarr(_OtherWriter):
    """milepost as plain Zarr."""

    name = "milepost zarr"
    writer = "zarr"


LIBRARIES: dict[str, Callable[[], Library]] = {
    library.name: library
    for library in (
        Raw,
        Orbax,
        OrbaxUncompressed,
        Safetensors,
        ZarrPython,
        Milepost,
        MilepostSync,
        MilepostTensorstore,
        MilepostZarr,
    )
}
"""All libraries by name."""
