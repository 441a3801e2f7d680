"""What the collector says of itself while it is still on its way."""

import threading

import pytest

from rayalign.loop.collector import Collector
from rayalign.runs.config import RunConfig


@pytest.fixture
def starting(monkeypatch, tmp_path):
    """A collector that has nothing of what its run needs yet."""
    release = threading.Event()
    monkeypatch.setattr(Collector, "_recover", lambda self: release.wait(60))
    collector = Collector(RunConfig(run_dir=str(tmp_path)), None, None, None, None)
    yield collector
    collector._stop.set()
    release.set()
    collector._thread.join(60)
    collector.close()


def test_a_collector_that_is_still_starting_has_a_status(starting):
    status = starting.status()
    assert (status["phase"], status["labels"], status["streamed"], status["error"]) == ("starting", 0, 0, None)
