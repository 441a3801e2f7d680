"""The gate: batch b may be generated with version v only if b - v <= max_staleness."""

import threading
import time

import pytest
import torch

from rayalign.errors import RayalignError, WaitError
from rayalign.loop.staleness import Window
from rayalign.rollout.weights import pack


def weights(version):
    return pack(version, {"w": torch.full((1,), float(version))})


def test_the_initial_policy_needs_no_publishing():
    assert Window().wait_for_version(0, timeout_s=0.0) == 0


def test_the_gate_stays_shut_until_the_version_is_published():
    window, passed = Window(), []
    thread = threading.Thread(target=lambda: passed.append(window.wait_for_version(2, timeout_s=5.0)))
    thread.start()
    window.publish(weights(1))
    time.sleep(0.05)
    assert passed == []
    window.publish(weights(2))
    thread.join(timeout=5.0)
    assert passed == [2]


def test_a_wait_that_is_too_long_says_what_was_waited_for():
    with pytest.raises(WaitError, match=r"weights version 3; the newest is 0.*loop\.gate_timeout_s"):
        Window().wait_for_version(3, timeout_s=0.01)


def test_a_learner_that_goes_on_is_waited_for_however_far_behind_it_is():
    window, passed = Window(), []
    thread = threading.Thread(target=lambda: passed.append(window.wait_for_version(8, timeout_s=2.0)))
    thread.start()
    for version in range(1, 9):
        time.sleep(0.4)  # 3.2 s in all
        window.publish(weights(version))
    thread.join(timeout=5.0)
    assert passed == [8]


def test_the_initial_policy_may_be_published():
    window = Window()
    window.publish(weights(0))
    assert window.published == 0 and window.weights.version == 0


def test_an_older_version_from_a_restarted_learner_changes_nothing():
    window = Window()
    window.publish(weights(5))
    window.publish(weights(3))
    assert window.published == 5 and window.weights.version == 5


def test_a_batch_is_there_only_after_it_was_added_and_never_after_the_end():
    window = Window()
    assert window.wait_for_batch(0, timeout_s=0.01) is None
    window.extend(1)
    assert window.wait_for_batch(0, timeout_s=0.01) is True
    window.finish(end=1)
    assert window.wait_for_batch(1, timeout_s=0.01) is False


def test_later_epochs_are_known_once_the_end_is_known():
    window = Window()
    window.extend(1)
    assert window.wait_for_batch(1, timeout_s=0.01) is None
    window.finish(end=3)
    assert [window.wait_for_batch(i, timeout_s=0.01) for i in range(4)] == [True, True, True, False]


def test_a_failure_wakes_both_sides():
    window, seen = Window(), []
    thread = threading.Thread(target=lambda: seen.append(window.wait_for_batch(0, timeout_s=5.0)))
    thread.start()
    window.fail(RayalignError("the oracle is gone"))
    thread.join(timeout=5.0)
    assert seen == [False]
    with pytest.raises(RayalignError, match="the oracle is gone"):
        window.wait_for_version(0, timeout_s=1.0)
