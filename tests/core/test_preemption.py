"""Whether a process learns in time that it is about to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from milepost import preemption
from milepost.errors import RequestError


def test_a_signal_raises_the_flag_and_does_not_end_the_process():
    with preemption.listening([signal.SIGUSR1]) as notice:
        assert not notice.given()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert notice.wait(timeout=60)
        assert preemption.preempted()
        assert preemption.reached_sync_point(3)
    assert not preemption.preempted()


def test_the_handler_of_before_is_back_afterwards():
    seen: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with preemption.listening([signal.SIGUSR1]):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_a_second_signal_meets_the_handler_of_before():
    code = (
        "import os, signal\n"
        "from milepost import preemption\n"
        "with preemption.listening() as notice:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert notice.wait(60)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    threading.Event().wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", f"import threading\n{code}"], check=False, timeout=120)
    assert done.returncode == -signal.SIGTERM


def test_a_process_that_does_not_listen_is_ended_as_ever():
    code = "import os, signal\nfrom milepost import preemption\nos.kill(os.getpid(), signal.SIGTERM)\n"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == -signal.SIGTERM


def test_the_flag_can_be_looked_at_from_any_thread():
    with preemption.listening([signal.SIGUSR1]) as notice:
        notice.give()
        answers: list[bool] = []
        looking = threading.Thread(target=lambda: answers.append(preemption.preempted()))
        looking.start()
        looking.join()
        assert answers == [True]


def test_listening_on_another_thread_is_refused_with_the_reason():
    errors: list[RequestError] = []

    def listen():
        try:
            with preemption.listening():
                pass
        except RequestError as error:
            errors.append(error)

    other = threading.Thread(target=listen)
    other.start()
    other.join()
    assert "main thread" in str(errors[0])


def test_without_a_notice_nothing_is_reached():
    assert not preemption.preempted()
    assert not preemption.reached_sync_point(1)
    with pytest.raises(TypeError):
        preemption.reached_sync_point()  # type: ignore[call-arg]
