"""Whole runs on the smallest world there is: settings, what a run bought, and the means to hurt one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from rayalign.errors import LedgerError
from rayalign.ledger.ledger import Ledger

SMALL = {
    "loop.batch_size": 4,
    "agent.pair_sampling": "keep",  # with few arms, pairs of distinct ones would leave most batches half empty
    "rollout.engine": "transformers",
    "rollout.num_replicas": 0,
    "rollout.max_tokens": 3,
    "rollout.temperature": 1.0,
    "learner.learning_rate": 1e-2,
    "learner.checkpoint_every": 3,
    "evaluation.num_prompts": 4,
    "evaluation.every": 16,
    "evaluation.against": "initial",
    "logging.progress": "off",
    "logging.report": False,
}
"""Settings that make a run of the tabular world last seconds. The engine is inside the collector: a process less."""
WITH_ENGINE = SMALL | {"rollout.num_replicas": 1}
"""The same with the engine in an actor of its own, where that matters."""


def contents(run_dir: Path) -> list[tuple]:
    """What a run bought, without times: the part of a ledger that equal seeds make equal."""
    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    return [
        (p.duel.id, p.duel.batch, p.duel.first.token_ids, p.duel.second.token_ids, p.duel.first.policy_version, p.label)
        for p in ledger.preferences()
    ]


def spent(path: Path) -> int:
    """Labels in a ledger that may not be there yet."""
    try:
        return Ledger(path, read_only=True).spent if path.exists() else 0
    except LedgerError:  # made, and its first bytes not yet written
        return 0


def processes(title: str) -> list[psutil.Process]:
    """Ray worker processes of this test's cluster whose title contains `title`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def start_driver(script: Path, agent: str, shown: Any = None, **settings: Any) -> subprocess.Popen:
    """A process of its own, with a Ray of its own, that runs `agent` on the tabular world."""
    script.write_text(f"import rayalign\nrayalign.run({agent!r}, 'rayalign/Tabular-v0', **{settings!r})\n")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, str(script)]
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=shown, stderr=shown)


def kill_driver(driver: subprocess.Popen) -> None:
    """`kill -9`; when this returns, all that it had started is gone, too."""
    assert driver.poll() is None, "the driver ended before it could be killed"
    children = psutil.Process(driver.pid).children(recursive=True)
    # Ray's own two agents take over a minute to notice that their node is gone, then leave too
    ours = [process for process in children if "Agent" not in process.name()]
    os.kill(driver.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(ours, timeout=60)
    assert not left, f"processes outlived the driver: {left}"


class Killer(threading.Thread):
    """Kills, once, the processes titled `title` when the ledger of `run_dir` holds `labels` labels."""

    def __init__(self, run_dir: Path, title: str, labels: int) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.title, self.labels, self.killed = run_dir, title, labels, []
        self.start()

    def run(self) -> None:
        path = self.run_dir / "ledger.arrow"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if spent(path) >= self.labels:
                for process in processes(self.title):
                    self.killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
                if self.killed:
                    return
            time.sleep(0.05)
