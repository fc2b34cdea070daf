"""Processes that save to a store and may be killed by it: one that has everything imported forks one for each act.

The rule: the parent never saves anything itself, so that it has no threads and every child starts from the same state.
A child waits until it is told to go, so that whoever is to kill it can learn its number first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Actors", "Outcome", "started"]

PATIENCE = 60
"""Seconds after which an act that does not end is a failure, with the stacks of its threads on stderr."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How an act ended: what its process returned, and the classes of the error that it raised, if any."""

    status: int
    kinds: tuple[str, ...] = ()
    error: str = ""


class Actors:
    """Children that wait to be told to go; used by one thread."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests = requests
        self._answers = answers

    def hire(self, act: str, env: Mapping[str, str], **words: Any) -> int:
        """Make a process that will do something; return its number."""
        return int(self._ask({"hire": act, "env": dict(env), "words": words}))

    def go(self, *pids: int) -> list[Outcome]:
        """Let processes run, all at once; return how each ended."""
        return [Outcome(one["status"], tuple(one["kinds"]), one["error"]) for one in self._ask({"go": pids})]

    def do(self, act: str, env: Mapping[str, str], **words: Any) -> Outcome:
        """Let a process of its own do something."""
        (outcome,) = self.go(self.hire(act, env, **words))
        return outcome

    def _ask(self, request: dict[str, Any]) -> Any:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the process that makes actors has ended; see above")
        return json.loads(line)


@contextlib.contextmanager
def started() -> Iterator[Actors]:
    """Run the process that makes actors, for as long as the context lasts."""
    tests = str(Path(__file__).parent.parent)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env) as process:
        assert process.stdin
        assert process.stdout
        yield Actors(process.stdin, process.stdout)
        process.stdin.close()


# --- in the process that makes actors --------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Child:
    pid: int
    start: int
    told: int


def _main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what a child prints must not look like an answer
    children: dict[int, _Child] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "hire" in request:
            child = _fork(request, [one.start for one in children.values()])
            children[child.pid] = child
            answer: Any = child.pid
        else:
            chosen = [children.pop(pid) for pid in request["go"]]
            for child in chosen:
                os.close(child.start)
            answer = [_wait(child) for child in chosen]
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _fork(request: dict[str, Any], others: list[int]) -> _Child:
    waiting, start = os.pipe()
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor in (start, told, *others):
            os.close(descriptor)
        _child(request, waiting, telling)
    os.close(waiting)
    os.close(telling)
    return _Child(pid, start, told)


def _wait(child: _Child) -> dict[str, Any]:
    with os.fdopen(child.told, "rb") as pipe:
        told = json.loads(pipe.read() or b"{}")
    _, status = os.waitpid(child.pid, 0)  # nobody may take a dead writer for one that runs
    for module in told.pop("modules", ()):
        # What cannot be imported alone is imported by each child again, which costs time and nothing else.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    return {"kinds": [], "error": "", **told, "status": os.waitstatus_to_exitcode(status)}


def _child(request: dict[str, Any], waiting: int, telling: int) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    before = set(sys.modules)
    told: dict[str, Any] = {}
    try:
        os.read(waiting, 1)
        os.environ.update(request["env"])
        try:
            _ACTS[request["hire"]](**request["words"])
        except Exception as error:  # noqa: BLE001 - the outcome is what the act is for
            told = {"kinds": [kind.__name__ for kind in type(error).__mro__]}
            told["error"] = "".join(traceback.format_exception(error))
        # In the order in which they came: some, imported before what imports them, end up in halves.
        told["modules"] = [name for name in sys.modules if name not in before]
        os.write(telling, json.dumps(told).encode())
    finally:
        os._exit(0)


def _save(url: str, label: str, *, overwrite: bool = False) -> None:
    import milepost
    from wire.states import tree

    milepost.save(url, tree(label), overwrite=overwrite)


def _delete(url: str) -> None:
    from milepost.engine.deleting import delete

    delete(url)


def _sweep(url: str, older_than: float) -> None:
    from milepost.engine.sweeping import sweep

    sweep(url, older_than=older_than)


_ACTS = {"save": _save, "delete": _delete, "sweep": _sweep}


if __name__ == "__main__":
    _main()
