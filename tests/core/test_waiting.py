"""How an evaluation waits for the checkpoints of a training."""

from __future__ import annotations

import threading

import milepost
import numpy as np
from milepost.checkpoint_utils import checkpoints_iterator, wait_for_new_checkpoint


def save(root, step):
    milepost.save(root / str(step), {"a": np.arange(step)})


def test_each_new_newest_step_is_given_once(tmp_path):
    save(tmp_path, 1)
    steps = checkpoints_iterator(tmp_path, seconds_to_sleep=0, timeout=0)
    assert next(steps) == 1
    save(tmp_path, 2)
    save(tmp_path, 5)
    assert list(steps) == [5]


def test_the_iterator_ends_when_the_function_says_so_and_looks_again_before(tmp_path):
    asked = []

    def end():
        asked.append(len(asked))
        if len(asked) == 2:
            save(tmp_path, 3)
        return len(asked) > 3

    assert list(checkpoints_iterator(tmp_path, seconds_to_sleep=0, timeout=0, timeout_fn=end)) == [3]
    assert asked == [0, 1, 2, 3]


def test_a_wait_ends_when_another_thread_commits_the_step(tmp_path):
    save(tmp_path, 1)
    waiting = threading.Event()

    def train():
        waiting.wait()
        save(tmp_path, 2)

    training = threading.Thread(target=train)
    training.start()
    waiting.set()
    with wait_for_new_checkpoint(tmp_path, until_step=2, seconds_to_sleep=0, timeout=60) as step:
        assert step == 2
    training.join()


def test_nothing_in_time_is_minus_one(tmp_path):
    with wait_for_new_checkpoint(tmp_path, seconds_to_sleep=0, timeout=0) as step:
        assert step == -1


def test_what_is_not_committed_is_not_waited_for(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp-0").mkdir()
    with wait_for_new_checkpoint(tmp_path, seconds_to_sleep=0, timeout=0) as step:
        assert step == -1


def test_step_names_of_another_form_are_found(tmp_path):
    milepost.save(tmp_path / "ckpt_0004", {"a": 1})
    steps = checkpoints_iterator(
        tmp_path, seconds_to_sleep=0, timeout=0, step_prefix="ckpt", step_format_fixed_length=4
    )
    assert list(steps) == [4]
