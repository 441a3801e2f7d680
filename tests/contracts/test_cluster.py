"""A run whose parts are on several nodes: every role where its labels say, weights and ledger across them."""

import contextlib
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

    def titles(self, node):
        """Of everything on a node: Ray's own process of the node, and below it the workers."""
        raylet, found = psutil.Process(node.all_processes["raylet"][0].process.pid), set()
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.add(" ".join(process.cmdline()))
        return found


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
        seen.update({role: nodes.titles(nodes.of[role]) for role in ROLES})

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


@pytest.mark.timeout(420)
def test_engines_and_learner_workers_are_on_nodes_of_their_own_and_learn_together(nodes, tmp_path):
    """Two of each, and an agent with a posterior: weights go from one learner's node to both engines' nodes."""
    both = {role: [nodes.of[role], nodes.add(role)] for role in ("rollout", "learner")}
    seen = {role: [set(), set()] for role in both}
    settings = {"rollout.cpus_per_replica": 1, "learner.cpus_per_worker": 1, "learner.strategy": "ddp"}
    settings |= {"rollout.num_replicas": 2, "learner.num_workers": 2, "rollout.chunk_prompts": 1}
    settings |= {"agent.num_candidates": 4, "agent.posterior.updates": 2}
    over = threading.Event()

    def look():
        while not over.wait(0.2):
            for role, found in seen.items():
                for titles, node in zip(found, both[role], strict=True):
                    titles |= nodes.titles(node)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    given = {**WITH_ENGINE, **PLACED, **settings}
    result = rayalign.run("sea", "rayalign/Tabular-v0", budget=16, seed=3, run_dir=tmp_path / "run", **given)
    over.set()
    looking.join(timeout=10)
    assert result.labels_spent == spent(tmp_path / "run" / "ledger.arrow") == 16
    for role, found in seen.items():
        for titles in found:
            assert ROLES[role] in " ".join(titles), f"a node of the {role} had nothing to do"
    versions = {row[4] for row in contents(tmp_path / "run")}
    assert versions == {0, 1, 2, 3}, "the engines had the weights of every step"
