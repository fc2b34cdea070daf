"""A process that has everything imported and forks one child for each run of a save that is to be ended somewhere.

The rule: it never saves anything itself, so that it has no threads and every child starts from the same state. It
speaks JSON, one line for a run and one for its outcome.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from crash import counter, subjects

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

PATIENCE = 60
"""Seconds after which a run that does not end is a failure, with the stacks of its threads on stderr."""


def main() -> None:
    """Serve until stdin ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a child prints must not look like an answer
    for line in sys.stdin:
        run = json.loads(line)
        answer = _fork(run) | {"token": run["token"]}
        for module in answer.pop("modules", ()):
            _preload(module)
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _fork(run: dict[str, Any]) -> dict[str, Any]:
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        _child(run, lambda told: os.write(sink, json.dumps(told).encode()))
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)  # nobody may take a dead writer for one that runs
    return {"status": os.waitstatus_to_exitcode(status), **(json.loads(told) if told else {})}


def _child(run: dict[str, Any], tell: Callable[[dict[str, Any]], object]) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    before = set(sys.modules)
    subject = subjects.SUBJECTS[run["subject"]]
    scenario = subjects.SCENARIOS[run["scenario"]]
    plan = counter.Plan(**run["plan"])
    try:
        scenario.prepare(subject, run["root"])
        counter.arm(plan, run["root"], run["mount"])
        told = _act(lambda: scenario.act(subject, run["root"]))
        told["counted"] = counter.disarm()
        tell(told | {"modules": sorted(set(sys.modules) - before)})
        if plan.end_at:
            counter.end()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a child must never return into the loop of the server
        traceback.print_exc()
        os._exit(99)


def _act(act: Callable[[], None]) -> dict[str, Any]:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - the outcome is what the run is for
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"returned": False, "error": "".join(traceback.format_exception(error)), "kinds": kinds}
    return {"returned": True}


def _preload(module: str) -> None:
    # What cannot be imported alone is imported by each child again, which costs time and nothing else.
    with contextlib.suppress(ImportError):
        importlib.import_module(module)


if __name__ == "__main__":
    main()
