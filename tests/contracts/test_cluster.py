"""A run whose parts are on several nodes, and loses them one after the other: the same ledger as undisturbed."""

import contextlib
import json
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from whole_runs import SMALL, contents, spent

import rayalign
from rayalign.errors import ResourceError
from rayalign.ledger import Ledger

ROLES = {"collector": "ray::Collector", "rollout": "ray::Replica", "learner": "ray::RayTrainWorker"}
"""Role -> title of the process that has to be on its node."""
PLACED = {
    "loop.collector_nodes": {"role": "collector"},
    "rollout.nodes": {"role": "in(rollout, spare)"},
    "rollout.start_timeout_s": 120.0,
    "learner.nodes": {"role": "learner"},
    "oracle.nodes": {"role": "head"},
}
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
}
"""Ray takes 15 s by default to give up a node that was lost without a word."""


class Nodes:
    """A head node and one per role, each a set of processes of its own on this machine."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=1, labels={"role": "head"}, _system_config=QUICK_TO_NOTICE)
        self.of = {role: self.add(role) for role in ROLES}
        self.cluster.connect()

    def add(self, role):
        return self.cluster.add_node(num_cpus=1, labels={"role": role})

    def processes(self, role):
        """Everything on the role's node: Ray's own process of the node, and below it the workers."""
        raylet = psutil.Process(self.of[role].all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def titles(self, role):
        return {" ".join(p.cmdline()) for p in self.processes(role) if p.is_running()}

    def lose(self, role, label=None):
        """Kill the node with everything on it; one like it joins, as a cluster's manager would see to."""
        for process in self.processes(role):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.worker_nodes.remove(self.of[role])
        self.of[role] = self.add(label or role)


@pytest.fixture(scope="module")
def nodes():
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the path of a socket has 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)  # other Rays of this machine shall not find this one
        nodes = Nodes()
        yield nodes
        ray.shutdown()
        nodes.cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def run(folder, **settings):
    return rayalign.run("passive", "rayalign/Tabular-v0", budget=48, seed=3, run_dir=folder, **SMALL, **settings)


@pytest.fixture(scope="module")
def undisturbed(nodes, tmp_path_factory):
    """A run's directory, and what ran on which node while it was at work."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    seen = {}

    def look():
        while spent(folder / "ledger.arrow") < 8:
            time.sleep(0.05)
        seen.update({role: nodes.titles(role) for role in ROLES})

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    run(folder, **PLACED)
    looking.join(timeout=10)
    return folder, seen


def test_every_role_runs_on_the_nodes_that_its_labels_name_and_nowhere_else(undisturbed):
    _, seen = undisturbed
    for role in ROLES:
        found = {title for title in ROLES.values() if title in " ".join(seen[role])}
        assert found == {ROLES[role]}, f"the node of the {role} ran {sorted(seen[role])}"


@pytest.mark.timeout(300)
def test_a_run_that_loses_its_nodes_one_after_the_other_buys_what_it_would_have_bought(nodes, undisturbed, tmp_path):
    ledger, lost = tmp_path / "run" / "ledger.arrow", []

    def lose_one_after_the_other():
        for labels, role in ((10, "rollout"), (22, "learner"), (34, "collector")):
            while spent(ledger) < labels:
                time.sleep(0.02)
            nodes.lose(role, label="spare" if role == "rollout" else None)
            lost.append((role, spent(ledger)))

    with ThreadPoolExecutor(1) as pool:
        losing = pool.submit(lose_one_after_the_other)
        result = run(tmp_path / "run", **PLACED)
        losing.result(timeout=10)
    assert [role for role, _ in lost] == ["rollout", "learner", "collector"], lost
    assert lost[-1][1] < 48, "the last node was lost when nothing was left to buy"
    assert contents(result.path) == contents(undisturbed[0])
    answers = [
        json.loads(line) for file in (result.path / "oracle").glob("*") for line in file.read_text().splitlines()
    ]
    evaluated = Ledger(result.path / "evaluation.arrow", read_only=True).spent
    assert result.labels_spent == Ledger(ledger, read_only=True).spent == 48
    assert len(answers) == len({answer["duel_id"] for answer in answers}) == 48 + evaluated


def test_labels_that_no_node_has_are_an_error_before_anything_is_bought(nodes, tmp_path):
    with pytest.raises(ResourceError, match=r"1 x learner .* only on nodes with {'role': 'gpu'}: 0 of the 4 nodes"):
        run(tmp_path / "run", **(PLACED | {"learner.nodes": {"role": "gpu"}}))
    assert spent(tmp_path / "run" / "ledger.arrow") == 0
