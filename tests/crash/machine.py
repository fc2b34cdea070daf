"""Where saves are run and ended: a server of child processes, and disks that can lose their power.

The rule: every point is tried. A survey ends a save at its first change, then at its second, and so on until the save
gets through, so that it is complete whatever a save does and however many threads do it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from crash import checks, counter, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Disk", "Folder", "Outcome", "Point", "Server", "started", "survey"]

MANY = 400
"""More changes than a small save may make; a survey that gets here does not end."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: `returned` and `error` are what the save did, if it was not ended before."""

    status: int
    returned: bool | None = None
    error: str = ""
    kinds: tuple[str, ...] = ()
    counted: int = 0

    @property
    def ended(self) -> bool:
        """Whether the process was ended inside the save."""
        return self.returned is None


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run: what was planned for it, how it ended, and the folder that it left."""

    plan: counter.Plan
    outcome: Outcome
    root: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """What one run led to: what is at "2", None for nothing; and before a sweep, what else is there, in bytes."""

    outcome: Outcome
    label: str | None
    left: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """Runs saves of one subject, each in a process of its own."""

    requests: IO[str]
    answers: IO[str]
    subject: str

    def run(self, scenario: str, root: Path, plan: counter.Plan, mount: Path | None = None) -> Outcome:
        """Prepare and act as the scenario says, with the plan from the act on; the root is made."""
        root.mkdir(parents=True)
        # A test that was interrupted may have left an answer behind.
        token = secrets.token_hex(8)
        what = {
            "token": token,
            "subject": self.subject,
            "scenario": scenario,
            "root": str(root),
            "mount": str(mount or root),
        }
        self.requests.write(json.dumps(what | {"plan": dataclasses.asdict(plan)}) + "\n")
        self.requests.flush()
        answer = next(found for line in self.answers if (found := json.loads(line)).pop("token") == token)
        outcome = Outcome(**answer | {"kinds": tuple(answer.get("kinds", ()))})
        expected = -signal.SIGKILL if plan.end_at else 0
        if outcome.status != expected:
            raise RuntimeError(f"the process of {what!r} with {plan!r} ended with {outcome.status}: {outcome.error}")
        return outcome

    def of(self, subject: str) -> Server:
        """Return the same server for another subject."""
        return dataclasses.replace(self, subject=subject)


@contextlib.contextmanager
def started(library: Path) -> Iterator[Server]:
    """Run a server with the library preloaded, for as long as the context lasts."""
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(Path(__file__).with_name("server.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin
        assert process.stdout
        server = Server(process.stdin, process.stdout, "milepost")
        _warm_up(server)
        yield server
        process.stdin.close()


def _warm_up(server: Server) -> None:
    """Let the server import what a save needs, so that its children find it there."""
    with tempfile.TemporaryDirectory() as folder:
        for subject in ("milepost", "toy"):
            server.of(subject).run("overwrite", Path(folder, subject), counter.Plan())


def survey(server: Server, scenario: str, place: Folder | Disk, plan: Callable[[int], counter.Plan]) -> Iterator[Point]:
    """Follow `plan(1)`, `plan(2)`, ... until a save ends before what was planned for it; check after each.

    While one is checked, the next runs: the checks take as long as the saves.
    """
    numbers = itertools.count(1)

    def run() -> Run:
        number = next(numbers)
        planned = plan(number)
        assert planned.last < MANY, "this save never gets through"
        with place.room(number) as (root, mount):
            outcome = server.run(scenario, root, planned, mount)
        return Run(planned, outcome, place.found(number))

    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        running = ahead.submit(run)
        done = False
        while not done:
            current = running.result()
            done = not current.outcome.ended and current.outcome.counted < current.plan.last
            running = running if done else ahead.submit(run)
            yield _check(server, scenario, current)
            shutil.rmtree(current.root)


def _check(server: Server, scenario: str, run: Run) -> Point:
    known = subjects.SCENARIOS[scenario]
    may_be = {None: {known.before, known.after}, True: {known.after}, False: {known.before}}[run.outcome.returned]
    if "OutcomeUnknownError" in run.outcome.kinds:
        may_be = {known.before, known.after}
    try:
        found = checks.check(subjects.SUBJECTS[server.subject], run.root, {"1": {"older"}, "2": may_be})
    except Exception as error:
        error.add_note(f"this was found after {run.plan!r} and {run.outcome!r}")
        raise
    left = [entry for entry in run.root.iterdir() if not found.get(entry.name)]
    return Point(run.outcome, found["2"], {entry.name: _size(entry) for entry in left})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine, whose processes die and whose disk goes on."""

    path: Path

    @contextlib.contextmanager
    def room(self, number: int) -> Iterator[tuple[Path, Path]]:
        """Give a run a root that does not exist, and the place whose power its plan may cut."""
        yield self.path / f"root-{number}", self.path

    def found(self, number: int) -> Path:
        """Return where what the run left can be looked at, and removed."""
        return self.path / f"root-{number}"


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """A file system in a file, fresh for each run, which can lose its power; looked at after it is mounted again."""

    pristine: Path
    path: Path

    @classmethod
    def make(cls, kind: str, path: Path) -> Disk:
        """Make a file system; raises CalledProcessError or FileNotFoundError where this machine cannot."""
        pristine = path / f"pristine.{kind}"
        size, command = {
            "ext4": (24 << 20, ["mkfs.ext4", "-q", "-F", str(pristine)]),
            "xfs": (320 << 20, ["mkfs.xfs", "-q", "-f", str(pristine)]),
        }[kind]
        with pristine.open("wb") as file:
            file.truncate(size)
        _run(command)
        return cls(pristine, path)

    @contextlib.contextmanager
    def room(self, number: int) -> Iterator[tuple[Path, Path]]:
        """Give a run a root that does not exist, and the place whose power its plan may cut."""
        _run(["cp", "--sparse=always", str(self.pristine), str(self._image)])
        with self._mounted() as mount:
            yield mount / "root", mount

    def found(self, number: int) -> Path:
        """Return where what the run left can be looked at, and removed: a copy, made after the journal was replayed."""
        with self._mounted() as mount:
            return shutil.copytree(mount / "root", self.path / f"root-{number}")

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[Path]:
        mount = self.path / "mount"
        mount.mkdir(exist_ok=True)
        _run(["mount", "-o", "loop", str(self._image), str(mount)])
        try:
            yield mount
        finally:
            _run(["umount", str(mount)])

    @property
    def _image(self) -> Path:
        return self.pristine.with_name("image")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
