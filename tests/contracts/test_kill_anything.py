"""Kill anything at any time: the run goes on, or resumes with one command, and its ledger is the undisturbed one.

The agent is an active one, which has a posterior to lose and labels some pairs itself.
"""

import time

import pytest
from made_runs import SEA
from whole_runs import WITH_ENGINE, Killer, contents, kill_driver, spent, start_driver

import rayalign
from rayalign.ledger.ledger import Ledger
from rayalign.types import LabelSource

BUDGET, KILL_AT = 36, 14
SETTINGS = WITH_ENGINE | SEA | {"agent.gamma_burn_in": 8}


def rows(run_dir):
    """What a run bought and what its agent labelled itself, which is marked as such."""
    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    return list(zip(contents(run_dir), (p.source for p in ledger.preferences()), strict=True))


def posterior(run_dir):
    """The last state of the agent, byte by byte."""
    return (max((run_dir / "agent").glob("observed-*")) / "sea.pt").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The ledger, and the posterior, that every disturbed run has to end with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    rayalign.run("sea", "rayalign/Tabular-v0", budget=BUDGET, seed=3, run_dir=folder, **SETTINGS)
    return rows(folder), posterior(folder)


@pytest.mark.parametrize("title", ["ray::Replica", "ray::ServeReplica", "ray::Collector", "ray::RayTrainWorker"])
def test_a_killed_part_changes_nothing_that_was_or_will_be_bought(title, undisturbed, small_run, tmp_path):
    killer = Killer(tmp_path / "run", title, labels=KILL_AT)
    result = small_run(agent="sea", budget=BUDGET, **SETTINGS)
    assert killer.killed, f"no process titled {title} was found to kill"
    assert (rows(result.path), posterior(result.path)) == undisturbed
    assert result.labels_spent == BUDGET


def test_a_killed_driver_resumes_with_one_command(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    settings = {"budget": BUDGET, "seed": 3, "run_dir": str(run_dir), **SETTINGS}
    driver = start_driver(tmp_path / "driver.py", "sea", **settings)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and driver.poll() is None:
        if spent(run_dir / "ledger.arrow") >= KILL_AT:
            break
        time.sleep(0.05)
    kill_driver(driver)
    before = rows(run_dir)
    assert KILL_AT <= spent(run_dir / "ledger.arrow") < BUDGET
    assert LabelSource.SYNTHETIC in [source for _, source in before]

    result = rayalign.resume(run_dir)
    assert rows(result.path)[: len(before)] == before
    assert (rows(result.path), posterior(result.path)) == undisturbed
    assert result.labels_spent == BUDGET
