"""One driver at a time in a bucket."""

import json
import subprocess
import sys
import threading

import pytest

from rayalign.errors import ConfigError
from rayalign.storage import lease
from rayalign.storage.lease import DRIVERS, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    monkeypatch.setattr(lease, "LEASE_S", 3.0)
    monkeypatch.setattr(lease, "POLL_S", 0.1)


def left_by(bucket, **facts):
    """A turn whose holder is silent from now on."""
    there = {"host": "elsewhere", "machine": "elsewhere", "pid": 1, "started": "1", "beats": 1, "ended": False}
    bucket.put(f"{DRIVERS}/000001-gone", json.dumps(there | facts).encode())


def test_a_second_driver_is_refused_while_the_first_one_lives(bucket):
    first = Lease.take(bucket)
    with pytest.raises(ConfigError, match="is being run by process"):
        Lease.take(bucket)
    first.release()
    second = Lease.take(bucket)
    assert second.turn > first.turn
    second.release()


def test_a_dead_driver_of_this_machine_is_not_waited_for(bucket, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 1e6)
    code = f"""
import os
from rayalign.storage.lease import Lease
from rayalign.storage.objects import Bucket
Lease.take(Bucket({str(bucket.uri)!r}))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 9
    Lease.take(bucket).release()


def test_a_driver_elsewhere_is_dead_after_it_was_silent_for_a_while(bucket):
    left_by(bucket)
    Lease.take(bucket).release()


def test_one_whose_last_word_is_long_ago_is_not_waited_for(bucket, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 1e6)
    monkeypatch.setattr(lease, "CERTAINLY_OVER_S", -1e6)
    left_by(bucket)
    Lease.take(bucket).release()


def test_of_drivers_that_come_at_the_same_moment_no_two_go_on_unaware(bucket):
    found, together = [], threading.Barrier(4)

    def come():
        together.wait()
        try:
            found.append(Lease.take(bucket))
        except ConfigError as error:
            assert "another driver" in str(error) or "is being run" in str(error)

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.is_last() for one in found) <= 1
    assert len({one.turn for one in found}) == len(found)
    for one in found:
        one.release()
