"""Searches with Ray Tune: parallel trials under one cap, copies that go on with other settings, and killed drivers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray import tune
from whole_runs import SMALL, contents, spent

import rayalign
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.shared_budget import inherited_labels, reserved
from rayalign.loop.branch import branched_from
from rayalign.studies.search_results import SearchResults
from rayalign.studies.tune import CAP_FILE

SETTINGS = {**SMALL, "evaluation.every": 8, "evaluation.num_prompts": 2, "agent.beta": 0.1}
QUIET = {"verbose": 0}


def search(folder, **arguments):
    given = {"folder": folder, "parallel": 2, "budget": 16, **SETTINGS, **arguments}
    return rayalign.trainable("passive", "rayalign/Tabular-v0", **given)


def ledgers(folder):
    """Run directory -> labels that were bought for it."""
    bought = {}
    for path in sorted(Path(folder).glob("*/run-*")):
        with Ledger(path / "ledger.arrow", read_only=True) as ledger:
            bought[str(path.relative_to(folder))] = ledger.spent - inherited_labels(path)
    return bought


@pytest.fixture(scope="module")
def grid(cluster, tmp_path_factory):
    """Two trials of 16 labels side by side, under a cap of 26."""
    folder = tmp_path_factory.mktemp("grid")
    tuner = tune.Tuner(
        search(folder / "runs", max_labels=26),
        param_space={"learner": {"learning_rate": tune.grid_search([1e-3, 1e-2])}},
        run_config=tune.RunConfig(storage_path=str(folder), name="grid", **QUIET),
    )
    return folder, tuner.fit()


@pytest.mark.timeout(400)
def test_parallel_trials_buy_their_cap_and_not_one_label_more(grid):
    folder, results = grid
    assert not results.errors
    assert sum(ledgers(folder / "runs").values()) == 26 == sum(reserved(folder / "runs" / CAP_FILE).values())
    fewer, most = sorted(result.metrics["labels"] for result in results)
    assert fewer + most == 26 and most <= 16


def test_every_evaluation_is_a_result_with_win_rate_regret_and_labels(grid):
    _, results = grid
    for result in results:
        told = result.metrics_dataframe
        assert told["labels"].tolist() == [0, 8, result.metrics["labels"]]
        assert (told["labels"] == told["labels_bought"]).all()
        assert told[["win_rate", "regret"]].notna().all(axis=None)
        run_dir = Path(result.metrics["run_dir"])
        assert (run_dir / "result.json").exists()
        assert f"learning_rate: {result.config['learner']['learning_rate']}" in (run_dir / "config.yaml").read_text()


def test_what_a_search_found_is_a_table_a_plot_and_a_command(grid, tmp_path):
    _, results = grid
    found = SearchResults.of(results)
    assert found.labels_bought == 26 and len(found.trials) == 2
    assert found.best.win_rate == max(result.metrics["win_rate"] for result in results)
    head, lines = found.table()
    assert head == ["trial", "win rate", "labels", "bought by it", "learner.learning_rate"]
    assert {line[4] for line in lines} == {"0.001", "0.01"}
    rate = found.best.settings["learner.learning_rate"]
    assert found.command("rayalign run passive") == f"rayalign run passive --set learner.learning_rate={rate}"
    page, plot = found.write(tmp_path)
    ledgers_of_evaluation = [trial.run.path / "evaluation.arrow" for trial in found.trials]
    judged = sum(Ledger(path, read_only=True).spent for path in ledgers_of_evaluation)
    assert f"26 labels bought by 2 trials, and {judged} for evaluation" in page.read_text() and judged
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nothing_of_a_trial_is_left_on_the_cluster(grid):
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@pytest.mark.timeout(400)
def test_a_trial_that_asha_stops_spends_no_more_and_its_directory_goes_on_as_if_nothing_had_been(
    cluster, small_run, tmp_path
):
    rate = "config/learner.learning_rate"  # a metric without chance: the second trial is the worse one
    tuner = tune.Tuner(
        search(tmp_path, budget=16),
        param_space={"learner.learning_rate": tune.grid_search([1e-2, 1e-3])},
        tune_config=tune.TuneConfig(
            metric=rate,
            mode="max",
            max_concurrent_trials=1,
            scheduler=tune.schedulers.ASHAScheduler(time_attr="labels", max_t=16, grace_period=8, reduction_factor=2),
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="asha", **QUIET),
    )
    results = tuner.fit()
    assert not results.errors
    assert [result.metrics["labels_bought"] for result in results] == [16, 8]
    assert list(ledgers(tmp_path).values()) == [16, 8]
    stopped = Path(results[1].metrics["run_dir"])
    assert rayalign.resume(stopped).labels_spent == 16
    alone = small_run(budget=16, seed=0, **{**SETTINGS, "learner.learning_rate": 1e-3})
    assert contents(stopped) == contents(alone.path)


@pytest.mark.timeout(500)
def test_population_based_training_goes_on_from_copies_whose_labels_are_paid_once(cluster, tmp_path):
    bad, good = 0.0, 3e-2  # a learner that learns nothing loses
    scheduler = tune.schedulers.PopulationBasedTraining(
        time_attr="labels",
        perturbation_interval=8,
        hyperparam_mutations={"learner.learning_rate": [1e-2, 2e-2]},
        quantile_fraction=0.5,
        resample_probability=1.0,
        synch=True,
    )
    tuner = tune.Tuner(
        search(tmp_path / "runs", max_labels=28),
        param_space={"learner.learning_rate": tune.grid_search([bad, good])},
        tune_config=tune.TuneConfig(metric="win_rate", mode="max", scheduler=scheduler),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="pbt", **QUIET),
    )
    results = tuner.fit()
    assert not results.errors
    branches = [path for path in (tmp_path / "runs").glob("*/run-*") if branched_from(path)]
    assert branches
    for path in branches:
        source, labels = branched_from(path)
        (donor,) = [
            other
            for other in (tmp_path / "runs").glob("*/run-*")
            if json.loads((other / "identity.json").read_text())["id"] == source
        ]
        assert labels > 0 and contents(path)[:labels] == contents(donor)[:labels]
    bought = sum(ledgers(tmp_path / "runs").values())
    assert bought == sum(reserved(tmp_path / "runs" / CAP_FILE).values()) == 28
    assert bought == sum(result.metrics["labels_bought"] for result in results)
    judged = [spent(path) for path in (tmp_path / "runs").glob("*/run-*/evaluation.arrow")]
    paid = sum(result.metrics["evaluation_labels"] for result in results)
    copied = sum(inherited_labels(path, "evaluation_labels") for path in branches)
    assert copied > 0 and paid == sum(judged) - copied


@pytest.mark.timeout(900)
def test_a_killed_search_is_restored_and_buys_nothing_twice(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
import ray
from ray import tune
import rayalign
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
folder = Path({str(tmp_path)!r})
kind = rayalign.trainable("passive", "rayalign/Tabular-v0", folder=folder / "runs", budget=32,
                          max_labels=28, **{SETTINGS!r})
if len(sys.argv) > 1:
    tuner = tune.Tuner.restore(str(folder / "search"), kind, resume_errored=True)
else:
    tuner = tune.Tuner(kind, param_space={{"learner.learning_rate": 1e-3}},
                       run_config=tune.RunConfig(storage_path=str(folder), name="search", verbose=0))
results = tuner.fit()
assert not results.errors, results.errors
"""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and first.poll() is None:
        found = list((tmp_path / "runs").glob("*/run-0/ledger.arrow"))
        if any(spent(path) >= 12 for path in found):
            break
        time.sleep(0.2)
    assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(30)
    time.sleep(3)  # its workers find out
    (run,) = [path.parent for path in found]
    before = contents(run)
    again = subprocess.run(
        [sys.executable, "-c", code, "restore"], env=environment, capture_output=True, text=True, timeout=450
    )
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-3000:]
    assert len(before) >= 8 and contents(run)[: len(before)] == before
    assert ledgers(tmp_path / "runs") == {f"{run.parent.name}/run-0": 28}


def test_a_search_space_of_settings_that_do_not_exist_is_refused_before_a_trial_starts(cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"'learner\.learning_rat' is not a setting"):
        search(tmp_path).default_resource_request({"learner": {"learning_rat": 1e-3}})


def test_mistakes_are_told_before_a_search_starts(tmp_path):
    for arguments, message in [
        ({"learner.learning_rat": 1}, "'learner.learning_rat' is not a setting"),
        ({"max_labels": 0}, "max_labels=0 must be at least 1"),
        ({"parallel": 0}, "parallel=0 must be at least 1"),
        ({"budget": 0}, "loop.budget=0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            search(tmp_path, **arguments)
