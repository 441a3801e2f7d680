"""Kill anything at any time: the run goes on, or resumes with one command, and its ledger is the undisturbed one."""

import time

import pytest
from whole_runs import WITH_ENGINE, Killer, contents, kill_driver, spent, start_driver

import rayalign


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The ledger that every disturbed run has to end with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return contents(
        rayalign.run("passive", "rayalign/Tabular-v0", budget=48, seed=3, run_dir=folder, **WITH_ENGINE).path
    )


@pytest.mark.parametrize("title", ["ray::Replica", "ray::ServeReplica", "ray::Collector", "ray::RayTrainWorker"])
def test_a_killed_part_changes_nothing_that_was_or_will_be_bought(title, undisturbed, small_run, tmp_path):
    killer = Killer(tmp_path / "run", title, labels=14)
    result = small_run(budget=48, **WITH_ENGINE)
    assert killer.killed, f"no process titled {title} was found to kill"
    assert contents(result.path) == undisturbed
    assert result.labels_spent == 48


def test_a_killed_driver_resumes_with_one_command(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    settings = {"budget": 48, "seed": 3, "run_dir": str(run_dir), **WITH_ENGINE}
    driver = start_driver(tmp_path / "driver.py", "passive", **settings)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and driver.poll() is None:
        if spent(run_dir / "ledger.arrow") >= 14:
            break
        time.sleep(0.05)
    kill_driver(driver)
    bought_before = contents(run_dir)
    assert 14 <= len(bought_before) < 48

    result = rayalign.resume(run_dir)
    assert contents(result.path)[: len(bought_before)] == bought_before
    assert contents(result.path) == undisturbed
