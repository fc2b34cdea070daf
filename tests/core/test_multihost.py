from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import jax
import pytest
from milepost import multihost, preemption
from milepost.v1 import multihost as v1_multihost

PROGRAM = """
import asyncio, sys
import jax
from milepost import errors, multihost
from milepost.v1 import multihost as v1

index, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, num_processes=2, process_id=index, initialization_timeout=60)
told = []
jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: told.append(name))
assert (multihost.process_index(), multihost.process_count()) == (index, 2)
assert multihost.is_primary_host(0) is (index == 0)
for _ in range(3):
    multihost.sync_global_processes("again", timeout=60, record_event_name="/again")
print("again", told.count("/again"))
asyncio.run(v1.sync_global_processes("key", operation_id="1", timeout=60))
multihost.sync_global_processes("alone", timeout=60, processes=[index])
multihost.sync_global_processes("others", timeout=60, processes=[1 - index])
if index == 0:
    try:
        multihost.sync_global_processes("late", timeout=0.5)
    except errors.DeadlineError as error:
        print(error)
        print(isinstance(error, TimeoutError), bool(error.__notes__), error.__cause__ is not None)
    try:
        asyncio.run(v1.sync_global_processes("later", operation_id="1", timeout=1, processes=[1, 0]))
    except errors.DeadlineError as error:
        print(error)
multihost.sync_global_processes("end", timeout=60)
"""


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_processes_wait_for_each_other_and_tell_who_is_missing(address):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [(each.communicate(timeout=200), each.returncode) for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert [code for _, code in ends] == [0, 0], ends
    assert ends[0][0][0].splitlines() == [
        "again 3",
        "cannot go on after 0.5 s at 'late': missing are of 2 processes: 1",
        "True True True",
        "cannot go on after 1 s at 'later': missing are of 2 processes: 1",
    ]
    assert ends[1][0][0].splitlines() == ["again 3"]


def test_a_single_process_waits_for_nobody():
    multihost.sync_global_processes("alone", timeout=60)
    asyncio.run(v1_multihost.sync_global_processes("alone", operation_id="1", timeout=60))
    assert (multihost.process_index(), multihost.process_count()) == (jax.process_index(), 1)


def test_without_jax_a_process_is_alone():
    program = (
        "import sys\n"
        "from milepost import multihost as m\n"
        "m.sync_global_processes('x')\n"
        "print(m.process_index(), m.process_count(), m.is_primary_host(0), m.is_pathways_backend())\n"
        "print('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["0", "1", "True", "False", "False"]


def test_a_barrier_of_the_caller_s_takes_the_place_of_jax_s():
    asked = []
    multihost.sync_global_processes("here", timeout=2, barrier_sync_fn=lambda **how: asked.append(how))
    assert asked == [{"key": "here", "timeout_ms": 2000}]


def test_every_process_saves_for_itself_where_none_is_primary():
    assert [multihost.is_primary_host(host) for host in (0, 1, None)] == [True, False, True]


def test_a_preemption_notice_is_seen():
    with preemption.listening() as notice:
        assert multihost.reached_preemption(3) is False
        notice.give()
        assert multihost.reached_preemption(3) is True
