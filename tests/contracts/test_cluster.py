"""A run whose parts are on several nodes: every role where its labels say, weights and ledger across them."""

import shutil
import tempfile
import threading
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from whole_runs import WITH_ENGINE, contents, spent

import rayalign

ROLES = {"collector": "ray::Collector", "rollout": "ray::Replica", "learner": "ray::RayTrainWorker"}
"""Role -> title of the process that has to be on its node."""
PLACED = {
    "loop.collector_nodes": {"role": "collector"},
    "rollout.nodes": {"role": "rollout"},
    "learner.nodes": {"role": "learner"},
    "oracle.nodes": {"role": "head"},
}


class Nodes:
    """A head node and one per role, each a set of processes of its own on this machine."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=1, labels={"role": "head"})
        # The others leave when the head does; their own way to see to that can be set up in the main thread only.
        self.cluster._shutdown_at_exit = False
        self.of = {role: self.add(role) for role in ROLES}
        self.spares = {}
        self.cluster.connect()

    def add(self, role):
        return self.cluster.add_node(num_cpus=1, labels={"role": role})

    def spare(self, role):
        """Another node with the label of a role."""
        self.spares[role] = self.add(role)

    def lose(self, role):
        """The role's node dies without a word, as one does that loses its power; the spare one is the role's now."""
        self.cluster.remove_node(self.of[role], allow_graceful=False)
        self.of[role] = self.spares[role]

    def processes(self, role):
        """Everything on the role's node: Ray's own process of the node, and below it the workers."""
        raylet = psutil.Process(self.of[role].all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def titles(self, role):
        return {" ".join(p.cmdline()) for p in self.processes(role) if p.is_running()}


@pytest.fixture(scope="module")
def nodes(no_cluster):
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the path of a socket has 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)  # other Rays of this machine shall not find this one
        patch.delenv("RAY_RUNTIME_ENV_HOOK", raising=False)  # forked workers are no children of their node's process
        nodes = Nodes()
        yield nodes
        ray.shutdown()
        nodes.cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def run(folder, **settings):
    return rayalign.run("passive", "rayalign/Tabular-v0", budget=48, seed=3, run_dir=folder, **WITH_ENGINE, **settings)


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
    folder, seen = undisturbed
    assert spent(folder / "ledger.arrow") == 48
    for role in ROLES:
        found = {title for title in ROLES.values() if title in " ".join(seen[role])}
        assert found == {ROLES[role]}, f"the node of the {role} ran {sorted(seen[role])}"


class NodeKiller(threading.Thread):
    """Takes the nodes of `roles` away, one after the other, each when the ledger holds a third more of the labels."""

    def __init__(self, nodes, roles, run_dir, budget):
        super().__init__(daemon=True)
        self.nodes, self.roles, self.run_dir, self.budget, self.killed = nodes, roles, run_dir, budget, []
        self.start()

    def run(self):
        for turn, role in enumerate(self.roles):
            while spent(self.run_dir / "ledger.arrow") < (turn + 0.5) * self.budget / len(self.roles):
                time.sleep(0.05)
            self.nodes.lose(role)
            self.killed.append(role)


@pytest.mark.timeout(420)
def test_lost_nodes_change_nothing_that_was_or_will_be_bought(undisturbed, nodes, tmp_path):
    """The nodes of engine, learner and collector die in the middle of a run; others with their labels are there."""
    killer = NodeKiller(nodes, list(ROLES), tmp_path / "run", budget=48)
    for role in ROLES:
        nodes.spare(role)
    result = run(tmp_path / "run", **PLACED)
    assert killer.killed == list(ROLES)
    assert result.labels_spent == 48
    assert contents(tmp_path / "run") == contents(undisturbed[0])
