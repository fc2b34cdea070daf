"""What is put to the test: milepost, and small savers of the test's own, right and wrong, to show what the checks see.

The rule: a subject is four calls, and everything else about crashes is written once, for all of them. Each toy is the
right sequence of system calls with at most one thing left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np
from crash import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

__all__ = ["SCENARIOS", "SUBJECTS", "Milepost", "Scenario", "State", "Subject", "Toy", "state"]

State: TypeAlias = "dict[str, NDArray[Any]]"


@functools.cache
def state(label: str) -> State:
    """Return the arrays that go by this label: of several types, and no two alike."""
    random = np.random.default_rng(zlib.crc32(label.encode()))
    return {
        "weights": random.standard_normal((70, 300), dtype=np.float32),
        "half": random.standard_normal(1000).astype(ml_dtypes.bfloat16),
        "mask": random.integers(0, 2, (3, 70)).astype(np.bool_),
        "count": random.integers(0, 1 << 40, 5),
        "none": np.zeros((0, 4), np.float16),
    }


class Subject(Protocol):
    """A way to save."""

    def save(self, path: Path, arrays: State, *, overwrite: bool = False) -> None:
        """Save under a path; on return it is durable."""
        ...

    def save_async(self, path: Path, arrays: State) -> None:
        """Start to save, and wait until it is durable."""
        ...

    def load(self, path: Path) -> State:
        """Load what was saved; FileNotFoundError where no checkpoint is."""
        ...

    def sweep(self, root: Path) -> None:
        """Remove what dead saves left directly below the root."""
        ...


class Milepost:
    """milepost, through the calls that its users make."""

    def save(self, path: Path, arrays: State, *, overwrite: bool = False) -> None:
        import milepost

        milepost.save(path, _tree(arrays), overwrite=overwrite)

    def save_async(self, path: Path, arrays: State) -> None:
        import milepost

        milepost.save_async(path, _tree(arrays)).result()

    def load(self, path: Path) -> State:
        import milepost

        tree: Any = milepost.load(path)
        arrays: State = tree["model"]
        if tree != {"model": arrays, "text": "kept", "step": int(arrays["count"][0]), "empty": []}:
            raise ValueError(f"what surrounds the arrays is not what was saved: {tree!r}")
        return arrays

    def sweep(self, root: Path) -> None:
        from milepost.engine.sweeping import sweep

        sweep(str(root))


def _tree(arrays: State) -> dict[str, Any]:
    return {"model": arrays, "text": "kept", "step": int(arrays["count"][0]), "empty": []}


@dataclasses.dataclass(frozen=True, slots=True)
class Toy:
    """The right sequence of calls, and what can be done wrong in it."""

    staged: bool = True
    marker_last: bool = True
    exchange: bool = True
    sync_folder: bool = True
    whole_writes: bool = True
    errors_told: bool = True
    sweeps: str = "*.tmp-*"

    def save(self, path: Path, arrays: State, *, overwrite: bool = False) -> None:
        if _committed(path) and not overwrite:
            raise FileExistsError(path)
        folder = path.with_name(f"{path.name}.tmp-{os.getpid()}") if self.staged else path
        folder.mkdir(exist_ok=not self.staged)
        files = {"arrays.safetensors": packed.pack(arrays), "commit_success.txt": json.dumps(sorted(arrays)).encode()}
        for name in sorted(files, reverse=not self.marker_last):
            with contextlib.suppress(*([] if self.errors_told else [OSError])):
                self._write(folder / name, files[name])
        if self.sync_folder:
            _sync(folder)
        if self.staged:
            self._publish(folder, path)
        _sync(path.parent)

    def save_async(self, path: Path, arrays: State) -> None:
        self.save(path, arrays)

    def load(self, path: Path) -> State:
        (path / "commit_success.txt").read_bytes()
        return packed.unpack((path / "arrays.safetensors").read_bytes())

    def sweep(self, root: Path) -> None:
        for left in root.iterdir():
            if left.match(self.sweeps) or not (self.staged or _committed(left)):
                shutil.rmtree(left)

    def _write(self, path: Path, content: bytes) -> None:
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            done = os.write(file, content)
            while self.whole_writes and done < len(content):
                done += os.write(file, content[done:])
            os.fsync(file)
        finally:
            os.close(file)

    def _publish(self, folder: Path, path: Path) -> None:
        if not _committed(path):
            folder.rename(path)
        elif self.exchange:
            _exchange(folder, path)
            _sync(path.parent)  # before the former one goes
            shutil.rmtree(folder)
        else:
            _remove(path)
            folder.rename(path)


def _remove(folder: Path) -> None:
    # One order of all that rmtree might take: which half of a checkpoint goes first is the luck of the directory.
    for file in sorted(folder.iterdir(), reverse=True):
        file.unlink()
    folder.rmdir()


def _committed(path: Path) -> bool:
    return (path / "commit_success.txt").exists()


def _sync(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _exchange(one: Path, other: Path) -> None:
    here, swap = -100, 2
    if ctypes.CDLL(None, use_errno=True).renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
        raise OSError(ctypes.get_errno(), "cannot exchange", str(one), None, str(other))


SUBJECTS: Mapping[str, Subject] = {
    "milepost": Milepost(),
    "toy": Toy(),
    "marker first": Toy(staged=False, marker_last=False),
    "removed before renamed": Toy(exchange=False),
    "folder not synced": Toy(sync_folder=False),
    "short writes believed": Toy(whole_writes=False),
    "errors swallowed": Toy(errors_told=False),
    "sweeps too little": Toy(sweeps="*.old"),
    "sweeps too much": Toy(sweeps="*"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """What was done before, what is ended somewhere, and what "2" holds before it and after it."""

    prepare: Callable[[Subject, str], None]
    act: Callable[[Subject, str], None]
    before: str | None
    after: str | None


def _older(subject: Subject, root: str) -> None:
    subject.save(Path(root, "1"), state("older"))


def _older_and_old(subject: Subject, root: str) -> None:
    _older(subject, root)
    subject.save(Path(root, "2"), state("old"))


def _save(subject: Subject, root: str) -> None:
    subject.save(Path(root, "2"), state("new"))


def _save_deeper(subject: Subject, root: str) -> None:
    deeper = Path(root, "no", "such", "folder")
    subject.save(deeper / "2", state("new"))


def _overwrite(subject: Subject, root: str) -> None:
    subject.save(Path(root, "2"), state("new"), overwrite=True)


def _save_async(subject: Subject, root: str) -> None:
    subject.save_async(Path(root, "2"), state("new"))


SCENARIOS: Mapping[str, Scenario] = {
    "save": Scenario(_older, _save, None, "new"),
    "save_async": Scenario(_older, _save_async, None, "new"),
    "overwrite": Scenario(_older_and_old, _overwrite, "old", "new"),
    "save where no folder is": Scenario(lambda subject, root: None, _save_deeper, None, None),
    "save to a name that is taken": Scenario(_older_and_old, _save, "old", "old"),
}
