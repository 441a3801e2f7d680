"""One Ray for the whole runs of all modules here: starting it, and Serve, takes longer than most of them."""

import os
from pathlib import Path

import pytest
import ray
from ray import serve
from whole_runs import SMALL

HERE = Path(__file__).parent


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Guest:
    """Somebody else who uses the cluster's Serve: a run that ends leaves it alone."""


@pytest.fixture(scope="module")
def cluster():
    """The shared cluster, which goes on to the next module."""
    if not ray.is_initialized():
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        serve.run(Guest.bind(), name="guest", route_prefix=None)
    yield
    assert "guest" in serve.status().applications, "a run shut down the Serve of others"


@pytest.fixture(scope="module")
def no_cluster():
    """For modules whose runs need a Ray of another kind: the next one that wants the shared cluster starts it again."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster_without_serve(no_cluster):
    """For what opens a port: Serve can't be told to once it runs. A module's `cluster` can be this one."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last test of this folder no cluster is left: those of other folders start their own."""
    if nextitem is None or HERE not in nextitem.path.parents:
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
