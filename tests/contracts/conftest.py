"""One Ray for the whole runs of a module: starting it takes longer than most of them."""

import os

import pytest
import ray
from whole_runs import SMALL


@pytest.fixture(scope="module")
def cluster():
    """Ends with the module, so that other modules may want none, or one of their own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def small_run(cluster, tmp_path):
    """`small_run(budget=24, **overrides)` -> Result, on the tabular world."""
    import rayalign

    def start(folder="run", agent="passive", **overrides):
        settings = {**SMALL, **overrides}
        settings.setdefault("run_dir", tmp_path / folder)
        settings.setdefault("seed", 3)
        settings.setdefault("budget", 24)
        return rayalign.run(agent, "rayalign/Tabular-v0", **settings)

    return start
